"""The HTTP server: connections, answers, errors, deadlines, ends. Mostly on a simulated network, whose time costs nothing."""

import contextlib
import functools
import gc
import http.client
import io
import itertools
import json
import os
import pathlib
import random
import re
import selectors
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import time
import tracemalloc
import types
import urllib.error
import urllib.request
import weakref

import pytest

import flowcoro
import flowcoro_http
from flowcoro_http import (Data, EndOfMessage, HttpConnection, HttpError, HttpServer, InformationalResponse, NEED_DATA,
                           RequestHead, Response, ResponseHead)
from flowcoro_net import BrokenError, Socket, client_tls, server_tls
from flowcoro_testing import SimulatedNetwork, run_in_kernel
from http_helpers import everything
from test_net import PATIENCE, drain, nothing_is_left_behind, run  # noqa: F401  (a fixture)
from test_net_cancel import at_each_point, cancelled_at
from test_net_tls import certificates  # noqa: F401  (a fixture)

ROOT = pathlib.Path(__file__).resolve().parent.parent

simulated = functools.partial(run_in_kernel, timeout=100_000)       # seconds of the virtual clock: a test that hangs fails

HOST = b"Host: server\r\n"
SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 30)))


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
        """Send all of it and end; the answers to requests of these methods (one GET), which are all that comes."""
        async with await self.connect() as sock:
            await sock.write(data)
            await sock.shutdown_write()
            return answers(await everything(sock), *methods)

    async def get(self, path="/", headers=b"", method="GET"):
        """The answer to one request."""
        [answer] = await self.talk(b"%s %s HTTP/1.1\r\n%s%s\r\n" % (method.encode(), path.encode(), HOST, headers), method)
        return answer

    async def post(self, path, body, headers=b""):
        [answer] = await self.talk(b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n%s\r\n%s"
                                   % (path.encode(), HOST, len(body), headers, body), "POST")
        return answer


@contextlib.asynccontextmanager
async def serving(app, *, network=types.MappingProxyType({}), **options):
    network = SimulatedNetwork(**network)
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
    for number, method in enumerate(methods or ["GET"]):
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
            assert number >= len(methods) - 1, f"the connection ends after {number + 1} answers"
            data = b""
        found.append(answer)
    assert data == b"", f"{data!r} after the last answer"
    return found


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


def handler_of(reads):
    async def handler(request):
        return [await read for read in reads(request)]
    return handler


def content_app():
    """Each way to read a content, and what becomes of it when it is read again."""
    app = HttpServer()

    async def again(read):
        try:
            return repr(await read)
        except (RuntimeError, HttpError) as error:
            return f"{type(error).__name__} {getattr(error, 'status', '')}"

    async def joined(stream):
        return b"|".join([data async for data in stream])

    app.post("/body")(handler_of(lambda request: [again(request.body()), again(request.body()), again(joined(request.stream()))]))
    app.post("/stream")(handler_of(lambda request: [again(joined(request.stream())), again(joined(request.stream())),
                                                   again(request.body())]))
    app.post("/json")(handler_of(lambda request: [again(request.json()), again(request.body(2)), again(request.json())]))
    app.post("/form")(handler_of(lambda request: [again(request.form()), again(request.form()), again(request.json())]))
    app.post("/less")(handler_of(lambda request: [again(request.body(2)), again(request.body(9))]))

    @app.post("/limited")
    async def limited(request):
        request.max_body = 2
        return [await again(joined(request.stream())), await again(request.body())]

    @app.post("/unread")
    async def unread(request):
        return "unread"

    @app.post("/late")
    async def late(request):
        await flowcoro.sleep(1)
        return await again(request.body())

    return app


@simulated
async def test_a_content_that_is_known_to_come_with_its_head_is_read_as_any_other():
    async with serving(content_app()) as world:
        for path in "body", "stream", "json", "form", "less", "limited", "unread", "late":
            for kind, content in (("application/json", b"[1, 2]"), ("application/json", b""), ("text/plain", b"a=b"),
                                  ("application/x-www-form-urlencoded", b"a=b&c=d")):
                head = (f"POST /{path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\n"
                        f"Content-Length: {len(content)}\r\n\r\n").encode()
                found = []
                async with await world.connect() as sock:
                    codec = HttpConnection("client")
                    for parts in (head + content,), (head, content), *4 * [(head + content,)], (head[:-1], head[-1:] + content):
                        for part in filter(None, parts):
                            await sock.write(part)
                            await flowcoro.sleep(0.01)
                        found.append(await one_answer(sock, "POST", codec))
                    [connection] = world.listener._run.connections.values()
                    assert connection.http._fields.size == len(content)
                assert {(answer.status, answer.content) for answer in found} == {(found[0].status, found[0].content)}, found
                assert found[0].status == 200 and all(answer.keep_alive for answer in found)
                await until(lambda: not world.listener._run.connections)


@simulated
async def test_a_content_that_nobody_reads_ends_the_connection_beyond_max_unread_also_if_it_is_known():
    async with serving(plain_app(max_unread=2)) as world, await world.connect() as sock:
        codec = HttpConnection("client")
        for path, size, goes_on in [("echo", 3, True)] * 4 + [("ignore", 2, True)] * 2 + [("ignore", 3, False)]:
            await sock.write(b"POST /%b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), size, size * b"x"))
            assert (await one_answer(sock, "POST", codec)).keep_alive is goes_on


@pytest.mark.parametrize("times", [1, 3])               # the last of them is known
@pytest.mark.parametrize("way", ["stream", "body", "inform", "upgrade"])
@simulated
async def test_a_request_that_is_kept_has_nothing_to_do_with_the_next_one(way, times):
    app, kept, found, heard = HttpServer(), [], [], flowcoro.Event()
    ways = {"stream": lambda request: request.body(), "body": lambda request: request.body(),
            "inform": lambda request: request.inform(103), "upgrade": lambda request: request.upgrade("echo")}

    @app.post("/keep")
    async def keep(request):
        kept.append(request)
        if way == "stream":
            pieces = request.stream()
            kept.append(pieces)
            return await anext(pieces)
        return "kept"

    @app.post("/next")
    async def next_one(request):
        for late in kept:
            with pytest.raises(RuntimeError, match="has been"):
                found.append(await (ways[way](late) if isinstance(late, flowcoro_http.Request) else anext(late)))
        heard.set()
        return await request.body()

    async with serving(app) as world, await world.connect() as sock:
        codec = HttpConnection("client")
        for _ in range(times):
            await sock.write(b"POST /keep HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nmine")
            await one_answer(sock, "POST", codec)
        await sock.write(b"POST /next HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\nano")
        with flowcoro.move_on_after(1):
            await heard.wait()
        await sock.write(b"the")
        answer = await one_answer(sock, "POST", codec)
        assert (answer.content, answer.before, found) == (b"anothe", [], [])


@simulated
async def test_query_and_cookies_of_a_known_request_are_those_of_each():
    generous, app, change = HttpServer(), HttpServer(max_query_fields=3, max_cookies=3), itertools.cycle([True, False])

    @generous.get("/show")
    @app.get("/show")
    async def show(request):
        before = dict(request.cookies)
        request.cookies["mine"] = "of this request"
        return [request.query_string, request.query.items(), before, request.cookies]

    @app.get("/changed")
    async def changed(request):
        if next(change):
            request.headers.set("Cookie", "another=one")
            request.query_string = "n=" + request.query_string
        return [request.query_string, request.query.items(), request.cookies]

    async with serving(generous) as world, await world.connect() as sock:       # it knows a query that the other refuses
        codec = HttpConnection("client")
        for query in 4 * (b"?a=1&b&c&d", b""):
            await sock.write(b"GET /show%b HTTP/1.1\r\nHost: a\r\n\r\n" % query)
            assert (await one_answer(sock, "GET", codec)).status == 200
    async with serving(app) as world, await world.connect() as sock, await world.connect() as other:
        codecs = HttpConnection("client"), HttpConnection("client")

        async def ask(target, cookie, sock=sock, codec=codecs[0]):
            await sock.write(b"GET %b HTTP/1.1\r\nHost: a\r\nCookie: %b\r\n\r\n" % (target, cookie))
            answer = await one_answer(sock, "GET", codec)
            return json.loads(answer.content) if answer.status == 200 else answer.status

        for _ in range(4):
            for number in b"1", b"1", b"1", b"2":
                assert await ask(b"/show?a=" + number, b"c=d") == [f"a={number.decode()}", [["a", number.decode()]], {"c": "d"},
                                                                   {"c": "d", "mine": "of this request"}]
            assert await ask(b"/changed?a=b", b"c=d") == ["n=a=b", [["n", "a=b"]], {"another": "one"}]
            assert await ask(b"/changed?a=b", b"c=d") == ["a=b", [["a", "b"]], {"c": "d"}]
            assert await ask(b"/show?a=1", b"e=f", other, codecs[1]) == ["a=1", [["a", "1"]], {"e": "f"},
                                                                         {"e": "f", "mine": "of this request"}]
        for _ in range(4):
            assert await ask(b"/show?a=1&b&c&d", b"c=d") == 413
        for _ in range(4):
            assert await ask(b"/show?a=1", b"a=1; b=2; c=3; d=4") == 431


@simulated
async def test_what_a_connection_knows_of_its_requests_is_given_up_when_it_is_idle():
    async with serving(plain_app()) as world, await world.connect() as sock:
        codec = HttpConnection("client")
        for _ in range(2):
            for known in False, True, True, True:
                await sock.write(b"GET / HTTP/1.1\r\nHost: a\r\nCookie: secret=unheard-of\r\n\r\n")
                await one_answer(sock, "GET", codec)
                [connection] = world.listener._run.connections.values()
                assert (connection.http._fields is not None) is known
            await flowcoro.sleep(2 * flowcoro_http.SWEEP + 0.1)
            assert connection.http._fields is None and connection.http._again is None


@simulated
async def test_a_sweep_that_has_seen_a_connection_idle_can_look_at_it_when_it_is_a_websocket():
    """As one of another worker may: both happen between two lines of its own."""
    async with serving(plain_app()) as world, await world.connect():
        await until(lambda: world.listener._run.connections)
        [connection] = world.listener._run.connections.values()
        codec, connection.http = connection.http, flowcoro_http._UPGRADED
        connection.look(0.5), connection.look(0.5)
        connection.http = codec


@simulated
async def test_an_idle_connection_holds_nothing_of_the_last_request_and_its_answer():
    app, held = HttpServer(), []

    @app.post("/")
    async def answer(request):
        response = Response(200, await request.body())
        held[:] = weakref.ref(request), weakref.ref(response), request._fields
        return response

    async with serving(app) as world, await world.connect() as sock:
        for _ in range(3):
            await sock.write(b"POST / HTTP/1.1\r\nHost: a\r\nCookie: a=b\r\nContent-Length: 2\r\n\r\nab")
            await one_answer(sock, "POST")
        await flowcoro.sleep(2 * flowcoro_http.SWEEP + 0.1)
        request, response, fields = held
        assert fields.lines and gc.collect() >= 0 and request() is response() is None
        assert [type(holder) for holder in gc.get_referrers(fields) if type(holder) is tuple] == []


@simulated
async def test_a_content_that_came_with_its_head_is_given_up_when_it_is_streamed():
    app = HttpServer()

    @app.post("/")
    async def handler(request):
        before, pieces = request._arrived, [data async for data in request.stream()]
        holders = [holder for holder in gc.get_referrers(before) if type(holder) is tuple]
        return [before == b"ab", pieces == [b"ab"], request._arrived is None and (before is None or not holders)]

    async with serving(app) as world, await world.connect() as sock:
        for known in False, False, True, True:
            await sock.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab")
            assert json.loads((await one_answer(sock, "POST")).content) == [known, True, True]


@simulated
async def test_a_body_that_nobody_read_and_that_is_large_ends_the_connection_with_the_answer_arriving():
    async with serving(plain_app()) as world:
        answer = await world.post("/ignore", b"x" * (flowcoro_http.MAX_UNREAD + 1))
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
async def test_limits_of_what_is_read_of_a_request_are_arguments():
    app = plain_app(max_unread=10, max_cookies=3, max_query_fields=4, max_chunk_line=9)

    @app.get("/read")
    async def read(request):
        return [len(request.cookies), len(request.query)]

    async with serving(app) as world:
        for size in 10, 11:
            answer = await world.post("/ignore", b"x" * size)
            assert answer.content == b"ignored" and answer.keep_alive == (size == 10)
        for cookies, query, status, limit in [
                (b"a=1; b=2; c=3", "a&b&c&d", 200, b""), (b"a=1; b=2; c=3; a=4", "", 431, b"max_cookies"),
                (b"", "a&b&c&d&e", 413, b"max_query_fields")]:
            answer = await world.get(f"/read?{query}", b"Cookie: %s\r\n" % cookies)
            assert answer.status == status and limit in answer.content, (cookies, query)
        for extension, status in (b";a=bcde", 200), (b";a=bcdef", 400):
            [answer] = await world.talk(b"POST /echo HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n01%s\r\nx\r\n0\r\n\r\n"
                                        % (HOST, extension), "POST")
            assert answer.status == status, extension


@simulated
async def test_a_connection_that_the_server_ends_is_read_on_for_as_long_as_it_is_told():
    for seconds in 2.0, 7.0:
        app = plain_app(linger_timeout=seconds)
        async with serving(app) as world, await world.connect() as sock:
            await sock.write(b"nonsense\r\n\r\n")
            assert answers(await everything(sock))[0].status == 400         # and their end, at once
            began = flowcoro.now()
            with pytest.raises(BrokenError):
                while True:
                    await sock.write(b"x")
                    await flowcoro.sleep(0.1)
            assert seconds - 0.1 <= flowcoro.now() - began <= seconds + 0.5


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
        assert request.headers.get_all("host") == [request.host]        # whoever reads the field reads no other one
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
        [answer] = await world.talk(b"CONNECT other:443 HTTP/1.1\r\nHost: other:443\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
                                    "CONNECT")
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
        [answer] = await world.talk(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\nExpect: 100-continue\r\n\r\n",
                                    "POST")
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
        found = await world.talk(b"POST /ignore HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
                                 b"1\r\na\r\n0\r\nSum: 5\r\n\r\n"
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


@pytest.mark.parametrize("request_data", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
                                          b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"])
def test_a_head_that_is_ready_is_what_it_would_be_made_of_and_has_the_date_of_now(monkeypatch, request_data):
    clock = flowcoro_http._Clock()
    for second in 10**9, 10**9, 10**9 + 1:
        monkeypatch.setattr(time, "time", lambda: second + 0.5)
        now = clock.now()
        assert now.date == ("Date", flowcoro_http.http_date(second))
        for kind, ready in ("text/plain; charset=utf-8", now.text), ("application/json", now.json):
            one, other = HttpConnection("server"), HttpConnection("server")
            for codec in one, other:
                codec.receive_data(request_data)
                codec.next_event(), codec.next_event()
            for content in b"x", bytearray(b"x"):
                assert one.send_message(ready, content) == other.send_message(
                    ResponseHead(200, [("Content-Type", kind), now.date]), content)
                assert one.our_state == other.our_state
                one, other = HttpConnection("server"), HttpConnection("server")         # that answer what is no request


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
        "/reset": ((205, None), 205, None, b""),
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

    @app.get("/iterator")
    async def iterator(request):
        return iter(["a", b"b"])

    async with serving(app) as world:
        for _ in range(2):                      # the second time heads are known
            for path, (_, status, media_type, content) in results.items():
                for method in "GET", "HEAD":
                    answer = await world.get(path, method=method)
                    assert (answer.status, answer.headers.get("content-type")) == (status, media_type), path
                    assert answer.content == (content if method == "GET" else b""), path
                    assert len(answer.headers.get_all("date")) == 1, path
                    if status not in (204, 304):
                        assert answer.headers["content-length"] == str(len(content)), path
        answer = await world.get("/iterator")
        assert answer.content == b"ab" and answer.headers["transfer-encoding"] == "chunked"


@simulated
async def test_the_first_piece_of_a_stream_says_its_type_unless_the_handler_does():
    binary, text, ours = "application/octet-stream", "text/plain; charset=utf-8", "text/csv"
    answers = {
        "/bytes": (lambda: pieces(b"a", "b\u00e9", b"", bytearray(b"c")), binary, "ab\u00e9c"),
        "/str": (lambda: pieces("\u00e9", b"b"), text, "\u00e9b"),
        "/markup": (lambda: iter([Text("a"), "b"]), text, "ab"),
        "/nothing": (pieces, binary, ""),
        "/empty": (lambda: pieces("", b"b"), text, "b"),
        "/own": (lambda: Response(200, pieces("a"), media_type=ours), ours, "a"),
        "/own2": (lambda: Response(200, pieces("a"), {"content-type": ours}), ours, "a"),
        "/none": (lambda: Response(205, pieces("a")), binary, ""),
        "/own3": (lambda: Response(200, pieces("a"), media_type=binary), binary, "a"),
    }
    app = HttpServer()
    for path, (make, *_) in answers.items():
        async def handler(request, make=make):
            return make()
        app.add(path, functools.partial(handler, make=make))
    async with serving(app) as world:
        for path, (_, media_type, content) in answers.items():
            for method in "GET", "HEAD":
                answer = await world.get(path, method=method)
                assert answer.headers.get_all("content-type") == [media_type], path
                assert answer.content.decode() == (content if method == "GET" else "") and answer.status in (200, 205)


@simulated
async def test_head_gets_the_error_that_get_would_get_before_the_first_piece():
    app, ends = HttpServer(), []

    @app.get("/{status:int}")
    async def lines(request, status):
        try:
            if status != 200:
                raise HttpError(status)
            yield "one"
            raise ValueError("this is asked of nobody who wants the head only")
        finally:
            ends.append(status)

    async with serving(app) as world:
        for status in 404, 200:
            answer = await world.get(f"/{status}", method="HEAD")
            assert answer.status == status and ends.pop() == status
            assert ("content-length" in answer.headers) == (status == 404)


def test_what_is_no_error_but_escapes_a_handler_ends_its_connection_alone(reports):
    @simulated
    async def test():
        app = plain_app()

        @app.get("/stray")
        async def stray(request):
            raise Stray

        @app.get("/stream")
        async def stream(request):
            yield "one"
            raise BaseExceptionGroup("several", [Stray()])

        async with serving(app) as world:
            async with await world.connect() as other:
                for path in b"/stray", b"/stream":
                    async with await world.connect() as sock:
                        await sock.write(b"GET %s HTTP/1.1\r\n%s\r\n" % (path, HOST))
                        with pytest.raises(BrokenError):
                            await everything(sock)
                await other.write(b"GET / HTTP/1.1\r\n%s\r\n" % HOST)
                assert (await other.read()).endswith(b"hello")

    test()
    assert [type(error) for _, error in reports] == [Stray, BaseExceptionGroup]


def test_an_option_that_the_server_has_not_is_said_to_be_none_of_the_server():
    with pytest.raises(TypeError, match="HttpServer.*drain_timeout"):
        HttpServer(drain_timeout=3)
    app = HttpServer(prefix="/a", redirect_slashes=True, json_depth=3, max_errors=2)
    assert app.redirect_slashes and app._limits == (3, 2)


class Stray(BaseException):
    """As asyncio.CancelledError, or what a library of tests gives up with."""


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_what_ends_the_program_ends_the_server(error):
    app = HttpServer()

    @app.get("/")
    async def end(request):
        raise error

    async def main():
        async with serving(app) as world:
            async with await world.connect() as sock:
                await sock.write(b"GET / HTTP/1.1\r\n%s\r\n" % HOST)
                await flowcoro.Event().wait()

    with pytest.raises(BaseException) as caught:
        simulated(main)()
    found = caught.value
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert type(found) is error


def test_a_stream_is_sent_once(reports):
    @simulated
    async def test():
        app, kept = HttpServer(), Response(200, pieces(b"a"))

        @app.get("/")
        async def again(request):
            return kept

        async with serving(app) as world:
            for method, status in ("GET", 200), ("GET", 500), ("HEAD", 500):
                assert (await world.get("/", method=method)).status == status

    test()
    assert [str(error)[:28] for _, error in reports] == ["the stream of this Response "] * 2


def test_a_middleware_that_forgets_to_return_is_reported(reports):
    @simulated
    async def test():
        app = plain_app()

        @app.middleware
        async def forgetful(request, call_next):
            await call_next(request)

        async with serving(app) as world:
            assert (await world.get()).status == 500

    test()
    assert ["forgetful" in str(error) for _, error in reports] == [True]


class Strange(Response):
    def __init__(self, **attributes):
        super().__init__(200, "x")
        self.__dict__ |= attributes


WRONG = {
    "a tuple of one": (200,), "a tuple of four": (200, "", [], 1), "a tuple without a status": ("x", "y"), "true": (True, "x"),
    "an object": object(), "nan": float("nan"), "a lone surrogate": "\ud800", "a status": Response(99), "another": Response(1000),
    "a status of 1xx": Response(101), "content with 204": Response(204, "x"), "content with 304": Response(304, "x"),
    "content with 205": Response(205, "x"), "a wrong length": Response(200, "xy", [("Content-Length", "1")]),
    "length and chunks": Response(200, "x", [("Content-Length", "1"), ("Transfer-Encoding", "chunked")]),
    "chunks with 204": Response(204, None, [("Transfer-Encoding", "chunked")]),
    "a reason with a line break": Response(200, "x", reason="OK\r\nX: y"),
    "a reason that is no text": Response(200, "x", reason=7),
    "no content at all": Strange(content=None), "content of text": Strange(content="x"), "no headers": Strange(headers=None),
    "pairs for headers": Strange(headers={"a": "b"}), "a status of text": Strange(status="200"),
    "a reason beyond latin-1": Response(200, "x", reason="\u20ac"), "headers of three": (200, "x", [("a", "b", "c")]),
    "headers of no text": (200, "x", [("a", 1)]), "a header with a line break": (200, "x", [("a", "b\r\nX: y")]),
    "a set of objects": {object()},
}

OF_NO_CONCERN_TO_HEAD = {"content with 204", "content with 205", "content with 304", "a wrong length", "no content at all"}


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
    "a piece of another type": lambda: pieces(5), "an error": lambda: failing(),
    "a wrong status": lambda: Response(99, pieces("x")),
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


# ---- errors ----------------------------------------------------------------------------------------------------

class Wrong(Exception):
    pass


class VeryWrong(Wrong):
    pass


def failing_app():
    app = plain_app()

    def add(path, error):
        async def handler(request):
            raise error
        app.add(path, handler)

    add("/wrong", Wrong("secret"))
    add("/very", VeryWrong("secret"))
    add("/teapot", HttpError(418, "short and stout", [("X-Spout", "yes")]))
    add("/empty", HttpError(403))
    add("/json", HttpError(400, {"problem": "json"}))
    add("/split", HttpError(400, "x", [("X-A", "b\r\nX-Evil: yes")]))
    add("/surrogate", HttpError(400, "\ud800"))
    add("/99", HttpError(99, "no status"))
    add("/recursion", RecursionError())
    add("/group", ExceptionGroup("several", [Wrong()]))
    return app


def test_errors_are_answers(reports):
    @simulated
    async def test():
        async with serving(failing_app()) as world:
            answer = await world.get("/teapot")
            assert (answer.status, answer.content, answer.headers["x-spout"]) == (418, b"short and stout", "yes")
            assert (await world.get("/empty")).content == b"Forbidden"
            assert (await world.get("/json")).content == b'{"problem":"json"}'
            assert reports == []
            for number, path in enumerate(["/wrong", "/recursion", "/group", "/split", "/surrogate", "/99"], 1):
                found = await world.talk(b"GET %s HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode(),
                                         "GET", "GET")
                assert found[0].status == 500 and found[1].content == b"hello"
                assert b"secret" not in found[0].content and "x-evil" not in found[0].headers
                assert len(reports) == number

    test()


def test_error_handlers_by_status_and_by_the_nearest_class(reports):
    @simulated
    async def test():
        app = failing_app()

        @app.get("/typed")
        async def typed(request):
            raise HttpError(402, "<p>pay", [("Content-Type", "text/html"), ("X-Price", "2")])

        @app.error_handler(418)
        async def teapot(request, error):
            return f"a teapot: {error.message}"

        @app.error_handler(HttpError)
        async def any_http(request, error):
            return {"status": error.status}

        @app.error_handler(Exception)
        async def anything(request, error):
            return 503, f"{type(error).__name__}"

        @app.error_handler(Wrong)
        async def wrong(request, error):
            return Response(409, "wrong")

        async with serving(app) as world:
            for path, status, content in [
                    ("/teapot", 418, b"a teapot: short and stout"), ("/nowhere", 404, b'{"status":404}'),
                    ("/wrong", 409, b"wrong"),
                    ("/very", 409, b"wrong"), ("/recursion", 503, b"RecursionError"), ("/group", 409, b"wrong")]:
                answer = await world.get(path)
                assert (answer.status, answer.content) == (status, content), path
            answer = await world.get("/typed")
            assert (answer.headers["content-type"], answer.headers["x-price"]) == ("application/json", "2")
            answer = await world.get("/echo")           # a 405 has to say what is allowed, whoever writes its page
            assert (answer.status, answer.content) == (405, b'{"status":405}')
            assert answer.headers["allow"] == "OPTIONS, POST, PUT" and answer.headers["content-type"] == "application/json"

    test()
    assert reports == []


@simulated
async def in_groups(handled, *errors):
    """The answer when a handler has tasks, in two groups, which fail so at the same time; `handled`: {kind of error: status}."""
    async def fail(error):
        raise error

    app = HttpServer()
    for kind, status in handled.items():
        app.error_handler(kind)(named(status))

    @app.get("/groups")
    async def groups(request):
        async with flowcoro.TaskGroup():
            async with flowcoro.TaskGroup() as group:
                for error in errors:
                    group.spawn(fail(error))
                await flowcoro.sleep(1)

    async with serving(app) as world:
        return await world.get("/groups")


def test_the_only_error_of_a_group_is_answered_as_it_would_be_alone(reports):
    answer = in_groups({}, HttpError(404, "gone", [("X-A", "b")]))
    assert (answer.status, answer.content, answer.headers["x-a"]) == (404, b"gone", "b")
    known = {Wrong: 409, 418: 418}
    answer = in_groups(known, VeryWrong())
    assert (answer.status, answer.content) == (409, b"VeryWrong")
    assert in_groups(known, HttpError(418)).content == b"HttpError" and reports == []
    assert in_groups(known, KeyError()).status == 500 and [type(error) for _, error in reports] == [ExceptionGroup]
    assert in_groups(known, VeryWrong(), HttpError(404)).status == 500 and len(reports) == 2      # which one, nobody can say
    answer = in_groups({**known, ExceptionGroup: 502}, VeryWrong())
    assert (answer.status, answer.content) == (502, b"ExceptionGroup") and len(reports) == 2


def named(status):
    async def handler(request, error):
        return status, type(error).__name__
    return handler


def test_a_stream_that_breaks_off_in_a_group_for_what_its_client_sends_is_not_reported(reports):
    @simulated
    async def test():
        app = HttpServer()

        @app.post("/")
        async def back(request):
            async with flowcoro.TaskGroup():
                yield b"begun"
                async for data in request.stream():
                    yield data

        async with serving(app) as world, await world.connect() as sock:
            await sock.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n")
            with pytest.raises(BrokenError):
                await everything(sock)

    test()
    assert reports == []


def test_the_handler_of_500_answers_what_is_reported(reports):
    @simulated
    async def test():
        app = failing_app()

        @app.error_handler(500)
        async def broken(request, error):
            return f"sorry: {type(error).__name__}"

        async with serving(app) as world:
            answer = await world.get("/very")
            assert (answer.status, answer.content) == (500, b"sorry: VeryWrong")

    test()
    assert [type(error) for _, error in reports] == [VeryWrong]


@pytest.mark.parametrize("what", ["raises", "is no text", "splits", "streams", "is strange", "raises http"])
def test_an_error_handler_that_fails(what, reports):
    @simulated
    async def test():
        app = failing_app()

        @app.error_handler(Wrong)
        async def handler(request, error):
            if what == "raises":
                raise KeyError("in the error handler")
            if what == "raises http":
                raise HttpError(410, "gone")
            return {"is no text": object(), "splits": Response(200, "x", reason="a\r\nb"), "is strange": Strange(headers=7),
                    "streams": Response(200, failing())}[what]

        @app.error_handler(flowcoro_http.LocalProtocolError)
        async def another(request, error):
            return Response(99)

        @app.get("/first")
        async def first(request):
            async def stream():
                raise Wrong
                yield
            return stream()

        async with serving(app) as world:
            for path in "/wrong", "/first":
                found = await world.talk(b"GET %s HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode(),
                                         "GET", "GET")
                assert found[0].status == (410 if what == "raises http" else 500) and found[1].content == b"hello"

    test()
    assert bool(reports) == (what != "raises http")


def test_what_is_no_error_to_handle_is_refused():
    app = HttpServer()
    for wrong in 200, "404", BaseException, None, 600:
        with pytest.raises(TypeError):
            app.error_handler(wrong)
    with pytest.raises(TypeError):
        app.middleware("name")
    for name in "head_timeout", "body_timeout", "idle_timeout", "send_timeout", "linger_timeout":
        for wrong in 0, -1, "5":
            with pytest.raises(ValueError, match=name):
                HttpServer(**{name: wrong})
        HttpServer(**{name: None})
    for name, wrong in {"max_unread": None, "max_cookies": -1, "max_query_fields": 1.5, "max_chunk_line": "1", "max_body": -1,
                        "max_head": None, "max_fields": "9", "min_body_rate": -1}.items():
        with pytest.raises(ValueError, match=name):
            HttpServer(**{name: wrong})
    with pytest.raises(ValueError, match="min_body_rate"):
        HttpServer(min_body_rate="x")


# ---- middleware ------------------------------------------------------------------------------------------------

@simulated
async def test_the_first_middleware_is_the_outermost_and_errors_are_answers_to_all():
    app, order = failing_app(), []

    def add(name):
        @app.middleware
        async def middleware(request, call_next):
            order.append(name)
            if name == "inner" and request.query.get("fail"):
                raise HttpError(402, "in the inner one")
            response = await call_next(request)
            assert isinstance(response, Response)
            response.headers.add("X-Through", f"{name} {response.status}")
            order.append(-len(name))
            return response

    add("outermost")
    add("middle")
    add("inner")
    async with serving(app) as world:
        answer = await world.get("/")
        assert answer.headers.get_all("x-through") == ["inner 200", "middle 200", "outermost 200"]
        assert order == ["outermost", "middle", "inner", -5, -6, -9]
        assert (await world.get("/teapot")).headers.get_all("x-through") == ["inner 418", "middle 418", "outermost 418"]
        assert (await world.get("/nowhere")).headers.get_all("x-through") == ["inner 404", "middle 404", "outermost 404"]
        answer = await world.get("/?fail=1")
        assert answer.status == 402 and answer.headers.get_all("x-through") == ["middle 402", "outermost 402"]


def test_a_middleware_may_answer_replace_and_fail(reports):
    @simulated
    async def test():
        app = plain_app()

        @app.middleware
        async def middleware(request, call_next):
            match request.query.get("do"):
                case "answer":
                    return {"by": "middleware"}
                case "tuple":
                    return 201, "made"
                case "replace":
                    response = await call_next(request)
                    response.content, response.stream = None, pieces(response.content, b" and more")
                    return response
                case "fail":
                    raise KeyError("in a middleware")
                case "after":
                    await call_next(request)
                    raise KeyError("after the handler")
                case "twice":
                    await call_next(request)
                case "host":
                    request.client, request.scheme, request.host = ("1.2.3.4", 5), "https", "outside"
                    request.state.known = True
                    return f"{request.url} {request.client[0]} {request.state.known}"
            return await call_next(request)

        async with serving(app) as world:
            assert (await world.get("/?do=answer")).content == b'{"by":"middleware"}'
            assert (await world.get("/?do=tuple")).status == 201
            assert (await world.get("/?do=replace")).content == b"hello and more"
            assert (await world.get("/?do=twice")).content == b"hello"
            assert (await world.get("/?do=host")).content == b"https://outside/?do=host 1.2.3.4 True"
            assert reports == []
            assert (await world.get("/?do=fail")).status == 500 and len(reports) == 1
            assert (await world.get("/?do=after")).status == 500 and len(reports) == 2

    test()


# ---- lifespans -------------------------------------------------------------------------------------------------

@simulated
async def test_lifespans_and_hooks_go_round_all_requests():
    app, order = plain_app(), []

    @app.on_startup
    def plain():
        order.append("startup")

    @app.lifespan
    async def around():
        order.append("enter")
        app.state.resource = "there"
        await flowcoro.sleep(1)
        yield
        await flowcoro.sleep(1)
        order.append("leave")

    @app.on_startup
    async def later():
        order.append("startup 2")

    @app.on_shutdown
    async def shutdown():
        await flowcoro.sleep(1)
        order.append("shutdown")

    @app.get("/resource")
    async def resource(request):
        order.append("request")
        return request.app.state.resource

    async with serving(app) as world:
        assert (await world.get("/resource")).content == b"there"
        assert app.statistics() == {"running": 1, "refused": 0}
        world.listener.close()
        await world.task
    assert order == ["startup", "enter", "startup 2", "request", "shutdown", "leave"]


@simulated
async def test_two_listeners_of_one_application_start_it_once():
    app, order = plain_app(), []

    @app.lifespan
    async def around():
        order.append("enter")
        await flowcoro.sleep(1)
        yield
        await flowcoro.sleep(1)
        order.append("leave")

    network = SimulatedNetwork()
    with network.host("server"):
        async with await app.listen("0.0.0.0", 80) as one, await app.listen("0.0.0.0", 81) as other:
            for _ in range(2):
                async with flowcoro.TaskGroup() as group:
                    tasks = [group.spawn(each.serve()) for each in (one, other)]
                    await flowcoro.sleep(3)
                    assert order == ["enter"] and app.statistics()["running"] == 2
                    one.close()
                    await tasks[0]
                    assert order == ["enter"]
                    async with await Socket.connect("server", 81) as sock:
                        await sock.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                        assert (await one_answer(sock)).content == b"hello"
                    other.close()
                    await flowcoro.sleep(0.5)
                    again = await app.listen("0.0.0.0", 82)         # while it shuts down: it is started anew, afterwards
                    async with again:
                        tasks.append(group.spawn(again.serve()))
                        await flowcoro.sleep(5)
                        assert order == ["enter", "leave", "enter"]
                        again.close()
                        await tasks[2]
                break
    assert order == ["enter", "leave"] * 2 and app.statistics()["running"] == 0


@simulated
async def test_an_error_of_a_start_ends_the_serving_and_what_was_begun():
    app, order = plain_app(), []

    @app.lifespan
    async def around():
        try:
            yield
        finally:
            order.append("left")

    @app.on_startup
    async def fail():
        raise OSError("no database")

    network = SimulatedNetwork()
    with network.host("server"):
        async with await app.listen("0.0.0.0", 80) as listener:
            with pytest.raises(OSError, match="no database"):
                await listener.serve()
    assert order == ["left"] and app.statistics()["running"] == 0


@simulated
async def test_a_close_while_the_application_starts_is_no_error():
    app, order = plain_app(), []

    @app.lifespan
    async def around():
        await flowcoro.sleep(5)
        order.append("started")
        yield
        order.append("ended")

    async with serving(app) as world:
        await flowcoro.sleep(1)
        world.listener.close()
        await world.task
    assert order == ["started", "ended"]


@simulated
async def test_an_error_of_a_shutdown_leaves_serve_after_all_others_have_ended():
    app, order = plain_app(), []

    @app.on_shutdown
    async def first():
        order.append("first")

    @app.on_shutdown
    async def fail():
        raise OSError("not flushed")

    network = SimulatedNetwork()
    with network.host("server"):
        async with await app.listen("0.0.0.0", 80) as listener, flowcoro.TaskGroup() as group:
            async def serve():
                with pytest.raises(OSError, match="not flushed"):
                    await listener.serve()

            task = group.spawn(serve())
            await flowcoro.sleep(1)
            listener.close()
            await task
    assert order == ["first"] and app.statistics()["running"] == 0


@simulated
async def test_hooks_of_a_shutdown_are_called_also_when_the_server_is_cancelled_but_not_for_ever():
    app, order = plain_app(), []

    @app.on_shutdown
    async def endless():
        await flowcoro.sleep(10_000)

    @app.on_shutdown
    async def short():
        await flowcoro.sleep(1)
        order.append(flowcoro.now())

    network = SimulatedNetwork()
    with network.host("server"):
        async with await app.listen("0.0.0.0", 80) as listener:
            with pytest.raises(TimeoutError), flowcoro.move_on_after(5):
                await listener.serve()
            assert order == [6.0] and flowcoro.now() == 5.0 + flowcoro_http.SHUTDOWN_TIMEOUT


# ---- streams ---------------------------------------------------------------------------------------------------

class Stream:
    """An endless stream of 1,000 bytes, which says what has become of it."""

    def __init__(self, endless=False, delay=0.0):
        self.count, self.closed, self.endless, self.delay = 0, None, endless, delay

    async def pieces(self):
        try:
            while True:
                self.count += 1
                yield b"x" * 1000
                await flowcoro.sleep(self.delay)
        finally:
            self.closed = flowcoro.now()

    def app(self, **options):
        app = plain_app(**options)

        @app.get("/stream")
        async def stream(request):
            response = Response(200, self.pieces())
            response.endless = self.endless
            return response
        return app


@simulated
async def test_a_client_that_does_not_read_stops_the_stream_and_is_cut_in_the_end():
    stream = Stream()
    async with serving(stream.app(send_timeout=30.0)) as world, await world.connect() as sock:
        await sock.write(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        await flowcoro.sleep(5)
        count = stream.count
        assert 10 < count < 1000                    # what fits into the buffers of both ends
        await flowcoro.sleep(20)
        assert stream.count == count and stream.closed is None
        await sock.read_exactly(100_000)            # progress: the time begins anew
        await flowcoro.sleep(20)
        assert stream.count > count and stream.closed is None
        await flowcoro.sleep(15)
        assert stream.closed is not None
        with pytest.raises(BrokenError):
            while await sock.read():
                pass


@simulated
async def test_whoever_asks_and_does_not_read_is_cut_too_and_was_not_read_from():
    async with serving(plain_app(send_timeout=30.0)) as world, await world.connect() as sock:
        sent = 0

        async def ask():
            nonlocal sent
            while True:
                await sock.write(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000)
                sent += 1000

        before = flowcoro.now()
        with pytest.raises(BrokenError):
            await ask()
        assert sent < 1_000_000 and 30 <= flowcoro.now() - before < 33


@simulated
async def test_a_body_that_the_handler_has_not_asked_for_is_not_received():
    app, read = HttpServer(), flowcoro.Event()

    @app.post("/")
    async def later(request):
        await read.wait()
        return str(len(await request.body()))

    async with serving(app) as world, await world.connect() as sock, flowcoro.TaskGroup() as group:
        await sock.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        upload = group.spawn(sock.write(b"x" * 1_000_000))
        await flowcoro.sleep(100)
        [connection] = world.listener._run.connections.values()
        assert connection.sock.statistics()["bytes_received"] <= flowcoro_http.CHUNK and not upload.done()
        read.set()
        assert (await one_answer(sock, "POST")).content == b"1000000"


@simulated
async def test_a_generator_is_closed_when_its_client_goes():
    for endless in False, True:
        for quick in False, True:
            stream = Stream(endless, 0.0 if quick else 1000.0)
            async with serving(stream.app()) as world:
                sock = await world.connect()
                await sock.write(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
                await sock.read_exactly(500)
                await flowcoro.sleep(5)
                await sock.close()
                before = flowcoro.now()
                await until(lambda: stream.closed)
                assert stream.closed - before < 2


def test_a_stream_that_breaks_off_is_cut_so_that_the_client_can_tell(reports):
    @simulated
    async def test():
        app, closed = plain_app(), []

        async def source():
            try:
                yield b"some"
                await flowcoro.sleep(1)
                raise KeyError("broken")
            finally:
                closed.append(True)

        @app.get("/chunks")
        async def chunks(request):
            return source()

        @app.get("/length")
        async def length(request):
            return 200, source(), [("Content-Length", "10")]

        @app.get("/short")
        async def short(request):
            return 200, pieces(b"some"), [("Content-Length", "10")]

        @app.get("/long")
        async def long(request):
            return 200, pieces(b"some", b"more and more"), [("Content-Length", "10")]

        @app.get("/upstream")
        async def upstream(request):
            async def stream():
                yield b"some"
                raise BrokenError(104, "another connection")
            return stream()

        async with serving(app) as world:
            number = 0
            for path in b"/chunks", b"/length", b"/short", b"/long", b"/upstream":
                for version in b"1.1", b"1.0":
                    number += 1
                    async with await world.connect() as sock:
                        await sock.write(b"GET %s HTTP/%s\r\nHost: a\r\n\r\n" % (path, version))
                        data = b""
                        with pytest.raises(BrokenError):        # a reset, and no end
                            while True:
                                data += await sock.read()
                    assert b"some" in data and not data.endswith(b"0\r\n\r\n")
                    assert len(reports) == number
        assert len(closed) == 4

    test()


@simulated
async def test_trailers_go_out_after_chunks_to_a_client_that_takes_them_and_nowhere_else():
    app = HttpServer()

    @app.get("/")
    async def with_trailers(request):
        async def stream():
            yield b"content"
            response.trailers = [("Sum", "7")]

        response = Response(200, stream())
        return response

    async with serving(app) as world:
        for te in b"TE: trailers\r\n", b"TE: gzip;q=0.5\r\nTE: Trailers\r\n":
            assert (await world.get("/", te)).trailers.items() == [("Sum", "7")]
        for te in b"", b"TE: gzip, trailer\r\n":
            answer = await world.get("/", te)
            assert answer.content == b"content" and answer.trailers is None and answer.status == 200
        [answer] = await world.talk(b"GET / HTTP/1.0\r\nTE: trailers\r\n\r\n")
        assert answer.content == b"content" and answer.trailers is None


@simulated
async def test_a_body_can_be_streamed_back_while_it_comes():
    app = HttpServer()

    @app.post("/")
    async def upper(request):
        async def stream():
            async for data in request.stream():
                yield data.upper()
        return stream()

    async with serving(app) as world, await world.connect() as sock:
        await sock.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        head = await sock.read_until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200") and await sock.read_until(b"ABC\r\n") == b"3\r\nABC\r\n"
        await sock.write(b"2\r\nde\r\n0\r\n\r\n")
        assert await sock.read_until(b"0\r\n\r\n") == b"2\r\nDE\r\n0\r\n\r\n"
        await sock.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")
        assert (await one_answer(sock, "POST")).content == b"X"


@simulated
async def test_an_iterator_is_closed_even_if_nothing_was_asked_of_it():
    app, files = HttpServer(), []

    @app.get("/")
    async def lines(request):
        files.append(io.BytesIO(b"a\nb\n"))
        return files[-1]

    async with serving(app) as world:
        assert (await world.get("/")).content == b"a\nb\n"
        await world.get("/", method="HEAD")
        assert [file.closed for file in files] == [True, True]


def test_a_stream_that_fails_while_it_is_closed_has_been_sent(reports):
    @simulated
    async def test():
        app = plain_app()

        class Source:
            def __init__(self):
                self.of = iter([b"a"])

            def __aiter__(self):
                return self

            async def __anext__(self):
                for piece in self.of:
                    return piece
                raise StopAsyncIteration

            async def aclose(self):
                raise KeyError("closing")

        @app.get("/source")
        async def source(request):
            return Source()

        async with serving(app) as world:
            found = await world.talk(b"GET /source HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET", "GET")
            assert [answer.content for answer in found] == [b"a", b"hello"]

    test()
    assert reports


@pytest.fixture
def content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 4000)
    return path


def file_app(path, count=None, offset=0, headers=()):
    app, files = plain_app(), []

    @app.get("/file")
    async def file(request):
        files.append(path.open("rb"))
        size = path.stat().st_size - offset if count is None else count
        return Response(200, flowcoro_http._FileStream(files[-1], offset, size), headers)

    return app, files


def test_files_are_sent_and_closed(content):
    @simulated
    async def test():
        app, files = file_app(content, offset=100)
        async with serving(app) as world:
            for method in "GET", "HEAD":
                answer = await world.get("/file", method=method)
                assert answer.content == (content.read_bytes()[100:] if method == "GET" else b"")
                assert method == "HEAD" or answer.headers["content-length"] == str(1_024_000 - 100)
            [answer] = await world.talk(b"GET /file HTTP/1.0\r\n\r\n")
            assert answer.content == content.read_bytes()[100:]
            assert all(file.closed for file in files)

    test()


def test_a_file_that_is_shorter_than_announced_is_cut_and_a_wrong_length_is_none(content, reports):
    @simulated
    async def test():
        app, files = file_app(content, count=1_024_001)
        async with serving(app) as world, await world.connect() as sock:
            await sock.write(b"GET /file HTTP/1.1\r\nHost: a\r\n\r\n")
            with pytest.raises(BrokenError):
                await everything(sock)
        assert files[0].closed and len(reports) == 1
        app, files = file_app(content, headers=[("Content-Length", "5")])
        async with serving(app) as world:
            assert (await world.get("/file")).status == 500
        assert files[0].closed and len(reports) == 2

    test()


def test_what_answers_a_file_whose_head_cannot_be_may_take_its_time(content, reports):
    @simulated
    async def test():
        app, _ = file_app(content, headers=[("Transfer-Encoding", "chunked")])
        app.send_timeout = 1.0                  # for one who does not read; this one waits

        @app.error_handler(500)
        async def slow(request, error):
            await flowcoro.sleep(10)
            return "answered"

        async with serving(app) as world, await world.connect() as sock:
            await sock.write(b"GET /file HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await one_answer(sock)).content == b"answered"

    test()


def test_the_file_of_an_answer_that_is_not_sent_is_closed(content):
    @simulated
    async def test():
        app, files = file_app(content)

        @app.middleware
        async def another(request, call_next):
            await call_next(request)
            return "another"

        async with serving(app) as world:
            assert (await world.get("/file")).content == b"another"
        gc.collect()
        assert files[0].closed

    test()


# ---- clients that go -------------------------------------------------------------------------------------------

def waiting_app(seconds=10_000, **options):
    app, ended = plain_app(**options), []

    @app.route("/wait", methods=["GET", "POST"])
    async def wait(request):
        try:
            await flowcoro.sleep(seconds)
        except flowcoro.Cancelled:
            ended.append(flowcoro.now())
            raise
        return "waited"

    return app, ended


@simulated
async def test_a_handler_is_cancelled_when_its_client_is_gone():
    for way in "close", "reset":
        app, ended = waiting_app()
        async with serving(app) as world:
            sock = await world.connect()
            await sock.write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
            await flowcoro.sleep(5)
            assert ended == []
            if way == "reset":
                sock.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            before = flowcoro.now()
            sock.close_nowait()
            await until(lambda: ended)
            assert ended[0] - before < 2.5 * flowcoro_http.SWEEP


@simulated
async def test_a_client_that_has_ended_its_half_still_gets_an_answer_that_comes_soon():
    app, ended = waiting_app(0.4)
    async with serving(app) as world:
        for delay in 0.0, 0.1, 0.2, 0.3, 0.4:               # wherever the sweep is
            async with await world.connect() as sock:
                await flowcoro.sleep(delay)
                await sock.write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
                await sock.shutdown_write()
                [answer] = answers(await everything(sock))
                assert answer.content == b"waited"
        assert ended == []


@simulated
async def test_a_client_that_ends_its_half_late_has_time_too():
    app, ended = waiting_app(10.4)
    async with serving(app) as world:
        for number in range(10):                            # wherever the sweep is
            await flowcoro.sleep(0.05 * number)
            async with await world.connect() as sock:
                await sock.write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
                await flowcoro.sleep(10.05)
                await sock.shutdown_write()
                [answer] = answers(await everything(sock))
                assert answer.content == b"waited"
        assert ended == []


def test_a_client_that_goes_while_its_body_is_awaited_is_nobodys_error(reports):
    @simulated
    async def test():
        async with serving(plain_app()) as world:
            for reset in False, True:
                sock = await world.connect()
                await sock.write(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc")
                await flowcoro.sleep(1)
                if reset:
                    sock.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close_nowait()
                await flowcoro.sleep(5)
            assert world.listener.statistics()["connections"] == 0
            assert world.listener.statistics()["failed"] == 0

    test()
    assert reports == []


# ---- deadlines -------------------------------------------------------------------------------------------------

@simulated
async def test_a_head_has_so_many_seconds_however_it_comes():
    async with serving(plain_app(head_timeout=10.0)) as world:
        for interval in 1.0, 0.3:
            async with await world.connect() as sock:
                await flowcoro.sleep(7)                     # idle: no head has begun
                before, refused = flowcoro.now(), []

                async def drip():
                    with contextlib.suppress(BrokenError):
                        for byte in b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100:
                            await sock.write(bytes([byte]))
                            await flowcoro.sleep(interval)

                async with flowcoro.TaskGroup() as group:
                    group.spawn(drip())
                    refused = answers(await everything(sock))
                    group.cancel()
                assert refused[0].status == 408 and not refused[0].keep_alive
                assert 10.0 <= flowcoro.now() - before <= 10.0 + 3 * flowcoro_http.SWEEP


@simulated
async def test_the_deadline_of_a_head_is_for_each_request_of_a_connection():
    async with serving(plain_app(head_timeout=10.0)) as world, await world.connect() as sock:
        for _ in range(5):
            for part in b"GET / HT", b"TP/1.1\r\nHos", b"t: a\r\n\r\n":
                await sock.write(part)
                await flowcoro.sleep(4)
            assert (await one_answer(sock)).content == b"hello"
        await sock.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT")          # the next one begins with this one's answer
        before = flowcoro.now()
        ok, refused = answers(await everything(sock), "GET", "GET")
        assert (ok.status, refused.status) == (200, 408) and 10 <= flowcoro.now() - before < 12


@simulated
async def test_an_idle_connection_is_closed_without_a_word():
    async with serving(plain_app(idle_timeout=60.0)) as world:
        for used in False, True:
            async with await world.connect() as sock:
                if used:
                    await sock.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                    await one_answer(sock)
                before = flowcoro.now()
                assert await everything(sock) == b""
                assert 60 <= flowcoro.now() - before < 62


@simulated
async def test_a_body_has_so_many_seconds_in_all_whatever_the_handler_does_between():
    app = plain_app(body_timeout=30.0)

    @app.post("/slow")
    async def slow(request):
        async for _ in request.stream():
            await flowcoro.sleep(0.7)
        return "all"

    async with serving(app) as world:
        for path in b"/echo", b"/slow", b"/ignore":
            async with await world.connect() as sock:
                before = flowcoro.now()
                await sock.write(b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n" % path)

                async def upload():
                    with contextlib.suppress(BrokenError):
                        for _ in range(200):
                            await sock.write(b"x" * 1000)
                            await flowcoro.sleep(1)

                async with flowcoro.TaskGroup() as group:
                    group.spawn(upload())
                    [answer] = answers(await everything(sock), "POST")
                    group.cancel()
                assert answer.status == (200 if path == b"/ignore" else 408)
                assert 29 <= flowcoro.now() - before < 36


@simulated
async def test_a_body_has_a_least_rate_after_a_while():
    async with serving(plain_app(min_body_rate=100)) as world:
        for rate, status in [(90, 408), (120, 200)]:
            async with await world.connect() as sock:
                await sock.write(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3600\r\n\r\n")

                async def upload():
                    with contextlib.suppress(BrokenError):
                        for at in range(0, 3600, rate):
                            await sock.write(b"x" * min(rate, 3600 - at))
                            await flowcoro.sleep(1)

                async with flowcoro.TaskGroup() as group:
                    group.spawn(upload())
                    assert (await one_answer(sock, "POST")).status == status
                    group.cancel()


@simulated
async def test_a_body_may_begin_slowly():
    async with serving(plain_app(min_body_rate=100)) as world:
        async with await world.connect() as sock:
            await sock.write(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\n")
            await flowcoro.sleep(4.5)
            await sock.write(b"x" * 900)
            assert (await one_answer(sock, "POST")).status == 200


def test_a_client_that_is_too_slow_or_sends_too_much_fills_no_log(reports):
    @simulated
    async def test():
        app = plain_app(body_timeout=5.0)

        @app.post("/repeat")
        async def repeat(request):
            request.max_body = 10
            async for piece in request.stream():
                yield piece

        async with serving(app) as world:
            for more in b"", b"x" * 10:
                async with await world.connect() as sock:
                    await sock.write(b"POST /repeat HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\nx")
                    await sock.read_until(b"x\r\n")
                    await sock.write(more)
                    with pytest.raises(BrokenError):
                        await everything(sock)

    test()
    assert reports == []


@simulated
async def test_what_came_with_the_head_counts_for_the_rate():
    async with serving(plain_app(min_body_rate=100)) as world, await world.connect() as sock:
        await sock.write(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1000)
        await flowcoro.sleep(8)
        await sock.write(b"x")
        assert (await one_answer(sock, "POST")).status == 200


@simulated
async def test_none_is_no_deadline():
    app = plain_app(head_timeout=None, body_timeout=None, idle_timeout=None, min_body_rate=None)
    async with serving(app) as world, await world.connect() as sock:
        await flowcoro.sleep(5000)
        await sock.write(b"POST /ec")
        await flowcoro.sleep(5000)
        await sock.write(b"ho HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n")
        await flowcoro.sleep(5000)
        await sock.write(b"x")
        assert (await one_answer(sock, "POST")).content == b"x"


@simulated
async def test_a_deadline_that_strikes_as_the_last_bytes_come_has_no_consequences():
    app = plain_app(idle_timeout=20.0)

    @app.post("/late")
    async def late(request):
        request._source.fault = HttpError(408, "too late")
        return await request.body()

    async with serving(app) as world, await world.connect() as sock:
        await sock.write(b"POST /late HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n")
        await flowcoro.sleep(1)
        await sock.write(b"x")
        assert (await one_answer(sock, "POST")).content == b"x"
        assert await everything(sock) == b""            # idle, and no 408


# ---- what is refused -------------------------------------------------------------------------------------------

REFUSED = {
    b"GET / HTTP/1.1\n\n": 400, b"GET / HTTP/1.1\r\n\r\n": 400, b"GET / HTTP/2.0\r\nHost: a\r\n\r\n": 505,
    b"\x16\x03\x01\x02\x00\x01": 400, b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n": 400,
    b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n": 414,
    b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 20_000 + b"\r\n\r\n": 431,
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 101 + b"\r\n": 431,
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n": 400,
    b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\n": 413,
    b"HEAD / HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\n": 413,
    b"GET /%zz HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/3.1\r\n\r\n": 505,
}


@pytest.mark.parametrize("request_", REFUSED, ids=lambda request: repr(request[:40]))
@simulated
async def test_what_is_refused_gets_its_answer_and_is_closed(request_):
    async with serving(plain_app(max_body=1_000_000)) as world, await world.connect() as sock:
        await sock.write(request_)
        method = "HEAD" if request_.startswith(b"HEAD") else "GET"
        methods = ["GET"] * (request_.count(b"\r\n\r\n") > 1 and b"%zz" in request_) + [method]
        answer = answers(await everything(sock), *methods)[-1]
        assert answer.status == REFUSED[request_] and not answer.keep_alive
        assert answer.headers["connection"] == "close" and (answer.content or method == "HEAD")


@simulated
async def test_an_answer_arrives_although_the_client_still_sends():
    """Without reading on, the system would reset the connection, and the client would lose what it has not read."""
    async with serving(plain_app(max_body=1000)) as world:
        for request in b"BAD\r\n", b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n\r\n":
            for half in False, True:
                async with await world.connect() as sock:
                    await sock.write(request + b"x" * 1_500_000)
                    if half:
                        await sock.shutdown_write()
                    await flowcoro.sleep(1)
                    [answer] = answers(await everything(sock), "POST")
                    assert answer.status in (400, 413)
        assert world.app.statistics()["refused"] == 4


@simulated
async def test_whoever_sends_on_for_ever_is_left_after_a_while():
    async with serving(plain_app()) as world, await world.connect() as sock:
        before = flowcoro.now()
        with pytest.raises(BrokenError):
            await sock.write(b"BAD\r\n")
            while True:
                await sock.write(b"x" * 1000)
                await flowcoro.sleep(0.01)
        assert 1 < flowcoro.now() - before < 4


@simulated
async def test_and_so_is_whoever_sends_much_however_soon(monkeypatch):
    monkeypatch.setattr(flowcoro_http, "MAX_LINGER", 100_000)
    async with serving(plain_app(linger_timeout=1000)) as world, await world.connect() as sock:
        sent = 0
        with pytest.raises(BrokenError):
            await sock.write(b"BAD\r\n")
            while sent < 10_000_000:
                await sock.write(b"x" * 10_000)
                sent += 10_000
        assert flowcoro.now() < 900


# ---- the end ---------------------------------------------------------------------------------------------------

@simulated
async def test_a_close_ends_idle_connections_at_once_and_answers_what_is_under_way():
    app, ended = waiting_app(3)
    async with serving(app) as world:
        idle, busy, fresh, partial, uploading = [await world.connect() for _ in range(5)]
        await idle.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await one_answer(idle)
        await busy.write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await partial.write(b"GET / HT")
        await uploading.write(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n")
        await flowcoro.sleep(1)
        before = flowcoro.now()
        world.listener.close()
        world.listener.close()
        assert await idle.read() == b"" and flowcoro.now() - before < 0.01
        await fresh.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")         # it was accepted: it is answered
        await partial.write(b"TP/1.1\r\nHost: a\r\n\r\n")
        await uploading.write(b"x")
        for sock, content in (fresh, b"hello"), (partial, b"hello"), (uploading, b"x"), (busy, b"waited"):
            [answer] = answers(await everything(sock))
            assert answer.content == content and not answer.keep_alive
        assert flowcoro.now() - before < 3
        with pytest.raises(BrokenError):
            await world.connect()
        for sock in idle, busy, fresh, partial, uploading:
            await sock.close()
        await world.task
        assert flowcoro.now() - before < 3


@simulated
async def test_who_has_not_asked_for_anything_is_closed_soon():
    async with serving(plain_app()) as world, await world.connect() as sock:
        await flowcoro.sleep(10)
        before = flowcoro.now()
        world.listener.close()
        assert await sock.read() == b"" and flowcoro.now() - before < 2.5 * flowcoro_http.SWEEP
        await world.task


@simulated
async def test_an_answer_that_was_being_sent_is_completed_and_then_the_connection_ends():
    app = HttpServer()

    @app.get("/")
    async def large(request):
        return b"x" * 1_000_000

    @app.get("/stream")
    async def stream(request):
        for _ in range(10):
            yield b"x" * 100_000

    async with serving(app) as world:
        for path in b"/", b"/stream":
            async with await world.connect() as sock:
                await sock.write(b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % path)
                await flowcoro.sleep(1)
                if path == b"/stream":
                    before = flowcoro.now()
                    world.listener.close()
                    [answer] = answers(await everything(sock))
                    assert flowcoro.now() - before < 0.3
                else:
                    answer = await one_answer(sock)
                assert len(answer.content) == 1_000_000
        before = flowcoro.now()
        await world.task
        assert flowcoro.now() - before < 0.1


@simulated
async def test_endless_streams_end_between_two_pieces_when_the_server_closes():
    for delay in 1000.0, 0.0:
        stream = Stream(endless=True, delay=delay)
        async with serving(stream.app()) as world, await world.connect() as sock:
            await sock.write(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
            await flowcoro.sleep(3)
            before = flowcoro.now()
            world.listener.close()
            await flowcoro.sleep(1)
            [answer] = answers(await everything(sock))           # whole, also where a write was under way
            assert len(answer.content) % 1000 == 0 and len(answer.content) == stream.count * 1000
            assert stream.closed is not None and flowcoro.now() - before < 4
            await sock.close()
            await world.task


@simulated
async def test_an_endless_stream_that_begins_after_the_close_has_a_head_and_an_end():
    app = HttpServer()

    @app.get("/")
    async def late(request):
        await flowcoro.sleep(3)
        response = Response(200, pieces(b"never"))
        response.endless = True
        return response

    async with serving(app) as world, await world.connect() as sock:
        await sock.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await flowcoro.sleep(1)
        world.listener.close()
        [answer] = answers(await everything(sock))
        assert answer.content == b"" and answer.status == 200


@simulated
async def test_after_the_drain_timeout_what_is_left_is_cancelled():
    app, ended = waiting_app()
    stream = Stream(delay=1)
    app.add("/stream", stream.app().find("GET", "/stream").handler)
    async with serving(app, drain_timeout=5.0) as world:
        busy, streaming, old = [await world.connect() for _ in range(3)]
        await busy.write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await streaming.write(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        await old.write(b"GET /stream HTTP/1.0\r\n\r\n")
        await flowcoro.sleep(1)
        before = flowcoro.now()
        world.listener.close()
        await world.task
        assert 5 <= flowcoro.now() - before < 6 and len(ended) == 1
        assert await busy.read() == b""
        for sock in streaming, old:                 # no end that would look like one
            with pytest.raises(BrokenError):
                await everything(sock)
        for sock in busy, streaming, old:
            await sock.close()


@simulated
async def test_a_stop_is_a_close():
    app, ended = waiting_app(2)
    async with serving(app) as world, await world.connect() as sock:
        await sock.write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
        await flowcoro.sleep(1)
        flowcoro.request_stop()
        [answer] = answers(await everything(sock))
        assert answer.content == b"waited" and not answer.keep_alive
        await sock.close()
        await world.task


# ---- other protocols, and more than an answer ------------------------------------------------------------------

UPGRADE = b"GET /up HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: first, Shout\r\n\r\n"


def upgrading_app(then=None):
    app = plain_app()

    @app.route("/up", methods=["GET", "POST"])
    async def up(request):
        sock = await request.upgrade("shout", {"X-A": "b"})
        if then is not None:
            return await then(request, sock)
        while data := await sock.read():
            await sock.write(data.upper())

    return app


@simulated
async def test_a_timeout_for_answers_is_none_for_what_was_upgraded():
    app = upgrading_app()
    app.middleware(flowcoro_http.timeout(5))
    async with serving(app) as world, await world.connect() as sock:
        await sock.write(UPGRADE)
        await sock.read_until(b"\r\n\r\n")
        await flowcoro.sleep(100)
        await sock.write(b"late")
        assert await sock.read_exactly(4) == b"LATE"


@simulated
async def test_the_access_log_has_101_for_what_was_upgraded():
    app, lines = upgrading_app(), []
    app.middleware(flowcoro_http.access_log(lines.append))
    async with serving(app) as world, await world.connect() as sock:
        await sock.write(UPGRADE)
        await sock.read_until(b"\r\n\r\n")
    assert len(lines) == 1 and lines[0].endswith('"GET /up HTTP/1.1" 101 -')


@simulated
async def test_an_upgrade_with_what_was_sent_too_early():
    async with serving(upgrading_app()) as world, await world.connect() as sock:
        await sock.write(UPGRADE + b"early ")
        head = await sock.read_until(b"\r\n\r\n")
        assert head == b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: shout\r\nConnection: Upgrade\r\nX-A: b\r\n\r\n"
        await sock.write(b"bird")
        assert await sock.read_exactly(10) == b"EARLY BIRD"
        await flowcoro.sleep(1000)                      # no deadline is ours any more
        await sock.write(b"late")
        await sock.shutdown_write()
        assert await everything(sock) == b"LATE"


@simulated
async def test_an_upgrade_that_was_not_offered_or_comes_with_a_content():
    async with serving(upgrading_app()) as world:
        answer = await world.get("/up")
        assert (answer.status, answer.headers["upgrade"]) == (426, "shout") and "connection" in answer.headers
        [answer] = await world.talk(UPGRADE.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert answer.status == 426
        [answer] = await world.talk(
            UPGRADE.replace(b"\r\n\r\n", b"\r\nContent-Length: 1\r\n\r\nx").replace(b"GET", b"POST"), "POST")
        assert answer.status == 400
        found = await world.talk(UPGRADE.replace(b"/up", b"/") + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET", "GET")
        assert [answer.content for answer in found] == [b"hello", b"hello"]


@pytest.mark.parametrize("error", [KeyError("after"), HttpError(404), None, "result"], ids=repr)
def test_a_handler_that_upgrades_and_fails(error, reports):
    async def then(request, sock):
        await sock.write(b"bye")
        if error == "result":
            return "counts for nothing"
        if error is not None:
            raise error

    @simulated
    async def test():
        async with serving(upgrading_app(then)) as world, await world.connect() as sock:
            await sock.write(UPGRADE)
            await sock.read_until(b"\r\n\r\n")
            assert await everything(sock) == b"bye"     # and no answer after it
            assert world.listener.statistics()["failed"] == 0

    test()
    assert len(reports) == (error not in (None, "result")) and not any("500" in message for message, _ in reports)


@simulated
async def test_an_upgraded_connection_is_told_when_the_server_closes_and_cancelled_after_the_drain_timeout():
    told = []

    async def then(request, sock):
        await request.closing.wait()
        told.append(flowcoro.now())
        await flowcoro.sleep(1000)

    async with serving(upgrading_app(then), drain_timeout=5.0) as world, await world.connect() as sock:
        await sock.write(UPGRADE)
        await sock.read_until(b"\r\n\r\n")
        before = flowcoro.now()
        world.listener.close()
        await world.task
        assert told == [before] and 5 <= flowcoro.now() - before < 6
        assert await sock.read() == b""


@simulated
async def test_informational_responses_before_the_answer():
    app = HttpServer()

    @app.route("/", methods=["POST", "GET"])
    async def hints(request):
        await request.inform(103, {"Link": "</style.css>; rel=preload"})
        await request.inform(103)
        for wrong in 101, 200, 99:
            with pytest.raises(ValueError):
                await request.inform(wrong)
        if request.version == "1.1":
            with pytest.raises(flowcoro_http.LocalProtocolError):
                await request.inform(103, [("Content-Length", "5")])
        return await request.body()

    async with serving(app) as world:
        answer = await world.post("/", b"x")
        assert (answer.before, answer.content) == ([103, 103], b"x")
        [answer] = await world.talk(b"GET / HTTP/1.0\r\n\r\n")
        assert answer.before == [] and answer.status == 200


@simulated
async def test_a_write_that_was_cancelled_is_never_gone_on_with():
    """The answer would stand in the middle of something that the client has in part."""
    app = HttpServer()

    @app.get("/")
    async def hints(request):
        with flowcoro.move_on_after(5):
            while True:
                await request.inform(103, [("Link", "x" * 1000)])
        return "the answer"

    async with serving(app) as world, await world.connect() as sock:
        await sock.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await flowcoro.sleep(20)
        data = b""
        with pytest.raises(BrokenError):
            while True:
                data += await sock.read()
        assert b"the answer" not in data


# ---- any conversation ------------------------------------------------------------------------------------------

def talkative_app():
    app = plain_app()

    @app.get("/nap")
    async def nap(request):
        await flowcoro.sleep(0.2)
        return "rested"

    @app.get("/stream")
    async def stream(request):
        for number in range(int(request.query["n"])):
            yield str(number)

    @app.post("/first")
    async def first(request):
        async for data in request.stream():
            return data[:1]
        return "none"

    @app.post("/back")
    async def back(request):
        async def stream():
            async for data in request.stream():
                yield data
        return stream()

    return app


def any_request(chance):
    """(bytes, method, content of the answer): of any kind."""
    content = chance.randbytes(chance.choice([0, 1, 10, 3000]))
    if chance.random() < 0.5:
        framed = b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    else:
        framed, rest = b"Transfer-Encoding: chunked\r\n\r\n", content
        while rest:
            size = chance.randint(1, len(rest))
            framed += b"%x\r\n%s\r\n" % (size, rest[:size])
            rest = rest[size:]
        framed += b"0\r\n" + b"Sum: 1\r\n" * chance.randint(0, 1) + b"\r\n"
    count = chance.randint(0, 5)
    return chance.choice([
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET", b"hello"), (b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "HEAD", b""),
        (b"GET /nap HTTP/1.1\r\nHost: a\r\n\r\n", "GET", b"rested"),
        (b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n", "GET", b"there is no /nowhere"),
        (b"GET /stream?n=%d HTTP/1.1\r\nHost: a\r\n\r\n" % count, "GET", "".join(map(str, range(count))).encode()),
        (b"HEAD /stream?n=5 HTTP/1.1\r\nHost: a\r\n\r\n", "HEAD", b""),
        (b"POST /ignore HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\n" + framed, "POST", b"ignored"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", "GET", b"hello"),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\n" + framed, "POST", content),
        (b"POST /back HTTP/1.1\r\nHost: a\r\n" + framed, "POST", content),
        (b"POST /first HTTP/1.1\r\nHost: a\r\n" + framed, "POST", content[:1] or b"none"),
        (b"POST /ignore HTTP/1.1\r\nHost: a\r\n" + framed, "POST", b"ignored"),
        (b"POST / HTTP/1.1\r\nHost: a\r\n" + framed, "POST", b"/ takes GET, HEAD, OPTIONS, and not POST"),
    ])


ENDS = [(b"", None, None), (b"NO HTTP\r\n", "GET", 400), (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "GET", 200),
        (b"GET / HTTP/1.0\r\n\r\n", "GET", 200), (b"GET / HTTP/1.1\r\nHost: a", "GET", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc", "POST", 400)]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_conversation_is_answered_as_it_has_to_be(seed, reports):
    chance = random.Random(seed)

    @run_in_kernel(seed=seed, timeout=10_000)
    async def test():
        async with serving(talkative_app(), network={"split": 0.3, "jitter": 0.05, "loss": 0.02}) as world:
            async def client():
                asked = [any_request(chance) for _ in range(chance.randint(1, 30))]
                end, method, status = chance.choice(ENDS)
                data = b"".join(request for request, *_ in asked) + end

                async def write():
                    at = 0
                    while at < len(data):
                        size = chance.choice([1, 10, 500, 10_000])
                        await sock.write(data[at:at + size])
                        at += size
                        if chance.random() < 0.2:
                            await flowcoro.sleep(chance.random() / 2)
                    await sock.shutdown_write()

                async with await world.connect() as sock, flowcoro.TaskGroup() as group:
                    group.spawn(write())
                    found = answers(await everything(sock), *[method for _, method, _ in asked], *[method] * (method is not None))
                assert [answer.content for answer in found[:len(asked)]] == [content for *_, content in asked]
                assert status is None or found[-1].status == status and not found[-1].keep_alive

            await flowcoro.when_all(*[client() for _ in range(3)])

    test()
    assert reports == []


def damaged(data, chance):
    """With some bytes changed, doubled, or left out."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 10])):
        at = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                del data[at:at + chance.choice([1, 2, 50])]
            case 2:
                data[at:at] = data[at:at + chance.choice([1, 2, 50])]
            case 3:
                data[at:at] = chance.choice([b"\r\n", b"\n", b"\r", b" ", b":", b"\0", b"0", b"\r\n\r\n", b"\xff",
                                             b"Content-Length: 5\r\n"])
        if not data:
            return b"x"
    return bytes(data)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_bytes_come_is_answered_by_whole_messages_or_not_at_all(seed, reports):
    chance = random.Random(seed)

    @run_in_kernel(seed=seed, timeout=100_000)
    async def test():
        async with serving(talkative_app(), network={"split": 0.3}) as world:
            for _ in range(10):
                requests = [any_request(chance)[0] for _ in range(chance.randint(1, 4))]
                data = damaged(b"".join(request for request in requests if b"HEAD" not in request and b"/back" not in request)
                               or b"x", chance)                 # (an answer that is made of the request breaks off with it)
                async with await world.connect() as sock:
                    with contextlib.suppress(BrokenError):
                        await sock.write(data)
                        await sock.shutdown_write()
                    rest = await everything(sock)
                while rest:                             # each is whole, and no other method than GET and POST has been made
                    codec = HttpConnection("client")
                    codec.send_message(RequestHead("GET", "/", [("Host", "server")]))
                    codec.receive_data(rest)
                    codec.receive_end()
                    while type(event := codec.next_event()) is not EndOfMessage:
                        if type(event) is ResponseHead:
                            assert event.status in (200, 204, 400, 404, 405, 408, 413, 414, 431, 500, 501, 505), data
                    assert codec.keep_alive or not codec.trailing_data
                    rest = codec.trailing_data
            statistics = world.listener.statistics()
            assert statistics["failed"] == 0

    test()
    assert [error for _, error in reports if not isinstance(error, (ValueError, KeyError))] == []      # of ?n=, damaged


@pytest.mark.parametrize("seed", SEEDS)
def test_clients_that_go_anywhere_leave_nothing(seed, reports):
    chance = random.Random(seed)

    @run_in_kernel(seed=seed, timeout=100_000)
    async def test():
        stream = Stream(delay=0.1)
        app = stream.app()
        app.include(talkative_app(), prefix="/talk")
        async with serving(app, network={"split": 0.3, "jitter": 0.05}) as world:
            async def client():
                data = b"".join(any_request(chance)[0].replace(b" /", b" /talk/") for _ in range(5))
                data += b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n" * chance.randint(0, 1)
                sock = await world.connect()
                with flowcoro.move_on_after(chance.random() * 2), contextlib.suppress(BrokenError):
                    await sock.write(data[:chance.randint(1, len(data))])
                    for _ in range(chance.randint(0, 10)):
                        await sock.read(chance.choice([1, 100, 10_000]))
                if chance.random() < 0.5:
                    sock.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close_nowait()

            await flowcoro.when_all(*[client() for _ in range(10)])
            await flowcoro.sleep(5)
            statistics = world.listener.statistics()
            assert statistics["connections"] == 0 and statistics["failed"] == 0
            assert (stream.count == 0) == (stream.closed is None)

    test()
    assert reports == []


# ---- on the system's network -----------------------------------------------------------------------------------

@contextlib.asynccontextmanager
async def listening(app, host="127.0.0.1", port=0, *, serve=types.MappingProxyType({}), **options):
    async with await app.listen(host, port, **options) as listener, flowcoro.TaskGroup() as group:
        group.spawn(listener.serve(**serve))
        try:
            yield listener
        finally:
            listener.close()


async def fetch(sock, path=b"/", method=b"GET", body=b""):
    length = b"Content-Length: %d\r\n" % len(body) if body else b""
    await sock.write(b"%s %s HTTP/1.1\r\nHost: a\r\n%s\r\n%s" % (method, path, length, body))
    return await one_answer(sock, method.decode())


def about_app():
    app = plain_app()

    @app.get("/about")
    async def about(request):
        return {"client": request.client, "server": request.server, "tls": request.tls, "scheme": request.scheme,
                "url": request.url}

    return app


def test_http_client_and_urllib_are_served():
    """Clients that others have written: keep-alive, HEAD, uploads by length and by chunks, errors, redirects, streams."""
    app = plain_app(redirect_slashes=True)

    @app.get("/folder/")
    async def folder(request):
        return "in it"

    @app.get("/stream")
    async def stream(request):
        for number in range(3):
            yield f"{number} "

    def by_http_client(host, port):
        connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
        with contextlib.closing(connection):
            found = []
            for method, path, body in [("GET", "/", None), ("HEAD", "/", None), ("POST", "/echo", b"x" * 100_000),
                                       ("POST", "/echo", iter([b"in ", b"chunks"])), ("GET", "/nowhere", None),
                                       ("GET", "/stream", None), ("OPTIONS", "/echo", None), ("PUT", "/echo", b"")]:
                connection.request(method, path, body)
                response = connection.getresponse()
                found.append((response.status, response.read()))
                assert not response.will_close
                sockets.add(connection.sock)
            return found

    def by_urllib(url):
        with urllib.request.urlopen(url + "/folder", timeout=PATIENCE) as response:         # a 308, from Python 3.11 on
            assert (response.status, response.url, response.read()) == (200, url + "/folder/", b"in it")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url + "/nowhere", timeout=PATIENCE)
        with caught.value as error:
            assert error.code == 404 and error.headers["Connection"] == "close"
        with urllib.request.urlopen(url + "/echo", b"posted", timeout=PATIENCE) as response:
            assert response.read() == b"posted"

    sockets = set()

    async def main():
        async with listening(app) as listener:
            found = await flowcoro.to_thread(by_http_client, *listener.local)
            assert found[:7] == [(200, b"hello"), (200, b""), (200, b"x" * 100_000), (200, b"in chunks"),
                                 (404, b"there is no /nowhere"), (200, b"0 1 2 "), (204, b"")]
            assert found[7] == (200, b"") and len(sockets) == 1
            await flowcoro.to_thread(by_urllib, listener.url)

    run(main)


def test_a_handshake_of_tls_has_as_long_as_a_head(certificates):  # noqa: F811
    async def main():
        app = plain_app(head_timeout=0.05)
        tls = server_tls(*certificates.good)
        async with await app.listen("127.0.0.1", 0, tls=tls) as listener, flowcoro.TaskGroup() as group:
            group.spawn(listener.serve())
            async with await Socket.connect(*listener.local) as sock:
                with flowcoro.timeout(PATIENCE / 2):
                    assert await everything(sock) == b""
            assert listener.statistics()["handshakes_failed"] == 1
            listener.close()

    run(main)


def test_tls_and_reload_of_its_certificate(certificates, tmp_path):  # noqa: F811
    pair = tmp_path / "cert.pem", tmp_path / "key.pem"

    def put(certificate):
        for source, target in zip(certificate, pair):
            shutil.copy(source, target)

    async def name_of(listener):
        context = client_tls(ca=certificates.ca)
        context.check_hostname = False
        async with await Socket.connect(*listener.local, tls=context) as sock:
            answer = await fetch(sock, b"/about")
            assert b'"scheme":"https"' in answer.content and b'"tls":"TLSv1.3"' in answer.content
            return sock.tls.getpeercert()["subject"][0][0][1]

    async def main():
        put(certificates.good)
        async with listening(about_app(), tls=tuple(map(str, pair))) as listener:
            assert listener.url == f"https://127.0.0.1:{listener.local[1]}"
            context = client_tls(ca=certificates.ca)
            async with await Socket.connect(*listener.local, tls=context, server_name="localhost") as old:
                assert (await fetch(old)).content == b"hello"
                assert await name_of(listener) == "good"
                put(certificates.other_name)
                listener.reload_certificate()
                assert await name_of(listener) == "other"
                put((certificates.good[0], certificates.other_name[1]))         # they do not fit: nothing changes
                with pytest.raises(ssl.SSLError):
                    listener.reload_certificate()
                assert await name_of(listener) == "other"
                os.kill(os.getpid(), signal.SIGHUP)
                await flowcoro.checkpoint()
                assert len(reports) == 1 and await name_of(listener) == "other"
                put(certificates.good)
                os.kill(os.getpid(), signal.SIGHUP)
                await flowcoro.checkpoint()
                assert await name_of(listener) == "good"
                listener.reload_certificate(*certificates.other_name)
                assert await name_of(listener) == "other"
                assert (await fetch(old)).content == b"hello"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        async with await about_app().listen("127.0.0.1", 0, tls=server_tls(*certificates.good)) as listener:
            with pytest.raises(RuntimeError, match="pass a certificate"):
                listener.reload_certificate()
        async with await about_app().listen("127.0.0.1", 0) as listener:
            with pytest.raises(RuntimeError, match="no TLS"):
                listener.reload_certificate(*certificates.good)

    reports = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", reports.append)
        run(main)


@pytest.mark.parametrize("how", ["tls", "without epoll"])
def test_a_handler_is_cancelled_when_such_a_client_is_gone(how, certificates, monkeypatch):  # noqa: F811
    monkeypatch.setattr(flowcoro_http, "SWEEP", 0.05)
    if how != "tls":
        monkeypatch.setattr(flowcoro, "_new_poller", lambda: flowcoro._LevelPoller(selectors.PollSelector()))

    async def main():
        app, ended = waiting_app()
        async with listening(app, tls=certificates.good if how == "tls" else None) as listener:
            context = client_tls(ca=certificates.ca) if how == "tls" else None
            sock = await Socket.connect(*listener.local, tls=context, server_name="localhost" if context else None)
            await sock.write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
            connection = None
            while connection is None or connection.since < 0.1:     # it is looked after, and not taken for one that is gone
                connection = next(iter(listener._run.connections.values()), None)
                await flowcoro.sleep(0.01)
            assert ended == []
            sock.close_nowait()
            while not ended:
                await flowcoro.sleep(0.01)

    run(main)


def test_what_a_client_has_sent_before_its_end_is_dropped_too_so_that_the_answer_arrives():
    async def main():
        async with listening(plain_app()) as listener:
            with socket.create_connection(listener.local, timeout=PATIENCE) as plain:
                plain.sendall(b"BAD\r\n" + b"x" * 2 * flowcoro_http.CHUNK)          # before the server has a turn
                plain.shutdown(socket.SHUT_WR)
                data = await flowcoro.to_thread(drain, plain)
                assert answers(data)[0].status == 400

    run(main)


@pytest.mark.parametrize("read", [True, False])
def test_a_handler_may_return_what_a_client_has_got(read):
    """Its fields about that connection, and about a coding that has been undone, are not those of this one."""
    async def main():
        origin, proxy = HttpServer(), HttpServer()
        origin.middleware(flowcoro_http.compress())

        @origin.get("/{kind}")
        async def answer(request, kind):
            if kind == "stream":
                return pieces(b"a" * 5000, b"b" * 5000)
            return 203, "x" * 10_000, [("Connection", "X-Hop"), ("X-Hop", "1"), ("X-End", "2"), ("ETag", '"x"'),
                                         ("Keep-Alive", "timeout=5")]

        @proxy.get("/{kind}")
        async def relay(request, kind):
            if read:
                return await client.get(f"{listener.url}/{kind}")
            return await client.stream("GET", f"{listener.url}/{kind}").__aenter__()

        async with listening(origin) as listener, listening(proxy) as near, flowcoro_http.HttpClient() as client:
            async with await Socket.connect(*near.local) as sock:
                for _ in range(3):
                    found = await fetch(sock, b"/whole")
                    assert (found.status, found.content) == (203, b"x" * 10_000)
                    assert found.headers["x-end"] == "2" and not {"x-hop", "keep-alive", "content-encoding"} & {
                        name.lower() for name, _ in found.headers}
                    found = await fetch(sock, b"/whole", b"HEAD")
                    assert (found.status, found.content) == (203, b"")
                    assert (await fetch(sock, b"/stream")).content == b"a" * 5000 + b"b" * 5000

    run(main)


def test_a_unix_socket(tmp_path):
    async def main():
        path = tmp_path / "http"
        async with listening(about_app(), unix=path, mode=0o600) as listener:
            assert listener.local == listener.url == str(path) and path.stat().st_mode & 0o777 == 0o600
            async with await Socket.connect_unix(path) as sock:
                assert (await fetch(sock, b"/about")).content == (
                    b'{"client":null,"server":"%s","tls":null,"scheme":"http","url":"http://a/about"}' % str(path).encode())
        assert not path.exists()

    run(main)


def test_addresses_of_both_ends():
    async def main():
        async with listening(about_app()) as listener, await Socket.connect(*listener.local) as sock:
            content = json.loads((await fetch(sock, b"/about")).content)
            assert content == {"client": list(sock.local), "server": list(listener.local), "tls": None, "scheme": "http",
                               "url": "http://a/about"}
            assert listener.addresses and repr(listener) == f"<HttpListener {listener.url}>"

    run(main)


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers(workers):
    async def main():
        app = plain_app()

        @app.get("/stream")
        async def stream(request):
            for number in range(20):
                yield f"{number} "
                await flowcoro.checkpoint()

        async with listening(app) as listener:
            async def client():
                async with await Socket.connect(*listener.local) as sock:
                    for number in range(30):
                        assert (await fetch(sock)).content == b"hello"
                        assert (await fetch(sock, b"/echo", b"POST", b"x" * number)).content == b"x" * number
                        assert (await fetch(sock, b"/stream")).content.endswith(b" 19 ")

            await flowcoro.when_all(*[client() for _ in range(10)])
            assert listener.statistics()["failed"] == 0

    run(main, workers=workers)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_server_that_closes_while_it_is_busy(workers, reports):
    """Wherever the requests are: each client has its answers, or an end between two of them, or none at all."""
    async def main():
        for number in range(30):
            app = plain_app(idle_timeout=None)
            async with await app.listen("127.0.0.1", 0) as listener, flowcoro.TaskGroup() as group:
                async def client():
                    with contextlib.suppress(BrokenError):
                        async with await Socket.connect(*listener.local) as sock:
                            while True:
                                await sock.write(b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")
                                if not (data := await sock.read()):
                                    return
                                assert data.endswith(b"\r\n\r\nx"), data

                serving_ = group.spawn(listener.serve())
                while not app.statistics()["running"]:
                    await flowcoro.checkpoint()
                clients = [group.spawn(client()) for _ in range(5)]
                for _ in range(number * 5):
                    await flowcoro.checkpoint()
                listener.close()
                await serving_
                for each in clients:
                    await each

    run(main, workers=workers)
    assert reports == []


PROCESSES = """
import os, signal, sys
import flowcoro
from flowcoro_http import HttpServer

app = HttpServer()

def say(*words):                  # at once, for others write there too
    os.write(1, " ".join(map(str, words)).encode() + b"\\n")

@app.on_startup
def startup():
    app.state.pid = os.getpid()
    say("startup", os.getpid())

@app.on_shutdown
async def shutdown():
    await flowcoro.sleep(0.01)
    say("shutdown", os.getpid())

@app.get("/")
async def pid(request):
    assert app.state.pid == os.getpid()
    return str(os.getpid())

@app.get("/slow")
async def slow(request):
    say("slow")
    await flowcoro.sleep(0.3)
    return "slow"

async def main():
    async with await app.listen("127.0.0.1", 0) as listener:
        say(listener.local[1])
        await listener.serve(processes=2)
    say("ended")

flowcoro.run(main())
"""


def test_processes_have_their_lifespans_each_and_drain(tmp_path):
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", PROCESSES], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    with process:
        try:
            port = int(process.stdout.readline())
            started = {process.stdout.readline() for _ in range(2)}
            pids = {line.split()[1] for line in started if line.startswith("startup")}
            assert len(pids) == 2
            seen, idle = set(), []
            for _ in range(100):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
                idle.append(connection)
                connection.request("GET", "/")
                seen.add(connection.getresponse().read().decode())
            assert seen <= pids and seen
            slow = idle[0]
            slow.request("GET", "/slow")
            assert process.stdout.readline() == "slow\n"
            process.send_signal(signal.SIGTERM)
            response = slow.getresponse()
            assert response.read() == b"slow"
            rest = process.stdout.read().split("\n")
            assert {line.split()[1] for line in rest if line.startswith("shutdown")} == pids and "ended" in rest
            assert process.wait(PATIENCE) == 0
            for connection in idle:
                connection.close()
        finally:
            process.kill()


def test_run_serves_until_it_is_told_to_stop():
    code = ("from flowcoro_http import HttpServer\napp = HttpServer()\n@app.get('/')\nasync def hello(request): return 'hello'\n"
            "app.run('127.0.0.1', 0)\nprint('ended')")
    for number in signal.SIGINT, signal.SIGTERM:
        with subprocess.Popen([sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              cwd=ROOT, text=True) as process:
            try:
                line = process.stderr.readline()
                url = re.search("serving on (http://127.0.0.1:[0-9]+) ", line)[1]
                with urllib.request.urlopen(url, timeout=PATIENCE) as response:
                    assert response.read() == b"hello"
                process.send_signal(number)
                assert process.stdout.read() == "ended\n" and process.stderr.read() == "" and process.wait(PATIENCE) == 0
            finally:
                process.kill()


def test_run_passes_the_number_of_connections_on():
    with pytest.raises(ValueError, match="max_connections=0"):
        HttpServer().run("127.0.0.1", 0, max_connections=0)


def test_what_is_no_lifespan_is_refused_where_it_is_added():
    async def without_yield():
        pass

    def without_async():
        yield

    for wrong in without_yield, without_async:
        with pytest.raises(TypeError, match="lifespan.*yield"):
            HttpServer().lifespan(wrong)


@pytest.mark.parametrize("options", ["", "processes=1", "workers=2", "drain_timeout=None"])
def test_the_first_ctrl_c_has_what_is_under_way_answered(options):
    code = ("import flowcoro\nfrom flowcoro_http import HttpServer\napp = HttpServer()\n@app.get('/')\nasync def slow(request):\n"
            "    print('here', flush=True)\n    await flowcoro.stop_requested()\n    await flowcoro.checkpoint()\n"
            "    return 'slow'\n"
            f"app.run('127.0.0.1', 0, {options})\nprint('ended')")
    with subprocess.Popen([sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=ROOT, text=True) as process:
        try:
            port = int(re.search("serving on http://127.0.0.1:([0-9]+) ", process.stderr.readline())[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.request("GET", "/")
            assert process.stdout.readline() == "here\n"
            process.send_signal(signal.SIGINT)
            response = connection.getresponse()
            assert response.read() == b"slow" and response.headers["connection"] == "close"
            connection.close()
            assert process.stdout.read() == "ended\n" and process.stderr.read() == "" and process.wait(PATIENCE) == 0
        finally:
            process.kill()


def test_the_second_ctrl_c_ends_at_once():
    code = ("import flowcoro\nfrom flowcoro_http import HttpServer\napp = HttpServer()\n@app.get('/')\nasync def slow(request):\n"
            "    print('here', flush=True)\n    await flowcoro.stop_requested()\n    print('asked', flush=True)\n"
            "    await flowcoro.Event().wait()\napp.run('127.0.0.1', 0, drain_timeout=1000)\nprint('ended')")
    with subprocess.Popen([sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=ROOT, text=True) as process:
        try:
            port = int(re.search("serving on http://127.0.0.1:([0-9]+) ", process.stderr.readline())[1])
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
                for line in "here\n", "asked\n":
                    assert process.stdout.readline() == line
                    process.send_signal(signal.SIGINT)
                assert process.stdout.read() == "ended\n" and process.stderr.read() == "" and process.wait(PATIENCE) == 0
        finally:
            process.kill()


def test_reload_gives_new_processes_another_application():
    code = textwrap.dedent("""
        import flowcoro, os, signal
        from flowcoro_http import HttpServer

        def make(text):
            app = HttpServer()
            @app.get("/")
            async def hello(request):
                return text
            return app

        async def main():
            async with await make("old").listen("127.0.0.1", 0) as listener:
                print(listener.local[1], flush=True)
                await listener.serve(processes=1, reload=lambda: make("new"))

        flowcoro.run(main())
    """)

    def ask():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE) as response:
            return response.read()

    with subprocess.Popen([sys.executable, "-W", "error", "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        try:
            port = int(process.stdout.readline())
            assert ask() == b"old"
            process.send_signal(signal.SIGHUP)
            until = time.monotonic() + PATIENCE
            while ask() != b"new":
                assert time.monotonic() < until
            process.terminate()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def test_reload_needs_processes():
    async def main():
        async with await plain_app().listen("127.0.0.1", 0) as listener:
            with pytest.raises(ValueError, match="reload= needs processes="):
                await listener.serve(reload=print)
            with pytest.raises(RuntimeError):
                listener.reload()

    run(main)


# ---- nothing is left, nobody starves ---------------------------------------------------------------------------

def test_a_connection_that_asks_without_end_does_not_starve_others():
    async def main():
        async with listening(plain_app()) as listener:
            greedy, modest = await Socket.connect(*listener.local), await Socket.connect(*listener.local)
            async with greedy, modest, flowcoro.TaskGroup() as group:
                async def ask_for_ever():
                    while True:
                        await greedy.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)

                async def read_for_ever():
                    while data := await greedy.read():
                        count[0] += data.count(b"HTTP/1.1 200")

                count = [0]
                group.spawn(ask_for_ever())
                group.spawn(read_for_ever())
                while not count[0]:
                    await flowcoro.checkpoint()
                most = 0
                for _ in range(20):
                    before = count[0]
                    assert (await fetch(modest)).content == b"hello"
                    most = max(most, count[0] - before)
                assert most < 2000, f"{most} of the greedy one's requests came before one of the modest one's"
                group.cancel()

    run(main)


def test_5_000_requests_leave_nothing_behind():
    async def main():
        app = plain_app()

        @app.middleware
        async def through(request, call_next):
            request.state.x = 1
            return await call_next(request)

        @app.get("/stream")
        async def stream(request):
            yield "x"

        @app.get("/fail")
        async def fail(request):
            raise HttpError(404)

        @app.get("/{number:int}")
        async def number(request, number):
            response = Response(200, [number], [("X-Number", str(number))])
            response.set_cookie("number", str(number))
            return response

        async with listening(app) as listener, await Socket.connect(*listener.local) as sock:
            kinds = (b"GET /%d?a=b HTTP/1.1\r\nHost: a\r\nCookie: x=%d\r\n\r\n" b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
                     b"GET /stream HTTP/1.1\r\nHost: a\r\nX-%d: y\r\n\r\n" b"GET /fail HTTP/1.1\r\nHost: a\r\n\r\n"
                     b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nX-A: %d\r\n\r\nx")

            async def some(begin, end):
                for at in range(begin, end, 20):
                    await sock.write(b"".join(kinds % (number, number, number, number) for number in range(at, at + 20)))
                    seen = b""
                    while seen.count(b"HTTP/1.1 ") < 100 or not seen.endswith(b"\r\n\r\nx"):
                        seen += await sock.read()

            def forget():
                """What is remembered of lines and heads, which has limits of its own."""
                for table in flowcoro_http._RECEIVED, flowcoro_http._SENT, flowcoro_http._KNOWN_HEADS, flowcoro_http._KNOWN_LINES:
                    table.clear()
                gc.collect()

            tracemalloc.start()
            await some(0, 200)
            forget()
            before = tracemalloc.get_traced_memory()[0]
            tasks = flowcoro.statistics()["tasks"]["alive"]
            await some(200, 1200)
            forget()
            grown = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            assert grown < 50_000, f"{grown} bytes more after 5,000 requests"            # an object each would be 80,000
            assert flowcoro.statistics()["tasks"]["alive"] == tasks

    run(main)


def test_connections_leave_nothing_behind():
    async def main():
        async with listening(plain_app()) as listener:
            async def some(count):
                for number in range(count):
                    async with await Socket.connect(*listener.local) as sock:
                        if number % 3 == 0:
                            await fetch(sock)
                        elif number % 3 == 1:
                            await sock.write(b"BAD\r\n\r\n")
                            await everything(sock)
                        else:
                            await sock.write(b"GET / HT")
                while listener.statistics()["connections"]:
                    await flowcoro.sleep(0.01)

            await some(30)
            gc.collect()
            before, objects = flowcoro.statistics(), len(gc.get_objects())
            await some(150)
            gc.collect()
            assert flowcoro.statistics()["tasks"]["alive"] == before["tasks"]["alive"]
            assert len(gc.get_objects()) - objects < 500
            assert not listener._run.connections

    run(main)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_connection_cancelled_anywhere_leaves_nothing(workers, tmp_path, reports, monkeypatch):
    """Each suspension of a conversation that uses all of a connection is cancelled once."""
    monkeypatch.setattr(flowcoro_http, "SPOOLED", 10)
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100_000)
    opened = []

    async def main():
        app, points = plain_app(), []

        @app.post("/form")
        async def form(request):
            fields = await request.form()
            opened.append(fields["f"].file)
            return str(fields["f"].size)

        @app.get("/stream")
        async def stream(request):
            opened.append(contextlib.closing(None))
            for _ in range(3):
                yield b"x" * 100
                await flowcoro.checkpoint()

        @app.get("/file")
        async def file(request):
            opened.append(path.open("rb"))
            return Response(200, flowcoro_http._FileStream(opened[-1], 0, 100_000))

        @app.get("/up")
        async def up(request):
            sock = await request.upgrade("shout")
            await sock.write((await sock.read_exactly(4)).upper())

        body = (b'--b\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' + b"y" * 1000 + b"\r\n--b--\r\n")
        conversation = (
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" b"POST /ignore HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
            b"POST /form HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n%s"
            b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n" b"GET /file HTTP/1.1\r\nHost: a\r\n\r\n"
            b"GET /up HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: shout\r\n\r\nloud" % (len(body), body))
        serve = flowcoro_http._Connection.serve

        async def cancelled(self):
            with flowcoro.CancelScope() as scope:
                await cancelled_at(scope, len(points) + 1, serve(self))
            points.append(scope.cancelled_caught)

        monkeypatch.setattr(flowcoro_http._Connection, "serve", cancelled)
        async with listening(app) as listener:
            while not points or points[-1]:
                with contextlib.suppress(BrokenError):
                    async with await Socket.connect(*listener.local) as sock:
                        await sock.write(conversation)
                        data = await everything(sock)
                while listener.statistics()["connections"]:
                    await flowcoro.sleep(0)
                assert all(getattr(file, "closed", True) for file in opened)
            assert data.endswith(b"LOUD") and len(points) > 15 and listener.statistics()["failed"] == 0

    run(main, workers=workers)
    assert reports == []


@pytest.mark.parametrize("at", ["lifespan", "serving"])
def test_serving_cancelled_anywhere_leaves_nothing(at):
    async def main():
        app, order = plain_app(), []

        @app.lifespan
        async def around():
            order.append(1)
            try:
                await flowcoro.checkpoint()
                yield
                await flowcoro.checkpoint()
            finally:
                order.append(-1)

        async def server():
            async with await app.listen("127.0.0.1", 0) as listener, flowcoro.TaskGroup() as group:
                async def client():
                    with contextlib.suppress(BrokenError):
                        async with await Socket.connect(*listener.local) as sock:
                            await fetch(sock)
                    listener.close()

                if at == "serving":
                    group.spawn(client())
                else:
                    listener._server._closing.set()
                await listener.serve()
                group.cancel()

        assert await at_each_point(server) > 3
        assert sum(order) == 0 and app.statistics()["running"] == 0

    run(main)
