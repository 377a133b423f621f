"""flowcoro_net 0.1.0: the network: connections (TCP, Unix, TLS), servers, datagrams, names, pools.

To vendor, copy: flowcoro.py, flowcoro_net.py

Example:

    import flowcoro, flowcoro_net

    async def echo(sock):
        while data := await sock.read():
            await sock.write(data)

    async def main():
        async with await flowcoro_net.TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(echo))
            async with await flowcoro_net.Socket.connect(*server.local) as sock:
                await sock.write(b"hello\\n")
                print(await sock.read_until(b"\\n", limit=100))
            server.close()

    flowcoro.run(main())

Contents: constants · errors · arguments · the network underneath · names · sockets: the base · TLS · sockets ·
connecting · servers: the base · several processes · servers · datagrams · the connection pool

Errors:

    flowcoro.FlowCoroError
      flowcoro.ClosedError    you closed it (the socket, the server, the writing half)
      flowcoro.BusyError      another task is reading it, or writing it, already
      NetworkError            something out there; also an OSError, with the system's errno or None
        BrokenError           … the peer or the network broke it, or there is none; also a ConnectionError
        ResolveError          … the name has no address
        TlsError              … there is no trust: certificates, protocols, what is no TLS
      LimitError              more bytes than a limit of yours
    OSError                   your own system refuses: address in use, no permission, no descriptors left
    TimeoutError              a timeout= has passed
    TypeError, ValueError     an argument that makes no sense

How it works:

A *raw* socket never blocks; it comes from flowcoro.network (None: the operating system), and so does the Pollable that
says whether it is ready. Each operation tries first and waits only when that says EAGAIN, or when the Pollable knows that
it would: a read that returned fewer bytes than asked has emptied the system's buffer, so the next one waits at once.

    read   the flag down, recv; a full read, an end, or a hang-up put it up again; EAGAIN: wait for the edge
    write  send; what did not fit waits for the edge, as a slice of the caller's own memory: nothing is copied or queued

So write() returns when the system has all of it, memory is bounded by what the caller holds, and there is nothing to
flush on close. What read_until() and read_exactly() have received beyond what they return stays in the socket's
buffer, where the next read finds it; they take nothing out before they have all, so a cancelled one has consumed nothing.

    N1  one reader and one writer at a time; each leaves its place when it ends, however that is
    N2  `_special` is True whenever a read or write needs more than the system call: bytes in the buffer, TLS, a half closed
        or lost connection, several workers. The short way is taken only while it is False.
    N3  with several workers no system call is made on a descriptor that is closed, or about to be: each enters and leaves
        (two atomic steps), and the last to leave a closed one closes it
    N4  a lost connection stays lost: the system says so once, and then calls it an end; the first error is kept

*TLS* runs between two buffers in memory (ssl.MemoryBIO), so it goes over whatever the network is, and a cancelled write
leaves whole records: what is encrypted is sent before anything that is written later. (An ssl.SSLSocket asks the system for
each record's five bytes of header, and then for the rest.)

A *server* accepts, and gives each connection a task of its own. It stops in three steps: accept no more, wait for
those who are at work (drain_timeout), cancel the rest.

With *several processes* the one that calls serve() is the supervisor: it serves nobody, but forks the others and looks after
them. It keeps all listening sockets open, so those who wait to be accepted lose nothing when a process dies or is replaced.

    S1  a process has a line to the supervisor (a socket pair): it stops when told to by that, or when the supervisor's end is
        gone, however that went (but another child that the program has forked itself has that end too, as long as it lives);
        SIGTERM, which a service manager may send to all of them, asks for the same
    S2  its number is given back (waitpid) in the same step that takes it out of the table: a signal never hits a stranger
    S3  whatever ends serve(), no process is left: told to stop (to cancel, if serve() is cancelled), waited for, killed

Sources: RFC 9293 (TCP), RFC 8305 (happy eyeballs), RFC 8446 (TLS 1.3), RFC 6066 (SNI), RFC 7301 (ALPN), RFC 768 (UDP);
trio's _highlevel_*.py and _ssl.py; Go's net (self-connect, accept errors); epoll(7), sendfile(2), unix(7); HikariCP
(bypass of validation, lifetimes spread), Go's database/sql (closing counts, generations).

What it does not do: QUIC, raw IP, urgent data (RFC 6093 says to leave it), descriptors over Unix sockets, proxies.
Where sendfile(2) has to read from a cold disk it blocks its worker, as it does nginx.

SPDX-License-Identifier: MIT
"""

import collections
import contextlib
import encodings.idna           # getaddrinfo() loads it when it is first called: perhaps when no descriptors are left for that
import errno
import functools
import gc
import inspect
import io
import itertools
import math
import mmap
import os
import select
import signal
import socket
import ssl
import stat
import struct
import sys
import threading
import time
import traceback
import types
import warnings
import weakref

import flowcoro

__version__ = "0.1.0"

__all__ = ["Socket", "TcpServer", "UnixServer", "UdpSocket", "ConnectionPool", "resolve", "client_tls", "server_tls",
           "NetworkError", "BrokenError", "ResolveError", "TlsError", "LimitError"]

# ---- constants ------------------------------------------------------------------------------------------------

# Bytes that one read asks for. asyncio and uvloop have 256 KiB; a Unix or loopback stream hands over 64 to 200 KiB at once,
# and a buffer of more than 128 KiB is a new memory mapping for each read.
CHUNK = 64 * 2**10

# Bytes that read_until() takes for one line or head, its end included: asyncio's limit too. nginx has 4 * 8 KiB for a head.
UNTIL_LIMIT = 64 * 2**10

# Bytes that one receive of read_exactly() asks for at most; beyond that system calls cost nothing any more.
LARGEST_CHUNK = 2**20

# Bytes that are encrypted before they are sent: 16 records. It bounds what is held twice.
TLS_CHUNK = 256 * 2**10

# Buffers of one sendmsg(2) at most: IOV_MAX of Linux.
IOV_MAX = 1024

# Bytes of one sendfile(2), so that a fast peer and a slow disk do not keep the worker: a millisecond from the page cache.
SENDFILE_CHUNK = 4 * 2**20

# Bytes of a file from which it is sent corked (TCP_CORK), together with its head, and bytes at its end that are not. sendfile(2)
# hands TCP 64 KiB at a time, a little more than a segment of the loopback has room for, and each acknowledgement pushes out what
# is left over: 200 to 320 segments for 10 MiB, and 162 with the cork. It also holds back the end until it is taken off, some
# microseconds of Python later; by then the receiver has caught up, it seems, and each segment of the next file meets it awake:
# up to twice the system's time. So the last two pieces go without. 512 KiB cost 4 % less with a cork, 256 KiB 4 % more.
CORKED_FROM, UNCORKED_END = 512 * 2**10, 128 * 2**10

# Seconds between two attempts to connect: RFC 8305 section 5 recommends 250 ms.
ATTEMPT_DELAY = 0.25

# Seconds that a TLS handshake may take; asyncio's and nginx's limit too.
HANDSHAKE_TIMEOUT = 60.0

# Seconds that close() spends on a TLS goodbye that the peer may not take, or not answer, and bytes that it drops meanwhile.
CLOSE_TIMEOUT, LINGER_BYTES = 2.0, 256 * 2**10

# Connections that wait to be accepted; the system cuts it to net.core.somaxconn (4096). Go and nginx: that, and 511.
BACKLOG = 1024

# Ports that are tried for port=0 on several addresses: a port that is free on the first may be taken on the second.
PORT_ATTEMPTS = 10

# Seconds that serve() gives its handlers to end; Docker kills after 10.
DRAIN_TIMEOUT = 8.0

# Seconds that accepting pauses when there are no descriptors (or memory) left, and between two reports of that.
PAUSE, REPORT_PAUSE = 0.2, 60.0

# Seconds until a worker process that has died is replaced, first and at most (twice as many each time), and seconds that one
# must have lived for the next to be the first again. systemd waits 0.1 s too, and gives up after five times; this goes on.
RESTART, LONGEST_RESTART, STEADY = 0.1, 10.0, 10.0

# Seconds that a worker process may take until it serves. It runs no code of the user's before, but for what is to run at a fork.
START_TIMEOUT = 10.0

# Seconds that a worker process may take to end, beyond drain_timeout, before it is killed: for what handlers clean up.
END_TIMEOUT = 2.0

# Seconds between two looks whether a process has ended, where there is no pidfd.
LOOK = 0.05

# Seconds that names are remembered: it spares a burst of connects the lookups, and is too short for a change of address
# to be noticed late. Names at most; threads that look names up at once, none of them to_thread()'s forty.
NAME_SECONDS, NAMES, RESOLVERS = 5.0, 1024, 16

# Seconds between two attempts to connect to a Unix socket whose backlog is full, first and at most: nothing tells when to.
FIRST_RETRY, LONGEST_RETRY = 0.001, 0.05

# Seconds that UnixServer.listen() waits for others who begin to listen in the same directory.
LOCK_SECONDS = 1.0

# Bytes of a datagram at most: what fits into the 16 bits of its length (RFC 768).
DATAGRAM = 65_535

# Connections of a ConnectionPool at most, idle ones included. HikariCP's default too: a database serves few at once well.
POOL_CONNECTIONS = 10

# Seconds that a connection may be idle in a pool. Below nginx's 75 and the 60 after which many load balancers forget one.
POOL_IDLE_TIMEOUT = 50.0

# Seconds after which a pool does not lend a connection again: so that a changed address or a rotated certificate is noticed,
# and what leaks on the other side is freed. HikariCP's default.
POOL_LIFETIME = 1800.0

# The share of its lifetime that a connection may be spared, so that those made together do not end together (HikariCP:
# 0.025, psycopg_pool: 0.05). The n-th is spared the fraction of n golden ratios, which spreads evenly and is no chance.
POOL_LIFETIME_SPREAD = 0.05
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

# Seconds to wait for a connection of a pool, as HikariCP, psycopg_pool and SQLAlchemy: whoever waits longer is better told.
POOL_ACQUIRE_TIMEOUT = 30.0

# Seconds that a connection may have been idle and is still lent without a validation. HikariCP: 0.5.
POOL_VALIDATE_AFTER = 0.5

# Seconds that an async close of a pooled connection may take before it is cancelled: its place is needed, and the end of the
# run waits for it.
POOL_CLOSE_TIMEOUT = 5.0

# Seconds between two sweeps of a pool at least, or an eighth of the shortest limit: what is overdue is closed late by that,
# but is never lent. A sweep looks at all idle connections.
POOL_SWEEP_SECONDS = 1.0

# Frames of a borrower's stack that a pool keeps with leak_after: the nearest say who it was.
POOL_LEAK_FRAMES = 16

# A write to a connection that the peer has closed is an error, and never a signal that ends the process.
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)

# What a non-blocking connect says while it is under way.
_UNDER_WAY = {errno.EINPROGRESS, errno.EINTR}

# What the system says when descriptors or memory have run out, or (epoll) what of it one user may watch.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC}

# What accept() says of one connection that was lost while it waited, or that a firewall forbids; the next may be well.
_ONE_LOST = {errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EINTR, errno.ENETDOWN, errno.ENETUNREACH,
             errno.EHOSTUNREACH, errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ETIMEDOUT}

# What sendfile() says when it cannot do it with this file or this socket.
_NO_SENDFILE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTSOCK, errno.EBADF, errno.EOVERFLOW,
                errno.ESPIPE}

# What a system call says of a connection that is no more, besides what Python has as ConnectionError. All else is no word about
# the peer: memory that has run out, a disk that cannot be read.
_CUT_OFF = {errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET,
            errno.EPROTO, getattr(errno, "EHOSTDOWN", errno.EHOSTUNREACH)}

# What OpenSSL says when it is sent something that is no TLS.
_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_TOO_SMALL",
           "UNKNOWN_PROTOCOL", "WRONG_SSL_VERSION", "RECORD_LAYER_FAILURE", "BAD_RECORD_TYPE", "INVALID_ALERT",
           "UNSUPPORTED_PROTOCOL_VERSION"}


# ---- errors ---------------------------------------------------------------------------------------------------

class NetworkError(flowcoro.FlowCoroError, OSError):
    """The base of what goes wrong out there. `errno` is the system's, or None; the message says of which connection."""

    _of = None          # a weak reference to the Socket, if it is the error of one

    def __str__(self):
        return self.strerror if self.errno is None and self.strerror else super().__str__()     # not "[Errno None] …"


class BrokenError(NetworkError, ConnectionError):
    """The peer or the network has broken the connection, or there never was one; or the peer ended in the middle.

    `errors`: of a connect, one (address, OSError) for each attempt; else empty.
    """

    errors = ()


class ResolveError(NetworkError):
    """The name of a host has no address (of this family), or nobody could be asked. errno is a socket.EAI_… number."""


class TlsError(NetworkError):
    """TLS could not be agreed upon, or was violated: `reason` is OpenSSL's word (CERTIFICATE_VERIFY_FAILED …) or ""."""

    reason = ""


class LimitError(flowcoro.FlowCoroError):
    """More bytes than a limit. The message says where, how many are allowed, and what to do."""

    _of = None          # as NetworkError's


# ---- arguments ------------------------------------------------------------------------------------------------

def _whole(number, least, said, what="bytes", most=sys.maxsize):
    """`number`, if it is an int from `least` to `most`."""
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{said}: give a number of {what}, an int")
    if number < least:
        raise ValueError(f"{said}: the number of {what} must be {least} or more")
    if number > most:
        raise ValueError(f"{said}: the number of {what} must be {most} or less")
    return number


def _seconds(number, said, least=0.0):
    """A limit in seconds, as a float; None is math.inf."""
    if number is None:
        return math.inf
    try:
        if number >= least and not isinstance(number, bool):
            return float(number)
    except TypeError:
        raise TypeError(f"{said}={number!r}: give a number of seconds; None or math.inf for no limit") from None
    raise ValueError(f"{said}={number!r}: seconds must be {least:g} or more; None or math.inf for no limit")


def _as_bytes(data, taker):
    try:
        return memoryview(data).cast("B")
    except TypeError:
        raise TypeError(f"{taker} takes bytes or the like, in one piece, got {data!r:.80}; text has to be encoded: "
                        "text.encode()") from None


def _checked_port(port, least=0):
    if not isinstance(port, int) or isinstance(port, bool):
        raise TypeError(f"port={port!r}: give an int from {least} to 65535")
    if not least <= port <= 65535:
        raise ValueError(f"port={port!r}: give an int from {least} to 65535")
    return port


@functools.lru_cache(1024)
def _family_of_number(host):
    """AF_INET or AF_INET6 of an address in numbers, AF_UNSPEC of "" (any); None for a name."""
    if host == "":
        return socket.AF_UNSPEC
    if host == "<broadcast>":
        return socket.AF_INET
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host.partition("%")[0])
            return family
        except (OSError, ValueError):           # ValueError: of a zero byte
            pass
    return None


def _checked_address(address, said):
    """The family of (address in numbers, port, ...). A name would be looked up by the system call, and all tasks would wait."""
    if not isinstance(address, tuple) or len(address) < 2 or not isinstance(address[0], str):
        raise TypeError(f"{said}={address!r}: give a tuple of an address and a port, such as (\"127.0.0.1\", 8000)")
    _checked_port(address[1])
    family = _family_of_number(address[0])
    if address[2:] and (family == socket.AF_INET or len(address) > 4
                        or not all(isinstance(number, int) and 0 <= number < 2**32 for number in address[2:])):
        raise ValueError(f"{said}={address!r}: besides address and port only IPv6 has more, two numbers: flow and scope")
    if family is None:
        raise ValueError(f"{said}={address!r}: {address[0]!r} is no address in numbers; look names up before: await "
                         "resolve(host, port)")
    return family


def _checked_path(path):
    try:
        path = os.fspath(path)
    except TypeError:
        raise TypeError(f"path={path!r}: give the path of a Unix socket: a str, bytes, or os.PathLike") from None
    if not path or "\0" in os.fsdecode(path[1:]) and not _is_nameless(path):
        raise ValueError(f"path={path!r}: give the path of a Unix socket, or a name that begins with a zero byte (Linux)")
    return path


def _is_nameless(path):
    """Whether the address of a Unix socket is no path: Linux has names that begin with a zero byte."""
    return path[:1] in ("\0", b"\0")


def _why(error):
    return error.strerror or str(error)     # some that Python itself makes have no number: "AF_UNIX path too long"


def _shown(address):
    """An address as people write it: 127.0.0.1:80, [::1]:80, a path."""
    if isinstance(address, tuple):
        scope = f"%{address[3]}" if address[3:] and address[3] and "%" not in str(address[0]) else ""
        return f"[{address[0]}{scope}]:{address[1]}" if ":" in str(address[0]) else f"{address[0]}:{address[1]}"
    if isinstance(address, bytes):
        address = os.fsdecode(address)
    return address.replace("\0", "@") or "a Unix socket without a name"


def _refused(error, doing, address):
    """The same OSError, of the same class, whose message names the address and what to do."""
    number = error.errno or errno.ENAMETOOLONG          # "AF_UNIX path too long" comes without one
    in_use = ("; another socket has it: choose another port (0: any that is free), or end that program"
              if isinstance(address, tuple) else
              "; another socket has it, or it is something else: choose another path, end that program, or remove what is there")
    remedy = {errno.EADDRINUSE: in_use, errno.EMFILE: "; close some, or raise `ulimit -n`",
              errno.EADDRNOTAVAIL: "; this machine has no such address: give one of its own, or \"\" for all",
              errno.EACCES: "; ports below 1024 need permission" if isinstance(address, tuple) else "; give it to this user",
              errno.EPERM: "; another user's file is there: remove it, or choose another path",
              errno.ENAMETOOLONG: "; a Unix socket's has at most 107 bytes: choose a shorter one, or a relative one",
              errno.ENOENT: "; make its directory first"}.get(number, "")
    return OSError(number, f"cannot {doing} {_shown(address)}: {_why(error)}{remedy}")


# ---- the network underneath -----------------------------------------------------------------------------------

class _OfKernel:
    """What is kept for each kernel: whether several workers run, and the permits of those who look up names."""

    all = weakref.WeakKeyDictionary()

    def __init__(self):
        self.several = flowcoro.runtime_info()["workers"] > 1
        self.resolvers = flowcoro.Semaphore(RESOLVERS)


def _of_kernel():
    kernel = flowcoro.current_kernel()
    return _OfKernel.all.get(kernel) or _OfKernel.all.setdefault(kernel, _OfKernel())


class _System:
    """The operating system, as flowcoro.network has it."""

    # Arguments of getaddrinfo: (until when, list). Each call is atomic; a lock that another thread holds during a fork would stay
    # locked in the child.
    names = collections.OrderedDict()

    @staticmethod
    def socket(family, type, proto=0):
        raw = socket.socket(family, type, proto)
        raw.setblocking(False)
        return raw

    pollable = flowcoro.Pollable

    async def getaddrinfo(self, host, port, family=0, type=0, flags=0):
        try:        # an address asks nobody
            found = socket.getaddrinfo(host, port, family, type, 0, flags | socket.AI_NUMERICHOST)
        except socket.gaierror as error:
            if error.errno not in (socket.EAI_NONAME, getattr(socket, "EAI_ADDRFAMILY", None)):
                raise
        else:
            await flowcoro.checkpoint()
            return found
        asked = host, 0, family, type, 0, flags         # for all ports at once
        if found := self.remembered(asked):
            await flowcoro.checkpoint()
        else:
            found = await flowcoro.to_thread(self.look_up, asked, abandon_on_cancel=True, limiter=_of_kernel().resolvers)
        return [(*rest, (address[0], address[1] or port, *address[2:])) for *rest, address in found]

    def remembered(self, asked):
        until, found = self.names.get(asked, (0, None))
        return found if time.monotonic() < until else None

    def look_up(self, asked):
        """In a thread. Those who have waited for their turn mostly find the answer."""
        found = self.remembered(asked)
        if not found:
            found = socket.getaddrinfo(*asked)
            while len(self.names) >= NAMES:
                self.names.popitem(last=False)
            self.names[asked] = time.monotonic() + NAME_SECONDS, found
        return found


_SYSTEM = _System()


def _network():
    return flowcoro.network.get() or _SYSTEM


# ---- names ----------------------------------------------------------------------------------------------------

async def resolve(host, port, *, family=0, type=socket.SOCK_STREAM, flags=0):
    """The addresses of a host, best first: a list of (family, type, protocol, address), each but once.

    family: socket.AF_INET or AF_INET6; 0: both. Asked in a thread of its own (16 at once, apart from those of to_thread), and
    remembered for 5 seconds; what are addresses already asks nobody. ResolveError; TypeError and ValueError for what is no host,
    port or family. Cancelled: at once; the thread ends by itself, and holds its place among the 16 until then.
    """
    if not isinstance(host, (str, bytes, types.NoneType)):
        raise TypeError(f"host={host!r}: give a name or an address as a str")
    if host and ("\0" if isinstance(host, str) else b"\0") in host:        # the C library would look at what is before that
        raise ValueError(f"host={host!r}: a name has no zero byte in it")
    if family not in (0, socket.AF_INET, socket.AF_INET6):
        raise ValueError(f"family={family!r}: give socket.AF_INET, socket.AF_INET6, or 0 for both")
    try:
        found = await _network().getaddrinfo(host, _checked_port(port), family, type, flags)
    except socket.gaierror as error:
        remedy = {socket.EAI_AGAIN: "; no name server answers: is there a network, and are descriptors left (ulimit -n)?",
                  socket.EAI_NONAME: "; is the name spelt right, has it an address of this family, is there a name server, and "
                  "are descriptors left?"}
        raise ResolveError(error.errno, f"cannot resolve {host!r}: {error.strerror}{remedy.get(error.errno, '')}") from error
    except UnicodeError as error:
        raise ResolveError(socket.EAI_NONAME, f"cannot resolve {host!r}: this is no name of a host: {error}") from error
    if not found:
        raise ResolveError(socket.EAI_NONAME, f"cannot resolve {host!r}: it has no address")
    return list(dict.fromkeys((family, kind, proto, address) for family, kind, proto, _, address in found))


def _interleaved(found):
    """RFC 8305 section 4: the families in turns, beginning with the one preferred."""
    families = list(dict.fromkeys(family for family, *_ in found))
    rows = [[each for each in found if each[0] == family] for family in families]
    return [row[index] for index in range(max(map(len, rows))) for row in rows if index < len(row)]


# ---- sockets: the base ----------------------------------------------------------------------------------------

def _no_more(*args):
    """What a system call on a closed socket becomes. Its error ends as a ClosedError."""
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))


class _Gate:
    """With several workers: lets calls of a raw socket in until it is to be closed, and then the last to leave closes it (N3)."""

    # Not a part of _Owner, which keeps its calls: they would be references to itself.
    __slots__ = ("raw", "inside", "closed")

    def __init__(self, raw):
        self.raw, self.inside, self.closed = raw, 0, False

    def call(self, method, *args):
        self.enter()
        try:
            return method(*args)
        finally:
            self.leave()

    @flowcoro.atomic
    def enter(self):
        if self.closed:
            _no_more()
        self.inside += 1

    @flowcoro.atomic
    def leave(self):
        self.inside -= 1
        if self.closed and not self.inside:
            self.raw.close()

    @flowcoro.atomic
    def close(self):
        self.closed = True
        if not self.inside:
            self.raw.close()


class _Owner:
    """Who owns a raw socket and its Pollable, and closes both, once."""

    __slots__ = ("_raw", "_pollable", "_network", "_several", "_gate", "_closed", "_local", "__weakref__")

    def __init__(self, raw, network=None, pollable=None):
        self._closed, self._local = True, None          # until it has all, there is nothing to close
        if not hasattr(raw, "recv") or not hasattr(raw, "gettimeout"):
            raise TypeError(f"{type(self).__name__}({raw!r}): give a socket.socket, or one of the network that is current")
        self._raw = raw
        self._network = network or _network()
        self._several = _of_kernel().several
        self._gate = _Gate(raw) if self._several else None
        if raw.gettimeout() != 0:
            raw.setblocking(False)
        self._pollable = pollable or self._network.pollable(raw)
        self._closed = False

    def _call(self, method):
        """`method` of the raw socket, which nobody else closes while it is under way. OSError once it is closed."""
        return method if self._gate is None else functools.partial(self._gate.call, method)

    @flowcoro.atomic
    def _close(self):
        """Whether it had not been closed. Those who wait get ClosedError."""
        if self._closed:
            return False
        self._closed = True
        self._pollable.close()
        (self._gate or self._raw).close()
        return True

    def __del__(self):
        if not getattr(self, "_closed", True):
            try:
                said = f"unclosed {self!r}"
            except AttributeError:              # an error has struck while it was made
                said = f"unclosed {type(self).__name__}"
            try:
                warnings.warn(said, ResourceWarning, source=self)
            finally:
                self._close()

    def _closed_error(self):
        return flowcoro.ClosedError(f"{self!r} has been closed here")

    # -- the system calls, and the waits for them

    async def _wait_readable(self):
        try:
            await self._pollable.wait_readable()
        except flowcoro.ClosedError as error:
            raise self._closed_error() from error

    async def _wait_writable(self):
        try:
            await self._pollable.wait_writable()
        except flowcoro.ClosedError as error:
            raise self._closed_error() from error

    async def _when_readable(self, call, *args):
        """What a receiving system call returns as soon as it need not wait. It leaves the flag down: the caller knows whether
        there may be more. The call's errors, and then the flag is up. Cancelled: nothing received."""
        pollable = self._pollable
        while True:
            if not pollable.readable:
                await self._wait_readable()
            pollable.readable = False           # first this, then try: no edge is lost
            try:
                return call(*args)
            except BlockingIOError:
                pass
            except BaseException:               # also a wrong argument, or a signal handler's
                pollable.readable = True
                raise

    async def _when_writable(self, call, *args):
        """The same for one that sends."""
        pollable = self._pollable
        while True:
            if not pollable.writable:
                await self._wait_writable()
            pollable.writable = False
            try:
                return call(*args)
            except BlockingIOError:
                pass
            except BaseException:
                pollable.writable = True
                raise

    # -- about it

    @property
    def closed(self):
        """Whether it was closed here."""
        return self._closed

    def fileno(self):
        """The descriptor, which is non-blocking; -1 once closed. It is the socket's own: do not close it."""
        return -1 if self._closed else self._raw.fileno()

    @property
    def raw(self):
        """The socket.socket inside, for options and questions. Do not read, write or close it."""
        return self._raw

    @property
    def local(self):
        """Its own address: (host, port), (host, port, flow, scope) or a path."""
        if self._local is None:
            if self._closed:
                raise self._closed_error()
            self._local = self._raw.getsockname()
        return self._local

    async def __aenter__(self):
        return self


# ---- TLS ------------------------------------------------------------------------------------------------------

def client_tls(*, ca=None, certificate=None, key=None, password=None, alpn=(), verify=True):
    """An ssl.SSLContext for clients: the peer's certificate and name are verified, TLS 1.2 or later, no renegotiation.

    ca: a file or directory of the certificates to trust instead of the system's. certificate, key: files of one's own,
    if the server wants one. alpn: protocols in order of preference, as ["h2", "http/1.1"]. verify=False: talk to anybody, who
    may be in the middle; for tests. OSError for a file that is not there, ssl.SSLError for one that is none; both name it.
    """
    if ca is None:
        context = ssl.create_default_context()
    else:                   # a private authority need not keep RFC 5280 to the letter, as Python 3.13 wants it of public ones
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _trust(context, "ca", ca)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return _equipped(context, certificate, key, password, alpn)


def server_tls(certificate, key=None, *, password=None, client_ca=None, alpn=()):
    """An ssl.SSLContext for servers: `certificate` is a file with the chain, `key` one with the private key (None: the same).

    client_ca: a file or directory of certificates: clients must show one signed by these. alpn, errors: as client_tls(). For
    several names on one address set `sni_callback` of the context.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    if client_ca is not None:
        _trust(context, "client_ca", client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return _equipped(context, certificate, key, password, alpn)


def _loaded(said, load, *args):
    """load(*args); its errors name the file."""
    try:
        load(*args)
    except ssl.SSLError as error:
        raise ssl.SSLError(error.errno, f"{said}: {_why(error)}; give files in the PEM format, the key being that of the "
                           "certificate, with its password if it has one") from error
    except OSError as error:
        raise OSError(error.errno, f"{said}: {_why(error)}") from error


def _trust(context, name, ca):
    if not isinstance(ca, (str, bytes, os.PathLike)):
        raise TypeError(f"{name}={ca!r}: give the path of a file or directory of certificates")
    _loaded(f"{name}={ca!r}", context.load_verify_locations, *((None, ca) if os.path.isdir(ca) else (ca,)))


def _equipped(context, certificate, key, password, alpn):
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # TLS 1.3 has no renegotiation, and in TLS 1.2 it makes a write wait for a read, and servers work for nothing.
    context.options |= ssl.OP_NO_RENEGOTIATION
    if certificate is not None:
        _loaded(f"certificate={certificate!r}, key={key!r}", context.load_cert_chain, certificate, key, password)
    elif key is not None:
        raise ValueError("key= needs certificate=: a private key alone proves nothing")
    if not isinstance(alpn, (list, tuple)) or not all(isinstance(name, str) and name.isascii() and 0 < len(name) < 256
                                                      for name in alpn):
        raise TypeError(f"alpn={alpn!r}: give a list of protocols, such as [\"h2\", \"http/1.1\"]")
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


@functools.cache
def _default_client_tls():
    """To read the system's certificates takes some 20 ms."""
    return client_tls()


def _as_context(tls, server_side):
    """The ssl.SSLContext that tls= means; None for none."""
    if tls is None or tls is False:
        return None
    if tls is True and not server_side:
        return _default_client_tls()
    wanted = "server_tls(certificate, key) makes" if server_side else "client_tls() makes, or True"
    if not isinstance(tls, ssl.SSLContext):
        raise TypeError(f"tls={tls!r}: give an ssl.SSLContext, as {wanted}")
    if tls.protocol == (ssl.PROTOCOL_TLS_CLIENT if server_side else ssl.PROTOCOL_TLS_SERVER):
        raise ValueError(f"tls={tls!r} is for {'clients' if server_side else 'servers'}: give one as {wanted}")
    return tls


def _client_context(tls, server_name):
    if server_name is not None:
        if not isinstance(server_name, str):
            raise TypeError(f"server_name={server_name!r}: give the name that the certificate must be for, a str")
        try:
            wrong = not server_name or "\0" in server_name or not _name_for_tls(server_name).encode("idna")
        except UnicodeError:
            wrong = True
        if wrong:
            raise ValueError(f"server_name={server_name!r}: this is no name of a host")
    context = _as_context(tls, False)
    if context is None and server_name is not None:
        raise ValueError(f"server_name={server_name!r} is for TLS alone: give tls=True too, or leave it out")
    return context


def _name_for_tls(host):
    """The name that a certificate is to be for: without the dot at the end (RFC 6066 section 3), or an address's zone."""
    host = os.fsdecode(host) if isinstance(host, bytes) else host
    return host and host.removesuffix(".").partition("%")[0]


class _Tls:
    """One end of a TLS connection: what the peer sends goes into one buffer in memory, what it shall get comes out of another.

    The handshake is made by whoever reads or writes first, so a server's accept() waits for no client. It does not know its
    Socket, which its methods are given: two objects that know each other are garbage that only a collector finds.
    """

    __slots__ = ("object", "incoming", "outgoing", "early", "unsent", "is_done", "failure", "got_data", "got_end", "got_goodbye",
                 "said_goodbye", "closing", "read_ended", "_doing", "_lock")

    def __init__(self, context, server_side, server_name, several):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self.incoming, self.outgoing, server_side=server_side, server_hostname=server_name)
        self.early = bytearray()    # decrypted before anybody asked for it: by say_goodbye()
        self.unsent = b""           # encrypted, and not yet with the system
        self.is_done = self.got_data = self.got_end = self.got_goodbye = self.said_goodbye = False
        self.closing = None         # an Event: a close() is at it, others wait for that
        self.read_ended = None      # an Event for that one, if it waits for who reads
        self.failure = None         # what ended it: (class of the error, message, OpenSSL's word)
        self._doing = flowcoro.Lock()
        self._lock = threading.Lock() if several else None      # OpenSSL lets no two threads into one connection

    def alone(self, step, *args):
        if self._lock is None:
            return step(*args)
        with self._lock:
            return step(*args)

    def failed(self, sock, error):
        """The NetworkError for an ssl.SSLError, which ends this connection."""
        kind, reason, why = TlsError, getattr(error, "reason", None) or "", _why(error)
        doing = "TLS" if self.is_done else "the TLS handshake"
        if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) or reason == "UNEXPECTED_EOF_WHILE_READING":
            if self.is_done:
                kind, why = BrokenError, ("the connection was cut without a TLS goodbye (close_notify): what was read may be "
                                          "less than the peer has sent")
            else:
                reason, why = "UNEXPECTED_EOF", "the peer closed the connection; perhaps it refuses us, or speaks no TLS"
        elif isinstance(error, ssl.SSLCertVerificationError):
            code = error.verify_code            # openssl-verify(1)
            why = f"the certificate is not trusted: {error.verify_message.rstrip('.')}. " + (
                "Is the clock right? Else it has to be renewed" if code in (9, 10)
                else "For another name than the host's give server_name=…" if code in (62, 64)
                else "For a private authority give client_tls(ca=…), a server client_ca=…" if code in (18, 19, 20, 21)
                else "It has to be made anew")
        elif isinstance(error, ssl.SSLWantReadError):
            why = "the peer wants to negotiate anew in the middle, which TLS 1.3 has no more; contexts of client_tls() refuse it"
        elif reason in _NO_TLS and not self.is_done:
            why = f"the peer does not speak TLS here ({reason}); connect without tls= if it should not"
        elif "ALERT" in reason:
            why = f"the peer refuses: {reason.lower().replace('_', ' ')}"
        self.failure = kind, f"{sock!r}: {why}" if kind is BrokenError else f"{sock!r}: {doing} failed: {why}", reason
        return self.error(sock)

    def error(self, sock):
        """What ended it, as an error that nobody has raised yet."""
        kind, said, reason = self.failure
        error = kind(None, said)
        if kind is TlsError:
            error.reason = reason
        return sock._own(error)

    async def _receive(self, sock):
        """What the peer sends next; after its end b"", and got_end."""
        data = await sock._receive(CHUNK)
        if not data:
            self.alone(self.incoming.write_eof)
            self.got_end = True
        return data

    def _shake(self, data):
        if data:
            self.incoming.write(data)
        self.object.do_handshake()

    async def handshake(self, sock):
        """Make it, or wait until somebody has. Cancelled: the next one goes on with it."""
        async with self._doing:
            data, done = b"", False
            while not self.is_done:
                if self.failure is not None:
                    raise self.error(sock)
                try:
                    self.alone(self._shake, data)
                    done = True
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError as error:
                    self.flush_nowait(sock, True)           # the alert that tells the peer why
                    raise self.failed(sock, error) from error
                data = b""
                await self.flush(sock)
                if done:
                    self.is_done = True
                else:
                    await flowcoro.checkpoint_if_due()
                    data = await self._receive(sock)

    def _decrypt(self, data, max_bytes):
        """What to read, in one step with the coming of `data`, so that say_goodbye() finds all of it or nothing. b"": the end."""
        if data:
            self.incoming.write(data)
        if self.early:
            taken = bytes(self.early[:max_bytes])
            del self.early[:max_bytes]
            return taken
        try:
            return self.object.read(max_bytes)
        except ssl.SSLZeroReturnError:          # instead of b"", if our goodbye is said
            return b""

    async def read(self, sock, max_bytes):
        """From 1 byte to one record (16 KiB); b"" after the peer's goodbye. Cancelled: nothing consumed."""
        if not self.is_done:
            await sock.handshake()
        # To read before something has come would mostly be in vain, and costs 2 us.
        data = b"" if self.incoming.pending or self.early or self.got_end or self.alone(self.object.pending) else None
        while True:
            if self.failure is not None:
                raise self.error(sock)
            if data is None:
                data = await self._receive(sock)
            try:
                data = self.alone(self._decrypt, data, max_bytes)
                if data:
                    self.got_data = True
                else:
                    self._check_end()
            except ssl.SSLWantReadError:
                data = None
                await flowcoro.checkpoint_if_due()           # what comes need not be data, again and again
            except ssl.SSLError as error:
                self.flush_nowait(sock)
                raise self.failed(sock, error) from error
            if self.outgoing.pending:       # the answer to a change of keys
                self.flush_nowait(sock)
            if data is not None:
                return data

    def _check_end(self):
        """SSLEOFError, if what OpenSSL calls the end is not the peer's goodbye. With OP_IGNORE_UNEXPECTED_EOF, which most
        contexts have, it calls a connection that was cut the same; but of a cut it is told last."""
        self.got_goodbye = self.got_goodbye or not self.got_end
        if not self.got_goodbye:
            raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "the connection was cut")

    async def write(self, sock, view):
        """All of it. Cancelled: an unknown number of whole records was written, and no part of one is lost."""
        if not self.is_done:
            await sock.handshake()
        if not view:
            await self.flush(sock)
        while view:
            if self.failure is not None:
                raise self.error(sock)
            if self.said_goodbye:           # by a shutdown_write() that was cancelled
                raise sock._shut_error()
            try:
                count = self.alone(self.object.write, view[:TLS_CHUNK])
            except ssl.SSLError as error:
                raise self.failed(sock, error) from error
            view = view[count:]
            await self.flush(sock)
            if view:
                await flowcoro.checkpoint_if_due()

    def write_nowait(self, sock, view):
        """As write(), as far as it goes at once: how many bytes are encrypted. For the writer."""
        count = 0
        while self.is_done and count < len(view):
            if self.failure is not None:
                raise self.error(sock)
            if self.said_goodbye:
                raise sock._shut_error()
            self.flush_nowait(sock, True)
            if self.unsent or self.outgoing.pending:
                break
            try:
                count += self.alone(self.object.write, view[count:count + TLS_CHUNK])
            except ssl.SSLError as error:
                raise self.failed(sock, error) from error
        self.flush_nowait(sock, True)
        return count

    def _take_unsent(self):
        if not self.unsent:
            self.unsent = memoryview(self.alone(self.outgoing.read))
        return self.unsent

    async def flush(self, sock):
        """Send what is encrypted. For the task that writes, or makes the handshake."""
        while self.unsent or self.outgoing.pending:
            unsent = self._take_unsent()
            self.unsent = unsent[await sock._send_some(unsent):]

    @flowcoro.atomic
    def flush_nowait(self, sock, alone=False):
        """As far as it goes at once, unless a task writes (not `alone`), which then does it; the rest goes before what is
        written next."""
        try:
            while (alone or sock._writer is None) and (self.unsent or self.outgoing.pending):
                unsent = self._take_unsent()
                sent = sock._send(unsent, _NO_SIGNAL)
                sock._sent += sent
                self.unsent = unsent[sent:]
        except OSError:                 # full, or broken, or closed: reading will tell
            pass

    def _part(self):
        try:
            while data := self.object.read(CHUNK):
                self.early += data
            self._check_end()           # the peer's goodbye: no later read is told when it came
        except ssl.SSLError:            # no more, or what the next read will say
            pass
        try:
            self.object.unwrap()
        except ssl.SSLError:            # it waits for the peer's, which is not needed
            pass

    def awaits_tickets(self):
        """Whether it is a client to which tickets may be under way, with which servers let it resume a session (RFC 8446 section
        4.6.1): they send them after the handshake, unasked, and before their first data."""
        return (not self.object.server_side and not self.got_data and not self.early and not self.got_end
                and self.alone(self.object.version) == "TLSv1.3")

    def say_goodbye(self):
        """Encrypt the close_notify (RFC 8446 section 6.1). What has come and was not read is decrypted first, and kept: OpenSSL
        looks for the peer's own goodbye, and takes data in its place for an error."""
        if self.is_done and self.failure is None and not self.said_goodbye:
            self.said_goodbye = True
            self.alone(self._part)


# ---- sockets --------------------------------------------------------------------------------------------------

# Who reads by the short way, which does not ask for the task; and close(), which drops what comes.
_SOMEBODY, _CLOSER = "another task", "close()"


# What poll() says of a peer that sends no more (Linux): where the kernel has no epoll that tells it by itself, it is asked.
_HANGUP = getattr(select, "POLLRDHUP", 0)


def _has_hung_up(raw):
    poll = select.poll()
    poll.register(raw, _HANGUP)
    return bool(poll.poll(0))


class _Stream(_Owner):
    """How a connection reads and writes; Socket is what users see of it."""

    __slots__ = ("_recv", "_send", "_special", "_reader", "_writer", "_buffer", "_tls", "_received", "_sent", "_peer",
                 "_ended", "_lost", "_shut")

    def __init__(self, raw, network=None, pollable=None, peer=None):
        super().__init__(raw, network, pollable)
        self._recv, self._send = self._call(raw.recv), self._call(raw.send)     # kept bound, and exchanged by _close()
        self._reader = self._writer = None      # the task that reads, writes (N1), or _SOMEBODY
        self._buffer = bytearray()              # received, and not yet read
        self._tls = None
        self._received = self._sent = 0         # bytes
        self._peer = peer
        self._ended = self._shut = False        # the peer has said that there is no more; we have
        self._lost = None                       # what ended the connection (N4): (number of the error, message)
        self._special = self._several           # N2

    def _mark(self):
        """N2 after anything that it speaks of has changed."""
        self._special = (self._several or self._tls is not None or bool(self._buffer) or self._ended or self._shut
                         or self._lost is not None)

    def _close(self):
        if not super()._close():
            return False
        self._recv = self._send = _no_more      # (a bound method would be a reference to itself)
        return True

    # -- who reads, and who writes

    @flowcoro.atomic
    def _begin_read(self):
        if self._closed or self._reader is _CLOSER:
            raise self._closed_error()
        if self._reader is not None:
            raise self._busy("read", self._reader)
        self._reader = flowcoro.current_task()

    def _end_read(self):
        self._reader = None
        self._mark()
        if self._tls is not None and self._tls.read_ended is not None:
            self._tls.read_ended.set()

    @flowcoro.atomic
    def _begin_write(self):
        if self._writer is not None:
            raise self._busy("written", self._writer)
        if self._closed:
            raise self._closed_error()
        if self._shut:
            raise self._shut_error()
        self._writer = flowcoro.current_task()

    def _end_write(self):
        self._writer = None

    def _shut_error(self):
        return flowcoro.ClosedError(f"{self!r}: writing was shut down here, by shutdown_write()")

    def _busy(self, verb, task):
        return flowcoro.BusyError(f"{self!r} is being {verb} by {task} already; one task at a time (flowcoro.dump_tasks() shows "
                                  "who waits for what)")

    def _broken(self, error, doing):
        """What to raise for the system's error."""
        if self._closed:
            return self._closed_error()
        if not isinstance(error, ConnectionError) and error.errno not in _CUT_OFF:
            return OSError(error.errno, f"{self!r}: {doing} failed: {error.strerror}")
        lost = error.errno, f"{self!r}: the connection was lost while {doing}: {error.strerror}"
        if error.errno != errno.EPIPE:          # which says that the peer reads no more; what it has sent is still to be read
            self._lost, self._special = lost, True
        return self._own(BrokenError(*lost))

    def _own(self, error):
        """The same error, which is of this connection."""
        error._of = weakref.ref(self)
        return error

    async def _receive(self, max_bytes, recv=None, *rest):
        """The next bytes as they come (of `recv`: how many), b"" (0) at the end. Cancelled: nothing consumed."""
        if not self._ended:
            try:
                data = await self._when_readable(recv or self._recv, *rest, max_bytes)
            except OSError as error:
                raise self._broken(error, "reading") from error
            count = data if rest else len(data)
            if count == max_bytes or self._pollable.hangup:
                self._pollable.readable = True
            if count:
                self._received += count
                return data
            self._at_end()
        if self._lost is not None:
            raise self._own(BrokenError(*self._lost))
        return 0 if rest else b""

    def _at_end(self):
        self._pollable.readable = self._ended = self._special = True

    async def _send_some(self, view):
        """Send as much as there is room for, 1 byte at least. Cancelled: nothing was sent."""
        try:
            sent = await self._when_writable(self._send, view, _NO_SIGNAL)
        except OSError as error:
            raise self._broken(error, "writing") from error
        if sent == len(view):
            self._pollable.writable = True
        self._sent += sent
        return sent

    def _pull(self, max_bytes):
        """To be awaited: the next bytes for the reader, b"" at the end."""
        return self._receive(max_bytes) if self._tls is None else self._tls.read(self, max_bytes)

    def _take(self, count):
        buffer = self._buffer
        if count >= len(buffer):
            taken = bytes(buffer)
            buffer.clear()
        else:
            with memoryview(buffer) as view:
                taken = bytes(view[:count])
            del buffer[:count]
        return taken

    async def _read_otherwise(self, max_bytes):
        """read() where it takes more than a system call (N2), or its task has had its turn."""
        await flowcoro.checkpoint_if_due()
        _whole(max_bytes, 1, f"read({max_bytes!r})")
        self._begin_read()
        try:
            return self._take(max_bytes) if self._buffer else await self._pull(max_bytes)
        finally:
            self._end_read()

    async def _write_otherwise(self, data):
        """write() where it takes more than a system call, or its task has had its turn."""
        await flowcoro.checkpoint_if_due()
        await self._write_rest(_as_bytes(data, "write()"))

    def write_nowait(self, data):
        """Write what the system takes at once of `data` (bytes-like); returns how many bytes: 0 while a task writes, or the peer
        does not read. The rest is yours to write. With TLS how many are encrypted: `unsent` says whether the system has all of
        that. Never blocks: no checkpoint. Errors as write().
        """
        pollable = self._pollable
        if self._special or self._writer is not None or data.__class__ is not bytes or not pollable.writable:
            return self._write_nowait_otherwise(data)
        try:
            sent = self._send(data, _NO_SIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._broken(error, "writing") from error
        self._sent += sent
        if sent != len(data):
            pollable.writable = False
        return sent

    def _write_nowait_otherwise(self, data):
        view = _as_bytes(data, "write_nowait()")
        try:
            self._begin_write()
        except flowcoro.BusyError:
            return 0
        pollable = self._pollable
        try:
            if self._tls is not None:
                return self._tls.write_nowait(self, view)
            if not pollable.writable:
                return 0
            pollable.writable = False           # first this, then try: no edge is lost
            sent = self._send(view, _NO_SIGNAL)
            if sent == len(view):
                pollable.writable = True
            self._sent += sent
            return sent
        except BlockingIOError:
            return 0
        except OSError as error:
            pollable.writable = True
            raise self._broken(error, "writing") from error
        finally:
            self._end_write()

    async def _write_rest(self, view):
        self._begin_write()
        try:
            await self._push(view)
        finally:
            self._end_write()

    async def _push(self, view):
        """Write all of it. For the writer."""
        if self._tls is not None:
            await self._tls.write(self, view)
            return
        while view:
            view = view[await self._send_some(view):]
            if view:
                await flowcoro.checkpoint_if_due()           # as in read_exactly()

    def _cut_short(self, wanted):
        return self._own(BrokenError(None, f"{self!r}: the peer ended after {len(self._buffer)} bytes, where {wanted} was "
                                     "expected; read() still gives them"))

    def caused(self, error):
        """Whether an exception, or all of a group, says that the peer or the network has broken this connection. Never blocks."""
        return _is_the_peers(error, self)

    def unread(self, data):
        """Give back what was read and not used: it is read again first. BusyError while a task reads; ClosedError; TypeError."""
        view = _as_bytes(data, "unread()")
        self._begin_read()
        self._buffer[:0] = view
        self._end_read()

    @property
    def unsent(self):
        """Bytes that write_nowait() has encrypted, and that wait for the next write, of b"" at least; 0 without TLS."""
        return 0 if self._tls is None else len(self._tls.unsent) + self._tls.outgoing.pending

    @property
    def hung_up(self):
        """Whether the peer is known to send no more, or to be gone, even if there is something left to read. Never blocks."""
        return self._ended or self._lost is not None or self._pollable.hangup or (
            _HANGUP and not self._closed and isinstance(self._raw, socket.socket) and _has_hung_up(self._raw))


def _in_records(views):
    """Memoryviews joined, so that small ones share a TLS record, and a system call; large ones are not copied."""
    several, size = [], 0
    for view in views:
        if several and size + len(view) > TLS_CHUNK:
            yield several[0] if len(several) == 1 else memoryview(b"".join(several))
            several, size = [], 0
        several.append(view)
        size += len(view)
    if several:
        yield several[0] if len(several) == 1 else memoryview(b"".join(several))


def _read_at(file, offset, count):
    try:
        file.seek(offset)
        return file.read(count)
    except io.UnsupportedOperation:
        raise
    except OSError as error:
        raise OSError(error.errno, f"cannot read {file!r:.80} at offset={offset}: {_why(error)}") from error


class _Bulk(_Stream):
    """Large data: into and out of the caller's memory, and out of files, without a copy."""

    __slots__ = ()

    async def read_into(self, buffer):
        """Read into a writable buffer (of a flowcoro.BufferPool, say); returns how many bytes, 0 at the end. As read().

        ValueError for an empty buffer, TypeError for one that cannot be written.
        """
        await flowcoro.checkpoint_if_due()
        view = _as_bytes(buffer, "read_into()")
        if view.readonly:
            raise TypeError(f"read_into() needs a buffer that can be written, such as a bytearray, got {buffer!r:.80}")
        if not view:
            raise ValueError("read_into() needs a buffer of at least one byte")
        self._begin_read()
        try:
            if self._tls is None and not self._buffer:
                return await self._receive(len(view), self._call(self._raw.recv_into), view)
            data = self._take(len(view)) if self._buffer else await self._pull(len(view))
            view[:len(data)] = data
            return len(data)
        finally:
            self._end_read()

    async def write_many(self, buffers):
        """Write all of several bytes-like objects in a row, as write() does, without joining them (sendmsg(2)).

        buffers: a list, or what else can be iterated over; it is, as they are sent, 1,024 at a time. TypeError for what is not
        bytes-like, and cancelled: an unknown part was sent.
        """
        await flowcoro.checkpoint_if_due()
        if isinstance(buffers, (bytes, bytearray, memoryview)) or not hasattr(buffers, "__iter__"):
            raise TypeError(f"write_many({buffers!r:.80}): give a list of bytes-like objects; write() takes a single one")
        pieces = iter(buffers)
        self._begin_write()
        try:
            while several := list(itertools.islice(pieces, IOV_MAX)):
                views = [view for view in (_as_bytes(data, "write_many()") for data in several) if view]
                if self._tls is None:
                    await self._push_several(views)
                else:
                    for view in _in_records(views):
                        await self._push(view)
                        await flowcoro.checkpoint_if_due()       # as in read_exactly()
        finally:
            self._end_write()

    async def _push_several(self, views):
        """Write all of IOV_MAX memoryviews at most. For the writer."""
        sendmsg, done = self._call(self._raw.sendmsg), 0
        while done < len(views):
            rest = views[done:]
            try:
                sent = await self._when_writable(sendmsg, rest, (), _NO_SIGNAL)
            except OSError as error:
                raise self._broken(error, "writing") from error
            if sent == sum(map(len, rest)):
                self._pollable.writable = True
            self._sent += sent
            while done < len(views) and sent >= len(views[done]):
                sent -= len(views[done])
                done += 1
            if sent:
                views[done] = views[done][sent:]
            await flowcoro.checkpoint_if_due()                   # as in read_exactly()

    async def send_file(self, file, offset=0, count=None, *, head=b""):
        """Send `count` bytes (None: all that is there) of a file opened for reading in binary, from `offset`; returns how many.

        Less if the file ends before. head: bytes that go before it, a protocol's; they are not counted, and share a segment with
        its first if `count` is 512 KiB or more (Linux: TCP_CORK, which is off afterwards). By sendfile(2), where the data never
        come into this process; with TLS, in memory, or for files that are none of the system's (io.BytesIO), it is read in
        threads, and only then the file's position is used. It may be closed meanwhile by another task where sendfile(2) does it.
        BrokenError, ClosedError, BusyError; TypeError for what is no file, or no bytes, ValueError for offset, count, and a
        closed file; OSError, io.UnsupportedOperation if it cannot be read, or not from there (a pipe): the head may have been
        sent. Cancelled: an unknown part of both was sent.
        """
        await flowcoro.checkpoint_if_due()
        if isinstance(file, io.TextIOBase) or not (hasattr(file, "read") and hasattr(file, "seek")):
            raise TypeError(f"send_file({file!r:.80}): give a file opened for reading in binary: open(path, \"rb\"); text has to "
                            "be encoded")
        _whole(offset, 0, f"offset={offset!r}")
        count = math.inf if count is None else _whole(count, 0, f"count={count!r}")
        head = _as_bytes(head, "send_file(head=)")
        self._begin_write()
        try:
            number = self._number_for_sendfile(file)
            if number is None:
                await self._push(head)
                sent = None
            else:
                sent = await self._send_by_sendfile(number, offset, count, head)
            if sent is None:
                sent = 0
                while sent < count:
                    most = int(min(count - sent, TLS_CHUNK))
                    data = _as_bytes(await flowcoro.to_thread(_read_at, file, offset + sent, most), "send_file()")[:most]
                    if not data:
                        break
                    await self._push(data)
                    sent += len(data)
            return sent
        finally:
            self._end_write()

    def _number_for_sendfile(self, file):
        """A descriptor of its own for the file, so that nobody's close() puts another file in its place; None where sendfile(2)
        would do something else than write(): with TLS, for what decompresses, and where SIGPIPE ends the program."""
        if (self._tls is not None or not isinstance(self._raw, socket.socket) or not hasattr(os, "sendfile")
                or not isinstance(getattr(file, "raw", file), io.FileIO) or signal.getsignal(signal.SIGPIPE) == signal.SIG_DFL):
            return None
        number = file.fileno()
        try:
            return os.dup(number)
        except OSError:                     # no descriptors left
            return None

    async def _send_by_sendfile(self, number, offset, count, head):
        """How many bytes of the file were sent, after the head; None if only that was: sendfile() does not do it with this file.
        However it ends, the descriptor `number` is closed, and the cork off."""
        sendfile, sent, corked = self._call(os.sendfile), 0, False
        try:
            if head:
                corked = CORKED_FROM <= count < math.inf and self._cork(True)       # (inf: where its end is nobody knows)
                await self._push(head)
            try:
                while sent < count:
                    if self._pollable.writable:
                        await flowcoro.checkpoint_if_due()
                    most = count - sent
                    if corked and most > UNCORKED_END:
                        most -= UNCORKED_END
                    elif corked:
                        corked = self._cork(False)
                    some = await self._when_writable(sendfile, self._raw.fileno(), number, offset + sent,
                                                     int(min(most, SENDFILE_CHUNK)))
                    # A short one may be the file's end; that the buffer is full the next one says.
                    self._pollable.writable = True
                    if not some:
                        break
                    sent += some
                    self._sent += some
            except OSError as error:
                if not sent and not self._closed and error.errno in _NO_SENDFILE:
                    return None
                raise self._broken(error, "writing") from error
        finally:
            os.close(number)
            if corked:
                self._cork(False)
        return sent

    def _cork(self, on):
        """Let TCP hold back what does not fill a segment, or no longer; whether it does from now on."""
        try:
            self._call(self._raw.setsockopt)(socket.IPPROTO_TCP, socket.TCP_CORK, on)       # N3
            return on
        except (AttributeError, OSError):   # a system without (it is Linux's), a Unix socket, or closed meanwhile
            return False


class _Secured(_Bulk):
    """TLS on a connection."""

    __slots__ = ()

    async def start_tls(self, tls=True, *, server_side=False, server_name=None, timeout=HANDSHAKE_TIMEOUT):
        """Go on with TLS on this connection: STARTTLS of SMTP, IMAP, PostgreSQL …

        tls: an ssl.SSLContext, or True for client_tls(). server_name: the name that the certificate must be for (and SNI); a
        client that verifies needs it. TlsError, also if anything was received that has not been read: somebody in the middle
        may have put it there. Errors leave the connection unusable. Cancelled: handshake() goes on with it.
        """
        await flowcoro.checkpoint_if_due()
        context = _as_context(tls, server_side)
        if context is None:
            raise TypeError("start_tls() needs an ssl.SSLContext, or True")
        self._begin_read()
        try:
            self._begin_write()
            self._end_write()
            if self._tls is not None:
                raise RuntimeError(f"{self!r} speaks TLS already")
            if self._buffer:
                raise TlsError(None, f"{self!r}: {len(self._buffer)} bytes came before TLS began and were not read; they may be "
                               "of somebody in the middle, and are not taken for the peer's")
            self._set_tls(context, server_side, server_name)
        finally:
            self._end_read()
        await self.handshake(timeout=timeout)

    def _set_tls(self, context, server_side=False, server_name=None):
        server_name = _name_for_tls(server_name)
        if context.check_hostname and not server_side and not server_name:      # an SSLObject would check no name at all
            raise ValueError("the certificate is to be for a name, and there is none: give server_name=, or check_hostname=False "
                             "to the context")
        self._tls = _Tls(context, server_side, server_name or None, self._several)
        self._special = True

    async def handshake(self, *, timeout=HANDSHAKE_TIMEOUT):
        """Make the TLS handshake now; else the first read or write does. Nothing without TLS. TlsError, TimeoutError (seconds).

        Cancelled: it can be gone on with.
        """
        await flowcoro.checkpoint_if_due()
        if self._tls is not None and not self._tls.is_done:
            with flowcoro.move_on_after(_seconds(timeout, "timeout")) as scope:
                await self._tls.handshake(self)
            if scope.cancelled_caught:
                raise TimeoutError(f"{self!r}: the TLS handshake was not done within {timeout:g} s")

    async def _say_goodbye_for_good(self):
        """What a close() with TLS does first. Another close() waits meanwhile."""
        tls = self._tls
        tls.closing = flowcoro.Event()
        try:
            if self._writer is None:
                await self.shutdown_write()
                await self._drop_rest()
        finally:
            tls.closing.set()

    async def _drop_rest(self):
        """Receive and drop what is there. A close with something unread makes the system send a reset, and drop what is still
        under way to the peer (RFC 9293 section 3.6.1)."""
        tls = self._tls
        while tls.awaits_tickets() and self._reader is not None:        # then that task receives them
            tls.read_ended = flowcoro.Event()
            await tls.read_ended.wait()
        self._begin_read()
        try:
            self._reader, left = _CLOSER, LINGER_BYTES
            while left > 0 and (data := await self._receive(CHUNK) if tls.awaits_tickets() else self._recv(CHUNK)):
                left -= len(data)
        except BlockingIOError:         # no more
            pass
        finally:
            self._end_read()

    def caused(self, error):
        """Whether an exception, or all of a group, says that the peer or the network has broken this connection. Never blocks."""
        return _is_the_peers(error, self)

    @property
    def tls(self):
        """The ssl.SSLObject: version(), cipher(), getpeercert(), server_hostname …; None without TLS."""
        return self._tls and self._tls.object

    @property
    def alpn(self):
        """The protocol agreed upon by ALPN, or None."""
        return self._tls and self._tls.alone(self._tls.object.selected_alpn_protocol)


_current_task = flowcoro.current_task


class Socket(_Secured):
    """A connection: of TCP, of a Unix socket, in memory; plain or with TLS. A stream of bytes each way.

    `Socket(raw)` takes over a connected raw socket: a socket.socket, or one of the network that is current. Close it, best by
    `async with`, which closes at once, as close_nowait(), if an error ends the block. One task may read and another write at the
    same time.

    What each operation may raise: BusyError for a second reader or writer; ClosedError for what was closed here, also in tasks
    that wait; BrokenError for what the peer or the network has broken, and an end within what was asked for; with TLS TlsError,
    and TimeoutError if the handshake, which the first one makes, takes more than 60 seconds; OSError if the system has no memory;
    TypeError, ValueError. Messages name both ends. Each is a checkpoint.
    """

    __slots__ = ()

    # read() and write() are written out for speed: an echo of 1 KiB makes little else, and each coroutine more on the way
    # costs 2 % of it. Who waits is a checkpoint anyway, so it is not asked which task this is: 1 %. All that is rare goes
    # through _read_otherwise() and _write_otherwise(), which ask everything anew.

    async def read(self, max_bytes=CHUNK):
        """From 1 to `max_bytes` bytes, as soon as there are any; b"" at the end, again and again. Cancelled: nothing consumed.

        The end is what the peer has said; with TLS its goodbye. A connection that was cut before that is a BrokenError.
        """
        if self._special or self._reader is not None or max_bytes.__class__ is not int or max_bytes < 1:
            return await self._read_otherwise(max_bytes)
        pollable = self._pollable
        if pollable.readable:
            task = _current_task()
            if task.budget <= 0:
                return await self._read_otherwise(max_bytes)
            task.budget -= 1
        while True:
            if not pollable.readable:
                self._reader = _SOMEBODY
                try:
                    await pollable.wait_readable()
                except flowcoro.ClosedError as error:
                    raise self._closed_error() from error
                finally:
                    self._reader = None
            pollable.readable = False           # first this, then try: no edge is lost
            try:
                data = self._recv(max_bytes)
            except BlockingIOError:
                continue
            except BaseException as error:
                pollable.readable = True
                if not isinstance(error, OSError):      # a wrong argument, or a signal handler's
                    _whole(max_bytes, 1, f"read({max_bytes!r})")
                    raise
                raise self._broken(error, "reading") from error
            count = len(data)
            if count == max_bytes or pollable.hangup:
                pollable.readable = True
            if not count:
                self._at_end()
                if self._lost is not None:
                    raise self._own(BrokenError(*self._lost))
            self._received += count
            return data

    async def write(self, data):
        """Write all of `data` (bytes-like, which must not change meanwhile); returns when the system has it.

        When the peer does not read, this waits. Cancelled: an unknown part was sent; with TLS, of whole records.
        """
        pollable = self._pollable
        if self._special or self._writer is not None or data.__class__ is not bytes or not pollable.writable:
            return await self._write_otherwise(data)
        task = _current_task()
        if task.budget <= 0:
            return await self._write_otherwise(data)
        task.budget -= 1
        try:
            sent = self._send(data, _NO_SIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._broken(error, "writing") from error
        self._sent += sent
        if sent != len(data):
            pollable.writable = False
            await self._write_rest(memoryview(data)[sent:])

    async def read_exactly(self, count):
        """Exactly `count` bytes; b"" for 0. BrokenError when the peer ends before: read() still gives what has come.

        Cancelled: nothing consumed.
        """
        await flowcoro.checkpoint_if_due()
        _whole(count, 0, f"read_exactly({count!r})")
        self._begin_read()
        try:
            buffer = self._buffer
            while len(buffer) < count:
                data = await self._pull(min(max(count - len(buffer), CHUNK), LARGEST_CHUNK))
                if not data:
                    raise self._cut_short(f"one of {count} bytes")
                if len(data) == count and not buffer:
                    return data
                buffer += data
                await flowcoro.checkpoint_if_due()           # a fast peer may never let it wait
            return self._take(count)
        finally:
            self._end_read()

    async def read_until(self, separator=b"\n", *, limit=UNTIL_LIMIT):
        """All bytes up to and including `separator`; b"" at the end, if nothing is left.

        limit: bytes, separator included. LimitError when so many come without it, BrokenError when the peer ends before it:
        nothing is consumed, and read() still gives what has come. Cancelled: nothing consumed. ValueError for an empty separator,
        or one that is longer than the limit.
        """
        await flowcoro.checkpoint_if_due()
        if not isinstance(separator, (bytes, bytearray)):
            raise TypeError(f"read_until({separator!r}): the separator must be bytes, such as b\"\\n\"")
        if not separator:
            raise ValueError("read_until(b\"\"): the separator must have at least one byte")
        if limit != math.inf and _whole(limit, 1, f"limit={limit!r}") < len(separator):
            raise ValueError(f"limit={limit!r}: the separator itself has {len(separator)} bytes, and counts; allow more")
        self._begin_read()
        try:
            buffer, searched = self._buffer, 0
            while True:
                found = buffer.find(separator, searched)
                length = found + len(separator) if found >= 0 else len(buffer)
                if length > limit:
                    raise self._own(LimitError(f"{self!r}: no {bytes(separator)!r} within limit={limit} bytes; allow more with "
                                               "limit=, or take pieces of any length with read()"))
                if found >= 0:
                    return self._take(length)
                searched = max(0, length - len(separator) + 1)
                data = await self._pull(CHUNK)
                if not data:
                    if buffer:
                        raise self._cut_short(f"a {bytes(separator)!r}")
                    return b""
                buffer += data
                await flowcoro.checkpoint_if_due()           # as in read_exactly()
        finally:
            self._end_read()

    async def shutdown_write(self):
        """Tell the peer that no more comes (its read returns b""); reading goes on. Twice is once. With TLS its goodbye first.

        BusyError while another task writes. Cancelled: not shut down, or (TLS) the goodbye is half sent: nothing more can be
        written, and again goes on with it.
        """
        await flowcoro.checkpoint_if_due()
        if self._shut:
            return
        if self._tls is not None:
            if not self._tls.is_done:
                await self.handshake()
            await self._say_goodbye()
        self._begin_write()
        try:
            self._call(self._raw.shutdown)(socket.SHUT_WR)
            self._shut = True
        except OSError as error:
            raise self._broken(error, "shutting down") from error
        finally:
            self._end_write()
            self._mark()

    async def _say_goodbye(self):
        self._begin_write()
        try:
            self._tls.say_goodbye()
            await self._tls.flush(self)
        finally:
            self._end_write()

    async def close(self):
        """Close the connection. Twice is once. What write() has returned from is delivered, unless the peer still sends: to
        answer one that does, shutdown_write(), then read and drop until the end, for as long as you like, and close.

        With TLS it says goodbye first; and a client that has received nothing waits for the server's end, so that what it has
        written arrives. Both take 2 seconds at most. Tasks that wait for it get ClosedError. Cancelled: it is closed.
        """
        tls = self._tls
        try:
            if tls is not None and tls.is_done and not self._closed:
                with flowcoro.move_on_after(CLOSE_TIMEOUT):
                    await (self._say_goodbye_for_good() if tls.closing is None else tls.closing.wait())
        except (OSError, flowcoro.ClosedError, flowcoro.BusyError):     # then it is closed without
            pass
        finally:
            self._close()
        await flowcoro.checkpoint_if_due()

    def close_nowait(self):
        """Close at once: no TLS goodbye, else as close(). Never blocks."""
        self._close()

    async def __aexit__(self, kind, error, trace):
        if kind is None:
            await self.close()
        else:
            self._close()

    # -- about it

    @property
    def peer(self):
        """The other end's address, as `local`. ClosedError or BrokenError, if it was not asked for before the end."""
        if self._peer is None:
            if self._closed:
                raise self._closed_error()
            try:
                self._peer = self._raw.getpeername()
            except OSError as error:
                raise BrokenError(error.errno, f"{self!r}: it has no peer (any more): {error.strerror}") from error
        return self._peer

    def statistics(self):
        """{"bytes_received", "bytes_sent": as on the wire, "bytes_buffered": received (and decrypted) and not yet read,
        "reading", "writing": whether a task does, "tls": its version or None}"""
        decrypted = len(self._tls.early) + self._tls.alone(self._tls.object.pending) if self._tls else 0
        return {"bytes_received": self._received, "bytes_sent": self._sent, "bytes_buffered": len(self._buffer) + decrypted,
                "reading": self._reader is not None, "writing": self._writer is not None,
                "tls": self._tls and self._tls.alone(self._tls.object.version)}

    def __repr__(self):
        ends = ""
        for word, known, ask in ("from", self._local, "getsockname"), ("to", self._peer, "getpeername"):
            try:
                ends += f" {word} {_shown(getattr(self._raw, ask)() if known is None else known)}"
            except OSError:             # closed, or lost
                pass
        return f"<Socket{ends}{' TLS' if self._tls else ''}{' closed' if self._closed else ''}>"

    # -- making one

    @classmethod
    async def connect(cls, host, port, *, tls=None, server_name=None, timeout=None, local=None, family=0):
        """Connect by TCP to a host by name or address: the first of its addresses that answers (RFC 8305).

        tls: True for client_tls(), or an ssl.SSLContext; the handshake is made, and the certificate must be for `host` (or
        server_name). timeout: seconds for all of it (TimeoutError, which says how far it came); None: the system's, two minutes
        for each address, and 60 seconds for the handshake. local: (address, port) to connect from, which chooses the family too;
        port 0: a free one. family: socket.AF_INET or AF_INET6 only.
        ResolveError; BrokenError with the error of every attempt, also in its `errors`; TlsError; OSError for what is wrong here,
        such as `local` or too few descriptors; TypeError, ValueError. Cancelled: nothing is left behind.
        """
        context, timeout = _client_context(tls, server_name), _seconds(timeout, "timeout")
        if local is not None:
            its_family = _checked_address(local, "local")
            if its_family and family not in (0, its_family):
                raise ValueError(f"local={local!r} is not of family={family!r}: leave family= out")
            family = family or its_family
        attempts = {}           # address -> its OSError, None while it has not answered
        with flowcoro.move_on_after(timeout):
            await flowcoro.checkpoint_if_due()
            network = _network()
            try:
                found = _interleaved(await resolve(host, _checked_port(port, 1), family=family))
            except ResolveError as error:
                if local is None:
                    raise
                raise ResolveError(error.errno, f"{error.strerror} (local={local!r} allows its own family only)") from error
            raw, pollable, address = await _connect_to_any(network, found, f"{host}:{port}", local, attempts)
            attempts = {address: OSError(None, "connected, and the TLS handshake is not done")}
            return await cls._ready(raw, network, pollable, address, context, server_name or host)
        raise TimeoutError(f"connecting to {host}:{port} took longer than timeout={timeout:g} s: " + ("; ".join(
            f"{_shown(address)}: {'no answer yet' if error is None else _why(error)}" for address, error in attempts.items())
            or "its name was not yet resolved") + ". Is the host up, and does a firewall let you through? Else allow more time")

    @classmethod
    async def connect_unix(cls, path, *, tls=None, server_name=None, timeout=None):
        """Connect to a Unix socket: a path, or a name that begins with "\0" (Linux). Otherwise as connect().

        BrokenError also when nobody listens, or the path is not there. timeout=None: while the server's backlog is full this
        waits for as long as that is. OSError for a path of more than 107 bytes.
        """
        context, timeout, path = _client_context(tls, server_name), _seconds(timeout, "timeout"), _checked_path(path)
        with flowcoro.move_on_after(timeout):
            await flowcoro.checkpoint_if_due()
            network = _network()
            raw, pollable = await _connect_unix(network, path)
            return await cls._ready(raw, network, pollable, path, context, server_name)
        raise TimeoutError(f"connecting to {_shown(path)} took longer than timeout={timeout:g} s: its backlog was full, or the "
                           "TLS handshake not done. Does its server accept connections?")

    @classmethod
    async def _ready(cls, raw, network, pollable, address, context, server_name):
        """The Socket, after the handshake if it has TLS."""
        sock = cls(raw, network, pollable, address)
        try:
            _send_at_once(raw)
            if context is not None:
                sock._set_tls(context, False, server_name)
                await sock.handshake()
        except BaseException:
            sock._close()
            raise
        return sock


# ---- connecting -----------------------------------------------------------------------------------------------

def _send_at_once(raw):
    """What is written is sent at once, and not kept back until the last has been acknowledged (RFC 9293 section 3.7.4)."""
    if raw.family in (socket.AF_INET, socket.AF_INET6):
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:             # some systems say EINVAL once the peer has reset it, which reading will tell
            pass


async def _until_connected(raw, pollable):
    while True:
        pollable.writable = False
        await pollable.wait_writable()
        if number := raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(number, os.strerror(number))
        try:
            raw.getpeername()
        except OSError as error:
            if error.errno != errno.ENOTCONN:       # which says: not yet
                raise
        else:
            pollable.writable = True
            return


async def _connect_one(network, family, kind, proto, address, local=None):
    """(raw, pollable), connected. OSError. Cancelled: nothing is left behind."""
    raw, pollable = network.socket(family, kind, proto), None
    try:
        if local is not None:
            try:
                raw.bind(local)
            except OSError as error:
                raise _refused(error, "connect from", local) from error
        number = raw.connect_ex(address)
        if number and number not in _UNDER_WAY:
            raise OSError(number, os.strerror(number))
        pollable = network.pollable(raw)            # only now: a socket that never connected looks hung up to epoll
        if number:
            await _until_connected(raw, pollable)
        if kind == socket.SOCK_STREAM and family != getattr(socket, "AF_UNIX", None) and raw.getsockname() == raw.getpeername():
            # A port of one's own machine where nobody listens, and which the system chose for this end too (RFC 9293 3.5).
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return raw, pollable
    except BaseException:
        if pollable is not None:
            pollable.close()
        raw.close()
        raise


async def _connect_to_any(network, found, target, local, attempts):
    """(raw, pollable, address) of the first that connects: RFC 8305 section 5. BrokenError with every failure.

    `attempts` gets each address, and its error once there is one.
    """
    won = []

    async def attempt(family, kind, proto, address, done):
        attempts[address] = None
        try:
            raw, pollable = await _connect_one(network, family, kind, proto, address, local)
        except OSError as error:
            attempts[address] = error.with_traceback(None)          # the frames would know it, and it them
            done.set()
            return
        won.append((raw, pollable, address))
        if won[0][0] is not raw:            # another one was faster, at the same time
            pollable.close()
            raw.close()
        else:
            group.cancel()

    try:
        if len(found) == 1:                     # most are: without tasks
            family, kind, proto, address = found[0]
            attempts[address] = None
            try:
                return *await _connect_one(network, family, kind, proto, address, local), address
            except OSError as error:
                attempts[address] = error.with_traceback(None)
        else:
            async with flowcoro.TaskGroup() as group:
                for each in found:
                    done = flowcoro.Event()
                    group.spawn(attempt(*each, done), name=f"connect to {_shown(each[3])}")
                    with flowcoro.move_on_after(ATTEMPT_DELAY):
                        await done.wait()
            if won:
                return won[0]
    except BaseException:
        for raw, pollable, _ in won[:1]:
            pollable.close()
            raw.close()
        raise
    raise _not_connected(target, attempts) from next(iter(attempts.values()))


def _not_connected(target, attempts):
    """The error for failed attempts, {address: OSError}."""
    told = [f"{_shown(address)}: {_why(error)}" for address, error in attempts.items()]
    said = "; ".join(told).removeprefix(f"{target}: ") if len(told) == 1 else "; ".join(told)
    number = next(iter(attempts.values())).errno
    if all(error.errno in _EXHAUSTED for error in attempts.values()):
        return OSError(number, f"cannot connect to {target}: {said}; close some descriptors, or raise `ulimit -n`")
    if all(error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE) for error in attempts.values()):      # local=, or no port left
        return OSError(number, f"cannot connect to {target}: {said}")
    broken = BrokenError(number, f"cannot connect to {target}: {said}")
    broken.errors = tuple(attempts.items())
    return broken


async def _connect_unix(network, path):
    delay = FIRST_RETRY
    while True:
        try:
            return await _connect_one(network, socket.AF_UNIX, socket.SOCK_STREAM, 0, path)
        except BlockingIOError:         # the backlog is full, and nothing tells when it is not
            await flowcoro.sleep(delay)
            delay = min(2 * delay, LONGEST_RETRY)
        except OSError as error:
            if error.errno is None:     # "AF_UNIX path too long"
                raise _refused(error, "connect to", path) from error
            raise _not_connected(_shown(path), {path: error.with_traceback(None)}) from error


# ---- servers: the base ----------------------------------------------------------------------------------------

class _Listener(_Owner):
    """One address that a server listens on."""

    __slots__ = ("_accept", "_another")

    def __init__(self, raw, network, another=None):
        super().__init__(raw, network)
        self._accept = self._call(raw.accept)
        self._another = another             # a function that makes a raw socket on the same address, if that may be shared

    def _close(self):
        if not super()._close():
            return False
        self._accept = _no_more
        return True

    def take(self):
        """(raw, address) of the next connection, None if there is none yet, or one that was lost. ClosedError; OSError of
        _EXHAUSTED, or of a socket that does not listen."""
        pollable = self._pollable
        while pollable.readable:
            pollable.readable = False           # first this, then try: no edge is lost
            try:
                found = self._accept()
            except BlockingIOError:
                continue
            except BaseException as error:      # also a signal handler's
                pollable.readable = True
                if not isinstance(error, OSError):
                    raise
                if self._closed:
                    raise self._closed_error() from error
                if error.errno not in _ONE_LOST:
                    raise
                return None                     # and not the next at once: it may say so again and again
            pollable.readable = True
            return found
        return None

    async def wait(self):
        """Until take() may find something, or has an error."""
        try:
            await self._pollable.wait_readable()
        except flowcoro.ClosedError:
            pass

    def __repr__(self):
        return f"<listener{f' on {_shown(self._local)}' if self._local else ''}>"


class _Drain:
    """The connections of one serve(), and who waits until there are none."""

    def __init__(self):
        self.open = {}          # each Socket in the hands of a handler
        self.empty = flowcoro.ParkingLot("wait for the handlers of a server to end")

    @flowcoro.atomic
    def add(self, sock):
        self.open[sock] = None

    @flowcoro.atomic
    def remove(self, sock):
        self.open.pop(sock, None)
        if not self.open:
            self.empty.unpark_all()

    async def wait(self):
        await self.empty.park_unless(lambda: not self.open)


def _is_the_peers(error, sock):
    """Whether the peer of this connection has caused it, and not that of another which the handler has."""
    if isinstance(error, ExceptionGroup):
        return all(_is_the_peers(each, sock) for each in error.exceptions)
    of = getattr(error, "_of", None)
    return of is not None and of() is sock


def _listening(network, family, address, backlog, prepare):
    """A raw socket that listens. OSError that names the address."""
    raw = None
    try:
        raw = network.socket(family, socket.SOCK_STREAM, 0)
        prepare(raw)
        raw.bind(address)
        raw.listen(backlog)
        return raw
    except BaseException as error:
        if raw is not None:
            raw.close()
        if isinstance(error, OSError):
            raise _refused(error, "listen on", address) from error
        raise


def _listen(network, family, address, backlog, prepare, shared=False):
    """A _Listener. OSError that names the address."""
    raw = _listening(network, family, address, backlog, prepare)
    try:
        local = raw.getsockname()
        another = functools.partial(_listening, network, family, local, backlog, prepare) if shared else None
        listener = _Listener(raw, network, another)
    except BaseException:
        raw.close()
        raise
    listener._local = local
    return listener


# ---- several processes ----------------------------------------------------------------------------------------

# What the supervisor tells a worker process: to stop as on SIGTERM, and to cancel what it does.
_STOP, _CANCEL = b"s", b"c"

# All servers of this process, so that a fork knows what is not for it.
_SERVERS = weakref.WeakSet()


def _flush():
    for file in sys.stdout, sys.stderr:
        try:
            if file is not None:
                file.flush()
        except (OSError, ValueError, AttributeError):           # closed, or whoever reads it is gone, or no file
            pass


def _fork():
    """os.fork(), which from Python 3.12 on warns when there are other threads: to_thread()'s, or the program's.

    They are not there in the child, but locks that they hold are, for good. It is given new ones for all that it needs: by
    Python (of imports, logging, threading, stdout and stderr), by the C library (malloc), by the kernel (its own). Nobody
    can do that for a file which another thread is writing at that moment, or for locks of other libraries.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
        return os.fork()


async def _heard(sock):
    """The next few bytes from a socket pair, b"" at its end."""
    pollable = flowcoro.Pollable(sock)
    try:
        while True:
            pollable.readable = False
            try:
                return sock.recv(100)
            except BlockingIOError:
                await pollable.wait_readable()
            except ConnectionResetError:        # the other end is gone, with something unread
                return b""
    finally:
        pollable.close()


def _tell(sock, what):
    """Send a few bytes into a socket pair. Who is gone, or has enough to hear, need not hear more."""
    try:
        sock.send(what, _NO_SIGNAL)
    except OSError:
        pass


def _pair():
    """A pair of sockets, neither of which blocks."""
    pair = socket.socketpair()
    for sock in pair:
        sock.setblocking(False)
    return pair


class _Signal:
    """A signal that tasks hear. Its handler may interrupt any bytecode of the kernel, so it only sends a byte."""

    def __init__(self, number):
        self.number = number
        self.ear, self.mouth = _pair()
        signal.signal(number, self.handle)

    def handle(self, number, frame):
        _tell(self.mouth, bytes([number]))

    def hear_at_once(self):
        """Have the handler in C send the byte. Python 3.13.0 in the child of a fork in another thread than the main one takes
        no notice of a signal before something interrupts it. Other signals are heard then, too, and wake the kernel."""
        signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)

    async def hear(self, act):
        while said := await _heard(self.ear):
            if self.number in said:
                act()

    def close(self):
        if signal.getsignal(self.number) == self.handle:        # else somebody has put another one there
            signal.signal(self.number, signal.SIG_DFL)
        self.ear.close()
        self.mouth.close()


class _Process:
    """A worker process, as the supervisor sees it."""

    # What it counts, in memory that both see: the numbers of _Server._counts(), 8 bytes each.
    COUNTS = 6

    def __init__(self, place):
        self.place = place
        self.shared = mmap.mmap(-1, 8 * self.COUNTS)
        self.counts = memoryview(self.shared).cast("Q")
        self.line, self.its_line = _pair()          # it sends a byte once it serves; the supervisor, what it is to do (S1)
        self.pid = self.pidfd = None
        self.started = flowcoro.now()
        self.serving, self.ended = flowcoro.Event(), flowcoro.Event()
        self.hangs = False          # it was killed, for it did not begin
        self.status = None          # its exit status, or minus the number of the signal that killed it; None if that is lost

    def kill(self):
        if not self.ended.is_set():
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:              # reaped by something else in this program
                pass

    def reap(self, options=0):
        """Whether it has ended (S2)."""
        if self.ended.is_set():
            return True
        try:
            pid, status = os.waitpid(self.pid, options)
        except ChildProcessError:                   # something else in this program waits for all children
            pass
        else:
            if not pid:
                return False
            self.status = os.waitstatus_to_exitcode(status)
        del self.place.supervisor.processes[self.pid]
        self.place.supervisor.add(self.counts)
        self.ended.set()
        return True

    def close(self):
        self.line.close()
        self.its_line.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    async def wait(self):
        """Until it has ended, and is reaped."""
        with flowcoro.move_on_after(START_TIMEOUT) as scope:
            if await _heard(self.line):
                self.serving.set()
        if scope.cancelled_caught:
            try:                                # it may have said so while this process was stopped
                if self.line.recv(100):
                    self.serving.set()
            except OSError:
                self.hangs = True
                self.kill()
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):           # no such system call, or not allowed here
            while not self.reap(os.WNOHANG):
                await flowcoro.sleep(LOOK)
            return
        pollable = flowcoro.Pollable(self.pidfd)
        try:
            pollable.readable = False
            await pollable.wait_readable()
        finally:
            pollable.close()
        self.reap()

    def __str__(self):
        if self.hangs:
            return (f"worker process {self.pid} did not serve within {START_TIMEOUT:g} s, and was killed (does it wait for a "
                    "lock that another thread held at the fork?)")
        how = ("has ended, and something else in this program has fetched its exit status" if self.status is None
               else f"was killed by signal {-self.status} ({signal.strsignal(-self.status)})" if self.status < 0
               else f"ended with exit status {self.status}")
        return f"worker process {self.pid} {how}"


class _Place:
    """What one worker process after the other serves: its listening sockets, one for each address."""

    def __init__(self, supervisor, raws):
        self.supervisor, self.raws = supervisor, raws
        self.process = None         # the one that is to be there
        self.delay = 0.0            # seconds until the next one, after this has died

    def wait_longer(self):
        self.delay = min(2 * self.delay, LONGEST_RESTART)


class _Supervisor:
    """serve() in several processes: keeps one in each place."""

    def __init__(self, server, handler, count, reload, drain_timeout, options):
        self.server, self.handler, self.reload = server, handler, reload
        self.drain_timeout, self.options = drain_timeout, options
        self.places = [_Place(self, [listener._raw for listener in server._listeners])]
        self.processes = {}                     # process id -> _Process, until it is reaped
        self.totals = [0] * _Process.COUNTS     # what those counted that have ended
        self.restarts = 0
        self.reload_asked = flowcoro.Event()
        self.count = count
        self.watchers = None                    # the TaskGroup of those who watch a process each
        self.hangups = None                     # SIGHUP, if it is ours

    # -- the supervisor itself

    async def run(self):
        """Until the server is closed, or a stop requested, and all have ended. OSError: the first ones cannot be forked."""
        refused = None
        try:
            self.open()
            async with flowcoro.TaskGroup() as self.watchers:
                try:
                    for place in self.places:
                        place.process = self.start(place, self.handler)
                    await self.look_after()
                    self.stop_listening()
                    await self.end_all(_STOP, self.drain_timeout + END_TIMEOUT)
                except OSError as error:        # kept, for a group would wrap it
                    refused = error
                finally:
                    self.stop_listening()
                    with flowcoro.CancelScope(shield=True):
                        await self.end_all(_CANCEL, END_TIMEOUT)
                    self.watchers.cancel()
        finally:
            self.close()
        if refused is not None:
            try:
                raise refused
            finally:
                del refused

    async def look_after(self):
        """Until the server is closed."""
        async with flowcoro.TaskGroup() as group:
            group.spawn(self.server._close_on_stop(), name="close the server on a stop")
            group.spawn(self.replace_when_asked(), name="replace the worker processes when asked")
            if self.hangups is not None:
                group.spawn(self.hangups.hear(self.reload_asked.set), name="hear SIGHUP")
            await self.server._closing.wait()
            group.cancel()

    def open(self):
        """The listening sockets, watched by none but those who accept; the handler of SIGHUP."""
        for listener in self.server._listeners:
            listener._pollable.close()
        for _ in range(self.count - 1):
            place = _Place(self, [])
            self.places.append(place)
            for listener in self.server._listeners:
                place.raws.append(listener._raw if listener._another is None else listener._another())
        if (threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP")
                and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL):
            self.hangups = _Signal(signal.SIGHUP)

    def close(self):
        """Nothing is left, whatever has happened before: signals, processes, descriptors."""
        if self.hangups is not None:
            self.hangups.close()
        for process in self.processes.values():             # the shield was dropped by a signal that came once more
            process.kill()
        for process in list(self.processes.values()):
            until = time.monotonic() + END_TIMEOUT          # but one that hangs in the operating system cannot be waited for
            while not process.reap(os.WNOHANG) and time.monotonic() < until:
                time.sleep(0.001)
            process.close()
        self.stop_listening()

    def stop_listening(self):
        self.server.close()
        for raw in self.raws():
            raw.close()

    def raws(self):
        return [raw for place in self.places for raw in place.raws]

    async def end_all(self, what, seconds):
        """Tell it to all that live; after so many seconds they are killed."""
        for process in self.processes.values():
            _tell(process.line, what)
        with flowcoro.move_on_after(seconds):
            await self.wait_for_all()
        for process in self.processes.values():
            process.kill()
        await self.wait_for_all()

    async def wait_for_all(self):
        """It looks for itself, too: who watches them may have been cancelled by a signal that came once more."""
        for process in list(self.processes.values()):
            while not process.reap(os.WNOHANG):
                with flowcoro.move_on_after(LOOK):
                    await process.ended.wait()

    # -- processes

    def start(self, place, handler):
        """Fork one. OSError: the system has no more of them."""
        _flush()                                # else both would write what is in there
        process = None
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            # No signal in between: in the child it would meet handlers of the parent, which may be left by an error. (Nor in this
            # thread; but another one may take it, and then its handler still runs in the main thread.)
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            process = _Process(place)
            process.pid = _fork()
            if not process.pid:
                self.be_a_worker(process, handler, mask)
            process.its_line.close()
            self.processes[process.pid] = process
            self.watchers.spawn(self.watch(process), name=f"watch worker process {process.pid}")
        except BaseException as error:
            if process is not None:
                self.undo(process)
            if not isinstance(error, OSError):
                raise
            raise OSError(error.errno, f"cannot fork a worker process: {error.strerror}. Raise the limit of processes (ulimit "
                          "-u, pids.max of the cgroup), of descriptors (ulimit -n) or of memory, or ask for fewer with "
                          "processes=") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return process

    def undo(self, process):
        """Leave nothing of one that nobody watches, because an error came in between."""
        self.processes.pop(process.pid, None)
        process.close()
        if process.pid is not None:
            process.kill()
            os.waitpid(process.pid, 0)

    async def watch(self, process):
        try:
            with flowcoro.CancelScope(shield=True):
                await process.wait()
        finally:
            process.close()
        place = process.place
        await flowcoro.sleep(LOOK)              # a stop may have reached it first, if somebody has told all at once
        if self.server.closed or place.process is not process:      # it was replaced, or is not yet there
            return
        if not place.delay or flowcoro.now() - process.started >= STEADY:
            place.delay = RESTART
        else:
            place.wait_longer()
        flowcoro.report_error(ChildProcessError(str(process)), f"{self.server!r}: a worker process has died; the next one starts "
                              f"in {place.delay:g} s", "flowcoro_net")
        while True:
            await flowcoro.sleep(place.delay)
            if self.server.closed or place.process is not process:
                return
            try:
                place.process = self.start(place, self.handler)
            except OSError as error:
                place.wait_longer()
                flowcoro.report_error(error, f"{self.server!r}: a worker process cannot be replaced for the moment; it is tried "
                                      f"again in {place.delay:g} s", "flowcoro_net")
            else:
                self.restarts += 1
                return

    async def retire(self, process):
        """Have one end that has been replaced."""
        _tell(process.line, _STOP)
        with flowcoro.move_on_after(self.drain_timeout + END_TIMEOUT):
            await process.ended.wait()
        process.kill()

    def add(self, counts):
        """Keep what a process has counted; what it had open is not."""
        counts[0] = 0
        for index, count in enumerate(counts):
            self.totals[index] += count

    def counts(self):
        return [sum(column) for column in zip(self.totals, *(process.counts for process in self.processes.values()))]

    # -- reloading

    async def replace_when_asked(self):
        while True:
            await self.reload_asked.wait()
            self.reload_asked.clear()
            try:
                await self.replace_all()
            except Exception as error:          # of reload=, or no process can be forked
                flowcoro.report_error(error, f"{self.server!r}: reloading failed; the worker processes that have not been "
                                      "replaced go on", "flowcoro_net")

    async def replace_all(self):
        """One after the other: the old one is asked to end once the new one serves, and then the new handler is everybody's."""
        handler = self.handler
        if self.reload is not None:
            found = self.reload()
            if inspect.isawaitable(found):
                found = await found
            if found is not None:
                handler = found
            if not callable(handler):
                raise TypeError(f"reload= returned {found!r}: give an async function that takes a Socket, not called yet; or "
                                "None, for the same as before")
        for place in self.places:
            if self.server.closed:              # by now
                return
            new = self.start(place, handler)
            await flowcoro.when_any(new.serving.wait(), new.ended.wait())
            if new.ended.is_set():
                raise ChildProcessError(f"{new}{'' if new.serving.is_set() or new.hangs else ', before it served'}")
            self.handler = handler
            old, place.process, place.delay = place.process, new, 0.0
            self.watchers.spawn(self.retire(old), name=f"retire worker process {old.pid}")

    # -- in the worker process

    def be_a_worker(self, process, handler, mask):
        """Serve, in the child of the fork, and never return."""
        status = 1
        try:
            gc.freeze()         # what is the parent's is not for this process to finalize
            if self.hangups is not None:
                self.hangups.close()
            for name in "SIGINT", "SIGHUP":                     # a terminal sends these to all; the supervisor decides
                if hasattr(signal, name):
                    signal.signal(getattr(signal, name), signal.SIG_IGN)
            terminations = _Signal(signal.SIGTERM)              # whatever the supervisor had there
            terminations.hear_at_once()                         # and not a descriptor of another loop in the parent
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self.leave_others(process)
            flowcoro.run(self.serve(process, handler, terminations), workers=1, grace=self.drain_timeout + END_TIMEOUT / 2)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            _flush()
            os._exit(status)

    @staticmethod
    def leave_others(process):
        """Close what others have: else a port that they close would stay open, and their peers would wait for an end."""
        process.line.close()
        for server in list(_SERVERS):
            sockets = [listener._raw for listener in server._listeners]
            if server._drain is not None:
                sockets += [sock._raw for sock in server._drain.open]
            if server._supervisor is not None:
                sockets += server._supervisor.raws()
                for other in server._supervisor.processes.values():
                    other.close()
            for raw in sockets:
                if raw not in process.place.raws:
                    raw.close()

    def take_over(self, process):
        """Make the server, which the handler may know, that of this process."""
        server = self.server
        for raw, listener in zip(process.place.raws, server._listeners):
            local = listener._local
            listener.__init__(raw, _network())
            listener._local = local
        _Server.__init__(server, server._listeners, server._context)
        server._file = None             # of a Unix socket: the supervisor removes it
        server._shared = process.counts
        return server

    async def serve(self, process, handler, terminations):
        server = self.take_over(process)
        async with flowcoro.TaskGroup() as group:
            group.spawn(terminations.hear(flowcoro.request_stop), name="hear SIGTERM")
            group.spawn(self.obey(process.its_line, group), name="hear the supervisor")
            serving = group.spawn(server.serve(handler, drain_timeout=self.drain_timeout, **self.options))
            while server._drain is None and not serving.done():
                await flowcoro.checkpoint()
            if not serving.done():
                _tell(process.its_line, b"here")
            await serving
            group.cancel()

    async def obey(self, line, group):
        """Stop when told to, or when nobody is there any more (S1); once is enough, whoever asks again."""
        said = True
        while said:
            said = await _heard(line)
            flowcoro.request_stop()
            if _CANCEL in said:
                group.cancel()


# ---- servers --------------------------------------------------------------------------------------------------

class _Acceptor:
    """What TcpServer and UnixServer share: it listens, and gives out each connection once."""

    def __init__(self, listeners, context):
        self._listeners, self._context = listeners, context
        _SERVERS.add(self)
        self._supervisor = None         # while serve(processes=) runs
        self._shared = None             # in a worker process: where the supervisor sees the counts
        self._drain = None              # while serve() runs
        self._accepting = None          # the task in accept()
        self._closing = flowcoro.Event()
        self._accepted = self._failed = self._broken = self._unshaken = self._pauses = 0
        self._reported = -math.inf      # when the last pause was told
        self._paused = False

    # -- accepting

    async def accept(self):
        """The next connection, a Socket. With TLS the handshake is made by its first read or write, or handshake().

        Without descriptors left it pauses, says so to sys.unraisablehook, and goes on. ClosedError after close();
        BusyError when another task accepts. Cancelled: no connection is lost.
        """
        await flowcoro.checkpoint_if_due()
        self._begin_accepting()
        try:
            while True:
                for listener in self._listeners:
                    if sock := await self._take(listener):
                        return sock
                if len(self._listeners) == 1:
                    await self._listeners[0].wait()
                else:
                    await flowcoro.when_any(*(listener.wait() for listener in self._listeners))
        finally:
            self._accepting = None

    @flowcoro.atomic
    def _begin_accepting(self):
        if self.closed:
            raise self._closed_error()
        self._refuse_second()
        self._accepting = flowcoro.current_task()

    def _refuse_second(self):
        if self._drain is not None:
            raise flowcoro.BusyError(f"{self!r} is being served already; one serve() at a time, and no accept() meanwhile")
        if self._accepting is not None:
            raise flowcoro.BusyError(f"{self._accepting!r} is in accept() of {self!r} already; one task at a time, which may "
                                     "give the connections to others")

    async def _take(self, listener):
        """A Socket; None if there is none yet, after a pause if none can be made."""
        if self.closed:
            raise self._closed_error()
        address = None
        try:
            found = listener.take()
            if found is None:
                return None
            raw, address = found
            return self._taken(listener, raw, address)
        except OSError as error:
            if error.errno in _EXHAUSTED:
                await self._pause(error)
            elif self.closed:
                raise self._closed_error() from error
            elif address is None:
                raise
            else:
                self._not_taken(error, address)
        except Exception as error:
            if address is None:
                raise
            self._not_taken(error, address)
        return None

    def _not_taken(self, error, address):
        """It harms no other."""
        self._failed += 1
        flowcoro.report_error(error, f"{self!r} has closed a connection of {_shown(address)}, of which no Socket could be "
                              "made", "flowcoro_net")

    def _taken(self, listener, raw, address):
        """The Socket of what the system gave."""
        sock = None
        try:
            sock = Socket(raw, listener._network, None, address)
            _send_at_once(raw)
            if self._context is not None:
                sock._set_tls(self._context, True)
        except BaseException:
            if sock is not None:
                sock._close()
            raw.close()
            raise
        self._accepted += 1
        self._paused = False
        return sock

    async def _pause(self, error):
        """Wait a little, for something has run out; those who wait to be accepted stay in the backlog."""
        if not self._paused:
            self._paused = True
            self._pauses += 1
            self._show()
            now = flowcoro.now()
            if now - self._reported >= REPORT_PAUSE:
                self._reported = now
                flowcoro.report_error(error, f"{self!r} cannot accept connections for the moment: {error.strerror} "
                                      f"({error.errno}). It tries again every few tenths of a second; close some, raise "
                                      "`ulimit -n`, or set max_connections= of serve()", "flowcoro_net")
        await flowcoro.sleep(PAUSE)

    def __aiter__(self):
        return self

    async def __anext__(self):
        """As accept(); the end once the server is closed."""
        try:
            return await self.accept()
        except flowcoro.ClosedError:
            raise StopAsyncIteration from None

    # -- the end, and what there is to know

    def close(self):
        """Accept no more, at once: those in the backlog are reset, those accepted go on. Ends accept(), `async for`, and serve(),
        which drains first. Twice is once. Never blocks."""
        for listener in self._listeners:
            listener._close()
        self._closing.set()

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        self.close()

    @property
    def closed(self):
        """Whether it was closed here."""
        return self._listeners[0]._closed

    def _closed_error(self):
        return flowcoro.ClosedError(f"{self!r} has been closed here")

    @property
    def addresses(self):
        """Where it listens: a list of addresses, more than one if the host has several."""
        return [listener._local for listener in self._listeners]

    @property
    def local(self):
        """Where it listens: for TCP (host, port), of the first address; for Unix the path."""
        local = self._listeners[0]._local
        return local[:2] if isinstance(local, tuple) else local

    def __repr__(self):
        return (f"<{type(self).__name__} on {', '.join(_shown(listener._local) for listener in self._listeners)}"
                f"{' with TLS' if self._context else ''}{' closed' if self.closed else ''}>")


class _Server(_Acceptor):
    """A server that calls a handler for each connection."""

    async def serve(self, handler, *, max_connections=math.inf, drain_timeout=DRAIN_TIMEOUT,
                    handshake_timeout=HANDSHAKE_TIMEOUT, lifespan=None, processes=None, reload=None):
        """Run `handler(sock)` (async) in a task of its own for each connection, and close that when it returns.

        Returns when close() was called or a stop requested (SIGTERM, flowcoro.request_stop()): it accepts no more, waits
        up to `drain_timeout` seconds for the handlers (math.inf: as long as they take), and cancels the rest. A handler's error
        goes to sys.unraisablehook and ends its connection alone; failed handshakes, and BrokenError, TlsError and LimitError of
        that connection itself, which are its peer's, are only counted. max_connections: at once; more wait in the backlog
        (with TLS one that closes counts until the goodbye is taken, 2 seconds at most). handshake_timeout: seconds, of TLS.
        BusyError when it is being served already, ClosedError when closed. Cancelled: handlers are too, and it is closed.
        lifespan: a function that gives an async context manager, in which all of that happens: entered before the first
        connection is accepted, in each process that serves, and left when the last handler has ended. Its errors are serve()'s.

        processes: how many worker processes are forked, which serve; max_connections holds for each. This one supervises: one
        that dies is reported to sys.unraisablehook and replaced after 0.1 s, or longer each time if it dies again soon, up to
        10 s; one that does not begin to serve within 10 s is killed. A stop reaches all. OSError when the first ones cannot be
        forked; then none is left. Cancelled: handlers are too, and this returns when all processes have ended; those that clean
        up for more than 2 seconds are killed.
        SIGHUP, taken only in the main thread and only if nobody else handles it, or reload(), replaces them one by one, and no
        connection is lost; before, `reload` (a function, may be async) is called here: what it returns, if not None, is the new
        handler, once the first new process serves; after an error the old ones go on, and those that die are replaced by such.
        With listen(reuse_port=True) each has a queue of its own (SO_REUSEPORT), else they share one. Worker processes ignore
        SIGINT and SIGHUP, drain and end on SIGTERM, and when the supervisor is gone. In one of them this object is its own:
        close() ends that process, which is replaced, statistics() are its own. accept() here: BusyError.
        Each gets copies of all that is in memory, and of all descriptors but those of other servers and what they serve: a
        connection that was made here ends for its peer when it is closed there, too. It is forked with this thread only: a
        lock that another thread holds at that moment (of a file that it writes to, of a library in C) is held there for ever.
        So call it early, and use threads in the handlers rather than here.
        RuntimeError with several workers (threads) or on another network than the system's.
        """
        if not callable(handler):
            raise TypeError(f"serve({handler!r}): give an async function that takes a Socket, not called yet")
        slots = None
        if max_connections != math.inf:
            slots = flowcoro.Semaphore(_whole(max_connections, 1, f"max_connections={max_connections!r}", "connections"))
        limits = _seconds(drain_timeout, "drain_timeout"), _seconds(handshake_timeout, "handshake_timeout")
        if processes is not None:
            options = {"max_connections": max_connections, "handshake_timeout": handshake_timeout, "lifespan": lifespan}
            await self._supervise(handler, _checked_processes(processes), reload, limits[0], options)
            return
        if reload is not None:
            raise ValueError("reload= needs processes=: it is called before worker processes are replaced")
        self._refuse_serving()
        async with lifespan() if lifespan is not None else contextlib.nullcontext():
            if not self.closed:             # by now
                await self._serve(handler, slots, *limits)

    async def _serve(self, handler, slots, drain_timeout, handshake_timeout):
        self._begin_serving()
        try:
            async with flowcoro.TaskGroup() as handlers:
                try:
                    async with flowcoro.TaskGroup() as accepting:
                        accepting.spawn(self._close_on_stop(), name="close the server on a stop")
                        for listener in self._listeners:
                            accepting.spawn(self._accept_all(listener, handlers, handler, slots, handshake_timeout),
                                            name=f"accept on {_shown(listener._local)}")
                        await self._closing.wait()
                        accepting.cancel()          # who waits for a place among max_connections, too
                finally:
                    self.close()
                with flowcoro.move_on_after(drain_timeout):
                    await self._drain.wait()
                handlers.cancel()
        finally:
            self._drain = None

    async def _supervise(self, handler, processes, reload, drain_timeout, options):
        if reload is not None and not callable(reload):
            raise TypeError(f"reload={reload!r}: give a function; it is called without arguments")
        await flowcoro.checkpoint_if_due()
        self._begin_serving()
        try:
            self._supervisor = _Supervisor(self, handler, processes, reload, drain_timeout, options)
            await self._supervisor.run()
        finally:
            self._drain = None

    def reload(self):
        """As SIGHUP for serve(processes=): replace the worker processes, one by one. RuntimeError if there are none."""
        if self._supervisor is None or self._drain is None:
            raise RuntimeError(f"{self!r} has no worker processes: reload() is for serve(processes=), while it runs")
        self._supervisor.reload_asked.set()

    @flowcoro.atomic
    def _begin_serving(self):
        self._refuse_serving()
        self._drain = _Drain()

    def _refuse_serving(self):
        if self.closed:
            raise self._closed_error()
        self._refuse_second()

    async def _close_on_stop(self):
        await flowcoro.stop_requested()
        self.close()

    async def _accept_all(self, listener, handlers, handler, slots, handshake_timeout):
        while True:
            await listener.wait()
            if slots is not None:               # only now: several addresses share them
                await slots.acquire()
            sock = None
            try:
                sock = await self._take(listener)
            except flowcoro.ClosedError:        # as soon as the group hears of it, it is cancelled
                return
            finally:
                if sock is None and slots is not None:
                    slots.release()
            if sock is None:
                continue
            handling = None
            try:
                handling = self._handle(sock, handler, slots, handshake_timeout)
                self._drain.add(sock)
                self._show()
                handlers.spawn(handling, name=f"serve {_shown(sock.peer)}")
            except BaseException:               # too many in a cancelled group
                if handling is not None:
                    handling.close()
                sock._close()
                self._drain.remove(sock)
                raise

    async def _handle(self, sock, handler, slots, handshake_timeout):
        shaken = False
        try:
            async with sock:
                if sock._tls is not None:
                    await sock.handshake(timeout=handshake_timeout)
                shaken = True
                await handler(sock)
        except Exception as error:
            if not shaken:
                self._unshaken += 1
            elif _is_the_peers(error, sock):
                self._broken += 1
            else:
                self._failed += 1
                flowcoro.report_error(error, f"the handler of {sock!r} failed; the others go on", "flowcoro_net")
        finally:
            if slots is not None:
                slots.release()
            self._drain.remove(sock)
            self._show()

    def statistics(self):
        """{"connections": those of serve() now, "accepted": in all, "failed": handlers that raised, "broken": connections that
        their peers broke, "handshakes_failed", "pauses": how often accepting had to pause}; of serve(processes=) for all of them
        together, with "processes": their numbers, "restarts": how many have died and were replaced
        """
        supervisor = self._supervisor
        counts = self._counts() if supervisor is None else supervisor.counts()
        found = dict(zip(("connections", "accepted", "failed", "broken", "handshakes_failed", "pauses"), counts, strict=True))
        if supervisor is not None:
            found |= {"processes": list(supervisor.processes), "restarts": supervisor.restarts}
        return found

    def _counts(self):
        return (len(self._drain.open) if self._drain else 0, self._accepted, self._failed, self._broken, self._unshaken,
                self._pauses)

    def _show(self):
        """In a worker process: to the supervisor."""
        if self._shared is not None:
            for index, count in enumerate(self._counts()):
                self._shared[index] = count


def _checked_processes(processes):
    _whole(processes, 1, f"processes={processes!r}", "processes")
    if not hasattr(os, "fork"):
        raise RuntimeError(f"processes={processes}: this system cannot fork")
    if _of_kernel().several:
        raise RuntimeError(f"processes={processes}: a fork takes only one thread along; use run(workers=1), or workers= without "
                           "processes=")
    if _network() is not _SYSTEM:
        raise RuntimeError(f"processes={processes}: other processes do not see {_network()!r}")
    return processes


class TcpServer(_Server):
    """A server of TCP, and TLS. `await TcpServer.listen(…)`, then accept(), `async for sock in server`, or serve().

    Best in `async with`, which closes it.
    """

    @classmethod
    async def listen(cls, host, port, *, tls=None, backlog=BACKLOG, reuse_port=False, dual_stack=True):
        """Listen on all addresses of `host` ("127.0.0.1", "localhost" …; "" or None: of this machine) and a port (0: any free).

        tls: an ssl.SSLContext, as server_tls() makes it. backlog: connections that may wait to be accepted. reuse_port: several
        processes share the port. dual_stack: "" takes IPv4 and IPv6, by one socket where the system can.
        OSError whose message names the address: in use, no permission, not of this machine. ResolveError.
        """
        context = _as_context(tls, True)
        _whole(backlog, 1, f"backlog={backlog!r}", "connections", 2**31 - 1)
        await flowcoro.checkpoint_if_due()
        everywhere = host in ("", None)
        if everywhere:
            found = [(socket.AF_INET6, ("::", _checked_port(port))), (socket.AF_INET, ("0.0.0.0", port))]
        else:
            found = [(family, address) for family, _, _, address in await resolve(host, port, flags=socket.AI_PASSIVE)]
        for attempt in range(PORT_ATTEMPTS):
            try:
                return cls(_listen_on_all(found, port, backlog, reuse_port, dual_stack and everywhere), context)
            except OSError as error:            # a port that was free on one address is not on another
                if port or error.errno != errno.EADDRINUSE or attempt == PORT_ATTEMPTS - 1:
                    raise


def _listen_on_all(found, port, backlog, reuse_port, both):
    """The _Listeners of a list of (family, address), on one port. OSError; then there is none."""
    network, listeners, absent = _network(), [], None
    try:
        for family, address in found:
            if listeners and both and _takes_both(listeners[0]):
                break
            if port == 0 and listeners:
                address = address[0], listeners[0]._local[1], *address[2:]
            prepare = functools.partial(_prepare_tcp, family, reuse_port, both)
            try:
                listeners.append(_listen(network, family, address, backlog, prepare, reuse_port))
            except OSError as error:            # a machine without IPv6, or one where it is switched off
                if family != socket.AF_INET6 or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                absent = error.with_traceback(None)
        if not listeners:
            raise absent
        return listeners
    except BaseException:
        for listener in listeners:
            listener._close()
        raise


def _prepare_tcp(family, reuse_port, both, raw):
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        if not hasattr(socket, "SO_REUSEPORT"):
            raise ValueError("reuse_port=True: this system cannot share a port")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not both))


def _takes_both(listener):
    return listener._raw.family == socket.AF_INET6 and not listener._raw.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


class UnixServer(_Server):
    """A server on a Unix socket. As TcpServer."""

    _file = None            # (path, device, inode) of the socket's file, which close() removes

    @classmethod
    async def listen(cls, path, *, tls=None, backlog=BACKLOG, mode=None):
        """Listen on a path, or on a name that begins with "\\0" (Linux). mode: permissions of the file, such as 0o660.

        A socket's file that is there, and where nobody listens, is replaced. close() removes the file, if it is still this one.
        OSError whose message names the path: in use, no permission, no directory, longer than 107 bytes; TypeError, ValueError.
        """
        context, path = _as_context(tls, True), _checked_path(path)
        _whole(backlog, 1, f"backlog={backlog!r}", "connections", 2**31 - 1)
        if mode is not None:
            _whole(mode, 0, f"mode={mode!r}", "permissions", 0o777)
        await flowcoro.checkpoint_if_due()
        network = _network()
        if _is_nameless(path):
            return cls([_listen(network, socket.AF_UNIX, path, backlog, lambda raw: None)], context)

        def prepare(raw):
            if mode is not None:
                os.fchmod(raw.fileno(), mode)       # before bind: the file never has more permissions (Linux)

        lock = await _lock_directory(path)
        try:
            await _remove_stale(network, path)
            server = cls([_listen(network, socket.AF_UNIX, path, backlog, prepare)], context)
        finally:
            if lock is not None:
                lock()
        try:
            found = os.stat(path)
            server._file = os.path.abspath(path), found.st_dev, found.st_ino
            if mode is not None:
                os.chmod(path, mode)
        except BaseException:
            server.close()
            raise
        return server

    def close(self):
        """As TcpServer.close(); and removes the socket's file."""
        if not self.closed and self._file is not None:
            path, *identity = self._file
            try:
                found = os.stat(path)
                if [found.st_dev, found.st_ino] == identity:
                    os.unlink(path)
            except OSError:             # gone already, or no longer ours to remove
                pass
        super().close()


async def _lock_directory(path):
    """Lock a path's directory, so that of several programs that begin to listen there each sees whether another one does. Returns
    what unlocks it; None where that cannot be, or somebody else keeps it for a second."""
    try:
        import fcntl
        directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_CLOEXEC)
    except (ImportError, OSError):
        return None

    def unlock(fcntl, directory):
        fcntl.flock(directory, fcntl.LOCK_UN)           # a child that was forked meanwhile has a copy of the descriptor
        os.close(directory)

    try:
        until = flowcoro.now() + LOCK_SECONDS
        while flowcoro.now() < until:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return functools.partial(unlock, fcntl, directory)
            except BlockingIOError:
                await flowcoro.sleep(LONGEST_RETRY / 10)
    except OSError:                     # a file system without locks
        pass
    except BaseException:
        os.close(directory)
        raise
    os.close(directory)
    return None


async def _remove_stale(network, path):
    """Remove the file of a socket whose owner has died: where nobody listens, a connect is refused."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        raw, pollable = await _connect_one(network, socket.AF_UNIX, socket.SOCK_STREAM, 0, path)
    except ConnectionRefusedError:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _refused(error, "listen on", path) from error
    except OSError:                     # not there, or full: somebody listens
        pass
    else:
        pollable.close()
        raw.close()


# ---- datagrams ------------------------------------------------------------------------------------------------

class UdpSocket(_Owner):
    """Datagrams of UDP (RFC 768): each arrives whole, more than once, or not at all, in any order. Best in `async with`.

    One task may receive and another send at the same time (else BusyError). ClosedError after close().
    """

    __slots__ = ("_recvmsg", "_send", "_sendto", "_peer", "_received", "_sent", "_reader", "_writer")

    def __init__(self, raw, network=None, pollable=None, peer=None):
        super().__init__(raw, network, pollable)
        self._recvmsg, self._peer = self._call(raw.recvmsg), peer
        self._send, self._sendto = self._call(raw.send), self._call(raw.sendto)
        self._received = self._sent = 0
        self._reader = self._writer = None

    def _close(self):
        if not super()._close():
            return False
        self._recvmsg = self._send = self._sendto = _no_more
        return True

    @classmethod
    async def bind(cls, host, port, *, family=0, reuse_port=False, reuse_address=False, broadcast=False):
        """A socket that receives on an address of this machine and a port; 0: a free one.

        host: "": all of IPv4; "::": all, where IPv4's are ::ffff:192.0.2.1; of a name the first address. family: socket.AF_INET
        or AF_INET6, for names and "". reuse_address: others may bind it too, for multicast. reuse_port: several processes share
        what comes. broadcast: it may send to broadcast addresses. OSError whose message names the address; ResolveError.
        """
        await flowcoro.checkpoint_if_due()
        host = host or ("::" if family == socket.AF_INET6 else "0.0.0.0")
        found = await resolve(host, port, family=family, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)
        family, kind, proto, address = found[0]

        def prepare(raw):
            for name, wanted in ("SO_REUSEADDR", reuse_address), ("SO_REUSEPORT", reuse_port), ("SO_BROADCAST", broadcast):
                if wanted:
                    raw.setsockopt(socket.SOL_SOCKET, getattr(socket, name), 1)
            raw.bind(address)

        return cls._made(family, kind, proto, prepare, "bind", address)

    @classmethod
    async def connect(cls, host, port, *, family=0, broadcast=False):
        """A socket that sends to one address and receives from that alone: send() and receive(). ResolveError, OSError.

        Nothing is sent, so nobody needs to be there; of a name it is the first address. family: socket.AF_INET or AF_INET6.
        """
        await flowcoro.checkpoint_if_due()
        found = await resolve(host, _checked_port(port, 1), family=family, type=socket.SOCK_DGRAM)
        family, kind, proto, address = found[0]

        def prepare(raw):
            if broadcast:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            if number := raw.connect_ex(address):
                raise OSError(number, os.strerror(number))

        return cls._made(family, kind, proto, prepare, "send datagrams to", address, address)

    @classmethod
    def _made(cls, family, kind, proto, prepare, doing, address, peer=None):
        network, raw = _network(), None
        try:
            raw = network.socket(family, kind, proto)
            prepare(raw)
            return cls(raw, network, None, peer)
        except BaseException as error:
            if raw is not None:
                raw.close()
            if isinstance(error, OSError):
                raise _refused(error, doing, address) from error
            raise

    async def receive_from(self, max_bytes=DATAGRAM):
        """(data, address) of the next datagram, which may be empty. Cancelled: nothing consumed.

        LimitError for one of more than `max_bytes`, which is lost. BrokenError when what was sent found nobody (connected
        sockets only); the socket goes on.
        """
        await flowcoro.checkpoint_if_due()
        _whole(max_bytes, 0, f"receive_from({max_bytes!r})")
        self._begin("_reader", "received from")
        try:
            data, _, flags, address = await self._when_readable(self._recvmsg, max_bytes)
        except OSError as error:
            raise self._failed(error, "receiving") from error
        finally:
            self._reader = None
        self._pollable.readable = True
        self._received += 1
        if flags & socket.MSG_TRUNC:
            raise LimitError(f"{self!r}: a datagram from {_shown(address or self._peer)} was longer than max_bytes="
                             f"{max_bytes} and is lost; allow more, up to {DATAGRAM}")
        return data, address or self._peer

    async def receive(self, max_bytes=DATAGRAM):
        """The data of the next datagram. As receive_from()."""
        return (await self.receive_from(max_bytes))[0]

    async def send_to(self, data, address):
        """Send one datagram to an address: (address, port), in numbers, or what receive_from() gave. Waits for room.

        It says nothing about its arrival. OSError when it is too long (EMSGSIZE: more than 65,507 bytes with IPv4), or there
        is no way there. ValueError for a name: resolve() it before. Cancelled: not sent.
        """
        family = _checked_address(address, "address")
        if family and family != self._raw.family:
            raise ValueError(f"address={address!r} is of another family than {self!r}: bind a socket of its family, for names "
                             "with family=")
        await self._send_one(data, address)

    async def _send_one(self, data, address):
        await flowcoro.checkpoint_if_due()
        view = _as_bytes(data, "send()" if address is None else "send_to()")
        self._begin("_writer", "sent to")
        try:
            await (self._when_writable(self._send, view) if address is None
                   else self._when_writable(self._sendto, view, address))
        except OSError as error:
            raise self._failed(error, f"sending {len(view)} bytes to {_shown(address or self._peer)}") from error
        finally:
            self._writer = None
        self._pollable.writable = True
        self._sent += 1

    async def send(self, data):
        """Send one datagram to the address of connect(). As send_to()."""
        if self._peer is None:
            raise ValueError(f"{self!r} is not connected: use send_to(data, address), or make it by UdpSocket.connect()")
        await self._send_one(data, None)

    def join(self, group, interface=None):
        """Receive what is sent to a multicast group too, such as "224.0.0.251" or "ff02::fb".

        interface: the name of the network card ("eth0"), with IPv4 also its address; None: the system's choice. OSError;
        ValueError for what is no address of this socket's family.
        """
        self._membership(group, interface, "IP_ADD_MEMBERSHIP", "IPV6_JOIN_GROUP")

    def leave(self, group, interface=None):
        """Undo join(). OSError if it had not joined."""
        self._membership(group, interface, "IP_DROP_MEMBERSHIP", "IPV6_LEAVE_GROUP")

    def _membership(self, group, interface, option4, option6):
        if not isinstance(interface, (str, types.NoneType)):
            raise TypeError(f"interface={interface!r}: give the name of a network card, such as \"eth0\", or None")
        family = self._raw.family
        try:
            value = socket.inet_pton(family, group)
        except (OSError, TypeError):
            example = "ff02::fb" if family == socket.AF_INET6 else "224.0.0.251"
            raise ValueError(f"group={group!r}: give the address of a multicast group of this socket's family, such as "
                             f"{example!r}") from None
        try:
            if family == socket.AF_INET6:
                level, option = socket.IPPROTO_IPV6, option6
                value += struct.pack("@I", socket.if_nametoindex(interface) if interface else 0)
            elif _family_of_number(interface or "") is None:        # a name: struct ip_mreqn
                level, option = socket.IPPROTO_IP, option4
                value += struct.pack("@4xI", socket.if_nametoindex(interface))
            else:
                level, option = socket.IPPROTO_IP, option4
                value += socket.inet_aton(interface or "0.0.0.0")
            self._call(self._raw.setsockopt)(level, getattr(socket, option), value)
        except OSError as error:
            if self._closed:
                raise self._closed_error() from error
            raise OSError(error.errno or errno.ENODEV, f"{self!r}: cannot join or leave {group!r} on interface={interface!r}: "
                          f"{_why(error)}") from error

    @flowcoro.atomic
    def _begin(self, place, verb):
        task = getattr(self, place)
        if task is not None:
            raise flowcoro.BusyError(f"{self!r} is being {verb} by {task!r} already; one task at a time")
        if self._closed:
            raise self._closed_error()
        setattr(self, place, flowcoro.current_task())

    def _failed(self, error, doing):
        if self._closed:
            return self._closed_error()
        if isinstance(error, ConnectionError):
            return BrokenError(error.errno, f"{self!r}: {doing}: {error.strerror}; what was sent before found nobody there")
        return OSError(error.errno, f"{self!r}: {doing}: {error.strerror}")

    async def close(self):
        """Close it; those who wait get ClosedError. Twice is once. A checkpoint; cancelled: it is closed."""
        self._close()
        await flowcoro.checkpoint_if_due()

    def close_nowait(self):
        """Close it at once. Never blocks."""
        self._close()

    async def __aexit__(self, kind, error, trace):
        self._close()

    @property
    def peer(self):
        """The address of connect(), or None."""
        return self._peer

    def statistics(self):
        """{"datagrams_received", "datagrams_sent"}"""
        return {"datagrams_received": self._received, "datagrams_sent": self._sent}

    def __repr__(self):
        try:
            at = f" at {_shown(self._raw.getsockname() if self._local is None else self._local)}"
        except OSError:
            at = ""
        return (f"<UdpSocket{at}{f' to {_shown(self._peer)}' if self._peer else ''}{' closed' if self._closed else ''}>")


# ---- the connection pool --------------------------------------------------------------------------------------
# _PoolBooks know who has what: they neither wait nor call anybody's code, are told the time, and take atomic steps.
# ConnectionPool waits, connects and validates. After each step of the books tidy() of _PoolCare does what they have noted:
# closes the condemned, reports the lost, starts the keeper.
#
# A connection moves as the table says and in no other way. All but the gone count against max_connections, the closing too,
# for the other side still counts them:
#
#   connecting ──► in_use ◄──► idle         failed or lost: gone
#                     └──► closing ◄──┘     closed: gone
#
#   P1  while anybody waits, no connection is idle and no place is free: each step that frees something ends in serve(), which
#       hands it to who has waited longest, and marks it as taken before that one runs. So nobody can come in between, and a
#       grant is never lost: a task that is cancelled after it was woken still gets it (I3 of the kernel).
#   P2  between a grant and the caller's next line there is no await but the connect and the validation, and each of these
#       gives its place back however it ends.
#   P3  the pool holds a connection that is lent by a weak reference (where its type allows that), so that a lost one is
#       noticed. The finaliser may run anywhere, in any thread: it appends to a deque, sets a Promise, and does no more.
#
# Connects are made by the borrower's task: its cancellation, its deadline, its context and its traceback are the right ones,
# and no task of the pool's own can be left over. (Go's connects are made by one that nobody waits for, and a caller is told
# the error of somebody else's.) A borrower that connects stays with that, also if a connection comes back meanwhile.
#
# The keeper is the pool's one task besides those that close. It is started when a connection becomes idle or a task waits,
# belongs to the kernel as all that flowcoro.spawn() starts, and ends when there is nothing to keep. It has a deadline only
# while something can expire, so that a deadlock is reported without delay: the scope's deadline is moved to infinity
# when the last idle connection is taken, which costs no heap operation, and back when it returns. When the run ends the
# keeper is cancelled, and closes what is idle; what is returned after that starts another one, with the same fate.

# Why a connection was closed, as statistics() counts it. idle, lifetime: its time was up. invalid: validate() said no. broken:
# it was returned by an error, or closed. discarded: by discard(). interrupted: its borrower was cancelled while it was
# validated. cleared, shrunk, pool_closed: clear(), set_max_connections(), close(). run_ended: nobody has closed the pool.
# lost: nobody has returned it.
_REASONS = ("idle", "lifetime", "invalid", "broken", "discarded", "interrupted", "cleared", "shrunk", "pool_closed",
            "run_ended", "lost")

_CONNECTING, _IN_USE, _IDLE, _CLOSING, _GONE = "connecting", "in_use", "idle", "closing", "gone"

_POOL_MOVES = {
    (_CONNECTING, "connected"): _IN_USE,
    (_CONNECTING, "failed"): _GONE,
    (_IN_USE, "returned"): _IDLE,
    (_IDLE, "lent"): _IN_USE,
    (_IN_USE, "condemned"): _CLOSING,
    (_IDLE, "condemned"): _CLOSING,
    (_IN_USE, "lost"): _GONE,
    (_CLOSING, "closed"): _GONE,
}

_AGAIN = object()       # instead of a grant: look again, there was something to close first
_THE_POOLS = object()   # instead of a timeout: the pool's acquire_timeout


class _Pooled:
    """One place in the pool, and the connection there once it is made."""

    __slots__ = ("books", "state", "generation", "expires", "returned", "connection", "ref", "key", "loan", "since",
                 "unproven", "borrower", "name", "stack", "scope")

    def __init__(self, books):
        self.books = books
        self.state = _CONNECTING
        self.generation = books.generation  # of the begin: clear() means those under way as well
        self.expires = self.returned = math.inf
        self.connection = None              # while idle, or where there are no weak references to it; else None (P3)
        self.ref = None                     # a weak reference, or a function that returns the connection
        self.key = None                     # its id
        self.loan = 0                       # how often it was lent: an old loan cannot return a new one
        self.since = 0.0                    # the time of that
        self.unproven = False               # it has been idle for so long that it is validated
        self.borrower = self.name = self.stack = None       # a weak reference to a task; with leak_after its name and stack
        self.scope = None                   # of the connect, for close() to cancel

    def finalised(self, _):
        """Called by the garbage collector, in any thread, in the middle of anything (P3)."""
        self.books.lost.append(self)
        self.books.ring()


class _PoolQueue(flowcoro.ParkingLot):
    """Where tasks wait for others to return connections: a dump and the deadlock report follow who holds them."""

    __slots__ = ("_lent",)

    def __init__(self, reason, lent):
        self._lent = lent
        super().__init__(reason)

    @property
    def holder(self):
        tasks = [entry.borrower and entry.borrower() for entry in list(self._lent.values())]
        return [task for task in tasks if task is not None and not task.done()]

    @holder.setter
    def holder(self, _):
        """It is always asked for anew."""


class _PoolMoves:
    """Who has which connection, and who comes next: what the steps of the books are made of. Called in such steps only."""

    def __init__(self, max_connections, max_connecting, idle_timeout, max_lifetime, validate_after, leak_after):
        self.max_connections, self.max_connecting = max_connections, max_connecting
        self.idle_timeout, self.max_lifetime = idle_timeout, max_lifetime
        self.validate_after, self.leak_after = validate_after, leak_after
        self.generation, self.closed = 0, False
        self.total = 0                              # connections that count against max_connections, and their states
        self.counts = {_CONNECTING: 0, _IN_USE: 0, _IDLE: 0, _CLOSING: 0, _GONE: 0}
        self.idle = collections.deque()             # longest idle first
        self.lent = {}                              # id of the connection -> _Pooled, in use
        self.connects = {}                          # _Pooled, connecting, in order
        self.first = _PoolQueue("wait for another connection in place of an invalid one", self.lent)
        self.queue = _PoolQueue("acquire a connection from a ConnectionPool", self.lent)
        self.emptied = _PoolQueue("close a ConnectionPool", self.lent)
        self.condemned = collections.deque()        # (_Pooled, connection) to be closed by tidy()
        self.lost = collections.deque()             # _Pooled of connections that died while lent
        self.leaks = collections.deque()            # texts to be reported by tidy()
        self.kept = False                           # the keeper is there
        self.scope = self.alarm = None              # what wakes it: a deadline, and a Promise for finalisers
        self.swept = -math.inf                      # when it has last looked
        self.set_grain()
        self.reasons = dict.fromkeys(_REASONS, 0)
        self.created = self.connects_failed = self.closes_failed = self.acquired = self.waits = 0
        self.wait_sum = self.wait_max = 0.0

    def ring(self):
        """Wake the keeper for the lost. Also from a finaliser."""
        alarm = self.alarm
        try:
            if alarm is not None and not alarm.done():
                alarm.set_result(None)
        except Exception:       # set by another finaliser in between; or the stack ends here, and the next operation looks
            pass

    # -- the ways of a connection

    def move(self, entry, event):
        state = _POOL_MOVES[entry.state, event]     # a KeyError is a mistake in this section
        self.counts[entry.state] -= 1
        self.counts[state] += 1
        self.total -= state is _GONE
        entry.state = state

    def excess(self):
        """How many more there are than may be, but for those that are being closed."""
        return self.total - self.counts[_CLOSING] - self.max_connections

    def worn(self, entry, now):
        """Why an idle connection must not be lent again, or None."""
        if entry.generation != self.generation:
            return "cleared"
        if entry.expires <= now:
            return "lifetime"
        if self.idle_timeout and entry.returned + self.idle_timeout <= now:
            return "idle"
        return None

    def grant(self, now):
        """The last returned connection that is still good, or the right to make one, or None. It is taken with that."""
        while self.idle:
            entry = self.idle.pop()
            if not self.idle and self.scope is not None and self.leak_after is None:
                self.scope.deadline = math.inf
            reason = self.worn(entry, now)
            if reason is not None:
                self.condemn(entry, reason)
                continue
            self.move(entry, "lent")
            entry.unproven = entry.returned + self.validate_after <= now
            self.lend(entry, now)
            return entry
        if self.total < self.max_connections and self.counts[_CONNECTING] < self.max_connecting:
            entry = _Pooled(self)
            self.total += 1
            self.counts[_CONNECTING] += 1
            self.connects[entry] = None
            return entry
        return None

    def lend(self, entry, now):
        entry.loan += 1
        entry.since = now
        self.lent[entry.key] = entry
        self.acquired += 1

    def serve(self, now):
        """P1: hand what is free to who has waited longest."""
        while queue := self.first or self.queue:
            waiting = len(queue)
            entry = self.grant(now)
            if entry is None:
                return
            try:
                queue.unpark(1, value=entry)
            except BaseException:           # the stack ends here, or a signal handler has struck: whoever comes next serves
                if len(queue) < waiting:    # but he has been woken, and it is his
                    pass
                elif entry.state is _CONNECTING:
                    self.forget(entry, "failed")
                else:
                    self.put_back(entry)
                raise

    def put_back(self, entry):
        del self.lent[entry.key]
        self.move(entry, "returned")
        self.idle.append(entry)

    def condemn(self, entry, reason):
        """Take it from wherever it is, for tidy() to close."""
        connection = entry.connection if entry.ref is None or entry.connection is not None else entry.ref()
        if entry.state is _IN_USE:
            self.lent.pop(entry.key, None)
        if connection is None:              # its finaliser has run, or is about to
            return
        self.move(entry, "condemned")
        self.reasons[reason] += 1
        entry.connection = entry.ref = entry.borrower = entry.stack = None
        self.condemned.append((entry, connection))

    def forget(self, entry, event):
        """It is gone, its place free."""
        self.move(entry, event)
        self.connects.pop(entry, None)
        entry.connection = entry.ref = entry.scope = entry.borrower = entry.stack = None
        if self.closed:
            self.emptied.unpark_all()
        if not self.total and self.scope is not None:
            self.scope.cancel()             # the keeper looks whether there is anything to keep

    def reap(self, now):
        """Count and report those that the garbage collector has found, and free their places."""
        while self.lost:
            entry = self.lost.popleft()
            if entry.state is not _IN_USE:
                continue                    # condemned, or its place reaped before
            if self.lent.get(entry.key) is entry:
                del self.lent[entry.key]
            self.reasons["lost"] += 1
            self.report_leak(entry, now, "was never returned: it has been garbage-collected. Its place is free again; use "
                                         "`async with pool.acquire()`")
            self.forget(entry, "lost")
        self.serve(now)

    def report_leak(self, entry, now, what):
        if entry.stack is not None:
            stack = "".join(entry.stack.format()) or "    (no frames)\n"
            self.leaks.append(f"a connection that task {entry.name!r} acquired {now - entry.since:.3f} seconds ago {what}. "
                              f"It was acquired here:\n{stack}")
            entry.stack = None              # once


class _PoolBooks(_PoolMoves):
    """The steps that ConnectionPool and the keeper take, each of them atomic."""

    @flowcoro.atomic
    def take(self, now):
        """A grant, or None. flowcoro.ClosedError once the pool is closed."""
        if self.closed:
            raise flowcoro.ClosedError("this ConnectionPool is closed")
        if self.lost:
            self.reap(now)
        return self.grant(now)

    @flowcoro.atomic
    def connecting(self, entry, scope):
        """The connect begins, in `scope`. flowcoro.ClosedError, and its place is free, once the pool is closed."""
        if self.closed:
            self.forget(entry, "failed")
            raise flowcoro.ClosedError("this ConnectionPool is closed")
        entry.scope = scope

    @flowcoro.atomic
    def pick(self, entry, task, stack, now):
        """The connection of a grant, for the borrower. From here on it alone holds it (P3)."""
        if self.closed:                     # since the grant; _abandon() gives it back, unless it is condemned
            raise flowcoro.ClosedError("this ConnectionPool was closed while the task waited for a connection")
        connection = entry.connection
        if entry.ref is not None:
            entry.connection = None
        entry.borrower = weakref.ref(task)
        if stack is not None:
            entry.name, entry.stack = task.name, stack
            if self.scope is not None:
                self.wake_at(now + self.leak_after)
        return connection

    @flowcoro.atomic
    def connected(self, entry, connection, now):
        """A connect is done: it is lent. False if the pool was closed meanwhile. PoolError if it is lent already."""
        if self.lost:
            self.reap(now)
        key = id(connection)
        if key in self.lent or any(connection is other.connection for other in self.idle):
            raise flowcoro.PoolError(f"the factory returned a {type(connection).__name__} that this ConnectionPool has already: "
                                     "it must make a new connection each time")
        spared = self.created * GOLDEN_RATIO % 1 * POOL_LIFETIME_SPREAD
        self.created += 1
        entry.expires = now + self.max_lifetime * (1 - spared)
        entry.key, entry.connection = key, connection
        try:
            entry.ref = weakref.ref(connection, entry.finalised)
        except TypeError:
            pass
        self.connects.pop(entry, None)
        entry.scope = None
        self.move(entry, "connected")
        self.lend(entry, now)
        if self.closed:
            self.condemn(entry, "pool_closed")
        else:
            self.serve(now)                 # a place among those that may connect at once is free
        return not self.closed

    @flowcoro.atomic
    def connect_failed(self, entry, now):
        if entry.state is _CONNECTING:
            self.connects_failed += 1
            self.forget(entry, "failed")
            self.serve(now)

    @flowcoro.atomic
    def give_back(self, entry, loan, reason, now):
        """The end of a loan. reason: why it cannot be used again, or None. False if it has ended before."""
        if entry.state is not _IN_USE or entry.loan != loan:
            return False
        if self.lost:
            self.reap(now)
        if self.closed:
            reason = "pool_closed"
        if reason is None and self.excess() > 0:
            reason = "shrunk"
        entry.returned = now
        reason = reason or self.worn(entry, now)
        if reason is not None:
            self.condemn(entry, reason)
            return True
        entry.borrower = entry.stack = None
        if entry.connection is None:
            entry.connection = entry.ref()
        self.put_back(entry)
        self.serve(now)
        if entry.state is _IDLE:
            if not self.idle_timeout:
                self.idle.remove(entry)
                self.condemn(entry, "idle")
            elif self.scope is not None:
                self.wake_at(min(now + self.idle_timeout, entry.expires))
        return True

    @flowcoro.atomic
    def find(self, connection):
        """The loan of a connection: (its _Pooled, its number). PoolError if it is not lent; None so once all is closed."""
        entry = self.lent.get(id(connection))
        if entry is None or (entry.connection if entry.ref is None else entry.ref()) is not connection:
            if self.closed:
                return None
            raise flowcoro.PoolError(f"this {type(connection).__name__} is not lent by this ConnectionPool: it was returned "
                                     "twice, or belongs to another one")
        return entry, entry.loan

    @flowcoro.atomic
    def gone(self, entry, failed, now):
        """A condemned one has been closed."""
        self.closes_failed += failed
        self.forget(entry, "closed")
        if not self.closed:
            self.serve(now)

    @flowcoro.atomic
    def waited(self, seconds):
        self.waits += 1
        self.wait_sum += seconds
        self.wait_max = max(self.wait_max, seconds)

    # -- what changes all of them

    def condemn_worn(self, now):
        idle, self.idle = self.idle, collections.deque()
        for entry in idle:
            reason = self.worn(entry, now)
            if reason is None:
                self.idle.append(entry)
            else:
                self.condemn(entry, reason)

    @flowcoro.atomic
    def condemn_idle(self, reason, down_to=0):
        while len(self.idle) > down_to:
            self.condemn(self.idle.popleft(), reason)
        if not self.idle and self.scope is not None and self.leak_after is None:
            self.scope.deadline = math.inf

    @flowcoro.atomic
    def clear(self):
        self.generation += 1
        self.condemn_idle("cleared")

    @flowcoro.atomic
    def resize(self, count, now):
        self.reap(now)
        self.max_connections = count
        self.condemn_worn(now)
        self.condemn_idle("shrunk", max(0, len(self.idle) - max(0, self.excess())))
        if not self.closed:
            self.serve(now)

    @flowcoro.atomic
    def set_idle_timeout(self, seconds, now):
        self.idle_timeout = seconds
        self.set_grain()
        self.condemn_worn(now)
        if not seconds:
            self.condemn_idle("idle")
        if self.scope is not None:
            self.scope.cancel()             # the keeper plans anew

    @flowcoro.atomic
    def shut(self, at_once):
        """Refuse what comes, send away who waits, cancel the connects; at_once: condemn those in use."""
        self.closed = True
        self.condemn_idle("pool_closed")
        for queue in (self.first, self.queue):
            queue.unpark_all(error=flowcoro.ClosedError("this ConnectionPool was closed while the task waited for a connection"))
        for entry in list(self.connects):
            if entry.scope is not None:
                entry.scope.cancel()
        if at_once:
            for entry in list(self.lent.values()):
                self.condemn(entry, "pool_closed")
        if self.scope is not None:
            self.scope.cancel()

    # -- the keeper's part

    def set_grain(self):
        self.grain = min(POOL_SWEEP_SECONDS, min(self.idle_timeout, self.max_lifetime, self.leak_after or math.inf) / 8)

    def next_deadline(self):
        """When the next one is overdue. O(idle), and with leak_after O(all)."""
        deadline = math.inf
        if self.idle:
            deadline = min(self.idle[0].returned + self.idle_timeout, min(entry.expires for entry in self.idle))
        if self.leak_after is not None:
            deadline = min([deadline, *(entry.since + self.leak_after for entry in self.lent.values() if entry.stack)])
        return deadline

    def wake_at(self, deadline):
        """Have the keeper look then, if it would not before."""
        if deadline < self.scope.deadline:
            self.scope.deadline = max(deadline, self.swept + self.grain)

    def wants_keeper(self):
        """Idle ones are overdue some day; who waits, also for the end of all, may have to be told of a lost one."""
        return bool(self.idle or self.queue or self.first or self.emptied or self.leak_after is not None and self.lent)

    @flowcoro.atomic
    def hire(self, waiting=False):
        """Whether a keeper has to be started now. waiting: there is about to be who waits."""
        if self.kept or not waiting and not self.wants_keeper():
            return False
        self.kept = True
        return True

    @flowcoro.atomic
    def plan(self, scope):
        """The keeper is about to wait in `scope`: the Promise to wait for, or None if there is nothing to keep."""
        if not self.wants_keeper() and (self.closed or not self.total):     # as a rule some will be idle again
            self.kept, self.scope, self.alarm = False, None, None
            return None
        self.scope, self.alarm = scope, flowcoro.Promise()
        if self.lost:
            self.ring()                     # found after the last look
        self.wake_at(self.next_deadline())
        return self.alarm

    @flowcoro.atomic
    def sweep(self, now):
        """Condemn the idle that are overdue; report those held for too long."""
        self.swept = now
        self.reap(now)
        self.condemn_worn(now)
        if self.leak_after is not None:
            for entry in self.lent.values():
                if entry.stack is not None and entry.since + self.leak_after <= now:
                    self.report_leak(entry, now, f"has not been returned yet, and leak_after={self.leak_after:g}")

    @flowcoro.atomic
    def dismiss(self):
        """The keeper ends because the run does: nothing stays idle."""
        self.kept, self.scope, self.alarm = False, None, None
        self.condemn_idle("run_ended")

    @flowcoro.atomic
    def numbers(self, now):
        self.reap(now)
        counts = self.counts
        return {"max_connections": self.max_connections, "idle": counts[_IDLE], "in_use": counts[_IN_USE],
                "connecting": counts[_CONNECTING], "closing": counts[_CLOSING], "waiting": len(self.queue) + len(self.first),
                "acquired": self.acquired, "created": self.created, "connects_failed": self.connects_failed,
                "closed": {reason: count for reason, count in self.reasons.items() if count},
                "closes_failed": self.closes_failed, "waits": self.waits, "wait_sum": self.wait_sum, "wait_max": self.wait_max,
                "generation": self.generation}


def _callable_or_none(value, name, what):
    if value is not None and not callable(value):
        raise TypeError(f"{name}={value!r}: give {what}, or None")
    return value


_RUNTIME_FILES = {os.path.abspath(flowcoro.checkpoint.__code__.co_filename), os.path.abspath(_seconds.__code__.co_filename)}


def _borrower_stack():
    """The stack of the running task, without the runtime's own frames; source lines are read when it is shown."""
    frames = ((frame, line) for frame, line in traceback.walk_stack(sys._getframe(1))
              if os.path.abspath(frame.f_code.co_filename) not in _RUNTIME_FILES)
    stack = traceback.StackSummary.extract(frames, limit=POOL_LEAK_FRAMES, lookup_lines=False)
    stack.reverse()
    return stack


class _PoolCare:
    """What the books have noted is done here: connections are closed, leaks reported, and the keeper kept."""

    def __init__(self, books, close, close_timeout):
        self.books, self.close, self.close_timeout = books, close, close_timeout

    def tidy(self, *, later=False, hire=True):
        """After each step of the books: close the condemned (later: each in a task), report the lost, start the keeper."""
        books = self.books
        while books.condemned:
            try:
                entry, connection = books.condemned.popleft()
            except IndexError:      # another worker was faster
                break
            self._close_one(entry, connection, later)
        while books.leaks:
            try:
                message = books.leaks.popleft()
            except IndexError:
                break
            flowcoro.report_error(flowcoro.PoolError(message), "a connection was not returned to its pool", "flowcoro_net")
        if hire and not books.kept and books.hire():
            self.start_keeper()

    def start_keeper(self):
        try:
            flowcoro.spawn(self._keep(), name="keeper of a ConnectionPool")
        except RuntimeError:        # no kernel is here any more, or it has too many tasks that refuse to end
            self.books.dismiss()
            self.tidy(hire=False)

    def _close_one(self, entry, connection, later):
        failed, closing = True, None
        try:
            closing = self._close_later(connection) if later else self._begin_close(connection)
            if inspect.isawaitable(closing):
                flowcoro.spawn(self._finish_close(entry, closing), name="close a connection of a ConnectionPool")
                entry = None
            failed = False
        except Exception:           # the connection is done with, whatever it says; or no kernel is here to close it
            if inspect.iscoroutine(closing):
                closing.close()
        finally:
            if entry is not None:
                self.books.gone(entry, failed, flowcoro.now())

    def _begin_close(self, connection):
        return connection.close() if self.close is None else self.close(connection)

    async def _close_later(self, connection):
        closing = self._begin_close(connection)
        if inspect.isawaitable(closing):
            await closing

    async def _finish_close(self, entry, closing):
        failed = True
        try:
            with flowcoro.CancelScope(deadline=flowcoro.now() + self.close_timeout, shield=True):
                await closing
                failed = False
        except Exception:
            pass
        finally:
            self.books.gone(entry, failed, flowcoro.now())
            self.tidy()

    async def _keep(self):
        """The keeper: see the head of this section."""
        books = self.books
        try:
            while True:
                with flowcoro.CancelScope() as scope:
                    alarm = books.plan(scope)
                    if alarm is None:
                        return
                    await alarm
                books.sweep(flowcoro.now())
                self.tidy()
        except BaseException:       # the run ends
            books.dismiss()
            self.tidy(hire=False)  # who waits now is cancelled too; a new one would end as this did
            raise


class _Acquire:
    """What acquire() returns: `async with` it, or await it, once."""

    __slots__ = ("_pool", "_timeout", "_used", "_entry", "_loan", "_connection")

    def __init__(self, pool, timeout):
        self._pool, self._timeout, self._used = pool, timeout, False

    def _use(self):
        if self._used:
            raise RuntimeError("an acquire() is awaited, or entered by `async with`, once; call pool.acquire() again for another "
                               "connection")
        self._used = True

    def __await__(self):
        self._use()
        return self._pool._acquire(self._timeout, None).__await__()

    async def __aenter__(self):
        self._use()
        return await self._pool._acquire(self._timeout, self)

    async def __aexit__(self, kind, error, trace):
        connection, self._connection = self._connection, None
        self._pool._give_back(connection, (self._entry, self._loan), error)


class ConnectionPool:
    """Connections kept for reuse, of any kind: `async with pool.acquire() as connection:`.

    factory: async function without arguments that makes a connection. It runs in the borrower's task, and its error is
    the borrower's. If it is cancelled it must leave nothing open.

    max_connections: how many there are at most, idle, in use, under way and being closed together. max_connecting: connects
    at the same time at most; None: no limit of its own. acquire_timeout: seconds that acquire() takes at most, with connect
    and validation. idle_timeout: seconds after which an idle one is closed; 0 keeps none. max_lifetime: seconds after which
    one is not lent again (up to 5 % fewer, so that not all end at once). validate: function of a connection, plain or async,
    that says whether it is still good; asked only after validate_after seconds of idleness; an Exception means no.
    reusable: plain function (connection, error) that says whether a returned one can be lent again; error is what ended the
    `async with`, or None. By default: if there was no error, and the connection has no attribute `closed` that is True. A
    request that was cancelled half-way leaves a connection of which nobody knows what it will say next.
    close: function that closes a connection, plain or async; by default connection.close(). An async one runs in a task of
    its own, shielded, for close_timeout seconds at most; its Exceptions are counted in statistics().
    leak_after: report connections held for longer than this many seconds, and those never returned, with the stack that
    acquired them, to sys.unraisablehook (as a PoolError); math.inf: only those never returned; None: none, for to keep
    the stack costs tens of microseconds for each acquire(). The places of those never returned are found again in any case,
    if the connections are of a type that has weak references.
    For each limit in seconds None is math.inf. TypeError and ValueError for arguments that make no sense.

    Waiters are served in order: one that comes back goes to who has waited longest, as does the right to connect. Of the
    idle ones the last returned is lent first, so that those too many become old. A failed connect harms nobody else: the
    next one tries its own. A pool serves one kernel at a time. What is idle when the run ends is closed then.

    Atomic: each change of who has what. The functions given above are called outside of that, with several workers by any.
    """

    def __init__(self, factory, *, max_connections=POOL_CONNECTIONS, max_connecting=None, idle_timeout=POOL_IDLE_TIMEOUT,
                 max_lifetime=POOL_LIFETIME, acquire_timeout=POOL_ACQUIRE_TIMEOUT, validate=None,
                 validate_after=POOL_VALIDATE_AFTER, reusable=None, close=None, close_timeout=POOL_CLOSE_TIMEOUT,
                 leak_after=None):
        if not callable(factory):
            raise TypeError(f"ConnectionPool({factory!r}): give an async function that makes a connection")
        self._factory = factory
        self._validate = _callable_or_none(validate, "validate", "a function of a connection")
        self._reusable = _callable_or_none(reusable, "reusable", "a function of a connection and an error")
        self._acquire_timeout = _seconds(acquire_timeout, "acquire_timeout")
        self._books = _PoolBooks(
            _whole(max_connections, 1, f"max_connections={max_connections!r}", "connections"),
            (math.inf if max_connecting is None
             else _whole(max_connecting, 1, f"max_connecting={max_connecting!r}", "connections")),
            _seconds(idle_timeout, "idle_timeout"), _seconds(max_lifetime, "max_lifetime", 0.001),
            _seconds(validate_after, "validate_after"),
            None if leak_after is None else _seconds(leak_after, "leak_after", 0.001))
        self._care = _PoolCare(self._books, _callable_or_none(close, "close", "a function of a connection"),
                               _seconds(close_timeout, "close_timeout"))

    # -- borrowing

    def acquire(self, *, timeout=_THE_POOLS):
        """A connection: `async with pool.acquire() as connection:` returns it at the end of the block, however that ends.

        It may be returned in the block too. `connection = await pool.acquire()` leaves the return to you: release() or
        discard(). What acquire() returns serves once. timeout: seconds, instead of acquire_timeout; None: no limit.
        A checkpoint. Cancelled: nothing is borrowed, a connect under way is cancelled. TimeoutError when the time is up, which
        says what took it (and what the factory raises, which may be another one); flowcoro.ClosedError once the pool is
        closed; the factory's error; TypeError, ValueError; RuntimeError if used twice.
        """
        return _Acquire(self, self._acquire_timeout if timeout is _THE_POOLS else _seconds(timeout, "timeout"))

    async def _acquire(self, timeout, owner):
        task = flowcoro.current_task()
        if task.budget > 0:         # a point of cancellation always, of scheduling when it has had its turn
            task.budget -= 1
        else:
            await flowcoro.checkpoint()
        books, began = self._books, flowcoro.now()
        entry = books.take(began)
        try:
            if entry is None or entry.state is not _IN_USE or entry.unproven and self._validate is not None:
                entry = await self._acquire_slowly(entry, timeout)
                books.waited(flowcoro.now() - began)
            stack = None if books.leak_after is None else _borrower_stack()
            connection = books.pick(entry, task, stack, began)
            self._care.tidy()
            if owner is not None:
                owner._entry, owner._loan, owner._connection = entry, entry.loan, connection
            return connection
        except BaseException:
            self._abandon(entry)
            raise

    async def _acquire_slowly(self, entry, timeout):
        """From a grant, or None, to an entry in use, connected or validated. It gives back what it had if it fails."""
        books = self._books
        queue, began, late = books.queue, None, ""
        with flowcoro.move_on_after(timeout) as scope:
            try:                            # inside: the scope keeps its own Cancelled to itself
                self._care.tidy()
                while True:
                    while entry is None or entry is _AGAIN:
                        entry = await queue.park_unless(self._grant_or_wait)
                        self._care.tidy()
                    began = flowcoro.now()          # of the connect or the validation
                    if entry.state is _CONNECTING:
                        await self._connect(entry, scope)
                        return entry
                    if not entry.unproven or self._validate is None or await self._is_valid(entry):
                        return entry
                    # It keeps its turn: it looks first, and waits before all others. The invalid one is closed by a task, so
                    # that it gives its place away only after that.
                    queue = books.first
                    entry = books.take(flowcoro.now())
                    self._care.tidy(later=True)
            except BaseException:
                try:
                    if scope.cancel_called:
                        late = self._in_words(entry, began)     # before its place is free again
                finally:
                    self._abandon(entry)
                raise
        if books.closed:
            raise flowcoro.ClosedError("this ConnectionPool was closed while the task waited for a connection")
        raise TimeoutError(f"no connection within {timeout:g} seconds: {late}")

    def _grant_or_wait(self):
        """What a task gets as it is about to wait: a grant after all, or None, and then it waits."""
        books = self._books
        entry = books.take(flowcoro.now())
        if entry is None:
            if books.condemned:
                return _AGAIN       # close them first
            if books.hire(waiting=True):
                self._care.start_keeper()
        return entry

    def _abandon(self, entry):
        """Whatever has ended an acquire, a signal handler's error even: it leaves nothing behind."""
        if entry is not None and entry is not _AGAIN:
            self._books.give_back(entry, entry.loan, "interrupted", flowcoro.now())
            self._books.connect_failed(entry, flowcoro.now())
        self._care.tidy()

    async def _connect(self, entry, scope):
        books = self._books
        books.connecting(entry, scope)      # if it fails, _abandon() gives the place to the next one
        making = self._factory()
        if not inspect.isawaitable(making):
            raise TypeError(f"the factory returned {making!r}: give an async function that makes a connection")
        connection = await making
        if connection is None:
            raise TypeError("the factory made None instead of a connection")
        if not books.connected(entry, connection, flowcoro.now()):
            raise flowcoro.ClosedError("this ConnectionPool was closed while the task connected")

    async def _is_valid(self, entry):
        books, connection = self._books, entry.connection
        if connection is None:              # condemned since the grant
            raise flowcoro.ClosedError("this ConnectionPool was closed while the task waited for a connection")
        try:
            good = self._validate(connection)
            if inspect.isawaitable(good):
                good = await good
        except Exception:
            good = False
        if not good:
            books.give_back(entry, entry.loan, "invalid", flowcoro.now())
        return good

    def release(self, connection):
        """Return it, to who has waited longest. Never blocks.

        PoolError if it is not lent: returned twice (as far as nobody else has it by now), or another pool's. Nothing, once
        the pool is closed.
        """
        self._return(connection, None)

    def discard(self, connection):
        """Return it to be closed, because it is broken or in an unknown state. Never blocks. PoolError as release()."""
        self._return(connection, "discarded")

    def _return(self, connection, reason):
        loan = self._books.find(connection)
        if loan is not None and not self._give_back(connection, loan, None, reason) and not self._books.closed:
            raise flowcoro.PoolError(f"{connection!r} was returned by another task at the same time: it was returned twice")

    def _give_back(self, connection, loan, error, reason=None):
        """Whether the loan had not ended before."""
        if reason is None:
            try:
                if self._reusable is None:
                    good = error is None and getattr(connection, "closed", False) is not True
                else:
                    good = self._reusable(connection, error)
                reason = None if good else "broken"
            except BaseException:
                self._books.give_back(*loan, "broken", flowcoro.now())
                self._care.tidy()
                raise
        given = self._books.give_back(*loan, reason, flowcoro.now())
        self._care.tidy()
        return given

    # -- changing it while in use

    def clear(self):
        """Close what is idle now, and what is in use or under way once it is returned. Never blocks."""
        self._books.clear()
        self._care.tidy()

    def set_max_connections(self, count):
        """Allow that many, from now on. If there are more, idle ones are closed, the oldest first, and others when returned."""
        self._books.resize(_whole(count, 1, f"max_connections={count!r}", "connections"), flowcoro.now())
        self._care.tidy()

    def set_idle_timeout(self, seconds):
        """Close those idle for longer, from now on."""
        self._books.set_idle_timeout(_seconds(seconds, "idle_timeout"), flowcoro.now())
        self._care.tidy()

    # -- closing

    async def close(self, *, timeout=None):
        """Lend no more, wait until all connections are returned, for `timeout` seconds at most, then close what is left.

        Who waits for a connection gets flowcoro.ClosedError. timeout=0: at once; None: without a limit. Returns when all are
        closed. Twice is once. Cancelled: the pool is closed all the same, and those in use are when they are returned.
        """
        timeout, books = _seconds(timeout, "timeout"), self._books
        books.shut(at_once=not timeout)
        self._care.tidy()
        await flowcoro.checkpoint()
        with flowcoro.move_on_after(timeout):
            while books.total:
                await books.emptied.park_unless(self._is_empty)
        if books.total:
            self.close_nowait()
            while books.counts[_CLOSING]:
                await books.emptied.park_unless(lambda: not books.counts[_CLOSING])

    def _is_empty(self):
        """Asked as a task is about to wait for it; then those that are never returned have to be noticed."""
        books = self._books
        if books.lost:
            books.reap(flowcoro.now())
        if books.total and books.hire(waiting=True):
            self._care.start_keeper()
        return not books.total

    def close_nowait(self):
        """Close all connections, those in use too, under their borrowers' feet. Async closes go on in tasks. Never blocks."""
        self._books.shut(at_once=True)
        self._care.tidy()

    async def __aenter__(self):
        return self

    async def __aexit__(self, kind, error, trace):
        await self.close(timeout=None if error is None else 0)

    # -- telling

    def statistics(self):
        """Numbers, as a dict.

        idle, in_use (also while it is validated), connecting, closing: connections in that state · waiting: tasks in line ·
        max_connections · acquired: loans so far · created · connects_failed, cancelled ones included · closed: {reason: how
        many}, for the reasons there were: idle, lifetime, invalid, broken, discarded, interrupted, cleared, shrunk,
        pool_closed, run_ended, lost · closes_failed: closes that raised, or took too long · waits: acquires that had to wait
        for a connection, a connect or a validation, wait_sum and wait_max: the seconds of those that got one · generation:
        how often it was cleared.
        """
        numbers = self._books.numbers(flowcoro.now())
        self._care.tidy()
        return numbers

    def _in_words(self, entry, began):
        """What an acquire was at when its time was up, and what helps. `entry`: as _acquire_slowly() has it."""
        now, connecting_most = flowcoro.now(), self._books.max_connecting
        numbers = self._books.numbers(now)
        if entry is not None and entry is not _AGAIN:
            if entry.state is _CONNECTING:
                phase = f"it has been connecting for {now - began:.3g} seconds"
                remedy = "See whether the other side can be reached, or give the pool a larger acquire_timeout"
            else:
                phase = f"validate() has not answered for {now - began:.3g} seconds"
                remedy = "Give it a timeout of its own after which it returns False: then another connection is tried"
        elif numbers["connecting"] >= connecting_most and self._books.total < numbers["max_connections"]:
            phase = f"it waited for its turn to connect, with max_connecting={connecting_most}"
            remedy = "See why connects take so long, or give the pool a larger max_connecting or acquire_timeout"
        elif numbers["closing"] and not numbers["in_use"]:
            phase = "it waited for one to be closed"
            remedy = "See why that takes so long, or give the pool a smaller close_timeout or a larger max_connections"
        else:
            phase = "it waited for one to be returned"
            remedy = "Return them sooner, or give the pool a larger max_connections or acquire_timeout"
        return (f"{phase}; of max_connections={numbers['max_connections']} there were {numbers['in_use']} in use, "
                f"{numbers['connecting']} connecting, {numbers['closing']} closing, and {numbers['waiting']} others waited. "
                f"{remedy}")

    def __repr__(self):
        numbers = self.statistics()
        return "<ConnectionPool " + " ".join(f"{name}={numbers[name]}" for name in ("idle", "in_use", "waiting")) + ">"
