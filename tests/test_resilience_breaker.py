"""flowcoro_resilience: CircuitBreaker. On the virtual clock, but for threads.

FLOWCORO_SEEDS=1000 compares a thousand random lives of breakers with the naive model. A failure names its seed, which repeats it.
"""

import functools
import gc
import json
import math
import os
import random
import threading
import time

import pytest

import flowcoro
from flowcoro_resilience import (
    TRANSITIONS, AdaptiveBreaker, BreakerOpen, CircuitBreaker, CountWindow, Keyed, Pipeline, Rejected)
from flowcoro_testing import explore, run_in_kernel
from test_net_cancel import cancelled_at

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 40)))
STATES = "CLOSED", "OPEN", "HALF_OPEN", "FORCED_OPEN", "METRICS_ONLY"


class Hands:
    """A clock that is set by hand, also backwards."""

    def __init__(self, at=100.0):
        self.at = at

    def __call__(self):
        return self.at


async def answer(value="fine"):
    await flowcoro.sleep(1)
    return value


async def fail(error=OSError):
    await flowcoro.sleep(1)
    raise error("no")


def small(**settings):
    """A breaker that opens soon, with a clock of its own: (breaker, clock)."""
    settings = {"window": 4, "minimum_calls": 2, "clock": Hands(), **settings}
    return CircuitBreaker(**settings), settings["clock"]


def told(breaker, *ends):
    """Let calls end: True as a success, else by that error."""
    for end in ends:
        permit = breaker.acquire_nowait()
        permit.succeed() if end is True else permit.fail(end)


def open_up(breaker):
    told(breaker, OSError(), OSError())
    assert breaker.state == "OPEN"


def half_open(breaker, clock):
    """The permit of the first probe."""
    open_up(breaker)
    clock.at += 60
    return breaker.acquire_nowait()


def bring(state, **settings):
    """(a breaker in this state, its clock)"""
    breaker, clock = small(probes=2, half_open_seconds=5, **settings)
    if state == "OPEN":
        open_up(breaker)
    elif state == "HALF_OPEN":
        half_open(breaker, clock).give_back()
    elif state == "FORCED_OPEN":
        breaker.force_open()
    elif state == "METRICS_ONLY":
        breaker.metrics_only()
    assert breaker.state == state
    return breaker, clock


# ---- the table -------------------------------------------------------------------------------------------------

def cause(event, breaker, clock):
    """Do what this event comes of, in whatever state the breaker is."""
    try:
        if event in ("force_open", "metrics_only", "reset"):
            getattr(breaker, event)()
        elif event == "exceeded":
            told(breaker, OSError(), OSError())
        elif event == "recovered":
            told(breaker, True, True)
        elif event == "expired":
            clock.at += 5
        else:
            clock.at += 60
            breaker.acquire_nowait().give_back()
    except BreakerOpen:
        pass


AFTER = {
    # state          exceeded        waited          recovered       expired
    "CLOSED":       ("OPEN",         "CLOSED",       "CLOSED",       "CLOSED"),
    "OPEN":         ("OPEN",         "HALF_OPEN",    "OPEN",         "OPEN"),
    "HALF_OPEN":    ("OPEN",         "HALF_OPEN",    "CLOSED",       "OPEN"),       # waited: expired 55 s before, so OPEN, and
    "FORCED_OPEN":  ("FORCED_OPEN",  "FORCED_OPEN",  "FORCED_OPEN",  "FORCED_OPEN"),            # that is over in 5 s
    "METRICS_ONLY": ("METRICS_ONLY", "METRICS_ONLY", "METRICS_ONLY", "METRICS_ONLY"),
}
ORDERS = {"force_open": "FORCED_OPEN", "metrics_only": "METRICS_ONLY", "reset": "CLOSED"}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("event", ["exceeded", "waited", "recovered", "expired", *ORDERS])
def test_each_event_in_each_state_leads_where_the_table_says(state, event):
    breaker, clock = bring(state)
    heard = []
    breaker.add_listener(lambda told: heard.append(told.kind))
    cause(event, breaker, clock)
    row = dict(zip(("exceeded", "waited", "recovered", "expired"), AFTER[state])) | ORDERS
    if (state, event) == ("HALF_OPEN", "waited"):
        assert breaker.state == "OPEN"                  # open for 60 s since it expired, 5 s after it began
        clock.at += 5
        breaker.acquire_nowait()
    assert breaker.state == row[event]
    in_table = TRANSITIONS.get((state, event))
    assert in_table == row[event] if in_table else row[event] == state or (state, event) == ("HALF_OPEN", "waited")
    if event in ORDERS:
        assert heard == [{"FORCED_OPEN": "forced_open", "METRICS_ONLY": "metrics_only", "CLOSED": "closed"}[row[event]]]


def test_the_table_has_no_other_rows():
    assert {(state, event) for state, event in TRANSITIONS if event not in ORDERS} == {
        ("CLOSED", "exceeded"), ("OPEN", "waited"), ("HALF_OPEN", "recovered"), ("HALF_OPEN", "exceeded"),
        ("HALF_OPEN", "expired"), ("METRICS_ONLY", "exceeded")}
    assert len(TRANSITIONS) == 6 + 3 * 5 and {state for state, _ in TRANSITIONS} == {*TRANSITIONS.values()} == {*STATES}


# ---- the naive model -------------------------------------------------------------------------------------------

class Model:
    """A breaker of lists: all calls that have ended in this state, all permits that are out, no sums."""

    def __init__(self, settings, chance):
        self.settings, self.chance = settings, chance
        self.now = self.raw = 0.0
        self.counts = dict(rejected=0, ignored=0, late=0, opened=0)
        self.enter("CLOSED")

    def read(self, raw):
        """Time goes on as the clock does, and stands still while that goes back."""
        self.now += max(0.0, raw - self.raw)
        self.raw = raw
        if self.state == "HALF_OPEN" and self.now >= self.until:
            self.open(self.until)

    def enter(self, state):
        self.state, self.calls, self.out, self.until = state, [], [], math.inf

    def open(self, at):
        settings = self.settings
        self.length = settings["open_seconds"] if self.state == "CLOSED" else min(
            self.length * settings["open_growth"], settings["max_open_seconds"])
        self.shown = self.window()
        self.enter("OPEN")
        self.until = at + self.length * (1 + settings["open_jitter"] * (2 * self.chance - 1))
        self.counts["opened"] += 1

    def window(self):
        """The calls that count."""
        if self.state == "OPEN":
            return self.shown
        if self.state == "HALF_OPEN":
            return self.calls
        seconds, buckets = self.settings["window_seconds"], self.settings["buckets"]
        if seconds is None:
            return self.calls[-self.settings["window"]:]
        length = seconds / buckets
        return [call for call in self.calls if call[0] // length > self.now // length - buckets]

    def permit(self, raw):
        self.read(raw)
        if self.state == "OPEN" and self.now >= self.until:
            self.enter("HALF_OPEN")
            self.until = self.now + (self.settings["half_open_seconds"] or math.inf)
        if self.state in ("CLOSED", "METRICS_ONLY") or (
                self.state == "HALF_OPEN" and len(self.calls) + len(self.out) < self.settings["probes"]):
            self.out.append(permit := (raw, object()))
            return permit
        self.counts["rejected"] += 1
        return None

    def end(self, permit, raw, how):
        if how == "ignored":
            self.counts["ignored"] += 1
        if how in ("success", "failure"):
            self.read(raw)
            if permit in self.out:
                self.calls.append((self.now, how == "failure", raw - permit[0] > self.settings["slow_call_seconds"]))
                self.out.remove(permit)
                self.decide()
            else:
                self.counts["late"] += 1
        elif permit in self.out:
            self.out.remove(permit)

    def decide(self):
        calls, settings = self.window(), self.settings
        high = (sum(failed for _, failed, _ in calls) / len(calls) >= settings["failure_rate"]
                or sum(slow for _, _, slow in calls) / len(calls) >= settings["slow_call_rate"])
        if self.state == "HALF_OPEN" and len(calls) == settings["probes"]:
            self.open(self.now) if high else self.enter("CLOSED")
        elif self.state == "CLOSED":
            most = settings["consecutive_failures"]
            if high and len(calls) >= settings["minimum_calls"] or most is not None and self.in_a_row() >= most:
                self.open(self.now)

    def in_a_row(self):
        return next((ago for ago, call in enumerate(reversed(self.calls)) if not call[1]), len(self.calls))

    def statistics(self, raw):
        self.read(raw)
        calls = self.window()
        failures, slow = sum(call[1] for call in calls), sum(call[2] for call in calls)
        return {
            "name": "CircuitBreaker", "state": self.state, "calls": len(calls), "failures": failures, "slow": slow,
            "failure_rate": failures / len(calls) if calls else None, "slow_rate": slow / len(calls) if calls else None,
            "consecutive_failures": self.in_a_row(), "probes": len(self.out) if self.state == "HALF_OPEN" else 0,
            "retry_after": None if self.until == math.inf else max(0.0, self.until - self.now), **self.counts}


def random_settings(chance):
    by_time = chance.random() < 0.5
    return {
        "window": 100 if by_time else 6, "window_seconds": 10.0 if by_time else None, "buckets": 5 if by_time else 10,
        "minimum_calls": chance.randint(1, 6), "failure_rate": chance.choice([0.25, 0.5, 1 / 3, 1.0]),
        "slow_call_seconds": chance.choice([0.5, 3.0]), "slow_call_rate": chance.choice([0.5, 1.0]),
        "consecutive_failures": chance.choice([None, 1, 3]), "open_seconds": 4.0, "open_growth": chance.choice([1.0, 2.0]),
        "max_open_seconds": 16.0, "open_jitter": chance.choice([0.0, 0.5]), "probes": chance.randint(1, 4),
        "half_open_seconds": chance.choice([None, 2.0])}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_breaker_does_what_the_naive_model_does(seed):
    chance, clock, luck = random.Random(seed), Hands(), random.Random(seed).choice([0.0, 0.25, 1.0])
    settings = random_settings(chance)
    breaker, model, permits = CircuitBreaker(clock=clock, random=lambda: luck, ignored=KeyError, **settings), (
        Model(settings, luck)), []
    for _ in range(150):
        event = chance.random()
        if event < 0.3:
            clock.at += chance.choice([0.25, 0.5, 1.0, 1.0, 4.0, 4.0, 30.0, -0.5, -1000.0])
        elif event < 0.6:
            expected = model.permit(clock.at)
            try:
                permit = breaker.acquire_nowait()
            except BreakerOpen as error:
                assert expected is None and error.retry_after == model.statistics(clock.at)["retry_after"]
            else:
                assert expected is not None
                permits.append((permit, expected))
        elif event < 0.97:
            if permits:
                permit, theirs = permits.pop(chance.randrange(len(permits)))
                how = chance.choice(["success", "success", "failure", "failure", "failure", "ignored", "cancelled"])
                model.end(theirs, clock.at, how)
                if how == "success":
                    permit.succeed()
                elif how == "cancelled":
                    chance.choice([permit.give_back, permit.__del__, lambda: permit.fail(GeneratorExit())])()
                else:
                    permit.fail(OSError() if how == "failure" else KeyError())
        else:
            order, state = chance.choice([("force_open", "FORCED_OPEN"), ("metrics_only", "METRICS_ONLY"), ("reset", "CLOSED")])
            model.read(clock.at)
            model.enter(state)
            getattr(breaker, order)()
        assert breaker.statistics() == model.statistics(clock.at)


# ---- probes ----------------------------------------------------------------------------------------------------

async def opened(**settings):
    """A breaker that is OPEN, on the clock of the run."""
    breaker = CircuitBreaker(**{"window": 4, "minimum_calls": 2, **settings})
    for _ in range(2):
        with pytest.raises(OSError):
            await breaker.try_execute(fail)
    assert breaker.state == "OPEN"
    return breaker


async def outcome(breaker, operation, *args):
    try:
        return await breaker.try_execute(operation, *args)
    except BreakerOpen as error:
        return error


@pytest.mark.parametrize("way", ["try_execute", "with", "decorator", "pipeline"])
@run_in_kernel
async def test_of_fifty_calls_at_once_exactly_as_many_go_through_as_may_probe(way):
    breaker, under_way = await opened(probes=3), 0
    await flowcoro.sleep(60)

    async def operation():
        nonlocal under_way
        under_way += 1
        assert under_way == breaker.statistics()["probes"] <= 3
        await flowcoro.sleep(1)
        under_way -= 1
        return "fine"

    async def within():
        async with breaker:
            return await operation()

    call = {"try_execute": functools.partial(breaker.try_execute, operation), "with": within, "decorator": breaker(operation),
            "pipeline": functools.partial(Pipeline(breaker).try_execute, operation)}[way]
    results = []

    async def ask():
        try:
            results.append(await call())
        except BreakerOpen:
            results.append(None)

    async with flowcoro.TaskGroup() as group:
        for _ in range(50):
            group.spawn(ask())
    assert (results.count("fine"), results.count(None)) == (3, 47)
    assert breaker.state == "CLOSED"


@run_in_kernel
async def test_a_probe_that_is_cancelled_or_ignored_makes_room_for_another():
    breaker = await opened(probes=1, ignored=KeyError)
    await flowcoro.sleep(60)
    with flowcoro.move_on_after(0.5):
        await breaker.try_execute(answer)
    with pytest.raises(KeyError):
        await breaker.try_execute(fail, KeyError)
    assert breaker.statistics()["probes"] == 0 and breaker.state == "HALF_OPEN"
    assert await breaker.try_execute(answer) == "fine"
    assert breaker.state == "CLOSED" and breaker.statistics()["ignored"] == 1


@run_in_kernel
async def test_the_rates_of_all_probes_decide():
    for ends, state in (([True, OSError()], "OPEN"), ([True, True], "CLOSED"), ([OSError(), True], "OPEN")):
        breaker = await opened(probes=2)
        await flowcoro.sleep(60)
        told(breaker, ends[0])
        assert breaker.state == "HALF_OPEN"
        told(breaker, ends[1])
        assert breaker.state == state


def test_results_of_an_earlier_state_are_dropped():
    breaker, clock = small(probes=2)
    early, heard = breaker.acquire_nowait(), []
    probe = half_open(breaker, clock)
    breaker.add_listener(lambda event: heard.append((event.kind, event.details)))
    early.fail(OSError())
    assert heard == [("late", {"seconds": 60.0})]
    numbers = breaker.statistics()
    assert numbers | {"state": "HALF_OPEN", "calls": 0, "failures": 0, "late": 1, "probes": 1} == numbers
    probe.succeed()
    told(breaker, True)
    assert breaker.state == "CLOSED" and breaker.statistics()["calls"] == 0     # those of the probes are forgotten as well


def test_what_half_open_does_not_decide_in_its_time_is_open_again():
    breaker, clock = small(probes=2, half_open_seconds=5, open_growth=2.0)
    probe = half_open(breaker, clock)
    clock.at += 4.5
    assert breaker.state == "HALF_OPEN" and breaker.statistics()["retry_after"] == 0.5
    clock.at += 10.5
    assert breaker.state == "OPEN" and breaker.statistics()["retry_after"] == 110.0     # 120 s, since the 5 had passed
    probe.succeed()
    assert breaker.statistics()["late"] == 1
    clock.at += 110
    probe = breaker.acquire_nowait()
    clock.at += 5
    probe.succeed()                             # nobody has looked in between, and it is too late all the same
    assert breaker.statistics() | {"state": "OPEN", "late": 2, "retry_after": 240.0} == breaker.statistics()


def test_what_is_given_back_too_late_makes_no_room():
    breaker, clock = small(probes=1)
    late = half_open(breaker, clock)
    breaker.reset()
    probe = half_open(breaker, clock)
    late.give_back()
    breaker._circuit.give_back(breaker._circuit.generation - 1)         # as if it had been on its way
    assert breaker.statistics()["probes"] == 1
    probe.give_back()


def test_rejections_know_their_state_and_when_to_ask_again():
    breaker, clock = small(probes=1, half_open_seconds=5, name="to there")
    open_up(breaker)
    clock.at += 19

    def rejection():
        with pytest.raises(BreakerOpen) as caught:
            breaker.acquire_nowait()
        assert caught.value.policy is breaker and not caught.value.sent
        return str(caught.value), caught.value.retry_after

    assert rejection() == ("to there is OPEN: ask again in 41 s", 41.0)
    clock.at += 41
    probe = breaker.acquire_nowait()
    assert rejection() == ("to there is HALF_OPEN: all of its probes=1 are under way", 5.0)
    breaker.force_open()
    assert rejection() == ("to there is FORCED_OPEN: until reset()", None)
    breaker.reset()
    probe.succeed()
    breaker, clock = small(probes=1)
    probe = half_open(breaker, clock)
    assert rejection()[1] is None
    assert breaker.statistics()["rejected"] == 1
    probe.give_back()


# ---- when it opens ---------------------------------------------------------------------------------------------

def test_a_rate_that_is_reached_opens_but_not_with_fewer_calls_than_the_minimum():
    breaker, clock = small(window=10, minimum_calls=4, failure_rate=0.5)
    told(breaker, OSError(), OSError(), True)
    assert breaker.state == "CLOSED"
    told(breaker, True)
    assert breaker.state == "OPEN" and breaker.statistics()["failure_rate"] == 0.5


def test_seven_of_a_hundred_reach_seven_per_cent():
    breaker, clock = small(window=100, minimum_calls=100, failure_rate=0.07)
    told(breaker, *[OSError()] * 7, *[True] * 92)
    assert breaker.state == "CLOSED"
    told(breaker, True)
    assert breaker.state == "OPEN"


def test_slow_calls_open_whether_they_succeed_or_fail():
    breaker, clock = small(slow_call_seconds=2.0, failure_rate=1.0)
    for end in True, OSError():
        permit = breaker.acquire_nowait()
        clock.at += 2.0
        permit.succeed()                        # as long as may be, no longer
        permit = breaker.acquire_nowait()
        assert breaker.statistics()["slow"] == 0
        clock.at += 2.5
        permit.succeed() if end is True else permit.fail(end)
        assert breaker.statistics()["slow_rate"] == 0.5
        breaker.reset()
    for _ in range(2):
        permit = breaker.acquire_nowait()
        clock.at += 2.5
        permit.succeed()
    assert breaker.state == "OPEN" and breaker.statistics()["failures"] == 0


def test_failures_in_a_row_open_without_a_minimum_of_calls():
    breaker, clock = small(window=100, minimum_calls=100, consecutive_failures=3)
    told(breaker, OSError(), OSError(), True, OSError(), OSError())
    assert breaker.state == "CLOSED"
    breaker.acquire_nowait().give_back()
    told(breaker, OSError())
    assert breaker.state == "OPEN"


def test_a_window_of_time_forgets_what_is_old():
    breaker, clock = small(window=100, window_seconds=10.0)
    told(breaker, OSError())
    clock.at += 10
    told(breaker, OSError())
    assert breaker.state == "CLOSED" and breaker.statistics()["calls"] == 1
    clock.at += 5
    told(breaker, OSError())
    assert breaker.state == "OPEN"


def test_the_open_time_grows_up_to_a_limit_and_begins_anew_after_closing():
    breaker, clock = small(probes=1, open_seconds=10.0, open_growth=3.0, max_open_seconds=50.0)
    open_up(breaker)
    for seconds in 10, 30, 50, 50:
        clock.at += seconds - 0.5
        with pytest.raises(BreakerOpen):
            breaker.acquire_nowait()
        clock.at += 0.5
        told(breaker, OSError())
    clock.at += 50
    told(breaker, True)
    open_up(breaker)
    assert breaker.statistics()["retry_after"] == 10.0


def test_jitter_is_drawn_anew_for_each_open_time(monkeypatch):
    reported, chances = [], iter([0.0, 1.0, 0.25, math.nan, 7.0])       # nan is taken as 0, and 7 as 1
    monkeypatch.setattr("sys.unraisablehook", lambda report: reported.append(report.err_msg))
    breaker, clock = small(probes=1, open_jitter=0.5, random=lambda: next(chances))
    for seconds in 30.0, 90.0, 45.0, 30.0, 90.0, 90.0:
        open_up(breaker)
        assert breaker.statistics()["retry_after"] == seconds
        clock.at += seconds
        told(breaker, True)
    assert reported == 2 * [
        "flowcoro_resilience: CircuitBreaker(random=…) of 'CircuitBreaker' failed, and jitter stays as it was"]


def test_a_clock_that_goes_back_makes_an_open_time_neither_longer_nor_shorter():
    breaker, clock = small()
    open_up(breaker)
    clock.at -= 3600
    assert breaker.statistics()["retry_after"] == 60.0
    clock.at += 59
    assert breaker.statistics()["retry_after"] == 1.0
    clock.at -= 1e6
    clock.at += 1.0
    with pytest.raises(BreakerOpen):
        breaker.acquire_nowait()                # it was not seen that a second has passed since it went back
    clock.at += 1.0
    permit = breaker.acquire_nowait()
    clock.at -= 10
    permit.succeed()
    assert breaker.statistics()["slow"] == 0 and breaker.state == "HALF_OPEN"
    breaker, clock = small(window=100, window_seconds=10.0, minimum_calls=100)
    told(breaker, True)
    clock.at -= 100
    told(breaker, True)                         # what sees it first is the end of a call
    clock.at += 11
    assert breaker.statistics()["calls"] == 0


def test_metrics_only_counts_tells_what_would_have_opened_and_rejects_nothing():
    breaker, clock = small()
    breaker.metrics_only()
    heard = []
    breaker.add_listener(lambda event: heard.append(event.kind))
    told(breaker, OSError(), OSError(), OSError(), True, True, True, True, OSError(), OSError())
    assert heard.count("exceeded") == 2 and breaker.state == "METRICS_ONLY"
    assert breaker.statistics()["calls"] == 4 and breaker.statistics()["failure_rate"] == 0.5
    heard.clear()
    breaker, clock = small(window=100, window_seconds=10.0)
    breaker.metrics_only()
    breaker.add_listener(lambda event: heard.append(event.kind))
    for _ in range(2):
        told(breaker, OSError(), OSError())
        clock.at += 10
        told(breaker, True)                     # no failure is left, so it can be exceeded again
    assert heard.count("exceeded") == 2


# ---- what counts -----------------------------------------------------------------------------------------------

@run_in_kernel
async def test_errors_are_failures_or_ignored_or_else_successes_by_type_or_predicate():
    breaker = CircuitBreaker(failures=(OSError, ValueError), ignored=lambda error: "mine" in str(error))

    def raises(error):
        raise error

    for error in OSError("its"), ValueError("its"), KeyError("its"), OSError("mine"):
        with pytest.raises(type(error)):
            await breaker.try_execute(raises, error)
    numbers = breaker.statistics()
    assert (numbers["calls"], numbers["failures"], numbers["ignored"]) == (3, 2, 1)


@run_in_kernel
async def test_the_errors_of_a_group_count_as_if_they_had_come_alone():
    async def in_tasks(*errors):
        async with flowcoro.TaskGroup() as group:
            for error in errors:
                group.spawn(fail(error))

    for breaker in CircuitBreaker(failures=(OSError,), ignored=KeyError), AdaptiveBreaker(failures=OSError, ignored=(KeyError,)):
        for errors in (OSError,), (ValueError, OSError), (OSError, KeyError), (KeyError,), (KeyError, KeyError), (ValueError,):
            with pytest.raises(ExceptionGroup):
                await breaker.try_execute(in_tasks, *errors)
        numbers = breaker.statistics()
        assert numbers["ignored"] == 2
        if "failures" in numbers:
            assert (numbers["calls"], numbers["failures"]) == (4, 3)
        else:
            assert (numbers["requests"], numbers["accepts"]) == (4, 1)


@run_in_kernel
async def test_a_result_may_be_a_failure_and_is_returned_all_the_same():
    breaker = CircuitBreaker(failure_result=lambda result: result is None)
    assert await breaker.try_execute(answer, None) is None
    assert breaker(lambda: None)() is None
    assert await Pipeline(breaker).try_execute(answer, None) is None
    breaker.acquire_nowait().succeed()          # no result to ask about
    assert await breaker.try_execute(answer) == "fine"
    numbers = breaker.statistics()
    assert (numbers["calls"], numbers["failures"]) == (5, 3)


@run_in_kernel
async def test_what_a_policy_within_rejects_is_ignored_unless_you_say_otherwise():
    inner = CircuitBreaker(name="inner")
    inner.force_open()
    for ignored, counted in ((Rejected, 0), (None, 1)):
        outer = CircuitBreaker(**({} if ignored else {"ignored": None}))
        with pytest.raises(BreakerOpen, match="inner is FORCED_OPEN"):
            await Pipeline(outer, inner).try_execute(answer)
        assert outer.statistics()["failures"] == counted


@run_in_kernel
async def test_a_timeout_is_counted_inside_and_not_outside():
    breaker = CircuitBreaker()

    async def hurried():
        with flowcoro.timeout(0.5):
            await answer()

    with pytest.raises(TimeoutError):
        await breaker.try_execute(hurried)
    assert breaker.statistics()["failures"] == 1
    with pytest.raises(TimeoutError):
        with flowcoro.timeout(0.5):
            await breaker.try_execute(answer)
    assert breaker.statistics()["calls"] == 1


@run_in_kernel
async def test_predicates_that_raise_are_reported_and_mean_a_failure_if_they_say_what_is_one(monkeypatch):
    reported = []
    monkeypatch.setattr("sys.unraisablehook", lambda report: reported.append(report.err_msg))

    def broken(outcome):
        raise AttributeError("status")

    breaker = CircuitBreaker(failures=broken, ignored=broken, failure_result=broken)
    with pytest.raises(OSError):
        await breaker.try_execute(fail)
    assert await breaker.try_execute(answer) == "fine"
    numbers = breaker.statistics()
    assert (numbers["calls"], numbers["failures"], numbers["ignored"]) == (2, 1, 0)
    text = "flowcoro_resilience: the predicate CircuitBreaker({}=…) of 'CircuitBreaker' failed, which means {}"
    assert reported == [text.format("ignored", "no"), text.format("failures", "yes"), text.format("failure_result", "no")]


class Stop(BaseException):
    """As KeyboardInterrupt is, for tests."""


@run_in_kernel
async def test_a_predicate_or_a_listener_that_is_interrupted_leaks_no_permit():
    def stop(outcome):
        raise Stop

    for settings in {"failures": stop}, {"ignored": stop}, {"failure_result": stop}:
        breaker = await opened(probes=1)
        for name, predicate in settings.items():
            setattr(breaker, f"_{name}", predicate)
        for call in functools.partial(breaker.try_execute, answer), functools.partial(breaker.try_execute, fail):
            await flowcoro.sleep(60)
            with pytest.raises((Stop, OSError, BreakerOpen)):
                await call()
                raise Stop
            assert breaker.statistics()["probes"] == 0
    breaker = await opened(probes=1)
    breaker._failure_result = stop
    await flowcoro.sleep(60)
    with pytest.raises(Stop):
        breaker(dict)()
    assert breaker.statistics()["probes"] == 0
    breaker = await opened(probes=1)
    await flowcoro.sleep(60)
    breaker.add_listener(stop)
    with pytest.raises(Stop):
        await breaker.try_execute(answer)
    assert breaker.statistics()["probes"] == 0 and breaker.state == "HALF_OPEN"


@pytest.mark.parametrize("bad", [RuntimeError("the clock has stopped"), KeyboardInterrupt(), "noon"])
def test_a_clock_that_fails_as_a_call_ends_leaks_no_permit(bad):
    class Clock(Hands):
        bad = None

        def __call__(self):
            if isinstance(self.bad, BaseException):
                raise self.bad
            return self.at if self.bad is None else self.bad

    breaker, clock = small(probes=1, clock=Clock())
    half_open(breaker, clock).give_back()

    def stop(error=None):
        clock.bad = bad
        if error is not None:
            raise error

    def by_hand():
        permit = breaker.acquire_nowait()
        stop()
        permit.succeed()

    def entered():
        with breaker:
            stop()

    for call in breaker(stop), functools.partial(breaker(stop), OSError()), by_hand, entered:
        with pytest.raises((RuntimeError, KeyboardInterrupt, TypeError)):
            call()
        clock.bad = None
        assert breaker.statistics()["probes"] == 0 and breaker.state == "HALF_OPEN"


@pytest.mark.parametrize("nothing", [math.nan, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"window": 100, "window_seconds": 10}])
def test_time_stands_still_while_the_clock_says_no_time(nothing, settings):
    breaker, clock = small(**settings)
    told(breaker, OSError())
    clock.at, good = nothing, clock.at
    told(breaker, OSError())
    assert breaker.statistics()["retry_after"] == 60
    clock.at = good + 60
    told(breaker, True)
    assert breaker.state == "HALF_OPEN"


# ---- ways in ---------------------------------------------------------------------------------------------------

async def two_steps():
    await flowcoro.sleep(0)
    await flowcoro.sleep(0)


def ways(breaker):
    """{name: async function}: the same call in each of the ways."""
    async def asynchronous():
        async with breaker:
            await two_steps()

    async def plain():
        with breaker:
            await two_steps()

    async def by_hand():
        permit = breaker.acquire_nowait()
        try:
            await two_steps()
        except BaseException as error:
            permit.fail(error)
            raise
        permit.succeed()

    def returns_awaitable():
        return two_steps()

    return {"try_execute": functools.partial(breaker.try_execute, two_steps), "async with": asynchronous, "with": plain,
            "decorator": breaker(two_steps), "decorator of what returns an awaitable": breaker(returns_awaitable),
            "pipeline": functools.partial(Pipeline(breaker).try_execute, two_steps), "by hand": by_hand,
            "keyed": functools.partial(Keyed(lambda key: breaker, key=lambda: "key").try_execute, two_steps)}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("way", ways(CircuitBreaker()))
def test_cancelled_at_each_point_a_call_gives_its_permit_back_and_is_not_counted(way, workers):
    async def main():
        breaker = CircuitBreaker(window=4, minimum_calls=2, open_seconds=0.001, probes=1)
        told(breaker, OSError(), OSError())
        await flowcoro.sleep(0.002)
        for number in range(1, 9):
            with flowcoro.CancelScope() as scope:
                await cancelled_at(scope, number, ways(breaker)[way]())
            if not scope.cancelled_caught:
                break
            numbers = breaker.statistics()
            assert (numbers["state"], numbers["probes"], numbers["calls"]) == ("HALF_OPEN", 0, 0)
        assert number == 3 and breaker.state == "CLOSED"

    flowcoro.run(main(), workers=workers)


def test_a_permit_ends_once_and_one_that_is_forgotten_is_given_back():
    breaker, clock = small(probes=1)
    permit = half_open(breaker, clock)
    with pytest.raises(TypeError, match="give the exception"):
        permit.fail("no")
    permit.give_back()
    for end in permit.give_back, permit.succeed, lambda: permit.fail(OSError()):
        with pytest.raises(RuntimeError, match="this permit of 'CircuitBreaker' has ended"):
            end()
    del permit
    permit = breaker.acquire_nowait()
    assert breaker.statistics()["probes"] == 1
    del permit, end
    gc.collect()
    assert breaker.statistics()["probes"] == 0
    told(breaker, True)
    assert breaker.state == "CLOSED"


def test_what_gives_a_permit_back_takes_no_lock():
    breaker, clock = small(probes=4)
    permits = [half_open(breaker, clock), breaker.acquire_nowait(), breaker.acquire_nowait()]

    def within():
        with breaker:
            yield

    generator = within()
    next(generator)
    lock, breaker._lock = breaker._lock, None           # whoever takes it fails
    generator.close()
    permits.pop().give_back()
    permits.pop().fail(flowcoro.Cancelled())
    permits.pop().__del__()
    breaker._lock = lock
    assert breaker.statistics()["probes"] == 0


def test_a_permit_that_becomes_garbage_within_a_decision_of_its_breaker_does_no_harm():
    breaker, clock = small(probes=2)
    permits = [half_open(breaker, clock), breaker.acquire_nowait()]

    class Sums(CountWindow):
        """Garbage is found whenever something is made: here where it would do most harm."""

        def add(self, counts, now=None):
            permits.clear()
            super().add(counts)

    sums = Sums(2, 2)
    breaker._circuit.sums = sums
    permits.pop().succeed()
    assert breaker.statistics() | {"calls": 1, "probes": 0} == breaker.statistics()
    told(breaker, True)
    assert breaker.state == "CLOSED"


@run_in_kernel
async def test_entries_nest_and_each_has_a_permit_of_its_own():
    breaker = await opened(probes=3)
    await flowcoro.sleep(60)
    async with breaker:
        with breaker:
            assert breaker.statistics()["probes"] == 2
            with pytest.raises(OSError):
                async with breaker:
                    raise OSError
        with pytest.raises(BreakerOpen):
            with breaker:
                pass
    assert breaker.state == "CLOSED" and not breaker._entered


@run_in_kernel
async def test_each_task_leaves_with_what_it_has_entered_with():
    breaker, seconds = CircuitBreaker(), []
    breaker.add_listener(lambda event: seconds.append(event.details["seconds"]))

    async def stay(time):
        async with breaker:
            await flowcoro.sleep(time)

    async with flowcoro.TaskGroup() as group:
        for time in (3.0, 1.0, 2.0):
            group.spawn(stay(time))
    assert seconds == [1.0, 2.0, 3.0]


@run_in_kernel
async def test_what_is_left_in_another_task_or_thread_than_it_was_entered_in_leaks_nothing():
    breaker = await opened(probes=3)
    await flowcoro.sleep(60)

    def numbers():
        with breaker:
            yield 1

    async def enter():
        generator = numbers()
        next(generator)
        return generator

    first, second = await flowcoro.spawn(enter()), await flowcoro.spawn(enter())
    with breaker:
        assert breaker.statistics()["probes"] == 3
        first.close()
        thread = threading.Thread(target=second.close)
        thread.start()
        thread.join()
        assert breaker.statistics()["probes"] == 1
    assert not breaker._entered and breaker.statistics()["probes"] == 0
    with pytest.raises(RuntimeError, match="left more often than it was entered"):
        breaker.__exit__(None, None, None)


@run_in_kernel
async def test_a_breaker_is_a_decorator_of_functions_async_or_not():
    breaker = CircuitBreaker(window=4, minimum_calls=2)

    @breaker
    def plain(number):
        """Twice."""
        if number < 0:
            raise OSError
        return 2 * number

    @breaker
    @flowcoro.coroutine
    def stepwise(number):
        yield
        return number

    class Callable:
        async def __call__(self, number):
            await flowcoro.sleep(0)
            return -number

    class Thing:
        @breaker
        def method(self, number):
            return self, number

    thing = Thing()
    assert plain(4) == 8 and plain.__doc__ == "Twice." and thing.method(1) == (thing, 1)
    assert await stepwise(2) == 2 and await breaker(Callable())(3) == -3
    assert await breaker.try_execute(flowcoro.sleep, 4) is None
    assert breaker.statistics()["calls"] == 4
    for _ in range(2):
        with pytest.raises(OSError):
            plain(-1)
    with pytest.raises(BreakerOpen):
        plain(1)


def test_generator_functions_are_refused_with_what_to_do_instead():
    async def asynchronous():
        yield

    def plain(number):
        yield

    for function in asynchronous, plain, functools.partial(plain, 1):
        with pytest.raises(TypeError, match="a generator function: .*: write `async with` or `with` in it, or take acq"):
            CircuitBreaker()(function)
    with pytest.raises(TypeError, match="decorates functions, got 5"):
        CircuitBreaker()(5)


@run_in_kernel
async def test_a_coroutine_object_is_refused_and_counted_as_nothing():
    breaker = CircuitBreaker()
    with pytest.raises(TypeError, match="CircuitBreaker.try_execute.* got a coroutine object"):
        await breaker.try_execute(answer())
    assert breaker.statistics()["calls"] == 0


@run_in_kernel
async def test_a_breaker_within_itself_and_in_another_lets_each_call_have_its_own_permit():
    inner, outer = await opened(probes=1), await opened(probes=2)
    await flowcoro.sleep(60)

    async def again():
        return await outer.try_execute(inner.try_execute, answer)

    assert await outer.try_execute(again) == "fine"
    assert outer.state == inner.state == "CLOSED"
    alone = await opened(probes=1)
    await flowcoro.sleep(60)
    with pytest.raises(BreakerOpen, match="all of its probes=1 are under way"):
        await alone.try_execute(alone.try_execute, answer)      # the probe waits for itself; not forever
    assert alone.statistics()["probes"] == 0


# ---- events ----------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_listeners_hear_of_calls_and_states_with_the_key_of_the_operation():
    breaker, heard = CircuitBreaker(window=4, minimum_calls=2, slow_call_seconds=0.5, slow_call_rate=0.9, probes=1), []
    breaker.add_listener(lambda event: heard.append((event.kind, event.key, event.details)))
    error = OSError("gone")

    async def ask(what):
        if what is error:
            raise error
        await flowcoro.sleep(what)

    ask.key = "there"
    await breaker.try_execute(ask, 0.75)
    with pytest.raises(OSError):
        await Pipeline(breaker).try_execute(ask, error)
    with pytest.raises(BreakerOpen):
        await breaker.try_execute(ask, 1)
    await flowcoro.sleep(60)
    await breaker.try_execute(ask, 0.25)
    breaker.force_open()
    assert heard == [
        ("success", "there", {"seconds": 0.75}), ("slow", "there", {"seconds": 0.75}),
        ("failure", "there", {"seconds": 0.0, "error": error}),
        ("opened", None, {"before": "CLOSED", "seconds": 60.0, "calls": 2, "failures": 1, "slow": 1}),
        ("rejected", "there", {"state": "OPEN", "retry_after": 60.0}), ("half_opened", None, {"before": "OPEN"}),
        ("success", "there", {"seconds": 0.25}), ("closed", None, {"before": "HALF_OPEN"}),
        ("forced_open", None, {"before": "CLOSED"})]


@run_in_kernel
async def test_listeners_may_use_the_breaker_and_their_errors_change_nothing(monkeypatch):
    reported, states = [], []
    monkeypatch.setattr("sys.unraisablehook", lambda report: reported.append(report.exc_value))
    breaker = await opened(probes=1)

    @breaker.add_listener
    def listener(event):
        states.append((event.kind, breaker.state))
        with breaker:
            if event.kind == "closed":
                breaker.force_open()
        raise KeyError(event.kind)

    await flowcoro.sleep(60)
    assert await breaker.try_execute(answer) == "fine"
    assert breaker.state == "FORCED_OPEN" and ("half_opened", "HALF_OPEN") in states
    assert reported and {type(error) for error in reported} <= {KeyError, BreakerOpen, RecursionError}


# ---- many at once ----------------------------------------------------------------------------------------------

def test_in_any_order_of_tasks_no_more_probe_than_may_and_nothing_is_left():
    async def life():
        chance = random.Random(next(seeds))
        breaker = CircuitBreaker(window=6, minimum_calls=3, open_seconds=2.0, probes=2, half_open_seconds=3.0, ignored=KeyError)
        began = {}                          # generation -> calls that are under way or have been counted, of HALF_OPEN

        async def operation(how):
            circuit = breaker._circuit
            generation, probing = circuit.generation, circuit.state == "HALF_OPEN"
            if probing:
                began[generation] = began.get(generation, 0) + 1
                assert began[generation] <= 2
            try:
                for _ in range(chance.randint(0, 3)):
                    await flowcoro.sleep(chance.choice([0, 0.25, 1.0, 4.0]))
                if how is not None:
                    raise how
            except (flowcoro.Cancelled, KeyError):
                if probing:
                    began[generation] -= 1
                raise

        async def client():
            for _ in range(8):
                await flowcoro.sleep(chance.choice([0, 0.25, 1.0]))
                with flowcoro.move_on_after(chance.choice([0.25, 1.0, 3.0, math.inf])):
                    try:
                        how = chance.choice([None, OSError(), OSError(), KeyError()])
                        if chance.random() < 0.5:
                            await breaker.try_execute(operation, how)
                        else:
                            async with breaker:
                                await operation(how)
                    except (BreakerOpen, OSError, KeyError):
                        pass

        async with flowcoro.TaskGroup() as group:
            for _ in range(8):
                group.spawn(client())
        assert breaker.statistics()["probes"] == 0 and not breaker._entered

    seeds = iter(SEEDS)
    explore(life, seeds=SEEDS)


@pytest.mark.parametrize("how", ["threads", "to_thread", "workers"])
def test_from_several_threads_exactly_as_many_go_through_as_may_probe(how):
    for _ in range(5):
        breaker = CircuitBreaker(window=2, minimum_calls=2, open_seconds=1e-6, probes=3)
        told(breaker, OSError(), OSError())
        gate, inside, lock = threading.Barrier(8 if how == "threads" else 1), [], threading.Lock()
        ended = threading.Event()

        @breaker
        def probe():
            with lock:
                inside.append(1)
                if len(inside) > 3:
                    ended.set()
            ended.wait(30)

        def ask():
            gate.wait()
            try:
                probe()
            except BreakerOpen:
                with lock:
                    rejected.append(1)
                    if len(rejected) == 5:
                        ended.set()

        rejected = []
        if how == "threads":
            threads = [threading.Thread(target=ask) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        elif how == "to_thread":
            async def main():
                async with flowcoro.TaskGroup() as group:
                    for _ in range(8):
                        group.spawn(flowcoro.to_thread(ask))

            flowcoro.run(main())
        else:
            async def wait():
                inside.append(1)
                assert len(inside) <= 3
                while len(rejected) < 5:
                    await flowcoro.sleep(0)

            async def asks():
                try:
                    await breaker.try_execute(wait)
                except BreakerOpen:
                    with lock:
                        rejected.append(1)

            async def main():
                async with flowcoro.TaskGroup() as group:
                    for _ in range(8):
                        group.spawn(asks())

            flowcoro.run(main(), workers=2)
        assert (len(inside), len(rejected)) == (3, 5) and breaker.state == "CLOSED"


def test_decisions_come_one_after_the_other():
    breaker = CircuitBreaker(window=10, failure_rate=1.0)
    deciding, ask, gate = [], breaker._ask, threading.Barrier(4)

    def alone():
        deciding.append(1)
        time.sleep(0.0005)
        assert len(deciding) == 1
        deciding.pop()

    class Window(CountWindow):
        def add(self, counts, now=None):
            alone()
            super().add(counts)

    def asked(now, chance):
        alone()
        return ask(now, chance)

    def calls(end):
        gate.wait()
        for _ in range(3):
            end()

    breaker._circuit.sums, breaker._ask = Window(10, 2), asked
    for end in lambda: told(breaker, True), lambda: pytest.raises(BreakerOpen, breaker.acquire_nowait):
        threads = [threading.Thread(target=calls, args=(end,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not deciding
        breaker.force_open()
    assert breaker.statistics()["rejected"] == 12


def test_threads_that_record_at_once_lose_nothing():
    breaker = CircuitBreaker(window=10_000, failure_rate=1.0)

    @breaker
    def work(number):
        if number % 4 == 0:
            raise OSError

    def many():
        for number in range(500):
            try:
                work(number)
            except OSError:
                pass

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert breaker.statistics() | {"calls": 2000, "failures": 500} == breaker.statistics()


# ---- saving ----------------------------------------------------------------------------------------------------

def carried(breaker):
    return json.loads(json.dumps(breaker.save(), allow_nan=False))


@pytest.mark.parametrize("by_time", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_what_is_saved_and_loaded_is_the_same_on_another_clock(state, by_time):
    settings = {"window": 100, "window_seconds": 10.0, "buckets": 5} if by_time else {}
    breaker, clock = bring(state, **settings)
    if state not in ("OPEN", "FORCED_OPEN"):
        told(breaker, True)
    if state in ("CLOSED", "METRICS_ONLY"):
        clock.at += 2.0
        told(breaker, True, OSError())
    other, _ = small(probes=2, half_open_seconds=5, clock=Hands(-7.3), **settings)
    late = other.acquire_nowait()
    other.load(carried(breaker))
    late.fail(OSError())
    expected = breaker.statistics()
    assert expected.pop("late") == 0
    if state == "OPEN":
        expected |= {"calls": 0, "failures": 0, "failure_rate": None, "slow_rate": None}
    if state == "CLOSED":
        assert (expected["calls"], expected["failures"], expected["consecutive_failures"]) == (3, 1, 1)
    numbers = other.statistics()
    assert numbers.pop("late") == 1 and numbers["retry_after"] == pytest.approx(expected.pop("retry_after"))
    numbers.pop("retry_after")
    assert numbers | {"opened": expected["opened"]} == numbers | expected
    if expected["calls"]:
        assert carried(other)["calls"] == carried(breaker)["calls"]
        assert carried(other)["buckets"] == carried(breaker)["buckets"]


def test_a_saved_state_grows_older_and_its_probes_are_free_again():
    breaker, clock = small(probes=2, half_open_seconds=5)
    open_up(breaker)
    other, _ = small(probes=2, half_open_seconds=5)
    other.load(carried(breaker), age=20)
    assert other.statistics()["retry_after"] == 40.0
    other.load(carried(breaker), age=100)
    assert other.statistics()["retry_after"] == 0.0
    clock.at += 60
    told(breaker, OSError())
    probe = breaker.acquire_nowait()
    other.load(carried(breaker), age=1)
    assert other.statistics() | {"state": "HALF_OPEN", "calls": 1, "probes": 0, "retry_after": 4.0} == other.statistics()
    told(other, True)
    assert other.state == "OPEN"
    other.load(carried(breaker), age=5)
    assert other.state == "OPEN" and other.statistics()["retry_after"] == 60.0
    probe.give_back()
    alone, _ = small(probes=1)
    alone.load(carried(breaker))
    told(alone, True)
    assert alone.state == "CLOSED"
    two, _ = small(probes=2, open_seconds=1.0)
    two.load(GOOD | {"state": "HALF_OPEN", "calls": "1100", "seconds_left": None, "open_seconds": 9.0})
    assert two.statistics() | {"calls": 1, "failures": 0, "probes": 0} == two.statistics()
    two.load(GOOD | {"state": "OPEN", "seconds_left": 60.0, "open_seconds": 60.0})
    assert two.statistics()["retry_after"] == 10.0      # ten times open_seconds is the most here


def test_a_window_of_time_is_loaded_as_old_as_it_is_by_now():
    settings = {"window": 100, "window_seconds": 10.0, "minimum_calls": 100}
    breaker, clock = small(**settings)
    for end in True, OSError(), True:
        told(breaker, end, end)
        clock.at += 3.0
    other, there = small(**settings, clock=Hands(0.1))
    for age, calls in (0, 6), (1, 4), (3, 4), (4, 2), (7, 0), (1e12, 0):
        other.load(carried(breaker), age=age)
        assert other.statistics()["calls"] == calls
    other.load(carried(breaker))
    there.at += 1
    assert other.statistics()["calls"] == 4


def test_a_window_of_time_is_loaded_without_a_loss_where_its_buckets_meet():
    buckets = [[ago % 2, 0, 1 + ago % 3] for ago in range(10)]
    breaker, clock = small(window=100, window_seconds=1.0, minimum_calls=100, clock=Hands(0.0))
    for _ in range(200):
        clock.at += 0.1
        breaker.load(GOOD | {"buckets": buckets, "bucket_seconds": 0.1})
        assert carried(breaker)["buckets"] == buckets


GOOD = {"state": "CLOSED", "seconds_left": None, "open_seconds": 0.0, "consecutive_failures": 0, "calls": "0123", "buckets": [],
        "bucket_seconds": None}


@pytest.mark.parametrize("member, value", [
    ("state", "closed"), ("state", None), ("state", []), ("seconds_left", "1"), ("seconds_left", math.nan),
    ("seconds_left", True), ("open_seconds", -1), ("open_seconds", math.inf), ("open_seconds", None),
    ("consecutive_failures", 1.0), ("consecutive_failures", -1), ("calls", "4"), ("calls", [0]), ("calls", "0 "),
    ("buckets", None), ("buckets", [[1, 0, 0]]), ("buckets", [[0, 0]]), ("buckets", [[0, 0, 10 ** 400]]),
    ("buckets", [[0, 0, 1.0]]), ("buckets", [[0, 0, -1]]), ("bucket_seconds", 0), ("bucket_seconds", "1")])
def test_what_was_never_saved_is_refused_by_the_name_of_its_member(member, value):
    breaker, _ = small()
    breaker.load(GOOD)
    before = breaker.statistics()
    with pytest.raises(ValueError, match=f"CircuitBreaker.load.*: '{member}' is "):
        breaker.load(GOOD | ({"bucket_seconds": 1.0} if member == "buckets" else {}) | {member: value})
    assert breaker.statistics() == before
    for saved in [], {}, GOOD | {"more": 1}, {name: GOOD[name] for name in GOOD if name != member}:
        with pytest.raises(ValueError, match="give what save.* returned, a dict of state, seconds_left"):
            breaker.load(saved)
    for name in "buckets", "bucket_seconds":
        with pytest.raises(ValueError, match="'bucket_seconds' is None"):
            breaker.load(GOOD | {"buckets": [[0, 0, 1]]})
    with pytest.raises(ValueError, match="'seconds_left' is None"):
        breaker.load(GOOD | {"state": "OPEN"})
    with pytest.raises(ValueError, match="load.age=-1"):
        breaker.load(GOOD, age=-1)


# ---- settings --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, message", [
    ({"window": 0}, "window=0): give a number of calls, from 1 to 1,000,000"),
    ({"window": 10, "minimum_calls": 11}, "window=10, minimum_calls=11): no rate would ever be known"),
    ({"window": 10, "window_seconds": 5}, "window=10, window_seconds=5): it counts the last calls, or those of the last seconds"),
    ({"window_seconds": 0}, "window_seconds=0): give a number of seconds from 0.001"),
    ({"window_seconds": math.inf}, "window_seconds=inf): give a number of seconds"),
    ({"window_seconds": 5, "buckets": 0}, "buckets=0): give a number of buckets, from 1 to 10,000"),
    ({"buckets": 5}, "buckets=5): they are of a window of time: give window_seconds too"),
    ({"minimum_calls": 0}, "minimum_calls=0): give a number of calls, from 1 up"),
    ({"failure_rate": 0}, "failure_rate=0): give a number of failures for each call more than 0 to 1"),
    ({"failure_rate": 50}, "failure_rate=50): give a number of failures for each call more than 0 to 1"),
    ({"failure_rate": math.nan}, "failure_rate=nan)"),
    ({"slow_call_seconds": 0}, "slow_call_seconds=0): give a number of seconds more than 0 up"),
    ({"slow_call_rate": 1.5}, "slow_call_rate=1.5): give a number of slow calls for each call more than 0 to 1"),
    ({"consecutive_failures": 0}, "consecutive_failures=0): give a number of failures, from 1 up"),
    ({"open_seconds": 0}, "open_seconds=0): give a number of seconds more than 0"),
    ({"open_seconds": math.inf}, "open_seconds=inf)"),
    ({"open_growth": 0.5}, "open_growth=0.5): give a number of times the open time before from 1"),
    ({"max_open_seconds": 59}, "open_seconds=60, max_open_seconds=59): the longest open time is shorter than the first"),
    ({"open_jitter": 1.5}, "open_jitter=1.5): give a number of parts of the open time from 0 to 1"),
    ({"probes": 10**30}, f"probes={10**30}): give a number of calls, from 1 to 1,000,000"),
    ({"window": 10**30}, f"window={10**30}): give a number of calls, from 1 to 1,000,000"),
    ({"window_seconds": 1, "buckets": 10**30}, f"buckets={10**30}): give a number of buckets, from 1 to 10,000"),
    ({"slow_call_seconds": 10**400}, "slow_call_seconds=1000"),
    ({"probes": 0}, "probes=0): give a number of calls, from 1 to 1,000,000"),
    ({"half_open_seconds": 0}, "half_open_seconds=0): give a number of seconds more than 0"),
])
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError) as caught:
        CircuitBreaker(**settings)
    assert str(caught.value).startswith(f"CircuitBreaker({message}")


@pytest.mark.parametrize("settings, message", [
    ({"failures": flowcoro.Cancelled}, "failures=Cancelled): give types of Exception"),
    ({"ignored": (KeyError, int)}, "ignored=int): give types of Exception"),
    ({"failures": "OSError"}, "failures='OSError'): give an exception type"),
    ({"failure_result": 5}, "failure_result=5): give"),
    ({"clock": 5.0}, "clock=5.0): give a function that returns seconds"),
    ({"random": 0.5}, "random=0.5): give a function that returns a number from 0 to 1"),
    ({"probes": 2.0}, "probes=2.0): give a number of calls, an int"),
    ({"failure_rate": "50 %"}, "failure_rate='50 %'): give a number"),
])
def test_settings_of_another_type_are_refused_by_name(settings, message):
    with pytest.raises(TypeError) as caught:
        CircuitBreaker(**settings)
    assert str(caught.value).startswith(f"CircuitBreaker({message}")


def test_without_a_minimum_a_small_window_is_its_own_and_no_failures_are_none():
    breaker, _ = small(window=3, minimum_calls=None)
    told(breaker, OSError(), OSError())
    assert breaker.state == "CLOSED"
    told(breaker, OSError())
    assert breaker.state == "OPEN"
    breaker, _ = small(failures=None)
    told(breaker, OSError(), OSError())
    assert breaker.state == "CLOSED" and breaker.statistics()["calls"] == 2
