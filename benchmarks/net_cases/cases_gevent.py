"""gevent's server: greenlets instead of coroutines. Run by ../net.py; harness.py says what each case does."""

import socket

import gevent
import gevent.server
import gevent.ssl

import harness


def echo(sock, address):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)          # as all others do by themselves
    while data := sock.recv(harness.CHUNK):
        sock.sendall(data)


def receive(sock, address):
    count = 0
    while data := sock.recv(harness.LARGE):
        count += len(data)
    sock.sendall(harness.in_bytes(count))


def send(sock, address):
    for piece in harness.pieces(harness.number(sock.recv(8))):
        sock.sendall(piece)


def serve(handler):
    context = harness.tls(gevent.ssl.SSLContext)
    server = gevent.server.StreamServer(("127.0.0.1", 0), handler, **({"ssl_context": context} if context else {}))
    server.start()
    harness.ready(server.server_port)
    server.serve_forever()


if __name__ == "__main__":
    harness.main(dict(echo=echo, receive=receive, send=send), serve, gevent.__version__)
