"""flowcoro_cli 0.1.0: the command line of FlowCoro, what `python -m flowcoro` runs.

    python -m flowcoro demo [NAME …] [--list]     what coroutines are good for, measured on this machine
    python -m flowcoro demo chat --keep           a chat to try in a browser; it runs until Ctrl-C (`http` does, too)
    python -m flowcoro vendor DEST [module …]     copy FlowCoro's files, and what they need, into a project
    python -m flowcoro vendor --check DEST        does the copy there differ from this version?
    python -m flowcoro get URL [-o FILE] …        fetch what is at a URL; a transfer that was interrupted goes on with -C
    python -m flowcoro bench …                    the benchmarks that come with a clone of the repository
    python -m flowcoro rpc HOST:PORT [METHOD …]   list the methods of a JSON-RPC server, or call one
    python -m flowcoro serve module:app …         an application (its own, WSGI, ASGI) or a folder, over HTTP

To vendor, copy: flowcoro.py, flowcoro_cli.py

Example:

    import pathlib, tempfile
    import flowcoro_cli

    with tempfile.TemporaryDirectory() as folder:
        copies = pathlib.Path(folder, "vendored")
        assert flowcoro_cli.main(["vendor", str(copies), "--package"]) == 0
        assert (copies / "flowcoro.py").exists() and (copies / "__init__.py").exists()
        assert flowcoro_cli.main(["vendor", "--check", str(copies)]) == 0

Contents: tables of commands and scenes · errors · helpers of all commands · Screen · the eleven scenes ·
demo · vendor · bench · get · rpc · serve · the command line.

How it works:
    A subcommand is a row of COMMANDS and a scene a row of SCENES: (module, function, one line of help). The
    module is imported when its row is asked for, no earlier, so that a missing file costs its own rows only
    (flowcoro_net.py: the scenes `echo`, `http`, `chat`, `rpc`, `network` and `breaker`; of these `http`, `chat` and
    `breaker` need flowcoro_http.py, `chat` flowcoro_websocket.py, `rpc` flowcoro_rpc.py, `network` and `breaker`
    flowcoro_testing.py and `breaker` flowcoro_resilience.py too); the message then says which file to copy. No module of a lower
    layer imports this one: a command is handed its arguments (a list of strings) and returns the exit status, a scene is handed
    a Screen and draws on it. Exit status: 0 done · 1 a scene failed, or a vendored copy differs ·
    2 the command line cannot be obeyed · 130 Ctrl-C · 141 the reader of the output has gone. Only a bug ends in a traceback.
    `vendor` decides everything before it writes anything, writes to a temporary folder in the destination and
    renames from there: at any moment a copy is the old file or the new one. A package needs relative imports;
    every FlowCoro file imports a sibling as `import flowcoro_x` at column 0, so one regular expression makes
    all of them relative, and one brings them back.

Errors: CliError, and below it
    UsageError     the command line asks for what cannot be done; exit status 2
    GetFailed      `get` has not got it; it says the exit status
    SceneFailed    a scene of the demo did not get the result it checks for; exit status 1

Sources: https://no-color.org for NO_COLOR · the note on SIGPIPE in the documentation of Python's `signal`.

What it does not do: download or install anything, or merge a locally changed copy with a newer version.

SPDX-License-Identifier: MIT
"""

import argparse
import ast
import collections
import contextlib
import dataclasses
import difflib
import errno
import functools
import getpass
import importlib
import inspect
import json
import math
import os
import pathlib
import platform
import random
import re
import runpy
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import types
import urllib.parse

try:
    import resource
except ImportError:                 # Windows; `vendor` works there all the same
    resource = None

import flowcoro

__version__ = "0.1.0"

__all__ = ["COMMANDS", "SCENES", "CliError", "GetFailed", "SceneFailed", "Screen", "UsageError", "main"]


# ---- Constants and tables ----------------------------------------------------------------------------------

HERE = pathlib.Path(__file__).resolve().parent

COMMANDS = {            # subcommand: (module, function(arguments) -> exit status, one line of help)
    "demo": ("flowcoro_cli", "_demo_command", "what coroutines are good for, measured on this machine"),
    "vendor": ("flowcoro_cli", "_vendor_command", "copy FlowCoro's files, and what they need, to a project"),
    "bench": ("flowcoro_cli", "_bench_command", "the benchmarks that come with a clone of the repository"),
    "get": ("flowcoro_cli", "_get_command", "fetch what is at a URL, as a person expects of curl"),
    "rpc": ("flowcoro_cli", "_rpc_command", "call a JSON-RPC server, or list its methods"),
    "serve": ("flowcoro_cli", "_serve_command", "an application (module:app) or a folder, over HTTP"),
}

SCENES = {              # scene, in the order of the demo: (module, function(screen), one line of help)
    "threads": ("flowcoro_cli", "_scene_threads", "100,000 coroutines against threads, in time and memory"),
    "pipeline": ("flowcoro_cli", "_scene_pipeline", "channels: counting the words of the standard library"),
    "echo": ("flowcoro_cli", "_scene_echo", "a TCP echo server with 1,000 live clients, in one thread"),
    "network": ("flowcoro_cli", "_scene_network", "a simulated network has a bad minute, and has it again"),
    "breaker": ("flowcoro_cli", "_scene_breaker", "an outage of half a minute: who comes back after it, and who does not"),
    "http": ("flowcoro_cli", "_scene_http", "a live web server: routes, events, 10,000 requests, and rude clients"),
    "chat": ("flowcoro_cli", "_scene_chat", "a room of people and browsers by WebSocket, and a sleeper in it"),
    "rpc": ("flowcoro_cli", "_scene_rpc", "calls both ways over one connection, a stream, and a lost connection"),
    "timeouts": ("flowcoro_cli", "_scene_timeouts", "who is cancelled when, drawn as a time-line"),
    "workers": ("flowcoro_cli", "_scene_workers", "three workers: who ran what, and what becomes of a blocked one"),
    "deadlock": ("flowcoro_cli", "_scene_deadlock", "two tasks lock each other out: caught, and explained"),
}

READ_NEXT = {           # named at the end of the demo if they are there; a vendored copy has few of them
    "README.md": "from nothing to a running program",
    "docs": "the guides; every example in them runs in the tests",
    "examples": "small programs, one idea each",
    "flowcoro.py": "the kernel; its header says how it works",
    "benchmarks": "run them with `python -m flowcoro bench`",
}

COROUTINES = 100_000    # the number the demo promises
THREADS = 1_000         # few systems allow 100,000; nearly all allow 1,000, and that is enough to divide by
ROUNDS = 2              # each measurement runs twice and the better one counts: noise only makes it worse
SLOW = 5                # seconds for the first round of them; on a machine that needs more it is the only one
PROMISE = 5             # times cheaper than a thread
CHILD_TIMEOUT = 60      # seconds; a measurement takes about one, so this one hangs; the scene chat, too

WORD = re.compile(rb"[a-z]+", re.IGNORECASE)
READERS = 4             # files read at the same time; a disk seldom gains from more
CLIENTS = 1_000
MESSAGES = 10           # per client: 10,000 round trips, about a second
REQUESTS = 10_000       # of the scene http: about a second, too
HEAD_SECONDS = 1.0      # that the head of a request may take there
LISTENERS = 500         # of the scene chat, who say nothing
DREAMS = 4_000            # lines of the largest size that are said there while one sleeps: more than the system keeps for him
SPARE_FILES = 64        # descriptors the process needs besides the sockets of the clients

MODULE = r"flowcoro(?:_\w+)?"
FLAT_IMPORT = re.compile(rf"^import ({MODULE})\b", re.MULTILINE)
PACKAGE_IMPORT = re.compile(rf"^from \. import ({MODULE})\b", re.MULTILINE)
VERSION = re.compile(r"^__version__ = \"(.+)\"", re.MULTILINE)


# ---- Errors ------------------------------------------------------------------------------------------------

class CliError(Exception):
    """The base of this module's errors."""


class UsageError(CliError):
    """The command line cannot be obeyed; the message says why and what to do. Exit status 2."""


class SceneFailed(CliError):
    """A scene did not get the result it checks for. Exit status 1."""


# ---- Helpers of all commands -------------------------------------------------------------------------------

def _load(module):
    """Import the sibling `module`, also from inside a package; UsageError if its file is not there."""
    name = f"{__package__}.{module}" if __package__ else module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise               # the sibling is there and misses something else: that is its own error
        raise UsageError(f"this needs {module}.py: copy it to {HERE}, next to flowcoro.py") from None


def _look_up(kind, name, known):
    """Check that `name` is one of the names `known`; UsageError with the nearest of them, and with all."""
    if name in known:
        return name
    near = difflib.get_close_matches(name, known)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(f"there is no {kind} {name!r}; {hint}known: {', '.join(known)}")


def _first_of(error):
    """The first error in a group of errors, or of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _parser(command, description):
    """An argparse parser that calls itself `python -m flowcoro <command>`, whatever file was started."""
    return argparse.ArgumentParser(prog=f"python -m flowcoro {command}", description=description)


# ---- The screen --------------------------------------------------------------------------------------------

class Screen:
    """What a scene draws on: plain, flushed lines in a pipe; on a terminal also a progress bar and colour.

    TERM=dumb gets neither bar nor colour, NO_COLOR no colour.
    """

    BAR = 32            # characters: with its frame less than half of an 80-column line

    def __init__(self, stream, keep=False):
        self.stream = stream
        self.keep = keep            # whether a scene leaves running what it shows, until Ctrl-C
        self.terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = self.terminal and not os.environ.get("NO_COLOR")
        self.filled = None          # how much of the bar is drawn; None: it is not on the screen

    def say(self, text="", style=None):
        """Print `text`, each of its lines indented, and flush; `style` is None, "bold", "green" or "red"."""
        self.clear()
        code = {"bold": 1, "green": 32, "red": 31}.get(style) if self.colour else None
        for line in text.splitlines() or [""]:
            line = f"  {line}".rstrip()
            print(f"\x1b[{code}m{line}\x1b[0m" if code and line else line, file=self.stream, flush=True)

    def progress(self, done, total):
        """Draw the bar at `done` of `total`; next to no work if it looks as it did, or without a terminal."""
        filled = self.BAR * done // total
        if self.terminal and filled != self.filled:
            self.filled = filled
            bar = "#" * filled + "." * (self.BAR - filled)
            self.stream.write(f"\r  [{bar}] {100 * done // total:3d}%")
            self.stream.flush()

    def clear(self):
        """Take the bar away, if there is one."""
        if self.filled is not None:
            self.filled = None
            self.stream.write("\r" + " " * (self.BAR + 9) + "\r")
            self.stream.flush()

    def check(self, condition, message):
        """The scene's own test: unless `condition` holds, the scene ends with SceneFailed(message)."""
        if not condition:
            raise SceneFailed(message)


# ---- Scene: threads ----------------------------------------------------------------------------------------
# Both sides do the same, each in a process of its own: start N units that wait at one gate, see that all of
# them wait, read how much memory that took, open the gate, join them. Reading the memory is not in the time.

def _resident_bytes():
    """The memory of this process that is really there, in bytes; 0 where the system does not say.

    Not /proc/self/statm: that may lag by up to 64 pages per thread, and threads are the subject here.
    """
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/self/smaps_rollup").read_text()
        return 1024 * int(re.search(r"^Rss:\s+(\d+) kB", text, re.MULTILINE)[1])
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _measure_coroutines(count):
    """Start, park and join `count` tasks: {"count": that finished, "seconds", "bytes": in all}."""
    arrived, left = bytearray(count), bytearray(count)      # made beforehand: they do not count as memory

    async def unit(number, gate):
        arrived[number] = 1
        await gate.wait()
        left[number] = 1

    async def main():
        gate = flowcoro.Event()
        before, start = _resident_bytes(), time.perf_counter()
        async with flowcoro.TaskGroup() as group:
            for number in range(count):
                group.spawn(unit(number, gate))
            while not all(arrived):
                await flowcoro.checkpoint()
            parked, held, opened = time.perf_counter(), _resident_bytes() - before, time.perf_counter()
            gate.set()
        return time.perf_counter() - opened + parked - start, held

    seconds, held = flowcoro.run(main())
    return {"count": sum(left), "seconds": seconds, "bytes": held}


def _measure_threads(count):
    """The same for `count` threads, or for as many as the system allows."""
    arrived, left = bytearray(count), bytearray(count)
    gate, threads = threading.Event(), []

    def unit(number):
        arrived[number] = 1
        gate.wait()
        left[number] = 1

    before, start = _resident_bytes(), time.perf_counter()
    with contextlib.suppress(RuntimeError):                 # "can't start new thread": those that run will do
        for number in range(count):
            thread = threading.Thread(target=unit, args=(number,))
            thread.start()
            threads.append(thread)
    while sum(arrived) < len(threads):
        time.sleep(0.001)
    parked, held, opened = time.perf_counter(), _resident_bytes() - before, time.perf_counter()
    gate.set()
    for thread in threads:
        thread.join()
    return {"count": sum(left), "seconds": time.perf_counter() - opened + parked - start, "bytes": held}


def _in_child(function, count):
    """What this module's `function(count)` returns in a fresh interpreter; SceneFailed if it fails there."""
    program = f"import json, {__name__} as cli; print(json.dumps(cli.{function}({count})))"
    root = pathlib.Path(__file__).resolve().parents[__name__.count(".")]
    search_path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": search_path}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, errors="replace") as child:
        try:
            out, err = child.communicate(timeout=CHILD_TIMEOUT)
        except BaseException as error:
            child.kill()
            child.wait()                # after a Ctrl-C nobody else would
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise SceneFailed(f"{function}({count}) was not ready after {CHILD_TIMEOUT} seconds") from None
    if child.returncode != 0:
        last_words = err.strip().rpartition("\n")[2]
        raise SceneFailed(f"{function}({count}) ended with {child.returncode}: {last_words}")
    return json.loads(out)


def _scene_threads(screen):
    """100,000 waiting coroutines against waiting threads: what one of each costs, in time and in memory."""
    screen.say("Look at the last line: how much cheaper it is to keep a coroutine waiting than a thread.")
    plan = [("coroutines", COROUTINES), ("threads", THREADS)] * ROUNDS
    runs, start = collections.defaultdict(list), time.perf_counter()
    for step, (kind, count) in enumerate(plan):
        if step == 2 and time.perf_counter() - start > SLOW:
            break
        screen.progress(step, len(plan))
        runs[kind].append(_in_child(f"_measure_{kind}", count))

    costs = []                                          # (seconds, bytes) per unit, the better of the runs
    for kind, wanted in plan[:2]:
        count = min(run["count"] for run in runs[kind])
        enough = count == wanted or (kind == "threads" and count)
        screen.check(enough, f"{count:,} of {wanted:,} {kind} came back")
        seconds, size = (min(run[unit] / run["count"] for run in runs[kind]) for unit in ("seconds", "bytes"))
        costs.append((seconds, size))
        screen.say(f"{count:7,} {kind:10} {1e6 * seconds:7.1f} µs and {size:7,.0f} bytes each")

    (task_seconds, task_size), (thread_seconds, thread_size) = costs
    screen.say(f"(Started, parked, joined, best of {len(runs['threads'])}. By this measure 100,000 threads "
               f"would take {1e5 * thread_seconds:.0f} s and {thread_size / 1e4:.1f} GB.)")
    faster, smaller = thread_seconds / task_seconds, thread_size / task_size if task_size else math.inf
    memory = f"{smaller:.1f} times less memory" if task_size else "memory unknown"
    figures = f"{faster:.1f} times less time, {memory}"
    if min(faster, smaller) >= PROMISE:
        screen.say(f"A coroutine is cheaper: {figures}.", "green")
    else:
        screen.say(f"A coroutine was NOT {PROMISE} times cheaper: {figures}.", "red")


# ---- Scene: pipeline ---------------------------------------------------------------------------------------

async def _send_names(paths, names):
    """First stage: hand out the paths, each as soon as somebody takes it."""
    for path in paths:
        await names.send(path)
    names.close()


async def _read_files(names, texts):
    """Second stage, several of it at once: a file is read in a thread, because reading it blocks."""
    async for path in names:
        await texts.send(await flowcoro.to_thread(path.read_bytes))


async def _count_words(texts, counts, progress):
    """Last stage: the only one that touches `counts`, so nothing needs a lock."""
    files = 0
    async for text in texts:
        counts.update(WORD.findall(text))
        files += 1
        progress(files)


async def _word_counts(paths, progress):
    """How often each word occurs in the files at `paths`: three stages, joined by channels."""
    names, texts = flowcoro.Channel(), flowcoro.Channel(READERS)    # bounded: a full one slows its senders
    counts = collections.Counter()
    async with flowcoro.TaskGroup() as pipeline:
        pipeline.spawn(_send_names(paths, names))
        pipeline.spawn(_count_words(texts, counts, progress))
        async with flowcoro.TaskGroup() as readers:
            for _ in range(READERS):
                readers.spawn(_read_files(names, texts))
        texts.close()                                               # all readers have finished: no more texts
    return counts


def _scene_pipeline(screen):
    """Word counts over the standard library's sources, through channels, checked against a plain loop."""
    screen.say("Look at the totals: four readers and a counter at once agree with a plain loop to the word.")
    paths = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    screen.check(paths, "this Python's standard library has no source files to read")

    start = time.perf_counter()
    counts = flowcoro.run(_word_counts(paths, lambda files: screen.progress(files, len(paths))))
    seconds = time.perf_counter() - start

    start, size, expected = time.perf_counter(), 0, collections.Counter()
    for path in paths:
        text = path.read_bytes()
        size += len(text)
        expected.update(WORD.findall(text))
    loop_seconds = time.perf_counter() - start

    screen.check(counts == expected, "the pipeline and the plain loop counted different words")
    frequent = ", ".join(f"{word.decode()} {count:,}" for word, count in counts.most_common(4))
    screen.say(f"{len(paths)} files, {size / 1e6:.1f} MB, {counts.total():,} words, most often {frequent}")
    screen.say(f"pipeline: {seconds:.2f} s, {size / 1e6 / seconds:.0f} MB/s; a plain loop: "
               f"{loop_seconds:.2f} s (a pipeline overlaps waiting, of which there is little here)")
    screen.say("The totals are the same.", "green")


# ---- Scene: echo -------------------------------------------------------------------------------------------
# The server and its clients on flowcoro_net.

async def _echo(sock):
    """Serve one client: everything comes back, until it closes."""
    while data := await sock.read():
        await sock.write(data)


async def _call(net, address, number, everybody, reply_arrived):
    """One client: connect, wait until `everybody` has, then send MESSAGES and report each reply."""
    async with await net.Socket.connect(*address) as sock:
        await everybody.wait()
        for message in range(MESSAGES):
            sent, start = b"client %d, message %d\n" % (number, message), time.perf_counter()
            await sock.write(sent)
            reply = await sock.read_until(b"\n")
            reply_arrived(time.perf_counter() - start, reply == sent)


async def _echo_session(net, clients, progress):
    """A server and `clients` clients on loopback: ([(latency, right?) of each reply], seconds in all)."""
    replies = []

    def reply_arrived(latency, is_right):
        replies.append((latency, is_right))
        progress(len(replies))

    everybody = flowcoro.Barrier(clients + 1)
    async with await net.TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as servers:
        servers.spawn(server.serve(_echo), name="server")
        async with flowcoro.TaskGroup() as group:
            for number in range(clients):
                group.spawn(_call(net, server.local, number, everybody, reply_arrived))
            await everybody.wait()              # now all are connected, and stay so until they are done
            start = time.perf_counter()
        seconds = time.perf_counter() - start
        server.close()
    return replies, seconds


def _affordable_clients(wanted):
    """How many clients the limit on open files allows, raised if need be: each client takes two sockets."""
    if resource is None:
        return min(wanted, 200)                 # Windows: its select() takes 512 sockets at most
    needed = 2 * wanted + SPARE_FILES
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < min(needed, hard):
        soft = min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    return wanted if soft >= needed else max(1, (soft - SPARE_FILES) // 2)


def _scene_echo(screen):
    """1,000 clients, all connected at once, talk to an echo server: one thread serves and calls."""
    net, clients = _load("flowcoro_net"), _affordable_clients(CLIENTS)
    screen.say("Look at the number of clients: all connected at the same time, and one thread is both sides.")
    total = clients * MESSAGES
    if clients < CLIENTS:
        screen.say(f"(The limit on open files allows {clients:,} clients, not {CLIENTS:,}.)")
    refused = None
    try:
        replies, seconds = flowcoro.run(_echo_session(net, clients, lambda count: screen.progress(count, total)))
    except* OSError as errors:                  # the listener's own, or what has left the groups of tasks
        refused = errors
    if refused:                                 # not raised up there: that would make a group of it
        error = _first_of(refused)
        raise SceneFailed(f"no TCP on 127.0.0.1 here: {error}") from error
    right = sum(is_right for _, is_right in replies)
    screen.check(right == total, f"{right:,} of {total:,} messages came back as they were sent")
    percentile = statistics.quantiles([latency for latency, _ in replies], n=100)
    screen.say(f"{clients:,} clients, {total:,} messages there and back in {seconds:.2f} s: "
               f"{total / seconds:,.0f} per second")
    screen.say(f"latency: p50 {1e3 * percentile[49]:.1f} ms, p99 {1e3 * percentile[98]:.1f} ms "
               f"(a message queues with those of {clients - 1:,} others)")
    screen.say("Every reply was the message that had been sent.", "green")


# ---- Scene: network ----------------------------------------------------------------------------------------

class _BadMinute:
    """Three clients ask a shop over a simulated network, on the virtual clock, while everything that can fails."""

    SECONDS = 60
    CLIENTS = "north", "east", "south"
    RULER = f"{'0 s':20}{'20 s':20}{'40 s':20}"

    def __init__(self, net, testing, progress):
        self.net, self.testing, self.progress = net, testing, progress
        self.rows = {name: ["?"] * self.SECONDS for name in self.CLIENTS}       # a character for each second

    async def shop(self):
        async with await self.net.TcpServer.listen("shop", 80) as server:
            await server.serve(self.answer)

    async def answer(self, sock):
        order = await sock.read_until(b"\n", limit=100)
        await sock.write(b"sold " + order)

    async def client(self, name):
        """An order each second: `.` answered at once, `o` late, `x` not."""
        for second in range(self.SECONDS):
            await flowcoro.sleep_until(float(second))
            try:
                with flowcoro.timeout(0.9):
                    async with await self.net.Socket.connect("shop", 80) as sock:
                        await sock.write(b"tea for %s\n" % name.encode())
                        await sock.read_until(b"\n", limit=100)
                self.rows[name][second] = "." if flowcoro.now() - second < 0.3 else "o"
            except (self.net.NetworkError, TimeoutError):
                self.rows[name][second] = "x"
            self.progress(second + 1, self.SECONDS)

    async def run(self, seed):
        """The lines of the picture, and the trace of the network."""
        network = self.testing.SimulatedNetwork(seed=seed, latency=0.03, jitter=0.02)
        async with flowcoro.TaskGroup() as group:
            shop = network.host("shop")
            shop.boot(group, self.shop)
            clients = [network.host(name).spawn(group, self.client(name)) for name in self.CLIENTS]
            await flowcoro.sleep_until(9.95)
            network.set_link("east", "shop", loss=0.1)
            await flowcoro.sleep_until(19.95)
            network.partition("north", "shop")
            await flowcoro.sleep_until(29.95)
            network.heal("north", "shop")
            await flowcoro.sleep_until(39.95)
            network.crash(shop)
            await flowcoro.sleep_until(44.95)
            network.restart(shop)
            for task in clients:
                await task
            group.cancel()
        rows = [f"{name:6}|{''.join(row)}|" for name, row in self.rows.items()]
        return [f"       {self.RULER}", *rows], network.trace()


def _scene_network(screen):
    """Loss, a cut cable and a crash, on a network in memory: the same seed has the same minute, to the byte."""
    net, testing = _load("flowcoro_net"), _load("flowcoro_testing")
    screen.say("Look at the rows: three hosts order once a second. . answered, o late, x not within 0.9 s.")

    def minute(seed):
        story = _BadMinute(net, testing, screen.progress)
        return flowcoro.run(story.run(seed), clock=testing.VirtualClock(), seed=seed), story

    start = time.perf_counter()
    (picture, trace), story = minute(1)
    for line in picture:
        screen.say(line)
    screen.say("from 10 s on one packet in ten between east and the shop gets lost; from 20 to 30 s north's cable is cut;")
    screen.say("from 40 to 45 s the shop is down")
    rows = story.rows
    for name, first, last in ("north", 20, 30), *((name, 40, 45) for name in rows):
        screen.check(set(rows[name][first:last]) == {"x"}, f"{name} was answered while it could not be")
    screen.check("x" not in rows["south"][:40] + rows["south"][46:], "south was not answered, though nothing was in its way")
    screen.check("?" not in "".join(map("".join, rows.values())), "an order has neither been answered nor failed")
    (_, again), _ = minute(1)
    (_, other), _ = minute(2)
    screen.check(again == trace and other != trace, "the same seed has not told the same story, or another one has")
    screen.say(f"Three such minutes have passed in {time.perf_counter() - start:.2f} s. Two had the same seed: all "
               f"{len(trace.splitlines()):,} events were the same, to the byte.", "green")


# ---- Scene: breaker ----------------------------------------------------------------------------------------
# Two shops ask a store each, at the same moments, over one simulated network, and both stores are down at the same time. What
# differs is the policy of one shop.

class _Outage:
    """A minute of it; a row for each few seconds, as they pass."""

    RATE, CAPACITY = 10, 15             # questions of a shop, and answers of a store, a second
    COLD = 20                           # answers of a store that has come up again which take twice as long
    PATIENCE = 1.0                      # seconds that a shop waits for an answer; the store goes on with what nobody waits for
    DOWN, UP, END, ROW = 10, 40, 60, 3  # seconds
    HEALTHY = 5                         # seconds after which there are to be no failures any more
    ALONE, WITH = "alone", "with"

    def __init__(self, seed, row):
        self.http, self.testing, self.policies = map(_load, ("flowcoro_http", "flowcoro_testing", "flowcoro_resilience"))
        self.seed, self.row, self.states = seed, row, [(-1.0, "CLOSED")]       # (when, which) the breaker was
        self.load = {name: [0] * (self.END + 10) for name in (self.ALONE, self.WITH)}       # of each second
        self.failed = {name: [0] * self.END for name in self.load}
        chance = random.Random(seed)
        self.moments = [(number + chance.random()) / self.RATE for number in range(self.RATE * self.END)]

    def policy(self, name):
        """Four attempts at most either way."""
        retry, budget = self.policies.Retry, self.policies.RetryBudget
        chance = random.Random(self.seed).random
        if name == self.ALONE:
            return retry(4, budget=budget(floor=math.inf), random=chance)
        breaker = self.policies.CircuitBreaker(
            window_seconds=10, minimum_calls=10, open_seconds=1, open_growth=1.5, max_open_seconds=3, open_jitter=0.2, probes=5,
            random=chance)
        breaker.add_listener(self.hear)
        return self.policies.Pipeline(
            retry(4, budget=budget(floor=1), random=chance), breaker)

    def hear(self, event):
        state = {"opened": "OPEN", "half_opened": "HALF_OPEN", "closed": "CLOSED"}.get(event.kind)
        if state is not None:
            self.states.append((flowcoro.now(), state))

    async def store(self, name):
        app, free = self.http.HttpServer(), 0.0
        cold = self.COLD if flowcoro.now() >= self.UP else 0

        @app.get("/")
        async def answer(request):
            nonlocal free, cold
            self.load[name][int(flowcoro.now())] += 1
            free = max(free, flowcoro.now()) + (2 if cold > 0 else 1) / self.CAPACITY
            cold -= 1
            await flowcoro.sleep_until(free)

        async with await app.listen(f"store-{name}", 80) as server:
            await server.serve()

    async def shop(self, name):
        async def ask(second):
            try:
                await client.get(f"http://store-{name}/")
            except (self.http.RequestError, self.policies.Rejected):
                self.failed[name][second] += 1

        async with self.http.HttpClient(timeout=self.PATIENCE, trust_env=False, policy=self.policy(name)) as client:
            async with flowcoro.TaskGroup() as group:
                for number, moment in enumerate(self.moments):
                    await flowcoro.sleep_until(moment)
                    group.spawn(ask(number // self.RATE))

    async def draw(self):
        """A row when its seconds have passed, and what was asked in them has been answered or not."""
        for begin in range(0, self.END, self.ROW):
            end = begin + self.ROW
            await flowcoro.sleep_until(end + 5 * self.PATIENCE)             # four attempts and their waits
            loads = [sum(load[begin:end]) / self.ROW for load in self.load.values()]
            lost = [100 * sum(failed[begin:end]) / self.RATE / self.ROW for failed in self.failed.values()]
            states = [state for when, state in self.states if begin <= when < end]
            before = [state for when, state in self.states if when < begin][-1]
            self.row(begin, loads, lost, states or [before])

    async def run(self):
        network = self.testing.SimulatedNetwork(seed=self.seed, latency=0.005, keep=0)
        async with flowcoro.TaskGroup() as group:
            drawing = group.spawn(self.draw())
            for name in self.load:
                network.host(f"store-{name}").boot(group, functools.partial(self.store, name))
                network.host(f"shop-{name}").spawn(group, self.shop(name))
            for moment, change in (self.DOWN, network.crash), (self.UP, network.restart):
                await flowcoro.sleep_until(moment)
                for name in self.load:
                    change(f"store-{name}")
            await drawing
            group.cancel()


def _scene_breaker(screen):
    """Retries alone keep a store down that is up again; with a budget and a circuit breaker it is back within seconds."""
    bar, normal = 12, _Outage.RATE

    def row(begin, loads, lost, states):
        left, right = (f"{'#' * round(load * bar / 4 / normal):{bar}}{load:3.0f} {part:4.0f} %"
                       for load, part in zip(loads, lost))
        screen.say(f"{begin:2} s  {left}   {right}  {' '.join(states)}")

    start = time.perf_counter()
    outage = _Outage(1, row)
    screen.say(f"Look at the bars, what arrives at two stores in a second. A shop asks each {normal} times, and up to four")
    screen.say(f"times for one answer; a store can give {outage.CAPACITY}. From {outage.DOWN} to {outage.UP} s both are down.")
    screen.say(f"      {'retries alone':{bar + 3}}   lost   {'budget, breaker':{bar + 3}}   lost  breaker", "bold")
    flowcoro.run(outage.run(), clock=outage.testing.VirtualClock(), seed=1)
    (alone, load), (alone_lost, lost) = outage.load.values(), outage.failed.values()
    up, end, late, healthy = outage.UP, outage.END, outage.END - 5, outage.UP + outage.HEALTHY
    screen.check(not any(lost[healthy:]), f"with policies questions were still lost {outage.HEALTHY} s after the outage")
    most = max(load[up:end])
    screen.check(most < 1.3 * normal, f"with policies {most} questions came in one second after the outage; normal are {normal}")
    screen.check(all(alone_lost[late:]) and min(alone[late:end]) > 2 * normal,
                 "with retries alone the store has recovered, and it is here to show that it does not")
    screen.say(f"Retries alone: {sum(alone[late:end]) / (end - late) / normal:.1f} times the load, so that each answer is too "
               "late, so that it is asked again.", "red")
    well = next(second for second in range(up, end) if not any(lost[second:])) - up
    screen.say(f"Budget, breaker: never more than {most / normal:.1f} times the load, and nothing is lost any more from {well} s "
               "after the outage on.", "green")
    screen.say(f"This minute has passed in {time.perf_counter() - start:.2f} s.")


# ---- Scene: http -------------------------------------------------------------------------------------------
# A web application, its server and its clients, all in one thread, on flowcoro_http.

TEAS = {1: "Assam", 2: "Darjeeling", 3: "Oolong"}

TEA_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Teahouse</title><link rel="icon" href="data:,">
<style>body { font: 1.1em sans-serif; max-width: 40em; margin: 3em auto } b { font-size: 2em }</style>
<h1>Teahouse</h1>
<p>Tea 3, by <a href="/teas/3">/teas/3</a>: <b id="tea">?</b></p>
<p>Teas asked for, by <a href="/events">/events</a>: <b id="asked">?</b></p>
<script>
const show = (id, text) => document.getElementById(id).textContent = text;
fetch("/teas/3").then(response => response.json()).then(data => show("tea", data.tea));
new EventSource("/events").onmessage = event => show("asked", JSON.parse(event.data).asked);
</script>
"""


@dataclasses.dataclass
class _Order:
    """What POST /orders takes; what does not fit is answered with 422."""

    tea: int
    cups: int = 1


def _teahouse(http, head_timeout):
    """The web application of the scene: a page, an API in JSON, and a stream of events."""
    app = http.HttpServer(head_timeout=head_timeout)
    app.state.asked = 0

    @app.get("/")
    async def page(request):
        return http.Response(200, TEA_PAGE, media_type="text/html; charset=utf-8")

    @app.get("/teas/{number:int}")
    async def tea(request, number):
        app.state.asked += 1
        if number not in TEAS:
            raise http.HttpError(404, f"no tea has the number {number}")
        return {"number": number, "tea": TEAS[number]}

    @app.post("/orders")
    async def order(request, order: _Order):
        return 201, {"tea": TEAS.get(order.tea), "cups": order.cups}

    @app.get("/events")
    async def events(request):
        async def counts():
            while True:
                yield {"asked": app.state.asked}
                await flowcoro.sleep(0.1)

        return http.event_stream(request, counts())

    return app


class _Visit:
    """What the clients of the teahouse see, good ones and bad ones."""

    CONNECTIONS = 64
    SLOW = 50                   # connections that never finish a request's head

    def __init__(self, http, net, screen):
        self.http, self.net, self.screen = http, net, screen
        affordable = _affordable_clients(self.CONNECTIONS + self.SLOW)
        self.connections = max(1, affordable * self.CONNECTIONS // (self.CONNECTIONS + self.SLOW))
        self.slow = max(1, affordable - self.connections)
        self.over = False               # from now on Ctrl-C is the way to end

    async def run(self):
        app = _teahouse(self.http, HEAD_SECONDS)
        try:
            listener = await app.listen("127.0.0.1", 0)
        except OSError as error:
            raise SceneFailed(f"no TCP on 127.0.0.1 here: {error}") from error
        async with listener as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(), name="server")
            async with self.http.HttpClient(base_url=server.url) as client:
                await self.ask(client)
                await self.smuggle(server)
                async with flowcoro.TaskGroup() as others:
                    slow = [others.spawn(self.dawdle(server)) for _ in range(self.slow)]
                    others.spawn(self.listen(client))
                    await self.crowd(client)
            seconds = max([await task for task in slow])
            self.screen.say(f"{self.slow} that sent a line of a head each 0.1 s: cut off with 408 after {seconds:.1f} s "
                            f"(head_timeout={HEAD_SECONDS:g})")
            if self.screen.keep:
                self.over = True
                self.screen.say(f"It stays until Ctrl-C. Open {server.url}/ in a browser, or try:\n"
                                f"    curl -i {server.url}/teas/3", "bold")
                await flowcoro.stop_requested()
            else:
                self.screen.say("With --keep it goes on, for your browser, and for: curl -i http://127.0.0.1:PORT/teas/3")
            server.close()

    async def ask(self, client):
        """The router and annotations at work."""
        for method, path, order, wanted, about in (
                ("GET", "/teas/3", None, 200, "a dict becomes JSON"),
                ("GET", "/teas/three", None, 404, "the route is /teas/{number:int}"),
                ("DELETE", "/teas/3", None, 405, "Allow: GET, HEAD, OPTIONS"),
                ("POST", "/orders", {"tea": 3, "cups": 2}, 201, "its dataclass is checked"),
                ("POST", "/orders", {"tea": 3, "cups": "two"}, 422, "/cups: expected an integer")):
            response = await client.request(method, path, **({} if order is None else {"json": order}))
            said = f"{method} {path} {'' if order is None else json.dumps(order)}"
            self.screen.check(response.status == wanted, f"{said} was answered with {response.status}, not {wanted}")
            self.screen.check(wanted != 422 or "/cups" in response.text, "the 422 does not name what is wrong")
            self.screen.say(f"{said:40} {response.status}  {about}")

    async def listen(self, client):
        """Three events, as they come: meanwhile the crowd asks."""
        counts = []
        async with client.events("/events") as events:
            async for event in events:
                counts.append(json.loads(event.data)["asked"])
                if len(counts) == 3:
                    break
        self.screen.check(counts == sorted(counts), f"the events came in the order {counts}")
        self.screen.say(f"{'GET /events':40} 200  events while the others ask: {', '.join(f'{count:,}' for count in counts)}")

    async def smuggle(self, server):
        """A request that two servers in a row would see the end of in two places."""
        async with await self.net.Socket.connect(*server.local) as sock:
            await sock.write(b"POST /orders HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n")
            status = (await sock.read_until(b"\r\n", limit=1000)).split()[1].decode()
        self.screen.check(status == "400", f"two Content-Lengths were answered with {status}, not 400")
        self.screen.say(f"{'Content-Length: 5 and Content-Length: 6':40} {status}  no request is smuggled in here")

    async def crowd(self, client):
        """REQUESTS over CONNECTIONS, kept alive."""
        async def one(share):
            for _ in range(share):
                response = await client.get("/teas/3")
                right.append(response.status == 200)
                self.screen.progress(len(right), REQUESTS)

        right, start = [], time.perf_counter()
        async with flowcoro.TaskGroup() as group:
            for number in range(self.connections):
                group.spawn(one(REQUESTS // self.connections + (number < REQUESTS % self.connections)))
        seconds = time.perf_counter() - start
        self.screen.check(right == [True] * REQUESTS, f"{sum(right):,} of {REQUESTS:,} requests were answered with 200")
        self.screen.say(f"{REQUESTS:,} requests over {self.connections} connections in {seconds:.2f} s: "
                        f"{REQUESTS / seconds:,.0f} per second, their client in the same thread", "green")

    async def dawdle(self, server):
        """Send a head that never ends: the seconds until the server has had enough."""
        start, answer = time.perf_counter(), None
        with flowcoro.timeout(10 * HEAD_SECONDS):
            async with await self.net.Socket.connect(*server.local) as sock:
                await sock.write(b"GET / HTTP/1.1\r\n")
                while answer is None:
                    await sock.write(b"X-Slow: yes\r\n")
                    with flowcoro.move_on_after(0.1):
                        answer = await sock.read()
        self.screen.check(answer.startswith(b"HTTP/1.1 408 "), f"a slow head was answered with {answer[:20]}, not 408")
        return time.perf_counter() - start


def _run_visit(screen, visit):
    """Run visit.run(), which listens; from when `visit.over` is set on, Ctrl-C is the way to end."""
    try:
        flowcoro.run(visit.run())
    except KeyboardInterrupt:
        if not visit.over:
            raise
        screen.say("Closed.")
    except (ExceptionGroup, OSError, flowcoro.FlowCoroError) as error:
        first = _first_of(error)
        if not isinstance(first, (SceneFailed, OSError, flowcoro.FlowCoroError)):
            raise
        raise SceneFailed(str(first)) from error


def _scene_http(screen):
    """A teahouse on the web: what it answers, how many it serves, and whom it shows the door."""
    http, net = _load("flowcoro_http"), _load("flowcoro_net")
    screen.say("Look at the requests per second, and at what became of those who sent no proper request.")
    _run_visit(screen, _Visit(http, net, screen))


# ---- Scene: chat -------------------------------------------------------------------------------------------
# A room with a page for browsers, and people of our own who come by flowcoro_websocket's client. Who speaks sends his text as it
# is; who is in the room is sent JSON: {"who", "text"}, and {"here": [names]} when somebody comes or goes.

CHAT_PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Chat</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; font: 1.1em sans-serif }
main { max-width: 40em; margin: 2em auto; padding: 0 1em; overflow-wrap: anywhere }
#said { height: 20em; overflow-y: auto; border: 1px solid; padding: 0 1em }
label, input, button { font: inherit; margin: .2em 0 } #text { width: 25em; max-width: 100% }
</style>
<main>
<h1>Chat</h1>
<form id="door"><label for="name">Your name</label> <input id="name" required maxlength="30" autocomplete="nickname" autofocus>
<button>Enter</button></form>
<p>Here: <b id="here">nobody you know of</b></p>
<div id="said" role="log" aria-label="What is said" tabindex="0"></div>
<form id="speak" hidden><label for="text">Your words</label> <input id="text" maxlength="500" autocomplete="off">
<button>Say</button></form>
<p id="state" role="status">Not connected</p>
</main>
<script>
const part = id => document.getElementById(id);
let socket;

function show(who, text) {
    const line = document.createElement("p"), name = document.createElement("b");
    name.textContent = who + ":";
    line.append(name, " " + text);          // as text: what somebody says is never HTML
    part("said").append(line);
    part("said").scrollTop = part("said").scrollHeight;
}

function enter() {
    const scheme = location.protocol == "https:" ? "wss" : "ws";
    socket = new WebSocket(`${scheme}://${location.host}/room?name=${encodeURIComponent(part("name").value)}`);
    socket.onopen = () => part("state").textContent = "Connected";
    socket.onmessage = event => {
        const {who, text, here} = JSON.parse(event.data);
        if (here) part("here").textContent = here.join(", ");
        if (text) show(who, text);
    };
    socket.onclose = event => {
        part("state").textContent = `Not connected (${event.code} ${event.reason}), I try again`;
        setTimeout(enter, 1000);
    };
}

part("door").onsubmit = event => {
    event.preventDefault();
    part("door").hidden = true;
    part("speak").hidden = false;
    part("text").focus();
    enter();
};
part("speak").onsubmit = event => {
    event.preventDefault();
    if (part("text").value && socket.readyState == WebSocket.OPEN) {
        socket.send(part("text").value);
        part("text").value = "";
    }
};
</script>
"""

CHAT_POLICY = ("Content-Security-Policy", "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
                                          "img-src data:; connect-src 'self'")
CHAT_LINE = 16_384              # bytes of what one says at once


def _chat(http, websocket, heard):
    """The web application of the scene: a page, and the room. heard(name, text) is called for all that is said."""
    app = http.HttpServer(websocket=websocket.accept)
    members = {}                # {WebSocket: name}

    def tell(**message):
        """All who are here. Who does not keep up is not, any more."""
        if missed := websocket.broadcast(members, json.dumps(message, ensure_ascii=False), slow="close"):
            for ws in missed:
                del members[ws]
            tell_who_is_here()

    def tell_who_is_here():
        tell(here=sorted(filter(None, members.values())))

    @app.get("/")
    async def page(request):
        return http.Response(200, CHAT_PAGE, [CHAT_POLICY], media_type="text/html; charset=utf-8")

    @app.websocket("/room", max_message=CHAT_LINE)
    async def room(ws):
        members[ws] = name = " ".join(ws.request.query.get("name", "").split())[:30]
        if name:                # who has none listens only, and is not told of
            tell_who_is_here()
        try:
            async for text in ws:
                if not name or not isinstance(text, str):
                    return await ws.close(1003, "text, please, and a name")
                heard(name, text)
                tell(who=name, text=text)
        finally:
            if members.pop(ws, None):
                tell_who_is_here()

    return app


class _Evening:
    """Three people talk in the room, and others come who are no such pleasure."""

    TALK = [("Ada", "Is anybody here?"), ("Ben", "I am. Tea?"), ("Cleo", "Yes, please. Oolong, 95 °C, дважды"),
            ("Ada", "For me, too. Who brings the cups?"), ("Ben", "The one who asks ☕")]
    PEOPLE = sorted({name for name, _ in TALK})

    def __init__(self, http, net, websocket, screen):
        self.http, self.net, self.websocket, self.screen = http, net, websocket, screen
        self.over = False               # from now on Ctrl-C is the way to end
        self.shows = True               # whether what is said is shown

    def heard(self, name, text):
        if self.shows:
            self.screen.say(f"{name:>10}: {text[:500]}")

    async def run(self):
        app = _chat(self.http, self.websocket, self.heard)
        try:
            listener = await app.listen("127.0.0.1", 0)
        except OSError as error:
            raise SceneFailed(f"no TCP on 127.0.0.1 here: {error}") from error
        async with listener as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(), name="server")
            self.address = server.local
            with flowcoro.timeout(CHILD_TIMEOUT):
                await self.talk()
                await self.intrude()
                self.shows = False
                await self.crowd()
                await self.sleep()
            if self.screen.keep:
                await self.stay(server)
            else:
                self.screen.say("With --keep it goes on, for your browser: open http://127.0.0.1:PORT/ in two windows")
            server.close()

    def enter(self, name, **options):
        return self.websocket.connect(f"ws://127.0.0.1:{self.address[1]}/room?name={name}", **options)

    async def lines(self, ws):
        """What is said, as (who, text)."""
        async for message in ws:
            message = json.loads(message)
            if "text" in message:
                yield message["who"], message["text"]

    async def talk(self):
        """Everybody says his lines, each when he has heard the one before."""
        async def person(name):
            async with self.enter(name) as ws:
                heard[name] = []
                await everybody.wait()
                if self.TALK[0][0] == name:
                    await ws.send(self.TALK[0][1])
                async for line in self.lines(ws):
                    heard[name].append(line)
                    if len(heard[name]) == len(self.TALK):
                        return
                    who, text = self.TALK[len(heard[name])]
                    if who == name:
                        await ws.send(text)

        heard, everybody = {}, flowcoro.Barrier(len(self.PEOPLE))
        async with flowcoro.TaskGroup() as group:
            for name in self.PEOPLE:
                group.spawn(person(name), name=name)
        self.screen.check(list(heard.values()) == [self.TALK] * len(self.PEOPLE), f"not all have heard all: {heard}")
        self.screen.say(f"Each of the {len(self.PEOPLE)} has heard all {len(self.TALK)} lines, in this order.", "green")

    async def intrude(self):
        """A page from elsewhere, and bytes that are no text."""
        status = None
        try:
            async with self.enter("Mallory", origin="https://elsewhere.example"):
                pass
        except self.websocket.HandshakeError as error:
            status = error.status
        self.screen.check(status == 403, f"a page from elsewhere was answered with {status}, not 403")
        self.screen.say(f"{'Origin: https://elsewhere.example':40} {status}   no page of others speaks for its visitors")
        async with await self.net.Socket.connect(*self.address) as sock:
            await sock.write(b"GET /room HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                             b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
            await sock.read_until(b"\r\n\r\n", limit=10_000)
            await sock.write(b"\x01\x82\0\0\0\0\xc3\x28")       # the first of many frames
            kind = None
            while kind != 0x88:         # a close; before it somebody may have left, of which all hear
                kind, size = await sock.read_exactly(2)
                payload = await sock.read_exactly(size)
            code = int.from_bytes(payload[:2], "big")
        self.screen.check(code == 1007, f"what is no UTF-8 was answered with the close code {code}, not 1007")
        self.screen.say(f"{'a text with the bytes C3 28':40} {code}  no UTF-8: closed at that byte, before the message ended")

    async def crowd(self):
        """One line for many."""
        async def listener():
            async with self.enter("") as ws:
                await here.send(None)
                async for line in self.lines(ws):
                    arrived.append(line == ("Ada", "Good night, all"))
                    times.append(time.perf_counter())
                    return await all_have_it.wait()

        count = _affordable_clients(LISTENERS)
        here, all_have_it, arrived, times = flowcoro.Channel(1), flowcoro.Barrier(count), [], []
        async with flowcoro.TaskGroup() as group:
            for number in range(count):
                group.spawn(listener())
                await here.receive()
                self.screen.progress(number + 1, count)
            async with self.enter("Ada") as ada:
                start = time.perf_counter()
                await ada.send("Good night, all")
        self.screen.check(arrived == [True] * count, "a listener has heard something else")
        self.screen.say(f"One line reached {count:,} listeners within {1000 * (max(times) - start):.1f} ms, "
                        "they and the server in the same thread", "green")

    async def sleep(self):
        """Somebody who reads nothing, among those who do."""
        async with self.enter("Ada") as ada, self.enter("Ben") as ben, self.enter("Sleeper") as sleeper:
            async with flowcoro.TaskGroup() as group:
                awake = group.spawn(self.count(ben))
                said, is_here = 0, True
                while is_here and said < DREAMS:
                    await ada.send("z" * CHAT_LINE)
                    said += 1
                    while "text" not in (message := json.loads(await ada.receive())):
                        is_here = "Sleeper" in message["here"]
                self.screen.check(not is_here, f"who reads nothing was still kept after {said} long lines")
                await ada.send("The end")
                heard = await awake
            with contextlib.suppress(self.websocket.ConnectionClosed):
                while True:             # at last: what had been sent to him before, and the end
                    await sleeper.receive()
        self.screen.check(heard == said, f"who reads has heard {heard} of {said} long lines")
        self.screen.check(sleeper.close_code == 1013, f"who reads nothing was closed with {sleeper.close_code}, not 1013")
        self.screen.say(f"{'one who reads nothing':40} 1013  closed after {said} long lines; the others have heard them all")

    async def count(self, ws):
        """How many long lines are said, before the end."""
        heard = 0
        async for who, text in self.lines(ws):
            if text == "The end":
                return heard
            heard += len(text) == CHAT_LINE

    async def stay(self, server):
        """Until Ctrl-C. Ben stays, too, and answers."""
        async def answer():
            async for who, text in self.lines(ben):
                if who != "Ben":
                    await ben.send(f"{who}, it is late. But tell me more about {text[:40]!r}.")

        self.over = self.shows = True
        async with self.enter("Ben") as ben, flowcoro.TaskGroup() as group:
            group.spawn(answer(), name="Ben")
            self.screen.say(f"It stays until Ctrl-C. Open {server.url}/ in a browser, best in two windows.", "bold")
            await flowcoro.stop_requested()
            group.cancel()


def _scene_chat(screen):
    """A chat room: everybody hears everything in the same order, strangers are shown the door, sleepers hold up nobody."""
    http, net, websocket = _load("flowcoro_http"), _load("flowcoro_net"), _load("flowcoro_websocket")
    screen.say("Look at the names: who speaks is one task, and who listens another, all by WebSocket, in one thread.")
    _run_visit(screen, _Evening(http, net, websocket, screen))


# ---- Scene: rpc --------------------------------------------------------------------------------------------
# A tea kitchen with a guest, who calls it and is called by it over one connection. Left is what the guest sees, right what the
# kitchen does.

KITCHEN_MINUTE = 0.01           # seconds
CUPS = 1_000_000                # that a stream would have, if somebody wanted them all
AHEAD = 1_000                   # of them are too many for one who takes 3


class _Kitchen:
    """What can be called there, what the guest is called with, and what either has seen."""

    def __init__(self, rpc, screen):
        self.rpc, self.screen = rpc, screen
        self.over = False
        self.poured, self.events = 0, []            # cups; what has happened, of which the scene wants to be sure

    def guest_sees(self, text):
        self.screen.say(text)

    def kitchen_sees(self, text, event=None):
        self.events.append(event)
        self.screen.say(f"{'':38}{text}")

    def methods(self):
        """The kitchen's."""
        server = self.rpc.RpcServer()

        @server.method
        async def brew(tea: str, minutes: float) -> str:
            """A pot of tea."""
            self.kitchen_sees(f"brews {tea}", ("brew", tea))
            try:
                await flowcoro.sleep(minutes * KITCHEN_MINUTE)
            except flowcoro.Cancelled:
                self.kitchen_sees(f"cancelled: empties the pot of {tea}", ("emptied", tea))
                raise
            return f"a pot of {tea}"

        @server.method
        async def order(peer, tea: str) -> str:
            """Asks the guest, in the middle of his call."""
            self.kitchen_sees("calls the guest: sugar?")
            return f"{tea} with {await peer.call('sugar', tea)} lumps"

        @server.method
        async def pour(cups: int):
            """A stream."""
            try:
                for self.poured in range(1, cups + 1):
                    yield f"cup {self.poured}"
            finally:
                self.kitchen_sees(f"stops after {self.poured} cups: no more were asked for", "stopped")

        return server

    def guest(self):
        """What the guest is called with."""
        methods = self.rpc.Methods()

        @methods.method
        async def sugar(tea: str) -> int:
            self.guest_sees(f"is called: sugar({tea!r}), answers 2")
            return 2

        return methods

    async def run(self):
        server = self.methods()
        try:
            listening = await server.start_tcp_server(0)
        except OSError as error:
            raise SceneFailed(f"no TCP on 127.0.0.1 here: {error}") from error
        with flowcoro.timeout(CHILD_TIMEOUT):
            try:
                async with await self.rpc.RpcClient.connect(*listening.local[:2], methods=self.guest(), reconnect=None) as client:
                    await self.out_of_order(client)
                    await self.both_ways(client)
                    await self.stream(client)
                    await self.give_up(client)
                    await self.lose(client, server)
            finally:
                await server.close(timeout=0)

    async def out_of_order(self, client):
        async def brew(tea, minutes):
            self.guest_sees(f"calls brew({tea!r}, {minutes})")
            got = await client.call("brew", tea, minutes)
            self.guest_sees(f"has {got}")
            answers.append(got)

        answers = []
        await flowcoro.when_all(brew("Oolong", 6), brew("Earl Grey", 2))
        self.screen.check(answers == ["a pot of Earl Grey", "a pot of Oolong"], f"the answers were {answers}")
        self.screen.say("The second call was answered first.", "green")

    async def both_ways(self, client):
        self.guest_sees("calls order('Assam')")
        got = await client.call("order", "Assam")
        self.screen.check(got == "Assam with 2 lumps", f"the answer to a call with a call in it was {got!r}")
        self.guest_sees(f"has {got}")
        self.screen.say("Either side calls the other, over the same connection.", "green")

    async def stream(self, client):
        self.guest_sees(f"streams pour({CUPS:,}), and takes 3")
        cups = []
        async with contextlib.aclosing(client.stream("pour", CUPS)) as stream:
            async for cup in stream:
                cups.append(cup)
                if len(cups) == 3:
                    break
        self.screen.check(cups == ["cup 1", "cup 2", "cup 3"], f"the stream began with {cups}")
        await self.until("stopped")
        self.screen.check(self.poured < AHEAD, f"{self.poured:,} cups were poured for one who took 3")
        self.screen.say("A stream makes as much as its reader takes, and a little ahead.", "green")

    async def give_up(self, client):
        self.guest_sees("calls brew('Pu-erh', 60000), with a timeout")
        try:
            await client.call("brew", "Pu-erh", 60_000, timeout=5 * KITCHEN_MINUTE)
            raise SceneFailed("a call outlived its timeout")
        except TimeoutError:
            self.guest_sees("TimeoutError")
        await self.until(("emptied", "Pu-erh"))
        self.screen.say("Who is not waited for any more need not go on.", "green")

    async def lose(self, client, server):
        """The kitchen is closed while it brews; the guest calls once more."""
        async def brew(tea):
            try:
                self.guest_sees(f"calls brew({tea!r}, 60000)")
                await client.call("brew", tea, 60_000)
            except self.rpc.ConnectionLost as error:
                self.guest_sees(f"ConnectionLost, sent={error.sent}")
                return error.sent

        async with flowcoro.TaskGroup() as group:
            first = group.spawn(brew("Sencha"))
            await self.until(("brew", "Sencha"))
            self.kitchen_sees("is shut")
            await server.close(timeout=0)
            found = await first, await brew("Matcha")
        self.screen.check(found[0] in (True, None) and found[1] is False and ("brew", "Matcha") not in self.events,
                          f"what was lost is told wrong: sent={found[0]} of a call that ran, sent={found[1]} of one that did not")
        self.screen.say("What was under way ended at once, and each knows whether it may have run.", "green")

    async def until(self, event):
        """Return when that has happened."""
        while event not in self.events:
            await flowcoro.sleep(0.001)


def _scene_rpc(screen):
    """Calls both ways over one connection, a stream, a call that is given up, and a connection that is lost."""
    rpc = _load("flowcoro_rpc")
    screen.say("Look at who sees what: left a guest, right the kitchen that he calls, by JSON-RPC over TCP.")
    _run_visit(screen, _Kitchen(rpc, screen))


# ---- Scene: timeouts ---------------------------------------------------------------------------------------

class _FiveEnds:
    """Five tasks and the five ways in which they end; and the time-line of that."""

    WIDTH = 30          # characters for the whole time: with name and note it fits 80 columns

    def __init__(self, progress):
        self.progress = progress
        self.start = flowcoro.now()
        self.marks = collections.defaultdict(list)      # {task: [(seconds since the start, character), …]}
        self.ends = {}                                  # {task: how it ended}, in the order in which they did

    def mark(self, character, end=None):
        """From now on the running task's row consists of `character`; `end` says how the task has ended."""
        name = flowcoro.current_task().name
        self.marks[name].append((flowcoro.now() - self.start, character))
        if end:
            self.ends[name] = end
            self.progress(len(self.ends), 5)

    async def quick(self):
        self.mark("=")
        await flowcoro.sleep(0.1)
        self.mark("|", "finished by itself")

    async def impatient(self):
        self.mark("=")
        try:
            with flowcoro.timeout(0.2):
                await flowcoro.sleep(math.inf)
        except TimeoutError:
            self.mark("x", "TimeoutError: its timeout")

    async def nested(self):
        self.mark("=")
        with flowcoro.move_on_after(0.3) as outer:
            with flowcoro.move_on_after(0.6):
                await flowcoro.sleep(math.inf)
        self.mark("x", f"the {'outer' if outer.cancelled_caught else 'inner'} of two timeouts")

    async def cancelled(self):
        self.mark("=")
        try:
            await flowcoro.sleep(math.inf)
        finally:
            self.mark("x", "cancelled with its group")

    async def careful(self):
        self.mark("=")
        try:
            await flowcoro.sleep(math.inf)
        finally:
            self.mark("~")
            with flowcoro.CancelScope(shield=True):     # a cleanup that waits: cancellation stays outside
                await flowcoro.sleep(0.1)
            self.mark("|", "after a shielded cleanup")

    async def run(self):
        """All five in one group, which is cancelled when the first three have ended; returns self."""
        async with flowcoro.TaskGroup() as group:
            first = [group.spawn(self.quick(), name="quick"),
                     group.spawn(self.impatient(), name="impatient"),
                     group.spawn(self.nested(), name="nested")]
            group.spawn(self.cancelled(), name="cancelled")
            group.spawn(self.careful(), name="careful")
            for task in first:
                await task
            group.cancel()
        return self

    def draw(self):
        """One line of text per task."""
        scale = self.WIDTH / max(marks[-1][0] for marks in self.marks.values())
        for name, marks in self.marks.items():
            row = ""
            for (_, character), (until, _) in zip(marks, marks[1:]):
                row = row.ljust(round(scale * until), character)
            end, last = marks[-1]
            yield f"{name:10}{row + last:{self.WIDTH + 2}}{end:.2f} s  {self.ends[name]}"


async def _five_ends(progress):
    return await _FiveEnds(progress).run()


def _scene_timeouts(screen):
    """Timeouts, a cancelled group and a shielded cleanup, drawn as they happened."""
    screen.say("Look at where the rows end: x is a cancellation, ~ a cleanup for which the group waits.")
    screen.progress(0, 5)
    ends = flowcoro.run(_five_ends(screen.progress))
    for row in ends.draw():
        screen.say(row)
    for name, earliest in ("quick", 0.1), ("impatient", 0.2), ("nested", 0.3), ("careful", 0.4):
        seconds = ends.marks[name][-1][0]
        screen.check(seconds > earliest - 0.01, f"{name} ended after {seconds:.3f} s, not after {earliest} s")
    order = ", ".join(ends.ends)
    screen.check(order == "quick, impatient, nested, cancelled, careful", f"they ended in the order {order}")
    screen.check("outer" in ends.ends["nested"], "the inner timeout won although the outer expired first")
    screen.say("All ended as they should, and in this order.", "green")


# ---- Scene: deadlock ---------------------------------------------------------------------------------------

async def _transfer(first, second):
    """Needs both locks, and takes them one after the other."""
    async with first:
        await flowcoro.checkpoint()             # the other task gets its turn, and its first lock
        async with second:
            pass


async def _two_transfers(same_order):
    """Broken unless `same_order`: each of the two tasks then holds the lock that the other waits for."""
    ours, theirs = flowcoro.Lock(), flowcoro.Lock()
    async with flowcoro.TaskGroup() as group:
        group.spawn(_transfer(ours, theirs), name="there")
        group.spawn(_transfer(ours, theirs) if same_order else _transfer(theirs, ours), name="back")


def _scene_deadlock(screen):
    """Two locks, taken in opposite order: run() raises Deadlock, which says who waits for what."""
    screen.say("Look at the report: instead of a program that hangs, every task says what it waits for.")
    screen.progress(0, 1)
    try:
        flowcoro.run(_two_transfers(same_order=False))
        raise SceneFailed("two locks taken in opposite order did not end in a Deadlock")
    except flowcoro.Deadlock as error:
        report = str(error)
    screen.say("\n".join(f"| {line}" for line in report.splitlines()))
    for name in "there", "back":
        screen.check(f" {name}: parked: acquire a Lock" in report, f"the report does not say what `{name}` waits for")
    screen.say("How to read it: `there` and `back` each wait for a lock, and the other one holds it.")
    flowcoro.run(_two_transfers(same_order=True))
    screen.say("The cure, both taking the locks in the same order, has just run to its end.", "green")


# ---- Scene: workers ----------------------------------------------------------------------------------------

class _Lanes:
    """Who ran what: tasks that sleep and compute by turns, one that blocks its worker, and a lane for each worker."""

    WIDTH = 60          # characters for the whole time
    WORKERS = 3
    STEP = 0.01         # seconds that a step computes: more than a character is wide, so that each step is seen
    PATIENCE = 10.0     # seconds that the thoughtless task waits for the others to take over

    def __init__(self, progress):
        self.progress = progress
        self.start = flowcoro.now()
        self.home = threading.get_ident()               # the thread of worker 1, on which all tasks begin
        self.report = None                              # what the watchdog says of the blocked worker
        self.blocked = None                             # the thread that is; set by the thoughtless task alone
        # What several workers change, in ran() alone, which is atomic:
        self.lanes = {self.home: []}                    # {thread: [(from, until, character), …]}
        self.thread_of = {}                             # {letter: the thread of its last step}
        self.taken_over = 0                             # steps made elsewhere while a worker is blocked

    @flowcoro.atomic
    def ran(self, began, character):
        """The running task has computed since `began`.

        One step for all workers: unmarked, two that add 1 at the same time might add 1 together.
        """
        thread = threading.get_ident()
        moved = self.thread_of.get(character, self.home) != thread
        self.thread_of[character] = thread
        self.lanes.setdefault(thread, []).append(
            (began - self.start, flowcoro.now() - self.start, character.upper() if moved else character))
        if self.blocked not in (None, thread):
            self.taken_over += 1

    async def busy(self, letter):
        """A step of some milliseconds, a pause, a step …"""
        for _ in range(6):
            began = flowcoro.now()
            while flowcoro.now() < began + self.STEP:
                pass
            self.ran(began, letter)
            await flowcoro.sleep(0.055)

    async def thoughtless(self):
        """Blocks its whole worker, as a call of a library does that knows nothing of tasks."""
        await flowcoro.sleep(0.1)
        began = flowcoro.now()
        self.blocked = threading.get_ident()
        while flowcoro.now() < began + 0.25 or (
                not (self.taken_over and self.report) and flowcoro.now() < began + self.PATIENCE):
            time.sleep(0.01)
        self.blocked = None
        self.ran(began, "x")

    def task_stuck(self, task, seconds, report):
        """A hook: the watchdog has found the thoughtless task, or another one if the machine is slow today."""
        if task is not None and task.name == "thoughtless":
            self.report = self.report or report

    async def run(self):
        """Everything begins on one worker; returns self."""
        flowcoro.add_hooks(self)
        async with flowcoro.TaskGroup() as group:
            tasks = [group.spawn(self.thoughtless(), name="thoughtless", pinned=True)]
            tasks += [group.spawn(self.busy(letter)) for letter in "abcde"]
            for number, task in enumerate(tasks, 1):
                await task
                self.progress(number, len(tasks))
        return self

    def draw(self, colour):
        """One line of text per worker; with `colour` the steps of each task have their own."""
        scale = self.WIDTH / max(until for lane in self.lanes.values() for _, until, _ in lane)
        for number, lane in enumerate(self.lanes.values(), 1):
            row = ["."] * self.WIDTH
            for began, until, character in sorted(lane, key=lambda step: step[2].isupper()):    # no capital is drawn over
                first = min(int(scale * began), self.WIDTH - 1)
                for place in range(first, max(first + 1, int(scale * until))):
                    row[place] = character
            text = "".join(row)
            yield f"worker {number}  {self._coloured(text) if colour else text}"

    @staticmethod
    def _coloured(text):
        """The lane `text` with a colour for each letter, small or capital: a run is of one letter."""
        return re.sub(r"([a-ex])\1*", lambda run: f"\x1b[{31 + 'xabcde'.index(run[1].lower())}m{run[0]}\x1b[0m", text,
                      flags=re.IGNORECASE)


async def _lanes(progress):
    return await _Lanes(progress).run()


def _scene_workers(screen):
    """Three workers, one of them blocked by a thoughtless task, drawn as they ran."""
    screen.say("Look at the x: that worker is blocked, and the others go on with its tasks.\n"
               "(A capital letter: this task has just changed its worker.)")
    screen.progress(0, 6)
    lanes = flowcoro.run(_lanes(screen.progress), workers=_Lanes.WORKERS, watchdog=0.1)
    for row in lanes.draw(screen.colour):
        screen.say(row)
    screen.check(lanes.taken_over, "nobody took over the tasks of the blocked worker")
    screen.check(lanes.report, "the watchdog has said nothing of the task that blocks")
    stack = [line.strip() for line in lanes.report.splitlines() if line.startswith("  File ")]
    screen.say(f"The watchdog: {lanes.report.partition('. ')[0]};\n    {stack[-1]}" if stack else lanes.report)
    gil = flowcoro.runtime_info()["gil"]
    screen.say("This Python has a GIL: only one worker computes at a time, but none waits for a blocked one." if gil else
               "This Python has no GIL: the workers compute at the same time.")
    screen.say(f"While it was blocked, the other workers made {lanes.taken_over} steps.", "green")


# ---- demo --------------------------------------------------------------------------------------------------

def _run_scene(screen, name, place):
    """Run one scene under its title: False if it failed, which it has said by then."""
    module, function, line = SCENES[name]
    screen.say(f"\n{place} {name}: {line}", "bold")
    try:
        getattr(_load(module), function)(screen)
    except SceneFailed as error:
        screen.say(f"FAILED: {error}", "red")
        return False
    except UsageError as error:                 # a sibling that was not vendored: other scenes do without it
        screen.say(f"Left out: {error}")
    finally:
        screen.clear()
    return True


def _demo_command(arguments):
    """`demo [NAME …] [--list] [--keep]`: all scenes, or those named; one that fails does not keep the next from it."""
    parser = _parser("demo", "Shows what coroutines are good for, with figures measured here and now.")
    parser.add_argument("scenes", nargs="*", metavar="NAME", help="scenes to run (default: all)")
    parser.add_argument("--list", action="store_true", help="list the scenes")
    parser.add_argument("--keep", action="store_true", help="the server of the scenes http and chat stays until Ctrl-C")
    options = parser.parse_args(arguments)
    if options.list:
        for name, (_, _, line) in SCENES.items():
            print(f"  {name:10} {line}")
        return 0
    for name in options.scenes:
        _load(SCENES[_look_up("scene", name, SCENES)][0])       # a wrong name is told before the first scene
    names, screen, start = options.scenes or list(SCENES), Screen(sys.stdout, options.keep), time.perf_counter()
    screen.say(f"FlowCoro {flowcoro.__version__}, {platform.python_implementation()} "
               f"{platform.python_version()}, {platform.system()}, {os.cpu_count()} cores")
    failed = [name for number, name in enumerate(names, 1)
              if not _run_scene(screen, name, f"{number}/{len(names)}")]
    screen.say(f"\nIn all {time.perf_counter() - start:.1f} s.")
    if failed:
        screen.say(f"Failed: {', '.join(failed)}.", "red")
    screen.say("Where to read next:")
    for name, about in READ_NEXT.items():
        path = HERE / name
        if path.exists():
            screen.say(f"  {name + '/' * path.is_dir():12} {about}")
    return 1 if failed else 0


# ---- vendor ------------------------------------------------------------------------------------------------

def _as_flat(text):
    """The source `text` as a file beside its siblings."""
    return PACKAGE_IMPORT.sub(r"import \1", text)


def _as_package(text):
    """The source `text` as a module of a package."""
    return FLAT_IMPORT.sub(r"from . import \1", text)


def _read(path):
    """The text of a file. Its line ends become "\\n": a copy checked out on Windows is not a changed copy."""
    return path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")


def _version_of(text):
    """The version a source file says it is, or "unknown"."""
    return found[1] if (found := VERSION.search(text)) else "unknown"


def _known_modules():
    """{name: path} of the FlowCoro modules that lie beside this one."""
    return {path.stem: path for path in sorted(HERE.glob("flowcoro*.py")) if re.fullmatch(MODULE, path.stem)}


def _full_name(module):
    """`net`, `flowcoro_net` and `flowcoro_net.py` all mean flowcoro_net; UsageError if there is none."""
    name, known = module.removesuffix(".py"), _known_modules()
    for candidate in name, f"flowcoro_{name}":
        if candidate in known:
            return candidate
    return _look_up("module", name, [other.removeprefix("flowcoro_") for other in known])


def _imported_siblings(text):
    """The FlowCoro modules that the source `text` imports at column 0, the only place where it may."""
    return [alias.name for statement in ast.parse(text).body if isinstance(statement, ast.Import)
            for alias in statement.names if re.fullmatch(MODULE, alias.name)]


def _sources(names, package):
    """{file name: text as it is to be copied} of modules and all they need; UsageError if one is missing."""
    known, sources, wanted = _known_modules(), {}, [(name, "vendor") for name in names]
    while wanted:
        name, importer = wanted.pop()
        if name not in known:
            raise UsageError(f"{importer} needs {name}.py, which is missing: copy it to {HERE}")
        if f"{name}.py" not in sources:
            text = _as_flat(_read(known[name]))
            sources[f"{name}.py"] = _as_package(text) if package else text
            wanted += [(sibling, f"{name}.py") for sibling in _imported_siblings(text)]
    return dict(sorted(sources.items()))


def _difference(there, here):
    """How the text `there` differs from the text `here`, in words."""
    lines = list(difflib.unified_diff(here.splitlines(), there.splitlines(), n=0, lineterm=""))[2:]
    added, removed = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    return f"+{added} -{removed} lines (version {_version_of(there)} there, {_version_of(here)} here)"


def _check_copies(destination, names, package):
    """Say of each copy whether it is the same as here: 0 if all are, 1 if one differs or is not there."""
    found = [name for name in _known_modules() if (destination / f"{name}.py").exists()]
    all_same = True
    for name, here in _sources(names or found or ["flowcoro"], package).items():
        path = destination / name
        there = _read(path) if path.is_file() else None
        all_same &= there == here
        if there == here:
            print(f"same:      {path} (version {_version_of(here)})")
        else:
            print(f"not there: {path}" if there is None else f"differs:   {path}: {_difference(there, here)}")
    return 0 if all_same else 1


def _refuse_to_lose(destination, files):
    """UsageError if a file at `destination` is neither form of this version: copying would lose it."""
    changed = []
    for name, text in files.items():
        path = destination / name
        if path.exists() and _as_flat(there := _read(path)) != _as_flat(text):
            changed.append(f"\n  {path}: {_difference(there, text)}")
    if changed:
        raise UsageError("nothing was copied: these files have been changed, or are of another version; "
                         f"--force overwrites them{''.join(changed)}")


def _write(destination, files):
    """Write {name: text} to `destination`, made if need be; all is written before the first rename."""
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".flowcoro-", dir=destination) as staging:
        for name, text in files.items():
            pathlib.Path(staging, name).write_bytes(text.encode("utf-8"))
        for name in files:
            os.replace(pathlib.Path(staging, name), destination / name)


def _package_name(folder):
    """The dotted name of the package in `folder`, as its top-level package's parent directory sees it."""
    name, folder = folder.name, folder.parent
    while (folder / "__init__.py").exists():
        name, folder = f"{folder.name}.{name}", folder.parent
    return name


def _vendor(destination, names, package, force):
    """Copy the modules `names` and what they need, all or none, and say so."""
    files = _sources(names, package)
    if package and not destination.resolve().name.isidentifier():
        raise UsageError(f"no program can import a package named {destination.resolve().name!r}: give its folder a name of "
                         "letters, digits and _, or leave out --package")
    was_package = (destination / "__init__.py").exists()
    if not force:
        _refuse_to_lose(destination, files)
    if package and not was_package:
        files["__init__.py"] = ""
    new = {name: text for name, text in files.items()
           if not (destination / name).exists() or _read(destination / name) != text}
    _write(destination, new)
    if was_package:
        print(f"{destination} is a package (it has an __init__.py), so its copies use `from . import`")
    for name, text in files.items():
        version = f" (version {_version_of(text)})" if text else ""
        print(f"{'copied' if name in new else 'same'}: {destination / name}{version}")
    where = f"from {_package_name(destination.resolve())}" if package else f"with {destination} on sys.path:"
    print(f"use: {where} import {names[0]}")


def _vendor_command(arguments):
    """`vendor DEST [module …] [--package] [--force]` or `vendor --check DEST [module …]`."""
    parser = _parser("vendor", "Copies FlowCoro's files, and what they need, into a project.")
    parser.epilog = f"modules: {', '.join(_known_modules())}; the flowcoro_ may be left out"
    parser.add_argument("destination", metavar="DEST", type=pathlib.Path, help="a folder, made if need be")
    parser.add_argument("modules", metavar="module", nargs="*", default=[], help="modules to copy (default: flowcoro)")
    parser.add_argument("--package", action="store_true",
                        help="relative imports, for a package; DEST is one if it has an __init__.py")
    parser.add_argument("--check", action="store_true", help="copy nothing, say what differs from here")
    parser.add_argument("--force", action="store_true", help="overwrite files that differ from this version")
    options = parser.parse_args(arguments)
    destination, names = options.destination, [_full_name(module) for module in options.modules]
    try:
        if destination.exists() and not destination.is_dir():
            raise UsageError(f"{destination} is a file; name a folder")
        if destination.resolve() == HERE:
            raise UsageError(f"{destination} is where these files come from")
        package = options.package or (destination / "__init__.py").exists()
        if options.check:
            return _check_copies(destination, names, package)
        _vendor(destination, names or ["flowcoro"], package, options.force)
    except BrokenPipeError:             # our own output; main() knows what to do
        raise
    except (OSError, ValueError, RuntimeError) as error:        # the last: a circle of symbolic links
        raise UsageError(f"cannot use {destination}: {error}") from error
    return 0


# ---- bench -------------------------------------------------------------------------------------------------

def _bench_command(arguments):
    """`bench …`: run benchmarks/kernel.py, or `bench NAME …`: benchmarks/NAME.py, as if it had been started itself."""
    folder = HERE / "benchmarks"
    if not folder.is_dir():
        raise UsageError(f"the benchmarks come with a clone of the repository; there is no {folder}")
    name = "kernel"
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    _look_up("benchmark", name, sorted(script.stem for script in folder.glob("*.py")))
    script = folder / f"{name}.py"
    sys.argv[:] = [str(script), *arguments]
    sys.path[:0] = [str(script.parent), str(HERE)]
    runpy.run_path(str(script), run_name="__main__")        # ends in SystemExit with its status, or returns
    return 0


# ---- get ---------------------------------------------------------------------------------------------------
# A file is written as FILE.part, beside it FILE.part.info says of what; when all has come it gets its name. So FILE is
# complete whenever it is there, and what an end in the middle leaves can be gone on with: by Range, and If-Range with
# the validator of FILE.part.info, so that the halves of two versions are never joined.

GET_EPILOG = """\
exit status, as curl has it: 0 done · 2 the command line · 3 no URL · 6 no such host · 7 no connection · 8 no HTTP · 18 the
transfer ended too early · 22 the status is 400 or more · 23 the file cannot be written · 28 out of time · 33 the server cannot
go on where -C wants to · 35 no TLS · 47 redirects · 56 the connection broke · 60 a certificate that is not trusted

Unlike curl it follows redirects, does not overwrite a file without --force, and says by its status (22) what the server's says;
with -o the content of such an answer is not kept. -o writes to FILE.part first; after an interruption -C goes on with that.
"""


class GetFailed(CliError):
    """`get` has not got it: `status`, the exit status."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class _Meter:
    """How far a transfer is, on a terminal; nothing elsewhere."""

    def __init__(self, stream, began, silent):
        self.screen, self.began, self.told, self.start = Screen(stream), began, began, 0
        self.shown = self.screen.terminal and not silent

    def tell(self, done, whole):
        now = time.monotonic()
        if not self.shown or now < self.told + 0.1:
            return
        self.told = now
        rate = (done - self.start) / max(0.001, now - self.began)
        line = f"{_bytes_in_words(done)}, {_bytes_in_words(rate)}/s"
        if whole:
            filled = Screen.BAR * done // whole
            left = int((whole - done) / rate) if rate else 0
            line = (f"[{'#' * filled}{'.' * (Screen.BAR - filled)}] {100 * done // whole:3d}% of {_bytes_in_words(whole)}, "
                    f"{_bytes_in_words(rate)}/s, {left // 60}:{left % 60:02d} left")
        self.screen.stream.write(f"\r{line:<78.78}")
        self.screen.stream.flush()

    def clear(self):
        if self.shown and self.told != self.began:
            self.screen.stream.write("\r" + " " * 78 + "\r")
            self.screen.stream.flush()


def _bytes_in_words(count):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024


class _Download:
    """FILE, FILE.part and FILE.part.info."""

    def __init__(self, path, url, proceed, force):
        self.path, self.url, self.proceed, self.force = pathlib.Path(path), url, proceed, force
        self.part = self.path.with_name(self.path.name + ".part")
        self.info = self.path.with_name(self.path.name + ".part.info")
        self.plain = self.path.exists() and not self.path.is_file()         # /dev/null, a pipe: written as it is
        self.offset, self.validator, self.whole = 0, None, None            # bytes that FILE has in the end, if that is known
        if self.path.is_dir():
            raise UsageError(f"{self.path} is a folder; name a file")
        if self.path.is_file() and not force:
            raise UsageError(f"{self.path} is there already; --force overwrites it")
        if self.plain:
            return
        if proceed and self.part.is_file():
            self._look()
        elif self.part.exists() and not force:
            raise UsageError(f"{self.part} is there, the beginning of a transfer that was interrupted; -C goes on with it, "
                             "--force begins anew")

    def _look(self):
        """What is there, if it is known of what."""
        try:
            said = json.loads(self.info.read_text(encoding="utf-8"))
            url, validator = said["url"], said["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            url = validator = None
        if url != self.url or not isinstance(validator, str) or not re.fullmatch(r"[\x20-\x7e]+", validator):
            if not self.force:
                raise GetFailed(33, f"{self.part}: it is not known of which version of {self.url} it is the beginning; --force "
                                    "begins anew")
            return
        self.offset, self.validator = self.part.stat().st_size, validator

    def headers(self):
        return {"Range": f"bytes={self.offset}-", "If-Range": self.validator} if self.offset else {}

    def open(self, response):
        """The file to write to, at the place where the response's content belongs."""
        if self.plain:
            return open(self.path, "wb")
        if response.status == 206 and (self.offset or "range" not in response.request.headers):
            self._check(response)
            return open(self.part, "ab")
        self.offset = 0
        file = open(self.part, "wb")
        validator = response.headers.get("etag", "")
        if not validator.startswith('"'):           # a weak tag does not say that each byte is the same
            validator = response.headers.get("last-modified")
        if response.status == 206:                  # of a range that the user asked for, which is nothing to go on with
            validator = None
        self.info.write_text(json.dumps({"url": self.url, "validator": validator}), encoding="utf-8")
        return file

    def _check(self, response):
        """Whether a 206 is what follows, and of the same version: there are servers that know Range and not If-Range."""
        said = response.headers.get("content-range", "")
        found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/(?:([0-9]{1,18})|\*)", said)
        if not self.offset or found is None or int(found[1]) != self.offset:
            raise GetFailed(33, f"the server sends {said!r} where it was asked for what follows byte {self.offset}")
        if not self._is_same(response):
            raise GetFailed(33, f"{self.url} has changed since {self.part} was written; --force without -C begins anew")
        self.whole = found[2] and int(found[2])

    def is_complete(self, response):
        """Whether a 416 says that nothing is missing."""
        return response.headers.get("content-range") == f"bytes */{self.offset}" and self._is_same(response)

    def _is_same(self, response):
        """Whether it is of the version that FILE.part is the beginning of, as far as it says of which it is."""
        name = "etag" if self.validator.startswith('"') else "last-modified"
        return response.headers.get(name, self.validator) == self.validator

    def finish(self):
        """Give it its name. GetFailed if the server has sent less than there is, which it may in answer to a Range."""
        if self.whole is not None and self.part.stat().st_size != self.whole:
            raise GetFailed(18, f"the server sent a part of what was asked for; {self.path} has {self.whole} bytes in the end")
        if not self.plain:
            os.replace(self.part, self.path)
            self.info.unlink(missing_ok=True)

    def left(self):
        """What to say of an end in the middle."""
        try:
            return f"; {self.part} has {self.part.stat().st_size} bytes, -C goes on" if not self.plain else ""
        except OSError:
            return ""


def _get_parser():
    parser = _parser("get", "Fetches what is at a URL, and prints it or writes it to a file.")
    parser.epilog, parser.formatter_class = GET_EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("url", metavar="URL", help="http:// goes without saying")
    parser.add_argument("-o", "--output", metavar="FILE", help="write to FILE")
    parser.add_argument("-O", "--remote-name", action="store_true", help="write to a file named as the URL's end")
    parser.add_argument("-C", "--continue", dest="proceed", action="store_true", help="go on with a transfer to a file")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("-H", "--header", metavar="'NAME: VALUE'", action="append", default=[], help="send this header, too")
    parser.add_argument("-d", "--data", metavar="DATA", action="append", default=[],
                        help="POST it, as a form's fields; @FILE: what is in FILE (@-: stdin) without its line ends")
    parser.add_argument("-X", "--request", metavar="METHOD", help="instead of GET, or POST with -d")
    parser.add_argument("-I", "--head", action="store_true", help="ask for the headers alone")
    parser.add_argument("-i", "--include", action="store_true", help="print the headers, too")
    parser.add_argument("-L", "--location", action="store_true", help="follow redirects: it does so anyway")
    parser.add_argument("--no-location", action="store_true", help="do not")
    parser.add_argument("-u", "--user", metavar="USER[:PASSWORD]", help="basic authentication; it asks for a password left out")
    parser.add_argument("--digest", action="store_true", help="digest authentication instead")
    parser.add_argument("-x", "--proxy", metavar="URL", help="instead of http_proxy, https_proxy … of the environment")
    parser.add_argument("--cacert", metavar="FILE", help="certificates to trust instead of the system's")
    parser.add_argument("-k", "--insecure", action="store_true", help="trust anybody, who may be in the middle")
    parser.add_argument("-m", "--max-time", metavar="SECONDS", type=float, default=math.inf, help="for all of it")
    parser.add_argument("-s", "--silent", action="store_true", help="no progress bar")
    return parser


def _get_data(pieces):
    """-d: the content, or None."""
    content = []
    for piece in pieces:
        if piece.startswith("@"):
            try:
                data = sys.stdin.buffer.read() if piece == "@-" else pathlib.Path(piece[1:]).read_bytes()
            except OSError as error:
                raise UsageError(f"-d {piece}: {error}") from error
            content.append(data.replace(b"\r", b"").replace(b"\n", b""))
        else:
            content.append(os.fsencode(piece))
    return b"&".join(content) if content else None


def _get_settings(http, options):
    """The arguments of HttpClient, and those of its stream()."""
    headers = [("Accept-Encoding", "identity")]
    for line in options.header:
        name, colon, value = line.partition(":")
        if not colon:
            raise UsageError(f"-H {line!r}: give 'Name: value'")
        headers.append((name.strip(), value.strip()))
    content = _get_data(options.data)
    if content is not None and "content-type" not in [name.lower() for name, _ in headers]:
        headers.append(("Content-Type", "application/x-www-form-urlencoded"))
    auth = None
    if options.user is not None:
        user, colon, password = options.user.partition(":")
        if not colon:
            try:
                password = getpass.getpass(f"Password of {user}: ")
            except EOFError:
                raise UsageError(f"-u {user}: there is no terminal to ask for a password at; give it after a colon") from None
        auth = (http.DigestAuth if options.digest else http.BasicAuth)(user, password)
    client = {"headers": headers, "auth": auth, "follow_redirects": not options.no_location, "max_bytes": None, "decode": False,
              "verify": False if options.insecure else options.cacert or True,
              "timeout": http.Timeouts(connect=60.0, head=300.0, read=300.0, total=None)}
    if options.proxy:
        client["proxy"] = options.proxy
    return client, {"content": content}


async def _get(http, options, url, download, settings):
    """Do it: the exit status."""
    client_settings, request = settings
    method = options.request or ("HEAD" if options.head else "GET" if request["content"] is None else "POST")
    meter = _Meter(sys.stderr, time.monotonic(), options.silent or download is None)
    out = sys.stdout.buffer
    try:
        async with http.HttpClient(**client_settings) as client:
            async with client.stream(method, url, headers=download.headers() if download else {}, **request) as response:
                if options.include or options.head:
                    for one in (*response.history, response):
                        lines = [f"HTTP/{one.version} {one.status} {one.reason}".rstrip()]
                        lines += [f"{name}: {value}" for name, value in one.headers]
                        out.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
                    out.flush()
                if download is not None and response.status < 400 and response.status != 304:
                    with download.open(response) as file:
                        await _get_into(file, response, meter, download.offset)
                    download.finish()
                    return 0
                if download is not None and download.offset and response.status == 416 and download.is_complete(response):
                    download.finish()
                    return 0
                if download is None:
                    await _get_into(out, response, meter, 0)
                    out.flush()
                if response.status >= 400:
                    print(f"flowcoro: {response.url}: {response.status} {response.reason}".rstrip(), file=sys.stderr)
                    return 22
                return 0
    finally:
        meter.clear()


async def _get_into(file, response, meter, offset):
    length, done, terminal = response.headers.get("content-length"), offset, file.isatty()
    meter.start = offset
    async for piece in response:
        if terminal and b"\0" in piece:
            raise GetFailed(23, "this is no text, and stdout a terminal; -o FILE writes it to a file")
        try:
            file.write(piece)           # (one task is all there is: nobody waits for the disk but who wants to)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise GetFailed(23, f"cannot write: {error}") from error
        done += len(piece)
        meter.tell(done, offset + int(length) if length else None)


def _get_status(http, net, error):
    """The exit status for an error of HttpClient."""
    cause = error.__cause__
    for kind, status in ((http.RequestTimeout, 28), (http.RedirectError, 47), (http.ResponseError, 8), (http.ProxyError, 56)):
        if isinstance(error, kind):
            return status
    if isinstance(error, http.ConnectError):
        if isinstance(cause, net.TlsError):
            return 60 if isinstance(cause.__cause__, ssl.SSLCertVerificationError) else 35
        return 6 if isinstance(cause, net.ResolveError) else 7
    return 18 if error.response is not None else 56


def _get_command(arguments):
    """`get URL [-o FILE] …`."""
    options = _get_parser().parse_args(arguments)
    http, net = _load("flowcoro_http"), _load("flowcoro_net")
    url = options.url if "://" in options.url else f"http://{options.url}"
    shown = re.sub(r"(?<=://)[^/?#]*@", "", url)        # without a password, for messages and files
    if not options.max_time > 0:
        raise UsageError(f"--max-time {options.max_time:g}: give more than 0 seconds")
    if options.remote_name and options.output is None:
        name = url.partition("://")[2].partition("?")[0].partition("#")[0].partition("/")[2].rpartition("/")[2]
        if not name:
            raise UsageError(f"-O: {shown} does not end with a name; give one with -o")
        options.output = http.safe_filename(urllib.parse.unquote(name))
    if options.head and options.output not in (None, "-"):
        raise UsageError("-I asks for no content that could be written to a file; leave -o and -O out")
    if options.proceed and options.output in (None, "-"):
        raise UsageError("-C needs the file to go on with: -o FILE or -O")
    download = None
    try:
        settings = _get_settings(http, options)
        if options.output not in (None, "-"):
            download = _Download(options.output, shown, options.proceed, options.force)

        async def in_time():
            with flowcoro.timeout(options.max_time):
                return await _get(http, options, url, download, settings)

        return flowcoro.run(in_time())
    except http.RequestError as error:
        status, said = _get_status(http, net, error), str(error)
    except GetFailed as error:
        status, said = error.status, str(error)
    except TimeoutError:
        status, said = 28, f"{shown}: not done within --max-time {options.max_time:g} seconds"
    except (ValueError, TypeError, http.LocalProtocolError) as error:
        status, said = 3, str(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        status, said = 23, str(error)
    print(f"flowcoro: {said}{download.left() if download and status in (18, 28, 56) else ''}", file=sys.stderr)
    return status


# ---- rpc ---------------------------------------------------------------------------------------------------

RPC_EPILOG = """\
Without METHOD it lists what the server can be called with (rpc.discover). An argument is JSON, or else a plain text: 3 is a
number, "3" (with the quotes) a text, and so is three. NAME=VALUE is an argument by its name; all are, or none. The result is
printed as JSON, and each item of a stream on a line.

exit status, as `get` has it: 0 done · 2 the command line · 6 no such host · 7 no connection · 8 no JSON-RPC · 22 the answer is
an error · 28 out of time · 35 no TLS · 56 the connection broke · 60 a certificate that is not trusted
"""

FRAMINGS = {"newline": "Newline", "content-length": "ContentLength", "netstring": "Netstring", "length": "LengthPrefixed",
            "concatenated": "Concatenated"}


def _rpc_parser():
    parser = _parser("rpc", "Calls a method of a JSON-RPC 2.0 server, and prints its result.")
    parser.usage = "python -m flowcoro rpc [options] (HOST:PORT | --unix PATH) [METHOD [ARGUMENT …]]"
    parser.epilog, parser.formatter_class = RPC_EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("words", nargs="*", metavar="HOST:PORT METHOD ARGUMENT", help="what to call, and with what")
    parser.add_argument("--unix", metavar="PATH", help="a Unix socket, instead of HOST:PORT")
    parser.add_argument("--framing", choices=FRAMINGS, default="newline", help="how messages are told apart (default: newline)")
    parser.add_argument("--tls", action="store_true", help="by TLS")
    parser.add_argument("--cacert", metavar="FILE", help="with --tls: certificates to trust instead of the system's")
    parser.add_argument("-k", "--insecure", action="store_true", help="with --tls: trust anybody, who may be in the middle")
    parser.add_argument("-m", "--timeout", metavar="SECONDS", type=float, default=30.0, help="for all of it (default: 30)")
    parser.add_argument("--notify", action="store_true", help="ask for no answer")
    parser.add_argument("--stream", action="store_true", help="print the items of a stream, as they come")
    return parser


def _rpc_address(text):
    """(host, port) of "host:port", "[::1]:port" or ":port"."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"{text!r}: write an address of IPv6 in brackets, as [::1]:4000")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UsageError(f"{text!r} is no HOST:PORT, as localhost:4000")
    return host or "127.0.0.1", int(port)


def _rpc_value(schema, text):
    """The value that an argument stands for. What looks like JSON has to be."""
    try:
        return schema.load_json(text.encode("utf-8", "surrogateescape"))
    except ValueError as error:
        if text.lstrip()[:1] in ("{", "[", '"'):
            raise UsageError(f"{text!r} is no JSON: {error}") from error
        return text


def _rpc_params(schema, words):
    """The parameters: a list, a dict, or None where there are none."""
    named = [re.match(r"[^\W\d]\w*=", word) for word in words]
    if not any(named):
        return [_rpc_value(schema, word) for word in words] or None
    params = {}
    for word, found in zip(words, named):
        if not found:
            raise UsageError(f"{word!r} has no name, and others have: give a name to all arguments, or to none")
        name = found[0][:-1]
        if name in params:
            raise UsageError(f"{name}= is there twice")
        params[name] = _rpc_value(schema, word[len(found[0]):])
    return params


def _shown(text):
    """Without what a terminal would obey."""
    return re.sub(r"[\0-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def _pretty(value, indent=2):
    """A value as JSON; text that a terminal would obey is escaped."""
    return re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, indent=indent, ensure_ascii=False))


def _type_words(schema):
    """A JSON Schema in a word or two."""
    if not isinstance(schema, dict):
        return "any"
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if isinstance(either := schema.get("anyOf") or schema.get("oneOf"), list):
        return " | ".join(_type_words(one) for one in either)
    if isinstance(among := schema.get("enum"), list):
        return " | ".join(_pretty(one, None) for one in among)
    if schema.get("type") == "array" and "items" in schema:
        return f"[{_type_words(schema['items'])}]"
    kind = schema.get("type", "any")
    return " | ".join(map(str, kind)) if isinstance(kind, list) else str(kind)


def _method_lines(method):
    """What is said of a method of an OpenRPC document: how it is called, and what it is for."""
    params = method.get("params") if isinstance(method.get("params"), list) else []
    params = [f"{one.get('name')}{'' if one.get('required') else '?'}: {_type_words(one.get('schema'))}"
              for one in params if isinstance(one, dict)]
    result = method.get("result")
    gives = f" -> {_type_words(result.get('schema'))}" if isinstance(result, dict) else ""
    yield f"{method.get('name')}({', '.join(params)}){gives}"
    if about := method.get("summary") or method.get("description"):
        yield f"    {str(about).strip().partition(chr(10))[0]}"


async def _rpc(rpc, tls, options, address, method, params):
    """Do it: lines to print, one after the other."""
    framing = getattr(rpc, FRAMINGS[options.framing])
    async with await rpc.RpcClient.connect(*address, unix=options.unix, tls=tls, framing=framing, reconnect=None) as client:
        if method is None:
            document = await client.call("rpc.discover", timeout=None)
            methods = document.get("methods") if isinstance(document, dict) else None
            if not isinstance(methods, list):
                raise rpc.ProtocolError("what rpc.discover answers is no OpenRPC document")
            for one in methods:
                if isinstance(one, dict):
                    for line in _method_lines(one):
                        print(_shown(line))
        elif options.notify:
            await client.notify(method, params=params)
        elif options.stream:
            async for item in client.stream(method, params=params, timeout=None):
                print(_pretty(item, None), flush=True)
        else:
            print(_pretty(await client.call(method, params=params, timeout=None)))


def _rpc_status(rpc, net, error):
    """(exit status, what to say) of an error of _rpc()."""
    cause = error.__cause__
    if isinstance(error, net.LimitError):               # the arguments are more than a message may have
        return 2, str(error)
    if isinstance(error, rpc.RpcError):
        data = "" if error.data is None else f": {_pretty(error.data, None)}"
        return 22, f"{_shown(error.message)} ({error.code}){data}"
    if any(isinstance(one, rpc.ProtocolError) for one in (error, cause, getattr(cause, "__cause__", None))):
        return 8, _shown(str(error))
    if isinstance(error, net.ResolveError):
        return 6, str(error)
    if isinstance(error, net.TlsError):
        return 60 if isinstance(cause, ssl.SSLCertVerificationError) else 35, str(error)
    return 56 if isinstance(error, rpc.ConnectionLost) else 7, str(error)


def _rpc_command(arguments):
    """`rpc HOST:PORT [METHOD ARGUMENT …]`."""
    options = _rpc_parser().parse_intermixed_args(arguments)
    rpc, net, schema = _load("flowcoro_rpc"), _load("flowcoro_net"), _load("flowcoro_schema")
    words, address = options.words, (None, None)
    if options.unix is None:
        if not words:
            raise UsageError("give the server's HOST:PORT, or --unix PATH")
        address, words = _rpc_address(words[0]), words[1:]
    method, params = words[0] if words else None, _rpc_params(schema, words[1:])
    if not options.timeout > 0:
        raise UsageError(f"--timeout {options.timeout:g}: give more than 0 seconds")
    if method is None and (options.notify or options.stream):
        raise UsageError("--notify and --stream need a METHOD")
    if options.notify and options.stream:
        raise UsageError("--notify asks for no answer, and --stream for many")
    if (options.cacert or options.insecure) and not options.tls:
        raise UsageError("--cacert and --insecure are for --tls")
    where = options.unix or f"{address[0]}:{address[1]}"

    async def in_time():
        with flowcoro.timeout(options.timeout):
            await _rpc(rpc, tls, options, address, method, params)

    try:
        tls = net.client_tls(ca=options.cacert, verify=not options.insecure) if options.tls else None
    except OSError as error:
        raise UsageError(f"--cacert {options.cacert}: {error.strerror or error}") from error
    try:
        flowcoro.run(in_time())
        return 0
    except TimeoutError:
        status, said = 28, f"not done within --timeout {options.timeout:g} seconds"
    except flowcoro.FlowCoroError as error:
        status, said = _rpc_status(rpc, net, error)
        if method is None and getattr(error, "code", None) == rpc.MethodNotFound.code:
            said = f"it does not say what its methods are (there is no rpc.discover); name one: {said}"
    print(f"flowcoro: {where}{f' {_shown(method)}' if method else ''}: {said}", file=sys.stderr)
    return status


# ---- serve -------------------------------------------------------------------------------------------------

KEPT = "FLOWCORO_KEPT_SOCKETS"          # environment: numbers of listening sockets that --reload hands to the next program
TOLD = 4096                             # bytes of a message to the supervisor at most: what a pipe takes whole
LOOK_AT_FILES = 0.25                    # seconds between two looks at the sources: a hundred take a millisecond
DRAIN_TIMEOUT, END_TIMEOUT = 8.0, 5.0   # seconds for what is under way at the end, and what is cancelled then: as flowcoro_http
THREADS_OF_WSGI = 40                    # as flowcoro_http
RELOAD_DRAIN = 2.0                      # seconds that requests have to end before the program is replaced: somebody is waiting


class _NotLoaded(UsageError):
    """The application could not be loaded, or not started; `files` are those whose change may help."""

    def __init__(self, message, files=()):
        super().__init__(message)
        self.files = set(files)


def _log_format(text):
    """The FORMAT of --access-log, which takes the next word for it."""
    if text not in ("common", "json"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither common nor json; if it is what to serve, give it first")
    return text


def _serve_parser():
    parser = _parser("serve", "Serves an application, or the files of a folder, over HTTP.")
    parser.epilog = ("examples:  serve shop:app  ·  serve 'shop:make_app()' --processes 4  ·  serve . --listing.  SIGTERM and "
                     "Ctrl-C end it once requests under way are answered; a second Ctrl-C at once. SIGHUP reads the certificate "
                     "anew, and with --processes replaces the processes one by one.")
    add = parser.add_argument
    add("target", metavar="TARGET", help="module:name of an HttpServer, a WSGI or an ASGI application, or module:name() for a "
        "function that makes one; or a folder. The current directory is searched first")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 or ::, to be reached from other machines "
        "(default: %(default)s)")
    add("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    add("--unix", metavar="PATH", help="listen on a Unix socket instead")
    add("--processes", type=int, metavar="N", help="worker processes that share the address; one uses one core")
    add("--tls-cert", metavar="FILE", help="serve HTTPS: the certificate with its chain, PEM")
    add("--tls-key", metavar="FILE", help="its private key, PEM (default: in the same file)")
    add("--reload", action="store_true", help="start anew when a source file changes, for development; the address stays open")
    add("--access-log", nargs="?", const="common", type=_log_format, metavar="FORMAT",
        help="a line per request on stderr, common (the default) or json: --access-log=json")
    add("--drain-timeout", type=float, default=DRAIN_TIMEOUT, metavar="SECONDS",
        help="what is under way has so long when the server ends (default: %(default)g)")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--wsgi", action="store_true", help="it is a WSGI application, whatever it looks like")
    kinds.add_argument("--asgi", action="store_true", help="it is an ASGI application")
    add("--threads", type=int, metavar="N", help=f"of a WSGI application, at most (default: {THREADS_OF_WSGI})")
    add("--listing", action="store_true", help="of a folder: show what is in folders without an index.html")
    return parser


def _serve_command(arguments):
    """`serve TARGET …`: until SIGTERM or Ctrl-C."""
    options = _serve_options(arguments)
    kept = _KeptSockets(os.environ.pop(KEPT, "")) if options.reload else None
    again = False
    try:
        app = _served_app(options)
        again = flowcoro.run(_serve(app, options, kept), grace=options.drain_timeout + END_TIMEOUT)
    except _NotLoaded as error:
        if kept is None or not kept.numbers:        # in a reload a mistake in a source is waited for to be corrected
            raise
        again = flowcoro.run(_change_or_stop(error))
    except KeyboardInterrupt:                       # the second Ctrl-C
        return 130
    if again:
        kept.hand_over()
    return 0


def _serve_options(arguments):
    """What is asked for. UsageError for options that do not go together."""
    options = _serve_parser().parse_args(arguments)
    folder = pathlib.Path(options.target)
    options.folder = folder if folder.is_dir() else None
    _check_serve(options)
    return options


def _check_serve(options):
    if options.tls_key and not options.tls_cert:
        raise UsageError("--tls-key needs --tls-cert: a private key alone proves nothing")
    if options.folder is None and options.listing:
        raise UsageError(f"--listing is for a folder, and {options.target} is none")
    if options.folder is not None and (options.wsgi or options.asgi or options.threads):
        raise UsageError(f"{options.target} is a folder: --wsgi, --asgi and --threads are for applications")
    for name in "processes", "threads":
        if (number := getattr(options, name)) is not None and number < 1:
            raise UsageError(f"--{name} {number}: give 1 or more")
    if not options.drain_timeout >= 0:
        raise UsageError(f"--drain-timeout {options.drain_timeout:g}: give seconds, 0 or more")
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port {options.port}: give a number from 0 to 65535")
    if options.reload and options.processes is not None:
        raise UsageError("--reload is for development, and serves in one process: leave out --processes")
    if options.reload and (options.folder or not hasattr(os, "fork")):
        raise UsageError("--reload watches the sources of an application" if options.folder else
                         "--reload replaces the program, which this system cannot do while its sockets stay open")


# -- what is served

def _load_target(target):
    """The object that "module:name" or "module:name()" means. _NotLoaded, which says what is missing."""
    module, colon, name = target.partition(":")
    made = name.endswith("()")
    path = name.removesuffix("()").split(".")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), *path]):
        raise UsageError(f"{target!r} is neither a folder nor module:name, such as shop:app or shop:make_app()")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for at, part in enumerate(path):
            try:
                found = getattr(found, part)
            except AttributeError:
                known = [other for other in dir(found) if not other.startswith("_")]
                near = difflib.get_close_matches(part, known)
                where = ".".join([module, *path[:at]])
                raise _NotLoaded(f"{where} has no {part!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
                                 _source_files()) from None
        return found() if made else found
    except _NotLoaded:
        raise
    except Exception as error:
        raise _not_loaded(module, error) from error


def _not_loaded(module, error):
    """What to say of an error in somebody's module, or of one that is not there."""
    if isinstance(error, ModuleNotFoundError) and error.name and (module + ".").startswith(error.name + "."):
        missing = os.path.join(os.getcwd(), *error.name.split("."))
        return _NotLoaded(f"there is no module {error.name!r} in {os.getcwd()}, nor elsewhere on Python's path",
                          _source_files() | {f"{missing}.py", os.path.join(missing, "__init__.py")})
    return _told(error, f"{module} could not be loaded")


def _told(error, what):
    """The _NotLoaded that says in one line which error it was, and where: in the last file that is not an installed one's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    files = {frame.filename for frame in frames} | _source_files()
    own = [frame for frame in frames if not _is_installed(frame.filename)] or frames
    where = f"{own[-1].filename}, line {own[-1].lineno}"
    if isinstance(error, SyntaxError) and error.filename:
        files.add(error.filename)
        where = f"{error.filename}, line {error.lineno}"
    said = error.msg if isinstance(error, SyntaxError) else error
    return _NotLoaded(f"{what}: {type(error).__name__}: {said} ({where})", files)


def _served_app(options):
    """The HttpServer to run."""
    http = _load("flowcoro_http")
    if options.folder is not None:
        app = http.HttpServer()
        app.mount("/", http.static_files(options.folder, listing=options.listing), encoded_slashes=True)
    else:
        found = _load_target(options.target)
        if isinstance(found, http.HttpServer):
            if options.wsgi or options.asgi or options.threads:
                raise UsageError(f"{options.target} is an HttpServer: --wsgi, --asgi and --threads are for other applications")
            app = found
        elif isinstance(found, http.Router):
            app = http.HttpServer(websocket=_speaker())
            app.include(found)
        else:
            app = http.HttpServer()
            app.mount("/", _hosted(http, app, found, options), encoded_slashes=True)
    if options.access_log:
        app.middleware(http.access_log(format=options.access_log), outermost=True)
    return app


def _speaker():
    """What speaks WebSocket, if its file is there."""
    try:
        return _load("flowcoro_websocket").accept
    except UsageError:
        return None


def _hosted(http, app, found, options):
    """The handler of a WSGI or an ASGI application."""
    kind = "wsgi" if options.wsgi else "asgi" if options.asgi else _kind_of(found, options.target)
    if kind == "wsgi":
        return http.wsgi_app(found, **({"threads": options.threads} if options.threads else {}))
    if options.threads:
        raise UsageError(f"{options.target} is an ASGI application: --threads is for WSGI")
    host = http.asgi_app(found, websocket=_speaker())

    @contextlib.asynccontextmanager
    async def lifespan():
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(host.lifespan())
            except RuntimeError as error:
                raise UsageError(str(error)) from error
            yield
    app.lifespan(lifespan)
    return host


def _kind_of(found, target):
    """ "wsgi" or "asgi"; UsageError when it looks like neither."""
    if not callable(found):
        raise UsageError(f"{target} is {found!r:.80}, no application")
    call = found if inspect.isroutine(found) or isinstance(found, type) else type(found).__call__
    if inspect.iscoroutinefunction(inspect.unwrap(found)) or inspect.iscoroutinefunction(inspect.unwrap(call)):
        return "asgi"
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        raise UsageError(f"it cannot be seen what {target} is: say --wsgi or --asgi") from None
    needed = [each for each in parameters if each.default is each.empty and each.kind in (
        each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if len(needed) in (2, 3):
        return "wsgi" if len(needed) == 2 else "asgi"
    if not needed and not isinstance(found, type) and not any(each.kind is each.VAR_POSITIONAL for each in parameters):
        raise UsageError(f"{target} takes no arguments: if it makes the application, write {target}()")
    raise UsageError(f"{target} looks neither like WSGI (environ, start_response) nor like ASGI (scope, receive, send): say "
                     "--wsgi or --asgi")


# -- serving

def _say(text, to=None):
    """On stdout, or `to`. A server goes on when nobody reads what it says any more, or there is no room for it."""
    with contextlib.suppress(OSError):
        print(text, file=to, flush=True)


async def _serve(app, options, kept):
    """Until it is to end; whether the program is to be replaced by a new one."""
    tls = _serve_tls(options)
    network = flowcoro.network.set(kept) if kept is not None and options.unix is None else None
    shared = options.processes is not None and options.unix is None and sys.platform == "linux"
    try:
        if shared and options.port:             # who may share a port is not told that another program has it
            (await app.listen(options.host, options.port)).close()
        server = await app.listen(options.host, options.port, unix=options.unix, tls=tls, reuse_port=shared)
    except (OSError, ValueError) as error:
        raise UsageError(str(error.strerror or error) if isinstance(error, OSError) else str(error)) from error
    finally:
        if network is not None:
            flowcoro.network.reset(network)
    ending = types.SimpleNamespace(asked=False, changed=None)
    start = _Start(app, options, functools.partial(_announce, server, options))
    async with server, start:
        if kept is not None:
            kept.keep()
            flowcoro.spawn(_close_on_change(server, _Sources(), ending), name="watch the sources")
        drain = options.drain_timeout if kept is None else min(options.drain_timeout, RELOAD_DRAIN)
        more = {"reload": functools.partial(_reload_certificate, server, options)} if options.processes else {}
        with _load("flowcoro_os").signals(*_serve_signals(options)) as received, flowcoro.CancelScope() as scope:
            hearing = flowcoro.spawn(_obey(received, server, options, ending, scope), name="hear signals")
            starting = flowcoro.spawn(start.hear(server), name="hear whether the application starts")
            waiting = flowcoro.spawn(start.end_with_a_stop(scope), name="end a start when the server is to end")
            try:
                await server.serve(processes=options.processes, drain_timeout=drain, **more)
            finally:
                hearing.cancel()
                starting.cancel()
                waiting.cancel()
    if start.failure is not None:
        raise start.failure
    return ending.changed is not None and not ending.asked


class _Start:
    """Whether the application starts: `started` is called as soon as it has, and _NotLoaded raised if it cannot.

    With worker processes it starts in each of them. The first one to know tells the supervisor, through a pipe; if it cannot,
    all ends, for it could not in the next one either. Those that come later have been seen to work: one that fails then is
    reported, and tried again.
    """

    def __init__(self, app, options, started):
        self.target, self.started, self.failure = options.target, started, None
        self.has = self.known = False               # it has started here; it has in some process
        self.pipe = os.pipe() if options.processes else ()
        app.lifespan(self.around, outermost=True)       # it sees the errors of all others
        app.lifespan(self.within)

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        for number in self.pipe:
            os.close(number)

    @contextlib.asynccontextmanager
    async def around(self):
        try:
            yield
        except Exception as error:
            if self.has or self.known:
                raise
            failure = error if isinstance(error, UsageError) else _told(error, f"{self.target} cannot start")
            if not self.pipe:
                raise failure from error
            os.write(self.pipe[1], str(failure).encode("utf-8", "replace")[:TOLD - 1] + b"\0")
            raise SystemExit(1) from error

    @contextlib.asynccontextmanager
    async def within(self):
        self.has = True
        if self.pipe:
            os.write(self.pipe[1], b"\0")
        else:
            self.started()
        yield

    async def end_with_a_stop(self, scope):
        """Nobody waits for a start that takes long when the server is to end."""
        await flowcoro.stop_requested()
        if not self.has and not self.known:
            scope.cancel()

    async def hear(self, server):
        """In the supervisor: what the processes say."""
        if not self.pipe:
            return
        pollable = flowcoro.Pollable(self.pipe[0])
        try:
            while True:
                pollable.readable = False
                await pollable.wait_readable()
                said = os.read(self.pipe[0], TOLD)
                for text in said.decode("utf-8", "replace").split("\0")[:-1]:        # "": it has started
                    if not self.known and text:
                        self.failure = UsageError(text)
                        server.close()
                    elif not self.known:
                        self.started()
                    elif text and self.failure is None:     # where others have started
                        _say(f"flowcoro: {text}", sys.stderr)
                    self.known = True
        finally:
            pollable.close()


def _serve_tls(options):
    """The ssl.SSLContext; UsageError when the files are none of certificates."""
    if not options.tls_cert:
        return None
    try:
        return _load("flowcoro_net").server_tls(options.tls_cert, options.tls_key, alpn=["http/1.1"])
    except OSError as error:
        raise UsageError(f"--tls-cert: {error.strerror or error}") from error


def _announce(server, options):
    """Say where it listens: a line for each address."""
    count = options.processes
    what = options.target if count is None else f"{options.target} in {count} process{'es' * (count > 1)}"
    for address in server.addresses:
        host, port = address[:2] if isinstance(address, tuple) else (None, None)
        url = f"{server.url.partition(':')[0]}://{f'[{host}]' if ':' in host else host}:{port}" if host else str(address)
        _say(f"serving {what} on {url}")
    if options.folder is not None and not options.listing and not (options.folder / "index.html").is_file():
        _say("there is no index.html in it; --listing shows what there is")
    _say("Ctrl-C ends it")


def _serve_signals(options):
    """Those that we hear; with processes SIGHUP is the supervisor's."""
    return [signal.SIGINT] + ([signal.SIGHUP] if hasattr(signal, "SIGHUP") and not options.processes else [])


async def _obey(received, server, options, ending, scope):
    """SIGINT ends the server, and at once when it comes again; SIGHUP reads the certificate anew."""
    async for number in received:
        if number != signal.SIGINT:
            _reload_certificate(server, options)
        elif ending.asked:
            scope.cancel()
        else:
            ending.asked = True
            _say("ending; Ctrl-C once more ends it at once")
            flowcoro.request_stop()


def _reload_certificate(server, options):
    """Use the files as they are now; what cannot be used is told, and the old one stays."""
    if options.tls_cert:
        try:
            server.reload_certificate(options.tls_cert, options.tls_key)
            _say("certificate reloaded")
        except OSError as error:
            _say(f"flowcoro: the certificate stays as it is: {error.strerror or error}", sys.stderr)


# -- reloading

def _source_files():
    """The files of modules that are loaded and belong neither to Python nor to an installed package."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    return {file for file in files if file and file.endswith(".py") and not _is_installed(file)}


def _is_installed(file):
    """Whether it belongs to Python or an installed package."""
    return file.startswith(tuple(os.path.join(sysconfig.get_path(name), "")
                                 for name in ("stdlib", "platstdlib", "purelib", "platlib")))


class _Sources:
    """The files that --reload watches: those given, and those of all modules that are loaded by then."""

    def __init__(self, files=()):
        self.files, self.seen = set(files), {}
        self.changed()

    def changed(self):
        """One that has another mtime than when it was first looked at, or was not there then; or None."""
        for file in sorted(self.files | _source_files()):
            try:
                changed = os.stat(file).st_mtime_ns
            except OSError:                     # somebody is about to put another one there, and until then it cannot be loaded
                changed = None
            if self.seen.setdefault(file, changed) != changed and changed is not None:
                return file
        return None

    async def wait(self):
        """Until one has changed: which."""
        while (file := self.changed()) is None:
            await flowcoro.sleep(LOOK_AT_FILES)
        _say(f"{file} has changed: starting anew")
        return file


async def _change_or_stop(error):
    """Say what is wrong, and wait for a change, or for a signal to end: whether it was a change."""
    sources = _Sources(error.files)
    _say(f"flowcoro: {error}\nwaiting for a change", sys.stderr)
    which, _ = await flowcoro.when_any(sources.wait(), flowcoro.stop_requested())
    return which == 0


async def _close_on_change(server, sources, ending):
    ending.changed = await sources.wait()
    server.close()


class _Bound(socket.socket):
    """A listening socket that another program has made and bound."""

    def bind(self, address):
        """It is."""


class _KeptSockets:
    """A network (see flowcoro.network) whose listening sockets stay open while the program is replaced by exec: who connects
    meanwhile waits until the new one accepts. Only listen() is called with it.
    """

    def __init__(self, numbers):
        """`numbers`: of the sockets that the program before has handed over, divided by commas; or ""."""
        self.numbers = [int(number) for number in numbers.split(",") if number]
        self.made = []

    def socket(self, family, kind, proto=0):
        for number in self.numbers:
            raw = _Bound(fileno=number)
            if raw.family == family:
                self.numbers.remove(number)
                os.set_inheritable(number, False)
                break
            raw.detach()
        else:
            raw = socket.socket(family, kind, proto)
        raw.setblocking(False)
        self.made.append(raw)
        return raw

    pollable = staticmethod(flowcoro.Pollable)

    async def getaddrinfo(self, host, port, family=0, kind=0, flags=0):
        return await flowcoro.to_thread(socket.getaddrinfo, host, port, family, kind, 0, flags)

    def keep(self):
        """From now on there is a second descriptor of each, so that closing the server leaves them open."""
        self.numbers = [os.dup(raw.fileno()) for raw in self.made if raw.fileno() >= 0]
        self.made.clear()

    def hand_over(self):
        """Replace the program by itself, as it was started. Does not return."""
        for number in self.numbers:
            os.set_inheritable(number, True)
        os.environ[KEPT] = ",".join(map(str, self.numbers))
        with contextlib.suppress(OSError, AttributeError):      # nobody reads it, or there is none
            sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# ---- The command line --------------------------------------------------------------------------------------

def _help_text():
    """What `--help` prints."""
    lines = ["usage: python -m flowcoro COMMAND …", "", "commands:"]
    lines += [f"  {name:8} {line}" for name, (_, _, line) in COMMANDS.items()]
    lines += ["", "`python -m flowcoro COMMAND --help` explains a command, `--version` tells the version."]
    return "\n".join(lines)


def _dispatch(arguments):
    """Do what the command line asks for and return the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help_text())
        return 0
    if arguments[0] == "--version":
        print(f"flowcoro {flowcoro.__version__}")
        return 0
    module, function, _ = COMMANDS[_look_up("command", arguments[0], COMMANDS)]
    return getattr(_load(module), function)(arguments[1:])


def main(argv=None):
    """Obey the command line `argv` (default: sys.argv[1:]), return the exit status; complaints go to stderr.

    What a user can do wrong, Ctrl-C (130), a reader that closed the pipe (141) and a full disk (1) end without a traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")        # a terminal without `µ` shows `?`, not a traceback
    try:
        try:
            status = _dispatch(sys.argv[1:] if argv is None else list(argv))
        except SystemExit as error:                         # argparse, the end of a benchmark, SIGTERM
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if sys.stdout is not None:                          # it is when the descriptor was closed before the start
            sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"flowcoro: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nflowcoro: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and error.errno != errno.ENOSPC:
            raise
        # The interpreter flushes at its end and would complain again: what is in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"flowcoro: cannot write: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    # As in flowcoro.py: the module of that name does the work, so that no second copy of its errors exists.
    sys.exit(_load("flowcoro_cli").main())
