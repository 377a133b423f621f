"""flowcoro_resilience: RateLimiter and ConcurrencyLimiter against naive models, cancels, strange clocks, several workers.

Times in models are sixteenths of a second, which floats and Fractions both have exactly. FLOWCORO_SEEDS=1000 runs a thousand
programs per model. A failure names its seed, which repeats it.
"""

import functools
import math
import os
import random
import threading
from fractions import Fraction

import pytest

import flowcoro
from flowcoro_resilience import (AIMD, ConcurrencyLimiter, Gradient2, LimitExceeded, Pipeline, RateLimited, RateLimiter,
                                 RateState)
from flowcoro_resilience import _FULL, _Gcra
from flowcoro_testing import VirtualClock, run_in_kernel, wait_all_tasks_parked
from test_net_cancel import cancelled_at

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 30)))
STEP = 1 / 16
PATIENCE = 20           # seconds of the real clock


def each_seed(test):
    @functools.wraps(test)
    def tests():
        for seed in SEEDS:
            try:
                test(random.Random(seed))
            except BaseException as error:
                error.add_note(f"with seed {seed}")
                raise
    del tests.__wrapped__           # pytest would take `chance` for a fixture
    return tests


class Clock:
    """Stands still until it is set."""

    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


# ---- models of the rate ----------------------------------------------------------------------------------------

class Bucket:
    """A token bucket, filled as it was before there was GCRA."""

    def __init__(self, rate, per, burst):
        self.rate, self.burst = Fraction(rate) / Fraction(per), Fraction(burst)
        self.tokens, self.since = self.burst, -10**6

    def when(self, cost, now):
        """The first time from now on when there are so many."""
        self.tokens = min(self.burst, self.tokens + (Fraction(now) - Fraction(self.since)) * self.rate)
        self.since = now
        return now + float(max(0, Fraction(cost) - self.tokens) / self.rate)

    def take(self, cost, now):
        assert self.when(cost, now) == now
        self.tokens -= Fraction(cost)

    def copy(self):
        other = Bucket(1, 1, self.burst)
        other.rate, other.tokens, other.since = self.rate, self.tokens, self.since
        return other


class Window:
    """Everything that was ever let through."""

    def __init__(self, rate, per, taken=()):
        self.rate, self.per, self.taken = rate, per, list(taken)

    def when(self, cost, now):
        for time in sorted([now, *(time + self.per for time, _ in self.taken)]):
            if time >= now and sum(units for taken, units in self.taken if time < taken + self.per) + cost <= self.rate:
                return time

    def take(self, cost, now):
        assert self.when(cost, now) == now
        self.taken.append((now, cost))

    def copy(self):
        return Window(self.rate, self.per, self.taken)


def wait_in(model, costs, now):
    """Seconds until the last of these could go, one after the other."""
    model, time = model.copy(), now
    for cost in costs:
        time = model.when(cost, time)
        model.take(cost, time)
    return time - now


def random_limit(chance, **options):
    """(a limiter, a function that makes its model, costs)"""
    rate, per = chance.choice([(2, 1), (4, 1), (8, 2), (1, 0.5), (4, 4)])
    if chance.random() < 0.5:
        burst = chance.choice([None, 1, 3, rate, 2.5])
        limiter = RateLimiter(rate, per, burst=burst, **options)
        assert limiter.burst == (rate if burst is None else burst)
        return limiter, lambda: Bucket(rate, per, limiter.burst), [cost for cost in (0.5, 1, 1, 1, 2, 3) if cost <= limiter.burst]
    limiter = RateLimiter(rate, per, algorithm="sliding_window", **options)
    return limiter, lambda: Window(rate, per), [cost for cost in (1, 1, 1, 2, 3) if cost <= rate]


# ---- rates -----------------------------------------------------------------------------------------------------

@each_seed
def test_a_check_says_what_the_model_says_and_exactly_when_it_will_succeed(chance):
    clock = Clock(chance.choice([0.0, 1000.0, -50.0]))
    limiter, make, costs = random_limit(chance, clock=clock)
    models = {}
    for _ in range(60):
        clock.now += chance.choice([0, 0, STEP, 2 * STEP, 1, 5])
        key, cost = chance.choice("ab"), chance.choice(costs)
        model = models.setdefault(key, make())
        state = limiter.state_of(key)
        wait = wait_in(model, [cost], clock.now)
        assert limiter.check(key, cost) == wait
        assert state.retry_after == wait_in(model, [1], clock.now) and state.limit == limiter.burst
        assert state.remaining == 0 or model.when(state.remaining, clock.now) == clock.now
        assert state.remaining + 1 > limiter.burst or model.when(state.remaining + 1, clock.now) > clock.now
        assert state.reset == wait_in(model, [limiter.burst], clock.now)
        if not wait:
            model.take(cost, clock.now)
        elif chance.random() < 0.3:
            clock.now += wait - STEP / 4
            assert limiter.check(key, cost) == STEP / 4
            clock.now += STEP / 4
            assert limiter.check(key, cost) == 0
            model.take(cost, clock.now)


@each_seed
def test_whatever_its_digits_a_check_succeeds_after_the_seconds_it_was_told_and_not_before(chance):
    clock = Clock(chance.choice([1.0, 1e5, 1.7e9]) * chance.random())
    rate, per = 10 ** chance.uniform(-3, 4), 10 ** chance.uniform(-2, 4)
    limiter = RateLimiter(rate, per, burst=chance.choice([1, 5, 33.3]), clock=clock)
    window = RateLimiter(chance.randint(1, 9), 10 ** chance.uniform(-2, 4), algorithm="sliding_window", clock=clock)
    for _ in range(50):
        for one in (limiter, window):
            seconds = one.check()
            if seconds:
                told = clock.now + seconds
                clock.now = told - 4 * math.ulp(max(told, one.burst * one.per / one.rate))
                if clock.now > told - seconds:
                    assert one.check() > 0
                clock.now = told
                assert one.check() == 0
            clock.now += chance.choice([0, 0, 10 ** chance.uniform(-6, 2)])


def test_the_time_that_is_told_is_the_first_at_which_it_holds():
    chance = random.Random(5)
    for _ in range(500):
        rate, room = chance.choice([3, 7, 100 / 60, 1e5]), chance.choice([0, 2, 32.3])
        states, tat = _Gcra(rate, 1, 100, 10, ()), room + 10 ** chance.uniform(0, 6)
        when = states._when(tat, room)
        assert when * rate + room >= tat
        when -= 3 * math.ulp(max(when, room / rate))
        assert when * rate + room < tat


def test_a_full_bucket_lets_its_burst_go_at_any_time():
    chance = random.Random(5)
    for rate in (10, 3, 7, 1000):
        clock = Clock(1.7e9)
        limiter = RateLimiter(rate, clock=clock)
        for _ in range(30):
            clock.now += chance.uniform(1.1, 1e5)
            assert [limiter.check() > 0 for _ in range(rate + 1)] == [False] * rate + [True]


def test_after_many_calls_none_is_missing_and_none_too_many():
    clock = Clock(1.7e9)
    limiter, began = RateLimiter(1e5, burst=1, clock=clock), clock.now
    for _ in range(20_000):
        while seconds := limiter.check():
            clock.now += seconds
    assert abs((clock.now - began) - 20_000 / 1e5) < 1e-3       # 0.2 s; clocks have steps of 2.4e-7 s there


def test_a_clock_that_goes_back_stands_still_and_grants_nothing():
    for algorithm in ("gcra", "sliding_window"):
        clock = Clock(1e6)
        limiter = RateLimiter(5, per=10, algorithm=algorithm, clock=clock)
        assert [limiter.check() for _ in range(5)] == [0] * 5
        clock.now -= 3600                           # it is not stuck for an hour
        before = limiter.check()
        assert 0 < before <= 10
        clock.now += before
        assert limiter.check() == 0
        for _ in range(20):                         # forth and back: what has passed does not pass again
            clock.now += 3600
            while not limiter.check():
                pass
            clock.now -= 3600
            assert limiter.check() > 0
        clock.now = math.nan
        assert limiter.check() > 0
        clock.now = 2e6
        assert limiter.check() == 0


def test_a_flood_of_keys_stays_within_max_keys_and_does_not_free_who_is_at_his_limit():
    clock = Clock()
    for algorithm in ("gcra", "sliding_window"):
        limiter = RateLimiter(60, per=60, max_keys=1000, algorithm=algorithm, clock=clock)
        while not limiter.check("greedy"):
            pass
        freed = 0
        for number in range(4000):
            clock.now += 1e-6
            assert limiter.check(number) == 0
            if number % 5 == 0:
                freed += not limiter.check("greedy")
        found = limiter.statistics()
        assert found["keys"] == len(limiter._states._order) == sum(map(len, limiter._states._tables)) == 1000
        assert found["evicted"] == 3001 and freed == 0


def test_keys_whose_time_has_passed_go_first_and_nothing_is_lost_with_them():
    clock = Clock()
    limiter = RateLimiter(10, max_keys=1000, clock=clock)
    for number in range(20_000):                    # 0.1 s each is remembered: 500 at a time, and those not yet looked at
        clock.now += 0.1 / 500
        assert limiter.check(number) == 0
        assert len(limiter._states) <= 1000
    assert limiter.statistics()["evicted"] == 0
    clock.now += 1
    for number in range(600):                       # two go for each that comes
        limiter.check(-number - 1)
    assert len(limiter._states) < 700


def test_many_keys_are_in_several_tables():
    clock = Clock()
    limiter = RateLimiter(1, per=1000, max_keys=50_000, clock=clock)
    for number in range(3000):
        assert limiter.check(f"key {number}") == 0 and limiter.check(f"key {number}") > 0
    assert len(limiter._states._tables) == 4 and min(map(len, limiter._states._tables)) > 500
    assert limiter.statistics()["keys"] == 3000


def test_a_max_keys_that_is_never_reached_costs_nothing():
    limiter = RateLimiter(1, max_keys=10**9)
    assert limiter.check("key") == 0.0 and limiter.check("key") > 0 and len(limiter._states._tables) == 4096


def test_what_is_out_of_a_window_is_taken_out_together():
    clock, lengths = Clock(), []
    limiter = RateLimiter(1000, per=1000, algorithm="sliding_window", max_keys=1, clock=clock)
    for clock.now in range(5000):
        assert limiter.check() == 0.0
        lengths.append(len(limiter._states._tables[0][None]))
    assert sum(later < before for before, later in zip(lengths, lengths[1:])) in range(20, 35)      # 4000 / 143
    assert sum(later > before for before, later in zip(lengths, lengths[1:])) > 4900
    assert max(lengths) <= 2 + 2 * 1000 * 8 / 7 + 3


def test_threads_together_get_what_there_is():
    limiter, barrier, got = RateLimiter(100, per=1000, clock=Clock()), threading.Barrier(4), []

    def take():
        barrier.wait()
        got.append(sum(not limiter.check("key") for _ in range(200)))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(got) == 100
    assert limiter.statistics() == {"name": "RateLimiter", "allowed": 100, "rejected": 700, "waited": 0, "waiting": 0, "keys": 1,
                                    "max_keys": 100_000, "evicted": 0}


# ---- waiting for a rate ----------------------------------------------------------------------------------------

class Program:
    """Random calls of a limiter, and lists beside it that say how each has to end: (when, "went" or "cancelled" or seconds).

    No two things happen to one call at a time: each has 1024ths of its own to be cancelled at.
    """

    def __init__(self, chance):
        self.limiter, make, costs = random_limit(chance)
        self.models, self.calls, self.ends = {key: make() for key in "ab"}, [], {}
        for number, start in enumerate(sorted(chance.sample(range(200), 25))):
            leaves = (start + chance.randint(0, 40)) * STEP + (2 * number + 1) / 1024 if chance.random() < 0.4 else math.inf
            wait = chance.choice([0, 0.5, 2, math.inf])
            self.calls.append((start * STEP, chance.choice("aab"), chance.choice(costs), wait, leaves))

    def expected(self):
        ends, queues = {}, {"a": [], "b": []}
        moments = {time for start, _, _, _, leaves in self.calls for time in (start, leaves)} - {math.inf}
        while moments:
            now = min(moments)
            moments.remove(now)
            for number, (start, key, cost, wait, leaves) in enumerate(self.calls):
                if leaves == now and number in queues[key]:
                    queues[key].remove(number)
                    ends[number] = now, "cancelled"
                if start == now:
                    seconds = wait_in(self.models[key], [*(self.calls[other][2] for other in queues[key]), cost], now)
                    if seconds > wait:
                        ends[number] = now, seconds
                    else:
                        queues[key].append(number)
            for key, queue in queues.items():
                while queue and (when := self.models[key].when(self.calls[queue[0]][2], now)) == now:
                    self.models[key].take(self.calls[queue[0]][2], now)
                    ends[queue.pop(0)] = now, "went"
                if queue:
                    moments.add(when)
        return ends

    async def call(self, number, began):
        start, key, cost, wait, leaves = self.calls[number]
        await flowcoro.sleep_until(began + start)
        with flowcoro.CancelScope(deadline=began + leaves) as scope:
            try:
                await self.limiter.acquire(key, cost, wait)
                end = "went"
            except RateLimited as error:
                end = error.retry_after
        self.ends[number] = flowcoro.now() - began, "cancelled" if scope.cancelled_caught else end

    async def main(self):
        began = flowcoro.now()
        async with flowcoro.TaskGroup() as group:
            for number in range(len(self.calls)):
                group.spawn(self.call(number, began))


@each_seed
def test_those_who_wait_go_in_turn_when_the_model_says_so(chance):
    program = Program(chance)
    flowcoro.run(program.main(), clock=VirtualClock(), seed=chance.randint(0, 10**6))
    assert program.ends == program.expected()
    found = program.limiter.statistics()
    assert found["waiting"] == 0 and not program.limiter._lines
    assert found["allowed"] == sum(end == "went" for _, end in program.ends.values())
    assert found["rejected"] == sum(isinstance(end, float) for _, end in program.ends.values())


@run_in_kernel
async def test_cancelled_at_any_point_a_call_takes_nothing_and_those_behind_move_up():
    number, went = 0, True
    while went is True:
        number += 1
        limiter, times = RateLimiter(1, wait=math.inf), []
        await limiter.acquire("key")
        began = flowcoro.now()

        async def other():
            await limiter.acquire("key")
            times.append(flowcoro.now() - began)

        async with flowcoro.TaskGroup() as group:
            with flowcoro.CancelScope() as scope:
                group.spawn(other())            # parks first if the other is cancelled at its first point, else second
                await cancelled_at(scope, number, limiter.acquire("key"))
            went = scope.cancelled_caught
        assert times == [1.0] or times == [2.0] and not went
        assert limiter.statistics()["waiting"] == 0 and not limiter._lines
        assert limiter.statistics()["allowed"] == (2 if went else 3)
    assert number > 2


@run_in_kernel
async def test_a_cancelled_first_wakes_the_second_who_takes_over_its_time():
    limiter, times = RateLimiter(4, burst=4, wait=math.inf), []

    async def call(cost):
        await limiter.acquire(None, cost)
        times.append((cost, flowcoro.now() - began))

    assert limiter.check(None, 4) == 0
    began = flowcoro.now()
    async with flowcoro.TaskGroup() as group:
        first = group.spawn(call(4))
        await wait_all_tasks_parked()
        group.spawn(call(1))
        group.spawn(call(2))
        await flowcoro.sleep(0.5)
        assert limiter.statistics()["waiting"] == 3
        assert limiter.state_of() == RateState(4.0, 0, 7 / 4 + 1 / 4 - 0.5, 7 / 4 + 1 - 0.5)
        assert limiter.check() == 8 / 4 - 0.5       # not before those who wait, though a unit is there
        first.cancel()
    assert times == [(1, 0.5), (2, 0.75)]


@pytest.mark.parametrize("cancelled", [(0, 1), (1, 0), (0, 1, 2), (2, 1, 0), (1, 0, 4), (0, 1, 2, 3, 4)])
@run_in_kernel
async def test_cancelled_together_they_leave_one_first(cancelled):
    limiter, went, costs = RateLimiter(1, burst=8, wait=math.inf), [], [5, 1, 8, 1, 1]
    assert limiter.check(None, 8) == 0
    began = flowcoro.now()

    async def call(number):
        await limiter.acquire(None, costs[number])
        went.append((number, flowcoro.now() - began))

    async with flowcoro.TaskGroup() as group:
        tasks = []
        for number in range(5):
            tasks.append(group.spawn(call(number)))
            await wait_all_tasks_parked()
        for number in cancelled:
            tasks[number].cancel()
        if len(cancelled) == 5:
            group.spawn(call(0))            # joins after those who have not left yet
    left = [0] if len(cancelled) == 5 else [number for number in range(5) if number not in cancelled]
    assert went == [(number, sum(costs[one] for one in left[:place])) for place, number in enumerate(left, 1)]
    assert limiter.statistics()["waiting"] == 0 and not limiter._lines


@run_in_kernel
async def test_no_more_wait_than_may():
    limiter = RateLimiter(1, wait=math.inf, max_waiting=2)
    async with flowcoro.TaskGroup() as group:
        limiter.check("a")
        for _ in range(2):
            group.spawn(limiter.acquire("a"))
        await wait_all_tasks_parked()
        with pytest.raises(RateLimited) as caught:
            await limiter.acquire("a")
        assert caught.value.retry_after == 3 and caught.value.policy is limiter and not caught.value.sent
        await limiter.acquire("b")
        with pytest.raises(RateLimited, match=r"RateLimiter: 1 in 1 s for 'b' are used up; 1 more may go in 1 s"):
            limiter.acquire_nowait("b")
    assert limiter.statistics()["rejected"] == 2 and limiter.statistics()["allowed"] == 4


@run_in_kernel
async def test_what_another_worker_does_between_the_look_and_the_place_in_the_line_is_seen():
    limiter = RateLimiter(1, wait=math.inf, max_waiting=2)
    async with flowcoro.TaskGroup() as group:
        limiter.check("a")
        group.spawn(limiter.acquire("a"))
        await wait_all_tasks_parked()
        line = limiter._lines["a"]
        assert limiter._join(line, object(), "a", 1, 1.0) == (False, 2.0)
        group.spawn(limiter.acquire("a"))
        await wait_all_tasks_parked()
        assert limiter._join(line, object(), "a", 1, math.inf) == (False, 3.0)
        await flowcoro.sleep(5)
        assert limiter._join(line, object(), "a", 1, 0.0) == (False, 0.0)
    assert limiter.statistics()["rejected"] == 2 and limiter.statistics()["allowed"] == 4


@run_in_kernel
async def test_a_key_for_whom_somebody_waits_is_not_evicted():
    limiter = RateLimiter(1, per=1, burst=100, max_keys=3, wait=math.inf)
    began = flowcoro.now()
    limiter.check("a", 100)
    for key in "xyz":
        limiter.check(key, 100)
    assert limiter.statistics()["keys"] == 3 and limiter.statistics()["evicted"] == 1
    keys = set(limiter._states._order)
    async with flowcoro.TaskGroup() as group:
        for key in keys:
            group.spawn(limiter.acquire(key))
        await wait_all_tasks_parked()
        for number in range(10):
            limiter.check(number)
        assert keys <= set(limiter._states._order) and len(limiter._states) <= 4
    assert flowcoro.now() - began == 1


def test_under_any_order_of_tasks_no_more_go_than_the_rate_allows():
    for seed in SEEDS:
        limiter, times = RateLimiter(8, per=1, burst=3, wait=2.0), []

        async def call(number):
            await flowcoro.sleep(number % 3)
            with flowcoro.move_on_after(number % 7 / 2 + 0.1):
                try:
                    await limiter.try_execute(lambda: times.append(flowcoro.now()))
                except RateLimited:
                    pass

        async def main():
            async with flowcoro.TaskGroup() as group:
                for number in range(30):
                    group.spawn(call(number))

        flowcoro.run(main(), clock=VirtualClock(), seed=seed)
        for first, since in enumerate(times):
            for last, until in enumerate(times[first:], 1):
                assert last <= 3 + 8 * (until - since) + 1e-9, seed
        assert len(times) > 12 and not limiter._lines and limiter.statistics()["waiting"] == 0, seed


def test_several_workers_wait_in_one_line():
    limiter, times = RateLimiter(2000, burst=5, wait=math.inf), []

    async def call(number):
        with flowcoro.move_on_after(math.inf if number % 4 else 0.001):
            await limiter.acquire()
            times.append(flowcoro.now())

    async def main():
        began = flowcoro.now()
        async with flowcoro.TaskGroup() as group:
            for number in range(120):
                group.spawn(call(number))
        assert flowcoro.now() - began > (len(times) - 5) / 2000 - 1e-6

    for workers in (2, 3):
        times.clear()
        flowcoro.run(main(), workers=workers)
        assert len(times) >= 90 and not limiter._lines
        assert limiter.statistics()["waiting"] == 0


# ---- a rate as a policy ----------------------------------------------------------------------------------------

@run_in_kernel
async def test_a_rate_limits_operations_by_key_and_cost():
    heard = []
    limiter = RateLimiter(4, key=lambda user, size: user, cost=lambda user, size: size, wait=0.5, name="uploads")
    limiter.add_listener(lambda event: heard.append((event.kind, event.key, event.details)))

    @limiter
    async def upload(user, size):
        return user

    assert await upload("ann", 4) == "ann" and await upload("bob", size=1) == "bob"
    assert await upload("ann", 1) == "ann"
    with pytest.raises(RateLimited) as caught:
        await upload("ann", 3)
    assert caught.value.retry_after == 0.75
    assert heard == [("waited", "ann", {"cost": 1, "seconds": 0.25}), ("rejected", "ann", {"cost": 3, "retry_after": 0.75})]
    with pytest.raises(ValueError, match=r"uploads\(cost=5\): more than 4 units can never go at once"):
        await upload("ann", 5)
    with pytest.raises(TypeError, match="give a function, and its|give the function"):
        await limiter.try_execute(upload("ann", 1))


@run_in_kernel
async def test_in_a_pipeline_too_key_and_cost_come_from_the_arguments():
    policy = Pipeline(RateLimiter(2, key=lambda user, units: user, cost=lambda user, units: units))
    assert await policy.try_execute(lambda *asked: asked, "ann", 2) == ("ann", 2)
    assert await policy.try_execute(lambda *asked: asked, "bob", 1) == ("bob", 1)
    with pytest.raises(RateLimited, match="'bob'"):
        await policy.try_execute(lambda *asked: asked, "bob", 2)


@pytest.mark.parametrize("make, error, message", [
    (lambda: RateLimiter(0), ValueError, "RateLimiter(rate=0): give a number of units from 1e-09 to 1e+09"),
    (lambda: RateLimiter(math.inf), ValueError, "RateLimiter(rate=inf)"),
    (lambda: RateLimiter("5"), TypeError, "RateLimiter(rate='5'): give a number of units"),
    (lambda: RateLimiter(1, per=0), ValueError, "RateLimiter(per=0)"),
    (lambda: RateLimiter(1, per=math.nan), ValueError, "RateLimiter(per=nan)"),
    (lambda: RateLimiter(1, burst=0.5), ValueError, "RateLimiter(burst=0.5): give a number of units from 1"),
    (lambda: RateLimiter(1, algorithm="leaky"), ValueError, """algorithm='leaky'): "gcra" or "sliding_window\""""),
    (lambda: RateLimiter(1, algorithm="sliding_window", burst=2), ValueError, "leave burst out"),
    (lambda: RateLimiter(1.5, algorithm="sliding_window"), TypeError, "RateLimiter(rate=1.5): give a number of units of a"),
    (lambda: RateLimiter(5, algorithm="sliding_window", cost=1.5), TypeError, "RateLimiter(cost=1.5): give a number of units,"),
    (lambda: RateLimiter(1, key="user"), TypeError, "RateLimiter(key='user'): give a function"),
    (lambda: RateLimiter(1, clock=None), TypeError, "RateLimiter(clock=None): give a function"),
    (lambda: RateLimiter(1, cost=2), ValueError, "RateLimiter(cost=2): more than 1 units can never go at once"),
    (lambda: RateLimiter(1, cost=0), ValueError, "RateLimiter(cost=0): give a number of units more than 0"),
    (lambda: RateLimiter(1, cost="1"), TypeError, "RateLimiter(cost='1'): give a number of units"),
    (lambda: RateLimiter(1, key=flowcoro.when_all), TypeError, "this one is async, or a generator, and nobody awaits"),
    (lambda: RateLimiter(1, cost=flowcoro.when_all), TypeError, "this one is async"),
    (lambda: RateLimiter(1, clock=flowcoro.when_all), TypeError, "this one is async"),
    (lambda: RateLimiter(1, clock=lambda: "now"), TypeError, "gave 'now'): give a number of seconds"),
    (lambda: RateLimiter(1, clock=lambda: math.nan), ValueError, "gave nan): give a number of seconds"),
    (lambda: RateLimiter(1, wait=10**400), ValueError, "RateLimiter(wait=1000"),
    (lambda: RateLimiter(1, wait=5, max_waiting=0), ValueError, "RateLimiter(wait=5, max_waiting=0): nobody may wait"),
    (lambda: RateLimiter(1, max_keys=0), ValueError, "RateLimiter(max_keys=0)"),
    (lambda: RateLimiter(1, wait=-1), ValueError, "RateLimiter(wait=-1)"),
    (lambda: RateLimiter(1, max_waiting=-1), ValueError, "RateLimiter(max_waiting=-1)"),
    (lambda: RateLimiter(1).check(cost=1.5), ValueError, "can never go"),
    (lambda: RateLimiter(1).check([]), TypeError, "unhashable"),
])
def test_impossible_rates_are_refused(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


# ---- concurrency -----------------------------------------------------------------------------------------------

def moment(chance, most):
    """Up to so many seconds, in parts that floats add exactly, and so small that no two are the same."""
    return chance.randrange(most * 2**30) / 2**30


class Bulkhead:
    """Random calls of a limiter, and lists beside it: who runs, who waits, and how each call has to end. No two things happen
    at a time, but for what follows from one of them."""

    def __init__(self, chance):
        self.limit, self.places = chance.randint(1, 4), chance.randint(0, 5)
        self.limiter = ConcurrencyLimiter(self.limit, max_waiting=self.places)
        self.ends, self.changes = {}, {moment(chance, 30): chance.randint(1, 5) for _ in range(3)}
        self.calls = []                 # (when it comes, how long it runs, how long it waits, when it is cancelled)
        for start in sorted(moment(chance, 30) for _ in range(25)):
            self.calls.append((start, chance.choice([0, moment(chance, 8)]), chance.choice([0, 2, 10]),
                               start + moment(chance, 10) if chance.random() < 0.4 else math.inf))

    def expected(self):
        ends, running, waiting = {}, {}, {}         # number -> when that is over
        moments = {*self.changes, *(time for start, _, _, leaves in self.calls for time in (start, leaves))} - {math.inf}
        while moments:
            now = min(moments)
            moments.remove(now)
            self.limit = self.changes.get(now, self.limit)
            for those, how in ((running, "done"), (waiting, "exceeded")):
                for number, end in list(those.items()):
                    if end == now or self.calls[number][3] == now:
                        del those[number]
                        ends[number] = now, how if end == now else "cancelled"
            for number, (start, lasts, wait, _) in enumerate(self.calls):
                if start == now:
                    if len(running) < self.limit or wait and len(waiting) < self.places:
                        waiting[number] = now + wait
                        moments |= {now + wait} - {now}
                    else:
                        ends[number] = now, "exceeded"
            while waiting and len(running) < self.limit:
                number = min(waiting)
                del waiting[number]
                running[number] = now + self.calls[number][1]
                if running[number] > now:
                    moments.add(running[number])
                else:
                    del running[number]
                    ends[number] = now, "done"
        return ends

    async def call(self, number):
        start, lasts, wait, leaves = self.calls[number]
        await flowcoro.sleep_until(start)
        with flowcoro.CancelScope(deadline=leaves) as scope:
            try:
                permit = await self.limiter.acquire(wait)
                try:
                    if lasts:
                        await flowcoro.sleep(lasts)
                finally:
                    permit.release()
                end = "done"
            except LimitExceeded:
                end = "exceeded"
        self.ends[number] = flowcoro.now(), "cancelled" if scope.cancelled_caught else end

    async def main(self):
        async with flowcoro.TaskGroup() as group:
            for number in range(len(self.calls)):
                group.spawn(self.call(number))
            for time, limit in sorted(self.changes.items()):
                await flowcoro.sleep_until(time)
                self.limiter.set_limit(limit)


@each_seed
def test_places_are_given_in_turn_as_the_model_says(chance):
    bulkhead = Bulkhead(chance)
    flowcoro.run(bulkhead.main(), clock=VirtualClock(0.0), seed=chance.randint(0, 10**6))
    expected = bulkhead.expected()
    assert bulkhead.ends == expected
    found = bulkhead.limiter.statistics()
    assert found["running"] == found["waiting"] == 0 and found["limit"] == bulkhead.limit
    exceeded = [when for when, end in expected.items() if end[1] == "exceeded"]
    assert found["rejected"] == len(exceeded)
    assert found["timed_out"] == sum(expected[number][0] > bulkhead.calls[number][0] for number in exceeded)


@run_in_kernel
async def test_cancelled_at_any_point_a_call_leaves_all_places_as_they_were():
    number, went, limiter = 0, True, ConcurrencyLimiter(1, max_waiting=5, wait=10)
    while went:
        number += 1

        async def use():
            return await limiter.try_execute(flowcoro.sleep, 1)

        async def enter():
            async with limiter:
                await flowcoro.sleep(1)

        for make in (use, enter):
            async with flowcoro.TaskGroup() as group:
                first = await limiter.acquire()
                with flowcoro.CancelScope() as scope:
                    group.spawn(use())
                    group.spawn(enter())
                    flowcoro.spawn(release_later(first))
                    await cancelled_at(scope, number, make())
                went = scope.cancelled_caught
            found = limiter.statistics()
            assert found["running"] == found["waiting"] == 0 and not limiter._entered
    assert number > 3


async def release_later(permit):
    await flowcoro.sleep(0.5)
    permit.release()


def test_with_several_workers_never_more_run_than_may_and_all_places_come_back():
    limiter, running, most, done = ConcurrencyLimiter(3, max_waiting=1000, wait=PATIENCE), set(), [], []

    async def operation(number):
        running.add(number)
        most.append(len(running))
        await flowcoro.checkpoint()
        running.discard(number)

    async def call(number):
        with flowcoro.move_on_after(0.002 if number % 5 == 0 else PATIENCE):
            try:
                await limiter.try_execute(operation, number)
                done.append(number)
            finally:
                running.discard(number)

    async def main():
        async with flowcoro.TaskGroup() as group:
            for number in range(200):
                group.spawn(call(number))

    for workers in (2, 3):
        done.clear()
        flowcoro.run(main(), workers=workers)
        assert max(most) <= 3 and len(done) >= 160
        found = limiter.statistics()
        assert found["running"] == found["waiting"] == 0


@run_in_kernel
async def test_a_limit_that_is_lowered_lets_those_who_run_come_to_their_end():
    limiter = ConcurrencyLimiter(3, max_waiting=1)
    permits = [limiter.acquire_nowait() for _ in range(3)]
    limiter.set_limit(1)
    for permit in permits[:2]:
        permit.release()
        with pytest.raises(LimitExceeded):
            limiter.acquire_nowait()
    async with flowcoro.TaskGroup() as group:
        waits = group.spawn(limiter.acquire())
        await wait_all_tasks_parked()
        assert not waits.done() and limiter.statistics()["running"] == 1
        limiter.set_limit(2)                                # who waits hears of it
    assert limiter.statistics()["running"] == 2 and limiter.limit == 2
    waits.result().release()
    permits[2].release("ignored")
    with pytest.raises(RuntimeError, match="was released already"):
        permits[2].release()
    with pytest.raises(ValueError, match='"done", "dropped" or "ignored"'):
        permits[2].release("well")
    assert limiter.statistics()["running"] == 0


@run_in_kernel
async def test_a_rejection_estimates_when_to_ask_again_and_listeners_hear():
    limiter, heard = ConcurrencyLimiter(2, max_waiting=1, wait=4, name="database"), []
    limiter.add_listener(lambda event: heard.append((event.kind, event.details)))
    permits = [limiter.acquire_nowait(), limiter.acquire_nowait()]
    with pytest.raises(LimitExceeded) as caught:
        limiter.acquire_nowait()
    assert caught.value.retry_after is None
    await flowcoro.sleep(8)
    permits[0].release()
    permits[0] = await limiter.acquire()
    async with flowcoro.TaskGroup() as group:
        group.spawn(limiter.acquire(wait=3))
        await flowcoro.sleep(1)
        with pytest.raises(LimitExceeded, match="database: 2 run and 1 wait; the limit is 2 at a time, and 1 in") as caught:
            await limiter.acquire()
        assert caught.value.retry_after == 8 * 2 / 2
        permits[0].release()
    assert heard[2] == ("waited", {"seconds": 1.0})
    async with flowcoro.TaskGroup() as group:
        waits = group.spawn(limiter.acquire())
        await wait_all_tasks_parked()
        assert limiter._join() is _FULL             # as when a task of another worker was faster
        waits.cancel()
    with pytest.raises(LimitExceeded, match="; no place was free for 4 s"):
        await limiter.acquire()
    held = 8 + (1 - 8) / 8
    assert heard == [("rejected", {"retry_after": None, "waited": 0.0}), ("rejected", {"retry_after": 8.0, "waited": 0.0}),
                     ("waited", {"seconds": 1.0}), ("rejected", {"retry_after": held / 2, "waited": 4.0})]
    assert limiter.statistics() == {"name": "database", "limit": 2, "running": 2, "waiting": 0, "max_waiting": 1, "allowed": 4,
                                    "rejected": 3, "waited": 1, "timed_out": 1, "seconds": held}
    permits[1].release()


@run_in_kernel
async def test_a_limiter_within_itself_needs_two_places():
    limiter = ConcurrencyLimiter(2)

    async def inner():
        return await limiter.try_execute(lambda: limiter.statistics()["running"])

    assert await limiter.try_execute(inner) == 2
    limiter.set_limit(1)
    with pytest.raises(LimitExceeded):
        await limiter.try_execute(inner)
    assert limiter.statistics()["running"] == 0


@run_in_kernel
async def test_an_async_generator_that_another_task_closes_gives_its_place_back():
    limiter = ConcurrencyLimiter(2)

    async def numbers():
        async with limiter:
            yield 1
            yield 2

    generator = numbers()
    assert await anext(generator) == 1
    async with limiter:
        await flowcoro.spawn(generator.aclose())
        assert limiter.statistics()["running"] == 1
    assert limiter.statistics()["running"] == 0 and not limiter._entered


# ---- adaptive limits -------------------------------------------------------------------------------------------

@each_seed
def test_aimd_is_what_its_rule_says(chance):
    least, most, backoff, timeout = chance.randint(1, 5), chance.randint(6, 40), chance.choice([0.5, 0.9]), chance.choice([1, 3])
    initial = chance.randint(least, most)
    algorithm, limit, calls, now = AIMD(initial, least=least, most=most, backoff=backoff, timeout=timeout), initial, [], 0
    assert algorithm.limit == initial
    for _ in range(150):
        now += chance.random()
        seconds, in_flight, dropped = 2 * chance.random() ** 3 * timeout, chance.randint(1, 30), chance.random() < 0.1
        trouble = dropped or seconds > timeout
        lowered = [end for began, end, was_lowered in calls if was_lowered]
        if trouble and not (lowered and now - seconds < lowered[-1]):
            limit = max(least, limit * backoff)
        elif not trouble and in_flight >= limit / 2:
            limit = min(most, limit + 1 / limit)
        calls.append((now - seconds, now, trouble and not (lowered and now - seconds < lowered[-1])))
        assert algorithm.record(seconds, in_flight, dropped, now) == algorithm.limit == int(limit)


@each_seed
def test_gradient2_is_what_its_formula_says(chance):
    options = {"least": chance.randint(1, 5), "most": chance.randint(20, 60), "smoothing": chance.choice([0.2, 1]),
               "tolerance": chance.choice([1, 1.5]), "long_window": chance.choice([5, 600]), "queue_size": chance.choice([1, 4]),
               "window": chance.choice([0, 1.0]), "samples": chance.choice([1, 3])}
    algorithm, limit, now, ends, window, long = Gradient2(10, **options), 10.0, 0, -1, [], []
    mean = None
    for _ in range(150):
        now += chance.random() / 2
        seconds, in_flight = chance.choice([0.00005, 0.1, 0.2, 0.5, 3.0]), chance.randint(1, 20)
        result = algorithm.record(seconds, in_flight, chance.random() < 0.1, now)
        if seconds >= 0.0001:
            window.append((seconds, in_flight))
            if now > ends:
                if len(window) >= options["samples"]:
                    short = sum(seconds for seconds, _ in window) / len(window)
                    long.append(short)
                    factor = 2 / (options["long_window"] + 1)
                    if len(long) > 10 or mean is None:
                        mean = short if mean is None else mean * (1 - factor) + short * factor
                    else:
                        mean = mean + (short - mean) / len(long)
                    gradient = max(0.5, min(1, options["tolerance"] * mean / short))
                    if mean / short > 2:
                        mean *= 0.95
                    if max(number for _, number in window) >= limit / 2:
                        smoothing = options["smoothing"]
                        limit = limit * (1 - smoothing) + (limit * gradient + options["queue_size"]) * smoothing
                        limit = max(options["least"], min(options["most"], limit))
                window, ends = [], now + options["window"]
        assert abs(algorithm._estimate - limit) < 1e-6 and result == algorithm.limit == int(algorithm._estimate)


class Told:
    """An algorithm that writes down what it is told."""

    limit = 3

    def __init__(self):
        self.told, self.next = [], []

    def record(self, seconds, in_flight, dropped, now):
        self.told.append((seconds, in_flight, dropped))
        if self.next:
            self.limit = self.next.pop(0)
        if isinstance(self.limit, Exception):
            raise self.limit
        return self.limit


@run_in_kernel
async def test_an_adaptive_limit_hears_of_results_and_drops_and_not_of_errors_and_cancels():
    algorithm = Told()
    limiter = ConcurrencyLimiter(algorithm)

    async def operation(seconds, error=None):
        await flowcoro.sleep(seconds)
        if error is not None:
            raise error

    await limiter.try_execute(operation, 1)
    for error in (TimeoutError(), KeyError()):
        with pytest.raises(type(error)):
            await limiter.try_execute(operation, 2, error)
        with pytest.raises(type(error)):
            async with limiter:
                await operation(0.5, error)
    with pytest.raises(ExceptionGroup):
        await limiter.try_execute(operation, 0.25, ExceptionGroup("of a TaskGroup", [TimeoutError(), KeyError()]))
    with flowcoro.move_on_after(3):
        await limiter.try_execute(operation, 100)
    with flowcoro.move_on_after(3):
        async with limiter, limiter:
            await operation(100)
    async with limiter:
        permit = await limiter.acquire()
        await flowcoro.sleep(4)
        permit.release("dropped")
    assert algorithm.told == [(1, 1, False), (2, 1, True), (0.5, 1, True), (0.25, 1, True), (4, 2, True), (4, 1, False)]
    assert limiter.statistics()["running"] == 0
    algorithm.told.clear()

    async def nested(begins, ends):
        await flowcoro.sleep_until(began + begins)
        async with limiter:
            await flowcoro.sleep_until(began + ends)

    began = flowcoro.now()
    await flowcoro.when_all(nested(0, 3), nested(1, 2))
    assert algorithm.told == [(1, 2, False), (3, 1, False)]
    picky = ConcurrencyLimiter(algorithm, dropped=lambda end: end == "busy")
    algorithm.told.clear()
    assert await picky.try_execute(lambda: "busy") == "busy" and await picky.try_execute(lambda: "well") == "well"
    assert [dropped for _, _, dropped in algorithm.told] == [True, False]


@run_in_kernel
async def test_a_limit_that_changes_lets_more_in_and_an_algorithm_that_fails_changes_nothing(monkeypatch):
    reported, heard, algorithm = [], [], Told()
    monkeypatch.setattr("sys.unraisablehook", lambda report: reported.append(report.exc_value))
    limiter = ConcurrencyLimiter(algorithm, max_waiting=5)
    limiter.add_listener(lambda event: event.kind == "limit_changed" and heard.append(event.details))
    permits = [limiter.acquire_nowait() for _ in range(3)]
    algorithm.next = [5, ValueError("mine"), 0, 1]
    async with flowcoro.TaskGroup() as group:
        others = [group.spawn(limiter.acquire()) for _ in range(3)]
        await wait_all_tasks_parked()
        permits[0].release()
    assert limiter.statistics()["running"] == 5 and limiter.limit == 5
    permits[1].release()
    assert [str(error) for error in reported] == ["mine"] and limiter.limit == 5
    permits[2].release()
    assert limiter.limit == 1 and limiter.statistics()["running"] == 3
    for task in others:
        task.result().release()
    assert heard == [{"before": 3, "limit": 5}, {"before": 5, "limit": 1}]
    with pytest.raises(ValueError, match="Told says what it is"):
        limiter.set_limit(5)


def test_an_adaptive_limiter_whose_clock_goes_back_goes_on_from_where_it_was():
    clock, algorithm = Clock(1e6), AIMD(10, least=1)
    limiter = ConcurrencyLimiter(algorithm, clock=clock)
    for limit in (9, 8, 7):
        permit = limiter.acquire_nowait()
        clock.now -= 3600
        permit.release("dropped")
        assert limiter.limit == limit and limiter.statistics()["seconds"] == 0


@run_in_kernel
async def test_a_clock_that_fails_stands_still_and_keeps_no_place(reports):
    def read():
        if now is None:
            raise OSError("no clock")
        return now

    now, heard = 5.0, []
    limiter, rate = ConcurrencyLimiter(1, max_waiting=2, clock=read), RateLimiter(2, clock=read)
    permit = limiter.acquire_nowait()
    async with flowcoro.TaskGroup() as group:
        other = group.spawn(limiter.acquire())
        await wait_all_tasks_parked()
        now = None
        permit.release()
    other.result().release()
    await limiter.try_execute(heard.append, 1)
    assert [rate.check(), rate.check(), rate.check()] == [0.0, 0.0, 0.5] and rate.state_of().remaining == 0
    assert heard == [1] and limiter.statistics()["running"] == 0
    assert {message for message, _ in reports} == {
        f"flowcoro_resilience: the clock of '{name}' failed: time stands still" for name in ("ConcurrencyLimiter", "RateLimiter")}
    now = 5.5
    assert rate.check() == 0.0


def test_an_interrupted_listener_or_predicate_keeps_no_place():
    def interrupt(thing):
        raise KeyboardInterrupt

    limiter = ConcurrencyLimiter(AIMD(1, least=1), max_waiting=1, dropped=interrupt)
    limiter.add_listener(interrupt)

    async def within():
        async with limiter:
            pass

    async def waiting():
        permit = limiter.acquire_nowait()
        async with flowcoro.TaskGroup() as group:
            group.spawn(limiter.acquire())
            await wait_all_tasks_parked()
            permit.release("ignored")

    for main in (within, waiting):
        with pytest.raises(KeyboardInterrupt):
            flowcoro.run(main())
        assert limiter.statistics()["running"] == 0


@pytest.mark.parametrize("make, error, message", [
    (lambda: ConcurrencyLimiter(0), ValueError, "ConcurrencyLimiter(0): give a number of calls at a time, from 1 up"),
    (lambda: ConcurrencyLimiter(AIMD), TypeError, "(<class 'flowcoro_resilience.AIMD'>): give a number of calls at a time"),
    (lambda: ConcurrencyLimiter(1.5), TypeError, "ConcurrencyLimiter(1.5): give a number of calls at a time, an int"),
    (lambda: ConcurrencyLimiter(True), TypeError, "ConcurrencyLimiter(True)"),
    (lambda: ConcurrencyLimiter(1, max_waiting=-1), ValueError, "ConcurrencyLimiter(max_waiting=-1)"),
    (lambda: ConcurrencyLimiter(1, wait=1), ValueError, "ConcurrencyLimiter(wait=1, max_waiting=0): nobody may wait"),
    (lambda: ConcurrencyLimiter(1, max_waiting=1, wait=0), ValueError, "ConcurrencyLimiter(wait=0): give a number of seconds"),
    (lambda: ConcurrencyLimiter(1, dropped=KeyError), ValueError, "a fixed limit does not depend on that"),
    (lambda: ConcurrencyLimiter(AIMD(), dropped=5), TypeError, "ConcurrencyLimiter(dropped=5): give an exception type"),
    (lambda: ConcurrencyLimiter(1, clock=5), TypeError, "ConcurrencyLimiter(clock=5): give a function"),
    (lambda: ConcurrencyLimiter(1).set_limit(0), ValueError, "ConcurrencyLimiter.set_limit(0)"),
    (lambda: AIMD(10), ValueError, "AIMD(least=20, initial=10): give a number of calls, from 20 up"),
    (lambda: AIMD(300), ValueError, "AIMD(initial=300, most=200)"),
    (lambda: AIMD(least=0), ValueError, "AIMD(least=0)"),
    (lambda: AIMD(least=20, most=10), ValueError, "AIMD(least=20, most=10)"),
    (lambda: AIMD(backoff=0.4), ValueError, "AIMD(backoff=0.4)"),
    (lambda: AIMD(timeout=0), ValueError, "AIMD(timeout=0)"),
    (lambda: Gradient2(smoothing=0), ValueError, "Gradient2(smoothing=0)"),
    (lambda: Gradient2(tolerance=0.9), ValueError, "Gradient2(tolerance=0.9)"),
    (lambda: Gradient2(long_window=0), ValueError, "Gradient2(long_window=0)"),
    (lambda: Gradient2(queue_size=-1), ValueError, "Gradient2(queue_size=-1)"),
    (lambda: Gradient2(window=-1), ValueError, "Gradient2(window=-1)"),
    (lambda: Gradient2(samples=0), ValueError, "Gradient2(samples=0)"),
])
def test_impossible_limits_are_refused(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)
