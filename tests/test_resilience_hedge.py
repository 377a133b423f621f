"""flowcoro_resilience: LatencyWindow, Hedge. On the virtual clock. FLOWCORO_SEEDS as in test_resilience_retry.py."""

import contextvars
import gc
import itertools
import math
import os
import random

import pytest

import flowcoro
import flowcoro_resilience
from flowcoro_resilience import RACE, Hedge, LatencyWindow, Pipeline, Retry, RetryBudget, Timeout
from flowcoro_testing import VirtualClock, run_in_kernel
from test_net_cancel import at_each_point

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 30)))

workers = pytest.mark.parametrize("workers", [1, 3])


class Attempts:
    """An operation whose calls take so many seconds each, and bring what is said: a value, or an error to raise."""

    idempotent = True

    def __init__(self, *script, cleanup=0.0):
        self.script, self.cleanup, self.begun, self.cancelled, self.under_way, self.dropped = script, cleanup, [], [], 0, []

    async def __call__(self):
        number = len(self.begun)
        self.begun.append(flowcoro.now())
        seconds, outcome = self.script[number]
        self.under_way += 1
        try:
            await flowcoro.sleep(seconds)
        except flowcoro.Cancelled:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(self.cleanup)
            self.cancelled.append((number, flowcoro.now()))
            raise
        finally:
            self.under_way -= 1
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def discard(self, result):
        self.dropped.append(result)


# ---- decisions -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", SEEDS)
def test_a_percentile_is_that_of_the_last_latencies(seed):
    chance = random.Random(seed)
    size, percentile = chance.choice([1, 2, 10, 64]), chance.choice([0.01, 0.5, 0.9, 0.95, 0.999, 1])
    window, latencies = LatencyWindow(percentile, size), []
    assert window.value() == math.inf
    for _ in range(200):
        seconds = chance.choice([0.0, 1e-9, 1e-6, 1e9, chance.lognormvariate(-3, 2), chance.uniform(0, 1)])
        window.add(seconds)
        latencies.append(seconds)
        last = sorted(latencies[-size:])
        exact = last[math.ceil(percentile * len(last)) - 1]
        assert window.calls == len(last)
        if 2e-6 < exact < 4000:
            assert exact / 1.0906 <= window.value() <= exact * 1.0906
        else:
            assert window.value() < 3e-6 or window.value() > 3900


@pytest.mark.parametrize("state", ["running", "won", "lost"])
@pytest.mark.parametrize("event", ["success", "failure", "last failure", "fatal"])
def test_each_event_in_each_state_of_a_race(state, event):
    race = flowcoro_resilience._Race(3, 10.0)
    race.state, race.failed = state, 2 * (event == "last failure")
    race.starts()
    error = KeyError("x")
    ended = race.succeeds(11.0) if event == "success" else race.fails(2, error, event == "fatal")
    expected = {"success": "won", "failure": "running"}.get(event, "lost") if state == "running" else state
    assert race.state == RACE[state, event] == expected
    assert ended == (state == "running" and event != "failure")
    assert race.errors == ([(2, error)] if state == "running" and event != "success" else [])
    assert race.ended == (11.0 if state == "running" and event == "success" else None)
    assert race.may_start() == (expected == "running")


def test_a_race_that_has_failed_so_far_is_lost_when_no_more_may_start():
    race = flowcoro_resilience._Race(3, 0.0)
    assert race.may_start() and not race.fails(1, KeyError(), False)
    race.starts_no_more()
    assert race.state == "lost"
    race = flowcoro_resilience._Race(3, 0.0)
    assert race.starts() == 2 and race.starts() == 3 and not race.may_start()
    race = flowcoro_resilience._Race(3, 0.0)
    race.starts_no_more()
    assert race.state == "running" and race.fails(1, KeyError(), False) and race.state == "lost"


# ---- Hedge -----------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_the_second_attempt_begins_after_the_delay_and_the_loser_is_cancelled_and_joined():
    hedge, operation, heard = Hedge(2.0), Attempts((9, "first"), (1, "second"), cleanup=3.0), []
    hedge.add_listener(lambda event: heard.append((event.kind, event.details)))
    assert await hedge.try_execute(operation) == "second"
    assert operation.begun == [0.0, 2.0] and operation.cancelled == [(0, 6.0)] and flowcoro.now() == 6.0
    assert heard == [("hedged", {"attempt": 2, "after": 2.0}), ("won", {"attempt": 2})]
    numbers = hedge.statistics()
    assert numbers.pop("budget")["repetitions"] == 1
    assert numbers == {"name": "Hedge", "calls": 1, "unsafe": 0, "delay": 2.0, "hedges": 1, "won": 1, "refused": 0, "lost": 0}


@run_in_kernel
async def test_a_first_attempt_that_is_quick_is_the_only_one_and_one_that_is_slow_may_win_yet():
    hedge = Hedge(2.0)
    operation = Attempts((1.9, "first"))
    assert await hedge.try_execute(operation) == "first" and flowcoro.now() == 1.9
    operation = Attempts((3, "first"), (5, "second"))
    assert await hedge.try_execute(operation) == "first"
    assert operation.cancelled == [(1, 4.9)] and hedge.statistics()["won"] == 0


@run_in_kernel
async def test_an_operation_that_does_not_wait_runs_in_the_task_that_calls():
    hedge, tasks = Hedge(0.5, idempotent=True), []
    variable = contextvars.ContextVar("variable", default="unset")

    def here():
        tasks.append(flowcoro.current_task())
        variable.set("set in there")
        return 5

    assert await hedge.try_execute(here) == 5
    assert tasks == [flowcoro.current_task()] and variable.get() == "set in there"


@run_in_kernel
async def test_each_attempt_sees_the_context_of_the_call():
    variable, seen = contextvars.ContextVar("variable"), []

    async def look():
        seen.append(variable.get())
        variable.set("an attempt's own")
        await flowcoro.sleep(9)

    variable.set("the call's")
    with pytest.raises(TimeoutError):
        await Pipeline(Timeout(5), Hedge(1.0, max_hedges=2, idempotent=True)).try_execute(look)
    assert seen == ["the call's"] * 3


@run_in_kernel
async def test_an_error_begins_the_next_attempt_at_once_and_the_last_one_is_raised_with_the_others():
    errors = [OSError("first"), ValueError("second"), KeyError("third")]
    operation = Attempts(*((1, error) for error in errors))
    hedge, heard = Hedge(5.0, max_hedges=2, name="ask"), []
    hedge.add_listener(lambda event: heard.append((event.kind, event.details)))
    with pytest.raises(KeyError) as caught:
        await hedge.try_execute(operation)
    assert caught.value is errors[2] and operation.begun == [0.0, 1.0, 2.0] and flowcoro.now() == 3.0
    assert caught.value.__notes__ == ["ask: attempt 3 of 3, after 3 s"]
    assert caught.value.__cause__.exceptions == tuple(errors[:2])
    assert heard[-1] == ("lost", {"attempts": 3, "error": errors[2]}) and hedge.statistics()["lost"] == 1


@run_in_kernel
async def test_an_error_while_another_attempt_runs_is_no_end():
    operation = Attempts((3, OSError("first")), (4, "second"))
    assert await Hedge(2.0).try_execute(operation) == "second" and flowcoro.now() == 6.0
    operation = Attempts((9, "first"), (1, OSError("second")))
    assert await Hedge(2.0).try_execute(operation) == "first" and flowcoro.now() == 15.0


@run_in_kernel
async def test_an_error_that_is_fatal_ends_it_whatever_still_runs():
    for settings in ({"errors": OSError}, {"ignored": KeyError}, {"errors": None}, {"errors": lambda error: False}):
        began, operation = flowcoro.now(), Attempts((9, "first"), (1, KeyError("second")))
        with pytest.raises(KeyError, match="second"):
            await Hedge(2.0, **settings).try_execute(operation)
        assert flowcoro.now() == began + 3.0 and operation.cancelled == [(0, began + 3.0)]
    operation = Attempts((1, KeyError("first")))
    with pytest.raises(KeyError) as caught:
        await Hedge(2.0, errors=OSError).try_execute(operation)
    assert caught.value.__notes__ == ["Hedge: attempt 1 of 2, after 1 s"]


@run_in_kernel
async def test_what_may_not_be_done_twice_is_done_once():
    operation = Attempts((9, "first"), (1, "second"))
    operation.idempotent = False
    hedge = Hedge(2.0)
    assert await hedge.try_execute(operation) == "first" and len(operation.begun) == 1
    assert hedge.statistics()["calls"] == hedge.statistics()["unsafe"] == 1
    operation = Attempts((9, "first"), (1, "second"))
    operation.idempotent = False
    assert await Hedge(2.0, idempotent=True).try_execute(operation) == "second"


@pytest.mark.parametrize("seed", SEEDS)
def test_of_two_that_come_at_the_same_moment_one_is_let_go_of(seed):
    async def main():
        operation = Attempts((3, "first"), (1, "second"))
        result = await Hedge(2.0).try_execute(operation)
        assert operation.dropped + [result] in (["first", "second"], ["second", "first"]) or operation.cancelled
        assert len(operation.dropped) + len(operation.cancelled) == 1 and operation.under_way == 0
        return len(operation.dropped)

    flowcoro.run(main(), clock=VirtualClock(), seed=seed)


@run_in_kernel
async def test_a_loser_that_comes_to_its_end_all_the_same_is_let_go_of():
    dropped = []

    async def stubborn():
        number = len(begun)
        begun.append(number)
        with flowcoro.CancelScope(shield=True):
            await flowcoro.sleep(5 - 4 * number)
        return number

    async def discard(result):
        await flowcoro.sleep(1)
        dropped.append(result)

    begun, stubborn.idempotent, stubborn.discard = [], True, discard
    assert await Hedge(2.0).try_execute(stubborn) == 1
    assert dropped == [0] and flowcoro.now() == 6.0


@run_in_kernel
async def test_cancelled_it_leaves_nothing_but_a_result_that_had_come_is_not_lost():
    operation = Attempts((9, "first"), (9, "second"), cleanup=1.0)
    with flowcoro.move_on_after(3) as scope:
        await Hedge(2.0).try_execute(operation)
    assert scope.cancelled_caught and operation.under_way == 0 and flowcoro.now() == 4.0
    assert sorted(operation.cancelled) == [(0, 4.0), (1, 4.0)]
    operation = Attempts((9, "first"), (1, "second"), cleanup=5.0)       # the loser is being joined when the cancel comes
    with flowcoro.move_on_after(4) as scope:
        result = await Hedge(2.0).try_execute(operation)
        assert result == "second"
        await flowcoro.sleep(0)
    assert scope.cancelled_caught and result == "second"


@run_in_kernel
async def test_the_budget_says_how_many_are_hedged():
    budget = RetryBudget(0.0, 0.2, 10.0)        # two in ten seconds
    hedge, heard = Hedge(1.0, budget=budget), []
    hedge.add_listener(lambda event: heard.append(event.kind))
    for expected in ("second", "second", "first"):
        assert await hedge.try_execute(Attempts((2.5, "first"), (0.5, "second"))) == expected
    assert heard == ["hedged", "won", "hedged", "won", "refused"]
    assert hedge.statistics()["refused"] == budget.statistics()["refused"] == 1
    with pytest.raises(OSError) as caught:
        await hedge.try_execute(Attempts((1.5, OSError("and nothing else may begin"))))
    assert caught.value.__notes__ == ["Hedge: attempt 1 of 1, after 1.5 s"]


@run_in_kernel
async def test_a_percentile_is_learnt_before_anything_is_hedged():
    hedge = Hedge(percentile=0.9, minimum=10)
    for seconds in range(10):
        assert hedge.delay == math.inf
        await hedge.try_execute(Attempts((seconds / 10 + 0.05, "first")))
    assert 0.85 / 1.0906 <= hedge.delay <= 0.85 * 1.0906
    assert await hedge.try_execute(Attempts((5, "first"), (1, "second"))) == "second"
    assert hedge.statistics()["delay"] == hedge.delay == hedge._latencies.value()
    both = Hedge(2.0, percentile=0.9, minimum=10)
    assert both.delay == 2.0 and Hedge()._minimum == 20 and Hedge(percentile=0.99)._minimum == 100


@run_in_kernel
async def test_hedging_does_not_change_the_percentile_it_goes_by():
    """Who is cancelled because a hedge has won has been slower than the percentile, and is counted so."""
    chance = random.Random(5)
    hedge = Hedge(percentile=0.9, minimum=100, budget=RetryBudget(floor=math.inf))
    for _ in range(1000):
        await hedge.try_execute(Attempts((chance.uniform(0, 1), 1), (chance.uniform(0, 1), 2)))
    assert 0.87 < hedge.delay < 0.93
    assert 60 < hedge.statistics()["hedges"] < 130


@run_in_kernel
async def test_the_time_that_the_loser_takes_to_end_is_no_latency():
    hedge = Hedge(1.0, percentile=0.5, minimum=1)
    assert await hedge.try_execute(Attempts((9, "first"), (1, "second"), cleanup=50)) == "second"
    assert 2 / 1.0906 <= hedge.delay <= 2 * 1.0906


@run_in_kernel
async def test_errors_and_calls_that_are_cancelled_are_no_latencies():
    hedge = Hedge(percentile=0.5, minimum=1)
    with pytest.raises(OSError):
        await hedge.try_execute(Attempts((1, OSError())))
    with flowcoro.move_on_after(1):
        await hedge.try_execute(Attempts((9, "")))
    assert hedge._latencies.calls == 0 and hedge.delay == math.inf
    await hedge.try_execute(Attempts((1, "")))
    await hedge.try_execute(Attempts((0.5, OSError()), (5, "second")))
    assert hedge._latencies.calls == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_many_calls_in_any_order_are_as_a_naive_race(seed):
    chance = random.Random(seed)
    delay, more = chance.choice([0.0, 0.3, 1.0]), chance.randint(1, 3)
    hedge = Hedge(delay, max_hedges=more, budget=RetryBudget(floor=math.inf), errors=OSError)

    def model(script):
        """(what comes, when each attempt begins, when it is over)"""
        begun, running, failed, next_at = [0.0], [(script[0][0], script[0][1])], 0, delay
        while True:
            ends = min(running, default=(math.inf,))[0]
            if len(begun) <= more and next_at < ends:
                seconds, outcome = script[len(begun)]
                running.append((next_at + seconds, outcome))
                begun.append(next_at)
                next_at += delay
                continue
            now, outcome = min(running)
            running.remove((now, outcome))
            if outcome != "down":
                return outcome, begun, now
            failed, next_at = failed + 1, min(next_at, now)
            if failed == more + 1:
                return "down", begun, now

    async def one(begin):
        await flowcoro.sleep(begin)
        script = [(chance.uniform(0, 2), chance.choice(["good", "down", "down", "wrong"])) for _ in range(more + 1)]
        errors = {"down": OSError, "wrong": KeyError}
        operation = Attempts(*((seconds, errors[what]() if what in errors else what) for seconds, what in script))
        began = flowcoro.now()
        try:
            what = await hedge.try_execute(operation)
        except OSError:
            what = "down"
        except KeyError:
            what = "wrong"
        expected, begun, over = model(script)
        assert what == expected, (seed, script)
        assert [when - began for when in operation.begun] == pytest.approx(begun), (seed, script)
        assert flowcoro.now() - began == pytest.approx(over) and operation.under_way == 0, (seed, script)

    async def main():
        async with flowcoro.TaskGroup() as group:
            for _ in range(10):
                group.spawn(one(chance.uniform(0, 1)))

    flowcoro.run(main(), clock=VirtualClock(), seed=seed)
    assert not hedge.budget._counted


@workers
def test_cancelled_at_each_point_it_leaves_nothing(workers):
    async def main():
        hedge, under_way = Hedge(0.0, max_hedges=2, idempotent=True, budget=RetryBudget(floor=math.inf)), []

        async def operation():
            under_way.append(1)
            try:
                await flowcoro.sleep(0)
                if len(under_way) < 2:
                    await flowcoro.sleep(0.001)
                    raise OSError("try another")
                await flowcoro.sleep(0.002)
                return "done"
            finally:
                under_way.pop()

        async def after(cancelled):
            assert not under_way and not hedge.budget._counted

        assert await at_each_point(lambda: hedge.try_execute(operation), after) >= 2

    flowcoro.run(main(), workers=workers)


def test_with_several_workers_each_call_gets_one_result_and_the_rest_is_let_go_of():
    hedge = Hedge(0.0, idempotent=True, budget=RetryBudget(floor=math.inf), max_hedges=2)
    made, dropped, got = itertools.count(), [], []

    async def operation():
        number = next(made)
        await flowcoro.sleep(0)
        if number % 5 == 0:
            raise OSError(number)
        with flowcoro.CancelScope(shield=True):
            await flowcoro.sleep(0)
        results.append(number)
        return number

    results, operation.discard = [], dropped.append

    async def caller():
        for _ in range(50):
            got.append(await hedge.try_execute(operation))

    async def main():
        async with flowcoro.TaskGroup() as group:
            for _ in range(8):
                group.spawn(caller())

    flowcoro.run(main(), workers=3)
    assert len(got) == 400 and sorted(got + dropped) == sorted(results)


@run_in_kernel
async def test_a_retry_and_a_hedge_share_a_budget_and_an_attempt_is_hedged():
    budget = RetryBudget()
    pipeline = Pipeline(Retry(budget=budget, first=1.0, jitter="none"), Hedge(1.0, budget=budget))
    operation = Attempts((2, OSError("a")), (2, OSError("b")), (5, "c"), (1, "d"))
    assert await pipeline.try_execute(operation) == "d"
    assert operation.begun == [0.0, 1.0, 4.0, 5.0]
    numbers = budget.statistics()
    assert (numbers["calls"], numbers["repetitions"]) == (1, 3)


@run_in_kernel
async def test_an_attempt_that_cancels_its_own_task_is_none():
    async def operation():
        begun.append(1)
        if len(begun) == 1:
            raise OSError("first")
        flowcoro.current_task().cancel()
        await flowcoro.sleep(0)

    begun, operation.idempotent = [], True
    with pytest.raises(OSError, match="first"):
        await Hedge(1.0).try_execute(operation)


@run_in_kernel
async def test_attempts_that_have_all_been_cancelled_are_a_cancelled_task():
    async def operation():
        await flowcoro.sleep(2)
        raise flowcoro.Cancelled

    hedge = Hedge(1.0, idempotent=True)
    with pytest.raises(flowcoro.TaskCancelled, match="all attempts have cancelled themselves"):
        await hedge.try_execute(operation)


@run_in_kernel
async def test_nothing_is_garbage_after_a_call_that_fails():
    async def fail():
        await flowcoro.sleep(1)
        raise ConnectionError("down")

    fail.idempotent = True
    gc.collect()
    gc.disable()
    try:
        try:
            await Hedge(0.5).try_execute(fail)
        except ConnectionError:
            pass
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_what_ends_the_program_ends_all_attempts_and_a_result_that_had_come_is_let_go_of():
    dropped = []

    async def operation():
        begun.append(1)
        if len(begun) == 2:
            return "second"
        try:
            await flowcoro.sleep(9)
        finally:
            raise SystemExit(3)

    begun, operation.idempotent, operation.discard = [], True, dropped.append
    with pytest.raises(SystemExit):
        flowcoro.run(Hedge(1.0).try_execute(operation), clock=VirtualClock())
    assert dropped == ["second"]


@pytest.mark.parametrize("make, error, message", [
    (lambda: Hedge(-1), ValueError, "Hedge(after=-1): give a number of seconds from 0 up"),
    (lambda: Hedge("1"), TypeError, "Hedge(after='1')"),
    (lambda: Hedge(percentile=95), ValueError, "Hedge(percentile=95): give a number of calls in one more than 0 to 1"),
    (lambda: Hedge(percentile=1), ValueError, "no call takes longer than all"),
    (lambda: Hedge(percentile=0), ValueError, "Hedge(percentile=0)"),
    (lambda: Hedge(percentile=0.9, window=0), ValueError, "Hedge(window=0)"),
    (lambda: Hedge(percentile=0.9, window=5, minimum=6), ValueError, "Hedge(minimum=6, window=5): there are never so many"),
    (lambda: Hedge(1.0, minimum=6), ValueError, "that is for a percentile, and there is none"),
    (lambda: Hedge(max_hedges=0), ValueError, "Hedge(max_hedges=0): give a number of attempts besides the first, from 1 up"),
    (lambda: Hedge(budget=0.2), TypeError, "Hedge(budget=0.2)"),
    (lambda: Hedge(errors=5), TypeError, "Hedge(errors=5)"),
    (lambda: Hedge(ignored=5), TypeError, "Hedge(ignored=5)"),
    (lambda: Hedge(clock=5), TypeError, "Hedge(clock=5)"),
    (lambda: Hedge(errors=flowcoro.when_all), TypeError, "this one is async"),
    (lambda: Hedge(idempotent="no"), TypeError, "Hedge(idempotent='no'): give True or False"),
    (lambda: LatencyWindow(2), ValueError, "LatencyWindow(percentile=2)"),
    (lambda: LatencyWindow(0.5, 0), ValueError, "LatencyWindow(size=0)"),
])
def test_impossible_settings_are_refused(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)
