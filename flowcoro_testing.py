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

Quiet is noticed by the before_poll hook, which the kernel calls when nothing is ready. Checkpoints are noticed by
`task.budget`: the kernel sets it back when a task yields or parks, and each operation that need not wait counts it
down; a mark in it that is still there has seen no checkpoint.

Sources: trio's testing module (autojump clock, wait_all_tasks_blocked, assert_checkpoints); FoundationDB's
simulation, "Testing Distributed Systems w/ Deterministic Simulation"; PCT (Burckhardt et al., ASPLOS 2010) on how
few orders find most bugs.

What it does not do: it makes no order that the kernel itself could not make, and knows nothing of threads' orders.

SPDX-License-Identifier: MIT
"""

import contextlib
import functools
import inspect
import math
import os

import flowcoro

__version__ = "0.1.0"

__all__ = ["VirtualClock", "run_in_kernel", "explore", "wait_all_tasks_parked", "assert_checkpoints",
           "assert_no_checkpoints"]

# What the budget is set to while a block is watched: far above any that the kernel sets, so that it is never met by
# chance, and high enough that no block uses it up.
_MARK = 1 << 40


# ---- the virtual clock ----------------------------------------------------------------------------------------

class VirtualClock:
    """A clock for flowcoro.run(clock=…) that jumps to the next deadline as soon as all tasks are parked.

    start: what now() says at first, in seconds. One clock serves one run at a time.
    """

    def __init__(self, start=0.0):
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
        """Let time pass while tasks run, as a slow computation would. ValueError if `seconds` is negative or nan."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"advance({seconds!r}): seconds must be 0 or more, and finite")
        self._now += seconds

    def __repr__(self):
        return f"<VirtualClock {self._now:.3f}>"


# ---- waiting for quiet ----------------------------------------------------------------------------------------

class _Quiet:
    """A hook that wakes its tasks when nothing else is ready."""

    def __init__(self):
        self.lot = flowcoro.ParkingLot("wait until all tasks are parked")

    def before_poll(self, timeout):
        self.lot.unpark_all()


async def wait_all_tasks_parked():
    """Wait until every other task is parked: nothing more happens before time passes or the world outside acts.

    It returns before a virtual clock jumps. Several tasks may wait; all are woken. Cancelled: nothing is left behind.
    """
    quiet = _Quiet()
    flowcoro.add_hooks(quiet)
    try:
        await quiet.lot.park()
    finally:
        flowcoro.remove_hooks(quiet)


# ---- asserting checkpoints ------------------------------------------------------------------------------------

@contextlib.contextmanager
def _watched():
    """Yields a function that says whether the current task has passed a checkpoint since."""
    task = flowcoro.current_task()
    before, task.budget = task.budget, _MARK
    try:
        yield lambda: task.budget != _MARK
    finally:
        if task.budget > before:        # not set back by the kernel meanwhile
            task.budget = before


@contextlib.contextmanager
def assert_checkpoints():
    """`with assert_checkpoints():` fails with AssertionError if its block passes no checkpoint (unless it raises)."""
    with _watched() as passed:
        yield
        assert passed(), "the block passed no checkpoint: it could not be cancelled, and gave no other task a turn"


@contextlib.contextmanager
def assert_no_checkpoints():
    """`with assert_no_checkpoints():` fails with AssertionError if its block passes a checkpoint (unless it raises)."""
    with _watched() as passed:
        yield
        assert not passed(), "the block passed a checkpoint: other tasks may have run in between, and it can be cancelled"


# ---- running tests in a kernel --------------------------------------------------------------------------------

def _run(make, repeat, *, clock=None, seed=None, timeout=None, **options):
    """flowcoro.run(make(), …) with a fresh virtual clock; an error leaves with a note that says how to repeat it."""
    async def bounded():
        if timeout is None:
            return await make()
        with flowcoro.timeout(timeout):
            return await make()

    try:
        return flowcoro.run(bounded(), clock=VirtualClock() if clock is None else clock() if callable(clock) else clock,
                            seed=seed, **options)
    except BaseException as error:
        if seed is not None:
            error.add_note(f"seed {seed!r}: {repeat} repeats this order of tasks")
        raise


def run_in_kernel(function=None, *, clock=None, seed=None, timeout=None, **options):
    """Make a test out of an async function: `@run_in_kernel` or `@run_in_kernel(seed=7, timeout=60)`.

    Each call gets a kernel of its own. clock: one, or a function that makes one; by default a fresh VirtualClock.
    seed: the order of ready tasks; by default that of the environment variable FLOWCORO_SEED, if there is one.
    timeout: seconds on that clock. More options go to flowcoro.run(). Works with pytest, its fixtures and parameters,
    and with unittest's methods.
    """
    if function is None:
        return functools.partial(run_in_kernel, clock=clock, seed=seed, timeout=timeout, **options)
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"@run_in_kernel decorates an async function, got {function!r}")

    @functools.wraps(function)
    def test(*args, **kwargs):
        chosen = os.environ.get("FLOWCORO_SEED") if seed is None else seed
        return _run(lambda: function(*args, **kwargs), f"FLOWCORO_SEED={chosen}", clock=clock, seed=chosen,
                    timeout=timeout, **options)

    return test


def explore(test, seeds=range(100), **options):
    """Run the async function `test`, which takes no arguments, once for each seed; return how many times that was.

    The first error ends it and leaves with a note that names the seed. Options are those of run_in_kernel().
    """
    if not inspect.iscoroutinefunction(test):
        raise TypeError(f"explore() takes an async function without arguments, got {test!r}")
    count = 0
    for seed in seeds:
        _run(test, f"explore({test.__name__}, seeds=[{seed!r}])", seed=seed, **options)
        count += 1
    return count
