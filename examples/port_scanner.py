"""Which of 400 ports of this machine are open? A hundred connects at a time, a limit of time for each, and a bar.

The bar is a task of its own that looks at a number now and then: who works need not know that somebody watches.
"""

import flowcoro
import flowcoro_net

AT_ONCE, PATIENCE = 100, 5.0            # connects, seconds


async def scan(host, ports, done):
    """The open ones, sorted. `done` gets each port that was tried."""
    found, permits = [], flowcoro.Semaphore(AT_ONCE)

    async def knock(port):
        async with permits:
            try:
                async with await flowcoro_net.Socket.connect(host, port, timeout=PATIENCE):
                    found.append(port)
            except (flowcoro_net.BrokenError, TimeoutError):
                pass
            done.append(port)

    async with flowcoro.TaskGroup() as group:
        for port in ports:
            group.spawn(knock(port))
    return sorted(found)


async def show(done, whole):
    while True:
        part = len(done) * 40 // whole
        print(f"\r[{'#' * part}{'.' * (40 - part)}] {len(done):4} of {whole}", end="", flush=True)
        await flowcoro.sleep(0.02)


async def main():
    async with await flowcoro_net.TcpServer.listen("127.0.0.1", 0) as server:
        port = server.local[1]
        ports, done = range(max(1, port - 200), min(port + 200, 65536)), []
        async with flowcoro.TaskGroup() as group:
            showing = group.spawn(show(done, len(ports)))
            found = await scan("127.0.0.1", ports, done)
            await flowcoro.sleep(0.05)          # for the full bar
            showing.cancel()
        print("\nthe server of this program was found:", port in found)


flowcoro.run(main())
