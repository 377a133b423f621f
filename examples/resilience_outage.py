"""A dependency is down for half a minute. Retries alone keep it down; with a budget and a circuit breaker it is back at once.

A shop asks a store 10 times a second, which can answer 15, half as many while it is cold, and goes on with questions whose
askers have given up: nobody tells it. Once it is behind, each answer is late, each question asked four times; so it stays behind.
"""

import random

import flowcoro
from flowcoro_http import HttpClient, HttpServer, RequestError
from flowcoro_resilience import CircuitBreaker, Pipeline, Rejected, Retry, RetryBudget
from flowcoro_testing import SimulatedNetwork, VirtualClock

RATE, CAPACITY, DOWN, UP, END = 10, 15, 10, 40, 60      # questions and answers a second; seconds
random.seed(1)
breaker = CircuitBreaker(window_seconds=10, minimum_calls=10, open_seconds=2, open_jitter=0.2, probes=5)
POLICIES = {"retries alone": Retry(4, budget=RetryBudget(floor=float("inf"))),
            "budget, breaker": Pipeline(Retry(4, budget=RetryBudget(floor=1)), breaker)}


async def store(load, cold):
    app, free = HttpServer(), 0.0               # free: when it will have answered all that it was asked

    @app.get("/")
    async def answer(request):
        nonlocal free, cold
        load[int(flowcoro.now())] += 1
        free, cold = max(free, flowcoro.now()) + (2 if cold > 0 else 1) / CAPACITY, cold - 1
        await flowcoro.sleep_until(free)
    async with await app.listen("store", 80) as server:
        await server.serve()


async def shop(policy, failed):
    async def ask(second):
        try:
            await client.get("http://store/")
        except (RequestError, Rejected):
            failed[second] += 1
    async with HttpClient(timeout=1, policy=policy, trust_env=False) as client, flowcoro.TaskGroup() as group:
        for number in range(RATE * END):
            await flowcoro.sleep_until((number + random.random()) / RATE)
            group.spawn(ask(number // RATE))


async def outage(policy, load, failed):
    network = SimulatedNetwork(latency=0.005)
    async with flowcoro.TaskGroup() as group:
        network.host("store").boot(group, lambda: store(load, 20 if flowcoro.now() >= UP else 0))
        network.host("shop").spawn(group, shop(policy, failed))
        for at, change in (DOWN, network.crash), (UP, network.restart), (END + 5, lambda host: group.cancel()):
            await flowcoro.sleep_until(at)
            change("store")


if __name__ == "__main__":
    for name, policy in POLICIES.items():
        load, failed = [0] * (END + 5), [0] * END           # of each second: what has arrived, what was not answered
        flowcoro.run(outage(policy, load, failed), clock=VirtualClock(), seed=1)
        print(f"{name:16}", *(f"{sum(load[at:at + 5]) / 5:.0f}/{sum(failed[at:at + 5]) / 5:<4.0f}" for at in range(0, END, 5)))
