"""HttpClient against servers that others have written: nginx and Python's own; and next to http.client where that is right."""

import contextlib
import http.client
import http.server
import io
import os
import shutil
import socket
import subprocess
import threading
import time

import pytest

import flowcoro
from flowcoro_http import DigestAuth, HttpClient, RequestError, Timeouts, TransferError
from test_http_client import answer, given_back, talk


NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")

PLAIN = {"Accept-Encoding": "identity"}

CONFIGURATION = """\
daemon off; worker_processes 1; pid pid; error_log error.log crit; user root root;
events { worker_connections 256; }
http {
    access_log off; client_body_temp_path b; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
    default_type text/plain; gzip on; gzip_min_length 100; gzip_types *; etag on;
    server {
        listen unix:nginx.sock;
        root files; client_max_body_size 100k; keepalive_timeout 60s; keepalive_requests 1000;
        location = /hello { return 200 "hello"; }
        location = /few { keepalive_timeout 0; return 200 "few"; }
        location = /echo { client_max_body_size 10m; proxy_pass http://unix:nginx.sock:/dump; }
        location = /dump { client_max_body_size 10m; return 200 "$request_method $content_length $http_x"; }
        location = /away { return 302 http://$http_host/hello; }
        location = /private { auth_basic "here"; auth_basic_user_file passwords; try_files /small =404; }
        location = /empty { return 204; }
        location = /slow { limit_rate 1000; try_files /large =404; }
    }
}
"""


def listens(path):
    """Whether somebody listens on a Unix socket: its file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


@pytest.fixture(scope="module")
def nginx(tmp_path_factory):
    """A folder where nginx serves `files` at the Unix socket nginx.sock."""
    if NGINX is None:
        pytest.skip("nginx, which is the origin here, is not installed")
    folder = tmp_path_factory.mktemp("n")
    (folder / "files").mkdir()
    (folder / "files" / "small").write_bytes(b"small")
    (folder / "files" / "large").write_bytes(bytes(range(256)) * 40_000)
    (folder / "files" / "text").write_bytes(b"the same again " * 10_000)
    (folder / "passwords").write_text("me:{PLAIN}pass\n")
    (folder / "nginx.conf").write_text(CONFIGURATION.replace("nginx.sock", str(folder / "nginx.sock")))
    with subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")], stderr=subprocess.PIPE) as program:
        try:
            deadline = time.monotonic() + 30
            while not listens(folder / "nginx.sock"):
                assert program.poll() is None and time.monotonic() < deadline, program.stderr.read()
                time.sleep(0.01)
            yield folder
        finally:
            program.terminate()


def with_nginx(folder, work, **options):
    async def main():
        async with HttpClient(unix=str(folder / "nginx.sock"), base_url="http://origin.test", trust_env=False,
                              **options) as client:
            await work(client)
            assert given_back(client)
            return client.statistics()["http://origin.test:80"]

    return flowcoro.run(main())


def test_nginx_keeps_connections_and_closes_them(nginx):
    async def work(client):
        for _ in range(50):
            assert (await client.get("/hello")).text == "hello"
        for _ in range(3):
            assert (await client.get("/few")).text == "few"
        assert (await client.head("/large", headers=PLAIN)).headers["content-length"] == "10240000"
        assert (await client.get("/empty")).status == 204

    assert with_nginx(nginx, work)["created"] == 4


def test_nginx_sends_files_ranges_and_compressed_ones(nginx):
    async def work(client):
        whole = (nginx / "files" / "large").read_bytes()
        told = []
        response = await client.get("/large", progress=lambda done, of: told.append((done, of)), headers=PLAIN)
        assert response.content == whole and told[-1] == (len(whole), len(whole))
        response = await client.get("/text")
        assert response.headers["content-encoding"] == "gzip" and response.headers["transfer-encoding"] == "chunked"
        assert response.text == "the same again " * 10_000
        async with client.stream("GET", "/text") as response:
            assert (await response.read()).decode() == "the same again " * 10_000
        tag = (await client.head("/large", headers=PLAIN)).headers["etag"]
        response = await client.get("/large", headers={"Range": "bytes=100-199", "If-Range": tag, **PLAIN})
        assert (response.status, response.content) == (206, whole[100:200])
        response = await client.get("/large", headers={"If-None-Match": tag})
        assert (response.status, response.content) == (304, b"")
        async with client.stream("GET", "/large") as response:
            await anext(response)

    assert with_nginx(nginx, work)["created"] == 1


def test_nginx_takes_contents_and_refuses_large_ones(nginx):
    async def pieces():
        for _ in range(10):
            yield b"x" * 100_000

    async def work(client):
        assert (await client.post("/echo", content=b"x" * 1_000_000, headers={"X": "y"})).text == "POST 1000000 y"
        assert (await client.post("/echo", content=pieces())).text == "POST 1000000 "
        try:
            assert (await client.post("/hello", content=b"x" * 5_000_000)).status == 413
        except TransferError:               # a reset may come before the answer is read
            pass

    with_nginx(nginx, work)


def test_nginx_redirects_and_asks_for_a_password(nginx):
    async def work(client):
        response = await client.get("/away")
        assert response.text == "hello" and response.history[0].status == 302 and response.url == "http://origin.test/hello"
        assert (await client.get("/private")).status == 401
        assert (await client.get("/private", auth=("me", "wrong"))).status == 401
        assert (await client.get("/private", auth=("me", "pass"))).text == "small"
        assert (await client.get("/private",
                                 auth=DigestAuth("me", "pass"))).status == 401, "it asks for basic: not with DigestAuth"
        assert (await client.get("/none")).status == 404

    with_nginx(nginx, work)


def test_many_tasks_and_a_part_of_them_cancelled(nginx):
    async def work(client):
        async def one(number):
            with flowcoro.move_on_after(0.001 * (number % 7)):
                response = await client.get("/large" if number % 3 else "/hello", headers=PLAIN)
                assert len(response.content) == (10_240_000 if number % 3 else 5)

        async with flowcoro.TaskGroup() as group:
            for number in range(64):
                group.spawn(one(number))
        assert (await client.get("/hello")).text == "hello"

    with_nginx(nginx, work, max_connections=8)


def test_nginx_is_slow(nginx):
    async def work(client):
        with pytest.raises(RequestError, match="total"):
            await client.get("/slow", timeout=Timeouts(total=0.2))

    with_nginx(nginx, work)


# ---- Python's own ----------------------------------------------------------------------------------------------

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        content = f"{self.command} {self.path} {len(body)} {self.headers.get('X', '')}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Set-Cookie", "a=b")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET


@contextlib.contextmanager
def python_server(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *args: None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_the_server_of_the_standard_library(version):
    class Its(Handler):
        protocol_version = version

    async def main(url):
        async with HttpClient(base_url=url, trust_env=False) as client:
            for _ in range(3):
                assert (await client.get("/a?b")).text == "GET /a?b 0 "
            assert (await client.post("/p", content=b"x" * 100_000, headers={"X": "y"})).text == "POST /p 100000 y"
            assert (await client.put("/p", content=[b"ab", b"c"])).text == "PUT /p 3 "
            assert (await client.put("/p", content=io.BytesIO(b"abcd"))).text == "PUT /p 4 "
            assert (await client.head("/")).content == b"" and (await client.delete("/d")).text == "DELETE /d 0 "
            assert [cookie.name for cookie in client.cookies] == ["a"]
            numbers = client.statistics()[url]
            assert given_back(client) and numbers["created"] == (1 if version == "HTTP/1.1" else 8)

    with python_server(Its) as url:
        flowcoro.run(main(url))


def test_files_of_simple_http_request_handler(tmp_path):
    (tmp_path / "ü b.txt").write_bytes(b"content")

    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    async def main(url):
        async with HttpClient(base_url=url, trust_env=False) as client:
            assert (await client.get("/ü b.txt")).text == "content" and (await client.get("/none")).status == 404
            assert "ü b.txt" in (await client.get("/")).text

    with python_server(Files) as url:
        flowcoro.run(main(url))


REPLIES = [
    answer("plain"), answer(""), answer("a", "404 Not Found", "X: 1", "X: 2", "Y:   spaces"),
    b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end", b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n",
    b"HTTP/1.1 299 \r\nContent-Length: 1\r\n\r\nx",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n006;ext=1\r\n world\r\n0\r\nX-Trailer: x\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n",
    b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"z" * 300_000,
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-High: \xe4\xff\r\n\r\nok"]
CUT = [answer("cut")[:-1], b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", b"", b"HTTP/1.1 200 OK\r\nX: y\r\n"]


@pytest.mark.parametrize("reply", REPLIES)
def test_it_reads_what_http_client_reads(reply):
    def ask(port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            response = connection.getresponse()
            return response.status, response.reason, response.getheaders(), response.read()

    async def handler(request):
        await request.sock.write(reply)

    async def work(client, origin):
        theirs = await flowcoro.to_thread(ask, origin.port)
        response = await client.get(origin.url)
        assert (response.status, response.reason, response.headers.items(), response.content) == theirs

    talk(handler, work)


@pytest.mark.parametrize("reply", CUT)
def test_what_is_cut_short_is_an_error(reply):
    async def handler(request):
        await request.sock.write(reply)

    async def work(client, origin):
        with pytest.raises(TransferError):
            await client.get(origin.url)

    talk(handler, work)
