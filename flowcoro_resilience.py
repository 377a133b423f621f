"""flowcoro_resilience 0.1.0: circuit breakers, rate and concurrency limits, retries, hedges, caches: correct under concurrency.

To vendor, copy: flowcoro.py, flowcoro_resilience.py

Example:

    import flowcoro
    from flowcoro_resilience import CircuitBreaker, Pipeline, Retry, Timeout

    policy = Pipeline(Timeout(5.0), Retry(attempts=3, idempotent=True), CircuitBreaker(window=20, minimum_calls=5))

    async def ask(question):
        await flowcoro.sleep(0.01)
        return f"{question}? Yes."

    async def main():
        print(await policy.try_execute(ask, "Is anybody there"))

    flowcoro.run(main())

Contents: constants · errors · policies · windows · breakers · circuit breaker · adaptive breaker · rate limits ·
concurrency limits · retry · hedge · timeout and fallback · cache · keyed · pipeline

How it works:

A *policy* stands between who calls and what is called. `await policy.try_execute(operation, …)` calls it once, several times, or
not at all: then it raises a Rejected, which knows after how many seconds it is worth while to ask again.

Each policy is two things. The *decision* is a function of (state, event, now): may this call go through, what does that result
mean. It reads no clock, waits for nothing and calls nobody; chance is an argument too. Tests compare it with a naive model,
event by event. The *front* is thin: it reads the clock, decides, awaits the operation, and decides what its end means.

Operations run while no decision is under way and no lock is held, so any number run at a time, and a policy may be used from
within itself. A decision is one step for everybody: a lock of the policy's own (P1), or an atomic step of the kernel where tasks
are parked.

    P1  a decision is made under the policy's lock, reads the clock there, and calls nothing that is not its own: no predicate,
        no listener, no operation. So with several workers, and from threads, decisions come one after the other
    P2  what a call was permitted is given back exactly once, however the call ends: a result, an error, Cancelled, or anything
        else that is raised; a call that was cancelled says nothing about what was called, and is not counted
    P3  what a call brings is told together with the state in which it began; a state that is over does not hear of it
    P4  time does not run backwards for a policy: where its clock does, it stands still until the clock goes on from there
    P5  predicates and listeners are yours: an error of theirs is reported to sys.unraisablehook, and changes no decision

What is called may say more about itself, in attributes that policies read: `key` (what it goes to; Keyed has one policy for
each), `idempotent` (whether it does no harm to do it twice; Retry and Hedge) and `discard` (a function, async or not, that is
given a result which nobody will get: of an attempt that is made again, of a hedge that came second). What comes back, result or
error, may have `retry_after`, seconds, and `sent`, False if nothing was sent, so that it cannot have had an effect.

Errors:

    FlowCoroError
      Rejected              a policy did not let it run; `retry_after`: seconds, None if nobody knows
        BreakerOpen         a circuit breaker is open, or probes
        RateLimited         too many in this time
        LimitExceeded       too many at a time, and in the queue

Sources: Nygard, "Release It!" (the breaker); resilience4j (its names and defaults); Beyer et al., "Site Reliability Engineering",
chapters 21 and 22 (client throttling, retry budgets); Brooker, "Exponential Backoff And Jitter" (AWS, 2015); ITU-T I.371 (GCRA);
Netflix concurrency-limits (Gradient2); Dean and Barroso, "The Tail at Scale" (hedging); RFC 5861 (stale-while-revalidate).

What it does not do: limits that several processes or machines share, persistence (a breaker's state can be saved and loaded).

SPDX-License-Identifier: MIT
"""

import collections
import functools
import inspect
import math
import random
import threading
import types
import typing

import flowcoro

__version__ = "0.1.0"

__all__ = ["Policy", "PolicyEvent", "CountWindow", "TimeWindow", "Keyed", "Pipeline", "Rejected", "BreakerOpen", "RateLimited",
           "LimitExceeded",
           "CircuitBreaker", "BreakerPermit"]

# ---- constants ------------------------------------------------------------------------------------------------

# Keys that a Keyed, or whatever else has a state for each key, remembers at most: some 10 MB of plain states.
MAX_KEYS = 100_000


# ---- errors ---------------------------------------------------------------------------------------------------

class Rejected(flowcoro.FlowCoroError):
    """A policy did not let an operation run: nothing has been called. `policy`: which; `retry_after`: seconds after which it may
    be worth while to ask again, None if nobody knows."""

    sent = False            # as errors of operations say it: it cannot have had an effect

    def __init__(self, message, policy=None, retry_after=None):
        super().__init__(message)
        self.policy, self.retry_after = policy, retry_after


class BreakerOpen(Rejected):
    """A circuit breaker is open, or lets probes through and has as many as it wants."""


class RateLimited(Rejected):
    """It would be more than the rate allows."""


class LimitExceeded(Rejected):
    """As many run at a time as may, and no place is free in the queue, or none became free in time."""


# ---- policies -------------------------------------------------------------------------------------------------

class PolicyEvent(typing.NamedTuple):
    """What listeners are given.

    policy: who says it, with its `name`; kind: what has happened, a text of a few that each policy lists; key: of what, or None;
    details: a dict, the same names for each kind. Metrics count by (policy.name, kind).
    """

    policy: object
    kind: str
    key: object = None
    details: dict = {}


def _is_awaitable(result):
    """Whether `await` takes it: what async functions return, and the generators of flowcoro.coroutine, such as sleep()."""
    return hasattr(result, "__await__") or (
        result.__class__ is types.GeneratorType and result.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE != 0)


async def _invoke(operation, args, kwargs):
    """What an operation brings, async or not."""
    result = operation(*args, **kwargs)
    return await result if _is_awaitable(result) else result


class _Call(typing.NamedTuple):
    """What the policies of one call are told of it."""

    key: object
    idempotent: bool
    discard: object             # or None

    async def drop(self, result, policy):
        """Let go of a result that nobody will get. Its own task is not cancelled meanwhile; an error is reported."""
        if self.discard is not None:
            with flowcoro.CancelScope(shield=True):
                try:
                    await _invoke(self.discard, (result,), {})
                except Exception as error:
                    flowcoro.report_error(error, f"a result that {policy.name!r} does not need could not be let go of",
                                          "flowcoro_resilience")


def _call_of(operation):
    return _Call(getattr(operation, "key", None), bool(getattr(operation, "idempotent", False)),
                 getattr(operation, "discard", None))


def _checked_operation(operation, whose):
    """TypeError if it cannot be called."""
    if not callable(operation):
        if inspect.iscoroutine(operation):
            operation.close()           # else it would warn that it was never awaited
            raise TypeError(f"{whose} got a coroutine object: give the function, and its arguments after it, since it may be "
                            "called later, several times, or not at all")
        raise TypeError(f"{whose} got {operation!r:.80}: give a function, async or not, and its arguments after it")


class Policy:
    """What all policies have. `name` is for messages, statistics and metrics."""

    def __init__(self, name=None):
        self.name = type(self).__name__ if name is None else name
        self._listeners = ()
        # A lock of its own, and not the kernel's guard, so that plain functions in threads may use it too; one that can be taken
        # again, since a signal handler may strike within a decision and come here. 45 ns for each decision.
        self._lock = threading.RLock()

    async def try_execute(self, operation, /, *args, **kwargs):
        """What operation(*args, **kwargs) brings; it may be async or not.

        Raises what it raises, Rejected if the policy does not let it run, and TypeError for a coroutine object. Cancelled: the
        operation is, and what the policy has given it is taken back.
        """
        _checked_operation(operation, f"{self.name}.try_execute()")
        return await self._run(_call_of(operation), functools.partial(_invoke, operation, args, kwargs))

    async def _run(self, call, proceed):
        """What `proceed()` brings, which is awaited as often as the policy wants: the operation, and the policies within."""
        raise NotImplementedError

    def __call__(self, function):
        """A decorator of an async function: its calls go through try_execute()."""
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"@{self.name} decorates async functions, got {function!r:.80}")

        @functools.wraps(function)
        async def decorated(*args, **kwargs):
            return await self.try_execute(function, *args, **kwargs)

        return decorated

    def add_listener(self, listener):
        """listener(event): a plain function, called with each PolicyEvent, in the task or thread that has caused it. Its error is
        reported, and changes nothing. Returns it, so that it may be a decorator."""
        if not callable(listener):
            raise TypeError(f"{self.name}.add_listener({listener!r:.80}): give a function of a PolicyEvent")
        self._listeners = (*self._listeners, listener)
        return listener

    def remove_listener(self, listener):
        """ValueError if it is none."""
        listeners = list(self._listeners)
        if listener not in listeners:
            raise ValueError(f"{self.name}.remove_listener({listener!r:.80}): it was not added, or has been removed")
        listeners.remove(listener)
        self._listeners = tuple(listeners)

    def _tell(self, kind, key=None, **details):
        """Call the listeners: not under the lock (P1)."""
        event = PolicyEvent(self, kind, key, details)
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:
                flowcoro.report_error(error, f"a listener of {self.name!r} failed at {kind!r}", "flowcoro_resilience")

    def statistics(self):
        """A dict of numbers and texts."""
        return {"name": self.name}


def _number(value, least, most, said, unit, *, exclusive=False):
    """`value` as a float, if it is a number from `least` to `most`. said: the argument, "Retry(first=…"."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{said}{value!r:.80}): give a number of {unit}")
    if not (least < value if exclusive else least <= value) or not value <= most:
        above = "more than" if exclusive else "from"
        limit = "up" if most == math.inf else f"to {most:g}"
        raise ValueError(f"{said}{value!r:.80}): give a number of {unit} {above} {least:g} {limit}")
    return float(value)


def _count(value, least, said, unit):
    """`value`, if it is an int from `least` up."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{said}{value!r:.80}): give a number of {unit}, an int")
    if value < least:
        raise ValueError(f"{said}{value!r:.80}): give a number of {unit}, from {least} up")
    return value


def _test(what, said, policy, broken=False):
    """A function that says whether an error, or a result, is meant: by a type, a tuple of them, or a predicate. None: none is.

    A predicate that raises means `broken`, and is reported (P5).
    """
    if what is None:
        return lambda outcome: False
    if isinstance(what, type) or isinstance(what, tuple) and what and all(isinstance(one, type) for one in what):
        return lambda outcome: isinstance(outcome, what)
    if not callable(what):
        raise TypeError(f"{said}{what!r:.80}): give an exception type, a tuple of them, a predicate, or None")

    def predicate(outcome):
        try:
            return bool(what(outcome))
        except Exception as error:
            flowcoro.report_error(error, f"the predicate {said}…) of {policy.name!r} failed, which means "
                                  f"{'yes' if broken else 'no'}", "flowcoro_resilience")
            return broken

    return predicate


# ---- windows --------------------------------------------------------------------------------------------------
# What happened lately, in O(1) for each call and bounded memory. Several counters at a time: a call adds to each of them.

class CountWindow:
    """Sums of the last `size` calls, in a ring: add(counts) takes the oldest out.

    totals: a list, one sum for each of `counters`; `calls`: how many calls are in it.
    """

    __slots__ = ("size", "calls", "totals", "_ring", "_place")

    def __init__(self, size, counters=1):
        self.size = _count(size, 1, "CountWindow(size=", "calls")
        self.totals = [0] * counters
        self.calls = self._place = 0
        self._ring = [None] * size

    def add(self, counts, now=None):
        """counts: a tuple with one number for each counter. now: as TimeWindow has it; unused."""
        ring, place = self._ring, self._place
        oldest = ring[place]
        self._place = place + 1 if place + 1 < self.size else 0
        if oldest is counts:            # as nearly always, if all is well: half of what it takes otherwise
            return
        ring[place] = counts
        totals = self.totals
        if oldest is None:
            self.calls += 1
            for place, count in enumerate(counts):
                totals[place] += count
        elif oldest != counts:
            for place, count in enumerate(counts):
                totals[place] += count - oldest[place]

    def advance(self, now):
        """Nothing: calls do not grow old here."""

    def contents(self):
        """A list of what was added and has not been taken out, the oldest first."""
        return [counts for counts in self._ring[self._place:] + self._ring[:self._place] if counts is not None]

    def clear(self):
        """Forget all."""
        self.__init__(self.size, len(self.totals))


class TimeWindow:
    """Sums over the last `seconds`, in `buckets` of equal length: the oldest bucket goes as a whole, so what is summed is
    between seconds · (buckets - 1) / buckets and `seconds` old. add() and advance() cost O(1), after a pause O(buckets).

    totals, calls: as CountWindow's, as of the last add() or advance(). A `now` before the last one is taken for the last one.
    """

    __slots__ = ("seconds", "calls", "totals", "_buckets", "_length", "_epoch", "_bucket", "_end")

    def __init__(self, seconds, buckets=10, counters=1):
        self.seconds = _number(seconds, 0, math.inf, "TimeWindow(seconds=", "seconds", exclusive=True)
        self._length = self.seconds / _count(buckets, 1, "TimeWindow(buckets=", "buckets")
        self.totals = [0] * counters
        self.calls = 0
        self._buckets = [[0] * (counters + 1) for _ in range(buckets)]      # the sums, and the number of calls last
        self._epoch = None              # the number of the bucket that `now` is in, counted from the clock's zero
        self._bucket, self._end = None, -math.inf       # that one, and when it ends: saves the most of add() two divisions

    def advance(self, now):
        """Let what is too old go."""
        if now < self._end:
            return
        epoch = now // self._length
        if self._epoch is None:
            self._epoch = epoch
        buckets, totals, size = self._buckets, self.totals, len(self._buckets)
        for step in range(1, int(min(epoch - self._epoch, size)) + 1):
            bucket = buckets[int((self._epoch + step) % size)]
            if bucket[-1]:
                for place in range(len(totals)):
                    totals[place] -= bucket[place]
                self.calls -= bucket[-1]
                bucket[:] = [0] * len(bucket)
        self._epoch, self._bucket, self._end = epoch, buckets[int(epoch % size)], (epoch + 1) * self._length

    def add(self, counts, now, calls=1):
        """counts: a tuple with one number for each counter; now: seconds of one clock; calls: how many have brought that."""
        if now >= self._end:
            self.advance(now)
        bucket = self._bucket
        bucket[-1] += calls
        self.calls += calls
        if any(counts):
            totals = self.totals
            for place, count in enumerate(counts):
                totals[place] += count
                bucket[place] += count

    def contents(self):
        """A list of the sums of each bucket, with the number of its calls last, the newest bucket first."""
        newest = int((self._epoch or 0) % len(self._buckets))
        return [list(self._buckets[newest - ago]) for ago in range(len(self._buckets))]

    def clear(self):
        """Forget all."""
        self.__init__(self.seconds, len(self._buckets), len(self.totals))


# ---- breakers -------------------------------------------------------------------------------------------------

class BreakerPermit:
    """A call that a CircuitBreaker lets through, for callbacks and streams: acquire_nowait() gives it.

    Say once how the call has ended, from whatever task or thread: succeed(), fail(), or give_back() if that says nothing of
    what was called. A second time is a RuntimeError. One that is forgotten, and so garbage, is given back.
    """

    __slots__ = ("_breaker", "_started", "_permit")

    def __init__(self, breaker, started, permit):
        self._breaker, self._started, self._permit = breaker, started, [permit]

    def _end(self):
        """What _record() and _give_back() take. Out of a list is one step, also among threads, and needs no lock."""
        try:
            return self._permit.pop()
        except IndexError:
            raise RuntimeError(f"this permit of {self._breaker.name!r} has ended: one of succeed(), fail() and give_back() is "
                               "called, and once") from None

    def succeed(self, result=None):
        """The call has come to its end. result: what it brought, for failure_result; None: that is not asked."""
        if result is None:
            self._breaker._record(self._end(), self._started, False)
        else:
            self._breaker._returned(self._end(), self._started, result)

    def fail(self, error):
        """The call has raised `error`: judged as if try_execute() had seen it."""
        if not isinstance(error, BaseException):
            raise TypeError(f"BreakerPermit.fail({error!r:.80}): give the exception")
        self._breaker._raised(self._end(), self._started, error)

    def give_back(self):
        """As if there had been no call."""
        self._breaker._give_back(self._end())

    def __del__(self):
        # At any moment, in any thread, perhaps within a decision of this breaker or another: so nothing here takes a lock.
        if self._permit:
            self.give_back()


def _is_generator_function(function):
    """Async or not; those that flowcoro.coroutine has made awaitable are none."""
    while isinstance(function, functools.partial):
        function = function.func
    flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
    return bool(flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR)) and not flags & inspect.CO_ITERABLE_COROUTINE


def _who():
    """The task that runs, or else the thread."""
    try:
        return flowcoro.current_task()
    except RuntimeError:
        return threading.get_ident()


class _Breaker(Policy):
    """What all breakers have: what counts, and the ways in. Each adds four methods:

    _permit(key): what to tell with the end of a call, or BreakerOpen. _record(permit, started, failed, key, error): a call has
    ended, and counts. _give_back(permit): it has ended and says nothing; it takes no lock, since what is garbage may come here
    in the middle of a decision. _ignore(error, key): tell that it was ignored.
    """

    def __init__(self, name, said, failures, ignored, failure_result, clock):
        super().__init__(name)
        self._failures = self._errors(failures, f"{said}failures=", True)
        self._ignored = None if ignored is None else self._errors(ignored, f"{said}ignored=", False)
        self._failure_result = None if failure_result is None else _test(failure_result, f"{said}failure_result=", self)
        if not callable(clock):
            raise TypeError(f"{said}clock={clock!r:.80}): give a function that returns seconds")
        self._clock = clock
        self._entered = {}                              # (task or thread, depth) -> (started, permit), of `with`

    def _errors(self, what, said, broken):
        if what is not None:
            for one in what if isinstance(what, tuple) else (what,):
                if isinstance(one, type) and not issubclass(one, Exception):
                    raise TypeError(f"{said}{one.__name__}): give types of Exception; what is none, as Cancelled, is never "
                                    "counted")
        return _test(what, said, self, broken)

    def _returned(self, permit, started, result, key=None):
        """The call has ended with a result."""
        failed = None
        try:
            failed = self._failure_result is not None and self._failure_result(result)
        finally:
            if failed is None:                  # the predicate has raised what is no Exception
                self._give_back(permit)
        self._record(permit, started, failed, key)

    def _raised(self, permit, started, error, key=None):
        """The call has ended with an error."""
        counts = ignored = False
        try:
            if isinstance(error, Exception):
                ignored = self._ignored is not None and self._ignored(error)
                failed = not ignored and self._failures(error)
                counts = not ignored
        finally:
            if not counts:                      # also if a predicate has raised what is no Exception
                self._give_back(permit)
        if counts:
            self._record(permit, started, failed, key, error)
        elif ignored:
            self._ignore(error, key)

    async def _run(self, call, proceed):
        started, permit = self._clock(), self._permit(call.key)
        try:
            result = await proceed()
        except BaseException as error:
            self._raised(permit, started, error, call.key)
            raise
        self._returned(permit, started, result, call.key)
        return result

    def __call__(self, function):
        """A decorator of a function, async or not: its calls go through the breaker.

        TypeError for generator functions: they have done nothing when their call returns.
        """
        if not callable(function):
            raise TypeError(f"@{self.name} decorates functions, got {function!r:.80}")
        if _is_generator_function(function):
            raise TypeError(f"@{self.name} got {function!r:.80}, a generator function: its call returns before anything is done: "
                            "write `async with` or `with` in it, or take acquire_nowait() and say how it ends")
        if inspect.iscoroutinefunction(function):
            return super().__call__(function)

        @functools.wraps(function)
        def decorated(*args, **kwargs):
            started, permit = self._clock(), self._permit(None)
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                self._raised(permit, started, error)
                raise
            if _is_awaitable(result):
                return self._awaited(BreakerPermit(self, started, permit), result)
            self._returned(permit, started, result)
            return result

        return decorated

    async def _awaited(self, permit, result):
        """The permit is one that may be forgotten, as a coroutine is that nobody awaits."""
        try:
            result = await result
        except BaseException as error:
            permit.fail(error)
            raise
        self._returned(permit._end(), permit._started, result)
        return result

    def acquire_nowait(self):
        """A BreakerPermit, or BreakerOpen."""
        return BreakerPermit(self, self._clock(), self._permit(None))

    def __enter__(self):
        entry, who, depth = (self._clock(), self._permit(None)), _who(), 0
        while (who, depth) in self._entered:
            depth += 1
        self._entered[who, depth] = entry
        return self

    def __exit__(self, kind, error, traceback):
        started, permit = self._left()
        if error is None:
            self._record(permit, started, False)
        else:
            self._raised(permit, started, error)

    def _left(self):
        """The innermost entry of this task or thread.

        If there is none, it is left elsewhere than it was entered, by garbage that is closed, say: then one of another, which
        will find that of yet another, and so as many are given back as were taken. Each step is one of the dict's own, and
        needs no lock (see BreakerPermit.__del__).
        """
        who, depth = _who(), 1
        while (who, depth) in self._entered:
            depth += 1
        entry = self._entered.pop((who, depth - 1), None)
        while entry is None and self._entered:
            entry = self._entered.pop(next(iter(list(self._entered)), None), None)
        if entry is not None:
            return entry
        raise RuntimeError(f"{self.name} was left more often than it was entered")

    async def __aenter__(self):
        return self.__enter__()

    async def __aexit__(self, kind, error, traceback):
        self.__exit__(kind, error, traceback)


# ---- circuit breaker ------------------------------------------------------------------------------------------
# Most breakers decide in two places which do not know of each other, before a call and after it. Between them lies the call,
# and whatever other calls have done meanwhile. So here a permit carries the number of the state in which it was given, its
# *generation*, and each transition begins a new one: what is told with another number is too late, and is dropped. All that
# holds for a probe follows from that: it counts for the half-open state that let it through, or not at all.

CLOSED, OPEN, HALF_OPEN, FORCED_OPEN, METRICS_ONLY = STATES = "CLOSED", "OPEN", "HALF_OPEN", "FORCED_OPEN", "METRICS_ONLY"

# (state, event) -> state. What is not here cannot happen.
TRANSITIONS = {
    (CLOSED, "exceeded"): OPEN,                 # a rate, or failures in a row, are as high as they may not be
    (OPEN, "waited"): HALF_OPEN,                # a call asks, and the open time is over
    (HALF_OPEN, "recovered"): CLOSED,           # all probes have been told of, and the rates are below
    (HALF_OPEN, "exceeded"): OPEN,              # … and one is not
    (HALF_OPEN, "expired"): OPEN,               # half_open_seconds have passed before that
    (METRICS_ONLY, "exceeded"): METRICS_ONLY,   # it is only told
    **{(state, "force_open"): FORCED_OPEN for state in STATES},
    **{(state, "metrics_only"): METRICS_ONLY for state in STATES},
    **{(state, "reset"): CLOSED for state in STATES},
}

ENTERED = {CLOSED: "closed", OPEN: "opened", HALF_OPEN: "half_opened", FORCED_OPEN: "forced_open", METRICS_ONLY: "metrics_only"}

# OUTCOMES[failed][slow]: what is added to the window: always the same objects, which it sees at a glance.
OUTCOMES = ((0, 0), (0, 1)), ((1, 0), (1, 1))

SAID = "CircuitBreaker("        # begins the messages about settings

# Calls in the window, and those without which there is no rate: resilience4j's. With 100, one failure is one per cent.
WINDOW = 100

# Of a window of time: what is too old stays for a tenth of it at most.
BUCKETS = 10

# Seconds that windows and states may last at most, a year: what is longer is a slip of the keyboard, or force_open(). And the
# shortest window: a tenth of it is still more than the clock's steps.
MAX_SECONDS, MIN_WINDOW_SECONDS = 366 * 86400.0, 0.001

# How often the open time may have grown, if nothing else is said: 60 s become 10 minutes, in which an outage is somebody's work.
MAX_OPEN_GROWTH = 10


class _CircuitSettings(typing.NamedTuple):
    minimum_calls: int
    failure_rate: float
    slow_call_rate: float
    consecutive_failures: float         # math.inf: any number of them
    open_seconds: float
    open_growth: float
    max_open_seconds: float
    open_jitter: float
    probes: int
    half_open_seconds: float            # math.inf: no limit


class _Circuit:
    """A breaker's decisions. `now` never goes back; `chance`, from 0 to 1, is for the open time, should one begin.

    until: when OPEN or HALF_OPEN is over; else, and if it has no limit, inf. taken: the permits of HALF_OPEN that are out or
    have been recorded; 0 <= sums.calls <= taken <= probes. free: the generation, in states that let every call through; else
    None. news: [(kind, details)], what has happened and nobody was told of yet.
    """

    __slots__ = ("settings", "window", "sums", "state", "generation", "free", "until", "open_seconds", "taken", "consecutive",
                 "over", "news", "rejected", "ignored", "late", "opened")

    def __init__(self, settings, window):
        self.settings, self.window = settings, window
        self.generation = self.rejected = self.ignored = self.late = self.opened = 0
        self.news = []
        self._enter(CLOSED, 0.0)

    def _enter(self, state, now, open_seconds=0.0, chance=0.5):
        self.state = state
        self.generation += 1
        self.free = self.generation if state in (CLOSED, METRICS_ONLY) else None
        self.until, self.taken, self.consecutive, self.over = math.inf, 0, 0, False
        self.open_seconds = open_seconds        # before jitter; what the next one grows from
        if state is OPEN:                       # sums stay: what has made it open
            self.until = now + open_seconds * (1 + self.settings.open_jitter * (2 * chance - 1))
        elif state is HALF_OPEN:
            self.until = now + self.settings.half_open_seconds
            self.sums = CountWindow(self.settings.probes, 2)
        else:
            self.sums = self.window
            self.window.clear()

    def go(self, event, now, chance):
        """Take a transition."""
        before, settings, open_seconds = self.state, self.settings, 0.0
        state = TRANSITIONS[before, event]
        if state is OPEN:
            self.opened += 1
            open_seconds = settings.open_seconds if before is CLOSED else (
                min(self.open_seconds * settings.open_growth, settings.max_open_seconds))
        elif state is HALF_OPEN:
            open_seconds = self.open_seconds
        self._enter(state, now, open_seconds, chance)
        details = {"before": before}
        if state is OPEN:
            details.update(seconds=self.until - now, **self.counted())
        self.news.append((ENTERED[state], details))

    def advance(self, now, chance):
        """Let time pass: as if at each moment somebody had looked."""
        if self.state is HALF_OPEN and now >= self.until:
            self.go("expired", self.until, chance)

    def permit(self, now, chance):
        """The generation to tell with the end of the call, or None: it may not run."""
        if self.free is not None:
            return self.free
        self.advance(now, chance)
        if self.state is OPEN and now >= self.until:
            self.go("waited", now, chance)
        if self.state is HALF_OPEN and self.taken < self.settings.probes:
            self.taken += 1
            return self.generation
        self.rejected += 1
        return None

    def give_back(self, generation):
        """A call has ended, and says nothing."""
        if self.state is HALF_OPEN and generation == self.generation:
            self.taken -= 1

    def record(self, generation, outcome, now, chance):
        """A call has ended, with one of OUTCOMES. Returns whether it counts."""
        if self.free is None:
            self.advance(now, chance)
        if generation != self.generation:
            self.late += 1
            return False
        sums = self.sums
        sums.add(outcome, now)
        if outcome[0]:
            self.consecutive += 1
        elif self.consecutive:
            self.consecutive = 0
        if self.free is None:
            if sums.calls == self.settings.probes:
                self.go("exceeded" if self._exceeded(sums.calls) else "recovered", now, chance)
        elif sums.totals[0] or sums.totals[1] or self.over:     # else no rate can be too high
            self._judge(now, chance)
        return True

    def _judge(self, now, chance):
        settings = self.settings
        exceeded = self.consecutive >= settings.consecutive_failures or self._exceeded(settings.minimum_calls)
        if exceeded and not self.over:
            if self.state is CLOSED:
                return self.go("exceeded", now, chance)
            self.news.append(("exceeded", self.counted()))
        self.over = exceeded

    def _exceeded(self, minimum):
        """Quotients, since 7 / 100 >= 0.07, but 7 < 0.07 * 100."""
        calls, (failures, slow) = self.sums.calls, self.sums.totals
        return calls >= minimum and (
            failures / calls >= self.settings.failure_rate or slow / calls >= self.settings.slow_call_rate)

    def retry_after(self, now):
        """Seconds until a call may be let through, in HALF_OPEN until it is decided at the latest; None if nobody knows."""
        return None if self.until == math.inf else max(0.0, self.until - now)

    def counted(self):
        """What details of events and statistics say of the calls that count."""
        failures, slow = self.sums.totals
        return {"calls": self.sums.calls, "failures": failures, "slow": slow}

    def statistics(self, now, chance):
        """Of CircuitBreaker's all but the name."""
        self.advance(now, chance)
        if self.free is not None:
            self.sums.advance(now)
        counted = self.counted()
        calls = counted["calls"]
        return {"state": self.state, **counted,
                "failure_rate": counted["failures"] / calls if calls else None,
                "slow_rate": counted["slow"] / calls if calls else None,
                "consecutive_failures": self.consecutive,
                "probes": self.taken - calls if self.state is HALF_OPEN else 0,
                "retry_after": self.retry_after(now),
                "rejected": self.rejected, "ignored": self.ignored, "late": self.late, "opened": self.opened}

    def save(self, now, chance):
        """What load() takes: plain JSON, in which no moment of the clock is."""
        self.advance(now, chance)
        saved = {"state": self.state, "seconds_left": None if self.until == math.inf else self.until - now,
                 "open_seconds": self.open_seconds, "consecutive_failures": self.consecutive,
                 "calls": "", "buckets": [], "bucket_seconds": None}
        if self.free is not None or self.state is HALF_OPEN:
            self.sums.advance(now)
            if isinstance(self.sums, CountWindow):
                saved["calls"] = "".join([str(failed + 2 * slow) for failed, slow in self.sums.contents()])
            else:
                saved.update(buckets=self.sums.contents(), bucket_seconds=self.sums._length)
        return saved

    def load(self, saved, age, now, chance):
        """Take what was saved `age` seconds ago, and has been checked. Probes that were out then are not."""
        state, settings = STATES[STATES.index(saved["state"])], self.settings
        self._enter(state, now)
        self.consecutive = saved["consecutive_failures"]
        if state in (OPEN, HALF_OPEN):
            self.open_seconds = min(max(saved["open_seconds"], settings.open_seconds), settings.max_open_seconds)
            left, most = saved["seconds_left"], settings.half_open_seconds
            if state is OPEN:
                most = settings.max_open_seconds * (1 + settings.open_jitter)
            if left is not None and most < math.inf:
                self.until = now + min(left, most) - age
        self.news.append(("loaded", {"state": state}))
        calls = saved["calls"]
        if state is HALF_OPEN:
            self.taken = min(len(calls), settings.probes - 1)       # one at least is to come, which decides
            calls = calls[len(calls) - self.taken:]
        if state is HALF_OPEN or self.free is not None and isinstance(self.sums, CountWindow):
            for digit in calls:
                self.sums.add(OUTCOMES[digit in "13"][digit in "23"])
        elif self.free is not None:
            middle = (now // self.sums._length + 0.5) * self.sums._length     # far from where a bucket ends, for rounding
            for ago in reversed(range(len(saved["buckets"]))):
                *counts, number = saved["buckets"][ago]
                self.sums.add(counts, middle - ago * saved["bucket_seconds"] - age, number)
            self.sums.advance(now)


# What the numbers of a saved state may be: integers up to here are exact as floats too.
MAX_SAVED = 1e15


def _checked_saved(saved):
    """ValueError unless it is what CircuitBreaker.save() has made, perhaps by way of JSON."""
    def number(value, least=0.0):
        return type(value) in (int, float) and least <= value <= MAX_SAVED

    def count(value):
        return type(value) is int and 0 <= value <= MAX_SAVED

    def bucket(value):
        return type(value) is list and len(value) == 3 and all(map(count, value)) and max(value) == value[2]

    checks = {
        "state": lambda value: value in STATES,
        "seconds_left": lambda value: value is None and saved["state"] != OPEN or number(value, -MAX_SAVED),
        "open_seconds": number,
        "consecutive_failures": count,
        "calls": lambda value: type(value) is str and set(value) <= set("0123"),
        "buckets": lambda value: type(value) is list and all(map(bucket, value)),
        "bucket_seconds": lambda value: value is None and not saved["buckets"] or number(value) and value > 0,
    }
    if type(saved) is not dict or saved.keys() != checks.keys():
        raise ValueError(f"CircuitBreaker.load({saved!r:.80}): give what save() returned, a dict of {', '.join(checks)}")
    for name, right in checks.items():
        if not right(saved[name]):
            raise ValueError(f"CircuitBreaker.load(): {name!r} is {saved[name]!r:.80}, which save() does not write")


def _checked_window(window, window_seconds, buckets, minimum_calls):
    """(window, minimum_calls)"""
    if minimum_calls is not None:
        _count(minimum_calls, 1, f"{SAID}minimum_calls=", "calls")
    if window_seconds is None:
        if buckets != BUCKETS:
            raise ValueError(f"{SAID}buckets={buckets!r:.80}): they are of a window of time: give window_seconds too")
        counts = CountWindow(_count(window, 1, f"{SAID}window=", "calls"), 2)
        if minimum_calls is None:
            minimum_calls = min(WINDOW, window)
        if minimum_calls > window:
            raise ValueError(f"{SAID}window={window}, minimum_calls={minimum_calls}): no rate would ever be known: give a "
                             "window of as many calls at least")
        return counts, minimum_calls
    if window != WINDOW:
        raise ValueError(f"{SAID}window={window!r:.80}, window_seconds={window_seconds!r:.80}): it counts the last calls, or "
                         "those of the last seconds: give one of them")
    _number(window_seconds, MIN_WINDOW_SECONDS, MAX_SECONDS, f"{SAID}window_seconds=", "seconds")
    return (TimeWindow(window_seconds, _count(buckets, 1, f"{SAID}buckets=", "buckets"), 2),
            WINDOW if minimum_calls is None else minimum_calls)


def _checked_settings(minimum_calls, failure_rate, slow_call_rate, consecutive_failures, open_seconds, open_growth,
                      max_open_seconds, open_jitter, probes, half_open_seconds):
    def number(value, least, most, name, unit, exclusive=False):
        return _number(value, least, most, f"{SAID}{name}=", unit, exclusive=exclusive)

    open_seconds = number(open_seconds, 0, MAX_SECONDS, "open_seconds", "seconds", exclusive=True)
    if max_open_seconds is None:
        max_open_seconds = min(MAX_OPEN_GROWTH * open_seconds, MAX_SECONDS)
    elif number(max_open_seconds, 0, MAX_SECONDS, "max_open_seconds", "seconds") < open_seconds:
        raise ValueError(f"{SAID}open_seconds={open_seconds:g}, max_open_seconds={max_open_seconds!r}): the longest open time is "
                         "shorter than the first: make it as long at least")
    return _CircuitSettings(
        minimum_calls,
        number(failure_rate, 0, 1, "failure_rate", "failures for each call", exclusive=True),
        number(slow_call_rate, 0, 1, "slow_call_rate", "slow calls for each call", exclusive=True),
        math.inf if consecutive_failures is None else _count(consecutive_failures, 1, f"{SAID}consecutive_failures=", "failures"),
        open_seconds,
        number(open_growth, 1, MAX_SECONDS, "open_growth", "times the open time before"),
        float(max_open_seconds),
        number(open_jitter, 0, 1, "open_jitter", "parts of the open time"),
        _count(probes, 1, f"{SAID}probes=", "calls"),
        math.inf if half_open_seconds is None else number(
            half_open_seconds, 0, MAX_SECONDS, "half_open_seconds", "seconds", exclusive=True))


class CircuitBreaker(_Breaker):
    """Lets calls through while what is called does well, and rejects them at once while it does not.

    CLOSED: calls go through, and are counted. Once `minimum_calls` are in the window, and a part of failure_rate of them, or
    more, has failed, or a part of slow_call_rate took longer than slow_call_seconds, or consecutive_failures have come in a row
    (for which there is no minimum), it is OPEN: all are rejected. After open_seconds the next call makes it HALF_OPEN: `probes`
    calls go through, no more, however many ask at a time. When all have ended, their rates decide: CLOSED again, with an empty
    window, or OPEN. FORCED_OPEN, until reset(), rejects all; METRICS_ONLY counts, and rejects none.

    What counts is what comes back: a result (a success, if failure_result(result) does not say otherwise), or an Exception: a
    failure if it is one of `failures`, neither if it is one of `ignored`, else a success. Each is a type, several, or a
    predicate. By default a Rejected from within is ignored: nothing was called. Cancelled, and whatever else is no Exception,
    is not counted, and gives the permit back: so a timeout has to stand *inside* the breaker, as in
    Pipeline(CircuitBreaker(), Timeout(2)); one that stands outside cancels the call, and the breaker learns nothing. A
    predicate that raises means no, but for `failures`, where it means yes: an error that nobody has understood is one.

    Defaults are resilience4j's. What cannot be is a ValueError or TypeError that names it.

    window=100                  calls, the last ones; or window_seconds: those of so long, in `buckets` (10) of equal length
    minimum_calls=100           with fewer no rate is known; if `window` is smaller and this is not given, it is the window
    failure_rate=0.5            from 0 (exclusive) to 1; reached is too high
    slow_call_seconds=60.0      slower is slow; math.inf: none is
    slow_call_rate=1.0          so that all have to be slow
    consecutive_failures=None   None: any number of them may come in a row
    open_seconds=60.0           how long it is OPEN, at first
    open_growth=1.0             each time HALF_OPEN ends in OPEN, it is so many times as long as the time before …
    max_open_seconds=None       … up to this; None: ten times open_seconds
    open_jitter=0.0             then up to this part shorter or longer, by chance, so that not all come back at the same time
    probes=10                   calls in HALF_OPEN
    half_open_seconds=None      if they have not all ended by then, it is OPEN again; None: no limit
    clock, random               functions: seconds of a clock, and a number from 0 to 1

    Ways in, with the same effect: try_execute(); a decorator, also of plain functions; `async with` and `with`, where each
    entry has a permit of its own, in any number of tasks, also one in another; acquire_nowait(). Each raises BreakerOpen, whose
    retry_after is: in OPEN the rest of that, in HALF_OPEN what is left of half_open_seconds, else None. A call within a call
    is one more call, and needs a permit of its own.

    Events: "success", "failure", "slow" (after one of those), each with `seconds`, "failure" with `error` too (None if it was a
    result); "ignored" with `error`; "late": it began in a state that is over, and does not count; "rejected" with `state`,
    `retry_after`; "opened", "half_opened", "closed", "forced_open", "metrics_only", with `before`, the state that was, "opened"
    with `seconds`, `calls`, `failures`, `slow` too; "exceeded" with the latter three: METRICS_ONLY would have opened; "loaded"
    with `state`.
    """

    def __init__(self, *, window=WINDOW, window_seconds=None, buckets=BUCKETS, minimum_calls=None, failure_rate=0.5,
                 slow_call_seconds=60.0, slow_call_rate=1.0, consecutive_failures=None, open_seconds=60.0, open_growth=1.0,
                 max_open_seconds=None, open_jitter=0.0, probes=10, half_open_seconds=None, failures=Exception,
                 ignored=Rejected, failure_result=None, clock=flowcoro.now, random=random.random, name=None):
        super().__init__(name, SAID, failures, ignored, failure_result, clock)
        window, minimum_calls = _checked_window(window, window_seconds, buckets, minimum_calls)
        self._circuit = _Circuit(_checked_settings(
            minimum_calls, failure_rate, slow_call_rate, consecutive_failures, open_seconds, open_growth, max_open_seconds,
            open_jitter, probes, half_open_seconds), window)
        self._slow_seconds = _number(slow_call_seconds, 0, math.inf, f"{SAID}slow_call_seconds=", "seconds", exclusive=True)
        if not callable(random):
            raise TypeError(f"{SAID}random={random!r:.80}): give a function that returns a number from 0 to 1")
        self._random = random
        self._last, self._offset = -math.inf, 0.0       # P4: what the clock said last, and what is added to it since it went back
        self._chance = 0.5
        self._given_back = collections.deque()          # generations; taken out by the next decision (BreakerPermit.__del__)
        self._draw()

    # -- decisions: under the lock; what comes of them is told after it

    def _now(self):
        now = self._clock() + self._offset
        if now < self._last:
            self._offset += self._last - now
            now = self._last
        self._last = now
        return now

    def _decide(self, decision, *args):
        result, news = self._decided(decision, *args)
        self._announce(news)
        return result

    def _decided(self, decision, *args):
        circuit = self._circuit
        with self._lock:
            now = self._now()
            while self._given_back:
                circuit.give_back(self._given_back.popleft())
            result = decision(*args, now, self._chance)
            news, circuit.news = circuit.news, []
        return result, news

    def _announce(self, news):
        for kind, details in news:
            if kind == "opened":
                self._draw()
            if self._listeners:
                self._tell(kind, **details)

    def _draw(self):
        """The chance of the next open time: drawn ahead, since a decision calls nobody."""
        if self._circuit.settings.open_jitter:
            try:
                self._chance = min(max(self._random(), 0.0), 1.0)
            except Exception as error:
                flowcoro.report_error(error, f"{SAID}random=…) of {self.name!r} failed, and jitter stays as it was",
                                      "flowcoro_resilience")

    def _permit(self, key):
        """The generation to tell with the end of the call. Raises BreakerOpen."""
        generation = self._circuit.free         # one read, so it needs no lock: a call that is let through as the breaker opens
        if generation is not None:              # might as well have come a moment earlier, and is late when it ends
            return generation
        (generation, state, retry_after), news = self._decided(self._ask)
        try:
            self._announce(news)
        except BaseException:                   # of a listener that is interrupted
            if generation is not None:
                self._give_back(generation)
            raise
        if generation is not None:
            return generation
        if self._listeners:
            self._tell("rejected", key, state=state, retry_after=retry_after)
        hint = {OPEN: f"ask again in {retry_after or 0:.3g} s", FORCED_OPEN: "until reset()",
                HALF_OPEN: f"all of its probes={self._circuit.settings.probes} are under way"}[state]
        raise BreakerOpen(f"{self.name} is {state}: {hint}", self, retry_after)

    def _ask(self, now, chance):
        circuit = self._circuit
        return circuit.permit(now, chance), circuit.state, circuit.retry_after(now)

    def _record(self, generation, started, failed, key=None, error=None):
        circuit = self._circuit
        with self._lock:
            ended = self._clock()
            slow = ended - started > self._slow_seconds
            now = ended + self._offset          # _now(), in line
            if now < self._last:
                self._offset += self._last - now
                now = self._last
            self._last = now
            counted = circuit.record(generation, OUTCOMES[failed][slow], now, self._chance)
            news = circuit.news
            if news:
                circuit.news = []
        if self._listeners:
            seconds = max(0.0, ended - started)
            if not counted:
                self._tell("late", key, seconds=seconds)
            elif failed:
                self._tell("failure", key, seconds=seconds, error=error)
            else:
                self._tell("success", key, seconds=seconds)
            if counted and slow:
                self._tell("slow", key, seconds=seconds)
        if news:
            self._announce(news)

    def _ignore(self, error, key):
        with self._lock:
            self._circuit.ignored += 1
        if self._listeners:
            self._tell("ignored", key, error=error)

    def _give_back(self, generation):
        """Without the lock. Where all calls go through, nothing was taken."""
        if generation == self._circuit.generation and self._circuit.free is None:
            self._given_back.append(generation)

    # -- ways in

    async def try_execute(self, operation, /, *args, **kwargs):
        """As Policy.try_execute(). Raises BreakerOpen, a Rejected."""
        # _run(), in line and without what a Pipeline needs: a call through a closed breaker has two clock readings and one lock.
        if not callable(operation):
            _checked_operation(operation, f"{self.name}.try_execute()")
        started = self._clock()
        generation = self._circuit.free
        if generation is None:
            generation = self._permit(getattr(operation, "key", None))
        try:
            result = operation(*args, **kwargs)
            if result.__class__ is types.CoroutineType or _is_awaitable(result):
                result = await result
            failed = self._failure_result is not None and self._failure_result(result)
        except BaseException as error:
            self._raised(generation, started, error, getattr(operation, "key", None))
            raise
        self._record(generation, started, failed, getattr(operation, "key", None) if self._listeners else None)
        return result

    # -- what it is, and what you want it to be

    @property
    def state(self):
        """CLOSED, OPEN, HALF_OPEN, FORCED_OPEN or METRICS_ONLY, as texts. OPEN stays until a call asks after its time."""
        self._decide(self._circuit.advance)
        return self._circuit.state

    def force_open(self):
        """FORCED_OPEN: reject all, until reset()."""
        self._decide(self._circuit.go, "force_open")

    def metrics_only(self):
        """METRICS_ONLY: let all through, and count; until reset()."""
        self._decide(self._circuit.go, "metrics_only")

    def reset(self):
        """CLOSED. What was counted is forgotten, but for what statistics() says never goes back."""
        self._decide(self._circuit.go, "reset")

    def save(self):
        """The state as a dict that JSON can carry, for load(): of another process, say. Times in it are relative."""
        return self._decide(self._circuit.save)

    def load(self, saved, age=0.0):
        """Take over what save() has returned, `age` seconds ago. Calls under way do not count, and probes are free again.

        Settings are this breaker's. What does not fit them (a window of another kind or length) is taken as far as it goes.
        ValueError for what is none, which names the member.
        """
        age = _number(age, 0, MAX_SAVED, f"{self.name}.load(age=", "seconds")
        _checked_saved(saved)
        self._decide(self._circuit.load, saved, age)

    def statistics(self):
        """A dict.

        "name", "state"; "calls", "failures", "slow": of those that count now, in OPEN of those that have opened it;
        "failure_rate", "slow_rate": their quotients, None without calls; "consecutive_failures"; "probes": under way, in
        HALF_OPEN; "retry_after": as BreakerOpen's. Never going back: "rejected", "ignored", "late", "opened": how often.
        """
        return {"name": self.name, **self._decide(self._circuit.statistics)}


# ---- adaptive breaker -----------------------------------------------------------------------------------------


# ---- rate limits ----------------------------------------------------------------------------------------------


# ---- concurrency limits ---------------------------------------------------------------------------------------


# ---- retry ----------------------------------------------------------------------------------------------------


# ---- hedge ----------------------------------------------------------------------------------------------------


# ---- timeout and fallback -------------------------------------------------------------------------------------


# ---- cache ----------------------------------------------------------------------------------------------------


# ---- keyed ----------------------------------------------------------------------------------------------------

class Keyed(Policy):
    """One policy for each key, made when it is first asked for: `Keyed(lambda key: CircuitBreaker(name=f"to {key}"))`.

    make: function of a key that gives a Policy. key: function of the operation's arguments that gives the key; without it the
    operation has the attribute `key` (HttpClient and RpcClient give theirs: where the request goes). max_keys: beyond them the
    one that was not used for longest goes, of those in which nothing is under way; if something is under way in all of them, the
    call is Rejected.

    Events: "created", "evicted". Listeners hear what the policies within say as well, which names their own `policy`.
    """

    def __init__(self, make, *, key=None, max_keys=MAX_KEYS, name=None):
        super().__init__(name)
        if not callable(make):
            raise TypeError(f"Keyed({make!r:.80}): give a function of a key that makes a policy")
        if key is not None and not callable(key):
            raise TypeError(f"Keyed(key={key!r:.80}): give a function of the operation's arguments, or None")
        self._make, self._key_of = make, key
        self._max_keys = _count(max_keys, 1, "Keyed(max_keys=", "keys")
        self._policies = {}             # key -> [policy, calls under way]; the one used last is the last
        self._evicted = 0

    async def try_execute(self, operation, /, *args, **kwargs):
        """As Policy.try_execute(), by the policy of its key. TypeError if there is none."""
        _checked_operation(operation, f"{self.name}.try_execute()")
        call = _call_of(operation)
        if self._key_of is not None:
            call = call._replace(key=self._key_of(*args, **kwargs))
        return await self._run(call, functools.partial(_invoke, operation, args, kwargs))

    async def _run(self, call, proceed):
        key = call.key
        if key is None:
            raise TypeError(f"{self.name}: the operation has no key: give Keyed(key=function of its arguments), or an operation "
                            "with an attribute `key`")
        entry = self._enter(key)
        try:
            return await entry[0]._run(call, proceed)
        finally:
            with self._lock:
                entry[1] -= 1

    def _enter(self, key):
        """The entry of a key, with one more under way."""
        entry = self._taken(key)
        if entry is not None:
            return entry
        policy = self._make(key)            # not under the lock (P1)
        if not isinstance(policy, Policy):
            raise TypeError(f"{self.name}: the function that makes policies gave {policy!r:.80} for {key!r:.80}: give a Policy")
        evicted = None
        with self._lock:
            entry = self._policies.get(key)
            if entry is None:               # else somebody has made one meanwhile, and that one counts
                if len(self._policies) >= self._max_keys:
                    evicted = self._evict()
                entry = self._policies[key] = [policy, 0]
                policy._listeners = (*policy._listeners, self._hear)
            entry[1] += 1
            created = entry[0] is policy
        if self._listeners:
            if evicted is not None:
                self._tell("evicted", evicted)
            if created:
                self._tell("created", key)
        return entry

    def _taken(self, key):
        with self._lock:
            entry = self._policies.pop(key, None)
            if entry is not None:
                self._policies[key] = entry
                entry[1] += 1
            return entry

    def _evict(self):
        """The key that has gone."""
        for key, (_, under_way) in self._policies.items():
            if not under_way:
                del self._policies[key]
                self._evicted += 1
                return key
        raise Rejected(f"{self.name}: {len(self._policies)} keys are in use at once, and max_keys={self._max_keys}: raise it",
                       self)

    def _hear(self, event):
        for listener in self._listeners:
            listener(event)

    def get(self, key):
        """The policy of a key, or None: it is not made."""
        entry = self._policies.get(key)
        return None if entry is None else entry[0]

    def keys(self):
        """The keys that there are policies for, the one used last at the end."""
        with self._lock:
            return list(self._policies)

    def statistics(self):
        """{"name", "keys", "max_keys", "evicted": how many, "policies": {key: statistics()}}"""
        with self._lock:
            policies = {key: entry[0] for key, entry in self._policies.items()}
        return {"name": self.name, "keys": len(policies), "max_keys": self._max_keys, "evicted": self._evicted,
                "policies": {key: policy.statistics() for key, policy in policies.items()}}


# ---- pipeline -------------------------------------------------------------------------------------------------

class Pipeline(Policy):
    """Several policies as one, the outermost first, as they are written:

        Pipeline(Fallback(…), Timeout(10), Retry(…), CircuitBreaker(…), ConcurrencyLimiter(…), Timeout(2))

    Read it from left to right, as a call goes: 10 seconds for all attempts, each of which asks the breaker, waits for a place,
    and has 2 seconds; the breaker counts what each attempt brings, and Retry sees its rejections. resilience4j wraps its
    decorators in the same order. A policy may stand in several pipelines, which then share its state: one breaker for each
    dependency.

    Events: those of its policies.
    """

    def __init__(self, *policies, name=None):
        super().__init__(name)
        for policy in policies:
            if not isinstance(policy, Policy):
                raise TypeError(f"Pipeline(… {policy!r:.80} …): give policies, the outermost first")
        self._policies = policies

    async def _run(self, call, proceed):
        for policy in reversed(self._policies):
            proceed = functools.partial(policy._run, call, proceed)
        return await proceed()

    @property
    def policies(self):
        """A tuple, the outermost first."""
        return self._policies

    def add_listener(self, listener):
        """As Policy.add_listener(), of each policy."""
        for policy in self._policies:
            policy.add_listener(listener)
        return listener

    def remove_listener(self, listener):
        """As Policy.remove_listener(), of each policy."""
        for policy in self._policies:
            policy.remove_listener(listener)

    def statistics(self):
        """{"name", "policies": [statistics() of each]}"""
        return {"name": self.name, "policies": [policy.statistics() for policy in self._policies]}

    def __repr__(self):
        return f"<Pipeline {' > '.join(policy.name for policy in self._policies)}>"
