"""flowcoro_resilience: all policies together, as a user stacks them. FLOWCORO_SEEDS as in test_resilience_retry.py."""

import contextlib
import os
import random
import threading

import pytest

import flowcoro
from flowcoro_resilience import (AdaptiveBreaker, Cache, CircuitBreaker, ConcurrencyLimiter, Fallback, Hedge, Keyed, Pipeline,
                                 RateLimiter, Rejected, Retry, RetryBudget, Timeout)
from flowcoro_testing import VirtualClock, run_in_kernel
from test_net_cancel import at_each_point

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 30)))


class Stack:
    """One of each, the breaker half open: whatever a call is permitted counts."""

    def __init__(self, seconds, cached, chance=lambda: 1.0):        # no adaptive breaker rejects by that
        self.budget = RetryBudget()
        self.breaker = CircuitBreaker(window=2, minimum_calls=2, open_seconds=seconds, probes=1_000)
        self.limiter, self.rate = ConcurrencyLimiter(3, max_waiting=2, wait=5), RateLimiter(10**6, wait=5)
        self.cache, self.adaptive = Cache(0, key=lambda *what: what), AdaptiveBreaker(random=chance)
        self.keyed = Keyed(lambda key: Pipeline(Timeout(50), Fallback("instead", errors=KeyError)), key=lambda *what: what[0])
        self.policy = Pipeline(
            Fallback("nobody", errors=Rejected), Timeout(60), *[self.cache] * cached,
            Retry(2, first=seconds, budget=self.budget, random=chance), Hedge(seconds, budget=self.budget),
            self.breaker, self.adaptive, self.rate, self.limiter, self.keyed)

    async def half_open(self):
        for _ in range(2):
            with pytest.raises(OSError):
                await self.breaker.try_execute(self.fail)
        await flowcoro.sleep(self.breaker.statistics()["retry_after"])
        self.breaker.acquire_nowait().give_back()
        assert self.breaker.state == "HALF_OPEN"

    def fail(self):
        raise OSError("down")

    def check_nothing_is_left(self):
        assert self.breaker.statistics()["probes"] == 0
        assert self.limiter.statistics() | {"running": 0, "waiting": 0} == self.limiter.statistics()
        assert not self.limiter._entered and not self.rate._lines and not self.budget._counted
        assert self.cache.statistics()["under_way"] == 0
        assert not self.keyed._busy


@pytest.mark.parametrize("workers", [1, 3])
def test_cancelled_at_each_point_a_call_through_all_policies_leaves_nothing(workers):
    async def main():
        stack, attempts = Stack(0.001, cached=False), 0       # what is cached is called in another task
        await stack.half_open()

        async def operation(what):
            nonlocal attempts
            attempts += 1
            await flowcoro.sleep(0.002)                 # so that each is hedged
            if attempts < 3:                            # the first, and its hedge
                raise OSError("for once")
            return what

        operation.idempotent = True

        async def after(cancelled):
            stack.check_nothing_is_left()

        def call():
            nonlocal attempts
            attempts = 0
            return stack.policy.try_execute(operation, 1)

        assert await at_each_point(call, after) >= 6
        assert stack.breaker.state == "HALF_OPEN" and stack.breaker.statistics()["calls"] > 0

    flowcoro.run(main(), workers=workers)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_to_many_calls_through_all_policies_nothing_is_left(seed):
    chance, ends = random.Random(seed), {}

    async def operation(what, number):
        await flowcoro.sleep(chance.choice([0, 0.5, 1, 3]))
        if chance.random() < 0.3:
            raise chance.choice([OSError, KeyError, TimeoutError])(number)
        return what

    operation.idempotent = True

    async def call(stack, number):
        await flowcoro.sleep(chance.uniform(0, 5))
        what = chance.randrange(3)
        try:
            ends[number] = await stack.policy.try_execute(operation, what, number)
            assert ends[number] in (what, "instead", "nobody")
        except (OSError, TimeoutError) as error:
            ends[number] = error

    async def main():
        stack = Stack(1.0, cached=True, chance=chance.random)
        await stack.half_open()
        async with flowcoro.TaskGroup() as group:
            tasks = [group.spawn(call(stack, number)) for number in range(30)]
            for task in chance.sample(tasks, 10):
                await flowcoro.sleep(chance.uniform(0, 1))
                task.cancel()
        assert len(ends) >= 20
        stack.check_nothing_is_left()

    flowcoro.run(main(), clock=VirtualClock(), seed=seed)


# ---- decorators ------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_what_is_decorated_may_say_more_about_itself_afterwards_and_is_what_a_cache_has_a_key_of():
    cache, calls = Cache(60), []

    @cache
    @Retry(3, first=0.0)
    async def ask(what):
        calls.append(what)
        if len(calls) < 3:
            raise OSError
        return what

    with pytest.raises(OSError):
        await ask("a")
    assert calls == ["a"]
    ask.__wrapped__.idempotent = True               # what Retry made of it
    assert await ask("a") == await ask("a") == "a" and calls == ["a"] * 3
    assert cache.invalidate(cache.key_of(ask, "a")) and await ask("a") == "a" and calls == ["a"] * 4


# ---- locks -----------------------------------------------------------------------------------------------------

class Watched:
    """A lock that knows who holds it; `inner`: those that nobody may hold who asks for it and has it not yet."""

    def __init__(self, inner=()):
        self.lock, self.inner, self.held, self.wrong = threading.RLock(), inner, 0, []

    def __enter__(self):
        if not self.mine():
            self.wrong += [lock for lock in self.inner if lock.mine()]
        self.lock.acquire()
        self.held += 1

    def __exit__(self, *error):
        self.held -= 1
        self.lock.release()

    def mine(self):
        return self.lock._is_owned()


def test_no_policy_asks_for_the_kernels_guard_while_it_holds_its_own_lock(monkeypatch):
    stack = Stack(0.001, cached=True)
    policies = [*stack.policy.policies, stack.policy, stack.budget]
    for policy in policies:
        policy._lock = Watched()
    guard = Watched([policy._lock for policy in policies])
    monkeypatch.setattr(flowcoro, "_GUARD", guard)
    monkeypatch.setattr(flowcoro._GuardPlace, "guard", guard)

    async def operation(number):
        await flowcoro.sleep(0.001)
        if number % 3 == 0:
            raise OSError("one in three")

    operation.idempotent = True

    async def call(number):
        with flowcoro.move_on_after(0.004 * number), contextlib.suppress(OSError):
            await stack.rate.acquire(cost=2000, wait=60)            # in turn, one each 2 ms
            await stack.policy.try_execute(operation, number % 5)

    async def main():
        assert stack.rate.check(cost=10**6) == 0
        async with flowcoro.TaskGroup() as group:
            for number in range(15):
                group.spawn(call(number))

    flowcoro.run(main(), workers=2)
    assert not guard.wrong
    assert all(policy._lock.held == 0 for policy in policies)
