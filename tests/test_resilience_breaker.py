"""flowcoro_resilience: CircuitBreaker. On the virtual clock."""

import pytest

import flowcoro
from flowcoro_resilience import BreakerOpen, CircuitBreaker
from flowcoro_testing import run_in_kernel


async def answer(value="fine"):
    await flowcoro.sleep(1)
    return value


async def fail(error=OSError("refused")):
    await flowcoro.sleep(1)
    raise error


async def opened(**settings):
    """A breaker that is OPEN."""
    breaker = CircuitBreaker(**{"window": 4, "minimum_calls": 2, **settings})
    for _ in range(2):
        with pytest.raises(OSError):
            await breaker.try_execute(fail)
    assert breaker.state == "OPEN"
    return breaker


# ---- probes ----------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_of_fifty_calls_at_once_exactly_as_many_go_through_as_may_probe():
    breaker = await opened(probes=3)
    await flowcoro.sleep(60)
    results = []

    async def call():
        try:
            results.append(await breaker.try_execute(answer))
        except BreakerOpen:
            results.append(None)

    async with flowcoro.TaskGroup() as group:
        for _ in range(50):
            group.spawn(call())
    assert results.count("fine") == 3 and results.count(None) == 47
    assert breaker.state == "CLOSED"
