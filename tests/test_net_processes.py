"""Servers in several processes: who supervises, what happens to those who die, signals, and that nothing is lost."""

import contextlib
import errno
import gc
import importlib
import io
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import flowcoro
import flowcoro_net
from flowcoro_net import Socket, TcpServer, UnixServer
from flowcoro_testing import wait_all_tasks_parked
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
        elif word[0] == b"descriptors":
            await sock.write(b"%d\\n" % len(os.listdir("/proc/self/fd")))
        elif word[0] == b"exit":
            os._exit(int(word[1]))
        else:
            await sock.write(line)

OPTIONS = dict(processes=2)
LISTEN = dict(reuse_port=True)
"""

MAIN = """
look_after = flowcoro_net._Supervisor.look_after

async def tell_then_look_after(self):
    print(self.server.local[1], flush=True)         # now all have their sockets: those who connect find more than the first
    await look_after(self)

flowcoro_net._Supervisor.look_after = tell_then_look_after

async def main():
    before = len(os.listdir("/proc/self/fd"))
    async with await flowcoro_net.TcpServer.listen("127.0.0.1", 0, **LISTEN) as server:
        await server.serve(handler, **OPTIONS)
        told = server.statistics()
    print("left:", told["processes"], len(os.listdir("/proc/self/fd")) - before, flush=True)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        print("no children", flush=True)

flowcoro.run(main(), workers=1)
"""


# Two servers, each in a process of its own, of a thread that hears no signals.
MAIN_OF_TWO = """
import threading

async def main():
    async with (await flowcoro_net.TcpServer.listen("127.0.0.1", 0) as one, flowcoro.TaskGroup() as group,
                await flowcoro_net.TcpServer.listen("127.0.0.1", 0) as other):
        for server in one, other:
            group.spawn(server.serve(handler, processes=1))
        print(one.local[1], other.local[1], flush=True)
        await flowcoro.sleep(3600)

thread = threading.Thread(target=lambda: flowcoro.run(main(), workers=1))
thread.start()
thread.join()
"""


class Program:
    """A program that serves: its port, its output, its signals."""

    def __init__(self, text, folder, main=MAIN):
        self.output, self.errors = folder / "output", folder / "errors"
        path = folder / "program.py"
        path.write_text(PROGRAM + text + main)
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

    def connect(self, port=None):
        return Client(socket.create_connection(("127.0.0.1", port or self.port), timeout=PATIENCE))

    def refuses(self):
        try:
            self.connect().__exit__()
        except ConnectionError:
            return True

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
        def start(text="", *main):
            started = Program(text, tmp_path, *main)
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


def test_a_lifespan_is_of_each_process(program):
    server = program("""
import contextlib

@contextlib.asynccontextmanager
async def lifespan():
    open(f"{os.environ['FOLDER']}/begun-{os.getpid()}", "x").close()
    yield
    open(f"{os.environ['FOLDER']}/ended-{os.getpid()}", "x").close()

os.environ["FOLDER"] = os.path.dirname(os.path.abspath(__file__))
OPTIONS = dict(processes=2, lifespan=lifespan)
""")
    pids = server.pids()
    server.end()
    folder = server.output.parent
    assert {path.name for path in folder.glob("*-*")} == {f"{word}-{pid}" for pid in pids for word in ("begun", "ended")}


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
    server.wait_for(server.refuses)
    for client in clients:
        assert client.ask(b"last words") == b"last words"
        client.__exit__()
    assert server.process.wait(PATIENCE) == 0
    assert server.output.read_text().endswith("left: [] 0\nno children\n")


def test_however_often_a_worker_is_asked_to_stop_it_lets_all_finish(program):
    server = program()
    clients = [server.connect() for _ in range(40)]
    pids = {client.pid() for client in clients}
    assert len(pids) == 2
    os.killpg(server.process.pid, signal.SIGTERM)           # as systemd does; and the supervisor asks as well
    server.wait_for(server.refuses)
    for number in range(5):
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        for client in clients:
            assert client.ask(b"word %d" % number) == b"word %d" % number
    for client in clients:
        client.__exit__()
    assert server.process.wait(PATIENCE) == 0
    assert server.output.read_text().endswith("left: [] 0\nno children\n")


def test_one_that_was_replaced_lets_all_finish_even_when_the_server_stops(program):
    server = program("OPTIONS = dict(processes=1)")
    with server.connect() as client:
        old = client.pid()
        server.send_signal(signal.SIGHUP)
        server.wait_for(lambda: server.pids() - {old})
        server.send_signal(signal.SIGTERM)
        server.wait_for(server.refuses)
        for _ in range(5):
            assert client.pid() == old
    assert server.process.wait(PATIENCE) == 0


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


def test_workers_of_two_servers_end_by_themselves_when_the_supervisor_is_gone(program):
    server = program("", MAIN_OF_TWO)
    ports = list(map(int, server.output.read_text().split()))
    pids = []
    for port in ports:
        with server.connect(port) as client:
            pids.append(client.pid())
            os.kill(pids[-1], signal.SIGKILL)
            assert client.lines.read() == b""
    with server.connect(ports[0]) as one, server.connect(ports[1]) as other:     # forked anew, in whatever order
        pids = one.pid(), other.pid()
        server.send_signal(signal.SIGTERM)              # which nobody handles there
        assert server.process.wait(PATIENCE) == -signal.SIGTERM
        for client, pid in (one, pids[0]), (other, pids[1]):
            client.sock.shutdown(socket.SHUT_WR)        # with the other one still at work, for one of them
            until = time.monotonic() + PATIENCE
            while is_alive(pid):
                assert time.monotonic() < until
                time.sleep(0.002)


def test_a_worker_that_comes_later_has_no_more_descriptors(program):
    server = program("""
flowcoro_net.RESTART = 0.001
OPTIONS = dict(processes=2)
""")
    first = server.pids()
    with server.connect() as client:
        count = client.ask(b"descriptors")
    for victim in first:
        os.kill(victim, signal.SIGKILL)
    server.wait_for(lambda: len(second := server.pids()) == 2 and not second & first)
    for _ in range(2):
        second = server.pids()
        server.send_signal(signal.SIGHUP)
        server.wait_for(lambda: len(third := server.pids()) == 2 and not third & second)
    for _ in range(16):
        with server.connect() as client:
            assert client.ask(b"descriptors") == count
    server.end()


def test_a_child_that_a_handler_forks_ends_there(program):
    server = program("""
async def handler(sock):
    await sock.read_until()
    if pid := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        await sock.write(b"%d %d\\n" % (os.getpid(), status))

OPTIONS = dict(processes=1)
""")
    with server.connect() as client:
        pid, status = client.ask(b"x").split()
        assert status == b"1"
    with server.connect() as client:
        assert client.ask(b"x").split()[0] == pid
    assert server.said("this process was forked inside flowcoro.run()")
    server.end()


def test_a_sigterm_for_the_whole_group_is_no_death(program):
    for _ in range(3):
        server = program("OPTIONS = dict(processes=2)\n")
        os.killpg(server.process.pid, signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0, server.errors.read_text()
        assert server.errors.read_text() == ""


@pytest.mark.parametrize("busy", [False, True])
def test_two_sigterms_end_it_as_well_as_one(program, busy):
    server = program("OPTIONS = dict(processes=2, drain_timeout=0.2)\nflowcoro_net.END_TIMEOUT = 0.2\n")
    with server.connect() if busy else contextlib.nullcontext():
        pids = server.pids()
        server.send_signal(signal.SIGTERM)
        time.sleep(0.001)
        server.send_signal(signal.SIGTERM)
        # The second one may meet a program that has done with the first, and with which it does what it always does.
        assert server.process.wait(PATIENCE) in (0, 143, -signal.SIGTERM), server.errors.read_text()
    assert not any(map(is_alive, pids))


def test_a_stop_that_follows_a_reload_forks_nobody_more(program):
    for _ in range(5):
        server = program("OPTIONS = dict(processes=2)\n")
        server.send_signal(signal.SIGHUP)
        time.sleep(0.002)
        server.end()
        assert "Traceback" not in server.errors.read_text()


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


# ---- in this very process ----------------------------------------------------------------------------------------

async def tell(sock):
    while line := await sock.read_until():
        await sock.write(b"%d\n" % os.getpid() if line == b"pid\n" else line)


async def tell_more(sock):
    await sock.read_until()
    await sock.write(b"more\n")


async def ask(server, line=b"pid"):
    async with await Socket.connect(*server.local) as sock:
        await sock.write(line + b"\n")
        return (await sock.read_until()).strip()


async def until(condition):
    while not condition():
        await flowcoro.sleep(0.002)


def serving(server):
    """The numbers of the processes that are in their places and serve; of fewer than all, none."""
    supervisor = server._supervisor
    found = [place.process for place in supervisor.places] if supervisor else [None]
    return {process.pid for process in found} if all(process and process.serving.is_set() and not process.ended.is_set()
                                                      for process in found) else set()


def replaced(server, before):
    """Whether all serve, none of them is one of those before, and these have ended."""
    return serving(server) and not set(server.statistics()["processes"]) & before


@contextlib.asynccontextmanager
async def served(handler=tell, listen=(), **options):
    """A server of this process, and the task of its serve(processes=), once all serve."""
    async with await TcpServer.listen("127.0.0.1", 0, **dict(listen)) as server, flowcoro.TaskGroup() as group:
        task = group.spawn(server.serve(handler, **options))
        await until(lambda: serving(server) or task.done())
        yield server, task
        server.close()


def no_children():
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def run_here(main, *args):
    run(main, *args, workers=1)
    no_children()


def run_in_thread(main, *args):
    failures = []

    def work():
        try:
            run(main, *args, workers=1)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures.pop()
    no_children()


anywhere = pytest.mark.parametrize("run_it", [run_here, run_in_thread], ids=["main_thread", "another_thread"])


@pytest.fixture
def forks(monkeypatch):
    """A list; forks.append(error): what the next os.fork() raises, or None, or what it calls with the child's number or 0."""
    plan, real = [], os.fork

    def fork():
        step = plan.pop(0) if plan else None
        if isinstance(step, Exception):
            raise step
        pid = real()
        if step is not None:
            step(pid)
        return pid

    monkeypatch.setattr(os, "fork", fork)
    return plan


NO_MORE = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


@anywhere
def test_cancelled_serve_cancels_the_handlers_and_waits_for_their_cleanup(run_it):
    async def handler(sock):
        await sock.write(b"here\n")
        try:
            await sock.read()
        except flowcoro.Cancelled:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(0.01)
                await sock.write(b"cleaned up\n")
            raise

    async def main():
        async with served(handler, processes=2, drain_timeout=3600) as (server, task):
            async with await Socket.connect(*server.local) as sock:
                assert await sock.read_until() == b"here\n"
                task.cancel()
                assert await sock.read_until() == b"cleaned up\n"
                with pytest.raises(flowcoro.TaskCancelled):
                    await task
                assert server.closed and server.statistics()["processes"] == []
                assert await sock.read() == b""

    run_it(main)


@anywhere
def test_close_ends_serve_once_the_handlers_have_ended(run_it):
    async def main():
        async with served(processes=2, drain_timeout=3600) as (server, task):
            async with await Socket.connect(*server.local) as sock:
                await sock.write(b"one\n")
                assert await sock.read_until() == b"one\n"
                assert server.statistics() == {
                    "connections": 1, "accepted": 1, "failed": 0, "broken": 0, "handshakes_failed": 0, "pauses": 0,
                    "processes": list(server._supervisor.processes), "restarts": 0}
                assert set(server.statistics()["processes"]) == serving(server)
                server.close()
                with contextlib.suppress(flowcoro_net.BrokenError):
                    while True:
                        await ask(server)
                await sock.write(b"two\n")
                assert await sock.read_until() == b"two\n" and not task.done()
            await task
            told = server.statistics()
            assert (told["connections"], told["accepted"] >= 1, told["processes"], told["restarts"]) == (0, True, [], 0)
            with pytest.raises(RuntimeError, match="has no worker processes"):
                server.reload()

    run_it(main)


def test_tls_in_several_processes(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command, which makes the certificate, is not installed")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-addext",
                    "keyUsage=critical,digitalSignature,keyCertSign", "-keyout", "key.pem", "-out", "cert.pem"],
                   cwd=tmp_path, check=True, capture_output=True)
    context = flowcoro_net.server_tls(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    trust = flowcoro_net.client_tls(ca=str(tmp_path / "cert.pem"))

    async def main():
        async with served(listen={"tls": context}, processes=2) as (server, _):
            for _ in range(4):
                async with await Socket.connect(*server.local, tls=trust, server_name="localhost") as sock:
                    await sock.write(b"pid\n")
                    assert int(await sock.read_until()) in serving(server)
            async with await Socket.connect(*server.local) as sock:
                await sock.write(b"this is no TLS\n")
                await until(lambda: server.statistics()["handshakes_failed"] == 1)

    run_here(main)


def test_max_connections_holds_for_each_process():
    async def main():
        async with served(processes=1, max_connections=1) as (server, _):
            async with await Socket.connect(*server.local) as waiting:
                async with await Socket.connect(*server.local) as sock:
                    for each in waiting, sock:              # the one that was accepted first answers
                        await each.write(b"x\n")
                    assert await waiting.read_until() == b"x\n"
                    await until(lambda: server.statistics()["connections"] == 1)
                    with flowcoro.move_on_after(0.02) as scope:
                        await sock.read_until()
                    assert scope.cancelled_caught and server.statistics()["accepted"] == 1
                    await waiting.shutdown_write()
                    assert await sock.read_until() == b"x\n"

    run_here(main)


@pytest.mark.parametrize("which", [0, 2], ids=["first", "third"])
@pytest.mark.parametrize("what", ["fork", "descriptors"])
def test_when_the_first_ones_cannot_be_forked_serve_fails_and_none_is_left(forks, monkeypatch, which, what):
    forks += [None] * which + [NO_MORE]
    if what == "descriptors":
        plan, real = [None] * (1 + which) + [OSError(errno.EMFILE, "Too many open files")], socket.socketpair     # 1: SIGHUP

        def pair():
            if error := plan.pop(0):
                raise error
            return real()

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server:
            if what == "descriptors":
                monkeypatch.setattr(socket, "socketpair", pair)
            with pytest.raises(OSError, match="cannot fork a worker process: .*processes=") as caught:
                await server.serve(tell, processes=3)
            assert caught.value.errno == (errno.EAGAIN if what == "fork" else errno.EMFILE)
            assert server.closed and server.statistics()["processes"] == []

    run_here(main)


@anywhere
def test_a_death_is_reported_once_and_then_how_often_a_fork_has_failed(run_it, forks, reports, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "RESTART", 0.001)
    monkeypatch.setattr(flowcoro_net, "LONGEST_RESTART", 0.004)
    monkeypatch.setattr(flowcoro_net, "STEADY", 0.0)

    async def main():
        async with served(processes=1) as (server, _):
            [pid] = serving(server)
            forks.extend([NO_MORE] * 4)
            os.kill(pid, signal.SIGKILL)
            await until(lambda: server.statistics()["restarts"] == 1)
            assert int(await ask(server)) != pid
        messages = [message.partition(": ")[2].partition(": ")[2] or message for message, _ in reports]
        assert [re.search(r"in (\S+) s$", message)[1] for message in messages] == ["0.001", "0.002", "0.004", "0.004", "0.004"]
        assert ["has died" in message for message in messages] == [True, False, False, False, False]
        assert all("tried again" in message for message in messages[1:])
        assert f"worker process {pid} was killed by signal 9" in str(reports[0][1])
        assert all(error.errno == errno.EAGAIN for _, error in reports[1:])
        reports.clear()

    run_it(main)


@pytest.mark.parametrize("count", [1, 2])
def test_a_new_handler_is_that_of_the_next_once_a_process_serves_with_it(forks, reports, count, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "RESTART", 0.001)

    async def main():
        async with served(listen={"reuse_port": True}, processes=count, reload=lambda: tell_more) as (server, _):
            before = serving(server)
            for plan in [NO_MORE], [lambda pid: pid or os._exit(3)]:        # it cannot be forked, or does not come to serve
                forks.extend(plan)
                server.reload()
                await until(lambda: reports)
                assert "reloading failed" in reports.pop()[0] and serving(server) == before
            os.kill(min(before), signal.SIGKILL)
            await until(lambda: serving(server) - before)
            assert await ask(server, b"x") == b"x"          # after the failed one: what the old ones did
            reports.clear()
            if count == 2:
                before = serving(server)
                forks.extend([None, NO_MORE])       # the second fails: the first stays, and those to come are like it
                server.reload()
                await until(lambda: reports)
                [old] = serving(server) & before
                reports.clear()
                os.kill(old, signal.SIGKILL)
                await until(lambda: replaced(server, before))
                assert {await ask(server, b"x") for _ in range(20)} == {b"more"}
                reports.clear()
            before = serving(server)
            server.reload()
            await until(lambda: replaced(server, before))
            assert await ask(server, b"x") == b"more"

    run_here(main)


def test_a_process_that_does_not_begin_to_serve_is_killed_and_told(forks, reports, monkeypatch):
    def hang(pid):
        if not pid:
            time.sleep(PATIENCE)
            os._exit(0)

    async def told():
        await until(lambda: any("did not serve within" in str(error) for _, error in reports))
        monkeypatch.setattr(flowcoro_net, "START_TIMEOUT", PATIENCE)
        reports.clear()

    async def main():
        async with served(processes=1) as (server, _):
            before = serving(server)
            forks.append(hang)
            monkeypatch.setattr(flowcoro_net, "START_TIMEOUT", 0.05)
            server.reload()
            await told()
            assert serving(server) == before and await ask(server)
            forks.append(hang)                  # who is to replace one that has died
            monkeypatch.setattr(flowcoro_net, "START_TIMEOUT", 0.05)
            os.kill(before.pop(), signal.SIGKILL)
            await told()
            await until(lambda: serving(server))
            assert await ask(server)

    run_here(main)


def test_one_that_serves_is_not_killed_because_its_supervisor_was_stopped_meanwhile(reports, monkeypatch):
    async def main():
        async with served(processes=1) as (server, _), flowcoro.TaskGroup() as group:
            before = serving(server)
            monkeypatch.setattr(flowcoro_net, "START_TIMEOUT", 0.05)
            real = flowcoro_net._Supervisor.start

            def start(self, *args):
                async def hold():
                    await flowcoro.checkpoint()
                    time.sleep(0.5)             # and when it goes on, the time is up, and the word is there

                group.spawn(hold())
                return real(self, *args)

            monkeypatch.setattr(flowcoro_net._Supervisor, "start", start)
            server.reload()
            await until(lambda: replaced(server, before) or reports)
            assert reports == [] and await ask(server)

    run_here(main)


def test_an_error_that_strikes_after_the_fork_leaves_no_process(reports, monkeypatch):
    async def main():
        async with served(processes=1) as (server, _):
            before = serving(server)

            class Strikes:
                def spawn(self, coro, **options):
                    coro.close()
                    raise MemoryError

            with monkeypatch.context() as patch:
                patch.setattr(server._supervisor, "watchers", Strikes())
                server.reload()
                await until(lambda: reports)
            assert list(server.statistics()["processes"]) == list(before) and await ask(server)
            with pytest.raises(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
                raise ChildProcessError         # of the one that serves nothing is to be had

    run_here(main)


def test_a_process_that_cannot_serve_is_not_taken_for_one_that_does(forks, reports):
    def break_it(pid):
        if not pid:
            def refuse(self):
                raise RuntimeError("cannot serve")

            flowcoro_net.TcpServer._begin_serving = refuse
            sys.excepthook = lambda *error: None

    async def main():
        async with served(processes=2) as (server, _):
            before = serving(server)
            forks.append(break_it)
            server.reload()
            await until(lambda: reports)
            assert "before it served" in str(reports.pop()[1])
            assert serving(server) == before and await ask(server)

    run_here(main)


def test_reload_may_only_give_a_handler(reports):
    async def main():
        async with served(processes=1, reload=lambda: "handler") as (server, _):
            before = serving(server)
            server.reload()
            await until(lambda: reports)
            assert "reload= returned 'handler': give an async function" in str(reports.pop()[1])
            assert serving(server) == before and await ask(server, b"x") == b"x"

    run_here(main)


def test_a_systemexit_of_reload_leaves_as_itself_and_nothing_behind():
    def reload():
        raise SystemExit(7)

    async def main():
        async with served(processes=2, reload=reload) as (server, task):
            server.reload()
            await task

    with pytest.raises(SystemExit) as caught:
        run_here(main)
    assert caught.value.code == 7
    no_children()


def test_many_requests_to_reload_replace_all_and_lose_nothing():
    async def main():
        async with served(listen={"reuse_port": True}, processes=2) as (server, _):
            before = serving(server)
            for number in range(60):
                os.kill(os.getpid(), signal.SIGHUP)
                if number % 10 == 0:
                    assert await ask(server, b"x") == b"x"
            await until(lambda: replaced(server, before))
            assert server.statistics()["restarts"] == 0

    handler = signal.getsignal(signal.SIGHUP)
    run_here(main)
    assert signal.getsignal(signal.SIGHUP) == handler == signal.SIG_DFL


def test_what_else_handles_hangups_goes_on_to_do_so():
    heard = []

    async def main():
        async with served(processes=1) as (server, _):
            before = serving(server)
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: heard)
            assert await ask(server) and serving(server) == before

    mine = signal.signal(signal.SIGHUP, lambda *args: heard.append(args))
    try:
        run_here(main)
        assert len(heard) == 1
    finally:
        signal.signal(signal.SIGHUP, mine)


def test_sigterm_while_the_first_ones_are_forked_leaves_none(forks):
    forks.append(lambda pid: pid and os.kill(os.getpid(), signal.SIGTERM))

    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server:
            await server.serve(tell, processes=3)
            assert server.closed and server.statistics()["processes"] == [] and not forks

    run_here(main)


def test_a_signal_that_comes_right_after_the_fork_meets_the_handlers_of_the_worker(forks, reports):
    def interrupted(pid):
        if not pid:
            os.kill(os.getpid(), signal.SIGINT)

    def terminated(pid):
        if not pid:
            os.kill(os.getpid(), signal.SIGTERM)

    async def main():
        forks.append(interrupted)
        async with served(processes=1) as (server, _):
            [pid] = serving(server)
            assert int(await ask(server)) == pid
            forks.append(terminated)
            server.reload()
            await until(lambda: reports)
            assert "ended with exit status 0" in str(reports.pop()[1])      # as when asked later, and perhaps it has served
            await until(lambda: serving(server))
            assert int(await ask(server)) in serving(server)

    run_here(main)


@pytest.mark.parametrize("reaps", [True, False], ids=["handler", "ignored"])
def test_someone_else_who_reaps_all_children_hides_no_death(reports, reaps, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "RESTART", 0.001)

    def reap(*args):
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    async def main():
        async with served(processes=2) as (server, _):
            before = serving(server)
            os.kill(min(before), signal.SIGKILL)
            await until(lambda: serving(server) - before)
            assert "something else in this program has fetched its exit status" in str(reports.pop()[1])
            assert int(await ask(server)) in serving(server)

    before = signal.signal(signal.SIGCHLD, reap if reaps else signal.SIG_IGN)
    try:
        run_here(main)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_worker_in_which_a_handler_closes_the_server_ends_alone(reports, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "RESTART", 0.001)

    async def main():
        async def handler(sock):
            if await sock.read_until() == b"close\n":
                server.close()
                assert server.closed
            told = server.statistics()
            await sock.write(b"%d %d\n" % (told["connections"], "processes" in told))

        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(handler, processes=1))
            await until(lambda: serving(server))
            before = serving(server)
            assert await ask(server, b"x") == b"1 0" and await ask(server, b"close") == b"1 0"
            await until(lambda: serving(server) - before)
            assert str(reports.pop()[1]).endswith("ended with exit status 0")
            assert await ask(server, b"x") == b"1 0" and not server.closed
            server.close()

    run_here(main)


def test_nobody_else_accepts_what_is_for_the_worker_processes():
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            earlier = group.spawn(server.accept())
            await wait_all_tasks_parked()
            with pytest.raises(flowcoro.BusyError, match="is in accept"):
                await server.serve(tell, processes=1)
            earlier.cancel()
            await wait_all_tasks_parked()
            group.spawn(server.serve(tell, processes=1))
            await wait_all_tasks_parked()
            with pytest.raises(flowcoro.BusyError, match="is being served already"):
                await server.accept()
            assert await ask(server)
            server.close()
            with pytest.raises(flowcoro.ClosedError):
                await server.accept()

    run_here(main)


@pytest.mark.parametrize("options", [{}, {"processes": 2}], ids=["one", "several"])
def test_a_worker_holds_nothing_of_other_servers(options):
    async def main():
        async with await TcpServer.listen("127.0.0.1", 0, reuse_port=bool(options)) as other, flowcoro.TaskGroup() as group:
            serving_other = group.spawn(other.serve(tell_more, **options))
            with socket.socket() as client:
                client.settimeout(PATIENCE)
                await flowcoro.to_thread(client.connect, other.local)
                await until(lambda: other.statistics()["connections"] == 1)
                async with served(processes=1) as (server, _):
                    client.send(b"x\n")
                    assert await flowcoro.to_thread(client.recv, 100) == b"more\n"
                    assert await flowcoro.to_thread(client.recv, 100) == b""        # closed there, and open nowhere
                    other.close()
                    await serving_other
                    for _ in range(10):         # those who are let in by one of two queues
                        with pytest.raises(flowcoro_net.BrokenError):
                            await Socket.connect(*other.local)
                    assert await ask(server, b"x") == b"x"

    run_here(main)


def test_the_file_of_a_unix_server_stays_while_workers_come_and_go(tmp_path, reports, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "RESTART", 0.001)
    path = str(tmp_path / "socket")

    async def main():
        async with await UnixServer.listen(path) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve(tell, processes=1))
            await until(lambda: serving(server))
            before = serving(server)
            os.kill(min(before), signal.SIGTERM)
            await until(lambda: serving(server) - before)
            async with await Socket.connect_unix(path) as sock:
                await sock.write(b"pid\n")
                assert int(await sock.read_until()) in serving(server)
            server.close()
        assert not os.path.exists(path)

    run_here(main)
    reports.clear()


def test_a_pause_of_a_worker_is_counted_at_once(monkeypatch):
    supervisor, take = os.getpid(), flowcoro_net._Listener.take

    def exhausted(self):
        if os.getpid() == supervisor:
            return take(self)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(flowcoro_net._Listener, "take", exhausted)

    async def main():
        async with served(processes=1) as (server, _), await Socket.connect(*server.local):
            await until(lambda: server.statistics()["pauses"] == 1)

    run_here(main)


def test_signals_of_a_worker_reach_no_other_loop_of_the_program(reports, monkeypatch):
    monkeypatch.setattr(flowcoro_net, "RESTART", 0.001)
    ear, mouth = socket.socketpair()            # of a loop in the main thread, such as asyncio's
    for sock in ear, mouth:
        sock.setblocking(False)

    async def main():
        async with served(processes=1) as (server, _):
            [pid] = serving(server)
            os.kill(pid, signal.SIGTERM)
            await until(lambda: serving(server) - {pid})
            assert str(reports.pop()[1]).endswith("ended with exit status 0")

    before = signal.set_wakeup_fd(mouth.fileno())
    try:
        run_in_thread(main)
        with pytest.raises(BlockingIOError):
            ear.recv(100)
    finally:
        signal.set_wakeup_fd(before)
        ear.close()
        mouth.close()


def test_workers_work_that_were_forked_while_eight_threads_were_busy():
    stop, log = threading.Event(), logging.getLogger("busy")
    log.addHandler(logging.StreamHandler(io.StringIO()))
    log.propagate = False

    def take_locks():
        """All that Python, the C library and the kernel give new ones of in the child."""
        log.warning("this is logged")
        importlib.import_module("json")
        print(end=".", flush=True)
        print(end=".", file=sys.stderr, flush=True)
        bytearray(10_000)
        assert flowcoro.run(flowcoro.to_thread(sum, [1, 2]), workers=1) == 3

    def busy():
        while not stop.is_set():
            take_locks()
            flowcoro.call_from_thread(int)
            time.sleep(0.002)

    async def handler(sock):
        await sock.read_until()
        await flowcoro.when_all(*(flowcoro.to_thread(take_locks) for _ in range(3)))
        await flowcoro_net.resolve("localhost", 80)
        await sock.write(b"%d\n" % os.getpid())

    async def main():
        async with flowcoro.TaskGroup() as group:
            for _ in range(8):
                group.spawn(flowcoro.to_thread(busy))
            try:
                async with served(handler, processes=1) as (server, _):
                    for _ in range(19):
                        before = serving(server)
                        server.reload()
                        await until(lambda: replaced(server, before))
                        assert {int(await ask(server))} == serving(server)
            finally:
                stop.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)           # else who waits for a thread that counts waits for 5 ms
    try:
        run_here(main)
    finally:
        sys.setswitchinterval(interval)
        log.handlers.clear()
