"""What every `cases_*.py` beside this file shares: the command line, the data, and the word that a server is ready.

A `cases_*.py` is one contender's server, written as its own manual would write it, and runs one case until it is killed:

    python cases_trio.py echo key=value …       {"port": 43210}, once it listens on 127.0.0.1
    python cases_trio.py version                {"version": "0.35.0"}

What a server does with a connection, as ../load.c expects it:

    echo        sends back what comes, until the peer ends; with certificate= and key=, by TLS
    receive     reads until the peer ends, and answers with the number of bytes that have come: 8 bytes, little-endian
    send        reads such a number, sends so many bytes, BLOCK again and again, and closes
    file        the same, from the file of the option `file`

The options: `core` is the processor to stay on; `pattern` a file of a MiB, BLOCK; `file` a file of such blocks.

SPDX-License-Identifier: MIT
"""

import json
import os
import signal
import ssl
import sys

CHUNK = 65_536          # bytes that one read asks for, where a contender lets its caller choose
LARGE = 262_144         # the same where a GiB goes through a connection, and the size of one write
LIMIT = 300             # seconds until a server ends by itself, should nobody have ended it

OPTIONS = dict(word.split("=", 1) for word in sys.argv[2:])
BLOCK = b""             # a MiB, of which `send` sends copies
if "pattern" in OPTIONS:
    with open(OPTIONS["pattern"], "rb") as _file:
        BLOCK = _file.read()
PIECES = [memoryview(BLOCK)[at:at + LARGE] for at in range(0, len(BLOCK), LARGE)]


def pieces(count):
    """BLOCK again and again, in pieces of at most LARGE bytes, `count` bytes in all."""
    while count:
        for piece in PIECES:
            yield piece[:count]
            count -= min(count, len(piece))
            if not count:
                break


def number(data):
    """Of the 8 bytes that say how many."""
    return int.from_bytes(data, "little")


def in_bytes(count):
    return count.to_bytes(8, "little")


def tls(context_class=ssl.SSLContext):
    """The ssl.SSLContext of a server; None where the case is without TLS."""
    if "certificate" not in OPTIONS:
        return None
    context = context_class(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(OPTIONS["certificate"], OPTIONS["key"])
    return context


def ready(port):
    """Tell the benchmark where to connect to."""
    print(json.dumps({"port": port}), flush=True)


def main(handlers, serve, version):
    """Do what the command line asks for. `serve(handler)` listens, calls ready(), and serves until it is killed."""
    if sys.argv[1] == "version":
        print(json.dumps({"version": version}))
        return
    signal.alarm(LIMIT)
    if "core" in OPTIONS:
        os.sched_setaffinity(0, {int(OPTIONS["core"])})
    serve(handlers[sys.argv[1]])
