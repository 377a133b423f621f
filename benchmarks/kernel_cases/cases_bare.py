"""No runtime at all: coroutines sent round a deque, about the least that a scheduler in Python has to do.

Without timers, errors, cancellation or I/O there is only one case: `switch`. Run by ../kernel.py; see there.
"""

import collections
import platform
import sys
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
    threads = "" if getattr(sys, "_is_gil_enabled", lambda: True)() else " without GIL"
    harness.main(dict(switch=switch), harness.timed_plain, None,
                 f"{platform.python_implementation()} {platform.python_version()}{threads}")
