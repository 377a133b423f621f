"""flowcoro_testing: sockets in memory, and the simulated network.

What is built on sockets cannot be right if what stands for them here is not: so the raw sockets are compared with those of
the system where there is one. The chaos test at the end runs a service on a network with faults, once per seed;
FLOWCORO_SEEDS=1000 runs a thousand. A failure names its seed, which repeats it.
"""

import errno
import gc
import os
import pathlib
import random
import re
import socket
import struct
import sys

import pytest

import flowcoro
from flowcoro_testing import (HostCrashed, SimulatedNetwork, VirtualClock, assert_checkpoints, explore, memory_socket_pair,
                              run_in_kernel, wait_all_tasks_parked)

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 40)))
SUBPROCESS_TIMEOUT = 60         # seconds; for a much slower machine

WOULD_BLOCK = (errno.EAGAIN, errno.EWOULDBLOCK)


# ---- what a program makes of raw sockets: as flowcoro_net does, and no more than these tests need -------------

class Stream:
    """A connection over a raw socket and its pollable."""

    def __init__(self, raw, network=None):
        self.raw = raw
        self.pollable = (network or flowcoro.network.get()).pollable(raw)

    @classmethod
    async def connect(cls, host, port, *, family=socket.AF_INET):
        network = flowcoro.network.get()
        *_, address = (await network.getaddrinfo(host, port, family, socket.SOCK_STREAM, 0))[0]
        raw = network.socket(family, socket.SOCK_STREAM)
        stream = cls(raw)
        try:
            stream.pollable.writable = False
            number = raw.connect_ex(address)
            if number == errno.EINPROGRESS:
                await stream.pollable.wait_writable()
                number = raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                raise OSError(number, os.strerror(number))
        except BaseException:
            stream.close()
            raise
        return stream

    async def read(self, count=65536):
        while True:
            await self.pollable.wait_readable()
            self.pollable.readable = False
            try:
                data = self.raw.recv(count)
            except BlockingIOError:
                continue
            except OSError:
                self.pollable.readable = True
                raise
            self.pollable.readable = True
            return data

    async def read_exactly(self, count):
        data = b""
        while len(data) < count:
            more = await self.read(count - len(data))
            if not more:
                raise EOFError(f"{len(data)} of {count} bytes")
            data += more
        return data

    async def read_line(self):
        line = b""
        while not line.endswith(b"\n"):
            more = await self.read(1)
            if not more:
                return line
            line += more
        return line

    async def read_all(self):
        data = b""
        while more := await self.read():
            data += more
        return data

    async def write(self, data):
        rest = memoryview(data)
        while rest:
            await self.pollable.wait_writable()
            self.pollable.writable = False
            try:
                rest = rest[self.raw.send(rest):]
            except BlockingIOError:
                continue
            except OSError:
                self.pollable.writable = True
                raise
            self.pollable.writable = True

    def close(self):
        self.pollable.close()
        self.raw.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class Listener:
    """A listening raw socket; `async for` gives Streams."""

    def __init__(self, port, *, host="", backlog=128, family=socket.AF_INET):
        network = flowcoro.network.get()
        self.raw = network.socket(family, socket.SOCK_STREAM)
        try:
            self.raw.bind((host, port))
            self.raw.listen(backlog)
        except BaseException:
            self.raw.close()
            raise
        self.pollable = network.pollable(self.raw)

    def __aiter__(self):
        return self

    async def __anext__(self):
        while True:
            await self.pollable.wait_readable()
            self.pollable.readable = False
            try:
                raw, _ = self.raw.accept()
            except BlockingIOError:
                continue
            self.pollable.readable = True
            return Stream(raw)

    accept = __anext__

    def close(self):
        self.pollable.close()
        self.raw.close()

    __enter__, __exit__ = Stream.__enter__, Stream.__exit__


async def echo_server(port=7):
    """Answer each line with itself, until cancelled."""
    async def serve(stream):
        with stream:
            try:
                while line := await stream.read_line():
                    await stream.write(line)
            except OSError:
                pass

    with Listener(port) as listener:
        async with flowcoro.TaskGroup() as group:
            async for stream in listener:
                group.spawn(serve(stream))


async def ask(host, line, port=7):
    with await Stream.connect(host, port) as stream:
        await stream.write(line)
        return await stream.read_line()


def end(raw):
    """errno.errorcode of what recv() raises, or what it gives."""
    try:
        return raw.recv(100)
    except OSError as error:
        return errno.errorcode[error.errno]


def attempt(call, *args):
    try:
        return call(*args)
    except OSError as error:
        return errno.errorcode[error.errno]


async def connected(network, *, settings=(), backlog=128):
    """A connection between the hosts "client" and "server", as raw sockets: (client's, server's)."""
    client, server = network.host("client"), network.host("server")
    listener, near = server.socket(), client.socket()
    for option, value in settings:
        for raw in listener, near:
            raw.setsockopt(socket.SOL_SOCKET, option, value)
    listener.bind(("", 80))
    listener.listen(backlog)
    assert near.connect_ex(("server", 80)) == errno.EINPROGRESS
    while (accepted := attempt(listener.accept)) == "EAGAIN":
        await flowcoro.sleep(0.1)
    await flowcoro.sleep(100)
    listener.close()
    return near, accepted[0]


def on_network(function=None, **settings):
    """A test that gets a SimulatedNetwork with these settings, in a kernel of its own; nothing may be left on it."""
    if function is None:
        return lambda function: on_network(function, **settings)

    async def bounded():
        network = SimulatedNetwork(**{"seed": 1, **settings})
        with flowcoro.timeout(1e6):
            await function(network)
        assert network.open_sockets() == []

    def test():
        flowcoro.run(bounded(), clock=VirtualClock())
        gc.collect()        # what was not closed complains, and warnings are errors here

    test.__name__, test.__doc__ = function.__name__, function.__doc__
    return test


# ---- sockets in memory -------------------------------------------------------------------------------------

def random_calls(draw):
    """Calls on two connected sockets: (which, name, argument)."""
    names = ["send"] * 6 + ["recv"] * 6 + ["peek"] * 2 + ["shutdown"] * 2 + ["close", "error", "peer"]
    for _ in range(draw.randrange(3, 14)):
        name = draw.choice(names)
        yield draw.randrange(2), name, (
            draw.choice([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]) if name == "shutdown" else draw.randrange(10))


def outcome(raw, name, argument):
    return attempt({
        "send": lambda: raw.send(b"x" * argument), "recv": lambda: raw.recv(argument),
        "peek": lambda: raw.recv(argument, socket.MSG_PEEK), "shutdown": lambda: raw.shutdown(argument), "close": raw.close,
        "error": lambda: raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
        "peer": lambda: len(raw.getpeername()) >= 0}[name])


@pytest.mark.skipif(sys.platform != "linux", reason="what a socketpair says to whom differs from system to system")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_pair_in_memory_answers_each_call_as_a_socketpair_of_the_system(seed):
    calls = list(random_calls(random.Random(seed)))
    one, other = socket.socketpair()
    with one, other:
        for raw in one, other:
            raw.setblocking(False)
        expected = [outcome((one, other)[which], *call) for which, *call in calls]
    one, other = memory_socket_pair()
    with one, other:
        assert [outcome((one, other)[which], *call) for which, *call in calls] == expected, calls


@run_in_kernel
async def test_a_pair_in_memory_carries_bytes_both_ways_and_an_end():
    one, other = memory_socket_pair()
    with Stream(one, one.network) as near, Stream(other, other.network) as far:
        async with flowcoro.TaskGroup() as group:
            answer = group.spawn(near.read_line())
            await wait_all_tasks_parked()
            assert answer.state == "parked" and "readable" in answer.park_reason
            await far.write(b"hello\n")
            assert await answer == b"hello\n"
        one.shutdown(socket.SHUT_WR)
        assert await far.read() == b"" and far.pollable.hangup
        await far.write(b"half closed")
        assert await near.read() == b"half closed"


@run_in_kernel
async def test_a_writer_waits_until_the_other_end_has_read():
    one, other = memory_socket_pair(capacity=10)
    with Stream(one, one.network) as near, Stream(other, other.network) as far:
        async with flowcoro.TaskGroup() as group:
            writer = group.spawn(near.write(b"0123456789" * 5))
            await wait_all_tasks_parked()
            assert writer.state == "parked" and "writable" in writer.park_reason
            assert await far.read(3) == b"012"
            await wait_all_tasks_parked()
            assert await far.read_exactly(47) == (b"0123456789" * 5)[3:]


@run_in_kernel
async def test_a_pair_may_deliver_single_bytes():
    one, other = memory_socket_pair(most=1)
    with one, other:
        assert one.send(b"abc") == 1 and one.send(b"bc") == 1
        assert other.recv(10) == b"a" and other.recv(10) == b"b" and end(other) == "EAGAIN"


@run_in_kernel
async def test_who_waits_after_a_short_read_or_send_of_single_bytes_is_woken():
    one, other = memory_socket_pair(most=1, capacity=2)
    near, far = one.network.pollable(one), other.network.pollable(other)

    async def send(rest):
        while rest:
            if not near.writable:
                await near.wait_writable()
            sent = one.send(rest)
            if sent < len(rest):
                near.writable = False       # full, says a short send
            rest = rest[sent:]

    with one, other:
        async with flowcoro.TaskGroup() as group:
            group.spawn(send(b"12345678"))
            got = b""
            while len(got) < 8:
                if not far.readable:
                    await far.wait_readable()
                try:
                    data = other.recv(100)
                except BlockingIOError:
                    data = b""
                if len(data) < 100:
                    far.readable = False    # empty, says a short read
                got += data
        assert got == b"12345678"
        near.close()
        far.close()


@run_in_kernel
async def test_wrap_is_called_where_the_network_is_that_of_the_pair():
    near, far = memory_socket_pair(Stream)
    assert flowcoro.network.get() is None
    with near, far:
        await near.write(b"x")
        assert await far.read() == b"x"


def test_a_wrap_that_fails_leaves_no_socket_open():
    raws = []

    def wrap(raw):
        raws.append(raw)
        1 / len(raws[1:])

    with pytest.raises(ZeroDivisionError):
        memory_socket_pair(wrap)
    assert raws[0].fileno() == -1 and flowcoro.network.get() is None


@pytest.mark.parametrize("wrong, error, said", [
    (dict(capacity=0), ValueError, "capacity=0"), (dict(capacity="x"), TypeError, "capacity='x'"),
    (dict(most=0), ValueError, "most=0"), (dict(wrap=3), TypeError, "memory_socket_pair(3)"),
])
def test_wrong_arguments_of_a_pair_are_named(wrong, error, said):
    with pytest.raises(error, match=re.escape(said)):
        memory_socket_pair(**wrong)


def test_a_forgotten_end_complains_as_a_forgotten_socket_does():
    with pytest.warns(ResourceWarning, match="unclosed <memory socket one>"):
        one, other = memory_socket_pair()
        other.close()
        del one, other
        gc.collect()


@run_in_kernel
async def test_all_forms_of_receiving_and_sending_agree():
    one, other = memory_socket_pair()
    with one, other:
        assert one.sendmsg([b"ab", bytearray(b"cd")]) == 4 and one.send(memoryview(b"ef")) == 2
        assert other.recv(2, socket.MSG_PEEK) == b"ab"
        buffer = bytearray(3)
        assert other.recv_into(buffer) == 3 and buffer == b"abc"
        assert other.recv_into(buffer, 1) == 1 and buffer == b"dbc"
        assert other.recvmsg(1) == (b"e", [], 0, None)
        pieces = [bytearray(1), bytearray(5)]
        assert one.send(b"gh") == 2 and other.recvmsg_into(pieces) == (3, [], 0, None)
        assert pieces == [b"f", b"gh\0\0\0"]
        assert attempt(other.recv, 5, socket.MSG_OOB) == errno.errorcode[errno.EOPNOTSUPP]
        for raw in one, other:
            raw.settimeout(0)
            assert attempt(raw.detach) == errno.errorcode[errno.EOPNOTSUPP] and attempt(os.fstat, raw.fileno()) == "EBADF"
            with pytest.raises(ValueError, match="cannot block a thread"):
                raw.setblocking(True)
    assert attempt(one.send, b"x") == attempt(other.recv, 1) == "EBADF" and one.fileno() == -1


# ---- pollables in memory: as flowcoro.Pollable ---------------------------------------------------------------

def stand_ins():
    """(near, far, pollable of near) in memory, and of the system."""
    one, other = memory_socket_pair()
    yield "memory", one, other, one.network.pollable(one)
    one, other = socket.socketpair()
    one.setblocking(False)
    yield "system", one, other, flowcoro.Pollable(one)


def on_both(function):
    """A test for a pollable in memory and one of the system."""
    async def both():
        for name, one, other, pollable in stand_ins():
            with one, other:
                try:
                    with flowcoro.timeout(1000):
                        await function(one, other, pollable)
                except BaseException as error:
                    error.add_note(f"with sockets of the {name}")
                    raise
                finally:
                    pollable.close()

    def test():
        flowcoro.run(both(), clock=VirtualClock())

    test.__name__ = function.__name__
    return test


@on_both
async def test_a_flag_that_is_set_spares_the_wait_but_not_the_checkpoint(one, other, pollable):
    with assert_checkpoints():
        await pollable.wait_readable()
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        await pollable.wait_writable()
    assert scope.cancelled_caught


@on_both
async def test_each_arrival_is_an_edge_even_if_some_was_there(one, other, pollable):
    await flowcoro.sleep(1)
    for text in b"a", b"b":
        pollable.readable = False
        other.send(text)
        await pollable.wait_readable()
        assert pollable.readable
    assert one.recv(10) == b"ab"


@on_both
async def test_a_second_reader_is_refused_and_the_first_goes_on(one, other, pollable):
    await flowcoro.sleep(1)
    pollable.readable = False
    async with flowcoro.TaskGroup() as group:
        group.spawn(pollable.wait_readable())
        await wait_all_tasks_parked()
        with pytest.raises(flowcoro.BusyError, match="is being read by"):
            await pollable.wait_readable()
        await pollable.wait_writable()
        other.send(b"x")


@on_both
async def test_closing_wakes_those_who_wait(one, other, pollable):
    await flowcoro.sleep(1)
    pollable.readable = False
    reader = flowcoro.spawn(pollable.wait_readable())
    await wait_all_tasks_parked()
    pollable.close()
    pollable.close()
    with pytest.raises(flowcoro.ClosedError, match="was closed here while this task waited"):
        await reader
    with pytest.raises(flowcoro.ClosedError, match="has been closed here"):
        await pollable.wait_readable()
    with pytest.raises(flowcoro.ClosedError):
        await pollable.wait_writable()


@on_both
async def test_a_cancelled_wait_leaves_its_place_to_the_next(one, other, pollable):
    await flowcoro.sleep(1)
    pollable.readable = False
    with flowcoro.move_on_after(1) as scope:
        await pollable.wait_readable()
    assert scope.cancelled_caught
    other.send(b"x")
    await pollable.wait_readable()
    assert one.recv(1) == b"x"


@on_both
async def test_a_hangup_is_told(one, other, pollable):
    await flowcoro.sleep(1)
    pollable.readable = False
    assert not pollable.hangup
    other.close()
    await pollable.wait_readable()
    assert pollable.hangup and one.recv(1) == b""


@run_in_kernel
async def test_a_socket_in_memory_has_one_pollable_at_a_time():
    one, other = memory_socket_pair()
    with one, other:
        first = one.network.pollable(one)
        with pytest.raises(flowcoro.BusyError, match="has a pollable already"):
            one.network.pollable(one)
        first.close()
        one.network.pollable(one).close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        one.network.pollable(one)


def test_reading_what_nobody_will_send_is_a_deadlock_that_says_so():
    async def main():
        near, far = memory_socket_pair(Stream)
        with near, far:
            await near.read()

    with pytest.raises(flowcoro.Deadlock, match="wait until memory socket one is readable"):
        flowcoro.run(main(), clock=VirtualClock())


def test_a_pair_may_join_tasks_of_several_workers():
    async def copy(source, target):
        while data := await source.read(1000):
            await target.write(data)
        target.raw.shutdown(socket.SHUT_WR)

    async def main():
        data = random.Random(1).randbytes(100_000)
        one, two = memory_socket_pair(Stream, capacity=300)
        three, four = memory_socket_pair(Stream, capacity=700)
        with one, two, three, four:
            async with flowcoro.TaskGroup() as group:
                async def send():
                    await one.write(data)
                    one.raw.shutdown(socket.SHUT_WR)

                group.spawn(send())
                group.spawn(copy(two, three))
                assert await group.spawn(four.read_all()) == data

    flowcoro.run(main(), workers=3)


# ---- streams on the simulated network ----------------------------------------------------------------------

@on_network(latency=0.05)
async def test_a_connection_takes_the_time_of_its_packets(network):
    client, server = network.host("client"), network.host("server")
    async with flowcoro.TaskGroup() as group:
        task = server.spawn(group, echo_server())
        await flowcoro.checkpoint()
        with client, await Stream.connect("10.0.0.2", 7) as stream:
            assert flowcoro.now() == pytest.approx(0.1)             # SYN, SYN-ACK; an address need not be resolved
            await stream.write(b"hello\n")
            assert await stream.read_line() == b"hello\n"
            assert flowcoro.now() == pytest.approx(0.2)
        task.cancel()


@on_network(latency=0.5, bandwidth=1000)
async def test_bandwidth_is_bytes_a_second_and_headers_count(network):
    near, far = await connected(network)
    with near, far:
        began = flowcoro.now()
        near.send(b"x" * 960)
        with Stream(far, far.network) as stream:
            await stream.read_exactly(960)
        assert flowcoro.now() - began == pytest.approx(1.5)


@on_network
async def test_nobody_listens(network):
    client = network.host("client")
    network.host("server")
    with client, pytest.raises(ConnectionRefusedError):
        await Stream.connect("server", 7)


@on_network
async def test_a_host_that_is_down_is_a_black_hole_until_connect_times_out(network):
    network.host("server")
    network.crash("server")
    with network.host("client"), pytest.raises(TimeoutError):
        await Stream.connect("server", 7)
    assert flowcoro.now() == pytest.approx(127, abs=1)


@on_network
async def test_an_address_that_no_host_has_cannot_be_reached(network):
    with network.host("client") as client, client.socket() as raw:
        assert raw.connect_ex(("10.0.9.9", 80)) == errno.ENETUNREACH
        with pytest.raises(OSError, match=os.strerror(errno.ENETUNREACH)):
            raw.connect(("10.0.9.9", 80))


@on_network
async def test_a_full_backlog_drops_who_comes_and_takes_it_when_it_tries_again(network):
    client, server = network.host("client"), network.host("server")
    with server.socket() as listener:
        listener.bind(("", 80))
        listener.listen(0)                      # as on Linux, room for one more than that
        raws = [client.socket() for _ in range(3)]
        for raw in raws:
            raw.connect_ex(("server", 80))
        await flowcoro.sleep(0.5)
        assert [raw.state for raw in raws] == ["connected", "connecting", "connecting"]
        listener.accept()[0].close()
        assert attempt(listener.accept) == "EAGAIN"
        await flowcoro.sleep(10)
        assert sorted(raw.state for raw in raws) == ["connected", "connected", "connecting"]
        for raw in raws:
            raw.close()
        await flowcoro.sleep(1)
        listener.accept()[0].close()


@on_network(latency=0.01)
async def test_a_peer_that_never_reads_costs_no_more_than_the_buffers(network):
    near, far = await connected(network)
    sent = 0
    with near, far:
        for _ in range(100):
            try:
                sent += near.send(b"x" * 1000_000)
            except BlockingIOError:
                pass
            await flowcoro.sleep(1)
        assert sent == 2 * 65536
        with Stream(near, near.network) as stream:
            await stream.pollable.wait_writable()
            stream.pollable.writable = False
            async with flowcoro.TaskGroup() as group:
                writer = group.spawn(stream.pollable.wait_writable())
                await flowcoro.sleep(100)
                assert writer.state == "parked"
                while len(far.recv(10_000)) == 10_000:
                    pass


@pytest.mark.parametrize("settings", [
    dict(), dict(loss=0.3), dict(jitter=0.3), dict(split=0.9), dict(loss=0.2, jitter=0.1, split=0.5, bandwidth=50_000),
])
def test_all_bytes_arrive_in_order_whatever_happens_to_packets(settings):
    @on_network(latency=0.02, **settings)
    async def test(network):
        data = random.Random(5).randbytes(300_000)
        near, far = await connected(network, settings=[(socket.SO_RCVBUF, 5000)])
        with Stream(near, near.network) as writer, Stream(far, far.network) as reader:
            async def send():
                await writer.write(data)
                near.shutdown(socket.SHUT_WR)

            async with flowcoro.TaskGroup() as group:
                group.spawn(send())
                assert await reader.read_all() == data
            await reader.write(b"the other way")
            reader.close()
            assert await writer.read_all() == b"the other way"

    test()


@on_network
async def test_what_was_closed_with_bytes_unread_is_reset(network):
    near, far = await connected(network)
    with near:
        near.send(b"never read")
        await flowcoro.sleep(1)
        far.close()
        await flowcoro.sleep(1)
        assert end(near) == "ECONNRESET" and end(near) == b"" and attempt(near.send, b"x") == "EPIPE"


@on_network
async def test_writing_to_who_has_closed_is_reset_and_then_a_broken_pipe(network):
    near, far = await connected(network)
    with near:
        far.close()
        await flowcoro.sleep(1)
        assert end(near) == b""
        assert near.send(b"x") == 1
        await flowcoro.sleep(1)
        assert attempt(near.send, b"x") == "EPIPE" and end(near) == b""


@on_network
async def test_linger_of_zero_resets(network):
    near, far = await connected(network)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with far:
        near.send(b"last words")
        await flowcoro.sleep(1)
        near.close()
        await flowcoro.sleep(1)
        assert end(far) == b"last words" and end(far) == "ECONNRESET"


@on_network(loss=0.4)
async def test_an_end_that_got_lost_is_said_again_and_leaves_nothing_in_the_tables(network):
    for _ in range(30):
        near, far = await connected(network)
        near.send(b"bye")
        near.close()
        await flowcoro.sleep(30)
        assert end(far) == b"bye"
        await flowcoro.sleep(300)
        assert end(far) == b""
        far.close()
        await flowcoro.sleep(1000)
    assert [facts["connections"] for facts in network.statistics()["hosts"].values()] == [0, 0]


@on_network
async def test_break_connections_resets_both_ends_at_once(network):
    near, far = await connected(network)
    with near, far:
        near.send(b"under way")
        assert network.break_connections("client", "server") == 1
        assert end(near) == end(far) == "ECONNRESET"
        await flowcoro.sleep(1)
        assert end(near) == end(far) == b""
        assert network.break_connections() == 0


@on_network
async def test_break_connections_tells_each_end_what_a_reset_by_the_other_would(network):
    near, far = await connected(network)
    with near, far, network.host("server").socket() as listener, network.host("client").socket() as connecting:
        near.shutdown(socket.SHUT_WR)
        await flowcoro.sleep(1)
        listener.bind(("", 81))
        listener.listen()
        connecting.connect_ex(("server", 81))
        await flowcoro.sleep(0.0005)
        reader = Stream(near, near.network)
        async with flowcoro.TaskGroup() as group:
            waiting = group.spawn(failure(reader.read()))
            await wait_all_tasks_parked()
            assert network.break_connections("client") == 2
            assert await waiting == "ECONNRESET"        # has shut down, and waits for the other end
        assert attempt(far.recv, 1) == b"" and attempt(far.send, b"x") == "EPIPE"       # knows of that
        assert connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


async def failure(coro):
    with pytest.raises(OSError) as caught:
        await coro
    return errno.errorcode[caught.value.errno]


@pytest.mark.parametrize("ends, broken", [
    ((), {"ab", "ac", "bc", "aa"}), (("a",), {"ab", "ac", "aa"}), ((None, "a"), {"ab", "ac", "aa"}), (("a", "b"), {"ab"}),
    (("b", "a"), {"ab"}), ((["b", "c"],), {"ab", "ac", "bc"}), (("a", {"b", "c"}), {"ab", "ac"}), (("a", "a"), {"aa"}),
])
def test_break_connections_breaks_those_between_the_hosts_that_are_named(ends, broken):
    async def test(network):
        opened, raws = {}, []
        for one, other in "ab", "ac", "bc", "aa":
            listener, near = network.host(other).socket(), network.host(one).socket()
            listener.bind(("", 80))
            listener.listen()
            near.connect_ex((other, 80))
            await flowcoro.sleep(1)
            far, _ = listener.accept()
            listener.close()
            opened[one + other] = near
            raws += near, far
        assert network.break_connections(*ends) == len(broken)
        assert {name for name, raw in opened.items() if end(raw) == "ECONNRESET"} == broken
        for raw in raws:
            raw.close()

    on_network(test)()


@on_network
async def test_connecting_may_be_given_up(network):
    client, server = network.host("client"), network.host("server")
    with server.socket() as listener:
        listener.bind(("", 80))
        listener.listen()
        for delay in 0, 0.0005, 0.0015, 0.0025, 0.01:
            raw = client.socket()
            raw.connect_ex(("server", 80))
            await flowcoro.sleep(delay)
            raw.close()
            await flowcoro.sleep(1)
            try:
                accepted, _ = listener.accept()
            except BlockingIOError:
                continue
            assert end(accepted) in (b"", "ECONNRESET")
            accepted.close()
    await flowcoro.sleep(200)
    assert [facts["connections"] for facts in network.statistics()["hosts"].values()] == [0, 0]


@on_network
async def test_calls_out_of_order_get_the_errors_of_the_system(network):
    host = network.host("host")
    with host.socket() as raw:
        assert end(raw) == attempt(raw.send, b"x") == attempt(raw.getpeername) == "ENOTCONN"
        assert attempt(raw.shutdown, socket.SHUT_WR) == "ENOTCONN" and attempt(raw.accept) == "EINVAL"
        assert raw.getsockname() == ("0.0.0.0", 0)
        raw.bind(("host", 80))
        assert attempt(raw.bind, ("host", 81)) == "EINVAL" and raw.getsockname() == ("10.0.0.1", 80)
        raw.listen()
        assert attempt(raw.accept) == "EAGAIN" and raw.connect_ex(("host", 80)) == errno.EISCONN
        with host.socket() as other:
            assert attempt(other.bind, ("", 80)) == "EADDRINUSE"
            assert attempt(other.bind, ("10.0.0.7", 80)) == "EADDRNOTAVAIL"
            assert other.connect_ex(("localhost", 80)) == errno.EINPROGRESS
            assert other.connect_ex(("localhost", 80)) == errno.EALREADY
            assert end(other) == attempt(other.send, b"x") == "EAGAIN"
            await flowcoro.sleep(1)
            assert other.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED     # it listens elsewhere
        with host.socket() as other:
            other.connect_ex(("10.0.0.1", 80))
            await flowcoro.sleep(1)
            accepted, address = raw.accept()
            with accepted:
                assert address == other.getsockname() and accepted.getsockname() == other.getpeername() == ("10.0.0.1", 80)


@on_network
async def test_a_host_may_have_too_few_descriptors(network):
    near, server = network.host("client"), network.host("server")
    server.max_sockets = 1
    with near.socket() as raw, server.socket() as listener:
        listener.bind(("", 80))
        listener.listen()
        assert attempt(server.socket) == "EMFILE"
        raw.connect_ex(("server", 80))
        await flowcoro.sleep(1)
        assert attempt(listener.accept) == attempt(listener.accept) == "EMFILE"
        server.max_sockets = 2
        listener.accept()[0].close()


@on_network
async def test_ports_may_be_shared_by_those_who_say_so(network):
    client, server = network.host("client"), network.host("server")
    listeners = [server.socket() for _ in range(3)]
    for listener in listeners:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("", 80))
        listener.listen()
    raws = [client.socket() for _ in range(60)]
    for raw in raws:
        raw.connect_ex(("server", 80))
    await flowcoro.sleep(1)
    assert all(raw.state == "connected" for raw in raws)
    assert all(5 < len(listener._queue) for listener in listeners)
    for raw in [*raws, *listeners]:
        raw.close()


@on_network
async def test_ipv6_and_both_families_on_one_socket(network):
    client, server = network.host("client"), network.host("server")
    with server.socket(socket.AF_INET6) as listener, client.socket() as v4, client.socket(socket.AF_INET6) as v6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", 80))
        listener.listen()
        for raw in v4, v6:
            raw.connect_ex(("server", 80))
        await flowcoro.sleep(1)
        (one, its), (two, others) = listener.accept(), listener.accept()
        with one, two:
            assert its[:2] == ("::ffff:10.0.0.1", v4.getsockname()[1]) and others == v6.getsockname()
            assert v6.getpeername() == ("fd00::2", 80, 0, 0)
        with server.socket() as also:
            assert attempt(also.bind, ("", 80)) == "EADDRINUSE"


# ---- names -------------------------------------------------------------------------------------------------

@on_network(latency=0.1)
async def test_names_are_those_of_the_hosts(network):
    client, _ = network.host("client"), network.host("server")
    STREAM, TCP = socket.SOCK_STREAM, socket.IPPROTO_TCP
    assert await client.getaddrinfo("server", 80, type=STREAM) == [
        (socket.AF_INET, STREAM, TCP, "", ("10.0.0.2", 80)), (socket.AF_INET6, STREAM, TCP, "", ("fd00::2", 80, 0, 0))]
    assert flowcoro.now() == pytest.approx(0.2)
    assert [found[4] for found in await client.getaddrinfo(None, "http", socket.AF_INET, STREAM, socket.AI_PASSIVE)] == [
        ("0.0.0.0", 80)]
    assert [found[4][0] for found in await client.getaddrinfo("::1", 80, 0, STREAM)] == ["::1"]
    assert [found[4][0] for found in await client.getaddrinfo("localhost", 80, 0, STREAM)] == ["127.0.0.1", "::1"]
    for family, kind in (socket.AF_UNIX, STREAM), (0, socket.SOCK_RAW):
        with pytest.raises(socket.gaierror, match="TCP and UDP"):
            await client.getaddrinfo("server", 80, family, kind)
    for host, port, flags in ("nowhere", 80, 0), ("server", 80, socket.AI_NUMERICHOST), ("server", "nonsense", 0):
        with pytest.raises(socket.gaierror):
            await client.getaddrinfo(host, port, 0, STREAM, flags)


@pytest.mark.parametrize("host, port, family, flags", [
    ("127.0.0.1", 80, 0, 0), ("::1", 80, 0, 0), (None, 80, socket.AF_INET, 0), (None, 80, socket.AF_INET, socket.AI_PASSIVE),
    ("127.0.0.1", "80", socket.AF_INET, socket.AI_NUMERICHOST), ("127.0.0.1", None, socket.AF_INET, 0),
    ("127.0.0.1", 80, socket.AF_INET6, 0),
])
def test_numbers_resolve_as_the_system_has_it(host, port, family, flags):
    async def main():
        return await SimulatedNetwork().host("host").getaddrinfo(host, port, family, socket.SOCK_STREAM, flags)

    try:
        expected = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, 0, flags)
    except socket.gaierror:
        with pytest.raises(socket.gaierror):
            flowcoro.run(main(), clock=VirtualClock())
    else:
        assert flowcoro.run(main(), clock=VirtualClock()) == expected


# ---- datagrams ---------------------------------------------------------------------------------------------

def datagram_sockets(network, *, port=53):
    client, server = network.host("client"), network.host("server")
    one, other = client.socket(type=socket.SOCK_DGRAM), server.socket(type=socket.SOCK_DGRAM)
    other.bind(("", port))
    return one, other


def all_datagrams(raw):
    found = []
    while isinstance(data := end(raw), bytes):
        found.append(data)
    return found


@on_network
async def test_a_datagram_arrives_whole_or_cut_and_answers_find_back(network):
    one, other = datagram_sockets(network)
    with one, other:
        assert one.sendto(b"question", ("server", 53)) == 8 and end(other) == "EAGAIN"
        await flowcoro.sleep(1)
        data, source = other.recvfrom(100)
        assert data == b"question" and source == ("10.0.0.1", one.getsockname()[1])
        other.sendto(b"long answer", 0, source)
        await flowcoro.sleep(1)
        assert one.recvmsg(4) == (b"long", [], socket.MSG_TRUNC, ("10.0.0.2", 53)) and end(one) == "EAGAIN"
        assert attempt(one.send, b"x") == "EDESTADDRREQ"
        assert attempt(one.sendto, bytes(65_508), ("server", 53)) == "EMSGSIZE"


@on_network(loss=0.3, jitter=0.5, duplication=0.2)
async def test_datagrams_get_lost_doubled_and_overtake_each_other(network):
    one, other = datagram_sockets(network)
    with one, other:
        sent = [b"%d" % number for number in range(1000)]
        for data in sent:
            one.sendto(data, ("server", 53))
        await flowcoro.sleep(10)
        got = all_datagrams(other)
        assert set(got) <= set(sent) and 800 < len(got) < 880       # (1 - 0.3) * 1.2 of 1000
        assert len(set(got)) < len(got) and sorted(got, key=sent.index) != got


@on_network(bandwidth=1000)
async def test_datagrams_are_dropped_when_a_buffer_is_full_or_the_link_too_busy(network):
    one, other = datagram_sockets(network)
    with one, other:
        for _ in range(100):
            one.sendto(bytes(50_000), ("server", 53))
        assert network.statistics()["packets"]["lost"] == 100 - 6       # 256 KiB wait for the link, and one is on it
        await flowcoro.sleep(1000)
        assert len(all_datagrams(other)) == 4                           # 212,992 bytes wait for the program


@on_network
async def test_a_connected_datagram_socket_learns_that_nobody_listens(network):
    one, other = datagram_sockets(network)
    with one, other:
        assert one.connect_ex(("server", 54)) == 0 and one.getpeername() == ("10.0.0.2", 54)
        one.send(b"x")
        await flowcoro.sleep(1)
        assert end(one) == "ECONNREFUSED" and end(one) == "EAGAIN"
        one.connect_ex(("server", 53))
        one.send(b"y")
        await flowcoro.sleep(1)
        assert all_datagrams(other) == [b"y"]


@on_network
async def test_one_port_may_have_a_socket_for_all_and_one_for_a_single_peer(network):
    one, other = datagram_sockets(network)
    with one, other, network.host("server").socket(type=socket.SOCK_DGRAM) as special:
        for raw in other, special:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        special.bind(("server", 53))
        special.connect(("client", 1000))
        one.bind(("", 999))
        one.sendto(b"for all", ("server", 53))
        with network.host("client").socket(type=socket.SOCK_DGRAM) as peer:
            peer.bind(("", 1000))
            peer.sendto(b"for one", ("server", 53))
            await flowcoro.sleep(1)
        assert all_datagrams(other) == [b"for all"] and all_datagrams(special) == [b"for one"]


@on_network
async def test_multicast_reaches_those_who_have_joined(network):
    raws = {}
    for name in "abc":
        raws[name] = network.host(name).socket(type=socket.SOCK_DGRAM)
        raws[name].bind(("", 5000))
    joined = socket.inet_aton("224.1.1.1") + socket.inet_aton("0.0.0.0")
    for name in "ab":
        raws[name].setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, joined)
    raws["c"].sendto(b"to all", ("224.1.1.1", 5000))
    await flowcoro.sleep(1)
    assert {name: all_datagrams(raw) for name, raw in raws.items()} == {"a": [b"to all"], "b": [b"to all"], "c": []}
    raws["a"].setsockopt(socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, joined)
    assert attempt(raws["a"].setsockopt, socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, joined) == "EADDRNOTAVAIL"
    for raw in raws.values():
        raw.close()


# ---- faults on command -------------------------------------------------------------------------------------

@on_network
async def test_a_partition_delays_until_it_is_healed(network):
    near, far = await connected(network)
    with near, far:
        near.send(b"before")
        network.partition("client", "server")           # also what is under way
        near.send(b" after")
        await flowcoro.sleep(100)
        assert end(far) == "EAGAIN"
        network.heal("client", "server")
        await flowcoro.sleep(200)
        assert end(far) == b"before after"


@on_network
async def test_a_partition_that_lasts_breaks_who_sends_and_nobody_else(network):
    near, far = await connected(network)
    with near, far:
        network.partition(["client"], ["server", network.host("another")])
        near.send(b"x")
        await flowcoro.sleep(900)
        assert end(near) == "EAGAIN"
        await flowcoro.sleep(30)
        assert end(near) == "ETIMEDOUT" and end(near) == b"" and attempt(near.send, b"x") == "EPIPE"
        assert end(far) == "EAGAIN"                     # it knows nothing
        network.heal()
        far.send(b"are you there?")
        await flowcoro.sleep(1)
        assert end(far) == "ECONNRESET"


@on_network
async def test_a_partition_may_be_one_way(network):
    one, other = datagram_sockets(network)
    with one, other:
        network.partition("server", "client", one_way=True)
        one.sendto(b"question", ("server", 53))
        await flowcoro.sleep(1)
        data, source = other.recvfrom(100)
        other.sendto(b"answer", source)
        await flowcoro.sleep(1)
        assert data == b"question" and end(one) == "EAGAIN"
        network.heal("client", "server")
        other.sendto(b"answer", source)
        await flowcoro.sleep(1)
        assert end(one) == b"answer"


@pytest.mark.parametrize("ends, left", [
    ((), set()), (("a",), {"bc", "cb"}), ((None, "a"), {"bc", "cb"}), (("a", "b"), {"ac", "ca", "bc", "cb"}),
    (("b", "a"), {"ac", "ca", "bc", "cb"}), (("a", ["b", "c"]), {"bc", "cb"}), ((["b", "c"],), set()),
])
def test_heal_ends_the_partitions_of_the_hosts_that_are_named(ends, left):
    async def test(network):
        for pair in "ab", "ac", "bc":
            network.host(pair[0]), network.host(pair[1])
            network.partition(*pair)
        network.heal(*ends)
        assert {one + other for one in "abc" for other in "abc"
                if one != other and network.link(network.host(one), network.host(other)).cut} == left

    on_network(test)()


@on_network
async def test_hosts_given_as_a_set_are_taken_in_the_order_of_their_making(network):
    names = [f"host{number}" for number in range(20)]
    for name in names:
        network.host(name)
    network.partition(set(names[1:]), names[0], one_way=True)
    assert [what for _, _, what in network.events] == [f"partition: nothing from {name} to host0" for name in names[1:]]


@on_network
async def test_a_link_may_have_settings_of_its_own(network):
    one, other = datagram_sockets(network)
    with one, other:
        network.set_link("client", "server", latency=5, one_way=True)
        began = flowcoro.now()
        one.sendto(b"slow", ("server", 53))
        with Stream(other, other.network) as stream:
            assert await stream.read() == b"slow" and flowcoro.now() - began == pytest.approx(5)
            network.set_link("client", "server", loss=1)
            one.sendto(b"lost", ("server", 53))
            assert network.statistics()["packets"]["lost"] == 1


@on_network(latency=1)
async def test_what_has_left_a_host_that_crashes_still_arrives_and_then_nothing(network):
    near, far = await connected(network)
    with far:
        near.send(b"last words")
        await flowcoro.sleep(0.5)
        network.crash("client")
        assert end(near) == "ENETDOWN"
        await flowcoro.sleep(1000)
        assert end(far) == b"last words" and end(far) == "EAGAIN"     # no end, no reset: nobody is there to say it
        far.send(b"are you there?")
        await flowcoro.sleep(100)
        assert end(far) == "EAGAIN"
        network.restart("client")
        await flowcoro.sleep(200)
        assert end(far) == "ECONNRESET"
    near.close()


@on_network(latency=1, bandwidth=10)
async def test_what_waits_for_the_wire_when_a_host_crashes_does_not_arrive(network):
    one, other = datagram_sockets(network)
    with other:
        for text in b"first", b"second":
            one.sendto(text, ("server", 53))        # 45 and 46 bytes: 4.5 and 4.6 seconds
        await flowcoro.sleep(5)
        network.crash("client")
        network.restart("client")
        await flowcoro.sleep(100)
        assert all_datagrams(other) == [b"first"]
    one.close()


@on_network
async def test_a_sender_that_waits_for_room_learns_that_the_reader_has_crashed(network):
    near, far = await connected(network)
    with near:
        assert near.send(bytes(10**6)) == 2**16 and near.send(bytes(10**6)) == 2**16
        await flowcoro.sleep(10)
        network.crash("server")
        await flowcoro.sleep(1000)
        assert end(near) == "ETIMEDOUT"
    far.close()


@on_network(loss=0.2)
async def test_word_of_new_room_may_get_lost(network):
    data = random.Random(3).randbytes(20_000)
    near, far = await connected(network, settings=[(socket.SO_RCVBUF, 100)])
    with Stream(near, near.network) as writer, Stream(far, far.network) as reader:
        async with flowcoro.TaskGroup() as group:
            group.spawn(writer.write(data))
            assert await reader.read_exactly(len(data)) == data


@on_network
async def test_word_of_new_room_that_meets_a_partition_comes_once_it_is_healed(network):
    near, far = await connected(network)
    with near, far:
        for _ in range(2):
            near.send(bytes(2**16))
        await flowcoro.sleep(10)
        network.partition("client", "server")
        assert len(far.recv(2**16)) == 2**16
        await flowcoro.sleep(10)
        assert end(far) == "EAGAIN"
        network.heal()
        await flowcoro.sleep(300)
        assert len(far.recv(2**16)) == 2**16


# ---- hosts -------------------------------------------------------------------------------------------------

@on_network
async def test_code_runs_on_the_host_whose_block_it_is_in_and_so_does_what_it_spawns(network):
    one, other = network.host("one"), network.host("other")

    async def where():
        await flowcoro.checkpoint()
        return flowcoro.network.get()

    assert network.host("one") is one and flowcoro.network.get() is None
    async with flowcoro.TaskGroup() as group:
        with one:
            first = group.spawn(where())
            with other, one, other:
                second = group.spawn(where())
            assert flowcoro.network.get() is one
        third = group.spawn(where())
    assert [first.result(), second.result(), third.result()] == [one, other, None]
    assert await other.run(where()) is other and flowcoro.network.get() is None


@on_network
async def test_two_tasks_may_be_inside_the_same_host_and_leave_in_any_order(network):
    host = network.host("host")

    async def visit(seconds):
        with host:
            await flowcoro.sleep(seconds)
            assert flowcoro.network.get() is host
        assert flowcoro.network.get() is None

    await flowcoro.when_all(visit(1), visit(2), visit(1.5))


@on_network
async def test_a_crash_cancels_the_tasks_of_the_host_and_what_their_cleanup_sends_goes_nowhere(network):
    client, server = network.host("client"), network.host("server")
    ended = []

    async def serve():
        with Listener(7) as listener:
            stream = await listener.accept()
            with stream:
                try:
                    await stream.read()
                finally:
                    ended.append(attempt(stream.raw.send, b"goodbye"))
                    ended.append(attempt(flowcoro.network.get().socket))

    async with flowcoro.TaskGroup() as group:
        task = server.spawn(group, serve())
        await flowcoro.checkpoint()
        with client, await Stream.connect("server", 7) as stream:
            await flowcoro.sleep(1)
            network.crash(server)
            network.crash(server)
            await flowcoro.sleep(1)
            assert task.done() and task.cancelled() and ended == ["ENETDOWN", "ENETDOWN"]
            assert end(stream.raw) == "EAGAIN"
        with pytest.raises(HostCrashed, match="host 'server' is down"):
            server.spawn(group, serve())
        with pytest.raises(HostCrashed):
            await server.run(serve())


@on_network
async def test_what_boots_comes_again_with_each_restart(network):
    client, server = network.host("client"), network.host("server")
    async with flowcoro.TaskGroup() as group:
        server.boot(group, echo_server)
        await flowcoro.sleep(1)
        for _ in range(3):
            assert await client.run(ask("server", b"hello\n")) == b"hello\n"
            network.crash("server")
            await flowcoro.sleep(1)
            network.restart("server")
            network.restart("server")
            await flowcoro.sleep(1)
        assert network.statistics()["hosts"]["server"] == {"up": True, "sockets": 1, "connections": 0, "tasks": 1}
        network.crash(server)


@on_network
async def test_who_awaits_a_run_on_a_host_that_crashes_is_told(network):
    host = network.host("host")

    async def crash():
        await flowcoro.sleep(1)
        network.crash(host)

    async with flowcoro.TaskGroup() as group:
        group.spawn(crash())
        with pytest.raises(HostCrashed, match="host 'host' has crashed while this ran on it"):
            await host.run(flowcoro.sleep(10))
    assert flowcoro.now() == 1


# ---- the network and its run -------------------------------------------------------------------------------

def test_the_end_of_main_lets_cleanup_have_its_last_word_and_no_more():
    async def main():
        network = SimulatedNetwork(latency=1)
        client, server = network.host("client"), network.host("server")

        async def serve():
            try:
                await flowcoro.sleep(1e9)
            finally:
                with flowcoro.CancelScope(shield=True), await Stream.connect("client", 7) as stream:
                    await stream.write(b"goodbye\n")
                    said.append(await stream.read_line())

        async def answer():
            with Listener(7) as listener, flowcoro.CancelScope(shield=True), await listener.accept() as stream:
                await stream.write(await stream.read_line())

        for host, coro in (client, answer()), (server, serve()):
            with host:
                flowcoro.spawn(coro)
        await flowcoro.sleep(1)

    said, clock = [], VirtualClock()
    flowcoro.run(main(), clock=clock)
    assert said == [b"goodbye\n"] and clock.now() < 20


def test_two_that_wait_for_each_other_over_the_network_are_a_deadlock():
    async def main():
        network = SimulatedNetwork()
        near, far = await connected(network)
        with Stream(near, near.network) as one, Stream(far, far.network) as other:
            await flowcoro.when_all(one.read(), other.read())

    with pytest.raises(flowcoro.Deadlock, match=r"wait until client:32768 > server:80 is readable"):
        flowcoro.run(main(), clock=VirtualClock())


def test_a_network_serves_one_run_with_one_worker():
    network = SimulatedNetwork()

    async def use():
        network.host("host").socket().close()

    flowcoro.run(use(), clock=VirtualClock())
    with pytest.raises(RuntimeError, match="serves one run"):
        flowcoro.run(use(), clock=VirtualClock())
    network = SimulatedNetwork()
    with pytest.raises(RuntimeError, match="needs a run with one worker"):
        flowcoro.run(use(), workers=2)


def test_a_socket_may_be_closed_when_its_run_is_over():
    async def main():
        near, far = await connected(SimulatedNetwork())
        near.send(b"never read")
        far.send(b"never read")
        return near, far

    near, far = flowcoro.run(main(), clock=VirtualClock())
    near.close()

    async def close():
        far.close()

    flowcoro.run(close())
    assert near.fileno() == far.fileno() == -1


@pytest.mark.parametrize("wrong, error, said", [
    (dict(seed=[]), TypeError, "seed=[]"), (dict(latency=-1), ValueError, "latency=-1"),
    (dict(latency="1"), TypeError, "latency='1'"), (dict(jitter=float("nan")), ValueError, "jitter=nan"),
    (dict(loss=1.1), ValueError, "loss=1.1"), (dict(duplication=2), ValueError, "duplication=2"),
    (dict(bandwidth=0), ValueError, "bandwidth=0"), (dict(split=-1), ValueError, "split=-1"),
    (dict(keep=-1), ValueError, "keep=-1"),
])
def test_wrong_settings_are_named(wrong, error, said):
    with pytest.raises(error, match=re.escape(said)):
        SimulatedNetwork(**wrong)


def test_wrong_hosts_and_links_are_named():
    network = SimulatedNetwork()
    network.host("a"), network.host("b")
    for name in "", "localhost", "10.0.0.1", "::1", "two words":
        with pytest.raises(ValueError, match=re.escape(f"host({name!r})")):
            network.host(name)
    with pytest.raises(TypeError, match=r"host\(7\)"):
        network.host(7)
    for call in (lambda: network.partition("a", "c"), lambda: network.crash("c"), lambda: network.crash(["a"]),
                 lambda: network.break_connections("c"), lambda: network.heal("a", ["b", "c"]), lambda: network.heal(target="c"),
                 lambda: network.restart(7), lambda: network.set_link("c", "a", loss=0)):
        with pytest.raises(ValueError, match="is no host of this network, which has a, b"):
            call()
    for call in network.partition, network.heal, network.break_connections, network.set_link:
        with pytest.raises(TypeError, match="target=7: give a host, its name, or several"):
            call("a", 7)
        with pytest.raises(ValueError, match=r"source=\[\]: give one host or more"):
            call([], "a")
    for call in network.partition, network.set_link:
        with pytest.raises(TypeError, match="source=None: give a host"):
            call(None, "a")
        with pytest.raises(ValueError, match="between a host and itself there is no link"):
            call("a", "a")
    with pytest.raises(TypeError, match="a link has no speed: it has latency"):
        network.set_link("a", "b", speed=3)
    with pytest.raises(TypeError, match="give a function"):
        network.host("a").boot(None, 3)
    with pytest.raises(TypeError, match=r"spawn\(None, …\): give a TaskGroup"):
        network.host("a").spawn(None, flowcoro.sleep(1))


@on_network(keep=3)
async def test_the_trace_keeps_the_newest_and_tells_when_and_where(network):
    for number in range(5):
        network.host("host").note(f"event {number}")
        await flowcoro.sleep(1)
    assert list(network.events) == [(2, "host", "event 2"), (3, "host", "event 3"), (4, "host", "event 4")]
    assert network.trace().splitlines()[0] == "      2.000000 host         event 2"


def test_without_a_seed_of_its_own_a_network_has_that_of_the_run():
    async def lost():
        network = SimulatedNetwork(loss=0.5)
        one, other = datagram_sockets(network)
        with one, other:
            for number in range(40):
                one.sendto(b"%d" % number, ("server", 53))
            await flowcoro.sleep(1)
            patterns.add(tuple(all_datagrams(other)))

    patterns = set()
    assert explore(lost, seeds=[1, 2, 3, 1, 2, 3]) == 6
    assert len(patterns) == 3
    flowcoro.run(lost(), clock=VirtualClock())
    flowcoro.run(lost(), clock=VirtualClock())
    assert len(patterns) == 4
