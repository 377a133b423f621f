"""HttpClient: redirects, credentials, cookies, proxies, retries, timeouts, TLS; and servers that mean harm."""

import contextlib
import gzip
import hashlib
import http.cookiejar
import random
import types

import pytest

import flowcoro
import flowcoro_http
from flowcoro_http import (
    Auth, BasicAuth, BearerAuth, ConnectError, DigestAuth, Headers, HttpClient, HttpServer, ProxyError, RedirectError,
    RequestError, RequestTimeout, ResponseError, Retries, ServerSentEvent, StatusError, Timeouts, TransferError,
    security_headers, sessions, _challenge, _CookieRequest, _CookieResponse, _environment_proxies, _EventParser, _goes_without,
    _Jar, _parse_credentials, _Url)
from flowcoro_net import Socket, TcpServer, TlsError, client_tls, server_tls
from flowcoro_testing import VirtualClock, memory_socket_pair
from test_http_client import SEED, Origin, answer, given_back, scripted, serving, talk
from test_net import PATIENCE
from test_net_cancel import at_each_point, cancelled_at
from test_net_tls import certificates  # noqa: F401

FOREVER = 3600.0                # seconds; what waits for so long is cancelled before


@pytest.fixture
def certificate(certificates):  # noqa: F811
    return types.SimpleNamespace(server=server_tls(*certificates.good), path=str(certificates.ca))


def redirect(location, status="302 Found"):
    return answer("moved", status, f"Location: {location}")


async def silence(request):
    await flowcoro.sleep(FOREVER)


async def drip(request):
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000:
        await request.sock.write(bytes([byte]))
        await flowcoro.sleep(0.02)


async def stuck(request):
    await request.sock.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nsome")
    await flowcoro.sleep(FOREVER)


async def cut(request):
    await request.sock.write(b"cut")


# ---- redirects -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("status, method, following, body", [
    ("301 x", "GET", "GET", b""), ("302 x", "POST", "GET", b""), ("301 x", "POST", "GET", b""), ("303 x", "PUT", "GET", b""),
    ("303 x", "HEAD", "HEAD", b""), ("302 x", "PUT", "PUT", b"body"), ("307 x", "POST", "POST", b"body"),
    ("308 x", "PATCH", "PATCH", b"body")])
def test_a_redirect_is_followed(status, method, following, body):
    def handler(request):
        if request.target == "/a":
            return f"HTTP/1.1 {status}\r\nLocation: b/c?d\r\nContent-Length: 0\r\n\r\n".encode()
        return b"HTTP/1.1 204 No Content\r\n\r\n"

    async def work(client, origin):
        content = None if method in ("GET", "HEAD") else b"body"
        response = await client.request(method, origin.url + "/a", content=content, headers={"Content-Type": "x/y"})
        assert response.status == 204 and [before.status for before in response.history] == [int(status[:3])]
        assert response.url == origin.url + "/b/c?d" and origin.connections == 1
        last = origin.requests[-1]
        assert (last.method, last.target, last.body) == (following, "/b/c?d", body)
        assert ("content-type" in last.headers) == (following == method)
        assert last.headers.get("content-length") == (str(len(body)) if body else None)

    talk(handler, work)


def test_redirects_can_be_left_alone_and_are_bounded():
    async def work(client, origin):
        assert (await client.get(origin.url, follow_redirects=False)).status == 302
        with pytest.raises(RedirectError, match="max_redirects=20") as caught:
            await client.get(origin.url)
        assert len(origin.requests) == 22 and caught.value.response.status == 302
        with pytest.raises(RedirectError):
            async with client.stream("GET", origin.url):
                pass
        assert origin.connections == 1

    talk(lambda request: redirect("/"), work)


@pytest.mark.parametrize("location", ["ftp://a/", "http://", "javascript:alert(1)", "http://a:99999/", "file:///etc/passwd",
                                      "http://a b/"])
def test_a_redirect_to_what_is_no_http_is_an_error(location):
    async def work(client, origin):
        with pytest.raises(RedirectError, match="cannot be followed"):
            await client.get(origin.url)

    talk(lambda request: redirect(location), work)


@pytest.mark.parametrize("moved", [stuck, drip, cut])
def test_the_content_of_a_redirect_in_a_stream_is_not_waited_for(moved, monkeypatch):
    monkeypatch.setattr("flowcoro_http.DROP_TIMEOUT", 0.05)

    async def handler(request):
        if request.target != "/":
            return answer("there")
        await request.sock.write(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 2000\r\n\r\n")
        await moved(request)

    async def work(client, origin):
        with flowcoro.timeout(PATIENCE):
            async with client.stream("GET", origin.url, timeout=FOREVER) as response:
                assert await response.read() == b"there" and response.history[0].status == 302

    talk(handler, work)


def test_a_location_that_is_not_ascii_is_taken_as_utf_8():
    async def work(client, origin):
        assert (await client.get(origin.url)).url == origin.url + "/%C3%BC"

    talk(scripted(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /\xc3\xbc\r\n\r\n", answer()), work)


def test_a_content_that_can_be_read_once_is_not_sent_to_another_place():
    async def work(client, origin):
        with pytest.raises(RedirectError, match="read once"):
            await client.post(origin.url, content=iter([b"x"]))
        assert (await client.post(origin.url, content=iter([b"x"]))).text == "GET"

    talk(scripted(redirect("/", "307 x"), redirect("/", "303 x"), answer("GET")), work)


def test_credentials_stay_with_their_origin():
    async def main():
        async with serving(lambda request: answer()) as other:
            there = f"http://localhost:{other.port}/x"
            async with serving(lambda request: redirect("/again" if request.target == "/" else there)) as origin:
                async with HttpClient(trust_env=False, auth=("me", "secret"), cookies={"own": "1"},
                                      headers={"Cookie": "h=2"}) as client:
                    await client.get(origin.url, headers={"X-Mine": "3", "Proxy-Authorization": "Basic p", "Origin": "null"})
                    await client.get(origin.url, headers={"Authorization": "Bearer t"}, auth=False)
                async with HttpClient(trust_env=False, auth=BearerAuth("abc"), cookies={"own": "1"}) as client:
                    await client.get(origin.url, cookies={"more": "2"})
        assert len(origin.requests) == 6 and len(other.requests) == 3
        sent = [request.headers["authorization"][:8] for request in origin.requests]
        assert sent == ["Basic bW"] * 2 + ["Bearer t"] * 2 + ["Bearer a"] * 2
        assert [request.headers["cookie"] for request in origin.requests] == ["h=2"] * 4 + ["own=1; more=2"] * 2
        for request in other.requests:
            assert all(name not in request.headers for name in ("authorization", "cookie", "proxy-authorization", "origin"))
            assert request.headers["host"] == f"localhost:{other.port}"
        assert other.requests[0].headers["x-mine"] == "3"

    flowcoro.run(main())


# ---- authentication --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("auth, sent", [
    (("me", "pass"), "Basic bWU6cGFzcw=="), (BasicAuth("ü", "x"), "Basic w7w6eA=="), (BearerAuth("t.o-k"), "Bearer t.o-k"),
    (False, None)])
def test_basic_and_bearer(auth, sent):
    async def work(client, origin):
        for _ in range(3):
            assert (await client.get(origin.url, auth=auth)).status == 401
        assert [request.headers.get("authorization") for request in origin.requests] == [sent] * 3
        assert "pass" not in repr(auth) or isinstance(auth, tuple)

    talk(lambda request: answer("", "401 Unauthorized", "WWW-Authenticate: Basic realm=x"), work)


def test_the_user_of_a_url_and_of_netrc(tmp_path):
    path = tmp_path / "netrc"
    path.write_text("machine 127.0.0.1 login net password rc\n")

    async def work(client, origin):
        await client.get(origin.url.replace("//", "//u%40:p%3A@"))
        await client.get(origin.url)
        await client.get(origin.url, auth=False)
        await client.get(origin.url.replace("127.0.0.1", "localhost"))
        await client.get(origin.url.replace("//", "//u:p@"), auth=("me", "x"))
        sent = [request.headers.get("authorization") for request in origin.requests]
        assert sent == ["Basic dUA6cDo=", "Basic bmV0OnJj", None, None, "Basic bWU6eA=="]

    talk(lambda request: answer(), work, netrc=str(path))
    path.write_text("machine\n")
    with pytest.raises(ValueError, match="netrc"):
        talk(lambda request: answer(), lambda client, origin: client.get(origin.url), netrc=str(path))
    talk(lambda request: answer(), lambda client, origin: client.get(origin.url), netrc=str(tmp_path / "none"))


def test_the_netrc_of_the_environment_is_used_and_can_be_left_out(tmp_path, monkeypatch):
    path = tmp_path / "netrc"
    path.write_text("machine 127.0.0.1 login net password rc\n")
    monkeypatch.setenv("NETRC", str(path))

    async def main():
        async with serving(lambda request: answer()) as origin:
            for options in ({}, {"trust_env": False}, {"netrc": False}):
                async with HttpClient(**options) as client:
                    await client.get(origin.url)
            assert [request.headers.get("authorization") for request in origin.requests] == ["Basic bmV0OnJj", None, None]

    flowcoro.run(main())


def test_a_netrc_that_nobody_has_asked_for_is_told_and_done_without(tmp_path, monkeypatch, reports):
    path = tmp_path / "netrc"
    path.write_text("what is this")
    monkeypatch.setenv("NETRC", str(path))

    async def main():
        async with serving(lambda request: answer()) as origin, HttpClient() as client:
            for _ in range(2):
                assert (await client.get(origin.url)).status == 200

    flowcoro.run(main())
    [(message, error)] = reports
    assert "without it" in message and "netrc=False" in str(error)


def digest_server(algorithm="SHA-256", uses=10**9, user="me", password="pass", scheme="Digest"):
    """A handler that asks for digest authentication; each nonce serves `uses` times."""
    state = {"nonce": 0, "count": 0}
    function = {"MD5": hashlib.md5, "SHA-256": hashlib.sha256}[algorithm]

    def digest(*texts):
        return function(":".join(texts).encode()).hexdigest()

    def handler(request):
        value, stale = request.headers.get("authorization"), False
        if value and scheme == "Digest":
            given = _parse_credentials(value).parameters
            expected = digest(digest(user, "r", password), given["nonce"], given["nc"], given["cnonce"], "auth",
                              digest(request.method, request.target))
            right = given["response"] == expected and given["uri"] == request.target
            if right and given["nonce"] == f"n{state['nonce']}" and int(given["nc"], 16) == state["count"] + 1 <= uses:
                state["count"] += 1
                return answer("in")
            stale = right
        state["nonce"], state["count"] = state["nonce"] + 1, 0
        more = {"stale": "true"} if stale else {}
        asked = _challenge(scheme, realm="r", nonce=f"n{state['nonce']}", qop="auth", algorithm=algorithm, **more)
        return answer("out", "401 Unauthorized", "WWW-Authenticate: " + asked)

    return handler


@pytest.mark.parametrize("algorithm", ["MD5", "SHA-256"])
def test_digest_answers_a_challenge_and_then_at_once(algorithm):
    async def work(client, origin):
        response = await client.post(origin.url + "/a?b=c", content=b"body")
        assert response.text == "in" and [before.status for before in response.history] == [401]
        for _ in range(3):
            assert (await client.get(origin.url + "/d")).text == "in"
        assert len(origin.requests) == 5 and origin.requests[1].body == b"body" and origin.connections == 1

    talk(digest_server(algorithm), work, auth=DigestAuth("me", "pass"))


def test_digest_takes_a_new_nonce_when_the_old_one_is_stale():
    async def work(client, origin):
        for _ in range(6):
            assert (await client.get(origin.url)).text == "in"
        assert len(origin.requests) == 9

    talk(digest_server(uses=2), work, auth=DigestAuth("me", "pass"))


def test_digest_with_a_wrong_password_ends():
    async def work(client, origin):
        for number in range(1, 4):
            assert (await client.get(origin.url)).status == 401
            assert len(origin.requests) <= 3 * number
        async with client.stream("GET", origin.url) as response:
            assert response.status == 401 and await response.read() == b"out"

    talk(digest_server(), work, auth=DigestAuth("me", "wrong"))


@pytest.mark.parametrize("challenge", ["Basic realm=x", "Digest realm=r", "garbage, =,",
                                       "Digest realm=r, nonce=n, algorithm=MD6", ""])
def test_digest_does_not_show_its_password_to_who_asks_otherwise(challenge):
    async def work(client, origin):
        assert (await client.get(origin.url)).status == 401
        assert ["authorization" in request.headers for request in origin.requests] == [False]

    talk(lambda request: answer("", "401 x", f"WWW-Authenticate: {challenge}"), work, auth=DigestAuth("me", "pass"))


def test_a_content_that_can_be_read_once_gets_the_401():
    async def work(client, origin):
        assert (await client.post(origin.url, content=iter([b"x"]))).status == 401

    talk(digest_server(), work, auth=DigestAuth("me", "pass"))


def test_an_auth_of_ones_own():
    class Signed(Auth):
        def authorize(self, request):
            request.headers.set("X-Signed", request.method + request.parsed.target)

    async def main():
        async with serving(lambda request: answer()) as other:
            there = f"http://127.0.0.1:{other.port}/"
            async with serving(lambda request: redirect("/again" if request.target == "/x" else there)) as origin:
                async with HttpClient(trust_env=False, auth=Signed()) as client:
                    await client.delete(origin.url + "/x", headers={"X-Signed": "mine"})
        assert [request.headers.get("x-signed") for request in origin.requests + other.requests] == [
            "DELETE/x", "DELETE/again", None]

    flowcoro.run(main())


# ---- cookies ---------------------------------------------------------------------------------------------------

def test_cookies_are_kept_and_sent_as_they_say():
    def handler(request):
        if request.target == "/set":
            return answer("", "200 OK", "Set-Cookie: a=1; Path=/", "Set-Cookie: b=2; Path=/only",
                          "Set-Cookie: c=3; Secure; Path=/",
                          "Set-Cookie: d=4; Domain=example.com; Path=/", "Set-Cookie: gone=5; Max-Age=0; Path=/",
                          "Set-Cookie: ;;=")
        if request.target == "/away":
            return answer("", "302 x", "Location: /", "Set-Cookie: e=6; Path=/")
        return answer(request.headers.get("cookie", "none"))

    async def work(client, origin):
        for _ in range(3):
            assert (await client.get(origin.url)).text == "none"
        assert (await client.get(origin.url + "/set")).cookies == {"a": "1", "b": "2", "c": "3", "d": "4", "gone": "5"}
        assert (await client.get(origin.url)).text == "a=1"
        assert (await client.get(origin.url + "/only/x")).text == "b=2; a=1"
        assert (await client.get(origin.url, cookies={"mine": "7"})).text == "mine=7; a=1"
        assert (await client.get(origin.url, headers={"Cookie": "x=y"})).text == "x=y"
        assert (await client.get(origin.url + "/away")).text in ("a=1; e=6", "e=6; a=1")
        assert {cookie.name for cookie in client.cookies} == {"a", "b", "e"}
        client.cookies.clear()
        assert (await client.get(origin.url)).text == "none"

    talk(handler, work)


def jar_of(url, *cookies):
    jar = _Jar()
    jar.extract_cookies(_CookieResponse(Headers([("Set-Cookie", cookie) for cookie in cookies])), _CookieRequest(_Url(url)))
    return jar


def cookie_for(jar, url):
    request = _CookieRequest(_Url(url))
    jar.add_cookie_header(request)
    return request.cookie


@pytest.mark.parametrize("url, cookie, sent, kept", [
    ("http://a.example.com/", "x=1", "http://a.example.com/", "http://b.a.example.com/"),
    ("http://localhost/", "x=1", "http://localhost/", "http://b.localhost/"),
    ("http://a.example.com/", "x=1; Domain=example.com", "http://b.example.com/", "http://badexample.com/"),
    ("http://a.example.com/", "x=1; Domain=com", None, "http://com/"),
    ("http://intranet/", "x=1; Domain=local", None, "http://other/"),
    ("http://a.local/", "x=1; Domain=.local", None, "http://b.local/"),
    ("http://a.example.co.uk/", "x=1; Domain=co.uk", None, "http://b.co.uk/"),
    ("http://a.example.com/", "x=1; Domain=b.example.com", None, "http://b.example.com/"),
    ("http://127.0.0.1/", "x=1", "http://127.0.0.1:81/", "http://127.0.0.2/"),
    ("http://127.0.0.1/", "x=1; Domain=0.0.1", None, "http://1.0.0.1/"),
    ("http://127.0.0.1/", "x=1; Domain=127.0.0.1", "http://127.0.0.1/", "http://127.0.0.2/"),
    ("http://[::1]/", "x=1", "http://[::1]:81/", "http://[::2]/"),
    ("https://a.example.com/", "x=1; Secure", "https://a.example.com/", "http://a.example.com/"),
    ("http://a.example.com/", "x=1; Secure", None, "https://a.example.com/"),
    ("https://a.example.com/", "__Host-x=1; Secure; Path=/", "https://a.example.com/", "https://b.a.example.com/"),
    ("https://a.example.com/", "__Host-x=1; Secure; Path=/; Domain=example.com", None, "https://a.example.com/"),
    ("https://a.example.com/", "__host-x=1; Secure; Path=/x", None, "https://a.example.com/x"),
    ("https://a.example.com/", "__Secure-x=1; Path=/", None, "https://a.example.com/"),
    ("http://a.example.com/x/y", "x=1", "http://a.example.com/x/z", "http://a.example.com/xz"),
    ("http://a.example.com/", "x=1; Path=/y", "http://a.example.com/y/z", "http://a.example.com/yz"),
])
def test_a_cookie_goes_nowhere_else(url, cookie, sent, kept):
    jar = jar_of(url, cookie)
    assert sent is None or cookie_for(jar, sent) == cookie.partition(";")[0]
    assert cookie_for(jar, kept) is None


@pytest.mark.parametrize("cookie", [
    "x=" + "1" * 4095, "x=1; a=" + "1" * 1024, f"x=1; Expires=Wed, 09-Feb-{'9' * 5000} 00:00:00 GMT",
    "x=1; Max-Age=" + "9" * 5000])
def test_a_cookie_that_is_too_long_is_dropped(cookie):
    assert [cookie.name for cookie in jar_of("http://example.com/", cookie, "y=1")] == ["y"]


def test_a_jar_of_ones_own_is_used():
    jar = http.cookiejar.CookieJar()

    async def work(client, origin):
        await client.get(origin.url)
        assert (await client.get(origin.url)).status == 200 and [cookie.name for cookie in jar] == ["a"]
        assert [request.headers.get("cookie") for request in origin.requests] == [None, "a=1"]

    talk(lambda request: answer("", "200 OK", "Set-Cookie: a=1"), work, cookies=jar)


def test_a_flood_of_cookies_does_not_fill_the_jar_without_end(monkeypatch):
    monkeypatch.setattr("flowcoro_http.MAX_OF_DOMAIN", 20)
    monkeypatch.setattr("flowcoro_http.MAX_JAR", 50)

    def handler(request):
        number = int(request.target[1:])
        return answer("", "200 OK", *[f"Set-Cookie: n{number}x{one}=1; Path=/{one % 3}" for one in range(90)])

    async def work(client, origin):
        for number in range(20):
            await client.get(f"{origin.url}/{number}")
            assert len(client.cookies) <= 30
        assert "n19x89" in {cookie.name for cookie in client.cookies}, "the newest are kept"
        for number in range(20):
            await client.get(f"http://h{number}.test:{origin.port}/1")
            assert len(client.cookies) <= 70

    async def main():
        async with serving(handler) as origin:
            async def connect(host, port, tls):
                return await Socket.connect("127.0.0.1", origin.port)

            async with HttpClient(connect=connect, trust_env=False) as client:
                await work(client, origin)

    flowcoro.run(main())


# ---- proxies ---------------------------------------------------------------------------------------------------

async def through(sock, target):
    """Carry bytes between a socket and host:port."""
    host, _, port = target.rpartition(":")
    async with await Socket.connect(host, int(port)) as there, flowcoro.TaskGroup() as group:
        async def carry(one, other):
            with contextlib.suppress(OSError):
                while data := await one.read():
                    await other.write(data)
                await other.shutdown_write()

        await sock.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        group.spawn(carry(sock, there))
        await carry(there, sock)
        group.cancel()


class Proxy(Origin):
    """It counts what passes; CONNECT needs a head of its own, as a codec stops there."""

    async def serve(self, sock):
        self.connections += 1
        head = (await sock.read_until(b"\r\n\r\n")).decode()
        self.requests.append(head)
        if head.startswith("CONNECT"):
            await through(sock, head.split()[1])
        else:
            await sock.write(self.handler(head))


def test_http_goes_through_a_proxy_by_its_url():
    async def main():
        async with serving(Proxy(lambda head: answer(head.split("\r\n")[0]))) as proxy:
            for options in {"proxy": proxy.url.replace("//", "//u:p@")}, {"proxy": {"http": f"u:p@127.0.0.1:{proxy.port}"}}:
                async with HttpClient(trust_env=False, **options) as client:
                    assert (await client.get("http://example.test:81/x?y")).text == "GET http://example.test:81/x?y HTTP/1.1"
                    assert "\r\nHost: example.test:81\r\n" in proxy.requests[-1]
                    assert "\r\nProxy-Authorization: Basic dTpw\r\n" in proxy.requests[-1]
                    assert given_back(client)

    flowcoro.run(main())


def test_https_goes_through_a_proxy_by_connect(certificate):
    async def main():
        async with serving(lambda request: answer(request.target),
                           tls=certificate.server) as origin, serving(Proxy(None)) as proxy:
            async with HttpClient(trust_env=False, proxy=proxy.url.replace("//", "//u:p@"), verify=certificate.path) as client:
                for _ in range(2):
                    assert (await client.get(origin.url.replace("127.0.0.1", "localhost") + "/x")).text == "/x"
                [head] = proxy.requests
                assert head.startswith(f"CONNECT localhost:{origin.port} HTTP/1.1\r\n") and "Basic dTpw" in head
                assert "proxy-authorization" not in origin.requests[0].headers

    flowcoro.run(main())


@pytest.mark.parametrize("reply, message", [
    (answer("no", "407 Proxy Authentication Required"), "407 Proxy"), (b"garbage\r\n\r\n", "0x67"), (b"", "ended"),
    (b"HTTP/1.1 200 OK\r\n\r\ninjected", "200"), (b"HTTP/1.1 100 x\r\n\r\n" * 100, "informational")])
def test_a_proxy_that_does_not_connect_is_an_error(reply, message):
    async def handler(sock):
        await sock.read()
        await sock.write(reply)

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(handler))
            async with HttpClient(trust_env=False, proxy=f"http://127.0.0.1:{server.local[1]}", retries=3) as client:
                with pytest.raises(ProxyError, match=message) as caught:
                    await client.get("https://example.test/")
                assert caught.value.request.url == "https://example.test/" and given_back(client)
                assert caught.value.status == (407 if "407" in message else 200 if message == "200" else None)
            group.cancel()

    flowcoro.run(main())


def test_proxies_of_the_environment():
    environ = {"HTTP_PROXY": "http://up", "http_proxy": "http://low", "HTTPS_PROXY": "http://s", "ALL_PROXY": "http://all",
               "NO_PROXY": "x"}
    assert _environment_proxies(environ) == {"http": "http://low", "https": "http://s", "all": "http://all", "no": "x"}
    assert _environment_proxies({"HTTP_PROXY": "http://up"}) == {"http": "http://up"}
    assert _environment_proxies({"HTTP_PROXY": "http://up", "REQUEST_METHOD": "GET"}) == {}, "a CGI program's client has set that"
    assert _environment_proxies({"http_proxy": "", "HTTP_PROXY": "http://up"}) == {}


def test_the_environment_is_used_and_can_be_left_out(monkeypatch):
    async def main():
        async with serving(Proxy(lambda head: answer("proxy"))) as proxy, serving(lambda request: answer("direct")) as origin:
            monkeypatch.setenv("http_proxy", proxy.url)
            monkeypatch.setenv("no_proxy", "localhost")
            async with HttpClient() as client:
                assert (await client.get(origin.url)).text == "proxy"
                assert (await client.get(origin.url.replace("127.0.0.1", "localhost"))).text == "direct"
            for options in {"trust_env": False}, {"proxy": {}}:
                async with HttpClient(**options) as client:
                    assert (await client.get(origin.url)).text == "direct"

    flowcoro.run(main())


@pytest.mark.parametrize("url, no_proxy, goes_without", [
    ("http://a.example.com/", "example.com", True), ("http://a.example.com/", ".example.com", True),
    ("http://example.com/", ".example.com", True),
    ("http://a.example.com/", "*.example.com", True), ("http://notexample.com/", "example.com", False), ("http://x/", "*", True),
    ("http://x/", "y , x", True), ("http://x:81/", "x:81", True), ("http://x:82/", "x:81", False),
    ("http://10.1.2.3/", "10.0.0.0/8", True),
    ("http://11.1.2.3/", "10.0.0.0/8", False), ("http://[::1]/", "::1", True), ("http://[::1]:81/", "[::1]:81", True),
    ("http://x/", "", False),
    ("http://1.2.3.4/", "2.3.4", False), ("http://x./", "x", True), ("http://X/", "x", True)])
def test_what_goes_without_a_proxy(url, no_proxy, goes_without):
    assert _goes_without(_Url(url), no_proxy) is goes_without


@pytest.mark.parametrize("proxy", [
    "socks5://a", "http://", {"http": "a b"}, "https://proxy:1", {"https://": "http://a"}, {"no_proxy": "a"}])
def test_proxies_that_cannot_be_used(proxy):
    with pytest.raises(ValueError, match="prox"):
        HttpClient(proxy=proxy)


def test_an_auth_that_is_never_content_is_asked_twice():
    class Stubborn(Auth):
        def challenged(self, request, response):
            return True

    async def work(client, origin):
        assert (await client.get(origin.url)).status == 401 and len(origin.requests) == 3

    talk(lambda request: answer("", "401 x"), work, auth=Stubborn())


# ---- retries ---------------------------------------------------------------------------------------------------

def test_a_request_is_tried_again_after_a_while():
    async def work(client, origin):
        began = flowcoro.now()
        assert (await client.put(origin.url, content=b"x")).text == "good"
        assert 0.01 * 0.5 <= flowcoro.now() - began
        assert [request.body for request in origin.requests] == [b"x"] * 3 and origin.connections == 2
        assert (await client.get(origin.url, retries=0)).status == 502
        assert (await client.post(origin.url, content=b"x")).status == 503, "a POST may have been acted on"

    talk(scripted(answer("", "503 x"), None, answer("good"), answer("", "502 x"), answer("", "503 x")), work,
         retries=Retries(3, wait=0.01))


def test_retry_after_counts_and_a_long_one_ends_it(monkeypatch):
    parse = flowcoro_http._parse_retry_after
    monkeypatch.setattr(flowcoro_http, "_parse_retry_after", lambda value, now: parse(value, now) / 100)

    async def work(client, origin):
        began = flowcoro.now()
        assert (await client.get(origin.url)).status == 503
        assert 0.2 <= flowcoro.now() - began < 20 and len(origin.requests) == 2

    talk(scripted(answer("", "429 x", "Retry-After: 20"), answer("", "503 x", "Retry-After: 3001")), work,
         retries=Retries(3, wait=0.001))


def test_the_budget_bounds_the_retries_of_all():
    async def work(client, origin):
        for _ in range(10):
            assert (await client.get(origin.url)).status == 503
        assert len(origin.requests) == 10 + 4

    talk(lambda request: answer("", "503 x"), work, retries=Retries(2, wait=0.001, budget=4))


def test_a_success_gives_a_tenth_of_a_retry_back():
    async def work(client, origin):
        for target in ("/bad", *["/good"] * 10, "/bad", "/bad"):
            await client.get(origin.url + target)
        assert [request.target for request in origin.requests].count("/bad") == 2 + 2 + 1

    talk(lambda request: answer("", "503 x" if request.target == "/bad" else "200 OK"), work,
         retries=Retries(1, wait=0.001, budget=1))


def test_each_wait_is_twice_as_long_as_the_one_before():
    async def refuse(host, port, tls):
        raise ConnectionRefusedError(111, "refused")

    async def main():
        async with HttpClient(connect=refuse, trust_env=False, retries=Retries(3, wait=1.0)) as client:
            before = flowcoro.now()
            with pytest.raises(ConnectError):
                await client.get("http://a/")
            assert 0.5 * (1 + 2 + 4) <= flowcoro.now() - before <= 1 + 2 + 4

    flowcoro.run(main(), clock=VirtualClock())


def test_a_post_is_tried_again_when_there_was_no_connection():
    async def main():
        calls = []

        async def connect(host, port, tls):
            calls.append(host)
            if len(calls) < 3:
                raise ConnectionRefusedError(111, "refused")
            return await Socket.connect("127.0.0.1", origin.port)

        async with serving(lambda request: answer("good")) as origin:
            async with HttpClient(connect=connect, trust_env=False, retries=Retries(2, wait=0.001)) as client:
                assert (await client.post("http://a/", content=b"x")).text == "good" and len(calls) == 3
                assert given_back(client)

    flowcoro.run(main())


@pytest.mark.parametrize("error", [TlsError("no trust"), ProxyError("407")])
def test_what_another_connection_would_not_mend_is_not_tried_again(error):
    calls = []

    async def connect(host, port, tls):
        calls.append(host)
        raise error

    async def main():
        async with HttpClient(connect=connect, trust_env=False, retries=Retries(2, wait=0.001)) as client:
            with pytest.raises(ConnectError):
                await client.get("https://a/")

    flowcoro.run(main())
    assert len(calls) == 1


def test_nothing_is_tried_beyond_the_total_time():
    async def work(client, origin):
        with pytest.raises(TransferError):
            await client.get(origin.url, retries=Retries(5, wait=20), timeout=Timeouts(total=5))
        assert len(origin.requests) == 1

    talk(lambda request: None, work)


# ---- time ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("handler, timeout, phase", [
    (silence, Timeouts(head=0.1), "head"), (silence, 0.1, "head"), (drip, Timeouts(head=0.1), "head"),
    (stuck, Timeouts(read=0.1), "read"),
    (drip, Timeouts(total=0.2), "total"), (silence, Timeouts(total=0.1), "total")])
@pytest.mark.parametrize("stream", [False, True])
def test_each_phase_has_its_limit(handler, timeout, phase, stream):
    async def work(client, origin):
        with pytest.raises(RequestTimeout, match=f"GET http.*timeout {phase}=0.[12] s has passed") as caught:
            if stream:
                async with client.stream("GET", origin.url, timeout=timeout) as response:
                    await response.read()
            else:
                await client.get(origin.url, timeout=timeout)
        assert caught.value.phase == phase and isinstance(caught.value, TimeoutError)
        assert caught.value.request.url == origin.url + "/"

    talk(handler, work)


def test_a_connection_that_is_not_made_in_time():
    async def main():
        async def connect(host, port, tls):
            await flowcoro.sleep(FOREVER)

        async with HttpClient(connect=connect, trust_env=False, timeout=Timeouts(connect=0.05)) as client:
            with pytest.raises(RequestTimeout) as caught:
                await client.get("http://a/")
            assert caught.value.phase == "connect" and given_back(client)

    flowcoro.run(main())


def test_a_server_that_does_not_read():
    async def main():
        async def handler(sock):
            await flowcoro.sleep(FOREVER)

        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(handler))
            async with HttpClient(trust_env=False, timeout=Timeouts(read=0.1)) as client:
                with pytest.raises(RequestTimeout) as caught:
                    await client.post(f"http://127.0.0.1:{server.local[1]}", content=b"x" * 30_000_000)
                assert caught.value.phase == "read" and given_back(client)
            group.cancel()

    flowcoro.run(main())


def on_a_virtual_clock(handler, work, **options):
    """talk(), with sockets in memory, where waiting takes no time."""
    origin = Origin(handler)

    async def main():
        async def connect(host, port, tls):
            here, there = memory_socket_pair(Socket)

            async def serve():
                async with there:
                    await origin.serve(there)

            group.spawn(serve())
            return here

        async with flowcoro.TaskGroup() as group:
            async with HttpClient(connect=connect, trust_env=False, base_url="http://origin.test", **options) as client:
                try:
                    await work(client, origin)
                finally:
                    assert given_back(client)
            group.cancel()

    flowcoro.run(main(), clock=VirtualClock())


def test_an_answer_that_came_before_the_connection_broke_is_taken():
    async def handler(sock):
        await sock.read_until(b"\r\n\r\n")
        await sock.write(answer("too large", "413 Content Too Large", "Connection: close"))

    async def main():
        async def connect(host, port, tls):
            here, there = memory_socket_pair(Socket)

            async def serve():
                async with there:
                    await handler(there)

            group.spawn(serve())
            return here

        async with flowcoro.TaskGroup() as group, HttpClient(connect=connect, trust_env=False) as client:
            try:
                response = await client.post("http://a/", content=b"x" * 5_000_000)
                said.append((response.status, response.text))
            except TransferError as error:
                said.append(error)

    said = []
    flowcoro.run(main(), clock=VirtualClock())
    assert said == [(413, "too large")]


def test_the_limit_is_for_each_wait_not_for_all_of_a_content():
    async def slowly(count):
        for _ in range(count):
            await flowcoro.sleep(20)
            yield b"x"

    async def handler(request):
        await request.sock.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        for _ in range(10):
            await flowcoro.sleep(20)
            await request.sock.write(b"y")
        return b""

    async def work(client, origin):
        began = flowcoro.now()
        assert (await client.put("/", content=slowly(5))).content == b"y" * 10
        assert flowcoro.now() - began == 300
        async with client.stream("PUT", "/", content=slowly(10)) as response:
            assert await response.read() == b"y" * 10
        with pytest.raises(RequestTimeout, match="total=301"):
            await client.put("/", content=slowly(20))

    on_a_virtual_clock(handler, work, timeout=Timeouts(total=301))


def test_no_limit_and_wrong_limits():
    async def work(client, origin):
        assert (await client.get(origin.url, timeout=None)).text == "x"
        async with client.stream("GET", origin.url, timeout=None) as response:
            assert await response.read() == b"x"

    talk(lambda request: answer("x"), work)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError):
            HttpClient(timeout=wrong)


# ---- TLS -------------------------------------------------------------------------------------------------------

def test_https_keeps_its_connections_and_checks_certificates(certificate):
    async def work(client, origin):
        url = origin.url.replace("127.0.0.1", "localhost")
        for _ in range(4):
            assert (await client.get(url + "/x")).text == "/x" * 10_000
            await flowcoro.sleep(0.005)
        assert origin.connections == 1
        async with HttpClient(trust_env=False, retries=5) as other:
            with pytest.raises(ConnectError, match="certificate"):
                await other.get(url)
        async with HttpClient(trust_env=False, verify=False) as other:
            assert (await other.get(url)).status == 200
        async with HttpClient(trust_env=False, verify=client_tls(ca=certificate.path)) as other:
            assert (await other.get(url)).status == 200

    talk(lambda request: answer(request.target * 10_000), work, tls=certificate.server, verify=certificate.path)


def test_a_certificate_for_another_name(certificates):  # noqa: F811
    async def work(client, origin):
        with pytest.raises(ConnectError, match="localhost"):
            await client.get(origin.url.replace("127.0.0.1", "localhost"))
        assert origin.requests == []

    talk(lambda request: answer(), work, tls=server_tls(*certificates.other_name), verify=certificates.ca)


def test_a_client_shows_its_certificate(certificates):  # noqa: F811
    context = server_tls(*certificates.good, client_ca=certificates.ca)

    async def work(client, origin):
        assert (await client.get(origin.url.replace("127.0.0.1", "localhost"))).text == "client"

    def handler(request):
        return answer(request.sock.tls.getpeercert()["subject"][0][0][1])

    talk(handler, work, tls=context, verify=certificates.ca, cert=certificates.client)
    with pytest.raises(RequestError):
        talk(handler, work, tls=context, verify=certificates.ca)


def test_a_tls_connection_that_the_server_has_closed_is_not_used(certificate):
    async def handler(request):
        await request.sock.write(answer())

    async def work(client, origin):
        for number in range(1, 4):
            await client.post(origin.url.replace("127.0.0.1", "localhost"), content=b"x")
            await flowcoro.sleep(0.02)
        assert len(origin.requests) == 3

    talk(handler, work, tls=certificate.server, verify=certificate.path)


def test_http_where_tls_is_spoken_and_the_other_way_round(certificate):
    async def main():
        async with serving(lambda request: answer(),
                           tls=certificate.server) as secure, serving(lambda request: answer()) as plain:
            async with HttpClient(trust_env=False, verify=False) as client:
                with pytest.raises(RequestError):
                    await client.get(secure.url.replace("https", "http"))
                with pytest.raises(RequestError):
                    await client.get(plain.url.replace("http", "https"))
                assert given_back(client)

    flowcoro.run(main())


# ---- hooks -----------------------------------------------------------------------------------------------------

def test_hooks_see_each_request_and_response():
    seen = []

    async def asked(request):
        seen.append(request.url)
        request.headers.set("X-Hook", str(len(seen)))

    async def work(client, origin):
        await client.get(origin.url)
        assert [request.headers["x-hook"] for request in origin.requests] == ["1", "3"]
        assert seen == [origin.url + "/", 302, origin.url + "/b", 200]

    hooks = {"request": [asked], "response": [lambda response: seen.append(response.status)]}
    talk(scripted(redirect("/b"), answer()), work, event_hooks=hooks)
    with pytest.raises(ValueError):
        HttpClient(event_hooks={"respond": []})


@pytest.mark.parametrize("hooks", [[], ["response"], ["request", "response"]])
def test_what_comes_for_a_request_that_is_remembered_counts_all_the_same(hooks):
    seen = []

    def handler(request):
        number = len(origin_requests)
        origin_requests.append(request)
        return {3: answer("", "200 OK", "Set-Cookie: a=1"), 5: redirect("/b"), 8: answer("", "503 x")}.get(number, answer("fine"))

    async def work(client, origin):
        for number in range(5):
            assert (await client.get(origin.url)).status == 200
        assert [request.headers.get("cookie") for request in origin_requests] == [None] * 4 + ["a=1"]
        client.cookies.clear()
        client.cookies.filled = False
        assert (await client.get(origin.url)).history[0].status == 302
        assert (await client.get(origin.url)).text == "fine"
        assert (await client.get(origin.url)).status == 503 and len(origin_requests) == 9
        assert len(seen) == 9 * len(hooks)

    origin_requests = []
    talk(handler, work, event_hooks={which: [seen.append] for which in hooks})


@pytest.mark.parametrize("which", ["request", "response"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_error_of_a_hook_leaves_nothing_behind(which, stream):
    def bad(thing):
        raise KeyError("hook")

    async def work(client, origin):
        with pytest.raises(KeyError):
            if stream:
                async with client.stream("GET", origin.url):
                    pass
            await client.get(origin.url)

    talk(lambda request: answer(b"x" * 10**6), work, event_hooks={which: [bad]})


# ---- servers that mean harm ------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
BOMB = gzip.compress(b"\0" * 20_000_000, 9)


@pytest.mark.parametrize("reply, error, message", [
    (b"", TransferError, "without a response"), (b"HTT", TransferError, "ended"), (b"SSH-2.0-x\r\n", ResponseError, "0x53"),
    (b"HTTP/2 200\r\n\r\n", ResponseError, "status line"), (OK + b"Content-Length: 5\r\n\r\nabc", TransferError, "ended"),
    (OK + b"Content-Length: -5\r\n\r\n", ResponseError, "digits"), (OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
                                                                    ResponseError, "2 times"),
    (OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", ResponseError, "at once"),
    (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", TransferError, "ended"),
    (OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", ResponseError, "chunk"),
    (OK + b"X: a\nY: b\r\n\r\n", ResponseError, "line feed"), (OK + b"a" * 100_000, ResponseError, "bytes"),
    (OK + b"X: y\r\n" * 100_000, ResponseError, "more than"), (b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, ResponseError,
                                                               "informational"),
    (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", ResponseError, "switch"),
    (OK + b"Content-Length: 999999999\r\n\r\n", ResponseError, "allowed"), (OK + b"Content-Encoding: gzip\r\n\r\n" + BOMB,
                                                                            ResponseError, "max_bytes"),
    (OK + b"Content-Encoding: gzip\r\n\r\nnot gzip", ResponseError, "gzip"),
    (OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"abc")[:-4], ResponseError, "breaks off"),
    (b"HTTP/1.1 302 Found\r\nContent-Length: 5\r\nLocation: /\r\n\r\nab", RequestError, "ended|max_redirects"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_response_is_an_error_and_leaves_nothing(reply, error, message, stream):
    async def handler(request):
        await request.sock.write(reply)

    async def work(client, origin):
        for _ in range(2):
            with pytest.raises(RequestError, match=message) as caught:
                if stream:
                    async with client.stream("GET", origin.url, max_bytes=1_000_000) as response:
                        await response.read()
                else:
                    await client.get(origin.url, max_bytes=1_000_000)
            if stream and b"gzip, gzip" not in reply and b"999999999" in reply:
                error_class = (ResponseError, TransferError)
            else:
                error_class = error
            assert isinstance(caught.value, error_class) and caught.value.request.url == origin.url + "/"
            numbers = client.statistics()[origin.url]
            assert numbers["in_use"] == numbers["idle"] == 0

    talk(handler, work) if b"999999999" not in reply or not stream else None


@pytest.mark.parametrize("reply", [answer("body"), b"HTTP/1.1 304 Not Modified\r\n\r\nbody",
                                   b"HTTP/1.1 204 No Content\r\n\r\nbody"])
def test_a_content_where_there_is_none_is_not_taken_for_the_next_answer(reply):
    async def work(client, origin):
        for _ in range(3):
            response = await client.head(origin.url)
            assert response.content == b"" and response.status in (200, 204, 304)
        assert origin.connections == 3

    talk(lambda request: reply, work)


def test_endless_contents_are_cut(monkeypatch):
    async def handler(request):
        await request.sock.write(OK + (b"" if request.target == "/close" else b"Transfer-Encoding: chunked\r\n") + b"\r\n")
        while True:
            await request.sock.write(b"x" * 1000 if request.target == "/close" else b"3e8\r\n" + b"x" * 1000 + b"\r\n")

    async def work(client, origin):
        for target in "/close", "/chunks":
            with pytest.raises(ResponseError, match="100000"):
                await client.get(origin.url + target)

    talk(handler, work, max_bytes=100_000)


def test_an_early_answer_to_a_content_that_is_not_wanted():
    async def handler(sock):
        await sock.read_until(b"\r\n\r\n")
        await sock.write(answer("too large", "413 Content Too Large", "Connection: close"))
        await sock.shutdown_write()
        for _ in range(20):
            await sock.read()

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(handler))
            async with HttpClient(trust_env=False, timeout=10) as client:
                try:
                    response = await client.post(f"http://127.0.0.1:{server.local[1]}", content=b"x" * 50_000_000)
                    assert response.text == "too large"
                except TransferError:           # the system may drop what has come when the connection is reset
                    pass
                assert given_back(client)
            group.cancel()

    flowcoro.run(main())


def with_handler(handler, work, tls=None, **options):
    """Run work(client, url) with a server that hands each socket to `handler`."""
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0, tls=tls) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(handler))
            async with HttpClient(trust_env=False, timeout=FOREVER, **options) as client:
                await work(client, f"http{'s' if tls else ''}://127.0.0.1:{server.local[1]}/")
                assert given_back(client)
            group.cancel()

    flowcoro.run(main())


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("status", [303, 413])
def test_an_answer_is_heard_though_the_server_reads_no_more(kind, status, tls, certificate):
    ended = []

    async def pieces():
        try:
            yield b"x"
            await flowcoro.sleep(FOREVER)
        finally:
            ended.append(1)

    async def handler(sock):
        await sock.read_until(b"\r\n\r\n")
        await sock.write(b"HTTP/1.1 100 Continue\r\n\r\n" + answer("no", f"{status} No"))
        await flowcoro.sleep(FOREVER)

    async def work(client, url):
        content = b"x" * 50_000_000 if kind == "bytes" else pieces()
        response = await client.post(url, content=content)
        assert (response.status, response.text) == (status, "no") and ended == [1] * (kind == "pieces")
        assert client.statistics()[url[:-1]]["idle"] == 0

    with_handler(handler, work, certificate.server if tls else None, verify=certificate.path)


def test_an_answer_of_success_may_come_while_the_content_still_goes():
    told = []

    async def pieces():
        for number in range(3):
            yield b"%d" % number
            await told.pop()

    async def handler(sock):
        for _ in range(2):
            await sock.read_until(b"\r\n\r\n")
            await sock.write(b"HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n")
            await sock.write(await sock.read_exactly(18))
            await sock.read_until(b"0\r\n\r\n")

    async def work(client, url):
        for _ in range(2):
            told.extend(flowcoro.sleep(0.01) for _ in range(3))
            assert (await client.post(url, content=pieces())).content == b"1\r\n0\r\n1\r\n1\r\n1\r\n2\r\n"
        assert client.statistics()[url[:-1]]["created"] == 1

    with_handler(handler, work)


def test_the_error_of_a_content_is_raised_as_it_is():
    async def pieces():
        yield b"x"
        raise KeyError("mine")

    async def work(client, url):
        with pytest.raises(KeyError, match="mine"):
            await client.post(url, content=pieces())

    with_handler(lambda sock: sock.read_until(b"\r\n\r\n\r\n"), work)


def test_random_answers_end_in_a_response_or_an_error_of_the_tree():
    source = random.Random(SEED)
    good = [answer(b"hello" * 10), OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", redirect("/x"),
            answer(gzip.compress(b"z" * 1000), "200 OK", "Content-Encoding: gzip", "Set-Cookie: a=b"),
            answer("", "401 x", 'WWW-Authenticate: Digest realm="r", nonce="n", qop="auth"')]

    async def handler(request):
        reply = bytearray(source.choice(good))
        changes = source.randrange(4)
        for _ in range(changes):
            at = source.randrange(len(reply))
            reply[at:at + source.randrange(3)] = source.randbytes(source.randrange(3))
        if not changes:
            return bytes(reply)
        await request.sock.write(reply)         # and its end, so that nothing has to be waited for

    async def work(client, origin):
        outcomes = {True: 0, False: 0}
        for number in range(400):
            try:
                response = await client.get(origin.url, timeout=5)
                outcomes[True] += isinstance(response.content, bytes)
            except RequestError:
                outcomes[False] += 1
            assert given_back(client)
        assert min(outcomes.values()) > 20, (SEED, outcomes)

    talk(handler, work, auth=DigestAuth("a", "b"), max_redirects=3)


# ---- cancellation ----------------------------------------------------------------------------------------------

def test_cancelled_anywhere_no_connection_stays_lent_and_none_is_used_half_way():
    source = random.Random(SEED)

    async def handler(request):
        await flowcoro.sleep(source.random() * 0.002)
        for piece in (OK + b"Content-Length: 40\r\n\r\n", request.target.encode().ljust(20), request.target.encode().ljust(20)):
            await request.sock.write(piece)
            await flowcoro.sleep(source.random() * 0.001)
        return b""

    async def work(client, origin):
        async def one(number):
            target = f"/{number}"
            with flowcoro.move_on_after(source.random() * 0.02):
                if number % 2:
                    response = await client.get(origin.url + target)
                    content = response.content
                else:
                    async with client.stream("POST", origin.url + target, content=[b"a", b"b"]) as response:
                        content = await response.read()
                assert content == target.encode().ljust(20) * 2
                done.append(number)

        done = []
        for start in range(0, 200, 10):
            async with flowcoro.TaskGroup() as group:
                for number in range(start, start + 10):
                    group.spawn(one(number))
            assert given_back(client)
        assert 10 < len(done) < 190, (SEED, len(done))

    talk(handler, work, max_connections=5)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("tls", [False, True])
def test_cancelled_at_each_point_nothing_is_left_and_the_next_request_is_answered(tls, workers, certificate):
    def handler(request):
        if request.target == "/away":
            return redirect("/there")
        return answer(f"{request.method} {request.target} {len(request.body)}" * 100, "200 OK", "Set-Cookie: a=b")

    async def main():
        async with serving(handler, tls=certificate.server if tls else None) as origin:
            def client():
                return HttpClient(base_url=origin.url, trust_env=False, verify=certificate.path)

            async def requests(one):
                await one.get("/one")
                await one.put("/two", content=[b"a", b"b"])
                async with one.stream("POST", "/away", content=b"x" * 100_000) as response:
                    assert await response.read() == b"GET /there 0" * 100

            async def alone():
                async with client() as one:
                    await requests(one)

            assert await at_each_point(alone) > 20

            async with client() as shared:
                number, cut = 0, True
                while cut:
                    number += 1
                    with flowcoro.CancelScope() as scope:
                        await cancelled_at(scope, number, requests(shared))
                    cut = scope.cancelled_caught
                    assert given_back(shared)
                    assert (await shared.get("/after")).text == "GET /after 0" * 100
                assert number > 10

    flowcoro.run(main(), workers=workers)


# ---- event streams ---------------------------------------------------------------------------------------------

EVENTS = (b"\xef\xbb\xbf: comment\r\ndata: one\r\ndata:two\r\revent: x\nid: 7\ndata\n\n"
          b"id: a\0b\nretry: 10\nretry: x\nunknown: y\n\n"
          b"data: \xc3\xbc\xff\n\ndata: unfinished")
PARSED = [ServerSentEvent("one\ntwo", "message", ""), ServerSentEvent("", "x", "7"), ServerSentEvent("ü\ufffd", "message", "7")]


def test_an_event_stream_is_parsed_the_same_however_it_is_split():
    source = random.Random(SEED)
    splits = [[EVENTS], [EVENTS[at:at + 1] for at in range(len(EVENTS))]]
    for _ in range(100):
        cuts = sorted(source.sample(range(1, len(EVENTS)), 5))
        splits.append([EVENTS[one:other] for one, other in zip([0, *cuts], [*cuts, len(EVENTS)])])
    for pieces in splits:
        parser = _EventParser(1000)
        assert [event for piece in pieces for event in parser.receive_data(piece)] == PARSED, (SEED, pieces)
        assert (parser.id, parser.retry) == ("7", 10)


@pytest.mark.parametrize("data", [b"data: " + b"x" * 2000, b"data: x\n" * 600, b"x" * 2000])
def test_an_event_has_a_limit(data):
    with pytest.raises(Exception, match="max_event=1000"):
        parser = _EventParser(1000)
        for at in range(len(data)):
            parser.receive_data(data[at:at + 1])


def stream_of(data, *lines):
    head = ["HTTP/1.1 200 OK", "Content-Type: text/event-stream; charset=utf-8", *lines, "Connection: close", "", ""]
    return "\r\n".join(head).encode() + data


def test_events_go_on_over_connections_with_the_last_id():
    async def work(client, origin):
        async with client.events(origin.url, headers={"X": "y"}) as events:
            assert [event.data async for event in events] == ["1", "2", "3"]
            assert events.last_event_id == "c"
        assert [request.headers.get("last-event-id") for request in origin.requests] == [None, "a", "a", "c"]
        assert {(request.headers["accept"], request.headers["x"]) for request in origin.requests} == {("text/event-stream", "y")}

    async def handler(request):
        reply = replies.pop(0)
        if reply is not None:
            await request.sock.write(reply)

    replies = [stream_of(b"retry: 5\nid: a\ndata: 1\n\ndata: lost"), answer("", "503 x"),
               stream_of(b"data: 2\n\nid: c\ndata: 3\n\n"),
               b"HTTP/1.1 204 No Content\r\n\r\n"]
    talk(handler, work)


@pytest.mark.parametrize("reply, error", [
    (answer("", "404 x"), StatusError), (answer("x", "200 OK", "Content-Type: text/html"), ResponseError),
    (answer("x"), ResponseError),
    (stream_of(b"data: " + b"x" * 2000), ResponseError)])
def test_what_is_no_event_stream_is_an_error(reply, error):
    async def work(client, origin):
        with pytest.raises(error):
            async with client.events(origin.url, max_event=1000) as events:
                async for _ in events:
                    pass
        assert len(origin.requests) == 1

    async def handler(request):
        await request.sock.write(reply)

    talk(handler, work)


def test_an_id_that_no_header_can_say_is_left_out():
    async def work(client, origin):
        async with client.events(origin.url) as events:
            assert [event.id async for event in events] == ["a\1", "ü"]
        assert [request.headers.get("last-event-id") for request in origin.requests] == [None, None, "\xc3\xbc"]

    async def handler(request):
        await request.sock.write(replies.pop(0))

    replies = [stream_of(b"retry: 1\nid: a\1\ndata: 1\n\n"), stream_of("id: ü\ndata: 2\n\n".encode()), b"HTTP/1.1 204 x\r\n\r\n"]
    talk(handler, work)


def test_an_event_stream_that_only_fails_gives_up_and_one_without_reconnecting_ends():
    async def work(client, origin):
        async with client.events(origin.url) as events:
            assert events.retry == 3.0
            events.retry = 0.0001
            with pytest.raises(TransferError, match="11 times"):
                await anext(events)
            with pytest.raises(StopAsyncIteration):
                await anext(events)
        assert len(origin.requests) == 11
        async with client.events(origin.url + "/x", reconnect=False) as events:
            assert [event.data async for event in events] == ["x"]

    async def handler(request):
        await request.sock.write(stream_of(b"data: x\n\n" if request.target == "/x" else b""))

    talk(handler, work)


# ---- a client of an app in the same process --------------------------------------------------------------------

def test_a_client_of_an_app_runs_it_while_it_is_open():
    app, log = HttpServer(), []
    app.on_startup(lambda: log.append("startup"))
    app.on_shutdown(lambda: log.append("shutdown"))

    @app.get("/hello/{name}")
    async def hello(request, name):
        return {"hello": name, "q": request.query.get("q"), "x": request.headers["x"]}

    @app.post("/echo")
    async def echo(request):
        return request.stream()

    async def main():
        client = app.test_client(headers={"X": "y"})
        with pytest.raises(RuntimeError, match="async with"):
            await client.get("/x")
        async with client:
            assert log == ["startup"]
            response = await client.get("/hello/me?q=1")
            assert response.json() == {"hello": "me", "q": "1", "x": "y"} and response.url == "http://testserver/hello/me?q=1"
            assert (await client.get("/none")).status == 404 and (await client.head("/hello/x")).content == b""
            async with client.stream("POST", "/echo", content=[b"ab", b"c"]) as response:
                assert await response.read() == b"abc"
            assert given_back(client) and client.statistics()["http://testserver:80"]["created"] == 1
        assert log == ["startup", "shutdown"]

    flowcoro.run(main())


def test_an_https_url_of_a_client_of_an_app_says_so_to_the_app():
    app = HttpServer()
    app.middleware(sessions(b"k" * 16))
    app.middleware(security_headers())

    @app.get("/")
    async def count(request):
        request.session["n"] = request.session.get("n", 0) + 1
        return [request.scheme, request.url, request.tls, request.session["n"]]

    async def main():
        async with app.test_client(base_url="https://testserver") as client:
            response = await client.get("/")
            assert response.json() == ["https", "https://testserver/", None, 1]
            assert "strict-transport-security" in response.headers
            assert (await client.get("/")).json()[3] == 2               # the cookie, which is for TLS alone, comes back
            response = await client.get("http://testserver/")
            assert response.json() == ["http", "http://testserver/", None, 1]
            assert "strict-transport-security" not in response.headers

    flowcoro.run(main())


def test_a_handler_that_never_ends_does_not_keep_the_client_open():
    app = HttpServer()

    @app.get("/")
    async def stay(request):
        await flowcoro.sleep(FOREVER)

    async def main():
        async with app.test_client() as client:
            with pytest.raises(RequestTimeout):
                await client.get("/", timeout=0.05)
            with flowcoro.move_on_after(0.05):
                await client.get("/")

    flowcoro.run(main())
