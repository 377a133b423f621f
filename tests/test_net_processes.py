"""Servers in several processes: who supervises, what happens to those who die, signals, and that nothing is lost."""

import contextlib
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import flowcoro
import flowcoro_net
from flowcoro_net import TcpServer
from test_net import PATIENCE, nothing_is_left_behind, run  # noqa: F401  (a fixture)

ROOT = os.path.dirname(os.path.abspath(flowcoro_net.__file__))

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

# What the servers under test do, unless a test says otherwise.
PROGRAM = """
import os, sys
import flowcoro, flowcoro_net

async def handler(sock):
    while (line := await sock.read_until()):
        word = line.split()
        if word[0] == b"pid":
            await sock.write(b"%d\\n" % os.getpid())
        elif word[0] == b"exit":
            os._exit(int(word[1]))
        else:
            await sock.write(line)

OPTIONS = dict(processes=2)
LISTEN = dict(reuse_port=True)
"""

MAIN = """
async def main():
    before = len(os.listdir("/proc/self/fd"))
    async with await flowcoro_net.TcpServer.listen("127.0.0.1", 0, **LISTEN) as server:
        print(server.local[1], flush=True)
        await server.serve(handler, **OPTIONS)
        told = server.statistics()
    print("left:", told["processes"], len(os.listdir("/proc/self/fd")) - before, flush=True)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        print("no children", flush=True)

flowcoro.run(main(), workers=1)
"""


class Program:
    """A program that serves: its port, its output, its signals."""

    def __init__(self, text, folder):
        self.output, self.errors = folder / "output", folder / "errors"
        path = folder / "program.py"
        path.write_text(PROGRAM + text + MAIN)
        with open(self.output, "wb") as output, open(self.errors, "wb") as errors:
            self.process = subprocess.Popen([sys.executable, "-W", "error", str(path)], stdout=output, stderr=errors,
                                            env=os.environ | {"PYTHONPATH": ROOT}, start_new_session=True)
        self.wait_for(lambda: b"\n" in self.output.read_bytes())
        self.port = int(self.output.read_text().split()[0])

    def wait_for(self, condition):
        until = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < until and self.process.poll() is None, self.errors.read_text()
            time.sleep(0.005)
        return found

    def connect(self):
        return Client(socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE))

    def pids(self):
        """Of those who accept now, as 32 connections find them."""
        found = set()
        for _ in range(32):
            with self.connect() as client:
                found.add(client.pid())
        return found

    def said(self, pattern):
        """All that matches in what it wrote to stderr."""
        return re.findall(pattern, self.errors.read_text())

    def send_signal(self, number):
        self.process.send_signal(number)

    def end(self, number=signal.SIGTERM, status=0):
        """Ask it to end; nothing may be left."""
        self.send_signal(number)
        assert self.process.wait(PATIENCE) == status, self.errors.read_text()
        if status == 0:
            assert self.output.read_text().split("\n", 1)[1] == "left: [] 0\nno children\n"

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


class Client:
    """A plain connection that asks."""

    def __init__(self, sock):
        self.sock, self.lines = sock, sock.makefile("rb")

    def ask(self, line):
        self.sock.sendall(line + b"\n")
        return self.lines.readline().strip()

    def pid(self):
        return int(self.ask(b"pid"))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.lines.close()
        self.sock.close()


@pytest.fixture
def program(tmp_path):
    """program(text): a server that runs, with what `text` changes."""
    with contextlib.ExitStack() as stack:
        def start(text=""):
            started = Program(text, tmp_path)
            stack.callback(started.close)
            return started

        yield start


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_several_processes_serve_one_port(program):
    server = program()
    found = server.pids()
    assert len(found) == 2 and server.process.pid not in found
    server.end()
    assert not any(map(is_alive, found)) and server.errors.read_text() == ""


def test_without_reuse_port_they_share_one_queue(program):
    server = program("LISTEN = {}")
    clients = [server.connect() for _ in range(50)]
    for client in clients:
        assert client.ask(b"hello") == b"hello"
        client.__exit__()
    server.end()


def test_one_that_is_killed_under_load_is_replaced_and_harms_no_other(program):
    server = program()
    first = server.pids()
    stop, counts, wrong = threading.Event(), {"answered": 0, "broken": 0}, []

    def load():
        while not stop.is_set():
            try:
                with server.connect() as client:
                    for number in range(20):
                        answer = client.ask(b"%d" % number)
                        if not answer:
                            counts["broken"] += 1           # its process was killed
                            break
                        assert answer == b"%d" % number
                        counts["answered"] += 1
            except ConnectionRefusedError as error:         # nobody may ever be turned away
                wrong.append(error)
            except ConnectionError:
                counts["broken"] += 1
            except BaseException as error:
                wrong.append(error)
                raise

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    victims = []
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                clients = [stack.enter_context(server.connect()) for _ in range(40)]
                pids = [client.pid() for client in clients]
                assert len(set(pids)) == 2
                victims.append(pids[0])
                os.kill(pids[0], signal.SIGKILL)
                for client, pid in zip(clients, pids):
                    if pid != pids[0]:
                        assert client.ask(b"still there") == b"still there"
                server.wait_for(lambda: len(server.pids() - set(victims)) == 2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == [] and counts["answered"] > 100
    assert len(server.said(r"worker process (\d+) was killed by signal 9")) == 3
    assert {int(pid) for pid in server.said(r"worker process (\d+) was killed by signal 9")} == set(victims)
    assert not set(victims) & server.pids() and first - set(victims) <= server.pids() | set(victims)
    server.end()


def test_who_waits_to_be_accepted_while_a_process_dies_is_served_by_the_next(program):
    server = program("OPTIONS = dict(processes=1)")
    with server.connect() as client:
        pid = client.pid()
        os.kill(pid, signal.SIGSTOP)
        waiting = [server.connect() for _ in range(5)]
        os.kill(pid, signal.SIGKILL)
        assert client.lines.readline() == b""
    for each in waiting:
        assert each.pid() != pid
        each.__exit__()
    server.end()


def test_one_that_dies_again_and_again_is_replaced_later_and_later(program):
    server = program("""
flowcoro_net.RESTART, flowcoro_net.LONGEST_RESTART, flowcoro_net.STEADY = 0.01, 0.04, 3600
OPTIONS = dict(processes=1)
""")
    for status in range(1, 5):
        with server.connect() as client:
            assert client.ask(b"exit %d" % status) == b""
    with server.connect() as client:
        assert client.ask(b"x") == b"x"
    assert server.said(r"the next one starts in (\S+) s") == ["0.01", "0.02", "0.04", "0.04"]
    assert server.said(r"ended with exit status (\d)") == ["1", "2", "3", "4"]
    server.end()


def test_one_that_has_lived_long_enough_is_replaced_as_soon_as_the_first(program):
    server = program("""
flowcoro_net.RESTART, flowcoro_net.STEADY = 0.01, 0
OPTIONS = dict(processes=1)
""")
    for _ in range(3):
        with server.connect() as client:
            assert client.ask(b"exit 1") == b""
    with server.connect() as client:
        assert client.ask(b"x") == b"x"
    assert server.said(r"the next one starts in (\S+) s") == ["0.01"] * 3
    server.end()


def test_one_that_was_replaced_and_does_not_end_is_killed(program):
    server = program("""
flowcoro_net.END_TIMEOUT = 0.05
OPTIONS = dict(processes=1, drain_timeout=0.05)
""")
    [old] = server.pids()
    os.kill(old, signal.SIGSTOP)
    server.send_signal(signal.SIGHUP)
    server.wait_for(lambda: not is_alive(old))
    assert server.pids() != {old}
    server.end()


def test_a_second_and_a_third_sigterm_wait_for_nobody(program):
    server = program("""
flowcoro_net.END_TIMEOUT = 3600
OPTIONS = dict(processes=2, drain_timeout=3600)
""")
    stopped = server.pids()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + PATIENCE
    while server.process.poll() is None:
        assert time.monotonic() < until
        server.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert server.process.returncode == 143 and not any(map(is_alive, stopped))


def test_sigterm_lets_all_finish_what_they_have_begun(program):
    server = program()
    clients = [server.connect() for _ in range(40)]
    assert len({client.pid() for client in clients}) == 2
    server.send_signal(signal.SIGTERM)

    def refused():
        try:
            server.connect().__exit__()
        except ConnectionError:
            return True

    server.wait_for(refused)
    for client in clients:
        assert client.ask(b"last words") == b"last words"
        client.__exit__()
    assert server.process.wait(PATIENCE) == 0
    assert server.output.read_text().endswith("left: [] 0\nno children\n")


def test_handlers_that_do_not_end_in_time_are_cancelled_in_all_processes(program):
    server = program("OPTIONS = dict(processes=2, drain_timeout=0.05)")
    clients = [server.connect() for _ in range(40)]
    for client in clients:
        assert client.ask(b"x") == b"x"
    server.end()
    for client in clients:
        assert client.lines.read() == b""
        client.__exit__()


def test_one_that_does_not_listen_is_killed_in_the_end(program):
    server = program("""
flowcoro_net.END_TIMEOUT = 0.05
OPTIONS = dict(processes=2, drain_timeout=0.05)
""")
    stopped = server.pids()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    server.end()
    assert not any(map(is_alive, stopped))


def test_ctrl_c_ends_all_at_once(program):
    server = program()
    found = server.pids()
    with server.connect() as client:
        assert client.ask(b"x") == b"x"
        os.killpg(server.process.pid, signal.SIGINT)        # as a terminal does
        assert client.lines.read() == b""
    assert server.process.wait(PATIENCE) == -signal.SIGINT and not any(map(is_alive, found))
    assert server.said("KeyboardInterrupt")


def test_a_worker_leaves_ctrl_c_and_hangups_to_the_supervisor(program):
    server = program("OPTIONS = dict(processes=1)")
    with server.connect() as client:
        pid = client.pid()
        for number in signal.SIGINT, signal.SIGHUP:
            os.kill(pid, number)
            assert client.pid() == pid
        with open(f"/proc/{pid}/status") as file:
            [ignored] = re.findall(r"^SigIgn:\s*(\w+)", file.read(), re.MULTILINE)
        assert int(ignored, 16) & 3 == 3            # SIGHUP is 1, SIGINT 2
    assert server.pids() == {pid}
    server.end()


def test_a_handler_of_sigterm_in_the_supervisor_is_not_the_workers(program):
    server = program("""
import signal
signal.signal(signal.SIGTERM, lambda *args: print("asked", file=sys.stderr, flush=True))
""")
    first = server.pids()
    server.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.said("asked"))
    assert server.pids() == first
    for pid in first:
        os.kill(pid, signal.SIGTERM)
    server.wait_for(lambda: len(server.pids() - first) == 2)
    assert len(server.said("ended with exit status 0")) == 2 and len(server.said("asked")) == 1
    server.close()


def test_a_worker_keeps_from_finalizing_what_is_the_supervisors(program):
    if not gc.get_freeze_count():           # which tests/conftest.py has called for
        pytest.skip("gc.freeze() does nothing here")
    server = program("""
import gc
async def handler(sock):
    await sock.read_until()
    await sock.write(b"%d\\n" % gc.get_freeze_count())
""")
    with server.connect() as client:
        assert int(client.ask(b"?")) > 1000
    server.end()


def test_workers_end_when_the_supervisor_is_killed(program):
    server = program()
    found = server.pids()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(40)]
        assert all(client.ask(b"x") == b"x" for client in clients)
        server.send_signal(signal.SIGKILL)
        server.process.wait(PATIENCE)
        assert all(client.ask(b"still served") == b"still served" for client in clients)
    until = time.monotonic() + PATIENCE
    while any(map(is_alive, found)):
        assert time.monotonic() < until
        time.sleep(0.005)


def test_sighup_replaces_all_and_loses_no_connection(program):
    server = program("""
generation = 0
def reload():
    global generation
    generation += 1
    return new_handler

async def new_handler(sock):
    while line := await sock.read_until():
        await sock.write(b"%d\\n" % os.getpid() if line == b"pid\\n" else b"generation %d\\n" % generation)

OPTIONS = dict(processes=2, reload=reload)
""")
    first = server.pids()
    stop, wrong, answered = threading.Event(), [], [0]

    def load():
        while not stop.is_set():
            try:
                with server.connect() as client:
                    assert client.pid() > 0
                    answered[0] += 1
            except BaseException as error:
                wrong.append(error)

    thread = threading.Thread(target=load)
    with contextlib.ExitStack() as stack:
        old = [stack.enter_context(server.connect()) for _ in range(40)]
        assert {client.pid() for client in old} == first
        thread.start()
        try:
            for generation in 1, 2:
                before = server.pids()
                server.send_signal(signal.SIGHUP)
                server.wait_for(lambda: len(server.pids()) == 2 and not server.pids() & before)
                with server.connect() as client:
                    assert client.ask(b"x") == b"generation %d" % generation
        finally:
            stop.set()
            thread.join()
        assert wrong == [] and answered[0]
        for client in old:                      # what they had, they serve to its end
            assert client.ask(b"x") == b"x" and client.pid() in first
    server.wait_for(lambda: not any(map(is_alive, first)))
    server.end()
    assert server.errors.read_text() == ""


def test_a_reload_that_fails_leaves_the_old_ones_at_work(program):
    server = program("""
async def reload():
    await flowcoro.sleep(0)
    raise ValueError("no such setting")

OPTIONS = dict(processes=2, reload=reload)
""")
    first = server.pids()
    server.send_signal(signal.SIGHUP)
    server.wait_for(lambda: server.said("ValueError: no such setting"))
    assert server.pids() == first and server.said("reloading failed; the worker processes that have not been replaced go on")
    server.end()


def test_a_new_process_that_cannot_serve_takes_nobodys_place(program):
    server = program("""
def reload():
    flowcoro_net._Supervisor.serve = broken

async def broken(self, *args):
    raise RuntimeError("cannot serve")

OPTIONS = dict(processes=2, reload=reload)
""")
    first = server.pids()
    server.send_signal(signal.SIGHUP)
    server.wait_for(lambda: server.said("reloading failed"))
    assert server.said("RuntimeError: cannot serve") and server.said("ended with exit status 1, before it served")
    assert server.pids() == first
    server.end()


def test_the_supervisor_counts_for_all(program):
    server = program("""
class Server(flowcoro_net.TcpServer):
    pass

async def tell(server):
    while True:
        await flowcoro.sleep(0.01)
        told = server.statistics()
        with open(sys.argv[0] + ".new", "w") as file:
            print(told["connections"], told["accepted"], told["failed"], told["restarts"], len(told["processes"]), file=file)
        os.replace(sys.argv[0] + ".new", sys.argv[0] + ".told")

whole = flowcoro_net._Supervisor.run
async def run(self):
    async with flowcoro.TaskGroup() as group:
        group.spawn(tell(self.server))
        await whole(self)
        group.cancel()
flowcoro_net._Supervisor.run = run

plain = handler
async def handler(sock):
    await plain(sock)
    1 / 0
""")
    told = server.output.parent / "program.py.told"
    clients = [server.connect() for _ in range(10)]
    assert all(client.ask(b"x") == b"x" for client in clients)
    server.wait_for(lambda: told.exists() and told.read_text() == "10 10 0 0 2\n")
    for client in clients:
        client.__exit__()
    server.wait_for(lambda: told.read_text() == "0 10 10 0 2\n")
    with server.connect() as client:
        client.ask(b"exit 0")
    server.wait_for(lambda: told.read_text() == "0 11 10 1 2\n")
    with server.connect() as client:
        assert client.ask(b"x") == b"x"
    server.wait_for(lambda: told.read_text() == "0 12 11 1 2\n")
    server.end()


def test_a_unix_server_in_several_processes(tmp_path):
    text = PROGRAM + f"""
async def main():
    async with await flowcoro_net.UnixServer.listen({str(tmp_path / "socket")!r}) as server:
        print("here", flush=True)
        await server.serve(handler, processes=2)

flowcoro.run(main(), workers=1)
"""
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", text], env=os.environ | {"PYTHONPATH": ROOT},
                               stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"here\n"
        for _ in range(10):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(PATIENCE)
            sock.connect(str(tmp_path / "socket"))
            with Client(sock) as client:
                assert client.ask(b"hello") == b"hello"
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0
        process.stdout.close()
    assert not (tmp_path / "socket").exists()


def test_processes_refuses_what_cannot_be():
    async def handler(sock):
        pass

    async def main(*said):
        async with await TcpServer.listen("127.0.0.1", 0) as server:
            with pytest.raises((RuntimeError, ValueError, TypeError), match=said[0]):
                await server.serve(handler, **said[1])
            with pytest.raises(RuntimeError, match="has no worker processes"):
                server.reload()

    run(main, "processes=0: the number of processes must be 1", {"processes": 0}, workers=1)
    run(main, "processes='2': give a number", {"processes": "2"}, workers=1)
    run(main, "reload= needs processes=", {"reload": print}, workers=1)
    run(main, "reload=5: give a function", {"processes": 2, "reload": 5}, workers=1)
    run(main, r"use run\(workers=1\)", {"processes": 2}, workers=2)
