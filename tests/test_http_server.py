"""The HTTP server: connections, answers, errors, deadlines, ends. Mostly on a simulated network, whose time costs nothing."""

import contextlib
import functools
import gc
import io
import os
import pathlib
import socket
import tracemalloc
import types

import pytest

import flowcoro
import flowcoro_http
from flowcoro_http import (Data, EndOfMessage, HttpConnection, HttpError, HttpServer, InformationalResponse, NEED_DATA, PAUSED,
                           ProtocolError, RequestHead, Response, ResponseHead)
from flowcoro_net import BrokenError, Socket
from flowcoro_testing import SimulatedNetwork, run_in_kernel

simulated = functools.partial(run_in_kernel, timeout=100_000)       # seconds of the virtual clock: a test that hangs fails

HOST = b"Host: server\r\n"


# ---- a server in a world of its own, and strict clients --------------------------------------------------------

class World:
    """An application that is served on the host "server" of a simulated network."""

    def __init__(self, app, network, listener, group):
        self.app, self.network, self.listener, self.group, self.clients = app, network, listener, group, 0

    async def connect(self):
        """A Socket of another client."""
        self.clients += 1
        with self.network.host(f"client{self.clients}"):
            return await Socket.connect("server", 80)

    async def talk(self, data, *methods):
        """Send all of it and end; the answers to requests of these methods, which are all that comes. Each (status, headers, ...)"""
        async with await self.connect() as sock:
            await sock.write(data)
            await sock.shutdown_write()
            return answers(await everything(sock), *(methods or ["GET"]))

    async def get(self, path="/", headers=b"", method="GET"):
        """The answer to one request."""
        [answer] = await self.talk(b"%s %s HTTP/1.1\r\n%s%s\r\n" % (method.encode(), path.encode(), HOST, headers), method)
        return answer

    async def post(self, path, body, headers=b""):
        [answer] = await self.talk(b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n%s\r\n%s"
                                   % (path.encode(), HOST, len(body), headers, body), "POST")
        return answer


@contextlib.asynccontextmanager
async def serving(app, **options):
    network = SimulatedNetwork()
    async with flowcoro.TaskGroup() as group:
        with network.host("server"):
            listener = await app.listen("0.0.0.0", 80)
        async with listener:
            task = group.spawn(listener.serve(**options))
            world = World(app, network, listener, group)
            world.task = task
            try:
                yield world
            finally:
                listener.close()
    assert network.open_sockets() == [], "a socket is left"


class Answer(types.SimpleNamespace):
    """status, reason, headers, content, trailers, and `before`: statuses of informational responses."""


def answers(data, *methods):
    """The answers in `data`, by the strict codec: one to each method, and nothing after them."""
    found = []
    for number, method in enumerate(methods):
        codec = HttpConnection("client")
        codec.send_message(RequestHead(method, "/" if method != "CONNECT" else "a:1", [("Host", "server")]))
        if data:
            codec.receive_data(data)
        codec.receive_end()
        answer = Answer(before=[], content=b"", trailers=None)
        while type(event := codec.next_event()) is not EndOfMessage:
            if type(event) is InformationalResponse:
                answer.before.append(event.status)
            elif type(event) is ResponseHead:
                answer.status, answer.reason, answer.headers, answer.version = (
                    event.status, event.reason, event.headers, event.version)
            else:
                assert type(event) is Data, event
                answer.content += event.data
        answer.trailers = event.trailers
        answer.keep_alive = codec.keep_alive
        data = codec.trailing_data
        if not codec.keep_alive:
            answer.rest = data
            assert number == len(methods) - 1, f"the connection ends after {number + 1} answers"
            data = b""
        found.append(answer)
    assert data == b"", f"{data!r} after the last answer"
    return found


async def everything(sock):
    pieces = []
    while data := await sock.read():
        pieces.append(data)
    return b"".join(pieces)


async def one_answer(sock, method="GET", codec=None):
    """The next answer on a connection that goes on."""
    codec = codec or HttpConnection("client")
    codec.send_message(RequestHead(method, "/", [("Host", "server")]))
    answer = Answer(before=[], content=b"")
    while True:
        event = codec.next_event()
        if event is NEED_DATA:
            data = await sock.read()
            codec.receive_data(data) if data else codec.receive_end()
        elif type(event) is InformationalResponse:
            answer.before.append(event.status)
        elif type(event) is ResponseHead:
            answer.status, answer.headers = event.status, event.headers
        elif type(event) is Data:
            answer.content += event.data
        else:
            assert type(event) is EndOfMessage
            answer.keep_alive = codec.keep_alive
            if codec.reusable:
                codec.start_next_cycle()
            return answer


async def until(condition):
    while not condition():
        await flowcoro.sleep(0.01)


def plain_app(**options):
    app = HttpServer(**options)

    @app.get("/")
    async def hello(request):
        return "hello"

    @app.route("/echo", methods=["POST", "PUT"])
    async def echo(request):
        return await request.body()

    @app.post("/ignore")
    async def ignore(request):
        return "ignored"

    return app


# ---- one after the other ---------------------------------------------------------------------------------------

@simulated
async def test_requests_on_one_connection_are_answered_one_after_the_other():
    async with serving(plain_app()) as world, await world.connect() as sock:
        for number in range(5):
            await sock.write(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n%d" % number)
            answer = await one_answer(sock, "POST")
            assert (answer.status, answer.content) == (200, b"%d" % number) and answer.keep_alive
            assert "date" in answer.headers and answer.headers["content-length"] == "1"


@simulated
async def test_pipelined_requests_are_answered_in_their_order_also_behind_bodies_that_nobody_read():
    request = b"".join([b"POST /ignore HTTP/1.1\r\nHost: a\r\nContent-Length: 31\r\n\r\nGET /evil HTTP/1.1\r\nHost: a\r\n\r\n",
                        b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n0\r\n\r\n",
                        b"POST /ignore HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\ntwo\r\n0\r\nX: y\r\n\r\n",
                        b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"])
    async with serving(plain_app()) as world:
        for size in 1, 7, len(request):
            async with await world.connect() as sock:
                for at in range(0, len(request), size):
                    await sock.write(request[at:at + size])
                await sock.shutdown_write()
                found = answers(await everything(sock), "POST", "POST", "POST", "HEAD", "GET")
            assert [answer.content for answer in found] == [b"ignored", b"one", b"ignored", b"", b"hello"]
            assert found[3].headers["content-length"] == "5"


@simulated
async def test_what_has_come_again_and_again_is_answered_as_at_first():
    """A request that is known by its bytes, among others that are like it."""
    app = HttpServer()

    @app.get("/{name}")
    async def show(request, name):
        before = list(request.headers)
        request.headers.add("X-Mine", "of this request")
        return f"{name} {request.query_string} {len(before)} {request.headers['host']} {request.trailers}"

    async with serving(app) as world, await world.connect() as sock:
        codec = HttpConnection("client")
        for _ in range(6):
            for name in "a", "b":
                await sock.write(b"GET /%s?q HTTP/1.1\r\nHost: h%s\r\n\r\n" % (name.encode(), name.encode()))
                assert (await one_answer(sock, "GET", codec)).content.decode() == f"{name} q 1 h{name} None"


@simulated
async def test_a_body_that_nobody_read_and_that_is_large_ends_the_connection_with_the_answer_arriving():
    async with serving(plain_app()) as world:
        answer = await world.post("/ignore", b"x" * (flowcoro_http.MAX_UNREAD + 100_000))
        assert answer.content == b"ignored" and not answer.keep_alive
        assert answer.headers["connection"] == "close"
        # in chunks nobody knows before: the connection ends all the same, and the answer is there
        chunk = b"%x\r\n%s\r\n" % (100_000, b"x" * 100_000)
        async with await world.connect() as sock:
            await sock.write(b"POST /ignore HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 10 + b"0\r\n\r\n"
                             + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            [answer] = answers(await everything(sock), "POST")
            assert answer.content == b"ignored"


@simulated
async def test_a_client_of_http_1_0_is_answered_and_left_unless_it_wants_to_stay():
    app = plain_app()

    @app.get("/stream")
    async def stream(request):
        yield "some"
        yield "more"

    async with serving(app) as world:
        [answer] = await world.talk(b"GET / HTTP/1.0\r\n\r\n")
        assert answer.content == b"hello" and not answer.keep_alive and answer.headers["connection"] == "close"
        one, other = await world.talk(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2, "GET", "GET")
        assert one.headers["connection"] == "keep-alive" and other.content == b"hello"
        [answer] = await world.talk(b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert answer.content == b"somemore" and "transfer-encoding" not in answer.headers


@simulated
async def test_connection_close_is_heeded():
    async with serving(plain_app()) as world, await world.connect() as sock:
        await sock.write(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n")
        [answer] = answers(await everything(sock), "GET")
        assert answer.headers["connection"] == "close"


@simulated
async def test_a_handler_may_end_the_connection():
    app = HttpServer()

    @app.get("/")
    async def last(request):
        return Response(200, "the last", [("Connection", "close")])

    async with serving(app) as world, await world.connect() as sock:
        await sock.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        [answer] = answers(await everything(sock), "GET")
        assert answer.content == b"the last"


@simulated
async def test_head_options_405_404_and_308():
    app = plain_app(redirect_slashes=True)

    @app.get("/folder/")
    async def folder(request):
        return "in it"

    async with serving(app) as world:
        answer = await world.get("/", method="HEAD")
        assert (answer.status, answer.content, answer.headers["content-length"]) == (200, b"", "5")
        answer = await world.get("/echo", method="OPTIONS")
        assert answer.status == 204 and {*answer.headers["allow"].split(", ")} == {"POST", "PUT", "OPTIONS"}
        answer = await world.get("/echo")
        assert answer.status == 405 and {*answer.headers["allow"].split(", ")} == {"POST", "PUT", "OPTIONS"}
        assert (await world.get("/nowhere")).status == 404
        answer = await world.get("/folder?a=b")
        assert (answer.status, answer.headers["location"]) == (308, "/folder/?a=b")
        assert (await world.get("*", method="OPTIONS")).status == 204
        assert (await world.get("/%ff%zz")).status in (400, 404)
        assert (await world.get("/", method="BREW")).status == 405


@simulated
async def test_a_redirect_to_a_path_with_a_slash_leads_to_no_other_host():
    app = HttpServer(redirect_slashes=True)

    @app.get("/{a}/{b}/")
    async def anything(request, a, b):
        return a

    @app.get("/{a}/")
    async def one(request, a):
        return a

    async with serving(app) as world:
        for path in "//evil.example", "/%2f/evil.example", "/\\evil.example", "/%5cevil.example", "///evil.example":
            answer = await world.get(path)
            if answer.status == 308:
                assert not answer.headers["location"].startswith(("//", "/\\")), path


@simulated
async def test_an_absolute_target_counts_for_more_than_host():
    app = HttpServer()

    @app.get("/who")
    async def who(request):
        return [request.host, request.path, request.query_string, request.url, request.target]

    @app.get("/")
    async def root(request):
        return request.url

    async with serving(app) as world:
        [answer] = await world.talk(b"GET http://Other.example:81/who?a HTTP/1.1\r\nHost: server\r\n\r\n")
        assert answer.content == (b'["Other.example:81","/who","a","http://Other.example:81/who?a",'
                                  b'"http://Other.example:81/who?a"]')
        [answer] = await world.talk(b"GET http://other.example HTTP/1.1\r\nHost: server\r\n\r\n")
        assert answer.content == b"http://other.example/"
        [answer] = await world.talk(b"GET /who HTTP/1.1\r\nHost: name:80\r\n\r\n")
        assert answer.content == b'["name:80","/who","","http://name:80/who","/who"]'


@simulated
async def test_connect_is_refused_and_nothing_after_it_is_a_request():
    asked = []
    app = HttpServer()

    @app.get("/")
    async def hello(request):
        asked.append(request)

    async with serving(app) as world:
        [answer] = await world.talk(b"CONNECT other:443 HTTP/1.1\r\nHost: other:443\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "CONNECT")
        assert answer.status == 501 and not answer.keep_alive and asked == []


@simulated
async def test_a_middleware_may_accept_connect():
    app = HttpServer()

    @app.middleware
    async def tunnel(request, call_next):
        assert (request.method, request.host, request.raw_path, request.url) == ("CONNECT", "other:443", "", "http://other:443")
        sock = await request.upgrade(None)
        await sock.write(b"to the tunnel: " + await sock.read_exactly(4))

    async with serving(app) as world, await world.connect() as sock:
        await sock.write(b"CONNECT other:443 HTTP/1.1\r\nHost: other:443\r\n\r\ndata")
        assert await everything(sock) == b"HTTP/1.1 200 OK\r\n\r\nto the tunnel: data"


# ---- bodies ----------------------------------------------------------------------------------------------------

@simulated
async def test_100_continue_is_sent_only_when_the_body_is_first_read():
    reading, app = flowcoro.Event(), HttpServer()

    @app.post("/")
    async def slow(request):
        await reading.wait()
        first = await request.body()
        assert await request.body() is first
        return first

    async with serving(app) as world, await world.connect() as sock:
        await sock.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        with flowcoro.move_on_after(5):
            await sock.read()
            raise AssertionError("something came before the body was asked for")
        reading.set()
        assert await sock.read() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await sock.write(b"body")
        answer = await one_answer(sock, "POST")
        assert answer.content == b"body" and answer.keep_alive and answer.before == []


@simulated
async def test_an_answer_without_reading_the_body_that_waits_ends_the_connection():
    async with serving(plain_app(max_body=100)) as world, await world.connect() as sock:
        await sock.write(b"POST /ignore HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        [answer] = answers(await everything(sock), "POST")
        assert (answer.status, answer.before, answer.keep_alive) == (200, [], False)
        [answer] = await world.talk(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\nExpect: 100-continue\r\n\r\n", "POST")
        assert (answer.status, answer.before, answer.keep_alive) == (413, [], False)


@simulated
async def test_a_body_that_is_here_already_is_not_asked_for():
    async with serving(plain_app()) as world:
        answer = await world.post("/echo", b"body", b"Expect: 100-continue\r\n")
        assert answer.before == [] and answer.content == b"body" and answer.keep_alive


@simulated
async def test_bodies_by_length_by_chunks_and_their_trailers():
    app, seen = HttpServer(), []

    @app.post("/")
    async def trailers(request):
        seen.append(request.trailers)
        content = await request.body()
        seen.append(request.trailers and request.trailers.items())
        return content

    chunked = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nSum: 5\r\n\r\n"
    async with serving(app) as world:
        found = await world.talk(chunked + b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
                                 + b"POST / HTTP/1.1\r\nHost: a\r\n\r\n" * 4, *["POST"] * 6)
        assert [answer.content for answer in found] == [b"abcde", b"hi", b"", b"", b"", b""]
        assert seen == [None, [("Sum", "5")]] + [None] * 10


@simulated
async def test_trailers_of_a_body_that_nobody_read_are_not_those_of_the_next_request():
    app = plain_app()

    @app.post("/trailers")
    async def trailers(request):
        await request.body()
        return repr(request.trailers)

    async with serving(app) as world:
        found = await world.talk(b"POST /ignore HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nSum: 5\r\n\r\n"
                                 b"POST /trailers HTTP/1.1\r\nHost: a\r\n\r\n", "POST", "POST")
        assert found[1].content == b"None"


@simulated
async def test_limits_of_a_body_answer_413_before_it_is_read_if_it_is_announced():
    app = plain_app(max_body=1000)

    @app.post("/small")
    async def small(request):
        return await request.body(max_bytes=10)

    @app.post("/twice")
    async def twice(request):
        await request.body()
        return await request.body(max_bytes=10)

    @app.post("/streamed")
    async def streamed(request):
        request.max_body = 10
        return str([len(data) async for data in request.stream()])

    async with serving(app) as world:
        for path, size, status in [("/echo", 1000, 200), ("/echo", 1001, 413), ("/small", 10, 200), ("/small", 11, 413),
                                   ("/twice", 10, 200), ("/twice", 11, 413), ("/streamed", 10, 200), ("/streamed", 11, 413)]:
            answer = await world.post(path, b"x" * size)
            assert answer.status == status, path
            [answer] = await world.talk(b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
                                        % (path.encode(), size, b"x" * size), "POST")
            assert answer.status == status, path
        async with await world.connect() as sock:               # announced: before a byte of it has come
            await sock.write(b"POST /small HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n")
            assert (await one_answer(sock, "POST")).status == 413
        async with await world.connect() as sock:
            await sock.write(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n")
            [answer] = answers(await everything(sock), "POST")
            assert answer.status == 413 and not answer.keep_alive


@simulated
async def test_a_body_that_is_no_http_is_a_400_and_the_end_even_if_the_handler_does_not_care():
    app = plain_app()

    @app.post("/careless")
    async def careless(request):
        with contextlib.suppress(HttpError):
            await request.body()
        return "never mind"

    bad = b" HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"
    after = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    async with serving(app) as world:
        [answer] = await world.talk(b"POST /echo" + bad + after, "POST")
        assert answer.status == 400 and not answer.keep_alive
        [answer] = await world.talk(b"POST /careless" + bad + after, "POST")
        assert answer.content == b"never mind" and not answer.keep_alive
        [answer] = await world.talk(b"POST /ignore" + bad + after, "POST")
        assert answer.content == b"ignored"
        [answer] = await world.talk(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nabc", "POST")
        assert answer.status == 400


@simulated
async def test_the_content_comes_once_and_whoever_asks_again_is_told():
    app = HttpServer()

    @app.post("/")
    async def twice(request):
        pieces = [data async for data in request.stream()]
        for again in request.body, request.json, request.form, lambda: anext(request.stream()):
            with pytest.raises((RuntimeError, HttpError)):
                await again()
        return b"".join(pieces)

    @app.post("/kept")
    async def kept(request):
        await request.body()
        return b"".join([data async for data in request.stream()])

    async with serving(app) as world:
        assert (await world.post("/", b"once")).content == b"once"
        assert (await world.post("/kept", b"kept")).content == b"kept"


@simulated
async def test_a_handler_that_stops_in_the_middle_of_a_body_leaves_the_rest_to_the_server():
    app = HttpServer()

    @app.post("/")
    async def first(request):
        async for data in request.stream():
            return data[:1]

    async with serving(app) as world, await world.connect() as sock:
        for _ in range(3):
            await sock.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000)
            assert (await one_answer(sock, "POST")).content == b"x"


@simulated
async def test_a_handler_that_gave_up_waiting_for_the_body_is_watched_as_any_other():
    app, ended = HttpServer(), []

    @app.post("/")
    async def impatient(request):
        with flowcoro.move_on_after(3):
            await request.body()
        try:
            await flowcoro.sleep(10_000)
        finally:
            ended.append(flowcoro.now())

    async with serving(app) as world:
        sock = await world.connect()
        await sock.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n")
        await flowcoro.sleep(10)
        await sock.close()
        await until(lambda: ended)
        assert ended[0] < 15


# ---- what handlers return --------------------------------------------------------------------------------------

class Text(str):
    pass


async def pieces(*of):
    for piece in of:
        yield piece


@simulated
async def test_all_that_a_handler_may_return():
    import http as standard

    results = {
        "/str": ("h\u00e9", 200, "text/plain; charset=utf-8", "h\u00e9".encode()),
        "/text": (Text("x"), 200, "text/plain; charset=utf-8", b"x"),
        "/empty": ("", 200, "text/plain; charset=utf-8", b""),
        "/bytes": (b"\0", 200, "application/octet-stream", b"\0"),
        "/bytearray": (bytearray(b"\0"), 200, "application/octet-stream", b"\0"),
        "/dict": ({"a": [1, None]}, 200, "application/json", b'{"a":[1,null]}'),
        "/list": ([], 200, "application/json", b"[]"),
        "/number": (5, 200, "application/json", b"5"),
        "/none": (None, 204, None, b""),
        "/tuple": ((201, "made"), 201, "text/plain; charset=utf-8", b"made"),
        "/three": ((202, {"a": 1}, [("X-A", "b")]), 202, "application/json", b'{"a":1}'),
        "/status": ((standard.HTTPStatus.ACCEPTED, "x"), 202, "text/plain; charset=utf-8", b"x"),
        "/nothing": ((204, None), 204, None, b""),
        "/response": (Response(203, "x", media_type="text/html"), 203, "text/html", b"x"),
        "/own": (Response(200, "x", [("content-type", "a/b")]), 200, "a/b", b"x"),
        "/notmodified": (Response(304, None, [("ETag", '"x"')]), 304, None, b""),
        "/status2": (Response(standard.HTTPStatus.OK, b""), 200, None, b""),
    }
    app = HttpServer()
    for path, (result, *_) in results.items():
        async def handler(request, result=result):
            return result
        app.add(path, functools.partial(handler, result=result))

    async def stream(request):
        return pieces(b"a", "b\u00e9", b"", bytearray(b"c"))

    async def generator(request):
        yield b"a"

    async def iterator(request):
        return iter(["a", b"b"])

    for function in stream, generator, iterator:
        app.add(f"/{function.__name__}", function)
    async with serving(app) as world:
        for _ in range(2):                      # the second time heads are known
            for path, (_, status, media_type, content) in results.items():
                for method in "GET", "HEAD":
                    answer = await world.get(path, method=method)
                    assert (answer.status, answer.headers.get("content-type")) == (status, media_type), path
                    assert answer.content == (content if method == "GET" else b""), path
                    if status not in (204, 304):
                        assert answer.headers["content-length"] == str(len(content)), path
        assert (await world.get("/stream")).content == "ab\u00e9c".encode()
        assert (await world.get("/generator")).content == b"a"
        answer = await world.get("/iterator")
        assert answer.content == b"ab" and answer.headers["transfer-encoding"] == "chunked"
        answer = await world.get("/stream", method="HEAD")
        assert answer.content == b"" and answer.status == 200


class Strange(Response):
    def __init__(self, **attributes):
        super().__init__(200, "x")
        self.__dict__ |= attributes


WRONG = {
    "a tuple of one": (200,), "a tuple of four": (200, "", [], 1), "a tuple without a status": ("x", "y"), "true": (True, "x"),
    "an object": object(), "nan": float("nan"), "a lone surrogate": "\ud800", "a status": Response(99), "another": Response(1000),
    "a status of 1xx": Response(101), "content with 204": Response(204, "x"), "content with 304": Response(304, "x"),
    "a wrong length": Response(200, "xy", [("Content-Length", "1")]),
    "length and chunks": Response(200, "x", [("Content-Length", "1"), ("Transfer-Encoding", "chunked")]),
    "chunks with 204": Response(204, None, [("Transfer-Encoding", "chunked")]),
    "a reason with a line break": Response(200, "x", reason="OK\r\nX: y"), "a reason that is no text": Response(200, "x", reason=7),
    "no content at all": Strange(content=None), "content of text": Strange(content="x"), "no headers": Strange(headers=None),
    "pairs for headers": Strange(headers={"a": "b"}), "a status of text": Strange(status="200"),
    "a reason beyond latin-1": Response(200, "x", reason="\u20ac"), "headers of three": (200, "x", [("a", "b", "c")]),
    "headers of no text": (200, "x", [("a", 1)]), "a header with a line break": (200, "x", [("a", "b\r\nX: y")]),
    "a dict of headers": (200, "x", {"abc": "d"}), "a set of objects": {object()},
}

OF_NO_CONCERN_TO_HEAD = {"content with 204", "content with 304", "a wrong length", "no content at all"}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_result_is_reported_and_answered_with_500_and_the_connection_goes_on(what, reports):
    @simulated
    async def test():
        app = plain_app()

        @app.get("/wrong")
        async def wrong(request):
            return WRONG[what]

        async with serving(app) as world:
            for method in ("GET",) if what in OF_NO_CONCERN_TO_HEAD else ("GET", "HEAD"):
                found = await world.talk(b"%s /wrong HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"
                                         % method.encode(), method, "GET")
                assert [found[0].status, found[1].content] == [500, b"hello"]
                assert b"X" not in found[0].content and "x" not in found[0].headers

    test()
    assert reports and all(error is not None for _, error in reports)


STRANGE_STREAMS = {
    "a piece of another type": lambda: pieces(5), "an error": lambda: failing(), "a wrong status": lambda: Response(99, pieces("x")),
    "a wrong head": lambda: Response(204, pieces("x"), [("Transfer-Encoding", "chunked")]),
    "none": lambda: Strange(content=None, stream=5), "an endless one with a wrong head": lambda: endless(99),
}


async def failing(*before):
    for piece in before:
        yield piece
    raise KeyError("broken")


def endless(status, *of):
    response = Response(status, pieces(*of))
    response.endless = True
    return response


@pytest.mark.parametrize("what", STRANGE_STREAMS)
def test_a_stream_that_fails_before_its_first_piece_is_answered_with_500(what, reports):
    @simulated
    async def test():
        app = plain_app()

        @app.get("/wrong")
        async def wrong(request):
            return STRANGE_STREAMS[what]()

        async with serving(app) as world:
            found = await world.talk(b"GET /wrong HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET", "GET")
            assert [found[0].status, found[1].content] == [500, b"hello"]

    test()
    assert len(reports) == 1
