"""RpcClient and RpcPool with a policy: around which calls it stands, what it is told, and what is left when it is cancelled."""

import gc

import pytest

import flowcoro
import flowcoro_net
import flowcoro_rpc
from flowcoro_resilience import BreakerOpen, Keyed, Pipeline, Policy, Rejected
from flowcoro_rpc import (Backoff, ConnectionLost, MethodNotFound, Notification, Overloaded, Request, RpcClient, RpcError,
                          RpcPool, RpcServer, ShuttingDown)
from flowcoro_testing import memory_socket_pair, run_in_kernel
from test_net_cancel import cancelled_at


class Spy(Policy):
    """Lets everything through, and writes down what it is told, and what comes back."""

    def __init__(self, name=None):
        super().__init__(name)
        self.calls, self.outcomes = [], []

    async def _run(self, call, proceed):
        self.calls.append((call.key, call.idempotent, *call.asked[1]))
        try:
            outcome = await proceed()
        except BaseException as error:
            self.outcomes.append(type(error))
            raise
        self.outcomes.append(outcome)
        return outcome


class Again(Policy):
    """As often as is needed, if it is known that the call has not run, or does no harm."""

    async def _run(self, call, proceed):
        while True:
            try:
                return await proceed()
            except Exception as error:
                if not call.idempotent and getattr(error, "sent", None) is not False:
                    raise
            await flowcoro.sleep(0.1)


class Refuse(Policy):
    async def _run(self, call, proceed):
        raise BreakerOpen(f"{call.key} is down", self, 7.0)


class World:
    """Servers in memory by port, to which RpcClient.connect() connects."""

    def __init__(self):
        self.servers, self.connections, self.calls = {}, {}, []

    def server(self, port):
        server = self.servers[port] = RpcServer()

        @server.method
        async def add(a, b=0):
            self.calls.append((port, a, b))
            await flowcoro.sleep(0.01)
            return a + b

        @server.method
        def fail(error="failed"):
            self.calls.append((port, error))
            raise {"failed": RpcError(7, "failed"), "busy": Overloaded(), "leaving": ShuttingDown()}[error]

        @server.method
        async def count(most):
            for number in range(most):
                yield number

        return server

    async def open(self, host, port, **options):
        await flowcoro.checkpoint()
        if port not in self.servers:
            raise flowcoro_net.BrokenError(111, "connection refused")
        ours, theirs = memory_socket_pair(flowcoro_net.Socket)
        self.connections[port] = theirs
        flowcoro.spawn(self.serve(port, theirs))
        return ours

    async def serve(self, port, sock):
        async with sock:
            await self.servers[port].serve_connection(sock, framing=flowcoro_rpc.Newline)


@pytest.fixture
def world(monkeypatch):
    world = World()
    monkeypatch.setattr(flowcoro_net.Socket, "connect", world.open)
    world.server(1)
    return world


def in_kernel(test):
    return run_in_kernel(test, timeout=10_000)


@in_kernel
async def test_a_policy_stands_around_calls_and_batches_and_is_told_the_address(world):
    spy = Spy()
    async with await RpcClient.connect("shop", 1, policy=spy) as client:
        assert await client.call("add", 1, 2) == 3 and await client.call("add", a=1, idempotent=True) == 1
        assert await client.proxy.add(5, idempotent=True) == 5
        with pytest.raises(RpcError):
            await client.call("fail")
        batch = [Request("add", [1]), Notification("add", [2]), Request("nothing")]
        results = await client.batch(*batch, idempotent=True)
        assert results[0] == 1 and isinstance(results[1], MethodNotFound)
    assert spy.calls == [
        ("shop:1", False, "add", [1, 2]), ("shop:1", True, "add", {"a": 1}), ("shop:1", True, "add", [5]),
        ("shop:1", False, "fail", None), ("shop:1", True, None, tuple(batch))]
    assert spy.outcomes[:4] == [3, 1, 5, RpcError] and spy.outcomes[4] is results


@in_kernel
async def test_notifications_and_streams_go_without(world):
    async with await RpcClient.connect("shop", 1, policy=Refuse()) as client:
        await client.notify("add", 1)
        assert [number async for number in client.stream("count", 3)] == [0, 1, 2]
        assert [number async for number in client.subscribe("count", 2)] == [0, 1]
        with pytest.raises(Rejected, match="shop:1 is down") as caught:
            await client.call("add", 1)
        assert caught.value.retry_after == 7.0
        with pytest.raises(Rejected):
            await client.batch(Request("add", [1]))
    assert world.calls == [(1, 1, 0)]


@pytest.mark.parametrize("key, where", [
    ("unix:/run/shop", {"unix": "/run/shop"}), ("[::1]:1", {"host": "::1", "port": 1}), ("shop:1", {"host": "shop", "port": 1})])
@in_kernel
async def test_the_key_is_where_the_server_is(key, where, world, monkeypatch):
    async def connect_unix(path, **options):
        return await world.open("unix", 1)

    monkeypatch.setattr(flowcoro_net.Socket, "connect_unix", connect_unix)
    spy = Spy()
    async with await RpcClient.connect(**where, policy=spy) as client:
        await client.call("add", 1)
    assert spy.calls[0][0] == key


@in_kernel
async def test_the_key_of_a_client_over_something_is_that(world):
    spy, transport = Spy(), await world.open("", 1)
    async with RpcClient.over(transport, policy=spy) as client:
        await client.call("add", 1)
    assert spy.calls[0][0] is transport


@in_kernel
async def test_keyed_takes_the_address_or_the_method(world):
    by_address, by_method = Keyed(lambda key: Spy()), Keyed(lambda key: Spy(), key=lambda method, params: method)
    async with await RpcClient.connect("shop", 1, policy=Pipeline(by_address, by_method)) as client:
        await client.call("add", 1)
        with pytest.raises(RpcError):
            await client.call("fail")
    assert by_address.keys() == ["shop:1"] and by_method.keys() == ["add", "fail"]


@in_kernel
async def test_anything_with_try_execute_is_a_policy_and_other_things_are_refused(world):
    class Plain:
        async def try_execute(self, operation, method, params):
            return 10 * await operation(method, params)

    async with await RpcClient.connect("shop", 1, policy=Plain()) as client:
        assert await client.call("add", 1, 2) == 30
    for policy in ("retry", Backoff(), lambda operation: None, Refuse):
        with pytest.raises(TypeError, match="give a policy of flowcoro_resilience"):
            RpcClient.over(None, policy=policy)


@in_kernel
async def test_each_attempt_has_the_timeout_and_errors_say_what_was_sent(world):
    @world.servers[1].method
    async def wait():
        await flowcoro.sleep(100)

    spy = Spy()
    async with await RpcClient.connect("shop", 1, policy=Pipeline(Again(), spy)) as client:
        with pytest.raises(TimeoutError):
            await client.call("wait", timeout=1)
        assert flowcoro.now() == pytest.approx(1, abs=0.1)
        with flowcoro.move_on_after(5):
            await client.call("wait", timeout=1, idempotent=True)
        assert spy.outcomes.count(TimeoutError) == 5 and spy.outcomes[-1] is flowcoro.Cancelled
    assert Overloaded.sent is False and ShuttingDown.sent is False and RpcError.sent is None and ConnectionLost("").sent is None


@in_kernel
async def test_a_call_that_has_not_run_may_run_again_whatever_it_does(world):
    server, refusals = world.server(1), 2

    @server.method
    def buy():
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            raise Overloaded()
        return "bought"

    async with await RpcClient.connect("shop", 1, policy=Again()) as client:
        assert await client.call("buy") == "bought" and refusals == -1
        with pytest.raises(RpcError, match="failed"):
            await client.call("fail")


# ---- pools -----------------------------------------------------------------------------------------------------

@in_kernel
async def test_in_a_pool_each_server_has_its_own_and_who_is_rejected_goes_on(world):
    world.server(2)
    policies = {"shop:1": Refuse(), "shop:2": Spy()}
    async with await RpcPool.connect([("shop", 1), ("shop", 2)], policy=Keyed(policies.get)) as pool:
        for number in range(4):
            assert await pool.call("add", number) == number
        assert (await pool.batch(Request("add", [7]))) == [7]
        await pool.notify("add", 8)
        with pytest.raises(RpcError):
            await pool.call("fail")
    assert {number for port, number, *_ in world.calls if port == 1} <= {8}         # the notification, which goes without
    assert policies["shop:2"].calls == [*[("shop:2", False, "add", [number]) for number in range(4)],
                                        ("shop:2", False, None, (Request("add", [7]),)), ("shop:2", False, "fail", None)]


@in_kernel
async def test_a_pool_all_of_whose_policies_reject_says_so(world):
    world.server(2)
    async with await RpcPool.connect([("shop", 1), ("shop", 2)], policy=Refuse()) as pool:
        with pytest.raises(Rejected, match="is down"):
            await pool.call("add", 1)
        with pytest.raises(Rejected, match="is down"):
            await pool.call("add")
    assert world.calls == []


@in_kernel
async def test_a_pool_that_refuses_says_who_can_be_asked_first(world):
    class RefuseFor(Policy):
        async def _run(self, call, proceed):
            raise BreakerOpen(f"{call.key} is down", self, {"shop:1": None, "shop:2": 60.0, "shop:3": 1.0}[call.key])

    addresses = [("shop", port) for port in (1, 2, 3)]
    world.server(2), world.server(3)
    async with await RpcPool.connect(addresses, policy=RefuseFor()) as pool:
        for _ in addresses:                 # whoever's turn it is
            with pytest.raises(Rejected, match="shop:3") as caught:
                await pool.call("add", 1)
            assert caught.value.retry_after == 1.0
    policies = {"shop:1": RefuseFor(), "shop:2": RefuseFor(), "shop:3": Spy()}
    async with await RpcPool.connect(addresses, policy=Keyed(policies.get)) as pool:
        for _ in addresses:
            with pytest.raises(Overloaded):
                await pool.call("fail", "busy")


@in_kernel
async def test_a_server_that_has_gone_for_good_does_not_hide_what_the_others_say(world):
    world.server(2)
    policies = {"shop:1": Spy(), "shop:2": Refuse()}
    async with await RpcPool.connect([("shop", 1), ("shop", 2)], policy=Keyed(policies.get), reconnect=None) as pool:
        world.connections[1].close_nowait()
        await flowcoro.sleep(1)
        for _ in range(2):
            with pytest.raises(Rejected, match="shop:2 is down"):
                await pool.call("add", 1)
        policies["shop:2"]._run = policies["shop:1"]._run
        assert await pool.call("add", 1) == 1


@in_kernel
async def test_a_policy_around_a_pool_goes_from_one_server_to_the_other(world):
    world.server(2)
    async with await RpcPool.connect([("shop", 1), ("shop", 2)]) as pool:
        with flowcoro.move_on_after(1):
            await Again().try_execute(pool.call, "fail", "busy")
        assert {port for port, *_ in world.calls} == {1, 2}


@in_kernel
async def test_in_a_pool_a_lost_connection_is_looked_for_by_way_of_the_policy(world):
    spy = Spy()
    async with await RpcPool.connect([("shop", 1)], policy=spy) as pool:
        world.connections[1].close_nowait()
        assert await pool.call("add", 1) == 1
    assert [call[:1] for call in spy.calls] == [("shop:1",)] * len(spy.calls) and spy.outcomes[-1] == 1


# ---- cancellation ----------------------------------------------------------------------------------------------

@in_kernel
async def test_cancelled_at_each_point_it_leaves_nothing(world):
    async with await RpcClient.connect("shop", 1, policy=Pipeline(Again(), Spy())) as client:
        async def calls():
            assert await client.call("add", 1) == 1
            assert await client.batch(Request("add", [1]), Request("add", [2])) == [1, 2]

        number, cut = 0, True
        while cut:
            number += 1
            with flowcoro.CancelScope() as scope:
                await cancelled_at(scope, number, calls())
            cut = scope.cancelled_caught
            assert client.peer.statistics()["calls_waiting"] == 0
        assert number > 3 and await client.call("add", 3) == 3
    gc.collect()                        # a coroutine that was not awaited would be told here
