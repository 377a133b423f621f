"""The network's benchmark: what an echo, a gigabyte, a TLS handshake … costs a server of FlowCoro, and of its peers.

    python benchmarks/net.py                        FlowCoro's figures next to those of bare loops, in four minutes
    python benchmarks/net.py --peers                and to uvloop, asyncio, trio, curio and gevent; a quarter of an hour
    python benchmarks/net.py --peers --case echo --repeat 15
    python benchmarks/net.py --list                 what each case does

`python -m flowcoro bench net` is the same program. It needs Linux, a C compiler (`apt-get install gcc libc6-dev`), and
for TLS OpenSSL's headers and command (`apt-get install libssl-dev openssl`); the rest as in kernel.py, whose environment
for the peers it shares.

What is compared: `net_cases/` has one file for each contender, a server as that library's own manual would write it. Read
them side by side before you believe a ratio. `uvloop` runs asyncio's file word for word, streams on uvloop's loop;
`protocol` is uvloop with callbacks that C calls; `bare` is a loop round epoll, by hand, without any runtime; `blocking`
blocking sockets with one connection at a time, `sendfile` and `shutil` the standard library's ways to send a file by
them.

How it is measured: a server has a processor to itself, and the load generator, load.c, another one. It is written in C so
that it is not what is measured; where it was busy for more than nine tenths of the time, a line below the tables says so.
It never sleeps, for a server that has to wake its clients up pays for that, the more the slower it is.
Each figure comes from a server process of its own; the contenders take turns, and in every round another goes first. A
server's processor time (user and system) is its own, as the system counts it, from the same moments as the requests.

How to read the tables: as those of kernel.py. Two rates are given for requests: by the clock, and by the processor time
of the server, the steadier of the two; 100 k/s per CPU second are 10 µs of processor time for each. The targets are the
project's own. On a machine with one processor the generator and the server take each other's time, and only the second
rate means anything.

SPDX-License-Identifier: MIT
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import platform
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

import kernel
from kernel import Failed, say

PEERS = ["uvloop", "asyncio", "trio", "protocol", "curio", "gevent"]
OURS = ["flowcoro", "bare", "blocking", "sendfile", "shutil"]
MIB = 2**20

START_LIMIT = 20        # seconds until a server has to listen
LOAD_LIMIT = 150        # seconds until a load generator is given up; it has limits of its own, which are shorter
NAME_OF_PYTHON = "import json, platform as p; print(json.dumps(f'{p.python_implementation()} {p.python_version()}'))"
BUSY = 0.9              # of its time: beyond that the generator may be what was measured
SPARE = 200             # descriptors that a process has besides its connections
CPUCLOCK_SCHED = 2      # of Linux


# ---- the cases ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Scale:
    """How much work a case does."""

    seconds: float = 2.0
    crowd_seconds: float = 5.0
    connections: int = 100
    crowd: int = 10_000
    bulk: int = 1024 * MIB


QUICK = Scale(0.1, 0.25, 4, 40, 2 * MIB)


@dataclasses.dataclass(frozen=True)
class Case:
    """A load, and what is read off it.

    `server` is the case of net_cases/harness.py that the servers run; `load(scale)` the words for load.c. `rows` are those
    of the tables, as kernel.Case, and `figures` maps the key of each row (its name after the colon) to what computes it
    from the generator's report.
    """

    name: str
    server: str
    contenders: list
    load: object
    operation: str
    rows: list
    tls: bool = False


@dataclasses.dataclass(frozen=True)
class PlainCase:
    """What is done, and what is read off it: as Case, for what needs no load of load.c."""

    name: str
    contenders: list
    operation: str
    rows: list


def rate(done):
    return done["operations"] / done["seconds"] / 1e3


def rate_of_cpu(done):
    """The system counts processor time at the ticks of its clock: some milliseconds, where a quick run may find none at all."""
    return done["operations"] / max(done["server_cpu"], 0.001) / 1e3


FIGURES = {
    "cpu": rate_of_cpu, "rate": rate, "client": lambda done: rate_of_cpu({**done, "server_cpu": done["client_cpu"]}),
    "speed": lambda done: rate(done) / 1e6,
    "speed_of_cpu": lambda done: rate_of_cpu(done) / 1e6,
    "p50": lambda done: done["p50"] * 1e6, "p99": lambda done: done["p99"] * 1e6,
    "p50_ms": lambda done: done["p50"] * 1e3, "p99_ms": lambda done: done["p99"] * 1e3, "max_ms": lambda done: done["max"] * 1e3,
    "lost": lambda done: done["broken"] + done["unanswered"] + done["skipped"],
    "memory": lambda done: done["memory"] / 1024,
    "busy": lambda done: 100 * done["busy"],
}


def rows_of(name, title, *rows):
    """As plain_rows(); the last row of each load says how busy the generator was."""
    return plain_rows(name, title, *rows, ("busy", "generator busy", "%", {}))


def plain_rows(name, title, *rows):
    """kernel.Case for each (key, title, unit, further arguments)."""
    return [kernel.Case(f"{name}:{key}", f"{title}: {what}", unit, "", **more) for key, what, unit, more in rows]


def both_rates(targets):
    return ("cpu", "per CPU second", "k/s", {"targets": targets}), ("rate", "by the clock", "k/s", {"targets": targets})


def bulk_rows(targets):
    return ("speed", "by the clock", "GB/s", {"targets": targets}), ("speed_of_cpu", "per CPU second", "GB/s", {})


def echo_load(scale, *further):
    return ["echo", f"connections={scale.connections}", "size=1024", f"seconds={scale.seconds}", *further]


STREAMS = ["flowcoro", "bare", *PEERS]

CASES = [
    Case("echo", "echo", STREAMS, echo_load, """
        100 connections; each sends 1 KiB, waits until it has come back, and sends the next. By the server's processor
        time, and by the clock.""",
         rows_of("echo", "echo", *both_rates({"uvloop": 1.3, "asyncio": 1.5, "trio": 2.5, "protocol": 0.9, "bare": 0.85}),
                 ("p99_ms", "p99", "ms", {}))),
    Case("latency", "echo", STREAMS,
         lambda scale: ["echo", "connections=1", "size=1024", "think=50", f"seconds={scale.seconds}"], """
        The same with one connection, and 50 µs between an answer and the next request, in which the server goes to sleep: how
        long an answer takes.""",
         rows_of("latency", "one connection", ("p50", "p50", "µs", {"targets": {"uvloop": 1}}), ("p99", "p99", "µs", {}))),
    Case("crowd", "echo", STREAMS,
         lambda scale: ["paced", f"connections={scale.crowd}", "size=1024", f"seconds={scale.crowd_seconds}"], """
        10,000 connections; each sends 1 KiB once a second, whatever the answers do, and time counts from when it was due.
        Lost: reset, not answered, or not within a second. Memory: growth of the server (its resident set) from 100
        connections to all, divided by their number; what the system keeps for a socket is not in it.""",
         rows_of("crowd", "10,000 connections", ("lost", "lost", "", {"limit": 0}),
                 ("p99_ms", "p99", "ms", {"limit": 50, "targets": {"uvloop": 1}}), ("max_ms", "longest", "ms", {}),
                 ("memory", "memory of each", "KiB", {"limit": 4}), ("cpu", "per CPU second", "k/s", {}))),
    Case("tls", "echo", ["flowcoro", *PEERS], functools.partial(echo_load), """
        As echo, by TLS 1.3.""",
         rows_of("tls", "TLS echo", *both_rates({"asyncio": 1, "uvloop": 0.9})), tls=True),
    Case("handshake", "echo", ["flowcoro", *PEERS],
         lambda scale: ["connect", f"connections={scale.connections // 4}", "size=16", f"seconds={scale.seconds}"], """
        25 clients, each of which connects, makes a TLS 1.3 handshake (a certificate of RSA 2048; nothing is resumed), has 16
        bytes sent back, says goodbye, and connects again.""",
         rows_of("handshake", "TLS handshakes", *both_rates({"asyncio": 1, "uvloop": 0.9})), tls=True),
    Case("receive", "receive", ["flowcoro", "blocking", *PEERS], lambda scale: ["push", f"bytes={scale.bulk}", "repeat=4"], """
        The server reads 1 GiB from one connection and answers how many bytes there were, four times one after the other.""",
         rows_of("receive", "1 GiB received", *bulk_rows({"blocking": 0.9}))),
    Case("send", "send", ["flowcoro", "blocking", *PEERS], lambda scale: ["pull", f"bytes={scale.bulk}", "repeat=4"], """
        The server writes 1 GiB out of its memory into one connection, four times.""",
         rows_of("send", "1 GiB sent", *bulk_rows({"blocking": 0.9}))),
    Case("file", "file", ["flowcoro", "blocking", "sendfile", "shutil", "asyncio"],      # the others have nothing for it
         lambda scale: ["pull", f"bytes={scale.bulk}", "repeat=4"], """
        The server sends a file of 1 GiB, which is in the system's cache, by its own means for that, four times.""",
         rows_of("file", "file of 1 GiB", *bulk_rows({"blocking": 0.9, "sendfile": 0.9, "shutil": 0.9}))),
]
BULK = ["receive", "send", "file"]


# ---- what has to be there ----------------------------------------------------------------------------------------

def run_tool(command, remedy):
    """Run a tool of the system's; Failed, with the remedy, when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError:
        raise Failed(f"there is no `{command[0]}`: {remedy}") from None
    if done.returncode:
        found = [line for line in done.stderr.splitlines() if "error" in line] or [kernel.last_line(done.stderr)]
        raise Failed(f"`{command[0]}` failed ({found[0].strip()}): {remedy}")


def compile_load(folder, with_tls):
    """The load generator, compiled into `folder`."""
    program = folder / "load"
    run_tool([os.environ.get("CC", "cc"), "-O2", "-o", str(program), str(kernel.HERE / "load.c"),
              *(["-DTLS", "-lssl", "-lcrypto"] if with_tls else [])],
             "TLS is measured with OpenSSL: apt-get install libssl-dev" if with_tls else
             "benchmarks/load.c has to be compiled: apt-get install gcc libc6-dev, or name a compiler in CC")
    return program


def make_certificate(folder):
    """The options that give a server its key and its certificate, signed by itself.

    RSA, for a signature by it costs the server more than the client: with ECDSA the generator had more to do than the server.
    """
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    run_tool(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "7", "-subj", "/CN=localhost",
              "-keyout", str(key), "-out", str(certificate)],
             "it makes the certificate: apt-get install openssl")
    return [f"certificate={certificate}", f"key={key}"]


def make_data(folder, bulk):
    """The options that give a server the block, and the file that consists of it."""
    pattern, file = folder / "pattern", folder / "file"
    block = os.urandom(MIB)
    pattern.write_bytes(block)
    if bulk:
        with open(file, "wb") as out:
            for _ in range(bulk // MIB):
                out.write(block)
    return [f"pattern={pattern}", f"file={file}"]


def two_cores():
    """The processors of the server and of the generator: as far apart as there are."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[0], cores[-1]


def raise_limit(wanted):
    """Allow this process, and those it starts, so many descriptors; how many it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else soft


# ---- measuring ---------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def serving(command):
    """The process of a server, and its port. However this is left, it is ended, and all that it has started."""
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True,
            env=kernel.clean_environment(), start_new_session=True) as process:
        try:
            line = ""
            if select.select([process.stdout], [], [], START_LIMIT)[0]:
                line = process.stdout.readline()
            if not line:
                said.seek(0)
                raise Failed(f"the server did not start: {kernel.last_line(said.read())}")
            yield process, json.loads(line)["port"]
        finally:
            os.killpg(process.pid, signal.SIGKILL)          # not waited for yet, so the number is still its own


def await_server(port):
    """Return when somebody listens."""
    limit = time.monotonic() + START_LIMIT
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError as error:
            if time.monotonic() > limit:
                raise Failed(f"the server does not listen after {START_LIMIT} s: {error}") from None
            time.sleep(0.02)


def clock_of(pid):
    """The clock of a process's processor time, as in clock_getcpuclockid(3): nanoseconds, where /proc/PID/stat counts ticks."""
    return ~pid << 3 | CPUCLOCK_SCHED


def run_load(program, cores, words):
    """What load.c reports, run on the second of the two cores."""
    command = [str(program), *words, f"spin={int(cores[0] != cores[1])}"]
    return json.loads(run_generator(command, cores[1]))


def run_generator(command, core):
    """What a load generator prints, run on a processor of its own, or on all where `core` is None."""
    pin = None if core is None else functools.partial(os.sched_setaffinity, 0, {core})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_LIMIT, stdin=subprocess.DEVNULL,
                              preexec_fn=pin)
    except subprocess.TimeoutExpired:
        raise Failed(f"the load was not done within {LOAD_LIMIT} s") from None
    if done.returncode:
        raise Failed(kernel.last_line(done.stderr))
    return done.stdout


def figures_of(case, report):
    """{name of a row: its figure}, out of what a generator reports."""
    return {row.name: FIGURES[row.name.partition(":")[2]](report) for row in case.rows}


class Lab:
    """All that a measurement needs besides the case and the contender."""

    def __init__(self, folder, python, scale, wants_tls, wants_file):
        self.python, self.scale, self.missing_tls = python, scale, None
        self.data = make_data(folder, scale.bulk if wants_file else 0)
        self.certificate = []
        self.cores = two_cores()
        if wants_tls:
            try:
                self.certificate = make_certificate(folder)
                self.program = compile_load(folder, True)
                return
            except Failed as error:
                self.missing_tls = str(error)
        self.program = compile_load(folder, False)

    def missing(self, case):
        """Why a case cannot be measured; None where it can."""
        return self.missing_tls if case.tls else None

    def measure(self, case, contender):
        """{name of a row: its figure} of one server under one load."""
        command = kernel.command_of(self.python, "net_cases", contender, case.server, f"core={self.cores[0]}", *self.data,
                                    *(self.certificate if case.tls else []))
        with serving(command) as (process, port):
            return figures_of(case, run_load(self.program, self.cores, [
                *case.load(self.scale), f"port={port}", f"pid={process.pid}", f"tls={int(case.tls)}", self.data[0],
                f"warm={min(0.3, self.scale.seconds / 2)}"]))


def run_case(lab, case, contenders, rounds):
    """{row: what kernel.summarize() takes of it}."""
    if reason := lab.missing(case):
        return {row.name: ({}, {"flowcoro": reason} if row is case.rows[0] else {}) for row in case.rows}
    figures, failed = kernel.measure(case.name, contenders, rounds, functools.partial(lab.measure, case))
    return {row.name: ({name: [done[row.name] for done in rounds] for name, rounds in figures.items()},
                       failed if row is case.rows[0] else {}) for row in case.rows}


def busy_generators(report):
    """Where the generator may have been what was measured."""
    return [f"{case['title'].partition(':')[0]}: {name} ({known['median']:.0f} %)"
            for row, case in report["cases"].items() if row.endswith(":busy")
            for name, known in case["figures"].items() if known["median"] > 100 * BUSY]


# ---- the command line --------------------------------------------------------------------------------------------

def print_list(cases):
    for case in cases:
        rows = (row.title.partition(": ")[2] + f" ({row.unit})" * bool(row.unit) for row in case.rows)
        print(f"{case.name:11} {', '.join(rows)}")
        print(textwrap.indent(textwrap.fill(" ".join(case.operation.split()), 100), " " * 12))
    print("\nrates (k/s, GB/s): more is better; costs (ns, µs, ms, KiB): less is better")


def options_and_cases(argv, cases, what, script, peers, groups={}, add=lambda parser: None):
    """(options, the cases that are asked for); (None, None) when all there was to do was to list them.

    groups: {name: names of cases} that --case takes as well. add(parser): what else the command line has.
    """
    names = [case.name for case in cases]
    parser = kernel.parser_of(what, script, peers, [*names, *groups])
    parser.add_argument("--quick", action="store_true",
                        help="few connections, a moment each: to see that it works, not how fast")
    add(parser)
    options = kernel.parsed(parser, argv)
    if options.list:
        print_list(cases)
        return None, None
    if sys.platform != "linux":
        raise SystemExit(f"this benchmark needs Linux, for epoll and /proc; this is {sys.platform}")
    asked = {name for word in options.case for name in groups.get(word, [word])}
    return options, [case for case in cases if not asked or case.name in asked]


def contenders_of(options, cases, folder, ours, peers, also={}, left_out={}):
    """(the interpreter that runs them, {contender: version}, {contender: why it is left out}).

    also: {contender: the package that it needs besides}. left_out: those for which something else is missing.
    """
    python, missing = sys.executable, {}
    if options.peers:
        python, missing = kernel.prepare_environment(options.env.expanduser().absolute())
    left_out = {**missing, **left_out, **{name: missing[package] for name, package in also.items() if package in missing}}
    known = [name for name in [*ours, *(peers if options.peers else [])] if any(name in case.contenders for case in cases)]
    return python, kernel.versions_of(python, folder, known, left_out), left_out


def run_cases(lab, cases, versions, rounds):
    """{row: figures} of all cases. rounds: of a case."""
    results = {}
    for case in cases:
        results |= run_case(lab, case, [name for name in versions if name in case.contenders], rounds(case))
    return results


def with_room(scale, wants_crowd):
    """The scale, with no more connections than the system allows; its limit is raised as far as it goes."""
    allowed = raise_limit(scale.crowd + SPARE)
    if allowed < scale.crowd + SPARE and wants_crowd:
        scale = dataclasses.replace(scale, crowd=allowed - SPARE)
        say(f"only {scale.crowd:,} connections at a time: `ulimit -Hn` is {allowed}")
    return scale


def deliver(what, cases, results, versions, left_out, python, options):
    """Print the report on `what`; the exit status."""
    rows = {row.name: row for case in cases for row in case.rows}
    implementation = kernel.ask([python, "-c", NAME_OF_PYTHON])
    report = {"heading": f"FlowCoro's {what}, {implementation}, {platform.system()} {platform.machine()}, "
                         f"{len(os.sched_getaffinity(0))} cores, medians of {options.repeat} rounds"
                         + ("; quick, the figures mean nothing" if options.quick else ""),
              "rounds": options.repeat, "versions": versions, "left_out": left_out,
              "groups": [[row.name for row in case.rows] for case in cases],
              **kernel.summarize(rows, results, list(versions))}
    report["busy"] = busy_generators(report)
    status = kernel.deliver(report, results, options)
    if report["busy"] and not options.json:
        print("the generator was busy most of the time, and may be what was measured: " + "; ".join(report["busy"]))
    return status


def main(argv=None):
    """Run the benchmark and print its report. 0, or 1: FlowCoro failed, or missed a target under --check."""
    options, cases = options_and_cases(argv, CASES, "network", "net.py", PEERS, {"bulk": BULK})
    if options is None:
        return 0
    scale = with_room(QUICK if options.quick else Scale(), any(case.name == "crowd" for case in cases))

    with tempfile.TemporaryDirectory(prefix="flowcoro-bench-") as folder:
        try:
            lab = Lab(pathlib.Path(folder), sys.executable, scale, any(case.tls for case in cases),
                      any(case.name == "file" for case in cases))
        except Failed as error:
            raise SystemExit(str(error)) from None
        lab.python, versions, left_out = contenders_of(options, cases, "net_cases", OURS, PEERS, {"protocol": "uvloop"})
        results = run_cases(lab, cases, versions, lambda case: options.repeat)

    return deliver("network", CASES, results, versions, left_out, lab.python, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
