"""shutil.copyfileobj() into a blocking socket. Run by ../net.py."""

import platform
import shutil

import harness
from cases_blocking import serve


def file(sock):
    sock.recv(8)                # it always wants all of the file
    with open(harness.OPTIONS["file"], "rb") as file, sock.makefile("wb", buffering=0) as out:
        shutil.copyfileobj(file, out, harness.LARGE)


if __name__ == "__main__":
    harness.main(dict(file=file), serve, platform.python_version())
