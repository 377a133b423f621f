"""aiohttp's server and client with uvloop: JSON by POST. Run by ../rpc.py; harness.py says what each case does."""

import asyncio
import contextlib
import functools
import json

import aiohttp
import uvloop
from aiohttp import web

import harness


async def echo(request):
    params = await request.json()
    return web.json_response({"result": params["text"]})


async def count(request):
    """A line of JSON for each item."""
    params = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
    await response.prepare(request)
    for _ in range(params["items"]):
        await response.write(json.dumps({"result": harness.TEXT}).encode() + b"\n")
    await response.write_eof()
    return response


async def serve():
    app = web.Application()
    app.router.add_post("/echo", echo)
    app.router.add_post("/count", count)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, harness.listener()).start()
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def connected():
    connector = aiohttp.TCPConnector(limit=harness.IN_FLIGHT)       # HTTP/1.1 has one request on its way in a connection
    async with aiohttp.ClientSession(f"http://127.0.0.1:{harness.port()}", connector=connector) as session:
        yield session


async def call(session, text):
    async with session.post("/echo", json={"text": text}) as response:
        return (await response.json())["result"]


async def items(session, number):
    async with session.post("/count", json={"items": number}) as response:
        async for line in response.content:
            yield json.loads(line)["result"]


async def flight():
    async with connected() as session:
        await harness.flight(functools.partial(call, session), asyncio.gather)


async def latency():
    async with connected() as session:
        await harness.latency(functools.partial(call, session))


async def stream():
    async with connected() as session:
        await harness.stream(functools.partial(items, session))


if __name__ == "__main__":
    harness.main({function.__name__: functools.partial(lambda function: uvloop.run(function()), function)
                  for function in (serve, flight, latency, stream)}, aiohttp.__version__)
