"""WebSockets on the HTTP server: the handshake, routes, middleware, handlers that fail, the end, ASGI. On a simulated network,
but for what is the system's."""

import contextlib
import functools
import gc
import socket
import weakref

import pytest

import flowcoro
import flowcoro_http
from flowcoro_http import HttpServer, Request, Router, asgi_app
from flowcoro_net import BrokenError, Socket, client_tls, server_tls
from flowcoro_testing import SimulatedNetwork, memory_socket_pair, run_in_kernel, wait_all_tasks_parked
from flowcoro_websocket import ConnectionClosed, HandshakeError, WebSocket, WebSocketConnection, accept, broadcast, connect
from test_http_server import serving
from test_net import nothing_is_left_behind, run  # noqa: F401  (a fixture)
from test_net_cancel import at_each_point
from test_net_tls import certificates  # noqa: F401  (a fixture)

simulated = functools.partial(run_in_kernel, timeout=100_000)       # seconds of the virtual clock: a test that hangs fails

KEY = ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
ASKING = {"Host": "server", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", KEY[0]: KEY[1]}


def asking(path="/ws", method="GET", version="1.1", **changes):
    fields = {**ASKING, **{name.replace("_", "-"): value for name, value in changes.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"{method} {path} HTTP/{version}\r\n{lines}\r\n".encode()


def echoing(path="/ws", **options):
    app = HttpServer(websocket=accept)

    @app.websocket(path, **options)
    async def echo(ws):
        async for message in ws:
            await ws.send(message)
    return app


@contextlib.asynccontextmanager
async def client_of(world, path="/ws", **options):
    """A WebSocket to the host "server"."""
    world.clients += 1
    with world.network.host(f"client{world.clients}"):
        connecting = connect(f"ws://server{path}", **options)
        ws = await connecting
    async with ws:
        yield ws


# ---- the handshake ---------------------------------------------------------------------------------------------

@simulated
async def test_headers_of_the_answer_are_pairs_or_a_mapping():
    for headers in ([("X-Room", "tea")], {"X-Room": "tea"}):
        async with serving(echoing(headers=headers)) as world, client_of(world) as ws:
            assert ("X-Room", "tea") in ws.response_headers


@simulated
async def test_the_answer_to_a_handshake_is_that_of_the_rfc():
    async with serving(echoing()) as world, await world.connect() as sock:
        await sock.write(asking() + WebSocketConnection("client").send_message("at once"))
        head = await sock.read_until(b"\r\n\r\n")
        assert head == (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")
        assert await sock.read() == b"\x81\x07at once"


@pytest.mark.parametrize("changes, status, headers", [
    ({"Sec_WebSocket_Version": "8"}, 426, {"sec-websocket-version": "13"}),
    ({"Sec_WebSocket_Version": None}, 426, {"sec-websocket-version": "13"}),
    ({"Upgrade": None}, 426, {"upgrade": "websocket"}), ({"Upgrade": "h2c"}, 426, {"upgrade": "websocket"}),
    ({"Connection": "keep-alive"}, 426, {"upgrade": "websocket"}), ({"version": "1.0"}, 426, {"upgrade": "websocket"}),
    ({"Sec_WebSocket_Key": None}, 400, {}), ({"Sec_WebSocket_Key": "c2hvcnQ="}, 400, {}),
    ({"Sec_WebSocket_Key": "*" * 24}, 400, {}), ({"Origin": "https://evil.example"}, 403, {}),
    ({"method": "POST", "Content_Length": "0"}, 405, {"allow": "GET, HEAD, OPTIONS"}),
    ({"Sec_WebSocket_Protocol": "a, a"}, 400, {})])
@simulated
async def test_what_is_no_handshake_is_answered_so_and_the_server_goes_on(changes, status, headers):
    async with serving(echoing()) as world:
        [answer] = await world.talk(asking(**changes), changes.get("method", "GET"))
        assert answer.status == status and answer.content
        assert {name: answer.headers.get(name) for name in headers} == headers
        assert "sec-websocket-accept" not in answer.headers
        async with client_of(world) as ws:
            await ws.send("fine")
            assert await ws.receive() == "fine"


@simulated
async def test_an_upgrade_with_content_is_refused():
    async with serving(echoing()) as world:
        for framing in ({"Content_Length": "5"}, {"Transfer_Encoding": "chunked"}):
            async with await world.connect() as sock:
                await sock.write(asking(**framing) + b"5\r\nhello\r\n0\r\n\r\n")
                assert (await sock.read()).startswith(b"HTTP/1.1 400 ")


@simulated
async def test_a_handshake_that_drips_is_cut_after_head_timeout():
    app = echoing()
    async with serving(app) as world, await world.connect() as sock:
        began = flowcoro.now()
        with contextlib.suppress(BrokenError):
            for byte in asking():
                await sock.write(bytes([byte]))
                await flowcoro.sleep(1)
        assert flowcoro.now() - began < app.head_timeout + 5
        assert (await sock.read()).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("origins, origin, passes", [
    (None, None, True), (None, "http://server", True), (None, "http://other", False),
    (["https://a.example"], "https://a.example", True),
    (["https://a.example"], "http://server", False), (["*"], "https://x.example", True), (["https://a.example"], None, True)])
@simulated
async def test_who_may_connect_from_a_browser(origins, origin, passes):
    async with serving(echoing(origins=origins)) as world:
        if passes:
            async with client_of(world, origin=origin) as ws:
                await ws.send("in")
                assert await ws.receive() == "in"
        else:
            with pytest.raises(HandshakeError) as caught:
                async with client_of(world, origin=origin):
                    pass
            assert caught.value.status == 403 and b"origins=" in caught.value.body


@pytest.mark.parametrize("offered, chosen", [((), None), (("x",), None), (("b", "a"), "a"), (("b",), "b")])
@simulated
async def test_the_best_subprotocol_of_both_is_taken(offered, chosen):
    app = HttpServer(websocket=accept)

    @app.websocket("/ws", subprotocols=["a", "b"], headers={"X-A": "1"})
    async def tell(ws):
        await ws.send(str(ws.subprotocol))

    async with serving(app) as world, client_of(world, subprotocols=offered) as ws:
        assert ws.subprotocol == chosen and await ws.receive() == str(chosen)
        assert ("X-A", "1") in ws.response_headers


@simulated
async def test_accept_by_hand_in_an_ordinary_handler():
    app = HttpServer()

    @app.get("/ws")
    async def handler(request):
        async with await accept(request, max_message=10) as ws:
            async for message in ws:
                await ws.send(message * 2)

    async with serving(app) as world, client_of(world) as ws:
        await ws.send("ab")
        assert await ws.receive() == "abab"
        await ws.send("x" * 11)
        with pytest.raises(ConnectionClosed) as caught:
            await ws.receive()
        assert caught.value.code == 1009            # and the handler's ConnectionClosed is not reported
    async with serving(app) as world, client_of(world) as ws:
        world.listener.close()
        with pytest.raises(ConnectionClosed) as caught:
            await ws.receive()
        assert caught.value.code == 1001


@pytest.mark.parametrize("options, error", [({"deflate": "yes"}, TypeError), ({"origins": "https://a"}, TypeError),
                                            ({"subprotocols": ["a b"]}, ValueError), ({"ping_interval": 0}, ValueError),
                                            ({"max_message": -1}, ValueError), ({"max_frame": "1"}, TypeError),
                                            ({"max_queue": 0}, ValueError), ({"close_timeout": -1}, ValueError),
                                            ({"headers": {"Sec-WebSocket-Protocol": "x"}}, ValueError),
                                            ({"headers": {"Sec-WebSocket-Extensions": "permessage-deflate"}}, ValueError),
                                            ({"headers": [("sec-websocket-protocol", "chat")]}, ValueError),
                                            ({"headers": {"Connection": "close"}}, ValueError),
                                            ({"headers": {"X": "a\r\nSet-Cookie: b=c"}}, ValueError),
                                            ({"headers": {"X": 5}}, TypeError)])
@simulated
async def test_options_that_make_no_sense_are_refused_before_anything_is_sent(options, error):
    asked = Request("GET", "/", [*ASKING.items()])
    with pytest.raises(error):
        await accept(asked, **options)


# ---- routes ----------------------------------------------------------------------------------------------------

@simulated
async def test_a_handler_gets_what_its_path_and_its_query_have():
    app = HttpServer(websocket=accept)

    @app.websocket("/rooms/{name}/{number:int}", name="room")
    async def room(ws, name: str, number: int, *, token: str = "none"):
        await ws.send(f"{name} {number} {token} {ws.request.params} {ws.request.host}")

    async with serving(app) as world:
        async with client_of(world, "/rooms/a%20b/7?token=t") as ws:
            assert await ws.receive() == "a b 7 t {'name': 'a b', 'number': 7} server"
            with pytest.raises(ConnectionClosed):
                await ws.receive()
            assert ws.close_code == 1000
        assert app.url_for("room", name="x", number=1) == "/rooms/x/1"
        with pytest.raises(HandshakeError) as caught:
            async with client_of(world, "/rooms/a/b"):
                pass
        assert caught.value.status == 404


@simulated
async def test_a_router_that_is_included_has_websockets_too(reports):
    router = Router()

    @router.websocket("/ws/{name}")
    async def hello(ws, name):
        await ws.send(f"hello, {name}")

    app = HttpServer(websocket=accept)
    app.include(router, prefix="/api")
    async with serving(app) as world, client_of(world, "/api/ws/Ada") as ws:
        assert await ws.receive() == "hello, Ada"
    silent = HttpServer()
    silent.include(router)
    async with serving(silent) as world:
        [answer] = await world.talk(asking("/ws/x"))
        assert answer.status == 500 and "HttpServer(websocket=" in str(reports[0][1])


def test_without_what_speaks_it_and_with_what_is_not_async_the_decorator_says_so():
    with pytest.raises(RuntimeError, match=r"HttpServer\(websocket=flowcoro_websocket.accept\)"):
        HttpServer().websocket("/ws")
    with pytest.raises(TypeError, match="async def handler"):
        HttpServer(websocket=accept).websocket("/ws")(lambda ws: None)
    with pytest.raises(TypeError, match="flowcoro_websocket.accept"):
        HttpServer(websocket=True)
    with pytest.raises(TypeError, match="/ws.*max_size"):
        HttpServer(websocket=accept).websocket("/ws", max_size=1000)
    HttpServer(websocket=functools.partial(accept, origins=["*"])).websocket("/ws", name="here", host="a", max_message=1000)


@simulated
async def test_middleware_sees_the_handshake_and_may_refuse_it():
    app, seen = echoing(), []

    @app.middleware
    async def guard(request, call_next):
        if "x-token" not in request.headers:
            raise flowcoro_http.HttpError(401, "who?")
        seen.append("begun")
        try:
            return await call_next(request)
        finally:
            seen.append("ended")

    async with serving(app) as world:
        with pytest.raises(HandshakeError) as caught:
            async with client_of(world):
                pass
        assert caught.value.status == 401 and not seen
        async with client_of(world, headers={"X-Token": "1"}) as ws:
            await ws.send("x")
            assert await ws.receive() == "x" and seen == ["begun"]
        await flowcoro.sleep(1)
        assert seen == ["begun", "ended"]


@pytest.mark.parametrize("middleware", [False, True])
@simulated
async def test_a_handler_that_fails_is_reported_and_its_client_told(middleware, reports):
    app = HttpServer(websocket=accept)

    @app.websocket("/ws")
    async def fails(ws):
        raise ZeroDivisionError("in a handler")

    if middleware:
        app.middleware(_pass_on)
    async with serving(app) as world, client_of(world) as ws:
        with pytest.raises(ConnectionClosed) as caught:
            await ws.receive()
        assert caught.value.code == 1011
    [(said, error)] = reports
    assert "handler failed" in said and "in a handler" in str(error)


async def _pass_on(request, call_next):
    return await call_next(request)


@pytest.mark.parametrize("middleware", [False, True])
@simulated
async def test_clients_that_go_away_are_not_reported(middleware, reports):
    app = HttpServer(websocket=accept)
    ended = []

    @app.websocket("/ws")
    async def handler(ws):
        try:
            async with flowcoro.TaskGroup() as group:
                group.spawn(ws.receive())
                await ws.receive() if ws.request.query_string else await flowcoro.sleep(1000)
        finally:
            ended.append(ws.close_code)

    if middleware:
        app.middleware(_pass_on)
    async with serving(app) as world:
        async with client_of(world) as ws:
            await ws.close(4000)
        async with client_of(world) as ws:
            ws._sock.close_nowait()
        await flowcoro.sleep(5)
        assert ended == [4000, 1006]
    assert not reports


@pytest.mark.parametrize("middleware", [False, True])
def test_a_client_that_closes_and_goes_while_the_handler_sends_is_not_reported(middleware, reports):
    async def main():
        app, ended = HttpServer(websocket=accept), flowcoro.Event()

        @app.websocket("/ws")
        async def tick(ws):
            try:
                while True:
                    await ws.send("tick")               # told that the connection is lost before the Close is read
                    await flowcoro.sleep(0.001)
            finally:
                ended.set()

        if middleware:
            app.middleware(_pass_on)
        async with flowcoro.TaskGroup() as group, await app.listen("127.0.0.1", 0) as server:
            group.spawn(server.serve())
            async with await Socket.connect(*server.local) as sock:
                await sock.write(asking())
                await sock.read_until(b"\r\n\r\n")
                await sock.write(WebSocketConnection("client").send_close(1001))
            with flowcoro.timeout(30):
                await ended.wait()
            server.close()

    run(main)
    assert not reports


@simulated
async def test_who_sends_when_the_server_has_ended_is_not_reported(reports):
    app = HttpServer(websocket=accept)

    @app.websocket("/ws")
    async def tell(ws):
        while True:                             # until send() raises
            await ws.send("tick")
            await flowcoro.sleep(0.1)

    async with serving(app) as world, client_of(world) as ws:
        await ws.receive()
        world.listener.close()
        await flowcoro.sleep(0.3)               # in which it has not seen the Close yet, and the handler has failed
        async for _ in ws:
            pass
        assert ws.close_code == 1001
    assert not reports


@simulated
async def test_that_another_websocket_of_the_handler_was_closed_is_a_failure(reports):
    app = HttpServer(websocket=accept)

    @app.websocket("/ws")
    async def front(ws):
        one, other = memory_socket_pair(Socket)
        async with one, other:
            await other.write(WebSocketConnection("client").send_close(1000))
            await WebSocket(one, "server").receive()

    async with serving(app) as world, client_of(world) as ws:
        with pytest.raises(ConnectionClosed) as caught:
            await ws.receive()
        assert caught.value.code == 1011
    [(_, error)] = reports
    assert isinstance(error, ConnectionClosed)


@simulated
async def test_an_idle_connection_has_no_task_but_its_handlers():
    async with serving(echoing()) as world:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                sock = await stack.enter_async_context(await world.connect())
                await sock.write(asking())
                await sock.read_until(b"\r\n\r\n")
            await flowcoro.sleep(1)
            tasks = flowcoro.statistics()["tasks"]["alive"]
            for _ in range(5):
                sock = await stack.enter_async_context(await world.connect())
                await sock.write(asking())
                await sock.read_until(b"\r\n\r\n")
            await flowcoro.sleep(18)
            assert flowcoro.statistics()["tasks"]["alive"] == tasks + 5


@simulated
async def test_what_a_connection_has_held_is_no_garbage_that_only_a_collector_finds():
    app, refs = HttpServer(websocket=accept), []

    @app.websocket("/ws")
    async def handler(ws):
        refs.extend([weakref.ref(ws), weakref.ref(ws.request)])
        async for _ in ws:
            pass

    async with serving(app) as world:
        gc.collect()
        gc.disable()
        try:
            async with client_of(world):
                pass
            await flowcoro.sleep(1)
            assert [ref() for ref in refs] == [None, None]
        finally:
            gc.enable()


@simulated
async def test_a_room():
    app, members = HttpServer(websocket=accept), set()

    @app.websocket("/ws")
    async def room(ws):
        members.add(ws)
        try:
            async for message in ws:
                broadcast(members, message)
        finally:
            members.discard(ws)

    async with serving(app) as world, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_of(world)) for _ in range(5)]
        await flowcoro.sleep(0.1)
        for number, ws in enumerate(clients):
            await ws.send(str(number))
            for other in clients:
                assert await other.receive() == str(number)


# ---- the end ---------------------------------------------------------------------------------------------------

@simulated
async def test_when_the_server_ends_clients_are_told_1001():
    async with serving(echoing()) as world, client_of(world) as one, client_of(world) as other:
        await one.send("x")
        assert await one.receive() == "x"
        began = flowcoro.now()
        world.listener.close()
        for ws in (one, other):
            with pytest.raises(ConnectionClosed) as caught:
                await ws.receive()
            assert caught.value.code == 1001
        await world.task
        assert flowcoro.now() - began < 1


@simulated
async def test_a_client_that_does_not_answer_the_end_does_not_hold_up_the_server():
    async with serving(echoing(), drain_timeout=8) as world, await world.connect() as sock:
        await sock.write(asking())
        await sock.read_until(b"\r\n\r\n")
        began = flowcoro.now()
        world.listener.close()
        await world.task
        assert 7 <= flowcoro.now() - began <= 12
        assert (await sock.read())[:4] == b"\x88\x02\x03\xe9"


@simulated
async def test_a_handler_that_does_not_receive_ends_when_it_sends_or_is_cancelled():
    app, ended = HttpServer(websocket=accept), []

    @app.websocket("/send")
    async def send(ws):
        with pytest.raises(ConnectionClosed):
            while True:
                await ws.send("tick")
                await flowcoro.sleep(1)
        ended.append("told")

    @app.websocket("/sleep")
    async def sleep(ws):
        try:
            await flowcoro.sleep(1000)
        finally:
            ended.append("cancelled")

    async with serving(app, drain_timeout=8) as world, client_of(world, "/send"), client_of(world, "/sleep"):
        await flowcoro.sleep(3)
        world.listener.close()
        await world.task
        assert ended == ["told", "cancelled"]


@simulated
async def test_a_handshake_while_the_server_ends_is_accepted_and_closed():
    app = HttpServer(websocket=accept)
    go_on = flowcoro.Event()

    @app.middleware
    async def slowly(request, call_next):
        await go_on.wait()
        return await call_next(request)

    @app.websocket("/ws")
    async def handler(ws):
        async for _ in ws:
            pass

    async with serving(app) as world:
        async def client():
            async with client_of(world) as ws:
                with pytest.raises(ConnectionClosed) as caught:
                    await ws.receive()
                return caught.value.code

        async with flowcoro.TaskGroup() as group:
            task = group.spawn(client())
            await flowcoro.sleep(1)
            world.listener.close()
            await wait_all_tasks_parked()
            began = flowcoro.now()
            go_on.set()
            assert await task == 1001 and flowcoro.now() - began < 1


# ---- ASGI ------------------------------------------------------------------------------------------------------

async def asgi_echo(scope, receive, send):
    """What a framework's WebSocket endpoint does, without the framework."""
    assert scope["type"] == "websocket" and scope["scheme"] == "ws" and scope["path"] == "/ws"
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept", "subprotocol": "b" if "b" in scope["subprotocols"] else None,
                "headers": [(b"x-a", b"1")]})
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") == "close":
            await send({"type": "websocket.close", "code": 4001, "reason": "asked"})
            with pytest.raises(OSError):
                await send({"type": "websocket.send", "text": "late"})
        elif message.get("text") == "fail":
            raise ZeroDivisionError("mine")
        else:
            await send({"type": "websocket.send", **{key: message[key] for key in ("text", "bytes") if key in message}})
    heard.append((message["type"], message["code"], message.get("reason")))


heard = []


def hosting(application=asgi_echo, **options):
    app = HttpServer()
    app.mount("/", asgi_app(application, websocket=functools.partial(accept, **options)))
    return app


@pytest.mark.parametrize("end, code", [((1000, "bye"), 1000), ((4000, "ü"), 4000), (None, 1006)])
@simulated
async def test_an_asgi_application_speaks(end, code):
    heard.clear()
    async with serving(hosting(max_message=100)) as world, client_of(world, subprotocols=["a", "b"]) as ws:
        assert ws.subprotocol == "b" and ("X-A", "1") in [(name.title(), value) for name, value in ws.response_headers]
        for message in ("text", b"bytes", ""):
            await ws.send(message)
            assert await ws.receive() == message
        if end is None:
            ws._sock.close_nowait()
        else:
            await ws.close(*end)
        await flowcoro.sleep(1)
        assert heard == [("websocket.disconnect", code, end[1] if end else "")]


@simulated
async def test_an_asgi_application_may_wait_for_messages_before_it_accepts():
    async def application(scope, receive, send):
        async def messages():
            assert (await receive())["type"] == "websocket.connect"
            while (message := await receive())["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": message["text"]})

        async with flowcoro.TaskGroup() as group:
            group.spawn(messages())
            await flowcoro.sleep(1)
            await send({"type": "websocket.accept"})

    async with serving(hosting(application)) as world, client_of(world) as ws:
        await ws.send("x")
        assert await ws.receive() == "x"


@simulated
async def test_an_asgi_application_closes_and_fails(reports):
    async with serving(hosting()) as world:
        for said, code in (("close", 4001), ("fail", 1011)):
            async with client_of(world) as ws:
                await ws.send(said)
                with pytest.raises(ConnectionClosed) as caught:
                    await ws.receive()
                assert caught.value.code == code
    assert [str(error) for _, error in reports] == ["mine"]


@pytest.mark.parametrize("close", [{"code": 1005, "reason": "why"}, {"code": 999}, {"reason": "x" * 124}, {"reason": 5}])
@simulated
async def test_a_close_that_cannot_be_is_an_error_of_the_asgi_application_and_its_client_is_told(close, reports):
    async def application(scope, receive, send):
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", **close})

    async with serving(hosting(application)) as world, client_of(world) as ws:
        with pytest.raises(ConnectionClosed) as caught:
            await ws.receive()
        assert caught.value.code == 1011
    assert len(reports) == 1


@simulated
async def test_an_asgi_application_that_receives_before_it_accepts_waits():
    heard.clear()

    async def application(scope, receive, send):
        async def receive_all():
            while True:
                heard.append((await receive())["type"])
                if heard[-1] == "websocket.disconnect":
                    return

        async with flowcoro.TaskGroup() as group:
            group.spawn(receive_all())
            await flowcoro.sleep(1)                     # asks a database who that is
            assert heard == ["websocket.connect"]
            await send({"type": "websocket.accept"})

    statuses, app = [], hosting(application)

    @app.middleware
    async def look(request, call_next):
        response = await call_next(request)
        statuses.append(response.status)
        return response

    async with serving(app) as world:
        async with client_of(world) as ws:
            await ws.send("x")
        await flowcoro.sleep(1)
    assert heard == ["websocket.connect", "websocket.receive", "websocket.disconnect"]
    assert statuses == [204]                            # as of a handler of our own


@simulated
async def test_an_asgi_application_is_told_when_the_server_ends():
    heard.clear()
    async with serving(hosting()) as world, client_of(world) as ws:
        world.listener.close()
        with pytest.raises(ConnectionClosed):
            await ws.receive()
        await world.task
    assert heard == [("websocket.disconnect", 1001, "")]


@simulated
async def test_a_handshake_that_is_none_is_refused_whatever_the_application_says():
    failed = []

    async def application(scope, receive, send):
        try:
            await send({"type": "websocket.accept"})
        except OSError as error:
            failed.append(error)
            assert (await receive())["type"] == "websocket.connect"
            assert (await receive())["type"] == "websocket.disconnect"

    async with serving(hosting(application)) as world:
        [answer] = await world.talk(asking(Sec_WebSocket_Version="12"))
        assert answer.status == 426 and answer.headers["sec-websocket-version"] == "13" and failed


@simulated
async def test_a_subprotocol_that_was_not_offered_cannot_be_taken():
    async def application(scope, receive, send):
        with pytest.raises(ValueError, match="none of those"):
            await send({"type": "websocket.accept", "subprotocol": "x"})
        await send({"type": "websocket.close"})

    async with serving(hosting(application)) as world:
        [answer] = await world.talk(asking())
        assert answer.status == 403


# ---- on the system's sockets -----------------------------------------------------------------------------------

def test_over_tls_with_real_sockets(certificates):  # noqa: F811
    async def main():
        app = echoing()
        async with flowcoro.TaskGroup() as group:
            server = await app.listen("127.0.0.1", 0, tls=server_tls(*certificates.good, alpn=["http/1.1"]))
            async with server:
                group.spawn(server.serve())
                url = f"wss://localhost:{server.local[1]}/ws"
                async with connect(url, tls=client_tls(ca=certificates.ca)) as ws:
                    for message in ("hello", b"x" * 300_000, "ü" * 10_000):
                        await ws.send(message)
                        assert await ws.receive() == message
                    assert await ws.ping() >= 0
                    broadcast([ws], "masked")
                    assert await ws.receive() == "masked"
                assert ws.close_code == 1000

    run(main)


@simulated
async def test_over_tls_who_does_not_read_is_waited_for_and_gets_all(certificates):  # noqa: F811
    one, other = memory_socket_pair(Socket, capacity=20_000)
    async with one, other:
        async with flowcoro.TaskGroup() as group:
            group.spawn(one.start_tls(server_tls(*certificates.good), server_side=True))
            await other.start_tls(client_tls(ca=certificates.ca), server_name="localhost")
        server, client = WebSocket(one, "server", ping_interval=None), WebSocket(other, "client")
        sent = 0

        async def send():
            nonlocal sent
            for number in range(50):
                await server.send(f"{number:01000}")
                broadcast([server], f"{number}", max_backlog=10**9)
                sent += 1
            await server.send("z" * 300_000)

        async with flowcoro.TaskGroup() as group:
            group.spawn(send())
            await wait_all_tasks_parked()
            assert sent < 40
            for number in range(50):
                assert int(await client.receive()) == number and int(await client.receive()) == number
            assert await client.receive() == "z" * 300_000
            group.spawn(server.close())
            with pytest.raises(ConnectionClosed):
                await client.receive()


@simulated
async def test_over_tls_who_sends_waits_for_what_is_encrypted_too(certificates):  # noqa: F811
    one, other = memory_socket_pair(Socket, capacity=20_000)
    async with one, other:
        async with flowcoro.TaskGroup() as group:
            group.spawn(one.start_tls(server_tls(*certificates.good), server_side=True))
            await other.start_tls(client_tls(ca=certificates.ca), server_name="localhost")
        server, sent = WebSocket(one, "server", ping_interval=None), 0
        with flowcoro.move_on_after(1):
            while True:
                await server.send("x" * 1000)
                assert one.unsent == 0
                sent += 1
        assert 10 < sent < 20 and one.unsent > 0 and server.statistics()["bytes_unsent"] > 0


@pytest.mark.parametrize("workers", [1, 3])
def test_many_clients_with_real_sockets(workers):
    async def main():
        app, members = HttpServer(websocket=accept), set()

        @app.websocket("/ws")
        async def room(ws):
            members.add(ws)
            try:
                async for message in ws:
                    broadcast(list(members), message) if message == "all" else await ws.send(message)
            finally:
                members.discard(ws)

        async def client(url, number):
            async with connect(url) as ws:
                for count in range(20):
                    await ws.send(f"{number} {count}")
                    while (message := await ws.receive()) == "all":
                        pass
                    assert message == f"{number} {count}"
                await ws.send("all")
                while await ws.receive() != "all":
                    pass

        async with flowcoro.TaskGroup() as group:
            async with await app.listen("127.0.0.1", 0) as server:
                group.spawn(server.serve())
                async with flowcoro.TaskGroup() as clients:
                    for number in range(20):
                        clients.spawn(client(f"ws://127.0.0.1:{server.local[1]}/ws", number))

    run(main, workers=workers)


def test_the_test_client_has_a_socket_for_it():
    async def main():
        async with echoing().test_client() as client:
            async with connect("ws://testserver/ws", socket=await client.socket()) as ws:
                await ws.send("no network")
                assert await ws.receive() == "no network"

    run(main)


def test_accept_that_is_cancelled_leaves_nothing():
    async def main():
        async def once():
            one, other = socket.socketpair()
            with one:
                sock = Socket(other)

                class Asked(Request):
                    async def upgrade(self, protocol, headers):
                        try:
                            await sock.write(b"HTTP/1.1 101 x\r\n\r\n")
                        except BaseException:
                            sock.close_nowait()
                            raise
                        return sock

                try:
                    ws = await accept(Asked("GET", "/", list(ASKING.items())))
                    ws._end()
                finally:
                    sock.close_nowait()

        assert await at_each_point(once) >= 1

    run(main)


@simulated
async def test_a_simulated_partition_is_found_by_the_keep_alive():
    network = SimulatedNetwork()
    async with flowcoro.TaskGroup() as group:
        app, ended = HttpServer(websocket=accept), []

        @app.websocket("/ws")
        async def handler(ws):
            try:
                async for _ in ws:
                    pass
            finally:
                ended.append((ws.close_code, flowcoro.now()))

        with network.host("server"):
            listener = await app.listen("0.0.0.0", 80)
        async with listener:
            group.spawn(listener.serve())
            with network.host("client"):
                ws = await connect("ws://server/ws", ping_interval=None)
            network.partition("server", "client")
            began = flowcoro.now()
            while not ended:
                await flowcoro.sleep(1)
            assert ended[0][0] == 1006 and ended[0][1] - began <= 42
            assert isinstance(ws, WebSocket)
            ws._end()
