"""curio's server. Run by ../net.py; harness.py says what each case does."""

import socket

import curio

import harness


async def echo(client, address):
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)        # as all others do by themselves
    while data := await client.recv(harness.CHUNK):
        await client.sendall(data)


async def receive(client, address):
    count = 0
    while data := await client.recv(harness.LARGE):
        count += len(data)
    await client.sendall(harness.in_bytes(count))


async def send(client, address):
    for piece in harness.pieces(harness.number(await client.recv(8))):
        await client.sendall(piece)


def serve(handler):
    async def main():
        listener = curio.tcp_server_socket("127.0.0.1", 0)
        harness.ready(listener.getsockname()[1])
        await curio.network.run_server(listener, handler, harness.tls())
    curio.run(main)


if __name__ == "__main__":
    harness.main(dict(echo=echo, receive=receive, send=send), serve, curio.__version__)
