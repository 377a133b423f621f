"""Several workers, one schedule each: what one thread does between two lines of another, forced by a pause in the middle.

Where a thread pauses it waits until the other one has done its part, or waits for the guard: a test passes however fast
either of them is. What random schedules have to show is in test_flowcoro_workers.py, whose helpers are used here.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import types

import pytest

import flowcoro
from conftest import MARKED, PLAIN
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
        until_deadline, extend = victim._until_deadline, victim.ready.extend
        idle, ready, taken = threading.Event(), threading.Event(), threading.Event()

        def paused_until_deadline():    # called before it says that it sleeps, and after
            seconds = until_deadline()
            if flowcoro._local.worker is victim:
                if not victim.sleeping and not idle.is_set():
                    idle.set()
                    assert ready.wait(PATIENCE)
                elif victim.sleeping and idle.is_set():
                    assert taken.wait(PATIENCE)
            return seconds

        def paused_extend(tasks):
            sleeper.about.clear()
            taken.set()
            wait_until(sleeper.about.is_set)        # so it has looked
            extend(tasks)

        victim._until_deadline = paused_until_deadline
        victim.waker.call()
        wait_until(idle.is_set)
        victim.waker.ready(flowcoro.READ)           # that call has served its purpose
        event.set()
        sleeper = Sleeper(victim)
        victim.waker.ready(flowcoro.READ)
        ready.set()
        wait_until(lambda: victim.sleeping)
        victim.ready.extend = paused_extend
        assert not here()._steal(victim, 1)
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
        sleeper, arm = Sleeper(owner), owner.poller.arm
        sleepers.append(sleeper)

        def quiet_arm(pollable):
            arm(pollable)
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
            return self.__dict__["task"]

        @task.setter
        def task(self, task):
            if task in woken and not taken_up.is_set():     # it has read how the step begins, and not said whose it is
                taken_up.set()
                assert cancelled.wait(PATIENCE)
            self.__dict__["task"] = task

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
    for function, code in PLAIN:                    # without a GIL an earlier run has guarded them
        function.__code__ = code
    flowcoro._MARKED[:] = MARKED
    monkeypatch.setattr(flowcoro, "types", types.SimpleNamespace(**{**vars(types), "FunctionType": slow}))
    thread = threading.Thread(target=second)
    thread.start()
    flowcoro._guard_all()
    thread.join()
    assert plain == []
