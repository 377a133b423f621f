"""flowcoro_testing 0.1.0: test coroutine code without sleeping, in every order, and with the same result each time.

To vendor, copy: flowcoro.py, flowcoro_testing.py

Example:

    import flowcoro
    from flowcoro_testing import run_in_kernel

    @run_in_kernel
    async def test_a_year_is_over_at_once():
        before = flowcoro.now()
        await flowcoro.sleep(365 * 24 * 3600)
        assert flowcoro.now() - before == 365 * 24 * 3600

    test_a_year_is_over_at_once()       # pytest and unittest call it for you

Contents: constants · the virtual clock · waiting for quiet · asserting checkpoints · running tests in a kernel · sockets in
memory · the simulated network: sockets, hosts, the network

How it works:

A *virtual clock* stands still while any task can run. When nothing is ready the kernel asks the clock how long to
wait; this one jumps to the next deadline and answers 0. So timeouts and sleeps cost nothing and happen in the exact
order of their deadlines. Threads and descriptors stay real: while a to_thread() call is under way the clock does not
move, and what the selector has to report comes before a jump.

A *seed* makes the kernel take ready tasks in random order, the same for the same seed: what holds for a hundred
orders does not hold by luck. explore() runs a test under many and names the one that failed.

Quiet is noticed by two hooks: before_poll says that nothing is ready, after_poll that the descriptors had nothing
either. Checkpoints are noticed by `task.budget`: below 0 it makes the next operation a checkpoint even if it need not
wait, and the kernel sets it anew when a task yields or parks; a mark in it that is still there has seen none.

A *simulated network* is an object that stands where the operating system's sockets would (flowcoro.network): code built on
sockets runs on it unchanged. Packets and timers are entries of one heap, and one task, the pump, lets them happen in the
order of their times; it exists while anything is under way, so that the kernel still sees a deadlock. All chance comes from
one generator, and nothing is iterated in an order that could differ, so the same seed gives the same trace, to the byte.
Invariants: a connection stands in its host's table from its SYN until both ends know that it is over; whatever arrives for
what is not there is answered with a reset; each wait for time is an entry of the heap that comes up, or is forgotten.

Sources: trio's testing module (autojump clock, wait_all_tasks_blocked, assert_checkpoints, memory streams); FoundationDB's
simulation, "Testing Distributed Systems w/ Deterministic Simulation"; TigerBeetle's VOPR; turmoil (tokio); PCT (Burckhardt
et al., ASPLOS 2010) on how few orders find most bugs. RFC 9293 (TCP), RFC 6298 (its timer), RFC 768 (UDP), and Linux for
errors and limits.

What it does not do: it makes no order that the kernel itself could not make, and knows nothing of threads' orders. Of TCP:
no congestion control (see bandwidth), urgent data, keep-alive; no Unix sockets, no broadcast, no errors on the wire. What
draws its chance elsewhere, such as TLS its keys, sends other bytes in each run, at the same times as a rule.

SPDX-License-Identifier: MIT
"""

import collections
import collections.abc
import contextvars
import errno
import functools
import heapq
import inspect
import ipaddress
import itertools
import math
import numbers
import os
import random
import socket
import struct
import sys
import warnings
import weakref
import zlib

import flowcoro

__version__ = "0.1.0"

__all__ = ["VirtualClock", "run_in_kernel", "explore", "wait_all_tasks_parked", "assert_checkpoints",
           "assert_no_checkpoints", "memory_socket_pair", "SimulatedNetwork", "SimulatedHost", "HostCrashed"]

# ---- constants ------------------------------------------------------------------------------------------------

# What the budget is set to while a block is watched. The kernel never sets one below 0, and none above 0 would do: an
# operation that need not wait counts it down instead of being cancelled, where a cancelled task's budget is 0.
_MARK = -1

# Directions, as flowcoro.Pollable has them.
READ, WRITE, HANGUP = 1, 2, 4

# Flags of calls that change nothing here, and those of a socket's type, as ints: an enum works each "|" out anew.
_HARMLESS = int(socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0) | getattr(socket, "MSG_MORE", 0))
_TYPE_FLAGS = int(getattr(socket, "SOCK_NONBLOCK", 0) | getattr(socket, "SOCK_CLOEXEC", 0))

# Bytes that wait on each side of a stream, unless SO_RCVBUF and SO_SNDBUF say otherwise: enough for throughput, and so few that
# a test meets back-pressure. Linux begins with 16 to 128 KiB.
BUFFER = 64 * 2**10

# Bytes of datagrams that wait in a socket: net.core.rmem_default of Linux.
DATAGRAM_BUFFER = 212_992

# Bytes of one datagram: 65,535 less the headers of IPv4 and UDP.
LONGEST_DATAGRAM = 65_507

# Bytes of data in one segment at most: what network cards are handed is up to 64 KiB; less, for more to happen.
SEGMENT = 16 * 2**10

# Bytes of the headers of a packet: IPv4 and TCP without options.
HEADER = 40

# Bytes that wait for a slow link before further datagrams are dropped.
LINK_QUEUE = 256 * 2**10

# SYNs are sent again after 1, 2, 4, … seconds, six times: after 127 s connect fails with ETIMEDOUT (tcp_syn_retries of Linux).
SYN_SECONDS, SYN_RETRIES = 1.0, 6

# The shortest and the longest time until a segment is sent again, in seconds, and how often: after about 15 minutes the
# connection fails with ETIMEDOUT (TCP_RTO_MIN, TCP_RTO_MAX and tcp_retries2 of Linux).
RETRY_SECONDS, LONGEST_RETRY, RETRIES = 0.2, 120.0, 15

# Seconds after which a listener forgets who has not finished the handshake (Linux: five retries, 63 s).
HALF_OPEN_SECONDS = 63.0

# Seconds for which the end of a connection is remembered, and for which one that was closed here waits for the end that the
# peer has to say: TCP_TIMEWAIT_LEN and tcp_fin_timeout of Linux.
LINGER_SECONDS = 60.0

# Seconds of the way from a host to itself.
LOOPBACK_SECONDS = 25e-6

# Ports for those who do not ask for one: net.ipv4.ip_local_port_range of Linux.
FIRST_PORT, LAST_PORT = 32_768, 60_999

# Services by name.
SERVICES = {"ftp": 21, "ssh": 22, "smtp": 25, "domain": 53, "http": 80, "https": 443}

# What fileno() says in memory: from here on no descriptor of the system is found, for their number is limited (NR_OPEN).
_NUMBERS = itertools.count(2**30)


# ---- the virtual clock ----------------------------------------------------------------------------------------

class VirtualClock:
    """A clock for flowcoro.run(clock=…) that jumps to the next deadline as soon as all tasks are parked.

    start: what now() says at first, in seconds. One clock serves one run at a time.
    """

    def __init__(self, start=0.0):
        if not isinstance(start, numbers.Real):
            raise TypeError(f"VirtualClock(start={start!r}): give a number of seconds")
        if not -math.inf < start < math.inf:
            raise ValueError(f"VirtualClock(start={start!r}): give a finite number of seconds")
        self._now = float(start)

    def now(self):
        """The virtual time in seconds."""
        return self._now

    def idle(self, timeout):
        """The kernel has nothing to do for `timeout` seconds: let them pass. Returns 0, the seconds to really wait."""
        self._now += timeout
        return 0.0

    def advance(self, seconds):
        """Let time pass while tasks run, as a slow computation would. ValueError if negative, infinite or nan."""
        if not isinstance(seconds, numbers.Real):
            raise TypeError(f"advance({seconds!r}): give a number of seconds")
        if not 0 <= seconds < math.inf:
            raise ValueError(f"advance({seconds!r}): seconds must be 0 or more, and finite")
        self._now += seconds

    def __repr__(self):
        return f"<VirtualClock {self._now:.3f}>"


# ---- waiting for quiet ----------------------------------------------------------------------------------------

class _Quiet:
    """Hooks that wake the task in their lot, with True, when nothing else is ready and no descriptor is either."""

    def __init__(self):
        self.lot, self.scope = flowcoro.ParkingLot("wait until all tasks are parked"), None
        self.steps = -1                                 # not known: after_poll comes first while others are busy

    def before_poll(self, timeout):
        self.steps = flowcoro.statistics()["steps"]     # so far; if there are more later, something was ready
        # Until a deadline just ahead, the kernel looks at descriptors. 1 ms: epoll's shortest, if the clock is real.
        now = flowcoro.now()                            # nextafter: so far from 0 that a millisecond is nothing
        self.scope.deadline = max(now + 0.001, math.nextafter(now, math.inf))

    def after_poll(self, events):
        numbers = flowcoro.statistics()
        others = numbers["workers"]["count"] - 1
        if events == 0 and self.steps == numbers["steps"] and numbers["workers"]["asleep"] == others and (
                not numbers["tasks"]["ready"]):
            self.lot.unpark_all(True)


async def wait_all_tasks_parked():
    """Wait until every other task is parked: nothing more happens before time passes or the world outside acts.

    It returns before a virtual clock jumps, and after what the descriptors have to report by now. Several tasks may
    wait; all are woken. Cancelled: nothing is left behind.
    """
    quiet, reached = _Quiet(), False
    flowcoro.add_hooks(quiet)
    try:
        while not reached:          # a real clock may come to that deadline while a descriptor is served
            with flowcoro.CancelScope() as quiet.scope:
                reached = await quiet.lot.park()
    finally:
        flowcoro.remove_hooks(quiet)


# ---- asserting checkpoints ------------------------------------------------------------------------------------

class _Watched:
    """A block of which is known whether it has passed a checkpoint. A cancel counts as one."""

    # A class, because what contextlib makes of a function sets the traceback of errors that pass, which may be frozen.

    def __init__(self, expected, complaint):
        self.expected, self.complaint = expected, complaint

    def __enter__(self):
        self.task = flowcoro.current_task()
        self.before, self.task.budget = self.task.budget, _MARK

    def __exit__(self, kind, error, trace):
        passed = self.task.budget != _MARK
        if not passed:
            self.task.budget = self.before
        if error is None and passed != self.expected:
            raise AssertionError(self.complaint)


def assert_checkpoints():
    """`with assert_checkpoints():` fails with AssertionError if its block passes no checkpoint (unless it raises)."""
    return _Watched(True, "the block passed no checkpoint: it could not be cancelled, and gave no other task a turn")


def assert_no_checkpoints():
    """`with assert_no_checkpoints():` fails with AssertionError if its block passes a checkpoint (unless it raises)."""
    return _Watched(False, "the block passed a checkpoint: other tasks may have run in between, and it can be cancelled")


# ---- running tests in a kernel --------------------------------------------------------------------------------

def _run(make, repeat, *, clock=None, seed=None, timeout=None, **options):
    """flowcoro.run(make(), …) with a fresh virtual clock; an error leaves with a note that says how to repeat it."""
    async def bounded():
        with flowcoro.timeout(math.inf if timeout is None else timeout):
            return await make()

    clock = VirtualClock() if clock is None else clock() if callable(clock) else clock
    if isinstance(seed, str) and seed.removeprefix("-").isdecimal():
        seed = int(seed)            # text from the environment; 7 and "7" would be two orders
    main = bounded()
    try:
        return flowcoro.run(main, clock=clock, seed=seed, **options)
    except BaseException as error:
        main.close()                # run() may have refused the options and never looked at it
        if seed is not None:
            note = f"seed {seed!r}: {repeat} repeats this order of tasks"
            try:
                error.add_note(note)
            except Exception:       # a frozen dataclass
                print(note, file=sys.stderr)
        raise


def run_in_kernel(function=None, *, clock=None, seed=None, timeout=None, **options):
    """Make a test out of an async function: `@run_in_kernel` or `@run_in_kernel(seed=7, timeout=60)`.

    Each call gets a kernel of its own. clock: one, or a function that makes one; by default a fresh VirtualClock.
    seed: the order of ready tasks; by default that of the environment variable FLOWCORO_SEED, if there is one.
    timeout: seconds on that clock. More options go to flowcoro.run(). For pytest, with fixtures, and unittest's methods.
    """
    if function is None:
        return functools.partial(run_in_kernel, clock=clock, seed=seed, timeout=timeout, **options)
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"@run_in_kernel decorates an async function, got {function!r}")

    @functools.wraps(function)
    def test(*args, **kwargs):
        chosen = (os.environ.get("FLOWCORO_SEED") or None) if seed is None else seed
        return _run(lambda: function(*args, **kwargs), f"FLOWCORO_SEED={chosen}", clock=clock, seed=chosen,
                    timeout=timeout, **options)

    return test


def explore(test, seeds=range(100), **options):
    """Run the async function `test`, which takes no arguments, once for each seed; return how many times that was.

    The first error ends it and leaves with a note that names the seed. Options are those of run_in_kernel().
    """
    if not inspect.iscoroutinefunction(test):
        raise TypeError(f"explore() takes an async function without arguments, got {test!r}")
    if not isinstance(seeds, collections.abc.Iterable):
        raise TypeError(f"explore(seeds={seeds!r}): give several, such as range({seeds!r})")
    count, name = 0, getattr(test, "__name__", repr(test))
    for count, seed in enumerate(seeds, 1):
        _run(test, f"explore({name}, seeds=[{seed!r}])", seed=seed, **options)
    if not count:
        raise ValueError(f"explore(seeds={seeds!r}): there was no seed, and {name} has not run; give one or more")
    return count


# ---- sockets in memory ----------------------------------------------------------------------------------------
# A *raw* socket has the methods of a socket.socket that never blocks, and raises the OSErrors that the system would. What is
# built on sockets (flowcoro_net) cannot tell the difference, except that fileno() is no descriptor of the system.

def _os_error(number):
    """The OSError (BlockingIOError, ConnectionResetError, …) that a system call with this errno raises."""
    return OSError(number, os.strerror(number))


def _count(value, least, said, what):
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{said}={value!r}: give {what}, an int")
    if value < least:
        raise ValueError(f"{said}={value!r}: give {what}, {least} or more")
    return value


def _bytes_of(data):
    """All of a bytes-like object, whatever its items are."""
    return memoryview(data).cast("B")


class _Watch:
    """To a raw socket in memory what flowcoro.Pollable is to a descriptor: flags that edges set, and a place to wait for each."""

    __slots__ = ("fd", "raw", "readable", "writable", "hangup", "_closed", "_readers", "_writers")

    def __init__(self, raw):
        self.fd = raw.fileno()
        if self.fd < 0:
            raise _os_error(errno.EBADF)
        if raw.watch is not None:
            raise flowcoro.BusyError(f"{raw.name} has a pollable already; close() that first")
        self.raw, raw.watch = raw, self
        self.readable = self.writable = True
        self.hangup = raw.hung_up
        self._closed = False
        self._readers, self._writers = flowcoro.ParkingLot(), flowcoro.ParkingLot()

    async def wait_readable(self):
        """Return when there is something to read, or the end. BusyError, ClosedError. Cancelled: nothing consumed."""
        await self._wait("readable", "read", self._readers)

    async def wait_writable(self):
        """Return when there is room to write, or the connection is broken. BusyError, ClosedError."""
        await self._wait("writable", "written", self._writers)

    async def _wait(self, flag, done, lot):
        task = flowcoro.current_task()
        if task.budget > 0:                 # as a Pollable: a point of scheduling only if it has to be
            task.budget -= 1
        else:
            await flowcoro.checkpoint()
        if self.raw.owed:
            self._pay()
        if getattr(self, flag) and not self._closed:
            return
        lot.reason = f"wait until {self.raw.name} is {flag}"
        self.raw.wait_begins()
        try:
            await lot.park_unless(functools.partial(self._is_ready, flag, done, lot))
        finally:
            self.raw.wait_ends()

    @flowcoro.atomic
    def _pay(self):
        """Not in the call that was short, but later, as the system's edges come: who sees a short read unsets the flag then."""
        bits, self.raw.owed = self.raw.owed, 0
        self.ready(bits)

    def _is_ready(self, flag, done, lot):
        if self._closed:
            raise flowcoro.ClosedError(f"{self.raw.name} has been closed here")
        if getattr(self, flag):
            return True
        if len(lot):
            raise flowcoro.BusyError(f"{self.raw.name} is being {done} by another task already; one task at a time")
        return False

    @flowcoro.atomic
    def ready(self, bits):
        """An edge: something has changed."""
        if bits & HANGUP:
            self.hangup = True
        if bits & READ:
            self.readable = True
            self._readers.unpark_all(True)
        if bits & WRITE:
            self.writable = True
            self._writers.unpark_all(True)

    @flowcoro.atomic
    def close(self):
        """Stop watching (the socket itself stays open); those who wait get ClosedError. Twice is once."""
        if not self._closed:
            self._closed, self.raw.watch = True, None
            for lot in self._readers, self._writers:
                lot.unpark_all(error=flowcoro.ClosedError(
                    f"{self.raw.name} was closed here while this task waited for it"))

    def __repr__(self):
        return f"<pollable of {self.raw.name}{' closed' if self._closed else ''}>"


class _Raw:
    """What all raw sockets in memory share: options, and the many forms of receiving and sending, made of _take and _give."""

    def __init__(self, network, family, kind, proto, name):
        self.network, self.family, self.type, self.proto, self.name = network, family, kind, proto, name
        self.watch = None               # its pollable, while it has one
        self.hung_up = False            # the peer has closed or reset
        self._number, self._closed = next(_NUMBERS), False
        self.owed = 0                   # edges for calls that were short and yet leave it ready: who waits next gets them
        self._lost = False              # its host has crashed, and nobody will close it
        self._error = 0                 # errno of what went wrong meanwhile; the next call raises it, once
        self._options = {}
        self._limit_in = self._limit_out = BUFFER

    # -- what the system does for any descriptor

    def fileno(self):
        """A number that is no descriptor of the system: who takes it for one gets EBADF. -1 once closed."""
        return -1 if self._closed else self._number

    def detach(self):
        """OSError: there is no descriptor that could live on without this object."""
        raise _os_error(errno.EOPNOTSUPP)

    def setblocking(self, flag):
        if flag:
            raise ValueError(f"{self.name} exists in memory only and cannot block a thread; it is non-blocking as it comes")

    def settimeout(self, seconds):
        self.setblocking(seconds is None or seconds > 0)

    def gettimeout(self):
        return 0.0

    def getblocking(self):
        return False

    def close(self):
        """Close it as the system would. Twice is once."""
        if not self._closed:
            self._shut_down_for_good()
            self._closed = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __del__(self):
        if not getattr(self, "_closed", True) and not self._lost:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self)

    def __repr__(self):
        return f"<{self.name}{' closed' if self._closed else ''}>"

    def wait_begins(self):
        """A task waits for it."""

    def wait_ends(self):
        """It does so no more."""

    def edge(self, bits):
        """Tell those who wait."""
        if bits & HANGUP:
            self.hung_up = True
        if self.watch is not None:
            self.watch.ready(bits)

    # -- options: remembered, and some of them meant

    def setsockopt(self, level, option, value, length=None):
        self._check()
        self._options[level, option] = value
        if level == socket.SOL_SOCKET and option == socket.SO_RCVBUF:
            self._limit_in = max(1, value)
        if level == socket.SOL_SOCKET and option == socket.SO_SNDBUF:
            self._limit_out = max(1, value)

    def getsockopt(self, level, option, buflen=0):
        self._check()
        if level == socket.SOL_SOCKET:
            if option == socket.SO_ERROR:
                number, self._error = self._error, 0
                return number
            if option in (socket.SO_TYPE, socket.SO_RCVBUF, socket.SO_SNDBUF):
                return {socket.SO_TYPE: self.type, socket.SO_RCVBUF: self._limit_in,
                        socket.SO_SNDBUF: self._limit_out}[option]
        value = self._options.get((level, option), 0)
        if buflen and isinstance(value, int):
            return value.to_bytes(4, sys.byteorder, signed=True)[:buflen]
        return value

    def _option(self, level, option):
        return self._options.get((level, option), 0)

    def _lingers_not(self):
        """Whether SO_LINGER says that close() is to reset the connection."""
        return self._option(socket.SOL_SOCKET, socket.SO_LINGER) == struct.pack("ii", 1, 0)

    # -- receiving and sending

    def _check(self, flags=0, allowed=0):
        if self._closed:
            raise _os_error(errno.EBADF)
        if flags and flags & ~(allowed | _HARMLESS):
            raise _os_error(errno.EOPNOTSUPP)

    def _raise_pending(self):
        if self._error:
            number, self._error = self._error, 0
            raise _os_error(number)

    def recv(self, bufsize, flags=0):
        if bufsize < 0:
            raise ValueError("negative buffersize in recv")
        if not bufsize:
            return b""                  # so does Python, without asking the system
        return self._take(bufsize, flags)[0]

    def recvfrom(self, bufsize, flags=0):
        if bufsize < 0:
            raise ValueError("negative buffersize in recvfrom")
        data, _, address = self._take(bufsize, flags)
        return data, address

    def recv_into(self, buffer, nbytes=0, flags=0):
        if not nbytes and not len(_bytes_of(buffer)):
            return 0
        return self.recvfrom_into(buffer, nbytes, flags)[0]

    def recvfrom_into(self, buffer, nbytes=0, flags=0):
        room = _bytes_of(buffer)
        if not 0 <= nbytes <= len(room):
            raise ValueError(f"nbytes={nbytes}: the buffer has {len(room)} bytes")
        data, _, address = self._take(nbytes or len(room), flags)
        room[:len(data)] = data
        return len(data), address

    def recvmsg(self, bufsize, ancbufsize=0, flags=0):
        if bufsize < 0:
            raise ValueError("negative buffersize in recvmsg")
        data, told, address = self._take(bufsize, flags)
        return data, [], told, address

    def recvmsg_into(self, buffers, ancbufsize=0, flags=0):
        rooms = [_bytes_of(buffer) for buffer in buffers]
        data, told, address = self._take(sum(map(len, rooms)), flags)
        rest = memoryview(data)
        for room in rooms:
            piece, rest = rest[:len(room)], rest[len(room):]
            room[:len(piece)] = piece
        return len(data), [], told, address

    def send(self, data, flags=0):
        return self._give(_bytes_of(data), flags, None)

    def sendmsg(self, buffers, ancdata=(), flags=0, address=None):
        if list(ancdata):
            raise _os_error(errno.EOPNOTSUPP)
        return self._give(memoryview(b"".join([_bytes_of(buffer) for buffer in buffers])), flags, address)

    def sendto(self, data, *flags_and_address):
        *flags, address = flags_and_address
        return self._give(_bytes_of(data), flags[0] if flags else 0, address)


class _Stream(_Raw):
    """What all connections in memory share: an inbox, an end, and a side for writing that can be shut."""

    def __init__(self, *args):
        super().__init__(*args)
        self._inbox = bytearray()
        self._done = False              # the peer has said that there is no more
        self._eof = False               # there is no more
        self._deaf = False              # SHUT_RD
        self._shut = False              # SHUT_WR, or broken: what is sent gets EPIPE
        self._full = False              # a send did not find room for all: tell when there is some
        self._most = math.inf           # bytes of one recv or send

    def _is_connected(self):
        return True

    @flowcoro.atomic
    def _take(self, limit, flags):
        self._check(flags, socket.MSG_PEEK)
        if self._inbox and limit:
            data = bytes(self._inbox[:min(limit, self._most)])
            if not flags & socket.MSG_PEEK:
                del self._inbox[:len(data)]
                self._has_read(len(data))
                if len(data) == self._most and self._inbox:
                    self.owed |= READ
            return data, 0, None
        if self._done:                  # also when it was reset after that; to send still tells
            return b"", 0, None
        self._raise_pending()
        if self._eof or self._deaf:
            return b"", 0, None
        if not self._is_connected():
            raise _os_error(errno.ENOTCONN)
        if not limit:
            return b"", 0, None
        raise _os_error(errno.EAGAIN)

    @flowcoro.atomic
    def _give(self, data, flags, address):
        self._check(flags)
        if self.family != socket.AF_UNIX:
            self._raise_pending()
        if self._shut:
            raise _os_error(errno.EPIPE)
        if not self._is_connected():
            raise _os_error(errno.ENOTCONN)
        if address is not None:
            raise _os_error(errno.EISCONN)
        room = max(0, self._room())
        taken = min(len(data), room, self._most)
        if data:
            self._full = taken < len(data) and taken == room
        if taken:
            self._carry(bytes(data[:taken]))
            if taken < min(len(data), room):
                self.owed |= WRITE
        elif data:
            raise _os_error(errno.EAGAIN)
        return taken

    @flowcoro.atomic
    def shutdown(self, how):
        """Half-close: SHUT_WR, SHUT_RD, or both by SHUT_RDWR. OSError: not connected."""
        self._check()
        if how not in (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR):
            raise _os_error(errno.EINVAL)
        if not self._may_shut():
            raise _os_error(errno.ENOTCONN)
        if how != socket.SHUT_WR and not self._deaf:
            self._deaf = True
            self.edge(READ)
        if how != socket.SHUT_RD and not self._shut:
            self._shut = True
            self._say_end()
            self.edge(WRITE)

    def _may_shut(self):
        return True

    def _break(self, number):
        """The connection is gone; what had come can still be read, then errno `number` is raised once (0: never)."""
        self._error = number
        self._eof = self._shut = True
        self.edge(READ | WRITE | HANGUP)


class _MemoryEnd(_Stream):
    """One end of memory_socket_pair(): what is sent stands in the other's inbox at once. As the system's socketpair()."""

    def __init__(self, network, name, capacity, most):
        super().__init__(network, socket.AF_UNIX, socket.SOCK_STREAM, 0, name)
        self._limit_in = capacity
        self._most = most
        self._peer = None

    def getsockname(self):
        self._check()
        return ""

    getpeername = getsockname

    def _room(self):
        if self._peer._deaf or self._peer._closed:
            raise _os_error(errno.EPIPE)
        return self._peer._limit_in - len(self._peer._inbox)

    def _carry(self, data):
        self._peer._inbox += data
        self._peer.edge(READ)

    def _has_read(self, count):
        if self._peer._full:
            self._peer._full = False
            self._peer.edge(WRITE)

    def _say_end(self):
        self._peer._eof = True
        self._peer.edge(READ | HANGUP)

    @flowcoro.atomic
    def _shut_down_for_good(self):
        peer = self._peer
        if not peer._closed:
            peer._eof = peer._shut = True
            if self._inbox:                     # what was sent is lost, and who has sent it is told
                peer._error = errno.ECONNRESET
            peer.edge(READ | WRITE | HANGUP)
        self._inbox.clear()


class _Memory:
    """The network of memory_socket_pair(): it makes no other sockets."""

    def pollable(self, raw):
        return _Watch(raw)

    def socket(self, family=-1, type=-1, proto=0):
        raise _os_error(errno.EAFNOSUPPORT)

    async def getaddrinfo(self, host, port, family=0, type=0, flags=0):
        await flowcoro.checkpoint()
        raise socket.gaierror(socket.EAI_NONAME, f"there is no {host!r}: this network is two sockets in memory")


_MEMORY = _Memory()


def memory_socket_pair(wrap=None, *, capacity=BUFFER, most=None):
    """Two connected stream sockets that exist in memory only, as socket.socketpair() makes them with descriptors.

    wrap: a function that makes of each what is wanted; it is called while flowcoro.network is the network of these two:
    `memory_socket_pair(flowcoro_net.Socket)` gives two Sockets. By default they are raw: they never block, have the methods of
    socket.socket and raise its errors, and `raw.network.pollable(raw)` has the interface of flowcoro.Pollable.
    capacity: bytes that wait in each direction until the sender has to wait. most: bytes that one call sends or receives, 1 for
    a peer that comes in single bytes; None: any number. TypeError, ValueError. Nothing to clean up but close().

    Atomic, with several workers: each call.
    """
    _count(capacity, 1, "capacity", "the bytes that may wait in each direction")
    most = math.inf if most is None else _count(most, 1, "most", "the bytes of one call, or None for any number")
    if wrap is not None and not callable(wrap):
        raise TypeError(f"memory_socket_pair({wrap!r}): give a function that takes a raw socket, such as flowcoro_net.Socket")
    one, other = (_MemoryEnd(_MEMORY, f"memory socket {name}", capacity, most) for name in ("one", "other"))
    one._peer, other._peer = other, one
    if wrap is None:
        return one, other
    before = flowcoro.network.set(_MEMORY)
    try:
        return wrap(one), wrap(other)
    except BaseException:
        one.close()
        other.close()
        raise
    finally:
        flowcoro.network.reset(before)


# ---- the simulated network: sockets ---------------------------------------------------------------------------
# TCP in the small. Each direction of a connection is a row of numbered segments: data, and three that carry none: hello
# (the third step of the handshake), fin, probe. The receiver puts them into order and acknowledges the next number that it
# wants, with the bytes that it has room for. What is not acknowledged in time is sent again, by the oldest first, until there
# is no hope. So loss is delay, a partition is delay until it is healed or the connection times out, and what arrives at a
# host that knows nothing of it (any more) is answered with a reset. A datagram is one packet, and nobody looks after it.

@functools.lru_cache(1024)      # to parse one costs as much as the packet that goes there
def _address(text):
    """The ipaddress object of an address, without its zone; None if it is no address."""
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


@functools.lru_cache(1024)
def _in_one_form(address):
    """The text of an ipaddress object; of an IPv4 address inside IPv6 that of the IPv4 address."""
    return str(getattr(address, "ipv4_mapped", None) or address)


def _is_loopback(text):
    return text == "::1" or text.startswith("127.")


def _kind_of(data):
    """How the trace shows data: its length and a checksum, for two runs that differ must not look the same."""
    return f"{len(data)} bytes {zlib.crc32(data):08x}"


class _OnHost:
    """What all simulated sockets share: a host, and a local address as (text, port), which is None until it is bound."""

    local = remote = None
    state = "new"

    def __init__(self, host, family, kind, proto):
        super().__init__(host, family, kind, proto, host.name)
        self.host = host

    def has_addresses(self, local, remote):
        """Take them, and the name that follows, for dumps, messages and the trace: host:port > host:port."""
        self.local, self.remote = local, remote
        self.name = f"{self.host.name}:{local[1]}"
        if remote is not None:
            self.name += f" > {self.host.network.name_of(remote, self.host)}"

    def wait_begins(self):
        self.host.network.timeline.waiting += 1
        self.host.network.timeline.wake_up()

    def wait_ends(self):
        self.host.network.timeline.waiting -= 1

    def note(self, what):
        self.host.note(f"{self.name}: {what}")

    def bind(self, address):
        """Take a local address; port 0: any that is free. OSError (EADDRINUSE, EADDRNOTAVAIL, EINVAL), socket.gaierror."""
        self._check()
        if self.local is not None or self.state != "new":
            raise _os_error(errno.EINVAL)
        text, port = self.host.parse(address, self.family)
        if not (text in ("0.0.0.0", "::", self.host.address, self.host.address6) or _is_loopback(text)
                or self.type == socket.SOCK_DGRAM and _address(text).is_multicast):
            raise _os_error(errno.EADDRNOTAVAIL)
        if port and any(self._conflicts(other, text, port) for other in self.host.bound):
            raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: {self.host.name}:{port}")
        self.has_addresses((text, port or self.host.free_port(self.type)), None)
        self.host.bound[self] = None

    def _conflicts(self, other, text, port):
        if other.type != self.type or other.local[1] != port:
            return False
        theirs = other.local[0]
        anywhere = [wild for wild in (text, theirs) if wild in ("0.0.0.0", "::")]
        if theirs != text and not anywhere:
            return False
        if (":" in text) != (":" in theirs) and ("::" not in anywhere or any(
                each.family == socket.AF_INET6 and each.only_v6() for each in (self, other))):
            return False
        for option in (socket.SO_REUSEPORT, socket.SO_REUSEADDR):
            if self._option(socket.SOL_SOCKET, option) and other._option(socket.SOL_SOCKET, option) and (
                    option == socket.SO_REUSEPORT or other.state != "listening"):
                return False
        return True

    def only_v6(self):
        return bool(self._option(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))

    def takes(self, text, port):
        """How well this bound socket fits what comes for that address: 2 exactly, 1 by a wildcard, 0 not at all."""
        mine, my_port = self.local
        if port != my_port:
            return 0
        if mine == text:
            return 2
        if mine == ("::" if ":" in text else "0.0.0.0"):
            return 1
        return int(mine == "::" and not self.only_v6())

    def outward(self, address):
        """(text, port) in the form that this family has."""
        text, port = address
        if self.family == socket.AF_INET:
            return text, port
        return (text if ":" in text else f"::ffff:{text}"), port, 0, 0

    def getsockname(self):
        self._check()
        return self.outward(self.local or ("0.0.0.0" if self.family == socket.AF_INET else "::", 0))

    def getpeername(self):
        self._check()
        if self.remote is None or self.state in ("connecting", "over"):
            raise _os_error(errno.ENOTCONN)
        return self.outward(self.remote)

    def connect(self, address):
        """As connect_ex(), but raises its errno: BlockingIOError (EINPROGRESS) as a rule."""
        number = self.connect_ex(address)
        if number:
            raise _os_error(number)

    def _source_for(self, text):
        """The local address from which packets to `text` go."""
        if self.local is not None and self.local[0] not in ("0.0.0.0", "::"):
            return self.local[0]
        if _is_loopback(text):
            return text
        return self.host.address6 if ":" in text else self.host.address


class _Transfer(_OnHost, _Stream):
    """How the two ends of a connection bring each other segments: numbers, acknowledgements, windows, the timer."""

    def __init__(self, *args):
        super().__init__(*args)
        # (local text, port, remote text, port): the name of the connection on this host, and on the other
        self.key = self.peer_key = None
        self.peer_host = None
        # sending
        self._outbox = bytearray()
        self._next, self._unacked = 0, {}           # the number of the next segment; number -> (kind, data)
        self._sent, self._window = 0, 0             # bytes that were sent, and may be, in all
        self._timer, self._retries = None, 0
        self._fin = None                            # "asked", "sent", "acked"
        # receiving
        self._expected, self._ahead = 0, {}         # the number that comes next; what has overtaken it
        self._consumed, self._told = 0, 0           # bytes that were read; the window that the peer was told

    # -- sending

    def _room(self):
        return self._limit_out - len(self._outbox) if self.state == "connected" else 0

    def _carry(self, data):
        self.note(f"sends {_kind_of(data)}")
        self._outbox += data
        self._flush()

    def _say_end(self):
        self.note("shuts down")
        self._fin = "asked"
        self._flush()

    def _flush(self):
        """Send what is in the outbox, as far as the peer has room."""
        random, split = self.host.network.random, self.host.network.split
        while self._outbox and self._window > self._sent:
            size = min(len(self._outbox), self._window - self._sent, SEGMENT)
            if split and size > 1 and random.random() < split:
                size = random.randrange(1, size)
            data = bytes(self._outbox[:size])
            del self._outbox[:size]
            self._sent += size
            self._segment("data", data)
        if self._fin == "asked" and not self._outbox:
            self._fin = "sent"
            self._segment("fin", b"")

    def _segment(self, kind, data):
        number, self._next = self._next, self._next + 1
        self._unacked[number] = kind, data
        self._transmit(number)
        if self._timer is None:
            self._start_timer()

    def _transmit(self, number):
        kind, data = self._unacked[number]
        shown = _kind_of(data) if kind == "data" else kind
        self._packet(f"#{number} {shown}", "SEGMENT", number, kind, data, size=len(data))

    def _packet(self, what, kind, *message, size=0, lost=None):
        network = self.host.network
        network.transmit(self.host, self.peer_host, HEADER + size, what, self.peer_host.take, kind, self.peer_key, *message,
                         lost=lost)

    def _start_timer(self):
        link = self.host.network.link
        there, back = link(self.host, self.peer_host), link(self.peer_host, self.host)
        queued = max(0.0, there.busy_until - flowcoro.now())
        patience = RETRY_SECONDS + 2 * (there.latency + there.jitter + back.latency + back.jitter) + queued
        self._timer = self.host.network.timeline.after(min(patience * 2 ** self._retries, LONGEST_RETRY), self._send_again)

    def _stop_timer(self):
        if self._timer is not None:
            self.host.network.timeline.forget(self._timer)
        self._timer, self._retries = None, 0

    def _send_again(self):
        self._timer = None
        self._retries += 1
        if self._retries > RETRIES:
            self.note("gives up: nobody answers")
            self._fail(errno.ETIMEDOUT)
            return
        number = next(iter(self._unacked))
        self.note(f"sends #{number} again")
        self._transmit(number)
        self._start_timer()

    def on_ack(self, expected, window):
        answered = [number for number in self._unacked if number < expected]
        for number in answered:
            if self._unacked.pop(number)[0] == "fin":
                self._fin = "acked"
        if answered:
            self._stop_timer()
            if self._unacked:
                self._start_timer()
        self._window = max(self._window, window)
        self._flush()
        if self._full and self._room() > 0:
            self._full = False
            self.edge(WRITE)
        self._leave_if_done()

    def probe(self):
        """The peer may have told in vain that it has room: ask it, again and again, unless it is being asked already."""
        if self.state == "connected" and not self._unacked and self._outbox:
            self._segment("probe", b"")

    # -- receiving

    def on_segment(self, number, kind, data):
        if number >= self._expected:
            self._ahead[number] = kind, data
        while self._expected in self._ahead:
            kind, data = self._ahead.pop(self._expected)
            self._expected += 1
            if kind == "data" and self._deaf and self._fin is not None or (
                    kind == "hello" and self._listener.state != "listening"):
                self.note("is closed: resets")
                self.host.send_reset(self.key)
                self._fail(errno.ECONNRESET)
                return
            self._arrived(kind, data)
        self._acknowledge()
        self._leave_if_done()

    def _arrived(self, kind, data):
        if kind == "hello":
            self._go("hello")
            del self._listener._half_open[self]
            self._listener._queue.append(self)
            self._listener.edge(READ)
        elif kind == "data":
            self._inbox += data
            self.edge(READ)
        elif kind == "fin":
            self._done = self._eof = True
            self.edge(READ | HANGUP)

    def _acknowledge(self, lost=None):
        self._told = self._consumed + self._limit_in
        self._packet(f"ACK {self._expected}", "ACK", self._expected, self._told, lost=lost)

    def _has_read(self, count):
        self._consumed += count
        if self.state == "connected" and not self._eof and (
                self._consumed + self._limit_in - self._told >= max(1, self._limit_in // 2)):
            self._acknowledge(lost=self._told_in_vain)

    def _told_in_vain(self):
        peer = self.peer_host.connections.get(self.peer_key)
        if peer is not None:
            peer.probe()


class _Connection(_Transfer):
    """A simulated TCP socket: new, listening, or one end of a connection."""

    # (state, event) -> state. A listening or new socket that ends is only closed; all else is an error of this module.
    NEXT = {
        ("new", "listen"): "listening", ("listening", "listen"): "listening",
        ("new", "connect"): "connecting", ("connecting", "syn-ack"): "connected",
        ("new", "syn"): "half-open", ("half-open", "hello"): "connected",
        ("new", "end"): "over", ("listening", "end"): "over",
        ("connecting", "end"): "over", ("half-open", "end"): "over", ("connected", "end"): "over",
    }

    # kind of a packet -> the method that takes it
    TAKES = {"SYN-ACK": "on_syn_ack", "SEGMENT": "on_segment", "ACK": "on_ack", "RST": "on_reset"}

    def __init__(self, host, family, proto=0):
        super().__init__(host, family, socket.SOCK_STREAM, proto)
        self._orphan = False            # the program has closed it, and the system brings what is left to its end
        self._backlog, self._queue, self._half_open, self._listener = 0, collections.deque(), {}, None

    def _go(self, event):
        self.state = self.NEXT[self.state, event]

    def _is_connected(self):
        return self.state in ("connecting", "connected", "over") and self.key is not None

    def _may_shut(self):
        return self.state == "connected"

    # -- what a program calls

    def listen(self, backlog=128):
        """Accept connections, of which about `backlog` may wait for accept(). OSError: EADDRINUSE, EINVAL."""
        self._check()
        if (self.state, "listen") not in self.NEXT:
            raise _os_error(errno.EINVAL)
        if self.local is None:
            self.bind(("", 0))
        for other in self.host.bound:
            if other is not self and other.state == "listening" and self._conflicts(other, *self.local):
                raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: {self.name}")
        self._go("listen")
        self._backlog = max(0, backlog)
        self.note("listens")

    def accept(self):
        """(raw, address) of the oldest connection that waits. BlockingIOError: none. OSError: EMFILE, EINVAL."""
        self._check()
        if self.state != "listening":
            raise _os_error(errno.EINVAL)
        if not self._queue:
            raise _os_error(errno.EAGAIN)
        self.host.check_limit()
        raw = self._queue.popleft()
        raw._closed = False
        self.host.open[raw] = None
        raw.note("accepted")
        return raw, raw.outward(raw.remote)

    def connect_ex(self, address):
        """Begin to connect; returns errno.EINPROGRESS, or why it cannot. Writable says that it is over, SO_ERROR how."""
        self._check()
        if self.state != "new":
            return {"connecting": errno.EALREADY, "over": errno.ECONNABORTED}.get(self.state, errno.EISCONN)
        text, port = self.host.parse(address, self.family)
        if text in ("0.0.0.0", "::"):
            text = "127.0.0.1" if text == "0.0.0.0" else "::1"
        peer = self.host.network.host_at(text, self.host)
        if peer is None:
            return errno.ENETUNREACH
        source = self._source_for(text), self.local[1] if self.local else self.host.free_port(self.type)
        key = *source, text, port
        if key in self.host.connections:
            return errno.EADDRINUSE
        self._go("connect")
        self.has_addresses(source, (text, port))
        self.key, self.peer_key, self.peer_host = key, (text, port, *source), peer
        self.host.connections[key] = self
        self.note("connects")
        self._send_syn()
        return errno.EINPROGRESS

    def _shut_down_for_good(self):
        self.host.open.pop(self, None)
        self.host.bound.pop(self, None)
        if self.state == "connected":
            self._orphan = self._deaf = True
            if self._inbox or self._lingers_not():
                self.note("closed, resets")
                self._abort()
                return
            self.note("closed")
            if not self._shut:
                self._shut = True
                self._say_end()
            self._leave_if_done()
        elif self.state != "over":
            self.note("closed")
            for raw in [*self._queue, *self._half_open]:
                raw._abort()
            self._end()

    # -- the life of a connection

    def _send_syn(self):
        if self._retries > SYN_RETRIES:
            self.note("gives up to connect")
            self._fail(errno.ETIMEDOUT)
            return
        self._packet("SYN", "SYN", self._limit_in, self.family)
        self._timer = self.host.network.timeline.after(SYN_SECONDS * 2 ** self._retries, self._send_syn)
        self._retries += 1

    def begin_half_open(self, listener, key, window):
        """A SYN has come for `listener`."""
        self._closed = True             # no program holds it yet
        self._go("syn")
        self.has_addresses(key[:2], key[2:])
        self._listener, self.key, self.peer_key, self._window = listener, key, (*key[2:], *key[:2]), window
        self.peer_host = self.host.network.host_at(key[2], self.host)
        self._options, self._limit_in, self._limit_out = (
            dict(listener._options), listener._limit_in, listener._limit_out)
        self.host.connections[key] = self
        listener._half_open[self] = flowcoro.now()

    def answer_syn(self):
        self._told = self._consumed + self._limit_in
        self._packet("SYN-ACK", "SYN-ACK", self._told)

    def has_room(self):
        """Whether this listener takes one more. Half-open ones whose client is gone are forgotten."""
        now = flowcoro.now()
        for raw in [raw for raw, since in self._half_open.items() if now - since > HALF_OPEN_SECONDS]:
            raw._end()
        return len(self._queue) + len(self._half_open) <= self._backlog

    def on_syn_ack(self, window):
        if self.state == "connecting":
            self._go("syn-ack")
            self._stop_timer()
            self._window = window
            self._told = self._limit_in
            self.note("connected")
            self._segment("hello", b"")
            self._full = False
            self.edge(WRITE)

    def on_reset(self):
        if self.state == "half-open" or self._orphan:
            self._end()
        elif self.state == "connecting":
            self._fail(errno.ECONNREFUSED)
        else:
            self._fail(errno.EPIPE if self._done and self._fin is None else errno.ECONNRESET)

    def _abort(self):
        if self.key is not None and self.state != "over":
            self.host.send_reset(self.key)
        self._end()

    def _fail(self, number):
        self._end()
        self._break(number)

    def die(self):
        """The host has crashed, and nobody outside is told."""
        self._lost = True
        self._end()
        self._inbox.clear()
        self._queue.clear()
        self._break(errno.ENETDOWN)

    def _end(self):
        if self.state == "over":
            return
        self._go("end")
        self._stop_timer()
        self._outbox.clear()
        self._unacked.clear()
        self._ahead.clear()
        if self._listener is not None:
            self._listener._half_open.pop(self, None)
        if self.key is not None and self.host.connections.get(self.key) is self:
            del self.host.connections[self.key]

    def _leave_if_done(self):
        """Both ends have said that there is no more, and know that of each other."""
        if self._done and self._fin == "acked" and self.state == "connected":
            self.host.linger(self.key, self._expected)
            self._end()
        elif self._orphan and self._fin == "acked" and self._timer is None and self.state == "connected":
            self._timer = self.host.network.timeline.after(LINGER_SECONDS, self._end)       # (FIN-WAIT-2)


class _Datagrams(_OnHost, _Raw):
    """A simulated UDP socket."""

    def __init__(self, host, family, proto=0):
        super().__init__(host, family, socket.SOCK_DGRAM, proto)
        self._inbox, self._size = collections.deque(), 0
        self.groups = {}                # multicast addresses that it has joined
        self._limit_in = DATAGRAM_BUFFER
        self._shut = self._deaf = False

    def _ensure_bound(self):
        if self.local is None:
            self.bind(("", 0))

    def connect_ex(self, address):
        """Send to, and receive from, that address only. Done at once: 0."""
        self._check()
        text, port = self.host.parse(address, self.family)
        if self.host.network.host_at(text, self.host) is None:
            return errno.ENETUNREACH
        self._ensure_bound()
        self.has_addresses(self.local, (text, port))
        return 0

    def setsockopt(self, level, option, value, length=None):
        super().setsockopt(level, option, value, length)
        if (level, option) in ((socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP), (socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP)):
            group = socket.inet_ntop(socket.AF_INET, bytes(value[:4]))
        elif (level, option) in ((socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP),
                                 (socket.IPPROTO_IPV6, socket.IPV6_LEAVE_GROUP)):
            group = socket.inet_ntop(socket.AF_INET6, bytes(value[:16]))
        else:
            return
        if option in (socket.IP_ADD_MEMBERSHIP, socket.IPV6_JOIN_GROUP):
            self.groups[group] = None
        elif self.groups.pop(group, self) is self:
            raise _os_error(errno.EADDRNOTAVAIL)

    def _take(self, limit, flags):
        self._check(flags, socket.MSG_PEEK)
        self._raise_pending()
        if not self._inbox:
            if self._deaf:
                return b"", 0, None
            raise _os_error(errno.EAGAIN)
        data, source = self._inbox[0]
        if not flags & socket.MSG_PEEK:
            self._inbox.popleft()
            self._size -= len(data)
        return data[:limit], socket.MSG_TRUNC if len(data) > limit else 0, self.outward(source)

    def _give(self, data, flags, address):
        self._check(flags)
        self._raise_pending()
        if self._shut:
            raise _os_error(errno.EPIPE)
        if address is None and self.remote is None:
            raise _os_error(errno.EDESTADDRREQ)
        if len(data) > LONGEST_DATAGRAM:
            raise _os_error(errno.EMSGSIZE)
        target = self.remote if address is None else self.host.parse(address, self.family)
        self._ensure_bound()
        data, network = bytes(data), self.host.network
        if _address(target[0]).is_multicast:
            receivers = [host for host in network.hosts.values() if any(target[0] in raw.groups for raw in host.datagrams())]
        else:
            receivers = [network.host_at(target[0], self.host)]
            if receivers == [None]:
                raise _os_error(errno.ENETUNREACH)
        source = self._source_for(target[0]), self.local[1]
        self.note(f"sends {_kind_of(data)} to {network.name_of(target, self.host)}")
        for host in receivers:
            for _ in range(1 + network.is_doubled(self.host, host)):
                network.transmit(self.host, host, HEADER + len(data), f"datagram {_kind_of(data)}", host.take_datagram, source,
                                 target, data, may_queue=False)
        return len(data)

    def arrived(self, data, source):
        """A datagram has come for this socket. Whether there was room for it."""
        if self._deaf or self._size + len(data) > self._limit_in:
            return False
        self._inbox.append((data, source))
        self._size += len(data)
        self.edge(READ)
        return True

    def refused(self):
        """The other host has answered that nobody listens there."""
        self._error = errno.ECONNREFUSED
        self.edge(READ | WRITE)

    def shutdown(self, how):
        self._check()
        if self.remote is None:
            raise _os_error(errno.ENOTCONN)
        self._deaf |= how in (socket.SHUT_RD, socket.SHUT_RDWR)
        self._shut |= how in (socket.SHUT_WR, socket.SHUT_RDWR)
        self.edge(READ | WRITE)

    def _shut_down_for_good(self):
        self.host.open.pop(self, None)
        self.host.bound.pop(self, None)
        self._inbox.clear()

    def die(self):
        """The host has crashed."""
        self._lost = True
        self._inbox.clear()
        self.state, self._deaf, self._error = "over", True, errno.ENETDOWN
        self.edge(READ | WRITE | HANGUP)


# ---- the simulated network: hosts -----------------------------------------------------------------------------

def _drop(coro):
    """Close what is refused, or it would complain that nobody awaited it."""
    if hasattr(coro, "close"):
        coro.close()


class HostCrashed(flowcoro.FlowCoroError):
    """The simulated host on which this ran has crashed."""


class SimulatedHost:
    """A host of a SimulatedNetwork, made by its host(name). Inside `with host:` sockets are this host's.

    `name`; `address`, `address6`: what its name resolves to; `up`: False between crash() and restart(); `max_sockets`: with so
    many open, the next gets EMFILE (None: no limit). Its methods socket(), pollable() and getaddrinfo() are what
    flowcoro.network is asked for.
    """

    def __init__(self, network, name, number):
        self.network, self.name, self.up, self.max_sockets = network, name, True, None
        self.address, self.address6 = f"10.0.{number >> 8}.{number & 255}", f"fd00::{number:x}"
        # All in order of their making: dicts for sets, because a set has none.
        self.open, self.bound, self.connections = {}, {}, {}
        self._tasks, self._scopes, self._boots = {}, {}, []
        self._lingering = {}            # what a connection that is over has acknowledged: key -> (until, number)
        self._port = FIRST_PORT
        self.crashed_at = -math.inf     # seconds of now(), the last time

    def __repr__(self):
        return f"<SimulatedHost {self.name}{'' if self.up else ' down'}>"

    # -- running on it

    def __enter__(self):
        _outer.set((*_outer.get(), flowcoro.network.get()))
        flowcoro.network.set(self)
        return self

    def __exit__(self, *error):
        *outer, before = _outer.get()
        _outer.set(tuple(outer))
        flowcoro.network.set(before)

    def spawn(self, group, coro, *, name=None):
        """group.spawn(coro), on this host: sockets are its sockets, and if it crashes the task is cancelled.

        So are the tasks of its own groups. Its `finally` blocks run, but nothing that they send leaves the host. Returns the
        Task. TypeError for what is no group. HostCrashed if the host is down.
        """
        self._check_up(coro)
        if not hasattr(group, "spawn"):
            _drop(coro)
            raise TypeError(f"spawn({group!r}, …): give a TaskGroup, in which the task runs")
        with self:
            task = group.spawn(coro, name=name)
        self._tasks = {task: None for task in [*self._tasks, task] if not task.done()}
        return task

    async def run(self, coro):
        """Await `coro` on this host; return its result or raise its error. HostCrashed if the host is down, or crashes."""
        self._check_up(coro)
        with flowcoro.CancelScope() as scope:
            self._scopes[scope] = None
            try:
                with self:
                    return await coro
            finally:
                self._scopes.pop(scope, None)
        raise HostCrashed(f"host {self.name!r} has crashed while this ran on it")

    def boot(self, group, function, *, name=None):
        """spawn(group, function()) now, and again whenever the host is restarted: what a machine starts by itself.

        `function` takes no arguments and returns a coroutine. TypeError. HostCrashed if the host is down.
        """
        if not callable(function):
            raise TypeError(f"boot(group, {function!r}): give a function that makes a coroutine, for each restart makes one")
        task = self.spawn(group, function(), name=name)
        self._boots.append((group, function, name))
        return task

    def note(self, what):
        """Write an event of your own into the trace."""
        self.network.events.append((flowcoro.now(), self.name, what))

    def _check_up(self, coro):
        if not self.up:
            _drop(coro)
            raise HostCrashed(f"host {self.name!r} is down; restart() it first")

    # -- what flowcoro.network is asked for

    def socket(self, family=socket.AF_INET, type=socket.SOCK_STREAM, proto=0):
        """A raw socket of this host. OSError: ENETDOWN, EMFILE, EAFNOSUPPORT, EPROTONOSUPPORT."""
        self.network.begin()
        if not self.up:
            raise _os_error(errno.ENETDOWN)
        if family not in (socket.AF_INET, socket.AF_INET6):
            raise _os_error(errno.EAFNOSUPPORT)
        kind = type & ~_TYPE_FLAGS
        if kind not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            raise _os_error(errno.EPROTONOSUPPORT)
        self.check_limit()
        raw = (_Connection if kind == socket.SOCK_STREAM else _Datagrams)(self, family, proto)
        self.open[raw] = None
        return raw

    def pollable(self, raw):
        """What tells when `raw` is ready, with the interface of flowcoro.Pollable."""
        return _Watch(raw)

    async def getaddrinfo(self, host, port, family=0, type=0, flags=0):
        """As socket.getaddrinfo(), after a round trip to nowhere; the names are those of the network's hosts.

        socket.gaierror for others. Cancelled: nothing is left behind.
        """
        self.network.begin()
        link = self.network.defaults
        text = host.decode() if isinstance(host, bytes) else host
        if text is None or text in ("", "localhost") or _address(text):
            await flowcoro.checkpoint()
        else:
            await flowcoro.sleep(2 * (link.latency + link.jitter * self.network.random.random()))
        port = _port_number(port, type)
        kinds = [(kind, proto) for kind, proto in (
            (socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP)) if type in (0, kind)]
        found, failure = [], socket.gaierror(socket.EAI_FAMILY, "the simulated network has TCP and UDP over IPv4 and IPv6 only")
        for each in (socket.AF_INET, socket.AF_INET6):
            if family not in (0, each):
                continue
            try:
                if text is None:
                    loop = "127.0.0.1" if each == socket.AF_INET else "::1"
                    there = ("" if flags & socket.AI_PASSIVE else loop), port
                else:
                    there = text, port
                if flags & socket.AI_NUMERICHOST and text is not None and not _address(text):
                    raise socket.gaierror(socket.EAI_NONAME, f"{text!r} is no address, as AI_NUMERICHOST demands")
                address, port = self.parse(there, each)
            except socket.gaierror as error:
                failure = error
                continue
            full = (address, port) if each == socket.AF_INET else (address, port, 0, 0)
            found += [(each, kind, proto, "", full) for kind, proto in kinds]
        if not found:
            self.note(f"does not resolve {text!r}")
            raise failure
        return found

    # -- addresses and ports

    def parse(self, address, family):
        """(text, port) of a socket address, which may have a host's name, in one form: IPv4 in IPv6 becomes IPv4."""
        if not isinstance(address, tuple) or len(address) < 2:
            raise TypeError(f"{address!r} is no address: give (host, port)")
        text, port = address[0], address[1]
        if not isinstance(port, int):
            raise TypeError(f"the port in {address!r} must be an int")
        if not 0 <= port <= 65535:
            raise OverflowError(f"the port in {address!r} must be 0-65535")
        v6 = family == socket.AF_INET6
        if text == "":
            return ("::" if v6 else "0.0.0.0"), port
        if text == "localhost":
            return ("::1" if v6 else "127.0.0.1"), port
        if parsed := _address(text):
            if (parsed.version == 6) != v6:
                raise socket.gaierror(getattr(socket, "EAI_ADDRFAMILY", socket.EAI_NONAME),
                                      f"{text} is no address of this family")
            return _in_one_form(parsed), port
        there = self.network.hosts.get(text)
        if there is None:
            raise socket.gaierror(socket.EAI_NONAME, f"the simulated network has no host {text!r}")
        return (there.address6 if v6 else there.address), port

    def free_port(self, kind):
        """A port that no socket of this host uses. OSError: EADDRINUSE."""
        used = {raw.local[1] for raw in self.bound if raw.type == kind} | {key[1] for key in self.connections}
        for _ in range(LAST_PORT - FIRST_PORT + 1):
            port = self._port
            self._port = FIRST_PORT if port == LAST_PORT else port + 1
            if port not in used:
                return port
        raise _os_error(errno.EADDRINUSE)

    def check_limit(self):
        """OSError (EMFILE) if there may be no more sockets."""
        if self.max_sockets is not None and len(self.open) >= self.max_sockets:
            raise _os_error(errno.EMFILE)

    def datagrams(self):
        """The bound sockets for datagrams."""
        return [raw for raw in self.bound if raw.type == socket.SOCK_DGRAM]

    def _best(self, candidates, text, port):
        """Of these bound sockets the one that fits an address best; of those that share a port, any."""
        fitting = [(raw.takes(text, port), raw) for raw in candidates]
        best = max((fit for fit, _ in fitting), default=0)
        if not best:
            return None
        first = [raw for fit, raw in fitting if fit == best]
        return first[0] if len(first) == 1 else self.network.random.choice(first)

    # -- packets that arrive

    def take(self, kind, key, *rest):
        """A packet of TCP for the connection `key`."""
        raw = self.connections.get(key)
        if kind == "SYN":
            self._take_syn(raw, key, *rest)
        elif raw is not None:
            getattr(raw, _Connection.TAKES[kind])(*rest)
        elif kind != "RST":
            until, expected = self._lingering.get(key, (-math.inf, 0))
            if flowcoro.now() > until:
                self.send_reset(key)
            elif kind == "SEGMENT":
                self._answer(key, f"ACK {expected}", "ACK", expected, 0)

    def _take_syn(self, raw, key, window, family):
        listener = None if raw is not None else self._best(
            [bound for bound in self.bound if bound.state == "listening"], *key[:2])
        if raw is not None:
            raw.answer_syn()
        elif listener is None:
            self.note(f"nobody listens on {self.name}:{key[1]}: resets")
            self.send_reset(key)
        elif not listener.has_room():
            self.note(f"{listener.name}: the backlog is full, drops SYN")
        else:
            raw = _Connection(self, listener.family)
            raw.begin_half_open(listener, key, window)
            raw.answer_syn()

    def _answer(self, key, what, kind, *rest):
        peer = self.network.host_at(key[2], self)
        self.network.transmit(self, peer, HEADER, what, peer.take, kind, (*key[2:], *key[:2]), *rest)

    def send_reset(self, key):
        """Tell the other end of `key` that there is no such connection here."""
        self._answer(key, "RST", "RST")

    def linger(self, key, expected):
        """A connection is over; for a while repeat its last word to a peer that has not heard it (TIME-WAIT)."""
        now = flowcoro.now()
        for old, (until, _) in list(self._lingering.items()):       # the oldest come first
            if until > now:
                break
            del self._lingering[old]
        self._lingering[key] = now + LINGER_SECONDS, expected

    def take_datagram(self, source, target, data):
        """A datagram: for all who have joined the group, or one that is bound to the address, or it is refused."""
        text, port = target
        if _address(text).is_multicast:
            fitting = [raw for raw in self.datagrams() if text in raw.groups and raw.local[1] == port]
        else:
            fitting = [raw for raw in self.datagrams() if raw.remote == source and raw.takes(text, port)]
            if not fitting:
                best = self._best([raw for raw in self.datagrams() if raw.remote is None], text, port)
                fitting = [] if best is None else [best]
            if not fitting:
                self.note(f"nobody listens on {self.name}:{port}: refuses")
                peer = self.network.host_at(source[0], self)
                self.network.transmit(self, peer, HEADER, "port unreachable", peer.take_refusal, source, target)
        for raw in fitting:
            if not raw.arrived(data, source):
                self.note(f"{raw.name}: no room, drops {_kind_of(data)}")

    def take_refusal(self, source, target):
        """What was sent from `source` to `target` was refused there."""
        for raw in self.datagrams():
            if raw.remote == target and raw.takes(*source):
                raw.refused()

    # -- crash and restart, for the network

    def go_down(self):
        """The part of crash() that is this host's."""
        self.up = False
        for each in [*self._tasks, *self._scopes]:      # first these, so that no task sees how its sockets die
            each.cancel()
        connections = [*self.connections.values()]
        for raw in {**self.open, **self.bound, **dict.fromkeys(connections)}:
            raw.die()
        for table in self._tasks, self.open, self.bound, self.connections, self._lingering:
            table.clear()
        for raw in connections:
            raw._told_in_vain()

    def go_up(self):
        """The part of restart() that is this host's."""
        self.up = True
        for group, function, name in self._boots:
            self.spawn(group, function(), name=name)


# The networks that were in force where `with host:` began, outermost first. In the context, as flowcoro.network is: several
# tasks may be inside the same `with host:` objects at a time.
_outer = contextvars.ContextVar("flowcoro_testing.outer", default=())


def _port_number(port, kind):
    """What getaddrinfo() makes of None, a number in text, and the few names of services that all systems know."""
    if port is None:
        return 0
    if isinstance(port, int):
        return port
    text = port.decode() if isinstance(port, bytes) else port
    if text.isdecimal():
        return int(text)
    try:
        return SERVICES[text]
    except KeyError:
        raise socket.gaierror(socket.EAI_SERVICE, f"the simulated network knows no service {text!r}; give a number") from None


# ---- the simulated network ------------------------------------------------------------------------------------

def _checked_number(value, name, least, most, what):
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: give {what}")
    if not least <= value <= most:
        raise ValueError(f"{name}={value!r}: give {what}, from {least} to {most}")
    return float(value)


class _Link:
    """One direction between two hosts."""

    __slots__ = ("latency", "jitter", "loss", "duplication", "bandwidth", "cut", "busy_until")

    # name: (the least, the most, what to give)
    SETTINGS = {
        "latency": (0, 1e6, "the seconds that a packet is under way"),
        "jitter": (0, 1e6, "the seconds that it may take longer"),
        "loss": (0, 1, "the probability that a packet gets lost"),
        "duplication": (0, 1, "the probability that a datagram comes twice"),
        "bandwidth": (1, math.inf, "bytes a second, math.inf for no limit"),
    }

    def __init__(self, **settings):
        self.cut = False                # by partition()
        self.busy_until = -math.inf     # when what was sent so far has left
        self.change(**settings)

    def change(self, **settings):
        """All of them, or none if one is wrong."""
        for name, value in {name: _checked_number(value, name, *self.SETTINGS[name]) for name, value in settings.items()}.items():
            setattr(self, name, value)

    def settings(self):
        return {name: getattr(self, name) for name in self.SETTINGS}


class _Timeline:
    """What is going to happen when, and the task, the pump, that lets it happen."""

    def __init__(self):
        self.kernel = None              # a weak reference to that of the run, once it is known
        self.heap, self._serial = [], itertools.count()     # of lists: when, serial number, function, arguments
        self.waiting = 0                # tasks that wait for sockets
        self._pump, self._nap, self._nap_ends = None, None, -math.inf       # the task, the scope of its sleep, and until when

    def after(self, seconds, function, *arguments):
        """Call function(*arguments) in `seconds` from now. Returns what forget() takes."""
        return self.at(flowcoro.now() + seconds, function, *arguments)

    def at(self, when, function, *arguments):
        """As after(), at a time of now()."""
        entry = [when, next(self._serial), function, arguments]
        heapq.heappush(self.heap, entry)
        self.wake_up(when)
        return entry

    def forget(self, entry):
        """Do not call it."""
        entry[2] = entry[3] = None

    def wake_up(self, when=math.inf):
        """See to it that the pump runs if there is anything to do, and looks up at `when` at the latest."""
        if self._pump is None or self._pump.done():
            if self._next() is not None and self._is_running():
                self._pump = flowcoro.spawn(self._deliver(), name="simulated network")
        elif self._nap is not None and when < self._nap_ends:
            self._nap_ends = self._nap.deadline = when

    def _is_running(self):
        """Whether this is its run: sockets may be closed after it, by finalisers, which nobody else hears of."""
        try:
            return self.kernel() is flowcoro.current_kernel()
        except RuntimeError:
            return False

    def _next(self):
        """When the next thing happens; None: nothing is under way."""
        while self.heap and self.heap[0][2] is None:
            heapq.heappop(self.heap)
        return self.heap[0][0] if self.heap else None

    async def _deliver(self):
        """The pump: let happen what is due, one after the other, until nothing is under way."""
        try:
            await self._pumped(lambda: True)
        except flowcoro.Cancelled:      # main has ended: go on as long as somebody's last words wait for an answer
            with flowcoro.CancelScope(shield=True):
                await flowcoro.checkpoint()
                await self._pumped(lambda: self.waiting)
            raise

    async def _pumped(self, wanted):
        while wanted() and (when := self._next()) is not None:
            if when > flowcoro.now():
                try:
                    with flowcoro.CancelScope() as self._nap:
                        self._nap_ends = when
                        await flowcoro.sleep_until(when)
                finally:
                    self._nap = None
            else:
                await flowcoro.checkpoint()
            now, heap = flowcoro.now(), self.heap
            while heap and heap[0][0] <= now:
                _, _, function, arguments = heapq.heappop(heap)
                if function is not None:
                    function(*arguments)


class SimulatedNetwork:
    """A network of hosts that exist in this kernel only, with faults on command and by chance, the same for the same seed.

    seed: of all chance in it; by default that of the run. latency: seconds that each packet is under way; jitter: up to so many
    more, so that datagrams overtake each other. loss: probability that a packet gets lost, which for streams is a delay;
    duplication: that a datagram comes twice. bandwidth: bytes a second in each direction between two hosts. split: probability
    that a segment of a stream is cut in two, so that reads end anywhere. keep: how many events the trace keeps.
    TypeError, ValueError.

    Give it a run of its own, with one worker and a virtual clock. `events` has (seconds of now(), host, what happened), the
    newest last. Code runs on its hosts inside `with network.host(name):`, by host.spawn(), host.run() and host.boot().
    """

    def __init__(self, *, seed=None, latency=0.001, jitter=0.0, loss=0.0, duplication=0.0, bandwidth=math.inf, split=0.0,
                 keep=100_000):
        if seed is not None and not isinstance(seed, (int, str, bytes, float)):
            raise TypeError(f"seed={seed!r}: give an int or a str; None for that of the run")
        self.seed = seed
        self.defaults = _Link(latency=latency, jitter=jitter, loss=loss, duplication=duplication, bandwidth=bandwidth)
        self.split = _checked_number(split, "split", 0, 1, "the probability that a segment is cut in two")
        self.events = collections.deque(maxlen=_count(keep, 0, "keep", "the number of events that the trace keeps"))
        self.hosts = {}
        self.random = None              # made when the run is known
        self.timeline = _Timeline()
        self._links = {}                # (name, name) -> _Link
        self._by_address = {}
        self._counts = dict.fromkeys(("sent", "arrived", "lost"), 0)

    def __repr__(self):
        return f"<SimulatedNetwork seed={self.seed!r} hosts={[*self.hosts]}>"

    # -- what a test calls

    def host(self, name):
        """The SimulatedHost of that name, made when it is first asked for. TypeError, ValueError for what is no name."""
        if not isinstance(name, str):
            raise TypeError(f"host({name!r}): the name of a host is a str")
        host = self.hosts.get(name)
        if host is None:
            if not name or name == "localhost" or _address(name) or any(part.isspace() for part in name):
                raise ValueError(f"host({name!r}): give a name without spaces that is neither 'localhost' nor an address")
            host = self.hosts[name] = SimulatedHost(self, name, len(self.hosts) + 1)
            self._by_address[host.address] = self._by_address[host.address6] = host
        return host

    def set_link(self, source, target, *, one_way=False, **settings):
        """Give the links between hosts (as for partition()) settings of their own: latency, jitter, loss, duplication, bandwidth.

        What is not given stays. one_way: only from source to target. TypeError, ValueError.
        """
        unknown = settings.keys() - self.defaults.settings().keys()
        if unknown:
            raise TypeError(f"a link has no {', '.join(sorted(unknown))}: it has {', '.join(self.defaults.settings())}")
        for one, other in self._directions(source, target, one_way):
            self.link(one, other).change(**settings)

    def partition(self, source, target, *, one_way=False):
        """Let no packet from `source` reach `target`, nor (unless one_way) the reverse; those under way are lost.

        Each is a host, its name, or several. Nobody is told: connections hang, until heal() or until they time out.
        TypeError, ValueError.
        """
        for one, other in self._directions(source, target, one_way):
            self.link(one, other).cut = True
            self._control(f"partition: nothing from {one.name} to {other.name}")

    def heal(self, source=None, target=None):
        """End the partitions between `source` and `target` (hosts as for partition()), both ways.

        With one of them, all that it is cut off by; without arguments, all there are. TypeError, ValueError.
        """
        concerned = self._between(source, target)
        for names, link in self._links.items():
            one, other = (self.hosts[name] for name in names)
            if link.cut and concerned(one, other):
                link.cut = False
                self._control(f"heal: packets from {one.name} to {other.name} again")

    def break_connections(self, source=None, target=None):
        """Reset all TCP connections, or those of `source`, or those between it and `target`. Returns how many there were.

        Each is a host, its name, or several. Both ends learn it now, as of a reset by the other: ECONNRESET; while it is being
        made, ECONNREFUSED; where the other end has ended before, EPIPE, as Linux has it. TypeError, ValueError.
        """
        broken, concerned = 0, self._between(source, target)
        for host in self.hosts.values():
            for raw in list(host.connections.values()):
                if raw.state != "over" and concerned(host, raw.peer_host):
                    broken += 1
                    peer = raw.peer_host.connections.get(raw.peer_key)
                    self._control(f"breaks {raw.name}")
                    for each in (raw, peer):
                        if each is not None:
                            each.on_reset()
        return broken

    def crash(self, host):
        """The host loses power: its tasks are cancelled, its sockets are gone, and nobody is told.

        What has left it still arrives; what waits to be sent does not. Down it answers nothing. Its tasks are those of
        host.spawn(), run() and boot(); to others its sockets raise ENETDOWN. Down already: nothing happens.
        """
        host = self._known(host)
        if host.up:
            self.begin()
            self._control(f"crash of {host.name}")
            host.crashed_at = flowcoro.now()
            host.go_down()

    def restart(self, host):
        """The host comes up again without its sockets, and runs what boot() was given. Up already: nothing happens."""
        host = self._known(host)
        if not host.up:
            self._control(f"restart of {host.name}")
            host.go_up()

    def open_sockets(self):
        """The names of all sockets that programs have not closed, on hosts that are up: what a test asserts to be []."""
        return [raw.name for host in self.hosts.values() for raw in host.open]

    def trace(self):
        """The events as text, a line each: seconds, host, what happened."""
        return "".join(f"{seconds:14.6f} {host:<12} {what}\n" for seconds, host, what in self.events)

    def statistics(self):
        """{"packets": {"sent": int, "arrived": int, "lost": int, "in_flight": int}, "hosts": {name: {"up": bool, "sockets":
        int, "connections": int, "tasks": int}}}: sockets that programs hold, connections also those on their way to an end."""
        flying = sum(entry[2] is not None and entry[2] == self._arrive for entry in self.timeline.heap)
        return {"packets": {**self._counts, "in_flight": flying},
                "hosts": {name: {"up": host.up, "sockets": len(host.open), "connections": len(host.connections),
                                 "tasks": sum(not task.done() for task in host._tasks) + len(host._scopes)}
                          for name, host in self.hosts.items()}}

    def _control(self, what):
        self.events.append((flowcoro.now(), "(test)", what))

    def _known(self, host):
        if isinstance(host, SimulatedHost) and host.network is self:
            return host
        try:
            return self.hosts[host]
        except (KeyError, TypeError):
            raise ValueError(f"{host!r} is no host of this network, which has {', '.join(self.hosts) or 'none yet'}; "
                             "host(name) makes one") from None

    def _several(self, hosts, name):
        """A list of SimulatedHosts, in the order of their making, whatever the order of a set."""
        if isinstance(hosts, (str, SimulatedHost)):
            return [self._known(hosts)]
        if not isinstance(hosts, collections.abc.Iterable):
            raise TypeError(f"{name}={hosts!r}: give a host, its name, or several")
        known = {self._known(host): None for host in hosts}
        if not known:
            raise ValueError(f"{name}={hosts!r}: give one host or more")
        return [host for host in self.hosts.values() if host in known]

    def _between(self, source, target):
        """A function that says of two hosts whether they are these two, either way; None stands for any."""
        sources, targets = (
            list(self.hosts.values()) if side is None else self._several(side, name)
            for side, name in ((source, "source"), (target, "target")))
        return lambda one, other: one in sources and other in targets or one in targets and other in sources

    def _directions(self, source, target, one_way):
        pairs = [(one, other) for one in self._several(source, "source") for other in self._several(target, "target")
                 if one is not other]
        if not pairs:
            raise ValueError(f"{source!r} and {target!r}: between a host and itself there is no link")
        return pairs if one_way else [direction for one, other in pairs for direction in ((one, other), (other, one))]

    # -- what sockets call

    def begin(self):
        """Belong to this run from now on."""
        kernel = flowcoro.current_kernel()
        if self.timeline.kernel is None:
            if flowcoro.statistics()["workers"]["count"] > 1:
                raise RuntimeError("a SimulatedNetwork needs a run with one worker, for only its order can be repeated: "
                                   "run(…, workers=1), or a clock= or seed=, which imply that")
            self.timeline.kernel = weakref.ref(kernel)
            if self.seed is None:
                self.seed = flowcoro.runtime_info()["seed"] or 0
            self.random = random.Random(self.seed)
        elif self.timeline.kernel() is not kernel:
            raise RuntimeError("a SimulatedNetwork serves one run; make a new one in each")

    def link(self, source, target):
        """The _Link from one host to another."""
        link = self._links.get((source.name, target.name))
        if link is None:
            link = self._links[source.name, target.name] = _Link(**self.defaults.settings())
            if source is target:
                link.change(latency=LOOPBACK_SECONDS, jitter=0, loss=0, duplication=0, bandwidth=math.inf)
        return link

    def host_at(self, text, asker):
        """The host with that address, as seen from another one; None: nobody has it."""
        return asker if _is_loopback(text) else self._by_address.get(text)

    def name_of(self, address, asker):
        """An address as the trace shows it: host:port."""
        host = self.host_at(address[0], asker)
        return f"{host.name if host is not None else address[0]}:{address[1]}"

    def is_doubled(self, source, target):
        """Whether chance has it that a datagram comes twice."""
        duplication = self.link(source, target).duplication
        return duplication > 0 and self.random.random() < duplication

    def transmit(self, source, target, size, what, take, *message, lost=None, may_queue=True):
        """Put a packet of `size` bytes on the wire; if it arrives, take(*message) is called, else lost(), if there is one."""
        link, now = self.link(source, target), flowcoro.now()
        self._counts["sent"] += 1
        if not may_queue and link.busy_until - now > LINK_QUEUE / link.bandwidth:
            self._lose(source, target, what, "the link is busy", lost)
            return
        link.busy_until = left = max(now, link.busy_until) + size / link.bandwidth
        if link.cut:
            self._lose(source, target, what, "partition", lost)
        elif link.loss and self.random.random() < link.loss:
            self._lose(source, target, what, "by chance", lost)
        else:
            arrival = left + link.latency
            if link.jitter:
                arrival += link.jitter * self.random.random()
            self.timeline.at(arrival, self._arrive, link, source, target, now, left, what, take, message, lost)

    def _arrive(self, link, source, target, sent, left, what, take, message, lost):
        if link.cut:
            self._lose(source, target, what, "partition", lost)
        elif not target.up:
            self._lose(source, target, what, f"{target.name} is down", lost)
        elif sent <= source.crashed_at < left:
            self._lose(source, target, what, f"{source.name} crashed before it had left", lost)
        else:
            self._counts["arrived"] += 1
            self.events.append((flowcoro.now(), target.name, f"< {source.name}: {what}"))
            take(*message)

    def _lose(self, source, target, what, why, lost):
        self._counts["lost"] += 1
        self.events.append((flowcoro.now(), source.name, f"lost to {target.name}, {why}: {what}"))
        if lost is not None:
            self.timeline.after(RETRY_SECONDS, lost)
