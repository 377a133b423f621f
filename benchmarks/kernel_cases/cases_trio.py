"""trio's cases. Run by ../kernel.py; see there what each case counts."""

import trio

import harness


async def switch():
    async def task():
        for _ in range(harness.CHECKPOINTS):
            await trio.lowlevel.checkpoint()
    async with trio.open_nursery() as nursery:
        for _ in range(harness.TASKS):
            nursery.start_soon(task)


async def spawn():
    async def nothing():
        pass
    for _ in range(harness.GROUPS):
        async with trio.open_nursery() as nursery:
            for _ in range(harness.GROUP_SIZE):
                nursery.start_soon(nothing)


async def sleepers():
    async def sleeper(number):
        await trio.sleep(harness.short(number))
    async with trio.open_nursery() as nursery:
        for number in range(harness.SLEEPERS):
            nursery.start_soon(sleeper, number)


async def pingpong():
    send_there, receive_there = trio.open_memory_channel(1)
    send_back, receive_back = trio.open_memory_channel(1)
    async def echo():
        for _ in range(harness.ROUND_TRIPS):
            await send_back.send(await receive_there.receive())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        for number in range(harness.ROUND_TRIPS):
            await send_there.send(number)
            await receive_back.receive()


async def buffered():
    send, receive = trio.open_memory_channel(harness.CAPACITY)
    async def produce():
        for number in range(harness.ITEMS):
            await send.send(number)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(produce)
        for _ in range(harness.ITEMS):
            await receive.receive()


async def lock():
    lock = trio.Lock()
    async def holder():
        for _ in range(harness.HANDOVERS):
            async with lock:
                await trio.lowlevel.checkpoint()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(holder)
        nursery.start_soon(holder)


async def timeout():
    async def task():
        for _ in range(harness.TIMEOUTS):
            with trio.fail_after(10):
                await trio.lowlevel.checkpoint()
    async with trio.open_nursery() as nursery:
        for _ in range(harness.TIMEOUT_TASKS):
            nursery.start_soon(task)


async def thread():
    def nothing():
        pass
    for _ in range(harness.CALLS):
        await trio.to_thread.run_sync(nothing)


async def memory():
    crowd = harness.Crowd(harness.PARKED)
    async def parked():
        crowd.asleep += 1
        await trio.sleep(3600)
    async with trio.open_nursery() as nursery:
        before = harness.resident()
        for _ in range(crowd.size):
            nursery.start_soon(parked)
        while crowd.asleep < crowd.size:
            await trio.sleep(0.01)
        harness.report_memory(harness.resident() - before)


async def alive(crowd):
    async def sleeper():
        await trio.sleep(crowd.nap())
        crowd.woke()
    async with trio.open_nursery() as nursery:
        for _ in range(crowd.size):
            nursery.start_soon(sleeper)


CASES = dict(switch=switch, spawn=spawn, sleepers=sleepers, pingpong=pingpong, buffered=buffered, lock=lock,
             timeout=timeout, thread=thread, memory=memory, alive=alive)


def run(case, clock, *args):
    return trio.run(harness.timed, case, clock, *args)


if __name__ == "__main__":
    harness.main(CASES, run, "trio", trio.__version__)
