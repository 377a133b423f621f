"""What several test files use."""

import gc
import os
import sys
import threading

import pytest

import flowcoro
from flowcoro_testing import wait_all_tasks_parked

# What a run with several workers changes, as it was before.
MARKED = list(flowcoro._MARKED)
PLAIN = [(function, function.__code__) for function, _ in MARKED]

# FLOWCORO_GUARD=1: all tests as after such a run.
if os.environ.get("FLOWCORO_GUARD"):
    flowcoro._guard_all()


@pytest.fixture(autouse=True)
def one_worker_takes_no_guard():
    """The next test finds the kernel as it is before the first run with several workers."""
    yield
    if flowcoro._several and not os.environ.get("FLOWCORO_GUARD"):
        for function, code in PLAIN:
            function.__code__ = code
        flowcoro._MARKED[:] = MARKED
        flowcoro._several = False


@pytest.fixture(autouse=True, scope="module")
def garbage_is_sought_in_what_is_new():
    """Thousands of tests look for garbage, or for a deadlock: spare each of them what pytest itself has gathered so far."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Garbage that was frozen while something still held it is found at last: pytest looks for it now, and fails."""
    gc.unfreeze()


@pytest.fixture
def reports(monkeypatch):
    """What was reported to sys.unraisablehook: a list of (message, error)."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda got: found.append((got.err_msg or "", got.exc_value)))
    yield found
    gc.collect()


class Guard:
    """The kernel's guard, which tells when a thread has to wait for it: by this a test knows how far another thread came."""

    def __init__(self):
        self.lock, self.told, self.waiting = threading.RLock(), threading.Event(), []

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.waiting.append(None)
            self.told.set()
            self.lock.acquire()
            self.waiting.pop()

    def __exit__(self, *error):
        self.lock.release()

    def let_in(self, begun):
        """Stop here and let another thread begin, until it says that it is through (told.set()) or waits for the guard."""
        self.told.clear()
        begun.set()
        if self.waiting:                            # since before
            self.told.set()
        assert self.told.wait(30), "the other thread has not come"


@pytest.fixture
def guard(monkeypatch):
    guard = Guard()
    monkeypatch.setattr(flowcoro, "_GUARD", guard)
    return guard


@pytest.fixture
def looks_again_soon(monkeypatch):
    """Whoever sleeps while another thread may wake it looks again after a hundredth of the time: such threads end unheard."""
    def sooner(worker, timeout):
        return poll(worker, timeout and timeout / 100)

    poll = flowcoro._Worker._poll
    monkeypatch.setattr(flowcoro._Worker, "_poll", sooner)


async def parked(group, *coros):
    """Spawn the coroutines one after the other, each once the one before waits. Returns the tasks."""
    tasks = []
    for coro in coros:
        tasks.append(group.spawn(coro))
        await wait_all_tasks_parked()
        assert tasks[-1].state == "parked"
    return tasks
