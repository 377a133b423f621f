"""Threads: to_thread and its limits, calls from other threads into a kernel, Promises across threads, forks."""

import collections.abc
import contextvars
import ctypes
import functools
import gc
import itertools
import math
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from pathlib import Path

import pytest

import flowcoro

ROOT = Path(__file__).resolve().parent.parent

# Seconds after which something that should have happened counts as hanging: only a failing test takes so long.
PATIENCE = 30.0

variable = contextvars.ContextVar("variable", default="unset")


def run(function, *args, **options):
    async def main():
        with flowcoro.timeout(PATIENCE):
            return await function(*args)

    return flowcoro.run(main(), **options)


class Thread(threading.Thread):
    """A thread foreign to every kernel, whose outcome can be asked for."""

    def __init__(self, function, *args):
        super().__init__()
        self.function = functools.partial(function, *args)
        self.value = self.error = None
        self.start()

    def run(self):
        try:
            self.value = self.function()
        except BaseException as error:
            self.error = error

    def outcome(self):
        self.join(PATIENCE)
        assert not self.is_alive(), "the thread hangs"
        try:
            if self.error is not None:
                raise self.error
            return self.value
        finally:
            self.error = None


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    foreign = [thread for thread in threading.enumerate()
               if thread is not threading.main_thread() and not thread.name.startswith("flowcoro thread")]
    assert foreign == []


class Gate:
    """Keeps functions in threads until it is opened, and tells the kernel's tasks that they are there."""

    def __init__(self):
        self.came = flowcoro.Promise()
        self.event = threading.Event()

    def wait(self, value=None):
        if not self.came.done():
            self.came.set_result(None)
        assert self.event.wait(PATIENCE), "the gate was never opened"
        return value

    def open(self):
        self.event.set()


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open()


async def until(condition):
    """Wait for what other threads do."""
    while not condition():
        await flowcoro.sleep(0.0005)


# ---- to_thread ---------------------------------------------------------------------------------------------

def test_to_thread_calls_the_function_in_another_thread_and_returns_its_result():
    async def main():
        assert await flowcoro.to_thread(divmod, 17, 5) == (3, 2)
        assert await flowcoro.to_thread(threading.get_ident) != threading.get_ident()

    run(main)


def test_to_thread_raises_the_error_of_the_function_with_its_traceback():
    def fails():
        raise KeyError("in the thread")

    async def main():
        with pytest.raises(KeyError, match="in the thread") as caught:
            await flowcoro.to_thread(fails)
        assert "in fails" in "".join(traceback.format_exception(caught.value))

    run(main)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), StopAsyncIteration(1)], ids=repr)
def test_to_thread_raises_unusual_errors_too(error):
    def fails():
        raise error

    async def main():
        try:
            await flowcoro.to_thread(fails)
        except type(error) as caught:
            return caught is error

    assert run(main)


def test_a_stop_iteration_in_the_thread_is_not_taken_for_the_end_of_the_task():
    async def main():
        with pytest.raises(RuntimeError, match="StopIteration") as caught:
            await flowcoro.to_thread(next, iter(()))
        assert isinstance(caught.value.__cause__, StopIteration)

    run(main)


def test_other_tasks_run_while_a_thread_works(gate):
    async def main():
        waiting = flowcoro.spawn(flowcoro.to_thread(gate.wait, "done"))
        await gate.came
        assert flowcoro.statistics()["thread_calls"] == 1
        assert not waiting.done()
        gate.open()
        assert await waiting == "done"
        assert flowcoro.statistics()["thread_calls"] == 0

    run(main)


@pytest.mark.parametrize("function", [None, 3, "print"])
def test_to_thread_of_what_cannot_be_called_is_a_type_error(function):
    async def main():
        with pytest.raises(TypeError, match="function"):
            await flowcoro.to_thread(function)
        assert await flowcoro.to_thread(abs, -1) == 1

    run(main)


def test_threads_are_used_again():
    async def main():
        return {await flowcoro.to_thread(threading.get_ident) for _ in range(50)}

    assert len(run(main)) == 1
    assert run(main) == run(main)           # also from one run to the next


def test_a_thread_without_work_ends(monkeypatch):
    monkeypatch.setattr(flowcoro, "THREAD_IDLE_SECONDS", 0.001)

    async def main():
        thread = await flowcoro.to_thread(threading.current_thread)
        await until(lambda: not thread.is_alive())
        assert thread not in threading.enumerate()
        assert await flowcoro.to_thread(abs, -1) == 1           # there is always another one

    run(main)


def test_a_call_that_meets_a_thread_that_is_about_to_end_is_made(monkeypatch):
    monkeypatch.setattr(flowcoro, "THREAD_IDLE_SECONDS", 0.0)

    async def several():
        for number in range(150):
            assert await flowcoro.to_thread(abs, -number) == number
            if random.random() < 0.3:
                await flowcoro.sleep(random.random() * 0.0002)

    async def main():
        await flowcoro.when_all(*(several() for _ in range(4)))

    run(main)


def test_the_calls_of_many_tasks_all_return():
    async def main():
        numbers = await flowcoro.when_all(*(flowcoro.to_thread(abs, -number) for number in range(500)))
        assert numbers == list(range(500))
        assert flowcoro.statistics()["thread_calls"] == 0

    run(main)


def test_a_run_in_a_thread_of_a_run_has_a_kernel_of_its_own():
    async def inner():
        await flowcoro.sleep(0)
        return flowcoro.current_kernel(), threading.get_ident()

    async def main():
        kernel, ident = await flowcoro.to_thread(lambda: flowcoro.run(inner()))
        assert kernel is not flowcoro.current_kernel()
        assert ident != threading.get_ident()
        assert await flowcoro.to_thread(flowcoro.call_from_thread, threading.get_ident) == threading.get_ident()

    run(main)


def test_when_no_thread_can_be_started_the_task_is_told_and_the_permit_comes_back(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    async def main():
        limiter = flowcoro.Semaphore(1)
        monkeypatch.setattr(flowcoro._ThreadPool, "idle", [])
        monkeypatch.setattr(threading.Thread, "start", start)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="can't start"):
                await flowcoro.to_thread(abs, -1, limiter=limiter)
        assert limiter.value == 1
        assert flowcoro.statistics()["thread_calls"] == 0
        monkeypatch.undo()
        assert await flowcoro.to_thread(abs, -1, limiter=limiter) == 1

    run(main)


def test_nothing_keeps_the_result_or_the_arguments_alive():
    class Thing:
        pass

    async def main():
        argument, result = Thing(), Thing()
        alive = [weakref.ref(argument), weakref.ref(result)]
        box = [result]
        assert await flowcoro.to_thread(lambda argument: box.pop(), argument) is result
        del argument, result
        await until(lambda: [reference() for reference in alive] == [None, None])

    gc.disable()
    try:
        run(main)
    finally:
        gc.enable()


# ---- its limiter -------------------------------------------------------------------------------------------

def test_no_more_than_forty_threads_work_at_once(gate, monkeypatch):
    monkeypatch.setattr(flowcoro, "THREAD_IDLE_SECONDS", 0.05)
    counter = itertools.count(1)
    started = []

    def work():
        started.append(next(counter))
        gate.wait()

    async def main():
        tasks = [flowcoro.spawn(flowcoro.to_thread(work)) for _ in range(60)]
        await until(lambda: len(started) == 40)
        await flowcoro.checkpoint()
        assert flowcoro.statistics()["thread_calls"] == 40
        assert [task.park_reason for task in tasks].count("wait for a thread") == 40
        gate.open()
        for task in tasks:
            await task
        assert len(started) == 60

    run(main)


def test_a_limiter_of_ones_own_bounds_calls_and_lets_them_in_in_order():
    at_once, most, order = [], [], []
    lock = threading.Lock()

    def work(number):
        with lock:
            at_once.append(number)
            most.append(len(at_once))
            order.append(number)
        time.sleep(0.0002)
        with lock:
            at_once.remove(number)

    async def main():
        limiter = flowcoro.Semaphore(2)
        await flowcoro.when_all(*(flowcoro.to_thread(work, number, limiter=limiter) for number in range(40)))
        assert limiter.value == 2

        one = flowcoro.Semaphore(1)
        order.clear()
        await flowcoro.when_all(*(flowcoro.to_thread(work, number, limiter=one) for number in range(40)))

    run(main)
    assert max(most) <= 2
    assert order == list(range(40))


def test_who_is_cancelled_while_it_waits_for_the_limiter_calls_nothing(gate):
    called = []

    async def main():
        limiter = flowcoro.Semaphore(1)
        first = flowcoro.spawn(flowcoro.to_thread(gate.wait, limiter=limiter))
        await gate.came
        second = flowcoro.spawn(flowcoro.to_thread(called.append, 1, limiter=limiter))
        await flowcoro.checkpoint()
        second.cancel()
        with pytest.raises(flowcoro.TaskCancelled):
            await second
        gate.open()
        await first
        assert limiter.value == 1

    run(main)
    assert called == []


def test_in_a_cancelled_scope_to_thread_calls_nothing():
    called = []

    async def main():
        limiter = flowcoro.Semaphore(1)
        with flowcoro.CancelScope() as scope:
            scope.cancel()
            await flowcoro.to_thread(called.append, 1, limiter=limiter)
        assert scope.cancelled_caught
        assert limiter.value == 1

    run(main)
    assert called == []


def test_a_permit_handed_over_just_before_the_cancellation_comes_back(gate):
    async def main():
        limiter = flowcoro.Semaphore(1)
        await limiter.acquire()
        task = flowcoro.spawn(flowcoro.to_thread(abs, -1, limiter=limiter))
        await flowcoro.checkpoint()
        limiter.release()                   # it has the permit now, but has not run
        task.cancel()
        with pytest.raises(flowcoro.TaskCancelled):
            await task
        assert limiter.value == 1

    run(main)


def test_a_limiter_that_was_released_too_often_breaks_neither_the_call_nor_the_kernel(gate, reports):
    async def main():
        limiter = flowcoro.Semaphore(1, max_value=1)
        task = flowcoro.spawn(flowcoro.to_thread(gate.wait, "result", limiter=limiter))
        await gate.came
        limiter.release()
        gate.open()
        assert await task == "result"

    run(main)
    assert [type(error) for _, error in reports] == [ValueError]


# ---- cancelled or abandoned --------------------------------------------------------------------------------

def test_a_cancelled_call_is_waited_for_and_its_result_delivered(gate):
    async def call(events):
        events.append(await flowcoro.to_thread(gate.wait, "result"))
        await flowcoro.checkpoint()
        events.append("never")

    async def main():
        events = []
        task = flowcoro.spawn(call(events))
        await gate.came
        task.cancel()
        for _ in range(3):
            await flowcoro.checkpoint()
        assert not task.done()
        gate.open()
        with pytest.raises(flowcoro.TaskCancelled):
            await task
        return events

    assert run(main) == ["result"]


def test_the_error_of_a_cancelled_call_is_delivered_too(gate):
    def fails():
        gate.wait()
        raise OSError("the disk is full")

    async def main():
        task = flowcoro.spawn(flowcoro.to_thread(fails))
        await gate.came
        task.cancel()
        gate.open()
        with pytest.raises(OSError, match="disk"):
            await task

    run(main)


def test_a_timeout_waits_for_the_thread_unless_it_may_abandon_it(gate):
    async def main():
        with pytest.raises(TimeoutError):
            with flowcoro.timeout(0.001):
                await flowcoro.to_thread(gate.wait, abandon_on_cancel=True)
        waiting = flowcoro.spawn(flowcoro.to_thread(gate.wait, 7))
        with flowcoro.move_on_after(0.001) as scope:
            await waiting
        assert scope.cancelled_caught
        gate.open()
        assert await waiting == 7

    run(main)


def test_an_abandoned_call_raises_at_once_and_keeps_its_permit_until_the_thread_is_done(gate):
    async def main():
        limiter = flowcoro.Semaphore(1)
        task = flowcoro.spawn(flowcoro.to_thread(gate.wait, abandon_on_cancel=True, limiter=limiter))
        await gate.came
        task.cancel()
        with pytest.raises(flowcoro.TaskCancelled):
            await task
        assert limiter.value == 0
        assert flowcoro.statistics()["thread_calls"] == 1
        gate.open()
        await limiter.acquire()
        await until(lambda: flowcoro.statistics()["thread_calls"] == 0)

    run(main)


def test_what_becomes_of_an_abandoned_call_is_nobodys_concern(gate):
    def fails():
        gate.wait()
        raise ValueError("nobody asks")     # nor is it reported: a warning would fail this test

    async def main():
        limiter = flowcoro.Semaphore(1)
        with flowcoro.CancelScope() as scope:
            async with flowcoro.TaskGroup() as group:
                group.spawn(flowcoro.to_thread(fails, abandon_on_cancel=True, limiter=limiter))
                await gate.came
                scope.cancel()
        gate.open()
        await limiter.acquire()

    run(main)
    gc.collect()


def test_run_does_not_wait_for_abandoned_threads_and_they_end_in_peace(gate):
    threads = []

    def work():
        threads.append(threading.current_thread())
        gate.wait()

    async def main():
        flowcoro.spawn(flowcoro.to_thread(work, abandon_on_cancel=True))
        await gate.came
        return flowcoro.current_kernel()

    kernel = run(main)
    with pytest.raises(RuntimeError, match="ended"):
        flowcoro.call_from_thread(print, kernel=kernel)
    gate.open()

    async def use_all_threads():
        count = flowcoro.statistics()["threads"]
        all_here, limiter = threading.Barrier(count), flowcoro.Semaphore(count)

        def meet():
            all_here.wait(PATIENCE)
            return threading.current_thread()

        return await flowcoro.when_all(*(flowcoro.to_thread(meet, limiter=limiter) for _ in range(count)))

    while threads[0] not in run(use_all_threads):
        time.sleep(0.001)


def test_run_waits_for_the_others(gate):
    done = []

    def work():
        gate.wait()
        time.sleep(0.005)
        done.append(True)

    async def main():
        flowcoro.spawn(flowcoro.to_thread(work))
        await gate.came
        gate.open()

    run(main)
    assert done == [True]


@pytest.mark.parametrize("abandon", [False, True])
def test_a_cancellation_that_races_with_the_thread_loses_nothing(abandon):
    """Whatever comes first: each call ends once, and every permit comes back."""
    outcomes = []

    async def call(limiter):
        try:
            outcomes.append(await flowcoro.to_thread(abs, -1, abandon_on_cancel=abandon, limiter=limiter))
        except flowcoro.Cancelled:
            outcomes.append("cancelled")
            raise

    async def main():
        limiter = flowcoro.Semaphore(3)
        for _ in range(150):
            async with flowcoro.TaskGroup() as group:
                for _ in range(3):
                    group.spawn(call(limiter))
                for _ in range(random.randrange(4)):
                    await flowcoro.checkpoint()
                if random.random() < 0.5:
                    await flowcoro.sleep(random.random() * 0.0001)
                group.cancel()
        for _ in range(3):
            await limiter.acquire()
        await until(lambda: flowcoro.statistics()["thread_calls"] == 0)

    run(main)
    assert len(outcomes) == 450
    assert set(outcomes) <= {1, "cancelled"}


# ---- a thread that dies ------------------------------------------------------------------------------------

@pytest.fixture
def mortal_threads(monkeypatch):
    """Threads of to_thread for one test alone, whose death is no news."""
    deadline = time.monotonic() + PATIENCE
    while len(flowcoro._ThreadPool.idle) < len(flowcoro._ThreadPool.threads):       # those of other tests, still at work
        assert time.monotonic() < deadline
        time.sleep(0.001)
    monkeypatch.setattr(flowcoro._ThreadPool, "idle", [])
    monkeypatch.setattr(flowcoro._ThreadPool, "threads", set())
    monkeypatch.setattr(flowcoro, "THREAD_IDLE_SECONDS", 0.02)
    monkeypatch.setattr(threading, "excepthook", lambda report: None)
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert flowcoro._ThreadPool.idle == []
    assert flowcoro._ThreadPool.threads == set()


def kill(thread):
    """Have SystemExit raised in another thread at its next bytecode."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def test_a_thread_killed_at_work_ends_the_call_with_the_error(mortal_threads):
    async def main():
        came = flowcoro.Promise()

        def work():
            came.set_result(threading.current_thread())
            while True:
                time.sleep(0.0001)

        async def call():
            try:
                await flowcoro.to_thread(work, abandon_on_cancel=True)
            except SystemExit:
                return "killed"

        task = flowcoro.spawn(call())
        kill(await came)
        assert await task == "killed"
        assert await flowcoro.to_thread(abs, -1, abandon_on_cancel=True) == 1
        assert flowcoro.statistics()["thread_calls"] == 0

    run(main)


def test_a_thread_killed_while_idle_makes_no_call_hang(mortal_threads):
    async def main():
        kill(await flowcoro.to_thread(threading.current_thread))
        try:
            assert await flowcoro.to_thread(abs, -1, abandon_on_cancel=True) == 1
        except RuntimeError as error:       # it was killed with the call in its hands
            assert "died" in str(error)
        for _ in range(3):
            assert await flowcoro.to_thread(abs, -1, abandon_on_cancel=True) == 1
        assert flowcoro.statistics()["thread_calls"] == 0

    run(main)


def test_threads_killed_at_random_lose_no_call_and_no_permit(mortal_threads):
    """At work, just done, idle, with the next call in their hands."""
    def work():
        workers.add(threading.current_thread())
        return sum(range(2000))

    async def call(limiter):
        try:
            assert await flowcoro.to_thread(work, limiter=limiter, abandon_on_cancel=True) == 1999000
        except (RuntimeError, SystemExit):
            ends.append("killed")
        else:
            ends.append("done")

    async def main():
        limiter = flowcoro.Semaphore(4)
        for _ in range(60):
            async with flowcoro.TaskGroup() as group:
                for _ in range(4):
                    group.spawn(call(limiter))
                await flowcoro.sleep(random.random() * 0.0003)
                for thread in workers - killed:         # each once: twice would interrupt its last words
                    if thread.is_alive() and random.random() < 0.2:
                        killed.add(thread)
                        kill(thread)
        for _ in range(4):
            await limiter.acquire()
        assert flowcoro.statistics()["thread_calls"] == 0

    workers, killed, ends = set(), set(), []
    run(main)
    assert len(ends) == 240
    assert ends.count("done") > 0


# ---- contexts ----------------------------------------------------------------------------------------------

def test_context_variables_follow_into_the_thread_and_changes_stay_there():
    def work():
        seen = variable.get()
        variable.set("thread")
        return seen

    async def main():
        variable.set("task")
        assert await flowcoro.to_thread(work) == "task"
        assert variable.get() == "task"
        variable.set("later")
        assert await flowcoro.to_thread(variable.get) == "later"

    run(main)
    assert variable.get() == "unset"


def test_context_variables_follow_from_the_thread_back_into_the_kernel():
    async def read():
        await flowcoro.checkpoint()
        return variable.get()

    def work():
        variable.set("thread")
        return flowcoro.call_from_thread(variable.get), flowcoro.run_from_thread(read())

    async def main():
        variable.set("task")
        return await flowcoro.to_thread(work)

    assert run(main) == ("thread", "thread")


# ---- call_from_thread --------------------------------------------------------------------------------------

def test_call_from_thread_calls_the_function_in_the_kernels_thread():
    async def main():
        assert await flowcoro.to_thread(flowcoro.call_from_thread, divmod, 17, 5) == (3, 2)
        assert await flowcoro.to_thread(flowcoro.call_from_thread, threading.get_ident) == threading.get_ident()

    run(main)


def test_call_from_thread_raises_the_error_of_the_function_in_the_thread():
    async def main():
        def fails(error):
            raise error

        for error in (KeyError("key"), SystemExit(3), flowcoro.Cancelled()):
            try:
                await flowcoro.to_thread(flowcoro.call_from_thread, fails, error)
            except BaseException as caught:
                assert caught is error
        await flowcoro.checkpoint()             # it was the thread's error, not the kernel's

    run(main)


def test_a_foreign_thread_finds_the_only_kernel_or_is_given_one():
    async def main():
        event = flowcoro.Event()
        thread = Thread(flowcoro.call_from_thread, event.set)
        await event.wait()
        thread.outcome()
        event.clear()
        thread = Thread(functools.partial(flowcoro.call_from_thread, event.set, kernel=flowcoro.current_kernel()))
        await event.wait()
        thread.outcome()

    run(main)


def test_a_call_from_another_thread_ends_the_kernels_sleep():
    async def main():
        task = flowcoro.spawn(flowcoro.sleep(1000))
        await flowcoro.checkpoint()
        timer = threading.Timer(0.005, flowcoro.call_from_thread, (task.cancel,))
        timer.start()
        with pytest.raises(flowcoro.TaskCancelled):
            await task
        timer.join()

    run(main)


def test_with_several_kernels_a_foreign_thread_has_to_say_which(gate):
    async def other(kernels):
        kernels.append(flowcoro.current_kernel())
        gate.came.set_result(None)
        await flowcoro.to_thread(gate.event.wait, PATIENCE)

    async def main():
        kernels = []
        second = Thread(lambda: flowcoro.run(other(kernels)))
        await gate.came
        lost = Thread(flowcoro.call_from_thread, print)
        with pytest.raises(RuntimeError, match="2 kernels"):
            lost.outcome()
        ask = Thread(functools.partial(flowcoro.call_from_thread, threading.get_ident, kernel=kernels[0]))
        assert ask.outcome() == second.ident
        assert await flowcoro.to_thread(flowcoro.call_from_thread, threading.get_ident) == threading.get_ident()
        gate.open()
        second.outcome()

    run(main)


def test_without_a_kernel_there_is_nobody_to_call():
    async def nothing():
        return flowcoro.current_kernel()

    with pytest.raises(RuntimeError, match="0 kernels"):
        flowcoro.call_from_thread(print)
    kernel = flowcoro.run(nothing())
    with pytest.raises(RuntimeError, match="ended"):
        flowcoro.call_from_thread(print, kernel=kernel)
    with pytest.raises(RuntimeError, match="no FlowCoro kernel"):
        flowcoro.current_kernel()


def test_in_the_kernels_own_thread_it_would_wait_for_itself():
    async def nothing():
        pass

    async def main():
        with pytest.raises(RuntimeError, match="own thread"):
            flowcoro.call_from_thread(print)
        with pytest.raises(RuntimeError, match="own thread"):
            flowcoro.run_from_thread(nothing())

    run(main)


def test_calls_from_many_threads_are_all_made_and_in_each_threads_order():
    seen = []

    def work(number):
        return [flowcoro.call_from_thread(seen.append, (number, turn)) for turn in range(100)]

    async def main():
        await flowcoro.when_all(*(flowcoro.to_thread(work, number) for number in range(8)))

    run(main)
    for number in range(8):
        assert [turn for who, turn in seen if who == number] == list(range(100))


def test_calls_are_made_however_busy_the_tasks_are():
    async def spin(stop):
        while not stop:
            await flowcoro.checkpoint()

    async def main():
        stop = []
        spinners = [flowcoro.spawn(spin(stop)) for _ in range(3)]
        thread = Thread(flowcoro.call_from_thread, stop.append, True)
        for spinner in spinners:
            await spinner
        thread.outcome()

    run(main)


def test_a_thread_that_waits_too_long_for_the_kernel_gets_a_timeout_error():
    async def main():
        thread = Thread(functools.partial(flowcoro.call_from_thread, print, timeout=0.001))
        thread.join(PATIENCE)                   # a kernel that is blocked
        with pytest.raises(TimeoutError, match="0.001"):
            thread.outcome()

    run(main)


def test_a_call_that_comes_as_the_run_ends_is_answered():
    """In the last moments of a kernel: made, or told that the kernel has ended, but never left waiting."""
    async def work():
        return "done"

    async def main(threads):
        kernel = flowcoro.current_kernel()
        threads += [Thread(functools.partial(flowcoro.call_from_thread, int, kernel=kernel)),
                    Thread(functools.partial(flowcoro.call_from_thread, flowcoro.Promise, kernel=kernel)),
                    Thread(lambda: flowcoro.run_from_thread(work(), kernel=kernel))]
        time.sleep(0.01)                        # the calls come while nobody looks

    threads = []
    flowcoro.run(main(threads))
    for thread in threads:
        try:
            thread.outcome()
        except (RuntimeError, flowcoro.TaskCancelled):
            pass
    gc.collect()                                # a coroutine that was never awaited would complain


def test_calls_that_race_with_the_end_of_the_run_are_all_answered():
    async def work():
        await flowcoro.checkpoint()
        return "done"

    def keep_calling(kernel, go_on):
        while True:
            try:
                flowcoro.call_from_thread(int, kernel=kernel)
                flowcoro.run_from_thread(work(), kernel=kernel)
            except flowcoro.TaskCancelled:
                pass
            except RuntimeError as error:
                assert "ended" in str(error)
                return

    async def main(threads):
        threads += [Thread(keep_calling, flowcoro.current_kernel(), True) for _ in range(3)]
        await flowcoro.sleep(random.random() * 0.002)

    for _ in range(40):
        threads = []
        flowcoro.run(main(threads))
        for thread in threads:
            thread.outcome()
    gc.collect()


# ---- run_from_thread ---------------------------------------------------------------------------------------

def test_run_from_thread_runs_a_coroutine_as_a_task_and_returns_its_result():
    async def work(value):
        await flowcoro.sleep(0.0001)
        assert flowcoro.current_task().name == work.__qualname__
        return value, threading.get_ident()

    async def main():
        assert await flowcoro.to_thread(lambda: flowcoro.run_from_thread(work(7))) == (7, threading.get_ident())
        thread = Thread(lambda: flowcoro.run_from_thread(work(8)))
        await until(lambda: not thread.is_alive())
        assert thread.outcome() == (8, threading.get_ident())

    run(main)


def test_run_from_thread_raises_the_error_of_the_coroutine_and_nobody_else_is_told():
    async def fails():
        await flowcoro.checkpoint()
        raise KeyError("in the task")

    async def main():
        with pytest.raises(KeyError, match="in the task"):
            await flowcoro.to_thread(lambda: flowcoro.run_from_thread(fails()))

    run(main)
    gc.collect()                                # an error that nobody awaited would be reported


def test_run_from_thread_tells_that_the_task_was_cancelled_as_the_run_ended():
    async def main(threads):
        came = flowcoro.Promise()

        async def work():
            came.set_result(None)
            await flowcoro.sleep(1000)

        kernel = flowcoro.current_kernel()
        threads.append(Thread(lambda: flowcoro.run_from_thread(work(), kernel=kernel)))
        await came

    threads = []
    run(main, threads)
    with pytest.raises(flowcoro.TaskCancelled):
        threads[0].outcome()


@pytest.mark.parametrize("cancel", ["scope", "task", "deadline"])
def test_what_a_thread_waits_for_in_run_from_thread_is_cancelled_with_the_task_that_waits_for_the_thread(cancel):
    log = []

    async def work():
        try:
            await flowcoro.sleep(1000)
        finally:
            log.append("cleaned up")

    def function():
        try:
            flowcoro.run_from_thread(work())
        finally:
            log.append(type(sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]))

    async def main():
        async def ask():
            with flowcoro.CancelScope() as scope:
                scopes.append(scope)
                await flowcoro.to_thread(function)
                log.append("not reached")
            return scope.cancelled_caught

        scopes = []
        task = flowcoro.spawn(ask())
        await until(lambda: re.search(r"wait for a thread \(for \S*work\)", flowcoro.dump_tasks()))
        if cancel == "task":
            task.cancel()
            with pytest.raises(flowcoro.TaskCancelled):
                await task
        else:
            if cancel == "scope":
                scopes[0].cancel()
            else:
                scopes[0].deadline = flowcoro.now()
            assert await task
        assert log == ["cleaned up", flowcoro.Cancelled]

    run(main)


def test_what_a_thread_asks_for_after_the_cancellation_is_cancelled_at_its_first_checkpoint():
    log, cancelled = [], threading.Event()

    async def work():
        log.append("began")
        await flowcoro.checkpoint()
        log.append("not reached")

    def function():
        assert cancelled.wait(PATIENCE)
        for _ in range(2):
            with pytest.raises(flowcoro.Cancelled):
                flowcoro.run_from_thread(work())
        assert flowcoro.call_from_thread(log.append, "a plain call") is None
        return "the result"

    async def main():
        with flowcoro.CancelScope() as scope:
            flowcoro.spawn(cancel(scope))
            log.append(await flowcoro.to_thread(function))
            await flowcoro.checkpoint()
        assert scope.cancelled_caught

    async def cancel(scope):
        await until(lambda: flowcoro.statistics()["thread_calls"] == 1)
        scope.cancel()
        cancelled.set()

    run(main)
    assert log == ["began", "began", "a plain call", "the result"]


def test_what_an_abandoned_thread_waits_for_goes_on():
    log, done = [], threading.Event()

    async def work():
        await flowcoro.sleep(0.1)
        log.append("done")

    def function():
        flowcoro.run_from_thread(work())
        done.set()

    async def main():
        with flowcoro.move_on_after(0.02) as scope:
            await flowcoro.to_thread(function, abandon_on_cancel=True)
        assert scope.cancelled_caught and not log
        await until(done.is_set)

    run(main)
    assert log == ["done"]


def test_a_shield_protects_what_the_thread_waits_for():
    async def work():
        await flowcoro.sleep(0.05)
        return "whole"

    async def main():
        with flowcoro.move_on_after(0.01):
            with flowcoro.CancelScope(shield=True):
                assert await flowcoro.to_thread(lambda: flowcoro.run_from_thread(work())) == "whole"
            await flowcoro.checkpoint()
            pytest.fail("not reached")

    run(main)


def test_run_from_thread_takes_a_coroutine():
    async def work():
        pass

    for wrong in (work, None, 3, iter(())):
        with pytest.raises(TypeError, match="coroutine"):
            flowcoro.run_from_thread(wrong)


def test_a_coroutine_that_cannot_be_run_does_not_complain_that_nobody_awaited_it():
    async def work():
        pass

    async def main():
        return flowcoro.current_kernel()

    kernel = run(main)
    for options in ({}, {"kernel": kernel}):
        with pytest.raises(RuntimeError):
            flowcoro.run_from_thread(work(), **options)
    gc.collect()


def test_a_coroutine_whose_thread_gave_up_before_the_run_ended_does_not_complain_either():
    async def work():
        pass

    async def main():
        kernel = flowcoro.current_kernel()
        thread = Thread(lambda: flowcoro.run_from_thread(work(), kernel=kernel, timeout=0.001))
        thread.join(PATIENCE)                   # while this thread is blocked
        with pytest.raises(TimeoutError):
            thread.outcome()

    flowcoro.run(main())
    gc.collect()


def test_a_coroutine_awaited_before_is_an_error_in_the_thread():
    async def work():
        return 1

    async def main():
        used = work()
        await used
        with pytest.raises(RuntimeError, match="already awaited"):
            await flowcoro.to_thread(flowcoro.run_from_thread, used)

    run(main)


# ---- Promise across threads --------------------------------------------------------------------------------

def test_a_promise_kept_by_a_thread_wakes_all_that_wait():
    async def main():
        promise = flowcoro.Promise()

        async def wait():
            return await promise

        waiting = [flowcoro.spawn(wait()) for _ in range(5)]
        await flowcoro.checkpoint()
        thread = Thread(promise.set_result, "value")
        assert [await task for task in waiting] == ["value"] * 5
        assert await promise == "value"         # and again
        thread.outcome()

    run(main)


def test_a_promise_broken_by_a_thread_raises_its_error():
    async def main():
        promise = flowcoro.Promise()
        thread = Thread(promise.set_exception, KeyError("from the thread"))
        with pytest.raises(KeyError, match="from the thread"):
            await promise
        thread.outcome()

    run(main)


def test_of_many_threads_one_keeps_the_promise():
    async def main():
        for _ in range(20):
            promise = flowcoro.Promise()
            barrier = threading.Barrier(4)

            def race(number):
                barrier.wait()
                promise.set_result(number)

            threads = [Thread(race, number) for number in range(4)]
            winner = await promise
            failed = 0
            for thread in threads:
                try:
                    thread.outcome()
                except RuntimeError as error:
                    assert "set already" in str(error)
                    failed += 1
            assert failed == 3
            assert await promise == winner

    run(main)


def test_a_promise_kept_at_any_moment_is_noticed():
    """The thread races with the task that is about to park: no wake-up gets lost."""
    async def main():
        mailbox = []
        arrived = threading.Semaphore(0)

        def keeper():
            for number in range(400):
                arrived.acquire()
                for _ in range(random.randrange(30)):
                    pass
                mailbox.pop().set_result(number)

        thread = Thread(keeper)
        for number in range(400):
            promise = flowcoro.Promise()
            mailbox.append(promise)
            arrived.release()
            for _ in range(random.randrange(30)):
                pass
            assert await promise == number
        thread.outcome()

    run(main)


def test_a_promise_kept_while_its_waiter_is_cancelled_loses_neither():
    async def main():
        outcomes = []

        async def wait(promise):
            try:
                outcomes.append(await promise)
            except flowcoro.Cancelled:
                outcomes.append("cancelled")
                raise

        arrived, mailbox = threading.Semaphore(0), []

        def keeper():
            for _ in range(300):
                arrived.acquire()
                mailbox.pop().set_result("kept")

        thread = Thread(keeper)
        for _ in range(300):
            promise = flowcoro.Promise()
            task = flowcoro.spawn(wait(promise))
            await flowcoro.checkpoint()
            mailbox.append(promise)
            arrived.release()
            if random.random() < 0.5:
                await flowcoro.checkpoint()
            task.cancel()
            try:
                await task
            except flowcoro.TaskCancelled:
                pass
            assert await promise == "kept"
            assert promise.statistics() == {"done": True, "tasks_waiting": 0}
        thread.outcome()
        assert len(outcomes) == 300
        assert set(outcomes) <= {"kept", "cancelled"}

    run(main)


def test_one_promise_is_awaited_by_the_tasks_of_two_kernels():
    promise = flowcoro.Promise()

    async def wait():
        with flowcoro.timeout(PATIENCE):
            return await promise

    other = Thread(lambda: flowcoro.run(wait()))

    async def main():
        waiting = flowcoro.spawn(wait())
        await until(lambda: promise.statistics()["tasks_waiting"] == 2)
        promise.set_result("for both")
        return await waiting

    assert run(main) == other.outcome() == "for both"


def test_a_promise_outlives_the_kernel_that_waited_for_it():
    promise = flowcoro.Promise()

    async def wait():
        with flowcoro.move_on_after(0.001):
            await promise

    run(wait)
    Thread(promise.set_result, "late").outcome()

    async def again():
        return await promise

    assert run(again) == "late"


# ---- a kernel in a thread ----------------------------------------------------------------------------------

def test_kernels_in_several_threads_do_not_meet():
    async def main(number):
        channel = flowcoro.Channel()

        async def send():
            for item in range(100):
                await channel.send((number, item))
            channel.close()

        async with flowcoro.TaskGroup() as group:
            group.spawn(send())
            received = [item async for item in channel]
            await flowcoro.sleep(0.0001)
        assert received == [(number, item) for item in range(100)]
        return number

    threads = [Thread(lambda number=number: run(main, number)) for number in range(6)]
    assert [thread.outcome() for thread in threads] == list(range(6))


# ---- forks -------------------------------------------------------------------------------------------------

def python(script):
    """What a script prints; it must end by itself and well."""
    done = subprocess.run([sys.executable, "-c", PREFIX + textwrap.dedent(script)], cwd=ROOT, timeout=PATIENCE * 2,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


PREFIX = """\
import multiprocessing, os, signal, sys, threading, time
import flowcoro

def reap(pid):
    for _ in range(3000):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"
"""


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_the_child_of_a_fork_gets_a_clear_error_and_the_parent_goes_on(seed):
    output = python(f"""
        async def child():
            for operation in (flowcoro.sleep(1), flowcoro.to_thread(abs, -1), flowcoro.wait_readable(0)):
                try:
                    await operation
                except RuntimeError as error:
                    print("forked" in str(error), flush=True)
            try:
                flowcoro.spawn(child())
            except RuntimeError as error:
                print("forked" in str(error), flush=True)
            while True:
                await flowcoro.checkpoint()             # back into the kernel

        async def other():
            while True:
                await flowcoro.checkpoint()

        async def main():
            task = flowcoro.spawn(other())
            await flowcoro.checkpoint()
            pid = os.fork()
            if pid == 0:
                await child()
            print("the child ended with", reap(pid))
            await flowcoro.sleep(0.001)
            read, write = os.pipe()
            os.write(write, b"x")
            await flowcoro.wait_readable(read)
            assert await flowcoro.to_thread(abs, -1) == 1
            print("the parent goes on")

        parent = os.getpid()
        try:
            flowcoro.run(main(), seed={seed})
        except RuntimeError as error:
            assert os.getpid() != parent
            print("forked inside" in str(error), flush=True)
            os._exit(3)
    """)
    assert output.split("\n") == ["True"] * 5 + ["the child ended with 3", "the parent goes on", ""]


def test_a_child_forked_in_the_last_step_of_all_does_not_leave_run_as_its_parent_does():
    output = python("""
        async def main(steps):
            for _ in range(steps):
                await flowcoro.checkpoint()
            return os.fork()

        for steps in range(64):                         # wherever in a batch
            try:
                child = flowcoro.run(main(steps))
            except RuntimeError as error:
                os._exit(3 if "forked inside" in str(error) else 1)
            if child == 0:
                os._exit(2)
            assert reap(child) == 3, steps
        print("done")
    """)
    assert output == "done\n"


def test_a_child_takes_no_event_of_its_parent_wherever_in_a_batch_it_was_forked():
    output = python("""
        async def main():
            read, write = os.pipe()
            for position in range(64):                  # more than the steps between two polls
                waiter = flowcoro.spawn(flowcoro.wait_readable(read))
                for _ in range(position):
                    await flowcoro.checkpoint()
                await flowcoro.sleep(0)
                pid = os.fork()
                if pid == 0:
                    os.write(write, b"x")               # the event is there for both, and an edge is told once
                    await flowcoro.checkpoint()         # back into the kernel
                    return
                assert reap(pid) == 3
                with flowcoro.timeout(10):
                    await waiter
                os.read(read, 1)

        parent = os.getpid()
        try:
            flowcoro.run(main())
        except RuntimeError as error:
            assert os.getpid() != parent
            os._exit(3 if "forked inside" in str(error) else 4)
        print("every event came")
    """)
    assert output == "every event came\n"


def test_a_child_that_returns_from_main_gets_the_error_too():
    output = python("""
        async def main():
            pid = os.fork()
            if pid == 0:
                return "child"
            return reap(pid)

        parent = os.getpid()
        try:
            print(flowcoro.run(main()))
        except RuntimeError as error:
            assert os.getpid() != parent
            os._exit(4 if "forked" in str(error) else 5)
    """)
    assert output == "4\n"


def test_a_child_can_run_a_kernel_of_its_own():
    output = python("""
        async def inner():
            await flowcoro.sleep(0.001)
            assert await flowcoro.to_thread(abs, -1) == 1
            return 6

        async def main():
            await flowcoro.to_thread(abs, -1)           # a thread that the child will not have
            pid = os.fork()
            if pid == 0:
                os._exit(flowcoro.run(inner()))
            return reap(pid)

        print(flowcoro.run(main()))
    """)
    assert output == "6\n"


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_child_ends_on_the_signals_that_end_any_process(number):
    output = python(f"""
        def work():
            print("ready", flush=True)
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                os._exit(9)

        async def main():
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.write(write, b"x")
                work()
                os._exit(1)
            await flowcoro.wait_readable(read)
            time.sleep(0.05)
            os.kill(pid, signal.{number})
            print(reap(pid))
            await flowcoro.sleep(0.001)                 # the parent was not meant

        flowcoro.run(main())
    """)
    assert output == f"ready\n{-15 if number == 'SIGTERM' else 9}\n"


def test_a_process_forked_by_multiprocessing_works_and_can_be_terminated():
    output = python("""
        def work(queue):
            queue.put(os.getpid())
            time.sleep(60)

        async def main():
            context = multiprocessing.get_context("fork")
            queue = context.SimpleQueue()
            process = context.Process(target=work, args=(queue,))
            process.start()
            assert await flowcoro.to_thread(queue.get) == process.pid
            process.terminate()
            process.join(30)
            print(process.exitcode)

        flowcoro.run(main())
    """)
    assert output == "-15\n"


def test_in_a_child_there_is_no_kernel_to_call():
    output = python("""
        def call(kernel):
            for options in ({}, {"kernel": kernel}):
                try:
                    flowcoro.call_from_thread(print, "made", timeout=5, **options)
                except RuntimeError:
                    print("refused", flush=True)

        def fork(kernel):
            pid = os.fork()
            if pid == 0:
                call(kernel)
                os._exit(7)
            return reap(pid)

        async def main():
            kernel = flowcoro.current_kernel()
            print(fork(kernel))                                             # in the kernel's thread
            print(await flowcoro.to_thread(fork, kernel))                   # in a thread of to_thread
            await flowcoro.sleep(0.001)

        flowcoro.run(main())
    """)
    assert output == "refused\nrefused\n7\n" * 2


def test_a_child_leaves_the_parents_descriptors_alone():
    """The epoll set is shared with the child: what the child closes must stay registered for the parent."""
    output = python("""
        async def main():
            read, write = os.pipe()
            pollable = flowcoro.Pollable(read)
            pollable.readable = False
            task = flowcoro.spawn(pollable.wait_readable())
            await flowcoro.sleep(0.001)
            pid = os.fork()
            if pid == 0:
                return                                  # through the whole end of run()
            print(reap(pid))
            os.write(write, b"x")
            with flowcoro.timeout(20):
                await task
            print("woken")
            pollable.close()

        parent = os.getpid()
        try:
            flowcoro.run(main())
        except RuntimeError:
            os._exit(8)
    """)
    assert output == "8\nwoken\n"


def test_an_as_completed_that_another_thread_lets_go_of_cancels_in_the_kernels_thread():
    threads = []

    class Hooks:
        def task_rescheduled(self, task):
            threads.append(threading.current_thread())

    async def main():
        box = [flowcoro.as_completed(flowcoro.sleep(3600))]
        await flowcoro.checkpoint()
        flowcoro.add_hooks(Hooks())
        await flowcoro.to_thread(box.clear)
        while flowcoro.statistics()["tasks"]["alive"] > 1:
            await flowcoro.checkpoint()

    run(main)
    assert set(threads) == {threading.current_thread()}


@pytest.mark.parametrize("timeout", [-1, -0.5, math.nan])
def test_a_timeout_of_nonsense_is_a_value_error_and_nothing_is_asked(timeout):
    asked = []

    async def ask():
        asked.append("coroutine")

    async def main():
        with pytest.raises(ValueError, match="0 or more"):
            await flowcoro.to_thread(lambda: flowcoro.call_from_thread(asked.append, 1, timeout=timeout))
        with pytest.raises(ValueError, match="0 or more"):
            await flowcoro.to_thread(lambda: flowcoro.run_from_thread(ask(), timeout=timeout))
        assert await flowcoro.to_thread(lambda: flowcoro.call_from_thread(lambda: 42, timeout=10**400)) == 42

    run(main)
    assert asked == []


def test_an_async_function_or_a_strange_kernel_is_refused_before_anything_is_asked():
    async def function():
        pass

    async def main():
        with pytest.raises(TypeError, match="run_from_thread"):
            await flowcoro.to_thread(function)
        with pytest.raises(TypeError, match="run_from_thread"):
            await flowcoro.to_thread(flowcoro.call_from_thread, function)
        with pytest.raises(TypeError, match="current_kernel"):
            await flowcoro.to_thread(lambda: flowcoro.call_from_thread(abs, -1, kernel=5))
        with pytest.raises(TypeError, match="current_kernel"):
            await flowcoro.to_thread(lambda: flowcoro.run_from_thread(function(), kernel=5))

    run(main)


def test_the_child_of_a_fork_by_another_thread_does_not_wake_its_parent():
    output = python("""
        def fork(kernel):
            while not kernel.worker.sleeping:
                time.sleep(0.001)
            pid = os.fork()
            if pid == 0:
                for _ in range(20):
                    time.sleep(0.02)                    # time for a parent that was woken to sleep again
                    try:
                        flowcoro.call_from_thread(print, kernel=kernel)
                    except RuntimeError:
                        continue
                    os._exit(1)
                os._exit(0)
            return reap(pid)

        async def main():
            kernel, answer = flowcoro.current_kernel(), flowcoro.Promise()
            thread = threading.Thread(target=lambda: answer.set_result(fork(kernel)))
            before = flowcoro.statistics()["polls"]
            thread.start()
            assert await answer == 0
            print(flowcoro.statistics()["polls"] - before < 8)
            thread.join()

        flowcoro.run(main())
    """)
    assert output == "True\n"


def test_the_permit_of_an_abandoned_call_is_there_for_the_next_run(gate):
    limiter = flowcoro.Semaphore(1, max_value=1)

    async def abandons():
        with flowcoro.CancelScope() as scope:
            flowcoro.spawn(cancel_when(gate.came, scope))
            await flowcoro.to_thread(gate.wait, None, abandon_on_cancel=True, limiter=limiter)

    async def cancel_when(came, scope):
        await came
        scope.cancel()

    async def uses():
        return await flowcoro.to_thread(abs, -1, limiter=limiter)

    run(abandons)
    assert limiter.value == 1
    assert run(uses) == 1
    gate.open()
    assert limiter.value == 1


def test_an_abandoned_function_that_outlives_its_run_is_told_that_the_kernel_has_ended(gate):
    told, done = [], threading.Event()

    async def work():
        pass

    def function():
        gate.wait(None)
        for ask in lambda: flowcoro.call_from_thread(abs, -1), lambda: flowcoro.run_from_thread(work()):
            try:
                ask()
            except Exception as error:
                told.append(repr(error))
        done.set()

    async def main():
        with flowcoro.CancelScope() as scope:
            flowcoro.spawn(cancel_when_called(scope))
            await flowcoro.to_thread(function, abandon_on_cancel=True)

    async def cancel_when_called(scope):
        await gate.came
        scope.cancel()

    run(main)
    gate.open()
    assert done.wait(PATIENCE)
    assert told == ["RuntimeError('the kernel has ended')"] * 2


def test_threads_that_go_on_asking_do_not_starve_the_tasks():
    stop, ended = threading.Event(), []

    def hammer(kernel):
        for _ in range(2000):
            if stop.is_set():
                return
            flowcoro.call_from_thread(time.sleep, 0.001, kernel=kernel)
        ended.append("the threads have had their way first")

    async def main():
        threads = [threading.Thread(target=hammer, args=(flowcoro.current_kernel(),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(100):
                await flowcoro.checkpoint()
            assert not ended
        finally:
            stop.set()
            await flowcoro.to_thread(lambda: [thread.join() for thread in threads])

    run(main)


@pytest.mark.parametrize("ask", ["run_from_thread", "call_from_thread"])
def test_an_error_that_a_thread_no_longer_waits_for_is_reported(ask, reports):
    gone, failed = threading.Event(), flowcoro.Promise()

    def fails():
        assert gone.wait(PATIENCE)
        failed.set_result(None)
        raise ValueError("not lost")

    async def fails_as_a_task():
        fails()

    def thread():
        with pytest.raises(TimeoutError):
            if ask == "run_from_thread":
                flowcoro.run_from_thread(fails_as_a_task(), timeout=0.01)
            else:
                flowcoro.call_from_thread(fails, timeout=0.01)
        gone.set()

    async def main():
        await flowcoro.to_thread(thread)
        await failed
        await flowcoro.checkpoint()

    run(main)
    assert [repr(error) for _, error in reports] == ["ValueError('not lost')"]


def test_a_coroutine_that_cannot_be_spawned_is_answered():
    class Strange(collections.abc.Coroutine):
        def __init__(self):
            self.__qualname__ = 7           # what a mock may answer

        def send(self, value):
            raise StopIteration

        def throw(self, *error):
            raise StopIteration

        def __await__(self):
            return iter(())

    async def main():
        with pytest.raises(TypeError, match="must be a str, got 7"):
            await flowcoro.to_thread(lambda: flowcoro.run_from_thread(Strange(), timeout=PATIENCE))

    run(main)


def test_a_limiter_is_a_semaphore():
    async def main():
        with pytest.raises(TypeError, match="takes a Semaphore"):
            await flowcoro.to_thread(abs, -1, limiter=flowcoro.Lock())

    run(main)


def test_a_child_that_is_forked_in_a_thread_and_returns_says_so_and_ends_at_once():
    output = python("""
        async def main():
            read, write = os.pipe()

            def fork():
                pid = os.fork()
                if pid == 0:
                    os.dup2(write, 2)
                return pid

            pid = await flowcoro.to_thread(fork)
            assert reap(pid) == 1
            os.close(write)
            text = b""
            while chunk := os.read(read, 4096):
                text += chunk
            print("to_thread" in text.decode(), "os._exit()" in text.decode())

        began = time.monotonic()
        flowcoro.run(main())
        assert time.monotonic() - began < flowcoro.THREAD_IDLE_SECONDS
    """)
    assert output == "True True\n"


def test_an_error_that_strikes_while_a_thread_is_started_leaves_the_call_to_the_thread(monkeypatch):
    class Struck(Exception):
        pass

    def start(thread):
        begin(thread)
        if thread.name.startswith("flowcoro thread"):
            raise Struck                                # as a signal handler does that comes while start() waits

    async def main():
        limiter, goes_on = flowcoro.Semaphore(1, max_value=1), threading.Event()
        async with flowcoro.TaskGroup() as group:
            try:
                for _ in range(len(flowcoro._ThreadPool.idle)):         # so that the call needs a new thread
                    group.spawn(flowcoro.to_thread(goes_on.wait, PATIENCE, limiter=flowcoro.Semaphore(1)))
                await until(lambda: not flowcoro._ThreadPool.idle)
                monkeypatch.setattr(threading.Thread, "start", start)
                with pytest.raises(Struck):
                    await flowcoro.to_thread(time.sleep, 0.01, limiter=limiter)
            finally:
                goes_on.set()
        await until(lambda: limiter.value == 1)         # once the thread is done, and not before
        assert flowcoro.statistics()["thread_calls"] == 0

    begin = threading.Thread.start
    run(main)


# ---- what belongs to tasks ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("what", ["Event", "Channel"])
def test_a_thread_that_wakes_a_task_directly_is_told_what_to_use(what, reports):
    async def main():
        def call():
            while not kernel.worker.sleeping:
                time.sleep(0.001)
            event.set() if what == "Event" else channel.send_nowait(True)

        kernel = flowcoro.current_kernel()
        event, channel = flowcoro.Event(), flowcoro.Channel(1)
        thread = threading.Thread(target=call)
        thread.start()
        with flowcoro.timeout(PATIENCE):
            await (event.wait() if what == "Event" else channel.receive())
        thread.join()

    flowcoro.run(main())
    (message, error), = reports
    assert "what belongs to tasks" in message
    assert re.search(r"woken task '.*main' .*Use call_from_thread", str(error))


def test_a_signal_handler_may_wake_a_task_directly(reports):
    async def main():
        event = flowcoro.Event()
        before = signal.signal(signal.SIGALRM, lambda number, frame: event.set())
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with flowcoro.timeout(PATIENCE):
                await event.wait()
        finally:
            signal.signal(signal.SIGALRM, before)

    flowcoro.run(main())
    assert reports == []
