"""Rooms: who opens ws://…/rooms/tea says something to all who are in it, and a slow one holds up nobody.

    PYTHONPATH=. python examples/websocket_rooms.py          two guests come, talk and go
    PYTHONPATH=. python examples/websocket_rooms.py serve    serves rooms on port 8000 until Ctrl-C
"""

import collections
import sys

import flowcoro
from flowcoro_http import HttpServer
from flowcoro_websocket import accept, broadcast, connect

app = HttpServer(websocket=accept)
rooms = collections.defaultdict(set)


@app.websocket("/rooms/{name}", max_message=1000)
async def room(ws, name, *, guest: str = "somebody"):
    members = rooms[name]
    members.add(ws)
    broadcast(members, f"{guest} comes in")
    try:
        async for message in ws:                    # until the guest closes; it ends the handler, and so the WebSocket
            broadcast(members, f"{guest}: {message}", slow="close")
    finally:
        members.discard(ws)
        broadcast(members, f"{guest} leaves")


async def main():
    async with app.test_client() as client:         # connections in memory; with a server, connect() alone
        async def enter(guest):
            return await connect(f"ws://testserver/rooms/tea?guest={guest}", socket=await client.socket())

        ada = await enter("Ada")
        print(await ada.receive())
        bob = await enter("Bob")
        print(await ada.receive())
        await bob.receive()                         # that he himself came in
        await ada.send("hello")
        print(await bob.receive())
        await ada.close()
        print(await bob.receive())
        await bob.close()


if __name__ == "__main__":
    app.run("127.0.0.1", 8000) if sys.argv[1:] == ["serve"] else flowcoro.run(main())
