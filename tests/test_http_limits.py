"""Middleware that limits rates and concurrency: driven directly, through a server, and by curl."""

import math
import shutil
import subprocess
import types

import pytest

import flowcoro
from flowcoro_http import HttpClient, HttpError, HttpServer, Response, concurrency_limit, rate_limit, timeout, trusted_proxies
from flowcoro_resilience import AIMD, ConcurrencyLimiter, RateLimiter
from flowcoro_testing import run_in_kernel, wait_all_tasks_parked
from http_helpers import serving
from test_http_middleware import get, through


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def from_(address):
    return get("/", client=(address, 5))


def fields(response):
    """Those of the limits, as a dict of lists."""
    names = ("ratelimit-policy", "ratelimit", "ratelimit-limit", "ratelimit-remaining", "ratelimit-reset", "retry-after")
    return {name: response.headers.get_all(name) for name in names if name in response.headers}


async def refused(middleware, request, status=429):
    with pytest.raises(HttpError) as caught:
        await through(middleware, request)
    assert caught.value.status == status
    return Response(status, caught.value.message, caught.value.headers)


# ---- rates -----------------------------------------------------------------------------------------------------

@run_in_kernel
async def test_answers_say_what_is_left_and_429_when_to_ask_again():
    clock = Clock()
    middleware = rate_limit(RateLimiter(2, per=60, clock=clock), name="read \"all\"")
    first = await through(middleware, from_("192.0.2.1"))
    assert first.status == 200 and fields(first) == {
        "ratelimit-policy": [r'"read \"all\"";q=2;w=60'], "ratelimit": [r'"read \"all\"";r=1;t=30'],
        "ratelimit-limit": ["2"], "ratelimit-remaining": ["1"], "ratelimit-reset": ["30"]}
    clock.now = 0.5
    assert fields(await through(middleware, from_("192.0.2.1")))["ratelimit"] == [r'"read \"all\"";r=0;t=60']
    response = await refused(middleware, from_("192.0.2.1"))
    assert fields(response) == {
        "ratelimit-policy": [r'"read \"all\"";q=2;w=60'], "ratelimit": [r'"read \"all\"";r=0;t=30'], "ratelimit-limit": ["2"],
        "ratelimit-remaining": ["0"], "ratelimit-reset": ["30"], "retry-after": ["30"]}     # 29.5 s, rounded up
    assert response.content == rb'more than 2 in 60 s, which is the limit "read \"all\"": ask again in 30 s'
    assert (await through(middleware, from_("192.0.2.2"))).status == 200
    clock.now = 30
    assert (await through(middleware, from_("192.0.2.1"))).status == 200
    clock.now = 59.9999
    assert fields(await refused(middleware, from_("192.0.2.1")))["retry-after"] == ["1"]


@pytest.mark.parametrize("one, other, together", [
    ("2001:db8::1", "2001:db8:0:0:ffff::", True),
    ("2001:db8::1", "2001:db8:0:1::1", False),
    ("192.0.2.1", "::ffff:192.0.2.1", True),
    ("192.0.2.1", "192.0.2.2", False),
    ("fe80::1%eth0", "fe80::2", True),
    ("unknown", "unknown", True),
])
@run_in_kernel
async def test_who_has_a_64_of_ipv6_is_one_client(one, other, together):
    middleware = rate_limit(RateLimiter(1, per=1000))
    await through(middleware, from_(one))
    if together:
        await refused(middleware, from_(other))
    else:
        assert (await through(middleware, from_(other))).status == 200


@run_in_kernel
async def test_a_unix_socket_is_one_client_and_a_key_or_a_cost_is_a_function_of_the_request():
    middleware = rate_limit(RateLimiter(1, per=1000))
    await through(middleware, get("/"))
    await refused(middleware, get("/"))
    middleware = rate_limit(RateLimiter(10, per=1000), key=lambda request: request.headers.get("user"),
                            cost=lambda request: int(request.headers.get("units", "1")))
    assert fields(await through(middleware, get("/", ("User", "ann"), ("Units", "8"))))["ratelimit-remaining"] == ["2"]
    assert fields(await through(middleware, get("/", ("User", "bob"))))["ratelimit-remaining"] == ["9"]
    response = await refused(middleware, get("/", ("User", "ann"), ("Units", "3")))
    assert fields(response)["ratelimit-remaining"] == ["2"] and fields(response)["retry-after"] == ["100"]
    response = await refused(middleware, get("/", ("User", "ann"), ("Units", "11")))
    assert fields(response) == {} and b"this asks for 11 at once" in response.content and b"10 is the most" in response.content
    assert fields(await through(middleware, get("/"))) == {}                # its key is None


@run_in_kernel
async def test_of_two_limits_both_are_told_and_the_older_fields_are_of_the_one_with_least_left():
    clock = Clock()
    for burst, left in ((3, "2"), (10, "4")):
        inner = rate_limit(RateLimiter(5, per=60, clock=clock), name="inner")
        outer = rate_limit(RateLimiter(1, burst=burst, clock=clock), name="outer")

        async def answer(request):
            return await through(inner, request)

        found = fields(await through(outer, from_("192.0.2.1"), answer))
        assert found["ratelimit-policy"] == ['"inner";q=5;w=60', f'"outer";q={burst};w={burst}']
        assert found["ratelimit"] == ['"inner";r=4;t=12', f'"outer";r={burst - 1};t=1']
        assert found["ratelimit-remaining"] == [left]


@run_in_kernel
async def test_a_limiter_that_lets_calls_wait_lets_requests_wait():
    middleware, began = rate_limit(RateLimiter(2, burst=1, wait=0.5)), flowcoro.now()
    for _ in range(3):
        assert (await through(middleware, from_("192.0.2.1"))).status == 200
    assert flowcoro.now() - began == 1
    with flowcoro.move_on_after(0.25):
        await through(middleware, from_("192.0.2.1"))
    await flowcoro.sleep(0.25)
    assert (await through(middleware, from_("192.0.2.1"))).status == 200


@run_in_kernel
async def test_errors_that_are_no_rejections_are_raised():
    async def fail(key, cost):
        raise flowcoro.FlowCoroError("broken")

    limiter = types.SimpleNamespace(acquire=fail, state_of=None, rate=1, per=1, burst=1)
    with pytest.raises(flowcoro.FlowCoroError, match="broken"):
        await through(rate_limit(limiter), get("/"))


def test_behind_a_proxy_clients_are_told_apart():
    app = HttpServer()
    app.middleware(trusted_proxies(["127.0.0.1", "::1"]))
    app.middleware(rate_limit(RateLimiter(1, per=1000)))

    @app.get("/")
    async def index(request):
        return "well"

    async def main():
        async with serving(app) as server:
            async with HttpClient(base_url=server.url) as client:
                for address, status in (("192.0.2.1", 200), ("192.0.2.2", 200), ("192.0.2.1", 429)):
                    assert (await client.get("/", headers={"X-Forwarded-For": address})).status == status

    flowcoro.run(main())


# ---- concurrency -----------------------------------------------------------------------------------------------

@run_in_kernel
async def test_more_requests_than_may_be_under_way_are_answered_503():
    limiter = ConcurrencyLimiter(2, max_waiting=1, wait=5)
    middleware, done = concurrency_limit(limiter), []

    async def slowly(request):
        await flowcoro.sleep(3.5)

    async def ask():
        done.append((await through(middleware, get("/"), slowly)).status)

    async with flowcoro.TaskGroup() as group:
        for _ in range(3):
            group.spawn(ask())
        await wait_all_tasks_parked()
        response = await refused(middleware, get("/"), 503)
        assert fields(response) == {"retry-after": ["1"]} and response.content.startswith(b"too many requests are under way")
        await flowcoro.sleep(3.6)
        more = [group.spawn(ask()) for _ in range(2)]
        await wait_all_tasks_parked()
        assert fields(await refused(middleware, get("/"), 503)) == {"retry-after": ["4"]}       # 3.5 s · 2 / 2, rounded up
        more[0].cancel()
    assert done.count(200) == 4
    assert limiter.statistics()["running"] == limiter.statistics()["waiting"] == 0


@run_in_kernel
async def test_an_adaptive_limiter_hears_of_503_and_504_and_nothing_of_who_has_gone():
    heard = []

    class Algorithm(AIMD):
        def record(self, seconds, in_flight, dropped, now):
            heard.append((seconds, dropped))
            return super().record(seconds, in_flight, dropped, now)

    middleware = concurrency_limit(ConcurrencyLimiter(Algorithm()))
    for status in (200, 404, 500, 503, 504):
        async def answer(request):
            await flowcoro.sleep(1)
            return Response(status, "")
        await through(middleware, get("/"), answer)
    with flowcoro.move_on_after(1):
        await through(middleware, get("/"), lambda request: flowcoro.sleep(math.inf))
    assert heard == [(1, False)] * 3 + [(1, True)] * 2


def test_a_place_is_free_again_however_a_handler_ends():
    app, limiter = HttpServer(), ConcurrencyLimiter(1)
    app.middleware(concurrency_limit(limiter))
    app.middleware(timeout(0.05))

    @app.get("/{how}")
    async def handler(request, how):
        assert limiter.statistics()["running"] == 1
        if how == "late":
            await flowcoro.sleep(20)
        if how == "error":
            raise HttpError(418, "a teapot")
        return how

    async def main():
        async with app.test_client() as client:
            for how, status in (("well", 200), ("late", 503), ("error", 418), ("well", 200)):
                assert (await client.get(f"/{how}")).status == status
                assert limiter.statistics()["running"] == 0

    flowcoro.run(main())


@pytest.mark.parametrize("make, error, message", [
    (lambda: rate_limit(5), TypeError, "rate_limit(5): it has no acquire; give a limiter that has acquire, state_of, rate,"),
    (lambda: rate_limit(ConcurrencyLimiter(1)), TypeError, "it has no state_of"),
    (lambda: rate_limit(RateLimiter(1), name="é"), ValueError, "rate_limit(name='é'): give printable ASCII"),
    (lambda: rate_limit(RateLimiter(1), name="a\n"), ValueError, "give printable ASCII"),
    (lambda: rate_limit(RateLimiter), TypeError, "that is a class; give a limiter"),
    *[(lambda key=key: rate_limit(RateLimiter(1), key=key), TypeError, "give a plain function of a request")
      for key in (None, "user", refused)],
    *[(lambda cost=cost: rate_limit(RateLimiter(5), cost=cost), ValueError, "give a number of units from more than 0 to 5")
      for cost in (0, -1, math.nan, "1", None, True, 6, refused)],
    (lambda: concurrency_limit(None), TypeError, "concurrency_limit(None): it has no acquire"),
    (lambda: concurrency_limit(RateLimiter(1)), TypeError, "that limits a rate; give it to rate_limit()"),
])
def test_what_is_no_limiter_is_refused(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_is_told_when_to_ask_again():
    app = HttpServer()
    app.middleware(rate_limit(RateLimiter(1, per=1000)))

    @app.get("/")
    async def index(request):
        return "well"

    def curl(*urls):
        return subprocess.run(["curl", "-sSi", "--noproxy", "*", *urls], stdout=subprocess.PIPE, check=True, timeout=30).stdout

    async def main():
        async with serving(app) as server:
            first, second = (await flowcoro.to_thread(curl, server.url, server.url)).split(b"HTTP/1.1 ")[1:]
            assert first.startswith(b"200") and b'\r\nRateLimit-Policy: "default";q=1;w=1000\r\n' in first
            assert b'\r\nRateLimit: "default";r=0;t=1000\r\n' in first and first.endswith(b"\r\n\r\nwell")
            assert second.startswith(b"429") and b"\r\nRetry-After: 1000\r\n" in second
            assert second.endswith(b'more than 1 in 1000 s, which is the limit "default": ask again in 1000 s')

    flowcoro.run(main())
