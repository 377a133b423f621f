"""Ask a running program what it is doing: `dump_tasks()` prints every task, where it waits and for whom.

A monitor prints the dump when a request takes suspiciously long. In a terminal Ctrl-\\ prints the same
for any FlowCoro program, and so does `kill -QUIT`. The reason of each park is written by the primitive
itself, so "wait for a thread" and "acquire a Lock (for billing)" need no guessing.
"""

import time

import flowcoro


async def billing(database):
    async with database:
        await flowcoro.to_thread(time.sleep, 0.1)       # a slow query


async def report(database):
    await flowcoro.checkpoint()
    async with database:
        pass


async def watchdog(seconds):
    await flowcoro.sleep(seconds)
    print(flowcoro.dump_tasks())


async def main():
    database = flowcoro.Lock()
    async with flowcoro.TaskGroup() as group:
        group.spawn(billing(database), name="billing")
        group.spawn(report(database), name="report")
        group.spawn(watchdog(0.03), name="watchdog")


if __name__ == "__main__":
    flowcoro.run(main())
