"""What several test files of HTTP use: an application on a port of its own, and clients that know nothing but bytes."""

import contextlib

import flowcoro
from flowcoro_net import Socket


@contextlib.asynccontextmanager
async def serving(app, drain_timeout=5.0):
    """Serve an application on a free port; its HttpListener."""
    async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
        group.spawn(server.serve(drain_timeout=drain_timeout))
        try:
            yield server
        finally:
            server.close()


async def everything(sock):
    """What comes until the other side ends. BrokenError if it is cut."""
    pieces = []
    while data := await sock.read():
        pieces.append(data)
    return b"".join(pieces)


async def exchange(server, data):
    """What comes back for these bytes, on a connection of their own."""
    async with await Socket.connect(*server.local) as sock:
        await sock.write(data)
        return await everything(sock)
