"""What every `cases_*.py` beside this file shares: the command line, the word where a server is, what a client does.

A `cases_*.py` is one contender, written as its own manual would write it, and runs one case until it is killed or done:

    python cases_grpc.py serve key=value …          {"port": 43210}: it listens there on 127.0.0.1, or will soon
    python cases_grpc.py flight port=43210 …        calls that server, and says in its last line how often
    python cases_grpc.py version                    {"version": "1.83.0"}

A server has two methods: `echo` answers with the text that it is called with, and `count` is a stream of so many texts. What the
clients do, over one connection where the contender's protocol lets them:

    flight      64 calls of `echo` are on their way, all the time
    latency     one is; between an answer and the next call the client waits some microseconds, in which the server goes to sleep
    batch       64 calls of `echo` are one message, and so are their answers
    stream      reads streams of 1000 texts, one after the other

Every text is compared. The option `core` is the processor to stay on; a client is told `port`, `pid` (the server's, for its
processor time), `warm` and `seconds`.

SPDX-License-Identifier: MIT
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time

TEXT = ("What comes back has to be this, and all of it; " * 22)[:1024]
IN_FLIGHT = 64
ITEMS = 1000            # of a stream
THINK = 50e-6           # seconds; as in ../net.py
BACKLOG = 1024          # connections that wait to be accepted: more than come at a time

OPTIONS = {}            # of the command line

PR_SET_PDEATHSIG = 1    # of prctl(): which signal comes when the parent has gone
CPUCLOCK_SCHED = 2      # of Linux: the clock of a process's processor time, as in clock_getcpuclockid(3)

clock = time.perf_counter


def ready(port):
    """Tell the benchmark where to connect to; it tries again until somebody listens."""
    print(json.dumps({"port": port}), flush=True)


def listener():
    """A socket that listens on a free port of 127.0.0.1, and the benchmark has been told."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    ready(sock.getsockname()[1])
    return sock


def free_port():
    """A port on which nobody listens, for servers that want a number; the benchmark has been told."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    ready(port)
    return port


def port():
    """Of the server that a client calls."""
    return int(OPTIONS["port"])


class Measurement:
    """Of a client: `for end in measurement:` do it until clock() is `end`, twice, of which the second time counts."""

    def __iter__(self):
        server = ~int(OPTIONS["pid"]) << 3 | CPUCLOCK_SCHED
        for seconds in (float(OPTIONS["warm"]), float(OPTIONS["seconds"])):
            self.times, self.done = [], 0           # seconds of each call; operations, where they are not one each
            began, client, serving = clock(), time.process_time(), time.clock_gettime(server)
            yield began + seconds
            took, client = clock() - began, time.process_time() - client
            serving = time.clock_gettime(server) - serving
        times = sorted(self.times)
        quantiles = {name: times[int(part * (len(times) - 1))] for name, part in (("p50", 0.5), ("p99", 0.99))} if times else {}
        print(json.dumps({"operations": self.done or len(times), "seconds": took, "server_cpu": serving, "client_cpu": client,
                          "busy": client / took, **quantiles}), flush=True)

    def check(self, answer, began):
        """`answer` has come to the call that began then."""
        if answer != TEXT:
            raise ValueError(f"the answer was {answer!r:.100}")
        self.times.append(clock() - began)


async def flight(call, gather):
    """`await call(TEXT)` is the answer; `await gather(*coroutines)` runs all at once."""
    async def again_and_again(end):
        while (began := clock()) < end:
            measurement.check(await call(TEXT), began)

    measurement = Measurement()
    for end in measurement:
        await gather(*(again_and_again(end) for _ in range(IN_FLIGHT)))


async def latency(call):
    measurement = Measurement()
    for end in measurement:
        while (began := clock()) < end:
            measurement.check(await call(TEXT), began)
            think()


def think():
    until = clock() + THINK
    while clock() < until:
        pass


async def batch(call_all):
    """`await call_all([TEXT, …])` are the answers."""
    texts = [TEXT] * IN_FLIGHT
    measurement = Measurement()
    for end in measurement:
        while (began := clock()) < end:
            if list(await call_all(texts)) != texts:
                raise ValueError("a wrong answer")
            measurement.times.append(clock() - began)
            measurement.done += IN_FLIGHT


async def stream(open_stream):
    """`open_stream(ITEMS)` is an async iterator of texts."""
    measurement = Measurement()
    for end in measurement:
        while clock() < end:
            count = 0
            async for text in open_stream(ITEMS):
                if text != TEXT:
                    raise ValueError(f"an item was {text!r:.100}")
                count += 1
            if count != ITEMS:
                raise ValueError(f"a stream had {count} items")
            measurement.done += count


def main(cases, version):
    """Do what the command line asks for: one of `cases`, {name: function}."""
    if sys.argv[1] == "version":
        print(json.dumps({"version": version}))
        return
    OPTIONS.update(word.split("=", 1) for word in sys.argv[2:])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if "core" in OPTIONS:
        os.sched_setaffinity(0, {int(OPTIONS["core"])})
    cases[sys.argv[1]]()
