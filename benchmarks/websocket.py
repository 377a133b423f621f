"""The benchmark of WebSocket: what a message costs FlowCoro's server and client, and their peers.

    python benchmarks/websocket.py                  FlowCoro's figures next to those of bare loops, in a minute
    python benchmarks/websocket.py --peers          next to those of websockets and aiohttp, in five minutes
    python benchmarks/websocket.py --peers --case echo --repeat 15
    python benchmarks/websocket.py --list           what each case does

`python -m flowcoro bench websocket` is the same program. It needs Linux and a C compiler (`apt-get install gcc libc6-dev`); the
environment for the peers is that of kernel.py.

What is compared: `websocket_cases/` has one file for each contender, as its own manual would write it. Read them side by side
before you believe a ratio. websockets runs on asyncio, with its speed-up in C; aiohttp's parser of frames and its masking are in
C too, and it runs on asyncio and on uvloop. `bare` is a loop round epoll, by hand, that unmasks, sends, and checks nothing: what
Python leaves to be won.

Compression is off: load.c offers none, and the servers would decline it. Keep-alive is as each has it by default: FlowCoro and
websockets ping every 20 seconds, aiohttp does not. FlowCoro's and aiohttp's servers route the request for the handshake; that of
websockets does nothing else but speak WebSocket.

How it is measured: as in net.py. A server has a processor to itself, and load.c another one: it masks what it sends, and compares
every byte that comes. In `client` the client has the processor to itself, and FlowCoro's server the other; there the processor
time counts, for the server may be what limits the rate.

How to read the tables: as those of net.py: 100 k/s per CPU second are 10 µs of processor time for each message.

SPDX-License-Identifier: MIT
"""

import dataclasses
import os
import pathlib
import string
import sys
import tempfile
import time

import kernel
import net
from kernel import Failed

PEERS = ["websockets", "aiohttp", "aiohttp_uvloop"]
OURS = ["flowcoro", "bare"]
KIB, MIB = 2**10, 2**20


# ---- the cases ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Scale:
    """How much work a case does."""

    seconds: float = 2.0
    connections: int = 100
    members: int = 1_000        # of the room that is broadcast to
    crowd: int = 2_000          # connections that are idle


QUICK = Scale(0.1, 4, 10, 20)
BURST = 8                       # messages
CROWD_SECONDS = 1.0             # in which each of them says something once: before that many a buffer is not there yet


def words(scale, mode, connections, size, *further):
    return [mode, f"connections={connections}", f"size={size}", f"seconds={scale.seconds}",
            f"warm={min(0.3, scale.seconds / 2)}", *further]


CONTENDERS, WITH_BARE = ["flowcoro", *PEERS], [*OURS, *PEERS]
P50, P99 = ("p50_ms", "p50", "ms", {}), ("p99_ms", "p99", "ms", {})

CASES = [
    net.Case("echo", "echo", WITH_BARE, lambda scale: words(scale, "echo", scale.connections, 100, "text=1"), """
        100 connections; each sends a text of 100 bytes, waits until it has come back, and sends the next.""",
             net.rows_of("echo", "echo", *net.both_rates({"websockets": 2, "aiohttp": 1.2, "aiohttp_uvloop": 1.2}), P50, P99)),
    net.Case("echo64k", "echo", WITH_BARE, lambda scale: words(scale, "echo", scale.connections, 64 * KIB), """
        The same with binary messages of 64 KiB.""",
             net.rows_of("echo64k", "echo of 64 KiB",
                         *net.both_rates({"websockets": 0.9, "aiohttp": 0.9, "aiohttp_uvloop": 0.9}), P50, P99)),
    net.Case("broadcast", "broadcast", WITH_BARE,
             lambda scale: words(scale, "broadcast", min(scale.members, scale.crowd), 100, "text=1"), """
        1,000 clients; one sends a text of 100 bytes, which the server sends to all of them; when all have it, the next. What is
        counted are the messages that have arrived, and a time is that from the sending to the arrival at one of them.""",
             net.rows_of("broadcast", "broadcast to 1,000", *net.both_rates({"websockets": 2}), P50, P99)),
    net.Case("burst", "broadcast", CONTENDERS,
             lambda scale: words(scale, "broadcast", min(scale.members, scale.crowd), 100, "text=1", f"burst={BURST}"), """
        As broadcast, with 8 messages that come at once, as they do where several speak; when all have all, the next.""",
             net.rows_of("burst", "broadcast of 8", *net.both_rates({"websockets": 2}), P50, P99)),
    net.Case("idle", "echo", CONTENDERS,
             lambda scale: ["paced", f"connections={scale.crowd}", "size=100", f"seconds={CROWD_SECONDS}", "warm=0", "text=1"],
             """
        2,000 connections, of which each has had one text of 100 bytes back. Memory: growth of the server (its resident set) from
        20 connections to all, divided by their number; what the system keeps for a socket is not in it.""",
             net.rows_of("idle", "2,000 connections", ("lost", "lost", "", {"limit": 0}),
                         ("memory", "memory of each", "KiB", {"targets": {"websockets": 0.5}}))),
    net.Case("client", "client", CONTENDERS, None, """
        64 tasks of a client send a text of 100 bytes to FlowCoro's server and await it, each again and again.""",
             net.rows_of("client", "client", *net.both_rates({}), P50, P99)),
]


# ---- measuring ---------------------------------------------------------------------------------------------------

class Lab:
    """All that a measurement needs besides the case and the contender."""

    def __init__(self, folder, python, scale):
        self.python, self.scale = python, scale
        self.cores = net.two_cores()
        self.bytes, self.letters = folder / "bytes", folder / "letters"         # what messages are cut from
        block = os.urandom(MIB)
        self.bytes.write_bytes(block)
        self.letters.write_bytes(block.translate(bytes(string.ascii_letters[byte % 52].encode()[0] for byte in range(256))))
        self.load = net.compile_load(folder, False)

    def missing(self, case):
        """Why a case cannot be measured: all that they need is there, or there is no Lab."""

    def command(self, contender, case, core, *options):
        return kernel.command_of(self.python, "websocket_cases", contender, case, f"core={self.cores[core]}", *options)

    def measure(self, case, contender):
        """{name of a row: its figure} of one contender under one load."""
        return net.figures_of(case, (self.run_load if case.load else self.run_client)(case, contender))

    def run_load(self, case, contender):
        load = case.load(self.scale)
        pattern = self.letters if "text=1" in load else self.bytes
        with net.serving(self.command(contender, case.server, 0)) as (process, port):
            # The first connection of all is this one. Where the first are those of the load, asyncio's buffers of 256 KiB may be
            # given back to the system at each read, by malloc, and a message then costs it twice as much: to its advantage.
            net.await_server(port)
            return net.run_load(self.load, self.cores, [*load, f"port={port}", f"pid={process.pid}", f"pattern={pattern}",
                                                        "websocket=/"])

    def run_client(self, case, contender):
        with net.serving(self.command("flowcoro", "echo", 1)) as (process, port):
            net.await_server(port)
            began, server = time.monotonic(), time.clock_gettime(net.clock_of(process.pid))
            report = kernel.ask(self.command(contender, "client", 0, f"url=ws://127.0.0.1:{port}/",
                                             f"warm={min(0.3, self.scale.seconds / 2)}", f"seconds={self.scale.seconds}"))
            spent = time.clock_gettime(net.clock_of(process.pid)) - server
            return {**report, "busy": spent / (time.monotonic() - began)}


# ---- the command line --------------------------------------------------------------------------------------------

def main(argv=None):
    """Run the benchmark and print its report. 0, or 1: FlowCoro failed, or missed a target under --check."""
    options, cases = net.options_and_cases(argv, CASES, "WebSocket", "websocket.py", PEERS)
    if options is None:
        return 0
    scale = net.with_room(QUICK if options.quick else Scale(), any(case.name in ("broadcast", "burst", "idle") for case in cases))

    with tempfile.TemporaryDirectory(prefix="flowcoro-bench-") as folder:
        try:
            lab = Lab(pathlib.Path(folder), sys.executable, scale)
        except Failed as error:
            raise SystemExit(str(error)) from None
        lab.python, versions, left_out = net.contenders_of(
            options, cases, "websocket_cases", OURS, PEERS, {"aiohttp_uvloop": "uvloop"})
        if not versions:
            return 1
        results = net.run_cases(lab, cases, versions, lambda case: options.repeat)
    return net.deliver("WebSocket", CASES, results, versions, left_out, lab.python, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
