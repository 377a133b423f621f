"""purgatory: a factory has the breakers by name; counts failures in a row. Run by ../resilience.py."""

import asyncio
import importlib.metadata

from purgatory import AsyncCircuitBreakerFactory
from purgatory.domain.model import OpenedState

import harness


async def opened(seconds):
    breakers = AsyncCircuitBreakerFactory(default_threshold=1, default_ttl=seconds)
    try:
        await breakers("there")(harness.failing)()
    except harness.Broken:
        return breakers


async def closed():
    await harness.compared(AsyncCircuitBreakerFactory()("there")(harness.operation))


async def rejected():
    breakers = await opened(harness.AGES)
    await harness.rejected(breakers("there")(harness.operation), OpenedState)


async def halfopen():
    breakers = await opened(harness.OPENED)
    await harness.halfopen(lambda operation: breakers("there")(operation)(), OpenedState, asyncio.gather, asyncio.sleep)


if __name__ == "__main__":
    harness.main(dict(closed=closed, rejected=rejected, halfopen=halfopen), asyncio.run, importlib.metadata.version("purgatory"))
