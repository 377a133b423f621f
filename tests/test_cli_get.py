"""`python -m flowcoro get`: what it prints and writes, how it goes on, and what its exit status says."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import pty
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import types

import pytest

import flowcoro_cli
from test_cli import ROOT, environment
from test_net_tls import certificates  # noqa: F401  (a fixture)

CONTENT = bytes(range(256)) * 2000
ETAG = '"' + hashlib.sha256(CONTENT).hexdigest() + '"'


class Handler(http.server.BaseHTTPRequestHandler):
    """The standard library's server: /file knows ranges, /cut ends in the middle, /echo says what came."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b""
        self.server.seen.append(types.SimpleNamespace(command=self.command, path=self.path, headers=self.headers, body=body))
        getattr(self, "at_" + self.path.strip("/").partition("?")[0].replace(".", "_"), self.at_nowhere)(body)

    do_POST = do_PUT = do_HEAD = do_GET

    def answer(self, status, content, *headers):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def at_nowhere(self, body):
        self.answer(404, b"nowhere\n")

    def at_hello_txt(self, body):
        self.answer(200, b"hello\n", ("Content-Type", "text/plain"))

    def at_binary(self, body):
        self.answer(200, b"a\0b")

    def at_echo(self, body):
        self.answer(200, json.dumps({"method": self.command, "body": body.decode(), "headers": dict(self.headers)}).encode())

    def at_away(self, body):
        self.answer(302, b"", ("Location", "/hello.txt"))

    def at_round(self, body):
        self.answer(302, b"", ("Location", "/round"))

    def at_file(self, body):
        start = self.headers.get("Range")
        if start is None or self.server.conditional and self.headers.get("If-Range") not in (None, self.server.etag):
            return self.answer(200, CONTENT, ("ETag", self.server.etag))
        start = int(start.removeprefix("bytes=").removesuffix("-"))
        if start >= len(CONTENT):
            return self.answer(416, b"", ("ETag", self.server.etag), ("Content-Range", f"bytes */{len(CONTENT)}"))
        end = min(len(CONTENT), start + self.server.most)
        said = self.server.said or f"bytes {start}-{end - 1}/{len(CONTENT)}"
        self.answer(206, CONTENT[start:end], ("ETag", self.server.etag), ("Content-Range", said))

    def at_part(self, body):
        self.send_response(206)
        for header in ("Content-Length", "1000"), ("Content-Range", "bytes 100-1099/5000"), ("ETag", self.server.etag):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(CONTENT[:100])
        self.close_connection = True

    def at_packed(self, body):
        self.answer(200, gzip.compress(b"hello"), ("Content-Encoding", "x-gzip"))

    def at_same(self, body):
        self.send_response(304)
        self.end_headers()

    def at_cut(self, body):
        if "Range" in self.headers or self.server.whole:
            return self.at_file(body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        self.wfile.write(CONTENT[:100_000])
        self.close_connection = True


@pytest.fixture
def origin():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None            # who cuts a connection is no surprise here
    server.seen, server.etag, server.said, server.whole = [], ETAG, None, False
    server.conditional, server.most = True, len(CONTENT)
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def get(monkeypatch, capsysbinary, tmp_path):
    """get("URL", …) in an empty folder -> (exit status, stdout as bytes, stderr as text)."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments):
        capsysbinary.readouterr()
        status = flowcoro_cli.main(["get", *map(str, arguments)])
        out, err = capsysbinary.readouterr()
        return status, out, err.decode()
    return call


def files():
    return sorted(os.listdir("."))


def test_it_prints_what_is_there(get, origin):
    assert get(origin.url + "/hello.txt") == (0, b"hello\n", "")
    assert get(origin.url.removeprefix("http://") + "/hello.txt") == (0, b"hello\n", "")
    assert get(origin.url + "/away", "-L") == (0, b"hello\n", "")
    assert origin.seen[0].headers["Accept-Encoding"] == "identity"


def test_headers_are_printed_too(get, origin):
    status, out, _ = get(origin.url + "/away", "-i")
    assert status == 0 and b"HTTP/1.1 200 OK\r\n" in out
    assert out.startswith(b"HTTP/1.1 302 Found\r\n") and out.endswith(b"\r\n\r\nhello\n")
    status, out, _ = get(origin.url + "/away", "-i", "--no-location")
    assert status == 0 and b"200 OK" not in out and b"Location: /hello.txt\r\n" in out
    status, out, _ = get(origin.url + "/hello.txt", "-I")
    assert status == 0 and b"Content-Length: 6\r\n" in out and out.endswith(b"\r\n\r\n") and origin.seen[-1].command == "HEAD"


def test_data_headers_method_and_user(get, origin, tmp_path):
    (tmp_path / "data").write_bytes(b"c=3\r\n\n")
    said = json.loads(get(origin.url + "/echo", "-d", "a=1", "-d", "b=ü", "-d", f"@{tmp_path / 'data'}", "-H", "X-Y: z", "-u",
                          "me:pass")[1])
    assert (said["method"], said["body"]) == ("POST", "a=1&b=ü&c=3")
    assert said["headers"]["X-Y"] == "z" and said["headers"]["Authorization"] == "Basic bWU6cGFzcw=="
    assert said["headers"]["Content-Type"] == "application/x-www-form-urlencoded"
    said = json.loads(get(origin.url + "/echo", "-X", "PUT", "-d", "{}", "-H", "content-type: application/json", "-H",
                          "User-Agent: me")[1])
    assert (said["method"], said["headers"]["content-type"], said["headers"]["User-Agent"]) == ("PUT", "application/json", "me")


def test_a_file_has_its_name_when_all_has_come(get, origin):
    assert get(origin.url + "/file", "-o", "f.bin") == (0, b"", "")
    with open("f.bin", "rb") as file:
        assert file.read() == CONTENT
    assert files() == ["f.bin"]
    assert get(origin.url + "/hello.txt?x=/y", "-O")[0] == 0 and files() == ["f.bin", "hello.txt"]
    assert get(origin.url + "/hello.txt", "-o", "/dev/null") == (0, b"", "")
    assert get(origin.url + "/hello.txt", "-o", "-") == (0, b"hello\n", "")


@pytest.mark.parametrize("arguments, message", [
    (["-O"], "does not end with a name"), (["-C"], "-o FILE or -O"), (["-H", "x"], "Name: value"), (["-d", "@none"], "-d @none"),
    (["-m", "0"], "more than 0"), (["-o", "folder"], "is a folder"), (["--no-such"], "usage"),
    (["-o", "taken"], "--force overwrites it")])
def test_a_command_line_that_cannot_be_obeyed(get, origin, arguments, message):
    os.mkdir("folder")
    with open("taken", "w") as file:
        file.write("mine")
    status, out, err = get(origin.url, *arguments)
    assert (status, out) == (2, b"") and message in err and origin.seen == []
    with open("taken") as file:
        assert file.read() == "mine"


def test_a_file_is_overwritten_only_by_force_and_only_by_a_whole_one(get, origin):
    with open("f", "w") as file:
        file.write("mine")
    assert get(origin.url + "/cut", "-o", "f", "--force")[0] == 18
    with open("f") as file:
        assert file.read() == "mine"
    assert get(origin.url + "/hello.txt", "-o", "f", "--force")[0] == 0
    with open("f") as file:
        assert file.read() == "hello\n"
    assert files() == ["f"]


def test_the_status_of_an_error_is_22_and_its_page_no_file(get, origin):
    status, out, err = get(origin.url + "/none")
    assert (status, out) == (22, b"nowhere\n") and "404 Not Found" in err
    assert get(origin.url + "/none", "-o", "f")[:2] == (22, b"") and files() == []


def test_an_interrupted_transfer_goes_on(get, origin):
    status, _, err = get(origin.url + "/cut", "-o", "f")
    assert status == 18 and "f.part has 100000 bytes, -C goes on" in err and files() == ["f.part", "f.part.info"]
    status, _, err = get(origin.url + "/cut", "-o", "f")
    assert status == 2 and "-C goes on with it, --force begins anew" in err
    assert get(origin.url + "/cut", "-o", "f", "-C") == (0, b"", "")
    assert origin.seen[-1].headers["Range"] == "bytes=100000-" and origin.seen[-1].headers["If-Range"] == ETAG
    with open("f", "rb") as file:
        assert file.read() == CONTENT
    assert files() == ["f"]


def test_what_has_changed_meanwhile_is_fetched_anew(get, origin):
    get(origin.url + "/cut", "-o", "f")
    origin.etag = '"other"'
    assert get(origin.url + "/cut", "-o", "f", "-C")[0] == 0
    with open("f", "rb") as file:
        assert file.read() == CONTENT


def test_a_part_that_is_whole_already_is_done(get, origin):
    get(origin.url + "/cut", "-o", "f")
    with open("f.part", "wb") as file:
        file.write(CONTENT)
    assert get(origin.url + "/cut", "-o", "f", "-C")[0] == 0 and files() == ["f"]


@pytest.mark.parametrize("said", ["bytes 5-9/10", "bytes", "", "bytes 1_00000-511999/512000"])
def test_a_server_that_sends_another_part_is_refused(get, origin, said):
    get(origin.url + "/cut", "-o", "f")
    origin.said = said or "x"
    status, _, err = get(origin.url + "/cut", "-o", "f", "-C")
    assert status == 33 and os.path.getsize("f.part") == 100_000


def test_halves_of_two_versions_are_not_joined_though_the_server_does_not_know_if_range(get, origin):
    get(origin.url + "/cut", "-o", "f")
    origin.etag, origin.conditional = '"new"', False
    status, _, err = get(origin.url + "/cut", "-o", "f", "-C")
    assert status == 33 and "has changed" in err and os.path.getsize("f.part") == 100_000
    with open("f.part", "ab") as file:
        file.write(CONTENT[100_000:])           # nothing is missing, and it is another version
    assert get(origin.url + "/cut", "-o", "f", "-C")[0] == 22 and files() == ["f.part", "f.part.info"]
    origin.whole = True
    assert get(origin.url + "/cut", "-o", "f", "--force")[0] == 0 and files() == ["f"] and os.path.getsize("f") == len(CONTENT)


def test_a_server_that_sends_less_than_what_follows_is_asked_again(get, origin):
    get(origin.url + "/cut", "-o", "f")
    origin.most = 300_000
    status, _, err = get(origin.url + "/cut", "-o", "f", "-C")
    assert status == 18 and "-C goes on" in err and files() == ["f.part", "f.part.info"]
    assert get(origin.url + "/cut", "-o", "f", "-C")[0] == 0 and files() == ["f"]
    with open("f", "rb") as file:
        assert file.read() == CONTENT


def test_a_range_of_ones_own_is_a_file_but_nothing_to_go_on_with(get, origin):
    assert get(origin.url + "/file", "-o", "f", "-H", "Range: bytes=500000-")[0] == 0
    assert os.path.getsize("f") == len(CONTENT) - 500_000
    assert get(origin.url + "/part", "-o", "g", "-H", "Range: bytes=100-1099")[0] == 18
    status, _, err = get(origin.url + "/part", "-o", "g", "-C")
    assert status == 33 and "not known" in err
    assert get(origin.url + "/part", "-o", "h")[0] == 33, "a part that nobody has asked for"


def test_a_file_is_written_as_it_comes(get, origin):
    assert get(origin.url + "/packed", "-o", "f.gz")[0] == 0
    with gzip.open("f.gz") as file:
        assert file.read() == b"hello"


def test_a_password_in_the_url_is_sent_and_nowhere_shown_or_written(get, origin):
    url = origin.url.replace("//", "//me:secret@")
    for path, option, status in (
            ("/cut", "-of", 18), ("/none", "-s", 22), ("/round", "-s", 47), ("/file", "-m1e-9", 28), ("/", "-O", 2)):
        found, _, err = get(url + path, option)
        assert found == status and "127.0.0.1" in err and "secret" not in err
    with open("f.part.info") as file:
        assert "secret" not in file.read()
    assert all("Authorization" in request.headers for request in origin.seen)
    assert get(url + "/cut", "-o", "f", "-C")[0] == 0


def test_what_has_no_content_leaves_a_file_as_it_is(get, origin):
    with open("f", "w") as file:
        file.write("mine")
    assert get(origin.url + "/same", "-o", "f", "--force", "-H", 'If-None-Match: "x"')[0] == 0
    assert get(origin.url + "/hello.txt", "-I", "-o", "f", "--force")[0] == 2
    with open("f") as file:
        assert file.read() == "mine"
    assert files() == ["f"]


@pytest.mark.parametrize("info", [None, "", "{}", "[]", '{"url": "other", "validator": "x"}', '{"url": 1, "validator": 2}'])
def test_a_part_of_which_nothing_is_known_is_not_gone_on_with(get, origin, info):
    get(origin.url + "/cut", "-o", "f")
    os.remove("f.part.info")
    if info is not None:
        with open("f.part.info", "w") as file:
            file.write(info)
    status, _, err = get(origin.url + "/cut", "-o", "f", "-C")
    assert status == 33 and "--force begins anew" in err and len(origin.seen) == 1
    origin.whole = True
    assert get(origin.url + "/cut", "-o", "f", "-C", "--force")[0] == 0 and files() == ["f"]


def test_a_password_needs_a_terminal_to_ask_at(get, origin, monkeypatch):
    def nobody(prompt):
        raise EOFError
    monkeypatch.setattr(flowcoro_cli.getpass, "getpass", nobody)
    status, _, err = get(origin.url + "/hello.txt", "-u", "me")
    assert status == 2 and "after a colon" in err


@pytest.mark.parametrize("weak", ['W/"x"', ""])
def test_without_a_strong_validator_it_begins_anew(get, origin, weak):
    origin.etag = weak
    get(origin.url + "/cut", "-o", "f")
    assert get(origin.url + "/cut", "-o", "f", "-C")[0] == 33


def raw_server(reply, hold=False):
    """A port where each connection gets these bytes."""
    listener = socket.create_server(("127.0.0.1", 0))
    held = []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                sock.recv(65536)
                sock.sendall(reply)
                held.append(sock) if hold else sock.close()

    thread = threading.Thread(target=serve)
    thread.start()

    @contextlib.contextmanager
    def running():
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join()
            for sock in held:
                sock.close()
    return running()


def test_exit_statuses(get, origin):
    assert get("http://a b/")[0] == get("ftp://a/")[0] == get(origin.url, "-H", "X: a\r\nb")[0] == 3
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert get(f"http://127.0.0.1:{taken.getsockname()[1]}/")[0] == 7
    assert get(origin.url + "/round")[0] == 47
    with raw_server(b"garbage\r\n\r\n") as url:
        assert get(url)[0] == 8
    with raw_server(b"") as url:
        assert get(url)[0] == 56
    with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort") as url:
        assert get(url)[:2] == (18, b"short")
    with raw_server(b"", hold=True) as url:
        status, _, err = get(url, "--max-time", "0.05")
        assert status == 28 and "--max-time 0.05" in err
    with raw_server(b"HTTP/1.1 407 x\r\n\r\n") as url:
        assert get("https://a.test/", "-x", url)[0] == 56


def test_tls(get, certificates):  # noqa: F811
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates.good)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *args: None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = f"https://localhost:{server.server_port}/hello.txt"
        assert get(url)[0] == 60
        assert get(url, "--cacert", certificates.ca) == (0, b"hello\n", "")
        assert get(url, "-k") == (0, b"hello\n", "")
        assert get(url, "--cacert", "none")[0] == 23
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def in_terminal(*arguments, cwd):
    """Run it with stdout and stderr on a terminal: (exit status, what is shown)."""
    leader, follower = pty.openpty()
    with subprocess.Popen([sys.executable, "-W", "error", "-m", "flowcoro", "get", *arguments], cwd=cwd, stdin=subprocess.DEVNULL,
                          stdout=follower, stderr=follower, env=environment(PYTHONPATH=str(ROOT), TERM="xterm",
                                                                            NETRC="/none")) as program:
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):
            while data := os.read(leader, 65536):
                shown += data
        os.close(leader)
        return program.wait(60), shown.decode()


def test_a_terminal_gets_a_bar_and_no_binary(origin, tmp_path):
    status, shown = in_terminal(origin.url + "/file", "-o", "f", cwd=tmp_path)
    assert status == 0 and (tmp_path / "f").read_bytes() == CONTENT
    status, shown = in_terminal(origin.url + "/binary", cwd=tmp_path)
    assert status == 23 and "-o FILE" in shown and "\0" not in shown


def test_the_meter_tells_how_far_it_is(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    clock = [100.0]
    monkeypatch.setattr(flowcoro_cli.time, "monotonic", lambda: clock[0])
    stream = Terminal()
    meter = flowcoro_cli._Meter(stream, 100.0, False)
    meter.tell(0, 4 * 2**20)
    assert stream.getvalue() == ""
    clock[0] = 101.0
    meter.tell(2**20, 4 * 2**20)
    assert stream.getvalue().rstrip() == f"\r[{'#' * 8}{'.' * 24}]  25% of 4.0 MiB, 1.0 MiB/s, 0:03 left"
    clock[0] = 102.0
    meter.tell(3000, None)
    assert "2.9 KiB, 1.5 KiB/s" in stream.getvalue()
    meter.clear()
    assert stream.getvalue().endswith("\r" + " " * 78 + "\r")
    quiet = flowcoro_cli._Meter(io.StringIO(), 0.0, False)
    quiet.tell(1, 1)
    quiet.clear()
    assert quiet.screen.stream.getvalue() == ""


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl, whose exit statuses these are, is not installed")
def test_exit_statuses_are_those_of_curl(get, origin):
    for path in "/round", "/hello.txt", "/none":
        theirs = subprocess.run(["curl", "-sLf", "--max-redirs", "20", origin.url + path], capture_output=True, timeout=60,
                                env=environment())
        assert get(origin.url + path)[0] == theirs.returncode
    with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort") as url:
        theirs = subprocess.run(["curl", "-s", url], capture_output=True, timeout=60, env=environment())
        assert get(url)[:2] == (theirs.returncode, theirs.stdout)
