"""Connecting and serving: addresses, names, servers, and what goes wrong there."""

import collections
import contextlib
import errno
import fcntl
import functools
import gc
import math
import os
import resource
import shutil
import socket
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time

import pytest

import flowcoro
import flowcoro_net
from flowcoro_net import BrokenError, ResolveError, Socket, TcpServer, UnixServer
from flowcoro_testing import wait_all_tasks_parked
from test_net import PATIENCE, nothing_is_left_behind, reset, run, settled  # noqa: F401  (a fixture)

HAS_IPV6 = False
with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
    probe.bind(("::1", 0))
    HAS_IPV6 = True

needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")


async def echo(sock):
    while data := await sock.read():
        await sock.write(data)


def unused_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Faulty:
    """The system's network, current from now on, but that `left` of its next Pollables cannot be made: `fault` is raised."""

    left = 0

    def __init__(self):
        self.socket, self.getaddrinfo = flowcoro_net._SYSTEM.socket, flowcoro_net._SYSTEM.getaddrinfo
        flowcoro.network.set(self)

    def pollable(self, raw):
        if self.left:
            self.left -= 1
            raise self.fault
        return flowcoro.Pollable(raw)


@contextlib.contextmanager
def black_hole():
    """An address that answers no SYN: a listener whose backlog is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield server.getsockname()


# ---- names -----------------------------------------------------------------------------------------------------

def test_an_address_resolves_to_itself_and_asks_nobody(monkeypatch):
    monkeypatch.setattr(flowcoro, "to_thread", None)

    async def main():
        assert await flowcoro_net.resolve("127.0.0.1", 80) == [
            (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, ("127.0.0.1", 80))]
        assert await flowcoro_net.resolve("::1", 80) == [
            (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, ("::1", 80, 0, 0))]

    run(main)


@pytest.fixture
def name_server(monkeypatch):
    """What getaddrinfo() is asked in threads, and what it answers: a function to set."""
    class Server:
        asked, answer = [], None

        def getaddrinfo(self, host, *rest):
            if rest[-1] & socket.AI_NUMERICHOST:
                raise socket.gaierror(socket.EAI_NONAME, "no address")
            self.asked.append(host)
            return self.answer(host)

    server = Server()
    server.asked = []
    server.answer = lambda host: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", server.getaddrinfo)
    monkeypatch.setattr(flowcoro_net._System, "names", collections.OrderedDict())
    yield server
    threads = flowcoro._ThreadPool         # what was cancelled still asks, and is not to ask the real one
    while len(threads.idle) < len(threads.threads):
        time.sleep(0.001)


def test_a_name_is_remembered_for_a_while(name_server, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(flowcoro_net.time, "monotonic", lambda: now[0])

    async def main():
        for _ in range(3):
            await flowcoro_net.resolve("host.example", 80)
        assert name_server.asked == ["host.example"]
        now[0] += flowcoro_net.NAME_SECONDS
        await flowcoro_net.resolve("host.example", 80)
        assert len(name_server.asked) == 2

    run(main)


def test_a_name_is_looked_up_once_for_all_ports(name_server):
    name_server.answer = found(("127.0.0.1", 0), ("::1", 0, 0, 0))

    async def main():
        for port in 1, 2, 65535:
            addresses = [address for *_, address in await flowcoro_net.resolve("host.example", port)]
            assert addresses == [("127.0.0.1", port), ("::1", port, 0, 0)]
        assert name_server.asked == ["host.example"]

    run(main)


def test_only_so_many_names_are_remembered(name_server, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "NAMES", 3)

    async def main():
        for number in range(10):
            await flowcoro_net.resolve(f"host{number}.example", 80)
        assert len(flowcoro_net._System.names) == 3

    run(main)


def test_many_names_at_once_use_threads_of_their_own_and_do_not_starve_others(name_server):
    gate, most, now = threading.Event(), [0], [0]
    lock = threading.Lock()

    def answer(host):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        assert gate.wait(PATIENCE)
        with lock:
            now[0] -= 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))]

    name_server.answer = answer

    async def main():
        async with flowcoro.TaskGroup() as group:
            tasks = [group.spawn(flowcoro_net.resolve(f"host{number}.example", 80)) for number in range(100)]
            await flowcoro.checkpoint()
            assert await flowcoro.to_thread(lambda: "free") == "free"
            while now[0] < flowcoro_net.RESOLVERS:
                await flowcoro.sleep(0.001)
            gate.set()
            await flowcoro.when_all(*(task_result(task) for task in tasks))
        assert most[0] == flowcoro_net.RESOLVERS

    async def task_result(task):
        return await task

    run(main)


def test_a_name_that_many_ask_for_at_once_is_asked_for_a_few_times(name_server):
    async def main():
        await flowcoro.when_all(*(flowcoro_net.resolve("host.example", 80) for _ in range(200)))
        assert len(name_server.asked) <= flowcoro_net.RESOLVERS

    run(main)


def test_resolving_is_cancelled_at_once_though_the_thread_hangs(name_server):
    gate, ended = threading.Event(), threading.Event()

    def answer(host):
        gate.wait(PATIENCE)
        ended.set()
        return []

    name_server.answer = answer

    async def main():
        with flowcoro.move_on_after(0.02) as scope:
            await Socket.connect("host.example", 80)
        assert scope.cancelled_caught and not ended.is_set()
        with pytest.raises(TimeoutError, match=r"connecting to host.example:80 took longer than timeout=0.02 s"):
            await Socket.connect("host.example", 80, timeout=0.02)
        gate.set()
        while not ended.is_set():
            await flowcoro.sleep(0.001)

    run(main)


def test_a_name_that_does_not_resolve_says_which(name_server):
    def answer(host):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    name_server.answer = answer

    async def main():
        for use in Socket.connect("no.such.host", 80), TcpServer.listen("no.such.host", 80), flowcoro_net.UdpSocket.connect(
                "no.such.host", 80):
            with pytest.raises(ResolveError, match=r"cannot resolve 'no.such.host': Name or service not known") as caught:
                await use
            assert caught.value.errno == socket.EAI_NONAME
            assert isinstance(caught.value, flowcoro_net.NetworkError) and isinstance(caught.value, OSError)
        assert len(name_server.asked) == 3          # a failure is not remembered

    run(main)


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example", "\udc80"])
def test_what_is_no_name_is_a_resolve_error_too(host):
    async def main():
        with pytest.raises(ResolveError, match="cannot resolve"):
            await Socket.connect(host, 80)

    run(main)


@pytest.mark.parametrize("host, port, error", [
    ("127.0.0.1", 0, ValueError), ("127.0.0.1", 65536, ValueError), ("127.0.0.1", "80", TypeError), (5, 80, TypeError),
    ("127.0.0.1", True, TypeError)])
def test_connect_refuses_what_is_no_host_or_port(host, port, error):
    async def main():
        with pytest.raises(error):
            await Socket.connect(host, port)

    run(main)


def test_a_zero_byte_in_a_name_and_a_family_that_is_none_are_refused():
    async def main():
        for host in "localhost\0.evil.example", b"localhost\0.evil.example":
            for asks in Socket.connect, TcpServer.listen, flowcoro_net.resolve:
                with pytest.raises(ValueError, match="a name has no zero byte in it"):
                    await asks(host, 80)
        with pytest.raises(ValueError, match="family=5: give socket.AF_INET"):
            await Socket.connect("localhost", 80, family=5)

    run(main)


def test_families_take_turns():
    found = [(family, 1, 6, number) for number, family in enumerate([6, 6, 6, 4, 4])]
    assert [number for *_, number in flowcoro_net._interleaved(found)] == [0, 3, 1, 4, 2]


# ---- connecting ------------------------------------------------------------------------------------------------

def test_connect_to_a_plain_server_and_talk():
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            async with await Socket.connect(*server.getsockname()) as near:
                far, address = server.accept()
                with far:
                    assert address == near.local and near.peer == server.getsockname()
                    assert near.raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                    await near.write(b"hello")
                    assert far.recv(10) == b"hello"
                    far.sendall(b"world")
                    assert await near.read() == b"world"

    run(main)


def test_a_refused_connection_names_the_address_and_is_broken():
    async def main():
        port = unused_port()
        said = rf"cannot connect to 127.0.0.1:{port}: Connection refused"
        with pytest.raises(BrokenError, match=said) as caught:
            await Socket.connect("127.0.0.1", port)
        assert caught.value.errno == errno.ECONNREFUSED
        assert [address for address, _ in caught.value.errors] == [("127.0.0.1", port)]
        assert flowcoro.statistics()["descriptors"] == 0

    run(main)


def test_a_black_hole_ends_with_the_timeout_and_leaves_nothing():
    async def main():
        with black_hole() as address:
            said = f"took longer than timeout=0.05 s: 127.0.0.1:{address[1]}: no answer yet. Is the host up"
            with pytest.raises(TimeoutError, match=said):
                await Socket.connect(*address, timeout=0.05)
            assert flowcoro.statistics()["descriptors"] == 0

    run(main)


def test_a_timeout_tells_of_each_address_how_far_it_came(name_server, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "ATTEMPT_DELAY", 0)
    port, asked = unused_port(), threading.Event()

    async def main():
        with black_hole() as hole:
            name_server.answer = found(("127.0.0.1", port), hole)
            with pytest.raises(TimeoutError, match=f"127.0.0.1:{port}: Connection refused; 127.0.0.1:{hole[1]}: no answer yet"):
                await Socket.connect("host.example", 80, timeout=0.3)
        name_server.answer = lambda host: asked.wait(PATIENCE) and found(("127.0.0.1", port))(host)
        with pytest.raises(TimeoutError, match="its name was not yet resolved"):
            await Socket.connect("slow.example", 80, timeout=0.01)
        asked.set()

    run(main)


def test_a_handshake_that_the_peer_never_answers_is_limited_without_a_timeout_too(monkeypatch):
    defaults = Socket.handshake.__kwdefaults__
    monkeypatch.setitem(defaults, "timeout", 0.05)

    async def hangs(self, **options):
        await flowcoro.sleep(PATIENCE)

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            with pytest.raises(TimeoutError, match="the TLS handshake was not done within 0.05 s"):
                await Socket.connect(*server.getsockname(), tls=True, server_name="localhost")
            monkeypatch.setattr(Socket, "handshake", hangs)
            with pytest.raises(TimeoutError, match="connected, and the TLS handshake is not done"):
                await Socket.connect(*server.getsockname(), tls=True, server_name="localhost", timeout=0.5)

    assert defaults["timeout"] == 0.05 and flowcoro_net.HANDSHAKE_TIMEOUT == 60
    run(main)


def found(*addresses):
    return lambda host: [(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
                         for address in addresses]


def test_the_error_of_every_attempt_is_in_the_message(name_server):
    ports = unused_port(), unused_port()
    name_server.answer = found(*(("127.0.0.1", port) for port in ports))

    async def main():
        with pytest.raises(BrokenError) as caught:
            await Socket.connect("host.example", 80)
        assert str(caught.value).startswith("[Errno") or "cannot connect to host.example:80: " in str(caught.value)
        for port in ports:
            assert f"127.0.0.1:{port}: Connection refused" in str(caught.value)
        assert len(caught.value.errors) == 2

    run(main)


def test_a_connect_without_descriptors_closes_what_it_has():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            with open(os.devnull) as last:
                resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 1, hard))
                try:
                    with pytest.raises(OSError, match="cannot connect to .*Too many open files; close some.*ulimit") as caught:
                        await Socket.connect(*server.getsockname())
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert caught.value.errno == errno.EMFILE and not isinstance(caught.value, BrokenError)
            (await Socket.connect(*server.getsockname())).close_nowait()

    run(main)


def test_a_connect_without_descriptors_is_an_error_of_ones_own_system(monkeypatch):
    class Full:
        def socket(self, *args):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        getaddrinfo = flowcoro_net._SYSTEM.getaddrinfo

    async def main():
        flowcoro.network.set(Full())
        with pytest.raises(OSError, match="cannot connect to 127.0.0.1:80: .*Too many open files; close some.*ulimit") as caught:
            await Socket.connect("127.0.0.1", 80)
        assert not isinstance(caught.value, BrokenError) and caught.value.errno == errno.EMFILE

    run(main)


def test_an_address_that_fails_does_not_delay_the_next(name_server, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "ATTEMPT_DELAY", PATIENCE * 2)

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            name_server.answer = found(("127.0.0.1", unused_port()), server.getsockname())
            async with await Socket.connect("host.example", 80) as near:
                assert near.peer == server.getsockname()

    run(main)


def test_an_address_that_does_not_answer_is_raced_by_the_next(name_server, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "ATTEMPT_DELAY", 0.01)

    async def main():
        with black_hole() as hole, socket.create_server(("127.0.0.1", 0)) as server:
            name_server.answer = found(hole, hole, server.getsockname())
            async with await Socket.connect("host.example", 80) as near:
                assert near.peer == server.getsockname()
                assert flowcoro.statistics()["descriptors"] == 1        # the losers are closed
            with pytest.raises(TimeoutError):
                name_server.answer = found(hole, hole)
                await Socket.connect("other.example", 80, timeout=0.05)
            assert flowcoro.statistics()["descriptors"] == 0

    run(main)


def test_of_two_that_connect_at_the_same_time_one_is_kept(name_server, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "ATTEMPT_DELAY", 0)

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            name_server.answer = found(one.getsockname(), other.getsockname())
            async with await Socket.connect("host.example", 80) as near:
                assert near.peer in (one.getsockname(), other.getsockname())
                assert flowcoro.statistics()["descriptors"] == 1

    run(main)


@pytest.mark.parametrize("addresses", [1, 2])
def test_a_connect_cancelled_at_any_point_leaves_nothing(name_server, addresses, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "ATTEMPT_DELAY", 0)

    async def main():
        with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
            name_server.answer = found(*[server.getsockname()] * 1, *[("127.0.0.1", unused_port())] * (addresses - 1))
            for turns in range(60):
                async with flowcoro.TaskGroup() as group:
                    task = group.spawn(Socket.connect("host.example", 80))
                    for _ in range(turns):
                        await flowcoro.checkpoint()
                    task.cancel()
                if not task.cancelled():
                    (await task).close_nowait()
                assert flowcoro.statistics()["descriptors"] == 0

    run(main)


def test_connect_from_an_address_of_ones_choice():
    async def main():
        port = unused_port()
        with socket.create_server(("127.0.0.1", 0)) as server:
            async with await Socket.connect(*server.getsockname(), local=("127.0.0.1", port)) as near:
                assert near.local == ("127.0.0.1", port)
            with pytest.raises(OSError, match="cannot connect from 192.0.2.1:0: .*no such address") as caught:
                await Socket.connect(*server.getsockname(), local=("192.0.2.1", 0))
            assert caught.value.errno == errno.EADDRNOTAVAIL and not isinstance(caught.value, BrokenError)

    run(main)


@pytest.mark.parametrize("local, error, said", [
    (("127.0.0.1", 70_000), ValueError, "port=70000"), ("127.0.0.1", TypeError, "give a tuple of an address and a port"),
    (("localhost", 0), ValueError, "'localhost' is no address in numbers; look names up before: await resolve"),
    (("127.0.0.1", None), TypeError, "port=None"), (("127.0.0.1",), TypeError, "give a tuple"), (5, TypeError, "local=5")])
@pytest.mark.parametrize("addresses", [1, 2])
def test_an_address_to_connect_from_that_is_none_is_refused(name_server, local, error, said, addresses):
    name_server.answer = found(*[("127.0.0.1", unused_port()) for _ in range(addresses)])

    async def main():
        with pytest.raises(error, match=said):
            await Socket.connect("host.example", 80, local=local)

    run(main)


@needs_ipv6
def test_the_address_to_connect_from_chooses_the_family(name_server):
    async def main():
        async with await TcpServer.listen("", 0) as server:
            six, four = ("::1", server.local[1], 0, 0), ("127.0.0.1", server.local[1])
            name_server.answer = found(six, four)
            for local, family in (("127.0.0.1", 0), socket.AF_INET), (("::1", 0), socket.AF_INET6):
                async with await Socket.connect("localhost", server.local[1], local=local) as near:
                    assert near.raw.family == family
            with pytest.raises(ValueError, match="is not of family="):
                await Socket.connect("localhost", server.local[1], local=("::1", 0), family=socket.AF_INET)

    run(main)


def test_a_host_without_an_address_of_the_family_to_connect_from_is_not_resolved():
    async def main():
        with pytest.raises(ResolveError, match="cannot resolve '::1'.*local=.'127.0.0.1', 0. allows its own family only"):
            await Socket.connect("::1", 9, local=("127.0.0.1", 0))

    run(main)


def test_a_connection_of_a_port_with_itself_is_refused(monkeypatch):
    port = unused_port()

    async def main():
        with pytest.raises(BrokenError, match="Connection refused"):
            await Socket.connect("127.0.0.1", port, local=("127.0.0.1", port))

    run(main)


# ---- Unix ------------------------------------------------------------------------------------------------------

def test_a_unix_server_and_its_client(tmp_path):
    path = tmp_path / "socket"

    async def main():
        async with await UnixServer.listen(path, mode=0o600) as server, flowcoro.TaskGroup() as group:
            assert server.local == str(path) and stat.S_IMODE(path.stat().st_mode) == 0o600
            group.spawn(server.serve(echo))
            async with await Socket.connect_unix(path) as near:
                assert near.peer == str(path)
                await near.write(b"hello")
                assert await near.read() == b"hello"
            with socket.socket(socket.AF_UNIX) as plain:
                plain.connect(str(path))
                plain.sendall(b"x")
                assert await flowcoro.to_thread(plain.recv, 10) == b"x"
            server.close()
        assert not path.exists()

    run(main)


def test_a_name_without_a_file():
    async def main():
        name = f"\0flowcoro test {os.getpid()}"
        async with await UnixServer.listen(name) as server:
            async with await Socket.connect_unix(name) as near, await server.accept() as far:
                await near.write(b"x")
                assert await far.read() == b"x"
                assert "@flowcoro test" in repr(server)

    if sys.platform == "linux":
        run(main)


def test_the_file_of_a_dead_server_is_replaced_and_that_of_a_living_one_is_not(tmp_path):
    path = str(tmp_path / "socket")

    async def main():
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        async with await UnixServer.listen(path) as server:
            said = "cannot listen on .*socket: Address already in use; another socket has it, .*another path"
            with pytest.raises(OSError, match=said) as caught:
                await UnixServer.listen(path)
            assert caught.value.errno == errno.EADDRINUSE
            async with await server.accept():       # the question whether anybody listens
                pass
            os.rename(path, path + " moved")
            async with await UnixServer.listen(path):
                server.close()
                assert os.path.exists(path)             # that of the other
        assert not os.path.exists(path)
        (tmp_path / "file").write_text("precious")
        with pytest.raises(OSError, match="in use"):
            await UnixServer.listen(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "precious"

    run(main)


def test_unix_errors_name_the_path(tmp_path):
    async def main():
        with pytest.raises(BrokenError, match="cannot connect to .*nobody: No such file") as caught:
            await Socket.connect_unix(tmp_path / "nobody")
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(OSError, match="cannot listen on .*make its directory first"):
            await UnixServer.listen(tmp_path / "no" / "directory")
        with pytest.raises(OSError, match="cannot listen on .*too long"):
            await UnixServer.listen("/tmp/" + "x" * 200)

    run(main)


@pytest.fixture
def slow_refusals(monkeypatch):
    """Whoever is refused by a Unix socket hears of it late, so that others are in between; returns a list of functions to be
    called then."""
    real, meanwhile = flowcoro_net._connect_one, []

    async def connect_one(*args):
        try:
            return await real(*args)
        except ConnectionRefusedError:
            for function in meanwhile:
                function()
            await flowcoro.sleep(0.002)
            raise

    monkeypatch.setattr(flowcoro_net, "_connect_one", connect_one)
    return meanwhile


def test_of_those_who_replace_a_stale_file_at_once_one_listens_and_is_reached(tmp_path, slow_refusals):
    path = str(tmp_path / "socket")

    async def main():
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        servers = []

        async def begin():
            with contextlib.suppress(OSError):
                servers.append(await UnixServer.listen(path))

        await flowcoro.when_all(*(begin() for _ in range(3)))
        [server] = servers
        async with server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo))
            async with await Socket.connect_unix(path) as sock:
                await sock.write(b"x")
                assert await sock.read() == b"x"
            server.close()
        assert not os.path.exists(path)

    run(main)


def test_a_copy_of_the_lock_that_a_child_has_keeps_nobody_from_listening(tmp_path, slow_refusals, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "LOCK_SECONDS", PATIENCE * 2)
    path, copies = str(tmp_path / "socket"), []

    def copy_the_lock():
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{number}") == str(tmp_path):
                    copies.append(os.dup(int(number)))          # as a fork does

    slow_refusals.append(copy_the_lock)

    async def main():
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        async with await UnixServer.listen(path), await UnixServer.listen(path + "2"):
            pass

    try:
        run(main)
        assert copies or not os.path.isdir("/proc/self/fd")
    finally:
        for number in copies:
            os.close(number)


def test_who_holds_the_lock_of_a_directory_keeps_nobody_from_listening_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "LOCK_SECONDS", 0.02)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)

        async def main():
            with flowcoro.move_on_after(0.001):
                await UnixServer.listen(str(tmp_path / "cancelled"))
            async with await UnixServer.listen(str(tmp_path / "socket")):
                pass

        run(main)
    finally:
        os.close(directory)


def test_the_file_is_removed_though_the_program_is_elsewhere_by_then(tmp_path, monkeypatch):
    async def main():
        monkeypatch.chdir(tmp_path)
        async with await UnixServer.listen("socket"):
            monkeypatch.chdir("/")
        assert list(tmp_path.iterdir()) == []

    run(main)


def test_a_unix_path_that_is_too_long_or_none_is_told():
    async def main():
        for connect_or_listen in Socket.connect_unix, UnixServer.listen:
            with pytest.raises(OSError, match="/ppp.*: AF_UNIX path too long; a Unix socket's has at most 107 bytes") as caught:
                await connect_or_listen("/" + "p" * 200)
            assert caught.value.errno == errno.ENAMETOOLONG and not isinstance(caught.value, BrokenError)
            with pytest.raises(TypeError, match="path=5: give the path of a Unix socket"):
                await connect_or_listen(5)

    run(main)


def test_unix_paths_and_modes_that_are_none_are_told(tmp_path):
    async def main():
        for path in "", "with\0zero", b"with\0zero":
            for asks in Socket.connect_unix, UnixServer.listen:
                with pytest.raises(ValueError, match="path=.*: give the path of a Unix socket, or a name that begins with"):
                    await asks(path)
        for mode, error in ("660", TypeError), (1.5, TypeError), (-1, ValueError), (0o1777, ValueError):
            with pytest.raises(error, match="mode="):
                await UnixServer.listen(str(tmp_path / "socket"), mode=mode)
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="Address already in use; .*it is something else: choose another path"):
            await UnixServer.listen(str(tmp_path / "file"))

    run(main)


def test_connect_unix_waits_for_a_place_in_a_full_backlog(tmp_path):
    path = str(tmp_path / "socket")

    async def main():
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(path)
            server.listen(0)
            for _ in range(3):
                with contextlib.suppress(BlockingIOError):
                    client = stack.enter_context(socket.socket(socket.AF_UNIX))
                    client.setblocking(False)
                    client.connect(path)
            with pytest.raises(TimeoutError, match="took longer"):
                await Socket.connect_unix(path, timeout=0.03)
            async with flowcoro.TaskGroup() as group:
                task = group.spawn(Socket.connect_unix(path))
                await flowcoro.sleep(0.01)
                assert not task.done()
                server.setblocking(False)
                while not task.done():
                    with contextlib.suppress(BlockingIOError):
                        server.accept()[0].close()
                    await flowcoro.sleep(0.001)
                (await task).close_nowait()

    run(main)


# ---- listening -------------------------------------------------------------------------------------------------

def test_a_port_in_use_is_named_with_the_remedy():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server:
            with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1:{server.local[1]}: Address already in use; .*"
                               "choose another port") as caught:
                await TcpServer.listen(*server.local)
            assert caught.value.errno == errno.EADDRINUSE
            with pytest.raises(OSError, match="no such address"):
                await TcpServer.listen("192.0.2.1", 0)

    run(main)


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="no SO_REUSEPORT here")
def test_two_servers_share_a_port_if_both_want_to():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0, reuse_port=True) as one:
            async with await TcpServer.listen(*one.local, reuse_port=True) as other:
                assert one.local == other.local

    run(main)


@needs_ipv6
def test_all_addresses_means_both_families():
    async def main():
        async with await TcpServer.listen("", 0) as server:
            port = server.local[1]
            for host in "127.0.0.1", "::1":
                async with await Socket.connect(host, port) as near, await server.accept() as far:
                    await near.write(b"x")
                    assert await far.read() == b"x"
        async with await TcpServer.listen(None, 0, dual_stack=False) as server:
            assert {len(address) for address in server.addresses} == {2, 4}     # two sockets, one port
            assert {address[1] for address in server.addresses} == {server.local[1]}
            for host in "127.0.0.1", "::1", "127.0.0.1":
                async with await Socket.connect(host, server.local[1]) as near, await server.accept() as far:
                    await far.write(b"x")
                    assert await near.read() == b"x"

    run(main)


def test_a_server_on_several_addresses_serves_them_all(name_server):
    name_server.answer = found(("127.0.0.1", 0), ("127.0.0.2", 0))

    async def main():
        async with await TcpServer.listen("host.example", 0) as server, flowcoro.TaskGroup() as group:
            assert [address[0] for address in server.addresses] == ["127.0.0.1", "127.0.0.2"]
            group.spawn(server.serve(echo))
            name_server.answer = None
            for address in server.addresses:
                with socket.socket() as plain:
                    plain.settimeout(PATIENCE)
                    await flowcoro.to_thread(plain.connect, address)
                    plain.sendall(b"x")
                    assert await flowcoro.to_thread(plain.recv, 1) == b"x"
            server.close()

    run(main)


def refusing(monkeypatch, refuse):
    """Listening fails where refuse(family, address, count) gives a number of an error; count: how often it was tried before."""
    listen, tried = flowcoro_net._listen, []

    def maybe(network, family, address, *rest):
        number = refuse(family, address, len(tried))
        tried.append(address)
        if number:
            raise OSError(number, os.strerror(number))
        return listen(network, family, address, *rest)

    monkeypatch.setattr(flowcoro_net, "_listen", maybe)
    return tried


def test_a_port_that_is_taken_on_the_second_address_is_exchanged_for_another(name_server, monkeypatch):
    name_server.answer = found(("127.0.0.1", 0), ("127.0.0.2", 0))
    tried = refusing(monkeypatch, lambda family, address, count: errno.EADDRINUSE if count in (1, 3) else 0)

    async def main():
        async with await TcpServer.listen("host.example", 0) as server:
            assert len(tried) == 6 and len({port for _, port in server.addresses}) == 1
        tried[:] = []
        with pytest.raises(OSError) as caught:          # a port that was asked for is not
            await TcpServer.listen("host.example", unused_port())
        assert caught.value.errno == errno.EADDRINUSE and len(tried) == 2

    run(main)


def test_a_machine_without_ipv6_listens_by_ipv4(name_server, monkeypatch):
    refusing(monkeypatch, lambda family, address, count: errno.EADDRNOTAVAIL if family == socket.AF_INET6 else 0)
    name_server.answer = found(("::1", 0), ("::2", 0))

    async def main():
        async with await TcpServer.listen("", 0) as server:
            assert [address for address, _ in server.addresses] == ["0.0.0.0"]
        with pytest.raises(OSError) as caught:
            await TcpServer.listen("only-ipv6.example", 0)
        assert caught.value.errno == errno.EADDRNOTAVAIL

    run(main)


def test_small_writes_are_not_held_back_at_either_end():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, await Socket.connect(*server.local) as near, \
                await server.accept() as far:
            for sock in near, far:
                assert sock.raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    run(main)


def test_accept_waits_for_any_of_several_addresses(name_server):
    name_server.answer = found(("127.0.0.1", 0), ("127.0.0.2", 0))

    async def main():
        async with await TcpServer.listen("host.example", 0) as server, flowcoro.TaskGroup() as group:
            for address in server.addresses * 2:
                task = await settled(group, server.accept())
                with socket.socket() as plain:
                    plain.connect(address)
                    async with await task as far:
                        assert far.peer == plain.getsockname()
            task = await settled(group, server.accept())
            task.cancel()
            await wait_all_tasks_parked()
            with socket.socket() as plain:
                plain.connect(server.addresses[1])
                (await server.accept()).close_nowait()

            async def ends():
                with pytest.raises(flowcoro.ClosedError):
                    await server.accept()

            task = await settled(group, ends())
            server.close()

    run(main)


def test_accept_and_async_for_end_with_the_server():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            peers = []

            async def count():
                async for sock in server:
                    peers.append(sock.peer)
                    sock.close_nowait()

            counting = await settled(group, count())
            for _ in range(3):
                (await Socket.connect(*server.local)).close_nowait()
            while len(peers) < 3:
                await flowcoro.sleep(0.001)
            with pytest.raises(flowcoro.BusyError):
                await server.accept()
            server.close()
            await counting
            with pytest.raises(flowcoro.ClosedError, match="TcpServer .* has been closed here"):
                await server.accept()
            with pytest.raises(flowcoro.ClosedError):
                await server.serve(echo)

    run(main)


@pytest.mark.parametrize("addresses", [1, 2])
def test_a_second_accept_is_told_that_the_server_is_busy(name_server, addresses):
    name_server.answer = found(*[(f"127.0.0.{number + 1}", 0) for number in range(addresses)])

    async def main():
        async with await TcpServer.listen("host.example", 0) as server, flowcoro.TaskGroup() as group:
            accepting = await settled(group, server.accept())
            for again in server.accept, functools.partial(server.serve, echo):
                with pytest.raises(flowcoro.BusyError, match="is in accept.. of <TcpServer on"):
                    await again()
            assert not accepting.done()
            accepting.cancel()
            await wait_all_tasks_parked()
            group.spawn(server.serve(echo))
            await wait_all_tasks_parked()
            with pytest.raises(flowcoro.BusyError, match="<TcpServer on .* is being served already"):
                await server.accept()
            server.close()

    run(main)


def test_those_beyond_the_backlog_wait_until_others_are_accepted():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0, backlog=1) as server:
            near = []
            with flowcoro.move_on_after(PATIENCE):
                while True:
                    try:
                        near.append(await Socket.connect(*server.local, timeout=0.5))
                    except TimeoutError:
                        break
            assert len(near) == 2                       # Linux lets one more in
            for sock in near:
                sock.close_nowait()
                (await server.accept()).close_nowait()
            (await Socket.connect(*server.local, timeout=PATIENCE)).close_nowait()

    run(main)


@pytest.mark.parametrize("failing", ["pollable", "tls", "memory"])
def test_a_connection_of_which_no_socket_can_be_made_harms_no_other(reports, failing, monkeypatch):
    async def main():
        network = Faulty()
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            if failing == "tls":
                server._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)       # which no server can use
            group.spawn(server.serve(echo, max_connections=1))
            await wait_all_tasks_parked()
            network.fault = OSError(errno.EPERM, "no such luck") if failing == "pollable" else MemoryError("none left")
            network.left = 0 if failing == "tls" else 2
            for _ in range(2):
                with socket.create_connection(server.local) as plain:
                    assert await flowcoro.to_thread(plain.recv, 1) == b""
            assert server.statistics()["failed"] == 2
            if failing != "tls":
                async with await Socket.connect(*server.local) as near:
                    await near.write(b"x")
                    assert await near.read() == b"x"
            server.close()

    run(main)
    assert len(reports) == 2 and all("of which no Socket could be made" in message for message, _ in reports)


def test_where_no_more_can_be_watched_accepting_pauses_and_goes_on(reports, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "PAUSE", 0.01)

    async def main():
        network = Faulty()
        network.fault = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo))
            await wait_all_tasks_parked()
            network.left = math.inf
            with socket.create_connection(server.local):
                while not server.statistics()["pauses"]:
                    await flowcoro.sleep(0.001)
            network.left = 0
            async with await Socket.connect(*server.local) as near:
                await near.write(b"x")
                assert await near.read() == b"x"
            server.close()

    run(main)
    [(message, error)] = reports
    assert "cannot accept connections for the moment" in message and error.errno == errno.ENOSPC


def test_an_error_that_accept_says_again_and_again_lets_others_run(monkeypatch):
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            def refused():
                raise PermissionError(errno.EPERM, "a firewall")

            server._listeners[0]._accept = refused
            accepting = group.spawn(server.accept())
            for _ in range(3):
                await flowcoro.checkpoint()
            assert not accepting.done()
            accepting.cancel()

    run(main)


def test_a_cancelled_accept_loses_no_connection():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server:
            with socket.create_connection(server.local):
                with flowcoro.CancelScope() as scope:
                    scope.cancel()
                    await server.accept()
                async with await server.accept() as far:
                    assert far.peer

    run(main)


def test_a_connection_reset_in_the_backlog_harms_nobody():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo))
            reset(socket.create_connection(server.local))
            async with await Socket.connect(*server.local) as near:
                await near.write(b"x")
                assert await near.read() == b"x"
            server.close()

    run(main)


# ---- serving ---------------------------------------------------------------------------------------------------

def test_many_clients_are_served_at_once():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo))

            async def client(number):
                async with await Socket.connect(*server.local) as sock:
                    for turn in range(10):
                        await sock.write(f"{number} {turn}\n".encode())
                        assert await sock.read_until() == f"{number} {turn}\n".encode()

            await flowcoro.when_all(*map(client, range(100)))
            assert server.statistics()["accepted"] == 100
            server.close()

    run(main)


def test_an_error_in_one_handler_is_reported_and_harms_no_other(reports):
    async def handler(sock):
        if await sock.read() == b"bad":
            raise ZeroDivisionError("bad luck")
        await sock.write(b"well")
        await echo(sock)

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(handler))
            async with await Socket.connect(*server.local) as good:
                await good.write(b"good")
                assert await good.read() == b"well"
                async with await Socket.connect(*server.local) as bad:
                    await bad.write(b"bad")
                    assert await bad.read() == b""
                await good.write(b"still")
                assert await good.read() == b"still"
                assert server.statistics()["failed"] == 1
            server.close()

    run(main)
    [(message, error)] = reports
    assert "the handler of <Socket to 127.0.0.1" in message and isinstance(error, ZeroDivisionError)


def test_another_connection_of_a_handler_that_breaks_is_reported(reports):
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            async def upstream_is_down(sock):
                await Socket.connect("127.0.0.1", unused_port())

            async def upstream_ends(sock):
                one, other = socket.socketpair()
                other.close()
                async with Socket(one) as upstream:
                    await upstream.read_exactly(1)

            async def client_ends(sock):
                async with flowcoro.TaskGroup() as inner:
                    inner.spawn(sock.read_exactly(1))

            async def client_says_too_much(sock):
                await sock.read_until(limit=1)

            handlers = iter([upstream_is_down, upstream_ends, client_ends, client_says_too_much])
            group.spawn(server.serve(lambda sock: next(handlers)(sock)))
            for say in b"", b"", b"", b"too much":
                with socket.create_connection(server.local) as plain:
                    plain.sendall(say)
                    plain.shutdown(socket.SHUT_WR)
                    await flowcoro.wait_readable(plain)
                    flowcoro.notify_closing(plain)
                while server.statistics()["connections"]:
                    await flowcoro.checkpoint()
            assert {name: server.statistics()[name] for name in ("failed", "broken")} == {"failed": 2, "broken": 2}
            server.close()

    run(main)
    assert [type(error) for _, error in reports] == [BrokenError, BrokenError]


def test_a_connection_that_its_peer_breaks_is_counted_and_not_reported(reports):
    async def handler(sock):
        async with flowcoro.TaskGroup() as group:
            group.spawn(echo(sock))

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(handler))
            plain = socket.create_connection(server.local)
            while not server.statistics()["connections"]:
                await flowcoro.sleep(0.001)
            await wait_all_tasks_parked()
            reset(plain)
            while server.statistics()["connections"]:
                await flowcoro.sleep(0.001)
            assert server.statistics() == {"connections": 0, "accepted": 1, "failed": 0, "broken": 1, "handshakes_failed": 0,
                                           "pauses": 0}
            server.close()

    run(main)
    assert reports == []


def test_no_more_than_max_connections_are_in_hands_of_handlers():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo, max_connections=2))
            socks = [await Socket.connect(*server.local) for _ in range(3)]
            for sock in socks:
                await sock.write(b"x")
            assert await socks[0].read() == b"x" and await socks[1].read() == b"x"
            assert server.statistics()["connections"] == 2
            with flowcoro.move_on_after(0.02) as scope:
                await socks[2].read()
            assert scope.cancelled_caught
            await socks[0].close()
            assert await socks[2].read() == b"x"
            await socks[1].close()
            await socks[2].close()
            server.close()

    run(main)


def test_several_addresses_share_max_connections(name_server):
    name_server.answer = found(("127.0.0.1", 0), ("127.0.0.2", 0))

    async def main():
        async with await TcpServer.listen("host.example", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo, max_connections=1))
            for host, port in server.addresses * 2:
                name_server.answer = found((host, port))
                async with await Socket.connect(host, port) as sock:
                    await sock.write(b"x")
                    assert await sock.read() == b"x"
            server.close()

    run(main)


def test_a_server_that_is_full_drains_as_any_other():
    async def handler(sock):
        await flowcoro.sleep(math.inf)

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            serving = group.spawn(server.serve(handler, max_connections=1, drain_timeout=0.01))
            async with await Socket.connect(*server.local) as one, await Socket.connect(*server.local):
                while not server.statistics()["connections"]:
                    await flowcoro.sleep(0.001)
                await wait_all_tasks_parked()
                server.close()
                await serving
                assert await one.read() == b""

    run(main)


@pytest.mark.parametrize("how", ["close", "request_stop"])
def test_a_stop_lets_the_handlers_end_and_takes_nobody_new(how):
    async def main():
        server = await TcpServer.listen("127.0.0.1", 0)
        async with flowcoro.TaskGroup() as group:
            serving = group.spawn(server.serve(echo, drain_timeout=PATIENCE))
            async with await Socket.connect(*server.local) as near:
                await near.write(b"x")
                assert await near.read() == b"x"
                server.close() if how == "close" else flowcoro.request_stop()
                await wait_all_tasks_parked()
                assert server.closed and not serving.done()
                with pytest.raises(BrokenError, match="refused"):
                    await Socket.connect(*server.local)
                await near.write(b"y")
                assert await near.read() == b"y"
            await serving

    run(main)


def test_handlers_that_do_not_end_in_time_are_cancelled():
    cancelled = []

    async def handler(sock):
        try:
            await sock.read()
        except flowcoro.Cancelled:
            cancelled.append(sock)
            raise

    async def main():
        server = await TcpServer.listen("127.0.0.1", 0)
        async with flowcoro.TaskGroup() as group:
            serving = group.spawn(server.serve(handler, drain_timeout=0.02))
            async with await Socket.connect(*server.local) as near:
                while not server.statistics()["connections"]:
                    await flowcoro.sleep(0.001)
                server.close()
                await serving
                assert len(cancelled) == 1 and cancelled[0].closed
                assert await near.read() == b""

    run(main)


def test_a_cancelled_serve_cancels_its_handlers_and_closes():
    async def main():
        server = await TcpServer.listen("127.0.0.1", 0)
        async with flowcoro.TaskGroup() as group:
            serving = group.spawn(server.serve(echo, drain_timeout=PATIENCE))
            async with await Socket.connect(*server.local) as near:
                await near.write(b"x")
                assert await near.read() == b"x"
                serving.cancel()
                assert await near.read() == b""
            with pytest.raises(flowcoro.TaskCancelled):
                await serving
            assert server.closed

    run(main)


def test_a_server_is_served_once_at_a_time_and_by_what_can_be_called():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo))
            await wait_all_tasks_parked()
            with pytest.raises(flowcoro.BusyError, match="served already"):
                await server.serve(echo)
            server.close()
        async with await TcpServer.listen("127.0.0.1", 0) as server:
            for arguments, error in (({"handler": None}, TypeError), ({"handler": echo, "max_connections": 0}, ValueError),
                                     ({"handler": echo, "drain_timeout": -1}, ValueError),
                                     ({"handler": echo, "drain_timeout": "1"}, TypeError)):
                with pytest.raises(error):
                    await server.serve(**arguments)
            with pytest.raises(TypeError):
                await TcpServer.listen("127.0.0.1", 0, tls=True)
            with pytest.raises(ValueError):
                await TcpServer.listen("127.0.0.1", 0, backlog=0)

    run(main)


def test_without_descriptors_accepting_pauses_and_says_so(reports, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "PAUSE", 0.01)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def one_who_comes_late(server, before, turn):
        with socket.socket() as late:
            late.setblocking(False)
            resource.setrlimit(resource.RLIMIT_NOFILE, (late.fileno() + 1, hard))
            with contextlib.suppress(BlockingIOError):
                late.connect(server.local)
            steps = flowcoro.statistics()["steps"]
            while server.statistics()["pauses"] < turn:
                await flowcoro.sleep(0.001)
            await flowcoro.sleep(0.1)
            assert flowcoro.statistics()["steps"] - steps < 3000
            assert len(reports) == 1            # once a minute
            await before.write(b"y")            # who is there goes on
            assert await before.read() == b"y"
            late.send(b"late")
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await flowcoro.wait_readable(late)
            assert late.recv(10) == b"late"
            flowcoro.notify_closing(late)
        while server.statistics()["connections"] > 1:
            await flowcoro.sleep(0.001)

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo))
            async with await Socket.connect(*server.local) as before:
                await before.write(b"x")
                assert await before.read() == b"x"
                for turn in 1, 2:
                    await one_who_comes_late(server, before, turn)
            server.close()

    try:
        run(main)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    [(message, error)] = reports
    assert "cannot accept connections for the moment" in message and "max_connections" in message
    assert error.errno == errno.EMFILE


# ---- foreign counterparts --------------------------------------------------------------------------------------

@pytest.mark.parametrize("program", ["nc", "socat"])
def test_a_foreign_client_is_echoed(program):
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo))
            host, port = server.local
            command = [path, "-N", host, str(port)] if program == "nc" else [path, "-", f"TCP:{host}:{port}"]
            done = await flowcoro.to_thread(lambda: subprocess.run(command, input=b"hello\n" * 1000, capture_output=True,
                                                                   timeout=PATIENCE))
            assert done.stdout == b"hello\n" * 1000, done
            server.close()

    run(main)


# ---- several workers -------------------------------------------------------------------------------------------

def test_several_workers_serve_and_close_under_each_others_eyes():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo))

            async def client(number):
                async with await Socket.connect(*server.local) as sock:
                    for turn in range(20):
                        text = f"{number} {turn}\n".encode()
                        await sock.write_many([text[:2], text[2:]])
                        assert await sock.read_until() == text
                        await flowcoro.checkpoint()

            async with flowcoro.TaskGroup() as clients:
                for number in range(50):
                    clients.spawn(client(number))
            server.close()

    run(main, workers=3)


def test_with_several_workers_a_close_never_hits_anothers_descriptor():
    """Closed in the middle of reads and writes, while new connections get the numbers that become free."""
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            async def handler(sock):
                name = await sock.read_exactly(4)
                while True:
                    assert await sock.read_exactly(4) == name
                    await sock.write(name)

            group.spawn(server.serve(handler, drain_timeout=0))

            async def chatter(sock, name):
                with contextlib.suppress(flowcoro.ClosedError, flowcoro_net.NetworkError):
                    await sock.write(name)
                    while True:
                        await sock.write(name)
                        assert await sock.read_exactly(4) == name

            async def one(number):
                for turn in range(15):
                    name = b"%02d%02d" % (number, turn)
                    sock = await Socket.connect(*server.local)
                    async with flowcoro.TaskGroup() as talk:
                        talk.spawn(chatter(sock, name))
                        for _ in range(turn):
                            await flowcoro.checkpoint()
                        sock.close_nowait()

            async with flowcoro.TaskGroup() as clients:
                for number in range(10):
                    clients.spawn(one(number))
            assert server.statistics()["failed"] == 0
            server.close()

    run(main, workers=3)


# ---- what goes round a server -----------------------------------------------------------------------------------

def test_a_lifespan_is_entered_before_the_first_connection_and_left_after_the_last_handler():
    async def main():
        happened, begun = [], flowcoro.Event()

        @contextlib.asynccontextmanager
        async def lifespan():
            happened.append("begins")
            yield
            happened.append("ends")

        async def handler(sock):
            begun.set()
            await sock.read()
            happened.append("handled")

        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(handler, lifespan=lifespan))
            async with await Socket.connect(*server.local) as sock:
                await begun.wait()
                assert happened == ["begins"]
                server.close()
                await wait_all_tasks_parked()
                await sock.write(b"x")
                await sock.read()
        assert happened == ["begins", "handled", "ends"]

    run(main)


def test_an_error_of_a_lifespan_is_that_of_serve_and_nobody_is_accepted():
    async def main():
        @contextlib.asynccontextmanager
        async def lifespan():
            raise LookupError("no database")
            yield

        async with await TcpServer.listen("127.0.0.1", 0) as server:
            with pytest.raises(LookupError, match="no database"):
                await server.serve(echo, lifespan=lifespan)
            assert server.statistics()["accepted"] == 0

    run(main)


def test_a_server_that_is_being_served_enters_no_second_lifespan():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo))
            await wait_all_tasks_parked()
            with pytest.raises(flowcoro.BusyError):
                await server.serve(echo, lifespan=lambda: pytest.fail("entered"))
            server.close()

    run(main)
