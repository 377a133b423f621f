"""flowcoro_resilience: AdaptiveBreaker. Decisions against a naive model; the front on the virtual clock."""

import os
import random
import threading

import pytest

import flowcoro
from flowcoro_resilience import AdaptiveBreaker, BreakerOpen, Pipeline, PolicyEvent, TimeWindow, _Throttle
from flowcoro_testing import run_in_kernel
from test_net_cancel import at_each_point

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 40)))


class Down(Exception):
    """Of the operation: not accepted."""


class NotFound(Exception):
    """Of the operation: an answer."""


def accepted():
    return "done"


def failed():
    raise Down


async def slow(seconds=1.0):
    await flowcoro.sleep(seconds)
    return "done"


async def outcome(breaker, operation, *args):
    """"accepted", "failed" or "rejected"."""
    try:
        await breaker.try_execute(operation, *args)
        return "accepted"
    except Down:
        return "failed"
    except BreakerOpen:
        return "rejected"


async def all_failed(breaker, count):
    """So many calls that are let through fail."""
    for _ in range(count):
        with pytest.raises(Down):
            await breaker.try_execute(failed)


def never(**settings):
    """A breaker that rejects as soon as the probability is more than 0, and no other one."""
    return AdaptiveBreaker(random=lambda: 0.0, **settings)


# ---- the decisions -----------------------------------------------------------------------------------------------

class Model:
    """The SRE book's formula over a list of all requests that there have been: (the bucket it ended in, accepted)."""

    def __init__(self, k, length, buckets, minimum, probe_seconds):
        self.k, self.length, self.buckets, self.minimum, self.probe_seconds = k, length, buckets, minimum, probe_seconds
        self.requests, self.through, self.rejected, self.forced = [], [-1e9], 0, 0

    def counts(self, now):
        last = [accepted for bucket, accepted in self.requests if bucket > now // self.length - self.buckets]
        return len(last), sum(last)

    def all_accepted(self, now):
        requests, accepts = self.counts(now)
        return requests == accepts

    def probability(self, now):
        requests, accepts = self.counts(now)
        return max(0, (requests - self.k * accepts) / (requests + 1)) if requests >= self.minimum else 0

    def ask(self, now, chance):
        """None: rejected; 0: not written down, since all go through; else a number."""
        if self.all_accepted(now):
            return 0
        if chance < self.probability(now):
            if now - self.through[-1] < self.probe_seconds:
                self.rejected += 1
                self.requests.append((now // self.length, False))
                return None
            self.forced += 1
        self.through.append(now)
        return len(self.through)

    def end(self, now, accepted):
        if not accepted and self.all_accepted(now):
            self.through.append(now)
        self.requests.append((now // self.length, accepted))

    def give_back(self, number):
        if number == len(self.through):
            self.through[-1] = self.through[-2]         # as if it had not gone through


@pytest.mark.parametrize("seed", SEEDS)
def test_decisions_are_those_of_the_formula_over_all_that_has_happened(seed):
    chance = random.Random(seed)
    k, length, buckets = chance.choice([1.0, 1.5, 2.0]), chance.choice([0.25, 0.5, 1.0]), chance.randint(1, 12)
    minimum, probe_seconds = chance.choice([0, 1, 5]), chance.choice([0.5, 1.0, 4.0])       # halves: sums of them are exact
    throttle = _Throttle(k, TimeWindow(buckets * length, buckets), minimum, probe_seconds)
    model, now, under_way, health = Model(k, length, buckets, minimum, probe_seconds), 0.0, [], 0.5
    for _ in range(150):
        now += chance.choice([0, 0, 0, 0.125, 0.5, 3.0])
        event = chance.choice(["ask", "ask", "ask", "end", "end", "give back", "look", "health"])
        if event == "ask":
            draw = chance.choice([0.0, 0.999, chance.random()])
            permit = throttle.ask(now, draw) if throttle.free is None else throttle.free
            number = model.ask(now, draw)
            assert (permit is None, permit == 0) == (number is None, number == 0)
            if permit is not None:
                under_way.append((permit, number))
        elif event == "end" and under_way:
            under_way.pop(chance.randrange(len(under_way)))
            accepted = chance.random() < health
            throttle.ended(now, accepted)
            model.end(now, accepted)
        elif event == "give back" and under_way:
            permit, number = under_way.pop(chance.randrange(len(under_way)))
            throttle.give_back(permit)
            model.give_back(number)
        elif event == "look":
            throttle.advance(now)
            assert (throttle.window.calls, throttle.window.totals[0]) == model.counts(now)
            assert throttle.probability() == model.probability(now)
        elif event == "health":
            health = chance.choice([0.0, 0.5, 1.0])
        assert throttle.free is None or model.probability(now) == 0
        assert (throttle.rejected, throttle.probes) == (model.rejected, model.forced)


@pytest.mark.parametrize("k", [1.5, 2.0, 3.0])
def test_a_dependency_that_takes_so_many_a_second_gets_k_times_as_many(k):
    takes, offered, chance = 20, 200, random.Random(7)
    throttle, sent = _Throttle(k, TimeWindow(10.0, 40), 5, 1.0), [0] * 40       # in each second
    for step in range(len(sent) * offered):
        now = step / offered
        if throttle.ask(now, chance.random()) is not None:
            sent[int(now)] += 1
            throttle.ended(now, sent[int(now)] <= takes)
    assert sum(sent[20:]) / 20 == pytest.approx(k * takes, rel=0.1)


def test_a_dependency_that_takes_all_gets_all_however_much_it_is_and_a_few_failures_change_nothing():
    throttle = _Throttle(1.5, TimeWindow(10.0, 40), 0, 1.0)
    for step in range(1000):
        assert throttle.ask(step / 50, 0.0) is not None     # the worst chance
        throttle.ended(step / 50, step % 4 != 3)        # three of four; two of three would be 1 / k


def test_below_the_minimum_nothing_is_rejected():
    throttle = _Throttle(1.5, TimeWindow(10.0, 40), 5, 1.0)
    for _ in range(5):
        assert throttle.ask(0.0, 0.0) is not None
        throttle.ended(0.0, False)
    assert throttle.probability() == 5 / 6 and throttle.ask(0.0, 0.0) is None
    assert throttle.ask(0.0, 0.9) == 6          # the sixth for which it was decided


# ---- the front ---------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_rejected_calls_run_nothing_and_know_when_the_next_one_may():
    breaker = never(name="there")
    await all_failed(breaker, 5)
    await flowcoro.sleep(0.25)
    with pytest.raises(BreakerOpen) as caught:
        await breaker.try_execute(lambda: 1 / 0)
    assert caught.value.policy is breaker and caught.value.retry_after == 0.75 and caught.value.sent is False
    assert str(caught.value) == (
        "there: 0 of 6 requests were accepted in the last 10 s, so 86% are rejected; in 0.75 s one may try")
    assert breaker.statistics() == {"name": "there", "requests": 6, "accepts": 0, "probability": 6 / 7,
                                    "rejected": 1, "probes": 0, "ignored": 0}
    await flowcoro.sleep(0.75)
    assert await breaker.try_execute(accepted) == "done"        # it is the probe, and the next one waits for its turn
    assert await outcome(breaker, accepted) == "rejected"
    assert breaker.statistics()["probes"] == 1


@run_in_kernel
async def test_while_nothing_is_accepted_one_call_a_second_goes_through():
    breaker, through = never(), []
    await all_failed(breaker, 5)
    began = flowcoro.now()
    while flowcoro.now() < began + 20:
        await flowcoro.sleep(1 / 64)
        if await outcome(breaker, failed) == "failed":
            through.append(flowcoro.now() - began)
    assert through == [float(second) for second in range(1, 21)]


@run_in_kernel
async def test_recovery_is_noticed_and_then_all_go_through():
    breaker = AdaptiveBreaker(random=random.Random(3).random)

    async def second(operation):
        """How many of 32 went through."""
        through = 0
        for _ in range(32):
            through += await outcome(breaker, operation) != "rejected"
            await flowcoro.sleep(1 / 32)
        return through

    assert [await second(accepted) for _ in range(3)] == [32] * 3
    down = [await second(failed) for _ in range(30)]
    assert down[0] == 32 and 15 <= sum(down[15:]) < 30          # the probes, and hardly more
    up = [await second(accepted) for _ in range(60)]
    assert up[-5:] == [32] * 5 and sum(up[:10]) < 32            # it grows by half of what was accepted: not all at once


@run_in_kernel
async def test_calls_that_are_under_way_do_not_count_yet():
    breaker = never(minimum_calls=0)
    async with flowcoro.TaskGroup() as group:
        for _ in range(50):
            group.spawn(breaker.try_execute(slow))
    assert breaker.statistics()["accepts"] == 50


@run_in_kernel
async def test_what_counts_is_said_by_types_and_predicates():
    heard = []
    breaker = AdaptiveBreaker(failures=lambda error: isinstance(error, (Down, KeyError)), ignored=KeyError,
                              failure_result=lambda result: result == 503)
    breaker.add_listener(heard.append)

    def fail(error):
        raise error

    for error in Down(), NotFound(), KeyError("k"):
        with pytest.raises(type(error)):
            await breaker.try_execute(fail, error)
    assert await breaker.try_execute(lambda: 503) == 503
    assert await breaker.try_execute(lambda: 200) == 200
    assert [event.kind for event in heard] == ["failure", "success", "ignored", "failure", "success"]
    assert isinstance(heard[0].details["error"], Down) and heard[3].details == {"seconds": 0.0, "error": None}
    statistics = breaker.statistics()
    assert (statistics["requests"], statistics["accepts"], statistics["ignored"]) == (4, 2, 1)


@run_in_kernel
async def test_what_a_policy_within_rejects_says_nothing_of_the_dependency():
    inner = never()
    await all_failed(inner, 5)
    outer = AdaptiveBreaker()
    with pytest.raises(BreakerOpen) as caught:
        await Pipeline(outer, inner).try_execute(accepted)
    assert caught.value.policy is inner
    assert (outer.statistics()["requests"], outer.statistics()["ignored"], inner.statistics()["rejected"]) == (0, 1, 1)


@run_in_kernel
async def test_predicates_and_listeners_that_fail_are_reported_and_change_nothing(monkeypatch):
    reported = []
    monkeypatch.setattr("sys.unraisablehook", lambda report: reported.append(report.err_msg))
    breaker = AdaptiveBreaker(ignored=lambda error: 1 / 0, failure_result=lambda result: 1 / 0)
    breaker.add_listener(lambda event: 1 / 0)
    assert await outcome(breaker, failed) == "failed" and await outcome(breaker, accepted) == "accepted"
    assert breaker.statistics()["requests"] == 2 and breaker.statistics()["accepts"] == 1
    assert len(reported) == 4 and "AdaptiveBreaker(ignored=" in reported[0] and "at 'failure'" in reported[1]


@run_in_kernel
async def test_listeners_hear_of_what_is_rejected_and_forced_through():
    heard, breaker = [], never()
    await all_failed(breaker, 5)
    breaker.add_listener(heard.append)

    class Ask:
        key = "there"

        def __call__(self):
            return accepted()

    await outcome(breaker, Ask())
    await flowcoro.sleep(1)
    await outcome(breaker, Ask())
    assert heard == [PolicyEvent(breaker, "rejected", "there", {"probability": 6 / 7, "retry_after": 1.0}),
                     PolicyEvent(breaker, "probe", "there", {"probability": 6 / 7}),
                     PolicyEvent(breaker, "success", "there", {"seconds": 0.0})]


@pytest.mark.parametrize("workers", [1, 2])
def test_cancelled_at_each_checkpoint_it_counts_nothing_and_gives_its_turn_back(workers):
    async def main():
        at = [0.0]
        breaker = never(clock=lambda: at[0])
        await all_failed(breaker, 5)
        at[0], before = 1.0, breaker.statistics()       # one may go

        async def two_steps():
            await flowcoro.sleep(0)
            await flowcoro.sleep(0)

        async def after(cancelled):
            assert {**breaker.statistics(), "probes": 0} == before or not cancelled

        assert await at_each_point(lambda: breaker.try_execute(two_steps), after) == 2
        statistics = breaker.statistics()
        assert (statistics["requests"], statistics["accepts"], statistics["probes"]) == (6, 1, 3)

    flowcoro.run(main(), workers=workers)


@run_in_kernel
async def test_a_cancelled_probe_lets_the_next_one_probe_but_not_if_another_has_gone_through():
    breaker = never()
    await all_failed(breaker, 5)
    await flowcoro.sleep(1)
    with flowcoro.move_on_after(0.25):
        await breaker.try_execute(slow)
    assert await outcome(breaker, accepted) == "accepted"
    await flowcoro.sleep(1)
    async with flowcoro.TaskGroup() as group:
        first = group.spawn(breaker.try_execute(slow, 9))
        await flowcoro.sleep(1)
        group.spawn(outcome(breaker, slow, 9))          # probes too
        await flowcoro.sleep(0.5)
        first.cancel()
        await flowcoro.sleep(0.25)
        assert await outcome(breaker, accepted) == "rejected"
        group.cancel()


@run_in_kernel
async def test_an_ignored_probe_gives_its_turn_back():
    breaker = never(ignored=NotFound)
    await all_failed(breaker, 5)
    await flowcoro.sleep(1)

    def missing():
        raise NotFound

    with pytest.raises(NotFound):
        await breaker.try_execute(missing)
    assert await outcome(breaker, accepted) == "accepted"


@run_in_kernel
async def test_a_clock_or_a_listener_that_is_interrupted_gives_the_turn_back():
    stopped = []

    def clock():
        if stopped:
            raise stopped.pop()
        return flowcoro.now()

    def stop(event):
        raise KeyboardInterrupt

    breaker = never(clock=clock)
    await all_failed(breaker, 5)
    await flowcoro.sleep(1)
    with pytest.raises(KeyboardInterrupt):
        await breaker.try_execute(lambda: stopped.append(KeyboardInterrupt()))
    breaker.add_listener(stop)
    with pytest.raises(KeyboardInterrupt):
        await breaker.try_execute(accepted)
    breaker.remove_listener(stop)
    assert await outcome(breaker, accepted) == "accepted"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_clock_that_goes_back_makes_time_stand_still_and_go_on(seed):
    chance, raw, passed = random.Random(seed), 0.0, 0.0
    throttle_clock, model_window = [0.0], TimeWindow(10.0, 40)
    breaker = never(clock=lambda: throttle_clock[0])

    async def main():
        nonlocal raw, passed
        for _ in range(60):
            step = chance.choice([0.0, 0.125, 0.25, 1.0, -0.5, -3600.0, 3600.0])
            raw, passed = raw + step, passed + max(0.0, step)       # what has gone forwards is the time
            throttle_clock[0] = raw
            if chance.random() < 0.5:
                await breaker.try_execute(accepted)
                model_window.add((1,), passed)
            model_window.advance(passed)
            assert breaker.statistics()["requests"] == model_window.calls

    flowcoro.run(main())


def test_after_a_clock_went_back_an_hour_the_next_probe_is_a_second_away():
    at = [10_000.0]
    breaker = never(clock=lambda: at[0])

    async def main():
        await all_failed(breaker, 5)
        at[0] -= 3600
        with pytest.raises(BreakerOpen) as caught:
            await breaker.try_execute(accepted)
        assert caught.value.retry_after == 1.0
        at[0] += 1
        assert await breaker.try_execute(accepted) == "done"

    flowcoro.run(main())


@run_in_kernel
async def test_all_ways_in_count_and_reject():
    breaker = never()

    @breaker
    async def ask():
        raise Down

    @breaker
    def ask_plainly():
        raise Down

    async def ask_within():
        async with breaker:
            raise Down

    async def ask_by_hand():
        permit = breaker.acquire_nowait()
        permit.fail(Down())
        raise Down

    ways = [ask, lambda: flowcoro.sleep(ask_plainly()), ask_within, ask_by_hand, lambda: breaker.try_execute(failed)]
    for way in ways:
        with pytest.raises(Down):
            await way()
    assert breaker.statistics()["requests"] == 5
    for way in ways:
        with pytest.raises(BreakerOpen):
            await way()
    await flowcoro.sleep(1)
    breaker.acquire_nowait().give_back()
    with breaker:
        pass
    assert (breaker.statistics()["accepts"], breaker.statistics()["probes"]) == (1, 2)


@run_in_kernel
async def test_it_may_be_used_within_itself_and_in_a_pipeline():
    breaker = AdaptiveBreaker()
    assert await breaker.try_execute(breaker.try_execute, breaker.try_execute, accepted) == "done"
    assert breaker.statistics()["accepts"] == 3
    assert await Pipeline(breaker, AdaptiveBreaker()).try_execute(accepted) == "done"

    @breaker
    async def ask(question):
        return question + "!"

    assert await ask("what") == "what!"
    breaker.add_listener(lambda event: breaker.statistics())        # not under the lock
    assert await ask("what") == "what!"


def test_two_workers_lose_no_count():
    breaker = never(clock=lambda: 0.0)

    async def caller(operation):
        for _ in range(200):
            await outcome(breaker, operation)
            await flowcoro.sleep(0)

    async def main():
        async with flowcoro.TaskGroup() as group:
            for _ in range(4):
                group.spawn(caller(accepted))
                group.spawn(caller(failed))

    flowcoro.run(main(), workers=2)
    statistics = breaker.statistics()
    assert statistics["requests"] == 1600
    assert statistics["accepts"] + statistics["rejected"] <= 1600


def test_threads_with_runs_of_their_own_lose_no_count():
    breaker, barrier = AdaptiveBreaker(clock=lambda: 0.0), threading.Barrier(4)

    async def main():
        for _ in range(300):
            await breaker.try_execute(accepted)

    def thread():
        barrier.wait()
        flowcoro.run(main())

    threads = [threading.Thread(target=thread) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    statistics = breaker.statistics()
    assert (statistics["requests"], statistics["accepts"], statistics["rejected"]) == (1200, 1200, 0)


@pytest.mark.parametrize("settings, error, message", [
    (dict(k=0.5), ValueError, "AdaptiveBreaker(k=0.5): give a number of requests for each that is accepted from 1 to 1000"),
    (dict(k="2"), TypeError, "AdaptiveBreaker(k='2')"),
    (dict(seconds=0), ValueError, "AdaptiveBreaker(seconds=0): give a number of seconds from 0.001 to 3.16224e+07"),
    (dict(seconds=float("nan")), ValueError, "AdaptiveBreaker(seconds=nan)"),
    (dict(seconds=5e-324), ValueError, "AdaptiveBreaker(seconds=5e-324): give a number of seconds from 0.001"),
    (dict(buckets=10**30), ValueError, "0): give a number of buckets, from 1 to 10,000"),
    (dict(buckets=0), ValueError, "AdaptiveBreaker(buckets=0): give a number of buckets, from 1 to 10,000"),
    (dict(probe_seconds=0), ValueError, "AdaptiveBreaker(probe_seconds=0): give a number of seconds more than 0 to 3.16224e+07"),
    (dict(minimum_calls=-1), ValueError, "AdaptiveBreaker(minimum_calls=-1): give a number of calls, from 0 up"),
    (dict(clock=5), TypeError, "AdaptiveBreaker(clock=5): give a function that returns seconds"),
    (dict(random=0.5), TypeError, "AdaptiveBreaker(random=0.5): give a function that returns a number from 0 to 1"),
    (dict(failures="Down"), TypeError, "AdaptiveBreaker(failures='Down'): give an exception type"),
    (dict(failure_result=503), TypeError, "AdaptiveBreaker(failure_result=503): give"),
])
def test_impossible_settings_are_refused(settings, error, message):
    with pytest.raises(error) as caught:
        AdaptiveBreaker(**settings)
    assert message in str(caught.value)
