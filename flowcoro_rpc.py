"""flowcoro_rpc 0.1.0: JSON-RPC 2.0 to the letter, in both directions over one connection: codec, server, client.

To vendor, copy: flowcoro.py, flowcoro_net.py, flowcoro_schema.py, flowcoro_rpc.py

Example:

    import flowcoro, flowcoro_rpc

    server = flowcoro_rpc.RpcServer()

    @server.method
    async def add(a: int, b: int) -> int:
        return a + b

    async def main():
        listening = await server.start_tcp_server(0)
        async with await flowcoro_rpc.RpcClient.connect(*listening.local) as client:
            print(await client.call("add", 1, 2), await client.call("add", a=3, b=4))
        await server.close()

    flowcoro.run(main())

Contents: constants · errors · framings · codec · methods · transports · peers: what goes out, calls, what comes in ·
server · client · pool

How it works:

A *framing* cuts a stream of bytes into messages; the *codec* turns a message into an event, and what is to be said into bytes.
Neither does input or output.

    receive_data(data)   what the peer has sent
    next_message()       the next whole message; NEED_DATA while there is too little
    read_message(data)   Request, Notification, Response, Batch, or Invalid with the code that answers it

A *Peer* is one end of one connection. Both ends are alike: each calls the other, and answers it. One task at a time reads. It
makes the first step of a handler itself, and most end in that; when one has to wait, the task stays with it, and another one
reads on:

    R1  one task reads; a call that waits has the task that has read it, and a call that does not wait costs none
    R2  a call ends exactly once: by the answer, by its timeout or cancellation here, or by the end of the connection,
        whichever is first; who takes it out of `_pending` settles it
    R3  what is answered in one turn leaves in one write; what the system does not take waits, and who reads stops reading while
        more than MAX_UNSENT bytes wait

Errors:

    flowcoro.FlowCoroError
      RpcError              the answer is an error: code, message, data; a handler raises it to answer with one
        ParseError          -32700  the message is no JSON
        InvalidRequest      -32600  … or no JSON-RPC
        MethodNotFound      -32601
        InvalidParams       -32602  data: what is wrong with them, as flowcoro_schema.Errors.first has it
        InternalError       -32603  data: {"reference": …}, which the server has reported with the error itself
        DeadlineExceeded    -32010  the server has ended it, as its time was up
        ShuttingDown        -32011  the server is being closed; it has not run
        AnswerTooLarge      -32012  it has run, and its result is more than a message may have
        Overloaded          -32013  there are too many calls of this connection; it has not run
        CallCancelled       -32800  by $/cancelRequest (the number is LSP's)
      ProtocolError         the peer has sent what cannot be a message, and the connection is closed; or, of a call, what came as
                            its answer is none
      ConnectionLost        the connection has ended before the answer; sent: whether the call may have run; also a
                            flowcoro_net.BrokenError
      flowcoro_net.LimitError     a message of our own is too large
      flowcoro.ClosedError  you closed it
    TimeoutError            a timeout= has passed
    what a policy= raises comes out as it is: Rejected of flowcoro_resilience

Sources: JSON-RPC 2.0 Specification (2013-01-04); Language Server Protocol 3.17, base protocol ($/cancelRequest, Content-Length);
D. J. Bernstein, Netstrings; OpenRPC 1.3; the leader/followers pattern (Schmidt et al., POSA2).

What it does not do: JSON-RPC 1.0; HTTP and WebSocket by itself (answer() and serve_messages() are what they mount).

SPDX-License-Identifier: MIT
"""

import collections
import contextvars
import dataclasses
import functools
import inspect
import itertools
import json
import math
import operator
import os
import random
import re
import socket
import types
import typing
import weakref

import flowcoro
import flowcoro_net
import flowcoro_schema

__version__ = "0.1.0"

__all__ = ["RpcServer", "RpcClient", "Peer", "Context", "Methods", "Newline", "ContentLength", "Netstring", "LengthPrefixed",
           "Concatenated", "NEED_DATA", "Request", "Notification", "Response", "Batch", "Invalid", "read_message",
           "encode_request", "encode_result", "encode_error", "RpcError", "ParseError", "InvalidRequest", "MethodNotFound",
           "InvalidParams", "InternalError", "DeadlineExceeded", "ShuttingDown", "AnswerTooLarge", "Overloaded", "CallCancelled",
           "ProtocolError", "ConnectionLost", "Backoff", "RpcPool", "Proxy", "StandardStreams"]

# ---- constants ------------------------------------------------------------------------------------------------

# Bytes of a message at most, either way. aiohttp takes bodies of 1 MiB too, gRPC messages of 4 MiB.
MAX_MESSAGE = 2**20

# Members of a batch at most (go-ethereum: 1,000). What the answers to one have at most is max_message, too.
MAX_BATCH = 1000

# Bytes of an answer that says only what has failed, with an id as most are. A batch for whose answers a message has no room is
# refused as a whole.
SHORT_ANSWER = 100

# Calls of one connection, and of a server, that run at once; more wait. HTTP/2 servers allow 100 to 250 streams.
MAX_CONCURRENT, MAX_CONCURRENT_IN_ALL = 100, 10_000

# Calls of one connection that wait for their turn; when there are so many, nothing more is read, for so many seconds. After that
# those that come are refused until there is room: what those that run may wait for (answers, cancellations, credit) comes behind.
MAX_WAITING, PAUSE = 100, 1.0

# Seconds that a call waits for its answer, and that one may run on the server, unless it is told otherwise.
CALL_TIMEOUT, DEADLINE = 30.0, 60.0

# Bytes that wait to be sent before who reads, and who calls, waits too.
MAX_UNSENT = 2**20

# Bytes that are written at once, and seconds in which the peer has to take them: else it is taken for dead.
WRITE_CHUNK, WRITE_TIMEOUT = 256 * 2**10, 60.0

# Seconds for the answer to a probe, which asks whether anybody is there when a call had none in time, and nothing else has come.
PROBE_TIMEOUT = 10.0

# Seconds in which nothing has come, after which a stream probes too. Without, it would wait for ever for who is gone without a
# word: nothing is sent that the system could find to be lost. WebSocket servers send a Ping every 20 to 30.
SILENCE = 30.0

# Options of TCP: after so many seconds of silence the system asks the other one whether that host is there, and again after so
# many, so often. It answers also while its program works. A call without a timeout learns so that nobody is there, and a server
# of clients that are; the default of systems is two hours.
KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}

# Seconds for the calls under way when a server is closed; flowcoro_net has the same.
DRAIN_TIMEOUT = 8.0

# Seconds that calls may go on when the peer sends no more: it is gone, or (`nc`) waits for the answers to what it has sent.
END_GRACE = 1.0

# Seconds for which we read on after a failure, so that the answer that tells why arrives (else the system may reset).
LINGER = 2.0

# Seconds that the end of a timeout or a deadline may be late: all calls of a kernel share one timer. A power of two, so that its
# multiples are exact.
GRAIN = 1 / 32

# A timeout of so many seconds, 30 years, is none: neither the clock nor its ticks overflow by any number that somebody sends.
MAX_SECONDS = 10**9

# Items of a stream that may be on the way to who takes them; and that one grant of credit may have.
STREAM_WINDOW, MAX_CREDIT = 32, 2**31 - 1

# Bytes of messages that are written before the turn is over: the peer works on them while we make more.
FLUSH = 32 * 2**10

# Bytes that one read asks for.
CHUNK = 64 * 2**10

# Bytes of the head of a Content-Length frame at most; what is sent has 20 to 90.
MAX_HEAD = 4096

# Notifications that are not for methods.
_CONTROLS = "$/cancelRequest", "$/stream"

_MISSING = flowcoro_schema.MISSING


# ---- errors ---------------------------------------------------------------------------------------------------

class RpcError(flowcoro.FlowCoroError):
    """An answer that is an error: `code` (int), `message` (str), `data` (a value of JSON, or None where there is none).

    A handler raises it to answer so. Codes from -32768 to -32000 are the specification's; your own are others. TypeError for a
    code or a message that JSON-RPC does not have. `sent`: False if the call has not run (ShuttingDown, Overloaded), as
    ConnectionLost has it; else None.
    """

    message = "Error"           # where its own is too long
    sent = None
    _received = False           # whether it is the answer to a call of ours

    def __init__(self, code, message, data=None):
        if not isinstance(code, int) or isinstance(code, bool) or not isinstance(message, str):
            raise TypeError(f"RpcError({code!r:.80}, {message!r:.80}): give a number, an int, and a text; data= takes the rest")
        code = int(code)            # of an enum
        super().__init__(f"{message} ({code})" if data is None else f"{message} ({code}): {data!r:.200}")
        self.code, self.message, self.data = code, message, data


class _Known(RpcError):
    """Of one code."""

    def __init__(self, data=None, message=None):
        super().__init__(self.code, message or self.message, data)


class ParseError(_Known):
    """The message is no JSON."""

    code, message = -32700, "Parse error"


class InvalidRequest(_Known):
    """The message is JSON, and no JSON-RPC; or it is beyond a limit."""

    code, message = -32600, "Invalid Request"


class MethodNotFound(_Known):
    """There is no method of this name."""

    code, message = -32601, "Method not found"


class InvalidParams(_Known):
    """The parameters are not those that the method takes."""

    code, message = -32602, "Invalid params"


class InternalError(_Known):
    """The handler has failed; `data["reference"]` is in the report of the server."""

    code, message = -32603, "Internal error"


class DeadlineExceeded(_Known):
    """The server has ended the call: it took too long."""

    code, message = -32010, "Deadline exceeded"


class ShuttingDown(_Known):
    """The server is being closed. The call has not run."""

    code, message, sent = -32011, "Shutting down", False


class AnswerTooLarge(_Known):
    """The call has run, and its result has more bytes than a message may have."""

    code, message = -32012, "Answer too large"


class Overloaded(_Known):
    """The server has too many calls of this connection. This one has not run."""

    code, message, sent = -32013, "Too many calls", False


class CallCancelled(_Known):
    """The call was cancelled by $/cancelRequest."""

    code, message = -32800, "Request cancelled"


_BY_CODE = {kind.code: kind for kind in (ParseError, InvalidRequest, MethodNotFound, InvalidParams, InternalError,
                                         DeadlineExceeded, ShuttingDown, AnswerTooLarge, Overloaded, CallCancelled)}


def _as_error(error):
    """The exception for the error member of an answer."""
    code, message, data = error["code"], error["message"], error.get("data")
    kind = _BY_CODE.get(code)
    error = RpcError(code, message, data) if kind is None else kind(data, message)
    error._received = True
    return error


class ProtocolError(flowcoro.FlowCoroError):
    """The peer has sent what cannot be cut into messages, or is larger than one may be. `code`: what the answer to it has."""

    code = InvalidRequest.code


class ConnectionLost(flowcoro_net.BrokenError):
    """The connection has ended before the answer.

    `sent`: False: the call has not run; True: all of it was sent, and it may have run; None: nobody knows.
    """

    def __init__(self, message, sent=None):
        super().__init__(None, message)
        self.sent = sent
        self._left = None           # seconds that the call would still have had


# ---- framings -------------------------------------------------------------------------------------------------
#
# Each cuts a stream into messages: bytes go in by receive_data(), and whole messages come out of next_message(). Whatever way the
# bytes were split, the messages are the same, and each byte is looked at a bounded number of times. The limit holds before
# anything is kept for a message that is larger.

class _Sign:
    """A thing that is only itself."""

    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


NEED_DATA = _Sign("NEED_DATA")


class _Framing:
    """What all have: `max_message` bytes at most, and what has come and was not yet given out, from `_at` on."""

    __slots__ = ("max_message", "_buffer", "_at", "_scan")

    def __init__(self, max_message=MAX_MESSAGE):
        self.max_message = max_message
        self._buffer = bytearray()
        self._at = 0            # where the next message begins
        self._scan = 0          # up to where its end was looked for

    def receive_data(self, data):
        """What the peer has sent."""
        if self._at:
            del self._buffer[:self._at]
            self._scan -= self._at
            self._at = 0
        self._buffer += data

    def receive_end(self):
        """The peer sends no more. ProtocolError if that is in the middle of a message."""
        if len(self._buffer) > self._at:
            raise ProtocolError(f"the peer ended in the middle of a message, after {len(self._buffer) - self._at} bytes of it")

    def _take(self, start, end, after):
        """The message from `start` to `end`; the next one begins at `after`."""
        self._at = self._scan = after
        return bytes(self._buffer[start:end])

    def _too_large(self, size):
        return ProtocolError(f"a message of {size} bytes, where max_message={self.max_message} are allowed; allow more there, or "
                             "send several")


class Newline(_Framing):
    """A message is a line (the default). Empty lines are skipped; the last one may have no end."""

    __slots__ = ("_data", "_later")

    # `_buffer` has the beginning of a line that goes on in `_data`, from `_at` on; `_later` has what has come after that.

    def __init__(self, max_message=MAX_MESSAGE):
        super().__init__(max_message)
        self._data, self._later = b"", collections.deque()

    # find() looks 16 bytes at a time or more, where split() goes byte by byte: 0.2 of 0.4 µs for a line of 1 KiB.

    def receive_data(self, data):
        """What the peer has sent."""
        data = data if data.__class__ is bytes else bytes(data)
        if self._later or self._at < len(self._data):
            if data:
                self._later.append(data)
        else:
            self._data, self._at = data, 0

    def next_message(self):
        """The next message, or NEED_DATA. ProtocolError when it is too large."""
        while True:
            data, start = self._data, self._at
            end = data.find(b"\n", start)
            if end < 0:
                if start < len(data):
                    size = len(self._buffer) + len(data) - start
                    if size > self.max_message:
                        raise self._too_large(f"at least {size}")
                    self._buffer += data[start:]
                self._data, self._at = self._later.popleft() if self._later else b"", 0
                if not self._data:
                    return NEED_DATA
                continue
            size = end - start + len(self._buffer)
            if size > self.max_message:
                raise self._too_large(size)
            line, self._at = data[start:end], end + 1
            if size > end - start:
                self._buffer += line
                line = bytes(self._buffer)
                self._buffer.clear()
            if line and line != b"\r":
                return line

    def receive_end(self):
        """The peer sends no more: what there is, is a line."""
        self.receive_data(b"\n")

    @staticmethod
    def frame(message):
        """A message as bytes to send; it has no newline."""
        return message + b"\n"


class _Counted(_Framing):
    """What has the length of a message before it: `_size` is that of the one that has begun, or None."""

    __slots__ = ("_size",)

    # Bytes after a message.
    _AFTER = 0

    def __init__(self, max_message=MAX_MESSAGE):
        super().__init__(max_message)
        self._size = None

    def next_message(self):
        """The next message, or NEED_DATA. ProtocolError when what comes is none, or too large."""
        if self._size is None:
            self._size = self._read_size()
            if self._size is None:
                return NEED_DATA
            if self._size > self.max_message:
                raise self._too_large(self._size)
        end = self._at + self._size
        if len(self._buffer) < end + self._AFTER:
            return NEED_DATA
        self._size = None
        return self._take(self._at, end, end + self._AFTER)

    def receive_end(self):
        """The peer sends no more. ProtocolError if that is in the middle of a message."""
        if self._size is not None or len(self._buffer) > self._at:
            raise ProtocolError(f"the peer ended in the middle of a message, after {len(self._buffer) - self._at} bytes of it")


_BARE_LF = re.compile(rb"(?<!\r)\n").search
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e]*)").fullmatch
_BEGINS_HEAD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]*(?::|\Z)").match
_UTF8 = re.compile(rb"charset[ \t]*=[ \t]*\"?utf-?8\"?[ \t]*(?:;|\Z)", re.IGNORECASE).search


class ContentLength(_Counted):
    """A head, as HTTP's, before each message: that of the Language Server Protocol."""

    __slots__ = ()

    def _read_size(self):
        buffer, start = self._buffer, self._at
        end = buffer.find(b"\r\n\r\n", max(start, self._scan - 3), start + MAX_HEAD)
        if end < 0:
            self._check_begin(bytes(buffer[start:start + 60]))
            if _BARE_LF(buffer, max(start, self._scan - 1), start + MAX_HEAD):
                raise ProtocolError("a line of the head of a message ends without CRLF")
            if len(buffer) - start >= MAX_HEAD:
                raise ProtocolError(f"a head of more than {MAX_HEAD} bytes")
            self._scan = len(buffer)
            return None
        size = None
        for line in bytes(buffer[start:end]).split(b"\r\n"):
            field = _FIELD(line)
            if field is None:
                self._check_begin(bytes(buffer[start:start + 60]))
                raise ProtocolError(f"a line of the head is no field: {line[:60]!r}")
            name, value = field[1].lower(), field[2].strip()
            if name == b"content-length":
                if size is not None or not value.isdigit() or len(value) > 18:
                    raise ProtocolError(f"the length of a message is {value[:60]!r}{', after another one' * (size is not None)}")
                size = int(value)
            elif name == b"content-type" and b"charset" in value.lower() and not _UTF8(value):
                raise ProtocolError(f"messages are in UTF-8, not in {value[:60]!r}")
        if size is None:
            raise ProtocolError("the head of a message has no Content-Length")
        self._at = self._scan = end + 4
        return size

    @staticmethod
    def _check_begin(data):
        """Tell soon who speaks something else. Which field comes first is his choice."""
        if not _BEGINS_HEAD(data):
            raise ProtocolError(f"no head of a message begins with {data[:20]!r}, but with a field: \"Content-Length: …\"")

    @staticmethod
    def frame(message):
        """A message as bytes to send."""
        return b"Content-Length: %d\r\n\r\n%b" % (len(message), message)


class Netstring(_Counted):
    """A message is `length:bytes,`, the length in decimal digits."""

    __slots__ = ()
    _AFTER = 1

    def _read_size(self):
        buffer, start = self._buffer, self._at
        most = len(str(self.max_message)) if self.max_message != math.inf else 18
        end = buffer.find(b":", start, start + most + 1)
        digits = bytes(buffer[start:end if end >= 0 else start + most + 1])
        if digits and (not digits.isdigit() or digits[:1] == b"0" != digits) or end == start:
            raise ProtocolError(f"no netstring begins with {digits[:20]!r}")
        if end < 0:
            if len(digits) > most:
                raise self._too_large(f"{digits.decode()}…")
            return None
        self._at = end + 1
        return int(digits)

    def next_message(self):
        """The next message, or NEED_DATA. ProtocolError when what comes is none, or too large."""
        message = super().next_message()
        if message is not NEED_DATA and self._buffer[self._at - 1] != 0x2C:
            raise ProtocolError("a netstring does not end with a comma")
        return message

    @staticmethod
    def frame(message):
        """A message as bytes to send."""
        return b"%d:%b," % (len(message), message)


class LengthPrefixed(_Counted):
    """The length of a message in four bytes, the most significant first, before it."""

    __slots__ = ()

    def _read_size(self):
        if len(self._buffer) - self._at < 4:
            return None
        self._at += 4
        return int.from_bytes(self._buffer[self._at - 4:self._at], "big")

    @staticmethod
    def frame(message):
        """A message as bytes to send."""
        return len(message).to_bytes(4, "big") + message


# What ends a step of the scan: outside of a value, in one, in a string, in a word at the top (1, true, or what is no JSON).
_BEGINS = re.compile(rb"[^ \t\r\n]").search
_NESTS = re.compile(rb'["\[\]{}]').search
_QUOTES = re.compile(rb'["\\]').search
_WORD_ENDS = re.compile(rb'[ \t\r\n"\[{]').search


class Concatenated(_Framing):
    """JSON values one after the other, with whitespace between them, or nothing.

    Where a value ends is seen from its brackets and strings alone. What has no end, such as a string that is not closed, is
    waited for: no other framing recovers as badly from what is no JSON.
    """

    __slots__ = ("_depth", "_in_string", "_in_word")

    def __init__(self, max_message=MAX_MESSAGE):
        super().__init__(max_message)
        self._depth, self._in_string, self._in_word = 0, False, False

    def next_message(self):
        """The next message, or NEED_DATA. ProtocolError when it is too large."""
        end = self._find_end()
        size = (len(self._buffer) if end is None else end) - self._at
        if size > self.max_message:
            raise self._too_large(f"{'at least ' * (end is None)}{size}")
        return NEED_DATA if end is None else self._take(self._at, end, end)

    def _find_end(self):
        """Where the value ends; None if it has not yet. `_scan` is where the search goes on."""
        buffer = self._buffer
        if not self._depth and not self._in_string and not self._in_word:
            found = _BEGINS(buffer, self._at)
            self._at = self._scan = len(buffer) if found is None else found.start()
            if found is None:
                return None
            self._in_word = found[0] not in b'"[{'
        while True:
            search = _QUOTES if self._in_string else _WORD_ENDS if self._in_word else _NESTS
            found = search(buffer, self._scan)
            if found is None:
                self._scan = len(buffer)
                return None
            at, byte = found.start(), found[0]
            if self._in_word:
                self._in_word = False
                return at
            if byte == b"\\":
                if at + 1 == len(buffer):       # what it escapes is still to come
                    self._scan = at
                    return None
                self._scan = at + 2
                continue
            self._scan = at + 1
            if byte == b'"':
                self._in_string = not self._in_string
            else:
                self._depth = max(self._depth + (1 if byte in b"[{" else -1), 0)
            if not self._depth and not self._in_string:
                return self._scan

    def receive_end(self):
        """The peer sends no more: a number at the end is whole now. ProtocolError if that is in the middle of another value."""
        if self._in_word:
            self._buffer += b" "
        elif self._depth or self._in_string:
            super().receive_end()

    @staticmethod
    def frame(message):
        """A message as bytes to send: itself and a newline, which this framing skips and some readers wait for."""
        return message + b"\n"


# ---- codec ----------------------------------------------------------------------------------------------------
#
# A message is judged by read_message(); of a batch each member alone. What has a "method" is a request; else what has a "result"
# or an "error" is an answer. An answer that is none is not answered: two ends would tell each other of it for ever. That holds
# also for what looks like an answer, and is too deep, or has NaN or a name twice: whose call it is can be seen.

class Request(typing.NamedTuple):
    """A call: it has an id (str, int, float or None), and wants an answer. params: a list, a dict, or None where there are none.

    more: the whole object, for members that are not the specification's. batch() takes it without an id.
    """

    method: str
    params: object = None
    id: object = None
    more: dict = {}


class Notification(typing.NamedTuple):
    """A call that wants no answer."""

    method: str
    params: object = None
    more: dict = {}


class Response(typing.NamedTuple):
    """An answer: a result, or error, a dict with code, message and perhaps data."""

    id: object
    result: object
    error: object


class Batch(typing.NamedTuple):
    """Several in one message: a list of the other events."""

    members: list


class Invalid(typing.NamedTuple):
    """What is no such thing: the id, where there is a valid one, the code to answer with, and why; code is None for what is
    not answered, as it would be an answer to an answer: the call of that id has failed."""

    id: object
    code: object
    why: str


_ID_TYPES = (int, str, float, type(None))
_new = tuple.__new__        # 0.2 µs less than to call a NamedTuple
_members_of_call = operator.itemgetter("jsonrpc", "method", "params", "id")
_members_of_result = operator.itemgetter("jsonrpc", "result", "id")


def _judge(value):
    """The event of one object."""
    if value.__class__ is not dict:
        return Invalid(None, InvalidRequest.code, "it is no object")
    try:                                    # what nearly all are, and have nothing else: 0.3 µs less
        if len(value) == 4:
            version, method, params, number = _members_of_call(value)
            if version == "2.0" and method.__class__ is str and params.__class__ is list and number.__class__ is int:
                return _new(Request, (method, params, number, value))
        elif len(value) == 3:
            version, result, number = _members_of_result(value)
            if version == "2.0" and number.__class__ is int:
                return _new(Response, (number, result, None))
    except KeyError:
        pass
    if "method" not in value and ("result" in value or "error" in value):
        return _judge_response(value)
    number = value.get("id", _MISSING)
    if number is not _MISSING and number.__class__ not in _ID_TYPES:
        return Invalid(None, InvalidRequest.code, "the id is neither a string, nor a number, nor null")
    method, params, why = value.get("method"), value.get("params", _MISSING), None
    if value.get("jsonrpc") != "2.0":
        why = "jsonrpc is not \"2.0\""
    elif method.__class__ is not str:
        why = "the method is no string"
    elif params is _MISSING:
        params = None
    elif params.__class__ is not list and params.__class__ is not dict:
        why = "params is neither an array nor an object"
    if "result" in value or "error" in value:
        why = "it has a method and a result"
    if why is not None:
        return Invalid(None if number is _MISSING else number, InvalidRequest.code, why)
    if number is _MISSING:
        return Notification(method, params, value)
    return _new(Request, (method, params, number, value))


def _judge_response(value):
    number, error, why = value.get("id", _MISSING), value.get("error", _MISSING), None
    if value.get("jsonrpc") != "2.0":
        why = "jsonrpc is not \"2.0\""
    elif number.__class__ not in _ID_TYPES:
        why = "the id is neither a string, nor a number, nor null, or there is none"
    elif error is _MISSING:
        return _new(Response, (number, value["result"], None))
    elif "result" in value:
        why = "it has a result and an error"
    elif error.__class__ is not dict or type(error.get("code")) is not int or type(error.get("message")) is not str:
        why = "the error is no object with a code and a message"
    else:
        return Response(number, None, error)
    return Invalid(number if number.__class__ in _ID_TYPES else None, None, why)


def _judge_refused(data, why):
    """The event of a message that load_json() does not take: of a call that is answered by it, that this has failed."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return Invalid(None, ParseError.code, why)
    members = value if value.__class__ is list else [value]
    if not members or not all(one.__class__ is dict and "method" not in one and ("result" in one or "error" in one)
                              for one in members):
        return Invalid(None, ParseError.code, why)
    events = [Invalid(one.get("id") if one.get("id").__class__ in _ID_TYPES else None, None, why) for one in members]
    return Batch(events) if value is members else events[0]


def read_message(data, *, max_depth=flowcoro_schema.JSON_DEPTH, max_batch=MAX_BATCH):
    """The event of a message (bytes or str): Request, Notification, Response, Batch or Invalid. Never fails.

    max_depth: arrays and objects in each other. max_batch: members of a batch.
    """
    try:
        value = flowcoro_schema.load_json(data, max_depth=max_depth)
    except flowcoro_schema.JsonError as error:
        return _judge_refused(data, str(error))
    if value.__class__ is not list:
        return _judge(value)
    if not value:
        return Invalid(None, InvalidRequest.code, "an empty batch")
    if len(value) > max_batch:
        return Invalid(None, InvalidRequest.code, f"a batch of {len(value)}, where max_batch={max_batch} are allowed")
    return Batch([_judge(member) for member in value])


@functools.lru_cache(1024)
def _json_of_name(name):
    return flowcoro_schema.encode_json(name)


def _json_of_id(number):
    return str(number) if number.__class__ is int else flowcoro_schema.encode_json(number)


def encode_request(method, params=None, id=_MISSING, more=None):
    """A request as bytes; without an id a notification. params: a list, a dict, or None for none.

    more: a dict of members that are not the specification's. ValueError for NaN and infinities, TypeError for what has no JSON.
    """
    if not isinstance(method, str):
        raise TypeError(f"method {method!r:.80}: give its name, a str")
    if params.__class__ is list and len(params) == 1:           # encode_json() has a quicker way for a text by itself
        given = f',"params":[{flowcoro_schema.encode_json(params[0])}]'
    else:
        given = "" if params is None else f',"params":{flowcoro_schema.encode_json(params)}'
    if id is not _MISSING:
        given += f',"id":{_json_of_id(id)}'
    if more:
        given += "," + flowcoro_schema.encode_json(more)[1:-1]
    return f'{{"jsonrpc":"2.0","method":{_json_of_name(method)}{given}}}'.encode()


def encode_result(id, result):
    """An answer as bytes. ValueError for NaN and infinities, TypeError for what has no JSON."""
    number = id if id.__class__ is int else _json_of_id(id)         # nearly all are, and a call costs 1 % of an answer
    return f'{{"jsonrpc":"2.0","result":{flowcoro_schema.encode_json(result)},"id":{number}}}'.encode()


def encode_error(id, code, message, data=None):
    """An answer that is an error, as bytes. Errors as encode_result()."""
    given = "" if data is None else f',"data":{flowcoro_schema.encode_json(data)}'
    return (f'{{"jsonrpc":"2.0","error":{{"code":{code},"message":{flowcoro_schema.encode_json(message)}{given}}},'
            f'"id":{_json_of_id(id)}}}').encode()


# ---- methods --------------------------------------------------------------------------------------------------

class _Method:
    """A function that is called from outside: how parameters are bound to its signature, before it is called."""

    __slots__ = ("name", "function", "wants", "is_stream", "fields", "required", "most", "named", "takes_named", "rest",
                 "returns", "is_async", "_required_names", "_types", "_takers", "_own")

    def __init__(self, name, function, said):
        self.name, self.function = name, function
        inner = function
        while isinstance(inner, functools.partial):
            inner = inner.func
        if not inspect.isroutine(inner) and not isinstance(inner, type):
            inner = type(inner).__call__
        self.is_stream = inspect.isasyncgenfunction(inspect.unwrap(inner))          # also below a decorator
        # Whether to call it runs nothing of it yet; a callable object, say, may do so, and then give a coroutine.
        called = getattr(function, "__func__", function)
        self.is_async = isinstance(called, types.FunctionType) and bool(called.__code__.co_flags & inspect.CO_COROUTINE)
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except ValueError:
            raise TypeError(f"{said}: {function!r} does not say what parameters it takes; give a lambda around it") from None
        hints = _hints(inner, function, said)
        self.returns = hints.get("return", inspect.Parameter.empty)
        self.wants = self._wanted(parameters, hints)
        if self.wants is not None:
            del parameters[0]
        self.fields, self.named, self.rest, self.takes_named = [], {}, None, None       # by place, by name, *rest, **rest
        for parameter in parameters:
            self._add(parameter, hints.get(parameter.name), f"{said}: {parameter.name}")
        # Names that **rest does not take: of self, and of the peer or context.
        self._own = () if self.takes_named is None else {
            one.name for one in inspect.signature(getattr(function, "__func__", function)).parameters.values()
            if one.kind is one.POSITIONAL_OR_KEYWORD} - self.named.keys()
        self.required = sum(field.default is _MISSING for field in self.fields)
        self.most = len(self.fields) if self.rest is None else math.inf
        self._required_names = [name for name, field in self.named.items() if field.default is _MISSING]
        only_named = [name for name in self._required_names if self.named[name] not in self.fields]
        only_placed = [field.name for field in self.fields if field.default is _MISSING and field.name not in self.named]
        if only_named and only_placed:
            raise TypeError(f"{said}: nobody can call it: {only_placed[0]} is given by its place, {only_named[0]} by its name, "
                            "and JSON-RPC gives all of them one way")
        # What the value in each place may be, None for anything; where one is more than looked at, None instead of the list.
        self._types = [_plain_types(field.kind) for field in self.fields]
        if only_named or self.rest is not None or False in self._types:
            self._types = None
        # Then what takes the value in each place, or raises ValueError; None where there is more to it.
        self._takers = None if only_named or self.rest is not None else [_taker(field.kind) for field in self.fields]

    @staticmethod
    def _wanted(parameters, hints):
        """"peer" or "context" if the first parameter asks for that."""
        if parameters and parameters[0].kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            hint = hints.get(parameters[0].name)
            if hint is Peer or hint is None and parameters[0].name == "peer":
                return "peer"
            if hint is Context or hint is None and parameters[0].name == "context":
                return "context"
        return None

    def _add(self, parameter, hint, said):
        default = _MISSING if parameter.default is parameter.empty else parameter.default
        kind = flowcoro_schema.Anything() if hint is None else flowcoro_schema.kind_of(hint, said)
        field = flowcoro_schema.Field(parameter.name, kind, flowcoro_schema.description_of(hint), default)
        if parameter.kind is parameter.VAR_POSITIONAL:
            self.rest = field
        elif parameter.kind is parameter.VAR_KEYWORD:
            self.takes_named = field
        else:
            if parameter.kind is not parameter.KEYWORD_ONLY:
                self.fields.append(field)
            if parameter.kind is not parameter.POSITIONAL_ONLY:
                self.named[parameter.name] = field

    def bind(self, params):
        """(list, dict or None) to call the function with; the list may be `params` itself. InvalidParams."""
        if params is None:
            params = []
        if params.__class__ is list and self._types is not None and self.required <= len(params) <= self.most:
            for value, kinds in zip(params, self._types):
                if kinds is not None and value.__class__ not in kinds:
                    break                   # below once more, to say what is wrong
            else:
                return params, None
        elif params.__class__ is list and self._takers is not None and self.required <= len(params) <= self.most:
            try:
                return [value if take is None else take(value) for take, value in zip(self._takers, params)], None
            except (ValueError, ArithmeticError):
                pass                        # once more, to say what is wrong
        errors = flowcoro_schema.Errors(place="params")
        bound = self._bind_places(params, errors) if params.__class__ is list else self._bind_names(params, errors)
        if errors.count:
            raise InvalidParams(errors.first)
        return bound

    def _bind_places(self, params, errors):
        values = []
        for place, value in enumerate(params):
            field = self.fields[place] if place < len(self.fields) else self.rest
            if field is None:
                errors.add((None, place), "no parameter in this place", value)
            else:
                values.append(field.kind.check(value, (None, place), errors))
        for field in self.fields[len(params):self.required]:
            errors.add((None, field.name), field.kind.expected, _MISSING)
        for name in self._required_names:
            if self.named[name] not in self.fields:
                errors.add((None, name), f"{self.named[name].kind.expected}, by its name", _MISSING)
        return values, None

    def _bind_names(self, params, errors):
        values = {}
        for name, value in params.items():
            field = self.named.get(name, self.takes_named)
            if field is None or name in self._own:
                errors.add((None, name), "no parameter of this name", value)
            else:
                values[name] = field.kind.check(value, (None, name), errors)
        for name in self._required_names:
            if name not in params:
                errors.add((None, name), self.named[name].kind.expected, _MISSING)
        for field in self.fields:
            if field.name not in self.named and field.default is _MISSING:
                errors.add((None, field.name), "to be given by its place", _MISSING)
        return [], values


def _plain_types(kind):
    """The types of what a kind takes as it is, None for all; False for one that converts, or looks into the value."""
    if isinstance(kind, flowcoro_schema.Anything):
        return None
    return kind.types if isinstance(kind, flowcoro_schema.Scalar) and kind.convert is None else False


def _taker(kind):
    """A function that takes a value for a kind, or raises ValueError or ArithmeticError; None for what takes anything."""
    if isinstance(kind, flowcoro_schema.Anything):
        return None
    return kind.take if isinstance(kind, flowcoro_schema.Scalar) else kind.load


def _hints(inner, function, said):
    """{name, or "return": annotation}. TypeError when one has a name that is not there."""
    signature = inspect.signature(function)
    given = {one.name: one.annotation for one in signature.parameters.values() if one.annotation is not one.empty}
    if signature.return_annotation is not signature.empty:
        given["return"] = signature.return_annotation
    try:
        return typing.get_type_hints(types.SimpleNamespace(__annotations__=given),
                                     getattr(inspect.unwrap(inner), "__globals__", {}), include_extras=True)
    except (NameError, SyntaxError) as error:
        raise TypeError(f"{said}: {error}; annotations are looked up in the module of the function") from None


class Methods:
    """What can be called from outside, by name. An RpcServer is one; a client is given one for what the server calls."""

    def __init__(self):
        self._methods, self._around = {}, []
        self._title, self._version, self._discovers = "JSON-RPC", "1", False

    def method(self, function=None, *, name=None):
        """Decorates a function: `@server.method`, or `@server.method("name")`, and gives it back.

        Async functions, async generators (streams), and plain functions, which are called in the kernel's thread and so must not
        block. A first parameter that is annotated with Peer or Context, or is named peer or context, gets that, and is no
        parameter for the caller. Annotations of the others are checked, see flowcoro_schema.kind_of(). TypeError for what cannot
        be called, and for annotations that no JSON is made into; ValueError for a name that is taken, or begins with "rpc.", and
        for "$/cancelRequest" and "$/stream", which never get here.
        """
        if isinstance(function, str) or function is None:
            return functools.partial(self.method, name=function or name)
        if not callable(function):
            raise TypeError(f"method({function!r}): give a function")
        name = name or getattr(function, "__name__", None)
        if not isinstance(name, str):
            raise TypeError(f"method({function!r}): it has no name; give name=, a str")
        said = f"method {name!r}"
        if name.startswith("rpc."):
            raise ValueError(f"{said}: names that begin with \"rpc.\" are reserved by JSON-RPC 2.0, section 8")
        if name in _CONTROLS:
            raise ValueError(f"{said}: notifications of this name belong to the protocol; choose another one")
        if name in self._methods:
            raise ValueError(f"{said} is there already")
        self._methods[name] = _Method(name, function, said)
        return function

    def add(self, thing, *, prefix=""):
        """Add the public methods of an object: each under `prefix` and its name; "math.add" for prefix="math.". Errors as
        method(); TypeError for a class whose methods need an object."""
        for name in dir(thing):
            found = inspect.getattr_static(thing, name, None)
            if name.startswith("_") or isinstance(found, (property, functools.cached_property)):        # which would be asked
                continue
            if isinstance(thing, type) and isinstance(found, types.FunctionType):
                raise TypeError(f"add({thing!r}): {name} needs an object; give one of this class")
            if inspect.isroutine(getattr(thing, name)):
                self.method(getattr(thing, name), name=prefix + name)

    def middleware(self, function):
        """Decorates `async def around(context, call_next)`: it is called around each call, the first added the outermost.

        `await call_next(context)` gives what the handler has returned (of a stream the async generator); what this returns is the
        answer. Parameters have been bound and checked by then. TypeError for what cannot be called.
        """
        if not callable(function):
            raise TypeError(f"middleware({function!r}): give a function")
        self._around.append(function)
        return function

    def _find(self, name):
        """The _Method of a name. MethodNotFound."""
        method = self._methods.get(name)
        if method is None:
            if name == "rpc.discover" and self._discovers:
                return _Method(name, self.discover, "rpc.discover")
            raise MethodNotFound
        return method

    def discover(self):
        """The OpenRPC 1.3 document of the methods, made from signatures and docstrings: what "rpc.discover" answers."""
        schemas = flowcoro_schema.Schemas()
        methods = [_openrpc_method(method, schemas) for _, method in sorted(self._methods.items())]
        document = {"openrpc": "1.3.2", "info": {"title": self._title, "version": self._version}, "methods": methods}
        if schemas.schemas:
            document["components"] = {"schemas": schemas.schemas}
        return document


def _openrpc_method(method, schemas):
    """A Method Object of OpenRPC."""
    function = method.function
    while isinstance(function, functools.partial):      # whose own docstring is that of its class
        function = function.func
    summary, _, rest = inspect.cleandoc(inspect.getdoc(function) or "").partition("\n")
    structure, fields = _param_structure(method)
    document = {"name": method.name, "params": [_descriptor(field, schemas) for field in fields],
                "result": {"name": "result", "schema": _result_schema(method, schemas)}, "paramStructure": structure}
    if summary:
        document["summary"] = summary
    if rest.strip():
        document["description"] = rest.strip()
    return document


def _param_structure(method):
    """How parameters are given, and those that can be given so: those that must be come first, as OpenRPC wants it."""
    placed, named = method.fields, sorted(method.named.values(), key=lambda field: field.default is not _MISSING)
    only_placed = [field for field in placed if field.name not in method.named]
    only_named = [field for field in named if field not in placed]
    if not only_placed and not only_named:
        return "either", placed
    if not only_named or any(field.default is _MISSING for field in only_placed):
        return "by-position", placed
    return "by-name", named


def _descriptor(field, schemas):
    schema = field.schema(schemas)
    described = {"description": schema.pop("description")} if field.description else {}
    return {"name": field.name, "required": field.default is _MISSING, **described, "schema": schema}


def _result_schema(method, schemas):
    """The schema of what it returns, of a stream of all items together; {} where no annotation says so."""
    returned = method.returns
    if method.is_stream:
        returned = list[typing.get_args(returned)[:1] or (typing.Any,)]
    try:
        return flowcoro_schema.kind_of(returned).schema(schemas)
    except TypeError:
        return {}


class Context:
    """What a handler may want to know of its call.

    `peer`: the Peer that calls; of a message by itself (HTTP) one that cannot be called back. `method`, `params`, `id` (None for
    a notification). `headers`: a dict of texts: those that were given to answer() or serve_messages(), and, where there is none
    of that name, those that came with the call ("$/context"), which its caller has chosen; "traceparent" is that of W3C. `state`:
    a dict for middleware.
    """

    __slots__ = ("peer", "method", "params", "id", "headers", "state")

    def __init__(self, peer, request):
        self.peer, self.method, self.params, self.id = peer, request.method, request.params, getattr(request, "id", None)
        more = request.more.get("$/context")
        self.headers, self.state = {**_texts(more), **peer.headers}, {}


def _texts(more):
    """The texts of a "$/context" member."""
    return {name: text for name, text in more.items() if text.__class__ is str} if more.__class__ is dict else {}


# ---- transports -----------------------------------------------------------------------------------------------
#
# What a Peer reads from, by `data = await read()`, and writes to: a framing with a place to write to.

class _SocketWire:
    """Messages over a Socket, cut by a framing."""

    def __init__(self, sock, framing):
        self._sock, self.frame, self.max_message, self._is_plain = sock, framing.frame, framing.max_message, sock.tls is None
        self.next_message, self.receive_data, self.receive_end = framing.next_message, framing.receive_data, framing.receive_end
        self.read = functools.partial(sock.read, CHUNK)
        raw = getattr(sock, "raw", None)
        if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
            self._keep_alive(raw)

    @staticmethod
    def _keep_alive(raw):
        try:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEP_ALIVE.items():
                if hasattr(socket, name):               # macOS calls the first one by the second name
                    raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        except OSError:             # it is lost already, which reading will tell; or the system does not know them
            pass

    def write_nowait(self, frames):
        """Write frames; returns how many bytes the system has taken: 0 with TLS, where write() waits for that."""
        if not self._is_plain:
            return 0
        return self._sock.write_nowait(frames[0] if len(frames) == 1 else b"".join(frames))

    async def write(self, frames, progress):
        """Write frames; progress(begun, taken) is told how many bytes a write has begun with, and the system has taken."""
        data = memoryview(frames[0] if len(frames) == 1 else b"".join(frames))
        for start in range(0, len(data), WRITE_CHUNK):
            part = data[start:start + WRITE_CHUNK]
            progress(start + len(part), start)
            with flowcoro.timeout(WRITE_TIMEOUT):
                await self._sock.write(part)
        progress(len(data), len(data))

    async def linger(self):
        """After what was wrong: end what we send, and read until the peer has seen why."""
        with flowcoro.move_on_after(LINGER):
            await self._sock.shutdown_write()
            while await self._sock.read(CHUNK):
                pass

    async def close(self):
        await self._sock.close()

    def close_nowait(self):
        self._sock.close_nowait()

    def __str__(self):
        return repr(self._sock)


class StandardStreams:
    """Standard input and output as a connection: `await server.serve_connection(StandardStreams(), framing=ContentLength)` is
    what a client talks to that has started this program, as editors do. What prints goes to standard error, then.
    """

    tls = None

    def __init__(self):
        self._in, self._out, self._closed = 0, 1, False
        self._blocked = os.get_blocking(self._in), os.get_blocking(self._out)
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)

    async def _wait(self, wait, number):
        try:
            await wait(number)
        except PermissionError:             # a file: always ready
            await flowcoro.checkpoint()

    async def read(self, max_bytes=CHUNK):
        """From 1 to `max_bytes` bytes; b"" at the end. BrokenError when it cannot be read. Cancelled: nothing consumed."""
        while True:
            await self._wait(flowcoro.wait_readable, self._in)
            try:
                return os.read(self._in, max_bytes)
            except BlockingIOError:
                pass
            except OSError as error:            # a terminal that is gone
                raise flowcoro_net.BrokenError(error.errno, f"standard input: {error.strerror}") from error

    def write_nowait(self, data):
        """Nothing: write() does it."""
        return 0

    async def write(self, data):
        """Write all of it. BrokenError when nobody reads it any more. Cancelled: an unknown part was written."""
        view = memoryview(data)
        while view:
            await self._wait(flowcoro.wait_writable, self._out)
            try:
                view = view[os.write(self._out, view):]
            except BlockingIOError:
                pass
            except OSError as error:
                raise flowcoro_net.BrokenError(error.errno, f"standard output: {error.strerror}") from error

    async def shutdown_write(self):
        """Nothing: the end of the program says it."""

    async def close(self):
        """Leave both as they were found."""
        self.close_nowait()

    def close_nowait(self):
        """Leave both as they were found."""
        if not self._closed:
            self._closed = True
            os.set_blocking(self._in, self._blocked[0])
            os.set_blocking(self._out, self._blocked[1])

    def __repr__(self):
        return "<StandardStreams>"


class _MessageWire:
    """Messages that come whole, by `await receive()`, and go by `await send(text)`: a WebSocket, say."""

    def __init__(self, messages, max_message):
        self._messages, self._next, self.max_message = messages, NEED_DATA, max_message

    @staticmethod
    def frame(message):
        return message

    def next_message(self):
        message, self._next = self._next, NEED_DATA
        return message

    async def read(self):
        try:
            message = await self._messages.receive()
        except flowcoro_net.BrokenError as error:
            if getattr(error, "code", None) in (1000, 1001, 1005):      # a WebSocket that was closed in order
                return b""
            raise
        except flowcoro.ClosedError:
            raise
        except Exception as error:
            raise self._broken(error) from error
        if message is None:
            return b""
        return (message.encode() if isinstance(message, str) else bytes(message)) or b" "       # no end, and no JSON either

    def _broken(self, error):
        """What the transport has raised, as the end of the connection; what is no error of transports is reported, too."""
        if not isinstance(error, (flowcoro.FlowCoroError, OSError)):
            flowcoro.report_error(error, f"the transport {self} has failed, and its connection has ended", "flowcoro_rpc")
        return flowcoro_net.BrokenError(None, f"{self}: {type(error).__name__}: {error}")

    def receive_data(self, message):
        if len(message) > self.max_message:
            raise ProtocolError(f"a message of {len(message)} bytes, where max_message={self.max_message} are allowed")
        self._next = message

    def receive_end(self):
        pass

    def write_nowait(self, frames):
        return 0

    async def write(self, frames, progress):
        taken = 0
        for frame in frames:
            progress(taken + len(frame), taken)
            try:
                with flowcoro.timeout(WRITE_TIMEOUT):
                    await self._messages.send(bytes(frame).decode())
            except (flowcoro.FlowCoroError, TimeoutError):
                raise
            except Exception as error:
                raise self._broken(error) from error
            taken += len(frame)
        progress(taken, taken)

    async def linger(self):
        pass

    async def close(self):
        pass                    # it is the caller's

    def close_nowait(self):
        pass

    def __str__(self):
        return repr(self._messages)


class _OneWire:
    """A single message, and what answers it: HTTP."""

    def __init__(self, message, max_message):
        self._next, self.max_message, self.answers = message, max_message, []

    @staticmethod
    def frame(message):
        return message

    def next_message(self):
        message, self._next = self._next, NEED_DATA
        return message

    async def read(self):
        return b""

    def receive_end(self):
        pass

    def receive_data(self, data):
        pass

    def write_nowait(self, frames):
        self.answers += frames
        return sum(map(len, frames))

    async def write(self, frames, progress):
        taken = self.write_nowait(frames)
        progress(taken, taken)

    async def linger(self):
        pass

    async def close(self):
        pass

    def close_nowait(self):
        pass

    def __str__(self):
        return "<a message by itself>"


# ---- peers: what goes out -------------------------------------------------------------------------------------
#
# Frames wait in `_out`. Who has reason to think that no other frame comes in this turn writes them at once (_flush); else the
# writer does, a task which is woken when the first one comes (_flush_later), and so has its turn after all that are ready now.
# `_queued`, `_begun`, `_written` count bytes: of frames that have come, that a write has begun with, that the system has taken;
# so it is known of each call whether none of it was sent, or all.

_current_task = flowcoro.current_task


class _Outgoing:
    """How a Peer writes."""

    def __init__(self, wire):
        self._wire = wire
        self._out, self._queued, self._begun, self._written = [], 0, 0, 0
        self._before = 0                # what was written when the write under way has begun
        self._offered = 0               # what was queued when a write was last tried
        self._gathering = {}            # _Items that have some which are in no message yet: those of one turn share one
        self._group = None              # of its tasks, while it runs
        self._writing, self._writer = False, None
        self._several = flowcoro.runtime_info()["workers"] > 1
        # The peer sends no more; all that it has sent has been looked at; no more calls are begun.
        self._input_ended = self._all_read = self._draining = False
        self._idle = False              # whether all that has come has been looked at, and more is waited for
        self._is_late = False           # it came to a server that is being closed: its first message is waited for, to be told
        self._work = flowcoro.ParkingLot("wait for something to send")
        self._room = flowcoro.ParkingLot("wait until the peer reads what was sent")
        self._ended = flowcoro.Event()
        self._lost = None               # why the connection is over: an exception

    @flowcoro.atomic
    def _post(self, message):
        """Add a message to those that are to be sent."""
        frame = self._wire.frame(message)
        self._out.append(frame)             # _add_frame(), written out as each answer comes here
        self._queued += len(frame)
        if self._queued - self._offered >= FLUSH:
            self._flush()

    def _add_frame(self, frame):
        """As _post(), of a frame; within an atomic step."""
        self._out.append(frame)
        self._queued += len(frame)
        if self._queued - self._offered >= FLUSH:
            self._flush()

    def _flush(self):
        """Write now what the system takes. Never blocks. With several workers the writer alone writes."""
        if self._several:
            self._flush_later()
        elif self._out and not self._writing and self._lost is None:
            frames, self._out = self._out, []
            self._begun = self._offered = self._queued
            try:
                count = self._wire.write_nowait(frames)
            except flowcoro.FlowCoroError as error:
                self._begun = self._written         # nothing of it was taken
                self._lose(error)
            else:
                self._written += count
                if self._written < self._begun or self._all_read or self._draining:         # else there is nothing to do
                    self._taken(frames, count)

    def _taken(self, frames, count):
        """The system has taken so many bytes of the frames; the rest comes first the next time."""
        if self._written < self._begun:
            for index, frame in enumerate(frames, 1):
                count -= len(frame)
                if count < 0:
                    self._out[:0] = [memoryview(frame)[count:], *frames[index:]]
                    self._begun = self._written + (-count if -count < len(frame) else 0)
                    break
            self._flush_later()
        elif self._all_read or self._draining:
            self._look_for_end()

    @flowcoro.atomic
    def _flush_later(self):
        """Have it written at the end of this turn."""
        if self._writer is None and self._group is not None and self._lost is None:
            self._writer = self._group.spawn(self._write(), name="write of an RPC connection")
        elif self._work:
            self._work.unpark()

    @flowcoro.atomic
    def _take_out(self):
        for items in list(self._gathering):
            items.send()
        frames, self._out = self._out, []
        self._offered = self._queued
        return frames

    def _progress(self, begun, taken):
        """Of the frames that are being written a write has begun with so many bytes, and the system has taken so many."""
        self._begun, self._written = self._before + begun, self._before + taken

    async def _write(self):
        """The writer."""
        while True:
            await self._work.park_unless(lambda: self._out or self._gathering)
            frames = self._take_out()
            self._before, self._writing = self._written, True
            try:
                await self._wire.write(frames, self._progress)
            except (flowcoro.FlowCoroError, TimeoutError) as error:
                self._lose(error)
                return
            finally:
                self._writing = False
            self._taken(frames, self._written - self._before)
            self._room.unpark_all()

    async def _until_room(self):
        """Wait while the peer does not read what was sent; the end of the connection ends it, too."""
        while self._queued - self._written > MAX_UNSENT and self._lost is None:
            await self._room.park_unless(lambda: self._queued - self._written <= MAX_UNSENT or self._lost is not None)

    def _explained(self, error):
        """The error of a connection; after what was no JSON-RPC, most often another kind of server, that is told, too."""
        if self._no_message is None or not isinstance(error, flowcoro_net.BrokenError) or error.__cause__ is self._no_message:
            return error
        explained = flowcoro_net.BrokenError(None, f"{error}; before, it has sent what is no JSON-RPC ({self._no_message})")
        explained.__cause__ = self._no_message
        return explained

    def _lose(self, error):
        """The connection is over: who waits is told at once, and run() ends."""
        if self._is_first(error):
            self._room.unpark_all()
            self._settle_all(self._lost)
            self._ended.set()

    @flowcoro.atomic
    def _is_first(self, error):
        """Whether this is what has ended it: then `_lost` is it from now on."""
        if self._lost is not None:
            return False
        self._lost = self._explained(error)
        return True


# ---- peers: calls ---------------------------------------------------------------------------------------------

class _Reply:
    """A call of ours, and the task that waits for its answer."""

    __slots__ = ("peer", "id", "method", "seconds", "task", "done", "due", "value", "error", "begin", "end", "message", "heard")

    def __init__(self, peer, number, method, seconds=math.inf):
        self.peer, self.id, self.method, self.seconds = peer, number, method, seconds
        self.task = self.due = self.error = None
        self.done = False
        # Set later, and read by nobody before: by _enter() `message`, which calls of one batch share, and where its bytes `begin`
        # and `end`, of all that were queued; by settle() `value`. `due` has its tick once it was sent, if it has a limit.
        self.heard = peer._heard        # how often something had come when it was made

    def park(self, task):
        task.park_reason, task.abort_function = "wait for the answer to a call", self._abort
        if self.done:
            flowcoro.reschedule(task)
        else:
            self.task = task

    def _abort(self, task):
        self.task = None
        return True

    @flowcoro.atomic
    def settle(self, value, error):
        """The call has ended. Once."""
        self.value, self.error, self.done = value, error, True
        task, self.task = self.task, None       # _wake(), written out as each call does it
        if task is not None:
            flowcoro.reschedule(task)

    def _wake(self):
        task, self.task = self.task, None
        if task is not None:
            flowcoro.reschedule(task)

    def expire(self):
        """Its time is up."""
        if self.peer._give_up(self.id):
            wrong = self.peer._no_message
            self.settle(None, TimeoutError(f"no answer to {self.method!r} within timeout={self.seconds:g} s; it may have run" + (
                f"; the peer has sent what is no JSON-RPC ({wrong})" if wrong else "")))
            if self.heard == self.peer._heard:
                self.peer._probe()

    def take(self):
        """The result, or its error."""
        if self.error is not None:
            raise self.error
        return self.value


class _Probe(_Reply):
    """A call of a method that nobody has, which each peer answers: with an error."""

    __slots__ = ()

    def expire(self):
        """Nobody is there, unless something else has come."""
        if self.peer._pending.pop(self.id, None) is not None and self.heard == self.peer._heard:
            self.peer._lose(flowcoro_net.BrokenError(None, f"{self.peer!r}: nothing has come any more, not even the answer to a "
                                                     f"probe within {self.seconds:g} s"))


class _Feed(_Reply):
    """A stream of ours: `items` that have come and were not yet taken, how many may come, and have, in all."""

    __slots__ = ("items", "granted", "received")

    def __init__(self, peer, number, method, credit):
        super().__init__(peer, number, method, SILENCE)
        self.items, self.granted, self.received = collections.deque(), credit, 0

    def park(self, task):
        super().park(task)
        if self.items and not self.done:
            self._wake()

    def expire(self):
        """If nothing has come since the last time, ask whether anybody is there."""
        if self.id in self.peer._pending:
            if self.heard == self.peer._heard:
                self.peer._probe()
            self.heard = self.peer._heard
            self.peer._deadlines.add(self, self.seconds)

    @flowcoro.atomic
    def receive(self, items):
        """More of it. ProtocolError if that is more than was asked for."""
        self.received += len(items)
        if self.received > self.granted:
            raise ProtocolError("a stream has sent more items than it was given credit for")
        self.items.extend(items)
        self._wake()


class Proxy:
    """The methods of a peer as attributes: `await client.proxy.math.add(1, 2)` calls "math.add"."""

    __slots__ = ("_target", "_name")

    def __init__(self, target, name=""):
        self._target, self._name = target, name

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Proxy(self._target, f"{self._name}.{name}" if self._name else name)

    def __call__(self, *args, **named):
        return self._target.call(self._name, *args, **named)


def _given(args, named, params):
    """The params of a call."""
    if params is not _MISSING:
        if args or named:
            raise TypeError("give params= alone, or the parameters themselves")
        if params is not None and not isinstance(params, (list, tuple, dict)):
            raise TypeError(f"params={params!r:.80}: JSON-RPC has a list, a dict, or none")
        return params
    if args and named:
        raise TypeError("JSON-RPC has parameters by position or by name; give all of them one way")
    return list(args) if args else named or None


class _Caller:
    """What a Peer and an RpcClient have: the ways to call."""

    def call(self, method, /, *args, params=_MISSING, timeout=_MISSING, idempotent=False, **named):
        """`await peer.call("add", 1, 2)`, or by name, `call("add", a=1, b=2)`; params= gives a list or a dict as it is.

        Returns the result. timeout: seconds, None for no limit; the default is that of the connection. TimeoutError when it has
        passed, RpcError for an answer that is an error, ProtocolError for one that is none, ConnectionLost, ClosedError;
        LimitError for a call that is too large, TypeError and ValueError for what has no JSON. After a timeout, and when it is
        cancelled, the peer is told by $/cancelRequest; the call may have run. When a timeout has passed in which nothing at all
        has come, the peer is asked for a sign of life; without one for 10 seconds the connection is lost. Without a timeout only
        the system asks, over TCP, whether that host is there (KEEP_ALIVE).
        idempotent: whether it does no harm if it runs twice, which a client's policy may ask. A parameter of one of these names
        goes into params=.
        """
        params = list(args) if args and not named and params is _MISSING else _given(args, named, params)
        return self._call(method, params, timeout, idempotent)

    def notify(self, method, /, *args, params=_MISSING, **named):
        """`await peer.notify("log", "…")`: a call without an answer. Returns when it is on its way: nobody tells whether it has
        arrived. Errors as call(). Cancelled: it was not sent."""
        return self._notify(method, _given(args, named, params))

    def batch(self, *calls, timeout=_MISSING, idempotent=False):
        """`await peer.batch(Request("add", [1, 2]), Notification("log", ["…"]))`: several in one message.

        Returns a list with the result of each Request, in order; an RpcError instead where the answer is one. Errors of call()
        for all of them together; ValueError for none, LimitError for more than max_batch. idempotent: whether all are.
        """
        return self._batch(calls, timeout, idempotent)

    def stream(self, method, /, *args, params=_MISSING, timeout=None, window=STREAM_WINDOW, **named):
        """`async for item in peer.stream("count", 5)`: call an async generator of the peer, or what returns a list.

        timeout: seconds for each item. window: items that the peer may be ahead of who takes them. Errors as call();
        ProtocolError for an answer that is neither. Leaving the loop, also by a cancellation, ends it at the peer.
        """
        return self._stream(method, _given(args, named, params), timeout, window)

    @property
    def proxy(self):
        """A Proxy: `await peer.proxy.math.add(1, 2)`."""
        return Proxy(self)


class _Calling(_Outgoing, _Caller):
    """How a Peer calls."""

    def __init__(self, wire, options):
        super().__init__(wire)
        self._options = options
        self._pending = {}              # id -> _Reply: R2
        self._heard = 0                 # how often something has come
        self._has_settled = False       # whether an answer was given to a call since more was last waited for; who reads sets it
        self._no_message = None         # a ProtocolError: why the last of what has come and was no JSON-RPC was none
        self._ids = itertools.count(1)          # which without a GIL gives some twice, if two ask at once
        self._next_id = self._shared_next_id if self._several else self._ids.__next__
        self._deadlines = _Deadlines.of_kernel()

    @flowcoro.atomic
    def _shared_next_id(self):
        return next(self._ids)

    def _more(self, timeout):
        """The members of a request that are not the specification's."""
        options = self._options
        if not options.propagate:
            return {}
        context = dict(options.headers() if callable(options.headers) else options.headers or ())
        if timeout != math.inf:
            context["timeout"] = timeout
        return {"$/context": context} if context else {}

    def _register(self, replies, message):
        """Send a message with these calls in it."""
        if len(message) > self._wire.max_message:
            raise flowcoro_net.LimitError(f"a call of {len(message)} bytes, where max_message={self._wire.max_message} are "
                                          "allowed; allow more at both ends, or send several")
        if self._enter(replies, message):
            self._flush()
        else:
            self._flush_later()
        for reply in replies:               # now that the peer has something to do
            if reply.seconds != math.inf:
                self._deadlines.add(reply, reply.seconds)

    @flowcoro.atomic
    def _enter(self, replies, message):
        """Whether it is the only one under way, and so is best sent at once."""
        if self._lost is not None or self._input_ended:
            raise self._ended_error(self._lost or self._ended_by_peer(), False, replies[0].seconds if replies else math.inf)
        alone, frame, begin = not self._pending, self._wire.frame(message), self._queued
        end = begin + len(frame)
        for reply in replies:
            reply.message, reply.begin, reply.end = message, begin, end
            self._pending[reply.id] = reply
        self._add_frame(frame)              # last: if the connection turns out to be lost, they are told
        return alone

    @staticmethod
    def _ended_error(cause, sent, left):
        if isinstance(cause, flowcoro.ClosedError):
            return flowcoro.ClosedError(str(cause))
        lost = ConnectionLost("the connection was lost" + {
            False: ", and the call has not run", True: "; the call was sent, and may have run",
            None: "; nobody knows whether the call has run"}[sent] + f": {cause}", sent)
        lost.__cause__, lost._left = cause, left
        return lost

    @flowcoro.atomic
    def _settle_all(self, cause):
        """What waits for an answer gets none."""
        while self._pending:
            _, reply = self._pending.popitem()
            sent = False if reply.begin >= self._begun else True if reply.end <= self._written else None
            left = reply.seconds if reply.due is None else max(reply.due * GRAIN - flowcoro.now(), 0)
            reply.settle(None, self._ended_error(cause, sent, left))

    async def _call(self, method, params, timeout, idempotent=False):
        options, number = self._options, self._next_id()
        seconds = options.timeout if timeout is _MISSING else _seconds(timeout)
        message = encode_request(method, params, number, self._more(seconds) if options.propagate else None)
        if _current_task().budget <= 0:
            await flowcoro.checkpoint()         # who is cancelled already sends nothing
        if self._queued - self._written > MAX_UNSENT:
            seconds = await self._until_room_for(method, seconds)
        reply = _Reply(self, number, method, seconds)
        self._register([reply], message)
        try:
            await flowcoro.park(reply.park)
        finally:                            # _leave(), written out as each call does it
            if reply.due is not None:
                self._deadlines.remove(reply)
            if not reply.done:
                self._give_up(reply.id)
        if reply.error is not None:
            raise reply.error
        return reply.value

    def _leave(self, reply):
        if reply.due is not None:
            self._deadlines.remove(reply)
        if not reply.done:
            self._give_up(reply.id)

    async def _until_room_for(self, method, seconds):
        """Wait until the peer reads. Returns what is left of the time."""
        if self._queued - self._written <= MAX_UNSENT:
            return seconds
        began = flowcoro.now()
        with flowcoro.move_on_after(seconds):
            await self._until_room()
            return max(seconds - (flowcoro.now() - began), 0)
        raise TimeoutError(f"{method!r} was not sent within timeout={seconds:g} s, as the peer does not read; it has not run")

    def _give_up(self, number):
        """Nobody waits for this answer any more: tell the peer. Whether there was none yet."""
        if self._pending.pop(number, None) is None:
            return False
        if self._lost is None:
            self._post(encode_request("$/cancelRequest", {"id": number}))
            self._flush_later()
        return True

    @flowcoro.atomic
    def _probe(self):
        """Ask whether anybody is there. Never fails."""
        if self._lost is None and not self._input_ended and not any(one.__class__ is _Probe for one in self._under_way()):
            probe = _Probe(self, self._next_id(), "$/ping", PROBE_TIMEOUT)
            self._enter([probe], encode_request(probe.method, None, probe.id))
            self._deadlines.add(probe, probe.seconds)
            self._flush_later()

    def _under_way(self):
        """The calls that wait for an answer now: a list, as another worker may end some meanwhile."""
        return list(self._pending.values())

    async def _notify(self, method, params, timeout=None):
        message = encode_request(method, params, more=self._more(math.inf))
        await flowcoro.checkpoint()
        await self._until_room_for(method, self._options.timeout if timeout is _MISSING else _seconds(timeout))
        self._register((), message)

    async def _batch(self, calls, timeout, idempotent=False):
        seconds = self._options.timeout if timeout is _MISSING else _seconds(timeout)
        replies, texts, more = [], [], self._more(seconds)
        for one in calls:
            if isinstance(one, Notification):
                texts.append(encode_request(one.method, _given((), None, one.params)))
            elif isinstance(one, Request):
                replies.append(_Reply(self, self._next_id(), one.method, seconds))
                texts.append(encode_request(one.method, _given((), None, one.params), replies[-1].id, more))
            else:
                raise TypeError(f"batch({one!r:.80}): it takes Request(method, params) and Notification(method, params)")
        if not texts:
            raise ValueError("batch(): an empty batch is none")
        if len(texts) > self._options.max_batch:            # the answer would have no id, and belong to nobody
            raise flowcoro_net.LimitError(f"a batch of {len(texts)}, where max_batch={self._options.max_batch} are allowed; "
                                          "allow more at both ends, or send several")
        await flowcoro.checkpoint_if_due()
        seconds = await self._until_room_for("a batch", seconds)
        self._register(replies, b"[%b]" % b",".join(texts))
        try:
            for reply in replies:
                await flowcoro.park(reply.park)
        finally:
            for reply in replies:
                self._leave(reply)
        return [reply.error if isinstance(reply.error, RpcError) else reply.take() for reply in replies]

    async def _stream(self, method, params, timeout, window):
        if window.__class__ is not int or not 0 < window <= MAX_CREDIT:
            raise ValueError(f"window={window!r}: give a number of items, from 1 to {MAX_CREDIT}")
        seconds, number = _seconds(timeout), self._next_id()
        message = encode_request(method, params, number, {"$/stream": window, **self._more(math.inf)})
        feed, taken = _Feed(self, number, method, window), 0
        await flowcoro.checkpoint_if_due()
        await self._until_room()
        self._register([feed], message)
        try:
            while True:
                done = feed.done        # first: on another worker the last items may come, and the end, after we have looked
                while feed.items:
                    item = feed.items.popleft()
                    taken += 1
                    if taken >= max(window // 2, 1) and not feed.done:
                        feed.granted += taken
                        self._post(encode_request("$/stream", {"id": number, "credit": taken}))
                        self._flush_later()
                        taken = 0
                    yield item
                if done:
                    break
                with flowcoro.move_on_after(seconds):
                    await flowcoro.park(feed.park)
                    continue
                raise TimeoutError(f"no item of {method!r} within timeout={seconds:g} s")
            result = feed.take()                    # of one that knows no streams: a list
            if result is not None and result.__class__ is not list:
                raise ProtocolError(f"the answer to {method!r} is no stream and no list, but {result!r:.80}: call() takes it")
            for item in result or ():
                yield item
        finally:
            self._leave(feed)

    # -- answers

    def _take_response(self, response):
        error = None if response.error is None else _as_error(response.error)
        reply = self._pending.pop(response.id, None)
        if reply is not None:
            reply.settle(response.result, error)
            self._has_settled = True
            return
        if response.id is not None or error is None or not self._take_refusal(error):
            self.strays += 1

    @flowcoro.atomic
    def _take_refusal(self, error):
        """What we have sent was not understood. If one message is all that is under way, it is that. Whether it is so."""
        if len({id(reply.message) for reply in self._under_way()}) != 1:
            return False
        while self._pending:
            self._pending.popitem()[1].settle(None, error)
        return True

    def _take_items(self, params):
        feed = self._pending.get(_id_of(params))
        items = params.get("items") if params.__class__ is dict else None
        if feed.__class__ is _Feed and items.__class__ is list:
            feed.receive(items)
        else:
            self.strays += 1


def _id_of(params):
    """The "id" of a notification's params; _MISSING if there is none."""
    number = params.get("id", _MISSING) if params.__class__ is dict else _MISSING
    return number if number.__class__ in _ID_TYPES else _MISSING


# ---- peers: what comes in -------------------------------------------------------------------------------------

class _Rest:
    """To be awaited: what is left of a coroutine whose first step was made already, and gave `trap`.

    It hands on what the coroutine says to the kernel and the kernel to it, and runs each step in the context of the call.
    """

    __slots__ = ("_coro", "_trap", "_run", "_begun")

    def __init__(self, coro, trap, run):
        self._coro, self._trap, self._run, self._begun = coro, trap, run, False

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        if self._begun:
            return self._run(self._coro.send, None)
        self._begun = True
        return self._trap

    def send(self, value):
        return self._run(self._coro.send, value)

    def throw(self, *error):
        self._begun = True
        return self._run(self._coro.throw, *error)

    def close(self):
        self._coro.close()


def _ends_program(error):
    """Whether it is to end more than the call that has raised it."""
    ends = KeyboardInterrupt, SystemExit
    return isinstance(error, ends) or isinstance(error, BaseExceptionGroup) and error.subgroup(ends) is not None


def _surround(around, call_next):
    return lambda context: around(context, call_next)


class _Answers:
    """The answers to a batch, until there are all: one message."""

    __slots__ = ("_peer", "_answers", "_left", "_size")

    def __init__(self, peer, count):
        self._peer, self._answers, self._left, self._size = peer, [None] * count, count, 1

    @flowcoro.atomic
    def set(self, index, answer):
        """The answer to one member, or None for none."""
        self._answers[index] = answer
        self._size += len(answer or b"") + 1
        self._left -= 1
        if not self._left:
            answers = [answer for answer in self._answers if answer is not None]
            if answers:
                self._peer._post(b"[%b]" % b",".join(answers))

    def room_for(self, answer):
        """Whether the message does not get too large by it, and by short answers to the other members."""
        return self._size + len(answer) + SHORT_ANSWER * (self._left - 1) < self._peer._wire.max_message


class _Call:
    """A call of the peer's that is under way: `task` is the one that it runs in."""

    __slots__ = ("peer", "request", "id", "slot", "task", "due", "answered", "items")

    def __init__(self, peer, request, number, slot):
        self.peer, self.request, self.id, self.slot = peer, request, number, slot
        self.task = self.due = None
        self.answered = False
        self.items = None               # of a stream that does not come as a list: an _Items

    def ask_stream(self):
        """Its items are to come as notifications, if the caller has asked for that, and can take them."""
        credit = self.request.more.get("$/stream")
        if (credit.__class__ is int and 0 < credit <= MAX_CREDIT and self.slot is None and self.id is not _MISSING
                and self.peer._wire.__class__ is not _OneWire):
            self.items = _Items(self, credit)

    @flowcoro.atomic
    def claim(self):
        """Whether who asks is the one to answer it: with several workers its time may be up while it answers."""
        answered, self.answered = self.answered, True
        return not answered

    def end(self, kind):
        """End it: the answer is this error, and the task is cancelled."""
        if self.claim():
            self.leave()
            self.peer._fail(self.id, self.slot, kind())
            self.peer._flush_later()
        self.task.cancel()

    def leave(self):
        """Its id may be used again."""
        calls, key = self.peer._calls, self if self.id is _MISSING else self.id
        if calls.get(key) is self:
            del calls[key]

    def expire(self):
        """Its time is up."""
        self.end(DeadlineExceeded)


class _Items:
    """The items of a stream to the peer: `credit` more may be sent. Those of one turn go in one message: `texts` is what it will
    have, `room` the bytes that it has room for."""

    __slots__ = ("call", "credit", "texts", "size", "head", "room", "lot")

    def __init__(self, call, credit):
        self.call, self.credit, self.texts, self.size = call, credit, [], 0
        self.head = b'{"jsonrpc":"2.0","method":"$/stream","params":{"id":%b,"items":[' % _json_of_id(call.id).encode()
        self.room = call.peer._wire.max_message - len(self.head) - len(b"]}}")
        self.lot = flowcoro.ParkingLot("wait until the peer takes more of a stream")

    @flowcoro.atomic
    def grant(self, credit):
        """It may send more."""
        self.credit += credit
        self.lot.unpark()

    @flowcoro.atomic
    def add(self, text):
        """Whether there was credit for this one."""
        if not self.credit:
            return False
        self.credit -= 1
        if self.texts and self.size + len(text) > min(self.room, FLUSH):
            self.send()
        self.texts.append(text)
        self.size += len(text) + 1
        if len(self.texts) == 1:
            self.call.peer._gathering[self] = None
            self.call.peer._flush_later()
        return True

    @flowcoro.atomic
    def send(self):
        """Make a message of those that there are; none after the answer."""
        peer, texts, self.texts, self.size = self.call.peer, self.texts, [], 0
        peer._gathering.pop(self, None)
        if texts and not self.call.answered:
            peer._post(b"%b%b]}}" % (self.head, b",".join(texts)))

    async def until_credit(self):
        """Wait until it may send more."""
        self.send()
        await self.lot.park_unless(lambda: self.credit)


class _Deadlines:
    """Ends the calls of a kernel whose time is up, by their expire(): one task for all, and one timer, to GRAIN seconds."""

    all = weakref.WeakKeyDictionary()

    def __init__(self):
        self.due, self.runs = {}, False         # tick -> {call: None}
        self.scope = None                       # around the sleep of the sweep

    @classmethod
    def of_kernel(cls):
        kernel = flowcoro.current_kernel()
        return cls.all.get(kernel) or cls.all.setdefault(kernel, cls())

    @flowcoro.atomic
    def add(self, call, seconds):
        """End it after so many seconds, at most GRAIN more."""
        call.due = tick = int((flowcoro.now() + seconds) / GRAIN) + 1
        calls = self.due.get(tick)
        if calls is not None:
            calls[call] = None
            return
        self.due[tick] = {call: None}
        if not self.runs:
            self.runs = True
            flowcoro.spawn(self.sweep(), name="deadlines of RPC")
        elif self.scope is not None and tick * GRAIN < self.scope.deadline:
            self.scope.deadline = tick * GRAIN

    @flowcoro.atomic
    def remove(self, call):
        calls = self.due.get(call.due)
        if calls is not None:
            calls.pop(call, None)

    @flowcoro.atomic
    def expire(self):
        """End what is due. The scope to sleep in until there is more; None if there is none."""
        now = flowcoro.now()
        for tick in [tick for tick, calls in self.due.items() if not calls or tick * GRAIN <= now]:
            for call in self.due.pop(tick):
                call.expire()
        self.runs = bool(self.due)
        # Made in the same step: what another worker adds from now on, and is due earlier, moves it.
        self.scope = flowcoro.CancelScope(deadline=min(self.due) * GRAIN) if self.due else None
        return self.scope

    async def sweep(self):
        try:
            while scope := self.expire():
                with scope:
                    await flowcoro.sleep(math.inf)
        except BaseException:
            self.runs = False
            raise


class _Places:
    """How many calls run at once, of all connections; and the connections that have some waiting for a place.

    With several workers as many calls more than `most` may run as there are other workers: who sees a place makes the first step
    of a handler before it takes it.
    """

    __slots__ = ("most", "taken", "peers")

    def __init__(self, most):
        self.most, self.taken, self.peers = most, 0, {}

    @flowcoro.atomic
    def take(self):
        """One has begun."""
        self.taken += 1

    @flowcoro.atomic
    def release(self):
        """One has ended."""
        self.taken -= 1
        self.offer()

    @flowcoro.atomic
    def forget(self, peer):
        """The connection has ended."""
        self.peers.pop(peer, None)

    @flowcoro.atomic
    def offer(self):
        """If there is a place, the connection that waits longest may begin a call. Who does not take it has to offer it again."""
        while self.peers and self.taken < self.most:
            peer = next(iter(self.peers))
            del self.peers[peer]
            if peer._begin_waiting():
                break


class _Answering(_Calling):
    """How a Peer answers calls."""

    def __init__(self, wire, methods, options, places):
        super().__init__(wire, options)
        self._methods, self._places = methods, places
        self._todo = collections.deque()        # members of a batch that were read and not yet begun: (event, slot)
        self._waiting = collections.deque()     # calls that wait for a place: (request, slot)
        self._catching_up = False               # whether a task begins these
        self._reader = self._catcher = None     # the tasks that make first steps now, or have been the last to do so
        self._stalled = False                   # whether reading has paused for them in vain: no more are taken
        self._calls = {}                        # id, or of a notification the _Call itself -> _Call, of those that wait
        self._begun_calls = 0                   # how many have a place
        self.strays = 0                         # what has come and belongs to no call
        self._paused = flowcoro.ParkingLot("wait until fewer calls of an RPC connection wait for a place")
        self._base = contextvars.copy_context()

    def _begin(self, request, slot):
        """Begin a call. Returns what is to be awaited, or None if it has ended."""
        if request.__class__ is Request:
            name, params, number, _ = request
        else:
            (name, params, _), number = request, _MISSING
        try:
            methods = self._methods
            method = methods._methods.get(name) or methods._find(name)
            args, named = method.bind(params)
            if self._calls and number in self._calls:
                raise InvalidRequest("a call with this id is under way")
            run, call = self._base.copy().run, None
            if methods._around or method.is_stream:
                call = _Call(self, request, number, slot)
                if method.is_stream:
                    call.ask_stream()
                result = self._go_through(method, call, list(args), named or {})        # middleware may change context.params
            elif method.wants is not None:
                first = self if method.wants == "peer" else Context(self, request)
                result = run(method.function, first, *args, **(named or {}))
            elif named:
                result = run(method.function, *args, **named)
            elif method.is_async:
                result = method.function(*args)             # which runs nothing of it yet
            else:
                result = run(method.function, *args)        # **{} would cost 0.1 µs
            if result.__class__ is types.CoroutineType:
                try:
                    trap = run(result.send, None)
                except StopIteration as stop:
                    result = stop.value
                else:
                    return self._enrol(call or _Call(self, request, number, slot), _Rest(result, trap, run))
            self._answer(number, slot, result)
        except RpcError as error:
            self._fail(number, slot, error, request.method)
        except BaseException as error:          # a first step is not cancelled: also Cancelled is the handler's own
            if _ends_program(error):
                raise
            self._fail(number, slot, self._internal(error, request.method))
        return None

    async def _go_through(self, method, call, args, named):
        """A call that has middleware around it, or is a stream."""
        context = Context(self, call.request)

        async def innermost(context):
            wanted = () if method.wants is None else (self if method.wants == "peer" else context,)
            result = method.function(*wanted, *args, **named)
            return await result if result.__class__ is types.CoroutineType else result          # as _begin()

        call_next = innermost
        for around in reversed(self._methods._around):
            call_next = _surround(around, call_next)
        result = await call_next(context)
        return await self._send_items(call, result) if isinstance(result, types.AsyncGeneratorType) else result

    async def _send_items(self, call, items):
        """A stream: its items as notifications, when the caller has asked for that; else all as a list."""
        listed, size, sending = [], 0, call.items
        try:
            if sending is None:
                async for item in items:
                    listed.append(item)
                    size += len(flowcoro_schema.encode_json(item))
                    if size > self._wire.max_message:
                        raise AnswerTooLarge
                    await flowcoro.checkpoint_if_due()
                return listed
            async for item in items:
                text = flowcoro_schema.encode_json(item).encode()
                if len(text) > sending.room:
                    raise AnswerTooLarge
                while not sending.add(text):
                    await sending.until_credit()
                await flowcoro.checkpoint_if_due()
                await self._until_room()
            return None
        finally:
            if sending is not None:
                sending.send()
            await items.aclose()

    def _enrol(self, call, rest):
        """A call has to wait: it takes a place. Returns what is to be awaited."""
        call.task = flowcoro.current_task()
        self._take_place(call)
        seconds = self._deadline_of(call)
        if seconds != math.inf:
            self._deadlines.add(call, seconds)
        return self._stay(call, rest)

    async def _stay(self, call, rest):
        """The task that has begun a call stays with it to its end."""
        number, slot, ours = call.id, call.slot, False
        try:
            result = await rest
            ours = call.claim()
            if ours:
                self._answer(number, slot, result)
        except RpcError as error:
            if ours or call.claim():
                self._fail(number, slot, error, call.request.method)
        except BaseException as error:
            if isinstance(error, GeneratorExit) or _ends_program(error):
                raise
            if isinstance(error, flowcoro.Cancelled):
                if call.claim():                # nobody has told the caller: the handler has done it, or nobody reads it
                    self._fail(number, slot, CallCancelled())
                await flowcoro.checkpoint()     # goes on only if the handler has made it up
            error = self._internal(error, call.request.method)
            if ours or call.claim():
                self._fail(number, slot, error)
        finally:
            if call.due is not None:
                self._deadlines.remove(call)
            self._give_place(call)
            if self._out:
                self._flush_later()
            self._look_for_end()

    def _deadline_of(self, call):
        """Seconds that a call may take: the server's limit, or what the caller says, if that is less."""
        more = call.request.more.get("$/context")
        said = more.get("timeout") if more.__class__ is dict else None
        limit = math.inf if call.items is not None else self._options.deadline
        return min(limit, said) if said.__class__ in (int, float) and 0 <= said < MAX_SECONDS else limit

    def _internal(self, error, method):
        """The answer for an error of a handler, which is reported, unless it is that who is gone, or is being left, cannot be
        called back."""
        gone = self._lost is not None or self._draining or self._input_ended and self._wire.__class__ is not _OneWire
        if gone and isinstance(error, (ConnectionLost, flowcoro.ClosedError)):
            return InternalError()
        reference = os.urandom(8).hex()
        flowcoro.report_error(error, f"method {method!r} failed; its caller was given the reference {reference}",
                              "flowcoro_rpc")
        return InternalError({"reference": reference})

    def _runs_in(self, task):
        """Whether a handler of this connection runs in the task."""
        return task is self._reader or task is self._catcher or any(call.task is task for call in list(self._calls.values()))

    # -- places

    @flowcoro.atomic
    def _take_place(self, call):
        self._calls[call if call.id is _MISSING else call.id] = call
        self._begun_calls += 1
        self._places.take()

    @flowcoro.atomic
    def _give_place(self, call):
        call.leave()
        self._begun_calls -= 1
        self._places.release()
        self._begin_waiting()

    def _has_place(self):
        return self._begun_calls < self._options.max_concurrent and self._places.taken < self._places.most

    def _wait(self, request, slot):
        if self._stalled:
            self._fail(request.id if request.__class__ is Request else _MISSING, slot, Overloaded())
        else:
            self._waiting.append((request, slot))
            self._begin_waiting()

    def _more_room(self):
        """One call less waits."""
        self._stalled = False
        self._paused.unpark()

    @flowcoro.atomic
    def _next_waiting(self):
        """(request, slot) of the call that waits longest, if it may begin; else None."""
        if not self._waiting or not self._has_place():
            return None
        self._more_room()
        return self._waiting.popleft()

    @flowcoro.atomic
    def _begin_waiting(self):
        """Have a task begin the calls that wait, if there is a place. Whether there is one now for that."""
        if not self._waiting or self._catching_up or self._lost is not None:
            return False
        if not self._has_place():
            if self._places.taken >= self._places.most:
                self._places.peers[self] = None
            return False
        self._catching_up = True
        self._group.spawn(self._catch_up(), name="begin calls that have waited")
        return True

    async def _catch_up(self):
        """As _read(), of the calls that have waited."""
        rest, self._catcher = None, flowcoro.current_task()
        try:
            while rest is None and (waiting := self._next_waiting()):
                rest = self._begin(*waiting)
                if rest is None:
                    await flowcoro.checkpoint()
        finally:
            self._catching_up = False
            self._begin_waiting()
            self._places.offer()
        if rest is not None:
            await rest
        else:
            self._flush_later()
            self._look_for_end()

    # -- answers

    def _reply(self, slot, answer):
        if slot is None:
            self._post(answer)
        else:
            slot[0].set(slot[1], answer)

    def _answer(self, number, slot, result):
        if number is not _MISSING:
            answer = encode_result(number, result)
            if slot is None:
                if len(answer) > self._wire.max_message:
                    raise AnswerTooLarge
                self._post(answer)
            elif slot[0].room_for(answer):
                slot[0].set(slot[1], answer)
            else:
                raise AnswerTooLarge
        elif slot is not None:
            slot[0].set(slot[1], None)

    def _fail(self, number, slot, error, method=None):
        if error._received and isinstance(error, (ShuttingDown, Overloaded)):
            error = self._internal(error, method)       # a call of the handler's has not run; the handler has
        if number is not _MISSING:
            try:
                answer = encode_error(number, error.code, error.message, error.data)
            except Exception as wrong:              # a handler has made it, and what it has put there may do anything
                error = self._internal(wrong, method)
                answer = encode_error(number, error.code, error.message, error.data)
            if len(answer) > self._wire.max_message if slot is None else not slot[0].room_for(answer):
                answer = encode_error(number, error.code, _BY_CODE.get(error.code, RpcError).message)
            self._reply(slot, answer)
        elif slot is not None:
            slot[0].set(slot[1], None)


class _Reading(_Answering):
    """How a Peer reads."""

    def _lead(self):
        """Have a task read (R1)."""
        self._group.spawn(self._read(), name="read of an RPC connection")

    async def _read(self):
        """Read until a call has to wait: then another task goes on, and this one stays with the call."""
        wire, todo, options, task = self._wire, self._todo, self._options, flowcoro.current_task()
        next_message, read, most = wire.next_message, wire.read, options.max_waiting
        max_depth, max_batch, places = options.max_depth, options.max_batch, self._places
        leads, self._reader = True, task
        try:
            while True:
                if todo:
                    event, slot = todo.popleft()
                else:
                    message = next_message()
                    if message is NEED_DATA:
                        if self._out:
                            self._flush()
                        if self._input_ended:
                            return await self._at_end()
                        self._idle = True
                        if self._draining:
                            self._look_for_end()
                        if self._has_settled:
                            # Who has its answer goes on before the way into the next read, of some 2 µs, is gone.
                            self._has_settled = False
                            await flowcoro.checkpoint()
                        data = await read()
                        self._idle = False
                        if data:
                            self._heard += 1
                            wire.receive_data(data)
                        else:
                            wire.receive_end()
                            self._input_ended = True
                        continue
                    event, slot = read_message(message, max_depth=max_depth, max_batch=max_batch), None
                kind = event.__class__
                if (kind is Request and not self._draining and not self._waiting
                        and self._begun_calls < options.max_concurrent and places.taken < places.most):     # _has_place()
                    rest = self._begin(event, slot)
                elif kind is Response and slot is None:
                    rest = self._take_response(event)           # None
                else:
                    rest = self._take(event, slot)
                if rest is not None:
                    self._lead()
                    leads = False
                    return await rest
                if self._queued - self._written > MAX_UNSENT or len(self._waiting) >= most and not self._stalled:
                    await self._until_fewer()
                if task.budget > 0:
                    task.budget -= 1
                else:
                    self._flush()
                    await flowcoro.checkpoint()
        except ProtocolError as error:
            await self._refuse(error)
        except (flowcoro_net.NetworkError, flowcoro.ClosedError) as error:
            self._lose(error)
        except flowcoro.Cancelled:
            if leads:               # also by a handler, which has cancelled its task: else nobody would read any more
                self._lose(flowcoro.ClosedError(f"{self!r}: the task that reads was cancelled"))
            raise

    async def _at_end(self):
        """The peer sends no more: it is gone, or waits for the last answers."""
        self._all_read = True
        self._settle_all(self._ended_by_peer())
        self._look_for_end()
        if self._lost is None and self._options.end_grace != math.inf:
            await flowcoro.sleep(self._options.end_grace)
            self._lose(self._ended_by_peer())

    def _ended_by_peer(self):
        if self._wire.__class__ is _OneWire:
            return flowcoro_net.BrokenError(None, "it came as a message by itself (HTTP), over which nobody can be called back")
        return self._explained(flowcoro_net.BrokenError(None, f"{self!r}: the peer has ended the connection"))

    def _look_for_end(self):
        """End, if it is time: nothing comes any more, or is to come, and nothing is left to do or to say."""
        drained = self._draining and self._idle and (self._heard or not self._is_late)
        if ((self._all_read or drained) and not self._begun_calls and not self._waiting and not self._catching_up
                and not self._todo and self._queued == self._written and self._lost is None):
            self._lose(self._ended_by_peer() if self._all_read else
                       flowcoro.ClosedError(f"{self!r} has been closed here"))

    async def _until_fewer(self):
        """R3: read no more while the peer does not read, or too many calls wait."""
        self._flush()
        await self._until_room()
        with flowcoro.move_on_after(PAUSE):
            await self._paused.park_unless(lambda: len(self._waiting) < self._options.max_waiting)
            return
        self._stalled = True

    async def _refuse(self, error):
        """What has come cannot be cut into messages: say so, and end."""
        self._waiting.clear()
        self._post(encode_error(None, error.code, InvalidRequest.message, str(error)))
        self._flush()
        try:
            with flowcoro.move_on_after(LINGER):
                while self._queued > self._written and self._lost is None:
                    await self._room.park_unless(lambda: self._queued <= self._written or self._lost is not None)
                await self._wire.linger()
        except (flowcoro_net.NetworkError, flowcoro.ClosedError):       # then nobody is there to be told
            pass
        self._lose(error)

    # -- messages

    def _take(self, event, slot):
        """What _read() does with all but a Request that can begin now and a Response by itself. Returns what is to be awaited, of
        a call that has to wait, or None."""
        kind = event.__class__
        if kind is Response:
            self._take_response(event)
        elif kind is Request:
            if self._draining:
                self._fail(event.id, slot, ShuttingDown())
            else:
                self._wait(event, slot)
            return None
        elif kind is Notification:
            if event.method in _CONTROLS:           # others that begin so, as LSP's $/progress, are for methods
                self._control(event.method, event.params)
            elif not self._draining:
                if self._waiting or not self._has_place():
                    self._wait(event, slot)
                    return None
                return self._begin(event, slot)
            if slot is not None:
                slot[0].set(slot[1], None)
            return None
        elif kind is Batch:
            wanted = sum(one.__class__ is Request or one.__class__ is Invalid and one.code is not None for one in event.members)
            if wanted * SHORT_ANSWER > self._wire.max_message:
                return self._take(Invalid(None, InvalidRequest.code, f"a batch of {wanted} calls, to the answers of which "
                                          f"max_message={self._wire.max_message} has no room"), None)
            answers = _Answers(self, len(event.members))
            self._todo.extend((member, (answers, index)) for index, member in enumerate(event.members))
        elif event.code is not None:
            self._no_message = ProtocolError(event.why)
            self._reply(slot, encode_error(event.id, event.code, _BY_CODE[event.code].message))
            return None
        elif (reply := self._pending.pop(event.id, None)) is not None:
            reply.settle(None, ProtocolError(f"the answer to {reply.method!r} is none: {event.why}"))
        else:
            self.strays += 1
        if slot is not None:
            slot[0].set(slot[1], None)
        return None

    def _control(self, method, params):
        """A notification of the protocol itself."""
        if method == "$/cancelRequest":
            number = _id_of(params)
            call = self._calls.get(number)
            if call is not None:
                call.end(CallCancelled)
            else:
                self._cancel_waiting(number)
        elif method == "$/stream" and params.__class__ is dict:
            if "items" in params:
                self._take_items(params)
                return
            call, credit = self._calls.get(_id_of(params)), params.get("credit")
            if call is not None and call.items is not None and credit.__class__ is int and 0 < credit <= MAX_CREDIT:
                call.items.grant(credit)

    @flowcoro.atomic
    def _cancel_waiting(self, number):
        for index, (request, slot) in enumerate(self._waiting):
            if request.__class__ is Request and request.id == number:
                del self._waiting[index]
                self._more_room()
                self._fail(number, slot, CallCancelled())
                return


class Peer(_Reading):
    """One end of a connection: what calls the other end, and is called by it.

    A handler gets that of its caller; an RpcClient has one for each connection. `headers`: a dict of texts that hold for all of
    it; `state`: a dict for what you like to keep; `transport`: the Socket, or what was given to serve_messages().
    """

    def __init__(self, wire, methods, options, places, *, transport=None, headers=()):
        super().__init__(wire, methods, options, places)
        self.transport, self.headers, self.state = transport, dict(headers), {}

    async def _run(self):
        """Serve the connection to its end."""
        try:
            async with flowcoro.TaskGroup(pinned=True) as self._group:
                try:
                    self._lead()
                    if self._out:
                        self._flush_later()
                    await self._ended.wait()
                    self._group.cancel()
                finally:                    # before its handlers have been cancelled, which may take its time
                    self._lose(flowcoro.ClosedError(f"{self!r} has been closed here"))
        finally:
            self._places.forget(self)
            if isinstance(self._lost, flowcoro_net.BrokenError):
                self._wire.close_nowait()
            else:
                await self._wire.close()

    def _drain(self):
        """Begin no more calls, and end when those under way have. Not at once while what has come is looked at: a handler may be
        in its first step (with several workers, or it calls this), and then who reads looks for the end."""
        self._draining, self._is_late = True, False
        self._look_for_end()

    async def close(self, *, timeout=DRAIN_TIMEOUT):
        """Close the connection in order: calls that come are answered with ShuttingDown, those that run may go on for `timeout`
        seconds, then they are cancelled. Calls of ours that wait for an answer get ClosedError at once. Twice is once.

        In a handler of this connection, for which it would wait, it returns at once, and goes on in a task of its own. Cancelled:
        it is closed at once.
        """
        if self._runs_in(flowcoro.current_task()):
            flowcoro.spawn(self.close(timeout=timeout), name=f"close {self!r}")
            return
        for number in list(self._pending) if self._lost is None else ():
            self._post(encode_request("$/cancelRequest", {"id": number}))
        self._settle_all(flowcoro.ClosedError(f"{self!r} has been closed here"))
        self._flush()
        self._drain()
        try:
            with flowcoro.move_on_after(timeout):
                await self._ended.wait()
        finally:
            self.close_nowait()

    def close_nowait(self):
        """Close the connection at once: calls that run are cancelled, those that wait for an answer get ClosedError."""
        self._lose(flowcoro.ClosedError(f"{self!r} has been closed here"))

    @property
    def closed(self):
        """Whether the connection is over."""
        return self._lost is not None

    def statistics(self):
        """{"calls_waiting": ours, for an answer; "calls_running": the peer's; "calls_queued": those that wait for a place;
        "bytes_unsent"; "strays": answers and items that belong to no call}"""
        return {"calls_waiting": len(self._pending), "calls_running": self._begun_calls, "calls_queued": len(self._waiting),
                "bytes_unsent": self._queued - self._written, "strays": self.strays}

    def __repr__(self):
        return f"<Peer {self._wire}{' closed' if self._lost is not None else ''}>"


def _seconds(seconds):
    """A limit in seconds; None is math.inf."""
    if seconds is None:
        return math.inf
    if seconds.__class__ not in (int, float) or not seconds >= 0:
        raise ValueError(f"timeout={seconds!r}: give seconds, 0 or more; None for no limit")
    return seconds if seconds < MAX_SECONDS else math.inf


def _check_framing(framing):
    """Each connection makes one of its own."""
    if not callable(framing):
        raise TypeError(f"framing={framing!r:.80}: give the class, as framing=Netstring; max_message= is an argument beside it")


def _limit(name, value):
    """A limit that is a number; math.inf is none."""
    if value.__class__ is not int and value != math.inf or value < 1:
        raise ValueError(f"{name}={value!r}: give a number, 1 or more")
    return value


@dataclasses.dataclass
class _Options:
    """What holds for a connection."""

    max_message: int = MAX_MESSAGE
    max_depth: int = flowcoro_schema.JSON_DEPTH
    max_batch: int = MAX_BATCH
    max_concurrent: int = MAX_CONCURRENT
    max_waiting: int = MAX_WAITING
    deadline: float = DEADLINE
    timeout: float = CALL_TIMEOUT
    end_grace: float = END_GRACE
    propagate: bool = False
    headers: object = None

    def __post_init__(self):
        for name in ("max_message", "max_depth", "max_batch", "max_concurrent", "max_waiting"):
            _limit(name, getattr(self, name))
        for name in ("deadline", "timeout", "end_grace"):
            setattr(self, name, _seconds(getattr(self, name)))

    @classmethod
    def of(cls, whose, **given):
        """TypeError for what is no option, which names those that there are."""
        options = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in options:
                raise TypeError(f"{whose} has no option {name}; limits are {', '.join(options[:-2])}")
        return cls(**given)


# ---- server ---------------------------------------------------------------------------------------------------

class RpcServer(Methods):
    """A server of JSON-RPC 2.0: methods, and what serves them over connections.

    title, version: what rpc.discover says, which discover=False turns off. Limits, of which each may be given: max_message bytes,
    either way; max_depth of arrays and objects in each other; max_batch members of a batch, whose answers have max_message bytes
    together; max_concurrent calls of one connection at once, and max_concurrent_in_all; max_waiting calls of a connection that
    wait for their turn, beyond which nothing is read for a second, and then those that come are refused; deadline: seconds that
    a call may take (streams: no limit), None for none;
    timeout: of calls that go to a client; end_grace: seconds that calls may go on when a client sends no more, which it does when
    it is gone, or waits for its last answers.

    Calls begin in the order in which they have come, and end as they do. ValueError for a limit that is none.
    """

    def __init__(self, *, title="JSON-RPC", version="1", discover=True, max_concurrent_in_all=MAX_CONCURRENT_IN_ALL, **limits):
        super().__init__()
        self._title, self._version, self._discovers = title, version, discover
        self._options = _Options.of("RpcServer()", **limits)
        self._places = _Places(_limit("max_concurrent_in_all", max_concurrent_in_all))
        self._alone = dataclasses.replace(self._options, end_grace=None)            # of a message by itself
        self._listening, self._peers, self._closing = {}, {}, False
        self._gone = flowcoro.ParkingLot("wait for the connections of an RPC server to end")

    # -- transports

    async def start_tcp_server(self, port, host="127.0.0.1", *, tls=None, framing=Newline, max_connections=math.inf, **listen):
        """Listen, and serve in the background until close(), a requested stop, or the end of main. Returns the TcpServer.

        framing: Newline, ContentLength, Netstring, LengthPrefixed or Concatenated. tls, listen: as for TcpServer.listen(), whose
        errors it raises. max_connections: at once; more wait. ClosedError after close().
        """
        self._check_open(framing)
        return self._start(await flowcoro_net.TcpServer.listen(host, port, tls=tls, **listen), framing, max_connections)

    async def start_unix_server(self, path, *, framing=Newline, max_connections=math.inf, **listen):
        """The same on a Unix socket. Returns the UnixServer."""
        self._check_open(framing)
        return self._start(await flowcoro_net.UnixServer.listen(path, **listen), framing, max_connections)

    def _check_open(self, framing):
        _check_framing(framing)
        if self._closing:
            raise flowcoro.ClosedError(f"{self!r} has been closed here; make another one")

    def _start(self, listening, framing, max_connections):
        if self._closing:                   # while it began to listen
            listening.close()
            self._check_open(framing)
        self._listening[listening] = flowcoro.spawn(self._serve(listening, framing, max_connections), name=f"serve {listening!r}")
        return listening

    async def _serve(self, listening, framing, max_connections):
        async with listening, flowcoro.TaskGroup() as group:
            group.spawn(self._close_on_stop(), name="close the RPC server on a stop")
            await listening.serve(functools.partial(self.serve_connection, framing=framing), max_connections=max_connections,
                                  drain_timeout=math.inf)
            group.cancel()

    async def _close_on_stop(self):
        await flowcoro.stop_requested()
        flowcoro.spawn(self.close(), name="close the RPC server")

    async def serve_connection(self, sock, *, framing=Newline):
        """Serve a Socket, or StandardStreams, to its end: what TcpServer.serve() calls. Errors of the connection end it without a
        word."""
        await self._serve_peer(_SocketWire(sock, framing(self._options.max_message)), sock)

    async def serve_messages(self, messages, *, headers=()):
        """Serve what has `await receive()` and `await send(text)`, a WebSocket, say, to its end. headers: for Context."""
        await self._serve_peer(_MessageWire(messages, self._options.max_message), messages, headers)

    async def _serve_peer(self, wire, transport, headers=()):
        peer = Peer(wire, self, self._options, self._places, transport=transport, headers=headers)
        self._peers[peer] = None
        if self._closing:
            peer._draining = peer._is_late = True
        try:
            await peer._run()
        finally:
            del self._peers[peer]
            self._gone.unpark_all()

    async def answer(self, data, *, headers=()):
        """The answer to a message (bytes) as bytes, or None if it wants none: for `@app.post("/rpc")` of an HTTP server.

        headers: a dict of texts for Context. Streams are answered with a list; a handler cannot call back. Cancelled: the calls
        are.
        """
        if len(data) > self._options.max_message:
            return encode_error(None, InvalidRequest.code, InvalidRequest.message,
                                f"a message of {len(data)} bytes, where max_message={self._options.max_message} are allowed")
        wire = _OneWire(data, self._options.max_message)
        peer = Peer(wire, self, self._alone, self._places, headers=headers)
        peer._input_ended, peer._draining = True, self._closing
        await peer._run()
        return wire.answers[0] if wire.answers else None

    # -- the end

    async def close(self, *, timeout=DRAIN_TIMEOUT):
        """Listen no more, let the calls under way end for `timeout` seconds, then cancel them. Twice is once.

        Calls that come meanwhile are answered with ShuttingDown. Cancelled: all is closed at once. A handler that takes long
        to be cancelled is waited for. In a handler of this server, for which it would wait, it returns at once, and goes on in a
        task of its own; not so in a task that the handler has spawned, and waits for.
        """
        self._closing = True
        for listening in self._listening:
            listening.close()
        for peer in list(self._peers):
            peer._drain()
        task = flowcoro.current_task()
        if any(peer._runs_in(task) for peer in self._peers):
            flowcoro.spawn(self.close(timeout=timeout), name=f"close {self!r}")
            return
        try:
            with flowcoro.move_on_after(timeout):
                await self._until_gone()
        finally:
            for peer in list(self._peers):
                peer.close_nowait()
        await self._until_gone()

    async def _until_gone(self):
        while self._peers:
            await self._gone.park_unless(lambda: not self._peers)
        await self.wait_closed()

    async def wait_closed(self):
        """Wait until close() was called, or a stop requested, and all connections that it has accepted have ended."""
        for task in list(self._listening.values()):
            await task

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        await self.close(timeout=DRAIN_TIMEOUT if kind is None else 0)

    # -- about it

    @property
    def peers(self):
        """The Peers of the connections that there are now: a list."""
        return list(self._peers)

    def statistics(self):
        """{"connections", "calls_running", "calls_queued"}"""
        return {"connections": len(self._peers), "calls_running": self._places.taken,
                "calls_queued": sum(len(peer._waiting) for peer in self.peers)}

    def __repr__(self):
        return f"<RpcServer {', '.join(map(repr, self._listening))}{' closed' if self._closing else ''}>"


# ---- client ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Backoff:
    """How long to wait before each attempt to connect again: `first` seconds, then `times` as much each time, `most` at most; of
    that a random part of `jitter` less, so that not all clients come at once. attempts: in a row; math.inf for ever. A connection
    over which nothing has come, and which has not lasted `most` seconds, was one more attempt in vain. ValueError for bounds that
    are none."""

    first: float = 0.1
    most: float = 10.0
    times: float = 2.0
    jitter: float = 0.5
    attempts: float = math.inf

    def __post_init__(self):
        for name, least, most in (("first", 0.001, math.inf), ("most", 0.001, math.inf), ("times", 1, math.inf), ("jitter", 0, 1),
                                  ("attempts", 0, math.inf)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a number from {least} to {most}")

    def delay(self, attempt, random):
        """Seconds before attempt 0, 1, 2 …; random: from 0 to 1."""
        try:
            seconds = min(self.first * self.times ** attempt, self.most)
        except OverflowError:
            seconds = self.most
        return seconds * (1 - self.jitter * random)


class _Operation:
    """A call, or a batch, as a policy sees it. `key`: the address; `idempotent`: whether it may run twice. Called with the method
    and its params as often as the policy wants; of a batch with None and the calls."""

    __slots__ = ("key", "idempotent", "_run")

    def __init__(self, key, idempotent, run):
        self.key, self.idempotent, self._run = key, idempotent, run

    def __call__(self, method, params):
        return self._run()


class RpcClient(_Caller):
    """A client of JSON-RPC 2.0 that connects again when its connection is lost. `await RpcClient.connect(…)` makes
    one, or RpcClient.over().

    Any number of tasks may call at a time, over one connection. Best in `async with`, which closes it.
    """

    def __init__(self, open, framing, methods, options, reconnect, policy, key):
        _check_framing(framing)
        if policy is not None and (isinstance(policy, type) or not callable(getattr(policy, "try_execute", None))):
            raise TypeError(f"policy={policy!r:.80}: give a policy of flowcoro_resilience, or what has `await "
                            "try_execute(operation, *args)`; not its class; None for none")
        self._policy, self._key = policy, key
        self._open, self._framing, self._options, self._reconnect = open, framing, options, reconnect
        self._methods = Methods() if methods is None else methods
        self._peer, self._task, self._failure, self._closed = None, None, None, False
        self._attempts = 0              # to connect again, since a connection was of use
        self._change = flowcoro.ParkingLot("wait for a connection")

    @classmethod
    async def connect(cls, host=None, port=None, *, unix=None, tls=None, server_name=None, framing=Newline, methods=None,
                      reconnect=Backoff(), connect_timeout=10.0, timeout=CALL_TIMEOUT, propagate=False, headers=None, policy=None,
                      **limits):
        """Connect to a host and a port, or to the Unix socket `unix`.

        tls, server_name: as for Socket.connect(). framing: as the server's. methods: a Methods that the server may call.
        reconnect: a Backoff, or None: a lost connection stays lost. connect_timeout, timeout: seconds to connect, and for a call,
        None for no limit. propagate: send with each call, as the member "$/context", its timeout and `headers`, a dict of texts
        or a function that gives one: for servers that know it. limits: as RpcServer's.
        policy: of flowcoro_resilience, say, or what else has `await try_execute(operation, method, params)`; it stands around
        each call() and batch(), and each attempt of it has its own timeout. The operation has `key`, the address ("host:port", or
        "unix:" and a path), and `idempotent`, as call() was told; of a batch method is None, and params are the calls. What the
        policy raises (Rejected) comes out as it is; errors have `sent`, False if the call has not run. notify() and streams go
        without: there is no answer to judge, or many.
        Errors as Socket.connect(): the first connection has to succeed, and no policy stands around that.
        """
        options = _Options.of("RpcClient.connect()", timeout=timeout, propagate=propagate, headers=headers, **limits)
        if unix is not None:
            key = f"unix:{os.fsdecode(unix)}"
            open = functools.partial(flowcoro_net.Socket.connect_unix, unix, tls=tls, server_name=server_name,
                                     timeout=connect_timeout)
        else:
            key = f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
            open = functools.partial(flowcoro_net.Socket.connect, host, port, tls=tls, server_name=server_name,
                                     timeout=connect_timeout)
        self = cls(open, framing, methods, options, reconnect, policy, key)
        return self._started(await open())

    @classmethod
    def over(cls, transport, *, framing=Newline, methods=None, timeout=CALL_TIMEOUT, propagate=False, headers=None, policy=None,
             **limits):
        """A client over what is connected already: a Socket, StandardStreams, or what has `await receive()` and `await
        send(text)`, a WebSocket, say, which stays yours to close. It is not connected again. The rest as for connect(); `key` of
        a policy's operations is the transport."""
        options = _Options.of("RpcClient.over()", timeout=timeout, propagate=propagate, headers=headers, **limits)
        return cls(None, framing, methods, options, None, policy, transport)._started(transport)

    def _started(self, transport):
        self._begin(transport)
        self._task = flowcoro.spawn(self._keep(), name=f"connection of {self!r}")
        return self

    def _begin(self, transport):
        most = self._options.max_message
        wire = _MessageWire(transport, most) if hasattr(transport, "receive") else _SocketWire(transport, self._framing(most))
        self._peer = Peer(wire, self._methods, self._options, _Places(math.inf), transport=transport)
        self._change.unpark_all()

    async def _keep(self):
        """Run one connection after the other."""
        try:
            while True:
                began = flowcoro.now()
                await self._peer._run()
                self._failure = self._peer._lost
                if self._reconnect is not None and (self._peer._heard or flowcoro.now() - began >= self._reconnect.most):
                    self._attempts = 0
                if self._closed or self._reconnect is None or not await self._connect_again():
                    return
        finally:
            self._closed = True
            self._change.unpark_all()

    async def _connect_again(self):
        """Whether there is a connection again."""
        while self._attempts < self._reconnect.attempts:
            await flowcoro.sleep(self._reconnect.delay(self._attempts, random.random()))
            self._attempts += 1
            try:
                self._begin(await self._open())
                return True
            except (OSError, TimeoutError) as error:
                self._failure = error
        return False

    async def _connected(self):
        """The Peer of a connection that is there. ClosedError, ConnectionLost."""
        def ready():
            return self._closed or self._peer is not None and self._peer._lost is None and not self._peer._input_ended

        await self._change.park_unless(ready)
        if self._closed:
            if self._failure is None or isinstance(self._failure, flowcoro.ClosedError):
                raise flowcoro.ClosedError(f"{self!r} has been closed here")
            raise ConnectionLost(f"{self!r}: there is no connection any more: {self._failure}", False) from self._failure
        return self._peer

    async def _connected_within(self, seconds, method):
        """A Peer, and what is left of the time. Errors of _connected(), TimeoutError."""
        began, what = flowcoro.now(), "a batch" if method is None else repr(method)
        with flowcoro.move_on_after(seconds):
            return await self._connected(), max(seconds - (flowcoro.now() - began), 0)
        raise TimeoutError(f"{self!r}: no connection for {what} within timeout={seconds:g} s, so it has not run: "
                           f"{self._failure or self._peer._lost}")

    async def _over_any(self, call, method, params, timeout):
        """What `call(peer, method, params, timeout)` gives, over the first connection that takes it: what was not sent has not
        run. Of a batch the method is None, and params are the calls."""
        peer = self._peer
        if peer._lost is None and not self._closed:
            try:
                return await call(peer, method, params, timeout)    # with nothing before it that takes time: most go so
            except ConnectionLost as error:
                lost = error
        else:
            lost = None
        seconds = self._options.timeout if timeout is _MISSING else _seconds(timeout)
        while lost is None or lost.sent is False and self._reconnect is not None:
            if lost is not None:
                seconds = min(seconds, lost._left)
            peer, seconds = await self._connected_within(seconds, method)
            try:
                return await call(peer, method, params, seconds)
            except ConnectionLost as error:
                lost = error
        try:
            raise lost
        finally:
            del lost            # else its traceback has this frame, which has it

    def _by_policy(self, run, method, params, idempotent):
        """await it: what `run()` gives, by way of the policy."""
        if self._policy is None:
            return run()
        return self._policy.try_execute(_Operation(self._key, bool(idempotent), run), method, params)

    def _call(self, method, params, timeout, idempotent=False):
        if self._policy is None:
            return self._over_any(Peer._call, method, params, timeout)
        return self._by_policy(functools.partial(self._over_any, Peer._call, method, params, timeout), method, params, idempotent)

    async def _notify(self, method, params):
        await self._over_any(Peer._notify, method, params, _MISSING)

    def _batch(self, calls, timeout, idempotent=False):
        def batch(peer, method, calls, timeout):
            return peer._batch(calls, timeout)
        return self._by_policy(functools.partial(self._over_any, batch, None, calls, timeout), None, calls, idempotent)

    async def _stream(self, method, params, timeout, window):
        peer, _ = await self._connected_within(_seconds(timeout), method)
        async for item in peer._stream(method, params, timeout, window):
            yield item

    async def subscribe(self, method, /, *args, params=_MISSING, window=STREAM_WINDOW, **named):
        """`async for item in client.subscribe("prices", "ACME")`: as stream(), and begun anew when the connection is lost: what
        was said in between is missed. It ends when the peer ends it, or the client is closed. After 30 seconds in which nothing
        has come the peer is asked for a sign of life, as after a timeout of call(); so it is for each stream()."""
        params = _given(args, named, params)
        while True:
            try:
                peer = await self._connected()
                async for item in peer._stream(method, params, None, window):
                    yield item
                return
            except ConnectionLost:
                if self._reconnect is None or self._closed:
                    raise
            except flowcoro.ClosedError:
                return

    @property
    def peer(self):
        """The Peer of the connection that there is now, or was."""
        return self._peer

    @property
    def closed(self):
        """Whether there is no connection, and will be none."""
        return self._closed

    async def close(self):
        """Close it: calls that wait for an answer get ClosedError. Twice is once. Cancelled: it is closed at once.

        In a handler of its `methods`, for which it would wait, it returns at once, and goes on in a task of its own.
        """
        if self._peer._runs_in(flowcoro.current_task()):
            flowcoro.spawn(self.close(), name=f"close {self!r}")
            return
        closing, self._closed = self._closed, True
        if not closing:
            self._failure = None
            self._change.unpark_all()
            try:
                await self._peer.close()
            finally:
                self._peer.close_nowait()
                self._task.cancel()
        try:
            await self._task
        except flowcoro.TaskCancelled:
            pass

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        await self.close()

    def __repr__(self):
        return f"<RpcClient {self._peer!r}{' closed' if self._closed else ''}>"


# ---- pool -----------------------------------------------------------------------------------------------------

def _again_after(refusal):
    """Seconds after which it may be worth while to ask again: of a server's own refusal 0, math.inf if a policy does not know."""
    seconds = getattr(refusal, "retry_after", 0.0)
    return math.inf if seconds is None else seconds


async def _close_all(clients):
    async with flowcoro.TaskGroup() as group:
        for client in clients:
            group.spawn(client.close())


class RpcPool(_Caller):
    """Clients of several servers that do the same: each call goes to the one with the fewest under way. `await
    RpcPool.connect(…)` makes one.

    A call that has not run where it was sent, since the connection was lost before, or the server shuts down or has too many
    calls, goes to the next, with what is left of its timeout; so does one that a client's policy does not let through (an error
    with `sent` False). If all refuse, the error of that one comes out which can be asked again first: a server, or the policy
    with the least `retry_after`. That policy stands around each try at one server, whose attempts have the whole timeout each:
    with `Keyed(lambda address: CircuitBreaker())` each has its own breaker. A Retry that is to go from one to the other stands
    around the pool: `retry.try_execute(pool.call, "add", 1, 2)`.
    """

    def __init__(self, clients):
        self._clients = list(clients)
        self._turn = 0
        if not self._clients:
            raise ValueError("RpcPool([]): give one client at least")

    @classmethod
    async def connect(cls, addresses, **options):
        """Connect to each (host, port). Options and errors as RpcClient.connect()."""
        clients = []
        try:
            for host, port in addresses:
                clients.append(await RpcClient.connect(host, port, **options))
        except BaseException:
            await _close_all(clients)
            raise
        return cls(clients)

    def _order(self):
        """The clients, the best first: connected, or to be so, and with the fewest calls under way; among equals each has its
        turn."""
        self._turn += 1
        start = self._turn % len(self._clients)
        turned = self._clients[start:] + self._clients[:start]
        return sorted(turned, key=lambda client: (client._closed, client._peer._lost is not None or client._peer._input_ended,
                                                  len(client._peer._pending)))

    async def _try_each(self, call, timeout, *asked):
        """What `call(caller, seconds)` gives at the first that takes it: a Peer, which does not wait for another connection; then
        at a client without a connection, which does. asked: what a policy is told of it, if it is anything for one."""
        refused, gone, began = None, [], flowcoro.now()

        def left(client):
            seconds = client._options.timeout if timeout is _MISSING else _seconds(timeout)
            if client._policy is not None:              # which may wait, and each attempt of which has a timeout of its own
                return seconds
            return max(seconds - (flowcoro.now() - began), 0)

        for client in self._order():
            if client.closed:           # what ClosedError ends below may have run, so that one is not looked for
                gone.append(client)
                continue
            run = functools.partial(call, client._peer, left(client))
            try:
                return await (client._by_policy(run, *asked) if asked else run())
            except flowcoro.FlowCoroError as error:
                if getattr(error, "sent", None) is not False:           # as a policy's Rejected has it, too
                    raise
                if isinstance(error, ConnectionLost):
                    gone.append(client)
                elif refused is None or _again_after(error) < _again_after(refused):
                    refused = error
        waiting = [client for client in gone if not client.closed]
        if refused is not None and not waiting:
            raise refused
        first = (waiting or gone)[0]
        return await call(first, left(first))

    async def _call(self, method, params, timeout, idempotent=False):
        return await self._try_each(lambda caller, seconds: caller._call(method, params, seconds, idempotent), timeout,
                                    method, params, idempotent)

    async def _notify(self, method, params):
        await self._try_each(lambda caller, seconds: caller._notify(method, params), _MISSING)

    async def _batch(self, calls, timeout, idempotent=False):
        return await self._try_each(lambda caller, seconds: caller._batch(calls, seconds, idempotent), timeout,
                                    None, calls, idempotent)

    def _stream(self, method, params, timeout, window):
        return self._order()[0]._stream(method, params, timeout, window)

    async def close(self):
        """Close all clients, at the same time. Cancelled: they are closed at once."""
        await _close_all(self._clients)

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        await self.close()
