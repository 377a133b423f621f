"""HttpClient: what it sends, what it makes of answers, good and bad, and that no connection is left behind."""

import contextlib
import gzip
import io
import os
import random
import socket
import types
import zlib

import pytest

import flowcoro
from flowcoro_http import (
    ConnectError, Data, EndOfMessage, HttpClient, HttpConnection, LocalProtocolError, NEED_DATA, PAUSED, ProtocolError,
    RequestTimeout,
    ResponseError, StatusError, Timeouts, TransferError, _Url)
from flowcoro_net import BrokenError, Socket, TcpServer, UnixServer

SEED = int(os.environ.get("FLOWCORO_FIRST_SEED", 0))


def answer(content=b"", status="200 OK", *lines):
    """The bytes of a response."""
    content = content.encode() if isinstance(content, str) else content
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *lines, "", ""]).encode() + content


class Origin:
    """A server whose `handler(request)` returns bytes to send, or None to close; it may also be async, and use request.sock.

    `requests`: what came, with method, target, headers, body, and the number of the connection.
    """

    def __init__(self, handler):
        self.handler, self.requests, self.connections, self.url = handler, [], 0, None

    async def serve(self, sock):
        self.connections += 1
        number, codec, request = self.connections, HttpConnection("server"), None
        with contextlib.suppress(OSError, ProtocolError):
            while True:
                event = codec.next_event()
                if event is NEED_DATA or event is PAUSED:
                    data = await sock.read()
                    if not data:
                        return
                    codec.receive_data(data)
                elif isinstance(event, Data):
                    request.body += event.data
                elif isinstance(event, EndOfMessage):
                    self.requests.append(request)
                    reply = self.handler(request)
                    reply = await reply if hasattr(reply, "__await__") else reply
                    if reply is None:
                        return
                    await sock.write(reply)
                    left = codec.trailing_data
                    codec = HttpConnection("server")
                    if left:
                        codec.receive_data(left)
                else:
                    request = types.SimpleNamespace(method=event.method, target=event.target, headers=event.headers, body=b"",
                                                    connection=number, sock=sock)


@contextlib.asynccontextmanager
async def serving(handler, *, tls=None, unix=None):
    """An Origin that listens."""
    origin = handler if isinstance(handler, Origin) else Origin(handler)
    server = await UnixServer.listen(unix) if unix else await TcpServer.listen("127.0.0.1", 0, tls=tls)
    async with server:
        task = flowcoro.spawn(server.serve(origin.serve))
        if not unix:
            origin.port = server.local[1]
            origin.url = f"{'https' if tls else 'http'}://127.0.0.1:{origin.port}"
        try:
            yield origin
        finally:
            task.cancel()
            with contextlib.suppress(flowcoro.TaskCancelled):
                await task


def scripted(*replies):
    """A handler that gives one after the other."""
    replies = list(replies)
    return lambda request: replies.pop(0)


def given_back(client):
    """Nothing is lent, nobody waits, nothing is under way."""
    return all(numbers[state] == 0 for numbers in client.statistics().values() for state in ("in_use", "connecting", "waiting"))


def talk(handler, work, **options):
    """Run work(client, origin), with an origin of that handler; what it returns."""
    settings = {name: options.pop(name) for name in ("tls", "unix") if name in options and name != "unix"}

    async def main():
        async with serving(handler, **settings) as origin, HttpClient(trust_env=False, **options) as client:
            try:
                return await work(client, origin)
            finally:
                assert given_back(client)

    return flowcoro.run(main())


# ---- what is sent ----------------------------------------------------------------------------------------------

def test_a_get_gives_status_headers_and_content():
    async def work(client, origin):
        response = await client.get(origin.url + "/x?y=1")
        assert (response.status, response.reason, response.version) == (200, "OK", "1.1")
        assert response.content == b"hello" and response.text == "hello" and response.headers["x-a"] == "b"
        assert response.url == origin.url + "/x?y=1" and response.history == () and 0 < response.elapsed < 60
        [request] = origin.requests
        assert (request.method, request.target, request.body) == ("GET", "/x?y=1", b"")
        assert request.headers["host"] == f"127.0.0.1:{origin.port}" and request.headers["accept-encoding"] == "gzip, deflate"
        assert "content-length" not in request.headers

    talk(lambda request: answer("hello", "200 OK", "X-A: b"), work)


def test_requests_share_a_connection_and_the_remembered_ones_say_the_same():
    async def work(client, origin):
        for _ in range(5):
            assert (await client.get(origin.url + "/x")).text == "/x"
        assert {request.connection for request in origin.requests} == {1}
        assert len({str(request.headers) for request in origin.requests}) == 1
        client.headers.set("User-Agent", "me")
        client.headers.add("X-More", "1")
        for _ in range(3):
            response = await client.get(origin.url + "/x")
            assert origin.requests[-1].headers["user-agent"] == "me" and origin.requests[-1].headers["x-more"] == "1"
            assert response.request.headers["x-more"] == "1" and response.request.headers["host"] == origin.url[7:]
        client.headers.add("X-More", "2")
        await client.get(origin.url + "/x")
        assert origin.requests[-1].headers.get_all("x-more") == ["1", "2"] and origin.connections == 1

    talk(lambda request: answer(request.target), work)


@pytest.mark.parametrize("verb", ["get", "head", "options", "delete", "post", "put", "patch"])
def test_each_verb_sends_its_method(verb):
    async def work(client, origin):
        response = await getattr(client, verb)(origin.url)
        assert response.status == 204 and origin.requests[0].method == verb.upper()
        length = origin.requests[0].headers.get("content-length")
        assert length == ("0" if verb in ("post", "put", "patch") else None)

    talk(lambda request: b"HTTP/1.1 204 No Content\r\n\r\n", work)


@pytest.mark.parametrize("options, media_type, body", [
    ({"content": b"\x00\x01"}, None, b"\x00\x01"),
    ({"content": "ü"}, "text/plain; charset=utf-8", "ü".encode()),
    ({"content": bytearray(b"ab")}, None, b"ab"),
    ({"json": {"a": [1, None, "ü"]}}, "application/json", '{"a":[1,null,"ü"]}'.encode()),
    ({"data": {"a": "1 2", "b": ["x", "y"]}}, "application/x-www-form-urlencoded", b"a=1+2&b=x&b=y"),
    ({"data": [("a", "1"), ("a", "2")]}, "application/x-www-form-urlencoded", b"a=1&a=2"),
    ({"content": io.BytesIO(b"file")}, None, b"file"),
    ({"content": [b"ab", b"", b"c"]}, None, b"abc"),
    ({"content": b"long" * 50_000}, None, b"long" * 50_000),
])
def test_contents(options, media_type, body):
    async def work(client, origin):
        await client.post(origin.url, **options)
        assert origin.requests[0].body == body and origin.requests[0].headers.get("content-type") == media_type
        known = not isinstance(options.get("content"), list)
        assert origin.requests[0].headers.get("content-length") == (str(len(body)) if known else None)
        assert origin.requests[0].headers.get("transfer-encoding") == (None if known else "chunked")
        assert (await client.get(origin.url)).status == 200 and origin.connections == 1, "the connection is in order"

    talk(lambda request: answer(), work)


def test_an_async_iterator_is_sent_in_chunks_and_progress_is_told():
    async def pieces():
        for number in range(3):
            await flowcoro.checkpoint()
            yield b"x" * number

    async def work(client, origin):
        told = []
        await client.put(origin.url, content=pieces(), upload_progress=lambda done, whole: told.append((done, whole)))
        assert origin.requests[0].body == b"xxx" and told == [(0, None), (1, None), (3, None)]
        told.clear()
        await client.put(origin.url, content=io.BytesIO(b"12345"), upload_progress=lambda done, whole: told.append((done, whole)))
        assert told == [(5, 5)]

    talk(lambda request: answer(), work)


def test_a_response_can_be_passed_on_as_it_comes_and_its_error_is_not_ours():
    async def handler(request):
        if request.target != "/cut":
            return answer(b"z" * 200_000 if request.method == "GET" else request.body)
        await request.sock.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")

    async def broken():
        yield b"a"
        raise BrokenError(None, "another connection")

    async def work(client, origin):
        async with client.stream("GET", origin.url) as response:
            assert len((await client.post(origin.url + "/on", content=response)).content) == 200_000
        with pytest.raises(TransferError, match="GET .*/cut: "):
            async with client.stream("GET", origin.url + "/cut") as response:
                await client.post(origin.url + "/on", content=response)
        with pytest.raises(TransferError, match="another connection"):
            await client.post(origin.url + "/on", content=broken())

    talk(handler, work, timeout=60)


def test_a_file_is_sent_from_where_it_is(tmp_path):
    (tmp_path / "f.txt").write_bytes(b"0123456789" * 60_000)

    async def work(client, origin):
        with open(tmp_path / "f.txt", "rb") as file:
            file.seek(10)
            await client.put(origin.url, content=file)
        assert origin.requests[0].body == b"0123456789" * 59_999 and origin.requests[0].headers["content-length"] == "599990"
        with open(tmp_path / "f.txt") as file, pytest.raises(TypeError, match="binary"):
            await client.put(origin.url, content=file)

    talk(lambda request: answer(), work)


def test_multipart_has_fields_and_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")

    async def work(client, origin):
        with open(tmp_path / "a.png", "rb") as file:
            await client.post(origin.url, data={"title": "ü", "n": [1, 2]}, files={
                "image": file, "note": ("n.txt", "text"), "raw": ("r.bin", io.BytesIO(b"raw"), "x/y"), "b": b"bytes"})
        request = origin.requests[0]
        assert request.headers["content-type"].startswith("multipart/form-data; boundary=")
        assert int(request.headers["content-length"]) == len(request.body)
        for part in (b'name="title"\r\n\r\n\xc3\xbc\r\n', b'name="n"\r\n\r\n1\r\n', b'name="n"\r\n\r\n2\r\n',
                     b'name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n\x89PNG\r\n',
                     b'name="note"; filename="n.txt"\r\nContent-Type: text/plain\r\n\r\ntext\r\n',
                     b'name="raw"; filename="r.bin"\r\nContent-Type: x/y\r\n\r\nraw\r\n', b'filename="upload"'):
            assert part in request.body

    talk(lambda request: answer(), work)


@pytest.mark.parametrize("options, error", [
    ({"content": b"", "json": 1}, TypeError), ({"data": "a=b"}, TypeError), ({"content": 5}, TypeError),
    ({"auth": "x"}, TypeError),
    ({"timeout": -1}, ValueError), ({"timeout": "1"}, TypeError), ({"headers": {"Content-Length": "5"}}, ValueError),
    ({"headers": {"X": "a\r\nB: c"}}, LocalProtocolError), ({"headers": {"X y": "a"}}, LocalProtocolError),
    ({"retries": -1}, ValueError), ({"max_bytes": -1}, ValueError), ({"files": {"a": 5}}, TypeError),
    ({"nonsense": 1}, TypeError), ({"content": {"a": 1}}, TypeError), ({"files": {"a": {"b": "c"}}}, TypeError),
    ({"cookies": {"a": "b;c"}}, ValueError), ({"params": "a=b"}, TypeError),
])
def test_arguments_that_make_no_sense(options, error):
    async def work(client, origin):
        with pytest.raises(error):
            await client.post(origin.url, **options)
        assert origin.requests == []

    talk(lambda request: answer(), work)


@pytest.mark.parametrize("method", ["G ET", "", "CONNECT", "GET\r\nX: y", 5])
def test_a_method_is_a_token(method):
    async def work(client, origin):
        with pytest.raises(ValueError):
            await client.request(method, origin.url)

    talk(lambda request: answer(), work)


def test_the_caller_headers_replace_those_of_the_client():
    async def work(client, origin):
        await client.get(origin.url, headers={"accept": "x/y", "Host": "other", "User-Agent": "me"})
        assert origin.requests[0].headers.get_all("accept") == ["x/y"] and origin.requests[0].headers["host"] == "other"
        await client.get(origin.url, headers=[("X", "1"), ("X", "2")])
        assert origin.requests[1].headers.get_all("x") == ["1", "2"]
        assert origin.requests[1].headers["user-agent"].startswith("flowcoro/")

    talk(lambda request: answer(), work)


# ---- URLs ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("url, text, host, port", [
    ("http://Example.COM", "http://example.com/", "example.com", 80), ("HTTPS://a:443/b", "https://a/b", "a", 443),
    ("http://a:8080?x", "http://a:8080/?x", "a", 8080), ("http://[::1]:81/", "http://[::1]:81/", "::1", 81),
    ("http://a/ü b?q=ä#f", "http://a/%C3%BC%20b?q=%C3%A4", "a", 80), ("http://bücher.de/", "http://xn--bcher-kva.de/",
                                                                      "xn--bcher-kva.de", 80),
    ("http://u:p@a/", "http://a/", "a", 80), ("http://a/%zz<>\"", "http://a/%zz%3C%3E%22", "a", 80),
    ("http://a:/", "http://a/", "a", 80),
])
def test_urls(url, text, host, port):
    parsed = _Url(url)
    assert (parsed.text, parsed.host, parsed.port) == (text, host, port)


@pytest.mark.parametrize("url", [
    "", "a", "/x", "ftp://a/", "http://", "http:///x", "http://a b/", "http://a:99999/", "http://a:0/", "http://a:x/",
    "http://[::1/",
    "http://a\r\nX: y/", "http://a/\x00", "http://a/\t", "http://a\\@b/", "http://a@b@c/", "http://[zz]/", "http://a:1:2/",
    " http://a/",
    "http://%61/", "http://" + "a" * 70 + ".ü/", "http://a\u2100b/"])
def test_what_is_no_url(url):
    with pytest.raises(ValueError):
        _Url(url)


@pytest.mark.parametrize("host", ["fa\u00df.de", "STRA\u1e9eE.de", "\u03c3\u03c2.gr", "a\u200db.com", "a\u200cb.com"])
def test_a_host_that_two_standards_encode_in_two_ways_is_refused(host):
    with pytest.raises(ValueError, match="xn--"):
        _Url(f"http://{host}/")


def test_a_url_that_is_refused_does_not_show_its_password():
    for url in ("ftp://user:secret@host/", "http://user:secret@host/\x00", "http://user:secret@host:0/",
                "http://user:a@secret@host/", "http://user:secret/a@host/", "http://user:secret?#@host/",
                "http://user:a\nsecret@host"):
        with pytest.raises(ValueError) as caught:
            _Url(url)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", [None, b"http://host/", 5])
@pytest.mark.parametrize("base", ["", "http://host/"])
def test_a_url_is_text(url, base):
    async def main():
        async with HttpClient(base_url=base, trust_env=False) as client:
            for verb in client.get, client.post:
                with pytest.raises(TypeError, match="give a str"):
                    await verb(url)

    flowcoro.run(main())


@pytest.mark.parametrize("base, url, target", [
    ("", "/a", "/a"), ("/", "a", "/a"), ("/api", "/users", "/api/users"), ("/api/", "users?x=1", "/api/users?x=1"),
    ("/api", "", "/api"),
    ("/api", "?q=1", "/api?q=1"), ("/api", "//evil/x", "/api//evil/x"), ("/api", "x?u=http://y/", "/api/x?u=http://y/")])
def test_base_url(base, url, target):
    async def work(client, origin):
        async with HttpClient(base_url=origin.url + base, trust_env=False) as other:
            await other.get(url)
            await other.get(origin.url + "/absolute")
        assert [request.target for request in origin.requests] == [target, "/absolute"]

    talk(lambda request: answer(), work)


@pytest.mark.parametrize("url, params, target", [
    ("/a", {"x": 1, "y": ["b", "c d"]}, "/a?x=1&y=b&y=c+d"), ("/a?z=1", {"x": True, "n": None}, "/a?z=1&x=true&n="),
    ("/a#f", [("x", "ä&"), ("x", "2")], "/a?x=%C3%A4%26&x=2"), ("/a", {}, "/a"), ("/a", {"x": []}, "/a")])
def test_params(url, params, target):
    async def work(client, origin):
        await client.get(origin.url + url, params=params)
        assert origin.requests[0].target == target

    talk(lambda request: answer(), work)


def test_the_fields_of_a_form_are_written_as_params_are():
    async def work(client, origin):
        fields = {"x": True, "n": None, "y": [1, "b"]}
        await client.post(origin.url, data=fields)
        await client.post(origin.url, data=fields, files={})
        assert origin.requests[0].body == b"x=true&n=&y=1&y=b"
        form = origin.requests[1].body
        assert [part.split(b"\r\n")[3] for part in form.split(form[:34])[1:-1]] == [b"true", b"", b"1", b"b"]

    talk(lambda request: answer(), work)


def test_the_user_of_a_base_url_is_for_what_is_below_it():
    async def work(client, origin):
        async with HttpClient(base_url=origin.url.replace("//", "//me:p%61ss@") + "/a?x", trust_env=False) as other:
            await other.get("b")
            await other.get(origin.url)
        assert [request.headers.get("authorization") for request in origin.requests] == ["Basic bWU6cGFzcw==", None]
        assert origin.requests[0].target == "/a/b"

    talk(lambda request: answer(), work)


def test_params_of_the_client_come_first():
    async def work(client, origin):
        await client.get(origin.url, params={"b": 2})
        await client.get(origin.url)
        assert [request.target for request in origin.requests] == ["/?a=1&b=2", "/?a=1"]

    talk(lambda request: answer(), work, params={"a": 1})


# ---- what comes back -------------------------------------------------------------------------------------------

def respond(reply):
    """The ClientResponse that these bytes are; the connection ends after them."""
    async def handler(request):
        await request.sock.write(reply)

    async def work(client, origin):
        return await client.get(origin.url)

    return talk(handler, work)


@pytest.mark.parametrize("reply, content", [
    (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", b"until the end"), (b"HTTP/1.0 200 OK\r\n\r\n", b""), (answer(b"x"), b"x"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;x=y\r\na\r\n2\r\nbc\r\n0\r\nX-T: 1\r\n\r\n", b"abc"),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + answer(b"y"), b"y"),
    (b"HTTP/1.1 204 No Content\r\n\r\n", b""), (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", b"")])
def test_framings(reply, content):
    response = respond(reply)
    assert response.content == content
    assert (response.trailers and response.trailers["x-t"]) == ("1" if b"X-T" in reply else None)


def test_text_json_links_and_cookies():
    response = respond(answer("ü".encode("latin-1"), "200 OK", "Content-Type: text/plain; charset=iso-8859-1",
                              "Link: </next?p=2>; rel=\"Next last\"; title=\"n\", <http://b/>", "Link: ,;,",
                              "Set-Cookie: a=b; Path=/",
                              "Set-Cookie: c=d=e"))
    assert response.text == "ü" and response.cookies == {"a": "b", "c": "d=e"}
    url = response.url.rstrip("/") + "/next?p=2"
    assert response.links["next"]["url"] == response.links["last"]["url"] == url and response.links["next"]["title"] == "n"
    assert response.links["http://b/"]["url"] == "http://b/"
    with pytest.raises(ResponseError, match="no JSON"):
        response.json()
    assert respond(answer("{\"a\": [1]}")).json() == {"a": [1]}
    assert respond(answer(b"\xff", "200 OK", "Content-Type: text/plain; charset=nonsense")).text == "\ufffd"
    with pytest.raises(ResponseError):
        respond(answer("[" * 100_000)).json()


def test_raise_for_status():
    assert respond(answer()).raise_for_status().status == 200
    response = respond(answer("no", "404 Not Found"))
    with pytest.raises(StatusError, match="GET http://127.0.0.1:[0-9]+/: 404 Not Found") as caught:
        response.raise_for_status()
    assert caught.value.response is response and caught.value.request is response.request


@pytest.mark.parametrize("coding, encode", [
    ("gzip", gzip.compress), ("deflate", zlib.compress), ("x-gzip", gzip.compress), ("identity", bytes),
    ("deflate, gzip", lambda data: gzip.compress(zlib.compress(data)))])
def test_a_content_is_decoded(coding, encode):
    content = random.Random(SEED).randbytes(300_000) + b"a" * 3_000_000
    encoded = encode(content)

    async def work(client, origin):
        told = []
        response = await client.get(origin.url, progress=lambda done, whole: told.append((done, whole)))
        assert response.content == content and told[-1] == (len(encoded), len(encoded))
        async with client.stream("GET", origin.url) as response:
            assert response.content is None
            assert b"".join([piece async for piece in response]) == content
        assert origin.connections == 1
        assert (await client.head(origin.url)).content == b"" and origin.connections == 1

    def handler(request):
        reply = answer(encoded, "200 OK", f"Content-Encoding: {coding}")
        return reply if request.method == "GET" else reply[:-len(encoded)]

    talk(handler, work)


def test_a_coding_that_is_not_known_is_left_as_it_is():
    response = respond(answer(b"raw", "200 OK", "Content-Encoding: br"))
    assert response.content == b"raw" and response.headers["content-encoding"] == "br"


def test_without_decoding_a_content_is_as_it_came():
    packed = gzip.compress(b"hello")

    async def work(client, origin):
        assert (await client.get(origin.url)).content == packed
        async with client.stream("GET", origin.url) as response:
            assert await response.read() == packed

    talk(lambda request: answer(packed, "200 OK", "Content-Encoding: gzip"), work, decode=False)


# ---- streams ---------------------------------------------------------------------------------------------------

def test_a_stream_is_read_in_pieces_and_its_connection_used_again():
    async def work(client, origin):
        async with client.stream("POST", origin.url, content=b"x") as response:
            assert response.content is None
            with pytest.raises(RuntimeError, match="not read"):
                response.text
            assert sum([len(piece) async for piece in response]) == 1_000_000
            assert [piece async for piece in response] == []
            assert not client.statistics()[origin.url]["in_use"], "given back with the last byte"
        async with client.stream("GET", origin.url) as response:
            assert len(await response.read()) == 1_000_000 == len(response.text) and await response.read() is response.content
        assert origin.connections == 1
        async with client.stream("GET", origin.url) as response:
            await anext(response)
        with pytest.raises(flowcoro.ClosedError):
            await anext(response)
        await client.get(origin.url)
        assert origin.connections == 2, "what was left of the third makes its connection useless"

    talk(lambda request: answer(b"y" * 1_000_000), work)


def test_a_stream_that_is_left_when_all_has_come_gives_its_connection_back():
    async def work(client, origin):
        async with client.stream("GET", origin.url):
            pass
        async with client.stream("GET", origin.url):
            pass
        assert origin.connections == 1

    talk(lambda request: answer(b"short"), work)


def test_lines_of_a_stream():
    async def work(client, origin):
        async with client.stream("GET", origin.url) as response:
            assert [line async for line in response.lines()] == ["a", "b\rc", "", "ü"]
        async with client.stream("GET", origin.url) as response:
            with pytest.raises(ResponseError, match="a line of more"):
                [line async for line in response.lines(limit=5)]
        for limit, text in (5, "abcde"), (5, "abcde\r\nb"), (5, "a\nabcde\nb"):
            async with client.stream("GET", origin.url) as response:
                assert [line async for line in response.lines(limit)] == text.splitlines()
            async with client.stream("GET", origin.url) as response:
                with pytest.raises(ResponseError, match="a line of more than 4 bytes"):
                    [line async for line in response.lines(limit - 1)]

    lines = "abcde", "abcde\r\nb", "a\nabcde\nb"
    talk(scripted(answer("a\r\nb\rc\n\nü"), answer("abcdefgh"), *[answer(text) for text in lines for _ in range(2)]), work)


def test_reading_a_stream_holds_no_more_than_max_bytes():
    async def work(client, origin):
        async with client.stream("GET", origin.url, max_bytes=1000) as response:
            with pytest.raises(ResponseError, match="1000"):
                await response.read()

    talk(lambda request: b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n" + gzip.compress(b"x" * 2000),
         work)


@pytest.mark.parametrize("framing", ["Content-Length: 5000\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n1388\r\n", "\r\n"])
def test_a_stream_that_is_iterated_may_be_longer_than_max_bytes(framing):
    async def work(client, origin):
        async with client.stream("GET", origin.url) as response:
            assert sum([len(piece) async for piece in response]) == 5000
        async with client.stream("GET", origin.url) as response:
            with pytest.raises(ResponseError, match="1000"):
                await response.read()

    async def handler(request):
        await request.sock.write(f"HTTP/1.1 200 OK\r\n{framing}".encode() + b"x" * 5000)
        if "chunked" in framing:
            await request.sock.write(b"\r\n0\r\n\r\n")

    talk(handler, work, max_bytes=1000)


@pytest.mark.parametrize("how_much", [1, 2])
def test_a_stream_that_was_iterated_is_not_read_as_if_it_were_whole(how_much):
    async def work(client, origin):
        async with client.stream("GET", origin.url) as response:
            for _ in range(how_much):
                await anext(response, None)
            with pytest.raises(RuntimeError, match="in pieces already"):
                await response.read()
        async with client.stream("GET", origin.url) as response:
            assert await response.read() == await response.read() == b"hello"
            assert [piece async for piece in response] == [b"hello"] and await response.read() == b"hello"

    talk(lambda request: answer("hello"), work)


# ---- connections -----------------------------------------------------------------------------------------------

def test_a_connection_that_the_server_has_closed_is_not_used_even_for_a_post():
    async def handler(request):
        await request.sock.write(answer(request.method))

    async def work(client, origin):
        for number in range(1, 6):
            assert (await client.post(origin.url, content=b"x")).text == "POST"
            await flowcoro.sleep(0.02)
            assert len(origin.requests) == number == origin.connections

    talk(handler, work)


def test_a_kept_connection_that_ends_without_an_answer_is_tried_once_more_if_that_is_safe():
    def handler(request):
        return answer(request.body) if request.headers.get("x") != "1" or request.connection > 1 else None

    async def work(client, origin):
        await client.get(origin.url)
        assert (await client.put(origin.url, content=io.BytesIO(b"body"), headers={"X": "1"})).text == "body"
        assert [request.connection for request in origin.requests] == [1, 1, 2]

    talk(handler, work)


@pytest.mark.parametrize("method, content", [("POST", b"x"), ("PATCH", b""), ("PUT", [b"once"])])
def test_and_not_if_it_is_not_safe(method, content):
    async def work(client, origin):
        await client.get(origin.url)
        with pytest.raises(TransferError, match="ended"):
            await client.request(method, origin.url, content=iter(content) if isinstance(content, list) else content)
        assert len(origin.requests) == 2

    talk(lambda request: answer() if request.method == "GET" else None, work)


def test_it_is_tried_only_once_more():
    async def work(client, origin):
        await client.get(origin.url + "/good")
        with pytest.raises(TransferError):
            await client.get(origin.url + "/bad")
        assert [request.target for request in origin.requests] == ["/good", "/bad", "/bad"]

    talk(lambda request: answer() if request.target == "/good" else None, work)


def test_and_on_a_new_connection_not_on_another_kept_one():
    async def handler(request):
        if "x" in request.headers:
            return answer("new") if request.connection == 3 else None
        await flowcoro.sleep(0.02)              # so that there are two at once
        return answer()

    async def work(client, origin):
        async with flowcoro.TaskGroup() as group:
            for _ in range(2):
                group.spawn(client.get(origin.url))
        assert (await client.get(origin.url, headers={"X": "y"})).text == "new"
        assert [request.connection for request in origin.requests[2:]][1:] == [3]

    talk(handler, work)


def test_what_has_begun_to_be_answered_is_not_asked_again():
    async def handler(request):
        if request.target == "/":
            return answer()
        await request.sock.write(b"HTTP/1.1 2")

    async def work(client, origin):
        await client.get(origin.url)
        with pytest.raises(TransferError, match="middle of a head"):
            await client.get(origin.url + "/x")
        assert len(origin.requests) == 2

    talk(handler, work)


def test_another_protocol_is_not_spoken():
    async def work(client, origin):
        with pytest.raises(ResponseError, match="where a response has to be"):
            await client.get(origin.url, headers={"Connection": "upgrade", "Upgrade": "x"})

    talk(lambda request: b"HTTP/1.1 101 x\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", work)


def test_a_first_connection_that_ends_without_an_answer_is_not_tried_again():
    async def work(client, origin):
        with pytest.raises(TransferError):
            await client.get(origin.url)
        assert len(origin.requests) == 1

    talk(lambda request: None, work)


@pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"x", b"\r\n"])
@pytest.mark.parametrize("late", [False, True])
def test_an_answer_to_nothing_is_no_answer_to_the_next_request(extra, late):
    async def handler(request):
        await request.sock.write(answer("good") + (b"" if late else extra))
        if late:
            await request.sock.write(extra)
        return b""

    async def work(client, origin):
        for number in range(1, 4):
            assert (await client.get(origin.url)).text == "good"
            await flowcoro.sleep(0.01)
        assert origin.connections == 3

    talk(handler, work)


def test_no_more_connections_than_allowed_and_all_are_served():
    async def work(client, origin):
        async with flowcoro.TaskGroup() as group:
            tasks = [group.spawn(client.get(origin.url + f"/{number}")) for number in range(20)]
        assert sorted(task.result().text for task in tasks) == sorted(f"/{number}" for number in range(20))
        assert origin.connections == 3

    async def handler(request):
        await flowcoro.sleep(0.001)
        return answer(request.target)

    talk(handler, work, max_connections=3)


def test_who_waits_for_a_connection_is_told_so():
    async def work(client, origin):
        async with client.stream("GET", origin.url):
            with pytest.raises(RequestTimeout,
                               match="it waited for one to be returned; of max_connections=1 there were 1 in use") as caught:
                await client.get(origin.url, timeout=Timeouts(connect=0.05))
            assert caught.value.phase == "connect"

    talk(lambda request: answer(b"x" * 10**6), work, max_connections=1)


def test_nobody_there_is_a_connect_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))

        async def main():
            async with HttpClient(trust_env=False) as client:
                with pytest.raises(ConnectError, match="GET http://127.0.0.1") as caught:
                    await client.get(f"http://127.0.0.1:{taken.getsockname()[1]}/")
                assert caught.value.request.method == "GET" and isinstance(caught.value.__cause__, OSError)
                assert given_back(client)

        flowcoro.run(main())


def test_a_closed_client_says_so_and_those_who_read_are_told():
    async def work(client, origin):
        async with client.stream("GET", origin.url) as response:
            await client.close()
            with pytest.raises(flowcoro.ClosedError):
                await response.read()
        for _ in range(4):
            with pytest.raises(flowcoro.ClosedError):
                await client.get(origin.url)
        await client.close()

    talk(lambda request: answer(b"x" * 10**6), work)


def test_a_unix_socket(tmp_path):
    path = str(tmp_path / "s")

    async def main():
        async with serving(lambda request: answer(request.headers["host"]), unix=path), HttpClient(unix=path) as client:
            assert (await client.get("http://docker/x")).text == "docker"
        with pytest.raises(ValueError):
            HttpClient(unix=path, connect=print)

    flowcoro.run(main())


def test_origins_beyond_the_limit_are_forgotten(monkeypatch):
    monkeypatch.setattr("flowcoro_http.KEPT_ORIGINS", 2)

    async def work(client, origin):
        for name in "abcab":
            for _ in range(3):
                assert (await client.get(f"http://{name}.test/")).status == 200
        assert len(client.statistics()) == 2 and origin.connections == 5

    async def main():
        async with serving(lambda request: answer()) as origin:
            async def connect(host, port, tls):
                return await Socket.connect("127.0.0.1", origin.port)

            async with HttpClient(connect=connect, trust_env=False) as client:
                await work(client, origin)

    flowcoro.run(main())


def test_an_origin_in_use_is_not_forgotten(monkeypatch):
    monkeypatch.setattr("flowcoro_http.KEPT_ORIGINS", 2)
    go_on = flowcoro.Event()

    async def handler(request):
        if request.headers["host"] == "a.test":
            await go_on.wait()
        return answer()

    async def main():
        async with serving(handler) as origin:
            async def connect(host, port, tls):
                return await Socket.connect("127.0.0.1", origin.port)

            async with HttpClient(connect=connect, trust_env=False, max_connections=1) as client:
                async with flowcoro.TaskGroup() as group:
                    for _ in range(2):                  # one has the connection, the other waits for it
                        group.spawn(client.get("http://a.test/"))
                    for name in "bcd":
                        await client.get(f"http://{name}.test/")
                    assert list(client.statistics()) == ["http://a.test:80", "http://d.test:80"]
                    go_on.set()
                assert given_back(client) and client.statistics()["http://a.test:80"]["created"] == 1

    flowcoro.run(main())


def test_several_workers_share_a_client():
    async def handler(request):
        await flowcoro.checkpoint()
        return answer(request.target)

    async def main():
        async with serving(handler) as origin, HttpClient(trust_env=False, max_connections=7) as client:
            async def one(number):
                for turn in range(5):
                    assert (await client.get(f"{origin.url}/{number % 3}")).text == f"/{number % 3}"
                    response = await client.post(f"{origin.url}/{number}x{turn}", content=[b"x"])
                    assert response.text == f"/{number}x{turn}"

            async with flowcoro.TaskGroup() as group:
                for number in range(20):
                    group.spawn(one(number))
            assert given_back(client) and origin.connections <= 7

    flowcoro.run(main(), workers=3)
