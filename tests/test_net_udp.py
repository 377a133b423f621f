"""Datagrams: IPv4, IPv6, connected, multicast, lengths, ends, and several workers; against plain sockets."""

import contextlib
import errno
import shutil
import socket
import subprocess

import pytest

import flowcoro
from flowcoro_net import BrokenError, LimitError, ResolveError, UdpSocket
from flowcoro_testing import wait_all_tasks_parked
from test_net import PATIENCE, nothing_is_left_behind, run, settled  # noqa: F401  (a fixture)
from test_net_servers import needs_ipv6


@pytest.fixture
def plain():
    """A plain socket on 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(PATIENCE)
        yield sock


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_each_datagram_arrives_whole_with_its_sender(host):
    async def main():
        async with await UdpSocket.bind(host, 0) as one, await UdpSocket.bind(host, 0) as other:
            for data in b"hello", b"", bytearray(b"x" * 5000):
                await one.send_to(data, other.local[:2])
                assert await other.receive_from() == (bytes(data), one.local)
            await other.send_to(b"back", one.local)
            assert await one.receive() == b"back"
            assert one.statistics() == {"datagrams_received": 1, "datagrams_sent": 3}

    run(main)


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_a_connected_socket_hears_its_peer_alone(host):
    async def main():
        async with await UdpSocket.bind(host, 0) as server, await UdpSocket.bind(host, 0) as stranger, \
                await UdpSocket.connect(*server.local[:2]) as client:
            assert client.peer == server.local and server.peer is None
            await client.send(b"question")
            data, address = await server.receive_from()
            assert (data, address) == (b"question", client.local)
            await stranger.send_to(b"lie", client.local)
            await server.send_to(b"answer", address)
            assert await client.receive_from() == (b"answer", server.local)
            with flowcoro.move_on_after(0.01) as scope:
                await client.receive()
            assert scope.cancelled_caught
            with pytest.raises(ValueError, match="is not connected: use send_to"):
                await server.send(b"x")

    run(main)


def test_what_is_longer_than_asked_for_is_an_error_and_the_next_one_arrives(plain):
    async def main():
        async with await UdpSocket.bind("127.0.0.1", 0) as sock:
            for data in b"12345", b"123456", b"next":
                plain.sendto(data, sock.local)
            assert await sock.receive(5) == b"12345"
            with pytest.raises(LimitError, match=rf"from 127.0.0.1:{plain.getsockname()[1]} was longer than max_bytes=5"):
                await sock.receive(5)
            assert await sock.receive(5) == b"next"
            plain.sendto(b"x", sock.local)
            with pytest.raises(LimitError):
                await sock.receive(0)
            plain.sendto(b"", sock.local)
            assert await sock.receive(0) == b""

    run(main)


def test_a_datagram_of_the_greatest_length_and_one_that_is_too_long():
    async def main():
        async with await UdpSocket.bind("127.0.0.1", 0) as one, await UdpSocket.bind("127.0.0.1", 0) as other:
            data = bytes(65_507)
            await one.send_to(data, other.local)
            assert await other.receive() == data
            with pytest.raises(OSError, match="sending 65508 bytes to 127.0.0.1:.*") as caught:
                await one.send_to(data + b"x", other.local)
            assert caught.value.errno == errno.EMSGSIZE
            await one.send_to(b"goes on", other.local)
            assert await other.receive() == b"goes on"

    run(main)


def test_nobody_there_is_told_to_a_connected_socket_which_goes_on():
    async def main():
        async with await UdpSocket.bind("127.0.0.1", 0) as gone:
            address = gone.local
        async with await UdpSocket.connect(*address) as sock, flowcoro.TaskGroup() as group:
            reader = await settled(group, expect_broken(sock.receive()))
            await sock.send(b"is there anybody?")
            await reader
            async with await UdpSocket.bind(*address) as there:
                await sock.send(b"and now?")
                assert await there.receive() == b"and now?"

    async def expect_broken(coro):
        with pytest.raises(BrokenError, match="receiving: .*refused; what was sent before found nobody there") as caught:
            await coro
        assert caught.value.errno == errno.ECONNREFUSED

    run(main)


def test_multicast_reaches_those_who_have_joined():
    group = "239.255.77.77"

    async def main():
        async with contextlib.AsyncExitStack() as stack:
            one = await stack.enter_async_context(await UdpSocket.bind("", 0, reuse_address=True))
            other = await stack.enter_async_context(await UdpSocket.bind("", one.local[1], reuse_address=True))
            sender = await stack.enter_async_context(await UdpSocket.bind("127.0.0.1", 0))
            sender.raw.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            for sock in one, other:
                sock.join(group, "127.0.0.1")
            await sender.send_to(b"to all", (group, one.local[1]))
            assert await one.receive() == await other.receive() == b"to all"
            other.leave(group, "127.0.0.1")
            with pytest.raises(OSError, match="cannot join or leave '239.255.77.77' on interface='127.0.0.1'"):
                other.leave(group, "127.0.0.1")
            with pytest.raises(OSError, match="cannot join or leave '127.0.0.1'"):
                one.join("127.0.0.1")
            for wrong in "no address", "ff02::fb", None:
                with pytest.raises(ValueError, match=f"group={wrong!r}: give the address of a multicast group .*'224.0.0.251'"):
                    one.join(wrong)
            for wrong in 5, b"lo":
                with pytest.raises(TypeError, match=f"interface={wrong!r}: give the name of a network card"):
                    one.join(group, wrong)
            with pytest.raises(OSError, match="on interface='no such card': no interface") as caught:
                one.join(group, "no such card")
            assert caught.value.errno == errno.ENODEV

    run(main)


def card_for_multicast():
    """A network card (index, name) that carries IPv6 multicast; None if there is none."""
    for index, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(b"", ("ff01::77", 9, 0, index))         # ff01: within this machine
            return index, name


@needs_ipv6
def test_multicast_by_ipv6():
    card = card_for_multicast()
    if card is None:
        pytest.skip("no network card carries IPv6 multicast")
    index, name = card

    async def main():
        async with await UdpSocket.bind("::", 0) as sock, await UdpSocket.bind("::", 0) as sender:
            sock.join("ff01::77", name)
            await sender.send_to(b"to all", ("ff01::77", sock.local[1], 0, index))
            assert await sock.receive() == b"to all"
            sock.leave("ff01::77", name)
            with pytest.raises(OSError, match="on interface='no such card'"):
                sock.join("ff01::77", "no such card")

    run(main)


def test_processes_share_a_port_if_they_want_to_and_one_in_use_is_named():
    async def main():
        async with await UdpSocket.bind("127.0.0.1", 0, reuse_port=True) as one:
            async with await UdpSocket.bind(*one.local, reuse_port=True) as other:
                assert other.local == one.local
            with pytest.raises(OSError, match=f"cannot bind 127.0.0.1:{one.local[1]}: .*choose another port") as caught:
                await UdpSocket.bind(*one.local)
            assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError, match="cannot bind 192.0.2.1:0: .*this machine has no such address"):
            await UdpSocket.bind("192.0.2.1", 0)
        with pytest.raises(ResolveError):
            await UdpSocket.bind("no such name", 0)
        for port in 0, 65536:
            with pytest.raises(ValueError, match=f"port={port}"):
                await UdpSocket.connect("127.0.0.1", port)

    run(main)


def test_broadcast_is_for_those_who_have_asked_for_it():
    async def main():
        async with await UdpSocket.bind("", 0) as sock:
            with pytest.raises(OSError) as caught:
                await sock.send_to(b"x", ("255.255.255.255", 9))
            assert caught.value.errno in (errno.EACCES, errno.ENETUNREACH)
        async with await UdpSocket.bind("", 0, broadcast=True) as sock:
            assert sock.raw.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)
        async with await UdpSocket.connect("127.0.0.1", 9, broadcast=True) as sock:
            assert sock.raw.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)

    run(main)


def test_arguments_of_datagrams_are_refused_by_name(plain):
    async def main():
        async with await UdpSocket.bind("127.0.0.1", 0) as sock:
            with pytest.raises(TypeError, match=r"send_to\(\) takes bytes"):
                await sock.send_to("text", plain.getsockname())
            for wrong, error in (-1, ValueError), ("1", TypeError):
                with pytest.raises(error, match=r"receive_from\("):
                    await sock.receive_from(wrong)

    run(main)


def test_one_receives_and_one_sends_and_a_second_one_is_told():
    async def main():
        async with await UdpSocket.bind("127.0.0.1", 0) as sock, flowcoro.TaskGroup() as group:
            reader = await settled(group, sock.receive())
            with pytest.raises(flowcoro.BusyError, match="is being received from by .*receive"):
                await sock.receive_from()
            await sock.send_to(b"x", sock.local)
            assert await reader == b"x"

    run(main)


def test_close_wakes_who_receives_and_is_for_good(plain):
    async def main():
        sock = await UdpSocket.bind("127.0.0.1", 0)
        async with flowcoro.TaskGroup() as group:
            async def receive():
                with pytest.raises(flowcoro.ClosedError, match="UdpSocket .*has been closed here"):
                    await sock.receive()

            await settled(group, receive())
            await sock.close()
        await sock.close()
        sock.close_nowait()
        for operation in sock.receive, lambda: sock.send_to(b"x", plain.getsockname()):
            with pytest.raises(flowcoro.ClosedError):
                await operation()
        with pytest.raises(flowcoro.ClosedError):
            sock.join("239.255.77.77")
        assert sock.closed and sock.fileno() == -1 and "closed" in repr(sock)

    run(main)


def test_each_operation_is_a_checkpoint_and_a_cancelled_one_has_done_nothing(plain):
    async def main():
        async with await UdpSocket.bind("127.0.0.1", 0) as sock:
            plain.sendto(b"kept", sock.local)
            for make in sock.receive, sock.receive_from, lambda: sock.send_to(b"x", plain.getsockname()):
                with flowcoro.CancelScope() as scope:
                    scope.cancel()
                    await make()
                assert scope.cancelled_caught
            assert await sock.receive() == b"kept"
            await sock.send_to(b"the first", plain.getsockname())
            assert plain.recv(100) == b"the first"
        sock = await UdpSocket.bind("127.0.0.1", 0)
        with flowcoro.CancelScope() as scope:
            scope.cancel()
            await sock.close()
        assert scope.cancelled_caught and sock.closed
        for make in UdpSocket.bind("127.0.0.1", 0), UdpSocket.connect("127.0.0.1", 9):
            with flowcoro.CancelScope() as scope:
                scope.cancel()
                await make
            assert scope.cancelled_caught

    run(main)


def test_a_flood_lets_the_other_tasks_run(plain):
    async def main():
        async with await UdpSocket.bind("127.0.0.1", 0) as sock, flowcoro.TaskGroup() as group:
            async def flood():
                while True:
                    await sock.send_to(b"x", sock.local)
                    await sock.receive()

            flooding = group.spawn(flood())
            for _ in range(100):
                await flowcoro.checkpoint()
            flooding.cancel()
        assert sock.statistics()["datagrams_received"] > 100

    run(main)


def test_a_sender_waits_for_room():
    """A Unix socket of datagrams: on the loopback device the system drops what finds no room."""
    async def main():
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with far:
            async with UdpSocket(near, peer="far") as sock, flowcoro.TaskGroup() as group:
                async def send():
                    for number in range(2000):
                        await sock.send(b"%d" % number)

                await settled(group, send())
                sent = sock.statistics()["datagrams_sent"]
                assert sent < 2000
                far.settimeout(PATIENCE)
                for number in range(2000):
                    assert far.recv(100) == b"%d" % number
                    await flowcoro.sleep(0)

    run(main)


def test_several_workers_send_receive_and_close():
    async def main():
        async def pair(index):
            async with await UdpSocket.bind("127.0.0.1", 0) as server, await UdpSocket.connect(*server.local) as client, \
                    flowcoro.TaskGroup() as group:
                async def answer():
                    with contextlib.suppress(flowcoro.ClosedError):
                        while True:
                            data, address = await server.receive_from()
                            await server.send_to(data, address)

                group.spawn(answer())
                for number in range(50):
                    await client.send(b"%d %d" % (index, number))
                    assert await client.receive() == b"%d %d" % (index, number)
                await server.close()

        async with flowcoro.TaskGroup() as group:
            for index in range(20):
                group.spawn(pair(index))

    run(main, workers=3)


def test_a_socket_that_is_forgotten_warns():
    async def main():
        sock = await UdpSocket.bind("127.0.0.1", 0)
        with pytest.warns(ResourceWarning, match="unclosed <UdpSocket at 127.0.0.1:"):
            del sock
        await wait_all_tasks_parked()

    run(main)


@pytest.mark.skipif(shutil.which("socat") is None, reason="socat is not installed")
def test_socat_is_answered():
    async def main():
        async with await UdpSocket.bind("127.0.0.1", 0) as sock, flowcoro.TaskGroup() as group:
            async def upper():
                while True:
                    data, address = await sock.receive_from()
                    await sock.send_to(data.upper(), address)

            answering = group.spawn(upper())
            command = ["socat", "-", f"UDP:127.0.0.1:{sock.local[1]}"]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as socat:
                try:
                    socat.stdin.write(b"hello")
                    assert await flowcoro.to_thread(socat.stdout.read, 5, abandon_on_cancel=True) == b"HELLO"
                finally:
                    socat.kill()
            answering.cancel()

    run(main)


@pytest.mark.parametrize("address, error, said", [
    (("127.0.0.1", 70_000), ValueError, "port=70000"), (("localhost", 9), ValueError, "look names up before: await resolve"),
    (("127.0.0.1", "9"), TypeError, "port='9'"), ("127.0.0.1", TypeError, "give a tuple"), (None, TypeError, "give a tuple"),
    (("::1", 9), ValueError, "is of another family than <UdpSocket at 127"), (("127.0.0.1", 9, 0), ValueError, "flow and scope"),
    (("127.0.0.1\0", 9), ValueError, "is no address in numbers"),
    (("127.0.0.1",), TypeError, "give a tuple"), ((None, 9), TypeError, "give a tuple")])
def test_an_address_that_is_none_is_refused_and_keeps_no_later_datagram_waiting(plain, address, error, said, monkeypatch):
    async def main():
        async with await UdpSocket.bind("127.0.0.1", 0) as sock:
            for _ in range(5):
                with pytest.raises(error, match=said):
                    await sock.send_to(b"lost", address)
            await sock.send_to(b"hello", plain.getsockname())
            assert plain.recv(100) == b"hello"

    run(main)


def test_what_only_the_system_refuses_keeps_no_later_datagram_waiting(plain):
    async def main():
        async with await UdpSocket.bind("127.0.0.1", 0) as sock:
            for _ in range(5):
                with pytest.raises(OSError, match="sending 70000 bytes to .*Message too long"):
                    await sock.send_to(bytes(70_000), plain.getsockname())
            await sock.send_to(b"hello", plain.getsockname())
            assert plain.recv(100) == b"hello"

    run(main)


@needs_ipv6
def test_one_family_can_be_asked_for(monkeypatch):
    asked, real = [], socket.getaddrinfo

    def getaddrinfo(host, port, family, *rest):
        asked.append((host, family))
        return real(host, port, family, *rest)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def main():
        for family, any_address, one in (socket.AF_INET, "0.0.0.0", "127.0.0.1"), (socket.AF_INET6, "::", "::1"):
            async with await UdpSocket.bind("", 0, family=family) as sock:
                assert sock.raw.family == family and sock.local[0] == any_address
                async with await UdpSocket.connect(one, sock.local[1], family=family) as sender:
                    await sender.send(b"x")
                    assert await sock.receive() == b"x"
            assert asked == [(any_address, family), (one, family)]
            asked.clear()
        for make in UdpSocket.bind, UdpSocket.connect:
            with pytest.raises(ResolveError):
                await make("127.0.0.1", 9, family=socket.AF_INET6)

    run(main)
