"""JSON as it is taken, and annotations as checks and as schemas, without a server. tests/test_http_openapi.py has the rest."""

import collections
import dataclasses
import datetime
import decimal
import enum
import json
import math
import random
import signal
import sys
import threading
import typing
import uuid

import pytest

import flowcoro_schema
from flowcoro_schema import JsonError, SchemaError, Schemas, encode_json, kind_of, load_json


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Node:
    """A node of a list."""

    value: int
    next: "Node | None" = None


@dataclasses.dataclass
class Everything:
    text: str
    number: float
    flag: bool
    colour: Colour
    when: datetime.datetime
    day: datetime.date
    key: uuid.UUID
    price: decimal.Decimal
    letters: list[typing.Literal["a", "b"]]
    nodes: dict[str, Node]
    note: typing.Annotated[str | None, "what to say"] = None


# ---- JSON -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, why", [
    (b"", "Expecting value"), (b"{", "property name"), (b"[1] 2", "Extra data"), (b"NaN", "NaN is no JSON"),
    (b"[-Infinity]", "-Infinity is no JSON"),
    (b"[1e400]", "beyond what a float holds"), (b'{"a": 1, "a": 2}', "same name twice"), (b'{"b": {"a": 1, "a": 1}}', "twice"),
    (b'"\xff"', "not UTF-8 at byte 1"), (b'"\\ud800"', "half of a surrogate pair"), (b'{"\\udc00": 1}', "half of a surrogate"),
    (b'"\t"', "control character"), (b"01", "Extra data"), (b"[1,]", "Expecting|trailing"), (b"\xef\xbb\xbf1", "BOM|Expecting"),
    ("[" * 65 + "]" * 65, "more than 64 arrays"), ("[" * 100_000, "arrays|Expecting"), ("9" * 5000, "digit")])
def test_what_is_no_json_is_refused_with_the_reason(text, why):
    with pytest.raises(JsonError, match=why):
        load_json(text)


def test_what_is_json_is_taken_as_it_is():
    assert load_json(b' {"a": [1, 2.5, -0, true, null, "\\u00e4\\ud83d\\ude00"]} ') == {"a": [1, 2.5, 0, True, None, "ä😀"]}
    assert load_json("[" * 64 + "]" * 64) and load_json("[[" + "[]," * 100 + "[]]]")
    assert load_json('"' + "[{" * 100 + '"') == "[{" * 100
    with pytest.raises(JsonError, match="more than 1 "):
        load_json("[[]]", max_depth=1)


def test_encoded_values_come_back():
    chance = random.Random(1)

    def draw(depth):
        kind = chance.randrange(4 if depth else 3)
        if kind == 3:
            return [draw(depth - 1) for _ in range(3)] if chance.random() < 0.5 else {
                f"{number}é": draw(depth - 1) for number in range(3)}
        return chance.choice([None, True, chance.randrange(-2**64, 2**64), chance.random(), "\x00\u2028😀\"\\"])

    for _ in range(100):
        value = draw(4)
        assert load_json(encode_json(value)) == value == json.loads(encode_json(value))


@pytest.mark.parametrize("value, error", [(math.nan, ValueError), ([math.inf], ValueError), (object(), TypeError),
                                          ({1, 2}, TypeError), (b"", TypeError)])
def test_what_has_no_json_is_refused(value, error):
    with pytest.raises(error):
        encode_json(value)


@pytest.mark.parametrize("seed", range(20))
def test_texts_of_any_length_are_written_as_the_standard_library_writes_them(seed):
    chance = random.Random(seed)
    for _ in range(50):
        letters = chance.choice(["abc", "aé", "a\u2028😀", "\x7f\x80\x85", "a/'&<"])
        text = "".join(chance.choices(letters, k=chance.choice([0, 1, *range(120, 136), 1000])))
        if text and chance.random() < 0.7:
            at = chance.randrange(len(text))
            text = text[:at] + chr(chance.choice([*range(0x20), 0x22, 0x5C, 0x7F, 0xD800, 0xDFFF])) + text[at + 1:]
        assert encode_json(text) == json.dumps(text, ensure_ascii=False)
        assert encode_json([text, {text: text}]) == json.dumps([text, {text: text}], ensure_ascii=False, separators=(",", ":"))


def test_without_the_encoder_in_c_the_same_is_written(monkeypatch):
    values = [{"a": [1.5, None, "é", Colour.RED]}, "x", 3]
    quick = [encode_json(value) for value in values]
    monkeypatch.setattr(flowcoro_schema, "_json_chunks", None)
    assert [encode_json(value) for value in values] == quick


# ---- what an annotation takes ---------------------------------------------------------------------------------

def everything():
    return Everything("x", 2.5, True, Colour.BLUE, datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc),
                      datetime.date(2024, 2, 29), uuid.UUID(int=7), decimal.Decimal("9.99"), ["a", "b"],
                      {"first": Node(1, Node(2))}, "n")


def json_by_hand(chance, depth, twice):
    """(text, has a name twice) of a random value, written with whitespace and escapes wherever they may be."""
    def space():
        return chance.choice(["", "", "", " ", "\n", "\t", "\r", "  "])

    def name():
        return chance.choice(["a", "b", "c", ":", "a:", '\\":', "\\u0061", "\\u003a", " :", "", "é"])

    def value(depth):
        kind = chance.randrange(6 if depth else 3)
        if kind < 3:
            return chance.choice(["1", "null", '"x"', f'"{name()}"', '"12:30"', '"a\\":b"', "-1.5e3"])
        if kind == 3:
            return "[" + ",".join(space() + value(depth - 1) + space() for _ in range(chance.randrange(4))) + "]"
        names = [name() for _ in range(chance.randrange(5))]
        if not twice:
            names = list({json.loads(f'"{one}"'): one for one in names}.values())
        decoded = [json.loads(f'"{one}"') for one in names]
        found.append(len(set(decoded)) < len(decoded))
        return "{" + ",".join(f'{space()}"{one}"{space()}:{space()}{value(depth - 1)}{space()}' for one in names) + "}"

    found = []
    return value(depth), any(found)


@pytest.mark.parametrize("seed", range(40))
def test_a_name_twice_is_found_wherever_it_is_and_nothing_else_is_taken_for_one(seed):
    chance, seen = random.Random(seed), collections.Counter()
    for number in range(100):
        text, has_twice = json_by_hand(chance, 4, chance.random() < 0.5)
        seen[has_twice] += 1
        if has_twice:
            with pytest.raises(JsonError, match="same name twice"):
                load_json(text)
        else:
            assert load_json(text.encode()) == json.loads(text)
    assert len(seen) == 2


@pytest.mark.parametrize("before", ["", " ", "\n\n"])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}"), ('{"b":1,"a":', "}"), ('[{"a":', "}]")])
def test_depth_is_exact_also_with_whitespace_before_it(opening, closing, before):
    for depth in range(1, 30):
        text = before + opening * depth + "1" + closing * depth
        deep = depth * len(closing)
        assert load_json(text, max_depth=deep) == json.loads(text)
        with pytest.raises(JsonError, match="in each other"):
            load_json(text, max_depth=deep - 1)


def test_json_is_read_by_many_threads_at_once_and_by_a_signal_handler_meanwhile():
    text = json.dumps([{"a": number, "b": {"c": [number]}} for number in range(200)])
    bad = text[:-1] + ',{"a":1,"a":2}]'

    def read():
        for _ in range(30):
            if load_json(text) != value:
                wrong.append("another value")
        load_json(bad)

    def handler(number, frame):
        handled.append(load_json(text) == value)

    value, wrong, handled = json.loads(text), [], []

    def attempt():
        try:
            read()
        except JsonError as error:
            wrong.append("same name twice" not in str(error))

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    before, interval = signal.signal(signal.SIGALRM, handler), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for thread in threads:
            thread.start()
        while len(handled) < 5:
            assert load_json(text) == value
        for thread in threads:
            thread.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.setswitchinterval(interval)
    assert wrong == [False] * 4 and all(handled)


class Struck(Exception):
    pass


def test_an_error_that_a_signal_handler_raises_while_json_is_read_is_not_lost():
    def handler(number, frame):
        if frame.f_code is flowcoro_schema._count_names.__code__:
            raise Struck

    text = json.dumps([{"a": number} for number in range(2000)])
    before, struck = signal.signal(signal.SIGALRM, handler), 0
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    try:
        for _ in range(2000):
            try:
                assert len(load_json(text)) == 2000
            except Struck:
                struck += 1
                if struck == 3:
                    break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert struck == 3 and len(load_json(text)) == 2000


def test_what_is_written_is_read_back():
    assert kind_of(Everything).load(load_json(encode_json(everything()))) == everything()


def test_all_that_is_wrong_is_said_at_once_with_its_place():
    value = load_json(encode_json(everything()))
    value.update(text=1, flag="true", colour="green", price=9.99, letters=["a", "c"])
    value["nodes"]["a/b~c"] = {"value": 1.5, "more": 1}
    del value["key"]
    with pytest.raises(SchemaError) as caught:
        kind_of(Everything).load(value)
    assert {error["path"]: error["got"] for error in caught.value.errors} == {
        "/text": "1", "/flag": 'the string "true"', "/colour": 'the string "green"', "/price": "9.99",
        "/letters/1": 'the string "c"', "/nodes/a~1b~0c/value": "1.5", "/nodes/a~1b~0c/more": "1", "/key": "nothing"}
    assert "/text: expected a string, got 1" in str(caught.value)


def test_errors_that_are_kept_are_bounded_and_all_are_counted():
    errors = flowcoro_schema.Errors(3, "params")
    kind_of(list[int]).check(["x"] * 10, None, errors)
    assert errors.count == 10 and len(errors.first) == 3
    assert errors.first[0] == {"in": "params", "path": "/0", "expected": "an integer", "got": 'the string "x"'}


@pytest.mark.parametrize("annotation", [set, dict[int, str], list[bytes], typing.Literal[1.5], complex,
                                        list[int] | list[str], typing.Callable])
def test_an_annotation_that_no_json_fits_is_refused_where_it_is_read(annotation):
    with pytest.raises(TypeError, match="of the handler"):
        kind_of(annotation, "the parameter of the handler")


def test_a_dataclass_may_have_fields_of_its_own_type():
    value = {"value": 0}
    for number in range(1, 50):
        value = {"value": number, "next": value}
    node = kind_of(Node).load(value)
    assert [node.value, node.next.value] == [49, 48]


# ---- schemas --------------------------------------------------------------------------------------------------

def test_a_schema_says_what_is_checked_and_refers_to_dataclasses_once():
    schemas = Schemas(at="#/$defs")
    assert kind_of(dict[str, Node]).schema(schemas) == {"type": "object", "additionalProperties": {"$ref": "#/$defs/Node"}}
    assert schemas.schemas == {"Node": {
        "type": "object", "description": "A node of a list.", "required": ["value"], "additionalProperties": False,
        "properties": {"value": {"type": "integer"},
                       "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}], "default": None}}}}
    kind_of(Everything).schema(schemas)
    assert list(schemas.schemas) == ["Node", "Everything"]
    assert schemas.schemas["Everything"]["properties"]["note"] == {
        "anyOf": [{"type": "string"}, {"type": "null"}], "description": "what to say", "default": None}


def test_two_dataclasses_of_one_name_have_two_schemas():
    @dataclasses.dataclass
    class Node:
        text: str

    schemas = Schemas({"given": {}})
    kind_of(list[Node]).schema(schemas)
    kind_of(globals()["Node"]).schema(schemas)
    assert len(schemas.schemas) == 3 and "given" in schemas.schemas
