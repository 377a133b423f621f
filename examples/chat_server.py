"""A chat room over TCP: each line that somebody writes goes to all the others, and the slow hold up nobody.

A connection has two tasks: one reads what its user writes, the other writes what the room says. Both end with the
connection. `subscribe("lag")` tells who could not keep up how many lines he has missed.
"""

import flowcoro
import flowcoro_net

LINE, NAME = 1000, 30           # bytes at most


async def welcome(sock, room):
    await sock.write(b"Your name? ")
    name = (await sock.read_until(b"\n", limit=NAME)).decode(errors="replace").strip() or "nobody"
    with room.subscribe("lag") as heard:
        await room.send(f"{name} is here")
        async with flowcoro.TaskGroup() as group:
            group.spawn(write(sock, heard))
            try:
                while line := await sock.read_until(b"\n", limit=LINE):
                    await room.send(f"{name}: {line.decode(errors='replace').strip()}")
            finally:
                group.cancel()
    await room.send(f"{name} has left")


async def write(sock, heard):
    while True:
        try:
            line = await heard.receive()
        except flowcoro.Lagged as lag:
            line = f"({lag.missed} lines missed)"
        await sock.write(line.encode() + b"\n")


async def enter(address, name):
    """A client, whose name the room has heard."""
    sock = await flowcoro_net.Socket.connect(*address)
    await sock.read_exactly(len("Your name? "))
    await sock.write(name.encode() + b"\n")
    await sock.read_until()
    return sock


async def main():
    room = flowcoro.Broadcast(capacity=100)
    async with await flowcoro_net.TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
        group.spawn(server.serve(lambda sock: welcome(sock, room)))
        async with await enter(server.local, "Ada") as ada:
            async with await enter(server.local, "Ben") as ben:
                await ben.write(b"hello?\nis anybody here?\n")
                await ben.read_until(b"is anybody here?\n")
            for _ in range(4):
                print("Ada hears", (await ada.read_until()).decode().strip())
        server.close()


if __name__ == "__main__":
    flowcoro.run(main())
