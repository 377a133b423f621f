"""Several workers: nothing is lost, doubled or late when the tasks of one run are stepped by many threads.

The interpreter is told to switch threads as often as it can, and the kernel that there is no GIL, so that idle workers
steal. No test depends on how fast anything is: where one has to happen before the other, the other waits for it.
"""

import collections
import contextlib
import contextvars
import faulthandler
import functools
import gc
import inspect
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter
from pathlib import Path

import pytest

import flowcoro
from flowcoro_testing import wait_all_tasks_parked

ROOT = Path(__file__).resolve().parent.parent

# FLOWCORO_TRANSFERS=1000000: how many items go through the channels of the first test, in each of its cases.
TRANSFERS = int(os.environ.get("FLOWCORO_TRANSFERS", 150))

# Seconds after which something that should have happened counts as hanging: only a failing test takes so long.
PATIENCE = 30.0 + TRANSFERS / 1000

MANY = pytest.mark.parametrize("workers", [1, 2, 8])
SEVERAL = pytest.mark.parametrize("workers", [2, 8])

variable = contextvars.ContextVar("variable", default="unset")


def strangers():
    """The threads that run now, but those that to_thread() keeps for later."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("flowcoro thread")}


def descriptors():
    return sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []


@pytest.fixture(autouse=True)
def crowded(monkeypatch):
    """Threads switch at every chance, idle workers steal, and no test leaves threads or descriptors behind."""
    interval = sys.getswitchinterval()
    monkeypatch.setattr(flowcoro, "_has_gil", lambda: False)
    threads, files = strangers(), descriptors()
    faulthandler.dump_traceback_later(3 * PATIENCE, exit=True, file=sys.__stderr__)    # a kernel that hangs hears nothing
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    faulthandler.cancel_dump_traceback_later()
    assert strangers() == threads
    assert descriptors() == files


def run(function, *args, workers, **options):
    async def main():
        with flowcoro.timeout(PATIENCE):
            return await function(*args)

    return flowcoro.run(main(), workers=workers, **options)


async def spread(count, function, *args):
    """Run function(number, *args), for `count` numbers, as tasks pinned each to a worker of its own. Their results.

    Each of the first tasks waits for all the others in one step, so that no worker can take two of them.
    """
    meeting = threading.Barrier(count)

    async def begin(number):
        meeting.wait(PATIENCE)
        async with flowcoro.TaskGroup(pinned=True) as group:
            task = group.spawn(function(number, *args))
        return task.result()

    return await flowcoro.when_all(*(begin(number) for number in range(count)))


async def drain(channel):
    found = []
    with contextlib.suppress(flowcoro.WouldBlock, flowcoro.EndOfChannel):
        while True:
            found.append(channel.receive_nowait())
    return found


def wait_until(condition):
    """Wait in a step, as no task should: this worker is stuck meanwhile."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


# ---- what is atomic -------------------------------------------------------------------------------------------

PRIMITIVES = ["CancelScope", "Task", "TaskGroup", "ParkingLot", "Pollable", "Lock", "RWLock", "Event", "Condition", "Semaphore",
              "Barrier", "Channel", "Broadcast", "Subscription", "Promise", "as_completed", "ObjectPool", "BufferPool"]


@pytest.mark.parametrize("name", PRIMITIVES)
def test_the_docstring_of_each_primitive_says_what_is_atomic(name):
    assert re.search(r"^ *Atomic: ", getattr(flowcoro, name).__doc__, re.MULTILINE)


def test_no_class_that_tasks_share_is_missing_from_that_list():
    public = [thing for name, thing in vars(flowcoro).items() if name in flowcoro.__all__ and isinstance(thing, type)]
    assert {thing.__name__ for thing in public if issubclass(thing, flowcoro._Unique)} == set(PRIMITIVES)


class Gate:
    """A primitive of somebody's own: the first `places` to come go in, the others wait for one who leaves."""

    def __init__(self, places):
        self.places, self.inside = places, 0
        self.lot = flowcoro.ParkingLot("wait at a Gate")

    @flowcoro.atomic
    def enter_now(self):
        if self.inside < self.places:
            inside = self.inside
            for _ in range(20):                     # time for others to come in between
                pass
            self.inside = inside + 1
            return True
        return False

    async def enter(self):
        await self.lot.park_unless(self.enter_now)

    @flowcoro.atomic
    def leave(self):
        if not self.lot.unpark():
            self.inside -= 1


@MANY
def test_a_primitive_of_ones_own_is_safe_on_all_workers(workers):
    async def main():
        async def visit(number):
            for _ in range(40):
                await gate.enter()
                inside.append(number)
                assert len(inside) <= 2
                await flowcoro.checkpoint()
                inside.remove(number)
                gate.leave()

        gate, inside = Gate(2), []
        await spread(workers, visit)
        assert (gate.inside, inside, len(gate.lot)) == (0, [], 0)

    run(main, workers=workers)


def test_atomic_takes_the_guard_with_several_workers_only_and_for_methods_taken_before_too():
    class StandIn:
        def commit(self, value, error=None):
            self.guarded = flowcoro._GUARD._is_owned()

    def make():
        class Primitive:
            @flowcoro.atomic
            def method(self, *, answer=None):
                """Say what."""
                return flowcoro._GUARD._is_owned(), answer

        assert Primitive.method.__doc__ == "Say what."
        return Primitive().method

    def unpark_of_a_lot():
        lot, stand_in = flowcoro.ParkingLot(), StandIn()
        lot._tasks[stand_in] = None
        unpark = lot.unpark
        return lambda: (unpark(1, value=7), stand_in.guarded)

    without_gil = not flowcoro.runtime_info()["gil"]
    before, first, second = make(), unpark_of_a_lot(), unpark_of_a_lot()
    if not os.environ.get("FLOWCORO_GUARD"):
        assert before(answer=42) == (without_gil and flowcoro._several, 42)
        assert first() == (1, without_gil and flowcoro._several)
    signature = inspect.signature(flowcoro.ParkingLot.unpark)
    flowcoro.run(flowcoro.sleep(0), workers=2)
    assert before(answer=42) == make()(answer=42) == (True, 42)
    assert second() == unpark_of_a_lot()() == (1, True)
    assert inspect.signature(flowcoro.ParkingLot.unpark) == signature


@pytest.mark.skipif(not flowcoro.runtime_info()["gil"], reason="the first free-threaded builds keep classes for ever")
@pytest.mark.parametrize("before", [False, True], ids=["before a run with several workers", "after one"])
def test_classes_with_atomic_methods_can_be_forgotten(before):
    class Short:
        @flowcoro.atomic
        def method(self):
            return super().__repr__()

        @flowcoro.atomic
        def other(self):
            return self.__dict__

    if before:
        flowcoro.run(flowcoro.sleep(0), workers=2)
    short = weakref.ref(Short)
    del Short
    gc.collect()
    assert short() is None


def test_atomic_methods_of_others_cost_nothing_until_there_are_several_workers_and_keep_what_they_have():
    class Primitive:
        def other(self, a, /, b: int = 2, *rest, c: "int" = 3, **named) -> tuple:
            """Say what."""
            return flowcoro._GUARD._is_owned(), a, b, rest, c, named

        before = other
        other = flowcoro.atomic(other)

    def ask():
        return primitive.other(1, c=4, d=5), primitive.other(1, 6, 7)

    primitive, signature = Primitive(), inspect.signature(Primitive.other)
    if not os.environ.get("FLOWCORO_GUARD") and flowcoro.runtime_info()["gil"]:
        assert Primitive.other is Primitive.before
        assert ask() == ((False, 1, 2, (), 4, {"d": 5}), (False, 1, 6, (7,), 3, {}))
    flowcoro.run(flowcoro.sleep(0), workers=2)
    flowcoro._guard_all()                           # twice is once
    assert ask() == ((True, 1, 2, (), 4, {"d": 5}), (True, 1, 6, (7,), 3, {}))
    assert inspect.signature(Primitive.other) == signature and Primitive.other.__doc__ == "Say what."
    assert Primitive.other.__wrapped__(primitive, 1)[0] is False


def test_an_atomic_method_that_stands_for_another_function_still_does_when_it_takes_the_guard():
    def stands_for(function):
        def other(self, *args):
            raise NotImplementedError
        return functools.update_wrapper(other, function)

    def asked(a: int) -> int:
        raise NotImplementedError

    class Primitive:
        other = flowcoro.atomic(stands_for(asked))

    assert not Primitive.other.__code__.co_freevars
    flowcoro.run(flowcoro.sleep(0), workers=2)
    assert inspect.signature(Primitive.other) == inspect.signature(asked) and inspect.unwrap(Primitive.other) is asked


async def waits():
    pass


def yields():
    yield


@pytest.mark.parametrize("function", [waits, yields, 7, print, staticmethod(len)])
def test_only_plain_methods_can_be_atomic(function):
    with pytest.raises(TypeError, match="decorates a plain method"):
        flowcoro.atomic(function)


def test_a_function_outside_of_a_class_cannot_be_atomic():
    @flowcoro.atomic
    def lonely():
        pass

    with pytest.raises(TypeError, match="lonely stands in no class body"):
        lonely()


@MANY
def test_park_unless_goes_on_at_once_with_what_the_function_returned(workers):
    async def main():
        lot = flowcoro.ParkingLot()
        assert await lot.park_unless(lambda: "answer") == "answer"
        assert len(lot) == 0
        task = flowcoro.spawn(lot.park_unless(lambda: 0))
        while not lot.unpark(1, "woken"):
            await flowcoro.checkpoint()
        assert await task == "woken"
        with pytest.raises(ZeroDivisionError):
            await lot.park_unless(lambda: 1 / 0)
        with flowcoro.move_on_after(0) as scope:
            await lot.park_unless(lambda: "answer")
        assert scope.cancelled_caught and len(lot) == 0

    run(main, workers=workers)


@MANY
@pytest.mark.parametrize("predicate", [waits, 7, None])
def test_park_unless_refuses_what_is_no_plain_function_and_parks_nobody(workers, predicate):
    async def main():
        lot = flowcoro.ParkingLot()
        with pytest.raises(TypeError, match=r"park_unless\(\) takes a plain function, .*cannot wait"):
            await lot.park_unless(predicate)
        assert len(lot) == 0

    run(main, workers=workers)


# ---- channels -------------------------------------------------------------------------------------------------

@MANY
@pytest.mark.parametrize("capacity", [0, 1, 10])
def test_many_senders_and_receivers_lose_and_double_nothing(workers, capacity):
    async def main():
        channel, received = flowcoro.Channel(capacity), []

        async def sender(number):
            for index in range(TRANSFERS // 6):
                await channel.send((number, index))

        async def receiver():
            async for item in channel:
                received.append(item)

        async with flowcoro.TaskGroup() as receivers:
            for _ in range(4):
                receivers.spawn(receiver())
            async with flowcoro.TaskGroup() as senders:
                for number in range(6):
                    senders.spawn(sender(number))
            channel.close()
        assert Counter(received) == Counter((number, index) for number in range(6) for index in range(TRANSFERS // 6))

    run(main, workers=workers)


@MANY
@pytest.mark.parametrize("capacity", [0, 1, 10])
def test_each_sender_s_items_come_in_order_to_a_single_receiver(workers, capacity):
    async def main():
        channel, received = flowcoro.Channel(capacity), []

        async def sender(number):
            for index in range(30):
                await channel.send((number, index))

        async with flowcoro.TaskGroup() as group:
            for number in range(5):
                group.spawn(sender(number))
            for _ in range(150):
                received.append(await channel.receive())
        for number in range(5):
            assert [index for who, index in received if who == number] == list(range(30))

    run(main, workers=workers)


@MANY
@pytest.mark.parametrize("capacity", [0, 1, 10])
def test_items_go_whole_between_tasks_pinned_to_different_workers(workers, capacity):
    async def main():
        channel, received = flowcoro.Channel(capacity), []

        async def both(number):
            async with flowcoro.TaskGroup(pinned=True) as group:
                group.spawn(receiver())
                for index in range(40):
                    await channel.send((number, index))

        async def receiver():
            for _ in range(40):
                received.append(await channel.receive())

        await spread(workers, both)
        assert sorted(received) == [(number, index) for number in range(workers) for index in range(40)]

    run(main, workers=workers)


@SEVERAL
def test_closing_a_channel_wakes_all_who_wait_on_any_worker(workers):
    async def main():
        for _ in range(4):
            channel, seen = flowcoro.Channel(), []

            async def receiver(number):
                if number == 0:
                    await flowcoro.sleep(0.001)
                    channel.close()
                else:
                    with pytest.raises(flowcoro.EndOfChannel):
                        await channel.receive()
                    seen.append(channel.closed)

            await spread(workers, receiver)
            assert seen == [True] * (workers - 1)

    run(main, workers=workers)


@MANY
@pytest.mark.parametrize("pinned", [False, True])
def test_selects_from_many_channels_give_each_item_exactly_once(workers, pinned):
    async def main():
        channels, received = [flowcoro.Channel(capacity) for capacity in (0, 0, 1, 3)], []

        async def worker(number):
            async with flowcoro.TaskGroup(pinned=pinned) as group:
                group.spawn(selector())
                for index in range(30):
                    await channels[(number + index) % 4].send((number, index))

        async def selector():
            for _ in range(30):
                received.append((await flowcoro.select(*channels))[1])

        if pinned:
            await spread(workers, worker)
        else:
            await flowcoro.when_all(*(worker(number) for number in range(workers)))
        assert sorted(received) == [(number, index) for number in range(workers) for index in range(30)]
        assert all(channel.statistics() == {"capacity": channel.capacity, "items": 0, "senders_waiting": 0,
                                            "receivers_waiting": 0, "closed": False} for channel in channels)

    run(main, workers=workers)


@MANY
def test_selects_that_send_and_receive_at_once_meet_in_pairs(workers):
    async def main():
        left, right = flowcoro.Channel(), flowcoro.Channel()
        sent, received = Counter(), Counter()

        async def player(number):
            for index in range(20):
                item = number, index
                which, got = await flowcoro.select((left, item), right) if number % 2 else await flowcoro.select(
                    left, (right, item))
                if (which == 0) == bool(number % 2):
                    sent[item] += 1
                else:
                    received[got] += 1

        with flowcoro.move_on_after(PATIENCE):
            async with flowcoro.TaskGroup() as group:
                players = [group.spawn(player(number)) for number in range(4)]
                for task in players[:1]:            # the first to be ready has played all its rounds
                    await task
                group.cancel()
        assert sent == received and set(sent.values()) == {1}

    run(main, workers=workers)


@MANY
@pytest.mark.parametrize("receive", [lambda channel: channel.receive(),
                                     lambda channel: flowcoro.select(channel, flowcoro.Channel())],
                         ids=["receive", "select"])
def test_an_item_sent_to_a_task_that_is_cancelled_is_received_or_still_there(workers, receive):
    async def main():
        async def game(number):
            for index in range(15):
                channel, received = flowcoro.Channel(1), []

                async def receiver():
                    await receive(channel)
                    received.append(index)

                async def sender():
                    if (number + index) % 3 == 0:
                        await flowcoro.checkpoint()
                    await channel.send(index)

                async with flowcoro.TaskGroup() as group:
                    task = group.spawn(receiver())
                    if index % 2:
                        await flowcoro.checkpoint()
                    group.spawn(sender())
                    group.spawn(cancel(task))
                assert received + await drain(channel) == [index]

        async def cancel(task):
            task.cancel()

        await flowcoro.when_all(*(game(number) for number in range(6)))

    run(main, workers=workers)


@MANY
def test_a_send_with_a_deadline_has_sent_if_and_only_if_it_was_not_cancelled(workers):
    async def main():
        channel, sent, received = flowcoro.Channel(), [], []

        async def sender(number):
            for index in range(15):
                with flowcoro.move_on_after(0.0002 * (index % 5)) as scope:
                    await channel.send((number, index))
                    sent.append((number, index))
                del scope
                await flowcoro.checkpoint()

        async def receiver():
            async for item in channel:
                received.append(item)
                await flowcoro.sleep(0.0003)

        async with flowcoro.TaskGroup() as receivers:
            receivers.spawn(receiver())
            receivers.spawn(receiver())
            async with flowcoro.TaskGroup() as senders:
                for number in range(6):
                    senders.spawn(sender(number))
            channel.close()
        assert sorted(sent) == sorted(received)

    run(main, workers=workers)


# ---- locks ----------------------------------------------------------------------------------------------------

def guards():
    """[a function that returns an async context manager for one at a time]"""
    lock, semaphore, rwlock, condition = flowcoro.Lock(), flowcoro.Semaphore(1), flowcoro.RWLock(), flowcoro.Condition()
    return {"Lock": lambda: lock, "Semaphore": lambda: semaphore, "RWLock": lambda: rwlock.write,
            "Condition": lambda: condition}


@MANY
@pytest.mark.parametrize("kind", ["Lock", "Semaphore", "RWLock", "Condition"])
@pytest.mark.parametrize("pinned", [False, True])
def test_what_a_lock_guards_is_touched_by_one_task_at_a_time(workers, kind, pinned):
    async def main():
        guard, counter = guards()[kind], [0]

        async def count(number):
            for index in range(25):
                async with guard():
                    before = counter[0]
                    if index % 5 == 0:
                        await flowcoro.checkpoint()
                    counter[0] = before + 1

        if pinned:
            await spread(workers, count)
        else:
            await flowcoro.when_all(*(count(number) for number in range(workers)))
        assert counter == [25 * workers]

    run(main, workers=workers)


@MANY
def test_readers_share_and_never_see_what_a_writer_has_half_done(workers):
    async def main():
        lock, pair = flowcoro.RWLock(), [0, 0]

        async def write():
            for _ in range(15):
                async with lock.write:
                    pair[0] += 1
                    await flowcoro.checkpoint()
                    pair[1] += 1

        async def read():
            for _ in range(15):
                async with lock.read:
                    first = pair[0]
                    await flowcoro.checkpoint()
                    assert first == pair[1]

        await flowcoro.when_all(*(read() for _ in range(6)), *(write() for _ in range(3)))
        assert pair == [45, 45]
        assert lock.holder == ()

    run(main, workers=workers)


@MANY
def test_tasks_cancelled_while_they_wait_for_a_lock_leave_it_usable(workers):
    async def main():
        locks, inside = guards(), Counter()

        async def use(kind, seconds):
            with flowcoro.move_on_after(seconds):
                async with locks[kind]():
                    inside[kind] += 1
                    assert inside[kind] == 1
                    try:
                        await flowcoro.sleep(0.0003)
                    finally:
                        inside[kind] -= 1

        await flowcoro.when_all(*(use(kind, 0.0005 * index) for kind in locks for index in range(12)))
        for kind in locks:
            async with locks[kind]():
                pass

    run(main, workers=workers)


@MANY
def test_a_condition_hands_each_notify_to_one_who_waits(workers):
    async def main():
        condition, stock, taken = flowcoro.Condition(), [], []

        async def take():
            for _ in range(10):
                async with condition:
                    await condition.wait_for(lambda: stock)
                    taken.append(stock.pop())

        async def put(number):
            for index in range(10):
                async with condition:
                    stock.append((number, index))
                    condition.notify()

        await flowcoro.when_all(*(take() for _ in range(5)), *(put(number) for number in range(5)))
        assert stock == [] and len(set(taken)) == 50

    run(main, workers=workers)


@MANY
def test_a_semaphore_never_lets_more_in_than_it_has_permits(workers):
    async def main():
        semaphore, inside, most = flowcoro.Semaphore(3), [], []

        async def use(number):
            for _ in range(10):
                async with semaphore:
                    inside.append(number)
                    most.append(len(inside))
                    await flowcoro.checkpoint()
                    inside.remove(number)

        await flowcoro.when_all(*(use(number) for number in range(8)))
        assert max(most) <= 3 and semaphore.value == 3

    run(main, workers=workers)


@MANY
def test_an_event_set_on_one_worker_wakes_all_and_is_seen_set_by_them(workers):
    async def main():
        for _ in range(4):
            event, seen = flowcoro.Event(), []

            async def wait(number):
                if number == workers - 1:
                    event.set()
                else:
                    await event.wait()
                    seen.append(event.is_set())

            await spread(workers, wait)
            assert seen == [True] * (workers - 1)

    run(main, workers=workers)


@MANY
def test_a_barrier_lets_its_parties_through_together_round_after_round(workers):
    async def main():
        barrier, arrivals = flowcoro.Barrier(5), [[] for _ in range(12)]

        async def party():
            for round in range(12):
                arrivals[round].append(await barrier.wait())
                assert round == 11 or len(arrivals[round + 1]) == 0 or len(arrivals[round]) >= 1

        await flowcoro.when_all(*(party() for _ in range(5)))
        assert [sorted(orders) for orders in arrivals] == [[0, 1, 2, 3, 4]] * 12

    run(main, workers=workers)


@MANY
def test_all_subscribers_of_a_broadcast_get_all_items_in_the_same_order(workers):
    async def main():
        broadcast, received = flowcoro.Broadcast(3), []

        async def subscriber(subscription):
            received.append([item async for item in subscription])

        async def sender(number):
            for index in range(15):
                await broadcast.send((number, index))

        async with flowcoro.TaskGroup() as subscribers:
            for _ in range(4):
                subscribers.spawn(subscriber(broadcast.subscribe()))
            async with flowcoro.TaskGroup() as senders:
                for number in range(3):
                    senders.spawn(sender(number))
            broadcast.close()
        assert sorted(received[0]) == [(number, index) for number in range(3) for index in range(15)]
        assert all(items == received[0] for items in received)

    run(main, workers=workers)


def test_a_task_woken_on_another_worker_may_go_on_before_its_waker_does(monkeypatch):
    """Whoever wakes a pinned task is held up, in the middle of that, until the task has gone on."""
    armed, went_on = [], threading.Event()

    class Slow(collections.deque):
        def append(self, task):
            super().append(task)
            if armed and self is not flowcoro._local.worker.ready:
                went_on.wait(0.1)       # in vain if its worker wants the guard before it comes to the task

    def with_slow_deque(self, kernel, init=flowcoro._OneOfSeveral.__init__):
        init(self, kernel)
        self.ready = Slow()

    async def main():
        async def meet(number, wait, wake):
            if number == 0:
                waiters.append(flowcoro.current_task())
                outcome = await wait()
                went_on.set()
                return outcome
            while not waiters or waiters[0].state != "parked":
                await flowcoro.checkpoint()
            armed.append(True)
            try:
                return wake()
            finally:
                armed.clear()
                waiters.clear()
                went_on.clear()

        async def wait_for_event():
            await event.wait()
            return event.is_set()

        async def wait_for_end():
            with pytest.raises(flowcoro.EndOfChannel):
                await channel.receive()
            return channel.closed

        waiters, event, channel, other = [], flowcoro.Event(), flowcoro.Channel(), flowcoro.Channel()
        assert await spread(2, meet, lambda: channel.send("item"), channel.receive_nowait) == [None, "item"]
        assert await spread(2, meet, lambda: flowcoro.select(channel, other), lambda: channel.send_nowait(1)) == [(0, 1), None]
        assert other.statistics()["receivers_waiting"] == 0
        assert await spread(2, meet, wait_for_event, event.set) == [True, None]
        assert await spread(2, meet, wait_for_end, channel.close) == [True, None]

    monkeypatch.setattr(flowcoro._OneOfSeveral, "__init__", with_slow_deque)
    run(main, workers=2)


# ---- promises, combinations, groups ---------------------------------------------------------------------------

@MANY
def test_a_promise_set_in_a_plain_thread_wakes_every_task_on_every_worker(workers):
    async def main():
        promises, got = [flowcoro.Promise() for _ in range(20)], []

        async def wait(number):
            for promise in promises:
                got.append(await promise)

        def keep():
            for index, promise in enumerate(promises):
                promise.set_result(index)

        thread = threading.Thread(target=keep)
        thread.start()
        await spread(workers, wait)
        thread.join()
        assert Counter(got) == Counter({index: workers for index in range(20)})

    run(main, workers=workers)


@MANY
def test_a_promise_set_by_a_task_on_another_worker_wakes_those_who_wait(workers):
    async def main():
        promises = [flowcoro.Promise() for _ in range(workers)]

        async def relay(number):
            if number == 0:
                promises[0].set_result([0])
            else:
                promises[number].set_result([*await promises[number - 1], number])

        for _ in range(5):
            await spread(workers, relay)
            assert await promises[-1] == list(range(workers))
            promises[:] = [flowcoro.Promise() for _ in range(workers)]

    run(main, workers=workers)


@MANY
def test_only_one_of_many_can_set_a_promise(workers):
    async def main():
        for _ in range(4):
            promise, won = flowcoro.Promise(), []

            async def settle(number):
                with contextlib.suppress(RuntimeError):
                    promise.set_result(number)
                    won.append(number)

            await spread(workers, settle)
            assert won == [await promise]

    run(main, workers=workers)


@MANY
def test_results_and_errors_of_tasks_are_there_as_soon_as_they_are_done(workers):
    async def main():
        async def work(number):
            if number % 3 == 1:
                raise ValueError(number)
            return number

        async def ask(number):
            for index in range(20):
                task = flowcoro.spawn(work(index))
                if index % 2:
                    while not task.done():
                        await flowcoro.checkpoint()
                    outcome = task.exception() or task.result()
                else:
                    try:
                        outcome = await task
                    except ValueError as error:
                        outcome = error
                assert outcome == index or outcome.args == (index,) and index % 3 == 1

        await flowcoro.when_all(*(ask(number) for number in range(5)))

    run(main, workers=workers)


@SEVERAL
def test_a_task_that_another_worker_sees_done_has_its_error_already(workers):
    """The end of a task is told by one store, after all that it says."""
    async def main():
        seen = []

        async def fail():
            raise ValueError

        async def watch(number):
            if number == 0:
                for task in tasks:
                    task.append(flowcoro.spawn(fail()))
                    await flowcoro.checkpoint()
            elif number == 1:
                for task in tasks:
                    wait_until(lambda: task)
                    while not task[0].done():
                        pass
                    seen.append(task[0]._error is not None)
                    task[0].exception()

        tasks = [[] for _ in range(50)]
        await spread(2, watch)
        assert seen == [True] * 50

    run(main, workers=workers)


@MANY
def test_as_completed_gives_each_task_once_and_when_any_and_all_their_results(workers):
    async def main():
        async def work(number):
            for _ in range(number % 4):
                await flowcoro.checkpoint()
            return number

        async def ask(start):
            found = []
            async for task in flowcoro.as_completed(*(work(start + index) for index in range(10))):
                found.append(task.result())
            assert sorted(found) == list(range(start, start + 10))
            assert await flowcoro.when_all(*(work(index) for index in range(10))) == list(range(10))
            index, value = await flowcoro.when_any(*(work(start + index) for index in range(10)))
            assert value == start + index

        await flowcoro.when_all(*(ask(start) for start in range(8)))

    run(main, workers=workers)


@MANY
def test_an_error_in_one_task_cancels_and_joins_those_on_other_workers(workers):
    async def main():
        begun, ended = [], []

        async def wait(number):
            begun.append(number)
            try:
                await flowcoro.sleep(PATIENCE)
            finally:
                ended.append(number)

        async def fail(number):
            if number == 0:
                while len(begun) < workers - 1:
                    await flowcoro.checkpoint()
                raise ValueError("planned")
            await wait(number)

        with pytest.raises(ExceptionGroup) as caught:
            await spread(workers, fail)
        assert caught.group_contains(ValueError, match="planned")
        assert sorted(begun) == sorted(ended) == list(range(1, workers))

    run(main, workers=workers)


@MANY
def test_tasks_that_spawn_tasks_when_main_returns_are_all_joined(workers):
    begun, ended = [], []

    async def grow(depth):
        begun.append(depth)
        try:
            for _ in range(3):
                if depth < 4:
                    flowcoro.spawn(grow(depth + 1))
                await flowcoro.checkpoint()
            await flowcoro.sleep(PATIENCE)
        finally:
            if depth < 4:
                flowcoro.spawn(grow(4))         # its first step is made all the same
            ended.append(depth)

    async def main():
        for _ in range(3):
            flowcoro.spawn(grow(0))
        for _ in range(5):
            await flowcoro.checkpoint()

    run(main, workers=workers)
    assert len(begun) >= 3 and sorted(begun) == sorted(ended)


@MANY
def test_groups_opened_on_all_workers_end_when_their_tasks_do(workers):
    async def main():
        async def tree(depth):
            if depth == 0:
                return 1
            async with flowcoro.TaskGroup() as group:
                tasks = [group.spawn(tree(depth - 1)) for _ in range(3)]
            return sum(task.result() for task in tasks)

        assert await tree(5) == 243

    run(main, workers=workers)


@MANY
def test_cancels_from_all_workers_at_once_end_every_task_once(workers):
    async def main():
        ended = []

        async def wait(number):
            try:
                while True:
                    await flowcoro.sleep(0.0005 if number % 2 else PATIENCE)
            finally:
                ended.append(number)

        async def cancel(number):
            for task in tasks:
                task.cancel()
                await flowcoro.checkpoint()

        tasks = [flowcoro.spawn(wait(number)) for number in range(30)]
        await flowcoro.checkpoint()
        await spread(workers, cancel)
        for task in tasks:
            with pytest.raises(flowcoro.TaskCancelled):
                await task
        assert sorted(ended) == list(range(30))

    run(main, workers=workers)


@SEVERAL
def test_a_deadline_moved_by_a_task_on_another_worker_is_kept(workers):
    async def main():
        async def use(number):
            if number == 0:
                with flowcoro.CancelScope() as scope:
                    scopes.append(scope)
                    await flowcoro.sleep(PATIENCE)
                return scope.cancelled_caught
            if number == 1:
                while not scopes:
                    await flowcoro.checkpoint()
                scopes.pop().deadline = flowcoro.now() + 0.001

        scopes = []
        for _ in range(4):
            assert (await spread(workers, use))[0]

    run(main, workers=workers)


@SEVERAL
def test_a_deadline_moved_while_its_worker_is_about_to_sleep_is_kept(workers, monkeypatch):
    """I5 for timers: between the look at the heap and the announcement that it sleeps another worker adds one."""
    about, moved = threading.Event(), threading.Event()
    original = flowcoro._Worker._poll

    def poll(self, timeout):
        if self is victim and timeout != 0 and not about.is_set():
            about.set()
            moved.wait(PATIENCE)
        return original(self, timeout)

    async def main():
        async def use(number):
            nonlocal victim
            if number == 0:
                with flowcoro.CancelScope() as scope:
                    scopes.append(scope)
                    victim = flowcoro.current_task()._worker
                    await flowcoro.sleep(PATIENCE)
                return scope.cancelled_caught, flowcoro.now()
            if number == 1:
                wait_until(about.is_set)
                scopes[0].deadline = flowcoro.now() + 0.001
                moved.set()
                before = flowcoro.now()
                await flowcoro.sleep(0.02)
                return before

        scopes = []
        (caught, late), before, *_ = await spread(workers, use)
        assert caught and late - before < PATIENCE / 2

    victim = None
    monkeypatch.setattr(flowcoro._Worker, "_poll", poll)
    run(main, workers=workers)


# ---- threads --------------------------------------------------------------------------------------------------

@MANY
def test_functions_in_threads_return_to_tasks_on_all_workers(workers):
    async def main():
        async def ask(number):
            return [await flowcoro.to_thread(lambda: number * index) for index in range(8)]

        assert await spread(workers, ask) == [[number * index for index in range(8)] for number in range(workers)]

    run(main, workers=workers)


@MANY
def test_threads_call_and_run_coroutines_in_the_kernel(workers):
    async def main():
        kernel, found = flowcoro.current_kernel(), []

        async def double(number):
            await flowcoro.checkpoint()
            return 2 * number

        def ask(number):
            for index in range(5):
                found.append(flowcoro.call_from_thread(lambda: number, kernel=kernel))
                found.append(flowcoro.run_from_thread(double(number), kernel=kernel))

        threads = [threading.Thread(target=ask, args=[number]) for number in range(4)]
        for thread in threads:
            thread.start()
        await flowcoro.when_all(*(flowcoro.to_thread(ask, number) for number in range(4, 8)))
        for thread in threads:
            await flowcoro.to_thread(thread.join)
        assert sorted(found) == sorted([number for number in range(8)] * 5 + [2 * number for number in range(8)] * 5)

    run(main, workers=workers)


@MANY
def test_what_a_thread_waits_for_is_cancelled_with_the_task_that_waits_for_the_thread(workers):
    async def main():
        async def wait():
            begun.append(True)
            await flowcoro.sleep(PATIENCE)

        async def ask(number):
            with flowcoro.CancelScope() as scope:
                flowcoro.spawn(cancel_once_begun(scope), pinned=True)
                await flowcoro.to_thread(flowcoro.run_from_thread, wait())
            return scope.cancelled_caught

        async def cancel_once_begun(scope):
            while len(begun) < workers:
                await flowcoro.sleep(0.001)
            scope.cancel()

        begun, before = [], flowcoro.now()
        assert await spread(workers, ask) == [True] * workers
        assert flowcoro.now() - before < PATIENCE / 2

    run(main, workers=workers)


@SEVERAL
def test_threads_that_ask_while_the_run_ends_get_an_answer_all_the_same(workers):
    outcomes = []

    async def nothing():
        return "done"

    def ask(kernel, begun):
        begun.set()
        try:
            while True:
                outcomes.append(flowcoro.run_from_thread(nothing(), kernel=kernel, timeout=PATIENCE))
        except (RuntimeError, flowcoro.TaskCancelled) as error:
            outcomes.append(type(error))

    async def main():
        kernel, begun = flowcoro.current_kernel(), threading.Event()
        threads.extend(threading.Thread(target=ask, args=[kernel, begun]) for _ in range(3))
        for thread in threads[-3:]:
            thread.start()
        while not begun.is_set():
            await flowcoro.checkpoint()

        async def use(number):
            await flowcoro.sleep(0.001 * number)

        await spread(workers, use)

    threads = []
    for _ in range(5):
        run(main, workers=workers)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@SEVERAL
def test_what_a_thread_asks_for_as_the_last_task_ends_elsewhere_is_refused(workers, monkeypatch):
    stop_all, called, stopped, outcome = flowcoro._Kernel._stop_all, threading.Event(), threading.Event(), []

    def stop(self):
        stop_all(self)
        stopped.set()

    def call():
        called.set()
        assert stopped.wait(PATIENCE)
        return flowcoro.spawn(never())

    async def never():
        raise AssertionError("it ran")

    def ask(kernel):
        with pytest.raises(RuntimeError) as caught:
            flowcoro.call_from_thread(call, kernel=kernel)
        outcome.append(str(caught.value))

    async def last(started):
        started.set_result(None)
        try:
            await flowcoro.sleep(PATIENCE)
        finally:                                # main has ended
            thread.append(threading.Thread(target=ask, args=[flowcoro.current_kernel()]))
            thread[0].start()
            wait_until(called.is_set)

    async def begin(number, starts):
        with contextlib.suppress(IndexError):
            if threading.current_thread() is not threading.main_thread():
                flowcoro.spawn(last(starts.pop()), pinned=True)

    async def main():
        started = flowcoro.Promise()
        await spread(workers, begin, [started])
        await started

    thread = []
    monkeypatch.setattr(flowcoro._Kernel, "_stop_all", stop)
    flowcoro.run(main(), workers=workers)
    thread[0].join(PATIENCE)
    assert outcome and "not open" in outcome[0]


# ---- descriptors ----------------------------------------------------------------------------------------------

@contextlib.contextmanager
def pipe():
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    try:
        yield read, write
    finally:
        os.close(read)
        os.close(write)


async def read(pollable, size):
    while True:
        try:
            return os.read(pollable.fd, size)
        except BlockingIOError:
            pollable.readable = False
            await pollable.wait_readable()


async def write(pollable, data):
    while data:
        try:
            data = data[os.write(pollable.fd, data):]
        except BlockingIOError:
            pollable.writable = False
            await pollable.wait_writable()


@MANY
def test_pairs_of_sockets_carry_bytes_between_tasks_on_different_workers(workers):
    async def main():
        pairs = [socket.socketpair() for _ in range(workers)]
        for end in itertools.chain(*pairs):
            end.setblocking(False)
        ends = [(flowcoro.Pollable(near), flowcoro.Pollable(far)) for near, far in pairs]

        async def use(number):
            mine, its = ends[number][0], ends[(number + 1) % workers][1]
            async with flowcoro.TaskGroup(pinned=bool(number % 2)) as group:
                group.spawn(write(mine, bytes([number]) * 300_000))
                received = 0
                while received < 300_000:
                    data = await read(its, 65536)
                    assert set(data) == {(number + 1) % workers}
                    received += len(data)

        await spread(workers, use)
        for pollable in itertools.chain(*ends):
            pollable.close()
        for end in itertools.chain(*pairs):
            end.close()

    run(main, workers=workers)


@MANY
def test_a_ping_pong_over_pipes_between_workers_loses_no_edge(workers):
    async def main():
        with contextlib.ExitStack() as stack:
            pipes = [stack.enter_context(pipe()) for _ in range(workers)]

            async def player(number):
                pollable = pollables[number] = flowcoro.Pollable(pipes[number][0])
                for index in range(30):
                    if number == 0:
                        os.write(pipes[1 % workers][1], b"x")
                    assert await read(pollable, 10) == b"x"
                    if number:
                        os.write(pipes[(number + 1) % workers][1], b"x")

            pollables = {}
            await spread(workers, player)
            for pollable in pollables.values():
                pollable.close()

    run(main, workers=workers)


@SEVERAL
def test_an_edge_that_another_worker_sees_between_a_failed_read_and_the_wait_is_not_lost(workers):
    async def main():
        async def use(number):
            if number == 0:
                mine.append(flowcoro.Pollable(fds[0]))
                while mine:
                    await flowcoro.sleep(0.001)
            elif number == 1:
                while not mine:
                    await flowcoro.checkpoint()
                pollable = mine[0]
                with pytest.raises(BlockingIOError):
                    os.read(fds[0], 1)
                pollable.readable = False
                os.write(fds[1], b"x")
                wait_until(lambda: pollable.readable)       # the other worker has polled
                pollable.readable = False
                with flowcoro.move_on_after(PATIENCE / 3) as scope:
                    await pollable.wait_readable()
                mine.clear()
                pollable.close()
                assert not scope.cancelled_caught, "nobody told of what is there to read"

        mine = []
        with pipe() as fds:
            await spread(workers, use)

    run(main, workers=workers)


@SEVERAL
@pytest.mark.parametrize("how", ["Pollable", "plain"])
def test_a_descriptor_closed_on_one_worker_wakes_who_waits_on_another(workers, how):
    async def main():
        async def use(number):
            if number == 0:
                with pytest.raises(flowcoro.ClosedError):
                    if how == "plain":
                        waiting.append(flowcoro.current_task())
                        await flowcoro.wait_readable(fds[0])
                    else:
                        pollables.append(flowcoro.Pollable(fds[0]))
                        pollables[0].readable = False
                        waiting.append(flowcoro.current_task())
                        await pollables[0].wait_readable()
            elif number == 1:
                while not waiting or waiting[0].state != "parked":
                    await flowcoro.checkpoint()
                if how == "plain":
                    flowcoro.notify_closing(fds[0])
                else:
                    pollables.pop().close()

        waiting, pollables = [], []
        with pipe() as fds:
            for _ in range(5):
                await spread(workers, use)
                waiting.clear()

    run(main, workers=workers)


@SEVERAL
def test_plain_descriptors_wait_on_whichever_worker_the_task_is(workers):
    async def main():
        async def use(number):
            with pipe() as (near, far):
                for _ in range(5):
                    async with flowcoro.TaskGroup() as group:
                        group.spawn(later(far))
                        await flowcoro.wait_readable(near)
                    assert os.read(near, 10) == b"x"
                await flowcoro.wait_writable(far)
                flowcoro.notify_closing(near)
                flowcoro.notify_closing(far)

        async def later(far):
            await flowcoro.checkpoint()
            os.write(far, b"x")

        await spread(workers, use)

    run(main, workers=workers)


@SEVERAL
def test_several_workers_do_with_a_selector_that_knows_no_edges(workers, monkeypatch):
    import selectors
    monkeypatch.setattr(flowcoro.selectors, "DefaultSelector", selectors.PollSelector)

    async def main():
        async def use(number):
            with pipe() as (near, far):
                pollable = flowcoro.Pollable(near)
                async with flowcoro.TaskGroup() as group:
                    group.spawn(flowcoro.to_thread(os.write, far, b"y"))
                    time.sleep(0.02)            # the others look after this one's descriptors
                    assert await read(pollable, 10) == b"y"
                pollable.close()

        await spread(workers, use)

    run(main, workers=workers)


@pytest.mark.parametrize("how", ["closed", "another file"])
def test_a_wait_that_begins_between_notify_closing_and_the_close_on_another_worker_ends(how):
    async def main():
        with pipe() as (near, far), pipe() as (other, _):
            flowcoro.notify_closing(near)
            task = flowcoro.spawn(flowcoro.wait_readable(near))
            wait_until(lambda: flowcoro.statistics()["io_waiting"] == 1)        # on another worker: this one is in a step
            if how == "closed":
                os.close(near)
            else:
                os.dup2(other, near)
            with pytest.raises((flowcoro.ClosedError, OSError), match="was closed"):
                await task
            flowcoro.notify_closing(near)
            if how == "closed":
                os.dup2(other, near)            # to be closed at the end

    run(main, workers=2)


@MANY
def test_a_wait_for_an_object_that_was_closed_as_it_began_is_told_so(workers):
    class File:
        """Closed by another worker after its number was asked for once."""

        def __init__(self, number):
            self.numbers = [number]

        def fileno(self):
            return self.numbers.pop() if self.numbers else -1

    async def main():
        near, far = os.pipe()
        with pytest.raises(flowcoro.ClosedError, match="has been closed here"):
            await flowcoro.wait_readable(File(near))
        assert flowcoro.statistics()["io_waiting"] == 0
        flowcoro.notify_closing(near)
        os.close(near)
        os.close(far)

    run(main, workers=max(workers, 2))


# ---- pools ----------------------------------------------------------------------------------------------------

@MANY
@pytest.mark.parametrize("debug", [False, True])
def test_a_pool_lends_each_object_to_one_task_at_a_time_and_counts_right(workers, debug):
    class Thing:
        user = None

    async def main():
        pool = flowcoro.ObjectPool(Thing, 2, debug=debug)

        async def use(number):
            for _ in range(150):
                with pool.borrow() as thing:
                    assert thing.user is None
                    thing.user = number
                    other = pool.acquire()
                    assert thing.user == number
                    pool.release(other)
                    thing.user = None

        await spread(workers, use)
        statistics = pool.statistics()
        assert statistics["in_use"] == 0
        assert statistics["made"] + statistics["reused"] == 300 * workers
        assert statistics["made"] == statistics["dropped"] + statistics["free"]

    run(main, workers=workers)


# ---- stuck workers, pinned tasks ------------------------------------------------------------------------------

@SEVERAL
@pytest.mark.parametrize("gil", [True, False])
def test_ready_tasks_of_a_stuck_worker_are_stepped_by_others(workers, gil, monkeypatch):
    monkeypatch.setattr(flowcoro, "_has_gil", lambda: gil)

    async def main():
        gate, order = threading.Event(), []

        async def stuck():
            order.append("stuck")
            assert gate.wait(PATIENCE)
            order.append("free")

        async def open_it():
            order.append("opened")
            gate.set()

        for _ in range(3):
            gate.clear()
            order.clear()
            await flowcoro.when_all(stuck(), open_it())
            assert set(order) == {"stuck", "opened", "free"} and order[-1] == "free"

    run(main, workers=workers)


@SEVERAL
@pytest.mark.parametrize("gil", [True, False])
def test_timers_of_a_stuck_worker_are_kept_by_others(workers, gil, monkeypatch):
    monkeypatch.setattr(flowcoro, "_has_gil", lambda: gil)

    async def main():
        async def sleeper(gate, parked):
            parked.set()
            await flowcoro.sleep(0.002)
            gate.set()

        async def stuck(number):
            gate, parked = threading.Event(), flowcoro.Event()
            async with flowcoro.TaskGroup() as group:
                group.spawn(sleeper(gate, parked))
                await parked.wait()
                assert gate.wait(PATIENCE)

        for number in range(4):
            await stuck(number)

    run(main, workers=workers)


@SEVERAL
def test_descriptors_of_a_stuck_worker_are_polled_by_others(workers):
    async def main():
        gate = threading.Event()

        async def reader(near):
            pollable = flowcoro.Pollable(near)
            await read(pollable, 1)
            pollable.close()
            gate.set()

        with pipe() as (near, far):
            async with flowcoro.TaskGroup() as group:
                task = group.spawn(reader(near))
                while task.state != "parked":
                    await flowcoro.checkpoint()
                os.write(far, b"x")
                assert gate.wait(PATIENCE)

    run(main, workers=workers)


async def awaits_a_function(gate):
    await flowcoro.to_thread(time.sleep, 0.001)
    gate.set()


async def awaits_a_promise(gate):
    promise = flowcoro.Promise()
    threading.Timer(0.001, promise.set_result, [None]).start()
    await promise
    gate.set()


async def lets_a_thread_call(gate):
    threading.Timer(0.001, flowcoro.call_from_thread, [gate.set], {"kernel": flowcoro.current_kernel()}).start()


async def lets_a_thread_run_a_coroutine(gate):
    async def open_it():
        await flowcoro.checkpoint()
        gate.set()

    threading.Timer(0.001, flowcoro.run_from_thread, [open_it()], {"kernel": flowcoro.current_kernel()}).start()


@SEVERAL
@pytest.mark.parametrize("opens", [awaits_a_function, awaits_a_promise, lets_a_thread_call, lets_a_thread_run_a_coroutine])
def test_what_threads_have_for_a_stuck_worker_is_taken_by_others(workers, opens):
    async def main():
        for _ in range(3):
            gate = threading.Event()
            async with flowcoro.TaskGroup() as group:
                task = group.spawn(opens(gate))
                while task.state not in ("parked", "done"):
                    await flowcoro.checkpoint()
                assert gate.wait(PATIENCE)

    threads = strangers()
    run(main, workers=workers)
    for thread in strangers() - threads:        # the timers, which have had their answers
        thread.join(PATIENCE)


@SEVERAL
def test_ctrl_c_cancels_the_tasks_of_others_while_main_is_stuck(workers):
    gate = threading.Event()

    async def wait(number):
        try:
            await flowcoro.sleep(PATIENCE)
        finally:
            gate.set()

    async def main():
        async with flowcoro.TaskGroup() as group:
            task = group.spawn(wait(0))
            while task.state != "parked":
                await flowcoro.checkpoint()
            timer.start()
            assert gate.wait(PATIENCE)
            stuck.append(threading.current_thread())

    stuck, timer = [], threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main(), workers=workers)
    timer.join()
    assert len(stuck) == 1


@pytest.mark.parametrize("workers", [3, 8])
def test_when_all_but_one_are_stuck_the_last_one_serves_all(workers):
    async def main():
        gate, stuck = threading.Event(), []

        async def block():
            stuck.append(threading.get_ident())
            assert gate.wait(PATIENCE)

        async def open_it():
            while len(stuck) < workers - 1:
                await flowcoro.sleep(0.001)
            await flowcoro.sleep(0.001)
            gate.set()

        for _ in range(3):
            stuck.clear()
            gate.clear()
            await flowcoro.when_all(*(block() for _ in range(workers - 1)), open_it())
            assert len(set(stuck)) == workers - 1

    run(main, workers=workers)


@pytest.mark.parametrize("workers", [3, 8])
@pytest.mark.parametrize("gil", [True, False])
def test_whoever_looks_after_the_others_leaves_it_to_another_when_it_works_itself(workers, gil, monkeypatch):
    """The keeper is woken by its own timer, or by a thread, and is stuck then."""
    monkeypatch.setattr(flowcoro, "_has_gil", lambda: gil)

    async def main():
        async def stuck(wait):
            gate = threading.Event()
            async with flowcoro.TaskGroup() as group:
                group.spawn(open_it(gate))
                await wait()
                assert gate.wait(PATIENCE)

        async def open_it(gate):
            await flowcoro.sleep(0.005)
            gate.set()

        for _ in range(3):
            await stuck(functools.partial(flowcoro.sleep, 0.003))
            await stuck(functools.partial(flowcoro.to_thread, time.sleep, 0.003))

        async def each(number):
            await stuck(functools.partial(flowcoro.sleep, 0.003))

        await spread(workers - 1, each)

    run(main, workers=workers)


@MANY
def test_pinned_tasks_stay_in_one_thread_and_others_move(workers):
    async def main():
        threads, pinned_threads = set(), []

        async def pinned():
            mine = set()
            for index in range(40):
                mine.add(threading.get_ident())
                if index % 8 == 0:
                    await flowcoro.sleep(0.0002)
                elif index % 8 == 4:
                    async with lock:
                        await flowcoro.checkpoint()
                else:
                    await flowcoro.checkpoint()
            pinned_threads.append(mine)

        async def free():
            for _ in range(40):
                threads.add(threading.get_ident())
                async with lock:
                    await flowcoro.checkpoint()

        async def meet(number):
            threads.add(threading.get_ident())

        lock = flowcoro.Lock()
        async with flowcoro.TaskGroup(pinned=True) as everyone:
            everyone.spawn(pinned())
            flowcoro.spawn(pinned(), pinned=True)
            async with flowcoro.TaskGroup() as group:
                group.spawn(pinned(), pinned=True)
                for _ in range(4):
                    group.spawn(free())
        await spread(workers, meet)
        while len(pinned_threads) < 3:
            await flowcoro.checkpoint()
        assert [len(mine) for mine in pinned_threads] == [1, 1, 1]
        assert len(threads) == workers

    run(main, workers=workers)


@MANY
def test_whether_a_task_is_pinned_is_true_or_false_whatever_was_given(workers):
    async def main():
        async with flowcoro.TaskGroup(pinned="in this group") as pinning, flowcoro.TaskGroup(pinned=None) as group:
            tasks = [flowcoro.current_task(), pinning.spawn(flowcoro.sleep(0)), group.spawn(flowcoro.sleep(0), pinned=1),
                     group.spawn(flowcoro.sleep(0), pinned=[]), flowcoro.spawn(flowcoro.sleep(0), pinned=0)]
            assert [task.pinned for task in tasks] == [True, True, True, False, False]
            assert {type(task.pinned) for task in tasks} == {bool}

    run(main, workers=workers)


@SEVERAL
def test_a_pinned_task_waits_for_its_stuck_worker(workers):
    async def main():
        gate, order = threading.Event(), []

        async def pinned():
            order.append("pinned")

        async def free():
            order.append("free")
            gate.set()

        async with flowcoro.TaskGroup() as group:
            group.spawn(pinned(), pinned=True)
            group.spawn(free())
            assert gate.wait(PATIENCE)
            await flowcoro.checkpoint()
        assert order == ["free", "pinned"]

    run(main, workers=workers)


# ---- what follows a task --------------------------------------------------------------------------------------

@MANY
def test_main_stays_in_the_thread_that_called_run(workers):
    async def main():
        async def other(number):
            assert flowcoro.current_task().pinned
            await flowcoro.sleep(0)
            channel.send_nowait(number)

        channel, here = flowcoro.Channel(workers), threading.current_thread()
        assert flowcoro.current_task().pinned
        task = flowcoro.spawn(flowcoro.sleep(0))
        assert not task.pinned
        for _ in range(10):
            await spread(workers, other)
            for _ in range(workers):
                await channel.receive()
                assert threading.current_thread() is here

    flowcoro.run(main(), workers=workers)


@MANY
def test_waiting_until_all_tasks_are_parked_waits_for_steps_on_other_workers(workers):
    async def main():
        async def work(number):
            time.sleep(0.01 * number)
            stepped.append(number)
            await event.wait()

        event, stepped = flowcoro.Event(), []
        task = flowcoro.spawn(spread(workers, work))
        await wait_all_tasks_parked()
        assert sorted(stepped) == list(range(workers))
        event.set()
        await task

    run(main, workers=workers)


@MANY
def test_context_variables_follow_their_task_over_the_workers(workers):
    async def main():
        async def task(number):
            variable.set(number)
            for _ in range(20):
                await flowcoro.checkpoint()
                assert variable.get() == number
            async with flowcoro.TaskGroup() as group:
                group.spawn(child(number))
            assert await flowcoro.to_thread(variable.get) == number

        async def child(number):
            assert variable.get() == number
            variable.set("child")

        await flowcoro.when_all(*(task(number) for number in range(10)))
        assert variable.get() == "unset"

    run(main, workers=workers)


@MANY
def test_async_generators_left_on_any_worker_are_finalised(workers):
    opened, closed = [], []

    async def numbers(who):
        opened.append(who)
        try:
            for number in itertools.count():
                yield number
                await flowcoro.checkpoint()
        finally:
            closed.append(who)
            await flowcoro.checkpoint()

    async def main():
        kept = []

        async def leave(number):
            async for value in numbers((number, "dropped")):
                if value == 3:
                    break
            generator = numbers((number, "kept"))
            kept.append(generator)
            await anext(generator)

        await spread(workers, leave)
        await flowcoro.when_all(*(leave(number) for number in range(workers, workers + 5)))
        gc.collect()

    run(main, workers=workers)
    assert sorted(opened) == sorted(closed) and len(opened) == 2 * (workers + 5)


@SEVERAL
def test_hooks_hear_of_every_task_and_of_those_that_were_stolen(workers):
    class Hooks:
        def __init__(self):
            self.spawned, self.done, self.stolen, self.parked, self.polled = [], [], [], [], []

        def task_spawned(self, task):
            self.spawned.append(task.name)

        def task_done(self, task):
            self.done.append(task.name)

        def task_stolen(self, task, victim):
            self.stolen.append((task.name, victim))

        def task_parked(self, task, reason):
            self.parked.append(reason)

        def before_poll(self, timeout):
            self.polled.append(timeout)

    async def main():
        meeting = threading.Barrier(workers)

        async def meet():
            meeting.wait(PATIENCE)
            await flowcoro.sleep(0.001)

        flowcoro.add_hooks(hooks)
        async with flowcoro.TaskGroup() as group:
            for number in range(workers):
                group.spawn(meet(), name=str(number))
        flowcoro.remove_hooks(hooks)

    hooks = Hooks()
    run(main, workers=workers)
    names = [str(number) for number in range(workers)]
    assert hooks.spawned == names and sorted(hooks.done) == names
    assert len(hooks.stolen) >= workers - 1 and {name for name, _ in hooks.stolen} <= {*names, "main", "run.<locals>.main"}
    assert all(victim is not None for _, victim in hooks.stolen)
    assert hooks.parked.count("sleep") == workers and hooks.polled


@SEVERAL
def test_hooks_come_and_go_on_all_workers_at_once(workers, reports):
    class Hooks:
        def task_rescheduled(self, task):
            calls.append(task)

        def before_poll(self, timeout):
            pass

    async def main():
        async def use(number):
            for _ in range(30):
                hooks = Hooks()
                flowcoro.add_hooks(hooks)
                await flowcoro.sleep(0.0001)
                flowcoro.remove_hooks(hooks)

        await spread(workers, use)
        assert flowcoro.current_kernel().hooks is None
        await flowcoro.checkpoint()

    calls = []
    run(main, workers=workers)
    assert calls and reports == []


@MANY
def test_statistics_and_runtime_info_speak_of_all_workers(workers):
    async def main():
        async def use(number):
            seen.append(flowcoro.statistics())
            await flowcoro.sleep(0.001)

        seen = []
        before = flowcoro.statistics()["tasks"]
        await spread(workers, use)
        after = flowcoro.statistics()
        assert before["alive"] == 1 and before["finished"] == 0
        assert after["tasks"]["alive"] == 1
        assert after["tasks"]["spawned"] == 1 + 2 * workers and after["tasks"]["finished"] == 2 * workers
        assert all(1 <= numbers["tasks"]["alive"] <= 1 + 2 * workers for numbers in seen)
        assert all(numbers["tasks"]["spawned"] - numbers["tasks"]["finished"] >= 1 for numbers in seen)
        assert after["workers"]["count"] == workers and 0 <= after["workers"]["asleep"] < workers
        assert after["workers"]["stolen"] >= 0
        assert flowcoro.runtime_info()["workers"] == workers
        with pipe() as (near, far):
            pollable = flowcoro.Pollable(near)
            assert flowcoro.statistics()["descriptors"] == 1
            pollable.close()
        return after

    assert flowcoro.runtime_info()["workers"] == 0
    run(main, workers=workers)


@MANY
def test_the_tree_of_tasks_can_be_dumped_while_all_workers_work(workers):
    async def main():
        async def busy(number):
            for _ in range(10):
                async with flowcoro.TaskGroup() as group:
                    for _ in range(3):
                        group.spawn(flowcoro.sleep(0.0002))

        async def dump():
            for _ in range(10):
                assert "main" in flowcoro.dump_tasks()
                await flowcoro.checkpoint()

        await flowcoro.when_all(*(busy(number) for number in range(5)), dump(), dump())

    run(main, workers=workers)


# ---- the end --------------------------------------------------------------------------------------------------

@SEVERAL
def test_a_worker_that_is_about_to_sleep_when_the_last_task_ends_does_not_sleep(workers, monkeypatch):
    """I5 for the end of the run: it has seen no end yet, and has not said yet that it sleeps."""
    poll, stop_all = flowcoro._Worker._poll, flowcoro._Kernel._stop_all
    about, stopped = threading.Event(), threading.Event()

    def slow_poll(self, timeout):
        if self is self.kernel.workers[-1] and timeout != 0:
            about.set()
            stopped.wait(PATIENCE)
        return poll(self, timeout and flowcoro.LONGEST_POLL)        # as one who does not look after the others

    def stop(self):
        stop_all(self)
        stopped.set()

    async def main():
        wait_until(about.is_set)

    monkeypatch.setattr(flowcoro._Worker, "_poll", slow_poll)
    monkeypatch.setattr(flowcoro._Kernel, "_stop_all", stop)
    run(main, workers=workers)


@SEVERAL
def test_short_runs_one_after_the_other_leave_no_thread_and_no_descriptor(workers):
    async def main():
        await flowcoro.when_all(*(flowcoro.checkpoint() for _ in range(3)))
        return flowcoro.now()

    threads, files = strangers(), descriptors()
    for _ in range(10):
        run(main, workers=workers)
        assert strangers() == threads and descriptors() == files


@SEVERAL
def test_a_deadlock_is_reported_whichever_workers_the_tasks_are_on(workers):
    faulthandler.cancel_dump_traceback_later()      # its thread might wake somebody, for all the kernel knows

    async def main():
        async def wait(number):
            await flowcoro.Event().wait()

        await spread(workers, wait)

    async def run_main():
        await main()

    with pytest.raises(flowcoro.Deadlock, match="wait for an Event"):
        flowcoro.run(run_main(), workers=workers)


@SEVERAL
def test_tasks_that_nothing_can_wake_are_closed_by_force_with_what_they_hold(workers, reports):
    faulthandler.cancel_dump_traceback_later()      # its thread might wake somebody, for all the kernel knows

    async def main():
        lock = flowcoro.Lock()

        async def stubborn(number):
            async with lock:
                while True:
                    try:
                        await flowcoro.Event().wait()
                    except flowcoro.Cancelled:
                        with flowcoro.CancelScope(shield=True):
                            await flowcoro.park(park_for_good)

        def park_for_good(task):
            task.park_reason = "for good"
            task.abort_function = lambda task: False

        await spread(workers, stubborn)

    async def run_main():
        await main()

    with pytest.raises(flowcoro.Deadlock):
        flowcoro.run(run_main(), workers=workers)
    messages = [message for message, error in reports]
    assert {"flowcoro: a task was closed by force"} <= set(messages) <= {
        "flowcoro: a task was closed by force", "flowcoro: a scope was never left"}


@SEVERAL
def test_no_deadlock_is_reported_while_a_worker_is_in_a_step(workers):
    async def main():
        event, free = flowcoro.Event(), threading.Event()

        async def work():
            free.wait(0.3)          # longer than all looks of those who sleep
            event.set()

        async with flowcoro.TaskGroup() as group:
            group.spawn(work())
            await event.wait()

    async def run_main():
        await main()

    flowcoro.run(run_main(), workers=workers)


@SEVERAL
def test_ctrl_c_ends_the_run_after_the_cleanup_on_all_workers(workers):
    begun, cleaned = [], []

    async def work(number):
        begun.append(number)
        try:
            await flowcoro.sleep(PATIENCE)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(0.001)
            cleaned.append(number)

    async def interrupt():
        while len(begun) < workers:
            await flowcoro.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        await flowcoro.sleep(PATIENCE)

    async def main():
        flowcoro.spawn(interrupt())
        await spread(workers, work)

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main(), workers=workers)
    assert sorted(begun) == sorted(cleaned) == list(range(workers))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@SEVERAL
def test_a_second_ctrl_c_goes_through_the_shields_on_all_workers(workers):
    begun, ended = [], []

    async def work(number):
        begun.append(number)
        try:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(PATIENCE)
        finally:
            ended.append(number)

    async def main():
        def interrupt():
            for interrupts in range(2):
                wait_until(lambda: len(begun) == workers and kernel.signals.interrupts == interrupts)
                assert ended == []
                os.kill(os.getpid(), signal.SIGINT)

        kernel = flowcoro.current_kernel()
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            await spread(workers, work)
        finally:
            thread.join()

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main(), workers=workers)
    assert sorted(begun) == sorted(ended) == list(range(workers))


@SEVERAL
def test_ctrl_c_reaches_workers_that_are_all_asleep(workers):
    async def main():
        thread = threading.Thread(target=lambda: (time.sleep(0.05), os.kill(os.getpid(), signal.SIGINT)))
        thread.start()
        try:
            await flowcoro.sleep(PATIENCE)
        finally:
            thread.join()

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main(), workers=workers)


def child(script, *, code=0):
    """Run a script in a process of its own; what it has printed."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], cwd=ROOT, timeout=2 * PATIENCE,
                          capture_output=True, text=True)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout + done.stderr


def test_a_raised_sigint_ends_a_program_of_several_workers_with_a_keyboard_interrupt():
    assert "clean" in child("""
        import flowcoro, signal, sys
        flowcoro._has_gil = lambda: False
        async def main():
            try:
                async with flowcoro.TaskGroup() as group:
                    for _ in range(10):
                        group.spawn(flowcoro.sleep(30))
                    await flowcoro.sleep(0.01)
                    signal.raise_signal(signal.SIGINT)
            finally:
                print("clean")
        try:
            flowcoro.run(main(), workers=3)
        except KeyboardInterrupt:
            sys.exit(3)
        """, code=3)


def test_sigterm_ends_a_program_of_several_workers():
    assert "asked" in child("""
        import flowcoro, os, signal
        async def main():
            async with flowcoro.TaskGroup() as group:
                group.spawn(flowcoro.sleep(0.01))
                os.kill(os.getpid(), signal.SIGTERM)
                await flowcoro.stop_requested()
                print("asked")
        flowcoro.run(main(), workers=3)
        """)


FORK = """
    import flowcoro, os, sys, threading
    flowcoro._has_gil = lambda: False
    async def fork():
        pid = os.fork()
        if pid == 0:
            await flowcoro.checkpoint()
            print("the child came back")
        _, status = os.waitpid(pid, 0)
        print("the child has ended with", os.waitstatus_to_exitcode(status), flush=True)
        return await flowcoro.when_all(*(flowcoro.sleep(0.001, ) for _ in range(5)))
    async def main():
        meeting = threading.Barrier(3)
        async def begin(number):
            meeting.wait(30)
            async with flowcoro.TaskGroup(pinned=True) as group:
                if (threading.current_thread() is threading.main_thread()) == MAIN:
                    if not done:
                        done.append(True)
                        group.spawn(fork())
                else:
                    group.spawn(flowcoro.sleep(0.01))
        done = []
        await flowcoro.when_all(*(begin(number) for number in range(3)))
        print("the parent goes on", flush=True)
    try:
        flowcoro.run(main(), workers=3)
    except RuntimeError as error:
        print(error, flush=True)
        sys.exit(1)
    """


@pytest.mark.parametrize("where", [True, False], ids=["first worker", "another worker"])
def test_the_child_of_a_fork_leaves_the_kernel_with_an_error_and_the_parent_goes_on(where):
    text = child(FORK.replace("MAIN", str(where)))
    assert "forked inside flowcoro.run()" in text and "the child came back into the kernel" in text
    assert "the child has ended with 1" in text and "the parent goes on" in text
    assert "the child came back\n" not in text


def test_the_child_of_a_fork_can_run_several_workers_of_its_own():
    assert "42" in child("""
        import flowcoro, os
        async def answer():
            return sum(await flowcoro.when_all(*(number() for _ in range(42))))
        async def number():
            await flowcoro.checkpoint()
            return 1
        async def main():
            await flowcoro.sleep(0.01)
            pid = os.fork()
            if pid == 0:
                print(flowcoro.run(answer(), workers=3), flush=True)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        flowcoro.run(main(), workers=3)
        """)


@SEVERAL
@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("times", [1, 10 ** 6], ids=["once", "for ever"])
def test_an_error_in_a_worker_s_own_loop_ends_the_run_with_it_and_all_tasks_joined(workers, which, times, monkeypatch,
                                                                                  reports):
    begun, ended = [], []

    async def work(number):
        begun.append(number)
        try:
            while True:
                await flowcoro.sleep(0.002)
        finally:
            ended.append(number)

    async def main():
        async def breaker():
            while len(begun) < workers:
                await flowcoro.sleep(0.001)
            poller, left = flowcoro.current_kernel().workers[0 if which == "first" else -1].poller, [None] * times
            wait = poller.wait

            def broken(timeout):
                if left:
                    left.pop()
                    raise OSError("planned")
                return wait(timeout)

            poller.wait = broken

        flowcoro.spawn(breaker())
        await spread(workers, work)

    with pytest.raises(OSError, match="planned"):
        flowcoro.run(main(), workers=workers)
    assert sorted(begun) == sorted(ended) == list(range(workers))


@pytest.mark.parametrize("workers", [0, -1, 10 ** 6, 1.5, "2", 2.0, [], float("nan"), True, False])
def test_a_number_of_workers_that_makes_no_sense_is_refused(workers):
    async def main():
        raise AssertionError("it ran")

    with pytest.raises(ValueError, match=re.escape(f"workers={workers!r}")):
        flowcoro.run(main(), workers=workers)


def test_no_number_of_workers_means_the_usable_cores_where_there_is_no_gil():
    async def main():
        return len(flowcoro.current_kernel().workers)

    assert run(main, workers=None) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("options", [{"clock": time}, {"seed": 7}])
def test_a_clock_or_a_seed_goes_with_one_worker_only(options):
    async def main():
        raise AssertionError("it ran")

    with pytest.raises(ValueError, match="one worker"):
        flowcoro.run(main(), workers=2, **options)


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_a_worker_s_thread_that_cannot_be_started_leaves_nothing_behind(failing, monkeypatch):
    start, started = threading.Thread.start, []

    def limited(self):
        started.append(self)
        if len(started) == failing:
            raise RuntimeError("can't start new thread")
        start(self)

    async def main():
        raise AssertionError("it ran")

    threads, files = strangers(), descriptors()
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match=f"only {failing} of 8 workers could be started: can't start new thread"):
        flowcoro.run(main(), workers=8)
    assert strangers() == threads and descriptors() == files


def test_a_worker_that_gets_no_descriptors_leaves_nothing_behind(monkeypatch):
    opened, new_poller = [], flowcoro._new_poller

    def limited():
        opened.append(True)
        if len(opened) == 3:
            raise OSError(24, "Too many open files")
        return new_poller()

    async def main():
        raise AssertionError("it ran")

    threads, files = strangers(), descriptors()
    monkeypatch.setattr(flowcoro, "_new_poller", limited)
    with pytest.raises(OSError, match="Too many open files"):
        flowcoro.run(main(), workers=4)
    assert strangers() == threads and descriptors() == files


@pytest.mark.parametrize("what", ["sleep", "thread"])
def test_an_idle_kernel_of_eight_workers_costs_next_to_nothing(what):
    async def main():
        await flowcoro.sleep(0.05)              # the threads have begun
        before = time.process_time()
        if what == "sleep":
            await flowcoro.sleep(0.25)
        else:
            await flowcoro.to_thread(time.sleep, 0.25)
        return time.process_time() - before

    assert run(main, workers=8) < 0.05


@MANY
def test_the_interpreter_ends_while_a_kernel_runs_in_a_daemon_thread(workers):
    said = child(f"""
        import flowcoro, threading, time

        async def sleeper():
            while True:
                await flowcoro.sleep(0.001)

        async def main():
            for _ in range(5):
                flowcoro.spawn(sleeper())
            await flowcoro.to_thread(ready.set)
            while True:
                await flowcoro.checkpoint()

        def serve():
            flowcoro.run(main(), workers={workers}, watchdog=True)

        ready = threading.Event()
        threading.Thread(target=serve, daemon=True).start()
        ready.wait()
        time.sleep(0.02)
        print("the end")
    """)
    assert said == "the end\n"


def test_two_kernels_of_several_workers_run_side_by_side():
    async def main(base):
        async def work(number):
            await flowcoro.sleep(0.001)
            return base + number

        return await flowcoro.when_all(*(work(number) for number in range(20)))

    outcomes = {}
    threads = [threading.Thread(target=lambda base=base: outcomes.update({base: run(main, base, workers=3)}))
               for base in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert outcomes == {base: list(range(base, base + 20)) for base in (0, 100, 200)}
