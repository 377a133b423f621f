"""aiohttp's server and client on asyncio. Run by ../websocket.py; harness.py says what each case does."""

import asyncio
import contextlib

import aiohttp
from aiohttp import web

import harness


async def serve(handler):
    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, harness.listener()).start()
    await asyncio.Event().wait()


async def echo(request):
    ws = web.WebSocketResponse(compress=False)
    await ws.prepare(request)
    async for message in ws:
        if message.type is aiohttp.WSMsgType.TEXT:
            await ws.send_str(message.data)
        else:
            await ws.send_bytes(message.data)
    return ws


MEMBERS = set()


async def room(request):
    """aiohttp has nothing for it: this is how its demonstration of a chat does it."""
    ws = web.WebSocketResponse(compress=False)
    await ws.prepare(request)
    MEMBERS.add(ws)
    try:
        async for message in ws:
            for member in MEMBERS:
                await member.send_str(message.data)
    finally:
        MEMBERS.remove(ws)
    return ws


async def client():
    @contextlib.asynccontextmanager
    async def connect(url):
        async with session.ws_connect(url, compress=0) as ws:
            async def talk(text):
                await ws.send_str(text)
                return await ws.receive_str()
            yield talk

    async with aiohttp.ClientSession() as session:
        await harness.measure_client(connect, asyncio.gather)


def main(run):
    harness.main(dict(echo=lambda: run(serve(echo)), broadcast=lambda: run(serve(room)), client=lambda: run(client())),
                 aiohttp.__version__)


if __name__ == "__main__":
    main(asyncio.run)
