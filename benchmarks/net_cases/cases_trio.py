"""trio's server. Run by ../net.py; harness.py says what each case does."""

import trio

import harness


async def echo(stream):
    while data := await stream.receive_some(harness.CHUNK):
        await stream.send_all(data)


async def receive(stream):
    count = 0
    while data := await stream.receive_some(harness.LARGE):
        count += len(data)
    await stream.send_all(harness.in_bytes(count))


async def send(stream):
    for piece in harness.pieces(harness.number(await stream.receive_some(8))):
        await stream.send_all(piece)


def serve(handler):
    async def main():
        listener, = await trio.open_tcp_listeners(0, host="127.0.0.1")
        harness.ready(listener.socket.getsockname()[1])
        context = harness.tls()
        if context is not None:
            listener = trio.SSLListener(listener, context, https_compatible=True)
        await trio.serve_listeners(handler, [listener])
    trio.run(main)


if __name__ == "__main__":
    harness.main(dict(echo=echo, receive=receive, send=send), serve, trio.__version__)
