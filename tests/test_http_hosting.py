"""flowcoro_http, hosting: WSGI applications in threads, and ASGI applications that wait only on receive and send."""

import asyncio
import contextvars
import collections
import errno
import gc
import gzip
import http.client
import io
import os
import queue
import sys
import tempfile
import threading
import time
import weakref
import wsgiref.validate

import pytest

import flowcoro
import flowcoro_http
import flowcoro_net
from flowcoro_http import HttpServer, Request, asgi_app, wsgi_app
from http_helpers import serving

PATIENCE = 10           # seconds until a test counts as hanging; each takes some hundredths


@pytest.fixture(autouse=True)
def quick_sweep(monkeypatch):
    """That a client is gone is noticed by the sweep, which usually comes twice a second."""
    monkeypatch.setattr(flowcoro_http, "SWEEP", 0.01)


def hosting(handler, client, prefix="/"):
    """What `await client(server)` returns, while `handler` is mounted at `prefix` of that server."""
    async def main():
        app = HttpServer()
        app.mount(prefix, handler)
        if hasattr(handler, "lifespan"):
            app.lifespan(handler.lifespan)
        with flowcoro.timeout(PATIENCE):
            async with serving(app) as server:
                return await client(server)
    return flowcoro.run(main())


class Answer:
    """A response, read by http.client."""

    def __init__(self, raw, method="GET"):
        self.raw = raw
        response = http.client.HTTPResponse(self, method=method)
        response.begin()
        self.status, self.reason, self.headers, self.body = response.status, response.reason, response.headers, response.read()

    def makefile(self, mode):
        return io.BytesIO(self.raw)


async def exchange(server, data):
    """Send these bytes over a connection of their own, and read until it ends."""
    async with await flowcoro_net.Socket.connect(*server.local) as sock:
        await sock.write(data)
        return await read_all(sock)


async def read_all(sock):
    received = b""
    try:
        while data := await sock.read():
            received += data
    except flowcoro_net.BrokenError:
        received += b"<cut>"
    return received


def request(target="/", method="GET", headers=(), body=b"", *, close=True):
    lines = [f"{method} {target} HTTP/1.1", "Host: example.com", *(f"{name}: {value}" for name, value in headers)]
    if close:
        lines.append("Connection: close")
    if body and not any(name.lower() == "transfer-encoding" for name, _ in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(*pieces):
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def ask(handler, *args, prefix="/", **options):
    """One request to a hosted application: the Answer."""
    data = request(*args, **options)
    return Answer(hosting(handler, lambda server: exchange(server, data), prefix), options.get("method", "GET"))


def answering(content=b"hello", status="200 OK", headers=(("Content-Type", "text/plain"),)):
    """A WSGI application that returns `content`."""
    def application(environ, start_response):
        start_response(status, list(headers))
        return content if not isinstance(content, bytes) else [content]
    return application


def describing(environ, start_response):
    """A WSGI application that answers with its environ."""
    start_response("200 OK", [("Content-Type", "text/plain; charset=latin-1")])
    return [f"{name}={value}\n".encode("latin-1") for name, value in environ.items()
            if isinstance(value, (str, bool, tuple))]


def environ_of(answer):
    return dict(line.split("=", 1) for line in answer.body.decode("latin-1").splitlines())


# ---- WSGI: what wsgiref.validate checks ------------------------------------------------------------------------

def in_a_list(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"he", b"", b"llo"]


def in_a_generator(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"he"
    yield b""
    yield b"llo"


def by_write(environ, start_response):
    write = start_response("200 OK", [("Content-Type", "text/plain")])
    write(b"he")
    return [b"llo"]


def started_late(environ, start_response):
    def blocks():
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "5")])
        yield b"hello"
    return blocks()


def by_file_wrapper(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return environ["wsgi.file_wrapper"](io.BytesIO(b"hello"), 2)


def complaining(environ, start_response):
    environ["wsgi.errors"].write("")
    environ["wsgi.errors"].writelines([""])
    environ["wsgi.errors"].flush()
    return in_a_list(environ, start_response)


def reading(environ, start_response):
    source = environ["wsgi.input"]
    assert source.read(1) + source.readline(100) + b"".join(source.readlines()) == b"" or environ["REQUEST_METHOD"] == "POST"
    assert source.read(10) == b"" and list(source) == []
    return in_a_list(environ, start_response)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize("application", [in_a_list, in_a_generator, by_write, by_file_wrapper, complaining, reading])
def test_wsgiref_validate_has_nothing_to_say_against_how_an_application_is_called(application, method, reports):
    body = b"one\ntwo\nthree" if method == "POST" else b""
    answer = ask(wsgi_app(wsgiref.validate.validator(application)), "/x/y?z=1", method, body=body)
    assert answer.status == 200, (answer.body, reports)
    assert answer.body == (b"" if method == "HEAD" else b"hello") and reports == []


def test_an_application_may_start_its_answer_when_the_first_block_is_asked_for():
    answer = ask(wsgi_app(started_late))
    assert (answer.status, answer.body, answer.headers["Content-Length"]) == (200, b"hello", "5")


# ---- WSGI: the environ ----------------------------------------------------------------------------------------

def test_the_environ_has_the_parts_of_the_request():
    headers = [("Content-Type", "x/y"), ("X-One", "1")]
    environ = environ_of(ask(wsgi_app(describing), "/a%20b/%C3%A9?q=%20&r", "POST", headers, b"abc"))
    assert environ["REQUEST_METHOD"] == "POST" and environ["QUERY_STRING"] == "q=%20&r"
    assert environ["SCRIPT_NAME"] == "" and environ["PATH_INFO"].encode("latin-1").decode() == "/a b/é"
    assert environ["CONTENT_TYPE"] == "x/y" and environ["CONTENT_LENGTH"] == "3" and environ["HTTP_X_ONE"] == "1"
    assert "HTTP_CONTENT_TYPE" not in environ and "HTTP_CONTENT_LENGTH" not in environ
    assert environ["SERVER_PROTOCOL"] == "HTTP/1.1" and environ["SERVER_NAME"] == environ["REMOTE_ADDR"] == "127.0.0.1"
    assert environ["SERVER_PORT"].isdigit() and environ["HTTP_HOST"] == "example.com"
    assert environ["wsgi.url_scheme"] == "http" and environ["wsgi.version"] == "(1, 0)"
    assert environ["wsgi.multithread"] == "True" and environ["wsgi.run_once"] == "False"


@pytest.mark.parametrize("target, script, path", [("/app/x%2Fy/", "/app", "/x/y/"), ("/app", "/app", ""), ("/app/", "/app", "/"),
                                                  ("/caf%C3%A9/%C3%A9", "/caf\u00c3\u00a9", "/\u00c3\u00a9")])
def test_a_mounted_application_finds_its_prefix_in_script_name(target, script, path):
    async def main():
        app = HttpServer()
        app.mount("/app", wsgi_app(describing), encoded_slashes=True)
        app.mount("/caf\u00e9", wsgi_app(describing))
        async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve())
            raw = await exchange(server, request(target))
            server.close()
        return environ_of(Answer(raw))

    environ = flowcoro.run(main())
    assert (environ["SCRIPT_NAME"], environ["PATH_INFO"]) == (script, path)


def test_repeated_fields_are_joined_and_those_that_could_pass_for_others_are_left_out():
    headers = [("X-A", "1"), ("x-a", "2"), ("Cookie", "a=1"), ("Cookie", "b=2"), ("X_Forwarded_For", "evil"), ("Proxy", "evil")]
    environ = environ_of(ask(wsgi_app(describing), headers=headers))
    assert environ["HTTP_X_A"] == "1,2" and environ["HTTP_COOKIE"] == "a=1; b=2"
    assert "evil" not in environ.values()


def test_context_variables_of_the_request_are_there_in_the_thread():
    variable = contextvars.ContextVar("variable", default="unset")

    async def main():
        variable.set("set")
        handler = wsgi_app(lambda environ, start_response: answering(variable.get().encode())(environ, start_response))
        return (await handler(Request("GET", "/"))).content

    assert flowcoro.run(main()) == b"set"


def test_an_application_can_ask_its_kernel_to_run_a_coroutine():
    async def double(number):
        await flowcoro.sleep(0)
        return 2 * number

    def application(environ, start_response):
        return answering(str(flowcoro.run_from_thread(double(21))).encode())(environ, start_response)

    assert ask(wsgi_app(application)).body == b"42"


def test_a_request_leaves_no_garbage():
    class Thing:
        pass

    things = []

    def application(environ, start_response):
        environ["x.thing"] = thing = Thing()
        things.append(weakref.ref(thing))
        environ["wsgi.input"].read(1)
        return answering()(environ, start_response)

    async def client(server):
        data = request("/", "POST", [("Transfer-Encoding", "chunked")], chunked(b"abc"), close=False)
        async with await flowcoro_net.Socket.connect(*server.local) as sock:
            await sock.write(data)
            await sock.read_until(b"hello")
        with flowcoro.timeout(PATIENCE):
            while things[0]() is not None:              # the thread may need a moment to let go
                await flowcoro.sleep(0.001)

    gc.collect()
    gc.disable()
    try:
        hosting(wsgi_app(application), client)
    finally:
        gc.enable()


# ---- WSGI: answers --------------------------------------------------------------------------------------------

def test_an_answer_in_a_list_has_a_content_length_and_the_reason_that_was_given():
    answer = ask(wsgi_app(answering([b"a", b"bc"], "200 Fine")))
    assert (answer.reason, answer.headers["Content-Length"], answer.body) == ("Fine", "3", b"abc")


def test_a_block_reaches_the_client_while_the_application_makes_the_next():
    seen = threading.Event()

    def application(environ, start_response):
        start_response("200 OK", [])
        yield b"first"
        yield b"second" if seen.wait(PATIENCE) else b"nobody has seen the first"

    async def client(server):
        async with await flowcoro_net.Socket.connect(*server.local) as sock:
            await sock.write(request())
            head = await sock.read_until(b"first")
            seen.set()
            return Answer(head + await read_all(sock))

    answer = hosting(wsgi_app(application), client)
    assert answer.body == b"firstsecond" and answer.headers["Transfer-Encoding"] == "chunked"


def test_the_answer_to_head_says_no_length_that_it_does_not_know_and_asks_for_one_block_only():
    taken, closed = [], []

    class Blocks:
        def __iter__(self):
            for number in range(100):
                taken.append(number)
                yield b"block"

        def close(self):
            closed.append(True)

    def application(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return Blocks()

    answer = ask(wsgi_app(application), "/", method="HEAD")
    assert answer.status == 200 and "Content-Length" not in answer.headers and taken == [0] and closed == [True]
    assert ask(wsgi_app(answering([b"12345"])), "/", method="HEAD").headers["Content-Length"] == "5"
    assert ask(wsgi_app(answering([], headers=[("Content-Length", "7")])), "/", method="HEAD").headers["Content-Length"] == "7"


def test_close_of_the_iterable_is_called_once_also_when_it_fails():
    closed = []

    class Blocks(list):
        def close(self):
            closed.append("list")

    class Failing:
        def __iter__(self):
            return self

        def __next__(self):
            raise ValueError("no block")

        def close(self):
            closed.append("failing")

    assert ask(wsgi_app(answering(Blocks([b"x"])))).body == b"x"
    try:
        hook, sys.unraisablehook = sys.unraisablehook, lambda args: None
        assert ask(wsgi_app(answering(Failing()))).status == 500
    finally:
        sys.unraisablehook = hook
    assert closed == ["list", "failing"]


@pytest.mark.parametrize("offset", [0, 10])
def test_a_wrapped_file_is_sent_by_the_system_from_where_it_stands_and_closed(offset, monkeypatch):
    content, files = os.urandom(300_000), []
    monkeypatch.setattr(flowcoro_http._WsgiFile, "__iter__", None)        # nobody reads it in blocks

    def application(environ, start_response):
        file = tempfile.TemporaryFile()
        files.append(file)
        file.write(content)
        file.seek(offset)
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        return environ["wsgi.file_wrapper"](file, 1000)

    answer = ask(wsgi_app(application))
    assert answer.body == content[offset:] and answer.headers["Content-Length"] == str(300_000 - offset)
    assert files[0].closed


def test_a_wrapped_file_that_is_more_than_its_bytes_is_read(tmp_path):
    with gzip.open(tmp_path / "packed.gz", "wb") as file:
        file.write(b"unpacked" * 1000)

    def application(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return environ["wsgi.file_wrapper"](gzip.open(tmp_path / "packed.gz"))

    assert ask(wsgi_app(application)).body == b"unpacked" * 1000        # its descriptor has the packed ones


def test_a_wrapped_file_whose_client_has_gone_meanwhile_is_closed():
    began, gone, files = threading.Event(), threading.Event(), []

    def application(environ, start_response):
        began.set()
        gone.wait(PATIENCE)
        files.append(open(__file__, "rb"))
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](files[0])

    async def main():
        async with flowcoro.TaskGroup() as group:
            group.spawn(wsgi_app(application)(Request("GET", "/")))
            await flowcoro.to_thread(began.wait, PATIENCE)
            group.cancel()
        gone.set()
        with flowcoro.timeout(PATIENCE):
            while not files or not files[0].closed:
                await flowcoro.sleep(0.001)

    flowcoro.run(main())


def test_a_head_request_whose_application_writes_and_then_reads_on_is_served(monkeypatch):
    pushed = flowcoro_http._WsgiCall._push

    class Answers(queue.SimpleQueue):
        def put(self, answer):              # the application writes before its task goes on
            super().put(answer)
            time.sleep(0.02)

    def push(call, block):                  # and is not done with that when its task looks
        pushed(call, block)
        time.sleep(0.05)

    def application(environ, start_response):
        write = start_response("200 OK", [("Content-Type", "text/plain")])
        while piece := environ["wsgi.input"].read1(100_000):
            write(piece)
        return []

    monkeypatch.setattr(flowcoro_http._WsgiCall, "_push", push)
    monkeypatch.setattr(flowcoro_http.queue, "SimpleQueue", Answers)
    assert ask(wsgi_app(application), "/", "HEAD", [], b"x" * 100_000).status == 200


def test_a_client_that_does_not_read_holds_the_application_back():
    made, block = [], b"x" * 100_000

    def application(environ, start_response):
        start_response("200 OK", [])
        for number in range(1000):
            made.append(number)
            yield block

    async def client(server):
        async with await flowcoro_net.Socket.connect(*server.local) as sock:
            await sock.write(request())
            await sock.read(10)
            before = 0
            while before != len(made):              # until it makes no more
                before = len(made)
                await flowcoro.sleep(0.1)
            held = len(made)
            rest = 10
            while data := await sock.read(2**20):
                rest += len(data)
            return held, rest

    held, size = hosting(wsgi_app(application), client)
    assert held < 300 and len(made) == 1000 and size > 100_000_000


# ---- WSGI: content of requests --------------------------------------------------------------------------------

def echoing(environ, start_response):
    return answering(environ["wsgi.input"].read())(environ, start_response)


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 3_000_000])
def test_content_of_any_size_is_read_whole(size):
    body = os.urandom(size)
    assert ask(wsgi_app(echoing), "/", "POST", body=body).body == body


def test_chunked_content_is_read_to_its_end():
    pieces = [os.urandom(70_000), b"x", os.urandom(30_000)]
    answer = ask(wsgi_app(echoing), "/", "POST", [("Transfer-Encoding", "chunked")], chunked(*pieces))
    assert answer.body == b"".join(pieces)


def test_lines_are_read_from_the_connection_as_they_come():
    def application(environ, start_response):
        source = environ["wsgi.input"]
        first, rest = source.readline(), list(source)
        return answering([first.strip(), b"|", str(len(rest)).encode(), b"|", rest[-1]])(environ, start_response)

    body = b"first\n" + b"line\n" * 50_000 + b"last"
    assert ask(wsgi_app(application), "/", "POST", [("Transfer-Encoding", "chunked")], chunked(body)).body == b"first|50001|last"


def test_content_may_be_read_while_the_answer_is_written():
    def application(environ, start_response):
        start_response("200 OK", [])
        while data := environ["wsgi.input"].read(10_000):
            yield data

    body = os.urandom(500_000)
    assert ask(wsgi_app(application), "/", "POST", [("Transfer-Encoding", "chunked")], chunked(body)).body == body


@pytest.mark.parametrize("reads", [True, False])
def test_a_client_is_told_to_continue_only_when_the_application_reads(reads):
    def application(environ, start_response):
        content = environ["wsgi.input"].read() if reads else b"unread"
        return answering(content)(environ, start_response)

    async def client(server):
        async with await flowcoro_net.Socket.connect(*server.local) as sock:
            await sock.write(request("/", "POST", [("Content-Length", "4"), ("Expect", "100-continue")]))
            first = await sock.read_until(b"\r\n\r\n")
            if b" 100 " in first:
                await sock.write(b"data")
                first = b""
            return b" 100 " in first or not first, Answer(first + await read_all(sock)).body

    assert hosting(wsgi_app(application), client) == ((True, b"data") if reads else (False, b"unread"))


def test_content_beyond_the_limit_is_answered_with_413_when_it_is_read():
    async def limited(request, rest):
        request.max_body = 100_000
        return await handler(request, rest)

    handler = wsgi_app(echoing)
    answer = ask(limited, "/", "POST", [("Transfer-Encoding", "chunked")], chunked(b"x" * 200_000))
    assert answer.status == 413


def test_content_that_a_middleware_has_read_is_there_for_the_application():
    async def main():
        return (await wsgi_app(echoing)(Request("POST", "/", [("Content-Length", "3")], b"abc"))).content

    assert flowcoro.run(main()) == b"abc"


# ---- WSGI: errors ---------------------------------------------------------------------------------------------

def failing(environ, start_response):
    raise ZeroDivisionError("of the application")


def never_started(environ, start_response):
    return [b""]


def content_before_start(environ, start_response):
    return [b"x"]


def of_text(environ, start_response):
    start_response("200 OK", [])
    return ["text"]


def of_text_in_a_generator(environ, start_response):
    start_response("200 OK", [])
    yield "text"


def without_a_reason(environ, start_response):
    start_response("200", [])


def with_a_connection_field(environ, start_response):
    start_response("200 OK", [("Connection", "close")])


def splitting(environ, start_response):
    start_response("200 OK", [("X", "a\r\nSet-Cookie: evil")])


def started_twice(environ, start_response):
    start_response("200 OK", [])
    start_response("200 OK", [])


def exiting(environ, start_response):
    raise SystemExit(3)


def test_a_long_status_of_an_application_is_not_remembered():
    for length in 10, 5000:
        assert flowcoro_http._wsgi_status("200 " + "x" * length) == (200, "x" * length)
    known = flowcoro_http._wsgi_status.__self__
    assert 0 < max(map(len, known)) <= flowcoro_http.KNOWN_LINE


def too_long(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"abc"]


def too_short(environ, start_response):
    start_response("200 OK", [("Content-Length", "4")])
    return [b"abc"]


def returning_nothing(environ, start_response):
    start_response("200 OK", [])


@pytest.mark.parametrize("application, said", [
    (failing, "of the application"), (never_started, "start_response"), (content_before_start, "before start_response"),
    (of_text, "bytes"), (of_text_in_a_generator, "bytes"), (without_a_reason, "200 OK"), (with_a_connection_field, "Connection"),
    (splitting, "X"), (started_twice, "exc_info"), (exiting, "SystemExit"), (too_long, "Content-Length"),
    (too_short, "Content-Length"),
    (returning_nothing, "NoneType")])
def test_what_an_application_does_wrong_is_answered_with_500_and_reported_with_its_stack(application, said, reports):
    answer = ask(wsgi_app(application))
    assert answer.status == 500 and answer.body == b"Internal Server Error"
    (message, error), = reports
    assert said in str(error)
    while error.__cause__ is not None:
        error = error.__cause__
    names, trace = set(), error.__traceback__
    while trace is not None:
        names.add(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert application.__name__ in names or application in (never_started, content_before_start, of_text, too_long, too_short,
                                                             returning_nothing, of_text_in_a_generator)


def test_an_error_page_replaces_an_answer_that_has_not_begun():
    def application(environ, start_response):
        start_response("200 OK", [("X-Was", "ok")])
        try:
            raise KeyError("x")
        except KeyError:
            start_response("503 Later", [("X-Was", "bad")], sys.exc_info())
        return [b"sorry"]

    answer = ask(wsgi_app(application))
    assert (answer.status, answer.reason, answer.headers.get_all("X-Was"), answer.body) == (503, "Later", ["bad"], b"sorry")


async def leave_in_the_middle(server, closed):
    """Be a client that goes when some of the answer has come, and wait until the application has noticed."""
    sock = await flowcoro_net.Socket.connect(*server.local)
    await sock.write(request())
    await sock.read(1000)
    sock.close_nowait()
    assert await flowcoro.to_thread(closed.wait, PATIENCE)


def test_an_error_after_the_answer_has_begun_cuts_it_and_is_reported(reports):
    seen = threading.Event()

    def application(environ, start_response):
        start_response("200 OK", [])
        yield b"begun"
        seen.wait(PATIENCE)
        try:
            raise KeyError("too late")
        except KeyError:
            start_response("500 Error", [], sys.exc_info())

    async def client(server):
        async with await flowcoro_net.Socket.connect(*server.local) as sock:
            await sock.write(request())
            await sock.read_until(b"begun")
            seen.set()
            return await read_all(sock)

    rest = hosting(wsgi_app(application), client)
    assert b"0\r\n\r\n" not in rest and [type(error) for _, error in reports] == [KeyError]


@pytest.mark.parametrize("application", [None, "module:app", 5])
def test_what_is_no_application_is_refused_at_once(application):
    with pytest.raises(TypeError, match="wsgi_app"):
        wsgi_app(application)
    with pytest.raises(TypeError, match="asgi_app"):
        asgi_app(application)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "4", None, True])
def test_a_number_of_threads_that_makes_no_sense_is_refused(threads):
    with pytest.raises((TypeError, ValueError), match="threads="):
        wsgi_app(failing, threads=threads)


# ---- WSGI: clients that go ------------------------------------------------------------------------------------

def test_an_application_whose_client_has_gone_is_told_so_by_write_and_its_iterable_is_closed(reports):
    raised, closed = [], threading.Event()

    def application(environ, start_response):
        write = start_response("200 OK", [])
        try:
            while True:
                write(b"x" * 100_000)
        except Exception as error:
            raised.append(error)
            with pytest.raises(ConnectionAbortedError):         # and so is each that comes after it
                for _ in range(10):
                    write(b"x" * 100_000)
            raise
        finally:
            closed.set()

    hosting(wsgi_app(application), lambda server: leave_in_the_middle(server, closed))
    assert isinstance(raised[0], ConnectionAbortedError) and raised[0].errno == errno.ECONNABORTED and reports == []


def test_a_generator_whose_client_has_gone_is_closed_where_it_yields():
    closed = threading.Event()

    def application(environ, start_response):
        start_response("200 OK", [])
        try:
            while True:
                yield b"x" * 100_000
        finally:
            closed.set()

    hosting(wsgi_app(application), lambda server: leave_in_the_middle(server, closed))


def test_a_slow_generator_whose_client_has_gone_is_not_asked_for_more_than_the_block_it_is_at():
    go, closed, made = threading.Event(), threading.Event(), []

    def application(environ, start_response):
        start_response("200 OK", [])
        try:
            yield b"first"
            go.wait(PATIENCE)
            for number in range(100):
                made.append(number)
                yield b"later"
        finally:
            closed.set()

    async def main():
        response = await wsgi_app(application)(Request("GET", "/"))
        assert await anext(response.stream) == b"first"
        await response.stream.aclose()
        go.set()
        assert await flowcoro.to_thread(closed.wait, PATIENCE)

    flowcoro.run(main())
    assert made in ([], [0])


def test_the_answer_of_a_cancelled_request_is_dropped_when_the_thread_has_made_it(reports):
    running, go, ended = threading.Event(), threading.Event(), threading.Event()

    def application(environ, start_response):
        running.set()
        go.wait(PATIENCE)
        start_response("200 OK", [])
        try:
            yield b"nobody wants this"
        finally:
            ended.set()

    async def main():
        async with flowcoro.TaskGroup() as group:
            group.spawn(wsgi_app(application)(Request("GET", "/")))
            await flowcoro.to_thread(running.wait, PATIENCE)
            group.cancel()                          # and the group ends, although the thread still waits
        go.set()
        assert await flowcoro.to_thread(ended.wait, PATIENCE)

    flowcoro.run(main())
    assert reports == []


def test_an_error_of_an_application_whose_client_has_gone_is_reported(reports):
    running, go = threading.Event(), threading.Event()

    def application(environ, start_response):
        running.set()
        go.wait(PATIENCE)
        raise ZeroDivisionError("late")

    async def main():
        async with flowcoro.TaskGroup() as group:
            group.spawn(wsgi_app(application)(Request("GET", "/")))
            await flowcoro.to_thread(running.wait, PATIENCE)
            group.cancel()
        go.set()
        with flowcoro.timeout(PATIENCE):
            while not reports:
                await flowcoro.sleep(0.001)

    flowcoro.run(main())
    assert isinstance(reports[0][1], ZeroDivisionError) and "client was gone" in reports[0][0]


def test_a_cancelled_request_that_waits_for_a_thread_is_never_made():
    go, paths = threading.Event(), []

    def application(environ, start_response):
        paths.append(environ["PATH_INFO"])
        go.wait(PATIENCE)
        return answering()(environ, start_response)

    async def main():
        handler = wsgi_app(application, threads=1)
        async with flowcoro.TaskGroup() as group:
            group.spawn(handler(Request("GET", "/first")))
            while not paths:
                await flowcoro.sleep(0.001)
            second = group.spawn(handler(Request("GET", "/second")))
            await flowcoro.sleep(0.01)
            second.cancel()
            third = group.spawn(handler(Request("GET", "/third")))
            go.set()
            return (await third).content

    assert flowcoro.run(main()) == b"hello" and paths == ["/first", "/third"]


def test_reading_ends_with_an_error_when_the_client_goes_in_the_middle_of_its_content():
    raised, ended = [], threading.Event()

    def application(environ, start_response):
        try:
            environ["wsgi.input"].read()
        except Exception as error:
            raised.append(error)
            raise
        finally:
            ended.set()

    async def client(server):
        sock = await flowcoro_net.Socket.connect(*server.local)
        await sock.write(request("/", "POST", [("Content-Length", "1000000")]) + b"x" * 1000)
        await flowcoro.sleep(0.01)
        sock.close_nowait()
        assert await flowcoro.to_thread(ended.wait, PATIENCE)

    try:
        hook, sys.unraisablehook = sys.unraisablehook, lambda args: None
        hosting(wsgi_app(application), client)
    finally:
        sys.unraisablehook = hook
    assert isinstance(raised[0], (OSError, flowcoro_http.ProtocolError))


def test_content_that_is_read_after_the_call_is_an_error_and_no_wait():
    sources = []

    def application(environ, start_response):
        sources.append(environ["wsgi.input"])
        return answering()(environ, start_response)

    assert ask(wsgi_app(application), "/", "POST", [("Transfer-Encoding", "chunked")], chunked(b"x")).status == 200
    with pytest.raises(ConnectionAbortedError, match="over"):
        sources[0].read()


# ---- WSGI: threads --------------------------------------------------------------------------------------------

def test_as_many_calls_run_at_once_as_there_are_threads_and_the_others_wait():
    lock, running, most, all_there = threading.Lock(), 0, 0, threading.Barrier(3)

    def application(environ, start_response):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        all_there.wait(PATIENCE)
        with lock:
            running -= 1
        return answering()(environ, start_response)

    async def main():
        handler = wsgi_app(application, threads=3)
        return await flowcoro.when_all(*[handler(Request("GET", "/")) for _ in range(12)])

    assert [response.content for response in flowcoro.run(main())] == [b"hello"] * 12 and most == 3


def test_a_slow_call_does_not_hold_back_quick_ones_that_came_with_it():
    go = threading.Event()

    def application(environ, start_response):
        if environ["PATH_INFO"] == "/slow":
            go.wait(PATIENCE)
        return answering(environ["PATH_INFO"].encode())(environ, start_response)

    async def main():
        handler = wsgi_app(application, threads=2)
        async with flowcoro.TaskGroup() as group:
            tasks = [group.spawn(handler(Request("GET", path))) for path in ["/a", "/slow", "/b", "/c", "/d"]]
            for task in [*tasks[:1], *tasks[2:]]:
                assert (await task).status == 200
            assert not tasks[1].done()
            go.set()
            return (await tasks[1]).content

    assert flowcoro.run(main()) == b"/slow"


def test_the_kernel_goes_on_while_an_application_blocks():
    async def main():
        go = threading.Event()
        handler = wsgi_app(lambda *args: go.wait(PATIENCE) and answering()(*args))
        async with flowcoro.TaskGroup() as group:
            task = group.spawn(handler(Request("GET", "/")))
            for _ in range(100):
                await flowcoro.checkpoint()
            await flowcoro.sleep(0.01)
            assert not task.done()
            go.set()
            return (await task).content

    assert flowcoro.run(main()) == b"hello"


def test_when_the_run_ends_its_threads_have_nothing_to_wait_for(monkeypatch):
    monkeypatch.setattr(flowcoro_http, "WSGI_IDLE", PATIENCE)
    pool = flowcoro._ThreadPool
    busy = pool.threads - set(pool.idle)            # of other tests
    ask(wsgi_app(answering()))
    end = time.monotonic() + PATIENCE / 2
    while pool.threads - set(pool.idle) - busy:
        assert time.monotonic() < end, "a thread of the ended run waits for requests"
        time.sleep(0.001)


def test_threads_that_have_been_idle_end_and_later_calls_get_others(monkeypatch):
    monkeypatch.setattr(flowcoro_http, "WSGI_IDLE", 0.02)
    names = []

    def application(environ, start_response):
        names.append(threading.get_ident())
        return answering()(environ, start_response)

    async def main():
        handler = wsgi_app(application)
        for _ in range(3):
            assert (await handler(Request("GET", "/"))).content == b"hello"
            while flowcoro.statistics()["thread_calls"]:
                await flowcoro.sleep(0.005)

    flowcoro.run(main())
    assert len(names) == 3


def test_an_application_serves_one_kernel_after_another_and_several_at_once():
    handler, barrier = wsgi_app(answering()), threading.Barrier(2)

    def run_one(content):
        async def main():
            content.append((await handler(Request("GET", "/"))).content)
            await flowcoro.to_thread(barrier.wait, PATIENCE)
            content.append((await handler(Request("GET", "/"))).content)
        flowcoro.run(main())

    for _ in range(2):
        contents = [], []
        threads = [threading.Thread(target=run_one, args=(content,)) for content in contents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert contents == ([b"hello"] * 2, [b"hello"] * 2)


def test_without_a_thread_a_request_is_answered_with_500_and_the_next_one_gets_one(monkeypatch, reports):
    start, refused = threading.Thread.start, [None]

    def start_later(thread):
        if refused:
            refused.pop()
            raise RuntimeError("can't start new thread")
        start(thread)

    async def main():
        monkeypatch.setattr(flowcoro._ThreadPool, "idle", [])
        monkeypatch.setattr(threading.Thread, "start", start_later)
        handler = wsgi_app(answering(), threads=1)
        with flowcoro.timeout(PATIENCE):
            with pytest.raises(RuntimeError, match="new thread"):
                await handler(Request("GET", "/"))
            monkeypatch.undo()                      # so that the thread goes back to where others look for one
            return (await handler(Request("GET", "/"))).content

    assert flowcoro.run(main()) == b"hello" and "new thread" in str(reports[0][1])


class Call:
    """Stands for a _WsgiCall: counts what is done to it."""

    gone = False

    def __init__(self):
        self.woken, self.ran = 0, threading.Event()

    def wake(self):
        self.woken += 1

    def run(self):
        self.ran.set()


def test_what_is_rung_while_no_bell_hangs_is_heard():
    class Bells(list):
        def append(self, bell):
            if not call.woken and not pool.rung:
                pool.ring(call)                         # a thread, the moment before
            super().append(bell)

    async def main():
        nonlocal pool
        pool = flowcoro_http._WsgiThreads(1)
        pool.bells = Bells()
        with flowcoro.timeout(PATIENCE):
            while not call.woken:
                await flowcoro.sleep(0.001)

    pool, call = None, Call()
    flowcoro.run(main())


def test_a_thread_that_becomes_idle_while_another_looks_for_one_is_found():
    class Idle(list):
        def pop(self):
            if not self:
                self.append(lock)                       # it comes the moment after
                raise IndexError
            return super().pop()

    async def main():
        pool = flowcoro_http._WsgiThreads(0)
        pool.idle = Idle()
        pool.waiting.append(Call())
        pool.wake_one()
        assert lock.acquire(timeout=0) and pool.token == []

    lock = threading.Lock()
    lock.acquire()
    flowcoro.run(main())


@pytest.mark.parametrize("when", ["before it is idle", "before it ends"])
def test_a_call_that_comes_while_the_only_thread_goes_to_rest_is_made(when, monkeypatch):
    class Waiting(collections.deque):
        def popleft(self):
            if when == "before it is idle" and not came:
                came.append(True)
                self.append(call)                       # whose task saw no idle thread
                raise IndexError
            return super().popleft()

    class Idle(list):
        def remove(self, lock):
            super().remove(lock)
            if when == "before it ends" and not came:
                came.append(True)
                pool.waiting.append(call)

    async def main():
        nonlocal pool
        pool = flowcoro_http._WsgiThreads(1)
        pool.waiting, pool.idle, pool.token = Waiting(), Idle(), []
        flowcoro.spawn(flowcoro.to_thread(pool._work, [None], abandon_on_cancel=True))
        assert await flowcoro.to_thread(call.ran.wait, PATIENCE / 2)

    monkeypatch.setattr(flowcoro_http, "WSGI_IDLE", 0.01 if when == "before it ends" else PATIENCE)
    pool, call, came = None, Call(), []
    flowcoro.run(main())


def test_a_task_does_not_park_when_its_thread_has_just_ended():
    async def main():
        call = flowcoro_http._WsgiCall(flowcoro_http._WsgiThreads(1), answering(), Request("GET", "/"))
        call.ended = True
        with flowcoro.timeout(PATIENCE):
            await flowcoro.park(call._park)

    flowcoro.run(main())


@pytest.mark.parametrize("workers", [1, 3])
def test_a_flood_is_answered_whole_and_in_order_on_each_connection(workers):
    def application(environ, start_response):
        number = int(environ["QUERY_STRING"])
        if number % 7 == 0:
            time.sleep(0.0005)
        content = [b"%d" % number, b"x" * (number % 5)]
        return answering(iter(content) if number % 3 == 0 else content)(environ, start_response)

    async def one(server, first):
        async with await flowcoro_net.Socket.connect(*server.local) as sock:
            for number in range(first, first + 20):
                await sock.write(request(f"/?{number}", close=False))
                head = await sock.read_until(b"\r\n\r\n")
                if b"chunked" in head:
                    content = b""
                    while (size := int(await sock.read_until(b"\r\n"), 16)):
                        content += await sock.read_exactly(size)
                        await sock.read_exactly(2)
                    await sock.read_exactly(2)
                else:
                    content = await sock.read_exactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
                assert content == b"%d" % number + b"x" * (number % 5)

    async def main():
        app = HttpServer()
        app.mount("/", wsgi_app(application, threads=5))
        async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve())
            await flowcoro.when_all(*[one(server, 100 * number) for number in range(30)])
            server.close()

    with_timeout = main()
    flowcoro.run(with_timeout, workers=workers)


# ---- ASGI: messages -------------------------------------------------------------------------------------------

def asgi(*steps):
    """An ASGI application for http that sends these messages."""
    async def application(scope, receive, send):
        assert scope["type"] == "http"
        for step in steps:
            await send(step)
    return application


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


def body(content=b"", more=False):
    return {"type": "http.response.body", "body": content, "more_body": more}


async def received(receive):
    """The content of a request, and how many messages it took."""
    content, count, more = b"", 0, True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        content, count, more = content + message["body"], count + 1, message["more_body"]
    return content, count


def test_the_scope_has_all_that_the_specification_asks_for():
    scopes = []

    async def application(scope, receive, send):
        if scope["type"] == "http":
            scopes.append(scope)
            await asgi(START, body())(scope, receive, send)

    ask(asgi_app(application), "/app/%C3%A9%20x?q=%20", "PUT", [("X-One", "1"), ("x-ONE", "2"), ("Content-Type", "a/b")], b"abc",
        prefix="/app")
    scope, = scopes
    assert scope["type"] == "http" and scope["asgi"]["version"] == "3.0" and scope["http_version"] == "1.1"
    assert (scope["method"], scope["scheme"], scope["path"], scope["root_path"]) == ("PUT", "http", "/app/é x", "/app")
    assert (scope["raw_path"], scope["query_string"]) == (b"/app/%C3%A9%20x", b"q=%20")
    assert [pair for pair in scope["headers"] if pair[0] == b"x-one"] == [(b"x-one", b"1"), (b"x-one", b"2")]
    assert scope["server"][0] == scope["client"][0] == "127.0.0.1" and scope["server"][1] != scope["client"][1]
    assert {"http.response.trailers", "http.response.early_hint"} <= set(scope["extensions"]) and "state" not in scope


@pytest.mark.parametrize("headers, content, length", [
    ((), b"", 0), ((), b"abc", 3), ((), b"x" * 300_000, 300_000),
    ([("Transfer-Encoding", "chunked")], chunked(b"ab", b"c" * 99_999), 100_001)])
def test_an_application_receives_the_content_of_a_request(headers, content, length):
    async def application(scope, receive, send):
        assert scope["type"] == "http"
        got, count = await received(receive)
        await asgi(START, body(b"%d %d" % (len(got), length >= 100 or count)))(scope, receive, send)

    assert ask(asgi_app(application), "/", "POST", headers, content).body == b"%d 1" % length


def test_an_application_that_fails_within_the_answer_to_a_head_request_is_answered_with_500(reports):
    async def application(scope, receive, send):
        assert scope["type"] == "http"
        await send(START)
        await send(body(b"some", True))
        raise ValueError("no more")

    assert ask(asgi_app(application), method="HEAD").status == 500
    assert [str(error) for _, error in reports] == ["no more"]


def test_an_answer_in_one_piece_has_a_content_length_and_one_in_several_is_chunked():
    answer = ask(asgi_app(asgi(START, body(b"whole"))))
    assert (answer.body, answer.headers["Content-Length"], answer.headers["Content-Type"]) == (b"whole", "5", "text/plain")
    answer = ask(asgi_app(asgi(START, body(b"a", True), body(b"", True), body(b"b", True), body(b"c"))))
    assert (answer.body, answer.headers["Transfer-Encoding"]) == (b"abc", "chunked")
    answer = ask(asgi_app(asgi({**START, "headers": [(b"content-length", b"2"), (b"transfer-encoding", b"chunked")]},
                               body(b"a", True), body(b"b"))))
    assert (answer.body, answer.headers["Content-Length"], answer.headers["Transfer-Encoding"]) == (b"ab", "2", None)


def test_the_answer_to_head_has_the_length_if_it_is_known_and_no_content():
    assert ask(asgi_app(asgi(START, body(b"12345"))), method="HEAD").headers["Content-Length"] == "5"
    ended = []

    async def streaming(scope, receive, send):
        if scope["type"] == "http":
            await asgi(START, body(b"12345", True), body(b"6"))(scope, receive, send)
            ended.append("by itself")

    answer = ask(asgi_app(streaming), method="HEAD")
    assert answer.status == 200 and "Content-Length" not in answer.headers and ended == ["by itself"]


def test_trailers_and_early_hints_are_sent():
    async def client(server):
        return await exchange(server, request(headers=[("TE", "trailers")]))

    steps = [{"type": "http.response.early_hint", "links": [b"</x.css>; rel=preload"]}, {**START, "trailers": True}, body(b"a"),
             {"type": "http.response.trailers", "headers": [(b"x-sum", b"1")], "more_trailers": True},
             {"type": "http.response.trailers", "headers": [(b"x-end", b"2")]}]
    raw = hosting(asgi_app(asgi(*steps)), client)
    assert raw.startswith(b"HTTP/1.1 103 ") and b"Link: </x.css>; rel=preload\r\n" in raw
    assert raw.endswith(b"0\r\nx-sum: 1\r\nx-end: 2\r\n\r\n")
    assert hosting(asgi_app(asgi(*steps)), lambda server: exchange(server, request())).endswith(b"a\r\n0\r\n\r\n")


def test_send_returns_when_the_client_has_taken_what_was_sent_before():
    sent = []

    async def application(scope, receive, send):
        await send(START)
        for number in range(200):
            await send(body(b"x" * 200_000, True))
            sent.append(number)
        await send(body())

    async def client(server):
        async with await flowcoro_net.Socket.connect(*server.local) as sock:
            await sock.write(request())
            await sock.read(10)
            before = -1
            while before != len(sent):
                before = len(sent)
                await flowcoro.sleep(0.05)
            held, rest = len(sent), 10
            while data := await sock.read(2**20):
                rest += len(data)
            return held, rest

    held, size = hosting(asgi_app(application), client)
    assert held < 100 and len(sent) == 200 and size > 40_000_000


def test_an_application_may_go_on_when_its_answer_is_complete():
    done = []

    async def main():
        async def application(scope, receive, send):
            assert (await receive())["type"] == "http.request"
            await asgi(START, body(b"now"))(scope, receive, send)
            done.append((await receive())["type"])
            await later.wait()
            done.append("later")

        later = flowcoro.Event()
        assert (await asgi_app(application)(Request("GET", "/"))).content == b"now"
        later.set()
        with flowcoro.timeout(PATIENCE):
            while len(done) < 2:
                await flowcoro.checkpoint()

    flowcoro.run(main())
    assert done == ["http.disconnect", "later"]


def test_after_a_streamed_answer_the_connection_goes_on_at_once_and_the_application_too():
    seen = []

    async def application(scope, receive, send):
        if scope["path"] == "/first":
            await asgi(START, body(b"1", True), body(b"2"))(scope, receive, send)
            seen.append((await receive())["type"])
            await later.wait()
            seen.append("later")
        else:
            later.set()
            await asgi(START, body(b"second"))(scope, receive, send)

    async def main():
        nonlocal later
        later = flowcoro.Event()
        app = HttpServer()
        app.mount("/", asgi_app(application, disconnect_timeout=PATIENCE))
        async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve())
            with flowcoro.timeout(PATIENCE / 2):
                raw = await exchange(server, request("/first", close=False) + request("/second"))
                while len(seen) < 2:
                    await flowcoro.checkpoint()
            server.close()
        return raw

    later = None
    assert flowcoro.run(main()).endswith(b"second") and seen == ["http.disconnect", "later"]


# ---- ASGI: clients that go ------------------------------------------------------------------------------------

def leaving(application, **options):
    """Host the application, and have a client go after the first piece of its answer; when the application has ended."""
    async def client(server):
        sock = await flowcoro_net.Socket.connect(*server.local)
        await sock.write(request())
        await sock.read(1000)
        sock.close_nowait()
        await ended.wait()

    async def watched(scope, receive, send):
        if scope["type"] == "http":
            try:
                await application(scope, receive, send)
            finally:
                ended.set()

    ended = flowcoro.Event()
    hosting(asgi_app(watched, **options), client)


def test_receive_tells_of_a_client_that_has_gone():
    seen = []

    async def application(scope, receive, send):
        await receive()
        await send(START)
        await send(body(b"begun", True))
        seen.append(await receive())
        seen.append(await receive())

    leaving(application)
    assert seen == [{"type": "http.disconnect"}] * 2


def test_send_to_a_client_that_has_gone_is_an_oserror_and_no_report(reports):
    seen = []

    async def application(scope, receive, send):
        await send(START)
        try:
            while True:
                await send(body(b"x" * 100_000, True))
        except OSError as error:
            seen.append(error)
            raise

    leaving(application)
    assert "http.disconnect" in str(seen[0]) and reports == []


def test_an_application_that_takes_no_notice_is_cancelled_after_a_while():
    seen = []

    async def application(scope, receive, send):
        await send(START)
        await send(body(b"begun", True))
        try:
            await flowcoro.sleep(1000)
        except flowcoro.Cancelled:
            seen.append("cancelled")
            raise

    leaving(application, disconnect_timeout=0.01)
    assert seen == ["cancelled"]


def test_a_client_that_goes_within_its_content_is_told_by_receive_at_once():
    seen = []

    async def application(scope, receive, send):
        if scope["type"] == "http":
            await receive()
            begun.set()
            seen.append(await receive())
            ended.set()

    async def client(server):
        sock = await flowcoro_net.Socket.connect(*server.local)
        await sock.write(request("/", "POST", [("Content-Length", "100")]) + b"x")
        await begun.wait()
        sock.close_nowait()
        await ended.wait()

    begun, ended = flowcoro.Event(), flowcoro.Event()
    hosting(asgi_app(application), client)
    assert seen == [{"type": "http.disconnect"}]


def test_a_server_that_ends_does_not_wait_for_content_that_does_not_come():
    seen = []

    async def main():
        async def application(scope, receive, send):
            begun.set()
            seen.append((await receive())["type"])

        begun = flowcoro.Event()
        app = HttpServer()
        app.mount("/", asgi_app(application, disconnect_timeout=PATIENCE))
        async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(drain_timeout=0.01))
            async with await flowcoro_net.Socket.connect(*server.local) as sock:
                await sock.write(request("/", "POST", [("Content-Length", "100")]))
                await begun.wait()
                server.close()
                assert await read_all(sock) in (b"", b"<cut>")

    began = time.monotonic()
    flowcoro.run(main())
    assert seen == ["http.disconnect"] and time.monotonic() - began < PATIENCE


def test_trailers_to_a_client_of_http_1_0_are_left_out():
    steps = {**START, "trailers": True}, body(b"a"), {"type": "http.response.trailers", "headers": [(b"x-sum", b"1")]}
    raw = hosting(asgi_app(asgi(*steps)), lambda server: exchange(server, b"GET / HTTP/1.0\r\n\r\n"))
    assert raw.endswith(b"\r\n\r\na")


def test_a_client_that_goes_before_the_answer_is_told_too():
    seen = []

    async def main():
        async def application(scope, receive, send):
            await receive()
            waiting.set()
            seen.append((await receive())["type"])
            with pytest.raises(OSError, match="gone"):
                await send(START)
            seen.append("told")

        waiting = flowcoro.Event()
        async with flowcoro.TaskGroup() as group:
            group.spawn(asgi_app(application)(Request("GET", "/")))
            await waiting.wait()
            group.cancel()

    flowcoro.run(main())
    assert seen == ["http.disconnect", "told"]


# ---- ASGI: errors ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps, said", [
    ([body()], "now http.response.start or http.response.early_hint can"), ([START, START], "http.response.body can"),
    ([], "nothing sent"), ([START], "begun"),
    ([{"type": "http.response.start", "status": "200"}], "status"), ([{"type": "http.response.start", "status": 99}], "99"),
    ([{"type": "http.response.start"}], "status"), ([{**START, "headers": [("a", "b")]}], "bytes"),
    ([START, body("text")], "body"), ([{"type": "websocket.accept"}], "websocket.accept"), (["text"], "dict"),
    ([{"no": "type"}], "dict"),
    ([{**START, "headers": [(b"a", b"b\r\nc: d")]}], "a")])
def test_a_message_that_cannot_be_sent_is_an_error_that_says_why(steps, said, reports):
    assert ask(asgi_app(asgi(*steps))).status == 500
    (_, error), = reports
    assert said in str(error)


def test_nothing_can_be_sent_after_the_end(reports):
    assert ask(asgi_app(asgi(START, body(b"x"), body(b"y")))).body == b"x"
    (_, error), = reports
    assert "the answer complete" in str(error) and "nothing can" in str(error)


def test_an_error_within_a_streamed_answer_cuts_the_connection_and_is_reported(reports):
    async def application(scope, receive, send):
        await send(START)
        await send(body(b"begun", True))
        raise ZeroDivisionError("in the middle")

    raw = hosting(asgi_app(application), lambda server: exchange(server, request()))
    assert b"begun" in raw and not raw.endswith(b"0\r\n\r\n")
    assert [str(error) for _, error in reports] == ["in the middle"]


def test_a_413_that_receive_raises_is_the_answer():
    async def application(scope, receive, send):
        await received(receive)

    async def limited(request, rest):
        request.max_body = 100
        return await handler(request, rest)

    handler = asgi_app(application)
    assert ask(limited, "/", "POST", [("Transfer-Encoding", "chunked")], chunked(b"x" * 200)).status == 413


async def sleeps_in_asyncio(scope, receive, send):
    await asyncio.sleep(0.1)


async def waits_for_a_future(scope, receive, send):
    loop = asyncio.new_event_loop()
    try:
        await loop.create_future()
    finally:
        loop.close()


async def waits_in_a_queue(scope, receive, send):
    await asyncio.Queue().get()


async def spawns_a_task(scope, receive, send):
    coro = receive()
    try:
        asyncio.create_task(coro)
    finally:
        coro.close()


async def raises_as_anyio_does(scope, receive, send):
    raise type("NoEventLoopError", (RuntimeError,), {})("not currently running on any asynchronous event loop")


async def yields_to_nobody_knows_whom(scope, receive, send):
    class Foreign:
        def __await__(self):
            yield "something"
    await Foreign()


@pytest.mark.parametrize("application", [sleeps_in_asyncio, waits_for_a_future, waits_in_a_queue, spawns_a_task,
                                         raises_as_anyio_does, yields_to_nobody_knows_whom])
def test_an_application_that_reaches_for_asyncio_is_told_where_it_is_and_what_to_do(application, reports):
    async def http_only(scope, receive, send):
        assert scope["type"] == "http"
        await application(scope, receive, send)

    assert ask(asgi_app(http_only)).status == 500
    (_, error), = reports
    for word in "http_only", "asyncio", "FlowCoro runs it without one", "flowcoro.to_thread", "receive() and send()":
        assert word in str(error)
    assert error.__cause__ is not None


def test_what_would_end_the_run_ends_the_request_only(reports):
    async def application(scope, receive, send):
        if scope["type"] == "http":
            raise SystemExit(3)

    assert ask(asgi_app(application)).status == 500
    assert "SystemExit" in str(reports[0][1])


# ---- ASGI: lifespan -------------------------------------------------------------------------------------------

def test_the_lifespan_begins_before_and_ends_after_all_requests_and_its_state_is_in_each_scope():
    events = []

    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            events.append((await receive())["type"])
            scope["state"]["pool"] = events
            await send({"type": "lifespan.startup.complete"})
            events.append((await receive())["type"])
            await send({"type": "lifespan.shutdown.complete"})
            return
        assert scope["state"]["pool"] is events
        scope["state"][len(events)] = True                      # of this request alone
        events.append(len(scope["state"]))
        await asgi(START, body())(scope, receive, send)

    async def client(server):
        await exchange(server, request())
        await exchange(server, request())

    hosting(asgi_app(application), client)
    assert events == ["lifespan.startup", 2, 2, "lifespan.shutdown"]


@pytest.mark.parametrize("told", ["no database", ""])
def test_a_lifespan_that_fails_ends_the_start(told):
    async def application(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed", "message": told})

    async def main():
        app, host = HttpServer(), asgi_app(application)
        app.mount("/", host)
        app.lifespan(host.lifespan)
        async with await app.listen("127.0.0.1", 0) as server:
            with pytest.raises(RuntimeError, match=f"cannot start: {told or 'it does not say why'}"):
                await server.serve()

    flowcoro.run(main())


def test_a_lifespan_that_reaches_for_asyncio_ends_the_start():
    async def application(scope, receive, send):
        await asyncio.sleep(0)
        await asyncio.sleep(1)

    with pytest.raises(BaseExceptionGroup) as caught:
        hosting(asgi_app(application), lambda server: flowcoro.sleep(PATIENCE))
    assert "without one" in str(caught.value.exceptions[0])


@pytest.mark.parametrize("raises", [True, False])
def test_an_application_without_a_lifespan_is_served_all_the_same(raises, reports):
    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            if raises:
                raise NotImplementedError("only http")
            return
        assert "state" not in scope
        await asgi(START, body(b"served"))(scope, receive, send)

    assert ask(asgi_app(application)).body == b"served" and reports == []


def test_a_lifespan_that_raises_instead_of_starting_is_reported_and_the_application_served(reports):
    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            raise ValueError("no database")
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"ok"})

    assert ask(asgi_app(application)).body == b"ok"
    assert [str(error) for _, error in reports] == ["no database"]


def test_a_lifespan_that_receives_for_ever_is_told_once_that_it_ends():
    kinds = []

    async def application(scope, receive, send):
        while scope["type"] == "lifespan":
            kinds.append((await receive())["type"])
            await send({"type": kinds[-1] + ".complete"})

    async def main():
        async with asgi_app(application).lifespan():
            pass

    flowcoro.run(main())
    assert kinds == ["lifespan.startup", "lifespan.shutdown"]


def test_a_lifespan_that_ends_badly_is_reported_and_the_server_ends(reports):
    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.failed", "message": "the file is lost"})
            return
        await asgi(START, body(b"served"))(scope, receive, send)

    assert ask(asgi_app(application)).body == b"served"
    assert [str(error) for _, error in reports] == ["the file is lost"]


def test_what_goes_on_after_its_answer_has_some_seconds_when_the_server_ends(monkeypatch):
    monkeypatch.setattr(flowcoro_http, "ASGI_SHUTDOWN", 0.3)
    ended = []

    async def application(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            ended.append("lifespan")
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await asgi(START, body())(scope, receive, send)
            try:
                await flowcoro.sleep(0.05 if scope["path"] == "/short" else 1000)
                ended.append("by itself")
            except flowcoro.Cancelled:
                ended.append("cancelled")
                raise

    async def client(server):
        await exchange(server, request("/short"))
        await exchange(server, request("/long"))

    hosting(asgi_app(application), client)
    assert ended == ["by itself", "cancelled", "lifespan"]


# ---- ASGI: WebSocket ------------------------------------------------------------------------------------------

UPGRADE = [("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"),
           ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="), ("Sec-WebSocket-Protocol", "chat, super")]


class Lines:
    """What websocket= makes of a request; here a message is a line, and the end is the end."""

    close_code, close_reason = None, ""

    @classmethod
    async def accept(cls, request, subprotocols, headers):
        lines, chosen = cls(), [("Sec-WebSocket-Protocol", name) for name in subprotocols]
        lines.sock = await request.upgrade("websocket", [*chosen, *headers])
        return lines

    async def receive(self):
        line = await self.sock.read_until(b"\n")
        if not line:
            self.close_code, self.close_reason = 1001, "away"
            raise flowcoro_net.BrokenError(None, "closed")
        return line[:-1].decode() if line.isascii() else line[:-1]

    async def send(self, message):
        await self.sock.write((message.encode() if isinstance(message, str) else message) + b"\n")

    async def close(self, code=1000, reason=""):
        await self.sock.write(f"closed {code} {reason}\n".encode())

    def close_nowait(self, code):
        pass


def websocket_request(connection="Upgrade"):
    return request("/chat?x=1", headers=[("Connection", connection), *UPGRADE], close=False)


async def websocket_echo(scope, receive, send):
    if scope["type"] != "websocket":
        return
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept", "subprotocol": scope["subprotocols"][1], "headers": [(b"x-a", b"b")]})
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("text") == "quit":
            return
        if message.get("text") == "bye":
            await send({"type": "websocket.close", "code": 4000, "reason": "you said so"})
            assert (await receive())["type"] == "websocket.disconnect"
            with pytest.raises(OSError, match="gone"):
                await send({"type": "websocket.send", "text": "late"})
            return
        await send({"type": "websocket.send", **{key: value for key, value in message.items() if key != "type"}})
    assert message == {"type": "websocket.disconnect", "code": 1001, "reason": "away"}


def test_without_websocket_the_application_is_not_asked_and_the_client_told_so():
    async def application(scope, receive, send):
        assert scope["type"] == "lifespan"

    answer = Answer(hosting(asgi_app(application), lambda server: exchange(server, websocket_request("Upgrade, close"))))
    assert answer.status == 501 and b"websocket=" in answer.body


@pytest.mark.parametrize("lines, heard", [
    (b"one\ntw\xc3\xb6\nbye\n", b"one\ntw\xc3\xb6\nclosed 4000 you said so\n"), (b"one\n", b"one\n"),
    (b"quit\n", b"closed 1000 \n")])
def test_an_application_speaks_websocket_by_what_is_plugged_in(lines, heard):
    async def client(server):
        async with await flowcoro_net.Socket.connect(*server.local) as sock:
            await sock.write(websocket_request() + lines)
            head = await sock.read_until(b"\r\n\r\n")
            await sock.shutdown_write()
            return head, await read_all(sock)

    head, rest = hosting(asgi_app(websocket_echo, websocket=Lines.accept), client)
    assert head.startswith(b"HTTP/1.1 101 ") and b"Sec-WebSocket-Protocol: super\r\n" in head and b"x-a: b\r\n" in head
    assert rest == heard


@pytest.mark.parametrize("steps, status, content", [
    ([{"type": "websocket.close"}], 403, b"the application has refused the WebSocket"),
    ([{"type": "websocket.http.response.start", "status": 401, "headers": [(b"x", b"y")]},
      {"type": "websocket.http.response.body", "body": b"who", "more_body": True},
      {"type": "websocket.http.response.body", "body": b"?"}], 401, b"who?")])
def test_an_application_may_refuse_a_websocket(steps, status, content):
    async def application(scope, receive, send):
        if scope["type"] == "websocket":
            await receive()
            for step in steps:
                await send(step)

    asked = websocket_request("Upgrade, close")
    answer = Answer(hosting(asgi_app(application, websocket=Lines.accept), lambda server: exchange(server, asked)))
    assert (answer.status, answer.body) == (status, content)


def test_a_websocket_whose_application_fails_is_closed_with_1011(reports):
    async def application(scope, receive, send):
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            raise ZeroDivisionError("in a WebSocket")

    raw = hosting(asgi_app(application, websocket=Lines.accept), lambda server: exchange(server, websocket_request()))
    assert raw.endswith(b"closed 1011 \n") and "in a WebSocket" in str(reports[0][1])
