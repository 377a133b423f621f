"""A request/response service on flowcoro_net, on a simulated network with loss, cut cables, crashes and restarts, once per seed.

FLOWCORO_SEEDS=10000 python -m pytest tests/test_net_chaos.py runs it as often as one likes, that in two to three minutes.
FLOWCORO_FIRST_SEED is the first one, for several processes to share them.
"""

import gc
import os
import random
import re
import socket
import subprocess
import sys
import warnings
import weakref

import pytest

import flowcoro
import flowcoro_net
from flowcoro_testing import SimulatedNetwork, VirtualClock, wait_all_tasks_parked
from test_testing_network import ROOT, SEEDS, SUBPROCESS_TIMEOUT

FIRST_SEED = int(os.environ.get("FLOWCORO_FIRST_SEED", 0))
RUNS = range(FIRST_SEED, FIRST_SEED + len(SEEDS))

# ---- chaos -------------------------------------------------------------------------------------------------
# Clients ask a service for something that must not be done twice: to deposit an amount. Request and answer are a line each,
# and a connection serves several. A client tries again over a new one until it has an answer or has had enough, and the server,
# which remembers what it has done through a crash (a dict stands for its disk), does each request once. What must hold: each
# request is answered or failed exactly once; what was answered was done; nothing was done twice, and nothing that nobody had
# asked for. When the faults are over everything is answered at the first attempt and without delay: a lost wake-up, which
# before that looks like one fault more, shows there. Then the server stops in order.

REQUESTS, CLIENTS = 6, 3


class Bank:
    """A service: `deposit ID AMOUNT` is done once, however often it is asked for, and answered with `done ID`."""

    def __init__(self, room):
        self.room, self.server = room, None
        self.disk, self.times = {}, {}

    async def serve(self):
        async with await flowcoro_net.TcpServer.listen("bank", 80, backlog=5) as self.server:
            await self.server.serve(self.handle)

    async def handle(self, sock):
        make_narrow(sock, self.room)
        with flowcoro.move_on_after(30):
            while line := await sock.read_until(b"\n", limit=100):
                _, number, amount = line.split()
                if number not in self.disk:
                    self.disk[number] = int(amount)
                    self.times[number] = self.times.get(number, 0) + 1
                await flowcoro.sleep(0.01)
                await sock.write(b"done %s\n" % number)


class Customer:
    """A client of the bank, with a connection that is kept while it works."""

    def __init__(self, room, log):
        self.room, self.log, self.sock = room, log, None

    async def deposit(self, number, *, last, attempts=3, seconds=2):
        """Ask until there is an answer, at most so many times, each for so many seconds; True or False.

        last: say with the request that it is the last one of the connection, and see that nothing comes after the answer.
        """
        for attempt in range(attempts):
            answered = False
            if attempt:
                await flowcoro.sleep(1)
            try:
                with flowcoro.timeout(seconds):
                    if self.sock is None:
                        self.sock = await flowcoro_net.Socket.connect("bank", 80)
                        make_narrow(self.sock, self.room)
                    await self.sock.write(b"deposit %d %d\n" % (number, number * 10))
                    if last:
                        await self.sock.shutdown_write()
                    if answer := await self.sock.read_until(b"\n", limit=100):
                        assert answer == b"done %d\n" % number
                        answered = True
                        if not last:
                            return True
                        assert await self.sock.read() == b""
            except OSError as error:
                self.log(f"request {number}: {type(error).__name__}")
            self.sock = self.sock and self.sock.close_nowait()      # what it may still say would be taken for the next answer
            if answered:
                return True
        return False


def make_narrow(sock, room):
    """Leave room for a part of a line only, so that writes have to wait."""
    if room is not None:
        sock.raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)


class Chaos:
    """One run: `counts` has how many were answered and failed, and the crashes and cuts."""

    def __init__(self, seed):
        self.draw = draw = random.Random(f"chaos {seed}")
        latency, jitter = draw.choice([0.0001, 0.01, 0.3]), draw.choice([0, 0.05])
        self.network = SimulatedNetwork(
            seed=seed, latency=latency, jitter=jitter, loss=draw.choice([0, 0.02, 0.2]), split=draw.choice([0, 0.3]),
            bandwidth=draw.choice([2000, 1e9]))
        self.room = draw.choice([None, None, None, 8])
        # Seconds for a name, a connect and an answer when nothing goes wrong: in round trips, one to spare.
        self.prompt = 0.5 + 2 * (latency + jitter) * (4 if self.room is None else 7)
        self.bank, self.server = Bank(self.room), self.network.host("bank")
        self.clients = [self.network.host(f"client{index}") for index in range(CLIENTS)]
        self.outcomes, self.counts = {}, dict.fromkeys(("answered", "failed", "crashes", "cuts"), 0)

    async def client(self, index):
        host = self.clients[index]
        customer = Customer(self.room, host.note)
        with host:
            for number in range(index, REQUESTS * CLIENTS, CLIENTS):
                last = number + CLIENTS >= REQUESTS * CLIENTS or self.draw.random() < 0.5
                done = await customer.deposit(number, last=last)
                assert number not in self.outcomes
                self.outcomes[number] = done
                host.note(f"request {number}: {'answered' if done else 'failed'}")

    async def trouble(self):
        draw, network = self.draw, self.network
        while True:
            await flowcoro.sleep(draw.expovariate(1))
            kind = draw.choice(["crash", "partition", "break", "nothing"])
            if kind == "crash":
                self.counts["crashes"] += 1
                network.crash(self.server)
                await flowcoro.sleep(draw.expovariate(0.5))
                network.restart(self.server)
            elif kind == "partition":
                self.counts["cuts"] += 1
                network.partition(draw.choice(self.clients), self.server, one_way=draw.random() < 0.5)
                await flowcoro.sleep(draw.expovariate(0.5))
                network.heal()
            elif kind == "break":
                network.break_connections()

    async def late_client(self, index):
        def fail(said):
            raise AssertionError(f"{said}, without any fault")

        customer = Customer(self.room, fail)
        with self.clients[index]:
            for number in 1000 + index, 1010 + index:
                assert await customer.deposit(number, last=number >= 1010, attempts=1, seconds=self.prompt)

    async def refused_client(self):
        with self.clients[0], flowcoro.timeout(self.prompt), pytest.raises(flowcoro_net.BrokenError, match="refused"):
            await flowcoro_net.Socket.connect("bank", 81)

    async def run(self):
        async with flowcoro.TaskGroup() as group:
            self.server.boot(group, self.bank.serve)
            troubles = group.spawn(self.trouble())
            await flowcoro.when_all(*map(self.client, range(CLIENTS)))
            troubles.cancel()
            await wait_all_tasks_parked()
            # The second half, as TigerBeetle has it: when the faults are over, the service has to work again.
            self.network.heal()
            self.network.restart(self.server)
            self.network.set_link(self.clients, self.server, loss=0)
            await flowcoro.sleep(100)
            await flowcoro.when_all(self.refused_client(), *map(self.late_client, range(CLIENTS)))
            self.bank.server.close()
            closed_at = flowcoro.now()
        assert flowcoro.now() - closed_at < self.prompt         # not drain_timeout: nobody is served any more
        self.check()
        await flowcoro.sleep(2000)              # whatever is still said to each other is said
        statistics = self.network.statistics()
        assert self.network.open_sockets() == []
        assert statistics["packets"]["in_flight"] == 0
        assert [(facts["connections"], facts["tasks"]) for facts in statistics["hosts"].values()] == [(0, 0)] * (CLIENTS + 1)

    def check(self):
        outcomes, disk = self.outcomes, self.bank.disk
        assert sorted(outcomes) == list(range(REQUESTS * CLIENTS))
        assert [number for number, done in outcomes.items() if done and b"%d" % number not in disk] == []
        assert set(self.bank.times.values()) == {1}
        assert all(disk[number] == int(number) * 10 for number in disk)
        self.counts["answered"] = sum(outcomes.values())
        self.counts["failed"] = len(outcomes) - self.counts["answered"]


def run_chaos(seed):
    chaos = Chaos(seed)
    try:
        flowcoro.run(chaos.run(), clock=VirtualClock(), seed=seed)
        return chaos
    except BaseException as error:
        error.add_note(f"seed {seed}: run_chaos({seed}) repeats it")
        raise


def left_by(seeds):
    """What runs have left behind: complaints of finalisers (unclosed sockets, errors that nobody saw), networks still alive."""
    found = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(sys, "unraisablehook", lambda got: found.append(f"{got.err_msg}: {got.exc_value!r}"))
        networks = [weakref.ref(run_chaos(seed).network) for seed in seeds]
        gc.collect()
    return found + [repr(ref()) for ref in networks if ref() is not None]


# The garbage collector's look costs half a run: so one for several, and one for each to find the seed if there is anything.
@pytest.mark.parametrize("seeds", [RUNS[start:start + 20] for start in range(0, len(RUNS), 20)])
def test_whatever_happens_each_request_is_answered_or_failed_once_and_nothing_leaks(seeds):
    if found := left_by(seeds):
        pytest.fail(f"{ {seed: left for seed in seeds if (left := left_by([seed]))} or found}")


def test_the_chaos_is_one_in_which_requests_are_answered_and_failed_and_hosts_crash():
    total = dict.fromkeys(("answered", "failed", "crashes", "cuts"), 0)
    for seed in range(20):
        for name, count in run_chaos(seed).counts.items():
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
    program = "import sys, test_net_chaos as t\nsys.stdout.write(t.run_chaos(int(sys.argv[1])).network.trace())"

    def trace(seed, hash_seed):
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", program, str(seed)], timeout=SUBPROCESS_TIMEOUT, check=True,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONHASHSEED": hash_seed,
                                         "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}).stdout

    first = trace(3, "0")
    assert first.count(b"\n") > 100
    assert trace(3, "1") == trace(3, "random") == first != trace(4, "0")
