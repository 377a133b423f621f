"""flowcoro_rpc against peers, handlers and users that mean no good, or do not know better."""

import collections
import enum
import json
import math

import pytest

import flowcoro
import flowcoro_net
import flowcoro_rpc
from flowcoro_rpc import (NEED_DATA, Backoff, CallCancelled, ConnectionLost, ContentLength, InternalError, InvalidParams,
                          Netstring, ProtocolError, Request, RpcClient, RpcError, RpcPool, RpcServer)
from flowcoro_testing import memory_socket_pair, wait_all_tasks_parked
from test_rpc import ask, connect, hear, in_kernel, raw_connection, request, slow_server, tell  # noqa: F401  (a fixture)


# ---- limits that the caller may not move ----------------------------------------------------------------------

@in_kernel
async def test_who_asks_for_a_stream_of_what_is_none_does_not_escape_the_deadline():
    server = slow_server(deadline=5)
    async with raw_connection(server) as sock:
        before = flowcoro.now()
        answer = await ask(sock, request("never", "a", **{"$/stream": 8}))
        assert answer["error"]["code"] == -32010 and flowcoro.now() - before < 6 and server.cut == ["a"]


@in_kernel
async def test_a_stream_that_comes_as_a_list_has_a_deadline_and_one_that_comes_as_a_stream_has_none():
    server = slow_server(deadline=5)
    async with raw_connection(server) as sock:
        answers = await ask(sock, [request("count", 100, 1, **{"$/stream": 8})])        # in a batch it is a list
        assert answers[0]["error"]["code"] == -32010
        for credit in 1, 8:
            await tell(sock, request("count", 9, 1, **{"$/stream": credit}))
            await tell(sock, {"jsonrpc": "2.0", "method": "$/stream", "params": {"id": 1, "credit": 8}})
            assert [(await hear(sock))["params"]["items"] for _ in range(9)] == [[number] for number in range(9)]
            assert await hear(sock) == {"jsonrpc": "2.0", "result": None, "id": 1}


@pytest.mark.parametrize("timeout", [10**400, 1e308, 1e300])
@in_kernel
async def test_a_timeout_of_the_caller_that_is_beyond_all_measure_is_none(monkeypatch, timeout):
    reports = []
    monkeypatch.setattr("sys.unraisablehook", reports.append)
    server = slow_server(deadline=None)
    async with raw_connection(server) as sock:
        assert (await ask(sock, request("slow", "a", **{"$/context": {"timeout": timeout}})))["result"] == "a"
        assert server.statistics()["calls_running"] == 0
        await tell(sock, request("count", 1, 1, **{"$/context": {"timeout": timeout}, "$/stream": 8}))
        assert [(await hear(sock)).get("params"), (await hear(sock))["result"]] == [{"id": 1, "items": [0]}, None]
    assert reports == []


@in_kernel
async def test_a_timeout_beyond_all_measure_is_none_for_a_client_too(connect):
    async with await connect(slow_server()) as client:
        for timeout in 10**400, 1e308:
            assert await client.call("slow", "a", timeout=timeout) == "a"


# ---- handlers -------------------------------------------------------------------------------------------------

class Colour(enum.Enum):
    RED = 7


@pytest.mark.parametrize("code, message", [("E_NONE", "a"), (None, "a"), (1.5, "a"), (True, "a"), (Colour.RED, "a"), (1, None),
                                           (1, ValueError("a"))])
@in_kernel
async def test_an_error_whose_code_or_message_is_none_is_refused_where_it_is_made(connect, monkeypatch, code, message):
    reports = []
    monkeypatch.setattr("sys.unraisablehook", reports.append)
    server = RpcServer()

    @server.method
    def fail():
        raise RpcError(code, message)

    async with await connect(server) as client:
        with pytest.raises(InternalError):
            await client.call("fail", timeout=5)
    assert isinstance(reports[0].exc_value, TypeError) and "give" in str(reports[0].exc_value)


class Careless(RpcError):
    def __init__(self):
        pass


def endless():
    data = []
    data.append(data)
    return data


@pytest.mark.parametrize("error", [Careless(), RpcError(1, "a", endless()), RpcError(1, "a", object())])
@in_kernel
async def test_an_error_that_cannot_be_sent_is_an_internal_error_and_the_connection_goes_on(connect, monkeypatch, error):
    reports = []
    monkeypatch.setattr("sys.unraisablehook", reports.append)
    server = RpcServer()

    @server.method
    def at_once():
        raise error

    @server.method
    async def later():
        await flowcoro.sleep(1)
        raise error

    async with await connect(server, reconnect=None) as client:
        for name in "at_once", "later":
            with pytest.raises(InternalError):
                await client.call(name, timeout=5)
            assert name in reports.pop().err_msg
        assert not client.peer.closed


class Unlikely(BaseException):
    """As asyncio.CancelledError is one."""


@pytest.mark.parametrize("error", [flowcoro.Cancelled, Unlikely])
@in_kernel
async def test_a_handler_that_raises_what_ends_tasks_ends_its_call_alone(connect, monkeypatch, error):
    reports = []
    monkeypatch.setattr("sys.unraisablehook", reports.append)
    server = slow_server(max_concurrent=2)

    @server.method
    def at_once():
        raise error

    @server.method
    async def soon():
        raise error

    @server.method
    async def later():
        await flowcoro.sleep(1)
        raise error

    async with await connect(server, reconnect=None) as client:
        for name in "at_once", "soon", "later":
            with pytest.raises((InternalError, CallCancelled)):
                await client.call(name, timeout=5)
            assert await client.call("fast", 1) == 1
        assert server.statistics()["calls_running"] == 0 and len(reports) == 3


@in_kernel
async def test_a_handler_that_cancels_its_own_task_leaves_nobody_waiting():
    server = slow_server()

    @server.method
    def at_once():
        flowcoro.current_task().cancel()

    @server.method
    async def later():
        flowcoro.current_task().cancel()
        await flowcoro.sleep(1)

    async with raw_connection(server) as sock:
        assert (await ask(sock, request("later")))["error"]["code"] == -32800
        assert (await ask(sock, request("fast", "a")))["result"] == "a"
        await tell(sock, request("at_once"))
        with flowcoro.timeout(5):
            while await sock.read():
                pass


@in_kernel
async def test_parameters_are_no_way_to_the_peer_of_a_handler(connect):
    server = RpcServer()

    @server.method
    def anything(peer, **rest):
        return rest

    class Namespace:
        def named(self, context, **rest):
            return rest

        def placed(self, peer, /, **rest):
            return rest

    server.add(Namespace())
    async with await connect(server) as client:
        for name in "anything", "named":
            assert await client.call(name, a=1) == {"a": 1}
        for name, params in (("anything", {"peer": 1}), ("named", {"context": 1}), ("named", {"self": 1})):
            with pytest.raises(InvalidParams):
                await client.call(name, params=params)
        assert await client.call("placed", params={"peer": 1, "self": 2}) == {"peer": 1, "self": 2}


@in_kernel
async def test_a_call_whose_time_is_up_while_it_is_answered_has_one_answer(monkeypatch):
    answer = flowcoro_rpc._Answering._answer

    def late(peer, number, slot, result):
        for call in list(peer._calls.values()):
            call.expire()                       # as the sweep does it, which may run on another worker
        answer(peer, number, slot, result)

    monkeypatch.setattr(flowcoro_rpc._Answering, "_answer", late)
    server = slow_server()
    async with raw_connection(server) as sock:
        assert (await ask(sock, request("slow", "a", id=7)))["result"] == "a"
        assert await ask(sock, request("fast", "b", id=8)) == {"jsonrpc": "2.0", "result": "b", "id": 8}


@pytest.mark.parametrize("seconds", [0, 1])
@pytest.mark.parametrize("who", ["server", "peer", "client"])
@in_kernel
async def test_a_handler_that_closes_its_own_connection_is_answered_first(connect, who, seconds):
    server, methods, found = slow_server(), flowcoro_rpc.Methods(), []

    async def close(peer):
        if seconds:
            await flowcoro.sleep(seconds)
        await {"server": server, "peer": peer, "client": client}[who].close()
        return "closed"

    server.method(close)
    methods.method(close)
    client = await connect(server, methods=methods, reconnect=None)
    await wait_all_tasks_parked()
    if who == "client":
        found.append(await server.peers[0].call("close"))
    else:
        running = flowcoro.spawn(client.call("slow", "other", 2))
        await wait_all_tasks_parked()
        found.append(await client.call("close"))
        assert await running == "other"
    await wait_all_tasks_parked()
    assert found == ["closed"] and client.closed and server.peers == [] and flowcoro.now() < 4
    await client.close()


@in_kernel
async def test_a_handler_that_calls_back_while_its_connection_is_closed_here_is_nothing_to_report(connect, monkeypatch):
    reports = []
    monkeypatch.setattr("sys.unraisablehook", reports.append)
    server, methods = RpcServer(), flowcoro_rpc.Methods()

    @methods.method
    async def hold():
        await flowcoro.sleep(100)

    @server.method
    async def back(peer):
        return await peer.call("hold")

    async with await connect(server, methods=methods, reconnect=None) as client, flowcoro.TaskGroup() as group:
        async def call():
            with pytest.raises(InternalError):
                await client.call("back")

        group.spawn(call())
        await wait_all_tasks_parked()
        await server.peers[0].close()
    assert reports == []


@pytest.mark.parametrize("notifies", [False, True])
@in_kernel
async def test_a_drain_in_the_middle_of_a_first_step_does_not_cut_it(notifies):
    server, ended = slow_server(), []

    @server.method
    def drain(peer):
        peer._drain()                       # as another worker may
        ended.append(peer.closed)
        return "a"

    async with raw_connection(server) as sock:
        message = request("drain")
        if notifies:
            del message["id"]
        await tell(sock, message)
        if not notifies:
            assert (await hear(sock))["result"] == "a"
        with flowcoro.timeout(1):
            assert await sock.read() == b"" and ended == [False]


@in_kernel
async def test_who_comes_while_the_server_is_being_closed_is_told_when_he_asks():
    server = slow_server()
    await server.close()
    async with raw_connection(server) as sock:
        await flowcoro.sleep(1)
        assert (await ask(sock, request("fast", 1)))["error"]["code"] == -32011
        assert await sock.read() == b""


# ---- what another worker does in between --------------------------------------------------------------------------

@in_kernel
async def test_items_that_come_with_the_end_after_the_last_look_at_a_stream_are_not_lost(monkeypatch):
    class Sly(collections.deque):
        """Where it is found to be empty, the rest has come just then."""

        def __bool__(self):
            if not len(self) and late:
                feed, = client.peer._pending.values()
                feed.receive(late.pop())
                client.peer._take_response(flowcoro_rpc.Response(feed.id, None, None))
                return False
            return len(self) > 0

    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    late = [["x", "y"]]
    async with theirs, RpcClient.over(ours) as client:
        monkeypatch.setattr(flowcoro_rpc.collections, "deque", Sly)
        assert [item async for item in client.stream("a")] == ["x", "y"]


@in_kernel
async def test_calls_that_end_while_others_are_looked_at_do_no_harm():
    class Ending(flowcoro_rpc._Reply):
        """A call: who looks at it finds that another one has ended."""

        __slots__ = ()

        def __class__(self):
            self.peer._pending.pop("other", None)
            return Ending

        def look(self):
            self.peer._pending.pop("other", None)

        __class__, message = property(__class__), property(look, lambda self, message: None)

    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with theirs, RpcClient.over(ours) as client:
        peer = client.peer
        for look in peer._probe, lambda: peer._take_refusal(RpcError(1, "a")):
            peer._enter([Ending(peer, "one", "a"), flowcoro_rpc._Reply(peer, "other", "a")], b"")
            look()
            assert "other" not in peer._pending


# ---- answers that are none ------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer", [
    {"jsonrpc": "2.0", "result": 1, "error": None}, {"result": 1}, {"jsonrpc": "2.0", "error": "no"},
    {"jsonrpc": "2.0", "error": {"code": "E", "message": "no"}}])
@in_kernel
async def test_an_answer_that_is_none_ends_its_call_at_once(answer):
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with theirs, RpcClient.over(ours) as client, flowcoro.TaskGroup() as group:
        async def call():
            with pytest.raises(ProtocolError, match="answer to 'a'"):
                await client.call("a", timeout=None)

        async def batch():
            with pytest.raises(ProtocolError, match="answer to 'b'"):
                await client.batch(Request("b"), timeout=None)

        for work in call, batch:
            task, other = group.spawn(work()), group.spawn(client.call("other"))
            await wait_all_tasks_parked()
            heard = [await hear(theirs), await hear(theirs)]
            asked = next(one for one in heard if isinstance(one, list) or one["method"] == "a")
            asked, = asked if isinstance(asked, list) else [asked]
            await tell(theirs, {**answer, "id": asked["id"]})
            await task
            await tell(theirs, {"jsonrpc": "2.0", "result": 5, "id": next(one["id"] for one in heard if isinstance(one, dict)
                                                                           and one["method"] == "other")})
            assert await other == 5


@pytest.mark.parametrize("result, why", [
    ("[" * 70 + "]" * 70, "64 arrays"), ("NaN", "NaN"), ('{"a": 1, "a": 2}', "twice"), ('"\\ud800"', "surrogate")])
@in_kernel
async def test_an_answer_that_is_refused_as_json_ends_its_call_at_once_and_is_not_answered(result, why):
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with theirs, RpcClient.over(ours) as client, flowcoro.TaskGroup() as group:
        async def fails(coro):
            with pytest.raises(ProtocolError, match=why):
                await coro

        other = group.spawn(client.call("other"))
        await wait_all_tasks_parked()
        other_id = (await hear(theirs))["id"]
        for one in client.call("a", timeout=None), client.batch(Request("b"), Request("c"), timeout=None):
            task = group.spawn(fails(one))
            await wait_all_tasks_parked()
            asked = await hear(theirs)
            answers = ['{"jsonrpc": "2.0", "result": %s, "id": %d}' % (result, each["id"])
                       for each in (asked if isinstance(asked, list) else [asked])]
            await tell(theirs, (f"[{', '.join(answers)}]" if isinstance(asked, list) else answers[0]).encode())
            await task
        await tell(theirs, {"jsonrpc": "2.0", "result": 5, "id": other_id})
        assert await other == 5
        await tell(theirs, b'[{"jsonrpc": "2.0", "result": NaN, "id": 1}, {"jsonrpc": "2.0", "method": "a", "id": 2}]')
        assert (await hear(theirs))["error"]["code"] == -32700


@in_kernel
async def test_a_timeout_says_that_the_peer_has_sent_what_is_no_json():
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with theirs, RpcClient.over(ours) as client:
        await theirs.write(b"Welcome!\n")
        with pytest.raises(TimeoutError, match="it may have run; the peer has sent what is no JSON-RPC .Expecting value"):
            await client.call("a", timeout=1)


@in_kernel
async def test_a_batch_that_is_too_long_is_refused_here(connect):
    async with await connect(slow_server(max_batch=5), max_batch=5) as client, flowcoro.TaskGroup() as group:
        task = group.spawn(client.call("slow", "a"))
        await wait_all_tasks_parked()
        assert await client.batch(*[Request("fast", [1])] * 5) == [1] * 5
        with pytest.raises(flowcoro_net.LimitError, match="max_batch=5"):
            await client.batch(*[Request("fast", [1])] * 6)
        assert await task == "a"


@in_kernel
async def test_a_stream_of_what_gives_no_list_says_so(connect):
    async with await connect(slow_server()) as client:
        assert [item async for item in client.stream("fast", [1, 2])] == [1, 2]
        assert [item async for item in client.stream("fast")] == []
        for result in "text", {"a": 1}, 5, 0:
            with pytest.raises(ProtocolError, match="'fast'.*call"):
                async for _ in client.stream("fast", result):
                    pytest.fail("an item of no list")
        for window in 0, -1, 2**40, "5", 2.5, True:
            with pytest.raises(ValueError, match="window"):
                async for _ in client.stream("fast", window=window):
                    pass


@in_kernel
async def test_a_batch_that_has_no_answer_says_so_and_asks_for_a_sign_of_life(connect):
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with theirs, RpcClient.over(ours) as client:
        with pytest.raises(TimeoutError, match="no answer to 'a' within timeout=1 s; it may have run$"):
            await client.batch(Request("a"), timeout=1)
        assert [one if isinstance(one, list) else one["method"] for one in [await hear(theirs) for _ in range(3)]][1:] == [
            "$/cancelRequest", "$/ping"]


@in_kernel
async def test_who_calls_while_the_client_is_being_closed_is_told(connect):
    server, methods = slow_server(), flowcoro_rpc.Methods()

    @methods.method
    async def hold():
        await flowcoro.sleep(3)

    async with await connect(server, methods=methods) as client, flowcoro.TaskGroup() as group:
        async def keep_it_open():
            assert await server.peers[0].call("hold") is None

        group.spawn(keep_it_open())
        await wait_all_tasks_parked()
        closing = group.spawn(client.close())
        await wait_all_tasks_parked()
        for operation in client.call("slow", "a"), client.batch(Request("slow", ["b"])), client.notify("slow", "c"):
            with pytest.raises(flowcoro.ClosedError):
                await operation
        assert not closing.done()
    await flowcoro.sleep(5)
    assert server.done == []


# ---- connections that do not last -----------------------------------------------------------------------------

@in_kernel
async def test_a_server_that_accepts_and_drops_is_left_in_peace_more_and_more(connect):
    server = slow_server()
    async with await connect(server, reconnect=Backoff(1, 100, jitter=0, attempts=6)) as client:
        async def drop(sock):
            client.memory.connections.clear()
            client.memory.times.append(flowcoro.now())
            await sock.close()

        client.memory.times = []
        assert await client.call("fast", 1) == 1
        client.memory.serve = drop
        before = flowcoro.now()
        client.memory.cut()
        with pytest.raises((ConnectionLost, flowcoro.ClosedError)):
            while True:
                try:
                    await client.call("fast", 2, timeout=None)
                except ConnectionLost as error:
                    if error.sent is False:
                        raise
        assert [round(time - before) for time in client.memory.times] == [1, 3, 7, 15, 31, 63]


@in_kernel
async def test_connections_that_have_served_or_lasted_begin_the_pauses_anew(connect):
    async with await connect(slow_server(), reconnect=Backoff(1, 8, jitter=0, attempts=2)) as client:
        for seconds in 0, 9:
            for _ in range(5):
                if not seconds:
                    assert await client.call("fast", 1) == 1
                await flowcoro.sleep(seconds)
                before = flowcoro.now()
                client.memory.cut()
                await wait_all_tasks_parked()
                await client.notify("fast")
                assert flowcoro.now() - before == 1


@in_kernel
async def test_what_has_not_run_at_a_server_of_a_pool_goes_to_the_next_at_once(connect):
    methods = flowcoro_rpc.Methods()

    @methods.method
    async def hold():
        await flowcoro.sleep(math.inf)

    servers = [slow_server() for _ in range(2)]

    @servers[0].method
    async def hold_on(peer):
        await peer.call("hold", timeout=None)

    clients = [await connect(server, methods=methods, reconnect=Backoff(1000, 1000)) for server in servers]
    async with RpcPool(clients) as pool, flowcoro.TaskGroup() as group:
        async def keep_it_open():
            with pytest.raises(ConnectionLost):
                await clients[0].call("hold_on")

        group.spawn(keep_it_open())
        await wait_all_tasks_parked()
        await clients[0].memory.connections[0][1].shutdown_write()         # it ends, and a call of its own runs here still
        await wait_all_tasks_parked()
        before = flowcoro.now()
        assert not clients[0].peer.closed
        assert [await pool.call("fast", number, timeout=5) for number in range(4)] == [0, 1, 2, 3]
        await pool.notify("fast")
        assert await pool.batch(Request("fast", [5])) == [5] and flowcoro.now() == before


@in_kernel
async def test_a_pool_waits_for_a_server_that_is_gone_when_no_other_takes_the_call(connect):
    servers = [slow_server(), slow_server(max_concurrent=1, max_waiting=1)]
    clients = [await connect(server, reconnect=Backoff(1, jitter=0)) for server in servers]
    async with RpcPool(clients) as pool:
        for client in clients:
            client.memory.cut()
        await wait_all_tasks_parked()
        before = flowcoro.now()
        assert await pool.call("fast", 1, timeout=5) == 1 and flowcoro.now() - before == 1


@in_kernel
async def test_a_call_that_goes_from_one_server_of_a_pool_to_the_next_has_no_more_time_than_it_had(monkeypatch):
    pairs = []

    async def open(*where, **options):
        await flowcoro.checkpoint()
        pairs.append(memory_socket_pair(flowcoro_net.Socket, capacity=1000))
        return pairs[-1][0]

    monkeypatch.setattr(flowcoro_net.Socket, "connect", open)
    async with await RpcPool.connect([("memory", 1), ("memory", 2)], reconnect=None) as pool, flowcoro.TaskGroup() as group:
        async def fails(error, coro):
            with pytest.raises(error):
                await coro
            return flowcoro.now() - began

        began = flowcoro.now()
        for client in pool._clients:            # whose servers do not read
            group.spawn(fails(ConnectionLost, client.call("a", "x" * 10_000, timeout=None)))
        await wait_all_tasks_parked()
        task = group.spawn(fails(TimeoutError, pool.call("b", timeout=10)))
        await wait_all_tasks_parked()
        busy = max(range(2), key=lambda number: pool._clients[number].peer.statistics()["calls_waiting"])
        await flowcoro.sleep(8)
        pairs[busy][1].close_nowait()
        assert await task == pytest.approx(10, abs=0.1)
        pairs[1 - busy][1].close_nowait()


@in_kernel
async def test_a_pool_tells_that_a_server_is_busy_rather_than_that_another_is_gone_for_good(connect):
    busy = slow_server()

    @busy.method
    def buy():
        raise flowcoro_rpc.Overloaded

    clients = [await connect(slow_server(), reconnect=None), await connect(busy)]
    async with RpcPool(clients) as pool:
        clients[0].memory.cut()
        await wait_all_tasks_parked()
        for _ in range(2):
            with pytest.raises(flowcoro_rpc.Overloaded):
                await pool.call("buy")


@in_kernel
async def test_a_stream_has_its_timeout_also_while_there_is_no_connection(connect):
    async with await connect(slow_server(), reconnect=Backoff(1, jitter=0)) as client:
        client.memory.refusals = 10**9
        client.memory.cut()
        await wait_all_tasks_parked()
        before = flowcoro.now()
        with pytest.raises(TimeoutError, match="count"):
            async for _ in client.stream("count", 3, timeout=5):
                pass
        assert flowcoro.now() - before == 5


@in_kernel
async def test_a_pool_does_not_repeat_what_has_run_because_another_server_refused_a_part_of_it(connect, monkeypatch):
    monkeypatch.setattr("sys.unraisablehook", lambda report: None)
    behind, ran = RpcServer(), []

    async def whole(closing):
        ran.append(1)
        await inner.call("part", closing)

    @behind.method
    def part(closing):
        raise flowcoro_rpc.ShuttingDown() if closing else flowcoro_rpc.Overloaded()

    servers = [RpcServer() for _ in range(2)]
    for server in servers:
        server.method(whole)
    async with await connect(behind) as inner, RpcPool([await connect(server) for server in servers]) as pool:
        for closing in True, False:
            with pytest.raises(InternalError):
                await pool.call("whole", closing)
    assert len(ran) == 2


# ---- framings and transports ----------------------------------------------------------------------------------

def test_a_framing_that_is_no_class_is_refused_before_anything_is_opened():
    async def main():
        for framing in Netstring(), "newline":
            with pytest.raises(TypeError, match="give the class"):
                await RpcServer().start_tcp_server(0, framing=framing)
            with pytest.raises(TypeError, match="give the class"):
                await RpcClient.connect("127.0.0.1", 1, framing=framing)

    flowcoro.run(main())


def test_netstrings_of_any_size_come_where_there_is_no_limit():
    framing = Netstring(math.inf)
    framing.receive_data(framing.frame(b"x" * 123_456))
    assert len(framing.next_message()) == 123_456
    framing.receive_data(b"9" * 100)
    with pytest.raises(ProtocolError):
        framing.next_message()


def test_a_head_whose_lines_end_otherwise_is_refused_at_once():
    for head in b"Content-Length: 2\n\n{}", b"Content-Length: 2\n", b"Content-Length: 2\r\nContent-Type: a\n\n{}":
        framing = ContentLength()
        with pytest.raises(ProtocolError, match="CRLF"):
            for at in range(len(head)):
                framing.receive_data(head[at:at + 1])
                assert framing.next_message() is NEED_DATA


@in_kernel
async def test_who_calls_back_over_http_is_told_why_he_cannot(monkeypatch):
    reports = []
    monkeypatch.setattr("sys.unraisablehook", reports.append)
    server = RpcServer()

    @server.method
    async def back(peer, notifies):
        await (peer.notify("a") if notifies else peer.call("a"))

    for notifies in True, False:
        answer = json.loads(await server.answer(json.dumps(request("back", notifies)).encode()))
        assert answer["error"]["code"] == -32603 and "called back" in str(reports.pop().exc_value)


class Texts:
    """Texts that came, and then nothing more."""

    def __init__(self, *texts):
        self.texts, self.sent = list(texts), []

    async def receive(self):
        await flowcoro.checkpoint()
        return self.texts.pop(0) if self.texts else None

    async def send(self, text):
        await flowcoro.checkpoint()
        self.sent.append(json.loads(text))


@in_kernel
async def test_an_empty_message_is_no_json_and_not_the_end():
    messages = Texts("", b"", json.dumps(request("fast", 1)))
    await slow_server().serve_messages(messages)
    assert [one.get("result", one.get("error", {}).get("code")) for one in messages.sent] == [-32700, -32700, 1]


class Failing(Texts):
    def __init__(self, how, error):
        super().__init__()
        self.how, self.error = how, error

    async def receive(self):
        await flowcoro.sleep(1 if self.how == "receive" else 1000)
        raise self.error

    async def send(self, text):
        await flowcoro.sleep(0.1)
        if self.how == "send":
            raise self.error


@pytest.mark.parametrize("how", ["receive", "send"])
@pytest.mark.parametrize("error", [ValueError("foreign"), OSError("foreign"), flowcoro_net.LimitError("foreign")])
@in_kernel
async def test_what_a_transport_raises_ends_its_connection_and_is_not_hidden(monkeypatch, how, error):
    reports = []
    monkeypatch.setattr("sys.unraisablehook", reports.append)
    async with RpcClient.over(Failing(how, error)) as client:
        with pytest.raises(ConnectionLost, match="foreign"):
            await client.call("a", timeout=5)
        with pytest.raises(ConnectionLost, match="foreign"):
            await client.call("a", timeout=5)
    if how == "receive":
        await RpcServer().serve_messages(Failing(how, error))
    assert len(reports) == (how == "receive") + 1 if isinstance(error, ValueError) else not reports


# ---- arguments ------------------------------------------------------------------------------------------------

def test_limits_that_are_none_are_refused_where_they_are_given():
    for wrong in 0, -1, None, "5", 1.5, True:
        with pytest.raises(ValueError, match="max_concurrent_in_all"):
            RpcServer(max_concurrent_in_all=wrong)
    for wrong in {"first": -1}, {"first": 0}, {"most": 0}, {"times": 0.5}, {"jitter": 2}, {"jitter": -1}, {"first": math.nan}:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Backoff(**wrong)


def test_a_default_that_has_no_json_does_not_keep_discover_from_answering():
    server = RpcServer()
    server.method(lambda a=object(), b=math.inf, c=(): None, name="odd")
    async def main():
        answer = json.loads(await server.answer(json.dumps(request("rpc.discover")).encode()))
        assert [one["name"] for one in answer["result"]["methods"][0]["params"]] == ["a", "b", "c"]

    flowcoro.run(main())
