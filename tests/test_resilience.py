"""flowcoro_resilience: policies in general, windows, Keyed, Pipeline. On the virtual clock."""

import functools
import os
import random
import threading
import warnings

import pytest

import flowcoro
from flowcoro_resilience import (AdaptiveBreaker, CircuitBreaker, CountWindow, Keyed, Pipeline, Policy, PolicyEvent, Rejected,
                                 RetryBudget, TimeWindow)
from flowcoro_testing import VirtualClock, run_in_kernel


class Pass(Policy):
    """Lets everything through, and writes down what happens."""

    def __init__(self, name="pass", log=None):
        super().__init__(name)
        self.log = [] if log is None else log

    async def _run(self, call, proceed):
        self.log.append((self.name, "in", call.key, call.idempotent))
        self._tell("in", call.key)
        try:
            return await proceed()
        finally:
            self.log.append((self.name, "out"))


async def double(number, *, more=0):
    await flowcoro.sleep(1)
    return 2 * number + more


# ---- policies --------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_an_operation_may_be_async_or_not_and_gets_its_arguments():
    policy = Pass()
    assert await policy.try_execute(double, 4, more=1) == 9
    assert await policy.try_execute(lambda number: number + 1, 4) == 5
    assert await policy.try_execute(dict, operation=1, self=2) == {"operation": 1, "self": 2}
    before = flowcoro.now()
    assert await policy.try_execute(flowcoro.sleep, 5) is None and flowcoro.now() == before + 5    # a generator that is awaitable
    assert list(await policy.try_execute(lambda: (number for number in (1, 2)))) == [1, 2]


@run_in_kernel
async def test_what_an_operation_raises_comes_out_as_it_is():
    error = KeyError("gone")

    def fail():
        raise error

    with pytest.raises(KeyError) as caught:
        await Pass().try_execute(fail)
    assert caught.value is error


@run_in_kernel
async def test_a_coroutine_object_is_refused_and_closed():
    with pytest.raises(TypeError, match="give the function, and its arguments after it"):
        await Pass().try_execute(double(1))
    with pytest.raises(TypeError, match="got 5: give a function"):
        await Pass().try_execute(5)


@run_in_kernel
async def test_generator_functions_are_refused_since_they_have_done_nothing_when_they_return():
    async def pages(number):
        yield number

    for policy in Pass(), CircuitBreaker(), Pipeline(CircuitBreaker()), AdaptiveBreaker():
        for operation in pages, one_by_one, functools.partial(pages, 1):
            with pytest.raises(TypeError, match="a generator function: its call returns before anything is done"):
                await policy.try_execute(operation, *[1] * (operation in (pages, one_by_one)))
        assert [page async for page in await policy.try_execute(lambda: pages(1))] == [1]       # a result like others


@run_in_kernel
async def test_a_policy_is_a_decorator_of_async_functions():
    policy = Pass()

    @policy
    async def triple(number):
        """Three times."""
        return 3 * number

    assert await triple(number=3) == 9
    assert triple.__doc__ == "Three times." and policy.log == [("pass", "in", None, False), ("pass", "out")]
    with pytest.raises(TypeError, match="decorates async functions"):
        policy(lambda: 1)
    triple.idempotent, triple.key = True, "there"         # as said to the function before
    policy.log.clear()
    assert await triple(1) == 3 and policy.log[0] == ("pass", "in", "there", True) and triple.policy is policy


@run_in_kernel
async def test_listeners_are_told_until_they_are_removed_and_their_errors_change_nothing(monkeypatch):
    policy, heard, reported = Pass(), [], []
    monkeypatch.setattr("sys.unraisablehook", lambda report: reported.append((report.exc_value, report.err_msg)))
    error = RuntimeError("a listener of mine")

    @policy.add_listener
    def bad(event):
        raise error

    listener = policy.add_listener(heard.append)
    assert await policy.try_execute(double, 1) == 2
    assert heard == [PolicyEvent(policy, "in", None, {})]
    assert reported == [(error, "flowcoro_resilience: a listener of 'pass' failed at 'in'")]
    policy.remove_listener(listener)
    policy.remove_listener(bad)
    await policy.try_execute(double, 1)
    assert len(heard) == len(reported) == 1
    with pytest.raises(ValueError, match="was not added"):
        policy.remove_listener(listener)
    with pytest.raises(TypeError, match="give a function"):
        policy.add_listener("print")


@run_in_kernel
async def test_a_result_that_nobody_gets_is_discarded_even_while_its_task_is_cancelled(monkeypatch):
    reported, dropped = [], []
    monkeypatch.setattr("sys.unraisablehook", lambda report: reported.append(report.exc_value))

    class Twice(Policy):
        async def _run(self, call, proceed):
            await call.drop(await proceed(), self)
            return await proceed()

    async def discard(result):
        await flowcoro.sleep(1)
        dropped.append(result)
        raise ValueError("it does not close")

    numbers = iter(range(9))

    async def operation():
        return next(numbers)

    operation.discard = discard
    assert await Twice().try_execute(operation) == 1
    with flowcoro.move_on_after(0.5):
        await Twice().try_execute(operation)
    assert dropped == [0, 2] and [str(error) for error in reported] == ["it does not close"] * 2


async def later(*args):
    """What it says nobody awaits."""


def one_by_one(*args):
    yield args


@pytest.mark.parametrize("make", [
    lambda function: Pass().add_listener(function), lambda function: Keyed(function),
    lambda function: Keyed(Pass, key=function), lambda function: CircuitBreaker(failure_result=function),
    lambda function: CircuitBreaker(failures=function), lambda function: CircuitBreaker(ignored=function),
    lambda function: CircuitBreaker(clock=function), lambda function: AdaptiveBreaker(random=function)])
def test_async_functions_and_generators_are_refused_where_nobody_would_await_them(make):
    for function in (later, one_by_one, functools.partial(later, 1)):
        with pytest.raises(TypeError, match="this one is async, or a generator"):
            make(function)


def test_a_policy_is_shown_by_its_name():
    assert repr(Pass("to the shop")) == "<Pass 'to the shop'>"
    assert repr(Pipeline(Pass(("shop", 80)), Pass("b"))) == "<Pipeline ('shop', 80) > b>"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_the_child_of_a_fork_does_not_wait_for_a_lock_that_a_thread_of_its_parent_had():
    breaker, budget, held, done = CircuitBreaker(), RetryBudget(), threading.Event(), threading.Event()

    def hold():
        with breaker._lock, budget._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # from Python 3.12 on it warns of threads
        child = os.fork()
    if not child:
        free = breaker._lock.acquire(blocking=False) and budget._lock.acquire(blocking=False)
        os._exit(0 if free else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


# ---- windows ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(20))
def test_a_count_window_is_the_sum_of_the_last_calls(seed):
    chance = random.Random(seed)
    size = chance.randint(1, 9)
    window, calls = CountWindow(size, 2), []
    for _ in range(200):
        counts = (chance.randint(0, 1), chance.randint(0, 3))
        window.add(counts)
        calls.append(counts)
        last = calls[-size:]
        assert (window.calls, window.totals) == (len(last), [sum(column) for column in zip(*last)])
        assert window.contents() == last
    window.clear()
    assert (window.calls, window.totals) == (0, [0, 0])


@pytest.mark.parametrize("seed", range(20))
def test_a_time_window_is_the_sum_of_the_calls_in_its_buckets(seed):
    chance = random.Random(seed)
    buckets, length = chance.randint(1, 8), chance.choice([0.25, 1.0, 10.0])
    window, calls, now = TimeWindow(buckets * length, buckets, 2), [], chance.uniform(-50, 50)
    for _ in range(150):
        now += chance.choice([0, 0, length / 7, length, chance.uniform(0, 3 * buckets * length)])
        if chance.random() < 0.3:
            window.advance(now)
        else:
            counts = (chance.randint(0, 1), chance.randint(0, 3))
            window.add(counts, now)
            calls.append((now // length, counts))
        last = [counts for epoch, counts in calls if epoch > now // length - buckets]
        assert window.calls == len(last)
        assert window.totals == ([sum(column) for column in zip(*last)] if last else [0, 0])
        by_bucket = [[counts for epoch, counts in calls if epoch == now // length - ago] for ago in range(buckets)]
        assert window.contents() == [[*map(sum, zip(*bucket)), len(bucket)] if bucket else [0, 0, 0] for bucket in by_bucket]


def test_a_time_window_whose_clock_goes_back_counts_into_the_bucket_it_had():
    window = TimeWindow(10, 10)
    window.add((1,), 100.0)
    window.add((1,), 3.0)
    assert (window.calls, window.totals) == (2, [2])
    window.advance(109.5)
    assert window.calls == 2
    window.advance(110.0)
    assert window.calls == 0


@pytest.mark.parametrize("make, message", [
    (lambda: CountWindow(0), "CountWindow(size=0): give a number of calls, from 1 to 1,000,000"),
    (lambda: TimeWindow(0), "TimeWindow(seconds=0): give a number of seconds from 0.001 to 3.16224e+07"),
    (lambda: TimeWindow(float("nan")), "TimeWindow(seconds=nan)"),
    (lambda: TimeWindow(5e-324), "TimeWindow(seconds=5e-324): give a number of seconds from 0.001 to"),
    (lambda: TimeWindow(10**400), "0): give a number of seconds from 0.001 to"),
    (lambda: TimeWindow(1, 10**30), "0): give a number of buckets, from 1 to 10,000"),
    (lambda: TimeWindow(1, counters=0), "TimeWindow(counters=0): give a number of counters, from 1 up"),
    (lambda: CountWindow(10**30), "0): give a number of calls, from 1 to 1,000,000"),
    (lambda: TimeWindow(1, 0), "TimeWindow(buckets=0): give a number of buckets, from 1 to 10,000"),
])
def test_impossible_windows_are_refused(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


# ---- Keyed -----------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_keyed_makes_one_policy_for_each_key_and_forgets_the_one_used_longest_ago():
    made, heard = [], []
    keyed = Keyed(lambda key: made.append(key) or Pass(key), key=lambda number: f"k{number}", max_keys=2)
    keyed.add_listener(lambda event: heard.append((event.policy.name, event.kind, event.key)))
    for number in (1, 2, 1, 3, 1, 2):
        assert await keyed.try_execute(double, number) == 2 * number
    assert made == ["k1", "k2", "k3", "k2"] and keyed.keys() == ["k1", "k2"]
    assert [entry for entry in heard if entry[0] == "Keyed"] == [
        ("Keyed", "created", "k1"), ("Keyed", "created", "k2"), ("Keyed", "evicted", "k2"), ("Keyed", "created", "k3"),
        ("Keyed", "evicted", "k3"), ("Keyed", "created", "k2")]
    assert heard.count(("k1", "in", "k1")) == 3
    assert keyed.statistics() == {"name": "Keyed", "keys": 2, "max_keys": 2, "evicted": 2,
                                  "policies": {"k1": {"name": "k1"}, "k2": {"name": "k2"}}}


@run_in_kernel
async def test_the_policy_of_a_key_is_there_before_it_is_used():
    keyed = Keyed(Pass, max_keys=2)
    first = keyed["a"]
    assert keyed["a"] is first is keyed.get("a") and keyed.get("b") is None
    keyed["b"], keyed["c"]
    assert keyed.keys() == ["b", "c"]


SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 30)))


@pytest.mark.parametrize("seed", SEEDS)
def test_keyed_is_a_list_of_keys_in_the_order_of_their_last_use(seed):
    """The naive model: those in use stay, and of the others the one goes that was left longest ago."""
    chance, most = random.Random(seed), random.Random(seed).randint(1, 4)
    idle, busy = [], []

    async def call(key, end):
        room = key in idle or key in busy or len(idle) + len(set(busy)) < most or idle
        try:
            await keyed.try_execute(Held(key, end))
        except Rejected:
            assert not room

    class Held:
        def __init__(self, key, end):
            self.key, self.end = key, end

        async def __call__(self):
            if self.key in idle:
                idle.remove(self.key)
            elif self.key not in busy and len(idle) + len(set(busy)) >= most:
                del idle[0]
            busy.append(self.key)
            try:
                await self.end.wait()
            finally:
                busy.remove(self.key)
                if self.key not in busy:
                    idle.append(self.key)

    async def main():
        ends = []
        async with flowcoro.TaskGroup() as group:
            for _ in range(60):
                if chance.random() < 0.5 and ends:
                    task, end = ends.pop(chance.randrange(len(ends)))
                    chance.choice([end.set, task.cancel])()
                else:
                    end = flowcoro.Event()
                    ends.append((group.spawn(call(chance.randrange(6), end)), end))
                await flowcoro.sleep(1)
                assert keyed.keys()[:len(idle)] == idle and sorted(keyed.keys()[len(idle):]) == sorted(set(busy))
            for _, end in ends:
                end.set()

    keyed = Keyed(Pass, max_keys=most)
    flowcoro.run(main(), clock=VirtualClock(), seed=seed)
    assert not busy and keyed.keys() == idle


@run_in_kernel
async def test_keyed_keeps_what_is_in_use_and_rejects_what_there_is_no_room_for():
    keyed = Keyed(Pass, key=str, max_keys=2)
    async with flowcoro.TaskGroup() as group:
        for number in (1, 2):
            group.spawn(keyed.try_execute(double, number))
        await flowcoro.sleep(0.5)
        with pytest.raises(Rejected, match="2 keys are in use at once, and max_keys=2"):
            await keyed.try_execute(double, 3)
        group.cancel()
    assert await keyed.try_execute(double, 3) == 6
    assert keyed.keys() == ["2", "3"]


@run_in_kernel
async def test_keyed_finds_the_key_to_forget_however_many_are_in_use():
    class Key(str):
        asked = 0

        def __hash__(self):
            Key.asked += 1
            return hash(str(self))

    keyed = Keyed(Pass, key=lambda number: Key(number), max_keys=1001)
    async with flowcoro.TaskGroup() as group:
        for number in range(1000):
            group.spawn(keyed.try_execute(double, number))
        await flowcoro.sleep(0.5)
        for number in (1000, 1001, 1002):
            assert await keyed.try_execute(lambda number: number, number) == number
        assert keyed.keys() == ["1002", *map(str, range(1000))] and keyed.get("7").name == "7"
    assert keyed.keys() == ["1002", *map(str, range(1000))]
    assert Key.asked < 20_000               # a few for each call, and none for all those in use


@run_in_kernel
async def test_a_call_that_keyed_has_no_room_for_is_told():
    keyed, heard = Keyed(Pass, key=str, max_keys=1), []
    keyed.add_listener(lambda event: heard.append((event.kind, event.key)))
    async with flowcoro.TaskGroup() as group:
        group.spawn(keyed.try_execute(double, 1))
        await flowcoro.sleep(0.5)
        with pytest.raises(Rejected):
            await keyed.try_execute(double, 2)
    assert heard == [("created", "1"), ("in", "1"), ("rejected", "2")]


@run_in_kernel
async def test_a_listener_of_keyed_that_is_interrupted_leaves_no_key_in_use():
    keyed = Keyed(Pass, key=str, max_keys=1)

    def interrupted(event):
        raise KeyboardInterrupt

    keyed.add_listener(interrupted)
    with pytest.raises(KeyboardInterrupt):
        await keyed.try_execute(double, 1)
    keyed.remove_listener(interrupted)
    assert await keyed.try_execute(double, 2) == 4


@run_in_kernel
async def test_listeners_of_keyed_hear_what_is_within_once_and_all_of_them(monkeypatch):
    reported, heard, shared = [], [], Pass("shared")
    monkeypatch.setattr("sys.unraisablehook", lambda report: reported.append(report.err_msg))
    keyed = Keyed(lambda key: Pipeline(Pass(key), shared), key=str, max_keys=3)

    def bad(event):
        raise ValueError

    keyed.add_listener(bad)
    keyed.add_listener(lambda event: heard.append((event.policy.name, event.kind)))
    for number in range(5):                 # each makes a pipeline, and evicts one
        await keyed.try_execute(double, number)
    heard.clear()
    await keyed.try_execute(double, 4)
    assert heard == [("4", "in"), ("shared", "in")]
    assert reported[-1] == "flowcoro_resilience: a listener of 'Keyed' failed at 'in'"


@run_in_kernel
async def test_an_operation_names_its_own_key_and_one_without_is_refused():
    keyed = Keyed(Pass)

    async def operation():
        return "done"

    with pytest.raises(TypeError, match="the operation has no key"):
        await keyed.try_execute(operation)
    with pytest.raises(TypeError, match="the function key=.* gave None"):
        await Keyed(Pass, key=lambda: None).try_execute(operation)
    operation.key = "there"
    operation.idempotent = True
    assert await keyed.try_execute(operation) == "done"
    assert keyed.get("there").log[0] == ("there", "in", "there", True)


@run_in_kernel
async def test_keyed_sees_the_arguments_inside_a_pipeline_and_within_another_keyed():
    log = []
    keyed = Keyed(lambda key: Keyed(lambda key: Pass(key, log), key=lambda number: f"k{number}"), key=lambda number: number % 2)
    pipeline = Pipeline(Pass("outer", log), keyed)
    assert [await pipeline.try_execute(double, number) for number in (1, 2, 3)] == [2, 4, 6]
    assert [entry for entry in log if entry[1] == "in" and entry[0] != "outer"] == [
        (f"k{number}", "in", f"k{number}", False) for number in (1, 2, 3)]
    assert keyed.keys() == [0, 1]


@run_in_kernel
async def test_a_maker_that_makes_no_policy_is_told():
    with pytest.raises(TypeError, match="gave 'x' for 1: give a Policy"):
        await Keyed(lambda key: "x", key=lambda number: number).try_execute(double, 1)
    with pytest.raises(TypeError, match="give a function of a key"):
        Keyed(5)


def test_threads_that_ask_for_the_same_key_get_the_same_policy():
    keyed, barrier, found = Keyed(Pass), threading.Barrier(8), []

    def ask():
        barrier.wait()
        found.append(keyed._enter("key"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(entry[0]) for entry in found}) == 1 and found[0][1] == 8


@run_in_kernel
async def test_keyed_within_a_pipeline_has_the_operations_arguments_too():
    keyed = Keyed(lambda key: Pass(key), key=lambda number, more=0: f"{number}+{more}")
    assert await Pipeline(Pass(), keyed).try_execute(double, 3, more=1) == 7
    assert keyed.keys() == ["3+1"]


# ---- Pipeline --------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_a_pipeline_runs_its_policies_from_the_first_to_the_last():
    log = []
    pipeline = Pipeline(Pass("a", log), Pass("b", log), Pass("c", log))
    assert await pipeline.try_execute(double, 2) == 4
    assert [entry[:2] for entry in log] == [("a", "in"), ("b", "in"), ("c", "in"), ("c", "out"), ("b", "out"), ("a", "out")]
    assert repr(pipeline) == "<Pipeline a > b > c>"
    assert pipeline.statistics() == {"name": "Pipeline", "policies": [{"name": "a"}, {"name": "b"}, {"name": "c"}]}


@run_in_kernel
async def test_pipelines_nest_and_an_empty_one_only_calls():
    log = []
    inner = Pipeline(Pass("b", log), name="inner")
    assert await Pipeline(Pass("a", log), inner, Keyed(lambda key: Pass(key, log))).try_execute(
        type("Ask", (), {"key": "k", "__call__": lambda self: "yes"})()) == "yes"
    assert [entry[0] for entry in log if entry[1] == "in"] == ["a", "b", "k"]
    assert await Pipeline().try_execute(double, 1) == 2


@run_in_kernel
async def test_listeners_of_a_pipeline_hear_all_its_policies():
    heard = []
    pipeline = Pipeline(Pass("a"), Pass("b"))
    listener = pipeline.add_listener(lambda event: heard.append(event.policy.name))
    await pipeline.try_execute(double, 1)
    pipeline.remove_listener(listener)
    await pipeline.try_execute(double, 1)
    assert heard == ["a", "b"]
    twice = Pass("twice")
    pipeline = Pipeline(twice, twice)
    listener = pipeline.add_listener(lambda event: heard.append("twice"))
    await pipeline.try_execute(double, 1)
    pipeline.remove_listener(listener)
    assert heard[2:] == ["twice"] * 2 and not twice._listeners


def test_a_pipeline_of_something_else_is_refused():
    with pytest.raises(TypeError, match="give policies, the outermost first"):
        Pipeline(Pass(), 5)
