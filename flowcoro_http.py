"""flowcoro_http 0.1.0: HTTP/1.1 without I/O: what a message is, strictly and quickly; both roles.

To vendor, copy: flowcoro.py, flowcoro_http.py

Example:

    from flowcoro_http import HttpConnection, RequestHead, ResponseHead

    client, server = HttpConnection("client"), HttpConnection("server")
    server.receive_data(client.send_message(RequestHead("GET", "/hello", [("Host", "example.com")])))
    print(server.next_event())
    client.receive_data(server.send_message(ResponseHead(200, [("Content-Type", "text/plain")]), b"world"))
    print([client.next_event() for _ in range(3)])

Contents: constants · errors · headers · codec

How it works:

An HttpConnection is one end of a connection, without its socket: bytes go in, and events come out; events go in, and bytes
come out. Who owns the socket reads, writes, and waits.

    receive_data(data), receive_end()   what the peer has sent
    next_event()                        RequestHead or ResponseHead (InformationalResponse before), Data …, EndOfMessage; then
                                        PAUSED until start_next_cycle(); ConnectionClosed; NEED_DATA while there is too little
    send(event), send_message(…)        the bytes of an event, or of a whole message as one

What the peer sends is taken as it is or refused with ProtocolError, whose status is the answer to give before closing. There is
no middle way: two programs that read one message differently are how requests are smuggled past a proxy. So a line ends with
CRLF, a length is plain digits, a message has one way to be framed; and what is sent is checked as well, so that no value given
to a header can split a response. The section "codec" says how it is made quick, and what holds however the bytes were split.

Sources: RFC 9110 (semantics), RFC 9112 (HTTP/1.1), RFC 3986 (authorities); h11 (the idea of two states and one table);
CWE-444 and the papers of J. Kettle (HTTP desync attacks) for what servers take that they should not.

What it does not do: sockets, timeouts, routes; HTTP/2; content codings; folded lines, bare LF and whatever else older servers
let pass. A server and a client are not here yet.

SPDX-License-Identifier: MIT
"""

import functools
import http
import re
import socket
import sys

import flowcoro

__version__ = "0.1.0"

__all__ = ["HttpConnection", "RequestHead", "ResponseHead", "InformationalResponse", "Data", "EndOfMessage",
           "ConnectionClosed", "NEED_DATA", "PAUSED", "Headers", "HttpError", "ProtocolError", "LocalProtocolError"]

# ---- constants ------------------------------------------------------------------------------------------------

# Bytes of a request line (or status line) at most, without its CRLF; beyond it 414. RFC 9112 section 3 asks for 8000 at least;
# nginx and Apache have 8 KiB.
MAX_REQUEST_LINE = 8 * 2**10

# Bytes of a field line at most, field lines at most, and bytes of a head (or trailer section) at most; beyond them 431.
# A line: Apache and nginx 8 KiB, but Kerberos tickets and cookies of 4 KiB each need more. Lines: Apache 100. A head: nginx
# 32 KiB, Node 16 KiB, Go 1 MiB.
MAX_FIELD_LINE, MAX_FIELDS, MAX_HEAD = 16 * 2**10, 100, 64 * 2**10

# Bytes of the line that begins a chunk at most: 16 digits, and extensions, which nobody uses but those who count on their
# being skipped. Go 4 KiB; per chunk that would be 4 KiB of nothing for each byte of content.
MAX_CHUNK_LINE = 256

# Lines that are remembered with what their check has found, and characters of each at most: half a megabyte for each of the
# two tables. When one is full it is emptied: whoever fills it with lines of his own costs the others one check per 1024 lines.
KNOWN_LINES, KNOWN_LINE = 1024, 256

# ---- errors ---------------------------------------------------------------------------------------------------

class HttpError(flowcoro.FlowCoroError):
    """A request is answered with an error: `status`, `message` (for the client), `headers` (pairs) of the answer."""

    def __init__(self, status, message="", headers=()):
        super().__init__(status, message)
        self.status, self.message, self.headers = status, message, headers

    def __str__(self):
        return f"{self.status}: {self.message}"


class ProtocolError(HttpError):
    """The peer has sent what is no HTTP, or more of it than a limit. `status` is what a server answers before it closes.

    400 no HTTP · 413 content too large · 414 request line too long · 431 head too large · 505 another major version; on the
    client's side it is 502, which a gateway may pass on.
    """


class LocalProtocolError(flowcoro.FlowCoroError):
    """Our own side asks for what is no HTTP: events in a wrong order, content beyond its length, a field that splits the head."""


# ---- headers --------------------------------------------------------------------------------------------------
#
# A field line is checked once, by a pattern over the whole of it, and then known: requests repeat their lines from one to the
# next (a browser's: all but a few), so a table of lines that have been found good (line -> what it says) saves the pattern, the
# splitting and the strings. On CPython 3.11 the lines of a browser's head (12, one of them a cookie) take 1.8 µs by it, 6.9 µs
# without. Only good lines get in; limits are not part of it, because they differ from connection to connection; secrets are
# not kept there.

_TOKEN_CHARS = r"!#$%&'*+\-.^_`|~0-9A-Za-z"
_VALUE_CHARS = r"\t\x20-\x7e\x80-\xff"
_TOKEN = re.compile(rf"[{_TOKEN_CHARS}]+")
_VALUE = re.compile(rf"[{_VALUE_CHARS}]*")

# What follows the colon is stripped afterwards: two runs of whitespace in the pattern, with nothing between, would take the
# square of their length to fail.
_FIELD_LINE = re.compile(rf"([{_TOKEN_CHARS}]+):([{_VALUE_CHARS}]*)")
_DIGITS = re.compile(r"[0-9]{1,18}")

# RFC 9110 allows sub-delims and percent-encoding in a reg-name too. No host has them, and what reads a Host further on (a
# cache's key, a log, a template, a shell) is better off without.
_AUTHORITY = re.compile(r"([0-9A-Za-z._~-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")

# Field lines with these names are checked each time and not remembered.
_SECRET = frozenset(["authorization", "cookie", "proxy-authorization", "set-cookie", "www-authenticate", "authentication-info"])


def _shown(text, most=60):
    """`text` for a message: quoted, and cut."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}… ({len(text)} characters)"


def _authority_problem(text):
    """None if it is a host and perhaps a port (RFC 3986, narrowed), or what is wrong."""
    found = _AUTHORITY.fullmatch(text)
    if found is None:
        return "is no host with an optional port"
    if found[2] and int(found[2]) > 65535:
        return "has a port beyond 65535"
    if text[0] == "[":
        try:
            socket.inet_pton(socket.AF_INET6, found[1][1:-1])
        except OSError:
            return "is no IPv6 address"
    return None


def _length_problem(text):
    return None if _DIGITS.fullmatch(text) else "is not 1 to 18 digits"


def _coding_problem(text):
    return None if text.lower() == "chunked" else "is not exactly `chunked`"


def _options_problem(text):
    """RFC 9110 5.6.1: a list of tokens; empty elements are allowed to those who read it."""
    return None if all(_TOKEN.fullmatch(option) or not option for option in _split_list(text)) else "is no list of tokens"


def _split_list(text):
    return [element.strip(" \t") for element in text.split(",")]


# What the value of these has to be. They say where a message begins and ends, so they are never merely passed on.
_PROBLEMS = {"host": _authority_problem, "content-length": _length_problem, "transfer-encoding": _coding_problem,
             "connection": _options_problem}

# Which of them may not be repeated, not even with the same value: what reads them further on may take the first or the last.
_ONCE = ("host", "content-length", "transfer-encoding")

# RFC 9110 6.5.1: what a trailer section must not have, because it would change what has been done by then: framing, routing,
# modifiers of the request, authentication, control of the response, how the content is to be read.
_NOT_IN_TRAILERS = frozenset("""
    transfer-encoding content-length host connection keep-alive proxy-connection te trailer upgrade max-forwards expect range
    if-match if-none-match if-modified-since if-unmodified-since if-range pragma cache-control
    authorization proxy-authorization www-authenticate proxy-authenticate authentication-info proxy-authentication-info
    cookie set-cookie age expires date location retry-after vary warning
    content-encoding content-type content-range content-location content-language forwarded x-forwarded-for x-forwarded-proto
    x-forwarded-host via""".split())


class _KnownLines(dict):
    """{line: what it says, a tuple that begins with the lower-case name}. A line that is not known is checked by `check`."""

    __slots__ = ("check",)

    def __init__(self, check):
        super().__init__()
        self.check = check

    def __missing__(self, line):
        entry = self.check(line)
        if (len(line) if isinstance(line, str) else len(line[0]) + len(line[1])) <= KNOWN_LINE and entry[0] not in _SECRET:
            if len(self) >= KNOWN_LINES:
                self.clear()
            self[line] = entry
        return entry


def _read_line(line):
    """A field line as received, without CRLF: (lower-case name, (name, value)). ProtocolError 400."""
    found = _FIELD_LINE.fullmatch(line)
    if found is None:
        raise ProtocolError(400, _line_problem(line))
    name, value = found[1], found[2].strip(" \t")
    lower = name.lower()
    problem = _PROBLEMS.get(lower)
    if problem is not None and (said := problem(value)):
        raise ProtocolError(400, f"{name}: {_shown(value)} {said}")
    return lower, (name, value)


def _line_problem(line):
    name, colon, _ = line.partition(":")
    if line[0] in " \t":
        return f"{_shown(line)}: a field line begins with whitespace (obsolete folding is not HTTP any more)"
    if not colon:
        return f"{_shown(line)}: a field line has no colon"
    if _TOKEN.fullmatch(name):
        return f"the value of {_shown(name)} has a control character"
    if _TOKEN.fullmatch(name.rstrip(" \t")):
        return f"{_shown(line)}: there is whitespace before the colon"
    return f"{_shown(name)} is no name of a field"


def _write_line(pair):
    """A (name, value) to be sent: (lower-case name, b"name: value CRLF"). LocalProtocolError, TypeError."""
    name, value = pair
    if not isinstance(name, str) or not isinstance(value, str):
        raise TypeError(f"{pair!r}: name and value of a field are str")
    if not _TOKEN.fullmatch(name):
        raise LocalProtocolError(f"{_shown(name)} is no name of a field: letters, digits and !#$%&'*+-.^_`|~ are allowed")
    if not _VALUE.fullmatch(value):
        raise LocalProtocolError(f"{name}: {_shown(value)} has a control character or one beyond U+00FF; encode it")
    lower, value = name.lower(), value.strip(" \t")
    problem = _PROBLEMS.get(lower)
    if problem is not None and (said := problem(value)):
        raise LocalProtocolError(f"{name}: {_shown(value)} {said}")
    return lower, f"{name}: {value}\r\n".encode("latin-1")


_RECEIVED, _SENT = _KnownLines(_read_line), _KnownLines(_write_line)
_received, _sent = _RECEIVED.__getitem__, _SENT.__getitem__         # which call __missing__(), and cost no frame if not


def _first_of_each(entries):
    """{lower-case name: rest of its first entry}"""
    index = dict(entries)
    return index if len(index) == len(entries) else dict(reversed(entries))


class Headers:
    """The field lines of a head or trailer section: any number of each name, in order; names in any case (RFC 9110 5).

    Made from (name, value) pairs of str. Names are tokens, values have no control character but HTAB and nothing beyond U+00FF
    (they travel as latin-1), SP and HTAB around them fall away; else LocalProtocolError, or TypeError for what is no str.
    Iterating gives all (name, value), spelt as received or set; len() counts lines.
    """

    __slots__ = ("_entries", "_index")

    def __init__(self, pairs=()):
        self._entries = [_entry(name, value) for name, value in pairs]     # (lower-case name, (name, value))
        self._index = None                                                 # made of them when it is first needed

    @classmethod
    def _of(cls, entries, index=None):
        self = cls.__new__(cls)
        self._entries, self._index = entries, index
        return self

    def _find(self, name):
        index = self._index
        if index is None:
            index = self._index = _first_of_each(self._entries)
        found = index.get(name)
        return index.get(_lower(name)) if found is None else found

    def __getitem__(self, name):
        """The first value of that name; KeyError if there is none."""
        found = self._find(name)
        if found is None:
            raise KeyError(name)
        return found[1]

    def get(self, name, default=None):
        """The first value of that name, or `default`."""
        found = self._find(name)
        return default if found is None else found[1]

    def get_all(self, name):
        """All values of that name, in order: a list, perhaps an empty one."""
        lower = _lower(name)
        return [pair[1] for other, pair in self._entries if other == lower]

    def items(self):
        """All (name, value) in order, a new list."""
        return [entry[1] for entry in self._entries]

    def __iter__(self):
        return iter(self.items())

    def __contains__(self, name):
        return self._find(name) is not None

    def __len__(self):
        return len(self._entries)

    def __eq__(self, other):
        if not isinstance(other, Headers):
            return NotImplemented
        return ([(lower, pair[1]) for lower, pair in self._entries] == [(lower, pair[1]) for lower, pair in other._entries])

    __hash__ = None

    def add(self, name, value):
        """One more line, after the others."""
        self._entries.append(_entry(name, value))
        self._index = None

    def set(self, name, value):
        """The only line of that name: in the place of the first, if there was one, or the last."""
        entry = _entry(name, value)
        place = next((n for n, (lower, _) in enumerate(self._entries) if lower == entry[0]), len(self._entries))
        self._entries = [other for other in self._entries if other[0] != entry[0]]
        self._entries.insert(place, entry)
        self._index = None

    def remove(self, name):
        """Take all lines of that name out; whether there were any."""
        lower, before = _lower(name), len(self._entries)
        self._entries = [entry for entry in self._entries if entry[0] != lower]
        self._index = None
        return len(self._entries) < before

    def copy(self):
        """Another one with the same lines."""
        return Headers._of(self._entries.copy())

    def __repr__(self):
        shown = [(name, "…" if lower in _SECRET else value) for lower, (name, value) in self._entries]
        return f"Headers({shown!r})"


def _entry(name, value):
    lower, _ = _SENT[name, value]
    return lower, (name, value.strip(" \t"))


def _lower(name):
    """The lower-case form of a name to look for. (Beyond ASCII lower() makes letters of what is none: U+212A is a k.)"""
    return name.lower() if name.isascii() else name


# ---- codec ----------------------------------------------------------------------------------------------------
#
# RFC 9112 without I/O: bytes go in, events come out (receive_data(), next_event()); events go in, bytes come out (send()).
# One HttpConnection is one end of one connection. It holds what has been received and not yet been read, never a body.
#
# A head is read in one of two ways. The short way is for a head that is there in one piece: found by one bytes.find, decoded
# once, split once, its lines looked up in a table. It only ever *accepts*: what it does not like, whatever it is, it leaves as
# it was to the long way, which goes line by line as the bytes come. So there is one place that says what is wrong, and it says
# the same however the bytes were split, because it looks at them in their order:
#
#     C1  an error depends on the bytes up to the one that makes it one, never on how many more are there
#     C2  what is before an error is delivered first: the events of the bytes before it
#     C3  every byte is looked at a bounded number of times: `_scan` is how far the current line has been searched
#     C4  _start <= _scan, and what is before _start is gone for good
#
# Both sides' states change by one table, _TRANSITIONS: (whose state, state, what happens) -> state. Nothing else sets them.

CLIENT, SERVER = "client", "server"

# The states of each side; both begin as IDLE, and again with the next cycle.
IDLE, SEND_RESPONSE, SEND_BODY = "IDLE", "SEND_RESPONSE", "SEND_BODY"
DONE, MUST_CLOSE, CLOSED, ERROR = "DONE", "MUST_CLOSE", "CLOSED", "ERROR"
MIGHT_SWITCH, SWITCHED = "MIGHT_SWITCH", "SWITCHED"

# What happens. A request moves both sides; the others the one whose they are.
_REQUEST, _INFORM, _RESPOND, _DATA, _END, _WHOLE = "request", "1xx", "response", "data", "end", "a whole message"
_ASK, _ACCEPT, _DECLINE = "end, and a wish to switch", "the switch", "no switch"
_LAST, _NEXT, _CLOSE, _FAIL = "no keep-alive", "the next cycle", "the end of the connection", "an error"

_OVER = {_LAST: MUST_CLOSE, _CLOSE: CLOSED, _FAIL: ERROR}
_TRANSITIONS = {
    CLIENT: {
        IDLE: {_REQUEST: SEND_BODY, **_OVER},               # (the last cycle: they are answered before they ask, with 408)
        SEND_BODY: {_DATA: SEND_BODY, _END: DONE, _ASK: MIGHT_SWITCH, _FAIL: ERROR},
        MIGHT_SWITCH: {_ACCEPT: SWITCHED, _DECLINE: DONE, _FAIL: ERROR},
        DONE: {_NEXT: IDLE, **_OVER},
        MUST_CLOSE: _OVER, CLOSED: {_CLOSE: CLOSED}, SWITCHED: {}, ERROR: {_FAIL: ERROR},
    },
    SERVER: {
        IDLE: {_REQUEST: SEND_RESPONSE, _RESPOND: SEND_BODY, _WHOLE: DONE, **_OVER},        # (to what is no request: 400)
        SEND_RESPONSE: {_INFORM: SEND_RESPONSE, _RESPOND: SEND_BODY, _WHOLE: DONE, _ACCEPT: SWITCHED, _FAIL: ERROR},
        SEND_BODY: {_DATA: SEND_BODY, _END: DONE, _FAIL: ERROR},
        DONE: {_NEXT: IDLE, **_OVER},
        MUST_CLOSE: _OVER, CLOSED: {_CLOSE: CLOSED}, SWITCHED: {}, ERROR: {_FAIL: ERROR},
    },
}

# In these nothing more is read; and in these a client may come to another request.
_DEAF, _LIVELY = frozenset([MUST_CLOSE, CLOSED, ERROR]), frozenset([SEND_BODY, MIGHT_SWITCH, DONE])


class _Sign:
    """A thing that is only itself."""

    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


# Of next_event(): give it more by receive_data() or receive_end(); nothing more will come before the next cycle, or the switch.
NEED_DATA, PAUSED = _Sign("NEED_DATA"), _Sign("PAUSED")


class RequestHead:
    """A request's method, target and headers. To send: `headers` are pairs or Headers, with exactly one Host.

    Received: `headers` are Headers, `version` is "1.0" or "1.1". The target is as received: origin-form (/path?query),
    absolute-form (http://host/path?query), authority-form (host:port; CONNECT) or asterisk-form (*; OPTIONS).
    """

    __slots__ = ("method", "target", "headers", "version")

    def __init__(self, method, target, headers=(), version="1.1"):
        self.method, self.target, self.headers, self.version = method, target, headers, version

    @property
    def authority(self):
        """host[:port] that the request is for: of the target, if it has one (RFC 9112 3.2.2: then Host counts for nothing)."""
        if self.method == "CONNECT":
            return self.target
        found = _ABSOLUTE.fullmatch(self.target)
        headers = self.headers if isinstance(self.headers, Headers) else Headers(self.headers)
        return found[2] if found else headers.get("host", "")

    @property
    def path(self):
        """Path and query of the target; "*" or "" if it has none."""
        if self.method == "CONNECT":
            return ""
        found = _ABSOLUTE.fullmatch(self.target)
        if found is None:
            return self.target
        return found[3] if found[3][:1] == "/" else "*" if self.method == "OPTIONS" and not found[3] else "/" + found[3]

    def __repr__(self):
        return f"RequestHead({self.method!r}, {self.target!r}, {self.headers!r}, {self.version!r})"


class ResponseHead:
    """A response's status (200 to 999) and headers, pairs or Headers. `reason`: None for the usual one.

    Received: `headers` are Headers, `version` is "1.0" or "1.1", and `reason` is what came, perhaps "".
    """

    __slots__ = ("status", "headers", "reason", "version")

    def __init__(self, status, headers=(), reason=None, version="1.1"):
        self.status, self.headers, self.reason, self.version = status, headers, reason, version

    def __repr__(self):
        return f"{type(self).__name__}({self.status!r}, {self.headers!r}, {self.reason!r}, {self.version!r})"


class InformationalResponse(ResponseHead):
    """A response before the response: 100 Continue, 103 Early Hints; 101 Switching Protocols is the last one."""

    __slots__ = ()


class Data:
    """Some of the content: `data`. Received: bytes, at least one, as they came; they say nothing about chunks."""

    __slots__ = ("data",)

    def __init__(self, data):
        self.data = data

    def __repr__(self):
        return f"Data({self.data!r})"


class EndOfMessage:
    """The message is complete. `trailers`: Headers (to send: or pairs) of its trailer section, or None if it has none."""

    __slots__ = ("trailers",)

    def __init__(self, trailers=None):
        self.trailers = trailers

    def __repr__(self):
        return f"EndOfMessage({self.trailers!r})"


class ConnectionClosed:
    """The peer has ended, and between two messages. It will send nothing more; it may still read."""

    __slots__ = ()

    def __repr__(self):
        return "ConnectionClosed()"


_PLAIN_END, _CONNECTION_CLOSED = EndOfMessage(), ConnectionClosed()
_new = object.__new__

# A target is printable ASCII. `#` would begin a fragment, which is never sent; `"`, `<` and `>` no URL has (the others that RFC
# 3986 forbids, such as `|` and `[` in a query, browsers do send).
_TARGET_CHARS = r"!$-;=?-~"
_FIRST_LINE = re.compile(rf"([{_TOKEN_CHARS}]+) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_ORIGIN = re.compile(rf"/[{_TARGET_CHARS}]*")
_ABSOLUTE = re.compile(rf"([Hh][Tt][Tt][Pp][Ss]?)://([^/?#@]+)((?:[/?][{_TARGET_CHARS}]*)?)")

# What nearly every request begins with. The rest takes the long way: CONNECT, other methods, targets, versions.
_USUAL_LINE = re.compile(rf"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) (/[{_TARGET_CHARS}]*) HTTP/1\.([01])")
_usual_line = _USUAL_LINE.fullmatch

# The space after the status is there even without a reason (RFC 9112 4), but not every server knows.
_STATUS_LINE = re.compile(rf"HTTP/([0-9])\.([0-9]) ([1-9][0-9][0-9])(?: ([{_VALUE_CHARS}]*))?")
_STATUS_START = b"HTTP/"

# A chunk's size, and what may follow it (RFC 9112 7.1.1) but for the whitespace that is called bad there. What repeats is
# possessive (*+): each part begins with what the one before cannot hold, so there is nothing to go back for.
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})\r\n")
_CHUNK_LINE = re.compile(
    rf"([0-9A-Fa-f]{{1,16}})(?:;[{_TOKEN_CHARS}]++(?:=(?:[{_TOKEN_CHARS}]++"
    r'|"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]++|\\[\t\x20-\x7e\x80-\xff])*+"))?)*+')

_TOKEN_BYTES = frozenset(byte for byte in range(128) if _TOKEN.fullmatch(chr(byte)))

# How the end of a content is known; and where in a chunked one we are.
_BY_LENGTH, _BY_CLOSE, _BY_CHUNKS, _DROPPED = "length", "close", "chunks", "dropped"
_NO_OPTIONS = frozenset()
_SIZE, _INSIDE, _AFTER, _TRAILERS = "size", "inside", "after", "trailers"


def _request_line(line):
    """(method, target, minor version) of a request line; ProtocolError 400, 505."""
    found = _FIRST_LINE.fullmatch(line)
    if found is None:
        raise ProtocolError(400, f"{_shown(line)} is no request line: method, target, HTTP/1.1, with single spaces between")
    method, target, major, minor = found.groups()
    if major != "1":
        raise ProtocolError(505, f"this is HTTP/1.1, and not HTTP/{major}.{minor}")
    problem = _target_problem(method, target)
    if problem:
        raise ProtocolError(400, f"{_shown(target)} {problem}")
    return method, target, int(minor)


def _target_problem(method, target):
    """None if it is a target for that method (RFC 9112 3.2), or what is wrong."""
    if method == "CONNECT":
        found = _AUTHORITY.fullmatch(target)
        return None if found and found[2] and not _authority_problem(target) else "is no host:port, and CONNECT takes that"
    if _ORIGIN.fullmatch(target) or (target == "*" and method == "OPTIONS"):
        return None
    found = _ABSOLUTE.fullmatch(target)
    if found is None:
        return "is no target: /path, http://host/path, or * for OPTIONS"
    problem = _authority_problem(found[2])
    return problem and f"has an authority that {problem}"


@functools.lru_cache(256)
def _option_set(value):
    """The lower-case tokens of a list. (They are few, and repeat: 0.04 µs instead of 0.5.)"""
    return frozenset(option.lower() for option in _split_list(value) if option)


def _repeated(entries):
    """What is wrong if something is there more than once that must not be, else None."""
    names = [entry[0] for entry in entries]
    for name in _ONCE:
        if names.count(name) > 1:
            return f"{name} is there {names.count(name)} times, and once is allowed"
    return None


class _Received:
    """What has been received, and is to be read."""

    __slots__ = ("role", "our_state", "their_state", "method", "keep_alive", "expects_continue", "upgrade", "max_body",
                 "_our_moves", "_their_moves", "_our_end", "_their_end", "_awaits", "_minor",
                 "_max_first", "_max_field", "_max_fields", "_max_head", "_max_chunk_line", "_least_line",
                 "_buffer", "_start", "_scan", "_ended", "_error",
                 "_first", "_entries", "_head_size", "_blank",
                 "_mode", "_left", "_stage", "_body_size",
                 "_out_mode", "_out_left")

    def receive_data(self, data):
        """What the peer has sent next, bytes, at least one. Call next_event() until it gives NEED_DATA or PAUSED.

        Nothing bounds what is given while it is PAUSED: do not read from the peer then (but to learn that it is gone).
        """
        if type(data) is not bytes:
            data = bytes(data)
        if self._ended or not data:
            raise LocalProtocolError("receive_data() after receive_end()" if self._ended else
                                     "receive_data() without data; receive_end() says that there is no more")
        if self._start == len(self._buffer):
            self._buffer, self._start, self._scan = data, 0, 0
        elif self.their_state not in _DEAF:
            if type(self._buffer) is bytes:             # what is appended to is a bytearray: bytes would be copied each time
                self._buffer = bytearray(self._buffer)
            if self._start:
                del self._buffer[:self._start]
                self._scan, self._start = max(0, self._scan - self._start), 0
            self._buffer += data

    def receive_end(self):
        """The peer will send no more."""
        self._ended = True

    @property
    def trailing_data(self):
        """What has been received and not been read, bytes: after the switch it belongs to the next protocol."""
        return bytes(memoryview(self._buffer)[self._start:])

    def _forget(self):
        self._buffer, self._start, self._scan = b"", 0, 0

    def _no_keep_alive(self):
        """This is the last cycle; of a side that is through with it, for good."""
        self.keep_alive = False
        if self.our_state is DONE:
            self.our_state = self._our_moves[DONE][_LAST]
        if self.their_state is DONE:
            self.their_state = self._their_moves[DONE][_LAST]

    def _more(self, where):
        """NEED_DATA, unless there will be none."""
        if self._ended:
            raise ProtocolError(400, f"the peer ended in the middle of {where}")
        return NEED_DATA

    def _take_line(self, limit, status, what):
        """The next line without its CRLF, or None while it is incomplete. `limit`: bytes; `status`, `what`: if it has more."""
        buffer, start = self._buffer, self._start
        bound = start + limit + 1               # the first place where its end may not be any more
        cr = buffer.find(b"\r", self._scan, bound)
        if buffer.find(b"\n", self._scan, bound if cr < 0 else cr) >= 0:
            raise ProtocolError(400, f"{what}: a line feed without a carriage return before it")
        if cr < 0:
            if len(buffer) >= bound:
                raise ProtocolError(status, f"{what} takes more than the {limit} bytes that are left to it")
            self._scan = len(buffer)
            return None
        if cr + 1 == len(buffer):
            self._scan = cr
            return None
        if buffer[cr + 1] != 10:
            raise ProtocolError(400, f"{what}: a carriage return without a line feed after it")
        self._start = self._scan = cr + 2
        return buffer[start:cr].decode("latin-1")


class _Heads(_Received):
    """Heads: bytes to events, and what they say of the connection."""

    __slots__ = ()

    def _head(self):
        if self._entries is None:               # the long way has not begun
            buffer, start = self._buffer, self._start
            end = buffer.find(b"\r\n\r\n", start, start + self._max_head + 4)
            if end >= 0:
                text = buffer[start:end].decode("latin-1")
                event = self._short_way(text)
                if event is not None:
                    self._start = self._scan = end + 4
                    return event
            elif start == len(buffer):
                return self._nothing() if self._ended else NEED_DATA
            self._entries = []
        return self._long_way()

    def _nothing(self):
        """The peer has ended before it sent anything of a head."""
        if self.role is CLIENT:
            raise ProtocolError(400, "the peer ended without a response")
        self.their_state = self._their_moves[self.their_state][_CLOSE]
        return _CONNECTION_CLOSED

    def _short_way(self, text):
        """The event of a whole head, without its last two CRLF, or None if anything about it is odd."""
        lines, server = text.split("\r\n"), self.role is SERVER
        found = _usual_line(lines[0]) if server else _STATUS_LINE.fullmatch(lines[0])
        if (found is None or len(lines) > self._max_fields + 1 or (len(text) > self._least_line and self._too_long(lines))
                or not server and found[1] != "1"):
            return None
        del lines[0]
        try:
            entries = list(map(_received, lines))
        except ProtocolError:
            return None
        if not server:
            return self._response(found, entries)
        method, target, minor = found.groups()
        return self._request(method, target, minor != "0", entries)

    def _too_long(self, lines):
        return len(lines[0]) > self._max_first or max(map(len, lines)) > self._max_field

    def _long_way(self):
        """The event of a head line by line, as it comes."""
        client = self.role is CLIENT
        while True:
            if self._first is None:
                if self._start == len(self._buffer):
                    return self._nothing() if self._ended else NEED_DATA
                self._check_start(client)
                limit, status, what = self._max_first, 414, "the status line" if client else "the request line"
            else:
                limit, status, what = self._max_field, 431, "a field line"
            left = max(0, self._max_head - self._head_size)
            if left < limit:
                limit, status, what = left, 431, "the head"
            line = self._take_line(limit, status, what)
            if line is None:
                return self._more("a head")
            if not line and self._first is None and not self._blank:
                self._blank = True              # RFC 9112 2.2: one empty line before a request is to be ignored
                continue
            self._head_size += len(line) + 2
            if self._first is None:
                self._first = self._status_line(line) if client else _request_line(line)
            elif line:
                self._add_line(line)
            else:
                first, entries = self._first, self._entries
                self._first = self._entries = None
                self._head_size = 0
                return self._response(first, entries) if client else self._request(*first, entries)

    def _check_start(self, client):
        """What is no HTTP at all is refused by its first bytes: a TLS handshake, say, has no line to wait for."""
        if client:
            for byte, right in zip(self._buffer[self._start:self._start + len(_STATUS_START)], _STATUS_START):
                if byte != right:
                    raise ProtocolError(400, f"the byte 0x{byte:02x} where {_STATUS_START.decode()} has to be")
        elif (byte := self._buffer[self._start]) not in _TOKEN_BYTES and byte not in b"\r\n":
            raise ProtocolError(400, f"no request begins with the byte 0x{byte:02x}; is it TLS, or another protocol?")

    @staticmethod
    def _status_line(line):
        found = _STATUS_LINE.fullmatch(line)
        if found is None:
            raise ProtocolError(400, f"{_shown(line)} is no status line")
        if found[1] != "1":
            raise ProtocolError(505, f"this is HTTP/1.1, and not HTTP/{found[1]}.{found[2]}")
        return found

    def _add_line(self, line):
        """One more field line of a head or trailer section."""
        if len(self._entries) == self._max_fields:
            raise ProtocolError(431, f"there are more than {self._max_fields} field lines")
        self._entries.append(_received(line))

    def _request(self, method, target, minor, entries):
        """The event of a request whose head is complete, and what follows from it for the connection."""
        self.method, self._minor = method, minor
        index = dict(entries)
        if len(index) != len(entries):
            if problem := _repeated(entries):
                raise ProtocolError(400, problem)
            index = dict(reversed(entries))
        headers = _new(Headers)                         # (Headers._of() takes 0.05 µs more)
        headers._entries, headers._index = entries, index
        if "host" not in index and minor:
            raise ProtocolError(400, "there is no Host")
        keep_alive, self._mode, self._left = minor > 0, _BY_LENGTH, 0
        content = "transfer-encoding" in index or "content-length" in index
        if content:
            self._frame(index, minor)
            self.expects_continue = ("expect" in index and minor > 0 and (self._mode is _BY_CHUNKS or self._left > 0)
                                     and "100-continue" in _option_set(", ".join(headers.get_all("expect"))))
        if "connection" in index:
            options = _option_set(index["connection"][1] if len(index) == len(entries) else
                                  ", ".join(headers.get_all("connection")))
            keep_alive = "close" not in options and (minor > 0 or "keep-alive" in options)
            if "upgrade" in options and minor and "upgrade" in index:
                self.upgrade = tuple(filter(None, _split_list(", ".join(headers.get_all("upgrade")))))
        if self.upgrade or method == "CONNECT":
            if content and method == "CONNECT":
                raise ProtocolError(400, "a CONNECT has no content, so neither Content-Length nor Transfer-Encoding")
            self._their_end = _ASK
        self.keep_alive = keep_alive
        self.their_state = self._their_moves[self.their_state][_REQUEST]
        self.our_state = self._our_moves[self.our_state][_REQUEST]
        return RequestHead(method, target, headers, "1.1" if minor else "1.0")

    def _response(self, found, entries):
        """The event of a response whose head is complete, and what follows from it for the connection."""
        status, minor = int(found[3]), int(found[2])
        index = dict(entries)
        if len(index) != len(entries):
            if problem := _repeated(entries):
                raise ProtocolError(400, problem)
            index = dict(reversed(entries))
        headers = Headers._of(entries, index)
        version, reason = "1.1" if minor else "1.0", found[4] or ""
        if status < 200:
            if status == 101:
                self._check_switch(headers)
                self._switch()
            return InformationalResponse(status, headers, reason, version)
        if self.method == "CONNECT" and status < 300:
            self._end_is_implied()
            self._switch()
            return ResponseHead(status, headers, reason, version)
        empty = self.method == "HEAD" or status == 204 or status == 304
        if "transfer-encoding" in index or "content-length" in index:
            self._frame(index, minor, limited=not empty)
        else:
            self._mode, self._left = _BY_CLOSE, sys.maxsize if self.max_body is None else self.max_body
        if empty:
            self._mode, self._left = _BY_LENGTH, 0
        options = _option_set(", ".join(headers.get_all("connection"))) if "connection" in index else _NO_OPTIONS
        if self._mode is _BY_CLOSE or "close" in options or (not minor and "keep-alive" not in options):
            self.keep_alive = False
        self._decline()
        self.their_state = self._their_moves[self.their_state][_RESPOND]
        return ResponseHead(status, headers, reason, version)

    def _check_switch(self, headers):
        self._end_is_implied()
        offered = {protocol.lower() for protocol in self.upgrade}
        chosen = _option_set(", ".join(headers.get_all("upgrade")))
        if self.our_state is not MIGHT_SWITCH or self.method == "CONNECT":
            raise ProtocolError(400, "the peer switches protocols, and was not asked to")
        if not chosen or not chosen <= offered:
            raise ProtocolError(400, f"the peer switches to {sorted(chosen)}, and was offered {sorted(offered)}")

    def _end_is_implied(self):
        """The end of a request without content takes no bytes: the peer may know of it before we have said so."""
        if self.our_state is SEND_BODY and self._out_mode is _BY_LENGTH and not self._out_left:
            self.our_state = self._our_moves[SEND_BODY][self._our_end]

    def _switch(self):
        """Both sides speak another protocol from here on."""
        if self.our_state is not MIGHT_SWITCH and self.their_state is not MIGHT_SWITCH:
            raise ProtocolError(400, "the peer switches protocols before our request is complete")
        self.our_state = self._our_moves[self.our_state][_ACCEPT]
        self.their_state = self._their_moves[self.their_state][_ACCEPT]

    def _decline(self):
        """A final response: no switch, whatever was asked for."""
        self._our_end = self._their_end = _END
        if self.our_state is MIGHT_SWITCH:
            self.our_state = self._our_moves[MIGHT_SWITCH][_DECLINE]
        if self.their_state is MIGHT_SWITCH:
            self.their_state = self._their_moves[MIGHT_SWITCH][_DECLINE]
        if not self.keep_alive:
            self._no_keep_alive()

    def _frame(self, index, minor, limited=True):
        """How the content is delimited (RFC 9112 6.3), by one field alone."""
        if "transfer-encoding" not in index:
            self._mode, self._left = _BY_LENGTH, int(index["content-length"][1])
            if limited and self.max_body is not None and self._left > self.max_body:
                raise ProtocolError(413, f"a content of {self._left} bytes; {self.max_body} are allowed")
        elif "content-length" in index:
            raise ProtocolError(400, "Transfer-Encoding and Content-Length at once: each says where the message ends")
        elif not minor:
            raise ProtocolError(400, "Transfer-Encoding in HTTP/1.0, which has none")
        else:
            self._mode, self._left, self._stage, self._body_size = _BY_CHUNKS, 0, _SIZE, 0


class _Incoming(_Heads):
    """What the peer sends: bytes to events."""

    __slots__ = ()

    def next_event(self):
        """The next event of what has been received, or NEED_DATA or PAUSED.

        ProtocolError: the peer does not speak HTTP, or too much of it; a server answers that if it still can (our_state is
        IDLE or SEND_RESPONSE), and closes. From then on each call raises it.
        """
        state = self.their_state
        try:
            if state is SEND_BODY:
                return self._content()
            if state is self._awaits:
                return self._head()
            return self._between(state)
        except ProtocolError as error:
            if self.role is CLIENT:
                error.status = 502
            self._fail(error)
            raise

    def _between(self, state):
        """next_event() where there is nothing to read."""
        if state is ERROR:
            raise ProtocolError(self._error.status, self._error.message)
        if state is MIGHT_SWITCH or state is SWITCHED:
            return PAUSED
        if state in _DEAF:
            self._forget()
        elif self._start < len(self._buffer):
            if state is not DONE:               # a client that has asked for nothing
                raise ProtocolError(400, "a response came, and there was no request")
            return PAUSED
        if not self._ended:
            return NEED_DATA
        self.their_state = self._their_moves[state][_CLOSE]
        return _CONNECTION_CLOSED

    def _fail(self, error):
        self.their_state = self._their_moves[self.their_state][_FAIL]
        self._error = error
        self._no_keep_alive()
        self._forget()

    def _content(self):
        mode, left = self._mode, self._left
        if mode is _BY_CHUNKS:
            return self._chunks()
        if not left and mode is _BY_LENGTH:
            return self._complete(_PLAIN_END)
        buffer, start = self._buffer, self._start
        size = len(buffer) - start
        if not size:
            if mode is _BY_CLOSE and self._ended:
                return self._complete(_PLAIN_END)
            return self._more("a content")
        if not left:
            raise ProtocolError(413, f"a content of more than {self.max_body} bytes")
        return Data(self._take(min(size, left)))

    def _take(self, size):
        """The next `size` bytes of the content, bytes: what was received itself if that is all of it, else a copy."""
        self._left -= size
        self.expects_continue = False
        buffer, start = self._buffer, self._start
        if not start and size == len(buffer):
            self._forget()
            return bytes(buffer)                # (the same object, if it is bytes)
        self._start = self._scan = start + size
        with memoryview(buffer) as view:
            return bytes(view[start:start + size])

    def _complete(self, event):
        self.expects_continue = False
        self.their_state = self._their_moves[SEND_BODY][self._their_end]
        if not self.keep_alive:
            self._no_keep_alive()
        return event

    def _chunks(self):
        """The next event of a chunked content: all that is there of it as one, because chunks may be very small."""
        if self._stage is _TRAILERS:
            return self._trailers()
        pieces = []
        try:
            while self._some_chunk(pieces):
                pass
        except ProtocolError:
            if not pieces:
                raise
            # C2. Nothing of what is wrong has been taken, so the next call finds it again.
        if pieces:
            self.expects_continue = False
            return Data(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if self._stage is _TRAILERS:
            return self._trailers()
        return self._more("a chunked content")

    def _some_chunk(self, pieces):
        """Go on as far as it is easy, or one step; whether there may be more."""
        if self._stage is _SIZE:
            self._whole_chunks(pieces)
            return self._chunk_size()
        size = min(self._left, len(self._buffer) - self._start)
        if self._stage is _INSIDE:
            if size:
                pieces.append(self._take(size))
            if self._left:
                return False
            self._stage = _AFTER
        end = self._buffer[self._start:self._start + 2]
        if not b"\r\n".startswith(end):
            raise ProtocolError(400, "a chunk of other than its size: no CRLF where it has to end")
        if len(end) < 2:
            return False
        self._start += 2
        self._scan, self._stage = self._start, _SIZE
        return True

    def _whole_chunks(self, pieces):
        """Chunks without extensions that are there as a whole: 0.5 µs each, by steps 1.6 µs."""
        buffer, start, body_size = self._buffer, self._start, self._body_size
        most = sys.maxsize if self.max_body is None else self.max_body
        while found := _CHUNK.match(buffer, start):
            size = int(found[1], 16)
            begin = found.end()
            end = begin + size
            if not size or body_size + size > most or buffer[end:end + 2] != b"\r\n":
                break
            pieces.append(bytes(buffer[begin:end]))
            body_size += size
            start = end + 2
        if start > self._start:
            self._start = self._scan = start
            self._body_size = body_size

    def _chunk_size(self):
        start = self._start
        line = self._take_line(self._max_chunk_line, 400, "the line that begins a chunk")
        if line is None:
            return False
        found = _CHUNK_LINE.fullmatch(line)
        size = int(found[1], 16) if found else 0
        if found is None or (self.max_body is not None and self._body_size + size > self.max_body):
            self._start = self._scan = start
            if found is None:
                raise ProtocolError(400, f"{_shown(line)} begins no chunk: 1 to 16 hexadecimal digits, perhaps extensions")
            raise ProtocolError(413, f"a content of more than {self.max_body} bytes")
        self._body_size += size
        self._left, self._stage = size, _INSIDE if size else _TRAILERS
        return size > 0

    def _trailers(self):
        if self._entries is None:
            self._entries = []
        while True:
            left = max(0, self._max_head - self._head_size)
            line = self._take_line(min(self._max_field, left), 431, "a line of the trailer section")
            if line is None:
                return self._more("a trailer section")
            self._head_size += len(line) + 2
            if not line:
                entries, self._entries, self._head_size = self._entries, None, 0
                return self._complete(EndOfMessage(Headers._of(entries)) if entries else _PLAIN_END)
            self._add_line(line)
            name = self._entries[-1][0]
            if name in _NOT_IN_TRAILERS:
                raise ProtocolError(400, f"{name} in a trailer section, where it would change what has been done by then")


# Reasons as RFC 9110 has them; the standard library's are older in some versions. They are for people: no program reads them.
REASONS = {status.value: status.phrase for status in http.HTTPStatus} | {
    413: "Content Too Large", 414: "URI Too Long", 416: "Range Not Satisfiable", 422: "Unprocessable Content"}
_STATUS_LINES = {status: f"HTTP/1.1 {status} {reason}\r\n".encode("ascii") for status, reason in REASONS.items()}

# Methods whose requests have a content, if an empty one: its length is then given (RFC 9110 8.6).
_WITH_CONTENT = frozenset(["POST", "PUT", "PATCH"])


def _status_line(head):
    """Of a response to be sent: b"HTTP/1.1 200 OK CRLF"."""
    reason = REASONS.get(head.status, "") if head.reason is None else head.reason
    if not _VALUE.fullmatch(reason):
        raise LocalProtocolError(f"the reason {_shown(reason)} has a control character or one beyond U+00FF")
    return f"HTTP/1.1 {head.status} {reason}\r\n".encode("latin-1")


def _sent_values(entries, name):
    """All values of a name in entries to be sent, as one list."""
    return ", ".join(line[len(name) + 2:-2].decode("latin-1") for lower, line in entries if lower == name)


class _Outgoing(_Incoming):
    """What we send: events to bytes."""

    __slots__ = ()

    def send(self, event):
        """The bytes of an event, to be sent in this order. LocalProtocolError: it may not be sent, and nothing has changed.

        The content of a response is framed by its Content-Length if there is one, and checked against it; else by chunks, or for
        HTTP/1.0 by the end of the connection. A request has a content if it has Content-Length or Transfer-Encoding: chunked.
        `Connection: close` or `keep-alive` is added where it has to be. Data in answer to HEAD is dropped.
        """
        sender = _SENDERS.get(type(event))
        if sender is None:
            raise TypeError(f"{event!r} is no event to send")
        return sender(self, event)

    def send_message(self, head, body=b""):
        """A RequestHead or ResponseHead, its content and its end as one bytes; Content-Length is added. Errors as send()'s."""
        size = len(body) if type(body) is bytes else memoryview(body).nbytes
        if type(head) is ResponseHead:
            if _WHOLE not in self._our_moves[self.our_state]:
                raise self._not_now(_WHOLE)
            lines = self._response_lines(head, size)
            if self.our_state is SWITCHED:
                return b"".join(lines)
            self.our_state = self._our_moves[self.our_state][_WHOLE]
        elif type(head) is RequestHead:
            lines = [self._send_request(head, size)]
            self.our_state = self._our_moves[SEND_BODY][self._our_end]
        else:
            raise TypeError(f"{head!r} is no head of a message")
        if size:
            if self._out_mode is _BY_LENGTH:
                lines.append(body)
            elif self._out_mode is _BY_CHUNKS:
                lines += [b"%x\r\n" % size, body, b"\r\n"]
        if self._out_mode is _BY_CHUNKS:
            lines.append(b"0\r\n\r\n")
        if not self.keep_alive:
            self._no_keep_alive()
        return b"".join(lines)

    def _not_now(self, what):
        return LocalProtocolError(f"{what} may not be sent by a {self.role} that is {self.our_state}")

    def _send_request(self, head, size=None):
        if self.role is not CLIENT or _REQUEST not in self._our_moves[self.our_state]:
            raise self._not_now(_REQUEST)
        if _REQUEST not in self._their_moves[self.their_state]:
            raise LocalProtocolError(f"a request may not be sent to a server that is {self.their_state}")
        method, target = head.method, head.target
        line = f"{method} {target} HTTP/1.1"
        if not _USUAL_LINE.fullmatch(line):
            if not _TOKEN.fullmatch(method):
                raise LocalProtocolError(f"{_shown(method)} is no method, because it is no token")
            if problem := _target_problem(method, target):
                raise LocalProtocolError(f"{_shown(target)} {problem}")
        entries, index = self._written(head.headers)
        if "host" not in index:
            raise LocalProtocolError(f"{_shown(line)}: a request has a Host")
        mode, left = self._announced(index, size)
        if method == "CONNECT" and (mode is _BY_CHUNKS or left is not None or size):
            raise LocalProtocolError("a CONNECT has no content, so neither Content-Length nor Transfer-Encoding")
        lines = [line.encode("ascii"), b"\r\n", *[entry[1] for entry in entries]]
        if left is None and mode is _BY_LENGTH and size is not None and (size or method in _WITH_CONTENT):
            lines.append(b"Content-Length: %d\r\n" % size)
        lines.append(b"\r\n")
        if "connection" in index:
            options = _option_set(_sent_values(entries, "connection"))
            self.keep_alive = "close" not in options
            if "upgrade" in options:
                self.upgrade = tuple(filter(None, _split_list(_sent_values(entries, "upgrade"))))
        if self.upgrade or method == "CONNECT":
            self._our_end = _ASK
        self.method, self._out_mode, self._out_left = method, mode, left or 0
        self.our_state = self._our_moves[self.our_state][_REQUEST]
        self.their_state = self._their_moves[self.their_state][_REQUEST]
        return b"".join(lines)

    def _send_response(self, head):
        if self.role is not SERVER or _RESPOND not in self._our_moves[self.our_state]:
            raise self._not_now(_RESPOND)
        lines = self._response_lines(head, None)
        if self.our_state is not SWITCHED:
            self.our_state = self._our_moves[self.our_state][_RESPOND]
        return b"".join(lines)

    def _send_informational(self, head):
        status = head.status
        if self.role is not SERVER or _INFORM not in self._our_moves[self.our_state]:
            raise self._not_now(_INFORM)
        if type(status) is not int or not 100 <= status <= 199 or not self._minor:
            raise LocalProtocolError(f"{status!r} for HTTP/1.{int(self._minor)}: an informational response is 100 to 199, and "
                                     "HTTP/1.0 has none")
        entries, index = self._written(head.headers)
        if "content-length" in index or "transfer-encoding" in index:
            raise LocalProtocolError(f"{status} has no content, so neither Content-Length nor Transfer-Encoding")
        if status == 101:
            chosen = _option_set(_sent_values(entries, "upgrade"))
            if not self.upgrade or self.their_state is not MIGHT_SWITCH:
                raise LocalProtocolError("101 is for a request that is complete and offers an Upgrade")
            if (not chosen or not chosen <= {protocol.lower() for protocol in self.upgrade}
                    or "upgrade" not in _option_set(_sent_values(entries, "connection"))):
                raise LocalProtocolError(f"101 has `Connection: Upgrade` and an Upgrade out of {self.upgrade}")
        lines = [_status_line(head), *[entry[1] for entry in entries], b"\r\n"]
        if status == 101:
            self._switch()
        self.expects_continue = False
        return b"".join(lines)

    @staticmethod
    def _written(headers):
        """Pairs or Headers to be sent: [(lower-case name, line)], and a dict of it."""
        entries = list(map(_sent, headers))
        index = dict(entries)
        if len(index) != len(entries) and (problem := _repeated(entries)):
            raise LocalProtocolError(problem)
        return entries, index

    @staticmethod
    def _announced(index, size):
        """How fields that are to be sent frame a content of `size` bytes (None: not known yet): mode, and bytes or None."""
        if "transfer-encoding" in index:
            if "content-length" in index:
                raise LocalProtocolError("Transfer-Encoding and Content-Length at once: each says where the message ends")
            return _BY_CHUNKS, None
        if "content-length" not in index:
            return _BY_LENGTH, None
        left = int(index["content-length"][16:-2])
        if size is not None and left != size:
            raise LocalProtocolError(f"Content-Length: {left}, and the content has {size} bytes")
        return _BY_LENGTH, left

    def _response_lines(self, head, size):
        """The lines of a final response, whose content (of `size` bytes, if that is known) is framed by them from now on."""
        status, method, minor = head.status, self.method, self._minor
        if type(status) is not int or not 200 <= status <= 999:
            raise LocalProtocolError(f"{status!r} is no status of a final response: 200 to 999")
        entries, index = self._written(head.headers)
        if head.reason is None and status in _STATUS_LINES:
            lines = [_STATUS_LINES[status], *[entry[1] for entry in entries]]
        else:
            lines = [_status_line(head), *[entry[1] for entry in entries]]
        if method == "CONNECT" and status < 300:
            return self._accept(lines, index, size)
        empty = method == "HEAD" or status == 204 or status == 304
        mode, left = _BY_LENGTH, None
        if "content-length" in index or "transfer-encoding" in index:
            mode, left = self._announced(index, None if empty else size)
            if mode is _BY_CHUNKS and not minor:
                raise LocalProtocolError("Transfer-Encoding for HTTP/1.0, which has none; leave it out")
            if status == 204:
                if left != 0:
                    raise LocalProtocolError("204 has no content, so neither Content-Length nor Transfer-Encoding")
                lines.remove(index["content-length"])           # what nearly every framework adds, and RFC 9110 8.6 forbids
        keep_alive = self.keep_alive and self.their_state in _LIVELY and not self.expects_continue
        if empty:
            if size and method != "HEAD":
                raise LocalProtocolError(f"{status} has no content, and {size} bytes were given")
            if size is not None and left is None and mode is _BY_LENGTH and status != 204 and status != 304:
                lines.append(b"Content-Length: %d\r\n" % size)
            mode, left = _DROPPED, 0
        elif left is None and mode is _BY_LENGTH:
            if size is not None:
                lines.append(b"Content-Length: %d\r\n" % size)
                left = size
            elif minor:
                lines.append(b"Transfer-Encoding: chunked\r\n")
                mode = _BY_CHUNKS
            else:
                mode, keep_alive = _BY_CLOSE, False
        options = _option_set(_sent_values(entries, "connection")) if "connection" in index else _NO_OPTIONS
        if "close" in options:
            keep_alive = False
        elif not keep_alive:
            lines.append(b"Connection: close\r\n")
        elif not minor and "keep-alive" not in options:
            lines.append(b"Connection: keep-alive\r\n")
        lines.append(b"\r\n")
        self._out_mode, self._out_left = mode, left
        self._final(keep_alive)
        return lines

    def _final(self, keep_alive):
        """A final response is sent, or the end instead: what follows from it."""
        self.expects_continue = False
        if not keep_alive:
            self.keep_alive = False
            if self.their_state is IDLE:                    # it answers no request, and none is read any more
                self.their_state = self._their_moves[IDLE][_LAST]
                self._forget()
        if not keep_alive or self._their_end is _ASK:
            self._decline()

    def _accept(self, lines, index, size):
        """A CONNECT is accepted: from here on it is a tunnel."""
        if size or "content-length" in index or "transfer-encoding" in index:
            raise LocalProtocolError("an accepted CONNECT has no content, so neither Content-Length nor Transfer-Encoding")
        if self.their_state is not MIGHT_SWITCH:
            raise LocalProtocolError(f"the request is not complete: they are {self.their_state}")
        self._switch()
        return [*lines, b"\r\n"]

    # -- the content

    def _send_data(self, event):
        if _DATA not in self._our_moves[self.our_state]:
            raise self._not_now(_DATA)
        data, mode = event.data, self._out_mode
        size = len(data) if type(data) is bytes else memoryview(data).nbytes
        if mode is _DROPPED:
            if size and self.method != "HEAD":
                raise LocalProtocolError(f"this response has no content, and {size} bytes were given")
            data = b""
        elif mode is _BY_LENGTH:
            if size > self._out_left:
                raise LocalProtocolError(f"{size} bytes, and {self._out_left} are left of what Content-Length announced")
            self._out_left -= size
        elif mode is _BY_CHUNKS and size:               # (an empty chunk would be the last one)
            data = b"".join((b"%x\r\n" % size, data, b"\r\n"))
        self.our_state = self._our_moves[self.our_state][_DATA]
        return data if type(data) is bytes else bytes(data)

    def _send_end(self, event):
        if self._our_end not in self._our_moves[self.our_state]:
            raise self._not_now(_END)
        mode, trailers = self._out_mode, event.trailers
        if mode is _BY_LENGTH and self._out_left:
            raise LocalProtocolError(f"the end, and {self._out_left} bytes are left of what Content-Length announced")
        entries = self._written(trailers)[0] if trailers else ()
        if entries and mode is not _BY_CHUNKS and mode is not _DROPPED:
            raise LocalProtocolError("only a chunked content has a trailer section")
        if bad := [name for name, _ in entries if name in _NOT_IN_TRAILERS]:
            raise LocalProtocolError(f"{bad[0]} in a trailer section, where it would change what has been done by then")
        self.our_state = self._our_moves[self.our_state][self._our_end]
        if not self.keep_alive:
            self._no_keep_alive()
        return b"".join([b"0\r\n", *[entry[1] for entry in entries], b"\r\n"]) if mode is _BY_CHUNKS else b""

    def _send_close(self, event):
        if _CLOSE not in self._our_moves[self.our_state]:
            raise self._not_now(_CLOSE)
        self.our_state = self._our_moves[self.our_state][_CLOSE]
        self._final(keep_alive=False)
        return b""


_SENDERS = {RequestHead: _Outgoing._send_request, ResponseHead: _Outgoing._send_response, Data: _Outgoing._send_data,
            InformationalResponse: _Outgoing._send_informational, EndOfMessage: _Outgoing._send_end,
            ConnectionClosed: _Outgoing._send_close}


class HttpConnection(_Outgoing):
    """One end of an HTTP/1.1 connection, without its socket. `role`: "server" or "client".

    Limits of what is received; beyond them next_event() raises ProtocolError with the status in brackets: max_request_line
    bytes, of a status line too [414]; max_field_line bytes, max_fields lines, max_head bytes of a head or trailer section [431];
    max_chunk_line bytes [400]; max_body bytes of content, None for any number [413], and it may be set anew at any time.

    To be read, and set by what happens:

    our_state, their_state    the states above; both DONE: start_next_cycle(); MUST_CLOSE: close when both are through
    method                    of the current request; None while there is none
    keep_alive                whether there may be another cycle, as far as is known
    expects_continue          (server) the client waits for 100 before it sends the content; a final response instead ends the
                              connection, because whether the content still comes is open
    upgrade                   protocols that the client offers, a tuple: answer 101, or as if there were none
    trailing_data             what came after the request, or after the switch
    """

    __slots__ = ()

    def __init__(self, role, *, max_request_line=MAX_REQUEST_LINE, max_field_line=MAX_FIELD_LINE, max_fields=MAX_FIELDS,
                 max_head=MAX_HEAD, max_chunk_line=MAX_CHUNK_LINE, max_body=None):
        if role not in (CLIENT, SERVER):
            raise ValueError(f"{role!r} is no role: {CLIENT!r} or {SERVER!r}")
        self.role = CLIENT if role == CLIENT else SERVER        # compared by identity
        self._max_first, self._max_field, self._max_fields = max_request_line, max_field_line, max_fields
        self._max_head, self._max_chunk_line, self.max_body = max_head, max_chunk_line, max_body
        self._least_line = min(max_request_line, max_field_line)
        self._our_moves = _TRANSITIONS[role]
        self._their_moves = _TRANSITIONS[SERVER if role == CLIENT else CLIENT]
        self._awaits = IDLE if role == SERVER else SEND_RESPONSE        # the state in which they send a head
        self._ended, self._error = False, None
        self._buffer, self._start, self._scan = b"", 0, 0
        self._first = self._entries = None      # of a head that comes in pieces: its first line, its field lines
        self._head_size = 0                     # bytes of it so far
        self._mode, self._left, self._stage, self._body_size = _BY_LENGTH, 0, _SIZE, 0
        self._out_mode, self._out_left = _BY_LENGTH, 0
        self.our_state = self.their_state = IDLE
        self._begin()

    def _begin(self):
        """Nothing is known of the current message."""
        self.keep_alive, self.expects_continue, self.upgrade, self.method, self._minor = True, False, (), None, 1
        self._our_end = self._their_end = _END
        self._blank = False

    @property
    def reusable(self):
        """Whether start_next_cycle() may be called: both sides are DONE."""
        return self.our_state is DONE and self.their_state is DONE

    def start_next_cycle(self):
        """Begin anew, with what has been received since. LocalProtocolError if the connection is not `reusable`."""
        if self.our_state is not DONE or self.their_state is not DONE:
            raise LocalProtocolError(f"no next cycle: we are {self.our_state}, they are {self.their_state}, and both have to be "
                                     "DONE; close the connection")
        self.our_state = self._our_moves[DONE][_NEXT]
        self.their_state = self._their_moves[DONE][_NEXT]
        self._begin()
        if self._start == len(self._buffer):
            self._buffer, self._start, self._scan = b"", 0, 0       # so that an idle connection holds no memory
