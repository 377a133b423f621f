"""`python -m flowcoro bench rpc`: that it measures, tiny, and that its clients take no wrong answer for a right one.

How fast anything is, is asserted nowhere.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CASES = ROOT / "benchmarks" / "rpc_cases"
PATIENCE = 120              # seconds until a benchmark counts as hanging

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark needs Linux")


def bench(*arguments):
    """Run `python -m flowcoro bench rpc …` in a process of its own: the CompletedProcess."""
    return subprocess.run([sys.executable, "-W", "error", "-m", "flowcoro", "bench", "rpc", *map(str, arguments)], cwd=ROOT,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)


def test_every_case_is_measured():
    done = bench("--quick", "--repeat", 1, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {row.partition(":")[0] for row in report["cases"]} == {"flight", "latency", "batch", "stream"}
    for name, row in report["cases"].items():
        assert row["figures"].keys() == ({"flowcoro", "bare"} if name.startswith("latency") else {"flowcoro"}), name
        assert row["failed"] == {} and all(known["median"] > 0 for known in row["figures"].values()), name
    target, = report["targets"]                         # the others are against peers
    assert (target["case"], target["against"], target["bound"]) == ("latency:p50", "bare", 1.2)


def test_list_names_every_case():
    done = bench("--list")
    assert done.returncode == 0
    assert all(f"\n{case} " in "\n" + done.stdout for case in ("flight", "latency", "batch", "stream"))


# ---- what a client does with a wrong answer --------------------------------------------------------------------

def answered(answer, case):
    """The CompletedProcess of FlowCoro's client in this case, where each line that it sends is answered with answer(request)."""
    def serve():
        sock, _ = listener.accept()
        with sock, sock.makefile("rb") as lines:
            try:
                for request in map(json.loads, lines):
                    if "id" in request:         # else it is told that a call is not waited for any more
                        sock.sendall(json.dumps(answer(request)).encode() + b"\n")
            except ConnectionError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return subprocess.run([sys.executable, CASES / "cases_flowcoro.py", case, f"port={listener.getsockname()[1]}",
                                   f"pid={os.getpid()}", "warm=0.01", "seconds=0.05"], capture_output=True, text=True,
                                  timeout=PATIENCE)
        finally:
            thread.join()


def result(request, text):
    return {"jsonrpc": "2.0", "id": request["id"], "result": text}


@pytest.mark.parametrize("case", ["flight", "latency"])
def test_right_answers_are_counted(case):
    done = answered(lambda request: result(request, request["params"][0]), case)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["operations"] > 0 and report["seconds"] >= 0.05 and 0 < report["p50"] <= report["p99"]
    assert report["client_cpu"] > 0 and report["server_cpu"] >= 0


@pytest.mark.parametrize("case", ["flight", "latency"])
def test_a_wrong_answer_ends_it(case):
    done = answered(lambda request: result(request, request["params"][0][:-1]), case)
    assert done.returncode == 1 and done.stdout == "" and "the answer was 'What comes back" in done.stderr
    done = answered(lambda request: {"jsonrpc": "2.0", "id": request["id"], "error": {"code": 1, "message": "no"}}, case)
    assert done.returncode == 1 and done.stdout == "" and "no (1)" in done.stderr
