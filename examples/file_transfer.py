"""Send a file: its length and name, then its content, which never enters this process (`sendfile`).

Whoever receives checks what it is told before it believes it: a name is not a path, and a length has a limit.
"""

import os
import pathlib
import tempfile

import flowcoro
import flowcoro_net

LARGEST = 2**30                 # bytes


async def send(sock, path):
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        await sock.write(b"%d %s\n" % (length, path.name.encode()))
        await sock.send_file(file, 0, length)


async def receive(sock, folder):
    """The path of the file that was received into a folder."""
    length, name = (await sock.read_until(limit=300)).decode().rstrip("\n").split(" ", 1)
    if not 0 <= int(length) <= LARGEST or name != os.path.basename(name) or name in ("", ".", ".."):
        raise ValueError(f"refused: {name!r} of {length} bytes")
    left, buffer = int(length), bytearray(256 * 1024)
    with open(folder / name, "wb") as file:
        while left:
            count = await sock.read_into(memoryview(buffer)[:left])
            if not count:
                raise EOFError(f"{left} bytes of {name!r} are missing")
            await flowcoro.to_thread(file.write, memoryview(buffer)[:count])        # a disk may be slow
            left -= count
    return folder / name


async def main(folder):
    (folder / "in").mkdir()
    (folder / "film").write_bytes(os.urandom(5_000_000))
    async with await flowcoro_net.TcpServer.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
        sending = group.spawn(flowcoro_net.Socket.connect(*server.local))
        async with await server.accept() as far, await sending as near:
            group.spawn(send(near, folder / "film"))
            received = await receive(far, folder / "in")
            print(received.name, "arrived unharmed:", received.read_bytes() == (folder / "film").read_bytes())


with tempfile.TemporaryDirectory() as folder:
    flowcoro.run(main(pathlib.Path(folder)))
