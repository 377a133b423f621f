"""flowcoro_websocket 0.1.0: WebSocket, strict to the last case: a codec without I/O, a server's end and a client's.

To vendor, copy: flowcoro.py, flowcoro_net.py, flowcoro_websocket.py

Example:

    from flowcoro_websocket import NEED_DATA, WebSocketConnection

    client, server = WebSocketConnection("client"), WebSocketConnection("server")
    server.receive_data(client.send_message("hello") + client.send_ping() + client.send_close(1000, "bye"))
    while (event := server.next_event()) is not NEED_DATA:
        print(event)
        if server.close_code is not None:
            client.receive_data(server.send_close(event.code, event.reason))
            break

Contents: constants · errors · masking · compression · handshake · codec · the WebSocket · server end · client end · broadcast

How it works:

The *codec*, WebSocketConnection, is one end of a connection after the handshake, without its socket: bytes go in, and events come
out; messages go in, and bytes come out. Who owns the socket reads, writes, and waits.

    receive_data(data), receive_end()   what the peer has sent
    next_event()                        a message (str: text, bytes: binary), or Piece after Piece of one where that is asked
                                        for; Ping, Pong, Close; NEED_DATA while there is too little; CLOSED at the end
    send_message(), send_piece(), send_ping(), send_pong(), send_close(), send_failure()        what to write

It answers nothing by itself: who gets a Ping sends the Pong, who gets a Close sends one back. What the peer sends is taken as it
is or refused with RemoteProtocolError, whose code belongs into the Close that says so; there is no middle way. C1 to C5, in the
section "codec", hold however the bytes were split, and the messages fragmented and compressed.

The *handshake* is pure, too: what a request has to say and what answers it, which origins may ask, what extension is agreed on.

A *WebSocket* is either end with its socket. Who waits in receive() reads the socket himself: there is no task for a connection
but its handler, no queue, and one read and one write for a message. One sweep for all WebSockets of a kernel sends the Pings,
ends what is dead, and has a task read for a handler that does not. What is sent are whole frames, whoever is cancelled; who sends
to a peer that does not read waits, and broadcast() keeps a bounded amount for it. E1 to E4, in the section "the WebSocket", say
what holds.

accept() makes one of a request of an HTTP server that it is given (it knows no server; HttpServer(websocket=accept) knows it),
and connect() one of a URL.

Errors:

    FlowCoroError
      WebSocketError
        ProtocolError
          RemoteProtocolError   the peer's fault: what it has sent is no WebSocket, or too much; code says which
          LocalProtocolError    our own fault: what is to be sent is no WebSocket, or not now
        HandshakeError          there is no WebSocket: status, headers and body of the answer
        ConnectionClosed        there is none any more: code, reason; also a flowcoro_net.BrokenError

Sources: RFC 6455 (WebSocket), RFC 7692 (permessage-deflate), RFC 9110 (CONNECT, redirects), RFC 3629 (UTF-8), RFC 6454 (origins),
the IANA's registry of close codes; the Autobahn test suite (what implementations get wrong); wsproto and websockets (the idea of
a codec by itself; the defaults of the keep-alive, and a loop that connects again); zlib.h.

What it does not do: the drafts before RFC 6455; HTTP/2 and HTTP/3 (RFC 8441, RFC 9220); other extensions than permessage-deflate.

SPDX-License-Identifier: MIT
"""

import base64
import codecs
import collections
import contextlib
import dataclasses
import hashlib
import math
import os
import random
import re
import threading
import typing
import urllib.parse
import weakref
import zlib

import flowcoro
import flowcoro_net

__version__ = "0.1.0"

__all__ = ["WebSocketConnection", "Piece", "Ping", "Pong", "Close", "NEED_DATA", "CLOSED", "Deflate", "encode_message",
           "accept_key", "WebSocket", "accept", "connect", "broadcast", "WebSocketError", "ProtocolError",
           "RemoteProtocolError", "LocalProtocolError", "HandshakeError", "ConnectionClosed"]

# ---- constants ------------------------------------------------------------------------------------------------

# Bytes of a message at most, inflated; beyond it 1009. `websockets` has 1 MiB too, aiohttp 4 MiB, `ws` 100 MiB.
MAX_MESSAGE = 2**20

# Fragments without data that may follow one another; beyond it 1008. They make no message longer, so no other limit meets them.
# Who flushes a stream by an empty fragment sends one at a time.
MAX_EMPTY_FRAGMENTS = 100

# Compressed bytes that a message of n bytes may have: 8 n and 1 KiB. Each byte flushed by itself has 7; blocks without data, of
# which a compressed stream may have any number, make no message longer.
_PACKED_TIMES, _PACKED_MORE = 8, 2**10

# Bits of the window that messages are compressed with, and zlib's memLevel: 32 KiB for each connection that compresses, where
# 15 and 8 take 264 KiB and save 1 to 5 % more (JSON of 1 to 48 KiB). `websockets` has the same.
WINDOW_BITS, MEM_LEVEL = 12, 5

# zlib's level. JSON of 48 KiB: 3 takes 0.6 ms and leaves 28.4 %, 6 takes 1.0 ms and leaves 26.3 %; of 1 KiB 13 and 20 µs.
COMPRESSION_LEVEL = 3

# Bytes below which a message goes uncompressed: it fits into a segment of TCP anyway. `ws` has the same, `websockets` none.
COMPRESSION_THRESHOLD = 1024

# Bytes that a piece of a compressed message has at most, and compressed bytes that are inflated at once: zlib copies what it has
# not used.
INFLATED_PIECE, DEFLATED_PIECE = 64 * 2**10, 16 * 2**10

# Of the answer to a handshake: bytes of a line, lines, and bytes of the whole head at most. flowcoro_http has the same.
MAX_FIELD_LINE, MAX_FIELDS, MAX_ANSWER_HEAD = 16 * 2**10, 100, 64 * 2**10

# ---- errors ---------------------------------------------------------------------------------------------------

class WebSocketError(flowcoro.FlowCoroError):
    """The base of the errors of this module."""


class ProtocolError(WebSocketError):
    """What was received, or is to be sent, is no WebSocket."""


class RemoteProtocolError(ProtocolError):
    """The peer's fault. `code` belongs into the Close that says so: send_failure() makes it.

    1002 no WebSocket · 1007 no UTF-8, or corrupt compressed data · 1008 a flood of empty fragments · 1009 too big
    """

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class LocalProtocolError(ProtocolError):
    """Our own fault: what is to be sent is no WebSocket, or comes at the wrong time. Nothing has changed."""


class HandshakeError(WebSocketError):
    """There is no WebSocket. `status`, `headers` (pairs), `body` (bytes) of the answer: to be given (server), or received.

    A client's `status` is 502 if what came is no HTTP; it is 101 if that is what came, and was wrong in itself.
    """

    _answered = True            # by somebody, and the 502 is not ours

    def __init__(self, status, message, headers=(), body=b""):
        super().__init__(message)
        self.status, self.headers, self.body = status, tuple(headers), body


def _no_answer(message, headers=()):
    """The HandshakeError for what is no answer, or leads nowhere."""
    error = HandshakeError(502, message, headers)
    error._answered = False
    return error


class ConnectionClosed(WebSocketError, flowcoro_net.BrokenError):
    """The WebSocket is closed. `code`, `reason`: of the peer's Close; 1005 if it gave none, 1006 if there was no Close, or it had
    not come yet. `websocket`: the one that is closed."""

    def __init__(self, code, reason="", message="", websocket=None):
        super().__init__(message or f"the WebSocket is closed: {code} {reason}".rstrip())
        self.code, self.reason, self.websocket = code, reason, websocket


# ---- masking --------------------------------------------------------------------------------------------------
#
# What a client sends is xored with four bytes, over and over (RFC 6455 5.3). Python has no xor of bytes. Two ways round that, in
# µs on CPython 3.11 and 3.13 (which hardly differ):
#
#     bytes                                    10     100     1 Ki    64 Ki     1 Mi
#     as two large integers                  0.20    0.34     1.7      150    2,600
#     each fourth byte by a table            0.60    0.90     1.5       51      850
#
# (An integer takes its time by the digit, to make and to write; translate() is a loop in C, and slices with a step are another.)
# Pieces of 16 KiB, which stay in the cache, are no faster.

_TRANSLATED = 1024          # bytes from which tables are faster

_from_bytes = int.from_bytes
_TABLES = [(_from_bytes(bytes(range(256)), "little") ^ _from_bytes(bytes([byte]) * 256, "little")).to_bytes(256, "little")
           for byte in range(256)]


def _masked(data, mask):
    """`data` xored with the four bytes of `mask`: bytes or a bytearray. `data` are bytes or a bytearray."""
    size = len(data)
    if size < _TRANSLATED:
        return (_from_bytes(data, "little") ^ _from_bytes((mask * (size + 3 >> 2))[:size], "little")).to_bytes(size, "little")
    out = bytearray(data)
    out[::4] = out[::4].translate(_TABLES[mask[0]])
    out[1::4] = out[1::4].translate(_TABLES[mask[1]])
    out[2::4] = out[2::4].translate(_TABLES[mask[2]])
    out[3::4] = out[3::4].translate(_TABLES[mask[3]])
    return out


# Masks to come, from the system's random numbers: nobody may foresee them (RFC 6455 10.3). 0.1 µs each; a call for each takes 0.3
# to 0.9.
# pop() is atomic; a forked process must not have those of its parent.
_masks = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_masks.clear)


def _new_mask():
    try:
        return _masks.pop()
    except IndexError:
        data = os.urandom(1024)
        _masks.extend(data[at:at + 4] for at in range(4, 1024, 4))
        return data[:4]


# ---- compression ----------------------------------------------------------------------------------------------
#
# permessage-deflate: a message is a run of deflate blocks that ends with an empty stored one, whose last four bytes are left out.
# What the two ends keep from one message to the next (the "context") is made when the first compressed message comes or goes, and
# dropped after each where no takeover was agreed: a connection that only waits has none.

_TAIL = b"\x00\x00\xff\xff"
_LAST_BLOCK = b"\x03\x00"       # an empty block that is the last: after it zlib must be at the end, and have nothing left over


@dataclasses.dataclass(frozen=True, slots=True)
class Deflate:
    """permessage-deflate (RFC 7692): what may be used, or what has been agreed upon. Immutable.

    server_max_window_bits, client_max_window_bits: how far back what that side sends may refer, 8 to 15 (2**bits bytes). zlib
    cannot compress with 8: a side that has to will send everything uncompressed.
    server_no_context_takeover, client_no_context_takeover: whether what that side sends never refers to the message before. It
    saves memory between messages, and compresses short ones badly.
    threshold: bytes below which a message goes uncompressed.

    Do not compress what holds a secret next to something that an attacker can choose: the length tells (CRIME).
    ValueError for a number of bits that is none, or a negative threshold.
    """

    server_max_window_bits: int = WINDOW_BITS
    client_max_window_bits: int = WINDOW_BITS
    server_no_context_takeover: bool = False
    client_no_context_takeover: bool = False
    threshold: int = COMPRESSION_THRESHOLD

    def __post_init__(self):
        for name in ("server_max_window_bits", "client_max_window_bits"):
            if type(getattr(self, name)) is not int or getattr(self, name) not in range(8, 16):
                raise ValueError(f"{name}={getattr(self, name)!r:.40}: 8 to 15")
        if self.threshold < 0:
            raise ValueError(f"threshold={self.threshold!r:.40}: bytes, 0 or more")

    def offer(self):
        """(client) The Sec-WebSocket-Extensions to send: str.

        Wishes for what the server sends are followed by an offer without them, as not every server can grant them: what it may
        use is then what it answers with.
        """
        ours = "client_max_window_bits" + ("" if self.client_max_window_bits == 15 else f"={self.client_max_window_bits}")
        if self.client_no_context_takeover:
            ours += "; client_no_context_takeover"
        wishes = "; server_no_context_takeover" if self.server_no_context_takeover else ""
        if self.server_max_window_bits < 15:
            wishes += f"; server_max_window_bits={self.server_max_window_bits}"
        plain = f"permessage-deflate; {ours}"
        return f"{plain}{wishes}, {plain}" if wishes else plain

    def negotiate(self, offers):
        """(server) Choose from a client's Sec-WebSocket-Extensions. -> (Deflate, the one to answer with), or (None, "").

        The first offer is taken that has no parameter that is unknown, repeated, or without a value it can have (RFC 7692 7.1);
        its limits and ours both hold. HandshakeError (400) if `offers` is no list of extensions.
        """
        for name, parameters in _parse_extensions(offers):
            if name != "permessage-deflate":
                continue
            asked, problem = _deflate_parameters(parameters, ask=True)
            if problem:
                continue
            client = 15                 # who does not offer client_max_window_bits must not be asked for it
            if "client_max_window_bits" in asked:
                client = min(self.client_max_window_bits, asked["client_max_window_bits"] or 15)
            agreed = Deflate(
                min(self.server_max_window_bits, asked.get("server_max_window_bits", 15)), client,
                self.server_no_context_takeover or "server_no_context_takeover" in asked,
                self.client_no_context_takeover or "client_no_context_takeover" in asked,
                self.threshold)
            answer = "permessage-deflate"
            for flag in ("server_no_context_takeover", "client_no_context_takeover"):
                answer += f"; {flag}" if getattr(agreed, flag) else ""
            if agreed.server_max_window_bits < 15 or "server_max_window_bits" in asked:
                answer += f"; server_max_window_bits={agreed.server_max_window_bits}"
            if agreed.client_max_window_bits < 15:
                answer += f"; client_max_window_bits={agreed.client_max_window_bits}"
            return agreed, answer
        return None, ""

    def check_answer(self, answer):
        """(client) What a server's Sec-WebSocket-Extensions has agreed to. -> Deflate, or None if it is empty.

        HandshakeError if it is no answer to offer(): another extension, one twice, a parameter that is unknown, repeated, without
        a value it can have, or beyond what was offered.
        """
        extensions = _parse_extensions(answer, status=502)
        if not extensions:
            return None
        problem = "is more than one extension" if len(extensions) > 1 else None
        [name, parameters], *_ = extensions
        if problem is None and name != "permessage-deflate":
            problem = "was not offered"
        if problem is None:
            given, problem = _deflate_parameters(parameters)
        if problem is None and given.get("client_max_window_bits", 0) > self.client_max_window_bits:
            problem = f"has a client_max_window_bits above the {self.client_max_window_bits} that were offered"
        if problem:
            raise HandshakeError(502, f"the server's Sec-WebSocket-Extensions {answer!r:.100} {problem}")
        return Deflate(given.get("server_max_window_bits", 15),
                       min(self.client_max_window_bits, given.get("client_max_window_bits", 15)),
                       "server_no_context_takeover" in given,
                       self.client_no_context_takeover or "client_no_context_takeover" in given, self.threshold)


_is_bits = re.compile("8|9|1[0-5]").fullmatch


def _deflate_parameters(parameters, ask=False):
    """({name: bits or None}, what is wrong with them or None). `ask`: an offer, where client_max_window_bits needs no value."""
    found = {}
    for name, value in parameters:
        if name in found:
            return found, f"has {name} twice"
        if name in ("server_no_context_takeover", "client_no_context_takeover"):
            if value is not None:
                return found, f"has a value for {name}, which takes none"
        elif name not in ("server_max_window_bits", "client_max_window_bits"):
            return found, f"has a parameter {name:.40} that permessage-deflate does not have"
        elif value is None:
            if not ask or name == "server_max_window_bits":
                return found, f"has no value for {name}"
        elif not _is_bits(value):
            return found, f"has {value:.40} for {name}, which is not 8 to 15"
        found[name] = int(value) if value else None
    return found, None


class _Compressor:
    """Compresses what we send."""

    __slots__ = ("_bits", "_takeover", "_zlib")

    def __init__(self, bits, takeover):
        self._bits, self._takeover, self._zlib = bits, takeover, None

    def compress(self, data, last):
        """The payload of a frame; `last`: of a message's last one. All of it can be inflated at once."""
        if self._zlib is None:
            self._zlib = zlib.compressobj(COMPRESSION_LEVEL, zlib.DEFLATED, -self._bits, MEM_LEVEL)
        packed = self._zlib.compress(data) + self._zlib.flush(zlib.Z_SYNC_FLUSH)
        if not last:
            return packed
        if not self._takeover:
            self._zlib = None
        return packed[:-4]


class _Inflater:
    """Inflates what the peer sends.

    A block may call itself the last one (BFINAL, RFC 7692 7.2.3.4): what follows begins anew, and refers to nothing before it, as
    zlib can neither send it otherwise nor read it. One for each frame is enough for whoever flushes that way; of an endless row
    of them each would cost a new decompressor.
    """

    __slots__ = ("_bits", "_takeover", "_zlib", "_held", "_again", "_may_end")

    def __init__(self, bits, takeover):
        self._bits, self._takeover, self._zlib = -bits, takeover, None
        self._held, self._again, self._may_end = b"", False, True

    def begin_frame(self):
        """Another frame begins."""
        self._may_end = True

    @property
    def busy(self):
        """Whether there is more to come of what was given already, by inflate(b"", limit)."""
        return self._again

    def inflate(self, data, limit):
        """At most `limit` bytes of what comes of `data`, after what is `busy`. RemoteProtocolError 1007."""
        data, parts = self._held + data if self._held else data, []
        self._held, self._again = b"", False
        while True:
            if self._zlib is None:
                self._zlib = zlib.decompressobj(self._bits)
            try:
                out = self._zlib.decompress(data, limit)
            except zlib.error as error:
                raise RemoteProtocolError(1007, f"a compressed message is corrupt ({error})") from None
            if not self._zlib.eof:
                self._held = self._zlib.unconsumed_tail
                self._again = len(out) == limit             # zlib may have more in hand, also without more input
                break
            if not self._may_end:
                raise RemoteProtocolError(1007, "a compressed message ends more than once in a frame")
            data, self._zlib, self._may_end = self._zlib.unused_data, None, False
            if not data:
                break
            parts.append(out)
            limit -= len(out)
            if not limit:
                self._held, self._again = data, True
                return b"".join(parts)
        return b"".join([*parts, out]) if parts else out

    def finish(self):
        """The message is complete, with _TAIL. RemoteProtocolError 1007 if the data break off, which zlib would not say."""
        probe, complete = self._zlib, False
        if probe is not None:
            if self._takeover:
                probe = probe.copy()                        # 0.4 µs
            try:
                complete = not probe.decompress(_LAST_BLOCK) and probe.eof and not probe.unused_data
            except zlib.error:
                pass
        if not complete:
            raise RemoteProtocolError(1007, "the data of a compressed message break off")
        if not self._takeover:
            self._zlib = None


# ---- handshake ------------------------------------------------------------------------------------------------
#
# RFC 6455 chapter 4, without I/O. Names of fields are compared in lower case; a value that may be a list can come in several
# lines, which are one list (RFC 9110 5.3); one that may not is refused if it comes twice.

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_is_token = re.compile(_TOKEN).fullmatch
_is_value = re.compile(r"[\t\x20-\x7e\x80-\xff]*+").fullmatch

# An element of a list of extensions, and the comma or the end after it; elements may be empty (RFC 9110 5.6.1). A quoted value
# has to be a token as well (RFC 6455 9.1), so there is nothing to escape in it.
_PARAMETER = re.compile(rf'[ \t]*+;[ \t]*+({_TOKEN})(?:[ \t]*+=[ \t]*+(?:({_TOKEN})|"({_TOKEN})"))?')
_NAME, _GAP = re.compile(rf"[ \t]*+({_TOKEN})"), re.compile(r"[ \t]*+(?:,|\Z)")

_status_line = re.compile(r"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*+))?").fullmatch
_field_line = re.compile(rf"({_TOKEN}):[ \t]*+([\t\x20-\x7e\x80-\xff]*+)").fullmatch
_is_target = re.compile(r"/[!$-;=?-~]*+").fullmatch
_origin = re.compile(r"([a-z][a-z0-9+.\-]*+)://(\*\.)?([^/?#@\s*,]++)").fullmatch

# What the handshake says by itself, or what would say something else about the message: not for headers= of anybody.
_OURS = frozenset(["host", "upgrade", "connection", "sec-websocket-key", "sec-websocket-version", "sec-websocket-accept",
                   "sec-websocket-protocol", "sec-websocket-extensions", "content-length", "transfer-encoding"])

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_PORTS = {"http": ":80", "https": ":443", "ws": ":80", "wss": ":443"}


def accept_key(key):
    """The Sec-WebSocket-Accept that answers a Sec-WebSocket-Key; both str (RFC 6455 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode("latin-1") + _GUID).digest()).decode("ascii")


def _new_key():
    """A Sec-WebSocket-Key: 16 bytes that nobody knows before."""
    return base64.b64encode(os.urandom(16)).decode("ascii")


def _is_key(key):
    """Whether it is base64 of 16 bytes, as one writes it."""
    try:
        data = base64.b64decode(key.encode("latin-1"), validate=True)
    except ValueError:
        return False
    return len(data) == 16 and base64.b64encode(data).decode("ascii") == key


def _values(pairs, name):
    """The values of all lines with this name (in lower case)."""
    return [value for other, value in pairs if other.lower() == name]


def _tokens(values):
    """The tokens of a list, given as the values of all its lines; None if something in it is no token."""
    elements = [element for value in values for part in value.split(",") if (element := part.strip(" \t"))]
    return elements if all(map(_is_token, elements)) else None


def _check_subprotocols(subprotocols):
    """Whether they can be offered, or chosen from: TypeError, ValueError."""
    if isinstance(subprotocols, (str, bytes)):
        raise TypeError(f'subprotocols={subprotocols!r:.60}: a list of them, like ["chat"]')
    for subprotocol in subprotocols:
        if not _is_token(subprotocol):
            raise ValueError(f"the subprotocol {subprotocol!r:.60} is no token")
    if len(set(subprotocols)) < len(subprotocols):
        raise ValueError(f"subprotocols={list(subprotocols)!r:.100}: each of them once")


def _check_headers(pairs, ours=False):
    """Whether headers can be: those of headers=, or `ours`. TypeError, ValueError."""
    for name, value in pairs:
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"the header {name!r:.60}: {value!r:.60}: name and value are str")
        if not ours and name.lower() in _OURS:
            raise ValueError(f"the header {name} is the handshake's own: it cannot be given")
        if not _is_token(name) or not _is_value(value):
            raise ValueError(f"the header {name!r:.60} has characters that none can have: controls, or beyond U+00FF")


def _further(headers):
    """Headers that are given besides the handshake's (pairs or a mapping) as a list of pairs. TypeError, ValueError."""
    pairs = list(headers.items() if hasattr(headers, "items") else headers)
    _check_headers(pairs)
    return pairs


def _parse_extensions(text, status=400):
    """A Sec-WebSocket-Extensions value. -> [(name, [(parameter, value or None)])]. HandshakeError with this status."""
    found, at = [], 0
    while at < len(text):
        if name := _NAME.match(text, at):
            at, parameters = name.end(), []
            while parameter := _PARAMETER.match(text, at):
                parameters.append((parameter[1], parameter[2] or parameter[3]))
                at = parameter.end()
            found.append((name[1], parameters))
        gap = _GAP.match(text, at)
        if gap is None:
            raise HandshakeError(status, f"Sec-WebSocket-Extensions: {text!r:.100} is no list of them, from character {at} on")
        at = gap.end()
    return found


def _authority(scheme, text):
    """host[:port] in lower case, without the port that the scheme has anyway."""
    return text.lower().removesuffix(_PORTS.get(scheme, " "))


def _check_origins(origins):
    """Whether `origins` of accept() make sense: ValueError or TypeError."""
    if isinstance(origins, (str, bytes)):
        raise TypeError(f'origins={origins!r:.60}: a list of them, like ["https://example.com"]')
    for origin in origins or ():
        if origin not in ("*", "null") and not _origin(origin):
            raise ValueError(f'origins: {origin!r:.60} is not like "https://example.com", "https://*.example.com", "null" or "*"')


def _origin_problem(values, hosts, origins):
    """Why a request must not come from there: None, or a sentence. `values`, `hosts`: of its Origin and Host lines.

    A browser lets any page open a WebSocket to anywhere, with the cookies of there; but it says where the page is from. So a page
    from another origin than Host is refused unless `origins` lists it: "https://example.com", "https://*.example.com" for all
    hosts below it, "null" (a page without an origin: a file, a sandbox), "*" for all. With `origins` the list alone counts. No
    Origin at all is let pass: that is no browser, and carries nobody else's cookies. The scheme is not compared with our own,
    which a proxy before us may have changed.
    """
    if not values or (origins is not None and "*" in origins):
        return None
    if len(values) > 1:
        return "there is more than one Origin"
    origin = values[0].lower()
    if origins is None:
        found = _origin(origin)
        if found and not found[2] and len(hosts) == 1 and _authority(found[1], found[3]) == _authority(found[1], hosts[0]):
            return None
    elif origin == "null":
        if "null" in origins:
            return None
    elif found := _origin(origin):
        host = _authority(found[1], found[3])
        for allowed in origins:
            other = _origin(allowed.lower())
            if other and other[1] == found[1] and not found[2]:
                name = _authority(other[1], other[3])
                if host.endswith(f".{name}") if other[2] else host == name:
                    return None
    return f"pages from {values[0]!r:.100} may not connect here; origins= of accept() says which may"


def _check_request(method, version, pairs, *, subprotocols=(), origins=None, host="", deflate=None):
    """(server) Whether a request opens a WebSocket. -> (pairs of the answer's headers, but for Upgrade and Connection, the
    subprotocol or None, a Deflate or None). HandshakeError 400, 403, 405, 426.

    `pairs`: the request's headers; `host`: what it is for, "" for what Host says; `subprotocols`: ours, best first; `deflate`:
    a Deflate, or None for none.
    """
    def values(name):
        return _values(pairs, name)
    if method != "GET":
        raise HandshakeError(405, f"a WebSocket is opened by GET, and not by {method:.20}", [("Allow", "GET")])
    switch = [("Upgrade", "websocket"), ("Connection", "Upgrade")]
    upgrade, connection = _tokens(values("upgrade")) or (), _tokens(values("connection")) or ()
    if version == "1.0" or "websocket" not in map(str.lower, upgrade) or "upgrade" not in map(str.lower, connection):
        raise HandshakeError(426, "WebSocket is spoken here: it needs HTTP/1.1, Connection: Upgrade, Upgrade: websocket", switch)
    if values("sec-websocket-version") != ["13"]:
        raise HandshakeError(426, f"Sec-WebSocket-Version: {', '.join(values('sec-websocket-version'))!r:.40}; 13 is spoken here",
                             [("Sec-WebSocket-Version", "13"), *switch])
    keys = values("sec-websocket-key")
    if len(keys) != 1 or not _is_key(keys[0]):
        raise HandshakeError(400, f"Sec-WebSocket-Key: {', '.join(keys)!r:.60} is not base64 of 16 bytes, once")
    if values("transfer-encoding") or any(length != "0" for length in values("content-length")):
        raise HandshakeError(400, "a request that opens a WebSocket has no content")
    if problem := _origin_problem(values("origin"), [host] if host else values("host"), origins):
        raise HandshakeError(403, problem)
    asked = _tokens(values("sec-websocket-protocol"))
    if asked is None or len(set(asked)) < len(asked):
        raise HandshakeError(400, "Sec-WebSocket-Protocol is a list of tokens, each of them once")
    answer = [("Sec-WebSocket-Accept", accept_key(keys[0]))]
    subprotocol = next((name for name in subprotocols if name in asked), None)
    if subprotocol is not None:
        answer.append(("Sec-WebSocket-Protocol", subprotocol))
    agreed, extensions = (deflate or Deflate()).negotiate(", ".join(values("sec-websocket-extensions")))
    if agreed is None or deflate is None:
        return answer, subprotocol, None
    return [*answer, ("Sec-WebSocket-Extensions", extensions)], subprotocol, agreed


def _request_head(target, host, key, *, pairs=(), origin=None, subprotocols=(), deflate=None):
    """(client) The bytes that ask for a WebSocket. ValueError, TypeError for what HTTP does not have, or the handshake says.

    `target`: path and query; `host`: host[:port]; `pairs`: further headers.
    """
    if not _is_target(target):
        raise ValueError(f"{target!r:.100} is no path of a URL: encode what is not ASCII, and leave #fragments out")
    _check_subprotocols(subprotocols)
    fields = [("Host", host), ("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Key", key),
              ("Sec-WebSocket-Version", "13")]
    if origin is not None:
        fields.append(("Origin", origin))
    if subprotocols:
        fields.append(("Sec-WebSocket-Protocol", ", ".join(subprotocols)))
    if deflate is not None:
        fields.append(("Sec-WebSocket-Extensions", deflate.offer()))
    _check_headers(fields, ours=True)
    fields += _further(pairs)
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return f"GET {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")


def _response_head(buffer, limit=MAX_ANSWER_HEAD):
    """(client) The head of an answer at the beginning of `buffer`, bytes or a bytearray: None while it is not complete, else
    (status, reason, headers: pairs, bytes of the head). `limit`: bytes it may have. HandshakeError (502) for what is no HTTP.
    """
    if not buffer.startswith(b"HTTP/1."[:len(buffer)]):
        raise _no_answer(f"{bytes(buffer[:40])!r} is no HTTP/1.1: is that an HTTP server? Does it want TLS (wss)?")
    end = buffer.find(b"\r\n\r\n", 0, limit)
    if end < 0:
        if len(buffer) >= limit:
            raise _no_answer(f"the head of an answer with more than {limit} bytes")
        return None
    lines = buffer[:end].decode("latin-1").split("\r\n")
    found = _status_line(lines[0])
    if found is None:
        raise _no_answer(f"{lines[0]!r:.60} is no status line")
    if len(lines) > MAX_FIELDS + 1 or max(map(len, lines)) > MAX_FIELD_LINE:
        raise _no_answer(f"an answer with more than {MAX_FIELDS} lines, or one of more than {MAX_FIELD_LINE} bytes")
    pairs = []
    for line in lines[1:]:
        field = _field_line(line)
        if field is None:
            raise _no_answer(f"{line!r:.60} is no header line")
        pairs.append((field[1], field[2].rstrip(" \t")))
    if found[2] == "101" and found[1] == "0":
        raise _no_answer("an answer by HTTP/1.0, which cannot switch protocols", pairs)
    return int(found[2]), found[3] or "", pairs, end + 4


def _check_response(status, pairs, key, *, subprotocols=(), deflate=None):
    """(client) Whether an answer opens the WebSocket that was asked for. -> (the subprotocol or None, a Deflate or None).

    HandshakeError, with the `status` that came, also where a 101 is wrong in itself.
    """
    problem = None
    if status != 101:
        problem = f"the server has answered with {status}, and not with 101"
    elif [value.lower() for value in _values(pairs, "upgrade")] != ["websocket"]:
        problem = "the answer has no Upgrade: websocket"
    elif "upgrade" not in map(str.lower, _tokens(_values(pairs, "connection")) or ()):
        problem = "the answer has no Connection: Upgrade"
    elif _values(pairs, "sec-websocket-accept") != [accept_key(key)]:
        problem = "the answer's Sec-WebSocket-Accept is not that of our key: it is of another request, or of no WebSocket server"
    chosen = _values(pairs, "sec-websocket-protocol")
    if problem is None and chosen and (len(chosen) > 1 or chosen[0] not in subprotocols):
        problem = f"the server has chosen the subprotocol {', '.join(chosen)!r:.60}, and was offered {list(subprotocols)!r:.100}"
    extensions = ", ".join(_values(pairs, "sec-websocket-extensions"))
    if problem is None and extensions and deflate is None:
        problem = f"the server has chosen the extension {extensions!r:.60}, and was offered none"
    if problem:
        raise HandshakeError(status, problem, pairs)
    try:
        agreed = deflate and deflate.check_answer(extensions)
    except HandshakeError as error:
        raise HandshakeError(status, str(error), pairs) from None
    return chosen[0] if chosen else None, agreed


# ---- codec ----------------------------------------------------------------------------------------------------
#
# RFC 6455 chapter 5 without I/O. A frame is read in one of two ways. The short way is for a whole message in one frame,
# uncompressed, that is all there: it only ever *accepts*, and leaves what it does not like to the long way, which takes frames as
# their bytes come and is the one place that says what is wrong.
#
#     C1  an error depends on the bytes up to the one that makes it one, never on how many more are there: a text fails at the
#         first byte that no UTF-8 can have there, also in a frame that is not complete. (But zlib says "corrupt" when it likes,
#         and of what refers beyond the agreed window only where it has forgotten that; a window of 32 KiB always would forget
#         nothing, and take 28 KiB more than the usual one for each connection.)
#     C2  what is before an error is delivered first: one event at a time, so the answer to message N can leave before N + 1 fails
#     C3  every byte is looked at a bounded number of times, and at most the message under way is held, in about twice its size
#     C4  of a compressed message never more is inflated than max_message and one byte, or than a piece
#     C5  the peer can make no message longer than max_message, and no endless one of frames or blocks without data
#
# Both sides' states change by one table, _TRANSITIONS: (whose state, state, what happens) -> state. Nothing else sets them.

# The states of each side. (CLOSED is a sign of next_event().)
OPEN, CLOSING, SHUT, FAILED = "OPEN", "CLOSING", "CLOSED", "FAILED"

# What happens: a message begins or a further piece of it follows, a Ping or Pong, a Close, the end of the bytes, an error; and
# the other side's being through.
_MESSAGE, _FURTHER, _CONTROL, _CLOSE, _END, _FAIL, _OTHER = (
    "message", "further piece", "ping or pong", "close", "end", "error", "the other side's end")

_TRANSITIONS = {
    "our": {
        OPEN: {_MESSAGE: OPEN, _FURTHER: OPEN, _CONTROL: OPEN, _CLOSE: SHUT, _OTHER: CLOSING},
        # The peer has closed, ended, or failed. RFC 6455 5.5.1: a message under way may be finished before the Close is answered.
        CLOSING: {_FURTHER: CLOSING, _CONTROL: CLOSING, _CLOSE: SHUT, _OTHER: CLOSING},
        SHUT: {_OTHER: SHUT},
    },
    "their": {
        OPEN: {_MESSAGE: OPEN, _FURTHER: OPEN, _CONTROL: OPEN, _CLOSE: SHUT, _END: SHUT, _FAIL: FAILED, _OTHER: CLOSING},
        # We have closed; what they sent before they saw that still comes.
        CLOSING: {_MESSAGE: CLOSING, _FURTHER: CLOSING, _CONTROL: CLOSING, _CLOSE: SHUT, _END: SHUT, _FAIL: FAILED},
        SHUT: {_OTHER: SHUT},
        FAILED: {_OTHER: FAILED},
    },
}


class _Sign:
    """A thing that is only itself."""

    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


# Of next_event(): give it more by receive_data() or receive_end(); nothing more will come.
NEED_DATA, CLOSED = _Sign("NEED_DATA"), _Sign("CLOSED")

# Of it where a WebSocket asks, after _STEPS heads and contents of frames (0.3 ms) without an event: call it again, and let others
# run before. One read may have brought ten thousand fragments of a byte.
_MORE, _STEPS = _Sign("MORE"), 200


class Piece(typing.NamedTuple):
    """Some of a message: `data` (str of a text, else bytes), and whether it is the `first` and the `last` piece of it.

    Pieces are as they came, which says nothing about frames; text is not cut inside a character. Only a last piece can be empty.
    """

    data: str | bytes
    first: bool
    last: bool


class Ping(typing.NamedTuple):
    """The peer asks whether we are there: send_pong(payload) answers it. `payload`: at most 125 bytes."""

    payload: bytes = b""


class Pong(typing.NamedTuple):
    """The peer answers the ping with this `payload`, or says by itself that it is there."""

    payload: bytes = b""


class Close(typing.NamedTuple):
    """The peer sends nothing more: send_close(code, reason) answers it, unless ours is out. `code`: 1005 if it gave none."""

    code: int = 1005
    reason: str = ""


_TEXT, _BINARY, _CLOSE_FRAME, _PING, _PONG = 0x81, 0x82, 0x88, 0x89, 0x8a        # the first byte of a whole one, with FIN
_FIN, _RSV1 = 0x80, 0x40
_NAMES = {0: "continuation", 1: "text", 2: "binary", 8: "close", 9: "ping", 10: "pong"}

# The codes a Close may have on the wire (RFC 6455 7.4, the IANA's registry); the others are reserved, or for within a program.
_CODES = frozenset([1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)])


def _frame(kind, data, masks=False):
    """The bytes of a frame that begins with this byte."""
    size, bit = len(data), 0x80 if masks else 0
    if size < 126:
        head = bytes((kind, bit | size))
    elif size < 2**16:
        head = bytes((kind, bit | 126, size >> 8, size & 255))
    else:
        head = bytes((kind, bit | 127)) + size.to_bytes(8, "big")
    if not masks:
        return head + data
    mask = _new_mask()
    return b"".join((head, mask, _masked(data, mask)))


def _encoded(message):
    """(the kind of frame, bytes) of a message to send. TypeError if it is none, LocalProtocolError if it is no text."""
    if isinstance(message, str):
        try:
            return _TEXT, message.encode()
        except UnicodeEncodeError as error:
            raise LocalProtocolError(f"a text with half of a character (a surrogate) at {error.start}: UTF-8 has none. "
                                     "Encode it your own way, and send bytes") from None
    if type(message) is bytes:
        return _BINARY, message
    try:
        return _BINARY, memoryview(message).tobytes()
    except TypeError:
        raise TypeError(f"{message!r:.60} is no message: str for text, bytes (or bytearray, memoryview) for binary") from None


def encode_message(message):
    """The bytes of a whole message as a server without deflate sends it: the same for every client, so encoded once for many.

    TypeError, LocalProtocolError: as send_message().
    """
    return _frame(*_encoded(message))


def _decode_close(payload):
    """The Close of a frame's payload. RemoteProtocolError 1002, 1007."""
    if not payload:
        return Close()
    code = _from_bytes(payload[:2], "big")
    if code not in _CODES:                          # nor is a single byte
        raise RemoteProtocolError(1002, f"a Close with the code {code}, which may not be sent")
    try:
        return Close(code, str(payload[2:], "utf-8"))
    except UnicodeDecodeError:
        raise RemoteProtocolError(1007, f"a Close whose reason is no UTF-8: {bytes(payload[2:])!r:.60}") from None


def _check_limits(max_message, max_frame, max_queue=1):
    """ValueError, TypeError."""
    if max_message < 0 or (max_frame is not None and max_frame < 0):
        raise ValueError(f"max_message={max_message!r:.40}, max_frame={max_frame!r:.40}: bytes, 0 or more")
    if max_queue < 1:
        raise ValueError(f"max_queue={max_queue!r:.40}: messages, 1 or more")


class _Message:
    """A message of which some has come: bytes, already unmasked and inflated, become text, and one event or many."""

    __slots__ = ("text", "packed", "pieces", "size", "inflated", "empty_frames", "bad", "_store", "_joined", "_rest", "_begun")

    def __init__(self, text, packed, pieces):
        self.text, self.packed, self.pieces = text, packed, pieces
        self.size = self.inflated = 0       # bytes of its frames, as their heads have said; and what has come of them
        self.empty_frames = 0       # in a row
        self.bad = None             # the error to raise, when what was before it has been delivered
        self._store, self._joined = None if pieces else [] if text else bytearray(), 0
        self._rest = b""            # of a text: the beginning of a character, at most three bytes
        self._begun = False

    def take(self, data, last):
        """Bytes, and whether they are the last. -> an event, or None."""
        if self.text:
            data = self._decode(data, last)
        if not self.pieces:
            if self.text:
                self._add(data)
            else:
                self._store += data
            if not last or self.bad:
                return None
            return "".join(self._store) if self.text else bytes(self._store)
        if not data and (self.bad or not last):
            return None
        first, self._begun = not self._begun, True
        return Piece(data if self.text else bytes(data), first, last and self.bad is None)

    def _add(self, text):
        """Keep some text. Short ones are joined by the hundred: each by itself takes 50 bytes more. (io.StringIO takes 8 times as
        long for two long ones, and on CPython 3.11 keeps up to 100,000 short ones as they are.)
        """
        self._store.append(text)
        if len(self._store) - self._joined > 256:
            self._store[self._joined:] = ["".join(self._store[self._joined:])]
            self._joined += 1

    def _decode(self, data, last):
        """The characters that are complete. What is wrong with the others becomes `bad`."""
        if self._rest:
            data = self._rest + data
        try:
            text, used = codecs.utf_8_decode(data, "strict", last)
        except UnicodeDecodeError as error:
            text, used, wrong = str(data[:error.start], "utf-8"), error.start, error.reason
        else:
            self._rest = rest = data[used:]
            if len(rest) < 2 or rest[0] != 0xed or rest[1] < 0xa0:
                return text
            wrong = "surrogates not allowed"        # which utf_8_decode() would say one byte later
        self.bad = RemoteProtocolError(1007, f"a text that is no UTF-8: {bytes(data[used:used + 4])!r} ({wrong})")
        return text


class _Incoming:
    """What the peer sends: bytes to events."""

    __slots__ = ("role", "deflate", "max_frame", "pieces", "our_state", "their_state", "close_code", "close_reason",
                 "_buffer", "_at", "_ended", "_error", "_max_message", "_limit", "_bit", "_head",
                 "_message", "_left", "_final", "_mask", "_inflater", "_compressor", "_sending", "_steps")

    def receive_data(self, data):
        """What the peer has sent next, bytes-like, at least one. Call next_event() until it gives NEED_DATA or CLOSED.

        What comes after a Close or an error is dropped. LocalProtocolError for nothing, and after receive_end().
        """
        if type(data) is not bytes:
            data = memoryview(data).tobytes()
        if self._ended or not data:
            raise LocalProtocolError("receive_data() after receive_end()" if self._ended else
                                     "receive_data() without data; receive_end() says that there is no more")
        if self._at == len(self._buffer):
            self._buffer, self._at = data, 0
        else:
            if type(self._buffer) is bytes:             # what is appended to is a bytearray: bytes would be copied each time
                self._buffer = bytearray(self._buffer)
            if self._at:
                del self._buffer[:self._at]
                self._at = 0
            self._buffer += data
        if self.their_state is SHUT or self.their_state is FAILED:
            self._buffer, self._at = b"", 0

    def receive_end(self):
        """The peer will send no more."""
        self._ended = True

    @property
    def max_message(self):
        """Bytes of a message that the peer may send; it can be changed at any time."""
        return self._max_message

    @max_message.setter
    def max_message(self, most):
        self._max_message = most
        self._limit = most if self.max_frame is None else min(self.max_frame, most)

    def next_event(self):
        """The next event of what has been received: a message (str or bytes), Piece, Ping, Pong, Close; or NEED_DATA, CLOSED.

        RemoteProtocolError: the peer does not speak WebSocket, or too much of it. From then on each call raises it.
        CLOSED without a Close before it: the peer has ended without one, and close_code is 1006.
        """
        # The short way: 0.7 µs for a text of 100 bytes from a client, with receive_data(); the long way takes 2.0.
        buffer, at = self._buffer, self._at
        if self._message is None and len(buffer) - at > 5 and not self.pieces:
            kind, size, start = buffer[at], buffer[at + 1] - self._bit, at + self._head
            if size > 125:
                size = buffer[at + 2] << 8 | buffer[at + 3] if size == 126 else -1
                start += 2
                if size < 126:
                    size = -1
            end = start + size
            if 0 <= size <= self._limit and end <= len(buffer) and (kind == _TEXT or kind == _BINARY):
                data = buffer[start:end]
                if self._bit:
                    mask = buffer[start - 4:start]
                    if size < _TRANSLATED:              # _masked(), without the call
                        data = (_from_bytes(data, "little") ^ _from_bytes((mask * (size + 3 >> 2))[:size], "little")
                                ).to_bytes(size, "little")
                    else:
                        data = _masked(data, mask)
                try:
                    message = str(data, "utf-8") if kind == _TEXT else data if type(data) is bytes else bytes(data)
                except UnicodeDecodeError:
                    pass
                else:
                    if end == len(buffer):
                        self._buffer, self._at = b"", 0     # what has been read is not kept
                    else:
                        self._at = end
                    return message
        return self._long_way()

    def _long_way(self):
        if self._error is not None:
            raise self._error.with_traceback(None)
        left = self._steps
        try:
            while self.their_state is not SHUT:
                event = self._frame_begins() if self._left < 0 else self._frame_goes_on()
                if event is not None:
                    if self._at == len(self._buffer):
                        self._buffer, self._at = b"", 0
                    return event
                left -= 1
                if not left:
                    return _MORE
            return CLOSED
        except RemoteProtocolError as error:
            self._error, self.close_code, self.close_reason = error, error.code, str(error)
            self._their(_FAIL)
            raise

    def _their(self, what):
        """A step of theirs; also of ours, if it was their last."""
        self.their_state = _TRANSITIONS["their"][self.their_state][what]
        if self.their_state is SHUT or self.their_state is FAILED:
            self.our_state = _TRANSITIONS["our"][self.our_state][_OTHER]
            self._buffer, self._at, self._message, self._inflater = b"", 0, None, None

    def _more(self):
        """NEED_DATA, unless there will be none."""
        if not self._ended:
            return NEED_DATA
        self.close_code, self.close_reason = 1006, ""
        self._their(_END)
        return CLOSED

    def _frame_begins(self):
        """Read a frame's head. -> an event, or None if it has begun."""
        buffer, at = self._buffer, self._at
        have = len(buffer) - at
        if not have:
            return self._more()
        first = buffer[at]
        kind, control = first & 15, first & 8
        self._check_kind(first, kind, control)
        if have < 2:
            return self._more()
        size, start = buffer[at + 1] - self._bit, at + 2
        if not 0 <= size < 128:
            raise RemoteProtocolError(1002, "a frame that is masked, and a server's is not" if size > 127 else
                                      "a frame that is not masked, and a client's is")
        if size > 125:
            if control:
                raise RemoteProtocolError(1002, f"a {_NAMES[kind]} of more than 125 bytes")
            start += 2 if size == 126 else 8
            if len(buffer) < start:
                return self._more()
            size, shortest = _from_bytes(buffer[at + 2:start], "big"), 126 if size == 126 else 2**16
            if not shortest <= size < 2**63:
                raise RemoteProtocolError(1002, f"a frame whose length, {size}, is not written in the shortest way" if
                                          size < shortest else "a frame whose length has its highest bit set")
        if not control:
            self._check_size(kind, size, first & _RSV1)
        mask = None
        if self._bit:
            start += 4
            mask = bytes(buffer[start - 4:start])
        if len(buffer) < start + (size if control else 0):
            return self._more()
        if control:
            return self._take_control(kind, start, start + size, mask)
        self._at, self._left, self._final, self._mask = start, size, first & _FIN, mask
        self._take_head(kind, size, first)
        return None

    def _check_kind(self, first, kind, control):
        """The first byte of a frame: its bits and its opcode, at this place."""
        if kind not in _NAMES:
            raise RemoteProtocolError(1002, f"a frame with the opcode {kind}, which means nothing")
        if first & 0x70 and (first & 0x30 or control or not kind or self._inflater is None):
            raise RemoteProtocolError(1002, f"a {_NAMES[kind]} with reserved bits ({first >> 4 & 7:03b}) that mean nothing here")
        if control:
            if not first & _FIN:
                raise RemoteProtocolError(1002, f"a {_NAMES[kind]} in fragments")
        elif (kind == 0) != (self._message is not None):
            raise RemoteProtocolError(1002, "a continuation, and nothing to continue" if kind == 0 else
                                      f"a {_NAMES[kind]} frame in the middle of a message")

    def _check_size(self, kind, size, packed):
        """The length of a frame of data, before its data come."""
        if self.max_frame is not None and size > self.max_frame:
            raise RemoteProtocolError(1009, f"a frame of {size} bytes; {self.max_frame} are allowed (max_frame=)")
        message = self._message
        if self.pieces if message is None else message.pieces:
            return
        most, before = self.max_message, 0
        if message is not None:
            before, packed = message.size, message.packed
        if packed:
            most = _PACKED_TIMES * most + _PACKED_MORE
        if before + size > most:
            raise RemoteProtocolError(1009, f"a message of {before + size} bytes{' compressed' if packed else ''}; {most} "
                                            "are allowed (max_message=)")

    def _take_control(self, kind, start, end, mask):
        """A control frame that is complete. -> its event."""
        payload = bytes(self._buffer[start:end])
        if mask:
            payload = _masked(payload, mask)
        if kind == 8:
            close = _decode_close(payload)
            self.close_code, self.close_reason = close
            self._their(_CLOSE)
            return close
        self._at = end
        self._their(_CONTROL)
        return Ping(payload) if kind == 9 else Pong(payload)

    def _take_head(self, kind, size, first):
        """A frame of data begins."""
        self._their(_FURTHER if kind == 0 else _MESSAGE)
        message = self._message
        if message is None:
            message = self._message = _Message(kind == 1, bool(first & _RSV1), self.pieces)
        message.size += size
        if message.packed:
            self._inflater.begin_frame()
        message.empty_frames = 0 if size else message.empty_frames + 1
        if message.empty_frames > MAX_EMPTY_FRAGMENTS:
            raise RemoteProtocolError(1008, f"more than {MAX_EMPTY_FRAGMENTS} fragments without data, one after the other")

    def _frame_goes_on(self):
        """Take what there is of a frame's data. -> an event, or None if the frame ends, or nothing comes of it."""
        message = self._message
        if message.bad:
            raise message.bad
        if message.packed:
            return self._inflate(message)
        data = self._take_data(self._left)
        if not data and self._left:
            return self._more()
        event = message.take(data, not self._left and self._final)
        return self._frame_ends(message, event, not self._left)

    def _take_data(self, most):
        """At most so many bytes of the frame, unmasked."""
        at, mask = self._at, self._mask
        data = self._buffer[at:at + most] if at or most < len(self._buffer) else self._buffer
        size = len(data)
        self._at, self._left = at + size, self._left - size
        if mask is None or not size:
            return data
        if size & 3:
            turn = size & 3
            self._mask = mask[turn:] + mask[:turn]
        return _masked(data, mask)

    def _frame_ends(self, message, event, ends):
        """After some data, of which an event has come or None; `ends`: the frame is complete. Raises what is wrong, once due."""
        if message.bad:
            if event is None:
                raise message.bad
        elif ends:
            self._left = -1
            if self._final:
                self._message = None
        return event

    def _inflate(self, message):
        """_frame_goes_on() of a compressed one."""
        inflater, data = self._inflater, b""
        if not inflater.busy:
            data = self._take_data(min(self._left, DEFLATED_PIECE))
            if not data and self._left:
                return self._more()
            if not self._left and self._final:
                data = data + _TAIL
        most = max(0, self.max_message - message.inflated)
        out = inflater.inflate(data, INFLATED_PIECE if message.pieces else most + 1)
        message.inflated += len(out)
        over = len(out) > most and not message.pieces
        ends = not self._left and not inflater.busy
        if ends and self._final and not over:
            inflater.finish()
        event = message.take(out[:most] if over else out, ends and self._final and not over)
        if over and not message.bad:
            raise RemoteProtocolError(1009, f"a message of more than {self.max_message} bytes once inflated (max_message=)")
        return self._frame_ends(message, event, ends)


class WebSocketConnection(_Incoming):
    """One end of a WebSocket after its handshake, without the socket. `role`: "server" or "client".

    deflate: the Deflate that the handshake has agreed upon; None: nothing is compressed.
    max_message: bytes of a message that the peer may send, inflated; beyond it 1009. A text counts as UTF-8.
    max_frame: bytes of one frame's payload; None: as many as a message may have.
    pieces: an attribute, looked at where a message begins: False, and messages come whole; True, and they come as Piece after
    Piece, of any length: max_message does not count for them, and what is held is what one receive_data() has brought.

    our_state, their_state: "OPEN"; "CLOSING" when the other side has closed; "CLOSED" when that side has; "FAILED" of them, after
    a RemoteProtocolError. close_code, close_reason: None and "" until their side is through; then what their Close says, 1006 if
    they ended without one, or the code of the error. ValueError for arguments that make no sense.
    """

    __slots__ = ()

    def __init__(self, role, *, deflate=None, max_message=MAX_MESSAGE, max_frame=None):
        if role not in ("server", "client"):
            raise ValueError(f'role={role!r:.40}: "server" or "client"')
        _check_limits(max_message, max_frame)
        server = role == "server"
        self.role, self.deflate, self.max_frame, self.pieces, self.max_message = role, deflate, max_frame, False, max_message
        self.our_state = self.their_state = OPEN
        self.close_code, self.close_reason = None, ""
        self._buffer, self._at, self._ended, self._error = b"", 0, False, None
        self._bit, self._head = (128, 6) if server else (0, 2)         # of what comes: masked or not, bytes of a short head
        self._message = self._mask = self._inflater = self._compressor = self._sending = None
        self._left, self._final = -1, 0                                 # -1: between two frames of data
        self._steps = -1                                                # without end
        if deflate is not None:
            servers = deflate.server_max_window_bits, not deflate.server_no_context_takeover
            clients = deflate.client_max_window_bits, not deflate.client_no_context_takeover
            ours, theirs = (servers, clients) if server else (clients, servers)
            self._inflater = _Inflater(*theirs)
            if ours[0] > 8:
                self._compressor = _Compressor(*ours)

    def send_message(self, message):
        """A whole message: the bytes to write. str: a text; bytes-like: binary.

        LocalProtocolError after a Close of either side, in the middle of another message, for half a character (a surrogate).
        """
        if self.our_state is not OPEN or self._sending is not None:        # (the table has OPEN: it stays so)
            self._our(_MESSAGE)
        kind, data = (_BINARY, message) if type(message) is bytes else _encoded(message)
        if self._compressor is not None and len(data) >= self.deflate.threshold and data:
            return _frame(kind | _RSV1, self._compressor.compress(data, True), not self._bit)
        return _frame(kind, data, not self._bit)

    def send_piece(self, data, first, last):
        """A piece of a message, the `first` of it, the `last`, or both: the bytes to write. All are str, or all are bytes-like.

        Where compression was agreed they are compressed, whatever their length, and each can be read when it has come.
        LocalProtocolError as send_message(), and for a piece in the wrong place or of the other type.
        """
        kind, data = _encoded(data)
        if not first and (self._sending is None or self._sending[0] != kind):
            raise LocalProtocolError("a further piece, and no message has begun: its first one needs first=True" if
                                     self._sending is None else "a message is text (str) or binary (bytes), and not both")
        self._our(_MESSAGE if first else _FURTHER)
        packed = self._sending[1] if not first else self._compressor is not None
        bits = (kind if first else 0x80) ^ (0 if last else _FIN)
        if packed:
            data = self._compressor.compress(data, last)
            bits |= _RSV1 if first else 0
        self._sending = None if last else (kind, packed)
        return _frame(bits, data, not self._bit)

    def send_ping(self, payload=b""):
        """A Ping: the bytes to write, also between two pieces. `payload`: bytes, at most 125; it comes back in the Pong."""
        return self._send_control(_PING, payload)

    def send_pong(self, payload=b""):
        """A Pong: the bytes to write. With the `payload` of a Ping it answers that, and those that came before."""
        return self._send_control(_PONG, payload)

    def send_close(self, code=1000, reason=""):
        """A Close: the bytes to write. Nothing may be sent after it; what the peer still sends is received until its own Close.

        It may come in the middle of a message, which then remains incomplete. `code`: 1000 to 1003, 1007 to 1014, 3000 to 4999;
        or 1005 for none. `reason`: at most 123 bytes of UTF-8. LocalProtocolError for others, and for a second Close.
        """
        if not isinstance(code, int) or code != 1005 and code not in _CODES:
            raise LocalProtocolError(f"the code {code!r:.40} for a Close: 1000 to 1003, 1007 to 1014, 3000 to 4999 (from 4000 on "
                                     "yours); 1005 for none")
        if not isinstance(reason, str):
            raise TypeError(f"reason={reason!r:.60}: give a str")
        reason = _encoded(reason)[1]
        if len(reason) > 123 or (reason and code == 1005):
            raise LocalProtocolError(f"a reason of {len(reason)} bytes; at most 123, and none without a code")
        self._our(_CLOSE)
        if self.their_state is OPEN:
            self.their_state = _TRANSITIONS["their"][OPEN][_OTHER]
        return _frame(_CLOSE_FRAME, b"" if code == 1005 else code.to_bytes(2, "big") + reason, not self._bit)

    def send_failure(self):
        """After a RemoteProtocolError: the Close that tells the peer, the bytes to write; b"" if ours has been sent already."""
        if self._error is None:
            raise LocalProtocolError("send_failure() without a RemoteProtocolError; send_close() is for the rest")
        if self.our_state is SHUT:
            return b""
        reason = str(self._error).encode("utf-8", "replace")[:123].decode("utf-8", "ignore")
        return self.send_close(self._error.code, reason)

    def _send_control(self, kind, payload):
        payload = memoryview(payload).tobytes()
        if len(payload) > 125:
            raise LocalProtocolError(f"a {_NAMES[kind & 15]} with {len(payload)} bytes; at most 125")
        self._our(_CONTROL)
        return _frame(kind, payload, not self._bit)

    def _our(self, what):
        """A step of ours, or LocalProtocolError."""
        state = _TRANSITIONS["our"][self.our_state].get(what)
        if state is None:
            raise LocalProtocolError(f"no {what} may be sent any more: " + (
                "our Close has been sent" if self.our_state is SHUT else
                f"the peer is through ({self.close_code} {self.close_reason})"))
        if what is _MESSAGE and self._sending is not None:
            raise LocalProtocolError("another message is under way: its last piece needs last=True")
        self.our_state = state


# ---- the WebSocket --------------------------------------------------------------------------------------------
#
# Who reads? Whoever waits in receive() reads the socket itself: there is no task that reads ahead, no queue in between, no switch
# from one to the other. A handler that does not receive, because it computes, waits for something else, or only sends, would
# leave nobody to answer a Ping or to see the Close. So the sweep, which looks at each WebSocket of a kernel twice a second, has a
# task read for it from the second look on, into a short queue; the next receive() takes what is there, ends that task, and reads
# itself again. An idle connection has no task but its handler's, and no timer.
#
#     E1  one at a time reads, and asks the codec: who receives (`_receiving`), or the task in the background (`_background`)
#     E2  what is sent are whole frames, in the order in which the codec has made them. What the system does not take at once is
#         kept in `_unsent`, and one task (_flush) sends it: a task that is cancelled while it sends leaves no half of a frame
#     E3  `_ready` only while send() may write at once: open, nothing kept, no fragmented message under way, one worker;
#         `_special` unless receive() may read at once: nothing queued, nobody in the background, whole messages, one worker
#     E4  what the peer can make us wait for has an end: a Ping or a Close without an answer, a peer that does not read: there is
#         a Ping in what is kept for it, at the latest when the next one is due

# Seconds between two looks at all WebSockets of a kernel: how late a deadline may be. Shorter where ping_interval= wants it.
SWEEP = 0.5

# Seconds between Pings, and without any sign of life after one: `websockets` has the same. Proxies cut what is idle for 60.
PING_INTERVAL, PING_TIMEOUT = 20.0, 20.0

# Seconds for the peer's Close after ours. `websockets` 10.
CLOSE_TIMEOUT = 10.0

# Seconds, and bytes, for which we read on after a failure, so that the Close that tells why arrives (else the system may reset);
# and seconds for a server to end the connection after both Closes.
LINGER, MAX_LINGER = 2.0, 4 * 2**20

# Messages, and bytes (or characters) of them, that are received for a handler that does not receive. `websockets` 16 messages.
MAX_QUEUE, MAX_QUEUED = 16, 2**20

# Bytes that are kept for a peer that does not read, before who sends, or answers its Pings, waits: `websockets` 32 KiB.
MAX_UNSENT = 64 * 2**10

# Bytes that one read asks for. From 128 KiB on the memory for it would be had from the system each time: 12 µs.
CHUNK = 64 * 2**10

# Codes with which `async for` ends without an error: done, going away, and none, which is what a browser's close() sends.
_NORMAL = (1000, 1001, 1005)

_current_task = flowcoro.current_task
_NO_LOCK = contextlib.nullcontext()
_GONE = OSError, flowcoro.ClosedError       # any: what was written before may be half of a frame
_ENDS = RemoteProtocolError, *_GONE         # (a ConnectionClosed is an OSError)
_SENDABLE = str, bytes, bytearray, memoryview


# The first two bytes of a short text of a server, as characters.
_TEXT_HEADS = [chr(_TEXT) + chr(size) for size in range(126)]


def _short_message(codec, data):
    """The message, if `data` is one short frame that is a whole one, and nothing more; else None, and it is for the codec. It
    only accepts, as the codec's own short way: 0.5 µs, where receive_data() and next_event() take 1.2."""
    size = len(data) - codec._head
    if not 0 < size < 126 or data[1] != size | codec._bit or size > codec._limit:
        return None
    if codec._bit:
        content = (_from_bytes(data[6:], "little") ^ _from_bytes((data[2:6] * 32)[:size], "little")).to_bytes(size, "little")
    else:
        content = data[2:]
    kind = data[0]
    if kind == _TEXT:
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError:
            return None
    return content if kind == _BINARY else None


class _Keeper:
    """Looks after the WebSockets of a kernel: one task, while there are any."""

    all = weakref.WeakKeyDictionary()

    def __init__(self):
        self.several = flowcoro.runtime_info()["workers"] > 1
        self.members = {}           # {weakref: None}: one that nobody has closed is to be found by the collector, which says so
        self.grain, self.runs = SWEEP, False

    @classmethod
    def of_kernel(cls):
        kernel = flowcoro.current_kernel()
        return cls.all.get(kernel) or cls.all.setdefault(kernel, cls())

    def add(self, ws, grain):
        self.members[weakref.ref(ws)] = None
        self.grain = min(self.grain, grain)
        if self.begin():
            flowcoro.spawn(self.sweep(), name="sweep of WebSockets")

    @flowcoro.atomic
    def begin(self):
        runs, self.runs = self.runs, True
        return not runs

    @flowcoro.atomic
    def end(self):
        self.runs = bool(self.members)
        if not self.runs:
            self.grain = SWEEP
        return not self.runs

    async def sweep(self):
        try:
            while not self.end():
                await flowcoro.sleep(self.grain)
                now = flowcoro.now()
                for count, ref in enumerate(list(self.members), 1):
                    ws = ref()
                    if ws is None or ws._closed:
                        self.members.pop(ref, None)
                    else:
                        try:
                            ws._look(now)
                        except Exception as error:          # of one, and the sweep is for all
                            flowcoro.report_error(error, f"{ws!r} could not be looked after", "flowcoro_websocket")
                    del ws
                    if not count % 1000:
                        await flowcoro.checkpoint()
        finally:
            self.runs = False


class _Sender:
    """How a WebSocket sends."""

    __slots__ = ("_sock", "_secure", "_codec", "_lock", "_lot", "_ready", "_unsent", "_kept", "_flushed", "_flushing",
                 "_fragmenting", "_deferred", "_batched", "_shares", "_short", "_lost", "_closed", "_close_by", "close_code",
                 "close_reason", "__weakref__")

    def __init__(self, sock, codec, several):
        self._sock, self._codec, self._secure = sock, codec, sock.tls is not None
        codec._steps = _STEPS
        self._lock = threading.Lock() if several else _NO_LOCK      # over a step of the codec with the write of what it gives
        self._lot = flowcoro.ParkingLot("wait for a WebSocket") if several else None        # of all who wait for a change
        self._unsent = None             # frames that the system has not taken
        self._kept = self._flushed = 0  # bytes that ever came into _unsent, and that have left it
        self._flushing = self._fragmenting = self._closed = False
        self._deferred = None           # broadcast() to who sends a fragmented message: (bytes, [(message, frame)]), for its end
        self._batched = False           # what is kept is sent at the end of the turn, by _Batch, and broadcast() may add to it:
                                        # no longer after a Close or in the middle of a message, which may be among it
        self._shares = codec.role == "server" and not several       # whether it can send the same bytes as others
        self._short = self._shares and (codec.deflate is None or codec.deflate.threshold > 125)     # … short ones as they are
        self._lost = None               # the error of a write: nothing more can be sent, and something may still be read
        self._close_by = None           # when the sweep closes
        self.close_code, self.close_reason = None, ""
        self._ready = not several

    def _mark(self):
        """E3, after anything that it speaks of has changed."""
        self._ready = (self._lock is _NO_LOCK and not self._flushing and not self._fragmenting and self._lost is None
                       and not self._closed and self._codec.our_state is OPEN)

    # -- waiting

    async def _wait(self, predicate):
        if self._lot is None:
            self._lot = flowcoro.ParkingLot("wait for a WebSocket")
        await self._lot.park_unless(predicate)

    def _wake(self):
        if self._lot is not None:
            self._lot.unpark_all()

    def _closed_error(self, cause=None):
        """The ConnectionClosed of now, which nobody has raised yet."""
        code, reason = self.close_code or 1006, self.close_reason
        if not self._closed and self.close_code is None and self._lost is None:
            said = "close() has been called here, and after that nothing is sent"
        elif code == 1006:
            said = f"the connection was lost without a Close: {self._lost or cause or 'the peer ended it'}"
        else:
            said = f"the WebSocket is closed: {code} {reason}".rstrip()
        error = ConnectionClosed(code, reason, said, self)
        error.__cause__ = cause or self._lost
        return error

    def _check_open(self):
        if self._closed or self._lost is not None or self._codec.our_state is not OPEN:
            raise self._closed_error()

    # -- frames on their way

    def _write(self, data):
        """Send frames, or keep them. With the lock. Never blocks."""
        if not self._flushing and self._lost is None and not self._closed:
            try:
                sent = self._sock.write_nowait(data)
            except _GONE as error:
                self._lost = error
                self._mark()
                return
            if sent == len(data) and not (self._secure and self._sock.unsent):
                return
            data = memoryview(data)[sent:]
        self._keep(data)

    def _keep(self, data):
        """E2: keep what the system has not taken, and have it sent."""
        if self._lost is not None or self._closed:
            return
        if self._unsent is None:
            self._unsent = []
        self._unsent.append(data)
        self._kept += len(data)
        if not self._flushing:
            self._kept += self._sock.unsent     # what TLS has encrypted of it already
            self._flushing = True
            self._mark()
            flowcoro.spawn(self._flush(), name="send what a WebSocket has kept")

    def _take_unsent(self):
        """(what is to be sent next, what `_flushed` is then). Nothing: _flush() has done, and the next _keep() begins another."""
        with self._lock:
            pieces, self._unsent = self._unsent, None
            if not pieces:
                self._flushing = False
                self._mark()
            return pieces, self._kept

    async def _flush(self):
        try:
            while (taken := self._take_unsent())[0]:
                await self._sock.write_many(taken[0])
                if self._secure:
                    await self._sock.write(b"")     # what was encrypted before
                self._flushed = taken[1]
                self._wake()
        except BaseException as error:              # also Cancelled, where the kernel ends: half of a frame may have left
            self._break_off(error)
            if not isinstance(error, _GONE):
                raise

    def _break_off(self, error):
        """E2: nothing can be sent any more."""
        with self._lock:
            self._lost = self._lost or error
            self._unsent, self._flushing, self._flushed = None, False, self._kept
            self._mark()
        self._wake()

    async def _drain(self, most=0):
        """Wait until the system has all that was kept until now, but for `most` bytes; or never will."""
        mark = self._kept - most
        while self._flushing and self._flushed < mark:
            await self._wait(lambda: not self._flushing or self._flushed >= mark)

    # -- messages

    async def send(self, message):
        """Send a message: str (text), bytes, bytearray or memoryview (binary), or an iterable, async or not, of pieces of one of
        these, which leave as fragments of one message as they come. Returns when the system has all of it: who sends faster than
        the peer reads waits.

        Several tasks may send at a time; messages do not mix. Cancelled: the message was not sent, or it will leave as a whole
        (the socket goes on with it). Of an iterable that fails or is cancelled before its end a part was sent: the WebSocket is
        closed with 1011. ConnectionClosed once it is closed, or close() was called; TypeError for what is no message, and
        LocalProtocolError for a text with half of a character (a surrogate): nothing was sent.
        """
        task = _current_task()
        if task.budget > 0:
            task.budget -= 1
        else:
            await flowcoro.checkpoint()
        if not self._ready or message.__class__ is not str and message.__class__ is not bytes:
            return await self._send_otherwise(message)
        if self._short and message.__class__ is str and len(message) < 126 and message.isascii():
            data = (_TEXT_HEADS[len(message)] + message).encode("latin-1")          # 0.2 µs instead of 0.4
        else:
            data = self._codec.send_message(message)
        try:
            sent = self._sock.write_nowait(data)
        except _GONE as error:
            self._lost = error
            self._mark()
            raise self._closed_error() from error
        if sent != len(data) or self._secure and self._sock.unsent:
            self._keep(memoryview(data)[sent:])
            await self._sent()

    async def _sent(self):
        """After the last frame of a message was kept."""
        await self._drain()
        if self._lost is not None:
            raise self._closed_error()

    async def _send_otherwise(self, message):
        if not isinstance(message, _SENDABLE):
            return await self._send_pieces(message)
        while not self._send_if_free(message):
            await self._until_free()
        await self._sent()

    async def _until_free(self):
        """Until no fragmented message is under way, and the peer reads."""
        self._check_open()
        await self._drain(MAX_UNSENT)
        while self._fragmenting and not self._closed:
            await self._wait(lambda: not self._fragmenting or self._closed)

    def _is_free(self):
        self._check_open()
        return not self._fragmenting and self._kept - self._flushed <= MAX_UNSENT

    def _send_if_free(self, message):
        with self._lock:
            if not self._is_free():
                return False
            self._write(self._codec.send_message(message))
            return True

    def _begin_fragments(self):
        with self._lock:
            if not self._is_free():
                return False
            self._fragmenting, self._batched = True, False
            self._mark()
            return True

    def _end_fragments(self):
        with self._lock:
            self._fragmenting = False
            (_, deferred), self._deferred = self._deferred or (0, ()), None
            if self._codec.our_state is OPEN and not self._closed:
                for message, frame in deferred:
                    self._write_shared(message, frame)
            self._mark()
        self._wake()

    async def _send_pieces(self, pieces):
        if not hasattr(pieces, "__aiter__") and (not hasattr(pieces, "__iter__") or isinstance(pieces, dict)):
            raise TypeError(f"send({pieces!r:.80}): give a message, str or bytes-like, or an iterable of pieces of one")
        while not self._begin_fragments():
            await self._until_free()
        begun = False
        try:
            kind = None
            async for piece in pieces if hasattr(pieces, "__aiter__") else _each(pieces):
                if not isinstance(piece, _SENDABLE) or kind not in (None, isinstance(piece, str)):
                    raise TypeError(f"send(): a piece is {piece!r:.80}; all of a message are str, or all are bytes-like")
                kind = isinstance(piece, str)
                if not len(piece):          # it says nothing, and a row of fragments without data is a flood
                    await flowcoro.checkpoint_if_due()
                    continue
                first, begun = not begun, True
                await self._send_piece(piece, first, False)
            first, begun = not begun, False     # with this one it is complete, and leaves as a whole whoever is cancelled
            await self._send_piece(b"" if kind is False else "", first, True)
        except BaseException:
            if begun:
                self.close_nowait(1011, "a message broke off")
            raise
        finally:
            self._end_fragments()

    async def _send_piece(self, data, first, last):
        with self._lock:
            self._check_open()
            self._write(self._codec.send_piece(data, first, last))
        await flowcoro.checkpoint_if_due()
        await self._sent()

    def _offer(self, message, frame, max_backlog):
        """For broadcast(), where it cannot be batched: whether it was sent or kept; None if the member is slow."""
        with self._lock:
            if self._closed or self._lost is not None or self._codec.our_state is not OPEN:
                return False
            size, deferred = self._deferred or (0, [])
            if self._kept - self._flushed + size > max_backlog:
                return None
            if self._fragmenting:
                deferred.append((message, frame))
                self._deferred = size + len(frame), deferred
            else:
                self._write_shared(message, frame)
            return self._lost is None

    def _write_shared(self, message, frame):
        """A message of broadcast(), as it is, or masked. With the lock."""
        self._write(frame if self._codec.role == "server" else self._codec.send_message(message))


async def _each(items):
    for item in items:
        yield item


def _size(data):
    """The bytes of a text or of bytes."""
    return len(data) if type(data) is bytes else len(data.encode())


class _Ending(_Sender):
    """What comes and is no message, and how a WebSocket ends."""

    __slots__ = ("_special", "_pings")

    def __init__(self, sock, codec, several):
        super().__init__(sock, codec, several)
        self._special = several
        self._pings = None              # payload -> (when it was sent, the Promise of who waits or None)

    async def _control(self, event):
        kind = type(event)
        if kind is Ping:
            with self._lock:
                if self._codec.our_state is not SHUT:
                    self._write(self._codec.send_pong(event.payload))
            await flowcoro.checkpoint_if_due()
            await self._drain(MAX_UNSENT)           # who floods us with Pings, and does not read, waits
        elif kind is Pong:
            self._take_pong(event.payload)
            await flowcoro.checkpoint_if_due()
        elif kind is Close:
            self.close_code, self.close_reason = event.code, event.reason
            self._say_close(event.code, event.reason)
            await self._part(self._codec.role == "client")
            raise self._closed_error()
        else:                                       # CLOSED: the connection has ended, without a Close
            self._end()
            raise self._closed_error()

    async def _failed(self, error):
        """The ConnectionClosed for an error of the peer or the network, after the peer was told."""
        if isinstance(error, ConnectionClosed):
            return error
        if isinstance(error, RemoteProtocolError):
            self.close_code, self.close_reason = error.code, str(error)
            with self._lock:
                if self._codec.our_state is not SHUT and not self._closed:
                    self._write(self._codec.send_failure() if self._codec.their_state is FAILED else
                                self._codec.send_close(error.code, str(error)[:123]))
                self._batched = False
                self._mark()
            await self._part(True)
        else:
            self._lost = self._lost or error
            self._end()
        return self._closed_error(error)

    def _say_close(self, code, reason):
        with self._lock:
            if self._codec.our_state is not SHUT and not self._closed:
                self._write(self._codec.send_close(code, reason))
            self._batched = False
            self._mark()

    async def _part(self, linger):
        """After the last Close: end the connection, or (`linger`) give the peer time to do it. The server does it, so that the
        ports of closed connections wait at its side (RFC 6455 7.1.1). Cancelled: it is ended at once."""
        try:
            with flowcoro.move_on_after(LINGER):
                await self._drain()
                if linger:
                    if self._codec.role == "server":
                        await self._sock.shutdown_write()
                    left = MAX_LINGER
                    while left > 0 and (data := await self._sock.read(CHUNK)):
                        left -= len(data)
                await self._sock.close()
        except (*_GONE, flowcoro.BusyError):
            pass
        finally:
            self._end()

    def _end(self):
        """The connection is at its end: whoever waits is told. Never blocks."""
        with self._lock:
            if self._closed:
                return
            self._closed, self._special, self._batched = True, True, False
            self.close_code = self.close_code or 1006
            self._sock.close_nowait()
            self._mark()
            pings, self._pings = self._pings, None
        for _, promise in (pings or {}).values():
            if promise is not None:
                promise.set_result(None)        # no error: who has been cancelled in this turn would leave it to nobody
        self._wake()

    def _take_pong(self, payload):
        """A Pong answers the Pings before that one, too (RFC 6455 5.5.3). One that nobody has asked for says nothing."""
        now = flowcoro.now()
        with self._lock:
            pings = self._pings
            if pings and payload in pings:
                for sent in list(pings):
                    began, promise = pings.pop(sent)
                    if promise is not None:
                        promise.set_result(now - began)
                    elif sent == payload:
                        self.latency = now - began
                    if sent == payload:
                        break

    def _send_ping(self, promise=None):
        """-> the payload; None: nothing is sent any more"""
        payload = os.urandom(4)
        with self._lock:
            if self._codec.our_state is not OPEN or self._closed:
                return None
            if self._pings is None:
                self._pings = {}
            self._pings[payload] = flowcoro.now(), promise
            self._write(self._codec.send_ping(payload))
        return payload


class _Receiver(_Ending):
    """How a WebSocket receives."""

    __slots__ = ("_receiving", "_background", "_queue", "_queued", "_unread", "_idle", "_max_queue")

    def __init__(self, sock, codec, several):
        super().__init__(sock, codec, several)
        self._receiving, self._background = False, None     # E1
        self._queue, self._queued = None, 0     # messages and pieces that were received in the background, and their length
        self._unread = None             # an object, as long as a message is received in pieces, and not to its end
        self._idle = 0                  # looks of the sweep that have found nobody who reads

    def _mark_special(self):
        """E3"""
        self._special = (self._lock is not _NO_LOCK or bool(self._queue) or self._background is not None or self._closed
                         or self._unread is not None or self._codec.pieces)

    # -- messages

    async def receive(self):
        """The next message: str (text) or bytes (binary). Cancelled: nothing is lost.

        ConnectionClosed once the peer has closed, or the connection is lost (code 1006), or nothing came in answer to a Ping. The
        messages that came before are given first. BusyError while another task receives (but who closes only ends it).
        """
        codec = self._codec
        if self._special or self._receiving or codec._buffer or codec._message is not None:
            return await self._receive_otherwise()
        self._receiving, self._idle = True, 0           # and all of this is written out in __anext__(), too
        try:
            data = await self._sock.read(CHUNK)
            event = _short_message(codec, data)
            if event is None:
                codec.receive_data(data) if data else codec.receive_end()
                event = codec.next_event()
                if event.__class__ is not str and event.__class__ is not bytes:
                    event = await self._next(event)
            return event
        except _ENDS as error:
            raise await self._failed(error)
        finally:
            self._receiving = False
            if self._lot is not None:
                self._lot.unpark_all()

    async def _receive_otherwise(self):
        if not self._receiving:                 # who does gets what he has asked for, and this one a BusyError
            self._codec.pieces = False
        while self._unread is not None:         # the rest of a message that nobody wanted
            await self._receive_event(self._unread)
        event = await self._receive_event()
        return await self._whole(event) if type(event) is Piece else event

    async def _whole(self, piece):
        """The message of a first piece: it had begun as one that is received in pieces. Cancelled: what has come is kept."""
        empty, pieces, size, most = piece.data[:0], [piece.data], _size(piece.data), self._codec.max_message
        unread = self._unread
        try:
            while size <= most and not piece.last:
                piece = await self._receive_event(unread)
                pieces.append(piece.data)
                size += _size(piece.data)
        except flowcoro.Cancelled:
            with self._lock:
                if self._unread is unread:
                    if self._queue is None:
                        self._queue = collections.deque()
                    self._queue.appendleft(Piece(empty.join(pieces), True, False))
                    self._queued += len(self._queue[0].data)
                    self._unread = None
                    self._mark_special()
            raise
        if size > most:
            raise await self._refused(RemoteProtocolError(1009, f"a message of more than {most} bytes (max_message=)"))
        return empty.join(pieces)

    async def _refused(self, error):
        """_failed() for what the codec has let pass. E1: its caller is who reads from then on."""
        while (background := self._background) is not None:
            await self._relieve(background)
        self._receiving = True
        try:
            return await self._failed(error)
        finally:
            self._receiving = False
            self._wake()

    async def receive_pieces(self):
        """`async for piece in ws.receive_pieces()`: the next message in pieces, str or bytes, as they come. It may be of any
        length: max_message= does not count. What has been received as a whole already comes as one piece.

        Who leaves it before the end, best by contextlib.aclosing(), drops the rest; who goes on with it once the next message was
        asked for gets BusyError. Other errors as receive().
        """
        await flowcoro.checkpoint_if_due()
        if not self._receiving:
            self._codec.pieces = self._special = True
        while self._unread is not None:
            await self._receive_event(self._unread)
        unread = None
        while True:
            event = await self._receive_event(unread)
            unread = self._unread
            if type(event) is not Piece:
                yield event
                return
            if event.data:
                yield event.data
            if event.last:
                return

    async def _receive_event(self, unread=None):
        """The next message or Piece; a further one of the message for which `_unread` is `unread`."""
        await flowcoro.checkpoint_if_due()      # also between pieces: 64 KiB may be inflated to a thousand of 64 KiB
        while True:
            with self._lock:
                background, taken = self._background, unread is not self._unread
                if self._queue and not taken:
                    event = self._queue.popleft()
                    self._queued -= len(event.data if type(event) is Piece else event)
                    break
                if self._closed:
                    raise self._closed_error()
                taken = taken or self._receiving
                if taken and self._codec.our_state is not SHUT:
                    raise flowcoro.BusyError(f"{self!r}: " + (
                        "another task receives from it; one at a time" if self._receiving or unread is None else
                        "the rest of this message was dropped, by who has asked for the next one"))
                if not taken and background is None:
                    self._receiving, self._idle = True, 0
            if taken:                           # by close() in another task, which drops what comes until the end
                await self._wait(lambda: self._closed or not self._receiving and unread is self._unread)
            elif background is None:
                event = await self._read()
                break
            else:
                await self._relieve(background)
        self._unread = (self._unread or object()) if type(event) is Piece and not event.last else None
        self._mark_special()
        return event

    async def _relieve(self, background):
        """E1: end the task in the background; but if the end has come, it gives the peer the time to hear of it."""
        if self.close_code is None:
            background.cancel()
        await self._wait(lambda: self._background is not background)

    async def _read(self):
        """The next message or Piece from the network. E1: `_receiving` is set, and no more when it returns."""
        try:
            return await self._next()
        finally:
            self._receiving = False
            self._wake()

    async def _next(self, event=None):
        """The next message or Piece, of `event` and what comes after it. For who reads (E1)."""
        codec = self._codec
        try:
            while True:
                if event is None:
                    event = codec.next_event()
                kind = type(event)
                if kind is str or kind is bytes or kind is Piece:
                    return event
                if event is NEED_DATA:
                    data = await self._sock.read(CHUNK)
                    codec.receive_data(data) if data else codec.receive_end()
                elif event is _MORE:
                    await flowcoro.checkpoint()
                else:
                    await self._control(event)
                event = None
        except _ENDS as error:
            raise await self._failed(error)

    # -- in the background

    def _has_room(self):
        return self._queue is None or len(self._queue) < self._max_queue and self._queued < MAX_QUEUED

    def _read_in_background(self):
        """Have a task read, unless somebody does, or enough is queued."""
        with self._lock:
            if not self._receiving and self._background is None and not self._closed and self._has_room():
                self._background = flowcoro.spawn(self._read_on(), name="read for a WebSocket that nobody receives from")
                self._special = True

    async def _read_on(self):
        me = _current_task()
        try:
            while self._has_room():
                event = await self._next()
                with self._lock:
                    if self._queue is None:
                        self._queue = collections.deque()
                    self._queue.append(event)
                    self._queued += len(event.data if type(event) is Piece else event)
        except ConnectionClosed:
            pass
        finally:
            with self._lock:            # with several workers it may end before _read_in_background() has said that it began
                if self._background is me:
                    self._background = None
                self._mark_special()
            self._wake()


class WebSocket(_Receiver):
    """A WebSocket, either end: what accept() and connect() give.

    `request`: of a server, the request; `response_headers`: of a client, [(name, value)] of the answer; `subprotocol`: the one
    that was agreed on, or None; `close_code`, `close_reason`: of the peer's Close, once it is closed: 1005 if it gave no code,
    1006 if there was no Close, and what we have found if the peer has broken the protocol; `latency`: seconds that the last Ping
    of the keep-alive took, or None; `state`: whatever you like to keep here.

    One task receives at a time; any number may send. `async with ws:` closes it in the end: with 1000, or 1011 after an error.
    `async for message in ws` gives the messages until the peer has closed normally (1000, 1001, or without a code).
    """

    __slots__ = ("request", "response_headers", "subprotocol", "latency", "state", "_ping_interval", "_ping_timeout",
                 "_ping_due", "_pinged", "_ping_at", "_progress", "_close_timeout")

    def __init__(self, sock, role, *, deflate=None, max_message=MAX_MESSAGE, max_frame=None, max_queue=MAX_QUEUE,
                 ping_interval=PING_INTERVAL, ping_timeout=PING_TIMEOUT, close_timeout=CLOSE_TIMEOUT, subprotocol=None,
                 request=None, response_headers=()):
        """By hand, where the handshake was made elsewhere: `sock` a flowcoro_net.Socket, `role` "server" or "client"."""
        _check_limits(max_message, max_frame, max_queue)
        keeper = _Keeper.of_kernel()
        super().__init__(sock, WebSocketConnection(role, deflate=deflate, max_message=max_message, max_frame=max_frame),
                         keeper.several)
        self.request, self.response_headers, self.subprotocol = request, response_headers, subprotocol
        self.latency = self.state = None
        self._ping_interval = _seconds(ping_interval, "ping_interval")
        self._ping_timeout = _seconds(ping_timeout, "ping_timeout")
        self._close_timeout, self._max_queue = _seconds(close_timeout, "close_timeout"), max_queue
        self._ping_due = flowcoro.now() + self._ping_interval
        self._pinged = None             # since when nothing has come, after a Ping; None: there is none under way
        self._ping_at = 0               # `_flushed` when that Ping has left
        self._progress = None           # _signs_of_life() then
        keeper.add(self, min(self._ping_interval, self._ping_timeout) / 4)

    # -- Pings

    async def ping(self):
        """Send a Ping and wait for its Pong: the seconds that took. ConnectionClosed. Cancelled: nobody waits for the Pong.

        It is read by who receives, else in the background, but not while as many messages as are kept (max_queue) wait before it.
        """
        await flowcoro.checkpoint_if_due()
        self._check_open()
        promise = flowcoro.Promise()
        payload = self._send_ping(promise)
        if payload is None:
            raise self._closed_error()
        self._read_in_background()
        try:
            seconds = await promise
        finally:
            with self._lock:
                if self._pings is not None:
                    self._pings.pop(payload, None)
        if seconds is None:
            raise self._closed_error()
        return seconds

    def _look(self, now):
        """The sweep's: see to it that somebody reads, to deadlines, and to the keep-alive."""
        if self._close_by is not None and now >= self._close_by:
            self._end()
            return
        if not self._receiving and self._background is None:
            self._idle += 1
            if self._idle > 1:
                self._read_in_background()
                if self._background is None:
                    self._wake()                    # who waits in wait_closed() looks whether the peer has gone
        if self._pinged is None:
            if now >= self._ping_due:
                self._send_ping()
                self._pinged, self._ping_at = now, self._kept
                self._progress = self._signs_of_life()
        elif not self._pings:
            self._pinged, self._ping_due = None, self._pinged + self._ping_interval
        elif now - self._pinged >= self._ping_timeout:
            self._look_for_life(now)

    def _signs_of_life(self):
        """What changes while the peer lives: bytes that come, if anybody reads; and bytes that leave, while the Ping waits behind
        a large message, or nobody would read the Pong."""
        counts, reads = self._sock.statistics(), self._receiving or self._background is not None
        return reads, counts["bytes_received"], (not reads or self._flushed < self._ping_at) and counts["bytes_sent"]

    def _look_for_life(self, now):
        """No Pong in time: the peer is gone, unless something has come or gone, or nobody was there to read it. Then it need only
        take what waits for it: who is stuck in send() before a full queue would else wait for ever."""
        progress = self._signs_of_life()
        if progress != self._progress or not progress[0] and not self._flushing:
            self._pinged, self._progress = now, progress
            return
        self.close_reason = f"no answer to a Ping for {self._ping_timeout:g} s (ping_timeout)"
        self._lost = self._lost or flowcoro_net.BrokenError(None, f"{self._sock!r}: {self.close_reason}")
        self._end()

    # -- the end

    async def close(self, code=1000, reason="", *, timeout=None):
        """Close: send a Close, wait for the peer's, at most `timeout` seconds (None: close_timeout of accept() or connect()), and
        end the connection. What is received meanwhile is dropped. Twice is once. LocalProtocolError for a code that may not be
        sent, or a reason of more than 123 bytes: nothing has changed. Cancelled: the connection is ended at once.
        """
        limit = flowcoro.move_on_after(self._close_timeout if timeout is None else timeout)
        self._say_close(code, reason)
        try:
            await flowcoro.checkpoint_if_due()
            with limit:
                await self._until_closed()
        finally:
            self._end()

    async def _until_closed(self):
        while not self._closed:
            if self._receiving or self._background is not None:
                await self._wait(lambda: self._closed or not self._receiving and self._background is None)
            else:
                try:
                    await self._receive_event(self._unread)
                except ConnectionClosed:
                    break
                except flowcoro.BusyError:
                    pass

    def close_nowait(self, code=1000, reason=""):
        """Send a Close, and have the connection ended when the peer's has come, or after close_timeout of accept() or connect().
        Never blocks. Who receives goes on until then. LocalProtocolError as close()."""
        if self._closed:
            return
        self._say_close(code, reason)
        if self._close_by is None:
            self._close_by = flowcoro.now() + self._close_timeout
        self._read_in_background()

    async def wait_closed(self):
        """Wait until it is closed, by whomever. For a handler that only sends. Messages that come meanwhile are kept for
        receive(), max_queue at most: then nothing more is read until somebody receives, or the peer has gone; then all are
        dropped."""
        await flowcoro.checkpoint_if_due()
        self._read_in_background()
        while not self._closed:
            if self._is_left():
                await self._until_closed()          # which finds the peer's Close, if there is one
            else:
                await self._wait(lambda: self._closed or self._is_left())

    def _is_left(self):
        """Whether the peer has gone, and nobody will see it, since nobody takes what is queued."""
        return not self._receiving and self._background is None and not self._has_room() and self._sock.hung_up

    @property
    def closed(self):
        """Whether the connection is at its end."""
        return self._closed

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        if kind is None or getattr(error, "websocket", None) is self:
            await self.close()
        elif issubclass(kind, Exception):
            await self.close(1011)
        else:
            self._say_close(1001, "")
            self._end()

    def __aiter__(self):
        return self

    async def __anext__(self):
        # receive() written out: one coroutine less for each message, 0.2 µs, and 250 bytes less while it waits.
        codec = self._codec
        try:
            if self._special or self._receiving or codec._buffer or codec._message is not None:
                return await self._receive_otherwise()
            self._receiving, self._idle = True, 0
            try:
                data = await self._sock.read(CHUNK)
                event = _short_message(codec, data)
                if event is None:
                    codec.receive_data(data) if data else codec.receive_end()
                    event = codec.next_event()
                    if event.__class__ is not str and event.__class__ is not bytes:
                        event = await self._next(event)
                return event
            except _ENDS as error:
                raise await self._failed(error)
            finally:
                self._receiving = False
                if self._lot is not None:
                    self._lot.unpark_all()
        except ConnectionClosed as error:
            if error.code in _NORMAL:
                raise StopAsyncIteration from None
            raise

    # -- about it

    @property
    def peer(self):
        """The other end's address, as Socket.peer."""
        return self._sock.peer

    @property
    def local(self):
        """Its own address, as Socket.local."""
        return self._sock.local

    def statistics(self):
        """{"bytes_received", "bytes_sent": as on the wire, frames and all; "bytes_unsent": kept for a peer that does not read;
        "queued": messages that were received in the background; "latency": as the attribute}"""
        sock = self._sock.statistics()
        return {"bytes_received": sock["bytes_received"], "bytes_sent": sock["bytes_sent"],
                "bytes_unsent": self._kept - self._flushed, "queued": len(self._queue or ()), "latency": self.latency}

    def __repr__(self):
        state = f"closed {self.close_code}" if self._closed else "open" if self._codec.our_state is OPEN else "closing"
        return f"<WebSocket {self._codec.role} {state} {self._sock!r}>"


def _seconds(seconds, name):
    """Seconds, math.inf for None."""
    if seconds is None:
        return math.inf
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"{name}={seconds!r}: give seconds, more than 0, or None for none")
    return seconds


# ---- server end -----------------------------------------------------------------------------------------------

async def accept(request, *, subprotocols=(), origins=None, headers=(), deflate=True, max_message=MAX_MESSAGE, max_frame=None,
                 max_queue=MAX_QUEUE, ping_interval=PING_INTERVAL, ping_timeout=PING_TIMEOUT, close_timeout=CLOSE_TIMEOUT):
    """Accept the WebSocket that a request asks for (RFC 6455 section 4.2). -> WebSocket

    request: a flowcoro_http.Request, or what has its method, version, headers, host and upgrade(); it gets the attribute
    `websocket`. HttpServer(websocket=accept) calls this; the options are those of @app.websocket(path).
    subprotocols: those that are spoken here, the best first; the first that the client offers is taken, or none.
    origins: pages of which origins may connect: ["https://example.com"], "https://*.example.com" for all below it, "null", "*"
    for all; None: those of the host that is asked for. Browsers send cookies along whatever the page; who is no browser passes.
    headers: pairs or a mapping, for the answer. deflate: True, False, or a Deflate: whether messages may be compressed.
    max_message: bytes of a message, inflated, beyond which it is refused with 1009; max_frame: those of one frame. max_queue:
    messages that are received while nobody receives, and a megabyte at most; then nothing is read. close_timeout: seconds for the
    peer's Close after ours (None: no limit).
    ping_interval: seconds between Pings; ping_timeout: seconds after one without any sign of life (something comes, or the Ping
    has not left yet, and what is before it does), and the connection counts as lost; None: no Pings, no limit.
    HandshakeError, with the `status` and `headers` of the answer: 400, 403 for the origin, 405, 426. What upgrade() raises.
    ValueError, TypeError for options that make no sense: nothing is sent then. Cancelled: the connection is cut.
    """
    _check_origins(origins)
    _check_subprotocols(subprotocols)
    _check_limits(max_message, max_frame, max_queue)
    headers = _further(headers)
    seconds = {"ping_interval": _seconds(ping_interval, "ping_interval"), "ping_timeout": _seconds(ping_timeout, "ping_timeout"),
               "close_timeout": _seconds(close_timeout, "close_timeout")}
    pairs, subprotocol, agreed = _check_request(
        request.method, request.version, request.headers.items(), subprotocols=subprotocols, origins=origins, host=request.host,
        deflate=_as_deflate(deflate))
    sock = await request.upgrade("websocket", [*pairs, *headers])
    ws = WebSocket(sock, "server", deflate=agreed, max_message=max_message, max_frame=max_frame, max_queue=max_queue,
                   subprotocol=subprotocol, request=request, **seconds)
    request.websocket = ws              # whoever serves the request closes it in the end
    return ws


def _as_deflate(deflate):
    if deflate is True:
        return Deflate()
    if deflate in (None, False) or isinstance(deflate, Deflate):
        return deflate or None
    raise TypeError(f"deflate={deflate!r:.60}: give True, False or a Deflate")


# ---- client end -----------------------------------------------------------------------------------------------

# Seconds for all of connecting: name, TCP, TLS, proxy, redirects, handshake. `websockets` 10.
OPEN_TIMEOUT = 10.0

# Redirects in a row at most. `websockets` 10; browsers follow none.
MAX_REDIRECTS = 10

# Seconds before another attempt: twice as many after each failure, from the first to the last of these, of which a random half to
# all are waited for, so that those who have lost a server do not come back to it all at once. A connection that lasted less than
# `LASTING` seconds counts as a failure, so that a server that hangs up at once is not asked without a pause.
BACKOFF, MAX_BACKOFF, LASTING = 0.5, 60.0, 10.0

# Bytes of the content of an answer that is no 101 which are read, for the HandshakeError.
MAX_ANSWER = 64 * 2**10

# Statuses that may be other ones soon: too early, too many, and a server that does not work, or is not there. (RFC 9110, 6585)
_RETRIED = (408, 425, 429, 500, 502, 503, 504)

_DEFAULT_PORTS = {"ws": 80, "wss": 443, "http": 80, "https": 443}


class _Target:
    """A URL, taken apart."""

    __slots__ = ("tls", "host", "port", "authority", "path", "credentials", "text")

    def __init__(self, text, schemes=("ws", "wss"), what="url"):
        """ValueError if it is none; TypeError."""
        if not isinstance(text, str):
            raise TypeError(f"{what}={text!r:.60}: give a str")
        if any(not "!" <= letter <= "~" and letter < "\x80" for letter in text):
            raise ValueError(f"{what}={_without_password(text)!r:.200}: a URL has no blanks and no control characters")
        parts = urllib.parse.urlsplit(text)
        if parts.scheme not in schemes:
            raise ValueError(f"{what}={_without_password(text)!r:.200}: it begins with "
                             f"{' or '.join(f'{scheme}://' for scheme in schemes)}")
        if "#" in text:
            raise ValueError(f"{what}={_without_password(text)!r:.200}: what follows \"#\" is never sent; leave it out")
        host, self.tls = parts.hostname, parts.scheme in ("wss", "https")
        if not host:
            raise ValueError(f"{what}={_without_password(text)!r:.200}: it has no host")
        try:
            self.host = (host if host.isascii() else host.encode("idna").decode()).lower()
            self.port = _DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
        except (UnicodeError, ValueError) as error:
            raise ValueError(f"{what}={_without_password(text)!r:.200}: {error}") from None
        shown = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = shown if self.port == _DEFAULT_PORTS[parts.scheme] else f"{shown}:{self.port}"
        path = (parts.path or "/") + ("?" + parts.query if parts.query else "")
        self.path = path if _is_target(path) else urllib.parse.quote(path, safe="/?%:@!$&'()*+,;=~-._[]")
        self.credentials = None
        if parts.username is not None:
            self.credentials = urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password or "")
        self.text = f"{parts.scheme}://{self.authority}{self.path}"

    @property
    def origin(self):
        return self.tls, self.host, self.port


def _without_password(text):
    return re.sub(r"//[^/@?#]*@", "//…@", text)


def _basic(credentials):
    return "Basic " + base64.b64encode(":".join(credentials).encode()).decode()


def _environment_proxy(target):
    """The proxy that the environment has for it: wss_proxy and https_proxy, or ws_proxy and http_proxy; all_proxy; no_proxy."""
    import urllib.request as known      # 20 ms, which only this needs
    proxies = known.getproxies_environment()
    if known.proxy_bypass_environment(f"{target.host}:{target.port}", proxies):
        return None
    schemes = ("wss", "https", "all") if target.tls else ("ws", "http", "all")
    return next((proxies[scheme] for scheme in schemes if scheme in proxies), None)


class connect:
    """Connect to a WebSocket server (RFC 6455 section 4.1).

        async with connect("wss://example.com/chat") as ws:      closes it in the end
        ws = await connect(…)                                    close it yourself
        async for ws in connect(…):                              again and again, as connections get lost

    headers: pairs or a mapping, for the request; subprotocols: those that are spoken, the best first; origin: an Origin. A user
    and a password in the URL are sent (Basic). tls: an ssl.SSLContext instead of the usual one for wss. proxy: the URL of an HTTP
    proxy (http://user:password@host:port, or https://), True for what the environment says (https_proxy, no_proxy …), None: none.
    redirects: how many are followed, 0 for none; what is for one origin (Authorization, Cookie) is not sent to another, and from
    wss to ws none leads. open_timeout: seconds for all of it. socket: a flowcoro_net.Socket that is connected already, for the
    one connection it is good for: a redirect, or the iterator's next, raises ValueError. deflate, max_message, max_frame,
    max_queue, ping_interval, ping_timeout, close_timeout as accept().

    Errors: HandshakeError, with status, headers and body of an answer that is no WebSocket's; TimeoutError; those of
    Socket.connect(): BrokenError, ResolveError, TlsError; ValueError, TypeError. Cancelled: nothing is left behind.

    The iterator tries again after BrokenError, ResolveError, TimeoutError and statuses that may change (429, 5xx …), each time
    later, up to a minute, with some chance in it; Retry-After is heeded. Other errors are raised, of what speaks no HTTP, too.
    on_retry(error, seconds) is called before it waits (error None: the connection has ended). What is wrong in the block is yours
    to catch: ConnectionClosed, and `continue`. The WebSocket of a block is closed when the block ends, also by `break`.
    """

    def __init__(self, url, *, headers=(), subprotocols=(), origin=None, tls=None, proxy=None, redirects=MAX_REDIRECTS,
                 open_timeout=OPEN_TIMEOUT, deflate=True, max_message=MAX_MESSAGE, max_frame=None, max_queue=MAX_QUEUE,
                 ping_interval=PING_INTERVAL, ping_timeout=PING_TIMEOUT, close_timeout=CLOSE_TIMEOUT, socket=None, on_retry=None):
        self._target = _Target(url)
        self._headers = _further(headers)
        _check_subprotocols(subprotocols)
        self._subprotocols, self._origin, self._deflate = tuple(subprotocols), origin, _as_deflate(deflate)
        self._tls, self._proxy, self._redirects = tls, proxy, redirects
        if not isinstance(redirects, int) or redirects < 0:
            raise ValueError(f"redirects={redirects!r}: give how many are followed, 0 or more")
        self._open_timeout = _seconds(open_timeout, "open_timeout")
        if isinstance(proxy, str):
            self._proxy = self._as_proxy(proxy)
        elif proxy not in (None, True, False):
            raise TypeError(f"proxy={proxy!r:.60}: give a URL, True for the environment's, or None")
        if tls is not None and not self._target.tls:
            raise ValueError(f"tls= is for wss://, and {self._target.text!r:.200} has none")
        _check_limits(max_message, max_frame, max_queue)
        self._options = {"max_message": max_message, "max_frame": max_frame, "max_queue": max_queue,
                         "close_timeout": _seconds(close_timeout, "close_timeout"),
                         "ping_interval": _seconds(ping_interval, "ping_interval"),
                         "ping_timeout": _seconds(ping_timeout, "ping_timeout")}
        self._sockets, self._on_retry, self._ws = None if socket is None else [socket], on_retry, None

    def __await__(self):
        return self._open().__await__()

    async def __aenter__(self):
        self._ws = await self._open()
        return self._ws

    async def __aexit__(self, kind, error, trace):
        ws, self._ws = self._ws, None
        await ws.__aexit__(kind, error, trace)

    async def __aiter__(self):
        failures = 0
        while True:
            error, asked = None, 0.0
            began = flowcoro.now()
            try:
                ws = await self._open()
            except flowcoro_net.TlsError as raised:
                if raised.reason != "UNEXPECTED_EOF":       # a server that ends in the middle may be there again soon
                    raise
                error = raised
            except (flowcoro_net.NetworkError, TimeoutError) as raised:
                error = raised
            except HandshakeError as raised:
                if raised.status not in _RETRIED or not raised._answered:
                    raise
                error, asked = raised, _retry_after(raised.headers)
            else:
                began = flowcoro.now()
                try:
                    yield ws
                finally:                # also when the loop was left: the kernel closes a generator that nobody has any more
                    await ws.close()
            lasted = error is None and flowcoro.now() - began >= LASTING
            failures = 0 if lasted else failures + 1
            if failures:
                seconds = min(MAX_BACKOFF, BACKOFF * 2.0**min(failures - 1, 10)) * random.uniform(0.5, 1.0)
                seconds = max(seconds, asked)
                if self._on_retry is not None:
                    self._on_retry(error, seconds)
                await flowcoro.sleep(seconds)

    # -- one connection

    async def _open(self):
        doing = ["connecting"]              # what the time was spent on, for the error
        with flowcoro.move_on_after(self._open_timeout):
            return await self._follow(doing)
        raise TimeoutError(f"{self._target.text}: open_timeout={self._open_timeout:g} s has passed while {doing[0]}")

    async def _follow(self, doing):
        """The WebSocket, after redirects."""
        target, headers, origin = self._target, self._headers, self._target.origin
        for left in range(self._redirects, -1, -1):
            doing[0] = f"connecting to {target.authority}"
            sock = await self._connect(target)
            try:
                doing[0] = f"waiting for the answer of {target.authority}"
                ws, target = await self._shake(sock, target, headers, left)
            except BaseException:
                sock.close_nowait()
                raise
            if ws is not None:
                return ws
            sock.close_nowait()
            if target.origin != origin:
                headers = [(name, value) for name, value in headers
                           if name.lower() not in ("authorization", "cookie", "proxy-authorization")]
        raise AssertionError("the last answer is no redirect")

    def _redirected(self, target, location, status, pairs):
        with contextlib.suppress(UnicodeError):
            location = location.encode("latin-1").decode()      # what is not ASCII should be encoded; if not, it is UTF-8
        text = urllib.parse.urljoin(target.text.replace("ws", "http", 1), location)
        text = "ws" + text[4:] if text.startswith("http") else text
        try:
            new = _Target(text.partition("#")[0], what="Location")
        except ValueError as error:
            raise HandshakeError(status, f"{target.text}: a redirect leads nowhere: {error}", pairs) from None
        if target.tls and not new.tls:
            raise HandshakeError(status, f"{target.text}: a redirect leads from wss to {new.text!r:.200}, which is not encrypted",
                                 pairs)
        if new.origin == target.origin and new.credentials is None:
            new.credentials = target.credentials        # as the header Authorization
        return new

    async def _connect(self, target):
        if self._sockets is not None:
            if not self._sockets:
                raise ValueError(f"{target.text}: socket= is for one connection, and this is another, by a redirect or again")
            return self._sockets.pop()
        tls = (self._tls or True) if target.tls else None
        proxy = _environment_proxy(target) if self._proxy is True else self._proxy
        if not proxy:
            return await flowcoro_net.Socket.connect(target.host, target.port, tls=tls)
        if isinstance(proxy, str):
            proxy = self._as_proxy(proxy)
        if proxy.tls and target.tls:
            raise ValueError(f"the proxy {proxy.authority}: TLS to a proxy is for ws:// alone; give http://")
        sock = await flowcoro_net.Socket.connect(proxy.host, proxy.port, tls=proxy.tls or None)
        try:
            await self._tunnel(sock, proxy, target)
            if target.tls:
                await sock.start_tls(tls, server_name=target.host)
        except BaseException:
            sock.close_nowait()
            raise
        return sock

    @staticmethod
    def _as_proxy(text):
        return _Target(text if "://" in text else "http://" + text, ("http", "https"), "proxy")

    async def _tunnel(self, sock, proxy, target):
        """Have the proxy connect (RFC 9110 9.3.6)."""
        shown = f"[{target.host}]" if ":" in target.host else target.host
        head = f"CONNECT {shown}:{target.port} HTTP/1.1\r\nHost: {shown}:{target.port}\r\n"
        if proxy.credentials:
            head += f"Proxy-Authorization: {_basic(proxy.credentials)}\r\n"
        await sock.write(f"{head}\r\n".encode())
        try:
            status, reason, pairs, rest = await _answer(sock)
        except HandshakeError as error:
            raise _no_answer(f"the proxy {proxy.authority}: {error}") from None
        if status // 100 != 2 or rest:
            raise HandshakeError(status, f"the proxy {proxy.authority} does not connect to {shown}:{target.port}: it answers "
                                         f"{status} {reason}".rstrip(), pairs, bytes(rest[:MAX_ANSWER]))

    async def _shake(self, sock, target, headers, redirects):
        """-> (WebSocket, its target), or (None, the target that a redirect leads to)"""
        key = _new_key()
        if target.credentials and not any(name.lower() == "authorization" for name, _ in headers):
            headers = [*headers, ("Authorization", _basic(target.credentials))]
        await sock.write(_request_head(target.path, target.authority, key, pairs=headers, subprotocols=self._subprotocols,
                                       origin=self._origin, deflate=self._deflate))
        status, reason, pairs, rest = await _answer(sock)
        if status != 101:
            location = next((value for name, value in pairs if name.lower() == "location"), None)
            if status in (301, 302, 303, 307, 308) and location is not None and redirects:
                return None, self._redirected(target, location, status, pairs)
            said = f"{target.text}: the answer is {status} {reason}".rstrip()
            if status // 100 == 3 and location is not None and self._redirects:
                said = f"{target.text}: more than {self._redirects} redirects in a row (redirects=)"
            raise HandshakeError(status, said, pairs, await _content(sock, pairs, rest))
        subprotocol, deflate = _check_response(status, pairs, key, subprotocols=self._subprotocols, deflate=self._deflate)
        if rest:
            sock.unread(rest)
        ws = WebSocket(sock, "client", deflate=deflate, subprotocol=subprotocol, response_headers=pairs, **self._options)
        return ws, target


async def _answer(sock):
    """The head of the next answer: (status, reason, pairs, what came after it)."""
    buffer, informed = bytearray(), 0
    while True:
        found = _response_head(buffer)
        if found is None:
            data = await sock.read()
            if not data:
                raise flowcoro_net.BrokenError(None, f"{sock!r}: the peer ended the connection after {len(buffer)} bytes of its "
                                                     f"answer to the handshake{'' if buffer else '. Does it want TLS (wss)?'}")
            buffer += data
            continue
        status, reason, pairs, length = found
        del buffer[:length]
        if not 100 <= status <= 199 or status == 101:
            return status, reason, pairs, buffer
        informed += 1
        if informed > 5:
            raise _no_answer("more than 5 informational responses before the answer")


async def _content(sock, pairs, rest):
    """The beginning of an answer's content, as it came."""
    length = next((value for name, value in pairs if name.lower() == "content-length"), "")
    most = min(int(length), MAX_ANSWER) if length.isascii() and length.isdecimal() and len(length) < 10 else MAX_ANSWER
    with contextlib.suppress(flowcoro_net.NetworkError), flowcoro.move_on_after(LINGER):
        while len(rest) < most and (data := await sock.read()):
            rest += data
    return bytes(rest[:most])


def _retry_after(pairs):
    """Seconds of a Retry-After, up to an hour; 0 if there is none, or a date, for which the clocks would have to be right."""
    value = next((value for name, value in pairs if name.lower() == "retry-after"), "")
    return min(float(value), 3600.0) if value.isascii() and value.isdecimal() and len(value) < 10 else 0.0


# ---- broadcast ------------------------------------------------------------------------------------------------

# Bytes that are kept for a member before it counts as slow: some seconds of a busy room, and a tenth of a gigabyte for 100 of
# them.
MAX_BACKLOG = 2**20


class _Batch:
    """What broadcast() gives a kernel's members leaves at the end of the turn: of several messages one write for each member."""

    all = weakref.WeakKeyDictionary()

    def __init__(self):
        self.members = []

    @classmethod
    def of_kernel(cls):
        kernel = flowcoro.current_kernel()
        return cls.all.get(kernel) or cls.all.setdefault(kernel, cls())

    async def send(self):
        members, self.members = self.members, []
        for count, ws in enumerate(members, 1):
            pieces = ws._unsent
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            ws._batched = False
            try:
                sent = ws._sock.write_nowait(data)
            except _GONE as error:                  # also because it was closed meanwhile: somebody may wait in _drain()
                ws._break_off(error)
            else:
                ws._flushed += sent
                if sent == len(data) and not (ws._secure and ws._sock.unsent):
                    ws._unsent, ws._flushing = None, False
                    ws._mark()
                    ws._wake()
                else:
                    ws._unsent = [memoryview(data)[sent:]]
                    ws._kept += ws._sock.unsent
                    flowcoro.spawn(ws._flush(), name="send what a WebSocket has kept")
            if not count % 1000:
                await flowcoro.checkpoint()


def broadcast(websockets, message, *, slow="skip", max_backlog=MAX_BACKLOG):
    """Send a message, str or bytes-like, to many. Never blocks. -> a list of those that did not get it.

    It leaves at the end of the turn, when the tasks that are ready have run: several messages together. What the system does not
    take then is kept for the member, and sent when it reads. A member for which more than `max_backlog` bytes are kept is slow:
    "skip": it does not get this message; "close": it is closed, with 1013 (try again later). Those that are closed are in the
    list, too. The message is encoded once for all servers' ends, and never compressed there. ValueError for another `slow`;
    TypeError, LocalProtocolError for what is no message.
    """
    if slow not in ("skip", "close"):
        raise ValueError(f"slow={slow!r}: give \"skip\" or \"close\"")
    frame, missed, batch = encode_message(message), [], _Batch.of_kernel()
    size = len(frame)
    for ws in list(websockets):
        if ws._batched and ws._kept - ws._flushed <= max_backlog:
            ws._unsent.append(frame)
            ws._kept += size
        elif ws._ready and ws._shares:
            if not batch.members:
                flowcoro.spawn(batch.send(), name="send what was broadcast")
            ws._unsent, ws._flushing, ws._batched, ws._ready = [frame], True, True, False
            ws._kept += size
            batch.members.append(ws)
        elif not (offered := ws._offer(message, frame, max_backlog)):
            missed.append(ws)
            if offered is None and slow == "close":
                ws.close_nowait(1013, "too slow")
    return missed
