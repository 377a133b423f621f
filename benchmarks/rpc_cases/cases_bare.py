"""A bare echo on flowcoro_net: messages with their length before them, and nothing else. Run by ../rpc.py; see harness.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))    # the files beside this folder, whatever is installed

import flowcoro
import flowcoro_net

import harness


async def read(sock):
    return await sock.read_exactly(int.from_bytes(await sock.read_exactly(4), "big"))


async def write(sock, message):
    await sock.write(len(message).to_bytes(4, "big") + message)


async def echo(sock):
    try:
        while True:
            await write(sock, await read(sock))
    except flowcoro_net.BrokenError:        # the client has gone
        pass


async def serve():
    async with await flowcoro_net.TcpServer.listen("127.0.0.1", 0) as server:
        harness.ready(server.local[1])
        await server.serve(echo)


async def latency():
    async with await flowcoro_net.Socket.connect("127.0.0.1", harness.port()) as sock:
        async def call(text):
            await write(sock, text.encode())
            return (await read(sock)).decode()
        await harness.latency(call)


if __name__ == "__main__":
    harness.main(dict(serve=lambda: flowcoro.run(serve(), workers=1), latency=lambda: flowcoro.run(latency(), workers=1)),
                 flowcoro_net.__version__)
