"""interlock (interlock-cb on the package index): windows and rates, a limit for probes. Run by ../resilience.py."""

import asyncio
import functools
import importlib.metadata

from interlock import CircuitBreaker, CircuitOpenError, Config

import harness


async def opened(**settings):
    breaker = CircuitBreaker(name="there", config=Config(minimum_number_of_calls=1, **settings))
    try:
        await breaker.call(harness.failing)
    except harness.Broken:
        return breaker


async def closed():
    await harness.compared(functools.partial(CircuitBreaker(name="there").call, harness.operation))


async def rejected():
    breaker = await opened(wait_duration_in_open=float(harness.AGES))
    await harness.rejected(functools.partial(breaker.call, harness.operation), CircuitOpenError)


async def halfopen(permitted=1):
    breaker = await opened(wait_duration_in_open=harness.OPENED, permitted_calls_in_half_open=permitted,
                           max_concurrent_probes=permitted)
    await harness.halfopen(breaker.call, CircuitOpenError, asyncio.gather, asyncio.sleep)


if __name__ == "__main__":
    harness.main(dict(closed=closed, rejected=rejected, halfopen=halfopen, halfopen3=functools.partial(halfopen, 3)), asyncio.run,
                 importlib.metadata.version("interlock-cb"))
