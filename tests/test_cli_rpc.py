"""`python -m flowcoro rpc`: what it calls and prints, and what its exit status says."""

import contextlib
import json
import queue
import socket
import threading

import pytest

import flowcoro
import flowcoro_cli
import flowcoro_net
import flowcoro_rpc
from test_cli import PATIENCE, cli  # noqa: F401  (a fixture)
from test_net_tls import certificates  # noqa: F401  (a fixture)


def make_server():
    server = flowcoro_rpc.RpcServer()
    server.noted, server.heard = [], flowcoro.Event()

    @server.method
    async def add(a: int, b: int = 1) -> int:
        """The sum of two numbers.

        And more about it.
        """
        return a + b

    @server.method
    async def give_back(value):
        return value

    @server.method
    async def find(words: list[str], exact: bool | None = None) -> dict[str, float]:
        return {word: 1.5 for word in words}

    @server.method
    async def note(text: str):
        server.noted.append(text)
        server.heard.set()

    @server.method
    async def refuse(why: str):
        raise flowcoro_rpc.RpcError(7, "no\x1b[31m", {"why": why})

    @server.method
    async def never():
        await flowcoro.sleep(1000)

    @server.method
    async def count(to: int):
        for number in range(1, to + 1):
            yield {"number": number}

    return server


@contextlib.contextmanager
def serving(start):
    """`await start(server)` in a kernel of its own, in a thread: (the server, what start() gave)."""
    async def main():
        server, over = make_server(), flowcoro.Promise()
        started.put((server, over, await start(server)))
        await over
        await server.close()

    def serve():
        try:
            flowcoro.run(main())
        finally:
            started.put(None)           # should it have failed before

    started = queue.SimpleQueue()
    thread = threading.Thread(target=serve)
    thread.start()
    server, over, found = started.get(timeout=PATIENCE)
    try:
        yield server, found
    finally:
        over.set_result(None)
        thread.join()


@pytest.fixture(scope="module")
def served():
    """(the server, "HOST:PORT")."""
    async def start(server):
        return "127.0.0.1:%d" % (await server.start_tcp_server(0)).local[1]

    with serving(start) as found:
        yield found


@pytest.fixture
def rpc(cli, served):  # noqa: F811
    """rpc("add", 1, 2) -> (exit status, stdout, stderr)."""
    return lambda *words: cli("rpc", served[1], *words)


def test_without_a_method_it_lists_what_there_is(rpc):
    status, out, err = rpc()
    assert (status, err) == (0, "")
    assert "add(a: integer, b?: integer) -> integer\n    The sum of two numbers.\n" in out and "And more" not in out
    assert "find(words: [string], exact?: boolean | null) -> object\n" in out
    assert "give_back(value: any)" in out


def test_a_result_is_printed_as_json(rpc):
    assert rpc("add", 1, 2) == (0, "3\n", "")
    assert rpc("find", '["ä", "b"]') == (0, '{\n  "ä": 1.5,\n  "b": 1.5\n}\n', "")
    assert rpc("note", "x") == (0, "null\n", "")


@pytest.mark.parametrize(("argument", "value"), [
    ("3", 3), ('"3"', "3"), ("three", "three"), ("-1.5", -1.5), ("null", None), ("true", True), ('{"a": [1]}', {"a": [1]}),
    ("", ""), ("NaN", "NaN"), ("1 2", "1 2"), ("größe", "größe"), ("a b=c", "a b=c"), ('"a=b"', "a=b"), ("=x", "=x")])
def test_an_argument_is_json_or_else_a_text(rpc, argument, value):
    status, out, _ = rpc("give_back", argument)
    assert status == 0 and json.loads(out) == value


def test_arguments_may_have_names(rpc):
    assert rpc("add", "a=1", "b=2") == (0, "3\n", "")
    assert rpc("add", "b=2", "--timeout", 20, "a=1") == (0, "3\n", "")
    assert json.loads(rpc("give_back", "value=a=b")[1]) == "a=b"


def test_what_a_terminal_would_obey_is_escaped(rpc):
    assert rpc("give_back", '"\\u001b[31m\\u009b1m\\u007f"')[1] == '"\\u001b[31m\\u009b1m\\u007f"\n'


@pytest.mark.parametrize(("words", "said"), [
    (["add", "a=1", "2"], "give a name to all arguments, or to none"), (["add", "a=1", "a=2"], "a= is there twice"),
    (["give_back", '{"a": 1'], "is no JSON"), (["give_back", '{"a": 1, "a": 2}'], "is no JSON"), (["--notify"], "need a METHOD"),
    (["add", "--timeout", "0"], "more than 0 seconds"), (["add", "--timeout", "nan"], "more than 0 seconds"),
    (["add", "--notify", "--stream"], "for many"), (["add", "-k"], "are for --tls"),
    (["add", "--tls", "--cacert", "/nowhere"], "--cacert /nowhere: "), (["--framing", "smoke"], "invalid choice")])
def test_a_command_line_that_cannot_be_obeyed(rpc, words, said):
    status, out, err = rpc(*words)
    assert (status, out) == (2, "") and said in err and "Traceback" not in err


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:0", "localhost:70000", "::1:80", "localhost:x"])
def test_an_address_that_is_none(cli, address):  # noqa: F811
    status, _, err = cli("rpc", address, "add")
    assert status == 2 and address in err
    assert cli("rpc")[0] == 2


def test_arguments_that_are_more_than_a_message_may_have(rpc):
    status, out, err = rpc("give_back", "x" * 2**20)
    assert (status, out) == (2, "") and "max_message" in err and "Traceback" not in err


def test_an_address_without_a_host_is_this_machine(cli, served):  # noqa: F811
    assert cli("rpc", ":" + served[1].rpartition(":")[2], "add", 1)[:2] == (0, "2\n")


def test_an_error_is_told_with_its_code_and_data(rpc, served):
    status, out, err = rpc("refuse", "never")
    assert (status, out) == (22, "")
    assert err == f'flowcoro: {served[1]} refuse: no\\x1b[31m (7): {{"why": "never"}}\n'
    status, _, err = rpc("unheard-of")
    assert status == 22 and "Method not found (-32601)" in err
    status, _, err = rpc("add", "x")
    assert status == 22 and "(-32602)" in err and "an integer" in err


def test_a_notification_is_sent_and_nothing_printed(rpc, served):
    assert rpc("refuse", "why", "--notify") == rpc("note", "a word", "--notify") == (0, "", "")
    flowcoro.run(wait_for(served[0]))
    assert "a word" in served[0].noted


async def wait_for(server):
    with flowcoro.timeout(PATIENCE):
        while "a word" not in server.noted:
            await flowcoro.sleep(0.001)


def test_items_of_a_stream_are_lines(rpc):
    assert rpc("count", 3, "--stream") == (0, '{"number": 1}\n{"number": 2}\n{"number": 3}\n', "")


def test_what_is_no_stream_is_told(rpc):
    status, out, err = rpc("add", 1, 2, "--stream")
    assert (status, out) == (8, "") and "no stream and no list" in err


def test_time_is_bounded(rpc):
    status, _, err = rpc("never", "--timeout", 0.05)
    assert status == 28 and "not done within --timeout 0.05 seconds" in err


def test_who_is_not_there(cli):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = "127.0.0.1:%d" % sock.getsockname()[1]
    status, _, err = cli("rpc", address, "add", 1)
    assert status == 7 and address in err and "Traceback" not in err
    status, _, err = cli("rpc", "no-such-host.invalid:1", "add", 1)
    assert status == 6 and "no-such-host.invalid" in err
    assert cli("rpc", "--unix", "/nowhere/at/all", "add", 1)[0] == 7


@contextlib.contextmanager
def answering(answer):
    """A server that reads a line, sends `answer` and closes: its "HOST:PORT"."""
    def serve():
        sock, _ = listener.accept()
        with sock, sock.makefile("rb") as lines:
            lines.readline()
            sock.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield "127.0.0.1:%d" % listener.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(("answer", "status", "said"), [
    (b"", 56, "add: "), (b"x" * 2_000_000, 8, "max_message"),
    (b"HTTP/1.0 400 Bad Request\r\n\r\n", 8, "no JSON-RPC"), (b"SSH-2.0-OpenSSH_9.2\r\n", 8, "no JSON-RPC"),
    (b'{"jsonrpc": "2.0", "id": 1, "error": {"code": -32601, "message": "Method not found"}}\n', 22, "Method not found")])
def test_a_server_that_does_not_answer_as_it_should(cli, answer, status, said):  # noqa: F811
    with answering(answer) as address:
        got, out, err = cli("rpc", address, "add", 1)
    assert (got, out) == (status, "") and said in err and "Traceback" not in err


def test_a_server_that_does_not_say_what_its_methods_are(cli):  # noqa: F811
    with answering(b'{"jsonrpc": "2.0", "id": 1, "error": {"code": -32601, "message": "Method not found"}}\n') as address:
        status, _, err = cli("rpc", address)
    assert status == 22 and "there is no rpc.discover" in err and "name one" in err
    for result in ("null", '{"methods": 3}'):
        with answering(b'{"jsonrpc": "2.0", "id": 1, "result": %s}\n' % result.encode()) as address:
            status, _, err = cli("rpc", address)
        assert status == 8 and "no OpenRPC document" in err


def test_a_document_of_another_server_is_listed_as_far_as_it_can_be(cli):  # noqa: F811
    methods = [7, {"name": "a\x1b[1m"}, {"name": "b", "params": [{"name": "x", "schema": {"type": ["string", "null"]}}, 3],
                                         "result": {"schema": {"$ref": "#/components/schemas/Thing"}}, "summary": "Of b."},
               {"name": "c", "params": [{"name": "y", "required": True, "schema": {"enum": ["on", "off"]}}], "result": 3},
               {"name": "d", "params": 5}, {"name": "e", "params": None, "summary": 7}]
    answer = json.dumps({"jsonrpc": "2.0", "id": 1, "result": {"methods": methods}}).encode() + b"\n"
    with answering(answer) as address:
        status, out, _ = cli("rpc", address)
    assert status == 0
    assert out == 'a\\x1b[1m()\nb(x?: string | null) -> Thing\n    Of b.\nc(y: "on" | "off")\nd()\ne()\n    7\n'


@pytest.mark.parametrize("framing", flowcoro_cli.FRAMINGS)
def test_every_framing(cli, framing):  # noqa: F811
    async def start(server):
        kind = getattr(flowcoro_rpc, flowcoro_cli.FRAMINGS[framing])
        return "127.0.0.1:%d" % (await server.start_tcp_server(0, framing=kind)).local[1]

    with serving(start) as (_, address):
        assert cli("rpc", address, "--framing", framing, "add", 1, 2) == (0, "3\n", "")


def test_a_unix_socket(cli, tmp_path):  # noqa: F811
    path = tmp_path / "socket"
    with serving(lambda server: server.start_unix_server(str(path))):
        assert cli("rpc", "--unix", path, "add", 1, 2) == (0, "3\n", "")
        assert "add(" in cli("rpc", "--unix", path)[1]


def test_tls(cli, certificates):  # noqa: F811
    async def start(server):
        listening = await server.start_tcp_server(0, tls=flowcoro_net.server_tls(*certificates.good))
        return "127.0.0.1:%d" % listening.local[1]

    with serving(start) as (_, address):
        assert cli("rpc", address, "add", 1, 2, "--tls", "--cacert", certificates.ca) == (0, "3\n", "")
        assert cli("rpc", address, "add", 1, 2, "--tls", "-k") == (0, "3\n", "")
        status, _, err = cli("rpc", address, "add", 1, 2, "--tls")
        assert status == 60 and "Traceback" not in err
    with answering(b"what?\n" * 100) as address:
        assert cli("rpc", address, "add", "--tls")[0] == 35
