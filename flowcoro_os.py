"""flowcoro_os 0.1.0: what the operating system has besides sockets: processes, signals, files.

To vendor, copy: flowcoro.py, flowcoro_os.py

Example:

    import sys
    import flowcoro, flowcoro_os

    async def main():
        done = await flowcoro_os.run_process([sys.executable, "-c", "print(6 * 7)"], check=True, timeout=60)
        print(done.stdout)
        async with flowcoro_os.open_process([sys.executable, "-c", "print(input()[::-1])"]) as process:
            await process.stdin.write(b"olleh\\n")
            async for line in process.stdout:
                print(line)

    flowcoro.run(main())

Contents: constants and errors · pipes · processes · signals · files · paths

How it works:

A *process* is started by subprocess.Popen, in the kernel's own thread: fork and exec are over when it returns, and no
cancellation can come in between. Our ends of its pipes are non-blocking, each a Pollable. Its end is told by a *pidfd*,
a descriptor that becomes readable then; where there is none, by looking every now and then.

A process lives as long as its `async with` block. It is *reaped* (its number given back) only when the block is left,
so a signal sent inside can never hit a stranger who has got the number, and the group of a dead leader can still be
killed. However the block is left, no process, zombie or descriptor is left behind:

    the block ends              pipes closed, wait for the process; if that is cancelled, as below
    an error or cancellation    stdin closed, SIGTERM, `grace` seconds, SIGKILL, all inside a shield
    the shield is dropped,      SIGKILL, and a blocking wait that SIGKILL makes short
    or closed by force

A *signal handler* may interrupt any bytecode, so it notes the number and writes a byte to a pipe; the task that
iterates waits for the pipe, as for any descriptor. Each number is noted once at most (so does the operating system).

*Files* are always ready as far as selectors know, so each operation runs in a thread of flowcoro.to_thread(): when
cancelled, it is done all the same and its result returned, and the next checkpoint raises.

Sources: CPython's subprocess.py; trio's _subprocess.py, _signals.py and _file_io.py; Go's os/exec (WaitDelay);
pidfd_open(2), waitid(2), signal-safety(7).

What it does not do: pseudo-terminals, text decoding of pipes (`.decode()` does), Windows, process pools, watching
directories. On a virtual clock a process takes no time, so every timeout around it is over at once; tests of timeouts
need the real one. Reading many small lines of a file costs a thread call each: read blocks, or use to_thread() for
the loop.

SPDX-License-Identifier: MIT
"""

import contextlib
import errno
import math
import os
import pathlib
import signal
import subprocess
import threading
import time

import flowcoro

__version__ = "0.1.0"

__all__ = ["run_process", "open_process", "Process", "ReadPipe", "WritePipe", "PIPE", "STDOUT", "DEVNULL",
           "signals", "open_file", "File", "Path", "ProcessError", "ProcessFailed", "LimitError"]

PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL

# ---- constants ------------------------------------------------------------------------------------------------

# Bytes that run_process() keeps of stdout, and of stderr: more than any listing, and little enough that a child gone
# mad does not make the machine swap.
OUTPUT_LIMIT = 16 * 2**20

# Bytes of one line of a pipe, its end included. asyncio's StreamReader has the same.
LINE_LIMIT = 64 * 2**10

# Bytes of one read: what a pipe holds on Linux.
CHUNK = 64 * 2**10

# Bytes that a pipe can hold, unless root allows more (/proc/sys/fs/pipe-max-size).
PIPE_MAXIMUM = 2**20

# Seconds between SIGTERM and SIGKILL; trio has 5. Docker and Kubernetes give 10 and 30 to whole services, and this one
# is part of such.
GRACE = 5.0

# Seconds that a process may take to die of SIGKILL before that is reported: only one that hangs inside the operating
# system (a dead disk) takes more than milliseconds.
KILL_SECONDS = 10.0

# Seconds of the same, when nothing can be awaited any more and the whole thread has to wait.
BLOCKING_SECONDS = 1.0

# Seconds for which run_process() goes on reading after the process has ended, because its children hold the pipes.
DRAIN = 5.0

# Seconds between two looks whether a process has ended, first and at most, where there is no pidfd: as subprocess.
FIRST_LOOK, LONGEST_LOOK = 0.001, 0.05

# Bytes of stderr that the message of ProcessFailed shows: a dozen lines, of which the last say what happened.
STDERR_SHOWN = 1000


# ---- errors ---------------------------------------------------------------------------------------------------
#
#   flowcoro.FlowCoroError
#     ProcessError       a process did not end, its status is lost, or its children hold its pipes
#       ProcessFailed    … or check=True and it did not exit with 0; also a subprocess.CalledProcessError
#     LimitError         more bytes than `limit`
#   flowcoro.ClosedError, flowcoro.BusyError    a pipe was closed here, or is in use by another task
#   OSError              a program or directory that is not there (FileNotFoundError), may not be run (PermissionError)
#     BrokenPipeError    the process has closed its stdin, or has ended

class ProcessError(flowcoro.FlowCoroError):
    """A process could not be waited for as usual: the message says why. `result` is what is known of it, or None."""

    def __init__(self, message, result=None):
        super().__init__(message)
        self.result = result


class ProcessFailed(ProcessError, subprocess.CalledProcessError):
    """check=True, and the process did not exit with 0. Has `returncode`, `cmd`, `stdout`, `stderr` (bytes or None)."""

    def __init__(self, result):
        subprocess.CalledProcessError.__init__(self, result.returncode, result.args, result.stdout, result.stderr)
        self.result = result

    def __reduce__(self):
        return ProcessFailed, (self.result,)

    def __str__(self):
        said = (self.stderr or b"")[-STDERR_SHOWN:].decode(errors="replace").strip()
        return super().__str__() + (f" It wrote to stderr:\n{said}" if said else "")


class LimitError(flowcoro.FlowCoroError):
    """A process wrote more than `limit` bytes. The message says where, how many are allowed, and what to do."""


def _checked(number, least, said, remedy):
    """`number`, if it is one from `least` up."""
    try:
        if number >= least and not isinstance(number, bool):
            return number
    except TypeError:
        raise TypeError(f"{said}: {remedy}") from None
    raise ValueError(f"{said}: {remedy}")


def _checked_count(number, said):
    if not isinstance(number, int):
        raise TypeError(f"{said}: max_bytes must be an int, 1 or more")
    return _checked(number, 1, said, "max_bytes must be 1 or more")


def _as_bytes(data, taker):
    try:
        return memoryview(data).cast("B")
    except TypeError:
        raise TypeError(f"{taker} takes bytes or the like, got {data!r:.80}; text has to be encoded: text.encode()") from None


# ---- pipes ----------------------------------------------------------------------------------------------------

class _Pipe:
    """Our end of a pipe: a file object that owns a non-blocking descriptor, and its Pollable."""

    def __init__(self, file, name):
        self._file, self._name, self._user = file, name, None
        os.set_blocking(file.fileno(), False)
        self._pollable = flowcoro.Pollable(file.fileno())

    @contextlib.contextmanager
    def _alone(self, verb):
        """Two tasks that read or write in turns would each get pieces of what belongs together."""
        self._begin(verb)
        try:
            yield
        finally:
            self._user = None

    @flowcoro.atomic
    def _begin(self, verb):
        if self._user is not None:
            raise flowcoro.BusyError(f"{self._name} is being {verb} by {self._user!r} already; one task at a time")
        self._user = flowcoro.current_task()

    @flowcoro.atomic
    def _transfer(self, system_call, argument):
        """os.read or os.write, while nobody closes the pipe: the number might be another file's by then."""
        if self.closed:
            raise flowcoro.ClosedError(f"{self._name} has been closed here")
        return system_call(self._pollable.fd, argument)

    @flowcoro.atomic
    def close(self):
        """Close our end; a task that waits for it gets ClosedError. Never blocks. Twice is once."""
        self._pollable.close()
        self._file.close()

    @property
    def closed(self):
        """Whether close() was called, here or because the block of the process was left."""
        return self._file.closed

    def fileno(self):
        """The descriptor, which is non-blocking. ValueError once closed."""
        return self._file.fileno()

    def __repr__(self):
        return f"<{type(self).__name__} {self._name}{' closed' if self.closed else ''}>"


class ReadPipe(_Pipe):
    """What a process writes, as bytes: `process.stdout`, `process.stderr`. `async for line in` it gives its lines.

    A line keeps its b"\\n"; the last may lack one. All methods: BusyError when another task reads, ClosedError after
    close(); when cancelled, nothing is consumed.
    """

    def __init__(self, file, name, limit):
        super().__init__(file, name)
        self._buffer = bytearray()
        self._limit = limit

    async def _receive(self):
        """The next bytes from the system, b"" at the end. Cancelled: nothing consumed."""
        while True:
            await self._pollable.wait_readable()
            self._pollable.readable = False     # first this, then read: no edge is lost
            try:
                data = self._transfer(os.read, CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                self._pollable.readable = True
                raise
            self._pollable.readable = True
            return data

    async def read(self, max_bytes=CHUNK):
        """From 1 to `max_bytes` bytes, as soon as there are any; b"" only at the end. ValueError if max_bytes < 1."""
        _checked_count(max_bytes, f"read({max_bytes!r})")
        with self._alone("read"):
            if self._buffer:
                await flowcoro.checkpoint()
            else:
                self._buffer += await self._receive()
            return self._take(min(max_bytes, len(self._buffer)))

    def read_nowait(self, max_bytes=CHUNK):
        """As read(), but WouldBlock when there is nothing yet."""
        _checked_count(max_bytes, f"read_nowait({max_bytes!r})")
        with self._alone("read"):
            if not self._buffer:
                try:
                    self._buffer += self._transfer(os.read, CHUNK)
                except BlockingIOError:
                    raise flowcoro.WouldBlock(f"{self._name} has nothing to read yet") from None
            return self._take(min(max_bytes, len(self._buffer)))

    async def read_until(self, separator=b"\n", *, limit=None):
        """All bytes up to and including `separator`; at the end what is left, without one, at last b"".

        limit: bytes, separator included; by default that given to open_process(). LimitError when they come without a
        separator; nothing is consumed, and read() still gives them. ValueError for an empty separator.
        """
        if not isinstance(separator, (bytes, bytearray)):
            raise TypeError(f"read_until({separator!r}): the separator must be bytes, such as b\"\\n\"")
        if not separator:
            raise ValueError("read_until(b\"\"): the separator must have at least one byte")
        limit = self._limit if limit is None else _checked(limit, 1, f"limit={limit!r}", "bytes must be 1 or more")
        with self._alone("read"):
            await flowcoro.checkpoint()
            searched = 0
            while True:
                found = self._buffer.find(separator, searched)
                length = found + len(separator) if found >= 0 else len(self._buffer)
                if length > limit:
                    raise LimitError(f"{self._name}: no {bytes(separator)!r} within limit={limit} bytes; allow more "
                                     "with limit=, or take pieces of any length with read()")
                if found >= 0:
                    return self._take(length)
                searched = max(0, length - len(separator) + 1)
                received = await self._receive()
                if not received:
                    return self._take(length)
                self._buffer += received

    def _take(self, count):
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def __aiter__(self):
        return self

    async def __anext__(self):
        line = await self.read_until(b"\n")
        if not line:
            raise StopAsyncIteration
        return line


class WritePipe(_Pipe):
    """What a process reads: `process.stdin`. Close it to tell the process that there is no more."""

    async def write(self, data):
        """Write all of `data` (bytes-like), waiting for room. BrokenPipeError when the process no longer reads.

        BusyError when another task writes, ClosedError after close(). Cancelled: an unknown part was written.
        """
        rest = _as_bytes(data, "write()")
        with self._alone("written"):
            while True:
                await self._pollable.wait_writable()
                self._pollable.writable = False     # first this, then write
                try:
                    rest = rest[self._transfer(os.write, rest):]
                except BlockingIOError:
                    continue
                except BrokenPipeError as error:
                    self._pollable.writable = True
                    raise BrokenPipeError(
                        errno.EPIPE, f"{self._name}: the process has closed it, or has ended") from error
                self._pollable.writable = True
                if not rest:
                    return


# ---- processes ------------------------------------------------------------------------------------------------

_LOST = object()        # the status of a process that somebody else has waited for


class Process:
    """A child process; made by open_process(). Its block is its lifetime.

    `args`: as given. `pid`: its number, which is nobody else's until the block is left. `stdin`: a WritePipe; `stdout`,
    `stderr`: ReadPipes; each None unless it was PIPE.
    """

    def __init__(self, args, popen_options, grace, limit, group):
        self.args, self.pid = args, None
        self.stdin = self.stdout = self.stderr = None
        self._options, self._grace, self._limit, self._group = popen_options, grace, limit, group
        self._popen = self._exit = self._pidfd = self._status = None
        self._waiting = flowcoro.Lock()         # one task looks for the end, the others for that task

    async def __aenter__(self):
        if self._popen is not None:
            raise RuntimeError("a Process serves one `async with`; call open_process() again")
        await flowcoro.checkpoint()             # cancelled here: nothing was started. From here on nothing is awaited
        self._popen = subprocess.Popen(self.args, bufsize=0, **self._options)
        self.pid = self._popen.pid
        try:
            for name, make in (("stdin", WritePipe), ("stdout", ReadPipe), ("stderr", ReadPipe)):
                file = getattr(self._popen, name)
                if file is not None:
                    more = () if make is WritePipe else (self._limit,)
                    setattr(self, name, make(file, f"{name} of process {self.pid}", *more))
            self._watch()
        except BaseException:                   # too few descriptors
            self._release()
            raise
        return self

    def _watch(self):
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):       # no such system call, not allowed, no descriptor left: look at times
            return
        self._exit = flowcoro.Pollable(self._pidfd)

    async def __aexit__(self, kind, error, trace):
        try:
            if self.stdin is not None:
                self.stdin.close()
            if error is None:
                self._close_output()
                await self._wait_for_end()
        except BaseException as late:
            error = late
            raise
        finally:
            try:
                if not self._has_ended() and not isinstance(error, GeneratorExit):
                    await self._stop()          # its output stays open: it may write as it ends
            finally:
                self._release()

    async def _stop(self):
        """Ask, then kill. Left early when a second Ctrl-C drops the shield."""
        with flowcoro.CancelScope(shield=True):
            for number, seconds in ((signal.SIGTERM, self._grace), (signal.SIGKILL, KILL_SECONDS)):
                with contextlib.suppress(PermissionError):      # it has become another user: it may end all the same
                    self.send_signal(number)
                with flowcoro.move_on_after(seconds):
                    await self._wait_for_end()
                    return

    def _release(self):
        """Kill what is left, reap it, close everything. Blocks only where nothing could be awaited any more."""
        try:
            if not self._has_ended() or self._group:
                with contextlib.suppress(PermissionError):
                    self.send_signal(signal.SIGKILL)
            deadline, pause = time.monotonic() + BLOCKING_SECONDS, FIRST_LOOK
            while not self._reap():
                if time.monotonic() > deadline:
                    raise ProcessError(f"process {self.pid} ({self.args!r}) has not ended after SIGKILL: it hangs inside the "
                                       "operating system, or belongs to another user. It stays behind")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_LOOK)
            self._has_ended()
        finally:
            self._close_output()
            if self.stdin is not None:
                self.stdin.close()
            for file in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
                if file is not None:            # those that never became a pipe of ours
                    file.close()
            if self._exit is not None:
                self._exit.close()
            if self._pidfd is not None:
                os.close(self._pidfd)
                self._pidfd = None

    def _close_output(self):
        for pipe in (self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()

    @flowcoro.atomic
    def _reap(self):
        """Give its number back if it has ended; nobody sends a signal there meanwhile."""
        return self._popen.poll() is not None

    @flowcoro.atomic
    def _has_ended(self):
        """Look, without reaping it (where the system can do that)."""
        if self._status is None:
            try:
                if self._popen.returncode is not None or not hasattr(os, "waitid"):
                    self._status = self._popen.poll()
                else:
                    found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                    if found is not None:
                        self._status = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
            except ChildProcessError:
                self._popen.poll()              # tells Popen as well, which then keeps from signalling the number
                self._status = _LOST
        return self._status is not None

    async def _wait_for_end(self):
        async with self._waiting:
            pause = FIRST_LOOK
            while True:
                if self._exit is not None:
                    self._exit.readable = False     # first this, then look, then wait: no edge is lost
                if self._has_ended():
                    return
                if self._exit is not None and self._pidfd is not None:
                    with contextlib.suppress(flowcoro.ClosedError):     # it was reaped meanwhile
                        await self._exit.wait_readable()
                else:
                    await flowcoro.sleep(pause)
                    pause = min(2 * pause, LONGEST_LOOK)

    async def wait(self):
        """Wait for the end of the process; return `returncode`. Any number of tasks may wait. Cancelled: it runs on.

        It does not read: a process that writes more than a pipe holds (64 KiB) into one that nobody reads never ends.
        ProcessError when the status is lost.
        """
        await self._wait_for_end()
        return self.returncode

    @property
    def returncode(self):
        """The exit status, or minus the number of the signal that killed it; None while it runs, looked up each time.

        ProcessError when it is lost: something else in this program has waited for all children, or ignores SIGCHLD.
        """
        if self._popen is None or not self._has_ended():
            return None
        if self._status is _LOST:
            raise ProcessError(f"process {self.pid} ({self.args!r}) has ended, but its exit status is lost: something "
                               "else in this program has fetched it (os.wait(), or SIGCHLD is ignored); let it wait "
                               "for its own children only")
        return self._status

    @flowcoro.atomic
    def send_signal(self, number):
        """Send a signal, to all of its group with group=True. Nothing happens when it has ended and the block is left.

        PermissionError when it belongs to another user by now; OSError (EINVAL) or ValueError for a wrong number.
        """
        if self._popen is not None and self._popen.returncode is None:      # not reaped: the number is still its own
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if self._group else os.kill)(self.pid, number)

    def terminate(self):
        """Ask it to end: send_signal(SIGTERM)."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """Make it end: send_signal(SIGKILL)."""
        self.send_signal(signal.SIGKILL)

    def __repr__(self):
        state = "not started" if self._popen is None else "running" if not self._has_ended() else (
            "ended, status lost" if self._status is _LOST else f"ended with {self._status}")
        return f"<Process {self.pid} {self.args!r}: {state}>"


def _checked_args(args, shell):
    if isinstance(args, (str, bytes, os.PathLike)) != bool(shell):
        raise TypeError(f"args={args!r}: give a list, such as [\"ls\", \"-l\"]; or with shell=True one string, in "
                        "which the shell gives a meaning to spaces, quotes, $ and so on")
    if not shell:
        args = list(args)
        if not args:
            raise ValueError("args=[]: the first item must name the program")
    return args


def open_process(args, *, stdin=PIPE, stdout=PIPE, stderr=None, shell=False, cwd=None, env=None, group=False,
                 start_new_session=False, grace=GRACE, limit=LINE_LIMIT, **popen_options):
    """`async with open_process(["program", "argument"]) as process:` runs a program beside the block; gives a Process.

    args: a list of strings, bytes or paths; with shell=True one string for /bin/sh. stdin, stdout, stderr: PIPE (then
    process.stdin … are streams), DEVNULL, None (our own), an open file or descriptor; stderr=STDOUT: into stdout. cwd,
    env and more: as for subprocess.Popen.

    When the block is done, the pipes are closed and the process waited for. When the block is left by an error or
    cancelled, and when that wait is: SIGTERM, after `grace` seconds SIGKILL, and the process has ended before the error
    goes on. group=True puts it into a process group of its own (start_new_session=True: also into a session): signals
    go to the whole group, so to its children too, and what is left of the group at the end of the block is killed (not if
    somebody else has fetched the status of the process: then the number may be that of another group).
    limit: bytes of a line, see ReadPipe.read_until().

    On entry: FileNotFoundError (no such program, or cwd), PermissionError (it may not be run), other OSErrors; nothing
    is left behind then, nor when it is cancelled. At the end: ProcessError when it survives SIGKILL for 10 seconds.
    TypeError and ValueError at once for wrong arguments. To bound any of it: `with flowcoro.timeout(seconds):` around.
    """
    args = _checked_args(args, shell)
    _checked(grace, 0, f"grace={grace!r}", "seconds must be 0 or more; math.inf never kills")
    _checked(limit, 1, f"limit={limit!r}", "bytes must be 1 or more; math.inf sets no limit")
    if STDOUT in (stdin, stdout):
        raise ValueError("STDOUT is for stderr only: it sends errors to where the output goes")
    for refused in {"text", "universal_newlines", "encoding", "errors", "bufsize"} & popen_options.keys():
        raise TypeError(f"{refused}=: the pipes carry bytes; decode() what they give")
    options = dict(popen_options, stdin=stdin, stdout=stdout, stderr=stderr, shell=shell, cwd=cwd, env=env,
                   start_new_session=start_new_session)
    if group and not start_new_session:
        options["process_group"] = 0
    return Process(args, options, grace, limit, bool(group or start_new_session))


class _Conversation:
    """What run_process does while the process runs: feed it, read both outputs, wait for its end, all at once."""

    def __init__(self, process, input, limit, drain):
        self.process, self.input, self.limit, self.drain = process, input, limit, drain
        self.whole, self.feeding = flowcoro.CancelScope(), flowcoro.CancelScope()
        self.over = None                        # which output was too long
        self.found = {pipe: bytearray() for pipe in (process.stdout, process.stderr) if pipe is not None}

    async def finish(self):
        process = self.process
        with self.whole:
            async with flowcoro.TaskGroup() as group:
                for pipe in self.found:
                    group.spawn(self._collect(pipe), name=f"read {pipe!r}")
                if self.input is not None:
                    group.spawn(self._feed(), name=f"write {process.stdin!r}")
                await process._wait_for_end()   # not wait(): its error would leave in a group
                self.feeding.cancel()
                if process._group:
                    process.kill()              # what it has left behind in its group; the number is still taken
                self.whole.deadline = flowcoro.now() + self.drain
        held = self.whole.cancelled_caught and self._sweep()
        if self.over is not None:
            raise LimitError(f"{process.args!r} wrote more than limit={self.limit} bytes to its {self.over} and was "
                             "stopped; allow more with limit=, send it to a file with stdout= or stderr=, or read it "
                             "piece by piece from open_process()")
        output = [None if pipe is None else bytes(self.found[pipe]) for pipe in (process.stdout, process.stderr)]
        result = subprocess.CompletedProcess(process.args, process.returncode, *output)
        if held:
            raise ProcessError(f"{process.args!r} has ended with {result.returncode}, but a process that it started "
                               f"has held its output open for drain={self.drain:g} s since; group=True kills such, "
                               "drain=math.inf waits for them, and stdout=DEVNULL or a file needs no wait", result)
        return result

    async def _collect(self, pipe):
        while self._keep(pipe, await pipe.read()):
            pass

    def _keep(self, pipe, chunk):
        """Whether there may be more."""
        kept = self.found[pipe]
        if len(kept) + len(chunk) > self.limit:
            self.over = "stdout" if pipe is self.process.stdout else "stderr"
            self.whole.cancel()
            return False
        kept += chunk
        return bool(chunk)

    def _sweep(self):
        """The time is up, perhaps before the readers had a turn: take what the pipes hold. Whether they stay open."""
        held = False
        for pipe in self.found:
            try:
                for _ in range(PIPE_MAXIMUM // CHUNK):      # not for ever: the other end may go on writing
                    if not self._keep(pipe, pipe.read_nowait()):
                        break
                else:
                    held = True
            except flowcoro.WouldBlock:
                held = True
        return held

    async def _feed(self):
        with self.feeding:
            with contextlib.suppress(BrokenPipeError):
                await self.process.stdin.write(self.input)
        self.process.stdin.close()


async def run_process(args, *, input=None, stdin=None, stdout=None, stderr=None, capture_output=True, check=False,
                      timeout=None, limit=OUTPUT_LIMIT, drain=DRAIN, **options):
    """Run a program to its end; return a subprocess.CompletedProcess: args, returncode, stdout, stderr (bytes or None).

    input: bytes for its stdin, which otherwise is `stdin`, or else DEVNULL; that it does not read them all is no error.
    stdout, stderr: as for open_process(); where they are None, captured, or with capture_output=False our own.
    check: raise ProcessFailed when it does not exit with 0. timeout: seconds (TimeoutError; the output is lost, to keep
    it read from open_process()). More options, `grace` and `group` among them, are those of open_process().

    limit: bytes of stdout, and of stderr, that are kept; a process that writes more is stopped, and LimitError raised.
    drain: seconds to go on reading after its end while children it has left behind hold its pipes; then ProcessError,
    with what is known as `result`. With group=True such children are killed when it ends.

    Errors as open_process(). Cancelled: the process has been stopped (SIGTERM, `grace` seconds, SIGKILL), output lost.
    """
    if input is not None:
        if stdin is not None:
            raise ValueError("input= and stdin= exclude each other: give one of them")
        input = _as_bytes(input, "input=")      # a TypeError for a str comes before anything is started
    elif stdin == PIPE:
        input = memoryview(b"")                 # nobody could write to it: closed at once
    _checked(limit, 0, f"limit={limit!r}", "bytes must be 0 or more; math.inf sets no limit")
    _checked(drain, 0, f"drain={drain!r}", "seconds must be 0 or more; math.inf waits as long as it takes")
    captured = PIPE if capture_output else None
    process = open_process(
        args, stdin=PIPE if input is not None else DEVNULL if stdin is None else stdin,
        stdout=captured if stdout is None else stdout, stderr=captured if stderr is None else stderr, **options)
    with flowcoro.timeout(math.inf if timeout is None else timeout):
        async with process:
            talk = _Conversation(process, input, limit, drain)
            result = await talk.finish()
    if check and result.returncode:
        raise ProcessFailed(result)
    return result


# ---- signals --------------------------------------------------------------------------------------------------

def _as_signal(number):
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"{number!r} is no signal: give numbers, one by one, or members of module signal, such as SIGHUP")
    if number not in signal.valid_signals() or number in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(f"{number!r} is no signal that can be received; give some of module signal, such as SIGHUP")
    try:
        return signal.Signals(number)
    except ValueError:          # a real-time signal without a name
        return int(number)


class signals:
    """`with signals(SIGHUP, SIGUSR1) as received:` and `async for number in received:` handles signals in a task.

    Inside the block these signals do nothing else: their handlers before (the kernel's for SIGINT and SIGTERM, say) are
    put back at its end, unless somebody has put another in place. A signal that comes again before it was given out is
    given out once, so at most one of each is kept. Those not given out by the end are raised again then, for the
    handlers before.

    On entry: RuntimeError outside the main thread (Python has signal handlers only there) or a kernel, with several
    workers in a task that is not pinned (main is), when entered twice, and for a handler that was not installed from
    Python; BusyError when another `signals` block receives one of them. ValueError for a number that cannot be
    received, or none. While a block is open the kernel reports no Deadlock: a signal may come.
    """

    def __init__(self, *numbers):
        if not numbers:
            raise ValueError("signals(): give at least one signal, such as signal.SIGHUP")
        self._numbers = tuple(dict.fromkeys(map(_as_signal, numbers)))
        self._pending = {}              # what handlers and tasks do to it is atomic; first come, first out
        self._previous = {}             # number: the handler to restore
        self._pollable = self._read = self._write = None

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signals() outside the main thread: Python has signal handlers only there; call "
                               "flowcoro.run() in the main thread, and hand what comes to other threads")
        if self._read is not None:
            raise RuntimeError("a `signals` serves one `with`; make a new one")
        pinned = flowcoro.current_task().pinned         # RuntimeError outside a kernel
        if not pinned and flowcoro.runtime_info()["workers"] > 1:
            raise RuntimeError("signals() with several workers in a task that may move to another thread, where Python has no "
                               "signal handlers: use it in main, or in a task that main has started with pinned=True")
        for number in self._numbers:
            handler = signal.getsignal(number)
            if handler is None:
                raise RuntimeError(f"{number!r} has a handler that was not installed from Python, which could not be "
                                   "restored; receive another signal")
            if isinstance(getattr(handler, "__self__", None), signals):
                raise flowcoro.BusyError(f"{number!r} is received by another `signals` block already; let one task "
                                         "receive it and tell the others, by a Broadcast for example")
        self._read, self._write = os.pipe()
        try:
            os.set_blocking(self._read, False)
            os.set_blocking(self._write, False)
            self._pollable = flowcoro.Pollable(self._read)
            for number in self._numbers:
                self._previous[number] = signal.getsignal(number)
                signal.signal(number, self._handle)
        except BaseException:
            self._close()
            raise
        return self

    def _handle(self, number, frame):
        self._pending[number] = None    # first this, then wake
        if self._write is not None:
            with contextlib.suppress(BlockingIOError):      # full: it is awake
                os.write(self._write, b"\0")

    def __exit__(self, kind, error, trace):
        self._close()
        with contextlib.ExitStack() as all_of_them:         # also when a handler raises
            for number in reversed(self._pending):
                all_of_them.callback(signal.raise_signal, number)
            self._pending = {}

    @flowcoro.atomic
    def _close(self):
        write, self._write = self._write, None      # first this: who has chained to our handler may call it at any time
        with contextlib.ExitStack() as all_of_them:
            all_of_them.callback(os.close, write)
            all_of_them.callback(os.close, self._read)
            if self._pollable is not None:
                all_of_them.callback(self._pollable.close)
            for number, previous in self._previous.items():
                if signal.getsignal(number) == self._handle:    # else somebody has put another one there
                    all_of_them.callback(signal.signal, number, previous)

    def __aiter__(self):
        return self

    async def __anext__(self):
        """The next signal, as a member of signal.Signals. Cancelled: it is kept. BusyError when another task waits for
        it; ClosedError when the block has been left."""
        if self._pollable is None:
            raise RuntimeError("signals() is received inside its block: `with signals(…) as received:`")
        while True:
            await self._pollable.wait_readable()
            for number in list(self._pending):
                if self._pending.pop(number, self) is None:
                    return _as_signal(number)
            self._pollable.readable = False     # first this, then drain, then look once more: no edge is lost
            self._drain()
            if self._pending:
                self._pollable.readable = True

    @flowcoro.atomic
    def _drain(self):
        """Read what the handler has written, while nobody closes the pipe: the number might be another file's by then."""
        if self._write is None:
            raise flowcoro.ClosedError("the block of signals() has been left")
        with contextlib.suppress(BlockingIOError):
            while os.read(self._read, CHUNK):
                pass

    def __repr__(self):
        return f"<signals {', '.join(map(str, map(int, self._numbers)))}>"


# ---- files ----------------------------------------------------------------------------------------------------

def _threaded_file_method(name, what):
    async def method(self, *args):
        async with self._lock:
            return await flowcoro.to_thread(getattr(self.wrapped, name), *args)

    method.__name__, method.__qualname__ = name, f"File.{name}"
    method.__doc__ = f"{what} As the method {name}() of Python's files, in a thread."
    return method


class File:
    """A file whose operations run in threads; made by open_file(), or around any file object: File(io.BytesIO()).

    `wrapped`: the file object inside, for what cannot block (name, mode, encoding, fileno()). Text or bytes, as that
    has. `async for line in file` gives lines. Operations of several tasks are done one after the other, in the order of
    calls.

    Errors are those of the file object (OSError, ValueError once closed, UnicodeError). Cancelled while it waits for
    its turn: nothing was done. Cancelled while the thread works: the operation is completed and its result returned, so
    that nothing is lost; the next checkpoint raises. A thread cannot be interrupted: a disk that hangs makes its caller
    hang.
    """

    def __init__(self, file):
        self.wrapped = file
        self._lock = flowcoro.Lock()

    read = _threaded_file_method("read", "Up to so many bytes or characters, by default all; empty at the end.")
    readline = _threaded_file_method("readline", "One line with its end; empty at the end of the file.")
    readlines = _threaded_file_method("readlines", "A list of lines, about as long as the hint says; by default all.")
    readinto = _threaded_file_method("readinto", "Fill a buffer; returns how many bytes there were, 0 at the end.")
    write = _threaded_file_method("write", "Write all; returns how many bytes or characters.")
    writelines = _threaded_file_method("writelines", "Write each item of an iterable.")
    seek = _threaded_file_method("seek", "Go to a position; returns it.")
    tell = _threaded_file_method("tell", "The position.")
    truncate = _threaded_file_method("truncate", "Cut to so many bytes, by default at the position; returns the size.")
    flush = _threaded_file_method("flush", "Hand what is buffered to the operating system.")

    async def close(self):
        """Flush and close, even when cancelled: the cancellation goes on afterwards. Twice is once. Errors: as
        write()."""
        with flowcoro.CancelScope(shield=True):
            async with self._lock:      # its own limiter: cleanup does not queue behind forty threads that hang
                await flowcoro.to_thread(self.wrapped.close, limiter=flowcoro.Semaphore(1))

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        if isinstance(error, GeneratorExit):    # closed by force: nothing can be awaited
            self.wrapped.close()
        else:
            await self.close()

    def __aiter__(self):
        return self

    async def __anext__(self):
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    def __repr__(self):
        return f"<File around {self.wrapped!r}>"


class _Opening:
    """What open_file() returns: opens on entry, closes on exit."""

    def __init__(self, *args):
        self._args, self._file, self._entered = args, None, False

    async def __aenter__(self):
        if self._entered:
            raise RuntimeError("an open_file() serves one `async with`; make a new one")
        self._entered = True
        self._file = File(await flowcoro.to_thread(open, *self._args))
        return self._file

    async def __aexit__(self, *error):
        await self._file.__aexit__(*error)


def open_file(path, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
    """`async with open_file(path, "w") as file:` opens a file in a thread, gives a File, and closes it after the block.

    Arguments and errors as those of the built-in open(): OSError, ValueError, LookupError for an encoding. Cancelled
    while it opens: the file is opened, and closed again at the block's first checkpoint.
    """
    return _Opening(path, mode, buffering, encoding, errors, newline)


# ---- paths ----------------------------------------------------------------------------------------------------

def _call_path_method(path, name, convert, args, kwargs):
    args = [pathlib.Path(arg) if isinstance(arg, Path) else arg for arg in args]    # pathlib calls methods of some
    kwargs = {key: pathlib.Path(arg) if isinstance(arg, Path) else arg for key, arg in kwargs.items()}
    result = getattr(pathlib.Path(path), name)(*args, **kwargs)
    return result if convert is None else convert(result)


def _threaded_path_method(name, convert=None):
    async def method(self, *args, **kwargs):
        return await flowcoro.to_thread(_call_path_method, self, name, convert, args, kwargs)

    method.__name__, method.__qualname__ = name, f"Path.{name}"
    but = "" if convert is None else ", but for flowcoro_os.Path" if convert is Path else ", but for a list of flowcoro_os.Path"
    method.__doc__ = f"As pathlib.Path.{name}(), in a thread; arguments, errors and result are the same{but}."
    return method


class Path(type(pathlib.PurePath())):
    """A path of the file system: pathlib.Path, but what asks the system is async and runs in a thread.

    Async are exists, is_file, is_dir, is_symlink, is_mount, stat, lstat, owner, group, samefile, read_bytes, read_text,
    write_bytes, write_text, mkdir, rmdir, touch, unlink, chmod, symlink_to, hardlink_to, rename, replace, resolve,
    absolute, expanduser, readlink, iterdir, glob, rglob, cwd and home.
    What only computes (`/`, name, parent, suffix, with_name(), match() …) is plain, inherited from pathlib.PurePath.
    iterdir(), glob() and rglob() return lists. Cancelled: the operation is done all the same, and the next checkpoint
    raises.
    """

    __slots__ = ()

    def open(self, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
        """`async with path.open() as file:`, as open_file(path, …)."""
        return open_file(self, mode, buffering, encoding, errors, newline)

    @classmethod
    async def cwd(cls):
        """The current directory. OSError when it is gone."""
        return cls(await flowcoro.to_thread(os.getcwd))

    @classmethod
    async def home(cls):
        """The user's home directory. RuntimeError when there is none."""
        return cls(await flowcoro.to_thread(pathlib.Path.home))


def _paths(found):
    return [Path(path) for path in found]


for _convert, _names in (
        (None, "exists is_file is_dir is_symlink is_mount stat lstat owner group samefile read_bytes read_text "
               "write_bytes write_text mkdir rmdir touch unlink chmod symlink_to hardlink_to"),
        (Path, "rename replace resolve absolute expanduser readlink"),
        (_paths, "iterdir glob rglob")):
    for _name in _names.split():
        setattr(Path, _name, _threaded_path_method(_name, _convert))
