"""flowcoro_rpc on a simulated network with loss, cut cables, crashes and restarts, once per seed: each call ends exactly once.

FLOWCORO_SEEDS=10000 python -m pytest tests/test_rpc_chaos.py runs it as often as one likes. FLOWCORO_FIRST_SEED is the first one,
for several processes to share them. A failure names its seed, which repeats it.
"""

import gc
import json
import math
import os
import random
import sys
import warnings

import pytest

import flowcoro
import flowcoro_net
import flowcoro_rpc
from flowcoro_rpc import Backoff, ConnectionLost, Methods, Notification, Request, RpcClient, RpcError, RpcServer
from flowcoro_testing import SimulatedNetwork, VirtualClock, memory_socket_pair, wait_all_tasks_parked

FIRST_SEED = int(os.environ.get("FLOWCORO_FIRST_SEED", 0))
RUNS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("FLOWCORO_SEEDS", 40)))

# ---- chaos -------------------------------------------------------------------------------------------------
# Clients call a bank which counts how often each call has run, also through its crashes (a dict stands for its disk). The model
# is that count. What must hold: each call ends once, and in its time; what was answered has run once; what is said not to have
# run has not; nothing has run twice. Then the faults end, and everything is answered at once: a lost wake-up would show there.

CLIENTS, TASKS, CALLS = 2, 3, 5


class Bank:
    """The server, of which there is a new one after each crash; `times`: how often each call has run."""

    def __init__(self, framing, limits):
        self.framing, self.limits = framing, limits
        self.times, self.running = {}, 0
        self.server = None

    async def serve(self):
        self.server = server = RpcServer(**self.limits)
        for function in (self.deposit, self.slow, self.count, self.back, self.note):
            server.method(function)
        async with await flowcoro_net.TcpServer.listen("bank", 80) as listening:
            await listening.serve(lambda sock: server.serve_connection(sock, framing=self.framing))

    def ran(self, name):
        self.times[name] = self.times.get(name, 0) + 1

    def deposit(self, name, padding=""):
        self.ran(name)
        return name

    def note(self, name):
        self.ran(name)

    async def slow(self, name, seconds):
        self.ran(name)
        self.running += 1
        try:
            await flowcoro.sleep(seconds)
            return name
        finally:
            self.running -= 1

    async def count(self, name, to):
        self.ran(name)
        self.running += 1
        try:
            for number in range(to):
                await flowcoro.sleep(0.01)
                yield number
        finally:
            self.running -= 1

    async def back(self, peer, name):
        self.ran(name)
        self.running += 1
        try:
            return await peer.call("double", name, timeout=5)
        except TimeoutError:
            raise RpcError(1, "no answer") from None
        finally:
            self.running -= 1


class Chaos:
    """One run: `counts` has how its calls have ended, and the crashes and cuts."""

    def __init__(self, seed):
        self.draw = draw = random.Random(f"rpc chaos {seed}")
        self.latency, self.jitter = draw.choice([0.0001, 0.01, 0.2]), draw.choice([0, 0.05])
        self.network = SimulatedNetwork(seed=seed, latency=self.latency, jitter=self.jitter, loss=draw.choice([0, 0.02, 0.2]),
                                        split=draw.choice([0, 0.3]), bandwidth=draw.choice([20_000, 1e9]))
        self.framing = draw.choice([flowcoro_rpc.Newline, flowcoro_rpc.ContentLength, flowcoro_rpc.Netstring,
                                    flowcoro_rpc.LengthPrefixed, flowcoro_rpc.Concatenated])
        self.bank = Bank(self.framing, draw.choice([
            {}, {"max_concurrent": 2, "max_waiting": 3}, {"deadline": 0.5 + 8 * (self.latency + self.jitter)}]))
        self.host = self.network.host("bank")
        self.hosts = [self.network.host(f"client{index}") for index in range(CLIENTS)]
        self.outcomes, self.number = {}, 0
        self.counts = dict.fromkeys(("answered", "timeout", "error", "lost", "not run", "crashes", "cuts"), 0)

    def name(self):
        self.number += 1
        return self.number

    async def outcome(self, coro, names, seconds):
        """Await a call; note how it has ended for each of the names. The result, or None."""
        began, result, how = flowcoro.now(), None, "answered"
        try:
            result = await coro
        except TimeoutError:
            how = "timeout"
        except RpcError:
            how = "error"
        except ConnectionLost as error:
            how = "not run" if error.sent is False else "lost"
        assert flowcoro.now() - began <= seconds + 0.1, "it has ended too late"
        for name in names:
            assert name not in self.outcomes, "it has ended twice"
            self.outcomes[name] = how
        return result

    async def stream(self, client, name, seconds):
        """A stream, whose items come in order and without a gap, as far as they come."""
        items = []
        with flowcoro.timeout(seconds):
            async for item in client.stream("count", name, 10, window=self.draw.choice([1, 3, 32])):
                items.append(item)
                assert items == list(range(len(items)))
        assert len(items) == 10
        return name

    async def act(self, client):
        """One thing that a client does."""
        draw, name, seconds = self.draw, self.name(), self.draw.choice([0.5, 2, 6])
        kind = draw.randrange(6)
        if kind == 0:
            caller = draw.choice([client, client.peer])         # the peer does not try again what has not run
            result = await self.outcome(caller.call("deposit", name, "x" * draw.choice([0, 10, 20_000]), timeout=seconds), [name],
                                        seconds)
        elif kind == 1:
            result = await self.outcome(client.call("slow", name, draw.choice([0.01, 0.1, 3]), timeout=seconds), [name], seconds)
        elif kind == 2:
            other = self.name()
            results = await self.outcome(client.batch(Request("deposit", [name]), Notification("note", [self.name()]),
                                                      Request("slow", [other, 0.1]), timeout=seconds), [name, other], seconds)
            result = None if results is None or isinstance(results[0], RpcError) else results[0]
            for each, found in zip((name, other), results or ()):
                if isinstance(found, RpcError):
                    self.outcomes[each] = "error"
            assert results is None or len(results) == 2
        elif kind == 3:
            result = await self.outcome(self.stream(client, name, seconds), [name], seconds)
        elif kind == 4:
            result = await self.outcome(client.call("back", name, timeout=seconds), [name], seconds)
            result = result and result // 2
        else:
            with flowcoro.move_on_after(draw.choice([0, 0.01, 0.3])) as scope:
                await self.outcome(client.call("slow", name, 0.2, timeout=None), [name], seconds)
            assert scope.cancelled_caught != (name in self.outcomes)
            return
        assert result in (None, name)

    async def work(self, client):
        for _ in range(CALLS):
            await self.act(client)
            await flowcoro.sleep(self.draw.expovariate(2))

    async def client(self, host):
        methods = Methods()
        methods.method(lambda value: value * 2, name="double")
        with host:
            while True:
                try:
                    client = await RpcClient.connect("bank", 80, framing=self.framing, methods=methods, connect_timeout=3,
                                                     reconnect=Backoff(0.1, 1))
                    break
                except (OSError, TimeoutError):
                    await flowcoro.sleep(1)
            async with client:
                await flowcoro.when_all(*(self.work(client) for _ in range(TASKS)))

    async def trouble(self):
        draw, network = self.draw, self.network
        while True:
            await flowcoro.sleep(draw.expovariate(1))
            kind = draw.choice(["crash", "partition", "break", "nothing"])
            if kind == "crash":
                self.counts["crashes"] += 1
                network.crash(self.host)
                await flowcoro.sleep(draw.expovariate(0.7))
                network.restart(self.host)
            elif kind == "partition":
                self.counts["cuts"] += 1
                network.partition(draw.choice(self.hosts), self.host, one_way=draw.random() < 0.5)
                await flowcoro.sleep(draw.expovariate(0.5))
                network.heal()
            elif kind == "break":
                network.break_connections()

    async def afterwards(self):
        """Without faults everything is answered, and at once."""
        prompt = 1 + 2 * (self.latency + self.jitter) * 20         # a stream of 10 with a window of 1 takes most
        methods = Methods()
        methods.method(lambda value: value * 2, name="double")
        with self.hosts[0]:
            async with await RpcClient.connect("bank", 80, framing=self.framing, methods=methods,
                                               connect_timeout=prompt) as client:
                names = [self.name() for _ in range(6)]
                with flowcoro.timeout(prompt):
                    assert await flowcoro.when_all(*(client.call("slow", name, 0.01, timeout=None) for name in names)) == names
                    name = self.name()
                    assert await client.call("back", name) == name * 2
                    await self.stream(client, self.name(), math.inf)

    async def run(self):
        async with flowcoro.TaskGroup() as group:
            self.host.boot(group, self.bank.serve)
            troubles = group.spawn(self.trouble())
            await flowcoro.when_all(*map(self.client, self.hosts))
            troubles.cancel()
            await wait_all_tasks_parked()
            self.network.heal()
            self.network.restart(self.host)
            self.network.set_link(self.hosts, self.host, loss=0)
            await flowcoro.sleep(1000)              # connections of which the server was never told the end time out
            await self.afterwards()
            await self.bank.server.close()
            group.cancel()
        self.check()
        await flowcoro.sleep(2000)                  # whatever is still said to each other is said
        assert self.network.open_sockets() == [] and self.bank.running == 0

    def check(self):
        times = self.bank.times
        assert set(times.values()) <= {1}, "a call has run twice"
        for name, how in self.outcomes.items():
            assert how != "answered" or times.get(name) == 1
            assert how != "not run" or name not in times
            if how in self.counts:
                self.counts[how] += 1


def run_chaos(seed):
    chaos = Chaos(seed)
    try:
        flowcoro.run(chaos.run(), clock=VirtualClock(), seed=seed)
        return chaos
    except BaseException as error:
        error.add_note(f"seed {seed}: run_chaos({seed}) repeats it")
        raise


@pytest.mark.parametrize("seeds", [RUNS[start:start + 10] for start in range(0, len(RUNS), 10)])
def test_whatever_happens_each_call_ends_once_and_nothing_leaks(seeds):
    found = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(sys, "unraisablehook", lambda got: found.append(f"{got.err_msg}: {got.exc_value!r}"))
        for seed in seeds:
            run_chaos(seed)
        gc.collect()
    assert found == []


def test_the_chaos_is_one_in_which_calls_end_in_every_way():
    total = {}
    for seed in range(40):
        for name, count in run_chaos(seed).counts.items():
            total[name] = total.get(name, 0) + count
    assert all(count for count in total.values()), total


# ---- peers that say anything ---------------------------------------------------------------------------------
# Messages that are right, wrong, answers to nothing, credit for nothing, ids used again, broken frames; clients that read slowly,
# end what they send, or are gone. What must hold: each connection ends when its client has, no call is left, nothing is reported.

FRAMINGS = [flowcoro_rpc.Newline, flowcoro_rpc.ContentLength, flowcoro_rpc.Netstring, flowcoro_rpc.LengthPrefixed,
            flowcoro_rpc.Concatenated]


def anything(draw):
    number = draw.choice([1, 2, 3, "a", None, 1.5, True, [], {}])
    message = {"jsonrpc": "2.0", "id": number}
    kind = draw.randrange(10)
    if kind < 4:
        method = draw.choice(["fast", "slow", "count", "back", "rpc.discover", "nothing", "$/nothing"])
        return message | {"method": method, "params": draw.choice([[1], [], {"a": 1}, [0.1], 5, [[]]])}
    if kind == 4:
        return {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": number}}
    if kind == 5:
        more = draw.choice([{"credit": draw.choice([1, 5, -1, "x", 10**6])}, {"items": draw.choice([[1], [], 5, None])}])
        return {"jsonrpc": "2.0", "method": "$/stream", "params": {"id": number, **more}}
    if kind == 6:
        return message | {"result": draw.choice([1, None, "x"])}
    if kind == 7:
        error = draw.choice([{"code": 1, "message": "x"}, {"code": -32601, "message": "", "data": [1]}, None, 5])
        return message | {"error": error}
    if kind == 8:
        return [anything(draw) for _ in range(draw.randrange(5))]
    return message | {"method": "count", "params": [draw.randrange(6)], "$/stream": draw.choice([1, 2, 30, 0, "x"]),
                      "$/context": draw.choice([{"timeout": 0.1}, {"timeout": -1}, 5, {"a": "b"}])}


def server_for_anything(draw):
    server = RpcServer(max_concurrent=draw.choice([1, 2, 100]), max_waiting=draw.choice([1, 5, 100]), deadline=2,
                       max_message=draw.choice([200, 2000, 10**6]), max_concurrent_in_all=draw.choice([1, 3, 100]))
    server.method(lambda a=0: a, name="fast")

    @server.method
    async def slow(a=1):
        await flowcoro.sleep(draw.random())
        return a

    @server.method
    async def count(to: int):
        for number in range(to):
            if draw.random() < 0.3:
                await flowcoro.sleep(0.01)
            yield number

    @server.method
    async def back(peer, a=1):
        try:
            return await peer.call("x", a, timeout=1)
        except (TimeoutError, RpcError, flowcoro_rpc.ProtocolError):
            return 0

    return server


async def talk(draw, server, framing):
    """A client, from its first word to the end of its connection."""
    sock, theirs = memory_socket_pair(flowcoro_net.Socket, capacity=draw.choice([100, 10_000]))

    async def read():
        while await sock.read():
            if draw.random() < 0.1:
                await flowcoro.sleep(0.05)

    async def speak():
        for _ in range(draw.randrange(1, 40)):
            message = json.dumps(anything(draw)).encode()
            frame = bytearray(framing.frame(message) if draw.random() < 0.97 else message)
            if draw.random() < 0.05:
                frame[draw.randrange(len(frame))] = draw.randrange(256)
            await sock.write(bytes(frame))
            if draw.random() < 0.3:
                await flowcoro.sleep(draw.random() * 0.1)
        if draw.random() < 0.5:
            await sock.shutdown_write()
            await flowcoro.sleep(draw.random() * 3)

    async with flowcoro.TaskGroup() as group:
        serving = group.spawn(server.serve_connection(theirs, framing=framing))
        try:
            with flowcoro.timeout(500):
                await flowcoro.when_any(speak(), read())
        except ExceptionGroup as errors:            # the server has ended it
            assert errors.split(flowcoro_net.BrokenError)[1] is None
        sock.close_nowait()
        with flowcoro.timeout(100):
            await serving


@pytest.mark.parametrize("seeds", [RUNS[start:start + 10] for start in range(0, len(RUNS), 10)])
def test_whatever_clients_say_their_connections_end_with_them_and_no_call_is_left(seeds):
    async def main(draw):
        server, framing = server_for_anything(draw), draw.choice(FRAMINGS)
        await flowcoro.when_all(*(talk(draw, server, framing) for _ in range(3)))
        assert server.statistics() == {"connections": 0, "calls_running": 0, "calls_queued": 0}

    found = []
    with pytest.MonkeyPatch.context() as patch:
        for seed in seeds:
            patch.setattr(sys, "unraisablehook", lambda got: found.append(f"seed {seed}: {got.err_msg}: {got.exc_value!r}"))
            try:
                flowcoro.run(main(random.Random(f"anything {seed}")), clock=VirtualClock(), seed=seed)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
    assert found == []
