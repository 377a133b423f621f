"""flowcoro_resilience: Cache. On the virtual clock. FLOWCORO_SEEDS as in test_resilience_retry.py."""

import collections
import contextvars
import functools
import gc
import itertools
import math
import os
import random
import threading

import pytest

import flowcoro
import flowcoro_resilience
from conftest import parked
from flowcoro_resilience import Cache, Keyed, Pipeline, Retry, Timeout
from flowcoro_testing import VirtualClock, run_in_kernel
from test_net_cancel import at_each_point

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 30)))

workers = pytest.mark.parametrize("workers", [1, 3])


class Asked:
    """An operation that takes a second, and counts its calls: "a1", "a2", … for "a". While `down` it raises."""

    def __init__(self, seconds=1.0):
        self.seconds, self.calls, self.under_way, self.cancelled, self.down = seconds, 0, 0, 0, False

    async def __call__(self, key="a"):
        self.calls += 1
        number = self.calls
        self.under_way += 1
        try:
            await flowcoro.sleep(self.seconds)
        except flowcoro.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.under_way -= 1
        if self.down:
            raise ConnectionError(f"{key}{number}")
        return f"{key}{number}"


def kinds(cache):
    """The counts of a cache that are not 0."""
    return {kind: count for kind, count in cache._counts.items() if count}


def alive():
    return flowcoro.statistics()["tasks"]["alive"]


# ---- what is kept ----------------------------------------------------------------------------------------------

@run_in_kernel
async def test_a_result_is_given_again_until_its_time_is_over():
    cache, operation, heard = Cache(10), Asked(), []
    cache.add_listener(lambda event: heard.append((event.kind, event.key)))
    assert await cache.try_execute(operation, "x") == "x1" and flowcoro.now() == 1.0
    await flowcoro.sleep(9.9)
    assert await cache.try_execute(operation, "x") == "x1"
    assert await cache.try_execute(operation, "y") == "y2"
    assert await cache.try_execute(operation, "x") == "x3"
    assert heard == [("miss", (operation, ("x",))), ("hit", (operation, ("x",))), ("miss", (operation, ("y",))),
                     ("miss", (operation, ("x",)))]
    assert cache.statistics() == {
        "name": "Cache", "keys": 2, "max_keys": 1024, "under_way": 0, "hit": 1, "miss": 3, "shared": 0, "stale": 0,
        "stale_if_error": 0, "negative": 0, "refreshed": 0, "failed": 0, "evicted": 0}


@run_in_kernel
async def test_what_is_asked_is_the_operation_with_its_arguments_or_what_a_function_says():
    async def add(*numbers, **more):
        calls.append(numbers)
        return sum(numbers) + sum(more.values())

    async def multiply(*numbers):
        calls.append(numbers)
        return math.prod(numbers)

    cache, calls = Cache(math.inf), []
    for _ in range(2):
        assert await cache.try_execute(add, 2, 3) == 5
        assert await cache.try_execute(multiply, 2, 3) == 6
        assert await cache.try_execute(add, 2, a=1, b=5) == 8
        assert await cache.try_execute(add, 2, b=5, a=1) == 8
        assert await cache.try_execute(add, 2) == 2
    assert len(calls) == 4
    with pytest.raises(TypeError, match=r"cannot be a key: unhashable type: 'list'. Give Cache\(key="):
        await cache.try_execute(add, [1])
    lists = Cache(math.inf, key=lambda numbers: tuple(numbers))
    assert await lists.try_execute(sum, [1, 2]) == await lists.try_execute(sum, [1, 2]) == 3
    assert lists.key_of(sum, [1, 2]) == (1, 2) and cache.invalidate(cache.key_of(add, 2, b=5, a=1))
    assert kinds(lists) == {"hit": 1, "miss": 1}
    with pytest.raises(ZeroDivisionError):
        await Cache(1, key=lambda: 1 / 0).try_execute(dict)


@run_in_kernel
async def test_it_sees_the_arguments_wherever_it_stands_and_not_where_the_call_goes():
    operation = Asked()
    operation.key, operation.idempotent = "there", True
    cache = Cache(10)
    pipeline = Pipeline(Timeout(9), Keyed(lambda key: Retry()), Pipeline(cache, Timeout(5)))
    assert await pipeline.try_execute(operation, "x") == "x1"
    assert await pipeline.try_execute(operation, "y") == "y2"
    assert await pipeline.try_execute(operation, "x") == "x1"
    keyed = Pipeline(Keyed(lambda key: Cache(10, name=key), key=lambda letter: f"cache of {letter}"), Timeout(5))
    assert await keyed.try_execute(operation, "x") == "x3" and keyed.policies[0].keys() == ["cache of x"]


@run_in_kernel
async def test_it_decorates():
    cache = Cache(10, key=lambda letter: letter)

    @cache
    async def ask(letter):
        return next(numbers)

    numbers = itertools.count()
    assert [await ask("a"), await ask("b"), await ask("a")] == [0, 1, 0]
    assert cache.invalidate("a") and not cache.invalidate("a")
    assert await ask("a") == 2


@run_in_kernel
async def test_what_it_has_decorated_is_forgotten_by_that_name_whatever_stands_around_it():
    cache = Cache(10)

    class Shop:
        @Retry()
        @cache
        async def price(self, thing):
            return next(numbers)

    numbers, shop = itertools.count(), Shop()
    assert [await shop.price("tea"), await shop.price("tea")] == [0, 0]
    assert cache.invalidate(cache.key_of(Shop.price, shop, "tea")) and await shop.price("tea") == 1


@run_in_kernel
async def test_a_clock_that_fails_keeps_nothing_and_nobody_waiting(reports):
    def read():
        if broken:
            raise OSError("no clock")
        return 0.0

    async def ask():
        broken.append(1)
        await flowcoro.sleep(1)
        return next(numbers)

    broken, numbers = [], itertools.count()
    cache = Cache(10, clock=read)
    assert await cache.try_execute(ask) == 0
    assert [message.partition(" for ")[0] for message, _ in reports] == [
        "flowcoro_resilience: the clock of 'Cache' failed: what has come"]
    broken.clear()
    assert await cache.try_execute(ask) == 1 and cache.statistics()["under_way"] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_not_asked_for_longest_goes(seed):
    chance = random.Random(seed)
    size, evicted = chance.randint(1, 5), []
    cache, model = Cache(math.inf, key=lambda key: key, max_keys=size), collections.OrderedDict()
    cache.add_listener(lambda event: event.kind == "evicted" and evicted.append(event.key))

    async def main():
        gone = []
        for number in range(200):
            key = chance.randint(0, 7)
            got = await cache.try_execute(lambda key: number, key)
            if key not in model:
                model[key] = number
                if len(model) > size:
                    gone.append(model.popitem(last=False)[0])
            model.move_to_end(key)
            assert got == model[key] and list(cache._entries) == list(model)
            if chance.random() < 0.05:
                assert cache.invalidate(key)
                del model[key]
        assert evicted == gone and cache.statistics()["evicted"] == len(gone)

    flowcoro.run(main(), clock=VirtualClock())


# ---- one call for all ------------------------------------------------------------------------------------------

@run_in_kernel
async def test_calls_at_the_same_time_are_one_and_all_get_what_it_brings():
    cache, operation, got = Cache(0), Asked(), []

    async def ask():
        try:
            got.append(await cache.try_execute(operation))
        except ConnectionError as error:
            got.append(error)

    for down in (False, True):
        operation.down = down
        async with flowcoro.TaskGroup() as group:
            for _ in range(50):
                group.spawn(ask())
                await flowcoro.sleep(0.01)
    assert operation.calls == 2 and got[:50] == ["a1"] * 50 and len(set(got[50:])) == 1 and str(got[50]) == "a2"
    assert kinds(cache) == {"miss": 2, "shared": 98, "failed": 1}
    assert alive() == 1 and not cache._flights


@run_in_kernel
async def test_who_came_first_may_leave_and_the_others_get_the_result():
    cache, operation, got = Cache(10), Asked(), []

    async def ask(patience):
        with flowcoro.move_on_after(patience):
            got.append((await cache.try_execute(operation), flowcoro.now()))

    async with flowcoro.TaskGroup() as group:
        await parked(group, ask(0.25), ask(0.5), ask(5), ask(0.75))
    assert got == [("a1", 1.0)] and operation.calls == 1 and operation.cancelled == 0


@run_in_kernel
async def test_the_last_to_leave_cancels_the_call_and_waits_for_its_end():
    async def slow():
        calls.append(1)
        try:
            await flowcoro.sleep(5)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(1)

    cache, calls, ends = Cache(10), [], []

    async def ask(patience):
        with flowcoro.move_on_after(patience):
            await cache.try_execute(slow)
        ends.append(flowcoro.now())

    async with flowcoro.TaskGroup() as group:
        await parked(group, ask(1), ask(2))
        await flowcoro.sleep(2.5)
        assert not cache._flights and alive() == 3
        await parked(group, ask(1))             # while the first one is being ended, a new one begins
        assert len(calls) == 2
    assert ends == [1.0, 3.0, 4.5] and alive() == 1 and not cache._flights and kinds(cache) == {"miss": 2, "shared": 1}


@run_in_kernel
async def test_the_call_runs_in_the_context_of_who_came_first():
    variable, seen = contextvars.ContextVar("variable"), []

    async def look():
        seen.append(variable.get())

    variable.set("mine")
    await Cache(1).try_execute(look)
    assert seen == ["mine"]


@run_in_kernel
async def test_a_call_that_asks_for_itself_is_told_and_others_may_ask_within():
    cache, operation = Cache(10), Asked()

    async def ask(deep):
        return await (cache.try_execute(ask, deep - 1) if deep else cache.try_execute(operation))

    async def circle():
        return await cache.try_execute(circle)

    assert await cache.try_execute(ask, 3) == "a1"
    with pytest.raises(RuntimeError, match="asks for that key itself, and would wait for ever"):
        await cache.try_execute(circle)
    assert not cache._flights and alive() == 1


@run_in_kernel
async def test_a_call_that_cancels_itself_is_a_cancelled_task_for_all_who_wait():
    async def give_up():
        await flowcoro.sleep(1)
        flowcoro.current_task().cancel()
        await flowcoro.sleep(0)

    cache, got = Cache(10), []

    async def ask():
        with pytest.raises(flowcoro.TaskCancelled, match="was cancelled"):
            await cache.try_execute(give_up)
        got.append(1)

    async with flowcoro.TaskGroup() as group:
        await parked(group, ask(), ask())
    assert len(got) == 2 and not cache._flights


def test_at_the_end_of_the_run_calls_and_refreshes_are_cancelled_and_the_next_run_makes_its_own():
    cache, operation = Cache(5, stale_seconds=100), Asked()

    async def main():
        await cache.try_execute(operation)
        await flowcoro.sleep(50)
        assert await cache.try_execute(operation) == "a1"
        flowcoro.spawn(cache.try_execute(operation, "other"))
        await flowcoro.sleep(0.5)
        assert operation.under_way == 2

    flowcoro.run(main(), clock=VirtualClock())
    assert operation.cancelled == 2 and not cache._flights and operation.under_way == 0

    async def again():
        return await cache.try_execute(operation, "other")

    assert flowcoro.run(again(), clock=VirtualClock()) == "other4"


def test_two_runs_in_two_threads_share_what_is_kept_and_not_what_is_under_way():
    cache, barrier, got = Cache(math.inf, key=lambda: "key"), threading.Barrier(2), []

    async def operation():
        await flowcoro.to_thread(barrier.wait)
        return len(got)

    def run():
        got.append(flowcoro.run(cache.try_execute(operation)))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 2 and kinds(cache) == {"miss": 2} and not cache._flights
    assert flowcoro.run(cache.try_execute(operation)) in got


# ---- stale and negative ----------------------------------------------------------------------------------------

@run_in_kernel
async def test_an_old_result_is_given_while_a_new_one_is_fetched_once():
    cache, operation, heard = Cache(10, stale_seconds=20), Asked(), []
    cache.add_listener(lambda event: heard.append(event.kind))
    await cache.try_execute(operation)
    await flowcoro.sleep(15)
    for _ in range(5):
        assert await cache.try_execute(operation) == "a1"
    assert operation.calls == 1 and flowcoro.now() == 16.0       # it has not begun yet
    await flowcoro.sleep(2)
    assert operation.calls == 2 and await cache.try_execute(operation) == "a2"
    await flowcoro.sleep(50)
    assert await cache.try_execute(operation) == "a3"           # too old to be given
    assert heard == ["miss"] + ["stale"] * 5 + ["refreshed", "hit", "miss"]
    assert kinds(cache) == {"miss": 2, "stale": 5, "refreshed": 1, "hit": 1}


@run_in_kernel
async def test_who_comes_when_the_old_one_is_too_old_waits_for_the_refresh_and_may_leave_it(reports):
    cache, operation = Cache(10, stale_seconds=2), Asked(5.0)
    await cache.try_execute(operation)
    await flowcoro.sleep(11)
    assert await cache.try_execute(operation) == "a1"
    await flowcoro.sleep(2)
    with flowcoro.move_on_after(1):
        await cache.try_execute(operation)
    assert operation.under_way == 1                             # nobody waits, and it goes on
    assert await cache.try_execute(operation) == "a2" and operation.calls == 2
    assert kinds(cache) == {"miss": 1, "stale": 1, "shared": 2, "refreshed": 1} and not reports


@run_in_kernel
async def test_a_refresh_that_fails_is_reported_and_there_is_none_for_a_second(reports):
    cache, operation = Cache(10, stale_seconds=100), Asked(0.0)
    await cache.try_execute(operation)
    await flowcoro.sleep(20)
    operation.down = True
    for _ in range(50):
        assert await cache.try_execute(operation) == "a1"
        await flowcoro.sleep(0.0625)
    assert operation.calls == 5 and len(reports) == 4           # the first, and after 1, 2 and 3 of 3.1 seconds
    assert not any(entry.error for entry in cache._entries.values())
    assert "the call of 'Cache' for" in reports[0][0] and str(reports[0][1]) == "a2"
    operation.down = False
    await flowcoro.sleep(1)
    await cache.try_execute(operation)
    await flowcoro.sleep(1)
    assert await cache.try_execute(operation) == "a6"


@run_in_kernel
async def test_a_success_makes_up_for_the_failure_before():
    cache, operation = Cache(0.25, stale_seconds=100), Asked(0.0)
    await cache.try_execute(operation)
    await flowcoro.sleep(200)
    operation.down = True
    with pytest.raises(ConnectionError):
        await cache.try_execute(operation)
    operation.down = False
    await cache.try_execute(operation)
    await flowcoro.sleep(0.25)
    assert await cache.try_execute(operation) == "a3"
    await flowcoro.sleep(0)
    assert operation.calls == 4                 # it is fetched at once


@run_in_kernel
async def test_when_no_task_can_be_made_for_a_call_it_is_not_under_way(monkeypatch):
    def fail(coro, name):
        coro.close()
        raise RuntimeError("the run ends")

    cache, operation = Cache(10), Asked()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the run ends"):
        patch.setattr(flowcoro, "spawn", fail)
        await cache.try_execute(operation)
    assert await cache.try_execute(operation) == "a1"


@run_in_kernel
async def test_an_old_result_is_given_if_the_call_fails():
    cache, operation, got = Cache(10, stale_if_error=30, errors=OSError), Asked(), []
    heard = []
    cache.add_listener(lambda event: heard.append(event.kind))
    await cache.try_execute(operation)
    await flowcoro.sleep(20)
    operation.down = True

    async def ask():
        got.append(await cache.try_execute(operation))

    async with flowcoro.TaskGroup() as group:
        await parked(group, ask(), ask())
    assert got == ["a1", "a1"] and operation.calls == 2
    await flowcoro.sleep(30)
    with pytest.raises(ConnectionError):
        await cache.try_execute(operation)
    assert heard == ["miss", "miss", "shared", "failed", "stale_if_error", "stale_if_error", "miss", "failed"]
    picky = Cache(1, stale_if_error=30, errors=KeyError)
    operation.down = False
    await picky.try_execute(operation)
    await flowcoro.sleep(2)
    operation.down = True
    with pytest.raises(ConnectionError):
        await picky.try_execute(operation)


@run_in_kernel
async def test_an_error_is_given_again_if_that_is_wanted():
    cache, operation = Cache(10, negative_seconds=5, errors=OSError), Asked()
    operation.down = True
    found = set()
    for _ in range(4):
        with pytest.raises(ConnectionError) as caught:
            await cache.try_execute(operation)
        found.add(caught.value)
        assert len(caught.traceback) < 10
        await flowcoro.sleep(1)
    assert len(found) == 1 and operation.calls == 1 and kinds(cache) == {"miss": 1, "failed": 1, "negative": 3}
    await flowcoro.sleep(2)
    operation.down = False
    assert await cache.try_execute(operation) == "a2"
    assert await cache.try_execute(operation) == "a2"
    without, operation = Cache(10), Asked()
    operation.down = True
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await without.try_execute(operation)
    assert operation.calls == 2 and not without._entries


@run_in_kernel
async def test_what_is_forgotten_while_it_is_fetched_is_not_kept_and_who_comes_later_fetches_it_anew():
    cache, operation, got, dropped = Cache(10, key=lambda: "key"), Asked(), [], []
    operation.discard = dropped.append

    async def ask():
        got.append(await cache.try_execute(operation))

    async with flowcoro.TaskGroup() as group:
        await parked(group, ask())
        await flowcoro.sleep(0.5)
        assert cache.invalidate("key")
        await parked(group, ask())
    assert got == ["a1", "a2"] and await cache.try_execute(operation) == "a2" and not dropped
    cache.clear()
    assert not cache.invalidate("key")
    async with flowcoro.TaskGroup() as group:
        group.spawn(ask())
        await flowcoro.sleep(0.5)
        cache.clear()
        operation.seconds = 9.0
    assert got[-1] == "a3" and not cache._entries


@run_in_kernel
async def test_a_result_that_nobody_gets_is_let_go_of():
    async def stubborn():
        with flowcoro.CancelScope(shield=True):
            await flowcoro.sleep(2)
        return "done"

    dropped, cache = [], Cache(10, stale_seconds=100, key=lambda: "key")
    stubborn.discard = dropped.append
    with flowcoro.move_on_after(1):
        await cache.try_execute(stubborn)
    assert dropped == ["done"] and not cache._entries and flowcoro.now() == 2.0
    await cache.try_execute(stubborn)
    await flowcoro.sleep(20)
    await cache.try_execute(stubborn)           # a refresh begins
    await flowcoro.sleep(1)
    cache.invalidate("key")
    await flowcoro.sleep(2)
    assert dropped == ["done"] * 2 and alive() == 1


@run_in_kernel
async def test_an_error_of_a_call_that_nobody_waits_for_any_more_is_reported(reports):
    async def broken():
        try:
            await flowcoro.sleep(5)
        finally:
            raise ValueError("in the end")

    cache = Cache(10)
    with flowcoro.move_on_after(1) as scope:
        await cache.try_execute(broken)
    assert scope.cancelled_caught and [str(error) for _, error in reports] == ["in the end"] and not cache._flights


# ---- against a model -------------------------------------------------------------------------------------------

class Model:
    """A cache that is asked at known times for calls whose ends are known: all events in order, nothing clever."""

    def __init__(self, seconds, stale, if_error, negative, scripts):
        self.seconds, self.stale, self.if_error, self.negative, self.scripts = seconds, stale, if_error, negative, scripts
        self.values, self.failures, self.flights, self.calls = {}, {}, {}, collections.Counter()
        self.got = {}               # asker: (what, when)

    def begin(self, key, now, refresh):
        seconds, good = self.scripts[key][self.calls[key]]
        self.calls[key] += 1
        self.flights[key] = {"end": now + seconds, "good": good, "what": f"{key}{self.calls[key]}", "waiters": {},
                             "refresh": refresh}

    def ask(self, asker, key, patience, now):
        value, made = self.values.get(key, (None, -math.inf))
        error, failed = self.failures.get(key, (None, -math.inf))
        age = now - made
        if age < self.seconds:
            self.got[asker] = value, now
        elif age < self.seconds + self.stale:
            self.got[asker] = value, now
            if key not in self.flights and now >= failed + max(1.0, self.negative):
                self.begin(key, now, True)
        elif now < failed + self.negative:
            self.got[asker] = (value if age < self.seconds + self.if_error else error), now
        else:
            if key not in self.flights:
                self.begin(key, now, False)
            self.flights[key]["waiters"][asker] = now + patience

    def land(self, key):
        flight = self.flights.pop(key)
        now, what = flight["end"], flight["what"]
        if flight["good"]:
            self.values[key] = what, now
            self.failures.pop(key, None)
        else:
            what = f"error {what}"
            self.failures[key] = what, now
            value, made = self.values.get(key, (None, -math.inf))
            if now - made < self.seconds + self.if_error:
                what = value
        for asker in flight["waiters"]:
            self.got[asker] = what, now

    def leave(self, key, asker):
        flight = self.flights[key]
        self.got[asker] = "left", flight["waiters"].pop(asker)
        if not flight["waiters"] and not flight["refresh"]:
            del self.flights[key]

    def run(self, asks):
        asks = sorted(asks)
        while asks or self.flights:
            events = [(when, self.ask, (asker, key, patience, when)) for when, asker, key, patience in asks[:1]]
            for key, flight in self.flights.items():
                events.append((flight["end"], self.land, (key,)))
                events += [(until, self.leave, (key, asker)) for asker, until in flight["waiters"].items()]
            _, method, arguments = min(events, key=lambda event: event[0])
            if method == self.ask:
                del asks[0]
            method(*arguments)
        return self.got


@pytest.mark.parametrize("seed", SEEDS)
def test_many_who_ask_get_what_the_model_gives(seed, reports):
    chance = random.Random(seed)
    settings = [chance.choice([0, 1, 4]), chance.choice([0, 3]), chance.choice([0, 5]), chance.choice([0, 1.5])]
    scripts = {key: [(chance.uniform(0, 3), chance.random() < 0.6) for _ in range(60)] for key in "ab"}
    asks = [(chance.uniform(0, 25), asker, chance.choice("ab"), chance.choice([math.inf, chance.uniform(0, 3)]))
            for asker in range(50)]
    seconds, stale, if_error, negative = settings
    cache = Cache(seconds, stale_seconds=stale, stale_if_error=if_error, negative_seconds=negative)
    calls, under_way, got = collections.Counter(), collections.Counter(), {}

    async def operation(key):
        seconds, good = scripts[key][calls[key]]
        calls[key] += 1
        what = f"{key}{calls[key]}"
        under_way[key] += 1
        assert under_way[key] == 1
        try:
            await flowcoro.sleep(seconds)
        finally:
            under_way[key] -= 1
        if not good:
            raise ConnectionError(what)
        return what

    async def one(when, asker, key, patience):
        await flowcoro.sleep(when)
        what = "left"
        with flowcoro.move_on_after(patience):
            try:
                what = await cache.try_execute(operation, key)
            except ConnectionError as error:
                what = f"error {error}"
        got[asker] = what, flowcoro.now()

    async def main():
        async with flowcoro.TaskGroup() as group:
            for ask in asks:
                group.spawn(one(*ask))
        await flowcoro.sleep(10)                # refreshes
        assert alive() == 1 and not cache._flights

    flowcoro.run(main(), clock=VirtualClock(), seed=seed)
    model = Model(*settings, scripts)
    expected = model.run(asks)
    assert {asker: what for asker, (what, _) in got.items()} == {asker: what for asker, (what, _) in expected.items()}
    assert [got[asker][1] for asker in range(50)] == pytest.approx([expected[asker][1] for asker in range(50)])
    assert calls == model.calls
    assert if_error or sum(cache._counts[kind] for kind in ("hit", "miss", "shared", "stale", "negative")) == 50


@pytest.mark.parametrize("made, failed, expected", [
    (None, None, "miss"), (0.0, None, "hit"), (9.0, None, "hit"), (10.0, None, "stale"), (14.0, None, "stale"),
    (15.0, None, "miss"),
    (None, 0.0, "negative"), (None, 2.0, "negative"), (None, 3.0, "miss"),
    (5.0, 1.0, "hit"), (12.0, 1.0, "stale"), (16.0, 1.0, "stale_if_error"), (29.0, 2.9, "stale_if_error"),
    (30.0, 1.0, "negative"), (30.0, 3.0, "miss"),
])
def test_each_state_of_what_is_kept(made, failed, expected):
    """made, failed: how many seconds ago."""
    rules = flowcoro_resilience._Freshness(10.0, 5.0, 20.0, 3.0)
    entry = flowcoro_resilience._Entry()
    if made is not None:
        entry.value, entry.made = "value", 100.0 - made
    if failed is not None:
        entry.error, entry.failed = KeyError(), 100.0 - failed
    assert rules.look(entry, 100.0) == expected and rules.look(None, 100.0) == "miss"
    assert rules.serves_instead(entry, 100.0) == (made is not None and made < 30.0)
    assert rules.wants_refresh(entry, 100.0) == (failed is None or failed >= 3.0)


@run_in_kernel
async def test_a_clock_that_goes_back_lets_nothing_live_longer():
    now, operation = [1000.0], Asked(0.0)
    cache = Cache(10, clock=lambda: now[0])
    assert await cache.try_execute(operation) == "a1"
    now[0] = 0.0
    assert await cache.try_execute(operation) == "a1"
    now[0] = 9.9
    assert await cache.try_execute(operation) == "a1"
    now[0] = 10.0
    assert await cache.try_execute(operation) == "a2"


@run_in_kernel
async def test_predicates_and_listeners_that_raise_are_reported(reports):
    def bad(thing):
        raise RuntimeError("mine")

    cache, operation = Cache(1, stale_if_error=9, errors=bad), Asked()
    cache.add_listener(bad)
    await cache.try_execute(operation)
    await flowcoro.sleep(2)
    operation.down = True
    with pytest.raises(ConnectionError):
        await cache.try_execute(operation)
    assert [message for message, _ in reports] == [
        *["flowcoro_resilience: a listener of 'Cache' failed at 'miss'"] * 2,
        "flowcoro_resilience: the predicate Cache(errors=…) of 'Cache' failed, which means no",
        "flowcoro_resilience: a listener of 'Cache' failed at 'failed'"]


@workers
def test_cancelled_at_each_point_it_leaves_nothing(workers):
    async def main():
        cache, under_way = Cache(0.0), []

        async def operation():
            under_way.append(1)
            try:
                for _ in range(3):
                    await flowcoro.sleep(0)
                await flowcoro.sleep(0.001)
                return "done"
            finally:
                under_way.pop()

        async def after(cancelled):
            assert not under_way and not cache._flights
            while alive() > 1:
                await flowcoro.sleep(0)

        assert await at_each_point(lambda: cache.try_execute(operation), after) >= 1

    flowcoro.run(main(), workers=workers)


@pytest.mark.parametrize("seed", SEEDS)
def test_cancelled_at_any_moment_nobody_else_notices(seed):
    chance, got = random.Random(seed), []

    async def main():
        cache, operation = Cache(chance.choice([0, 0.5])), Asked(1.0)

        async def ask(patience):
            with flowcoro.move_on_after(patience):
                got.append(await cache.try_execute(operation))

        async with flowcoro.TaskGroup() as group:
            for _ in range(20):
                group.spawn(ask(chance.choice([0, 0.5, 1.0, 1.5, 2.0, 5.0])))
                await flowcoro.sleep(chance.choice([0, 0, 0.5, 1.0]))
        assert operation.under_way == 0 and not cache._flights and alive() == 1
        assert not any(entry.error for entry in cache._entries.values())

    flowcoro.run(main(), clock=VirtualClock(), seed=seed)


def test_with_several_workers_one_call_is_made_for_each_key():
    cache, under_way, calls = Cache(math.inf, key=lambda key: key), collections.Counter(), collections.Counter()

    async def operation(key):
        calls[key] += 1
        under_way[key] += 1
        await flowcoro.sleep(0.0001)
        assert under_way[key] == 1
        under_way[key] -= 1
        return key

    async def caller(number):
        for step in range(100):
            key = (number + step) % 7 + 10 * (step // 20)
            assert await cache.try_execute(operation, key) == key
            if step % 5 == 0:
                with flowcoro.move_on_after(0):
                    await cache.try_execute(operation, key)

    async def main():
        async with flowcoro.TaskGroup() as group:
            for number in range(16):
                group.spawn(caller(number))

    flowcoro.run(main(), workers=3)
    assert set(calls.values()) == {1} and len(calls) == 35 and not cache._flights


@run_in_kernel
async def test_nothing_is_garbage_after_a_call_that_fails(monkeypatch):
    async def fail(*, good=()):
        await flowcoro.sleep(1)
        if not good:
            raise ConnectionError("down")

    monkeypatch.setattr("sys.unraisablehook", lambda report: None)
    cache = Cache(1, stale_seconds=1000, key=lambda good=(): "key")
    await cache.try_execute(fail, good=True)
    await flowcoro.sleep(5)
    gc.collect()
    gc.disable()
    try:
        await cache.try_execute(fail)           # a refresh
        await flowcoro.sleep(5)
        assert gc.collect() == 0
        try:
            await Cache(10).try_execute(fail)
        except ConnectionError:
            pass
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("make, error, message", [
    (functools.partial(Cache, -1), ValueError, "Cache(seconds=-1): give a number of seconds from 0 up"),
    (functools.partial(Cache, "1"), TypeError, "Cache(seconds='1')"),
    (functools.partial(Cache, 1, stale_seconds=-1), ValueError, "Cache(stale_seconds=-1)"),
    (functools.partial(Cache, 1, stale_if_error=math.nan), ValueError, "Cache(stale_if_error=nan)"),
    (functools.partial(Cache, 1, negative_seconds=None), TypeError, "Cache(negative_seconds=None)"),
    (functools.partial(Cache, math.inf, stale_seconds=5), ValueError, "what is kept for ever is never stale"),
    (functools.partial(Cache, 1, key="x"), TypeError, "Cache(key='x'): give a function of the operation's arguments, or None"),
    (functools.partial(Cache, 1, max_keys=0), ValueError, "Cache(max_keys=0): give a number of keys, from 1 up"),
    (functools.partial(Cache, 1, key=flowcoro.when_all), TypeError, "this one is async"),
    (functools.partial(Cache, 1, errors=5), TypeError, "Cache(errors=5)"),
    (functools.partial(Cache, 1, clock=5), TypeError, "Cache(clock=5)"),
])
def test_impossible_settings_are_refused(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


@run_in_kernel
async def test_policies_around_a_cache_in_a_pipeline_let_go_of_nothing_that_others_have():
    asked, dropped = Asked(), []
    asked.discard = dropped.append
    policy = Pipeline(Retry(3, first=0.1, result=lambda result: True, idempotent=True), Cache(60))
    assert await policy.try_execute(asked) == "a1" and asked.calls == 1
    retry, cache = policy.policies
    assert await Pipeline(retry, Pipeline(Pipeline(), cache)).try_execute(asked) == "a1" and asked.calls == 1 and dropped == []
    within = Pipeline(Cache(60), Retry(3, first=0.1, result=lambda result: result != "a4", idempotent=True))
    assert await within.try_execute(asked) == "a4"
    assert dropped == ["a2", "a3"]
