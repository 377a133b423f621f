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

Contents: constants · errors · policies · windows · circuit breaker · adaptive breaker · rate limits · concurrency limits ·
retry · hedge · timeout and fallback · cache · keyed · pipeline

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

import functools
import inspect
import math
import random
import threading
import typing

import flowcoro

__version__ = "0.1.0"

__all__ = ["Policy", "PolicyEvent", "CountWindow", "TimeWindow", "Keyed", "Pipeline", "Rejected", "BreakerOpen", "RateLimited",
           "LimitExceeded",
           "Backoff", "Retry", "RetryBudget", "LatencyWindow", "Hedge", "Timeout", "Fallback", "Cache"]

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


async def _invoke(operation, args, kwargs):
    """What an operation brings, async or not."""
    result = operation(*args, **kwargs)
    return await result if hasattr(result, "__await__") else result


class _Call(typing.NamedTuple):
    """What the policies of one call are told of it."""

    key: object
    idempotent: bool
    discard: object             # or None
    asked: object = None        # (operation, args, kwargs), for policies that look at them; None: not told

    async def drop(self, result, policy):
        """Let go of a result that nobody will get. Its own task is not cancelled meanwhile; an error is reported."""
        if self.discard is not None:
            with flowcoro.CancelScope(shield=True):
                try:
                    await _invoke(self.discard, (result,), {})
                except Exception as error:
                    flowcoro.report_error(error, f"a result that {policy.name!r} does not need could not be let go of",
                                          "flowcoro_resilience")


def _call_of(operation, asked=None):
    return _Call(getattr(operation, "key", None), bool(getattr(operation, "idempotent", False)),
                 getattr(operation, "discard", None), asked)


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
        asked = (operation, args, kwargs)
        return await self._run(_call_of(operation, asked), functools.partial(_invoke, *asked))

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


def _test(what, said, policy):
    """A function that says whether an error, or a result, is meant: by a type, a tuple of them, or a predicate. None: none is.

    A predicate that raises means no, and is reported (P5).
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
            flowcoro.report_error(error, f"the predicate {said}…) of {policy.name!r} failed, which means no",
                                  "flowcoro_resilience")
            return False

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
        oldest, self._ring[self._place] = self._ring[self._place], counts
        self._place = (self._place + 1) % self.size
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

    def clear(self):
        """Forget all."""
        self.__init__(self.size, len(self.totals))


class TimeWindow:
    """Sums over the last `seconds`, in `buckets` of equal length: the oldest bucket goes as a whole, so what is summed is
    between seconds · (buckets - 1) / buckets and `seconds` old. add() and advance() cost O(1), after a pause O(buckets).

    totals, calls: as CountWindow's, as of the last add() or advance(). A `now` before the last one is taken for the last one.
    """

    __slots__ = ("seconds", "calls", "totals", "_buckets", "_length", "_epoch")

    def __init__(self, seconds, buckets=10, counters=1):
        self.seconds = _number(seconds, 0, math.inf, "TimeWindow(seconds=", "seconds", exclusive=True)
        self._length = self.seconds / _count(buckets, 1, "TimeWindow(buckets=", "buckets")
        self.totals = [0] * counters
        self.calls = 0
        self._buckets = [[0] * (counters + 1) for _ in range(buckets)]      # the sums, and the number of calls last
        self._epoch = None              # the number of the bucket that `now` is in, counted from the clock's zero

    def advance(self, now):
        """Let what is too old go."""
        epoch = now // self._length
        if self._epoch is None:
            self._epoch = epoch
        passed = epoch - self._epoch
        if passed <= 0:
            return
        buckets, totals, size = self._buckets, self.totals, len(self._buckets)
        for step in range(1, int(min(passed, size)) + 1):
            bucket = buckets[int((self._epoch + step) % size)]
            if bucket[-1]:
                for place in range(len(totals)):
                    totals[place] -= bucket[place]
                self.calls -= bucket[-1]
                bucket[:] = [0] * len(bucket)
        self._epoch = epoch

    def add(self, counts, now):
        """counts: a tuple with one number for each counter; now: seconds of one clock."""
        if self._epoch != now // self._length:
            self.advance(now)
        bucket = self._buckets[int(self._epoch % len(self._buckets))]
        totals = self.totals
        for place, count in enumerate(counts):
            if count:
                totals[place] += count
                bucket[place] += count
        bucket[-1] += 1
        self.calls += 1

    def clear(self):
        """Forget all."""
        self.__init__(self.seconds, len(self._buckets), len(self.totals))


# ---- circuit breaker ------------------------------------------------------------------------------------------


# ---- adaptive breaker -----------------------------------------------------------------------------------------


# ---- rate limits ----------------------------------------------------------------------------------------------


# ---- concurrency limits ---------------------------------------------------------------------------------------


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


def _steady(read, said):
    """A function that gives what `read()` does as long as that goes forwards, and stands still while it does not (P4).

    It is called under the policy's lock: threads that were late would make it stand still. A closure, which is 50 ns faster than
    a method.
    """
    if not callable(read):
        raise TypeError(f"{said}{read!r:.80}): give a function that returns seconds")
    last, offset = -math.inf, 0.0

    def steady():
        nonlocal last, offset
        now = read() + offset
        if now < last:
            offset += last - now
            return last
        last = now
        return now

    return steady


class Backoff:
    """How long to wait before a thing is done again: longer each time, and by chance.

    first, most: seconds, of the first wait and of any at most. times: how much longer each is than the one before.
    jitter: "full", anything from 0 to that (Brooker: the fewest calls in all, and the least load at a time); "decorrelated", from
    `first` to three times the wait before, whatever `times` is; "none": just that.
    ValueError, TypeError for other settings.
    """

    __slots__ = ("first", "most", "times", "jitter")

    def __init__(self, first=0.1, most=10.0, times=2.0, jitter="full"):
        self.first = _number(first, 0, math.inf, "Backoff(first=", "seconds")
        self.most = _number(most, 0, math.inf, "Backoff(most=", "seconds")
        self.times = _number(times, 1, math.inf, "Backoff(times=", "times as long")
        if not self.first <= self.most < math.inf:
            raise ValueError(f"Backoff(first={first!r}, most={most!r}): the longest wait is finite, and no less than the first")
        if jitter not in JITTERS:
            raise ValueError(f"Backoff(jitter={jitter!r:.80}): give one of {', '.join(map(repr, JITTERS))}")
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
        number = id(call.asked or call)     # what is asked stays the same object on the whole way
        with self._lock:
            if number in self._counted:
                return False
            self._counted.add(number)
            self._window.deposit(self._now())
            return True

    def _leave(self, call):
        self._counted.discard(id(call.asked or call))       # one step for all threads by itself

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


def _retry_after_of(outcome):
    """Seconds that an error or a result asks to wait; 0 if it does not."""
    seconds = getattr(outcome, "retry_after", None)
    return seconds if isinstance(seconds, (int, float)) and seconds > 0 else 0


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

    attempts: at most, in all. first, most, times, jitter: how long it waits in between, as Backoff has them. attempt_seconds:
    after which an attempt is cancelled, which ends it with a TimeoutError. total_seconds: for all attempts and waits; no wait is
    begun after which there would be no time left. budget: a RetryBudget, which any number of policies share; None: one of its
    own, with the defaults. errors: after which it tries again: an exception type, a tuple of them, a predicate, or None; ignored:
    after which of these not. result: a predicate of results that are no better than an error; the last one is returned.
    idempotent: True says that every operation may be done twice; else only what has the attribute `idempotent` is, and what
    cannot have had an effect, because the error says so (`sent` is False, as Rejected has it). max_wait: seconds of a
    `retry_after`, which errors and results may have, that it waits at most; if more is asked for, it ends. clock: function that
    says the time; random: function that gives a number from 0 to 1.

    Raises the last error itself, with a note which attempt it was, and those of the attempts before below it. Cancelled: ends at
    once, in an attempt as while waiting; nothing is left. Results of attempts that are made again are let go of (`discard`).

    Events: "retried" {attempt, delay, outcome}, "recovered" {attempts}, "gave_up" {attempts, reason, outcome}. Reasons: "final",
    not among `errors`; "attempts", all made; "unsafe", perhaps not to be done twice; "wait", more than max_wait; "deadline", no
    time for more; "budget", none left.
    """

    def __init__(self, attempts=3, *, first=0.1, most=10.0, times=2.0, jitter="full", attempt_seconds=None, total_seconds=None,
                 budget=None, errors=Exception, ignored=None, result=None, idempotent=False, max_wait=30.0, clock=flowcoro.now,
                 random=random.random, name=None):
        super().__init__(name)
        self._attempts = _count(attempts, 1, "Retry(attempts=", "attempts in all")
        self._backoff = Backoff(first, most, times, jitter)
        self._attempt_seconds = math.inf if attempt_seconds is None else _number(
            attempt_seconds, 0, math.inf, "Retry(attempt_seconds=", "seconds", exclusive=True)
        self._total_seconds = math.inf if total_seconds is None else _number(
            total_seconds, 0, math.inf, "Retry(total_seconds=", "seconds", exclusive=True)
        if self._attempt_seconds > self._total_seconds and attempt_seconds is not None:
            raise ValueError(f"Retry(attempt_seconds={attempt_seconds!r}, total_seconds={total_seconds!r}): no attempt can have "
                             "more time than all have together")
        self._limit = min(self._attempt_seconds, self._total_seconds)       # seconds that the first attempt has
        self._max_wait = _number(max_wait, 0, math.inf, "Retry(max_wait=", "seconds")
        self._is_error, self._is_ignored = _test(errors, "Retry(errors=", self), _test(ignored, "Retry(ignored=", self)
        self._is_bad = None if result is None else _test(result, "Retry(result=", self)
        if not callable(random):
            raise TypeError(f"Retry(random={random!r:.80}): give a function that gives a number from 0 to 1, as random.random")
        self._idempotent, self._random, self._now = bool(idempotent), random, _steady(clock, "Retry(clock=")
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
        retry_after, chance = _retry_after_of(outcome), self._random()
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

    __slots__ = ("state", "most", "started", "failed", "winner", "result", "errors", "hurry", "began", "ended", "first_failed")

    def __init__(self, most, began):
        self.state = "running"
        self.most, self.started, self.failed = most, 1, 0
        self.winner, self.result = None, None
        self.errors = []            # (number of the attempt, error), until it is over
        self.hurry = None           # the Event that begins the next attempt before its time
        self.began, self.ended, self.first_failed = began, None, False

    def succeeds(self, number, now):
        """Whether this is the first success."""
        before, self.state = self.state, RACE[self.state, "success"]
        if before == self.state:
            return False
        self.winner, self.ended = number, now
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
        if self.state == "running" and self.failed == self.most:
            self.state = "lost"


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
    it has brought is returned, and the next checkpoint raises. The first attempt runs in the task that calls, others in tasks of
    their own, with a copy of the context as it was when the call began. BaseExceptions that are no Cancelled end all.

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
        self._is_error, self._is_ignored = _test(errors, "Hedge(errors=", self), _test(ignored, "Hedge(ignored=", self)
        self._idempotent, self._now = bool(idempotent), _steady(clock, "Hedge(clock=")
        self._budget = _checked_budget(budget, clock, "Hedge")
        self._calls = self._hedges = self._won = self._refused = self._lost = 0

    @property
    def budget(self):
        """The RetryBudget."""
        return self._budget

    @property
    def delay(self):
        """Seconds after which the next attempt begins now; math.inf: it does not."""
        latencies = self._latencies
        return latencies.value() if latencies is not None and latencies.calls >= self._minimum else self._delay

    async def _run(self, call, proceed):
        counted = self._budget._enter(call)
        try:
            with self._lock:
                self._calls += 1
                race, delay = _Race(self._most, self._now()), self.delay
            if delay == math.inf or not (self._idempotent or call.idempotent):
                result = await proceed()
                race.winner = 1
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
            won = race.succeeds(number, self._now())
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
        """{"name", "calls", "delay": seconds, math.inf if calls are not hedged now; "hedges": attempts besides the first; "won":
        by these; "refused": by the budget; "lost": calls of which all attempts failed; "budget": its statistics()}"""
        with self._lock:
            numbers = {"name": self.name, "calls": self._calls, "delay": self.delay, "hedges": self._hedges, "won": self._won,
                       "refused": self._refused, "lost": self._lost}
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
    to be given: lambda error: function). errors: of which: an exception type, a tuple of them, or a predicate.

    An error of the function is raised, with the first one as its context. Cancelled is no error.

    Events: "fell_back" {error}, "failed" {error: the function's}.
    """

    def __init__(self, instead, *, errors=Exception, name=None):
        super().__init__(name)
        if inspect.iscoroutine(instead):
            instead.close()             # else it would warn that it was never awaited
            raise TypeError("Fallback() got a coroutine object, which can be awaited once: give the async function of an error")
        self._instead = instead
        self._is_error = _test(errors, "Fallback(errors=", self)
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
    Only one that nobody gets is let go of (`discard`).

    Events, with the key: "hit", "miss", "shared", "stale", "stale_if_error", "negative", as in statistics(); "refreshed",
    "failed" {error, refresh: whether it was one}, "evicted".
    """

    def __init__(self, seconds, *, key=None, stale_seconds=0.0, stale_if_error=0.0, negative_seconds=0.0, errors=Exception,
                 max_keys=CACHE_KEYS, clock=flowcoro.now, name=None):
        super().__init__(name)
        given = {"seconds": seconds, "stale_seconds": stale_seconds, "stale_if_error": stale_if_error,
                 "negative_seconds": negative_seconds}
        self._rules = _Freshness(*(_number(value, 0, math.inf, f"Cache({what}=", "seconds") for what, value in given.items()))
        if seconds == math.inf and (stale_seconds or stale_if_error):
            raise ValueError(f"Cache(seconds=inf, stale_seconds={stale_seconds!r}, stale_if_error={stale_if_error!r}): what is "
                             "kept for ever is never stale")
        if key is not None and not callable(key):
            raise TypeError(f"Cache(key={key!r:.80}): give a function of the operation's arguments, or None")
        self._key_of, self._max_keys = key, _count(max_keys, 1, "Cache(max_keys=", "keys")
        self._is_error, self._now = _test(errors, "Cache(errors=", self), _steady(clock, "Cache(clock=")
        self._entries = {}              # key -> _Entry; the one asked for last is the last
        self._flights = {}              # key -> _Flight, that who comes now joins
        self._counts = dict.fromkeys(("hit", "miss", "shared", "stale", "stale_if_error", "negative", "refreshed", "failed",
                                      "evicted"), 0)

    def key_of(self, operation, /, *args, **kwargs):
        """The key of a call, for invalidate(). TypeError if it is not hashable."""
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
        key = self.key_of(operation, *args, **kwargs)
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
        evicted, error = None, flight.error
        with self._lock:
            flight.over, now = True, self._now()
            if self._flights.get(key) is flight:        # else it was invalidated, or everybody has left
                del self._flights[key]
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

    async def _run(self, call, proceed):
        if self._key_of is not None:
            _, args, kwargs = call.asked
            call = call._replace(key=self._key_of(*args, **kwargs))
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
