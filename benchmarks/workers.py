"""What several workers bring, and what they cost: the same work with 1, 2, … workers.

    python -m flowcoro bench workers                        workers 1 and 2, 5 rounds, about a minute
    python benchmarks/workers.py --workers 1,2,4 --repeat 9
    python benchmarks/workers.py --case compute --json

Run it with the interpreter you are interested in: with a GIL, workers cannot compute at the same time, and the table
says so; on free-threaded Python they can, as far as there are cores. `--check` compares with the project's targets and
exits with 1 if one is missed.

The cases, each spawned on one worker, so that the others have to come and take their part:

    compute   100 tasks that count, some milliseconds a step
    serve     an echo server that computes for half a millisecond per request; 32 clients in a process of their own
    echo      the same server without that: nothing but input and output
    tiny      20 pairs of tasks that hand numbers through channels: more workers are a loss here, and this says how much

Every figure comes from a process of its own; the numbers of workers take turns. Medians; a ratio is the rate with so many
workers divided by that with one, and above 1 more workers are faster.

SPDX-License-Identifier: MIT
"""

import argparse
import json
import os
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))

import flowcoro  # noqa: E402: found beside this folder

CASES = ("compute", "serve", "echo", "tiny")
CLIENTS = 32            # connections, each with one request under way
SECONDS = 1.0           # that a server is measured
LIMIT = 120.0           # seconds until a measurement is given up

# case -> (with a GIL, without): what two workers have to reach at least, as a ratio to one. None: nothing is promised.
TARGETS = {"compute": (None, 1.7), "serve": (None, 1.5), "echo": (0.9, None), "tiny": (None, None)}


def has_gil():
    return flowcoro.runtime_info()["gil"]


def count(steps):
    """Some work that touches nothing anybody else does."""
    total = 0
    for number in range(steps):
        total += number & 7
    return total


# ---- the cases ---------------------------------------------------------------------------------------------

async def compute():
    """Steps of count() a second."""
    async def task():
        for _ in range(4):
            count(50_000)
            await flowcoro.checkpoint()

    began = time.perf_counter()
    async with flowcoro.TaskGroup() as group:
        for _ in range(100):
            group.spawn(task())
    return 400 / (time.perf_counter() - began)


async def tiny():
    """Numbers handed over a second."""
    async def send(channel):
        for number in range(2000):
            await channel.send(number)
        channel.close()

    async def receive(channel):
        async for _ in channel:
            pass

    began = time.perf_counter()
    async with flowcoro.TaskGroup() as group:
        for _ in range(20):
            channel = flowcoro.Channel(1)
            group.spawn(send(channel))
            group.spawn(receive(channel))
    return 40_000 / (time.perf_counter() - began)


async def serve(steps=10_000):
    """Requests answered a second, as the clients count them."""
    async def connection(sock):
        pollable = flowcoro.Pollable(sock)
        with sock:
            while True:
                await pollable.wait_readable()
                pollable.readable = False           # first this, then read: no edge is lost
                try:
                    data = sock.recv(4096)
                except BlockingIOError:
                    continue
                pollable.readable = True
                if not data:
                    break
                count(steps)
                sock.send(data)                     # a few bytes: there is room
            pollable.close()

    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    client = subprocess.Popen([sys.executable, __file__, "--client", str(listener.getsockname()[1])],
                              stdout=subprocess.PIPE, text=True)
    with listener, client:
        async with flowcoro.TaskGroup() as group:
            for _ in range(CLIENTS):
                await flowcoro.wait_readable(listener.fileno())
                sock, _ = listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                group.spawn(connection(sock))
            flowcoro.notify_closing(listener.fileno())
        return float(client.stdout.read())


async def echo():
    return await serve(0)


async def clients(port):
    """CLIENTS connections, each with one request after the other for SECONDS. Answers a second."""
    answers = 0

    async def one():
        nonlocal answers
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
            while time.perf_counter() < end:
                sock.send(b"0123456789")
                await flowcoro.wait_readable(sock.fileno())
                if not sock.recv(4096):
                    raise ConnectionError("the server has hung up")
                answers += 1
            flowcoro.notify_closing(sock.fileno())

    end = time.perf_counter() + SECONDS
    await flowcoro.when_all(*(one() for _ in range(CLIENTS)))
    return answers / SECONDS


# ---- measure and report ------------------------------------------------------------------------------------

def measure(case, workers):
    done = subprocess.run([sys.executable, __file__, "--measure", case, str(workers)], capture_output=True, text=True,
                          timeout=LIMIT, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{case} with {workers} workers failed:\n{done.stderr}")
    return float(done.stdout)


def verdict(case, workers, ratio):
    target = TARGETS[case][0 if has_gil() else 1]
    if workers != 2 or target is None:
        return ""
    return f"at least {target}: {'ok' if ratio >= target else 'MISSED'}"


def parse(argv):
    parser = argparse.ArgumentParser(description="Measure the same work with one worker and with several.",
                                     epilog="The head of benchmarks/workers.py says what the cases do.")
    parser.add_argument("--workers", default="1,2", metavar="N,N", help="1,2 unless told otherwise; begins with 1")
    parser.add_argument("--case", action="append", choices=CASES, metavar="NAME", help=f"only this one: {', '.join(CASES)}")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds, 5 unless told otherwise")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        options.workers = [int(number) for number in options.workers.split(",")]
    except ValueError:
        parser.error(f"--workers takes numbers with commas between, got {options.workers!r}")
    if options.workers[0] != 1 or not all(1 <= number <= 1024 for number in options.workers):
        parser.error("--workers begins with 1, which the others are compared with; 1024 at most")
    if options.repeat < 1:
        parser.error("--repeat needs at least 1 round")
    return options


def main(argv=None):
    """Run the benchmark and print its report. 0, or 1: a target was missed under --check."""
    options = parse(argv)
    if options.client is not None:
        print(flowcoro.run(clients(options.client), workers=1))
        return 0
    if options.measure is not None:
        case, workers = options.measure
        print(flowcoro.run(globals()[case](), workers=int(workers)))
        return 0

    rows = []
    for case in options.case or CASES:
        rates = {number: [] for number in options.workers}
        for turn in range(options.repeat):
            for number in options.workers if turn % 2 == 0 else reversed(options.workers):
                rates[number].append(measure(case, number))
        for number in options.workers:
            ratios = [rate / one for rate, one in zip(rates[number], rates[1])]
            rows.append({"case": case, "workers": number, "rate": statistics.median(rates[number]),
                         "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
                         "verdict": verdict(case, number, statistics.median(ratios))})
    heading = (f"{platform.python_implementation()} {platform.python_version()}, the GIL is {'on' if has_gil() else 'off'}, "
               f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, medians of {options.repeat} rounds")
    if options.json:
        print(json.dumps({"heading": heading, "gil": has_gil(), "rows": rows}, indent=2))
    else:
        print(heading, "", f"{'case':9}{'workers':>8}{'rate/s':>10}   ratio  range", sep="\n")
        for row in rows:
            print(f"{row['case']:9}{row['workers']:8}{row['rate']:10,.0f}{row['ratio']:7.2f}x  "
                  f"{row['lowest']:.2f} - {row['highest']:.2f}  {row['verdict']}".rstrip())
    return 1 if options.check and any("MISSED" in row["verdict"] for row in rows) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
