"""curio's cases. Run by ../kernel.py; see there what each case counts.

Run it with `python -O`: at every wake-up curio asserts that the task is not ready yet, by searching the whole
ready queue, and with 100,000 tasks that assertion would be all that is measured.
"""

import curio

import harness


async def switch():
    async def task():
        for _ in range(harness.CHECKPOINTS):
            await curio.sleep(0)
    async with curio.TaskGroup() as group:
        for _ in range(harness.TASKS):
            await group.spawn(task)


async def spawn():
    async def nothing():
        pass
    for _ in range(harness.GROUPS):
        async with curio.TaskGroup() as group:
            for _ in range(harness.GROUP_SIZE):
                await group.spawn(nothing)


async def sleepers():
    async def sleeper(number):
        await curio.sleep(harness.short(number))
    async with curio.TaskGroup() as group:
        for number in range(harness.SLEEPERS):
            await group.spawn(sleeper, number)


async def pingpong():
    there, back = curio.Queue(1), curio.Queue(1)
    async def echo():
        for _ in range(harness.ROUND_TRIPS):
            await back.put(await there.get())
    async with curio.TaskGroup() as group:
        await group.spawn(echo)
        for number in range(harness.ROUND_TRIPS):
            await there.put(number)
            await back.get()


async def buffered():
    queue = curio.Queue(harness.CAPACITY)
    async def produce():
        for number in range(harness.ITEMS):
            await queue.put(number)
    async with curio.TaskGroup() as group:
        await group.spawn(produce)
        for _ in range(harness.ITEMS):
            await queue.get()


async def lock():
    lock = curio.Lock()
    async def holder():
        for _ in range(harness.HANDOVERS):
            async with lock:
                await curio.sleep(0)
    async with curio.TaskGroup() as group:
        await group.spawn(holder)
        await group.spawn(holder)


async def timeout():
    async def task():
        for _ in range(harness.TIMEOUTS):
            async with curio.timeout_after(10):
                await curio.sleep(0)
    async with curio.TaskGroup() as group:
        for _ in range(harness.TIMEOUT_TASKS):
            await group.spawn(task)


async def thread():
    def nothing():
        pass
    for _ in range(harness.CALLS):
        await curio.run_in_thread(nothing)


async def memory():
    crowd = harness.Crowd(harness.PARKED)
    async def parked():
        crowd.asleep += 1
        await curio.sleep(3600)
    async with curio.TaskGroup() as group:
        before = harness.resident()
        for _ in range(crowd.size):
            await group.spawn(parked)
        while crowd.asleep < crowd.size:
            await curio.sleep(0.01)
        harness.report_memory(harness.resident() - before)


async def alive(crowd):
    async def sleeper():
        await curio.sleep(crowd.nap())
        crowd.woke()
    async with curio.TaskGroup() as group:
        for _ in range(crowd.size):
            await group.spawn(sleeper)


CASES = dict(switch=switch, spawn=spawn, sleepers=sleepers, pingpong=pingpong, buffered=buffered, lock=lock,
             timeout=timeout, thread=thread, memory=memory, alive=alive)


def run(case, clock, *args):
    return curio.run(harness.timed, case, clock, *args)


if __name__ == "__main__":
    harness.main(CASES, run, "curio", curio.__version__)
