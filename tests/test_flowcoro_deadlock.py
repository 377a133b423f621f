"""Deadlock, never wrongly and never too late; dump_tasks, statistics, runtime_info and hooks; faults in others' code."""

import faulthandler
import functools
import gc
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import weakref
from pathlib import Path

import pytest

import flowcoro
import flowcoro_testing

ROOT = Path(__file__).resolve().parent.parent

# Seconds after which something that should have happened counts as hanging: only a failing test takes so long.
PATIENCE = 30.0


def foreign_threads():
    """How many threads live that are neither this one nor of to_thread, those of C included."""
    ours = sum(thread.name.startswith("flowcoro thread") for thread in threading.enumerate())
    try:
        return len(os.listdir("/proc/self/task")) - 1 - ours
    except OSError:
        return threading.active_count() - 1 - ours


@pytest.fixture(autouse=True)
def alone():
    """No deadlock is reported while a foreign thread lives, and the one that watches over slow tests is such a thread."""
    faulthandler.cancel_dump_traceback_later()
    deadline = time.monotonic() + PATIENCE
    while foreign_threads() > 0:
        if time.monotonic() > deadline:
            pytest.skip(f"another thread lives in this process: {threading.enumerate()}")
        time.sleep(0.001)


class Impatient:
    """A hook that ends a run which waits without limit more than `looks` times: its deadlock was missed."""

    def __init__(self, looks):
        self.looks = looks
        self.main = flowcoro.current_task()

    def before_poll(self, timeout):
        if timeout is None or timeout > 100:
            self.looks -= 1
            if self.looks < 0:
                self.main.cancel()


def run(function, looks=10, **options):
    """Run to the end, which must come; a false alarm is an error as any other."""
    async def main():
        flowcoro.add_hooks(Impatient(looks))
        return await function()

    return flowcoro.run(main(), **options)


def deadlock(function, looks=3, **options):
    """The message of the deadlock in which it must end: at once, in spite of `looks`, which are for the cleanup."""
    with pytest.raises(flowcoro.Deadlock) as caught:
        run(function, looks, **options)
    return str(caught.value)


async def forever():
    await flowcoro.Event().wait()


# ---- a deadlock is reported --------------------------------------------------------------------------------

def test_a_run_in_which_nobody_can_go_on_raises_deadlock():
    message = deadlock(forever)
    assert "no task can ever run again" in message
    assert "wait for an Event" in message
    assert re.search(r"test_flowcoro_deadlock\.py:\d+ in forever", message)


def test_deadlock_is_an_error_of_flowcoro_and_a_runtime_error():
    assert issubclass(flowcoro.Deadlock, flowcoro.FlowCoroError)
    assert issubclass(flowcoro.Deadlock, RuntimeError)


async def two_locks(first, second, both):
    async with first:
        await both.wait()
        async with second:
            pass


def test_the_message_has_the_tree_of_tasks_and_says_who_waits_for_whom():
    async def main():
        one, other, both = flowcoro.Lock(), flowcoro.Lock(), flowcoro.Barrier(2)
        async with flowcoro.TaskGroup() as group:
            group.spawn(two_locks(one, other, both), name="Alice")
            group.spawn(two_locks(other, one, both), name="Bob")

    lines = deadlock(main).split("\n")
    assert "  | Alice: parked: acquire a Lock (for Bob)" in lines
    assert "  | Bob: parked: acquire a Lock (for Alice)" in lines
    assert lines[1].endswith(": parked: wait for the tasks of a group (for Alice, Bob)")
    assert lines[-1] in ("in a circle: Alice waits for Bob, Bob waits for Alice",
                         "in a circle: Bob waits for Alice, Alice waits for Bob")


@pytest.mark.parametrize("wait, reason", [
    (lambda: flowcoro.Channel().receive(), "receive from a Channel"),
    (lambda: flowcoro.Channel().send(1), "send to a Channel"),
    (lambda: flowcoro.select(flowcoro.Channel(), (flowcoro.Channel(), 1)), "select of 2 channel operations"),
    (lambda: flowcoro.Semaphore(0).acquire(), "acquire a Semaphore"),
    (lambda: flowcoro.Barrier(2).wait(), "wait at a Barrier"),
    (lambda: flowcoro.ParkingLot("look out of the window").park(), "look out of the window"),
    (lambda: flowcoro.Broadcast(1).subscribe().receive(), "receive from a Broadcast"),
], ids=["receive", "send", "select", "Semaphore", "Barrier", "ParkingLot", "Broadcast"])
def test_every_primitive_can_be_the_reason(wait, reason):
    async def main():
        await wait()

    assert reason in deadlock(main)


def test_main_can_be_deadlocked_with_tasks_of_its_own():
    async def main():
        current = flowcoro.current_task()

        async def child():
            await current

        await flowcoro.spawn(child(), name="the child")

    message = deadlock(main)
    assert "wait for a task (for the child)" in message
    assert "in a circle: " in message


def test_cleanup_has_run_when_deadlock_is_raised():
    events = []

    async def worker(name):
        try:
            await forever()
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(0.0001)
            events.append(name)

    async def main():
        flowcoro.spawn(worker("bare"))
        async with flowcoro.TaskGroup() as group:
            group.spawn(worker("child"))
            await worker("main")

    deadlock(main)
    assert sorted(events) == ["bare", "child", "main"]


def test_deadlock_is_raised_whatever_main_makes_of_the_cancellation():
    async def main():
        try:
            await forever()
        except flowcoro.Cancelled:
            return "nothing happened"

    deadlock(main)


def test_an_error_of_the_cleanup_becomes_the_cause():
    async def main():
        try:
            await forever()
        finally:
            raise OSError("the cleanup failed")

    with pytest.raises(flowcoro.Deadlock) as caught:
        run(main, 3)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_cleanup_that_is_deadlocked_as_well_is_cancelled_inside_its_shield():
    events = []

    async def main():
        try:
            await forever()
        finally:
            try:
                with flowcoro.CancelScope(shield=True):
                    await forever()
            finally:
                events.append("left")

    deadlock(main)
    assert events == ["left"]


def test_a_task_that_nothing_can_move_is_closed_by_force_and_reported(reports):
    events = []

    def park_function(task):
        task.park_reason = "hold out"
        task.abort_function = lambda task: False        # it never gives up

    async def stubborn():
        try:
            await flowcoro.park(park_function)
        finally:
            events.append("closed")

    assert "hold out" in deadlock(stubborn, looks=5)
    assert events == ["closed"]
    assert any("by force" in what for what, error in reports)


def test_a_task_that_waits_for_a_lock_in_a_condition_that_nobody_releases_ends_in_deadlock(reports):
    async def main():
        condition = flowcoro.Condition()

        async def wait():
            async with condition:
                await condition.wait()

        async def hold():
            await condition.acquire()                   # and never releases
            condition.notify()

        await flowcoro.when_all(wait(), hold())

    assert "the Lock of a Condition" in deadlock(main, looks=5)


def test_a_task_left_behind_by_main_can_be_deadlocked():
    async def left_behind():
        try:
            await forever()
        finally:
            with flowcoro.CancelScope(shield=True):
                await forever()

    async def main():
        flowcoro.spawn(left_behind(), name="left behind")
        await flowcoro.checkpoint()

    assert "left behind" in deadlock(main)


def test_after_a_deadlock_the_next_run_works():
    async def works():
        await flowcoro.sleep(0.0001)
        return "works"

    for _ in range(3):
        deadlock(forever)
        assert run(works) == "works"


def test_a_deadlock_is_found_with_a_virtual_clock_and_with_a_seed():
    async def main():
        await flowcoro.sleep(1000)
        await forever()

    deadlock(main, clock=flowcoro_testing.VirtualClock())
    deadlock(main, clock=flowcoro_testing.VirtualClock(), seed=5)


def test_a_program_that_deadlocks_ends_with_the_message():
    """Without the hook of the tests above, in a process of its own."""
    done = script("""
        async def main():
            await flowcoro.Channel().receive()

        flowcoro.run(main())
    """)
    assert done.returncode == 1
    assert "Deadlock: no task can ever run again" in done.stderr
    assert "receive from a Channel" in done.stderr


def script(text):
    return subprocess.run([sys.executable, "-c", "import flowcoro\n" + textwrap.dedent(text)], cwd=ROOT, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE * 2)


# ---- and is not missed -------------------------------------------------------------------------------------

async def leave_a_scope():
    with flowcoro.timeout(3600):
        await flowcoro.checkpoint()


async def leave_scopes_by_an_error():
    for _ in range(3):
        try:
            with flowcoro.move_on_after(3600), flowcoro.timeout(1800):
                await flowcoro.checkpoint()
                raise KeyError
        except KeyError:
            pass


async def cancel_a_sleep():
    task = flowcoro.spawn(flowcoro.sleep(3600))
    await flowcoro.checkpoint()
    task.cancel()
    await flowcoro.checkpoint()


async def cancel_an_endless_sleep():
    task = flowcoro.spawn(flowcoro.sleep(math.inf))
    await flowcoro.checkpoint()
    task.cancel()
    await flowcoro.checkpoint()


async def an_endless_sleep_times_out():
    with flowcoro.move_on_after(0.0001):
        await flowcoro.sleep(math.inf)


async def move_a_deadline_away():
    scope = flowcoro.CancelScope(deadline=flowcoro.now() + 3600)
    with scope:
        await flowcoro.checkpoint()
        scope.deadline = math.inf
        await forever()


async def a_scope_whose_time_is_up():
    with flowcoro.CancelScope(shield=True), flowcoro.move_on_after(0.0001):
        await forever()
    with flowcoro.move_on_after(3600) as scope:
        scope.cancel()
        await flowcoro.checkpoint()


async def tasks_with_timers_that_have_ended():
    async def child():
        with flowcoro.timeout(3600):
            await flowcoro.sleep(0)

    async with flowcoro.TaskGroup() as group:
        for _ in range(200):
            group.spawn(child())


async def idle_threads_of_to_thread():
    await flowcoro.when_all(*(flowcoro.to_thread(time.sleep, 0.001) for _ in range(5)))


async def an_abandoned_thread_that_has_ended():
    limiter = flowcoro.Semaphore(1)
    with flowcoro.move_on_after(0):
        await flowcoro.to_thread(time.sleep, 0.001, limiter=limiter, abandon_on_cancel=True)
    with flowcoro.move_on_after(0.0005):
        await flowcoro.to_thread(time.sleep, 0.002, limiter=limiter, abandon_on_cancel=True)
    await limiter.acquire()


async def descriptors_that_nobody_waits_for():
    read, write = os.pipe()
    try:
        os.write(write, b"x")
        await flowcoro.wait_readable(read)
        flowcoro.Pollable(write)
        with flowcoro.move_on_after(0.0001):
            os.read(read, 1)
            await flowcoro.wait_readable(read)
        await forever()
    finally:
        os.close(read)
        os.close(write)


async def a_listener_for_the_stop_that_gave_up():
    with flowcoro.move_on_after(0.0001):
        await flowcoro.stop_requested()


async def a_handler_that_was_taken_back():
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    signal.signal(signal.SIGUSR1, before)


async def signals_that_are_ignored():
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        before = signal.signal(number, signal.SIG_IGN)
        try:
            await flowcoro.checkpoint()
        finally:
            if number == signal.SIGUSR1:
                signal.signal(number, before)
    try:
        await forever()
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("leave_behind", [
    leave_a_scope, leave_scopes_by_an_error, cancel_a_sleep, cancel_an_endless_sleep, an_endless_sleep_times_out,
    move_a_deadline_away, a_scope_whose_time_is_up, tasks_with_timers_that_have_ended, idle_threads_of_to_thread,
    an_abandoned_thread_that_has_ended, descriptors_that_nobody_waits_for, a_listener_for_the_stop_that_gave_up,
    a_handler_that_was_taken_back, signals_that_are_ignored,
], ids=lambda function: function.__name__)
def test_what_cannot_wake_anybody_does_not_delay_the_report(leave_behind):
    began = []

    async def main():
        await leave_behind()
        began.append(flowcoro.statistics()["polls"])
        await forever()

    class Count:
        def after_poll(self, events):
            polls.append(events)

    async def counted():
        flowcoro.add_hooks(Count())
        await main()

    polls = []
    deadlock(counted, looks=12)                 # some of them wait for threads first
    if began:
        assert len(polls) - began[0] <= 3       # it did not wait for anything, a second at a time


@pytest.mark.usefixtures("looks_again_soon")
def test_a_deadlock_is_found_after_the_last_foreign_thread_has_ended():
    async def main():
        threading.Thread(target=time.sleep, args=(0.01,)).start()
        await forever()

    deadlock(main, looks=800)


@pytest.mark.usefixtures("looks_again_soon")
def test_a_thread_that_dies_without_keeping_its_promise_leaves_a_deadlock(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda report: None)

    async def main():
        promise = flowcoro.Promise()

        def dies():
            time.sleep(0.005)
            raise OSError
            promise.set_result(None)

        threading.Thread(target=dies).start()
        await promise

    assert "wait for a Promise" in deadlock(main, looks=800)


# ---- but never wrongly -------------------------------------------------------------------------------------
#
# Each of these waits for something that comes from where the kernel cannot see it. They come late enough that the
# kernel has asked itself by then whether it is deadlocked; on a slow machine it may not have, and the test is easier.

LATE = 0.02


def later(function, *args):
    """A foreign thread that does something when everybody sleeps."""
    def work():
        time.sleep(LATE)
        function(*args)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


async def a_promise_kept_by_a_thread():
    promise = flowcoro.Promise()
    thread = later(promise.set_result, "woken")
    await promise
    thread.join()


async def an_event_set_by_a_thread():
    event = flowcoro.Event()
    thread = later(flowcoro.call_from_thread, event.set)
    await event.wait()
    thread.join()


async def a_coroutine_run_from_a_thread():
    channel = flowcoro.Channel()
    thread = later(lambda: flowcoro.run_from_thread(channel.send(1)))
    await channel.receive()
    thread.join()


async def a_thread_unknown_to_threading():
    import _thread
    promise = flowcoro.Promise()

    def work():
        time.sleep(LATE)
        promise.set_result(None)

    _thread.start_new_thread(work, ())
    await promise


async def a_thread_started_by_a_thread():
    promise = flowcoro.Promise()
    threads = []
    first = threading.Thread(target=lambda: threads.append(later(promise.set_result, None)))
    first.start()
    first.join()
    await promise
    threads[0].join()


async def a_call_of_to_thread():
    event = flowcoro.Event()

    def work():
        time.sleep(LATE)
        flowcoro.call_from_thread(event.set)

    flowcoro.spawn(flowcoro.to_thread(work))
    await event.wait()


async def an_abandoned_call_of_to_thread():
    promise = flowcoro.Promise()

    def work():
        time.sleep(LATE)
        promise.set_result(None)

    with flowcoro.move_on_after(LATE / 4):
        await flowcoro.to_thread(work, abandon_on_cancel=True)
    await promise


async def a_kernel_in_a_thread():
    promise = flowcoro.Promise()

    async def other():
        await flowcoro.sleep(LATE)
        promise.set_result(None)

    thread = threading.Thread(target=lambda: flowcoro.run(other()))
    thread.start()
    await promise
    thread.join()


async def a_timer_inside_a_shield():
    with flowcoro.CancelScope(shield=True):
        with flowcoro.move_on_after(LATE):
            await forever()


async def a_deadline_of_an_outer_scope_of_another_task():
    async with flowcoro.TaskGroup() as group:
        group.scope.deadline = flowcoro.now() + LATE
        for _ in range(3):
            group.spawn(forever())


async def a_deadline_that_was_moved_nearer():
    with flowcoro.CancelScope(deadline=flowcoro.now() + 1000) as scope:
        scope.deadline = flowcoro.now() + LATE
        await forever()


async def a_sleeper_among_the_sleepless():
    event = flowcoro.Event()

    async def sleeper():
        await flowcoro.sleep(LATE)
        event.set()

    for _ in range(3):
        flowcoro.spawn(forever())
    flowcoro.spawn(sleeper())
    await event.wait()


async def a_grace_that_ends():
    flowcoro.request_stop()
    try:
        await forever()
    except flowcoro.Cancelled:
        pass


async def a_descriptor():
    read, write = os.pipe()
    thread = later(os.close, write)
    await flowcoro.wait_readable(read)
    os.close(read)
    thread.join()


async def a_child_process():
    process = subprocess.Popen(["sh", "-c", f"sleep {LATE}; echo done"], stdout=subprocess.PIPE)
    await flowcoro.wait_readable(process.stdout)
    flowcoro.notify_closing(process.stdout)
    process.communicate()


async def a_signal_handler_with_an_alarm():
    event, kernel = flowcoro.Event(), flowcoro.current_kernel()
    before = signal.signal(signal.SIGALRM, lambda number, frame: threads.append(
        threading.Thread(target=functools.partial(flowcoro.call_from_thread, event.set, kernel=kernel))) or threads[0].start())
    threads = []
    signal.setitimer(signal.ITIMER_REAL, LATE)
    try:
        await event.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    threads[0].join()


async def a_signal_handler_that_keeps_a_promise():
    promise = flowcoro.Promise()
    task = flowcoro.current_task()
    before = signal.signal(signal.SIGALRM, lambda number, frame: promise.set_result(task))
    signal.setitimer(signal.ITIMER_REAL, LATE)
    try:
        await promise
    finally:
        signal.signal(signal.SIGALRM, before)


async def a_handler_of_sigterm_put_in_place_of_the_kernels():
    promise = flowcoro.Promise()
    before = signal.signal(signal.SIGTERM, lambda number, frame: promise.set_result(None))
    process = subprocess.Popen(["sh", "-c", f"sleep {LATE}; kill -TERM {os.getpid()}"])
    try:
        await promise
    finally:
        signal.signal(signal.SIGTERM, before)
        process.wait()


async def a_handler_of_sigint_that_was_there_before():
    # The test installs it; here it is only used.
    process = subprocess.Popen(["sh", "-c", f"sleep {LATE}; kill -INT {os.getpid()}"])
    try:
        await interrupted[-1]
    finally:
        process.wait()


async def sigterm_itself():
    process = subprocess.Popen(["sh", "-c", f"sleep {LATE}; kill -TERM {os.getpid()}"])
    try:
        await flowcoro.stop_requested()
    finally:
        process.wait()


async def a_finaliser_of_a_garbage_cycle():
    event = flowcoro.Event()

    class Sets:
        def __del__(self):
            event.set()

    thing = Sets()
    thing.itself = thing
    del thing
    await event.wait()


async def the_callback_of_a_weak_reference():
    event = flowcoro.Event()

    class Thing:
        pass

    thing = Thing()
    thing.itself = thing
    kept = weakref.ref(thing, lambda reference: event.set())
    weakref.finalize(thing, event.set)
    del thing
    await event.wait()
    assert kept() is None


async def a_finaliser_that_starts_a_thread():
    promise = flowcoro.Promise()
    threads = []

    class Starts:
        def __del__(self):
            threads.append(later(promise.set_result, None))

    thing = Starts()
    thing.itself = thing
    del thing
    await promise
    threads[0].join()


async def a_finaliser_that_spawns_a_task():
    event = flowcoro.Event()

    async def sets():
        event.set()

    class Spawns:
        def __del__(self):
            flowcoro.spawn(sets())

    thing = Spawns()
    thing.itself = thing
    del thing
    await event.wait()


async def a_finaliser_that_frees_another_cycle():
    event = flowcoro.Event()

    class Thing:
        def __init__(self, finalise):
            self.itself = self
            self.finalise = finalise

        def __del__(self):
            self.finalise()

    kept = [Thing(event.set)]
    for _ in range(5):
        kept = [Thing(kept.clear)]
    del kept
    await event.wait()


async def the_cleanup_of_a_forgotten_async_generator():
    event = flowcoro.Event()

    async def generator():
        try:
            yield 1
        finally:
            await flowcoro.checkpoint()
            event.set()

    async for item in generator():
        box = [item]
        break
    box.append(box)
    await event.wait()


async def a_hook_that_wakes_somebody():
    event = flowcoro.Event()

    class Wakes:
        def before_poll(self, timeout):
            event.set()

    flowcoro.add_hooks(Wakes())
    await event.wait()


FROM_OUTSIDE = [
    a_promise_kept_by_a_thread, an_event_set_by_a_thread, a_coroutine_run_from_a_thread, a_thread_unknown_to_threading,
    a_thread_started_by_a_thread, a_call_of_to_thread, an_abandoned_call_of_to_thread, a_kernel_in_a_thread,
    a_timer_inside_a_shield, a_deadline_of_an_outer_scope_of_another_task, a_deadline_that_was_moved_nearer,
    a_sleeper_among_the_sleepless, a_descriptor, a_child_process, a_signal_handler_with_an_alarm,
    a_signal_handler_that_keeps_a_promise, a_handler_of_sigterm_put_in_place_of_the_kernels, sigterm_itself,
    a_finaliser_of_a_garbage_cycle, the_callback_of_a_weak_reference, a_finaliser_that_starts_a_thread,
    a_finaliser_that_spawns_a_task, a_finaliser_that_frees_another_cycle, the_cleanup_of_a_forgotten_async_generator,
    a_hook_that_wakes_somebody,
]


@pytest.mark.parametrize("wait", FROM_OUTSIDE, ids=lambda function: function.__name__)
def test_what_comes_from_outside_is_no_deadlock(wait):
    async def main():
        await wait()
        return "woken"

    gc.disable()                            # what is garbage stays so until the kernel looks
    try:
        assert run(main) == "woken"
    finally:
        gc.enable()


interrupted = []


def test_a_handler_of_sigint_that_was_there_before_is_no_deadlock():
    async def main():
        interrupted.append(flowcoro.Promise())
        await a_handler_of_sigint_that_was_there_before()
        return "woken"

    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted[-1].set_result(None))
    try:
        assert run(main) == "woken"
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_grace_that_ends_is_no_deadlock():
    run(a_grace_that_ends, grace=LATE)


def test_ctrl_c_ends_an_endless_sleep_which_is_no_deadlock():
    async def main():
        process = subprocess.Popen(["sh", "-c", f"sleep {LATE}; kill -INT {os.getpid()}"])
        try:
            await flowcoro.sleep(math.inf)
        finally:
            process.wait()

    with pytest.raises(KeyboardInterrupt):
        run(main)


def test_a_thread_that_still_works_for_an_earlier_run_is_no_deadlock():
    go, promises = threading.Event(), []

    def work():
        go.wait(PATIENCE)
        time.sleep(LATE)
        promises[0].set_result("woken")

    async def earlier():
        with flowcoro.move_on_after(0.001):
            await flowcoro.to_thread(work, abandon_on_cancel=True)

    async def main():
        promises.append(flowcoro.Promise())
        go.set()
        return await promises[0]

    run(earlier)
    assert run(main) == "woken"


def test_a_thread_that_wakes_a_task_and_ends_while_the_kernel_counts_threads_is_no_deadlock(monkeypatch):
    """The narrowest gap: nothing has come when the kernel looks, and nobody is left who could come a moment later."""
    real = os.listdir
    threads = []

    def listdir(path="."):
        if str(path).startswith("/proc/self") and threads:
            thread = threads.pop()
            thread.go.set()
            thread.join()
            for _ in range(3000):
                if len(real(path)) <= before:
                    break
                time.sleep(0.001)
        return real(path)

    async def main():
        promise = flowcoro.Promise()
        go = threading.Event()
        thread = threading.Thread(target=lambda: (go.wait(PATIENCE), promise.set_result("woken")))
        thread.go = go
        thread.start()
        threads.append(thread)
        try:
            return await promise
        finally:
            go.set()

    before = len(real("/proc/self/task")) if os.path.exists("/proc/self/task") else 1
    monkeypatch.setattr(os, "listdir", listdir)
    assert run(main) == "woken"
    assert threads == []


def test_a_kernel_that_is_not_in_the_main_thread_never_reports_one():
    """Whoever sits in the main thread could wake it."""
    results = []

    async def main(promises):
        promises.append(flowcoro.Promise())
        results.append(await promises[0])

    promises = []
    thread = threading.Thread(target=lambda: flowcoro.run(main(promises)))
    thread.start()
    while not promises:
        time.sleep(0.001)
    time.sleep(LATE)
    promises[0].set_result("woken")
    thread.join()
    assert results == ["woken"]


def test_an_idle_service_with_a_foreign_thread_does_not_collect_garbage_all_the_time():
    """It may wait like this for days."""
    collections = []

    def count(phase, info):
        collections.append(phase)

    async def main():
        promise = flowcoro.Promise()
        thread = later(promise.set_result, None)
        await promise
        thread.join()

    gc.disable()
    gc.callbacks.append(count)
    try:
        run(main)
    finally:
        gc.callbacks.remove(count)
        gc.enable()
    assert collections == []


# ---- dump_tasks --------------------------------------------------------------------------------------------

def dumped(*coros, names=()):
    """What dump_tasks() says of tasks that run beside main, when they have come to wait."""
    async def main():
        tasks = [flowcoro.spawn(coro, name=name) for coro, name in zip(coros, names or [None] * len(coros))]
        await flowcoro.sleep(0.0005)
        text = flowcoro.dump_tasks()
        for task in tasks:
            task.cancel()
        return text

    return run(main)


def line_of(text, name):
    return next(line for line in text.split("\n") if line.lstrip(" |").startswith(f"{name}: "))


def test_a_dump_is_the_tree_of_tasks():
    async def child():
        await forever()

    async def parent():
        async with flowcoro.TaskGroup() as group:
            group.spawn(child(), name="child 1")
            async with flowcoro.TaskGroup() as inner:
                inner.spawn(grandparent(), name="child 2")

    async def grandparent():
        async with flowcoro.TaskGroup() as group:
            group.spawn(child(), name="grandchild")

    text = dumped(parent(), child(), names=["parent", "bare"])
    tree = [line for line in text.split("\n") if "    at " not in line]
    assert [line.split(":")[0] for line in tree[1:]] == [
        "parent", "  | child 1", "  | child 2", "  |   | grandchild", "bare"]
    assert line_of(text, "parent").endswith("wait for the tasks of a group (for child 2)")


def test_a_dump_tells_each_state_and_leaves_out_what_is_done():
    async def main():
        async def nothing():
            pass

        done = flowcoro.spawn(nothing(), name="done")
        await done
        flowcoro.spawn(forever(), name="parked")
        await flowcoro.checkpoint()
        ready = flowcoro.spawn(nothing(), name="ready")
        flowcoro.current_task().name = "main"
        text = flowcoro.dump_tasks()
        await ready
        return text

    with pytest.raises(flowcoro.Deadlock):
        run(forever, looks=3)
    text = run(main)
    assert line_of(text, "main") == "main: running"
    assert line_of(text, "parked") == "parked: parked: wait for an Event"
    assert line_of(text, "ready") == "ready: ready"
    assert "done:" not in text


async def chain_link(depth, wait):
    if depth:
        await chain_link(depth - 1, wait)
    else:
        await wait()


class Awaitable:
    def __init__(self, coro):
        self.coro = coro

    def __await__(self):
        return self.coro.__await__()


class Context:
    async def __aenter__(self):
        await forever()

    async def __aexit__(self, *exc):
        pass


async def generate():
    await innermost()
    yield 1


async def innermost():
    await forever()


@flowcoro.coroutine
def old_style():
    yield from innermost()


async def use_an_awaitable():
    await Awaitable(innermost())


async def use_a_generator():
    async for _ in generate():
        pass


async def use_a_comprehension():
    return [item async for item in generate()]


async def use_a_context():
    async with Context():
        pass


async def use_the_old_style():
    await old_style()


async def use_anext():
    await anext(generate())


async def use_a_nested_generator():
    async def outer():
        async for item in generate():
            yield item

    async for _ in outer():
        pass


@pytest.mark.parametrize("use, functions", [
    (use_an_awaitable, ["use_an_awaitable", "innermost", "forever"]),
    (use_a_generator, ["use_a_generator", "generate", "innermost", "forever"]),
    (use_a_comprehension, ["use_a_comprehension", "generate", "innermost", "forever"]),
    (use_a_context, ["use_a_context", "__aenter__", "forever"]),
    (use_the_old_style, ["use_the_old_style", "old_style", "innermost", "forever"]),
    (use_anext, ["use_anext", "generate", "innermost", "forever"]),
    (use_a_nested_generator, ["use_a_nested_generator", "outer", "generate", "innermost", "forever"]),
], ids=lambda value: value.__name__ if callable(value) else "")
def test_a_dump_follows_the_awaits_down_to_where_the_task_waits(use, functions):
    text = dumped(use())
    chain = re.findall(r"    at .*test_flowcoro_deadlock\.py:\d+ in (?:\S+\.)?(\w+|<\w+>)$", text, re.MULTILINE)
    assert [name for name in chain if not name.startswith("<")] == functions


def test_a_dump_of_a_long_chain_has_every_link():
    text = dumped(chain_link(200, forever))
    assert text.count(" in chain_link") == 201


def test_a_dump_names_the_line_of_each_await():
    line = forever.__code__.co_firstlineno + 1
    assert f"test_flowcoro_deadlock.py:{line} in forever" in dumped(forever())


def test_a_dump_tells_for_whom_a_task_waits():
    async def main():
        lock, rwlock, condition = flowcoro.Lock(), flowcoro.RWLock(), flowcoro.Condition()

        async def hold(lock):
            async with lock:
                await forever()

        async def join(task):
            await task

        async def notified():
            async with condition:
                await condition.wait()

        async def notify():
            async with condition:
                condition.notify()
                await forever()

        holder = flowcoro.spawn(hold(lock), name="holder")
        flowcoro.spawn(hold(rwlock.read), name="reader")
        flowcoro.spawn(notified(), name="notified")
        await flowcoro.sleep(0)
        flowcoro.spawn(hold(lock), name="lock")
        flowcoro.spawn(hold(rwlock.write), name="writer")
        flowcoro.spawn(join(holder), name="joiner")
        flowcoro.spawn(notify(), name="notifier")
        await flowcoro.sleep(0.0005)
        return flowcoro.dump_tasks()

    text = run(main)
    assert line_of(text, "lock").endswith("acquire a Lock (for holder)")
    assert line_of(text, "joiner").endswith("wait for a task (for holder)")
    assert line_of(text, "writer").endswith("acquire a RWLock to write (for reader)")
    assert line_of(text, "notified").endswith("(for notifier)")


@pytest.mark.parametrize("wait, reason", [
    (lambda: flowcoro.sleep(1000), "sleep"),
    (lambda: flowcoro.sleep(math.inf), "sleep"),
    (lambda: flowcoro.stop_requested(), "wait for a request to stop"),
    (lambda: flowcoro.to_thread(time.sleep, 0.1), "wait for a thread"),
    (lambda: flowcoro.Condition().acquire(), None),
    (lambda: flowcoro.spawn(forever()), "wait for a task"),
    (lambda: flowcoro.when_any(forever(), forever()), "wait for the tasks of a group"),
], ids=["sleep", "forever", "stop", "thread", "none", "join", "when_any"])
def test_a_dump_tells_why_a_task_waits(wait, reason):
    async def work():
        await wait()
        await forever()

    line = line_of(dumped(work(), names=["worker"]), "worker")
    assert (reason or "wait for an Event") in line


def test_a_dump_names_the_descriptor_that_a_task_waits_for():
    async def work(fd):
        await flowcoro.wait_readable(fd)

    read, write = os.pipe()
    try:
        assert f"wait until fd {read} is readable" in dumped(work(read))
    finally:
        os.close(read)
        os.close(write)


def test_a_dump_names_three_who_hold_a_lock_and_counts_the_rest():
    async def main():
        rwlock = flowcoro.RWLock()

        async def hold(lock):
            async with lock:
                await forever()

        for number in range(5):
            flowcoro.spawn(hold(rwlock.read), name=f"reader {number}")
        await flowcoro.checkpoint()
        flowcoro.spawn(hold(rwlock.write), name="writer")
        await flowcoro.checkpoint()
        return flowcoro.dump_tasks()

    assert line_of(run(main), "writer").endswith("(for reader 0, reader 1, reader 2 and 2 more)")


def test_a_dump_can_be_asked_for_by_another_thread_but_not_outside_of_a_run():
    async def main():
        flowcoro.current_task().name = "main"
        return await flowcoro.to_thread(flowcoro.call_from_thread, flowcoro.dump_tasks)

    assert line_of(run(main), "main") == "main: parked: wait for a thread"
    with pytest.raises(RuntimeError, match="no FlowCoro kernel"):
        flowcoro.dump_tasks()


def test_a_dump_can_be_made_in_every_hook():
    class Dumps:
        def __getattr__(self, name):
            if name.startswith("_"):
                raise AttributeError(name)
            return lambda *args: texts.append((name, flowcoro.dump_tasks()))

    async def main():
        flowcoro.add_hooks(Dumps())
        lock = flowcoro.Lock()

        async def use():
            async with lock:
                await flowcoro.sleep(0.0001)

        await flowcoro.when_all(*(use() for _ in range(3)))

    texts = []
    run(main)
    assert {name for name, _ in texts} == {"task_spawned", "task_parked", "task_rescheduled", "task_done", "before_poll",
                                           "after_poll"}
    assert all(text for name, text in texts if name != "task_done")


def test_a_dump_of_a_park_without_a_reason_does_not_fail():
    def park_function(task):
        task.abort_function = lambda task: True

    async def work():
        await flowcoro.park(park_function)

    assert line_of(dumped(work(), names=["worker"]), "worker").startswith("worker: parked")


# ---- statistics and runtime_info ---------------------------------------------------------------------------

def test_statistics_count_tasks_timers_descriptors_and_threads():
    async def main():
        before, go = flowcoro.statistics(), threading.Event()
        assert before["tasks"] == {"alive": 1, "ready": 0, "spawned": 1, "finished": 0}
        read, write = os.pipe()
        tasks = [flowcoro.spawn(flowcoro.sleep(1000)), flowcoro.spawn(flowcoro.wait_readable(read)),
                 flowcoro.spawn(flowcoro.to_thread(go.wait, PATIENCE))]
        assert flowcoro.statistics()["tasks"]["ready"] == 3
        while flowcoro.statistics()["polls"] == before["polls"]:
            await flowcoro.sleep(0.0001)
        now = flowcoro.statistics()
        assert now["tasks"] == {"alive": 4, "ready": 0, "spawned": 4, "finished": 0}
        assert now["timers"] >= 1
        assert now["descriptors"] == now["io_waiting"] == now["thread_calls"] == 1
        assert now["threads"] >= 1
        assert now["steps"] > before["steps"]
        go.set()
        for task in tasks:
            task.cancel()
            try:
                await task
            except flowcoro.TaskCancelled:
                pass
        flowcoro.notify_closing(read)
        os.close(read)
        os.close(write)
        after = flowcoro.statistics()
        assert after["tasks"] == {"alive": 1, "ready": 0, "spawned": 4, "finished": 3}
        assert after["descriptors"] == after["io_waiting"] == after["thread_calls"] == 0

    run(main)
    with pytest.raises(RuntimeError, match="no FlowCoro kernel"):
        flowcoro.statistics()


def test_a_kernel_that_sleeps_makes_no_steps_and_few_polls():
    async def main():
        await flowcoro.sleep(0.001)
        before = flowcoro.statistics()
        await flowcoro.sleep(0.02)
        after = flowcoro.statistics()
        return after["steps"] - before["steps"], after["polls"] - before["polls"]

    steps, polls = run(main)
    assert steps <= 2
    assert polls <= 10


def test_stale_timers_do_not_pile_up():
    async def main():
        for _ in range(5000):
            with flowcoro.timeout(3600):
                await flowcoro.checkpoint()
        return flowcoro.statistics()["timers"]

    assert run(main) < 200


def test_runtime_info_tells_what_runs_inside_and_outside_of_a_run(monkeypatch):
    async def main():
        return flowcoro.runtime_info()

    outside = flowcoro.runtime_info()
    assert outside["flowcoro"] == flowcoro.__version__
    assert outside["python"] == ".".join(map(str, sys.version_info[:3])) or not sys.version_info.releaselevel == "final"
    assert (outside["workers"], outside["selector"], outside["seed"]) == (0, None, None)
    inside = run(main, seed=7)
    assert (inside["workers"], inside["seed"], inside["clock"]) == (1, 7, "time.monotonic")
    assert isinstance(inside["selector"], str)
    assert isinstance(inside["gil"], bool)
    assert run(main, clock=flowcoro_testing.VirtualClock())["clock"] == "VirtualClock"
    assert set(inside) == set(outside)


# ---- hooks -------------------------------------------------------------------------------------------------

class Log:
    """Hooks that write down what happens to the tasks that were spawned since."""

    def __init__(self):
        self.events = []

    def task_spawned(self, task):
        self.events.append(("spawned", task.name))

    def task_parked(self, task, reason):
        self.events.append(("parked", task.name, reason))

    def task_rescheduled(self, task):
        self.events.append(("rescheduled", task.name))

    def task_done(self, task):
        assert task.done()
        self.events.append(("done", task.name))


def test_hooks_are_told_the_life_of_a_task_in_order():
    async def work(event):
        await event.wait()
        await flowcoro.checkpoint()

    async def main():
        log, event = Log(), flowcoro.Event()
        flowcoro.add_hooks(log)
        task = flowcoro.spawn(work(event), name="worker")
        await flowcoro.checkpoint()
        event.set()
        await task
        flowcoro.remove_hooks(log)
        await flowcoro.spawn(work(event), name="unseen")
        return [event for event in log.events if event[1] in ("worker", "unseen")]

    assert run(main) == [("spawned", "worker"), ("parked", "worker", "wait for an Event"), ("rescheduled", "worker"),
                         ("done", "worker")]


def test_hooks_are_told_of_cancelled_and_failed_tasks_too(reports):
    async def fails():
        raise KeyError

    async def main():
        log = Log()
        flowcoro.add_hooks(log)
        flowcoro.spawn(fails(), name="failed")
        cancelled = flowcoro.spawn(forever(), name="cancelled")
        await flowcoro.checkpoint()
        cancelled.cancel()
        await flowcoro.checkpoint()
        return log.events

    events = run(main)
    assert ("done", "failed") in events
    assert ("rescheduled", "cancelled") in events
    assert ("done", "cancelled") in events
    assert len(reports) == 1


def test_as_many_parks_as_reschedules():
    async def main():
        counts = {"parked": 0, "rescheduled": 0}

        class Count:
            def task_parked(self, task, reason):
                assert task.state == "parked"
                assert isinstance(reason, str)
                counts["parked"] += 1

            def task_rescheduled(self, task):
                assert task.state == "ready"
                counts["rescheduled"] += 1

        async def work(lock, channel, number):
            for _ in range(20):
                async with lock:
                    await flowcoro.sleep(0)
                with flowcoro.move_on_after(0.00001):
                    await channel.receive()
                await flowcoro.sleep(0.00001)

        flowcoro.add_hooks(Count())
        lock, channel = flowcoro.Lock(), flowcoro.Channel()
        await flowcoro.when_all(*(work(lock, channel, number) for number in range(5)))
        return counts

    counts = run(main)
    assert counts["parked"] == counts["rescheduled"] > 100


def test_before_poll_is_told_how_long_the_kernel_will_wait_and_after_poll_what_came():
    async def main():
        calls = []

        class Polls:
            def before_poll(self, timeout):
                calls.append(("before", timeout))

            def after_poll(self, events):
                calls.append(("after", events))

        read, write = os.pipe()
        os.write(write, b"x")
        flowcoro.add_hooks(Polls())
        await flowcoro.sleep(5)
        await flowcoro.wait_readable(read)
        flowcoro.notify_closing(read)
        os.close(read)
        os.close(write)
        return calls

    calls = run(main, clock=flowcoro_testing.VirtualClock())
    assert calls[0] == ("before", 5.0)
    assert ("before", None) in calls        # only the descriptor can end that
    assert calls[-1] == ("after", 1)


def test_what_before_poll_reschedules_runs_before_the_kernel_waits():
    async def main():
        parked = flowcoro.ParkingLot("wait for quiet")

        class Quiet:
            def before_poll(self, timeout):
                parked.unpark_all()

        flowcoro.add_hooks(Quiet())
        flowcoro.spawn(flowcoro.sleep(1000))
        await parked.park()
        return "at once"

    assert run(main) == "at once"


def test_a_deadline_that_before_poll_sets_is_kept():
    async def main():
        scope = flowcoro.CancelScope()

        class Hurries:
            def before_poll(self, timeout):
                if scope.deadline == math.inf:
                    scope.deadline = flowcoro.now() + 1

        flowcoro.add_hooks(Hurries())
        began = flowcoro.now()
        with scope:
            await flowcoro.sleep(1000)
        return flowcoro.now() - began

    assert run(main, clock=flowcoro_testing.VirtualClock()) == 1.0


def test_several_hooks_are_called_in_the_order_in_which_they_were_added():
    async def main():
        calls = []
        first = types.SimpleNamespace(task_done=lambda task: calls.append("first"))
        second = types.SimpleNamespace(task_done=lambda task: calls.append("second"))
        flowcoro.add_hooks(first)
        flowcoro.add_hooks(second)
        await flowcoro.spawn(flowcoro.sleep(0))
        flowcoro.remove_hooks(first)
        await flowcoro.spawn(flowcoro.sleep(0))
        flowcoro.remove_hooks(second)
        flowcoro.remove_hooks(second)       # harmless
        flowcoro.remove_hooks(object())
        await flowcoro.spawn(flowcoro.sleep(0))
        return calls

    assert run(main) == ["first", "second", "second"]


def test_hooks_of_every_kind_can_be_removed():
    async def main():
        calls = []

        class Static:
            @staticmethod
            def task_done(task):
                calls.append("static")

            @classmethod
            def task_spawned(cls, task):
                calls.append("class")

        borrowed = types.SimpleNamespace(task_done=calls.append)
        module = types.ModuleType("hooks")
        module.task_done = lambda task: calls.append("module")
        for hooks in (Static, Static(), borrowed, module):
            flowcoro.add_hooks(hooks)
            flowcoro.remove_hooks(hooks)
        await flowcoro.spawn(flowcoro.sleep(0))
        return calls

    assert run(main) == []


def test_a_hook_may_remove_itself_and_add_others():
    async def main():
        calls = []

        class Once:
            def task_done(self, task):
                calls.append("once")
                flowcoro.remove_hooks(self)
                flowcoro.add_hooks(Log())

        flowcoro.add_hooks(Once())
        for _ in range(3):
            await flowcoro.spawn(flowcoro.sleep(0))
        return calls

    assert run(main) == ["once"]


def test_hooks_belong_to_their_run():
    log = Log()

    async def main():
        flowcoro.add_hooks(log)

    async def another():
        await flowcoro.spawn(flowcoro.sleep(0), name="of another run")

    run(main)
    run(another)
    assert not any("of another run" in event for event in log.events)


def test_an_object_without_hooks_is_refused_and_so_are_hooks_outside_of_a_run():
    async def main():
        with pytest.raises(TypeError, match="task_spawned"):
            flowcoro.add_hooks(object())

    run(main)
    with pytest.raises(RuntimeError, match="no FlowCoro kernel"):
        flowcoro.add_hooks(Log())
    with pytest.raises(RuntimeError, match="no FlowCoro kernel"):
        flowcoro.remove_hooks(Log())


# ---- faults in other people's code -------------------------------------------------------------------------

class Failing:
    def __init__(self, name, error):
        def fail(*args):
            raise error

        setattr(self, name, fail)


@pytest.mark.parametrize("error", [ValueError("in a hook"), SystemExit(3)], ids=["an error", "SystemExit"])
@pytest.mark.parametrize("name", ["task_spawned", "task_parked", "task_rescheduled", "task_done", "before_poll",
                                  "after_poll"])
def test_an_error_in_a_hook_is_reported_and_disturbs_nobody(reports, name, error):
    events = []

    async def work(lock):
        try:
            async with lock:
                await flowcoro.sleep(0.0001)
        finally:
            events.append("done")

    async def main():
        log = Log()
        hooks = Failing(name, error)
        flowcoro.add_hooks(hooks)
        flowcoro.add_hooks(log)             # whose turn comes after the one that fails
        lock = flowcoro.Lock()
        await flowcoro.when_all(*(work(lock) for _ in range(3)))
        flowcoro.remove_hooks(hooks)
        return list(log.events)             # main's own end is still to come

    seen = run(main)
    assert events == ["done"] * 3
    assert [event[0] for event in seen].count("done") == 3
    assert reports
    for what, caught in reports:
        assert name in what
        assert caught is error


def test_an_error_in_a_park_function_is_raised_in_the_task():
    def park_function(task):
        raise KeyError("in the park function")

    async def main():
        for _ in range(3):
            with pytest.raises(KeyError, match="in the park function"):
                await flowcoro.park(park_function)
        await flowcoro.sleep(0.0001)
        return flowcoro.current_task().state

    assert run(main) == "running"


def test_a_park_function_that_leaves_no_way_back_is_an_error():
    def park_function(task):
        task.park_reason = "wait for ever"

    async def main():
        with pytest.raises(RuntimeError, match="abort_function"):
            await flowcoro.park(park_function)

    run(main)


@pytest.mark.parametrize("trap", [3, "text", object(), ValueError, [1]], ids=repr)
def test_what_is_no_park_function_is_an_error_that_names_it(trap):
    @types.coroutine
    def strange():
        yield trap

    async def main():
        with pytest.raises(TypeError, match="yielded"):
            await strange()
        await flowcoro.checkpoint()

    run(main)


def test_a_park_function_may_find_that_there_is_nothing_to_wait_for():
    def park_function(task):
        task.park_reason = "for a moment"
        task.abort_function = lambda task: True
        flowcoro.reschedule(task, "at once")

    async def main():
        return await flowcoro.park(park_function)

    assert run(main) == "at once"


def test_each_park_is_answered_once():
    async def main():
        task = flowcoro.spawn(forever())
        await flowcoro.checkpoint()
        task.cancel()
        with pytest.raises(RuntimeError, match="exactly one reschedule"):
            flowcoro.reschedule(task)
        with pytest.raises(RuntimeError, match="exactly one reschedule"):
            flowcoro.reschedule(flowcoro.current_task())

    run(main)


def test_an_error_in_a_finaliser_is_pythons_to_report_and_the_run_goes_on(reports):
    class Fails:
        def __del__(self):
            raise KeyError("in the finaliser")

    async def work(thing):
        await flowcoro.sleep(0.0001)
        return thing

    async def cancelled(thing):
        await forever()

    async def main():
        for _ in range(3):
            await flowcoro.spawn(work(Fails()))
            task = flowcoro.spawn(cancelled(Fails()))
            await flowcoro.checkpoint()
            task.cancel()
            del task
            await flowcoro.sleep(0)
        await flowcoro.to_thread(Fails)
        return "done"

    assert run(main) == "done"
    gc.collect()
    assert len(reports) == 7
    assert {type(error) for what, error in reports} == {KeyError}


def test_a_finaliser_may_call_whatever_does_not_block():
    """It can come at any moment, also in the middle of the kernel's own steps."""
    async def main():
        event, lot, channel = flowcoro.Event(), flowcoro.ParkingLot("wait for a finaliser"), flowcoro.Channel(math.inf)
        sleeper = flowcoro.spawn(flowcoro.sleep(1000))
        parked = flowcoro.spawn(lot.park())

        class Acts:
            def __del__(self):
                event.set()
                lot.unpark_all()
                channel.send_nowait(1)
                sleeper.cancel()
                flowcoro.spawn(flowcoro.sleep(0))

        async def work(thing):
            await flowcoro.checkpoint()

        await flowcoro.checkpoint()
        for _ in range(5):
            flowcoro.spawn(work(Acts()))
        await event.wait()
        await parked
        while len(channel) < 5:
            await flowcoro.checkpoint()
        with pytest.raises(flowcoro.TaskCancelled):
            await sleeper

    run(main)


def test_an_error_in_a_call_from_another_thread_is_that_threads_alone():
    def fails():
        raise KeyError("called")

    async def main():
        with pytest.raises(KeyError, match="called"):
            await flowcoro.to_thread(flowcoro.call_from_thread, fails)
        return "goes on"

    assert run(main) == "goes on"


# ---- the end by force --------------------------------------------------------------------------------------

def test_who_is_woken_by_a_forced_end_is_not_closed_by_force_as_well(reports):
    """A task that cannot be cancelled is closed; the one that waited for it runs, and is not finished twice."""
    def park_for_good(task):
        task.park_reason = "wait for good"
        task.abort_function = lambda task: False

    async def stuck():
        await flowcoro.park(park_for_good)

    async def generator():
        yield

    seen = []

    async def consume(completed):
        async for task in completed:
            seen.append(task.cancelled())

    async def main():
        left = generator()
        await anext(left)
        kept.append(left)
        flowcoro.spawn(consume(flowcoro.as_completed(stuck())))
        await forever()

    kept = []
    with pytest.raises(flowcoro.Deadlock):
        run(main, looks=20)
    assert [what for what, _ in reports].count("flowcoro: a task was closed by force") >= 1
    assert all(isinstance(error, RuntimeError) for _, error in reports), reports


def test_a_task_that_is_closed_by_force_can_release_its_lock(reports):
    def park_for_good(task):
        task.park_reason = "wait for good"
        task.abort_function = lambda task: False

    async def main():
        lock = flowcoro.Lock()
        locks.append(lock)
        async with lock:
            await flowcoro.park(park_for_good)

    locks = []
    with pytest.raises(flowcoro.Deadlock):
        run(main, looks=20)
    assert not locks[0].locked()
    assert [what for what, _ in reports] == ["flowcoro: a task was closed by force"]


@pytest.mark.parametrize("holder", ["a string", 7, ["a string"], {"key": "a string"}, object()])
def test_the_report_does_not_trip_over_what_the_primitives_of_others_call_a_holder(holder):
    class Gate:
        def __init__(self):
            self.holder = holder

        def park(self, task):
            task.park_reason, task.abort_function = "wait at a gate", self.abort

        def abort(self, task):
            return True

    async def main():
        await flowcoro.park(Gate().park)

    with pytest.raises(flowcoro.Deadlock, match="wait at a gate"):
        flowcoro.run(main())


def test_a_dump_ends_though_an_awaitable_leads_back_to_its_own_coroutine():
    class Operation:
        def __init__(self, coro, trap):
            self.coro, self.trap = coro, trap

        def __await__(self):
            return self

        __iter__ = __await__

        def __next__(self):
            if self.trap is None:
                raise StopIteration
            trap, self.trap = self.trap, None
            return trap

    async def waiter(lot):
        await Operation(flowcoro.current_task().coro, lot._park)

    async def main():
        flowcoro.spawn(waiter(flowcoro.ParkingLot("wait in a circle")))
        await flowcoro.checkpoint()
        return flowcoro.dump_tasks()

    assert "wait in a circle" in flowcoro.run(main())


def test_the_report_of_a_long_chain_of_tasks_takes_no_longer_than_one_look_at_each(monkeypatch):
    async def wait(task):
        await task

    async def main():
        task = flowcoro.spawn(flowcoro.Event().wait())
        for _ in range(300):
            task = flowcoro.spawn(wait(task))
        await task

    looks, holders = [], flowcoro._holders
    monkeypatch.setattr(flowcoro, "_holders", lambda task: looks.append(task) or holders(task))
    with pytest.raises(flowcoro.Deadlock):
        flowcoro.run(main())
    assert len(looks) <= 2 * 303                # one for the tree, one for the circle
