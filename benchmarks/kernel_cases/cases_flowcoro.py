"""FlowCoro's cases. Run by ../kernel.py; see there what each case counts."""

import pathlib
import sys

ROOT = str(pathlib.Path(__file__).resolve().parents[2])
sys.path.insert(0, ROOT)  # the flowcoro.py beside this folder, whatever else is installed

import flowcoro

import harness


async def switch():
    async def task():
        for _ in range(harness.CHECKPOINTS):
            await flowcoro.checkpoint()
    async with flowcoro.TaskGroup() as group:
        for _ in range(harness.TASKS):
            group.spawn(task())


async def spawn():
    async def nothing():
        pass
    for _ in range(harness.GROUPS):
        async with flowcoro.TaskGroup() as group:
            for _ in range(harness.GROUP_SIZE):
                group.spawn(nothing())


async def sleepers():
    async def sleeper(number):
        await flowcoro.sleep(harness.short(number))
    async with flowcoro.TaskGroup() as group:
        for number in range(harness.SLEEPERS):
            group.spawn(sleeper(number))


async def pingpong():
    there, back = flowcoro.Channel(1), flowcoro.Channel(1)
    async def echo():
        for _ in range(harness.ROUND_TRIPS):
            await back.send(await there.receive())
    async with flowcoro.TaskGroup() as group:
        group.spawn(echo())
        for number in range(harness.ROUND_TRIPS):
            await there.send(number)
            await back.receive()


async def buffered():
    channel = flowcoro.Channel(harness.CAPACITY)
    async def produce():
        for number in range(harness.ITEMS):
            await channel.send(number)
    async with flowcoro.TaskGroup() as group:
        group.spawn(produce())
        for _ in range(harness.ITEMS):
            await channel.receive()


async def lock():
    lock = flowcoro.Lock()
    async def holder():
        for _ in range(harness.HANDOVERS):
            async with lock:
                await flowcoro.checkpoint()
    async with flowcoro.TaskGroup() as group:
        group.spawn(holder())
        group.spawn(holder())


async def timeout():
    async def task():
        for _ in range(harness.TIMEOUTS):
            with flowcoro.timeout(10):
                await flowcoro.checkpoint()
    async with flowcoro.TaskGroup() as group:
        for _ in range(harness.TIMEOUT_TASKS):
            group.spawn(task())


async def thread():
    def nothing():
        pass
    for _ in range(harness.CALLS):
        await flowcoro.to_thread(nothing)


async def memory():
    crowd = harness.Crowd(harness.PARKED)
    async def parked():
        crowd.asleep += 1
        await flowcoro.sleep(3600)
    async with flowcoro.TaskGroup() as group:
        before = harness.resident()
        for _ in range(crowd.size):
            group.spawn(parked())
        while crowd.asleep < crowd.size:
            await flowcoro.sleep(0.01)
        harness.report_memory(harness.resident() - before)


async def alive(crowd):
    async def sleeper():
        await flowcoro.sleep(crowd.nap())
        crowd.woke()
    async with flowcoro.TaskGroup() as group:
        for _ in range(crowd.size):
            group.spawn(sleeper())


CASES = dict(switch=switch, spawn=spawn, sleepers=sleepers, pingpong=pingpong, buffered=buffered, lock=lock,
             timeout=timeout, thread=thread, memory=memory, alive=alive)


def run(case, clock, *args):
    return flowcoro.run(harness.timed(case, clock, *args))


if __name__ == "__main__":
    harness.main(CASES, run, "flowcoro", flowcoro.__version__, ROOT)
