"""The server against what others have written: curl, Python's own clients, wrk, ab, a browser."""

import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import ssl
import urllib.error
import urllib.parse
import urllib.request

import pytest

import flowcoro
import flowcoro_cli
import flowcoro_http
from flowcoro_http import FormFile, HttpError, HttpServer, Response
from flowcoro_os import run_process
from test_net import PATIENCE, nothing_is_left_behind, run  # noqa: F401  (a fixture)
from test_net_tls import OPENSSL, certificates  # noqa: F401  (a fixture)

needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="the openssl command, which makes the certificates, is not installed")


def needs(program):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


# ---- the server, and how programs are run ----------------------------------------------------------------------

def application():
    app = HttpServer()

    @app.get("/hello")
    async def hello(request):
        return "hello"

    @app.get("/who")
    async def who(request):
        return {"port": request.client[1], "version": request.version, "tls": request.tls, "scheme": request.scheme,
                "query": request.query.items(), "cookies": request.cookies}

    @app.route("/upload", ["POST", "PUT"])
    async def upload(request):
        digest, size = hashlib.sha256(), 0
        async for data in request.stream():
            digest.update(data)
            size += len(data)
        return {"size": size, "sha256": digest.hexdigest(), "length": request.headers.get("content-length"),
                "coding": request.headers.get("transfer-encoding"), "expect": request.headers.get("expect")}

    @app.post("/refused")
    async def refused(request):
        raise HttpError(403, "not from you")

    @app.post("/form")
    async def form(request):
        return [[name, [value.filename, value.media_type, value.size, (await value.read()).hex()]
                 if isinstance(value, FormFile) else value] for name, value in (await request.form()).items()]

    @app.get("/stream")
    async def stream(request):
        async def pieces():
            for number in range(100):
                yield f"line {number}\n"
        return pieces()

    @app.get("/old")
    async def old(request):
        response = Response.redirect("/who?from=old", 302)
        response.set_cookie("visited", "yes")
        return response

    @app.delete("/hello")
    async def nothing(request):
        return None

    return app


STREAMED = "".join(f"line {number}\n" for number in range(100)).encode()


@contextlib.asynccontextmanager
async def served(app, **options):
    """The application on a free port; nobody is connected, and no handler has failed, when the block has ended."""
    async with await app.listen("127.0.0.1", 0, **options) as server, flowcoro.TaskGroup() as group:
        serving = group.spawn(server.serve())
        yield server
        server.close()
        await serving
        counts = server.statistics()
        assert counts["connections"] == counts["failed"] == counts["refused"] == counts["handshakes_failed"] == 0


async def program(*arguments, input=None, home=None):
    """Run a program that must succeed: (its output, what it says on stderr)."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home or "/nonexistent"), "LC_ALL": "C"}
    done = await run_process(arguments, input=input, env=environment, timeout=PATIENCE, group=True)
    assert done.returncode == 0, f"{arguments} exits with {done.returncode}: {done.stderr.decode(errors='replace')}"
    return done.stdout, done.stderr.decode(errors="replace")


def curl(*arguments, **more):
    """Run curl, without what the machine's settings say."""
    return program("curl", "-q", "-sS", "--noproxy", "*", "--max-time", str(PATIENCE), *arguments, **more)


def answers(main, *args):
    """Run `main(server, *args)` while the application is served; what it returns."""
    async def session():
        async with served(application()) as server:
            return await main(server, *args)

    return run(session)


# ---- curl ------------------------------------------------------------------------------------------------------

@needs("curl")
def test_curl_asks_twice_on_one_connection():
    async def main(server):
        written, _ = await curl("-w", "\\n%{num_connects} %{http_code} %{http_version}\\n", server.url + "/who?a=1&b=%C3%A4+c",
                                server.url + "/who", "-b", "x=1; y=2")
        assert server.statistics()["accepted"] == 1
        return written.decode().splitlines()

    first, code, second, code_again = answers(main)
    first, second = json.loads(first), json.loads(second)
    assert code == "1 200 1.1" and code_again == "0 200 1.1"            # one connect, then none
    assert first["port"] == second["port"] and first["cookies"] == {"x": "1", "y": "2"}
    assert first["query"] == [["a", "1"], ["b", "ä c"]] and first["scheme"] == "http" and first["tls"] is None


@needs("curl")
def test_curl_is_told_to_continue_when_the_handler_reads_and_sends_nothing_to_one_that_does_not():
    async def main(server):
        expecting = ["-v", "-H", "Expect: 100-continue", "--expect100-timeout", str(PATIENCE), "--data-binary", "x" * 1000]
        written, said = await curl(*expecting, server.url + "/upload")
        found = json.loads(written)
        assert found["size"] == 1000 and found["expect"] == "100-continue"
        lines = [line for line in said.splitlines() if line.startswith(("> POST", "< HTTP/"))]
        assert lines == ["> POST /upload HTTP/1.1", "< HTTP/1.1 100 Continue", "< HTTP/1.1 200 OK"]

        written, said = await curl(*expecting, "-w", "\\n%{size_upload}", server.url + "/refused")
        assert written == b"not from you\n0" and "100 Continue" not in said and "< HTTP/1.1 403 Forbidden" in said

    answers(main)


@needs("curl")
def test_curl_uploads_in_chunks_what_it_does_not_know_the_length_of():
    data = os.urandom(300_000)

    async def main(server):
        written, _ = await curl("-T", "-", server.url + "/upload", input=data)
        return json.loads(written)

    found = answers(main)
    assert found == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "length": None, "coding": "chunked",
                     "expect": found["expect"]}


@needs("curl")
def test_curl_uploads_five_megabytes_and_goes_on_with_the_connection(tmp_path):
    data = os.urandom(5 << 20)
    (tmp_path / "file").write_bytes(data)

    async def main(server):
        written, _ = await curl("--http1.1", "-w", "\\n%{num_connects}\\n", "-T", str(tmp_path / "file"), server.url + "/upload",
                                "--next", "-sS", "-w", "\\n%{num_connects}\\n", server.url + "/hello")
        return written.decode().splitlines()

    found, connects, *rest = answers(main)
    assert json.loads(found) | {"expect": None} == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(),
                                                    "length": str(len(data)), "coding": None, "expect": None}
    assert [connects, *rest] == ["1", "hello", "0"]


@needs("curl")
def test_curl_speaks_http_1_0_and_reads_a_stream_to_the_end_of_the_connection():
    async def main(server):
        written, said = await curl("-0", "-v", server.url + "/stream")
        assert written == STREAMED
        assert not re.search("(?im)^< (transfer-encoding|content-length)", said) and "< Connection: close" in said
        written, said = await curl("-0", "-v", server.url + "/who")
        assert json.loads(written)["version"] == "1.0"
        written, said = await curl("-v", server.url + "/stream")
        assert written == STREAMED and re.search("(?im)^< transfer-encoding: chunked", said)

    answers(main)


@needs("curl")
def test_curl_asks_for_the_head_and_for_what_is_not_there():
    async def main(server):
        written, _ = await curl("-I", server.url + "/hello", server.url + "/stream", "-w", "%{num_connects}\\n")
        head, connects, stream, again, _ = re.split(r"\r\n\r\n|(?<=\d)\n", written.decode())
        assert head.startswith("HTTP/1.1 200 OK\r\n") and "\r\nContent-Length: 5" in head and (connects, again) == ("1", "0")
        assert stream.startswith("HTTP/1.1 200 OK\r\n") and "Content-Length" not in stream
        for path, method, status in ("/nowhere", "GET", "404"), ("/upload", "DELETE", "405"), ("/hello", "OPTIONS", "204"), (
                "/hello", "DELETE", "204"):
            written, _ = await curl("-X", method, "-o", "/dev/null", "-w", "%{http_code}", server.url + path)
            assert written.decode() == status

    answers(main)


@needs("curl")
def test_curl_sends_forms_of_both_kinds_and_a_file(tmp_path):
    data = bytes(range(256)) * 10
    (tmp_path / "a file.bin").write_bytes(data)

    async def main(server):
        written, _ = await curl("-d", "name=Ada", "--data-urlencode", "words=a & b = ü", server.url + "/form")
        assert json.loads(written) == [["name", "Ada"], ["words", "a & b = ü"]]
        written, _ = await curl("-F", "name=Ada ü", "-F", f"file=@{tmp_path / 'a file.bin'};type=image/png", "-F",
                                "note=<-", server.url + "/form", input=b"two\r\nlines")
        assert json.loads(written) == [["name", "Ada ü"], ["file", ["a file.bin", "image/png", len(data), data.hex()]],
                                       ["note", "two\r\nlines"]]

    answers(main)


@needs("curl")
def test_curl_follows_a_redirect_with_the_cookie_it_was_given():
    async def main(server):
        written, _ = await curl("-L", "-c", "-", "-b", "", server.url + "/old")
        found, _, jar = written.decode().partition("#")
        assert json.loads(found)["query"] == [["from", "old"]] and json.loads(found)["cookies"] == {"visited": "yes"}
        assert "visited\tyes" in jar

    answers(main)


@needs("curl")
@needs_openssl
def test_curl_speaks_tls_with_a_server_it_trusts(certificates):  # noqa: F811
    async def main():
        async with served(application(), tls=certificates.good) as server:
            written, said = await curl("-v", "--cacert", certificates.ca, server.url + "/who", server.url + "/stream")
            assert written.endswith(STREAMED) and "ALPN: server accepted http/1.1" in said
            found = json.loads(written.removesuffix(STREAMED))
            assert found["scheme"] == "https" and found["tls"] == "TLSv1.3"
            data = os.urandom(300_000)
            old = "--tls-max", "1.2", "--cacert", certificates.ca
            written, _ = await curl(*old, "-T", "-", server.url + "/upload", input=data)
            assert json.loads(written)["sha256"] == hashlib.sha256(data).hexdigest()
            assert server.statistics()["accepted"] == 2

    run(main)


@needs("curl")
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_curl_undoes_the_compression_of_answers_and_of_streams(coding):
    async def main():
        app = application()
        app.middleware(flowcoro_http.compress())

        @app.get("/large")
        async def large(request):
            return "the same words again " * 10_000

        @app.get("/lines")
        async def lines(request):
            async def pieces():
                for line in STREAMED.splitlines(keepends=True):
                    yield line
            return Response(200, pieces(), media_type="text/plain")

        async with served(app) as server:
            written, said = await curl("-v", "--compressed", "-H", f"Accept-Encoding: {coding}", "-w", "\\n%{size_download}\\n",
                                       server.url + "/large", server.url + "/lines")
        large, size, *lines, end, _ = written.decode().split("\n")
        assert large == "the same words again " * 10_000 and int(size) < 2_000
        assert lines == STREAMED.decode().split("\n") and end.isdigit()
        assert re.findall("(?im)^< content-encoding: (\\w+)", said) == [coding, coding]

    run(main)


@needs("curl")
def test_curl_keeps_what_has_not_changed_and_says_who_it_is(tmp_path):
    async def main():
        app = application()
        app.middleware(flowcoro_http.basic_auth(lambda user, password: (user, password) == ("ada", "tea: hot")))
        app.middleware(flowcoro_http.etag())
        async with served(app) as server:
            status = "-o", "/dev/null", "-w", "%{http_code} "
            written, _ = await curl(*status, server.url + "/hello", "--next", "-sS", *status, "-u", "ada:tea",
                                    server.url + "/hello")
            assert written == b"401 401 "
            tag = str(tmp_path / "tag")
            written, _ = await curl(*status, "-u", "ada:tea: hot", "--etag-save", tag, server.url + "/hello", "--next", "-sS",
                                    *status, "-u", "ada:tea: hot", "--etag-compare", tag, server.url + "/hello")
            assert written == b"200 304 "

    run(main)


# ---- Python's own ----------------------------------------------------------------------------------------------

def test_http_client_sends_many_requests_over_one_connection():
    def talk(host, port):
        connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
        with contextlib.closing(connection):
            def ask(method, path, body=None, headers={}, **options):
                connection.request(method, path, body, headers, **options)
                with connection.getresponse() as response:
                    return response.status, response.headers, response.read()

            assert ask("GET", "/hello")[::2] == (200, b"hello")
            status, headers, content = ask("HEAD", "/hello")
            assert (status, headers["Content-Length"], content) == (200, "5", b"")
            assert ask("DELETE", "/hello")[::2] == (204, b"")
            assert ask("GET", "/stream")[::2] == (200, STREAMED)
            assert ask("GET", "/nowhere")[0] == 404
            found = json.loads(ask("POST", "/upload", iter([b"one", b"two" * 30_000]), encode_chunked=True)[2])
            assert found["size"] == 90_003 and found["coding"] == "chunked"
            found = json.loads(ask("PUT", "/upload", io.BytesIO(b"x" * 200_000), {"Content-Length": "200000"})[2])
            assert found["size"] == 200_000 and found["length"] == "200000"
            assert ask("POST", "/refused", b"x" * 100_000)[::2] == (403, b"not from you")
            ports = {json.loads(ask("GET", "/who")[2])["port"] for _ in range(20)}
            assert ports == {connection.sock.getsockname()[1]}

    async def main(server):
        await flowcoro.to_thread(talk, *server.local)
        assert server.statistics()["accepted"] == 1

    answers(main)


@needs_openssl
def test_urllib_gets_posts_and_follows_over_tls(certificates):  # noqa: F811
    def talk(url):
        context = ssl.create_default_context(cafile=certificates.ca)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context),
                                             urllib.request.HTTPCookieProcessor())

        def ask(path, data=None):
            with opener.open(url + path, data, timeout=PATIENCE) as response:
                return response.url, response.read()

        assert ask("/stream") == (url + "/stream", STREAMED)
        final, content = ask("/old")
        assert final == url + "/who?from=old" and json.loads(content)["cookies"] == {"visited": "yes"}
        assert json.loads(ask("/form", urllib.parse.urlencode({"a": "1 & 2"}).encode())[1]) == [["a", "1 & 2"]]
        with pytest.raises(urllib.error.HTTPError, match="404") as caught:
            ask("/nowhere")
        assert caught.value.read() == b"there is no /nowhere"
        caught.value.close()

    async def main():
        async with served(application(), tls=certificates.good) as server:
            await flowcoro.to_thread(talk, server.url)

    run(main)


# ---- load ------------------------------------------------------------------------------------------------------

@needs("wrk")
def test_wrk_finds_no_fault_in_a_second_of_load():
    async def main(server):
        written, _ = await program("wrk", "-t1", "-c32", "-d1s", server.url + "/hello")
        return written.decode()

    written = answers(main)
    assert "Socket errors" not in written and "Non-2xx" not in written, written
    assert int(re.search(r"(\d+) requests in", written)[1]) > 0


@needs("ab")
@pytest.mark.parametrize("options", [["-k"], []], ids=["keep-alive", "a connection each"])
def test_ab_has_all_its_requests_answered(options):
    async def main(server):
        written, _ = await program("ab", "-q", "-n", "1000", "-c", "20", *options, server.url + "/hello")
        return written.decode(), server.statistics()["accepted"]

    written, accepted = answers(main)
    found = dict(re.findall(r"^([\w -]+): +(\d+)", written, re.MULTILINE))
    assert (found["Complete requests"], found["Failed requests"]) == ("1000", "0") and "Non-2xx" not in written
    assert found.get("Keep-Alive requests") == ("1000" if options else None)
    assert accepted == 20 if options else accepted >= 1000


# ---- a browser -------------------------------------------------------------------------------------------------

# A browser that is to dump a page does so when all of it has been loaded: an image, which is answered when the page says that it
# is ready, and a script that says it when both the answer to its fetch() and an event have been shown.
WATCH = b"""<img src="/ready"><script>
const watch = setInterval(() => {
    if ([...document.querySelectorAll("b")].every(one => one.textContent != "?")) {
        clearInterval(watch);
        fetch("/ready", {method: "POST"});
    }
}, 10);
</script>"""


@needs("chromium")
@needs_openssl
def test_a_browser_shows_the_page_of_the_demo_with_its_data_and_its_events(certificates, tmp_path):  # noqa: F811
    async def main():
        app, ready, paths = flowcoro_cli._teahouse(flowcoro_http, 10.0), flowcoro.Event(), []

        @app.middleware
        async def watch(request, call_next):
            paths.append(request.path)
            response = await call_next(request)
            if request.path == "/":
                response.content += WATCH
            return response

        @app.route("/ready", ["GET", "POST"])
        async def become_ready(request):
            if request.method == "POST":
                ready.set()
            await ready.wait()

        async with served(app, tls=certificates.good) as server:
            page, _ = await program(
                "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--ignore-certificate-errors", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", server.url + "/",
                home=tmp_path)
        return page.decode(), paths

    page, paths = run(main)
    assert '<b id="tea">Oolong</b>' in page and re.search(r'<b id="asked">[1-9]\d*</b>', page), page
    assert sorted(set(paths) - {"/favicon.ico"}) == ["/", "/events", "/ready", "/teas/3"]
