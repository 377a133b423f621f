"""The library websockets on asyncio, with its speed-up in C. Run by ../websocket.py; harness.py says what each case does."""

import asyncio
import contextlib

import websockets
import websockets.speedups  # noqa: F401: that it is there
from websockets.asyncio.client import connect
from websockets.asyncio.server import broadcast as send_to_all, serve

import harness


async def run(handler):
    async with serve(handler, sock=harness.listener(), compression=None) as server:
        await server.serve_forever()


def echo():
    async def echo(ws):
        async for message in ws:
            await ws.send(message)

    asyncio.run(run(echo))


def broadcast():
    members = set()

    async def room(ws):
        members.add(ws)
        try:
            async for message in ws:
                send_to_all(members, message)
        finally:
            members.remove(ws)

    asyncio.run(run(room))


@contextlib.asynccontextmanager
async def connected(url):
    async with connect(url, compression=None, proxy=None) as ws:
        async def talk(text):
            await ws.send(text)
            return await ws.recv()
        yield talk


CASES = dict(echo=echo, broadcast=broadcast, client=lambda: asyncio.run(harness.measure_client(connected, asyncio.gather)))

if __name__ == "__main__":
    harness.main(CASES, websockets.__version__)
