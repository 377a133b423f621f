"""A TCP echo server and its clients in one thread, with nothing but sockets and `wait_readable`.

The pattern of all non-blocking I/O: try the operation; if it would block, wait until the socket is ready;
try again. `notify_closing` comes before `close`, so that nobody waits for a socket that is gone.
"""

import contextlib
import socket

import flowcoro


@contextlib.contextmanager
def closing(sock):
    """A non-blocking socket that is closed at the end of the block, however that ends."""
    sock.setblocking(False)
    try:
        yield sock
    finally:
        flowcoro.notify_closing(sock)
        sock.close()


async def when_readable(sock, operation, *arguments):
    while True:
        try:
            return operation(*arguments)
        except BlockingIOError:
            await flowcoro.wait_readable(sock)


async def echo(connection):
    with closing(connection):
        while data := await when_readable(connection, connection.recv, 4096):
            connection.send(data)       # a few bytes always fit; a real server awaits wait_writable() too


async def serve(listener):
    async with flowcoro.TaskGroup() as group:
        while True:
            connection, _ = await when_readable(listener, listener.accept)
            group.spawn(echo(connection))


async def ask(address, question):
    with closing(socket.create_connection(address)) as sock:        # at once, for the listener is here
        sock.send(question.encode())
        return (await when_readable(sock, sock.recv, 4096)).decode()


async def main():
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        server = flowcoro.spawn(serve(listener))
        address = listener.getsockname()
        print(await flowcoro.when_all(*(ask(address, f"hello {number}") for number in range(3))))
        server.cancel()


if __name__ == "__main__":
    flowcoro.run(main())
