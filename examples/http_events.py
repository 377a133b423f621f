"""Server-sent events: a page that counts, and a client that is cut off and goes on where it was.

Run it with --serve and open the address in a browser; without, a client of a dozen lines stands in for the browser.
"""

import sys

import flowcoro
import flowcoro_net
from flowcoro_http import HttpServer, Response, ServerSentEvent, event_stream, last_event_id

PAGE = """<!DOCTYPE html><title>Counting</title><h1 id="n">…</h1>
<script>new EventSource("/events").onmessage = event => document.getElementById("n").textContent = event.data</script>"""

app = HttpServer()


@app.get("/")
async def page(request):
    return Response(200, PAGE, media_type="text/html; charset=utf-8")


@app.get("/events")
async def events(request):
    async def counted():
        for number in range(int(last_event_id(request) or 0) + 1, 1_000_000):
            yield ServerSentEvent(number, id=str(number))
            await flowcoro.sleep(0.1)
    return event_stream(request, counted(), retry=1)


async def read(address, count, last=""):
    """Take so many events, and go."""
    async with await flowcoro_net.Socket.connect(*address) as sock:
        await sock.write(f"GET /events HTTP/1.1\r\nHost: x\r\nLast-Event-ID: {last}\r\n\r\n".encode())
        while count:
            line = (await sock.read_until(b"\n")).decode().strip()
            if line.startswith("data: "):
                print(line)
                count -= 1
    return line.removeprefix("data: ")


async def main():
    async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
        group.spawn(server.serve())
        last = await read(server.local, 2)
        print("cut off, and again after", last)
        await read(server.local, 2, last)
        server.close()


if __name__ == "__main__":
    app.run(port=8000) if "--serve" in sys.argv else flowcoro.run(main())
