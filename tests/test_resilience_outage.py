"""An outage of half a minute: a store that shops keep down by their retries, and one that is back at once, as its shop has a
budget and a breaker. Measured at the store, on a simulated network: examples/resilience_outage.py, and the same by RPC.
"""

import functools
import importlib.util
import os
import pathlib
import random

import pytest

import flowcoro
from flowcoro_net import TcpServer
from flowcoro_resilience import Rejected
from flowcoro_rpc import Backoff, Newline, RpcClient, RpcServer
from flowcoro_testing import VirtualClock

EXAMPLE = pathlib.Path(__file__).resolve().parent.parent / "examples" / "resilience_outage.py"
FIRST, SEEDS = int(os.environ.get("FLOWCORO_FIRST_SEED", 1)), int(os.environ.get("FLOWCORO_SEEDS", 0))
ALONE, WITH = "retries alone", "budget, breaker"
LATER = 5           # seconds after the outage from which on all is to be well


def fresh():
    """The example anew, with policies that nothing has happened to."""
    spec = importlib.util.spec_from_file_location("resilience_outage", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def run(example, name, seed):
    """(what arrived at the store in each second, what of those that were asked in each second was not answered)"""
    random.seed(seed)
    load, failed = [0] * (example.END + 5), [0] * example.END
    flowcoro.run(example.outage(example.POLICIES[name], load, failed), clock=VirtualClock(), seed=seed)
    return load[:example.END], failed


def check_down_for_good(example, load, failed, seed):
    """The store has what is several times the normal load, and answers nobody, though nothing is broken any more."""
    late = slice(example.UP + LATER, example.END)
    assert failed[late] == [example.RATE] * (example.END - example.UP - LATER), (seed, failed)
    assert min(load[late]) > 3 * example.RATE, (seed, load)


def check_back_at_once(example, load, failed, seed):
    assert max(load[example.UP:]) < 1.3 * example.RATE, (seed, load)
    assert not any(failed[example.UP + LATER:]), (seed, failed)


def check_before(example, load, failed, seed):
    """It has been well, and the outage was one."""
    assert sum(load[:example.DOWN - 1]) == pytest.approx(example.RATE * (example.DOWN - 1), abs=2)
    assert not any(failed[:example.DOWN - 1]) and not any(load[example.DOWN + 1:example.UP]), (seed, load, failed)
    assert all(failed[example.DOWN + 1:example.UP - LATER]), (seed, failed)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + max(1, SEEDS // 500)))
def test_retries_alone_keep_the_store_down(seed):
    example = fresh()
    example.END = example.UP + LATER + 4
    outcome = run(example, ALONE, seed)
    check_before(example, *outcome, seed)
    check_down_for_good(example, *outcome, seed)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + max(2, SEEDS // 25)))
def test_with_budget_and_breaker_the_store_is_back_at_once(seed):
    example = fresh()
    outcome = run(example, WITH, seed)
    check_before(example, *outcome, seed)
    check_back_at_once(example, *outcome, seed)


# ---- by RPC ----------------------------------------------------------------------------------------------------

def by_rpc(example):
    """The same store and shop, but for what they speak: one connection, which the client makes again."""
    async def store(load, cold):
        server, free = RpcServer(), 0.0

        @server.method
        async def answer():
            nonlocal free, cold
            load[int(flowcoro.now())] += 1
            free, cold = max(free, flowcoro.now()) + (2 if cold > 0 else 1) / example.CAPACITY, cold - 1
            await flowcoro.sleep_until(free)

        async with await TcpServer.listen("store", 80) as listening:
            await listening.serve(functools.partial(server.serve_connection, framing=Newline))

    async def shop(policy, failed):
        async def ask(second):
            try:
                await client.call("answer", idempotent=True)
            except (TimeoutError, OSError, Rejected):
                failed[second] += 1

        async with await RpcClient.connect("store", 80, timeout=1, connect_timeout=1, reconnect=Backoff(most=1),
                                           policy=policy) as client:
            async with flowcoro.TaskGroup() as group:
                for number in range(example.RATE * example.END):
                    await flowcoro.sleep_until((number + random.random()) / example.RATE)
                    group.spawn(ask(number // example.RATE))

    example.store, example.shop = store, shop


def test_by_rpc_it_is_the_same():
    for name, check in (ALONE, check_down_for_good), (WITH, check_back_at_once):
        example = fresh()
        by_rpc(example)
        outcome = run(example, name, FIRST)
        check_before(example, *outcome, FIRST)
        check(example, *outcome, FIRST)
