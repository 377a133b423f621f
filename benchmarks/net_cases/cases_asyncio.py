"""asyncio's server, by its streams, and uvloop's (cases_uvloop.py). Run by ../net.py; harness.py says what each case does."""

import asyncio
import platform

import harness


async def echo(reader, writer):
    while data := await reader.read(harness.CHUNK):
        writer.write(data)
        await writer.drain()
    writer.close()


async def receive(reader, writer):
    count = 0
    while data := await reader.read(harness.LARGE):
        count += len(data)
    writer.write(harness.in_bytes(count))
    writer.close()


async def send(reader, writer):
    for piece in harness.pieces(harness.number(await reader.readexactly(8))):
        writer.write(piece)
        await writer.drain()
    writer.close()


async def file(reader, writer):
    count = harness.number(await reader.readexactly(8))
    with open(harness.OPTIONS["file"], "rb") as file:
        await asyncio.get_running_loop().sendfile(writer.transport, file, 0, count)
    writer.close()


HANDLERS = dict(echo=echo, receive=receive, send=send, file=file)


def serve(handler, run=asyncio.run):
    async def main():
        server = await asyncio.start_server(handler, "127.0.0.1", 0, ssl=harness.tls())
        harness.ready(server.sockets[0].getsockname()[1])
        async with server:
            await server.serve_forever()
    run(main())


if __name__ == "__main__":
    harness.main(HANDLERS, serve, platform.python_version())
