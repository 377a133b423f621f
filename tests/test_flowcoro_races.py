"""Several workers, one schedule each: what one thread does between two lines of another, forced by a pause in the middle.

Where a thread pauses it waits until the other one has done its part, or waits for the guard: a test passes however fast
either of them is. What random schedules have to show is in test_flowcoro_workers.py, whose helpers are used here.
"""

import faulthandler
import os
import signal
import sys
import threading
import types

import pytest

import flowcoro
from conftest import PLAIN, take_off_the_guard
from test_flowcoro_workers import PATIENCE, descriptors, pipe, run, spread, strangers, wait_until


@pytest.fixture(autouse=True)
def parallel(monkeypatch):
    """Idle workers steal, and no test leaves threads or descriptors behind."""
    monkeypatch.setattr(flowcoro, "_has_gil", lambda: False)
    threads, files = strangers(), descriptors()
    faulthandler.dump_traceback_later(3 * PATIENCE, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()
    assert strangers() == threads
    assert descriptors() == files


def here():
    return flowcoro.current_task()._worker


def pair(first, second, workers=2):
    """Run first() and second() as tasks pinned each to a worker of its own. Their results."""
    async def main():
        return await spread(2, lambda number: (first, second)[number]())

    return run(main, workers=workers)


class Sleeper:
    """Has a worker stop each time it is about to sleep, once it has seen that there is nothing to do, and says what woke it."""

    def __init__(self, worker):
        self.worker, self.wait = worker, worker.poller.wait
        self.about, self.go, self.found = threading.Event(), threading.Event(), []
        worker.poller.wait = self.pause
        worker.waker.call()             # it may sleep already

    def pause(self, timeout):
        if flowcoro._local.worker is not self.worker or not timeout or self.go.is_set():
            return self.wait(timeout)
        self.about.set()
        assert self.go.wait(PATIENCE)
        found = self.wait(0)            # what it would have slept through is not there now
        self.found.append([pollable for pollable, bits in found])
        return found


# ---- who sleeps is woken ----------------------------------------------------------------------------------------

def test_who_stands_in_for_a_worker_that_is_about_to_sleep_gives_back_the_wake_up_that_it_has_taken():
    async def sleeps():
        with pipe() as (near, far):
            pollable = flowcoro.Pollable(near)
            victims.append(here())
            await over.wait()
            pollable.close()

    async def stands_in():
        wait_until(lambda: victims)
        victim = victims[0]
        sleeper = Sleeper(victim)

        def pause(timeout):             # the victim's calls have been taken, its descriptors are still to be polled
            if flowcoro._local.worker is not victim:
                victim.post(lambda: called.append(True))
            return sleeper.pause(timeout)

        wait_until(sleeper.about.is_set)
        victim.poller.wait = pause
        here()._stand_in_for(victim)
        assert called == []
        sleeper.go.set()
        wait_until(lambda: sleeper.found)
        assert victim.waker in sleeper.found[0]
        wait_until(lambda: called)
        over.set()

    victims, called, over = [], [], flowcoro.Event()
    pair(sleeps, stands_in)


def test_a_pinned_task_that_a_thief_gives_back_wakes_its_worker_which_did_not_see_it():
    async def sleeps():
        victims.append(here())
        await event.wait()
        stepped.append(True)

    async def steals():
        wait_until(lambda: victims)
        victim = victims[0]
        until_deadline = victim._until_deadline
        idle, ready, announced, taken = (threading.Event() for _ in range(4))

        def paused_until_deadline():    # called before it says that it sleeps, and after
            seconds = until_deadline()
            if flowcoro._local.worker is victim:
                if not victim.sleeping and not idle.is_set():
                    idle.set()
                    assert ready.wait(PATIENCE)
                elif victim.sleeping and idle.is_set():
                    announced.set()
                    assert taken.wait(PATIENCE)
            return seconds

        def paused_place_taken(tasks, victim):
            del thief._place_taken
            sleeper.about.clear()
            taken.set()
            wait_until(sleeper.about.is_set)        # so it has looked
            thief._place_taken(tasks, victim)

        victim._until_deadline = paused_until_deadline
        victim.waker.call()
        wait_until(idle.is_set)
        victim.waker.ready(flowcoro.READ)           # that call has served its purpose
        event.set()
        sleeper = Sleeper(victim)
        victim.waker.ready(flowcoro.READ)
        ready.set()
        wait_until(announced.is_set)
        thief = here()
        thief._place_taken = paused_place_taken
        assert not thief._steal(victim, 1)
        sleeper.go.set()
        wait_until(lambda: sleeper.found)
        assert victim.waker in sleeper.found[0]
        wait_until(lambda: stepped)

    victims, stepped, event = [], [], flowcoro.Event()
    pair(sleeps, steals)


def test_a_wait_for_a_descriptor_of_another_worker_ends_its_sleep_where_the_selector_knows_no_edges(monkeypatch):
    """poll() and select() go on looking at the descriptors that they were given."""
    import selectors
    monkeypatch.setattr(flowcoro.selectors, "DefaultSelector", selectors.PollSelector)

    async def sleeps():
        pollables.append(flowcoro.Pollable(near))
        await over.wait()

    async def waits():
        wait_until(lambda: pollables)
        pollable, = pollables
        owner = pollable._worker
        sleeper = Sleeper(owner)
        sleepers.append(sleeper)

        def quiet_arm(pollable):
            del owner.poller.arm
            owner.poller.arm(pollable)
            owner.waker.ready(flowcoro.READ)        # whatever has woken it before
            armed.append(True)

        wait_until(sleeper.about.is_set)
        owner.poller.arm = quiet_arm
        pollable.readable = False
        async with flowcoro.TaskGroup() as group:
            group.spawn(write())
            await pollable.wait_readable()
        assert os.read(near, 10) == b"x"
        assert owner.waker in sleeper.found[0]
        over.set()
        pollable.close()

    async def write():
        while not armed:
            await flowcoro.checkpoint()
        sleepers[0].go.set()
        os.write(far, b"x")

    pollables, sleepers, armed, over = [], [], [], flowcoro.Event()
    with pipe() as (near, far):
        pair(sleeps, waits)


# ---- who is struck, cancelled or ended at the wrong moment ------------------------------------------------------

def test_a_cancel_that_comes_as_its_task_is_taken_up_arrives_at_the_next_park():
    class Paused(flowcoro._OneOfSeveral):
        @property
        def task(self):
            return slot.__get__(self)

        @task.setter
        def task(self, task):
            if task in woken and not taken_up.is_set():     # it has read how the step begins, and not said whose it is
                taken_up.set()
                assert cancelled.wait(PATIENCE)
            slot.__set__(self, task)

    async def receives():
        here().__class__ = Paused
        with flowcoro.CancelScope() as scope:
            found.append((flowcoro.current_task(), scope))
            values.append(await lot.park())
            values.append(await lot.park())
        assert values == ["value"], "its second park returns though nobody has woken it"
        assert scope.cancelled_caught

    async def cancels():
        wait_until(lambda: found and found[0][0].state == "parked")
        task, scope = found[0]
        woken.append(task)
        lot.unpark(1, "value")
        wait_until(taken_up.is_set)
        scope.cancel()
        cancelled.set()

    slot = flowcoro._Worker.task
    lot, found, woken, values = flowcoro.ParkingLot(), [], [], []
    taken_up, cancelled = threading.Event(), threading.Event()
    pair(receives, cancels)
    assert len(lot) == 0


def test_a_call_from_a_thread_that_is_struck_as_it_is_taken_is_made_again(monkeypatch):
    """By a signal handler's error, before the call has begun to take errors."""
    class Strike(Exception):
        pass

    def struck(self):
        if not strikes:
            strikes.append(threading.current_thread())
            raise Strike
        make(self)

    def ask():
        answers.append(flowcoro.call_from_thread(lambda: 42, kernel=kernel, timeout=PATIENCE))

    async def main():
        nonlocal kernel
        kernel = flowcoro.current_kernel()
        thread = threading.Thread(target=ask)
        thread.start()
        with flowcoro.CancelScope(shield=True):
            while thread.is_alive():
                await flowcoro.sleep(0.001)

    kernel, strikes, answers, make = None, [], [], flowcoro._CallFromThread.__call__
    monkeypatch.setattr(flowcoro._CallFromThread, "__call__", struck)
    with pytest.raises(Strike):
        flowcoro.run(main(), workers=2)
    assert answers == [42]


def test_a_ctrl_c_that_comes_when_a_deadlock_has_been_seen_is_heard_instead(monkeypatch):
    faulthandler.cancel_dump_traceback_later()      # its thread might wake somebody, for all the kernel knows

    def is_one(self):
        if not look(self):
            return False
        kernel = self.kernel
        if not kernel.signals.interrupts:
            signal.raise_signal(signal.SIGINT)
            wait_until(lambda: kernel.worker.inbox or kernel.main.state != "parked")
        return True

    async def main():
        await flowcoro.Event().wait()

    look = flowcoro._Deadlocks.is_one
    monkeypatch.setattr(flowcoro._Deadlocks, "is_one", is_one)
    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main(), workers=2)


@pytest.mark.skipif(bool(os.environ.get("FLOWCORO_GUARD")), reason="all functions are guarded already")
def test_when_two_threads_start_runs_at_once_both_find_every_function_guarded(guard, monkeypatch):
    def slow(*args):
        if not begun.is_set():
            guard.let_in(begun)
        return types.FunctionType(*args)

    def second():
        assert begun.wait(PATIENCE)
        flowcoro._guard_all()
        plain.extend(function.__qualname__ for function, code in PLAIN if function.__code__ is code)
        guard.told.set()

    begun, plain = threading.Event(), []
    take_off_the_guard()                            # without a GIL an earlier run has guarded them
    monkeypatch.setattr(flowcoro, "types", types.SimpleNamespace(**{**vars(types), "FunctionType": slow}))
    thread = threading.Thread(target=second)
    thread.start()
    flowcoro._guard_all()
    thread.join()
    assert plain == []


# ---- what is read or closed here while it is used there ---------------------------------------------------------

def test_a_scope_that_another_worker_leaves_while_its_deadline_is_looked_at_is_not_marked_expired_afterwards(guard):
    async def leaves():
        with flowcoro.move_on_after(PATIENCE) as scope:
            scopes.append(scope)
            wait_until(begun.is_set)
        left.append(scope.cancel_called)
        guard.told.set()

    async def looks():
        wait_until(lambda: scopes)
        scope, reader = scopes[0], here()
        owner = scope._task._worker
        clock = owner.now

        def late():
            if flowcoro._local.worker is not reader:
                return clock()
            guard.let_in(begun)
            return scope.deadline

        owner.now = late
        seen.append(scope.cancel_called)
        wait_until(lambda: left)
        assert scope.cancel_called == left[0]

    scopes, left, seen, begun = [], [], [], threading.Event()
    pair(leaves, looks)
    assert len(seen) == 1


def test_a_scope_that_another_worker_leaves_before_its_deadline_is_looked_at_has_not_expired(monkeypatch):
    async def leaves():
        with flowcoro.move_on_after(PATIENCE) as scope:
            scopes.append(scope)
            wait_until(begun.is_set)
        left.set()

    async def looks():
        wait_until(lambda: scopes)
        assert not scopes[0].cancel_called

    def late_look(self):
        begun.set()
        assert left.wait(PATIENCE)
        self._deadline = 0.0
        look(self)

    look = flowcoro.CancelScope._look_at_the_time
    monkeypatch.setattr(flowcoro.CancelScope, "_look_at_the_time", late_look)
    scopes, begun, left = [], threading.Event(), threading.Event()
    pair(leaves, looks)


def test_a_wait_that_begins_while_another_worker_tells_of_the_closing_of_its_descriptor_waits_anew(guard, monkeypatch):
    async def closes():
        os.write(far, b"x")
        await flowcoro.wait_readable(near)          # from here on the kernel keeps something of it
        os.read(near, 10)
        kernel = flowcoro.current_kernel()
        plain = kernel.plain[near]
        monkeypatch.setattr(flowcoro._PlainFd, "close", slow_close)
        flowcoro.notify_closing(near)
        assert kernel.plain.get(near) is not plain
        os.write(far, b"x")

    def slow_close(self):
        if not begun.is_set():
            guard.let_in(begun)                     # it has been taken out of the table
        close(self)

    async def waits():
        wait_until(begun.is_set)
        try:
            await flowcoro.wait_readable(near)
        finally:
            guard.told.set()
        flowcoro.notify_closing(near)

    begun, close = threading.Event(), flowcoro._PlainFd.close
    with pipe() as (near, far):
        pair(closes, waits)


def test_hooks_of_two_workers_are_called_one_at_a_time_and_may_take_a_lock_and_look_at_the_statistics(guard, reports):
    class Recorder:
        def __init__(self):
            self.lock, self.seen = threading.Lock(), []

        def record(self, name):
            assert self.lock.acquire(blocking=False), "two hooks at a time"
            try:
                if name == "before_poll":
                    guard.let_in(begun)
                self.seen.append((name, flowcoro.statistics()["tasks"]["alive"]))
            finally:
                self.lock.release()

        def before_poll(self, timeout):
            if idle and not begun.is_set():
                self.record("before_poll")

        def task_rescheduled(self, task):
            if begun.is_set() and task is idle[0]:
                guard.told.set()
                self.record("task_rescheduled")

    async def becomes_idle():
        idle.append(flowcoro.current_task())
        await event.wait()

    async def wakes():
        flowcoro.add_hooks(recorder)
        wait_until(begun.is_set)
        event.set()
        flowcoro.remove_hooks(recorder)

    idle, begun, event, recorder = [], threading.Event(), flowcoro.Event(), Recorder()
    pair(becomes_idle, wakes)
    assert reports == []
    assert [name for name, alive in recorder.seen] == ["before_poll", "task_rescheduled"]


# ---- what idle workers look at ----------------------------------------------------------------------------------

def test_a_thief_gives_up_after_a_row_of_pinned_tasks(monkeypatch):
    def count_looks(self, victim, *args):
        looks.clear()
        found = steal(self, victim, *args)
        most.append(len(looks))
        return found

    async def main():
        victim = here()

        def look(pop, target):
            looks.extend([True] * (pop == victim.ready.pop))
            move(pop, target)

        async with flowcoro.TaskGroup(pinned=True) as group:
            with flowcoro._GUARD:                   # no thief comes before all are there
                for _ in range(10 * flowcoro.MOST_PINNED):
                    group.spawn(flowcoro.checkpoint())
                monkeypatch.setattr(flowcoro, "_move", look)
                most.clear()
            wait_until(lambda: len(most) > 2)
            assert set(most) == {flowcoro.MOST_PINNED}

    looks, most, steal, move = [], [], flowcoro._OneOfSeveral._steal, flowcoro._move
    monkeypatch.setattr(flowcoro._OneOfSeveral, "_steal", count_looks)
    monkeypatch.setattr(flowcoro._OneOfSeveral, "is_stuck", lambda self, observer: False)
    run(main, workers=2)


def test_a_worker_with_pinned_tasks_only_wakes_no_thief_until_some_time_has_passed():
    async def main():
        victim = here()
        thief, = victim.others
        sleeper = Sleeper(thief)
        wait_until(sleeper.about.is_set)
        async with flowcoro.TaskGroup(pinned=True) as group:
            for _ in range(5):
                group.spawn(flowcoro.checkpoint())
            thief.waker.ready(flowcoro.READ)
            assert not thief._steal(victim, 2, flowcoro.MOST_PINNED)
            victim._offer_work()
            assert not has_been_called(thief)
            victim.looked = victim.no_offer         # a moment later
            victim._offer_work()
            assert has_been_called(thief)
            sleeper.go.set()

    def has_been_called(worker):
        try:
            return bool(os.read(worker.waker.fd, 100))
        except BlockingIOError:
            return False

    run(main, workers=2)


def test_a_task_behind_many_pinned_ones_of_a_stuck_worker_is_stepped_by_another():
    async def main():
        gate = threading.Event()

        async def free():
            gate.set()

        async with flowcoro.TaskGroup() as group:
            with flowcoro._GUARD:                   # no thief comes before all are there
                group.spawn(free())
                for _ in range(5 * flowcoro.MOST_PINNED):
                    group.spawn(flowcoro.checkpoint(), pinned=True)
            assert gate.wait(PATIENCE)

    run(main, workers=2)


@pytest.mark.parametrize("workers", [2, 4, 5])
def test_at_most_half_of_the_workers_search_at_a_time(workers, monkeypatch):
    def steal_slowly(self, victim, count, *most_pinned):
        if searching and most_pinned:
            inside.add(self)
            most.append(len(inside))
            came(self)
            assert all_came.wait(PATIENCE)
            inside.discard(self)
        return steal(self, victim, count, *most_pinned)

    def find_work(self):
        began = bool(searching)
        found = find(self)
        if began:
            came(self)
        return found

    def came(worker):
        known.add(worker)
        if len(known) == workers - 1:
            all_came.set()

    async def main():
        with flowcoro._GUARD:
            tasks = [flowcoro.spawn(flowcoro.checkpoint()) for _ in range(100)]
            searching.append(True)
        for other in here().others:
            other.waker.call()
        wait_until(all_came.is_set)
        searching.clear()
        for task in tasks:
            await task

    inside, most, known, searching, all_came = set(), [], set(), [], threading.Event()
    find, steal = flowcoro._OneOfSeveral._find_work, flowcoro._OneOfSeveral._steal
    monkeypatch.setattr(flowcoro._OneOfSeveral, "_find_work", find_work)
    monkeypatch.setattr(flowcoro._OneOfSeveral, "_steal", steal_slowly)
    monkeypatch.setattr(flowcoro._OneOfSeveral, "is_stuck", lambda self, observer: False)
    run(main, workers=workers)
    assert 1 <= max(most) <= workers // 2


# ---- calls from threads that block ------------------------------------------------------------------------------

def test_ready_tasks_of_a_worker_in_a_call_from_a_thread_that_blocks_are_stepped_by_another():
    def block():
        event.set()
        assert gate.wait(PATIENCE)

    async def opens():
        await event.wait()
        gate.set()

    async def main():
        async with flowcoro.TaskGroup() as group:
            group.spawn(opens())
            await flowcoro.to_thread(flowcoro.call_from_thread, block)

    event, gate = flowcoro.Event(), threading.Event()
    run(main, workers=2)


def test_timers_of_a_worker_in_a_call_from_a_thread_that_blocks_are_kept_by_another():
    class Hooks:
        def task_rescheduled(self, task):
            if task is sleeper:
                gate.set()

    def block():
        workers.append(flowcoro._local.worker)
        sleeps_on.append(sleeper._worker)
        scope.deadline = flowcoro.now() + 0.005
        assert gate.wait(PATIENCE)

    async def sleep():
        with scope:
            await flowcoro.sleep(PATIENCE)

    async def main():
        nonlocal sleeper
        flowcoro.add_hooks(Hooks())
        async with flowcoro.TaskGroup(pinned=True) as group:
            sleeper = group.spawn(sleep())
            while sleeper.state != "parked":
                await flowcoro.checkpoint()
            await flowcoro.to_thread(flowcoro.call_from_thread, block)

    sleeper, scope, gate, workers, sleeps_on = None, flowcoro.CancelScope(), threading.Event(), [], []
    run(main, workers=2)
    assert workers == sleeps_on


def test_when_the_call_that_has_woken_the_keeper_blocks_another_one_looks_after_it():
    async def sleeps_second(first):                 # the other one sleeps by now, and is the keeper
        wait_until(lambda: first.sleeping and first.kernel.keeper.locked())

    def block():
        event.set()
        assert gate.wait(PATIENCE)

    def ask():
        wait_until(lambda: all(worker.sleeping for worker in kernel.workers))
        flowcoro.call_from_thread(block, kernel=kernel)

    async def opens():
        await event.wait()
        gate.set()

    async def main():
        nonlocal kernel
        kernel = flowcoro.current_kernel()
        first, second = kernel.workers
        async with flowcoro.TaskGroup() as group:
            group.spawn(opens())
            task = group.spawn(sleeps_second(first))
            wait_until(lambda: second.task is task)
            await flowcoro.to_thread(ask)

    kernel, event, gate = None, flowcoro.Event(), threading.Event()
    run(main, workers=2)


def test_when_who_stands_in_takes_a_call_that_blocks_a_third_one_looks_after_both():
    async def stuck():
        stuck_on.append(here())
        assert gate.wait(PATIENCE)

    def block():
        event.set()
        assert gate.wait(PATIENCE)

    async def opens():
        await event.wait()
        gate.set()

    async def main():
        kernel = flowcoro.current_kernel()
        flowcoro.spawn(opens())
        await flowcoro.sleep(0.01)
        thread = threading.Thread(target=lambda: flowcoro.call_from_thread(block, kernel=kernel))
        thread.start()
        assert gate.wait(PATIENCE)                  # this worker, whose call it is, is stuck
        thread.join()

    stuck_on, event, gate = [], flowcoro.Event(), threading.Event()
    run(main, workers=3)
