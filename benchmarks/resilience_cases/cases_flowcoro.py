"""FlowCoro's policies, with their defaults where nothing is measured by them. Run by ../resilience.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))    # the files beside this folder, whatever is installed

import functools

import flowcoro
import flowcoro_resilience
from flowcoro_resilience import AdaptiveBreaker, BreakerOpen

import harness


async def gather(*coroutines):
    async with flowcoro.TaskGroup() as group:
        for coro in coroutines:
            group.spawn(coro)


async def adaptive():
    await harness.compared(functools.partial(AdaptiveBreaker().try_execute, harness.operation))


async def adaptive_rejected():
    breaker = AdaptiveBreaker(probe_seconds=harness.AGES, random=lambda: 0.0)
    for _ in range(10):
        try:
            await breaker.try_execute(harness.failing)
        except (harness.Broken, BreakerOpen):
            pass
    await harness.rejected(functools.partial(breaker.try_execute, harness.operation), BreakerOpen)


if __name__ == "__main__":
    cases = [adaptive, adaptive_rejected]
    harness.main({case.__name__: case for case in cases}, functools.partial(flowcoro.run, workers=1),
                 flowcoro_resilience.__version__)
