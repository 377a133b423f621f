"""flowcoro_testing: the virtual clock, seeds, explore(), waiting for quiet, checkpoints, run_in_kernel.

That the clock and the seeds drive the kernel as they should is what all other tests rely on.
"""

import dataclasses
import gc
import inspect
import itertools
import math
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import threading
import unittest
import warnings
from functools import partial

import pytest

import flowcoro
from flowcoro_testing import (VirtualClock, assert_checkpoints, assert_no_checkpoints, explore, run_in_kernel,
                              wait_all_tasks_parked)

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUBPROCESS_TIMEOUT = 60         # seconds; each needs one, this is for a much slower machine
THREAD_TIMEOUT = 30             # seconds that a thread waits for the kernel before the test fails


@pytest.fixture(autouse=True)
def without_a_seed_from_outside(monkeypatch):
    monkeypatch.delenv("FLOWCORO_SEED", raising=False)


def run_python(*arguments, cwd, **environment):
    """Run Python with warnings as errors; returns the CompletedProcess with all output in stdout."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments], cwd=cwd, timeout=SUBPROCESS_TIMEOUT, encoding="utf-8",
        env={**inherited, "PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def hooks():
    return flowcoro.current_kernel().hooks


@pytest.fixture
def sockets():
    """Two sockets that are connected, neither of them blocking."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.setblocking(False)
        yield near, far


# ---- the virtual clock -------------------------------------------------------------------------------------

@run_in_kernel
async def test_clock_jumps_to_the_next_deadline_when_all_tasks_are_parked():
    log = []

    async def sleep(seconds):
        await flowcoro.sleep(seconds)
        log.append((seconds, flowcoro.now()))

    await flowcoro.when_all(sleep(30), sleep(10), sleep(10 ** 9), sleep(20))
    assert log == [(10, 10), (20, 20), (30, 30), (10 ** 9, 10 ** 9)]


@pytest.mark.parametrize("seed", range(5))
def test_every_sleep_ends_at_its_very_deadline_and_in_the_order_of_deadlines(seed):
    draw, log = random.Random(seed), []

    async def sleep_on_and_on():
        for _ in range(5):
            seconds = draw.choice([draw.random(), draw.randrange(1, 100) / 10, 0.1, 1e6, 1e-9])
            deadline = flowcoro.now() + seconds
            await flowcoro.sleep_until(deadline)
            log.append(deadline)
            assert flowcoro.now() == deadline

    async def main():
        await flowcoro.when_all(*(sleep_on_and_on() for _ in range(40)))

    flowcoro.run(main(), clock=VirtualClock(start=draw.random()), seed=seed)
    assert log == sorted(log) and len(log) == 200


@run_in_kernel
async def test_nested_timeouts_expire_each_at_its_own_deadline_between_the_sleeps_of_others():
    log = []

    async def sleep_under_three_timeouts():
        with flowcoro.move_on_after(5) as outer:
            with flowcoro.move_on_after(9):
                with flowcoro.move_on_after(3):
                    await flowcoro.sleep(math.inf)
                log.append(("inner", flowcoro.now()))
                await flowcoro.sleep(math.inf)
            log.append("the one in between has not expired")
        assert outer.cancelled_caught
        log.append(("outer", flowcoro.now()))

    async def tick():
        for _ in range(6):
            log.append(flowcoro.now())
            await flowcoro.sleep(1)

    await flowcoro.when_all(tick(), sleep_under_three_timeouts())
    assert [entry for entry in log if isinstance(entry, tuple)] == [("inner", 3), ("outer", 5)]
    assert log.index(2) < log.index(("inner", 3)) < log.index(4) < log.index(("outer", 5))


@run_in_kernel
async def test_clock_stands_still_while_any_task_can_run():
    sleeper = flowcoro.spawn(flowcoro.sleep(1e-9))
    for _ in range(1000):
        await flowcoro.checkpoint()
    assert flowcoro.now() == 0 and not sleeper.done()
    await sleeper
    assert flowcoro.now() == 1e-9


@run_in_kernel
async def test_clock_does_not_move_while_a_thread_works():
    idle = threading.Event()

    class Idle:
        def before_poll(self, timeout):
            idle.set()

    def work():
        assert idle.wait(THREAD_TIMEOUT)        # the kernel has nothing to do, and a deadline ahead of it
        return flowcoro.call_from_thread(flowcoro.now)

    sleeper = flowcoro.spawn(flowcoro.sleep(THREAD_TIMEOUT))
    flowcoro.add_hooks(Idle())
    assert await flowcoro.to_thread(work) == 0
    assert flowcoro.now() == 0
    await sleeper
    assert flowcoro.now() == THREAD_TIMEOUT


@run_in_kernel
async def test_what_a_descriptor_has_to_report_comes_before_a_jump(sockets):
    async def echo(own, rounds):
        for _ in range(rounds):
            await flowcoro.wait_readable(own)
            own.send(own.recv(1))

    near, far = sockets
    near.send(b"x")
    with flowcoro.timeout(1e-6):
        await flowcoro.when_all(echo(near, 20), echo(far, 20))
    assert flowcoro.now() == 0


def test_clock_starts_where_it_is_told_and_goes_on_in_the_next_run():
    async def main():
        before = flowcoro.now()
        await flowcoro.sleep(5)
        return before, flowcoro.now()

    clock = VirtualClock(start=-2)
    assert flowcoro.run(main(), clock=clock) == (-2, 3)
    assert flowcoro.run(main(), clock=clock) == (3, 8)
    assert clock.now() == 8 and repr(clock) == "<VirtualClock 8.000>"


def test_advance_lets_time_pass_while_tasks_run_and_deadlines_are_then_over():
    async def main():
        sleeper = flowcoro.spawn(flowcoro.sleep(2))
        with pytest.raises(TimeoutError):
            with flowcoro.timeout(10):
                await flowcoro.checkpoint()
                clock.advance(11)
                clock.advance(0)
                assert flowcoro.now() == 11
                await flowcoro.sleep(100)
        assert flowcoro.now() == 11 and sleeper.done()

    clock = VirtualClock()
    flowcoro.run(main(), clock=clock)


@pytest.mark.parametrize("seconds", [-1, -1e-9, math.inf, -math.inf, math.nan, "1", None])
def test_clock_goes_neither_backwards_nor_to_infinity_nor_by_what_is_no_number(seconds):
    clock = VirtualClock(start=7)
    wrong = ValueError if isinstance(seconds, (int, float)) else TypeError
    with pytest.raises(wrong):
        clock.advance(seconds)
    assert clock.now() == 7
    if seconds not in (-1, -1e-9):
        with pytest.raises(wrong):
            VirtualClock(seconds)


# ---- seeds -------------------------------------------------------------------------------------------------

def order(seed):
    """What five tasks and a dozen selects do in the kernel with this seed, as two strings."""
    log = []

    async def work(name):
        for _ in range(3):
            log.append(name)
            await flowcoro.checkpoint()

    async def main():
        await flowcoro.when_all(*map(work, "abcde"))
        channels = [flowcoro.Channel(math.inf) for _ in range(3)]
        for _ in range(12):
            for channel in channels:
                channel.send_nowait("item")
        return "".join([str((await flowcoro.select(*channels))[0]) for _ in range(12)])

    choices = run_in_kernel(main, seed=seed)()
    return "".join(log), choices


def test_order_of_tasks_is_that_of_arrival_without_a_seed_and_another_for_each_seed():
    assert order(None)[0] == "abcde" * 3
    assert order(None) == order(None)
    tasks, choices = zip(*map(order, range(20)))
    assert len(set(tasks)) == len(set(choices)) == 20
    assert all(sorted(log) == sorted("abcde" * 3) for log in tasks)


@pytest.mark.parametrize("seed", [0, -3, 10 ** 30, "a word"])
def test_order_is_the_same_for_the_same_seed(seed):
    assert order(seed) == order(seed) != order(None)


def test_order_is_the_same_in_another_process_whatever_its_hash_seed(tmp_path):
    code = "import test_testing; print([test_testing.order(seed) for seed in (None, 7, 'seven')])"
    for hash_seed in "1", "2":
        done = run_python("-c", code, cwd=tmp_path, PYTHONHASHSEED=hash_seed)
        assert done.stdout.strip() == str([order(None), order(7), order("seven")])


@pytest.mark.parametrize("seed", [None, 3])
def test_async_generators_left_suspended_are_closed_in_the_same_order_for_the_same_seed(seed):
    async def generate(log, number):
        try:
            yield
        finally:
            log.append(number)

    async def main():
        log = []
        generators.extend(generate(log, number) for number in range(20))
        for generator in generators[-20:]:
            await anext(generator)
        return log

    generators = []                 # of both runs, so that those of the second lie elsewhere in memory
    logs = [flowcoro.run(main(), seed=seed) for _ in range(2)]
    assert logs[0] == logs[1] and sorted(logs[0]) == list(range(20))


def test_seed_of_the_environment_counts_where_none_is_given(monkeypatch):
    async def seed():
        return flowcoro.runtime_info()["seed"]

    for text, number in ("12", 12), ("-12", -12), ("a word", "a word"), ("", None):
        monkeypatch.setenv("FLOWCORO_SEED", text)
        assert run_in_kernel(seed)() == number, "the same as if it were given to run_in_kernel"
        assert run_in_kernel(seed, seed=0)() == 0


def test_error_leaves_with_a_note_that_says_how_to_repeat_it(monkeypatch):
    @run_in_kernel
    async def test():
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        test()
    assert not hasattr(caught.value, "__notes__"), "without a seed there is nothing to say"
    monkeypatch.setenv("FLOWCORO_SEED", "99")
    with pytest.raises(KeyError) as caught:
        test()
    assert caught.value.__notes__ == ["seed 99: FLOWCORO_SEED=99 repeats this order of tasks"]


FAILING_FILES = {
    "pytest": """
import flowcoro, flowcoro_testing

@flowcoro_testing.run_in_kernel
async def test_order():
    log = []
    async def work(name):
        log.append(name)
    await flowcoro.when_all(*map(work, "abcdefgh"))
    assert log == list("abcdefgh"), f"order {''.join(log)}"
""",
    "unittest": """
import unittest, flowcoro, flowcoro_testing

class Order(unittest.TestCase):
    @flowcoro_testing.run_in_kernel
    async def test_order(self):
        log = []
        async def work(name):
            log.append(name)
        await flowcoro.when_all(*map(work, "abcdefgh"))
        self.assertEqual(log, list("abcdefgh"), f"order {''.join(log)}")
"""}


@pytest.mark.parametrize("runner", FAILING_FILES)
def test_seed_is_printed_with_the_failure_and_repeats_it(runner, tmp_path):
    (tmp_path / "test_generated.py").write_text(FAILING_FILES[runner], encoding="utf-8")
    options = ["-p", "no:cacheprovider"] if runner == "pytest" else []
    command = ["-m", runner, *options, "test_generated.py"]
    outputs = [run_python(*command, cwd=tmp_path, FLOWCORO_SEED="7", PYTHONHASHSEED=text) for text in "12"]
    for done in outputs:
        assert done.returncode == 1, done.stdout
        assert "seed 7: FLOWCORO_SEED=7 repeats this order of tasks" in done.stdout
    first, again = [re.search("order ([a-h]{8})", done.stdout).group(1) for done in outputs]
    assert first == again


# ---- explore -----------------------------------------------------------------------------------------------

async def deposit_twice(lock=None):
    """Right in the order of arrival, and an update is lost in some others, unless there is a lock."""
    balance = 0

    async def deposit(steps_before):
        nonlocal balance
        for _ in range(steps_before):
            await flowcoro.checkpoint()
        if lock is not None:
            await lock.acquire()
        seen = balance
        await flowcoro.checkpoint()
        balance = seen + 1
        if lock is not None:
            lock.release()

    await flowcoro.when_all(deposit(0), deposit(2))
    assert balance == 2


def test_explore_finds_a_lost_update_and_names_the_seed_that_repeats_it(monkeypatch):
    run_in_kernel(deposit_twice)()
    with pytest.raises(AssertionError) as caught:
        explore(deposit_twice)
    note, = caught.value.__notes__
    seed = int(re.match(r"seed (\d+)", note)[1])
    assert note == f"seed {seed}: explore(deposit_twice, seeds=[{seed}]) repeats this order of tasks"
    assert explore(deposit_twice, range(seed)) == seed, "the ones before were good"
    with pytest.raises(AssertionError):
        explore(deposit_twice, seeds=[seed])
    with pytest.raises(AssertionError):
        run_in_kernel(deposit_twice, seed=seed)()
    monkeypatch.setenv("FLOWCORO_SEED", str(seed))
    with pytest.raises(AssertionError):
        run_in_kernel(deposit_twice)()


def test_explore_runs_a_right_test_once_for_each_seed_and_returns_how_often_that_was():
    seeds = []

    async def test():
        seeds.append(flowcoro.runtime_info()["seed"])
        await deposit_twice(flowcoro.Lock())

    assert explore(test) == 100
    assert seeds == list(range(100))
    assert explore(test, iter(["x", 5])) == 2
    with pytest.raises(ValueError, match="no seed, and test has not run"):
        explore(test, seeds=[])
    assert seeds[100:] == ["x", 5]


def test_explore_takes_the_options_of_run_in_kernel():
    async def test():
        before.append(flowcoro.now())
        await flowcoro.sleep(math.inf)

    before = []
    with pytest.raises(TimeoutError):
        explore(test, clock=lambda: VirtualClock(start=50), timeout=10)
    assert before == [50]


def test_explore_takes_a_test_with_its_arguments_filled_in_by_partial():
    assert explore(partial(order_of, "abc"), range(3)) == 3
    with pytest.raises(ZeroDivisionError) as caught:
        explore(partial(order_of, 0), range(3))
    assert caught.value.__notes__[0].startswith("seed 0: explore(functools.partial(")


async def order_of(names):
    return names or 1 / 0


@pytest.mark.parametrize("wrong", [lambda: None, run_in_kernel(deposit_twice), 7, None])
def test_explore_of_anything_but_an_async_function_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="takes an async function"):
        explore(wrong)


# ---- waiting for quiet -------------------------------------------------------------------------------------

@run_in_kernel
async def test_wait_lets_all_ready_tasks_run_until_they_park():
    log = []

    async def work(name, steps):
        for _ in range(steps):
            await flowcoro.checkpoint()
        flowcoro.spawn(rest(name))

    async def rest(name):
        log.append(name)
        await flowcoro.sleep(1)
        log.append("too late")

    for steps in 500, 3, 0:
        flowcoro.spawn(work(steps, steps))
    await wait_all_tasks_parked()
    assert log == [0, 3, 500]
    await wait_all_tasks_parked()
    assert log == [0, 3, 500] and flowcoro.now() == 0, "it returns before the clock jumps"


@run_in_kernel
async def test_wait_of_the_only_task_returns_and_leaves_no_hook():
    for _ in range(3):
        await wait_all_tasks_parked()
    assert hooks() is None


def test_wait_returns_when_all_are_parked_in_every_order():
    async def test():
        channel, log = flowcoro.Channel(), []

        async def relay():
            log.append(await channel.receive())

        for number in range(5):
            flowcoro.spawn(relay())
        await wait_all_tasks_parked()
        assert channel.statistics()["receivers_waiting"] == 5
        for number in range(5):
            await channel.send(number)
        await wait_all_tasks_parked()
        assert sorted(log) == list(range(5))

    assert explore(test, range(20)) == 20


@run_in_kernel
async def test_several_tasks_may_wait_and_all_are_woken_by_the_same_quiet():
    log = []

    async def wait(name):
        await wait_all_tasks_parked()
        log.append((name, flowcoro.now()))
        await flowcoro.sleep(1)

    async with flowcoro.TaskGroup() as group:
        for name in "abc":
            group.spawn(wait(name))
        await flowcoro.sleep(1)
        assert sorted(log) == [("a", 0), ("b", 0), ("c", 0)]
    assert hooks() is None


@run_in_kernel
async def test_cancelled_wait_leaves_nothing_behind_and_the_others_waiting():
    log = []

    async def wait(name):
        await wait_all_tasks_parked()
        log.append(name)

    first, second = flowcoro.spawn(wait("a")), flowcoro.spawn(wait("b"))
    await flowcoro.checkpoint()
    first.cancel()
    await second
    assert first.cancelled() and log == ["b"] and hooks() is None
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        await wait_all_tasks_parked()
        pytest.fail("it is a point of cancellation")
    assert hooks() is None


@pytest.mark.parametrize("others", [0, 1, math.inf])
@pytest.mark.parametrize("clock", [VirtualClock(), None], ids=["virtual", "real"])
def test_wait_lets_those_run_first_whose_descriptors_are_ready_by_now(clock, others, sockets):
    near, far = sockets
    log = []

    async def read():
        while True:
            await flowcoro.wait_readable(far)
            if clock is not None:
                clock.advance(1)            # and the wait is still not over
            for _ in range(100):
                await flowcoro.checkpoint()
            log.append(far.recv(100))

    async def main():
        flowcoro.spawn(read())
        if others:
            flowcoro.spawn(flowcoro.sleep(others * 3600))
        for text in b"one", b"two":
            await wait_all_tasks_parked()
            near.send(text)
        before = flowcoro.now()
        await wait_all_tasks_parked()
        assert log == [b"one", b"two"]
        assert flowcoro.now() - before < 3600

    flowcoro.run(main(), clock=clock)


@run_in_kernel
async def test_wait_lets_those_run_first_whom_another_hook_has_woken(sockets):
    class Waker:
        def before_poll(self, timeout):
            lot.unpark_all()

    async def work():
        await lot.park()
        for _ in range(500):                # so many that the kernel polls in between
            await flowcoro.checkpoint()
        log.append("done")

    lot, log = flowcoro.ParkingLot(), []
    flowcoro.spawn(flowcoro.wait_readable(sockets[0]))
    flowcoro.spawn(work())
    flowcoro.add_hooks(Waker())
    await wait_all_tasks_parked()
    assert log == ["done"]


@run_in_kernel
async def test_wait_does_not_wait_for_threads():
    release = threading.Event()
    call = flowcoro.spawn(flowcoro.to_thread(release.wait, THREAD_TIMEOUT))
    await wait_all_tasks_parked()
    assert call.state == "parked"
    release.set()
    assert await call is True


# ---- asserting checkpoints ---------------------------------------------------------------------------------

def made(thing, method, *args):
    """`thing`, after a call of its method."""
    getattr(thing, method)(*args)
    return thing


async def nothing():
    pass


async def enter(context):
    async with context:
        pass


async def wait_for():
    async with (condition := flowcoro.Condition()):
        with assert_checkpoints():
            await condition.wait_for(lambda: True)


async def receive_from_broadcast():
    broadcast = flowcoro.Broadcast(1)
    with broadcast.subscribe() as subscription:
        broadcast.send_nowait("item")
        with assert_checkpoints():
            await subscription.receive()


async def join_what_has_ended():
    task = flowcoro.spawn(nothing())
    await flowcoro.checkpoint()
    assert task.done()
    with assert_checkpoints():
        await task


async def stop():
    flowcoro.request_stop()
    with assert_checkpoints():
        await flowcoro.stop_requested()


async def wait_for_ready_descriptors():
    near, far = socket.socketpair()
    with near, far:
        near.send(b"x")
        for wait in flowcoro.wait_readable, flowcoro.wait_writable:
            with assert_checkpoints():
                await wait(far)
        flowcoro.notify_closing(far)


# Operations that need not wait. Those that need something of the kernel first are functions above.
every_operation = pytest.mark.parametrize("operation", [
    'flowcoro.checkpoint()',
    'flowcoro.sleep(0)',
    'flowcoro.sleep(1)',
    'flowcoro.sleep_until(-1)',
    'flowcoro.Lock().acquire()',
    'flowcoro.Semaphore(1).acquire()',
    'flowcoro.RWLock().read.acquire()',
    'flowcoro.RWLock().write.acquire()',
    'enter(flowcoro.Condition())',
    'wait_for()',
    'made(flowcoro.Event(), "set").wait()',
    'flowcoro.Barrier(1).wait()',
    'flowcoro.Channel(1).send("item")',
    'made(flowcoro.Channel(1), "send_nowait", "item").receive()',
    'anext(made(flowcoro.Channel(1), "send_nowait", "item"))',
    'anext(made(flowcoro.Channel(), "close"), None)',
    'flowcoro.select(flowcoro.Channel(), (flowcoro.Channel(1), "item"))',
    'flowcoro.Broadcast(1).send("item")',
    'receive_from_broadcast()',
    'made(flowcoro.Promise(), "set_result", 1)',
    'join_what_has_ended()',
    'enter(flowcoro.TaskGroup())',
    'flowcoro.when_all()',
    'flowcoro.when_all(nothing())',
    'flowcoro.when_any(nothing(), flowcoro.sleep_until(math.inf))',
    'anext(flowcoro.as_completed(), None)',
    'anext(flowcoro.as_completed(nothing()))',
    'flowcoro.to_thread(int)',
    'stop()',
    'wait_for_ready_descriptors()',
    'wait_all_tasks_parked()',
])


@every_operation
@run_in_kernel
async def test_operation_passes_a_checkpoint_also_when_it_need_not_wait(operation):
    with assert_checkpoints():
        await eval(operation)


@every_operation
@run_in_kernel
async def test_operation_that_passes_a_checkpoint_is_noticed_where_there_should_be_none(operation):
    with pytest.raises(AssertionError, match="the block passed a checkpoint"):
        with assert_no_checkpoints():
            await eval(operation)


@run_in_kernel
async def test_what_never_waits_passes_no_checkpoint():
    lock, event, channel, promise = flowcoro.Lock(), flowcoro.Event(), flowcoro.Channel(1), flowcoro.Promise()
    with assert_no_checkpoints():
        lock.acquire_nowait()
        lock.release()
        event.set()
        channel.send_nowait("item")
        assert flowcoro.select_nowait(channel) == (0, "item")
        channel.close()
        promise.set_result(1)
        with flowcoro.CancelScope(), flowcoro.timeout(1):
            flowcoro.spawn(flowcoro.sleep(1)).cancel()
        async with flowcoro.ObjectPool(object, 1).borrow():
            await nothing()
    with pytest.raises(AssertionError, match="the block passed no checkpoint"):
        with assert_checkpoints():
            await nothing()


@run_in_kernel
async def test_watched_block_leaves_the_budget_as_it_was_when_no_checkpoint_came():
    task = flowcoro.current_task()
    for budget in 0, 1, 100:
        task.budget = budget
        with assert_no_checkpoints():
            pass
        assert task.budget == budget
        with pytest.raises(AssertionError):
            with assert_checkpoints():
                pass
        assert task.budget == budget
        for assertion in assert_checkpoints, assert_no_checkpoints:
            with pytest.raises(KeyError):
                with assertion():
                    raise KeyError
            assert task.budget == budget


@pytest.mark.parametrize("assertion", [assert_checkpoints, assert_no_checkpoints])
@run_in_kernel
async def test_error_of_a_watched_block_leaves_it_as_it_is(assertion):
    with pytest.raises(KeyError, match="before"):
        with assertion():
            raise KeyError("before")
    with pytest.raises(KeyError, match="after"):
        with assertion():
            await flowcoro.checkpoint()
            raise KeyError("after")
    with pytest.raises(TimeoutError):
        with flowcoro.timeout(1), assertion():
            await flowcoro.sleep(2)


@run_in_kernel
async def test_assertions_nest():
    with assert_checkpoints():
        with assert_no_checkpoints():
            pass
        with assert_checkpoints():
            await flowcoro.Lock().acquire()
        with assert_no_checkpoints(), assert_no_checkpoints():
            pass
    with pytest.raises(AssertionError, match="passed a checkpoint"):
        with assert_no_checkpoints():
            with assert_checkpoints():
                await flowcoro.Lock().acquire()
            with assert_no_checkpoints():
                pass


@run_in_kernel
async def test_operation_in_a_watched_block_is_cancelled_as_it_would_be_outside():
    lock = flowcoro.Lock()
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        with assert_checkpoints():
            await lock.acquire()
    assert scope.cancelled_caught and not lock.locked()
    with assert_checkpoints():
        with flowcoro.CancelScope() as scope:
            scope.cancel()
            await lock.acquire()
    assert scope.cancelled_caught and not lock.locked()


@run_in_kernel
async def test_loop_over_watched_blocks_does_not_starve_the_others():
    async def count():
        for turn in itertools.count():
            turns[0] = turn
            await flowcoro.checkpoint()

    turns, lock = [0], flowcoro.Lock()
    other = flowcoro.spawn(count())
    for _ in range(2000):
        with assert_checkpoints():
            await lock.acquire()
        lock.release()
    other.cancel()
    assert turns[0] >= 10


@pytest.mark.parametrize("assertion", [assert_checkpoints, assert_no_checkpoints])
def test_assertion_outside_a_kernel_is_a_runtime_error(assertion):
    with pytest.raises(RuntimeError):
        with assertion():
            pytest.fail("there is no task to watch")


# ---- running tests in a kernel -----------------------------------------------------------------------------

@pytest.fixture
def number():
    return 21


class TestMethodsOfAClass:
    attribute = "mine"

    @pytest.mark.parametrize("factor, product", [(1, 21), (2, 42)])
    @run_in_kernel(timeout=60)
    async def test_fixtures_and_parameters_arrive_in_the_kernel(self, number, factor, product):
        await flowcoro.sleep(59)
        assert number * factor == product and self.attribute == "mine"


class MethodsOfATestCase(unittest.TestCase):
    def setUp(self):
        self.addCleanup(self.assertRaises, RuntimeError, flowcoro.current_task)

    @run_in_kernel(seed=3, timeout=60)
    async def test_methods_of_unittest_use_its_assertions(self):
        await flowcoro.sleep(1)
        self.assertEqual(flowcoro.now(), 1)
        for seconds in 1, 2:
            with self.subTest(seconds=seconds), self.assertRaises(TimeoutError):
                with flowcoro.timeout(seconds):
                    await flowcoro.sleep(3)


def test_decorated_test_keeps_its_name_docstring_and_signature_and_is_no_coroutine_function():
    async def test_it(a, b=2, *, c):
        """What it shows."""
        return a, b, c

    for test in run_in_kernel(test_it), run_in_kernel(seed=1)(test_it):
        assert (test.__name__, test.__doc__, test.__wrapped__) == ("test_it", "What it shows.", test_it)
        assert str(inspect.signature(test)) == "(a, b=2, *, c)"
        assert not inspect.iscoroutinefunction(test)
        assert test(1, c=3) == (1, 2, 3)


def test_each_call_has_a_kernel_and_a_clock_of_its_own_and_the_error_of_one_leaves_nothing_to_the_next():
    @run_in_kernel
    async def test():
        kernels.append(flowcoro.current_kernel())
        assert hooks() is None and flowcoro.now() == 0 and flowcoro.statistics()["tasks"]["alive"] == 1
        await flowcoro.sleep(1)
        flowcoro.spawn(wait_all_tasks_parked())
        flowcoro.spawn(flowcoro.sleep(math.inf))
        await flowcoro.checkpoint()
        assert hooks()
        raise KeyError

    kernels = []
    for _ in range(3):
        with pytest.raises(KeyError):
            test()
        with pytest.raises(RuntimeError):
            flowcoro.current_task()
    assert len(set(kernels)) == 3


def test_clock_may_be_an_object_that_goes_on_or_a_function_that_makes_one():
    async def test():
        await flowcoro.sleep(1)
        return flowcoro.now()

    clock = VirtualClock(start=5)
    for clock, times in [(clock, [6, 7]), (VirtualClock, [1, 1]), (lambda: VirtualClock(start=9), [10, 10])]:
        decorated = run_in_kernel(clock=clock)(test)
        assert [decorated(), decorated()] == times


def test_timeout_ends_a_test_that_hangs():
    clock, log = VirtualClock(), []

    @run_in_kernel(timeout=60, clock=clock)
    async def test():
        try:
            await flowcoro.Event().wait()
        finally:
            log.append(flowcoro.now())

    with pytest.raises(TimeoutError, match="60"):
        test()
    assert log == [60] and clock.now() == 60


@pytest.mark.parametrize("wrong", [lambda: None, 7, VirtualClock, run_in_kernel(order_of)])
def test_decorating_anything_but_an_async_function_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="decorates an async function"):
        run_in_kernel(wrong)
    with pytest.raises(TypeError, match="decorates an async function"):
        run_in_kernel(seed=1)(wrong)


@pytest.mark.parametrize("options, error", [
    ({"no_such_option": 1}, TypeError), ({"workers": 2}, ValueError), ({"timeout": -1}, ValueError),
    ({"clock": lambda: 1 / 0}, ZeroDivisionError), ({"clock": 7}, TypeError), ({"seed": []}, TypeError)])
def test_option_of_nonsense_is_an_error_and_no_coroutine_is_left_that_nobody_awaited(options, error):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(error):
            run_in_kernel(order_of, **options)("abc")
        gc.collect()
    assert [warning for warning in caught if "never awaited" in str(warning.message)] == []


def test_waiting_for_quiet_beside_a_descriptor_and_a_busy_task_reports_nothing(reports):
    async def busy():
        for _ in range(500):
            await flowcoro.checkpoint()

    async def main():
        read, write = os.pipe()
        os.set_blocking(read, False)
        pollable = flowcoro.Pollable(read)
        try:
            task = flowcoro.spawn(busy())
            await wait_all_tasks_parked()
            assert task.done()
        finally:
            pollable.close()
            os.close(read)
            os.close(write)

    flowcoro.run(main())
    assert reports == []


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """An error of which no attribute can be set."""

    number: int


def test_a_frozen_error_passes_unharmed_and_its_seed_is_told(capsys):
    async def test():
        with assert_checkpoints():
            raise Frozen(7)

    for run in (lambda: explore(test, [3]), run_in_kernel(seed=3)(test)):
        with pytest.raises(Frozen) as caught:
            run()
        assert caught.value.number == 7
        assert "seed 3: " in capsys.readouterr().err


@pytest.mark.parametrize("seeds", [5, None])
def test_explore_wants_several_seeds(seeds):
    async def test():
        """Never run."""

    with pytest.raises(TypeError, match="give several"):
        explore(test, seeds)
