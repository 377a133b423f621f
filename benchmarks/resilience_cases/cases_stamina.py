"""stamina's decorator: tenacity, with defaults for production. Run by ../resilience.py."""

import asyncio
import importlib.metadata

import stamina

import harness


async def retry():
    await harness.compared(stamina.retry(on=Exception, attempts=3)(harness.operation))


if __name__ == "__main__":
    harness.main(dict(retry=retry), asyncio.run, importlib.metadata.version("stamina"))
