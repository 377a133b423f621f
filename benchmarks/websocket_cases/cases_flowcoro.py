"""FlowCoro's server and client. Run by ../websocket.py; harness.py says what each case does."""

import contextlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))    # the files beside this folder, whatever is installed

import flowcoro
import flowcoro_http
import flowcoro_websocket

import harness


def serve(handler):
    app = flowcoro_http.HttpServer(websocket=flowcoro_websocket.accept)
    app.websocket("/", deflate=False)(handler)
    app.run("127.0.0.1", harness.free_port())


def echo():
    async def echo(ws):
        async for message in ws:
            await ws.send(message)

    serve(echo)


def broadcast():
    members = set()

    async def room(ws):
        members.add(ws)
        try:
            async for message in ws:
                flowcoro_websocket.broadcast(members, message)
        finally:
            members.remove(ws)

    serve(room)


async def gather(*coroutines):
    async with flowcoro.TaskGroup() as group:
        for coro in coroutines:
            group.spawn(coro)


@contextlib.asynccontextmanager
async def connect(url):
    async with flowcoro_websocket.connect(url, deflate=False) as ws:
        async def talk(text):
            await ws.send(text)
            return await ws.receive()
        yield talk


CASES = dict(echo=echo, broadcast=broadcast,
             client=lambda: flowcoro.run(harness.measure_client(connect, gather), workers=1))

if __name__ == "__main__":
    harness.main(CASES, flowcoro_websocket.__version__)
