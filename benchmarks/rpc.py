"""The benchmark of RPC: what a call costs FlowCoro's server and client, and their peers.

    python benchmarks/rpc.py                        FlowCoro's figures alone, in half a minute
    python benchmarks/rpc.py --peers                next to those of aiohttp, grpc.aio and RPyC, in two minutes
    python benchmarks/rpc.py --peers --case flight --repeat 15
    python benchmarks/rpc.py --list                 what each case does

`python -m flowcoro bench rpc` is the same program. It needs Linux; the environment for the peers is that of kernel.py.

What is compared: `rpc_cases/` has one file for each contender, as its own manual would write it. Read them side by side before
you believe a ratio. They do not speak the same protocol: FlowCoro's is JSON-RPC in lines, aiohttp's JSON by POST, gRPC's Protocol
Buffers over HTTP/2, by a core in C, and RPyC's one of its own, in Python. aiohttp runs on uvloop, and its parser is in C; it
takes 64 connections for 64 calls, since HTTP/1.1 has no other way. RPyC's client has no tasks: one loop sends 64 calls ahead by
async_(), which it does some twenty times as fast as 64 threads that each await theirs. `bare` sends a text with its length before
it and has it back, on flowcoro_net: no JSON, no methods, no calls that are told apart.

How it is measured: each contender's client calls its own server. The server has a processor to itself, and the client, which the
tables call the generator, another one. By the clock the slower of the two counts, which is often the client; so there are three
rates: by the clock, and by the processor time of each end. The text that is sent and comes back has 1 KiB.

How to read the tables: as those of net.py: 100 k/s per CPU second are 10 µs of processor time for each call.

SPDX-License-Identifier: MIT
"""

import sys

import kernel
import net

PEERS = ["aiohttp", "grpc", "rpyc"]
OURS = ["flowcoro", "bare"]
ALL = ["flowcoro", *PEERS]


# ---- the cases ---------------------------------------------------------------------------------------------------

def rates(targets):
    return *net.both_rates(targets), ("client", "per CPU second of the client", "k/s", {})


P50, P99 = ("p50", "p50", "µs", {}), ("p99", "p99", "µs", {})

CASES = [
    net.PlainCase("flight", ALL, """
        64 calls are on their way over one connection (aiohttp: 64 connections), each with a text of 1 KiB that comes back; when
        one is answered, the next is sent.""",
         net.rows_of("flight", "64 calls in flight", *rates({"aiohttp": 3, "grpc": 1.5, "rpyc": 3}), P50, P99)),
    net.PlainCase("latency", [*OURS, *PEERS], """
        One call at a time, and 50 µs between its answer and the next one, in which the server goes to sleep: how long an answer
        takes.""",
         net.rows_of("latency", "one at a time", ("p50", "p50", "µs", {"targets": {"bare": 1.2}}), P99,
                 ("cpu", "per CPU second", "k/s", {}))),
    net.PlainCase("batch", ["flowcoro"], """
        64 calls are one message, and their answers another; what is counted are the calls.""",
         net.rows_of("batch", "batches of 64 calls", *rates({}), P50)),
    net.PlainCase("stream", ALL, """
        The server sends streams of 1,000 texts of 1 KiB, one after the other; what is counted are the texts. RPyC's generator is
        called for each.""",
         net.rows_of("stream", "items of a stream", *rates({}))),
]


# ---- measuring ---------------------------------------------------------------------------------------------------

class Lab:
    """All that a measurement needs besides the case and the contender."""

    def __init__(self, python, seconds):
        self.python, self.seconds, self.cores = python, seconds, net.two_cores()

    def missing(self, case):
        """Why a case cannot be measured: there is nothing that could be missing."""

    def command(self, contender, case, core, *options):
        return kernel.command_of(self.python, "rpc_cases", contender, case, f"core={self.cores[core]}", *options)

    def measure(self, case, contender):
        """{name of a row: its figure} of one contender."""
        with net.serving(self.command(contender, "serve", 0)) as (process, port):
            net.await_server(port)
            return net.figures_of(case, kernel.ask(self.command(
                contender, case.name, 1, f"port={port}", f"pid={process.pid}", f"warm={min(0.3, self.seconds / 2)}",
                f"seconds={self.seconds}")))


# ---- the command line --------------------------------------------------------------------------------------------

def main(argv=None):
    """Run the benchmark and print its report. 0, or 1: FlowCoro failed, or missed a target under --check."""
    options, cases = net.options_and_cases(argv, CASES, "RPC", "rpc.py", PEERS)
    if options is None:
        return 0
    python, versions, left_out = net.contenders_of(options, cases, "rpc_cases", OURS, PEERS)
    results = net.run_cases(Lab(python, 0.1 if options.quick else 2.0), cases, versions, lambda case: options.repeat)
    return net.deliver("RPC", CASES, results, versions, left_out, python, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
