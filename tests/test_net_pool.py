"""ConnectionPool: who gets which connection and when, what a cancel leaves behind, how a pool ends."""

import concurrent.futures
import contextvars
import gc
import itertools
import math
import random
import re
import sys
import threading
import types

import pytest

import flowcoro
import flowcoro_net
from flowcoro_net import ConnectionPool
from flowcoro_testing import VirtualClock, explore, run_in_kernel, wait_all_tasks_parked

from conftest import parked


class Connection:
    """One that knows whether it is open, and complains when two use it."""

    def __init__(self, maker, number):
        self.maker, self.number, self.closed, self.user = maker, number, False, None

    def close(self):
        assert not self.closed, "closed twice"
        self.closed = True
        with self.maker.lock:
            self.maker.open.remove(self)

    async def use(self, seconds=None):
        assert self.user is None and not self.closed
        self.user = flowcoro.current_task()
        await (flowcoro.checkpoint() if seconds is None else flowcoro.sleep(seconds))
        assert self.user is flowcoro.current_task()
        self.user = None

    def __repr__(self):
        return f"<Connection {self.number}>"


class Maker:
    """A factory: `seconds` for each connect, `errors` to raise first; knows how many there are and were at once."""

    def __init__(self, seconds=None, errors=()):
        self.seconds, self.errors = seconds, list(errors)
        self.made = self.connecting = self.most_connecting = self.most_open = 0
        self.open = []
        self.lock = threading.Lock()

    async def __call__(self):
        self.connecting += 1
        self.most_connecting = max(self.most_connecting, self.connecting)
        try:
            await (flowcoro.checkpoint() if self.seconds is None else flowcoro.sleep(self.seconds))
        finally:
            self.connecting -= 1
        with self.lock:                     # several workers
            error = self.errors.pop(0) if self.errors else None
            if error is not None:
                raise error
            connection = Connection(self, self.made)
            self.made += 1
            self.open.append(connection)
            self.most_open = max(self.most_open, len(self.open))
        return connection


async def borrow(pool, seconds, into=None):
    """Acquire, use for so long, return; the number of the connection is appended to `into`."""
    async with pool.acquire() as connection:
        if into is not None:
            into.append(connection.number)
        await connection.use(seconds)
        return connection


def at_rest(pool, idle=None):
    """Nobody has or wants anything; and so many are idle."""
    numbers = pool.statistics()
    assert {name: numbers[name] for name in ("in_use", "connecting", "closing", "waiting")} == {
        "in_use": 0, "connecting": 0, "closing": 0, "waiting": 0}
    assert idle is None or numbers["idle"] == idle
    assert numbers["created"] == numbers["idle"] + sum(numbers["closed"].values())
    return True


def tasks_alive():
    return flowcoro.statistics()["tasks"]["alive"]


# ---- borrowing and returning ------------------------------------------------------------------------------------

@run_in_kernel
async def test_a_returned_connection_is_lent_again():
    maker = Maker()
    async with ConnectionPool(maker) as pool:
        async with pool.acquire() as first:
            assert pool.statistics()["in_use"] == 1
        async with pool.acquire() as second:
            assert second is first
        assert maker.made == 1 and at_rest(pool, idle=1)
    assert not maker.open and at_rest(pool, idle=0)


@run_in_kernel
async def test_a_connection_can_be_acquired_and_released_by_hand():
    maker = Maker()
    async with ConnectionPool(maker) as pool:
        connection = await pool.acquire()
        pool.release(connection)
        assert await pool.acquire() is connection
        pool.discard(connection)
        assert connection.closed and pool.statistics()["closed"] == {"discarded": 1} and at_rest(pool, idle=0)


@run_in_kernel
async def test_the_last_returned_is_lent_first():
    async with ConnectionPool(Maker()) as pool:
        connections = [await pool.acquire() for _ in range(3)]
        for connection in connections:
            pool.release(connection)
        assert [(await pool.acquire()).number for _ in range(3)] == [2, 1, 0]
        for connection in connections:
            pool.release(connection)


@run_in_kernel
async def test_a_returned_connection_goes_to_who_has_waited_longest_and_nobody_can_come_first():
    pool, order = ConnectionPool(Maker(), max_connections=1), []
    connection = await pool.acquire()

    async def waiter(name):
        async with pool.acquire():
            order.append(name)
            await flowcoro.checkpoint()

    async with flowcoro.TaskGroup() as group:
        await parked(group, waiter("a"), waiter("b"), waiter("c"))
        assert pool.statistics()["waiting"] == 3
        pool.release(connection)
        async with pool.acquire():      # comes at once, and still after those who waited
            order.append("late")
    assert order == ["a", "b", "c", "late"] and at_rest(pool, idle=1)
    await pool.close()


@run_in_kernel
async def test_there_are_never_more_than_max_connections():
    maker = Maker(seconds=1)
    async with ConnectionPool(maker, max_connections=3) as pool:
        async with flowcoro.TaskGroup() as group:
            for _ in range(20):
                group.spawn(borrow(pool, 1))
        assert maker.made == maker.most_open == 3
        # 20 loans of one second, three at a time, after the connects
        assert flowcoro.now() == 1 + 7


@run_in_kernel
async def test_no_more_than_max_connecting_connect_at_once():
    maker = Maker(seconds=1)
    async with ConnectionPool(maker, max_connections=10, max_connecting=2) as pool:
        async with flowcoro.TaskGroup() as group:
            for _ in range(6):
                group.spawn(borrow(pool, 100))
        assert (maker.most_connecting, maker.made) == (2, 6) and flowcoro.now() == 103


@run_in_kernel
async def test_a_failed_connect_is_the_error_of_the_one_who_made_it_and_the_next_one_tries_its_own():
    maker = Maker(seconds=1, errors=[OSError("first"), None, OSError("third")])
    pool, outcomes = ConnectionPool(maker, max_connections=5, max_connecting=1), []

    async def borrower(name):
        try:
            await borrow(pool, 10)
            outcomes.append((name, "done"))
        except OSError as error:
            outcomes.append((name, str(error)))

    async with flowcoro.TaskGroup() as group:
        await parked(group, *(borrower(name) for name in "abc"))
    assert outcomes == [("a", "first"), ("c", "third"), ("b", "done")]
    assert pool.statistics()["connects_failed"] == 2 and at_rest(pool, idle=1)
    await pool.close()


@pytest.mark.parametrize("limits", [{"max_connections": 1}, {"max_connecting": 1}, {"max_connections": 2, "max_connecting": 1}])
@run_in_kernel
async def test_no_waiter_is_stuck_when_all_connects_fail(limits):
    pool, failed = ConnectionPool(Maker(seconds=1, errors=[OSError()] * 20), **limits), []

    async def borrower(name):
        with pytest.raises(OSError):
            await pool.acquire()
        failed.append(name)

    async with flowcoro.TaskGroup() as group:
        await parked(group, *(borrower(name) for name in range(20)))
    assert failed == list(range(20)) and at_rest(pool, idle=0)


@run_in_kernel
async def test_a_connection_that_comes_back_is_lent_while_connects_hang():
    maker = Maker()
    pool = ConnectionPool(maker, max_connections=2)
    connection = await pool.acquire()
    maker.seconds = 1000
    async with flowcoro.TaskGroup() as group:
        connecting, waiting = await parked(group, borrow(pool, None), borrow(pool, None))
        pool.release(connection)
        assert await waiting is connection
        connecting.cancel()
    assert at_rest(pool, idle=1)
    await pool.close()


@run_in_kernel
async def test_acquire_timeout_bounds_the_wait_and_the_connect():
    maker = Maker(seconds=10)
    pool = ConnectionPool(maker, max_connections=1, acquire_timeout=5)
    with pytest.raises(TimeoutError):
        await pool.acquire()
    assert flowcoro.now() == 5 and at_rest(pool)
    connection = await pool.acquire(timeout=11)
    for seconds in 0.5, 0:
        with pytest.raises(TimeoutError, match=f"no connection within {seconds} seconds"):
            await pool.acquire(timeout=seconds)
    pool.release(connection)
    assert await pool.acquire(timeout=0) is connection      # it need not wait
    pool.release(connection)
    await pool.close()


@run_in_kernel
async def test_acquire_with_a_timeout_of_none_waits_without_a_limit():
    pool = ConnectionPool(Maker(seconds=10), acquire_timeout=5)
    pool.release(await pool.acquire(timeout=None))
    assert flowcoro.now() == 10
    await pool.close()


async def never(*_):
    await flowcoro.sleep(math.inf)


@pytest.mark.parametrize("seconds, settings, before, said", [
    (None, {}, 1, "it waited for one to be returned; of max_connections=1 there were 1 in use, 0 connecting, 0 closing, and 1 "
     "others waited. Return them sooner, or give the pool a larger max_connections or acquire_timeout"),
    (100, {}, 0, "it has been connecting for 5 seconds; of max_connections=1 there were 0 in use, 1 connecting, 0 closing, and 1 "
     "others waited. See whether the other side can be reached, or give the pool a larger acquire_timeout"),
    (100, {"max_connections": 3, "max_connecting": 1}, 1, "it waited for its turn to connect, with max_connecting=1; of "
     "max_connections=3 there were 0 in use, 1 connecting, 0 closing, and 1 others waited. See why connects take so long, "
     "or give the pool a larger max_connecting or acquire_timeout"),
    (None, {"validate": never}, None, "validate() has not answered for 5 seconds; of max_connections=1 there were 1 in use, 0 "
     "connecting, 0 closing, and 1 others waited. Give it a timeout of its own after which it returns False: then another "
     "connection is tried"),
    (None, {"validate": lambda connection: False, "close": never, "close_timeout": 100}, None, "it waited for one to be closed; "
     "of max_connections=1 there were 0 in use, 0 connecting, 1 closing, and 1 others waited. See why that takes so long, "
     "or give the pool a smaller close_timeout or a larger max_connections"),
])
@run_in_kernel
async def test_a_timeout_of_acquire_says_what_it_was_at_and_what_helps(seconds, settings, before, said):
    """before: how many have come first and stay; None: one that has returned its connection. One more waits behind."""
    pool = ConnectionPool(Maker(seconds), **{"max_connections": 1, "acquire_timeout": None, **settings})
    async with flowcoro.TaskGroup() as group:
        if before is None:
            await borrow(pool, None)
            await flowcoro.sleep(1)
        elif before:
            await parked(group, borrow(pool, 1000))
        late = pool.acquire(timeout=5)
        told, _ = await parked(group, outcome(late), borrow(pool, None))
        assert await told == f"no connection within 5 seconds: {said}"
        group.cancel()
    await pool.close(timeout=0)


async def outcome(acquire):
    """What it says when it is too late."""
    with pytest.raises(TimeoutError) as caught:
        await acquire
    return str(caught.value)


@run_in_kernel
async def test_what_acquire_returns_serves_once():
    pool = ConnectionPool(Maker(), max_connections=1, acquire_timeout=5)
    acquire = pool.acquire()
    pool.release(await acquire)
    with pytest.raises(RuntimeError, match=r"is awaited, or entered by `async with`, once; call pool.acquire\(\) again"):
        await acquire
    with pytest.raises(RuntimeError, match="once"):
        async with acquire:
            pass
    acquire = pool.acquire()
    async with acquire:
        with pytest.raises(RuntimeError, match="once"):
            await acquire
        with pytest.raises(RuntimeError, match="once"):
            async with acquire:
                pass
        late = pool.acquire(timeout=1)
        for error in TimeoutError, RuntimeError:        # also one that has failed
            with pytest.raises(error):
                await late
    assert at_rest(pool, idle=1)
    await pool.close()


@run_in_kernel
async def test_a_timeout_around_is_told_from_the_pools_own():
    pool = ConnectionPool(Maker(seconds=10), acquire_timeout=5)
    with flowcoro.move_on_after(1) as scope:
        await pool.acquire()
    assert scope.cancelled_caught and at_rest(pool)
    with pytest.raises(TimeoutError, match=r"timeout\(2\)"):
        with flowcoro.timeout(2):
            await pool.acquire()
    assert at_rest(pool)


@run_in_kernel
async def test_acquire_is_a_point_of_cancellation_also_when_it_need_not_wait():
    pool = ConnectionPool(Maker())
    await borrow(pool, None)
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        await pool.acquire()
    assert scope.cancelled_caught and at_rest(pool, idle=1)
    await pool.close()


@run_in_kernel
async def test_a_loop_of_acquires_lets_others_run():
    ran = []

    async def other():
        ran.append(True)

    async with ConnectionPool(Maker()) as pool:
        await borrow(pool, None)
        await wait_all_tasks_parked()
        async with flowcoro.TaskGroup() as group:
            group.spawn(other())
            for _ in range(2 * flowcoro.BUDGET):
                async with pool.acquire():
                    pass
            assert ran


@run_in_kernel
async def test_what_is_returned_twice_or_belongs_elsewhere_is_refused():
    pool, other = ConnectionPool(Maker()), ConnectionPool(Maker())
    connection = await pool.acquire()
    with pytest.raises(flowcoro.PoolError, match="returned twice, or belongs to another one"):
        other.release(connection)
    pool.release(connection)
    for method in (pool.release, pool.discard):
        with pytest.raises(flowcoro.PoolError, match="returned twice"):
            method(connection)
    assert at_rest(pool, idle=1)
    await pool.close()


@run_in_kernel
async def test_a_connection_may_be_returned_inside_its_block():
    async with ConnectionPool(Maker(), max_connections=1) as pool:
        async with pool.acquire() as connection:
            pool.release(connection)
            async with pool.acquire() as again:     # a new loan of the same one, which the outer block's end leaves alone
                assert again is connection
                pool.release(again)
                borrowed = await pool.acquire()
            assert pool.statistics()["in_use"] == 1
        assert pool.statistics()["in_use"] == 1
        pool.release(borrowed)
        async with pool.acquire() as connection:
            pool.discard(connection)
        assert at_rest(pool, idle=0)


def test_what_grows_old_at_the_last_moment_before_a_wait_is_closed_and_its_place_taken():
    clock, closed = VirtualClock(), []

    def close(connection):
        closed.append(connection.number)
        connection.close()
        if len(closed) == 1:                # between the first look of acquire() and the one as it is about to wait
            pool.release(lent)
            pool.set_max_connections(1)
            clock.advance(100)

    async def main():
        nonlocal pool, lent
        pool = ConnectionPool(Maker(), max_connections=2, idle_timeout=10, close=close)
        lent = await pool.acquire()
        await borrow(pool, None)
        clock.advance(11)
        assert (await borrow(pool, None)).number == 2 and closed == [1, 0]
        await pool.close()

    pool = lent = None
    flowcoro.run(main(), clock=clock)


# ---- broken ones ------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_a_block_left_by_an_error_or_a_cancel_leaves_a_connection_that_is_not_used_again():
    maker = Maker()
    async with ConnectionPool(maker, max_connections=1) as pool:
        with pytest.raises(ValueError):
            async with pool.acquire() as first:
                raise ValueError
        assert first.closed
        with flowcoro.move_on_after(1):
            async with pool.acquire() as second:
                await flowcoro.sleep(2)
        assert second.closed and pool.statistics()["closed"] == {"broken": 2}
        async with pool.acquire() as third:
            third.close()                   # by the borrower, who has seen its end
            third.close = lambda: None
        assert (await pool.acquire()).number == 3
        pool.discard(maker.open[-1])


@run_in_kernel
async def test_reusable_decides_what_is_lent_again():
    asked = []

    def reusable(connection, error):
        asked.append(error)
        return not isinstance(error, OSError)

    async with ConnectionPool(Maker(), reusable=reusable) as pool:
        for error in (ValueError(), OSError(), None):
            try:
                async with pool.acquire() as connection:
                    if error is not None:
                        raise error
            except type(error):
                pass
        assert [type(error) for error in asked] == [ValueError, OSError, type(None)]
        assert connection.number == 1 and pool.statistics()["closed"] == {"broken": 1}


@run_in_kernel
async def test_an_error_of_reusable_is_raised_and_the_connection_closed():
    def reusable(connection, error):
        raise ZeroDivisionError

    pool = ConnectionPool(Maker(), reusable=reusable)
    connection = await pool.acquire()
    with pytest.raises(ZeroDivisionError):
        pool.release(connection)
    assert connection.closed and at_rest(pool, idle=0)


@run_in_kernel
async def test_a_waiter_gets_a_new_connection_in_place_of_a_broken_one():
    maker = Maker()
    async with ConnectionPool(maker, max_connections=1) as pool:
        connection = await pool.acquire()
        async with flowcoro.TaskGroup() as group:
            waiter, = await parked(group, borrow(pool, 1))
            pool.discard(connection)
            assert (await waiter).number == 1
        assert maker.most_open == 1


# ---- growing old --------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_idle_connections_are_closed_after_idle_timeout_by_one_task_which_ends_then():
    maker = Maker()
    pool = ConnectionPool(maker, idle_timeout=60)
    alive = tasks_alive()
    connections = [await pool.acquire() for _ in range(5)]
    assert tasks_alive() == alive
    for connection in connections:
        pool.release(connection)
        await flowcoro.sleep(1)
    assert tasks_alive() == alive + 1
    await flowcoro.sleep(54)            # 59 since the first was returned
    assert len(maker.open) == 5
    await flowcoro.sleep(7)
    assert not maker.open and pool.statistics()["closed"] == {"idle": 5} and at_rest(pool, idle=0)
    assert tasks_alive() == alive


@run_in_kernel
async def test_an_overdue_connection_is_never_lent_though_the_sweep_may_be_late():
    for limit in ("idle_timeout", "max_lifetime"):
        pool = ConnectionPool(Maker(), **{limit: 10})
        first = await borrow(pool, None)
        await flowcoro.sleep(9.99)
        assert await borrow(pool, None) is first
        await flowcoro.sleep(0.02 if limit == "max_lifetime" else 10.02)
        assert await borrow(pool, None) is not first and first.closed
        await pool.close()


@run_in_kernel
async def test_a_lifetime_ends_on_return_too_and_those_made_together_do_not_end_together():
    pool = ConnectionPool(Maker(), max_lifetime=100, idle_timeout=None)
    connections = [await pool.acquire() for _ in range(10)]
    expires = sorted(entry.expires for entry in pool._books.lent.values())
    assert 95 <= expires[0] < 96 and 99 < expires[-1] <= 100 and len(set(expires)) == 10
    await flowcoro.sleep(100)
    for connection in connections:
        pool.release(connection)
    assert pool.statistics()["closed"] == {"lifetime": 10} and at_rest(pool, idle=0)


@run_in_kernel
async def test_the_sweep_closes_what_has_lived_for_long_whenever_it_was_returned():
    maker = Maker()
    pool = ConnectionPool(maker, max_lifetime=100, idle_timeout=None)
    old = await pool.acquire()
    await flowcoro.sleep(50)
    young = await pool.acquire()
    pool.release(young)
    await flowcoro.sleep(10)
    pool.release(old)
    await flowcoro.sleep(42)
    assert old.closed and not young.closed
    await flowcoro.sleep(50)
    assert young.closed and pool.statistics()["closed"] == {"lifetime": 2} and flowcoro.statistics()["timers"] <= 1


@run_in_kernel
async def test_idle_timeout_0_keeps_none_but_hands_over():
    maker = Maker()
    pool = ConnectionPool(maker, idle_timeout=0, max_connections=1)
    async with flowcoro.TaskGroup() as group:
        tasks = await parked(group, borrow(pool, 1), borrow(pool, 1))
    assert tasks[0].result() is tasks[1].result() and not maker.open and pool.statistics()["closed"] == {"idle": 1}


@run_in_kernel
async def test_set_idle_timeout_holds_at_once():
    maker = Maker()
    pool = ConnectionPool(maker, idle_timeout=None, max_lifetime=None)
    await borrow(pool, None)
    await flowcoro.sleep(1000)
    assert len(maker.open) == 1
    pool.set_idle_timeout(2000)
    await flowcoro.sleep(990)
    assert len(maker.open) == 1
    await flowcoro.sleep(20)
    assert not maker.open
    await borrow(pool, None)
    await flowcoro.sleep(10)
    pool.set_idle_timeout(5)
    assert not maker.open
    await borrow(pool, None)
    pool.set_idle_timeout(0)
    assert not maker.open and at_rest(pool, idle=0)


@run_in_kernel
async def test_many_that_grow_old_one_by_one_are_swept_together():
    steps = 0
    async with ConnectionPool(Maker(), max_connections=1000, idle_timeout=60) as pool:
        connections = [await pool.acquire() for _ in range(1000)]
        for connection in connections:
            pool.release(connection)
            await flowcoro.sleep(0.001)
        await flowcoro.sleep(58)
        steps = flowcoro.statistics()["steps"]
        await flowcoro.sleep(10)
        await flowcoro.checkpoint()
        assert at_rest(pool, idle=0) and flowcoro.statistics()["steps"] - steps < 20


# ---- validation ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("is_async", [False, True])
@run_in_kernel
async def test_a_connection_is_validated_only_after_it_was_idle_for_a_while(is_async):
    asked = []

    def validate(connection):
        asked.append(connection.number)
        return True

    async def validate_async(connection):
        await flowcoro.sleep(0.1)
        return validate(connection)

    async with ConnectionPool(Maker(), validate=validate_async if is_async else validate, validate_after=1) as pool:
        await borrow(pool, None)
        await borrow(pool, None)
        assert not asked
        await flowcoro.sleep(1.5)
        await borrow(pool, None)
        assert asked == [0]


@pytest.mark.parametrize("answer", [False, None, OSError()])
@run_in_kernel
async def test_an_invalid_connection_is_replaced_without_a_word(answer):
    async def validate(connection):
        await flowcoro.checkpoint()
        if isinstance(answer, Exception):
            raise answer
        return answer

    maker = Maker()
    async with ConnectionPool(maker, validate=validate, max_connections=2) as pool:
        for connection in [await pool.acquire() for _ in range(2)]:
            pool.release(connection)
        await flowcoro.sleep(1)
        assert (await borrow(pool, None)).number == 2       # both were asked, none was good
        await wait_all_tasks_parked()
        assert pool.statistics()["closed"] == {"invalid": 2} and maker.most_open == 2 and at_rest(pool, idle=1)


@run_in_kernel
async def test_who_was_given_an_invalid_connection_keeps_its_turn():
    answers, order = [False], []

    async def validate(connection):
        await flowcoro.sleep(1)
        return answers.pop(0) if answers else True

    pool = ConnectionPool(Maker(), validate=validate, validate_after=0.5, max_connections=1)
    await borrow(pool, None)
    await flowcoro.sleep(1)

    async def borrower(name):
        async with pool.acquire():
            order.append(name)

    async with flowcoro.TaskGroup() as group:
        await parked(group, *(borrower(name) for name in "abc"))
    assert order == ["a", "b", "c"] and at_rest(pool, idle=1)
    await pool.close()


@run_in_kernel
async def test_a_cancelled_validation_closes_what_nobody_knows_the_state_of():
    async def validate(connection):
        await flowcoro.sleep(10)

    maker = Maker()
    pool = ConnectionPool(maker, validate=validate, acquire_timeout=5)
    await borrow(pool, None)
    await flowcoro.sleep(1)
    with pytest.raises(TimeoutError):
        await pool.acquire()
    assert not maker.open and pool.statistics()["closed"] == {"interrupted": 1} and at_rest(pool)


# ---- changing it in use --------------------------------------------------------------------------------------------

@run_in_kernel
async def test_clear_drops_the_idle_now_and_what_is_lent_or_under_way_when_it_returns():
    maker = Maker()
    pool = ConnectionPool(maker)
    lent, idle = await pool.acquire(), await pool.acquire()
    pool.release(idle)
    maker.seconds = 1
    async with flowcoro.TaskGroup() as group:
        group.spawn(borrow(pool, 1))        # takes the idle one
        under_way, = await parked(group, borrow(pool, 1))
        pool.clear()
        assert not idle.closed and pool.statistics()["generation"] == 1
    assert idle.closed and under_way.result().closed and not lent.closed
    pool.release(lent)
    assert lent.closed and pool.statistics()["closed"] == {"cleared": 3}
    new = await borrow(pool, None)
    pool.clear()
    assert new.closed and at_rest(pool, idle=0)


@run_in_kernel
async def test_set_max_connections_lets_waiters_in_and_closes_what_is_too_much():
    maker = Maker()
    pool = ConnectionPool(maker, max_connections=1)
    async with flowcoro.TaskGroup() as group:
        await parked(group, *(borrow(pool, 10) for _ in range(4)))
        assert pool.statistics()["waiting"] == 3
        pool.set_max_connections(3)
        await wait_all_tasks_parked()
        assert (pool.statistics()["waiting"], pool.statistics()["in_use"]) == (1, 3)
        pool.set_max_connections(2)
    assert maker.most_open == 3 and pool.statistics()["closed"] == {"shrunk": 1} and at_rest(pool, idle=2)
    pool.set_max_connections(1)
    assert pool.statistics()["closed"] == {"shrunk": 2} and at_rest(pool, idle=1)
    await pool.close()


def test_a_pool_that_shrinks_closes_first_what_is_overdue_anyhow():
    clock = VirtualClock()

    async def main():
        async with ConnectionPool(Maker(), max_connections=2, max_lifetime=100, idle_timeout=None) as pool:
            old = await pool.acquire()
            await flowcoro.sleep(50)
            young = await pool.acquire()
            pool.release(young)
            pool.release(old)
            clock.advance(55)
            pool.set_max_connections(1)
            assert old.closed and not young.closed

    flowcoro.run(main(), clock=clock)


@run_in_kernel
async def test_what_is_being_closed_is_not_too_much_once_more():
    pool = ConnectionPool(slow(10), max_connections=4)
    connections = [await pool.acquire() for _ in range(4)]
    for connection in connections[:2]:
        pool.discard(connection)
    pool.set_max_connections(2)
    for connection in connections[2:]:
        pool.release(connection)
    assert pool.statistics()["idle"] == 2 and pool.statistics()["closing"] == 2
    await pool.close()


# ---- closing ------------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_close_waits_for_those_in_use_and_sends_the_waiters_away():
    maker = Maker()
    pool = ConnectionPool(maker, max_connections=1)
    async with flowcoro.TaskGroup() as group:
        holder, waiter, closer = await parked(group, borrow(pool, 10), refused(pool), pool.close())
        assert waiter.done() and not closer.done()
        with pytest.raises(flowcoro.ClosedError):
            await pool.acquire()
        await closer
        assert flowcoro.now() == 10 and holder.done() or holder.state == "ready"
    assert not maker.open and at_rest(pool)
    await pool.close()                  # twice is once


async def refused(pool):
    with pytest.raises(flowcoro.ClosedError):
        await pool.acquire()
    await flowcoro.checkpoint()
    if not pool._books.closed:
        await flowcoro.sleep(math.inf)


@run_in_kernel
async def test_close_cancels_connects_under_way():
    maker = Maker(seconds=1000)
    pool = ConnectionPool(maker)
    async with flowcoro.TaskGroup() as group:
        await parked(group, refused(pool))
        await pool.close()
    assert flowcoro.now() == 0 and maker.connecting == 0 and at_rest(pool)


@run_in_kernel
async def test_close_with_a_timeout_closes_what_is_in_use_when_that_is_over():
    maker = Maker()
    pool = ConnectionPool(maker)
    connection = await pool.acquire()
    idle = await pool.acquire()
    pool.release(idle)
    await pool.close(timeout=3)
    assert flowcoro.now() == 3 and connection.closed and not maker.open and at_rest(pool)
    pool.release(connection)            # no complaint: nobody could know
    pool.discard(connection)


@run_in_kernel
async def test_close_at_once_closes_under_the_borrowers_feet():
    maker = Maker()
    for close in (lambda pool: pool.close(timeout=0), None):
        pool = ConnectionPool(maker)
        async with pool.acquire() as connection:
            if close is None:
                pool.close_nowait()
            else:
                await close(pool)
            assert connection.closed
        assert flowcoro.now() == 0 and not maker.open and at_rest(pool)


@run_in_kernel
async def test_a_cancelled_close_leaves_a_closed_pool_whose_connections_are_closed_as_they_return():
    maker = Maker()
    pool = ConnectionPool(maker)
    connection = await pool.acquire()
    with flowcoro.move_on_after(1) as scope:
        await pool.close()
    assert scope.cancelled_caught and not connection.closed
    with pytest.raises(flowcoro.ClosedError):
        await pool.acquire()
    pool.release(connection)
    assert connection.closed and at_rest(pool)


@run_in_kernel
async def test_a_block_of_the_pool_left_by_an_error_closes_at_once():
    maker = Maker()
    with pytest.raises(ValueError):
        async with ConnectionPool(maker) as pool:
            await pool.acquire()
            raise ValueError
    assert not maker.open and at_rest(pool) and flowcoro.now() == 0


@run_in_kernel
async def test_a_grant_that_the_close_overtakes_is_not_lent():
    maker = Maker()
    pool = ConnectionPool(maker, max_connections=1)
    connection = await pool.acquire()
    async with flowcoro.TaskGroup() as group:
        await parked(group, refused(pool))
        pool.release(connection)        # it is the waiter's now
        pool._books.shut(at_once=False)
    assert not maker.open and at_rest(pool)


@run_in_kernel
async def test_a_grant_whose_connection_was_closed_at_once_is_not_validated():
    asked = []
    pool = ConnectionPool(Maker(), max_connections=1, validate=asked.append, validate_after=0)
    connection = await pool.acquire()
    async with flowcoro.TaskGroup() as group:
        await parked(group, refused(pool))
        pool.release(connection)
        pool.close_nowait()
    assert asked == [] and connection.closed and at_rest(pool)


class Slow(Connection):
    """Its close takes seconds."""

    seconds = 1.0

    async def close(self):
        await flowcoro.sleep(self.seconds)
        super().close()


def slow(seconds):
    class SlowMaker(Maker):
        async def __call__(self):
            connection = await super().__call__()
            connection.__class__ = Slow
            connection.seconds = seconds
            return connection
    return SlowMaker()


@run_in_kernel
async def test_a_connection_that_closes_slowly_counts_until_it_is_closed():
    maker = slow(2)
    pool = ConnectionPool(maker, max_connections=1)
    pool.discard(await pool.acquire())
    assert pool.statistics()["closing"] == 1
    await borrow(pool, None)
    assert flowcoro.now() == 2 and maker.most_open == 1
    await pool.close()
    assert flowcoro.now() == 4 and not maker.open and at_rest(pool)


@run_in_kernel
async def test_a_close_that_hangs_is_cancelled_and_counted():
    pool = ConnectionPool(slow(1000), max_connections=1, close_timeout=3)
    pool.discard(await pool.acquire())
    await borrow(pool, None)
    assert flowcoro.now() == 3 and pool.statistics()["closes_failed"] == 1
    await pool.close()
    assert flowcoro.now() == 6 and at_rest(pool)


@pytest.mark.parametrize("is_async", [False, True])
@run_in_kernel
async def test_an_error_in_close_harms_nobody(is_async):
    def fail(connection):
        connection.close()
        raise OSError

    async def fail_async(connection):
        fail(connection)

    maker = Maker()
    pool = ConnectionPool(maker, max_connections=1, close=fail_async if is_async else fail)
    for _ in range(3):
        pool.discard(await pool.acquire())
    await pool.close()
    assert pool.statistics()["closes_failed"] == 3 and maker.made == 3 and not maker.open and at_rest(pool)


# ---- the keeper, the end of the run, deadlocks ---------------------------------------------------------------------

@pytest.mark.parametrize("limits", [{}, {"idle_timeout": None, "max_lifetime": None}])
@pytest.mark.parametrize("make", [Maker, lambda: slow(1)])
def test_what_is_idle_when_the_run_ends_is_closed_then(make, limits):
    maker = make()

    async def main():
        nonlocal pool
        pool = ConnectionPool(maker, **limits)
        await borrow(pool, None)

    for run in range(2):                # and a pool serves the next kernel
        pool = None
        flowcoro.run(main(), clock=VirtualClock())
        assert not maker.open and pool.statistics()["closed"] == {"run_ended": 1} and at_rest(pool)


def test_a_pool_serves_one_kernel_after_the_other():
    maker = Maker()
    pool = ConnectionPool(maker)
    for run in range(3):
        connection = flowcoro.run(borrow(pool, None), clock=VirtualClock())
        assert connection.number == run and not maker.open and at_rest(pool)


def test_what_is_returned_in_the_cleanup_at_the_end_of_the_run_is_closed_too():
    maker = Maker()
    pool = ConnectionPool(maker, reusable=lambda connection, error: True)

    async def holder():
        async with pool.acquire() as connection:
            await connection.use(1000)

    async def main():
        flowcoro.spawn(holder())
        await wait_all_tasks_parked()
        await borrow(pool, None)

    flowcoro.run(main(), clock=VirtualClock())
    assert maker.made == 2 and not maker.open and pool.statistics()["closed"] == {"run_ended": 2} and at_rest(pool)


def test_a_connection_returned_after_the_run_is_closed():
    maker = Maker()
    pool = ConnectionPool(maker)
    connection = flowcoro.run(acquire_only(pool), clock=VirtualClock())
    pool.release(connection)
    assert connection.closed and at_rest(pool)


async def acquire_only(pool):
    return await pool.acquire()


@pytest.mark.parametrize("used", [False, True])
def test_a_deadlock_over_connections_is_reported_at_once_with_who_holds_them(used):
    clock = VirtualClock()

    async def greedy(pool):
        async with pool.acquire():
            await flowcoro.checkpoint()
            async with pool.acquire():
                pass

    async def main():
        pool = ConnectionPool(Maker(), max_connections=1, acquire_timeout=None)
        if used:
            await borrow(pool, None)    # then there is a keeper, whose deadline must not count any more
        async with flowcoro.TaskGroup() as group:
            group.spawn(greedy(pool), name="the greedy one")

    with pytest.raises(flowcoro.Deadlock, match=r"acquire a connection from a ConnectionPool \(for the greedy one\)"):
        flowcoro.run(main(), clock=clock)
    assert clock.now() == 0


def test_a_deadlock_elsewhere_is_reported_once_the_idle_ones_are_closed():
    clock = VirtualClock()

    async def main():
        await borrow(ConnectionPool(Maker(), idle_timeout=60), None)
        await flowcoro.Event().wait()

    with pytest.raises(flowcoro.Deadlock):
        flowcoro.run(main(), clock=clock)
    assert 60 <= clock.now() <= 62


@run_in_kernel
async def test_a_pool_of_which_nothing_is_left_is_forgotten():
    alive = tasks_alive()
    pool = ConnectionPool(Maker(), idle_timeout=10)
    await borrow(pool, None)
    (await pool.acquire()).maker = None
    del pool
    gc.collect()
    await wait_all_tasks_parked()
    pool = ConnectionPool(Maker(), idle_timeout=10)
    await borrow(pool, None)
    await wait_all_tasks_parked()
    pool.discard(await pool.acquire())
    await wait_all_tasks_parked()
    assert tasks_alive() == alive


# ---- leaks ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def leaks(monkeypatch):
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda got: found.append(str(got.exc_value)))
    return found


async def forgetful(pool):
    connection = await pool.acquire()
    connection.maker.open.remove(connection)


@pytest.mark.parametrize("leak_after", [None, math.inf, 1000])
def test_a_connection_never_returned_gives_its_place_back_and_is_reported_if_asked(leaks, leak_after):
    @run_in_kernel
    async def check():
        pool = ConnectionPool(Maker(), max_connections=1, leak_after=leak_after)
        await flowcoro.spawn(forgetful(pool), name="the forgetful one")
        assert (await borrow(pool, None)).number == 1
        assert pool.statistics()["closed"] == {"lost": 1} and at_rest(pool, idle=1)
        await pool.close()
        assert tasks_alive() == 1

    check()
    if leak_after is None:
        assert not leaks
    else:
        report, = leaks
        assert re.search(r"task 'the forgetful one' acquired 0\.000 seconds ago was never returned", report)
        assert "in forgetful\n    connection = await pool.acquire()" in report and "flowcoro_net.py" not in report


@pytest.mark.parametrize("patience", [None, 5])
@run_in_kernel
async def test_a_waiter_gets_the_place_of_a_lost_connection(patience):
    pool = ConnectionPool(Maker(), max_connections=1, acquire_timeout=patience)
    lost = [await pool.acquire()]
    lost[0].maker.open.clear()
    async with flowcoro.TaskGroup() as group:
        waiter, = await parked(group, borrow(pool, None))
        lost.clear()
        assert (await waiter).number == 1
    assert flowcoro.now() == 0
    await pool.close()


@run_in_kernel
async def test_one_lost_in_a_circle_is_found_before_a_deadlock_is_reported():
    pool = ConnectionPool(Maker(), max_connections=1, acquire_timeout=None)
    connection = await pool.acquire()
    connection.maker.open.clear()
    connection.circle = connection
    del connection
    assert (await borrow(pool, None)).number == 1
    await pool.close()


@run_in_kernel
async def test_close_does_not_wait_for_a_lost_connection():
    pool = ConnectionPool(Maker())
    lost = [await pool.acquire()]
    async with flowcoro.TaskGroup() as group:
        await parked(group, pool.close())
        lost[0].maker.open.clear()
        lost.clear()
    assert at_rest(pool)


def test_a_connection_held_too_long_is_reported_once_with_the_stack_while_it_is_held(leaks):
    @run_in_kernel
    async def check():
        async with ConnectionPool(Maker(), leak_after=10) as pool:
            async with pool.acquire():
                await flowcoro.sleep(5)
                async with pool.acquire():
                    await flowcoro.sleep(4.9)
                assert not leaks
                await flowcoro.sleep(3)
                report, = leaks
                await flowcoro.sleep(1000)
            assert re.search(r"acquired 1\d\.\d+ seconds ago has not been returned yet, and leak_after=10", report)
            assert "in check\n    async with pool.acquire():" in report

    check()
    assert len(leaks) == 1


def test_it_is_reported_in_time_though_the_keeper_had_nothing_to_do_for_long(leaks):
    @run_in_kernel
    async def check():
        async with ConnectionPool(Maker(), leak_after=10, idle_timeout=1000) as pool:
            await borrow(pool, None)
            await flowcoro.sleep(20)
            async with pool.acquire():
                await flowcoro.sleep(12)
                assert len(leaks) == 1

    check()


@run_in_kernel
async def test_connections_without_weak_references_are_lent_too():
    made = itertools.count()

    async def connect():
        return (next(made),)

    pool = ConnectionPool(connect, close=lambda connection: None)
    async with pool.acquire() as connection:
        assert connection == (0,)
    async with pool.acquire() as again:
        assert again is connection
    assert at_rest(pool, idle=1)
    await pool.close()


# ---- what it says, and what it refuses -----------------------------------------------------------------------------

@run_in_kernel
async def test_statistics_count_and_measure():
    pool = ConnectionPool(Maker(seconds=1), max_connections=1)
    async with flowcoro.TaskGroup() as group:
        await parked(group, *(borrow(pool, 2) for _ in range(3)))
        assert repr(pool) == "<ConnectionPool idle=0 in_use=0 waiting=2>"
        assert pool.statistics()["connecting"] == 1
    await borrow(pool, None)
    numbers = pool.statistics()
    assert numbers == {"max_connections": 1, "idle": 1, "in_use": 0, "connecting": 0, "closing": 0, "waiting": 0, "acquired": 4,
                       "created": 1, "connects_failed": 0, "closed": {}, "closes_failed": 0, "waits": 3, "wait_sum": 1 + 3 + 5,
                       "wait_max": 5, "generation": 0}
    await pool.close()


@pytest.mark.parametrize("arguments, kind, message", [
    ({"factory": 7}, TypeError, r"ConnectionPool\(7\): give an async function"),
    ({"max_connections": 0}, ValueError, "max_connections=0: the number of connections must be 1 or more"),
    ({"max_connections": 1.5}, TypeError, "max_connections=1.5"),
    ({"max_connecting": True}, TypeError, "max_connecting=True"),
    ({"idle_timeout": -1}, ValueError, "idle_timeout=-1: seconds must be 0 or more"),
    ({"idle_timeout": math.nan}, ValueError, "idle_timeout=nan"),
    ({"max_lifetime": 0}, ValueError, "max_lifetime=0: seconds must be 0.001 or more"),
    ({"acquire_timeout": "5"}, TypeError, "acquire_timeout='5': give a number of seconds"),
    ({"validate": True}, TypeError, "validate=True: give a function of a connection"),
    ({"reusable": 1}, TypeError, "reusable=1"),
    ({"close": "close"}, TypeError, "close='close'"),
    ({"leak_after": 0}, ValueError, "leak_after=0"),
])
def test_arguments_that_make_no_sense_are_refused_by_name(arguments, kind, message):
    arguments = {"factory": Maker(), **arguments}
    with pytest.raises(kind, match=message):
        ConnectionPool(arguments.pop("factory"), **arguments)


@run_in_kernel
async def test_calls_that_make_no_sense_are_refused_and_change_nothing():
    pool = ConnectionPool(Maker())
    for call, kind in ((lambda: pool.acquire(timeout=-1), ValueError), (lambda: pool.set_max_connections(0), ValueError),
                       (lambda: pool.set_idle_timeout("1"), TypeError)):
        with pytest.raises(kind):
            call()
    with pytest.raises(ValueError):
        await pool.close(timeout=-1)
    await borrow(pool, None)
    await pool.close()


@pytest.mark.parametrize("factory, message", [
    (lambda: 7, "the factory returned 7: give an async function"), (lambda: nothing(), "made None instead of a connection")])
@run_in_kernel
async def test_a_factory_that_makes_no_connection_is_refused(factory, message):
    pool = ConnectionPool(factory)
    with pytest.raises(TypeError, match=message):
        await pool.acquire()
    assert at_rest(pool)


async def nothing():
    pass


@run_in_kernel
async def test_a_factory_that_makes_the_same_connection_again_is_refused():
    connection = Connection(Maker(), 0)
    connection.maker.open.append(connection)

    async def same():
        return connection

    pool = ConnectionPool(same)
    await pool.acquire()
    with pytest.raises(flowcoro.PoolError, match="a Connection that this ConnectionPool has already"):
        await pool.acquire()
    pool.release(connection)
    assert pool.statistics()["in_use"] == 0 and pool.statistics()["idle"] == 1
    await pool.close()


# ---- cancelled at every checkpoint ---------------------------------------------------------------------------------

@types.coroutine
def cancelled_at(coro, number, how, scope, seen):
    """Run `coro`, in which each operation yields, and cancel `scope` at the one with that number; seen counts them."""
    task, sent, thrown = flowcoro.current_task(), None, None
    while True:
        task.budget = 0                     # so that each operation is a checkpoint, also where it need not wait
        try:
            trap = coro.send(sent) if thrown is None else coro.throw(thrown)
        except StopIteration as end:
            return end.value
        if len(seen) == number:
            if how == "before":
                scope.cancel()
            else:                           # by another task, when this one is parked
                flowcoro.spawn(cancel(scope))
        seen.append(trap)
        sent = thrown = None
        try:
            sent = yield trap
        except BaseException as error:
            thrown = error


async def cancel(scope):
    scope.cancel()


class Patient(Maker):
    """A connect of three checkpoints, which leaves nothing open when it is cancelled."""

    async def __call__(self):
        await flowcoro.checkpoint()
        connection = await super().__call__()
        try:
            await flowcoro.sleep(0.01)
        except BaseException:
            connection.close()
            raise
        return connection


async def validate_slowly(connection):
    await flowcoro.checkpoint()
    await flowcoro.sleep(0.01)
    return connection.number % 2 == 1


async def close_slowly(connection):
    with flowcoro.CancelScope(shield=True):
        await flowcoro.sleep(0.01)
    connection.close()


async def use_one(pool):
    async with pool.acquire() as connection:
        await connection.use()


async def use_by_hand(pool):
    connection = await pool.acquire()
    try:
        await connection.use()
    finally:
        pool.discard(connection)


async def use_two(pool):
    async with pool.acquire() as first:
        await first.use()
        async with pool.acquire(timeout=0.005) as second:
            await second.use(0.01)


async def close_pool(pool):
    await use_one(pool)
    await pool.close()


SITUATIONS = {
    # what is done, how many others are idle before it and busy beside it, options
    "connect": (use_one, 0, 0, {}),
    "reuse": (use_one, 1, 0, {}),
    "valid": (use_one, 2, 0, {"validate": validate_slowly}),
    "invalid": (use_one, 1, 0, {"validate": validate_slowly}),
    "invalid, close slowly": (use_one, 1, 0, {"validate": validate_slowly, "close": close_slowly, "max_connections": 1}),
    "invalid, others wait": (use_one, 1, 2, {"validate": validate_slowly, "close": close_slowly, "max_connections": 1}),
    "wait": (use_one, 0, 3, {"max_connections": 2}),
    "wait to connect": (use_one, 0, 3, {"max_connecting": 1}),
    "discard": (use_by_hand, 1, 1, {"max_connections": 1, "close": close_slowly}),
    "two": (use_two, 0, 2, {"max_connections": 3, "max_connecting": 1}),
    "close": (close_pool, 1, 2, {"max_connections": 2, "close": close_slowly}),
}


async def cancel_once(situation, number, how):
    """Do it, cancelled at checkpoint `number`. Returns how many there were."""
    action, idle, busy, options = SITUATIONS[situation]
    maker, seen, served = Patient(), [], 0
    pool = ConnectionPool(maker, validate_after=0.001, **options)
    for connection in [await pool.acquire() for _ in range(idle)]:
        pool.release(connection)
    await flowcoro.sleep(0.002)                 # longer than validate_after

    async def other():
        nonlocal served
        try:
            async with pool.acquire() as connection:
                await connection.use(0.003)
            served += 1
        except flowcoro.ClosedError:
            served += action is close_pool

    async def victim():
        with flowcoro.CancelScope() as scope:
            try:
                await cancelled_at(action(pool), number, how, scope, seen)
            except TimeoutError:
                assert action is use_two

    async with flowcoro.TaskGroup() as group:
        for _ in range(busy):
            group.spawn(other())
        await flowcoro.checkpoint()
        group.spawn(victim())
        await flowcoro.checkpoint()
        for _ in range(busy):
            group.spawn(other())
    assert served == 2 * busy
    with flowcoro.timeout(30):
        while any(pool.statistics()[what] for what in ("connecting", "closing")):
            await flowcoro.sleep(0.001)
    at_rest(pool)
    if not pool._books.closed:
        assert len(maker.open) == pool.statistics()["idle"] and maker.connecting == 0
        for connection in [await pool.acquire() for _ in range(pool.statistics()["max_connections"])]:  # no place is lost
            pool.release(connection)
    await pool.close()
    assert not maker.open and at_rest(pool, idle=0)
    assert maker.most_open <= pool.statistics()["max_connections"]
    return len(seen)


@pytest.mark.parametrize("how", ["before", "while"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_cancelled_at_any_checkpoint_a_borrower_neither_leaks_nor_loses_a_connection(situation, how):
    checkpoints = run_in_kernel(cancel_once)(situation, -1, how)
    assert checkpoints >= (2 if situation == "reuse" else 3)
    for number in range(checkpoints):
        for seed in range(5):
            assert run_in_kernel(cancel_once, seed=seed)(situation, number, how) > number


@pytest.mark.parametrize("situation", SITUATIONS)
def test_so_it_is_with_several_workers(situation):
    checkpoints = run_in_kernel(cancel_once)(situation, -1, "before")
    with concurrent.futures.ThreadPoolExecutor(checkpoints) as threads:     # kernels that sleep most of the time
        for done in [threads.submit(flowcoro.run, cancel_once(situation, number, "while"), workers=3)
                     for number in range(checkpoints)]:
            done.result()


@run_in_kernel
async def test_a_waiter_that_is_cancelled_after_it_was_given_a_connection_returns_it():
    maker = Maker()
    pool, ends = ConnectionPool(maker, max_connections=1), []
    connection = await pool.acquire()

    async def waiter():
        with flowcoro.CancelScope() as scope:
            ends.append(scope)
            async with pool.acquire() as got:
                ends.append(got)
                await flowcoro.checkpoint()
                ends.append("not cancelled")

    async with flowcoro.TaskGroup() as group:
        _, second = await parked(group, waiter(), borrow(pool, None))
        pool.release(connection)
        ends[0].cancel()
    assert ends[1:] == [connection] and connection.closed       # nobody knows in which state it was
    assert second.result().number == 1 and at_rest(pool, idle=1)
    await pool.close()


# ---- several workers -------------------------------------------------------------------------------------------------

@pytest.fixture
def hasty():
    """With a GIL too, threads take turns in the middle of things."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("hasty")
def test_several_workers_share_a_pool(seed):
    chance = random.Random(seed)
    maker = Maker()
    done = []

    async def validate(connection):
        await flowcoro.checkpoint()
        return chance.random() < 0.7

    async def close(connection):
        await flowcoro.checkpoint()
        connection.close()

    async def borrower(pool):
        for _ in range(40):
            if chance.random() < 0.05:
                maker.errors.append(OSError())
            with flowcoro.move_on_after(chance.choice([0.0, 0.0005, 30, 30, 30])):
                try:
                    async with pool.acquire() as connection:
                        await connection.use()
                        if chance.random() < 0.1:
                            pool.discard(connection)
                except OSError:
                    pass
            if chance.random() < 0.02:
                pool.clear()
        done.append(True)

    async def main():
        async with ConnectionPool(maker, max_connections=3, max_connecting=2, validate=validate, validate_after=0,
                                  close=close) as pool:
            async with flowcoro.TaskGroup() as group:
                for _ in range(12):
                    group.spawn(borrower(pool))
        at_rest(pool, idle=0)

    flowcoro.run(main(), workers=4)
    assert len(done) == 12 and not maker.open and maker.most_open <= 3


# ---- against plain lists ----------------------------------------------------------------------------------------------

class Model:
    """What a pool does, said with lists: connections are numbers, borrowers too, and all happens at once."""

    def __init__(self, size, connecting, idle_timeout, lifetime, patience):
        self.size, self.most_connecting, self.idle_timeout, self.lifetime = size, connecting, idle_timeout, lifetime
        self.patience = patience                    # acquire_timeout
        self.now, self.generation, self.made = 0.0, 0, 0
        self.idle = []                              # the one returned last at the end
        self.held = {}                              # borrower -> connection
        self.connecting = {}                        # borrower -> generation
        self.queue = []
        self.deadlines = {}                         # borrower that waits or connects -> when it gives up
        self.facts = {}                             # connection -> [generation, when made, when returned]
        self.bad = set()                            # those that validation will find invalid
        self.closed = {}                            # connection -> reason
        self.outcome = {}                           # borrower -> how it went, if it is over

    def close(self, connection, reason):
        self.closed[connection] = reason

    def worn(self, connection):
        generation, made, returned = self.facts[connection]
        if generation != self.generation:
            return "cleared"
        if made + self.lifetime <= self.now:
            return "lifetime"
        return "idle" if returned is not None and returned + self.idle_timeout <= self.now else None

    def grow_old(self):
        for connection in list(self.idle):
            if reason := self.worn(connection):
                self.idle.remove(connection)
                self.close(connection, reason)

    def serve(self):
        self.grow_old()
        while self.queue:
            if self.idle:
                connection = self.idle.pop()
                if connection in self.bad and self.facts[connection][2] + 0.5 <= self.now:
                    self.close(connection, "invalid")
                    continue
                self.held[self.queue[0]] = connection
            elif (len(self.held) + len(self.connecting) < self.size and len(self.connecting) < self.most_connecting):
                self.connecting[self.queue[0]] = self.generation
                self.queue.pop(0)
                continue
            else:
                break
            del self.deadlines[self.queue.pop(0)]

    def until(self, now):
        """Time passes; who has waited for too long gives up, one after the other."""
        while self.deadlines and min(self.deadlines.values()) <= now:
            who = min(self.deadlines, key=self.deadlines.get)
            self.now = self.deadlines[who]
            self.leave(who, "timeout")
        self.now = now
        self.serve()

    def acquire(self, who):
        self.queue.append(who)
        self.deadlines[who] = self.now + self.patience
        self.serve()

    def leave(self, who, how):
        """It ends without a connection."""
        self.deadlines.pop(who)
        if who in self.queue:
            self.queue.remove(who)
        else:
            del self.connecting[who]
        self.outcome[who] = how
        self.serve()

    def connect(self, who):
        generation = self.connecting.pop(who)
        del self.deadlines[who]
        self.held[who] = self.made
        self.facts[self.made] = [generation, self.now, None]
        self.made += 1
        self.serve()

    def give_back(self, who, reason, how="done"):
        connection = self.held.pop(who)
        self.outcome[who] = how
        self.facts[connection][2] = None
        excess = len(self.held) + len(self.connecting) + len(self.idle) + 1 > self.size
        reason = reason or ("shrunk" if excess else None) or self.worn(connection)
        if reason:
            self.close(connection, reason)
        else:
            self.facts[connection][2] = self.now
            self.idle.append(connection)
        self.serve()

    def clear(self):
        self.generation += 1
        self.serve()

    def resize(self, size):
        self.size = size
        self.grow_old()
        while self.idle and len(self.held) + len(self.connecting) + len(self.idle) > size:
            self.close(self.idle.pop(0), "shrunk")
        self.serve()


BORROWER = contextvars.ContextVar("BORROWER")       # who connects: the factory runs in the borrower's context


class Play:
    """A pool and its model, given the same random moves; after each move and when all is quiet they are compared."""

    def __init__(self, chance):
        self.chance = chance
        size, connecting = chance.randint(1, 5), chance.choice([1, 2, 9])
        idle_timeout, lifetime, patience = chance.choice([3, 1e9]), chance.choice([10, 1e9]), chance.choice([5, 1e9])
        self.model = Model(size, connecting, idle_timeout, lifetime, patience)
        self.connects = {}                          # borrower -> Promise of its connect
        self.control = {}                           # borrower -> Promise of what ends its use
        self.scopes, self.held, self.outcome = {}, {}, {}
        self.closed, self.count = [], 0
        self.who, self.by_hand = -1, set()           # borrowers so far; those that call acquire() and release() by hand
        self.pool = ConnectionPool(
            self.factory, max_connections=size, max_connecting=connecting, idle_timeout=idle_timeout, max_lifetime=lifetime,
            acquire_timeout=patience, validate=lambda connection: connection.number not in self.model.bad,
            close=self.close_async if chance.random() < 0.5 else self.close)

    async def factory(self):
        promise = self.connects[BORROWER.get()] = flowcoro.Promise()
        await promise
        self.count += 1
        return Connection(None, self.count - 1)

    def close(self, connection):
        self.closed.append(connection.number)

    async def close_async(self, connection):
        await flowcoro.checkpoint()
        self.closed.append(connection.number)

    async def use(self, who, connection):
        self.held[who] = connection.number
        try:
            return await self.control[who]
        finally:
            del self.held[who]

    async def use_by_hand(self, who):
        connection = await self.pool.acquire()
        try:
            what = await self.use(who, connection)
        except BaseException:
            self.pool.discard(connection)
            raise
        if what is None:
            self.pool.release(connection)
        elif what == "discard":
            self.pool.discard(connection)
        else:                                       # it is lost
            self.closed.append(connection.number)

    async def borrow(self, who):
        BORROWER.set(who)
        how = "cancelled"
        try:
            with flowcoro.CancelScope() as self.scopes[who]:
                if who in self.by_hand:
                    await self.use_by_hand(who)
                else:
                    async with self.pool.acquire() as connection:
                        if await self.use(who, connection) == "discard":
                            self.pool.discard(connection)
                how = "done"
        except TimeoutError:
            how = "timeout"
        except OSError:
            how = "failed"
        except ValueError:
            how = "done"
        self.outcome[who] = how

    async def move(self, group):
        """One random move, in both worlds."""
        chance, model = self.chance, self.model
        moves = ["acquire", "acquire", "sleep"]
        moves += ["release", "release", "release", "fail", "discard", "cancel use", "release and cancel"] if model.held else []
        moves += ["lose"] if self.by_hand.intersection(model.held) else []
        moves += ["connect", "connect", "connect", "fail to connect", "cancel connect"] if model.connecting else []
        moves += ["cancel wait"] if model.queue else []
        moves += ["spoil"] if model.idle else []
        moves += ["clear"] if chance.random() < 0.2 else []
        moves += ["resize"] if chance.random() < 0.3 else []
        moves += ["set idle timeout"] if chance.random() < 0.2 else []
        what = chance.choice(moves)
        holder = chance.choice(list(model.held)) if model.held else None
        connector = chance.choice(list(model.connecting)) if model.connecting else None
        broken = "discarded" if holder in self.by_hand else "broken"
        if what == "acquire":
            self.who += 1
            if chance.random() < 0.3:
                self.by_hand.add(self.who)
            self.control[self.who] = flowcoro.Promise()
            group.spawn(self.borrow(self.who))
            model.acquire(self.who)
        elif what == "sleep":
            await flowcoro.sleep(chance.random() * chance.choice([0.3, 1, 5]))
            model.until(flowcoro.now())
        elif what in ("release", "release and cancel"):
            self.control[holder].set_result(None)
            if what == "release and cancel" and model.queue:
                while holder in self.held:          # until it has been returned, and given to somebody who has not run yet
                    await flowcoro.checkpoint()
                first = model.queue[0]
                model.give_back(holder, None)
                self.scopes[first].cancel()
                if first in model.held:
                    model.give_back(first, "discarded" if first in self.by_hand else "broken", "cancelled")
                elif first in model.deadlines:
                    model.leave(first, "cancelled")
            else:
                model.give_back(holder, None)
        elif what == "fail":
            self.control[holder].set_exception(ValueError())
            model.give_back(holder, broken)
        elif what == "discard":
            self.control[holder].set_result("discard")
            model.give_back(holder, "discarded")
        elif what == "cancel use":
            self.scopes[holder].cancel()
            model.give_back(holder, broken, "cancelled")
        elif what == "lose":
            holder = chance.choice(sorted(self.by_hand.intersection(model.held)))
            self.control[holder].set_result("lose")
            model.give_back(holder, "lost")
        elif what == "connect":
            self.connects[connector].set_result(None)
            model.connect(connector)
        elif what == "fail to connect":
            self.connects[connector].set_exception(OSError())
            model.leave(connector, "failed")
        elif what in ("cancel connect", "cancel wait"):
            who = connector if what == "cancel connect" else chance.choice(model.queue)
            self.scopes[who].cancel()
            model.leave(who, "cancelled")
        elif what == "spoil":
            model.bad.add(chance.choice(model.idle))
        elif what == "clear":
            self.pool.clear()
            model.clear()
        elif what == "resize":
            size = chance.randint(1, 5)
            self.pool.set_max_connections(size)
            model.resize(size)
        elif what == "set idle timeout":
            model.idle_timeout = chance.choice([2, 4, 1e9])
            self.pool.set_idle_timeout(model.idle_timeout)
            model.serve()
        return what

    def compare(self):
        model, books, numbers = self.model, self.pool._books, self.pool.statistics()
        overdue = [entry.connection.number for entry in books.idle if books.worn(entry, flowcoro.now())]
        assert [entry.connection.number for entry in books.idle if not books.worn(entry, flowcoro.now())] == model.idle
        assert self.held == model.held
        assert sorted(self.closed + overdue) == sorted(model.closed)
        assert self.outcome == model.outcome
        assert numbers["waiting"] == len(model.queue)
        assert {who for who, promise in self.connects.items() if who in model.connecting and not promise.done()} == set(
            model.connecting)
        assert numbers["connecting"] == len(model.connecting) and numbers["in_use"] == len(model.held)
        assert (numbers["created"], numbers["closing"], numbers["generation"]) == (model.made, 0, model.generation)
        if not overdue:
            reasons = [*model.closed.values()]
            assert numbers["closed"] == {reason: reasons.count(reason) for reason in set(reasons)}


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_a_pool_does_what_plain_lists_do(first, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "POOL_LIFETIME_SPREAD", 0)

    async def play(seed):
        play, moves = Play(random.Random(seed)), []
        async with flowcoro.TaskGroup() as group:
            for _ in range(80):
                moves.append(await play.move(group))
                await wait_all_tasks_parked()
                try:
                    play.compare()
                except AssertionError as error:
                    error.add_note(f"seed {seed}, after {moves}")
                    raise
            group.cancel()
        await play.pool.close()
        assert sorted(play.closed) == list(range(play.count)) and at_rest(play.pool, idle=0)

    for seed in range(first, first + 50):
        run_in_kernel(play, seed=seed)(seed)
