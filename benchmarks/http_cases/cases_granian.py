"""granian with one worker and uvloop, without a router. Run by ../http.py; harness.py says what each case does."""

import importlib.metadata

import granian
from granian.constants import Interfaces, Loops

import harness


def hello():
    granian.Granian("harness:hello_asgi", port=harness.free_port(), interface=Interfaces.ASGI, workers=1, loop=Loops.uvloop,
                    log_level=granian.log.LogLevels.warning).serve()


if __name__ == "__main__":
    harness.main(dict(hello=hello), importlib.metadata.version("granian"))
