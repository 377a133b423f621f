"""Task groups, cancel scopes, timeouts, sleeping, and what is made of them: when_all, when_any, as_completed.

The semantics are trio's: where a test states a rule that is not obvious, trio follows it too.
"""

import asyncio
import contextlib
import decimal
import gc
import inspect
import math
import random
import re
import signal
import threading
import time

import pytest

import flowcoro
from flowcoro_testing import VirtualClock, explore, run_in_kernel, wait_all_tasks_parked


def run(coro, **options):
    """flowcoro.run() on a virtual clock."""
    return flowcoro.run(coro, clock=VirtualClock(), **options)


async def answer():
    return 42


async def after(seconds, value=None):
    """Return `value` after `seconds`, or raise it."""
    await flowcoro.sleep(seconds)
    if isinstance(value, BaseException):
        raise value
    return value


class Log(list):
    """What happened, in order."""

    async def sleeper(self, name, seconds=math.inf):
        """Sleep, and say how that ended."""
        try:
            await flowcoro.sleep(seconds)
        except flowcoro.Cancelled:
            self.append(f"{name} cancelled")
            raise
        self.append(f"{name} slept")


def errors_of(group):
    """The leaves of an ExceptionGroup."""
    if isinstance(group, BaseExceptionGroup):
        return [leaf for error in group.exceptions for leaf in errors_of(error)]
    return [group]


async def is_cancelled():
    """Whether a checkpoint here raises Cancelled."""
    try:
        await flowcoro.checkpoint()
    except flowcoro.Cancelled:
        return True
    return False


# ---- task groups: the end of the block ---------------------------------------------------------------------

@run_in_kernel
async def test_a_group_ends_when_all_its_tasks_have_and_their_results_are_there():
    async with flowcoro.TaskGroup() as group:
        tasks = [group.spawn(after(seconds, seconds * 10)) for seconds in (3, 1, 2)]
        assert flowcoro.now() == 0
    assert flowcoro.now() == 3
    assert [await task for task in tasks] == [30, 10, 20]


@run_in_kernel
async def test_the_result_of_a_task_can_be_awaited_inside_the_block():
    async with flowcoro.TaskGroup() as group:
        slow, quick = group.spawn(after(2, "slow")), group.spawn(after(1, "quick"))
        assert await quick == "quick" and not slow.done()
        assert await slow == "slow"


@run_in_kernel
async def test_an_empty_group_ends_at_once():
    async with flowcoro.TaskGroup():
        pass
    assert flowcoro.now() == 0


@run_in_kernel
async def test_the_value_of_the_block_and_its_variables_are_those_of_the_task_that_owns_it():
    async with flowcoro.TaskGroup() as group:
        owner = flowcoro.current_task()
        task = group.spawn(answer())
    assert flowcoro.current_task() is owner is not task


@run_in_kernel
async def test_a_group_says_how_many_tasks_it_has_and_whether_it_is_open():
    async with flowcoro.TaskGroup() as group:
        group.spawn(after(1))
        group.spawn(after(2))
        assert repr(group) == "<TaskGroup of 2 tasks>"
        await flowcoro.sleep(1.5)
        assert repr(group) == "<TaskGroup of 1 tasks>"
    assert repr(group) == "<TaskGroup of 0 tasks, not open>"


@run_in_kernel
async def test_a_group_serves_one_block():
    group = flowcoro.TaskGroup()
    async with group:
        group.spawn(answer())
    with pytest.raises(RuntimeError, match="a TaskGroup serves one `async with`; make a new one"):
        async with group:
            pytest.fail("not reached")
    await flowcoro.sleep(1)


@run_in_kernel
async def test_groups_nest_deep():
    depth = 0

    async def nest(level):
        nonlocal depth
        depth = max(depth, level)
        if level < 300:
            async with flowcoro.TaskGroup() as group:
                group.spawn(nest(level + 1))

    await nest(0)
    assert depth == 300


@run_in_kernel
async def test_a_cancel_reaches_the_bottom_of_deep_groups():
    ended = []

    async def nest(level):
        try:
            async with flowcoro.TaskGroup() as group:
                if level:
                    group.spawn(nest(level - 1))
                else:
                    group.spawn(flowcoro.sleep(math.inf))
        finally:
            ended.append(level)

    with flowcoro.move_on_after(1) as scope:
        await nest(300)
    assert scope.cancelled_caught and ended == list(range(301))


# ---- task groups: errors -----------------------------------------------------------------------------------

@run_in_kernel
async def test_an_error_of_a_task_leaves_in_an_exception_group_once_the_siblings_are_joined():
    log = Log()
    error = ValueError("first")

    async def slow_to_go():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(5)
            log.append("joined")

    with pytest.raises(ExceptionGroup) as caught:
        async with flowcoro.TaskGroup() as group:
            group.spawn(slow_to_go())
            group.spawn(after(1, error))
            group.spawn(log.sleeper("sibling"))
            await log.sleeper("body")
    assert caught.value.exceptions == (error,)
    assert sorted(log[:2]) == ["body cancelled", "sibling cancelled"] and log[2:] == ["joined"]
    assert flowcoro.now() == 6


@run_in_kernel
async def test_an_error_of_the_body_leaves_in_an_exception_group_too_and_cancels_the_tasks():
    log = Log()
    error = ValueError("body")
    with pytest.raises(ExceptionGroup) as caught:
        async with flowcoro.TaskGroup() as group:
            group.spawn(log.sleeper("child"))
            await flowcoro.sleep(1)
            raise error
    assert caught.value.exceptions == (error,)
    assert log == ["child cancelled"]


@run_in_kernel
async def test_errors_of_several_tasks_and_of_the_body_leave_together():
    async def child(error):
        try:
            await flowcoro.sleep(math.inf)
        finally:
            raise error

    with pytest.raises(ExceptionGroup) as caught:
        async with flowcoro.TaskGroup() as group:
            group.spawn(child(KeyError("a")))
            group.spawn(child(IndexError("b")))
            await flowcoro.sleep(1)
            raise ValueError("body")
    names = sorted(map(repr, caught.value.exceptions))
    assert names == ["IndexError('b')", "KeyError('a')", "ValueError('body')"]


@run_in_kernel
async def test_the_errors_of_nested_groups_leave_as_nested_exception_groups():
    async def inner():
        async with flowcoro.TaskGroup() as group:
            group.spawn(after(1, KeyError("inner")))
            group.spawn(after(1, IndexError("inner")))

    with pytest.raises(ExceptionGroup) as caught:
        async with flowcoro.TaskGroup() as group:
            group.spawn(inner())
            group.spawn(flowcoro.sleep(math.inf))
    [nested] = caught.value.exceptions
    assert isinstance(nested, ExceptionGroup)
    assert sorted(map(repr, nested.exceptions)) == ["IndexError('inner')", "KeyError('inner')"]


@run_in_kernel
async def test_except_star_takes_the_errors_of_a_group_apart():
    seen = []
    try:
        async with flowcoro.TaskGroup() as group:
            group.spawn(after(1, KeyError("a")))
            group.spawn(after(1, ValueError("b")))
    except* KeyError as part:
        seen += part.exceptions
    except* ValueError as part:
        seen += part.exceptions
    assert sorted(map(repr, seen)) == ["KeyError('a')", "ValueError('b')"]


@run_in_kernel
async def test_the_error_of_a_task_that_the_body_awaits_leaves_once():
    error = ValueError("once")
    with pytest.raises(ExceptionGroup) as caught:
        async with flowcoro.TaskGroup() as group:
            await group.spawn(after(1, error))
    assert caught.value.exceptions == (error,)


@run_in_kernel
async def test_an_error_that_the_body_handles_still_fails_the_group():
    """A group's task belongs to the group: to await it does not take its error away."""
    with pytest.raises(ExceptionGroup):
        async with flowcoro.TaskGroup() as group:
            with pytest.raises(ValueError):
                await group.spawn(after(1, ValueError("seen by both")))


@run_in_kernel
async def test_a_task_cancelled_by_itself_does_not_fail_its_group():
    log = Log()
    async with flowcoro.TaskGroup() as group:
        lone = group.spawn(log.sleeper("lone"))
        group.spawn(log.sleeper("sibling", 2))
        await flowcoro.sleep(1)
        lone.cancel()
    assert log == ["lone cancelled", "sibling slept"] and lone.cancelled()


@run_in_kernel
async def test_awaiting_a_cancelled_sibling_raises_task_cancelled_in_the_one_who_awaits_only():
    async def waiter(task):
        with pytest.raises(flowcoro.TaskCancelled):
            await task
        return "went on"

    async with flowcoro.TaskGroup() as group:
        victim = group.spawn(flowcoro.sleep(math.inf))
        task = group.spawn(waiter(victim))
        await flowcoro.sleep(1)
        victim.cancel()
    assert task.result() == "went on"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_leaves_a_group_as_itself_with_the_other_errors_as_its_cause(kind):
    log = Log()

    async def child():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            raise ValueError("beside")

    async def main():
        async with flowcoro.TaskGroup() as outer:
            outer.spawn(log.sleeper("outer sibling"))
            async with flowcoro.TaskGroup() as group:
                group.spawn(child())
                group.spawn(after(1, kind("end")))

    with pytest.raises(kind) as caught:
        run(main())
    assert log == ["outer sibling cancelled"]
    causes, error = [], caught.value
    while error is not None:
        causes += errors_of(error)
        error = error.__cause__
    assert "ValueError('beside')" in map(repr, causes)


@run_in_kernel
async def test_a_failed_group_cancels_nothing_outside_of_it():
    log = Log()
    async with flowcoro.TaskGroup() as outer:
        outer.spawn(log.sleeper("outer", 3))
        with pytest.raises(ExceptionGroup):
            async with flowcoro.TaskGroup() as group:
                group.spawn(after(1, ValueError()))
        assert not await is_cancelled()
    assert log == ["outer slept"]


@run_in_kernel
async def test_the_tracebacks_of_a_groups_errors_begin_with_the_users_lines():
    with pytest.raises(ExceptionGroup) as caught:
        async with flowcoro.TaskGroup() as group:
            group.spawn(after(1, ValueError()))
    [error] = caught.value.exceptions
    assert error.__traceback__.tb_frame.f_code is after.__code__


@run_in_kernel
async def test_a_group_that_fails_leaves_nothing_for_the_garbage_collector():
    async def fails():
        await flowcoro.sleep(1)
        raise ValueError                    # not one that this frame keeps: that were a circle of its own

    async def failing():
        with contextlib.suppress(ExceptionGroup):
            async with flowcoro.TaskGroup() as group:
                group.spawn(fails())

    async def succeeding():
        async with flowcoro.TaskGroup() as group:
            group.spawn(answer())

    for make in (failing, succeeding):
        await make()
        gc.collect()
        gc.disable()
        try:
            left = []
            for _ in range(5):      # idle threads of other tests end when they like, and leave garbage of their own
                await make()
                left.append(gc.collect())
            assert min(left) == 0, (make, left)
        finally:
            gc.enable()


# ---- task groups: spawning ---------------------------------------------------------------------------------

@run_in_kernel
async def test_a_child_may_spawn_into_its_group_also_while_the_owner_waits_at_the_end():
    log = Log()

    async def spawns(group, depth):
        await flowcoro.sleep(1)
        log.append(depth)
        if depth:
            group.spawn(spawns(group, depth - 1))

    async with flowcoro.TaskGroup() as group:
        group.spawn(spawns(group, 3))
    assert log == [3, 2, 1, 0] and flowcoro.now() == 4


@run_in_kernel
async def test_any_task_may_spawn_into_an_open_group():
    started = []

    async def outsider(group):
        await flowcoro.sleep(1)
        started.append(group.spawn(after(2, "spawned by an outsider")))

    async with flowcoro.TaskGroup() as group:
        flowcoro.spawn(outsider(group))
        group.spawn(flowcoro.sleep(2))
    assert flowcoro.now() == 3
    assert started[0].result() == "spawned by an outsider"


@pytest.mark.parametrize("when", ["before", "after", "after failing"])
@run_in_kernel
async def test_to_spawn_into_a_group_that_is_not_open_is_an_error_and_closes_the_coroutine(when):
    group = flowcoro.TaskGroup()
    if when == "after":
        async with group:
            pass
    if when == "after failing":
        with pytest.raises(ExceptionGroup):
            async with group:
                raise ValueError
    coro = answer()
    with pytest.raises(RuntimeError, match="not open"):
        group.spawn(coro)
    assert inspect.getcoroutinestate(coro) == "CORO_CLOSED"


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_nothing_outlives_a_group_even_if_spawned_between_its_last_tasks_end_and_its_own(ends):
    """The last task has ended, and the owner has not run yet: who awaited that task runs first and spawns."""
    async def late():
        await flowcoro.sleep(1)
        if ends == "badly":
            raise ValueError("late")

    late_tasks, open_before = [], []

    async def owner():
        try:
            async with flowcoro.TaskGroup() as group:
                open_before.append((group, group.spawn(flowcoro.sleep(1))))
        except* ValueError:
            pass
        assert all(task.done() for task in late_tasks), "the group has ended before its task"

    async def main():
        task = flowcoro.spawn(owner())
        for _ in range(2):
            await flowcoro.checkpoint()
        [(group, last)] = open_before
        await last
        coro = late()
        try:
            late_tasks.append(group.spawn(coro))
        except RuntimeError:        # trio's choice: the group was closed when its last task ended
            assert inspect.getcoroutinestate(coro) == "CORO_CLOSED"
        await task
        await flowcoro.sleep(5)

    run(main())


@run_in_kernel
async def test_to_spawn_from_another_thread_is_an_error_that_harms_the_group_not():
    caught = []

    def elsewhere(group):
        coro = answer()
        try:
            group.spawn(coro)
        except RuntimeError as error:
            caught.append(error)
        coro.close()

    with flowcoro.move_on_after(1) as scope:
        async with flowcoro.TaskGroup() as group:
            thread = threading.Thread(target=elsewhere, args=[group])
            thread.start()
            thread.join()
            group.spawn(answer())
    assert "no FlowCoro kernel runs in this thread" in str(caught[0])
    assert not scope.cancel_called, "the group waited for a task that was never started"


@run_in_kernel
async def test_a_bare_spawn_inside_of_a_group_does_not_belong_to_it():
    async with flowcoro.TaskGroup() as group:
        task = flowcoro.spawn(flowcoro.sleep(2))
        group.cancel()
    assert not task.done()
    await task
    assert flowcoro.now() == 2


# ---- task groups: cancelling -------------------------------------------------------------------------------

@run_in_kernel
async def test_cancelling_a_group_ends_its_tasks_and_its_body_and_raises_nothing():
    log = Log()
    async with flowcoro.TaskGroup() as group:
        group.spawn(log.sleeper("child"))
        await flowcoro.sleep(1)
        group.cancel()
        log.append("cancel() does not wait")
        await log.sleeper("body")
    assert log[0] == "cancel() does not wait" and sorted(log[1:]) == ["body cancelled", "child cancelled"]
    assert group.scope.cancel_called and group.scope.cancelled_caught
    assert not await is_cancelled()


@pytest.mark.parametrize("who", ["child", "grandchild", "outsider"])
@run_in_kernel
async def test_a_group_can_be_cancelled_by_its_child_its_grandchild_and_an_outsider(who):
    log = Log()

    async def cancels(group):
        await flowcoro.sleep(1)
        group.cancel()
        log.append(await is_cancelled())

    async def parent(group):
        async with flowcoro.TaskGroup() as inner:
            inner.spawn(cancels(group))

    async with flowcoro.TaskGroup() as group:
        group.spawn(log.sleeper("sibling"))
        if who == "child":
            group.spawn(cancels(group))
        elif who == "grandchild":
            group.spawn(parent(group))
        else:
            flowcoro.spawn(cancels(group))
    await flowcoro.sleep(1)
    assert sorted(map(str, log)) == [str(who != "outsider"), "sibling cancelled"]


@run_in_kernel
async def test_a_group_that_was_cancelled_before_its_block_begins_is_cancelled_from_the_start():
    log = Log()
    group = flowcoro.TaskGroup()
    group.cancel()
    async with group:
        group.spawn(log.sleeper("child"))
        log.append(await is_cancelled())
    assert log == [True, "child cancelled"]


@run_in_kernel
async def test_a_task_that_is_cancelled_before_its_first_step_still_runs_to_its_first_checkpoint():
    log = Log()

    async def child(name):
        log.append(f"{name} began")
        try:
            await flowcoro.sleep(1)
        finally:
            log.append(f"{name} cleaned up")

    async with flowcoro.TaskGroup() as group:
        group.spawn(child("cancelled by its group"))
        group.cancel()
        group.spawn(child("spawned into a cancelled group"))
    task = flowcoro.spawn(child("cancelled itself"))
    task.cancel()
    await flowcoro.sleep(1)
    assert task.cancelled()
    for name in ("cancelled by its group", "spawned into a cancelled group", "cancelled itself"):
        assert [line for line in log if line.startswith(name)] == [f"{name} began", f"{name} cleaned up"]


@run_in_kernel
async def test_a_task_that_is_cancelled_before_its_first_step_and_never_waits_ends_well():
    async with flowcoro.TaskGroup() as group:
        task = group.spawn(answer())
        group.cancel()
    assert task.result() == 42


@run_in_kernel
async def test_the_scope_of_a_group_has_a_deadline():
    log = Log()
    async with flowcoro.TaskGroup() as group:
        group.scope.deadline = 2
        group.spawn(log.sleeper("child", 3))
    assert log == ["child cancelled"] and flowcoro.now() == 2
    assert group.scope.cancelled_caught


@run_in_kernel
async def test_the_scope_of_a_group_can_be_shielded():
    log = Log()
    with flowcoro.CancelScope() as outer:
        async with flowcoro.TaskGroup() as group:
            group.scope.shield = True
            outer.cancel()
            group.spawn(log.sleeper("child", 1))
            await log.sleeper("body", 1)
        log.append(await is_cancelled())
    assert log == ["body slept", "child slept", True]


@run_in_kernel
async def test_a_scope_around_a_group_cancels_its_tasks_and_so_does_a_cancel_of_the_owner():
    log = Log()

    async def owner(name):
        async with flowcoro.TaskGroup() as group:
            group.spawn(log.sleeper(name))

    with flowcoro.move_on_after(1) as scope:
        await owner("by a scope")
    assert scope.cancelled_caught
    task = flowcoro.spawn(owner("by the owner's cancel"))
    await flowcoro.sleep(1)
    task.cancel()
    with pytest.raises(flowcoro.TaskCancelled):
        await task
    assert log == ["by a scope cancelled", "by the owner's cancel cancelled"]


@run_in_kernel
async def test_an_error_during_the_cancellation_of_a_group_leaves_it():
    async def child():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            raise ValueError("in finally")

    with pytest.raises(ExceptionGroup) as caught:
        async with flowcoro.TaskGroup() as group:
            group.spawn(child())
            await flowcoro.sleep(1)
            group.cancel()
    [error] = caught.value.exceptions
    assert repr(error) == "ValueError('in finally')" and isinstance(error.__context__, flowcoro.Cancelled)


@run_in_kernel
async def test_an_error_in_a_group_inside_of_a_cancelled_scope_is_not_lost():
    async def child():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            raise ValueError("in finally")

    with pytest.raises(ExceptionGroup) as caught:
        with flowcoro.move_on_after(1):
            async with flowcoro.TaskGroup() as group:
                group.spawn(child())
                group.spawn(flowcoro.sleep(math.inf))
    assert [repr(error) for error in errors_of(caught.value)] == ["ValueError('in finally')"]


@run_in_kernel
async def test_a_cancelled_scope_cuts_cancelled_out_of_the_exception_groups_that_leave_it():
    async def child():
        try:
            await flowcoro.sleep(math.inf)
        except flowcoro.Cancelled as error:
            raise BaseExceptionGroup("made by some library", [error, ValueError("real")]) from None

    with pytest.raises(ExceptionGroup) as caught:
        with flowcoro.move_on_after(1) as scope:
            await child()
    assert scope.cancelled_caught
    assert [repr(error) for error in errors_of(caught.value)] == ["ValueError('real')"]

    with pytest.raises(ExceptionGroup) as caught:
        async with flowcoro.TaskGroup() as group:
            group.spawn(child())
            await flowcoro.sleep(1)
            group.cancel()
    assert [repr(error) for error in errors_of(caught.value)] == ["ValueError('real')"]


@run_in_kernel
async def test_cancelled_does_not_escape_from_its_group_inside_of_an_exception_group():
    async def child():
        try:
            await flowcoro.sleep(math.inf)
        except flowcoro.Cancelled as error:
            raise BaseExceptionGroup("nothing but", [error]) from None

    async with flowcoro.TaskGroup() as group:
        group.spawn(child())
        await flowcoro.sleep(1)
        group.cancel()
    assert not await is_cancelled()


@run_in_kernel
async def test_a_group_whose_work_is_all_done_goes_on_to_the_next_checkpoint_though_it_was_cancelled():
    """As in trio: the end of a group raises Cancelled only if the cancellation has cut something short."""
    log = Log()

    async def child():
        with flowcoro.CancelScope(shield=True):
            await flowcoro.sleep(2)
        return "value"

    with flowcoro.move_on_after(1) as scope:
        async with flowcoro.TaskGroup() as group:
            task = group.spawn(child())
        log.append(task.result())
        await flowcoro.checkpoint()
        log.append("not reached")
    assert scope.cancelled_caught and log == ["value"]


@run_in_kernel
async def test_a_group_whose_task_was_cut_short_by_an_outer_cancel_raises_cancelled_at_its_end():
    log = Log()
    with flowcoro.move_on_after(1) as scope:
        async with flowcoro.TaskGroup() as group:
            group.spawn(flowcoro.sleep(2))
        log.append("not reached")
    assert scope.cancelled_caught and log == []


@run_in_kernel
async def test_ten_thousand_tasks_are_cancelled_at_once():
    async with flowcoro.TaskGroup() as group:
        tasks = [group.spawn(flowcoro.sleep(math.inf)) for _ in range(10_000)]
        await wait_all_tasks_parked()
        group.cancel()
    assert all(task.cancelled() for task in tasks)


# ---- cancel scopes: level-triggered ------------------------------------------------------------------------

@run_in_kernel
async def test_a_cancelled_scope_is_left_at_the_next_checkpoint_and_catches_its_own_cancelled():
    log = Log()
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        log.append("no checkpoint yet")
        await flowcoro.checkpoint()
        log.append("not reached")
    assert log == ["no checkpoint yet"]
    assert scope.cancel_called and scope.cancelled_caught
    assert not await is_cancelled()


@run_in_kernel
async def test_a_cancelled_scope_raises_at_every_checkpoint_until_it_has_been_left():
    counts = 0
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        for _ in range(10):
            try:
                await flowcoro.sleep(1)
            except flowcoro.Cancelled:
                counts += 1
    assert counts == 10 and flowcoro.now() == 0
    assert not scope.cancelled_caught, "the block swallowed it and ended by itself"
    assert not await is_cancelled()


@run_in_kernel
async def test_a_scope_that_was_not_cancelled_or_had_no_checkpoint_after_it_has_caught_nothing():
    with flowcoro.CancelScope() as scope:
        await flowcoro.sleep(1)
    assert not scope.cancel_called and not scope.cancelled_caught
    with flowcoro.CancelScope() as scope:
        scope.cancel()
    assert scope.cancel_called and not scope.cancelled_caught


@run_in_kernel
async def test_cancelling_twice_or_after_the_end_changes_nothing():
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        scope.cancel()
        await flowcoro.checkpoint()
    scope.cancel()
    assert not await is_cancelled()
    with flowcoro.CancelScope() as scope:
        pass
    scope.cancel()
    assert not scope.cancelled_caught and not await is_cancelled()


@pytest.mark.parametrize("shield", [False, True])
@run_in_kernel
async def test_a_scope_can_be_cancelled_before_it_is_entered(shield):
    scope = flowcoro.CancelScope(shield=shield)
    scope.cancel()
    assert not await is_cancelled()
    with scope:
        await flowcoro.checkpoint()
        pytest.fail("not reached")
    assert scope.cancelled_caught and not await is_cancelled()


@run_in_kernel
async def test_a_scope_whose_deadline_has_passed_is_cancelled_as_it_is_entered():
    await flowcoro.sleep(10)
    with flowcoro.CancelScope(deadline=5) as scope:
        assert scope.cancel_called
        await flowcoro.checkpoint()
        pytest.fail("not reached")
    assert scope.cancelled_caught


@run_in_kernel
async def test_a_scope_can_be_cancelled_from_another_task():
    log = Log()

    async def worker(scope):
        with scope:
            await log.sleeper("worker")
        log.append(await is_cancelled())

    scope = flowcoro.CancelScope()
    async with flowcoro.TaskGroup() as group:
        group.spawn(worker(scope))
        await flowcoro.sleep(1)
        scope.cancel()
    assert log == ["worker cancelled", False]


@run_in_kernel
async def test_a_scope_can_be_cancelled_by_a_task_that_runs_inside_of_it():
    log = Log()

    async def child(scope):
        scope.cancel()
        log.append("still here")
        await flowcoro.checkpoint()
        log.append("not reached")

    with flowcoro.CancelScope() as scope:
        async with flowcoro.TaskGroup() as group:
            group.spawn(child(scope))
            await log.sleeper("body")
    assert scope.cancelled_caught and log == ["still here", "body cancelled"]


@run_in_kernel
async def test_a_scope_serves_one_with():
    scope = flowcoro.CancelScope()
    with scope:
        pass
    with pytest.raises(RuntimeError, match="one `with`"):
        with scope:
            pytest.fail("not reached")
    with flowcoro.CancelScope() as scope:
        with pytest.raises(RuntimeError, match="one `with`"):
            with scope:
                pytest.fail("not reached")
        scope.cancel()
        await flowcoro.checkpoint()
    assert scope.cancelled_caught and not await is_cancelled()


@run_in_kernel
async def test_errors_pass_through_a_cancelled_scope():
    for error in (ValueError("x"), ExceptionGroup("g", [ValueError("x")]), GeneratorExit()):
        with pytest.raises(type(error)) as caught:
            with flowcoro.CancelScope() as scope:
                scope.cancel()
                raise error
        assert caught.value is error and not scope.cancelled_caught


@run_in_kernel
async def test_an_error_in_finally_takes_the_place_of_the_cancellation():
    with pytest.raises(ValueError) as caught:
        with flowcoro.CancelScope() as scope:
            scope.cancel()
            try:
                await flowcoro.checkpoint()
            finally:
                raise ValueError("in finally")
    assert isinstance(caught.value.__context__, flowcoro.Cancelled)
    assert not scope.cancelled_caught and not await is_cancelled()


@run_in_kernel
async def test_the_repr_of_a_scope_says_what_holds():
    assert repr(flowcoro.CancelScope()) == "<CancelScope>"
    with flowcoro.CancelScope(deadline=7, shield=True) as scope:
        assert repr(scope) == "<CancelScope shielded deadline=7.000>"
        scope.cancel()
        assert "cancelled" in repr(scope)


# ---- cancel scopes: nested ---------------------------------------------------------------------------------

@run_in_kernel
async def test_an_inner_scope_that_is_cancelled_leaves_the_outer_block_running():
    with flowcoro.CancelScope() as outer:
        with flowcoro.CancelScope() as inner:
            inner.cancel()
            await flowcoro.checkpoint()
        assert inner.cancelled_caught
        assert not await is_cancelled()
    assert not outer.cancel_called


@pytest.mark.parametrize("order", ["outer", "outer, inner", "inner, outer"])
@run_in_kernel
async def test_of_nested_scopes_the_outermost_cancelled_one_catches(order):
    reached = []
    with flowcoro.CancelScope() as outer:
        with flowcoro.CancelScope() as inner:
            for name in order.split(", "):
                {"outer": outer, "inner": inner}[name].cancel()
            await flowcoro.checkpoint()
        reached.append("between")
    assert outer.cancelled_caught and not inner.cancelled_caught
    assert reached == []


@run_in_kernel
async def test_an_outer_scope_cancelled_while_the_inner_ones_cancelled_is_under_way_takes_it_over():
    with flowcoro.CancelScope() as outer:
        with flowcoro.CancelScope() as inner:
            inner.cancel()
            try:
                await flowcoro.checkpoint()
            finally:
                outer.cancel()
        pytest.fail("not reached")
    assert outer.cancelled_caught and not inner.cancelled_caught


@run_in_kernel
async def test_a_scope_entered_inside_of_a_cancelled_one_is_cancelled_too():
    with flowcoro.CancelScope() as outer:
        outer.cancel()
        with flowcoro.CancelScope() as inner:
            assert await is_cancelled()
        assert not inner.cancel_called
        assert await is_cancelled()


@run_in_kernel
async def test_fifty_nested_scopes_cancelled_in_the_middle():
    reached = []
    with contextlib.ExitStack() as stack:
        scopes = []
        for number in range(50):
            stack.callback(reached.append, number)
            scopes.append(stack.enter_context(flowcoro.CancelScope()))
        scopes[20].cancel()
        scopes[35].cancel()
        await flowcoro.sleep(1)
    assert [scope.cancelled_caught for scope in scopes] == [number == 20 for number in range(50)]
    assert not await is_cancelled()


@run_in_kernel
async def test_scopes_of_one_task_that_are_not_left_in_order_are_an_error():
    async def badly_nested():
        first, second = flowcoro.CancelScope(), flowcoro.CancelScope()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)

    with pytest.raises(RuntimeError, match="scopes of one task nest"):
        await flowcoro.spawn(badly_nested())


def test_an_async_generator_that_is_left_inside_of_its_scope_is_told(reports):
    async def numbers():
        with flowcoro.move_on_after(5):
            yield 1

    async def main():
        with flowcoro.CancelScope():
            generator = numbers()
            await anext(generator)

    with pytest.raises(RuntimeError, match="async generator"):
        run(main())
    for _, error in reports:       # of the generator's own end
        assert isinstance(error, RuntimeError) and "async generator" in str(error)


# ---- cancel scopes: shields --------------------------------------------------------------------------------

@run_in_kernel
async def test_a_shield_keeps_cancellation_away_until_its_end():
    log = Log()
    with flowcoro.CancelScope() as outer:
        outer.cancel()
        with flowcoro.CancelScope(shield=True) as shield:
            await log.sleeper("shielded", 5)
            with flowcoro.CancelScope():
                assert not await is_cancelled()
        assert not shield.cancel_called
        await log.sleeper("outside", 5)
    assert log == ["shielded slept", "outside cancelled"] and outer.cancelled_caught


@run_in_kernel
async def test_a_cancel_that_comes_while_the_task_waits_in_a_shield_waits_too():
    log = Log()

    async def worker():
        with flowcoro.CancelScope(shield=True):
            await log.sleeper("shielded", 5)
        log.append("shield left")
        await log.sleeper("outside", 5)

    task = flowcoro.spawn(worker())
    await flowcoro.sleep(1)
    task.cancel()
    with pytest.raises(flowcoro.TaskCancelled):
        await task
    assert log == ["shielded slept", "shield left", "outside cancelled"] and flowcoro.now() == 5


@run_in_kernel
async def test_a_shield_protects_the_tasks_of_groups_inside_of_it_but_not_those_outside():
    log = Log()
    with flowcoro.CancelScope() as scope:
        async with flowcoro.TaskGroup() as outer:
            outer.spawn(log.sleeper("outer child", 5))
            with flowcoro.CancelScope(shield=True):
                async with flowcoro.TaskGroup() as inner:
                    inner.spawn(log.sleeper("inner child", 5))
                    inner.spawn(nested_sleeper(log))
                    await flowcoro.sleep(1)
                    scope.cancel()
                    inner.spawn(log.sleeper("spawned later", 5))
    assert log == ["outer child cancelled", "inner child slept", "nested slept", "spawned later slept"]
    assert scope.cancelled_caught


async def nested_sleeper(log):
    async with flowcoro.TaskGroup() as group:
        group.spawn(log.sleeper("nested", 5))


@run_in_kernel
async def test_a_shielded_scope_can_itself_be_cancelled_and_expires():
    with flowcoro.CancelScope(shield=True) as shield:
        shield.cancel()
        await flowcoro.checkpoint()
    assert shield.cancelled_caught
    with flowcoro.CancelScope() as outer:
        outer.cancel()
        with flowcoro.CancelScope(shield=True, deadline=3) as shield:
            await flowcoro.sleep(10)
        assert shield.cancelled_caught and flowcoro.now() == 3
        with flowcoro.CancelScope(shield=True):
            with flowcoro.CancelScope() as inner:
                inner.cancel()
                await flowcoro.checkpoint()
            assert inner.cancelled_caught and not await is_cancelled()


@run_in_kernel
async def test_a_shield_can_be_raised_and_dropped_by_the_block_itself():
    with flowcoro.CancelScope() as outer:
        with flowcoro.CancelScope() as scope:
            outer.cancel()
            assert await is_cancelled()
            scope.shield = True
            assert not await is_cancelled()
            scope.shield = False
            assert await is_cancelled()
            scope.shield = True
        assert await is_cancelled()


@run_in_kernel
async def test_a_shield_that_another_task_drops_lets_the_pending_cancellation_in():
    log = Log()

    async def worker(scope):
        with scope:
            async with flowcoro.TaskGroup() as group:
                group.spawn(log.sleeper("child"))
                await log.sleeper("worker")

    scope = flowcoro.CancelScope(shield=True)
    task = flowcoro.spawn(worker(scope))
    await flowcoro.sleep(1)
    task.cancel()
    await flowcoro.sleep(1)
    assert log == []
    scope.shield = False
    with pytest.raises(flowcoro.TaskCancelled):
        await task
    assert sorted(log) == ["child cancelled", "worker cancelled"] and flowcoro.now() == 2


@pytest.mark.parametrize("when", ["while it waits", "after it has been told"])
@run_in_kernel
async def test_a_shield_that_another_task_raises_protects_from_then_on(when):
    """One Cancelled that was under way before may still arrive."""
    log = Log()

    async def worker(scope):
        with scope:
            with contextlib.suppress(flowcoro.Cancelled):
                await flowcoro.sleep(10)
            while not scope.shield:
                with contextlib.suppress(flowcoro.Cancelled):
                    await flowcoro.checkpoint()
            await log.sleeper("worker", 1)
        log.append(await is_cancelled())

    scope = flowcoro.CancelScope()
    task = flowcoro.spawn(worker(scope))
    await flowcoro.sleep(1)
    task.cancel()
    if when == "after it has been told":
        for _ in range(5):
            await flowcoro.checkpoint()
    scope.shield = True
    await flowcoro.sleep(5)
    assert log == ["worker slept", True]


@run_in_kernel
async def test_a_shield_raised_around_a_group_protects_its_tasks_and_their_groups_from_then_on():
    log = Log()

    async def child(name):
        with contextlib.suppress(flowcoro.Cancelled):
            await flowcoro.sleep(10)        # the cancellation that came before the shield
        await log.sleeper(name, 1)

    async def parent():
        with contextlib.suppress(flowcoro.Cancelled):
            async with flowcoro.TaskGroup() as inner:
                inner.spawn(child("grandchild"))
                with contextlib.suppress(flowcoro.Cancelled):
                    await flowcoro.sleep(10)
                inner.spawn(log.sleeper("spawned later", 1))

    with flowcoro.CancelScope() as outer:
        async with flowcoro.TaskGroup() as group:
            group.spawn(child("child"))
            group.spawn(parent())
            await wait_all_tasks_parked()
            outer.cancel()
            group.scope.shield = True
    assert sorted(log) == ["child slept", "grandchild slept", "spawned later slept"]


# ---- cancel scopes: deadlines ------------------------------------------------------------------------------

@run_in_kernel
async def test_a_deadline_cancels_the_scope():
    with flowcoro.CancelScope(deadline=2) as scope:
        await flowcoro.sleep(5)
    assert flowcoro.now() == 2 and scope.cancelled_caught and scope.deadline == 2


@run_in_kernel
async def test_a_deadline_that_is_not_reached_leaves_no_trace():
    with flowcoro.CancelScope(deadline=2) as scope:
        await flowcoro.sleep(1)
    await flowcoro.sleep(5)
    assert not scope.cancel_called and flowcoro.now() == 6


@pytest.mark.parametrize("moved_to, expected",
                         [(1, 1), (8, 8), (0.5, 0.5), (-5, 0.5), (math.inf, 20), (5, 5)])
@pytest.mark.parametrize("by", ["itself", "another task"])
@run_in_kernel
async def test_a_deadline_can_be_moved(moved_to, expected, by):
    async def mover(scope):
        await flowcoro.sleep(0.5)
        scope.deadline = moved_to

    with flowcoro.CancelScope(deadline=5) as scope:
        if by == "itself":
            await mover(scope)
        else:
            flowcoro.spawn(mover(scope))
        await flowcoro.sleep_until(20)
    assert flowcoro.now() == expected
    assert scope.cancelled_caught == (expected != 20)


@run_in_kernel
async def test_a_deadline_can_be_moved_again_and_again():
    """A watchdog: as long as it is fed the work goes on."""
    with flowcoro.move_on_after(2) as scope:
        for _ in range(100):
            await flowcoro.sleep(1)
            scope.deadline = flowcoro.now() + 2
        await flowcoro.sleep(math.inf)
    assert scope.cancelled_caught and flowcoro.now() == 102


@run_in_kernel
async def test_a_deadline_moved_after_it_has_passed_does_not_undo_the_cancellation():
    with flowcoro.CancelScope(deadline=1) as scope:
        with contextlib.suppress(flowcoro.Cancelled):
            await flowcoro.sleep(5)
        scope.deadline = math.inf
        assert await is_cancelled()
    assert scope.cancel_called


@run_in_kernel
async def test_a_deadline_given_before_the_entry_counts_and_replaces_the_seconds():
    scope = flowcoro.CancelScope()
    scope.deadline = 3
    with scope:
        await flowcoro.sleep(5)
    assert flowcoro.now() == 3
    scope = flowcoro.move_on_after(100)
    scope.deadline = 4
    with scope:
        await flowcoro.sleep(5)
    assert flowcoro.now() == 4 and scope.cancelled_caught


@run_in_kernel
async def test_the_seconds_of_a_timeout_count_from_its_entry():
    scope = flowcoro.move_on_after(2)
    await flowcoro.sleep(10)
    with scope:
        assert scope.deadline == 12
        await flowcoro.sleep(1)
    assert not scope.cancel_called


@run_in_kernel
async def test_deadlines_of_nested_scopes_fire_in_their_own_order():
    times = []
    with flowcoro.move_on_after(3) as outer:
        with flowcoro.move_on_after(2):
            with flowcoro.move_on_after(1):
                await flowcoro.sleep(10)
            times.append(flowcoro.now())
            await flowcoro.sleep(10)
        times.append(flowcoro.now())
        await flowcoro.sleep(10)
    times.append(flowcoro.now())
    assert times == [1, 2, 3] and outer.cancelled_caught


@run_in_kernel
async def test_the_same_deadline_may_be_set_over_and_over():
    with flowcoro.move_on_after(3) as scope:
        await flowcoro.sleep(1)
        await flowcoro.sleep(1)
        for _ in range(3):
            with flowcoro.CancelScope(deadline=2.5):
                await flowcoro.sleep_until(2.25)
        await flowcoro.sleep(10)
    assert scope.cancelled_caught and flowcoro.now() == 3
    await flowcoro.sleep(1)
    assert flowcoro.now() == 4


@run_in_kernel
async def test_a_deadline_that_passes_while_the_code_runs_is_seen_by_who_asks():
    """As in trio. There was no checkpoint, so nothing is raised."""
    clock = flowcoro.current_kernel().clock
    with flowcoro.move_on_after(1) as scope:
        assert not scope.cancel_called
        clock.advance(2)
        assert scope.cancel_called
    assert not scope.cancelled_caught


@run_in_kernel
async def test_a_deadline_that_passes_while_the_code_runs_cancels_at_one_of_the_next_checkpoints():
    clock = flowcoro.current_kernel().clock
    with flowcoro.move_on_after(1) as scope:
        clock.advance(2)
        for _ in range(flowcoro.STEPS_PER_POLL + 1):
            await flowcoro.checkpoint()
        pytest.fail("not reached")
    assert scope.cancelled_caught


def test_a_deadline_is_late_by_a_few_steps_at_most_however_long_they_take():
    steps = 0

    async def main():
        nonlocal steps
        for _ in range(1000):           # short steps first: the kernel must not infer that all are
            await flowcoro.checkpoint()
        with flowcoro.move_on_after(0.01):
            for _ in range(flowcoro.STEPS_PER_POLL):
                steps += 1
                time.sleep(0.005)
                await flowcoro.checkpoint()

    flowcoro.run(main())
    assert steps <= 16


# ---- timeout and move_on_after -----------------------------------------------------------------------------

@run_in_kernel
async def test_timeout_raises_timeout_error_which_says_how_long():
    with pytest.raises(TimeoutError, match="1.5") as caught:
        with flowcoro.timeout(1.5):
            await flowcoro.sleep(5)
    assert flowcoro.now() == 1.5
    assert isinstance(caught.value.__cause__, flowcoro.Cancelled)
    assert not await is_cancelled()


@run_in_kernel
async def test_what_is_done_in_time_is_not_disturbed():
    with flowcoro.timeout(2):
        await flowcoro.sleep(1)
    with flowcoro.move_on_after(2) as scope:
        await flowcoro.sleep(1)
    await flowcoro.sleep(10)
    assert not scope.cancelled_caught and flowcoro.now() == 12


@run_in_kernel
async def test_what_is_done_at_the_very_deadline_is_done_in_time():
    with flowcoro.timeout(1):
        await flowcoro.sleep(1)
    assert flowcoro.now() == 1
    assert not await is_cancelled()


@run_in_kernel
async def test_move_on_after_raises_nothing_and_says_so():
    with flowcoro.move_on_after(1) as scope:
        await flowcoro.sleep(5)
        pytest.fail("not reached")
    assert scope.cancelled_caught and flowcoro.now() == 1


@pytest.mark.parametrize("outer, inner, winner", [(1, 2, "outer"), (2, 1, "inner"), (1, 1, "outer")])
@run_in_kernel
async def test_of_nested_timeouts_that_expire_the_outermost_wins(outer, inner, winner):
    caught = None
    try:
        with flowcoro.timeout(outer):
            try:
                with flowcoro.timeout(inner):
                    await flowcoro.sleep(5)
            except TimeoutError:
                caught = "inner"
    except TimeoutError:
        caught = caught or "outer"
    assert caught == winner and flowcoro.now() == min(outer, inner)


@run_in_kernel
async def test_an_outer_timeout_that_expires_during_the_cleanup_of_an_inner_one_wins():
    reached = []
    with pytest.raises(TimeoutError, match=r"timeout\(2\)"):
        with flowcoro.timeout(2):
            try:
                with flowcoro.timeout(1):
                    try:
                        await flowcoro.sleep(10)
                    finally:
                        with flowcoro.CancelScope(shield=True):
                            await flowcoro.sleep(3)
            finally:
                reached.append(flowcoro.now())
    assert reached == [4]


@run_in_kernel
async def test_an_outer_cancel_wins_over_an_inner_timeout():
    with flowcoro.CancelScope() as outer:
        with flowcoro.timeout(0):
            outer.cancel()
            await flowcoro.checkpoint()
    assert outer.cancelled_caught


@run_in_kernel
async def test_a_timeout_of_zero_gives_up_at_the_first_checkpoint():
    for seconds in (0, 0.0, -0.0):
        reached = []
        with pytest.raises(TimeoutError):
            with flowcoro.timeout(seconds):
                reached.append("before")
                await flowcoro.sleep(0)
                reached.append("after")
        assert reached == ["before"]
    with flowcoro.move_on_after(0) as scope:
        await flowcoro.checkpoint()
    assert scope.cancelled_caught
    with flowcoro.timeout(0):
        pass


@run_in_kernel
async def test_a_timeout_of_infinity_never_comes():
    with flowcoro.timeout(math.inf) as scope:
        await flowcoro.sleep(1e9)
    assert scope.deadline == math.inf


@run_in_kernel
async def test_an_error_of_the_block_is_not_hidden_by_the_timeout():
    with pytest.raises(ZeroDivisionError):
        with flowcoro.timeout(1):
            try:
                await flowcoro.sleep(5)
            finally:
                raise ZeroDivisionError


@run_in_kernel
async def test_a_timeout_error_of_the_block_itself_passes_through():
    mine = TimeoutError("mine")
    with pytest.raises(TimeoutError) as caught:
        with flowcoro.timeout(1):
            raise mine
    assert caught.value is mine


@run_in_kernel
async def test_a_timeout_that_is_cancelled_by_hand_raises_no_timeout_error():
    with flowcoro.timeout(5) as scope:
        scope.cancel()
        await flowcoro.checkpoint()
    assert scope.cancelled_caught


@run_in_kernel
async def test_a_timeout_around_a_group_joins_the_tasks_before_it_raises():
    log = Log()

    async def child():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(2)
            log.append("child cleaned up")

    with pytest.raises(TimeoutError):
        with flowcoro.timeout(1):
            async with flowcoro.TaskGroup() as group:
                group.spawn(child())
    assert log == ["child cleaned up"] and flowcoro.now() == 3


@run_in_kernel
async def test_timeouts_in_a_loop_leave_nothing_in_the_heap():
    for _ in range(5000):
        with flowcoro.timeout(1e6):
            await flowcoro.checkpoint()
    for _ in range(5000):
        with flowcoro.timeout(1e6):
            await flowcoro.sleep(1)
    assert flowcoro.statistics()["timers"] < 200


@run_in_kernel
async def test_asyncio_timeouts_are_of_the_same_class():
    """So that `except TimeoutError` means the same in both."""
    with pytest.raises(asyncio.TimeoutError):
        with flowcoro.timeout(1):
            await flowcoro.sleep(2)


# ---- points of cancellation and of scheduling --------------------------------------------------------------

def filled(channel, items=10_000):
    for item in range(items):
        channel.send_nowait(item)
    return channel


async def promise_kept():
    promise = flowcoro.Promise()
    promise.set_result(1)
    return lambda: promise


async def event_set():
    event = flowcoro.Event()
    event.set()
    return event.wait


async def task_done():
    task = flowcoro.spawn(answer())
    await task
    return lambda: task


async def subscription_behind():
    broadcast = flowcoro.Broadcast(10_000)
    subscription = broadcast.subscribe()
    for item in range(9_999):
        broadcast.send_nowait(item)
    return subscription.receive


async def condition_true():
    condition = flowcoro.Condition()
    await condition.acquire()
    return lambda: condition.wait_for(lambda: True)


async def stop_asked():
    flowcoro.request_stop()
    return flowcoro.stop_requested


def locked_and_released(make):
    async def prepare():
        lock = make()

        async def use():
            async with lock:
                pass

        return use

    return prepare


def simply(function):
    async def prepare():
        return function
    return prepare


def on(make, operation):
    """The operation on one object that is made once."""
    async def prepare():
        thing = make()
        return lambda: operation(thing)
    return prepare


INF = math.inf

READY = {
    "checkpoint": simply(flowcoro.checkpoint),
    "sleep(0)": simply(lambda: flowcoro.sleep(0)),
    "sleep_until the past": simply(lambda: flowcoro.sleep_until(-1)),
    "Event.wait": event_set,
    "Promise": promise_kept,
    "Task": task_done,
    "Lock": locked_and_released(flowcoro.Lock),
    "RWLock.read": locked_and_released(lambda: flowcoro.RWLock().read),
    "RWLock.write": locked_and_released(lambda: flowcoro.RWLock().write),
    "Semaphore": locked_and_released(lambda: flowcoro.Semaphore(1)),
    "Condition": locked_and_released(flowcoro.Condition),
    "Condition.wait_for": condition_true,
    "Barrier of one": on(lambda: flowcoro.Barrier(1), lambda barrier: barrier.wait()),
    "Channel.send": on(lambda: flowcoro.Channel(INF), lambda channel: channel.send(1)),
    "Channel.receive": on(lambda: filled(flowcoro.Channel(INF)), lambda channel: channel.receive()),
    "async for": on(lambda: filled(flowcoro.Channel(INF)), lambda channel: anext(channel)),
    "select receive": on(lambda: filled(flowcoro.Channel(INF)), lambda channel: flowcoro.select(channel)),
    "select send": on(lambda: flowcoro.Channel(INF), lambda channel: flowcoro.select((channel, 1))),
    "Broadcast.send": on(lambda: flowcoro.Broadcast(1), lambda broadcast: broadcast.send(1)),
    "Subscription.receive": subscription_behind,
    "stop_requested": stop_asked,
}


@pytest.mark.parametrize("prepare", READY.values(), ids=READY)
@run_in_kernel
async def test_every_operation_is_a_point_of_cancellation_even_when_it_need_not_wait(prepare):
    operation = await prepare()
    await operation()
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        for _ in range(3):
            with pytest.raises(flowcoro.Cancelled):
                await operation()
        await operation()
    assert scope.cancelled_caught
    await operation()


@pytest.mark.parametrize("prepare", READY.values(), ids=READY)
@run_in_kernel(grace=math.inf)
async def test_every_operation_that_need_not_wait_lets_others_run_once_the_budget_is_used_up(prepare):
    operation = await prepare()
    turns = 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await flowcoro.checkpoint()

    task = flowcoro.spawn(other())
    for _ in range(10 * flowcoro.BUDGET):
        await operation()
    task.cancel()
    assert turns >= 5


@run_in_kernel
async def test_an_operation_that_need_not_wait_is_not_a_point_of_scheduling_each_time():
    channel = flowcoro.Channel(math.inf)
    others = []

    async def other():
        others.append("ran")

    await flowcoro.checkpoint()
    flowcoro.spawn(other())
    for _ in range(flowcoro.BUDGET // 4):
        await channel.send(1)
        await channel.receive()
    assert others == []
    await flowcoro.checkpoint()
    assert others == ["ran"]


async def cancel_while_parked(operation):
    task = flowcoro.spawn(operation)
    await wait_all_tasks_parked()
    assert task.state == "parked"
    task.cancel()
    with pytest.raises(flowcoro.TaskCancelled):
        await task


@run_in_kernel
async def test_every_operation_that_waits_is_cancelled_while_it_waits():
    async def in_held_lock(make):
        lock = make()
        async with lock:
            await cancel_while_parked(lock.acquire())

    await in_held_lock(flowcoro.Lock)
    await in_held_lock(lambda: flowcoro.Semaphore(1))
    rwlock = flowcoro.RWLock()
    async with rwlock.write:
        await cancel_while_parked(rwlock.read.acquire())
        await cancel_while_parked(rwlock.write.acquire())
    channel, full = flowcoro.Channel(), filled(flowcoro.Channel(1), 1)
    for waiting in (flowcoro.sleep(5), flowcoro.sleep(math.inf), flowcoro.sleep_until(1e9),
                    flowcoro.Event().wait(), flowcoro.Barrier(2).wait(), flowcoro.ParkingLot().park(),
                    channel.receive(), channel.send(1), full.send(2), flowcoro.select(channel, (full, 3)),
                    flowcoro.Broadcast(1).subscribe().receive(), awaiting(flowcoro.Promise()),
                    awaiting(flowcoro.spawn(flowcoro.sleep(math.inf))), flowcoro.stop_requested()):
        await cancel_while_parked(waiting)
    assert len(full) == 1 and full.statistics()["senders_waiting"] == 0


async def awaiting(awaitable):
    return await awaitable


# ---- delivered values --------------------------------------------------------------------------------------

def delivery(name):
    """(an operation that waits, a function that delivers its value, what it then returns)"""
    channel, promise, lot = flowcoro.Channel(), flowcoro.Promise(), flowcoro.ParkingLot()
    full, broadcast = filled(flowcoro.Channel(1), 1), flowcoro.Broadcast(1)
    if name == "receive":
        return channel.receive(), lambda: channel.send_nowait("value"), "value"
    if name == "send":
        return full.send("item"), full.receive_nowait, None
    if name == "select":
        selecting = flowcoro.select(flowcoro.Channel(), channel)
        return selecting, lambda: channel.send_nowait("value"), (1, "value")
    if name == "subscription":
        return broadcast.subscribe().receive(), lambda: broadcast.send_nowait("value"), "value"
    if name == "promise":
        return awaiting(promise), lambda: promise.set_result("value"), "value"
    assert name == "park"
    return lot.park(), lambda: lot.unpark(1, "value"), "value"


@pytest.mark.parametrize("name", ["receive", "send", "select", "subscription", "park", "promise"])
@pytest.mark.parametrize("cancel", ["task", "scope", "group"])
@run_in_kernel
async def test_a_delivered_value_is_not_lost_to_a_cancel_that_comes_after_it(name, cancel):
    operation, deliver, value = delivery(name)
    got = []
    scope = flowcoro.CancelScope()

    async def taker():
        with scope:
            got.append(await operation)
            await flowcoro.checkpoint()
            got.append("went on")

    async with flowcoro.TaskGroup() as group:
        task = group.spawn(taker())
        await wait_all_tasks_parked()
        deliver()
        {"task": task, "scope": scope, "group": group}[cancel].cancel()
    assert got == [value], "the value, and then the cancellation"


@pytest.mark.parametrize("name", ["receive", "send", "select", "subscription", "park"])
@run_in_kernel
async def test_a_cancel_that_comes_before_the_value_leaves_it_where_it_was(name):
    operation, deliver, _ = delivery(name)
    task = flowcoro.spawn(operation)
    await wait_all_tasks_parked()
    task.cancel()
    if name in ("receive", "select"):
        with pytest.raises(flowcoro.WouldBlock):
            deliver()
    elif name == "park":
        assert deliver() == 0
    else:
        deliver()
    with pytest.raises(flowcoro.TaskCancelled):
        await task


@run_in_kernel
async def test_a_sleep_that_is_over_is_over_though_a_cancel_comes_in_the_same_moment():
    log = Log()
    async with flowcoro.TaskGroup() as group:
        group.spawn(log.sleeper("first", 1))
        group.spawn(canceller(group, 1))
        group.spawn(log.sleeper("second", 1))
        group.spawn(log.sleeper("third", 2))
    assert log == ["first slept", "second slept", "third cancelled"]


async def canceller(target, seconds):
    await flowcoro.sleep(seconds)
    target.cancel()


@run_in_kernel
async def test_a_lock_that_was_handed_over_is_held_by_the_task_that_is_cancelled_afterwards():
    lock = flowcoro.Lock()
    held = []

    async def waiter():
        async with lock:
            held.append(lock.owner is flowcoro.current_task())
            await flowcoro.checkpoint()

    await lock.acquire()
    task = flowcoro.spawn(waiter())
    await wait_all_tasks_parked()
    lock.release()
    task.cancel()
    with pytest.raises(flowcoro.TaskCancelled):
        await task
    assert held == [True] and not lock.locked()


@run_in_kernel
async def test_what_when_any_has_received_is_not_lost_to_a_cancel_that_comes_after_it():
    channel = flowcoro.Channel(1)
    got = []

    async def taker():
        got.append(await flowcoro.when_any(channel.receive(), flowcoro.sleep(math.inf)))

    task = flowcoro.spawn(taker())
    await wait_all_tasks_parked()
    channel.send_nowait("value")
    for _ in range(2):              # the receiver has it, and the group is about to end
        await flowcoro.checkpoint()
    task.cancel()
    with contextlib.suppress(flowcoro.TaskCancelled):
        await task
    assert got == [(0, "value")]


# ---- sleeping ----------------------------------------------------------------------------------------------

@run_in_kernel
async def test_sleepers_wake_in_the_order_of_their_deadlines_and_equal_ones_first_come_first_served():
    generator = random.Random(1)
    woken = []

    async def sleeper(seconds, number):
        await flowcoro.sleep(seconds)
        woken.append((seconds, number))

    async with flowcoro.TaskGroup() as group:
        for number in range(500):
            group.spawn(sleeper(generator.randrange(1, 50), number))
    assert woken == sorted(woken) and len(woken) == 500


@run_in_kernel
async def test_sleep_of_zero_is_a_checkpoint_that_takes_no_time():
    others = []
    flowcoro.spawn(asyncify(others.append, "ran"))
    await flowcoro.sleep(0)
    assert others == ["ran"] and flowcoro.now() == 0


async def asyncify(function, *args):
    return function(*args)


@run_in_kernel
async def test_sleep_until_waits_for_a_point_in_time_and_not_for_one_that_has_passed():
    await flowcoro.sleep_until(3)
    assert flowcoro.now() == 3
    await flowcoro.sleep_until(2)
    await flowcoro.sleep_until(3)
    await flowcoro.sleep_until(-math.inf)
    assert flowcoro.now() == 3


@run_in_kernel
async def test_sleep_of_infinity_waits_to_be_cancelled():
    with flowcoro.move_on_after(1e12) as scope:
        await flowcoro.sleep(math.inf)
    assert scope.cancelled_caught
    with flowcoro.move_on_after(1) as scope:
        await flowcoro.sleep_until(math.inf)
    assert scope.cancelled_caught


@run_in_kernel
async def test_a_cancelled_sleep_does_not_wake_the_next_one_early():
    with flowcoro.move_on_after(1):
        await flowcoro.sleep(2)
    await flowcoro.sleep(5)
    assert flowcoro.now() == 6
    task = flowcoro.current_task()
    with flowcoro.move_on_after(1):
        await flowcoro.sleep(2)
    assert task.state == "running"
    await flowcoro.sleep(0.5)
    assert flowcoro.now() == 7.5


@run_in_kernel
async def test_a_sleepers_old_deadline_does_not_wake_it_from_something_else():
    event = flowcoro.Event()
    with flowcoro.move_on_after(1):
        await flowcoro.sleep(2)
    flowcoro.spawn(set_after(event, 10))
    await event.wait()
    assert flowcoro.now() == 11


async def set_after(event, seconds):
    await flowcoro.sleep(seconds)
    event.set()


# ---- when_all, when_any, as_completed ----------------------------------------------------------------------

@run_in_kernel
async def test_when_all_gives_the_results_in_order_after_the_slowest():
    assert await flowcoro.when_all(after(3, "a"), after(1, "b"), after(2, "c")) == ["a", "b", "c"]
    assert flowcoro.now() == 3
    assert await flowcoro.when_all() == []


@run_in_kernel
async def test_an_error_in_when_all_cancels_and_joins_the_others():
    log = Log()
    with pytest.raises(ExceptionGroup) as caught:
        await flowcoro.when_all(log.sleeper("a"), after(1, ValueError("b")), log.sleeper("c"))
    assert [repr(error) for error in caught.value.exceptions] == ["ValueError('b')"]
    assert log == ["a cancelled", "c cancelled"]


@run_in_kernel
async def test_a_cancelled_when_all_cancels_its_tasks():
    log = Log()
    with flowcoro.move_on_after(1) as scope:
        await flowcoro.when_all(log.sleeper("a"), log.sleeper("b"))
    assert scope.cancelled_caught and log == ["a cancelled", "b cancelled"]


@run_in_kernel
async def test_when_any_gives_the_first_result_and_cancels_and_joins_the_others():
    log = Log()

    async def slow_to_go():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(1)
            log.append("joined")

    assert await flowcoro.when_any(slow_to_go(), after(1, "quick"), log.sleeper("slow", 2)) == (1, "quick")
    assert sorted(log) == ["joined", "slow cancelled"] and flowcoro.now() == 2


@run_in_kernel
async def test_of_two_that_end_together_when_any_takes_the_one_that_ended_first():
    assert await flowcoro.when_any(answer(), answer()) == (0, 42)
    assert await flowcoro.when_any(after(1, "a"), after(1, "b")) == (0, "a")


@run_in_kernel
async def test_an_error_of_the_first_to_end_leaves_when_any():
    log = Log()
    with pytest.raises(ExceptionGroup) as caught:
        await flowcoro.when_any(log.sleeper("a"), after(1, ValueError("b")))
    assert [repr(error) for error in caught.value.exceptions] == ["ValueError('b')"]
    assert log == ["a cancelled"]


@run_in_kernel
async def test_when_any_of_nothing_is_refused():
    with pytest.raises(ValueError, match="for ever"):
        await flowcoro.when_any()


@run_in_kernel
async def test_a_cancelled_when_any_cancels_its_tasks():
    log = Log()
    with flowcoro.move_on_after(1) as scope:
        await flowcoro.when_any(log.sleeper("a"), log.sleeper("b"))
    assert scope.cancelled_caught and log == ["a cancelled", "b cancelled"]


@pytest.mark.parametrize("combine", [flowcoro.when_all, flowcoro.when_any])
@run_in_kernel
async def test_a_coroutine_that_cancels_its_own_task_is_told_by_task_cancelled(combine):
    async def gives_up():
        flowcoro.current_task().cancel()
        await flowcoro.checkpoint()

    with pytest.raises(flowcoro.TaskCancelled):
        await combine(gives_up())


@run_in_kernel
async def test_when_any_and_when_all_nest():
    value = await flowcoro.when_all(flowcoro.when_any(after(1, "a"), after(2, "b")),
                                    flowcoro.when_all(after(3, "c"), after(1, "d")))
    assert value == [(0, "a"), ["c", "d"]]


@run_in_kernel
async def test_as_completed_gives_the_tasks_as_they_end():
    results = []
    async for task in flowcoro.as_completed(after(3, "a"), after(1, "b"), after(2, "c")):
        results.append((task.result(), flowcoro.now()))
    assert results == [("b", 1), ("c", 2), ("a", 3)]


@run_in_kernel
async def test_as_completed_of_nothing_is_an_empty_loop():
    async for _ in flowcoro.as_completed():
        pytest.fail("not reached")


@run_in_kernel
async def test_as_completed_gives_failed_tasks_too_and_goes_on():
    outcomes = []
    async for task in flowcoro.as_completed(after(2, "good"), after(1, ValueError("bad"))):
        outcomes.append(repr(task.exception() or task.result()))
    assert outcomes == ["ValueError('bad')", "'good'"]


@run_in_kernel
async def test_leaving_the_loop_of_as_completed_early_cancels_the_rest():
    log = Log()
    async for task in flowcoro.as_completed(after(1, "first"), log.sleeper("second"), log.sleeper("third")):
        assert task.result() == "first"
        break
    del task
    gc.collect()
    await flowcoro.sleep(1)
    assert log == ["second cancelled", "third cancelled"]


@run_in_kernel
async def test_a_cancelled_loop_of_as_completed_cancels_and_joins_its_tasks():
    log = Log()

    async def slow_to_go():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(2)
            log.append("joined")

    with flowcoro.move_on_after(1) as scope:
        async for _ in flowcoro.as_completed(slow_to_go(), log.sleeper("other")):
            pytest.fail("not reached")
    assert scope.cancelled_caught
    assert log == ["other cancelled", "joined"] and flowcoro.now() == 3


@run_in_kernel
async def test_as_completed_finds_tasks_that_ended_while_its_loop_was_busy():
    count = 0
    async for task in flowcoro.as_completed(*[after(number, number) for number in (1, 2, 3)]):
        assert task.result() == count + 1
        count += 1
        await flowcoro.sleep(5)
    assert count == 3


@run_in_kernel
async def test_several_tasks_may_share_one_as_completed():
    seen = []

    async def consumer(completed):
        async for task in completed:
            seen.append(task.result())
            await flowcoro.sleep(0.1)

    completed = flowcoro.as_completed(*[after(number, number) for number in (1, 2, 3, 4)])
    async with flowcoro.TaskGroup() as group:
        for _ in range(3):
            group.spawn(consumer(completed))
    assert sorted(seen) == [1, 2, 3, 4]


# ---- in every order ----------------------------------------------------------------------------------------

def test_the_rules_of_groups_hold_in_any_order_of_tasks():
    async def main():
        log = Log()
        with pytest.raises(ExceptionGroup) as caught:
            async with flowcoro.TaskGroup() as group:
                group.spawn(nested_sleeper(log))
                group.spawn(after(1, ValueError("x")))
                group.spawn(log.sleeper("sibling"))
                with flowcoro.CancelScope(shield=True):
                    await flowcoro.sleep(2)
        assert [repr(error) for error in errors_of(caught.value)] == ["ValueError('x')"]
        assert sorted(log) == ["nested cancelled", "sibling cancelled"]
        assert flowcoro.now() == 2

    assert explore(main, seeds=range(30)) == 30


def test_the_winner_of_a_timeout_is_the_same_in_any_order_of_tasks():
    async def main():
        log = Log()
        with pytest.raises(TimeoutError, match=r"timeout\(2\)"):
            with flowcoro.timeout(2):
                async with flowcoro.TaskGroup() as group:
                    for number in range(5):
                        group.spawn(log.sleeper("early", 1))
                        group.spawn(log.sleeper("late", 3))
                    with flowcoro.timeout(2):
                        await flowcoro.sleep(5)
        assert log == ["early slept"] * 5 + ["late cancelled"] * 5

    assert explore(main, seeds=range(30)) == 30


# ---- scopes that are never left ----------------------------------------------------------------------------

def outcome_of(main):
    """What run() returned or raised for `main`, which does not leave its scopes."""
    try:
        outcome = flowcoro.run(main())
    except flowcoro.TaskCancelled as error:
        outcome = error
    gc.collect()
    return outcome


def test_an_error_in_a_group_around_a_yield_is_reported_though_nobody_leaves_the_group(reports):
    async def fails():
        raise ValueError("lost?")

    async def generator():
        async with flowcoro.TaskGroup() as group:
            group.spawn(fails())
            yield 1

    async def main():
        async for _ in generator():
            await flowcoro.sleep(10)

    outcome = outcome_of(main)
    assert isinstance(outcome, flowcoro.TaskCancelled)
    assert "ValueError('lost?')" in [repr(error) for _, error in reports]
    assert any("async generator yielded inside" in str(error) for _, error in reports)


def test_the_tasks_of_a_group_that_is_never_left_are_cancelled_and_joined(reports):
    log = []

    async def child():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(0)
            log.append("cleaned up")

    async def main():
        group = flowcoro.TaskGroup()
        await group.__aenter__()
        group.spawn(child())
        await flowcoro.checkpoint()
        return "result"

    outcome = outcome_of(main)
    assert outcome == "result" and log == ["cleaned up"]
    assert ["never left" in str(error) for _, error in reports] == [True]


@run_in_kernel
async def test_an_error_of_a_child_is_not_lost_when_the_scope_of_its_group_is_left_out_of_order(reports):
    async def numbers():
        with flowcoro.timeout(10):
            yield 1

    async def fails():
        raise ValueError("important")

    generator = numbers()
    with pytest.raises(ExceptionGroup) as caught:
        async with flowcoro.TaskGroup() as group:
            async for _ in generator:
                break
            group.spawn(fails())
    assert sorted(type(error).__name__ for error in caught.value.exceptions) == ["RuntimeError", "ValueError"]


async def shielded():
    with flowcoro.CancelScope(shield=True):
        yield 1


async def enter(generator):
    async for _ in generator:
        break


@run_in_kernel
async def test_an_error_on_its_way_to_a_task_is_not_lost_when_another_task_leaves_its_shield():
    channel, generator = flowcoro.Channel(), shielded()

    async def receive():
        await enter(generator)
        with pytest.raises(flowcoro.EndOfChannel):
            await channel.receive()
        return "told"

    task = flowcoro.spawn(receive())
    await wait_all_tasks_parked()
    channel.close()
    await generator.aclose()
    assert await task == "told"


@run_in_kernel
async def test_a_task_that_was_cancelled_behind_a_shield_is_told_when_another_task_leaves_the_shield():
    generator = shielded()

    async def wait():
        await enter(generator)
        await flowcoro.sleep(math.inf)

    task = flowcoro.spawn(wait())
    await wait_all_tasks_parked()
    task.cancel()
    await wait_all_tasks_parked()
    assert not task.done()
    await generator.aclose()
    with flowcoro.timeout(1), pytest.raises(flowcoro.TaskCancelled):
        await task


# ---- what a shield hides ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("raises", [False, True])
@run_in_kernel
async def test_a_shielded_scope_catches_its_own_cancellation_in_a_cancelled_region(raises):
    log = []
    with flowcoro.move_on_after(1) as outer:
        try:
            await flowcoro.sleep(10)
        finally:
            bounded = flowcoro.timeout(2) if raises else flowcoro.move_on_after(2)
            bounded.shield = True
            try:
                with bounded:
                    await flowcoro.sleep(10)
            except TimeoutError:
                log.append("timeout")
            log.append(flowcoro.now())
            with pytest.raises(flowcoro.Cancelled):
                await flowcoro.checkpoint()
    assert bounded.cancelled_caught and outer.cancelled_caught
    assert log == (["timeout", 3.0] if raises else [3.0])


@run_in_kernel
async def test_a_group_with_a_shield_ends_by_its_own_cancel_in_a_cancelled_region():
    with flowcoro.CancelScope() as outer:
        outer.cancel()
        async with flowcoro.TaskGroup() as group:
            group.scope.shield = True
            group.spawn(flowcoro.sleep(10))
            await flowcoro.sleep(1)
            group.cancel()
        done = flowcoro.now()
        await flowcoro.checkpoint()
    assert done == 1 and outer.cancelled_caught


@pytest.mark.parametrize("seconds", [None, "1", [], object()])
@pytest.mark.parametrize("function", [flowcoro.timeout, flowcoro.move_on_after, flowcoro.sleep])
def test_what_is_no_number_of_seconds_is_refused_by_name(function, seconds):
    async def main():
        with pytest.raises(TypeError, match=rf"{function.__name__}\(.*\): give a number of seconds; math.inf waits for ever"):
            awaited = function(seconds)
            if function is flowcoro.sleep:
                await awaited

    run(main())


def test_a_decimal_that_is_no_number_is_refused_as_nan_is():
    with pytest.raises(ValueError, match="seconds must be 0 or more"):
        flowcoro.timeout(decimal.Decimal("nan"))


@pytest.mark.parametrize("handled", [False, True])
def test_a_group_in_a_generator_that_is_left_early_lets_the_run_end(handled, reports):
    async def numbers():
        async with flowcoro.TaskGroup() as group:
            group.spawn(flowcoro.sleep(100))
            yield 1
            yield 2

    async def main():
        async for _ in numbers():
            break
        await flowcoro.sleep(0.01)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: None) if handled else None     # then nobody sees a Deadlock
    try:
        with pytest.raises(flowcoro.TaskCancelled):
            flowcoro.run(main())
    finally:
        if handled:
            signal.signal(signal.SIGUSR1, before)
    assert ["never left" in str(error) for _, error in reports] == [True]


@pytest.mark.parametrize("deadline, error", [("1", TypeError), (None, TypeError), ([], TypeError), (math.nan, ValueError),
                                             (decimal.Decimal("nan"), ValueError)])
def test_what_is_no_deadline_is_refused_with_its_value_and_the_remedy(deadline, error):
    async def main():
        with pytest.raises(error, match="the deadline of a CancelScope is .*; give seconds as of now"):
            flowcoro.CancelScope(deadline=deadline)
        scope = flowcoro.CancelScope()
        with pytest.raises(error, match="the deadline of a CancelScope is .*; give seconds as of now"):
            scope.deadline = deadline
        with pytest.raises(error, match=r"sleep_until\(\) got .*; give seconds as of now"):
            await flowcoro.sleep_until(deadline)

    run(main())


@pytest.mark.parametrize("options, error, words", [
    ({"grace": "x"}, TypeError, "grace=.*give a number of seconds"),
    ({"grace": decimal.Decimal("nan")}, ValueError, "grace=.*0 or more"),
    ({"grace": -1}, ValueError, "grace=.*0 or more"), ({"clock": 3}, TypeError, "clock=3: give an object with now")])
def test_options_of_run_that_make_no_sense_are_refused_by_name(options, error, words):
    with pytest.raises(error, match=words):
        flowcoro.run(flowcoro.sleep(0), **options)


@run_in_kernel
async def test_a_scope_that_is_left_without_having_been_entered_says_so():
    scope = flowcoro.CancelScope()
    with pytest.raises(RuntimeError, match="not entered, or a second time"):
        scope.__exit__(None, None, None)
    with scope:
        pass
    with pytest.raises(RuntimeError, match="not entered, or a second time"):
        scope.__exit__(None, None, None)


@pytest.mark.parametrize("options, said", [({"seed": []}, "seed=[]: give an int"), ({"clock": VirtualClock}, "give an object")])
def test_a_seed_or_clock_that_is_none_is_refused_by_name(options, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        flowcoro.run(answer(), **options)


@run_in_kernel
async def test_a_scope_whose_block_has_not_begun_shows_its_seconds():
    scope = flowcoro.move_on_after(5)
    assert repr(scope) == "<CancelScope of 5 s>" and scope.deadline == math.inf
    with scope:
        assert repr(scope) == f"<CancelScope deadline={scope.deadline:.3f}>"
