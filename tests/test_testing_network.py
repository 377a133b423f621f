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
import subprocess
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
