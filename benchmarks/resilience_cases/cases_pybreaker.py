"""pybreaker: counts failures in a row. Run by ../resilience.py.

Its call_async() needs Tornado, even to be called, so this is its context manager, around an await.
"""

import asyncio
import importlib.metadata

import pybreaker

import harness


def opened(**settings):
    breaker = pybreaker.CircuitBreaker(fail_max=1, throw_new_error_on_trip=False, **settings)
    try:
        breaker.call(harness.failing_plain)
    except harness.Broken:
        return breaker


async def closed():
    breaker = pybreaker.CircuitBreaker()

    async def call():
        with breaker.calling():
            return await harness.operation()

    await harness.compared(call)


async def rejected():
    breaker = opened(reset_timeout=harness.AGES)

    async def call():
        with breaker.calling():
            return await harness.operation()

    await harness.rejected(call, pybreaker.CircuitBreakerError)


async def halfopen():
    breaker = opened(reset_timeout=harness.OPENED)

    async def call(operation):
        with breaker.calling():
            return await operation()

    await harness.halfopen(call, pybreaker.CircuitBreakerError, asyncio.gather, asyncio.sleep)


if __name__ == "__main__":
    harness.main(dict(closed=closed, rejected=rejected, halfopen=halfopen), asyncio.run, importlib.metadata.version("pybreaker"))
