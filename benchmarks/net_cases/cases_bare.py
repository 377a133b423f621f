"""No runtime at all: one loop round epoll, level-triggered, by hand. About the least that a server written in Python has to do.

Run by ../net.py. It knows no coroutines, no cancellation and no deadlines. What does not fit into the system's buffer it
keeps, and watches for room then only.
"""

import platform
import select
import socket

import harness


def echo():
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listener.setblocking(False)
    harness.ready(listener.getsockname()[1])
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    listens, connections, unsent = listener.fileno(), {}, {}
    poll = epoll.poll
    while True:
        for fd, event in poll():
            if fd == listens:
                sock, _ = listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[sock.fileno()] = sock, sock.recv, sock.send
                epoll.register(sock, select.EPOLLIN)
                continue
            sock, recv, send = connections[fd]
            try:
                if unsent and fd in unsent:
                    data = unsent.pop(fd)
                else:
                    data = recv(harness.CHUNK)
                    if not data:
                        raise ConnectionResetError
                try:
                    sent = send(data)
                except BlockingIOError:
                    sent = 0
                if sent < len(data):
                    unsent[fd] = memoryview(data)[sent:]
                    epoll.modify(fd, select.EPOLLOUT)
                elif event & select.EPOLLOUT:
                    epoll.modify(fd, select.EPOLLIN)
            except ConnectionError:
                del connections[fd]
                sock.close()


if __name__ == "__main__":
    harness.main(dict(echo=echo), lambda case: case(), platform.python_version())
