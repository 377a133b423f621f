"""RPC against what others have written: Node's vscode-jsonrpc and jayson, python-lsp-jsonrpc, on both ends; nc; curl.

Python's libraries need not be in the environment of the tests: FLOWCORO_PEERS names a Python that has them. Those of Node are
where NODE_PATH says.
"""

import contextlib
import functools
import importlib.util
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import flowcoro
from flowcoro_http import HttpServer, Response
from flowcoro_os import open_process, run_process
from flowcoro_rpc import ContentLength, Methods, Newline, RpcClient, RpcError, RpcServer
from test_net import PATIENCE, nothing_is_left_behind, run  # noqa: F401  (a fixture)
from test_rpc_openrpc import shop

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOREIGN = ROOT / "tests" / "foreign"
PEERS = os.environ.get("FLOWCORO_PEERS") or sys.executable


def needs(name):
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")


@pytest.fixture(scope="module")
def node():
    """The command that runs ours for Node; NODE_PATH has its libraries."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    done = subprocess.run(["node", "-e", "require('vscode-jsonrpc/node'); require('jayson')"], capture_output=True, text=True,
                          timeout=PATIENCE)
    if done.returncode:
        pytest.skip("vscode-jsonrpc and jayson are not installed: `npm install` them, and name their node_modules in NODE_PATH")
    return ["node", str(FOREIGN / "rpc_node.js")]


@functools.cache
def has(module):
    """Whether the Python of the peers has a module."""
    if PEERS == sys.executable:
        return importlib.util.find_spec(module) is not None
    return subprocess.run([PEERS, "-c", f"import {module}"], capture_output=True, timeout=PATIENCE).returncode == 0


@pytest.fixture
def python(request):
    """The command that runs ours for a library of Python's."""
    module, library = request.param
    if not has(module):
        pytest.skip(f"{library} is not installed: name a Python that has it in FLOWCORO_PEERS")
    return [PEERS, str(FOREIGN / "rpc_peers.py")]


def of(module, library):
    """That a test needs the library, which is imported as `module`."""
    return pytest.mark.parametrize("python", [(module, library)], ids=[library], indirect=True)


# ---- the server ------------------------------------------------------------------------------------------------

class Service:
    """A server's methods, and what they have seen."""

    def __init__(self):
        self.notes, self.cancelled, self.gone = [], 0, flowcoro.Event()
        self.begun, self.noticed, self.arrived = flowcoro.Event(), flowcoro.Event(), []
        self.all_here = flowcoro.Event()
        self.server = RpcServer()
        for method in (self.greet, self.nothing, self.turn, self.divide, self.broken, self.forever, self.work, self.ask,
                       self.be_refused, self.give_up, self.note, self.noted):
            self.server.method(method)
        self.server.method("begun")(self.begun.set)
        self.server.method("noticed")(self.noticed.set)

    async def greet(self, name: str, greeting: str = "Hello") -> str:
        return f"{greeting}, {name}"

    async def nothing(self):
        return None

    async def turn(self, number: int, count: int) -> int:
        """The last who comes is answered first."""
        self.arrived.append(number)
        if len(self.arrived) < count:
            await self.all_here.wait()
        self.all_here.set()
        return number

    async def divide(self, a: int, b: int):
        raise RpcError(7, "by zero", [a, b])

    async def broken(self):
        raise TypeError("a secret")

    async def forever(self):
        try:
            await flowcoro.sleep(math.inf)
        finally:
            self.cancelled += 1

    async def work(self, peer, steps: int, workDoneToken: str) -> int:  # noqa: N803  (LSP's name)
        for step in range(1, steps + 1):
            await peer.notify("$/progress", token=workDoneToken, value=step)
        return steps

    async def ask(self, peer, question: str):
        return "You said: " + await peer.call("answer", question)

    async def be_refused(self, peer):
        try:
            return await peer.call("refuse")
        except RpcError as error:
            return [error.code, error.message, error.data]

    async def give_up(self, peer) -> str:
        """Our call is cancelled; the peer is told, and tells that it has been."""
        async with flowcoro.TaskGroup() as group:
            group.spawn(peer.call("slow"))
            await self.begun.wait()
            group.cancel()
        await self.noticed.wait()
        return "noticed"

    async def note(self, text: str):
        self.notes.append(text)

    async def noted(self):
        return self.notes


def called_by(command, framing):
    """What a client says that it has found, and the Service."""
    async def main():
        service = Service()
        listening = await service.server.start_tcp_server(0, framing=framing)
        try:
            return await found_by(*command, str(listening.local[1])), service
        finally:
            await service.server.close()

    return run(main)


async def found_by(*command, **more):
    """What a program prints at last, as JSON."""
    done = await run_process(command, timeout=PATIENCE, group=True, **more)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return json.loads(done.stdout)


GREETINGS = {"placed": "Servus, größe 𝄞", "named": "Hello, Ada", "large": 300_002}


def check_errors(found):
    assert found["divided"] == {"code": 7, "message": "by zero", "data": [1, 0]}
    assert found["unknown"]["code"] == -32601 and found["wrong"]["code"] == -32602


def test_vscode_jsonrpc_calls_is_called_cancels_and_hears_of_progress(node, reports):
    found, service = called_by([*node, "vscode-client"], ContentLength)
    assert {name: found[name] for name in GREETINGS} == GREETINGS and found["nothing"] is None
    assert found["together"] == [*range(50)] and found["order"][0] == 49
    check_errors(found)
    (message, error), = reports
    assert found["broken"]["code"] == -32603 and "secret" not in json.dumps(found) and str(error) == "a secret"
    assert found["broken"]["data"]["reference"] in message
    assert found["cancelled"]["code"] == -32800 and service.cancelled == 1
    assert (found["progress"], found["work"]) == ([1, 2, 3], 3)
    assert (found["asked"], found["back"]) == (["Tea"], "You said: Tea? Yes.")
    assert found["refused"] == [77, "not today", {"until": "tomorrow"}]
    assert found["gaveUp"] == "noticed" and found["noted"] == service.notes == ["the last word"]


def test_jayson_calls(node):
    found, service = called_by([*node, "jayson-client"], Newline)
    assert found["placed"] == {"result": GREETINGS["placed"], "id": 1}
    assert found["named"] == {"result": GREETINGS["named"], "id": "an id"} and found["large"] == GREETINGS["large"]
    check_errors(found)
    assert found["notified"] and sorted(service.notes) == ["in a batch", "the last word"]
    first, second = sorted(found["batch"], key=lambda answer: answer["id"])
    assert first == {"jsonrpc": "2.0", "id": "first", "result": "Hello, one"}
    assert second["id"] == "second" and second["error"]["code"] == -32601


@of("pylsp_jsonrpc", "python-lsp-jsonrpc")
def test_python_lsp_jsonrpc_calls_and_is_called(python):
    found, service = called_by([*python, "lsp-client"], ContentLength)
    assert (found["placed"], found["named"]) == (GREETINGS["placed"], GREETINGS["named"]) and found["nothing"] is None
    assert found["large"] == 100_002
    check_errors(found)
    assert (found["asked"], found["back"]) == ([["Tea"]], "You said: Tea? Yes.")
    assert found["together"] == [*range(20)] and found["noted"] == ["the last word"]


@of("pygls", "pygls")
def test_an_editor_of_pygls_starts_the_language_server_of_the_examples(python):
    example = ROOT / "examples" / "rpc_language_server.py"

    async def main():
        return await found_by(*python, "editor", sys.executable, "-W", "error", str(example), "--stdio",
                              env={**os.environ, "PYTHONPATH": str(ROOT)})

    assert run(main) == {"capabilities": [1, True], "diagnostics": [[1, 40, "60 characters"]], "hover": "word 2 of its line",
                         "shutdown": None}


# ---- the client ------------------------------------------------------------------------------------------------

@contextlib.asynccontextmanager
async def program(*command):
    """A server that has been started: its first line as JSON, and a function that ends its input: what it says then."""
    async with open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        async def outcome():
            process.stdin.close()
            said = b""
            while some := await process.stdout.read():
                said += some
            assert await process.wait() == 0
            return json.loads(said) if said else None

        yield json.loads(await process.stdout.read_until(b"\n")), outcome


def calls(command, framing, visit, methods=None):
    """Run visit(client), and say what the server has found in the end."""
    async def main():
        with flowcoro.timeout(PATIENCE):
            async with program(*command) as (said, outcome):
                async with await RpcClient.connect("127.0.0.1", said["port"], framing=framing, methods=methods) as client:
                    await visit(client)
                return await outcome()

    return run(main)


async def failure(coro):
    """(code, message, data) of the error that a call is answered with."""
    with pytest.raises(RpcError) as caught:
        await coro
    return caught.value.code, caught.value.message, caught.value.data


class Client(Methods):
    """What the client of these tests is called with, and notified of."""

    def __init__(self):
        super().__init__()
        self.progress, self.asked, self.begun, self.cancelled = [], [], flowcoro.Event(), 0
        self.method("answer")(self.answer)
        self.method("begun")(self.begun.set)
        self.method("$/progress")(self.hear)
        self.method("forever")(self.forever)

    async def answer(self, question: str = ""):
        self.asked.append(question)
        return question + "? Yes."

    async def hear(self, token: str, value: int):
        self.progress.append((token, value))

    async def forever(self):
        try:
            await flowcoro.sleep(math.inf)
        finally:
            self.cancelled += 1


def test_vscode_jsonrpc_is_called_and_calls(node):
    async def visit(client):
        assert await client.call("add", 1, 2) == 3
        assert await client.call("greet", name="größe 𝄞") == "Hello, größe 𝄞"
        assert await client.call("nothing") is None
        assert await failure(client.call("divide")) == (7, "by zero", [1, 0])
        assert (await failure(client.call("unheard-of")))[0] == -32601
        results = await flowcoro.when_all(*(client.call("add", number, 1) for number in range(50)))
        assert results == [*range(1, 51)]
        async with flowcoro.TaskGroup() as group:
            group.spawn(client.call("slow"))
            await methods.begun.wait()
            group.cancel()
        assert await client.call("ask", "Tea") == "You said: Tea? Yes."
        assert (await client.call("give_up"))["code"] == -32800
        assert await client.call("work", steps=3, workDoneToken="a token") == 3
        await client.notify("note", "the last word")
        await client.notify("unheard-of")
        assert await client.call("nothing") is None

    methods = Client()
    found = calls([*node, "vscode-server"], ContentLength, visit, methods)
    assert found == {"notes": ["the last word"], "unheard": 1, "cancelled": True}
    assert methods.progress == [("a token", 1), ("a token", 2), ("a token", 3)]
    assert methods.asked == ["Tea", ""] and methods.cancelled == 1


def test_jayson_is_called(node):
    async def visit(client):
        assert await client.call("add", 1, 2) == 3
        assert await client.call("greet", name="größe 𝄞") == "Hello, größe 𝄞"
        assert await failure(client.call("divide")) == (7, "by zero", [1, 0])
        assert (await failure(client.call("unheard-of")))[0] == -32601
        order = []

        async def ask(method, *args):
            order.append(await client.call(method, *args))

        await flowcoro.when_all(ask("later", "the last"), ask("add", "the ", "first"))
        assert order == ["the first", "the last"]
        await client.notify("note", "a word")
        assert await client.call("noted") == ["a word"]

    calls([*node, "jayson-server"], Newline, visit)


@of("pylsp_jsonrpc", "python-lsp-jsonrpc")
def test_python_lsp_jsonrpc_is_called_and_calls(python):
    async def visit(client):
        assert await client.call("add", 1, 2) == 3
        assert await client.call("greet", name="größe 𝄞") == "Hello, größe 𝄞"
        assert await client.call("nothing") is None
        assert await failure(client.call("divide", 1, 0)) == (7, "by zero", [1, 0])
        assert (await failure(client.call("unheard-of")))[0] == -32601
        assert await client.call("ask", "Tea") == "You said: Tea? Yes."
        await client.notify("note", "the last word")

    methods = Client()
    assert calls([*python, "lsp-server"], ContentLength, visit, methods) == {"notes": ["the last word"]}
    assert methods.asked == ["Tea"]


# ---- OpenRPC ---------------------------------------------------------------------------------------------------

@of("jsonschema", "jsonschema")
def test_jsonschema_finds_nothing_wrong_with_what_the_server_says_of_itself(python):
    async def main():
        document = json.dumps(shop().discover()).encode()
        return await found_by(*python, "openrpc", str(FOREIGN / "openrpc_meta_schema.json"), input=document)

    assert run(main) == []


# ---- by hand ---------------------------------------------------------------------------------------------------

@needs("nc")
def test_a_line_of_nc_is_answered():
    async def main():
        service = Service()
        listening = await service.server.start_tcp_server(0)
        lines = (b'{"jsonrpc": "2.0", "method": "greet", "params": ["Ada"], "id": 1}\n' b"what?\n"
                 b'{"jsonrpc": "2.0", "method": "note", "params": ["a word"]}\r\n\n')
        done = await run_process(["nc", "-N", "127.0.0.1", str(listening.local[1])], input=lines, timeout=PATIENCE, group=True)
        await service.server.close()
        return [*map(json.loads, done.stdout.splitlines())], service.notes

    answers, notes = run(main)
    assert answers == [{"jsonrpc": "2.0", "id": 1, "result": "Hello, Ada"},
                       {"jsonrpc": "2.0", "id": None, "error": {"code": -32700, "message": "Parse error"}}]
    assert notes == ["a word"]


@needs("curl")
def test_curl_posts_a_call_and_a_batch():
    async def main():
        service, app = Service(), HttpServer()

        @app.post("/rpc")
        async def post(request):
            answer = await service.server.answer(await request.body())
            return Response(204) if answer is None else Response(200, answer, media_type="application/json")

        async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve())
            said = []
            for data in ('{"jsonrpc": "2.0", "method": "greet", "params": {"name": "Ada"}, "id": "x"}',
                         '[{"jsonrpc": "2.0", "method": "note", "params": ["a word"]}, 1]',
                         '{"jsonrpc": "2.0", "method": "note", "params": ["another"]}'):
                done = await run_process(["curl", "-q", "-sS", "--noproxy", "*", "-w", " %{http_code}", "-H",
                                          "Content-Type: application/json", "-d", data, server.url + "/rpc"],
                                         timeout=PATIENCE, group=True)
                answer, _, status = done.stdout.decode().rpartition(" ")
                said.append((answer and json.loads(answer), status))
            server.close()
        return said, service.notes

    said, notes = run(main)
    assert said == [({"jsonrpc": "2.0", "id": "x", "result": "Hello, Ada"}, "200"),
                    ([{"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "Invalid Request"}}], "200"),
                    ("", "204")]
    assert notes == ["a word", "another"]
