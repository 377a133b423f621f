"""Processes, signals and files of flowcoro_os.

Real processes, so the real clock wherever a deadline is involved; what is waited for is an event, never a time that
ought to be enough. Children that should outlast a test sleep for HANG seconds, and are killed by what is tested. Each
test ends with the descriptors it began with, and without a child.
"""

import io
import math
import os
import pathlib
import random
import re
import selectors
import signal
import subprocess
import sys
import threading
import time

import pytest

import flowcoro
import flowcoro_os
from conftest import parked
from flowcoro_os import (DEVNULL, PIPE, STDOUT, LimitError, ProcessError, ProcessFailed, open_process, run_process,
                         signals)
from flowcoro_testing import assert_checkpoints, run_in_kernel
from test_flowcoro_workers import pipe, spread, wait_until

PATIENCE = 60.0         # seconds until a wait that should have ended counts as hanging: only a failing test takes them
HANG = "1000"           # seconds that a child sleeps which has to be killed


class RealClock:
    """The machine's clock, in the shape that run_in_kernel takes."""

    now = staticmethod(time.monotonic)
    idle = staticmethod(lambda timeout: timeout)


on_real_clock = run_in_kernel(clock=RealClock, timeout=PATIENCE)


@pytest.fixture(params=[1, 4], autouse=True)
def workers(request, monkeypatch):
    """All of it with one worker and with several, which have the machine's clock in any case."""
    run = flowcoro.run
    if request.param > 1:
        monkeypatch.setattr(flowcoro, "_has_gil", lambda: False)        # so that they steal
        monkeypatch.setattr(flowcoro, "run", lambda coro, *, clock=None, seed=None, **options: run(
            coro, **{"workers": request.param, **options}))
    return request.param


SEVERAL = pytest.mark.parametrize("workers", [4], indirect=True)


def open_descriptors():
    return sorted(os.listdir("/proc/self/fd" if os.path.exists("/proc/self/fd") else "/dev/fd"))


def no_child_is_left():
    try:
        return os.waitpid(-1, os.WNOHANG) and False
    except ChildProcessError:
        return True


@pytest.fixture(autouse=True)
def nothing_is_left():
    before, handlers = open_descriptors(), {n: signal.getsignal(n) for n in signal.valid_signals()}
    yield
    assert open_descriptors() == before
    assert no_child_is_left()
    assert {n: signal.getsignal(n) for n in signal.valid_signals()} == handlers


@pytest.fixture(params=["pidfd", "no pidfd", "no pidfd, no waitid", "pidfd, no edges"])
def watched_by(request, monkeypatch):
    """How the end of a process is noticed: each of the ways, forced."""
    if "no pidfd" in request.param:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    elif not hasattr(os, "pidfd_open"):
        pytest.skip("this system has no pidfd")
    if "no waitid" in request.param:
        monkeypatch.delattr(os, "waitid", raising=False)
    if "no edges" in request.param:
        monkeypatch.setattr(flowcoro, "_new_poller", lambda: flowcoro._LevelPoller(selectors.PollSelector()))
    return request.param


def python(program):
    """The arguments that run a Python program: without site, which makes it start faster."""
    return [sys.executable, "-S", "-E", "-c", program]


STUBBORN = python("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
                  f"print('deaf', flush=True); time.sleep({HANG})")
# Waits for the signal instead of handling it: of a signal just before a sleep, the handler would hear only after it.
POLITE = python("import os, signal\n"
                "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
                "os.write(1, b'ready\\n'); signal.sigwait([signal.SIGTERM])\n"
                "os.write(1, b'bye'); os._exit(7)")


async def error_of(coro):
    """What the coroutine raises: returned, so that a group does not end because of it."""
    with pytest.raises(Exception) as caught:
        await coro
    return caught.value


def is_running(pid):
    """Whether there is such a process, zombies not counted. For children of children, which others reap."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def gone(pid):
    while is_running(pid):
        await flowcoro.sleep(0.005)


# ---- run_process ---------------------------------------------------------------------------------------------

@run_in_kernel
async def test_the_result_holds_arguments_status_and_both_outputs(watched_by):
    done = await run_process(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert isinstance(done, subprocess.CompletedProcess)
    assert (done.args[0], done.returncode, done.stdout, done.stderr) == ("sh", 3, b"out\n", b"err\n")


@run_in_kernel
async def test_input_goes_to_stdin_while_the_output_is_read():
    data = random.Random(1).randbytes(1_000_000)        # far more than two pipes hold
    assert (await run_process(["cat"], input=data)).stdout == data
    assert (await run_process(["cat"], input=bytearray(b"12"))).stdout == b"12"


@run_in_kernel
async def test_without_input_stdin_is_empty():
    assert (await run_process(["cat"])).stdout == b""
    assert (await run_process(["cat"], input=b"")).stdout == b""


@run_in_kernel
async def test_a_process_need_not_read_its_input():
    done = await run_process(["true"], input=bytes(1_000_000))
    assert done.returncode == 0
    done = await run_process(["sh", "-c", "exec <&-; echo closed"], input=bytes(1_000_000))
    assert done.stdout == b"closed\n"


@run_in_kernel
async def test_outputs_can_be_merged_dropped_inherited_or_sent_to_a_file(tmp_path, capfd):
    both = ["sh", "-c", "echo out; echo err >&2"]
    done = await run_process(both, stderr=STDOUT)
    assert (done.stdout, done.stderr) == (b"out\nerr\n", None)
    done = await run_process(both, stdout=DEVNULL)
    assert (done.stdout, done.stderr) == (None, b"err\n")
    with open(tmp_path / "out", "wb") as file:
        done = await run_process(both, stdout=file, capture_output=False)
    assert (done.stdout, done.stderr) == (None, None)
    assert (tmp_path / "out").read_bytes() == b"out\n"
    assert capfd.readouterr() == ("", "err\n")


@run_in_kernel
async def test_directory_and_environment_are_passed_on(tmp_path):
    done = await run_process(["sh", "-c", "pwd; echo $WORD"], cwd=tmp_path, env={"WORD": "hello", "PATH": os.defpath})
    assert done.stdout.decode().split() == [os.path.realpath(tmp_path), "hello"]


@run_in_kernel
async def test_a_string_is_for_the_shell_and_a_list_is_not():
    assert (await run_process("echo $((6 * 7)) | cat", shell=True)).stdout == b"42\n"
    assert (await run_process(["echo", "$HOME *"])).stdout == b"$HOME *\n"
    assert (await run_process([pathlib.Path("/bin/echo"), b"bytes"])).stdout == b"bytes\n"
    for args, options in (("ls -l", {}), (b"ls", {}), (pathlib.Path("ls"), {}), (["ls"], {"shell": True})):
        with pytest.raises(TypeError, match="give a list"):
            await run_process(args, **options)
    with pytest.raises(ValueError, match="first item"):
        await run_process([])


@run_in_kernel
async def test_check_raises_with_the_end_of_stderr():
    with pytest.raises(ProcessFailed, match="status 3.*\nno such user$") as caught:
        await run_process(["sh", "-c", "echo out; echo no such user >&2; exit 3"], check=True)
    error = caught.value
    assert isinstance(error, subprocess.CalledProcessError) and isinstance(error, flowcoro.FlowCoroError)
    assert (error.returncode, error.stdout, error.result.stdout) == (3, b"out\n", b"out\n")
    with pytest.raises(ProcessFailed, match="SIGKILL"):
        await run_process(["sh", "-c", "kill -9 $$"], check=True)
    assert (await run_process(["true"], check=True)).returncode == 0


@pytest.mark.parametrize("options, error", [
    ({"input": "text"}, TypeError), ({"input": b"", "stdin": DEVNULL}, ValueError), ({"limit": -1}, ValueError),
    ({"limit": math.nan}, ValueError), ({"drain": -1}, ValueError), ({"drain": math.nan}, ValueError),
    ({"timeout": -1}, ValueError), ({"grace": -1}, ValueError), ({"grace": math.nan}, ValueError),
    ({"stdout": STDOUT}, ValueError), ({"text": True}, TypeError), ({"encoding": "utf-8"}, TypeError),
    ({"nonsense": 1}, TypeError),
])
@run_in_kernel
async def test_wrong_arguments_are_refused_and_nothing_is_started(options, error):
    with pytest.raises(error):
        await run_process(["sleep", HANG], **options)


@run_in_kernel
async def test_what_cannot_be_executed_raises_and_leaves_nothing(tmp_path):
    (tmp_path / "plain").write_text("no program")
    for args, options, error, name in (
            (["/nonexistent/program"], {}, FileNotFoundError, "/nonexistent/program"),
            ([tmp_path / "plain"], {}, PermissionError, str(tmp_path / "plain")),
            (["true"], {"cwd": "/nonexistent"}, FileNotFoundError, "/nonexistent")):
        with pytest.raises(error) as caught:
            await run_process(args, **options)
        assert os.fspath(caught.value.filename) == name
        assert no_child_is_left()


@on_real_clock
async def test_a_timeout_stops_the_process(watched_by):
    with pytest.raises(TimeoutError):
        await run_process(["sleep", HANG], timeout=0.01)


@on_real_clock
async def test_a_gibibyte_is_refused_when_the_limit_is_passed_and_kept_to_the_last_byte_below():
    with pytest.raises(LimitError, match=r"limit=16777216 bytes to its stdout.*limit=.*open_process"):
        await run_process(["head", "-c", str(2**30), "/dev/zero"])
    with pytest.raises(LimitError, match="limit=9 bytes to its stderr"):
        await run_process(["sh", "-c", "echo 123456789 >&2; sleep " + HANG], limit=9, group=True)
    for limit in (10, math.inf):
        assert (await run_process(["echo", "123456789"], limit=limit)).stdout == b"123456789\n"
    assert (await run_process(["true"], limit=0)).stdout == b""


@on_real_clock
async def test_a_child_that_holds_the_pipes_is_an_error_that_names_the_remedy():
    with pytest.raises(ProcessError, match="group=True") as caught:
        await run_process(["sh", "-c", f"sleep {HANG} & echo $!"], drain=0.01)
    result = caught.value.result
    assert result.returncode == 0           # and nothing of the output is missing, however early the time was up
    os.kill(int(result.stdout), signal.SIGKILL)


@on_real_clock
async def test_one_that_writes_for_ever_into_the_pipes_does_not_keep_run_process(monkeypatch):
    def read_on(pipe):
        reads.append(pipe)
        assert len(reads) < 1000, "it reads for ever"
        try:
            return read(pipe)
        except flowcoro.WouldBlock:
            return b"x"

    reads, read = [], flowcoro_os.ReadPipe.read_nowait
    monkeypatch.setattr(flowcoro_os.ReadPipe, "read_nowait", read_on)
    with pytest.raises(ProcessError, match="group=True") as caught:
        await run_process(["sh", "-c", f"sleep {HANG} & echo $!"], drain=0.01, stderr=DEVNULL)
    output = caught.value.result.stdout
    assert len(reads) == 16                     # as many as find all that a pipe can hold
    os.kill(int(output.rstrip(b"x")), signal.SIGKILL)


@on_real_clock
async def test_with_no_time_to_drain_the_output_is_whole_all_the_same():
    data = bytes(200_000)
    assert (await run_process(["cat"], input=data, drain=0)).stdout == data


@on_real_clock
async def test_with_a_group_such_a_child_is_killed_when_the_process_ends():
    done = await run_process(["sh", "-c", f"sleep {HANG} & echo $!"], group=True)
    await gone(int(done.stdout))


@on_real_clock
async def test_a_child_that_holds_only_stdin_does_not_matter():
    program = f"exec 3<&0; sleep {HANG} <&3 >/dev/null 2>&1 & echo $!"
    done = await run_process(["sh", "-c", program], input=bytes(1_000_000), drain=math.inf)
    os.kill(int(done.stdout), signal.SIGKILL)


def test_many_processes_at_once():
    async def main():
        results = await flowcoro.when_all(*(run_process(["echo", str(n)]) for n in range(30)))
        assert [done.stdout for done in results] == [b"%d\n" % n for n in range(30)]

    flowcoro.run(main())


# ---- open_process --------------------------------------------------------------------------------------------

@run_in_kernel
async def test_pipes_are_streams_in_both_directions(watched_by):
    async with open_process(["cat"], stderr=PIPE) as process:
        assert process.returncode is None and "running" in repr(process)
        await process.stdin.write(b"one\ntwo\nrest")
        assert await process.stdout.read_until(b"\n") == b"one\n"
        process.stdin.close()
        assert [line async for line in process.stdout] == [b"two\n", b"rest"]
        assert await process.stdout.read() == b"" and await process.stderr.read_until(b"\n") == b""
        assert await process.wait() == 0 == await process.wait()
    assert process.returncode == 0 and "ended with 0" in repr(process)
    assert process.stdin.closed and process.stdout.closed and "closed" in repr(process.stdout)


@run_in_kernel
async def test_streams_that_were_not_asked_for_are_none():
    async with open_process(["true"], stdin=None, stdout=DEVNULL) as process:
        assert process.stdin is process.stdout is process.stderr is None


@run_in_kernel
async def test_reads_give_what_is_there_and_no_more_than_asked_for():
    async with open_process(["printf", "abcdef"]) as process:
        assert await process.stdout.read(4) == b"abcd"
        assert await process.stdout.read(100) == b"ef"
        with pytest.raises(ValueError):
            await process.stdout.read(0)
        with pytest.raises(ValueError):
            process.stdout.read_nowait(0)
        with pytest.raises(ValueError):
            await process.stdout.read_until(b"")


@run_in_kernel
async def test_read_nowait_never_waits():
    async with open_process(["cat"]) as process:
        with pytest.raises(flowcoro.WouldBlock):
            process.stdout.read_nowait()
        await process.stdin.write(b"abc")
        assert await process.stdout.read(1) == b"a"
        assert process.stdout.read_nowait() == b"bc"
        process.stdin.close()
        assert await process.stdout.read() == b"" == process.stdout.read_nowait()
    with pytest.raises(flowcoro.ClosedError):
        process.stdout.read_nowait()


@pytest.mark.parametrize("seed", range(8))
@run_in_kernel
async def test_lines_are_the_same_however_the_bytes_arrive(seed):
    chance = random.Random(seed)
    separator = chance.choice([b"\n", b"\r\n", b"aab"])
    data = bytes(chance.choice(b"ab\r\n") for _ in range(2000))
    expected = [piece + separator for piece in data.split(separator)]
    expected[-1] = expected[-1].removesuffix(separator)
    async with open_process(["cat"]) as process, flowcoro.TaskGroup() as group:
        async def write():
            rest = data
            while rest:
                size = chance.randint(1, 200)
                await process.stdin.write(rest[:size])
                rest = rest[size:]
                await flowcoro.checkpoint()
            process.stdin.close()

        group.spawn(write())
        found = []
        while piece := await process.stdout.read_until(separator):
            found.append(piece)
    assert found == [piece for piece in expected if piece]


@pytest.mark.parametrize("seed", range(8))
@on_real_clock
async def test_a_reader_that_is_cancelled_again_and_again_loses_nothing(seed):
    chance = random.Random(seed)
    data = b"".join(b"%d\n" % chance.randrange(10**9) for _ in range(300))
    got = bytearray()
    async with open_process(["cat"]) as process, flowcoro.TaskGroup() as group:
        async def write():
            await process.stdin.write(data)
            process.stdin.close()

        group.spawn(write())
        while True:
            with flowcoro.move_on_after(chance.choice([0, 0, 0.0001, 0.001])) as scope:
                piece = await (process.stdout.read(chance.randint(1, 50)) if chance.random() < 0.5
                               else process.stdout.read_until(b"\n"))
                got += piece
            if not scope.cancelled_caught and not piece:
                break
    assert got == data


@on_real_clock
async def test_a_separator_that_arrives_in_two_pieces_is_found():
    async with open_process(["cat"]) as process, flowcoro.TaskGroup() as group:
        reader = group.spawn(process.stdout.read_until(b"\r\n"))
        await process.stdin.write(b"x\r")
        while process.stdout._buffer != b"x\r":
            await flowcoro.sleep(0.001)
        await process.stdin.write(b"\ny")
        assert await reader == b"x\r\n"


@run_in_kernel
async def test_a_line_beyond_the_limit_is_an_error_and_can_still_be_read():
    async with open_process(["printf", "12345\n123456\n"], limit=6) as process:
        assert await process.stdout.read_until() == b"12345\n"
        with pytest.raises(LimitError, match="limit=6 bytes.*limit=.*read()"):
            await process.stdout.read_until()
        assert await process.stdout.read_until(limit=7) == b"123456\n"
    async with open_process(["printf", "123456"], limit=6) as process:
        assert await process.stdout.read_until() == b"123456"       # the end takes no room
    for limit in (0, -1, math.nan):
        with pytest.raises(ValueError, match="limit="):
            open_process(["true"], limit=limit)


@run_in_kernel
async def test_one_task_reads_and_one_writes():
    async with open_process(["sleep", HANG]) as process, flowcoro.TaskGroup() as group:
        reader, writer = await parked(group, process.stdout.read(), error_of(process.stdin.write(bytes(1_000_000))))
        with pytest.raises(flowcoro.BusyError, match="read by"):
            await process.stdout.read_until()
        with pytest.raises(flowcoro.BusyError, match="read by"):
            process.stdout.read_nowait()
        with pytest.raises(flowcoro.BusyError, match="written by"):
            await process.stdin.write(b"x")
        process.kill()
        error = await writer
        assert isinstance(error, BrokenPipeError) and "ended" in str(error)
        assert await reader == b""


@run_in_kernel
async def test_closing_a_pipe_ends_the_wait_for_it():
    async with open_process(["sleep", HANG]) as process, flowcoro.TaskGroup() as group:
        reader, = await parked(group, error_of(process.stdout.read()))
        process.stdout.close()
        process.stdout.close()
        assert isinstance(await reader, flowcoro.ClosedError)
        process.stdin.close()
        with pytest.raises(flowcoro.ClosedError):
            await process.stdin.write(b"x")
        process.kill()


def stream(verb, fd):
    return (flowcoro_os.ReadPipe(open(fd, "rb", buffering=0), "the pipe", 100) if verb == "read" else
            flowcoro_os.WritePipe(open(fd, "wb", buffering=0), "the pipe"))


@pytest.mark.parametrize("verb", ["read", "write"])
@run_in_kernel
async def test_a_pipe_closed_after_it_has_woken_a_task_and_before_its_turn_is_touched_no_more(verb):
    ends = os.pipe()
    mine, its = stream(verb, ends[verb == "write"]), ends[verb == "read"]
    number = mine.fileno()
    with pipe() as strangers:
        os.write(strangers[1], b"precious")
        async with flowcoro.TaskGroup(pinned=True) as group:        # it has its turn when this one awaits
            task, = await parked(group, error_of(mine.read() if verb == "read" else mine.write(bytes(200_000))))
            mine._pollable.ready(flowcoro.READ | flowcoro.WRITE)
            mine.close()
            os.dup2(strangers[verb == "write"], number)
        assert isinstance(task.result(), flowcoro.ClosedError)
        assert os.read(strangers[0], 100_000) == b"precious"
    os.close(number)
    os.close(its)


@SEVERAL
@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_pipe_is_not_closed_in_the_middle_of_a_transfer_on_another_worker(verb, guard, monkeypatch):
    def slow(fd, argument):
        if fd == number and not begun.is_set():
            guard.let_in(begun)
            assert not mine.closed
        return transfer(fd, argument)

    async def transfers():
        if verb == "read":
            assert await mine.read() == b"x"
        else:
            await mine.write(b"x")

    async def closes():
        wait_until(begun.is_set)
        mine.close()
        guard.told.set()

    async def main():
        nonlocal mine
        mine = stream(verb, number)
        monkeypatch.setattr(os, verb, slow)
        await spread(2, lambda index: (transfers, closes)[index]())

    near, far = os.pipe()
    os.write(far, b"x")
    number, its = (near, far) if verb == "read" else (far, near)
    mine, begun, transfer = None, threading.Event(), getattr(os, verb)
    flowcoro.run(main())
    assert begun.is_set() and mine.closed
    os.close(its)


@SEVERAL
def test_no_transfer_begins_in_the_middle_of_closing_a_pipe_on_another_worker(guard, monkeypatch):
    class File:
        """The pipe's file, whose close() takes its time."""

        def __init__(self, file):
            self.file = file

        closed = property(lambda self: self.file.closed)

        def close(self):
            if not begun.is_set():
                guard.let_in(begun)
                closed_in_transfer.append(in_transfer.is_set())
            self.file.close()

    def read(fd, count):
        if fd == near and begun.is_set():
            in_transfer.set()
            guard.told.set()
            wait_until(lambda: closed_in_transfer)
        return transfer(fd, count)

    async def main():
        async def reads():
            wait_until(begun.is_set)
            with pytest.raises(flowcoro.ClosedError):
                mine.read_nowait()

        async def closes():
            mine.close()

        mine = stream("read", near)
        mine._file = File(mine._file)
        monkeypatch.setattr(os, "read", read)
        await spread(2, lambda index: (closes, reads)[index]())

    near, far = os.pipe()
    os.write(far, b"x")
    begun, in_transfer, closed_in_transfer, transfer = threading.Event(), threading.Event(), [], os.read
    flowcoro.run(main())
    assert closed_in_transfer == [False]
    os.close(far)


@SEVERAL
def test_of_two_tasks_that_begin_to_read_at_once_on_two_workers_one_is_refused(guard):
    class Slow(flowcoro_os.ReadPipe):
        user = None

        @property
        def _user(self):
            return self.user

        @_user.setter
        def _user(self, task):                      # nobody has been there, and it is about to say that it is
            if task is not None:
                came.append(task)
                if len(came) == 1:
                    guard.let_in(begun)
                else:
                    guard.told.set()
            self.user = task

    async def main():
        async def first():
            return await mine.read()

        async def second():
            wait_until(begun.is_set)
            error = await error_of(mine.read())
            os.write(far, b"x")
            return error

        mine = Slow(open(near, "rb", buffering=0), "the pipe", 100)
        data, error = await spread(2, lambda index: (first, second)[index]())
        assert data == b"x" and isinstance(error, flowcoro.BusyError) and str(error).startswith("the pipe is being read by")
        mine.close()

    near, far = os.pipe()
    came, begun = [], threading.Event()
    flowcoro.run(main())
    os.close(far)


@SEVERAL
@pytest.mark.parametrize("group", [False, True])
def test_no_signal_goes_to_the_number_of_a_process_that_another_worker_has_just_reaped(group, guard, monkeypatch):
    def slow_reap(process):
        reaping.set()
        wait_until(begun.is_set)
        try:
            return reap(process)
        finally:
            guard.told.set()

    def slow_kill(pid, number):
        if number == 0:
            guard.let_in(begun)
            reaped.append(process._popen.returncode is not None)
        else:
            kill(pid, number)

    async def main():
        async def leaves():
            nonlocal process
            async with open_process(["true"], group=group) as process:
                pass

        async def signals():
            wait_until(reaping.is_set)
            process.send_signal(0)

        await spread(2, lambda index: (leaves, signals)[index]())
        process.send_signal(0)                      # nothing happens

    process, reaping, begun, reaped, reap = None, threading.Event(), threading.Event(), [], flowcoro_os.Process._reap
    name = "killpg" if group else "kill"
    kill = getattr(os, name)
    monkeypatch.setattr(flowcoro_os.Process, "_reap", slow_reap)
    monkeypatch.setattr(os, name, slow_kill)
    flowcoro.run(main())
    assert reaped == [False]


@on_real_clock
async def test_who_waits_for_a_process_that_is_reaped_meanwhile_gets_its_status(watched_by):
    async with flowcoro.TaskGroup() as group:
        with pytest.raises(LookupError):
            async with open_process(["sh", "-c", "read line; exit 3"]) as process:
                task, = await parked(group, process.wait())
                process.stdin.close()
                wait_until(lambda: process.returncode is not None)      # in this step, so that nobody hears of it
                raise LookupError
        assert await task == 3


@run_in_kernel
async def test_any_number_of_tasks_may_wait_and_be_cancelled(watched_by):
    async with open_process(["cat"]) as process, flowcoro.TaskGroup() as group:
        tasks = [group.spawn(process.wait()) for _ in range(5)]
        for _ in range(5):
            await flowcoro.checkpoint()
        tasks[0].cancel()
        tasks[3].cancel()
        await flowcoro.checkpoint()
        process.stdin.close()
        assert [await tasks[number] for number in (1, 2, 4)] == [0, 0, 0]


@run_in_kernel
async def test_wait_and_pipes_are_checkpoints_even_when_there_is_no_need_to_wait():
    async with open_process(["cat"]) as process:
        with assert_checkpoints():
            await process.stdin.write(b"one\ntwo\n")
        with assert_checkpoints():
            await process.stdout.read_until()
        with assert_checkpoints():
            await process.stdout.read()
        process.stdin.close()
        await process.wait()
        with assert_checkpoints():
            await process.wait()


@run_in_kernel
async def test_the_status_of_a_killed_process_is_minus_the_signal(watched_by):
    async with open_process(["sleep", HANG]) as process:
        process.send_signal(signal.SIGUSR1)
        assert await process.wait() == -signal.SIGUSR1
        process.kill()                      # it has ended: nothing happens
    process.kill()
    assert process.returncode == -signal.SIGUSR1


@run_in_kernel
async def test_the_end_of_the_block_closes_stdin_and_waits(watched_by):
    async with open_process(["sh", "-c", "cat >/dev/null; exit 5"]) as process:
        pass
    assert process.returncode == 5


@on_real_clock
async def test_at_the_end_of_the_block_a_process_whose_output_nobody_reads_does_not_hang():
    async with open_process(["yes"]) as process:
        pass
    assert process.returncode == -signal.SIGPIPE


@on_real_clock
async def test_an_error_in_the_block_ends_the_process_and_goes_on(watched_by):
    with pytest.raises(ZeroDivisionError):
        async with open_process(["sleep", HANG]) as process:
            1 / 0
    assert process.returncode == -signal.SIGTERM


@on_real_clock
async def test_a_cancelled_process_is_asked_first_and_may_clean_up(watched_by):
    with flowcoro.CancelScope() as scope:
        async with open_process(POLITE, grace=PATIENCE) as process:
            assert await process.stdout.read_until() == b"ready\n"
            scope.cancel()
            await flowcoro.checkpoint()
    assert scope.cancelled_caught and process.returncode == 7


@on_real_clock
async def test_one_that_does_not_listen_is_killed_after_the_grace(watched_by):
    with flowcoro.CancelScope() as scope:
        async with open_process(STUBBORN, grace=0.02) as process:
            assert await process.stdout.read_until() == b"deaf\n"
            scope.cancel()
            await flowcoro.checkpoint()
    assert scope.cancelled_caught and process.returncode == -signal.SIGKILL


@on_real_clock
async def test_a_stopped_process_is_killed_all_the_same():
    with flowcoro.CancelScope() as scope:
        async with open_process(["sleep", HANG], grace=0) as process:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)      # until it is: SIGTERM would be taken before
            scope.cancel()
            await flowcoro.checkpoint()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("option", ["group", "start_new_session"])
@on_real_clock
async def test_a_cancelled_group_is_killed_to_the_last_child(option):
    program = ["sh", "-c", f"trap '' TERM; sh -c 'trap \"\" TERM; echo $$; sleep {HANG}; :' & wait; sleep {HANG}"]
    with flowcoro.CancelScope() as scope:
        async with open_process(program, grace=0.02, **{option: True}) as process:
            assert os.getpgid(process.pid) == process.pid
            assert (os.getsid(process.pid) == process.pid) == (option == "start_new_session")
            child = int(await process.stdout.read_until())
            scope.cancel()
            await flowcoro.checkpoint()
    await gone(child)


@on_real_clock
async def test_what_a_group_leaves_behind_is_killed_at_the_end_of_the_block():
    async with open_process(["sh", "-c", f"sleep {HANG} >/dev/null 2>&1 & echo $!"], group=True) as process:
        child = int(await process.stdout.read_until())
        assert await process.wait() == 0
        assert is_running(child)            # inside the block it may still be of use
    await gone(child)


@run_in_kernel
async def test_the_number_of_an_ended_process_is_not_given_away_inside_the_block():
    async with open_process(["true"]) as process:
        await process.wait()
        assert os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT).si_pid == process.pid
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)


@run_in_kernel
async def test_a_process_cancelled_before_its_start_is_never_started(tmp_path):
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        async with open_process(["touch", tmp_path / "started"]):
            raise AssertionError("not reached")
    assert not (tmp_path / "started").exists()


@run_in_kernel
async def test_a_process_serves_one_block():
    process = open_process(["true"])
    assert process.returncode is None and "not started" in repr(process)
    process.kill()                          # nothing to kill
    async with process:
        with pytest.raises(RuntimeError, match="one `async with`"):
            await process.__aenter__()


class AtPark:
    """A hook that cancels a scope when a task parks for the n-th time."""

    def __init__(self, number, scope):
        self.left, self.scope = number, scope

    def task_parked(self, task, reason):
        self.left -= 1
        if self.left == 0:
            self.scope.cancel()


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("way", ["run", "open"])
@on_real_clock
async def test_cancelled_at_any_place_it_leaves_nothing(way, group, watched_by):
    async def use():
        if way == "run":
            await run_process(["sh", "-c", "cat; echo err >&2"], input=bytes(300_000), group=group)
            return
        async with open_process(["cat"], group=group) as process:
            await process.stdin.write(b"1\n")
            await process.stdout.read_until()
            await process.stdin.write(b"2\n3\n")
            process.stdin.close()
            async for _ in process.stdout:
                pass
            await process.wait()

    before = open_descriptors()
    for number in range(1, 200):
        with flowcoro.CancelScope() as scope:
            hook = AtPark(number, scope)
            flowcoro.add_hooks(hook)
            try:
                await use()
            finally:
                flowcoro.remove_hooks(hook)
        assert open_descriptors() == before and no_child_is_left()
        if hook.left > 0:
            break
    else:
        raise AssertionError("it never came through")


@pytest.mark.parametrize("shielded", [False, True])
@on_real_clock
async def test_cancelled_after_any_number_of_steps_it_leaves_nothing(shielded):
    async def cancel_after(steps, scope):
        for _ in range(steps):
            await flowcoro.checkpoint()
        scope.cancel()

    before = open_descriptors()
    for steps in range(40):
        async with flowcoro.TaskGroup() as group:
            with flowcoro.CancelScope() as scope:
                group.spawn(cancel_after(steps, scope))
                with flowcoro.CancelScope(shield=shielded):
                    done = await run_process(["sh", "-c", "cat; echo x >&2"], input=b"y", group=steps % 2)
                    assert (done.stdout, done.stderr) == (b"y", b"x\n")
        assert open_descriptors() == before and no_child_is_left()


@pytest.mark.parametrize("missing", range(1, 4))
@run_in_kernel
async def test_too_few_descriptors_at_any_point_leave_nothing(missing, monkeypatch):
    made, real = [], flowcoro.Pollable

    def pollable(fd):
        made.append(fd)
        if len(made) == missing:
            raise OSError(28, "no space left")
        return real(fd)

    monkeypatch.setattr(flowcoro, "Pollable", pollable)
    with pytest.raises(OSError, match="no space left"):
        async with open_process(["sleep", HANG]):
            raise AssertionError("not reached")
    assert no_child_is_left()


@on_real_clock
async def test_without_a_descriptor_for_the_pidfd_it_works_too(monkeypatch):
    def too_many(pid, flags=0):
        raise OSError(24, "too many open files")

    monkeypatch.setattr(os, "pidfd_open", too_many, raising=False)
    assert (await run_process(["echo", "hello"])).stdout == b"hello\n"


@on_real_clock
async def test_a_status_that_somebody_else_has_fetched_is_an_error_not_a_zero(watched_by):
    async with open_process(["true"], stdin=None) as process:
        os.waitpid(process.pid, 0)
        if "no waitid" in watched_by:           # subprocess itself takes it for 0 then
            assert await process.wait() == 0
            return
        with pytest.raises(ProcessError, match="exit status is lost"):
            await process.wait()
        assert process._popen.returncode is not None    # the number may be a stranger's by now: no signal is sent to it
        process.kill()
        assert "lost" in repr(process)
    with pytest.raises(ProcessError, match="exit status is lost"):
        process.returncode


@on_real_clock
async def test_where_sigchld_is_ignored_the_status_is_lost_but_nothing_hangs():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(ProcessError, match="SIGCHLD is ignored"):
            await run_process(["true"])
    finally:
        signal.signal(signal.SIGCHLD, before)


@on_real_clock
async def test_a_process_that_survives_sigkill_is_reported(monkeypatch):
    monkeypatch.setattr(flowcoro_os, "KILL_SECONDS", 0.01)
    monkeypatch.setattr(flowcoro_os, "BLOCKING_SECONDS", 0.01)
    process = open_process(["sleep", HANG], grace=0)
    with monkeypatch.context() as patched:
        patched.setattr(process, "send_signal", lambda number: None, raising=False)
        with pytest.raises(ProcessError, match="has not ended after SIGKILL") as caught:
            async with process:
                1 / 0
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    process.kill()
    process._popen.wait(PATIENCE)


@on_real_clock
async def test_one_of_another_user_cannot_be_signalled_but_may_end_by_itself(monkeypatch):
    def denied(pid, number):
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "kill", denied)
    with flowcoro.CancelScope() as scope:
        async with open_process(["cat"], grace=PATIENCE) as process:
            with pytest.raises(PermissionError):
                process.terminate()
            scope.cancel()
            await flowcoro.checkpoint()
    assert process.returncode == 0          # its stdin was closed


def test_a_second_ctrl_c_kills_at_once():
    seen = []

    async def main():
        async with open_process(STUBBORN, grace=math.inf) as process:
            seen.append(process)
            await process.stdout.read_until()
            flowcoro.spawn(interrupt_twice())
            await flowcoro.sleep(math.inf)

    async def interrupt_twice():
        with flowcoro.CancelScope(shield=True):
            signal.raise_signal(signal.SIGINT)
            await flowcoro.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
            await flowcoro.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main())
    assert seen[0].returncode == -signal.SIGKILL


@run_in_kernel
async def test_a_block_that_is_closed_by_force_leaves_nothing(tmp_path):
    async def use():
        async with flowcoro_os.open_file(tmp_path / "file", "w") as file, open_process(["sleep", HANG], group=True):
            files.append(file)
            await flowcoro.Event().wait()

    files, coro = [], use()
    trap = None
    while not files:                        # steps it by hand, as the kernel would, up to its wait
        trap = coro.send(None) if trap is None else await relayed(coro, trap)
    coro.close()                            # what force does to a task
    assert files[0].wrapped.closed and no_child_is_left()


async def relayed(coro, trap):
    """Wait for what the coroutine waits for, and give it that; returns what it waits for next."""
    return coro.send(await flowcoro.park(trap))


def test_outside_a_kernel_nothing_is_started(tmp_path):
    process = open_process(["touch", tmp_path / "started"])
    coro = process.__aenter__()
    with pytest.raises(RuntimeError, match="no FlowCoro kernel"):
        coro.send(None)
        coro.send(None)                     # past the checkpoint
    assert no_child_is_left()


# ---- signals -------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_signals_are_received_in_order():
    with signals(signal.SIGUSR1, signal.SIGUSR2) as received:
        signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGUSR1)
        found = []
        async for number in received:
            found.append(number)
            if len(found) == 2:
                break
        assert found == [signal.SIGUSR2, signal.SIGUSR1]
        assert all(isinstance(number, signal.Signals) for number in found)


@run_in_kernel
async def test_a_parked_task_is_woken_by_a_signal_from_outside_and_this_is_no_deadlock(watched_by):
    with signals(signal.SIGUSR1) as received:
        async with flowcoro.TaskGroup() as group:
            receiver, = await parked(group, anext(received))
            threading.Timer(0.02, os.kill, [os.getpid(), signal.SIGUSR1]).start()
            assert await receiver == signal.SIGUSR1


def test_waiting_for_a_signal_alone_is_no_deadlock():
    program = """if True:
        import os, signal, flowcoro, flowcoro_os
        async def main():
            with flowcoro_os.signals(signal.SIGUSR1) as received:
                print("ready", flush=True)
                print(repr(await anext(received)), flush=True)
        flowcoro.run(main())
    """
    root = pathlib.Path(flowcoro.__file__).parent
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=root) as child:
        try:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(0.05)                # most likely it waits by now; either way it must come through
            child.send_signal(signal.SIGUSR1)
            assert child.communicate(timeout=PATIENCE)[0].startswith(b"<Signals.SIGUSR1")
            assert child.returncode == 0
        finally:
            child.kill()


def test_signals_are_for_tasks_that_stay_in_the_main_thread():
    async def receive():
        with signals(signal.SIGUSR1):
            pass

    async def main():
        assert await flowcoro.spawn(receive(), pinned=True) is None
        with pytest.raises(RuntimeError, match="started with pinned=True"):
            await flowcoro.spawn(receive())

    flowcoro.run(main(), workers=4)


@run_in_kernel
async def test_a_signal_that_comes_again_is_kept_once():
    with signals(signal.SIGUSR1, signal.SIGUSR2) as received:
        for _ in range(70_000):             # more than the pipe holds
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR2)
        assert [await anext(received), await anext(received)] == [signal.SIGUSR1, signal.SIGUSR2]
        async with flowcoro.TaskGroup() as group:
            receiver, = await parked(group, anext(received))
            signal.raise_signal(signal.SIGUSR2)
            assert await receiver == signal.SIGUSR2


@pytest.mark.parametrize("seed", range(20))
@on_real_clock
async def test_no_signal_is_lost_and_none_invented(seed):
    chance = random.Random(seed)
    numbers = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGALRM]
    model = {}
    with signals(*numbers) as received:
        for _ in range(100):
            if chance.random() < 0.5:
                number = chance.choice(numbers)
                signal.raise_signal(number)
                model.setdefault(number)
            elif model or chance.random() < 0.2:
                got = None
                with flowcoro.move_on_after(PATIENCE if model and chance.random() < 0.8 else 0):
                    got = await anext(received)
                if got is not None:
                    assert got == next(iter(model))
                    del model[got]
        while model:
            assert await anext(received) == next(iter(model))
            del model[next(iter(model))]


@on_real_clock
async def test_a_signal_in_the_middle_of_looking_is_not_lost(monkeypatch):
    real, raised = os.read, []

    def read(fd, count):
        if not raised:
            raised.append(fd)
            signal.raise_signal(signal.SIGUSR1)     # its byte is read now, and no edge will come for it
        return real(fd, count)

    with signals(signal.SIGUSR1) as received:
        with monkeypatch.context() as patched:
            patched.setattr(os, "read", read)
            assert await anext(received) == signal.SIGUSR1
        assert raised


@run_in_kernel
async def test_a_cancelled_receiver_leaves_the_signal():
    with signals(signal.SIGUSR1) as received:
        signal.raise_signal(signal.SIGUSR1)
        with flowcoro.CancelScope() as scope:
            scope.cancel()
            await anext(received)
        assert scope.cancelled_caught
        assert await anext(received) == signal.SIGUSR1


@run_in_kernel
async def test_the_handlers_of_before_are_back_and_get_what_nobody_took():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with signals(signal.SIGUSR1):
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
            assert seen == []
        assert seen == [signal.SIGUSR1]
        signal.raise_signal(signal.SIGUSR1)
        assert len(seen) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


@run_in_kernel
async def test_when_such_a_handler_raises_the_others_get_theirs():
    seen = []

    def fail(number, frame):
        seen.append(number)
        raise ZeroDivisionError(number)

    before = [signal.signal(number, fail) for number in (signal.SIGUSR1, signal.SIGUSR2)]
    try:
        with pytest.raises(ZeroDivisionError):
            with signals(signal.SIGUSR1, signal.SIGUSR2):
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGUSR2)
        assert seen == [signal.SIGUSR1, signal.SIGUSR2]
    finally:
        for number, handler in zip((signal.SIGUSR1, signal.SIGUSR2), before):
            signal.signal(number, handler)


@run_in_kernel
async def test_a_handler_that_somebody_else_has_put_there_stays():
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with signals(signal.SIGUSR1):
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_and_sigterm_are_received_instead_of_ending_the_run():
    async def main():
        with signals(signal.SIGINT, signal.SIGTERM) as received:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            return [await anext(received), await anext(received)]

    assert flowcoro.run(main()) == [signal.SIGINT, signal.SIGTERM]


def test_a_ctrl_c_that_nobody_took_ends_the_run_after_all():
    async def main():
        with signals(signal.SIGINT):
            signal.raise_signal(signal.SIGINT)
            await flowcoro.checkpoint()
        await flowcoro.sleep(math.inf)

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main())


@run_in_kernel
async def test_two_blocks_do_not_share_a_signal():
    with signals(signal.SIGUSR1):
        with pytest.raises(flowcoro.BusyError, match="another `signals` block"):
            with signals(signal.SIGUSR2, signal.SIGUSR1):
                pass
        with signals(signal.SIGUSR2):
            pass


@run_in_kernel
async def test_one_task_receives_and_after_the_block_none():
    with signals(signal.SIGUSR1) as received:
        assert "signals" in repr(received)
        async with flowcoro.TaskGroup() as group:
            receiver, = await parked(group, anext(received))
            with pytest.raises(flowcoro.BusyError):
                await anext(received)
            receiver.cancel()
    with pytest.raises(flowcoro.ClosedError):
        await anext(received)
    with pytest.raises(RuntimeError, match="serves one"):
        received.__enter__()
    with pytest.raises(RuntimeError, match="inside its block"):
        await anext(signals(signal.SIGUSR1))


@pytest.mark.parametrize("numbers", [(), (signal.SIGKILL,), (signal.SIGUSR1, signal.SIGSTOP), (0,), (12345,), ("HUP",)])
def test_numbers_that_cannot_be_received_are_refused(numbers):
    with pytest.raises(ValueError, match="signal"):
        signals(*numbers)


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="no real-time signals")
@run_in_kernel
async def test_a_real_time_signal_has_only_a_number():
    number = signal.SIGRTMIN + 1
    with signals(number) as received:
        signal.raise_signal(number)
        assert await anext(received) == number


def test_outside_the_main_thread_or_a_kernel_it_says_so():
    with pytest.raises(RuntimeError, match="no FlowCoro kernel"):
        signals(signal.SIGUSR1).__enter__()

    async def main():
        with signals(signal.SIGUSR1):
            pass

    errors = []

    def run():
        try:
            flowcoro.run(main())
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    assert len(errors) == 1 and "main thread" in errors[0]


@run_in_kernel
async def test_a_failed_entry_takes_everything_back(monkeypatch):
    real = signal.signal

    def failing(number, handler):
        if number == signal.SIGUSR2:
            raise OSError(22, "invalid")
        return real(number, handler)

    with monkeypatch.context() as patched:
        patched.setattr(signal, "signal", failing)
        with pytest.raises(OSError, match="invalid"):
            with signals(signal.SIGUSR1, signal.SIGUSR2):
                pass
    with monkeypatch.context() as patched:
        patched.setattr(signal, "getsignal", lambda number: None)
        with pytest.raises(RuntimeError, match="not installed from Python"):
            with signals(signal.SIGUSR1):
                pass


# ---- files ---------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_text_and_bytes_are_written_and_read(tmp_path):
    async with flowcoro_os.open_file(tmp_path / "text", "w", encoding="utf-8") as file:
        assert await file.write("Grüße\n") == 6
        await file.writelines(["two\n", "three"])
        await file.flush()
    assert file.wrapped.closed
    async with flowcoro_os.open_file(tmp_path / "text", encoding="utf-8") as file:
        assert await file.readline() == "Grüße\n"
        assert [line async for line in file] == ["two\n", "three"]
        assert await file.readline() == ""
        assert await file.seek(0) == 0
        assert await file.readlines() == ["Grüße\n", "two\n", "three"]
    async with flowcoro_os.open_file(tmp_path / "text", "r+b") as file:
        assert [line async for line in file][1] == b"two\n"
        assert await file.tell() == 17
        await file.seek(-5, os.SEEK_END)
        assert await file.read(3) == b"thr"
        assert await file.truncate(4) == 4
        await file.seek(0)
        buffer = bytearray(10)
        assert await file.readinto(buffer) == 4
        assert "text" in repr(file)


@run_in_kernel
async def test_any_file_object_can_be_wrapped():
    async with flowcoro_os.File(io.BytesIO(b"a\nb")) as file:
        assert [line async for line in file] == [b"a\n", b"b"]
    await file.close()
    with pytest.raises(ValueError):
        await file.read()


@run_in_kernel
async def test_errors_of_opening_come_out(tmp_path):
    with pytest.raises(FileNotFoundError):
        async with flowcoro_os.open_file(tmp_path / "none"):
            pass
    with pytest.raises(ValueError):
        async with flowcoro_os.open_file(tmp_path / "none", "nonsense"):
            pass


class SlowFile(io.BytesIO):
    """A file whose operations take as long as the test wants."""

    def __init__(self, data):
        super().__init__(data)
        self.go, self.calls = threading.Semaphore(0), []

    def read(self, size=-1):
        self.calls.append(size)
        assert self.go.acquire(timeout=PATIENCE)
        return super().read(size)


@run_in_kernel
async def test_an_operation_that_is_cancelled_is_completed_and_its_result_kept():
    slow = SlowFile(b"abcdef")
    async with flowcoro_os.File(slow) as file:
        with flowcoro.CancelScope() as scope:
            async with flowcoro.TaskGroup() as group:
                reader, = await parked(group, file.read(2))
                waiting, = await parked(group, file.read(3))
                reader.cancel()
                waiting.cancel()            # has not begun: nothing is read
                slow.go.release()
                assert await reader == b"ab"
        assert not scope.cancelled_caught and slow.calls == [2]
        slow.go.release()
        assert await file.read() == b"cdef"


@run_in_kernel
async def test_operations_of_several_tasks_come_one_after_the_other():
    slow = SlowFile(b"abcdef")
    file = flowcoro_os.File(slow)
    async with flowcoro.TaskGroup() as group:
        tasks = await parked(group, *(file.read(size) for size in (1, 2, 3)))
        for _ in range(3):
            slow.go.release()
    assert [task.result() for task in tasks] == [b"a", b"bc", b"def"]


@run_in_kernel
async def test_a_file_is_closed_however_its_block_is_left(tmp_path):
    for number in range(2):
        with flowcoro.CancelScope() as scope:
            async with flowcoro_os.open_file(tmp_path / "file", "w") as file:
                await file.write("x")
                if number:
                    scope.cancel()
                    await file.write("never")
        assert file.wrapped.closed and (tmp_path / "file").read_text() == "x"


@run_in_kernel
async def test_cancelled_before_opening_nothing_is_opened(tmp_path):
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        async with flowcoro_os.open_file(tmp_path / "file", "w"):
            raise AssertionError("not reached")
    assert not (tmp_path / "file").exists()


@run_in_kernel
async def test_a_file_is_closed_though_all_threads_hang(tmp_path):
    go = threading.Event()
    async with flowcoro.TaskGroup() as group:
        async with flowcoro_os.open_file(tmp_path / "file", "w") as file:
            for _ in range(flowcoro.THREADS):
                group.spawn(flowcoro.to_thread(go.wait, PATIENCE))
            await flowcoro.checkpoint()
        assert file.wrapped.closed
        go.set()


# ---- paths ---------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_what_only_computes_is_plain_and_gives_paths_of_the_same_kind():
    path = flowcoro_os.Path("/a") / "b.txt"
    assert (path.name, path.suffix, str(path)) == ("b.txt", ".txt", "/a/b.txt")
    for other in (path.parent, path.with_suffix(".py"), path.relative_to("/a"), "/x" / path, next(iter(path.parents))):
        assert type(other) is flowcoro_os.Path
    assert path == pathlib.Path("/a/b.txt") and hash(path) == hash(pathlib.Path("/a/b.txt"))
    assert os.fspath(path) == "/a/b.txt" and path.match("*.txt")


@run_in_kernel
async def test_what_asks_the_system_is_awaited(tmp_path):
    path = flowcoro_os.Path(tmp_path)
    await (path / "dir" / "deep").mkdir(parents=True)
    file = path / "dir" / "file"
    assert await file.write_text("hello") == 5 and await file.read_bytes() == b"hello"
    assert await file.exists() and await file.is_file() and not await file.is_dir() and not await file.is_mount()
    assert (await file.stat()).st_size == 5
    moved = await file.rename(path / "moved")
    assert type(moved) is flowcoro_os.Path and not await file.exists() and await moved.exists()
    await (path / "link").symlink_to(moved)
    assert await (path / "link").is_symlink() and await (path / "link").readlink() == moved
    assert await (path / "link").samefile(moved) and await (path / "link").resolve() == await moved.resolve()
    found = await path.iterdir()
    assert type(found) is list and {item.name for item in found} == {"dir", "moved", "link"}
    assert {type(item) for item in found} == {flowcoro_os.Path}
    assert [item.name for item in await path.rglob("dee*")] == ["deep"]
    assert [item.name for item in await path.glob("mov*")] == ["moved"]
    async with moved.open("a") as stream:
        await stream.write("!")
    assert await moved.read_text() == "hello!"
    await moved.chmod(0o600)
    await moved.unlink()
    await moved.unlink(missing_ok=True)
    await (path / "dir" / "deep").rmdir()
    with pytest.raises(FileNotFoundError):
        await moved.stat()
    assert await flowcoro_os.Path.cwd() == pathlib.Path.cwd()
    assert type(await flowcoro_os.Path.home()) is flowcoro_os.Path
    assert await flowcoro_os.Path("~").expanduser() == await flowcoro_os.Path.home()
    assert (await flowcoro_os.Path("x").absolute()).parent == await flowcoro_os.Path.cwd()


def test_each_asking_method_is_one_of_pathlib_and_says_so():
    for name, member in vars(flowcoro_os.Path).items():
        if not name.startswith("_") and not isinstance(member, classmethod) and name != "open":
            assert hasattr(pathlib.Path, name) and f"pathlib.Path.{name}()" in member.__doc__


# ---- what has one use -----------------------------------------------------------------------------------------

def test_run_process_closes_a_stdin_that_nobody_could_write_to():
    async def main():
        return await flowcoro_os.run_process(["cat"], stdin=flowcoro_os.PIPE, timeout=60)

    assert flowcoro.run(main()).stdout == b""


def test_an_open_file_serves_one_block(tmp_path):
    async def main():
        opening = flowcoro_os.open_file(tmp_path / "notes", "w")
        async with opening:
            with pytest.raises(RuntimeError, match="serves one"):
                await opening.__aenter__()

    flowcoro.run(main())


@pytest.mark.parametrize("error, call, said", [
    (TypeError, lambda: flowcoro_os.open_process(["true"], grace="1"), "grace='1': seconds must be 0 or more"),
    (ValueError, lambda: flowcoro_os.open_process(["true"], grace=math.nan), "grace=nan: seconds must be 0 or more"),
    (TypeError, lambda: flowcoro_os.open_process(["true"], limit=None), "limit=None: bytes must be 1 or more"),
    (ValueError, lambda: flowcoro_os.open_process(["true"], limit=True), "limit=True: bytes must be 1 or more"),
    (ValueError, lambda: flowcoro_os.signals(True), "True is no signal"),
    (ValueError, lambda: flowcoro_os.signals([signal.SIGHUP]), "is no signal: give numbers, one by one")])
def test_arguments_that_make_no_sense_are_refused_by_name(error, call, said):
    with pytest.raises(error, match=re.escape(said)):
        call()


@pytest.mark.parametrize("error, call, said", [
    (TypeError, lambda process: process.stdout.read(None), "read(None): max_bytes must be an int"),
    (TypeError, lambda process: process.stdout.read(1.5), "read(1.5): max_bytes must be an int"),
    (ValueError, lambda process: process.stdout.read(True), "read(True): max_bytes must be 1 or more"),
    (TypeError, lambda process: process.stdout.read_until("\n"), "the separator must be bytes"),
    (ValueError, lambda process: process.stdout.read_until(limit=0), "limit=0: bytes must be 1 or more"),
    (TypeError, lambda process: process.stdin.write("text" * 100_000), "text has to be encoded: text.encode()")])
def test_operations_on_pipes_refuse_what_makes_no_sense_by_name_and_go_on(error, call, said):
    async def main():
        async with flowcoro_os.open_process(["cat"]) as process:
            with pytest.raises(error, match=re.escape(said)) as caught:
                await call(process)
            assert len(str(caught.value)) < 300
            await process.stdin.write(b"whole")
            process.stdin.close()
            assert await process.stdout.read() == b"whole"

    flowcoro.run(main())
