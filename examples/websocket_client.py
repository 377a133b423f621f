"""A client that comes back: its connection is lost in the middle, and it hears everything, once."""

import flowcoro
from flowcoro_http import HttpServer
from flowcoro_websocket import ConnectionClosed, accept, connect

app = HttpServer(websocket=accept)
NEWS = ["it rains", "it snows", "the sun shines", "that was all"]


@app.websocket("/news")
async def tell(ws):
    heard = int(await ws.receive())                 # how many the client has heard already
    for text in NEWS[heard:]:
        await ws.send(text)
        if text == "it snows":
            await ws.close(1012, "the service restarts")
            return


async def listen(url):
    heard = 0

    def tell_why(error, seconds):                   # the error of an attempt; None: there was a connection, and it has ended
        print("once more in a moment" if seconds < 60 else f"once more in {seconds:.0f} s")

    async for ws in connect(url, ping_interval=10, ping_timeout=5, on_retry=tell_why):
        try:
            await ws.send(str(heard))
            async for text in ws:
                heard += 1
                print(text)
            return                                  # the server has closed normally: there is no more
        except ConnectionClosed as error:           # any other end; the loop goes on, and connects again
            print(f"lost: {error.code} {error.reason}")


async def main():
    async with flowcoro.TaskGroup() as group, await app.listen("127.0.0.1", 0) as server:
        group.spawn(server.serve())
        with flowcoro.timeout(10):
            await listen(f"ws://127.0.0.1:{server.local[1]}/news")


flowcoro.run(main())
