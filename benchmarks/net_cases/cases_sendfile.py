"""socket.sendfile() of a blocking socket. Run by ../net.py."""

import platform

import harness
from cases_blocking import serve


def file(sock):
    count = harness.number(sock.recv(8))
    with open(harness.OPTIONS["file"], "rb") as file:
        sock.sendfile(file, 0, count)


if __name__ == "__main__":
    harness.main(dict(file=file), serve, platform.python_version())
