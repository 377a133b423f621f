"""Server-sent events: how they are written, how their stream ends, and through a server."""


import pytest

import flowcoro
import flowcoro_http
import flowcoro_net
from flowcoro_http import HttpServer, Request, ServerSentEvent, event_stream, last_event_id
from flowcoro_testing import run_in_kernel, wait_all_tasks_parked
from http_helpers import everything, exchange, serving


def parsed(data):
    """Events as a browser reads them (WHATWG HTML, 9.2.6): [{"event", "data", "id"}], and the comments."""
    events, comments, data_lines, kind, last_id = [], [], [], "", ""
    for line in data.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if not line:
            if data_lines:
                events.append({"event": kind or "message", "data": "\n".join(data_lines), "id": last_id})
            data_lines, kind = [], ""
            continue
        name, colon, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            comments.append(value)
        elif name == "data":
            data_lines.append(value)
        elif name == "event":
            kind = value
        elif name == "id" and "\0" not in value:
            last_id = value
    return events, comments


async def all_of(response):
    return b"".join([piece async for piece in response.stream])


# ---- how an event is written ---------------------------------------------------------------------------------

@pytest.mark.parametrize("data", [
    "one", "", " leading blank", "a\nb", "a\r\nb", "a\rb", "\n", "a\n\n", "a\n\nevent: evil\ndata: x", "\r\n\r\nid: 1\r\n\r\n",
    "data: x", ": no comment", "ü€\U0001f600", "a\u2028b\x0bc\x85d", "\ufeffmark",
])
def test_data_arrives_as_it_was_but_for_its_line_ends(data):
    events, comments = parsed(ServerSentEvent(data).encode())
    expected = data.replace("\r\n", "\n").replace("\r", "\n")
    assert events == [{"event": "message", "data": expected, "id": ""}] and not comments


def test_nul_and_halves_of_characters_in_data_are_replaced():
    assert ServerSentEvent("a\0b").encode() == "data: a\ufffdb\n\n".encode()
    assert ServerSentEvent("a\ud800b", id="\udfff").encode() == "id: \ufffd\ndata: a\ufffdb\n\n".encode()


def test_an_event_has_its_fields_and_values_become_json():
    event = ServerSentEvent({"a": "ü\n", "b": [1, None]}, event="tick", id="7", retry=1.5)
    assert event.encode() == 'event: tick\nid: 7\nretry: 1500\ndata: {"a":"ü\\n","b":[1,null]}\n\n'.encode()
    assert ServerSentEvent(id="").encode() == b"id: \n\n"
    assert ServerSentEvent(5).encode() == b"data: 5\n\n"
    assert "tick" in repr(event)


@pytest.mark.parametrize("options, error", [
    ({"event": "a\nb"}, ValueError), ({"event": "a\rb"}, ValueError), ({"id": "1\0"}, ValueError), ({"id": "1\n"}, ValueError),
    ({"id": 5}, TypeError), ({"event": b"x"}, TypeError), ({"data": b"x"}, TypeError), ({"retry": -1}, ValueError),
    ({"retry": float("inf")}, ValueError), ({"retry": "3"}, ValueError), ({}, ValueError),
])
def test_what_would_be_read_as_something_else_is_refused(options, error):
    with pytest.raises(error, match="ServerSentEvent"):
        ServerSentEvent(**options)


def test_the_last_event_id_is_text():
    assert last_event_id(Request("GET", "/")) is None
    assert last_event_id(Request("GET", "/", [("Last-Event-ID", "7")])) == "7"
    assert last_event_id(Request("GET", "/", [("Last-Event-ID", "ü€".encode().decode("latin-1"))])) == "ü€"
    assert last_event_id(Request("GET", "/", [("Last-Event-ID", "\xff")])) == "\ufffd"


# ---- the stream ----------------------------------------------------------------------------------------------

@run_in_kernel
async def test_events_of_all_kinds_come_in_order_and_the_stream_ends_with_them():
    async def events():
        yield "one"
        yield {"two": 2}
        yield ServerSentEvent("three", event="x")

    for keep_alive in (15.0, None):
        response = event_stream(Request("GET", "/"), events(), keep_alive=keep_alive, retry=2)
        assert response.endless and response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["cache-control"] == "no-cache, no-transform"
        data = await all_of(response)
        await response.stream.aclose()
        assert data.startswith(b"retry: 2000\n\n")
        assert [event["data"] for event in parsed(data)[0]] == ["one", '{"two":2}', "three"]


@run_in_kernel
async def test_a_comment_comes_whenever_nothing_else_has_come_for_a_while():
    async def events():
        await flowcoro.sleep(35)
        yield "late"
        await flowcoro.sleep(5)
        yield "soon"

    response = event_stream(Request("GET", "/"), events(), keep_alive=10)
    began = flowcoro.now()
    arrived = [(flowcoro.now() - began, piece) async for piece in response.stream]
    await response.stream.aclose()
    assert arrived == [(10, b":\n\n"), (20, b":\n\n"), (30, b":\n\n"), (35, b"data: late\n\n"), (40, b"data: soon\n\n")]


@run_in_kernel
async def test_a_source_is_asked_for_no_more_than_is_taken():
    asked = []

    async def events():
        for number in range(100):
            asked.append(number)
            yield str(number)

    response = event_stream(Request("GET", "/"), events())
    await anext(response.stream)
    await wait_all_tasks_parked()
    assert len(asked) == 2
    await response.stream.aclose()


@pytest.mark.parametrize("keep_alive", [10.0, None])
def test_an_error_of_the_source_is_one_of_the_stream(keep_alive):
    async def events():
        yield "one"
        raise OSError("the source has failed")

    @run_in_kernel
    async def main():
        response = event_stream(Request("GET", "/"), events(), keep_alive=keep_alive)
        assert await anext(response.stream) == b"data: one\n\n"
        with pytest.raises(OSError, match="the source"):
            await anext(response.stream)
        await response.stream.aclose()

        async def bad():
            yield b"bytes"
        response = event_stream(Request("GET", "/"), bad(), keep_alive=keep_alive)
        with pytest.raises(TypeError):
            await anext(response.stream)
        await response.stream.aclose()
    main()


@pytest.mark.parametrize("keep_alive", [10.0, None])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_ends_the_source_and_leaves_no_task(taken, keep_alive):
    closed = []

    async def events():
        try:
            for number in range(3):
                yield str(number)
            await flowcoro.sleep(1e9)
        finally:
            closed.append(flowcoro.current_task().name)

    @run_in_kernel
    async def main():
        before = flowcoro.statistics()["tasks"]
        response = event_stream(Request("GET", "/"), events(), keep_alive=keep_alive)
        for _ in range(taken):
            await anext(response.stream)
        if taken == 3:
            await wait_all_tasks_parked()
        await response.stream.aclose()
        await response.stream.aclose()
        assert len(closed) == (taken > 0) and (keep_alive is None or set(closed) <= {"events"})
        assert flowcoro.statistics()["tasks"]["alive"] == before["alive"]
    main()


def test_a_source_that_fails_while_it_is_closed_is_reported(reports):
    async def events():
        try:
            yield "one"
            yield "two"
        finally:
            raise OSError("cannot close")

    @run_in_kernel
    async def main():
        for keep_alive in (10.0, None):
            response = event_stream(Request("GET", "/"), events(), keep_alive=keep_alive)
            await anext(response.stream)
            await response.stream.aclose()
    main()
    assert [str(error) for _, error in reports] == ["cannot close"] * 2


def test_a_reader_that_is_cancelled_leaves_the_next_event():
    async def events():
        await flowcoro.sleep(5)
        yield "one"

    @run_in_kernel
    async def main():
        stream = event_stream(Request("GET", "/"), events()).stream
        with flowcoro.move_on_after(1):
            await anext(stream)
        assert await anext(stream) == b"data: one\n\n"
        await stream.aclose()
    main()


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(TypeError, match="async iterator"):
        event_stream(Request("GET", "/"), ["one"])
    async def events():
        yield "one"
    for keep_alive in (0, -1, "15"):
        with pytest.raises(ValueError, match="keep_alive"):
            event_stream(Request("GET", "/"), events(), keep_alive=keep_alive)


# ---- through a server ----------------------------------------------------------------------------------------

def test_a_browser_that_goes_ends_the_source_and_one_that_stays_ends_with_the_server(monkeypatch):
    monkeypatch.setattr(flowcoro_http, "SWEEP", 0.01)           # how soon it is noticed
    closed = []

    async def main():
        app = HttpServer()

        @app.get("/events")
        async def events(request):
            async def source():
                try:
                    yield {"after": last_event_id(request)}
                    await flowcoro.sleep(1e9)
                finally:
                    closed.append(last_event_id(request))
            return event_stream(request, source())

        async def connect(server, number):
            sock = await flowcoro_net.Socket.connect(*server.local)
            await sock.write(b"GET /events HTTP/1.1\r\nHost: x\r\nLast-Event-ID: %d\r\n\r\n" % number)
            assert b"text/event-stream" in await sock.read_until(b"\r\n\r\n")
            assert b'data: {"after":"%d"}\n\n' % number in await sock.read()
            return sock

        async with serving(app, drain_timeout=60.0) as server:          # it ends by itself
            gone, stays = await connect(server, 1), await connect(server, 2)
            await gone.close()
            while not closed:
                await flowcoro.sleep(0.001)
            assert closed == ["1"]
            server.close()
            with flowcoro.timeout(30):
                rest = await everything(stays)
            assert rest.endswith(b"0\r\n\r\n")                  # a proper end: the browser connects again
            await stays.close()
        assert closed == ["1", "2"]
        assert "events" not in flowcoro.dump_tasks()
    flowcoro.run(main())


def test_head_of_an_event_stream_has_no_content_and_does_not_ask_the_source():
    asked = []

    async def main():
        app = HttpServer()

        @app.get("/events")
        async def events(request):
            async def source():
                asked.append(1)
                yield "one"
            return event_stream(request, source())

        async with serving(app) as server:
            data = await exchange(server, b"HEAD /events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert data.startswith(b"HTTP/1.1 200 ") and data.endswith(b"\r\n\r\n")
    flowcoro.run(main())
    assert not asked
