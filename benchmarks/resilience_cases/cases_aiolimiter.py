"""aiolimiter: a leaky bucket that callers wait at. It has no keys, and refuses nobody. Run by ../resilience.py."""

import asyncio
import importlib.metadata
import statistics

import aiolimiter

import harness


async def gcra():
    limiter = aiolimiter.AsyncLimiter(harness.RATE, 1)
    harness.report(each=statistics.median([await harness.block(limiter.acquire) for _ in harness.rounds()]))


if __name__ == "__main__":
    harness.main(dict(gcra=gcra), asyncio.run, importlib.metadata.version("aiolimiter"))
