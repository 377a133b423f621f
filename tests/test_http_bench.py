"""`python -m flowcoro bench http`: that it measures, tiny, and that it neither measures wrong answers nor hides what is missing.

How fast anything is, is asserted nowhere.
"""

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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark needs Linux")


def bench(*arguments, **environment):
    """Run `python -m flowcoro bench http …` in a process of its own: the CompletedProcess."""
    return subprocess.run([sys.executable, "-W", "error", "-m", "flowcoro", "bench", "http", *map(str, arguments)], cwd=ROOT,
                          env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=PATIENCE)


@pytest.mark.skipif(not shutil.which("wrk"), reason="no wrk")
def test_hello_and_api_are_measured_by_wrk():
    done = bench("--quick", "--repeat", 1, "--case", "hello", "--case", "api", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    beside = {"nginx"} if shutil.which("nginx") else set()
    for case, others in ("hello", beside), ("api", {"bare"}):
        for key in ("cpu", "rate", "p50_ms", "p99_ms", "busy"):
            row = report["cases"][f"{case}:{key}"]
            assert row["figures"].keys() == {"flowcoro"} | others
            assert row["failed"] == {}
            assert all(known["median"] > 0 for known in row["figures"].values())
    assert beside or "apt-get install nginx" in report["left_out"]["nginx"]


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_a_crowd_is_measured_by_the_load_generator_of_ours():
    done = bench("--quick", "--repeat", 1, "--case", "idle", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for key in ("lost", "p50_ms", "p99_ms", "max_ms", "memory", "cpu", "busy"):
        row = report["cases"][f"idle:{key}"]
        assert "flowcoro" in row["figures"] and row["failed"] == {}
    assert report["cases"]["idle:p99_ms"]["figures"]["flowcoro"]["median"] > 0
    bounds = {target["case"]: target["bound"] for target in report["targets"]}
    assert bounds == {"idle:lost": 0, "idle:p99_ms": 100, "idle:memory": 6}


def test_each_case_says_which_program_it_lacks_and_how_to_get_it(tmp_path):
    done = bench("--quick", "--repeat", 1, "--case", "hello", "--case", "client", "--case", "idle", PATH=str(tmp_path), CC="none")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for title, remedy in [("hello", "apt-get install wrk"), ("client", "apt-get install nginx-light"),
                          ("10,000 connections", "apt-get install gcc")]:
        assert [line for line in done.stdout.splitlines() if line.startswith(f"no figure: {title}") and remedy in line]
    assert "left out: nginx: " in done.stdout


def test_list_names_every_case():
    done = bench("--list")
    assert done.returncode == 0
    assert all(f"\n{case} " in "\n" + done.stdout
               for case in ("hello", "api", "wsgi", "static", "large", "client", "idle", "processes"))


@pytest.mark.parametrize("seconds", ["0", "101", "nan", "many"])
def test_an_endless_crowd_is_refused(seconds):
    done = bench("--case", "idle", "--seconds", seconds)
    assert done.returncode == 2 and "--seconds" in done.stderr


# ---- what is done before anything is measured ------------------------------------------------------------------

@pytest.fixture(scope="module")
def program():
    """The names in benchmarks/http.py. Its folder has a module `http`, which no other test may find."""
    path, modules = sys.path[:], set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield runpy.run_path(str(BENCHMARKS / "http.py"))
    finally:
        sys.path[:] = path
        for name in {"kernel", "net", "harness"} & sys.modules.keys() - modules:
            del sys.modules[name]


def served(answer, ask):
    """What ask(port) returns, where each connection is sent `answer` and closed."""
    def serve():
        sock, _ = listener.accept()
        with sock:
            while b"\r\n\r\n" not in sock.recv(65536):
                pass
            sock.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return ask(listener.getsockname()[1])
        finally:
            thread.join()


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhella", b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhell", b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\n\r\nhello", b""])
def test_a_wrong_answer_is_not_measured(program, answer):
    with pytest.raises(program["Failed"]):
        served(answer, lambda port: program["check"](port, program["head_of"]("/"), b"", b"hello"))


def test_a_right_answer_is(program):
    def ask(port):
        program["check"](port, program["head_of"]("/"), b"", {"a": 1}, json.loads)
    served(b'HTTP/1.1 200 OK\r\nConnection: close\r\ncontent-length: 8\r\n\r\n{"a": 1}', ask)


def test_processor_time_is_that_of_a_process_and_its_children(program):
    child = "import sys, time\nwhile time.process_time() < 0.1: pass\nprint(flush=True)\nsys.stdin.read()"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        processes = program["processes_of"](process.pid)
        spent = program["processor_time"](process.pid)
    assert len(processes) == 2 and spent >= 0.1
