"""uvloop's cases: asyncio's, word for word, on uvloop's event loop. Run by ../kernel.py; see there."""

import uvloop

import harness
from cases_asyncio import CASES


def run(case, clock, *args):
    return uvloop.run(harness.timed(case, clock, *args))


if __name__ == "__main__":
    harness.main(CASES, run, "uvloop", uvloop.__version__)
