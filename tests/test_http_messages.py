"""Requests and responses as handlers have them: what is known of them, content, forms and files, heads that do not split."""

import contextlib
import dataclasses
import datetime
import tempfile
import urllib.parse

import pytest

import flowcoro
import flowcoro_http
from flowcoro_http import Fields, FormFile, HttpError, HttpServer, Part, ProtocolError, Request, Response
from flowcoro_net import BrokenError
from flowcoro_testing import run_in_kernel
from test_http_server import serving, simulated
from test_net import nothing_is_left_behind  # noqa: F401  (a fixture)

FORM = {"Content-Type": "multipart/form-data; boundary=b"}.items()


def multipart(*parts, end=b"--b--\r\n"):
    """A body of (head, content)."""
    return b"".join(b"--b\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % part for part in parts) + end


def posted(content, headers=FORM, target="/"):
    return Request("POST", target, list(headers), content)


# ---- Fields ----------------------------------------------------------------------------------------------------

def test_fields_have_their_order_and_several_values_of_a_name():
    pairs = [("b", "1"), ("a", "2"), ("b", "3"), ("B", "")]
    fields = Fields(pairs)
    assert fields["b"] == "1" and fields.get_all("b") == ["1", "3"] and fields.get("B") == ""
    assert fields.get("c") is None and fields.get("c", 5) == 5 and fields.get_all("c") == []
    assert list(fields) == ["b", "a", "B"] and len(fields) == 3 and "a" in fields and "c" not in fields
    assert fields.items() == pairs and fields == Fields(pairs) and fields != Fields(pairs[::-1]) and fields != pairs
    fields.items().clear()
    fields.get_all("b").clear()
    assert fields.items() == pairs and repr(fields) == f"Fields({pairs!r})"
    with pytest.raises(KeyError):
        fields["c"]
    with pytest.raises(TypeError):
        hash(fields)
    assert not Fields() and len(Fields()) == 0


# ---- the head of a request -------------------------------------------------------------------------------------

def test_a_request_made_by_hand():
    request = Request("GET", "/a%20b/%C3%A9?x=1&y=%20&x=2", [("Host", "name:81"), ("Cookie", "a=1; b=2"), ("Cookie", "c=3")],
                      client=("1.2.3.4", 5))
    assert request.path == "/a b/\u00e9" and request.raw_path == "/a%20b/%C3%A9" and request.query_string == "x=1&y=%20&x=2"
    assert request.query.get_all("x") == ["1", "2"] and request.query["y"] == " "
    assert request.cookies == {"a": "1", "b": "2", "c": "3"}
    assert (request.host, request.scheme, request.client, request.server) == ("name:81", "http", ("1.2.3.4", 5), None)
    assert request.url == "http://name:81/a%20b/%C3%A9?x=1&y=%20&x=2"
    assert request.tls is None and request.route is None and request.params == {} and request.app is None
    assert repr(request) == "<Request GET '/a%20b/%C3%A9?x=1&y=%20&x=2'>" and not request.closing.is_set()
    request.state.mine = 5
    assert request.state.mine == 5
    request.scheme, request.host, request.client = "https", "other", ("5.6.7.8", 9)
    assert request.url.startswith("https://other/a%20b") and request.client == ("5.6.7.8", 9)
    assert Request("OPTIONS", "*", [("Host", "a")]).url == "http://a"
    assert Request("GET", "/").host == "" and Request("GET", "/%ff").path == "/\ufffd"


def test_what_is_malformed_in_a_head_is_an_answer():
    for target, status in [("/?%zz", 400), ("/?%ff", 400), ("/?" + "a&" * 1001, 413)]:
        with pytest.raises(ProtocolError) as caught:
            Request("GET", target).query
        assert caught.value.status == status
    with pytest.raises(ProtocolError):
        Request("GET", "/", [("Content-Type", "text")]).media_type
    assert Request("GET", "/", [("Content-Type", 'text/plain; charset="utf-8"')]).media_type.parameters == {"charset": "utf-8"}
    assert Request("GET", "/").media_type is None


# ---- content ---------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_a_content_that_is_known_is_read_as_any_other():
    request = posted(b"content")
    assert await request.body() == b"content" == await request.body()
    assert [data async for data in request.stream()] == [b"content"]
    assert [data async for data in posted(b"").stream()] == []
    with pytest.raises(HttpError) as caught:
        await request.body(max_bytes=6)
    assert caught.value.status == 413
    with pytest.raises(RuntimeError, match="no connection"):
        await request.upgrade("x")
    await request.inform(103)


@run_in_kernel
async def test_json_and_its_errors():
    kind = {"Content-Type": "application/json"}.items()
    assert await posted(b'{"a": [1, null]}', kind).json() == {"a": [1, None]}
    assert await posted(b"5", {"content-type": "application/problem+json; charset=UTF-8"}.items()).json() == 5
    for content, headers, status in [
            (b"{", kind, 400), (b"[1,]", kind, 400), (b"NaN", kind, 400), (b'{"a":1,"a":2}', kind, 400), (b"\xff", kind, 400),
            (b"", kind, 400),
            (b"[" * 100_000, kind, 400), (b"{}", (), 415), (b"{}", {"Content-Type": "text/plain"}.items(), 415),
            (b"{}", {"Content-Type": "application/json; charset=utf-16"}.items(), 415)]:
        with pytest.raises(HttpError) as caught:
            await posted(content, headers).json()
        assert caught.value.status == status, content[:20]
    with pytest.raises(HttpError) as caught:
        await posted(b"[1, 2]", kind).json(max_bytes=3)
    assert caught.value.status == 413


@run_in_kernel
async def test_a_form_of_texts_urlencoded_or_in_parts():
    kind = {"Content-Type": "application/x-www-form-urlencoded"}.items()
    request = posted(b"a=1&b=%C3%A9+x&a=2", kind)
    form = await request.form()
    assert form.items() == [("a", "1"), ("b", "\u00e9 x"), ("a", "2")] and await request.form() is form
    assert (await posted(b"", kind).form()).items() == []
    assert len(await posted(b"a&b&c", kind).form(max_parts=3)) == 3
    form = await posted(multipart((b'name="a"', "\u00e9".encode()), (b'name="a"', b""))).form()
    assert form.get_all("a") == ["\u00e9", ""]
    for content, headers, limits, status in [
            (b"a=%zz", kind, {}, 400), (b"a=%ff", kind, {}, 400), (b"a=12345", kind, {"max_bytes": 5}, 413),
            (b"&".join([b"a"] * 1001), kind, {}, 413), (b"a&b&c", kind, {"max_parts": 2}, 413), (b"x", (), {}, 415),
            (b"x", {"Content-Type": "text/plain"}.items(), {}, 415),
            (b"x", {"Content-Type": "multipart/form-data"}.items(), {}, 400), (b"x", FORM, {}, 400),
            (multipart((b'name="a"', b"\xff")), FORM, {}, 400), (multipart((b'name="a"', b"12345")), FORM, {"max_bytes": 4}, 413),
            (multipart((b'name="a"', b"1")), FORM, {"max_bytes": 0}, 413),
            (multipart((b'name="a"', b"1"), end=b""), FORM, {}, 400),
            (multipart((b'name="a"', b"1"), (b'name="b"', b"2")), FORM, {"max_parts": 1}, 413),
            (multipart((b'name="a"; filename="f"', b"12345")), FORM, {"max_file_bytes": 4}, 413)]:
        request = posted(content, headers)
        for _ in range(2):                          # again: no half of it
            with pytest.raises(HttpError) as caught:
                await request.form(**limits)
            assert caught.value.status == status, content
            assert status != 415 or "application/x-www-form-urlencoded" in caught.value.message
        if request._files:
            request._close()


@run_in_kernel
async def test_a_text_of_a_form_may_be_larger_than_a_body_if_it_is_allowed():
    text = b"x" * (flowcoro_http.MAX_BODY + 1)
    form = await posted(multipart((b'name="a"', text))).form(max_bytes=len(text))
    assert len(form["a"]) == len(text)


def file_form(size):
    return multipart((b'name="text"', b"t"), (b'name="f"; filename="name.txt"\r\nContent-Type: text/css', b"x" * size))


def test_a_file_of_a_form_is_in_memory_while_it_is_small_and_can_be_saved(tmp_path):
    @run_in_kernel
    async def test():
        for size in 10, flowcoro_http.SPOOLED, flowcoro_http.SPOOLED + 1, 3 * flowcoro_http.SPOOLED:
            request = posted(file_form(size))
            file = (await request.form())["f"]
            assert type(file) is FormFile and (file.name, file.media_type, file.size) == ("f", "text/css", size)
            assert file.headers["content-type"] == "text/css" and str(size) in repr(file)
            assert file.file._rolled == (size > flowcoro_http.SPOOLED)
            assert await file.read(4) == b"xxxx" and len(await file.read()) == size - 4 and await file.read() == b""
            await file.save(tmp_path / "saved")
            assert (tmp_path / "saved").stat().st_size == size
            with pytest.raises(OSError):
                await file.save(tmp_path)
            request._close()
            assert file.file.closed

    test()


def test_files_of_a_form_are_closed_whatever_becomes_of_the_request(monkeypatch, reports):
    monkeypatch.setattr(flowcoro_http, "SPOOLED", 100)
    opened = []

    @simulated
    async def test():
        app = HttpServer()
        spooled = tempfile.SpooledTemporaryFile
        monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda *size: opened.append(spooled(*size)) or opened[-1])

        @app.post("/{way}")
        async def form(request, way):
            file = (await request.form(max_parts=5))["f"]
            if way == "error":
                raise KeyError
            if way == "wait":
                await flowcoro.sleep(1000)
            if way == "stream":
                async def stream():
                    yield await file.read()
                return stream()
            return str(file.size)

        kind = b"Content-Type: multipart/form-data; boundary=b\r\n"
        async with serving(app) as world:
            assert (await world.post("/ok", file_form(1000), kind)).content == b"1000"
            assert (await world.post("/error", file_form(1000), kind)).status == 500
            assert (await world.post("/stream", file_form(1000), kind)).content == b"x" * 1000
            broken = multipart((b'name="f"; filename="f"', b"x" * 1000), end=b"--b\r\nbroken")
            assert (await world.post("/ok", broken, kind)).status == 400
            assert len(opened) == 4 and all(file.closed for file in opened)
            for part in file_form(1000), file_form(1000)[:-20]:          # gone while it is handled, and while it comes
                sock = await world.connect()
                await sock.write(b"POST /wait HTTP/1.1\r\nHost: a\r\n%sContent-Length: %d\r\n\r\n%s"
                                 % (kind, len(file_form(1000)), part))
                await flowcoro.sleep(2)
                await sock.close()
                await flowcoro.sleep(5)
            assert len(opened) == 6 and all(file.closed for file in opened)

    test()
    assert [type(error) for _, error in reports] == [KeyError]


def test_files_of_a_form_are_closed_before_the_next_request_of_the_connection():
    @simulated
    async def test():
        app, files = HttpServer(), []

        @app.post("/")
        async def form(request):
            assert all(file.closed for file in files)
            files.append((await request.form())["f"].file)
            return "taken"

        body = file_form(10)
        request = (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n%s"
                   % (len(body), body))
        async with serving(app) as world:
            found = await world.talk(request * 3, *["POST"] * 3)
            assert [answer.content for answer in found] == [b"taken"] * 3 and len(files) == 3

    test()


@run_in_kernel
async def test_multipart_gives_parts_while_they_come():
    body = multipart((b'name="a"', b"one"), (b'name="f"; filename="x"\r\nContent-Type: a/b', b"2" * 1000),
                     (b'name="c"', b"three"))
    seen = []
    async for part in posted(body).multipart():
        assert type(part) is Part
        seen.append((part.name, part.filename, part.media_type, await part.read()))
        assert await part.read() == b"" and repr(part).startswith(f"<Part '{part.name}'")
    assert seen == [("a", None, None, b"one"), ("f", "x", "a/b", b"2" * 1000), ("c", None, None, b"three")]
    names, parts = [], []
    async for part in posted(body).multipart():           # nobody has to read them
        names.append(part.name)
        parts.append(part)
        if part.name == "f":
            async for data in part:
                break
    assert names == ["a", "f", "c"]
    assert await parts[0].read() == b""                   # too late
    async for part in posted(body).multipart():
        if part.name == "f":
            with pytest.raises(HttpError) as caught:
                await part.read(999)
            assert caught.value.status == 413
            break
    for limit in {"max_total_bytes": 50}, {"max_head_bytes": 10}, {"max_field_bytes": 4}, {"max_file_bytes": 4}, {"max_parts": 2}:
        with pytest.raises(HttpError) as caught:
            async for part in posted(body).multipart(**limit):
                pass
        assert caught.value.status == 413, limit


def test_a_part_that_is_not_read_to_its_end_leaves_the_connection_fit_for_more():
    @simulated
    async def test():
        app = HttpServer()

        @app.post("/")
        async def first(request):
            async for part in request.multipart():
                return part.name

        kind = b"Content-Type: multipart/form-data; boundary=b\r\n"
        body = multipart((b'name="a"', b"x" * 1000), (b'name="b"', b"x" * 100_000))
        async with serving(app) as world:
            request = b"POST / HTTP/1.1\r\nHost: a\r\n%sContent-Length: %d\r\n\r\n%s" % (kind, len(body), body)
            found = await world.talk(request * 3, *["POST"] * 3)
            assert [answer.content for answer in found] == [b"a"] * 3

    test()


def test_ten_thousand_parts_in_small_pieces_take_time_in_proportion():
    @simulated
    async def test():
        app = HttpServer()

        @app.post("/")
        async def count(request):
            return str(len((await request.form(max_parts=20_000)).get_all("a")))

        body = multipart(*[(b'name="a"', b"x")] * 10_000)
        async with serving(app) as world:
            answer = await world.post("/", body, b"Content-Type: multipart/form-data; boundary=b\r\n")
            assert answer.content == b"10000"

    test()


# ---- responses -------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Point:
    x: int
    day: datetime.date


def test_contents_and_their_types():
    for content, kind, data in [
            ("h\u00e9", "text/plain; charset=utf-8", "h\u00e9".encode()), (b"x", "application/octet-stream", b"x"),
            (b"", None, b""), (None, None, b""), ({"a": "\u00e9"}, "application/json", '{"a":"\u00e9"}'.encode()),
            (True, "application/json", b"true"),
            (Point(1, datetime.date(2024, 2, 29)), "application/json", b'{"x":1,"day":"2024-02-29"}'),
            (memoryview(b"ab"), "application/octet-stream", b"ab")]:
        response = Response(200, content)
        assert (response.headers.get("content-type"), response.content, response.stream) == (kind, data, None)
    response = Response(200, "x", media_type="text/html")
    assert response.media_type.essence == "text/html" and Response().media_type is None
    kind = flowcoro_http.MediaType("a", "b", {})
    assert Response(200, "x", media_type=kind).headers["content-type"] == "a/b"
    assert repr(Response(200, "abc")) == "<Response 200, 3 bytes>"
    assert repr(Response(200, iter("a"))) == "<Response 200, a stream>"
    for wrong in "200", None, True, 200.0, b"":
        with pytest.raises(TypeError, match="status"):
            Response(wrong)
    for wrong in {"a": float("inf")}, "\ud800", {1}:
        with pytest.raises((TypeError, ValueError)):
            Response(200, wrong)


def test_redirects():
    response = Response.redirect("/a b/\u00e9?x=%20#y", 307, [("X-A", "b")])
    assert (response.status, response.headers["location"], response.headers["x-a"]) == (307, "/a%20b/%C3%A9?x=%20#y", "b")
    assert Response.redirect("https://[::1]:80/x").headers["location"] == "https://[::1]:80/x"
    assert Response.redirect("/").status == 303
    assert Response.redirect("/", headers={"X-A": "b"}).headers["x-a"] == "b"
    for wrong in 200, 304, 300, "303":
        with pytest.raises(ValueError):
            Response.redirect("/", wrong)


def test_a_content_that_was_not_awaited_is_named_as_that():
    async def content():
        return "x"

    forgotten = content()
    for wrong in forgotten, flowcoro.sleep(1):
        with pytest.raises(TypeError, match="not awaited"):
            Response(200, wrong)
        wrong.close()


def test_cookies_are_set_and_deleted():
    response = Response()
    response.set_cookie("a", "1", max_age=5, secure=True, http_only=True, same_site="Strict", path="/x")
    response.delete_cookie("b", path="/y")
    one, other = response.headers.get_all("set-cookie")
    assert one.startswith("a=1") and {"Max-Age=5", "Secure", "HttpOnly", "SameSite=Strict", "Path=/x"} <= set(one.split("; "))
    assert other.startswith("b=") and "Max-Age=0" in other and "Path=/y" in other


# ---- no answer is split ----------------------------------------------------------------------------------------

EVIL = ["x\r\nX-Evil: yes", "x\nX-Evil: yes", "x\rX-Evil: yes", "\r\n\r\nHTTP/1.1 200 OK", "x\0y", "x\u010d\u010a",
        "x\u560d\u560a", "x\x0b", "x\x85y\u2028", "x\x7f"]


def ways(evil):
    """All that puts a text of the user's into a head."""
    def with_cookie(*arguments, **attributes):
        response = Response()
        response.set_cookie(*arguments, **attributes)
        return response

    def deleted(*arguments, **attributes):
        response = Response()
        response.delete_cookie(*arguments, **attributes)
        return response

    def changed(method, *pair):
        response = Response()
        getattr(response.headers, method)(*pair)
        return response

    def raised(error):
        raise error

    return {
        "reason": lambda: Response(200, "", reason=evil), "media_type": lambda: Response(200, "", media_type=evil),
        "media_type of parts": lambda: Response(200, "", media_type=flowcoro_http.MediaType("text", evil, {})),
        "a parameter of it": lambda: Response(200, "", media_type=flowcoro_http.MediaType("text", "plain", {"x": evil})),
        "headers": lambda: Response(200, "", [("X-A", evil)]), "a name": lambda: Response(200, "", [(evil, "x")]),
        "a tuple": lambda: (200, "", [("X-A", evil)]), "add": lambda: changed("add", "X-A", evil),
        "set": lambda: changed("set", evil, "x"), "set a value": lambda: changed("set", "X-A", evil),
        "redirect": lambda: Response.redirect("/" + evil),
        "redirect's headers": lambda: Response.redirect("/", 303, [("X-A", evil)]),
        "cookie": lambda: with_cookie("a", evil), "cookie's name": lambda: with_cookie(evil, "a"),
        "cookie's path": lambda: with_cookie("a", "b", path="/" + evil), "domain": lambda: with_cookie("a", "b", domain=evil),
        "same_site": lambda: with_cookie("a", "b", same_site=evil), "expires": lambda: with_cookie("a", "b", expires=evil),
        "max_age": lambda: with_cookie("a", "b", max_age=evil), "deleted": lambda: deleted(evil),
        "deleted path": lambda: deleted("a", path="/" + evil), "error": lambda: raised(HttpError(400, "x", [("X-A", evil)])),
        "location of an error": lambda: raised(HttpError(303, "", [("Location", evil)])),
        "upgrade of an error": lambda: raised(HttpError(426, evil, [("Upgrade", evil)])), "entries": lambda: forced(evil),
        "trailers": lambda: trailing(evil),
    }


class Forced(Response):
    """Somebody who goes past what Headers checks."""


def forced(evil):
    response = Forced(200, "x")
    response.headers = flowcoro_http.Headers._of([("x-a", ("X-A", evil))])
    return response


def trailing(evil):
    async def stream():
        yield "x"

    response = Response(200, stream())
    response.trailers = [("X-A", evil)]
    return response


@pytest.mark.parametrize("way", ways(""))
def test_no_text_splits_a_response(way, reports):
    @simulated
    async def test():
        app = HttpServer()

        @app.get("/")
        async def handler(request):
            return ways(EVIL[int(request.query_string)])[way]()

        @app.get("/up")
        async def up(request):
            await request.upgrade("x", [("X-A", EVIL[int(request.query_string)])])

        @app.get("/inform")
        async def inform(request):
            await request.inform(103, [("X-A", EVIL[int(request.query_string)])])

        async with serving(app) as world:
            for number in range(len(EVIL)):
                with contextlib.suppress(BrokenError):          # trailers: it is cut
                    [answer] = await world.talk(b"GET /?%d HTTP/1.1\r\nHost: a\r\nTE: trailers\r\n\r\n" % number)
                    assert "x-evil" not in answer.headers
                    for name, value in [*answer.headers, *(answer.trailers or ())]:
                        assert not set(value) & set("\r\n\0\x0b\x7f") and not set(name) & set("\r\n\0: ")
                    assert answer.reason.isprintable() or "\x85" in answer.reason
                if way == "reason":
                    for path in "up", "inform":
                        [answer] = await world.talk(b"GET /%s?%d HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
                                                    % (path.encode(), number))
                        assert "x-evil" not in answer.headers and answer.before == []

    test()


def test_what_clients_send_does_not_get_into_a_head():
    """Paths, queries and methods of requests come back in Location and Allow."""
    @simulated
    async def test():
        app = HttpServer(redirect_slashes=True)

        @app.get("/{a}/")
        async def folder(request, a):
            return Response.redirect("/" + a + "?" + urllib.parse.unquote(request.query_string))

        async with serving(app) as world:
            for path in "/a%0d%0aX-Evil:%20yes", "/a%0d%0aX-Evil:%20yes/", "/a/?%0d%0aX-Evil:%20yes", "/a?%0d%0aX-Evil:%20yes":
                answer = await world.get(path)
                assert answer.status in (303, 308) and "x-evil" not in answer.headers
                assert answer.headers["location"].isascii() and answer.headers["location"].isprintable()

    test()


def form_of(*parts):
    body = b"".join(b'--B\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % part for part in parts) + b"--B--\r\n"
    return Request("POST", "/", [("Content-Type", "multipart/form-data; boundary=B")], body)


def test_the_texts_of_a_form_have_one_limit_together():
    async def main():
        form = await form_of((b"a", b"", b"x" * 50), (b"b", b"", b"y" * 50)).form(max_bytes=100)
        assert form["b"] == "y" * 50
        with pytest.raises(HttpError, match="50 bytes") as caught:
            await form_of((b"a", b"", b"x" * 50), (b"b", b"", b"y" * 51)).form(max_bytes=100)
        assert caught.value.status == 413

    flowcoro.run(main())


def test_the_files_of_a_form_have_one_place_in_memory_together(monkeypatch):
    monkeypatch.setattr(flowcoro_http, "SPOOLED_IN_ALL", 100)

    async def main():
        request = form_of(*[(b"f", b'; filename="%d"' % size, b"x" * size) for size in (60, 60, 40, 1, 0)])
        files = (await request.form()).get_all("f")
        assert [file._in_memory for file in files] == [True, False, True, True, True]
        assert [len(await file.read()) for file in files] == [60, 60, 40, 1, 0]
        request._close()

    flowcoro.run(main())


def test_a_form_has_at_most_so_many_files():
    async def main():
        request = form_of(*[(b"f", b'; filename="x"', b"")] * 4)
        with pytest.raises(HttpError, match="3 files .max_files") as caught:
            await request.form(max_files=3)
        assert caught.value.status == 413
        request._close()

    flowcoro.run(main())


def test_a_query_is_kept_for_a_line_that_comes_again_unless_it_has_many_fields():
    for count in flowcoro_http.KNOWN_QUERY, flowcoro_http.KNOWN_QUERY + 1:
        line = flowcoro_http._KnownLine("GET", "/?" + "&".join(f"{number}=a" for number in range(count)))
        request = Request(line.method, line.target)
        request._line, request.query_string = line, line.query_string
        assert len(request.query) == count and (line.query is request.query) is (count == flowcoro_http.KNOWN_QUERY)
