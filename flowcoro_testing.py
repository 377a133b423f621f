"""flowcoro_testing 0.1.0: test coroutine code without sleeping, in every order, and with the same result each time.

To vendor, copy: flowcoro.py, flowcoro_testing.py

Example:

    import flowcoro
    from flowcoro_testing import run_in_kernel

    @run_in_kernel
    async def test_a_year_is_over_at_once():
        before = flowcoro.now()
        await flowcoro.sleep(365 * 24 * 3600)
        assert flowcoro.now() - before == 365 * 24 * 3600

    test_a_year_is_over_at_once()       # pytest and unittest call it for you

Contents: the virtual clock · waiting for quiet · asserting checkpoints · running tests in a kernel

How it works:

A *virtual clock* stands still while any task can run. When nothing is ready the kernel asks the clock how long to
wait; this one jumps to the next deadline and answers 0. So timeouts and sleeps cost nothing and happen in the exact
order of their deadlines. Threads and descriptors stay real: while a to_thread() call is under way the clock does not
move, and what the selector has to report comes before a jump.

A *seed* makes the kernel take ready tasks in random order, the same for the same seed: what holds for a hundred
orders does not hold by luck. explore() runs a test under many and names the one that failed.

Quiet is noticed by two hooks: before_poll says that nothing is ready, after_poll that the descriptors had nothing
either. Checkpoints are noticed by `task.budget`: below 0 it makes the next operation a checkpoint even if it need not
wait, and the kernel sets it anew when a task yields or parks; a mark in it that is still there has seen none.

Sources: trio's testing module (autojump clock, wait_all_tasks_blocked, assert_checkpoints); FoundationDB's
simulation, "Testing Distributed Systems w/ Deterministic Simulation"; PCT (Burckhardt et al., ASPLOS 2010) on how
few orders find most bugs.

What it does not do: it makes no order that the kernel itself could not make, and knows nothing of threads' orders.

SPDX-License-Identifier: MIT
"""

import collections.abc
import functools
import inspect
import math
import numbers
import os
import sys

import flowcoro

__version__ = "0.1.0"

__all__ = ["VirtualClock", "run_in_kernel", "explore", "wait_all_tasks_parked", "assert_checkpoints",
           "assert_no_checkpoints"]

# What the budget is set to while a block is watched. The kernel never sets one below 0, and none above 0 would do: an
# operation that need not wait counts it down instead of being cancelled, where a cancelled task's budget is 0.
_MARK = -1


# ---- the virtual clock ----------------------------------------------------------------------------------------

class VirtualClock:
    """A clock for flowcoro.run(clock=…) that jumps to the next deadline as soon as all tasks are parked.

    start: what now() says at first, in seconds. One clock serves one run at a time.
    """

    def __init__(self, start=0.0):
        if not isinstance(start, numbers.Real):
            raise TypeError(f"VirtualClock(start={start!r}): give a number of seconds")
        if not -math.inf < start < math.inf:
            raise ValueError(f"VirtualClock(start={start!r}): give a finite number of seconds")
        self._now = float(start)

    def now(self):
        """The virtual time in seconds."""
        return self._now

    def idle(self, timeout):
        """The kernel has nothing to do for `timeout` seconds: let them pass. Returns 0, the seconds to really wait."""
        self._now += timeout
        return 0.0

    def advance(self, seconds):
        """Let time pass while tasks run, as a slow computation would. ValueError if negative, infinite or nan."""
        if not isinstance(seconds, numbers.Real):
            raise TypeError(f"advance({seconds!r}): give a number of seconds")
        if not 0 <= seconds < math.inf:
            raise ValueError(f"advance({seconds!r}): seconds must be 0 or more, and finite")
        self._now += seconds

    def __repr__(self):
        return f"<VirtualClock {self._now:.3f}>"


# ---- waiting for quiet ----------------------------------------------------------------------------------------

class _Quiet:
    """Hooks that wake the task in their lot, with True, when nothing else is ready and no descriptor is either."""

    def __init__(self):
        self.lot, self.scope = flowcoro.ParkingLot("wait until all tasks are parked"), None
        self.steps = -1                                 # not known: after_poll comes first while others are busy

    def before_poll(self, timeout):
        self.steps = flowcoro.statistics()["steps"]     # so far; if there are more later, something was ready
        # Until a deadline just ahead, the kernel looks at descriptors. 1 ms: epoll's shortest, if the clock is real.
        now = flowcoro.now()                            # nextafter: so far from 0 that a millisecond is nothing
        self.scope.deadline = max(now + 0.001, math.nextafter(now, math.inf))

    def after_poll(self, events):
        numbers = flowcoro.statistics()
        others = numbers["workers"]["count"] - 1
        if events == 0 and self.steps == numbers["steps"] and numbers["workers"]["asleep"] == others and (
                not numbers["tasks"]["ready"]):
            self.lot.unpark_all(True)


async def wait_all_tasks_parked():
    """Wait until every other task is parked: nothing more happens before time passes or the world outside acts.

    It returns before a virtual clock jumps, and after what the descriptors have to report by now. Several tasks may
    wait; all are woken. Cancelled: nothing is left behind.
    """
    quiet, reached = _Quiet(), False
    flowcoro.add_hooks(quiet)
    try:
        while not reached:          # a real clock may come to that deadline while a descriptor is served
            with flowcoro.CancelScope() as quiet.scope:
                reached = await quiet.lot.park()
    finally:
        flowcoro.remove_hooks(quiet)


# ---- asserting checkpoints ------------------------------------------------------------------------------------

class _Watched:
    """A block of which is known whether it has passed a checkpoint. A cancel counts as one."""

    # A class, because what contextlib makes of a function sets the traceback of errors that pass, which may be frozen.

    def __init__(self, expected, complaint):
        self.expected, self.complaint = expected, complaint

    def __enter__(self):
        self.task = flowcoro.current_task()
        self.before, self.task.budget = self.task.budget, _MARK

    def __exit__(self, kind, error, trace):
        passed = self.task.budget != _MARK
        if not passed:
            self.task.budget = self.before
        if error is None and passed != self.expected:
            raise AssertionError(self.complaint)


def assert_checkpoints():
    """`with assert_checkpoints():` fails with AssertionError if its block passes no checkpoint (unless it raises)."""
    return _Watched(True, "the block passed no checkpoint: it could not be cancelled, and gave no other task a turn")


def assert_no_checkpoints():
    """`with assert_no_checkpoints():` fails with AssertionError if its block passes a checkpoint (unless it raises)."""
    return _Watched(False, "the block passed a checkpoint: other tasks may have run in between, and it can be cancelled")


# ---- running tests in a kernel --------------------------------------------------------------------------------

def _run(make, repeat, *, clock=None, seed=None, timeout=None, **options):
    """flowcoro.run(make(), …) with a fresh virtual clock; an error leaves with a note that says how to repeat it."""
    async def bounded():
        with flowcoro.timeout(math.inf if timeout is None else timeout):
            return await make()

    clock = VirtualClock() if clock is None else clock() if callable(clock) else clock
    if isinstance(seed, str) and seed.removeprefix("-").isdecimal():
        seed = int(seed)            # text from the environment; 7 and "7" would be two orders
    main = bounded()
    try:
        return flowcoro.run(main, clock=clock, seed=seed, **options)
    except BaseException as error:
        main.close()                # run() may have refused the options and never looked at it
        if seed is not None:
            note = f"seed {seed!r}: {repeat} repeats this order of tasks"
            try:
                error.add_note(note)
            except Exception:       # a frozen dataclass
                print(note, file=sys.stderr)
        raise


def run_in_kernel(function=None, *, clock=None, seed=None, timeout=None, **options):
    """Make a test out of an async function: `@run_in_kernel` or `@run_in_kernel(seed=7, timeout=60)`.

    Each call gets a kernel of its own. clock: one, or a function that makes one; by default a fresh VirtualClock.
    seed: the order of ready tasks; by default that of the environment variable FLOWCORO_SEED, if there is one.
    timeout: seconds on that clock. More options go to flowcoro.run(). For pytest, with fixtures, and unittest's methods.
    """
    if function is None:
        return functools.partial(run_in_kernel, clock=clock, seed=seed, timeout=timeout, **options)
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"@run_in_kernel decorates an async function, got {function!r}")

    @functools.wraps(function)
    def test(*args, **kwargs):
        chosen = (os.environ.get("FLOWCORO_SEED") or None) if seed is None else seed
        return _run(lambda: function(*args, **kwargs), f"FLOWCORO_SEED={chosen}", clock=clock, seed=chosen,
                    timeout=timeout, **options)

    return test


def explore(test, seeds=range(100), **options):
    """Run the async function `test`, which takes no arguments, once for each seed; return how many times that was.

    The first error ends it and leaves with a note that names the seed. Options are those of run_in_kernel().
    """
    if not inspect.iscoroutinefunction(test):
        raise TypeError(f"explore() takes an async function without arguments, got {test!r}")
    if not isinstance(seeds, collections.abc.Iterable):
        raise TypeError(f"explore(seeds={seeds!r}): give several, such as range({seeds!r})")
    count, name = 0, getattr(test, "__name__", repr(test))
    for count, seed in enumerate(seeds, 1):
        _run(test, f"explore({name}, seeds=[{seed!r}])", seed=seed, **options)
    if not count:
        raise ValueError(f"explore(seeds={seeds!r}): there was no seed, and {name} has not run; give one or more")
    return count
