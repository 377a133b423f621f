"""What every `cases_*.py` beside this file shares: what is asked and answered, the word where a server is, the command line.

A `cases_*.py` is one contender, written as its own manual would write it, and runs one case until it is killed:

    python cases_granian.py hello key=value …   {"port": 43210}: it listens there on 127.0.0.1, or will soon
    python cases_granian.py version             {"version": "2.8.9"}

What a server answers, as ../http.py expects it:

    hello       GET /: TEXT
    api         POST to one of ROUTES, with DOCUMENT: answer(), as JSON; OTHERS are routes too, which nobody asks for
    wsgi        as hello, from hello_wsgi()
    static      GET /files/NAME: the file NAME in the folder of the option `files`
    processes   GET /: what work() returns, from as many processes as there are to be

`client` is the other way round: 64 tasks GET the URL of the option `url` again and again, and the last line says how often.

The options: `core` is the processor to stay on; `program` and `folder` belong to nginx and Go.

SPDX-License-Identifier: MIT
"""

import ctypes
import html
import json
import os
import signal
import socket
import sys
import time

TEXT = "Hello, World!"
CONTENT = TEXT.encode()
CONTENT_TYPE = "text/plain; charset=utf-8"
TASKS = 64              # of a client
BACKLOG = 1024          # connections that wait to be accepted: more than come at a time

# Of `api`: the routes, as FlowCoro and Starlette write them, and the parameters that are asked for.
ROUTES = {
    "/users/{id:int}": {"id": 4711},
    "/users/{id:int}/orders/{order:int}": {"id": 4711, "order": 12},
    "/shops/{shop}/items/{item}": {"shop": "corner", "item": "lamp-7"},
    "/articles/{year:int}/{slug}": {"year": 2026, "slug": "what-a-router-does"},
    "/search/{kind}": {"kind": "books"},
}
OTHERS = [f"/{name}{rest}" for name in ("invoices", "carts", "reviews", "coupons", "returns", "stock", "prices", "events")
          for rest in ("", "/{id:int}", "/{id:int}/history")]
PAGE, WORDS, SESSION = 3, "coroutine switch", "0123456789abcdef0123456789abcdef"
QUERY = f"page={PAGE}&q={WORDS.replace(' ', '+')}&sort=date"
COOKIES = f"theme=dark; session={SESSION}; seen=17"

# A KiB, as JSON.
DOCUMENT = {"customer": "Ada Lovelace", "note": "as last time, please; the door is round the corner, behind the bakery there",
            "items": [{"sku": f"SKU-{1000 + number}", "name": f"part number {number}", "count": number % 4 + 1,
                       "price": 199 + number} for number in range(14)]}

OPTIONS = {}            # of the command line

PR_SET_PDEATHSIG = 1    # of prctl(): which signal comes when the parent has gone; it stays across exec()


def converted(found):
    """Path parameters, those made of digits as numbers: for routers that give texts."""
    return {name: int(text) if text.isdecimal() else text for name, text in found.items()}


def answer(found, page, words, session, document):
    """What `api` answers. `found` are the parameters of the path, by name; `words` is `q` of the query."""
    items = document["items"]
    return {**found, "page": int(page), "q": words, "session": session, "customer": document["customer"],
            "total": sum(item["count"] * item["price"] for item in items), "items": items}


def work():
    """How many characters a page has that takes some tenths of a millisecond to write."""
    return str(len("".join(f"<tr><td>{number}<td>{html.escape(TEXT)}<td>{number / 7:.2f}" for number in range(600))))


def hello_wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", CONTENT_TYPE), ("Content-Length", str(len(CONTENT)))])
    return [CONTENT]


HEADERS_ASGI = [(b"content-type", CONTENT_TYPE.encode()), (b"content-length", str(len(CONTENT)).encode())]


async def hello_asgi(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS_ASGI})
    await send({"type": "http.response.body", "body": CONTENT})


# ---- servers -----------------------------------------------------------------------------------------------------

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


# ---- clients -----------------------------------------------------------------------------------------------------

class _Tally:
    """What was answered until `end`, in seconds of time.perf_counter()."""

    def __init__(self, seconds):
        self.began, self.cpu, self.times = time.perf_counter(), time.process_time(), []
        self.end = self.began + seconds

    def report(self):
        took, cpu = time.perf_counter() - self.began, time.process_time() - self.cpu
        self.times.sort()
        return {"operations": len(self.times), "seconds": took, "server_cpu": cpu,
                **{name: self.times[int(part * (len(self.times) - 1))] for name, part in (("p50", 0.5), ("p99", 0.99))}}


async def _ask_again_and_again(get, url, tally):
    clock = time.perf_counter
    while (began := clock()) < tally.end:
        status, content = await get(url)
        if status != 200 or content != CONTENT:
            raise ValueError(f"the answer was {status}, {content[:100]!r}")
        tally.times.append(clock() - began)


async def measure_client(get, gather):
    """`await get(url)` is (status, content); `await gather(*coroutines)` runs them all at once, until they are done."""
    for seconds in (float(OPTIONS["warm"]), float(OPTIONS["seconds"])):
        tally = _Tally(seconds)
        await gather(*(_ask_again_and_again(get, OPTIONS["url"], tally) for _ in range(TASKS)))
    print(json.dumps(tally.report()), flush=True)


# ---- the command line --------------------------------------------------------------------------------------------

def main(cases, version):
    """Do what the command line asks for: one of `cases`, {name: function}. `version` is a text, or a function that gives it."""
    if sys.argv[1] == "version":
        print(json.dumps({"version": version() if callable(version) else version}))
        return
    OPTIONS.update(word.split("=", 1) for word in sys.argv[2:])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if "core" in OPTIONS:
        os.sched_setaffinity(0, {int(OPTIONS["core"])})
    cases[sys.argv[1]]()
