"""FlowCoro's server. Run by ../net.py; harness.py says what each case does."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))    # the files beside this folder, whatever is installed

import flowcoro
import flowcoro_net

import harness


async def echo(sock):
    while data := await sock.read():
        await sock.write(data)


async def receive(sock):
    count, buffer = 0, bytearray(harness.LARGE)
    while some := await sock.read_into(buffer):
        count += some
    await sock.write(harness.in_bytes(count))


async def send(sock):
    for piece in harness.pieces(harness.number(await sock.read_exactly(8))):
        await sock.write(piece)


async def file(sock):
    with open(harness.OPTIONS["file"], "rb") as file:
        await sock.send_file(file, 0, harness.number(await sock.read_exactly(8)))


def serve(handler):
    async def main():
        async with await flowcoro_net.TcpServer.listen("127.0.0.1", 0, tls=harness.tls()) as server:
            harness.ready(server.local[1])
            await server.serve(handler)
    flowcoro.run(main(), workers=1)


if __name__ == "__main__":
    harness.main(dict(echo=echo, receive=receive, send=send, file=file), serve, flowcoro_net.__version__)
