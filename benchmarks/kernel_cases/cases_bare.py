"""No runtime at all: coroutines sent round a deque, which is the least that any scheduler in Python has to do.

Without timers, errors, cancellation or I/O there is only one case: `switch`. Run by ../kernel.py; see there.
"""

import collections
import platform
import types

import harness


@types.coroutine
def checkpoint():
    yield


def switch():
    async def task():
        for _ in range(harness.CHECKPOINTS):
            await checkpoint()
    ready = collections.deque(task() for _ in range(harness.TASKS))
    while ready:
        coroutine = ready.popleft()
        try:
            coroutine.send(None)
        except StopIteration:
            continue
        ready.append(coroutine)


if __name__ == "__main__":
    harness.main(dict(switch=switch), harness.timed_plain, None, platform.python_version())
