"""tenacity's decorator. Run by ../resilience.py."""

import asyncio
import importlib.metadata

import tenacity

import harness


async def retry():
    decorate = tenacity.retry(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_random_exponential(0.1, max=10))
    await harness.compared(decorate(harness.operation))


if __name__ == "__main__":
    harness.main(dict(retry=retry), asyncio.run, importlib.metadata.version("tenacity"))
