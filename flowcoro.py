"""flowcoro 0.1.0: a coroutine runtime in one file: tasks, cancellation, channels, locks, timers, threads.

Structured concurrency for Python with nothing but the standard library: the safety of trio, Go's channels,
`select` and deadlock report, and a scheduler that switches tasks faster than the event loops written in C.

To vendor, copy: flowcoro.py
To test code that uses it, copy flowcoro_testing.py too; for `python -m flowcoro demo`, flowcoro_cli.py.

Example:

    import flowcoro

    async def worker(name, jobs):
        async for job in jobs:
            print(name, "did", job)

    async def main():
        jobs = flowcoro.Channel()
        async with flowcoro.TaskGroup() as group:
            for name in "ab": group.spawn(worker(name, jobs))
            for job in range(4):
                await jobs.send(job)
            jobs.close()

    flowcoro.run(main())

Contents: constants and errors · reports · the guard · traps · cancel scopes · tasks · parking · readiness · sleeping ·
task groups · the worker · the watchdog · the kernel · run and spawn · stopping · locks · channels, select, Broadcast ·
Promise and combinations · threads · pools · diagnostics · command line.

How it works:

A *task* is a coroutine and its state. A *worker* is one thread that steps ready tasks, oldest first, from a
deque. A task asks the kernel for something by yielding up through all its awaits; there are two things to ask:

    yield None            run me again after the others (a checkpoint)
    yield park_function   I cannot go on: once I am suspended, call park_function(task)

The park function stores the task where whoever will wake it looks, and leaves an *abort function* that takes it
out again. Because it runs after the task has left the stack, nobody can ever resume a running task. To *reschedule*
a task puts it back into the deque with a value or an error. Everything else - sleeping, locks, channels, sockets,
threads - is a place to store parked tasks, and most of them are one ParkingLot.

The loop of a worker: step ready tasks; after at most 61 steps, or a millisecond (every 15 steps it looks at the clock),
make the calls that other threads left in the inbox, wake what the timers have reached, poll the file descriptors;
with nothing ready, sleep in the selector until a deadline.

*Cancellation* is a tree of scopes. A scope that is cancelled raises Cancelled at every checkpoint inside it until
the code has left it. An operation that need not wait only looks at `task.budget`: one integer that says both "you
have had your turn" and "you have been cancelled" (then it is 0), so that neither costs a trip through the loop.

*Atomic* is what is one step for all tasks, on all workers: no other task sees the middle of it. With one worker that is
everything between two awaits; with several it is what a docstring calls so, and what a method marked @atomic does.

Invariants, each asserted or tested where it could break:

    I1  a task is in exactly one place: running, in one ready deque, parked, or done
    I2  each park is answered by exactly one reschedule; who takes a task out of its place reschedules it
    I3  a value delivered to a task is never lost: a cancel that comes later waits for the next checkpoint
    I4  task._resume is task._send exactly when nothing but a value waits for the task
    I5  a worker says that it sleeps before it looks for work a last time; a waker adds work, then looks who sleeps
    I6  task._timer is the deadline of the heap entry that counts for the task (inf: none; if it is there twice, the
        first to come up counts); others are stale

Sources: curio (traps), trio (cancel scopes, parking lots), Go's runtime/proc.go (polling, the deadlock report,
select), tokio (the budget), Nathaniel J. Smith, "Notes on structured concurrency"; PEP 492, 525, 567, 654.

What it does not do: sockets, TLS and HTTP (siblings do), signals other than SIGINT, SIGTERM and SIGQUIT (flowcoro_os),
process pools.

SPDX-License-Identifier: MIT
"""

import contextlib
import contextvars
import errno
import functools
import heapq
import itertools
import math
import operator
import os
import select as _select
import selectors
import sys
import threading
import time
import types
import weakref
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Coroutine

__version__ = "0.1.0"

__all__ = [
    "run", "spawn", "TaskGroup", "Task", "coroutine",
    "sleep", "sleep_until", "checkpoint", "checkpoint_if_due", "now",
    "timeout", "move_on_after", "CancelScope", "request_stop", "stop_requested",
    "when_all", "when_any", "as_completed", "Promise",
    "Lock", "RWLock", "Event", "Condition", "Semaphore", "Barrier",
    "Channel", "select", "select_nowait", "Broadcast", "Subscription",
    "to_thread", "call_from_thread", "run_from_thread", "current_kernel",
    "ObjectPool", "BufferPool",
    "dump_tasks", "statistics", "runtime_info", "add_hooks", "remove_hooks",
    "park", "reschedule", "current_task", "ParkingLot", "atomic", "Pollable",
    "wait_readable", "wait_writable", "notify_closing", "network", "report_error",
    "FlowCoroError", "Cancelled", "TaskCancelled", "WouldBlock", "ClosedError", "EndOfChannel", "BusyError",
    "Lagged", "PoolError", "Deadlock",
]

# ---- constants ------------------------------------------------------------------------------------------------

# Steps at most between two visits to inbox, timers and descriptors; a multiple of STEPS_PER_LOOK, so it is 60 as a rule.
# Go checks its global queue every 61 steps. A poll costs about a microsecond, a step a quarter of one.
STEPS_PER_POLL = 61

# Seconds after which a worker does so even if fewer steps were made: what a timer or a descriptor may be late because of
# others, and by STEPS_PER_LOOK steps more until it is noticed that these are long.
SECONDS_PER_POLL = 0.001

# Seconds between two looks of an idle worker after those that are in a step: one that has not come round in between is
# stuck, and the idle one stands in for it. Go's monitor looks every 10 ms too.
TICK = 0.01

# The same once all have slept for that long: what a worker may be stuck unnoticed at most when it begins to work then.
IDLE_TICK = 0.1

# Pinned tasks in a row among another's ready ones, after which a worker gives up to look for some to steal.
MOST_PINNED = 16

# Workers at most: more threads than any machine has cores are a mistake in a number.
MOST_WORKERS = 1024

# Steps between two looks at the clock, to know that such a time has passed: a look costs about 5 ns a step. Fewer once
# steps turn out to be long.
STEPS_PER_LOOK = 15

# Seconds that one step may take before run(watchdog=True) reports it.
WATCHDOG_LIMIT = 1.0

# Looks of the watchdog at the workers within its limit; it looks again when a report is due, which is late by one of these at
# most, and a hundredth of the limit. Each look takes the GIL from who works.
WATCHDOG_LOOKS = 4

# Seconds between two samples of step times and latencies that the watchdog takes of a worker: two calls of a microsecond. A pass
# of the loop (up to 60 steps) that took longer counts as one step.
SECONDS_PER_SAMPLE = 0.01

# Operations that a task may complete without waiting before one of them gives the others a turn (tokio: 128).
BUDGET = 128

# Threads that to_thread uses at once; trio's default too. They mostly wait for disks and name servers, so the
# number of cores does not matter.
THREADS = 40

# Seconds that a thread without work is kept. Starting one costs about 50 microseconds.
THREAD_IDLE_SECONDS = 10.0

# Deliveries of Cancelled to one task in one cancellation before it is reported as swallowing them. Cleanup code that
# awaits in a loop can see some; nobody means to see a thousand.
SWALLOWED_LIMIT = 1000

# Tasks that cleanup code may spawn into one group after it was cancelled, or main has ended; then spawn() fails, for
# tasks that spawn others without ever coming to a checkpoint, where they would be cancelled, would never end.
LATE_SPAWNS = 100_000

# Calls, one in the other, that the end of a TaskGroup may need: its beginning makes sure that there is room for them.
CALLS_TO_END = 6

# Seconds since the worker has last looked at the clock, before this step or up to 14 others, from which on a second
# Ctrl-C takes the step for stuck and raises KeyboardInterrupt in the middle of it, where it may do harm. A step takes
# microseconds; people press twice in a fifth of a second.
STUCK_SECONDS = 0.05

# Errors in the middle of the kernel's own work, as from a signal handler of the user's, after which the tasks are closed by
# force: those who are asked to end, and are told so 100 times, do not come.
BLOWS = 100

# Seconds that a worker sleeps at most: epoll counts milliseconds in a C int.
LONGEST_POLL = 3600.0

_INF = math.inf

# How many steps a pass makes between looks at the clock: all at first, fewer and fewer while steps are long.
_PLANS = tuple((range(STEPS_PER_LOOK >> level),) * (STEPS_PER_POLL // STEPS_PER_LOOK)
               for level in range(STEPS_PER_LOOK.bit_length()))

# The budget of a new task and of one that was rescheduled: something waits to be sent in. The loop sets BUDGET at each
# checkpoint, and every operation counts down from here, so the one store tells both (a second one cost 5 ns a step).
WOKEN = BUDGET + 1

# The states of a task. READY: in the ready deque, or being stepped (then it is its worker's task).
READY, PARKED, DONE = range(3)
_STATES = ("ready", "parked", "done")

# Directions of a file descriptor, as bits.
READ, WRITE, HANGUP = 1, 2, 4


# ---- errors ---------------------------------------------------------------------------------------------------
#
#   BaseException
#     Cancelled            raised at checkpoints in a cancelled scope; let it pass
#   FlowCoroError
#     TaskCancelled        you asked for the result of a task that was cancelled
#     WouldBlock           a …_nowait could not do it without waiting
#     ClosedError          you closed it (a channel, a Pollable)
#       EndOfChannel       … and everything that was sent has been received
#     BusyError            two tasks wait for the same direction of one file descriptor
#     Lagged               a subscriber was too slow and missed items
#     PoolError            an object was given back twice, or used after it was given back
#     Deadlock             also a RuntimeError: no task can ever run again

class Cancelled(BaseException):
    """Raised at every checkpoint inside a cancelled scope. A BaseException, so that `except Exception` lets it pass.

    Clean up and let it go on: the scope that was cancelled catches it. Swallowing it does not help, the next
    checkpoint raises it again.
    """


class FlowCoroError(Exception):
    """The base of all errors of this module but Cancelled."""


class TaskCancelled(FlowCoroError):
    """The task whose result was asked for had been cancelled. (Cancelled would look as if you were.)"""


class WouldBlock(FlowCoroError):
    """The operation would have had to wait. Nothing was done."""


class ClosedError(FlowCoroError):
    """The object had been closed, or was closed while the task waited. The operation was not done."""


class EndOfChannel(ClosedError):
    """The channel is closed and empty. `channel` says which, for those who select."""

    def __init__(self, message, channel=None):
        super().__init__(message)
        self.channel = channel


class BusyError(FlowCoroError):
    """Another task already waits for this direction of this file descriptor, or it has another Pollable."""


class Lagged(FlowCoroError):
    """A slow subscriber missed `missed` items; its next receive gives the oldest one that is still kept."""

    def __init__(self, missed):
        super().__init__(f"this subscription was too slow and missed {missed} items; receive() goes on with the oldest "
                         "one kept. Subscribe with slow=\"block\" to miss none, or give Broadcast a larger capacity")
        self.missed = missed


class PoolError(FlowCoroError):
    """An object was returned twice, was never borrowed, or was used after its return."""


class Deadlock(FlowCoroError, RuntimeError):
    """No task can ever run again. The message holds the tree of tasks, where each waits and for whom."""


# ---- reports --------------------------------------------------------------------------------------------------
# An error with nobody to raise it to goes to sys.unraisablehook, which is the interpreter's own place for them:
# by default it prints the traceback, pytest turns it into a warning, and an application can replace it.

def report_error(error, what, source="flowcoro", object=None):
    """Tell sys.unraisablehook of an error that nobody waits for: `what` failed, in which module, concerning which object.

    Never raises.
    """
    what = f"{source}: {what}"
    try:
        if sys.unraisablehook is sys.__unraisablehook__:        # it takes only what the interpreter itself has made
            import traceback
            sys.stderr.write("".join([f"{what}\n", *traceback.format_exception(error)]))
        else:
            sys.unraisablehook(types.SimpleNamespace(
                exc_type=type(error), exc_value=error, exc_traceback=error.__traceback__, err_msg=what, object=object))
    except BaseException:   # the user's hook is broken or exits, or stderr is closed: nobody is left to tell
        pass


class _Failure:
    """An error that waits to be asked for. If it dies before anybody has, it is reported."""

    __slots__ = ("error", "traceback", "what", "seen", "__weakref__")

    def __init__(self, error, what, seen=False):
        self.error = error
        self.traceback = error.__traceback__
        self.what = what
        self.seen = seen

    def take(self):
        """The error, with the traceback it came with: raising it again and again would make that longer each time."""
        self.seen = True
        return BaseException.with_traceback(self.error, self.traceback)

    def report(self):
        if not self.seen:
            self.seen = True
            report_error(self.error, self.what)

    __del__ = report


_HERE = report_error.__code__.co_filename


def _shown(thing):
    """repr(), also of what has none that works."""
    try:
        return repr(thing)
    except Exception:
        return object.__repr__(thing)


def _trim(error):
    """Leave the kernel's own frames out of the head of the traceback, so that it begins with the user's lines."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == _HERE:
        trace = trace.tb_next
    if trace is not None:
        BaseException.with_traceback(error, trace)      # not error's own, nor an assignment: it may be a frozen dataclass


def _await_chain(task):
    """Where a task that does not run stands: one line for each await, outermost first."""
    import gc
    lines, awaited, seen = [], task.coro, set()
    while awaited is not None and id(awaited) not in seen:      # an iterator of a user's own may lead back to where we were
        seen.add(id(awaited))
        frame = (getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
                 or getattr(awaited, "ag_frame", None))
        if frame is not None and (frame.f_code.co_filename != _HERE or not lines):
            lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}")
        inner = (getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
                 or getattr(awaited, "ag_await", None))
        if inner is None and frame is None:     # a wrapper, around what an object's __await__ or an async generator gave
            inner = next((thing for thing in gc.get_referents(awaited) if isinstance(
                thing, (types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType))), None)
        awaited = inner
    return lines


class _Outside:
    """Stands for the worker in threads that have none, so that no operation has to look before it leaps."""

    now = staticmethod(time.monotonic)

    def __getattr__(self, name):
        raise RuntimeError("no FlowCoro kernel runs in this thread: start one with flowcoro.run(main()), and from "
                           "another thread use call_from_thread() or run_from_thread(). Inside run() this means that "
                           "a second copy of flowcoro.py was imported, another framework's loop runs the coroutine, "
                           "or the process was forked")


_OUTSIDE = _Outside()


class _Local(threading.local):
    worker = _OUTSIDE       # the worker whose thread this is
    caller = None           # in a thread of to_thread: the _ThreadCall that it works on


_local = _Local()


class _Unique:
    """The base of all that has identity: nobody would wake those who wait at a copy, nor return what it has lent."""

    __slots__ = ()

    def __reduce__(self):
        raise TypeError(f"{self!r} can be neither copied nor pickled: a copy would know nothing of the tasks and "
                        "objects that belong to this one. Share it, or make a new one")

    def __repr__(self):
        facts = " ".join(f"{name}={value!r}" for name, value in self.statistics().items())
        return f"<{type(self).__name__.strip('_')} {facts}>"


# ---- the guard ------------------------------------------------------------------------------------------------
# With one worker and a GIL nothing takes a lock. With several, or without a GIL, one lock, the guard, is held by whoever
# touches what tasks of several workers share: the fields of a task that is not running, and the places where tasks wait. Its
# own fields belong to the running task; a step that only computes takes no lock at all.
#
#   under the guard                                     without it
#   park functions, abort functions, reschedule()       a step; popleft() from one's own ready deque, append() to any and
#   scopes: enter, leave, cancel                        pop() from another's (atomic: who gets the task has it alone)
#   groups: open, spawn, a task's end, close            inboxes (append and popleft are atomic)
#   every take and give of a lock, a channel, …         task.budget: a count-down may overwrite the 0 of a cancel, which
#   timers, steals, task._worker                        task._resume remembers, so that it is noticed at the next yield
#                                                       flags of a Pollable: unset before the operation, set by an edge
#
# Read by all without it: an outcome that is written before what says that it is there (Task._state, Promise._done), and the
# marks and counts of a worker, which its own thread writes (task, call, looked, sleeping, steps, io_parked, …), and `stopped`,
# which is set once. Who decides by an old one has to look again, or is asked to (I5, is_quiet(), _interrupt()).
#
# One lock for all, because a select waits in several channels, a cancel walks through the tasks of all workers, and an abort
# function is called from there: with a lock for each object all this would need an order of locks, and find deadlocks.
#
# The marks below cost nothing until a run asks for several workers: then each marked function becomes, for good and for all
# who hold it (a bound method, say), one that takes the guard. Only methods of other modules that have free variables (super() is
# one) are wrapped instead, and look each time whether it is so.

_GUARD = threading.RLock()
_MARKED = []                                # (function, the one that it is to become; None: itself, under the guard)
_MARKED_BY_OTHERS = weakref.WeakSet()       # functions of other modules, whose classes may be forgotten, so they stay here
_several = False                            # there was a run with several workers, or is no GIL


class _GuardPlace:
    """Where marked functions, whose globals may be those of another module, find the guard. The child of a fork makes a new one,
    and puts it here too."""

    guard = _GUARD


def _under_guard(*args, **kwargs):
    """What a marked function becomes, with _GuardPlace and what it did before for these two texts."""
    place = "where the guard is"
    function = "what it did before"
    with place.guard:
        return function(*args, **kwargs)


def _put_under_guard(function):
    """Exchange its code for what takes the guard. Twice is once. Under the guard, and for what has no free variables: code that
    has none cannot be given to a function that has some."""
    if _GuardPlace in function.__code__.co_consts:      # by an earlier run, or by who was struck before he could say so
        return
    before = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    before.__kwdefaults__ = function.__kwdefaults__
    for name in functools.WRAPPER_ASSIGNMENTS:      # annotations: who asks for the signature follows __wrapped__
        setattr(before, name, getattr(function, name))
    before.__dict__.update(function.__dict__)       # perhaps a __wrapped__ of its own
    function.__wrapped__ = before
    places = {"where the guard is": _GuardPlace, "what it did before": before}
    code = _under_guard.__code__
    function.__code__ = code.replace(co_consts=tuple(
        places.get(constant, constant) if isinstance(constant, str) else constant for constant in code.co_consts))


class atomic:
    """Decorates a method of a primitive, in its class body: with several workers it is one step for all others.

    Nothing that is atomic happens elsewhere while it runs: no other such method, no operation of this module on anything
    that tasks share, no park or abort function, no predicate of park_unless(), no hook. It may call all of these, and must not
    block, nor take a lock that somebody may hold who calls this module. With one worker (and a GIL) it is a plain method; one
    that says super(), or has a variable of a function around it, is 65 ns slower.
    TypeError if it is async, or no method.
    """

    def __init__(self, function):
        if not isinstance(function, types.FunctionType) or function.__code__.co_flags & 0x2A0:      # async or a generator
            raise TypeError(f"@atomic decorates a plain method, got {function!r}: it goes below no other decorator, and what "
                            "waits cannot keep all others waiting. Let an async method call an atomic one, and park if that "
                            "says so")
        self.function = function

    def __set_name__(self, owner, name):
        function = self.function
        if not function.__code__.co_freevars:       # else its code cannot be exchanged
            setattr(owner, name, function)
            if function.__globals__ is globals():
                _MARKED.append((function, None))
                return
            with _GUARD:
                _MARKED_BY_OTHERS.add(function)
                if _several:
                    _put_under_guard(function)
            return

        @functools.wraps(function)
        def method(*args, **kwargs):
            if not _several:
                return function(*args, **kwargs)
            with _GUARD:
                return function(*args, **kwargs)

        setattr(owner, name, method)

    def __call__(self, *args, **kwargs):
        raise TypeError(f"@atomic decorates methods, and {self.function.__qualname__} stands in no class body, or below another "
                        "decorator: @atomic comes first")


class _shared:
    """Marks a method _shared_…, which the one named becomes where there are several workers."""

    def __init__(self, function):
        self.function = function

    def __set_name__(self, owner, name):
        _MARKED.append((vars(owner)[name.removeprefix("_shared_")], self.function))
        setattr(owner, name, self.function)


def _guarded_function(function):
    """As @atomic for a method."""
    _MARKED.append((function, None))
    return function


def _guard_all():
    with _GUARD:                        # another thread may start such a run at the same time
        _replace_marked()


def _replace_marked():
    global _several
    _several = True
    while _MARKED:
        function, shared = _MARKED[-1]
        if shared is None:
            _put_under_guard(function)
        else:
            function.__code__ = shared.__code__
        _MARKED.pop()                   # last: a Ctrl-C may strike in between
    for function in list(_MARKED_BY_OTHERS):
        _put_under_guard(function)


# ---- traps ----------------------------------------------------------------------------------------------------
# These, sleep(), sleep_until(), Task.__await__, ParkingLot.park and the waits of a Pollable are the only places that yield to the
# kernel.

@types.coroutine
def checkpoint():
    """Let the others run, and be cancelled here if that was asked. The cheapest thing there is to await."""
    yield


@types.coroutine
def park(park_function):
    """Suspend the current task and call `park_function(task)`; return what reschedule() is given, or raise its error.

    The park function must set `task.park_reason` (a string) and `task.abort_function`, and only then store the task
    where its waker finds it. `abort_function(task)` must not fail: it takes the task out again and returns True, or
    returns False when it is too late, and then somebody must already be about to reschedule the task. An error of the
    park function is raised in the task. If the current scope is cancelled, nothing is called and Cancelled is raised.
    """
    return (yield park_function)


async def checkpoint_if_due():
    """What an operation begins with that need not wait: always a point of cancellation, and a checkpoint when the task has
    had its turn, which is so many operations in a row. Returns the current task. RuntimeError where no task runs.
    """
    task = _local.worker.task
    if task.budget > 0:
        task.budget -= 1
    else:
        await checkpoint()
    return task


def coroutine(function):
    """Turn a generator function into a coroutine function: `yield from` awaits.

    >>> @flowcoro.coroutine
    ... def twice(channel):
    ...     first = yield from channel.receive()
    ...     return first, (yield from channel.receive())
    """
    if not callable(function):
        raise TypeError(f"@coroutine decorates a generator function, got {function!r}")
    return types.coroutine(function)


# ---- cancel scopes --------------------------------------------------------------------------------------------
# The tree of scopes is not stored: it is read off. A task has a stack of scopes (task._scope is the innermost, each
# knows its outer one); below the stack lies the task itself, which can be cancelled too; below that the scope of its
# task group, in the parent's stack; and so on down to the kernel's root. Entering a scope is therefore two stores.
# To cancel walks from the scope up: through the task's inner scopes, and into the tasks of every group opened there.
#
# A task inside a cancelled scope is marked by two fields, so that checkpoints need not look for it: budget is 0
# (sends operations that need not wait to a real checkpoint), and _resume is a method that throws (I4).
#
# Rejected: a set of children in every scope (trio): two set operations per `with timeout()`. Exceptions pushed once
# (asyncio): edge-triggered cancellation is lost for good when some library swallows it.

def _as_float(number):
    """Of an int, a Decimal or a Fraction, so that sums with now() cannot fail later; what is too large is infinite."""
    try:
        return float(number)
    except OverflowError:
        return _INF if number > 0 else -_INF


def _is_count(number, least):
    """Whether it is an int from `least` up. True is none: it mostly stands where another argument was meant."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def _checked_deadline(deadline, whose="the deadline of a CancelScope is"):
    try:
        if -_INF <= deadline <= _INF:
            return _as_float(deadline)
    except TypeError:
        raise TypeError(f"{whose} {deadline!r}; give seconds as of now(), or math.inf for none") from None
    except ArithmeticError:         # Decimal("nan")
        pass
    raise ValueError(f"{whose} {deadline!r}; give seconds as of now(), or math.inf for none")


def _split_cancelled(group):
    """What an ExceptionGroup holds of Cancelled, and the rest; each None if there is nothing of it."""
    try:
        return group.split(Cancelled)
    except Exception:           # nested too deep for the recursion in there, or of a class whose own split() fails
        return None, group


class CancelScope(_Unique):
    """A region of code that can be cancelled as a whole: `with CancelScope(deadline=…, shield=…) as scope:`.

    deadline: absolute time in seconds of now(), can be moved at any time. shield: keep cancellation from outside away
    (for cleanup that has to await); scope.cancel() and its own deadline still work. A scope serves one `with`.
    After it, `cancelled_caught` says whether the block was left early because of this scope.

    ValueError if the deadline is nan, TypeError if it is no number. RuntimeError when a scope is entered twice, outside a
    kernel, or left while one that was entered later is still open.

    Atomic: entering, leaving, cancel(), cancel_called, and each move of deadline or shield.
    """

    __slots__ = ("_deadline", "_seconds", "_shield", "_task", "_outer", "_group", "_cancelled", "_expired", "_raises",
                 "_entered", "_firm", "cancelled_caught")

    def __init__(self, *, deadline=_INF, shield=False):
        self._deadline = _checked_deadline(deadline)
        self._seconds = None        # timeout in seconds: the deadline is counted from the entry
        self._shield = shield
        self._task = None           # while entered: whose stack it is on
        self._outer = None
        self._group = None          # the TaskGroup that this is the scope of
        self._cancelled = False
        self._expired = False       # cancelled by its deadline
        self._raises = False        # timeout(): leave with TimeoutError
        self._entered = False
        self._firm = False          # the shield holds even when a second Ctrl-C drops shields
        self.cancelled_caught = False

    @atomic
    def __enter__(self):
        worker = _local.worker
        task = worker.task or current_task()        # which says that none runs
        if self._entered:
            raise RuntimeError("a CancelScope serves one `with`; make a new one")
        self._entered = True
        self._task = task
        self._outer = task._scope
        task._scope = self
        if self._seconds is not None:
            self._deadline = worker.now() + self._seconds
        if self._deadline < task._timer or self._seconds == 0:
            self._watch(worker)
        if self._cancelled or self._shield:
            _refresh(task)
        return self

    @atomic
    def __exit__(self, kind, error, trace):
        task = self._task
        try:
            innermost = task._scope
        except AttributeError:          # (to ask first would cost 10 ns of 200)
            raise RuntimeError("a CancelScope is left that is not entered, or a second time; use it with `with`") from None
        if innermost is not self:
            self._leave_out_of_order()
        task._scope = self._outer
        self._task = None
        if not self._cancelled and not self._shield:
            return False
        if task is task._worker.task:
            _refresh(task)
        elif task._state != DONE and _is_cancelled(task, task._scope):
            task._interrupt()           # another one closes the async generator that holds this scope
        if not self._cancelled or error is None or task._resume is not task._send and not self._shield:
            return False            # the last: the outer scope is cancelled as well, and the outermost one wins
        if isinstance(error, BaseExceptionGroup):
            cancelled, rest = _split_cancelled(error)
            if cancelled is None:
                return False
            self.cancelled_caught = True
            task._swallowed = 0
            if rest is not None:
                raise rest from rest.__cause__
        elif not isinstance(error, Cancelled):
            return False
        self.cancelled_caught = True
        task._swallowed = 0
        if self._raises and self._expired:
            raise TimeoutError("the deadline passed before the block was done" if self._seconds is None else
                               f"timeout({self._seconds:g}): the block was not done in time") from error
        return True

    def _leave_out_of_order(self):
        """Two tasks, or an async generator that was suspended inside a scope, have interleaved their scopes."""
        scope = self._task._scope
        while scope is not None and scope is not self:
            scope = scope._outer
        if scope is self:
            self._task._scope = self._outer
        raise RuntimeError("a cancel scope was left while another one, entered later, was still open: scopes of one task "
                           "nest. Most often an async generator yielded inside `with timeout()` or a TaskGroup; open "
                           "the scope around the loop that consumes it instead")

    @atomic
    def _watch(self, worker):
        """See to it that the worker looks at this task at the deadline (now, if that has passed)."""
        if self._deadline <= worker.now():
            if not self._cancelled:
                self._expired = True
                self.cancel()
        else:
            worker.timers.set(self._task, self._deadline)

    @atomic
    def cancel(self):
        """Cancel everything inside, now and later: each checkpoint raises Cancelled. Twice is once. Never blocks."""
        if not self._cancelled:
            self._cancelled = True
            if self._task is not None:
                try:
                    _interrupt_inside(self._task, self)
                except BaseException as struck:     # as in Task.cancel()
                    self._cancelled = False
                    self._task._worker.inbox.append(self._interrupt)
                    self._cancelled = True
                    if struck.__class__ is not RecursionError:
                        raise

    def _interrupt(self):
        if self._task is not None:
            _interrupt_inside(self._task, self)

    @property
    def cancel_called(self):
        """Whether the scope is cancelled, by cancel() or by its deadline, even if nothing was awaited since."""
        if not self._cancelled and self._deadline < _INF:
            self._look_at_the_time()
        return self._cancelled

    @atomic
    def _look_at_the_time(self):
        if not self._cancelled and self._task is not None and self._deadline <= self._task._worker.now():
            self._expired = True
            self.cancel()

    @property
    def deadline(self):
        """Absolute time in seconds of now(); math.inf: none, or not known before the block of a move_on_after() or timeout()
        begins. Can be moved while the block runs."""
        return self._deadline

    @deadline.setter
    def deadline(self, deadline):
        self._move(_checked_deadline(deadline))

    @atomic
    def _move(self, deadline):
        self._deadline = deadline
        self._seconds = None if self._task is None else self._seconds
        if self._task is not None and deadline < self._task._timer:
            self._watch(self._task._worker)

    @property
    def shield(self):
        """Whether cancellation from outside is kept away. Can be changed while the block runs."""
        return self._shield

    @shield.setter
    def shield(self, shield):
        self._set_shield(bool(shield))

    @atomic
    def _set_shield(self, shield):
        self._shield = shield
        task = self._task
        if task is not None:
            if not shield and not self._cancelled and _is_cancelled(task, self._outer):
                _interrupt_inside(task, self)
            elif task is task._worker.task:
                _refresh(task)

    def __repr__(self):
        return (f"<CancelScope{' cancelled' if self._cancelled else ''}{' shielded' if self._shield else ''}"
                f"{f' deadline={self._deadline:.3f}' if self._deadline < _INF else ''}"
                f"{f' of {self._seconds:g} s' if self._seconds is not None and self._deadline == _INF else ''}>")


def _checked_seconds(seconds, caller):
    try:
        if seconds >= 0:            # says no to nan as well
            return _as_float(seconds)
    except TypeError:
        raise TypeError(f"{_said(caller, seconds)}: give a number of seconds; math.inf waits for ever") from None
    except ArithmeticError:         # Decimal("nan")
        pass
    raise ValueError(f"{_said(caller, seconds)}: seconds must be 0 or more; math.inf waits for ever")


def _said(caller, value):
    """What the user has written: a call, or an argument if `caller` ends in =."""
    return f"{caller}{value!r}" if caller.endswith("=") else f"{caller}({value!r})"


def move_on_after(seconds):
    """`with move_on_after(seconds) as scope:` leaves the block when the time is up; scope.cancelled_caught says so.

    ValueError if negative or nan.
    """
    scope = CancelScope()
    scope._seconds = _checked_seconds(seconds, "move_on_after")
    return scope


def timeout(seconds):
    """`with timeout(seconds):` raises TimeoutError when the block is not done in time.

    Of nested ones the outermost that has expired wins. The time is looked at while tasks wait: code that never awaits
    is not interrupted. ValueError if `seconds` is negative or nan.
    """
    scope = CancelScope()
    scope._seconds = _checked_seconds(seconds, "timeout")
    scope._raises = True
    return scope


def _firm_shield():
    """For waits that must not be left early: what they wait for is cancelled by itself, and so they end."""
    scope = CancelScope(shield=True)
    scope._firm = True
    return scope


def _groups(task):
    """The groups that a task has open, outermost first."""
    groups, scope = [], task._scope
    while scope is not None:
        if scope._group is not None:
            groups.append(scope._group)
        scope = scope._outer
    return groups[::-1]


def _is_cancelled(task, scope):
    """Whether `scope` of `task` (None: the task below its scopes) lies in a cancelled region. O(depth)."""
    while True:
        while scope is not None:
            if scope._cancelled:
                return True
            if scope._shield:
                return False
            scope = scope._outer
        if task._cancel_called:
            return True
        group = task._group
        task, scope = group._owner, group.scope
        if task is None:            # the root
            return group._doomed


@_guarded_function
def _refresh(task):
    """The running task has entered or left a scope that matters: set its two marks anew."""
    if _is_cancelled(task, task._scope):
        task.budget = 0
        task._resume = task._deliver
    else:
        task._resume = task._send


def _interrupt_inside(task, scope):
    """`scope` of `task` (None: all of the task) has been cancelled: tell every task inside that no shield protects."""
    pending = deque([(task, scope)])
    while pending:
        task, stop = pending.popleft()
        exposed, groups = True, []
        inner = task._scope
        while inner is not None:
            if inner._group is not None:
                groups.append(inner._group)
            if inner is stop:
                break
            if inner._shield:
                exposed = False
                groups.clear()
            inner = inner._outer
        if exposed:
            task._interrupt()
        for group in groups:
            group._doomed = True
            pending.extend((child, None) for child in group._tasks)


# ---- tasks ----------------------------------------------------------------------------------------------------

def _no_name(name):
    return TypeError(f"the name of a task must be a str, got {name!r}: dumps and reports are made of it. Give str() of that")


class Task(_Unique):
    """A coroutine that runs beside others. Made by spawn() and TaskGroup.spawn(), awaited for its result.

    `await task` returns the result or raises the task's error, as often as you like, in as many tasks as you like.
    It raises TaskCancelled if the task was cancelled. A cancelled `await` leaves the task running.

    Atomic: its end, and each method.
    """

    __slots__ = ("coro", "context", "_name", "_send", "_resume", "_value", "_item", "_error", "_state", "budget",
                 "park_reason", "abort_function", "_scope", "_group", "_worker", "_timer", "_wake_at",
                 "_joiners", "_cancel_called", "_swallowed", "_pinned", "__weakref__")

    def __init__(self, coro, group, worker, name, pinned):
        self.coro = coro
        self.context = contextvars.copy_context()       # while the watchdog suspects a step of it: a _Probe with that
        self._name = name
        self._send = coro.send      # kept bound: to make it anew costs 40 ns per step
        self._resume = self._send
        self._value = None          # to be sent in at the next step; at the end: the result
        self._item = None           # of the send in which it is parked
        self._error = None          # to be raised at the next step; at the end: a _Failure, Cancelled, or None
        self._state = READY
        self.budget = WOKEN         # see "How it works"; 0 makes the next operation a point of scheduling
        self.park_reason = None
        self.abort_function = None
        self._scope = None          # the innermost cancel scope
        self._group = group
        self._worker = worker
        self._timer = _INF          # I6
        self._wake_at = _INF        # while parked in sleep(): until when
        self._joiners = None        # ParkingLot of those who await it, once there are any
        self._cancel_called = False
        self._swallowed = 0         # deliveries of Cancelled in this cancellation
        self._pinned = pinned       # stays with its worker

    # -- the ways to make a step. Each is the value of _resume at some time and is called in the task's context.

    def _raise_error(self, value):
        _refresh(self)
        error, self._error = self._error, None
        throw = self.coro.throw
        del self
        try:
            return throw(error)
        finally:
            del error

    def _step_then_cancel(self, value):
        """What was delivered before the cancel goes first (I3). A new task runs to its first checkpoint: it may own things."""
        _refresh(self)
        error, self._error = self._error, None
        send, throw = self._send, self.coro.throw
        del self
        try:
            return send(value) if error is None else throw(error)
        finally:
            del error

    def _deliver(self, value):
        _refresh(self)                  # another task may have raised a shield since; this one still arrives
        self._swallowed += 1
        if self._swallowed == SWALLOWED_LIMIT:
            report_error(RuntimeError(f"{self!r} has caught Cancelled {SWALLOWED_LIMIT} times and goes on. A cancelled scope "
                                 "raises it at every checkpoint: let it pass, or break out of the loop. It awaits at\n"
                                 + "\n".join(_await_chain(self))), "cancellation is swallowed", object=self)
        if self._worker.kernel.signals.interrupts > 1:      # asked twice: who swallows Cancelled may respect this
            return self.coro.throw(KeyboardInterrupt())
        return self.coro.throw(Cancelled())

    # -- cancellation

    def _interrupt(self):
        """The task is inside a cancelled scope: make it notice as soon as I3 allows."""
        self._swallowed = 0
        if self._state == PARKED:
            if self._resume is not self._send:
                return                          # parked for good, and told before
            abort, strike = self.abort_function, None
            self._resume = self._deliver        # first this: _recover() knows by it who was struck in here
            try:
                aborted = abort(self)
            except RecursionError:
                self._resume = self._send
                raise
            except BaseException as error:
                if getattr(getattr(abort, "__func__", abort), "__globals__", None) is globals():
                    strike, aborted = error, _abort_again(self)     # a signal handler's: ours do not fail
                else:
                    report_error(error, f"an abort function failed; {self!r} cannot be cancelled before it is rescheduled",
                                 object=self)
                    aborted = False
            if aborted:
                try:
                    _reschedule(self)
                except BaseException as error:  # it has no place to go back to
                    here = _local.worker
                    if self._state is PARKED:
                        here.inbox.append(self._go_on)
                    if not isinstance(error, RecursionError) or here.task is None:
                        raise
            else:
                self._resume = self._step_then_cancel
            if strike is not None:
                self.budget = 0
                raise strike
        elif self.budget == WOKEN and self is not self._worker.task:
            self._resume = self._step_then_cancel
        elif self._resume != self._step_then_cancel:
            self._resume = self._deliver
        self.budget = 0

    @atomic
    def _go_on(self):
        """Who cancelled it was struck when it was in no place any more. If he was the loop itself, _recover() came first."""
        if self._state == PARKED and self._resume == self._deliver:
            _reschedule(self)

    @atomic
    def cancel(self):
        """Cancel the whole task: Cancelled is raised at each of its checkpoints. Harmless when done. Never blocks."""
        if self._state != DONE and not self._cancel_called:
            self._cancel_called = True
            try:
                _interrupt_inside(self, None)
            except BaseException as struck:     # where the caller's stack ends; the loop has enough of it, and tells the rest
                self._cancel_called = False     # should there be no room even for this
                self._worker.inbox.append(functools.partial(_interrupt_inside, self, None))
                self._cancel_called = True
                if struck.__class__ is not RecursionError:      # a signal handler's
                    raise

    # -- the outcome

    def __await__(self):
        task = _local.worker.task
        if task is self:
            raise RuntimeError(f"{self!r} awaits itself and would wait for ever")
        if task.budget > 0:
            task.budget -= 1
        else:
            yield
        if self._state != DONE:
            yield self._park_joiner
        try:
            return self.result()
        finally:
            del self, task              # else the error's traceback, and so the error, would hold the task that holds it

    def _park_joiner(self, task):
        if self._state == DONE:             # on another worker, in between
            _reschedule(task)
            return
        if self._joiners is None:
            self._joiners = ParkingLot("wait for a task", self)
        self._joiners._park(task)

    def done(self):
        """Whether it has ended, in whatever way."""
        return self._state == DONE

    def cancelled(self):
        """Whether it has ended by being cancelled."""
        return self._state == DONE and isinstance(self._error, Cancelled)

    def result(self):
        """What the coroutine returned; raises what it raised, TaskCancelled, or RuntimeError while it is not done."""
        error = self.exception()
        if error is None:
            return self._value
        try:
            raise error
        finally:
            del self, error             # as in __await__

    def exception(self):
        """What the coroutine raised, a TaskCancelled, or None; RuntimeError while it is not done."""
        if self._state != DONE:
            raise RuntimeError(f"{self!r} is not done; await it")
        if self._error is None:
            return None
        if isinstance(self._error, Cancelled):
            return TaskCancelled(f"task {self.name!r} was cancelled")
        return self._error.take()

    @property
    def name(self):
        """The name given to spawn(), else the name of the coroutine's function. Can be set; TypeError if not to a str."""
        return self._name or getattr(self.coro, "__qualname__", type(self.coro).__name__)

    @name.setter
    def name(self, name):
        if name is not None and not isinstance(name, str):
            raise _no_name(name)
        self._name = name

    @property
    def pinned(self):
        """Whether it stays with its worker, in one thread: main does, and who was spawned so."""
        return bool(self._pinned)

    @property
    def state(self):
        """"ready", "running", "parked" or "done"."""
        if self._state == READY and self is self._worker.task:
            return "running"
        return _STATES[self._state]

    def __repr__(self):
        if self._state == DONE:
            error = self._error
            how = ("" if error is None else ": cancelled" if isinstance(error, Cancelled)
                   else f": failed with {_shown(error.error)}")
        else:
            how = f": {self.park_reason}" if self._state == PARKED else ""
        return f"<Task {self.name} {self.state}{how}>"


def _abort_again(task):
    """What its abort function says, which was struck in the middle, and of ours may be called twice."""
    try:
        return task.abort_function(task)
    except Exception:               # it had taken the task out
        return True


def _is_lost(task):
    """Whether a parked task is no longer in the place where it was parked: a signal handler struck who was to wake it."""
    place = getattr(task.abort_function, "__self__", None)
    if isinstance(place, RWLock):
        place = place._lot
    if isinstance(place, ParkingLot):
        return task not in place._tasks
    return isinstance(place, Pollable) and task is not place._reader and task is not place._writer


def current_task():
    """The task that calls. RuntimeError outside a kernel, and where none runs: in hooks, in call_from_thread()."""
    task = _local.worker.task
    if task is None:
        raise RuntimeError("no task runs here: this is a hook, or a function of call_from_thread(), which can neither hold "
                           "a lock nor enter a scope. In a task of spawn() it can")
    return task


def _reschedule(task, value=None, error=None):
    """As reschedule(), for those who hold the guard if there are several workers."""
    if task._state != PARKED:
        raise RuntimeError(f"{task!r} is not parked: each park is answered by exactly one reschedule")
    task._state = READY
    task._value = value
    task.budget = WOKEN
    if error is not None:
        task._error = error
        if task._resume is task._send:
            task._resume = task._raise_error
    try:
        worker = task._worker
        if not worker.beset and worker.hooks is None:       # what follows has no more to do then, but costs 2 % of a channel
            worker.ready.append(task)
            return
        try:
            if worker.beset:
                worker = worker.taken_over(task)
            if worker.hooks is not None:
                worker.kernel.fire("task_rescheduled", task)
        except RecursionError:
            raise
        except BaseException:       # a signal handler's: it is woken all the same
            task._worker.ready.append(task)
            raise
        worker.ready.append(task)
    except RecursionError:          # the caller's stack ends here; he puts the task back where it was (I2)
        task._state, task._value, task._error = PARKED, None, None
        if error is not None and task._resume.__func__ is Task._raise_error:    # (to compare the methods would need stack)
            task._resume = task._send
        raise
    if worker.sleeping:             # I5: first append, then look who sleeps
        try:
            worker.wake()
        except RecursionError:      # who keeps watch will do it: the task has its place
            pass


def reschedule(task, value=None, error=None):
    """Make a parked task runnable: its park returns `value` or raises `error`. Exactly once per park.

    In a thread of the kernel; from others use a Promise or call_from_thread(). RuntimeError if the task is not
    parked: whoever wakes a task must first take it out of the place where it was parked, and the one who finds it
    there is the one to wake it. RecursionError where the stack ends: the task is still parked, and has to go back there.
    TypeError for what is no task.
    """
    if task.__class__ is not Task:
        raise TypeError(f"reschedule({task!r}): it takes a Task that is parked")
    if task._worker.others:
        with _GUARD:
            _reschedule(task, value, error)
    else:
        _reschedule(task, value, error)


# ---- parking --------------------------------------------------------------------------------------------------

class ParkingLot(_Unique):
    """A FIFO of parked tasks: the one waiting place that locks, events, channels and groups are made of.

    reason: what a dump says of those who wait here. holder: the task (or tasks) that could wake them, when known: a
    dump and the deadlock report follow it. A cancelled task leaves its place in O(1) and nothing else happens.

    Besides tasks the lot may hold stand-ins with a method commit(value), which wake the task they stand for, and waits(),
    whether it is still to be woken; that is how one task waits in several places (select, as_completed).

    Atomic: unpark(); parking, together with the predicate of park_unless(); the leaving of a cancelled task.
    """

    # An OrderedDict, as in trio: a deque needs O(n) to take one out of the middle, a plain dict O(n) to pop its first
    # once many have been popped before.
    __slots__ = ("reason", "holder", "_tasks")

    def __init__(self, reason="parked", holder=None):
        self.reason = reason
        self.holder = holder
        self._tasks = OrderedDict()

    @types.coroutine
    def park(self):
        """Wait here until unpark(); return its value or raise its error."""
        return (yield self._park)

    async def park_unless(self, predicate):
        """As park(), unless predicate() returns something true: then the task goes on at once, and gets that.

        It is asked as the last thing before the task is stored, in one atomic step with that: with several workers, what a
        primitive has seen before may have changed meanwhile. A checkpoint in any case. Its error is raised here. TypeError
        for an async one.
        """
        _checked_function(predicate, "park_unless", "it is asked while nobody else can run, and so cannot wait")
        return await park(functools.partial(self._park_unless, predicate))

    def _park_unless(self, predicate, task):
        if answer := predicate():
            _reschedule(task, answer)
        else:
            self._park(task)

    def _park(self, task):
        task.park_reason = self.reason
        task.abort_function = self._abort
        self._tasks[task] = None

    def _abort(self, task):
        self._tasks.pop(task, None)     # not there: a signal handler has struck who was to wake it
        return True

    def _stay(self, task):
        """The abort function of those who cannot leave."""
        return False

    @atomic
    def unpark(self, count=1, value=None, error=None):
        """Wake the `count` (math.inf: all) that have waited longest. Returns how many there were. TypeError if it is no int."""
        if count.__class__ is not int and count != _INF and not isinstance(count, int):
            raise TypeError(f"unpark({count!r}): it takes a number of tasks, an int, or math.inf")
        woken = 0
        while woken < count and self._tasks:
            for parked in self._tasks:      # popitem() is a call: a signal handler could strike while it is in neither place
                break
            del self._tasks[parked]
            try:
                if parked.__class__ is Task:
                    _reschedule(parked, value, error)
                else:
                    parked.commit(value, error)
            except BaseException as struck:  # a signal handler struck, or the stack ends here: == may need some, `is` does not
                if (parked._state is PARKED if parked.__class__ is Task
                        else struck.__class__ is RecursionError or parked.waits()):
                    self._tasks[parked] = None
                    for other in [*self._tasks][:-1]:     # to the front, without a call: there may be no stack for one
                        del self._tasks[other]
                        self._tasks[other] = None
                raise
            woken += 1
        return woken

    def unpark_all(self, value=None, error=None):
        """Wake all that wait now. Returns how many."""
        return self.unpark(_INF, value, error)

    def __len__(self):
        return len(self._tasks)

    def statistics(self):
        """{"tasks_waiting": int}"""
        return {"tasks_waiting": len(self._tasks)}


# ---- readiness ------------------------------------------------------------------------------------------------
# A file descriptor is registered once, for both directions, edge-triggered, and stays so until it is closed: no
# epoll_ctl per operation (0.4 us each). In exchange somebody has to remember what the last edge said: the Pollable.

class _Bits(dict):
    """epoll's event -> READ, WRITE and HANGUP. Few ever come up; to work each out anew cost 0.1 us of an echo's 7."""

    def __missing__(self, event):
        over = _select.EPOLLHUP | _select.EPOLLERR
        bits = self[event] = (READ * bool(event & (_select.EPOLLIN | _select.EPOLLRDHUP | over))
                              | WRITE * bool(event & (_select.EPOLLOUT | over))
                              | HANGUP * bool(event & (_select.EPOLLRDHUP | over)))
        return bits


if hasattr(selectors, "EpollSelector"):
    class _EdgePoller(selectors.EpollSelector):
        """epoll, edge-triggered, one registration for both directions."""

        # Of the base class it has the descriptor alone. Its keys, a tuple for each descriptor, cost memory and time.
        _EVENTS = _select.EPOLLIN | _select.EPOLLOUT | _select.EPOLLRDHUP | _select.EPOLLET
        _BITS = _Bits()
        is_armed = True                         # always: who waits does not have to say so

        def __init__(self):
            super().__init__()
            self._pollables = {}                # by the descriptor's number

        def add(self, pollable):
            if pollable.fd in self._pollables:
                raise KeyError(pollable.fd)
            self._selector.register(pollable.fd, self._EVENTS)
            self._pollables[pollable.fd] = pollable

        def remove(self, pollable):
            if self._pollables.pop(pollable.fd, None) is not None:
                try:
                    self._selector.unregister(pollable.fd)
                except OSError:                 # the descriptor has been closed
                    pass

        def arm(self, pollable):
            """A task is about to wait: nothing to do, the registration stands."""

        def stale(self, fd):
            """The Pollable of this number, if that was of a file which was closed without a word: an error may strike between the
            making of a Pollable and the moment when somebody holds it. Else None."""
            pollable = self._pollables[fd]
            try:
                self.verify(pollable)
            except FileNotFoundError:
                return pollable
            return None

        def rearm_all(self):
            for pollable in list(self._pollables.values()):
                if pollable.wants():
                    self.rearm(pollable)

        def rearm(self, pollable):
            """Report again what is the case now. FileNotFoundError when the number has become another file."""
            self._selector.modify(pollable.fd, self._EVENTS)

        def verify(self, pollable):
            """FileNotFoundError when the number has become another file; changes nothing, unlike rearm()."""
            try:
                self._selector.register(pollable.fd, self._EVENTS)
            except FileExistsError:             # that very file is registered
                return
            self._selector.unregister(pollable.fd)
            raise FileNotFoundError(errno.ENOENT, "another file")

        def wait(self, timeout):
            """[(pollable, bits)] for what became ready within `timeout` seconds (None: no limit)."""
            # Rounded up to the milliseconds that epoll counts in: to wake before the deadline would be to spin until it.
            timeout = -1 if timeout is None else math.ceil(timeout * 1e3) * 1e-3
            bits, pollable_of = self._BITS, self._pollables.get
            return [(pollable, bits[event]) for fd, event in self._selector.poll(timeout, max(len(self._pollables), 1))
                    if (pollable := pollable_of(fd)) is not None]       # else another worker has just removed it


class _LevelPoller:
    """Any other selector: level-triggered, so a descriptor is registered only while a task waits for it."""

    is_armed = False

    def __init__(self, selector):
        self._selector = selector
        self._files = {}                        # number: (Pollable, which file it is)
        self._busy = threading.Lock()           # poll() by two threads at once is an error

    def add(self, pollable):
        if pollable.fd in self._files:
            raise KeyError(pollable.fd)
        self._files[pollable.fd] = pollable, _inode(pollable.fd)        # poll() would take a closed one and report it later

    def remove(self, pollable):
        self._files.pop(pollable.fd, None)
        self.disarm(pollable)

    def stale(self, fd):
        """As of _EdgePoller."""
        pollable, file = self._files[fd]
        return pollable if file != _inode(fd) else None

    def disarm(self, pollable):
        if pollable.fd in self._selector.get_map():
            self._selector.unregister(pollable.fd)

    def arm(self, pollable):
        events = pollable.wants()
        if not events:
            self.disarm(pollable)
        elif pollable.fd in self._selector.get_map():
            self._selector.modify(pollable.fd, events, pollable)
        else:
            self._selector.register(pollable.fd, events, pollable)

    def rearm(self, pollable):
        """Nothing to do, and nothing known of which file it is."""

    verify = rearm

    def rearm_all(self):
        """Nothing to do: what was ready still is."""

    def wait(self, timeout):
        if not self._busy.acquire(blocking=False):
            return []                           # another worker does it at the moment
        try:
            return self._wait(timeout)
        finally:
            self._busy.release()

    def _wait(self, timeout):
        try:
            found = self._selector.select(timeout)
        except OSError:                         # select() fails for all when one of them has been closed: that one is it
            closed = [key for key in self._selector.get_map().values() if not _is_open(key.fd)]
            if not closed:
                raise
            found = [(key, selectors.EVENT_READ | selectors.EVENT_WRITE) for key in closed]
        return [(key.data, READ * bool(events & selectors.EVENT_READ) | WRITE * bool(events & selectors.EVENT_WRITE))
                for key, events in found]

    def close(self):
        self._selector.close()


def _inode(fd):
    """Which file a descriptor is. OSError if none."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _new_poller():
    if selectors.DefaultSelector is getattr(selectors, "EpollSelector", None):
        return _EdgePoller()
    return _LevelPoller(selectors.DefaultSelector())


def _fileno(fd):
    number = fd.fileno() if hasattr(fd, "fileno") else fd if isinstance(fd, int) and not isinstance(fd, bool) else None
    if number is None or not 0 <= number < 2**31:
        raise ValueError(f"{fd!r} is not an open file descriptor: give a number from 0 up, or an object whose fileno() "
                         "is one")
    return number


class Pollable(_Unique):
    """A file descriptor (or an object with fileno()) that tasks can wait for; what sockets are made of.

    `readable` and `writable` say what the last edge said, and start out True. Set the flag to False, then try the
    operation (in this order: with several workers an edge may come in between); when it says EAGAIN, await
    wait_readable() or wait_writable(), which return at once while the flag is True; when there may be more, set it to
    True again. `hangup`: the peer has closed or reset, so that a short read does not mean that the buffer is empty.
    One task may wait per direction (else BusyError). close() it before the descriptor is closed.
    Raises OSError when the descriptor is closed or of a kind that is always ready, such as a regular file; BusyError
    when it has a Pollable already, or a task waits in wait_readable() or wait_writable() for it; ValueError for what is no
    descriptor; RuntimeError outside a kernel.

    Atomic: a wait's look at its flag together with parking; an edge; close().
    """

    __slots__ = ("fd", "readable", "writable", "hangup", "_reader", "_writer", "_worker", "_closed", "_is_armed", "_reading")

    def __init__(self, fd):
        self.fd = _fileno(fd)
        self.readable = self.writable = True
        self.hangup = self._closed = False
        self._reader = self._writer = None      # the task that waits
        self._reading = None                    # the reason of its readers' park; to format it anew took 110 ns of each
        self._worker = worker = _local.worker
        self._is_armed = worker.poller.is_armed
        self._begin(worker)

    @atomic
    def _begin(self, worker):
        self._register(worker.poller)
        worker.descriptors += 1

    def _register(self, poller):
        try:
            poller.add(self)
        except PermissionError as error:
            raise PermissionError(error.errno, f"file descriptor {self.fd} is always ready (a regular file?) and cannot be "
                                  "waited for; use to_thread() to read it") from error
        except OSError as error:
            raise OSError(error.errno, f"file descriptor {self.fd} cannot be waited for: {error.strerror}") from error
        except KeyError as error:
            plain = self._worker.kernel.plain.get(self.fd)
            if plain is None:
                stale = poller.stale(self.fd)
                if stale is None:
                    raise BusyError(f"file descriptor {self.fd} has a Pollable already; close() that first") from error
                stale.close()
            elif plain.wants():
                try:
                    plain._verify(poller.rearm)
                except FileNotFoundError:
                    plain._another_file()
                else:
                    raise BusyError(f"a task waits for file descriptor {self.fd} in wait_readable() or wait_writable(); a "
                                    "Pollable must be made before or after") from error
            notify_closing(self.fd)             # what those functions have kept of it
            self._register(poller)

    # Generators, with checkpoint_if_due() and park() written out: three coroutines fewer to make and to go through at each
    # resumption took 170 ns off a wait of 1,000.

    @types.coroutine
    def wait_readable(self):
        """Return when there is something to read, or the end. BusyError, ClosedError. Cancelled: nothing consumed."""
        task = _local.worker.task
        if task.budget > 0:
            task.budget -= 1
        else:
            yield
        if not self.readable or self._closed:
            yield self._park_unless_readable

    @types.coroutine
    def wait_writable(self):
        """Return when there is room to write, or the connection is broken. BusyError, ClosedError."""
        task = _local.worker.task
        if task.budget > 0:
            task.budget -= 1
        else:
            yield
        if not self.writable or self._closed:
            yield self._park_unless_writable

    def _park_unless_readable(self, task):
        if self.readable and not self._closed:      # another worker has polled in between
            _reschedule(task)
        else:
            self._park_reader(task)
            if self._worker.others:         # its edge may have come, and been told, before the task has unset the flag
                self._worker.poller.rearm(self)

    def _park_unless_writable(self, task):
        if self.writable and not self._closed:
            _reschedule(task)
        else:
            self._park_writer(task)
            if self._worker.others:
                self._worker.poller.rearm(self)

    def _park_reader(self, task):
        if self._reader is not None or self._closed:
            self._refuse(self._reader, "read")
        task.park_reason = self._reading or self._say_reading()
        task.abort_function = self._abort
        self._reader = task
        self._worker.io_parked += 1
        if not self._is_armed:
            self._arm_for(task)

    def _park_writer(self, task):
        if self._writer is not None or self._closed:
            self._refuse(self._writer, "written")
        task.park_reason = f"wait until fd {self.fd} is writable"
        task.abort_function = self._abort
        self._writer = task
        self._worker.io_parked += 1
        if not self._is_armed:
            self._arm_for(task)

    def _say_reading(self):
        self._reading = f"wait until fd {self.fd} is readable"
        return self._reading

    def _refuse(self, waiting, verb):
        if self._closed:
            raise ClosedError(f"file descriptor {self.fd} has been closed here")
        raise BusyError(f"file descriptor {self.fd} is being {verb} by {waiting!r} already; one task at a time")

    def _arm_for(self, task):
        try:
            self._arm()
        except BaseException:
            self._abort(task)
            raise

    def _abort(self, task):
        if self._reader is task:
            self._reader = None
        elif self._writer is task:
            self._writer = None
        else:
            return True                     # it was taken out before, by one who was struck then
        self._worker.io_parked -= 1
        if not self._is_armed:
            try:
                self._arm()
            except RecursionError:          # it goes on being watched, until the next event finds that nobody waits
                pass
        return True

    def _arm(self):
        self._worker.poller.arm(self)
        if self._worker is not _local.worker:       # poll() and select() look at what was armed before
            self._worker.wake()

    def wants(self):
        """The events that parked tasks wait for, in the selectors module's bits."""
        return (selectors.EVENT_READ if self._reader is not None else 0) | (
            selectors.EVENT_WRITE if self._writer is not None else 0)

    @atomic
    def ready(self, bits):
        """The poller's word that something has changed."""
        if bits & HANGUP:
            self.hangup = True
        if bits & READ:
            self.readable = True
            if self._reader is not None:
                self._wake_reader(None)
        if bits & WRITE:
            self.writable = True
            if self._writer is not None:
                self._wake_writer(None)
        if not self._is_armed:
            self._arm()

    def _wake(self, bits, error=None):
        if bits & READ and self._reader is not None:
            self._wake_reader(error and error())
        if bits & WRITE and self._writer is not None:
            self._wake_writer(error and error())
        if not self._is_armed:
            self._arm()

    def _wake_reader(self, error):
        task, self._reader = self._reader, None     # first this: who is lost when this is struck is found by that
        try:
            _reschedule(task, None, error)
        except BaseException:
            if task._state is PARKED:               # the stack ended
                self._reader = task
            else:
                self._worker.io_parked -= 1
            raise
        self._worker.io_parked -= 1

    def _wake_writer(self, error):
        task, self._writer = self._writer, None
        try:
            _reschedule(task, None, error)
        except BaseException:
            if task._state is PARKED:
                self._writer = task
            else:
                self._worker.io_parked -= 1
            raise
        self._worker.io_parked -= 1

    @atomic
    def close(self):
        """Stop watching (the descriptor itself stays open); those who wait get ClosedError. Twice is once."""
        if self._closed:
            return
        if not self._worker.kernel.ended:
            self._wake(READ | WRITE, lambda: ClosedError(
                f"file descriptor {self.fd} was closed here while this task waited for it"))
            self._worker.poller.remove(self)
            self._worker.descriptors -= 1       # after the last call: who is struck before may close it again
        self._closed = True

    def __repr__(self):
        return f"<Pollable fd={self.fd}{' closed' if self._closed else ''}>"


class _PlainFd(Pollable):
    """What wait_readable(fd) keeps for a number about which nobody promised anything.

    The number may have been closed and be another file by now. So each wait arms the registration anew, which reports
    at once what is ready now, and fails if the file is another one; and each event is checked against the descriptor
    before it wakes anybody, for epoll goes on reporting a closed file that has a duplicate, under its old number. Two
    witnesses, since neither knows all: epoll remembers files that had the number before, and anonymous files (eventfd)
    share one inode.
    """

    __slots__ = ("_inode",)

    def __init__(self, fd):
        super().__init__(fd)
        try:
            self._inode = _inode(self.fd)
        except OSError:                     # another thread has closed it since
            self.close()
            raise

    def _verify(self, witness):
        inode = _inode(self.fd)
        if inode != self._inode:
            self._inode = inode
            raise FileNotFoundError(errno.ENOENT, "another file")
        witness(self)

    def _park_reader(self, task):
        self._arm_anew()
        super()._park_reader(task)

    def _park_writer(self, task):
        self._arm_anew()
        super()._park_writer(task)

    def _arm_anew(self):
        poller = self._worker.poller
        if self._closed:                    # by notify_closing() on another worker, in between
            self._refuse(None, None)
        try:
            self._verify(poller.rearm)
        except FileNotFoundError:
            self._another_file()
            poller.remove(self)
            self._register(poller)

    def _another_file(self):
        """Whoever waits, waits for a file that is gone."""
        self._wake(READ | WRITE, lambda: ClosedError(
            f"file descriptor {self.fd} was closed while this task waited for it, and is another file now; call "
            "notify_closing(fd) before closing"))

    @atomic
    def ready(self, bits):
        wanted = _select.POLLIN if self._reader is not None else 0
        if self._writer is not None:
            wanted |= _select.POLLOUT
        if not wanted:
            return
        try:
            self._verify(self._worker.poller.verify)
        except FileNotFoundError:
            self._another_file()
            return
        except OSError as error:
            number = error.errno
            self._wake(READ | WRITE, lambda: OSError(number, f"file descriptor {self.fd} was closed while waited for"))
            return
        probe = _select.poll()
        probe.register(self.fd, wanted)
        for _, event in probe.poll(0):
            self._wake(READ * bool(event & ~_select.POLLOUT) | WRITE * bool(event & ~_select.POLLIN))


async def _wait_for_fd(fd, bit):
    worker = (await checkpoint_if_due())._worker
    kernel, number = worker.kernel, _fileno(fd)
    plain = _plain_fd(kernel, number)
    wait = plain._park_reader if bit == READ else plain._park_writer
    try:
        await park(functools.partial(_park_if_open, fd, number, wait) if worker.others else wait)
    except (OSError, ClosedError):      # of a kind that cannot be waited for
        _forget_plain_fd(kernel, plain)
        raise


def _park_if_open(fd, number, wait, task):
    """Another worker may have closed it in between, and the number be another file's."""
    try:
        now = fd if isinstance(fd, int) else fd.fileno()
    except ValueError:              # of a closed file
        now = -1
    if now != number:
        raise ClosedError(f"file descriptor {number} has been closed here")
    wait(task)


@_guarded_function
def _plain_fd(kernel, number):
    plain = kernel.plain.get(number)
    if plain is None:
        plain = kernel.plain[number] = _PlainFd(number)
    return plain


async def wait_readable(fd):
    """Return when the descriptor (a number, or an object with fileno()) has something to read or has come to its end.

    For non-blocking descriptors that nobody made a Pollable of. BusyError when another task waits for the same;
    OSError when it is closed; ClosedError when notify_closing(fd) is called meanwhile. Cancelled: nothing consumed.
    """
    await _wait_for_fd(fd, READ)


async def wait_writable(fd):
    """Return when the descriptor has room to write or is broken. Errors as wait_readable."""
    await _wait_for_fd(fd, WRITE)


def notify_closing(fd):
    """Say, before closing it, that the descriptor is about to be closed: those who wait for it get ClosedError.

    Close it without an await in between. With several workers give objects, not numbers, which may be another file's by the
    time that another worker takes them up.
    """
    worker, number = _local.worker, _fileno(fd)
    _close_plain_fd(worker.kernel, number)
    if worker.others:
        worker.inbox.append(functools.partial(_look_after_close, worker, number, worker.task))


@_guarded_function
def _forget_plain_fd(kernel, plain):
    """Its last wait has failed."""
    if plain.wants() == 0 and kernel.plain.get(plain.fd) is plain:
        _close_plain_fd(kernel, plain.fd)


@_guarded_function
def _close_plain_fd(kernel, number):
    plain = kernel.plain.pop(number, None)
    if plain is not None:
        plain.close()


@_guarded_function
def _look_after_close(worker, number, task):
    """After the step of `task`: has anybody, on another worker, begun to wait for it before it was closed?"""
    plain = worker.kernel.plain.get(number)
    if worker.task is task is not None:         # who stands in for that worker makes the call
        worker.inbox.append(functools.partial(_look_after_close, worker, number, task))
    elif plain is not None:
        plain.ready(0)


class _End:
    """The end of a pipe or a pair of sockets, closed with the last reference to it."""

    def __init__(self, use, close):
        self.use, self.close = use, close

    def __del__(self):
        self.close()


class _WakeUp:
    """The descriptor by which other threads and signals end a worker's sleep. Stands in for a Pollable."""

    def __init__(self):
        if hasattr(os, "pipe2"):
            self.fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._near = _End(functools.partial(os.read, self.fd), functools.partial(os.close, self.fd))
            self._far = _End(functools.partial(os.write, self.write_fd), functools.partial(os.close, self.write_fd))
        else:                                   # Windows selects sockets only
            import socket
            near, far = socket.socketpair()
            near.setblocking(False)
            far.setblocking(False)
            self.fd, self.write_fd = near.fileno(), far.fileno()
            self._near, self._far = _End(near.recv, near.close), _End(far.send, far.close)
        self.callers = []           # an entry for each that is in call()

    def call(self):
        """From any thread, signal handler and finaliser, which may hold any lock: it takes none.

        Whoever is in here holds on to the end that it writes to, so its number cannot be another file's meanwhile.
        """
        self.callers.append(None)
        try:
            if (end := self._far) is not None:
                end.use(b"\0")
        except (BlockingIOError, ConnectionError):      # full: it is awake; closed by now
            pass
        finally:
            end = None
            self.callers.pop()

    def wants(self):
        return selectors.EVENT_READ

    def ready(self, bits):
        try:
            while len(self._near.use(4096)) == 4096:
                pass
        except BlockingIOError:
            pass

    def close(self):
        self._far = None
        for _ in range(100):                    # so that the descriptors are closed now; else with the last who is in call()
            if not self.callers:
                break
            time.sleep(0.001)
        self._near = None


# Where sockets come from; None: the operating system. A ContextVar, so that it follows tasks: what a task spawns has its
# network too. A network is an object with
#     socket(family, type, proto=0)       a raw socket that never blocks, with the methods and the OSErrors of socket.socket
#     pollable(raw)                       what tells when it is ready, with the interface of Pollable
#     async getaddrinfo(host, port, family, type, flags)      a list as from socket.getaddrinfo()
# The kernel does not look at it. It stands here because those who ask (flowcoro_net) and those who answer (flowcoro_testing's
# simulated network) must not know each other.
network = contextvars.ContextVar("flowcoro.network", default=None)


# ---- sleeping -------------------------------------------------------------------------------------------------

def now():
    """Seconds of the run's clock: monotonic, its zero means nothing. Outside of run(), time.monotonic()."""
    return _local.worker.now()


@types.coroutine
def sleep(seconds):
    """Let `seconds` pass; 0 is a checkpoint, math.inf waits to be cancelled. ValueError if negative or nan."""
    if seconds.__class__ is not float or not seconds > 0:
        seconds = _checked_seconds(seconds, "sleep")
    if not seconds:
        yield
        return
    worker = _local.worker
    worker.task._wake_at = worker.now() + seconds
    yield _park_sleep


@types.coroutine
def sleep_until(deadline):
    """Wait until now() is `deadline` or later; a deadline that has passed is a checkpoint. ValueError if nan."""
    worker = _local.worker
    worker.task._wake_at = deadline = _checked_deadline(deadline, "sleep_until() got")
    yield _park_sleep if deadline > worker.now() else None


def _park_sleep(task):
    task.park_reason = "sleep"
    task.abort_function = _abort_sleep
    if task._wake_at < task._timer:
        task._worker.timers.set(task, task._wake_at)
    elif task._wake_at == _INF:
        task._worker.sleepers += 1


def _abort_sleep(task):
    if task._wake_at == _INF:
        task._worker.sleepers -= 1
    return True                     # its entry in the heap goes stale


# ---- task groups ----------------------------------------------------------------------------------------------

def _a(name):
    return f"{'an' if name[:1] in tuple('aeiouAEIOU') else 'a'} {name}"


def _checked_coro(coro, caller):
    """`coro`, or a TypeError that says what to write instead."""
    if isinstance(coro, (types.CoroutineType, Coroutine)):
        return coro
    if isinstance(coro, types.GeneratorType):
        if coro.gi_code.co_flags & 0x100:       # CO_ITERABLE_COROUTINE
            return coro
        hint = "a plain generator: decorate its function with @flowcoro.coroutine"
    elif isinstance(coro, types.AsyncGeneratorType):
        hint = "an async generator: iterate over it with `async for` in a coroutine"
    elif hasattr(coro, "__await__"):
        hint = f"something to await: wrap it, `async def wrapper(): return await …`, and pass wrapper()"
    elif callable(coro):
        name = getattr(coro, "__qualname__", repr(coro))
        hint = f"a function: call it, {caller}({name}(…))"
    else:
        hint = _a(type(coro).__name__)
    raise TypeError(f"{caller}() takes a coroutine object, and {coro!r} is {hint}")


# Put in place of a spawned coroutine's __name__ (of which nothing else makes use: tracebacks and repr show others),
# to find that one is spawned twice. A first step that checks instead costs 0.4 us of 2.7, mostly for one more frame
# in the traceback of the StopIteration that ends a short task.
_SPAWNED = "<spawned>"


def _started_already(coro):
    return RuntimeError(f"{coro!r} has been started already: a coroutine object can be spawned or awaited once; call its "
                        "function again for another one")


def _is_started(coro):
    """Whether it has been spawned, or is being awaited."""
    return (getattr(coro, "__name__", None) is _SPAWNED or getattr(coro, "cr_suspended", False)
            or getattr(coro, "gi_suspended", False))


def _mark_spawned(coro):
    """RuntimeError if it is started; from now on it has been spawned."""
    if _is_started(coro):
        raise _started_already(coro)
    try:
        coro.__name__ = _SPAWNED
    except AttributeError:              # of another make, with slots: it has to know by itself
        pass


def _make_room(calls):
    """RecursionError unless the stack has room for so many calls, one in the other: what is begun can also be ended."""
    if calls:
        _make_room(calls - 1)


def _without_cancelled(error):
    """`error`, but what an ExceptionGroup holds of Cancelled is no error of its own and is left out."""
    if isinstance(error, BaseExceptionGroup):
        cancelled, rest = _split_cancelled(error)
        if cancelled is not None:
            return Cancelled() if rest is None else rest
    return error


class TaskGroup(_Unique):
    """Tasks with one lifetime: `async with TaskGroup() as group: group.spawn(coro)`. The block ends when all have.

    If a task or the body fails, the rest is cancelled and joined, and all errors leave as one ExceptionGroup (but
    KeyboardInterrupt and SystemExit leave as themselves, with the others as their cause). `scope` is the CancelScope
    around the group: it has a deadline, and can be shielded.

    Cancelled from outside: the tasks are cancelled and joined, and Cancelled is raised if that has cut the body or a task
    short. If all came to their ends all the same, the block ends normally and the next checkpoint raises. A task that was
    cancelled by its own cancel() ends only itself. pinned=True: as if said to each spawn().

    Atomic: spawn(), cancel(), and the end of the block, from which on spawn() fails.
    """

    __slots__ = ("scope", "_tasks", "_owner", "_doomed", "_cut", "_errors", "_lot", "_open", "_late", "_pinned")

    def __init__(self, *, pinned=False):
        self.scope = CancelScope()
        self._pinned = pinned
        self._tasks = {}
        self._owner = None
        self._doomed = False        # its scope lies, or lay at some time, in a cancelled region
        self._late = 0              # tasks spawned into one
        self._cut = None            # the Cancelled that ended one of its tasks, or the body
        self._errors = []
        self._lot = None
        self._open = False

    async def __aenter__(self):
        self._begin()
        return self

    @atomic
    def _begin(self):
        _make_room(CALLS_TO_END)
        if self.scope._entered:
            raise RuntimeError("a TaskGroup serves one `async with`; make a new one")
        self.scope.__enter__()
        self._owner = task = self.scope._task
        self._doomed = task._resume is not task._send
        self.scope._group = self
        self._open = True

    @atomic
    def spawn(self, coro, *, name=None, pinned=False):
        """Start a task in the group, from any of the kernel's tasks. RuntimeError once the group has ended.

        TypeError for what is no coroutine object, and a name that is no str; RuntimeError for a coroutine that was started
        before, and when 100,000 were spawned here since this was cancelled. pinned: it stays with the worker it begins on,
        in one thread; others may be stolen by idle workers, if there are several.
        """
        worker = _local.worker
        if worker is _OUTSIDE and coro.__class__ is types.CoroutineType:
            coro.close()
        hooks = worker.hooks            # RuntimeError in another thread, before anything is done
        if coro.__class__ is not types.CoroutineType:
            _checked_coro(coro, "spawn")
        if not self._open:
            coro.close()
            raise RuntimeError("this TaskGroup is not open: spawn inside its `async with`, or from a task in it")
        if self._doomed and self._late >= LATE_SPAWNS:
            coro.close()
            raise RuntimeError(f"{LATE_SPAWNS:,} tasks were spawned here since this was cancelled: tasks that go on spawning "
                               "others keep it from ending. A task is cancelled at its first checkpoint: let one come")
        if name is not None and not isinstance(name, str):
            coro.close()
            raise _no_name(name)
        if coro.__class__ is not types.CoroutineType:
            _mark_spawned(coro)
        elif coro.__name__ is _SPAWNED or coro.cr_suspended:        # _mark_spawned() written out: 0.2 us of 2.5
            raise _started_already(coro)
        task = Task(coro, self, worker, name, bool(pinned or self._pinned))
        if coro.__class__ is types.CoroutineType:
            coro.__name__ = _SPAWNED    # after what may find the end of the stack: it can be spawned elsewhere then
        if self._doomed and _is_cancelled(task, None):
            task.budget = 0
            task._resume = task._step_then_cancel
            self._late += 1
        self._tasks[task] = None        # no call from here to the last line of these three: no signal handler strikes between
        worker.spawned += 1
        worker.ready.append(task)
        if worker.sleeping:             # a signal handler spawns
            worker.wake()
        if hooks is not None:
            worker.kernel.fire("task_spawned", task)
        return task

    def cancel(self):
        """Cancel all tasks of the group and its body. The block then ends without an error. Never blocks."""
        self.scope.cancel()

    async def __aexit__(self, kind, error, trace):
        task, body = self._owner, error
        if error is None and not self._tasks:
            try:
                await checkpoint_if_due()               # nothing to wait for: a checkpoint as any other
            except BaseException as interrupted:
                error = interrupted
        if error is not None:
            self._failed(_without_cancelled(error))
            self.scope.cancel()
        while not self._close():            # who awaited the last one may have spawned another
            with _firm_shield():            # the children are told by themselves, and then this wait ends
                try:
                    await park(self._park)
                except GeneratorExit:       # closed by force
                    raise
                except BaseException as struck:     # a signal handler's, in the middle of parking
                    self._failed(struck)
        self._lot = None
        errors, cut = list({id(error): error for error in self._errors}.values()), self._cut
        self._errors = self._cut = None
        # What came to its end in spite of a cancellation is not lost to it: only if work was cut short the group ends
        # cancelled, as in trio. The group's own scope takes that if it was the one cancelled.
        try:
            caught = self.scope.__exit__(cut and Cancelled, cut, trace)
        except RuntimeError as misuse:      # scopes that do not nest: one error more
            if not errors:
                raise
            errors.append(misuse)
            caught = False
        self.scope._group = None
        try:
            if errors:
                self._raise(errors)
            if cut is not None and cut is not body and not caught and task._resume is not task._send:
                raise Cancelled
            return caught
        finally:
            del errors, error, body, cut, task      # no circles through the traceback

    @atomic
    def _close(self):
        """Whether it is closed now; not while tasks are left."""
        self._open = bool(self._tasks)
        return not self._open

    def _park(self, task):
        if not self._tasks:
            _reschedule(task)
            return
        self._lot = ParkingLot("wait for the tasks of a group", self._tasks)
        self._lot._park(task)

    @staticmethod
    def _raise(errors):
        for error in errors:
            if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
                rest = [other for other in errors if other is not error]
                raise error from (BaseExceptionGroup("errors in the same TaskGroup", rest) if rest
                                  else error.__cause__)
        raise BaseExceptionGroup("errors in a TaskGroup", errors) from None

    @atomic
    def _failed(self, error):
        """The body or a task has ended with `error`."""
        if isinstance(error, Cancelled):
            self._cut = error
        else:
            self._errors.append(error)
            self.scope.cancel()

    def _child_done(self, task, error):
        if error is not None and not (task._cancel_called and isinstance(error, Cancelled)):
            self._failed(error)
        if not self._tasks and self._lot is not None:
            self._lot.unpark_all()

    def __repr__(self):
        return f"<TaskGroup of {len(self._tasks)} tasks{'' if self._open else ', not open'}>"


class _Root(TaskGroup):
    """The group of main and of all that spawn() starts. A failure here cancels nobody; unless awaited, it is reported."""

    __slots__ = ("_kernel",)

    def __init__(self, kernel):
        super().__init__()
        self._kernel = kernel
        self._open = True

    def _child_done(self, task, error):
        kernel = self._kernel
        if task is kernel.main:
            kernel.cancel_all()
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            fatal = task._error.take()              # also of the second one: the user has asked once more, no more
            kernel.fatal = kernel.fatal or fatal
            kernel.cancel_all()
        if not self._tasks:
            kernel.wind_up()


# ---- the worker -----------------------------------------------------------------------------------------------

class _Timers:
    """The deadlines of a worker's tasks: the nearest of each task has an entry that counts (I6)."""

    # A heap of bare floats and a dict beside it: against a heap of (deadline, serial, task) it compares three times
    # as fast, spares the garbage collector an object per sleeper, and keeps equal deadlines in order by itself.

    def __init__(self, worker):
        self.worker = worker
        self.heap = []              # deadlines, each once
        self.tasks = {}             # deadline -> the task to look at then, or a list of them
        self.entries = 0            # tasks in there, stale ones included

    @atomic
    def set(self, task, deadline):
        """Look at `task` at `deadline`, which is earlier than its entry that counts so far."""
        there = self.tasks.get(deadline)        # a call: it may be struck, and then nothing is done. After it there is one that
        task._timer = deadline                  # enters the deadline, which is done when that is struck (I6)
        self.entries += 1
        if there is None:
            self.tasks[deadline] = task
            heapq.heappush(self.heap, deadline)
            if self.worker.sleeping:            # then another one calls
                self.worker.wake()
        elif there.__class__ is list:
            there.append(task)
        else:
            self.tasks[deadline] = [there, task]

    @atomic
    def prune(self):
        """Drop the stale entries if they are most of all: O(log n) for each that was made since, and mostly less."""
        if self.entries <= 64 or self.entries <= 2 * self.worker.kernel.alive() + 64:     # mostly the first, which calls nothing
            return
        old, self.tasks, self.entries = self.tasks, {}, 0
        self.heap.clear()
        for deadline in sorted(old):         # a sorted list is a heap: the pushes below cost nothing
            tasks = old[deadline]
            for task in tasks if tasks.__class__ is list else (tasks,):
                if task._timer == deadline:
                    task._timer = _INF          # the next entry of the same task for the same deadline is one too many
                    self.set(task, deadline)

    @atomic
    def expire(self, now):
        heap = self.heap
        due = []
        enough = 64 + len(heap) // 16
        while heap and heap[0] <= now:
            if len(due) == enough:
                # Many at once. To sort costs less than to pop them all: it is O(n) where timeouts are alike, for then
                # the heap is sorted already, and a sorted list is a heap.
                heap.sort()
                end = bisect_right(heap, now)
                due += heap[:end]
                del heap[:end]
                break
            due.append(heapq.heappop(heap))
        for deadline in due:
            tasks = self.tasks.pop(deadline)
            for task in tasks if tasks.__class__ is list else (tasks,):
                self.entries -= 1
                if deadline == task._timer:     # else stale
                    self._ring(task, now)
        self.prune()

    def _ring(self, task, now):
        """The entry of `task` that counted has come up: wake it, expire its scopes, set the next entry."""
        task._timer = _INF
        if task._state == PARKED and task.abort_function is _abort_sleep and task._wake_at <= now:
            _reschedule(task)
            if task._scope is None:
                return
        scope = task._scope
        while scope is not None:
            if scope._deadline <= now and not scope._cancelled:
                scope._expired = True
                scope.cancel()
            scope = scope._outer
        nearest = self._nearest(task)
        if nearest < _INF and nearest < task._timer:
            self.set(task, nearest)

    def _nearest(self, task):
        """When the task has to be looked at next: its sleep's end, its scopes' deadlines, or inf."""
        nearest = _INF
        if task._state == PARKED and task.abort_function is _abort_sleep:
            nearest = task._wake_at
        scope = task._scope
        while scope is not None:
            if scope._deadline < nearest and not scope._cancelled:
                nearest = scope._deadline
            scope = scope._outer
        return nearest

    @atomic
    def next_deadline(self):
        """The earliest deadline that still means something; what stands before it in the heap is thrown away."""
        self.prune()
        while self.heap:
            deadline = self.heap[0]
            tasks = self.tasks[deadline]
            moved = []
            for task in tasks if tasks.__class__ is list else (tasks,):
                if deadline == task._timer:
                    nearest = self._nearest(task)
                    if nearest <= deadline:
                        return deadline
                    moved.append((task, nearest))
            heapq.heappop(self.heap)
            del self.tasks[deadline]
            self.entries -= len(tasks) if tasks.__class__ is list else 1
            for task, nearest in moved:
                task._timer = _INF
                if nearest < _INF:
                    self.set(task, nearest)
        return None


def _has_ended(coro):
    return getattr(coro, "cr_frame", None) is None and getattr(coro, "gi_frame", None) is None


def _left_open(task, root):
    """The task ends inside of scopes that nobody has left: report that, and lose neither their errors nor their tasks."""
    groups, task._scope = _groups(task), None
    report_error(RuntimeError(f"task {task.name!r} has ended inside a cancel scope, or a TaskGroup, that was never left: its "
                         "cancellation and its errors could reach nobody. Most often an async generator yielded inside "
                         "`with timeout()` or a TaskGroup; open the scope around the loop that consumes it instead"),
            "a scope was never left", object=task)
    for group in groups:
        for error in group._errors:
            if not isinstance(error, GeneratorExit):        # its generator is being closed
                report_error(error, f"an error in a TaskGroup of task {task.name!r} that was never left", object=group)
        for child in list(group._tasks):
            del group._tasks[child]
            child._group = root
            root._tasks[child] = None
            child.cancel()
        group._open = False
        if group._lot is not None:              # by another task
            group._lot.unpark_all()


class _NOWHERE:
    """Stands for the worker of a task that has got its place by other means."""

    hooks, ready, sleeping = None, deque(maxlen=0), False


class _Forked(Exception):
    """In the child of a fork: leave the copy of the parent's loop without touching what it shares with the parent."""


class _Worker:
    """One thread that steps tasks: its ready deque, its heap of deadlines, its selector, its inbox."""

    # Slots, for in CPython an object with more than 30 attributes in a dict is slow to access: 2 % of a switch.
    __slots__ = ("kernel", "clock", "others", "beset", "now", "ready", "inbox", "timers", "task", "call", "sleeping", "looked",
                 "beat", "hooks", "meter", "thread_id", "descriptors", "io_parked", "thread_calls", "abandoned",
                 "steps", "polls", "spawned", "finished", "stolen", "sleepers", "stopped", "luck", "poller", "waker")

    def __init__(self, kernel, clock, seed):
        self.kernel = kernel
        self.clock = clock
        self.others = ()            # the other workers of the run, if there are any
        self.beset = False          # other threads may reschedule its tasks: it has others, or sleeps
        self.now = time.monotonic if clock is None else clock.now
        self.ready = deque() if seed is None else _ShuffledDeque(seed)
        self.inbox = deque()        # calls that other threads want made in this one
        self.timers = _Timers(self)
        self.task = None            # the one being stepped
        self.call = None            # the one being made that another thread has posted
        self.sleeping = False       # I5
        self.beat = 0               # counts passes of the loop, up to 255: small ints are shared by threads at no cost
        self.looked = 0.0           # when it was last between two steps, as of time.monotonic(), give or take 15 steps
        self.hooks = None           # kernel.hooks while there are any
        self.meter = _Meter(self) if kernel.watchdog is not None else None
        self.thread_id = None
        self.descriptors = 0        # Pollables
        self.io_parked = 0          # tasks parked on them
        self.thread_calls = 0       # to_thread calls under way
        self.abandoned = set()      # those that no task waits for
        self.steps = self.polls = self.spawned = self.finished = self.stolen = 0
        self.sleepers = 0           # tasks in sleep(inf), which have no entry in the heap
        self.stopped = False        # leave the loop
        self.luck = 1 if seed is None else self.ready.random.getrandbits(31)
        self.poller = self.waker = None

    def open(self):
        """Take the descriptors, once the kernel's signal handlers are in place: a Ctrl-C in between would lose some."""
        with contextlib.ExitStack() as undo:    # no descriptor is left when there are too few of them
            self.poller = _new_poller()
            undo.callback(self.poller.close)
            waker = _WakeUp()
            undo.callback(waker.close)
            self.poller.add(waker)
            self.poller.arm(waker)
            undo.pop_all()
        self.waker = waker

    def close(self):
        if self.waker is not None:
            self.poller.close()
            self.waker.close()
        for call in list(self.abandoned):       # too late for this run; but later ones that share the limiter need the permit
            call.finish()

    def post(self, call):
        """Have `call()` made by this worker's thread; False if it has ended. From any thread, but no signal handler."""
        self.inbox.append(call)         # I5: first add, then look who sleeps
        self.wake()
        if not self.kernel.ended:
            return True
        try:
            self.inbox.remove(call)
        except ValueError:              # close() has seen it
            return True
        return False

    def _take_calls(self):
        """Make the calls that other threads have posted; what comes after the end is answered by run()."""
        for _ in range(len(self.inbox)):        # no more than there are now: threads that go on asking starve nobody
            if self.stopped:
                break
            self.call = call = self.inbox[0]
            call()                      # an error can only be a signal handler's, and then the call is made again
            if self.inbox:              # else this is the child of a fork in there
                self.inbox.popleft()
        self.call = None

    def pick(self, count):
        """A number below `count`, random but reproducible: which of several ready cases select() takes."""
        self.luck = (self.luck * 1103515245 + 12345) & 0x7FFFFFFF       # C's rand(); its low bits have short periods
        return self.luck * count >> 31

    # -- the loop

    def work(self):
        """Step tasks until the kernel has none left."""
        self.looked = time.monotonic()
        ready, inbox, timers, heap = self.ready, self.inbox, self.timers, self.timers.heap
        # Bound methods and ints in locals: together 60 ns of the 250 of a step (CPython 3.11).
        popleft, append, monotonic, real = ready.popleft, ready.append, time.monotonic, self.clock is None
        several, plans = bool(self.others), _PLANS
        turn, plan, level, most, began = BUDGET, plans[0], 0, len(plans) - 1, monotonic()
        polled, due = began, 0.0 if self.meter is not None else _INF         # when to measure a pass
        while not self.stopped:
            for steps in plan:
                for step in steps:
                    try:
                        task = popleft()
                    except IndexError:
                        break
                    resume = task._resume       # first this, then say that it runs: who cancels it in between, on another
                    self.task = task            # worker, takes its value for one that is still to be sent in (I3)
                    try:
                        trap = task.context.run(resume, task._value)
                    except StopIteration as stop:
                        self._finish(task, stop.value, None)
                    except BaseException as error:
                        self._failed(task, error)
                    else:
                        if trap is None:
                            task.budget = turn
                            task._value = None
                            append(task)
                        elif several:
                            self._park_among_others(task, trap)
                        elif task._resume is not task._send:
                            append(task)    # cancelled: it does not park, it is told at its next step (I4)
                        else:
                            task._state = PARKED
                            task._value = task.abort_function = self.task = None
                            try:
                                trap(task)
                            except BaseException as error:
                                self._not_parked(task, trap, error)
                            else:
                                if self.hooks is not None or task.abort_function is None:
                                    self._parked(task, trap)
                else:
                    self.steps += step + 1
                    self.looked = moment = monotonic()
                    if moment - polled > SECONDS_PER_POLL:
                        break
                    continue
                self.steps += step
                break
            else:
                if level and plan is plans[level]:         # not one of the meter's
                    level -= 1
            self.task = None        # nobody is being stepped: a cancel now must not take the last one for running
            if (ended := monotonic()) - polled > SECONDS_PER_POLL and level < most:
                level += 1          # long steps: fewer of them before the next look, so that it is late by one of them at most
            plan, polled = plans[level], ended
            if inbox:
                self._take_calls()
            if heap and (several or heap[0] <= (polled if real else self.now())):     # several: another may just take it
                timers.expire(self.now())
            timers.prune()
            if not ready:
                task = trap = resume = None     # who was last, and his result, may have been forgotten by all others
                self._idle()
                polled = monotonic()
            else:
                if self.descriptors:
                    self._poll(0)
                if several:
                    self._offer_work()
            self.looked, self.beat = polled, self.beat + 1 & 255
            if ended > due:
                plan, due = self.meter.measure(began, ended, plan, polled is not ended)
                polled = monotonic()
            began = polled

    def _parked(self, task, trap):
        if task.abort_function is None and task._state == PARKED:
            self._not_parked(task, trap, RuntimeError(
                f"the park function {_shown(trap)} set no abort_function: nobody could cancel the task"))
        elif self.hooks is not None and task._state == PARKED:      # else it was woken already, and that was told
            self.kernel.fire("task_parked", task, task.park_reason)

    def _not_parked(self, task, trap, error):
        """The park function has failed: whatever it did, its error is the answer to this park."""
        if not callable(trap) or isinstance(trap, type):
            error = _unknown_trap(trap)
        if task._state == PARKED:
            if task.abort_function is not None:     # it may have stored the task already
                with contextlib.suppress(Exception):
                    task.abort_function(task)
            _reschedule(task, error=error)
        else:                           # it was rescheduled first: it has its place in the ready deque
            task._error = error
            if task._resume is task._send:
                task._resume = task._raise_error

    def _failed(self, task, error):
        if error.__class__ is _Forked:
            raise error
        if not _has_ended(task.coro):       # no error of its own: a signal handler's, between its yield and here
            task._value, task._error = None, error
            if task._resume is task._send:
                task._resume = task._raise_error
            self.ready.append(task)
            raise error
        _trim(error)
        self._finish(task, None, _without_cancelled(error))

    @atomic
    def _finish(self, task, value, error):
        """The coroutine has returned `value` or raised `error`."""
        if task._scope is not None:
            _left_open(task, self.kernel.root)
        task._value = value
        task._timer = _INF                      # whatever the heap holds of it is stale
        group = task._group
        tasks, joiners = group._tasks, task._joiners
        if error is not None:
            if isinstance(error, Cancelled):
                task._error = BaseException.with_traceback(error, None)     # frames would live as long as the task
            else:
                seen = group._owner is not None or (task is self.kernel.main and isinstance(error, KeyboardInterrupt))
                task._error = _Failure(error, f"task {task.name!r} failed and nobody awaited it", seen)
                if group._owner is None:
                    self.kernel.failures[task._error] = None
        task._state = DONE                      # after the outcome, for which others do not take the guard
        self.finished += 1
        del tasks[task]
        task._resume = task._send = None
        if joiners is not None:
            joiners.unpark_all()
            task._joiners = joiners.holder = None       # the last joiner holds on to the lot until it parks again
        if self.hooks is not None:
            self.kernel.fire("task_done", task)
        if not tasks or error is not None or group._owner is None:
            group._child_done(task, error)

    # -- I/O and idleness

    def _poll(self, timeout):
        """Wait for descriptors, other threads and signals, at most `timeout` seconds (None: no limit)."""
        self.polls += 1
        try:
            self.sleeping = self.beset = True   # I5: first say it, then look once more
            if self.ready or self.inbox:
                timeout = 0
            elif timeout is None or timeout > LONGEST_POLL:
                timeout = LONGEST_POLL
            events = self.poller.wait(timeout)
        finally:
            self.sleeping, self.beset = False, bool(self.others)
        for pollable, bits in events:
            pollable.ready(bits)
        if self.hooks is not None:
            self.kernel.fire("after_poll", len(events))
        return events

    def taken_over(self, task):
        """It sleeps, and somebody has woken its task: a signal handler, or a thread that should not have."""
        if _local.worker is self:
            return self
        report_error(RuntimeError(
            f"a thread without a worker has woken task {task.name!r} ({task.park_reason}): what it called is safe there "
            "with several workers only. Use call_from_thread(function), run_from_thread(coroutine) or a Promise"),
            "a thread has called what belongs to tasks", object=task)
        if self.hooks is not None:
            self.kernel.fire("task_rescheduled", task)
        self.post(functools.partial(self._place, task))
        return _NOWHERE

    def _place(self, task):
        if task._state == READY and task not in self.ready:     # else _recover() has put it there
            self.ready.append(task)

    def wake(self):
        """End its sleep, if it sleeps. From any thread."""
        if self.sleeping:
            self.waker.call()

    def _until_deadline(self):
        """Seconds until the next deadline that still means something, or None."""
        deadline = self.timers.next_deadline()
        return None if deadline is None else max(0.0, deadline - self.now())

    def _idle(self):
        """Nothing is ready: wait for a deadline, a descriptor, another thread or a signal."""
        if self.stopped:
            return
        timeout = self._until_deadline()
        if self.hooks is not None:
            self.kernel.fire("before_poll", timeout)
            if self.ready:
                return
            timeout = self._until_deadline()    # the hook may have moved one
        if timeout is None and not self.sleepers and not self.io_parked and not self.thread_calls:
            # Only another thread or a signal could go on from here; if there is neither, nobody ever will.
            if self.kernel.deadlocks.is_one():
                self.kernel.deadlocks.break_one()
            else:
                self._poll(1.0)                 # the last thread may end without a word: look again
        elif timeout and self.clock is not None and not self.thread_calls:
            if not self._poll(0) and not self.ready and not self.inbox:     # what has really happened comes first
                self._poll(max(0.0, self.clock.idle(timeout)))
        else:
            self._poll(timeout)


@_guarded_function
def _recover(worker, error):
    """The worker's work() was left by `error` in the middle of anything: give each task its place again (I1), and go on."""
    struck, worker.task, worker.call, kernel = worker.task, None, None, worker.kernel
    tasks, placed, timers = list(kernel.all_tasks()), set(worker.ready), worker.timers
    homeless = {task for task in tasks          # first this: below some are woken by the end or the cancellation of others
                if task._state == READY and task._worker is worker and task not in placed}
    worker.poller.rearm_all()           # the last events may be lost
    timers.heap.clear()                 # what it had taken out is found again below
    timers.tasks.clear()
    timers.entries = 0
    for task in tasks:
        if task._state == PARKED:           # of any worker: each can wake those of all
            if task._resume is not task._send and task._resume == task._deliver:
                if _abort_again(task):              # struck while it was cancelled
                    _reschedule(task)
                else:
                    task._resume = task._step_then_cancel
            elif task.abort_function is None or _is_lost(task):
                _reschedule(task, error=error)
        elif task in homeless:
            # It was about to be stepped, or has been: then it has ended, or yielded.
            if _has_ended(task.coro):
                worker._finish(task, None, error)
            else:
                if task is struck and worker.others:    # as it was to be parked, which has not begun: this is the answer
                    task._value, task._error = None, error
                    if task._resume is task._send:
                        task._resume = task._raise_error
                worker.ready.append(task)
        if task._state != DONE and task._resume is task._send and _is_cancelled(task, task._scope):
            task._interrupt()               # struck while a scope around it was being cancelled
        deadline, task._timer = timers._nearest(task), _INF
        if deadline < _INF:
            timers.set(task, deadline)
    if struck is not None and struck._state == DONE:        # its end may have been told to nobody yet, or to a part
        struck._group._tasks.pop(struck, None)
        if struck._joiners is not None:
            struck._joiners.unpark_all()
        failure = struck._error
        struck._group._child_done(struck, failure.error if isinstance(failure, _Failure) else failure)
    elif not kernel.root._tasks and kernel.main is not None:
        kernel.wind_up()
    worker.sleepers = sum(task._state == PARKED and task.abort_function is _abort_sleep and task._wake_at == _INF
                          and task._worker is worker for task in kernel.all_tasks())
    worker.timers.prune()


class _ShuffledDeque(deque):
    """A ready queue in random but reproducible order, for run(seed=…). O(n) a step: for tests."""

    def __init__(self, seed):
        super().__init__()
        import random
        self.random = random.Random(seed)

    def popleft(self):
        if self:
            self.rotate(-self.random.randrange(len(self)))
        return super().popleft()


def _move(pop, target):
    """Append what pop() takes from its place to the target, in C: no signal handler's error comes while it is in neither."""
    target.extend(itertools.starmap(pop, ((),)))


class _OneOfSeveral(_Worker):
    """A worker that shares the work with others: who has none steals some, or stands in for one that is stuck."""

    def __init__(self, kernel):
        super().__init__(kernel, None, None)
        self.thread = None          # all but the first start one
        self.seen = {}              # worker -> (its `beat`, when that was first seen)
        self.beats_seen = []        # of the others, when it kept watch
        self.no_offer = 0.0         # until then it has nothing to give: a thief has found pinned tasks only

    def _take_calls(self):
        """The same where another worker may stand in for this one: each call is made by one of the two."""
        here = _local.worker
        if self.inbox:
            here._offer_work()          # a call may block, and then somebody has to look after this one
        for _ in range(len(self.inbox)):
            if self.stopped:
                break
            calls = []
            try:
                try:
                    _move(self.inbox.popleft, calls)
                except IndexError:
                    if not calls:
                        break
                    raise                       # a signal handler's
                here.call = calls[0]
                calls[0]()
                calls.clear()
            except BaseException:               # as above
                self.inbox.extendleft(calls)
                raise
        here.call = None

    def _park_among_others(self, task, trap):
        """What work() does with a park function, under the guard; there it is written out, to save one worker the call."""
        with _GUARD:
            if task._resume is not task._send:
                if task._resume == task._step_then_cancel:      # another worker took it for one that waits for its step
                    task._resume = task._deliver
                self.ready.append(task)
                return
            task._state = PARKED
            task._value = task.abort_function = self.task = None
            try:
                trap(task)
            except BaseException as error:
                self._not_parked(task, trap, error)
            else:
                if self.hooks is not None or task.abort_function is None:
                    self._parked(task, trap)

    def main(self):
        """The thread of every worker but the first, which has that of run()."""
        _local.worker = self
        self.kernel.take_asyncgens()
        try:
            self.kernel.work(self)
        except _Forked:
            report_error(RuntimeError("the child has nobody to return to: it may exec or os._exit()"),
                         "this process was forked inside flowcoro.run(), and the child came back into the kernel")
            os._exit(1)
        finally:
            _local.worker = _OUTSIDE

    def taken_over(self, task):
        """Who wakes a task of this worker has it from now on, unless it is pinned: what it was woken for is warm there."""
        here = _local.worker
        if task._pinned or here is _OUTSIDE or here.kernel is not self.kernel:
            return self
        task._worker = here
        return here

    def _offer_work(self):
        """Wake one of those who sleep if more is ready than this one comes round to soon, or nobody looks after the others."""
        if not self.kernel.keeper.locked() or self.kernel.parallel and len(self.ready) > 1 and self.looked >= self.no_offer:
            for other in self.others:
                if other.sleeping:
                    other.wake()
                    return

    @atomic
    def _steal(self, victim, count, most_pinned=_INF):
        """Take over `count` ready tasks of another worker, from the far end, where those lie that would wait longest.

        Pinned ones stay; after `most_pinned` of them it gives up.
        """
        taken = []
        try:
            stolen = self._take(victim.ready, taken, count, most_pinned)
            gives_back = len(stolen) < len(taken)
            self._place_taken(taken, victim)
        except BaseException:                   # a signal handler's: each has a place all the same
            self._place_taken(taken, victim)
            raise
        if gives_back:
            victim.wake()                       # it may have looked while they were away
            if not stolen:
                victim.no_offer = victim.looked + TICK
        self.stolen += len(stolen)
        if self.hooks is not None:
            for task in stolen:
                self.kernel.fire("task_stolen", task, victim)
        return bool(stolen)

    @staticmethod
    def _take(ready, taken, count, most_pinned):
        """Pop them into `taken`; returns those that are not pinned. Its loops are not in the `try` block above, because CPython
        3.12 and 3.13 forget some jumps back, where signal handlers are called, when they note what a block covers."""
        pinned = 0
        while len(taken) - pinned < count and pinned < most_pinned:
            try:
                _move(ready.pop, taken)
            except IndexError:
                break
            pinned += taken[-1]._pinned
        return [task for task in reversed(taken) if not task._pinned]

    def _place_taken(self, taken, victim):
        """Pinned tasks go back, the others are this worker's."""
        while taken:
            if taken[-1]._pinned:
                _move(taken.pop, victim.ready)
            else:
                taken[-1]._worker = self        # first this: _recover() finds it by that
                _move(taken.pop, self.ready)

    def _find_work(self):
        """Whether there is something to step now: half of what another one has too much of, or all of one that is stuck."""
        searches = self.kernel.parallel and self.kernel.searchers.acquire(blocking=False)
        try:
            for victim in self.others:
                if victim.is_stuck(self):
                    self._stand_in_for(victim)
                elif victim.sleeping and (victim.ready or victim.inbox):    # a signal handler has struck who was to wake it
                    victim.wake()
                elif searches and len(victim.ready) > 1:
                    self._steal(victim, len(victim.ready) // 2, MOST_PINNED)
                if self.ready:
                    return True
            return False
        finally:
            if searches:
                self.kernel.searchers.release()

    def is_stuck(self, observer):
        """Whether it has not come round between two looks of `observer`, that are TICK seconds apart or more."""
        seen, since = observer.seen.get(self, (None, 0.0))
        now = time.monotonic()
        if self.sleeping or self.task is None and self.call is None or seen != self.beat:
            observer.seen[self] = self.beat, now
            return False
        return now - since >= TICK and now - self.looked >= TICK       # else it has come round 256 times

    def _stand_in_for(self, victim):
        """Somebody's long step keeps it from all else: do that here."""
        victim._take_calls()
        victim.timers.expire(self.now())
        if victim.descriptors:
            for pollable, bits in victim.poller.wait(0):
                pollable.ready(bits)
                if pollable is victim.waker:        # it may be about to sleep, and this was to keep it from that
                    pollable.call()
        self._steal(victim, len(victim.ready))

    def _idle(self):
        """Nothing is ready here: find work elsewhere, or wait, and look after the others if nobody does yet."""
        kernel = self.kernel
        if self.stopped:
            return
        if self._find_work():
            self._offer_work()
            return
        timeout = self._until_deadline()
        if self.hooks is not None:
            kernel.fire("before_poll", timeout)
            if self.ready:
                return
            timeout = self._until_deadline()
        if timeout is None and kernel.deadlocks.is_quiet(self) and kernel.deadlocks.is_one():
            with _GUARD:
                if kernel.deadlocks.is_quiet(self):
                    kernel.deadlocks.break_one()
            return
        keeper = False
        try:
            self.sleeping = True                # I5, also for what others do to the timers, the end, and the keeper
            keeper = kernel.keeper.acquire(blocking=False)
            timeout = 0.0 if self.stopped else self._until_deadline()
            if keeper:
                beats = [other.beat for other in self.others]
                active = beats != self.beats_seen or any(not other.sleeping for other in self.others)
                self.beats_seen = beats
                timeout = min(_INF if timeout is None else timeout, TICK if active else IDLE_TICK)
            self._poll(timeout)
        finally:
            self.sleeping = False
            if keeper:
                kernel.keeper.release()
        if self.ready:
            self._offer_work()


def _unknown_trap(trap):
    home = str(type(trap).__module__).split(".")[0].lstrip("_")
    known = {"asyncio": "asyncio", "uvloop": "asyncio", "concurrent": "asyncio", "trio": "trio", "curio": "curio",
             "gevent": "gevent", "outcome": "trio"}
    if home in known:
        guess = f"that belongs to {known[home]}: its functions need its own loop; run them there, or in to_thread()"
    elif isinstance(trap, type):
        guess = "that is a class; another framework's function was awaited here (trio's, perhaps)"
    else:
        guess = ("FlowCoro understands None and park functions: another framework's function was awaited here, or a "
                 "generator yields values where it should `yield from` an operation")
    return TypeError(f"a task yielded {_shown(trap)} to the kernel: {guess}")


# ---- the watchdog ---------------------------------------------------------------------------------------------
# run(watchdog=) has two parts. A meter in each worker measures how long steps take, and how long ready tasks wait for theirs:
# few of them, to cost little. And a thread looks at the workers, for one that is stuck in a step cannot say so itself.

class _Histogram:
    """How many durations there were of each size. Sizes double, from a microsecond on."""

    def __init__(self):
        self.counts = [0] * 40
        self.sum = self.max = 0.0

    def add(self, seconds):
        self.counts[min(int(seconds * 1e6).bit_length(), len(self.counts) - 1)] += 1
        self.sum += seconds
        self.max = max(self.max, seconds)

    @staticmethod
    def together(histograms):
        """What statistics() shows of some of them."""
        sums = [sum(counts) for counts in zip(*(histogram.counts for histogram in histograms))]
        return {"count": sum(sums), "sum": sum(histogram.sum for histogram in histograms),
                "max": max(histogram.max for histogram in histograms),
                "below": {2 ** size / 1e6: count for size, count in enumerate(sums) if count}}


class _Meter:
    """Measures a step of a worker every now and then, and how long the last of those who were ready then has waited."""

    def __init__(self, worker):
        self.worker = worker
        self.step_times, self.latencies = _Histogram(), _Histogram()
        self.since = 0.0        # when somebody was the last of those who were ready
        self.target = None      # the worker's `steps` when his turn has come; None if he is not waited for
        self.alone = None       # the pass is one step, which is measured: the worker's `steps` before it; else None

    def measure(self, began, ended, plan, idled):
        """After a pass: (the plan of the next one, when to be called after another; 0: the next)."""
        worker = self.worker
        if self.alone is not None:
            if self.alone == worker.steps:              # nobody was ready after all
                return (range(1),), 0.0
            self.step_times.add(ended - began)
            self.alone = None
            return plan, ended + SECONDS_PER_SAMPLE
        if ended - began > SECONDS_PER_SAMPLE:
            self.step_times.add(ended - began)
            if not idled and self.target is None:
                self.latencies.add(ended - began)       # of those who are ready behind it
        if self.target is None:
            if not worker.ready:
                return plan, 0.0
            self.since, self.target = time.monotonic(), worker.steps + len(worker.ready) - 1
            ended = self.since
        left = self.target - worker.steps
        if left > 0 and not idled:
            full, rest = divmod(left, len(plan[0]))
            return plan if full >= len(plan) else (*plan[:full], range(rest)), 0.0
        self.latencies.add(ended - self.since)
        self.target, self.alone = None, worker.steps
        return (range(1),), 0.0


class _Probe(itertools.repeat):
    """Stands for the context of a task that is being stepped; once another step of it has begun there is one less to come.

    All in C: such a step has no frame more, nor a place where a signal handler's error could come before what is sent in.
    """

    __slots__ = ("context",)
    run = property(next)            # the context's

    def __new__(cls, context):
        self = super().__new__(cls, context.run, sys.maxsize)
        self.context = context
        return self


class _Sight:
    """What a worker was seen at: a step of a task, a call from another thread, or neither, as in a hook.

    The loop does nothing to show whether that lasts. It does while the worker is at the same call, or at the same task, whose
    probe says that no other step of it has begun. If it is at neither: while nobody is taken from or put into its ready deque,
    for an iterator over that fails after any change. (A step of a task may make others ready all the time.)
    """

    def __init__(self, worker):
        self.worker, self.held_by, self.looked = worker, worker.task or worker.call, worker.looked
        self.probe, self.ready = None, iter(worker.ready)
        self.since = self.due = 0.0         # when it began, as far as is known, and when to report it
        if isinstance(self.held_by, Task):
            context = self.held_by.context
            if isinstance(context, _Probe):         # another worker was at it a moment ago
                context = context.context
            self.probe = self.held_by.context = _Probe(context)

    def lasts(self):
        worker, held_by = self.worker, self.held_by
        if (worker.task or worker.call) is not held_by or worker.looked != self.looked:
            return False
        if self.probe is not None:
            return held_by.context is self.probe and operator.length_hint(self.probe) == sys.maxsize
        if held_by is None:
            try:
                next(self.ready, None)
            except RuntimeError:            # the deque has changed
                return False
        return True

    def forget(self):
        if self.probe is not None and self.held_by.context is self.probe:
            self.held_by.context = self.probe.context


class _Watchdog:
    """The thread that looks at the workers of a kernel, and reports who is held by one step for longer than `limit` seconds.

    A step has lasted since it was first seen, or since the worker has looked at the clock if the watchdog itself was kept away
    meanwhile.
    """

    resting = set()             # those that wait for their next look, of all kernels: they will wake no task
    told = tell = None          # the pipe into which threads write their stacks, if there is no GIL
    asking = threading.Lock()   # held while one does

    def __init__(self, kernel, limit):
        self.kernel, self.limit = kernel, limit
        self.pause = min(limit / WATCHDOG_LOOKS, threading.TIMEOUT_MAX)     # seconds between two looks at most
        self.seen = {}          # worker -> _Sight, of those who may be in a long step
        self.done = threading.Lock()
        self.done.acquire()
        self.thread = None

    def start(self):
        if self.limit == _INF:
            return
        thread = threading.Thread(target=self.main, name="flowcoro watchdog", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise RuntimeError(f"the watchdog could not be started: {error}. Run without watchdog=, or raise the limit of "
                               "threads (ulimit -u)") from error
        self.thread = thread

    def stop(self):
        if self.thread is not None:
            if self.done.locked():
                self.done.release()
            self.thread.join()

    def main(self):
        while True:
            before, used = time.monotonic(), time.process_time()
            pause = min([self.pause, *(max(sight.due - before, 0.0) for sight in self.seen.values())])
            self.resting.add(self)
            done = self.done.acquire(timeout=pause)
            self.resting.discard(self)
            if done:
                break
            moment = time.monotonic()
            late = moment - before - pause
            computed = time.process_time() - used > late / 2
            # An eighth: what a step may seem longer than it was. If it computed, C code kept the GIL, and that is a step.
            if late > self.limit / 8 and not computed:      # else the process was stopped, which is none
                for sight in self.seen.values():
                    sight.since, sight.due = sight.since + late, sight.due + late
            for worker in self.kernel.workers:
                try:
                    self.look_at(worker, late > self.limit and computed)
                except Exception as error:
                    report_error(error, "the watchdog failed to look at a worker")

        for sight in self.seen.values():
            sight.forget()

    def look_at(self, worker, late):
        now, sight = time.monotonic(), self.seen.get(worker)        # first the time: a step seems no longer than it was
        # A hundredth: what a report may be late by that, for a step which has just begun now is not looked at more closely.
        calm = worker.sleeping or now - worker.looked < self.limit / 100 or worker.thread_id is None
        if sight is not None and (calm or not sight.lasts()):
            self.seen.pop(worker).forget()
            sight = None
        if calm:
            return
        if sight is None:
            sight = self.seen[worker] = _Sight(worker)
            sight.since = sight.looked if sight.held_by is not None and late else time.monotonic()
            sight.due = sight.since + self.limit
        if now >= sight.due:
            self.alarm(sight, now - sight.since)
            sight.due = now + (now - sight.since)

    def live_stack(self, worker):
        """[(file, line, function)] of the step that a worker makes, outermost first."""
        if not _has_gil():      # there a frame that is being run must not be read
            return self.stack_by_signal(worker)
        stack, frame = [], sys._current_frames().get(worker.thread_id)
        while frame is not None and frame.f_code is not _Worker.work.__code__:
            stack.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        return stack[::-1]

    def stack_by_signal(self, worker):
        """The same without a GIL: the thread writes it itself, in the handler of a signal."""
        import faulthandler
        import re
        import signal
        number = getattr(signal, "SIGURG", None)        # as in Go's runtime: without a handler it does nothing
        if number is None or signal.getsignal(number) != signal.SIG_DFL:
            return []
        cls, text = type(self), b""
        with cls.asking:
            if cls.told is None:
                cls.told, cls.tell = os.pipe()      # for good, as the handler: the signal might come late
            faulthandler.unregister(number)         # somebody may have put another handler in its place and taken that away
            faulthandler.register(number, file=cls.tell, all_threads=False)
            while _select.select([cls.told], [], [], 0)[0]:         # what came too late last time
                os.read(cls.told, 65536)
            thread = worker.thread_id
            if thread is None:                          # it is about to end
                return []
            signal.pthread_kill(thread, number)
            places, wait = [], 1.0                      # on a busy machine it may be long until that thread runs at all
            while _select.select([cls.told], [], [], wait)[0]:
                text += os.read(cls.told, 65536)
                places = re.findall(r'^  File "(.*)", line (\d+) in (.*)\n', text.decode(errors="replace"), re.MULTILINE)
                wait = 0.001 if any(place[::2] == (_HERE, "work") for place in places) else 0.1
        inside = list(itertools.takewhile(lambda place: place[::2] != (_HERE, "work"), places))     # innermost first
        return [(file, int(line), function) for file, line, function in reversed(inside)]

    @classmethod
    def let_go(cls):
        """Leave the pipe to the parent of a fork."""
        if cls.told is not None:
            import faulthandler
            import signal
            faulthandler.unregister(signal.SIGURG)
            os.close(cls.told)
            os.close(cls.tell)
            cls.told = cls.tell = None

    @staticmethod
    def in_words(stack):
        """The text of [(file, line, function)], outermost first, without the frames of the kernel that come first."""
        import traceback
        own = itertools.dropwhile(lambda place: place[0] == _HERE, stack)
        return "".join(traceback.format_list([(*place, None) for place in own]))

    @staticmethod
    def waits_for_guard(file, line, function):
        import linecache
        return file == _HERE and linecache.getline(file, line).strip().startswith(("with _GUARD", "with place.guard"))

    @staticmethod
    def guard_owner():
        """The number of the thread that holds the guard, 0 for none. An RLock tells it in its repr() only."""
        import re
        owner = re.search(r"owner=(0x[0-9a-f]+|[0-9]+) ", repr(_GUARD))
        return int(owner[1], 0) if owner is not None else 0

    def alarm(self, sight, seconds):
        kernel, task, worker, held_by = self.kernel, None, sight.worker, sight.held_by
        if isinstance(held_by, Task):
            task, who = held_by, f"task {held_by.name!r}"
        elif isinstance(held_by, _CallFromThread):
            function = getattr(held_by.function, "func", held_by.function)
            who = f"call_from_thread({getattr(function, '__qualname__', repr(function))})"
        else:
            who = "something that is no task (a hook, a collection of garbage)"
        stack = self.live_stack(worker)
        gone = not sight.lasts()                # then the stack may be that of another step
        waits = bool(stack) and self.waits_for_guard(*stack[-1])
        if waits and (held_by is None or self.guard_owner() in (
                0, *(other.thread_id for other in kernel.workers if not other.sleeping))):
            return                      # who holds it is reported, or has just let go
        stack = "" if gone else self.in_words(stack)
        remedy = ("It waits for another kernel, a thread or a signal handler, in an @atomic method or a hook there that takes so "
                  "long" if waits else "Move what computes or blocks there to to_thread(), or put a checkpoint() into it")
        report = (f"{who} has held worker {kernel.workers.index(worker) + 1} of {len(kernel.workers)} for {seconds:.3g} s, "
                  f"the limit is {self.limit:g} s. {remedy}\n"
                  f"Behind it wait: {', '.join(self.behind(worker, task)) or 'nobody'}\n"
                  + (f"It is here:\n{stack}" if stack else f"It {'has gone on' if gone else 'does not say where it is'}\n"))
        if "task_stuck" in (kernel.hooks or ()):
            kernel.call_hooks("task_stuck", task, seconds, report)     # without the guard, which the step may hold
        else:
            report_error(RuntimeError(report), "a step takes too long", object=task)

    def behind(self, worker, task):
        """What the worker does not come to, in words."""
        try:
            count, first = len(worker.ready), list(itertools.islice(worker.ready, 3))
            overdue = worker.now() - worker.timers.heap[0] if worker.timers.heap else 0.0
        except (RuntimeError, IndexError):      # it has just gone on
            return
        if count:
            names = ", ".join(other.name for other in first)
            yield f"{count} ready ({names}{f' and {count - 3} more' if count > 3 else ''})"
        if task is not None and task._joiners is not None and len(task._joiners):
            yield f"{len(task._joiners)} that await it"
        if overdue > 0.001:
            yield f"a deadline that passed {overdue:.3g} s ago"
        if worker.io_parked:
            yield f"{worker.io_parked} parked on descriptors"
        if worker.inbox:
            yield f"{len(worker.inbox)} calls from other threads"


# ---- the kernel -----------------------------------------------------------------------------------------------

_HOOKS = ("task_spawned", "task_parked", "task_rescheduled", "task_stolen", "task_done", "task_stuck", "before_poll",
          "after_poll")


class _Signals:
    """The signals of a kernel in the main thread, where nobody else has taken them: Ctrl-C, SIGTERM, SIGQUIT."""

    # A handler may interrupt any bytecode of the kernel, so it only posts a call to the loop.

    def __init__(self, kernel):
        self.kernel = kernel
        self.interrupts = 0         # Ctrl-C so far
        self.terminate = None       # the number of the signal that asked to stop
        self.heard = False          # main was told of it
        self.handlers = []          # (signal number, our handler, the one to restore)
        self.owns_wakeup_fd = False

    def install(self):
        if threading.current_thread() is not threading.main_thread():
            return
        import signal
        for name, default, handler in (("SIGINT", signal.default_int_handler, self._on_interrupt),
                                       ("SIGTERM", signal.SIG_DFL, self._on_terminate),
                                       ("SIGQUIT", signal.SIG_DFL, self._on_quit)):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == default:
                self.handlers.append((number, handler, default))
                signal.signal(number, handler)

    def take_wakeup_fd(self, fd):
        """Have the C-level handler write there at once.

        Without it a signal that comes between the last bytecode and epoll_wait would be noticed when something else ends
        the wait.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        import signal
        other = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
        self.owns_wakeup_fd = other == -1
        if not self.owns_wakeup_fd:
            signal.set_wakeup_fd(other)

    def release_wakeup_fd(self):
        if self.owns_wakeup_fd:
            import signal
            self.owns_wakeup_fd = False
            signal.set_wakeup_fd(-1)

    def restore(self):
        """The first comes last: once SIGINT is restored a Ctrl-C raises at once, and would leave others undone."""
        if self.handlers:
            import signal
            for number, handler, default in reversed(self.handlers):
                if signal.getsignal(number) == handler:         # else somebody has put another one there
                    signal.signal(number, default)

    def may_stop(self):
        """Whether SIGTERM would wake those who wait for a request to stop."""
        return any(handler == self._on_terminate for _, handler, _ in self.handlers)

    def is_foreign(self, handler):
        """Whether what signal.getsignal() has given is somebody else's function."""
        import signal
        return (callable(handler) and handler is not signal.default_int_handler
                and all(handler != ours for _, ours, _ in self.handlers))

    def _post(self, call):
        worker = self.kernel.worker
        worker.inbox.append(call)
        if worker.sleeping:
            worker.waker.call()

    def _on_interrupt(self, number, frame):
        self.interrupts += 1
        self._post(self._interrupted)
        if self.interrupts > 1:                 # here, for what is stuck may hold the guard, or the loop may have ended
            for worker in self.kernel.worker.others:
                self._interrupt_step(worker)
            if self._is_stuck(self.kernel.worker, frame):
                raise KeyboardInterrupt

    def _is_stuck(self, worker, frame):
        return time.monotonic() - worker.looked > STUCK_SECONDS and self._in_users_code(worker, frame)

    @staticmethod
    def _in_users_code(worker, frame):
        """Whether an error raised in `frame` meets the user's code first, not the kernel's bookkeeping."""
        if frame.f_code.co_filename == _HERE:
            return False
        while frame is not None and (frame.f_code.co_filename != _HERE or frame.f_globals is not globals()
                                     or frame.f_code.co_qualname == "atomic.__set_name__.<locals>.method"):
            frame = frame.f_back                # (the last two stand around methods of the user's)
        if frame is not None and frame.f_code in (
                _Kernel.call_hooks.__code__, _CallFromThread.__call__.__code__, _OneOfSeveral._park_among_others.__code__,
                ParkingLot._park_unless.__code__):
            return True         # a hook, a call from a thread, a park function or its predicate: they may fail with any error
        if worker.task is None:         # or a park function, or a clock: _recover() takes what that raises
            return frame is not None and frame.f_code is _Worker.work.__code__
        return frame is not None and bool(frame.f_code in _STEPPERS or frame.f_code.co_flags & 0x80)    # CO_COROUTINE

    def _interrupted(self):
        kernel = self.kernel
        if self.interrupts > 1:
            kernel.drop_shields()
        if kernel.main.done():
            kernel.cancel_all()
        else:
            kernel.main.cancel()

    def _interrupt_step(self, worker):
        """Do for a worker in another thread what the handler does for the first: it is raised once that runs Python code."""
        try:
            import ctypes               # first: it may take time, and the step have ended by then
        except (ImportError, AttributeError):       # the latter: main is just importing it
            return
        thread = worker.thread_id
        frame = sys._current_frames().get(thread) if _has_gil() else None       # else it must not be read
        if thread is not None and (self._is_stuck(worker, frame) if frame is not None else (
                (worker.task or worker.call) is not None and time.monotonic() - worker.looked > STUCK_SECONDS)):
            with contextlib.suppress(AttributeError):
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))

    def _on_terminate(self, number, frame):
        again, self.terminate = self.terminate is not None, number
        self._post(functools.partial(self._terminated, again))

    def _terminated(self, again):
        kernel = self.kernel
        self.heard = self.heard or not kernel.main.done()
        if again or not len(kernel.stop_lot):
            kernel.main.cancel()
        if again:
            kernel.drop_shields()
        kernel.request_stop()

    def _on_quit(self, number, frame):
        try:
            text = (_dump(self.kernel) + "\n").encode(errors="replace")
            while text:
                text = text[os.write(2, text):]
        except Exception:           # stderr is closed or full: the program that was asked goes on
            pass


def _has_gil():
    return getattr(sys, "_is_gil_enabled", lambda: not getattr(sys.flags, "nogil", False))()


def _close_by_force(task):
    report_error(RuntimeError("it could not be cancelled:\n" + "\n".join(_await_chain(task))),
                 "a task was closed by force", object=task)
    worker = _local.worker
    undo = [task.coro.close] if task.abort_function is None else [functools.partial(task.abort_function, task),
                                                                  task.coro.close]
    for call in undo:
        if call is undo[-1]:
            task._worker, worker.task = worker, task        # what its cleanup releases is its own
        try:
            call()
        except BaseException as error:
            report_error(error, "closing a task by force", object=task)
    worker.task = None
    if task._state != DONE:
        worker._finish(task, None, Cancelled())


class _Deadlocks:
    """How a kernel finds out that no task can ever run again, and what it does then."""

    # Go can say "all goroutines are asleep" because its runtime knows everything that could wake one. So does this one,
    # but for code that enters from outside: other threads (Python's or not), signal handlers, and finalisers. A false
    # alarm would be worse than silence, so each doubt means no.

    def __init__(self, kernel):
        self.kernel = kernel
        self.broken = 0             # so far, in this run

    def is_one(self):
        """Nothing is ready and no deadline, descriptor or thread call is pending: can anybody else wake a task?"""
        if self._may_be_woken():        # as a rule, and a service may wait like this for days: no collection each second
            return False
        import gc
        for _ in range(10):         # a finaliser may hold the key, or start a thread that does, or free another one
            if not gc.collect():
                break
        return not self._may_be_woken()

    def _may_be_woken(self):
        import signal
        kernel = self.kernel
        if len(kernel.stop_lot) and kernel.signals.may_stop():
            return True
        if any(kernel.signals.is_foreign(signal.getsignal(number)) for number in signal.valid_signals()):
            return True
        try:
            threads = len(os.listdir("/proc/self/task"))        # also those that never ran Python yet
        except OSError:
            threads = len(sys._current_frames())
        known = len(kernel.workers) + len(_ThreadPool.idle) + len(_Watchdog.resting)
        if threads > known or not kernel.in_main_thread or kernel.main is None:
            return True
        # Last, for a thread may have done its work and ended while all this was looked at.
        return any(worker.ready or worker.inbox or worker.timers.heap for worker in kernel.workers)

    @atomic
    def is_quiet(self, worker):
        """Whether all workers but this one sleep, and none of them waits for anything that will come by itself."""
        return all((each is worker or each.sleeping) and not (
            each.ready or each.inbox or each.timers.heap or each.sleepers or each.io_parked or each.thread_calls)
            for each in self.kernel.workers)

    def break_one(self):
        """Cancel everybody; if that ends in a deadlock as well, inside the shields too; at last close the coroutines."""
        kernel = self.kernel
        self.broken += 1
        if self.broken == 1:
            kernel.fatal = kernel.fatal or Deadlock(
                "no task can ever run again: there is no timer, file descriptor, thread or signal handler left that could "
                "wake one.\n" + _dump(kernel))
            kernel.cancel_all()
        elif self.broken == 2:
            kernel.drop_shields()
        else:
            for task in list(kernel.all_tasks()):
                if task._state == PARKED:       # else another's end has just woken it, and it has its turn (I1)
                    _close_by_force(task)


class _Kernel:
    """One run(): its workers, the root of its tasks, its signals, and how it ends."""

    def __init__(self, workers, clock, seed, grace, watchdog):
        self.clock, self.seed, self.grace = clock, seed, grace
        self.root = _Root(self)
        self.main = None
        self.hooks = None                       # {name: [(object added, its method)]} while there are any
        # Keys of dicts, because a set has no order, and the same seed has to give the same run.
        self.failures = weakref.WeakKeyDictionary()     # of the root's tasks
        self.asyncgens = weakref.WeakKeyDictionary()
        self.dropped = deque()                  # async generators to be closed
        self.plain = {}                         # number -> _PlainFd
        self.fatal = None                       # raised by run() whatever main returns
        self.signals = _Signals(self)
        self.stop_asked = False
        self.stop_lot = ParkingLot("wait for a request to stop")
        self.deadlocks = _Deadlocks(self)
        self.ended = False
        self.limiter = Semaphore(THREADS)
        self.watchdog = _Watchdog(self, watchdog) if watchdog is not None else None
        if workers > 1 or not _has_gil():       # without one, no field is safe from a Promise set in another thread
            _guard_all()
        if workers == 1:
            self.workers = [_Worker(self, clock, seed)]
        else:
            self.workers = [_OneOfSeveral(self) for _ in range(workers)]
            for worker in self.workers:
                worker.others = tuple(other for other in self.workers if other is not worker)
                worker.beset = True
        self.worker = self.workers[0]           # that of the thread that called run()
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        self.keeper = threading.Lock()          # held by the idle worker that looks after those who may be stuck
        self.parallel = not _has_gil()
        self.searchers = threading.Semaphore(max(1, workers // 2))      # at most half of them search at a time

    # -- beginning and end

    def run(self, coro):
        """Run `coro` as main until no task is left. Returns (value, error)."""
        worker = self.worker
        asyncgen_hooks = sys.get_asyncgen_hooks()
        try:
            self.signals.install()              # first and last: between, no Ctrl-C can break in
            self._open_all()
            self.signals.take_wakeup_fd(worker.waker.write_fd)
            _local.worker = worker
            _kernels.add(self)
            self.take_asyncgens()
            self._start_others()
            if self.watchdog is not None:
                self.watchdog.start()
            self.main = self.root.spawn(coro, pinned=True)      # to the thread that signal handlers, GUIs … belong to
            self.work(worker)
            if self.ended:                      # this is a child, forked in the last step of all
                raise _Forked
        except _Forked:
            return None, RuntimeError(
                "this process was forked inside flowcoro.run(), and the child came back into the kernel. A child may run a "
                "kernel of its own, exec or os._exit(); to start processes use subprocess, or fork before run()")
        finally:
            blow = None
            for _ in range(BLOWS):
                try:
                    self._end(asyncgen_hooks)
                    break
                except BaseException as error:  # a signal handler's: do the rest, and what it has struck again
                    blow = error
            self.signals.restore()
            if blow is not None:
                raise blow
        return self._outcome()

    def _end(self, asyncgen_hooks):
        """Give back what run() has taken. May be called again when it was struck in the middle."""
        self.signals.release_wakeup_fd()
        sys.set_asyncgen_hooks(*asyncgen_hooks)
        _local.worker = _OUTSIDE
        _kernels.discard(self)
        self._stop_all()
        for worker in self.workers[1:]:
            if worker.thread is not None:
                worker.thread.join()
        self.ended = True
        for worker in self.workers:
            worker.close()
            while worker.inbox:
                call = worker.inbox.popleft()
                try:
                    if isinstance(call, _CallFromThread) and call.lock.locked():
                        call.refuse()
                except BaseException:
                    worker.inbox.appendleft(call)
                    raise
        if self.watchdog is not None:
            self.watchdog.stop()                # after the calls: a hook in its thread may have made one
        for failure in list(self.failures):
            if self.main is None or failure is not self.main._error:
                failure.report()

    def _open_all(self):
        try:
            for worker in self.workers:
                worker.open()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: a kernel needs three descriptors for each of its workers, and this "
                          f"one is to have {len(self.workers)}. Close some, or raise the limit (ulimit -n)") from None

    def _start_others(self):
        for number, worker in enumerate(self.workers[1:], 2):
            thread = threading.Thread(target=worker.main, name=f"flowcoro worker {number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise RuntimeError(f"only {number - 1} of {len(self.workers)} workers could be started: {error}. Ask for "
                                   "fewer, or raise the limit of threads (ulimit -u)") from error
            worker.thread = thread

    def _stop_all(self):
        for worker in self.workers:
            worker.stopped = True
            if worker is not _local.worker:
                worker.wake()

    def take_asyncgens(self):
        """Have the thread that calls tell of the async generators that it begins."""
        sys.set_asyncgen_hooks(firstiter=self._begin_asyncgen, finalizer=self._finalize_asyncgen)

    def alive(self):
        """How many tasks there are."""
        return sum(worker.spawned - worker.finished for worker in self.workers)

    def work(self, worker):
        """Let the worker step tasks until none is left, whatever strikes it in the middle of its bookkeeping."""
        worker.thread_id = threading.get_ident()
        blow = None                 # what a signal handler of the user's or his clock has raised; no memory or stack left
        for blows in range(BLOWS):
            try:
                if blow is not None:
                    self.fatal = self.fatal or blow
                    _recover(worker, blow)
                    self.cancel_all()
                    if blows > 1:
                        self.drop_shields()
                worker.work()
                break
            except _Forked:
                raise
            except BaseException as error:
                blow = error
        else:
            self._close_all(worker)
            while worker.others and not worker.stopped:     # the others bring theirs to an end
                time.sleep(TICK)
        worker.thread_id = None
        with _Watchdog.asking:      # who has begun to send signals to this thread has to be done before it ends
            pass

    @atomic
    def _close_all(self, worker):
        worker.ready.clear()
        for _ in range(BLOWS):              # what they spawn in their cleanup as well
            for task in list(self.all_tasks()):
                if task._worker is worker and task._state != DONE:      # the others' may be in the middle of a step
                    _close_by_force(task)

    def _outcome(self):
        main, signals = self.main, self.signals
        error = None if main._error is None else main.exception()
        if self.fatal is not None:
            if error is not None and not isinstance(error, TaskCancelled) and error is not self.fatal:
                self.fatal.__cause__ = error
            return None, self.fatal
        if signals.interrupts:
            interrupt = KeyboardInterrupt()
            if error is not None and not isinstance(error, (TaskCancelled, KeyboardInterrupt)):
                interrupt.__cause__ = error
            return None, interrupt
        cancelled = isinstance(error, TaskCancelled) and main.cancelled()
        if signals.terminate is not None and (cancelled or error is None and not signals.heard):
            return None, SystemExit(128 + signals.terminate)
        return main._value, error

    def wind_up(self):
        """The last task has ended: close the async generators that are left, in a cancelled region, then stop."""
        left = [*self.asyncgens, *self.dropped]
        self.asyncgens.clear()
        self.dropped.clear()
        self.root._late = 0                     # whatever spawned so many has come to an end
        for asyncgen in left:
            self.root.spawn(_close_asyncgen(asyncgen))
        if not left:
            self.root._open = False             # a call from a thread, on another worker, would spawn what nobody steps
            self._stop_all()

    def _begin_asyncgen(self, asyncgen):
        self.asyncgens[asyncgen] = None

    def _finalize_asyncgen(self, asyncgen):
        """The garbage collector, in whatever thread, has found a suspended async generator."""
        self.dropped.append(asyncgen)
        self.worker.post(self._close_dropped)

    @atomic
    def _close_dropped(self):
        try:
            while self.dropped:                 # else wind_up() has them
                asyncgen = self.dropped.popleft()
                self.root.spawn(_close_asyncgen(asyncgen))
        except RuntimeError as error:           # too many were spawned since the end of main
            report_error(error, "an async generator could not be closed", object=asyncgen)

    def all_tasks(self):
        """Every task, parents before children."""
        pending = deque(self.root._tasks)
        while pending:
            task = pending.popleft()
            yield task
            for group in _groups(task):
                pending.extend(group._tasks)

    @atomic
    def cancel_all(self):
        self.root._doomed = True
        for task in list(self.root._tasks):
            _interrupt_inside(task, None)

    @atomic
    def drop_shields(self):
        """Those who were asked and do not come: cancel them inside their shields as well."""
        for task in list(self.all_tasks()):
            scope = task._scope
            while scope is not None:
                if scope._shield and not scope._firm:
                    scope._shield = False
                scope = scope._outer
            place = getattr(task.abort_function, "__self__", None)
            if task._state != PARKED:
                continue
            if isinstance(place, _ThreadCall) and self.signals.interrupts > 1:
                place.abandon = True            # the thread may never come back
                task._resume = task._send
            elif isinstance(place, ParkingLot) and task.abort_function == place._stay:
                task.abort_function = place._abort      # nor may the holder of the lock
                task._resume = task._send
        for task in list(self.root._tasks):
            if self.root._doomed or task._cancel_called:
                _interrupt_inside(task, None)

    def park_until_stop(self, task):
        if self.stop_asked:
            _reschedule(task)
        else:
            self.stop_lot._park(task)

    @atomic
    def request_stop(self):
        first, self.stop_asked = not self.stop_asked, True
        self.stop_lot.unpark_all()          # also the second time: the first may have been struck in the middle
        if first and self.grace < _INF and not self.root._doomed:
            self.root.spawn(self._end_of_grace(), name="end of grace")

    async def _end_of_grace(self):
        await sleep(self.grace)
        self.main.cancel()

    # -- hooks

    @atomic
    def fire(self, name, *args):
        """Call the hooks of that name: with several workers one at a time, as with one."""
        self.call_hooks(name, *args)

    def call_hooks(self, name, *args):
        for _, call in (self.hooks or {}).get(name, ()):        # another worker may have removed the last
            try:
                call(*args)
            except BaseException as error:      # a SystemExit too: it would leave tasks behind
                report_error(error, f"{_a(name)} hook failed", object=call)

    @atomic
    def set_hooks(self, change):
        self.hooks = change(self.hooks or {}) or None
        for worker in self.workers:
            worker.hooks = self.hooks

_kernels = weakref.WeakSet()        # those that run, in this process
_STEPPERS = {_Worker.work.__code__, Task._raise_error.__code__,
             Task._step_then_cancel.__code__, Task._deliver.__code__}


async def _close_asyncgen(asyncgen):
    await asyncgen.aclose()


def _holders(task):
    """The tasks that could wake a parked one, if its parking place knows them."""
    if task._state != PARKED:
        return []
    holder = getattr(getattr(task.abort_function, "__self__", None), "holder", None)
    if not isinstance(holder, (dict, list, tuple, set)):
        holder = (holder,)
    return [task for task in holder if isinstance(task, Task)]      # a primitive of others may call anything a holder


def _why(task):
    if task._state != PARKED:
        return ""
    holders = _holders(task)
    more = f" and {len(holders) - 3} more" if len(holders) > 3 else ""
    names = ", ".join(holder.name for holder in holders[:3])
    return f": {task.park_reason}" + (f" (for {names}{more})" if holders else "")


def _cycle(tasks):
    """If tasks wait for each other in a circle, one line that says so."""
    seen = set()
    for task in tasks:
        path = {}                               # in order
        while task not in seen:
            seen.add(task)
            path[task] = None
            holders = _holders(task)
            if len(holders) != 1:
                break
            task = holders[0]
        else:
            if task in path:
                circle = list(itertools.dropwhile(lambda first: first is not task, path))
                pairs = zip(circle, circle[1:] + circle[:1])
                return ["in a circle: " + ", ".join(f"{a.name} waits for {b.name}" for a, b in pairs)]
    return []


@_guarded_function
def _dump(kernel):
    lines = []
    pending = [(task, "") for task in reversed(list(kernel.root._tasks))]
    while pending:
        task, indent = pending.pop()
        lines.append(f"{indent}{task.name}: {task.state}{_why(task)}")
        # What runs has no chain to follow; without a GIL nor has what another worker may begin to run now.
        if task is not task._worker.task and not (kernel.parallel and task._worker.others and task._state == READY):
            lines += [f"{indent}    at {line}" for line in _await_chain(task)]
        for group in reversed(_groups(task)):
            pending += [(child, indent + "  | ") for child in reversed(list(group._tasks))]
    return "\n".join(lines + _cycle(kernel.all_tasks()))


# In the child of a fork only the forking thread goes on, and the kernel's descriptors are shared with the parent.
class _Poison:
    """Lies first in the child's copy of the ready deque: the loop, when it comes back to it, breaks."""

    _value = _resume = None
    context = property(lambda self: self)

    def run(self, resume, value):
        raise _Forked


def _after_fork_in_child():
    global _GUARD
    _GUARD = _GuardPlace.guard = threading.RLock()          # another thread may have held it
    _local.worker = _OUTSIDE
    _ThreadPool.idle.clear()
    _ThreadPool.threads.clear()
    _Watchdog.resting.clear()
    _Watchdog.asking = threading.Lock()
    _Watchdog.let_go()
    for kernel in list(_kernels):
        kernel.ended = True
        if threading.current_thread() is threading.main_thread():
            kernel.signals.release_wakeup_fd()
            kernel.signals.restore()
        for worker in kernel.workers:
            worker.waker.callers.clear()        # other threads
            worker.ready.clear()
            worker.ready.append(_Poison())
            worker.inbox.clear()
            worker.timers.heap.clear()       # and no visit to timers or descriptors before it comes to the poison: a
            worker.descriptors = 0           # poll would eat the parent's edges
            worker.hooks = kernel.hooks = None
            worker.sleeping = worker.beset = False          # else a call posted here would wake the parent
    _kernels.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# ---- run and spawn --------------------------------------------------------------------------------------------

def _checked_workers(workers, clock, seed):
    if seed is not None and not isinstance(seed, (int, str, bytes, float)):
        raise TypeError(f"seed={seed!r}: give an int or a str, which makes the order of tasks random and yet the same each time")
    if workers is None:
        if clock is not None or seed is not None or _has_gil():
            return 1
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not _is_count(workers, 1) or workers > MOST_WORKERS:
        raise ValueError(f"workers={workers!r}: give how many threads are to step tasks, an int from 1 to {MOST_WORKERS}, or "
                         "None for as many as help")
    if workers > 1 and (clock is not None or seed is not None):
        raise ValueError(f"workers={workers}: a clock= or seed= of your own makes runs that can be repeated, and these have "
                         "one worker")
    return workers


def _checked_watchdog(watchdog):
    if watchdog is None or watchdog is False:
        return None
    wanted = f"watchdog={watchdog!r}: give the seconds that one step may take, from 0.01 up; True for {WATCHDOG_LIMIT:g}; " \
             "math.inf only measures"
    if watchdog is True:
        return WATCHDOG_LIMIT
    try:
        limit = _as_float(watchdog + 0)         # float() alone would take text
    except TypeError:
        raise TypeError(wanted) from None
    if not limit >= 0.01:
        raise ValueError(wanted)
    return limit


def run(coro, *, workers=None, clock=None, seed=None, grace=10.0, watchdog=None):
    """Run the coroutine `coro` and all that it spawns; return its result or raise its error.

    workers: how many threads step tasks, up to 1024; None for 1 with a GIL, else for as many as there are usable cores.
    Main is pinned: it stays in the thread that calls. After the first run with several (without a GIL: the first at all),
    locks and channels take a lock of their own in this process for good, also with one worker.
    clock: an object with now() and idle(timeout), see flowcoro_testing; with this or a seed there is one worker.
    seed: any int or str makes the order of ready tasks random but reproducible. grace: seconds that main has to end
    after request_stop() or SIGTERM before it is cancelled. watchdog: seconds that one step of a task may take, or True for
    1 second; a thread reports a longer one while it lasts, with its stack and what waits behind it, and again whenever that
    time has doubled: to the hook task_stuck, else to sys.unraisablehook; statistics() has histograms then. Without a GIL the
    stack comes by the signal SIGURG, through faulthandler, unless signal.signal() has given that a handler.

    What still runs when main has ended is cancelled and joined. In the main thread, where nobody else has installed
    handlers: Ctrl-C cancels main and raises KeyboardInterrupt once all cleanup is done (a second one goes through
    shields, and is raised inside a step that does not come to its next await, on other workers as soon as that runs Python
    code again); SIGTERM asks to stop if somebody awaits
    stop_requested(), else cancels, and a cancelled main ends in SystemExit(143), as does one whose end came before it
    could be told (its value is lost); a second one goes through shields. SIGQUIT (Ctrl-\\) prints dump_tasks().

    Raises Deadlock when no task can ever run again; TaskCancelled when main was cancelled, but not by a signal
    (request_stop() and its grace, cancel()); RuntimeError inside a running kernel, when not all workers or the watchdog can
    be started, and in the child of a fork that comes back here; OSError when there are too few descriptors; TypeError and
    ValueError.
    What a signal handler of yours raises while the kernel waits or works, not a task: all is cancelled and joined first;
    who does not end after 100 of such errors is closed by force. In a task's step it is that task's error, and an operation
    that it strikes in the middle may be half done.
    """
    try:
        _checked_coro(coro, "run")      # in here: a Ctrl-C may come at any call
        if _local.worker is not _OUTSIDE:
            raise RuntimeError("run() inside a running kernel: await the coroutine, or spawn() it")
        workers = _checked_workers(workers, clock, seed)
        grace = _checked_seconds(grace, "grace=")
        if clock is not None and (isinstance(clock, type) or not (hasattr(clock, "now") and hasattr(clock, "idle"))):
            raise TypeError(f"clock={clock!r}: give an object with now() and idle(timeout), see flowcoro_testing")
        value, error = _Kernel(workers, clock, seed, grace, _checked_watchdog(watchdog)).run(coro)
    except BaseException as error:  # also a Ctrl-C before the kernel has taken it over
        try:
            if isinstance(coro, (types.CoroutineType, Coroutine)):
                coro.close()        # else it would complain that nobody awaited it
        except KeyboardInterrupt:
            if not isinstance(error, KeyboardInterrupt):
                raise
        except BaseException as late:
            report_error(late, "closing main failed", object=coro)
        raise
    if error is not None:
        try:
            raise error
        finally:
            del error               # a frame that holds its own error is garbage only a collector finds
    return value


def spawn(coro, *, name=None, pinned=False):
    """Start a task that lives until it ends or main does (then it is cancelled and joined). Prefer a TaskGroup.

    An error that nobody awaits goes to sys.unraisablehook, at the latest when the run ends; SystemExit and
    KeyboardInterrupt end the run. pinned and errors as for TaskGroup.spawn().
    """
    try:
        group = _local.worker.kernel.root
    except RuntimeError:
        _checked_coro(coro, "spawn").close()    # else it would complain that nobody awaited it
        raise
    return group.spawn(coro, name=name, pinned=pinned)


# ---- stopping -------------------------------------------------------------------------------------------------

def request_stop():
    """Ask the program to end: stop_requested() returns everywhere; after run()'s `grace` main is cancelled.

    RuntimeError outside a kernel.
    """
    _local.worker.kernel.request_stop()


async def stop_requested():
    """Wait until request_stop() was called or SIGTERM came. At once if that has happened."""
    task = await checkpoint_if_due()
    kernel = task._worker.kernel
    if not kernel.stop_asked:
        await park(kernel.park_until_stop)


# ---- locks ----------------------------------------------------------------------------------------------------
# All are FIFO-fair: what is released is handed to the task that has waited longest, so that nobody who comes later
# can take it first; a task that was handed something and is cancelled afterwards still gets it (I3).

class _AsyncWith(_Unique):
    """`async with lock:` for all that has acquire() and release()."""

    __slots__ = ()

    async def __aenter__(self):
        await self.acquire()
        return self

    async def __aexit__(self, kind, error, trace):
        self.release()


class Lock(_AsyncWith):
    """Mutual exclusion between tasks: `async with lock:`. Not reentrant; only the holder may release it.

    Atomic: taking it; releasing it, together with its way to the task that has waited longest.
    """

    __slots__ = ("_lot",)

    def __init__(self):
        self._lot = ParkingLot("acquire a Lock")        # its holder is the lock's

    async def acquire(self):
        """Wait for the lock. Cancelled: not acquired. RuntimeError if this task holds it already."""
        task = _local.worker.task
        if task.budget > 0:             # the lines of checkpoint_if_due(), here to save 70 ns of 300
            task.budget -= 1
        else:
            await checkpoint()
        lot = self._lot
        if lot.holder is None:
            lot.holder = task
        elif lot.holder is task:
            raise RuntimeError(f"{task!r} holds this Lock already, and a Lock is not reentrant")
        else:
            await lot.park()

    @_shared
    async def _shared_acquire(self):
        if not self._take(await checkpoint_if_due()):
            await park(self._park)

    @atomic
    def _take(self, task):
        if self._lot.holder is task:
            raise RuntimeError(f"{task!r} holds this Lock already, and a Lock is not reentrant")
        if self._lot.holder is not None:
            return False
        self._lot.holder = task
        return True

    def _park(self, task):
        if self._take(task):                # released by another worker, in between
            _reschedule(task)
        else:
            self._lot._park(task)

    @atomic
    def acquire_nowait(self):
        """Acquire at once or raise WouldBlock. RuntimeError if this task holds it already, or where no task runs."""
        task = _local.worker.task or current_task()     # which says that none runs; asked first, it costs 50 ns of 320
        if self._lot.holder is task:
            raise RuntimeError(f"{task!r} holds this Lock already, and a Lock is not reentrant")
        if self._lot.holder is not None:
            raise WouldBlock(f"the Lock is held by {self._lot.holder!r}")
        self._lot.holder = task

    @atomic
    def release(self):
        """Hand the lock to who has waited longest. RuntimeError if another task holds it, or nobody."""
        lot = self._lot
        if lot.holder is None or lot.holder is not _local.worker.task:
            raise RuntimeError(f"{current_task()!r} cannot release a Lock held by {lot.holder!r}")
        self._hand_over()

    def _hand_over(self):
        lot = self._lot
        if not lot._tasks:
            lot.holder = None
            return
        for heir in lot._tasks:         # as in ParkingLot.unpark()
            break
        holder, lot.holder = lot.holder, heir
        del lot._tasks[heir]
        try:
            _reschedule(heir)
        except BaseException:
            if heir._state is PARKED:
                lot._tasks[heir] = None
                for other in [*lot._tasks][:-1]:
                    del lot._tasks[other]
                    lot._tasks[other] = None
                lot.holder = holder
            raise

    def locked(self):
        """Whether a task holds it."""
        return self._lot.holder is not None

    @property
    def owner(self):
        """The task that holds it, or None."""
        return self._lot.holder

    def statistics(self):
        """{"owner": Task or None, "tasks_waiting": int}"""
        return {"owner": self._lot.holder, **self._lot.statistics()}


class Semaphore(_AsyncWith):
    """A number of permits: acquire() takes one, release() gives one back, to who has waited longest.

    Any task may release. With max_value, to release more than that many is a ValueError.

    Atomic: taking a permit; giving it back, or to who has waited longest.
    """

    __slots__ = ("_value", "_max_value", "_lot")

    def __init__(self, value, *, max_value=None):
        if not _is_count(value, 0):
            raise ValueError(f"Semaphore({value!r}): the number of permits must be an int from 0 up")
        if max_value is not None and not _is_count(max_value, value):
            raise ValueError(f"Semaphore({value}, max_value={max_value!r}): max_value must be an int, not below the value, or "
                             "None for no limit")
        self._value = value
        self._max_value = max_value
        self._lot = ParkingLot("acquire a Semaphore")

    async def acquire(self):
        """Wait for a permit and take it. Cancelled: none taken."""
        await checkpoint_if_due()
        if not self._take():
            await park(self._park)

    @atomic
    def _take(self):
        if self._value <= 0:
            return False
        self._value -= 1
        return True

    def _park(self, task):
        if self._take():                    # as in Lock
            _reschedule(task)
        else:
            self._lot._park(task)

    def acquire_nowait(self):
        """Take a permit at once or raise WouldBlock."""
        if not self._take():
            raise WouldBlock("no permit of the Semaphore is free")

    @atomic
    def release(self):
        """Give a permit back. Never blocks. ValueError above max_value."""
        if self._max_value is not None and self._value >= self._max_value:
            raise ValueError(f"the Semaphore has all its {self._max_value} permits: released more often than acquired")
        if not self._lot.unpark():
            self._value += 1

    @property
    def value(self):
        """How many permits are free."""
        return self._value

    def statistics(self):
        """{"value": int, "max_value": int or None, "tasks_waiting": int}"""
        return {"value": self._value, "max_value": self._max_value, **self._lot.statistics()}


class Event(_Unique):
    """A flag that tasks wait for. set() wakes all; it stays set until clear().

    Atomic: set() with waking all; clear(); a wait's look at the flag together with parking.
    """

    __slots__ = ("_set", "_lot")

    def __init__(self):
        self._set = False
        self._lot = ParkingLot("wait for an Event")

    def is_set(self):
        """Whether it is set."""
        return self._set

    @atomic
    def set(self):
        """Set it and wake all that wait. Never blocks."""
        before, self._set = self._set, True     # first this: those on other workers go on at once
        try:
            self._lot.unpark_all()
        except RecursionError:                  # where the stack ends; nothing is done
            self._set = before
            raise

    def clear(self):
        """Unset it; who was woken stays woken."""
        self._set = False

    async def wait(self):
        """Wait until it is set; at once if it is."""
        await checkpoint_if_due()
        if not self._set:
            await park(self._park)

    def _park(self, task):
        if self._set:                       # as in Lock
            _reschedule(task)
        else:
            self._lot._park(task)

    def statistics(self):
        """{"set": bool, "tasks_waiting": int}"""
        return {"set": self._set, **self._lot.statistics()}


class Condition(_AsyncWith):
    """Wait, holding a lock, until another task says that something has changed: `async with condition:`.

    Atomic: notify(); a wait's release of the lock together with parking, so that no notify is missed.
    """

    __slots__ = ("_lock", "_lot")

    def __init__(self, lock=None):
        if lock is not None and not isinstance(lock, Lock):
            raise TypeError(f"Condition({lock!r}): the lock must be a flowcoro.Lock")
        self._lock = Lock() if lock is None else lock
        self._lot = ParkingLot("wait for a Condition")

    async def acquire(self):
        """Acquire the lock. Cancelled: not acquired."""
        await self._lock.acquire()

    def release(self):
        """Release the lock."""
        self._lock.release()

    async def __aexit__(self, kind, error, trace):
        if self._lock.owner is current_task():      # else wait() could not get it back
            self.release()

    async def wait(self):
        """Release the lock, wait for notify(), acquire the lock again. RuntimeError without the lock.

        Cancelled before a notify: raised with the lock held. After it: returns, and the next checkpoint raises, so
        that no notify is lost. What goes through shields (a second Ctrl-C or SIGTERM) can raise without the lock.
        """
        task = await checkpoint_if_due()
        if self._lock.owner is not task:
            raise RuntimeError("Condition.wait() without holding its lock: use `async with condition:`")
        try:
            await park(self._park)
        except BaseException:
            if self._lock.owner is not task:
                with CancelScope(shield=True):      # not a firm one: the lock's holder may be dead
                    await self._lock.acquire()
            raise

    def _park(self, task):
        self._lot._park(task)               # first this, so that no notify comes in between
        self._lock._hand_over()

    async def wait_for(self, predicate):
        """Wait until predicate() is true; return what it returned. It is called with the lock held, and TypeError if async."""
        _checked_function(predicate, "wait_for", "a plain one is asked, with the lock held")
        await checkpoint_if_due()
        while not (result := predicate()):
            await self.wait()
        return result

    @atomic
    def notify(self, count=1):
        """Let the `count` tasks that have waited longest go on, one after the other as the lock becomes free.

        RuntimeError without the lock, ValueError if the count is no int from 0 up.
        """
        if count != _INF and not _is_count(count, 0):
            raise ValueError(f"notify({count!r}): the number of tasks must be an int from 0 up")
        lock_lot = self._lock._lot
        if lock_lot.holder is not current_task():
            raise RuntimeError("Condition.notify() without holding its lock: use `async with condition:`")
        while count > 0 and self._lot._tasks:
            for task in self._lot._tasks:       # as in ParkingLot.unpark()
                break
            del self._lot._tasks[task]
            task.park_reason = "acquire the Lock of a Condition again"
            task.abort_function = lock_lot._stay    # it has been notified: that must not be lost
            lock_lot._tasks[task] = None
            count -= 1

    def notify_all(self):
        """Let all that wait go on."""
        self.notify(_INF)

    def statistics(self):
        """{"tasks_waiting": int, "lock": statistics of the lock}"""
        return {**self._lot.statistics(), "lock": self._lock.statistics()}


class Barrier(_Unique):
    """`await barrier.wait()` returns when `parties` tasks have come; then it is ready for the next round.

    Atomic: each coming, and the last one together with waking all.
    """

    __slots__ = ("parties", "_lot")

    def __init__(self, parties):
        if not _is_count(parties, 1):
            raise ValueError(f"Barrier({parties!r}): the number of parties must be an int from 1 up")
        self.parties = parties
        self._lot = ParkingLot("wait at a Barrier")

    async def wait(self):
        """Wait for the others; return the order of arrival, 0 to parties - 1. Cancelled: counted out again."""
        await checkpoint_if_due()
        arrived = self._complete()
        return await park(self._park) if arrived is None else arrived

    @atomic
    def _complete(self):
        """The order of arrival of the one who completes it; None if others have to come."""
        arrived = len(self._lot)
        if arrived + 1 < self.parties:
            return None
        try:
            self._let_go(arrived)
        except BaseException:               # a signal handler's: all have come, so those who are left are woken now
            self._let_go(arrived)
            raise
        return arrived

    def _let_go(self, count):
        """Wake those of the `count` who are left, each with the order of his arrival."""
        for index in range(count - len(self._lot), count):
            try:
                self._lot.unpark(1, index)
            except RecursionError:          # where the stack ends; the loop wakes who waits
                _local.worker.inbox.append(functools.partial(self._lot.unpark, 1, index))

    def _park(self, task):
        arrived = self._complete()
        if arrived is None:
            self._lot._park(task)
        else:
            _reschedule(task, arrived)

    def statistics(self):
        """{"parties": int, "tasks_waiting": int}"""
        return {"parties": self.parties, **self._lot.statistics()}


class RWLock(_Unique):
    """Many readers or one writer: `async with rwlock.read:` and `async with rwlock.write:`.

    First come, first served: a reader that comes after a waiting writer waits behind it, so neither can starve.
    Not reentrant. read and write each have acquire(), acquire_nowait() and release().

    Atomic: taking either side; releasing it, together with letting in whose turn it is.
    """

    __slots__ = ("_holders", "_writing", "_lot")

    def __init__(self):
        self._holders = {}              # task -> None
        self._writing = False
        self._lot = ParkingLot("acquire a RWLock", self._holders)

    @property
    def holder(self):
        """The tasks that hold it now: readers, or one writer."""
        return tuple(self._holders)

    @property
    def read(self):
        """The lock as readers see it."""
        return _Side(self, False)

    @property
    def write(self):
        """The lock as a writer sees it."""
        return _Side(self, True)

    def _admits(self, writing):
        return not self._holders or not (writing or self._writing)      # _writing says nothing when nobody holds it

    def _admit(self, leaving=None):
        """Let in those who wait first, as long as they fit together. `leaving` is about to wait no longer."""
        tasks = self._lot._tasks
        while len(tasks) > (leaving is not None):
            first = iter(tasks.items())
            task, writing = next(first)
            if task is leaving:
                task, writing = next(first)
            if not self._admits(writing):
                break
            del tasks[task]             # no call from here to _reschedule(): no signal handler strikes between
            before, self._writing = self._writing, writing
            self._holders[task] = None
            try:
                _reschedule(task)
            except BaseException:
                if task._state is PARKED:
                    del self._holders[task]
                    self._writing = before
                    tasks[task] = writing
                    for other in [*tasks][:-1]:
                        kind = tasks[other]
                        del tasks[other]
                        tasks[other] = kind
                raise

    def _abort(self, task):
        if task in self._lot._tasks:    # else who took it out before was struck
            self._admit(task)           # a writer that gives up lets the readers behind it in
            del self._lot._tasks[task]
        return task not in self._holders

    def statistics(self):
        """{"readers": int, "writer": Task or None, "tasks_waiting": int}"""
        return {"readers": 0 if self._writing else len(self._holders),
                "writer": next(iter(self._holders), None) if self._writing else None, **self._lot.statistics()}


class _Side(_AsyncWith):
    """RWLock.read or RWLock.write."""

    __slots__ = ("_rwlock", "_writing")

    def __init__(self, rwlock, writing):
        self._rwlock, self._writing = rwlock, writing

    def __repr__(self):
        return repr(self._rwlock).replace("RWLock", "RWLock.write" if self._writing else "RWLock.read", 1)

    async def acquire(self):
        """Wait for the lock. Cancelled: not acquired. RuntimeError if this task holds it already."""
        if not self._take(await checkpoint_if_due()):
            await park(self._park)

    @atomic
    def _take(self, task):
        lock = self._rwlock
        if task in lock._holders:
            raise RuntimeError(f"{task!r} holds this RWLock already, and it is not reentrant")
        if lock._lot._tasks or not lock._admits(self._writing):
            return False
        lock._writing = self._writing
        lock._holders[task] = None
        return True

    def _park(self, task):
        if self._take(task):                # as in Lock
            _reschedule(task)
            return
        lock = self._rwlock
        task.park_reason = "acquire a RWLock to write" if self._writing else "acquire a RWLock to read"
        task.abort_function = lock._abort
        lock._lot._tasks[task] = self._writing

    def acquire_nowait(self):
        """Acquire at once or raise WouldBlock. RuntimeError if this task holds it already, or where no task runs."""
        if not self._take(current_task()):
            raise WouldBlock("the RWLock is held, or others wait for it")

    @atomic
    def release(self):
        """Release what this task holds. RuntimeError if it does not hold this side."""
        lock, task = self._rwlock, current_task()
        if task not in lock._holders or lock._writing != self._writing:
            raise RuntimeError(f"{task!r} does not hold this side of the RWLock")
        del lock._holders[task]
        try:
            lock._admit()
        except BaseException:           # as in ParkingLot.unpark(); if anybody was let in, his release does the rest
            if not lock._holders:
                lock._holders[task] = None
            raise
        if not lock._holders:
            lock._writing = False


# ---- channels, select, Broadcast ------------------------------------------------------------------------------

_NOTHING = object()             # what a channel gives that has nothing to give


class Channel(_Unique):
    """Go's channel: items go from senders to receivers in order, each to exactly one.

    capacity: how many items it holds before send() waits; 0 hands each item from task to task; math.inf never waits.
    close() says that nothing more will come: receivers get what is left, then EndOfChannel, which ends `async for`.

    Atomic: each send and each receive, together with waking whom it concerns; close().
    """

    # A parked sender keeps its item in task._item; a parked receiver gets its item in task._value. At least one of the
    # lots is empty; the buffer is full while senders wait, and empty while receivers do.
    __slots__ = ("capacity", "_items", "_senders", "_receivers", "_closed")

    def __init__(self, capacity=0):
        if capacity != _INF and not _is_count(capacity, 0):
            raise ValueError(f"Channel({capacity!r}): the capacity must be an int from 0 up, or math.inf")
        self.capacity = capacity
        self._items = deque()
        self._senders = ParkingLot("send to a Channel")
        self._receivers = ParkingLot("receive from a Channel")
        self._closed = False

    async def send(self, item):
        """Hand over `item`, waiting for room. ClosedError if closed, now or meanwhile. Cancelled or failed: not sent."""
        task = _local.worker.task
        if task.budget > 0:             # the lines of checkpoint_if_due(), here and in receive() to save 70 ns of 350
            task.budget -= 1
        else:
            await checkpoint()
        if self._closed:
            del task
            raise ClosedError("send on a closed Channel")
        receivers = self._receivers._tasks
        if receivers:                   # unpark(), written out for the same reason
            for receiver in receivers:
                break
            del receivers[receiver]
            try:
                if receiver.__class__ is Task:
                    _reschedule(receiver, item)
                else:
                    receiver.commit(item)
            except BaseException as struck:
                if (receiver._state is PARKED if receiver.__class__ is Task
                        else struck.__class__ is RecursionError or receiver.waits()):
                    receivers[receiver] = None
                    for other in [*receivers][:-1]:
                        del receivers[other]
                        receivers[other] = None
                raise
        elif len(self._items) < self.capacity:
            self._items.append(item)
        else:
            task._item = item
            try:
                await self._senders.park()
            finally:
                task._item = None
                del task

    async def receive(self):
        """The next item, waiting for one. EndOfChannel when closed and empty. Cancelled: the item stays in the channel."""
        task = _local.worker.task
        if task.budget > 0:
            task.budget -= 1
        else:
            await checkpoint()
        del task
        if self._items or self._senders._tasks:
            return self._take()
        if self._closed:
            raise self._end()
        return await self._receivers.park()

    @_shared
    async def _shared_send(self, item):
        task = await checkpoint_if_due()
        try:
            if not self._put(item):
                task._item = item
                await park(self._park_sender)
        finally:
            task._item = None
            del task

    @_shared
    async def _shared_receive(self):
        await checkpoint_if_due()
        item = self._get()
        return await park(self._park_receiver) if item is _NOTHING else item

    @atomic
    def _put(self, item):
        """Whether it could be sent at once."""
        if self._closed:
            raise ClosedError("send on a closed Channel")
        if self._receivers._tasks:
            self._receivers.unpark(1, item)
        elif len(self._items) < self.capacity:
            self._items.append(item)
        else:
            return False
        return True

    @atomic
    def _get(self):
        """The next item, or _NOTHING."""
        if self._items or self._senders._tasks:
            return self._take()
        if self._closed:
            raise self._end()
        return _NOTHING

    def _park_sender(self, task):
        if self._put(task._item):           # there is room, or a receiver, since just now
            _reschedule(task)
        else:
            self._senders._park(task)

    def _park_receiver(self, task):
        item = self._get()
        if item is _NOTHING:
            self._receivers._park(task)
        else:
            _reschedule(task, item)

    def send_nowait(self, item):
        """Send at once or raise WouldBlock; ClosedError if it is closed."""
        if not self._put(item):
            raise WouldBlock(f"nobody receives and the Channel of capacity {self.capacity} is full")

    def receive_nowait(self):
        """The next item at once, or WouldBlock; EndOfChannel when it is closed and empty."""
        item = self._get()
        if item is _NOTHING:
            raise WouldBlock("the Channel is empty and nobody sends")
        return item

    def _can_send(self):
        return self._closed or self._receivers._tasks or len(self._items) < self.capacity

    def _can_receive(self):
        return self._closed or self._items or self._senders._tasks

    def _take(self):
        """The oldest item; the sender that has waited longest comes up behind."""
        items, senders = self._items, self._senders._tasks
        if senders:
            for sender in senders:              # unpark(), written out too
                break
            del senders[sender]
            item = sender._item                 # first this: a pinned one goes on at once, on its own worker
            try:
                if sender.__class__ is Task:
                    _reschedule(sender)
                else:
                    sender.commit(None)
            except BaseException as struck:
                if (sender._state is PARKED if sender.__class__ is Task
                        else struck.__class__ is RecursionError or sender.waits()):
                    senders[sender] = None
                    for other in [*senders][:-1]:
                        del senders[other]
                        senders[other] = None
                else:
                    items.append(item)
                raise
            items.append(item)
        return items.popleft()

    def _end(self):
        return EndOfChannel("the Channel is closed and all its items have been received", self)

    @atomic
    def close(self):
        """Nothing more will be sent. Parked senders get ClosedError, parked receivers EndOfChannel. Twice is once."""
        before, self._closed = self._closed, True   # first this: those on other workers go on at once
        try:                                # also the second time: the first may have been struck in the middle
            while self._receivers._tasks:   # each its own error: a traceback belongs to one task
                self._receivers.unpark(error=self._end())
            while self._senders._tasks:
                self._senders.unpark(error=ClosedError("the Channel was closed while this task waited to send"))
        except RecursionError:              # where the stack ends; it is not done
            self._closed = before
            raise

    @property
    def closed(self):
        """Whether close() was called."""
        return self._closed

    def __len__(self):
        return len(self._items)

    def __aiter__(self):
        return self

    async def __anext__(self):
        try:
            return await self.receive()
        except EndOfChannel:
            raise StopAsyncIteration from None

    def statistics(self):
        """{"capacity", "items", "senders_waiting", "receivers_waiting": numbers, "closed": bool}"""
        return {"capacity": self.capacity, "items": len(self._items), "senders_waiting": len(self._senders),
                "receivers_waiting": len(self._receivers), "closed": self._closed}

    def __repr__(self):
        return f"<Channel {len(self._items)}/{self.capacity}{' closed' if self._closed else ''}>"


class _Case:
    """One case of a select that waits; stands for its task in one lot of one channel."""

    __slots__ = ("task", "index", "_item", "lot", "siblings")

    def __init__(self, index, item, lot, siblings):
        self.task, self.index, self._item, self.lot, self.siblings = None, index, item, lot, siblings

    @staticmethod
    def withdraw(cases):
        for case in cases:
            case.lot._tasks.pop(case, None)

    def waits(self):
        return self.task._state is PARKED

    def commit(self, value, error=None):
        """This case it is: exactly one, for the others leave their lots before anybody else can find them."""
        siblings = self.siblings[:]         # the task clears them when it goes on: at once, on another worker
        try:
            _reschedule(self.task, (self.index, value), error)
            self.withdraw(siblings)
        except BaseException:               # a signal handler has struck, here or there
            if self.task._state is not PARKED:
                self.withdraw(siblings)
            raise


def _cases(cases):
    """[(channel, sends, item)]"""
    if not cases:
        raise ValueError("select() without cases would wait for ever: give a Channel to receive from, or (channel, item) "
                         "to send")
    parsed = []
    for case in cases:
        if isinstance(case, Channel):
            parsed.append((case, False, None))
        elif isinstance(case, tuple) and len(case) == 2 and isinstance(case[0], Channel):
            parsed.append((case[0], True, case[1]))
        else:
            raise TypeError(f"{case!r} is no case of a select: give a Channel to receive from, or (channel, item) to send")
    return parsed


@_guarded_function
def _select_now(parsed):
    """(index, value) of one of the cases that can go on at once, each as likely as the others; None if there is none."""
    ready = [index for index, (channel, sends, item) in enumerate(parsed)
             if (channel._can_send() if sends else channel._can_receive())]
    if not ready:
        return None
    index = ready[_local.worker.pick(len(ready))]
    channel, sends, item = parsed[index]
    return index, channel.send_nowait(item) if sends else channel.receive_nowait()


async def select(*cases):
    """Go's select: wait until one of several sends and receives can be done, do exactly that one.

    A case is a Channel (receive from it) or a tuple (channel, item) (send to it). Returns (index of the case, the item
    received or None). Among several that are ready the choice is random, reproducible in one run. A closed channel is
    ready: EndOfChannel (whose `channel` says which) or ClosedError is raised. Cancelled: none was done.
    """
    parsed = _cases(cases)
    await checkpoint_if_due()
    done = _select_now(parsed)
    if done is not None:
        return done
    waiting = []
    for index, (channel, sends, item) in enumerate(parsed):
        waiting.append(_Case(index, item, channel._senders if sends else channel._receivers, waiting))

    def abort(task):
        _Case.withdraw(waiting)
        return True

    def park_in_all(task):
        done = _select_now(parsed)          # since just now
        if done is not None:
            _reschedule(task, done)
            return
        task.park_reason = f"select of {len(waiting)} channel operations"
        task.abort_function = abort
        for case in waiting:
            case.task = task
            case.lot._tasks[case] = None

    try:
        return await park(park_in_all)
    finally:
        waiting.clear()                 # cases and their list form a circle


def select_nowait(*cases):
    """As select(), but WouldBlock when no case can be done at once (Go's default)."""
    done = _select_now(_cases(cases))
    if done is None:
        raise WouldBlock("none of the cases can be done without waiting")
    return done


class Broadcast(_Unique):
    """Every subscriber gets every item that is sent after it has subscribed.

    The last `capacity` items are kept, once for all. A subscriber that is more than that behind, by its own choice,
    blocks the senders (slow="block"), silently misses the oldest ("drop"), or is told how many it missed ("lag").

    Atomic: each send (all subscribers get the items in one order), subscribe(), close().
    """

    __slots__ = ("capacity", "_ring", "_sent", "_subscriptions", "_senders", "_closed")

    def __init__(self, capacity):
        if not _is_count(capacity, 1):
            raise ValueError(f"Broadcast({capacity!r}): the capacity must be an int from 1 up")
        self.capacity = capacity
        self._ring = [None] * capacity  # item number n lies at n % capacity
        self._sent = 0                  # the number of the next item
        self._subscriptions = {}        # a dict: ordered
        self._senders = ParkingLot("send to a Broadcast")
        self._closed = False

    @atomic
    def subscribe(self, slow="block"):
        """A Subscription to all that is sent from now on. Close it, or use it with `with`."""
        if slow not in ("block", "drop", "lag"):
            raise ValueError(f"subscribe(slow={slow!r}): give \"block\", \"drop\" or \"lag\"")
        if self._closed:
            raise ClosedError("subscribe to a closed Broadcast")
        subscription = Subscription(self, slow)
        self._subscriptions[subscription] = None
        return subscription

    def _has_room(self):
        return all(self._sent - subscription._next < self.capacity
                   for subscription in self._subscriptions if subscription.slow == "block")

    def _publish(self, item):
        self._ring[self._sent % self.capacity] = item
        self._sent += 1
        try:
            self._wake_all()
        except BaseException as struck:         # a signal handler's, or the stack ends; sent it is, and the loop wakes who waits
            _local.worker.inbox.append(self._wake_all)
            if struck.__class__ is not RecursionError:
                raise

    @atomic
    def _wake_all(self):
        for subscription in list(self._subscriptions):
            subscription._wake()

    async def send(self, item):
        """Send to all subscribers, waiting for those that block. ClosedError. Cancelled or failed: nobody got it."""
        task = await checkpoint_if_due()
        try:
            if not self._put(item):
                task._item = item
                await park(self._park_sender)
        finally:
            task._item = None
            del task

    @atomic
    def _put(self, item):
        """Whether it could be sent at once."""
        if self._closed:
            raise ClosedError("send on a closed Broadcast")
        if self._senders._tasks or not self._has_room():
            return False
        self._publish(item)
        return True

    def _park_sender(self, task):
        if self._put(task._item):           # there is room since just now
            _reschedule(task)
        else:
            self._senders._park(task)

    def send_nowait(self, item):
        """Send at once or raise WouldBlock; ClosedError if it is closed."""
        if not self._put(item):
            raise WouldBlock("a subscriber that blocks is behind by the whole capacity")

    def _let_senders_in(self):
        while self._senders._tasks and self._has_room():
            task = next(iter(self._senders._tasks))
            item = task._item
            try:
                try:
                    self._senders.unpark()
                finally:                        # also when a signal handler strikes, if it is woken by then
                    if task not in self._senders._tasks:        # _publish() written out: a call might be struck first
                        self._ring[self._sent % self.capacity] = item
                        self._sent += 1
                self._wake_all()
            except BaseException as struck:
                if task in self._senders._tasks:
                    raise
                _local.worker.inbox.append(self._wake_all)
                if struck.__class__ is not RecursionError:
                    raise

    @atomic
    def close(self):
        """Nothing more will be sent: subscribers get what is left, then EndOfChannel; parked senders ClosedError."""
        before, self._closed = self._closed, True   # as in Channel.close()
        try:
            while self._senders._tasks:
                self._senders.unpark(error=ClosedError("the Broadcast was closed while this task waited to send"))
            for subscription in list(self._subscriptions):
                while subscription._lot._tasks:
                    subscription._lot.unpark(error=subscription._end())
        except RecursionError:
            self._closed = before
            raise

    def statistics(self):
        """{"capacity", "sent", "subscribers", "senders_waiting": int, "closed": bool}"""
        return {"capacity": self.capacity, "sent": self._sent, "subscribers": len(self._subscriptions),
                "senders_waiting": len(self._senders), "closed": self._closed}


class Subscription(_Unique):
    """One subscriber of a Broadcast: `async for`, receive(), and close() or `with`. Made by Broadcast.subscribe().

    Atomic: each receive, together with letting senders in; close().
    """

    __slots__ = ("slow", "missed", "_broadcast", "_next", "_lot", "_closed")

    def __init__(self, broadcast, slow):
        self.slow = slow
        self.missed = 0                 # items, in all
        self._broadcast = broadcast
        self._next = broadcast._sent    # the number of the item to receive next
        self._lot = ParkingLot("receive from a Broadcast")
        self._closed = False

    @atomic
    def _wake(self):
        """Those who wait here have read all that was sent before."""
        broadcast = self._broadcast
        while self._lot._tasks and self._next < broadcast._sent:
            task = next(iter(self._lot._tasks))
            try:
                self._lot.unpark(1, broadcast._ring[self._next % broadcast.capacity])
            finally:                    # as in Broadcast
                if task not in self._lot._tasks:
                    self._next += 1

    def _end(self):
        return EndOfChannel("the Broadcast is closed and all its items have been received", self)

    def receive_nowait(self):
        """The next item at once, or WouldBlock; else as receive()."""
        item = self._get()
        if item is _NOTHING:
            raise WouldBlock("nothing new was sent")
        return item

    @atomic
    def _get(self):
        """The next item, or _NOTHING."""
        broadcast = self._broadcast
        if self._closed:
            raise ClosedError("receive on a closed Subscription")
        missed = broadcast._sent - broadcast.capacity - self._next
        if missed > 0:
            self._next += missed
            self.missed += missed
            if self.slow == "lag":
                raise Lagged(missed)
        if self._next < broadcast._sent:
            item = broadcast._ring[self._next % broadcast.capacity]
            self._next += 1
            try:
                broadcast._let_senders_in()
            except RecursionError:              # the caller's stack ends here: as if nothing had been done
                self._next -= 1
                raise
            return item
        if broadcast._closed:
            raise self._end()
        return _NOTHING

    async def receive(self):
        """The next item, waiting for one. EndOfChannel after the last, Lagged (slow="lag"), ClosedError.

        Cancelled: not received.
        """
        await checkpoint_if_due()
        item = self._get()
        return await park(self._park) if item is _NOTHING else item

    def _park(self, task):
        item = self._get()
        if item is _NOTHING:
            self._lot._park(task)
        else:
            _reschedule(task, item)          # it was sent since just now

    @atomic
    def close(self):
        """Unsubscribe: nobody waits for it any more; tasks that receive here get ClosedError."""
        before, self._closed = self._closed, True   # as in Channel.close()
        self._broadcast._subscriptions.pop(self, None)
        try:
            while self._lot._tasks:
                self._lot.unpark(error=ClosedError("the Subscription was closed while this task waited"))
            self._broadcast._let_senders_in()
        except RecursionError:          # where the stack ends; to be done again
            if not before:
                self._broadcast._subscriptions[self] = None
                self._closed = False
            raise

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()

    def __aiter__(self):
        return self

    async def __anext__(self):
        try:
            return await self.receive()
        except EndOfChannel:
            raise StopAsyncIteration from None

    def statistics(self):
        """{"behind", "missed", "tasks_waiting": int, "slow": str, "closed": bool}"""
        return {"behind": self._broadcast._sent - self._next, "missed": self.missed, "slow": self.slow,
                "closed": self._closed, **self._lot.statistics()}


# ---- Promise and combinations ---------------------------------------------------------------------------------

class Promise(_Unique):
    """A value that will be there later: set once, from any thread, awaited as often as you like by any task.

    `await promise` returns the value or raises the error. An error that nobody ever asks for is reported.

    Atomic: setting it, which exactly one of several threads can.
    """

    __slots__ = ("_unset", "_value", "_error", "_done", "_lot")

    def __init__(self):
        self._unset = [None]            # popped by who sets it: list.pop is atomic, so only one can
        self._value = self._error = None
        self._done = False
        self._lot = ParkingLot("wait for a Promise")

    def set_result(self, value):
        """Keep the promise. RuntimeError if it is kept or broken already."""
        self._settle(value, None)

    def set_exception(self, error):
        """Break it: `await` raises `error`. RuntimeError if it is kept or broken already; TypeError for a StopIteration."""
        if not isinstance(error, BaseException):
            raise TypeError(f"set_exception({error!r}): give an exception object")
        if isinstance(error, StopIteration):
            raise TypeError(f"set_exception({error!r}): Python takes a StopIteration for the end of the coroutine that awaits; "
                            "give another error, with this one as its cause")
        self._settle(None, _Failure(error, "a Promise was broken and nobody awaited it"))

    def _settle(self, value, failure):
        try:
            self._unset.pop()
        except IndexError:
            if failure is not None:
                failure.seen = True
            raise RuntimeError("this Promise is set already; it can be set once") from None
        self._value, self._error = value, failure
        self._done = True               # I5: first this, then look who waits; who comes later looks at this
        try:
            self._wake_all()
        except RecursionError:          # the caller's stack ends here: as if nothing had been done
            self._value, self._error, self._done = None, None, False
            if failure is not None:
                failure.seen = True
            self._unset += [None]
            raise
        except BaseException:           # a signal handler's: it cannot be set again, so those who are left are woken now
            self._wake_all()
            raise

    @atomic
    def _wake_all(self):
        for worker in {task._worker for task in list(self._lot._tasks)}:
            if worker is _local.worker:
                self._wake(worker)
            else:
                worker.post(functools.partial(self._wake, worker))

    @atomic
    def _wake(self, worker):
        for task in [task for task in self._lot._tasks if task._worker is worker]:
            if task._state == PARKED and task.abort_function == self._lot._abort:
                _reschedule(task)
            del self._lot._tasks[task]

    def done(self):
        """Whether it is set."""
        return self._done

    def _park(self, task):
        self._lot._park(task)
        if self._done:                  # set by another thread in between
            self._wake(task._worker)

    def __await__(self):
        yield from checkpoint_if_due().__await__()
        if not self._done:
            yield from park(self._park)
        if self._error is not None:
            raise self._error.take()
        return self._value

    def statistics(self):
        """{"done": bool, "tasks_waiting": int}"""
        return {"done": self._done, **self._lot.statistics()}


def _checked_coros(coros, caller):
    try:
        _local.worker.task              # RuntimeError outside a kernel
        seen = set()
        for coro in coros:
            _checked_coro(coro, caller)
            if id(coro) in seen or _is_started(coro):
                raise _started_already(coro)
            seen.add(id(coro))
    except (TypeError, RuntimeError):
        for coro in coros:
            if isinstance(coro, (Coroutine, types.GeneratorType)) and not _is_started(coro):
                coro.close()            # else each would complain that nobody awaited it
        raise


async def when_all(*coros):
    """Run the coroutines side by side; return their results in order. Errors leave as from a TaskGroup.

    TaskCancelled if one of them has cancelled its own task.
    """
    _checked_coros(coros, "when_all")
    async with TaskGroup() as group:
        tasks = [group.spawn(coro) for coro in coros]
    return [task.result() for task in tasks]


async def when_any(*coros):
    """Run the coroutines side by side; return (index, result) of the first to end. The others are cancelled and joined.

    If the first to end fails, or another one while it is cancelled, the errors leave as from a TaskGroup and there is no
    result. Results of others that end meanwhile are dropped. Cancelled: all are cancelled and joined; but if one had
    ended first, its result is returned and the next checkpoint raises. TaskCancelled if each has cancelled its own task.
    """
    _checked_coros(coros, "when_any")
    if not coros:
        raise ValueError("when_any() of nothing would wait for ever")
    first = []

    async def watch(index, coro):
        result = await coro
        first.append((index, result))
        group.cancel()

    try:
        async with TaskGroup() as group:
            for index, coro in enumerate(coros):
                group.spawn(watch(index, coro), name=getattr(coro, "__qualname__", None))
    except Cancelled:
        if not first:                   # else what was received is not lost (I3), and the next checkpoint raises
            raise
    if not first:
        raise TaskCancelled("each of the coroutines of when_any() has cancelled its own task")
    return first[0]


class as_completed(_Unique):
    """`async for task in as_completed(*coros):` gives the tasks as they end; ask each for its result().

    Leaving the loop early cancels the rest, once nobody holds this object (they are joined when main ends); being cancelled
    in it cancels and joins.

    Atomic: taking the next one, which no other loop over the same object gets.
    """

    __slots__ = ("_left", "_finished", "_lot", "__weakref__")

    def __init__(self, *coros):
        self._left = {}                 # task -> None
        self._finished = deque()
        _checked_coros(coros, "as_completed")
        self._lot = ParkingLot("wait for the next task to end", self._left)
        self._begin(coros)

    @atomic
    def _begin(self, coros):
        root = _local.worker.kernel.root
        for coro in coros:
            task = root.spawn(coro)
            self._left[task] = None
            task._joiners = ParkingLot("wait for a task", task)
            task._joiners._tasks[_Watch(self, task)] = None

    def __aiter__(self):
        return self

    def __repr__(self):
        return f"<as_completed: {len(self._left)} tasks run, {len(self._finished)} have ended>"

    async def __anext__(self):
        try:
            await checkpoint_if_due()
            while (task := self._next()) is None:
                await park(self._park)
        except BaseException:
            self._cancel()
            with _firm_shield():
                while self._left:
                    await park(self._park_until_the_last)
            raise
        return task

    @atomic
    def _next(self):
        """One that has ended, None if none has; StopAsyncIteration at the end."""
        if self._finished:
            return self._finished.popleft()
        if not self._left:
            raise StopAsyncIteration
        return None

    @atomic
    def _ended(self, task):
        del self._left[task]
        self._finished += (task,)       # no call: no signal handler strikes between
        try:
            self._lot.unpark(1 if self._left else _INF)     # several tasks may wait for the last one
        except BaseException as struck:         # or the stack ends; the loop has enough of it
            _local.worker.inbox.append(self._lot.unpark_all)
            if struck.__class__ is not RecursionError:
                raise

    def _park(self, task):
        if self._finished:
            _reschedule(task)
        else:
            self._park_until_the_last(task)

    def _park_until_the_last(self, task):
        if self._left:
            self._lot._park(task)
        else:
            _reschedule(task)

    @atomic
    def _cancel(self):
        for task in list(self._left):
            task.cancel()

    def __del__(self):
        if self._left:                  # the garbage collector calls, in any thread and between any two lines of the kernel
            left = list(self._left)
            left[0]._worker.post(lambda: [task.cancel() for task in left])


class _Watch:
    """Stands in the lot of those who await a task, for an as_completed."""

    __slots__ = ("_completed", "_task")

    def __init__(self, completed, task):
        self._completed, self._task = weakref.ref(completed), task

    def waits(self):
        completed = self._completed()
        return completed is not None and self._task in completed._left

    def commit(self, value, error=None):
        completed = self._completed()
        if completed is not None:
            completed._ended(self._task)


# ---- threads --------------------------------------------------------------------------------------------------

class _ThreadPool:
    """The threads of to_thread, for all kernels of the process: reused, last used first, ended when idle too long."""

    idle = []           # slots that wait for work; append, pop and remove are atomic
    threads = set()     # all slots; add and discard are atomic
    serial = itertools.count(1)

    def __init__(self, call):
        """One slot: a thread and what it is to do next."""
        self.call = call
        self.lock = threading.Lock()
        self.lock.acquire()

    @classmethod
    def start(cls, call):
        try:
            slot = cls.idle.pop()
        except IndexError:
            slot = cls(call)
            cls.threads.add(slot)
            # Daemons: a thread that hangs in somebody's code must not keep the interpreter from ending.
            thread = threading.Thread(target=slot.main, name=f"flowcoro thread {next(cls.serial)}", daemon=True)
            try:
                thread.start()
            finally:
                call.begun = thread.ident is not None   # also when a signal handler raises while start() waits for it
                if not call.begun:
                    cls.threads.discard(slot)
        else:
            slot.call, call.begun = call, True
            slot.lock.release()

    def main(self):
        call, offered, process = None, False, os.getpid()
        try:
            while True:
                call, self.call = self.call, None
                call.work()
                if os.getpid() != process:      # the child of a fork, which has but this thread and no kernel
                    report_error(call.error or RuntimeError("the child has nobody to return to: it may exec or os._exit()"),
                                 "this process was forked in a function of to_thread(), and the function has come to its end")
                    os._exit(1)
                offered = True
                self.idle.append(self)  # before the result is out: who calls next finds it
                done, call = call, None
                done.done()
                done = None             # it holds the result
                if not self.lock.acquire(timeout=THREAD_IDLE_SECONDS):
                    try:
                        self.idle.remove(self)
                    except ValueError:  # taken this very moment
                        self.lock.acquire()
                    else:
                        offered = False
                        return
                offered = False
        finally:                        # also when somebody kills the thread (PyThreadState_SetAsyncExc)
            self.threads.discard(self)
            if offered:
                self._withdraw()
            for lost in {call, self.call} - {None}:
                lost.error = lost.error or RuntimeError("the thread of a to_thread call died")
                lost.done()

    def _withdraw(self):
        """The thread dies while it is on offer. If somebody has taken it already, wait for what it was to do."""
        try:
            self.idle.remove(self)
        except ValueError:
            if self.call is None:       # else it has been told already
                self.lock.acquire(timeout=1)    # the taker is between two lines of start(), or has died there


class _ThreadCall:
    """One call of to_thread: made in the kernel's thread, worked in another, finished in the kernel's."""

    __slots__ = ("function", "context", "limiter", "abandon", "begun", "finished", "cancelled", "holder", "task", "worker",
                 "value", "error")

    def __init__(self, function, limiter, abandon):
        self.begun = False              # a thread has it, and finish() will come
        self.finished = False
        self.cancelled = False          # its task was, and waits all the same
        self.holder = {}                # the tasks that the function waits for in run_from_thread()
        self.function, self.limiter, self.abandon = function, limiter, abandon
        self.context = contextvars.copy_context()
        self.task = self.worker = self.value = self.error = None

    def park(self, task):
        task.park_reason = "wait for a thread"
        task.abort_function = self.abort
        self.task, self.worker = task, task._worker
        try:
            _ThreadPool.start(self)
        finally:
            self.worker.thread_calls += self.begun

    def let_go(self):
        """The task waits no longer, but a thread has the call."""
        self.task = None
        self.worker.abandoned.add(self)

    def abort(self, task):
        if self.abandon:
            self.let_go()
        else:
            self.cancelled = True
            for child in list(self.holder):
                child.cancel()
        return self.abandon

    def work(self):
        _local.caller = self
        try:
            self.value = self.context.run(self.function)
        except BaseException as error:
            self.error = error
        self.function = self.context = _local.caller = None

    def done(self):
        if not self.finished:
            self.worker.post(self.finish)

    @atomic
    def finish(self):
        worker = self.worker            # which stays: an abandoned function may still ask for its kernel
        if self.finished:               # a thread that was killed says it twice
            return
        worker.abandoned.discard(self)
        if self.task is not None and self.task._state == PARKED and self.task.abort_function == self.abort:
            error = self.error
            if isinstance(error, StopIteration):        # it would look like the end of the coroutine
                error = RuntimeError("the function called by to_thread raised StopIteration")
                error.__cause__ = self.error
            _reschedule(self.task, self.value, error)
        self.value = self.error = self.task = None      # the thread may hold on to this call for a moment
        worker.thread_calls -= 1
        self.finished = True
        try:
            self.limiter.release()
        except ValueError as error:
            report_error(error, "the limiter of a to_thread call was released too often", object=self.limiter)


def _checked_function(function, caller, remedy="a coroutine goes to spawn(), or from a thread to run_from_thread()"):
    if not callable(function) or getattr(getattr(function, "__code__", None), "co_flags", 0) & 0x80:      # CO_COROUTINE
        raise TypeError(f"{caller}() takes a plain function, not called yet, got {function!r}; {remedy}")
    return function


async def to_thread(function, /, *args, abandon_on_cancel=False, limiter=None):
    """Call function(*args) in a thread and wait for it; return its result or raise its error. Context variables follow.

    At most 40 at once, or as many as `limiter` (a Semaphore) allows; the others wait. A thread cannot be interrupted:
    when cancelled, this waits for the function all the same and returns its result (the next checkpoint raises), or
    with abandon_on_cancel=True raises at once and drops the result, or the error; so does a second Ctrl-C. What the
    function waits for in run_from_thread() is cancelled too, unless it is abandoned. When the run ends, permits of
    abandoned calls go back.
    RuntimeError when no thread can be started or it was killed. (functools.partial gives keyword arguments.) A child that the
    function forks ends with status 1 when the function returns there: it may exec or os._exit().
    """
    _checked_function(function, "to_thread")
    if limiter is None:
        limiter = _local.worker.kernel.limiter
    elif not isinstance(limiter, Semaphore):
        raise TypeError(f"to_thread(limiter=) takes a Semaphore, whose permits any task may give back, got {limiter!r}")
    await limiter.acquire()
    call = _ThreadCall(functools.partial(function, *args), limiter, abandon_on_cancel)
    try:
        return await park(call.park)
    except BaseException:
        if not call.begun:              # cancelled before, or no thread to be had: nobody else gives the permit back
            limiter.release()
        elif not call.finished:
            call.let_go()
        raise


class _CallFromThread:
    """A call that another thread waits for; stands in the worker's inbox."""

    def __init__(self, function):
        self.function = function
        self.context = contextvars.copy_context()
        self.value = self.error = None
        self.answered = False
        self.overdue = False            # its thread has given up
        self.lock = threading.Lock()    # held until there is an answer
        self.lock.acquire()

    def __call__(self):
        if not self.answered:           # else made before, and struck while it told so
            try:
                self.value = self.context.run(self.function)
            except BaseException as error:
                self.error = error
            self.answered = True
        if self.error is None:
            self.answer(self.value)
        else:
            self.fail(self.error)

    def answer(self, value, error=None):
        self.value, self.error, self.answered = value, error, True
        if self.lock.locked():
            self.lock.release()         # first this, then see who is there; _ask() does it the other way round

    def fail(self, error):
        self.answer(None, error)
        if self.overdue:
            report_error(error, "a call from a thread failed after the thread had stopped waiting", object=self.function)

    def refuse(self):
        """It will never be made."""
        self.answer(None, RuntimeError("the kernel has ended"))


class _RunFromThread(_CallFromThread):
    """The same for a coroutine: the answer comes from the task that runs it."""

    def __init__(self, coro):
        super().__init__(coro)
        self.caller = _local.caller     # whose cancellation this task shares

    def __call__(self):
        root, caller = _local.worker.kernel.root, self.caller
        try:
            task = self.context.run(root.spawn, self.relay(), name=getattr(self.function, "__qualname__", None))
        except Exception as error:      # too many were spawned, or a __qualname__ is no str
            self.function.close()
            self.fail(error)
            return
        if caller is not None and caller.worker.kernel is _local.worker.kernel:     # else another one was named, or has ended
            caller.holder[task] = None
            if caller.cancelled:
                task.cancel()

    async def relay(self):
        caller = self.caller
        try:
            self.answer(await self.function)
        except Cancelled:
            if caller is not None and caller.cancelled:
                self.answer(None, Cancelled())      # goes up through the function, and on in the task that called it
            else:
                self.answer(None, TaskCancelled("the task was cancelled; perhaps the run has ended"))
            raise
        except BaseException as error:
            self.fail(error)
        finally:
            if caller is not None:
                caller.holder.pop(current_task(), None)

    def refuse(self):
        self.function.close()           # else it would complain that nobody awaited it
        super().refuse()


def current_kernel():
    """A handle of the kernel that runs here, for call_from_thread() and run_from_thread() in other threads.

    RuntimeError outside a kernel.
    """
    return _local.worker.kernel


def _ask(call, kernel, timeout):
    """Put `call` into the inbox of `kernel` and wait for the answer."""
    try:
        if timeout is not None:
            timeout = min(_checked_seconds(timeout, "timeout="), threading.TIMEOUT_MAX)
        worker = _kernel_to_ask(kernel).worker
    except (RuntimeError, TypeError, ValueError):
        call.refuse()
        raise
    if not worker.post(call):
        call.refuse()
    if not call.lock.acquire(timeout=-1 if timeout is None else timeout):
        call.overdue = True
        if not call.lock.acquire(blocking=False):       # else the answer has come this very moment
            raise TimeoutError(f"the kernel did not answer within {timeout:g} s; it may still do what it was asked")
    if call.error is not None:
        try:
            raise call.error
        finally:
            del call                    # no circle through the traceback
    return call.value


def _kernel_to_ask(kernel):
    if _local.worker is not _OUTSIDE:
        raise RuntimeError("this is the kernel's own thread, which would wait for itself: call or await directly")
    if kernel is not None:
        if not isinstance(kernel, _Kernel):
            raise TypeError(f"kernel= takes a handle that current_kernel() gives, got {kernel!r}")
        return kernel
    if _local.caller is not None:
        return _local.caller.worker.kernel
    running = list(_kernels)
    if len(running) != 1:
        raise RuntimeError(f"{len(running)} kernels run in this process: pass kernel=, a handle that current_kernel() gives")
    return running[0]


def call_from_thread(function, /, *args, kernel=None, timeout=None):
    """From another thread: have the kernel's thread call function(*args); wait, return its result, raise its error.

    The function must not block; it is no task, so it can hold no lock and enter no scope. With several workers any of
    their threads may call it: what needs that of main belongs into a task with pinned=True. In threads of to_thread the
    kernel is known; elsewhere it is the only one that runs, or `kernel`. RuntimeError when it has ended, or in the kernel's
    own thread; TypeError for an async function. timeout: seconds to wait (TimeoutError), from 0 up (ValueError).
    """
    call = functools.partial(_checked_function(function, "call_from_thread"), *args)
    return _ask(_CallFromThread(call), kernel, timeout)


def run_from_thread(coro, *, kernel=None, timeout=None):
    """From another thread: run the coroutine as a task of the kernel; wait, return its result, raise its error.

    Otherwise as call_from_thread(). TaskCancelled when the task was cancelled, as it is when the run ends meanwhile. In
    a function of to_thread the coroutine is cancelled together with the task that awaits the function, and then this
    raises Cancelled, which that task gets if the function lets it pass.
    """
    return _ask(_RunFromThread(_checked_coro(coro, "run_from_thread")), kernel, timeout)


# ---- pools ----------------------------------------------------------------------------------------------------

class ObjectPool(_Unique):
    """Keeps up to `capacity` used objects for reuse. When it is empty, acquire() makes a fresh one and never waits.

    factory() makes an object; reset(object) cleans one as it is returned (if it fails, the object is dropped and the
    error raised). Neither may block: other workers wait meanwhile. debug=True finds objects returned twice or to the
    wrong pool (PoolError) and used after their return (ReferenceError): what acquire() then gives is a weak proxy
    that dies on return, and nothing is reused. Objects of types without weak references (list, dict) are given as
    they are, and only their returns are checked.

    Atomic: acquire(), with factory(), and release(), with reset().
    """

    def __init__(self, factory, capacity, *, reset=None, debug=False):
        if not callable(factory):
            raise TypeError(f"ObjectPool({factory!r}): give a function that makes an object")
        if reset is not None and not callable(reset):
            raise TypeError(f"ObjectPool(reset={reset!r}): give a function that cleans an object, or None")
        if not _is_count(capacity, 0):
            raise ValueError(f"capacity={capacity!r}: give how many objects are kept at most, an int from 0 up")
        self.capacity = capacity
        self._factory, self._reset = factory, reset
        self._lent = {} if debug else None      # id of what was given -> (what was given, the object)
        self._free = []
        self._made = self._reused = self._returned = self._dropped = 0

    @atomic
    def acquire(self):
        """An object, used before or fresh. Give it back with release(), or use `with pool.borrow() as object:`."""
        if self._free:
            thing = self._free.pop()
            self._reused += 1
        else:
            thing = self._factory()
            self._made += 1
        if self._lent is not None:
            given = self._proxy(thing)
            self._lent[id(given)] = given, thing
            return given
        return thing

    @atomic
    def release(self, thing):
        """Take it back, or drop it if `capacity` are kept."""
        if self._lent is not None:
            if id(thing) not in self._lent:
                raise PoolError(f"an object of type {type(thing).__name__} was returned twice, or was not borrowed from this "
                                "pool")
            _, thing = self._lent.pop(id(thing))
        self._returned += 1
        self._dropped += 1                      # unless it is kept
        if self._reset is not None:
            self._reset(thing)
        if len(self._free) < self.capacity and self._lent is None:
            self._free.append(thing)
            self._dropped -= 1

    def _proxy(self, thing):
        try:
            return weakref.proxy(thing)
        except TypeError:
            return thing

    def borrow(self):
        """`with` or `async with pool.borrow() as object:` gives it back at the end of the block, however that ends."""
        return _Borrowed(self)

    def statistics(self):
        """{"capacity", "free", "in_use", "made", "reused", "dropped": int}"""
        return {"capacity": self.capacity, "free": len(self._free), "in_use": self._made + self._reused - self._returned,
                "made": self._made, "reused": self._reused, "dropped": self._dropped}


class BufferPool(ObjectPool):
    """An ObjectPool of bytearrays of `size` bytes, which come back with what was in them. Do not resize them (ValueError).

    With debug=True they are given as memoryviews, whose use after the return is a ValueError (slices are not watched).

    Atomic: acquire() and release().
    """

    def __init__(self, size, capacity, *, debug=False):
        if not _is_count(size, 1):
            raise ValueError(f"BufferPool({size!r}): the size must be an int from 1 up, in bytes")
        super().__init__(lambda: bytearray(size), capacity, debug=debug)
        self.size = size

    def release(self, thing):
        """Take a buffer back. ValueError if it is of another kind or size; with debug=True PoolError, as ObjectPool."""
        if self._lent is None and not (isinstance(thing, bytearray) and len(thing) == self.size):
            size = f" of {len(thing)} bytes" if isinstance(thing, (bytes, bytearray, memoryview)) else ""
            raise ValueError(f"{_a(type(thing).__name__)}{size} is returned to a pool of bytearrays of "
                             f"{self.size}: do not resize them")
        super().release(thing)
        if self._lent is not None:
            thing.release()

    def _proxy(self, thing):
        return memoryview(thing)


class _Borrowed:
    __slots__ = ("_pool", "_thing", "_entered")

    def __init__(self, pool):
        self._pool, self._entered = pool, False

    def __enter__(self):
        if self._entered:
            raise RuntimeError("a borrow() serves one `with`; call it again for another object")
        self._entered = True
        self._thing = self._pool.acquire()
        return self._thing

    def __exit__(self, kind, error, trace):
        thing, self._thing = self._thing, None
        self._pool.release(thing)

    async def __aenter__(self):
        return self.__enter__()

    async def __aexit__(self, kind, error, trace):
        self.__exit__(kind, error, trace)


# ---- diagnostics ----------------------------------------------------------------------------------------------

def dump_tasks():
    """The tree of tasks as text: each with its state, what it waits for and for whom, and the awaits down to there.

    RuntimeError outside a kernel.
    """
    return _dump(_local.worker.kernel)


@_guarded_function
def _statistics(kernel):
    def total(name):
        return sum(getattr(worker, name) for worker in kernel.workers)

    numbers = {"tasks": {"alive": kernel.alive(), "ready": sum(len(worker.ready) for worker in kernel.workers),
                         "spawned": total("spawned"), "finished": total("finished")},
               "steps": total("steps"), "polls": total("polls"),
               "timers": sum(worker.timers.entries for worker in kernel.workers), "descriptors": total("descriptors"),
               "io_waiting": total("io_parked"), "thread_calls": total("thread_calls"),
               "threads": len(_ThreadPool.threads),
               "workers": {"count": len(kernel.workers), "asleep": sum(worker.sleeping for worker in kernel.workers),
                           "stolen": total("stolen")}}
    if kernel.watchdog is not None:
        meters = [worker.meter for worker in kernel.workers]
        numbers["step_seconds"] = _Histogram.together([meter.step_times for meter in meters])
        numbers["latency_seconds"] = _Histogram.together([meter.latencies for meter in meters])
    return numbers


def statistics():
    """Numbers of the kernel that runs here, of all its workers together, as a dict.

    tasks: alive, ready, spawned, finished · steps: made so far (up to date between batches) · polls · timers: entries
    in the heap, stale ones included · descriptors · io_waiting: tasks parked on them · thread_calls: of to_thread under
    way, abandoned ones too · threads: of to_thread, in the whole process · workers: their count, how many of them are asleep,
    and how many tasks they have stolen so far. RuntimeError outside a kernel.

    With run(watchdog=) also step_seconds, of steps, and latency_seconds, which a task that had just become ready waited for
    its step: {"count", "sum", "max", "below": {seconds: how many were shorter, but not shorter than half of that}}. They are
    samples, a hundred a second at most; but whenever up to 60 steps take 10 ms or more, they are counted as one long step.
    """
    return _statistics(_local.worker.kernel)


def runtime_info():
    """What runs here, as a dict: versions, the interpreter and whether it has a GIL, the selector, the clock."""
    worker = _local.worker
    inside = worker is not _OUTSIDE
    return {"flowcoro": __version__, "python": sys.version.split()[0], "implementation": sys.implementation.name,
            "gil": _has_gil(), "platform": sys.platform, "workers": len(worker.kernel.workers) if inside else 0,
            "selector": (type(worker.poller).__name__.strip("_") if inside else None),
            "clock": type(worker.clock).__name__ if inside and worker.clock is not None else "time.monotonic",
            "seed": worker.kernel.seed if inside else None}


def add_hooks(hooks):
    """Call the methods of `hooks` as things happen in this kernel; it may have any of these:

    task_spawned(task), task_parked(task, reason), task_rescheduled(task), task_stolen(task, victim), task_done(task),
    task_stuck(task, seconds, report) (run(watchdog=): it has held its worker so long, the report says what waits; task is None
    if what holds it is none; called in a thread of the watchdog, and so at any moment, beside other hooks and all tasks),
    before_poll(timeout) (nothing is ready and the kernel will wait so many seconds, None: without limit; what it
    reschedules is run first), after_poll(events) (their number). They must not block; their errors are reported.
    TypeError if it has none of them, RuntimeError outside a kernel. No task runs in them (current_task() raises), but for
    the task_… that a task itself causes. With several workers all but task_stuck are called in the thread of any, one at a
    time, and all operations of tasks wait meanwhile: a hook must not take a lock that somebody may hold who calls this module.
    """
    kernel = _local.worker.kernel
    found = [(name, getattr(hooks, name)) for name in _HOOKS if hasattr(hooks, name)]
    if not found:
        raise TypeError(f"add_hooks({hooks!r}): it has none of the methods {', '.join(_HOOKS)}")
    kernel.set_hooks(lambda old: {**old, **{name: [*old.get(name, ()), (hooks, call)] for name, call in found}})


def remove_hooks(hooks):
    """The opposite of add_hooks(). Harmless when they were not added. RuntimeError outside a kernel."""
    def without(old):
        left = {name: [(source, call) for source, call in calls if source is not hooks] for name, calls in old.items()}
        return {name: calls for name, calls in left.items() if calls}

    _local.worker.kernel.set_hooks(without)


# ---- command line ---------------------------------------------------------------------------------------------

if __name__ == "__main__":
    import importlib
    _prefix = f"{__package__}." if __package__ else ""
    try:
        _cli = importlib.import_module(f"{_prefix}flowcoro_cli")
    except ModuleNotFoundError as _error:
        if _error.name != f"{_prefix}flowcoro_cli":
            raise
        print("python -m flowcoro needs flowcoro_cli.py beside flowcoro.py: copy that file too", file=sys.stderr)
        sys.exit(2)
    sys.exit(_cli.main())
