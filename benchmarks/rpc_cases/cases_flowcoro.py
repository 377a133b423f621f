"""FlowCoro's server and client: JSON-RPC over TCP, a message in a line. Run by ../rpc.py; harness.py says what each case does."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))    # the files beside this folder, whatever is installed

import functools

import flowcoro
import flowcoro_rpc

import harness

server = flowcoro_rpc.RpcServer()


@server.method
async def echo(text: str) -> str:
    return text


@server.method
async def count(items: int):
    for _ in range(items):
        yield harness.TEXT


async def serve():
    listening = await server.start_tcp_server(0)
    harness.ready(listening.local[1])
    await flowcoro.stop_requested()


def connect():
    return flowcoro_rpc.RpcClient.connect("127.0.0.1", harness.port())


async def gather(*coroutines):
    async with flowcoro.TaskGroup() as group:
        for coro in coroutines:
            group.spawn(coro)


async def flight():
    async with await connect() as client:
        await harness.flight(functools.partial(client.call, "echo"), gather)


async def latency():
    async with await connect() as client:
        await harness.latency(functools.partial(client.call, "echo"))


async def batch():
    async with await connect() as client:
        def call_all(texts):
            return client.batch(*(flowcoro_rpc.Request("echo", [text]) for text in texts))
        await harness.batch(call_all)


async def stream():
    async with await connect() as client:
        await harness.stream(functools.partial(client.stream, "count"))


if __name__ == "__main__":
    harness.main({function.__name__: functools.partial(lambda function: flowcoro.run(function(), workers=1), function)
                  for function in (serve, flight, latency, batch, stream)}, flowcoro_rpc.__version__)
