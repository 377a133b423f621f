"""flowcoro_resilience: RetryBudget, Retry, Timeout, Fallback. On the virtual clock.

FLOWCORO_SEEDS=1000 makes a thousand random runs of each kind. A failure names its seed.
"""

import gc
import itertools
import math
import os
import random
import sys
import threading
import traceback

import pytest

import flowcoro
import flowcoro_resilience
from flowcoro_resilience import Fallback, Keyed, Pipeline, Rejected, Retry, RetryBudget, Timeout, _Backoff
from flowcoro_testing import VirtualClock, run_in_kernel
from test_net_cancel import at_each_point

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 30)))

workers = pytest.mark.parametrize("workers", [1, 3])


class Failing:
    """An operation that fails `times` times, each with another error, and then succeeds. `sent` is that of the errors."""

    idempotent = True

    def __init__(self, times, *, seconds=0.0, error=ConnectionError, **attributes):
        self.times, self.seconds, self.error, self.attributes, self.calls, self.raised = times, seconds, error, attributes, 0, []

    async def __call__(self):
        self.calls += 1
        number = self.calls
        await flowcoro.sleep(self.seconds)
        if number <= self.times:
            error = self.error(f"attempt {number}")
            vars(error).update(self.attributes)
            self.raised.append(error)
            raise error
        return number


class Scripted:
    """An operation whose calls bring one after the other what is given: results, or errors to raise."""

    idempotent = True

    def __init__(self, *outcomes):
        self.outcomes = iter(outcomes)

    async def __call__(self):
        outcome = next(self.outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def plain(**settings):
    """A Retry whose waits are known: 1, 2, 4, … seconds."""
    return Retry(**{"first": 1.0, "most": 100.0, "jitter": "none", **settings})


def chain(error):
    """The errors that a traceback shows, the last first."""
    found = []
    while error is not None:
        assert error not in found, "a circle"
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


# ---- Backoff ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", SEEDS)
def test_waits_are_as_their_jitter_says(seed):
    chance = random.Random(seed)
    first, most, times = chance.uniform(0, 2), chance.uniform(2, 50), chance.uniform(1, 4)
    full, none = _Backoff(first, most, times), _Backoff(first, most, times, "none")
    decorrelated, previous = _Backoff(first, most, times, "decorrelated"), 0.0
    for attempt in range(1, 40):
        drawn = chance.random()
        ceiling = first
        for _ in range(attempt - 1):
            ceiling = min(most, ceiling * times)
        assert none.next_delay(attempt, 0.0, drawn) == pytest.approx(min(most, ceiling))
        assert full.next_delay(attempt, 0.0, drawn) == pytest.approx(drawn * min(most, ceiling))
        low, high = first, 3 * (previous if previous > first else first)
        delay = decorrelated.next_delay(attempt, previous, drawn)
        assert delay == pytest.approx(min(most, low + (high - low) * drawn)) and first <= delay <= most
        previous = delay


def test_the_wait_before_attempt_ten_thousand_is_the_longest():
    assert _Backoff().next_delay(10_000, 1.0, 0.5) == 5.0 and _Backoff(first=0).next_delay(10_000, 1.0, 0.5) == 0.0


def test_what_was_asked_for_is_waited_at_least_and_not_by_all_alike():
    full, none = _Backoff(), _Backoff(jitter="none")
    assert full.not_before(0.5, 0.0, 0.7) == 0.5
    assert [full.not_before(0.1, 60.0, chance) for chance in (0.0, 0.5, 1.0)] == [60.1, 67.5, 75.0]
    assert full.not_before(5.0, 1.0, 0.5) == 6.0
    assert (none.not_before(0.5, 60.0, 0.7), none.not_before(5.0, 1.0, 0.7)) == (60.0, 5.0)


# ---- RetryBudget -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", SEEDS)
def test_a_budget_is_a_share_of_the_calls_lately_and_a_floor(seed):
    chance = random.Random(seed)
    ratio, floor, seconds = chance.choice([0, 0.25, 1]), chance.choice([0.5, 1, 3]), chance.choice([2.5, 5, 10])
    now = clock = 0.0                                   # the time, and what the clock says, which jumps back
    budget, events, length = RetryBudget(ratio, floor, seconds, clock=lambda: clock), [], seconds / 10
    for _ in range(300):
        if events and chance.random() < 0.1:
            clock -= chance.randint(0, 300) / 8
        else:
            step = chance.choice([0, 0, length / 4, length, chance.randint(0, 160) / 8])
            now, clock = now + step, clock + step
        if chance.random() < 0.6:
            budget.deposit()
            events.append((now, "call"))
        else:
            lately = [what for when, what in events if when // length > now // length - 10]
            allowed = lately.count("again") + 1 <= ratio * lately.count("call") + floor * seconds
            assert budget.withdraw() == allowed
            events += [(now, "again")] * allowed
    assert budget.statistics()["withdrawn"] == [what for _, what in events].count("again")


def test_a_budget_whose_clock_goes_back_stands_still_and_goes_on():
    now = [100.0]
    budget = RetryBudget(0.0, 1.0, 10.0, clock=lambda: now[0])
    assert [budget.withdraw() for _ in range(11)] == [True] * 10 + [False]
    now[0] = 0.0
    assert not budget.withdraw()
    now[0] = 9.0                    # nine seconds later, whatever it says
    assert not budget.withdraw()
    now[0] = 10.0
    assert [budget.withdraw() for _ in range(11)] == [True] * 10 + [False]


def test_threads_together_get_no_more_than_the_budget_has():
    budget, barrier, granted = RetryBudget(0.0, 10.0, 100.0), threading.Barrier(4), []

    def ask():
        barrier.wait()
        granted.append(sum(budget.withdraw() for _ in range(600)))

    threads, interval = [threading.Thread(target=ask) for _ in range(4)], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sum(granted) == 1000 and budget.statistics()["refused"] == 1400


@run_in_kernel
async def test_a_call_that_passes_several_policies_with_one_budget_counts_once():
    budget = RetryBudget()
    policies = [Retry(budget=budget, idempotent=True), Keyed(lambda key: Retry(budget=budget), key=lambda: "k"),
                Retry(budget=budget)]
    assert await Pipeline(*policies).try_execute(Failing(1)) == 2
    numbers = budget.statistics()
    assert (numbers["calls"], numbers["repetitions"], numbers["left"]) == (1, 1, pytest.approx(99.2))
    assert not budget._counted


@run_in_kernel
async def test_what_is_made_again_is_a_fifth_of_the_calls_while_all_fails():
    budget = RetryBudget(0.2, 0.0)
    policies = [plain(attempts=4, budget=budget, first=0.01), plain(attempts=4, budget=budget, first=0.01)]
    operation = Failing(10**9)
    for number in range(1000):
        with pytest.raises(ConnectionError):
            await policies[number % 2].try_execute(operation)
    assert operation.calls == 1200
    note = operation.raised[-1].__notes__[0]
    assert note == "Retry: attempt 2 of 4, after 0.01 s; 'RetryBudget' is spent"
    assert policies[0].statistics()["gave_up"]["budget"] + policies[1].statistics()["gave_up"]["budget"] == 1000
    unlimited = plain(attempts=4, budget=RetryBudget(floor=math.inf), first=0.0)
    for _ in range(100):
        with pytest.raises(ConnectionError):
            await unlimited.try_execute(operation)
    assert operation.calls == 1600


# ---- the decision ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("meant, left, safe, asked, fits", [
    *itertools.product([0, 1], [0, 1], [0, 1], [0.0, 3.0, 9.0], [0, 1])])
def test_each_reason_not_to_do_it_again(meant, left, safe, asked, fits):
    attempts = flowcoro_resilience._Attempts(100.0, 100.0)
    attempts.number = 2 if left else 3
    now = 199.0 - max(2.0, asked) if fits else 200.0 - max(2.0, asked)
    expected = ("final" if not meant else "attempts" if not left else "unsafe" if not safe else "wait" if asked > 5.0
                else "deadline" if not fits else None)
    reason, delay = attempts.may_repeat(3, _Backoff(1.0, 10.0, 2.0, "none"), 5.0, meant, safe, asked, 0.5, now)
    assert reason == expected and delay == (max(2.0, asked) if reason is None else 0.0)
    assert attempts.number == (2 if left else 3) + (reason is None)
    assert attempts.delay == (2.0 if reason is None else 0.0)       # what was asked for makes no later wait longer


# ---- Retry -----------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_it_waits_longer_each_time_and_brings_what_comes_in_the_end():
    retry, operation, heard = plain(attempts=4), Failing(3), []
    retry.add_listener(lambda event: heard.append((event.kind, *event.details.values())))
    assert await retry.try_execute(operation) == 4
    assert flowcoro.now() == 7.0
    assert heard == [("retried", 1, 1.0, operation.raised[0]), ("retried", 2, 2.0, operation.raised[1]),
                     ("retried", 3, 4.0, operation.raised[2]), ("recovered", 4)]
    numbers = retry.statistics()
    assert numbers.pop("budget")["repetitions"] == 3
    assert numbers == {"name": "Retry", "calls": 1, "retries": 3, "recovered": 1, "gave_up": {}}


@run_in_kernel
async def test_the_last_error_is_raised_itself_with_the_others_below_and_a_note():
    retry, operation, heard = plain(attempts=3, name="ask"), Failing(9, seconds=0.1), []
    retry.add_listener(lambda event: heard.append((event.kind, event.details)))
    with pytest.raises(ConnectionError, match="attempt 3") as caught:
        await retry.try_execute(operation)
    first, second, third = operation.raised
    assert retry.budget.statistics()["withdrawn"] == 2
    assert caught.value is third and third.__notes__ == ["ask: attempt 3 of 3, after 3.3 s"]
    _, group = chain(third)
    assert isinstance(group, ExceptionGroup) and group.exceptions == (first, second)
    assert str(group) == "ask: attempts before (2 sub-exceptions)"
    assert heard[-1] == ("gave_up", {"attempts": 3, "reason": "attempts", "outcome": third})
    shown = "".join(traceback.format_exception(third))
    assert shown.index("attempt 1") < shown.index("attempt 2") < shown.index("attempt 3") < shown.index("ask: attempt 3 of 3")


@run_in_kernel
async def test_reasons_that_the_last_error_has_already_are_kept():
    async def fail():
        try:
            try:
                raise OSError("the cable")
            except OSError as error:
                raise ValueError("the line") from error
        except ValueError:
            raise ConnectionError("the call")

    fail.idempotent = True
    with pytest.raises(ConnectionError) as caught:
        await plain().try_execute(fail)
    assert [type(error) for error in chain(caught.value)] == [ConnectionError, ValueError, OSError, ExceptionGroup]
    assert [str(error) for error in chain(caught.value)[-1].exceptions] == ["the call"] * 2


@run_in_kernel
async def test_an_error_object_that_is_raised_again_and_again_does_not_grow():
    cause, shared = OSError("down"), []

    async def fail():
        raise shared[0]

    async def fail_otherwise():
        raise ValueError("this time") if next(numbers) == 0 else shared[0]

    fail.idempotent = fail_otherwise.idempotent = True
    inner, outer = plain(name="inner"), plain(name="outer")
    shared.append(KeyError("shared"))
    with pytest.raises(ConnectionError) as caught:
        await plain(errors=KeyError).try_execute(Scripted(shared[0], shared[0], ConnectionError("another")))
    assert chain(caught.value)[1].exceptions == (shared[0],)
    shared[0].__cause__ = cause
    for _ in range(3):
        numbers = itertools.count()
        with pytest.raises(KeyError) as caught:
            await outer.try_execute(inner.try_execute, fail_otherwise)
        assert caught.value is shared[0] and len(caught.value.__notes__) <= 2
        links = chain(caught.value)
        assert links[:2] == [shared[0], cause] and len(links) <= 4
    with pytest.raises(KeyError):
        await inner.try_execute(fail)
    assert [str(error) for error in chain(shared[0])] == ["'shared'", "down"]


@run_in_kernel
async def test_errors_that_share_their_reason_make_no_circle():
    reason, number = OSError("down"), itertools.count(1)

    async def fail():
        raise ConnectionError(next(number)) from reason

    fail.idempotent = True
    with pytest.raises(ConnectionError) as caught:
        await plain().try_execute(fail)
    assert chain(caught.value) == [caught.value, reason]
    assert caught.value.__notes__ == ["Retry: attempt 3 of 3, after 3 s"]


@run_in_kernel
async def test_an_error_that_takes_no_notes_is_raised_all_the_same():
    class Frozen(Exception):
        def __setattr__(self, name, value):
            raise TypeError("frozen")

        def add_note(self, note):
            raise TypeError("frozen")

    with pytest.raises(Frozen):
        await plain(idempotent=True).try_execute(lambda: (_ for _ in ()).throw(Frozen("cold")))


@run_in_kernel
async def test_only_what_may_be_done_twice_is():
    async def once():
        calls.append(1)
        raise ConnectionError("perhaps it was done")

    calls = []
    with pytest.raises(ConnectionError) as caught:
        await plain().try_execute(once)
    assert len(calls) == 1 and "idempotent" in caught.value.__notes__[0]
    assert caught.value.__notes__[0].startswith("Retry: attempt 1 of 3, after 0 s; not made again")
    with pytest.raises(ConnectionError):
        await plain(idempotent=True).try_execute(once)
    assert len(calls) == 4
    once.idempotent = True
    with pytest.raises(ConnectionError):
        await plain().try_execute(once)
    assert len(calls) == 7


@run_in_kernel
async def test_what_was_not_sent_is_done_again_whatever_it_is():
    for sent, calls in ((False, 3), (None, 1), (True, 1), (0, 1)):
        operation = Failing(9, sent=sent)
        operation.idempotent = False
        with pytest.raises(ConnectionError):
            await plain().try_execute(operation)
        assert operation.calls == calls
    operation = Failing(1, error=Rejected)
    operation.idempotent = False
    assert await plain(ignored=None).try_execute(operation) == 2


@run_in_kernel
async def test_what_a_policy_within_has_rejected_is_not_tried_again_unless_that_is_wanted():
    operation = Failing(1, error=Rejected, retry_after=0.1)
    with pytest.raises(Rejected):
        await plain().try_execute(operation)
    assert operation.calls == 1


@run_in_kernel
async def test_what_it_is_asked_to_wait_it_waits_and_gives_up_at_once_if_that_is_too_long():
    assert await plain().try_execute(Failing(1, retry_after=5)) == 2
    assert flowcoro.now() == 5.0
    for policy, text in ((plain(max_wait=4.0), "asks to wait 5 s, and max_wait=4"), (plain(total_seconds=5), "total_seconds=5")):
        began = flowcoro.now()
        with pytest.raises(ConnectionError) as caught:
            await policy.try_execute(Failing(9, retry_after=5))
        assert flowcoro.now() == began and text in caught.value.__notes__[0]
    with pytest.raises(ConnectionError):
        await plain(max_wait=math.inf).try_execute(Failing(9, retry_after=math.inf))
    for most in (30.0, math.inf):
        with pytest.raises(ConnectionError):
            await plain(max_wait=most).try_execute(Failing(9, retry_after=10**400))
    for odd in (None, -1, math.nan, "5", True, object()):
        began = flowcoro.now()
        assert await plain(first=2.0).try_execute(Failing(1, retry_after=odd)) == 2
        assert flowcoro.now() == began + 2.0
    assert await Retry().try_execute(Failing(1, retry_after=math.nan)) == 2


@run_in_kernel
async def test_chance_is_from_0_to_1_whatever_its_function_gives():
    for given, waited in ((math.nan, 0.0), (-1.0, 0.0), (0.5, 1.0), (7, 2.0)):
        began = flowcoro.now()
        assert await Retry(first=2.0, random=lambda: given).try_execute(Failing(1)) == 2
        assert flowcoro.now() == began + waited


@run_in_kernel
async def test_many_that_are_told_the_same_time_come_spread():
    retry, came = Retry(random=random.Random(1).random, idempotent=True, max_wait=60), []

    async def ask():
        operation = Failing(1, retry_after=40)
        await retry.try_execute(operation)
        came.append(flowcoro.now())

    async with flowcoro.TaskGroup() as group:
        for _ in range(90):
            group.spawn(ask())
    assert all(40 <= when <= 50.2 for when in came) and max(came) - min(came) > 8


@run_in_kernel
async def test_which_errors_are_tried_again_is_said_by_type_or_predicate():
    for settings, error, calls in (
            ({"errors": OSError}, ConnectionError, 3), ({"errors": (KeyError, ValueError)}, ConnectionError, 1),
            ({"errors": lambda error: "attempt 1" in str(error)}, KeyError, 2), ({"errors": None}, KeyError, 1),
            ({"ignored": ConnectionError}, ConnectionError, 1), ({"ignored": KeyError}, ConnectionError, 3)):
        operation = Failing(9, error=error)
        with pytest.raises(error) as caught:
            await plain(**settings).try_execute(operation)
        assert operation.calls == calls
        if calls == 1:
            assert not hasattr(caught.value, "__notes__")


@run_in_kernel
async def test_what_a_task_group_raises_is_tried_again_if_all_of_it_may_be():
    for settings, kinds, calls in (
            ({"errors": OSError}, (OSError, ConnectionError), 3), ({"errors": OSError}, (OSError, KeyError), 1),
            ({"ignored": KeyError}, (OSError, KeyError), 1), ({}, (OSError, Rejected), 1), ({}, (OSError,), 3)):
        operation = Failing(9, error=lambda text: ExceptionGroup(text, [kind(text) for kind in kinds]))
        with pytest.raises(ExceptionGroup):
            await plain(**settings).try_execute(operation)
        assert operation.calls == calls
        with pytest.raises(ExceptionGroup):
            await Fallback(5, errors=KeyError).try_execute(operation)
    assert await Fallback(5, errors=(OSError, KeyError)).try_execute(Failing(9, error=operation.error)) == 5


@run_in_kernel
async def test_results_that_are_no_good_are_let_go_of_and_the_last_one_is_returned():
    dropped, numbers = [], itertools.count(1)

    async def ask():
        return next(numbers)

    async def discard(result):
        await flowcoro.sleep(0.5)
        dropped.append(result)

    ask.idempotent, ask.discard = True, discard
    retry = plain(result=lambda number: number % 5 != 0)
    assert await retry.try_execute(ask) == 3 and dropped == [1, 2]
    assert flowcoro.now() == 4.0
    assert await retry.try_execute(ask) == 5 and dropped == [1, 2, 4]
    assert retry.statistics()["gave_up"] == {"attempts": 1} and retry.statistics()["recovered"] == 1


@run_in_kernel
async def test_results_say_themselves_how_long_to_wait():
    class Answer:
        def __init__(self, status):
            self.status, self.retry_after = status, 7.0

    answers = [Answer(503), Answer(200)]
    retry = plain(result=lambda answer: answer.status == 503, idempotent=True)
    assert (await retry.try_execute(lambda: answers.pop(0))).status == 200
    assert flowcoro.now() == 7.0


@run_in_kernel
async def test_an_attempt_that_takes_too_long_is_cancelled_and_counts_as_a_timeout():
    ended = []

    async def slow():
        try:
            await flowcoro.sleep(5 if len(ended) < 2 else 0.5)
            return "done"
        finally:
            ended.append(flowcoro.now())

    slow.idempotent = True
    assert await plain(attempt_seconds=2.0).try_execute(slow) == "done"
    assert ended == [2.0, 5.0, 7.5]
    ended.clear()
    with pytest.raises(TimeoutError) as caught:
        await plain(attempts=2, attempt_seconds=2.0, name="ask").try_execute(slow)
    assert str(caught.value) == "ask: attempt 2 of 2 was not done within attempt_seconds=2"
    assert isinstance(caught.value.__cause__, flowcoro.Cancelled) and isinstance(chain(caught.value)[-1], ExceptionGroup)


@run_in_kernel
async def test_there_is_no_attempt_and_no_wait_beyond_the_total():
    operation = Failing(9, seconds=1.0)
    with pytest.raises(ConnectionError, match="attempt 2") as caught:
        await plain(attempts=9, total_seconds=5.0).try_execute(operation)      # 1, wait 1, 1, and 2 + 3 do not fit
    assert flowcoro.now() == 3.0 and "no time is left for more of total_seconds=5" in caught.value.__notes__[0]
    with pytest.raises(TimeoutError, match="total_seconds=1.5 are over, in attempt 2 of 9") as caught:
        await plain(attempts=9, first=0.2, total_seconds=1.5).try_execute(Failing(9, seconds=1.0))
    assert flowcoro.now() == 4.5 and [str(error) for error in chain(caught.value)[-1].exceptions] == ["attempt 1"]
    with pytest.raises(TimeoutError, match="attempt_seconds=1"):
        await plain(attempts=1, attempt_seconds=1, total_seconds=2).try_execute(Failing(0, seconds=3))


@run_in_kernel
async def test_a_clock_that_is_faster_than_the_sleep_begins_no_attempt_after_the_total():
    ahead = [0.0]

    def clock():
        return flowcoro.now() + ahead[0]

    async def hurry():
        await flowcoro.sleep(0.5)
        ahead[0] += 100

    for operation, expected in ((Failing(9), ConnectionError), (lambda: "no good", TimeoutError)):
        async with flowcoro.TaskGroup() as group:
            group.spawn(hurry())
            with pytest.raises(expected) as caught:
                await plain(total_seconds=50, idempotent=True, result="no good".__eq__, clock=clock).try_execute(operation)
        if expected is ConnectionError:
            assert operation.calls == 1 and caught.value is operation.raised[0]


@run_in_kernel
async def test_when_the_time_is_over_after_a_result_that_was_no_good_that_is_a_timeout():
    ahead = [0.0]

    def is_bad(result):
        ahead[0] += 100
        return True

    def clock():
        return flowcoro.now() + (ahead[0] if flowcoro.now() > 1.5 else 0.0)     # after the wait of two seconds

    error = ConnectionError("first")
    with pytest.raises(TimeoutError, match="total_seconds=50 are over, in attempt 3 of 3") as caught:
        await plain(total_seconds=50, result=is_bad, clock=clock).try_execute(Scripted(error, "no good"))
    assert chain(caught.value)[1].exceptions == (error,)


@run_in_kernel
async def test_a_result_that_is_slow_to_let_go_of_makes_no_wait_longer():
    async def discard(result):
        await flowcoro.sleep(3.5)

    operation = Scripted("no good", "good")
    operation.discard = discard
    with pytest.raises(TimeoutError):
        await plain(first=1.0, total_seconds=4, result="no good".__eq__).try_execute(operation)
    assert flowcoro.now() == 4.0


@run_in_kernel
async def test_a_clock_that_goes_back_makes_the_total_no_longer():
    now = [1000.0]
    operation = Failing(9)

    def clock():
        now[0] -= 500.0
        return now[0]

    with pytest.raises(ConnectionError):
        await plain(attempts=3, total_seconds=10.0, clock=clock).try_execute(operation)
    assert operation.calls == 3


@run_in_kernel
async def test_predicates_that_raise_mean_no_and_are_reported(reports):
    def bad(outcome):
        raise RuntimeError("a predicate of mine")

    operation = Failing(9)
    with pytest.raises(ConnectionError):
        await plain(errors=bad).try_execute(operation)
    assert operation.calls == 1
    assert await plain(result=bad, idempotent=True).try_execute(lambda: 5) == 5
    assert await plain(ignored=bad).try_execute(Failing(1)) == 2
    assert [message for message, _ in reports] == [
        f"flowcoro_resilience: the predicate Retry({name}=…) of 'Retry' failed, which means no"
        for name in ("errors", "result", "ignored")]


@run_in_kernel
async def test_it_may_be_used_within_itself():
    retry = plain(attempts=2)
    inner = Failing(9)

    async def outer():
        return await retry.try_execute(inner)

    outer.idempotent = True
    with pytest.raises(ConnectionError) as caught:
        await retry.try_execute(outer)
    assert inner.calls == 4 and caught.value is inner.raised[-1]


@run_in_kernel
async def test_nothing_is_garbage_after_a_call_that_fails():
    async def fail():
        await flowcoro.sleep(next(seconds))
        raise ConnectionError("down")

    fail.idempotent, seconds = True, itertools.cycle([0, 9])
    gc.collect()
    gc.disable()
    try:
        for policy in (plain(attempt_seconds=2.0), Timeout(1), plain(attempts=2, total_seconds=4.0)):
            try:
                await policy.try_execute(fail)
            except (ConnectionError, TimeoutError):
                pass
            assert gc.collect() == 0
    finally:
        gc.enable()


@workers
def test_cancelled_at_each_point_it_ends_at_once_and_leaves_nothing(workers):
    async def main():
        retry, dropped = Retry(attempts=4, first=0.001, idempotent=True, attempt_seconds=5, total_seconds=9,
                               result="no good".__eq__), []

        async def discard(result):
            dropped.append(result)
            await flowcoro.sleep(0)

        def call():
            numbers = itertools.count()

            async def operation():
                await flowcoro.sleep(0)
                number = next(numbers)
                if number == 0:
                    raise ConnectionError("not yet")
                return "no good" if number < 3 else "good"

            operation.discard = discard
            return retry.try_execute(operation)

        async def after(cancelled):
            assert not retry.budget._counted

        assert await at_each_point(call, after) > 8
        numbers = retry.statistics()
        assert numbers["recovered"] == 1 and numbers["gave_up"] == {}

    flowcoro.run(main(), workers=workers)


@pytest.mark.parametrize("seed", SEEDS)
def test_many_calls_in_any_order_are_as_each_by_itself(seed):
    """Each call against a model that knows what its operation will bring; all share a Retry and a budget that is large enough."""
    chance = random.Random(seed)
    attempts, total = chance.randint(1, 5), chance.choice([None, 3.0, 20.0])
    attempt_seconds = chance.choice([None, 1.5])
    retry = Retry(attempts, first=1.0, most=4.0, jitter="none", attempt_seconds=attempt_seconds, total_seconds=total,
                  errors=(ConnectionError, TimeoutError), result=lambda result: result < 0, max_wait=6.0)

    def script():
        return [(chance.choice([0.0, 0.53, 1.07, 2.11]), chance.choice(["good", "bad", "down", "down", "wrong"]),
                 chance.choice([None, None, 3.0, 9.0]), chance.random() < 0.8) for _ in range(5)]

    class Operation:
        def __init__(self, script, idempotent):
            self.script, self.idempotent, self.calls = script, idempotent, 0

        async def __call__(self):
            seconds, kind, retry_after, sent = self.script[self.calls]
            self.calls += 1
            await flowcoro.sleep(seconds)
            if kind in ("good", "bad"):
                return self.calls if kind == "good" else -self.calls
            error = (ConnectionError if kind == "down" else KeyError)(self.calls)
            error.retry_after, error.sent = retry_after, sent
            raise error

    def model(script, idempotent):
        """(what comes, how many calls, when)"""
        when = 0.0
        for number, (seconds, kind, retry_after, sent) in enumerate(script, 1):
            limit = min(attempt_seconds or math.inf, (total or math.inf) - when)
            when, what = when + min(seconds, limit), "late" if seconds > limit else kind
            if what == "good" or what == "wrong":
                return what, number, when
            safe = idempotent or (what == "down" and not sent)
            asked = retry_after if what == "down" and retry_after else 0.0
            wait = max(min(4.0, 2.0**(number - 1)), asked)
            if number == attempts or not safe or asked > 6.0 or (total and when + wait >= total):
                return what, number, when
            when += wait

    async def one(begin):
        await flowcoro.sleep(begin)
        steps, idempotent = script(), chance.random() < 0.7
        operation, began = Operation(steps, idempotent), flowcoro.now()
        try:
            result = await retry.try_execute(operation)
            what = "good" if result > 0 else "bad"
        except ConnectionError:
            what = "down"
        except KeyError:
            what = "wrong"
        except TimeoutError:
            what = "late"
        expected = model(steps, idempotent)
        assert (what, operation.calls) == expected[:2], (seed, steps, idempotent)
        assert flowcoro.now() - began == pytest.approx(expected[2]), (seed, steps, idempotent)

    async def main():
        async with flowcoro.TaskGroup() as group:
            for _ in range(12):
                group.spawn(one(chance.choice([0.0, 0.25, 1.0])))

    flowcoro.run(main(), clock=VirtualClock(), seed=seed)
    assert not retry.budget._counted and retry.statistics()["calls"] == 12


def test_with_several_workers_each_call_is_counted():
    retry = Retry(first=0.0, idempotent=True, budget=RetryBudget(floor=math.inf))

    async def main():
        async def caller():
            for _ in range(30):
                assert await retry.try_execute(Failing(1)) == 2

        async with flowcoro.TaskGroup() as group:
            for _ in range(20):
                group.spawn(caller())

    flowcoro.run(main(), workers=3)
    numbers = retry.statistics()
    assert (numbers["calls"], numbers["retries"], numbers["recovered"]) == (600, 600, 600)
    assert numbers["budget"]["withdrawn"] == 600


@pytest.mark.parametrize("make, error, message", [
    (lambda: Retry(0), ValueError, "Retry(attempts=0): give a number of attempts in all, from 1 up"),
    (lambda: Retry(2.5), TypeError, "Retry(attempts=2.5)"),
    (lambda: Retry(first=-1), ValueError, "Retry(first=-1): give a number of seconds from 0 up"),
    (lambda: Retry(first=2, most=1), ValueError, "Retry(first=2, most=1): the longest wait is finite, and no less"),
    (lambda: Retry(most=math.inf), ValueError, "the longest wait is finite"),
    (lambda: Retry(times=0.5), ValueError, "Retry(times=0.5): give a number of times as long from 1 up"),
    (lambda: Retry(jitter="some"), ValueError, "Retry(jitter='some'): give one of 'full', 'decorrelated', 'none'"),
    (lambda: Retry(jitter=[]), ValueError, "Retry(jitter=[])"),
    (lambda: Retry(attempt_seconds=0), ValueError, "Retry(attempt_seconds=0): give a number of seconds more than 0 up"),
    (lambda: Retry(total_seconds=math.nan), ValueError, "Retry(total_seconds=nan)"),
    (lambda: Retry(attempt_seconds=3, total_seconds=2), ValueError, "no attempt can have more time than all have together"),
    (lambda: Retry(max_wait=-1), ValueError, "Retry(max_wait=-1)"),
    (lambda: Retry(errors=5), TypeError, "Retry(errors=5): give an exception type, a tuple of them, a predicate, or None"),
    (lambda: Retry(ignored="x"), TypeError, "Retry(ignored='x')"),
    (lambda: Retry(result=5), TypeError, "Retry(result=5)"),
    (lambda: Retry(budget=5), TypeError, "Retry(budget=5): give a RetryBudget, or None for one of its own"),
    (lambda: Retry(random=0.5), TypeError, "Retry(random=0.5)"),
    (lambda: Retry(clock=5), TypeError, "Retry(clock=5): give a function"),
    (lambda: Retry(errors=BaseException), TypeError, "Retry(errors=BaseException): give types of Exception"),
    (lambda: Retry(ignored=(KeyError, int)), TypeError, "Retry(ignored=int): give types of Exception"),
    (lambda: Retry(errors=flowcoro.when_all), TypeError, "this one is async, or a generator, and nobody awaits"),
    (lambda: Retry(random=flowcoro.when_all), TypeError, "this one is async"),
    (lambda: Retry(idempotent=bool), TypeError, "give True or False; what depends on the operation is its attribute"),
    (lambda: Retry(max_wait=10**400), ValueError, "Retry(max_wait=1000"),
    (lambda: RetryBudget(-0.1), ValueError, "RetryBudget(ratio=-0.1)"),
    (lambda: RetryBudget(floor=-1), ValueError, "RetryBudget(floor=-1)"),
    (lambda: RetryBudget(seconds=0), ValueError, "RetryBudget(seconds=0)"),
    (lambda: RetryBudget(0, 0.05), ValueError, "allows nothing"),
    (lambda: Timeout(0), ValueError, "Timeout(seconds=0): give a number of seconds more than 0 up"),
    (lambda: Timeout(None), TypeError, "Timeout(seconds=None)"),
    (lambda: Fallback(0, errors=3), TypeError, "Fallback(errors=3)"),
    (lambda: Fallback(Failing(1)()), TypeError, "Fallback() got a coroutine object"),
])
def test_impossible_settings_are_refused(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


# ---- Timeout ---------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_a_timeout_names_itself_and_says_where_it_was():
    policy, heard = Timeout(2.0, name="ask"), []
    policy.add_listener(lambda event: heard.append((event.kind, event.details)))
    assert await policy.try_execute(Failing(0, seconds=1.0)) == 1
    with pytest.raises(TimeoutError, match="ask: it was not done within 2 s") as caught:
        await policy.try_execute(Failing(0, seconds=3.0))
    assert flowcoro.now() == 3.0
    assert "await flowcoro.sleep(self.seconds)" in "".join(traceback.format_exception(caught.value.__cause__))
    assert heard == [("timed_out", {"seconds": 2.0})]
    assert policy.statistics() == {"name": "ask", "seconds": 2.0, "calls": 2, "timed_out": 1}
    with pytest.raises(ConnectionError):
        await policy.try_execute(Failing(1))


@run_in_kernel
async def test_of_nested_timeouts_each_is_told_from_the_other_and_from_a_cancel():
    pipeline = Pipeline(Timeout(5, name="all"), plain(attempts=3, first=0.5), Timeout(2, name="each"))
    operation = Failing(0, seconds=9)
    with pytest.raises(TimeoutError, match="all: it was not done within 5 s"):
        await pipeline.try_execute(operation)
    assert flowcoro.now() == 5.0 and operation.calls == 2
    with flowcoro.move_on_after(1) as scope:
        await pipeline.try_execute(operation)
    assert scope.cancelled_caught and [one["timed_out"] for one in (pipeline.policies[0].statistics(),
                                                                     pipeline.policies[2].statistics())] == [1, 2]


# ---- Fallback --------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_a_fallback_gives_a_value_or_what_a_function_of_the_error_brings():
    async def later(error):
        await flowcoro.sleep(1)
        return f"instead of {error}"

    operation = Failing(9)
    assert await Fallback([]).try_execute(operation) == []
    assert await Fallback(None).try_execute(operation) is None
    assert await Fallback(lambda error: str(error)).try_execute(operation) == "attempt 3"
    assert await Fallback(later).try_execute(operation) == "instead of attempt 4"
    assert await Fallback(5).try_execute(lambda: 7) == 7


@run_in_kernel
async def test_a_fallback_is_for_its_errors_and_an_error_of_its_own_tells_of_the_first():
    heard, operation = [], Failing(9)
    policy = Fallback(lambda error: 1 / 0, errors=lambda error: isinstance(error, OSError), name="instead")
    policy.add_listener(lambda event: heard.append((event.kind, event.details["error"])))
    with pytest.raises(ZeroDivisionError) as caught:
        await policy.try_execute(operation)
    assert caught.value.__context__ is operation.raised[0]
    assert heard == [("fell_back", operation.raised[0]), ("failed", caught.value)]
    with pytest.raises(KeyError):
        await policy.try_execute(Failing(9, error=KeyError))
    assert policy.statistics() == {"name": "instead", "calls": 2, "fell_back": 1, "failed": 1}
    with flowcoro.move_on_after(1) as scope:
        await policy.try_execute(Failing(0, seconds=9))
    assert scope.cancelled_caught
