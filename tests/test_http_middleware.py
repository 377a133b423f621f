"""Middleware: each one driven directly, with a request and a call_next, and the order of them through a server."""

import base64
import gzip
import inspect
import io
import json
import re
import zlib

import pytest

import flowcoro
import flowcoro_http
from flowcoro_http import (HttpError, HttpServer, Request, Response, Signer, access_log, basic_auth, bearer_auth, body_limit,
                           compress, cors, etag, event_stream, request_id, security_headers, sessions, timeout, trusted_proxies)
from flowcoro_testing import run_in_kernel
from http_helpers import exchange, serving

TEXT = "the quick brown fox jumps over the lazy dog. " * 100


def ask(middleware, request, answer=None):
    """What the middleware gives for a request which `answer` (a function of it, async or not, or a Response) answers."""
    @run_in_kernel
    async def main():
        return await through(middleware, request, answer)
    return main()


async def through(middleware, request, answer=None):
    async def call_next(request):
        result = answer(request) if callable(answer) else answer
        if inspect.isawaitable(result):
            result = await result
        return Response(200, TEXT) if result is None else result
    return await middleware(request, call_next)


def get(target="/", *headers, method="GET", **options):
    return Request(method, target, headers, **options)


async def content_of(response):
    if response.stream is None:
        return response.content
    try:
        return b"".join([flowcoro_http._piece(piece) async for piece in response.stream])
    finally:
        await flowcoro_http._close_stream(response.stream)


class Stream:
    """Pieces, and whether it was closed."""

    def __init__(self, *pieces):
        self.pieces, self.closed = list(pieces), 0

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.pieces:
            raise StopAsyncIteration
        return self.pieces.pop(0)

    async def aclose(self):
        self.closed += 1


# ---- access log ----------------------------------------------------------------------------------------------

def logged(request, answer=None, **options):
    """(lines, the Response) after its stream has been sent."""
    lines = []

    @run_in_kernel
    async def main():
        response = await through(access_log(lines.append, **options), request, answer)
        await content_of(response)
        return response
    return lines, main()


def test_the_common_format_is_apaches(monkeypatch):
    monkeypatch.setattr(flowcoro_http.time, "time", lambda: 1_000_000_000.9)
    request = get("/a?b=c", client=("192.0.2.1", 5))
    request.user = "ann"
    lines, _ = logged(request, Response(200, b"12345"))
    assert lines == ['192.0.2.1 - ann [09/Sep/2001:01:46:40 +0000] "GET /a?b=c HTTP/1.1" 200 5']
    assert logged(get(method="HEAD"), Response(204, None))[0][0].endswith('"HEAD / HTTP/1.1" 204 -')
    request.user = ("no", "str")
    assert logged(get())[0][0].startswith("unix - - [") and "('no',\\x20'str')" in logged(request)[0][0]


def test_json_has_what_is_known_and_the_time_it_took():
    async def slow(request):
        await flowcoro.sleep(1.5)
        request.request_id = "r1"
        return Response(200, "x" * 10)

    lines, _ = logged(get("/", ("Host", "example"), ("User-Agent", "a"), client=("::1", 2)), slow, format="json")
    found = json.loads(lines[0])
    assert found.pop("time") > 1e9
    assert found == {"client": "::1", "method": "GET", "target": "/", "version": "1.1", "status": 200, "bytes": 10,
                     "seconds": 1.5, "request_id": "r1", "host": "example", "user_agent": "a"}


@pytest.mark.parametrize("evil", ['a" 200 5', "a\\", 'x\x85y', "\x9b31m", "\xa0", "a b", "\u2028", "\ud800"])
def test_nothing_that_a_client_sends_leaves_its_place_in_the_line(evil):
    request = get("/" + evil, ("User-Agent", evil.encode("latin-1", "replace").decode("latin-1")), client=("192.0.2.1", 5))
    request.user = evil
    for format in ("common", "json"):
        [line], _ = logged(request, format=format)
        assert line.isascii() and line.isprintable()
        assert "\\" not in re.sub(r"\\x[0-9a-f]{2}", "", line) or format == "json"
        if format == "json":
            assert json.loads(line)["target"] == "/" + evil
        else:
            assert re.fullmatch(r'192\.0\.2\.1 - \S+ \[[^]]*\] "GET /[^"]* HTTP/1\.1" 200 4500', line)


def test_a_stream_is_logged_at_its_end_with_what_was_sent_and_how_long_it_took():
    async def pieces():
        yield b"12345"
        await flowcoro.sleep(3)
        yield "ü"

    lines = []

    @run_in_kernel
    async def main():
        response = await through(access_log(lines.append, format="json"), get(), Response(200, pieces()))
        assert await anext(response.stream) == b"12345" and not lines
        assert await content_of(response) == "ü".encode()
        again = await through(access_log(lines.append, format="json"), get(), Response(200, pieces()))
        await again.stream.aclose()                             # as for HEAD, or a client that has gone
        await again.stream.aclose()
        file = Response(200, None)
        file.stream, file.content = flowcoro_http._FileStream(io.BytesIO(b"x" * 100), 10, 50), None
        assert type((await through(access_log(lines.append, format="json"), get(), file)).stream) is flowcoro_http._FileStream
        await content_of(file)
    main()
    assert [(json.loads(line)["bytes"], json.loads(line)["seconds"]) for line in lines] == [(7, 3.0), (0, 0.0), (50, 0.0)]


def test_a_log_leaves_the_type_of_a_stream_and_its_first_piece_even_an_empty_one_as_they_are():
    async def pieces():
        yield ""
        yield "text"

    app, lines = HttpServer(), []
    app.middleware(access_log(lines.append))

    @app.get("/")
    async def stream(request):
        return pieces()

    @run_in_kernel
    async def main():
        response = await through(access_log(lines.append), get(), Response(200, pieces()))
        assert await anext(response.stream) == ""               # it sends the head
        await response.stream.aclose()
        async with app.test_client() as client:
            response = await client.get("/")
            assert response.headers["content-type"] == "text/plain; charset=utf-8" and response.text == "text"
    main()


def test_a_file_is_logged_by_each_log():
    one, other = [], []

    @run_in_kernel
    async def main():
        file = Response(200, None)
        file.stream, file.content = flowcoro_http._FileStream(io.BytesIO(b"x" * 100), 10, 50), None

        async def inner(request):
            return await through(access_log(one.append, format="json"), request, file)

        await content_of(await through(access_log(other.append, format="json"), get(), inner))
    main()
    assert [json.loads(line)["bytes"] for line in one + other] == [50, 50]


def test_a_client_that_goes_before_the_answer_is_logged_with_499():
    lines = []

    @run_in_kernel
    async def main():
        with flowcoro.move_on_after(1):
            await through(access_log(lines.append), get(), lambda request: flowcoro.sleep(5))
    main()
    assert lines[0].endswith(' 499 -')


def test_a_log_goes_to_streams_and_its_errors_spoil_no_answer(reports, capsys):
    stream = io.StringIO()
    ask(access_log(stream), get())
    assert stream.getvalue().count("\n") == 1
    ask(access_log(), get())
    assert "GET / HTTP/1.1" in capsys.readouterr().err
    stream.close()
    assert ask(access_log(stream), get()).status == 200
    assert "access log" in reports[0][0]
    for bad in ({"format": "nginx"}, {"to": 5}):
        with pytest.raises((ValueError, TypeError)):
            access_log(**bad)


# ---- CORS ----------------------------------------------------------------------------------------------------

def preflight(middleware, origin, method="PUT", *headers):
    return ask(middleware, get("/", ("Origin", origin), ("Access-Control-Request-Method", method), *headers, method="OPTIONS"),
               lambda request: pytest.fail("a preflight comes to no handler"))


def test_a_preflight_is_answered_for_origins_that_are_listed():
    middleware = cors(["https://a.example"], headers=["X-Token"], max_age=5)
    response = preflight(middleware, "https://a.example")
    assert response.status == 204 and dict(response.headers.items()) == {
        "Access-Control-Allow-Origin": "https://a.example", "Access-Control-Allow-Headers": "X-Token",
        "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, PATCH, DELETE", "Access-Control-Max-Age": "5",
        "Vary": "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"}
    with pytest.raises(HttpError) as caught:
        preflight(middleware, "https://b.example")
    assert caught.value.status == 403 and ("Vary", "Origin") in caught.value.headers


def test_answers_may_be_read_by_origins_that_are_listed_and_caches_are_told():
    middleware = cors(["https://a.example"], expose=["X-Total"], credentials=True)
    headers = ask(middleware, get("/", ("Origin", "https://a.example"))).headers
    assert headers["access-control-allow-origin"] == "https://a.example" and headers["vary"] == "Origin"
    assert headers["access-control-allow-credentials"] == "true" and headers["access-control-expose-headers"] == "X-Total"
    for request in (get("/", ("Origin", "https://b.example")), get("/"),
                    get("/", ("Origin", "https://a.example"), ("Origin", "https://a.example"))):
        headers = ask(middleware, request, Response(200, "x", [("Vary", "Accept")])).headers
        assert headers["vary"] == "Accept, Origin" and "access-control-allow-origin" not in headers
    for vary in ("*", "origin, accept", "Accept, Origin"):
        assert ask(middleware, get("/"), Response(200, "x", [("Vary", vary)])).headers.get_all("vary") == [vary]
    public = ask(cors("*"), get("/", ("Origin", "https://b.example"))).headers
    assert public["access-control-allow-origin"] == "*" and "vary" not in public


def test_options_without_a_preflight_is_the_handlers():
    assert ask(cors("*"), get("/", ("Origin", "https://a"), method="OPTIONS"), Response(200, "mine")).content == b"mine"


@pytest.mark.parametrize("pattern, taken, refused", [
    ("https://a.example", ["https://a.example"], ["http://a.example", "https://a.example:8", "https://a.example.evil", "null",
                                                  "https://A.example", "https://evil-a.example", "https://x.a.example", ""]),
    ("https://*.a.example", ["https://x.a.example", "https://y.x.a.example"],
     ["https://a.example", "https://.a.example", "https://evil.com/.a.example", "https://evil.com#.a.example",
      "https://evil.com?.a.example", "https://evil.com\\.a.example", "http://x.a.example", "https://x.a.example:8",
      "https://xa.example", "https://x.a.example.", "https://evil@x.a.example", "https://evil%x.a.example",
      "nullhttps://x.a.example"]),
    ("http://localhost:*", ["http://localhost", "http://localhost:8000"],
     ["http://localhost:", "http://localhost:8000.evil.com", "http://localhost:x", "http://localhosts:1",
      "http://localhost:123456"]),
    ("http://[::1]:*", ["http://[::1]:8000"], ["http://[::2]:8000"]),
    ("null", ["null"], ["https://null", "NULL"]),
])
def test_origins_fit_patterns_as_a_whole(pattern, taken, refused):
    fits = flowcoro_http._origin_test([pattern])
    assert [origin for origin in taken if not fits(origin)] == [] and [origin for origin in refused if fits(origin)] == []


@pytest.mark.parametrize("arguments, options", [
    (("*",), {"credentials": True}), ((["https://a.example/"],), {}), ((["a.example"],), {}), ((["*"],), {}),
    ((["https://*"],), {}), ((["https://a.*.example"],), {}), ((["https://A.example"],), {}), (("https://a.example",), {}),
    ((["https://a"],), {"headers": ["a b"]}), ((["https://a"],), {"headers": "*", "credentials": True}),
])
def test_cors_that_browsers_or_reason_refuse_is_an_error(arguments, options):
    with pytest.raises((ValueError, TypeError), match="cors"):
        cors(*arguments, **options)


# ---- compression ---------------------------------------------------------------------------------------------

def inflated(response):
    data = flowcoro.run(content_of(response))
    coding = response.headers.get("content-encoding")
    return {None: bytes, "gzip": gzip.decompress, "deflate": zlib.decompress}[coding](data)


@pytest.mark.parametrize("accepted, coding", [
    ("gzip", "gzip"), ("deflate", "deflate"), ("gzip;q=0", None), ("br", None), (None, None), ("deflate, gzip;q=0.5", "deflate")])
def test_text_is_compressed_for_who_accepts_it(accepted, coding):
    headers = [("Accept-Encoding", accepted)] * (accepted is not None)
    response = ask(compress(), get("/", *headers), Response(200, TEXT, [("ETag", '"x"')]))
    assert response.headers.get("content-encoding") == coding and response.headers["vary"] == "Accept-Encoding"
    assert response.headers["etag"] == ('W/"x"' if coding else '"x"')
    assert inflated(response) == TEXT.encode() and (len(response.content) < 500) == (coding is not None)


@pytest.mark.parametrize("response", [
    Response(200, "short"), Response(200, b"x" * 5000, media_type="image/png"), Response(304, None),
    Response(206, TEXT, [("Content-Range", "bytes 0-1/2")]), Response(200, TEXT, [("Content-Encoding", "br")]),
    Response(200, TEXT, [("Cache-Control", "no-transform")]),
])
def test_what_is_small_compressed_partial_or_forbidden_is_left_alone(response):
    before = response.content, response.headers.get("content-encoding")
    ask(compress(), get("/", ("Accept-Encoding", "gzip")), response)
    assert (response.content, response.headers.get("content-encoding")) == before


def test_what_is_large_is_compressed_in_a_thread():
    response = ask(compress(level=1), get("/", ("Accept-Encoding", "gzip")), Response(200, TEXT * 100))
    assert inflated(response) == TEXT.encode() * 100


def test_each_piece_of_a_stream_gets_through_at_once_unless_told_otherwise():
    async def main():
        for flush, arrives in ((True, True), (False, False)):
            stream = Stream(b"first ", "second ü", b"")
            response = await through(compress(flush=flush), get("/", ("Accept-Encoding", "gzip")),
                                     Response(200, stream, media_type="text/plain"))
            unpacker = zlib.decompressobj(31)
            first = unpacker.decompress(await anext(response.stream))
            assert first == (b"first " if arrives else b"")
            assert first + unpacker.decompress(await content_of(response)) + unpacker.flush() == "first second ü".encode()
            assert unpacker.eof and stream.closed
    flowcoro.run(main())


def test_events_get_through_at_once_even_without_flush():
    async def events():
        yield "one"
        await flowcoro.sleep(1e9)

    @run_in_kernel
    async def main():
        response = event_stream(get(), events())
        response.headers.remove("cache-control")                # which says no-transform
        response = await through(compress(flush=False), get("/", ("Accept-Encoding", "gzip")), response)
        unpacker = zlib.decompressobj(31)
        assert unpacker.decompress(await anext(response.stream)) == b"data: one\n\n"
        await response.stream.aclose()
    main()


def test_head_of_what_would_be_compressed_says_so_and_not_how_long_it_would_be(tmp_path, monkeypatch):
    (tmp_path / "large.txt").write_bytes(TEXT.encode() * 100)
    handler = flowcoro_http.static_files(tmp_path)

    async def main():
        for method in ("GET", "HEAD"):
            request = get("/large.txt", ("Accept-Encoding", "gzip"), method=method)
            response = await through(compress(), request, lambda request: handler(request, rest="/large.txt"))
            assert response.headers["content-encoding"] == "gzip" and "content-length" not in response.headers
            assert response.content is None
            content = await content_of(response)
            assert method == "HEAD" or gzip.decompress(content) == TEXT.encode() * 100
    flowcoro.run(main())


def test_a_compressed_stream_that_is_not_read_closes_what_is_below():
    async def main():
        stream = Stream(b"x")
        request = get("/", ("Accept-Encoding", "gzip"))
        response = await through(compress(), request, Response(200, stream, media_type="text/plain"))
        await response.stream.aclose()
        assert stream.closed
    flowcoro.run(main())
    with pytest.raises(ValueError, match="level"):
        compress(level=0)


# ---- entity tags ---------------------------------------------------------------------------------------------

def test_complete_answers_get_a_tag_and_who_has_them_a_304():
    response = ask(etag(), get())
    tag = response.headers["etag"]
    assert response.status == 200 and tag.startswith('"')
    for method in ("GET", "HEAD"):
        again = ask(etag(), get("/", ("If-None-Match", tag), method=method), Response(200, TEXT, [("Set-Cookie", "a=b")]))
        assert (again.status, again.content) == (304, b"") and again.headers["etag"] == tag
        assert "content-type" not in again.headers
        assert "set-cookie" in again.headers
    assert ask(etag(), get("/", ("If-None-Match", tag)), Response(200, "other")).status == 200
    assert ask(etag(weak=True), get()).headers["etag"] == "W/" + tag
    with pytest.raises(HttpError) as caught:
        ask(etag(), get("/", ("If-Match", '"x"')))
    assert caught.value.status == 412


def test_tags_of_handlers_count_and_what_is_no_complete_200_gets_none():
    mine = Response(200, TEXT, [("ETag", '"mine"')])
    assert ask(etag(), get("/", ("If-None-Match", '"mine"')), mine).status == 304
    for request, response in ((get(method="POST"), Response(200, "x")), (get(), Response(404, "x")),
                              (get(), Response(200, Stream(b"x"))),
                              (get(), Response(200, "x", [("Cache-Control", "private"), ("Cache-Control", "No-Store")])),
                              (get(method="HEAD"), Response(200, None))):
        assert "etag" not in ask(etag(), request, response).headers


# ---- security headers ----------------------------------------------------------------------------------------

def test_security_headers_are_added_and_never_overwrite_the_handlers():
    headers = ask(security_headers(), get(), Response(200, "x", [("X-Frame-Options", "SAMEORIGIN")])).headers
    assert headers.get_all("x-frame-options") == ["SAMEORIGIN"] and headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in headers["content-security-policy"] and headers["referrer-policy"]
    assert "strict-transport-security" not in headers           # RFC 6797 7.2: not over http
    headers = ask(security_headers(hsts_subdomains=True, hsts_preload=True), get(scheme="https")).headers
    assert headers["strict-transport-security"] == "max-age=31536000; includeSubDomains; preload"
    middleware = security_headers(hsts=None, content_security_policy=None, frame_options="SAMEORIGIN")
    headers = ask(middleware, get(scheme="https")).headers
    assert "content-security-policy" not in headers and headers["x-frame-options"] == "SAMEORIGIN"
    assert "strict-transport-security" not in headers


def test_security_headers_that_cannot_be_are_refused_when_they_are_made():
    with pytest.raises(TypeError, match="no csp="):
        security_headers(csp="x")
    with pytest.raises(flowcoro_http.LocalProtocolError):
        security_headers(referrer_policy="a\r\nb")
    with pytest.raises(ValueError):
        security_headers(hsts=5, hsts_preload=True)


# ---- limits --------------------------------------------------------------------------------------------------

def test_a_body_that_is_too_large_is_refused_before_the_handler_or_while_it_is_read():
    with pytest.raises(HttpError) as caught:
        ask(body_limit(5), get("/", ("Content-Length", "6"), method="POST", content=None), lambda request: pytest.fail("asked"))
    assert caught.value.status == 413
    assert ask(body_limit(5), get("/", content=b"12345"), lambda request: request.body()) == b"12345"
    request = get("/", content=b"12345")
    request.max_body = 3
    ask(body_limit(5), request)
    assert request.max_body == 3
    for bad in (-1, 1.5, "5", True):
        with pytest.raises(ValueError, match="body_limit"):
            body_limit(bad)


def test_a_handler_that_takes_too_long_is_cancelled_and_answered_for():
    ended = []

    async def slow(request):
        try:
            await flowcoro.sleep(100)
        finally:
            ended.append(flowcoro.now())

    @run_in_kernel
    async def main():
        for status in (503, 504):
            began = flowcoro.now()
            with pytest.raises(HttpError) as caught:
                await through(timeout(2, status=status), get(), slow)
            assert caught.value.status == status and flowcoro.now() - began == 2 and ended.pop() == flowcoro.now()
        began = flowcoro.now()
        assert (await through(timeout(2), get(), lambda request: flowcoro.sleep(1))).status == 200
        with flowcoro.move_on_after(1) as scope:                # cancelled from outside: no answer
            await through(timeout(2), get(), slow)
        assert scope.cancelled_caught
    main()
    for bad in ({"seconds": 0}, {"seconds": "5"}, {"seconds": 5, "status": 500}):
        with pytest.raises(ValueError, match="timeout"):
            timeout(**bad)


# ---- who asks ------------------------------------------------------------------------------------------------

def test_what_trusted_proxies_say_is_believed_and_nobody_else():
    def proxied(peer, *headers, trusted=("10.0.0.0/8",), **options):
        request = get("/x", ("Host", "inner"), *headers, client=peer)
        ask(trusted_proxies(trusted, **options), request)
        return request.client, request.scheme, request.host, request.peer

    forwarded = (("X-Forwarded-For", "6.6.6.6, 192.0.2.1, 10.0.0.2"), ("X-Forwarded-Proto", "https"),
                 ("X-Forwarded-Host", "shop"))
    assert proxied(("10.0.0.1", 7), *forwarded) == (("192.0.2.1", 0), "https", "shop", ("10.0.0.1", 7))
    assert proxied(("192.0.2.9", 7), *forwarded) == (("192.0.2.9", 7), "http", "inner", ("192.0.2.9", 7))
    assert proxied(("10.0.0.1", 7)) == (("10.0.0.1", 7), "http", "inner", ("10.0.0.1", 7))
    assert proxied(None, *forwarded, trusted=["unix", "10.0.0.2"])[0] == ("192.0.2.1", 0)
    assert proxied(("10.0.0.1", 7), ("Forwarded", "for=_hidden;proto=https"), field="forwarded")[:2] == (("unknown", 0), "https")
    with pytest.raises(HttpError) as caught:
        proxied(("10.0.0.1", 7), ("X-Forwarded-For", "no address"))
    assert caught.value.status == 400


def test_a_request_id_is_taken_from_who_is_trusted_and_made_for_others():
    def identified(peer, *headers, before=None):
        request = get("/", *headers, client=peer)
        if before is not None:
            request.peer = before
        response = ask(request_id(trusted=["10.0.0.0/8"]), request)
        assert response.headers["x-request-id"] == request.request_id
        return request.request_id

    assert identified(("10.0.0.1", 1), ("X-Request-ID", "abc-1")) == "abc-1"
    assert identified(("192.0.2.1", 0), ("X-Request-ID", "abc-1"), before=("10.0.0.1", 1)) == "abc-1"
    trusted = ("10.0.0.1", 1)
    for peer, *values in ((("192.0.2.1", 1), "abc"), (trusted, "a b"), (trusted, "a" * 129), (trusted, ""), (trusted, "a", "b"),
                          (trusted, "\xfc"), (None, "abc"), (trusted,)):
        made = identified(peer, *[("X-Request-ID", value) for value in values])
        assert re.fullmatch("[0-9a-f]{32}", made)
    with pytest.raises(flowcoro_http.LocalProtocolError):
        request_id(field="a b")


def basic(text):
    return "Authorization", "Basic " + base64.b64encode(text.encode()).decode()


def status_of(middleware, request):
    try:
        return ask(middleware, request).status, getattr(request, "user", None)
    except HttpError as error:
        return error.status, dict(error.headers)["WWW-Authenticate"]


async def checks_async(name, password):
    await flowcoro.sleep(1)
    return name == "ann" and password == "s:e" and "Ann"


@pytest.mark.parametrize("users, user", [
    ({"ann": "s:e", "bob": ""}, "ann"), (lambda name, password: name == "ann" and password == "s:e", "ann"),
    (checks_async, "Ann")])
def test_basic_auth_lets_through_who_knows_the_password(users, user):
    middleware = basic_auth(users, realm="a \"shop\"")
    assert status_of(middleware, get("/", basic("ann:s:e"))) == (200, user)
    for headers in ([], [basic("ann:x")], [basic("eve:s:e")], [basic("eve:")], [basic("ann:")], [basic("noColon")],
                    [("Authorization", "Basic !!")], [("Authorization", "Bearer x")],
                    [basic("ann:s:e"), basic("ann:s:e")], [("Authorization", "")]):
        assert status_of(middleware, get("/", *headers)) == (401, 'Basic realm="a \\"shop\\"", charset="UTF-8"')


def test_bearer_auth_lets_through_who_has_a_token():
    async def of_store(token):
        return {"t1": "ann"}.get(token)

    for tokens in ({"t1": "ann", "t2": "bob"}, of_store, lambda token: {"t1": "ann"}.get(token)):
        middleware = bearer_auth(tokens, realm="api")
        assert status_of(middleware, get("/", ("Authorization", "Bearer t1"))) == (200, "ann")
        assert status_of(middleware, get()) == (401, 'Bearer realm="api"')
        assert status_of(middleware, get("/", ("Authorization", "Bearer t3"))) == (
            401, 'Bearer realm="api", error="invalid_token"')
        for value in ("Bearer", "bearer t1 t1", "Basic dDE6", "Bearer ann", "Bearer t1,"):
            if value != "Bearer t1,":
                assert status_of(middleware, get("/", ("Authorization", value)))[0] == 401, value
    for bad in (["ann"], {"ann": b"x"}, None):
        with pytest.raises(TypeError, match="give a dict"):
            basic_auth(bad)


def test_passwords_are_compared_in_constant_time(monkeypatch):
    compared = []
    real = flowcoro_http.hmac.compare_digest
    monkeypatch.setattr(flowcoro_http.hmac, "compare_digest", lambda a, b: (compared.append(1), real(a, b))[1])
    middleware, counts = basic_auth({"ann": "x", "bob": "y"}), []
    for text in ("ann:x", "ann:y", "bob:x", "eve:x"):
        status_of(middleware, get("/", basic(text)))
        counts.append(len(compared))
        compared.clear()
    assert counts == [3, 3, 3, 3]


# ---- sessions ------------------------------------------------------------------------------------------------

KEY, OLD = b"k" * 32, b"o" * 32


def visit(middleware, cookie=None, change=None):
    """(what the session was, the Set-Cookie or None, the response's other headers)"""
    seen = []

    def handler(request):
        seen.append(dict(request.session))
        if change:
            change(request)
        return Response(200, "x")
    response = ask(middleware, get("/", *[("Cookie", f"__Host-session={cookie}")] * (cookie is not None)), handler)
    return seen[0], response.headers.get("set-cookie"), response.headers


def value_of(set_cookie):
    return set_cookie.partition(";")[0].partition("=")[2]


def test_a_session_comes_back_and_is_sent_only_when_it_was_changed():
    middleware = sessions(KEY)
    assert visit(middleware) == ({}, None, visit(middleware)[2]) and "vary" not in visit(middleware)[2]
    seen, cookie, headers = visit(middleware, change=lambda request: request.session.update(user={"id": 1}))
    assert not seen and headers["vary"] == "Cookie" and headers["cache-control"] == "no-store"
    assert cookie.startswith("__Host-session=") and cookie.endswith("; Max-Age=1209600; Path=/; Secure; HttpOnly; SameSite=Lax")
    value = value_of(cookie)
    seen, cookie, headers = visit(middleware, value)
    assert (seen, cookie, headers["vary"]) == ({"user": {"id": 1}}, None, "Cookie")
    _, cookie, _ = visit(middleware, value, lambda request: request.session["user"].update(id=2))           # deep inside
    assert visit(middleware, value_of(cookie))[0] == {"user": {"id": 2}}
    _, cookie, _ = visit(middleware, value, lambda request: request.session.clear())
    assert value_of(cookie) == "" and "Max-Age=0" in cookie and "Secure" in cookie
    _, cookie, _ = visit(middleware, value, lambda request: setattr(request, "session", None))
    assert value_of(cookie) == "" and "Max-Age=0" in cookie
    with pytest.raises(TypeError, match="has to be a dict"):
        visit(middleware, value, lambda request: setattr(request, "session", ["new"]))
    _, cookie, _ = visit(middleware, value, lambda request: setattr(request, "session", {"new": True}))
    assert visit(middleware, value_of(cookie))[0] == {"new": True}


def test_what_is_no_session_of_ours_or_too_old_is_an_empty_one(monkeypatch):
    middleware = sessions(KEY, max_age=100)
    value = value_of(visit(middleware, change=lambda request: request.session.update(a=1))[1])
    now = flowcoro_http.time.time()
    other = Signer(KEY, purpose="other").sign(b'{"a":1}', now)
    no_dict = Signer(KEY, purpose="session __Host-session").sign(b"[1]", now)
    no_json = Signer(KEY, purpose="session __Host-session").sign(b"\xff{", now)
    for bad in (value[:-1] + ("A" if value[-1] != "A" else "B"), "x" + value, value.replace(".", "", 1), "", "...",
                other, no_dict, no_json, "eyJhIjoxfQ"):
        assert visit(middleware, bad)[:2] == ({}, None)
    assert visit(middleware, value)[0] == {"a": 1}
    monkeypatch.setattr(flowcoro_http.time, "time", lambda: now + 102)
    assert visit(middleware, value)[0] == {}


def test_keys_can_be_exchanged_without_losing_sessions():
    old = value_of(visit(sessions(OLD), change=lambda request: request.session.update(a=1))[1])
    assert visit(sessions([KEY, OLD]), old)[0] == {"a": 1}
    assert visit(sessions(KEY), old)[0] == {}
    new = value_of(visit(sessions([KEY, OLD]), old, lambda request: request.session.update(a=2))[1])
    assert visit(sessions(KEY), new)[0] == {"a": 2}


def test_sessions_that_browsers_or_json_would_not_take_are_errors():
    for options in ({"secure": False}, {"domain": "a.example"}, {"path": "/x"}, {"cookie": "a b"}, {"same_site": "no"}):
        with pytest.raises(ValueError):
            sessions(KEY, **options)
    with pytest.raises(ValueError, match="16 bytes"):
        sessions(b"short")
    sessions(KEY, cookie="session", secure=False)
    with pytest.raises(ValueError, match="4096"):
        visit(sessions(KEY), change=lambda request: request.session.update(a="x" * 5000))
    with pytest.raises(TypeError):
        visit(sessions(KEY), change=lambda request: request.session.update(a=object()))


# ---- all of them, through a server ---------------------------------------------------------------------------

def test_all_of_them_together_answer_and_log(tmp_path):
    lines = []
    (tmp_path / "large.bin").write_bytes(b"x" * 100_000)

    async def main():
        app = HttpServer()
        for middleware in (trusted_proxies(["127.0.0.1"]), request_id(trusted=["127.0.0.1"]),
                           access_log(lines.append, format="json"), security_headers(), cors(["https://a.example"]), compress(),
                           etag(), timeout(5), body_limit(10), sessions(KEY)):
            app.middleware(middleware)

        @app.post("/text")
        async def text(request):
            request.session["seen"] = await request.body() and "yes"
            return TEXT

        @app.get("/stream")
        async def stream(request):
            async def pieces():
                for _ in range(3):
                    yield TEXT
            return Response(200, pieces(), media_type="text/plain")
        app.mount("/files", flowcoro_http.static_files(tmp_path))

        async with serving(app) as server:
            tail = ("Host: x\r\nConnection: close\r\nAccept-Encoding: gzip\r\nX-Forwarded-For: 192.0.2.1\r\n"
                    "X-Forwarded-Proto: https\r\nOrigin: https://a.example\r\nX-Request-ID: id-1\r\n")
            answer = await exchange(server, f"POST /text HTTP/1.1\r\n{tail}Content-Length: 3\r\n\r\nabc".encode())
            head, _, content = answer.partition(b"\r\n\r\n")
            assert gzip.decompress(content) == TEXT.encode()
            for expected in (b"200 OK", b"X-Request-ID: id-1", b"Strict-Transport-Security: ",
                             b"Access-Control-Allow-Origin: https://a.example",
                             b"content-encoding: gzip", b"Set-Cookie: __Host-session="):
                assert expected in head, head
            for chunked in (b"Content-Length: 11\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nb\r\n01234567890\r\n0\r\n\r\n"):
                answer = await exchange(server, f"POST /text HTTP/1.1\r\n{tail}".encode() + chunked)
                assert answer.startswith(b"HTTP/1.1 413 ") and b"X-Request-ID" in answer
            answer = await exchange(server, f"GET /stream HTTP/1.1\r\n{tail}\r\n".encode())
            assert b"content-encoding: gzip" in answer and answer.endswith(b"0\r\n\r\n")
            answer = await exchange(server, f"GET /files/large.bin HTTP/1.1\r\n{tail}\r\n".encode())
            assert answer.endswith(b"x" * 100_000)
    flowcoro.run(main())
    found = [json.loads(line) for line in lines]
    assert [(line["status"], line["client"], line["request_id"]) for line in found] == [
        (status, "192.0.2.1", "id-1") for status in (200, 413, 413, 200, 200)]
    assert found[-1]["bytes"] == 100_000 and 50 < found[-2]["bytes"] < 1000


def test_a_304_behind_compress_has_the_tag_and_the_vary_of_the_answer_that_it_confirms():
    tagged = flowcoro_http.etag()

    def asked(*headers):
        request = get("/", ("Accept-Encoding", "gzip"), *headers)
        return ask(flowcoro_http.compress(), request, lambda request: through(tagged, request))

    first = asked()
    assert first.headers["etag"].startswith("W/") and first.headers["vary"] == "Accept-Encoding"
    weak = asked(("If-None-Match", first.headers["etag"]))
    strong = asked(("If-None-Match", first.headers["etag"][2:]))
    assert weak.status == strong.status == 304 and weak.headers["vary"] == strong.headers["vary"] == "Accept-Encoding"
    assert weak.headers["etag"] == first.headers["etag"] and strong.headers["etag"] == first.headers["etag"][2:]
