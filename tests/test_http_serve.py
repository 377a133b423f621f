"""`python -m flowcoro serve`: real processes that serve applications and folders, and what they say when they cannot."""

import contextlib
import http.client
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import flowcoro
import flowcoro_cli
import flowcoro_http
import flowcoro_websocket

ROOT = pathlib.Path(flowcoro_cli.__file__).resolve().parent
PATIENCE = 30               # seconds until a process counts as hanging; each takes a second
CURL, OPENSSL = shutil.which("curl"), shutil.which("openssl")

APPLICATIONS = """
    import os, time
    import flowcoro, flowcoro_http

    app = flowcoro_http.HttpServer()

    @app.get("/")
    async def own(request):
        return f"own {os.getpid()}"

    @app.get("/slow")
    async def slow(request):
        print("slow", flush=True)
        await flowcoro.sleep(float(request.query.get("seconds", "0.15")))
        return "answered"

    @app.middleware
    async def guard(request, call_next):
        return (403, "not you") if request.raw_path == "/guarded" else await call_next(request)

    router = flowcoro_http.Router()

    @router.get("/")
    async def routed(request):
        return "router"

    speaking_router = flowcoro_http.Router()

    @speaking_router.websocket("/ws")
    async def echo(ws):
        async for message in ws:
            await ws.send(message)

    async def speaking_asgi(scope, receive, send):
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
            await receive()
            while (message := await receive())["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": message["text"]})

    def wsgi(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"wsgi ", environ["PATH_INFO"].encode("latin-1")]

    class Wsgi:
        def __call__(self, environ, start_response):
            return wsgi(environ, start_response)

    async def asgi(scope, receive, send):
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                print(message["type"], flush=True)
                await send({"type": message["type"] + ".complete"})
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"asgi " + scope["raw_path"]})

    class Asgi:
        async def __call__(self, scope, receive, send):
            await asgi(scope, receive, send)

    def any_arguments(*arguments):
        return (wsgi if len(arguments) == 2 else asgi)(*arguments)

    unready = flowcoro_http.HttpServer()

    @unready.on_startup
    def connect():
        os.stat("absent.db")

    half = flowcoro_http.HttpServer()

    @half.on_startup
    async def elsewhere():                  # one of two processes starts, and then the other one cannot
        try:
            os.mkdir("one")
        except FileExistsError:
            if not os.path.exists("two"):
                os.mkdir("two")
                while not os.path.exists("announced"):
                    await flowcoro.sleep(0.01)
                raise ValueError("no room")

    slow_to_start = flowcoro_http.HttpServer()

    @slow_to_start.on_startup
    async def wait():
        print("starting", flush=True)
        await flowcoro.sleep(1000)

    async def cannot_start(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    def make():
        return wsgi

    def one_argument(x):
        pass

    class holder:
        inner = Asgi()

    wsgi_object, asgi_object, number = Wsgi(), Asgi(), 5
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "apps.py").write_text(textwrap.dedent(APPLICATIONS))
    return tmp_path


def command(*arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FLOWCORO"))}
    return ([sys.executable, "-W", "error", "-m", "flowcoro", "serve", *map(str, arguments)],
            {**environment, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1"})


@pytest.fixture
def here(folder, monkeypatch):
    """The folder is the current one, and what is imported from it is forgotten."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    modules = set(sys.modules)
    yield folder
    for name in set(sys.modules) - modules:
        if os.fspath(folder) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def refused(here, capsys):
    """What a command says on stderr that cannot be obeyed; in this process, which is quicker."""
    def call(*arguments):
        status = flowcoro_cli.main(["serve", *map(str, arguments), *([] if "--port" in arguments else ["--port", "0"])])
        out, errors = capsys.readouterr()
        assert status == 2 and out == "", (out, errors)         # nothing is announced that is not served
        return errors
    return call


class Serving:
    """`with Serving(folder, "apps:app") as server:`: the process serves; at the end it is gone."""

    def __init__(self, folder, *arguments, announced=True):
        self.announced = announced
        line, environment = command(*arguments, *([] if {"--port", "--unix"} & set(arguments) else ["--port", "0"]))
        self.process = subprocess.Popen(line, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True)
        self.lines, self.errors, self.news = [], [], threading.Condition()
        self.threads = [threading.Thread(target=self.read, args=each, daemon=True)
                        for each in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))]

    def read(self, stream, lines):
        for line in stream:
            with self.news:
                lines.append(line.rstrip("\n"))
                self.news.notify_all()
        with self.news:
            self.news.notify_all()

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        if not self.announced:
            return self
        try:
            self.where = self.line("serving .* on (.*)")[1]
        except BaseException:
            self.__exit__()
            raise
        self.port = int(self.where.rpartition(":")[2]) if "://" in self.where else None
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)         # its own session: worker processes too
        self.process.wait()
        for thread in self.threads:
            thread.join(PATIENCE)
        self.process.stdout.close()
        self.process.stderr.close()

    def line(self, pattern, lines=None, count=1):
        """Wait for the `count`th line that matches."""
        lines = self.lines if lines is None else lines
        until = time.monotonic() + PATIENCE
        with self.news:
            while True:
                found = [match for match in (re.search(pattern, line) for line in lines) if match]
                if len(found) >= count:
                    return found[count - 1]
                assert self.process.poll() is None and time.monotonic() < until, (pattern, self.lines, self.errors)
                self.news.wait(0.1)

    def get(self, path="/"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def end(self, number=signal.SIGTERM):
        """The exit status after a signal."""
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE)
        for thread in self.threads:
            thread.join(PATIENCE)
        return status


# ---- what is served -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("target, answer", [
    ("apps:app", "own "), ("apps:router", "router"), ("apps:wsgi", "wsgi /"), ("apps:wsgi_object", "wsgi /"),
    ("apps:asgi", "asgi /"), ("apps:asgi_object", "asgi /"), ("apps:make()", "wsgi /"), ("apps:holder.inner", "asgi /"),
    ("apps:any_arguments --wsgi", "wsgi /"), ("apps:any_arguments --asgi", "asgi /"), ("apps:wsgi --threads 1", "wsgi /")])
def test_an_application_is_told_apart_and_served(here, capfd, target, answer):
    app = flowcoro_cli._served_app(flowcoro_cli._serve_options(target.split()))

    async def main():
        async with app.test_client() as client:
            return await client.get("/")

    got = flowcoro.run(main())
    assert got.status == 200 and got.text.startswith(answer) and capfd.readouterr().err == ""


@pytest.mark.parametrize("target", ["apps:speaking_router", "apps:speaking_asgi"])
def test_applications_speak_websocket_if_its_file_is_there(here, target, monkeypatch):
    app = flowcoro_cli._served_app(flowcoro_cli._serve_options([target]))

    async def main():
        async with app.test_client() as client:
            async with flowcoro_websocket.connect("ws://testserver/ws", socket=await client.socket()) as ws:
                await ws.send("hello")
                return await ws.receive()

    assert flowcoro.run(main()) == "hello"
    monkeypatch.setitem(sys.modules, "flowcoro_websocket", None)
    assert flowcoro_cli._speaker() is None


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_curl_gets_it_over_tcp_and_over_a_unix_socket(folder, tmp_path):
    with Serving(folder, "apps:wsgi") as server:
        got = subprocess.run([CURL, "-sS", f"{server.where}/a%20b"], capture_output=True, timeout=PATIENCE)
        assert got.stdout == b"wsgi /a b", got
        assert server.end() == 0 and server.errors == []
    with Serving(folder, "apps:asgi", "--unix", "socket") as server:
        got = subprocess.run([CURL, "-sS", "--unix-socket", tmp_path / "socket", "http://localhost/x"], capture_output=True,
                             timeout=PATIENCE)
        assert got.stdout == b"asgi /x" and server.where.endswith("socket"), got
        assert server.end() == 0 and not (tmp_path / "socket").exists()


def test_the_lifespan_of_an_asgi_application_is_run(folder):
    with Serving(folder, "apps:asgi") as server:
        assert server.end() == 0
        assert [line.partition(" on ")[0] for line in server.lines] == [
            "lifespan.startup", "serving apps:asgi", "Ctrl-C ends it", "lifespan.shutdown"]


def test_a_folder_is_served_and_listed_only_when_asked(folder):
    (folder / "index").mkdir()
    (folder / "index" / "index.html").write_text("<p>the index</p>")
    with Serving(folder, ".") as server:
        assert server.get("/apps.py") == (200, textwrap.dedent(APPLICATIONS))
        assert server.get("/index/") == (200, "<p>the index</p>")
        assert server.get("/nothing")[0] == server.get("/../etc/passwd")[0] == server.get("/")[0] == 404
        assert server.end() == 0 and server.errors == []
        assert server.lines == [f"serving . on {server.where}", "there is no index.html in it; --listing shows what there is",
                                "Ctrl-C ends it"]                                       # once
    app = flowcoro_cli._served_app(flowcoro_cli._serve_options([str(folder), "--listing"]))

    async def main():
        async with app.test_client() as client:
            return (await client.get("/")).text

    assert "apps.py" in flowcoro.run(main())


@pytest.mark.parametrize("option, pattern", [("--access-log", r'"GET /guarded HTTP/1.1" 403 '),
                                             ("--access-log=json", r'"status": ?403')])
def test_the_access_log_has_what_middleware_of_the_application_answers(folder, option, pattern):
    with Serving(folder, "apps:app", option) as server:
        assert server.get("/guarded")[0] == 403
        server.line(pattern, server.errors)


def test_several_processes_serve_and_all_end(folder):
    with Serving(folder, "apps:app", "--processes", "2") as server:
        pids = {int(server.get()[1].split()[1]) for _ in range(60)}
        assert len(pids) == 2 and server.process.pid not in pids
        os.kill(min(pids), signal.SIGKILL)
        server.line("a worker process has died", server.errors)
        while (pid := int(server.get()[1].split()[1])) in pids:
            pass
        pids.add(pid)
        assert server.end() == 0 and [line.partition(" on ")[0] for line in server.lines] == [
            "serving apps:app in 2 processes", "Ctrl-C ends it"]
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_a_process_that_cannot_start_where_others_have_says_why_and_is_replaced(folder):
    with Serving(folder, "apps:half", "--processes", "2") as server:
        (folder / "announced").mkdir()
        server.line("^flowcoro: apps:half cannot start: ValueError: no room .*apps.py, line", server.errors)
        server.line("a worker process has died", server.errors)
        assert server.get()[0] == 404 and server.end() == 0


# ---- TLS ------------------------------------------------------------------------------------------------------

def certificate(folder, name):
    """Files cert.pem and key.pem, self-signed, for that name."""
    subprocess.run([OPENSSL, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                    "-subj", f"/CN={name}", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
                   check=True, capture_output=True, timeout=PATIENCE)


def served_certificate(port):
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=PATIENCE)


def await_another_certificate(port, before):
    """Of several connections, until a row of them has it: the old worker process may accept for a moment yet."""
    until, row = time.monotonic() + PATIENCE, 0
    while row < 5:
        row = row + 1 if served_certificate(port) != before else 0
        assert time.monotonic() < until


@pytest.mark.skipif(OPENSSL is None, reason="the openssl command is not installed")
@pytest.mark.parametrize("processes", [(), ("--processes", "1")])
def test_https_with_a_certificate_that_a_hangup_reads_anew(folder, processes):
    certificate(folder, "first")
    with Serving(folder, "apps:wsgi", "--tls-cert", "cert.pem", "--tls-key", "key.pem", *processes) as server:
        assert server.where.startswith("https://")
        before = served_certificate(server.port)
        assert before.strip() == (folder / "cert.pem").read_text().strip()
        trusting = ssl.create_default_context(cafile=folder / "cert.pem")
        trusting.check_hostname = False
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=trusting, timeout=PATIENCE)
        connection.request("GET", "/x")
        assert connection.getresponse().read() == b"wsgi /x"
        connection.close()
        certificate(folder, "second")
        server.process.send_signal(signal.SIGHUP)
        server.line("^certificate reloaded$")
        await_another_certificate(server.port, before)
        (folder / "key.pem").write_text("no key")
        server.process.send_signal(signal.SIGHUP)
        server.line("the certificate stays as it is: .*key.pem", server.errors)
        await_another_certificate(server.port, before)
        assert server.end() == 0


# ---- how it ends ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
def test_what_is_under_way_is_answered_when_the_server_ends(folder, number, processes):
    with Serving(folder, "apps:app", *processes) as server:
        answers = []
        client = threading.Thread(target=lambda: answers.append(server.get("/slow")))
        client.start()
        server.line("^slow$")
        assert server.end(number) == 0
        client.join(PATIENCE)
        assert answers == [(200, "answered")] and server.errors == []


@pytest.mark.parametrize("processes", [(), ("--processes", "2")])
def test_a_start_that_takes_long_is_not_waited_for_when_the_server_ends(folder, processes):
    with Serving(folder, "apps:slow_to_start", *processes, announced=False) as server:
        server.line("^starting$")
        began = time.monotonic()
        assert server.end() == 0 and time.monotonic() - began < PATIENCE / 2
        assert not any(line.startswith("serving") for line in server.lines) and server.errors == []


@pytest.mark.parametrize("closed", [True, False])
def test_it_serves_and_hears_signals_when_nobody_reads_what_it_says(folder, closed):
    reader, writer = os.pipe()
    os.close(reader)
    line, environment = command("apps:wsgi", "--unix", "socket", "--processes", "1")
    process = subprocess.Popen(line, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=writer,
                               stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=(lambda: os.close(1)) if closed else None)
    os.close(writer)
    try:
        until = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None and time.monotonic() < until
            with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                sock.connect(str(folder / "socket"))
                sock.sendall(b"GET /x HTTP/1.0\r\n\r\n")
                with sock.makefile("rb") as file:
                    assert file.read().endswith(b"wsgi /x")
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == (0 if closed else 141)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_second_interrupt_ends_it_at_once(folder):
    with Serving(folder, "apps:app") as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"GET /slow?seconds=1000 HTTP/1.1\r\nHost: x\r\n\r\n")
        server.line("^slow$")
        server.process.send_signal(signal.SIGINT)
        server.line("once more")
        began = time.monotonic()
        assert server.end(signal.SIGINT) == 0
        assert time.monotonic() - began < 7             # of the eight that a request has


def test_a_request_that_does_not_end_is_cancelled_after_the_drain_timeout(folder):
    with Serving(folder, "apps:app", "--drain-timeout", "0.1") as server, \
            socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"GET /slow?seconds=1000 HTTP/1.1\r\nHost: x\r\n\r\n")
        server.line("^slow$")
        assert server.end() == 0


# ---- --reload -------------------------------------------------------------------------------------------------

def later(path, text):
    """Write a source whose mtime differs from that of the one before, however coarse the clock of the file system is."""
    before = path.stat().st_mtime_ns
    path.write_text(text)
    os.utime(path, ns=(before + 2 * 10**9,) * 2)


def test_reload_starts_anew_when_a_source_changes_and_refuses_nobody_meanwhile(folder):
    source = "import other\ndef app(environ, start_response):\n    start_response('200 OK', [])\n    return [other.text]\n"
    (folder / "reloaded.py").write_text(source)
    (folder / "other.py").write_text("text = b'one'")
    with Serving(folder, "reloaded:app", "--reload") as server:
        assert server.get() == (200, "one")
        later(folder / "other.py", "text = b'two'")
        until, answers = time.monotonic() + PATIENCE, set()
        while "two" not in answers:
            assert time.monotonic() < until
            answers.add(server.get()[1])                # ConnectionRefusedError would end the test
        assert answers == {"one", "two"}
        server.line("other.py has changed")
        server.line("^serving .*", count=2)
        later(folder / "other.py", "text = b'three")    # a mistake: it waits
        server.line("reloaded could not be loaded: SyntaxError: .*other.py, line 1", server.errors)
        later(folder / "other.py", "text = b'four'")
        assert server.get() == (200, "four")            # asked while nobody accepted
        assert server.end() == 0


def test_reload_waits_for_a_source_that_is_replaced_and_for_an_application_that_cannot_start_to_be_corrected(folder):
    path = folder / "reloaded.py"
    path.write_text("from apps import app")
    with Serving(folder, "reloaded:app", "--reload") as server:
        assert server.get()[0] == 200
        path.rename(folder / "away.py")                 # as git and some editors do; for a moment it is not there
        time.sleep(1.5 * flowcoro_cli.LOOK_AT_FILES)
        later(folder / "away.py", "from apps import unready as app")
        (folder / "away.py").rename(path)
        server.line("reloaded:app cannot start: FileNotFoundError: .*apps.py, line", server.errors)
        later(path, "from apps import app")
        assert server.get()[0] == 200
        (folder / "away.py").write_text("")
        path.unlink()
        later(folder / "apps.py", "")
        server.line("there is no module 'reloaded'", server.errors)
        path.write_text("def app(environ, start_response):\n    start_response('200 OK', [])\n    return [b'back']\n")
        assert server.get() == (200, "back")
        later(path, "1 / 0")
        server.line("ZeroDivisionError: division by zero .*reloaded.py, line 1", server.errors)
        server.line("^waiting for a change$", server.errors, count=3)
        assert server.end() == 0                        # also while it waits


# ---- what cannot be served ------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, said", [
    ("nowhere:app", "there is no module 'nowhere'"), ("apps:ap", "apps has no 'ap'; did you mean app"),
    ("apps:holder.outer", "apps.holder has no 'outer'"), ("apps", "neither a folder nor module:name"),
    ("apps:", "neither a folder nor module:name"), ("apps:number", "no application"), ("apps:make", "write apps:make()"),
    ("apps:one_argument", "neither like WSGI"), ("apps:any_arguments", "--wsgi or --asgi"), ("apps:Wsgi", "--wsgi or --asgi"),
    ("apps:cannot_start", "cannot start: no database"), ("apps:cannot_start --processes 2", "cannot start: no database"),
    ("apps:unready", "apps:unready cannot start: FileNotFoundError: "), ("apps:unready --processes 2", "apps.py, line"),
    ("apps:app --drain-timeout -1", "--drain-timeout -1"), ("apps:app --drain-timeout nan", "--drain-timeout nan"),
    ("apps:app --wsgi", "is an HttpServer"),
    ("apps:asgi --threads 3", "--threads is for WSGI"), ("broken:app", "SyntaxError"),
    ("needy:app", "No module named 'absent_thing'"),
    ("failing:app", "ZeroDivisionError: division by zero"), ("apps:app --port 65536", "--port 65536"),
    ("apps:app --processes 0", "--processes 0"), ("apps:app --reload --processes 2", "leave out --processes"),
    ("apps:app --listing", "is for a folder"), (". --wsgi", "is a folder"), (". --reload", "sources of an application"),
    ("apps:app --tls-key key.pem", "--tls-key needs --tls-cert"), ("apps:app --tls-cert apps.py", "certificate='apps.py'"),
    ("apps:app --tls-cert absent.pem", "absent.pem"), ("apps:app --unix no/folder/socket", "no/folder/socket"),
    ("apps:wsgi --threads 0", "--threads 0")])
def test_what_cannot_be_served_is_said_in_one_line_and_the_status_is_2(folder, refused, arguments, said):
    (folder / "broken.py").write_text("def app(:\n")
    (folder / "needy.py").write_text("import absent_thing\n")
    (folder / "failing.py").write_text("app = 1 / 0\n")
    errors = refused(*arguments.split())
    assert said in errors and errors.startswith("flowcoro: ") and errors.count("\n") == 1


@pytest.mark.parametrize("more", [(), ("--processes", "2")])
def test_a_port_that_is_taken_is_said_in_one_line(refused, more):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        errors = refused("apps:app", "--port", taken.getsockname()[1], *more)
    assert "in use" in errors and errors.count("\n") == 1


def test_a_port_that_worker_processes_of_another_program_share_is_taken_too(folder, refused):
    with Serving(folder, "apps:wsgi", "--processes", "1") as server:
        assert "in use" in refused("apps:wsgi", "--processes", "1", "--port", server.port)


def test_what_follows_an_access_log_without_a_format_is_said_to_be_taken_for_one(capsys):
    assert flowcoro_cli.main(["serve", "--access-log", "shop:app"]) == 2
    assert "'shop:app' is neither common nor json; if it is what to serve, give it first" in capsys.readouterr().err


def test_the_help_explains_every_option(folder):
    line, environment = command("--help")
    text = subprocess.run(line, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=PATIENCE).stdout
    for option in ("--host", "--port", "--unix", "--processes", "--tls-cert", "--tls-key", "--reload", "--access-log", "--wsgi",
                   "--asgi", "--threads", "--listing", "--drain-timeout", "SIGHUP", "module:name()"):
        assert option in text


def test_serve_waits_and_works_as_an_http_server_does_by_itself():
    for ours, theirs in ("DRAIN_TIMEOUT",) * 2, ("END_TIMEOUT",) * 2, ("THREADS_OF_WSGI", "WSGI_THREADS"):
        assert getattr(flowcoro_cli, ours) == getattr(flowcoro_http, theirs), ours
