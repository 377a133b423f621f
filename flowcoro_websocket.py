"""flowcoro_websocket 0.1.0: WebSocket: a strict codec without I/O (RFC 6455, RFC 7692).

To vendor, copy: flowcoro.py, flowcoro_net.py, flowcoro_websocket.py

Example:

    from flowcoro_websocket import WebSocketConnection

    client, server = WebSocketConnection("client"), WebSocketConnection("server")
    server.receive_data(client.send_message("hello"))
    print(server.next_event())

Contents: constants · errors · masking · handshake · codec

How it works:

Sources: RFC 6455 (WebSocket), RFC 7692 (permessage-deflate).

What it does not do: yet, most of it.

SPDX-License-Identifier: MIT
"""

import base64
import collections
import contextlib
import os
import random
import re
import threading
import urllib.parse
import weakref

import flowcoro
import flowcoro_net

__version__ = "0.1.0"

__all__ = ["WebSocketConnection", "Piece", "Ping", "Pong", "Close", "NEED_DATA", "CLOSED", "Deflate", "encode_message", "accept_key",
           "WebSocketError", "ProtocolError", "RemoteProtocolError", "LocalProtocolError", "HandshakeError", "ConnectionClosed"]

# ---- constants ------------------------------------------------------------------------------------------------

# Bytes of a message at most, inflated; beyond it 1009. `websockets` has the same, aiohttp 4 MiB.
MAX_MESSAGE = 2**20

# ---- errors ---------------------------------------------------------------------------------------------------

class WebSocketError(flowcoro.FlowCoroError):
    """The base of the errors of this module."""


class ProtocolError(WebSocketError):
    """What was received, or is to be sent, is no WebSocket."""


class RemoteProtocolError(ProtocolError):
    """The peer's fault. `code`: what the Close frame says that answers it: 1002, 1007, 1008 or 1009."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class LocalProtocolError(ProtocolError):
    """Our own fault: what is to be sent is no WebSocket, or comes at the wrong time."""


class HandshakeError(WebSocketError):
    """The handshake has failed. `status`, `headers` (pairs) and `body` of the answer: to be given (server) or received (client)."""

    def __init__(self, status, message, headers=(), body=b""):
        super().__init__(message)
        self.status, self.headers, self.body = status, tuple(headers), body


class ConnectionClosed(WebSocketError, flowcoro_net.BrokenError):
    """The WebSocket is closed. `code`, `reason`: of the peer's Close, 1005 if it gave none, 1006 if there was no Close."""

    def __init__(self, code, reason="", message=""):
        super().__init__(message or f"the WebSocket is closed: {code} {reason}".rstrip())
        self.code, self.reason = code, reason


# ---- masking --------------------------------------------------------------------------------------------------

def _masked(data, mask):
    size = len(data)
    return (int.from_bytes(data, "little") ^ int.from_bytes((mask * (size + 3 >> 2))[:size], "little")).to_bytes(size, "little")


# ---- handshake ------------------------------------------------------------------------------------------------

def accept_key(key):
    """The Sec-WebSocket-Accept that answers a Sec-WebSocket-Key, both str (RFC 6455 4.2.2)."""
    import base64, hashlib
    return base64.b64encode(hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()).decode()


class Deflate:
    """permessage-deflate."""


# ---- codec ----------------------------------------------------------------------------------------------------

class _Sign:
    """A thing that is only itself."""

    __slots__ = ("name",)

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


# Of next_event(): give it more by receive_data() or receive_end(); nothing more will come.
NEED_DATA, CLOSED = _Sign("NEED_DATA"), _Sign("CLOSED")


class Piece:
    """Some of a message: `data` (str or bytes), and whether it is its `first` and its `last` piece."""

    __slots__ = ("data", "first", "last")

    def __init__(self, data, first, last):
        self.data, self.first, self.last = data, first, last


class Ping:
    """A Ping frame: answer it by send_pong(payload)."""

    __slots__ = ("payload",)

    def __init__(self, payload=b""):
        self.payload = payload


class Pong(Ping):
    """A Pong frame."""

    __slots__ = ()


class Close:
    """The peer's Close frame: answer it by send_close(code, reason), unless you have sent yours. `code` is 1005 if it had none."""

    __slots__ = ("code", "reason")

    def __init__(self, code=1005, reason=""):
        self.code, self.reason = code, reason


class WebSocketConnection:
    """One end of a connection after the handshake, without its socket."""

    def __init__(self, role, *, deflate=None, max_message=MAX_MESSAGE, max_frame=None):
        self.role, self.deflate, self.max_message, self.max_frame = role, deflate, max_message, max_frame
        self.pieces, self.our_state, self.their_state = False, "OPEN", "OPEN"
        self._buffer, self._ended, self._error = bytearray(), False, None

    def receive_data(self, data):
        """What the peer has sent next."""
        self._buffer += data

    def receive_end(self):
        """The peer will send no more."""
        self._ended = True

    def next_event(self):
        """The next event: a message (str or bytes), Piece, Ping, Pong, Close, NEED_DATA or CLOSED; or RemoteProtocolError."""
        if self.their_state == "CLOSED":
            return CLOSED
        buffer, server = self._buffer, self.role == "server"
        more = CLOSED if self._ended else NEED_DATA
        if len(buffer) < 2:
            return more
        kind, size, at = buffer[0], buffer[1] & 127, 2
        if size >= 126:
            at = 4 if size == 126 else 10
            if len(buffer) < at:
                return more
            size = int.from_bytes(buffer[2:at], "big")
        mask = bytes(buffer[at:at + 4]) if server else b"\0\0\0\0"
        at += 4 if server else 0
        if len(buffer) < at + size:
            return more
        data = _masked(buffer[at:at + size], mask)
        del buffer[:at + size]
        if kind == 0x81:
            return data.decode()
        if kind == 0x82:
            return data
        if kind in (0x89, 0x8a):
            return Ping(data) if kind == 0x89 else Pong(data)
        if kind == 0x88:
            self.their_state = "CLOSED"
            return Close(int.from_bytes(data[:2], "big"), data[2:].decode()) if data else Close()
        raise RemoteProtocolError(1002, f"a frame that begins with 0x{kind:02x}")

    def send_message(self, message):
        """The bytes of a whole message, str or bytes-like."""
        return self._frame(0x81, message.encode()) if isinstance(message, str) else self._frame(0x82, bytes(message))

    def send_piece(self, data, first, last):
        """The bytes of a fragment."""
        kind = (1 if isinstance(data, str) else 2) if first else 0
        return self._frame(kind | (0x80 if last else 0), data.encode() if isinstance(data, str) else bytes(data))

    def send_ping(self, payload=b""):
        """The bytes of a Ping."""
        return self._frame(0x89, payload)

    def send_pong(self, payload=b""):
        """The bytes of a Pong."""
        return self._frame(0x8a, payload)

    def send_close(self, code=1000, reason=""):
        """The bytes of a Close. After it nothing may be sent."""
        self.our_state = "CLOSED"
        return self._frame(0x88, b"" if code == 1005 else code.to_bytes(2, "big") + reason.encode())

    def send_failure(self):
        """After a RemoteProtocolError: the bytes of the Close that tells the peer."""
        return self.send_close(self._error.code)

    def _frame(self, kind, data):
        size, bit = len(data), 0 if self.role == "server" else 0x80
        if size < 126:
            head = bytes((kind, bit | size))
        elif size < 2**16:
            head = bytes((kind, bit | 126)) + size.to_bytes(2, "big")
        else:
            head = bytes((kind, bit | 127)) + size.to_bytes(8, "big")
        if not bit:
            return head + data
        mask = os.urandom(4)
        return head + mask + _masked(data, mask)


def encode_message(message):
    """The bytes of a whole message as a server without deflate sends it: the same for every client."""
    return WebSocketConnection("server").send_message(message)

# STUBS
OPEN = "OPEN"
WebSocketConnection.send_failure = lambda self: self.send_close(1002)

def new_key():
    return base64.b64encode(os.urandom(16)).decode()

def _check_request(method, version, pairs, *, subprotocols=(), origins=None, host="", deflate=None):
    fields = {name.lower(): value for name, value in pairs}
    if "upgrade" not in fields:
        raise HandshakeError(426, "this speaks WebSocket", [("Upgrade", "websocket"), ("Connection", "Upgrade")])
    if fields.get("sec-websocket-version") != "13":
        raise HandshakeError(426, "version", [("Sec-WebSocket-Version", "13")])
    offered = [each.strip() for each in fields.get("sec-websocket-protocol", "").split(",")]
    chosen = next((each for each in subprotocols if each in offered), None)
    if origins is not None and fields.get("origin") not in origins:
        raise HandshakeError(403, "origin")
    out = [("Sec-WebSocket-Accept", accept_key(fields["sec-websocket-key"]))]
    if chosen:
        out.append(("Sec-WebSocket-Protocol", chosen))
    return out, chosen, None

def _request_head(target, host, key, *, pairs=(), subprotocols=(), origin=None, deflate=None):
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {key}",
             "Sec-WebSocket-Version: 13"]
    if subprotocols:
        lines.append("Sec-WebSocket-Protocol: " + ", ".join(subprotocols))
    if origin:
        lines.append("Origin: " + origin)
    lines += [f"{a}: {b}" for a, b in pairs]
    return "\r\n".join([*lines, "", ""]).encode()

def _response_head(buffer, limit=65536):
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = buffer[:end].decode("latin-1").split("\r\n")
    _, status, reason = (first + " ").split(" ", 2)
    return int(status), reason.strip(), [tuple(line.split(": ", 1)) for line in lines], end + 4

def _check_response(status, pairs, key, *, subprotocols=(), deflate=None):
    fields = {name.lower(): value for name, value in pairs}
    if fields.get("sec-websocket-accept") != accept_key(key):
        raise HandshakeError(status, "wrong key", pairs)
    return fields.get("sec-websocket-protocol"), None



# ---- the WebSocket --------------------------------------------------------------------------------------------
#
# Who reads? Whoever waits in receive() reads the socket itself: there is no task that reads ahead, no queue in between, no switch
# from one to the other. A handler that does not receive, because it computes, waits for something else, or only sends, would
# leave nobody to answer a Ping or to see the Close. So the sweep, which looks at each WebSocket of a kernel twice a second, has a
# task read for it from the second look on, into a short queue; the next receive() takes what is there, ends that task, and reads
# itself again. An idle connection has no task but its handler's, and no timer.
#
#     W1  one at a time reads, and asks the codec: who receives (`_receiving`), or the task in the background (`_background`)
#     W2  what is sent are whole frames, in the order in which the codec has made them. What the system does not take at once is
#         kept in `_unsent`, and one task (_flush) sends it: a task that is cancelled while it sends leaves no half of a frame
#     W3  `_ready` only while send() may write at once: open, nothing kept, no fragmented message under way, one worker;
#         `_special` unless receive() may read at once: nothing queued, nobody in the background, whole messages, one worker
#     W4  what the peer can make us wait for has an end: a Ping or a Close without an answer, a peer that does not read: there is
#         a Ping in what is kept for it, at the latest when the next one is due

# Seconds between two looks at all WebSockets of a kernel: how late a deadline may be. Shorter where ping_interval= wants it.
SWEEP = 0.5

# Seconds between Pings, and without any sign of life after one: `websockets` has the same. Proxies cut what is idle for 60.
PING_INTERVAL, PING_TIMEOUT = 20.0, 20.0

# Seconds for the peer's Close after ours, and for it to end the connection. `websockets` 10.
CLOSE_TIMEOUT = 10.0

# Seconds, and bytes, for which we read on after a failure, so that the Close that tells why arrives (else the system may reset).
LINGER, MAX_LINGER = 2.0, 4 * 2**20

# Messages, and bytes (or characters) of them, that are received for a handler that does not receive. `websockets` 16 messages.
MAX_QUEUE, MAX_QUEUED = 16, 2**20

# Bytes that are kept for a peer that does not read, before who sends, or answers its Pings, waits: `websockets` 32 KiB.
MAX_UNSENT = 64 * 2**10

# Bytes that one read asks for. Once one was full: the messages are large.
CHUNK, LARGE_CHUNK = 64 * 2**10, 256 * 2**10

# Codes with which `async for` ends without an error: done, going away, and none, which is what a browser's close() sends.
_NORMAL = (1000, 1001, 1005)

_current_task = flowcoro.current_task
_NO_LOCK = contextlib.nullcontext()
_GONE = flowcoro_net.NetworkError, flowcoro.ClosedError
_MESSAGE = str, bytes, bytearray, memoryview


async def _turn():
    """A point of cancellation, and of scheduling when the task has had its turn."""
    task = _current_task()
    if task.budget > 0:
        task.budget -= 1
    else:
        await flowcoro.checkpoint()


class _Keeper:
    """Looks after the WebSockets of a kernel: one task, while there are any."""

    all = weakref.WeakKeyDictionary()

    def __init__(self):
        self.several = flowcoro.runtime_info()["workers"] > 1
        self.members = {}           # id -> weakref: one that nobody has closed is to be found by the collector, which says so
        self.grain, self.runs = SWEEP, False

    @classmethod
    def of_kernel(cls):
        kernel = flowcoro.current_kernel()
        return cls.all.get(kernel) or cls.all.setdefault(kernel, cls())

    def add(self, ws, grain):
        self.members[id(ws)] = weakref.ref(ws)
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
        return not self.runs

    async def sweep(self):
        try:
            while not self.end():
                await flowcoro.sleep(self.grain)
                now = flowcoro.now()
                for count, (key, ref) in enumerate(list(self.members.items()), 1):
                    ws = ref()
                    if ws is None or ws._closed:
                        self.members.pop(key, None)
                    else:
                        ws._look(now)
                    del ws
                    if not count % 1000:
                        await flowcoro.checkpoint()
        finally:
            self.runs = False


class _Outgoing:
    """How a WebSocket sends."""

    __slots__ = ("_sock", "_codec", "_lock", "_lot", "_ready", "_unsent", "_kept", "_flushed", "_flushing", "_fragmenting",
                 "_deferred", "_batched", "_shares", "_lost", "_closed", "_close_by", "close_code", "close_reason", "__weakref__")

    def __init__(self, sock, codec, several):
        self._sock, self._codec = sock, codec
        self._lock = threading.Lock() if several else _NO_LOCK      # over a step of the codec with the write of what it gives
        self._lot = flowcoro.ParkingLot("wait for a WebSocket") if several else None        # of all who wait for a change
        self._unsent = None             # frames that the system has not taken
        self._kept = self._flushed = 0  # bytes that ever came into _unsent, and that have left it
        self._flushing = self._fragmenting = self._closed = False
        self._deferred = None           # messages of broadcast() that wait for the end of a fragmented one
        self._batched = False           # what is kept is from broadcast(), and is sent at the end of the turn, by _Batch
        self._shares = codec.role == "server" and not several       # whether it can send the same bytes as others
        self._lost = None               # the error of a write: nothing more can be sent, and something may still be read
        self._close_by = None           # when the sweep closes
        self.close_code, self.close_reason = None, ""
        self._ready = not several

    def _mark(self):
        """W3, after anything that it speaks of has changed."""
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
        error = ConnectionClosed(code, reason, said)
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
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        self._keep(data)

    def _keep(self, data):
        """W2: keep what the system has not taken, and have it sent."""
        if self._lost is not None or self._closed:
            return
        if self._unsent is None:
            self._unsent = []
        self._unsent.append(data)
        self._kept += len(data)
        if not self._flushing:
            self._flushing = True
            self._mark()
            flowcoro.spawn(self._flush(), name="send what a WebSocket has kept")

    def _take_unsent(self):
        with self._lock:
            pieces, self._unsent = self._unsent, None
            if not pieces:
                self._flushing = False
                self._mark()
            return pieces

    async def _flush(self):
        try:
            while pieces := self._take_unsent():
                await self._sock.write_many(pieces)
                self._flushed += sum(map(len, pieces))
                self._wake()
        except _GONE as error:
            self._lost = error
        finally:
            self._flushing, self._unsent, self._flushed = False, None, self._kept
            self._mark()
            self._wake()

    async def _drain(self, most=0):
        """Wait until the system has all that was kept until now, but for `most` bytes; or never will."""
        mark = self._kept - most
        while self._flushing and self._flushed < mark:
            await self._wait(lambda: not self._flushing or self._flushed >= mark)

    # -- messages

    async def send(self, message):
        """Send a message: str (text), bytes-like (binary), or an iterable, async or not, of pieces of one of these, which leave
        as fragments of one message as they come. Returns when the system has all of it: who sends faster than the peer reads waits.

        Several tasks may send at a time; messages do not mix. Cancelled: the message was not sent, or it will leave as a whole
        (the socket goes on with it). Of an iterable that fails or is cancelled a part was sent, which has no end: the WebSocket
        is closed with 1011. ConnectionClosed once it is closed, or close() was called; TypeError for what is no message.
        """
        task = _current_task()
        if task.budget > 0:
            task.budget -= 1
        else:
            await flowcoro.checkpoint()
        if not self._ready or message.__class__ is not str and message.__class__ is not bytes:
            return await self._send_otherwise(message)
        data = self._codec.send_message(message)
        try:
            sent = self._sock.write_nowait(data)
        except _GONE as error:
            self._lost = error
            self._mark()
            raise self._closed_error() from error
        if sent != len(data):
            self._keep(memoryview(data)[sent:])
            await self._sent()

    async def _sent(self):
        """After the last frame of a message was kept."""
        await self._drain()
        if self._lost is not None:
            raise self._closed_error()

    async def _send_otherwise(self, message):
        if not isinstance(message, _MESSAGE):
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
            self._fragmenting = True
            self._mark()
            return True

    def _end_fragments(self):
        with self._lock:
            self._fragmenting = False
            deferred, self._deferred = self._deferred, None
            if self._codec.our_state is OPEN:
                for message in deferred or ():
                    self._write(self._codec.send_message(message))
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
                if not isinstance(piece, _MESSAGE) or kind not in (None, isinstance(piece, str)):
                    raise TypeError(f"send(): a piece is {piece!r:.80}; all of a message are str, or all are bytes-like")
                first, kind = kind is None, isinstance(piece, str)
                begun = True
                await self._send_piece(piece, first, False)
            await self._send_piece(b"" if kind is False else "", not begun, True)
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
        await _turn()
        await self._sent()


    def _offer(self, message, frame, max_backlog):
        """For broadcast(), where it cannot be batched: whether it was sent or kept; None if the member is slow."""
        with self._lock:
            if self._closed or self._lost is not None or self._codec.our_state is not OPEN:
                return False
            deferred = self._deferred or ()
            if self._kept - self._flushed + sum(map(len, deferred)) > max_backlog:
                return None
            if self._fragmenting:
                self._deferred = [*deferred, message]
            else:
                self._write(frame if self._codec.role == "server" else self._codec.send_message(message))
            return self._lost is None


async def _each(items):
    for item in items:
        yield item


class _Incoming(_Outgoing):
    """How a WebSocket receives, and how it ends."""

    __slots__ = ("_special", "_receiving", "_background", "_queue", "_queued", "_unread", "_idle", "_chunk", "_pings")

    def __init__(self, sock, codec, several):
        super().__init__(sock, codec, several)
        self._special = several
        self._receiving, self._background = False, None     # W1
        self._queue, self._queued = None, 0                 # messages and pieces that were received in the background, their length
        self._unread = False            # a message of receive_pieces() was not received to its end
        self._idle = 0                  # looks of the sweep that have found nobody who reads
        self._chunk = CHUNK
        self._pings = None              # payload -> (when it was sent, the Promise of who waits or None)

    def _mark_special(self):
        """W3"""
        self._special = (self._lock is not _NO_LOCK or bool(self._queue) or self._background is not None or self._closed
                         or self._unread or self._codec.pieces)

    # -- messages

    async def receive(self):
        """The next message: str (text) or bytes (binary). Cancelled: nothing is lost.

        ConnectionClosed once the peer has closed, or the connection is lost (code 1006), or nothing came in answer to a Ping. The
        messages that came before are given first. BusyError while another task receives.
        """
        task = _current_task()
        if task.budget > 0:
            task.budget -= 1
        else:
            await flowcoro.checkpoint()
        if self._special or self._receiving:
            return await self._receive_otherwise()
        codec = self._codec
        self._receiving, self._idle = True, 0
        try:
            event = codec.next_event()
            if event is NEED_DATA:
                data = await self._sock.read(self._chunk)
                if data:
                    codec.receive_data(data)
                    if len(data) == CHUNK:
                        self._chunk = LARGE_CHUNK
                else:
                    codec.receive_end()
                event = codec.next_event()
            if event.__class__ is str or event.__class__ is bytes:
                return event
            return await self._next(event)
        except ConnectionClosed:
            raise
        except (RemoteProtocolError, *_GONE) as error:
            raise await self._failed(error)
        finally:
            self._receiving = False
            if self._lot is not None:
                self._lot.unpark_all()

    async def _receive_otherwise(self):
        self._codec.pieces = False
        while self._unread:                     # the rest of a message that nobody wanted
            await self._receive_event()
        event = await self._receive_event()
        if type(event) is not Piece:
            return event
        pieces, size = [event.data], len(event.data)        # it had begun as one that is received in pieces
        while not event.last:
            event = await self._receive_event()
            pieces.append(event.data)
            size += len(event.data)
            if size > self._codec.max_message:
                raise await self._failed(RemoteProtocolError(1009, f"a message of more than {self._codec.max_message} bytes "
                                                                   "(max_message)"))
        return type(event.data)().join(pieces)

    async def receive_pieces(self):
        """`async for piece in ws.receive_pieces()`: the next message in pieces, str or bytes, as they come. It may be of any
        length: max_message= does not count. What has been received as a whole already comes as one piece.

        Who leaves it before the end, best by contextlib.aclosing(), drops the rest. Errors as receive().
        """
        await _turn()
        self._codec.pieces = self._special = True
        while self._unread:
            await self._receive_event()
        while True:
            event = await self._receive_event()
            if type(event) is not Piece:
                yield event
                return
            if event.data:
                yield event.data
            if event.last:
                return

    async def _receive_event(self):
        """The next message or Piece."""
        while True:
            with self._lock:
                background = self._background
                if self._queue:
                    event = self._queue.popleft()
                    self._queued -= len(event.data if type(event) is Piece else event)
                    break
                if self._receiving:
                    raise flowcoro.BusyError(f"{self!r}: another task receives from it; one at a time")
                if self._closed:
                    raise self._closed_error()
                if background is None:
                    self._receiving, self._idle = True, 0
            if background is None:
                event = await self._read()
                break
            background.cancel()
            await self._wait(lambda: self._background is not background)
        self._unread = type(event) is Piece and not event.last
        self._mark_special()
        return event

    async def _read(self):
        """The next message or Piece from the network. W1: `_receiving` is set, and no more when it returns."""
        try:
            return await self._next()
        finally:
            self._receiving = False
            self._wake()

    async def _next(self, event=None):
        """The next message or Piece, of `event` and what comes after it. For who reads (W1)."""
        codec = self._codec
        try:
            while True:
                if event is None:
                    event = codec.next_event()
                kind = type(event)
                if kind is str or kind is bytes or kind is Piece:
                    return event
                if event is NEED_DATA:
                    data = await self._sock.read(self._chunk)
                    codec.receive_data(data) if data else codec.receive_end()
                else:
                    await self._control(event)
                event = None
        except ConnectionClosed:
            raise
        except (RemoteProtocolError, *_GONE) as error:
            raise await self._failed(error)

    # -- what is no message

    async def _control(self, event):
        kind = type(event)
        if kind is Ping:
            with self._lock:
                if self._codec.our_state is OPEN:
                    self._write(self._codec.send_pong(event.payload))
            await _turn()
            await self._drain(MAX_UNSENT)           # who floods us with Pings, and does not read, waits
        elif kind is Pong:
            self._take_pong(event.payload)
            await _turn()
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
        if isinstance(error, RemoteProtocolError):
            self.close_code, self.close_reason = error.code, str(error)
            with self._lock:
                if self._codec.our_state is OPEN and not self._closed:
                    self._write(self._codec.send_failure())
                self._mark()
            await self._part(True)
        else:
            self._lost = self._lost or error
            self._end()
        return self._closed_error(error)

    def _say_close(self, code, reason):
        with self._lock:
            if self._codec.our_state is OPEN and not self._closed:
                self._write(self._codec.send_close(code, reason))
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
        if self._closed:
            return
        self._closed = self._special = True
        self.close_code = self.close_code or 1006
        self._sock.close_nowait()
        self._mark()
        pings, self._pings = self._pings, None
        for _, promise in (pings or {}).values():
            if promise is not None:
                promise.set_exception(self._closed_error())
        self._wake()

    def _take_pong(self, payload):
        """A Pong answers the Pings before that one, too (RFC 6455 5.5.3). One that nobody has asked for is none of our business."""
        pings, now = self._pings, flowcoro.now()
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
        """-> the payload"""
        payload = os.urandom(4)
        if self._pings is None:
            self._pings = {}
        with self._lock:
            if self._codec.our_state is OPEN and not self._closed:
                self._pings[payload] = flowcoro.now(), promise
                self._write(self._codec.send_ping(payload))
        return payload

    # -- in the background

    def _has_room(self):
        return self._queue is None or len(self._queue) < MAX_QUEUE and self._queued < MAX_QUEUED

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
                if self._queue is None:
                    self._queue = collections.deque()
                self._queue.append(event)
                self._queued += len(event.data if type(event) is Piece else event)
        except ConnectionClosed:
            pass
        finally:
            if self._background is me:
                self._background = None
            self._mark_special()
            self._wake()


class WebSocket(_Incoming):
    """A WebSocket, either end: what accept() and connect() give.

    `request`: of a server, the request; `response_headers`: of a client, [(name, value)] of the answer; `subprotocol`: the one
    that was agreed on, or None; `close_code`, `close_reason`: of the peer's Close, once it is closed: 1005 if it gave no code, 1006
    if there was no Close, and what we have found if the peer has broken the protocol; `latency`: seconds that the last Ping of
    the keep-alive took, or None; `state`: whatever you like to keep here.

    One task receives at a time; any number may send. `async with ws:` closes it in the end: with 1000, or 1011 after an error.
    `async for message in ws` gives the messages until the peer has closed normally (1000, 1001, or without a code).
    """

    __slots__ = ("request", "response_headers", "subprotocol", "latency", "state", "_ping_interval", "_ping_timeout",
                 "_ping_due", "_pinged", "_progress")

    def __init__(self, sock, role, *, deflate=None, max_message=MAX_MESSAGE, max_frame=None, ping_interval=PING_INTERVAL,
                 ping_timeout=PING_TIMEOUT, subprotocol=None, request=None, response_headers=()):
        """By hand, where the handshake was made elsewhere, as in tests: `sock` a flowcoro_net.Socket, `role` "server" or "client"."""
        keeper = _Keeper.of_kernel()
        super().__init__(sock, WebSocketConnection(role, deflate=deflate, max_message=max_message, max_frame=max_frame),
                         keeper.several)
        self.request, self.response_headers, self.subprotocol = request, response_headers, subprotocol
        self.latency = self.state = None
        self._ping_interval = _seconds(ping_interval, "ping_interval")
        self._ping_timeout = _seconds(ping_timeout, "ping_timeout")
        self._ping_due = flowcoro.now() + self._ping_interval
        self._pinged = None             # since when nothing has come, after a Ping; None: there is none under way
        self._progress = 0              # bytes received then
        keeper.add(self, min(self._ping_interval, self._ping_timeout) / 4)

    # -- Pings

    async def ping(self):
        """Send a Ping and wait for its Pong: the seconds that took. ConnectionClosed. Cancelled: nobody waits for the Pong."""
        await _turn()
        self._check_open()
        promise = flowcoro.Promise()
        payload = self._send_ping(promise)
        self._read_in_background()
        try:
            return await promise
        finally:
            if self._pings is not None:
                self._pings.pop(payload, None)

    def _look(self, now):
        """The sweep's: see to it that somebody reads, to deadlines, and to the keep-alive."""
        if self._close_by is not None and now >= self._close_by:
            self._end()
            return
        if not self._receiving and self._background is None:
            self._idle += 1
            if self._idle > 1:
                self._read_in_background()
        if self._pinged is None:
            if now >= self._ping_due:
                self._pinged, self._progress = now, self._sock.statistics()["bytes_received"]
                self._send_ping()
        elif not self._pings:
            self._pinged, self._ping_due = None, self._pinged + self._ping_interval
        elif now - self._pinged >= self._ping_timeout:
            self._look_for_life(now)

    def _look_for_life(self, now):
        """No Pong in time: the peer is gone, unless something has come, or nobody was there to read it."""
        progress = self._sock.statistics()["bytes_received"]
        if progress != self._progress or not self._receiving and self._background is None:
            self._pinged, self._progress = now, progress
            return
        self.close_reason = f"no answer to a Ping for {self._ping_timeout:g} s (ping_timeout)"
        self._lost = self._lost or flowcoro_net.BrokenError(None, f"{self._sock!r}: {self.close_reason}")
        self._end()

    # -- the end

    async def close(self, code=1000, reason="", *, timeout=CLOSE_TIMEOUT):
        """Close: send a Close, wait for the peer's, at most `timeout` seconds, and end the connection. What is received meanwhile
        is dropped. Twice is once. ValueError for a code that may not be sent, or a reason of more than 123 bytes.

        Cancelled: the connection is ended at once.
        """
        await _turn()
        self._say_close(code, reason)
        try:
            with flowcoro.move_on_after(timeout):
                await self._until_closed()
        finally:
            self._end()

    async def _until_closed(self):
        while not self._closed:
            if self._receiving or self._background is not None:
                await self._wait(lambda: self._closed or not self._receiving and self._background is None)
            else:
                try:
                    await self._receive_event()
                except ConnectionClosed:
                    break
                except flowcoro.BusyError:
                    pass

    def close_nowait(self, code=1000, reason=""):
        """Send a Close, and have the connection ended when the peer's has come, or after 10 seconds. Never blocks. Who receives
        goes on until then."""
        if self._closed:
            return
        self._say_close(code, reason)
        if self._close_by is None:
            self._close_by = flowcoro.now() + CLOSE_TIMEOUT
        self._read_in_background()

    async def wait_closed(self):
        """Wait until it is closed, by whomever. For a handler that only sends. Messages that come meanwhile are kept for
        receive(), 16 at most: then nothing more is read until somebody receives."""
        await _turn()
        self._read_in_background()
        while not self._closed:
            await self._wait(lambda: self._closed)

    @property
    def closed(self):
        """Whether the connection is at its end."""
        return self._closed

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        if kind is None or issubclass(kind, ConnectionClosed):
            await self.close()
        elif issubclass(kind, Exception):
            await self.close(1011)
        else:
            self._say_close(1001, "")
            self._end()

    def __aiter__(self):
        return self

    async def __anext__(self):
        try:
            return await self.receive()
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
                 ping_interval=PING_INTERVAL, ping_timeout=PING_TIMEOUT):
    """Accept the WebSocket that a request asks for (RFC 6455 section 4.2). -> WebSocket

    request: a flowcoro_http.Request, or what has its method, version, headers, host and upgrade(). HttpServer(websocket=accept)
    calls this; the options are those of @app.websocket(path).
    subprotocols: those that are spoken here, the best first; the first that the client offers is taken, or none.
    origins: who may connect from a browser: an iterable of "https://example.com", and None for who has no Origin, which are all
    that are no browsers; "same": the host that is asked for, and who has no Origin; None: anybody. Cookies come with requests of
    all pages there are: whoever goes by them needs this.
    headers: pairs for the answer. deflate: True, False, or a Deflate: whether messages may be compressed. max_message: bytes of a
    message, inflated, beyond which it is refused with 1009; max_frame: those of one frame. ping_interval: seconds between Pings;
    ping_timeout: seconds after one without any sign of life, and the connection counts as lost; None: no Pings, no limit.
    HandshakeError, with the `status` and `headers` of the answer: 400, 403 for the origin, 405, 426. What upgrade() raises.
    Cancelled: the connection is cut.
    """
    pairs, subprotocol, agreed = _check_request(
        request.method, request.version, request.headers.items(), subprotocols=subprotocols, origins=origins, host=request.host,
        deflate=_as_deflate(deflate))
    sock = await request.upgrade("websocket", [*pairs, *headers])
    return WebSocket(sock, "server", deflate=agreed, max_message=max_message, max_frame=max_frame, ping_interval=ping_interval,
                     ping_timeout=ping_timeout, subprotocol=subprotocol, request=request)


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

_PORTS = {"ws": 80, "wss": 443, "http": 80, "https": 443}


class _Target:
    """A URL, taken apart."""

    __slots__ = ("tls", "host", "port", "authority", "path", "credentials", "text")

    def __init__(self, text, schemes=("ws", "wss"), what="url"):
        """ValueError if it is none; TypeError."""
        if not isinstance(text, str):
            raise TypeError(f"{what}={text!r:.60}: give a str")
        if any(not "!" <= letter <= "~" and letter < "\x80" for letter in text):
            raise ValueError(f"{what}={text!r:.200}: a URL has no blanks and no control characters")
        parts = urllib.parse.urlsplit(text)
        if parts.scheme not in schemes:
            raise ValueError(f"{what}={_without_password(text)!r:.200}: it begins with "
                             f"{' or '.join(f'{scheme}://' for scheme in schemes)}")
        if "#" in text:
            raise ValueError(f"{what}={_without_password(text)!r:.200}: what follows \"#\" is never sent; leave it out (RFC 6455 3)")
        host, self.tls = parts.hostname, parts.scheme in ("wss", "https")
        if not host:
            raise ValueError(f"{what}={_without_password(text)!r:.200}: it has no host")
        try:
            self.host = (host if host.isascii() else host.encode("idna").decode()).lower()
            self.port = _PORTS[parts.scheme] if parts.port is None else parts.port
        except (UnicodeError, ValueError) as error:
            raise ValueError(f"{what}={_without_password(text)!r:.200}: {error}") from None
        shown = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = shown if self.port == _PORTS[parts.scheme] else f"{shown}:{self.port}"
        path = (parts.path or "/") + ("?" + parts.query if parts.query else "")
        self.path = path if path.isascii() else urllib.parse.quote(path, safe="/?%:@!$&'()*+,;=~-._[]")
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

    headers: pairs or a mapping, for the request; subprotocols: those that are spoken, the best first; origin: an Origin. A user and
    a password in the URL are sent (Basic). tls: an ssl.SSLContext instead of the usual one for wss. proxy: the URL of an HTTP
    proxy (http://user:password@host:port, or https://), True for what the environment says (https_proxy, no_proxy …), None: none.
    redirects: how many are followed, 0 for none; what is for one origin (Authorization, Cookie) is not sent to another, and from
    wss to ws none leads. open_timeout: seconds for all of it. socket: a flowcoro_net.Socket that is connected already, instead of
    a connection. deflate, max_message, max_frame, ping_interval, ping_timeout as accept().

    Errors: HandshakeError, with status, headers and body of an answer that is no WebSocket's; TimeoutError; those of
    Socket.connect(): BrokenError, ResolveError, TlsError; ValueError, TypeError. Cancelled: nothing is left behind.

    The iterator tries again after BrokenError, ResolveError, TimeoutError and statuses that may change (429, 5xx …), each time
    later, up to a minute, with some chance in it; Retry-After is heeded. Other errors are raised. on_retry(error, seconds) is called
    before it waits (error None: the connection has ended). What is wrong in the block is yours to catch: ConnectionClosed, and
    `continue`. The WebSocket of a block is closed when the next one begins.
    """

    def __init__(self, url, *, headers=(), subprotocols=(), origin=None, tls=None, proxy=None, redirects=MAX_REDIRECTS,
                 open_timeout=OPEN_TIMEOUT, deflate=True, max_message=MAX_MESSAGE, max_frame=None, socket=None,
                 ping_interval=PING_INTERVAL, ping_timeout=PING_TIMEOUT, on_retry=None):
        self._target = _Target(url)
        self._headers = list(headers.items() if hasattr(headers, "items") else headers)
        self._subprotocols, self._origin, self._deflate = tuple(subprotocols), origin, _as_deflate(deflate)
        self._tls, self._proxy, self._redirects = tls, proxy, redirects
        self._open_timeout = _seconds(open_timeout, "open_timeout")
        if isinstance(proxy, str):
            self._proxy = self._as_proxy(proxy)
        elif proxy not in (None, True, False):
            raise TypeError(f"proxy={proxy!r:.60}: give a URL, True for the environment's, or None")
        if tls is not None and not self._target.tls:
            raise ValueError(f"tls= is for wss://, and {self._target.text!r:.200} has none")
        self._options = {"max_message": max_message, "max_frame": max_frame, "ping_interval": ping_interval,
                         "ping_timeout": ping_timeout}
        self._socket, self._on_retry, self._ws = socket, on_retry, None

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
            except flowcoro_net.TlsError:
                raise
            except (flowcoro_net.NetworkError, TimeoutError) as raised:
                error = raised
            except HandshakeError as raised:
                if raised.status not in _RETRIED:
                    raise
                error, asked = raised, _retry_after(raised.headers)
            else:
                began = flowcoro.now()
                async with ws:
                    yield ws
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
                ws, location = await self._shake(sock, target, headers, left)
            except BaseException:
                sock.close_nowait()
                raise
            if ws is not None:
                return ws
            sock.close_nowait()
            target = self._redirected(target, location)
            if target.origin != origin:
                headers = [(name, value) for name, value in headers
                           if name.lower() not in ("authorization", "cookie", "proxy-authorization")]
        raise AssertionError("the last answer is no redirect")

    def _redirected(self, target, location):
        text = urllib.parse.urljoin(target.text.replace("ws", "http", 1), location)
        text = "ws" + text[4:] if text.startswith("http") else text
        try:
            new = _Target(text.partition("#")[0], what="Location")
        except ValueError as error:
            raise HandshakeError(502, f"{target.text}: a redirect leads nowhere: {error}") from None
        if target.tls and not new.tls:
            raise HandshakeError(502, f"{target.text}: a redirect leads from wss to {new.text!r:.200}, which is not encrypted")
        return new

    async def _connect(self, target):
        if self._socket is not None:
            sock, self._socket = self._socket, None
            return sock
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
        status, reason, pairs, rest = await _answer(sock)
        if status // 100 != 2 or rest:
            raise HandshakeError(status, f"the proxy {proxy.authority} does not connect to {shown}:{target.port}: it answers "
                                         f"{status} {reason}".rstrip(), pairs, bytes(rest[:MAX_ANSWER]))

    async def _shake(self, sock, target, headers, redirects):
        """-> (WebSocket, None), or (None, where a redirect leads)"""
        key = new_key()
        if target.credentials and not any(name.lower() == "authorization" for name, _ in headers):
            headers = [*headers, ("Authorization", _basic(target.credentials))]
        await sock.write(_request_head(target.path, target.authority, key, pairs=headers, subprotocols=self._subprotocols,
                                       origin=self._origin, deflate=self._deflate))
        status, reason, pairs, rest = await _answer(sock)
        if status != 101:
            location = next((value for name, value in pairs if name.lower() == "location"), None)
            if status in (301, 302, 303, 307, 308) and location is not None and redirects:
                return None, location
            said = f"{target.text}: the answer is {status} {reason}".rstrip()
            if status // 100 == 3 and location is not None and self._redirects:
                said = f"{target.text}: more than {self._redirects} redirects in a row (redirects=)"
            raise HandshakeError(status, said, pairs, await _content(sock, pairs, rest))
        subprotocol, deflate = _check_response(status, pairs, key, subprotocols=self._subprotocols, deflate=self._deflate)
        if rest:
            sock.unread(rest)
        return WebSocket(sock, "client", deflate=deflate, subprotocol=subprotocol, response_headers=pairs, **self._options), None


async def _answer(sock):
    """The head of the next answer: (status, reason, pairs, what came after it)."""
    buffer, informed = bytearray(), 0
    while True:
        found = _response_head(buffer)
        if found is None:
            data = await sock.read()
            if not data:
                raise flowcoro_net.BrokenError(None, f"{sock!r}: the peer ended the connection after {len(buffer)} bytes of its "
                                                     "answer to the handshake")
            buffer += data
            continue
        status, reason, pairs, length = found
        del buffer[:length]
        if not 100 <= status <= 199 or status == 101:
            return status, reason, pairs, buffer
        informed += 1
        if informed > 5:
            raise HandshakeError(502, "more than 5 informational responses before the answer")


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

# Bytes that are kept for a member before it counts as slow: some seconds of a busy room, and a tenth of a gigabyte for 100 of them.
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
            if ws._closed:
                continue
            try:
                sent = ws._sock.write_nowait(data)
            except _GONE as error:
                ws._lost, sent = error, len(data)
            ws._flushed += sent
            if sent == len(data):
                ws._unsent, ws._flushing = None, False
                ws._mark()
                ws._wake()
            else:
                ws._unsent = [memoryview(data)[sent:]]
                flowcoro.spawn(ws._flush(), name="send what a WebSocket has kept")
            if not count % 1000:
                await flowcoro.checkpoint()


def broadcast(websockets, message, *, slow="skip", max_backlog=MAX_BACKLOG):
    """Send a message, str or bytes-like, to many. Never blocks. -> a list of those that did not get it.

    It leaves at the end of the turn, when the tasks that are ready have run: several messages together. What the system does not
    take then is kept for the member, and sent when it reads. A member for which more than `max_backlog` bytes are kept is slow:
    "skip": it does not get this message; "close": it is closed, with 1013 (try again later). Those that are closed are in the list,
    too. The message is encoded once for all servers' ends, and never compressed there. TypeError, ValueError.
    """
    if slow not in ("skip", "close"):
        raise ValueError(f"slow={slow!r}: give \"skip\" or \"close\"")
    frame, missed, batch = encode_message(message), [], _Batch.of_kernel()
    size, first = len(frame), not batch.members
    for ws in list(websockets):
        if ws._batched and ws._kept - ws._flushed <= max_backlog:
            ws._unsent.append(frame)
            ws._kept += size
        elif ws._ready and ws._shares:
            ws._unsent, ws._flushing, ws._batched, ws._ready = [frame], True, True, False
            ws._kept += size
            batch.members.append(ws)
        elif not (offered := ws._offer(message, frame, max_backlog)):
            missed.append(ws)
            if offered is None and slow == "close":
                ws.close_nowait(1013, "too slow")
    if first and batch.members:
        flowcoro.spawn(batch.send(), name="send what was broadcast")
    return missed
