"""`python -m flowcoro bench net`: that each case runs, tiny, and that its load generator sees what a server does wrong.

How fast anything is, is asserted nowhere.
"""

import contextlib
import itertools
import json
import os
import pathlib
import runpy
import shutil
import socket
import subprocess
import sys
import threading

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
PATIENCE = 120              # seconds until a benchmark counts as hanging
MIB = 2**20

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the benchmark needs Linux"),
    pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler"),
]


def bench(*arguments, **environment):
    """Run `python -m flowcoro bench net …` in a process of its own: the CompletedProcess."""
    return subprocess.run([sys.executable, "-W", "error", "-m", "flowcoro", "bench", "net", *map(str, arguments)], cwd=ROOT,
                          env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=PATIENCE)


def compiler(tmp_path, refuses):
    """The path of a C compiler that fails when the word `refuses` is among its arguments."""
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\ncase " $* " in *" {refuses} "*) echo "x.h: error: no such file" >&2; exit 1;; esac\n'
                      'exec cc "$@"\n')
    script.chmod(0o755)
    return script


# ---- the cases -------------------------------------------------------------------------------------------------

CASES = {"echo": ["cpu", "rate", "p99_ms", "busy"], "latency": ["p50", "p99", "busy"],
         "crowd": ["lost", "p99_ms", "max_ms", "memory", "cpu", "busy"], "tls": ["cpu", "rate", "busy"],
         "handshake": ["cpu", "rate", "busy"], "receive": ["speed", "speed_of_cpu", "busy"],
         "send": ["speed", "speed_of_cpu", "busy"], "file": ["speed", "speed_of_cpu", "busy"]}


@pytest.fixture(scope="module")
def report():
    """Of one run of all cases, without peers."""
    done = bench("--quick", "--repeat", 1, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("tls", "handshake")])
def test_a_case_measures_flowcoro_and_what_there_is_without_peers(report, case):
    beside = {"echo": {"bare"}, "latency": {"bare"}, "crowd": {"bare"}, "receive": {"blocking"}, "send": {"blocking"},
              "file": {"blocking", "sendfile", "shutil"}}
    for key in CASES[case]:
        row = report["cases"][f"{case}:{key}"]
        assert row["figures"].keys() == {"flowcoro"} | beside[case]
        assert row["failed"] == {}
        assert all(len(known["rounds"]) == 1 for known in row["figures"].values())


@pytest.mark.parametrize("case", ["tls", "handshake"])
def test_tls_is_measured_or_the_report_says_what_is_missing(report, case):
    rows = [report["cases"][f"{case}:{key}"] for key in CASES[case]]
    if not rows[0]["failed"]:
        assert all(row["figures"].keys() == {"flowcoro"} for row in rows)
    else:
        assert "apt-get install" in rows[0]["failed"]["flowcoro"]


def test_the_report_says_what_each_figure_is_held_against(report):
    targets = {(target["case"], target["against"]): target for target in report["targets"]}
    assert targets["crowd:lost", "-"]["bound"] == 0
    assert targets["crowd:p99_ms", "-"]["bound"] == 50 and targets["crowd:p99_ms", "-"]["unit"] == "ms"
    assert targets["echo:cpu", "bare"]["bound"] == 0.85 and targets["echo:cpu", "bare"]["ratio"] > 0
    assert not [target for target in report["targets"] if target["against"] in ("uvloop", "asyncio", "trio", "protocol")]


def test_peers_that_are_not_there_are_left_out_and_named(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    (tmp_path / "pyvenv.cfg").write_text(f"home = {pathlib.Path(sys.executable).parent}\n")
    done = bench("--quick", "--repeat", 1, "--case", "latency", "--json", "--peers", "--env", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {"flowcoro", "bare", "asyncio"} <= report["cases"]["latency:p50"]["figures"].keys()
    assert all("ModuleNotFoundError" in reason for reason in report["left_out"].values())


def test_list_names_every_case():
    done = bench("--list")
    assert done.returncode == 0
    assert all(f"\n{case} " in "\n" + done.stdout for case in CASES)


def test_a_case_that_does_not_exist_is_refused_and_the_others_named():
    done = bench("--case", "eco")
    assert done.returncode == 2 and "latency" in done.stderr


def test_without_a_compiler_the_benchmark_says_how_to_get_one(tmp_path):
    done = bench("--quick", "--case", "echo", CC=str(tmp_path / "none"))
    assert done.returncode == 1 and "apt-get install gcc" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """What a run of two cases says to people, where the compiler knows nothing of OpenSSL."""
    done = bench("--quick", "--repeat", 1, "--case", "tls", "--case", "echo",
                 CC=str(compiler(tmp_path_factory.mktemp("compiler"), "-DTLS")))
    assert done.returncode == 1, done.stderr        # as always when FlowCoro has no figure
    return done.stdout


def test_the_tables_have_a_line_for_each_row_and_each_target(tables):
    for words in ("medians of 1 rounds; quick", "echo: per CPU second", "echo: by the clock", "echo: generator busy",
                  "at least 0.85"):
        assert words in tables


def test_without_openssl_tls_is_left_out_with_the_remedy_and_the_rest_is_measured(tables):
    assert "no figure: TLS echo" in tables and "echo: per CPU second" in tables
    if shutil.which("openssl"):
        assert "x.h: error: no such file" in tables and "apt-get install libssl-dev" in tables


def test_a_limit_is_judged_by_the_median():
    kernel = runpy.run_path(str(BENCHMARKS / "kernel.py"))
    case = kernel["Case"]("case", "title", "ms", "", limit=50)
    verdicts = [kernel["summarize"]({"case": case}, {"case": (figures, {})}, ["flowcoro"])["targets"][0]["verdict"]
                for figures in ({"flowcoro": [10, 20, 90]}, {"flowcoro": [10, 60, 90]}, {})]
    assert verdicts == ["ok", "MISSED", "not measured"]


# ---- the load generator ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Run the generator: load("echo", port=…) -> (exit status, its report or its complaint)."""
    folder = tmp_path_factory.mktemp("load")
    subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", folder / "load", BENCHMARKS / "load.c"], check=True)
    (folder / "pattern").write_bytes(bytes(number * number >> 8 & 255 for number in range(MIB)))

    def run(mode, **options):
        options = {"pattern": folder / "pattern", "pid": os.getpid(), "seconds": 0.1, "warm": 0, **options}
        done = subprocess.run([folder / "load", mode, *(f"{name}={value}" for name, value in options.items())],
                              capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
        return done.returncode, json.loads(done.stdout) if done.returncode == 0 else done.stderr

    run.program, run.pattern = folder / "load", (folder / "pattern").read_bytes()
    return run


@contextlib.contextmanager
def server(handler):
    """Call handler(sock, which) in a thread for each connection to the port that this gives; `which` counts them."""
    def serve():
        for which in itertools.count():
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=handle, args=(sock, which)))
            threads[-1].start()

    def handle(sock, which):
        with sock, contextlib.suppress(ConnectionError):
            handler(sock, which)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads = [threading.Thread(target=serve)]
        threads[0].start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            threads[0].join()
            for thread in threads:
                thread.join()


def echo(sock, which):
    while data := sock.recv(65536):
        sock.sendall(data)


@pytest.mark.parametrize("mode, size", [("echo", 1), ("echo", 1024), ("echo", 500_000), ("connect", 16), ("paced", 64)])
def test_the_generator_counts_the_answers_and_times_them(load, mode, size):
    with server(echo) as port:
        status, report = load(mode, port=port, connections=3, size=size)
    assert status == 0, report
    assert report["operations"] > 0 and report["seconds"] >= 0.09
    assert 0 < report["p50"] <= report["p99"] <= report["max"]
    assert report["broken"] == report["unanswered"] == report["skipped"] == 0
    assert 0 <= report["busy"] <= 1


def test_the_generator_sends_one_request_a_second_when_paced(load):
    with server(echo) as port:
        status, report = load("paced", port=port, connections=10, size=10, seconds=0.45)
    assert status == 0 and report["operations"] == 5            # due after 0, 0.1, … 0.4 s


def test_the_generator_sees_a_wrong_byte(load):
    def wrong(sock, which):
        while data := sock.recv(65536):
            sock.sendall(data[:-1] + bytes([data[-1] ^ 1]))

    with server(wrong) as port:
        assert load("echo", port=port) == (1, "an answer differs from its request\n")


def test_the_generator_sees_the_answer_to_another_request(load):
    first = []

    def stale(sock, which):
        while data := sock.recv(65536):
            first.append(data)
            sock.sendall(first[0])

    with server(stale) as port:
        assert load("echo", port=port) == (1, "an answer differs from its request\n")


def test_the_generator_sees_more_than_an_answer(load):
    def too_much(sock, which):
        sock.sendall(sock.recv(65536) + b"!")
        sock.recv(1)

    with server(too_much) as port:
        assert load("echo", port=port) == (1, "more came than was sent\n")


def test_the_generator_sees_a_connection_that_breaks(load):
    with server(lambda sock, which: sock.recv(65536)) as port:
        status, said = load("echo", port=port)
    assert status == 1 and said.startswith("the connection was lost while waiting for an answer")


def test_a_connection_of_a_crowd_that_breaks_is_counted_and_harms_no_other(load):
    def one_breaks(sock, which):
        sock.sendall(sock.recv(65536))          # the first one is the proof that it is there
        if which != 3:
            echo(sock, which)
        else:
            sock.recv(65536)

    with server(one_breaks) as port:
        status, report = load("paced", port=port, connections=10, size=10, seconds=0.45)
    assert status == 0 and report["broken"] == report["unanswered"] == 1 and report["operations"] == 4


def test_the_generator_says_when_nobody_listens(load):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    status, said = load("echo", port=port)
    assert status == 1 and f"cannot connect to 127.0.0.1:{port}" in said


def test_the_generator_pushes_and_checks_how_many_bytes_have_come(load):
    got = []

    def sink(sock, which):
        got.append(bytearray())
        while data := sock.recv(65536):
            got[which] += data
        sock.sendall((len(got[which]) - (which == 2)).to_bytes(8, "little"))

    with server(sink) as port:
        status, report = load("push", port=port, bytes=MIB + 5, repeat=2)
        assert (status, report["operations"]) == (0, 2 * (MIB + 5))
        assert got == [load.pattern + load.pattern[:5]] * 2
        assert load("push", port=port, bytes=MIB) == (1, f"{MIB} bytes were sent, and {MIB - 1} have come\n")


def test_the_generator_pulls_and_checks_each_byte(load):
    def source(sock, which):
        count = int.from_bytes(sock.recv(8), "little")
        data = bytearray((load.pattern * 3)[:count])
        if which == 2:
            data[MIB + 7] ^= 1
        sock.sendall(data if which < 3 else data[:-1])

    with server(source) as port:
        status, report = load("pull", port=port, bytes=2 * MIB + 9, repeat=2)
        assert (status, report["operations"]) == (0, 2 * (2 * MIB + 9))
        status, said = load("pull", port=port, bytes=2 * MIB)
        assert status == 1 and said.startswith("wrong bytes after")
        assert load("pull", port=port, bytes=100) == (1, "the server ended after 99 of 100 bytes\n")


# ---- the load generator speaks HTTP ----------------------------------------------------------------------------

REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def web(answer, at_once=MIB):
    """A handler that sends answer(how many-th request, from 0) to each REQUEST, `at_once` bytes at a time."""
    def handle(sock, which):
        for turn in itertools.count():
            data = b""
            while data != REQUEST:
                assert REQUEST.startswith(data)
                some = sock.recv(len(REQUEST))
                if not some:
                    return
                data += some
            data = answer(turn)
            for at in range(0, len(data), at_once):
                sock.sendall(data[at:at + at_once])
    return handle


@pytest.fixture
def http(load, tmp_path):
    """Run the generator with REQUEST against a handler: http(handler, size=…) -> as load()."""
    (tmp_path / "request").write_bytes(REQUEST)

    def run(handler, mode="echo", **options):
        with server(handler) as port:
            return load(mode, port=port, http=tmp_path / "request", **options)
    run.content = load.pattern
    return run


def response(content, head="HTTP/1.1 200 OK"):
    return f"{head}\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.parametrize("size, at_once", [(13, MIB), (13, 1), (3000, 700), (MIB + 5, MIB)])
def test_the_generator_counts_responses_and_compares_their_content(http, size, at_once):
    content = (2 * http.content)[:size]
    status, report = http(web(lambda turn: response(content), at_once), size=size, connections=3)
    assert status == 0, report
    assert report["operations"] > 0 and 0 < report["p50"] <= report["p99"]
    status, said = http(web(lambda turn: response(content[:-1] + bytes([content[-1] ^ 1]) if turn == 2 else content)), size=size)
    assert status == 1 and said.startswith("wrong content after")


@pytest.mark.parametrize("wrong, said", [
    (response(b"12345", "HTTP/1.1 503 Busy"), "the answer was HTTP/1.1 503 Busy"),
    (response(b"1234"), "an answer has no `Content-Length: 5`"),
    (b"HTTP/1.1 200 OK\r\n\r\n12345", "an answer has no `Content-Length: 5`"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n123456", "more came than the answer"),
    (b"HTTP/1.1 200 OK\r\nX: " + 3000 * b"x", "the head of an answer has more than 2048 bytes")])
def test_the_generator_sees_a_wrong_response(http, wrong, said):
    status, complaint = http(web(lambda turn: response(http.content[:5]) if turn < 2 else wrong), size=5)
    assert (status, complaint) == (1, said + "\n")


def test_the_generator_paces_requests_at_a_rate_of_all_connections(http):
    status, report = http(web(lambda turn: response(http.content[:5])), "paced", size=5, connections=4, rate=20, seconds=0.42)
    assert status == 0 and report["operations"] == 9        # due after 0, 0.05, … 0.4 s: more than two for each connection
    assert report["broken"] == report["unanswered"] == report["skipped"] == 0


# ---- the load generator's options ------------------------------------------------------------------------------

@pytest.mark.parametrize("options, said", [
    (["echo", "port=0"], "port=0"), (["echo", "port=1", "size=0"], "size=0"),
    (["echo", "port=1", "connections=0"], "connections=0"), (["nonsense", "port=1"], "no such mode"),
    (["echo", "port=1", "color=red"], "no such option"), (["echo", "port"], "name=value"), ([], "usage"),
    (["echo", "port=1", "http=/nonexistent"], "a request is wanted"), (["paced", "port=1", "rate=-1"], "rate=-1"),
    (["echo", "port=1", "pattern=/nonexistent"], "MiB"), (["echo", "port=1", "tls=1"], "compiled without TLS")])
def test_the_generator_refuses_what_it_cannot_do(load, options, said):
    done = subprocess.run([load.program, *options], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and said in done.stderr
