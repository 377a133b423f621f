"""Blocking sockets, one connection after the other: what the system itself can do. Run by ../net.py.

`shutil` and `sendfile` are ways to send a file that the standard library has for blocking sockets; their files are
cases_shutil.py and cases_sendfile.py.
"""

import platform
import socket

import harness


def receive(sock):
    count, buffer = 0, bytearray(harness.LARGE)
    while some := sock.recv_into(buffer):
        count += some
    sock.sendall(harness.in_bytes(count))


def send(sock):
    for piece in harness.pieces(harness.number(sock.recv(8))):
        sock.sendall(piece)


def file(sock):
    rest, buffer = harness.number(sock.recv(8)), bytearray(harness.LARGE)
    view = memoryview(buffer)
    with open(harness.OPTIONS["file"], "rb", buffering=0) as file:
        while rest:
            count = file.readinto(view[:rest])
            sock.sendall(view[:count])
            rest -= count


def serve(handler):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        harness.ready(listener.getsockname()[1])
        while True:
            sock, _ = listener.accept()
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                handler(sock)


if __name__ == "__main__":
    harness.main(dict(receive=receive, send=send, file=file), serve, platform.python_version())
