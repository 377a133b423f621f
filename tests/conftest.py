"""What several test files use; and how the whole suite is run by several processes."""

import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import pytest

import flowcoro
from flowcoro_testing import wait_all_tasks_parked

# What a run with several workers changes, as it was before.
MARKED = list(flowcoro._MARKED)
PLAIN = [(function, function.__code__) for function, _ in MARKED]

# FLOWCORO_GUARD=1: all tests as after such a run.
if os.environ.get("FLOWCORO_GUARD"):
    flowcoro._guard_all()


def take_off_the_guard():
    """The kernel's marked functions as they are before the first run with several workers."""
    for function, code in PLAIN:
        function.__code__ = code
        vars(function).pop("__wrapped__", None)     # else it would get one more each time, up to what inspect.unwrap() follows
    flowcoro._MARKED[:] = MARKED


@pytest.fixture(autouse=True)
def one_worker_takes_no_guard():
    """The next test finds the kernel as it is before the first run with several workers."""
    yield
    if flowcoro._several and not os.environ.get("FLOWCORO_GUARD"):
        take_off_the_guard()
        for function in flowcoro._MARKED_BY_OTHERS:
            if flowcoro._GuardPlace in function.__code__.co_consts:
                before = function.__wrapped__
                function.__code__, function.__dict__ = before.__code__, dict(vars(before))
        flowcoro._several = False


@pytest.fixture(autouse=True, scope="module")
def garbage_is_sought_in_what_is_new():
    """Thousands of tests look for garbage, or for a deadlock: spare each of them what pytest itself has gathered so far."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Garbage that was frozen while something still held it is found at last: pytest looks for it now, and fails."""
    gc.unfreeze()


@pytest.fixture
def reports(monkeypatch):
    """What was reported to sys.unraisablehook: a list of (message, error)."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda got: found.append((got.err_msg or "", got.exc_value)))
    yield found
    gc.collect()


class Guard:
    """The kernel's guard, which tells when a thread has to wait for it: by this a test knows how far another thread came."""

    def __init__(self):
        self.lock, self.told, self.waiting = threading.RLock(), threading.Event(), []

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.waiting.append(None)
            self.told.set()
            self.lock.acquire()
            self.waiting.pop()

    def __exit__(self, *error):
        self.lock.release()

    def let_in(self, begun):
        """Stop here and let another thread begin, until it says that it is through (told.set()) or waits for the guard."""
        self.told.clear()
        begun.set()
        if self.waiting:                            # since before
            self.told.set()
        assert self.told.wait(30), "the other thread has not come"


@pytest.fixture
def guard(monkeypatch):
    guard = Guard()
    monkeypatch.setattr(flowcoro, "_GUARD", guard)
    monkeypatch.setattr(flowcoro._GuardPlace, "guard", guard)
    return guard


@pytest.fixture
def looks_again_soon(monkeypatch):
    """Whoever sleeps while another thread may wake it looks again after a hundredth of the time: such threads end unheard."""
    def sooner(worker, timeout):
        return poll(worker, timeout and timeout / 100)

    poll = flowcoro._Worker._poll
    monkeypatch.setattr(flowcoro._Worker, "_poll", sooner)


async def parked(group, *coros):
    """Spawn the coroutines one after the other, each once the one before waits. Returns the tasks."""
    tasks = []
    for coro in coros:
        tasks.append(group.spawn(coro))
        await wait_all_tasks_parked()
        assert tasks[-1].state == "parked"
    return tasks


# ---- several processes ----------------------------------------------------------------------------------------
#
# All tests take a processor some three minutes, and as long again they wait. So where there are two processors, two further
# pytests help: they go through the files from the last to the first, and from the middle on, and who comes to a file that another
# has begun passes it over. What the helpers report is told here at the end, as if it had happened here. They are no children of
# this process, since tests ask whether there are any, and there is no thread for them here, since a thread might yet wake a task.
# FLOWCORO_PROCESSES: how many in all; 1 goes without.

PROCESSES = int(os.environ.get("FLOWCORO_PROCESSES") or 3)

# Tests from which on it pays; and arguments with which it is clear what the helper has to do: none that name files or a choice.
MANY = int(os.environ.get("FLOWCORO_MANY", 2000))
PATIENCE = 240          # seconds until the helpers are given up, once there is nothing left to do but wait for them
HARMLESS = ("-q", "-v", "-W", "-p", "-r", "--durations", "--color", "--tb", "no:", "error")

START = """
import subprocess, sys
with open(sys.argv[1], "wb") as output:
    subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
"""


class Part:
    """One of the processes: which files it has begun."""

    def __init__(self, folder):
        self.folder, self.files = pathlib.Path(folder), {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if item.path not in self.files:
            try:
                os.close(os.open(self.folder / f"begun-{item.path.name}", os.O_CREAT | os.O_EXCL))
                self.files[item.path] = True
            except FileExistsError:
                self.files[item.path] = False
        return None if self.files[item.path] else True


def is_there(own):
    """Whether the helper whose folder that is is there, or on its way, or has been."""
    try:
        os.kill(int((own / "pid").read_text() or os.getpid()), 0)
    except FileNotFoundError:
        pass
    except ProcessLookupError:
        return (own / "all-reports").exists()
    return True


class Helper(Part):
    """One that helps."""

    def __init__(self, config):
        self.own = pathlib.Path(os.environ.pop("FLOWCORO_HELPER"))
        super().__init__(self.own.parent)
        self.config, self.helped = config, int((self.folder / "pid").read_text())
        self.reports = open(self.own / "reports", "w")
        (self.own / "pid").write_text(str(os.getpid()))

    def pytest_collection_modifyitems(self, items):
        files = {}
        for item in items:
            files.setdefault(item.path, []).append(item)
        paths = list(reversed(files))
        first = len(paths) // 2 * (self.own.name != "1")
        items[:] = [item for path in paths[first:] + paths[:first] for item in files[path]]

    def pytest_runtest_logstart(self):
        os.kill(self.helped, 0)             # ProcessLookupError: nobody waits for this any more

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.reports.write(json.dumps(data) + "\n")

    def pytest_unconfigure(self):
        self.reports.close()
        (self.own / "reports").rename(self.own / "all-reports")


def pytest_configure(config):
    if "FLOWCORO_HELPER" in os.environ:
        config.pluginmanager.register(Helper(config))


def pays(session):
    """Whether this is the whole suite, on a machine with two processors."""
    arguments, config = session.config.invocation_params.args, session.config
    return (len(session.items) >= MANY and len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0]) > 1
            and PROCESSES > 1
            and not any(isinstance(plugin, Helper) for plugin in config.pluginmanager.get_plugins())
            and all(argument.startswith(HARMLESS) for argument in arguments))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtestloop(session):
    if not pays(session):
        yield
        return
    config = session.config
    with tempfile.TemporaryDirectory() as folder:
        part = Part(folder)
        (part.folder / "pid").write_text(str(os.getpid()))
        command = [sys.executable, *(f"-W{option}" for option in sys.warnoptions), "-m", "pytest",
                   *config.invocation_params.args, "-p", "no:cacheprovider"]
        helpers = [part.folder / str(number) for number in range(1, PROCESSES)]
        for own in helpers:
            own.mkdir()
            subprocess.run([sys.executable, "-c", START, own / "output", *command], check=True,
                           env=os.environ | {"FLOWCORO_HELPER": str(own)}, cwd=config.invocation_params.dir)
        config.pluginmanager.register(part)
        yield
        config.pluginmanager.unregister(part)
        begun = time.monotonic()
        for own in helpers:
            tell_of(own, begun + PATIENCE, session)


def tell_of(own, limit, session):
    """Report what a helper has reported."""
    told, config = own / "all-reports", session.config
    while not told.exists() and is_there(own) and time.monotonic() < limit:
        time.sleep(0.02)
    for line in told.read_text().splitlines() if told.exists() else ():
        data = json.loads(line)
        if isinstance(data["longrepr"], list):          # of a test that was skipped: JSON has no tuples
            data["longrepr"] = tuple(data["longrepr"])
        report = config.hook.pytest_report_from_serializable(config=config, data=data)
        config.hook.pytest_runtest_logreport(report=report)
    if not told.exists():
        session.testsfailed += 1
        print(f"\nthe helping process {own.name} has not come to its end:\n{(own / 'output').read_text()}")
