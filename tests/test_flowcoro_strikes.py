"""An error of a signal handler, with several workers, at each place where one can come: no task and no call is lost.

The interpreter calls handlers in the main thread, as a function begins, after a call, and before it jumps back. A trace function
that raises at the first, the second, … of those places finds each of them, in one thread and in the same order every time.
"""

import contextlib
import dis
import os
import signal
import sys
import textwrap
import threading
import time
from collections import Counter

import pytest

import flowcoro
import flowcoro_net
from conftest import PLAIN, take_off_the_guard
from test_flowcoro_signals import Child
from test_flowcoro_workers import PATIENCE, descriptors, pipe, run, wait_until


class Struck(Exception):
    pass


class Strike:
    """In its `with` block: raise Struck at the place number `at` of those in the functions given."""

    TOOL = 4                    # one that belongs to nobody

    def __init__(self, at, *functions):
        self.at, self.codes, self.before, self.came = at, {function.__code__ for function in functions}, {}, False

    def __enter__(self):
        if sys.version_info < (3, 12):
            self.old = sys.gettrace()
            sys.settrace(self.call)
        else:                                           # where tracing may miss the first call of a function
            self.thread, monitoring = threading.get_ident(), sys.monitoring
            monitoring.use_tool_id(self.TOOL, "strikes")
            monitoring.register_callback(self.TOOL, monitoring.events.INSTRUCTION, self.instruction)
            for code in self.codes:
                monitoring.set_local_events(self.TOOL, code, monitoring.events.INSTRUCTION)

    def __exit__(self, kind, error, trace):
        if sys.version_info < (3, 12):
            sys.settrace(self.old)
        else:
            for code in self.codes:
                sys.monitoring.set_local_events(self.TOOL, code, 0)
            sys.monitoring.register_callback(self.TOOL, sys.monitoring.events.INSTRUCTION, None)
            sys.monitoring.free_tool_id(self.TOOL)
        return kind is Struck

    def call(self, frame, event, argument):
        if frame.f_code not in self.codes:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self.step

    def step(self, frame, event, argument):
        if event == "opcode":
            self.look(frame, frame.f_lasti)
        return self.step

    def instruction(self, code, offset):
        if threading.get_ident() == self.thread:
            self.look(sys._getframe(1), offset)

    def look(self, frame, offset):
        before, now = self.before.get(frame, "RESUME"), dis.opname[frame.f_code.co_code[offset]]
        self.before[frame] = now
        if not self.came and (before.startswith(("RESUME", "CALL")) or "JUMP_BACKWARD" in now):
            self.at -= 1
            if self.at == 0:
                self.came = True
                raise Struck


def before_the_guard(function):
    """The function that did its work before it was to take the guard. To be asked in a run, when it has been made to."""
    assert flowcoro._several
    return getattr(function, "__wrapped__", function)


def places_of(task, workers):
    return sum(ready.count(task) for ready in (worker.ready for worker in workers))


def move(task, to):
    """Give a task that is ready here to another worker."""
    with flowcoro._GUARD:
        task._worker.ready.remove(task)
        task._worker = to
        to.ready.append(task)
        to.wake()


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """Nobody steals but who is told to."""
    monkeypatch.setattr(flowcoro._OneOfSeveral, "is_stuck", lambda self, observer: False)


def sweep(scene):
    """scene(strike) for the first place, the second, … until there are no more. How many there were."""
    async def main():
        for number in range(1, 1000):
            strike = None

            def begin(*functions):
                nonlocal strike
                strike = Strike(number, *functions)
                return strike

            await scene(begin)
            if not strike.came:
                return number - 1

    return run(main, workers=2)


async def the_loop_has_made_its_calls():
    while flowcoro.current_task()._worker.inbox:
        await flowcoro.checkpoint()
    for _ in range(3):
        await flowcoro.checkpoint()


@pytest.mark.parametrize("pinned", ["", "p", "pp", "pppp", "p.p.", ".pp.", "....p", "......"])
def test_a_thief_that_is_struck_leaves_each_task_in_one_deque(pinned):
    async def scene(strike):
        victim = flowcoro.current_task()._worker
        thief = victim.others[0]
        async with flowcoro.TaskGroup() as group:
            tasks = [group.spawn(note(index), pinned=kind == "p") for index, kind in enumerate(pinned)]
            with strike(before_the_guard(thief._steal.__func__), thief._take, thief._place_taken.__func__,
                        flowcoro._move):
                thief._steal(victim, 3, 2)
            there = list(victim.ready)
            for task in tasks:                          # the thief may be awake, and step them at once
                wait_until(lambda: places_of(task, (victim, thief)) + (task.state == "done") == 1)
                assert task._worker is (victim if task in there else thief)
                assert not task._pinned or task in there
            assert there == [task for task in tasks if task in there], "in another order"
            thief.wake()
        assert stepped == Counter(range(len(pinned)))
        stepped.clear()

    async def note(index):
        stepped[index] += 1

    stepped = Counter()
    assert sweep(scene) > 10


@pytest.mark.parametrize("where", ["here", "elsewhere", "pinned elsewhere"])
def test_a_waker_that_is_struck_has_woken_the_task_or_leaves_it_parked_in_its_place(where):
    async def scene(strike):
        async def wait():
            await lot.park()
            woken.append(True)

        lot, woken = flowcoro.ParkingLot(), []
        worker = flowcoro.current_task()._worker
        async with flowcoro.TaskGroup() as group:
            task = group.spawn(wait(), pinned=where != "elsewhere")
            if where != "here":                         # another one has woken it before
                move(task, worker.others[0])
            wait_until(lambda: task.state == "parked") if where != "here" else await flowcoro.checkpoint()
            if where != "here":
                wait_until(lambda: task._worker.sleeping)
            assert task.state == "parked"
            with strike(flowcoro._reschedule, worker.taken_over.__func__, worker.wake.__func__, flowcoro._WakeUp.call):
                lot.unpark()
            if task in lot._tasks:
                lot.unpark()
            await task
        assert woken == [True]

    assert sweep(scene) >= (3 if where == "here" else 4)


def test_a_task_whose_waker_was_struck_can_still_be_cancelled():
    async def scene(strike):
        async def wait():
            await lot.park()

        lot = flowcoro.ParkingLot()
        async with flowcoro.TaskGroup() as group:
            task = group.spawn(wait(), pinned=True)
            await flowcoro.checkpoint()
            assert task.state == "parked"
            with strike(before_the_guard(flowcoro.ParkingLot.unpark), flowcoro._reschedule):
                lot.unpark()
            group.cancel()
        assert task.done()

    assert sweep(scene) >= 3


async def completed(*coros):
    return [task.result() async for task in flowcoro.as_completed(*coros)]


async def writes(rwlock):
    async with rwlock.write:
        pass


async def acquires(lock):
    async with lock:
        pass


def a_receiver():
    channel = flowcoro.Channel()
    return [channel.receive()], lambda: channel.send_nowait(1)


def a_sender():
    channel = flowcoro.Channel()
    return [channel.send(1)], channel.receive_nowait


def selects_that_receive():
    channel, other = flowcoro.Channel(), flowcoro.Channel()
    return [flowcoro.select(other, channel)], lambda: channel.send_nowait(1)


def selects_that_send():
    channel, other = flowcoro.Channel(), flowcoro.Channel()
    return [flowcoro.select((other, 1), (channel, 2))], channel.receive_nowait


def a_lock():
    lock = flowcoro.Lock()
    lock.acquire_nowait()
    return [acquires(lock), acquires(lock)], lock.release


def an_rwlock():
    rwlock = flowcoro.RWLock()
    rwlock.write.acquire_nowait()
    return [writes(rwlock), writes(rwlock)], rwlock.write.release


def a_condition():
    condition = flowcoro.Condition()

    async def wait():
        async with condition:
            await condition.wait()

    def notify():
        if condition._lock.owner is not flowcoro.current_task():        # struck with it held, the first time
            condition._lock.acquire_nowait()
        condition.notify_all()
        condition._lock._hand_over()

    return [wait(), wait()], notify


def a_semaphore():
    semaphore = flowcoro.Semaphore(0)
    return [semaphore.acquire()], semaphore.release


def as_they_are_completed():
    promise = flowcoro.Promise()

    async def wait():
        return await promise

    return [completed(wait())], lambda: promise.set_result(1)


@pytest.mark.parametrize("make", [a_receiver, a_sender, selects_that_receive, selects_that_send, a_lock, an_rwlock, a_condition,
                                  a_semaphore, as_they_are_completed])
def test_who_is_being_woken_when_a_handler_strikes_is_woken_or_has_his_place_still(make):
    """Struck in every function that wakes; the second attempt finds who was not woken by the first."""
    async def scene(strike):
        functions = [before_the_guard(function) for function in (
            flowcoro.ParkingLot.unpark, flowcoro.Channel._take, flowcoro.Channel._put, flowcoro.Lock._hand_over,
            flowcoro.RWLock._admit, flowcoro.Condition.notify, flowcoro._Case.commit)] + [flowcoro._reschedule]
        coros, wake = make()
        async with flowcoro.TaskGroup(pinned=True) as group:
            tasks = [group.spawn(coro) for coro in coros]
            for _ in range(4):
                await flowcoro.checkpoint()
            assert {task.state for task in tasks} == {"parked"}
            with strike(*functions):
                wake()
            for task in flowcoro.current_task()._worker.kernel.all_tasks():
                assert task.state != "parked" or not flowcoro._is_lost(task)
            if any(task.state == "parked" for task in tasks):
                try:
                    wake()
                except (RuntimeError, flowcoro.WouldBlock):     # it had been done
                    group.cancel()

    assert sweep(scene) >= 2


@pytest.mark.parametrize("operation", ["send", "receive"])
def test_a_select_that_is_being_woken_when_a_handler_strikes_leaves_all_channels_or_none(operation):
    """What it left behind would be taken for one that waits there, and fail who comes, or end another wait of the task."""
    async def scene(strike):
        first, second, third = channels = [flowcoro.Channel() for _ in range(3)]
        lots = [channel._receivers if operation == "send" else channel._senders for channel in channels]

        async def selects():
            cases = channels if operation == "send" else ((first, 0), (second, 1), (third, 2))
            await flowcoro.select(*cases)

        async with flowcoro.TaskGroup(pinned=True) as group:
            task = group.spawn(selects())
            while task.state != "parked":
                await flowcoro.checkpoint()
            with strike(before_the_guard(flowcoro.ParkingLot.unpark), before_the_guard(flowcoro.Channel._put),
                        before_the_guard(flowcoro.Channel._get), flowcoro.Channel._take, flowcoro._reschedule,
                        flowcoro._Case.commit, flowcoro._Case.withdraw):
                second.send_nowait("item") if operation == "send" else second.receive_nowait()
            assert [len(lot) for lot in lots] == [task.state == "parked"] * 3
            group.cancel()

    assert sweep(scene) >= 8


def receivers_of_a_channel_that_is_closed():
    channel = flowcoro.Channel()
    return channel.receive, channel.close, [flowcoro.Channel.close, flowcoro.Channel._end]


def senders_to_a_channel_that_is_closed():
    channel = flowcoro.Channel()
    return lambda: channel.send(1), channel.close, [flowcoro.Channel.close]


def receivers_of_a_broadcast_that_is_closed():
    broadcast = flowcoro.Broadcast(1)
    return broadcast.subscribe().receive, broadcast.close, [flowcoro.Broadcast.close]


def senders_to_a_broadcast_that_is_closed():
    broadcast = flowcoro.Broadcast(1)
    broadcast.subscribe()
    broadcast.send_nowait(0)
    return lambda: broadcast.send(1), broadcast.close, [flowcoro.Broadcast.close]


def receivers_of_a_subscription_that_is_closed():
    subscription = flowcoro.Broadcast(1).subscribe()
    return subscription.receive, subscription.close, [flowcoro.Subscription.close]


def those_who_wait_for_a_request_to_stop():
    kernel = flowcoro.current_kernel()
    kernel.stop_asked, kernel.grace = False, flowcoro._INF
    return flowcoro.stop_requested, flowcoro.request_stop, [flowcoro._Kernel.request_stop]


def readers_who_wait_for_a_writer():
    rwlock = flowcoro.RWLock()
    rwlock.write.acquire_nowait()

    async def read():
        async with rwlock.read:         # who is let in lets in the others as he leaves
            pass

    def release():
        if rwlock._writing:
            rwlock.write.release()

    return read, release, [flowcoro._Side.release, flowcoro.RWLock._admit]


def those_who_wait_at_a_barrier():
    barrier = flowcoro.Barrier(4)
    return barrier.wait, barrier._complete, [flowcoro.Barrier._complete, flowcoro.Barrier._let_go]


def those_who_wait_for_a_promise():
    promise = flowcoro.Promise()

    async def wait():
        await promise

    def keep():
        if not promise.done():
            promise.set_result(1)

    return wait, keep, [flowcoro.Promise._wake_all, flowcoro.Promise._wake]


@pytest.mark.parametrize("make", [
    receivers_of_a_channel_that_is_closed, senders_to_a_channel_that_is_closed, receivers_of_a_broadcast_that_is_closed,
    senders_to_a_broadcast_that_is_closed, receivers_of_a_subscription_that_is_closed, those_who_wait_for_a_request_to_stop,
    readers_who_wait_for_a_writer, those_who_wait_at_a_barrier, those_who_wait_for_a_promise])
def test_who_is_left_when_the_end_of_his_wait_is_struck_in_the_middle_is_woken_by_the_second_attempt(make):
    async def scene(strike):
        async def ends(wait):
            with contextlib.suppress(flowcoro.ClosedError):
                await wait()

        wait, wake, functions = make()
        async with flowcoro.TaskGroup(pinned=True) as group:
            tasks = [group.spawn(ends(wait)) for _ in range(3)]
            while {task.state for task in tasks} != {"parked"}:
                await flowcoro.checkpoint()
            with strike(*map(before_the_guard, functions + [flowcoro.ParkingLot.unpark]), flowcoro._reschedule):
                wake()
            wake()
            await the_loop_has_made_its_calls()
            assert {task.state for task in tasks} == {"done"}

    assert sweep(scene) >= 8


def test_a_pollable_whose_close_is_struck_can_be_closed_again_and_the_worker_counts_right():
    async def scene(strike):
        async def read():
            with pytest.raises(flowcoro.ClosedError):
                await pollable.wait_readable()

        worker = flowcoro.current_task()._worker
        before = worker.io_parked, worker.descriptors
        with pipe() as (near, far):
            pollable = flowcoro.Pollable(near)
            pollable.readable = False
            async with flowcoro.TaskGroup(pinned=True) as group:
                task = group.spawn(read())
                while task.state != "parked":
                    await flowcoro.checkpoint()
                with strike(before_the_guard(flowcoro.Pollable.close), flowcoro.Pollable._wake, flowcoro.Pollable._wake_reader,
                            flowcoro._reschedule, worker.poller.remove.__func__):
                    pollable.close()
                pollable.close()
            assert (worker.io_parked, worker.descriptors) == before

    assert sweep(scene) >= 8


def test_a_channel_keeps_the_item_of_a_sender_that_was_woken_when_a_handler_struck():
    async def scene(strike):
        channel, got, sent = flowcoro.Channel(), [], []

        async def send():
            await channel.send("item")
            sent.append("item")

        async with flowcoro.TaskGroup(pinned=True) as group:
            group.spawn(send())
            await flowcoro.checkpoint()
            with strike(before_the_guard(flowcoro.Channel._take), flowcoro._reschedule):
                got.append(channel.receive_nowait())
            await flowcoro.checkpoint()
            if not got and (channel._items or channel._senders):
                got.append(channel.receive_nowait())
            group.cancel()
        lost_in_receive = sent and not got              # struck as it returned: who received has that error instead
        assert sent == got or lost_in_receive
        outcomes.append((len(sent), len(got)))

    outcomes = []
    assert sweep(scene) >= 3
    assert outcomes.count((1, 0)) <= 1, "an item is lost at one place only: where it has been taken out for good"


@pytest.mark.parametrize("what", ["scope", "task"])
@pytest.mark.parametrize("who", ["task", "call from a thread", "hook", "park function"])
def test_tasks_that_are_being_cancelled_when_a_handler_strikes_are_cancelled_whoever_cancels_them(who, what):
    async def scene(strike):
        async def wait():
            try:
                await lot.park()
            finally:
                left.append(True)

        async def waits():
            nonlocal inner
            with flowcoro.CancelScope(shield=True), scope:
                async with flowcoro.TaskGroup() as inner:
                    for _ in range(3):
                        inner.spawn(wait(), pinned=True)
                    await lot.park()

        class Hooks:
            def task_spawned(self, task):
                cancels()

        def cancels():
            with strike(*map(before_the_guard, [
                    flowcoro.CancelScope.cancel, flowcoro.Task.cancel, flowcoro.Task._interrupt, flowcoro.ParkingLot._abort,
                    flowcoro._interrupt_inside, flowcoro._reschedule])):
                scope.cancel() if what == "scope" else next(iter(inner._tasks)).cancel()

        lot, scope, left, worker, inner = flowcoro.ParkingLot(), flowcoro.CancelScope(), [], flowcoro.current_task()._worker, None
        async with flowcoro.TaskGroup(pinned=True) as group:
            task = group.spawn(waits())
            while len(lot) < 4:
                await flowcoro.checkpoint()
            first = next(iter(inner._tasks))
            if who == "task":
                cancels()
            elif who == "call from a thread":
                worker.post(flowcoro._CallFromThread(cancels))
            elif who == "hook":
                hooks = Hooks()
                flowcoro.add_hooks(hooks)
                group.spawn(flowcoro.checkpoint())
                flowcoro.remove_hooks(hooks)
            else:
                await flowcoro.ParkingLot().park_unless(lambda: cancels() or True)
            await the_loop_has_made_its_calls()
            if what == "scope":
                assert task.done() == scope.cancel_called and len(left) == 3 * scope.cancel_called
            else:
                assert first.done() == first._cancel_called == len(left)
            lot.unpark_all()

    assert sweep(scene) >= 7


BROADCAST = [flowcoro.Broadcast._let_senders_in, flowcoro.Broadcast._publish, flowcoro.Broadcast._has_room,
             flowcoro.Broadcast._put, flowcoro.Broadcast._wake_all, flowcoro.Subscription._wake, flowcoro.ParkingLot.unpark,
             flowcoro._reschedule]


def test_a_broadcast_sends_what_a_sender_had_to_send_who_is_let_in_when_a_handler_strikes():
    async def scene(strike):
        broadcast = flowcoro.Broadcast(1)
        slow, other = broadcast.subscribe(), broadcast.subscribe("lag")
        broadcast.send_nowait(0)
        other.receive_nowait()
        async with flowcoro.TaskGroup(pinned=True) as group:
            sender = group.spawn(broadcast.send(1))
            waits = group.spawn(other.receive())
            while {sender.state, waits.state} != {"parked"}:
                await flowcoro.checkpoint()
            with strike(*map(before_the_guard, BROADCAST)):
                slow.receive_nowait()
            await the_loop_has_made_its_calls()
            assert sender.done() == (broadcast._sent == 2) == waits.done()
            group.cancel()

    assert sweep(scene) > 10


def test_a_subscriber_that_is_being_woken_when_a_handler_strikes_gets_each_item_once():
    async def scene(strike):
        async def receive():
            async for item in subscription:
                got.append(item)

        broadcast, got = flowcoro.Broadcast(4), []
        subscription = broadcast.subscribe()
        async with flowcoro.TaskGroup(pinned=True) as group:
            task = group.spawn(receive())
            while task.state != "parked":
                await flowcoro.checkpoint()
            with strike(*map(before_the_guard, BROADCAST)):
                broadcast.send_nowait(0)
            await the_loop_has_made_its_calls()
            assert got == [*range(broadcast._sent)]
            group.cancel()

    assert sweep(scene) > 5


@pytest.mark.parametrize("struck", ["as it was woken", "as it was cancelled"])
def test_a_task_of_another_worker_that_is_in_no_place_when_the_loop_is_struck_goes_on(struck):
    """Who struck may have been waking it, or cancelling it: it is under a shield, and nobody else would look for it."""
    async def waits():
        try:
            with flowcoro.CancelScope(shield=True):
                await lot.park()
        finally:
            ended.append(True)

    def take_out():
        if not taken:
            taken.append(True)
            lot._tasks.clear()
            if struck == "as it was cancelled":
                task._resume = task._deliver
            raise Struck

    async def main():
        nonlocal task
        worker = flowcoro.current_task()._worker
        async with flowcoro.TaskGroup(pinned=True) as group:
            task = group.spawn(waits())
            move(task, worker.others[0])
            wait_until(lambda: task.state == "parked")
            worker.post(take_out)
            await flowcoro.sleep(PATIENCE)
        raise AssertionError("nothing was struck")

    lot, task, taken, ended = flowcoro.ParkingLot(), None, [], []
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)      # no Deadlock saves who is lost
    try:
        with pytest.raises(BaseException) as caught:
            flowcoro.run(main(), workers=2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended == [True] and caught.type is Struck


@pytest.mark.parametrize("waits_for", ["a connection", "the right to connect"])
def test_a_connection_that_is_being_handed_on_when_a_handler_strikes_is_lent_once(waits_for):
    async def connect():
        made.append(object())
        return made[-1]

    async def scene(strike):
        async def borrow():
            async with pool.acquire() as connection:
                assert connection not in used
                used.append(connection)
                await flowcoro.checkpoint()
                await flowcoro.checkpoint()
                assert len(used) <= 1
                used.remove(connection)

        made.clear()
        used, pool = [], flowcoro_net.ConnectionPool(connect, max_connections=1)
        connection = await pool.acquire()
        async with flowcoro.TaskGroup(pinned=True) as group:
            tasks = [group.spawn(borrow()), group.spawn(borrow())]
            while {task.state for task in tasks} != {"parked"}:
                await flowcoro.checkpoint()
            with strike(flowcoro_net._PoolMoves.serve, before_the_guard(flowcoro.ParkingLot.unpark), flowcoro._reschedule):
                if waits_for == "a connection":
                    pool.release(connection)
                else:
                    pool.set_max_connections(2)
            group.spawn(borrow())                       # whoever comes next serves
            for _ in range(10):
                await flowcoro.checkpoint()
            group.cancel()
        pool.close_nowait()

    made = []
    assert sweep(scene) >= 4


def test_who_is_struck_as_he_goes_to_sleep_wakes_from_his_next_sleep():
    async def scene(strike):
        async def sleeps():
            with strike(before_the_guard(flowcoro._Timers.set)):
                await flowcoro.sleep(0.001)
            await flowcoro.sleep(0.002)

        async with flowcoro.TaskGroup(pinned=True) as group:
            task = group.spawn(sleeps())
            with flowcoro.move_on_after(PATIENCE):
                await task
            assert task.done()
            group.cancel()

    assert sweep(scene) >= 3


def test_who_is_struck_while_it_spawns_has_spawned_or_has_not():
    async def scene(strike):
        async def note():
            ran.append(True)

        ran, coro = [], note()
        async with flowcoro.TaskGroup() as group:
            with strike(before_the_guard(flowcoro.TaskGroup.spawn)):
                group.spawn(coro)
            spawned = len(group._tasks)
        assert len(ran) == spawned
        coro.close()

    assert sweep(scene) >= 3


def test_a_call_of_a_thread_that_is_struck_as_it_is_taken_is_made():
    async def scene(strike):
        worker = flowcoro.current_task()._worker
        made = []
        worker.inbox.extend([lambda: made.append(1), lambda: made.append(2), lambda: made.append(3)])
        with strike(worker._take_calls.__func__, flowcoro._move):
            worker._take_calls()
        worker._take_calls()
        assert sorted(set(made)) == [1, 2, 3] and len(made) <= 4
        assert worker.call is None and not worker.inbox

    assert sweep(scene) > 10


@pytest.mark.parametrize("has", ["a task", "a call"])
def test_who_sleeps_though_it_has_something_to_do_is_woken_by_who_keeps_watch(has, monkeypatch):
    """As if a signal handler had struck between the append and the wake-up."""
    async def main():
        async def note():
            done.set()

        worker = flowcoro.current_task()._worker
        sleeper = worker.others[0]
        async with flowcoro.TaskGroup() as group:
            wait_until(lambda: sleeper.sleeping and all(other.sleeping for other in worker.others))
            if has == "a call":
                sleeper.inbox.append(done.set)
            else:
                with flowcoro._GUARD:
                    task = group.spawn(note(), pinned=True)
                    worker.ready.remove(task)
                    task._worker = sleeper
                    sleeper.ready.append(task)
            assert not done.wait(0.05)                  # nobody has told it
            worker.others[1].wake()                     # and when somebody looks for work, it is found out
            assert done.wait(PATIENCE)

    done = threading.Event()
    monkeypatch.setattr(flowcoro, "IDLE_TICK", 1000.0)
    monkeypatch.setattr(flowcoro, "TICK", 1000.0)
    run(main, workers=3)


@pytest.mark.parametrize("how", ["rescheduled", "deadline", "call"])
def test_who_gives_a_sleeping_worker_something_to_do_wakes_it_himself(how, monkeypatch):
    """Nobody else does, for a thousand seconds."""
    async def main():
        async def wait():
            with scope:
                await lot.park()
            woken.set()

        lot, scope, woken = flowcoro.ParkingLot(), flowcoro.CancelScope(), threading.Event()
        worker = flowcoro.current_task()._worker
        sleeper = worker.others[0]
        async with flowcoro.TaskGroup() as group:
            with flowcoro._GUARD:
                task = group.spawn(wait(), pinned=True)
                worker.ready.remove(task)
                task._worker = sleeper
                sleeper.ready.append(task)
            sleeper.wake()
            wait_until(lambda: task.state == "parked" and sleeper.sleeping)
            if how == "rescheduled":
                lot.unpark()
            elif how == "deadline":
                scope.deadline = flowcoro.now() + 0.01
            else:
                sleeper.post(scope.cancel)
            assert woken.wait(PATIENCE)

    for name in "TICK", "IDLE_TICK", "LONGEST_POLL":
        monkeypatch.setattr(flowcoro, name, 1000.0)
    run(main, workers=2)


def test_a_thread_can_post_while_an_atomic_step_is_long(monkeypatch):
    """A finaliser that posts may run in any thread, under any lock: it must not wait for whoever holds the guard."""
    class Primitive:
        @flowcoro.atomic
        def hold(self):
            thread.start()
            assert posted.wait(PATIENCE)

    def post():
        kernel.worker.post(lambda: None)
        posted.set()

    async def hold():
        assert asleep.wait(PATIENCE)
        Primitive().hold()

    def wait(timeout):
        if timeout:
            asleep.set()
        return real(timeout)

    async def main():
        nonlocal kernel, real
        kernel, worker = flowcoro.current_kernel(), flowcoro.current_task()._worker
        real, worker.poller.wait = worker.poller.wait, wait
        async with flowcoro.TaskGroup() as group:
            with flowcoro._GUARD:
                task = group.spawn(hold(), pinned=True)
                worker.ready.remove(task)
                task._worker = worker.others[0]
                task._worker.ready.append(task)
            task._worker.wake()
        thread.join()

    for name in "TICK", "IDLE_TICK", "LONGEST_POLL":
        monkeypatch.setattr(flowcoro, name, 1000.0)
    kernel, real, asleep, posted, thread = None, None, threading.Event(), threading.Event(), threading.Thread(target=post)
    run(main, workers=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_that_a_signal_handler_spawns_while_the_worker_sleeps_runs_at_once(workers):
    async def note():
        scope.cancel()

    async def main():
        nonlocal scope
        async with flowcoro.TaskGroup() as group:
            signal.signal(signal.SIGUSR1, lambda number, frame: group.spawn(note()))
            flowcoro.current_kernel().signals.release_wakeup_fd()       # which would end the sleep too
            timer = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR1])
            timer.start()
            with flowcoro.move_on_after(PATIENCE) as scope:
                await flowcoro.sleep(PATIENCE)
            timer.join()

    scope, before, begin = None, signal.getsignal(signal.SIGUSR1), time.monotonic()
    try:
        flowcoro.run(main(), workers=workers)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - begin < PATIENCE / 2


def test_a_signal_handler_that_wakes_a_task_may_come_while_its_thread_is_waking_another_worker(monkeypatch):
    """And while the thread that holds what the handler needs wakes that worker too."""
    class Primitive:
        @flowcoro.atomic
        def wake(self, worker):
            entered.wait(0.2)               # in vain if the other one needs for that what is held here
            holds.set()
            time.sleep(0.05)
            worker.waker.call()

    def call(self):
        if victim and self is victim[0].waker and threading.current_thread() is threading.main_thread() and not entered.is_set():
            entered.set()
            holds.wait(0.2)
            signal.raise_signal(signal.SIGUSR1)
        real(self)

    async def main():
        async def wakes():
            stuck.set()
            Primitive().wake(victim[0])

        worker = flowcoro.current_task()._worker
        first, second = worker.others
        wait_until(lambda: first.sleeping and second.sleeping)
        async with flowcoro.TaskGroup() as group:
            task = group.spawn(wakes(), pinned=True)
            with flowcoro._GUARD:
                worker.ready.remove(task)
                task._worker = first
                victim.append(second)
                first.ready.append(task)
            first.wake()
            assert stuck.wait(PATIENCE)
            second.waker.call()
        assert event.is_set()

    event, entered, holds, stuck, victim = flowcoro.Event(), threading.Event(), threading.Event(), threading.Event(), []
    real = flowcoro._WakeUp.call
    monkeypatch.setattr(flowcoro._WakeUp, "call", call)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: event.set())
    try:
        run(main, workers=3)
    finally:
        signal.signal(signal.SIGUSR1, before)


STUCK = {
    "hook": """
        class Hooks:
            def task_parked(self, task, reason):
                if task.name == "it":
                    stuck()

        flowcoro.add_hooks(Hooks())
        flowcoro.spawn(flowcoro.sleep(1000), name="it")
    """,
    "atomic": """
        class Primitive:
            @flowcoro.atomic
            def method(self):
                stuck()

        async def calls():
            Primitive().method()

        flowcoro.spawn(calls())
    """,
    "predicate": """
        flowcoro.spawn(flowcoro.ParkingLot().park_unless(stuck))
    """,
    "park function": """
        flowcoro.spawn(flowcoro.park(lambda task: stuck()))
    """,
    "call": """
        def ask(kernel):
            try:
                flowcoro.call_from_thread(stuck, kernel=kernel)
            except BaseException:
                pass

        threading.Thread(target=ask, args=[flowcoro.current_kernel()]).start()
    """}


def test_a_second_ctrl_c_ends_a_park_function_that_does_not_return():
    with Child("""
        def stuck(task):
            say("ready")
            while True:
                time.sleep(0.001)

        async def main():
            await flowcoro.park(stuck)

        try:
            flowcoro.run(main())
        except KeyboardInterrupt:
            say("interrupted")
            os._exit(0)
    """) as child:
        child.hears("ready")
        child.insist(signal.SIGINT)
        status, said, errors = child.end()
    assert (status, said[-1:]) == (0, ["interrupted"]), errors


@pytest.mark.parametrize("what", STUCK)
def test_a_second_ctrl_c_ends_what_holds_all_others_up_on_another_worker(what):
    with Child("""
        def stuck():
            say(threading.current_thread().name)
            begun.set()
            while True:
                time.sleep(0.001)

        begun = threading.Event()
        sys.unraisablehook = lambda got: None

        async def main():
            WHAT
            begun.wait(20)
            say("ready")
            await flowcoro.sleep(1000)

        try:
            flowcoro.run(main(), workers=2)
        except KeyboardInterrupt:
            say("interrupted")
            os._exit(0)                                 # before another one comes
    """.replace("WHAT", textwrap.indent(textwrap.dedent(STUCK[what]), 12 * " ").strip())) as child:
        child.hears("flowcoro worker 2")
        child.hears("ready")
        child.insist(signal.SIGINT)
        status, said, errors = child.end()
    assert (status, said[-1:]) == (0, ["interrupted"]), errors


def test_a_second_ctrl_c_ends_a_call_that_another_worker_makes_as_the_run_ends():
    with Child("""
        def stuck():
            begun.set()
            while True:
                time.sleep(0.001)

        def ask(kernel):
            try:
                flowcoro.call_from_thread(stuck, kernel=kernel)
            except KeyboardInterrupt:
                say("the call is interrupted")

        begun = threading.Event()

        async def main():
            global asker
            asker = threading.Thread(target=ask, args=[flowcoro.current_kernel()])
            asker.start()
            begun.wait(20)
            say("ready")                                # and main ends, while that worker is in there

        try:
            flowcoro.run(main(), workers=2)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            asker.join(20)
            os._exit(0)
    """) as child:
        child.hears("ready")
        child.insist(signal.SIGINT)
        status, said, errors = child.end()
    assert "the call is interrupted" in said, errors


def test_an_atomic_method_of_others_takes_the_guard_in_the_child_of_a_fork_in_which_somebody_held_it():
    with Child("""
        class Primitive:
            @flowcoro.atomic
            def method(self):
                return flowcoro._GUARD._is_owned()

        def hold():
            with flowcoro._GUARD:
                held.set()
                time.sleep(1000)

        held = threading.Event()
        flowcoro.run(flowcoro.sleep(0), workers=2)
        threading.Thread(target=hold, daemon=True).start()
        held.wait(20)
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            os._exit(Primitive().method() is True and 7)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        os._exit(0)
    """) as child:
        child.hears("7")


def test_who_marks_the_functions_for_the_guard_may_be_struck_anywhere(monkeypatch):
    names = []
    for number in range(1, 400):
        take_off_the_guard()
        strike = Strike(number, flowcoro._replace_marked, flowcoro._put_under_guard)
        with strike:
            flowcoro._guard_all()
        flowcoro._guard_all()
        left = [function.__qualname__ for function, code in PLAIN if function.__code__ is code]
        assert left == [] and flowcoro._MARKED == [], number
        names.append(number)
        if not strike.came:
            break
    assert len(names) > 50


@pytest.mark.parametrize("kind", ["socket", "file"])
def test_a_wait_that_another_workers_close_cuts_short_leaves_no_registration(kind, monkeypatch):
    def paused(kernel, number):
        there.set()
        assert said.wait(PATIENCE)
        plain = real(kernel, number)
        registered.set()
        assert closed.wait(PATIENCE)
        return plain

    async def wait(file):
        with pytest.raises(flowcoro.ClosedError):
            await flowcoro.wait_readable(file)

    async def main():
        kernel = flowcoro.current_kernel()
        with pipe() as (near, far):
            file = open(os.dup(near), "rb", buffering=0) if kind == "file" else Number(os.dup(near))
            async with flowcoro.TaskGroup() as group:
                task = group.spawn(wait(file), pinned=True)
                worker = flowcoro.current_task()._worker
                with flowcoro._GUARD:
                    worker.ready.remove(task)
                    task._worker = worker.others[0]
                    task._worker.ready.append(task)
                task._worker.wake()
                assert there.wait(PATIENCE)
                flowcoro.notify_closing(file)
                said.set()
                assert registered.wait(PATIENCE)
                file.close()
                closed.set()
            assert kernel.plain == {}
            assert [worker.descriptors for worker in kernel.workers] == [0, 0]

    class Number:                           # as a socket, which has the number -1 once it is closed
        def __init__(self, number):
            self.number = number

        def fileno(self):
            return self.number

        def close(self):
            os.close(self.number)
            self.number = -1

    there, said, registered, closed = (threading.Event() for _ in range(4))
    real = flowcoro._plain_fd
    monkeypatch.setattr(flowcoro, "_plain_fd", paused)
    run(main, workers=2)


def test_a_thread_that_wakes_a_worker_as_the_run_ends_writes_to_no_other_file_and_the_descriptors_are_closed():
    def slow(data):
        inside.set()
        time.sleep(0.01)                    # meanwhile the run ends
        return write(data)

    async def main():
        nonlocal write
        waker = flowcoro.current_task()._worker.waker
        write, waker._far.use = waker._far.use, slow
        thread = threading.Thread(target=waker.call)
        thread.start()
        assert inside.wait(PATIENCE)
        return thread

    write, inside, before = None, threading.Event(), descriptors()
    thread = flowcoro.run(main())
    assert descriptors() == before
    thread.join()
