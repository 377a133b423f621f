"""connect(): the client's handshake, redirects, proxies, TLS, time limits, cancellation, and the iterator that connects again."""

import base64
import contextlib
import functools
import os
import subprocess
import sys

import pytest

import flowcoro
import flowcoro_websocket
from flowcoro_net import BrokenError, ResolveError, Socket, TcpServer, TlsError, client_tls, server_tls
from flowcoro_testing import SimulatedNetwork, memory_socket_pair, run_in_kernel
from flowcoro_websocket import ConnectionClosed, Deflate, HandshakeError, WebSocketConnection, accept_key, connect
from test_net import nothing_is_left_behind, run  # noqa: F401  (a fixture)
from test_net_cancel import at_each_point
from test_net_tls import certificates  # noqa: F401  (a fixture)

simulated = functools.partial(run_in_kernel, timeout=100_000)       # seconds of the virtual clock: a test that hangs fails


# ---- a server that is written out ------------------------------------------------------------------------------

class Script:
    """What listens on hosts of a simulated network: each connection is given to handler(host, head, sock)."""

    def __init__(self, network):
        self.network, self.heads = network, []

    async def serve(self, group, host, handler):
        with self.network.host(host):
            server = await TcpServer.listen("0.0.0.0", 80)

        async def handle(sock):
            head = await sock.read_until(b"\r\n\r\n")
            self.heads.append((host, head.decode()))
            await handler(sock, head.decode())

        group.spawn(server.serve(handle, drain_timeout=0.1))
        return server


@contextlib.asynccontextmanager
async def scripted(**handlers):
    """Hosts with their handlers; what is in the block runs on another one."""
    network = SimulatedNetwork()
    script = Script(network)
    async with flowcoro.TaskGroup() as group:
        servers = [await script.serve(group, name, handler) for name, handler in handlers.items()]
        with network.host("here"):
            yield script
        for server in servers:
            server.close()
        group.cancel()
    assert network.open_sockets() == [], "a socket is left"


def field(head, name):
    return next(line.partition(": ")[2] for line in head.split("\r\n") if line.lower().startswith(name.lower() + ":"))


def switching(head, *lines):
    return "\r\n".join(["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade",
                        f"Sec-WebSocket-Accept: {accept_key(field(head, 'Sec-WebSocket-Key'))}", *lines, "", ""]).encode()


async def echo(sock, head):
    """A server with no more to it than the codec."""
    codec = WebSocketConnection("server")
    await sock.write(switching(head))
    while data := await sock.read():
        codec.receive_data(data)
        while (event := codec.next_event()) not in (flowcoro_websocket.NEED_DATA, flowcoro_websocket.CLOSED):
            if isinstance(event, flowcoro_websocket.Close):
                await sock.write(codec.send_close(event.code))
                return
            ping = isinstance(event, flowcoro_websocket.Ping)
            await sock.write(codec.send_pong(event.payload) if ping else codec.send_message(event))


def answering(*answers):
    """A handler that gives each connection the next of these answers."""
    left = list(answers)

    async def handler(sock, head):
        answer = left.pop(0)
        await (echo(sock, head) if answer is echo else sock.write(answer(head) if callable(answer) else answer))
    return handler


def redirect(status, location):
    return f"HTTP/1.1 {status} Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


# ---- the handshake ---------------------------------------------------------------------------------------------

@simulated
async def test_what_is_asked_for():
    async with scripted(server=echo) as script:
        async with connect("ws://user:p%40ss@server/path?q=ü", headers={"X-A": "1"}, subprotocols=["a", "b"], origin="http://o",
                           deflate=Deflate()) as ws:
            await ws.send("x")
            assert await ws.receive() == "x" and ws.subprotocol is None
        [(_, head)] = script.heads
        assert head.startswith("GET /path?q=%C3%BC HTTP/1.1\r\nHost: server\r\n")
        assert field(head, "X-A") == "1" and field(head, "Origin") == "http://o"
        assert field(head, "Sec-WebSocket-Protocol") == "a, b" and field(head, "Sec-WebSocket-Version") == "13"
        assert field(head, "Sec-WebSocket-Extensions").startswith("permessage-deflate")
        assert field(head, "Authorization") == "Basic " + base64.b64encode(b"user:p@ss").decode()
        assert len(base64.b64decode(field(head, "Sec-WebSocket-Key"))) == 16
        async with connect('ws://server/a"b'):
            assert script.heads[1][1].startswith("GET /a%22b HTTP/1.1\r\n")


@simulated
async def test_messages_may_come_with_the_answer():
    async with scripted(server=answering(lambda head: switching(head) + b"\x81\x05hello")):
        ws = await connect("ws://server/")
        assert await ws.receive() == "hello"
        with pytest.raises(ConnectionClosed):
            await ws.receive()


@simulated
async def test_informational_answers_are_passed_over_and_not_for_ever():
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    async with scripted(server=answering(lambda head: early * 3 + switching(head), early * 9)):
        await (await connect("ws://server/")).close(timeout=0)
        with pytest.raises(HandshakeError, match="informational"):
            await connect("ws://server/")


@pytest.mark.parametrize("answer, status, said", [
    (lambda head: switching(head).replace(b"Accept: ", b"Accept: x"), 101, "Sec-WebSocket-Accept"),
    (lambda head: switching(head).replace(b"Upgrade: websocket\r\n", b""), 101, "Upgrade"),
    (lambda head: switching(head, "Sec-WebSocket-Protocol: never"), 101, "(?i)subprotocol|Sec-WebSocket-Protocol"),
    (lambda head: switching(head, "Sec-WebSocket-Extensions: x-what"), 101, "(?i)extension"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", 200, "the answer is 200 OK"),
    (b"HTTP/1.1 403 No\r\n\r\nnot for you", 403, "403"), (b"SSH-2.0-x\r\n", 502, "no HTTP"),
    (b"HTTP/1.1 500 X\r\n" + b"X: y\r\n" * 200 + b"\r\n", 502, "lines"), (b"HTTP/1.1 302 Found\r\n\r\n", 302, "302")])
@simulated
async def test_an_answer_that_is_no_websockets(answer, status, said):
    async with scripted(server=answering(answer)):
        with pytest.raises(HandshakeError, match=said) as caught:
            await connect("ws://server/")
        assert caught.value.status == status
        if status in (200, 403):
            assert caught.value.body in (b"hello", b"not for you")


@simulated
async def test_a_server_that_ends_in_the_middle():
    async with scripted(server=answering(b"", b"HTTP/1.1 101 Swi")):
        for said in (r"answer to the handshake\. Does it want TLS \(wss\)\?", "answer to the handshake$"):
            with pytest.raises(BrokenError, match=said):
                await connect("ws://server/")


@simulated
async def test_an_answer_that_drips_is_cut_after_open_timeout():
    async def drip(sock, head):
        with contextlib.suppress(BrokenError):
            for byte in switching(head):
                await sock.write(bytes([byte]))
                await flowcoro.sleep(1)

    async with scripted(server=drip, silent=_silent):
        for host, seconds in (("server", 10), ("silent", 3)):
            began = flowcoro.now()
            with pytest.raises(TimeoutError, match=rf"open_timeout={seconds} s .* waiting for the answer of {host}"):
                await connect(f"ws://{host}/", open_timeout=seconds)
            assert flowcoro.now() - began == seconds


async def _silent(sock, head):
    await sock.read()


@pytest.mark.parametrize("url, said", [
    ("http://server/", "begins with ws:// or wss://"), ("ws://", "no host"), ("ws://server/#x", "never sent"),
    ("ws://s:99999/", "(?i)port"),
    ("ws://user:secret@ser ver/", "blanks"), ("ws://server/\r\nX: y", "control"), ("server", "begins with")])
def test_a_url_that_is_none_is_refused_and_its_password_not_shown(url, said):
    with pytest.raises(ValueError, match=said) as caught:
        connect(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("options, error", [
    ({"open_timeout": 0}, ValueError), ({"proxy": 7}, TypeError), ({"proxy": "socks5://x"}, ValueError),
    ({"tls": client_tls()}, ValueError), ({"deflate": 1}, TypeError), ({"subprotocols": ["a b"]}, ValueError),
    ({"ping_timeout": -1}, ValueError), ({"redirects": -1}, ValueError), ({"max_message": -1}, ValueError),
    ({"headers": {"Upgrade": "x"}}, ValueError), ({"headers": [("Sec-WebSocket-Key", "x")]}, ValueError)])
def test_options_that_make_no_sense_are_refused_at_once(options, error):
    with pytest.raises(error):
        connect("ws://server/", **options)
    with pytest.raises(TypeError, match="give a str"):
        connect(b"ws://server/")


@pytest.mark.parametrize("headers", [{"X": "a\r\nb"}, {"a b": "c"}])
def test_headers_that_cannot_be_are_refused(headers):
    with pytest.raises(ValueError):
        connect("ws://server/", headers=headers)


@pytest.mark.parametrize("headers", [{"X": 5}, {b"X": "a"}])
def test_headers_that_are_no_text_are_named(headers):
    with pytest.raises(TypeError, match="name and value are str"):
        connect("ws://server/", headers=headers)


@simulated
async def test_an_origin_that_is_no_text_is_named():
    async with scripted(server=echo):
        with pytest.raises(TypeError, match="name and value are str"):
            await connect("ws://server/", origin=5)


@simulated
async def test_a_host_that_is_not_there():
    async with scripted(server=echo):
        with pytest.raises(ResolveError):
            await connect("ws://nowhere/")
        with pytest.raises(BrokenError):
            await connect("ws://server:81/")


# ---- redirects -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@simulated
async def test_redirects_are_followed_and_secrets_stay_with_their_origin(status):
    secrets = {"Authorization": "Basic x", "Cookie": "a=b", "X-Own": "1"}
    async with scripted(one=answering(redirect(status, "/second"), redirect(status, "ws://two/?x")), two=echo) as script:
        async with connect("ws://one/first", headers=secrets) as ws:
            await ws.send("x")
            assert await ws.receive() == "x"
        asked = [(host, head.split(" ")[1]) for host, head in script.heads]
        assert asked == [("one", "/first"), ("one", "/second"), ("two", "/?x")]
        assert ["Cookie: a=b" in head and "Authorization" in head for _, head in script.heads] == [True, True, False]
        assert all("X-Own: 1" in head for _, head in script.heads)


@simulated
async def test_a_password_of_the_url_is_for_its_origin_too():
    answers = answering(redirect(302, "/zweite-Tür"), redirect(302, "ws://two/"))
    async with scripted(one=answers, two=echo) as script:
        async with connect("ws://user:secret@one/"):
            pass
        assert script.heads[1][1].startswith("GET /zweite-T%C3%BCr ")
        assert ["\r\nAuthorization: Basic " in head for _, head in script.heads] == [True, True, False]


@simulated
async def test_redirects_have_an_end():
    async with scripted(server=answering(*[redirect(302, "/again")] * 100)) as script:
        for redirects, asked in ((None, 11), (0, 1), (3, 4)):
            script.heads.clear()
            with pytest.raises(HandshakeError) as caught:
                await connect("ws://server/", **{} if redirects is None else {"redirects": redirects})
            assert caught.value.status == 302 and len(script.heads) == asked
            assert redirects == 0 or "redirects in a row" in str(caught.value)


@pytest.mark.parametrize("location", ["ftp://server/", "ws://", "http://server:0x/", "ws://a b/"])
@simulated
async def test_a_redirect_that_leads_nowhere(location):
    async with scripted(server=answering(redirect(302, location))):
        with pytest.raises(HandshakeError, match="leads nowhere") as caught:
            await connect("ws://server/")
        assert caught.value.status == 302               # which is final: the iterator does not try again


def test_from_wss_to_ws_no_redirect_leads(certificates):  # noqa: F811
    async def main():
        for location in ("ws://localhost/", "http://localhost/"):
            async def handler(sock, location=location):
                await sock.read_until(b"\r\n\r\n")
                await sock.write(redirect(302, location))

            async with tls_server(certificates, handler) as port:
                with pytest.raises(HandshakeError, match="not encrypted"):
                    await connect(f"wss://localhost:{port}/", tls=client_tls(ca=certificates.ca))

    run(main)


@contextlib.asynccontextmanager
async def tls_server(certificates, handler, pair=None):  # noqa: F811
    context = server_tls(*(pair or certificates.good))
    async with await TcpServer.listen("127.0.0.1", 0, tls=context) as server, flowcoro.TaskGroup() as group:
        group.spawn(server.serve(handler))
        try:
            yield server.local[1]
        finally:
            server.close()


def test_a_certificate_that_is_not_trusted(certificates):  # noqa: F811
    async def main():
        async def handler(sock):
            await sock.read()

        async with tls_server(certificates, handler) as port:
            with pytest.raises(TlsError):
                await connect(f"wss://localhost:{port}/")
            with pytest.raises(TlsError):
                async for _ in connect(f"wss://localhost:{port}/"):         # which no second attempt would change
                    pass

    run(main)


def test_a_server_that_ends_within_the_handshake_of_tls_is_asked_again():
    async def main():
        errors = []

        async def handler(sock):
            await sock.read()                           # and ends the connection, as one does that is stopped

        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            serving = group.spawn(server.serve(handler))

            def told(error, seconds):
                errors.append(error)
                serving.cancel()
                raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                async for _ in connect(f"wss://127.0.0.1:{server.local[1]}/", on_retry=told):
                    pass
        assert type(errors[0]) is TlsError

    run(main)


# ---- proxies ---------------------------------------------------------------------------------------------------

def tunnelling(network, refuse=b""):
    """A proxy that connects to where it is asked to."""
    async def proxy(sock, head):
        if refuse:
            return await sock.write(refuse)
        host, port = head.split(" ")[1].rsplit(":", 1)
        with network().host("proxy"):
            there = await Socket.connect(host, int(port))
        async with there, flowcoro.TaskGroup() as group:
            await sock.write(b"HTTP/1.1 200 Connected\r\n\r\n")

            async def pump(one, other):
                with contextlib.suppress(BrokenError, flowcoro.ClosedError):
                    while data := await one.read():
                        await other.write(data)
                    await other.shutdown_write()

            group.spawn(pump(sock, there))
            await pump(there, sock)
    return proxy


@pytest.mark.parametrize("proxy", ["http://u:p@proxy", "proxy"])
@simulated
async def test_a_proxy_is_asked_to_connect(proxy):
    networks = []
    async with scripted(server=echo, proxy=tunnelling(lambda: networks[0])) as script:
        networks.append(script.network)
        async with connect("ws://server/x", proxy=proxy) as ws:
            await ws.send("x")
            assert await ws.receive() == "x"
        (_, asked), (_, head) = script.heads
        assert asked.startswith("CONNECT server:80 HTTP/1.1\r\nHost: server:80\r\n") and head.startswith("GET /x HTTP/1.1")
        assert ("Proxy-Authorization: Basic dTpw" in asked) == ("@" in proxy) and "Proxy-Auth" not in head


@pytest.mark.parametrize("answer, status", [
    (b"HTTP/1.1 407 Who\r\nProxy-Authenticate: Basic\r\n\r\n", 407), (b"HTTP/1.1 200 OK\r\n\r\nearly", 200),
    (b"garbage\r\n\r\n", 502)])
@simulated
async def test_a_proxy_that_does_not(answer, status):
    async with scripted(server=echo, proxy=tunnelling(None, answer)):
        with pytest.raises(HandshakeError) as caught:
            await connect("ws://server/", proxy="http://proxy")
        assert caught.value.status == status and "the proxy proxy" in str(caught.value)


@pytest.mark.parametrize("environ, by_proxy", [
    ({"http_proxy": "http://proxy"}, True), ({"ws_proxy": "proxy:80"}, True), ({"all_proxy": "http://proxy"}, True),
    ({"https_proxy": "http://proxy"}, False), ({"http_proxy": "http://proxy", "no_proxy": "other,server"}, False), ({}, False)])
@simulated
async def test_the_environment_is_asked_for_a_proxy_when_told_so(environ, by_proxy, monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    networks = []
    async with scripted(server=echo, proxy=tunnelling(lambda: networks[0])) as script:
        networks.append(script.network)
        for proxy, expected in ((True, by_proxy), (None, False)):
            script.heads.clear()
            async with connect("ws://server/", proxy=proxy):
                assert (script.heads[0][0] == "proxy") is expected


def test_tls_goes_through_a_proxy(certificates):  # noqa: F811
    async def main():
        asked = []

        async def proxy(sock):
            head = (await sock.read_until(b"\r\n\r\n")).decode()
            asked.append(head)
            async with await Socket.connect("127.0.0.1", int(head.split(" ")[1].rsplit(":", 1)[1])) as there:
                await sock.write(b"HTTP/1.1 200 Connected\r\n\r\n")
                async with flowcoro.TaskGroup() as group:
                    async def pump(one, other):
                        with contextlib.suppress(BrokenError, flowcoro.ClosedError):
                            while data := await one.read():
                                await other.write(data)
                            await other.shutdown_write()

                    group.spawn(pump(sock, there))
                    await pump(there, sock)

        async def handler(sock):
            await echo(sock, (await sock.read_until(b"\r\n\r\n")).decode())

        async with tls_server(certificates, handler) as port, await TcpServer.listen("127.0.0.1", 0) as server:
            async with flowcoro.TaskGroup() as group:
                group.spawn(server.serve(proxy))
                async with connect(f"wss://localhost:{port}/", tls=client_tls(ca=certificates.ca),
                                   proxy=f"http://127.0.0.1:{server.local[1]}") as ws:
                    await ws.send("hidden")
                    assert await ws.receive() == "hidden"
                server.close()
            assert asked[0].startswith(f"CONNECT localhost:{port} ")

    run(main)


@simulated
async def test_tls_in_tls_is_refused():
    with pytest.raises(ValueError, match="TLS to a proxy"):
        await connect("wss://server/", proxy="https://proxy")


# ---- ways to connect -------------------------------------------------------------------------------------------

@simulated
async def test_a_socket_that_is_connected_already():
    one, other = memory_socket_pair(Socket)
    async with other, flowcoro.TaskGroup() as group:
        async def serve():
            await echo(other, (await other.read_until(b"\r\n\r\n")).decode())

        group.spawn(serve())
        async with connect("ws://whatever/", socket=one) as ws:
            await ws.send("x")
            assert await ws.receive() == "x"


@simulated
async def test_a_socket_is_for_one_connection():
    for answer in (redirect(302, "/other"), b"HTTP/1.1 503 Later\r\nContent-Length: 0\r\n\r\n"):
        one, other = memory_socket_pair(Socket)
        async with other:
            await other.write(answer)
            with pytest.raises(ValueError, match="socket= is for one connection"):
                async for _ in connect("ws://nowhere/", socket=one):
                    pass


def test_a_connect_that_is_cancelled_leaves_nothing():
    async def main():
        async def handler(sock):
            if head := await sock.read_until(b"\r\n\r\n"):
                await echo(sock, head.decode())

        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(handler))
            await flowcoro.sleep(0)

            async def once():
                ws = await connect(f"ws://127.0.0.1:{server.local[1]}/")
                ws._end()

            assert await at_each_point(once) > 3
            server.close()

    run(main)


# ---- again and again -------------------------------------------------------------------------------------------

@simulated
async def test_the_iterator_connects_again_and_waits_longer_each_time():
    waits = []
    async with scripted(server=answering(*[b"HTTP/1.1 503 Later\r\nContent-Length: 0\r\n\r\n"] * 5, b"", echo)) as script:
        async for ws in connect("ws://server/", on_retry=lambda error, seconds: waits.append((type(error), seconds))):
            await ws.send("x")
            assert await ws.receive() == "x"
            break
        await flowcoro.sleep(1)
        assert len(script.heads) == 7 and ws.closed and ws.close_code == 1000
        assert [kind for kind, _ in waits] == [HandshakeError] * 5 + [BrokenError]
        for number, (_, seconds) in enumerate(waits):
            most = min(flowcoro_websocket.MAX_BACKOFF, flowcoro_websocket.BACKOFF * 2**number)
            assert most / 2 <= seconds <= most
        assert any(seconds != flowcoro_websocket.BACKOFF * 2**number for number, (_, seconds) in enumerate(waits))


@simulated
async def test_the_wait_has_a_most_and_heeds_what_the_server_asks_for():
    waits = []
    answers = [b"HTTP/1.1 429 Slow\r\nRetry-After: 100\r\n\r\n"] + [b"HTTP/1.1 502 X\r\n\r\n"] * 15
    async with scripted(server=answering(*answers, echo)):
        async for ws in connect("ws://server/", on_retry=lambda error, seconds: waits.append(seconds)):
            break
        assert waits[0] == 100 and 30 <= waits[-1] <= flowcoro_websocket.MAX_BACKOFF
        await flowcoro.sleep(1)
        assert ws.closed


@simulated
async def test_a_connection_that_lasted_is_followed_at_once_and_one_that_did_not_later():
    waits, opened = [], []
    async with scripted(server=answering(echo, echo, echo, echo)):
        async for ws in connect("ws://server/", on_retry=lambda error, seconds: waits.append((error, seconds))):
            opened.append(flowcoro.now())
            if len(opened) == 4:
                break
            if len(opened) == 1:
                await flowcoro.sleep(flowcoro_websocket.LASTING)
            await ws.close(timeout=0)
            assert ws.closed
        assert [error for error, _ in waits] == [None, None] and waits[0][1] <= 0.5 < waits[1][1] * 2 <= 2
        await flowcoro.sleep(1)


@simulated
async def test_the_websocket_of_a_block_is_closed_when_the_next_one_begins():
    async with scripted(server=echo):
        before = None
        async for ws in connect("ws://server/"):
            assert before is None or before.closed
            if before is not None:
                break
            before = ws
        await flowcoro.sleep(1)


@pytest.mark.parametrize("status", [401, 404])
@simulated
async def test_what_will_not_change_is_raised(status):
    async with scripted(server=answering(f"HTTP/1.1 {status} No\r\n\r\n".encode())):
        with pytest.raises(HandshakeError):
            async for _ in connect("ws://server/"):
                pass


@pytest.mark.parametrize("answer, status", [(b"SSH-2.0-x\r\n\r\n", 502), (b"\x15\x03\x01\0\x02\x02\n", 502),
                                            (b"HTTP/1.1 302 Found\r\nLocation: ftp://server/\r\n\r\n", 302)])
@simulated
async def test_what_is_no_answer_is_raised_and_not_asked_for_ever(answer, status):
    async with scripted(server=answering(answer)):
        with pytest.raises(HandshakeError) as caught:
            async for _ in connect("ws://server/"):
                pass
        assert caught.value.status == status


@simulated
async def test_a_network_that_comes_back():
    async with scripted(server=echo) as script:
        got = []

        async def client():
            async for ws in connect("ws://server/", ping_interval=5, ping_timeout=5):
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        await ws.send("tick")
                        await ws.receive()
                        got.append(flowcoro.now())
                        await flowcoro.sleep(1)

        async with flowcoro.TaskGroup() as group:
            group.spawn(client())
            await flowcoro.sleep(30)
            script.network.partition("server", "here")
            await flowcoro.sleep(300)
            before = len(got)
            script.network.heal()
            await flowcoro.sleep(100)
            assert len(got) > before + 10
            group.cancel()
        await flowcoro.sleep(1)             # the iterator was left, and what it had is being closed


# ---- another program -------------------------------------------------------------------------------------------

def test_a_url_library_is_imported_only_when_the_environment_is_asked():
    program = "import flowcoro_websocket, sys; sys.exit('urllib.request' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=os.path.dirname(flowcoro_websocket.__file__)).returncode == 0
