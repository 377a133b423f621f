"""Both ends of a WebSocket: messages, back-pressure, cancellation, keep-alive, closing, broadcast. In memory, in no time."""

import contextlib
import errno
import functools
import gc
import os
import random
import weakref

import pytest

import flowcoro
import flowcoro_websocket
from flowcoro_net import Socket
from flowcoro_testing import explore, memory_socket_pair, run_in_kernel, wait_all_tasks_parked
from flowcoro_websocket import (Close, ConnectionClosed, Deflate, LocalProtocolError, NEED_DATA, Ping, WebSocket,
                                WebSocketConnection, broadcast, encode_message)
from test_net_cancel import cancelled_at

simulated = functools.partial(run_in_kernel, timeout=100_000)       # seconds of the virtual clock: a test that hangs fails
SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 30)))
BIG = "x" * 500_000


@contextlib.asynccontextmanager
async def pair(capacity=64 * 2**10, deflate=None, client=None, **options):
    """A server's end and a client's; `options` of the server, `client` those of the client."""
    one, other = memory_socket_pair(Socket, capacity=capacity)
    async with one, other:
        yield (WebSocket(one, "server", deflate=deflate, **options),
               WebSocket(other, "client", deflate=deflate, **{"ping_interval": None, **(client or {})}))


class Peer:
    """A client that does nothing by itself: a codec and a socket."""

    def __init__(self, sock, deflate=None):
        self.sock, self.codec = sock, WebSocketConnection("client", deflate=deflate)

    async def write(self, data):
        await self.sock.write(data)

    async def next(self):
        while (event := self.codec.next_event()) is NEED_DATA:
            data = await self.sock.read()
            self.codec.receive_data(data) if data else self.codec.receive_end()
        return event


@contextlib.asynccontextmanager
async def served(capacity=64 * 2**10, deflate=None, **options):
    """A server's end, and a Peer."""
    one, other = memory_socket_pair(Socket, capacity=capacity)
    async with one, other:
        yield WebSocket(one, "server", deflate=deflate, **options), Peer(other, deflate)


def readers():
    return flowcoro.dump_tasks().count("read for a WebSocket")


# ---- messages --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("deflate", [None, Deflate(threshold=0)])
@pytest.mark.parametrize("message", [
    "", "text", "ünï 🎉", b"", b"\0\xff", bytearray(b"array"), memoryview(b"view"), "long" * 50_000])
@simulated
async def test_messages_go_both_ways_as_what_they_are(message, deflate):
    async with pair(deflate=deflate) as ends:
        for here, there in (ends, ends[::-1]):
            async with flowcoro.TaskGroup() as group:
                group.spawn(here.send(message))
                got = await there.receive()
            assert got == message and type(got) is (str if isinstance(message, str) else bytes)


@simulated
async def test_messages_that_come_in_one_piece_are_received_one_by_one():
    async with served() as (ws, peer):
        await peer.write(b"".join(map(peer.codec.send_message, "abc")))
        assert [await ws.receive() for _ in range(3)] == ["a", "b", "c"]


@simulated
async def test_what_is_no_message_is_refused_and_nothing_sent():
    async with pair() as (server, client):
        for wrong in (7, None, {"a": 1}):
            with pytest.raises(TypeError, match="str or bytes-like"):
                await server.send(wrong)
        await server.send("fine")
        assert await client.receive() == "fine"


@simulated
async def test_each_operation_is_a_checkpoint():
    async with pair() as (server, client):
        for number, make in enumerate((lambda: server.send("x"), lambda: server.receive(), lambda: server.ping(),
                                       lambda: server.send(["x"]), lambda: anext(server), lambda: server.wait_closed(),
                                       lambda: anext(server.receive_pieces()), lambda: client.close())):
            with flowcoro.CancelScope() as scope:
                scope.cancel()
                await make()
            assert scope.cancelled_caught, number
            assert not server.closed
        assert client.closed


@simulated
async def test_who_sends_all_the_time_and_who_finds_messages_there_lets_others_run():
    async with served(capacity=2**20) as (ws, peer):
        await peer.write(peer.codec.send_message("x") * 1000)
        turns = 0

        async def other():
            nonlocal turns
            while True:
                turns += 1
                await flowcoro.checkpoint()

        async with flowcoro.TaskGroup() as group:
            group.spawn(other())
            for _ in range(1000):
                await ws.receive()
            assert turns > 2
            turns = 0
            for _ in range(1000):
                await ws.send("x")
            assert turns > 2
            group.cancel()


@pytest.mark.parametrize("leave", [False, True])
@simulated
async def test_who_receives_or_drops_many_pieces_that_are_there_lets_others_run(leave):
    async with served(capacity=2**20, ping_interval=None) as (ws, peer):
        await peer.write(b"".join(peer.codec.send_piece("x", number == 0, number == 999) for number in range(1000)))
        await peer.write(peer.codec.send_message("next"))
        turns = 0

        async def other():
            nonlocal turns
            while True:
                turns += 1
                await flowcoro.checkpoint()

        async with flowcoro.TaskGroup() as group:
            group.spawn(other())
            pieces = ws.receive_pieces()
            assert await anext(pieces) == "x"
            turns = 0
            if not leave:
                assert [piece async for piece in pieces] == ["x"] * 999
                assert turns > 2
            assert await ws.receive() == "next"
            assert turns > 2
            group.cancel()


@pytest.mark.parametrize("how", ["receive", "iterate", "background"])
@simulated
async def test_who_receives_a_message_in_many_fragments_that_are_there_lets_others_run(how):
    async with served(capacity=2**20, ping_interval=None) as (ws, peer):
        await peer.write(b"".join(peer.codec.send_piece("x", number == 0, number == 1999) for number in range(2000)))
        turns = 0

        async def other():
            nonlocal turns
            while not got:
                turns += 1
                await flowcoro.checkpoint()

        async with flowcoro.TaskGroup() as group:
            got = False
            if how == "background":
                ws._read_in_background()
                await flowcoro.checkpoint()
            group.spawn(other())
            got = await (ws.receive() if how == "receive" else anext(ws))
            assert got == "x" * 2000 and turns > 10


@simulated
async def test_a_cancelled_receive_loses_nothing():
    async with pair(capacity=100) as (server, client):
        got = []
        async with flowcoro.TaskGroup() as group:
            group.spawn(client.send(BIG[:5000]))
            group.spawn(client.send("second"))
            while len(got) < 2:
                with flowcoro.CancelScope() as scope:
                    group.spawn(_cancel_soon(scope))
                    got.append(await server.receive())
        assert sorted(got, key=len) == ["second", BIG[:5000]]


async def _cancel_soon(scope):
    await flowcoro.checkpoint()
    scope.cancel()


@simulated
async def test_a_second_receiver_is_told():
    async with pair() as (server, client):
        async with flowcoro.TaskGroup() as group:
            group.spawn(server.receive())
            await wait_all_tasks_parked()
            with pytest.raises(flowcoro.BusyError, match="another task receives"):
                await server.receive()
            await client.send("for the first")


@simulated
async def test_a_second_receiver_changes_nothing_for_the_first():
    async with served(max_message=10) as (ws, peer):
        async with flowcoro.TaskGroup() as group:
            receiving = group.spawn(ws.receive())
            await wait_all_tasks_parked()
            with pytest.raises(flowcoro.BusyError):
                await anext(ws.receive_pieces())
            await peer.write(peer.codec.send_message("one") + peer.codec.send_message("two"))
            assert await receiving == "one" and await ws.receive() == "two"
        async with flowcoro.TaskGroup() as group:
            receiving = group.spawn(_all_pieces(ws))
            await wait_all_tasks_parked()
            with pytest.raises(flowcoro.BusyError):
                await ws.receive()
            await peer.write(peer.codec.send_message("longer than max_message"))
            assert "".join(await receiving) == "longer than max_message"


async def _all_pieces(ws):
    return [piece async for piece in ws.receive_pieces()]


# ---- a peer that does not read ---------------------------------------------------------------------------------

@simulated
async def test_who_sends_faster_than_the_peer_reads_waits():
    async with pair(capacity=1000, ping_interval=None) as (server, client):
        sent = 0

        async def send():
            nonlocal sent
            for _ in range(100):
                await server.send("x" * 500)
                sent += 1

        async with flowcoro.TaskGroup() as group:
            group.spawn(send())
            await wait_all_tasks_parked()
            assert sent < 3
            for number in range(100):
                assert await client.receive() == "x" * 500
                assert sent <= number + 4
        assert server.statistics()["bytes_unsent"] == 0


@simulated
async def test_a_cancelled_send_leaves_a_whole_message_or_none():
    async with pair(capacity=1000) as (server, client):
        with flowcoro.move_on_after(1) as scope:
            await server.send("a" * 10_000)
        assert scope.cancelled_caught
        async with flowcoro.TaskGroup() as group:
            group.spawn(server.send("b"))
            assert [await client.receive(), await client.receive()] == ["a" * 10_000, "b"]


@simulated
async def test_sends_that_are_cancelled_again_and_again_do_not_pile_up():
    async with served(capacity=1000, ping_interval=None) as (ws, peer):
        for _ in range(50):
            with flowcoro.move_on_after(1):
                await ws.send("a" * 10_000)
        kept = ws.statistics()["bytes_unsent"]
        assert kept <= flowcoro_websocket.MAX_UNSENT + 20_000
        received = 0
        with flowcoro.move_on_after(1):
            while True:
                assert await peer.next() == "a" * 10_000
                received += 1
        assert received == kept // 10_000 + 1


@simulated
async def test_what_is_kept_when_the_last_of_it_has_just_left_is_sent_too(monkeypatch):
    take, late = WebSocket._take_unsent, [encode_message("late")]

    def and_then(self):                                 # what another worker may do before the task goes on
        taken = take(self)
        if not taken[0] and late:
            self._keep(late.pop())
        return taken

    monkeypatch.setattr(WebSocket, "_take_unsent", and_then)
    async with served(capacity=1000) as (ws, peer):
        async with flowcoro.TaskGroup() as group:
            group.spawn(ws.send("x" * 2000))
            assert [await peer.next(), await peer.next()] == ["x" * 2000, "late"]


@simulated
async def test_a_flood_of_pings_from_who_does_not_read_is_not_kept():
    async with served(capacity=10_000, ping_interval=None) as (ws, peer):
        flood, written = peer.codec.send_ping(b"p" * 125) * 50, 0

        async def write():
            nonlocal written
            while True:
                await peer.write(flood)
                written += len(flood)

        async with flowcoro.TaskGroup() as group:
            group.spawn(write())
            receiving = group.spawn(ws.receive())
            await wait_all_tasks_parked()
            assert written < 300_000 and ws.statistics()["bytes_unsent"] < 2 * flowcoro_websocket.MAX_UNSENT
            receiving.cancel()
            group.cancel()


# ---- fragments -------------------------------------------------------------------------------------------------

async def numbers(count, fail=None):
    for number in range(count):
        yield str(number)
    if fail is not None:
        raise fail


@pytest.mark.parametrize("deflate", [None, Deflate(threshold=0)])
@simulated
async def test_an_iterable_is_sent_as_fragments_of_one_message(deflate):
    async with pair(deflate=deflate) as (server, client):
        for pieces, whole in ((["a", "ü"], "aü"), ([b"1", bytearray(b"2")], b"12"), ([], ""), (iter(["x"]), "x"),
                              (numbers(4), "0123"), (["", "a", *[""] * 300, "b"], "ab"), ([b""] * 300, b"")):
            await server.send(pieces)
            assert await client.receive() == whole


@simulated
async def test_pieces_are_received_as_they_come():
    async with pair() as (server, client):
        told = flowcoro.Channel()

        async def slowly():
            for piece in "abc":
                yield piece
                assert await told.receive() == piece

        async with flowcoro.TaskGroup() as group:
            group.spawn(server.send(slowly()))
            got = []
            async for piece in client.receive_pieces():
                got.append(piece)
                await told.send(piece)
            assert got == ["a", "b", "c"]
            await server.send("next")
            assert await client.receive() == "next"


@simulated
async def test_a_message_in_pieces_may_be_of_any_length_and_memory_is_not():
    async with pair(max_message=1000, capacity=4096) as (server, client):
        async def large():
            for _ in range(100):
                yield b"x" * 5000

        async with flowcoro.TaskGroup() as group:
            group.spawn(client.send(large()))
            size = 0
            async for piece in server.receive_pieces():
                assert len(piece) <= 5000
                size += len(piece)
            assert size == 500_000


@simulated
async def test_who_leaves_a_message_in_the_middle_gets_the_next_one():
    async with pair() as (server, client):
        await client.send(["a", "b", "c"])
        await client.send("second")
        await client.send(["d", "e"])
        async with contextlib.aclosing(server.receive_pieces()) as pieces:
            assert await anext(pieces) == "a"
        assert await server.receive() == "second"
        assert [piece async for piece in server.receive_pieces()] == ["d", "e"]


@pytest.mark.parametrize("following", ["receive", "pieces"])
@simulated
async def test_who_goes_on_with_a_message_that_was_left_gets_nothing_of_another(following):
    async with served() as (ws, peer):
        await peer.write(b"".join(peer.codec.send_piece(f"{name}{number}", number == 0, number == 2)
                                  for name in "abc" for number in range(3)))
        left, next_one = ws.receive_pieces(), ws.receive_pieces()
        assert await anext(left) == "a0"
        if following == "receive":
            assert await ws.receive() == "b0b1b2"
        else:
            assert await anext(next_one) == "b0"
        with pytest.raises(flowcoro.BusyError, match="rest of this message was dropped"):
            await anext(left)
        if following == "pieces":
            assert [piece async for piece in next_one] == ["b1", "b2"]
        assert await ws.receive() == "c0c1c2"


@simulated
async def test_other_messages_wait_for_the_end_of_a_fragmented_one():
    async with pair() as (server, client):
        go_on = flowcoro.Event()

        async def slowly():
            yield "a"
            await go_on.wait()
            yield "b"

        async with flowcoro.TaskGroup() as group:
            group.spawn(server.send(slowly()))
            await wait_all_tasks_parked()
            group.spawn(server.send("other"))
            group.spawn(server.send(["an", "other"]))
            await wait_all_tasks_parked()
            assert broadcast([server], "to all") == []
            pinging = group.spawn(server.ping())            # a control frame may stand between
            receiving = group.spawn(_receive_all(client, 4))
            await pinging
            go_on.set()
            assert sorted(await receiving) == ["ab", "another", "other", "to all"]


async def _receive_all(ws, count):
    return [await ws.receive() for _ in range(count)]


@pytest.mark.parametrize("make, error", [
    (lambda: numbers(2, ZeroDivisionError("mine")), ZeroDivisionError), (lambda: ["a", b"b"], TypeError),
    (lambda: ["a", 7], TypeError)])
@simulated
async def test_a_message_that_breaks_off_closes_the_websocket(make, error):
    async with pair() as (server, client):
        async with flowcoro.TaskGroup() as group:
            group.spawn(_expect(client, 1011))
            with pytest.raises(error):
                await server.send(make())
            with pytest.raises(ConnectionClosed):
                await server.send("more")
        await server.close()


async def _expect(ws, code):
    with pytest.raises(ConnectionClosed) as caught:
        await ws.receive()
    assert caught.value.code == code == ws.close_code


@simulated
async def test_fragments_that_are_cancelled_have_come_as_a_whole_or_close_the_websocket():
    number, cancelled, ends = 0, True, []
    while cancelled:
        number += 1
        async with pair(capacity=50, ping_interval=None) as (server, client), flowcoro.TaskGroup() as group:
            coming = group.spawn(_message_or_code(client))
            with flowcoro.CancelScope() as scope:
                await cancelled_at(scope, number, server.send(["x" * 100] * 3))
            cancelled, closing = scope.cancelled_caught, server._codec.our_state == "CLOSED"
            if not cancelled or number > 1:
                ends.append((await coming, closing))
            group.cancel()
    assert set(ends) == {("x" * 300, False), (1011, True)}, ends


async def _message_or_code(ws):
    try:
        return await ws.receive()
    except ConnectionClosed as error:
        return error.code


@simulated
async def test_a_connection_that_is_lost_within_a_message_and_with_a_broadcast_behind_it_says_so():
    async with served() as (ws, peer):
        async def pieces():
            yield "a"
            assert broadcast([ws], "waits for the end") == []
            await peer.sock.close()
            with pytest.raises(ConnectionClosed):
                await ws.receive()
            yield "b"

        with pytest.raises(ConnectionClosed):
            await ws.send(pieces())


@simulated
async def test_an_iterable_that_fails_before_its_first_piece_harms_nobody():
    async with pair() as (server, client):
        for make in (lambda: numbers(0, ZeroDivisionError()), lambda: [7]):
            with pytest.raises((ZeroDivisionError, TypeError)):
                await server.send(make())
        await server.send("fine")
        assert await client.receive() == "fine"


# ---- when nobody receives --------------------------------------------------------------------------------------

@simulated
async def test_pings_are_answered_while_the_handler_does_something_else():
    async with pair() as (server, client):
        assert await client.ping() <= 2 * flowcoro_websocket.SWEEP
        assert await client.ping() == 0                 # by now a task reads
        assert readers() == 2


@simulated
async def test_what_came_meanwhile_is_received_in_order_and_the_task_that_read_it_ends():
    async with pair(client={"ping_interval": None}) as (server, client):
        for number in range(5):
            await client.send(str(number))
        await flowcoro.sleep(5)
        assert server.statistics()["queued"] == 5 and readers()
        assert [await server.receive() for _ in range(5)] == list("01234")
        async with flowcoro.TaskGroup() as group:
            receiving = group.spawn(server.receive())
            await wait_all_tasks_parked()
            assert readers() == 1                       # the client's
            await client.send("last")
            assert await receiving == "last"


@simulated
async def test_a_receiver_that_comes_and_goes_has_no_task_beside_it():
    async with pair() as (server, client):
        async def receive_for_ever():
            while True:
                await server.receive()

        async with flowcoro.TaskGroup() as group:
            group.spawn(receive_for_ever())
            group.spawn(_drop(client))
            for _ in range(100):
                await flowcoro.sleep(0.3)
                await client.send("x")
                assert not readers()
            group.cancel()


async def _drop(ws):
    while True:
        await ws.receive()


@pytest.mark.parametrize("message, most, capacity", [("x", 16, 10), ("x" * 400_000, 3, 100_000)])
@simulated
async def test_no_more_is_read_than_a_short_queue_takes(message, most, capacity):
    async with pair(ping_interval=None, capacity=capacity) as (server, client):
        async with flowcoro.TaskGroup() as group:
            async def send():
                for _ in range(30):
                    await client.send(message)

            group.spawn(send())
            await flowcoro.sleep(100)
            assert server.statistics()["queued"] == most and not server.closed
            assert [await server.receive() for _ in range(30)] == [message] * 30


@simulated
async def test_pieces_that_nobody_takes_are_read_in_the_background_too():
    async with pair(max_message=1000, ping_interval=None) as (server, client):
        pieces = server.receive_pieces()
        async with flowcoro.TaskGroup() as group:
            group.spawn(client.send(["x" * 900] * 5))
            assert await anext(pieces) == "x" * 900
            await flowcoro.sleep(10)
            assert server.statistics()["queued"]
            assert [piece async for piece in pieces] == ["x" * 900] * 4


@pytest.mark.parametrize("long", [["x" * 600] * 2, ["ü" * 501], "x" * 1001])
@simulated
async def test_a_message_that_began_in_pieces_is_received_whole_within_the_limit(long):
    async with pair(max_message=1000, ping_interval=None) as (server, client):
        await client.send(["a", "b"])
        async for _ in server.receive_pieces():
            pass
        await client.send(["c", "d"])
        await client.send(long)
        await flowcoro.sleep(10)                        # read in pieces, as the last one was
        assert await server.receive() == "cd"
        async with flowcoro.TaskGroup() as group:
            group.spawn(_expect(client, 1009))
            await _expect(server, 1009)


@simulated
async def test_who_does_not_end_after_a_message_in_pieces_was_too_long_is_cut_in_time():
    async with served(max_message=1000, ping_interval=None) as (ws, peer):
        await peer.write(peer.codec.send_message("x"))
        async for _ in ws.receive_pieces():
            pass
        await peer.write(peer.codec.send_message("x" * 1001))
        await flowcoro.sleep(10)
        began = flowcoro.now()
        await _expect(ws, 1009)
        assert flowcoro.now() - began == flowcoro_websocket.LINGER      # nobody else reads meanwhile
        assert (await peer.next()).code == 1009


@simulated
async def test_a_cancelled_receive_loses_nothing_of_a_message_that_began_in_pieces():
    async with served(max_message=1000, ping_interval=None) as (ws, peer):
        for message, begin in (("abcd", "ab"), (b"efgh", b"e")):
            await peer.write(peer.codec.send_message(message[:0]))
            async for _ in ws.receive_pieces():
                pass
            await peer.write(peer.codec.send_piece(begin, True, False))
            await flowcoro.sleep(10)
            for _ in range(3):
                with flowcoro.move_on_after(1) as scope:
                    await ws.receive()
                assert scope.cancelled_caught
            await peer.write(peer.codec.send_piece(message[len(begin):], False, True))
            assert await ws.receive() == message


@simulated
async def test_a_handler_that_only_sends_learns_of_the_end():
    async with pair() as (server, client):
        async with flowcoro.TaskGroup() as group:
            group.spawn(client.close(4001, "enough"))
            with pytest.raises(ConnectionClosed):
                while True:
                    await server.send("x")
                    await flowcoro.sleep(0.1)
        assert server.close_code == 4001 and server.close_reason == "enough"


@simulated
async def test_wait_closed_waits_for_the_end_and_keeps_what_comes():
    async with pair() as (server, client):
        async with flowcoro.TaskGroup() as group:
            waiting = group.spawn(server.wait_closed())
            await client.send("before")
            await client.close(1001)
            await waiting
        assert server.closed and await server.receive() == "before"
        with pytest.raises(ConnectionClosed):
            await server.receive()


@simulated
async def test_how_much_is_kept_and_how_long_a_close_takes_is_the_users_choice():
    async with served(max_queue=3, close_timeout=2.5) as (ws, peer):
        await peer.write(b"".join(peer.codec.send_message(str(number)) for number in range(10)))
        await flowcoro.sleep(3 * flowcoro_websocket.SWEEP)
        assert ws.statistics()["queued"] == 3
        began = flowcoro.now()
        await ws.close()
        assert flowcoro.now() - began == 2.5
    async with served(close_timeout=2.5) as (ws, peer):
        ws.close_nowait()
        began = flowcoro.now()
        await ws.wait_closed()
        assert 2.5 <= flowcoro.now() - began <= 3.5


@simulated
async def test_wait_closed_learns_of_the_end_of_who_has_sent_more_than_is_kept():
    for close, code in ((True, 4000), (False, 1006)):
        async with served() as (ws, peer):
            await peer.write(peer.codec.send_message("x") * 100 + (peer.codec.send_close(4000) if close else b""))
            async with flowcoro.TaskGroup() as group:
                waiting = group.spawn(ws.wait_closed())
                await flowcoro.sleep(10)
                assert not waiting.done() and ws.statistics()["queued"] == flowcoro_websocket.MAX_QUEUE
                await peer.sock.close()
                began = flowcoro.now()
            assert flowcoro.now() - began <= 2 * flowcoro_websocket.SWEEP and ws.close_code == code


# ---- keep-alive ------------------------------------------------------------------------------------------------

@simulated
async def test_ping_gives_the_seconds_of_the_way():
    async with pair() as (server, client):
        async with flowcoro.TaskGroup() as group:
            async def receive_late():
                await flowcoro.sleep(0.25)
                await _drop(client)

            group.spawn(receive_late())
            assert await server.ping() == 0.25
            group.cancel()


def test_a_ping_that_is_cancelled_when_the_connection_ends_leaves_no_error(reports):
    async def main():
        async with served() as (ws, peer), flowcoro.TaskGroup() as group:
            pinging = group.spawn(ws.ping())
            await flowcoro.sleep(1)
            pinging.cancel()
            ws._end()

    simulated(main)()
    assert not reports


@simulated
async def test_a_pong_answers_the_pings_before_it():
    async with served(ping_interval=None) as (ws, peer):
        async with flowcoro.TaskGroup() as group:
            first, second, third = (group.spawn(ws.ping()) for _ in range(3))
            pings = [await peer.next() for _ in range(3)]
            await peer.write(peer.codec.send_pong(b"unasked"))
            await peer.write(peer.codec.send_pong(pings[1].payload))
            assert await first >= 0 and await second >= 0
            await flowcoro.sleep(1)
            assert not third.done()
            await peer.write(peer.codec.send_pong(pings[2].payload))
            assert await third == 1


@simulated
async def test_the_keep_alive_measures_and_keeps_what_lives():
    async with pair() as (server, client):
        async with flowcoro.TaskGroup() as group:
            group.spawn(_drop(client))
            group.spawn(_drop(server))
            await flowcoro.sleep(19)
            assert server.latency is None
            await flowcoro.sleep(2)
            assert server.latency == 0
            await flowcoro.sleep(1000)
            assert not server.closed
            received = client.statistics()["bytes_received"]
            assert received == 6 * (1021 // 20)         # a Ping each 20 seconds, and nothing else
            group.cancel()


@simulated
async def test_half_open_tcp_is_found_by_the_keep_alive():
    async with served() as (ws, peer):                  # the peer neither answers nor closes
        began = flowcoro.now()
        with pytest.raises(ConnectionClosed, match="no answer to a Ping for 20 s") as caught:
            await ws.receive()
        assert 40 <= flowcoro.now() - began <= 41.5 and caught.value.code == 1006


@simulated
async def test_half_open_tcp_is_found_by_who_only_sends():
    async with served(capacity=1000) as (ws, peer):
        began = flowcoro.now()
        with pytest.raises(ConnectionClosed):
            while True:
                await ws.send("x" * 100)
        assert 40 <= flowcoro.now() - began <= 42


@simulated
async def test_who_reads_a_large_message_slowly_is_alive():
    async with served(capacity=10_000) as (ws, peer):
        async with flowcoro.TaskGroup() as group:
            receiving = group.spawn(_drop_quietly(ws))
            sending = group.spawn(_closed(ws.send(BIG)))
            for _ in range(40):                         # 10,000 bytes each five seconds; the Ping comes after the message
                await flowcoro.sleep(5)
                await peer.sock.read(10_000)
            assert not ws.closed and not sending.done()
            began = flowcoro.now()                      # and from now on it does not read
            await ws.wait_closed()
            assert 19 <= flowcoro.now() - began <= 41
            await receiving


@simulated
async def test_a_peer_that_sends_much_and_reads_nothing_holds_nobody_for_ever():
    async with served(capacity=10_000) as (ws, peer):
        async def answer():
            async for _ in ws:
                await ws.send(BIG)

        async with flowcoro.TaskGroup() as group:
            answering = group.spawn(_raises(ConnectionClosed, answer()))
            for _ in range(30):                         # the queue is full, and nobody reads
                await peer.write(peer.codec.send_message("go"))
            began = flowcoro.now()
            await answering
        assert flowcoro.now() - began < 100 and ws.closed


@simulated
async def test_a_peer_that_reads_slowly_is_alive_though_nobody_reads_what_it_sends():
    async with served(capacity=10_000) as (ws, peer):
        async with flowcoro.TaskGroup() as group:
            group.spawn(ws.send(BIG))
            for _ in range(30):
                await peer.write(peer.codec.send_message("go"))
            for _ in range(40):
                await flowcoro.sleep(10)
                await peer.sock.read(5000)
            assert not ws.closed
            ws.close_nowait()
            group.cancel()


async def _raises(kind, coroutine):
    with pytest.raises(kind):
        await coroutine


@simulated
async def test_who_sends_without_a_pong_is_alive():
    async with served() as (ws, peer):
        async with flowcoro.TaskGroup() as group:
            group.spawn(_drop(ws))
            for _ in range(20):
                await flowcoro.sleep(10)
                await peer.write(peer.codec.send_message("busy"))
            assert not ws.closed
            group.cancel()


@simulated
async def test_a_slow_handler_does_not_take_its_client_for_dead():
    async with pair(capacity=100) as (server, client):
        async with flowcoro.TaskGroup() as group:
            async def send():
                for number in range(50):
                    await client.send(f"{number:100}")

            group.spawn(send())
            group.spawn(_until_closed(client))
            await flowcoro.sleep(500)
            for number in range(50):
                assert int(await server.receive()) == number
            await server.close()


async def _until_closed(ws):
    async for _ in ws:
        pass


@simulated
async def test_without_an_interval_there_are_no_pings():
    async with pair(ping_interval=None) as (server, client):
        with flowcoro.move_on_after(1000):
            await client.receive()
        assert client.statistics()["bytes_received"] == 0


@pytest.mark.parametrize("options", [{"ping_interval": 0}, {"ping_timeout": -1}, {"ping_interval": "20"}])
@simulated
async def test_intervals_that_are_none_are_refused(options):
    one, other = memory_socket_pair(Socket)
    async with one, other:
        with pytest.raises(ValueError, match="give seconds"):
            WebSocket(one, "server", **options)


# ---- closing ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("code, reason, seen, error", [
    (1000, "bye", (1000, "bye"), False), (1001, "", (1001, ""), False), (1005, "", (1005, ""), False),
    (4000, "ü", (4000, "ü"), True)])
@simulated
async def test_the_close_handshake(code, reason, seen, error):
    for ends in (0, 1):
        async with pair() as both:
            here, there = both[ends], both[1 - ends]
            async with flowcoro.TaskGroup() as group:
                group.spawn(here.close(code, reason))
                with pytest.raises(ConnectionClosed) if error else contextlib.nullcontext() as caught:
                    async for _ in there:
                        pass
            for ws in both:
                assert (ws.close_code, ws.close_reason) == seen and ws.closed
            if error:
                assert (caught.value.code, caught.value.reason) == seen
            for ws in both:
                with pytest.raises(ConnectionClosed):
                    await ws.send("late")
                with pytest.raises(ConnectionClosed):
                    await ws.receive()
                await ws.close()


@simulated
async def test_a_connection_that_is_cut_is_no_normal_end():
    async with served() as (ws, peer):
        await peer.write(peer.codec.send_message("before"))
        await peer.sock.close()
        assert await anext(ws) == "before"
        with pytest.raises(ConnectionClosed, match="without a Close") as caught:
            await anext(ws)
        assert caught.value.code == 1006 == ws.close_code


@simulated
async def test_a_peer_that_never_answers_the_close_is_waited_for_so_long():
    for timeout in (None, 3):
        async with served() as (ws, peer):
            began = flowcoro.now()
            await ws.close(**{} if timeout is None else {"timeout": timeout})
            assert flowcoro.now() - began == (timeout or flowcoro_websocket.CLOSE_TIMEOUT)
            assert ws.closed and ws.close_code == 1006


@simulated
async def test_a_peer_that_answers_and_does_not_end_is_left():
    one, other = memory_socket_pair(Socket)
    async with one, other:
        ws, codec = WebSocket(one, "client"), WebSocketConnection("server")
        await other.write(codec.send_close(1000))
        began = flowcoro.now()
        await _until_closed(ws)
        assert flowcoro.now() - began == flowcoro_websocket.LINGER


@simulated
async def test_close_while_another_task_receives_and_others_close():
    async with pair() as (server, client):
        async with flowcoro.TaskGroup() as group:
            group.spawn(_until_closed(server))
            group.spawn(_until_closed(client))
            await wait_all_tasks_parked()
            for _ in range(3):
                group.spawn(server.close())
        assert server.close_code == client.close_code == 1000


@pytest.mark.parametrize("how", ["receive", "iterate", "pieces"])
@simulated
async def test_who_receives_while_another_task_closes_hears_of_the_end(how):
    async with served(ping_interval=None) as (ws, peer):
        async def handle():
            with pytest.raises(ConnectionClosed) as caught:
                if how == "pieces":
                    async for _ in ws.receive_pieces():
                        await flowcoro.sleep(1)
                while True:
                    await (ws.receive() if how == "receive" else anext(ws))
                    await flowcoro.sleep(1)
            assert caught.value.code == 4001

        async with flowcoro.TaskGroup() as group:
            group.spawn(handle())
            await peer.write(peer.codec.send_piece("a", True, how != "pieces"))
            await flowcoro.sleep(0.5)
            group.spawn(ws.close(4001, "not wanted"))
            if how == "pieces":
                await peer.write(peer.codec.send_piece("b", False, False))
            await flowcoro.sleep(2)
            assert (await peer.next()).code == 4001
            await peer.write(peer.codec.send_close(4001))


@pytest.mark.parametrize("queued", [False, True])
@simulated
async def test_close_reads_on_when_the_receiver_leaves(queued):
    async with served() as (ws, peer):
        if queued:                                      # so that receive() goes the longer way
            await peer.write(peer.codec.send_message("x"))
            await flowcoro.sleep(2)
        async with flowcoro.TaskGroup() as group:
            receiving = group.spawn(_drop_quietly(ws))
            await wait_all_tasks_parked()
            group.spawn(ws.close(4000))
            await wait_all_tasks_parked()
            receiving.cancel()
            assert (await peer.next()).code == 4000
            began = flowcoro.now()
            await peer.write(peer.codec.send_close(4000))
        assert ws.close_code == 4000 and flowcoro.now() == began


@simulated
async def test_close_drops_what_comes_before_the_peers_close():
    async with pair() as (server, client):
        for _ in range(40):
            await client.send("dropped")
        async with flowcoro.TaskGroup() as group:
            group.spawn(server.close(4000))
            await _expect(client, 4000)
        assert server.close_code == 4000


@simulated
async def test_a_close_that_cannot_be_sent_is_refused_and_harms_nothing():
    async with pair() as (server, client):
        for code, reason in ((1006, ""), (999, ""), (1000, "x" * 124), (1005, "why")):
            with pytest.raises(LocalProtocolError):
                await server.close(code, reason)
        for reason in (5, b"\xff", None):
            with pytest.raises(TypeError, match="reason="):
                await server.close(1000, reason)
        await server.send("fine")
        assert await client.receive() == "fine"


@simulated
async def test_a_cancelled_close_ends_at_once():
    async with served() as (ws, peer):
        with flowcoro.move_on_after(1):
            await ws.close()
        assert ws.closed and isinstance(await peer.next(), Close)


@simulated
async def test_close_nowait_lets_the_receiver_end():
    async with pair() as (server, client):
        async with flowcoro.TaskGroup() as group:
            group.spawn(_until_closed(server))
            group.spawn(_until_closed(client))
            await wait_all_tasks_parked()
            server.close_nowait(1001)
        assert client.close_code == 1001 == server.close_code
    async with served() as (ws, peer):                  # nobody answers, and nobody receives
        ws.close_nowait()
        ws.close_nowait()
        began = flowcoro.now()
        await ws.wait_closed()
        assert flowcoro_websocket.CLOSE_TIMEOUT <= flowcoro.now() - began <= flowcoro_websocket.CLOSE_TIMEOUT + 1


@pytest.mark.parametrize("error, code", [(None, 1000), (ValueError("mine"), 1011)])
@simulated
async def test_async_with_closes_by_what_has_happened(error, code):
    async with pair() as (server, client):
        async with flowcoro.TaskGroup() as group:
            group.spawn(_expect(client, code))
            with contextlib.suppress(ValueError):
                async with server:
                    if error is not None:
                        raise error


@simulated
async def test_async_with_that_is_cancelled_does_not_wait():
    async with served() as (ws, peer):
        began = flowcoro.now()
        with flowcoro.move_on_after(1):
            async with ws:
                await flowcoro.sleep(10)
        assert flowcoro.now() - began == 1 and ws.closed
        assert (await peer.next()).code == 1001


@simulated
async def test_a_task_that_waits_for_a_pong_or_to_send_is_told_of_the_end():
    async with served(capacity=100) as (ws, peer):
        async with flowcoro.TaskGroup() as group:
            tasks = [group.spawn(_closed(ws.ping())), group.spawn(_closed(ws.send("x" * 1000))),
                     group.spawn(_closed(ws.receive())), group.spawn(ws.wait_closed())]
            await wait_all_tasks_parked()
            await peer.sock.close()
            for task in tasks:
                await task


async def _closed(coro):
    with pytest.raises(ConnectionClosed):
        await coro


# ---- what the peer must not ------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad, code", [
    (b"\x81\x01x", 1002), (b"\x83\x80\0\0\0\0", 1002), (b"\x81\x81\0\0\0\0\xff", 1007), (b"\xc1\x80\0\0\0\0", 1002),
    (b"\x81\xff\0\0\0\0\0\x20\0\0\0\0\0\0", 1009), (b"\x88\x81\0\0\0\0x", 1002)])
@simulated
async def test_what_is_before_an_error_is_answered_first_and_then_it_is_told(bad, code):
    async with served() as (ws, peer):
        await peer.write(peer.codec.send_message("N") + bad + b"more")
        with pytest.raises(ConnectionClosed) as caught:
            async with flowcoro.TaskGroup() as group:
                group.spawn(_end_when_told(peer, code))
                try:
                    async for message in ws:
                        await ws.send(message)
                except ConnectionClosed as error:
                    assert error.code == code == ws.close_code
                    end = error
            raise end
        assert isinstance(caught.value.__cause__, flowcoro_websocket.RemoteProtocolError)


async def _end_when_told(peer, code):
    assert await peer.next() == "N"
    assert (await peer.next()).code == code
    await peer.sock.close()


@simulated
async def test_who_does_not_end_after_an_error_is_cut():
    async with served() as (ws, peer):
        await peer.write(b"\x83\x80\0\0\0\0")
        began = flowcoro.now()
        await _expect(ws, 1002)
        assert flowcoro.now() - began == flowcoro_websocket.LINGER


@pytest.mark.parametrize("how", ["receive", "iterate", "background", "receive after background", "close after background"])
@simulated
async def test_whoever_reads_the_error_a_peer_has_all_the_time_to_hear_of_it(how):
    async with served(ping_interval=None) as (ws, peer):
        async def receive():
            with pytest.raises(ConnectionClosed) as caught:
                await ws.receive() if how.startswith("receive") else await anext(ws)
            assert caught.value.code == 1002

        began = flowcoro.now()
        async with flowcoro.TaskGroup() as group:
            await peer.write(b"\x83\x80\0\0\0\0")
            if how in ("receive", "iterate"):
                group.spawn(receive())
            await flowcoro.sleep(1.2)                   # in which the sweep has found that nobody reads, if that is so
            assert (await peer.next()).code == 1002 and not ws.closed
            if how.endswith("after background"):
                group.spawn(receive() if how.startswith("receive") else ws.close())
            await flowcoro.sleep(0.7)
            assert not ws.closed
            await ws.wait_closed()
        assert flowcoro_websocket.LINGER <= flowcoro.now() - began <= flowcoro_websocket.LINGER + 1.2


@simulated
async def test_a_deflate_bomb_is_refused_before_it_is_inflated():
    deflate = Deflate()
    async with served(deflate=deflate, capacity=2**20, max_message=10_000) as (ws, peer):
        await peer.write(peer.codec.send_message("\0" * 5_000_000))
        async with flowcoro.TaskGroup() as group:
            group.spawn(_expect(ws, 1009))
            assert (await peer.next()).code == 1009
            await peer.sock.close()


@simulated
async def test_empty_fragments_without_end_are_refused():
    async with served() as (ws, peer):
        await peer.write(b"\x01\x80\0\0\0\0" + b"\x00\x80\0\0\0\0" * 200)
        async with flowcoro.TaskGroup() as group:
            group.spawn(_expect(ws, 1008))
            assert (await peer.next()).code == 1008
            await peer.sock.close()


# ---- broadcast -------------------------------------------------------------------------------------------------

@contextlib.asynccontextmanager
async def room(count, capacity=64 * 2**10, role="server", **options):
    async with contextlib.AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(pair(capacity, **options)) for _ in range(count)]
        here, there = zip(*pairs)
        yield (here, there) if role == "server" else (there, here)


@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize("deflate", [None, Deflate(threshold=0)])
@simulated
async def test_broadcast_reaches_all_in_order(role, deflate):
    async with room(5, role=role, deflate=deflate) as (members, others):
        assert broadcast(members, "first") == broadcast(set(members), b"second") == []
        await members[2].send("own")
        broadcast(iter(members), "third")
        for number, ws in enumerate(others):
            expected = ["first", b"second", *(["own"] if number == 2 else []), "third"]
            assert await _receive_all(ws, len(expected)) == expected


@simulated
async def test_messages_of_one_turn_leave_together():
    async with room(3) as (members, others):
        sends, send = [], members[0]._sock._send
        members[0]._sock._send = lambda data, *rest: sends.append(bytes(data)) or send(data, *rest)
        for number in range(8):
            broadcast(members, str(number))
        for ws in others:
            assert await _receive_all(ws, 8) == list("01234567")
        assert len(sends) == 1


@simulated
async def test_a_broadcast_of_the_same_turn_does_not_get_into_a_message_in_fragments():
    async with pair() as (server, client):
        async def first():
            assert broadcast([server], "before") == []  # leaves at the end of the turn
            await server.send(["a", "b"])

        async def second():
            assert broadcast([server], "after") == []

        async with flowcoro.TaskGroup() as group:
            group.spawn(first())
            group.spawn(second())
            assert [await client.receive() for _ in range(3)] == ["before", "ab", "after"]


@pytest.mark.parametrize("end", ["close", "error", "cut"])
@simulated
async def test_who_is_closed_in_the_same_turn_is_no_more_broadcast_to(end):
    async with served() as (ws, peer):
        await peer.write(b"junk")

        async def first():
            assert broadcast([ws], "before") == []
            if end == "close":
                ws.close_nowait(1002)
            elif end == "error":
                await _raises(ConnectionClosed, ws.receive())
            else:
                ws._end()

        async def second():
            assert broadcast([ws], "after") == [ws]

        async with flowcoro.TaskGroup() as group:
            group.spawn(first())
            group.spawn(second())
            if end != "cut":
                assert await peer.next() == "before" and (await peer.next()).code == 1002
                await peer.sock.close()
        await ws.wait_closed()


@simulated
async def test_a_slow_member_holds_nobody_up_and_is_skipped():
    async with room(3, capacity=1000, ping_interval=None) as (members, others):
        slow, missed = members[1], 0
        async with flowcoro.TaskGroup() as group:
            quick = [group.spawn(_receive_all(ws, 200)) for ws in (others[0], others[2])]
            for number in range(200):
                left_out = broadcast(members, f"{number:0100}", max_backlog=5000)
                assert left_out in ([], [slow])
                missed += len(left_out)
                await wait_all_tasks_parked()
            for task in quick:
                assert list(map(int, await task)) == list(range(200))
        assert missed > 100 and slow.statistics()["bytes_unsent"] <= 5200
        assert list(map(int, await _receive_all(others[1], 200 - missed))) == list(range(200 - missed))
        assert broadcast(members, "again", max_backlog=5000) == []


@simulated
async def test_what_waits_for_the_end_of_a_fragmented_message_is_kept_within_the_limit_and_is_not_compressed():
    async with served(deflate=Deflate(threshold=0)) as (ws, peer):
        go_on = flowcoro.Event()

        async def slowly():
            yield "a"
            await go_on.wait()

        async with flowcoro.TaskGroup() as group:
            group.spawn(ws.send(slowly()))
            await wait_all_tasks_parked()
            assert sum(len(broadcast([ws], "", max_backlog=200)) for _ in range(200)) == 99        # a frame has two bytes
            assert broadcast([ws], "z" * 100, max_backlog=10**6) == []
            go_on.set()
        assert await peer.next() == "a"
        for _ in range(101):
            assert await peer.next() == ""
        await wait_all_tasks_parked()
        assert await peer.next() == "z" * 100
        assert ws.statistics()["bytes_sent"] > 2 * 101 + 100


@simulated
async def test_a_member_that_is_closed_in_the_turn_of_a_broadcast_leaves_nobody_waiting():
    async with room(2) as (members, others):
        async def send():
            broadcast(members, "x")
            await _closed(members[0].send("y"))

        async def end():
            members[0]._end()                           # as a cancelled close() does

        async with flowcoro.TaskGroup() as group:       # it ends while who sends waits for what is broadcast to leave
            group.spawn(send())
            group.spawn(end())
        assert await others[1].receive() == "x"


@simulated
async def test_an_error_of_the_system_ends_one_member_and_not_the_batch():
    async with room(3) as (members, others):
        def fails(*arguments):
            raise OSError(errno.ENOMEM, "no memory")

        members[1]._sock._send = fails
        broadcast(members, "x")
        assert await others[0].receive() == "x" == await others[2].receive()
        with pytest.raises(ConnectionClosed, match="no memory"):
            await members[1].send("y")


@simulated
async def test_what_is_no_websocket_among_the_members_holds_nobody_up():
    async with room(1) as (members, others):
        with pytest.raises(AttributeError):
            broadcast([*members, None], "x")
        assert broadcast(members, "y") == []
        assert await _receive_all(others[0], 2) == ["x", "y"]


@simulated
async def test_messages_of_one_turn_are_kept_within_the_limit_too():
    async with room(1) as (members, others):
        missed = sum(len(broadcast(members, f"{number:0100}", max_backlog=1000)) for number in range(100))
        assert 85 <= missed <= 90
        assert list(map(int, await _receive_all(others[0], 100 - missed))) == list(range(100 - missed))


@simulated
async def test_a_slow_member_may_be_closed():
    async with room(2, capacity=100, ping_interval=None) as (members, others):
        async with flowcoro.TaskGroup() as group:
            group.spawn(_drop_quietly(others[0]))
            while not (left_out := broadcast(members, "x" * 300, slow="close", max_backlog=1000)):
                await wait_all_tasks_parked()
            assert left_out == [members[1]]
            began = flowcoro.now()
            await members[1].wait_closed()
            assert flowcoro.now() - began <= flowcoro_websocket.CLOSE_TIMEOUT + 1
            assert not members[0].closed
            group.cancel()


async def _drop_quietly(ws):
    with contextlib.suppress(ConnectionClosed):
        await _drop(ws)


@simulated
async def test_members_that_are_closed_are_in_the_list():
    async with room(3) as (members, others):
        async with flowcoro.TaskGroup() as group:
            group.spawn(_until_closed(others[0]))
            await members[0].close()
        others[1]._sock.close_nowait()
        broadcast(members, "who finds out")
        await flowcoro.sleep(2)
        assert broadcast(members, "x") == [members[0], members[1]]


@pytest.mark.parametrize("arguments, error", [(([], 7), TypeError), (([], ["a"]), TypeError), (([], "x", "drop"), ValueError)])
@simulated
async def test_what_cannot_be_broadcast_is_refused(arguments, error):
    with pytest.raises(error):
        members, message, *slow = arguments
        broadcast(members, message, **{"slow": slow[0]} if slow else {})


# ---- cancelled wherever it waits -------------------------------------------------------------------------------

async def _ask(ws):
    await ws.send("z" * 300)
    assert await ws.receive() == "z" * 300


async def _take_pieces(ws):
    await ws.send("p" * 300)
    async with contextlib.aclosing(ws.receive_pieces()) as pieces:
        async for _ in pieces:
            pass


OPERATIONS = {                      # name -> (the operation, whether the WebSocket is still to be used when it was cancelled)
    "send": (lambda ws: ws.send("x" * 300), True), "receive": (_ask, True), "ping": (lambda ws: ws.ping(), True),
    "pieces": (_take_pieces, True), "fragments": (lambda ws: ws.send(["x" * 100] * 3), None),
    "next": (lambda ws: _ask_next(ws), True), "close": (lambda ws: ws.close(), False),
    "wait_closed": (lambda ws: _close_and_wait(ws), None)}


async def _ask_next(ws):
    await ws.send("n")
    assert await anext(ws) == "n"


async def _close_and_wait(ws):
    ws.close_nowait()
    await ws.wait_closed()


@pytest.mark.parametrize("name", OPERATIONS)
@simulated
async def test_cancelled_at_each_point(name):
    operation, usable = OPERATIONS[name]
    number, cancelled = 0, True
    while cancelled:
        number += 1
        async with pair(capacity=50, ping_interval=None) as (server, client):
            async def echo():
                with contextlib.suppress(ConnectionClosed):
                    async for message in client:
                        await client.send(message)

            async with flowcoro.TaskGroup() as group:
                group.spawn(echo())
                with flowcoro.CancelScope() as scope:
                    await cancelled_at(scope, number, operation(server))
                cancelled = scope.cancelled_caught
                if usable:
                    await server.send("after")
                    while await server.receive() != "after":
                        pass
                elif usable is False:
                    assert server.closed
                with contextlib.suppress(ConnectionClosed):
                    await server.close()
                assert server.closed
                group.cancel()
    assert number > 1


# ---- all of it -------------------------------------------------------------------------------------------------

async def _storm(chance):
    """Two ends send at random, in all ways, are cancelled at random, and what arrives is what was sent, in order, each once."""
    deflate = chance.choice([None, Deflate(threshold=chance.choice([0, 100]))])
    async with pair(capacity=chance.choice([7, 1000, 100_000]), deflate=deflate) as ends:
        sent, got = {0: [], 1: []}, {0: [], 1: []}

        async def send(number):
            ws = ends[number]
            for count in range(chance.randrange(10, 25)):
                message = f"{count}:" + "y" * chance.choice([0, 5, 200, 5000])
                with flowcoro.move_on_after(chance.choice([0, 0.001, 100, 100])) as scope:
                    if chance.random() < 0.3:
                        await ws.send(message)
                    elif chance.random() < 0.3:
                        broadcast([ws], message, max_backlog=10**9)
                    else:
                        await ws.send(message.encode())
                sent[number].append((message, scope.cancelled_caught))
                await flowcoro.sleep(chance.choice([0, 0, 0.3, 2]))
            await ws.send("end")

        async def receive(number):
            ws = ends[number]
            while True:
                with flowcoro.move_on_after(chance.choice([0, 0.01, 1, 100])):
                    if chance.random() < 0.8:
                        message = await ws.receive()
                        if message == "end":
                            return
                        got[1 - number].append(message if isinstance(message, str) else message.decode())
                await flowcoro.sleep(chance.choice([0, 0, 0.5, 3]))

        async with flowcoro.TaskGroup() as group:
            for number in (0, 1):
                group.spawn(send(number))
                group.spawn(receive(number))
        for number in (0, 1):
            expected = iter(sent[number])
            for message in got[number]:                 # a cancelled one may be missing, and nothing else
                while (following := next(expected))[0] != message:
                    assert following[1], f"{following} is missing"
            assert all(cancelled for _, cancelled in expected)


def test_whatever_is_cancelled_messages_arrive_in_order_and_whole():
    for seed in SEEDS:
        async def storm():
            await _storm(random.Random(seed))
        explore(storm, seeds=[seed], timeout=100_000)


def test_several_workers_speak_on_one_websocket():
    async def main():
        one, other = memory_socket_pair(Socket)
        async with one, other:
            server, client = WebSocket(one, "server", deflate=Deflate()), WebSocket(other, "client", deflate=Deflate())

            async def send(number):
                for count in range(50):
                    if count % 2:
                        await server.send(f"{number} {count} " + "z" * 2000)
                    else:
                        assert broadcast([server], f"{number} {count} ", max_backlog=10**9) == []

            async with flowcoro.TaskGroup() as group:
                for number in range(4):
                    group.spawn(send(number))
                seen = {number: [] for number in range(4)}
                for _ in range(200):
                    number, count, _ = (await client.receive()).split(" ")
                    seen[int(number)].append(int(count))
            assert seen == {number: list(range(50)) for number in range(4)}
            async with flowcoro.TaskGroup() as group:
                group.spawn(_until_closed(client))
                await server.close()

    flowcoro.run(main(), workers=3)


@simulated
async def test_one_that_is_closed_is_no_garbage_that_only_a_collector_finds():
    gc.collect()
    gc.disable()
    try:
        async with pair() as (server, client):
            async with flowcoro.TaskGroup() as group:
                group.spawn(_until_closed(client))
                await server.send("x" * 200_000)
                await server.close()
            refs = weakref.ref(server), weakref.ref(client)
        del server, client
        await flowcoro.sleep(1)
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


@simulated
async def test_who_waits_keeps_nothing_of_what_was_read():
    async with served(capacity=2**20) as (ws, peer):
        async with flowcoro.TaskGroup() as group:
            receiving = group.spawn(_receive_all(ws, 3))
            for message in ("x" * 50_000, b"y" * 50_000):
                await peer.write(peer.codec.send_message(message))
                await wait_all_tasks_parked()
                assert len(ws._codec._buffer) == 0
            await peer.write(peer.codec.send_message("end"))
            assert len(await receiving) == 3


@pytest.mark.parametrize("how", ["receive", "iterate"])
@simulated
async def test_a_burst_leaves_nothing_behind_that_makes_later_messages_slow(how, monkeypatch):
    slowly, receive_otherwise = [], WebSocket._receive_otherwise
    monkeypatch.setattr(WebSocket, "_receive_otherwise", lambda ws: (slowly.append(ws), receive_otherwise(ws))[1])
    async with served() as (ws, peer):
        for count in (3, 1, 1):
            await peer.write(peer.codec.send_message("x") * count)
            for _ in range(count):
                await (ws.receive() if how == "receive" else anext(ws))
            assert ws._codec._buffer == b""
        assert len(slowly) == 2                         # for what the first one has left of the burst


@simulated
async def test_it_tells_what_it_is():
    async with pair() as (server, client):
        assert repr(server).startswith("<WebSocket server open <Socket") and server.peer == server._sock.peer
        assert server.local == server._sock.local and server.subprotocol is None and server.state is None
        server.close_nowait()
        assert repr(server).startswith("<WebSocket server closing ")
        assert type(await Peer(client._sock).next()) is not Ping
