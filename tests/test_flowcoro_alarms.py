"""The watchdog in the corners: each place of a step in a batch, other workers, hooks, the end of a run, odd limits.

What it reports and measures as a rule is in test_flowcoro_watchdog.py, whose helpers are used here.
"""

import contextvars
import math
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections import deque
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import pytest

import flowcoro
from test_flowcoro_watchdog import LIMIT, PATIENCE, ROOT, SEVERAL, Alarms, at_once, in_group, watched
from test_flowcoro_workers import spread

CALM = 0.3              # seconds of a limit that nobody is to reach, however busy the machine is


@pytest.fixture(autouse=True)
def no_watchdog_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "flowcoro watchdog"]
    assert not flowcoro._Watchdog.resting


def until(condition):
    """As no task should: block until `condition()` holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def run_program(text):
    """Start it in a process of its own."""
    return subprocess.Popen([sys.executable, "-W", "error", "-c", textwrap.dedent(text)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


# ---- reports ---------------------------------------------------------------------------------------------------

def test_a_long_step_is_reported_at_each_place_of_a_batch():
    async def step(place, long):
        if long:
            until(lambda: f"hog {place}" in alarms.tasks)

    async def main():
        for long in range(flowcoro.STEPS_PER_LOOK):
            for _ in range(5 * flowcoro.STEPS_PER_POLL):        # short steps: the batches are whole ones again
                await flowcoro.checkpoint()
            await flowcoro.sleep(0.001)                         # a batch begins with main, and goes on with these
            async with flowcoro.TaskGroup() as group:
                for place in range(flowcoro.STEPS_PER_LOOK):
                    group.spawn(step(place, place == long), name=f"hog {place}")

    alarms = Alarms()
    watched(main, alarms=alarms, limit=LIMIT / 2)
    assert min(alarms.seconds) >= LIMIT / 2


@pytest.mark.parametrize("workers", [2, 8])
def test_other_workers_take_over_what_waits_behind_a_reported_step(workers):
    async def hog():
        until(lambda: alarms.reports and len(others) == 5)

    async def other():
        await flowcoro.checkpoint()
        others.append(flowcoro.current_task().name)

    async def main():
        await in_group(hog=hog(), **{f"other {number}": other() for number in range(5)})

    others, alarms = [], Alarms()
    watched(main, alarms=alarms, workers=workers)
    assert "hog" in alarms.tasks


def test_two_stuck_workers_are_both_reported():
    async def hog(name):
        started.append(name)
        until(lambda: {"first", "second"} <= set(alarms.tasks))

    started, alarms = [], Alarms()
    watched(lambda: in_group(first=hog("first"), second=hog("second")), alarms=alarms, workers=2)
    places = {re.search(r"worker (\d) of 2", report)[1] for report in alarms.reports}
    assert places == {"1", "2"}


def test_a_hook_that_blocks_is_reported_as_no_task():
    class Blocks(Alarms):
        def before_poll(self, timeout):
            self.before_poll = None
            flowcoro.remove_hooks(self)
            flowcoro.add_hooks(alarms)
            alarms.wait()

    async def main():
        await flowcoro.sleep(0.01)

    alarms = Alarms()
    watched(main, alarms=Blocks())
    assert alarms.tasks[0] is None and "in before_poll" in alarms.reports[0]


def test_each_of_several_hooks_gets_the_report():
    async def main():
        flowcoro.add_hooks(second)
        until(lambda: first.reports and second.reports)

    first, second = Alarms(), Alarms()
    watched(main, alarms=first)
    assert first.tasks[0] == second.tasks[0] and first.reports[0] == second.reports[0]


def test_once_its_hook_is_removed_the_report_goes_to_the_unraisablehook(reports):
    async def main():
        flowcoro.remove_hooks(alarms)
        until(lambda: reports)

    alarms = Alarms()
    watched(main, alarms=alarms)
    assert reports[0][0] == "flowcoro: a step takes too long" and alarms.reports == []


def test_a_hook_may_run_a_coroutine_in_the_kernel():
    class Runs(Alarms):
        def task_stuck(self, *args):
            super().task_stuck(*args)
            result.append(flowcoro.run_from_thread(double(21), kernel=kernel))

    async def double(number):
        await flowcoro.checkpoint()
        return 2 * number

    async def main():
        nonlocal kernel
        kernel = flowcoro.current_kernel()
        alarms.wait()
        while not result:
            await flowcoro.sleep(0.001)

    kernel, result, alarms = None, [], Runs()
    watched(main, alarms=alarms)
    assert result[0] == 42


def test_a_hook_that_asks_a_kernel_that_has_ended_is_refused_and_the_run_ends():
    class Late(Alarms):
        def task_stuck(self, *args):
            super().task_stuck(*args)
            until(lambda: kernel.ended)
            with pytest.raises(RuntimeError, match="the kernel has ended"):
                flowcoro.call_from_thread(int, kernel=kernel)
            refused.append(True)

    async def main():
        nonlocal kernel
        kernel = flowcoro.current_kernel()
        alarms.wait()

    kernel, refused, alarms = None, [], Late()
    watched(main, alarms=alarms)
    assert refused == [True]


@pytest.mark.parametrize("task, late, since", [("hog", True, 7.0), ("hog", False, 10.0), (None, True, 10.0)])
def test_a_step_has_lasted_since_it_was_first_seen_or_since_before_it_if_the_watchdog_came_late(
        task, late, since, monkeypatch):
    def look(now, late):
        monkeypatch.setattr(flowcoro, "time", SimpleNamespace(monotonic=lambda: now))
        watchdog.look_at(worker, late)

    class worker:
        call, looked, sleeping, thread_id, ready = None, 7.0, False, 1, ()

    worker.task = task
    watchdog, alarms = flowcoro._Watchdog(None, 5.0), []
    watchdog.alarm = lambda sight, seconds: alarms.append((sight.held_by, seconds))
    look(10.0, late)
    look(since + 4.9, False)
    assert alarms == []
    look(since + 5.0, False)
    assert alarms == [(task, 5.0)]


def test_a_step_that_begins_while_the_watchdog_looks_seems_no_longer_than_it_is(monkeypatch):
    class Worker:
        call, looked, sleeping, thread_id, ready = None, 7.0, False, 1, ()

        @property
        def task(self):
            nonlocal now
            now += 3.0                  # so long it took to look
            return "hog"

    now, worker, alarms = 0.0, Worker(), []
    monkeypatch.setattr(flowcoro, "time", SimpleNamespace(monotonic=lambda: now))
    watchdog = flowcoro._Watchdog(None, 5.0)
    watchdog.alarm = lambda sight, seconds: alarms.append(seconds)
    for now, seconds in (10.0, []), (17.9, []), (18.0, [5.0]):
        watchdog.look_at(worker, False)
        assert alarms == seconds


def test_a_step_that_makes_others_ready_all_the_time_is_reported():
    async def hog():
        for _ in range(100):
            flowcoro.spawn(flowcoro.checkpoint())
            time.sleep(LIMIT / 10)
            if alarms.about("hog"):
                break

    alarms = Alarms()
    watched(lambda: in_group(hog=hog()), alarms=alarms)
    assert alarms.about("hog")


def test_a_task_that_was_reported_gets_what_it_waits_for_in_its_own_context_and_leaves_no_probe():
    async def main():
        nonlocal task
        task = flowcoro.current_task()
        for step in range(3):
            flowcoro.spawn(channel.send(step))
            number.set(step)
            alarms.wait()
            assert type(task.context) is flowcoro._Probe
            assert await channel.receive() == step and number.get() == step
        with pytest.raises(TimeoutError), flowcoro.timeout(0.001):
            alarms.wait()
            await flowcoro.Event().wait()
        while type(task.context) is flowcoro._Probe:            # until the watchdog's next look
            await flowcoro.sleep(0.001)
        alarms.wait()
        return number.get()

    task, number, channel, alarms = None, contextvars.ContextVar("number"), flowcoro.Channel(1), Alarms()
    assert watched(main, alarms=alarms) == 2
    assert type(task.context) is contextvars.Context            # the run has ended in a step that was reported


def test_a_task_is_seen_at_one_worker_at_a_time():
    async def main():
        task = flowcoro.current_task()
        here, there = (SimpleNamespace(task=task, call=None, looked=7.0, ready=()) for _ in range(2))
        before, first = task.context, flowcoro._Sight(here)
        assert first.lasts()
        second = flowcoro._Sight(there)             # it was stolen in between
        assert second.lasts() and not first.lasts()
        first.forget()
        assert second.lasts()
        await flowcoro.checkpoint()
        assert not second.lasts()                   # it has begun another step
        second.forget()
        assert task.context is before

    flowcoro.run(main())


@pytest.mark.parametrize("change", [lambda ready: ready.append("other"), deque.popleft, lambda ready: ready.rotate(1)])
def test_what_is_no_task_lasts_while_nobody_is_taken_from_those_who_are_ready(change):
    worker = SimpleNamespace(task=None, call=None, looked=7.0, ready=deque(["first", "second"]))
    sight = flowcoro._Sight(worker)
    assert sight.lasts() and sight.lasts() and sight.lasts() and sight.lasts()
    change(worker.ready)
    assert not sight.lasts() and not sight.lasts()


def test_where_a_step_was_is_not_told_by_what_came_after_it(monkeypatch):
    def live_stack(self, worker):
        asked.append(worker.task)
        until(lambda: worker.task is not asked[0])      # it goes on while it is asked
        return [("user.py", 1, "other")]

    async def main():
        until(lambda: asked)

    asked, alarms = [], Alarms()
    monkeypatch.setattr(flowcoro._Watchdog, "live_stack", live_stack)
    watched(main, alarms=alarms)
    assert alarms.tasks[0] == asked[0].name and alarms.reports[0].endswith("\nIt has gone on\n")


def test_a_step_that_holds_what_all_others_wait_for_is_told_to_the_hook():
    async def main():
        await flowcoro.ParkingLot().park_unless(lambda: alarms.wait() or True)

    alarms = Alarms()
    watched(main, alarms=alarms, workers=2)
    assert " in wait\n" in alarms.reports[0]


# A thread that signals itself writes its stack before it goes on: nothing here depends on how long that takes.

def stack_of_this_thread():
    return flowcoro._Watchdog(None, LIMIT).stack_by_signal(SimpleNamespace(thread_id=threading.get_ident()))


def test_a_thread_that_writes_its_stack_names_each_place_from_the_outermost_on():
    def deep():
        return stack_of_this_thread()

    file, line, function = deep()[-3]
    assert file == __file__ and function == "deep" and [place[2] for place in deep()][-2:] == [
        "stack_of_this_thread", "stack_by_signal"]
    assert line == deep.__code__.co_firstlineno + 1


def test_a_thread_writes_its_stack_after_somebody_has_had_the_signal_in_between():
    assert stack_of_this_thread()
    before = signal.signal(signal.SIGURG, lambda number, frame: None)
    assert stack_of_this_thread() == []
    signal.signal(signal.SIGURG, before)
    assert stack_of_this_thread()


def test_a_stack_that_came_too_late_is_not_taken_for_that_of_the_next_step():
    first = stack_of_this_thread()
    os.write(flowcoro._Watchdog.tell, b'Current thread:\n  File "late.py", line 1 in late\n')
    assert [place[2] for place in stack_of_this_thread()] == [place[2] for place in first]


# ---- no false alarms -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["wakes", "parks"])
def test_a_worker_that_waits_for_one_that_blocks_in_an_atomic_step_is_not_reported_but_that_one_is(how, reports, monkeypatch):
    def alarm(self, sight, seconds):
        report(self, sight, seconds)
        asked.add(sight.worker)

    def block():
        asked.clear()
        begin.set()                                 # in the thread of the other one, which comes no further than to the guard
        until(lambda: len(asked) == 2)
        return True

    async def blocks():
        while not (waiting and waiting[0].state == "parked"):
            await flowcoro.sleep(0.001)
        await flowcoro.ParkingLot().park_unless(block)

    async def waits():
        waiting.append(flowcoro.current_task())
        await begin.wait()
        if how == "wakes":
            begin.set()
        else:
            await flowcoro.sleep(0.001)

    asked, waiting, begin, report = set(), [], flowcoro.Event(), flowcoro._Watchdog.alarm
    monkeypatch.setattr(flowcoro._Watchdog, "alarm", alarm)
    watched(lambda: spread(2, lambda number: (blocks, waits)[number]()), workers=2)
    found = [str(error) for message, error in reports if "task 'spread" not in str(error)]     # who meets may take long
    assert found and all(" in block\n" in report for report in found)


def test_a_whole_batch_of_steps_that_are_long_together_is_no_long_step():
    async def busy():
        time.sleep(CALM / 7)

    alarms = Alarms()
    watched(lambda: in_group(**{f"busy {n}": busy() for n in range(flowcoro.STEPS_PER_LOOK)}), alarms=alarms, limit=CALM)
    assert alarms.reports == []


def test_many_park_functions_that_are_long_together_are_no_long_step():
    async def parks():
        await flowcoro.ParkingLot().park_unless(lambda: time.sleep(CALM / 7) or True)

    alarms = Alarms()
    watched(lambda: in_group(**{f"parks {n}": parks() for n in range(flowcoro.STEPS_PER_LOOK)}), alarms=alarms, limit=CALM)
    assert alarms.reports == []


def test_a_step_does_not_answer_for_the_call_from_a_thread_before_it():
    async def main():
        kernel = flowcoro.current_kernel()
        for _ in range(30):                         # until calls are taken after each step
            time.sleep(0.002)
            await flowcoro.checkpoint()

        def calls():
            for _ in range(2):
                flowcoro.call_from_thread(time.sleep, 0.6 * CALM, kernel=kernel)

        thread = threading.Thread(target=calls)
        thread.start()
        while thread.is_alive():
            time.sleep(0.6 * CALM)
            await flowcoro.checkpoint()

    alarms = Alarms()
    watched(main, alarms=alarms, limit=CALM)
    assert alarms.reports == []


def test_many_short_calls_from_threads_that_are_long_together_are_no_long_one():
    def case(workers):
        def ask():
            begun.wait()
            flowcoro.call_from_thread(time.sleep, CALM / 4, kernel=kernel)

        async def main():
            nonlocal kernel
            kernel = flowcoro.current_kernel()
            begun.set()
            if workers == 1:                        # else others may begin to stand in
                until(lambda: len(kernel.worker.inbox) == len(threads))
            while any(thread.is_alive() for thread in threads):
                await flowcoro.sleep(0.001)

        kernel, begun, alarms = None, threading.Event(), Alarms()
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        watched(main, alarms=alarms, limit=CALM, workers=workers)
        assert alarms.reports == []

    at_once(case, [1, 2])


def test_workers_that_have_ended_are_not_stuck_while_another_one_is_late():
    class Late(Alarms):
        def after_poll(self, count):
            if ending and threading.current_thread().name == "flowcoro worker 2":
                self.wait(3)

    async def main():
        await flowcoro.sleep(0.02)
        ending.append(True)

    ending, alarms = [], Late()
    flowcoro.run(hooked(alarms, main), workers=4, watchdog=LIMIT)
    assert {re.search(r"worker (\d) of 4", report)[1] for report in alarms.reports} <= {"2"}


async def hooked(hooks, function):
    flowcoro.add_hooks(hooks)
    await function()


def test_a_trace_function_in_the_loop_is_not_disturbed():
    def trace(frame, event, argument):
        return local if frame.f_code is flowcoro._Worker.work.__code__ else None

    def local(frame, event, argument):          # while this runs, the interpreter keeps the frame's variables in a dict
        lines.append(frame.f_lineno)
        if len(lines) == 200:
            alarms.wait()
        return local

    async def step():
        for _ in range(20):
            await flowcoro.checkpoint()
        return "fine"

    async def main():
        return await flowcoro.when_all(*(step() for _ in range(10)))

    lines, alarms, before = [], Alarms(), sys.gettrace()
    sys.settrace(trace)
    try:
        assert watched(main, alarms=alarms) == ["fine"] * 10
    finally:
        sys.settrace(before)
    assert alarms.reports


def test_a_short_step_after_a_long_wait_is_not_stuck():
    def case(workers):
        alarms = Alarms()
        watched(main, alarms=alarms, limit=CALM, workers=workers)
        assert alarms.reports == []

    def write(far):
        time.sleep(1.2 * CALM)
        os.write(far, b"x")

    async def main():
        near, far = os.pipe()
        writes = flowcoro.spawn(flowcoro.to_thread(write, far))
        await flowcoro.wait_readable(near)
        time.sleep(CALM / 4)
        await writes
        await flowcoro.sleep(1.2 * CALM)
        time.sleep(CALM / 4)
        flowcoro.notify_closing(near)
        os.close(near)
        os.close(far)

    at_once(case, [1, 2])


@SEVERAL
def test_a_crowd_of_short_steps_is_not_stuck(workers):
    async def step():
        for _ in range(10):
            await flowcoro.checkpoint()

    alarms = Alarms()
    watched(lambda: in_group(**{str(number): step() for number in range(2000)}), alarms=alarms, limit=2 * CALM, workers=workers)
    assert alarms.reports == []


def test_a_step_that_was_stopped_with_its_process_is_not_long():
    # It computes for a small part of the limit, in processor time: what the process was stopped for does not count.
    with run_program(f"""
        import flowcoro, time

        async def main():
            print("ready", flush=True)
            end = time.monotonic() + 1.2
            while time.monotonic() < end:
                end_of_step = time.process_time() + 0.05 * {CALM}
                while time.process_time() < end_of_step:
                    pass
                await flowcoro.checkpoint()

        flowcoro.run(main(), watchdog={CALM})
    """) as process:
        assert process.stdout.readline() == "ready\n"
        for stopped in 1.05, 1.5:                     # times the limit
            process.send_signal(signal.SIGSTOP)
            time.sleep(stopped * CALM)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.077)                                   # to strike the step and the watchdog anywhere
        assert process.communicate(timeout=PATIENCE) == ("", "")


# ---- the end of a run, and deadlocks ---------------------------------------------------------------------------

@SEVERAL
def test_the_watchdog_ends_with_a_run_that_fails_in_its_report(workers):
    async def main():
        alarms.wait()
        raise LookupError

    alarms = Alarms()
    with pytest.raises(LookupError):
        watched(main, alarms=alarms, workers=workers)


@SEVERAL
def test_ctrl_c_ends_a_reported_step_and_the_watchdog(workers):
    async def main():
        alarms.wait()
        signal.raise_signal(signal.SIGINT)
        await flowcoro.sleep(math.inf)

    alarms = Alarms()
    with pytest.raises(KeyboardInterrupt):
        watched(main, alarms=alarms, workers=workers)


@SEVERAL
def test_a_deadlock_after_a_report_is_found(workers):
    async def main():
        flowcoro.add_hooks(alarms)
        alarms.wait()
        await flowcoro.Event().wait()

    alarms = Alarms()
    with pytest.raises(flowcoro.Deadlock):
        flowcoro.run(main(), watchdog=LIMIT, workers=workers)


@pytest.mark.usefixtures("looks_again_soon")
def test_a_deadlock_is_found_once_the_hook_has_returned_and_woken_nobody():
    class Slow(Alarms):
        def task_stuck(self, *args):
            super().task_stuck(*args)
            until(lambda: event is not None and len(event._lot))
            time.sleep(0.05)
            returned.append(True)

    async def main():
        nonlocal event
        flowcoro.add_hooks(alarms)
        alarms.wait()
        event = flowcoro.Event()
        try:
            await event.wait()
        finally:
            assert returned

    event, returned, alarms = None, [], Slow()
    with pytest.raises(flowcoro.Deadlock):
        flowcoro.run(main(), watchdog=LIMIT)


def in_child(function):
    """What the child of a fork() of this process says of `function()`: its exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # of fork() in a process with threads
        process = os.fork()
    if process == 0:
        try:
            os._exit(function())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_the_child_of_a_fork_may_have_a_watchdog_of_its_own():
    async def hog():
        alarms.wait()

    def child():
        watched(lambda: in_group(hog=hog()), alarms=alarms)
        return 7 if alarms.tasks[0] == "hog" else 8

    async def main():
        return in_child(child)

    alarms = Alarms()
    assert flowcoro.run(main(), watchdog=True) == 7


def test_the_child_of_a_fork_writes_its_stacks_into_a_pipe_of_its_own():
    def child():
        if flowcoro._Watchdog.told is not None:
            return 8
        near, far = os.pipe()
        os.dup2(far, number)
        signal.raise_signal(signal.SIGURG)          # neither the parent nor who has the number now hears of this
        if select.select([near], [], [], 0)[0]:
            return 6
        stack = stack_of_this_thread()
        return 7 if stack[-3][2] == "child" and os.fstat(flowcoro._Watchdog.tell).st_ino != inode else 9

    stack_of_this_thread()
    number = flowcoro._Watchdog.tell
    inode = os.fstat(number).st_ino
    assert in_child(child) == 7
    assert select.select([flowcoro._Watchdog.told], [], [], 0)[0] == []
    assert stack_of_this_thread()


def test_a_child_that_comes_back_into_the_kernel_ends_in_spite_of_the_watchdog():
    with run_program("""
        import flowcoro, os, threading, warnings

        async def main():
            warnings.simplefilter("ignore")
            return os.fork()

        try:
            child = flowcoro.run(main(), watchdog=True)
        except RuntimeError as error:
            assert "forked" in str(error) and threading.active_count() == 1
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """) as process:
        assert process.communicate(timeout=PATIENCE) == ("7\n", "")


def test_one_run_after_the_other_has_a_watchdog():
    async def main():
        alarms.wait()

    for _ in range(3):
        alarms = Alarms()
        watched(main, alarms=alarms)


# ---- arguments -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("limit", [Decimal("0.01"), Fraction(1, 100), Decimal("0.5"), Decimal("Infinity"), 3600, 1e300])
def test_any_number_from_a_hundredth_of_a_second_up_is_a_limit(limit):
    async def main():
        return flowcoro.current_kernel().watchdog.limit

    assert flowcoro.run(main(), watchdog=limit) == float(limit)


@pytest.mark.parametrize("error, limit", [
    (ValueError, 0), (ValueError, -2), (ValueError, 0.009), (ValueError, math.nan), (ValueError, Decimal("NaN")),
    (ValueError, Decimal("0.001")), (TypeError, "1"), (TypeError, b"1"), (TypeError, 1j), (TypeError, [1])])
def test_what_is_no_limit_is_refused_with_its_value_and_the_remedy(error, limit):
    with pytest.raises(error) as caught:
        flowcoro.run(flowcoro.sleep(0), watchdog=limit)
    message = str(caught.value)
    assert message.startswith(f"watchdog={limit!r}: give the seconds")
    assert "from 0.01 up" in message and "True for 1" in message and "math.inf only measures" in message


# ---- histograms ------------------------------------------------------------------------------------------------

PLAN = (range(15),)


def test_a_long_pass_is_what_those_have_waited_who_were_ready_behind_it():
    for idled, waited in (False, 0.5), (True, 0.0):
        meter = flowcoro._Meter(SimpleNamespace(steps=15, ready=["first", "last"]))
        meter.measure(1.0, 1.5, PLAN, idled)
        assert (meter.step_times.max, meter.latencies.max) == (0.5, waited)


def test_a_step_that_was_measured_alone_is_the_last_one_for_a_while():
    worker = SimpleNamespace(steps=15, ready=["last"])
    meter = flowcoro._Meter(worker)
    assert meter.measure(1.0, 1.00001, PLAN, False) == ((range(1),), 0.0)
    worker.steps += 1
    assert meter.measure(2.0, 2.25, PLAN, False) == (PLAN, 2.25 + flowcoro.SECONDS_PER_SAMPLE)
    assert (meter.step_times.sum, meter.latencies.sum) == (0.25, 0.0)


def test_an_exact_power_of_two_is_not_below_itself():
    for power in range(38):
        histogram = flowcoro._Histogram()
        histogram.add(2 ** power / 1e6)
        assert flowcoro._Histogram.together([histogram])["below"] == {2 ** (power + 1) / 1e6: 1}


def test_histograms_of_several_workers_add_up():
    first, second = flowcoro._Histogram(), flowcoro._Histogram()
    for seconds in 0.5e-6, 3e-6, 3e-6:
        first.add(seconds)
    for seconds in 3e-6, 0.25:
        second.add(seconds)
    both = flowcoro._Histogram.together([first, second])
    assert both == {"count": 5, "sum": pytest.approx(0.2500095), "max": 0.25, "below": {1e-6: 1, 4e-6: 3, 0.262144: 1}}


def test_before_anything_was_measured_the_statistics_are_empty():
    async def main():
        return flowcoro.statistics()

    numbers = flowcoro.run(main(), watchdog=math.inf)
    empty = {"count": 0, "sum": 0.0, "max": 0.0, "below": {}}
    assert numbers["step_seconds"] == numbers["latency_seconds"] == empty


@SEVERAL
def test_nothing_is_counted_where_no_step_is_made_and_nobody_waits(workers):
    async def main():
        for _ in range(5):
            await flowcoro.sleep(0.03)
        return flowcoro.statistics()

    numbers = watched(main, limit=math.inf, workers=workers)
    for name in "step_seconds", "latency_seconds":
        assert numbers[name]["count"] <= numbers["steps"] <= 12


@SEVERAL
def test_the_statistics_are_those_of_all_workers_together(workers):
    async def step():
        for _ in range(8):
            time.sleep(0.002)                       # lets the others have the GIL, so that each has samples
            await flowcoro.checkpoint()

    async def main():
        await in_group(**{str(number): step() for number in range(8)})
        meters = [worker.meter for worker in flowcoro.current_kernel().workers]
        while True:                                 # the others may be measuring
            before = [sum(meter.step_times.counts) for meter in meters]
            numbers = flowcoro.statistics()["step_seconds"]
            if before == [sum(meter.step_times.counts) for meter in meters]:
                return numbers, before

    numbers, counts = watched(main, limit=math.inf, workers=workers)
    assert numbers["count"] == sum(numbers["below"].values()) == sum(counts) > 0
    assert 0 < numbers["max"] <= numbers["sum"] <= PATIENCE * workers


def test_the_last_of_a_thousand_waits_for_all_the_others_and_no_longer():
    async def step():
        for _ in range(3):
            await flowcoro.checkpoint()
            for _ in range(100):
                pass

    async def main():
        began = time.monotonic()
        await in_group(**{str(number): step() for number in range(1000)})
        return flowcoro.statistics(), time.monotonic() - began

    numbers, seconds = watched(main, limit=math.inf)
    assert numbers["latency_seconds"]["count"] >= 1
    assert 0 < numbers["latency_seconds"]["max"] <= seconds
    assert numbers["steps"] >= 3000


# ---- what all primitives share ----------------------------------------------------------------------------------

class Primitive:
    """With a method of another module than the kernel's."""

    @flowcoro.atomic
    def hold(self, until):
        until()

    @flowcoro.atomic
    def touch(self):
        pass


def test_who_waits_in_an_atomic_method_of_another_module_for_who_holds_all_up_is_not_reported_himself():
    async def holds():
        primitive.hold(lambda: (held.set(), until(lambda: alarms.tasks.count("holds") >= 3)))

    async def waits():
        assert held.wait(PATIENCE)
        primitive.touch()

    primitive, held, alarms = Primitive(), threading.Event(), Alarms()
    watched(lambda: in_group(holds=holds(), waits=waits()), alarms=alarms, workers=3)
    assert set(alarms.tasks) == {"holds"}


def test_who_waits_for_another_kernel_that_holds_all_up_is_reported():
    async def holds():
        primitive.hold(lambda: (held.set(), until(lambda: alarms.reports)))

    async def waits():
        other.start()
        assert held.wait(PATIENCE)
        primitive.touch()

    primitive, held, alarms = Primitive(), threading.Event(), Alarms()
    other = threading.Thread(target=lambda: flowcoro.run(holds(), workers=2))
    watched(lambda: in_group(waits=waits()), alarms=alarms, workers=2)
    other.join()
    assert "It waits for another kernel" in alarms.reports[0]
