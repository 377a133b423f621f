"""Time by UDP: a datagram with a question, one with the answer, and a client that asks again when none comes.

A datagram arrives whole, or not at all, and nobody says which. So the client sends its question again after a
while, and numbers it, to tell a late answer from the one it waits for.
"""

import struct
import time

import flowcoro
import flowcoro_net

lost = 2                        # how many questions the server overhears, to show what that does


async def tell_the_time(sock):
    global lost
    while True:
        question, address = await sock.receive_from(100)
        if lost:
            lost -= 1
            continue
        await sock.send_to(question + struct.pack("!d", time.time()), address)


async def ask(host, port, *, patience=0.05, attempts=10):
    """The server's time in seconds. TimeoutError."""
    async with await flowcoro_net.UdpSocket.connect(host, port) as sock:
        for attempt in range(attempts):
            number = struct.pack("!I", attempt)
            await sock.send(number)
            with flowcoro.move_on_after(patience):
                while (answer := await sock.receive(100))[:4] != number:
                    pass
                return attempt + 1, *struct.unpack("!d", answer[4:])
    raise TimeoutError(f"no answer to {attempts} questions")


async def main():
    async with await flowcoro_net.UdpSocket.bind("127.0.0.1", 0) as sock, flowcoro.TaskGroup() as group:
        group.spawn(tell_the_time(sock))
        attempts, seconds = await ask(*sock.local)
        print(f"asked {attempts} times; the clocks differ by less than a minute: {abs(time.time() - seconds) < 60}")
        group.cancel()


flowcoro.run(main())
