"""asyncio's cases, and uvloop's (cases_uvloop.py). Run by ../kernel.py; see there what each case counts."""

import asyncio
import platform

import harness


async def switch():
    async def task():
        for _ in range(harness.CHECKPOINTS):
            await asyncio.sleep(0)
    async with asyncio.TaskGroup() as group:
        for _ in range(harness.TASKS):
            group.create_task(task())


async def spawn():
    async def nothing():
        pass
    for _ in range(harness.GROUPS):
        async with asyncio.TaskGroup() as group:
            for _ in range(harness.GROUP_SIZE):
                group.create_task(nothing())


async def sleepers():
    async def sleeper(number):
        await asyncio.sleep(harness.short(number))
    async with asyncio.TaskGroup() as group:
        for number in range(harness.SLEEPERS):
            group.create_task(sleeper(number))


async def pingpong():
    there, back = asyncio.Queue(1), asyncio.Queue(1)
    async def echo():
        for _ in range(harness.ROUND_TRIPS):
            await back.put(await there.get())
    async with asyncio.TaskGroup() as group:
        group.create_task(echo())
        for number in range(harness.ROUND_TRIPS):
            await there.put(number)
            await back.get()


async def buffered():
    queue = asyncio.Queue(harness.CAPACITY)
    async def produce():
        for number in range(harness.ITEMS):
            await queue.put(number)
    async with asyncio.TaskGroup() as group:
        group.create_task(produce())
        for _ in range(harness.ITEMS):
            await queue.get()


async def lock():
    lock = asyncio.Lock()
    async def holder():
        for _ in range(harness.HANDOVERS):
            async with lock:
                await asyncio.sleep(0)
    async with asyncio.TaskGroup() as group:
        group.create_task(holder())
        group.create_task(holder())


async def timeout():
    async def task():
        for _ in range(harness.TIMEOUTS):
            async with asyncio.timeout(10):
                await asyncio.sleep(0)
    async with asyncio.TaskGroup() as group:
        for _ in range(harness.TIMEOUT_TASKS):
            group.create_task(task())


async def thread():
    def nothing():
        pass
    for _ in range(harness.CALLS):
        await asyncio.to_thread(nothing)


async def memory():
    crowd = harness.Crowd(harness.PARKED)
    async def parked():
        crowd.asleep += 1
        await asyncio.sleep(3600)
    async with asyncio.TaskGroup() as group:
        before = harness.resident()
        for _ in range(crowd.size):
            group.create_task(parked())
        while crowd.asleep < crowd.size:
            await asyncio.sleep(0.01)
        harness.report_memory(harness.resident() - before)


async def alive(crowd):
    async def sleeper():
        await asyncio.sleep(crowd.nap())
        crowd.woke()
    async with asyncio.TaskGroup() as group:
        for _ in range(crowd.size):
            group.create_task(sleeper())


CASES = dict(switch=switch, spawn=spawn, sleepers=sleepers, pingpong=pingpong, buffered=buffered, lock=lock,
             timeout=timeout, thread=thread, memory=memory, alive=alive)


def run(case, clock, *args):
    return asyncio.run(harness.timed(case, clock, *args))


if __name__ == "__main__":
    harness.main(CASES, run, "asyncio", platform.python_version())
