"""The watchdog: who holds a worker for too long is reported, nobody else is, and what steps cost is measured.

Limits are short here, and no test depends on how fast anything is: a step that is to be reported lasts until it was.
"""

import concurrent.futures
import contextlib
import gc
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from fractions import Fraction
from pathlib import Path

import pytest

import flowcoro
from flowcoro_testing import VirtualClock

ROOT = Path(__file__).resolve().parent.parent

PATIENCE = 30.0         # seconds after which something that should have happened counts as hanging
LIMIT = 0.05            # seconds of a step in these tests

SEVERAL = pytest.mark.parametrize("workers", [1, 2, 8])


@pytest.fixture(autouse=True)
def no_watchdog_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "flowcoro watchdog"]
    assert not flowcoro._Watchdog.resting


class Alarms:
    """The hook task_stuck, which notes what it is told. On a busy machine any step may be a long one, so tests ask for the
    alarms about a task by its name."""

    def __init__(self):
        self.tasks, self.seconds, self.reports, self.threads = [], [], [], []

    def task_stuck(self, task, seconds, report):
        self.threads.append(threading.current_thread().name)
        self.tasks.append(task.name if task is not None else None)
        self.seconds.append(seconds)
        self.reports.append(report)

    def about(self, name):
        """The (seconds, report) of that task, or with None of what is no task."""
        return [(seconds, report) for who, seconds, report in zip(self.tasks, self.seconds, self.reports) if who == name]

    def wait(self, count=1, sleep=time.sleep):
        """As no task should: until so many alarms more about this step have come. Returns the last one's report."""
        name = None
        with contextlib.suppress(RuntimeError):         # it is no task
            name = flowcoro.current_task().name
        end, wanted = time.monotonic() + PATIENCE, len(self.about(name)) + count
        while len(self.about(name)) < wanted:
            assert time.monotonic() < end, "no alarm"
            sleep(0.001)
        return self.about(name)[wanted - 1][1]

    def compute(self):
        """The same without ever letting the GIL go by itself."""
        self.wait(sleep=float)


def watched(function, *args, alarms=None, limit=LIMIT, workers=1, **options):
    async def main():
        if alarms is not None:
            flowcoro.add_hooks(alarms)
        with flowcoro.timeout(PATIENCE):
            return await function(*args)

    return flowcoro.run(main(), watchdog=limit, workers=workers, **options)


def at_once(function, cases):
    """Call it with each of the cases, in threads of their own: for tests that sleep most of the time."""
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as threads:
        for done in [threads.submit(function, case) for case in cases]:
            done.result()


async def in_group(**coros):
    async with flowcoro.TaskGroup() as group:
        for name, coro in coros.items():
            group.spawn(coro, name=name)


# ---- reports ---------------------------------------------------------------------------------------------------

@SEVERAL
def test_a_task_in_a_long_step_is_reported_with_its_name_its_worker_and_the_limit(workers):
    async def hog():
        alarms.wait()

    alarms = Alarms()
    watched(lambda: in_group(hog=hog()), alarms=alarms, workers=workers)
    seconds, report = alarms.about("hog")[0]
    assert seconds >= LIMIT
    assert re.match(rf"task 'hog' has held worker [1-{workers}] of {workers} for 0\.\d+ s, the limit is 0\.05 s\. ", report)
    assert "to_thread()" in report


@pytest.mark.parametrize("how", ["wait", "compute"])
def test_the_report_shows_where_the_step_is_and_nothing_of_the_kernel(how):
    def deep():
        getattr(alarms, how)()

    async def hog():
        await flowcoro.checkpoint()
        deep()

    alarms = Alarms()
    watched(lambda: in_group(hog=hog()), alarms=alarms)
    stack = alarms.about("hog")[0][1].partition("It is here:\n")[2]
    assert re.findall(r"in (\w+)", stack)[:3] == ["hog", "deep", how]
    assert "deep()" in stack and "flowcoro.py" not in stack


def test_c_code_that_keeps_the_gil_is_reported_as_soon_as_it_lets_go():
    async def hog():
        size = 10 ** 6
        while not alarms.about("hog"):
            sum(range(size))
            size *= 2

    alarms = Alarms()
    watched(lambda: in_group(hog=hog()), alarms=alarms)
    assert "sum(range(size))" in alarms.about("hog")[0][1]


def test_without_a_gil_the_thread_writes_its_stack_itself(monkeypatch):
    def deep():
        alarms.wait()

    async def hog():
        deep()

    before = set(os.listdir("/dev/fd"))
    monkeypatch.setattr(flowcoro, "_has_gil", lambda: False)
    for _ in range(2):                              # the second time the pipe is there already
        alarms = Alarms()
        watched(lambda: in_group(hog=hog()), alarms=alarms, workers=2)
        stack = alarms.about("hog")[0][1].partition("It is here:\n")[2]    # the first: a second one might come too late
        assert re.findall(r"in (\w+)", stack)[:3] == ["hog", "deep", "wait"]
        assert "    deep()\n" in stack and "flowcoro.py" not in stack
    assert len(set(os.listdir("/dev/fd")) - before) <= 2


def test_the_signal_of_another_is_not_taken_for_that(monkeypatch):
    async def hog():
        alarms.wait()

    monkeypatch.setattr(flowcoro, "_has_gil", lambda: False)
    before = signal.signal(signal.SIGURG, lambda number, frame: None)
    try:
        alarms = Alarms()
        watched(lambda: in_group(hog=hog()), alarms=alarms, workers=2)
    finally:
        signal.signal(signal.SIGURG, before)
    assert alarms.about("hog")[0][1].endswith("It does not say where it is\n")


def test_the_report_says_who_waits_behind_it():
    async def hog(near):
        while len(flowcoro.current_task()._joiners or ()) < 3 or not flowcoro.statistics()["io_waiting"]:
            await flowcoro.checkpoint()
        sleeper = None
        while sleeper is None or sleeper.state != "parked":     # else its deadline has passed before this step
            sleeper = flowcoro.spawn(flowcoro.sleep(LIMIT / 2))
            await flowcoro.sleep(0)
        for number in range(5):
            flowcoro.spawn(flowcoro.sleep(0), name=f"ready {number}")
        thread = threading.Thread(target=flowcoro.call_from_thread, args=[int], kwargs={"kernel": kernel})
        thread.start()
        while not kernel.worker.inbox:
            time.sleep(0.001)
        nonlocal report
        report = alarms.wait(2)                 # the first may have been under way before all this was there
        thread.join(0)
        threads.append(thread)

    async def main():
        nonlocal kernel
        kernel = flowcoro.current_kernel()
        near, far = os.pipe()
        async with flowcoro.TaskGroup() as group:
            reader = group.spawn(flowcoro.wait_readable(near))
            task = group.spawn(hog(near), name="hog")
            for _ in range(2):
                group.spawn(join(task))
            await task
            reader.cancel()
            while kernel.worker.inbox:          # the thread's call is to be made while there is a kernel
                await flowcoro.checkpoint()
        os.close(near)
        os.close(far)

    async def join(task):
        await task

    kernel, report, threads, alarms = None, None, [], Alarms()
    watched(main, alarms=alarms)
    threads[0].join()
    behind = report.splitlines()[1]
    assert re.fullmatch(r"Behind it wait: 5 ready \(ready 0, ready 1, ready 2 and 2 more\), 3 that await it, a deadline that "
                        r"passed 0\.\d+ s ago, 1 parked on descriptors, 1 calls from other threads", behind)


def test_nobody_waits_behind_a_task_that_is_alone():
    async def main():
        alarms.wait()

    alarms = Alarms()
    watched(main, alarms=alarms)
    report = alarms.reports[0]
    assert "Behind it wait: nobody\n" in report or "deadline" in report


def test_a_step_is_reported_again_whenever_its_time_has_doubled():
    async def hog():
        alarms.wait(3)

    alarms = Alarms()
    watched(lambda: in_group(hog=hog()), alarms=alarms)
    first, second, third = [seconds for seconds, _ in alarms.about("hog")][:3]
    assert second >= 2 * first and third >= 2 * second


def test_each_long_step_is_reported():
    async def hog():
        for _ in range(3):
            alarms.wait()
            await flowcoro.checkpoint()

    alarms = Alarms()
    watched(lambda: in_group(hog=hog()), alarms=alarms)
    assert len(alarms.about("hog")) >= 3


def test_without_a_hook_the_report_goes_to_the_unraisablehook(reports):
    async def hog():
        end = time.monotonic() + PATIENCE
        while not about_hog():
            assert time.monotonic() < end
            time.sleep(0.001)

    def about_hog():
        return [(message, error) for message, error in reports if str(error).startswith("task 'hog' has held worker 1 of 1 for")]

    watched(lambda: in_group(hog=hog()))
    message, error = about_hog()[0]
    assert message == "flowcoro: a step takes too long" and isinstance(error, RuntimeError)


def test_an_error_of_the_hook_is_reported_and_the_watchdog_goes_on(reports):
    class Broken(Alarms):
        def task_stuck(self, *args):
            super().task_stuck(*args)
            raise SystemExit("hook")

    async def hog():
        alarms.wait(2)

    alarms = Broken()
    watched(lambda: in_group(hog=hog()), alarms=alarms)
    assert len(reports) >= 2 and all("a task_stuck hook failed" in message for message, error in reports)


def test_the_hook_is_called_in_the_watchdog_s_thread_and_may_call_the_kernel():
    class Calls(Alarms):
        def task_stuck(self, *args):
            super().task_stuck(*args)
            result.append(flowcoro.call_from_thread(lambda: 7, kernel=kernel))

    async def main():
        nonlocal kernel
        kernel = flowcoro.current_kernel()
        await in_group(hog=hog())
        while not result:
            await flowcoro.sleep(0.001)

    async def hog():
        alarms.wait()

    kernel, result, alarms = None, [], Calls()
    watched(main, alarms=alarms)
    assert alarms.threads[0] == "flowcoro watchdog" and result[0] == 7


@SEVERAL
def test_a_call_from_another_thread_can_hold_the_worker_too(workers):
    async def main():
        await flowcoro.to_thread(flowcoro.call_from_thread, alarms.wait)

    alarms = Alarms()
    watched(main, alarms=alarms, workers=workers)
    report = alarms.about(None)[0][1]
    assert report.startswith("call_from_thread(Alarms.wait) has held worker 1 of")
    assert "in wait" in report


@pytest.mark.parametrize("options", [{"seed": 7}, {"clock": VirtualClock()}])
def test_a_seed_and_a_virtual_clock_go_with_it(options):
    async def hog():
        alarms.wait()

    async def main():
        await flowcoro.sleep(0.01)
        await in_group(hog=hog())

    alarms = Alarms()

    async def bounded():
        flowcoro.add_hooks(alarms)
        await main()

    flowcoro.run(bounded(), watchdog=LIMIT, **options)
    assert alarms.about("hog")


def test_kernels_in_two_threads_have_a_watchdog_each():
    def run(alarms, name):
        async def hog():
            alarms.wait()

        watched(lambda: in_group(**{name: hog()}), alarms=alarms)

    first, second = Alarms(), Alarms()
    thread = threading.Thread(target=run, args=[second, "second"])
    thread.start()
    run(first, "first")
    thread.join()
    assert first.about("first") and not first.about("second")
    assert second.about("second") and not second.about("first")


# ---- no false alarms -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gil", [True, False])
def test_many_steps_that_are_long_together_are_no_long_step(gil, monkeypatch):
    def case(others):
        alarms = Alarms()
        watched(lambda: in_group(busy=busy(), **{f"idle {n}": idle() for n in range(others)}), alarms=alarms, limit=limit,
                workers=1 if gil else 2)
        assert max(alarms.seconds, default=0.0) <= max(turns)

    async def busy():
        for _ in range(20):
            began = time.monotonic()
            time.sleep(limit / 5)                   # longer on a busy machine, perhaps longer than the limit
            await flowcoro.checkpoint()
            turns.append(time.monotonic() - began)

    async def idle():
        for _ in range(20):
            await flowcoro.checkpoint()

    if not gil:
        monkeypatch.setattr(flowcoro, "_has_gil", lambda: False)
    limit, turns = 0.1, []
    at_once(case, [0, 1, 14, 15])                   # with one other task each batch of 15 begins with another


def test_who_sleeps_or_waits_is_not_stuck():
    def case(workers):
        alarms = Alarms()
        watched(main, alarms=alarms, limit=limit, workers=workers)
        assert alarms.reports == []

    async def main():
        await flowcoro.sleep(2 * limit)
        await flowcoro.to_thread(time.sleep, 2 * limit)

    limit = 4 * LIMIT                               # no step takes so long on a busy machine
    at_once(case, [1, 2, 8])


def test_a_process_that_was_stopped_is_not_stuck():
    program = textwrap.dedent("""
        import flowcoro, sys, time

        async def main():
            print("ready", flush=True)
            end = time.monotonic() + 0.8
            while time.monotonic() < end:           # short steps, all the time
                await flowcoro.checkpoint()

        flowcoro.run(main(), watchdog=0.2)
    """)
    with subprocess.Popen([sys.executable, "-W", "error", "-c", program], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=PATIENCE) == ("", "")


# ---- the end of a run, and deadlocks ---------------------------------------------------------------------------

class Failed(Exception):
    pass


@pytest.mark.parametrize("error", [Failed, KeyboardInterrupt, SystemExit])
def test_the_watchdog_ends_with_the_run_however_that_ends(error):
    async def main():
        raise error

    with pytest.raises(error):
        flowcoro.run(main(), watchdog=True)


def test_a_deadlock_is_found_in_spite_of_the_watchdog():
    with pytest.raises(flowcoro.Deadlock):
        flowcoro.run(flowcoro.Event().wait(), watchdog=True)


def test_no_deadlock_is_reported_while_a_hook_can_still_wake_a_task():
    class Wakes(Alarms):
        def task_stuck(self, *args):
            super().task_stuck(*args)
            time.sleep(0.1)                         # nobody but this hook can go on meanwhile
            flowcoro.call_from_thread(event.set, kernel=kernel)

    async def main():
        nonlocal kernel, event
        flowcoro.add_hooks(alarms)
        kernel, event = flowcoro.current_kernel(), flowcoro.Event()
        flowcoro.spawn(hog(), name="hog")
        await event.wait()

    async def hog():
        alarms.wait()

    kernel = event = None
    alarms = Wakes()
    flowcoro.run(main(), watchdog=LIMIT)
    assert alarms.about("hog")


def test_the_child_of_a_fork_has_no_watchdog():
    async def main():
        process = os.fork()
        if process == 0:
            os._exit(len(flowcoro._Watchdog.resting))
        assert os.waitpid(process, 0)[1] == 0

    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # of fork() in a process with threads
        flowcoro.run(main(), watchdog=True)


# ---- arguments -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("limit, seconds", [(True, 1.0), (1, 1.0), (0.01, 0.01), (Fraction(1, 4), 0.25), (10 ** 400, math.inf)])
def test_the_limit_is_a_number_of_seconds_or_true(limit, seconds):
    async def main():
        return flowcoro.current_kernel().watchdog.limit

    assert flowcoro.run(main(), watchdog=limit) == seconds


@pytest.mark.parametrize("limit", [None, False])
def test_without_a_limit_nobody_watches(limit):
    async def main():
        assert "flowcoro watchdog" not in [thread.name for thread in threading.enumerate()]
        return flowcoro.statistics().keys()

    assert not {"step_seconds", "latency_seconds"} & flowcoro.run(main(), watchdog=limit)


def test_an_infinite_limit_measures_without_a_thread():
    async def main():
        assert "flowcoro watchdog" not in [thread.name for thread in threading.enumerate()]
        return flowcoro.statistics().keys()

    assert {"step_seconds", "latency_seconds"} <= flowcoro.run(main(), watchdog=math.inf)


@pytest.mark.parametrize("limit", [0, -1, 0.009, math.nan, -math.inf])
def test_limits_that_make_no_sense_are_refused(limit):
    with pytest.raises(ValueError, match=re.escape(f"watchdog={limit!r}: give the seconds") + ".*from 0.01 up"):
        flowcoro.run(flowcoro.sleep(0), watchdog=limit)


@pytest.mark.parametrize("limit", ["soon", [], object()])
def test_limits_that_are_no_numbers_are_refused(limit):
    with pytest.raises(TypeError, match="watchdog="):
        flowcoro.run(flowcoro.sleep(0), watchdog=limit)


# ---- histograms ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds, below", [(0, 1e-6), (0.9e-6, 1e-6), (1.5e-6, 2e-6), (2.5e-6, 4e-6), (0.001, 1024e-6),
                                            (0.0011, 2048e-6), (1.0, 1.048576), (1e9, 2 ** 39 / 1e6)])
def test_a_histogram_counts_each_duration_below_the_next_power_of_two(seconds, below):
    histogram = flowcoro._Histogram()
    histogram.add(seconds)
    assert flowcoro._Histogram.together([histogram, flowcoro._Histogram()]) == {
        "count": 1, "sum": seconds, "max": seconds, "below": {below: 1}}


@SEVERAL
def test_a_long_step_among_short_ones_is_in_the_statistics(workers):
    async def short():
        for _ in range(200):
            await flowcoro.checkpoint()

    async def long():
        await flowcoro.checkpoint()
        time.sleep(0.05)

    async def main():
        async with flowcoro.TaskGroup() as group:
            for number in range(20):
                group.spawn(short())
            group.spawn(long())
        while flowcoro.statistics()["step_seconds"]["max"] < 0.05:      # its worker has yet to come round
            await flowcoro.sleep(0.001)
        return flowcoro.statistics()["step_seconds"]

    numbers = watched(main, limit=math.inf, workers=workers)
    assert sum(count for below, count in numbers["below"].items() if below > 0.05) >= 1
    assert numbers["count"] == sum(numbers["below"].values())
    assert numbers["max"] <= numbers["sum"] + 1e-9


def test_latency_is_what_the_last_of_those_who_are_ready_waits():
    async def slow():
        for _ in range(30):
            time.sleep(0.002)
            await flowcoro.checkpoint()

    async def main():
        async with flowcoro.TaskGroup() as group:
            for _ in range(5):
                group.spawn(slow())
        return flowcoro.statistics()["latency_seconds"]

    numbers = watched(main, limit=math.inf)
    assert numbers["count"] >= 1
    assert numbers["max"] >= 0.008                  # four others, 2 ms each


def test_many_ready_tasks_are_waited_for_over_several_passes():
    async def step():
        for _ in range(5):
            time.sleep(0.00002)
            await flowcoro.checkpoint()

    async def main():
        async with flowcoro.TaskGroup() as group:
            for _ in range(500):
                group.spawn(step())
        return flowcoro.statistics()["latency_seconds"]

    numbers = watched(main, limit=math.inf)
    assert numbers["max"] >= 500 * 0.00002


def test_an_idle_kernel_is_never_late():
    async def main():
        for _ in range(100):
            await flowcoro.sleep(0.001)
        return flowcoro.statistics()["latency_seconds"]

    numbers = watched(main, limit=math.inf)
    assert numbers["count"] >= 1 and numbers["below"].get(1e-6, 0) >= numbers["count"] - 2


def test_a_look_at_a_long_step_keeps_neither_its_task_nor_its_result():
    class Result:
        pass

    async def hog():
        alarms.wait()
        return Result()

    async def main():
        task = flowcoro.spawn(hog(), name="hog")
        result = weakref.ref(await task)
        task = weakref.ref(task)
        while result() is not None or task() is not None:       # until the watchdog's next look
            await flowcoro.sleep(0.005)
            gc.collect()

    alarms = Alarms()
    watched(main, alarms=alarms)
