"""A chat for browsers: a page, and a room in which everybody hears everything and the slow hold up nobody.

Run it with --serve and open the address in two windows; without, two clients of a few lines stand in for the browsers.
"""

import sys

import flowcoro
import flowcoro_websocket
from flowcoro_http import HttpServer, Response

PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Chat</title>
<form><label>Your words <input autofocus></label> <button>Say</button></form> <div role="log"></div>
<script>
const room = new WebSocket(location.href.replace(/^http/, "ws") + "room");
const show = text => document.querySelector("div").append(text, document.createElement("br"));
room.onmessage = event => show(event.data);
room.onclose = event => show(`closed: ${event.code} ${event.reason}`);
document.forms[0].onsubmit = event => { event.preventDefault(); room.send(event.target[0].value); event.target.reset() };
</script>"""

app = HttpServer(websocket=flowcoro_websocket.accept)
members = set()


@app.get("/")
async def page(request):
    return Response(200, PAGE, media_type="text/html; charset=utf-8")


@app.websocket("/room", max_message=1000)
async def room(ws):
    members.add(ws)
    try:
        async for text in ws:
            flowcoro_websocket.broadcast(members, f"{ws.peer[1]}: {text}", slow="close")
    finally:
        members.discard(ws)


async def main():
    async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
        group.spawn(server.serve())
        url = server.url.replace("http", "ws") + "/room"
        async with flowcoro_websocket.connect(url) as ada, flowcoro_websocket.connect(url) as ben:
            await ada.send("hello?")
            await ben.send(f"I am here, {(await ben.receive()).partition(':')[0]}")
            for _ in range(2):
                print("Ada hears", await ada.receive())
        server.close()


if __name__ == "__main__":
    app.run(port=8000) if "--serve" in sys.argv else flowcoro.run(main())
