"""circuitbreaker: counts failures in a row; its decorator takes async functions. Run by ../resilience.py."""

import asyncio
import importlib.metadata

from circuitbreaker import CircuitBreaker, CircuitBreakerError

import harness


async def opened(**settings):
    breaker = CircuitBreaker(failure_threshold=1, **settings)
    try:
        await breaker(harness.failing)()
    except harness.Broken:
        return breaker


async def closed():
    await harness.compared(CircuitBreaker()(harness.operation))


async def rejected():
    breaker = await opened(recovery_timeout=harness.AGES)
    await harness.rejected(breaker(harness.operation), CircuitBreakerError)


async def halfopen():
    breaker = await opened(recovery_timeout=harness.OPENED)
    await harness.halfopen(lambda operation: breaker(operation)(), CircuitBreakerError, asyncio.gather, asyncio.sleep)


if __name__ == "__main__":
    harness.main(dict(closed=closed, rejected=rejected, halfopen=halfopen), asyncio.run,
                 importlib.metadata.version("circuitbreaker"))
