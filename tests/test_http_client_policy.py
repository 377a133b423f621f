"""HttpClient with a policy: where it stands, what it is told, what it may do, and what is left when it is cancelled."""

import contextlib
import email.utils
import gc
import io
import os
import time

import pytest

import flowcoro
from flowcoro_http import (ConnectError, DigestAuth, HttpClient, ProxyError, RequestError, RequestTimeout, Retries, StatusError,
                           Timeouts, TransferError)
from flowcoro_net import Socket
from flowcoro_resilience import BreakerOpen, CircuitBreaker, Hedge, Keyed, Pipeline, Policy, Rejected, Retry
from flowcoro_testing import VirtualClock, memory_socket_pair
from test_http_client import Origin, answer, given_back, scripted
from test_net_cancel import cancelled_at


class Spy(Policy):
    """Lets everything through, and writes down what it is told, and what comes back."""

    def __init__(self):
        super().__init__()
        self.calls, self.outcomes = [], []

    async def _run(self, call, proceed):
        self.calls.append(call)
        try:
            outcome = await proceed()
        except BaseException as error:
            self.outcomes.append(error)
            raise
        self.outcomes.append(outcome)
        return outcome


class Again(Policy):
    """Each operation `times` times, one after the other, `wait` seconds between; errors count for nothing but the last."""

    def __init__(self, times=2, wait=0.0):
        super().__init__()
        self.times, self.wait, self.errors = times, wait, []

    async def _run(self, call, proceed):
        for _ in range(self.times - 1):
            try:
                await call.drop(await proceed(), self)
            except RequestError as error:
                self.errors.append(error)
            await flowcoro.sleep(self.wait)
        return await proceed()


class AtOnce(Policy):
    """Each operation twice at the same time: the first that has come is the result, the other one is waited for, and let go."""

    async def _run(self, call, proceed):
        outcomes = []

        async def one():
            try:
                outcomes.append(await proceed())
            except RequestError as error:
                outcomes.append(error)

        async with flowcoro.TaskGroup() as group:
            group.spawn(one())
            group.spawn(one())
        outcomes.sort(key=lambda outcome: isinstance(outcome, Exception))
        if not isinstance(outcomes[1], Exception):
            await call.drop(outcomes[1], self)
        self.outcomes = outcomes
        return outcomes[0]


class Refuse(Policy):
    async def _run(self, call, proceed):
        raise BreakerOpen(f"{call.key} is down", self, 7.0)


class Instead(Policy):
    """Gives something of its own."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    async def _run(self, call, proceed):
        return self.value


@contextlib.asynccontextmanager
async def in_memory(handler, **options):
    """(HttpClient, Origin), connected in memory; `refusals` of the origin: so many connections are refused first."""
    origin = handler if isinstance(handler, Origin) else Origin(handler)
    origin.refusals = 0
    async with flowcoro.TaskGroup() as group:
        async def serve(sock):
            async with sock:
                await origin.serve(sock)

        async def connect(host, port, tls):
            await flowcoro.checkpoint()
            if origin.refusals:
                origin.refusals -= 1
                raise ConnectionRefusedError(111, "connection refused")
            ours, theirs = memory_socket_pair(Socket)
            group.spawn(serve(theirs))
            return ours

        async with HttpClient(base_url="http://shop", trust_env=False, connect=connect, **options) as client:
            yield client, origin
            assert given_back(client)
        group.cancel()


def talk(handler, work, workers=1, **options):
    """Run work(client, origin) on the virtual clock, or with several workers on the real one."""
    async def main():
        async with in_memory(handler, **options) as (client, origin):
            return await work(client, origin)

    return flowcoro.run(main(), **({"workers": workers} if workers > 1 else {"clock": VirtualClock()}))


def hello(request):
    return answer(f"{request.method} {request.target} {request.body.decode()}")


# ---- where it stands -------------------------------------------------------------------------------------------

def test_a_policy_stands_around_each_exchange_and_is_told_its_origin():
    spy = Spy()

    async def work(client, origin):
        for _ in range(3):                  # from the third time on the head has been made before
            assert (await client.get("/a")).text == "GET /a "
        assert (await client.post("https://[::1]:8443/b", content=b"x")).text == "POST /b x"
        await client.put("/c", content=[b"once"])
        await client.put("/d", content=io.BytesIO(b"again"))
        assert [(call.key, call.idempotent) for call in spy.calls] == [
            *[("http://shop:80", True)] * 3, ("https://[::1]:8443", False), ("http://shop:80", False), ("http://shop:80", True)]
        assert [outcome.status for outcome in spy.outcomes] == [200] * 6

    talk(hello, work, policy=spy)


def test_redirects_challenges_and_retries_are_outside_of_it():
    spy = Spy()

    def handler(request):
        if request.target == "/old":
            return answer("", "302 Found", "Location: http://other/new")
        if "authorization" not in request.headers:
            return answer("", "401 Who", 'WWW-Authenticate: Digest realm="r", nonce="n", qop="auth"')
        return answer("", "503 Busy") if len(spy.calls) == 3 else answer("done")

    async def work(client, origin):
        response = await client.get("/old")
        assert response.status == 401 and [call.key for call in spy.calls] == ["http://shop:80", "http://other:80"]
        del spy.calls[1:]                   # the next are the second and third
        response = await client.get("/new", auth=DigestAuth("me", "secret"), retries=Retries(1, wait=0.01))
        assert response.text == "done" and [outcome.status for outcome in spy.outcomes[2:]] == [401, 503, 200]

    talk(handler, work, policy=spy)


def test_a_request_may_have_another_policy_or_none():
    spy, own = Spy(), Spy()

    async def work(client, origin):
        await client.get("/")
        await client.get("/", policy=None)
        await client.get("/", policy=own)
        async with client.stream("GET", "/", policy=own) as response:
            await response.read()
        assert (len(spy.calls), len(own.calls), len(origin.requests)) == (1, 2, 4)

    talk(hello, work, policy=spy)


@pytest.mark.parametrize("policy", ["retry", 3, Retries(2), lambda operation: None, CircuitBreaker])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(TypeError, match="give a policy of flowcoro_resilience"):
        HttpClient(policy=policy)

    async def work(client, origin):
        with pytest.raises(TypeError, match="policy="):
            await client.get("/", policy=policy)

    talk(hello, work)


def test_anything_with_try_execute_is_a_policy_and_gets_the_request():
    class Plain:
        async def try_execute(self, operation, request):
            seen.append((request.method, request.url, operation.key))
            return await operation(request)

    async def work(client, origin):
        assert (await client.get("/x", policy=Plain())).text == "GET /x "
        assert seen == [("GET", "http://shop/x", "http://shop:80")]

    seen = []
    talk(hello, work)


def test_keyed_takes_the_origin_or_what_it_makes_of_the_request():
    async def work(client, origin):
        by_origin, by_path = Keyed(lambda key: Spy()), Keyed(lambda key: Spy(), key=lambda request: request.parsed.target)
        for url in ("/a", "/b", "http://other/a"):
            await client.get(url, policy=by_origin)
            await client.get(url, policy=by_path)
        assert by_origin.keys() == ["http://shop:80", "http://other:80"] and by_path.keys() == ["/b", "/a"]

    talk(hello, work)


def test_what_a_policy_raises_comes_out_as_it_is_and_nothing_was_sent():
    policy = Refuse()

    async def work(client, origin):
        with pytest.raises(Rejected, match="http://shop:80 is down") as caught:
            await client.get("/", retries=3)
        assert caught.value.retry_after == 7.0 and caught.value.sent is False and caught.value.policy is policy
        assert origin.connections == 0

    talk(hello, work, policy=policy)


@pytest.mark.parametrize("value", [None, b"cached", 5])
def test_a_policy_that_gives_something_else_is_told_where_that_belongs(value):
    async def work(client, origin):
        with pytest.raises(TypeError, match="instead of a ClientResponse.*stands around the request"):
            await client.get("/")

    talk(hello, work, policy=Instead(value))


# ---- again and again -------------------------------------------------------------------------------------------

def test_a_repeated_operation_is_a_new_request_with_the_same_content():
    hooked = []

    async def work(client, origin):
        for content in (b"body", io.BytesIO(b"body"), None):
            response = await client.request("PUT", "/x", content=content, cookies={"a": "b"})
            assert response.text == f"PUT /x {'body' if content else ''}" and response.request is not hooked[-2]
            first, second = origin.requests[-2:]
            assert str(first.headers) == str(second.headers) and first.headers["cookie"] == "a=b" and first.body == second.body
        for _ in range(3):
            assert (await client.get("/x")).text == "GET /x "
        assert len(origin.requests) == 12 and len({str(request.headers) for request in origin.requests[-6:]}) == 1
        assert origin.connections == 1

    talk(hello, work, policy=Again(), event_hooks={"request": [hooked.append]})


def test_what_can_be_read_once_is_sent_again_only_if_it_was_not_begun():
    async def work(client, origin):
        origin.refusals = 1
        assert (await client.post("/", content=[b"a", b"b"])).text == "POST / ab"
        assert [type(error) for error in client._options.policy.errors] == [ConnectError]
        with pytest.raises(RequestError, match="POST http://shop/: its policy wants to send it.*read once.*give bytes") as caught:
            await client.post("/", content=[b"a", b"b"])
        assert caught.value.request.method == "POST" and caught.value.sent is None and len(origin.requests) == 2

    talk(hello, work, policy=Again())


def test_the_refusal_to_send_again_names_what_went_wrong_before():
    async def work(client, origin):
        with pytest.raises(RequestError, match="read once") as caught:
            await client.post("/", content=[b"a"])
        assert isinstance(caught.value.__cause__, TransferError)

    talk(lambda request: None, work, policy=Again())


def test_two_at_the_same_time_are_two_exchanges():
    async def work(client, origin):
        for content in (None, b"x" * 300_000, "text"):
            response = await client.request("PUT", "/x", content=content)
            assert response.status == 200
            assert [request.body for request in origin.requests[-2:]] == [response.request.content or b""] * 2
        assert origin.connections == 2 and len(origin.requests) == 6

    talk(lambda request: answer("good"), work, policy=AtOnce())


def test_a_file_is_not_read_by_two_at_the_same_time():
    policy = AtOnce()

    async def work(client, origin):
        response = await client.put("/x", content=io.BytesIO(b"x" * 300_000))
        assert response.status == 200 and [request.body for request in origin.requests] == [b"x" * 300_000]
        assert "is being read for an attempt that is under way; give bytes" in str(policy.outcomes[1])
        await client.put("/x", data={"a": "b"}, files={"c": b"bytes"})          # which can be shared
        assert len(origin.requests) == 3 and origin.requests[1].body == origin.requests[2].body

    talk(lambda request: answer("good"), work, policy=policy)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_streamed_response_that_nobody_gets_gives_its_connection_back(workers):
    async def work(client, origin):
        for _ in range(5):
            async with client.stream("GET", "/x") as response:
                assert await response.read() == b"x" * 200_000
            assert given_back(client)
        assert len(origin.requests) == 10

    talk(lambda request: answer(b"x" * 200_000), work, workers, policy=AtOnce())


# ---- what policies go by ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, expected", [
    ("0", 0), ("120", 120), (None, None), ("soon", None), ("-1", None), ("1.5", None),
    ("Fri, 31 Dec 1999 23:59:59 GMT", 0), ("date", pytest.approx(60, abs=5))])
def test_retry_after_is_a_number_of_seconds_or_a_date(value, expected):
    if value == "date":
        value = email.utils.formatdate(time.time() + 60, usegmt=True)

    async def work(client, origin):
        response = await client.get("/")
        assert response.retry_after == expected
        with pytest.raises(StatusError) as caught:
            response.raise_for_status()
        assert caught.value.retry_after == expected and caught.value.sent is None

    talk(lambda request: answer("", "503 Busy", *([f"Retry-After: {value}"] if value else [])), work)


def test_errors_say_whether_something_was_sent():
    async def silence(request):
        await flowcoro.sleep(100)

    async def work(client, origin):
        async def never(host, port, tls):
            await flowcoro.sleep(100)

        origin.refusals = 1
        with pytest.raises(ConnectError) as caught:
            await client.get("/")
        assert caught.value.sent is False and ProxyError.sent is False
        with pytest.raises(RequestTimeout) as caught:
            await client.get("/", timeout=1)
        assert (caught.value.phase, caught.value.sent) == ("head", None)
        for limits, phase in ((Timeouts(connect=1), "connect"), (Timeouts(total=1), "total")):
            async with HttpClient(trust_env=False, connect=never, timeout=limits) as other:
                with pytest.raises(RequestTimeout) as caught:
                    await other.get("http://shop/")
                assert (caught.value.phase, caught.value.sent) == (phase, False)

    talk(silence, work)


# ---- time ------------------------------------------------------------------------------------------------------

def test_a_policy_may_wait_no_longer_than_the_total_time():
    class Wait(Policy):
        async def _run(self, call, proceed):
            await flowcoro.sleep(1000)
            return await proceed()

    async def work(client, origin):
        with pytest.raises(RequestTimeout, match="timeout total=5 s has passed while its policy") as caught:
            await client.get("/", policy=Wait(), timeout=Timeouts(total=5))
        assert (caught.value.phase, caught.value.sent) == ("total", False) and flowcoro.now() == 5
        origin.refusals = 1
        with pytest.raises(ConnectError):           # of what has failed that is told, rather than the time
            await client.get("/", policy=Again(2, 1000), timeout=Timeouts(total=5))
        assert flowcoro.now() == 10 and origin.connections == 0

    talk(hello, work)


def test_an_exchange_that_the_total_time_ends_is_an_error_that_policies_count():
    async def silence(request):
        await flowcoro.sleep(100)

    async def work(client, origin):
        spy = Spy()
        with pytest.raises(RequestTimeout):
            await client.get("/", policy=Pipeline(Again(3), spy), timeout=Timeouts(total=5))
        assert [(type(outcome), outcome.phase) for outcome in spy.outcomes] == [(RequestTimeout, "total")] and flowcoro.now() == 5

    talk(silence, work)


def test_a_stream_goes_on_after_the_total_time():
    async def drip(request):
        await request.sock.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n")
        for _ in range(3):
            await flowcoro.sleep(4)
            await request.sock.write(b"x")

    async def work(client, origin):
        async with client.stream("GET", "/", timeout=Timeouts(total=5)) as response:
            assert await response.read() == b"xxx" and flowcoro.now() == 12

    talk(drip, work, policy=Spy())


# ---- events, cancellation --------------------------------------------------------------------------------------

def test_an_event_stream_outlives_rejections_when_it_connects_again():
    class SecondNot(Policy):
        times = 0

        async def _run(self, call, proceed):
            self.times += 1
            if self.times == 2:
                raise BreakerOpen("not now", self, 1.0)
            return await proceed()

    async def work(client, origin):
        policy = SecondNot()
        async with client.events("/", policy=policy) as events:
            assert [event.data async for event in events] == ["1", "2"]
        assert policy.times == 4
        with pytest.raises(BreakerOpen):            # of the first connection it is an error
            async with client.events("/", policy=Refuse()):
                pass

    parts = [b"data: 1\n\n", b"data: 2\n\n"]
    replies = [b"HTTP/1.1 200 x\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n%b" % (len(part), part)
               for part in parts]
    talk(scripted(*replies, b"HTTP/1.1 204 x\r\n\r\n"), work)


@pytest.mark.parametrize("policy", [lambda: Spy(), lambda: Again(3, 0.01), lambda: AtOnce(), lambda: Pipeline(Again(), AtOnce())])
def test_cancelled_at_each_point_it_leaves_nothing(policy):
    async def work(client, origin):
        async def requests():
            await client.get("/one")
            async with client.stream("PUT", "/two", content=b"x" * 100_000) as response:
                await response.read()

        number, cut = 0, True
        while cut:
            number += 1
            with flowcoro.CancelScope() as scope:
                await cancelled_at(scope, number, requests())
            cut = scope.cancelled_caught
            assert given_back(client)
        assert number > 3 and (await client.get("/after", policy=None)).text == "GET /after "

    talk(hello, work, policy=policy())
    gc.collect()                    # a coroutine or a socket that was left would be told here


def test_http_does_not_need_the_module_of_policies():
    with open(os.path.join(os.path.dirname(__file__), "..", "flowcoro_http.py"), encoding="utf-8") as file:
        assert "import flowcoro_resilience" not in file.read()


# ---- with the policies that there are -------------------------------------------------------------------------

def is_busy(response):
    return response.status == 503


def test_a_retry_keeps_to_what_the_server_asks_for_and_does_nothing_twice_that_may_have_had_an_effect():
    retry = Retry(3, first=0.01, result=is_busy)

    async def work(client, origin):
        assert (await client.get("/")).text == "good" and 20 <= flowcoro.now() <= 30       # and a quarter more, by chance
        assert (await client.post("/", content=b"x")).status == 503 and len(origin.requests) == 3
        origin.refusals = 2
        assert (await client.post("/", content=b"x")).text == "good" and len(origin.requests) == 4
        with pytest.raises(TransferError, match="POST"):
            await client.post("/", content=b"x")
        assert (await client.put("/", content=b"x")).text == "good" and len(origin.requests) == 6

    replies = [answer("", "503 x", "Retry-After: 20"), answer("good"), answer("", "503 x"), answer("good"), None, answer("good")]
    talk(scripted(*replies), work, policy=retry)


def test_breakers_of_two_origins_and_a_retry_that_does_not_wait_for_them():
    breakers = Keyed(lambda origin: CircuitBreaker(window=4, minimum_calls=4, failure_result=is_busy, name=origin))

    async def work(client, origin):
        for _ in range(2):
            assert (await client.get("/")).status == 503
        with pytest.raises(BreakerOpen, match="http://shop:80 is OPEN") as caught:
            await client.get("/")
        assert caught.value.retry_after == pytest.approx(60, abs=1) and len(origin.requests) == 4
        assert (await client.get("http://other/")).text == "good"

    def handler(request):
        return answer("good") if request.headers["host"] == "other" else answer("", "503 x")

    talk(handler, work, policy=Pipeline(Retry(2, first=0.01, result=is_busy, ignored=Rejected), breakers))


def test_a_hedge_of_a_stream_leaves_one_connection_and_one_response():
    async def slowly(request):
        if len(origins[0].requests) == 1:
            await flowcoro.sleep(100)
        return answer(f"{len(origins[0].requests)}")

    async def work(client, origin):
        origins.append(origin)
        async with client.stream("GET", "/") as response:
            assert await response.read() == b"2" and flowcoro.now() == pytest.approx(5, abs=0.1)
        assert given_back(client)
        with pytest.raises(RequestTimeout):         # the file is not read by two, so that there is no hedge of it
            origin.requests.clear()
            await client.put("/", content=io.BytesIO(b"x"), timeout=10)

    origins = []
    talk(slowly, work, policy=Hedge(after=5))
