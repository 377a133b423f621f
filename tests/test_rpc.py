"""flowcoro_rpc: codec, methods, peers, server, client. In memory and on the virtual clock, but for the last section."""

import contextlib
import contextvars
import dataclasses
import enum
import functools
import itertools
import json
import math
import os
import random
import socket
import struct
import subprocess
import sys
import typing

import pytest

import flowcoro
import flowcoro_net
import flowcoro_rpc
import flowcoro_websocket
from flowcoro_http import HttpServer
from flowcoro_http import Response as HttpResponse
from flowcoro_rpc import (Backoff, ConnectionLost, Context, DeadlineExceeded, Invalid, InvalidParams, InvalidRequest,
                          MethodNotFound, Methods, Notification, Peer, Request, Response, RpcClient, RpcError, RpcPool, RpcServer,
                          encode_error, encode_request, encode_result, read_message)
from flowcoro_testing import assert_checkpoints, memory_socket_pair, run_in_kernel, wait_all_tasks_parked
from test_net_tls import OPENSSL, certificates  # noqa: F401  (a fixture)

SECRET = "the password is swordfish"


def example_server():
    """What the examples of the specification call."""
    server = RpcServer()
    server.method(lambda minuend, subtrahend: minuend - subtrahend, name="subtract")
    for name in ("update", "notify_hello", "notify_sum"):
        server.method(lambda *numbers: None, name=name)
    server.method(lambda *numbers: sum(numbers), name="sum")
    server.method(lambda: ["hello", 5], name="get_data")
    return server


@contextlib.asynccontextmanager
async def raw_connection(server, framing=flowcoro_rpc.Newline, **options):
    """The other end of a connection that a server serves, as a Socket."""
    ours, theirs = memory_socket_pair(flowcoro_net.Socket, **options)
    async with flowcoro.TaskGroup() as group:
        task = group.spawn(server.serve_connection(theirs, framing=framing))
        async with ours:
            yield ours
        with flowcoro.timeout(100):
            await task


async def tell(sock, value):
    await sock.write((value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n")


async def hear(sock):
    return json.loads(await sock.read_until(b"\n", limit=2**24))


async def ask(sock, value):
    await tell(sock, value)
    return await hear(sock)


def request(method, *params, id=1, **more):
    return {"jsonrpc": "2.0", "method": method, "params": list(params), "id": id, **more}


class Memory:
    """What RpcClient.connect() connects to here: a server in memory, which can be made to fail."""

    def __init__(self, server, framing=flowcoro_rpc.Newline):
        self.server, self.framing, self.connections, self.refusals = server, framing, [], 0

    async def open(self, *where, **options):
        await flowcoro.checkpoint()
        if self.refusals:
            self.refusals -= 1
            raise flowcoro_net.BrokenError(111, "connection refused")
        ours, theirs = memory_socket_pair(flowcoro_net.Socket)
        self.connections.append((ours, theirs))
        flowcoro.spawn(self.serve(theirs))
        return ours

    async def serve(self, sock):
        async with sock:
            await self.server.serve_connection(sock, framing=self.framing)

    def cut(self):
        """The newest connection is lost."""
        self.connections[-1][1].close_nowait()


@pytest.fixture
def connect(monkeypatch):
    """connect(server, …): an RpcClient of a server in memory; `client.memory` is how."""
    async def connect(server, *, framing=flowcoro_rpc.Newline, **options):
        memory = Memory(server, framing)
        monkeypatch.setattr(flowcoro_net.Socket, "connect", memory.open)
        client = await RpcClient.connect("memory", 1, framing=framing, **options)
        client.memory = memory
        return client
    return connect


def in_kernel(test):
    """run_in_kernel for tests that take fixtures, with a limit of virtual seconds."""
    return run_in_kernel(test, timeout=10_000)


# ---- codec: the examples of the specification, section 7 -----------------------------------------------------

EXAMPLES = [
    ("positional", '{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}',
     '{"jsonrpc": "2.0", "result": 19, "id": 1}'),
    ("positional, turned", '{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}',
     '{"jsonrpc": "2.0", "result": -19, "id": 2}'),
    ("named", '{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}',
     '{"jsonrpc": "2.0", "result": 19, "id": 3}'),
    ("named, turned", '{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}',
     '{"jsonrpc": "2.0", "result": 19, "id": 4}'),
    ("notification", '{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', None),
    ("notification of no method", '{"jsonrpc": "2.0", "method": "foobar"}', None),
    ("no such method", '{"jsonrpc": "2.0", "method": "foobar", "id": "1"}',
     '{"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "1"}'),
    ("no JSON", '{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]',
     '{"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": null}'),
    ("no request", '{"jsonrpc": "2.0", "method": 1, "params": "bar"}',
     '{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}'),
    ("batch, no JSON", '[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"}, {"jsonrpc": "2.0", "method"]',
     '{"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": null}'),
    ("empty batch", "[]", '{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}'),
    ("batch of one that is none", "[1]",
     '[{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}]'),
    ("batch of those that are none", "[1,2,3]",
     '[{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},'
     '{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},'
     '{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}]'),
    ("batch", """[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
        {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
        {"foo": "boo"},
        {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
        {"jsonrpc": "2.0", "method": "get_data", "id": "9"} ]""",
     """[{"jsonrpc": "2.0", "result": 7, "id": "1"},
        {"jsonrpc": "2.0", "result": 19, "id": "2"},
        {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
        {"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "5"},
        {"jsonrpc": "2.0", "result": ["hello", 5], "id": "9"}]"""),
    ("batch of notifications", """[{"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}]""", None),
]


def compact(text):
    """The same members in the same order, without the whitespace between them."""
    return text and json.dumps(json.loads(text), separators=(",", ":")).encode()


@pytest.mark.parametrize("name, sent, answer", EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
@in_kernel
async def test_the_examples_of_the_specification_are_answered_byte_for_byte(name, sent, answer):
    assert await example_server().answer(sent.encode()) == compact(answer)
    async with raw_connection(example_server()) as sock:
        sent = sent.replace("\n", " ").encode()
        await tell(sock, sent)
        await tell(sock, request("subtract", 2, 1, id="after"))
        expected = [compact(answer)] * (answer is not None) + [b'{"jsonrpc":"2.0","result":1,"id":"after"}']
        for one in expected:
            assert await sock.read_until(b"\n") == one + b"\n"


# ---- codec: what is no message --------------------------------------------------------------------------------

@pytest.mark.parametrize("message, number", [
    ('{"method":"a","id":1}', 1), ('{"jsonrpc":2.0,"method":"a","id":1}', 1), ('{"jsonrpc":"1.0","method":"a","id":1}', 1),
    ('{"jsonrpc":"2.0","id":1}', 1), ('{"jsonrpc":"2.0","method":null,"id":1}', 1),
    ('{"jsonrpc":"2.0","method":["a"],"id":1}', 1),
    ('{"jsonrpc":"2.0","method":"a","params":"b","id":1}', 1), ('{"jsonrpc":"2.0","method":"a","params":null,"id":1}', 1),
    ('{"jsonrpc":"2.0","method":"a","params":1,"id":"x"}', "x"), ('{"jsonrpc":"2.0","method":"a","params":false}', None),
    ('{"jsonrpc":"2.0","method":"a","id":true}', None), ('{"jsonrpc":"2.0","method":"a","id":[1]}', None),
    ('{"jsonrpc":"2.0","method":"a","id":{}}', None), ('{"jsonrpc":"2.0","method":"a","result":1,"id":1}', 1), ("{}", None),
    ('"a"', None), ("1", None), ("null", None), ("true", None), ("[]", None)])
def test_what_is_no_request_is_invalid_and_keeps_an_id_that_is_one(message, number):
    event = read_message(message)
    assert event.__class__ is Invalid and (event.id, event.code) == (number, -32600) and event.why


@pytest.mark.parametrize("message", [
    "", "{", "nul", '{"jsonrpc":"2.0","method":"a","id":NaN}', '{"jsonrpc":"2.0","method":"a","params":[Infinity]}',
    '{"jsonrpc":"2.0","method":"a","params":[-Infinity],"id":1}', '{"jsonrpc":"2.0","method":"a","params":[1e999],"id":1}',
    '{"jsonrpc":"2.0","method":"a","id":1,"id":2}', '{"jsonrpc":"2.0","method":"a","params":{"b":1,"b":2},"id":1}',
    b'{"jsonrpc":"2.0","method":"\xff","id":1}', '{"jsonrpc":"2.0","method":"\\ud800","id":1}', "{'jsonrpc':'2.0'}",
    '{"jsonrpc":"2.0","method":"a","id":1}}', '{"jsonrpc":"2.0","method":"a","id":1,}', "[" * 100_000,
    '{"jsonrpc":"2.0","method":"a","params":' + "[" * 65 + "]" * 65 + "}"])
def test_what_is_no_json_is_a_parse_error(message):
    assert read_message(message)[:2] == (None, -32700)


@pytest.mark.parametrize("message", [
    '{"jsonrpc":"2.0","result":1}', '{"jsonrpc":"2.0","result":1,"id":true}', '{"jsonrpc":"2.0","result":1,"id":[]}',
    '{"result":1,"id":1}', '{"jsonrpc":"2.0","result":1,"error":{"code":1,"message":"a"},"id":1}',
    '{"jsonrpc":"2.0","error":null,"id":1}', '{"jsonrpc":"2.0","error":"a","id":1}',
    '{"jsonrpc":"2.0","error":{"code":1},"id":1}',
    '{"jsonrpc":"2.0","error":{"code":"1","message":"a"},"id":1}', '{"jsonrpc":"2.0","error":{"code":1,"message":2},"id":1}',
    '{"jsonrpc":"2.0","error":{"code":true,"message":"a"},"id":1}',
    '{"jsonrpc":"2.0","error":{"code":1.5,"message":"a"},"id":1}'])
def test_an_answer_that_is_none_is_not_answered(message):
    event = read_message(message)
    assert event.__class__ is Invalid and event.code is None and event.why


def test_messages_are_read():
    assert read_message('{"jsonrpc":"2.0","method":"a","id":null}')[:3] == ("a", None, None)
    assert read_message('{"jsonrpc":"2.0","method":"a","id":1.5,"params":{}}')[:3] == ("a", {}, 1.5)
    assert read_message(b'{"jsonrpc":"2.0","method":"a","params":[]}') == Notification(
        "a", [], {"jsonrpc": "2.0", "method": "a", "params": []})
    assert read_message('{"jsonrpc":"2.0","result":null,"id":"x"}') == Response("x", None, None)
    assert read_message('{"jsonrpc":"2.0","error":{"code":-1,"message":"a"},"id":null}').error == {"code": -1, "message": "a"}
    batch = read_message('[{"jsonrpc":"2.0","method":"a","id":1},{"jsonrpc":"2.0","result":1,"id":1},2]')
    assert [member.__class__ for member in batch.members] == [Request, Response, Invalid]


def test_an_option_that_there_is_none_of_is_named_with_those_that_there_are():
    with pytest.raises(TypeError) as caught:
        RpcServer(max_mesage=3)
    assert str(caught.value) == ("RpcServer() has no option max_mesage; limits are max_message, max_depth, max_batch, "
                                 "max_concurrent, max_waiting, deadline, timeout, end_grace")


def test_limits_of_a_message():
    member = {"jsonrpc": "2.0", "method": "a"}
    assert len(read_message(json.dumps([member] * 1000)).members) == 1000
    assert "max_batch=1000" in read_message(json.dumps([member] * 1001)).why
    assert read_message(json.dumps([member] * 3), max_batch=2).code == -32600
    assert read_message(json.dumps({**member, "params": [[[]]]}), max_depth=4).__class__ is Notification
    assert read_message(json.dumps({**member, "params": [[[]]]}), max_depth=3).code == -32700


def test_messages_are_made_as_the_specification_writes_them():
    assert encode_request("a", [1], 2) == b'{"jsonrpc":"2.0","method":"a","params":[1],"id":2}'
    assert encode_request("é\n", None, "x") == '{"jsonrpc":"2.0","method":"é\\n","id":"x"}'.encode()
    assert encode_request("a", {"b": None}) == b'{"jsonrpc":"2.0","method":"a","params":{"b":null}}'
    assert encode_request("a", None, None) == b'{"jsonrpc":"2.0","method":"a","id":null}'
    assert encode_result(1.5, None) == b'{"jsonrpc":"2.0","result":null,"id":1.5}'
    assert encode_error(None, -1, "a", [1]) == b'{"jsonrpc":"2.0","error":{"code":-1,"message":"a","data":[1]},"id":null}'
    for wrong in (math.nan, math.inf, [-math.inf]):
        with pytest.raises(ValueError):
            encode_result(1, wrong)
    with pytest.raises(TypeError):
        encode_request("a", [object()], 1)


@pytest.mark.parametrize("seed", range(20))
def test_what_was_made_is_read_as_the_same(seed):
    draw = random.Random(f"codec {seed}")
    for _ in range(20):
        method = "".join(draw.choice('a."\\é\u2028\n🙂') for _ in range(draw.randrange(6)))
        params = draw.choice([None, [], {}, [1, "x"], {"a": [None, True]}])
        number = draw.choice([None, 0, -5, 2**70, "", "7", 1.25])
        assert read_message(encode_request(method, params, number))[:3] == (method, params, number)
        assert read_message(encode_result(number, params)) == Response(number, params, None)
        error = {"code": draw.randrange(-40_000, 40_000), "message": method}
        assert read_message(encode_error(number, **error)) == Response(number, None, error)


# ---- methods --------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Colour(enum.Enum):
    RED = "red"


def methods_to_bind():
    server = RpcServer()
    server.method(lambda a, b=2, *rest, c=3, **more: [a, b, list(rest), c, more], name="all")
    server.method(lambda a, /, b: [a, b], name="places")
    server.method(lambda *, a, b=2: [a, b], name="names")

    @server.method
    def typed(point: Point, colour: Colour = Colour.RED, count: typing.Annotated[int, "how many"] = 1) -> Point:
        return Point(point.x * count, point.y)

    @server.method("with.peer")
    def with_peer(peer, a):
        return [peer.headers, a]

    @server.method
    def context_by_annotation(who: Context, a: int):
        return [who.method, who.id, a]

    @server.method
    async def peer_by_annotation(who: Peer, *, a=1):
        return [type(who).__name__, a]

    return server


async def outcome(server, method, params=None):
    message = {"jsonrpc": "2.0", "method": method, "id": 1}
    answer = json.loads(await server.answer(json.dumps(message if params is None else {**message, "params": params}).encode()))
    return answer.get("result", answer.get("error"))


@pytest.mark.parametrize("method, params, result", [
    ("all", [1], [1, 2, [], 3, {}]), ("all", [1, 5, 6, 7], [1, 5, [6, 7], 3, {}]),
    ("all", {"a": 1, "c": 2, "z": 9}, [1, 2, [], 2, {"z": 9}]), ("places", [1, 2], [1, 2]), ("names", {"a": 1}, [1, 2]),
    ("typed", [{"x": 2}], {"x": 2, "y": 0}), ("typed", {"point": {"x": 2, "y": 1}, "count": 3}, {"x": 6, "y": 1}),
    ("with.peer", [1], [{}, 1]), ("context_by_annotation", {"a": 5}, ["context_by_annotation", 1, 5]),
    ("peer_by_annotation", {"a": 5}, ["Peer", 5]), ("peer_by_annotation", None, ["Peer", 1])])
@in_kernel
async def test_parameters_are_bound_to_the_signature(method, params, result):
    assert await outcome(methods_to_bind(), method, params) == result


@pytest.mark.parametrize("method, params, path, expected", [
    ("all", [], "/a", "anything"), ("all", None, "/a", "anything"), ("all", {"b": 1}, "/a", "anything"),
    ("places", [1], "/b", "anything"), ("places", [1, 2, 3], "/2", "no parameter in this place"),
    ("places", {"a": 1, "b": 2}, "/a", "no parameter of this name"), ("names", [1], "/0", "no parameter in this place"),
    ("names", {}, "/a", "anything"), ("names", {"a": 1, "c": 1}, "/c", "no parameter of this name"),
    ("typed", [{"x": "2"}], "/0/x", "an integer"), ("typed", {"point": {}}, "/point/x", "an integer"),
    ("typed", [{"x": 1}, "blue"], "/1", '"red"'), ("typed", [{"x": 1}, "red", True], "/2", "an integer"),
    ("with.peer", {"peer": 1, "a": 1}, "/peer", "no parameter of this name"), ("with.peer", [1, 2], "/1", "no parameter")])
@in_kernel
async def test_parameters_that_do_not_fit_are_invalid_and_the_answer_says_which(method, params, path, expected):
    error = await outcome(methods_to_bind(), method, params)
    assert (error["code"], error["message"]) == (-32602, "Invalid params")
    assert path in [each["path"] for each in error["data"]]
    assert any(expected in each["expected"] for each in error["data"])


@in_kernel
async def test_a_type_error_of_the_handler_is_an_internal_error_which_tells_nothing(monkeypatch):
    server, reports = RpcServer(), []
    monkeypatch.setattr("sys.unraisablehook", reports.append)

    @server.method
    def fails(a):
        raise TypeError(SECRET)

    @server.method
    async def fails_later(a):
        await flowcoro.checkpoint()
        raise ValueError(SECRET)

    @server.method
    def unspeakable():
        return object()

    @server.method
    def not_a_number():
        return [math.nan]

    @server.method
    def fails_with_what_has_no_json():
        raise RpcError(1, "a", object())

    for method, params in (("fails", [1]), ("fails_later", [1]), ("unspeakable", []), ("not_a_number", []),
                           ("fails_with_what_has_no_json", [])):
        error = await outcome(server, method, params)
        assert (error["code"], error["message"]) == (-32603, "Internal error") and SECRET not in str(error)
        assert error["data"]["reference"] in reports[-1].err_msg
    assert len(reports) == 5 and str(reports[0].exc_value) == SECRET
    assert (await outcome(server, "fails", []))["code"] == -32602


@in_kernel
async def test_a_handler_answers_with_an_error_of_its_own():
    server = RpcServer()

    @server.method
    async def refuse():
        raise RpcError(402, "Payment required", {"price": 1})

    assert await outcome(server, "refuse") == {"code": 402, "message": "Payment required", "data": {"price": 1}}


def test_names_of_methods():
    server = RpcServer()
    with pytest.raises(ValueError, match="reserved"):
        server.method(lambda: 1, name="rpc.mine")
    server.method(lambda: 1, name="a")
    with pytest.raises(ValueError, match="there already"):
        server.method(lambda: 1, name="a")
    for name in "$/stream", "$/cancelRequest":
        with pytest.raises(ValueError, match="belong to the protocol"):
            server.method(lambda: 1, name=name)
    with pytest.raises(TypeError, match="give a function"):
        server.middleware(5)
    with pytest.raises(TypeError, match="give a function"):
        server.method(5)
    with pytest.raises(TypeError, match="give name="):
        server.method(functools.partial(max, 1))
    with pytest.raises(TypeError, match="no JSON is made"):
        @server.method
        def wrong(a: set):
            pass
    with pytest.raises(TypeError, match="nobody can call it"):
        server.method(lambda a, /, *, b: 1, name="one way or the other")
    with pytest.raises(TypeError, match="Nowhere"):
        @server.method
        def lost(a: "Nowhere"):     # noqa: F821
            pass


@in_kernel
async def test_objects_are_namespaces():
    class Calculator:
        """Adds."""

        def __init__(self, start):
            self.start = start

        def add(self, a: int):
            return self.start + a

        async def later(self):
            await flowcoro.checkpoint()
            return "later"

        def _hidden(self):
            raise AssertionError

        @property
        def asked(self):
            raise AssertionError

        @staticmethod
        def nothing():
            return 0

    server = RpcServer()
    server.add(Calculator(5), prefix="math.")
    with pytest.raises(TypeError, match="add needs an object"):
        server.add(Calculator)
    assert await outcome(server, "math.nothing") == 0
    assert await outcome(server, "math.add", [1]) == 6
    assert await outcome(server, "math.later") == "later"
    assert (await outcome(server, "math._hidden"))["code"] == (await outcome(server, "math.start"))["code"] == -32601


@in_kernel
async def test_reserved_names_are_not_found_but_discover():
    for method in ("rpc.", "rpc.other"):
        assert (await outcome(RpcServer(), method))["code"] == -32601
    assert (await outcome(RpcServer(discover=False), "rpc.discover"))["code"] == -32601
    assert (await outcome(RpcServer(title="mine"), "rpc.discover"))["info"]["title"] == "mine"


@in_kernel
async def test_discover_describes_methods_from_signatures_and_docstrings():
    server = methods_to_bind()

    @server.method
    async def ticks(symbol: str) -> typing.AsyncIterator[float]:
        """Prices.

        As they come.
        """
        yield 1.0

    document = await outcome(server, "rpc.discover")
    assert document["openrpc"] == "1.3.2" and document["info"] == {"title": "JSON-RPC", "version": "1"}
    methods = {method["name"]: method for method in document["methods"]}
    assert sorted(methods) == ["all", "context_by_annotation", "names", "peer_by_annotation", "places", "ticks", "typed",
                               "with.peer"]
    assert methods["typed"]["params"] == [
        {"name": "point", "required": True, "schema": {"$ref": "#/components/schemas/Point"}},
        {"name": "colour", "required": False, "schema": {"type": "string", "enum": ["red"], "default": "red"}},
        {"name": "count", "required": False, "description": "how many", "schema": {"type": "integer", "default": 1}}]
    assert methods["typed"]["result"] == {"name": "result", "schema": {"$ref": "#/components/schemas/Point"}}
    assert [methods[name]["paramStructure"] for name in ("places", "names", "typed")] == ["by-position", "by-name", "either"]
    assert [one["name"] for one in methods["with.peer"]["params"]] == ["a"]
    assert (methods["ticks"]["summary"], methods["ticks"]["description"]) == ("Prices.", "As they come.")
    assert methods["ticks"]["result"]["schema"] == {"type": "array", "items": {"type": "number"}}
    assert document["components"]["schemas"]["Point"]["required"] == ["x"]


# ---- batches --------------------------------------------------------------------------------------------------

def slow_server(**options):
    server = RpcServer(**options)
    server.running = server.most = 0
    server.done, server.cut = [], []

    @server.method
    async def slow(name, seconds=1):
        server.running += 1
        server.most = max(server.most, server.running)
        try:
            await flowcoro.sleep(seconds)
            server.done.append(name)
            return name
        except BaseException:
            server.cut.append(name)
            raise
        finally:
            server.running -= 1

    @server.method
    async def never(name):
        try:
            await flowcoro.sleep(math.inf)
        finally:
            server.cut.append(name)

    @server.method
    def fast(name=None):
        return name

    @server.method
    async def count(to, seconds=0):
        try:
            for number in range(to):
                if seconds:
                    await flowcoro.sleep(seconds)
                yield number
            server.done.append("count")
        finally:
            server.cut.append("count")

    return server


@in_kernel
async def test_members_of_a_batch_run_at_once_and_are_answered_together_in_their_order():
    server = slow_server()
    async with raw_connection(server) as sock:
        before = flowcoro.now()
        answers = await ask(sock, [request("slow", "a", 3, id=1), request("fast", "b", id=2), request("slow", "c", 1, id=3)])
        assert flowcoro.now() - before == 3
        assert [(answer["id"], answer["result"]) for answer in answers] == [(1, "a"), (2, "b"), (3, "c")]


@in_kernel
async def test_answers_and_requests_in_one_batch_are_judged_each_alone():
    server = slow_server()
    async with raw_connection(server) as sock:
        mixed = [{"jsonrpc": "2.0", "result": 1, "id": 77}, request("fast", 1), {"jsonrpc": "2.0", "result": 1},
                 {"jsonrpc": "2.0", "method": "fast"},
                 {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": 5}}, [], 5]
        answers = await ask(sock, mixed)
        assert [answer.get("result", answer.get("error", {}).get("code")) for answer in answers] == [1, -32600, -32600]
        assert server.peers[0].statistics()["strays"] == 2


@in_kernel
async def test_the_answer_to_a_batch_is_no_larger_than_a_message():
    server = RpcServer(max_message=1000)
    server.method(lambda: "x" * 300, name="large")
    async with raw_connection(server) as sock:
        await tell(sock, [request("large", id=number) for number in range(5)])
        line = await sock.read_until(b"\n", limit=2000)
        codes = [answer.get("error", {}).get("code") for answer in json.loads(line)]
        assert codes == [None, None, -32012, -32012, -32012]
        assert len(await ask(sock, [1] * 10 + [{"jsonrpc": "2.0", "method": "large"}] * 20)) == 10
        assert (await ask(sock, [1] * 11))["error"]["code"] == -32600
        assert (await ask(sock, [request("large", id=number) for number in range(11)]))["id"] is None


@in_kernel
async def test_errors_do_not_make_an_answer_larger_than_a_message_either():
    server = RpcServer(max_message=3000)

    @server.method
    def refuse(size: int):
        raise RpcError(5, "No", "x" * size)

    @server.method
    def typed(*numbers: int):
        pass

    async with raw_connection(server) as sock:
        assert (await ask(sock, request("refuse", 2000)))["error"] == {"code": 5, "message": "No", "data": "x" * 2000}
        assert (await ask(sock, request("refuse", 3000)))["error"] == {"code": 5, "message": "Error"}
        await tell(sock, [request("typed", *"abcdefghi", id=number) for number in range(15)])
        line = await sock.read_until(b"\n", limit=3001)
        errors = [answer["error"] for answer in json.loads(line)]
        assert {error["code"] for error in errors} == {-32602} and "data" in errors[0] and "data" not in errors[-1]


@in_kernel
async def test_a_call_in_a_batch_can_be_cancelled_and_the_others_are_answered():
    server = slow_server()
    async with raw_connection(server) as sock:
        await tell(sock, [request("never", "a", id=1), request("slow", "b", id=2)])
        await tell(sock, {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": 1}})
        answers = await hear(sock)
        assert answers[0]["error"]["code"] == -32800 and answers[1]["result"] == "b"


# ---- a connection of the server -------------------------------------------------------------------------------

@in_kernel
async def test_calls_of_one_connection_run_at_once_and_are_answered_as_they_end():
    server = slow_server()
    async with raw_connection(server) as sock:
        for seconds in (3, 1, 2):
            await tell(sock, request("slow", seconds, seconds, id=seconds))
        assert [(await hear(sock))["result"] for _ in range(3)] == [1, 2, 3]


@in_kernel
async def test_what_is_answered_in_one_turn_leaves_in_one_write():
    server = slow_server()
    async with raw_connection(server) as sock:
        await sock.write(b"".join(json.dumps(request("fast", id=number)).encode() + b"\n" for number in range(20)))
        assert (await sock.read()).count(b"\n") == 20
        await sock.write(b"".join(json.dumps(request("slow", number, id=number)).encode() + b"\n" for number in range(20)))
        assert (await sock.read()).count(b"\n") == 20


@in_kernel
async def test_a_call_that_does_not_wait_has_no_task():
    server, spawned = slow_server(), 0

    @server.method
    async def quick():
        return 1

    async with raw_connection(server) as sock:
        await ask(sock, request("quick"))
        before = flowcoro.statistics()["tasks"]["spawned"]
        for _ in range(50):
            await ask(sock, request("quick"))
            await ask(sock, request("fast"))
        assert flowcoro.statistics()["tasks"]["spawned"] == before


@in_kernel
async def test_no_more_calls_run_at_once_than_are_allowed_and_those_that_wait_begin_in_their_order():
    server = slow_server(max_concurrent=3)
    async with raw_connection(server) as sock:
        for number in range(10):
            await tell(sock, request("slow", number, id=number))
        assert [(await hear(sock))["result"] for _ in range(10)] == list(range(10))
        assert server.most == 3 and flowcoro.now() >= 4


@in_kernel
async def test_no_more_calls_run_in_all_than_are_allowed():
    server = slow_server(max_concurrent_in_all=4)
    async with raw_connection(server) as one, raw_connection(server) as two:
        for number in range(8):
            await tell(one, request("slow", f"one {number}", id=number))
            await tell(two, request("slow", f"two {number}", id=number))
        with flowcoro.timeout(20):
            for sock in (one, two):
                for _ in range(8):
                    await hear(sock)
        assert server.most == 4 and server.statistics()["calls_running"] == 0
        assert {name.split()[0] for name in server.done[:8]} == {"one", "two"}          # neither starves


@in_kernel
async def test_a_place_that_one_connection_does_not_use_goes_to_another():
    """Calls that end at once do not take the place for which they have waited; one that is lost takes none."""
    server = slow_server(max_concurrent_in_all=1)
    async with raw_connection(server) as first, raw_connection(server) as two, raw_connection(server) as three:
        await tell(first, request("slow", "first"))
        await wait_all_tasks_parked()
        lost, theirs = memory_socket_pair(flowcoro_net.Socket)
        task = flowcoro.spawn(server.serve_connection(theirs))
        await tell(lost, request("slow", "lost"))
        await wait_all_tasks_parked()
        for sock in (two, three):
            await tell(sock, request("fast", "fast", id=1))
            await tell(sock, request("slow", "slow", id=2))
        await wait_all_tasks_parked()
        await lost.close()
        theirs.close_nowait()
        with flowcoro.timeout(10):
            await task
            assert [(await hear(first))["result"]] == ["first"]
            for sock in (two, three):
                assert [(await hear(sock))["result"] for _ in range(2)] == ["fast", "slow"]
        assert server.most == 1 and "lost" not in server.done


@in_kernel
async def test_calls_that_end_at_once_pass_their_place_on():
    server = slow_server(max_concurrent_in_all=1)
    async with raw_connection(server) as first, raw_connection(server) as two, raw_connection(server) as three:
        await tell(first, request("slow", "first"))
        await wait_all_tasks_parked()
        for sock in (two, three):
            await tell(sock, request("fast", "fast"))
        with flowcoro.timeout(2):
            for sock in (first, two, three):
                await hear(sock)


@in_kernel
async def test_who_may_not_begin_a_call_of_his_own_keeps_no_other_from_it():
    server = slow_server(max_concurrent=1, max_concurrent_in_all=2)
    async with raw_connection(server) as first, raw_connection(server) as two, raw_connection(server) as three:
        await tell(first, request("slow", "long", 10, id=1))
        await tell(two, request("slow", "short", 1))
        await wait_all_tasks_parked()
        await tell(first, request("slow", "after the long one", 1, id=2))
        await wait_all_tasks_parked()
        await tell(three, request("slow", "three", 1))
        await hear(three)
        assert server.done == ["short", "three"]


@in_kernel
async def test_when_too_many_calls_wait_nothing_more_is_read():
    server = slow_server(max_concurrent=1, max_waiting=3)
    async with raw_connection(server, capacity=500) as sock:
        with flowcoro.move_on_after(0.5):
            for number in itertools.count():
                await tell(sock, request("slow", number, id=number))
        assert number < 20
        found = [await hear(sock) for _ in range(number)]
        assert [answer["result"] for answer in found] == list(range(number))


@in_kernel
async def test_when_reading_has_paused_in_vain_calls_are_refused_and_what_comes_behind_them_gets_through():
    server = slow_server(max_concurrent=1, max_waiting=2)
    async with raw_connection(server) as sock:
        await tell(sock, request("count", 3, id=1, **{"$/stream": 1}))
        assert (await hear(sock))["params"]["items"] == [0]
        for number in range(2, 7):
            await tell(sock, request("fast", number, id=number))
        await tell(sock, {"jsonrpc": "2.0", "method": "fast"})
        await tell(sock, {"jsonrpc": "2.0", "method": "$/stream", "params": {"id": 1, "credit": 9}})
        found = [await hear(sock) for _ in range(7)]
        assert [(one["id"], one["error"]["code"]) for one in found if "error" in one] == [(4, -32013), (5, -32013), (6, -32013)]
        assert [one["result"] for one in found if "result" in one] == [None, 2, 3]
        assert (await ask(sock, request("fast", 5)))["result"] == 5
        await tell(sock, request("count", 3, id=1, **{"$/stream": 1}))
        for number in range(2, 7):
            await tell(sock, request("fast", number, id=number))
        await flowcoro.sleep(0.5)           # it is gone while nobody reads
    assert flowcoro.now() < 10


@in_kernel
async def test_answers_reach_a_handler_that_has_called_back_also_while_its_place_is_the_only_one():
    server = RpcServer(max_concurrent=1)

    @server.method
    async def back(peer):
        return await peer.call("more")

    async with raw_connection(server) as sock:
        await tell(sock, request("back", id=1))
        await tell(sock, request("back", id=2))
        asked = await hear(sock)
        await tell(sock, {"jsonrpc": "2.0", "result": 5, "id": asked["id"]})
        assert await hear(sock) == {"jsonrpc": "2.0", "result": 5, "id": 1}
        await tell(sock, {"jsonrpc": "2.0", "result": 6, "id": (await hear(sock))["id"]})
        assert await hear(sock) == {"jsonrpc": "2.0", "result": 6, "id": 2}


@pytest.mark.parametrize("waits", [False, True])
@in_kernel
async def test_a_call_is_cancelled_by_a_notification(waits):
    server = slow_server(max_concurrent=1)
    async with raw_connection(server) as sock:
        await tell(sock, request("never", "a", id="x"))
        await tell(sock, request("never", "b", id="y"))
        await tell(sock, {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": "y" if waits else "x"}})
        answer = await hear(sock)
        assert (answer["id"], answer["error"]) == ("y" if waits else "x", {"code": -32800, "message": "Request cancelled"})
        await wait_all_tasks_parked()
        assert server.cut == [] if waits else ["a"]
        for wrong in ({"id": "z"}, {"id": [1]}, {}, [], None):
            message = {"jsonrpc": "2.0", "method": "$/cancelRequest"}
            await tell(sock, message if wrong is None else {**message, "params": wrong})
        await tell(sock, {"jsonrpc": "2.0", "method": "$/unknown", "params": [1]})
        assert server.statistics()["calls_running"] == 1


@in_kernel
async def test_a_handler_that_never_returns_is_ended_by_the_deadline():
    server = slow_server(deadline=5)

    @server.method
    async def stubborn():
        with flowcoro.CancelScope(shield=True):
            await flowcoro.sleep(100)

    async with raw_connection(server) as sock:
        before = flowcoro.now()
        assert (await ask(sock, request("never", "a")))["error"] == {"code": -32010, "message": "Deadline exceeded"}
        assert 5 <= flowcoro.now() - before <= 5.1 and server.cut == ["a"]
        assert (await ask(sock, request("stubborn")))["error"]["code"] == -32010
        assert flowcoro.now() - before <= 10.2
        await tell(sock, request("stubborn", id=2))
        answer = await ask(sock, {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": 2}})
        assert answer["error"]["code"] == -32800
        with flowcoro.move_on_after(20) as scope:       # its deadline passes, too, and is not told once more
            await sock.read()
        assert scope.cancelled_caught
        assert (await ask(sock, request("slow", "b", 4)))["result"] == "b"


@in_kernel
async def test_a_deadline_that_the_caller_says_holds_if_it_is_nearer():
    server = slow_server(deadline=5)
    async with raw_connection(server) as sock:
        for said, least in ((1, 1), (100, 5), ("x", 5), (-1, 5), (True, 5)):
            before = flowcoro.now()
            await ask(sock, request("never", "a", **{"$/context": {"timeout": said}}))
            assert least <= flowcoro.now() - before <= least + 0.1


@in_kernel
async def test_when_the_connection_goes_calls_are_cancelled():
    server = slow_server()
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with flowcoro.TaskGroup() as group:
        task = group.spawn(server.serve_connection(theirs))
        await tell(ours, request("never", "a"))
        await wait_all_tasks_parked()
        await ours.close()
        with flowcoro.timeout(2):
            await task
    assert server.cut == ["a"] and server.statistics() == {"connections": 0, "calls_running": 0, "calls_queued": 0}


@in_kernel
async def test_who_ends_what_he_sends_still_gets_his_answers():
    server = slow_server()
    async with raw_connection(server) as sock:
        await sock.write(json.dumps(request("slow", "a", 0.5)).encode() + b"\n" + json.dumps(request("fast", "b", id=2)).encode())
        await sock.shutdown_write()
        data = b""
        while piece := await sock.read():
            data += piece
        assert [json.loads(line)["result"] for line in data.splitlines()] == ["b", "a"]


@in_kernel
async def test_who_ends_what_he_sends_cannot_be_called_back(monkeypatch):
    server, reports = RpcServer(), []
    monkeypatch.setattr("sys.unraisablehook", reports.append)

    @server.method
    async def back(peer):
        return await peer.call("more")

    async with raw_connection(server) as sock:
        await tell(sock, request("back"))
        assert (await hear(sock))["method"] == "more"
        await sock.shutdown_write()
        before = flowcoro.now()
        assert (await hear(sock))["error"] == {"code": -32603, "message": "Internal error"}
        assert flowcoro.now() == before and reports == []


@in_kernel
async def test_a_client_that_never_reads_stops_the_server_from_reading_and_is_given_up():
    server = RpcServer()
    server.method(lambda: "x" * 100_000, name="large")
    sock, theirs = memory_socket_pair(flowcoro_net.Socket, capacity=50_000)
    async with flowcoro.TaskGroup() as group:
        serving = group.spawn(server.serve_connection(theirs))
        with flowcoro.move_on_after(30):
            for number in itertools.count():
                await tell(sock, request("large", id=number))
        assert server.peers[0].statistics()["bytes_unsent"] < 2**20 + 2**18
        assert number < 2000
        with flowcoro.timeout(100):
            await serving
        await sock.close()


@in_kernel
async def test_floods_of_notifications_and_of_strange_answers_change_nothing():
    server, seen = RpcServer(), []
    server.method(seen.append, name="note")
    async with raw_connection(server) as sock:
        flood = json.dumps({"jsonrpc": "2.0", "method": "note", "params": [1]}).encode() + b"\n"
        flood += json.dumps({"jsonrpc": "2.0", "method": "no such"}).encode() + b"\n"
        flood += json.dumps({"jsonrpc": "2.0", "result": 5, "id": 99}).encode() + b"\n"
        flood += json.dumps({"jsonrpc": "2.0", "error": {"code": 1, "message": ""}, "id": None}).encode() + b"\n"
        await sock.write(flood * 2000)
        assert (await ask(sock, request("rpc.discover")))["id"] == 1
        assert len(seen) == 2000
        assert server.peers[0].statistics() == {"calls_waiting": 0, "calls_running": 0, "calls_queued": 0, "bytes_unsent": 0,
                                                "strays": 4000}


@in_kernel
async def test_an_id_that_is_used_again_while_it_is_in_use_is_refused():
    server = slow_server()
    async with raw_connection(server) as sock:
        await tell(sock, request("slow", "a", id=1))
        error = (await ask(sock, request("slow", "b", id=1)))["error"]
        assert error["code"] == -32600 and "this id" in error["data"]
        assert (await hear(sock))["result"] == "a" and server.done == ["a"]
        assert (await ask(sock, request("slow", "c", id=1)))["result"] == "c"


@pytest.mark.parametrize("framing, data", [
    (flowcoro_rpc.Newline, b"x" * 2000), (flowcoro_rpc.ContentLength, b"Content-Length: 1073741824\r\n\r\n"),
    (flowcoro_rpc.Netstring, b"x"), (flowcoro_rpc.LengthPrefixed, b"\x40\0\0\0")])
@in_kernel
async def test_what_cannot_be_cut_into_messages_is_answered_and_ends_the_connection(framing, data):
    server = slow_server(max_message=1000)
    async with raw_connection(server, framing=framing) as sock:
        await sock.write(data)
        received, parts = framing(), []
        while piece := await sock.read():
            received.receive_data(piece)
        error = json.loads(received.next_message())
        assert error["id"] is None and error["error"]["code"] == -32600 and error["error"]["data"]


@pytest.mark.parametrize("framing, data", [
    (flowcoro_rpc.ContentLength, b"Content-Length: 9\r\n\r\n{}"), (flowcoro_rpc.ContentLength, b"Content-Le"),
    (flowcoro_rpc.Netstring, b"9:{}"), (flowcoro_rpc.LengthPrefixed, b"\0\0\0\x09{}"), (flowcoro_rpc.Concatenated, b'{"a"')])
@in_kernel
async def test_a_connection_that_ends_in_the_middle_of_a_message_is_told_so(framing, data):
    server = slow_server()
    async with raw_connection(server, framing=framing) as sock:
        await sock.write(framing.frame(encode_request("fast", [1], 1)) + data)
        await sock.shutdown_write()
        received, answers = framing(), []
        while piece := await sock.read():
            received.receive_data(piece)
        while (message := received.next_message()) is not flowcoro_rpc.NEED_DATA:
            answers.append(read_message(message))
        assert answers[0] == Response(1, 1, None) and "in the middle of a message" in answers[1].error["data"]
        assert answers[1].error["code"] == -32600 and len(answers) == 2


@in_kernel
async def test_who_is_gone_is_not_told_that_he_was_refused():
    server = slow_server(max_message=1000)
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with flowcoro.TaskGroup() as group:
        task = group.spawn(server.serve_connection(theirs))
        await ours.write(b"x" * 2000)
        ours.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await wait_all_tasks_parked()
        ours.close_nowait()             # a reset
        with flowcoro.timeout(3):
            await task


@pytest.mark.parametrize("framing", [flowcoro_rpc.Newline, flowcoro_rpc.ContentLength, flowcoro_rpc.Netstring,
                                     flowcoro_rpc.LengthPrefixed, flowcoro_rpc.Concatenated])
@pytest.mark.parametrize("most", [None, 1])
@in_kernel
async def test_calls_go_over_each_framing_and_in_single_bytes(framing, most):
    server = slow_server()
    ours, theirs = memory_socket_pair(flowcoro_net.Socket, most=most)
    async with flowcoro.TaskGroup() as group:
        group.spawn(server.serve_connection(theirs, framing=framing))
        async with RpcServer() as other:
            group.spawn(other.serve_connection(ours, framing=framing))
            await wait_all_tasks_parked()
            peer, = other.peers
            called = await flowcoro.when_all(peer.call("fast", "é" * 300), peer.call("slow", {"a": [1]}))
            assert called == ["é" * 300, {"a": [1]}]


@in_kernel
async def test_each_call_runs_in_a_context_of_its_own():
    variable, server = contextvars.ContextVar("variable", default=0), RpcServer()

    @server.method
    def plain():
        before = variable.get()
        variable.set(1)
        return before

    @server.method
    async def waits():
        before = variable.get()
        token = variable.set(5)
        await flowcoro.checkpoint()
        between = variable.get()
        variable.reset(token)
        return [before, between, variable.get()]

    async with raw_connection(server) as sock:
        for _ in range(2):
            assert (await ask(sock, request("plain")))["result"] == 0
            assert (await ask(sock, request("waits")))["result"] == [0, 5, 0]


@in_kernel
async def test_scopes_and_locks_of_a_handler_belong_to_its_call():
    server, lock = RpcServer(), flowcoro.Lock()

    @server.method
    async def locked(seconds):
        with flowcoro.timeout(2):
            async with lock:
                await flowcoro.sleep(seconds)
        return seconds

    async with raw_connection(server) as sock:
        for number in range(3):
            await tell(sock, request("locked", 0.5, id=number))
        assert [(await hear(sock))["id"] for _ in range(3)] == [0, 1, 2]


@in_kernel
async def test_middleware_surrounds_calls_the_first_outermost():
    server, seen = slow_server(), []

    @server.middleware
    async def outer(context, call_next):
        seen.append(("outer", context.method, context.params, context.id))
        context.state["user"] = "ada"
        try:
            return {"outer": await call_next(context)}
        except MethodNotFound:
            raise
        except RpcError as error:
            raise RpcError(1, f"wrapped {error.message}")

    @server.middleware
    async def inner(context, call_next):
        if context.params == ["forbidden"]:
            raise RpcError(403, "Forbidden")
        return [context.state["user"], await call_next(context)]

    assert await outcome(server, "fast", [5]) == {"outer": ["ada", 5]}
    assert await outcome(server, "slow", [5]) == {"outer": ["ada", 5]}
    assert await outcome(server, "fast", ["forbidden"]) == {"code": 1, "message": "wrapped Forbidden"}
    assert seen[0] == ("outer", "fast", [5], 1)


@in_kernel
async def test_a_drain_lets_calls_end_and_refuses_new_ones():
    server = slow_server()
    async with raw_connection(server) as sock:
        await tell(sock, request("slow", "a", 2, id=1))
        await wait_all_tasks_parked()
        async with flowcoro.TaskGroup() as group:
            closing = group.spawn(server.close())
            await wait_all_tasks_parked()
            refused = await ask(sock, request("slow", "b", id=2))
            assert (refused["id"], refused["error"]["code"]) == (2, -32011)
            assert await hear(sock) == {"jsonrpc": "2.0", "result": "a", "id": 1}
            assert await sock.read() == b""
            await closing
        assert flowcoro.now() < 3


@in_kernel
async def test_when_serving_is_cancelled_calls_of_ours_end_before_the_handlers_have():
    server, ended = RpcServer(), []

    @server.method
    async def stubborn():
        try:
            await flowcoro.sleep(math.inf)
        finally:
            with flowcoro.CancelScope(shield=True):
                await flowcoro.sleep(50)

    async def call(peer):
        with pytest.raises(flowcoro.ClosedError):
            await peer.call("a")
        ended.append(flowcoro.now())

    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with ours, flowcoro.TaskGroup() as group:
        serving = group.spawn(server.serve_connection(theirs))
        await tell(ours, request("stubborn"))
        await wait_all_tasks_parked()
        group.spawn(call(server.peers[0]))
        await wait_all_tasks_parked()
        before = flowcoro.now()
        serving.cancel()
    assert ended == [before] and flowcoro.now() == before + 50


@in_kernel
async def test_a_drain_has_an_end():
    server = slow_server()
    async with raw_connection(server) as sock:
        await tell(sock, request("never", "a", id=1))
        await wait_all_tasks_parked()
        before = flowcoro.now()
        await server.close(timeout=3)
        assert flowcoro.now() - before == 3 and server.cut == ["a"]


# ---- other transports -----------------------------------------------------------------------------------------

class Messages:
    """An end of what carries whole messages, as a WebSocket does."""

    def __init__(self, incoming, outgoing):
        self.incoming, self.outgoing = incoming, outgoing

    async def receive(self):
        try:
            return await self.incoming.receive()
        except flowcoro.EndOfChannel:
            error = flowcoro_net.BrokenError(None, "closed")
            error.code = 1000
            raise error from None

    async def send(self, text):
        assert isinstance(text, str)
        await self.outgoing.send(text)


@in_kernel
async def test_messages_of_a_websocket_are_served_both_ways():
    server, one, other = slow_server(), flowcoro.Channel(), flowcoro.Channel(10)

    @server.method
    async def back(peer, value):
        return await peer.call("double", value)

    async with flowcoro.TaskGroup() as group:
        serving = group.spawn(server.serve_messages(Messages(one, other), headers={"user": "ada"}))
        await one.send(json.dumps(request("slow", "é", id=1)))
        await one.send(json.dumps(request("fast", "b", id=2)).encode())
        assert [json.loads(await other.receive())["id"] for _ in range(2)] == [2, 1]
        await one.send(json.dumps(request("back", 4, id=3)))
        asked = json.loads(await other.receive())
        assert (asked["method"], asked["params"]) == ("double", [4])
        await one.send(json.dumps({"jsonrpc": "2.0", "result": 8, "id": asked["id"]}))
        assert json.loads(await other.receive())["result"] == 8
        one.close()
        await serving


@in_kernel
async def test_a_client_takes_what_is_connected_already():
    server, one, other = slow_server(), flowcoro.Channel(5), flowcoro.Channel(5)
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with flowcoro.TaskGroup() as group:
        group.spawn(server.serve_messages(Messages(one, other)))
        async with RpcClient.over(Messages(other, one), max_message=1000) as client:
            assert await flowcoro.when_all(client.call("slow", "é"), client.call("fast", 5)) == ["é", 5]
            assert [item async for item in client.stream("count", 100)] == list(range(100))
            with pytest.raises(ConnectionLost):         # it is refused by this end
                await client.call("count", 1000)
        one.close()
        group.spawn(server.serve_connection(theirs))
        async with RpcClient.over(ours) as client:
            assert await client.call("fast", 6) == 6


@in_kernel
async def test_a_message_by_itself_is_answered_as_http_wants_it():
    server = slow_server(max_message=200)

    @server.method
    async def back(peer):
        await peer.call("a")

    @server.method
    def user(context):
        return context.headers

    answer = json.loads(await server.answer(json.dumps(request("slow", "a")).encode()))
    assert answer["result"] == "a"
    assert (await server.answer(json.dumps([{"jsonrpc": "2.0", "method": "slow", "params": ["a"]}]).encode())) is None
    assert json.loads(await server.answer(b" " * 201))["error"]["code"] == -32600
    assert json.loads(await server.answer(json.dumps(request("count", 3)).encode()))["result"] == [0, 1, 2]
    said = request("user", **{"$/context": {"a": "chosen by the caller", "b": "2", "timeout": 5}})
    assert json.loads(await server.answer(json.dumps(said).encode(), headers={"a": "1"}))["result"] == {"a": "1", "b": "2"}


@in_kernel
async def test_a_cancelled_answer_cancels_its_calls():
    server = slow_server()
    with flowcoro.move_on_after(1) as scope:
        await server.answer(json.dumps([request("never", "a", id=1), request("never", "b", id=2)]).encode())
    assert scope.cancelled_caught and sorted(server.cut) == ["a", "b"] and server.statistics()["calls_running"] == 0


# ---- client ---------------------------------------------------------------------------------------------------

@in_kernel
async def test_a_client_calls(connect):
    async with await connect(methods_to_bind()) as client:
        assert await client.call("places", 1, 2) == [1, 2]
        assert await client.call("names", a=5) == [5, 2]
        assert await client.call("names", params={"a": 6}) == [6, 2]
        assert await client.proxy.context_by_annotation(3) == ["context_by_annotation", 4, 3]
        assert await getattr(client.proxy, "with").peer(3) == [{}, 3]
        with pytest.raises(InvalidParams) as caught:
            await client.call("typed", Point(1), "blue")
        assert caught.value.code == -32602 and caught.value.data[0]["path"] == "/1"
        with pytest.raises(MethodNotFound):
            await client.call("nothing")
        with pytest.raises(TypeError, match="one way"):
            await client.call("all", 1, b=2)
        with pytest.raises(TypeError, match="params= alone"):
            await client.call("all", 1, params=[2])
        with pytest.raises(TypeError, match="a list, a dict"):
            await client.call("all", params=5)
        with pytest.raises(ValueError):
            await client.call("all", math.nan)
        with pytest.raises(TypeError):
            await client.call("all", object())
        with pytest.raises(ValueError, match="timeout=-1"):
            await client.call("all", 1, timeout=-1)
        for name in 5, None, ["all"], b"all":
            with pytest.raises(TypeError, match="give its name"):
                await client.call(name)
        for call in Request("all", 5), Notification("all", "abc"):
            with pytest.raises(TypeError, match="a list, a dict"):
                await client.batch(call)
        assert client.peer.statistics()["calls_waiting"] == 0


@in_kernel
async def test_errors_come_as_the_exceptions_of_their_codes(connect):
    server = RpcServer()

    @server.method
    def fail(code):
        raise RpcError(code, "told", [code])

    async with await connect(server) as client:
        for code in (-32700, -32600, -32601, -32602, -32603, -32010, -32011, -32012, -32013, -32800, -32000, 5):
            with pytest.raises(RpcError) as caught:
                await client.call("fail", code)
            error = caught.value
            assert (error.code, error.message, error.data) == (code, "told", [code])
            assert type(error).__name__ == {
                -32700: "ParseError", -32600: "InvalidRequest", -32601: "MethodNotFound", -32602: "InvalidParams",
                -32603: "InternalError", -32010: "DeadlineExceeded", -32011: "ShuttingDown", -32012: "AnswerTooLarge",
                -32013: "Overloaded", -32800: "CallCancelled"}.get(code, "RpcError")


@in_kernel
async def test_any_number_of_calls_share_a_connection(connect):
    server = slow_server()
    async with await connect(server) as client:
        order = random.Random(1).sample(range(60), 60)
        assert await flowcoro.when_all(*(client.call("slow", number, number / 10) for number in order)) == order
        assert server.done == sorted(order) and len(client.memory.connections) == 1


@in_kernel
async def test_a_timeout_ends_the_call_at_both_ends(connect):
    server = slow_server()
    async with await connect(server) as client:
        before = flowcoro.now()
        with pytest.raises(TimeoutError, match="'never' within timeout=2 s"):
            await client.call("never", "a", timeout=2)
        assert 2 <= flowcoro.now() - before <= 2.1
        await wait_all_tasks_parked()
        assert server.cut == ["a"]
        with pytest.raises(TimeoutError):
            with flowcoro.timeout(1):
                await client.call("never", "b")
        await wait_all_tasks_parked()
        assert server.cut == ["a", "b"] and client.peer.statistics()["calls_waiting"] == 0
        with pytest.raises(TimeoutError):
            await client.call("never", "c", timeout=0)


@in_kernel
async def test_timeouts_of_any_length_come_in_their_order(connect):
    server, late = slow_server(), []

    async def call(client, seconds):
        with pytest.raises(TimeoutError):
            await client.call("never", 1, timeout=seconds)
        late.append((seconds, flowcoro.now() - began))

    async with await connect(server) as client:
        began = flowcoro.now()
        await flowcoro.when_all(*(call(client, seconds) for seconds in (5, 1, 3, 0.5, 2)))
    assert [seconds for seconds, _ in late] == [0.5, 1, 2, 3, 5]
    assert all(0 <= passed - seconds <= 0.1 for seconds, passed in late)


@in_kernel
async def test_the_timeout_and_headers_are_told_where_that_is_wanted(connect):
    server, heard = slow_server(), []

    @server.method
    def look(context):
        heard.append(context.headers)

    async with await connect(server, propagate=True, headers=lambda: {"traceparent": "00-1"}) as client:
        await client.call("look")
        before = flowcoro.now()
        with pytest.raises(DeadlineExceeded):
            peer = client.peer
            message = encode_request("never", ["a"], 1000, peer._more(1))
            reply = flowcoro_rpc._Reply(peer, 1000, "never")
            peer._register([reply], message)
            await flowcoro.park(reply.park)
            reply.take()
        assert flowcoro.now() - before <= 1.1
    assert heard == [{"traceparent": "00-1"}]


@in_kernel
async def test_strict_servers_see_nothing_that_is_not_in_the_specification(connect):
    server = RpcServer()
    server.method(lambda context: None, name="a")
    seen = []
    original = flowcoro_rpc.read_message

    def spy(data, **limits):
        event = original(data, **limits)
        if event.__class__ is Request:
            seen.append(sorted(event.more))
        return event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flowcoro_rpc, "read_message", spy)
        async with await connect(server) as client:
            await client.call("a")
    assert seen == [["id", "jsonrpc", "method"]]


@in_kernel
async def test_batches(connect):
    server = slow_server()
    async with await connect(server) as client:
        results = await client.batch(Request("slow", ["a", 2]), Notification("fast", [1]), Request("nothing"),
                                     Request("fast", {"name": 5}))
        assert results[0] == "a" and isinstance(results[1], MethodNotFound) and results[2] == 5 and len(results) == 3
        assert await client.batch(Notification("fast", [1])) == []
        with pytest.raises(ValueError, match="empty"):
            await client.batch()
        with pytest.raises(TypeError, match="Request"):
            await client.batch(("fast", [1]))
        with pytest.raises(TimeoutError):
            await client.batch(Request("never", ["a"]), Request("fast"), timeout=1)
        await wait_all_tasks_parked()
        assert server.cut == ["a"] and client.peer.statistics()["calls_waiting"] == 0
    async with await connect(slow_server(max_batch=2)) as client:
        # The answer has no id, and all that is under way was this message.
        assert [type(error) for error in await client.batch(*[Request("fast")] * 3)] == [InvalidRequest] * 3


@in_kernel
async def test_notifications(connect):
    server, seen = RpcServer(), []
    server.method(lambda *values, **named: seen.append((values, named)), name="note")
    async with await connect(server) as client:
        await client.notify("note", 1, 2)
        await client.notify("note", a=1)
        await client.notify("nothing")
        await client.call("rpc.discover")
    assert seen == [((1, 2), {}), ((), {"a": 1})]


@in_kernel
async def test_each_operation_is_a_checkpoint(connect):
    async with await connect(slow_server()) as client:
        with assert_checkpoints():
            await client.call("fast")
        with assert_checkpoints():
            await client.notify("fast")
        with assert_checkpoints():
            await client.batch(Notification("fast"))
        sent = client.peer.transport.statistics()["bytes_sent"]
        for operation in (client.call("fast"), client.notify("fast"), client.batch(Request("fast")),
                          anext(client.stream("count", 5))):
            with flowcoro.CancelScope() as scope:
                scope.cancel()
                await operation
            assert scope.cancelled_caught
        await flowcoro.sleep(1)
        assert client.peer.transport.statistics()["bytes_sent"] == sent


@in_kernel
async def test_both_ends_call_each_other(connect):
    server, methods = RpcServer(), Methods()

    @server.method
    async def fold(peer, values):
        total = 0
        for value in values:
            total = await peer.call("add", total, value)
        await peer.notify("done", total)
        return total

    said = []
    methods.method(said.append, name="done")

    @methods.method
    async def add(peer, a: int, b: int):
        if b == 3:
            assert await peer.call("fold", [5, 6]) == 11       # in the middle of a call of its own
        return a + b

    async with await connect(server, methods=methods) as client:
        assert await client.call("fold", [1, 2, 3, 4]) == 10
        assert await flowcoro.when_all(*(client.call("fold", [number, 1]) for number in range(20))) == list(range(1, 21))
        peer, = server.peers
        assert await peer.call("add", 1, 2) == 3
        with pytest.raises(MethodNotFound):
            await peer.call("fold")
    assert said[:2] == [11, 10]


@in_kernel
async def test_a_call_that_is_too_large_is_refused_here(connect):
    async with await connect(slow_server(), max_message=1000) as client:
        with pytest.raises(flowcoro_net.LimitError, match="max_message=1000"):
            await client.call("fast", "x" * 1000)
        assert await client.call("fast", "x" * 900) == "x" * 900


@in_kernel
async def test_an_answer_that_is_too_large_is_an_error(connect):
    server = slow_server(max_message=2000)
    server.method(lambda: "x" * 2000, name="large")
    async with await connect(server) as client:
        with pytest.raises(flowcoro_rpc.AnswerTooLarge):
            await client.call("large")
        assert await client.call("fast", 1) == 1


@in_kernel
async def test_who_calls_faster_than_the_peer_reads_waits():
    ours, theirs = memory_socket_pair(flowcoro_net.Socket, capacity=10_000)
    server = RpcServer()
    async with ours, theirs, flowcoro.TaskGroup() as group:
        group.spawn(server.serve_connection(ours))
        await wait_all_tasks_parked()
        peer, = server.peers
        with flowcoro.move_on_after(10):
            for _ in range(1000):
                await peer.notify("a", "x" * 10_000)
        assert peer.statistics()["bytes_unsent"] < 2**20 + 20_000
        with pytest.raises(TimeoutError, match="has not run"):
            await peer.call("a", timeout=5)
        await theirs.close()


# ---- streams --------------------------------------------------------------------------------------------------

@in_kernel
async def test_an_async_generator_arrives_as_an_async_iterator(connect):
    server = slow_server()
    async with await connect(server) as client:
        assert [item async for item in client.stream("count", 1000)] == list(range(1000))
        assert [item async for item in client.stream("count", to=3, seconds=1)] == [0, 1, 2]
        assert [item async for item in client.stream("count", 0)] == []
        assert await client.call("count", 4) == [0, 1, 2, 3]            # who does not know streams gets a list
        assert [item async for item in client.stream("fast", [7, 8])] == [7, 8]
        with pytest.raises(InvalidParams):
            async for _ in client.stream("count"):
                pass
        assert client.peer.statistics()["strays"] == 0


@in_kernel
async def test_a_generator_below_a_decorator_is_a_stream_too_and_as_a_list_it_lets_the_others_run(connect):
    server, given = RpcServer(), 0

    def decorator(function):
        @functools.wraps(function)
        def decorated(*args):
            return function(*args)
        return decorated

    @server.method
    @decorator
    async def count(to: int):
        for number in range(to):
            yield number

    @server.method
    async def endless():
        nonlocal given
        while True:
            given += 1
            yield "x"

    async with await connect(server) as client:
        assert [item async for item in client.stream("count", 3)] == await client.call("count", 3) == [0, 1, 2]
    with pytest.raises(TimeoutError), flowcoro.timeout(0):
        await server.answer(encode_request("endless", None, 1))
    assert given < 10_000               # of 350,000 that a message has room for


@in_kernel
async def test_a_stream_is_ahead_of_who_takes_it_by_its_window_at_most(connect):
    server, given = RpcServer(), 0

    @server.method
    async def flood():
        nonlocal given
        while True:
            given += 1
            yield "x"

    async with await connect(server) as client:
        taken = 0
        async for _ in client.stream("flood", window=10):
            taken += 1
            await flowcoro.sleep(1)
            assert given <= taken + 11
            if taken == 50:
                break
        await flowcoro.sleep(1)
        assert client.peer.statistics()["calls_waiting"] == 0
        assert server.statistics()["calls_running"] == 0            # left at one end, ended at the other
        assert await client.call("rpc.discover")


@in_kernel
async def test_a_stream_that_fails_gives_its_items_and_then_its_error(connect):
    server = RpcServer()

    @server.method
    async def fails():
        yield 1
        await flowcoro.sleep(1)
        yield 2
        raise RpcError(7, "told")

    async with await connect(server) as client:
        items = []
        with pytest.raises(RpcError, match="told"):
            async for item in client.stream("fails"):
                items.append(item)
        assert items == [1, 2]


@in_kernel
async def test_a_stream_has_a_timeout_for_each_item_and_is_cancelled(connect):
    server = slow_server()
    async with await connect(server) as client:
        assert [item async for item in client.stream("count", 5, 1, timeout=1.5)] == list(range(5))
        with pytest.raises(TimeoutError, match="no item of 'count'"):
            async for _ in client.stream("count", 5, 2, timeout=1.5):
                pass
        await wait_all_tasks_parked()
        assert server.done == ["count"]
        with flowcoro.move_on_after(2.5):
            async for _ in client.stream("count", 5, 1):
                pass
        await wait_all_tasks_parked()
        assert server.cut == ["count"] * 3 and server.statistics()["calls_running"] == 0


@in_kernel
async def test_streams_run_beside_calls_and_in_both_directions(connect):
    server, methods = slow_server(), Methods()

    @methods.method
    async def numbers():
        for number in range(50):
            yield number

    @server.method
    async def total(peer):
        return sum([number async for number in peer.stream("numbers")])

    async def collect(client, count):
        return [item async for item in client.stream("count", count)]

    async with await connect(server, methods=methods) as client:
        assert await client.call("total") == sum(range(50))
        found = await flowcoro.when_all(collect(client, 100), collect(client, 70), client.call("fast", 5), collect(client, 3))
        assert found == [list(range(100)), list(range(70)), 5, [0, 1, 2]]


@in_kernel
async def test_a_stream_that_sends_more_than_it_may_ends_the_connection():
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    server = RpcServer()
    async with ours, theirs, flowcoro.TaskGroup() as group:
        group.spawn(server.serve_connection(ours))
        await wait_all_tasks_parked()
        peer, = server.peers

        async def take():
            with pytest.raises(ConnectionLost):
                async for _ in peer.stream("flood", window=4):
                    await flowcoro.sleep(100)

        group.spawn(take())
        asked = await hear(theirs)
        assert asked["$/stream"] == 4
        await tell(theirs, {"jsonrpc": "2.0", "method": "$/stream", "params": {"id": asked["id"], "items": [1] * 9}})
        assert "credit" in (await hear(theirs))["error"]["data"]


@in_kernel
async def test_items_of_one_turn_share_a_message_as_large_as_one_may_be_and_others_do_not_wait_for_more(monkeypatch):
    monkeypatch.setattr("sys.unraisablehook", lambda report: None)
    server = slow_server(max_message=1000)

    @server.method
    async def give(sizes, last="a", wait=0):
        for size in sizes:
            yield "x" * size
        await flowcoro.sleep(wait)
        if last != "a":
            raise RpcError(1, "told")
        yield "\ud800"

    async def messages(sock, *call, credit=100, **more):
        """The numbers of items in each message, and the code of the error."""
        await tell(sock, request(*call, **{"$/stream": credit}, **more))
        found = []
        while "method" in (one := json.loads(line := await sock.read_until(b"\n"))):
            assert len(line) <= 1001
            found.append(len(one["params"]["items"]))
        return found, one.get("error", {}).get("code")

    async with raw_connection(server) as sock:
        assert await messages(sock, "count", 50) == ([50], None)
        assert await messages(sock, "count", 3, 1) == ([1, 1, 1], None)
        assert await messages(sock, "count", 0) == ([], None)
        assert await messages(sock, "give", [300] * 7, "b", id="an id") == ([3, 3, 1], 1)         # the error comes last
        assert await messages(sock, "give", [1, 2]) == ([2], -32603)
        assert await messages(sock, "give", [1, 930, 1], "b") == ([1, 1, 1], 1)
        assert await messages(sock, "give", [1, 1000, 1]) == ([1], -32012)
        await tell(sock, request("give", [1, 2], "b", 100, id=9, **{"$/stream": 5}))
        await tell(sock, {"jsonrpc": "2.0", "method": "$/cancelRequest", "params": {"id": 9}})
        first, then = await hear(sock), await hear(sock)
        assert (first["params"], then["error"]["code"]) == ({"id": 9, "items": ["x", "xx"]}, -32800)
        with flowcoro.move_on_after(200) as scope:
            await sock.read()
        assert scope.cancelled_caught


@in_kernel
async def test_credit_that_is_none_is_not_given():
    server = slow_server()
    async with raw_connection(server) as sock:
        await tell(sock, request("count", 10, **{"$/stream": 1}))
        assert (await hear(sock))["params"] == {"id": 1, "items": [0]}
        for wrong in ({"id": 1, "credit": -5}, {"id": 1, "credit": "9"}, {"id": 1, "credit": 2**40}, {"id": 2, "credit": 5}, [1],
                      {"id": 1, "credit": True}, {"id": [], "credit": 1}):
            await tell(sock, {"jsonrpc": "2.0", "method": "$/stream", "params": wrong})
        with flowcoro.move_on_after(5) as scope:
            await sock.read()
        assert scope.cancelled_caught
        await tell(sock, {"jsonrpc": "2.0", "method": "$/stream", "params": {"id": 1, "credit": 100}})
        assert (await hear(sock))["params"]["items"] == list(range(1, 10))
        assert await hear(sock) == {"jsonrpc": "2.0", "result": None, "id": 1}
        for wrong in (0, -1, "5", True, 2**40):         # no number of items: a list
            assert (await ask(sock, request("count", 2, **{"$/stream": wrong})))["result"] == [0, 1]


# ---- what is lost ---------------------------------------------------------------------------------------------

@in_kernel
async def test_a_lost_connection_fails_what_was_under_way_at_once_and_says_what_is_known(connect):
    server = slow_server()
    async with await connect(server, reconnect=None) as client:
        async with flowcoro.TaskGroup() as group:
            async def call(name):
                with pytest.raises(ConnectionLost) as caught:
                    await client.call("never", name)
                return caught.value.sent

            tasks = [group.spawn(call(number)) for number in range(3)]
            await wait_all_tasks_parked()
            before = flowcoro.now()
            client.memory.cut()
            assert [await task for task in tasks] == [True] * 3 and flowcoro.now() == before
        with pytest.raises(ConnectionLost) as caught:
            await client.call("fast")
        assert caught.value.sent is False
        await wait_all_tasks_parked()
        assert server.cut == [0, 1, 2]


async def lose(peer, name, size, found):
    """Call with so many letters, until the connection is lost; in `found`, what is then known of whether it was sent."""
    with pytest.raises(ConnectionLost) as caught:
        await peer.call("a", "x" * size)
    found[name] = caught.value.sent


@in_kernel
async def test_what_was_not_sent_has_not_run_and_what_was_sent_in_part_nobody_knows():
    ours, theirs = memory_socket_pair(flowcoro_net.Socket, capacity=1000)
    server = RpcServer()
    async with ours, theirs, flowcoro.TaskGroup() as group:
        group.spawn(server.serve_connection(ours))
        await wait_all_tasks_parked()
        peer, found = server.peers[0], {}
        group.spawn(lose(peer, "small", 10, found))
        await wait_all_tasks_parked()
        group.spawn(lose(peer, "large", 10_000, found))
        await wait_all_tasks_parked()
        group.spawn(lose(peer, "later", 10, found))
        await wait_all_tasks_parked()
        theirs.close_nowait()
    assert found == {"small": True, "large": None, "later": False}


@in_kernel
async def test_who_has_its_answer_goes_on_before_more_is_waited_for():
    order = []

    class Noted(flowcoro_net.Socket):
        async def read(self, max_bytes):
            order.append("read")
            return await super().read(max_bytes)

    ours, theirs = memory_socket_pair(Noted)
    async with ours, flowcoro.TaskGroup() as group:
        group.spawn(slow_server().serve_connection(theirs))
        async with RpcClient.over(ours) as client:
            await wait_all_tasks_parked()
            for _ in range(3):
                order.clear()
                await client.call("fast")
                assert order == ["read"]                # the server's, after its answer
                await wait_all_tasks_parked()
                assert order == ["read"] * 2
        group.cancel()


@in_kernel
async def test_a_call_that_fails_as_it_is_sent_still_knows_how_long_it_may_take(monkeypatch):
    def fail(frames):
        raise flowcoro_net.BrokenError(None, "gone")

    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with theirs, RpcClient.over(ours) as client:
        monkeypatch.setattr(client.peer._wire, "write_nowait", fail)
        with pytest.raises(ConnectionLost) as caught:
            await client.call("a", timeout=5)
    assert caught.value.sent is False and caught.value._left == 5


@pytest.mark.parametrize("at_once", [False, True])
@in_kernel
async def test_what_waited_in_one_write_with_what_was_sent_in_part_has_not_run(at_once):
    ours, theirs = memory_socket_pair(flowcoro_net.Socket, capacity=1000)
    server = RpcServer()
    async with ours, theirs, flowcoro.TaskGroup() as group:
        group.spawn(server.serve_connection(ours))
        await wait_all_tasks_parked()
        peer, found = server.peers[0], {}
        if at_once:                         # all wait for the same turn
            await peer.notify("a")
        for name, size in (("small", 10), ("large", 300_000), ("later", 300_000)):
            group.spawn(lose(peer, name, size, found))
        if at_once:
            await flowcoro.checkpoint()
            await flowcoro.checkpoint()
            peer._lose(flowcoro_net.BrokenError(None, "cut"))
        else:
            await wait_all_tasks_parked()
            theirs.close_nowait()
    assert found["later"] is False and found["small"] is not False


@in_kernel
async def test_a_peer_that_says_nothing_any_more_is_asked_for_a_sign_of_life():
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with theirs, RpcClient.over(ours) as client:
        for answers in (True, False):
            with pytest.raises(TimeoutError):
                await client.call("a", timeout=1)
            heard = [await hear(theirs) for _ in range(3)]
            assert [one["method"] for one in heard] == ["a", "$/cancelRequest", "$/ping"]
            if answers:
                await tell(theirs, {"jsonrpc": "2.0", "error": {"code": -32601, "message": ""}, "id": heard[2]["id"]})
                await flowcoro.sleep(100)
                assert not client.peer.closed
        with pytest.raises(TimeoutError):
            await client.call("b", timeout=1)           # no second probe while one is under way
        assert [(await hear(theirs))["method"] for _ in range(2)] == ["b", "$/cancelRequest"]
        before = flowcoro.now()
        with pytest.raises(ConnectionLost, match="probe"):
            await client.call("c", timeout=100)
        assert flowcoro.now() - before <= 10


@in_kernel
async def test_a_peer_that_says_something_else_is_not_asked_for_a_sign_of_life():
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with theirs, RpcClient.over(ours) as client, flowcoro.TaskGroup() as group:
        async def call():
            with pytest.raises(TimeoutError):
                await client.call("a", timeout=1)

        task = group.spawn(call())
        await wait_all_tasks_parked()
        await tell(theirs, {"jsonrpc": "2.0", "method": "alive"})
        await task
        assert [(await hear(theirs))["method"] for _ in range(2)] == ["a", "$/cancelRequest"]
        with flowcoro.move_on_after(20) as scope:
            await theirs.read()
        assert scope.cancelled_caught


@in_kernel
async def test_a_stream_does_not_wait_for_ever_for_who_is_gone_without_a_word():
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with theirs, RpcClient.over(ours) as client, flowcoro.TaskGroup() as group:
        async def take():
            with pytest.raises(ConnectionLost, match="probe"):
                async for item in client.stream("prices"):
                    taken.append(item)

        taken, began = [], flowcoro.now()
        task = group.spawn(take())
        number = (await hear(theirs))["id"]
        for heard in (30, 90):                  # it answers the first; and what has come meanwhile is a sign, too
            probe = await hear(theirs)
            assert probe["method"] == "$/ping" and heard <= flowcoro.now() - began <= heard + 0.2
            if heard == 30:
                await tell(theirs, {"jsonrpc": "2.0", "error": {"code": -32601, "message": ""}, "id": probe["id"]})
                await flowcoro.sleep(5)
                await tell(theirs, {"jsonrpc": "2.0", "method": "$/stream", "params": {"id": number, "items": ["x"]}})
        await task
        assert taken == ["x"] and 100 <= flowcoro.now() - began <= 100.3


@in_kernel
async def test_a_client_connects_again_with_more_and_more_patience(connect):
    server = slow_server()
    async with await connect(server, reconnect=Backoff(1, 8, jitter=0)) as client:
        assert await client.call("fast", 1) == 1
        client.memory.refusals = 5
        client.memory.cut()
        before = flowcoro.now()
        assert await client.call("fast", 2, timeout=100) == 2
        assert flowcoro.now() - before == 1 + 2 + 4 + 8 + 8 + 8
        client.memory.refusals = 10**9
        client.memory.cut()
        await wait_all_tasks_parked()
        before = flowcoro.now()
        with pytest.raises(TimeoutError, match="refused"):
            await client.call("fast", 3, timeout=20)
        assert flowcoro.now() - before == 20


@in_kernel
async def test_a_call_that_is_sent_again_has_no_more_time_than_it_had(monkeypatch):
    pairs = []

    async def open(*where, **options):
        await flowcoro.checkpoint()
        if pairs:
            raise flowcoro_net.BrokenError(111, "connection refused")
        pairs.append(memory_socket_pair(flowcoro_net.Socket, capacity=1000))
        return pairs[0][0]

    async def fails(error, coro):
        with pytest.raises(error):
            await coro
        return flowcoro.now()

    monkeypatch.setattr(flowcoro_net.Socket, "connect", open)
    async with await RpcClient.connect("memory", 1) as client, flowcoro.TaskGroup() as group:
        group.spawn(fails(ConnectionLost, client.call("a", "x" * 10_000)))      # nobody reads it
        await wait_all_tasks_parked()
        began = flowcoro.now()
        tasks = [group.spawn(fails(TimeoutError, client.call("b", timeout=seconds))) for seconds in (10, 20)]
        await flowcoro.sleep(8)
        pairs[0][1].close_nowait()
        assert [await task - began for task in tasks] == pytest.approx([10, 20], abs=0.1)


@in_kernel
async def test_who_has_ended_a_connection_is_told_right_also_afterwards():
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    async with theirs, RpcClient.over(ours, max_message=1000) as client:
        await theirs.write(b"x" * 2000)
        assert "max_message" in (await hear(theirs))["error"]["data"]
        await theirs.close()
        while not client.closed:
            await flowcoro.sleep(0.1)
        with pytest.raises(ConnectionLost, match="max_message=1000") as caught:
            await client.call("a")
        assert caught.value.sent is False and isinstance(caught.value.__cause__, flowcoro_rpc.ProtocolError)


@in_kernel
async def test_a_client_gives_up_after_its_attempts(connect):
    async with await connect(slow_server(), reconnect=Backoff(1, jitter=0, attempts=3)) as client:
        client.memory.refusals = 10
        client.memory.cut()
        with pytest.raises(ConnectionLost, match="refused") as caught:
            await client.call("fast", timeout=None)
        assert caught.value.sent is False and client.closed and client.memory.refusals == 7


def test_backoff_has_its_bounds():
    backoff = Backoff(0.1, 10, 2, 0.5)
    assert [backoff.delay(attempt, 0) for attempt in (0, 1, 2, 20, 10**6)] == [0.1, 0.2, 0.4, 10, 10]
    assert backoff.delay(3, 1.0) == 0.4


@in_kernel
async def test_a_subscription_goes_on_over_the_next_connection(connect):
    server = slow_server()
    async with await connect(server, reconnect=Backoff(1, jitter=0)) as client:
        items = []
        async for item in client.subscribe("count", 4, 1):
            items.append(item)
            if len(items) == 2:
                client.memory.cut()
        assert items == [0, 1, 0, 1, 2, 3]


@in_kernel
async def test_a_closed_client_says_so(connect):
    server = slow_server()
    client = await connect(server)
    async with flowcoro.TaskGroup() as group:
        async def call():
            with pytest.raises(flowcoro.ClosedError):
                await client.call("never", "a")

        group.spawn(call())
        await wait_all_tasks_parked()
        await client.close()
    await client.close()
    with pytest.raises(flowcoro.ClosedError):
        await client.call("fast")
    with pytest.raises(flowcoro.ClosedError):
        await client.notify("fast")
    assert [item async for item in client.subscribe("count", 1)] == []
    await wait_all_tasks_parked()
    assert server.cut == ["a"]


@in_kernel
async def test_an_error_without_an_id_belongs_to_the_only_call_under_way(connect):
    ours, theirs = memory_socket_pair(flowcoro_net.Socket)
    server = RpcServer()
    async with ours, theirs, flowcoro.TaskGroup() as group:
        group.spawn(server.serve_connection(ours))
        await wait_all_tasks_parked()
        peer, = server.peers

        async def call():
            with pytest.raises(flowcoro_rpc.ParseError):
                await peer.call("a")

        task = group.spawn(call())
        await hear(theirs)
        await tell(theirs, {"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": None})
        await task
        await theirs.close()


@pytest.mark.parametrize("stop", range(1, 14))
@in_kernel
async def test_a_call_cancelled_at_any_await_leaves_nothing_behind(connect, stop):
    """Whatever await of call, stream, batch or notify is cut, the connection goes on, and both ends are empty in the end."""
    server = slow_server()
    async with await connect(server) as client:
        async def work():
            await client.notify("fast")
            await client.call("slow", "a", 0.1)
            await client.batch(Request("slow", ["b", 0.1]), Request("fast"))
            async for _ in client.stream("count", 3, 0.1):
                pass

        steps = 0
        async with flowcoro.TaskGroup() as group:
            task = group.spawn(work())
            while not task.done() and steps < stop:
                steps += 1
                await flowcoro.checkpoint()
                if steps % 2:
                    await flowcoro.sleep(0.05)
            task.cancel()
        await flowcoro.sleep(5)
        assert client.peer.statistics()["calls_waiting"] == 0 and server.statistics()["calls_running"] == 0
        assert await client.call("fast", 1) == 1


# ---- pool -----------------------------------------------------------------------------------------------------

@in_kernel
async def test_a_pool_gives_each_call_to_the_least_busy_and_goes_on_without_those_that_are_gone(connect):
    servers = [slow_server() for _ in range(3)]
    clients = [await connect(server, reconnect=None) for server in servers]
    async with RpcPool(clients) as pool:
        await flowcoro.when_all(*(pool.call("slow", number) for number in range(9)))
        assert [len(server.done) for server in servers] == [3, 3, 3]
        clients[0].memory.cut()
        await servers[1].close()
        assert await flowcoro.when_all(*(pool.call("slow", number) for number in range(5))) == list(range(5))
        assert len(servers[2].done) == 8
        assert [item async for item in pool.stream("count", 3)] == [0, 1, 2]
        await pool.notify("fast")
        assert await pool.batch(Request("fast", [1])) == [1]
        await servers[2].close()
        with pytest.raises((ConnectionLost, flowcoro.ClosedError)):
            await pool.call("fast")


@in_kernel
async def test_a_pool_does_not_send_again_what_was_cut_by_its_own_close(connect):
    servers = [slow_server() for _ in range(2)]
    pool = RpcPool([await connect(server) for server in servers])
    async with flowcoro.TaskGroup() as group:
        async def call():
            with pytest.raises(flowcoro.ClosedError):
                await pool.call("never", "a")

        task = group.spawn(call())
        await wait_all_tasks_parked()
        for client in sorted(pool._clients, key=lambda client: -client.peer.statistics()["calls_waiting"]):
            await client.close()            # first the one that has it
        await task
    await wait_all_tasks_parked()
    assert sum((server.cut for server in servers), []) == ["a"]


@in_kernel
async def test_a_pool_that_is_closed_or_cannot_connect_leaves_no_client_open(connect, monkeypatch):
    servers = [slow_server() for _ in range(3)]
    clients = [await connect(server) for server in servers]
    with flowcoro.CancelScope() as scope:
        scope.cancel()
        await RpcPool(clients).close()
    assert scope.cancelled_caught and all(client.closed and client.peer.closed for client in clients)
    memory, begun = Memory(servers[0]), []

    async def open(host, port, **options):
        if port == 3:
            await flowcoro.sleep(math.inf)
        begun.append(await memory.open())
        return begun[-1]

    monkeypatch.setattr(flowcoro_net.Socket, "connect", open)
    with flowcoro.move_on_after(1) as scope:
        await RpcPool.connect([("memory", port) for port in (1, 2, 3)])
    assert scope.cancelled_caught and len(begun) == 2
    await wait_all_tasks_parked()
    for sock in begun:
        with pytest.raises(flowcoro.ClosedError):
            await sock.read()


@in_kernel
async def test_a_pool_goes_on_without_a_server_that_shuts_down(connect):
    servers = [slow_server() for _ in range(2)]
    async with RpcPool([await connect(server) for server in servers]) as pool, flowcoro.TaskGroup() as group:
        running = [group.spawn(pool.call("slow", number, 5)) for number in range(2)]
        await wait_all_tasks_parked()
        closing = group.spawn(servers[0].close())
        await wait_all_tasks_parked()
        assert await flowcoro.when_all(*(pool.call("fast", number) for number in range(6))) == list(range(6))
        assert sorted([await task for task in running]) == [0, 1]
        await closing
    with pytest.raises(ValueError, match="one client"):
        RpcPool([])


# ---- the system's sockets -------------------------------------------------------------------------------------

def test_over_tcp_and_unix_sockets(tmp_path):
    async def main():
        server = slow_server()
        tcp = await server.start_tcp_server(0)
        unix = await server.start_unix_server(str(tmp_path / "socket"))
        async with await RpcClient.connect(*tcp.local) as one, await RpcClient.connect(unix=unix.local) as other:
            assert await flowcoro.when_all(*(client.call("slow", number, 0.001) for number in range(20)
                                             for client in (one, other))) == [number for number in range(20) for _ in "ab"]
            assert [item async for item in one.stream("count", 100)] == list(range(100))
            big = "x" * 1_000_000
            assert await flowcoro.when_all(*(one.call("fast", big) for _ in range(4))) == [big] * 4
            assert server.statistics()["connections"] == 2
        await server.close()
        await server.wait_closed()
        with pytest.raises(flowcoro.ClosedError):
            await server.start_tcp_server(0)

    flowcoro.run(main())


def test_the_system_asks_whether_the_host_at_the_other_end_is_there():
    async def main():
        server = slow_server()
        listening = await server.start_tcp_server(0)
        async with await RpcClient.connect(*listening.local) as client:
            await client.call("fast")
            for peer in client.peer, server.peers[0]:
                raw = peer.transport.raw
                assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 10
        await server.close()

    flowcoro.run(main())


def test_a_server_that_was_closed_while_it_began_to_listen_does_not_serve(monkeypatch):
    async def main():
        server, listening = RpcServer(), []
        original = flowcoro_net.TcpServer.listen

        async def listen(*args, **options):
            listening.append(await original(*args, **options))
            await server.close()
            return listening[0]

        monkeypatch.setattr(flowcoro_net.TcpServer, "listen", listen)
        with pytest.raises(flowcoro.ClosedError):
            await server.start_tcp_server(0)
        assert listening[0].closed

    flowcoro.run(main())


def test_what_is_refused_is_told_although_more_was_sent():
    async def main():
        server = slow_server(max_message=1000)
        listening = await server.start_tcp_server(0)
        async with await flowcoro_net.Socket.connect(*listening.local) as sock:
            await sock.write(b"x" * 1_000_000)
            assert "max_message=1000" in (await hear(sock))["error"]["data"]
        await server.close()

    flowcoro.run(main())


def test_a_pool_connects():
    async def main():
        servers = [slow_server() for _ in range(2)]
        addresses = [(await server.start_tcp_server(0)).local for server in servers]
        async with await RpcPool.connect(addresses) as pool:
            assert await flowcoro.when_all(*(pool.call("fast", number) for number in range(10))) == list(range(10))
        for server in servers:
            await server.close()
        with pytest.raises(OSError):
            await RpcPool.connect(addresses)

    flowcoro.run(main())


def test_several_workers_serve_and_call():
    async def main():
        server = slow_server()
        listening = await server.start_tcp_server(0)

        async def work(client, base):
            for number in range(base, base + 50):
                assert await client.call("fast", number) == number
                assert await client.call("slow", number, 0) == number

        async with await RpcClient.connect(*listening.local) as client:
            await flowcoro.when_all(*(work(client, 100 * index) for index in range(8)))
            assert [item async for item in client.stream("count", 200)] == list(range(200))
        await server.close()

    flowcoro.run(main(), workers=3)


def test_several_workers_share_the_places_of_a_server():
    async def main():
        server = slow_server(max_concurrent=2, max_concurrent_in_all=3)
        listening = await server.start_tcp_server(0)

        async def work(base):
            async with await RpcClient.connect(*listening.local) as client:
                numbers = list(range(base, base + 30))
                assert await flowcoro.when_all(*(client.call("slow", number, 0) for number in numbers)) == numbers
                found = await client.batch(*(Request("slow", [number, 0]) for number in numbers))
                assert found == numbers
                assert [item async for item in client.stream("count", 50, window=2)] == list(range(50))

        await flowcoro.when_all(*(work(100 * index) for index in range(6)))
        assert server.statistics()["calls_running"] == server.statistics()["calls_queued"] == 0
        await server.close()

    flowcoro.run(main(), workers=4)


def test_a_stop_drains_the_server():
    async def main():
        server, begun, go_on = RpcServer(), flowcoro.Event(), flowcoro.Event()

        @server.method
        async def wait():
            begun.set()
            await go_on.wait()
            return "a"

        listening = await server.start_tcp_server(0)
        async with await RpcClient.connect(*listening.local, reconnect=None) as client:
            async with flowcoro.TaskGroup() as group:
                task = group.spawn(client.call("wait"))
                await begun.wait()
                flowcoro.request_stop()
                with pytest.raises(flowcoro_rpc.ShuttingDown):
                    while True:
                        await client.call("rpc.discover")
                go_on.set()
                assert await task == "a"
        await server.wait_closed()

    flowcoro.run(main())


def test_over_http_and_a_websocket_of_one_server():
    app, rpc = HttpServer(websocket=flowcoro_websocket.accept), slow_server(max_message=5000)

    @app.post("/rpc")
    async def over_http(request):
        answer = await rpc.answer(await request.body(), headers=dict(request.headers.items()))
        return HttpResponse(204) if answer is None else HttpResponse(200, answer, media_type="application/json")

    @app.websocket("/rpc")
    async def over_websocket(ws):
        await rpc.serve_messages(ws, headers={"who": "a WebSocket"})

    @rpc.method
    async def back(peer, text: str):
        return [peer.headers, await peer.call("turned", text)]

    async def main():
        ours = Methods()
        ours.method(lambda text: text[::-1], name="turned")
        async with app.test_client() as http:
            answer = await http.post("/rpc", content=encode_request("slow", ["é", 0.001], 1))
            assert (answer.status, answer.content) == (200, encode_result(1, "é"))
            assert (await http.post("/rpc", content=encode_request("fast"))).status == 204
            async with flowcoro_websocket.connect("ws://testserver/rpc", socket=await http.socket()) as ws:
                async with RpcClient.over(ws, methods=ours, max_message=5000) as client:
                    assert await flowcoro.when_all(client.call("slow", "é", 0.001), client.call("fast", 5)) == ["é", 5]
                    assert await client.call("back", "abc") == [{"who": "a WebSocket"}, "cba"]
                    assert [item async for item in client.stream("count", 100)] == list(range(100))
                await ws.close()
        assert rpc.statistics() == {"connections": 0, "calls_running": 0, "calls_queued": 0}

    flowcoro.run(main())


@pytest.mark.skipif(OPENSSL is None, reason="the openssl command, which makes the certificates, is not installed")
def test_over_tls(certificates):
    async def main():
        server = slow_server()
        listening = await server.start_tcp_server(0, tls=flowcoro_net.server_tls(*certificates.good))
        trust = flowcoro_net.client_tls(ca=certificates.ca)
        async with await RpcClient.connect(*listening.local, tls=trust) as client:
            assert client.peer.transport.tls
            assert await flowcoro.when_all(*(client.call("slow", number, 0.001) for number in range(20))) == list(range(20))
            assert [item async for item in client.stream("count", 100)] == list(range(100))
            big = "x" * 500_000
            assert await flowcoro.when_all(*(client.call("fast", big) for _ in range(4))) == [big] * 4
        await server.close()

    flowcoro.run(main())


def test_standard_streams_serve_who_has_started_the_program():
    program = ("import flowcoro, flowcoro_rpc as r\nserver = r.RpcServer()\nserver.method(lambda a: a, name='echo')\n"
               "async def main():\n    await server.serve_connection(r.StandardStreams(), framing=r.ContentLength)\n"
               "flowcoro.run(main())")
    big = "x" * 300_000                 # more than a pipe holds
    messages = b"".join(flowcoro_rpc.ContentLength.frame(encode_request("echo", [big], number)) for number in range(5))
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], input=messages, capture_output=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": os.path.dirname(flowcoro_rpc.__file__)})
    received, answers = flowcoro_rpc.ContentLength(), []
    received.receive_data(done.stdout)
    while (message := received.next_message()) is not flowcoro_rpc.NEED_DATA:
        answers.append(read_message(message))
    assert (done.returncode, done.stderr) == (0, b"") and answers == [Response(number, big, None) for number in range(5)]
