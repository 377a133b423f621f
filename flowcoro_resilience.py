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

import array
import collections
import functools
import inspect
import math
import threading
import types
import typing

import flowcoro

__version__ = "0.1.0"

__all__ = ["Policy", "PolicyEvent", "CountWindow", "TimeWindow", "Keyed", "Pipeline", "Rejected", "BreakerOpen", "RateLimited",
           "LimitExceeded",
           "RateLimiter", "RateState", "ConcurrencyLimiter", "AIMD", "Gradient2"]

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
    if hasattr(result, "__await__") or type(result) is types.GeneratorType and inspect.isawaitable(result):    # sleep()'s is one
        return await result
    return result


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

# Keys that are looked at when one has to go early.
_SAMPLED = 5


class _States:
    """A state for each key, of which those go that say nothing, and early ones where there are more than max_keys.

    kept: a container of keys that do not go early. evicted: how many went early.
    """

    def __init__(self, max_keys, kept):
        self._max_keys, self._kept, self.evicted = max_keys, kept, 0
        self._mask = (1 << (max_keys // _TABLE).bit_length()) - 1
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
    """State of a key: an array with the units that are in the window, then time and units of each that was let through, oldest
    first, 16 bytes for each."""

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
        place, end = 1, len(state)
        while place < end and state[place] + self._per <= now:
            state[0] -= state[place + 1]
            place += 2
        if place == end:                        # the last entry stays, for _weight(), and counts nothing
            state[-1], place = 0, end - 2
        if place > 1:
            del state[1:place]
        return state, state[0]

    def take(self, key, cost, line, now):
        """As _Gcra.take()."""
        state, used = self._state(key, now)
        if used + cost + (0 if line is None else line.cost) > self._limit:
            return self._when(state, used, cost, line, now)
        if state is None:
            self._add(key, array.array("d", (cost, now, cost)), now)
            return now
        state[0] += cost
        if state[-2] == now:
            state[-1] += cost
        else:
            state.extend((now, cost))
        return now

    def _when(self, state, used, cost, line, now):
        """When there will be room, if each goes as soon as it may: those who wait first, and what they take comes back too."""
        place, taken = 1, collections.deque()
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

    __slots__ = ("lot", "costs", "cost", "users")

    def __init__(self):
        self.lot = flowcoro.ParkingLot("wait for a RateLimiter")
        self.costs = collections.OrderedDict()      # place -> cost; a dict takes O(n) to find its first, once many have gone
        self.cost = 0                               # their sum
        self.users = 0                              # calls that hold this line, waiting in it or about to


class RateState(typing.NamedTuple):
    """What a RateLimiter knows of a key. limit: units that may go at once at most; remaining: how many, whole ones, may now;
    retry_after: seconds until one may, 0.0 if now; reset: seconds until `limit` may."""

    limit: float
    remaining: int
    retry_after: float
    reset: float


async def _turn():
    """A point of cancellation always, of scheduling when the budget is used up."""
    task = flowcoro.current_task()
    if task.budget > 0:
        task.budget -= 1
    else:
        await flowcoro.checkpoint()


class _Timed(Policy):
    """A policy with a clock."""

    def __init__(self, clock, name):
        super().__init__(name)
        if not callable(clock):
            raise TypeError(f"{self.name}(clock={clock!r:.80}): give a function that returns seconds")
        self._clock = clock
        self._offset, self._last = -clock(), 0.0            # time begins at 0 here, where it has most digits

    def _now(self):
        """(the time here, what the clock says), in a step of its own. It stands still where the clock goes back (P4)."""
        raw = self._clock()
        now = raw + self._offset
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
    ints, and each key takes up to 16 · rate bytes.

    key: function of the operation's arguments; without it one limit is for all. cost: units of an operation, a number or a
    function of its arguments. In a Pipeline, whose policies do not see the arguments, the key is the operation's attribute
    `key`, as for Keyed, and the cost has to be a number. max_keys: how many are remembered; beyond them the ones nearest to
    being free go. wait: seconds that a call waits at most, in its turn; 0: it is rejected at once. max_waiting: calls that wait
    for one key at a time. clock: function that gives seconds.

    check(), acquire_nowait() and state_of() may be called in any thread, and outside of run().

    Events: "rejected" (cost, retry_after), "waited" (cost, seconds), each with its key.
    """

    def __init__(self, rate, per=1.0, *, burst=None, algorithm="gcra", key=None, cost=1, max_keys=MAX_KEYS, wait=0.0,
                 max_waiting=MAX_WAITING, clock=flowcoro.now, name=None):
        super().__init__(clock, name)
        if key is not None and not callable(key):
            raise TypeError(f"RateLimiter(key={key!r:.80}): give a function of the operation's arguments, or None")
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
        if not callable(cost):
            self._check_cost(cost)
        self._wait = _number(wait, 0, math.inf, "RateLimiter(wait=", "seconds")
        self._max_waiting = _count(max_waiting, 0, "RateLimiter(max_waiting=", "calls")
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
            raw = self._clock()
            now = raw + self._offset
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
        await _turn()
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
        line, place = self._enter(key), object()
        try:
            first, seconds = await line.lot.park_unless(functools.partial(self._join, line, place, key, cost, most))
            while first and (seconds := self._go(line, place, key, cost)):
                await flowcoro.sleep(seconds)
            return seconds
        finally:
            self._leave(line, place)
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
            return (True, seconds) if len(line.costs) == 1 else None

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
        self._leave(line, place)
        return 0.0

    @flowcoro.atomic
    def _leave(self, line, place):
        """If it is still in the line. Who is the first then is woken."""
        with self._lock:
            first = next(iter(line.costs), None) is place
            cost = line.costs.pop(place, None)
            if cost is None:
                return
            line.cost = line.cost - cost if line.costs else 0
            self._waiting -= 1
        if first:                           # not under the lock: unpark() takes the kernel's guard, which comes before it
            line.lot.unpark(1, (True, 0.0))

    async def try_execute(self, operation, /, *args, **kwargs):
        """As Policy.try_execute(), after acquire() with the key and the cost of these arguments."""
        _checked_operation(operation, f"{self.name}.try_execute()")
        await self.acquire(None if self._key_of is None else self._key_of(*args, **kwargs),
                           self._cost(*args, **kwargs) if callable(self._cost) else self._cost)
        return await _invoke(operation, args, kwargs)

    async def _run(self, call, proceed):
        if callable(self._cost):
            raise TypeError(f"{self.name}: in a Pipeline its cost= has to be a number, since policies do not see the arguments "
                            "there; or let it call the pipeline: limiter.try_execute(pipeline.try_execute, operation, …)")
        if self._key_of is not None and call.key is None:
            raise TypeError(f"{self.name}: the operation has no key: give it an attribute `key`, since policies of a Pipeline do "
                            "not see the arguments")
        await self.acquire(None if self._key_of is None else call.key, self._cost)
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
    """At most `limit` operations at a time; max_waiting others wait in turn for up to `wait` seconds (1 by default).

    limit: an int, or an algorithm that finds it: AIMD() or Gradient2(), or what has their `limit` and record(), one for each
    limiter; record() is called within an atomic step, and must not block. dropped: which ends of an operation tell an adaptive
    limit that it was too much: an exception type, a tuple of them, or a predicate of error or result; by default TimeoutError.
    Other errors, and cancelled calls, tell it nothing: so a Timeout belongs within the limiter. clock: function that gives
    seconds.

    Besides try_execute() there are `async with limiter:`, and acquire(), whose permit has release(). LimitExceeded names as
    `retry_after` an estimate: how long places are held on the mean, for those who wait and this one, by the limit; None as long
    as none was given back.

    Events: "rejected" (retry_after, waited: seconds), "waited" (seconds), "limit_changed" (before, limit).
    """

    def __init__(self, limit, *, max_waiting=0, wait=None, dropped=None, clock=flowcoro.now, name=None):
        super().__init__(clock, name)
        self._algorithm = None
        if not isinstance(limit, int) and callable(getattr(limit, "record", None)):
            self._algorithm, limit = limit, limit.limit
        elif dropped is not None:
            raise ValueError(f"{self.name}({limit!r:.80}, dropped={dropped!r:.80}): a fixed limit does not depend on that; leave "
                             "it out, or give AIMD() or Gradient2()")
        self._limit = _count(limit, 1, f"{self.name}(", "calls at a time")
        self._max_waiting = _count(max_waiting, 0, f"{self.name}(max_waiting=", "calls")
        if wait is not None and not max_waiting:
            raise ValueError(f"{self.name}(wait={wait!r:.80}, max_waiting=0): nobody may wait; give a max_waiting")
        self._wait = _number(QUEUE_WAIT if wait is None else wait, 0, math.inf, f"{self.name}(wait=", "seconds", exclusive=True)
        self._is_dropped = _test(TimeoutError if dropped is None else dropped, f"{self.name}(dropped=", self)
        self._lot = flowcoro.ParkingLot("wait for a ConcurrencyLimiter")
        self._running, self._held = 0, None     # held: seconds that a place is held on the mean
        self._entered = {}                      # task -> permits of its `async with`
        self._allowed = self._rejected = self._waited = self._timed_out = 0

    @property
    def limit(self):
        """How many may run at a time now."""
        return self._limit

    @flowcoro.atomic
    def set_limit(self, limit):
        """Change a fixed limit. If more run than that, they come to their end. ValueError for an adaptive one."""
        if self._algorithm is not None:
            raise ValueError(f"{self.name}.set_limit({limit!r}): {type(self._algorithm).__name__} says what it is")
        self._limit = _count(limit, 1, f"{self.name}.set_limit(", "calls at a time")
        self._admit()

    @flowcoro.atomic
    def _take(self):
        if self._running >= self._limit:
            return None
        self._running += 1
        self._allowed += 1
        return _Permit(self, self._running, self._now()[0])

    def _admit(self):
        """Hand places that are free to those who have waited longest; within an atomic step."""
        while self._running < self._limit and self._lot:
            if self._lot.unpark(1, _Permit(self, self._running + 1, self._now()[0])):
                self._running += 1
                self._allowed += 1
                self._waited += 1

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
        await _turn()
        permit = self._take()
        if permit is not None:
            return permit
        if not most or len(self._lot) >= self._max_waiting:     # the latter is asked again below; here it costs no park
            raise self._rejection(0.0)
        began = flowcoro.now()
        with flowcoro.move_on_after(most):
            permit = await self._lot.park_unless(self._join)
        seconds = flowcoro.now() - began
        if permit is None or permit is _FULL:
            if permit is None:
                self._timed_out += 1
            raise self._rejection(seconds)
        if self._listeners:
            self._tell("waited", seconds=seconds)
        return permit

    def _join(self):
        """For park_unless(): a permit, _FULL, or None to wait."""
        return self._take() or (_FULL if len(self._lot) >= self._max_waiting else None)

    def _rejection(self, seconds):
        error = self._refuse(f"; no place was free for {seconds:.3g} s" if seconds else "")
        if self._listeners:
            self._tell("rejected", retry_after=error.retry_after, waited=seconds)
        return error

    @flowcoro.atomic
    def _refuse(self, why):
        waiting = len(self._lot)
        self._rejected += 1
        return LimitExceeded(f"{self.name}: {self._running} run and {waiting} wait; the limit is {self._limit} at a time, and "
                             f"{self._max_waiting} in the queue{why}", self,
                             None if self._held is None else self._held * (waiting + 1) / self._limit)

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
        self._running -= 1
        now, before, error = self._now()[0], self._limit, None
        seconds = now - permit._began
        self._held = seconds if self._held is None else self._held + (seconds - self._held) * _SMOOTHING
        if self._algorithm is not None and outcome != "ignored":
            try:
                self._limit = max(1, int(self._algorithm.record(seconds, permit._in_flight, outcome == "dropped", now)))
            except Exception as failed:                     # a class of the user's own (P5)
                error = failed
        self._admit()
        return error, before, self._limit

    def _outcome(self, end):
        """What an end, error or result, says to an adaptive limit."""
        if self._algorithm is None:
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
        permit.release("ignored" if not own or error is not None and not isinstance(error, Exception) else self._outcome(error))

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
        return {"name": self.name, "limit": self._limit, "running": self._running, "waiting": len(self._lot),
                "max_waiting": self._max_waiting, "allowed": self._allowed, "rejected": self._rejected, "waited": self._waited,
                "timed_out": self._timed_out, "seconds": self._held}


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
