"""Readiness of real descriptors: Pollable, wait_readable, wait_writable, notify_closing, and the descriptors of run().

Every test runs twice: with epoll, edge-triggered, and with poll, as on systems that have no edges.
"""

import errno
import os
import random
import resource
import selectors
import socket
import struct
import threading

import pytest

import flowcoro

# Seconds after which a wait that should have ended counts as hanging: only a failing test takes so long.
PATIENCE = 30.0

# A kernel that does not spin looks a few times while it waits some milliseconds; one that does looks thousands of times.
FEW = 40


@pytest.fixture(autouse=True, params=["edge", "level"])
def trigger(request, monkeypatch):
    if request.param == "level":
        monkeypatch.setattr(flowcoro, "_new_poller", lambda: flowcoro._LevelPoller(selectors.PollSelector()))
    elif not hasattr(selectors, "EpollSelector"):
        pytest.skip("this system has no epoll")
    return request.param


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def open_descriptors():
    return {fd for fd in map(int, os.listdir("/dev/fd")) if is_open(fd)}


@pytest.fixture(autouse=True)
def no_descriptor_is_left():
    before = open_descriptors()
    yield
    assert open_descriptors() == before


class Descriptors:
    """Makes non-blocking ones, and closes at the end what is still open."""

    def __init__(self):
        self.made = []

    def pipe(self):
        ends = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.made += ends
        return ends

    def full_pipe(self):
        read, write = self.pipe()
        fill(write)
        return read, write

    def pair(self):
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(False)
        self.made += ends
        return ends

    def tcp_pair(self):
        """A connection that can be reset."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            near = socket.create_connection(server.getsockname())
            far, _ = server.accept()
        for end in (near, far):
            end.setblocking(False)
        self.made += [near, far]
        return near, far

    def dup(self, fd):
        self.made.append(os.dup(fd))
        return self.made[-1]

    def close(self):
        for thing in self.made:
            if isinstance(thing, socket.socket):
                thing.close()
        for fd in {thing for thing in self.made if isinstance(thing, int)}:
            if is_open(fd):
                os.close(fd)


@pytest.fixture
def fds(no_descriptor_is_left):
    descriptors = Descriptors()
    yield descriptors
    descriptors.close()


def fill(fd):
    try:
        while True:
            os.write(fd, bytes(65536))
    except BlockingIOError:
        pass


def drain(fd):
    try:
        while os.read(fd, 65536):
            pass
    except BlockingIOError:
        pass


def reset(sock):
    """Close it so that the peer gets ECONNRESET."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def run(function, *args, **options):
    async def main():
        with flowcoro.timeout(PATIENCE):
            return await function(*args)

    return flowcoro.run(main(), **options)


async def look(times=2):
    """Let everybody run, and the kernel look at the descriptors: what is to be reported by now has been."""
    for _ in range(times):
        await flowcoro.sleep(1e-4)


async def polls_while_nothing_happens():
    await look()
    before = flowcoro.statistics()["polls"]
    await flowcoro.sleep(0.02)
    return flowcoro.statistics()["polls"] - before


class Waiter:
    """A task in a wait, and what became of it."""

    def __init__(self, group, wait, *args):
        self.outcome = "waiting"
        self.task = group.spawn(self.work(wait, *args))

    async def work(self, wait, *args):
        try:
            self.outcome = "cancelled"          # unless something else comes
            await wait(*args)
            self.outcome = "woken"
        except Exception as error:
            self.outcome = error

    @property
    def waits(self):
        return not self.task.done()


async def settled(wait, *args):
    """A Waiter that has come to wait, or not, in a task of the run."""
    waiter = Waiter(flowcoro, wait, *args)
    await look()
    return waiter


# ---- wait_readable and wait_writable -----------------------------------------------------------------------

def test_wait_readable_returns_when_something_can_be_read(fds):
    async def main():
        read, write = fds.pipe()
        waiter = await settled(flowcoro.wait_readable, read)
        assert waiter.waits
        os.write(write, b"x")
        await waiter.task
        assert waiter.outcome == "woken"
        return os.read(read, 10)

    assert run(main) == b"x"


def test_wait_readable_returns_at_once_when_something_is_there_already(fds):
    async def main():
        read, write = fds.pipe()
        os.write(write, b"x")
        for _ in range(3):                      # it consumes nothing
            await flowcoro.wait_readable(read)
        assert os.read(read, 10) == b"x"
        assert (await settled(flowcoro.wait_readable, read)).waits

    run(main)


def test_wait_readable_returns_at_the_end_of_the_stream(fds):
    async def main():
        read, write = fds.pipe()
        waiter = await settled(flowcoro.wait_readable, read)
        os.close(write)
        await waiter.task
        assert waiter.outcome == "woken"
        assert os.read(read, 10) == b""
        await flowcoro.wait_readable(read)      # and again: the end does not go away

    run(main)


def test_wait_writable_returns_when_there_is_room(fds):
    async def main():
        read, write = fds.full_pipe()
        waiter = await settled(flowcoro.wait_writable, write)
        assert waiter.waits
        drain(read)
        await waiter.task
        assert waiter.outcome == "woken"
        assert os.write(write, b"x") == 1

    run(main)


def test_wait_writable_returns_when_the_reader_has_gone(fds):
    async def main():
        read, write = fds.full_pipe()
        waiter = await settled(flowcoro.wait_writable, write)
        os.close(read)
        await waiter.task
        assert waiter.outcome == "woken"
        with pytest.raises(BrokenPipeError):
            os.write(write, b"x")

    run(main)


def test_a_reset_wakes_the_reader_and_the_writer(fds):
    async def main():
        near, far = fds.tcp_pair()
        fill(near.fileno())
        reader = await settled(flowcoro.wait_readable, near)
        writer = await settled(flowcoro.wait_writable, near)
        assert reader.waits and writer.waits
        reset(far)
        await reader.task
        await writer.task
        assert reader.outcome == writer.outcome == "woken"
        with pytest.raises(ConnectionResetError):
            near.recv(10)
        await flowcoro.wait_readable(near)      # broken stays readable and writable
        await flowcoro.wait_writable(near)

    run(main)


def test_the_peers_half_close_wakes_the_reader_but_not_a_writer_without_room(fds):
    async def main():
        near, far = fds.tcp_pair()
        fill(near.fileno())
        reader = await settled(flowcoro.wait_readable, near)
        writer = await settled(flowcoro.wait_writable, near)
        far.shutdown(socket.SHUT_WR)
        await reader.task
        await look()
        assert near.recv(10) == b""
        assert writer.waits

    run(main)


def test_both_directions_of_one_descriptor_are_waited_for_by_two_tasks(fds):
    async def main():
        near, far = fds.pair()
        fill(near.fileno())
        reader = await settled(flowcoro.wait_readable, near)
        writer = await settled(flowcoro.wait_writable, near)
        assert reader.waits and writer.waits
        far.send(b"x")
        await reader.task
        await look()
        assert writer.waits                     # data for the one is no room for the other
        drain(far.fileno())
        await writer.task
        assert writer.outcome == "woken"

    run(main)


def test_a_listening_socket_is_readable_as_often_as_somebody_connects(fds):
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)
            for _ in range(3):
                waiter = await settled(flowcoro.wait_readable, server)
                assert waiter.waits
                with socket.create_connection(server.getsockname()):
                    await waiter.task
                    await flowcoro.wait_readable(server)        # it is not accepted yet
                    server.accept()[0].close()

    run(main)


def test_wait_writable_tells_when_a_connection_is_made_or_refused(fds):
    async def main():
        server = socket.create_server(("127.0.0.1", 0))
        address = server.getsockname()
        for expected in (0, errno.ECONNREFUSED):
            with socket.socket() as client:
                client.setblocking(False)
                code = client.connect_ex(address)
                if code == errno.EINPROGRESS:
                    await flowcoro.wait_writable(client)
                    code = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                assert code == expected
            server.close()

    run(main)


def test_a_write_by_another_thread_ends_the_kernels_sleep(fds):
    async def main():
        read, write = fds.pipe()
        timer = threading.Timer(0.01, os.write, (write, b"x"))
        timer.start()
        await flowcoro.wait_readable(read)
        timer.join()

    run(main)


def test_tasks_that_never_wait_do_not_keep_descriptors_from_being_looked_at(fds):
    async def spin(stop):
        while not stop:
            await flowcoro.checkpoint()

    async def main():
        read, write = fds.pipe()
        stop = []
        spinners = [flowcoro.spawn(spin(stop)) for _ in range(3)]
        os.write(write, b"x")
        await flowcoro.wait_readable(read)
        drain(read)
        waiter = Waiter(flowcoro, flowcoro.wait_readable, read)
        await flowcoro.checkpoint()
        os.write(write, b"x")
        await waiter.task
        stop.append(True)
        for spinner in spinners:
            await spinner

    run(main)


def test_many_descriptors_each_wake_their_own_task(fds):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4200 if hard == resource.RLIM_INFINITY else min(4200, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        pipes = [fds.pipe() for _ in range(min(2000, wanted // 2 - 100))]
        order, events = list(range(len(pipes))), []
        random.shuffle(order)

        async def read_one(index, seen):
            await flowcoro.wait_readable(pipes[index][0])
            assert os.read(pipes[index][0], 10) == str(index).encode()
            seen.append(index)

        class Events:
            def after_poll(self, count):
                events.append(count)

        async def main():
            seen = []
            async with flowcoro.TaskGroup() as group:
                for index in range(len(pipes)):
                    group.spawn(read_one(index, seen))
                await look()
                assert flowcoro.statistics()["io_waiting"] == len(pipes)
                flowcoro.add_hooks(Events())
                for index in order:
                    os.write(pipes[index][1], str(index).encode())
            assert sorted(seen) == sorted(order)
            assert max(events) >= len(pipes)                            # thousands come in one go
            for read, _ in pipes:
                flowcoro.notify_closing(read)
            assert flowcoro.statistics()["descriptors"] == 0

        run(main)
    finally:
        fds.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_bytes_through_many_pairs_arrive_whole_under_random_cancellation(fds):
    seed = random.randrange(1 << 30)
    luck = random.Random(seed)

    async def wait(function, sock):
        """Wait, sometimes giving up and waiting again."""
        while True:
            with flowcoro.move_on_after(0 if luck.random() < 0.2 else 1) as scope:
                await function(sock)
            if not scope.cancelled_caught:
                return

    async def send(sock, data):
        while data:
            try:
                data = data[sock.send(data[:luck.randrange(1, 50_000)]):]
            except BlockingIOError:
                await wait(flowcoro.wait_writable, sock)
        sock.shutdown(socket.SHUT_WR)

    async def receive(sock, size):
        received = bytearray()
        while True:
            try:
                data = sock.recv(luck.randrange(1, 50_000))
            except BlockingIOError:
                await wait(flowcoro.wait_readable, sock)
                continue
            if not data:
                break
            received += data
        assert len(received) == size, f"seed {seed}"
        return bytes(received)

    async def main():
        data = luck.randbytes(500_000)
        for _ in range(4):
            pairs = [fds.pair() for _ in range(8)]
            async with flowcoro.TaskGroup() as group:
                receivers = []
                for ends in pairs:              # both ways through each
                    for one, other in (ends, ends[::-1]):
                        group.spawn(send(one, data))
                        receivers.append(group.spawn(receive(other, len(data))))
            for task in receivers:
                assert task.result() == data, f"seed {seed}"
            for ends in pairs:
                for end in ends:
                    flowcoro.notify_closing(end)
                    end.close()
        assert flowcoro.statistics()["io_waiting"] == flowcoro.statistics()["descriptors"] == 0

    run(main)


# ---- cancellation ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wait", [flowcoro.wait_readable, flowcoro.wait_writable])
def test_a_cancelled_wait_leaves_the_descriptor_to_the_next(fds, wait):
    async def main():
        near, far = fds.pair()
        fill(near.fileno())
        first = await settled(wait, near)
        first.task.cancel()
        await look()
        assert first.outcome == "cancelled"
        assert flowcoro.statistics()["io_waiting"] == 0
        second = await settled(wait, near)
        assert second.waits                     # and is not told that the descriptor is busy
        drain(far.fileno())
        far.send(b"x")
        await second.task
        assert second.outcome == "woken"

    run(main)


def test_a_wait_times_out_and_can_be_repeated(fds):
    async def main():
        read, write = fds.pipe()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                with flowcoro.timeout(1e-4):
                    await flowcoro.wait_readable(read)
        os.write(write, b"x")
        await flowcoro.wait_readable(read)

    run(main)


def test_in_a_cancelled_scope_a_wait_raises_even_if_the_descriptor_is_ready(fds):
    async def main():
        read, write = fds.pipe()
        os.write(write, b"x")
        with flowcoro.CancelScope() as scope:
            scope.cancel()
            await flowcoro.wait_readable(read)
        assert scope.cancelled_caught
        assert os.read(read, 10) == b"x"

    run(main)


def test_a_task_that_was_woken_and_then_cancelled_returns_from_its_wait(fds):
    async def wait(read, events):
        await flowcoro.wait_readable(read)
        events.append("returned")
        await flowcoro.checkpoint()
        events.append("never")

    async def main():
        read, write = fds.pipe()
        events = []
        task = flowcoro.spawn(wait(read, events))
        await look()
        flowcoro.notify_closing(read)           # wakes it with an error, which must not be lost either
        task.cancel()
        with pytest.raises(flowcoro.ClosedError):
            await task
        assert events == []

        class CancelAtOnce:
            def task_rescheduled(self, woken):
                if woken is task:
                    task.cancel()

        task = flowcoro.spawn(wait(read, events))
        await look()
        flowcoro.add_hooks(CancelAtOnce())
        os.write(write, b"x")
        with pytest.raises(flowcoro.TaskCancelled):
            await task
        return events

    assert run(main) == ["returned"]


# ---- mistakes ----------------------------------------------------------------------------------------------

WAITS = [flowcoro.wait_readable, flowcoro.wait_writable]


@pytest.mark.parametrize("wait", WAITS)
def test_the_same_direction_waited_for_twice_is_an_error_for_the_second(fds, wait):
    async def main():
        near, far = fds.pair()
        fill(near.fileno())
        first = await settled(wait, near)
        first.task.name = "the first"
        with pytest.raises(flowcoro.BusyError, match="the first"):
            await wait(near.fileno())
        assert flowcoro.statistics()["io_waiting"] == 1
        drain(far.fileno())
        far.send(b"x")
        await first.task
        assert first.outcome == "woken"         # the second did not harm it
        await wait(near)                        # and now it is free

    run(main)


@pytest.mark.parametrize("wait", [*WAITS, flowcoro.Pollable])
@pytest.mark.parametrize("fd", [-1, -7, None, "3", 3.0, b"3", 2**31, 2**40, object()], ids=repr)
def test_what_is_no_descriptor_is_refused(wait, fd):
    async def main():
        with pytest.raises((ValueError, TypeError, OSError)):
            result = wait(fd)
            if wait is not flowcoro.Pollable:
                await result
        assert flowcoro.statistics()["descriptors"] == flowcoro.statistics()["io_waiting"] == 0

    run(main)


@pytest.mark.parametrize("wait", [*WAITS, flowcoro.Pollable, flowcoro.notify_closing])
def test_a_closed_object_is_refused(fds, wait):
    async def main():
        near, _ = fds.pair()
        near.close()
        with pytest.raises(ValueError):
            result = wait(near)
            if wait in WAITS:
                await result

    run(main)


@pytest.mark.parametrize("wait", WAITS)
def test_a_number_that_is_not_open_is_refused_and_can_be_waited_for_once_it_is(fds, wait):
    async def main():
        near, far = fds.pair()
        fd = fds.dup(0 if is_open(0) else near.fileno())
        os.close(fd)
        with pytest.raises(OSError) as caught:
            await wait(fd)
        assert caught.value.errno == errno.EBADF
        assert str(fd) in str(caught.value)
        with pytest.raises(OSError):
            flowcoro.Pollable(fd)
        os.dup2(near.fileno(), fd)
        far.send(b"x")
        await wait(fd)
        os.close(fd)
        with pytest.raises(OSError):            # it had been waited for: still no hang
            await wait(fd)
        assert flowcoro.statistics()["io_waiting"] == 0

    run(main)


@pytest.mark.parametrize("wait", WAITS)
def test_a_regular_file_is_always_ready_or_refused_with_advice(fds, wait, tmp_path, trigger):
    path = tmp_path / "file"
    path.write_text("text")

    async def main():
        with open(path, "r+") as file:
            if trigger == "edge":               # epoll cannot
                with pytest.raises(PermissionError, match=r"to_thread\(\)"):
                    await wait(file)
                with pytest.raises(PermissionError, match=r"to_thread\(\)"):
                    flowcoro.Pollable(file)
            else:
                await wait(file)
            assert flowcoro.statistics()["io_waiting"] == 0

    run(main)


def test_outside_a_kernel_there_is_nothing_to_wait_with(fds):
    read, _ = fds.pipe()
    for use in (flowcoro.Pollable, flowcoro.notify_closing):
        with pytest.raises(RuntimeError, match="no FlowCoro kernel"):
            use(read)


# ---- notify_closing ----------------------------------------------------------------------------------------

def test_notify_closing_ends_both_waits_with_an_error_of_their_own(fds):
    async def main():
        near, _ = fds.pair()
        fill(near.fileno())
        reader = await settled(flowcoro.wait_readable, near)
        writer = await settled(flowcoro.wait_writable, near)
        flowcoro.notify_closing(near)
        near.close()
        await look()
        for waiter in (reader, writer):
            assert isinstance(waiter.outcome, flowcoro.ClosedError)
        assert reader.outcome is not writer.outcome     # a traceback belongs to one task
        assert flowcoro.statistics()["io_waiting"] == flowcoro.statistics()["descriptors"] == 0

    run(main)


def test_notify_closing_is_harmless_twice_and_for_those_nobody_waits_for(fds):
    async def main():
        read, write = fds.pipe()
        flowcoro.notify_closing(read)
        waiter = await settled(flowcoro.wait_readable, read)
        flowcoro.notify_closing(read)
        flowcoro.notify_closing(read)
        os.close(read)
        flowcoro.notify_closing(read)           # late, but why not
        await look()
        assert isinstance(waiter.outcome, flowcoro.ClosedError)
        assert flowcoro.statistics()["descriptors"] == 0
        with pytest.raises(ValueError):
            flowcoro.notify_closing(-1)

    run(main)


def test_after_notify_closing_the_descriptor_can_be_waited_for_again(fds):
    async def main():
        read, write = fds.pipe()
        first = await settled(flowcoro.wait_readable, read)
        flowcoro.notify_closing(read)
        second = await settled(flowcoro.wait_readable, read)
        assert isinstance(first.outcome, flowcoro.ClosedError)
        assert second.waits
        os.write(write, b"x")
        await second.task
        assert second.outcome == "woken"

    run(main)


def test_descriptors_that_come_and_go_under_the_same_number_are_kept_apart(fds):
    async def main():
        numbers = set()
        for turn in range(200):
            near, far = fds.pair()
            numbers.add(near.fileno())
            waiter = Waiter(flowcoro, flowcoro.wait_readable, near)
            await flowcoro.checkpoint()
            if turn % 3 == 0:
                far.send(b"x")
                await waiter.task
                assert waiter.outcome == "woken"
            elif turn % 3 == 1:
                far.send(b"x")                  # ready, and closed before the kernel looks
            flowcoro.notify_closing(near)
            near.close()
            far.close()
            await flowcoro.checkpoint()
            await waiter.task
        assert len(numbers) < 10                # else this test shows nothing
        assert flowcoro.statistics()["io_waiting"] == flowcoro.statistics()["descriptors"] == 0

    run(main)


# ---- closed and reused behind the kernel's back ------------------------------------------------------------

def is_let_go(outcome):
    """Of a task whose descriptor has vanished: it goes on waiting, or is told. It was not told "ready"."""
    return outcome == "cancelled" or isinstance(outcome, (flowcoro.ClosedError, OSError))


@pytest.mark.parametrize("wait", WAITS)
def test_a_descriptor_closed_while_waited_for_neither_wakes_nor_spins(fds, wait):
    async def main():
        near, far = fds.pair()
        fill(near.fileno())
        waiter = await settled(wait, near)
        near.close()
        drain(far.fileno())
        assert await polls_while_nothing_happens() < FEW
        assert is_let_go(waiter.outcome)
        waiter.task.cancel()
        await look()
        assert flowcoro.statistics()["io_waiting"] == 0

    run(main)


def test_a_number_that_is_another_file_now_does_not_wake_who_waited_for_the_first(fds):
    async def main():
        old, old_write = fds.pipe()
        new, new_write = fds.pipe()
        waiter = await settled(flowcoro.wait_readable, old)
        os.dup2(new, old)
        os.write(new_write, b"for somebody else")
        assert await polls_while_nothing_happens() < FEW
        assert is_let_go(waiter.outcome)
        waiter.task.cancel()

    run(main)


def test_who_waits_for_the_new_file_is_woken_and_who_waited_for_the_old_one_is_told(fds):
    async def main():
        old, old_write = fds.pipe()
        new, new_write = fds.pipe()
        first = await settled(flowcoro.wait_readable, old)
        os.dup2(new, old)
        second = await settled(flowcoro.wait_readable, old)
        await look()
        assert isinstance(first.outcome, flowcoro.ClosedError)
        assert second.waits
        os.write(new_write, b"x")
        await second.task
        assert second.outcome == "woken"
        assert flowcoro.statistics()["io_waiting"] == 0

    run(main)


def test_a_number_that_is_another_file_now_wakes_neither_direction_of_the_first(fds):
    async def main():
        near, far = fds.pair()
        fill(near.fileno())
        fd = near.fileno()
        reader = await settled(flowcoro.wait_readable, fd)
        writer = await settled(flowcoro.wait_writable, fd)
        other, other_far = fds.pair()
        other_far.send(b"x")
        os.dup2(other.fileno(), fd)             # at once readable and writable
        third = await settled(flowcoro.wait_readable, fd)
        assert third.outcome == "woken"
        for waiter in (reader, writer):
            assert isinstance(waiter.outcome, flowcoro.ClosedError)

    run(main)


def test_a_closed_file_that_lives_on_in_a_duplicate_wakes_nobody_under_its_old_number(fds):
    """epoll goes on to report it, under a number that means something else now."""
    async def main():
        old, old_write = fds.pipe()
        new, new_write = fds.pipe()
        duplicate = fds.dup(old)
        waiter = await settled(flowcoro.wait_readable, old)
        os.dup2(new, old)
        os.write(new_write, b"x")
        os.write(old_write, b"x")
        assert await polls_while_nothing_happens() < FEW
        assert is_let_go(waiter.outcome)
        waiter.task.cancel()
        await flowcoro.wait_readable(old)       # the new file
        await flowcoro.wait_readable(duplicate)
        assert await polls_while_nothing_happens() < FEW

    run(main)


def test_a_number_that_becomes_its_first_file_again_does_not_wake_who_waits_for_the_second(fds):
    """epoll remembers the first file under that number as long as it has a duplicate."""
    async def main():
        one, one_write = fds.pipe()
        two, two_write = fds.pipe()
        slot = fds.dup(one)
        first = await settled(flowcoro.wait_readable, slot)
        os.dup2(two, slot)
        second = await settled(flowcoro.wait_readable, slot)
        assert isinstance(first.outcome, flowcoro.ClosedError)
        os.dup2(one, slot)
        os.write(one_write, b"x")
        assert await polls_while_nothing_happens() < FEW
        assert is_let_go(second.outcome)
        second.task.cancel()
        await flowcoro.wait_readable(slot)      # who asks now, asks for the first file

    run(main)


def test_a_closed_number_whose_file_lives_on_is_an_error_and_no_endless_event(fds):
    async def main():
        old, old_write = fds.pipe()
        duplicate = fds.dup(old)
        waiter = await settled(flowcoro.wait_readable, old)
        os.close(old)
        os.write(old_write, b"x")
        assert await polls_while_nothing_happens() < FEW
        assert is_let_go(waiter.outcome)
        for _ in range(3):
            os.write(old_write, b"x")
            await look()
        assert await polls_while_nothing_happens() < FEW
        waiter.task.cancel()
        await flowcoro.wait_readable(duplicate)

    run(main)


def test_a_late_error_does_not_hit_who_waits_for_the_successor(fds):
    """In one look at the descriptors a task is told that its own has gone, and another one reuses the number first."""
    async def main():
        old, old_write = fds.pipe()
        duplicate = fds.dup(old)
        other, other_write = fds.pipe()
        new, new_write = fds.pipe()

        async def succeed():
            await flowcoro.wait_readable(other)
            os.dup2(new, old)
            await flowcoro.wait_readable(old)

        successor = await settled(succeed)
        first = await settled(flowcoro.wait_readable, old)
        os.write(other_write, b"x")
        os.write(old_write, b"x")
        os.close(old)
        await look(3)
        assert is_let_go(first.outcome)
        assert successor.waits
        os.write(new_write, b"x")
        await successor.task
        assert successor.outcome == "woken"
        first.task.cancel()

    run(main)


def test_a_number_that_became_a_regular_file_is_treated_as_one(fds, tmp_path, trigger):
    path = tmp_path / "file"
    path.write_text("text")

    async def main():
        read, write = fds.pipe()
        os.write(write, b"x")
        await flowcoro.wait_readable(read)
        with open(path) as file:
            os.dup2(file.fileno(), read)
            for _ in range(2):
                if trigger == "edge":
                    with pytest.raises(PermissionError):
                        await flowcoro.wait_readable(read)
                else:
                    await flowcoro.wait_readable(read)
        os.dup2(write, read)
        await flowcoro.wait_writable(read)
        assert flowcoro.statistics()["io_waiting"] == 0

    run(main)


def test_random_closing_and_reusing_never_tells_a_task_of_another_tasks_file(fds):
    """Each task is told "ready" only when the file that it asked for has something to read."""
    seed = random.randrange(1 << 30)
    luck = random.Random(seed)

    async def main():
        slots = [fds.dup(0) if is_open(0) else fds.pipe()[0] for _ in range(4)]
        pipes = [fds.pipe() for _ in range(4)]
        place = {}                              # slot -> the pipe that stands there now
        slot_of = {}                            # task -> where it waits
        stood = {}                              # task -> what stood there at the moment in which it was woken
        told = []                               # for each task that was told "ready": whether it had asked for that file

        class Witness:
            def task_rescheduled(self, task):
                if task in slot_of:
                    stood[task] = os.fstat(slot_of[task]).st_ino

        flowcoro.add_hooks(Witness())

        def put(slot):
            place[slot] = luck.choice(pipes)
            os.dup2(place[slot][0], slot)

        async def wait(slot):
            task = flowcoro.current_task()
            slot_of[task] = slot
            asked = os.fstat(slot).st_ino
            try:
                await flowcoro.wait_readable(slot)
                told.append(stood[task] == asked)
            except (flowcoro.ClosedError, flowcoro.BusyError, OSError):
                pass

        for slot in slots:
            put(slot)
        async with flowcoro.TaskGroup() as group:
            for _ in range(400):
                chance = luck.random()
                if chance < 0.4:
                    group.spawn(wait(luck.choice(slots)))
                elif chance < 0.6:
                    put(luck.choice(slots))
                elif chance < 0.8:
                    os.write(luck.choice(pipes)[1], b"x")
                else:
                    drain(luck.choice(pipes)[0])
                if luck.random() < 0.5:
                    await look(1)
            group.cancel()
        assert False not in told, f"seed {seed}: told of a file that it had not asked for"
        assert len(told) > 10                   # else this test shows nothing
        assert flowcoro.statistics()["io_waiting"] == 0, f"seed {seed}"

    run(main)


# ---- spinning ----------------------------------------------------------------------------------------------

def test_a_ready_descriptor_that_nobody_waits_for_costs_nothing(fds):
    async def main():
        near, far = fds.tcp_pair()
        far.send(b"x")
        await flowcoro.wait_readable(near)      # from now on it is known to the kernel
        await flowcoro.wait_writable(near)
        assert await polls_while_nothing_happens() < FEW
        reset(far)
        assert await polls_while_nothing_happens() < FEW

    run(main)


def test_data_that_nobody_reads_does_not_disturb_who_waits_to_write(fds):
    async def main():
        near, far = fds.pair()
        fill(near.fileno())
        waiter = await settled(flowcoro.wait_writable, near)
        far.send(b"x")
        assert await polls_while_nothing_happens() < FEW
        assert waiter.waits
        flowcoro.notify_closing(near)

    run(main)


def test_two_numbers_of_one_file_are_two_places_to_wait(fds):
    async def main():
        read, write = fds.pipe()
        duplicate = fds.dup(read)
        first = await settled(flowcoro.wait_readable, read)
        second = await settled(flowcoro.wait_readable, duplicate)
        os.write(write, b"x")
        await first.task
        await second.task
        assert first.outcome == second.outcome == "woken"
        drain(read)
        assert await polls_while_nothing_happens() < FEW
        third = await settled(flowcoro.wait_readable, duplicate)
        assert third.waits
        flowcoro.notify_closing(read)
        os.close(read)
        os.write(write, b"x")
        await third.task
        assert third.outcome == "woken"

    run(main)


def test_a_selector_that_fails_on_closed_descriptors_does_not_end_the_run(fds, monkeypatch):
    """select(), the last resort of some systems, raises EBADF for all when one descriptor was closed."""
    monkeypatch.setattr(flowcoro, "_new_poller", lambda: flowcoro._LevelPoller(selectors.SelectSelector()))

    async def main():
        read, write = fds.pipe()
        other, other_write = fds.pipe()
        waiter = await settled(flowcoro.wait_readable, read)
        witness = await settled(flowcoro.wait_readable, other)
        os.close(read)
        assert await polls_while_nothing_happens() < FEW
        assert is_let_go(waiter.outcome)
        os.write(other_write, b"x")
        await witness.task
        assert witness.outcome == "woken"
        waiter.task.cancel()

    run(main)


# ---- Pollable ----------------------------------------------------------------------------------------------

async def read_all(pollable):
    """As a socket reads: try first, wait after EAGAIN."""
    received = b""
    while True:
        try:
            data = os.read(pollable.fd, 7)
        except BlockingIOError:
            pollable.readable = False
            await pollable.wait_readable()
            continue
        if not data:
            return received
        received += data


def test_a_pollable_is_taken_to_be_ready_until_the_operation_says_otherwise(fds):
    async def main():
        read, _ = fds.pipe()
        pollable = flowcoro.Pollable(read)
        assert (pollable.readable, pollable.writable, pollable.hangup) == (True, True, False)
        await pollable.wait_readable()
        await pollable.wait_writable()
        pollable.close()

    run(main)


def test_a_pollable_carries_a_stream_to_its_end(fds):
    async def main():
        read, write = fds.pipe()
        pollable = flowcoro.Pollable(read)
        reader = flowcoro.spawn(read_all(pollable))
        for piece in (b"abc", b"defghijklmnopq", b"r"):
            os.write(write, piece)
            await look()
        os.close(write)
        assert await reader == b"abcdefghijklmnopqr"
        pollable.close()

    run(main)


def test_an_edge_between_eagain_and_the_wait_is_not_lost(fds):
    async def main():
        near, far = fds.pair()
        pollable = flowcoro.Pollable(near)
        await look()
        for _ in range(3):
            with pytest.raises(BlockingIOError):
                near.recv(10)
            pollable.readable = False
            far.send(b"x")
            await look()                        # the kernel is told before anybody waits
            await pollable.wait_readable()
            assert near.recv(10) == b"x"
        pollable.close()

    run(main)


def test_a_pollable_wakes_its_reader_and_its_writer_each_in_their_time(fds):
    async def main():
        near, far = fds.pair()
        pollable = flowcoro.Pollable(near)
        fill(near.fileno())
        await look()                            # what was true at the start has been reported
        pollable.readable = pollable.writable = False
        reader = await settled(pollable.wait_readable)
        writer = await settled(pollable.wait_writable)
        assert reader.waits and writer.waits
        far.send(b"x")
        await reader.task
        assert pollable.readable
        drain(far.fileno())
        await writer.task
        assert pollable.writable
        pollable.close()

    run(main)


def test_a_pollable_tells_that_the_peer_has_hung_up(fds, trigger):
    async def main():
        near, far = fds.tcp_pair()
        pollable = flowcoro.Pollable(near)
        await look()
        assert not pollable.hangup
        pollable.readable = False
        far.send(b"last words")
        far.shutdown(socket.SHUT_WR)
        await pollable.wait_readable()
        await look()
        if trigger == "edge":                   # else a short read needs no such hint
            assert pollable.hangup
        pollable.close()

    run(main)


def test_a_pollable_is_waited_for_by_one_task_per_direction(fds):
    async def main():
        near, far = fds.pair()
        pollable = flowcoro.Pollable(near)
        fill(near.fileno())
        await look()
        pollable.readable = pollable.writable = False
        reader = await settled(pollable.wait_readable)
        writer = await settled(pollable.wait_writable)
        with pytest.raises(flowcoro.BusyError, match="read"):
            await pollable.wait_readable()
        with pytest.raises(flowcoro.BusyError, match="written"):
            await pollable.wait_writable()
        assert reader.waits and writer.waits
        pollable.close()

    run(main)


def test_a_descriptor_has_one_pollable(fds):
    async def main():
        read, write = fds.pipe()
        pollable = flowcoro.Pollable(read)
        with pytest.raises(flowcoro.BusyError, match="Pollable"):
            flowcoro.Pollable(read)
        with pytest.raises(flowcoro.BusyError, match="Pollable"):
            await flowcoro.wait_readable(read)
        await look()
        pollable.readable = False
        waiter = await settled(pollable.wait_readable)
        os.write(write, b"x")
        await waiter.task                       # the refusals have not harmed it
        pollable.close()
        flowcoro.Pollable(read).close()         # one after the other is fine
        await flowcoro.wait_readable(read)

    run(main)


def test_closing_a_pollable_ends_its_waits_and_all_later_ones(fds):
    async def main():
        near, far = fds.pair()
        pollable = flowcoro.Pollable(near)
        fill(near.fileno())
        await look()
        pollable.readable = pollable.writable = False
        reader = await settled(pollable.wait_readable)
        writer = await settled(pollable.wait_writable)
        pollable.close()
        pollable.close()
        await look()
        for waiter in (reader, writer):
            assert isinstance(waiter.outcome, flowcoro.ClosedError)
        assert reader.outcome is not writer.outcome
        pollable.readable = pollable.writable = True
        with pytest.raises(flowcoro.ClosedError):
            await pollable.wait_readable()
        with pytest.raises(flowcoro.ClosedError):
            await pollable.wait_writable()
        assert "closed" in repr(pollable)
        assert flowcoro.statistics()["io_waiting"] == flowcoro.statistics()["descriptors"] == 0

    run(main)


def test_a_pollable_closed_after_the_descriptor_does_no_harm(fds):
    async def main():
        read, write = fds.pipe()
        pollable = flowcoro.Pollable(read)
        os.close(read)
        pollable.close()
        fresh, fresh_write = fds.pipe()         # most likely the same number
        waiter = await settled(flowcoro.wait_readable, fresh)
        assert waiter.waits
        os.write(fresh_write, b"x")
        await waiter.task
        assert waiter.outcome == "woken"

    run(main)


def test_a_pollable_can_be_closed_after_its_run_has_ended(fds):
    async def main():
        read, _ = fds.pipe()
        return flowcoro.Pollable(read)

    pollable = run(main)
    pollable.close()
    pollable.close()


def test_a_pollable_is_cancelled_without_a_trace(fds):
    async def main():
        read, write = fds.pipe()
        pollable = flowcoro.Pollable(read)
        await look()
        for _ in range(3):
            pollable.readable = False
            with flowcoro.move_on_after(1e-4) as scope:
                await pollable.wait_readable()
            assert scope.cancelled_caught
            assert flowcoro.statistics()["io_waiting"] == 0
        os.write(write, b"x")
        await pollable.wait_readable()
        pollable.close()

    run(main)


def test_pollables_that_are_not_closed_end_with_their_run(fds):
    async def main():
        for _ in range(20):
            for fd in fds.pipe():
                flowcoro.Pollable(fd)
        return flowcoro.statistics()["descriptors"]

    assert run(main) == 40


def test_a_pollable_that_is_ready_costs_no_turn_but_is_a_point_of_cancellation(fds):
    async def main():
        read, _ = fds.pipe()
        pollable = flowcoro.Pollable(read)
        with flowcoro.CancelScope() as scope:
            scope.cancel()
            await pollable.wait_readable()
        assert scope.cancelled_caught
        pollable.close()

    run(main)


# ---- the descriptors of run() itself -----------------------------------------------------------------------

async def nothing():
    return "done"


def test_run_takes_descriptors_and_gives_all_back():
    before = open_descriptors()
    for _ in range(20):
        assert flowcoro.run(nothing()) == "done"
    assert open_descriptors() == before


def test_a_pollable_that_was_lost_with_its_file_does_not_keep_the_number_from_the_next():
    async def main():
        near, far = os.pipe()
        lost = flowcoro.Pollable(near)              # an error struck before its maker had it
        with pytest.raises(flowcoro.BusyError, match="has a Pollable already"):
            flowcoro.Pollable(near)
        lost.readable = False
        async with flowcoro.TaskGroup() as group:
            async def wait():
                with pytest.raises(flowcoro.ClosedError):
                    await lost.wait_readable()

            group.spawn(wait())
            await flowcoro.checkpoint()
            os.close(near)
            os.close(far)
            near, far = os.pipe()                   # the same numbers
            again = flowcoro.Pollable(near)
        assert flowcoro.statistics()["descriptors"] == 1
        os.write(far, b"x")
        again.readable = False
        with flowcoro.timeout(PATIENCE):
            await again.wait_readable()
        lost.close()
        assert flowcoro.statistics()["descriptors"] == 1
        again.close()
        os.close(near)
        os.close(far)

    flowcoro.run(main())


def test_a_descriptor_that_another_thread_closes_as_a_wait_begins_leaves_nothing_registered(monkeypatch):
    def closes(fd):
        os.close(fd)
        raise OSError(errno.EBADF, "closed by another thread")

    async def main():
        near, far = os.pipe()
        with monkeypatch.context() as patch, pytest.raises(OSError, match="closed by another thread"):
            patch.setattr(flowcoro, "_inode", closes)
            await flowcoro.wait_readable(near)
        os.close(far)
        near, far = os.pipe()                   # the same numbers
        os.write(far, b"x")
        with flowcoro.timeout(PATIENCE):
            await flowcoro.wait_readable(near)
        flowcoro.notify_closing(near)
        os.close(near)
        os.close(far)

    flowcoro.run(main())


@pytest.mark.parametrize("spare", range(4))
def test_with_no_descriptor_left_run_raises_and_leaves_nothing_behind(fds, spare):
    """EMFILE, at each of the places where it can come."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(open_descriptors()) + 50
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    held = []
    try:
        with pytest.raises(OSError) as caught:
            while True:
                held.append(os.dup(0) if is_open(0) else os.pipe()[0])
        assert caught.value.errno == errno.EMFILE
        for _ in range(spare):
            os.close(held.pop())
        try:
            assert flowcoro.run(nothing()) == "done"
        except OSError as error:
            assert error.errno == errno.EMFILE and "three descriptors for each of its workers" in str(error)
            assert spare < 3
        coroutine = nothing()
        for fd in held:                         # nothing is left: as many descriptors are free as before
            assert is_open(fd)
        for _ in range(spare):
            held.append(os.dup(held[0]))
        with pytest.raises(OSError):
            os.dup(held[0])
        with pytest.raises(OSError):
            flowcoro.run(coroutine)
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert flowcoro.run(nothing()) == "done"    # and nothing is broken for good


def test_a_run_that_fails_to_start_leaves_no_descriptor(monkeypatch):
    class Broken(flowcoro._LevelPoller):
        def arm(self, pollable):
            raise OSError(errno.ENOSPC, "no watch left")

    monkeypatch.setattr(flowcoro, "_new_poller", lambda: Broken(selectors.DefaultSelector()))
    with pytest.raises(OSError, match="no watch left"):
        flowcoro.run(nothing())


def test_a_pollable_can_be_made_of_what_wait_readable_has_known_before(fds):
    async def main():
        read, write = fds.pipe()
        os.write(write, b"x")
        await flowcoro.wait_readable(read)
        pollable = flowcoro.Pollable(read)
        assert os.read(read, 1) == b"x"
        await look()
        pollable.readable = False
        waiter = await settled(pollable.wait_readable)
        os.write(write, b"y")
        await waiter.task
        pollable.close()
        await flowcoro.wait_readable(read)      # and back again
        assert flowcoro.statistics()["descriptors"] == 1

    run(main)


def test_a_pollable_cannot_be_made_of_what_wait_readable_waits_for(fds):
    async def main():
        read, write = fds.pipe()
        waiter = await settled(lambda: flowcoro.wait_readable(read))
        with pytest.raises(flowcoro.BusyError, match="waits for file descriptor .* before or after"):
            flowcoro.Pollable(read)
        os.write(write, b"x")
        await waiter.task

    run(main)


def test_a_pollable_can_be_made_where_a_task_waits_for_a_file_that_is_gone(fds):
    async def main():
        read, write = fds.pipe()
        waiter = await settled(lambda: flowcoro.wait_readable(read))
        other, _ = fds.pipe()
        os.dup2(other, read)                    # closed behind the kernel's back, and another file now
        pollable = flowcoro.Pollable(read)
        await waiter.task
        assert isinstance(waiter.outcome, flowcoro.ClosedError) and "another file now" in str(waiter.outcome)
        pollable.close()

    run(main)
