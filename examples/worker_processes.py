"""One port, several processes: a supervisor that replaces the dead, so that more than one core serves.

Python steps one thread at a time, so one process uses one core. With `processes=2` two processes are forked that
share the port; this one only looks after them. Here a worker is killed, which is reported to stderr, and another
takes its place; SIGTERM ends them all, after they have finished what they were doing.
"""

import os
import signal

import flowcoro
import flowcoro_net


async def tell_who(sock):
    while await sock.read_until():
        await sock.write(b"%d\n" % os.getpid())


async def ask(address):
    async with await flowcoro_net.Socket.connect(*address) as sock:
        await sock.write(b"who are you?\n")
        return int(await sock.read_until())


async def main():
    async with await flowcoro_net.TcpServer.listen("127.0.0.1", 0, reuse_port=True) as server, flowcoro.TaskGroup() as group:
        group.spawn(server.serve(tell_who, processes=2))
        pids = {await ask(server.local) for _ in range(100)}
        print(f"{len(pids)} processes answer, and none of them is this one: {os.getpid() not in pids}")
        os.kill(min(pids), signal.SIGKILL)
        while server.statistics()["restarts"] < 1:
            await flowcoro.sleep(0.01)
        later = {await ask(server.local) for _ in range(100)}
        print(f"{len(later)} processes answer, and {len(later - pids)} of them is new")
        os.kill(os.getpid(), signal.SIGTERM)        # as a service manager does; serve() returns when all have ended
    print(f"left: {server.statistics()['processes']}")


flowcoro.run(main(), workers=1)
