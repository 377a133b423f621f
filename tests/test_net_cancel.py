"""Cancellation at each point where an operation of the network may wait, one after the other; with one worker and with three."""

import contextlib
import functools
import socket
import types

import pytest

import flowcoro
import flowcoro_net
from flowcoro_net import BrokenError, Socket, TcpServer, UdpSocket, UnixServer, client_tls, server_tls
from test_net import PATIENCE, nothing_is_left_behind, run  # noqa: F401  (a fixture)
from test_net_servers import echo
from test_net_tls import certificates  # noqa: F401  (a fixture)

CONTENT = bytes(range(256)) * 40

workers = pytest.mark.parametrize("workers", [1, 3])


@types.coroutine
def cancelled_at(scope, number, coro):
    """Run `coro` and cancel `scope` at its suspension of this number. Its budget is always used up: all that may wait does."""
    task, step, argument, count = flowcoro.current_task(), coro.send, None, 0
    while True:
        task.budget = 0
        try:
            trap = step(argument)
        except StopIteration as stop:
            return stop.value
        count += 1
        if count == number:
            scope.cancel()
        step, argument = coro.send, None
        try:
            argument = yield trap
        except BaseException as error:
            step, argument = coro.throw, error


async def at_each_point(make, after=None):
    """Run make() again and again, cancelled later each time, until it comes to its end. Returns how many points there were."""
    before, number = flowcoro.statistics()["descriptors"], 0
    while True:
        number += 1
        with flowcoro.CancelScope() as scope:
            await cancelled_at(scope, number, make())
        if after is not None:
            await after(scope.cancelled_caught)
        with flowcoro.timeout(PATIENCE):            # the other end hears of it in its own time
            while flowcoro.statistics()["descriptors"] != before:
                await flowcoro.sleep(0)
        if not scope.cancelled_caught:
            return number - 1


@contextlib.asynccontextmanager
async def serving(server, handler=echo):
    async with server, flowcoro.TaskGroup() as group:
        group.spawn(server.serve(handler))
        yield server
        server.close()


async def converse(sock, path):
    """All operations of a connection to an echo server."""
    async with sock:
        await sock.write(b"line\n")
        assert await sock.read_until() == b"line\n"
        await sock.write_many([b"some", b"more", b"x" * 300_000])
        assert await sock.read_exactly(8) == b"somemore"
        left = 300_000
        while left:
            left -= await sock.read_into(bytearray(left))
        with open(path, "rb") as file:
            assert await sock.send_file(file, 100) == len(CONTENT) - 100
            assert await sock.read_exactly(len(CONTENT) - 100) == CONTENT[100:]
            assert await sock.send_file(file, 200, head=b"head") == len(CONTENT) - 200
        assert await sock.read_exactly(4 + len(CONTENT) - 200) == b"head" + CONTENT[200:]
        await sock.shutdown_write()
        assert await sock.read() == b""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


@workers
def test_a_conversation(workers, path):
    async def main():
        async with serving(await TcpServer.listen("127.0.0.1", 0)) as server:
            async def client():
                await converse(await Socket.connect(*server.local), path)

            assert await at_each_point(client) > 15
            assert server.statistics()["failed"] == 0

    run(main, workers=workers)


@workers
def test_a_conversation_over_a_unix_socket(workers, path, tmp_path):
    async def main():
        async with serving(await UnixServer.listen(tmp_path / "socket")) as server:
            async def client():
                await converse(await Socket.connect_unix(server.local), path)

            assert await at_each_point(client) > 15

    run(main, workers=workers)


@workers
def test_a_conversation_with_tls(workers, path, certificates):  # noqa: F811
    async def main():
        async with serving(await TcpServer.listen("127.0.0.1", 0, tls=server_tls(*certificates.good))) as server:
            context = client_tls(ca=certificates.ca)

            async def client():
                await converse(await Socket.connect("127.0.0.1", server.local[1], tls=context), path)

            assert await at_each_point(client) > 20
            assert server.statistics()["failed"] == 0

    run(main, workers=workers)


@workers
def test_starttls_at_both_ends(workers, certificates):  # noqa: F811
    context, theirs = client_tls(ca=certificates.ca), server_tls(*certificates.good)

    async def main():
        for cancelled in "client", "server":
            def pair():
                return [Socket(each) for each in socket.socketpair()]

            async def handshake():
                near, far = pair()

                async def other(make):
                    with contextlib.suppress(flowcoro_net.NetworkError, flowcoro.ClosedError):
                        await make()
                        if make is server:
                            await far.close()           # near's close, who is a client, waits for that

                client = functools.partial(near.start_tls, context, server_name="localhost")
                server = functools.partial(far.start_tls, theirs, server_side=True)
                this, that = (client, server) if cancelled == "client" else (server, client)
                async with flowcoro.TaskGroup() as group:
                    group.spawn(other(that))
                    try:
                        await this()
                        if this is server:
                            await far.close()
                        await near.close()
                    finally:
                        near.close_nowait()
                        group.cancel()
                        far.close_nowait()

            assert await at_each_point(handshake) >= 4

    run(main, workers=workers)


@workers
def test_a_server_cancelled_while_it_serves(workers):
    async def main():
        before = flowcoro.statistics()["descriptors"]
        seen = []

        async def server():
            async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
                async def client():
                    with contextlib.suppress(BrokenError):
                        async with await Socket.connect(*server.local) as sock:
                            await sock.write(b"x")
                            seen.append(await sock.read())
                    server.close()

                group.spawn(client())
                await server.serve(echo, max_connections=1)

        assert await at_each_point(server) > 5
        assert b"x" in seen and flowcoro.statistics()["descriptors"] == before

    run(main, workers=workers)


@workers
def test_a_handler_cancelled_anywhere_harms_nobody(workers, reports):
    async def main():
        points = []

        async def handler(sock):
            with flowcoro.CancelScope() as scope:
                await cancelled_at(scope, len(points) + 1, echo(sock))
            points.append(scope.cancelled_caught)

        async with serving(await TcpServer.listen("127.0.0.1", 0), handler) as server:
            while not points or points[-1]:
                with contextlib.suppress(BrokenError):
                    async with await Socket.connect(*server.local) as sock:
                        await sock.write(b"x" * 100_000)
                        await sock.shutdown_write()
                        while await sock.read():
                            pass
                while server.statistics()["connections"]:
                    await flowcoro.sleep(0)
            assert len(points) > 3 and server.statistics()["failed"] == 0

    run(main, workers=workers)
    assert reports == []


@workers
def test_accept_listen_and_resolve(workers, tmp_path):
    async def main():
        async def listen():
            async with await TcpServer.listen("127.0.0.1", 0):
                pass
            async with await UnixServer.listen(tmp_path / "one"):
                pass
            await flowcoro_net.resolve("127.0.0.1", 80)

        assert await at_each_point(listen) >= 3
        assert not (tmp_path / "one").exists()
        async with await TcpServer.listen("127.0.0.1", 0) as server:
            plain = []

            async def accept():
                async with await server.accept() as sock:
                    assert await sock.read() == b"kept"

            async def connect_anew(cancelled):
                for each in plain:
                    each.close()
                plain[:] = [socket.create_connection(server.local, timeout=PATIENCE)]
                plain[0].sendall(b"kept")

            await connect_anew(True)
            assert await at_each_point(accept, connect_anew) >= 2
            plain[0].close()

    run(main, workers=workers)


@workers
def test_datagrams(workers):
    async def main():
        async def exchange():
            async with await UdpSocket.bind("127.0.0.1", 0) as one, await UdpSocket.connect(*one.local) as other:
                await other.send(b"question")
                data, address = await one.receive_from()
                await one.send_to(data, address)
                assert await other.receive() == b"question"

        assert await at_each_point(exchange) >= 6

    run(main, workers=workers)


@workers
def test_a_writer_among_others_on_one_connection(workers, certificates):  # noqa: F811
    """A reader goes on, undisturbed, while the writer of its connection is cancelled anywhere, plain and with TLS."""
    async def main():
        for tls in None, server_tls(*certificates.good):
            received = []

            async def count(sock):
                received.append(0)
                while data := await sock.read():
                    received[-1] += len(data)
                await sock.write(b"all of it")

            async with serving(await TcpServer.listen("127.0.0.1", 0, tls=tls), count) as server:
                context = tls and client_tls(ca=certificates.ca)

                async def client():
                    async with await Socket.connect("127.0.0.1", server.local[1], tls=context) as sock:
                        async with flowcoro.TaskGroup() as group:
                            reader = group.spawn(sock.read())
                            with flowcoro.CancelScope() as scope:
                                await cancelled_at(scope, numbers[0], sock.write(b"x" * 12_000_000))
                            stopped.append(scope.cancelled_caught)
                            await sock.shutdown_write()
                            assert await reader == b"all of it"

                numbers, stopped = [0], [True]
                while stopped[-1]:
                    numbers[0] += 1
                    await client()
                assert received[-1] == 12_000_000 and len(received) > 1

    run(main, workers=workers)
