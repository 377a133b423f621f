"""Ctrl-C, SIGTERM, SIGQUIT and asking to stop.

Where the moment of the signal can be chosen it is raised in this process; where a whole program has to end, or a
signal has to come at any moment, a child process runs a script.
"""

import gc
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest

import flowcoro
import flowcoro_testing

ROOT = Path(__file__).resolve().parent.parent

# Seconds after which a child that should have ended counts as hanging: only a failing test takes so long.
PATIENCE = 60.0

HANDLED = [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT]


def interrupt():
    """Ctrl-C, here and now."""
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers_are_left_as_they_were():
    before = [signal.getsignal(number) for number in HANDLED]
    yield
    assert [signal.getsignal(number) for number in HANDLED] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_ctrl_c_at_the_first_call_within_run_leaves_no_coroutine_that_nobody_awaited():
    async def main():
        return None

    calls = 0

    def strike(frame, event, argument):
        nonlocal calls
        calls += event == "call"
        if calls == 2:                  # the first is run() itself, where nothing can be done yet
            sys.setprofile(None)
            raise KeyboardInterrupt

    coro = main()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(KeyboardInterrupt):
            try:
                sys.setprofile(strike)
                flowcoro.run(coro)
            finally:
                sys.setprofile(None)
        del coro
        gc.collect()
    assert told == []


# ---- a child process ---------------------------------------------------------------------------------------

PREFIX = """\
import gc, math, os, random, signal, sys, threading, time
import flowcoro

def say(*words):
    print(*words, flush=True)
"""


class Child:
    """A script in a process of its own; `with`, so that it ends in any case."""

    def __init__(self, script):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PREFIX + textwrap.dedent(script)], cwd=ROOT, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def hears(self, expected):
        line = self.process.stdout.readline().strip()
        assert line == expected, self.process.communicate()[1]

    def send(self, number):
        self.process.send_signal(number)

    def end(self):
        """(exit status, the rest of what it said, stderr)"""
        said, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said.split("\n")[:-1], errors

    def insist(self, number):
        """Send the signal twice, and on, should two have come so close together that the system made one of them."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            self.send(number)
            try:
                self.process.wait(0.1)
            except subprocess.TimeoutExpired:
                pass


# ---- handlers ----------------------------------------------------------------------------------------------

async def handlers():
    return [signal.getsignal(number) for number in HANDLED]


def test_handlers_are_the_kernels_during_the_run_only():
    before = [signal.getsignal(number) for number in HANDLED]
    during = flowcoro.run(handlers())
    assert all(ours != others for ours, others in zip(during, before))
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_handlers_come_back_when_the_run_fails():
    async def fails():
        raise KeyError

    with pytest.raises(KeyError):
        flowcoro.run(fails())       # the fixture looks


@pytest.mark.parametrize("number", HANDLED)
@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None], ids=["ignored", "handled"])
def test_a_handler_that_somebody_has_installed_stays(number, handler):
    before = signal.signal(number, handler)
    try:
        assert flowcoro.run(handlers())[HANDLED.index(number)] == handler
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", HANDLED)
def test_a_handler_that_is_installed_during_the_run_stays_after_it(number):
    def handler(number, frame):
        pass

    async def main():
        signal.signal(number, handler)

    before = signal.getsignal(number)
    try:
        flowcoro.run(main())
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


def test_a_run_in_another_thread_leaves_signals_alone():
    seen = []
    before = [signal.getsignal(number) for number in HANDLED]
    thread = threading.Thread(target=lambda: seen.append(flowcoro.run(handlers())))
    thread.start()
    thread.join()
    assert seen == [before]


def test_the_wakeup_descriptor_of_somebody_else_is_kept_and_ctrl_c_works_without():
    async def main():
        await flowcoro.checkpoint()
        timer = threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        timer.start()
        try:
            await flowcoro.sleep(1000)
        finally:
            timer.join()

    read, write = os.pipe2(os.O_NONBLOCK)
    assert signal.set_wakeup_fd(write) == -1
    try:
        with pytest.raises(KeyboardInterrupt):
            flowcoro.run(main())
        assert signal.set_wakeup_fd(-1) == write
        assert os.read(read, 10) == bytes([signal.SIGINT])
    finally:
        os.close(read)
        os.close(write)


# ---- Ctrl-C ------------------------------------------------------------------------------------------------

def test_ctrl_c_is_raised_by_run_after_all_cleanup_and_not_where_it_came():
    events = []

    async def worker(name):
        try:
            await flowcoro.sleep(math.inf)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(0.0001)
            events.append(f"{name} has cleaned up")

    async def main():
        flowcoro.spawn(worker("a bare task"))
        try:
            async with flowcoro.TaskGroup() as group:
                group.spawn(worker("a child"))
                await flowcoro.sleep(0)
                interrupt()
                events.append("the code that was interrupted goes on")
                await flowcoro.sleep(math.inf)
                events.append("never")
        finally:
            events.append("main leaves")

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main())
    assert events == ["the code that was interrupted goes on", "a child has cleaned up", "main leaves",
                      "a bare task has cleaned up"]


def test_ctrl_c_in_another_task_cancels_main():
    events = []

    async def other():
        interrupt()
        try:
            await flowcoro.sleep(0.001)     # it belongs to the run, and ends when main has
        finally:
            events.append("other")

    async def main():
        flowcoro.spawn(other())
        try:
            await flowcoro.sleep(math.inf)
        finally:
            events.append("main")

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main())
    assert events == ["main", "other"]


def test_ctrl_c_that_main_swallows_is_raised_all_the_same():
    async def main():
        interrupt()
        try:
            await flowcoro.sleep(1)
        except flowcoro.Cancelled:
            return "nothing happened"

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main())


def test_ctrl_c_in_the_very_last_step_is_not_lost():
    async def main():
        interrupt()
        return "done"

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main())


def test_ctrl_c_while_the_rest_is_joined_after_main_is_raised():
    async def slow():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            interrupt()
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(0.001)

    async def main():
        flowcoro.spawn(slow())
        await flowcoro.checkpoint()

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main())


def test_an_error_of_the_cleanup_becomes_the_cause():
    async def main():
        interrupt()
        try:
            await flowcoro.checkpoint()
        finally:
            raise OSError("the cleanup failed")

    with pytest.raises(KeyboardInterrupt) as caught:
        flowcoro.run(main())
    assert isinstance(caught.value.__cause__, OSError)


def test_a_second_ctrl_c_interrupts_code_that_does_not_await():
    reached = []

    async def main():
        interrupt()
        reached.append(1)
        time.sleep(2 * flowcoro.STUCK_SECONDS)
        interrupt()
        reached.append(2)

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main())
    assert reached == [1]


def test_a_second_ctrl_c_does_not_break_off_a_step_that_comes_to_its_end(monkeypatch):
    monkeypatch.setattr(flowcoro, "STUCK_SECONDS", PATIENCE)
    reached = []

    async def main():
        for _ in range(5):
            interrupt()
            reached.append(1)
        try:
            await flowcoro.checkpoint()
        finally:
            reached.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main())
    assert reached == [1, 1, 1, 1, 1, "cleaned up"]


def test_a_second_ctrl_c_goes_through_shields():
    events = []

    async def main():
        try:
            interrupt()
            await flowcoro.checkpoint()
        finally:
            try:
                with flowcoro.CancelScope(shield=True):
                    events.append("shielded")
                    flowcoro.current_kernel()._post_from_signal(interrupt)
                    await flowcoro.sleep(math.inf)
            finally:
                events.append("left")

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main())
    assert events == ["shielded", "left"]


def test_ctrl_c_inside_the_kernel_never_raises_there():
    """Twice, in places where the kernel calls somebody else's code in the middle of its own."""
    events = []

    def twice(where):
        interrupt()
        interrupt()
        events.append(where)

    class Hooks:
        def task_parked(self, task, reason):
            if not events:
                twice("hook")

    class Clock(flowcoro_testing.VirtualClock):
        def idle(self, timeout):
            twice("clock")
            return super().idle(timeout)

    async def with_a_hook():
        flowcoro.add_hooks(Hooks())
        await flowcoro.sleep(1000)

    async def with_a_call():
        await flowcoro.to_thread(flowcoro.call_from_thread, twice, "call")
        await flowcoro.sleep(1000)

    async def with_an_abort_function():
        def park_function(task):
            task.park_reason = "wait for nothing"
            task.abort_function = abort

        def abort(task):
            twice("abort")
            return True

        async def parked():
            await flowcoro.park(park_function)

        task = flowcoro.spawn(parked())
        await flowcoro.checkpoint()
        task.cancel()
        await flowcoro.sleep(1000)

    async def with_a_clock():
        await flowcoro.sleep(1000)

    for main, clock in [(with_a_hook, None), (with_a_call, None), (with_an_abort_function, None),
                        (with_a_clock, Clock())]:
        with pytest.raises(KeyboardInterrupt):
            flowcoro.run(main(), clock=clock)
    assert events == ["hook", "call", "abort", "clock"]


def test_a_run_after_ctrl_c_knows_nothing_of_it():
    async def main():
        interrupt()
        await flowcoro.sleep(1)

    async def another():
        await flowcoro.sleep(0.001)
        return "done"

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            flowcoro.run(main())
        assert flowcoro.run(another()) == "done"


def test_a_sleeping_program_ends_on_ctrl_c_as_any_other_does():
    with Child("""
        async def main():
            try:
                say("ready")
                await flowcoro.sleep(math.inf)
            finally:
                await flowcoro.sleep(0.001) if False else say("cleaned up")

        flowcoro.run(main())
    """) as child:
        child.hears("ready")
        child.send(signal.SIGINT)
        status, said, errors = child.end()
    assert said == ["cleaned up"]
    assert status == -signal.SIGINT, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_two_ctrl_c_end_a_program_that_never_awaits():
    with Child("""
        async def main():
            say("ready")
            while True:
                pass

        flowcoro.run(main())
    """) as child:
        child.hears("ready")
        child.insist(signal.SIGINT)
        status, said, errors = child.end()
    assert status == -signal.SIGINT, errors


def test_two_ctrl_c_end_a_program_whose_thread_never_comes_back():
    with Child("""
        async def main():
            def hang():
                say("ready")
                time.sleep(1000)

            try:
                await flowcoro.to_thread(hang)
            finally:
                say("cleaned up")

        flowcoro.run(main())
    """) as child:
        child.hears("ready")
        child.insist(signal.SIGINT)
        status, said, errors = child.end()
    assert said == ["cleaned up"]
    assert status == -signal.SIGINT, errors


def test_two_ctrl_c_end_a_program_whose_cleanup_hangs():
    with Child("""
        async def forever():
            with flowcoro.CancelScope(shield=True):
                say("shielded")
                await flowcoro.sleep(math.inf)         # no deadlock, however late the second one comes

        async def main():
            async with flowcoro.TaskGroup() as group:
                try:
                    say("ready")
                    await flowcoro.sleep(math.inf)
                finally:
                    group.spawn(forever())

        flowcoro.run(main())
    """) as child:
        child.hears("ready")
        child.send(signal.SIGINT)
        child.hears("shielded")
        child.insist(signal.SIGINT)
        status, said, errors = child.end()
    assert status == -signal.SIGINT, errors


def test_ctrl_c_as_run_begins_or_ends_breaks_nothing():
    """KeyboardInterrupt may come out of run() at any time, but the next run() must not find the last one half taken down."""
    with Child("""
        real, seen = signal.signal, []

        def raising(number, handler):
            result = real(number, handler)
            if number in (signal.SIGINT, signal.SIGTERM):
                seen.append(handler)
                signal.raise_signal(signal.SIGINT)
            return result

        async def nothing():
            await flowcoro.checkpoint()
            return "done"

        before = len(os.listdir("/dev/fd"))
        signal.signal = raising
        for _ in range(3):
            coroutine = nothing()
            try:
                flowcoro.run(coroutine)
            except KeyboardInterrupt:
                say("interrupted")
            coroutine.close()
        signal.signal = real
        assert len(seen) >= 6, seen
        real(signal.SIGINT, signal.default_int_handler)
        real(signal.SIGTERM, signal.SIG_DFL)
        gc.collect()
        say(len(os.listdir("/dev/fd")) - before, "descriptors leaked")
        say(flowcoro.run(nothing()))
    """) as child:
        status, said, errors = child.end()
    assert (status, said) == (0, ["interrupted"] * 3 + ["0 descriptors leaked", "done"]), errors


SENDER = """
def start_sender(plan):
    '''A process that answers each byte with signals to this one as `plan` says, then with a byte.'''
    heard, hear = os.pipe()
    back, told = os.pipe()
    target = os.getpid()
    if os.fork() == 0:
        os.close(hear)
        luck = random.Random(SEED)
        while os.read(heard, 1):
            for seconds in plan(luck):
                end = time.perf_counter() + seconds
                while time.perf_counter() < end:
                    pass
                try:
                    os.kill(target, SIGNAL)
                except ProcessLookupError:
                    os._exit(0)
            os.write(told, b"x")
        os._exit(0)
    os.close(heard)
    owed = []

    def ask():
        owed.append(True)
        os.write(hear, b"x")

    def settle():
        '''Wait until the signals of this round have all come, and let the last of them raise here.

        One that comes just before it begins interrupts it: who expects that calls it again, which is harmless.'''
        blocked = False
        while not blocked:
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})
                blocked = True
            except KeyboardInterrupt:
                pass
        while owed:
            del owed[:len(os.read(back, len(owed)))]        # not to be interrupted when it has read
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})
        except KeyboardInterrupt:
            pass

    return ask, settle
"""

TRAFFIC = """
class Traffic:
    '''Tasks that hand things to and fro through everything there is, until they are cancelled.'''

    def __init__(self):
        self.entered = self.left = 0
        self.lock = flowcoro.Lock()
        self.semaphore = flowcoro.Semaphore(2)
        self.channel, self.narrow = flowcoro.Channel(3), flowcoro.Channel()

    async def locks(self):
        while True:
            async with self.lock:
                await flowcoro.checkpoint()
            async with self.semaphore:
                await flowcoro.sleep(0)

    async def send(self):
        while True:
            await self.channel.send(1)
            await flowcoro.select(self.narrow, (self.channel, 2))

    async def receive(self):
        while True:
            await flowcoro.select(self.channel, (self.narrow, 3))
            with flowcoro.move_on_after(0.0001):
                await self.channel.receive()

    async def spawn(self):
        async def child():
            await flowcoro.checkpoint()

        while True:
            async with flowcoro.TaskGroup() as group:
                for _ in range(3):
                    group.spawn(child())
            await flowcoro.when_any(child(), flowcoro.sleep(1))

    async def io(self):
        read, write = os.pipe()
        try:
            while True:
                os.write(write, b"x")
                await flowcoro.wait_readable(read)
                os.read(read, 1)
                await flowcoro.sleep(0.0001)
        finally:
            flowcoro.notify_closing(read)
            os.close(read)
            os.close(write)

    async def counted(self, work):
        self.entered += 1
        try:
            await work()
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(0)
                async with self.lock:
                    await flowcoro.checkpoint()
            self.left += 1

    async def run(self):
        async with flowcoro.TaskGroup() as group:
            for work in (self.locks, self.locks, self.send, self.receive, self.spawn, self.io):
                group.spawn(self.counted(work))

    def assert_cleaned_up(self):
        assert self.left == self.entered == 6, (self.entered, self.left)
        assert not self.lock.locked()
        assert self.semaphore.value == 2

async def sane():
    '''A run after all that works.'''
    async with flowcoro.TaskGroup() as group:
        channel = flowcoro.Channel()
        group.spawn(channel.send(1))
        assert await channel.receive() == 1
    with flowcoro.move_on_after(0.0001) as scope:
        await flowcoro.sleep(1000)
    assert scope.cancelled_caught
    return "sane"
"""


def stress(script, number=signal.SIGINT, seed=None):
    seed = int.from_bytes(os.urandom(3), "big") if seed is None else seed
    with Child(f"SEED, SIGNAL = {seed}, {int(number)}\n" + SENDER + TRAFFIC + textwrap.dedent(script)) as child:
        try:
            status, said, errors = child.end()
        except subprocess.TimeoutExpired:
            pytest.fail(f"it hangs; seed {seed}")
        assert (status, said, errors) == (0, ["done"], ""), f"seed {seed}"


def test_ctrl_c_at_any_moment_of_heavy_traffic_ends_in_keyboard_interrupt_and_cleanup():
    stress("""
        ask, settle = start_sender(lambda luck: [luck.random() * 0.004])

        async def main():
            ask()
            await traffic.run()

        before = set(os.listdir("/dev/fd"))
        for _ in range(150):
            traffic = Traffic()
            try:
                flowcoro.run(main())
                sys.exit("it ended without KeyboardInterrupt")
            except KeyboardInterrupt:
                pass
            settle()
            traffic.assert_cleaned_up()
            assert set(os.listdir("/dev/fd")) == before
        assert flowcoro.run(sane()) == "sane"
        say("done")
    """)


def test_volleys_of_ctrl_c_never_hang_and_never_harm_the_next_run():
    stress("""
        ask, settle = start_sender(lambda luck: [
            luck.random() * 0.002, *(luck.choice([0, 1e-6, 1e-5, 1e-4]) * luck.random() for _ in range(luck.randrange(1, 6)))])

        async def sleeper():
            ask()
            await flowcoro.sleep(math.inf)

        async def busy():
            ask()
            await traffic.run()

        async def shielded():
            with flowcoro.CancelScope(shield=True):
                ask()
                await flowcoro.sleep(0.005)             # not for ever: the system may make one of two signals
            await flowcoro.sleep(math.inf)

        def run_and_settle(main, signals_left=8):
            '''Each level takes one that comes after the run: there are six at most in a volley.'''
            try:
                if signals_left:
                    run_and_settle(main, signals_left - 1)
                else:
                    flowcoro.run(main())
                    sys.exit("it ended without KeyboardInterrupt")
            except KeyboardInterrupt:
                pass
            settle()

        before = set(os.listdir("/dev/fd"))
        for turn in range(150):
            traffic = Traffic()
            run_and_settle((sleeper, busy, shielded)[turn % 3])
            gc.collect()
            assert flowcoro.run(sane()) == "sane"
            assert len(os.listdir("/dev/fd")) == len(before), turn
        say("done")
    """)


def test_ctrl_c_around_the_beginning_and_the_end_of_runs_harms_none():
    stress("""
        import warnings
        warnings.simplefilter("ignore")                 # a coroutine may be interrupted before run() has it

        ask, settle = start_sender(lambda luck: [luck.random() * 0.001])

        async def short(seconds):
            await flowcoro.sleep(seconds)
            return "ended"

        before = len(os.listdir("/dev/fd"))
        outcomes = []
        for turn in range(300):
            try:
                try:
                    ask()
                    outcomes.append(flowcoro.run(short(random.random() * 0.0005)))
                finally:
                    settle()
            except KeyboardInterrupt:
                outcomes.append("interrupted")
            settle()
            gc.collect()
            assert flowcoro.run(sane()) == "sane"
            assert len(os.listdir("/dev/fd")) == before, turn
        assert outcomes.count("interrupted") > 10
        say("done")
    """)


# ---- request_stop ------------------------------------------------------------------------------------------

def test_stop_requested_waits_for_request_stop_and_then_returns_at_once():
    events = []

    async def service(name):
        await flowcoro.stop_requested()
        events.append(name)
        await flowcoro.stop_requested()

    async def main():
        async with flowcoro.TaskGroup() as group:
            for name in "abc":
                group.spawn(service(name))
            await flowcoro.sleep(5)
            assert events == []
            flowcoro.request_stop()
            flowcoro.request_stop()         # twice is once
        return flowcoro.now()

    clock = flowcoro_testing.VirtualClock()
    began = clock.now()
    assert flowcoro.run(main(), clock=clock) == began + 5
    assert events == ["a", "b", "c"]


@pytest.mark.parametrize("grace", [0, 0.5, 10.0, 3600])
def test_who_does_not_end_in_its_grace_is_cancelled(grace):
    clock = flowcoro_testing.VirtualClock()
    ended = []

    async def main():
        flowcoro.request_stop()
        try:
            await flowcoro.sleep(math.inf)
        finally:
            ended.append(flowcoro.now())

    began = clock.now()
    with pytest.raises(flowcoro.TaskCancelled):
        flowcoro.run(main(), clock=clock, grace=grace)
    assert ended == [began + grace]


def test_who_ends_in_its_grace_is_not_cancelled_and_run_does_not_wait_for_the_rest_of_it():
    clock = flowcoro_testing.VirtualClock()

    async def main():
        flowcoro.request_stop()
        await flowcoro.stop_requested()
        await flowcoro.sleep(9)
        return "in time"

    began = clock.now()
    assert flowcoro.run(main(), clock=clock, grace=10) == "in time"
    assert clock.now() == began + 9


def test_an_infinite_grace_never_cancels():
    async def main():
        flowcoro.request_stop()
        await flowcoro.sleep(1e6)
        return "in its own time"

    assert flowcoro.run(main(), clock=flowcoro_testing.VirtualClock(), grace=math.inf) == "in its own time"


@pytest.mark.parametrize("grace", [-1, math.nan])
def test_a_grace_that_is_no_time_is_refused(grace):
    async def main():
        pass

    with pytest.raises(ValueError, match="grace"):
        flowcoro.run(main(), grace=grace)


def test_request_stop_reaches_the_kernel_from_another_thread():
    async def main():
        stopped = flowcoro.spawn(flowcoro.stop_requested())
        await flowcoro.to_thread(flowcoro.call_from_thread, flowcoro.request_stop)
        await stopped

    flowcoro.run(main())
    with pytest.raises(RuntimeError, match="no FlowCoro kernel"):
        flowcoro.request_stop()


def test_a_cancelled_wait_for_the_stop_leaves_nothing():
    async def main():
        with flowcoro.move_on_after(1) as scope:
            await flowcoro.stop_requested()
        assert scope.cancelled_caught
        flowcoro.request_stop()
        await flowcoro.stop_requested()

    flowcoro.run(main(), clock=flowcoro_testing.VirtualClock())


# ---- SIGTERM -----------------------------------------------------------------------------------------------

SERVICE = """
async def request(number):
    await flowcoro.sleep(0.02)
    say("request", number, "is answered")

async def serve():
    async with flowcoro.TaskGroup() as requests:
        for number in range(3):
            requests.spawn(request(number))
        say("ready")
        await flowcoro.stop_requested()
        say("no more requests")
"""


def test_sigterm_ends_a_service_that_listens_cleanly():
    with Child(SERVICE + """
async def main():
    await serve()
    return "bye"

say(flowcoro.run(main()))
""") as child:
        child.hears("ready")
        child.send(signal.SIGTERM)
        status, said, errors = child.end()
    assert (status, errors) == (0, "")
    assert sorted(said) == sorted(["no more requests", "request 0 is answered", "request 1 is answered",
                                   "request 2 is answered", "bye"])


def test_sigterm_cancels_a_service_that_takes_too_long():
    with Child("""
        async def main():
            try:
                say("ready")
                await flowcoro.stop_requested()
                say("asked")
                await flowcoro.sleep(math.inf)
            finally:
                with flowcoro.CancelScope(shield=True):
                    await flowcoro.sleep(0.001)
                say("cleaned up")

        flowcoro.run(main(), grace=0.05)
    """) as child:
        child.hears("ready")
        child.send(signal.SIGTERM)
        status, said, errors = child.end()
    assert (status, said, errors) == (143, ["asked", "cleaned up"], "")


def test_sigterm_cancels_at_once_where_nobody_listens():
    with Child("""
        async def child():
            try:
                await flowcoro.sleep(math.inf)
            finally:
                say("child")

        async def main():
            async with flowcoro.TaskGroup() as group:
                group.spawn(child())
                await flowcoro.checkpoint()
                say("ready")

        try:
            flowcoro.run(main(), grace=1000)
        except SystemExit as error:
            say("code", error.code)
            raise
    """) as child:
        child.hears("ready")
        child.send(signal.SIGTERM)
        status, said, errors = child.end()
    assert (status, said, errors) == (143, ["child", "code 143"], "")


def test_a_second_sigterm_does_not_wait_for_the_grace_nor_for_shields():
    with Child("""
        async def main():
            try:
                with flowcoro.CancelScope(shield=True):
                    say("ready")
                    await flowcoro.stop_requested()
                    say("asked")
                    await flowcoro.sleep(math.inf)
            finally:
                say("cleaned up")

        flowcoro.run(main(), grace=math.inf)
    """) as child:
        child.hears("ready")
        child.send(signal.SIGTERM)
        child.hears("asked")
        child.send(signal.SIGTERM)
        status, said, errors = child.end()
    assert (status, said, errors) == (143, ["cleaned up"], "")


def test_sigterm_reaches_a_program_whose_tasks_never_wait():
    with Child("""
        async def spin():
            while True:
                await flowcoro.checkpoint()

        async def main():
            for _ in range(3):
                flowcoro.spawn(spin())
            say("ready")
            await spin()

        flowcoro.run(main())
    """) as child:
        child.hears("ready")
        child.send(signal.SIGTERM)
        status, said, errors = child.end()
    assert (status, errors) == (143, "")


def test_after_sigterm_the_error_of_main_is_still_raised():
    async def main():
        signal.raise_signal(signal.SIGTERM)
        try:
            await flowcoro.checkpoint()
        finally:
            raise OSError("the cleanup failed")

    with pytest.raises(OSError, match="cleanup"):
        flowcoro.run(main())


def test_sigterm_then_ctrl_c_is_a_keyboard_interrupt():
    async def main():
        waiting = flowcoro.spawn(flowcoro.stop_requested())
        await flowcoro.checkpoint()
        signal.raise_signal(signal.SIGTERM)
        await waiting
        interrupt()
        await flowcoro.sleep(1000)

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main(), grace=1000)


def test_sigterm_at_any_moment_of_heavy_traffic_ends_with_cleanup():
    stress("""
        ask, settle = start_sender(lambda luck: [luck.random() * 0.004])

        async def main(listens):
            ask()
            if not listens:
                await traffic.run()
            async with flowcoro.TaskGroup() as group:
                group.spawn(traffic.run())
                await flowcoro.stop_requested()
                group.cancel()

        for turn in range(60):
            traffic = Traffic()
            try:
                flowcoro.run(main(turn % 2), grace=30)
                assert turn % 2
            except SystemExit as error:
                assert error.code == 143
            settle()
            traffic.assert_cleaned_up()
        say("done")
    """, signal.SIGTERM)


# ---- SIGQUIT -----------------------------------------------------------------------------------------------

def test_sigquit_prints_the_tree_of_tasks_and_the_program_goes_on():
    with Child("""
        async def wait_for_the_lock(lock):
            async with lock:
                pass

        async def main():
            lock = flowcoro.Lock()
            async with lock:
                async with flowcoro.TaskGroup() as group:
                    group.spawn(wait_for_the_lock(lock), name="the waiter")
                    await flowcoro.sleep(0.001)
                    say("ready")
                    while not asked:
                        await flowcoro.sleep(0.001)
                    group.cancel()
            say("ended by itself")

        asked = []
        signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(True))
        flowcoro.run(main())
    """) as child:
        child.hears("ready")
        child.send(signal.SIGQUIT)
        child.send(signal.SIGUSR1)
        status, said, errors = child.end()
    assert (status, said) == (0, ["ended by itself"])
    assert errors.startswith("main:")
    assert "the waiter: parked: acquire a Lock (for main)" in errors
    assert "wait_for_the_lock" in errors


def test_sigquit_with_a_closed_or_full_stderr_is_harmless():
    with Child("""
        async def main():
            os.close(2)
            signal.raise_signal(signal.SIGQUIT)
            await flowcoro.sleep(0.001)
            os.dup2(1, 2)
            read, write = os.pipe2(os.O_NONBLOCK)
            os.dup2(write, 2)
            try:
                while True:
                    os.write(2, bytes(4096))
            except BlockingIOError:
                pass
            signal.raise_signal(signal.SIGQUIT)
            os.read(read, 4096)                         # room for a part of the dump
            tasks = [flowcoro.spawn(flowcoro.sleep(1), name="x" * 100) for _ in range(200)]
            await flowcoro.checkpoint()
            signal.raise_signal(signal.SIGQUIT)
            await flowcoro.sleep(0.001)
            os.dup2(1, 2)
            say("goes on")

        flowcoro.run(main())
    """) as child:
        status, said, errors = child.end()
    assert (status, said) == (0, ["goes on"])


def test_a_dump_of_thousands_of_tasks_arrives_whole():
    with Child("""
        async def main():
            tasks = [flowcoro.spawn(flowcoro.sleep(1000), name=f"task number {number}") for number in range(3000)]
            await flowcoro.checkpoint()
            signal.raise_signal(signal.SIGQUIT)

        flowcoro.run(main())
    """) as child:
        status, said, errors = child.end()
    assert status == 0
    assert errors.count("task number ") == 3000
    assert "task number 2999: parked: sleep" in errors


def test_sigquit_at_any_moment_disturbs_nothing():
    with Child("SEED, SIGNAL = 1, signal.SIGQUIT\n" + SENDER + textwrap.dedent("""
        async def main():
            channel = flowcoro.Channel(2)

            async def send():
                for item in range(60000):
                    await channel.send(item)
                    if item % 300 == 0:
                        ask()
                channel.close()

            async with flowcoro.TaskGroup() as group:
                group.spawn(send())
                result = [item async for item in channel] == list(range(60000))
            settle()                    # one that came after the run would end the process
            return result

        ask, settle = start_sender(lambda luck: [luck.random() * 0.0005])
        say(flowcoro.run(main()))
    """)) as child:
        status, said, errors = child.end()
    assert (status, said) == (0, ["True"])
    assert "main" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_handler_of_another_signal_ends_the_run_with_all_cleanup_done(error):
    log = []

    def handler(number, frame):
        raise error("from the handler")

    def send(worker):
        while not worker.sleeping:
            time.sleep(0.001)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

    async def main():
        threading.Thread(target=send, args=(flowcoro.current_kernel().worker,)).start()
        try:
            await flowcoro.sleep(100)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(0.001)
            log.append("cleaned up")

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(error, match="from the handler"):
            flowcoro.run(main())
    finally:
        signal.signal(signal.SIGALRM, before)
    assert log == ["cleaned up"]


def test_a_selector_that_fails_for_ever_ends_the_run_in_spite_of_shields():
    log, polls = [], []

    def fail(timeout):
        polls.append(timeout)
        raise OSError("the selector is broken")

    async def main():
        worker = flowcoro.current_kernel().worker
        worker.poller.wait = fail
        try:
            await flowcoro.sleep(1000)
        finally:
            with flowcoro.CancelScope(shield=True):
                log.append("cleanup begins")
                while len(polls) < 1000:
                    await flowcoro.sleep(0.0001)
                log.append("the shield holds for ever")

    with pytest.raises(OSError, match="the selector is broken"):
        flowcoro.run(main())
    assert log == ["cleanup begins"]


def test_an_error_of_a_signal_handler_at_any_moment_ends_the_run_and_harms_no_other():
    stress("""
        import warnings
        warnings.simplefilter("ignore")                 # a coroutine may be struck before anybody awaits it

        def strike(number, frame):
            raise OSError("struck")

        async def main():
            signal.setitimer(signal.ITIMER_REAL, 0.0001 + luck.random() * 0.002, 0.001)
            try:
                await traffic.run()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)

        sys.unraisablehook = lambda got: None           # of finalisers, abort functions, whatever was struck
        luck = random.Random(SEED)
        signal.signal(signal.SIGALRM, strike)
        before = set(os.listdir("/dev/fd"))
        for turn in range(150):
            traffic = Traffic()
            try:
                flowcoro.run(main())
                sys.exit("it ended without an error")
            except Exception:                           # the blow, or what it has broken in the middle of an operation
                signal.setitimer(signal.ITIMER_REAL, 0)
            gc.collect()
            left = set(os.listdir("/dev/fd")) - before
            assert len(left) <= 2, left                 # the pipe of Traffic.io(), if that was struck in its finally
            for fd in left:
                os.close(int(fd))
            assert flowcoro.run(sane()) == "sane"
        say("done")
    """)


class Struck(Exception):
    pass


@pytest.mark.parametrize("what, caller", [
    (flowcoro._reschedule, "_interrupt"), (flowcoro._reschedule, "unpark"), (flowcoro._reschedule, "_ring"),
    (flowcoro._reschedule, "_wake_reader"), (flowcoro.ParkingLot._abort, "_interrupt"), (flowcoro.Pollable._abort, "_interrupt"),
    (flowcoro.ParkingLot.unpark, "unpark_all"), (flowcoro._interrupt_inside, "cancel")], ids=lambda what: getattr(
        what, "__qualname__", what))
def test_an_error_that_strikes_where_the_loop_wakes_or_cancels_a_task_ends_the_run_and_loses_none(what, caller):
    """A function that raises as it is called stands for a signal handler that Python calls there."""
    log = []

    def strike(frame, event, argument):
        if event == "call" and frame.f_code is what.__code__ and frame.f_back.f_code.co_name == caller:
            sys.settrace(None)
            raise Struck

    async def late():
        try:
            with flowcoro.move_on_after(0.01):
                await flowcoro.Event().wait()
        finally:
            log.append("late")

    async def reads(near):
        try:
            with flowcoro.move_on_after(0.01):
                await flowcoro.wait_readable(near)
        finally:
            log.append("reads")

    async def joins(task):
        try:
            await task
        finally:
            log.append("joins")

    async def serves(near):
        try:
            await flowcoro.wait_readable(near)
            await flowcoro.Event().wait()
        finally:
            log.append("serves")

    async def writes(far):
        await flowcoro.sleep(0.005)
        os.write(far, b"x")

    async def main():
        sys.settrace(strike)
        async with flowcoro.TaskGroup() as group:
            group.scope.deadline = flowcoro.now() + PATIENCE
            group.spawn(late())
            group.spawn(reads(idle[0]))
            group.spawn(serves(busy[0]))
            group.spawn(joins(group.spawn(flowcoro.sleep(0.005))))
            group.spawn(writes(busy[1]))

    idle, busy = os.pipe(), os.pipe()
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)      # whoever is lost is not saved by a Deadlock
    try:
        with pytest.raises(Struck):
            flowcoro.run(main())
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGALRM, before)
        for fd in idle + busy:
            os.close(fd)
    assert sorted(log) == ["joins", "late", "reads", "serves"]


def strike_once(function, caller, event="call"):
    """Raise Struck, as a signal handler might, when `caller` calls the function, or as that returns."""
    def strike(frame, what, argument):
        if frame.f_code is function.__code__ and frame.f_back.f_code.co_name == caller:
            if what == event:
                sys.settrace(None)
                raise Struck
            return strike

    sys.settrace(strike)


@pytest.fixture
def nobody_sees_a_deadlock():
    """Who is lost is not saved by a Deadlock: the handler might wake somebody."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    yield
    sys.settrace(None)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_that_strikes_at_any_call_in_the_loop_ends_the_run_and_loses_none(workers):
    """One run, and a child, for each call that the loop makes beside the tasks' own steps, and each return from C."""
    with Child("""
        import threading

        class Struck(Exception):
            pass

        def in_a_step(frame):
            while frame is not None and frame.f_code is not flowcoro._Worker.work.__code__:
                if frame.f_code.co_flags & 0x180:                   # a coroutine: the strike would be its own error
                    return True
                frame = frame.f_back
            return frame is None

        def strike(frame, event, argument):
            global calls, place
            if event in ("call", "c_return") and frame.f_code.co_filename == flowcoro.__file__ and not in_a_step(frame):
                calls += 1
                if calls == struck:
                    place = f"{event}, {frame.f_code.co_qualname}:{frame.f_lineno}"
                    sys.setprofile(None)
                    raise Struck

        async def shielded(operation):
            with flowcoro.CancelScope(shield=True):
                await operation()

        async def sends(channel):
            for item in range(3):
                await channel.send(item)
            channel.close()

        async def receives(channel):
            assert [item async for item in channel] in ([], [0], [0, 1], [0, 1, 2])

        async def locks(lock):
            async with lock:
                await flowcoro.sleep(0.0002)

        async def waits_for_a_while():
            with flowcoro.move_on_after(0.0005):
                await flowcoro.Event().wait()

        async def has_children():
            with flowcoro.move_on_after(0.0003):
                async with flowcoro.TaskGroup() as group:
                    group.spawn(flowcoro.sleep(1000))
                    group.spawn(flowcoro.Event().wait())
                    await flowcoro.sleep(1000)

        async def writes(far):
            await flowcoro.sleep(0.0005)
            os.write(far, b"x")

        async def asks():
            await flowcoro.to_thread(flowcoro.call_from_thread, asked.append, 1)

        async def main():
            channel, lock, promise, near, far = flowcoro.Channel(), flowcoro.Lock(), flowcoro.Promise(), *os.pipe()

            async def begins(coro):
                begun.add(coro)
                try:
                    await coro
                finally:
                    begun.remove(coro)

            async def promised():
                await promise

            async with flowcoro.TaskGroup() as group:
                sys.setprofile(strike)
                for coro in (sends(channel), receives(channel), locks(lock), locks(lock), promised(), waits_for_a_while(),
                             flowcoro.wait_readable(near), writes(far), shielded(waits_for_a_while), has_children(),
                             flowcoro.to_thread(promise.set_result, 1), asks()):
                    group.spawn(begins(coro))

        def one_run():
            reports = []
            sys.unraisablehook = lambda got: reports.append(got.err_msg or "")
            signal.signal(signal.SIGALRM, lambda number, frame: hang())     # also: no Deadlock saves who is lost
            signal.alarm(20)
            try:
                flowcoro.run(main(), workers=WORKERS)
            except (Struck, BaseExceptionGroup) as error:
                whole = isinstance(error, Struck) or not error.split(Struck)[1]
            else:
                whole = True                        # it was struck in what nobody waits for
            finally:
                sys.setprofile(None)
            said = (["the error is not the strike's"] * (not whole) + [f"not ended: {len(begun)}"] * bool(begun)
                    + [f"called {len(asked)} times"] * (len(asked) > 1)
                    + [report for report in reports if "closed by force" in report])
            if said:
                say(f"{struck}, {place}: {said}")
            os._exit(0 if place else 9)             # 9: there are no more calls than this

        def hang():
            say(f"{struck}, {place}: it hangs")
            os._exit(1)

        calls, struck, place, begun, asked, children, status = 0, 0, None, set(), [], set(), 0
        while status != 9 or children:
            while len(children) < 4 and status != 9:
                struck += 1
                if not (child := os.fork()):
                    one_run()
                children.add(child)
            child, ended = os.wait()
            children.remove(child)
            status = status if status == 9 else os.waitstatus_to_exitcode(ended)
        say("done" if struck > (200 if WORKERS == 1 else 50) else f"only {struck} calls")
    """.replace("WORKERS", str(workers))) as child:
        assert child.end()[:2] == (0, ["done"])


def test_a_task_that_is_struck_at_its_end_is_ended_again(nobody_sees_a_deadlock, reports):
    async def fails():
        await flowcoro.checkpoint()
        raise KeyError("child")

    async def main():
        async with flowcoro.TaskGroup() as group:
            group.scope.deadline = flowcoro.now() + PATIENCE
            group.spawn(fails())
            strike_once(flowcoro._Failure.__init__, "_finish")

    with pytest.raises(Struck):
        flowcoro.run(main())


def test_a_scope_that_is_struck_as_it_expires_is_cancelled_all_the_same_under_a_shield(nobody_sees_a_deadlock):
    log = []

    async def main():
        with flowcoro.CancelScope(shield=True), flowcoro.move_on_after(0.01):
            strike_once(flowcoro._interrupt_inside, "cancel")
            await flowcoro.Event().wait()
        log.append("after the bounded cleanup")

    with pytest.raises(Struck):
        flowcoro.run(main())
    assert log == ["after the bounded cleanup"]


def test_a_writer_whose_wait_was_struck_as_its_time_was_up_goes_on(nobody_sees_a_deadlock):
    async def main():
        rwlock = flowcoro.RWLock()
        rwlock.read.acquire_nowait()
        async with flowcoro.TaskGroup() as group:
            group.scope.deadline = flowcoro.now() + PATIENCE
            group.spawn(waits(rwlock))
            strike_once(flowcoro._reschedule, "_interrupt")

    async def waits(rwlock):
        with flowcoro.CancelScope(shield=True) as shield, flowcoro.move_on_after(0.01):
            shield.deadline = flowcoro.now() + PATIENCE
            await rwlock.write.acquire()
        left.append(True)

    left = []
    with pytest.raises(Struck):
        flowcoro.run(main())
    assert left


def test_a_task_that_is_struck_on_its_way_to_its_park_does_not_come_back_as_if_it_had_been_woken(nobody_sees_a_deadlock):
    async def main():
        with flowcoro.CancelScope(shield=True):
            strike_once(flowcoro._OneOfSeveral._park_among_others, "work")
            try:
                got.append(await flowcoro.Channel().receive())
            except Struck:
                got.append("struck")

    got = []
    with pytest.raises(Struck):
        flowcoro.run(main(), workers=2)
    assert got == ["struck"]


def test_who_is_woken_by_an_end_that_was_struck_is_woken_once(nobody_sees_a_deadlock, reports):
    async def ends():
        await flowcoro.checkpoint()                     # until the other one waits for this
        strike_once(flowcoro._Worker._finish, "work")

    async def joins(task):
        with flowcoro.CancelScope(shield=True):
            try:
                await task
            except Struck:
                pass
            began = flowcoro.now()
            await flowcoro.sleep(0.05)
            slept.append(flowcoro.now() - began)

    async def main():
        async with flowcoro.TaskGroup() as group:
            group.spawn(joins(group.spawn(ends())))

    slept = []
    with pytest.raises(Struck):
        flowcoro.run(main())
    assert slept[0] >= 0.05 and reports == []


def test_who_is_let_in_as_another_is_told_of_a_struck_cancel_is_woken_once(nobody_sees_a_deadlock, reports):
    async def writes(rwlock):
        with flowcoro.CancelScope(shield=True), flowcoro.move_on_after(0.01):
            await rwlock.write.acquire()

    async def reads(rwlock):
        with flowcoro.CancelScope(shield=True):
            async with rwlock.read:
                began = flowcoro.now()
                await flowcoro.sleep(0.05)
                slept.append(flowcoro.now() - began)

    async def main():
        rwlock = flowcoro.RWLock()
        async with rwlock.read, flowcoro.TaskGroup() as group:
            group.spawn(writes(rwlock))
            group.spawn(reads(rwlock))
            strike_once(flowcoro._interrupt_inside, "cancel")

    slept = []
    with pytest.raises(Struck):
        flowcoro.run(main())
    assert slept[0] >= 0.05 and reports == []


@pytest.mark.parametrize("function, caller", [(flowcoro.ParkingLot.unpark, "_ended"), (flowcoro.as_completed._ended, "commit"),
                                              (flowcoro._reschedule, "unpark")])
def test_who_waits_for_the_next_task_to_end_is_woken_though_the_end_was_struck(function, caller, nobody_sees_a_deadlock):
    async def main():
        with flowcoro.CancelScope(shield=True), flowcoro.move_on_after(PATIENCE):
            async for task in flowcoro.as_completed(flowcoro.sleep(0.01)):
                done.append(task.done())
                return
            raise AssertionError("nothing came")

    async def begin():
        strike_once(function, caller)
        await main()

    done = []
    with pytest.raises(Struck):
        flowcoro.run(begin())
    assert done == [True]


def test_a_call_from_a_thread_that_is_struck_as_it_answers_is_made_once(nobody_sees_a_deadlock, reports):
    calls = []

    async def main():
        strike_once(flowcoro._CallFromThread.answer, "__call__", "return")
        await flowcoro.to_thread(flowcoro.call_from_thread, calls.append, 1)

    with pytest.raises(Struck):
        flowcoro.run(main())
    assert calls == [1] and reports == []


def test_a_task_whose_edge_was_struck_is_not_woken_by_it_later(nobody_sees_a_deadlock, reports):
    slept = []

    async def main():
        strike_once(flowcoro._reschedule, "_wake_reader", "return")
        os.write(far, b"x")
        pollable.readable = False
        try:
            await pollable.wait_readable()
        finally:
            with flowcoro.CancelScope(shield=True):
                began = flowcoro.now()
                await flowcoro.sleep(0.05)
                slept.append(flowcoro.now() - began)

    async def begin():
        nonlocal pollable
        pollable = flowcoro.Pollable(near)
        await main()

    pollable, (near, far) = None, os.pipe()
    try:
        with pytest.raises(Struck):
            flowcoro.run(begin())
    finally:
        os.close(near)
        os.close(far)
    assert slept[0] >= 0.05 and reports == []


def test_a_handler_that_wakes_a_task_and_then_raises_wakes_it_once():
    log = []

    class Hooks:
        def task_rescheduled(self, task):
            log.append(task.name)

    def handler(number, frame):
        event.set()
        raise Struck

    async def waits():
        await event.wait()
        with flowcoro.CancelScope(shield=True):
            began = flowcoro.now()
            await flowcoro.sleep(0.05)
            log.append(flowcoro.now() - began)

    async def main():
        nonlocal event
        event = flowcoro.Event()
        flowcoro.spawn(waits(), name="waits")
        await flowcoro.checkpoint()
        flowcoro.add_hooks(Hooks())
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        await flowcoro.sleep(PATIENCE)

    event, before = None, signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(Struck):
            flowcoro.run(main())
    finally:
        signal.signal(signal.SIGALRM, before)
    assert log[0] == "waits"
    assert min(entry for entry in log if isinstance(entry, float)) >= 0.05


@pytest.mark.parametrize("where", ["call", "hook"])
def test_a_second_ctrl_c_ends_a_call_from_a_thread_and_a_hook_that_do_not_return(where):
    with Child(f"""
        class Hooks:
            def task_spawned(self, task):
                stuck()

        def stuck():
            say("stuck")
            while True:
                time.sleep(0.01)

        async def main():
            if "{where}" == "call":
                await flowcoro.to_thread(flowcoro.call_from_thread, stuck)
            else:
                flowcoro.add_hooks(Hooks())
                flowcoro.spawn(flowcoro.sleep(0))
                await flowcoro.sleep(1000)

        sys.unraisablehook = lambda got: None
        try:
            flowcoro.run(main())
        except KeyboardInterrupt:
            say("interrupted")
            os._exit(0)                                 # before another one comes
    """) as child:
        child.hears("stuck")
        child.insist(signal.SIGINT)
        status, said, errors = child.end()
    assert (status, said, errors) == (0, ["interrupted"], "")


def test_a_clock_that_fails_in_the_loop_ends_the_run_with_cleanup_and_loses_no_task():
    log = []

    class Clock(flowcoro_testing.VirtualClock):
        broken = False

        def idle(self, timeout):
            if self.broken:
                self.broken = False
                raise OSError("no time")
            return super().idle(timeout)

    async def worker(name):
        try:
            await flowcoro.sleep(1000)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(1)
            log.append(name)

    async def main():
        async with flowcoro.TaskGroup() as group:
            for name in "ab":
                group.spawn(worker(name))
            await flowcoro.sleep(1)
            clock.broken = True
            await flowcoro.sleep(1)

    clock = Clock()
    with pytest.raises(OSError, match="no time"):
        flowcoro.run(main(), clock=clock)
    assert log == ["a", "b"]


def test_who_does_not_end_in_spite_of_errors_in_the_loop_is_closed_by_force(reports):
    log = []

    def fail(timeout):
        raise OSError("the selector is broken")

    async def late():
        try:
            await flowcoro.sleep(1000)
        finally:
            log.append("late closed")

    async def main():
        read, write = os.pipe()
        pollable = flowcoro.Pollable(read)              # so that the selector is asked in every round
        flowcoro.current_kernel().worker.poller.wait = fail
        try:
            while True:
                try:
                    await flowcoro.checkpoint()
                except flowcoro.Cancelled:
                    pass
        finally:
            log.append("main closed")
            flowcoro.spawn(late())
            pollable.close()
            os.close(read)
            os.close(write)

    with pytest.raises(OSError, match="the selector is broken"):
        flowcoro.run(main())
    assert log[0] == "main closed"
    assert any("closed by force" in what for what, _ in reports)


# ---- the edges of a run ------------------------------------------------------------------------------------

def test_a_ctrl_c_while_the_signals_are_given_back_leaves_none_behind(monkeypatch):
    getsignal = signal.getsignal
    interrupted = []

    async def main():
        monkeypatch.setattr(signal, "getsignal", interrupting)

    def interrupting(number):
        if number == signal.SIGINT and not interrupted:
            interrupted.append(True)
            signal.signal(signal.SIGINT, signal.default_int_handler)        # it strikes as soon as that is done
            interrupt()
        return getsignal(number)

    with pytest.raises(KeyboardInterrupt):
        flowcoro.run(main())
    assert interrupted


def test_a_ctrl_c_while_main_is_closed_that_could_not_begin_is_not_swallowed(reports):
    class Main(flowcoro.Coroutine):
        def send(self, value):
            raise AssertionError

        throw = __await__ = send

        def close(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        flowcoro.run(Main(), grace=-1)
    assert isinstance(caught.value.__context__, ValueError)
    assert reports == []


def test_sigterm_that_comes_when_main_has_ended_still_ends_the_program():
    async def cleans_up():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            signal.raise_signal(signal.SIGTERM)

    async def main():
        flowcoro.spawn(cleans_up())
        await flowcoro.checkpoint()
        return "a value"

    with pytest.raises(SystemExit) as caught:
        flowcoro.run(main())
    assert caught.value.code == 128 + signal.SIGTERM


def test_a_second_sigterm_that_comes_when_a_service_has_ended_as_asked_changes_nothing():
    async def cleans_up():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            signal.raise_signal(signal.SIGTERM)

    async def terminate():
        signal.raise_signal(signal.SIGTERM)

    async def main():
        flowcoro.spawn(cleans_up())
        flowcoro.spawn(terminate())
        await flowcoro.stop_requested()
        return "a value"

    assert flowcoro.run(main()) == "a value"


def test_an_error_of_main_is_not_lost_to_a_sigterm_that_comes_after_it():
    async def cleans_up():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            signal.raise_signal(signal.SIGTERM)

    async def main():
        flowcoro.spawn(cleans_up())
        await flowcoro.checkpoint()
        raise KeyError("main's own")

    with pytest.raises(KeyError, match="main's own"):
        flowcoro.run(main())


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("free", ["", "super"], ids=["", "with a free variable"])
def test_a_second_ctrl_c_ends_a_step_that_is_stuck_in_an_atomic_method(workers, free):
    with Child(f"""
        class Primitive:
            @flowcoro.atomic
            def method(self):
                say("ready")
                while True:
                    time.sleep(0.001)
                {free and "super()"}

        async def main():
            Primitive().method()

        flowcoro.run(flowcoro.sleep(0), workers={workers})      # with two, the method takes the guard from now on
        flowcoro.run(main())
    """) as child:
        child.hears("ready")
        child.insist(signal.SIGINT)
        status, said, errors = child.end()
    assert (status, said) == (-signal.SIGINT, []), errors


def test_a_second_ctrl_c_ends_a_step_that_another_worker_is_stuck_in():
    with Child("""
        import threading

        async def stuck():
            say(threading.current_thread().name)
            try:
                while True:
                    time.sleep(0.001)
            finally:
                say("cleaned up")

        async def main():
            flowcoro.spawn(stuck())
            time.sleep(0.2)                             # until another worker has taken that one over
            while flowcoro.statistics()["tasks"]["ready"]:
                time.sleep(0.01)
            say("ready")
            await flowcoro.sleep(1000)

        flowcoro.run(main(), workers=2)
    """) as child:
        child.hears("flowcoro worker 2")
        child.hears("ready")
        child.insist(signal.SIGINT)
        status, said, errors = child.end()
    assert (status, said) == (-signal.SIGINT, ["cleaned up"]), errors
    assert "KeyboardInterrupt" in errors


@pytest.mark.parametrize("notified", [False, True])
def test_ctrl_c_ends_those_who_wait_for_the_lock_of_a_condition_whose_holder_is_dead(notified):
    with Child(f"""
        async def waits(condition):
            async with condition:
                await condition.wait()

        async def dies(condition):
            await condition.acquire()
            if {notified}:
                condition.notify_all()

        async def stays():                              # else there would be a deadlock to report
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(1000)

        async def main():
            condition = flowcoro.Condition()
            flowcoro.spawn(waits(condition), name="waits")
            flowcoro.spawn(stays())
            await flowcoro.checkpoint()
            await flowcoro.spawn(dies(condition))
            say("ready")
            await flowcoro.sleep(1000)

        flowcoro.run(main())
    """) as child:
        child.hears("ready")
        child.insist(signal.SIGINT)
        status, said, errors = child.end()
    assert status == -signal.SIGINT, errors
    assert "KeyboardInterrupt" in errors
