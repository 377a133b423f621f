"""The benchmark of HTTP: what a request costs FlowCoro's server, its client, and their peers.

    python benchmarks/http.py                       FlowCoro's figures next to those of nginx and a bare loop, in three minutes
    python benchmarks/http.py --peers               and to uvicorn, aiohttp, granian, Go and others; a quarter of an hour
    python benchmarks/http.py --peers --case hello --repeat 15
    python benchmarks/http.py --case idle --seconds 60
    python benchmarks/http.py --list                what each case does

`python -m flowcoro bench http` is the same program. It needs Linux, wrk and nginx (`apt-get install wrk nginx-light`), a C
compiler (`apt-get install gcc libc6-dev`), and with --peers Go (`apt-get install golang-go`); the environment for the other
peers is that of kernel.py. What is not there is left out, and named.

What is compared: `http_cases/` has one file for each contender, as its own manual would write it, without an access log. What
they answer is the same but for the headers that each adds by itself. Read them side by side before you believe a ratio. `bare` is
a loop round epoll, by hand, that checks nothing: what Python leaves to be won.
uvicorn and granian have no router: they call the one function of `hello` for every path, to their advantage. `single` is FlowCoro
itself, in one process. Before a contender is measured each of its answers is compared with what it has to be.

How it is measured: as in net.py. A server has a processor to itself, and the load generator another one: wrk, with 64
connections; for `idle`, which wrk cannot do, and files of 10 MiB, with which it is busier than the server, load.c. In `client`
the client has the processor to itself, and nginx the other. Processor time is that of the server and of all processes that it
has started.

What flatters: wrk sends the same bytes again and again, in `api` five requests in turn whose field lines are the same. Clients do
repeat theirs, and FlowCoro's server reads what a connection repeats once. A request of which all is new costs it 4 µs more, one
of `api` half as much again (docs/design.md, "What a connection repeats is read once").

How to read the tables: as those of net.py: 100 k/s per CPU second are 10 µs of processor time for each request.

SPDX-License-Identifier: MIT
"""

# This file has the name of a module of the standard library, and in its folder the name means this file. So nothing that is
# imported here, nor by the other benchmarks, may import that; the contenders are processes of their own, in another folder.

import dataclasses
import json
import os
import pathlib
import re
import resource
import shutil
import socket
import sys
import tempfile
import time

import kernel
import net
from kernel import Failed

CASES_FOLDER = kernel.HERE / "http_cases"
sys.path.insert(0, str(CASES_FOLDER))

import harness

PEERS = ["uvicorn", "aiohttp", "granian", "uvicorn_h11", "starlette", "blacksheep", "waitress", "gunicorn", "cheroot", "httpx",
         "go"]
OURS = ["flowcoro", "bare", "nginx", "single"]
KIB, MIB = 2**10, 2**20

CONNECTIONS = 64        # of wrk
LARGE_AT_ONCE = 4       # files of 10 MiB: with more of them on their way the generator has to wait for memory, not for the server
ANSWER_LIMIT = 10       # seconds until an answer has to be there, when it is checked
LONGEST = 100           # seconds that --seconds may say: net.LOAD_LIMIT has to be longer


# ---- the cases ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Scale:
    """How much work a case does."""

    seconds: int = 3            # wrk knows no fractions
    warm: float = 1             # before that, not counted; with wrk at least a second, or none
    short: float = 2            # seconds of load.c and of clients
    crowd: int = 10_000
    rate: int = 2_000           # requests a second, of the crowd
    crowd_seconds: float = 30


QUICK = Scale(1, 0, 0.1, 40, 200, 0.25)


@dataclasses.dataclass(frozen=True)
class Case:
    """A load, and what is read off it.

    `server` is the case of http_cases/harness.py, and `load` the method of Lab that measures it, `needs` the programs for that.
    Unless a case is asked for by name it takes at most `rounds_unasked` rounds. The rest as in net.Case.
    """

    name: str
    server: str
    contenders: list
    load: str
    operation: str
    rows: list
    needs: tuple = ("wrk",)
    rounds_unasked: int | None = None


P50, P99 = ("p50_ms", "p50", "ms", {}), ("p99_ms", "p99", "ms", {})


def request_rows(name, title, targets):
    return net.rows_of(name, title, *net.both_rates(targets), P50, P99)


CASES = [
    Case("hello", "hello", ["flowcoro", "uvicorn", "aiohttp", "granian", "uvicorn_h11", "go", "nginx"], "wrk_hello", """
        GET /, to a handler that answers 13 bytes of text.""",
         request_rows("hello", "hello",
                      {"uvicorn": 1.8, "aiohttp": 2, "granian": 1.5, "uvicorn_h11": 4, "go": 0.9, "nginx": 0.5})),
    Case("api", "api", ["flowcoro", "bare", "blacksheep", "aiohttp", "starlette"], "wrk_api", """
        POST of a JSON document of 1 KiB with a query and cookies, in turn to five of 29 routes with parameters in the path; the
        handler looks at all of these, and answers a document of 1 KiB.""",
         request_rows("api", "API", {"blacksheep": 1.6, "aiohttp": 1.6, "starlette": 1.6})),
    Case("wsgi", "wsgi", ["flowcoro", "waitress", "gunicorn", "cheroot"], "wrk_hello", """
        As hello, by an application for WSGI.""",
         request_rows("wsgi", "WSGI hello", {"waitress": 1.5, "gunicorn": 1.5, "cheroot": 1.5})),
    Case("static", "static", ["flowcoro", "nginx"], "wrk_static", """
        GET of a file of 10 KiB.""",
         request_rows("static", "file of 10 KiB", {"nginx": 0.5})),
    Case("large", "static", ["flowcoro", "nginx"], "load_large", """
        GET of a file of 10 MiB, by 4 connections, of which every byte is compared.""",
         net.rows_of("large", "file of 10 MiB", ("speed", "by the clock", "GB/s", {"targets": {"nginx": 0.9}}),
                     ("speed_of_cpu", "per CPU second", "GB/s", {"targets": {"nginx": 0.9}}), P50, P99), ("cc",)),
    Case("client", "client", ["flowcoro", "httpx", "aiohttp"], "run_client", """
        64 tasks of a client GET 13 bytes from nginx, each again and again, by connections that are kept alive.""",
         request_rows("client", "client", {"httpx": 4, "aiohttp": 1.2}), ("nginx",)),
    Case("idle", "hello", ["flowcoro", "uvicorn", "aiohttp", "go", "nginx"], "load_idle", """
        10,000 connections, and 2,000 requests a second over them, one connection after the other, for 30 seconds, whatever the
        answers do; time counts from when a request was due. Lost: reset, not answered, or not before it was the connection's
        turn again. Memory: growth of the server (its resident set) from 100 connections to all, divided by their number; what
        the system keeps for a socket is not in it.""",
         net.rows_of("idle", "10,000 connections", ("lost", "lost", "", {"limit": 0}), P50,
                     ("p99_ms", "p99", "ms", {"limit": 100}), ("max_ms", "longest", "ms", {}),
                     ("memory", "memory of each", "KiB", {"limit": 6}), ("cpu", "per CPU second", "k/s", {})), ("cc",), 1),
    Case("processes", "processes", ["flowcoro", "single"], "wrk_processes", """
        As hello, with a handler that works for some tenths of a millisecond, by two processes, each on a processor of its own, or
        by one. The generator takes its part of whichever; the work is there so that this is small.""",
         net.rows_of("processes", "two processes", ("rate", "by the clock", "k/s", {"targets": {"single": 1.7}}),
                     ("cpu", "per CPU second", "k/s", {}), P50, P99)),
]

REMEDIES = {"wrk": "there is no `wrk`: apt-get install wrk", "nginx": "there is no `nginx`: apt-get install nginx-light"}


# ---- what is asked, and whether the answer is right --------------------------------------------------------------

def head_of(target, *fields):
    return "\r\n".join([f"{'POST' if fields else 'GET'} {target} HTTP/1.1", "Host: 127.0.0.1", *fields, "", ""])


def api_targets():
    """{what to ask for: what the answer has to be}."""
    return {re.sub(r"\{(\w+)(:int)?\}", lambda match: str(found[match[1]]), route) + f"?{harness.QUERY}":
            harness.answer(found, harness.PAGE, harness.WORDS, harness.SESSION, harness.DOCUMENT)
            for route, found in harness.ROUTES.items()}


def exchange(port, head, content=b""):
    """The head (a text) and the content of the answer to a request, by a connection of its own."""
    request = head.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").encode() + content
    with socket.create_connection(("127.0.0.1", port), ANSWER_LIMIT) as sock:
        sock.sendall(request)
        data = b""
        while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < length_of(data):
            some = sock.recv(MIB)
            if not some:
                raise Failed(f"the server ended within its answer: {data[:100]!r}")
            data += some
    head, _, content = data.partition(b"\r\n\r\n")
    return head.decode("latin-1"), content


def length_of(data):
    """Of the content, as the head says that `data` begins with."""
    found = re.search(rb"\r\nContent-Length: *([0-9]+)\r\n", data, re.IGNORECASE)
    if not found:
        raise Failed(f"an answer without a length: {data[:100]!r}")
    return int(found[1])


def check(port, head, content, wanted, decode=bytes):
    head, found = exchange(port, head, content)
    if not head.startswith("HTTP/1.1 200 ") or decode(found) != wanted:
        raise Failed(f"a wrong answer: {head.splitlines()[0]}, {found[:100]!r}")


# ---- processor time ----------------------------------------------------------------------------------------------

def processes_of(pid):
    """The process and its descendants."""
    parents = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:                 # it has ended meanwhile
            pass
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def processor_time(pid):
    """Seconds of the process and its descendants."""
    try:
        return sum(time.clock_gettime(net.clock_of(one)) for one in processes_of(pid))
    except OSError as error:
        raise Failed(f"a process of the server has ended: {error}") from None


def spent_by_children():
    """Seconds of processor time, of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---- measuring ---------------------------------------------------------------------------------------------------

class Lab:
    """All that a measurement needs besides the case and the contender."""

    def __init__(self, folder, python, scale, cases):
        self.folder, self.python, self.scale = folder, python, scale
        self.cores = net.two_cores()
        self.absent = {name: why for name, why in REMEDIES.items() if not shutil.which(name)}
        self.files = folder / "files"
        self.files.mkdir()
        self.pattern = harness.CONTENT + os.urandom(MIB - len(harness.CONTENT))     # every answer is its beginning
        (folder / "pattern").write_bytes(self.pattern)
        (self.files / "small").write_bytes(self.pattern[:10 * KIB])
        (self.files / "large").write_bytes(10 * self.pattern)
        self.options = [f"folder={folder}", f"files={self.files}", f"program={folder / 'go-server'}"]
        if any("cc" in case.needs for case in cases):
            try:
                self.load = net.compile_load(folder, False)
            except Failed as error:
                self.absent["cc"] = str(error)

    def compile_go(self):
        net.run_tool(["go", "build", "-o", str(self.folder / "go-server"), str(CASES_FOLDER / "main.go")],
                     "it compiles main.go: apt-get install golang-go")

    def missing(self, case):
        """Why a case cannot be measured; None where it can."""
        return next((self.absent[name] for name in case.needs if name in self.absent), None)

    def command(self, contender, case, *options):
        return kernel.command_of(self.python, "http_cases", contender, case, *options, *self.options)

    def measure(self, case, contender):
        """{name of a row: its figure} of one contender under one load."""
        return net.figures_of(case, getattr(self, case.load)(case, contender))

    # ---- by wrk

    def wrk(self, process, port, target, words=(), core=None):
        """What wrk reports, and the server's processor time."""
        def run(seconds):
            command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", f"{net.START_LIMIT}s",
                       "-s", str(CASES_FOLDER / "load.lua"), f"http://127.0.0.1:{port}{target}"]
            return json.loads(net.run_generator([*command, "--", *words], core).splitlines()[-1])

        if self.scale.warm:
            run(self.scale.warm)
        server, own = processor_time(process.pid), spent_by_children()
        report = run(self.scale.seconds)
        report["server_cpu"] = processor_time(process.pid) - server
        report["busy"] = (spent_by_children() - own) / report["seconds"]
        if wrong := {what: count for what, count in report["errors"].items() if count}:
            raise Failed("wrk met errors: " + ", ".join(f"{count} of {what}" for what, count in wrong.items()))
        return report

    def wrk_target(self, case, contender, target, wanted):
        with net.serving(self.command(contender, case.server, f"core={self.cores[0]}")) as (process, port):
            net.await_server(port)
            check(port, head_of(target), b"", wanted)
            return self.wrk(process, port, target, core=self.cores[1])

    def wrk_hello(self, case, contender):
        return self.wrk_target(case, contender, "/", harness.CONTENT)

    def wrk_static(self, case, contender):
        return self.wrk_target(case, contender, "/files/small", self.pattern[:10 * KIB])

    def wrk_processes(self, case, contender):
        with net.serving(self.command(contender, case.server)) as (process, port):
            net.await_server(port)
            check(port, head_of("/"), b"", harness.work().encode())
            first, *further = processes_of(process.pid)
            for one, core in zip(further or [first], self.cores):       # else both may stay on one: no other is idle for long
                os.sched_setaffinity(one, {core})
            return self.wrk(process, port, "/")

    def wrk_api(self, case, contender):
        document, targets = json.dumps(harness.DOCUMENT, separators=(",", ":")), api_targets()
        with net.serving(self.command(contender, case.server, f"core={self.cores[0]}")) as (process, port):
            net.await_server(port)
            for target, wanted in targets.items():
                check(port, head_of(target, "Content-Type: application/json", f"Content-Length: {len(document)}",
                                    f"Cookie: {harness.COOKIES}"), document.encode(), wanted, json.loads)
            return self.wrk(process, port, "/", [document, harness.COOKIES, *targets], self.cores[1])

    # ---- by load.c

    def load_target(self, case, contender, target, wanted, words):
        request = self.folder / "request"
        request.write_text(head_of(target))
        with net.serving(self.command(contender, case.server, f"core={self.cores[0]}")) as (process, port):
            net.await_server(port)
            check(port, head_of(target), b"", wanted)
            return net.run_load(self.load, self.cores, [
                *words, f"port={port}", f"pid={process.pid}", f"pattern={self.folder / 'pattern'}", f"http={request}",
                f"size={len(wanted)}", f"warm={min(0.3, self.scale.short / 2)}"])

    def load_large(self, case, contender):
        content = 10 * self.pattern
        report = self.load_target(case, contender, "/files/large", content,
                                  ["echo", f"connections={LARGE_AT_ONCE}", f"seconds={self.scale.short}"])
        return {**report, "operations": report["operations"] * len(content)}       # bytes, for the speed

    def load_idle(self, case, contender):
        return self.load_target(case, contender, "/", harness.CONTENT,
                                ["paced", f"connections={self.scale.crowd}", f"rate={self.scale.rate}",
                                 f"seconds={self.scale.crowd_seconds}"])

    # ---- clients

    def run_client(self, case, contender):
        with net.serving(self.command("nginx", "hello", f"core={self.cores[1]}")) as (process, port):
            net.await_server(port)
            check(port, head_of("/"), b"", harness.CONTENT)
            began, server = time.monotonic(), processor_time(process.pid)
            report = kernel.ask(self.command(contender, "client", f"core={self.cores[0]}", f"url=http://127.0.0.1:{port}/",
                                             f"warm={min(0.3, self.scale.short / 2)}", f"seconds={self.scale.short}"))
            return {**report, "busy": (processor_time(process.pid) - server) / (time.monotonic() - began)}


# ---- the command line --------------------------------------------------------------------------------------------

def seconds_of_crowd(text):
    seconds = float(text)
    if not 0 < seconds <= LONGEST:
        raise ValueError
    return seconds


def add_seconds(parser):
    parser.add_argument("--seconds", type=seconds_of_crowd, metavar="S", default=Scale.crowd_seconds,
                        help=f"how long `idle` takes, at most {LONGEST}; %(default)s unless told otherwise")


def main(argv=None):
    """Run the benchmark and print its report. 0, or 1: FlowCoro failed, or missed a target under --check."""
    options, cases = net.options_and_cases(argv, CASES, "HTTP", "http.py", PEERS, add=add_seconds)
    if options is None:
        return 0
    scale = net.with_room(QUICK if options.quick else Scale(crowd_seconds=options.seconds),
                          any(case.name == "idle" for case in cases))

    with tempfile.TemporaryDirectory(prefix="flowcoro-bench-") as name:
        lab, missing = Lab(pathlib.Path(name), sys.executable, scale, cases), {}
        if options.peers and any("go" in case.contenders for case in cases) and shutil.which("go"):
            try:
                lab.compile_go()
            except Failed as error:
                missing["go"] = str(error)
        lab.python, versions, left_out = net.contenders_of(options, cases, "http_cases", OURS, PEERS, left_out=missing)
        results = net.run_cases(lab, cases, versions, lambda case: options.repeat if case.name in options.case else min(
            options.repeat, case.rounds_unasked or options.repeat))
    return net.deliver("HTTP", CASES, results, versions, left_out, lab.python, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
