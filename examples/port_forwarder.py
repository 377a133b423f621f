"""A port forwarder: what comes to one port goes to another, and back; two tasks for each connection.

Each way ends by itself: when one side has no more to say, the other is told so (`shutdown_write`) and may go
on answering. `write` returns once the system has taken everything, so a slow receiver slows its sender down,
and the forwarder never holds more than one piece of each way.
"""

import flowcoro
import flowcoro_net


async def pass_on(source, target):
    while data := await source.read():
        await target.write(data)
    await target.shutdown_write()


def forwarder(host, port):
    """A handler that forwards its connection to host and port."""
    async def forward(near):
        async with await flowcoro_net.Socket.connect(host, port) as far, flowcoro.TaskGroup() as group:
            group.spawn(pass_on(near, far))
            group.spawn(pass_on(far, near))
    return forward


async def shout(sock):
    while line := await sock.read_until():
        await sock.write(line.upper())


async def main():
    listen = flowcoro_net.TcpServer.listen
    async with await listen("127.0.0.1", 0) as inner, await listen("127.0.0.1", 0) as outer, flowcoro.TaskGroup() as group:
        group.spawn(inner.serve(shout))
        group.spawn(outer.serve(forwarder(*inner.local)))
        async with await flowcoro_net.Socket.connect(*outer.local) as sock:
            await sock.write(b"hello\nthrough two sockets\n")
            await sock.shutdown_write()
            while line := await sock.read_until():
                print(line)
        inner.close()
        outer.close()


flowcoro.run(main())
