"""Nothing is left behind: 100,000 tasks spawned, cancelled and timed out, and all is where it was before.

What is counted: the kernel's own numbers (tasks, timers, descriptors), Python's objects, file descriptors, threads,
and the memory of the process. A leak of one object per task would be 100,000 of them.

What other tests have left in the process (threads that idle for a while, caches) is in none of these numbers: such a
test starts this file as a program, with its own name.
"""

import contextlib
import functools
import gc
import math
import os
import subprocess
import sys
import threading

import pytest

import flowcoro
from flowcoro_testing import VirtualClock

TASKS = 100_000
TASKS_PER_ROUND = 500
ROUNDS = TASKS // TASKS_PER_ROUND
WARM_UP = 20

# Objects by which Python's own caches may differ; a leak is as many as there are rounds, or tasks.
SLACK_OBJECTS = ROUNDS // 2

# Bytes by which the allocator's free lists may differ. A leaked task is at least 500 bytes: 50 MB in all.
SLACK_BYTES = 8 << 20


def in_a_process_of_its_own(function):
    @functools.wraps(function)
    def test(**parameters):
        child = subprocess.run([sys.executable, "-W", "error", __file__, function.__name__, *parameters.values()],
                               env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                               capture_output=True, text=True)
        assert child.returncode == 0 and not child.stderr, child.stderr

    return test if __name__ != "__main__" else function


def resident_bytes():
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def descriptors():
    try:
        return sorted(os.listdir("/proc/self/fd"))
    except OSError:
        return []


def count_objects():
    for _ in range(3):          # finalisers may make garbage of their own
        gc.collect()
    return len(gc.get_objects())


def kernel_numbers():
    numbers = flowcoro.statistics()
    return {"alive": numbers["tasks"]["alive"], "ready": numbers["tasks"]["ready"],
            "descriptors": numbers["descriptors"], "io_waiting": numbers["io_waiting"],
            "thread_calls": numbers["thread_calls"]}


class Round:
    """One round: tasks that end in every way there is."""

    def __init__(self):
        self.event = flowcoro.Event()
        self.lock = flowcoro.Lock()
        self.channel = flowcoro.Channel(1)
        self.ended = 0

    async def life(self, number):
        try:
            await getattr(self, self.ways[number % len(self.ways)])()
        finally:
            self.ended += 1

    ways = ("returns", "sleeps", "is_cancelled_asleep", "is_cancelled_for_an_event", "times_out", "moves_on",
            "is_in_time", "is_cancelled_in_a_group", "fails", "is_cancelled_at_a_lock", "is_cancelled_at_a_channel",
            "works_in_a_shield", "leaves_a_generator", "awaits_a_cancelled_task", "moves_its_deadline")

    async def returns(self):
        return object()

    async def sleeps(self):
        await flowcoro.sleep(1)

    async def is_cancelled_asleep(self):
        await flowcoro.sleep(1e6)

    async def is_cancelled_for_an_event(self):
        await self.event.wait()

    async def times_out(self):
        with contextlib.suppress(TimeoutError), flowcoro.timeout(1):
            await flowcoro.sleep(math.inf)

    async def moves_on(self):
        with flowcoro.move_on_after(0.5):
            await self.event.wait()

    async def is_in_time(self):
        with flowcoro.timeout(1e6):
            await flowcoro.sleep(1)

    async def is_cancelled_in_a_group(self):
        async with flowcoro.TaskGroup() as group:
            group.spawn(flowcoro.sleep(math.inf))

    async def fails(self):
        with contextlib.suppress(ExceptionGroup):
            async with flowcoro.TaskGroup() as group:
                group.spawn(self.is_cancelled_for_an_event())
                raise ValueError

    async def is_cancelled_at_a_lock(self):
        async with self.lock:
            await flowcoro.sleep(1e6)

    async def is_cancelled_at_a_channel(self):
        await flowcoro.select(self.channel, (flowcoro.Channel(), object()))

    async def works_in_a_shield(self):
        try:
            await flowcoro.sleep(1e6)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(1)

    async def leaves_a_generator(self):
        async def numbers():
            try:
                yield 1
            finally:
                await flowcoro.checkpoint()

        async for _ in numbers():
            break

    async def awaits_a_cancelled_task(self):
        task = flowcoro.spawn(flowcoro.sleep(math.inf))
        await flowcoro.checkpoint()
        task.cancel()
        with contextlib.suppress(flowcoro.TaskCancelled):
            await task

    async def moves_its_deadline(self):
        with flowcoro.move_on_after(1e6) as scope:
            scope.deadline = flowcoro.now() + 0.5
            await flowcoro.sleep(math.inf)

    async def run(self, tasks):
        async with flowcoro.TaskGroup() as group:
            for number in range(tasks):
                group.spawn(self.life(number))
            await flowcoro.sleep(2)
            group.cancel()
        assert self.ended == tasks


@in_a_process_of_its_own
def test_100000_tasks_spawned_cancelled_and_timed_out_leave_nothing_behind():
    async def main():
        for _ in range(WARM_UP):
            await Round().run(TASKS_PER_ROUND)
        await flowcoro.sleep(1)
        objects, numbers = count_objects(), kernel_numbers()
        memory, files, threads = resident_bytes(), descriptors(), threading.active_count()
        spawned = flowcoro.statistics()["tasks"]["spawned"]
        for _ in range(ROUNDS):
            await Round().run(TASKS_PER_ROUND)
        await flowcoro.sleep(1)
        assert flowcoro.statistics()["tasks"]["spawned"] - spawned >= TASKS
        assert kernel_numbers() == numbers
        assert numbers["alive"] == 1, "main"
        assert flowcoro.statistics()["timers"] < 2 * TASKS_PER_ROUND
        assert abs(count_objects() - objects) < SLACK_OBJECTS
        assert descriptors() == files
        assert threading.active_count() == threads
        assert resident_bytes() - memory < SLACK_BYTES

    flowcoro.run(main(), clock=VirtualClock())


def test_a_hundred_thousand_timers_that_are_never_needed_do_not_pile_up():
    async def main():
        async def client(calls):
            for _ in range(calls):
                with flowcoro.timeout(1e6):
                    await flowcoro.checkpoint()

        most = 0
        async with flowcoro.TaskGroup() as group:
            for _ in range(100):
                group.spawn(client(1000))
            while len(group._tasks):
                most = max(most, flowcoro.statistics()["timers"])
                await flowcoro.checkpoint()
        assert most < 1000

    flowcoro.run(main(), clock=VirtualClock())


@pytest.mark.parametrize("ending", ["returns", "fails", "is cancelled", "deadlocks"])
@in_a_process_of_its_own
def test_a_hundred_runs_leave_no_file_descriptor_and_no_object_behind(ending):
    async def main():
        flowcoro.spawn(flowcoro.sleep(math.inf if ending != "deadlocks" else 0))
        reader, writer = os.pipe()
        try:
            pollable = flowcoro.Pollable(reader)
            pollable.close()
        finally:
            os.close(reader)
            os.close(writer)
        await flowcoro.checkpoint()
        if ending == "fails":
            raise ValueError
        if ending == "is cancelled":
            flowcoro.current_task().cancel()
            await flowcoro.checkpoint()
        if ending == "deadlocks":
            await flowcoro.Event().wait()

    def run_once():
        with contextlib.suppress(ValueError, flowcoro.TaskCancelled, flowcoro.Deadlock):
            flowcoro.run(main(), clock=VirtualClock())

    for _ in range(10):
        run_once()
    objects, files, threads = count_objects(), descriptors(), threading.active_count()
    for _ in range(100):
        run_once()
    assert descriptors() == files
    assert threading.active_count() == threads
    assert abs(count_objects() - objects) < 50


@in_a_process_of_its_own
def test_a_task_that_lives_long_does_not_grow():
    """What a task keeps of each operation it has done: nothing."""
    async def main():
        event, channel = flowcoro.Event(), flowcoro.Channel(1)

        async def once():
            with flowcoro.move_on_after(0.5):
                await event.wait()
            with flowcoro.CancelScope(shield=True):
                await channel.send(1)
            await flowcoro.when_any(channel.receive(), flowcoro.sleep(1))
            await flowcoro.spawn(flowcoro.sleep(1))

        for _ in range(100):
            await once()
        objects = count_objects()
        blocks = sys.getallocatedblocks()
        for _ in range(3000):
            await once()
        assert abs(count_objects() - objects) < 50
        assert sys.getallocatedblocks() - blocks < 1000

    flowcoro.run(main(), clock=VirtualClock())


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
