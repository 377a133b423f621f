"""Feed mutated requests and responses to the HTTP codec until something gives.

    python tests/fuzz/http_codec.py --seconds 600

Each input goes in whole, by line, byte by byte and at random splits, to a server and to a client. It has to give the same events
each time, and no error but ProtocolError; each call has to get on; what a server has accepted has to be the same request again
when a client sends it; and one that knows what comes again (receive_known) has to make the same of it as one that does not. A
failure prints the seed of the input, which repeats it with --seed, and the input.
"""

import argparse
import itertools
import pathlib
import random
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from flowcoro_http import (NEED_DATA, PAUSED, ConnectionClosed, Data, EndOfMessage, Headers, HttpConnection, ProtocolError,
                           RequestHead, ResponseHead)

REQUESTS = [
    b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n",
    b"GET /a?b=c%20d HTTP/1.1\r\nHost: [::1]:8080\r\nAccept: */*\r\nCookie: a=b; c=d\r\nConnection: keep-alive\r\n\r\n"
    b"HEAD /next HTTP/1.1\r\nHost: h\r\n\r\n",
    b"POST /items HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhelloGET / HTTP/1.0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    b"6;a=b;c=\"d\\\"e\"\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n"
    b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
    b"PUT /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n1\r\nb\r\n1\r\nc\r\n0\r\n\r\n",
    b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n\x16\x03\x01",
    b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET http://example.com:80/a HTTP/1.1\r\nHost: example.com:80\r\nX: \xe4\r\n\r\n",
    b"GET /chat HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket, h2c\r\n\r\n\x81\x00",
    b"POST / HTTP/1.0\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nokGET / HTTP/1.0\r\nHost: h\r\n\r\n",
]
RESPONSES = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nDate: now\r\n\r\nhello",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nA: b\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\n\r\nuntil the end",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 100\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x00",
]
WORDS = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b":", b",", b";", b"\0", b"0", b"-1", b"+5", b"0x5", b"1_0", b"5 ", b"\xb2",
    b"Content-Length: 5\r\n", b"Content-Length: 6\r\n", b"content-length : 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n", b"Transfer-Encoding: xchunked\r\n", b"Transfer-Encoding:\x0bchunked\r\n", b" folded\r\n",
    b"Host: other\r\n", b"Host: a@b\r\n", b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"Connection: upgrade\r\n",
    b"Upgrade: websocket\r\n", b"Expect: 100-continue\r\n", b"Trailer: x\r\n", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9",
    b"0\r\n\r\n", b"5\r\nhello\r\n", b"FFFFFFFFFFFFFFFF\r\n", b"1;a=\"", b"GET ", b"HEAD ", b"CONNECT ",
    b"x" * 70, b"a:b\r\n" * 12,
]

# Small ones, so that they are met.
LIMITS = [{}, {}, dict(max_request_line=40, max_field_line=40, max_fields=3, max_head=90, max_chunk_line=10, max_body=9),
          dict(max_head=60), dict(max_fields=1), dict(max_body=4), dict(max_field_line=12), dict(max_request_line=14)]


def mutated(chance, corpus):
    """A few of the corpus, one after the other, with some changes."""
    data = bytearray(b"".join(chance.choices(corpus, k=chance.choice([1, 1, 1, 2, 3]))))
    for _ in range(chance.choice([0, 1, 1, 2, 3, 8])):
        at = chance.randrange(len(data) + 1)
        to = min(len(data), at + chance.choice([0, 1, 2, 5, 30]))
        what = chance.randrange(7)
        if what == 0:
            data[at:to] = b""
        elif what == 1:
            data[at:at + 1] = bytes([chance.randrange(256)])
        elif what == 2:
            data[at:at] = data[at:to] * chance.choice([1, 2, 5])
        elif what == 3:
            other = chance.choice(corpus)
            data[at:] = other[chance.randrange(len(other)):]
        elif what == 4:                         # at the beginning of a line
            at = data.rfind(b"\n", 0, at) + 1
            data[at:at] = chance.choice(WORDS)
        else:
            data[at:to] = chance.choice(WORDS)
    return bytes(data)


def splits(data, chance):
    """The same bytes in several ways: lists of pieces."""
    yield [data]
    yield data.splitlines(keepends=True)
    yield [data[n:n + 1] for n in range(len(data))]
    for most in (3, 40):
        cuts = sorted({0, len(data), *(chance.randrange(len(data) + 1) for _ in range(chance.randint(1, most)))})
        yield [data[a:b] for a, b in itertools.pairwise(cuts)]


def merged(events):
    """Neighbouring Data as one: where they are cut depends on how the bytes came, and nothing else may."""
    for kind, group in itertools.groupby(events, key=lambda event: event[0]):
        if kind == "data":
            yield "data", b"".join(data for _, data in group)
        else:
            yield from group


def described(event, connection):
    if isinstance(event, Data):
        assert type(event.data) is bytes and event.data
        return "data", event.data
    if isinstance(event, RequestHead):
        return ("request", event.method, event.target, event.headers.items(), event.version, connection.keep_alive,
                connection.upgrade, connection.expects_continue, event.authority, event.path)
    if isinstance(event, ResponseHead):
        return type(event).__name__, event.status, event.headers.items(), event.reason, event.version
    if isinstance(event, EndOfMessage):
        return "end", event.trailers and event.trailers.items()
    return type(event).__name__, repr(event)


def events_of(role, pieces, method="GET", known=False, **limits):
    """All that a connection makes of these bytes, described, merged: a list that ends with why it ends and what is left.

    A server answers each request, and knows what comes again, if `known`; a client has sent one of this method.
    """
    connection, events = HttpConnection(role, **limits), []
    if role == "client":
        upgrade = [("Connection", "Upgrade"), ("Upgrade", "websocket")] if method == "GET" else []
        target = "h:1" if method == "CONNECT" else "/"
        connection.send_message(RequestHead(method, target, [("Host", "h"), *upgrade]))
    size = sum(map(len, pieces))
    calls = 6 * size + 8 * len(pieces) + 20
    try:
        for piece in [*filter(None, pieces), None]:
            if piece is None:
                connection.receive_end()
            elif known and (found := connection.receive_known(piece)):
                line, fields, content, _ = found
                head = RequestHead(line.method, line.target, Headers._of(fields.entries, fields.index))
                events += [described(event, connection)
                           for event in (head, *([Data(content)] if content else []), EndOfMessage())]
                connection.send_message(ResponseHead(200), b"")
                connection.start_next_cycle()
                continue
            else:
                connection.receive_data(piece)
            while True:
                calls -= 1
                assert calls, "it does not get on"
                event = connection.next_event()
                if event is NEED_DATA:
                    break
                if event is PAUSED or isinstance(event, (EndOfMessage, ConnectionClosed)):
                    if event is not PAUSED:
                        events.append(described(event, connection))
                    if role == "server" and connection.our_state == "SEND_RESPONSE" and connection.their_state != "ERROR":
                        connection.send_message(ResponseHead(200), b"")
                        if connection.reusable:
                            connection.start_next_cycle()
                            continue
                    break
                events.append(described(event, connection))
    except ProtocolError as error:
        events.append(("error", error.status, str(error)))
        assert connection.their_state == "ERROR"
    events.append((connection.our_state, connection.their_state, connection.trailing_data))
    return list(merged(events))


def again(events):
    """What a client sends to ask for the same requests, as far as they are complete: a list of bytes."""
    sent, connection = [], None
    for event in events:
        if event[0] == "request":
            _, method, target, fields, version, *_ = event
            if version != "1.1":
                return sent
            connection, head, pieces = HttpConnection("client"), RequestHead(method, target, fields), []
        elif event[0] == "data":
            pieces.append(event[1])
        elif event[0] == "end":
            sent.append(connection.send(head) + b"".join(connection.send(Data(piece)) for piece in pieces)
                        + connection.send(EndOfMessage(event[1])))
    return sent


def check(data, chance, role, method="GET", **limits):
    """All of it for one input; AssertionError, or whatever the codec has thrown."""
    seen = None
    for pieces in splits(data, chance):
        events = events_of(role, pieces, method, **limits)
        assert seen is None or events == seen, f"other events by other pieces: {events} and {seen}"
        seen = events
    if role == "server":
        for number, sent in enumerate(again(seen)):
            expected = complete(seen, number)
            assert events_of("server", [sent])[:len(expected)] == expected, f"another request when it is sent again: {sent}"
        for several in [data], again(seen):
            pieces = [piece for piece in several for _ in range(3)] + several[:1] + [data]
            expected, made = events_of("server", pieces, **limits), events_of("server", pieces, known=True, **limits)
            assert made == expected, f"{made}, where what comes again is known, and {expected} where it is not"


def complete(events, number):
    """The events of the message with this number."""
    found = [[]]
    for event in events:
        found[-1].append(event)
        if event[0] == "end":
            found.append([])
    return found[number]


def run(seed):
    """One input."""
    chance = random.Random(seed)
    role = chance.choice(["server", "server", "client"])
    data = mutated(chance, REQUESTS if role == "server" else RESPONSES)
    method = chance.choice(["GET", "GET", "HEAD", "POST", "CONNECT"])
    limits = chance.choice(LIMITS)
    try:
        check(data, chance, role, method, **limits)
    except Exception as error:
        error.add_note(f"seed {seed}: a {role} ({method}, {limits}) that receives {data!r}")
        raise


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="only this one")
    options = parser.parse_args()
    if options.seed is not None:
        run(options.seed)
        return
    first = random.SystemRandom().randrange(10**9) * 1000
    end, count = time.monotonic() + options.seconds, 0
    while time.monotonic() < end:
        run(first + count)
        count += 1
    print(f"{count} inputs from seed {first} on, {options.seconds:g} s: nothing found")


if __name__ == "__main__":
    main()
