"""uvloop's server by callbacks, without streams: what calls them is written in C. Run by ../net.py."""

import asyncio

import uvloop

import harness


class Echo(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(data)


class Receive(Echo):
    count = 0

    def data_received(self, data):
        self.count += len(data)

    def eof_received(self):
        self.transport.write(harness.in_bytes(self.count))


class Send(Echo):
    wants_more = True       # what it has written already is not too much

    def data_received(self, data):
        self.rest = harness.pieces(harness.number(data))
        self.go_on()

    def go_on(self):
        while self.wants_more:
            if (piece := next(self.rest, None)) is None:
                self.transport.close()
                break
            self.transport.write(piece)

    def pause_writing(self):
        self.wants_more = False

    def resume_writing(self):
        self.wants_more = True
        self.go_on()


def serve(protocol):
    async def main():
        server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0, ssl=harness.tls())
        harness.ready(server.sockets[0].getsockname()[1])
        async with server:
            await server.serve_forever()
    uvloop.run(main())


if __name__ == "__main__":
    harness.main(dict(echo=Echo, receive=Receive, send=Send), serve, uvloop.__version__)
