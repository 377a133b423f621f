"""Go's net/http with GOMAXPROCS=1: main.go beside this file. Run by ../http.py, which compiles it; see harness.py."""

import os
import shutil
import subprocess

import harness


def version():
    if not shutil.which("go"):
        raise SystemExit("there is no `go`: apt-get install golang-go")
    return subprocess.run(["go", "version"], capture_output=True, text=True).stdout.split()[2].removeprefix("go")


def serve():
    program = harness.OPTIONS["program"]
    os.execve(program, [program], {**os.environ, "GOMAXPROCS": "1"})


if __name__ == "__main__":
    harness.main(dict(hello=serve), version)
