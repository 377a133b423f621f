"""A request/response service on flowcoro_net, on a simulated network with loss, cut cables, crashes and restarts, once per seed.

FLOWCORO_SEEDS=10000 python -m pytest tests/test_net_chaos.py runs it as often as one likes.
"""

import contextlib
import gc
import os
import random
import re
import subprocess
import sys

import pytest

import flowcoro
import flowcoro_net
from flowcoro_testing import SimulatedNetwork, VirtualClock, wait_all_tasks_parked
from test_testing_network import ROOT, SEEDS, SUBPROCESS_TIMEOUT


# ---- chaos -------------------------------------------------------------------------------------------------
# A client asks a service for something that must not be done twice: to deposit an amount. Request and answer are a line each.
# The client tries again over a new connection until it has an answer or has had enough, and the server, which remembers what
# it has done through a crash (a dict stands for its disk), does each request once. What must hold: each request is answered or
# failed exactly once; what was answered was done; nothing was done twice, and nothing that nobody had asked for.

REQUESTS, CLIENTS = 6, 3


class Bank:
    """A service: `deposit ID AMOUNT` is done once, however often it is asked for, and answered with `done ID`."""

    def __init__(self):
        self.disk, self.times = {}, {}

    async def serve(self):
        async with await flowcoro_net.TcpServer.listen("bank", 80, backlog=5) as server:
            await server.serve(self.handle)

    async def handle(self, sock):
        with contextlib.suppress(flowcoro_net.BrokenError), flowcoro.move_on_after(30):
            while line := await sock.read_until(b"\n", limit=100):
                _, number, amount = line.split()
                if number not in self.disk:
                    self.disk[number] = int(amount)
                    self.times[number] = self.times.get(number, 0) + 1
                await flowcoro.sleep(0.01)
                await sock.write(b"done %s\n" % number)


async def deposit(number, amount, log, *, seconds=2):
    """Ask until there is an answer, at most four times, each for so many seconds; True or False."""
    for _ in range(4):
        try:
            with flowcoro.timeout(seconds):
                async with await flowcoro_net.Socket.connect("bank", 80) as sock:
                    await sock.write(b"deposit %d %d\n" % (number, amount))
                    if answer := await sock.read_until(b"\n", limit=100):
                        assert answer == b"done %d\n" % number
                        return True
        except OSError as error:
            log(f"request {number}: {type(error).__name__}")
        await flowcoro.sleep(1)
    return False


async def chaos(seed):
    """One run; returns (the trace, {"answered": int, "failed": int, "crashes": int, "cuts": int})."""
    draw = random.Random(f"chaos {seed}")
    network = SimulatedNetwork(
        seed=seed, latency=draw.choice([0.0001, 0.01, 0.3]), jitter=draw.choice([0, 0.05]), loss=draw.choice([0, 0.02, 0.2]),
        split=draw.choice([0, 0.3]), bandwidth=draw.choice([2000, 1e9]))
    bank, server = Bank(), network.host("bank")
    outcomes, counts = {}, dict.fromkeys(("answered", "failed", "crashes", "cuts"), 0)

    async def client(index):
        host = network.host(f"client{index}")
        with host:
            for each in range(REQUESTS):
                number = index * REQUESTS + each
                done = await deposit(number, number * 10, host.note)
                assert number not in outcomes
                outcomes[number] = done
                host.note(f"request {number}: {'answered' if done else 'failed'}")

    async def trouble():
        while True:
            await flowcoro.sleep(draw.expovariate(1))
            kind = draw.choice(["crash", "partition", "break", "nothing"])
            if kind == "crash":
                counts["crashes"] += 1
                network.crash(server)
                await flowcoro.sleep(draw.random() * 8)
                network.restart(server)
            elif kind == "partition":
                counts["cuts"] += 1
                network.partition(f"client{draw.randrange(CLIENTS)}", server, one_way=draw.random() < 0.5)
                await flowcoro.sleep(draw.random() * 8)
                network.heal()
            elif kind == "break":
                network.break_connections()

    async with flowcoro.TaskGroup() as group:
        server.boot(group, bank.serve)
        troubles = group.spawn(trouble())
        await flowcoro.when_all(*(client(index) for index in range(CLIENTS)))
        troubles.cancel()
        await wait_all_tasks_parked()
        # The second half, as TigerBeetle has it: when the faults are over, the service has to work again.
        network.heal()
        network.restart(server)
        for host in network.hosts.values():
            if host is not server:
                network.set_link(host, server, loss=0)
        await flowcoro.sleep(100)
        again = network.host("client0")
        assert await again.run(deposit(1000, 1, again.note, seconds=100)), "it does not come back"
        network.crash(server)

    assert sorted(outcomes) == list(range(REQUESTS * CLIENTS))
    assert [number for number, done in outcomes.items() if done and b"%d" % number not in bank.disk] == []
    assert set(bank.times.values()) == {1}
    assert all(bank.disk[number] == int(number) * 10 for number in bank.disk if number != b"1000")
    await flowcoro.sleep(2000)              # whatever is still said to each other is said
    assert network.open_sockets() == []
    assert network.statistics()["packets"]["in_flight"] == 0
    assert [facts["connections"] for facts in network.statistics()["hosts"].values()] == [0] * (CLIENTS + 1)
    counts["answered"] = sum(outcomes.values())
    counts["failed"] = len(outcomes) - counts["answered"]
    return network.trace(), counts


def run_chaos(seed):
    try:
        return flowcoro.run(chaos(seed), clock=VirtualClock(), seed=seed)
    except BaseException as error:
        error.add_note(f"seed {seed}: run_chaos({seed}) repeats it")
        raise


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_each_request_is_answered_or_failed_once_and_nothing_leaks(seed):
    run_chaos(seed)
    gc.collect()


def test_the_chaos_is_one_in_which_requests_are_answered_and_failed_and_hosts_crash():
    total = dict.fromkeys(("answered", "failed", "crashes", "cuts"), 0)
    for seed in range(20):
        for name, count in run_chaos(seed)[1].items():
            total[name] += count
    assert all(count > 5 for count in total.values()), total


def test_a_service_that_forgets_what_it_has_done_is_found_out(monkeypatch):
    """The test above can fail: a bank without a disk does some deposits twice."""
    def forgetful(bank):
        bank.disk.clear()
        return serve(bank)

    serve = Bank.serve
    monkeypatch.setattr(Bank, "serve", forgetful)
    with pytest.raises(AssertionError) as caught:
        for seed in range(20):
            run_chaos(seed)
    assert re.search(r"seed \d+: run_chaos\(\d+\) repeats it", "".join(caught.value.__notes__))


def test_the_same_seed_gives_the_same_trace_to_the_byte_in_every_process():
    program = "import sys, test_net_chaos as t\nsys.stdout.write(t.run_chaos(int(sys.argv[1]))[0])"

    def trace(seed, hash_seed):
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", program, str(seed)], timeout=SUBPROCESS_TIMEOUT, check=True,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONHASHSEED": hash_seed,
                                         "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}).stdout

    first = trace(3, "0")
    assert first.count(b"\n") > 100
    assert trace(3, "1") == trace(3, "random") == first != trace(4, "0")
