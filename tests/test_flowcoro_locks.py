"""Lock, RWLock, Event, Condition, Semaphore, Barrier, and the ParkingLot that all of them are made of.

What each does step by step; test_flowcoro_models.py compares them with lists in random programs.
"""

import contextlib
import copy
import math
import pickle
import re
import sys

import pytest

import flowcoro
import flowcoro_testing
from conftest import parked
from flowcoro_testing import run_in_kernel, wait_all_tasks_parked

# All that one task can hold at a time, with acquire(), acquire_nowait(), release() and `async with`.
exclusive = pytest.mark.parametrize("make", [
    pytest.param(flowcoro.Lock, id="Lock"),
    pytest.param(lambda: flowcoro.Semaphore(1), id="Semaphore"),
    pytest.param(lambda: flowcoro.RWLock().write, id="RWLock.write"),
    pytest.param(flowcoro.Condition, id="Condition"),
])


def is_free(lock):
    """Whether one of the above could be acquired at once."""
    if isinstance(lock, flowcoro.Condition):
        return lock.statistics()["lock"]["owner"] is None
    try:
        lock.acquire_nowait()
    except flowcoro.WouldBlock:
        return False
    lock.release()
    return True


async def hold(lock, log, name, seconds=0):
    """Acquire, say so, wait in the lock, release."""
    async with lock:
        log.append(name)
        await flowcoro.sleep(seconds)


# ---- what all exclusive locks have in common ---------------------------------------------------------------

@exclusive
@run_in_kernel(seed=1)
async def test_lock_admits_one_task_at_a_time(make):
    lock, inside, most = make(), 0, 0

    async def work():
        nonlocal inside, most
        for _ in range(5):
            async with lock:
                inside += 1
                most = max(most, inside)
                await flowcoro.checkpoint()
                inside -= 1

    await flowcoro.when_all(*(work() for _ in range(10)))
    assert most == 1
    assert is_free(lock)


@exclusive
@run_in_kernel
async def test_lock_is_handed_over_in_the_order_of_arrival(make):
    lock, log = make(), []
    async with flowcoro.TaskGroup() as group:
        async with lock:
            await parked(group, *(hold(lock, log, name) for name in "abcd"))
    assert log == list("abcd")


@exclusive
@run_in_kernel
async def test_lock_that_is_released_and_acquired_at_once_goes_to_who_waited(make):
    lock, log = make(), []
    async with flowcoro.TaskGroup() as group:
        await lock.acquire()
        await parked(group, hold(lock, log, "who waited"))
        lock.release()
        assert not is_free(lock), "it was handed over, so there was no moment at which it could be snatched"
        await hold(lock, log, "who came back")
    assert log == ["who waited", "who came back"]


@exclusive
@run_in_kernel
async def test_cancelled_acquire_does_not_eat_the_lock(make):
    lock, log = make(), []
    async with flowcoro.TaskGroup() as group:
        async with lock:
            first, second, third = await parked(group, *(hold(lock, log, name) for name in "abc"))
            second.cancel()
            first.cancel()
    assert log == ["c"]
    assert is_free(lock)


@exclusive
@run_in_kernel
async def test_acquire_cancelled_in_the_step_of_the_release_passes_the_lock_on(make):
    lock, log = make(), []
    async with flowcoro.TaskGroup() as group:
        await lock.acquire()
        first, second = await parked(group, hold(lock, log, "a"), hold(lock, log, "b"))
        first.cancel()
        lock.release()
    assert log == ["b"]
    assert is_free(lock)


@exclusive
@run_in_kernel
async def test_acquire_cancelled_after_the_hand_over_has_the_lock_and_is_cancelled_at_its_next_checkpoint(make):
    lock, log = make(), []
    async with flowcoro.TaskGroup() as group:
        await lock.acquire()
        first, second = await parked(group, hold(lock, log, "a"), hold(lock, log, "b"))
        lock.release()
        first.cancel()
    assert log == ["a", "b"]
    assert first.cancelled() and not second.cancelled()
    assert is_free(lock)


@exclusive
@run_in_kernel
async def test_acquire_that_times_out_leaves_the_line(make):
    lock, log = make(), []
    async with flowcoro.TaskGroup() as group:
        group.spawn(hold(lock, log, "long", seconds=10))
        await wait_all_tasks_parked()
        with pytest.raises(TimeoutError):
            with flowcoro.timeout(1):
                await lock.acquire()
    assert is_free(lock)


@exclusive
@run_in_kernel
async def test_acquire_of_a_free_lock_in_a_cancelled_scope_is_cancelled_and_leaves_it_free(make):
    lock = make()
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        await lock.acquire()
        pytest.fail("acquire() is a point of cancellation also when it need not wait")
    assert scope.cancelled_caught and is_free(lock)


@exclusive
@run_in_kernel
async def test_lock_is_free_after_its_holder_and_all_who_waited_were_cancelled(make):
    lock, log = make(), []
    async with flowcoro.TaskGroup() as group:
        await parked(group, *(hold(lock, log, name, seconds=math.inf) for name in "abcd"))
        group.cancel()
    assert log == ["a"]
    assert is_free(lock)


@exclusive
@run_in_kernel
async def test_lock_is_released_when_the_block_fails(make):
    lock = make()
    with pytest.raises(ZeroDivisionError):
        async with lock:
            1 / 0
    assert is_free(lock)


@exclusive
@run_in_kernel
async def test_loop_over_a_free_lock_does_not_starve_the_others(make):
    lock, turns = make(), 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await flowcoro.checkpoint()

    task = flowcoro.spawn(other())
    for _ in range(2000):
        await lock.acquire()
        lock.release()
    task.cancel()
    assert turns >= 10


@pytest.mark.parametrize("make", [flowcoro.Lock, lambda: flowcoro.Semaphore(1), lambda: flowcoro.RWLock().write],
                         ids=["Lock", "Semaphore", "RWLock.write"])
@run_in_kernel
async def test_acquire_nowait_acquires_at_once_or_raises_would_block(make):
    lock = make()
    async with flowcoro.TaskGroup() as group:
        lock.acquire_nowait()
        waiter, = await parked(group, lock.acquire())
        lock.release()
        with pytest.raises(flowcoro.WouldBlock):
            lock.acquire_nowait()
        await waiter


# ---- Lock --------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_only_the_holder_may_release_a_lock():
    lock = flowcoro.Lock()
    with pytest.raises(RuntimeError, match="cannot release"):
        lock.release()
    async with flowcoro.TaskGroup() as group:
        holder, = await parked(group, hold(lock, [], "holder", seconds=1))
        with pytest.raises(RuntimeError, match="cannot release"):
            lock.release()
        assert lock.owner is holder


@run_in_kernel
async def test_lock_is_not_reentrant_and_says_so():
    lock = flowcoro.Lock()
    async with lock:
        with pytest.raises(RuntimeError, match="not reentrant"):
            await lock.acquire()
        with pytest.raises(RuntimeError, match="not reentrant"):
            lock.acquire_nowait()
        assert lock.owner is flowcoro.current_task()
    assert not lock.locked()


@run_in_kernel
async def test_lock_statistics():
    lock = flowcoro.Lock()
    assert lock.statistics() == {"owner": None, "tasks_waiting": 0}
    async with flowcoro.TaskGroup() as group:
        async with lock:
            await parked(group, hold(lock, [], "a"), hold(lock, [], "b"))
            assert lock.locked()
            assert lock.statistics() == {"owner": flowcoro.current_task(), "tasks_waiting": 2}


def test_deadlock_report_names_the_circle_of_those_who_wait_for_each_others_locks():
    async def take(first, second):
        async with first:
            await flowcoro.checkpoint()
            async with second:
                pass

    async def main():
        a, b = flowcoro.Lock(), flowcoro.Lock()
        async with flowcoro.TaskGroup() as group:
            group.spawn(take(a, b), name="left")
            group.spawn(take(b, a), name="right")

    with pytest.raises(flowcoro.Deadlock, match="in a circle: left waits for right, right waits for left"):
        flowcoro.run(main())


# ---- RWLock ------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_readers_share_and_a_writer_is_alone():
    rwlock, log = flowcoro.RWLock(), []
    async with flowcoro.TaskGroup() as group:
        await parked(group, hold(rwlock.read, log, "r1", 5), hold(rwlock.read, log, "r2", 5))
        assert log == ["r1", "r2"]
        await parked(group, hold(rwlock.write, log, "w", 5))
        assert log == ["r1", "r2"]
        await flowcoro.sleep(6)
        assert log == ["r1", "r2", "w"]
        with pytest.raises(flowcoro.WouldBlock):
            rwlock.read.acquire_nowait()


@run_in_kernel
async def test_reader_that_comes_after_a_waiting_writer_waits_behind_it():
    rwlock, log = flowcoro.RWLock(), []

    async def enter(side, name):
        async with side:
            log.append((name, flowcoro.now()))
            await flowcoro.sleep(1)

    async with flowcoro.TaskGroup() as group:
        await parked(group, *(enter(side, name) for side, name in [
            (rwlock.read, "r0"), (rwlock.write, "w1"), (rwlock.read, "r2"), (rwlock.read, "r3"), (rwlock.write, "w4"),
            (rwlock.read, "r5")]))
        with pytest.raises(flowcoro.WouldBlock):
            rwlock.read.acquire_nowait()
    assert log == [("r0", 0), ("w1", 1), ("r2", 2), ("r3", 2), ("w4", 3), ("r5", 4)]


@run_in_kernel
async def test_writer_that_gives_up_lets_the_readers_behind_it_in():
    rwlock, log = flowcoro.RWLock(), []
    async with flowcoro.TaskGroup() as group:
        async with rwlock.read:
            writer, reader = await parked(group, hold(rwlock.write, log, "w"), hold(rwlock.read, log, "r"))
            writer.cancel()
            await reader
    assert log == ["r"]


@run_in_kernel
async def test_when_writer_and_reader_behind_it_are_cancelled_together_nothing_stays_held():
    rwlock = flowcoro.RWLock()
    async with flowcoro.TaskGroup() as group:
        async with rwlock.read:
            await parked(group, hold(rwlock.write, [], "w"), hold(rwlock.read, [], "r"))
            group.cancel()
    assert rwlock.statistics() == {"readers": 0, "writer": None, "tasks_waiting": 0}


@run_in_kernel
async def test_readers_that_keep_coming_do_not_starve_a_writer():
    rwlock, log = flowcoro.RWLock(), []

    async def read_for_ever(offset):
        await flowcoro.sleep(offset)
        while True:
            async with rwlock.read:
                await flowcoro.sleep(2)

    async with flowcoro.TaskGroup() as group:
        group.spawn(read_for_ever(0))
        group.spawn(read_for_ever(1))
        await flowcoro.sleep(10)
        with flowcoro.timeout(5):
            await hold(rwlock.write, log, "w")
        group.cancel()
    assert log == ["w"]


@run_in_kernel
async def test_rwlock_is_not_reentrant_and_only_a_holder_of_the_side_releases_it():
    rwlock = flowcoro.RWLock()
    with pytest.raises(RuntimeError):
        rwlock.read.release()
    async with rwlock.read:
        for acquire_nowait in rwlock.read.acquire_nowait, rwlock.write.acquire_nowait:
            with pytest.raises(RuntimeError, match="not reentrant"):
                acquire_nowait()
        with pytest.raises(RuntimeError, match="not reentrant"):
            await rwlock.write.acquire()
        with pytest.raises(RuntimeError, match="does not hold this side"):
            rwlock.write.release()
        assert rwlock.statistics() == {"readers": 1, "writer": None, "tasks_waiting": 0}
    async with rwlock.write:
        with pytest.raises(RuntimeError, match="does not hold this side"):
            rwlock.read.release()
        assert rwlock.statistics() == {"readers": 0, "writer": flowcoro.current_task(), "tasks_waiting": 0}


@run_in_kernel
async def test_dump_says_who_holds_the_rwlock_that_a_task_waits_for():
    rwlock = flowcoro.RWLock()
    async with flowcoro.TaskGroup() as group:
        group.spawn(hold(rwlock.read, [], "r", 1), name="reader")
        await wait_all_tasks_parked()
        group.spawn(hold(rwlock.write, [], "w"), name="writer")
        await wait_all_tasks_parked()
        assert "writer: parked: acquire a RWLock to write (for reader)" in flowcoro.dump_tasks()


# ---- Semaphore ---------------------------------------------------------------------------------------------

@run_in_kernel
async def test_semaphore_admits_as_many_as_it_has_permits_in_the_order_of_arrival():
    semaphore, log = flowcoro.Semaphore(2), []
    async with flowcoro.TaskGroup() as group:
        await parked(group, *(hold(semaphore, log, name, 1) for name in "abcd"))
        assert log == ["a", "b"]
        await flowcoro.sleep(1.5)
        assert log == ["a", "b", "c", "d"]


@run_in_kernel
async def test_any_task_may_release_a_semaphore_and_add_permits_that_way():
    semaphore = flowcoro.Semaphore(0)
    async with flowcoro.TaskGroup() as group:
        await parked(group, semaphore.acquire(), semaphore.acquire())
        for _ in range(3):
            semaphore.release()
    assert semaphore.value == 1


@run_in_kernel
async def test_semaphore_with_a_maximum_refuses_a_release_too_many():
    semaphore = flowcoro.Semaphore(1, max_value=2)
    semaphore.release()
    with pytest.raises(ValueError, match="released more often than acquired"):
        semaphore.release()
    assert semaphore.statistics() == {"value": 2, "max_value": 2, "tasks_waiting": 0}


@pytest.mark.parametrize("value, max_value", [(-1, None), (1.5, None), ("1", None), (True, None), (3, 2),
                                              (0, "2"), (1, 2.5), (0, True)])
def test_semaphore_of_nonsense_is_a_value_error(value, max_value):
    with pytest.raises(ValueError, match="Semaphore"):
        flowcoro.Semaphore(value, max_value=max_value)


@run_in_kernel
async def test_permit_released_twice_in_one_step_goes_past_the_cancelled_to_those_who_still_wait():
    semaphore, log = flowcoro.Semaphore(0), []

    async def take(name):
        await semaphore.acquire()
        log.append(name)

    async with flowcoro.TaskGroup() as group:
        tasks = await parked(group, *(take(name) for name in "abcd"))
        assert semaphore.statistics() == {"value": 0, "max_value": None, "tasks_waiting": 4}
        tasks[0].cancel()
        tasks[2].cancel()
        semaphore.release()
        semaphore.release()
    assert log == ["b", "d"]
    assert semaphore.value == 0


# ---- Event -------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_event_wakes_all_that_wait_and_lets_those_pass_who_come_later():
    event, log = flowcoro.Event(), []

    async def wait(name):
        await event.wait()
        log.append(name)

    async with flowcoro.TaskGroup() as group:
        await parked(group, wait("a"), wait("b"))
        assert event.statistics() == {"set": False, "tasks_waiting": 2} and not event.is_set()
        event.set()
        event.set()
        await wait("c")
    assert sorted(log) == ["a", "b", "c"]
    assert event.statistics() == {"set": True, "tasks_waiting": 0} and event.is_set()


@run_in_kernel
async def test_clear_stops_those_who_come_later_and_not_those_who_were_woken():
    event = flowcoro.Event()
    async with flowcoro.TaskGroup() as group:
        woken, = await parked(group, event.wait())
        event.set()
        event.clear()
        await woken
        with flowcoro.move_on_after(1) as scope:
            await event.wait()
        assert scope.cancelled_caught


@run_in_kernel
async def test_cancelled_wait_leaves_the_event():
    event = flowcoro.Event()
    async with flowcoro.TaskGroup() as group:
        first, second = await parked(group, event.wait(), event.wait())
        first.cancel()
        assert event.statistics()["tasks_waiting"] == 1
        event.set()
    assert first.cancelled() and not second.cancelled()


# ---- Barrier -----------------------------------------------------------------------------------------------

@run_in_kernel
async def test_barrier_opens_when_all_have_come_and_tells_each_its_order_of_arrival():
    barrier, log = flowcoro.Barrier(3), []

    async def come(name):
        log.append((name, await barrier.wait()))

    async with flowcoro.TaskGroup() as group:
        await parked(group, come("a"), come("b"))
        assert log == []
        assert barrier.statistics() == {"parties": 3, "tasks_waiting": 2}
        await come("c")
    assert sorted(log) == [("a", 0), ("b", 1), ("c", 2)]


@run_in_kernel(seed=3)
async def test_barrier_serves_round_after_round_and_nobody_is_a_round_ahead():
    barrier, rounds = flowcoro.Barrier(4), [0] * 4

    async def come(number):
        for _ in range(50):
            await barrier.wait()
            rounds[number] += 1
            assert max(rounds) - min(rounds) <= 1

    await flowcoro.when_all(*(come(number) for number in range(4)))
    assert rounds == [50] * 4 and barrier.statistics()["tasks_waiting"] == 0


@run_in_kernel
async def test_cancelled_party_is_counted_out_of_the_barrier():
    barrier = flowcoro.Barrier(2)
    async with flowcoro.TaskGroup() as group:
        gone, = await parked(group, barrier.wait())
        gone.cancel()
        second, = await parked(group, barrier.wait())
        assert await barrier.wait() == 1
        assert await second == 0


@run_in_kernel
async def test_party_cancelled_after_the_barrier_has_opened_is_through():
    barrier = flowcoro.Barrier(2)
    async with flowcoro.TaskGroup() as group:
        first, = await parked(group, barrier.wait())
        assert await barrier.wait() == 1
        first.cancel()
    assert first.result() == 0


@run_in_kernel
async def test_barrier_of_one_never_waits():
    assert await flowcoro.Barrier(1).wait() == 0


@pytest.mark.parametrize("parties", [0, -1, 1.5, True])
def test_barrier_of_nonsense_is_a_value_error(parties):
    with pytest.raises(ValueError, match="Barrier"):
        flowcoro.Barrier(parties)


# ---- Condition ---------------------------------------------------------------------------------------------

async def wait_for_notify(condition, log, name):
    async with condition:
        await condition.wait()
        log.append(name)


@run_in_kernel
async def test_notify_wakes_as_many_as_it_says_in_the_order_of_arrival():
    condition, log = flowcoro.Condition(), []
    async with flowcoro.TaskGroup() as group:
        await parked(group, *(wait_for_notify(condition, log, name) for name in "abcde"))
        for count, woken in [(1, "a"), (2, "abc"), (0, "abc")]:
            async with condition:
                condition.notify(count)
            await wait_all_tasks_parked()
            assert "".join(log) == woken
        async with condition:
            condition.notify_all()
    assert "".join(log) == "abcde"


@run_in_kernel
async def test_notified_task_waits_until_the_lock_is_free_and_then_holds_it():
    condition, log = flowcoro.Condition(), []
    async with flowcoro.TaskGroup() as group:
        waiter, = await parked(group, wait_for_notify(condition, log, "woken"))
        async with condition:
            condition.notify()
            await flowcoro.sleep(1)
            assert log == [] and waiter.state == "parked"
            assert condition.statistics() == {
                "tasks_waiting": 0, "lock": {"owner": flowcoro.current_task(), "tasks_waiting": 1}}
    assert log == ["woken"]


@run_in_kernel
async def test_cancelled_wait_is_raised_with_the_lock_held_and_leaves_the_notify_to_others():
    lock = flowcoro.Lock()
    condition, log = flowcoro.Condition(lock), []

    async def wait():
        async with condition:
            try:
                await condition.wait()
            finally:
                log.append(lock.owner is flowcoro.current_task())

    async with flowcoro.TaskGroup() as group:
        first, second = await parked(group, wait(), wait())
        first.cancel()
        async with condition:
            condition.notify()
    assert first.cancelled() and not second.cancelled()
    assert log == [True, True]
    assert not lock.locked()


@run_in_kernel
async def test_wait_cancelled_while_the_lock_is_held_gets_the_lock_first():
    lock = flowcoro.Lock()
    condition = flowcoro.Condition(lock)
    async with flowcoro.TaskGroup() as group:
        waiter, = await parked(group, wait_for_notify(condition, [], "never"))
        async with lock:
            waiter.cancel()
            await flowcoro.sleep(1)
            assert not waiter.done()
    assert waiter.cancelled() and not lock.locked()


@run_in_kernel
async def test_wait_cancelled_after_its_notify_returns_so_that_no_notify_is_lost():
    condition, log = flowcoro.Condition(), []

    async def wait():
        async with condition:
            await condition.wait()
            log.append("notified")
            await flowcoro.checkpoint()
            pytest.fail("the cancel comes at the next checkpoint")

    async with flowcoro.TaskGroup() as group:
        waiter, = await parked(group, wait())
        async with condition:
            condition.notify()
            waiter.cancel()
            await flowcoro.sleep(1)
            waiter.cancel()
    assert log == ["notified"] and waiter.cancelled()
    assert condition.statistics() == {"tasks_waiting": 0, "lock": {"owner": None, "tasks_waiting": 0}}


@run_in_kernel
async def test_wait_for_returns_what_the_predicate_returned_once_it_is_true():
    condition, items = flowcoro.Condition(), []

    async def take():
        async with condition:
            return await condition.wait_for(lambda: items and items.pop())

    async with flowcoro.TaskGroup() as group:
        first, second = await parked(group, take(), take())
        async with condition:
            condition.notify_all()          # in vain: both look and wait on
        await wait_all_tasks_parked()
        async with condition:
            items.append("item")
            condition.notify_all()
        await wait_all_tasks_parked()
        assert (first.done(), second.done()) == (True, False)
        async with condition:
            items.append("another")
            condition.notify()
    assert (first.result(), second.result()) == ("item", "another")


@run_in_kernel
async def test_conditions_that_share_a_lock_wake_their_own_tasks():
    lock, log = flowcoro.Lock(), []
    full, empty = flowcoro.Condition(lock), flowcoro.Condition(lock)
    async with flowcoro.TaskGroup() as group:
        await parked(group, wait_for_notify(full, log, "full"), wait_for_notify(empty, log, "empty"))
        async with lock:
            empty.notify_all()
        await wait_all_tasks_parked()
        assert log == ["empty"]
        async with full:
            full.notify()
    assert log == ["empty", "full"]


@run_in_kernel
async def test_wait_and_notify_without_the_lock_are_errors():
    condition = flowcoro.Condition()
    with pytest.raises(RuntimeError, match="without holding its lock"):
        await condition.wait()
    with pytest.raises(RuntimeError, match="without holding its lock"):
        condition.notify()
    async with flowcoro.TaskGroup() as group:
        await parked(group, hold(condition, [], "another task", 1))
        with pytest.raises(RuntimeError, match="without holding its lock"):
            condition.notify_all()
        with pytest.raises(RuntimeError):
            await condition.wait()
    with pytest.raises(TypeError, match="must be a flowcoro.Lock"):
        flowcoro.Condition(flowcoro.Semaphore(1))


@run_in_kernel
async def test_dump_says_who_holds_the_lock_that_a_notified_task_needs():
    condition = flowcoro.Condition()
    async with flowcoro.TaskGroup() as group:
        waiter, = await parked(group, wait_for_notify(condition, [], "a"))
        waiter.name, flowcoro.current_task().name = "waiter", "holder"
        async with condition:
            condition.notify()
            assert "waiter: parked: acquire the Lock of a Condition again (for holder)" in flowcoro.dump_tasks()


# ---- ParkingLot, park and reschedule -----------------------------------------------------------------------

@run_in_kernel
async def test_parking_lot_wakes_in_the_order_of_arrival_and_says_how_many():
    lot, log = flowcoro.ParkingLot("stand here"), []

    async def wait(name):
        log.append((name, await lot.park()))

    async with flowcoro.TaskGroup() as group:
        tasks = await parked(group, *(wait(name) for name in "abcde"))
        assert {task.park_reason for task in tasks} == {"stand here"}
        assert len(lot) == 5 and lot.statistics() == {"tasks_waiting": 5}
        assert lot.unpark(value=1) == 1
        assert lot.unpark(2, value=2) == 2
        await wait_all_tasks_parked()
        assert log == [("a", 1), ("b", 2), ("c", 2)]
        assert lot.unpark_all(3) == 2
        assert lot.unpark() == 0
    assert log[3:] == [("d", 3), ("e", 3)]


@run_in_kernel
async def test_parked_task_can_be_woken_with_an_error():
    lot = flowcoro.ParkingLot()
    async with flowcoro.TaskGroup() as group:
        async def wait():
            with pytest.raises(KeyError):
                await lot.park()

        await parked(group, wait())
        lot.unpark(error=KeyError("for you"))


@run_in_kernel
async def test_cancelled_task_leaves_the_lot_at_once_and_the_others_keep_their_places():
    lot, log = flowcoro.ParkingLot(), []

    async def wait(name):
        await lot.park()
        log.append(name)

    async with flowcoro.TaskGroup() as group:
        tasks = await parked(group, *(wait(name) for name in "abc"))
        tasks[1].cancel()
        assert len(lot) == 2
        lot.unpark(2)
    assert log == ["a", "c"]


@run_in_kernel
async def test_value_that_was_delivered_comes_before_the_cancel():
    lot, log = flowcoro.ParkingLot(), []

    async def wait():
        log.append(await lot.park())
        await flowcoro.checkpoint()
        log.append("went on")

    async with flowcoro.TaskGroup() as group:
        task, = await parked(group, wait())
        lot.unpark(value="delivered")
        task.cancel()
    assert log == ["delivered"] and task.cancelled()


@run_in_kernel
async def test_error_that_was_delivered_comes_before_the_cancel():
    lot, log = flowcoro.ParkingLot(), []

    async def wait():
        try:
            await lot.park()
        except KeyError:
            log.append("error")
        await flowcoro.checkpoint()
        log.append("went on")

    async with flowcoro.TaskGroup() as group:
        task, = await parked(group, wait())
        lot.unpark(error=KeyError())
        task.cancel()
    assert log == ["error"] and task.cancelled()


def test_value_delivered_to_a_task_whose_deadline_passes_before_it_runs_is_received():
    clock, log = flowcoro_testing.VirtualClock(), []

    async def wait(lot):
        with flowcoro.move_on_after(10) as scope:
            log.append(await lot.park())
            await flowcoro.checkpoint()
            log.append("went on")
        assert scope.cancelled_caught

    async def main():
        lot = flowcoro.ParkingLot()
        async with flowcoro.TaskGroup() as group:
            event = flowcoro.Event()
            for _ in range(500):            # a queue so long that the kernel looks at the time in the midst of it
                group.spawn(event.wait())
            await parked(group, wait(lot))
            event.set()
            lot.unpark(value="in time")
            clock.advance(20)

    flowcoro.run(main(), clock=clock)
    assert log == ["in time"]


@run_in_kernel
async def test_park_in_a_cancelled_scope_never_calls_the_park_function():
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        await flowcoro.park(lambda task: pytest.fail("a cancelled task must not be stored anywhere"))
    assert scope.cancelled_caught


@run_in_kernel
async def test_a_primitive_can_be_written_with_park_and_reschedule():
    place = []

    def park_here(task):
        task.park_reason = "wait in a place of my own"
        task.abort_function = lambda task: place.remove(task) is None
        place.append(task)

    first, second, third = await parked(flowcoro, *(flowcoro.park(park_here) for _ in range(3)))
    assert place == [first, second, third]
    assert first.park_reason == "wait in a place of my own"
    second.cancel()
    assert place == [first, third]
    flowcoro.reschedule(place.pop(0), "value")
    flowcoro.reschedule(place.pop(), error=KeyError("error"))
    assert await first == "value"
    with pytest.raises(flowcoro.TaskCancelled):
        await second
    with pytest.raises(KeyError):
        await third


@run_in_kernel
async def test_second_reschedule_of_one_park_is_an_error():
    ready = flowcoro.spawn(flowcoro.checkpoint())
    for awake in flowcoro.current_task(), ready:
        with pytest.raises(RuntimeError, match="is not parked"):
            flowcoro.reschedule(awake)
    lot = flowcoro.ParkingLot()
    task, = await parked(flowcoro, lot.park())
    lot.unpark(value="once")
    with pytest.raises(RuntimeError, match="is not parked"):
        flowcoro.reschedule(task, "twice")
    assert await task == "once"


@run_in_kernel
async def test_abort_function_that_says_too_late_leaves_the_task_to_its_waker():
    place = []

    def park_for_good(task):
        task.park_reason = "wait for something that cannot be undone"
        task.abort_function = lambda task: False
        place.append(task)

    async def wait():
        log.append(await flowcoro.park(park_for_good))
        await flowcoro.checkpoint()
        log.append("went on")

    log = []
    task, = await parked(flowcoro, wait())
    task.cancel()
    await wait_all_tasks_parked()
    assert task.state == "parked"
    flowcoro.reschedule(place.pop(), "done all the same")
    with pytest.raises(flowcoro.TaskCancelled):
        await task
    assert log == ["done all the same"]


@run_in_kernel
async def test_error_of_a_park_function_is_raised_in_the_task():
    def fail(task):
        raise KeyError("cannot park")

    with pytest.raises(KeyError, match="cannot park"):
        await flowcoro.park(fail)
    with pytest.raises(RuntimeError, match="abort_function"):
        await flowcoro.park(lambda task: None)
    await flowcoro.sleep(1)                 # and the task can park again


# ---- what all objects that tasks wait at have in common ----------------------------------------------------

async def every_kind():
    """One of each, inside of a kernel."""
    async def nothing():
        pass

    rwlock, broadcast = flowcoro.RWLock(), flowcoro.Broadcast(1)
    return [flowcoro.Lock(), rwlock, rwlock.read, rwlock.write, flowcoro.Event(), flowcoro.Condition(),
            flowcoro.Semaphore(3), flowcoro.Barrier(2), flowcoro.Channel(), broadcast, broadcast.subscribe(),
            flowcoro.Promise(), flowcoro.ParkingLot(), flowcoro.CancelScope(), flowcoro.TaskGroup(),
            flowcoro.spawn(nothing()), flowcoro.as_completed(nothing()), flowcoro.ObjectPool(list, 1),
            flowcoro.BufferPool(1, 1)]


@run_in_kernel
async def test_what_tasks_wait_at_can_be_neither_copied_nor_pickled():
    for thing in await every_kind():
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="can be neither copied nor pickled.*make a new one"):
                duplicate(thing)


@run_in_kernel
async def test_every_repr_says_what_state_the_thing_is_in():
    for thing in await every_kind():
        assert repr(thing).startswith("<") and " at 0x" not in repr(thing)
    lock, event, semaphore = flowcoro.Lock(), flowcoro.Event(), flowcoro.Semaphore(3, max_value=4)
    event.set()
    await semaphore.acquire()
    await lock.acquire()
    assert repr(lock) == f"<Lock owner={flowcoro.current_task()!r} tasks_waiting=0>"
    assert repr(event) == "<Event set=True tasks_waiting=0>"
    assert repr(semaphore) == "<Semaphore value=2 max_value=4 tasks_waiting=0>"
    assert repr(flowcoro.RWLock().read) == "<RWLock.read readers=0 writer=None tasks_waiting=0>"
    assert repr(flowcoro.Promise()) == "<Promise done=False tasks_waiting=0>"


# ---- at the end of the stack -------------------------------------------------------------------------------

def at_the_end_of_the_stack(operation):
    """Call operation() with no stack left, and then with more and more; whether it got through each time.

    Each time who wakes tasks is as if it had just been compiled: what CPython has adapted to its arguments needs less stack.
    """
    def dive(depth):
        if depth:
            return dive(depth - 1)
        return operation()

    outcomes = []
    codes = [(function, function.__code__) for function in (
        flowcoro.ParkingLot.unpark, flowcoro.Lock._hand_over, flowcoro.RWLock._admit, flowcoro.Channel._take,
        flowcoro._Case.commit, flowcoro._reschedule)]
    for depth in reversed(range(sys.getrecursionlimit() - 150, sys.getrecursionlimit())):
        for function, code in codes:
            function.__code__ = code.replace()
        try:
            dive(depth)
        except RecursionError:
            outcomes.append(False)
        else:
            outcomes.append(True)
    for function, code in codes:
        function.__code__ = code
    return outcomes


async def wakes_nobody_in_vain(waits, wake):
    """Tasks that wait for something, woken one at a time with no stack left: none is lost, and none is woken twice."""
    woken = []

    async def waiter(number):
        await waits(number)
        woken.append(number)

    async with flowcoro.TaskGroup() as group:
        tasks = await parked(group, *(waiter(number) for number in range(200)))
        outcomes = at_the_end_of_the_stack(wake)
        assert True in outcomes and False in outcomes
        await wait_all_tasks_parked()
        assert woken == list(range(sum(outcomes)))
        assert [task.done() for task in tasks].count(False) == 200 - len(woken)
        while len(woken) < 200:
            wake()
            await wait_all_tasks_parked()
    assert woken == list(range(200))


@run_in_kernel
async def test_unpark_that_finds_no_stack_leaves_the_task_where_it_was():
    lot = flowcoro.ParkingLot()
    await wakes_nobody_in_vain(lambda number: lot.park(), lot.unpark)


@pytest.mark.parametrize("workers", [2, 3])
def test_a_wake_up_that_finds_no_stack_loses_nobody_with_several_workers_either(workers):
    async def main():
        with flowcoro.timeout(30):
            for depth in range(120):
                event = flowcoro.Event()

                def dive(left):
                    return dive(left - 1) if left else event.set()

                async with flowcoro.TaskGroup() as group:
                    task = group.spawn(event.wait())
                    while task.state != "parked":
                        await flowcoro.sleep(0.0001)
                    try:
                        dive(sys.getrecursionlimit() - depth - frames())
                    except RecursionError:
                        event.set()

    flowcoro.run(main(), workers=workers)


@run_in_kernel
async def test_semaphore_release_that_finds_no_stack_has_released_nothing():
    semaphore = flowcoro.Semaphore(0)
    await wakes_nobody_in_vain(lambda number: semaphore.acquire(), semaphore.release)


@run_in_kernel
async def test_channel_operations_that_find_no_stack_have_done_nothing():
    channel = flowcoro.Channel()
    await wakes_nobody_in_vain(lambda number: channel.receive(), lambda: channel.send_nowait(1))
    await wakes_nobody_in_vain(lambda number: channel.send(number), channel.receive_nowait)
    await wakes_nobody_in_vain(lambda number: flowcoro.select(channel, flowcoro.Channel()), lambda: channel.send_nowait(1))
    await wakes_nobody_in_vain(lambda number: flowcoro.select((channel, number), flowcoro.Channel()), channel.receive_nowait)


@run_in_kernel
async def test_lock_release_that_finds_no_stack_leaves_the_lock_held():
    lock = flowcoro.Lock()
    events = []

    def release():
        if not lock._lot.holder is main:                # a property would be one call more
            return
        events.append("tries")
        lock.release()
        events.append("released")

    async def waiter():
        async with lock:
            events.append("acquired")

    main = flowcoro.current_task()
    async with flowcoro.TaskGroup() as group:
        await lock.acquire()
        await parked(group, waiter())
        at_the_end_of_the_stack(release)
    assert events.count("tries") > 1
    assert events[-3:] == ["tries", "released", "acquired"]
    assert not lock.locked()


@run_in_kernel
async def test_rwlock_release_that_finds_no_stack_lets_nobody_be_lost():
    lock = flowcoro.RWLock()
    events = []

    async def reader(number):
        async with lock.read:
            events.append(number)

    async with flowcoro.TaskGroup() as group:
        await lock.write.acquire()
        await parked(group, *(reader(number) for number in range(5)))

        def release():
            if me in lock.holder:
                lock.write.release()

        me = flowcoro.current_task()
        at_the_end_of_the_stack(release)
    assert events == list(range(5))
    assert lock.holder == ()


@run_in_kernel
async def test_event_set_and_channel_close_that_find_no_stack_can_be_done_again():
    event, channel, broadcast = flowcoro.Event(), flowcoro.Channel(), flowcoro.Broadcast(1)
    ended = []

    async def ends(wait):
        with contextlib.suppress(flowcoro.ClosedError):
            await wait
        ended.append(True)

    subscription = broadcast.subscribe()
    async with flowcoro.TaskGroup() as group:
        for wait in (event.wait, channel.receive, broadcast.subscribe().receive, subscription.receive):
            await parked(group, *(ends(wait()) for _ in range(3)))
        for operation in (event.set, channel.close, subscription.close, broadcast.close):
            at_the_end_of_the_stack(operation)
            operation()
    assert len(ended) == 12


@pytest.mark.parametrize("waits", ["sleep", "RWLock", "Lock", "scope"])
@run_in_kernel
async def test_cancel_that_finds_no_stack_is_done_by_the_loop_or_can_be_done_again(waits):
    lock, rwlock = flowcoro.Lock(), flowcoro.RWLock()
    await lock.acquire()
    await rwlock.read.acquire()
    scopes = []

    async def in_a_scope():
        with flowcoro.CancelScope() as scope:
            scopes.append(scope)
            await flowcoro.sleep(math.inf)

    async with flowcoro.TaskGroup() as group:
        for depth in range(60):
            task, = await parked(group, {"sleep": lambda: flowcoro.sleep(math.inf), "RWLock": rwlock.write.acquire,
                                         "Lock": lock.acquire, "scope": in_a_scope}[waits]())
            cancel = scopes[-1].cancel if scopes else task.cancel

            def dive(left):
                return dive(left - 1) if left else cancel()

            try:
                dive(sys.getrecursionlimit() - depth - frames())
            except RecursionError:
                cancel()
            await wait_all_tasks_parked()
            assert task.done()
    assert not lock.statistics()["tasks_waiting"] and not rwlock.statistics()["tasks_waiting"]


def frames():
    """How many there are, the caller's included."""
    frame, count = sys._getframe(1), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count


@run_in_kernel
async def test_select_that_is_woken_without_stack_waits_on_in_all_its_channels():
    for depth in range(60):
        first, second = flowcoro.Channel(), flowcoro.Channel()
        async with flowcoro.TaskGroup() as group:
            task, = await parked(group, flowcoro.select(first, second))

            def dive(left):
                return dive(left - 1) if left else first.send_nowait("first")

            try:
                dive(sys.getrecursionlimit() - depth - frames())
            except RecursionError:
                second.send_nowait("second")
                assert await task == (1, "second")
            else:
                assert await task == (0, "first")


@run_in_kernel
async def test_promise_that_is_set_without_stack_is_set_or_can_be_set_again():
    for depth in range(60):
        promise = flowcoro.Promise()
        async with flowcoro.TaskGroup() as group:

            async def wait():
                return await promise

            tasks = await parked(group, wait(), wait())

            def dive(left):
                return dive(left - 1) if left else promise.set_result("set")

            try:
                dive(sys.getrecursionlimit() - depth - frames())
            except RecursionError:
                if not promise.done():
                    promise.set_result("set")
            assert [await task for task in tasks] == ["set", "set"]


@run_in_kernel
async def test_broadcast_and_barrier_lose_nothing_where_the_stack_ends():
    for depth in range(60):
        broadcast, got = flowcoro.Broadcast(1), []
        subscription = broadcast.subscribe()

        async def send():
            for item in range(3):
                await broadcast.send(item)
            broadcast.close()

        def dive(left, operation):
            return dive(left - 1, operation) if left else got.append(operation())

        async with flowcoro.TaskGroup() as group:
            await parked(group, send())
            try:
                dive(sys.getrecursionlimit() - depth - frames(), subscription.receive_nowait)
            except RecursionError:
                pass
            async for item in subscription:
                got.append(item)
        assert got == [0, 1, 2]


@run_in_kernel
async def test_unpark_with_an_error_that_finds_no_stack_leaves_nothing_of_it():
    for depth in range(60):
        lot = flowcoro.ParkingLot()
        task = flowcoro.spawn(lot.park())
        await wait_all_tasks_parked()

        def dive(left):
            return dive(left - 1) if left else lot.unpark(error=KeyError("the error"))

        try:
            dive(sys.getrecursionlimit() - depth - frames())
        except RecursionError:
            lot.unpark(value="value")
            assert await task == "value"
        else:
            with pytest.raises(KeyError, match="the error"):
                await task


@run_in_kernel
async def test_a_coroutine_that_is_refused_where_the_stack_ends_can_be_spawned_elsewhere():
    async def answer():
        return 42

    for depth in range(60):
        coro = answer()

        def dive(left):
            return dive(left - 1) if left else flowcoro.spawn(coro)

        try:
            task = dive(sys.getrecursionlimit() - depth - frames())
        except RecursionError:
            task = flowcoro.spawn(coro)
        assert await task == 42


@pytest.mark.parametrize("body", ["waits for a child", "fails", "returns", "is cancelled"])
@run_in_kernel
async def test_a_group_that_can_begin_near_the_end_of_the_stack_can_end_there(body):
    async def dive(left, group):
        if left:
            return await dive(left - 1, group)
        async with group:
            begun.append(group)
            if body == "waits for a child":
                group.spawn(flowcoro.sleep(1))
            elif body == "fails":
                group.spawn(flowcoro.sleep(math.inf))
                raise KeyError("body")

    begun, outside = [], flowcoro.current_task()._scope
    for depth in range(60):
        group = flowcoro.TaskGroup()
        with flowcoro.CancelScope() as scope:
            if body == "is cancelled":
                scope.cancel()
            try:
                await dive(sys.getrecursionlimit() - depth - frames(), group)
            except (RecursionError, ExceptionGroup) as error:
                if group in begun:
                    assert body == "fails" and error.split(KeyError)[0]
        assert flowcoro.statistics()["tasks"]["alive"] == 1
        assert flowcoro.current_task()._scope is outside
    assert 10 < len(begun) < 60


@run_in_kernel
async def test_a_park_function_that_fails_after_it_has_stored_the_task_leaves_it_nowhere():
    lot = flowcoro.ParkingLot()

    def fails(task):
        lot._park(task)
        raise OSError("too late")

    with pytest.raises(OSError, match="too late"):
        await flowcoro.park(fails)
    assert len(lot) == 0


@run_in_kernel
async def test_a_condition_takes_any_lock_and_waits_only_for_plain_functions():
    class Counted(flowcoro.Lock):
        def __len__(self):
            return 0

    async def never():
        """An async function, of which each call is true."""

    lock = Counted()
    condition = flowcoro.Condition(lock)
    async with condition:
        assert lock.locked()
        for predicate in never, 5:
            with pytest.raises(TypeError, match=r"wait_for\(\) takes a plain function"):
                await condition.wait_for(predicate)
        for count in -1, 1.5, math.nan, "1", True:
            with pytest.raises(ValueError, match=r"notify\(.*an int from 0 up"):
                condition.notify(count)
        condition.notify(0)


@run_in_kernel
async def test_what_is_no_number_of_tasks_is_no_count_for_unpark():
    for count in "x", 1.5, None:
        with pytest.raises(TypeError, match=re.escape(f"unpark({count!r})")):
            flowcoro.ParkingLot().unpark(count)
