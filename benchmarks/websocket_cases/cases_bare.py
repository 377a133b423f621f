"""No runtime at all: one loop round epoll, by hand. About the least that a server of WebSocket written in Python has to do.

Run by ../websocket.py. It checks nothing of what comes, takes each frame for a whole message of its client's, and does not care
whether the system has room for what it sends. Unmasking is all that it does with a message; how that is done is
flowcoro_websocket.py's, which has measured what Python offers.
"""

import base64
import hashlib
import platform
import select
import socket

import harness

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
CHUNK = 98_304          # bytes of one read: more than a message of 64 KiB, and not so many that malloc() asks the system for them
TABLES = [bytes(number ^ byte for number in range(256)) for byte in range(256)]
members = {}            # descriptor -> socket
unfinished = {}         # descriptor -> what has come of a frame that is not whole


def shake_hands(sock):
    """Blocks until the handshake is over. False when the client has gone."""
    head = b""
    while b"\r\n\r\n" not in head:
        if not (data := sock.recv(4096)):
            return False
        head += data
    key = next(line.partition(b":")[2].strip() for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
    sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
                 + base64.b64encode(hashlib.sha1(key + GUID).digest()) + b"\r\n\r\n")
    return True


def unmasked(data, start, size):
    """The payload of so many bytes that begins after its key, at `start`."""
    mask, data = data[start:start + 4], data[start + 4:start + 4 + size]
    if size < 1024:
        mask = int.from_bytes((mask * (size + 3 >> 2))[:size], "little")
        return (int.from_bytes(data, "little") ^ mask).to_bytes(size, "little")
    out = bytearray(data)
    for place in range(4):
        out[place::4] = out[place::4].translate(TABLES[mask[place]])
    return out


def answer_of(fd, data):
    """The frame to send, or None while the message is not whole."""
    data = unfinished.pop(fd, b"") + data
    length, at = data[1] & 0x7F, 2
    if length == 126:
        length, at = int.from_bytes(data[2:4], "big"), 4
    elif length == 127:
        length, at = int.from_bytes(data[2:10], "big"), 10
    if len(data) < at + 4 + length:
        unfinished[fd] = data
        return None
    return data[:1] + bytes([data[1] & 0x7F]) + data[2:at] + unmasked(data, at, length)


def serve(deliver):
    """Call `deliver(sock, frame)` with each message that has come, as the frame that is to be sent."""
    listener = harness.listener()
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    poll, listens = epoll.poll, listener.fileno()
    while True:
        for fd, _ in poll():
            if fd == listens:
                sock, _ = listener.accept()
                if shake_hands(sock):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    members[sock.fileno()] = sock
                    epoll.register(sock, select.EPOLLIN)
                continue
            sock = members[fd]
            try:
                data = sock.recv(CHUNK)
            except ConnectionError:
                data = b""
            if not data:
                del members[fd]
                sock.close()
            elif (frame := answer_of(fd, data)) is not None:
                deliver(sock, frame)


def echo():
    serve(lambda sock, frame: sock.sendall(frame))


def broadcast():
    def send_to_all(sock, frame):
        for member in members.values():
            member.send(frame)

    serve(send_to_all)


if __name__ == "__main__":
    harness.main(dict(echo=echo, broadcast=broadcast), platform.python_version())
