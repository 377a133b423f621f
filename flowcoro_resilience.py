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
are parked. So those that are parked, in a RateLimiter or a ConcurrencyLimiter, are tasks of one run at a time; all other policies
may serve several runs in several threads together.

    P1  a decision is made under the policy's lock, reads the clock there, and calls nothing else that is not its own: no
        predicate, no listener, no operation; only an algorithm that a ConcurrencyLimiter was given. So with several
        workers, and from threads, decisions come one after the other.
        Who takes both, takes the kernel's guard first: within a policy's lock nothing is called that is atomic there
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
      TaskCancelled         of the kernel: the call that a Cache waited for has cancelled itself
    TimeoutError            of Timeout, and of Retry's attempt_seconds and total_seconds

Sources: Nygard, "Release It!" (the breaker); resilience4j (its names and defaults); Beyer et al., "Site Reliability Engineering",
chapters 21 and 22 (client throttling, retry budgets); Brooker, "Exponential Backoff And Jitter" (AWS, 2015); ITU-T I.371 (GCRA);
Netflix concurrency-limits (Gradient2); Dean and Barroso, "The Tail at Scale" (hedging); RFC 5861 (stale-while-revalidate).

What it does not do: limits that several processes or machines share, persistence (a breaker's state can be saved and loaded).

SPDX-License-Identifier: MIT
"""

import array
import collections
import functools
import inspect
import math
import os
import random
import threading
import types
import typing
import weakref

import flowcoro

__version__ = "0.1.0"

__all__ = ["Policy", "PolicyEvent", "CountWindow", "TimeWindow", "Keyed", "Pipeline", "Rejected", "BreakerOpen", "RateLimited",
           "LimitExceeded",
           "CircuitBreaker", "BreakerPermit",
           "AdaptiveBreaker",
           "RateLimiter", "RateState", "ConcurrencyLimiter", "AIMD", "Gradient2",
           "Retry", "RetryBudget", "LatencyWindow", "Hedge", "Timeout", "Fallback", "Cache"]

# ---- constants ------------------------------------------------------------------------------------------------

# Keys that a RateLimiter remembers at most, some 13 MB of them, and a Keyed, whose policies are larger: 33 MB of circuit breakers
# with a window of 100 calls, 26 with one of 10.
MAX_KEYS, MAX_KEYED = 100_000, 10_000


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


class _Call(typing.NamedTuple):
    """What the policies of one call are told of it."""

    key: object
    idempotent: bool
    discard: object             # or None
    asked: tuple                # (operation, args, kwargs)

    async def drop(self, result, policy):
        """Let go of a result that nobody will get. Its own task is not cancelled meanwhile; an error is reported."""
        if self.discard is not None:
            with flowcoro.CancelScope(shield=True):
                try:
                    await _invoke(self.discard, (result,), {})
                except Exception as error:
                    flowcoro.report_error(error, f"a result that {policy.name!r} does not need could not be let go of",
                                          "flowcoro_resilience")


def _call_of(operation, asked):
    return _Call(getattr(operation, "key", None), bool(getattr(operation, "idempotent", False)),
                 getattr(operation, "discard", None), asked)


def _is_generator_function(function):
    """Async or not; those that flowcoro.coroutine has made awaitable are none."""
    while isinstance(function, functools.partial):
        function = function.func
    flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
    return bool(flags & (inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR)) and not flags & inspect.CO_ITERABLE_COROUTINE


async def _invoke(operation, args, kwargs):
    """What an operation brings, async or not."""
    result = operation(*args, **kwargs)
    if _is_awaitable(result):
        return await result
    if result.__class__ in GENERATORS:
        _refuse_generator(operation)
    return result


GENERATORS = frozenset([types.GeneratorType, types.AsyncGeneratorType])


def _refuse_generator(operation):
    """TypeError if it is a generator function, and not one that has a generator for a result."""
    if _is_generator_function(operation):
        raise TypeError(f"a policy got {operation!r:.80}, a generator function: its call returns before anything is done: give a "
                        "function that runs through what it yields")


def _checked_function(function, said, what):
    """`function`, if it is a plain one: what an async one returns is true, whatever it says, and nobody awaits it. said: the
    argument, "Keyed(key="; what: "a function of …"."""
    if not callable(function):
        raise TypeError(f"{said}{function!r:.80}): give {what}")
    if inspect.iscoroutinefunction(function) or _is_generator_function(function):
        raise TypeError(f"{said}{function!r:.80}): give {what}; this one is async, or a generator, and nobody "
                        "awaits what it returns")
    return function


def _checked_operation(operation, whose):
    """TypeError if it cannot be called."""
    if not callable(operation):
        if inspect.iscoroutine(operation):
            operation.close()           # else it would warn that it was never awaited
            raise TypeError(f"{whose} got a coroutine object: give the function, and its arguments after it, since it may be "
                            "called later, several times, or not at all")
        raise TypeError(f"{whose} got {operation!r:.80}: give a function, async or not, and its arguments after it")


# id -> what has a `_lock`. In the child of a fork the threads are gone that may have had one, and nobody else would let go of it:
# so each is a new one there, as those of the standard library are. 0.7 µs for each policy that is made.
_locked = weakref.WeakValueDictionary()


def _after_fork_in_child():
    for policy in list(_locked.values()):
        policy._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Policy:
    """What all policies have. `name` is for messages, statistics and metrics."""

    _shares = False             # whether several calls may get the same result

    def __init__(self, name=None):
        self.name = type(self).__name__ if name is None else name
        self._listeners = ()
        # A lock of its own, and not the kernel's guard, so that plain functions in threads may use it too; one that can be taken
        # again, since a signal handler may strike within a decision and come here. 45 ns for each decision.
        self._lock = threading.RLock()
        _locked[id(self)] = self

    async def try_execute(self, operation, /, *args, **kwargs):
        """What operation(*args, **kwargs) brings; it may be async or not.

        Raises what it raises, Rejected if the policy does not let it run, and TypeError for a coroutine object, and for generator
        functions, which have done nothing when they return. Cancelled: the operation is, and what the policy has given it is
        taken back.
        """
        _checked_operation(operation, f"{self.name}.try_execute()")
        asked = (operation, args, kwargs)
        return await self._run(_call_of(operation, asked), functools.partial(_invoke, *asked))

    async def _run(self, call, proceed):
        """What `proceed()` brings, which is awaited as often as the policy wants: the operation, and the policies within."""
        raise NotImplementedError

    def __call__(self, function):
        """A decorator of an async function: its calls go through try_execute(). What it gives has this as its `policy`, and the
        attributes of the function (`key`, `idempotent`, `discard`), or those that it is given itself later."""
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"@{self.name} decorates async functions, got {function!r:.80}")

        @functools.wraps(function)
        async def decorated(*args, **kwargs):
            asked = (function, args, kwargs)
            return await self._run(_call_of(decorated, asked), functools.partial(_invoke, *asked))

        decorated.policy = self
        return decorated

    def add_listener(self, listener):
        """listener(event): a plain function, called with each PolicyEvent, in the task or thread that has caused it. Its error is
        reported, and changes nothing. Returns it, so that it may be a decorator."""
        _checked_function(listener, f"{self.name}.add_listener(", "a function of a PolicyEvent")
        with self._lock:
            self._listeners = (*self._listeners, listener)
        return listener

    def _forward_to(self, listener):
        """add_listener(), if it is none yet."""
        with self._lock:
            if listener not in self._listeners:
                self._listeners = (*self._listeners, listener)

    def remove_listener(self, listener):
        """ValueError if it is none."""
        with self._lock:
            listeners = list(self._listeners)
            if listener not in listeners:
                raise ValueError(f"{self.name}.remove_listener({listener!r:.80}): it was not added, or has been removed")
            listeners.remove(listener)
            self._listeners = tuple(listeners)

    def _tell(self, kind, key=None, **details):
        """Call the listeners: not under the lock (P1)."""
        self._hear(PolicyEvent(self, kind, key, details))

    def _hear(self, event):
        """Call the listeners with an event of this policy, or of one within."""
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:
                flowcoro.report_error(error, f"a listener of {self.name!r} failed at {event.kind!r}", "flowcoro_resilience")

    def statistics(self):
        """A dict of numbers and texts."""
        return {"name": self.name}

    def __repr__(self):
        return f"<{type(self).__name__} {self.name!r}>"


def _number(value, least, most, said, unit, *, exclusive=False):
    """`value` as a float, if it is a number from `least` to `most`. said: the argument, "Retry(first=…"."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{said}{value!r:.80}): give a number of {unit}")
    try:
        number = float(value)
    except OverflowError:
        number = math.nan               # an int that is more than a float can be
    if not (least < number if exclusive else least <= number) or not number <= most:
        above = "more than" if exclusive else "from"
        limit = "up" if most == math.inf else f"to {most:g}"
        raise ValueError(f"{said}{value!r:.80}): give a number of {unit} {above} {least:g} {limit}")
    return number


def _count(value, least, said, unit, most=math.inf):
    """`value`, if it is an int from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{said}{value!r:.80}): give a number of {unit}, an int")
    if not least <= value <= most:
        limit = "up" if most == math.inf else f"to {most:,}"
        raise ValueError(f"{said}{value!r:.80}): give a number of {unit}, from {least} {limit}")
    return value


def _steady(read, said):
    """A function that gives what `read()` does, or what it was given of that, as long as it goes forwards, and stands still while
    it does not (P4).

    It is called under the policy's lock: threads that were late would make it stand still. A closure, which is 50 ns faster than
    a method.
    """
    _checked_function(read, said, "a function that returns seconds")
    last, offset = -math.inf, 0.0

    def steady(said=None):
        nonlocal last, offset
        now = (read() if said is None else said) + offset
        if not last <= now < math.inf:
            if -math.inf < now < last:      # else it says that, or nan, from which nothing comes back
                offset += last - now
            return last
        last = now
        return now

    return steady


def _test(what, said, policy, broken=False):
    """A function that says whether an error, or a result, is meant: by a type, a tuple of them, or a predicate. None: none is.

    A predicate that raises means `broken`, and is reported (P5).
    """
    if what is None:
        return lambda outcome: False
    if isinstance(what, type) or isinstance(what, tuple) and what and all(isinstance(one, type) for one in what):
        return lambda outcome: isinstance(outcome, what)
    _checked_function(what, said, "an exception type, a tuple of them, a predicate, or None")

    def predicate(outcome):
        try:
            return bool(what(outcome))
        except Exception as error:
            flowcoro.report_error(error, f"the predicate {said}…) of {policy.name!r} failed, which means "
                                  f"{'yes' if broken else 'no'}", "flowcoro_resilience")
            return broken

    return predicate


def _test_error(what, said, policy, one_of_group=False, broken=False):
    """As _test(), for errors: types are of Exception. An ExceptionGroup, which is what a TaskGroup raises though a single task
    has failed, is of a type if all its errors are; one_of_group: if one of them is. TypeError for other types."""
    test = _test(what, said, policy, broken)
    if not isinstance(what, (type, tuple)):
        return test
    for one in what if isinstance(what, tuple) else (what,):
        if not issubclass(one, Exception):
            raise TypeError(f"{said}{one.__name__}): give types of Exception; what is none, as Cancelled, always goes through")
    if one_of_group:
        return lambda error: isinstance(error, what) or isinstance(error, ExceptionGroup) and error.subgroup(what) is not None
    return lambda error: isinstance(error, what) or isinstance(error, ExceptionGroup) and error.split(what)[1] is None


# ---- windows --------------------------------------------------------------------------------------------------
# What happened lately, in O(1) for each call and bounded memory. Several counters at a time: a call adds to each of them.

# Seconds that windows and states may last at most, a year: what is longer is a slip of the keyboard, or force_open(). And the
# shortest window: a tenth of it is still more than the clock's steps.
MAX_SECONDS, MIN_WINDOW_SECONDS = 366 * 86400.0, 0.001

# Calls that a window may have, which take 8 bytes each: for more than 8 MB there are windows of time. And buckets of one of
# those, which take 100 bytes each, and after a pause 100 ns.
MAX_CALLS, MAX_BUCKETS = 1_000_000, 10_000

class CountWindow:
    """Sums of the last `size` calls, in a ring: add(counts) takes the oldest out.

    totals: a list, one sum for each of `counters`; `calls`: how many calls are in it.
    """

    __slots__ = ("size", "calls", "totals", "_ring", "_place")

    def __init__(self, size, counters=1):
        self.size = _count(size, 1, "CountWindow(size=", "calls", MAX_CALLS)
        self.totals = [0] * _count(counters, 1, "CountWindow(counters=", "counters")
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
        self.seconds = _number(seconds, MIN_WINDOW_SECONDS, MAX_SECONDS, "TimeWindow(seconds=", "seconds")
        self._length = self.seconds / _count(buckets, 1, "TimeWindow(buckets=", "buckets", MAX_BUCKETS)
        self.totals = [0] * _count(counters, 1, "TimeWindow(counters=", "counters")
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


def _who():
    """The task that runs, or else the thread."""
    try:
        return flowcoro.current_task()
    except RuntimeError:
        return threading.get_ident()


class _Breaker(Policy):
    """What all breakers have: what counts, and the ways in. Each adds two methods, and its decisions:

    _permit(key): what to tell with the end of a call, or BreakerOpen. _record(permit, started, failed, key, error): a call has
    ended, and counts. _circuit: the decisions, of which is known here `free`: what permits are while all calls go through, else
    None; `generation`: the newest permit; give_back(permit): the call says nothing; `ignored`: how many were.
    """

    def __init__(self, name, said, failures, ignored, failure_result, clock, random):
        super().__init__(name)
        # Of an ExceptionGroup's errors one is enough for a failure, and all are needed to ignore it.
        self._failures = _test_error(failures, f"{said}failures=", self, one_of_group=True, broken=True)
        self._ignored = None if ignored is None else _test_error(ignored, f"{said}ignored=", self)
        self._failure_result = None if failure_result is None else _test(failure_result, f"{said}failure_result=", self)
        self._clock, self._now = clock, _steady(clock, f"{said}clock=")
        self._random = _checked_function(random, f"{said}random=", "a function that returns a number from 0 to 1")
        self._given_back = collections.deque()          # permits; taken out by the next decision (BreakerPermit.__del__)
        self._entered = {}                              # (task or thread, depth) -> (started, permit), of `with`

    def _drawn(self):
        """A chance, from 0 to 1."""
        try:
            return min(max(0.0, self._random()), 1.0)       # in this order nan is 0
        except Exception as error:
            flowcoro.report_error(error, f"the function random= of {self.name!r} failed, which is taken for 0.5",
                                  "flowcoro_resilience")
            return 0.5

    def _begin(self):
        """Begin a decision, under the lock, with what was given back before it. Returns now."""
        now = self._now()
        while self._given_back:
            self._circuit.give_back(self._given_back.popleft())
        return now

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

    def _ignore(self, error, key):
        with self._lock:
            self._circuit.ignored += 1
        if self._listeners:
            self._tell("ignored", key, error=error)

    def _tell_end(self, key, failed, seconds, error):
        if failed:
            self._tell("failure", key, seconds=seconds, error=error)
        else:
            self._tell("success", key, seconds=seconds)

    def _give_back(self, generation):
        """A call has ended, and says nothing. Without the lock, since what is garbage may come here in the middle of a decision.

        Where all calls go through, nothing was taken.
        """
        if generation == self._circuit.generation and self._circuit.free is None:
            self._given_back.append(generation)

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
            elif result.__class__ in GENERATORS:
                _refuse_generator(operation)
            failed = self._failure_result is not None and self._failure_result(result)
        except BaseException as error:
            self._raised(generation, started, error, getattr(operation, "key", None))
            raise
        self._record(generation, started, failed, getattr(operation, "key", None) if self._listeners else None)
        return result

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
            @functools.wraps(function)
            async def decorated(*args, **kwargs):       # 0.5 µs less than by Policy's
                return await self.try_execute(function, *args, **kwargs)

            return decorated

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
            if self.consecutive >= self.settings.consecutive_failures:
                self.go("exceeded", now, chance)
            elif sums.calls == self.settings.probes:
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
        state, settings = STATES[STATES.index(saved["state"])], self.settings       # the constant: _enter() asks with `is`
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
        counts = CountWindow(_count(window, 1, f"{SAID}window=", "calls", MAX_CALLS), 2)
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
    return (TimeWindow(window_seconds, _count(buckets, 1, f"{SAID}buckets=", "buckets", MAX_BUCKETS), 2),
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
        _count(probes, 1, f"{SAID}probes=", "calls", MAX_CALLS),
        math.inf if half_open_seconds is None else number(
            half_open_seconds, 0, MAX_SECONDS, "half_open_seconds", "seconds", exclusive=True))


class CircuitBreaker(_Breaker):
    """Lets calls through while what is called does well, and rejects them at once while it does not.

    CLOSED: calls go through, and are counted. Once `minimum_calls` are in the window, and a part of failure_rate of them, or
    more, has failed, or a part of slow_call_rate took longer than slow_call_seconds, or consecutive_failures have come in a row
    (for which there is no minimum), it is OPEN: all are rejected. After open_seconds the next call makes it HALF_OPEN: `probes`
    calls go through, no more, however many ask at a time. When all have ended, their rates decide: CLOSED again, with an empty
    window, or OPEN; consecutive_failures among them are OPEN at once. FORCED_OPEN, until reset(), rejects all; METRICS_ONLY
    counts, and rejects none.

    What counts is what comes back: a result (a success, if failure_result(result) does not say otherwise), or an Exception: a
    failure if it is one of `failures`, neither if it is one of `ignored`, else a success. Each is a type, several, or a
    predicate; an ExceptionGroup is of a type in `failures` if one of its errors is, of one in `ignored` if all are. By
    default a Rejected from within is ignored: nothing was called. Cancelled, and whatever else is no Exception,
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
        super().__init__(name, SAID, failures, ignored, failure_result, clock, random)
        window, minimum_calls = _checked_window(window, window_seconds, buckets, minimum_calls)
        self._circuit = _Circuit(_checked_settings(
            minimum_calls, failure_rate, slow_call_rate, consecutive_failures, open_seconds, open_growth, max_open_seconds,
            open_jitter, probes, half_open_seconds), window)
        self._slow_seconds = _number(slow_call_seconds, 0, math.inf, f"{SAID}slow_call_seconds=", "seconds", exclusive=True)
        self._chance = 0.5
        self._draw()

    # -- decisions: under the lock; what comes of them is told after it

    def _decide(self, decision, *args):
        result, news = self._decided(decision, *args)
        self._announce(news)
        return result

    def _decided(self, decision, *args):
        circuit = self._circuit
        with self._lock:
            now = self._begin()
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
            self._chance = self._drawn()

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
            try:
                ended = self._clock()
                slow = ended - started > self._slow_seconds
            except BaseException:               # of the clock
                self._give_back(generation)
                raise
            counted = circuit.record(generation, OUTCOMES[failed][slow], self._now(ended), self._chance)
            news = circuit.news
            if news:
                circuit.news = []
        if self._listeners:
            seconds = max(0.0, ended - started)
            if not counted:
                self._tell("late", key, seconds=seconds)
            else:
                self._tell_end(key, failed, seconds, error)
            if counted and slow:
                self._tell("slow", key, seconds=seconds)
        if news:
            self._announce(news)

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
# What a dependency turns away costs it too: at some load it does nothing else. So its clients turn away themselves what it
# would, without asking it. A client knows how many of its requests were accepted lately, and lets through about K times as many
# as that: those above what is accepted are how it notices that more is. It needs no state but the counts, so nothing opens or
# closes, and a failure or two among many does nothing at all.
#
# A request is counted when it ends, not when it begins (as in go-zero's, for one): else those that are under way would look as
# if they were not accepted, and the first burst at a slow dependency would be turned away. What is cancelled or ignored has then
# added nothing that would have to be found again in the window. The price is that a dependency which does not answer at all is
# noticed when the calls time out: put a Timeout within.

# Requests below which nothing is rejected: of one or two, none accepted says nothing. go-zero's; so are k, seconds, buckets.
ADAPTIVE_MINIMUM_CALLS = 5

ACCEPTED, NOT_ACCEPTED = (1,), (0,)     # what is added to the window


class _Throttle:
    """The decisions of an AdaptiveBreaker. now: seconds that do not run backwards; chance: from 0 up to 1, equally likely.

    free: 0, the permit of all, while all requests in the window were accepted: whatever of them grows too old then, nothing is
    rejected, so nobody needs to ask; else None.
    """

    __slots__ = ("k", "minimum_calls", "probe_seconds", "window", "free", "generation", "forced", "probe_at", "probe_before",
                 "rejected", "probes", "ignored")

    def __init__(self, k, window, minimum_calls, probe_seconds):
        self.k, self.minimum_calls, self.probe_seconds = k, minimum_calls, probe_seconds
        self.window = window            # its calls: the requests; its total: those that were accepted
        self.free = self.generation = self.rejected = self.probes = self.ignored = 0
        self.forced = None              # the last permit that chance would not have given
        self.probe_at = self.probe_before = -math.inf       # when the next one goes through, whatever chance says

    def probability(self):
        """Of a rejection, as of the window's last change: SRE book, equation 21-1."""
        requests = self.window.calls
        if requests < self.minimum_calls:
            return 0.0
        return max(0.0, (requests - self.k * self.window.totals[0]) / (requests + 1))

    def advance(self, now):
        """Let what is too old go."""
        window = self.window
        window.advance(now)
        self.free = 0 if window.calls == window.totals[0] else None

    def ask(self, now, chance):
        """A permit, for give_back(), or None: rejected, which counts as a request."""
        self.advance(now)
        if self.free is not None:
            return self.free
        generation = self.generation + 1
        if self.window.calls > self.k * self.window.totals[0] and chance < self.probability():      # the first half saves 0.1 µs
            if now < self.probe_at:
                self.window.add(NOT_ACCEPTED, now)
                self.rejected += 1
                return None
            self.probes += 1
            self.forced = generation
        self.generation = generation
        self.probe_before, self.probe_at = self.probe_at, now + self.probe_seconds
        return generation

    def ended(self, now, accepted):
        """A request that was let through has been accepted, or not."""
        if not accepted:
            self.advance(now)
            if self.free is not None:                   # until now all went through
                self.free, self.generation, self.probe_at = None, self.generation + 1, now + self.probe_seconds
        self.window.add(ACCEPTED if accepted else NOT_ACCEPTED, now)

    def give_back(self, generation):
        """A request that was let through says nothing: if none was after it, it is as if it had not been let through."""
        if generation == self.generation:
            self.probe_at = self.probe_before


class AdaptiveBreaker(_Breaker):
    """Rejects about as much as the dependency does not accept, in proportion: the client's throttle of the SRE book, chapter 21.

    Of `requests` in the last `seconds`, `accepts` were accepted; the next one is rejected with a probability of

        max(0, (requests - k * accepts) / (requests + 1))

    What is rejected here is a request as well. So a dependency that takes x requests a second, whatever is asked of it, gets
    k * x: with k=1.5 one that fails for two that do not.

    k=1.5               a smaller one spares the dependency, a greater one finds sooner that it takes more; the book has 2
    seconds=10.0        what is older counts no more; in `buckets` (40) of equal length
    probe_seconds=1.0   whatever chance says, a call goes through if for so long none has
    minimum_calls=5     with fewer requests none is rejected
    clock, random       functions: seconds of a clock, and a number from 0 up to 1

    failures, ignored, failure_result: which ends are failures, as CircuitBreaker's: those were not accepted. A call counts once
    it has ended; so what is ignored or cancelled never counts, and if it was the last to go through, the next one may probe.
    Ways in: as CircuitBreaker's. BreakerOpen has as retry_after the time until a call is forced through.

    Events: "success", "failure", each with `seconds`, "failure" with `error` too (None if it was a result); "ignored" with
    `error`; "rejected" with `probability`, `retry_after`; "probe", forced through, with `probability`.
    """

    def __init__(self, *, k=1.5, seconds=10.0, buckets=40, probe_seconds=1.0, minimum_calls=ADAPTIVE_MINIMUM_CALLS,
                 failures=Exception, ignored=Rejected, failure_result=None, clock=flowcoro.now, random=random.random, name=None):
        said = "AdaptiveBreaker("
        super().__init__(name, said, failures, ignored, failure_result, clock, random)
        _number(seconds, MIN_WINDOW_SECONDS, MAX_SECONDS, f"{said}seconds=", "seconds")
        _count(buckets, 1, f"{said}buckets=", "buckets", MAX_BUCKETS)
        self._circuit = _Throttle(
            _number(k, 1, 1000, f"{said}k=", "requests for each that is accepted"), TimeWindow(seconds, buckets),
            _count(minimum_calls, 0, f"{said}minimum_calls=", "calls"),
            _number(probe_seconds, 0, MAX_SECONDS, f"{said}probe_seconds=", "seconds", exclusive=True))

    def _permit(self, key):
        circuit = self._circuit
        if circuit.free is not None:            # one read, as CircuitBreaker's
            return circuit.free
        chance = self._drawn()                  # not under the lock: a function of the caller's (P1)
        with self._lock:
            now = self._begin()
            permit = circuit.ask(now, chance)
            if permit is not None and permit != circuit.forced:
                return permit
            probability, retry_after = circuit.probability(), circuit.probe_at - now
            requests, accepts, seconds = circuit.window.calls, circuit.window.totals[0], circuit.window.seconds
        if permit is not None:
            if self._listeners:
                try:
                    self._tell("probe", key, probability=probability)
                except BaseException:           # of a listener that is interrupted
                    self._give_back(permit)
                    raise
            return permit
        if self._listeners:
            self._tell("rejected", key, probability=probability, retry_after=retry_after)
        raise BreakerOpen(f"{self.name}: {accepts} of {requests} requests were accepted in the last {seconds:g} s, so "
                          f"{probability:.0%} are rejected; in {retry_after:.3g} s one may try", self, retry_after)

    def _record(self, permit, started, failed, key=None, error=None):
        with self._lock:
            try:
                ended = self._clock()
                now = self._now(ended)
            except BaseException:               # of the clock
                self._give_back(permit)
                raise
            self._circuit.ended(now, not failed)
        if self._listeners:
            self._tell_end(key, failed, max(0.0, ended - started), error)

    def statistics(self):
        """A dict.

        "name"; "requests", "accepts": of the last `seconds`, those rejected among the requests; "probability": of a rejection.
        Never going back: "rejected", "probes", "ignored": how many, probes being those that were forced through.
        """
        with self._lock:
            circuit = self._circuit
            circuit.advance(self._now())
            return {"name": self.name, "requests": circuit.window.calls, "accepts": circuit.window.totals[0],
                    "probability": circuit.probability(), "rejected": circuit.rejected, "probes": circuit.probes,
                    "ignored": circuit.ignored}


# ---- rate limits ----------------------------------------------------------------------------------------------
# How many operations one key may have in a time. The decisions know keys and times, and nothing of tasks: take() says from when
# on an operation may go, and counts it if that is now.
#
#   GCRA            the generic cell rate algorithm (ITU-T I.371): for each key one time, when its bucket will be full again, the
#                   "theoretical arrival time" (TAT). Each operation moves it by its cost; one is let through if the bucket will
#                   not be more than `burst` away from full then. It is a token bucket that nobody has to fill.
#   sliding window  for each key the times of what was let through lately: never more than `rate` within any `per` seconds.
#
# GCRA's time is counted in units, rate / per of them in a second. A cost is then added exactly (1.0 is a multiple of what the
# last digit of a time is worth), where adding per / rate seconds again and again would be 5 % wrong for a million in a second
# at time.time(), and let only 9 of 10 go at a time.
#
# Keys are forgotten. One whose time has passed is as good as one that was never seen, so nothing is lost with it. A hand goes
# round all keys (as in the CLOCK algorithm for pages): for each that is new it looks at one, and at another if that one could
# go. So all are looked at again and again, at O(1) for each call. Where max_keys are there and none of the next has passed, the
# one of five that has used least, and so is nearest to it, goes early: it gets that again too soon. (Redis evicts the best of
# five too; a heap would cost as much memory as all the rest.) A flood of new keys so evicts its own: who is at his limit has
# used more than they.

# Calls that may wait for one key at a time, each in a task of some 3 KB.
MAX_WAITING = 1000

# Entries of one table. A dict that grows, or has had many come and go, moves all its entries at once: 23 ms for a million, and
# below half a millisecond for these. To find the table costs 40 ns.
_TABLE = 16_384

# Tables at most, whatever max_keys is, of 64 bytes each: those of 67 million keys. Beyond them tables grow larger.
_TABLES = 4096

# Keys that are looked at when one has to go early.
_SAMPLED = 5


class _States:
    """A state for each key, of which those go that say nothing, and early ones where there are more than max_keys.

    kept: a container of keys that do not go early. evicted: how many went early.
    """

    def __init__(self, max_keys, kept):
        self._max_keys, self._kept, self.evicted = max_keys, kept, 0
        self._mask = min(_TABLES, 1 << (max_keys // _TABLE).bit_length()) - 1
        self._tables = tuple({} for _ in range(self._mask + 1))
        self._order = collections.deque()           # each key once; the hand is at its left end

    def __len__(self):
        return len(self._order)

    def _weight(self, state, now):
        """How many units would be given away with it; 0 or less: none. now: as _add() has it."""
        raise NotImplementedError

    def _add(self, key, state, now):
        """Set the state of a key that has none."""
        order = self._order
        if len(order) >= self._max_keys:
            self._make_room(now)
        elif order and self._look(now) is None and order:
            self._look(now)
        order.append(key)
        self._tables[hash(key) & self._mask][key] = state

    def _look(self, now):
        """Forget the key at the hand, if that may be: None then. Else it is the last to be looked at again; its weight."""
        key = self._order.popleft()
        table = self._tables[hash(key) & self._mask]
        weight = self._weight(table[key], now)
        if weight <= 0:
            del table[key]
            return None
        self._order.append(key)
        return weight

    def _make_room(self, now):
        """Forget one key, early if need be."""
        order, lightest, best = self._order, 0, math.inf
        looks = min(_SAMPLED, len(order))
        for place in range(-looks, 0):              # where they will be in the end
            weight = self._look(now)
            if weight is None:
                return
            if weight < best and order[-1] not in self._kept:
                lightest, best = place, weight
        if lightest:
            key = order[lightest]
            del order[lightest]
            del self._tables[hash(key) & self._mask][key]
            self.evicted += 1


class _Gcra(_States):
    """State of a key: its TAT, in units."""

    def __init__(self, rate, per, burst, max_keys, kept):
        super().__init__(max_keys, kept)
        self._speed, self._burst = rate / per, burst

    def _weight(self, tat, now):
        return tat - now

    def take(self, key, cost, line, now):
        """The time from which on it may go, after those who wait in `line` (None: nobody). If that is not after now, it has
        gone, and is counted."""
        units = now * self._speed
        table = self._tables[hash(key) & self._mask]
        found = table.get(key)
        tat = units if found is None or found < units else found
        room = self._burst - cost if line is None else self._burst - cost - line.cost
        if tat <= units + room:                 # not tat - room <= units: what is rounded up in a sum stays there
            if found is None:
                self._add(key, tat + cost, units)
            else:
                table[key] = tat + cost
            return now
        return self._when(tat, room)

    def _when(self, tat, room):
        when = (tat - room) / self._speed
        while when * self._speed + room < tat:
            when = math.nextafter(when, math.inf)
        return when

    def look(self, key, line, now):
        """(whole units that may go now, when one more may, when all may)"""
        units, ahead = now * self._speed, 0 if line is None else line.cost
        tat = max(self._tables[hash(key) & self._mask].get(key, units), units)
        room = self._burst - 1 - ahead
        when = now if tat <= units + room else self._when(tat, room)
        return max(0, int(units + self._burst - ahead - tat)), when, max(now, self._when(tat, -ahead))


class _SlidingLog(_States):
    """State of a key: an array with the units that are in the window; the place of the oldest that is; then time and units of
    each that was let through, oldest first, 16 bytes for each.

    Those that are out of the window are taken out together, when they are an eighth: one by one, each check of a quota of a
    million moved 16 MB, which took 390 µs.
    """

    def __init__(self, rate, per, max_keys, kept):
        super().__init__(max_keys, kept)
        self._limit, self._per = rate, per

    def _weight(self, state, now):
        return state[0] if state[-2] + self._per > now else 0       # with what has passed since it was last asked

    def _state(self, key, now):
        """The state of a key without what is out of the window, or None; and how many units are in it."""
        state = self._tables[hash(key) & self._mask].get(key)
        if state is None:
            return None, 0
        place, end = int(state[1]), len(state)
        while place < end and state[place] + self._per <= now:
            state[0] -= state[place + 1]
            place += 2
        if place == end:                        # the last entry stays, for _weight(), and counts nothing
            state[-1], place = 0, end - 2
        if 8 * (place - 2) > end:
            del state[2:place]
            place = 2
        state[1] = place
        return state, state[0]

    def take(self, key, cost, line, now):
        """As _Gcra.take()."""
        state, used = self._state(key, now)
        if used + cost + (0 if line is None else line.cost) > self._limit:
            return self._when(state, used, cost, line, now)
        if state is None:
            self._add(key, array.array("d", (cost, 2, now, cost)), now)
            return now
        state[0] += cost
        if state[-2] == now:
            state[-1] += cost
        else:
            state.extend((now, cost))
        return now

    def _when(self, state, used, cost, line, now):
        """When there will be room, if each goes as soon as it may: those who wait first, and what they take comes back too.

        O(those who wait, and what the window has), so some 0.3 ms for 1,000 of them; only while somebody waits.
        """
        place, taken = 2 if state is None else int(state[1]), collections.deque()
        for units in (*(() if line is None else line.costs.values()), cost):
            while used + units > self._limit:
                if state is not None and place < len(state):
                    time, freed = state[place], state[place + 1]
                    place += 2
                else:
                    time, freed = taken.popleft()
                used -= freed
                now = max(now, time + self._per)
            used += units
            taken.append((now, units))
        return now

    def look(self, key, line, now):
        """As _Gcra.look()."""
        state, used = self._state(key, now)
        remaining = self._limit - int(used) - (0 if line is None else line.cost)
        last = self._when(state, used, 0, line, now)            # when the last of those who wait goes
        full = last + self._per if line is not None else state[-2] + self._per if used else now
        return max(0, remaining), self._when(state, used, 1, line, now), full


class _Line:
    """Those who wait for one key. The first of them sleeps until it may go, the others are parked behind it."""

    __slots__ = ("lot", "costs", "cost", "users", "led")

    def __init__(self):
        self.lot = flowcoro.ParkingLot("wait for a RateLimiter")
        self.costs = collections.OrderedDict()      # place -> cost; a dict takes O(n) to find its first, once many have gone
        self.cost = 0                               # their sum
        self.users = 0                              # calls that hold this line, waiting in it or about to
        self.led = False                            # whether its first is awake: one at most, or two would overtake each other


class RateState(typing.NamedTuple):
    """What a RateLimiter knows of a key. limit: units that may go at once at most; remaining: how many, whole ones, may now;
    retry_after: seconds until one may, 0.0 if now; reset: seconds until `limit` may."""

    limit: float
    remaining: int
    retry_after: float
    reset: float


class _Timed(Policy):
    """A policy with a clock."""

    def __init__(self, clock, name):
        super().__init__(name)
        self._clock = _checked_function(clock, f"{self.name}(clock=", "a function that returns seconds")
        # Time begins at 0 here, where it has most digits.
        self._offset = -_number(clock(), -math.inf, math.inf, f"{self.name}(clock={clock!r:.80} gave ", "seconds")
        self._last = 0.0

    def _now(self):
        """(the time here, what the clock says), in a step of its own. It stands still where the clock goes back (P4), or raises,
        which is reported: nothing may hang or leak for that."""
        try:
            raw = self._clock()
            now = raw + self._offset
        except Exception as error:
            flowcoro.report_error(error, f"the clock of {self.name!r} failed: time stands still", "flowcoro_resilience")
            return self._last, self._last - self._offset
        if not now >= self._last:
            if now == now:              # else the clock says nan
                self._offset = self._last - raw
            now = self._last
        self._last = now
        return now, raw


class RateLimiter(_Timed):
    """At most `rate` units in `per` seconds, for each key: `RateLimiter(100, per=60, key=lambda user, *_: user)`.

    algorithm: "gcra", a token bucket: `burst` units at once (by default what `per` seconds allow: who did not ask for a minute
    may ask for all of that minute), and then one each per / rate seconds; so in t seconds at most burst + rate · t / per.
    "sliding_window": never more than `rate`, an int, within any `per` seconds, for quotas that somebody else counts; costs are
    ints, and each key takes up to 18 · rate bytes.

    key: function of the operation's arguments; without it one limit is for all. cost: units of an operation, a number or a
    function of its arguments. max_keys: how many are remembered; beyond them the ones nearest to being free go. wait: seconds
    that a call waits at most, in its turn; 0: it is rejected at once. max_waiting: calls that wait for one key at a time. clock:
    function that gives seconds; while it raises, which is reported, time stands still.

    check(), acquire_nowait() and state_of() may be called in any thread, and outside of run(). Those that wait are tasks of one
    run at a time.

    Events: "rejected" (cost, retry_after), "waited" (cost, seconds), each with its key.
    """

    def __init__(self, rate, per=1.0, *, burst=None, algorithm="gcra", key=None, cost=1, max_keys=MAX_KEYS, wait=0.0,
                 max_waiting=MAX_WAITING, clock=flowcoro.now, name=None):
        super().__init__(clock, name)
        if key is not None:
            _checked_function(key, "RateLimiter(key=", "a function of the operation's arguments, or None")
        self.per = _number(per, 1e-9, 1e9, "RateLimiter(per=", "seconds")
        self._max_keys = _count(max_keys, 1, "RateLimiter(max_keys=", "keys")
        self._lines = {}                # key -> _Line, where somebody waits
        if algorithm == "gcra":
            self.rate = _number(rate, 1e-9, 1e9, "RateLimiter(rate=", "units")
            self.burst = max(1.0, self.rate) if burst is None else _number(burst, 1, 1e9, "RateLimiter(burst=", "units")
            self._states = _Gcra(self.rate, self.per, self.burst, max_keys, self._lines)
        elif algorithm != "sliding_window":
            raise ValueError(f'RateLimiter(algorithm={algorithm!r:.80}): "gcra" or "sliding_window"')
        elif burst is not None:
            raise ValueError(f'RateLimiter(burst={burst!r:.80}, algorithm="sliding_window"): all of `rate` may come at once '
                             "there; leave burst out")
        else:
            self.rate = self.burst = _count(rate, 1, "RateLimiter(rate=", "units of a sliding window")
            self._states = _SlidingLog(rate, self.per, max_keys, self._lines)
        self._key_of, self._cost = key, cost
        if callable(cost):
            _checked_function(cost, "RateLimiter(cost=", "a number of units, or a function of the operation's arguments")
        else:
            self._check_cost(cost)
        self._wait = _number(wait, 0, math.inf, "RateLimiter(wait=", "seconds")
        self._max_waiting = _count(max_waiting, 0, "RateLimiter(max_waiting=", "calls")
        if wait and not max_waiting:
            raise ValueError(f"RateLimiter(wait={wait!r:.80}, max_waiting=0): nobody may wait; give a max_waiting")
        self._allowed = self._rejected = self._waited = self._waiting = 0

    def _check_cost(self, cost):
        if isinstance(self._states, _SlidingLog):
            _count(cost, 1, f"{self.name}(cost=", "units")
        else:
            _number(cost, 0, math.inf, f"{self.name}(cost=", "units", exclusive=True)
        if cost > self.burst:
            raise ValueError(f"{self.name}(cost={cost!r}): more than {self.burst:g} units can never go at once, however long it "
                             "waits: ask for less, or raise the limit")

    def _seconds_until(self, when, now, raw):
        """So many that by the clock's own digits it is not before `when` after them."""
        seconds = when - now
        if seconds <= 0.0:
            return 0.0
        while raw + seconds + self._offset < when:
            seconds += math.ulp(max(abs(raw), seconds))
        return seconds

    def _take(self, key, cost, most):
        """0.0 if it could take them, else the seconds until it could: more than `most` are a rejection."""
        with self._lock:
            try:
                raw = self._clock()
                now = raw + self._offset
            except Exception:
                now = math.nan
            if now >= self._last:                       # else what _now() does, which is a call of 80 ns
                self._last = now
            else:
                now, raw = self._now()
            when = self._states.take(key, cost, self._lines.get(key) if self._lines else None, now)
            if when <= now:
                self._allowed += 1
                return 0.0
            seconds = when - now
            if raw + seconds + self._offset < when:
                seconds = self._seconds_until(when, now, raw)
            if seconds > most:
                self._rejected += 1
        if seconds > most and self._listeners:
            self._tell("rejected", key, cost=cost, retry_after=seconds)
        return seconds

    def check(self, key=None, cost=1):
        """Take `cost` units of a key, if they are there: 0.0 then, else the seconds after which they will be.

        A check exactly so much later succeeds, if nobody else takes them. ValueError for a cost that can never go, TypeError for
        what is none.
        """
        if cost != 1:
            self._check_cost(cost)
        return self._take(key, cost, 0.0)

    def acquire_nowait(self, key=None, cost=1):
        """As check(), but raises RateLimited, with those seconds as `retry_after`."""
        seconds = self.check(key, cost)
        if seconds:
            raise self._error(key, cost, seconds)

    def state_of(self, key=None):
        """The RateState of a key. Takes nothing."""
        with self._lock:
            now, raw = self._now()
            remaining, when, full = self._states.look(key, self._lines.get(key), now)
            return RateState(self.burst, remaining, self._seconds_until(when, now, raw), full - now)

    def _error(self, key, cost, seconds):
        whose = "" if key is None else f" for {key!r:.80}"
        return RateLimited(f"{self.name}: {self.rate:g} in {self.per:g} s{whose} are used up; {cost:g} more may go in "
                           f"{seconds:.3g} s", self, seconds)

    async def acquire(self, key=None, cost=1, wait=None):
        """Take `cost` units of a key, and wait for them if need be: who came first goes first.

        wait: seconds at most, by default the policy's. RateLimited, at once, if it is known that it would take longer, or if
        max_waiting calls wait for this key. Cancelled: nothing is taken, and those behind move up. Errors as check()'s.
        """
        most = self._wait if wait is None else _number(wait, 0, math.inf, f"{self.name}.acquire(wait=", "seconds")
        if cost != 1:
            self._check_cost(cost)
        await flowcoro.checkpoint_if_due()
        seconds = self._take(key, cost, most)
        if not seconds:
            return
        if seconds > most:
            raise self._error(key, cost, seconds)
        began = flowcoro.now()
        seconds = await self._wait_in_line(key, cost, most)
        if seconds:
            if self._listeners:
                self._tell("rejected", key, cost=cost, retry_after=seconds)
            raise self._error(key, cost, seconds)
        if self._listeners:
            self._tell("waited", key, cost=cost, seconds=flowcoro.now() - began)

    async def _wait_in_line(self, key, cost, most):
        """0.0 when it has got them, else in how many seconds it would have."""
        line, place, first = self._enter(key), object(), False
        try:
            first, seconds = await line.lot.park_unless(functools.partial(self._join, line, place, key, cost, most))
            while first and (seconds := self._go(line, place, key, cost)):
                await flowcoro.sleep(seconds)
            return seconds
        finally:
            self._leave(line, place, first)
            self._exit(line, key)

    def _enter(self, key):
        with self._lock:
            line = self._lines.get(key)
            if line is None:
                line = self._lines[key] = _Line()
            line.users += 1
            return line

    def _exit(self, line, key):
        with self._lock:
            line.users -= 1
            if not line.users:
                del self._lines[key]

    def _join(self, line, place, key, cost, most):
        """For park_unless(): None to wait behind others, else (whether it is the first, seconds until it could go)."""
        with self._lock:
            now, raw = self._now()
            when = self._states.take(key, cost, line, now)
            if when <= now:                             # between the look before and this one
                self._allowed += 1
                return False, 0.0
            seconds = self._seconds_until(when, now, raw)
            if seconds > most or len(line.costs) >= self._max_waiting:
                self._rejected += 1
                return False, seconds
            line.costs[place] = cost
            line.cost += cost
            self._waiting += 1
            if line.led:
                return None
            line.led = True
            return True, seconds

    @flowcoro.atomic
    def _go(self, line, place, key, cost):
        """0.0 if the first of a line may go: then it has left; else the seconds that it has to sleep."""
        with self._lock:
            now, raw = self._now()
            when = self._states.take(key, cost, None, now)
            if when > now:
                return self._seconds_until(when, now, raw)
            self._allowed += 1
            self._waited += 1
        self._leave(line, place, True)
        return 0.0

    @flowcoro.atomic
    def _leave(self, line, place, first):
        """If it is still in the line; after the first the next is woken. One that was cancelled while it was parked is no first,
        though its cost may be the oldest, until it runs and comes here: who was behind it may be awake by then."""
        with self._lock:
            cost = line.costs.pop(place, None)
            if cost is None:
                return
            line.cost = line.cost - cost if line.costs else 0
            self._waiting -= 1
        if first:                           # not under the lock: unpark() takes the kernel's guard, which comes before it
            line.led = line.lot.unpark(1, (True, 0.0)) > 0

    async def _run(self, call, proceed):
        _, args, kwargs = call.asked
        await self.acquire(None if self._key_of is None else self._key_of(*args, **kwargs),
                           self._cost(*args, **kwargs) if callable(self._cost) else self._cost)
        return await proceed()

    def statistics(self):
        """{"name", "allowed", "rejected": calls, "waited": of those allowed, "waiting": now, "keys": remembered, "max_keys",
        "evicted": keys that went early}"""
        return {"name": self.name, "allowed": self._allowed, "rejected": self._rejected, "waited": self._waited,
                "waiting": self._waiting, "keys": len(self._states), "max_keys": self._max_keys, "evicted": self._states.evicted}


# ---- concurrency limits ---------------------------------------------------------------------------------------
# How many operations may be under way at a time. Fixed, that is a bulkhead: what becomes slow holds so many places and no more.
# Adaptive, the limit follows from how long the operations take, as a TCP sender finds its window (Netflix concurrency-limits,
# whose constants these are, as of 2026). An algorithm is told of each call that has ended, and says the limit.
#
# Calls that wait are parked in one queue, and a place that becomes free is handed to who has waited longest, in the same atomic
# step: who comes later cannot take it first, and a place is either counted as running or free, never on its way.

# What a new duration counts in the mean of them, an eighth as in TCP's smoothed round-trip time (RFC 6298).
_SMOOTHING = 1 / 8

# Seconds that a call waits for a place at most where some may wait: Helidon's, whose limits are as these.
QUEUE_WAIT = 1.0


def _checked_limits(initial, least, most, whose):
    _count(least, 1, f"{whose}(least=", "calls")
    _count(most, least, f"{whose}(least={least}, most=", "calls")
    _count(initial, least, f"{whose}(least={least}, initial=", "calls")
    if initial > most:
        raise ValueError(f"{whose}(initial={initial}, most={most}): begin with no more than the most")


class AIMD:
    """A limit that grows by 1 for as many calls as it is, and is multiplied by `backoff` when one was dropped, or took longer
    than `timeout` seconds: additive increase, multiplicative decrease (Chiu and Jain, 1989; TCP Reno).

    It stays from `least` to `most`, and does not grow when less than half of it is used: nothing is known of more then. What was
    under way when it was lowered does not lower it again: one time of trouble is one step, as in TCP. (Netflix's takes a step
    for each call that was dropped, and one up for each that was not: for a server of 10 places that is asked for 20 a model has
    43 % of calls dropped, this one 0.6 %.)
    """

    def __init__(self, initial=20, *, least=20, most=200, backoff=0.9, timeout=5.0):
        _checked_limits(initial, least, most, "AIMD")
        self._least, self._most, self._estimate = least, most, float(initial)
        self._backoff = _number(backoff, 0.5, 0.999, "AIMD(backoff=", "parts of the limit that are left")
        self._timeout = _number(timeout, 0, math.inf, "AIMD(timeout=", "seconds", exclusive=True)
        self._lowered = -math.inf           # when

    @property
    def limit(self):
        """An int."""
        return int(self._estimate)

    def record(self, seconds, in_flight, dropped, now):
        """The limit after a call has ended. in_flight: how many were under way when it began, with it; now: seconds."""
        if dropped or seconds > self._timeout:
            if now - seconds >= self._lowered:
                self._estimate = max(self._least, self._estimate * self._backoff)
                self._lowered = now
        elif 2 * in_flight >= self._estimate:
            self._estimate = min(self._most, self._estimate + 1 / self._estimate)
        return int(self._estimate)


class Gradient2:
    """A limit that goes down when calls take longer than they do in the long run, and else grows by `queue_size`, smoothed.

    Once in `window` seconds in which at least `samples` calls have ended:

        gradient = tolerance · seconds in the long run / seconds in this window      from 0.5 to 1
        limit    = (1 - smoothing) · limit + smoothing · (gradient · limit + queue_size)

    from `least` to `most`, and not changed when less than half of it was used. The long run is an exponential mean of some
    `long_window` windows: ten minutes. It is lowered by 5 % for each window in which it is more than twice the short one, so that
    it comes down after a long overload. A call that was dropped counts by the time it took; one of less than 100 µs, which did
    nothing, not at all. (Without windows one slow call lowers the limit: a model with exponential times then does a quarter of
    what its server could, and nine tenths with them.)
    """

    def __init__(self, initial=20, *, least=20, most=200, smoothing=0.2, tolerance=1.5, long_window=600, queue_size=4,
                 window=1.0, samples=10):
        _checked_limits(initial, least, most, "Gradient2")
        self._least, self._most, self._estimate = least, most, float(initial)
        self._smoothing = _number(smoothing, 0, 1, "Gradient2(smoothing=", "parts of the new limit", exclusive=True)
        self._tolerance = _number(tolerance, 1, math.inf, "Gradient2(tolerance=", "times the long run")
        self._factor = 2 / (_count(long_window, 1, "Gradient2(long_window=", "windows") + 1)
        self._queue_size = _count(queue_size, 0, "Gradient2(queue_size=", "calls")
        self._window = _number(window, 0, math.inf, "Gradient2(window=", "seconds")
        self._samples = _count(samples, 1, "Gradient2(samples=", "calls")
        self._long, self._windows = 0.0, 0          # seconds; how many it is made of, up to 10: until then a plain mean
        self._calls = self._sum = self._in_flight = 0
        self._ends = -math.inf                      # when this window is over

    @property
    def limit(self):
        """An int."""
        return int(self._estimate)

    def record(self, seconds, in_flight, dropped, now):
        """As AIMD.record()."""
        if seconds >= 1e-4:
            self._calls += 1
            self._sum += seconds
            self._in_flight = max(self._in_flight, in_flight)
            if now > self._ends:
                if self._calls >= self._samples:
                    self._update(self._sum / self._calls, self._in_flight)
                self._calls = self._sum = self._in_flight = 0
                self._ends = now + self._window
        return int(self._estimate)

    def _update(self, short, in_flight):
        if self._windows < 10:
            self._windows += 1
            self._long += (short - self._long) / self._windows
        else:
            self._long += (short - self._long) * self._factor
        gradient = max(0.5, min(1.0, self._tolerance * self._long / short))
        if self._long > 2 * short:
            self._long *= 0.95
        if 2 * in_flight >= self._estimate:
            new = gradient * self._estimate + self._queue_size
            new = (1 - self._smoothing) * self._estimate + self._smoothing * new
            self._estimate = max(self._least, min(self._most, new))


# In place of a permit: the queue has no room.
_FULL = object()


class _Places:
    """A ConcurrencyLimiter's decisions. Who waits, and how many, the front knows, and says.

    A place is given only while fewer run than the limit: so more run only after it was lowered.
    """

    __slots__ = ("limit", "algorithm", "max_waiting", "running", "held", "allowed", "rejected", "waited", "timed_out")

    def __init__(self, limit, algorithm, max_waiting):
        self.limit, self.algorithm, self.max_waiting = limit, algorithm, max_waiting
        self.held = None            # seconds that a place is held on the mean
        self.running = self.allowed = self.rejected = self.waited = self.timed_out = 0

    def has_room(self):
        """Whether a place is free."""
        return self.running < self.limit

    def may_wait(self, waiting):
        """Whether one more may wait."""
        return waiting < self.max_waiting

    def give(self, waited=False):
        """A free place is given."""
        self.running += 1
        self.allowed += 1
        self.waited += waited

    def refuse(self, waiting, timed_out):
        """Somebody goes away; returns in how many seconds it may be worth while to ask again, or None."""
        self.rejected += 1
        self.timed_out += timed_out
        return None if self.held is None else self.held * (waiting + 1) / self.limit

    def take_back(self, seconds, in_flight, outcome, now):
        """A place was held for `seconds`. Returns an error of the algorithm, or None."""
        self.running -= 1
        self.held = seconds if self.held is None else self.held + (seconds - self.held) * _SMOOTHING
        if self.algorithm is not None and outcome != "ignored":
            try:
                self.limit = max(1, int(self.algorithm.record(seconds, in_flight, outcome == "dropped", now)))
            except Exception as error:                      # a class of the user's own (P5)
                return error
        return None


class _Permit:
    """A place that a call has, until release()."""

    __slots__ = ("_limiter", "_in_flight", "_began", "_released")

    def __init__(self, limiter, in_flight, began):
        self._limiter, self._in_flight, self._began, self._released = limiter, in_flight, began, False

    def release(self, outcome="done"):
        """Give it back. outcome, for an adaptive limit: "done"; "dropped": it took too long, or was refused there; "ignored": its
        time says nothing, as of one that was cancelled, or failed at once. RuntimeError the second time."""
        if outcome not in ("done", "dropped", "ignored"):
            raise ValueError(f'release({outcome!r:.80}): "done", "dropped" or "ignored"')
        self._limiter._release(self, outcome)


class ConcurrencyLimiter(_Timed):
    """At most `limit` operations at a time, a bulkhead; max_waiting others wait in turn for up to `wait` seconds (1 by default).

    limit: an int, or an algorithm that finds it: AIMD() or Gradient2(), or what has their `limit` and record(), one for each
    limiter. dropped: which ends of an operation tell an adaptive limit that it was too much: an exception type, a tuple of them,
    or a predicate of error or result; by default TimeoutError, also as one of an ExceptionGroup. Other errors, and cancelled
    calls, tell it nothing: so a Timeout belongs within the limiter. clock: function that gives seconds; while it raises, which is
    reported, time stands still. It belongs to the tasks of one run at a time, as a Semaphore does: threads beside them have no
    place here. An algorithm's record() is called within a decision: it waits for nothing.

    Besides try_execute() there are `async with limiter:`, and acquire(), whose permit has release(). LimitExceeded names as
    `retry_after` an estimate: how long places are held on the mean, for those who wait and this one, by the limit; None as long
    as none was given back.

    Events: "rejected" (retry_after, waited: seconds), "waited" (seconds), "limit_changed" (before, limit).
    """

    def __init__(self, limit, *, max_waiting=0, wait=None, dropped=None, clock=flowcoro.now, name=None):
        super().__init__(clock, name)
        algorithm = None
        if not isinstance(limit, (int, type)) and callable(getattr(limit, "record", None)):
            algorithm, limit = limit, limit.limit
        elif dropped is not None:
            raise ValueError(f"{self.name}({limit!r:.80}, dropped={dropped!r:.80}): a fixed limit does not depend on that; leave "
                             "it out, or give AIMD() or Gradient2()")
        self._places = _Places(_count(limit, 1, f"{self.name}(", "calls at a time"), algorithm,
                               _count(max_waiting, 0, f"{self.name}(max_waiting=", "calls"))
        if wait is not None and not max_waiting:
            raise ValueError(f"{self.name}(wait={wait!r:.80}, max_waiting=0): nobody may wait; give a max_waiting")
        self._wait = _number(QUEUE_WAIT if wait is None else wait, 0, math.inf, f"{self.name}(wait=", "seconds", exclusive=True)
        self._is_dropped = _test_error(TimeoutError if dropped is None else dropped, f"{self.name}(dropped=", self, True)
        self._lot = flowcoro.ParkingLot("wait for a ConcurrencyLimiter")
        self._entered = {}                      # task -> permits of its `async with`

    @property
    def limit(self):
        """How many may run at a time now."""
        return self._places.limit

    @flowcoro.atomic
    def set_limit(self, limit):
        """Change a fixed limit. If more run than that, they come to their end. ValueError for an adaptive one."""
        if self._places.algorithm is not None:
            raise ValueError(f"{self.name}.set_limit({limit!r}): {type(self._places.algorithm).__name__} says what it is")
        self._places.limit = _count(limit, 1, f"{self.name}.set_limit(", "calls at a time")
        self._admit()

    @flowcoro.atomic
    def _take(self):
        if not self._places.has_room():
            return None
        permit = _Permit(self, self._places.running + 1, self._now()[0])
        self._places.give()
        return permit

    def _admit(self):
        """Hand places that are free to those who have waited longest; within an atomic step."""
        while self._places.has_room() and self._lot:
            if self._lot.unpark(1, _Permit(self, self._places.running + 1, self._now()[0])):
                self._places.give(waited=True)

    def acquire_nowait(self):
        """A permit, at once, or LimitExceeded."""
        permit = self._take()
        if permit is None:
            raise self._rejection(0.0)
        return permit

    async def acquire(self, wait=None):
        """A permit, whose release() is called when the operation has ended; in turn, if it has to wait.

        wait: seconds at most, by default the policy's. LimitExceeded if max_waiting others wait already, at once, or when no
        place was free in that time. Cancelled: none is taken, and those behind move up.
        """
        most = self._wait if wait is None else _number(wait, 0, math.inf, f"{self.name}.acquire(wait=", "seconds")
        await flowcoro.checkpoint_if_due()
        permit = self._take()
        if permit is not None:
            return permit
        if not most or not self._places.may_wait(len(self._lot)):       # the latter is asked again below; here it costs no park
            raise self._rejection(0.0)
        began = flowcoro.now()
        with flowcoro.move_on_after(most):
            permit = await self._lot.park_unless(self._join)
        seconds = flowcoro.now() - began
        if permit is None or permit is _FULL:
            raise self._rejection(seconds, permit is None)
        if self._listeners:
            try:
                self._tell("waited", seconds=seconds)
            except BaseException:               # of a listener that is interrupted
                permit.release("ignored")
                raise
        return permit

    def _join(self):
        """For park_unless(): a permit, _FULL, or None to wait."""
        return self._take() or (None if self._places.may_wait(len(self._lot)) else _FULL)

    def _rejection(self, seconds, timed_out=False):
        error = self._refuse(f"; no place was free for {seconds:.3g} s" if seconds else "", timed_out)
        if self._listeners:
            self._tell("rejected", retry_after=error.retry_after, waited=seconds)
        return error

    @flowcoro.atomic
    def _refuse(self, why, timed_out):
        waiting, places = len(self._lot), self._places
        return LimitExceeded(f"{self.name}: {places.running} run and {waiting} wait; the limit is {places.limit} at a time, and "
                             f"{places.max_waiting} in the queue{why}", self, places.refuse(waiting, timed_out))

    def _release(self, permit, outcome):
        error, before, limit = self._give_back(permit, outcome)
        if error is not None:
            flowcoro.report_error(error, f"the algorithm of {self.name!r} failed: its limit stays", "flowcoro_resilience")
        if limit != before and self._listeners:
            self._tell("limit_changed", before=before, limit=limit)

    @flowcoro.atomic
    def _give_back(self, permit, outcome):
        """(an error of the algorithm, the limit before, after)"""
        if permit._released:
            raise RuntimeError(f"this permit of {self.name!r} was released already: one acquire(), one release()")
        permit._released = True
        now, before = self._now()[0], self._places.limit
        error = self._places.take_back(now - permit._began, permit._in_flight, outcome, now)
        self._admit()
        return error, before, self._places.limit

    def _outcome(self, end):
        """What an end, error or result, says to an adaptive limit."""
        if self._places.algorithm is None:
            return "ignored"
        return "dropped" if self._is_dropped(end) else "ignored" if isinstance(end, BaseException) else "done"

    async def _run(self, call, proceed):
        permit, outcome = await self.acquire(), "ignored"       # that of Cancelled
        try:
            result = await proceed()
            outcome = self._outcome(result)
            return result
        except Exception as error:
            outcome = self._outcome(error)
            raise
        finally:
            permit.release(outcome)

    async def __aenter__(self):
        permit = await self.acquire()
        self._entered.setdefault(flowcoro.current_task(), []).append(permit)
        return self

    async def __aexit__(self, kind, error, trace):
        permit, own = self._left(flowcoro.current_task())
        outcome = "ignored"
        try:
            if own and (error is None or isinstance(error, Exception)):
                outcome = self._outcome(error)
        finally:
            permit.release(outcome)

    @flowcoro.atomic
    def _left(self, task):
        """(a permit, whether it is the task's own). It may have none: another task may close an async generator."""
        own = task in self._entered
        task = task if own else next(iter(self._entered))
        permit = self._entered[task].pop()
        if not self._entered[task]:
            del self._entered[task]
        return permit, own

    def statistics(self):
        """{"name", "limit", "running", "waiting", "max_waiting": now, "allowed", "rejected": calls, "waited": of those allowed,
        "timed_out": of those rejected, "seconds": that a place is held on the mean, or None}"""
        places = self._places
        return {"name": self.name, "limit": places.limit, "running": places.running, "waiting": len(self._lot),
                "max_waiting": places.max_waiting, "allowed": places.allowed, "rejected": places.rejected,
                "waited": places.waited, "timed_out": places.timed_out, "seconds": places.held}


# ---- retry ----------------------------------------------------------------------------------------------------
# Who tries again makes load where there is too much of it already: three layers of three attempts each are 27 times the calls.
# So all that is made again, retries and hedges, draws on a budget, which is a share of the calls (Finagle's retry budget); and
# waits are drawn by chance, so that those who failed together do not come again together (Brooker).

# Of retries and hedges together: their share of the calls lately, how many a second there may be in any case, and seconds that
# "lately" is. Finagle's RetryBudget has the same, and Linkerd took them over.
BUDGET_RATIO, BUDGET_FLOOR, BUDGET_SECONDS = 0.2, 10.0, 10.0

# What a wait that was asked for (retry_after) is longer at most, as a share of it: all who are told "in 60 seconds" come within
# 15 seconds then, and not at once.
RETRY_AFTER_SPREAD = 0.25

JITTERS = ("full", "decorrelated", "none")


class _Backoff:
    """How long to wait before a thing is done again: longer each time, and by chance.

    first, most: seconds, of the first wait and of any at most. times: how much longer each is than the one before.
    jitter: "full", anything from 0 to that (Brooker: the fewest calls in all, and the least load at a time); "decorrelated", from
    `first` to three times the wait before, whatever `times` is; "none": just that.
    ValueError, TypeError for other settings, which are Retry's.
    """

    __slots__ = ("first", "most", "times", "jitter")

    def __init__(self, first=0.1, most=10.0, times=2.0, jitter="full"):
        self.first = _number(first, 0, math.inf, "Retry(first=", "seconds")
        self.most = _number(most, 0, math.inf, "Retry(most=", "seconds")
        self.times = _number(times, 1, math.inf, "Retry(times=", "times as long")
        if not self.first <= self.most < math.inf:
            raise ValueError(f"Retry(first={first!r}, most={most!r}): the longest wait is finite, and no less than the first")
        if jitter not in JITTERS:
            raise ValueError(f"Retry(jitter={jitter!r:.80}): give one of {', '.join(map(repr, JITTERS))}")
        self.jitter = jitter

    def next_delay(self, attempt, previous, chance):
        """Seconds to wait after an attempt. attempt: its number, from 1; previous: seconds that were waited before it, 0 before
        the first one; chance: from 0 to 1."""
        if self.jitter == "decorrelated":
            return min(self.most, self.first + chance * (3 * max(previous, self.first) - self.first))
        try:
            ceiling = min(self.most, self.first * self.times**(attempt - 1))
        except OverflowError:
            ceiling = self.most if self.first else 0.0
        return ceiling if self.jitter == "none" else chance * ceiling

    def not_before(self, delay, retry_after, chance):
        """`delay`, or longer if `retry_after` seconds are asked for: those at least, and by chance some more, unless there is no
        jitter."""
        if retry_after <= 0:
            return delay
        if self.jitter == "none":
            return max(delay, retry_after)
        return retry_after + max(delay, chance * RETRY_AFTER_SPREAD * retry_after)


class _BudgetWindow:
    """What a RetryBudget decides by: calls and repetitions of the last seconds."""

    __slots__ = ("ratio", "reserve", "window")

    def __init__(self, ratio, floor, seconds):
        self.ratio, self.reserve, self.window = ratio, floor * seconds, TimeWindow(seconds, 10, 2)

    def deposit(self, now):
        self.window.add((1, 0), now)

    def left(self, now):
        self.window.advance(now)
        calls, repetitions = self.window.totals
        return self.ratio * calls + self.reserve - repetitions

    def withdraw(self, now):
        if self.left(now) < 1:
            return False
        self.window.add((0, 1), now)
        return True


class RetryBudget:
    """How many calls may be made again, by all who share it: any number of Retry and Hedge, in any threads.

    In the last `seconds` (ten buckets, so 0.9 to 1 of them) repetitions may be `ratio` times the calls, and floor · seconds in
    any case. So a service that makes few calls may repeat them all, and one that makes many adds a fifth to the load, however
    bad it gets. A call that passes several policies with the same budget counts once. RetryBudget(floor=math.inf) has no limit.
    """

    def __init__(self, ratio=BUDGET_RATIO, floor=BUDGET_FLOOR, seconds=BUDGET_SECONDS, *, clock=flowcoro.now, name=None):
        self.name = type(self).__name__ if name is None else name
        ratio = _number(ratio, 0, 1000, "RetryBudget(ratio=", "repetitions for each call")
        floor = _number(floor, 0, math.inf, "RetryBudget(floor=", "repetitions a second")
        seconds = _number(seconds, 0, 3600, "RetryBudget(seconds=", "seconds", exclusive=True)
        if floor * seconds < 1 and not ratio:
            raise ValueError(f"RetryBudget(ratio=0, floor={floor:g}, seconds={seconds:g}) allows nothing: give a ratio, or a "
                             "floor of 1 / seconds or more; Retry(attempts=1) never repeats")
        self._lock = threading.RLock()
        _locked[id(self)] = self
        self._now = _steady(clock, "RetryBudget(clock=")
        self._window = _BudgetWindow(ratio, floor, seconds)
        self._counted = set()           # ids of the calls under way that have been counted
        self._withdrawn = self._refused = 0

    def deposit(self):
        """A call is made, for the first time."""
        with self._lock:
            self._window.deposit(self._now())

    def withdraw(self):
        """Whether a call may be made again; then it has been counted."""
        with self._lock:
            granted = self._window.withdraw(self._now())
            if granted:
                self._withdrawn += 1
            else:
                self._refused += 1
            return granted

    def _enter(self, call):
        """Count a call, unless a policy further out has. Whether it has been counted now, and is to leave."""
        number = id(call.asked)     # what is asked stays the same object on the whole way
        with self._lock:
            if number in self._counted:
                return False
            self._window.deposit(self._now())
            self._counted.add(number)
            return True

    def _leave(self, call):
        self._counted.discard(id(call.asked))       # one step for all threads by itself

    def statistics(self):
        """{"name", "calls", "repetitions": both lately; "left": how many more could be made now; "withdrawn", "refused": ever}"""
        with self._lock:
            left = self._window.left(self._now())
            calls, repetitions = self._window.window.totals
            return {"name": self.name, "calls": calls, "repetitions": repetitions, "left": left, "withdrawn": self._withdrawn,
                    "refused": self._refused}


def _checked_budget(budget, clock, whose):
    if budget is None:
        return RetryBudget(clock=clock, name=f"budget of {whose}")
    if not isinstance(budget, RetryBudget):
        raise TypeError(f"{whose}(budget={budget!r:.80}): give a RetryBudget, or None for one of its own; "
                        "RetryBudget(floor=math.inf) has no limit")
    return budget


def _checked_flag(value, said):
    """`value`, if it is a bool: any function is true, and would be taken for a yes."""
    if not isinstance(value, bool):
        raise TypeError(f"{said}{value!r:.80}): give True or False; what depends on the operation is its attribute `idempotent`")
    return value


def _retry_after_of(outcome):
    """Seconds that an error or a result asks to wait; 0 if it does not."""
    seconds = getattr(outcome, "retry_after", None)
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        return 0
    return float(seconds) if seconds < 1e300 else math.inf          # an int can be more than a float


def _chain(error):
    """An error, and what a traceback shows as the reasons for it."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _tell_of_attempts(error, earlier, policy, note):
    """Hang the errors of earlier attempts below the last one, as the first of all its reasons, and add a note to it.

    An error may be an object that is raised again and again, also by others: what this policy has said of it before is replaced.
    """
    try:
        root, said_before = error, False
        for link in _chain(error):
            if isinstance(link, ExceptionGroup) and getattr(link, "policy", None) is policy:
                said_before = True
                break
            root = link
        # Whatever has the root among its own reasons would make a circle.
        earlier = [one for one in {id(one): one for one in earlier}.values() if all(link is not root for link in _chain(one))]
        if earlier:
            group = ExceptionGroup(f"{policy.name}: attempts before", earlier)
            group.policy = policy
            root.__cause__ = group
        elif said_before:
            root.__cause__ = None
        notes = getattr(error, "__notes__", None)
        if notes:
            error.__notes__ = [one for one in notes if not str(one).startswith(f"{policy.name}: attempt ")]
        error.add_note(f"{policy.name}: attempt {note}")
    except Exception:           # of a frozen dataclass
        pass


async def _within(seconds, proceed, message):
    """What proceed() brings. TimeoutError(message()) if that is not there in time; its cause says where it was."""
    cut = None
    with flowcoro.move_on_after(seconds):
        try:
            return await proceed()
        except flowcoro.Cancelled as cancelled:
            cut = cancelled
            raise
    try:
        raise TimeoutError(message()) from cut
    finally:
        del cut                 # no circle through the traceback


class _Attempts:
    """The attempts of one call: what Retry decides by."""

    __slots__ = ("began", "deadline", "number", "delay")

    def __init__(self, began, total_seconds):
        self.began, self.deadline = began, began + total_seconds
        self.number = 1             # of the attempt under way
        self.delay = 0.0            # that was waited before it, but for what was asked for

    def may_repeat(self, most, backoff, max_wait, meant, safe, retry_after, chance, now):
        """(None, seconds to wait), or (why not, 0.0), after the attempt under way has ended.

        meant: whether what it brought is a reason to try again; safe: whether that does no harm.
        """
        if not meant:
            return "final", 0.0
        if self.number >= most:
            return "attempts", 0.0
        if not safe:
            return "unsafe", 0.0
        if retry_after > max_wait:
            return "wait", 0.0
        delay = backoff.next_delay(self.number, self.delay, chance)
        longer = backoff.not_before(delay, retry_after, chance)
        if now + longer >= self.deadline:
            return "deadline", 0.0
        self.number, self.delay = self.number + 1, delay
        return None, longer


class Retry(Policy):
    """Does it again when it fails, after a while.

        Retry(attempts=3, idempotent=True, attempt_seconds=2.0, total_seconds=10.0)

    attempts=3             at most, in all
    first=0.1, most=10.0   seconds that it waits after the first attempt, and at most …
    times=2.0              … each time so many times as long as before …
    jitter="full"          … of which by chance any part; "decorrelated": from `first` to three times the wait before; "none": all
    attempt_seconds=None   after which an attempt is cancelled, which ends it with a TimeoutError; None: no limit
    total_seconds=None     for all attempts and waits; no wait is begun after which no time would be left
    budget=None            a RetryBudget, which any number of policies share; None: one of its own, with the defaults
    errors=Exception       after which it tries again: a type, a tuple of them, a predicate, or None …
    ignored=Rejected       … but not after these: those who wait for a breaker within would come together when it closes, and
                           limits have a `wait` of their own. An ExceptionGroup is meant by `errors` if all its errors are, and by
                           `ignored` if one is
    result=None            a predicate of results that are no better than an error; the last one is returned
    idempotent=False       True: every operation may be done twice; else only what has the attribute `idempotent` is done again,
                           and what cannot have had an effect, because the error says so (`sent` is False)
    max_wait=30.0          seconds of a `retry_after`, which errors and results may have, that it waits at most; for more it ends
    clock, random          functions: seconds of a clock, and a number from 0 to 1

    Raises the last error itself, with a note which attempt it was, and those of the attempts before below it. Cancelled: ends at
    once, in an attempt as while waiting; nothing is left. Results of attempts that are made again are let go of (`discard`).

    Events: "retried" {attempt, delay, outcome}, "recovered" {attempts}, "gave_up" {attempts, reason, outcome}. Reasons: "final",
    not among `errors`; "attempts", all made; "unsafe", perhaps not to be done twice; "wait", more than max_wait; "deadline", no
    time for more; "budget", none left.
    """

    def __init__(self, attempts=3, *, first=0.1, most=10.0, times=2.0, jitter="full", attempt_seconds=None, total_seconds=None,
                 budget=None, errors=Exception, ignored=Rejected, result=None, idempotent=False, max_wait=30.0,
                 clock=flowcoro.now, random=random.random, name=None):
        super().__init__(name)
        self._attempts = _count(attempts, 1, "Retry(attempts=", "attempts in all")
        self._backoff = _Backoff(first, most, times, jitter)
        self._attempt_seconds = math.inf if attempt_seconds is None else _number(
            attempt_seconds, 0, math.inf, "Retry(attempt_seconds=", "seconds", exclusive=True)
        self._total_seconds = math.inf if total_seconds is None else _number(
            total_seconds, 0, math.inf, "Retry(total_seconds=", "seconds", exclusive=True)
        if self._attempt_seconds > self._total_seconds and attempt_seconds is not None:
            raise ValueError(f"Retry(attempt_seconds={attempt_seconds!r}, total_seconds={total_seconds!r}): no attempt can have "
                             "more time than all have together")
        self._limit = min(self._attempt_seconds, self._total_seconds)       # seconds that the first attempt has
        self._max_wait = _number(max_wait, 0, math.inf, "Retry(max_wait=", "seconds")
        self._is_error = _test_error(errors, "Retry(errors=", self)
        self._is_ignored = _test_error(ignored, "Retry(ignored=", self, True)
        self._is_bad = None if result is None else _test(result, "Retry(result=", self)
        self._random = _checked_function(random, "Retry(random=", "a function that gives a number from 0 to 1, as random.random")
        self._idempotent, self._now = _checked_flag(idempotent, "Retry(idempotent="), _steady(clock, "Retry(clock=")
        self._budget = _checked_budget(budget, clock, "Retry")
        self._calls = self._retries = self._recovered = 0
        self._gave_up = {}              # reason -> how often

    @property
    def budget(self):
        """The RetryBudget."""
        return self._budget

    async def _run(self, call, proceed):
        counted = self._budget._enter(call)
        earlier, last, limit = [], None, self._limit
        try:
            with self._lock:
                self._calls += 1
                attempts = _Attempts(self._now(), self._total_seconds)
            while True:
                number, last = attempts.number, None
                try:
                    result = await (proceed() if limit == math.inf else _within(
                        limit, proceed, functools.partial(self._late, number, limit)))
                except Exception as error:
                    reason, delay = self._after(attempts, call, error, self._is_error(error) and not self._is_ignored(error))
                    if reason is not None:
                        self._give_up(attempts, call, error, reason, earlier)
                        raise
                    last = error
                    earlier.append(error)
                else:
                    if self._is_bad is None or not self._is_bad(result):
                        if number > 1:
                            self._recover(attempts, call)
                        return result
                    reason, delay = self._after(attempts, call, result, True)
                    if reason is not None:
                        self._give_up(attempts, call, result, reason)
                        return result
                    await call.drop(result, self)
                    del result
                if attempts.deadline < math.inf:
                    delay = min(delay, max(0.0, self._left(attempts)))      # less, if to let go of a result took its time
                await flowcoro.sleep(delay)
                if attempts.deadline < math.inf:
                    limit = min(self._attempt_seconds, self._left(attempts))
                    if limit <= 0:      # the clock went faster than the sleep
                        last = TimeoutError(self._late(number + 1, limit)) if last is None else earlier.pop()
                        attempts.number = number
                        self._give_up(attempts, call, last, "deadline", earlier)
                        raise last
        finally:
            del earlier, last       # no circles through the tracebacks
            if counted:
                self._budget._leave(call)

    def _left(self, attempts):
        with self._lock:
            return attempts.deadline - self._now()

    def _late(self, number, limit):
        if limit < self._attempt_seconds:
            return f"{self.name}: total_seconds={self._total_seconds:g} are over, in attempt {number} of {self._attempts}"
        return f"{self.name}: attempt {number} of {self._attempts} was not done within attempt_seconds={limit:g}"

    def _after(self, attempts, call, outcome, meant):
        """(None, seconds until the next attempt), or (why there is none, 0.0)."""
        safe = self._idempotent or call.idempotent or getattr(outcome, "sent", None) is False
        retry_after, chance = _retry_after_of(outcome), min(max(0.0, self._random()), 1.0)      # in this order nan is 0
        with self._lock:
            reason, delay = attempts.may_repeat(self._attempts, self._backoff, self._max_wait, meant, safe, retry_after, chance,
                                                self._now())
        if reason is None and not self._budget.withdraw():
            reason, attempts.number = "budget", attempts.number - 1
        if reason is None:
            with self._lock:
                self._retries += 1
            if self._listeners:
                self._tell("retried", call.key, attempt=attempts.number - 1, delay=delay, outcome=outcome)
        return reason, delay

    def _recover(self, attempts, call):
        with self._lock:
            self._recovered += 1
        if self._listeners:
            self._tell("recovered", call.key, attempts=attempts.number)

    def _give_up(self, attempts, call, outcome, reason, earlier=None):
        """earlier: the errors before, if the outcome is an error."""
        with self._lock:
            self._gave_up[reason] = self._gave_up.get(reason, 0) + 1
            passed = self._now() - attempts.began
        if earlier is not None and (reason != "final" or attempts.number > 1):
            why = {"unsafe": "; not made again, as it may have had an effect: Retry(idempotent=True), or an attribute "
                             "`idempotent` of the operation, says that this does no harm",
                   "wait": f"; it asks to wait {_retry_after_of(outcome):g} s, and max_wait={self._max_wait:g}",
                   "deadline": f"; no time is left for more of total_seconds={self._total_seconds:g}",
                   "budget": f"; {self._budget.name!r} is spent"}.get(reason, "")
            _tell_of_attempts(outcome, earlier, self,
                              f"{attempts.number} of {self._attempts}, after {round(passed, 3):g} s{why}")
        if self._listeners:
            self._tell("gave_up", call.key, attempts=attempts.number, reason=reason, outcome=outcome)

    def statistics(self):
        """{"name", "calls", "retries", "recovered": calls that brought something good after a retry, "gave_up": {reason: calls},
        "budget": its statistics()}"""
        with self._lock:
            numbers = {"name": self.name, "calls": self._calls, "retries": self._retries, "recovered": self._recovered,
                       "gave_up": dict(self._gave_up)}
        return {**numbers, "budget": self._budget.statistics()}


# ---- hedge ----------------------------------------------------------------------------------------------------
# One call in twenty is slow for no fault of its own: a queue, a pause, a lost packet. To ask once more when the first has taken
# longer than nineteen in twenty do costs a twentieth more calls, and such a call is slow only if both are (Dean and Barroso).

# The percentile of latencies after which a second attempt begins, and of how many latencies at most.
HEDGE_PERCENTILE, HEDGE_WINDOW = 0.95, 1000


class LatencyWindow:
    """A percentile of the last `size` latencies, to within 9 %, in O(1) and some 3 KB.

    Each latency goes into one of 256 buckets, eight for each doubling, from a microsecond to 72 minutes. A ring says which are
    the last ones; `_at` is the bucket that the percentile is in, and moves by a step or two for each latency. Within a bucket
    latencies are taken to be spread evenly.
    """

    __slots__ = ("percentile", "size", "calls", "_ring", "_place", "_counts", "_at", "_below")

    def __init__(self, percentile=HEDGE_PERCENTILE, size=HEDGE_WINDOW):
        self.percentile = _number(percentile, 0, 1, "LatencyWindow(percentile=", "calls in one", exclusive=True)
        self.size = _count(size, 1, "LatencyWindow(size=", "latencies")
        self._ring, self._counts = bytearray(size), [0] * 256
        self.calls = self._place = self._at = 0
        self._below = 0                 # how many are in buckets below _at

    def add(self, seconds):
        """A latency."""
        bucket = int(min(255.0, 8 * math.log2(seconds * 1e6))) if seconds > 1e-6 else 0
        counts, at = self._counts, self._at
        if self.calls == self.size:
            oldest = self._ring[self._place]
            counts[oldest] -= 1
            self._below -= oldest < at
        else:
            self.calls += 1
        self._ring[self._place] = bucket
        self._place = (self._place + 1) % self.size
        counts[bucket] += 1
        below = self._below + (bucket < at)
        rank = math.ceil(self.percentile * self.calls)
        while below >= rank:
            at -= 1
            below -= counts[at]
        while below + counts[at] < rank:
            below += counts[at]
            at += 1
        self._at, self._below = at, below

    def value(self):
        """Seconds; math.inf if there is none yet."""
        if not self.calls:
            return math.inf
        part = (math.ceil(self.percentile * self.calls) - self._below) / self._counts[self._at]
        return 1e-6 * 2**(self._at / 8) * (1 + part * (2**0.125 - 1))


# (state, what an attempt brings) -> state, of the call. An attempt fails "last" if no other runs, or may begin.
RACE = {
    ("running", "success"): "won",
    ("running", "failure"): "running",
    ("running", "last failure"): "lost",
    ("running", "fatal"): "lost",
    **{(over, event): over for over in ("won", "lost") for event in ("success", "failure", "last failure", "fatal")},
}


class _Race:
    """The attempts of one call: what Hedge decides by."""

    __slots__ = ("state", "most", "started", "failed", "result", "errors", "hurry", "began", "ended", "first_failed")

    def __init__(self, most, began):
        self.state = "running"
        self.most, self.started, self.failed = most, 1, 0
        self.result = None
        self.errors = []            # (number of the attempt, error), until it is over
        self.hurry = None           # the Event that begins the next attempt before its time
        self.began, self.ended, self.first_failed = began, None, False

    def succeeds(self, now):
        """Whether this is the first success."""
        before, self.state = self.state, RACE[self.state, "success"]
        if before == self.state:
            return False
        self.ended = now
        return True

    def fails(self, number, error, fatal):
        """Whether that ends it."""
        self.failed += 1
        self.first_failed |= number == 1
        before = self.state
        self.state = RACE[before, "fatal" if fatal else "last failure" if self.failed == self.most else "failure"]
        if before == "running":
            self.errors.append((number, error))
        return before != self.state

    def may_start(self):
        return self.state == "running" and self.started < self.most

    def starts(self):
        """The number of the attempt that begins now."""
        self.started += 1
        return self.started

    def starts_no_more(self):
        """The budget is spent: what runs is all there will be."""
        self.most = self.started
        if self.failed == self.most:
            self.state = RACE[self.state, "last failure"]       # which it was, as is known now


class Hedge(Policy):
    """Makes a second attempt when the first takes long, and takes what comes first; the other one is cancelled, and joined.

        Hedge(after=0.05, idempotent=True)        Hedge(percentile=0.95, idempotent=True)

    after: seconds until the next attempt begins. percentile: so long as that share of the last `window` calls has taken at most;
    no call is hedged before there were `minimum` (as many that one is longer: 20 for 0.95), or until then `after`, if that is
    given too. Neither: percentile=0.95. max_hedges: attempts besides the first. budget: as Retry has it; no attempt is begun that
    it does not allow. errors: after which another attempt is worth while, as in Retry; then the next begins at once; any other
    error ends the call, whatever still runs (gRPC's hedging: non-fatal and fatal). idempotent: as in Retry; what may not be done
    twice is called once, and not hedged. clock: function that says the time.

    The first success is what it brings. If all fail, the last error is raised, with the others below it. A result that comes as
    another has won is let go of (`discard`). Cancelled: all attempts are cancelled and joined; only if one had won by then, what
    it has brought is returned, and the next checkpoint raises. TaskCancelled if all have cancelled themselves. The first attempt
    runs in the task that calls, others in tasks of their own, with a copy of the context as it was when the call began.
    BaseExceptions that are no Cancelled end all.

    Of the first attempt of each call the latency counts, and if another has won, the time until then, which is less than it would
    have been, and longer than the percentile: so that stays what it is. Errors do not count.

    Events: "hedged" {attempt, after: seconds since the call began}, "won" {attempt}, if that is not the first, "refused" by the
    budget, "lost" {attempts, error}.
    """

    def __init__(self, after=None, *, percentile=None, window=HEDGE_WINDOW, minimum=None, max_hedges=1, budget=None,
                 errors=Exception, ignored=None, idempotent=False, clock=flowcoro.now, name=None):
        super().__init__(name)
        self._delay = math.inf if after is None else _number(after, 0, math.inf, "Hedge(after=", "seconds")
        self._latencies, self._minimum = None, math.inf
        if percentile is None and after is None:
            percentile = HEDGE_PERCENTILE
        if percentile is not None:
            if not _number(percentile, 0, 1, "Hedge(percentile=", "calls in one", exclusive=True) < 1:
                raise ValueError(f"Hedge(percentile={percentile!r}): no call takes longer than all: give less than 1, as 0.95")
            self._latencies = LatencyWindow(percentile, _count(window, 1, "Hedge(window=", "latencies"))
            if minimum is None:
                minimum = min(window, math.ceil(round(1 / (1 - percentile), 6)))
            self._minimum = _count(minimum, 1, "Hedge(minimum=", "latencies")
            if minimum > window:
                raise ValueError(f"Hedge(minimum={minimum}, window={window}): there are never so many latencies in the window")
        elif minimum is not None:
            raise ValueError(f"Hedge(after={after!r}, minimum={minimum!r}): that is for a percentile, and there is none")
        self._most = 1 + _count(max_hedges, 1, "Hedge(max_hedges=", "attempts besides the first")
        self._is_error = _test_error(errors, "Hedge(errors=", self)
        self._is_ignored = _test_error(ignored, "Hedge(ignored=", self, True)
        self._idempotent, self._now = _checked_flag(idempotent, "Hedge(idempotent="), _steady(clock, "Hedge(clock=")
        self._budget = _checked_budget(budget, clock, "Hedge")
        self._calls = self._unsafe = self._hedges = self._won = self._refused = self._lost = 0

    @property
    def budget(self):
        """The RetryBudget."""
        return self._budget

    @property
    def delay(self):
        """Seconds after which the next attempt begins now; math.inf: it does not."""
        latencies = self._latencies
        with self._lock:
            return latencies.value() if latencies is not None and latencies.calls >= self._minimum else self._delay

    async def _run(self, call, proceed):
        counted, safe = self._budget._enter(call), self._idempotent or call.idempotent
        try:
            with self._lock:
                self._calls += 1
                self._unsafe += not safe
                race, delay = _Race(self._most, self._now()), self.delay
            if delay == math.inf or not safe:
                result = await proceed()
                self._measure(race)
                return result
            return await self._hedged(call, proceed, race, delay)
        finally:
            if counted:
                self._budget._leave(call)

    async def _hedged(self, call, proceed, race, delay):
        race.hurry = flowcoro.Event()
        try:
            try:
                async with flowcoro.TaskGroup() as group:
                    group.spawn(self._next(race, group, call, proceed, delay), name=f"{self.name}: attempt 2")
                    await self._attempt(1, race, group, call, proceed)
            except flowcoro.Cancelled:
                if race.state != "won":     # else what has come is not lost, and the next checkpoint raises
                    raise
            except BaseException:
                if race.state == "won":
                    await call.drop(race.result, self)
                raise
            if race.state == "won":
                self._measure(race)
                return race.result
            if not race.errors:
                raise flowcoro.TaskCancelled(f"{self.name}: all attempts have cancelled themselves")
            raise self._lose(call, race)
        finally:
            race.errors = race.result = None        # no circles through the tracebacks

    async def _next(self, race, group, call, proceed, delay):
        """The next attempt, when it is time for it."""
        with flowcoro.move_on_after(delay):
            await race.hurry.wait()
        with self._lock:
            if not race.may_start():
                return
        granted = self._budget.withdraw()
        with self._lock:
            if not granted:
                self._refused += 1
                race.starts_no_more()
            elif race.may_start():
                race.hurry = flowcoro.Event()
                self._hedges += 1
                number, after = race.starts(), self._now() - race.began
            else:
                return
        if not granted:
            if self._listeners:
                self._tell("refused", call.key)
            return
        if self._listeners:
            self._tell("hedged", call.key, attempt=number, after=after)
        if number < race.most:
            group.spawn(self._next(race, group, call, proceed, delay), name=f"{self.name}: attempt {number + 1}")
        await self._attempt(number, race, group, call, proceed)

    async def _attempt(self, number, race, group, call, proceed):
        try:
            result = await proceed()
        except Exception as error:
            fatal = not self._is_error(error) or self._is_ignored(error)
            with self._lock:
                over, hurry = race.fails(number, error, fatal), race.hurry
            if over:
                group.cancel()
            else:
                hurry.set()
            return
        with self._lock:
            won = race.succeeds(self._now())
            if won:
                race.result = result
                self._won += number > 1
        if won:
            group.cancel()
            if number > 1 and self._listeners:
                self._tell("won", call.key, attempt=number)
        else:
            await call.drop(result, self)

    def _measure(self, race):
        """Count the latency of the first attempt."""
        if self._latencies is not None and not race.first_failed:
            with self._lock:
                ended = self._now() if race.ended is None else race.ended
                self._latencies.add(ended - race.began)

    def _lose(self, call, race):
        """The error to be raised."""
        with self._lock:
            self._lost += 1
            passed = self._now() - race.began
        *earlier, (number, error) = race.errors
        _tell_of_attempts(error, [one for _, one in earlier], self, f"{number} of {race.most}, after {round(passed, 3):g} s")
        if self._listeners:
            self._tell("lost", call.key, attempts=race.started, error=error)
        return error

    def statistics(self):
        """{"name", "calls", "unsafe": how many of them may not be done twice, and so are not hedged; "delay": seconds, math.inf
        if calls are not hedged now; "hedges": attempts besides the first; "won": by these; "refused": by the budget; "lost":
        calls of which all attempts failed; "budget": its statistics()}"""
        with self._lock:
            numbers = {"name": self.name, "calls": self._calls, "unsafe": self._unsafe, "delay": self.delay,
                       "hedges": self._hedges, "won": self._won, "refused": self._refused, "lost": self._lost}
        return {**numbers, "budget": self._budget.statistics()}


# ---- timeout and fallback -------------------------------------------------------------------------------------

class Timeout(Policy):
    """Cancels what is not done within `seconds`, and raises a TimeoutError that names the policy and the limit; the error's cause
    says where it was cancelled. What comes to its end at that moment all the same is not lost.

    Outside of a Retry it is for all attempts together (Retry's own total_seconds is better: it does not begin what cannot end in
    time), inside for each. Code that never awaits is not interrupted. Cancelled: so is the operation, and nothing is counted.

    Events: "timed_out" {seconds}.
    """

    def __init__(self, seconds, *, name=None):
        super().__init__(name)
        self._seconds = _number(seconds, 0, math.inf, "Timeout(seconds=", "seconds", exclusive=True)
        self._calls = self._timed_out = 0

    async def _run(self, call, proceed):
        with self._lock:
            self._calls += 1

        def message():
            with self._lock:
                self._timed_out += 1
            if self._listeners:
                self._tell("timed_out", call.key, seconds=self._seconds)
            return f"{self.name}: it was not done within {self._seconds:g} s"

        return await _within(self._seconds, proceed, message)

    def statistics(self):
        """{"name", "seconds", "calls", "timed_out": how many}"""
        with self._lock:
            return {"name": self.name, "seconds": self._seconds, "calls": self._calls, "timed_out": self._timed_out}


class Fallback(Policy):
    """Gives something else instead of an error: Fallback([]), Fallback(lambda error: …).

    instead: what to give; a function, async or not, is given the error, and what it brings is given (a function that is itself
    to be given: lambda error: function). errors: of which: an exception type, a tuple of them, or a predicate; an ExceptionGroup
    is of a type if all its errors are.

    An error of the function is raised, with the first one as its context. Cancelled is no error.

    Events: "fell_back" {error}, "failed" {error: the function's}.
    """

    def __init__(self, instead, *, errors=Exception, name=None):
        super().__init__(name)
        if inspect.iscoroutine(instead):
            instead.close()             # else it would warn that it was never awaited
            raise TypeError("Fallback() got a coroutine object, which can be awaited once: give the async function of an error")
        self._instead = instead
        self._is_error = _test_error(errors, "Fallback(errors=", self)
        self._calls = self._fell_back = self._failed = 0

    async def _run(self, call, proceed):
        with self._lock:
            self._calls += 1
        try:
            return await proceed()
        except Exception as error:
            if not self._is_error(error):
                raise
            with self._lock:
                self._fell_back += 1
            if self._listeners:
                self._tell("fell_back", call.key, error=error)
            if not callable(self._instead):
                return self._instead
            return await self._other(call, error)       # in here, so that an error of it has this one as its context

    async def _other(self, call, error):
        try:
            return await _invoke(self._instead, (error,), {})
        except Exception as failure:
            with self._lock:
                self._failed += 1
            if self._listeners:
                self._tell("failed", call.key, error=failure)
            raise

    def statistics(self):
        """{"name", "calls", "fell_back": how many, "failed": of these, how often the function did}"""
        with self._lock:
            return {"name": self.name, "calls": self._calls, "fell_back": self._fell_back, "failed": self._failed}


# ---- cache ----------------------------------------------------------------------------------------------------
# A call that several want is made once, in a task of its own, the *flight*: not in the task of who came first, for then the
# deadline of the least patient would be everybody's, and after it the next one would begin anew. The flight is cancelled, and
# joined, when the last of those who wait for it has left, so nothing is left of it; only a refresh, which nobody waits for, goes
# on by itself, until the run ends at the latest.

# Results that a Cache keeps at most, unless it is told: they can be of any size, and a thousand of 10 KB are 10 MB.
CACHE_KEYS = 1024

# Seconds from a refresh that has failed to the next one of the same key: who is asked for a stale value a thousand times a
# second asks a server that is down once.
REFRESH_PAUSE = 1.0

_NOTHING = object()


class _Entry:
    """What is kept for a key: the last value, the last error, and when they came."""

    __slots__ = ("value", "made", "error", "failed")

    def __init__(self):
        self.value, self.made = _NOTHING, -math.inf
        self.error, self.failed = None, -math.inf


class _Freshness:
    """What a Cache decides by."""

    __slots__ = ("seconds", "stale_seconds", "stale_if_error", "negative_seconds")

    def __init__(self, seconds, stale_seconds, stale_if_error, negative_seconds):
        self.seconds, self.stale_seconds = seconds, stale_seconds
        self.stale_if_error, self.negative_seconds = stale_if_error, negative_seconds

    def look(self, entry, now):
        """What to do for who asks now: give the value ("hit", "stale", "stale_if_error"), raise the error ("negative"), or call
        ("miss")."""
        if entry is None:
            return "miss"
        age = now - entry.made
        if age < self.seconds:
            return "hit"
        if age < self.seconds + self.stale_seconds:
            return "stale"
        if entry.error is None or now - entry.failed >= self.negative_seconds:
            return "miss"
        return "stale_if_error" if age < self.seconds + self.stale_if_error else "negative"

    def wants_refresh(self, entry, now):
        """Whether a stale value is to be had anew, if that is not under way."""
        return now - entry.failed >= max(REFRESH_PAUSE, self.negative_seconds)

    def serves_instead(self, entry, now):
        """Whether the old value is given instead of an error that has come now."""
        return entry is not None and now - entry.made < self.seconds + self.stale_if_error


class _Flight:
    """A call that is under way for a key."""

    __slots__ = ("kernel", "task", "ended", "over", "waiters", "refresh", "value", "error", "traceback", "old", "kept")

    def __init__(self, kernel, refresh):
        self.kernel, self.refresh = kernel, refresh
        self.task = None            # there before who has begun it awaits anything
        self.ended = flowcoro.Event()
        self.over = False
        self.waiters = 0            # it is cancelled when the last one has left, unless it is a refresh
        self.value = _NOTHING
        self.error = self.traceback = None      # neither value nor error in the end: it was cancelled
        self.old = False            # the value is an old one, instead of an error
        self.kept = False           # the value is in the cache


class Cache(Policy):
    """Keeps results, and makes a call that several want at a time once.

        Cache(60, stale_seconds=30, stale_if_error=3600, key=lambda city: city.lower())

    seconds: how long a result is given again; 0: only calls at the same time share one; math.inf: for ever. key: function of the
    operation's arguments that says what is asked; without it that is the operation itself with its arguments, all hashable
    (1, 1.0 and True are the same, as everywhere), so give the function and not a lambda made for each call. The attribute `key`
    of an operation says where a call goes, not what is asked, and does not count here. stale_seconds: for so long after `seconds`
    the old result is given, and a new one is fetched in the background (RFC 5861, stale-while-revalidate). stale_if_error: for so
    long after `seconds` the old result is given if the call fails (RFC 5861). negative_seconds: for so long an error is given
    again. errors: those that the last two are for: an exception type, a tuple of them, a predicate. max_keys: beyond them, what
    was not asked for longest goes. clock: function that says the time.

    The call is made in a task of its own, with the context of who came first. Its result, or error, goes to all who wait for it.
    Cancelled: who waits leaves, and only the last one to leave cancels and joins the call. A refresh belongs to the run, at most
    one for each key; an error of it is reported, and there is no other one for a second. TaskCancelled if the call has cancelled
    itself; RuntimeError if it asks for its own key; TypeError for what cannot be a key. Results are shared: do not change them.
    Only one that nobody gets is let go of (`discard`): policies further out in the same Pipeline, or in one around
    it, let go of none.

    Events, with the key: "hit", "miss", "shared", "stale", "stale_if_error", "negative", as in statistics(); "refreshed",
    "failed" {error, refresh: whether it was one}, "evicted".
    """

    _shares = True

    def __init__(self, seconds, *, key=None, stale_seconds=0.0, stale_if_error=0.0, negative_seconds=0.0, errors=Exception,
                 max_keys=CACHE_KEYS, clock=flowcoro.now, name=None):
        super().__init__(name)
        given = {"seconds": seconds, "stale_seconds": stale_seconds, "stale_if_error": stale_if_error,
                 "negative_seconds": negative_seconds}
        self._rules = _Freshness(*(_number(value, 0, math.inf, f"Cache({what}=", "seconds") for what, value in given.items()))
        if seconds == math.inf and (stale_seconds or stale_if_error):
            raise ValueError(f"Cache(seconds=inf, stale_seconds={stale_seconds!r}, stale_if_error={stale_if_error!r}): what is "
                             "kept for ever is never stale")
        if key is not None:
            _checked_function(key, "Cache(key=", "a function of the operation's arguments, or None")
        self._key_of, self._max_keys = key, _count(max_keys, 1, "Cache(max_keys=", "keys")
        self._is_error, self._now = _test_error(errors, "Cache(errors=", self), _steady(clock, "Cache(clock=")
        self._entries = {}              # key -> _Entry; the one asked for last is the last
        self._flights = {}              # key -> _Flight, that who comes now joins
        self._counts = dict.fromkeys(("hit", "miss", "shared", "stale", "stale_if_error", "negative", "refreshed", "failed",
                                      "evicted"), 0)

    def key_of(self, operation, /, *args, **kwargs):
        """The key of a call, for invalidate(). TypeError if it is not hashable. operation: the function, or what this cache has
        made of it as its decorator: a method as Class.method, with the object as the first of its arguments."""
        link = operation
        while link is not None:
            if getattr(link, "policy", None) is self:
                operation = link.__wrapped__
            link = getattr(link, "__wrapped__", None)
        return self._key(operation, args, kwargs)

    def _key(self, operation, args, kwargs):
        key = self._key_of(*args, **kwargs) if self._key_of is not None else (
            operation, args, frozenset(kwargs.items())) if kwargs else (operation, args)
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(f"{self.name}: {key!r:.80} cannot be a key: {error}. Give Cache(key=function of the operation's "
                            "arguments)") from None
        return key

    async def _run(self, call, proceed):
        operation, args, kwargs = call.asked
        key = self._key(operation, args, kwargs)
        kind, kept, flight, begun = self._look(key, flowcoro.current_kernel())
        if begun is not None:
            self._launch(begun, key, call, proceed)
        if self._listeners:
            self._tell(kind, key)
        if kind == "negative":
            raise kept.with_traceback(None)
        return await self._join(flight, key, call) if flight is not None else kept

    def _look(self, key, kernel):
        """(what it is, the value or error that is kept, the flight to join, the flight to begin)"""
        begun = kept = None
        with self._lock:
            now, entry, flight = self._now(), self._entries.pop(key, None), self._flights.get(key)
            if entry is not None:
                self._entries[key] = entry
            if flight is not None and flight.kernel is not kernel:
                flight = None               # in another thread, or a run that is over: it cannot be awaited here
            kind = self._rules.look(entry, now)
            if kind == "miss":
                if flight is None:
                    flight = begun = self._flights[key] = _Flight(kernel, False)
                else:
                    kind = "shared"
                flight.waiters += 1
            else:
                if kind == "stale" and flight is None and self._rules.wants_refresh(entry, now):
                    begun = self._flights[key] = _Flight(kernel, True)
                kept, flight = entry.error if kind == "negative" else entry.value, None
            self._counts[kind] += 1
        return kind, kept, flight, begun

    # -- flights

    def _launch(self, flight, key, call, proceed):
        try:
            flight.task = flowcoro.spawn(self._fly(flight, key, call, proceed), name=f"{self.name}: {key!r:.80}")
        except BaseException:           # the run ends
            self._land(flight, key, False)
            raise

    async def _fly(self, flight, key, call, proceed):
        failure, value = False, _NOTHING
        try:
            value = flight.value = await proceed()
        except Exception as error:
            flight.error, flight.traceback = error, error.__traceback__
            failure = self._is_error(error)
        finally:
            self._land(flight, key, failure)
        if value is not _NOTHING and not flight.kept and not flight.waiters:
            await call.drop(value, self)

    def _land(self, flight, key, failure):
        """The flight is over. failure: whether it has brought an error that the settings speak of."""
        evicted, error, broken = None, flight.error, None
        with self._lock:
            flight.over, current = True, self._flights.get(key) is flight
            if current:                                 # else it was invalidated, or everybody has left
                del self._flights[key]
            try:
                now = self._now()
            except Exception as failed:                 # nothing is kept, and nobody waits for ever
                current, broken = False, failed
            if current:
                entry = self._entries.get(key)
                if error is None and flight.value is not _NOTHING:
                    evicted = self._keep(key, flight.value, None, now)
                    flight.kept = True
                elif failure:
                    if entry is not None or self._rules.negative_seconds:
                        evicted = self._keep(key, _NOTHING, error if self._rules.negative_seconds else None, now)
                    if self._rules.serves_instead(entry, now):
                        flight.value, flight.old = entry.value, True
            if error is not None:
                self._counts["failed"] += 1
            elif flight.refresh:
                self._counts["refreshed"] += flight.value is not _NOTHING
            alone = not flight.waiters
            if alone:
                flight.error = flight.traceback = None          # no circle through the traceback
        flight.ended.set()
        if broken is not None:
            flowcoro.report_error(broken, f"the clock of {self.name!r} failed: what has come for {key!r:.80} is not kept",
                                  "flowcoro_resilience")
        if alone and error is not None:
            flowcoro.report_error(error, f"the call of {self.name!r} for {key!r:.80} failed, and nobody waited for it",
                                  "flowcoro_resilience")
        if self._listeners:
            if error is not None:
                self._tell("failed", key, error=error, refresh=flight.refresh)
            elif flight.refresh and flight.value is not _NOTHING:
                self._tell("refreshed", key)
            if evicted is not None:
                self._tell("evicted", evicted[0])

    def _keep(self, key, value, error, now):
        """(a key that has to go,), or None."""
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry()
        if value is not _NOTHING:
            entry.value, entry.made, entry.error, entry.failed = value, now, None, -math.inf
        else:
            entry.error, entry.failed = error, now
        if len(self._entries) <= self._max_keys:
            return None
        evicted = next(iter(self._entries))
        del self._entries[evicted]
        self._counts["evicted"] += 1
        return (evicted,)

    async def _join(self, flight, key, call):
        """What the flight brings, for one that has been counted among its waiters."""
        try:
            if flight.task is flowcoro.current_task():
                raise RuntimeError(f"{self.name}: the call for {key!r:.80} asks for that key itself, and would wait for ever")
            await flight.ended.wait()
        except BaseException:
            await self._leave_early(flight, key, call)
            raise
        with self._lock:
            flight.waiters -= 1
            error, traceback = flight.error, flight.traceback
            if not flight.waiters:
                flight.error = flight.traceback = None      # no circle through the traceback
            if flight.old:
                self._counts["stale_if_error"] += 1
        try:
            if flight.old and self._listeners:
                self._tell("stale_if_error", key)
            if flight.value is not _NOTHING:
                return flight.value
            if error is None:
                raise flowcoro.TaskCancelled(f"{self.name}: the call for {key!r:.80} was cancelled")
            raise error.with_traceback(traceback)
        finally:
            del error, traceback

    async def _leave_early(self, flight, key, call):
        with self._lock:
            flight.waiters -= 1
            if flight.waiters or flight.refresh and not flight.over:
                return
            over, flight.error, flight.traceback = flight.over, None, None
            if not over and self._flights.get(key) is flight:
                del self._flights[key]
        if over:
            if flight.value is not _NOTHING and not (flight.kept or flight.old):
                await call.drop(flight.value, self)
            return
        flight.task.cancel()
        with flowcoro.CancelScope(shield=True):
            try:
                await flight.task
            except flowcoro.TaskCancelled:
                pass

    # -- what is kept

    def invalidate(self, key):
        """Forget what is kept for a key (see key_of()); a call that is under way goes on for those who wait for it, and is not
        kept, and who comes later makes another. Whether there was anything. From any thread."""
        with self._lock:
            entry, flight = self._entries.pop(key, None), self._flights.pop(key, None)
        return entry is not None or flight is not None

    def clear(self):
        """Forget all, as invalidate() does."""
        with self._lock:
            self._entries.clear()
            self._flights.clear()

    def statistics(self):
        """{"name", "keys", "max_keys", "under_way": calls; and how often: "hit"; "miss": a call was made; "shared": somebody
        waited for the call of another; "stale", "stale_if_error": an old value was given; "negative": an error again;
        "refreshed"; "failed": calls; "evicted": keys}"""
        with self._lock:
            return {"name": self.name, "keys": len(self._entries), "max_keys": self._max_keys, "under_way": len(self._flights),
                    **self._counts}


# ---- keyed ----------------------------------------------------------------------------------------------------

class Keyed(Policy):
    """One policy for each key, made when it is first asked for: `Keyed(lambda key: CircuitBreaker(name=f"to {key}"))`.

    make: function of a key that gives a Policy. key: function of the operation's arguments that gives the key; without it the
    operation has the attribute `key` (HttpClient and RpcClient give theirs: where the request goes). max_keys: beyond them the
    one that was not used for longest goes, of those in which nothing is under way; if something is under way in all of them, the
    call is Rejected. TypeError for an operation without a key. What `make` and `key` raise comes out of the call.

    keyed[key] is the policy of a key, made if there is none: for `async with keyed[host]:`, say, or to load() a state.

    Events: "created", "evicted", "rejected". Listeners hear what the policies within say as well, which names their own `policy`.
    """

    def __init__(self, make, *, key=None, max_keys=MAX_KEYED, name=None):
        super().__init__(name)
        self._make = _checked_function(make, "Keyed(", "a function of a key that makes a policy")
        self._key_of = None if key is None else _checked_function(key, "Keyed(key=", "a function of the operation's arguments")
        self._max_keys = _count(max_keys, 1, "Keyed(max_keys=", "keys")
        # key -> [policy, calls under way]. Of those in `_idle` the one that was not used for longest is the first: found at once,
        # however many are in use.
        self._idle, self._busy = collections.OrderedDict(), {}
        self._evicted = 0

    async def _run(self, call, proceed):
        if self._key_of is not None:
            _, args, kwargs = call.asked
            call = call._replace(key=self._key_of(*args, **kwargs))
        key = call.key
        if key is None:
            if self._key_of is not None:
                raise TypeError(f"{self.name}: the function key={self._key_of!r:.80} gave None: give a key")
            raise TypeError(f"{self.name}: the operation has no key: give Keyed(key=function of its arguments), or an operation "
                            "with an attribute `key`")
        entry = self._enter(key)
        try:
            return await entry[0]._run(call, proceed)
        finally:
            self._leave(key, entry)

    def _enter(self, key):
        """The entry of a key, with one more under way."""
        entry = self._taken(key)
        if entry is not None:
            return entry
        policy = self._make(key)            # not under the lock (P1)
        if not isinstance(policy, Policy):
            raise TypeError(f"{self.name}: the function that makes policies gave {policy!r:.80} for {key!r:.80}: give a Policy")
        policy._forward_to(self._hear)
        with self._lock:
            entry = self._taken(key)
            if entry is not None:           # somebody has made one meanwhile, and that one counts
                return entry
            is_full, evicted = len(self._idle) + len(self._busy) >= self._max_keys, None
            if is_full and self._idle:
                evicted, _ = self._idle.popitem(last=False)
                self._evicted += 1
            if not is_full or evicted is not None:
                entry = self._busy[key] = [policy, 1]
        if entry is None:
            if self._listeners:
                self._tell("rejected", key)
            raise Rejected(f"{self.name}: {self._max_keys} keys are in use at once, and max_keys={self._max_keys}: raise it",
                           self)
        try:
            if evicted is not None and self._listeners:
                self._tell("evicted", evicted)
            if self._listeners:
                self._tell("created", key)
        except BaseException:               # of a listener that is interrupted
            self._leave(key, entry)
            raise
        return entry

    def _taken(self, key):
        """The entry of a key that there is a policy for, with one more under way; or None."""
        with self._lock:
            entry = self._busy.get(key)
            if entry is None:
                entry = self._idle.pop(key, None)
                if entry is None:
                    return None
                self._busy[key] = entry
            entry[1] += 1
            return entry

    def _leave(self, key, entry):
        with self._lock:
            entry[1] -= 1
            if not entry[1]:
                self._idle[key] = self._busy.pop(key)

    def __getitem__(self, key):
        entry = self._enter(key)
        self._leave(key, entry)
        return entry[0]

    def get(self, key):
        """The policy of a key, or None: it is not made."""
        with self._lock:
            entry = self._busy.get(key) or self._idle.get(key)
        return None if entry is None else entry[0]

    def keys(self):
        """The keys that there are policies for: the one that was not used for longest first, those in use at the end."""
        with self._lock:
            return [*self._idle, *self._busy]

    def statistics(self):
        """{"name", "keys", "max_keys", "evicted": how many, "policies": {key: statistics()}}"""
        with self._lock:
            policies = {key: entry[0] for key, entry in (*self._idle.items(), *self._busy.items())}
        return {"name": self.name, "keys": len(policies), "max_keys": self._max_keys, "evicted": self._evicted,
                "policies": {key: policy.statistics() for key, policy in policies.items()}}


# ---- pipeline -------------------------------------------------------------------------------------------------

class Pipeline(Policy):
    """Several policies as one, the outermost first, as they are written:

        Pipeline(Fallback(…), Timeout(10), Retry(…), CircuitBreaker(…), ConcurrencyLimiter(…), Timeout(2))

    Read it from left to right, as a call goes: 10 seconds for all attempts, each of which asks the breaker, waits for a place,
    and has 2 seconds; the breaker counts what each attempt brings, and Retry does not go on when it rejects. resilience4j wraps
    its decorators in the same order. A policy may stand in several pipelines, which then share its state: one breaker for each
    dependency.

    Events: those of its policies.
    """

    def __init__(self, *policies, name=None):
        super().__init__(name)
        for policy in policies:
            if not isinstance(policy, Policy):
                raise TypeError(f"Pipeline(… {policy!r:.80} …): give policies, the outermost first")
        self._shares = any(policy._shares for policy in policies)
        self._policies = policies

    async def _run(self, call, proceed):
        for policy in reversed(self._policies):
            proceed = functools.partial(policy._run, call, proceed)
            if policy._shares and call.discard is not None:
                call = call._replace(discard=None)          # for those further out: what others have too is not let go of
        return await proceed()

    @property
    def policies(self):
        """A tuple, the outermost first."""
        return self._policies

    def add_listener(self, listener):
        """As Policy.add_listener(), of each policy, once."""
        for policy in dict.fromkeys(self._policies):
            policy.add_listener(listener)
        return listener

    def _forward_to(self, listener):
        for policy in self._policies:
            policy._forward_to(listener)

    def remove_listener(self, listener):
        """As Policy.remove_listener(), of each policy."""
        for policy in dict.fromkeys(self._policies):
            policy.remove_listener(listener)

    def statistics(self):
        """{"name", "policies": [statistics() of each]}"""
        return {"name": self.name, "policies": [policy.statistics() for policy in self._policies]}

    def __repr__(self):
        return f"<Pipeline {' > '.join(str(policy.name) for policy in self._policies)}>"
