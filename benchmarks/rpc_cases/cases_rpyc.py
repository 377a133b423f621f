"""RPyC: a server with a thread for each connection, and asynchronous calls. Run by ../rpc.py; harness.py says what each does."""

import collections
import importlib.metadata

import rpyc
from rpyc.utils.server import ThreadedServer

import harness


class Service(rpyc.Service):
    def exposed_echo(self, text):
        return text

    def exposed_count(self, number):
        for _ in range(number):
            yield harness.TEXT


def serve():
    ThreadedServer(Service, hostname="127.0.0.1", port=harness.free_port(), backlog=harness.BACKLOG).start()


def connect():
    return rpyc.connect("127.0.0.1", harness.port())


def flight():
    """Without tasks: when the oldest of the calls has its answer, the next one is sent."""
    with connect() as connection:
        echo = rpyc.async_(connection.root.echo)
        measurement = harness.Measurement()
        for end in measurement:
            pending = collections.deque()
            while pending or harness.clock() < end:
                while len(pending) < harness.IN_FLIGHT and (began := harness.clock()) < end:
                    pending.append((began, echo(harness.TEXT)))
                began, result = pending.popleft()
                measurement.check(result.value, began)


def latency():
    with connect() as connection:
        echo = connection.root.echo
        measurement = harness.Measurement()
        for end in measurement:
            while (began := harness.clock()) < end:
                measurement.check(echo(harness.TEXT), began)
                harness.think()


def stream():
    """The generator stays there, and each item is a call."""
    with connect() as connection:
        measurement = harness.Measurement()
        for end in measurement:
            while harness.clock() < end:
                if list(connection.root.count(harness.ITEMS)) != [harness.TEXT] * harness.ITEMS:
                    raise ValueError("a wrong stream")
                measurement.done += harness.ITEMS


if __name__ == "__main__":
    harness.main(dict(serve=serve, flight=flight, latency=latency, stream=stream), importlib.metadata.version("rpyc"))
