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
import threading
import typing

import flowcoro

__version__ = "0.1.0"

__all__ = ["Policy", "PolicyEvent", "CountWindow", "TimeWindow", "Keyed", "Pipeline", "Rejected", "BreakerOpen", "RateLimited",
           "LimitExceeded"]

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
    args: tuple = ()            # what the operation is called with
    kwargs: dict = {}

    async def drop(self, result, policy):
        """Let go of a result that nobody will get. Its own task is not cancelled meanwhile; an error is reported."""
        if self.discard is not None:
            with flowcoro.CancelScope(shield=True):
                try:
                    await _invoke(self.discard, (result,), {})
                except Exception as error:
                    flowcoro.report_error(error, f"a result that {policy.name!r} does not need could not be let go of",
                                          "flowcoro_resilience")


def _call_of(operation, args=(), kwargs={}):
    return _Call(getattr(operation, "key", None), bool(getattr(operation, "idempotent", False)),
                 getattr(operation, "discard", None), args, kwargs)


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
        return await self._run(_call_of(operation, args, kwargs), functools.partial(_invoke, operation, args, kwargs))

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


# ---- hedge ----------------------------------------------------------------------------------------------------


# ---- timeout and fallback -------------------------------------------------------------------------------------


# ---- cache ----------------------------------------------------------------------------------------------------


# ---- keyed ----------------------------------------------------------------------------------------------------

class Keyed(Policy):
    """One policy for each key, made when it is first asked for: `Keyed(lambda key: CircuitBreaker(name=f"to {key}"))`.

    make: function of a key that gives a Policy. key: function of the operation's arguments that gives the key; without it the
    operation has the attribute `key` (HttpClient and RpcClient give theirs: where the request goes). max_keys: beyond them the
    one that was not used for longest goes, of those in which nothing is under way; if something is under way in all of them, the
    call is Rejected. TypeError for an operation without a key.

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
            call = call._replace(key=self._key_of(*call.args, **call.kwargs))
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
