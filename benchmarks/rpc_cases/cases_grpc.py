"""grpc.aio, with messages of Protocol Buffers. Run by ../rpc.py; harness.py says what each case does.

What the compiler of .proto files would write is written here: a service with two methods, whose messages are types that come
with Protocol Buffers.
"""

import asyncio
import functools

import grpc
from google.protobuf.wrappers_pb2 import Int64Value, StringValue

import harness


async def echo(request, context):
    return StringValue(value=request.value)


async def count(request, context):
    for _ in range(request.value):
        yield StringValue(value=harness.TEXT)


async def serve():
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bench.Echo", {
        "echo": grpc.unary_unary_rpc_method_handler(echo, StringValue.FromString, StringValue.SerializeToString),
        "count": grpc.unary_stream_rpc_method_handler(count, Int64Value.FromString, StringValue.SerializeToString)})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    harness.ready(port)
    await server.wait_for_termination()


class Stub:
    """One channel, which is one connection."""

    async def __aenter__(self):
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{harness.port()}")
        self.echo = self.channel.unary_unary("/bench.Echo/echo", StringValue.SerializeToString, StringValue.FromString)
        self.count = self.channel.unary_stream("/bench.Echo/count", Int64Value.SerializeToString, StringValue.FromString)
        return self

    async def __aexit__(self, *error):
        await self.channel.close()

    async def call(self, text):
        return (await self.echo(StringValue(value=text))).value

    async def items(self, number):
        async for item in self.count(Int64Value(value=number)):
            yield item.value


async def flight():
    async with Stub() as stub:
        await harness.flight(stub.call, asyncio.gather)


async def latency():
    async with Stub() as stub:
        await harness.latency(stub.call)


async def stream():
    async with Stub() as stub:
        await harness.stream(stub.items)


if __name__ == "__main__":
    harness.main({function.__name__: functools.partial(lambda function: asyncio.run(function()), function)
                  for function in (serve, flight, latency, stream)}, grpc.__version__)
