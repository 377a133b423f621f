"""Typed handlers: what is filled from the body and the query, what a 422 says; the OpenAPI document, and its page."""

import dataclasses
import datetime
import decimal
import enum
import html.parser
import json
import random
import re
import typing
import urllib.parse
import uuid

import pytest

import flowcoro
import flowcoro_http
from flowcoro_http import HttpError, HttpServer, Router, UnprocessableContent, openapi, openapi_page
import flowcoro_schema
from flowcoro_schema import json_default


class Query:
    def __init__(self, text):
        self.fields = urllib.parse.parse_qsl(text, keep_blank_values=True)

    def get_all(self, name):
        return [value for key, value in self.fields if key == name]


class Request:
    """What a typed handler uses of a request."""

    def __init__(self, body=b"", query="", media_type="application/json"):
        self.data, self.query = body, Query(query)
        self.headers = {"content-type": media_type} if media_type is not None else {}

    async def body(self):
        return self.data


def run(coroutine):
    """The result of a coroutine that does not wait."""
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value
    raise AssertionError("it waits")


def call(handler, body=None, query="", path="/", pattern="/", **options):
    """What the handler returns for a request with this JSON (or these bytes) and query."""
    router = Router()
    router.add(pattern, handler, ["POST"])
    match = router.find("POST", path)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return run(match.handler(Request(data, query, **options), **match.arguments))


def taking(annotation, **default):
    """A handler that returns the field `x` of its body, which has this annotation."""
    field = (("x", annotation, dataclasses.field(**default)),) if default else (("x", annotation),)
    Body = dataclasses.make_dataclass("Body", field)

    async def handler(request, body: Body):
        return body.x
    return handler


def errors_of(handler, body=None, query="", **options):
    """[(path, expected, got)] of the 422."""
    with pytest.raises(UnprocessableContent) as caught:
        call(handler, body, query, **options)
    assert caught.value.status == 422
    assert {"status": 422, "title": "Unprocessable Content", "errors": caught.value.errors} == caught.value.document
    return [(error["path"], error["expected"], error["got"]) for error in caught.value.errors]


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass
class Item:
    """What is sold."""

    sku: str
    price: float
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Order:
    """What a customer wants.

    All of it.
    """

    items: list[Item]
    stock: dict[str, int] = dataclasses.field(default_factory=dict)
    gift: typing.Annotated[bool, "whether it is <wrapped>"] = False
    color: Color | None = Color.RED


@dataclasses.dataclass
class Tree:
    name: str
    left: "Tree | None" = None
    more: list["Tree"] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Cat:
    kind: typing.Literal["cat"]
    lives: int


@dataclasses.dataclass
class Dog:
    kind: typing.Literal["dog"]
    name: str
    friend: "Cat | Dog | None" = None


# ---- the body --------------------------------------------------------------------------------------------------

async def take_order(request, order: Order):
    return order


def test_a_dataclass_is_filled_from_the_body():
    body = {"items": [{"sku": "a", "price": 1.5, "tags": ["x"]}, {"sku": "b", "price": 2}], "stock": {"a": 3}, "color": "blue"}
    assert call(take_order, body) == Order([Item("a", 1.5, ["x"]), Item("b", 2.0)], {"a": 3}, False, Color.BLUE)


def test_a_422_names_every_field():
    body = {"items": [{"sku": 5, "price": "1.5"}, {"price": True, "size": 3}, "x", None], "stock": {"a/b~": "3", "c": 1.0},
            "gift": 1, "color": "green", "note": "hello"}
    assert errors_of(take_order, body) == [
        ("/items/0/sku", "a string", "5"),
        ("/items/0/price", "a number", 'the string "1.5"'),
        ("/items/1/sku", "a string", "nothing"),
        ("/items/1/price", "a number", "true"),
        ("/items/1/size", "no field of this name", "3"),
        ("/items/2", "an object (Item)", 'the string "x"'),
        ("/items/3", "an object (Item)", "null"),
        ("/stock/a~1b~0", "an integer", 'the string "3"'),
        ("/stock/c", "an integer", "1.0"),
        ("/gift", "true or false", "1"),
        ("/color", '"red" or "blue" or null', 'the string "green"'),
        ("/note", "no field of this name", 'the string "hello"')]


@pytest.mark.parametrize("body, path, got",
                         [([], "", "an array of 0"), ("x", "", 'the string "x"'), (None, "", "null"), (1, "", "1")])
def test_a_body_that_is_no_object_is_named_as_a_whole(body, path, got):
    assert errors_of(take_order, body) == [(path, "an object (Order)", got)]


UUID_TEXT = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"


@pytest.mark.parametrize("annotation, value, expected", [
    (str, "", ""), (str, "ü\U0001f600", "ü\U0001f600"), (int, -3, -3), (int, 2**70, 2**70), (float, 1, 1.0), (float, 1.5, 1.5),
    (bool, False, False), (None, None, None), (typing.Any, {"a": [1]}, {"a": [1]}), (object, "x", "x"),
    (list, [1, "a"], [1, "a"]), (dict, {"a": None}, {"a": None}), (list[list[int]], [[1], []], [[1], []]),
    (dict[str, list[bool]], {"": [True]}, {"": [True]}),
    (typing.Optional[int], None, None), (int | str, 1, 1), (int | str, "1", "1"), (float | int, 1, 1), (int | float, 1.0, 1.0),
    (str | datetime.date, "2024-02-29", datetime.date(2024, 2, 29)), (datetime.date | str, "x", "x"),
    (list[int] | int, [1], [1]), (dict[str, int] | None, {"a": 1}, {"a": 1}), (Item | dict[str, str], {"a": "b"}, {"a": "b"}),
    (Item | dict[str, typing.Any], {"sku": "a", "price": 1}, Item("a", 1.0)),
    (typing.Literal["a", 1, None], 1, 1), (typing.Literal["a", 1, None], None, None),
    (Color, "red", Color.RED), (Level, 2, Level.HIGH),
    (datetime.datetime, "2024-02-29T12:30:00Z", datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.timezone.utc)),
    (datetime.datetime, "2024-02-29T12:30:00.250+02:00",
     datetime.datetime(2024, 2, 29, 12, 30, 0, 250_000, datetime.timezone(datetime.timedelta(hours=2)))),
    (uuid.UUID, UUID_TEXT, uuid.UUID(UUID_TEXT)), (decimal.Decimal, "-9.90", decimal.Decimal("-9.90")),
    (typing.Annotated[int, "how many"], 3, 3), (typing.NewType("Id", int), 3, 3),
    (Cat | Dog, {"kind": "dog", "name": "Rex"}, Dog("dog", "Rex")), (Cat | Dog, {"kind": "cat", "lives": 7}, Cat("cat", 7)),
])
def test_types_take_what_is_theirs(annotation, value, expected):
    result = call(taking(annotation), {"x": value})
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize("annotation, values", [
    (str, [1, None, True, [], {}]), (int, [True, 1.0, "1", None, [1]]), (float, [True, "1.0", None, 10**400]),
    (bool, [0, 1, "true", None]), (None, [0, False, ""]), (list[int], ["[1]", {"0": 1}, [True]]),
    (dict[str, int], [[], [["a", 1]]]),
    (typing.Literal[1, "a"], [True, 1.0, "b", None, [1], {}]), (typing.Literal[True], [1, "true"]),
    (Color, ["RED", "Red", None, 1, ["red"]]), (Level, [True, 1.0, "1", 3]), (int | None, ["1", True, 1.5]),
    (datetime.datetime, ["2024-02-29", "2024-02-29T12:30:00", "2023-02-29T12:30:00Z", "2024-02-29 12:30:00Z", "20240229T123000Z",
                         "2024-02-29T12:30Z", "2024-W09-4T12:30:00Z", "2024-02-29T12:30:00+25:00", 0, "٢٠٢٤-02-29T12:30:00Z"]),
    (datetime.date, ["20240229", "2024-W09-4", "2023-02-29", "2024-2-29", "2024-02-29T00:00:00Z", " 2024-02-29"]),
    (uuid.UUID, ["{" + UUID_TEXT + "}", UUID_TEXT.replace("-", ""), "urn:uuid:" + UUID_TEXT, UUID_TEXT + "\n"]),
    (decimal.Decimal, [1, 1.5, "NaN", "Infinity", "1e5", "1_0", " 1", "+1", "1.", ".5", "9" * 41, "", "١"]),
    (Cat | Dog, [{"kind": "cow"}, {"lives": 7}, "cat", {}, []]),
])
def test_types_take_nothing_else(annotation, values):
    for value in values:
        errors = errors_of(taking(annotation), {"x": value})
        assert errors and all(path.startswith("/x") for path, _, _ in errors), value


def test_numbers_that_are_not_finite_are_refused():
    for text, status in [(b'{"x": 1e999}', 400), (b'{"x": NaN}', 400), (b'{"x": -Infinity}', 400)]:
        with pytest.raises(HttpError) as caught:
            call(taking(float), text)
        assert caught.value.status == status


def test_a_dataclass_can_be_recursive():
    async def handler(request, tree: Tree):
        return tree

    assert call(handler, {"name": "a", "left": {"name": "b"}, "more": [{"name": "c", "left": None}]}) == (
        Tree("a", Tree("b"), [Tree("c")]))
    assert errors_of(handler,
                     {"name": "a", "more": [{"name": "c", "left": {"name": 1}}]}) == [("/more/0/left/name", "a string", "1")]


def test_a_union_of_dataclasses_is_decided_by_its_literals_and_names():
    assert errors_of(taking(Cat | Dog), {"x": {"kind": "dog", "name": 5}}) == [("/x/name", "a string", "5")]
    assert errors_of(taking(Cat | Dog), {"x": {"kind": "cow", "name": "x"}}) == [
        ("/x", "an object (Cat) or an object (Dog)", "an object")]
    assert errors_of(taking(Item | None), {"x": {"sku": "a"}}) == [("/x/price", "a number", "nothing")]
    with_default = dataclasses.make_dataclass("A", [("tag", typing.Literal["a"], "a"), ("n", int, 0)])
    assert call(taking(Cat | with_default), {"x": {"n": 3}}) == with_default("a", 3)


def test_a_nested_union_is_checked_once_at_each_place(monkeypatch):
    """If both members were tried, it would be 2 ** 60 checks."""
    seen = []
    check = flowcoro_schema.Object.check
    monkeypatch.setattr(flowcoro_schema.Object, "check", lambda self, *arguments: seen.append(self) or check(self, *arguments))
    value = {"kind": "dog", "name": 5}
    for _ in range(59):
        value = {"kind": "dog", "name": "x", "friend": value}
    assert errors_of(taking(Cat | Dog), {"x": value})
    assert len(seen) == 61


def test_an_error_of_post_init_is_an_error_of_the_object():
    @dataclasses.dataclass
    class Range:
        low: int
        high: int

        def __post_init__(self):
            if self.low > self.high:
                raise ValueError("low <= high")

    assert call(taking(list[Range]), {"x": [{"low": 1, "high": 2}]}) == [Range(1, 2)]
    assert errors_of(taking(list[Range]), {"x": [{"low": 1, "high": 2}, {"low": 3, "high": 2}]}) == [
        ("/x/1", "low <= high", "an object")]


def test_what_a_dataclass_makes_itself_cannot_be_sent():
    @dataclasses.dataclass
    class Account:
        name: str
        admin: bool = dataclasses.field(default=False, init=False)

    async def handler(request, account: Account):
        return account

    assert call(handler, {"name": "x"}) == Account("x")
    assert errors_of(handler, {"name": "x", "admin": True}) == [("/admin", "no field of this name", "true")]


def test_lists_of_dataclasses_can_be_the_body_and_a_body_can_be_left_out():
    async def many(request, items: list[Item]):
        return items

    async def perhaps(request, item: Item | None = None):
        return item

    assert call(many, [{"sku": "a", "price": 1}]) == [Item("a", 1.0)]
    assert call(perhaps, b"", media_type=None) is None
    assert call(perhaps, b"null") is None
    assert call(perhaps, {"sku": "a", "price": 1}) == Item("a", 1.0)
    with pytest.raises(HttpError) as caught:
        call(many, b"")
    assert caught.value.status == 400


@pytest.mark.parametrize("body, said", [
    (b"", "no JSON"), (b"{", "no JSON"), (b"[1,]", "Expecting|trailing"), (b"{'a': 1}", "no JSON"), (b'{"x": 1} x', "no JSON"),
    (b'{"x": 1, "x": 2}', "same name twice"),
    (b'\xef\xbb\xbf{"x": 1}', "no JSON"), (b'{"x": "\xff"}', "not UTF-8 at byte 7"), ('{"x": 1}'.encode("utf-16"), "not UTF-8"),
    (b'{"x": "\\ud800"}', "surrogate"), (b'{"\\uDC00": 1}', "surrogate"), (b'{"x": 01}', "no JSON"),
    (b'{"x": "a\nb"}', "no JSON"),
    (b'{"x":' * 70 + b"1" + b"}" * 70, "more than 64"), (b"[" * 100_000, "more than 64|no JSON"),
    (b'{"x": ' + b"9" * 5000 + b"}", "no JSON"),
])
def test_a_body_that_is_no_json_is_refused(body, said):
    with pytest.raises(HttpError, match=said) as caught:
        call(taking(typing.Any), body)
    assert caught.value.status == 400


def test_depth_is_counted_where_it_is():
    assert call(taking(typing.Any), b'{"x":' + b"[" * 63 + b"]" * 63 + b"}")
    assert call(taking(typing.Any), {"x": [[]] * 1000}) == [[]] * 1000
    assert call(taking(typing.Any), {"x": "[" * 1000}) == "[" * 1000
    assert call(taking(typing.Any), b'{"x": "\\ud83d\\ude00"}') == "\U0001f600"
    with pytest.raises(HttpError, match="more than 64 arrays"):
        call(taking(typing.Any), b'{"x":' + b"[" * 64 + b"]" * 64 + b"}")


@pytest.mark.parametrize("media_type, status", [
    ("application/json", 200), ("application/json; charset=utf-8", 200), ("Application/JSON ;charset=\"UTF-8\"", 200),
    ("application/vnd.api+json", 200), ("application/problem+json;profile=x", 200),
    (None, 415), ("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("text/json", 415), ("application/jsonx", 415),
    ("application/json; charset=latin-1", 415), ("multipart/form-data; boundary=application/json", 415),
    ("application/json,text/plain", 415),
])
def test_a_body_has_to_say_that_it_is_json(media_type, status):
    try:
        call(taking(int), {"x": 1}, media_type=media_type)
    except HttpError as error:
        assert error.status == status
    else:
        assert status == 200


def test_errors_and_what_they_show_are_bounded():
    errors = errors_of(taking(list[int]), {"x": ["y" * 10_000] * 100})
    assert len(errors) == flowcoro_schema.ERRORS
    assert errors[0] == ("/x/0", "an integer", 'the string "' + "y" * 60 + '"… of 10000')
    [(path, _, got)] = errors_of(taking(int), {"x": 1, "z" * 10_000: 10**4000})
    assert path == "/" + "z" * 199 + "…" and got == "1" + "0" * 59 + "…"
    value = "x"
    for _ in range(60):
        value = {"k" * 1000: value}
    [(path, _, _)] = errors_of(dict_tower(60), {"x": value})
    assert len(path) <= flowcoro_schema.ERROR_PATH + 1


def test_limits_are_arguments():
    router = Router(json_depth=3, max_errors=2)
    router.add("/", taking(list[typing.Any]), ["POST"])
    router.add("/q", search, name="q")
    outer = Router()
    outer.include(router)
    call = outer.find("POST", "/").handler
    assert run(call(Request(b'{"x": [[]]}'))) == [[]]
    with pytest.raises(HttpError, match="more than 3 arrays"):
        run(call(Request(b'{"x": [[[]]]}')))
    with pytest.raises(UnprocessableContent) as caught:
        run(outer.find("GET", "/q").handler(Request(query="page=x&ratio=x&exact=x")))
    assert [error["path"] for error in caught.value.errors] == ["q", "page"]


def dict_tower(height):
    annotation = int
    for _ in range(height):
        annotation = dict[str, annotation]
    return taking(annotation)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_written_is_read_again(seed):
    """Random values of a type, as JSON and back."""
    chance = random.Random(seed)
    make = {
        str: lambda: "".join(chance.choices("aü€\U0001f600\"\\/\n", k=chance.randrange(5))),
        int: lambda: chance.randint(-9, 2**60),
        float: lambda: chance.uniform(-1, 1), bool: lambda: chance.random() < 0.5, Color: lambda: chance.choice(list(Color)),
        uuid.UUID: lambda: uuid.UUID(int=chance.getrandbits(128)),
        datetime.date: lambda: datetime.date(2024, 1, chance.randint(1, 31)),
        datetime.datetime: lambda: datetime.datetime(2024, 1, 1, 1, 1, 1, chance.randrange(10**6), chance.choice([
            datetime.timezone.utc, datetime.timezone(datetime.timedelta(hours=-3, minutes=-30))])),
        decimal.Decimal: lambda: decimal.Decimal(chance.randint(-10**6, 10**6)) / 100,
        Item: lambda: Item(make[str](), make[float](), [make[str]()])}

    def draw(depth):
        kind = chance.randrange(3) if depth else 2
        if kind == 2:
            annotation = chance.choice(list(make))
            return annotation, make[annotation]
        inner, value = draw(depth - 1)
        if kind == 0:
            return list[inner], lambda: [value() for _ in range(3)]
        return dict[str, inner] | None, lambda: chance.choice([None, {make[str](): value()}])
    for _ in range(20):
        annotation, value = draw(3)
        drawn = value()
        body = json.dumps({"x": drawn}, default=json_default, ensure_ascii=chance.random() < 0.5).encode()
        assert call(taking(annotation), body) == drawn, (seed, annotation)


# ---- the query -------------------------------------------------------------------------------------------------

async def search(request, *, q: str, page: int = 1, ratio: float = 0.5, exact: bool = False, tag: list[str] = (),
                 ids: list[int] = (),
                 since: datetime.date | None = None, color: Color = Color.RED, many: list[int] | None = None, plain=None):
    return q, page, ratio, exact, tag, ids, since, color, many, plain


def test_keyword_only_parameters_are_taken_from_the_query():
    assert call(search, query="q=x") == ("x", 1, 0.5, False, (), (), None, Color.RED, None, None)
    assert call(search, query="q=&page=-2&ratio=1e-3&exact=true&tag=a&tag=%C3%BC&ids=1&ids=2&since=2024-02-29&color=blue&many=5"
                              "&plain=5&utm=1") == (
        "", -2, 0.001, True, ["a", "ü"], [1, 2], datetime.date(2024, 2, 29), Color.BLUE, [5], "5")


def test_a_422_names_every_parameter():
    assert errors_of(search, query="page=1_0&ratio=nan&exact=1&ids=1&ids=x&ids=&since=now&color=green&many=y") == [
        ("q", "a string", "nothing"), ("page", "an integer", 'the string "1_0"'), ("ratio", "a number", 'the string "nan"'),
        ("exact", "true or false", 'the string "1"'), ("ids", "an integer", 'the string "x"'),
        ("ids", "an integer", 'the string ""'),
        ("since", "a date, such as 2024-02-29 or null", 'the string "now"'), ("color", '"red" or "blue"', 'the string "green"'),
        ("many", "an integer", 'the string "y"')]
    assert errors_of(search, query="q=a&q=b") == [("q", "a string, once", "an array of 2")]


@pytest.mark.parametrize("text", ["", "+1", " 1", "1 ", "1.0", "0x1", "١", "9" * 21, "--1", "1\n", "²"])
def test_an_integer_in_the_query_is_digits(text):
    assert errors_of(search, query=urllib.parse.urlencode({"q": "", "page": text}))[0][0] == "page"


def test_path_query_and_body_come_together_and_so_do_their_errors():
    async def handler(request, id, item: Item, *, dry: bool = False):
        return id, item, dry

    assert call(handler, {"sku": "a", "price": 1}, "dry=true", "/5", "/{id:int}") == (5, Item("a", 1.0), True)
    with pytest.raises(UnprocessableContent) as caught:
        call(handler, {"sku": "a", "price": "1"}, "dry=yes", "/5", "/{id:int}")
    assert [(error["in"], error["path"]) for error in caught.value.errors] == [("query", "dry"), ("body", "/price")]


def test_an_async_generator_can_be_typed():
    async def numbers(request, *, n: int):
        yield n

    assert run(call(numbers, query="n=3").__anext__()) == 3


# ---- mistakes --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("annotation, said", [
    (bytes, "no JSON is made into"), (set[int], "no JSON is made into"), (tuple[int, int], "no JSON is made into"),
    (dict[int, str], "the names in a JSON object are strings"), (list[int] | list[str], "one list"),
    (dict[str, int] | dict[str, str], "one dict"), (typing.Literal[b"x"], "a Literal has"),
    (enum.Enum("E", {"A": (1, 2)}), "the values of an Enum"), ("Missing", "Missing"), (5, "no JSON is made into|must be"),
])
def test_a_type_that_json_does_not_have_is_refused_when_registered(annotation, said):
    with pytest.raises(TypeError, match=said):
        Router().add("/", taking(annotation), ["POST"])


def test_a_handler_whose_parameters_cannot_be_filled_is_refused_when_registered():
    async def two_bodies(request, a: Item, b: Order):
        pass

    async def typo(request, idd):
        pass

    async def object_in_query(request, *, q: dict):
        pass

    async def one_body(request, item: Item):
        pass

    async def unknown(request, *, q: "Unknown"):    # noqa: F821
        pass

    @dataclasses.dataclass
    class WithInitVar:
        x: dataclasses.InitVar[int]

    async def init_var(request, body: WithInitVar):
        pass

    for handler, said in [(two_bodies, "there is one body, and a takes it"), (typo, "idd comes from nowhere"),
                          (object_in_query, "q: the query has"), (unknown, "looked up in the module of the handler"),
                          (init_var, "InitVar")]:
        with pytest.raises(TypeError, match=said):
            Router().add("/{id}", handler, ["POST"])
    with pytest.raises(TypeError, match="GET and POST may not have one"):
        Router().add("/", one_body, ["GET", "POST"])


def test_a_handler_without_types_is_called_as_it_is():
    async def handler(request, id: int) -> "Unknown":       # noqa: F821
        pass

    router = Router()
    router.add("/{id:int}", handler)
    assert router.find("GET", "/5").handler is handler


# ---- the document ----------------------------------------------------------------------------------------------

async def make_order(request, id: int, order: Order, *, dry: typing.Annotated[bool, "only check it"] = False,
                     tag: list[str] = ()) -> tuple[typing.Literal[201], Order]:
    """Make an order.

    It is <b>kept</b> & shipped.
    """


async def one_tree(request, name) -> Tree | None:
    """A tree."""


def shop():
    router = Router()
    router.add("/orders/{id:int}", make_order, ["POST", "PUT"], name="order")
    router.add("/orders/{name}", one_tree)
    return router


def test_the_document_says_what_the_routes_know():
    document = openapi(shop(), title="Shop", version="2", description="All", servers=["https://shop.example"])
    assert document["openapi"] == "3.1.0"
    assert document["info"] == {"title": "Shop", "version": "2", "description": "All"}
    assert document["servers"] == [{"url": "https://shop.example"}]
    assert list(document["paths"]) == ["/orders/{id}"]
    item = document["paths"]["/orders/{id}"]
    assert {method: operation["operationId"] for method, operation in item.items()} == {
        "post": "order", "put": "order_put", "get": "one_tree"}
    post = item["post"]
    assert (post["summary"], post["description"]) == ("Make an order.", "It is <b>kept</b> & shipped.")
    assert post["parameters"] == [
        {"name": "id", "in": "path", "required": True, "schema": {"type": "integer"}},
        {"name": "dry", "in": "query", "required": False, "description": "only check it",
         "schema": {"type": "boolean", "default": False}},
        {"name": "tag", "in": "query", "required": False,
         "schema": {"type": "array", "items": {"type": "string"}, "default": []}}]
    order = {"application/json": {"schema": {"$ref": "#/components/schemas/Order"}}}
    assert post["requestBody"] == {"required": True, "content": order}
    assert post["responses"]["201"] == {"description": "Created", "content": order}
    assert {"400", "415", "422"} < post["responses"].keys()
    assert item["get"]["responses"]["200"]["content"]["application/json"]["schema"] == {
        "anyOf": [{"$ref": "#/components/schemas/Tree"}, {"type": "null"}]}


def test_a_default_that_cannot_be_sent_is_not_shown():
    router = Router()
    router.add("/", search)
    schemas = {one["name"]: one["schema"] for one in openapi(router)["paths"]["/"]["get"]["parameters"]}
    assert schemas["plain"] == {"type": "string"}
    assert schemas["since"]["default"] is None and schemas["color"]["default"] == "red"


def test_dataclasses_are_components():
    schemas = openapi(shop())["components"]["schemas"]
    assert sorted(schemas) == ["Item", "Order", "Tree", "UnprocessableContent"]
    assert schemas["Order"] == {
        "type": "object", "description": "What a customer wants.\n\nAll of it.", "required": ["items"],
        "additionalProperties": False,
        "properties": {
            "items": {"type": "array", "items": {"$ref": "#/components/schemas/Item"}},
            "stock": {"type": "object", "additionalProperties": {"type": "integer"}},
            "gift": {"type": "boolean", "description": "whether it is <wrapped>", "default": False},
            "color": {"anyOf": [{"type": "string", "enum": ["red", "blue"]}, {"type": "null"}], "default": "red"}}}
    assert "description" not in schemas["Tree"], "what a dataclass writes itself is no docstring"
    assert schemas["Tree"]["properties"]["left"]["anyOf"][0] == {"$ref": "#/components/schemas/Tree"}


def test_two_dataclasses_of_one_name_are_two_components():
    def of(cls):
        async def handler(request, body: cls):
            pass
        return handler

    router = Router()
    for number, name in enumerate(["Item", "Item", "Item", "UnprocessableContent"]):
        cls = dataclasses.make_dataclass(name, [(f"x{number}", int)])
        router.add(f"/{number}", of(cls), ["POST"])
    schemas = openapi(router)["components"]["schemas"]
    assert len(schemas) == 5 and all(re.fullmatch("[A-Za-z0-9._-]+", name) for name in schemas)
    for number in range(4):
        operation = openapi(router)["paths"][f"/{number}"]["post"]
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert list(schemas[name]["properties"]) == [f"x{number}"]
        assert operation["responses"]["422"]["content"]["application/problem+json"]["schema"]["$ref"].endswith(
            "/UnprocessableContent")
    assert "errors" in schemas["UnprocessableContent"]["properties"]


def test_what_returns_is_documented_as_far_as_it_is_known():
    async def text(request) -> str: ...
    async def nothing(request) -> None: ...
    async def data(request) -> bytes: ...
    async def unknown(request) -> "Response": ...       # noqa: F821
    async def either(request) -> tuple[int, dict[str, int]]: ...
    async def described(request) -> typing.Annotated[Item, "the cheapest"]: ...
    async def stream(request) -> typing.AsyncIterator[bytes]: ...
    async def silent(request): ...

    router = Router()
    for handler in (text, nothing, data, unknown, either, described, stream, silent):
        router.add(f"/{handler.__name__}", handler)
    responses = {path[1:]: item["get"]["responses"] for path, item in openapi(router)["paths"].items()}
    assert responses == {
        "text": {"200": {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}},
        "nothing": {"204": {"description": "No Content"}},
        "data": {"200": {"description": "OK", "content": {"application/octet-stream": {"schema": {}}}}},
        "unknown": {"200": {"description": "OK"}}, "stream": {"200": {"description": "OK"}},
        "silent": {"200": {"description": "OK"}},
        "either": {"2XX": {"description": "Success", "content": {"application/json": {"schema": {
            "type": "object", "additionalProperties": {"type": "integer"}}}}}},
        "described": {"200": {"description": "the cheapest", "content": {"application/json": {"schema": {
            "$ref": "#/components/schemas/Item"}}}}}}


def test_what_openapi_cannot_tell_apart_is_one_operation_that_names_the_others():
    async def first(request, id):
        """First."""

    async def second(request, name):
        """Second."""

    async def mounted(request, rest):
        """Not shown."""

    router = Router()
    router.add("/x/{id:int}", first)
    router.add("/x/{name}", second)
    router.add("/x/{tenant}", one_host, host="{t}.example.com")
    router.add("/h", one_host, host="{t}.example.com")
    router.add("/secret", one_host, documented=False)
    router.add("/purge", one_host, ["PURGE"])
    router.mount("/m", mounted)
    paths = openapi(router)["paths"]
    assert sorted(paths) == ["/h", "/x/{id}"]
    assert paths["/x/{id}"]["get"]["description"] == "Also: GET /x/{name}\n\nAlso: GET {t}.example.com/x/{tenant}"
    assert paths["/h"]["get"]["servers"] == [{"url": "//{t}.example.com", "variables": {"t": {"default": "t"}}}]


async def one_host(request):
    """For one host."""


def references(value):
    if isinstance(value, dict):
        yield from [value["$ref"]] if "$ref" in value else []
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_the_document_is_json_and_whole():
    document = json.loads(json.dumps(openapi(shop())))
    for reference in references(document):
        place = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]
    for path, item in document["paths"].items():
        for operation in item.values():
            names = [parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "path"]
            assert names == re.findall(r"\{(\w+)\}", path)
    assert openapi(Router()) == {"openapi": "3.1.0", "info": {"title": "API", "version": "1"}, "paths": {}}


# ---- the page --------------------------------------------------------------------------------------------------

class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; every tag is closed by its own."""

    VOID = {"meta"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_the_document_and_needs_nothing_else():
    page = Page(openapi_page(openapi(shop(), title="Shop & <Co>"), url="/openapi.json?a&b"))
    text = " ".join(" ".join(page.text).split())
    for shown in ("Shop & <Co>", "POST", "/orders/{id}", "Make an order.", "It is <b>kept</b> & shipped.",
                  "whether it is <wrapped>",
                  "array of Item", "one of \"red\" , \"blue\"", "422"):
        assert shown in text, shown
    assert ("lang", "en") in page.attributes and ("href", "/openapi.json?a&b") in page.attributes
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    targets = [value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")]
    assert targets and set(targets) <= set(identifiers)
    assert [value for name, value in page.attributes if name in ("src", "href") and value[:1] not in "#/"] == []


def test_the_page_escapes_everything():
    evil = "\"'><script>alert(1)</script><b a='"
    cls = dataclasses.make_dataclass("Evil", [("x", typing.Annotated[typing.Literal[evil], evil], evil)])
    cls.__doc__ = evil

    async def handler(request, body: cls, *, q: typing.Annotated[str, evil] = evil) -> typing.Annotated[cls, evil]:
        pass

    handler.__doc__ = f"{evil}\n\n{evil}"
    handler.__name__ = evil
    router = Router()
    router.add(f"/{evil.replace('/', '')}", handler, ["POST"], name=evil)
    page = Page(openapi_page(openapi(router, title=evil, version=evil, description=evil), url=evil))
    assert not {"script", "b a", "a="} & set(page.tags)
    assert {name for name, _ in page.attributes} <= {
        "lang", "charset", "name", "content", "id", "class", "href", "scope", "aria-labelledby"}
    assert " ".join(page.text).count("<script>") >= 9


def test_the_page_of_nothing_is_a_page():
    assert "There are none." in " ".join(Page(openapi_page(openapi(Router()))).text)


def test_describe_serves_the_document_and_its_page_of_all_routes():
    app = HttpServer()
    app.describe(title="Tea shop", version="7")

    @app.get("/teas/{id:int}")
    async def tea(request, id):
        """A tea."""

    async def main():
        async with app.test_client() as client:
            document = (await client.get("/openapi.json")).json()
            assert document["info"] == {"title": "Tea shop", "version": "7"} and list(document["paths"]) == ["/teas/{id}"]
            page = await client.get("/docs")
            assert page.media_type.essence == "text/html" and "A tea." in page.text and "/openapi.json" in page.text
            assert "default-src 'none'" in page.headers["content-security-policy"]

    flowcoro.run(main())
    app = HttpServer()
    app.describe("/api", page=None)
    assert app.find("GET", "/api").status == 200 and app.find("GET", "/docs").status == 404
