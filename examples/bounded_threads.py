"""Blocking functions in threads, at most three at a time.

Some things cannot be awaited: a file system, a C library, a driver that blocks. `to_thread` calls them in
a thread, and only the task that asked waits. The `limiter` is an ordinary semaphore: what is scarce is
not threads but whatever they use, so several calls that need the same thing share one.
"""

import threading
import time

import flowcoro

busy, most = 0, 0
guard = threading.Lock()                # threads run at any moment, so plain numbers need one; tasks do not


def legacy_query(number):
    """A database driver that blocks and allows three connections."""
    global busy, most
    with guard:
        busy += 1
        most = max(most, busy)
    time.sleep(0.05)
    with guard:
        busy -= 1
    return number * 10


async def main():
    connections = flowcoro.Semaphore(3)
    queries = [flowcoro.to_thread(legacy_query, number, limiter=connections) for number in range(9)]
    results = await flowcoro.when_all(*queries)
    print(results)
    print(f"never more than {most} at once")
    assert most <= 3


if __name__ == "__main__":
    flowcoro.run(main())
