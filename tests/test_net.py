"""Connections: what Socket promises, against plain sockets of the operating system."""

import array
import contextlib
import errno
import functools
import gc
import gzip
import io
import itertools
import os
import selectors
import socket
import struct
import sys
import threading

import pytest

import flowcoro
import flowcoro_net
from flowcoro_net import BrokenError, LimitError, Socket, TcpServer
from flowcoro_testing import memory_socket_pair, run_in_kernel, wait_all_tasks_parked

# Seconds after which a test has failed: for a machine that is very slow.
PATIENCE = 60


def open_descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    gc.collect()
    before, threads = open_descriptors(), threading.active_count()
    yield
    gc.collect()
    assert open_descriptors() == before
    assert threading.active_count() < threads + 50          # those of to_thread() stay for a while; these are less than 50 more


def run(main, *args, **options):
    """Run main(*args) in a kernel, which is to watch no descriptor at the end."""
    async def bounded():
        with flowcoro.timeout(PATIENCE):
            result = await main(*args)
        assert flowcoro.statistics()["descriptors"] == 0
        return result

    return flowcoro.run(bounded(), **options)


def tcp_pair():
    """Two plain sockets connected by TCP."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname(), timeout=PATIENCE)
        other, _ = server.accept()
    other.settimeout(PATIENCE)
    return one, other


def unix_pair():
    one, other = socket.socketpair()
    other.settimeout(PATIENCE)
    return one, other


@pytest.fixture(params=[(tcp_pair, "edge"), (unix_pair, "edge"), (tcp_pair, "level")], ids=["tcp", "unix", "tcp-level"])
def pair(request, monkeypatch):
    """A function that gives (Socket, plain socket); both are closed at the end. `level`: as where there is no epoll."""
    make_pair, trigger = request.param
    if trigger == "level":
        monkeypatch.setattr(flowcoro, "_new_poller", lambda: flowcoro._LevelPoller(selectors.PollSelector()))
    with contextlib.ExitStack() as stack:
        def make():
            one, other = make_pair()
            stack.callback(other.close)
            return Socket(one), other

        yield make


def reset(plain):
    """Close a plain socket so that its peer is sent an RST."""
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    plain.close()


def drain(plain):
    """All that comes until the end."""
    found = bytearray()
    while data := plain.recv(1 << 20):
        found += data
    return bytes(found)


async def settled(group, coro):
    task = group.spawn(coro)
    await wait_all_tasks_parked()
    return task


# ---- reading ---------------------------------------------------------------------------------------------------

def test_what_was_unread_is_read_first(pair):
    async def main():
        near, far = pair()
        async with near:
            far.sendall(b"GET / 101 frames")
            assert await near.read_until(b" 101 ") == b"GET / 101 "
            assert await near.read(3) == b"fra"
            near.unread(b"fra")
            near.unread(memoryview(b">> "))
            assert await near.read() == b">> frames"
            far.sendall(b"more")
            assert await near.read() == b"more"
            with pytest.raises(TypeError, match="unread"):
                near.unread("text")
            async with flowcoro.TaskGroup() as group:
                await settled(group, near.read())
                with pytest.raises(flowcoro.BusyError):
                    near.unread(b"x")
                far.close()
        with pytest.raises(flowcoro.ClosedError):
            near.unread(b"x")

    run(main)


def test_who_has_hung_up_is_known_before_what_he_sent_is_read(pair):
    async def main():
        near, far = pair()
        async with near:
            await flowcoro.checkpoint()
            assert not near.hung_up
            far.sendall(b"the last words")
            far.close()
            with flowcoro.timeout(PATIENCE):
                while not near.hung_up:
                    await flowcoro.sleep(0.001)
            assert await near.read() == b"the last words"
            assert await near.read() == b"" and near.hung_up

    run(main)


def test_read_gives_what_is_there_and_nothing_at_the_end_again_and_again(pair):
    async def main():
        near, far = pair()
        async with near:
            far.sendall(b"hello")
            assert await near.read() == b"hello"
            far.sendall(b"world")
            assert await near.read(3) == b"wor"
            assert await near.read(3) == b"ld"
            far.close()
            for _ in range(3):
                assert await near.read() == b""

    run(main)


def test_read_waits_for_the_first_byte(pair):
    async def main():
        near, far = pair()
        async with near, flowcoro.TaskGroup() as group:
            reader = await settled(group, near.read())
            assert not reader.done()
            far.sendall(b"x")
            assert await reader == b"x"

    run(main)


def test_an_end_that_comes_with_the_last_bytes_is_not_missed(pair):
    async def main():
        for _ in range(20):
            near, far = pair()
            async with near, flowcoro.TaskGroup() as group:
                reader = await settled(group, near.read())
                far.sendall(b"last")
                far.close()
                assert await reader == b"last"
                assert await near.read() == b""

    run(main)


def test_bytes_that_fill_the_read_exactly_do_not_hide_those_behind(pair):
    async def main():
        near, far = pair()
        async with near:
            far.sendall(bytes(range(200)))
            assert b"".join([await near.read(50) for _ in range(4)]) == bytes(range(200))
            far.sendall(b"more")
            assert await near.read(4) == b"more"

    run(main)


@pytest.mark.parametrize("wrong, error", [
    (0, ValueError), (-1, ValueError), (1.5, TypeError), ("1", TypeError), (True, TypeError)])
def test_read_refuses_what_is_no_number_of_bytes(pair, wrong, error):
    async def main():
        near, _ = pair()
        async with near:
            with pytest.raises(error, match=repr(wrong)):
                await near.read(wrong)

    run(main)


def test_read_exactly_waits_for_all_and_leaves_the_rest(pair):
    async def main():
        near, far = pair()
        async with near, flowcoro.TaskGroup() as group:
            reader = await settled(group, near.read_exactly(6))
            far.sendall(b"abc")
            await wait_all_tasks_parked()
            far.sendall(b"defghi")
            assert await reader == b"abcdef"
            assert near.statistics()["bytes_buffered"] == 3
            assert await near.read_exactly(0) == b""
            assert await near.read(2) == b"gh"
            assert await near.read_exactly(1) == b"i"
            assert near.statistics()["bytes_buffered"] == 0
            far.sendall(b"exact")
            assert await near.read_exactly(5) == b"exact"

    run(main)


def test_read_exactly_says_that_the_peer_ended_and_consumes_nothing(pair):
    async def main():
        near, far = pair()
        async with near:
            far.sendall(b"abc")
            far.close()
            with pytest.raises(BrokenError, match="after 3 bytes, where one of 4 bytes was expected"):
                await near.read_exactly(4)
            assert await near.read() == b"abc"
            assert await near.read() == b""
            with pytest.raises(BrokenError, match="after 0 bytes"):
                await near.read_exactly(1)

    run(main)


def test_read_until_gives_lines_and_nothing_at_a_clean_end(pair):
    async def main():
        near, far = pair()
        async with near:
            far.sendall(b"one\ntwo\r\n\nfour")
            assert await near.read_until(b"\n") == b"one\n"
            assert await near.read_until(b"\r\n") == b"two\r\n"
            assert await near.read_until() == b"\n"
            far.sendall(b"\n")
            assert await near.read_until() == b"four\n"
            far.close()
            assert await near.read_until() == b""

    run(main)


def test_a_line_without_its_end_is_an_error_and_stays_readable(pair):
    async def main():
        near, far = pair()
        async with near:
            far.sendall(b"half a li")
            far.close()
            with pytest.raises(BrokenError, match="9 bytes"):
                await near.read_until()
            assert await near.read() == b"half a li"

    run(main)


def test_a_separator_that_comes_in_pieces_is_found(pair):
    async def main():
        near, far = pair()
        async with near, flowcoro.TaskGroup() as group:
            reader = group.spawn(near.read_until(b"\r\n\r\n"))
            for byte in b"head\r\n\r\r\n\r\n":
                await wait_all_tasks_parked()
                assert not reader.done()
                far.sendall(bytes([byte]))
            assert await reader == b"head\r\n\r\r\n\r\n"

    run(main)


def test_a_peer_that_sends_one_byte_at_a_time_is_read_as_any_other(pair):
    text = b"first line\n" + bytes(range(100)) + b"the rest"

    def send(far):
        for byte in text:
            far.sendall(bytes([byte]))
        far.close()

    async def main():
        near, far = pair()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        async with near, flowcoro.TaskGroup() as group:
            group.spawn(flowcoro.to_thread(send, far))
            assert await near.read_until(b"\n") == b"first line\n"
            assert await near.read_exactly(100) == bytes(range(100))
            assert await near.read_exactly(8) == b"the rest"
            assert await near.read() == b""

    run(main)


def test_a_line_of_64_kib_against_a_limit_of_8_is_refused_and_consumes_nothing(pair):
    line = b"x" * (64 * 2**10 - 1) + b"\n"

    async def main():
        near, far = pair()
        async with near, flowcoro.TaskGroup() as group:
            group.spawn(flowcoro.to_thread(far.sendall, line))
            with pytest.raises(LimitError, match=r"limit=8192 bytes; allow more with limit="):
                await near.read_until(b"\n", limit=8 * 2**10)
            assert near.statistics()["bytes_buffered"] <= 8 * 2**10 + flowcoro_net.CHUNK
            assert await near.read_exactly(len(line)) == line

    run(main)


def test_a_line_as_long_as_the_limit_is_taken_and_one_byte_more_is_not(pair):
    async def main():
        near, far = pair()
        async with near:
            far.sendall(b"1234\n12345\n")
            assert await near.read_until(limit=5) == b"1234\n"
            with pytest.raises(LimitError):
                await near.read_until(limit=5)
            assert await near.read_until(limit=6) == b"12345\n"

    run(main)


def test_read_until_refuses_nonsense(pair):
    async def main():
        near, _ = pair()
        async with near:
            for separator, error in ("\n", TypeError), (b"", ValueError), (10, TypeError):
                with pytest.raises(error):
                    await near.read_until(separator)
            for limit, error in (0, ValueError), ("8", TypeError), (None, TypeError):
                with pytest.raises(error):
                    await near.read_until(limit=limit)

    run(main)


def test_read_into_fills_a_buffer_of_a_pool(pair):
    async def main():
        near, far = pair()
        pool = flowcoro.BufferPool(8, 1)
        async with near:
            with pool.borrow() as buffer:
                far.sendall(b"0123456789")
                assert await near.read_into(buffer) == 8
                assert buffer == b"01234567"
                assert await near.read_into(memoryview(buffer)[2:]) == 2
                assert buffer == b"01894567"
                far.sendall(b"line\nrest")
                await near.read_until()
                assert await near.read_into(buffer) == 4        # out of the socket's buffer
                assert buffer[:4] == b"rest"
                far.close()
                assert await near.read_into(buffer) == 0
                assert await near.read_into(buffer) == 0
            for wrong, error in (b"read only", TypeError), (bytearray(), ValueError), (5, TypeError):
                with pytest.raises(error):
                    await near.read_into(wrong)

    run(main)


# ---- writing ---------------------------------------------------------------------------------------------------

def test_write_takes_all_kinds_of_bytes(pair):
    numbers = array.array("i", range(10))
    kinds = [b"bytes", bytearray(b"bytearray"), memoryview(b"memoryview")[2:], numbers, b""]

    async def main():
        near, far = pair()
        async with near:
            for data in kinds:
                await near.write(data)
        assert drain(far) == b"".join(memoryview(data).tobytes() for data in kinds)

    run(main)


def test_write_refuses_text(pair):
    async def main():
        near, _ = pair()
        async with near:
            for write in near.write("text"), near.write_many([b"x", "text"]):
                with pytest.raises(TypeError, match=r"text\.encode\(\)"):
                    await write

    run(main)


def test_much_data_arrives_whole_though_the_peer_is_slow(pair):
    data = os.urandom(1 << 20) * 8

    async def main():
        near, far = pair()
        async with flowcoro.TaskGroup() as group:
            reader = group.spawn(flowcoro.to_thread(drain, far))
            async with near:
                await near.write(data)
                assert near.statistics()["bytes_sent"] == len(data)
            assert await reader == data

    run(main)


def test_a_peer_that_never_reads_makes_write_wait_and_memory_stays_bounded(pair):
    import tracemalloc
    data = bytes(64 << 20)

    async def main():
        near, far = pair()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            async with near:
                with flowcoro.move_on_after(0.05) as scope:
                    await near.write(data)
                assert scope.cancelled_caught
                assert near.statistics()["bytes_sent"] < len(data) // 2
            assert tracemalloc.get_traced_memory()[1] - before < 1 << 20
        finally:
            tracemalloc.stop()

    run(main)


def test_what_is_written_must_not_be_resized_meanwhile(pair):
    async def main():
        near, far = pair()
        data = bytearray(32 << 20)
        async with near, flowcoro.TaskGroup() as group:
            writer = await settled(group, near.write(data))
            assert not writer.done()
            with pytest.raises(BufferError):
                data.append(0)
            writer.cancel()

    run(main)


def test_write_many_sends_all_buffers_in_a_row(pair):
    pieces = [b"head", b"", bytearray(b"x" * 100_000), memoryview(b"tail")] + [b"%d," % n for n in range(3000)]
    pieces += [os.urandom(3 << 20), b"end"]

    async def main():
        near, far = pair()
        async with flowcoro.TaskGroup() as group:
            reader = group.spawn(flowcoro.to_thread(drain, far))
            async with near:
                await near.write_many(pieces)
                await near.write_many([])
                await near.write_many(iter([b"", b"x"]))
            assert await reader == b"".join(pieces) + b"x"

    run(main)


@pytest.mark.parametrize("offset, count", [
    (0, None), (5, None), (0, 7), (1000, 3_000_000), (0, 0), (9_999_999, None), (3, 99_999_999)])
@pytest.mark.parametrize("kind", ["file", "memory"])
def test_send_file_sends_the_part_asked_for(pair, tmp_path, kind, offset, count):
    content = os.urandom(100_003) * 50
    path = tmp_path / "file"
    path.write_bytes(content)
    wanted = content[offset:] if count is None else content[offset:offset + count]

    async def main():
        near, far = pair()
        async with flowcoro.TaskGroup() as group:
            reader = group.spawn(flowcoro.to_thread(drain, far))
            with open(path, "rb") if kind == "file" else io.BytesIO(content) as file:
                async with near:
                    assert await near.send_file(file, offset, count) == len(wanted)
                    assert near.statistics()["bytes_sent"] == len(wanted)
            assert await reader == wanted

    run(main)


def test_send_file_reads_itself_where_sendfile_cannot(pair, tmp_path, monkeypatch):
    def sendfile(*args):
        raise OSError(errno.EINVAL, "not this file")

    monkeypatch.setattr(os, "sendfile", sendfile)
    (tmp_path / "file").write_bytes(b"content")

    async def main():
        near, far = pair()
        with open(tmp_path / "file", "rb") as file:
            async with near:
                assert await near.send_file(file, 2) == 5
                assert await near.send_file(file, 0, 2**20, head=b", once, ") == 7
                assert not is_corked(near)
        assert drain(far) == b"ntent, once, content"

    run(main)


def is_corked(sock):
    return (hasattr(socket, "TCP_CORK") and sock.raw.family == socket.AF_INET
            and bool(sock.raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK)))


@pytest.mark.parametrize("kind", ["file", "memory"])
@pytest.mark.parametrize("size, count", [(0, None), (5, None), (5, 3), (flowcoro_net.CORKED_FROM, flowcoro_net.CORKED_FROM),
                                         (9_000_001, 9_000_001), (9_000_001, None), (900_000, 9_000_001)])
def test_a_file_goes_after_its_head(pair, tmp_path, kind, size, count):
    """The last of them ends before what was asked for, and before the cork is to be taken off."""
    content, head = os.urandom(size), b"head " * 1000
    (tmp_path / "file").write_bytes(content)

    async def main():
        near, far = pair()
        async with flowcoro.TaskGroup() as group:
            reader = group.spawn(flowcoro.to_thread(drain, far))
            with open(tmp_path / "file", "rb") if kind == "file" else io.BytesIO(content) as file:
                async with near:
                    assert await near.send_file(file, 0, count, head=memoryview(head)) == len(content[:count])
                    assert near.statistics()["bytes_sent"] == len(head + content[:count])
                    assert not is_corked(near)
            assert await reader == head + content[:count]

    run(main)


@pytest.mark.skipif(not hasattr(socket, "TCP_CORK"), reason="Linux has TCP_CORK")
@pytest.mark.parametrize("size, count, head, corked", [
    (flowcoro_net.CORKED_FROM - 1,) * 2 + (b"head", False), (2**24, 2**24, b"head", True), (2**24, None, b"head", False),
    (2**24, 2**24, b"", False)], ids=["small", "large", "no count", "no head"])
@pytest.mark.parametrize("end", ["cancelled", "lost", "sent"])
def test_only_a_large_file_is_corked_and_not_once_it_is_sent_cancelled_or_lost(tmp_path, size, count, head, corked, end):
    with open(tmp_path / "file", "wb") as file:
        file.truncate(size)                         # zeros, which take no room

    async def main():
        one, far = tcp_pair()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)          # both are to be full
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        with far, open(tmp_path / "file", "rb") as file:
            async with Socket(one) as near, flowcoro.TaskGroup() as group:
                scope = flowcoro.CancelScope()
                sending = await settled(group, in_scope(scope, near.send_file(file, 0, count, head=head)))
                assert not sending.done() and is_corked(near) is corked
                if end == "cancelled":
                    scope.cancel()
                elif end == "lost":
                    reset(far)
                else:
                    with far.makefile("rb") as reader:
                        assert await flowcoro.to_thread(reader.read, len(head) + size) == head + bytes(size)
                assert await sending == {"cancelled": None, "lost": BrokenError, "sent": size}[end]
                assert not is_corked(near)

    run(main)


class Noting(socket.socket):
    """Notes in `noted` what was asked of it, and of os.sendfile()."""

    def send(self, *args):
        self.noted.append("head")
        return super().send(*args)

    def setsockopt(self, level, option, value):
        self.noted.append("corked" if value else "uncorked")
        super().setsockopt(level, option, value)

    def note_sendfile(self, real, out, number, offset, count):
        sent = real(out, number, offset, count)
        self.noted.append((offset, count))
        return sent


@pytest.mark.skipif(not hasattr(os, "sendfile"), reason="this system has no sendfile()")
@pytest.mark.parametrize("has_cork", [pytest.param(True, marks=pytest.mark.skipif(not hasattr(socket, "TCP_CORK"),
                                                                                  reason="Linux has TCP_CORK")), False])
def test_a_large_file_is_corked_before_its_head_and_uncorked_before_its_end(tmp_path, monkeypatch, has_cork):
    (tmp_path / "file").write_bytes(bytes(2**20))
    if not has_cork:
        monkeypatch.delattr(socket, "TCP_CORK", raising=False)

    async def main():
        one, far = tcp_pair()
        raw = Noting(fileno=one.detach())
        raw.noted = noted = []
        with far, open(tmp_path / "file", "rb") as file:
            async with Socket(raw) as near, flowcoro.TaskGroup() as group:
                monkeypatch.setattr(os, "sendfile", functools.partial(raw.note_sendfile, os.sendfile))
                group.spawn(flowcoro.to_thread(drain, far))
                await near.send_file(file, 0, 2**20, head=b"head")
                await near.shutdown_write()
        kinds = [what if isinstance(what, str) else "file" for what in noted]
        assert [kind for kind, _ in itertools.groupby(kinds)] == (
            ["corked", "head", "file", "uncorked", "file"] if has_cork else ["head", "file"])
        assert kinds.count("corked") == kinds.count("uncorked") == has_cork
        corked_end = 2**20 - flowcoro_net.UNCORKED_END if has_cork else 2**20
        assert noted[kinds.index("file")] == (0, corked_end)
        if has_cork:
            assert noted[kinds.index("uncorked") + 1] == (corked_end, flowcoro_net.UNCORKED_END)

    run(main)


@pytest.mark.skipif(not hasattr(socket, "TCP_CORK"), reason="Linux has TCP_CORK")
def test_with_several_workers_no_descriptor_is_closed_while_it_is_corked(tmp_path):
    (tmp_path / "file").write_bytes(bytes(flowcoro_net.CORKED_FROM))
    open_meanwhile = []

    class Raw(socket.socket):
        def setsockopt(self, *args):
            near.close_nowait()                     # as another worker may do
            open_meanwhile.append(self.fileno() >= 0)

    async def main():
        nonlocal near
        one, far = tcp_pair()
        with far, open(tmp_path / "file", "rb") as file:
            near = Socket(Raw(fileno=one.detach()))
            with pytest.raises(flowcoro.ClosedError):
                await near.send_file(file, 0, flowcoro_net.CORKED_FROM, head=b"head")
        assert open_meanwhile == [True] and near.raw.fileno() == -1

    near = None
    run(main, workers=2)


@pytest.mark.skipif(not hasattr(socket, "TCP_CORK"), reason="Linux has TCP_CORK")
def test_a_head_that_is_cancelled_leaves_no_cork_and_no_descriptor(tmp_path):
    (tmp_path / "file").write_bytes(bytes(flowcoro_net.CORKED_FROM))

    async def main():
        one, far = tcp_pair()
        with far, open(tmp_path / "file", "rb") as file:
            async with Socket(one) as near, flowcoro.TaskGroup() as group:
                descriptors, scope = os.listdir("/proc/self/fd"), flowcoro.CancelScope()
                sending = await settled(group, in_scope(scope, near.send_file(file, 0, flowcoro_net.CORKED_FROM,
                                                                              head=bytes(2**24))))
                assert not sending.done() and is_corked(near)
                scope.cancel()
                assert await sending is None
                assert not is_corked(near) and os.listdir("/proc/self/fd") == descriptors

    run(main)


def test_what_sendfile_refuses_once_it_has_sent_some_is_not_sent_again(pair, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")
    real_sendfile = os.sendfile

    def sendfile(out, number, offset, count):
        if offset:
            raise OSError(errno.EINVAL, "no more")
        return real_sendfile(out, number, offset, 3)

    async def main():
        near, far = pair()
        monkeypatch.setattr(os, "sendfile", sendfile)
        with open(tmp_path / "file", "rb") as file:
            async with near:
                with pytest.raises(OSError, match="no more"):
                    await near.send_file(file, head=b"head, ")
        assert drain(far) == b"head, con"

    run(main)


async def in_scope(scope, coro):
    """What it returns; None if the scope is cancelled, the class of BrokenError."""
    with scope:
        try:
            return await coro
        except BrokenError as error:
            return type(error)


def test_send_file_refuses_nonsense_and_files_of_text(pair, tmp_path):
    (tmp_path / "file").write_text("text")

    async def main():
        near, _ = pair()
        async with near:
            with pytest.raises(ValueError):
                await near.send_file(io.BytesIO(b"x"), -1)
            with pytest.raises(TypeError):
                await near.send_file(io.BytesIO(b"x"), 0, 1.5)
            with pytest.raises(TypeError, match="encode"):
                await near.send_file(io.StringIO("text"))
            with pytest.raises(TypeError, match=r"send_file\(head=\) takes bytes .*, got 'text'"):
                await near.send_file(io.BytesIO(b"x"), head="text")
            with pytest.raises(TypeError, match="send_file.'path'.: give a file opened for reading in binary"):
                await near.send_file("path")
            with open(tmp_path / "file", "rb") as file, pytest.raises(ValueError, match="closed file"):
                file.close()
                await near.send_file(file)

    run(main)


def test_a_file_that_is_closed_meanwhile_is_sent_whole_and_no_other_in_its_place(pair, tmp_path):
    content = os.urandom(16 << 20)
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "other").write_bytes(bytes(32 << 20))

    async def main():
        near, far = pair()
        async with near, flowcoro.TaskGroup() as group:
            file = open(tmp_path / "file", "rb")
            sending = await settled(group, near.send_file(file))
            assert not sending.done()
            number = file.fileno()
            file.close()
            with open(tmp_path / "other", "rb") as other:
                assert other.fileno() == number
                reading = group.spawn(flowcoro.to_thread(drain, far))
                assert await sending == len(content)
                await near.shutdown_write()
                assert await reading == content

    run(main)


def test_of_a_file_that_decompresses_the_content_is_sent(pair, tmp_path):
    with gzip.open(tmp_path / "file.gz", "wb") as file:
        file.write(b"content " * 1000)

    async def main():
        near, far = pair()
        with gzip.open(tmp_path / "file.gz", "rb") as file:
            async with near:
                assert await near.send_file(file, 8, 16) == 16
        assert drain(far) == b"content content "

    run(main)


def test_no_more_is_sent_than_was_asked_for_though_a_file_gives_more(pair):
    class Generous(io.BytesIO):
        def read(self, count):
            return super().read(count + 5)

    async def main():
        near, far = pair()
        async with near:
            assert await near.send_file(Generous(b"0123456789" * 10), 0, 10) == 10
        assert drain(far) == b"0123456789"

    run(main)


def test_a_file_is_sent_also_when_no_descriptors_are_left(pair, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"content")

    def none_left(number):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def main():
        near, far = pair()
        with open(tmp_path / "file", "rb") as file:
            async with near:
                monkeypatch.setattr(os, "dup", none_left)
                assert await near.send_file(file) == 7
                with pytest.raises(OSError, match="cannot read <_io.BufferedReader.* at offset=4611686018427387904: Invalid"):
                    await near.send_file(file, 2**62)
        assert drain(far) == b"content"

    run(main)


def test_a_pipe_is_no_file_to_send_and_the_connection_goes_on(pair):
    async def main():
        near, far = pair()
        source, sink = os.pipe()
        with open(source, "rb") as pipe, open(sink, "wb"):
            async with near:
                with pytest.raises(OSError) as caught:
                    await near.send_file(pipe)
                assert not isinstance(caught.value, BrokenError)
                await near.write(b"still there")
                assert far.recv(100) == b"still there"
                far.close()
                assert await near.read() == b""

    run(main)


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM, errno.EIO])
def test_an_error_that_says_nothing_of_the_peer_does_not_end_the_connection(pair, number, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"content")

    def fails(*args):
        raise OSError(number, os.strerror(number))

    async def main():
        near, far = pair()
        async with near:
            send, receive = near._send, near._recv
            near._send = near._recv = fails
            monkeypatch.setattr(os, "sendfile", fails)
            with open(tmp_path / "file", "rb") as file:
                for operation in near.write(b"x"), near.read(), near.read_exactly(1), near.send_file(file):
                    with pytest.raises(OSError, match=f"<Socket.*: {os.strerror(number)}") as caught:
                        await operation
                    assert caught.value.errno == number and not isinstance(caught.value, BrokenError)
            near._send, near._recv = send, receive
            await near.write(b"x")
            assert far.recv(1) == b"x"
            far.sendall(b"last")
            far.close()
            assert await near.read() == b"last"
            assert await near.read() == b""

    run(main)


def test_many_pieces_are_taken_as_they_are_sent_and_let_the_other_tasks_run(pair):
    taken = []

    def pieces():
        for number in range(300_000):
            taken.append(number)
            yield b"x"

    async def main():
        near, far = pair()
        async with near, flowcoro.TaskGroup() as group:
            reading = group.spawn(flowcoro.to_thread(drain, far))
            seen = []

            async def other():
                while not seen or len(taken) < 300_000:
                    seen.append(len(taken))
                    await flowcoro.checkpoint()

            group.spawn(other())
            await near.write_many(pieces())
            await near.shutdown_write()
            assert len(await reading) == 300_000
            assert len([each for each in seen if 0 < each < 300_000]) > 1

    run(main)


# ---- ends ------------------------------------------------------------------------------------------------------

def test_after_shutdown_write_the_peer_sees_the_end_and_reading_goes_on(pair):
    async def main():
        near, far = pair()
        async with near:
            await near.write(b"question")
            await near.shutdown_write()
            await near.shutdown_write()
            assert drain(far) == b"question"
            far.sendall(b"answer")
            assert await near.read() == b"answer"
            for write in near.write(b"x"), near.write_many([b"x"]), near.send_file(io.BytesIO(b"x")):
                with pytest.raises(flowcoro.ClosedError, match="shut down here"):
                    await write
            far.close()
            assert await near.read() == b""

    run(main)


def test_a_peer_that_has_shut_its_writing_can_still_be_written_to(pair):
    async def main():
        near, far = pair()
        async with near:
            far.shutdown(socket.SHUT_WR)
            assert await near.read() == b""
            await near.write(b"still")
        assert drain(far) == b"still"

    run(main)


OPERATIONS = {
    "read": lambda sock: sock.read(),
    "read_exactly": lambda sock: sock.read_exactly(5),
    "read_until": lambda sock: sock.read_until(),
    "read_into": lambda sock: sock.read_into(bytearray(5)),
    "write": lambda sock: sock.write(b"x"),
    "write_many": lambda sock: sock.write_many([b"x"]),
    "send_file": lambda sock: sock.send_file(io.BytesIO(b"x")),
    "shutdown_write": lambda sock: sock.shutdown_write(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_after_close_each_operation_says_so(pair, name):
    async def main():
        near, _ = pair()
        await near.close()
        await near.close()
        near.close_nowait()
        assert near.closed and near.fileno() == -1
        with pytest.raises(flowcoro.ClosedError, match="has been closed here"):
            await OPERATIONS[name](near)

    run(main)


@pytest.mark.parametrize("name", ["read", "read_exactly", "read_until", "read_into"])
def test_close_wakes_who_reads(pair, name):
    async def main():
        near, far = pair()
        async with flowcoro.TaskGroup() as group:
            async def read():
                with pytest.raises(flowcoro.ClosedError, match="has been closed here"):
                    await OPERATIONS[name](near)

            reader = await settled(group, read())
            await near.close()
            await reader
        assert far.recv(10) == b""

    run(main)


@pytest.mark.parametrize("write", ["write", "write_many", "send_file"])
def test_close_wakes_who_writes(pair, write, tmp_path):
    path = tmp_path / "big"
    with open(path, "wb") as file:
        file.truncate(32 << 20)

    async def main():
        near, far = pair()
        async with flowcoro.TaskGroup() as group:
            async def work():
                with open(path, "rb") as file:
                    with pytest.raises(flowcoro.ClosedError, match="has been closed here"):
                        await {"write": lambda: near.write(bytes(32 << 20)),
                               "write_many": lambda: near.write_many([bytes(32 << 20)]),
                               "send_file": lambda: near.send_file(file)}[write]()

            writer = await settled(group, work())
            assert near.statistics()["writing"]
            near.close_nowait()
            await writer

    run(main)


def test_a_second_reader_and_a_second_writer_are_told_that_it_is_busy(pair):
    async def main():
        near, far = pair()
        async with near, flowcoro.TaskGroup() as group:
            reader = await settled(group, near.read())
            for name in "read", "read_exactly", "read_until", "read_into":
                with pytest.raises(flowcoro.BusyError, match="being read by .* already"):
                    await OPERATIONS[name](near)
            writer = await settled(group, near.write(bytes(32 << 20)))
            for name in "write", "write_many", "send_file", "shutdown_write":
                with pytest.raises(flowcoro.BusyError, match="being written by .* already"):
                    await OPERATIONS[name](near)
            assert not reader.done() and not writer.done()
            reader.cancel()
            writer.cancel()

    run(main)


def test_a_reader_that_is_woken_and_has_not_run_is_still_the_reader(pair):
    async def main():
        near, far = pair()
        async with near, flowcoro.TaskGroup() as group:
            reader = await settled(group, near.read())
            far.sendall(b"for the first")
            near._pollable.ready(1)
            with pytest.raises(flowcoro.BusyError):
                await near.read()
            assert await reader == b"for the first"

    run(main)


def test_a_writer_that_is_woken_and_has_not_run_is_still_the_writer(pair):
    async def main():
        near, far = pair()
        data = os.urandom(16 << 20)
        async with flowcoro.TaskGroup() as group:
            writer = await settled(group, near.write(data))
            first = b""
            far.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    first += far.recv(1 << 20)
            far.settimeout(PATIENCE)
            near._pollable.ready(2)
            with pytest.raises(flowcoro.BusyError, match="is being written by .*write.* already"):
                await near.write(b"in between")
            reader = group.spawn(flowcoro.to_thread(drain, far))
            await writer
            near.close_nowait()
            assert first + await reader == data

    run(main)


def test_a_reset_is_broken_and_stays_so():
    async def main():
        one, other = tcp_pair()
        async with Socket(one) as near:
            async with flowcoro.TaskGroup() as group:
                async def read():
                    with pytest.raises(BrokenError, match="lost while reading: Connection reset by peer") as caught:
                        await near.read()
                    assert caught.value.errno == errno.ECONNRESET
                    assert isinstance(caught.value, ConnectionError)

                await settled(group, read())
                reset(other)
            for name in "read", "read_exactly", "read_until", "read_into":
                with pytest.raises(BrokenError):        # and not an end: something may be missing
                    await OPERATIONS[name](near)
            with pytest.raises(BrokenError):
                await near.write(b"x")

    run(main)


def test_a_reset_in_the_middle_of_a_write_is_broken_and_no_signal():
    async def main():
        one, other = tcp_pair()
        async with Socket(one) as near, flowcoro.TaskGroup() as group:
            async def write():
                with pytest.raises(BrokenError, match="lost while writing") as caught:
                    await near.write(bytes(32 << 20))
                assert caught.value.errno in (errno.ECONNRESET, errno.EPIPE)

            writer = await settled(group, write())
            reset(other)
            await writer
            with pytest.raises(BrokenError):
                await near.write(b"x")

    run(main)


def test_a_reset_that_a_write_has_noticed_is_not_an_end_to_the_reader():
    async def main():
        one, other = tcp_pair()
        async with Socket(one) as near:
            other.sendall(b"before")
            reset(other)
            with pytest.raises(BrokenError):
                for _ in range(1000):
                    await near.write(b"x")
                    await flowcoro.sleep(0.001)
            with pytest.raises(BrokenError):
                while await near.read():
                    pass

    run(main)


def test_a_write_after_the_peer_has_closed_raises_and_sends_no_signal(pair, tmp_path):
    import signal
    (tmp_path / "file").write_bytes(b"z")
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)      # it would end the process
    try:
        async def main():
            near, far = pair()
            async with near:
                far.close()
                with pytest.raises(BrokenError, match="lost while writing") as caught:
                    for _ in range(1000):
                        await near.write(b"x")
                        await near.write_many([b"y"])
                        await flowcoro.sleep(0.001)
                with pytest.raises(BrokenError), open(tmp_path / "file", "rb") as file:
                    await near.send_file(file)
                assert caught.value.errno in (errno.EPIPE, errno.ECONNRESET)

        run(main)
    finally:
        signal.signal(signal.SIGPIPE, before)


def test_what_a_peer_has_sent_before_it_closed_is_read_also_after_a_write_has_failed():
    async def main():
        one, other = unix_pair()
        async with Socket(one) as near:
            other.sendall(b"last words")
            other.close()
            with pytest.raises(BrokenError) as caught:
                await near.write(b"x")
            assert caught.value.errno == errno.EPIPE
            assert await near.read() == b"last words" and await near.read() == b""

    run(main)


# ---- cancellation ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("read, rest", [
    ("read", b""), ("read_exactly", b"abc"), ("read_until", b"abc"), ("read_into", b"")])
def test_a_cancelled_read_has_consumed_nothing(pair, read, rest):
    async def main():
        near, far = pair()
        async with near, flowcoro.TaskGroup() as group:
            far.sendall(rest) if rest else None
            reader = await settled(group, OPERATIONS[read](near))
            reader.cancel()
            await wait_all_tasks_parked()
            assert reader.cancelled()
            far.sendall(b"next")
            assert await near.read_exactly(len(rest) + 4) == rest + b"next"

    run(main)


def test_after_a_cancelled_write_a_known_part_was_sent_and_writing_goes_on(pair):
    async def main():
        near, far = pair()
        async with flowcoro.TaskGroup() as group:
            data = os.urandom(1 << 20) * 32
            writer = await settled(group, near.write(data))
            writer.cancel()
            await wait_all_tasks_parked()
            sent = near.statistics()["bytes_sent"]
            reader = group.spawn(flowcoro.to_thread(drain, far))
            async with near:
                await near.write(b"end")
            assert await reader == data[:sent] + b"end"

    run(main)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_a_checkpoint_even_if_it_need_not_wait(pair, name):
    async def main():
        near, far = pair()
        async with near:
            far.sendall(b"line\nand more")
            with flowcoro.CancelScope() as scope:
                scope.cancel()
                await OPERATIONS[name](near)
            assert scope.cancelled_caught
            assert near.statistics() == {"bytes_received": 0, "bytes_sent": 0, "bytes_buffered": 0, "reading": False,
                                         "writing": False, "tls": None}
            assert await near.read_until() == b"line\n"
            await near.write(b"x")
            assert far.recv(1) == b"x"

    run(main)


@pytest.mark.parametrize("kind", ["write_many", "send_file"])
def test_of_a_long_write_that_is_cancelled_the_peer_has_the_beginning(pair, kind, tmp_path):
    content = os.urandom(16 << 20)
    (tmp_path / "file").write_bytes(content)

    async def main():
        near, far = pair()
        with open(tmp_path / "file", "rb") as file:
            async with near, flowcoro.TaskGroup() as group:
                writer = await settled(group, near.write_many([content[:999], content[999:]]) if kind == "write_many"
                                       else near.send_file(file))
                writer.cancel()
                with pytest.raises(flowcoro.TaskCancelled):
                    await writer
                sent = near.statistics()["bytes_sent"]
                assert 0 < sent < len(content)
                reading = group.spawn(flowcoro.to_thread(drain, far))
                await near.write(b"next")
                await near.shutdown_write()
                assert await reading == content[:sent] + b"next"

    run(main)


def test_a_close_that_is_cancelled_has_closed(pair):
    async def main():
        near, far = pair()
        with flowcoro.CancelScope() as scope:
            scope.cancel()
            await near.close()
        assert scope.cancelled_caught and near.closed
        assert far.recv(1) == b""

    run(main)


def test_a_busy_connection_lets_the_other_tasks_run(pair):
    async def main():
        near, far = pair()
        steps = []
        async with near, flowcoro.TaskGroup() as group:
            async def other():
                steps.append(1)

            far.sendall(bytes(10_000))
            group.spawn(other())
            for _ in range(1000):
                await near.read(1)
                if steps:
                    break
            assert steps

    run(main)


@pytest.mark.parametrize("read", [lambda sock: sock.read_exactly(200 * flowcoro_net.CHUNK),
                                  lambda sock: sock.read_until(b"end", limit=201 * flowcoro_net.CHUNK)], ids=["exactly", "until"])
def test_a_long_read_from_a_peer_that_is_faster_lets_the_other_tasks_run(pair, read, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "LARGEST_CHUNK", flowcoro_net.CHUNK)

    async def main():
        near, far = pair()
        async with near, flowcoro.TaskGroup() as group:
            receives = [0]

            def receive(max_bytes):
                receives[0] += 1
                return b"x" * max_bytes if receives[0] < 200 else b"x" * (max_bytes - 3) + b"end"

            near._recv = receive                # there always is more, as much as asked for
            seen = []

            async def other():
                seen.append(receives[0])

            group.spawn(other())
            await read(near)
            assert seen and seen[0] < 150

    run(main)


# ---- a socket, and what it says of itself ----------------------------------------------------------------------

def test_a_socket_knows_its_ends_also_once_it_is_closed():
    async def main():
        one, other = tcp_pair()
        names = one.getsockname(), one.getpeername()
        with other:
            async with Socket(one) as near:
                assert (near.local, near.peer) == names
                assert near.raw is one and near.fileno() == one.fileno()
                assert f"{names[0][0]}:{names[0][1]}" in repr(near) and f"{names[1][0]}:{names[1][1]}" in repr(near)
            assert (near.local, near.peer) == names
            assert "closed" in repr(near)

    run(main)


def test_statistics_count_bytes(pair):
    async def main():
        near, far = pair()
        async with near:
            await near.write(b"12345")
            far.sendall(b"123\n4567")
            await near.read_until()
            assert near.statistics() == {"bytes_received": 8, "bytes_sent": 5, "bytes_buffered": 4, "reading": False,
                                         "writing": False, "tls": None}

    run(main)


def test_a_socket_that_is_forgotten_warns_and_gives_its_number_back():
    async def main():
        one, other = tcp_pair()
        with other:
            near = Socket(one)
            with pytest.warns(ResourceWarning, match="unclosed <Socket"):
                del near, one
                gc.collect()
            assert flowcoro.statistics()["descriptors"] == 0
            assert other.recv(1) == b""

    run(main)


@pytest.mark.parametrize("kind", [Socket, flowcoro_net.UdpSocket])
def test_what_is_no_socket_is_refused(kind):
    async def main():
        with pytest.raises(TypeError, match=f"{kind.__name__}.5.: give a socket.socket"):
            kind(5)

    run(main)


def test_numbers_beyond_what_a_machine_has_are_refused_by_name(pair):
    async def main():
        near, _ = pair()
        async with near:
            for operation, name in ((near.read(2**70), "read"), (near.read_exactly(2**70), "read_exactly"),
                                    (near.send_file(io.BytesIO(b""), 2**70), "offset=")):
                with pytest.raises(ValueError, match=f"{name}.*must be {sys.maxsize} or less"):
                    await operation
            for wrong in b"abc", None, 5:
                with pytest.raises(TypeError, match="write_many.*give a list of bytes-like objects"):
                    await near.write_many(wrong)
        with pytest.raises(ValueError, match="backlog=.*must be 2147483647 or less"):
            await TcpServer.listen("127.0.0.1", 0, backlog=2**31)

    run(main)


def test_a_socket_that_is_struck_while_it_is_made_closes_what_it_has(monkeypatch):
    async def main():
        one, other = tcp_pair()
        number = one.fileno()
        with monkeypatch.context() as patch:
            patch.setattr(flowcoro_net._Stream, "_call", lambda self, method: (_ for _ in ()).throw(ZeroDivisionError()))
            with pytest.warns(ResourceWarning, match="unclosed Socket"), pytest.raises(ZeroDivisionError):
                Socket(one)
                gc.collect()
        assert one.fileno() == -1 and flowcoro.statistics()["descriptors"] == 0
        other.close()
        one, other = tcp_pair()
        assert number in (one.fileno(), other.fileno())
        async with Socket(one), Socket(other):
            pass

    run(main)


def test_outside_a_kernel_there_is_no_socket():
    one, other = unix_pair()
    with one, other, pytest.raises(RuntimeError, match="no FlowCoro kernel"):
        Socket(one)


def test_thousands_of_connections_leave_nothing_behind():
    """FLOWCORO_CONNECTIONS=60000 is a thousand a second for a minute."""
    turns, connections = 6, int(os.environ.get("FLOWCORO_CONNECTIONS", 6000))

    async def main():
        async with await flowcoro_net.TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            async def echo(sock):
                await sock.write(await sock.read())

            group.spawn(server.serve(echo))

            async def client(count):
                for _ in range(count):
                    async with await Socket.connect(*server.local) as sock:
                        await sock.write(b"x")
                        assert await sock.read() == b"x"
                        assert await sock.read() == b""

            sizes = []
            for _ in range(turns):
                await flowcoro.when_all(*(client(connections // turns // 20) for _ in range(20)))
                while server.statistics()["connections"]:
                    await flowcoro.checkpoint()
                gc.collect()
                sizes.append((len(gc.get_objects()), open_descriptors(), sys.getallocatedblocks(), resident()))
            (objects, descriptors, blocks, pages), last = sizes[1], sizes[-1]
            assert last[1] == descriptors
            assert last[0] - objects < 50                   # for four times as many connections as in one turn
            assert last[2] - blocks < 500
            assert last[3] - pages < 2**20
            assert server.statistics()["accepted"] == connections // turns // 20 * 20 * turns
            server.close()

    run(main)


def resident():
    """Bytes of this process in memory; 0 where nobody says."""
    if not os.path.exists("/proc/self/statm"):
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_nothing_is_left_to_the_garbage_collector():
    async def one_connection(server):
        async with await Socket.connect(*server.local) as near, await server.accept() as far:
            await near.write(b"line\nand")
            assert await far.read_until() == b"line\n"
            with flowcoro.move_on_after(0):
                await near.read()
            reset(far.raw)
            far.close_nowait()
            for _ in range(2):
                with pytest.raises(BrokenError):
                    await near.read()

    async def one_refused(port):
        with pytest.raises(BrokenError):
            await Socket.connect("127.0.0.1", port)

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server:
            await one_connection(server)
            unused = server.local[1]
            gc.collect()
            gc.disable()
            before = len(gc.get_objects())
            for _ in range(20):
                await one_connection(server)
            found = [each for each in gc.get_objects() if isinstance(each, (Socket, OSError))]
            assert found == [] and len(gc.get_objects()) < before + 100
        for _ in range(20):
            await one_refused(unused)
        assert [each for each in gc.get_objects() if isinstance(each, OSError)] == []

    try:
        run(main)
    finally:
        gc.enable()


def test_a_length_that_python_refuses_does_not_keep_later_reads_waiting():
    async def main():
        one, other = tcp_pair()
        async with Socket(one) as near:
            other.sendall(b"hello")
            for _ in range(3):
                with pytest.raises(ValueError):
                    await near.read(2**63)
            assert await near.read(10) == b"hello"
        other.close()

    run(main)


@run_in_kernel
async def test_write_nowait_takes_what_there_is_room_for():
    one, other = memory_socket_pair(Socket, capacity=10)
    async with one, other:
        assert one.write_nowait(b"12345678") == 8 and one.write_nowait(memoryview(b"abcdef")) == 2 and one.write_nowait(b"x") == 0
        assert await other.read() == b"12345678ab"
        await flowcoro.sleep(0)
        async with flowcoro.TaskGroup() as group:
            group.spawn(one.write(b"y" * 20))
            await wait_all_tasks_parked()
            assert one.write_nowait(b"z") == 0          # another task is at it
            assert await other.read_exactly(20) == b"y" * 20
        for wrong in ("text", 7):
            with pytest.raises(TypeError):
                one.write_nowait(wrong)
        await one.close()
        with pytest.raises(flowcoro.ClosedError):
            one.write_nowait(b"late")
