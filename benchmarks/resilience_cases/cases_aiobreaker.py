"""aiobreaker: pybreaker with asyncio in Tornado's place. Run by ../resilience.py."""

import asyncio
import datetime
import functools
import importlib.metadata

import aiobreaker

import harness


async def opened(seconds):
    breaker = aiobreaker.CircuitBreaker(fail_max=1, timeout_duration=datetime.timedelta(seconds=seconds))
    try:
        await breaker.call_async(harness.failing)
    except aiobreaker.CircuitBreakerError:
        return breaker


async def closed():
    await harness.compared(functools.partial(aiobreaker.CircuitBreaker().call_async, harness.operation))


async def rejected():
    breaker = await opened(harness.AGES)
    await harness.rejected(functools.partial(breaker.call_async, harness.operation), aiobreaker.CircuitBreakerError)


async def halfopen():
    breaker = await opened(harness.OPENED)
    await harness.halfopen(breaker.call_async, aiobreaker.CircuitBreakerError, asyncio.gather, asyncio.sleep)


if __name__ == "__main__":
    harness.main(dict(closed=closed, rejected=rejected, halfopen=halfopen), asyncio.run, importlib.metadata.version("aiobreaker"))
