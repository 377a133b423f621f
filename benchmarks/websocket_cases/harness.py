"""What every `cases_*.py` beside this file shares: the command line, the word where a server is, what a client does.

A `cases_*.py` is one contender, written as its own manual would write it, and runs one case until it is killed:

    python cases_websockets.py echo key=value …     {"port": 43210}: it listens there on 127.0.0.1, or will soon
    python cases_websockets.py version              {"version": "17.4"}

What a server does with the messages of a WebSocket at /, as ../load.c expects it:

    echo        sends back what comes, text as text
    broadcast   sends what comes to all who are connected, whoever said it

`client` is the other way round: 64 tasks, each with a WebSocket of its own to the URL of the option `url`, send TEXT and await it
again and again, and the last line says how often.

No contender compresses, and each keeps its connections alive as it does unless told otherwise. The option `core` is the processor
to stay on.

SPDX-License-Identifier: MIT
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time

TEXT = ("What comes back has to be this, and all of it; " * 3)[:100]
TASKS = 64              # of a client
BACKLOG = 1024          # connections that wait to be accepted: more than come at a time

OPTIONS = {}            # of the command line

PR_SET_PDEATHSIG = 1    # of prctl(): which signal comes when the parent has gone


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


async def measure_client(connect, gather):
    """`async with connect(url) as talk`, and `await talk(text)` is the answer; `await gather(*coroutines)` runs all at once."""
    async def talk_again_and_again():
        async with connect(OPTIONS["url"]) as talk:
            while (began := clock()) < end:
                answer = await talk(TEXT)
                if answer != TEXT:
                    raise ValueError(f"the answer was {answer!r:.100}")
                times.append(clock() - began)

    clock = time.perf_counter
    for seconds in (float(OPTIONS["warm"]), float(OPTIONS["seconds"])):
        began, cpu, times = clock(), time.process_time(), []
        end = began + seconds
        await gather(*(talk_again_and_again() for _ in range(TASKS)))
    took, cpu = clock() - began, time.process_time() - cpu
    times.sort()
    quantiles = {name: times[int(part * (len(times) - 1))] for name, part in (("p50", 0.5), ("p99", 0.99))}
    print(json.dumps({"operations": len(times), "seconds": took, "server_cpu": cpu, **quantiles}), flush=True)


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
