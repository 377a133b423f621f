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

import os

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
