"""Tasks: run() and spawn(), awaiting, names, reports, context variables, async generators, and bad input.

What concerns scopes and groups is in test_flowcoro_scopes.py.
"""

import asyncio
import collections.abc
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import decimal
import fractions
import functools
import gc
import inspect
import math
import sys
import threading
import traceback
import types
import warnings
import weakref

import pytest

import flowcoro
from flowcoro_testing import VirtualClock, explore, run_in_kernel, wait_all_tasks_parked


def run(coro, **options):
    """flowcoro.run() on a virtual clock."""
    return flowcoro.run(coro, clock=VirtualClock(), **options)


def frames_of(error):
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


async def answer():
    return 42


async def fail(error):
    await flowcoro.checkpoint()
    raise error


# ---- run ---------------------------------------------------------------------------------------------------

def test_run_returns_the_result_of_main():
    marker = object()

    async def main():
        await flowcoro.checkpoint()
        return marker

    assert run(main()) is marker


def test_run_returns_the_result_of_a_main_that_never_awaits():
    assert run(answer()) == 42


def test_run_raises_the_very_error_of_main():
    error = ValueError("mine")

    with pytest.raises(ValueError) as caught:
        run(fail(error))
    assert caught.value is error
    assert error.__cause__ is None and error.__context__ is None


def test_the_traceback_of_an_error_shows_the_users_lines_before_those_of_the_kernel():
    async def deep():
        await flowcoro.checkpoint()
        raise ValueError("deep")

    async def main():
        await deep()

    with pytest.raises(ValueError) as caught:
        run(main())
    names = frames_of(caught.value)
    assert names[names.index("main"):] == ["main", "deep"]
    assert names[:names.index("main")][-1] == "run", "between run() and main no line of the kernel"


def test_the_traceback_of_an_error_that_an_operation_raises_ends_in_the_operation():
    async def main():
        await flowcoro.sleep(-1)

    with pytest.raises(ValueError) as caught:
        run(main())
    names = frames_of(caught.value)
    assert names[names.index("main"):][:2] == ["main", "sleep"]


def test_the_traceback_of_a_tasks_error_has_its_lines_and_those_of_who_awaits_it():
    async def child():
        await flowcoro.checkpoint()
        raise ValueError("child")

    async def main():
        await flowcoro.spawn(child())

    with pytest.raises(ValueError) as caught:
        run(main())
    names = frames_of(caught.value)
    assert names.index("main") < names.index("child")
    assert names[-1] == "child"


@run_in_kernel
async def test_the_traceback_of_an_error_does_not_grow_with_each_who_awaits_it():
    task = flowcoro.spawn(fail(ValueError("again and again")))
    lengths = []
    for _ in range(5):
        with pytest.raises(ValueError) as caught:
            await task
        lengths.append(len(frames_of(caught.value)))
    assert len(set(lengths)) == 1, lengths


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), GeneratorExit(),
                                   BaseExceptionGroup("several", [KeyboardInterrupt()])], ids=repr)
def test_an_error_of_main_of_any_kind_leaves_run_after_the_rest_has_been_joined(error):
    ended = []

    async def rest():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            ended.append("rest")

    async def main():
        flowcoro.spawn(rest())
        await flowcoro.checkpoint()
        raise error

    with pytest.raises(type(error)) as caught:
        run(main())
    assert caught.value is error
    assert ended == ["rest"]


def test_an_error_that_would_look_like_the_end_of_a_coroutine_becomes_a_runtime_error():
    with pytest.raises(RuntimeError, match="raised StopIteration") as caught:
        run(fail(StopIteration("x")))
    assert isinstance(caught.value.__cause__, StopIteration)

    @flowcoro.coroutine
    def generator():
        yield from flowcoro.checkpoint()
        raise StopIteration("x")

    with pytest.raises(RuntimeError, match="raised StopIteration"):
        run(generator())


def test_what_still_runs_when_main_returns_is_cancelled_and_joined():
    log = []

    async def child(name):
        try:
            await flowcoro.sleep(math.inf)
        except flowcoro.Cancelled:
            log.append(f"{name} cancelled")
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(5)
            log.append(f"{name} cleaned up")
            raise

    async def main():
        for name in "ab":
            flowcoro.spawn(child(name))
        await wait_all_tasks_parked()
        log.append("main returns")
        return "result"

    assert run(main()) == "result"
    assert log == ["main returns", "a cancelled", "b cancelled", "a cleaned up", "b cleaned up"]


def test_what_main_leaves_behind_is_joined_together_with_its_groups_and_children():
    log = []

    async def leaf(name):
        try:
            await flowcoro.sleep(math.inf)
        finally:
            log.append(name)

    async def branch(name):
        try:
            async with flowcoro.TaskGroup() as group:
                group.spawn(leaf(name + "1"))
                group.spawn(leaf(name + "2"))
        finally:
            log.append(name)

    async def main():
        flowcoro.spawn(branch("a"))
        flowcoro.spawn(branch("b"))
        await wait_all_tasks_parked()

    run(main())
    assert sorted(log) == ["a", "a1", "a2", "b", "b1", "b2"]
    assert log.index("a") > max(log.index("a1"), log.index("a2"))


def test_a_task_that_is_spawned_by_cleanup_after_main_is_cancelled_and_joined_too():
    log = []

    async def late():
        log.append("late began")
        try:
            await flowcoro.sleep(1)
            log.append("late slept")
        finally:
            log.append("late ended")

    async def rest():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            flowcoro.spawn(late())

    async def main():
        flowcoro.spawn(rest())
        await flowcoro.checkpoint()

    run(main())
    assert log == ["late began", "late ended"]


def test_a_task_that_was_spawned_last_of_all_still_makes_its_first_step():
    log = []

    async def child():
        log.append("first step")
        await flowcoro.checkpoint()
        log.append("second step")

    async def main():
        flowcoro.spawn(child())

    run(main())
    assert log == ["first step"]


def test_run_inside_a_running_kernel_is_a_clear_error_and_harms_nothing():
    async def main():
        inner = answer()
        with pytest.raises(RuntimeError, match=r"run\(\) inside a running kernel.*spawn"):
            flowcoro.run(inner)
        assert inspect.getcoroutinestate(inner) == "CORO_CLOSED", "else it complains that nobody awaited it"
        await flowcoro.sleep(1)
        return "went on"

    assert run(main()) == "went on"


def test_another_thread_can_run_a_kernel_of_its_own_meanwhile():
    async def inner():
        await flowcoro.sleep(1)
        return threading.get_ident()

    async def main():
        return await flowcoro.to_thread(lambda: run(inner()))

    assert run(main()) != threading.get_ident()


def test_one_run_after_the_other_starts_afresh():
    async def main():
        assert flowcoro.statistics()["tasks"]["spawned"] == 1
        await flowcoro.sleep(1)
        return flowcoro.now()

    assert [run(main()) for _ in range(3)] == [1.0, 1.0, 1.0]


def test_run_after_a_run_that_failed_starts_afresh():
    with pytest.raises(ZeroDivisionError):
        run(fail(ZeroDivisionError()))
    assert run(answer()) == 42


def test_a_main_that_is_cancelled_leaves_run_as_task_cancelled():
    async def main():
        flowcoro.current_task().cancel()
        await flowcoro.checkpoint()

    with pytest.raises(flowcoro.TaskCancelled):
        run(main())


def test_a_main_that_is_cancelled_but_returns_has_returned():
    async def main():
        flowcoro.current_task().cancel()
        with contextlib.suppress(flowcoro.Cancelled):
            await flowcoro.checkpoint()
        return "done all the same"

    assert run(main()) == "done all the same"


def test_exit_in_a_task_that_nobody_awaits_ends_the_run():
    log = []

    async def main():
        flowcoro.spawn(fail(SystemExit(7)))
        try:
            await flowcoro.sleep(math.inf)
        finally:
            log.append("main cleaned up")

    with pytest.raises(SystemExit) as caught:
        run(main())
    assert caught.value.code == 7
    assert log == ["main cleaned up"]


def test_the_hooks_of_async_generators_are_put_back_after_the_run():
    before = sys.get_asyncgen_hooks()

    async def main():
        assert sys.get_asyncgen_hooks() != before

    run(main())
    assert sys.get_asyncgen_hooks() == before


def test_a_task_that_spawns_itself_for_ever_does_not_keep_run_from_ending(reports, monkeypatch):
    monkeypatch.setattr(flowcoro, "LATE_SPAWNS", 1000)
    spawned = 0

    async def again():
        nonlocal spawned
        spawned += 1
        flowcoro.spawn(again())

    async def main():
        flowcoro.spawn(again())
        await flowcoro.checkpoint()
        return "ended"

    assert run(main()) == "ended"
    assert 1000 <= spawned < 1010
    (message, error), = reports
    assert "again" in message and "1,000 tasks were spawned here since this was cancelled" in str(error)


@run_in_kernel
async def test_a_task_that_spawns_its_successor_for_ever_does_not_keep_a_cancelled_group_from_ending(monkeypatch):
    monkeypatch.setattr(flowcoro, "LATE_SPAWNS", 1000)

    async def again(group):
        group.spawn(again(group))

    with pytest.raises(ExceptionGroup) as caught:
        async with flowcoro.TaskGroup() as group:
            group.spawn(again(group))
            await flowcoro.checkpoint()
            group.cancel()
    assert "1,000 tasks were spawned here" in str(caught.value.exceptions[0])


@pytest.mark.parametrize("use", [
    lambda: flowcoro.current_task(), lambda: flowcoro.Lock().acquire_nowait(), lambda: flowcoro.Lock().release(),
    lambda: flowcoro.RWLock().write.acquire_nowait(), lambda: flowcoro.RWLock().read.release(),
    lambda: flowcoro.CancelScope().__enter__(), lambda: flowcoro.Condition().notify(),
], ids=["current_task", "Lock.acquire", "Lock.release", "RWLock.acquire", "RWLock.release", "CancelScope", "Condition"])
def test_where_no_task_runs_nothing_can_be_held_or_entered(use):
    async def main():
        with pytest.raises(RuntimeError, match="no task runs here"):
            await flowcoro.to_thread(flowcoro.call_from_thread, use)

    run(main())


def test_cleanup_may_spawn_tasks_after_main_has_ended(reports):
    cleaned = []

    async def clean(number):
        cleaned.append(number)

    async def serve(number):
        try:
            await flowcoro.sleep(1000)
        finally:
            flowcoro.spawn(clean(number))

    async def main():
        for number in range(3000):
            flowcoro.spawn(serve(number))
        await flowcoro.checkpoint()

    run(main())
    assert sorted(cleaned) == list(range(3000))
    assert not reports


# ---- tasks from coroutines and generators, mixed -----------------------------------------------------------

@flowcoro.coroutine
def doubled_by_a_generator(channel):
    value = yield from channel.receive()
    yield from flowcoro.sleep(1)
    return 2 * value


async def doubled_by_a_coroutine(channel):
    value = await channel.receive()
    await flowcoro.sleep(1)
    return 2 * value


def test_main_may_be_a_generator():
    channel = flowcoro.Channel(1)
    channel.send_nowait(21)
    assert run(doubled_by_a_generator(channel)) == 42


@pytest.mark.parametrize("double", [doubled_by_a_generator, doubled_by_a_coroutine])
@run_in_kernel
async def test_coroutines_and_generators_are_spawned_and_awaited_alike(double):
    channel = flowcoro.Channel()
    task = flowcoro.spawn(double(channel))
    await channel.send(4)
    assert await task == 8
    async with flowcoro.TaskGroup() as group:
        task = group.spawn(double(channel))
        await channel.send(5)
    assert task.result() == 10
    buffered = flowcoro.Channel(1)
    buffered.send_nowait(6)
    assert await double(buffered) == 12


def test_coroutines_and_generators_can_await_each_other_many_levels_deep():
    async def with_await(depth):
        return await with_yield_from(depth - 1) + 1 if depth else 0

    @flowcoro.coroutine
    def with_yield_from(depth):
        if depth == 0:
            yield from flowcoro.checkpoint()
            return 0
        return (yield from with_await(depth - 1)) + 1

    assert run(with_await(200)) == 200


@run_in_kernel
async def test_errors_and_cancellation_go_through_generators():
    log = []

    @flowcoro.coroutine
    def generator():
        try:
            yield from flowcoro.sleep(math.inf)
        except flowcoro.Cancelled:
            log.append("cancelled")
            raise
        finally:
            log.append("finally")

    async def coroutine():
        await generator()

    with flowcoro.move_on_after(1) as scope:
        await coroutine()
    assert scope.cancelled_caught
    assert log == ["cancelled", "finally"]

    @flowcoro.coroutine
    def failing():
        yield from flowcoro.checkpoint()
        raise KeyError("from a generator")

    with pytest.raises(KeyError):
        await flowcoro.spawn(failing())


@run_in_kernel
async def test_generators_may_open_scopes_around_what_they_wait_for():
    @flowcoro.coroutine
    def patient(seconds):
        with flowcoro.move_on_after(seconds) as scope:
            yield from flowcoro.sleep(10)
        return scope.cancelled_caught

    assert await patient(1) is True
    assert await patient(11) is False


def test_a_plain_yield_in_a_generator_is_a_checkpoint():
    log = []

    @flowcoro.coroutine
    def polite(name):
        for step in range(2):
            log.append((name, step))
            yield

    async def main():
        async with flowcoro.TaskGroup() as group:
            group.spawn(polite("a"))
            group.spawn(polite("b"))

    run(main())
    assert log == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


@run_in_kernel
async def test_an_object_with_the_methods_of_a_coroutine_is_one():
    class Wrapped(collections.abc.Coroutine):
        """As made by mocks, by tracing tools and by compilers."""

        def __init__(self, coro):
            self.coro = coro

        def send(self, value):
            return self.coro.send(value)

        def throw(self, *error):
            return self.coro.throw(*error)

        def close(self):
            return self.coro.close()

        def __await__(self):
            return self.coro.__await__()

    channel = flowcoro.Channel()
    task = flowcoro.spawn(Wrapped(doubled_by_a_coroutine(channel)))
    assert "Wrapped" in repr(task)
    await channel.send(2)
    assert await task == 4
    assert await flowcoro.when_all(Wrapped(answer()), answer()) == [42, 42]


@run_in_kernel
async def test_tasks_step_in_turn_oldest_first():
    log = []

    async def worker(name):
        for step in range(3):
            log.append(f"{name}{step}")
            await flowcoro.checkpoint()

    async with flowcoro.TaskGroup() as group:
        for name in "abc":
            group.spawn(worker(name))
    assert log == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]


@run_in_kernel
async def test_spawn_does_not_step_the_task():
    log = []

    async def child():
        log.append("child")

    task = flowcoro.spawn(child())
    assert log == [] and not task.done()
    await task
    assert log == ["child"]


# ---- awaiting ----------------------------------------------------------------------------------------------

@run_in_kernel
async def test_a_task_can_be_awaited_many_times_by_many_tasks_before_and_after_its_end():
    async def slow():
        await flowcoro.sleep(1)
        return "value"

    async def wait_for(task):
        return await task, await task

    task = flowcoro.spawn(slow())
    assert await flowcoro.when_all(*[wait_for(task) for _ in range(5)]) == [("value", "value")] * 5
    assert await task == task.result() == "value"
    assert task.exception() is None


@run_in_kernel
async def test_awaiting_a_failed_task_raises_its_error_each_time_to_everyone():
    error = ValueError("once")
    task = flowcoro.spawn(fail(error))

    async def wait_for():
        with pytest.raises(ValueError) as caught:
            await task
        assert caught.value is error

    await flowcoro.when_all(wait_for(), wait_for())
    await wait_for()
    assert task.done() and not task.cancelled()
    assert task.exception() is error
    with pytest.raises(ValueError):
        task.result()


@run_in_kernel
async def test_awaiting_a_cancelled_task_raises_task_cancelled_which_names_it():
    task = flowcoro.spawn(flowcoro.sleep(math.inf), name="sleeper")
    await flowcoro.checkpoint()
    task.cancel()
    assert not task.done(), "cancel() does not wait"
    with pytest.raises(flowcoro.TaskCancelled, match="sleeper"):
        await task
    assert task.done() and task.cancelled()
    assert isinstance(task.exception(), flowcoro.TaskCancelled)
    with pytest.raises(flowcoro.TaskCancelled):
        task.result()
    assert not isinstance(task.exception(), flowcoro.Cancelled), "it would look as if we were cancelled"


@run_in_kernel
async def test_the_outcome_of_a_task_that_is_not_done_is_a_runtime_error():
    task = flowcoro.spawn(flowcoro.sleep(1))
    for ask in (task.result, task.exception):
        with pytest.raises(RuntimeError, match="not done"):
            ask()
    assert not task.done() and not task.cancelled()
    await task


@run_in_kernel
async def test_a_cancelled_await_leaves_the_awaited_task_running():
    task = flowcoro.spawn(flowcoro.sleep(2))
    with flowcoro.move_on_after(1) as scope:
        await task
    assert scope.cancelled_caught and not task.done()
    await task
    assert flowcoro.now() == 2


@run_in_kernel
async def test_a_task_that_awaits_itself_is_told():
    async def narcissus():
        await flowcoro.current_task()

    with pytest.raises(RuntimeError, match="awaits itself"):
        await flowcoro.spawn(narcissus())


@run_in_kernel
async def test_cancelling_a_task_that_has_ended_is_harmless():
    task = flowcoro.spawn(answer())
    await task
    task.cancel()
    assert await task == 42 and not task.cancelled()
    await flowcoro.checkpoint()


@run_in_kernel
async def test_a_task_that_was_cancelled_in_its_last_step_has_returned_its_value():
    async def last_step():
        await flowcoro.checkpoint()
        flowcoro.current_task().cancel()
        return "value"

    task = flowcoro.spawn(last_step())
    assert await task == "value"
    assert not task.cancelled()


@run_in_kernel
async def test_awaiting_a_task_that_is_done_is_no_wait_but_still_a_checkpoint_when_cancelled():
    task = flowcoro.spawn(answer())
    await task
    others = []
    flowcoro.spawn(asyncify(others.append, "ran"))
    assert await task == 42 and others == []
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        await task
        pytest.fail("not reached")
    assert scope.cancelled_caught


async def asyncify(function, *args):
    return function(*args)


def test_tasks_that_outlive_the_run_keep_their_results():
    async def main():
        task = flowcoro.spawn(answer())
        await task
        return task

    task = run(main())
    assert task.done() and task.result() == 42
    task.cancel()

    async def later():
        return await task

    assert run(later()) == 42


# ---- names, state, repr ------------------------------------------------------------------------------------

@run_in_kernel
async def test_a_task_is_named_after_its_function_unless_it_is_given_a_name():
    async with flowcoro.TaskGroup() as group:
        tasks = [group.spawn(answer()), group.spawn(answer(), name="deep thought"),
                 flowcoro.spawn(answer(), name="x")]
    assert [task.name for task in tasks] == ["answer", "deep thought", "x"]
    tasks[0].name = "renamed"
    assert tasks[0].name == "renamed" and "renamed" in repr(tasks[0])


@run_in_kernel
async def test_a_task_of_a_generator_has_its_name_too():
    task = flowcoro.spawn(doubled_by_a_generator(flowcoro.Channel()))
    assert task.name == "doubled_by_a_generator"
    task.cancel()


@run_in_kernel
async def test_the_repr_of_a_task_says_its_state_and_for_what_it_is_parked():
    seen = []

    async def life():
        seen.append(repr(flowcoro.current_task()))
        await flowcoro.checkpoint()
        await flowcoro.sleep(1)
        await flowcoro.Event().wait()

    task = flowcoro.spawn(life(), name="life")
    assert task.state in ("new", "ready")
    await flowcoro.checkpoint()
    assert seen == ["<Task life running>"]
    assert task.state == "ready" and repr(task) == "<Task life ready>"
    await flowcoro.checkpoint()
    assert task.state == "parked" and task.park_reason == "sleep"
    assert repr(task) == "<Task life parked: sleep>"
    await flowcoro.sleep(2)
    assert repr(task) == "<Task life parked: wait for an Event>"
    task.cancel()
    assert task.state == "ready"
    await flowcoro.checkpoint()
    assert task.state == "done" and repr(task) == "<Task life done: cancelled>"


@run_in_kernel
async def test_the_repr_of_a_task_that_has_ended_says_how():
    good, bad = flowcoro.spawn(answer(), name="good"), flowcoro.spawn(fail(ValueError("why")), name="bad")
    await flowcoro.sleep(1)
    assert repr(good) == "<Task good done>"
    assert repr(bad) == "<Task bad done: failed with ValueError('why')>"
    with pytest.raises(ValueError):
        await bad


@run_in_kernel
async def test_hooks_see_the_state_that_they_are_called_for():
    seen = []

    class Watch:
        def task_spawned(self, task):
            seen.append(("spawned", task.state))

        def task_parked(self, task, reason):
            seen.append(("parked", task.state, reason))

        def task_rescheduled(self, task):
            seen.append(("rescheduled", task.state))

        def task_done(self, task):
            seen.append(("done", task.state, repr(task)))

    watch = Watch()
    flowcoro.add_hooks(watch)
    task = flowcoro.spawn(flowcoro.sleep(1), name="t")
    await flowcoro.checkpoint()
    await flowcoro.checkpoint()
    flowcoro.remove_hooks(watch)
    assert seen[0][0] == "spawned" and seen[0][1] in ("new", "ready")
    assert seen[1] == ("parked", "parked", "sleep")
    flowcoro.add_hooks(watch)
    del seen[:]
    task.cancel()
    await flowcoro.checkpoint()
    flowcoro.remove_hooks(watch)
    assert seen[0] == ("rescheduled", "ready")
    assert seen[1] == ("done", "done", "<Task t done: cancelled>")


@run_in_kernel
async def test_current_task_is_the_one_that_runs():
    async def who():
        return flowcoro.current_task()

    task = flowcoro.spawn(who())
    assert await task is task
    assert flowcoro.current_task() is not task


@run_in_kernel
async def test_the_frames_of_a_task_die_with_it():
    class Big:
        pass

    async def owner(how):
        big = Big()
        seen.append(weakref.ref(big))
        if how == "fail":
            raise ValueError
        if how == "cancel":
            await flowcoro.sleep(math.inf)

    for how in ("return", "cancel"):
        seen = []
        task = flowcoro.spawn(owner(how))
        await flowcoro.checkpoint()
        task.cancel()
        await flowcoro.checkpoint()
        assert task.done() and seen[0]() is None, how


@run_in_kernel
async def test_awaiting_the_outcome_of_a_task_leaves_nothing_for_the_garbage_collector():
    async def fails():
        raise ValueError

    async def round_trip(how):
        tasks = [flowcoro.spawn(fails() if how == "fail" else flowcoro.sleep(math.inf))]
        await flowcoro.checkpoint()
        if how == "cancel":
            tasks[0].cancel()
        with contextlib.suppress(ValueError, flowcoro.TaskCancelled):
            await tasks.pop()               # a frame that holds the task is in the traceback: that were a circle

    for how in ("fail", "cancel"):
        await round_trip(how)
        gc.collect()
        gc.disable()
        try:
            left = []
            for _ in range(5):      # idle threads of other tests end when they like, and leave garbage of their own
                await round_trip(how)
                left.append(gc.collect())
            assert min(left) == 0, (how, left)
        finally:
            gc.enable()


# ---- errors that nobody awaits -----------------------------------------------------------------------------

def test_the_error_of_a_task_nobody_awaits_is_reported_with_its_name_and_the_run_goes_on(reports):
    error = ValueError("lost")

    async def main():
        flowcoro.spawn(fail(error), name="lonely")
        await flowcoro.sleep(1)
        return "main's result"

    assert run(main()) == "main's result"
    [(message, reported)] = reports
    assert reported is error and "'lonely'" in message
    assert frames_of(error)[-1] == "fail"


def test_the_error_is_reported_as_soon_as_nobody_can_await_it_any_more(reports):
    async def main():
        task = flowcoro.spawn(fail(ValueError("dropped")))
        await flowcoro.sleep(1)
        assert reports == []
        del task
        assert len(reports) == 1

    run(main())
    assert len(reports) == 1


def test_the_error_of_a_task_that_is_still_held_is_reported_when_the_run_ends(reports):
    held = []

    async def main():
        held.append(flowcoro.spawn(fail(ValueError("held"))))
        await flowcoro.sleep(1)

    run(main())
    assert len(reports) == 1
    held.clear()
    gc.collect()
    assert len(reports) == 1, "once"


@pytest.mark.parametrize("ask", ["await", "exception", "result"])
def test_an_error_that_somebody_has_asked_for_is_not_reported(reports, ask):
    async def main():
        task = flowcoro.spawn(fail(ValueError("asked for")))
        if ask == "await":
            with pytest.raises(ValueError):
                await task
        await flowcoro.sleep(1)
        if ask == "exception":
            assert isinstance(task.exception(), ValueError)
        if ask == "result":
            with pytest.raises(ValueError):
                task.result()

    run(main())
    assert reports == []


def test_an_error_whose_only_waiter_was_cancelled_before_it_got_it_is_reported(reports):
    async def main():
        with flowcoro.move_on_after(1):
            await flowcoro.spawn(slowly_failing())

    async def slowly_failing():
        try:
            await flowcoro.sleep(2)
        finally:
            raise ValueError("too late")

    run(main())
    assert [repr(error) for _, error in reports] == ["ValueError('too late')"]


def test_an_error_during_the_cancellation_at_the_end_of_the_run_is_reported(reports):
    async def stubborn():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            raise ValueError("in cleanup")

    async def main():
        flowcoro.spawn(stubborn())
        await flowcoro.checkpoint()
        return "fine"

    assert run(main()) == "fine"
    [(_, error)] = reports
    assert repr(error) == "ValueError('in cleanup')"
    assert isinstance(error.__context__, flowcoro.Cancelled)


def test_a_task_nobody_awaits_that_was_cancelled_is_not_reported(reports):
    async def main():
        task = flowcoro.spawn(flowcoro.sleep(math.inf))
        await flowcoro.checkpoint()
        task.cancel()
        await flowcoro.checkpoint()

    run(main())
    assert reports == []


def test_without_a_hook_of_the_user_the_report_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)

    async def main():
        flowcoro.spawn(fail(ValueError("printed")), name="lonely")
        await flowcoro.sleep(1)

    run(main())
    text = capsys.readouterr().err
    assert "task 'lonely' failed and nobody awaited it" in text
    assert "Traceback" in text and "in fail" in text and "ValueError: printed" in text


def test_a_broken_hook_for_reports_does_not_break_the_kernel(monkeypatch):
    def broken(args):
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "unraisablehook", broken)

    async def main():
        flowcoro.spawn(fail(ValueError("nobody is told")))
        await flowcoro.sleep(1)
        return "fine"

    assert run(main()) == "fine"


# ---- context variables -------------------------------------------------------------------------------------

variable = contextvars.ContextVar("variable", default="default")


@run_in_kernel
async def test_a_task_starts_with_a_copy_of_its_spawners_context_variables():
    variable.set("parent")

    async def child():
        before = variable.get()
        variable.set("child")
        await flowcoro.sleep(1)
        return before, variable.get()

    task = flowcoro.spawn(child())
    variable.set("parent, later")
    assert await task == ("parent", "child")
    assert variable.get() == "parent, later"


@run_in_kernel
async def test_context_variables_stay_with_each_task_across_its_waits():
    async def worker(name):
        variable.set(name)
        for _ in range(3):
            await flowcoro.checkpoint()
            assert variable.get() == name
            await flowcoro.sleep(1)
            assert variable.get() == name

    await flowcoro.when_all(*[worker(f"worker {number}") for number in range(10)])


@run_in_kernel
async def test_a_grandchild_inherits_through_groups_and_generators():
    @flowcoro.coroutine
    def leaf():
        yield from flowcoro.checkpoint()
        return variable.get()

    async def branch():
        variable.set("branch")
        async with flowcoro.TaskGroup() as group:
            task = group.spawn(leaf())
        return task.result()

    variable.set("root")
    assert await flowcoro.spawn(branch()) == "branch"
    assert variable.get() == "root"


def test_main_inherits_the_context_of_run_and_changes_nothing_in_it():
    async def main():
        before = variable.get()
        variable.set("inside")
        return before

    def body():
        variable.set("outside")
        return run(main()), variable.get()

    assert contextvars.copy_context().run(body) == ("outside", "outside")


@run_in_kernel
async def test_cancellation_is_delivered_in_the_tasks_own_context():
    seen = []

    async def child():
        variable.set("child's")
        try:
            await flowcoro.sleep(math.inf)
        finally:
            seen.append(variable.get())

    task = flowcoro.spawn(child())
    await flowcoro.checkpoint()
    variable.set("canceller's")
    task.cancel()
    await flowcoro.checkpoint()
    assert seen == ["child's"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_idle_worker_holds_no_task_that_has_ended(workers):
    class Hooks:
        def before_poll(self, timeout):
            if task() is not None:
                held.append(task().name)

    async def ends():
        return bytearray(10 ** 6)

    async def main():
        nonlocal task
        flowcoro.add_hooks(Hooks())
        task = weakref.ref(flowcoro.spawn(ends()))
        await flowcoro.sleep(0.01)                      # in which the worker is idle

    held, task = [], lambda: None
    flowcoro.run(main(), workers=workers)
    assert held == []


# ---- async generators --------------------------------------------------------------------------------------

def test_async_generators_that_are_left_are_closed_when_the_run_ends():
    log, kept = [], []

    async def numbers(name):
        try:
            yield 1
            yield 2
        finally:
            log.append(f"{name} closed")

    async def main():
        for name in "ab":
            generator = numbers(name)
            kept.append(generator)
            assert await anext(generator) == 1
        log.append("main returns")

    run(main())
    assert log[0] == "main returns" and sorted(log[1:]) == ["a closed", "b closed"]


def test_the_cleanup_of_a_generator_that_is_left_may_await_but_is_cancelled_there():
    log, kept = [], []

    async def numbers():
        try:
            yield 1
        finally:
            try:
                await flowcoro.sleep(1)
                log.append("slept")
            except flowcoro.Cancelled:
                log.append("cancelled")
                with flowcoro.CancelScope(shield=True):
                    await flowcoro.sleep(1)
                log.append("slept in a shield")
                raise

    async def main():
        kept.append(numbers())
        await anext(kept[0])

    run(main())
    assert log == ["cancelled", "slept in a shield"]


def test_a_generator_that_is_dropped_while_the_kernel_runs_is_closed_by_a_task():
    log = []

    async def numbers():
        try:
            yield 1
            yield 2
        finally:
            await flowcoro.sleep(1)
            log.append("closed")

    async def main():
        async for _ in numbers():
            break
        gc.collect()
        await flowcoro.sleep(2)
        log.append("main returns")

    run(main())
    assert log == ["closed", "main returns"]


def test_a_generator_made_by_the_cleanup_of_another_is_closed_as_well():
    log, kept = [], []

    async def inner():
        try:
            yield 1
        finally:
            log.append("inner closed")

    async def outer():
        try:
            yield 1
        finally:
            kept.append(inner())
            await anext(kept[-1])
            log.append("outer closed")

    async def main():
        kept.append(outer())
        await anext(kept[0])

    run(main())
    assert log == ["outer closed", "inner closed"]


def test_a_generator_that_has_been_closed_is_not_closed_again():
    log = []

    async def numbers():
        try:
            yield 1
        finally:
            log.append("closed")

    async def main():
        async with contextlib.aclosing(numbers()) as generator:
            await anext(generator)
        assert log == ["closed"]

    run(main())
    assert log == ["closed"]


def test_an_error_of_a_generator_that_is_closed_at_the_end_is_reported_and_the_others_are_closed(reports):
    log, kept = [], []

    async def numbers(name):
        try:
            yield 1
        finally:
            log.append(name)
            raise ValueError(name)

    async def main():
        for name in "ab":
            kept.append(numbers(name))
            await anext(kept[-1])
        return "fine"

    assert run(main()) == "fine"
    assert sorted(log) == ["a", "b"]
    assert sorted(str(error) for _, error in reports) == ["a", "b"]


def test_a_generator_with_a_group_inside_is_closed_at_the_end_with_its_tasks():
    log, kept = [], []

    async def worker():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            log.append("worker ended")

    async def numbers():
        try:
            yield 1
        finally:
            async with flowcoro.TaskGroup() as group:
                group.spawn(worker())
            log.append("not reached, for the group is cancelled")

    async def main():
        kept.append(numbers())
        await anext(kept[0])

    run(main())
    assert log == ["worker ended"]


@run_in_kernel
async def test_async_generators_and_generators_as_coroutines_mix():
    @flowcoro.coroutine
    def fetch(number):
        yield from flowcoro.sleep(1)
        return number * number

    async def squares():
        for number in range(3):
            yield await fetch(number)

    assert [square async for square in squares()] == [0, 1, 4]
    assert flowcoro.now() == 3


# ---- park and reschedule -----------------------------------------------------------------------------------

@run_in_kernel
async def test_what_reschedule_is_given_is_what_park_returns_or_raises():
    parked = []

    def park_function(task):
        task.park_reason = "test"
        task.abort_function = lambda task: True
        parked.append(task)

    async def waiter():
        return await flowcoro.park(park_function)

    good, bad = flowcoro.spawn(waiter()), flowcoro.spawn(waiter())
    await flowcoro.checkpoint()
    assert good.state == "parked" and good.park_reason == "test"
    flowcoro.reschedule(parked[0], "value")
    flowcoro.reschedule(parked[1], error=KeyError("error"))
    assert await good == "value"
    with pytest.raises(KeyError):
        await bad


@run_in_kernel
async def test_each_park_is_answered_once():
    task = flowcoro.spawn(flowcoro.Event().wait())
    with pytest.raises(RuntimeError, match="not parked.*exactly one reschedule"):
        flowcoro.reschedule(task)       # has not begun
    await flowcoro.checkpoint()
    flowcoro.reschedule(task)
    with pytest.raises(RuntimeError, match="not parked"):
        flowcoro.reschedule(task)
    await task
    with pytest.raises(RuntimeError, match="not parked"):
        flowcoro.reschedule(task)


@run_in_kernel
async def test_an_error_in_a_park_function_is_raised_in_the_task():
    def park_function(task):
        raise ZeroDivisionError("in the park function")

    with pytest.raises(ZeroDivisionError):
        await flowcoro.park(park_function)
    before = flowcoro.now()
    await flowcoro.sleep(1)
    assert flowcoro.now() == before + 1


@run_in_kernel
async def test_a_park_function_that_reschedules_and_then_fails_does_not_make_the_task_step_twice():
    def park_function(task):
        task.park_reason = "test"
        task.abort_function = lambda task: True
        flowcoro.reschedule(task, "value")
        raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        await flowcoro.park(park_function)
    before = flowcoro.now()
    await flowcoro.sleep(1)
    await flowcoro.sleep(1)
    assert flowcoro.now() == before + 2


@run_in_kernel
async def test_a_park_function_may_reschedule_at_once():
    def park_function(task):
        task.park_reason = "test"
        task.abort_function = lambda task: True
        flowcoro.reschedule(task, "at once")

    assert await flowcoro.park(park_function) == "at once"


@run_in_kernel
async def test_a_park_function_without_an_abort_function_is_told_so():
    kept = []
    with pytest.raises(RuntimeError, match="abort_function"):
        await flowcoro.park(kept.append)


@run_in_kernel
async def test_a_park_in_a_cancelled_scope_does_not_call_its_park_function():
    called = []
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        await flowcoro.park(called.append)
    assert scope.cancelled_caught and called == []


@run_in_kernel
async def test_an_abort_function_that_is_no_python_function_may_fail_too(reports):
    def park(task):
        task.park_reason = "for ever"
        task.abort_function = functools.partial(divmod, 1)       # TypeError: a task is no number

    task = flowcoro.spawn(flowcoro.park(park))
    await flowcoro.checkpoint()
    task.cancel()
    assert task.state == "parked" and "an abort function failed" in reports[0][0]
    flowcoro.reschedule(task)


def test_an_abort_function_that_fails_stops_neither_the_cancellation_nor_the_kernel(reports):
    cancelled = []

    def park_function(task):
        def abort(task):
            raise ZeroDivisionError("in the abort function")

        task.park_reason = "test"
        task.abort_function = abort

    async def bad():
        await flowcoro.park(park_function)

    async def good():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            cancelled.append("good")

    async def main():
        with flowcoro.move_on_after(1):
            async with flowcoro.TaskGroup() as group:
                group.spawn(good())
                task = group.spawn(bad())
                group.spawn(good())
                await flowcoro.sleep(0.5)
                async with flowcoro.TaskGroup() as inner:
                    inner.spawn(rescue(task))
        await flowcoro.sleep(1)

    async def rescue(task):
        """Whoever answers for the park may still do so."""
        with flowcoro.CancelScope(shield=True):
            await flowcoro.sleep(2)
        if task.state == "parked":
            flowcoro.reschedule(task)

    run(main())
    assert cancelled == ["good", "good"]
    assert any("abort function" in str(error) for _, error in reports)


@run_in_kernel
async def test_a_park_function_may_cancel_its_own_task():
    def park_function(task):
        task.park_reason = "test"
        task.abort_function = lambda task: True
        task.cancel()

    async def child():
        await flowcoro.park(park_function)

    with pytest.raises(flowcoro.TaskCancelled):
        await flowcoro.spawn(child())


@run_in_kernel
async def test_a_parking_lot_wakes_in_the_order_of_arrival_with_a_value_for_each():
    lot = flowcoro.ParkingLot("test")
    woken = []

    async def waiter(name):
        woken.append((name, await lot.park()))

    async with flowcoro.TaskGroup() as group:
        for name in "abcd":
            group.spawn(waiter(name))
        await wait_all_tasks_parked()
        assert len(lot) == 4
        assert lot.unpark(2, "first") == 2
        assert lot.unpark_all("rest") == 2
        assert lot.unpark() == 0
    assert woken == [("a", "first"), ("b", "first"), ("c", "rest"), ("d", "rest")]


@run_in_kernel
async def test_a_cancelled_task_leaves_the_parking_lot_and_its_turn_goes_to_the_next():
    lot = flowcoro.ParkingLot("test")
    first, second = flowcoro.spawn(lot.park()), flowcoro.spawn(lot.park())
    await wait_all_tasks_parked()
    first.cancel()
    assert len(lot) == 1
    assert lot.unpark(1, "value") == 1
    assert await second == "value"


# ---- bad input ---------------------------------------------------------------------------------------------

async def coroutine_function():
    pass


def generator_function():
    yield


async def async_generator_function():
    yield


def takers():
    """Everything that takes a coroutine object."""
    async def in_group(thing):
        async with flowcoro.TaskGroup() as group:
            try:
                group.spawn(thing)
            except TypeError as error:
                refused = error
        raise refused

    async def spawn(thing):
        flowcoro.spawn(thing)

    async def when_all(thing):
        await flowcoro.when_all(thing)

    async def when_any(thing):
        await flowcoro.when_any(thing)

    async def as_completed(thing):
        async for _ in flowcoro.as_completed(thing):
            pass

    return [spawn, in_group, when_all, when_any, as_completed]


@pytest.mark.parametrize("make, hint", [
    (lambda: coroutine_function, r"function.*coroutine_function\(…\)"),
    (lambda: generator_function, r"function.*generator_function\(…\)"),
    (lambda: generator_function(), "@flowcoro.coroutine"),
    (lambda: async_generator_function, "function"),
    (lambda: async_generator_function(), "async for"),
    (lambda: flowcoro.Promise(), "wrap"),
    (lambda: None, "NoneType"),
    (lambda: 42, "int"),
    (lambda: flowcoro.Lock, "function"),
], ids=["function", "generator-function", "generator", "async-generator-function", "async-generator",
        "awaitable", "none", "number", "class"])
@pytest.mark.parametrize("take", [None, *takers()], ids=lambda take: take.__name__ if take else "run")
def test_what_is_no_coroutine_is_refused_with_a_hint(take, make, hint):
    async def main():
        await take(make())

    with pytest.raises(TypeError, match=hint):
        if take is None:
            run(make())
        else:
            run(main())
    gc.collect()                            # complaints of what was left half made would come now


@run_in_kernel
async def test_the_coroutines_beside_a_wrong_one_are_closed_not_left_unawaited():
    for combine in (flowcoro.when_all, flowcoro.when_any):
        good = answer()
        with pytest.raises(TypeError):
            await combine(good, answer)
        assert inspect.getcoroutinestate(good) == "CORO_CLOSED"
    good = answer()
    with pytest.raises(TypeError):
        flowcoro.as_completed(good, answer)
    assert inspect.getcoroutinestate(good) == "CORO_CLOSED"


@run_in_kernel
async def test_a_coroutine_that_is_spawned_twice_is_refused_and_the_first_task_is_unharmed():
    async def once():
        await flowcoro.sleep(1)
        return flowcoro.now()

    coro = once()
    task = flowcoro.spawn(coro)
    with pytest.raises(RuntimeError, match="started already.*once"):
        flowcoro.spawn(coro)
    await flowcoro.checkpoint()
    with pytest.raises(RuntimeError, match="started already"):
        flowcoro.spawn(coro)
    assert await task == 1


@run_in_kernel
async def test_a_generator_that_is_spawned_twice_is_refused_and_the_first_task_is_unharmed():
    @flowcoro.coroutine
    def once():
        yield from flowcoro.sleep(1)
        return flowcoro.now()

    coro = once()
    task = flowcoro.spawn(coro)
    with pytest.raises(RuntimeError, match="started already"):
        flowcoro.spawn(coro)
    assert await task == 1


@pytest.mark.parametrize("kind", ["coroutine", "generator"])
@run_in_kernel
async def test_a_coroutine_that_another_task_awaits_cannot_be_spawned(kind):
    async def coroutine():
        await flowcoro.sleep(1)
        return "result"

    @flowcoro.coroutine
    def generator():
        yield from flowcoro.sleep(1)
        return "result"

    coro = coroutine() if kind == "coroutine" else generator()

    async def await_it():
        return await coro, flowcoro.now()

    task = flowcoro.spawn(await_it())
    await flowcoro.checkpoint()
    with pytest.raises(RuntimeError, match="started already"):
        flowcoro.spawn(coro)
    assert await task == ("result", 1), "neither cut short nor robbed of its result"


@run_in_kernel
async def test_a_coroutine_that_is_awaited_twice_is_an_error_at_the_second_await():
    coro = answer()
    assert await coro == 42
    with pytest.raises(RuntimeError, match="already awaited"):
        await coro


@run_in_kernel
async def test_a_coroutine_that_runs_in_a_task_cannot_be_awaited_beside_it():
    async def slow():
        await flowcoro.sleep(1)
        return flowcoro.now()

    coro = slow()
    task = flowcoro.spawn(coro)
    await flowcoro.checkpoint()
    with pytest.raises(RuntimeError, match="being awaited already|already being awaited|already executing"):
        await coro
    assert await task == 1


@run_in_kernel
async def test_a_coroutine_that_has_ended_or_was_closed_cannot_be_spawned_unnoticed():
    closed, ended = answer(), answer()
    closed.close()
    await ended
    for coro in (closed, ended):
        with pytest.raises(RuntimeError, match="already"):
            await flowcoro.spawn(coro)


def test_run_with_the_same_coroutine_twice_is_an_error_and_the_next_run_is_fine():
    coro = answer()
    assert run(coro) == 42
    with pytest.raises(RuntimeError, match="already"):
        run(coro)
    assert run(answer()) == 42


def test_a_coroutine_nobody_awaits_is_reported_by_the_interpreter():
    async def main():
        answer()

    with pytest.warns(RuntimeWarning, match="coroutine 'answer' was never awaited"):
        run(main())


def test_a_coroutine_that_spawn_refuses_outside_of_a_kernel_is_closed():
    coro = answer()
    with pytest.raises(RuntimeError, match=r"no FlowCoro kernel.*run\(main\(\)\)"):
        flowcoro.spawn(coro)
    assert inspect.getcoroutinestate(coro) == "CORO_CLOSED"


@pytest.mark.parametrize("call", [
    flowcoro.current_task, flowcoro.dump_tasks, flowcoro.statistics, flowcoro.request_stop,
    flowcoro.current_kernel, lambda: flowcoro.add_hooks(object()), lambda: flowcoro.timeout(1).__enter__(),
    lambda: flowcoro.CancelScope().__enter__(),
], ids=["current_task", "dump_tasks", "statistics", "request_stop", "current_kernel", "add_hooks", "timeout",
        "CancelScope"])
def test_what_needs_a_kernel_says_so_outside_of_one(call):
    with pytest.raises(RuntimeError, match="no FlowCoro kernel runs in this thread"):
        call()


@pytest.mark.parametrize("make", [
    lambda: flowcoro.sleep(1), lambda: flowcoro.Event().wait(), lambda: flowcoro.Lock().acquire(),
    lambda: flowcoro.Channel().receive(), lambda: flowcoro.to_thread(print),
    lambda: flowcoro.stop_requested(), lambda: flowcoro.TaskGroup().__aenter__(),
], ids=["sleep", "Event", "Lock", "Channel", "to_thread", "stop_requested", "TaskGroup"])
def test_an_await_outside_of_the_kernel_says_so(make):
    """Driven by hand here; the same comes out of another framework's loop."""
    coro = make()
    with pytest.raises(RuntimeError, match="no FlowCoro kernel runs in this thread"):
        coro.send(None)


def test_awaiting_a_task_or_a_promise_outside_of_the_kernel_says_so():
    async def main():
        return flowcoro.spawn(answer())

    for awaitable in (run(main()), flowcoro.Promise()):
        with pytest.raises(RuntimeError, match="no FlowCoro kernel"):
            next(awaitable.__await__())


def test_an_operation_awaited_in_asyncios_loop_says_so():
    async def main():
        with pytest.raises(RuntimeError, match="no FlowCoro kernel.*another framework's loop"):
            await flowcoro.sleep(1)

    asyncio.run(main())


def test_awaiting_a_future_of_asyncio_names_the_cause():
    loop = asyncio.new_event_loop()
    try:
        async def main():
            with pytest.raises(TypeError, match="belongs to asyncio.*to_thread"):
                await loop.create_future()
            await flowcoro.sleep(1)
            return flowcoro.now()

        assert run(main()) == 1, "the task goes on"
    finally:
        loop.close()


def test_functions_of_asyncio_fail_here():
    async def main():
        with pytest.raises(RuntimeError, match="no running event loop"):
            await asyncio.sleep(1)

    run(main())


@run_in_kernel
async def test_awaiting_what_cannot_be_awaited_is_an_ordinary_error():
    with pytest.raises(TypeError, match="await"):
        await concurrent.futures.Future()
    with pytest.raises(TypeError, match="await"):
        await coroutine_function


class Rubbish:
    def __init__(self, *args):
        pass


@pytest.mark.parametrize("rubbish", [42, "text", (1, 2), object(), [], Rubbish, str, False, 0],
                         ids=["number", "text", "tuple", "object", "list", "class", "str", "false", "zero"])
@run_in_kernel
async def test_yielding_rubbish_is_an_error_in_the_task_that_says_what_was_yielded(rubbish):
    log = []

    @flowcoro.coroutine
    def bad():
        try:
            yield rubbish
        finally:
            log.append("cleanup")

    with pytest.raises(TypeError, match="yielded .* to the kernel") as caught:
        await flowcoro.spawn(bad())
    assert repr(rubbish) in str(caught.value)
    assert "bad" in frames_of(caught.value)
    assert log == ["cleanup"]


@run_in_kernel
async def test_a_yield_where_yield_from_was_meant_is_told_so():
    @flowcoro.coroutine
    def forgot_from():
        yield flowcoro.sleep(1)

    with pytest.raises(TypeError, match="yield from"):
        await forgot_from()


class Unspeakable(Exception):
    """Cannot say what it is."""

    def __repr__(self):
        raise ZeroDivisionError

    def __call__(self, task):
        """A park function that sets no abort_function."""


class Homeless(Unspeakable):
    __module__ = 5


@pytest.mark.parametrize("rubbish, error", [(Unspeakable(), RuntimeError), (Homeless(), RuntimeError), (Homeless, TypeError)])
def test_rubbish_that_cannot_say_what_it_is_harms_only_the_task_that_yields_it(rubbish, error):
    class Awaitable:
        def __await__(self):
            yield rubbish

    async def yields():
        with pytest.raises(error, match="Unspeakable|Homeless"):
            await Awaitable()
        return "goes on"

    async def main():
        return await flowcoro.when_all(yields(), flowcoro.sleep(0.001))

    assert flowcoro.run(main()) == ["goes on", None]


@run_in_kernel
async def test_a_task_whose_error_cannot_say_what_it_is_can_be_shown():
    async def fails():
        raise Unspeakable

    task = flowcoro.spawn(fails(), name="fails")
    with pytest.raises(Unspeakable):
        await task
    assert repr(task).startswith("<Task fails done: failed with <") and "Unspeakable object at" in repr(task)


@run_in_kernel
async def test_a_task_that_catches_the_error_of_its_rubbish_goes_on():
    @flowcoro.coroutine
    def persistent():
        for _ in range(3):
            try:
                yield 42
            except TypeError:
                pass
        yield from flowcoro.sleep(1)
        return flowcoro.now()

    assert await flowcoro.spawn(persistent()) == 1


@run_in_kernel
async def test_yielding_a_function_that_is_no_park_function_is_an_error_in_the_task():
    @flowcoro.coroutine
    def bad(function):
        yield function

    with pytest.raises(TypeError):
        await bad(lambda: None)
    with pytest.raises(RuntimeError, match="abort_function"):
        await bad(lambda task: None)
    with pytest.raises(RuntimeError, match="abort_function"):
        await bad(lambda *args: None)


@pytest.mark.parametrize("seconds", [-1, -0.001, -math.inf, math.nan])
@run_in_kernel
async def test_negative_and_nan_seconds_are_refused(seconds):
    with pytest.raises(ValueError, match=r"sleep\("):
        await flowcoro.sleep(seconds)
    with pytest.raises(ValueError, match=r"timeout\("):
        flowcoro.timeout(seconds)
    with pytest.raises(ValueError, match=r"move_on_after\("):
        flowcoro.move_on_after(seconds)
    await flowcoro.sleep(1)
    assert flowcoro.now() == 1


@run_in_kernel
async def test_a_deadline_that_is_nan_is_refused():
    with pytest.raises(ValueError, match="nan"):
        await flowcoro.sleep_until(math.nan)
    with pytest.raises(ValueError, match="nan"):
        flowcoro.CancelScope(deadline=math.nan)
    with flowcoro.CancelScope() as scope:
        with pytest.raises(ValueError, match="nan"):
            scope.deadline = math.nan
        assert scope.deadline == math.inf


@pytest.mark.parametrize("seconds", ["1", None, [1], 1j], ids=repr)
@run_in_kernel
async def test_seconds_that_are_no_number_are_refused_and_leave_the_task_as_it_was(seconds):
    for take in (flowcoro.timeout, flowcoro.move_on_after):
        with pytest.raises(TypeError):
            with take(seconds):
                pytest.fail("not reached")
    with pytest.raises(TypeError):
        await flowcoro.sleep(seconds)
    with pytest.raises(TypeError):
        with flowcoro.CancelScope(deadline=seconds):
            pytest.fail("not reached")
    with flowcoro.move_on_after(5) as scope:
        with pytest.raises(TypeError):
            scope.deadline = seconds
        assert scope.deadline == 5
        await flowcoro.sleep(10)
    assert scope.cancelled_caught and flowcoro.now() == 5
    await flowcoro.sleep(1)


@pytest.mark.parametrize("seconds", [1e9, 1e18, 1e300, sys.float_info.max, 10 ** 30, math.inf], ids=repr)
def test_a_huge_sleep_is_no_overflow_on_the_real_clock(seconds):
    async def main():
        task = flowcoro.spawn(flowcoro.sleep(seconds))
        with flowcoro.timeout(seconds):
            await flowcoro.sleep(0.005)
        assert task.state == "parked" and task.park_reason == "sleep"
        task.cancel()
        with pytest.raises(flowcoro.TaskCancelled):
            await task

    flowcoro.run(main())


@run_in_kernel
async def test_hooks_that_are_none_are_refused():
    with pytest.raises(TypeError, match="task_spawned"):
        flowcoro.add_hooks(object())


@pytest.mark.parametrize("options, error", [
    ({"workers": 0}, ValueError), ({"workers": -1}, ValueError), ({"workers": "two"}, Exception),
    ({"grace": -1}, ValueError), ({"grace": math.nan}, ValueError)], ids=repr)
def test_run_refuses_options_that_make_no_sense_and_closes_its_coroutine(options, error):
    coro = answer()
    with pytest.raises(error):
        flowcoro.run(coro, **options)
    assert inspect.getcoroutinestate(coro) == "CORO_CLOSED"
    assert run(answer()) == 42


def test_decorating_what_is_no_function_is_refused():
    with pytest.raises(TypeError):
        flowcoro.coroutine(42)


# ---- faults ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["task_spawned", "task_parked", "task_rescheduled", "task_done",
                                    "before_poll", "after_poll"])
def test_an_error_in_a_hook_is_reported_and_the_kernel_goes_on(reports, method):
    def broken(*args):
        raise ZeroDivisionError(method)

    hooks = types.SimpleNamespace(**{method: broken})

    async def main():
        flowcoro.add_hooks(hooks)
        async with flowcoro.TaskGroup() as group:
            task = group.spawn(flowcoro.sleep(1))
            await flowcoro.sleep(0.5)
            other = group.spawn(flowcoro.sleep(1))
            await flowcoro.checkpoint()
            other.cancel()
        return task.done() and other.cancelled() and flowcoro.now()

    assert run(main()) == 1
    assert reports
    assert all(isinstance(error, ZeroDivisionError) and method in message for message, error in reports)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, flowcoro.Cancelled])
def test_whatever_a_hook_raises_no_task_is_left_behind(reports, kind):
    log = []

    class Hooks:
        def task_parked(self, task, reason):
            flowcoro.remove_hooks(self)
            raise kind()

    async def child():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            log.append("child ended")

    async def main():
        flowcoro.spawn(child())
        await flowcoro.checkpoint()
        flowcoro.add_hooks(Hooks())
        try:
            await flowcoro.sleep(1)
        finally:
            log.append("main ended")

    try:
        run(main())
    except (SystemExit, KeyboardInterrupt) as error:        # either is fine: to end, or to report and go on
        assert isinstance(error, kind)
    else:
        assert reports
    assert sorted(log) == ["child ended", "main ended"]
    assert run(answer()) == 42


def test_an_error_in_a_del_is_reported_by_the_interpreter_and_harms_nobody(reports):
    class Broken:
        def __del__(self):
            raise ZeroDivisionError("in __del__")

    async def child():
        broken = Broken()
        await flowcoro.sleep(1)
        del broken

    async def cancelled():
        broken = Broken()       # noqa: F841: dies with the frame
        await flowcoro.sleep(math.inf)

    async def main():
        other = flowcoro.spawn(cancelled())
        await flowcoro.spawn(child())
        other.cancel()
        await flowcoro.sleep(1)
        return flowcoro.now()

    assert run(main()) == 2
    assert len(reports) == 2 and all(isinstance(error, ZeroDivisionError) for _, error in reports)


def test_a_del_may_use_what_does_not_wait():
    log = []

    class Owner:
        def __init__(self, event, task):
            self.event, self.task, self.circle = event, task, self

        def __del__(self):
            self.event.set()
            self.task.cancel()
            flowcoro.spawn(asyncify(log.append, "spawned"))

    async def main():
        event, task = flowcoro.Event(), flowcoro.spawn(flowcoro.sleep(math.inf))
        await flowcoro.checkpoint()
        Owner(event, task)
        gc.collect()
        await event.wait()
        with pytest.raises(flowcoro.TaskCancelled):
            await task
        await flowcoro.checkpoint()

    run(main())
    assert log == ["spawned"]


@run_in_kernel
async def test_an_error_in_finally_during_cancellation_replaces_the_cancellation():
    async def child():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            raise ValueError("in finally")

    task = flowcoro.spawn(child())
    await flowcoro.checkpoint()
    task.cancel()
    with pytest.raises(ValueError, match="in finally") as caught:
        await task
    assert not task.cancelled()
    assert isinstance(caught.value.__context__, flowcoro.Cancelled)


def test_a_task_that_swallows_cancelled_in_a_loop_is_reported_with_its_stack(reports):
    rounds = 0

    async def deep():
        await flowcoro.sleep(1)

    async def swallows():
        nonlocal rounds
        while rounds < 5000:
            rounds += 1
            try:
                await deep()
            except flowcoro.Cancelled:
                pass

    async def main():
        task = flowcoro.spawn(swallows(), name="greedy")
        await flowcoro.checkpoint()
        task.cancel()
        await task

    run(main())
    assert rounds == 5000
    [(message, error)] = reports
    assert "cancellation is swallowed" in message
    text = str(error)
    assert "greedy" in text and "in test_a_task_that_swallows" in text and ".deep" in text
    line = swallows.__code__.co_firstlineno + 5
    assert f"{__file__}:{line} in" in text, "the line of the await"


def test_a_task_that_swallows_cancelled_and_works_in_a_shield_each_time_is_reported_too(reports):
    async def swallows():
        for _ in range(5000):
            try:
                await flowcoro.sleep(1)
            except flowcoro.Cancelled:
                with flowcoro.CancelScope(shield=True):
                    await flowcoro.checkpoint()

    async def main():
        task = flowcoro.spawn(swallows())
        await flowcoro.checkpoint()
        task.cancel()
        await task

    run(main())
    assert len(reports) == 1


def test_a_task_that_goes_on_for_some_checkpoints_of_cleanup_is_not_reported(reports):
    async def cleans_up():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            for _ in range(100):
                with contextlib.suppress(flowcoro.Cancelled):
                    await flowcoro.checkpoint()

    async def main():
        for _ in range(20):
            with flowcoro.move_on_after(1):
                await cleans_up()

    run(main())
    assert reports == []


def test_a_swallowing_task_does_not_keep_the_others_from_running(reports):
    async def swallows():
        for _ in range(3000):
            with contextlib.suppress(flowcoro.Cancelled):
                await flowcoro.sleep(1)

    async def main():
        task = flowcoro.spawn(swallows())
        await flowcoro.checkpoint()
        task.cancel()
        turns = 0
        while not task.done():
            await flowcoro.checkpoint()
            turns += 1
        return turns

    assert run(main()) > 1000


def test_the_outcome_is_the_same_in_any_order_of_tasks():
    async def main():
        async def child(number):
            for _ in range(number % 3):
                await flowcoro.checkpoint()
            await flowcoro.sleep(number % 2)
            return number

        tasks = [flowcoro.spawn(child(number)) for number in range(10)]
        assert [await task for task in tasks] == list(range(10))
        assert flowcoro.now() == 1

    assert explore(main, seeds=range(20)) == 20


def test_no_warning_is_left_by_the_coroutines_of_a_run():
    async def main():
        flowcoro.spawn(answer())
        group = flowcoro.TaskGroup()
        with pytest.raises(RuntimeError):
            group.spawn(answer())
        async with group:
            group.spawn(answer())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(main())
        gc.collect()
    assert caught == []


@pytest.mark.parametrize("number", [10**400, decimal.Decimal("0.5"), fractions.Fraction(1, 2), 1e308], ids=repr)
@run_in_kernel
async def test_seconds_of_any_size_and_kind_of_number_are_taken(number):
    short = number < 1
    for wait in (flowcoro.sleep, lambda seconds: flowcoro.sleep_until(flowcoro.now() + float(seconds) if short else seconds)):
        with flowcoro.move_on_after(1) as scope:
            await wait(number)
        assert scope.cancelled_caught == (not short)
    for take in (flowcoro.move_on_after, lambda seconds: flowcoro.CancelScope(deadline=seconds)):
        with take(number) as scope:
            repr(scope)
            await flowcoro.checkpoint()
    with pytest.raises(TimeoutError):
        with flowcoro.timeout(1), flowcoro.timeout(10**400):
            await flowcoro.sleep(math.inf)


def test_a_grace_too_large_for_a_float_is_for_ever():
    async def main():
        flowcoro.request_stop()
        await flowcoro.sleep(1e9)
        return "not cancelled"

    assert run(main(), grace=10**400) == "not cancelled"


class Unsplittable(ExceptionGroup):
    def split(self, condition):
        raise TypeError("cannot be split")


@pytest.mark.parametrize("levels", [0, 1500])
def test_a_group_error_that_cannot_be_split_harms_no_other_task(levels):
    cleaned = []

    async def other():
        try:
            await flowcoro.sleep(60)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(0.01)
            cleaned.append("other")

    async def nest(level):
        if level == 0:
            raise Unsplittable("leaf", [ValueError(1)])
        async with flowcoro.TaskGroup() as group:
            group.spawn(nest(level - 1))

    async def main():
        flowcoro.spawn(other())
        with pytest.raises(ExceptionGroup):
            await nest(levels or 1)
        return "ok"

    assert run(main()) == "ok" and cleaned == ["other"]


@run_in_kernel
async def test_the_name_of_a_task_is_text():
    coro = answer()
    with pytest.raises(TypeError, match="the name of a task must be a str, got 1"):
        flowcoro.spawn(coro, name=1)
    with pytest.raises(TypeError, match="must be a str"):
        flowcoro.current_task().name = ["main"]


@run_in_kernel
async def test_a_task_that_its_park_function_has_woken_is_not_told_as_parked():
    told = []

    class Hooks:
        def task_parked(self, task, reason):
            told.append(("parked", reason))

        def task_rescheduled(self, task):
            told.append("rescheduled")

    def park_and_wake(task):
        task.park_reason, task.abort_function = "for no time", lambda task: True
        flowcoro.reschedule(task, 7)

    flowcoro.add_hooks(hooks := Hooks())
    assert await flowcoro.park(park_and_wake) == 7
    flowcoro.remove_hooks(hooks)
    assert told == ["rescheduled"]


def test_the_error_of_run_is_not_hidden_by_one_in_closing_main(reports):
    class Strange(collections.abc.Coroutine):
        def send(self, value):
            raise StopIteration

        def throw(self, *error):
            raise StopIteration

        def close(self):
            raise OSError("in close")

        def __await__(self):
            return iter(())

    with pytest.raises(ValueError, match="workers=-7"):
        flowcoro.run(Strange(), workers=-7)
    assert [repr(error) for _, error in reports] == ["OSError('in close')"]


def test_a_report_hook_that_exits_does_not_end_the_kernel(monkeypatch):
    class Hooks:
        def task_done(self, task):
            raise ValueError("hook")

    def leave(report):
        raise SystemExit(1)

    async def main():
        flowcoro.add_hooks(hooks := Hooks())
        await flowcoro.spawn(answer())
        flowcoro.remove_hooks(hooks)
        return "ok"

    monkeypatch.setattr(sys, "unraisablehook", leave)
    assert run(main()) == "ok"


@pytest.mark.parametrize("combine", [flowcoro.when_all, flowcoro.when_any, flowcoro.as_completed])
@run_in_kernel
async def test_a_coroutine_given_twice_or_started_before_is_an_error_and_the_others_are_closed(combine):
    async def combined(*coros):
        result = combine(*coros)
        if combine is not flowcoro.as_completed:
            await result

    async def one():
        await flowcoro.checkpoint()
        return 1

    twice, other = one(), one()
    with pytest.raises(RuntimeError, match="has been started already"):
        await combined(twice, twice, other)
    assert inspect.getcoroutinestate(twice) == inspect.getcoroutinestate(other) == inspect.CORO_CLOSED

    task, other = flowcoro.spawn(one()), one()
    with pytest.raises(RuntimeError, match="has been started already"):
        await combined(other, task.coro)
    assert inspect.getcoroutinestate(other) == inspect.CORO_CLOSED
    assert await task == 1                      # whose coroutine was left alone


# ---- errors that defend themselves -----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    key: str


class Stubborn(Exception):
    def with_traceback(self, traceback):
        raise NotImplementedError


@pytest.mark.parametrize("error", [Frozen("key"), Stubborn()])
def test_errors_whose_traceback_cannot_be_set_the_usual_way_arrive_like_any_other(error):
    async def fails():
        await flowcoro.checkpoint()
        raise error

    async def main():
        task = flowcoro.spawn(fails())
        for _ in range(2):
            with pytest.raises(type(error)):
                await task
        with pytest.raises(ExceptionGroup) as caught:
            async with flowcoro.TaskGroup() as group:
                group.spawn(fails())
        assert caught.value.exceptions == (error,)
        await fails()

    with pytest.raises(type(error)):
        flowcoro.run(main())


@run_in_kernel
async def test_what_is_no_task_cannot_be_rescheduled():
    with pytest.raises(TypeError, match=r"reschedule\(5\)"):
        flowcoro.reschedule(5)


@run_in_kernel
async def test_the_result_of_a_joined_task_is_freed_though_who_joined_it_never_parks_again():
    class Result:
        pass

    async def give():
        return Result()

    alive = weakref.ref(await flowcoro.spawn(give()))
    await flowcoro.checkpoint()                     # the loop forgets what has woken it at the next yield
    assert alive() is None


@pytest.mark.parametrize("wrong, words", [(5, "is an int"), ("x", "is a str")])
def test_the_error_for_what_is_no_coroutine_says_what_it_is(wrong, words):
    with pytest.raises(TypeError, match=words):
        flowcoro.run(wrong)
