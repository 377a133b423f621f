"""Channel, select, Broadcast and Promise, step by step; test_flowcoro_models.py compares them with lists.

The promises that matter most: an item goes to exactly one receiver, in order; a cancelled receive leaves it in the
channel; a cancelled send has not sent; what was delivered before a cancel comes is not lost.
"""

import collections
import gc
import math
import os
import sys
import threading
import weakref

import pytest

import flowcoro
from flowcoro_testing import run_in_kernel, wait_all_tasks_parked


async def parked(group, *coros):
    """Spawn the coroutines one after the other, each once the one before waits. Returns the tasks."""
    tasks = []
    for coro in coros:
        tasks.append(group.spawn(coro))
        await wait_all_tasks_parked()
        assert tasks[-1].state == "parked"
    return tasks


def channel_with(*items, capacity=math.inf):
    channel = flowcoro.Channel(capacity)
    for item in items:
        channel.send_nowait(item)
    return channel


def drained(channel):
    """What is in a channel, taken out."""
    return [channel.receive_nowait() for _ in range(len(channel))]


class Item:
    """Something that can be seen to be freed."""


# ---- Channel -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("capacity", [0, 1, 3, math.inf])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_items_arrive_once_and_in_order_whatever_the_capacity(capacity, seed):
    async def main():
        channel, received = flowcoro.Channel(capacity), []

        async def send():
            for item in range(300):
                await channel.send(item)
            channel.close()

        async with flowcoro.TaskGroup() as group:
            group.spawn(send())
            async for item in channel:
                received.append(item)
        assert received == list(range(300))

    flowcoro.run(main(), seed=seed)


@run_in_kernel
async def test_send_without_capacity_waits_until_the_item_is_received():
    channel = flowcoro.Channel()
    async with flowcoro.TaskGroup() as group:
        sender, = await parked(group, channel.send("item"))
        assert len(channel) == 0
        assert await channel.receive() == "item"
        await sender


@run_in_kernel
async def test_send_waits_only_when_the_channel_is_full():
    channel = flowcoro.Channel(2)
    await channel.send("a")
    await channel.send("b")
    async with flowcoro.TaskGroup() as group:
        await parked(group, channel.send("c"), channel.send("d"))
        assert len(channel) == 2
        assert [await channel.receive() for _ in range(4)] == list("abcd")


@run_in_kernel
async def test_receivers_are_served_in_the_order_of_arrival():
    channel = flowcoro.Channel()
    async with flowcoro.TaskGroup() as group:
        tasks = await parked(group, *(channel.receive() for _ in range(3)))
        for item in "abc":
            channel.send_nowait(item)
    assert [task.result() for task in tasks] == list("abc")


@run_in_kernel
async def test_receiver_that_comes_later_cannot_take_what_was_handed_to_one_who_waited():
    channel = flowcoro.Channel()
    async with flowcoro.TaskGroup() as group:
        waiting, = await parked(group, channel.receive())
        await channel.send("item")
        with pytest.raises(flowcoro.WouldBlock):
            channel.receive_nowait()
    assert waiting.result() == "item"


@run_in_kernel
async def test_sender_that_comes_later_cannot_take_the_place_of_one_who_waited():
    channel = channel_with("a", capacity=1)
    async with flowcoro.TaskGroup() as group:
        await parked(group, channel.send("b"))
        assert channel.receive_nowait() == "a"
        with pytest.raises(flowcoro.WouldBlock):
            channel.send_nowait("c")
    assert drained(channel) == ["b"]


@run_in_kernel
async def test_nowait_operations_raise_would_block_and_do_nothing():
    channel = flowcoro.Channel(1)
    with pytest.raises(flowcoro.WouldBlock):
        channel.receive_nowait()
    channel.send_nowait("a")
    with pytest.raises(flowcoro.WouldBlock):
        channel.send_nowait("b")
    assert drained(channel) == ["a"]


@run_in_kernel
async def test_unbounded_channel_never_makes_a_sender_wait():
    channel = flowcoro.Channel(math.inf)
    for item in range(1000):
        channel.send_nowait(item)
    assert drained(channel) == list(range(1000))


@pytest.mark.parametrize("capacity", [-1, 1.5, math.nan, -math.inf, "1", None])
def test_channel_of_nonsense_capacity_is_a_value_error(capacity):
    with pytest.raises(ValueError, match="capacity"):
        flowcoro.Channel(capacity)


@run_in_kernel
async def test_channel_statistics():
    channel = flowcoro.Channel(1)
    async with flowcoro.TaskGroup() as group:
        receivers = await parked(group, channel.receive(), channel.receive())
        assert channel.statistics() == {
            "capacity": 1, "items": 0, "senders_waiting": 0, "receivers_waiting": 2, "closed": False}
        for receiver in receivers:
            receiver.cancel()
        await channel.send("a")
        await parked(group, channel.send("b"))
        assert channel.statistics() == {
            "capacity": 1, "items": 1, "senders_waiting": 1, "receivers_waiting": 0, "closed": False}
        channel.close()
        assert channel.statistics() == {
            "capacity": 1, "items": 1, "senders_waiting": 0, "receivers_waiting": 0, "closed": True}
        group.cancel()
