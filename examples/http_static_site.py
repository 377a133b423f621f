"""A folder as a web site: files from memory or by sendfile, 304 for who has them, ranges, listings, and nothing from outside.

The folder is made here, and asked for over a real connection; with `app.run()` in place of all that it would be a server to use.
"""

import pathlib
import tempfile

import flowcoro
import flowcoro_net
from flowcoro_http import HttpServer, compress, security_headers, static_files


def site(folder):
    app = HttpServer()
    app.middleware(security_headers())
    app.middleware(compress())
    app.mount("/", static_files(folder, listing=True, max_age=60))
    return app


async def ask(address, path, *fields):
    """The status line and the fields of an answer, and its content."""
    async with await flowcoro_net.Socket.connect(*address) as sock:
        lines = [f"GET {path} HTTP/1.1", "Host: example", "Connection: close", *fields, "", ""]
        await sock.write("\r\n".join(lines).encode())
        answer = b""
        while data := await sock.read():
            answer += data
    head, _, content = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return status, {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}, content


async def main():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "hello.txt").write_text("Hello, world!\n")
        (folder / "secret").symlink_to("/etc/passwd")
        async with await site(folder).listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve())
            status, fields, content = await ask(server.local, "/hello.txt")
            print(status, fields["content-type"], content)
            print((await ask(server.local, "/hello.txt", f"If-None-Match: {fields['etag']}"))[0])
            status, fields, content = await ask(server.local, "/hello.txt", "Range: bytes=7-11")
            print(status, fields["content-range"], content)
            for path in ("/secret", "/../etc/passwd", "/%2e%2e/etc/passwd"):
                print((await ask(server.local, path))[0], path)
            server.close()


if __name__ == "__main__":
    flowcoro.run(main())
