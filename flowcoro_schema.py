"""flowcoro_schema 0.1.0: JSON as strict as its RFC, and annotations that check values and write themselves as JSON Schema.

To vendor, copy: flowcoro_schema.py

Example:

    import dataclasses
    import flowcoro_schema

    @dataclasses.dataclass
    class Item:
        name: str
        price: float = 0.0

    items = flowcoro_schema.kind_of(list[Item])
    print(items.load(flowcoro_schema.load_json(b'[{"name": "tea"}]')))
    print(items.schema(flowcoro_schema.Schemas()))

Contents: constants · errors · JSON · what an annotation takes · schemas

How it works:

An annotation is read once, by kind_of(), into an object that knows two things: to check a value of JSON, or a text, and to write
itself as JSON Schema (2020-12). So what is documented is what is checked.

Checking is strict: no value is made into another type but those that JSON does not have and that are written as a string
(datetime, date, UUID, Decimal), an integer where a number is wanted, and a text where a text was all there could be. It collects
what is wrong instead of ending at the first. It is linear in the value: of a union one member is chosen, by the type of the value
and the names of its fields, and never are two tried in depth (which, nested, would be two to the power of the depth).

There is no input and no output here, and no clock: flowcoro_http reads bodies and queries with it, flowcoro_rpc parameters.

Errors:

    ValueError
      JsonError         a text that is no JSON, names something twice, or is too deep
      SchemaError       a value that is not what an annotation asks for, with all that is wrong
    TypeError           an annotation that no JSON can be made into; a value that has no JSON

Sources: RFC 8259 (JSON), RFC 7493 section 2.3 (no name twice), RFC 6901 (JSON Pointer), JSON Schema 2020-12.

What it does not do: formats, ranges and patterns of one's own (a dataclass's __post_init__ may raise ValueError instead); schemas
that are not made from annotations.

SPDX-License-Identifier: MIT
"""

import dataclasses
import datetime
import decimal
import enum
import inspect
import itertools
import json
import math
import re
import types
import typing
import uuid

__version__ = "0.1.0"

__all__ = ["load_json", "encode_json", "json_default", "kind_of", "Kind", "Anything", "Scalar", "Array", "Mapping", "Object",
           "Union", "Field", "Schemas", "Errors", "JsonError", "SchemaError", "as_text", "bare",
           "description_of", "MISSING", "JSON_DEPTH", "ERRORS", "DIGITS"]


# ---- constants ------------------------------------------------------------------------------------------------

# Arrays and objects in each other at most: what people write has ten, and the stack of a recursive validator, or of whoever walks
# through the value afterwards, has room for hundreds.
JSON_DEPTH = 64

# Errors that are kept at most, and characters of a path or of a value in one.
ERRORS, ERROR_PATH, ERROR_VALUE = 50, 200, 60

# Digits of an integer that is read from a text at most, and of a number before and after its point: 64 bits have 20.
DIGITS = 20

# Characters of a text from which on it is quicker to look whether it has to be escaped than to copy it letter by letter.
LONG_TEXT = 128

MISSING = object()              # the default of a Field that must be given

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]").search


# ---- errors ---------------------------------------------------------------------------------------------------

class JsonError(ValueError):
    """A text that is no JSON, or not such as is taken here; the message says why, and where."""


class SchemaError(ValueError):
    """A value is not what an annotation asks for. `errors`: what is wrong, as Errors.first has it."""

    def __init__(self, errors):
        super().__init__("; ".join(f"{error['path'] or 'the value'}: expected {error['expected']}, got {error['got']}"
                                   for error in errors[:3]))
        self.errors = errors


# ---- JSON -----------------------------------------------------------------------------------------------------

def _no_name_twice(pairs):
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has the same name twice")
    return value


def _no_constant(text):
    raise ValueError(f"{text} is no JSON")


def _finite(value):
    value = float(value)
    if not math.isfinite(value):
        raise ValueError("a number is beyond what a float holds")
    return value


# Made once: json.loads() would make a decoder each time that it is given a hook, 4 µs.
_DECODER = json.JSONDecoder(object_pairs_hook=_no_name_twice, parse_constant=_no_constant, parse_float=_finite)
_scan_json = _DECODER.scan_once


# No name twice, for less: the pairs of an object, and a call for each, take 0.25 µs. So where there are several objects, names
# are counted. There are at least as many colons as names written, and at least as many of these as names in the objects. If the
# first number is the last, none is there twice. Else, as colons are in texts too, what is counted is '":', of which there are as
# many as names where no whitespace is between; else it is read once more, by pairs. 1 KiB with 15 objects: 7.2 instead of 9.7 µs.

def _count_names():
    """A generator: send() takes an object and gives it back; None: gives (names, objects) since the last time."""
    names, objects, got = 0, 0, None
    while True:
        got = yield got
        if got is None:
            got, names, objects = (names, objects), 0, 0
        else:
            names += len(got)
            objects += 1


class _Counter:
    """One that reads JSON and counts; for one reader at a time."""

    __slots__ = ("scan", "count")

    def __init__(self):
        self.count = _count_names().send
        self.count(None)
        self.scan = json.JSONDecoder(object_hook=self.count, parse_constant=_no_constant, parse_float=_finite).scan_once


_counters = []          # that nobody uses: pop() and append() are atomic, so there are as many as threads read at a time


def _scan_many(text):
    """(value, its end, how many objects are in it) of a JSON text. StopIteration and ValueError as of scan_once()."""
    try:
        counter = _counters.pop()
    except IndexError:
        counter = _Counter()
    value, end = counter.scan(text, 0)          # an error, also a signal handler's within the count, ends this counter
    names, objects = counter.count(None)
    _counters.append(counter)
    if text.count(":") != names and (any(space in text for space in (" :", "\n:", "\t:", "\r:")) or text.count('":') != names):
        value, end = _scan_json(text, 0)
    return value, end, objects


def load_json(data, *, max_depth=JSON_DEPTH):
    """The value of a JSON text (RFC 8259): bytes in UTF-8, or a str. JsonError if it is none, names something twice, is too deep.

    max_depth: arrays and objects in each other. NaN and infinities are no JSON, and 1e400 would be one; half of a surrogate pair
    is refused as well.
    """
    try:
        text = data.decode() if data.__class__ is bytes or not isinstance(data, str) else data
        try:
            if text.rfind("{") > 0 and text.find("{", text.find("{", 1) + 1) > 0:       # there are more than two
                value, end, objects = _scan_many(text)
            else:
                (value, end), objects = _scan_json(text, 0), 2
        except StopIteration:               # no value begins there
            end, objects = -1, text.count("{")
        if end != len(text) and (end < 0 or text[end:].strip(" \t\n\r")):       # whitespace before it, or it is wrong
            value = _DECODER.decode(text)
        # Arrays are counted where there are several: to look for one takes 0.05 µs in 1 KiB, to count 0.35. To look for "\\u"
        # takes 0.9, for "\\" 0.03.
        first = text.find("[")
        if objects + (first >= 0 if text.rfind("[") == first else text.count("[")) > max_depth:
            _check_depth(value, max_depth)
        if "\\" in text and _SURROGATE(text):
            json.dumps(value, ensure_ascii=False).encode()          # half of a pair cannot be encoded, here or by who asks
    except UnicodeEncodeError:
        raise JsonError("a string has half of a surrogate pair") from None
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise JsonError(f"it has more than {max_depth} arrays and objects in each other") from None
    except ValueError as error:
        raise JsonError(str(error)[:100]) from None
    return value


def _check_depth(value, max_depth):
    level = [value]
    for _ in range(max_depth):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
    if any(isinstance(inner, (dict, list)) for inner in level):
        raise RecursionError


def json_default(value):
    """For json.dumps(default=): dataclass, Enum, datetime, date, UUID and Decimal as typed handlers read them; else TypeError."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, datetime.datetime):
        text = value.isoformat()
        return text.removesuffix("+00:00") + "Z" if text.endswith("+00:00") else text
    if isinstance(value, datetime.date):
        return value.isoformat()
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    raise TypeError(f"{type(value).__qualname__} has no JSON: {value!r:.80}{', not awaited' * inspect.isawaitable(value)}")


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=json_default)
if json.encoder.c_make_encoder is not None:
    # The same without what encode() makes anew each time: 2.3 of 10.8 µs for 1 KiB. What contains itself is a RecursionError.
    _json_chunks = json.encoder.c_make_encoder(None, json_default, json.encoder.encode_basestring, None, ":", ",",
                                               False, False, False)
else:
    _json_chunks = None
_json_of_text = json.encoder.encode_basestring
# Turns each byte that JSON escapes into another one.
_ESCAPED = bytes(byte ^ 0x80 if byte < 0x20 or byte in b'"\\' else byte for byte in range(256))


def encode_json(value):
    """The JSON of a value, a str without spaces. ValueError for NaN and infinities, TypeError for what json_default() refuses."""
    if value.__class__ is str:
        # A long text in which nothing is escaped, 1 KiB in 0.6 instead of 1.3 µs: translate() gives back what it does not change.
        # Most that need escapes are found by the first three, at once.
        if len(value) >= LONG_TEXT and '"' not in value and "\n" not in value and "\\" not in value:
            try:
                data = value.encode()
            except UnicodeEncodeError:
                return _json_of_text(value)
            if data.translate(_ESCAPED) is data:
                return f'"{value}"'
        return _json_of_text(value)
    return "".join(_json_chunks(value, 0)) if _json_chunks is not None else _ENCODER.encode(value)


# ---- what an annotation takes ---------------------------------------------------------------------------------

class Errors:
    """What is wrong so far: `count` of all, and the `first` of them, at most `most`, as dicts of strings.

    "in": the place, as given; "path": a JSON Pointer (RFC 6901), such as "/items/0/price", "" for the whole; "expected"; "got".
    """

    def __init__(self, most=ERRORS, place="body"):
        self.count, self.first, self.most, self.place = 0, [], most, place

    def add(self, at, expected, value):
        """at: None is the whole, (place, key) what is in it. value: what came, MISSING for nothing."""
        self.add_named(_pointer(at) if len(self.first) < self.most else "", self.place, expected, value)

    def add_named(self, path, place, expected, value):
        """As add(), for what has a name and no pointer: a parameter of a query, say."""
        self.count += 1
        if len(self.first) < self.most:
            self.first.append({"in": place, "path": path, "expected": expected, "got": _came(value)})


def _pointer(at):
    """The JSON Pointer of a place: None is the whole, (place, key) what is in it."""
    keys = []
    while at is not None:
        at, key = at
        keys.append(str(key)[:ERROR_PATH].replace("~", "~0").replace("/", "~1"))
    pointer = "".join(["/" + key for key in reversed(keys)])
    return pointer if len(pointer) <= ERROR_PATH else pointer[:ERROR_PATH] + "…"


def _came(value):
    """A value that came, as a message names it."""
    if value is MISSING:
        return "nothing"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, str):
        text = json.dumps(value[:ERROR_VALUE], ensure_ascii=False)
        return f"the string {text}" if len(value) <= ERROR_VALUE else f"the string {text}… of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= ERROR_VALUE else text[:ERROR_VALUE] + "…"


def as_text(value):
    """The text that a Scalar's read() takes for this value: of a path or a query."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (datetime.datetime, datetime.date)):
        return value.isoformat()
    return str(value)


class Kind:
    """What an annotation takes, made by kind_of(). `expected` says it in words."""

    def check(self, value, at, errors):
        """The value as the annotation has it; what is wrong is added to `errors`, an Errors, and the value does not matter then.

        at: where it is, None or (place, key), for the messages.
        """
        raise NotImplementedError

    def schema(self, schemas):
        """The JSON Schema, a new dict, in which dataclasses are references to `schemas`, a Schemas."""
        raise NotImplementedError

    def load(self, value):
        """check() of a whole value. SchemaError."""
        errors = Errors()
        value = self.check(value, None, errors)
        if errors.count:
            raise SchemaError(errors.first)
        return value


class Anything(Kind):
    """Any, object, and what is in a plain list or dict."""

    expected = "anything"

    def check(self, value, at, errors):
        return value

    def schema(self, schemas):
        return {}


class Scalar(Kind):
    """One value: of these types of JSON, converted by a function that raises ValueError or ArithmeticError; read from text."""

    def __init__(self, expected, schema, types, convert=None, read=str, order=0):
        self.expected, self.types, self.convert, self._read, self._schema = expected, types, convert, read, schema
        self.order = order          # in a union: a str takes all that others take too, so it is last
        self.is_literal = False

    def take(self, value):
        """The value as the annotation has it. ValueError, ArithmeticError."""
        if type(value) not in self.types:
            raise ValueError
        return value if self.convert is None else self.convert(value)

    def read(self, text):
        """The value of a text: of a path or a query. ValueError, ArithmeticError."""
        return self.take(self._read(text))

    def check(self, value, at, errors):
        try:
            return self.take(value)
        except (ValueError, ArithmeticError):
            errors.add(at, self.expected, value)

    def schema(self, schemas):
        return dict(self._schema)


def _matching(pattern, convert):
    """A function that converts texts which match, and raises ValueError for others."""
    matches = re.compile(pattern).fullmatch

    def take(text):
        if not matches(text):
            raise ValueError
        return convert(text)
    return take


_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def _one_of(values, converted):
    """A Scalar for some values only; 1, 1.0 and True are different ones."""
    table = {(type(value), value): result for value, result in zip(values, converted)}
    texts = {as_text(value): value for value in values}

    def pick(where, key):
        if key not in where:
            raise ValueError
        return where[key]
    names = {_JSON_TYPES[type(value)] for value in values}
    schema = {"enum": list(values)} if len(names) > 1 else {"type": min(names), "enum": list(values)}
    return Scalar(" or ".join(map(json.dumps, values))[:ERROR_PATH], schema, {type(value) for value in values},
                   lambda value: pick(table, (type(value), value)), lambda text: pick(texts, text))


_DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_SCALARS = {
    str: Scalar("a string", {"type": "string"}, {str}, order=2),
    bool: Scalar("true or false", {"type": "boolean"}, {bool}, read=_matching("true|false", "true".__eq__)),
    int: Scalar("an integer", {"type": "integer"}, {int}, read=_matching(rf"-?[0-9]{{1,{DIGITS}}}", int)),
    float: Scalar("a number", {"type": "number"}, {int, float}, _finite, _matching(
        rf"-?[0-9]{{1,{DIGITS}}}(?:\.[0-9]{{1,{DIGITS}}})?(?:[eE][+-]?[0-9]{{1,3}})?", float), order=1),
    type(None): Scalar("null", {"type": "null"}, {type(None)}),
    datetime.datetime: Scalar(
        "a date and time with its offset, such as 2024-02-29T12:30:00Z", {"type": "string", "format": "date-time"}, {str},
        _matching(_DATE + r"T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,9})?(?:Z|[+-][0-9]{2}:[0-9]{2})",
                  datetime.datetime.fromisoformat)),
    datetime.date: Scalar("a date, such as 2024-02-29", {"type": "string", "format": "date"}, {str},
                           _matching(_DATE, datetime.date.fromisoformat)),
    uuid.UUID: Scalar("a UUID", {"type": "string", "format": "uuid"}, {str},
                       _matching(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", uuid.UUID)),
    decimal.Decimal: Scalar("a decimal number as a string, such as \"9.99\"",
                             {"type": "string", "pattern": r"^-?[0-9]{1,40}(\.[0-9]{1,40})?$"}, {str},
                             _matching(r"-?[0-9]{1,40}(?:\.[0-9]{1,40})?", decimal.Decimal)),
}


class Array(Kind):
    """list[...]."""

    expected = "an array"

    def __init__(self, item):
        self.item = item

    def check(self, value, at, errors):
        if type(value) is not list:
            return errors.add(at, self.expected, value)
        check = self.item.check
        return [check(item, (at, number), errors) for number, item in enumerate(value)]

    def schema(self, schemas):
        return {"type": "array", "items": self.item.schema(schemas)}


class Mapping(Kind):
    """dict[str, ...]."""

    expected = "an object"

    def __init__(self, item):
        self.item = item

    def check(self, value, at, errors):
        if type(value) is not dict:
            return errors.add(at, self.expected, value)
        check = self.item.check
        return {name: check(item, (at, name), errors) for name, item in value.items()}

    def schema(self, schemas):
        return {"type": "object", "additionalProperties": self.item.schema(schemas)}


@dataclasses.dataclass
class Field:
    """A field of a dataclass, or a parameter that is taken from the query or the body."""

    name: str
    kind: object
    description: str
    default: object         # MISSING: it must be given

    def schema(self, schemas):
        """That of its kind, with its description, and its default if that has a JSON."""
        schema = self.kind.schema(schemas)
        if self.description:
            schema["description"] = self.description
        try:
            if self.default is not MISSING:
                default = json.loads(json.dumps(self.default, default=json_default, allow_nan=False))
                errors = Errors(0)
                self.kind.check(default, None, errors)
                if not errors.count:            # None of a parameter that is no Optional is nothing that can be sent
                    schema["default"] = default
        except (TypeError, ValueError):
            pass                    # it has no JSON: a default_factory, say
        return schema


class Object(Kind):
    """A dataclass."""

    def __init__(self, cls, said, seen):
        seen[cls] = self                        # first: it may have fields of its own type
        self.cls, self.expected = cls, f"an object ({cls.__name__})"
        said = f"{said}, {cls.__qualname__}"
        try:
            hints = typing.get_type_hints(cls, localns={cls.__name__: cls}, include_extras=True)
        except NameError as error:
            raise TypeError(f"{said}: {error}; annotations are looked up in the module of the class") from None
        if any(isinstance(hint, dataclasses.InitVar) for hint in hints.values()):
            raise TypeError(f"{said}: a dataclass with an InitVar cannot be filled from JSON")
        self.fields = {}
        for field in dataclasses.fields(cls):
            if field.init:
                default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory
                self.fields[field.name] = Field(
                    field.name, _kind(hints[field.name], f"{said}.{field.name}", seen), description_of(hints[field.name]),
                    MISSING if default is dataclasses.MISSING else default)
        self.required = {name for name, field in self.fields.items() if field.default is MISSING}
        self._checks = [(name, field.kind.check, name in self.required) for name, field in self.fields.items()]

    def check(self, value, at, errors):
        if type(value) is not dict:
            return errors.add(at, self.expected, value)
        before, arguments = errors.count, {}
        for name, check, required in self._checks:
            if name in value:
                arguments[name] = check(value[name], (at, name), errors)
            elif required:
                errors.add((at, name), self.fields[name].kind.expected, MISSING)
        if len(arguments) < len(value):
            for name in value:
                if name not in self.fields:
                    errors.add((at, name), "no field of this name", value[name])
        if errors.count > before:
            return None
        try:
            return self.cls(**arguments)
        except ValueError as error:             # of its __post_init__
            return errors.add(at, str(error)[:ERROR_PATH] or self.expected, value)

    def fits(self, value):
        """Whether it has the fields of this class, and the right Literal in those that are one."""
        return self.required <= value.keys() <= self.fields.keys() and self.tags_fit(value) is not False

    def tags_fit(self, value):
        """True: it has this class's Literals; False: it has others; None: the class has none."""
        tags = [field for field in self.fields.values() if isinstance(field.kind, Scalar) and field.kind.is_literal]
        for field in tags:
            try:
                if field.name in value or field.name in self.required:
                    field.kind.take(value.get(field.name, MISSING))
            except ValueError:
                return False
        return True if tags else None

    def schema(self, schemas):
        return schemas.reference(self)


class Union(Kind):
    """Optional[...], A | B: which member is decided by the type of the value, for objects by their fields."""

    def __init__(self, members, said):
        self.members = members
        self.null = _SCALARS[type(None)] in members
        self.scalars = sorted((one for one in members if isinstance(one, Scalar)), key=lambda one: one.order)
        self.objects = [one for one in members if isinstance(one, Object)]
        self.dicts = [one for one in members if isinstance(one, Mapping)]
        self.lists = [one for one in members if isinstance(one, Array)]
        if len(self.lists) > 1 or len(self.dicts) > 1:
            raise TypeError(f"{said}: a union can have one list[...] and one dict[...], since two cannot be told from each other")
        self.expected = " or ".join(one.expected for one in members)

    def check(self, value, at, errors):
        chosen = None
        if type(value) is dict:
            chosen = self._choose(value)
        elif type(value) is list:
            chosen = self.lists[0] if self.lists else None
        else:
            for scalar in self.scalars:
                try:
                    return scalar.take(value)
                except (ValueError, ArithmeticError):
                    pass
        return errors.add(at, self.expected, value) if chosen is None else chosen.check(value, at, errors)

    def _choose(self, value):
        fitting = [one for one in self.objects if one.fits(value)] or self.dicts
        if not fitting:                         # none is right; whose errors are the most useful?
            fitting = [one for one in self.objects if one.tags_fit(value)]
            if len(self.objects) == 1:
                fitting = self.objects
        return fitting[0] if fitting else None

    def read(self, text):
        """As Scalar.read(), of the first that takes it; a str is last."""
        for scalar in self.scalars:
            try:
                return scalar.read(text)
            except (ValueError, ArithmeticError):
                pass
        raise ValueError

    def schema(self, schemas):
        return {"anyOf": [one.schema(schemas) for one in self.members]}


def bare(annotation):
    """Without Annotated, NewType and the name of an alias."""
    while True:
        if typing.get_origin(annotation) is typing.Annotated:
            annotation = annotation.__origin__
        elif isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        elif type(annotation).__name__ == "TypeAliasType":          # `type X = ...`, from Python 3.12 on
            annotation = annotation.__value__
        else:
            return annotation


def description_of(annotation):
    """The first string in an Annotated[...]."""
    return next((note for note in getattr(annotation, "__metadata__", ()) if isinstance(note, str)), "")


def _kind(annotation, said, seen):
    annotation = bare(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (typing.Any, object):
        return Anything()
    if origin in (typing.Union, types.UnionType):
        members = [_kind(argument, said, seen) for argument in arguments]
        return next((one for one in members if isinstance(one, Anything)), None) or Union(members, said)
    if origin is typing.Literal:
        return _literal(arguments, said)
    if annotation is list or origin is list:
        return Array(_kind(arguments[0], said, seen) if arguments else Anything())
    if annotation is dict or origin is dict:
        if arguments and bare(arguments[0]) is not str:
            raise TypeError(f"{said}: {annotation}: the names in a JSON object are strings: dict[str, ...]")
        return Mapping(_kind(arguments[1], said, seen) if arguments else Anything())
    if annotation is None:
        annotation = type(None)
    if isinstance(annotation, type):
        if annotation in _SCALARS:
            return _SCALARS[annotation]
        if dataclasses.is_dataclass(annotation) and not origin:
            return seen.get(annotation) or Object(annotation, said, seen)
        if issubclass(annotation, enum.Enum):
            return _enumeration(annotation, said)
    raise TypeError(f"{said}: no JSON is made into {annotation!r}; there are dataclasses, list[...], dict[str, ...], unions, "
                    "Literal, Enum, str, int, float, bool, None, datetime, date, UUID, Decimal and Any")


def kind_of(annotation, said="kind_of()"):
    """What checks values for an annotation, and writes its schema: a Kind.

    There are dataclasses (also with fields of their own type), list[...], dict[str, ...], unions, Literal, Enum, str, int, float,
    bool, None, datetime, date, UUID, Decimal and Any; Annotated, NewType and `type X = ...` are looked through. `said` is what
    the error of a wrong one begins with. TypeError: no JSON is made into it, or two members of a union cannot be told apart.
    """
    try:
        return _kind(annotation, said, {})
    except RecursionError:
        raise TypeError(f"{said}: the type refers to itself; only dataclasses may") from None


def _literal(values, said):
    if not all(type(value) in (str, int, bool, type(None)) for value in values):
        raise TypeError(f"{said}: a Literal has strings, integers, True, False and None")
    kind = _one_of(values, values)
    kind.is_literal = True
    return kind


def _enumeration(cls, said):
    values = [member.value for member in cls]
    if not values or not all(type(value) in _JSON_TYPES for value in values):
        raise TypeError(f"{said}: {cls.__qualname__}: the values of an Enum that comes from JSON are strings, numbers, True, "
                        "False and None")
    return _one_of(values, list(cls))


# ---- schemas --------------------------------------------------------------------------------------------------

class Schemas:
    """The schemas of the dataclasses that a document refers to: `schemas`, {name: schema}, of which some may be given.

    at: the JSON Pointer, as a fragment, of where the document has them. OpenAPI's and OpenRPC's place is the default.
    """

    def __init__(self, schemas=(), *, at="#/components/schemas"):
        self.schemas, self.at, self._names = dict(schemas), at, {}

    def reference(self, kind):
        """A reference to the schema of an Object, which is made when it is the first."""
        cls = kind.cls
        if cls not in self._names:
            name = self._names[cls] = self._free_name(cls)
            self.schemas[name] = None                   # its place, also for a field of its own type
            self.schemas[name] = self._schema(kind)
        return {"$ref": f"{self.at}/{self._names[cls]}"}

    def _free_name(self, cls):
        for name in (cls.__name__, f"{cls.__module__}.{cls.__qualname__}"):
            name = re.sub("[^A-Za-z0-9._-]", "_", name)
            if name not in self.schemas:
                return name
        return next(name for number in itertools.count(2) if (name := f"{cls.__name__}-{number}") not in self.schemas)

    def _schema(self, kind):
        schema = {"type": "object", "properties": {name: field.schema(self) for name, field in kind.fields.items()},
                  "additionalProperties": False}
        required = [name for name, field in kind.fields.items() if field.default is MISSING]
        if required:
            schema["required"] = required
        text = inspect.cleandoc(kind.cls.__doc__ or "")
        if text and not text.startswith(f"{kind.cls.__name__}("):        # which is what a dataclass without one gets
            schema["description"] = text
        return schema
