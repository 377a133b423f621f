"""Channel, select, Broadcast and Promise, step by step; test_flowcoro_models.py compares them with lists.

The promises that matter most: an item goes to exactly one receiver, in order; a cancelled receive leaves it
in the channel; a cancelled send has not sent; what was delivered before a cancel comes is not lost.
"""

import collections
import contextlib
import gc
import math
import threading
import weakref

import pytest

import flowcoro
from conftest import parked
from flowcoro_testing import run_in_kernel, wait_all_tasks_parked


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


@pytest.mark.parametrize("capacity", [-1, 1.5, math.nan, -math.inf, "1", None, True])
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
        sender, = await parked(group, channel.send("b"))
        assert channel.statistics() == {
            "capacity": 1, "items": 1, "senders_waiting": 1, "receivers_waiting": 0, "closed": False}
        sender.cancel()
        channel.close()
        assert channel.statistics() == {
            "capacity": 1, "items": 1, "senders_waiting": 0, "receivers_waiting": 0, "closed": True}


# ---- cancellation ------------------------------------------------------------------------------------------

@run_in_kernel
async def test_cancelled_receive_leaves_the_item_in_the_channel():
    channel = flowcoro.Channel(1)
    receiver, = await parked(flowcoro, channel.receive())
    receiver.cancel()
    channel.send_nowait("item")
    await wait_all_tasks_parked()
    assert receiver.cancelled() and drained(channel) == ["item"]


@pytest.mark.parametrize("capacity", [0, 1])
@run_in_kernel
async def test_cancelled_send_has_not_sent(capacity):
    channel = channel_with(*range(capacity), capacity=capacity)
    sender, = await parked(flowcoro, channel.send("item"))
    sender.cancel()
    assert drained(channel) == list(range(capacity))
    with pytest.raises(flowcoro.WouldBlock):
        channel.receive_nowait()
    await wait_all_tasks_parked()
    assert sender.cancelled()


@run_in_kernel
async def test_operations_that_need_not_wait_are_cancelled_too_and_do_nothing():
    channel = channel_with("a")
    for operation in channel.send("b"), channel.receive():
        with flowcoro.CancelScope() as scope:
            scope.cancel()
            await operation
            pytest.fail("send() and receive() are points of cancellation also when they need not wait")
        assert scope.cancelled_caught
    assert drained(channel) == ["a"]


@run_in_kernel
async def test_item_delivered_before_the_cancel_is_received_and_the_next_checkpoint_is_cancelled():
    channel, log = flowcoro.Channel(), []

    async def receive():
        log.append(await channel.receive())
        await channel.receive()

    receiver, = await parked(flowcoro, receive())
    channel.send_nowait("a")
    receiver.cancel()
    await wait_all_tasks_parked()
    assert log == ["a"] and receiver.cancelled()


@run_in_kernel
async def test_item_taken_before_its_sender_is_cancelled_was_sent():
    channel, log = flowcoro.Channel(), []

    async def send():
        await channel.send("item")
        log.append("sent")
        await flowcoro.checkpoint()
        log.append("went on")

    sender, = await parked(flowcoro, send())
    assert channel.receive_nowait() == "item"
    sender.cancel()
    await wait_all_tasks_parked()
    assert log == ["sent"] and sender.cancelled()


@run_in_kernel
async def test_those_who_are_cancelled_leave_the_line_and_the_others_keep_their_places():
    channel = flowcoro.Channel(1)
    receivers = await parked(flowcoro, *(channel.receive() for _ in range(5)))
    for index in 0, 3:
        receivers[index].cancel()
    for item in "abc":
        channel.send_nowait(item)
    assert [await receivers[index] for index in (1, 2, 4)] == list("abc")
    channel.send_nowait("-")
    senders = await parked(flowcoro, *(channel.send(item) for item in "abcde"))
    for index in 0, 3:
        senders[index].cancel()
    assert [await channel.receive() for _ in range(4)] == list("-bce")



# ---- closing -----------------------------------------------------------------------------------------------

@run_in_kernel
async def test_close_wakes_all_receivers_with_an_end_of_channel_that_names_the_channel():
    channel = flowcoro.Channel(1)
    receivers = await parked(flowcoro, *(channel.receive() for _ in range(3)))
    channel.close()
    await wait_all_tasks_parked()
    errors = [receiver.exception() for receiver in receivers]
    assert all(type(error) is flowcoro.EndOfChannel and error.channel is channel for error in errors)
    assert len(set(map(id, errors))) == 3, "a traceback belongs to one task, so each has an error of its own"


@run_in_kernel
async def test_close_wakes_all_senders_with_a_closed_error_and_they_have_not_sent():
    channel = channel_with("a", capacity=1)
    senders = await parked(flowcoro, *(channel.send(item) for item in "bcd"))
    channel.close()
    await wait_all_tasks_parked()
    assert [type(sender.exception()) for sender in senders] == [flowcoro.ClosedError] * 3
    assert [item async for item in channel] == ["a"]


@run_in_kernel
async def test_items_left_in_a_closed_channel_arrive_before_the_end():
    channel = channel_with(*"abcd")
    channel.close()
    assert channel.closed and len(channel) == 4
    assert (await channel.receive(), channel.receive_nowait()) == ("a", "b")
    assert [item async for item in channel] == ["c", "d"]
    with pytest.raises(flowcoro.EndOfChannel) as caught:
        await channel.receive()
    assert caught.value.channel is channel
    with pytest.raises(flowcoro.EndOfChannel):
        channel.receive_nowait()
    assert [item async for item in channel] == []


@pytest.mark.parametrize("capacity", [0, 1, math.inf])
@run_in_kernel
async def test_send_on_a_closed_channel_is_a_closed_error_even_if_there_is_room(capacity):
    channel = flowcoro.Channel(capacity)
    channel.close()
    channel.close()
    with pytest.raises(flowcoro.ClosedError):
        await channel.send("item")
    with pytest.raises(flowcoro.ClosedError):
        channel.send_nowait("item")
    assert len(channel) == 0


@run_in_kernel
async def test_item_delivered_before_the_close_is_received():
    channel = flowcoro.Channel()
    first, second = await parked(flowcoro, channel.receive(), channel.receive())
    channel.send_nowait("item")
    channel.close()
    assert await first == "item"
    with pytest.raises(flowcoro.EndOfChannel):
        await second


# ---- fairness ----------------------------------------------------------------------------------------------

# Operations on objects that are always ready, so that they never have to wait.
ALWAYS_READY = {
    "Channel.send": lambda: lambda channel=flowcoro.Channel(math.inf): channel.send("item"),
    "Channel.receive": lambda: channel_with(*range(5000)).receive,
    "async for": lambda: channel_with(*range(5000)).__anext__,
    "select": lambda: lambda channel=channel_with(*range(5000)): flowcoro.select(channel, (channel, "item")),
    "Broadcast.send": lambda: lambda broadcast=flowcoro.Broadcast(1): broadcast.send("item"),
    "Promise": lambda: lambda promise=kept("value"): promise,
}


def kept(value):
    promise = flowcoro.Promise()
    promise.set_result(value)
    return promise


@pytest.mark.parametrize("name", ALWAYS_READY)
@run_in_kernel
async def test_loop_over_what_is_always_ready_does_not_starve_the_others_and_can_be_cancelled(name):
    operation = ALWAYS_READY[name]()

    async def loop():
        for _ in range(5000):
            await operation()

    task = flowcoro.spawn(loop())
    for _ in range(10):
        await flowcoro.checkpoint()
    assert not task.done()
    task.cancel()
    with pytest.raises(flowcoro.TaskCancelled):
        await task


# ---- select ------------------------------------------------------------------------------------------------

def partner_of(case, item="theirs"):
    """Do, at once, the other half of a select's case. Returns what the select should see."""
    if isinstance(case, tuple):
        assert case[0].receive_nowait() == case[1]
        return None
    case.send_nowait(item)
    return item


def waiting_in(*channels):
    """How many operations wait in the channels; a case of a select is one."""
    numbers = [channel.statistics() for channel in channels]
    return sum(each["senders_waiting"] + each["receivers_waiting"] for each in numbers)


@pytest.mark.parametrize("index", range(4))
@run_in_kernel
async def test_select_waits_for_the_first_of_its_cases_and_leaves_the_others(index):
    channels = [flowcoro.Channel() for _ in range(4)]
    cases = [channels[0], (channels[1], "to 1"), channels[2], (channels[3], "to 3")]
    task, = await parked(flowcoro, flowcoro.select(*cases))
    assert waiting_in(*channels) == 4
    value = partner_of(cases[index])
    assert waiting_in(*channels) == 0
    assert await task == (index, value)


@run_in_kernel
async def test_partner_that_comes_second_finds_the_select_gone_even_in_the_same_step():
    a, b, c = (flowcoro.Channel() for _ in range(3))
    task, = await parked(flowcoro, flowcoro.select(a, b, (c, "mine")))
    b.send_nowait("to b")
    for late in (a, "late"), (b, "late"), c:
        with pytest.raises(flowcoro.WouldBlock):
            flowcoro.select_nowait(late)
    assert await task == (1, "to b")


@run_in_kernel
async def test_select_does_exactly_one_of_the_cases_that_are_ready():
    a, b, c, d = channel_with("a"), channel_with("b"), flowcoro.Channel(1), flowcoro.Channel(1)
    done = []
    for _ in range(4):
        done.append(await flowcoro.select(a, b, (c, "c"), (d, "d")))
        assert (1 - len(a)) + (1 - len(b)) + len(c) + len(d) == len(done)
    assert sorted(done, key=str) == [(0, "a"), (1, "b"), (2, None), (3, None)]


@run_in_kernel
async def test_select_among_ready_cases_prefers_none():
    a, b, c = channel_with(*range(600)), channel_with(*range(600)), flowcoro.Channel(math.inf)
    counts = collections.Counter([(await flowcoro.select(a, b, (c, "item")))[0] for _ in range(600)])
    assert all(150 <= counts[index] <= 250 for index in range(3))
    assert (600 - len(a), 600 - len(b), len(c)) == (counts[0], counts[1], counts[2])


def test_choices_of_select_are_the_same_in_each_run():
    async def main():
        a, b = channel_with(*range(100)), channel_with(*range(100))
        return [(await flowcoro.select(a, b))[0] for _ in range(100)]

    first = flowcoro.run(main())
    assert set(first) == {0, 1}
    assert flowcoro.run(main()) == first


@run_in_kernel
async def test_select_stands_in_line_with_plain_receivers_and_senders():
    channel, other = flowcoro.Channel(1), flowcoro.Channel()
    first, second, third = await parked(
        flowcoro, channel.receive(), flowcoro.select(other, channel), channel.receive())
    for item in "abc":
        channel.send_nowait(item)
    assert [await first, await second, await third] == ["a", (1, "b"), "c"]
    channel.send_nowait("-")
    await parked(flowcoro, channel.send("d"), flowcoro.select(other, (channel, "e")), channel.send("f"))
    assert [channel.receive_nowait() for _ in range(4)] == list("-def")


@pytest.mark.parametrize("index", [0, 1])
@run_in_kernel
async def test_select_that_sends_and_receives_on_one_channel_does_not_meet_itself(index):
    channel = flowcoro.Channel()
    cases = [channel, (channel, "mine")]
    task, = await parked(flowcoro, flowcoro.select(*cases))
    value = partner_of(cases[index])
    assert await task == (index, value)
    assert waiting_in(channel) == len(channel) == 0


@run_in_kernel
async def test_select_may_name_a_channel_twice_and_still_does_one_case():
    channel = flowcoro.Channel()
    receiver, = await parked(flowcoro, flowcoro.select(channel, channel))
    channel.send_nowait("a")
    with pytest.raises(flowcoro.WouldBlock):
        channel.send_nowait("b")
    index, value = await receiver
    assert index in (0, 1) and value == "a"
    sender, = await parked(flowcoro, flowcoro.select((channel, 0), (channel, 1)))
    sent = channel.receive_nowait()
    with pytest.raises(flowcoro.WouldBlock):
        channel.receive_nowait()
    assert await sender == (sent, None)


@pytest.mark.parametrize("seed", range(5))
def test_selects_that_send_or_receive_on_one_channel_meet_in_pairs(seed):
    async def main():
        channel = flowcoro.Channel()
        results = await flowcoro.when_all(*(flowcoro.select(channel, (channel, name)) for name in range(10)))
        senders = [name for name, (index, _) in enumerate(results) if index == 1]
        assert sorted(value for index, value in results if index == 0) == senders
        assert len(senders) == 5 and waiting_in(channel) == len(channel) == 0

    flowcoro.run(main(), seed=seed)


@run_in_kernel
async def test_close_wakes_a_select_with_the_error_of_its_case_and_it_leaves_the_other_channels():
    a, b, c = flowcoro.Channel(), flowcoro.Channel(), flowcoro.Channel()
    receives, = await parked(flowcoro, flowcoro.select(a, (b, "item")))
    a.close()
    sends, = await parked(flowcoro, flowcoro.select(b, (c, "item")))
    c.close()
    assert waiting_in(a, b, c) == 0
    with pytest.raises(flowcoro.EndOfChannel) as caught:
        await receives
    assert caught.value.channel is a
    await wait_all_tasks_parked()
    assert type(sends.exception()) is flowcoro.ClosedError


@run_in_kernel
async def test_closed_channel_is_a_ready_case_whose_items_come_before_its_end():
    closed, silent = channel_with("left"), flowcoro.Channel()
    closed.close()
    assert await flowcoro.select(silent, closed) == (1, "left")
    with pytest.raises(flowcoro.EndOfChannel) as caught:
        await flowcoro.select(silent, closed)
    assert caught.value.channel is closed
    with pytest.raises(flowcoro.ClosedError):
        await flowcoro.select(silent, (closed, "item"))


@run_in_kernel
async def test_cancelled_select_has_done_nothing_and_stands_nowhere():
    a, b = flowcoro.Channel(), channel_with("full", capacity=1)
    task, = await parked(flowcoro, flowcoro.select(a, (a, "mine"), (b, "mine")))
    task.cancel()
    assert waiting_in(a, b) == 0
    assert drained(b) == ["full"]
    with pytest.raises(flowcoro.WouldBlock):
        a.send_nowait("item")
    await wait_all_tasks_parked()
    assert task.cancelled()


@run_in_kernel
async def test_select_of_ready_cases_in_a_cancelled_scope_does_none():
    a, b = channel_with("a"), flowcoro.Channel(1)
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        await flowcoro.select(a, (b, "b"))
        pytest.fail("select() is a point of cancellation also when it need not wait")
    assert scope.cancelled_caught and (len(a), len(b)) == (1, 0)


@run_in_kernel
async def test_select_cancelled_after_a_partner_came_returns_what_it_has_done():
    a, b, log = flowcoro.Channel(), flowcoro.Channel(), []

    async def select():
        log.append(await flowcoro.select(a, (b, "mine")))
        await flowcoro.checkpoint()
        log.append("went on")

    for case, expected in (a, (0, "theirs")), ((b, "mine"), (1, None)):
        task, = await parked(flowcoro, select())
        partner_of(case)
        task.cancel()
        await wait_all_tasks_parked()
        assert log.pop() == expected and not log and task.cancelled()


@pytest.mark.parametrize("case", [
    None, "channel", flowcoro.Channel, (), ("channel", 1), (flowcoro.Channel(),), (flowcoro.Channel(), 1, 2),
    [flowcoro.Channel(), 1], flowcoro.Broadcast(1)], ids=repr)
@run_in_kernel
async def test_what_is_no_case_of_a_select_is_a_type_error_that_shows_it_and_nothing_is_done(case):
    ready = channel_with("item")
    with pytest.raises(TypeError, match="no case of a select: give a Channel") as caught:
        await flowcoro.select(ready, case)
    assert repr(case) in str(caught.value)
    with pytest.raises(TypeError):
        flowcoro.select_nowait(ready, case)
    assert drained(ready) == ["item"]


@run_in_kernel
async def test_select_without_cases_is_a_value_error():
    with pytest.raises(ValueError, match="without cases"):
        await flowcoro.select()
    with pytest.raises(ValueError, match="without cases"):
        flowcoro.select_nowait()


@run_in_kernel
async def test_select_nowait_does_one_case_at_once_or_raises_would_block_and_does_none():
    a, b = flowcoro.Channel(), flowcoro.Channel(1)
    assert flowcoro.select_nowait(a, (b, "b")) == (1, None)
    with pytest.raises(flowcoro.WouldBlock):
        flowcoro.select_nowait(a, (a, "a"), (b, "b"))
    assert waiting_in(a, b) == 0
    assert flowcoro.select_nowait(a, b) == (1, "b")
    receiver, = await parked(flowcoro, flowcoro.select(a))
    assert flowcoro.select_nowait((a, "a")) == (0, None)
    assert await receiver == (0, "a")
    a.close()
    with pytest.raises(flowcoro.EndOfChannel):
        flowcoro.select_nowait(a, b)


# ---- Broadcast ---------------------------------------------------------------------------------------------

def available(subscription):
    """What a subscriber can receive at once."""
    items = []
    with contextlib.suppress(flowcoro.WouldBlock, flowcoro.EndOfChannel):
        while True:
            items.append(subscription.receive_nowait())
    return items


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("capacity", [1, 3])
def test_every_subscriber_gets_every_item_in_order(capacity, seed):
    async def main():
        broadcast = flowcoro.Broadcast(capacity)

        async def subscriber(subscription):
            return [item async for item in subscription]

        async def send():
            for item in range(100):
                await broadcast.send(item)
            broadcast.close()

        subscriptions = [broadcast.subscribe() for _ in range(3)]
        *received, _ = await flowcoro.when_all(*map(subscriber, subscriptions), send())
        assert received == [list(range(100))] * 3

    flowcoro.run(main(), seed=seed)


@run_in_kernel
async def test_subscriber_gets_what_is_sent_after_it_has_subscribed():
    broadcast = flowcoro.Broadcast(5)
    await broadcast.send("nobody hears it")
    early = broadcast.subscribe()
    await broadcast.send("a")
    late = broadcast.subscribe()
    await broadcast.send("b")
    assert (available(early), available(late)) == (["a", "b"], ["b"])


@run_in_kernel
async def test_tasks_that_receive_from_one_subscription_share_its_items():
    broadcast = flowcoro.Broadcast(3)
    shared, own = broadcast.subscribe(), broadcast.subscribe()
    first, second = await parked(flowcoro, shared.receive(), shared.receive())
    for item in "abc":
        broadcast.send_nowait(item)
    assert (await first, await second, await shared.receive()) == ("a", "b", "c")
    assert available(own) == ["a", "b", "c"]


@run_in_kernel
async def test_sender_waits_for_the_slowest_of_the_subscribers_that_block():
    broadcast = flowcoro.Broadcast(2)
    fast, slow = broadcast.subscribe(), broadcast.subscribe()
    for item in "ab":
        broadcast.send_nowait(item)
    assert available(fast) == ["a", "b"]
    with pytest.raises(flowcoro.WouldBlock):
        broadcast.send_nowait("too much")
    first, second = await parked(flowcoro, broadcast.send("c"), broadcast.send("d"))
    assert available(fast) == []
    assert await slow.receive() == "a"
    await first
    assert second.state == "parked" and available(fast) == ["c"]
    assert available(slow) == ["b", "c", "d"] and available(fast) == ["d"]
    await second


@run_in_kernel
async def test_subscriber_that_drops_misses_the_oldest_and_holds_nobody_up():
    broadcast = flowcoro.Broadcast(3)
    subscription = broadcast.subscribe(slow="drop")
    for item in range(10):
        await broadcast.send(item)
    assert subscription.missed == 0, "it has not looked yet"
    assert available(subscription) == [7, 8, 9]
    assert subscription.missed == 7


@run_in_kernel
async def test_subscriber_that_lags_is_told_how_many_it_missed_and_goes_on_with_the_oldest_kept():
    broadcast = flowcoro.Broadcast(3)
    subscription = broadcast.subscribe(slow="lag")
    for missed in 7, 4:
        for item in range(missed + 3):
            await broadcast.send(item)
        with pytest.raises(flowcoro.Lagged, match=f"missed {missed} items") as caught:
            await subscription.receive()
        assert caught.value.missed == missed
        assert [await subscription.receive() for _ in range(3)] == [missed, missed + 1, missed + 2]
    assert subscription.missed == 11


@run_in_kernel
async def test_close_of_a_broadcast_lets_subscribers_have_what_is_left_and_then_ends_them():
    broadcast = flowcoro.Broadcast(2)
    behind, waiting = broadcast.subscribe(), broadcast.subscribe()
    for item in "ab":
        broadcast.send_nowait(item)
    assert available(waiting) == ["a", "b"]
    receivers = await parked(flowcoro, waiting.receive(), waiting.receive())
    sender, = await parked(flowcoro, broadcast.send("c"))
    broadcast.close()
    broadcast.close()
    await wait_all_tasks_parked()
    for receiver in receivers:
        assert type(receiver.exception()) is flowcoro.EndOfChannel and receiver.exception().channel is waiting
    assert type(sender.exception()) is flowcoro.ClosedError
    assert [item async for item in behind] == ["a", "b"]
    with pytest.raises(flowcoro.EndOfChannel):
        await behind.receive()


@run_in_kernel
async def test_closed_broadcast_takes_neither_items_nor_subscribers():
    broadcast = flowcoro.Broadcast(1)
    broadcast.close()
    with pytest.raises(flowcoro.ClosedError):
        await broadcast.send("item")
    with pytest.raises(flowcoro.ClosedError):
        broadcast.send_nowait("item")
    with pytest.raises(flowcoro.ClosedError):
        broadcast.subscribe()


@run_in_kernel
async def test_cancelled_send_to_a_broadcast_reaches_nobody_and_those_behind_it_keep_their_order():
    broadcast = flowcoro.Broadcast(1)
    subscription = broadcast.subscribe()
    broadcast.send_nowait("a")
    senders = await parked(flowcoro, *(broadcast.send(item) for item in "bcde"))
    senders[0].cancel()
    senders[2].cancel()
    assert available(subscription) == ["a", "c", "e"]
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        await broadcast.send("although there is room")
    assert scope.cancelled_caught and available(subscription) == []


@run_in_kernel
async def test_cancelled_receive_leaves_the_item_to_the_next_receive_of_the_subscription():
    broadcast = flowcoro.Broadcast(1)
    subscription = broadcast.subscribe()
    gone, = await parked(flowcoro, subscription.receive())
    gone.cancel()
    broadcast.send_nowait("a")
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        await subscription.receive()
    assert scope.cancelled_caught and available(subscription) == ["a"]
    late, = await parked(flowcoro, subscription.receive())
    broadcast.send_nowait("b")
    late.cancel()
    assert await late == "b", "it was delivered before the cancel"


@run_in_kernel
async def test_subscriber_that_leaves_lets_the_senders_go_on_and_wakes_those_who_receive_there():
    broadcast = flowcoro.Broadcast(1)
    stays = broadcast.subscribe()
    with broadcast.subscribe() as leaves:
        receiver, = await parked(flowcoro, leaves.receive())
        broadcast.send_nowait("a")
        assert await receiver == "a" and available(stays) == ["a"]
        broadcast.send_nowait("b")
        assert available(stays) == ["b"]
        senders = await parked(flowcoro, broadcast.send("c"), broadcast.send("d"))
    assert available(stays) == ["c", "d"]
    for sender in senders:
        await sender
    receivers = await parked(flowcoro, stays.receive(), stays.receive())
    stays.close()
    stays.close()
    await wait_all_tasks_parked()
    assert [type(receiver.exception()) for receiver in receivers] == [flowcoro.ClosedError] * 2
    with pytest.raises(flowcoro.ClosedError, match="closed Subscription"):
        await leaves.receive()


@run_in_kernel
async def test_broadcast_and_subscription_statistics():
    broadcast = flowcoro.Broadcast(2)
    subscription = broadcast.subscribe(slow="drop")
    assert broadcast.statistics() == {
        "capacity": 2, "sent": 0, "subscribers": 1, "senders_waiting": 0, "closed": False}
    receiver, = await parked(flowcoro, subscription.receive())
    assert subscription.statistics() == {
        "behind": 0, "missed": 0, "slow": "drop", "closed": False, "tasks_waiting": 1}
    for item in range(5):
        broadcast.send_nowait(item)
    assert subscription.statistics()["behind"] == 4 and subscription.statistics()["tasks_waiting"] == 0
    assert await subscription.receive() == 3
    assert subscription.statistics() == {
        "behind": 1, "missed": 2, "slow": "drop", "closed": False, "tasks_waiting": 0}
    blocks = broadcast.subscribe()
    broadcast.send_nowait(5)
    broadcast.send_nowait(6)
    sender, = await parked(flowcoro, broadcast.send(7))
    assert broadcast.statistics() == {
        "capacity": 2, "sent": 7, "subscribers": 2, "senders_waiting": 1, "closed": False}
    blocks.close()
    broadcast.close()
    assert blocks.statistics()["closed"] and not subscription.statistics()["closed"]
    assert broadcast.statistics() == {
        "capacity": 2, "sent": 8, "subscribers": 1, "senders_waiting": 0, "closed": True}


@pytest.mark.parametrize("capacity", [0, -1, 1.5, math.inf, "1", None, True])
def test_broadcast_of_nonsense_capacity_is_a_value_error(capacity):
    with pytest.raises(ValueError, match="capacity"):
        flowcoro.Broadcast(capacity)


def test_subscription_that_is_slow_in_an_unknown_way_is_a_value_error():
    with pytest.raises(ValueError, match='give "block", "drop" or "lag"'):
        flowcoro.Broadcast(1).subscribe(slow="wait")


# ---- Promise -----------------------------------------------------------------------------------------------

async def wait_for(promise):
    return await promise


@run_in_kernel
async def test_promise_wakes_all_that_wait_and_gives_its_value_as_often_as_it_is_awaited():
    promise = flowcoro.Promise()
    tasks = await parked(flowcoro, *(wait_for(promise) for _ in range(3)))
    assert promise.statistics() == {"done": False, "tasks_waiting": 3} and not promise.done()
    promise.set_result("value")
    assert promise.statistics() == {"done": True, "tasks_waiting": 0} and promise.done()
    assert [await task for task in tasks] == ["value"] * 3
    assert [await promise, await promise] == ["value"] * 2


def test_promise_set_before_it_is_awaited_and_before_there_is_a_kernel_gives_its_value():
    broken = flowcoro.Promise()
    broken.set_exception(KeyError("broken"))
    assert flowcoro.run(wait_for(kept("value"))) == "value"
    with pytest.raises(KeyError, match="broken"):
        flowcoro.run(wait_for(broken))


@run_in_kernel
async def test_promise_set_by_a_thread_wakes_the_tasks_that_wait():
    promise = flowcoro.Promise()
    tasks = await parked(flowcoro, wait_for(promise), wait_for(promise))
    thread = threading.Thread(target=promise.set_result, args=["value"])
    thread.start()
    assert [await task for task in tasks] == ["value"] * 2
    thread.join()


@run_in_kernel
async def test_broken_promise_raises_its_error_in_all_and_the_traceback_does_not_grow():
    promise = flowcoro.Promise()
    tasks = await parked(flowcoro, wait_for(promise), wait_for(promise))
    error = KeyError("broken")
    promise.set_exception(error)
    for task in tasks:
        with pytest.raises(KeyError):
            await task
        assert task.exception() is error
    lengths = []
    for _ in range(3):
        with pytest.raises(KeyError) as caught:
            await promise
        lengths.append(len(caught.traceback))
    assert len(set(lengths)) == 1


def test_a_promise_cannot_be_broken_with_what_python_takes_for_the_end_of_a_coroutine():
    promise = flowcoro.Promise()
    with pytest.raises(TypeError, match="StopIteration.*another error"):
        promise.set_exception(StopIteration(3))
    assert not promise.done()
    promise.set_result(1)


@pytest.mark.parametrize("first", ["set_result", "set_exception"])
@pytest.mark.parametrize("second", ["set_result", "set_exception"])
@run_in_kernel
async def test_promise_set_twice_is_an_error_and_keeps_what_it_was_set_to_first(first, second):
    promise, error = flowcoro.Promise(), KeyError("first")
    getattr(promise, first)(error)
    with pytest.raises(RuntimeError, match="set already"):
        getattr(promise, second)(KeyError("second"))
    if first == "set_result":
        assert await promise is error
    else:
        with pytest.raises(KeyError, match="first"):
            await promise


@pytest.mark.parametrize("error", [None, "error", KeyError])
@run_in_kernel
async def test_what_is_no_exception_cannot_break_a_promise_and_leaves_it_unset(error):
    promise = flowcoro.Promise()
    with pytest.raises(TypeError, match="exception object"):
        promise.set_exception(error)
    promise.set_result("value")
    assert await promise == "value"


@run_in_kernel
async def test_cancelled_waiter_leaves_the_promise_to_the_others():
    promise = flowcoro.Promise()
    gone, stays, late = await parked(flowcoro, *(wait_for(promise) for _ in range(3)))
    gone.cancel()
    assert promise.statistics() == {"done": False, "tasks_waiting": 2}
    promise.set_result("value")
    late.cancel()
    assert [await stays, await late] == ["value"] * 2, "delivered before the cancel, so received"
    assert gone.cancelled()


@run_in_kernel
async def test_awaiting_a_kept_promise_in_a_cancelled_scope_is_cancelled():
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        await kept("value")
        pytest.fail("awaiting a Promise is a point of cancellation also when it is set")
    assert scope.cancelled_caught


def test_broken_promise_that_nobody_awaits_is_reported_when_it_dies(reports):
    promise, error = flowcoro.Promise(), KeyError("broken")
    promise.set_exception(error)
    assert reports == []
    del promise
    assert reports == [("flowcoro: a Promise was broken and nobody awaited it", error)]


@run_in_kernel
async def test_broken_promise_whose_waiters_were_all_cancelled_is_reported(reports):
    promise, error = flowcoro.Promise(), KeyError("broken")
    waiter, = await parked(flowcoro, wait_for(promise))
    waiter.cancel()
    await wait_all_tasks_parked()
    promise.set_exception(error)
    del promise
    assert [reported for _, reported in reports] == [error]


@run_in_kernel
async def test_broken_promise_that_was_awaited_or_set_in_vain_is_not_reported(reports):
    promise = flowcoro.Promise()
    promise.set_exception(KeyError("broken"))
    with pytest.raises(RuntimeError):
        promise.set_exception(KeyError("who sets it twice has the error in hand"))
    with pytest.raises(KeyError):
        await promise
    del promise
    gc.collect()
    assert reports == []


# ---- items are let go --------------------------------------------------------------------------------------
# By reference counts alone: with the collector off, an item held by a circle would stay.

@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


async def receive_and_go_on(receive, alive, go_on):
    """Receive an item, note a weak reference, let go of it, then wait until `go_on` is set."""
    alive.append(weakref.ref(await receive()))
    await go_on.wait()


async def received_by(select):
    return (await select)[1]


# How an item is sent and received: (the receive, the send). Nothing ever happens in the other channel.
WAYS = {
    "send, receive": lambda channel, other: (channel.receive, channel.send),
    "send, select": lambda channel, other: (
        lambda: received_by(flowcoro.select(channel, other)), channel.send),
    "select, receive": lambda channel, other: (
        channel.receive, lambda item: flowcoro.select(other, (channel, item))),
    "select, select": lambda channel, other: (
        lambda: received_by(flowcoro.select(channel, other)),
        lambda item: flowcoro.select(other, (channel, item))),
}


@pytest.mark.parametrize("order", ["receiver waits", "sender waits"])
@pytest.mark.parametrize("capacity", [0, 1])
@pytest.mark.parametrize("way", WAYS)
@run_in_kernel
async def test_item_is_freed_when_its_receiver_lets_go_of_it(way, capacity, order, no_collector):
    channel, other = flowcoro.Channel(capacity), flowcoro.Channel()
    receive, send = WAYS[way](channel, other)
    alive, go_on = [], flowcoro.Event()
    if order == "receiver waits":
        receiver, = await parked(flowcoro, receive_and_go_on(receive, alive, go_on))
        await send(Item())
    else:
        sender = flowcoro.spawn(send(Item()))
        await wait_all_tasks_parked()
        assert sender.done() == (capacity == 1)
        receiver = flowcoro.spawn(receive_and_go_on(receive, alive, go_on))
    await wait_all_tasks_parked()
    assert receiver.state == "parked" and alive[0]() is None
    go_on.set()


@run_in_kernel
async def test_item_that_woke_its_receiver_is_freed_even_if_the_receiver_never_waits_again(no_collector):
    channel = flowcoro.Channel()

    async def receive():
        item = weakref.ref(await channel.receive())
        await flowcoro.checkpoint()
        return item()

    receiver, = await parked(flowcoro, receive())
    channel.send_nowait(Item())
    assert await receiver is None


@pytest.mark.parametrize("way", ["send", "select"])
@pytest.mark.parametrize("end", ["cancel", "close"])
@run_in_kernel
async def test_item_that_was_not_sent_is_freed(way, end, no_collector):
    channel, other, item = flowcoro.Channel(), flowcoro.Channel(), Item()
    alive = weakref.ref(item)

    async def send(item):
        await (channel.send(item) if way == "send" else flowcoro.select(other, (channel, item)))

    sender, = await parked(flowcoro, send(item))
    del item
    if end == "cancel":
        sender.cancel()
    else:
        channel.close()
    await wait_all_tasks_parked()
    assert type(sender.exception()) is (flowcoro.TaskCancelled if end == "cancel" else flowcoro.ClosedError)
    del sender
    assert alive() is None


def receiving():
    channel = flowcoro.Channel()
    return channel, channel.receive


def sending():
    channel = flowcoro.Channel()
    return channel, lambda: channel.send("item")


def selecting():
    channel = flowcoro.Channel()
    return channel, lambda: flowcoro.select(channel)


def broadcasting():
    broadcast = flowcoro.Broadcast(1)
    broadcast.subscribe()
    broadcast.send_nowait("item")
    return broadcast, lambda: broadcast.send("item")


@pytest.mark.parametrize("make", [receiving, sending, selecting, broadcasting])
@run_in_kernel
async def test_task_that_ended_because_of_a_close_is_freed(make, no_collector):
    closes, operation = make()

    async def work():
        await operation()

    waits, = await parked(flowcoro, work())
    closes.close()
    comes_late = flowcoro.spawn(work())
    await wait_all_tasks_parked()
    assert isinstance(waits.exception(), flowcoro.ClosedError)
    assert isinstance(comes_late.exception(), flowcoro.ClosedError)
    alive = weakref.ref(waits), weakref.ref(comes_late)
    del waits, comes_late
    await flowcoro.checkpoint()
    assert [task() for task in alive] == [None, None]


@run_in_kernel
async def test_broadcast_keeps_the_last_items_only(no_collector):
    broadcast, alive = flowcoro.Broadcast(2), []
    subscription = broadcast.subscribe()
    for _ in range(5):
        item = Item()
        alive.append(weakref.ref(item))
        await broadcast.send(item)
        assert await subscription.receive() is item
    del item
    assert [item() is None for item in alive] == [True, True, True, False, False]
