"""FlowCoro's policies, with their defaults where nothing is measured by them. Run by ../resilience.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))    # the files beside this folder, whatever is installed

import functools

import flowcoro
import flowcoro_resilience
from flowcoro_resilience import AdaptiveBreaker, BreakerOpen, CircuitBreaker, RateLimiter, Retry

import harness


async def gather(*coroutines):
    async with flowcoro.TaskGroup() as group:
        for coro in coroutines:
            group.spawn(coro)


async def opened(**settings):
    breaker = CircuitBreaker(minimum_calls=1, **settings)
    try:
        await breaker.try_execute(harness.failing)
    except harness.Broken:
        return breaker


async def closed():
    await harness.compared(functools.partial(CircuitBreaker().try_execute, harness.operation))


async def rejected():
    breaker = await opened(open_seconds=harness.AGES)
    await harness.rejected(functools.partial(breaker.try_execute, harness.operation), BreakerOpen)


async def halfopen(probes=1):
    breaker = await opened(open_seconds=harness.OPENED, probes=probes)
    await harness.halfopen(breaker.try_execute, BreakerOpen, gather, flowcoro.sleep)


def halfopen3():
    return halfopen(3)


async def adaptive():
    await harness.compared(functools.partial(AdaptiveBreaker().try_execute, harness.operation))


async def adaptive_rejected():
    breaker = AdaptiveBreaker(probe_seconds=harness.AGES, random=lambda: 0.0)
    for _ in range(5):
        try:
            await breaker.try_execute(harness.failing)
        except harness.Broken:
            pass
    await harness.rejected(functools.partial(breaker.try_execute, harness.operation), BreakerOpen)


async def retry():
    await harness.compared(functools.partial(Retry(attempts=3, idempotent=True).try_execute, harness.operation))


def gcra():
    harness.checks(RateLimiter(harness.RATE).check, harness.one_key())


def gcra_many():
    harness.checks(RateLimiter(harness.RATE).check, harness.many_keys())


def refused():
    harness.checks(RateLimiter(harness.SELDOM, harness.AGES).check, harness.one_key())


def limiter(room):
    return RateLimiter(harness.SELDOM, harness.AGES, max_keys=room).check      # none is free again until the end


def keys():
    harness.memory(limiter, harness.room())


def keys_all():
    harness.memory(limiter)


if __name__ == "__main__":
    cases = [closed, rejected, halfopen, halfopen3, adaptive, adaptive_rejected, retry, gcra, gcra_many, refused, keys, keys_all]
    harness.main({case.__name__: case for case in cases}, functools.partial(flowcoro.run, workers=1),
                 flowcoro_resilience.__version__)
