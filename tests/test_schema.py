"""JSON as it is taken, and annotations as checks and as schemas, without a server. tests/test_http_openapi.py has the rest."""

import dataclasses
import datetime
import decimal
import enum
import json
import math
import random
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
