"""rpc.discover: the OpenRPC document against the meta-schema of OpenRPC, which is in foreign/openrpc_meta_schema.json.

That file is version 1.14.9 of @open-rpc/meta-schema, as it is; its licence is Apache 2.0, beside it. What it refers to of JSON
Schema itself is not looked at here, but in test_rpc_foreign.py, by the library jsonschema where that is installed.
"""

import copy
import dataclasses
import enum
import functools
import json
import pathlib
import re
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import pytest

import flowcoro
import flowcoro_rpc
from flowcoro_rpc import Peer, RpcServer

META_SCHEMA = json.loads((pathlib.Path(__file__).parent / "foreign" / "openrpc_meta_schema.json").read_text(encoding="utf-8"))


class Color(enum.Enum):
    RED, GREEN = "red", "green"


@dataclasses.dataclass
class Item:
    """Something on a shelf."""

    name: str
    price: float = 1.0
    color: Color = Color.RED
    parts: list["Item"] = dataclasses.field(default_factory=list)


class Shelf:
    def put(self, item: Item, *, where: Annotated[int, "counted from the left"] = 0) -> None:
        """Put something there."""

    def find(self, words: list[str], /, kind: Literal["exact", "near"] | None = None) -> dict[str, Item]:
        """Find things.

        Those that have all the words.
        And so on.
        """


def shop():
    server = RpcServer(title="A shop", version="2.1")
    server.add(Shelf(), prefix="shelf.")

    @server.method
    async def add(a: int, b: int = 1) -> int:
        return a + b

    @server.method
    async def anything(peer: Peer, thing, *rest: int, **more: str):
        pass

    @server.method("täg \"quoted\"")
    async def odd():
        pass

    @server.method
    async def count(to: int) -> AsyncIterator[int]:
        """A stream of numbers."""
        yield to

    return server


def discovered(server):
    """The document as a client gets it."""
    async def main():
        listening = await server.start_tcp_server(0)
        async with await flowcoro_rpc.RpcClient.connect(*listening.local) as client:
            document = await client.call("rpc.discover")
        await server.close()
        return document

    return flowcoro.run(main())


# ---- the part of JSON Schema, draft 7, that the meta-schema is written in ---------------------------------------------

KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float),
         "integer": int}
CHECKED = {"type", "enum", "minLength", "required", "properties", "patternProperties", "additionalProperties", "items",
           "additionalItems", "oneOf", "$ref"}
SAID = {"$schema", "$id", "title", "description", "default", "format", "definitions"}       # which forbids nothing here


def faults(value, schema, path="$"):
    """What is wrong with a value: a list of texts."""
    if schema in (True, False):
        return [] if schema else [f"{path}: nothing is allowed here"]
    assert schema.keys() <= CHECKED | SAID
    if "$ref" in schema:
        where, _, pointer = schema["$ref"].partition("#")
        if where:                       # JSON Schema's own
            return [] if isinstance(value, (dict, bool, str)) else [f"{path}: no JSON Schema"]
        target = META_SCHEMA
        for name in pointer.strip("/").split("/"):
            target = target[name]
        return faults(value, target, path)
    found = []
    if "type" in schema and (not isinstance(value, KINDS[schema["type"]])
                             or isinstance(value, bool) and schema["type"] != "boolean"):
        return [f"{path}: {value!r:.40} is no {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path}: {value!r:.40} is none of {schema['enum']}")
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        found.append(f"{path}: too short")
    if "oneOf" in schema and (count := sum(not faults(value, one, path) for one in schema["oneOf"])) != 1:
        found.append(f"{path}: {count} of {len(schema['oneOf'])} schemas hold, where one has to")
    if isinstance(value, list):
        assert "additionalItems" not in schema or isinstance(schema.get("items"), (list, dict, type(None)))
        if isinstance(schema.get("items"), dict):
            found += [fault for place, one in enumerate(value) for fault in faults(one, schema["items"], f"{path}[{place}]")]
    if isinstance(value, dict):
        found += [f"{path}: {name} is missing" for name in schema.get("required", []) if name not in value]
        for name, one in value.items():
            rules = [schema.get("properties", {})[name]] if name in schema.get("properties", {}) else []
            rules += [rule for pattern, rule in schema.get("patternProperties", {}).items() if re.search(pattern, name)]
            for rule in rules or [schema.get("additionalProperties", True)]:
                found += faults(one, rule, f"{path}.{name}")
    return found


@pytest.mark.parametrize("make", [RpcServer, shop])
def test_the_document_is_one_of_openrpc(make):
    assert faults(discovered(make()), META_SCHEMA) == []


SPOILT = {
    "no version": lambda document: document.pop("openrpc"),
    "another version": lambda document: document.update(openrpc="9.9.9"),
    "no methods": lambda document: document.pop("methods"),
    "no title": lambda document: document["info"].pop("title"),
    "another member": lambda document: document.update(more=1),
    "a method without a name": lambda document: document["methods"][0].pop("name"),
    "a method without params": lambda document: document["methods"][0].pop("params"),
    "params by name": lambda document: document["methods"][0].update(params={}),
    "a parameter without a schema": lambda document: document["methods"][0]["params"][0].pop("schema"),
    "another structure": lambda document: document["methods"][0].update(paramStructure="any"),
    "required as a text": lambda document: document["methods"][0]["params"][0].update(required="yes"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_this_check_finds_what_is_none(spoil):
    document = copy.deepcopy(shop().discover())
    spoil(document)
    assert faults(document, META_SCHEMA)


def test_the_document_says_what_the_signatures_say():
    document = discovered(shop())
    assert document["info"] == {"title": "A shop", "version": "2.1"}
    methods = {method["name"]: method for method in document["methods"]}
    assert list(methods) == sorted(["add", "anything", "count", "shelf.find", "shelf.put", "täg \"quoted\""])
    a, b = methods["add"]["params"]
    assert (a, b["required"]) == ({"name": "a", "required": True, "schema": {"type": "integer"}}, False)
    assert methods["add"]["result"]["schema"] == {"type": "integer"} and "summary" not in methods["add"]
    find = methods["shelf.find"]
    assert (find["summary"], find["description"]) == ("Find things.", "Those that have all the words.\nAnd so on.")
    assert find["paramStructure"] == "by-position" and methods["shelf.put"]["paramStructure"] == "by-name"
    assert methods["anything"]["params"][0]["name"] == "thing"          # who calls gives no peer
    assert methods["count"]["result"]["schema"] == {"type": "array", "items": {"type": "integer"}}
    item = document["components"]["schemas"]["Item"]
    assert item["properties"]["price"] == {"type": "number", "default": 1.0} and item["required"] == ["name"]
    for reference in re.findall(r'"\$ref": "([^"]*)"', json.dumps(document)):
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


def test_parameters_are_described_as_they_can_be_given_those_that_must_be_first():
    """Each description is tried: what it says is given so, all of it and what is required of it."""
    server = RpcServer()
    for number, function in enumerate([
            lambda a=1, *, b: 0, lambda a=1, /, *, b: 0, lambda a, b=1, /, *, c=2: 0, lambda a, b=1, /, c=2: 0,
            lambda a=1, /, b=2, *, c=3: 0, lambda a, b, *, c, d=1, e: 0, lambda a, b=1: 0, lambda *, a=1, b: 0]):
        server.method(function, name=f"f{number}")

    async def main():
        for method in server.discover()["methods"]:
            params, structure = method["params"], method["paramStructure"]
            required = [one["name"] for one in params if one["required"]]
            assert [one["required"] for one in params] == sorted((one["required"] for one in params), reverse=True)
            for names in required, [one["name"] for one in params]:
                ways = {"by-position": [[0] * len(names)], "by-name": [dict.fromkeys(names, 0)]}
                for given in ways.get(structure) or sum(ways.values(), []):
                    answer = await server.answer(flowcoro_rpc.encode_request(method["name"], given, 1))
                    assert json.loads(answer).get("result") == 0, (method, given)

    flowcoro.run(main())


def test_a_partial_is_described_by_its_function():
    def add(a: int, b: int):
        """A sum."""

    server = RpcServer()
    server.method(functools.partial(add, 1), name="increment")
    assert server.discover()["methods"][0]["summary"] == "A sum."


def test_a_server_need_not_say_what_it_has():
    with pytest.raises(flowcoro_rpc.MethodNotFound):
        discovered(RpcServer(discover=False))
