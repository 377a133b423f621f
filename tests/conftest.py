"""What several test files use."""

import gc
import sys

import pytest

from flowcoro_testing import wait_all_tasks_parked


@pytest.fixture
def reports(monkeypatch):
    """What was reported to sys.unraisablehook: a list of (message, error)."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda got: found.append((got.err_msg or "", got.exc_value)))
    yield found
    gc.collect()


async def parked(group, *coros):
    """Spawn the coroutines one after the other, each once the one before waits. Returns the tasks."""
    tasks = []
    for coro in coros:
        tasks.append(group.spawn(coro))
        await wait_all_tasks_parked()
        assert tasks[-1].state == "parked"
    return tasks
