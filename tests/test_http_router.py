"""Router: which handler a method, a path and a host find, what cannot be registered, and the URLs that are built."""

import functools
import itertools
import os
import random
import re
import uuid

import pytest

from flowcoro_http import Router

FIRST_SEED = int(os.environ.get("FLOWCORO_FIRST_SEED", 0))
SEEDS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("FLOWCORO_SEEDS", 20)))


async def handler(request):
    pass


async def takes_all(request, **params):
    pass


async def takes_rest(request, rest):
    pass


def router_of(*paths, **options):
    router = Router(**options)
    for path in paths:
        router.add(path, takes_all)
    return router


def found(router, path, method="GET", host=None):
    """(pattern, parameters) of what is found, or the status of what is not."""
    match = router.find(method, path, host)
    return (match.route.path, dict(match.params)) if match.status == 200 else match.status


# ---- what is found ---------------------------------------------------------------------------------------------

def test_a_path_without_parameters_finds_its_handler():
    router = Router()
    router.add("/hello", handler)
    match = router.find("GET", "/hello")
    assert (match.status, match.handler, dict(match.arguments), dict(match.params)) == (200, handler, {}, {})
    assert match.route is router.routes()[0]
    assert router.find("GET", "/hello") is match, "nothing is made for it"


@pytest.mark.parametrize("path", ["/", "/hell", "/hello/", "/hello/x", "//hello", "/Hello", "/hello//"])
def test_another_path_is_not_found(path):
    assert found(router_of("/hello"), path) == 404


@pytest.mark.parametrize("pattern, path, params", [
    ("/u/{id:int}", "/u/5", {"id": 5}),
    ("/u/{id:int}", "/u/-5", {"id": -5}),
    ("/u/{id:int}", "/u/007", {"id": 7}),
    ("/u/{id:int}", "/u/" + "9" * 20, {"id": 10**20 - 1}),
    ("/u/{x:float}", "/u/-1.25", {"x": -1.25}),
    ("/u/{x:float}", "/u/3", {"x": 3.0}),
    ("/u/{name}", "/u/J%C3%BCrgen", {"name": "Jürgen"}),
    ("/u/{name:str}", "/u/a%2Fb", {"name": "a/b"}),
    ("/u/{name}", "/u/..", {"name": ".."}),
    ("/u/{name}", "/u/%2525", {"name": "%25"}),
    ("/u/{name}", "/u/a+b%20c", {"name": "a+b c"}),
    ("/u/{id:uuid}", "/u/6BA7B810-9dad-11d1-80b4-00c04fd430c8", {"id": uuid.UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")}),
    ("/f/{rest:path}", "/f/a/b//c/", {"rest": "a/b//c/"}),
    ("/f/{rest:path}", "/f/", {"rest": ""}),
    ("/f/{rest:path}", "/f/../etc", {"rest": "../etc"}),
    ("/{a}/x/{b:int}", "/k/x/1", {"a": "k", "b": 1}),
])
def test_parameters_are_read_by_their_converters(pattern, path, params):
    match = router_of(pattern).find("GET", path)
    assert match.params == params
    assert [type(value) for value in match.params.values()] == [type(value) for value in params.values()]


@pytest.mark.parametrize("pattern, path", [
    ("/u/{id:int}", "/u/+5"), ("/u/{id:int}", "/u/1_0"), ("/u/{id:int}", "/u/%205"), ("/u/{id:int}", "/u/5.0"),
    ("/u/{id:int}", "/u/" + "9" * 21), ("/u/{id:int}", "/u/%D9%A3"), ("/u/{id:int}", "/u/%C2%B2"), ("/u/{id:int}", "/u/-"),
    ("/u/{id:int}", "/u/5%0A"),
    ("/u/{x:float}", "/u/nan"), ("/u/{x:float}", "/u/1e5"), ("/u/{x:float}", "/u/.5"), ("/u/{x:float}", "/u/5."),
    ("/u/{x:float}", "/u/inf"), ("/u/{x:float}", "/u/1_0.0"),
    ("/u/{name}", "/u/"), ("/u/{name}", "/u"), ("/u/{name}", "/u/a/b"), ("/u/{name}", "/u/a/"),
    ("/u/{id:uuid}", "/u/6ba7b8109dad11d180b400c04fd430c8"), ("/u/{id:uuid}", "/u/{6ba7b810-9dad-11d1-80b4-00c04fd430c8}"),
    ("/f/{rest:path}", "/f"), ("/f/{rest:path}", "/f//etc/passwd"), ("/f/{rest:path}", "/f/a%2Fb"),
    ("/f/{rest:path}", "/f/%2Fetc"), ("/f/{rest:path}", "/f/..%2f..%2fetc"),
])
def test_what_a_converter_does_not_take_is_not_found(pattern, path):
    assert found(router_of(pattern), path) == 404


@pytest.mark.parametrize("path", ["", "x", "*", "http://x/", "/%", "/%4", "/%zz", "/%u0041", "/%00", "/a\0", "/%C3", "/%C0%AF",
                                  "/%ED%A0%80", "/%F5%80%80%80", "/ü", "/u/\ud800"])
def test_a_path_that_is_none_is_refused(path):
    assert found(router_of("/", "/{name}", "/u/{rest:path}"), path) == 400


def test_percent_encoding_makes_no_other_path():
    router = router_of("/a b/ü", "/users")
    assert found(router, "/a%20b/%C3%BC") == found(router, "/a%20b/%c3%bc") == ("/a b/ü", {})
    assert found(router, "/%75sers") == ("/users", {})
    assert found(router, "/a%20b%2F%C3%BC") == 404, "an encoded slash does not divide segments"


SPECIFIC = ["/x/me", "/x/{u:uuid}", "/x/{i:int}", "/x/{f:float}", "/x/{s}", "/x/{p:path}"]


@pytest.mark.parametrize("order", [SPECIFIC, SPECIFIC[::-1], *(
    random.Random(seed).sample(SPECIFIC, len(SPECIFIC)) for seed in range(5))])
def test_the_most_specific_wins_whatever_was_registered_first(order):
    router = router_of(*order)
    paths = ["/x/me", "/x/6ba7b810-9dad-11d1-80b4-00c04fd430c8", "/x/7", "/x/7.5", "/x/you", "/x/a/b"]
    assert [found(router, path)[0] for path in paths] == [
        "/x/me", "/x/{u:uuid}", "/x/{i:int}", "/x/{f:float}", "/x/{s}", "/x/{p:path}"]


def test_a_way_that_ends_nowhere_is_left_for_the_next():
    router = router_of("/a/{x}/c", "/{y}/b/d", "/{p:path}")
    assert found(router, "/a/b/d") == ("/{y}/b/d", {"y": "a"})
    assert found(router, "/a/b/c") == ("/a/{x}/c", {"x": "b"})
    assert found(router, "/a/b/e") == ("/{p:path}", {"p": "a/b/e"})


def test_a_converter_of_ones_own_reads_and_writes():
    router = Router()
    router.add_converter("hex", lambda text: int(text, 16) if re.fullmatch("[0-9a-f]{1,8}", text) else None, "{:x}".format)
    router.add_converter("even", lambda text: ["0", "2"].index(text))
    router.add("/c/{n:hex}", takes_all, name="c")
    router.add("/e/{n:even}", takes_all)
    assert router.find("GET", "/c/ff").params == {"n": 255}
    assert found(router, "/c/xx") == 404
    assert router.find("GET", "/e/2").params == {"n": 1}
    assert found(router, "/e/3") == 404, "a ValueError says that it is none"
    assert router.url_for("c", n=255) == "/c/ff"


def by_definition(patterns, path):
    """The pattern that wins, from what the documentation says: all that match, the most specific first, from the left."""
    ranks = {"int": 1, "float": 2, None: 4, "path": 5}
    tests = {"int": r"-?[0-9]+", "float": r"-?[0-9]+(\.[0-9]+)?", None: ".+"}

    def rank(pattern):
        segments, left, key = pattern[1:].split("/"), path[1:].split("/"), []
        for at, segment in enumerate(segments):
            kind = segment[1:-1].partition(":")[2] or None if segment[:1] == "{" else "text"
            if kind == "path":
                rest = left[at:]
                return [*key, 5] if rest and (rest[0] or len(rest) == 1) else None
            if at >= len(left) or not (segment == left[at] if kind == "text" else re.fullmatch(tests[kind], left[at])):
                return None
            key.append(0 if kind == "text" else ranks[kind])
        return key if len(left) == len(segments) else None
    ranked = [(rank(pattern), pattern) for pattern in patterns]
    return min(((key, pattern) for key, pattern in ranked if key is not None), default=(None, 404))[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_routers_find_what_the_definition_says(seed):
    chance = random.Random(seed)
    kinds = ["a", "b", "1", "{x}", "{x:int}", "{x:float}"]
    patterns = set()
    for _ in range(12):
        segments = [chance.choice(kinds).replace("x", f"x{at}") for at in range(chance.randint(1, 4))]
        patterns.add("/" + "/".join([*segments, *chance.choice([[], [], [""], ["{p:path}"]])]))
    router = router_of(*chance.sample(sorted(patterns), len(patterns)))
    for _ in range(200):
        path = "/" + "/".join(chance.choice(["a", "b", "1", "1.5", "c", ""]) for _ in range(chance.randint(1, 5)))
        match = router.find("GET", path)
        assert (match.route.path if match.status == 200 else match.status) == by_definition(patterns, path), (seed, path)


def test_a_search_visits_no_place_of_the_tree_twice():
    """40 segments that are text, integer, number and any text at once: by all ways it would be 2 ** 40."""
    asked = []
    router = Router()
    router.add_converter("one", lambda text: asked.append(text) or text)
    for depth in range(1, 41):
        router.add("/1" * depth + "/{x:one}/end", takes_all)
        router.add("/{a:one}" + "/1" * depth + "/end", takes_all)
    assert found(router, "/1" * 60) == 404
    assert len(asked) == 41


def test_a_long_path_is_divided_once():
    router = router_of("/{a}/{b}", "/x/{rest:path}")
    assert found(router, "/x" + "/%41" * 10_000) == ("/x/{rest:path}", {"rest": "/".join("A" * 10_000)})
    assert found(router, "/y" * 100_000) == 404


# ---- methods ---------------------------------------------------------------------------------------------------

def test_head_is_answered_by_the_handler_of_get_until_it_has_its_own():
    router = Router()
    router.add("/x", handler)
    assert router.find("HEAD", "/x").handler is handler
    router.add("/x", takes_all, ["HEAD"])
    assert router.find("HEAD", "/x").handler is takes_all
    assert router.find("GET", "/x").handler is handler
    with pytest.raises(ValueError, match="HEAD of this path is taken"):
        router.add("/x", handler, ["HEAD"])
    router.add("/y", takes_all, ["HEAD"])
    router.add("/y", handler)
    assert router.find("HEAD", "/y").handler is takes_all


def test_options_are_answered_unless_a_handler_does():
    router = Router()
    router.add("/x", handler, ["GET", "POST"])
    match = router.find("OPTIONS", "/x")
    assert (match.status, match.handler, match.allow) == (204, None, "GET, HEAD, OPTIONS, POST")
    router.add("/x", takes_all, ["OPTIONS"])
    assert router.find("OPTIONS", "/x").handler is takes_all
    assert router.find("OPTIONS", "/y").status == 404


def test_options_of_the_server_name_all_methods():
    router = Router()
    assert router.find("OPTIONS", "*").allow == "OPTIONS"
    router.add("/x", handler)
    router.add("/y/{n}", handler, ["PURGE"])
    match = router.find("OPTIONS", "*")
    assert (match.status, match.allow) == (204, "GET, HEAD, OPTIONS, PURGE")


def test_another_method_is_told_which_there_are():
    router = Router()
    router.add("/x/{id:int}", handler, ["GET"])
    router.add("/x/{name}", handler, ["DELETE"])
    router.add("/x/7", handler, ["PUT"])
    match = router.find("POST", "/x/7")
    assert (match.status, match.handler, match.allow) == (405, None, "DELETE, GET, HEAD, OPTIONS, PUT")
    assert router.find("POST", "/x/me").allow == "DELETE, OPTIONS"
    assert router.find("get", "/x/7").status == 405, "methods are case-sensitive"


def test_a_method_that_the_most_specific_does_not_have_is_looked_for_in_the_next():
    router = Router()
    router.add("/x/me", handler, ["GET"])
    router.add("/x/{name}", takes_all, ["POST"])
    assert found(router, "/x/me", "POST") == ("/x/{name}", {"name": "me"})
    assert found(router, "/x/me", "GET") == ("/x/me", {})


def test_decorators_register_and_leave_the_function_as_it_is():
    router = Router()
    for method in ("get", "post", "put", "patch", "delete"):
        assert getattr(router, method)(f"/{method}")(handler) is handler
        assert router.find(method.upper(), f"/{method}").handler is handler
    assert router.route("/r", methods=["PURGE"], name="r")(handler) is handler
    assert router.find("PURGE", "/r").route.name == "r"


# ---- how handlers are called -----------------------------------------------------------------------------------

def test_a_handler_gets_the_parameters_that_it_names():
    async def names_one(request, b):
        pass

    async def names_all(request, b, a=None):
        pass

    for one, arguments in [(handler, {}), (names_one, {"b": "2"}), (names_all, {"a": "1", "b": "2"}),
                           (takes_all, {"a": "1", "b": "2"})]:
        router = Router()
        router.add("/{a}/{b}", one)
        match = router.find("GET", "/1/2")
        assert dict(match.arguments) == arguments
        assert match.params == {"a": "1", "b": "2"}


class Asked:
    """Handlers of other kinds than a function."""

    async def method(self, request, id):
        return self, request, id

    async def __call__(self, request, id):
        return self, request, id


def run(coroutine):
    """The result of a coroutine that does not wait."""
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    return ended.value.value


def test_methods_partials_and_objects_can_be_handlers():
    async def partial(self, request, id):
        return self, request, id

    asked = Asked()
    for one in (asked.method, asked, functools.partial(partial, asked)):
        router = Router()
        router.add("/{id:int}", one)
        match = router.find("GET", "/5")
        assert run(match.handler("request", **match.arguments)) == (asked, "request", 5)


def test_an_async_generator_is_a_handler_that_returns_it():
    async def numbers(request, id):
        yield id

    router = Router()
    router.add("/{id:int}", numbers)
    match = router.find("GET", "/5")
    generator = run(match.handler("request", **match.arguments))
    assert run(generator.__anext__()) == 5


def test_a_match_without_parameters_can_be_shared():
    router = Router()
    router.add("/x", takes_all)
    with pytest.raises(TypeError):
        router.find("GET", "/x").params["a"] = 1


# ---- mistakes --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path, said", [
    ("users", "begins with"), ("/a//b", "empty segment"), ("//", "empty segment"), ("/{id:number}", "no converter 'number'"),
    ("/{id", "fills its whole segment"), ("/x{id}", "fills its whole segment"), ("/{id}.json", "fills its whole segment"),
    ("/{a}{b}", "fills its whole segment"), ("/{}", "identifier"), ("/{a b}", "identifier"), ("/{class}", "identifier"),
    ("/{ü}", "identifier"), ("/{id:}", "no converter"), ("/{p:path}/x", "has to be last"), ("/{a}/{a}", "the same name"),
    ("/a?b", "has no '\\?'"), ("/a#b", "has no '#'"), ("/a%20b", "has no '%20'"), ("/a\n", "has no"), ("/a/../b", "resolve"),
    ("/.", "resolve"), ("", "needs a prefix"),
])
def test_a_pattern_that_is_none_says_why(path, said):
    router = Router()
    with pytest.raises(ValueError, match=said):
        router.add(path, takes_all)
    assert router.routes() == []


@pytest.mark.parametrize("methods, error, said", [
    ("GET", TypeError, r"give a list: \['GET'\]"), ([], ValueError, "is empty"), (["get"], ValueError, "case-sensitive"),
    (["G T"], ValueError, "no method"), (["CONNECT"], ValueError, "has no path"), ([1], ValueError, "no method"),
])
def test_methods_that_are_none_are_refused(methods, error, said):
    with pytest.raises(error, match=said):
        Router().add("/", handler, methods)


def test_a_handler_has_to_be_async_and_to_take_the_request():
    def plain(request):
        pass

    async def takes_nothing():
        pass

    async def takes_id(request, id):
        pass

    async def before_slash(request, id, /):
        pass

    async def names_a_query(request, id, q=""):
        pass

    for one, said in [(plain, "write `async def`"), (takes_nothing, "the first parameter"), (5, "write `async def`"),
                      (Asked, "write `async def`"), (lambda request: None, "write `async def`"),
                      (before_slash, "passed by its name"), (names_a_query, "q comes from nowhere")]:
        with pytest.raises(TypeError, match=said):
            Router().add("/{id}", one)
    with pytest.raises(TypeError, match=r"id comes from nowhere: the path has user_id"):
        Router().add("/{user_id}", takes_id)
    with pytest.raises(ValueError, match="the path has a parameter of that name"):
        Router().add("/{request}", takes_all)


def test_an_annotation_that_differs_from_the_converter_is_a_mistake():
    async def takes_int(request, id: int):
        pass

    with pytest.raises(TypeError, match=r"\{id:str\} gives str; write \{id:int\}"):
        Router().add("/{id}", takes_int)
    Router().add("/{id:int}", takes_int)


@pytest.mark.parametrize("first, second",
                         [("/x", "/x"), ("/{a}", "/{b}"), ("/{a:int}/y", "/{b:int}/y"), ("/{p:path}", "/{q:path}")])
def test_a_method_of_a_path_is_given_once(first, second):
    router = Router()
    router.add(first, takes_all, ["GET", "POST"], name="first")
    with pytest.raises(ValueError, match=r"POST of this path is taken by GET, POST .*takes_all"):
        router.add(second, takes_all, ["PUT", "POST"])
    assert len(router.routes()) == 1
    assert router.find("PUT", "/x").status != 200, "nothing of a refused route is there"


def test_a_name_is_given_once():
    router = Router()
    router.add("/a", handler, name="it")
    with pytest.raises(ValueError, match="the name 'it' is taken by GET /a"):
        router.add("/b", handler, name="it")
    assert router.find("GET", "/b").status == 404


# ---- routers in routers ----------------------------------------------------------------------------------------

def test_an_included_router_answers_below_the_prefixes():
    inner = Router(prefix="/users")
    inner.add("", handler)
    inner.add("/{id:int}", takes_all, name="one")
    outer = Router(prefix="/api")
    outer.include(inner, prefix="/{version}", name="users")
    assert found(outer, "/api/v1/users") == ("/api/{version}/users", {"version": "v1"})
    assert found(outer, "/api/v1/users/5") == ("/api/{version}/users/{id:int}", {"version": "v1", "id": 5})
    assert outer.url_for("users.one", version="v2", id=7) == "/api/v2/users/7"
    assert inner.url_for("one", id=7) == "/users/7"


def test_what_an_included_router_gets_later_is_there_too():
    inner, middle, outer = Router(), Router(), Router()
    outer.include(middle, prefix="/m")
    middle.include(inner, prefix="/i")
    inner.add("/x", handler, name="x")
    assert [found(outer, "/m/i/x"), found(middle, "/i/x"), found(inner, "/x")] == [("/m/i/x", {}), ("/i/x", {}), ("/x", {})]
    assert outer.url_for("x") == "/m/i/x"


def test_what_an_outer_router_refuses_is_added_nowhere():
    inner, outer = Router(), Router()
    outer.add("/i/x", handler)
    outer.add("/y", handler, name="y")
    outer.include(inner, prefix="/i")
    with pytest.raises(ValueError, match="GET of this path is taken"):
        inner.add("/x", handler)
    with pytest.raises(ValueError, match="the name 'y' is taken"):
        inner.add("/y", handler, name="y")
    assert found(inner, "/x") == found(inner, "/y") == 404
    assert inner.routes() == []
    other = Router()
    other.add("/free", handler)
    other.add("/x", handler)
    with pytest.raises(ValueError, match="GET of this path is taken"):
        outer.include(other, prefix="/i")
    assert found(outer, "/i/free") == 404


def test_a_router_that_is_included_twice_needs_names_for_each():
    inner, outer = Router(), Router()
    outer.include(inner, prefix="/a", name="a")
    outer.include(inner, prefix="/b", name="b")
    inner.add("/x", handler, name="x")
    assert (outer.url_for("a.x"), outer.url_for("b.x")) == ("/a/x", "/b/x")
    other = Router()
    other.include(inner, prefix="/c", name="c")
    other.include(Router(), prefix="/d")
    twice = Router()
    outer.include(twice, prefix="/c")
    outer.include(twice, prefix="/d")
    with pytest.raises(ValueError, match="the name 'y' is taken"):
        twice.add("/y", handler, name="y")
    assert found(outer, "/c/y") == 404


def test_a_router_that_comes_to_one_place_by_two_ways_is_refused():
    inner, middle, outer = Router(), Router(), Router()
    outer.include(inner, prefix="/a")
    outer.include(middle, prefix="/a")
    middle.include(inner)
    with pytest.raises(ValueError, match="GET of this path is taken"):
        inner.add("/x", handler)
    assert found(inner, "/x") == found(outer, "/a/x") == 404


def test_routers_do_not_include_each_other():
    a, b, c = Router(), Router(), Router()
    a.include(b, prefix="/b")
    b.include(c, prefix="/c")
    for inner, outer in [(a, c), (a, b), (a, a), (b, c)]:
        with pytest.raises(ValueError, match="that router includes this one"):
            outer.include(inner, prefix="/x")
    with pytest.raises(TypeError, match="give a Router"):
        a.include(handler)


@pytest.mark.parametrize("prefix", ["x", "/x/", "/", "/{p:path}", "/a//b"])
def test_a_prefix_that_paths_cannot_be_appended_to_is_refused(prefix):
    with pytest.raises(ValueError, match="prefix="):
        Router(prefix=prefix)


# ---- mounts ----------------------------------------------------------------------------------------------------

def test_a_mount_gets_the_rest_of_the_path_with_every_method():
    router = Router()
    router.mount("/files", takes_rest)
    for path, rest in [("/files", ""), ("/files/", "/"), ("/files/a%20b/c", "/a b/c"), ("/files//x", "//x"),
                       ("/files/../x", "/../x")]:
        for method in ("GET", "HEAD", "OPTIONS", "PURGE"):
            match = router.find(method, path)
            assert (match.handler, match.arguments) == (takes_rest, {"rest": rest})
    assert found(router, "/filesystem") == 404


def test_a_mount_gets_what_no_route_matches():
    router = Router()
    router.mount("/", takes_rest)
    router.mount("/a", takes_rest)
    router.add("/a/b", handler)
    router.add("/{x}/c", handler)
    assert found(router, "/a/b") == ("/a/b", {})
    assert found(router, "/a/c") == ("/{x}/c", {"x": "a"})
    assert found(router, "/a/d") == ("/a", {"rest": "/d"})
    assert found(router, "/d") == ("", {"rest": "/d"})
    router.mount("/{x}", takes_all)
    assert found(router, "/a/d/e") == ("/a", {"rest": "/d/e"})
    router.mount("/{x}/{y}", takes_all)
    assert found(router, "/a/d/e") == ("/{x}/{y}", {"x": "a", "y": "d", "rest": "/e"}), "the longer one"
    router.mount("/a/d", takes_rest)
    assert found(router, "/a/d/e") == ("/a/d", {"rest": "/e"})
    match = router.find("POST", "/a/b")
    assert (match.status, match.allow) == (405, "GET, HEAD, OPTIONS"), "a mount does not hide that there is such a path"


def test_an_encoded_slash_reaches_a_mount_only_where_it_may():
    router = Router()
    router.mount("/no", takes_rest)
    router.mount("/yes", takes_rest, encoded_slashes=True)
    router.mount("/{any}/x", takes_all)
    assert found(router, "/no/a%2Fb") == 404
    assert found(router, "/yes/a%2fb") == ("/yes", {"rest": "/a/b"})
    assert found(router, "/a%2fb/x/y") == ("/{any}/x", {"any": "a/b", "rest": "/y"}), "before the rest it is a parameter's"


def test_a_mounted_router_is_included():
    inner, outer = Router(), Router()
    inner.add("/x", handler)
    assert outer.mount("/in", inner) is None
    assert found(outer, "/in/x") == ("/in/x", {})
    root = Router()
    root.mount("/", inner)
    assert found(root, "/x") == ("/x", {})


def test_a_mount_is_given_once_and_takes_the_rest():
    router = Router()
    router.mount("/a", takes_rest, name="a")
    with pytest.raises(ValueError, match="taken by mount /a"):
        router.mount("/a", takes_rest)
    with pytest.raises(TypeError, match=r"async def handler\(request, rest\)"):
        router.mount("/b", handler)
    assert router.url_for("a", rest="/x y") == "/a/x%20y"
    assert router.url_for("a") == "/a"
    for rest in ("x", "//x", "/../x", 5):
        with pytest.raises(ValueError, match="rest="):
            router.url_for("a", rest=rest)


# ---- hosts -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("host, expected", [
    ("api.example.com", "api"), ("API.Example.com:8080", "api"), ("api.example.com.", "api"), ("acme.example.com", "tenant"),
    ("a.b.example.com", "any"), ("example.com", "any"), (None, "any"), ("", "any"), ("[::1]:80", "any"), ("a b", "any"),
    (".example.com", "any"), ("api.example.com:8a", "any"), ("other.org", "any"),
])
def test_the_most_specific_host_is_asked_first(host, expected):
    router = Router()
    router.add("/", takes_all, name="any")
    router.add("/", takes_all, name="tenant", host="{tenant}.example.com")
    router.add("/", takes_all, name="api", host="api.example.com")
    match = router.find("GET", "/", host)
    assert match.route.name == expected
    assert match.params == ({"tenant": "acme"} if expected == "tenant" else {})


def test_what_a_host_does_not_have_any_host_has():
    router = Router()
    router.add("/any", handler)
    router.add("/{x}", takes_all, ["POST"])
    router.add("/own", handler, ["GET"], host="a.org")
    router.mount("/m", takes_rest, host="a.org")
    assert found(router, "/any", host="a.org") == ("/any", {})
    assert found(router, "/own", "POST", "a.org") == ("/{x}", {"x": "own"})
    assert router.find("PUT", "/own", "a.org").allow == "GET, HEAD, OPTIONS, POST"
    assert found(router, "/own", host="b.org") == 405
    assert found(router, "/m/any", host="a.org") == ("/m", {"rest": "/any"})


def test_a_mount_of_any_host_does_not_hide_the_methods_of_a_host():
    router = Router()
    router.add("/x", handler, host="a.org")
    router.mount("/", takes_rest)
    assert found(router, "/x", "POST", "a.org") == 405
    assert found(router, "/x", "POST", "b.org") == ("", {"rest": "/x"})


def test_a_router_is_included_for_a_host():
    inner, outer = Router(), Router()
    inner.add("/{id:int}", takes_all, name="one")
    outer.include(inner, host="{n:int}.example.com", prefix="/p")
    assert found(outer, "/p/5", host="7.example.com") == ("/p/{id:int}", {"n": 7, "id": 5})
    assert found(outer, "/p/5", host="x.example.com") == found(outer, "/p/5") == 404
    assert outer.url_for("one", n=7, id=5) == "//7.example.com/p/5"
    with pytest.raises(ValueError, match="it has a host already"):
        inner.add("/h", handler, host="a.org")


@pytest.mark.parametrize("host", ["a.org:80", "A.org", "a..org", "", "x{t}.org", "{p:path}.org", "a_.org/", "-a.org", "http://a"])
def test_a_host_that_is_none_is_refused(host):
    with pytest.raises(ValueError, match="host="):
        Router().add("/", takes_all, host=host)


# ---- redirects -------------------------------------------------------------------------------------------------

def test_a_last_slash_too_many_or_too_few_is_redirected_by_choice():
    router = router_of("/a", "/b/", "/c/{x}", "/d d/", redirect_slashes=True)
    for path, location in [("/a/", "/a"), ("/b", "/b/"), ("/c/%C3%BC/", "/c/%C3%BC"), ("/c/x%2Fy%3F/", "/c/x%2Fy%3F"),
                           ("/d%20d", "/d%20d/"), ("/c/\\evil/", "/c/%5Cevil")]:
        match = router.find("GET", path)
        assert (match.status, match.location, match.handler) == (308, location, None)
    for path in ("/a//", "/e", "/e/", "/"):
        assert found(router, path) == 404
    assert found(router_of("/", redirect_slashes=True), "//") == 404
    assert router.find("POST", "/a/").status == 404
    assert found(router_of("/a"), "/a/") == 404


def test_no_redirect_leads_to_another_host():
    router = Router(redirect_slashes=True)
    router.add("/{x}/", takes_all)
    router.mount("/m", takes_rest)
    router.add("/{p:path}", takes_all, ["PUT"])
    for path in ("//evil.org", "//evil.org/", "//evil.org/x/", "/%2Fevil.org", "/\\evil.org"):
        assert not router.find("GET", path).location.startswith(("//", "/\\"))


# ---- URLs ------------------------------------------------------------------------------------------------------

def test_urls_are_encoded_and_found_again():
    router = router_of()
    router.add("/a b/{x}/{rest:path}", takes_all, name="it")
    for x, rest in [("ü/ö", "a/b"), ("a?b#c%", ""), ("~-._", "x//y z"), ("a;b=c&d", "+"), ("…", "%2F/..."), (" ", " ")]:
        url = router.url_for("it", x=x, rest=rest)
        assert url.isascii() and "?" not in url and " " not in url
        assert router.find("GET", url).params == {"x": x, "rest": rest}, url


def test_parameters_that_the_path_does_not_have_become_the_query():
    router = Router()
    router.add("/s/{id:int}", takes_all, name="s")
    assert router.url_for("s", id=5, q="a b&c", page=2, no=None, all=True, tag=["x", "ü"]) == (
        "/s/5?q=a+b%26c&page=2&all=true&tag=x&tag=%C3%BC")
    assert router.url_for("s", id=5, name="x", self="y") == "/s/5?name=x&self=y"


@pytest.mark.parametrize("params, said", [
    ({}, "needs id="), ({"id": "x", "x": 1.0, "n": "n"}, "id=: 'x' is no int"), ({"id": True, "x": 1.0, "n": "n"}, "no int"),
    ({"id": 10**20, "x": 1.0, "n": "n"}, "no int"), ({"id": 1, "x": float("nan"), "n": "n"}, "no float"),
    ({"id": 1, "x": 1.0, "n": ""}, "no str"), ({"id": 1, "x": 1.0, "n": ".."}, "no str"),
    ({"id": 1, "x": 1.0, "n": None}, "needs n="),
])
def test_a_url_that_would_not_be_found_is_not_built(params, said):
    router = Router()
    router.add("/{id:int}/{x:float}/{n}", takes_all, name="it")
    with pytest.raises(ValueError, match=said):
        router.url_for("it", **params)


@pytest.mark.parametrize("rest", ["/etc", "a/../b", "..", "./a"])
def test_a_rest_that_a_client_would_resolve_is_not_built(rest):
    router = Router()
    router.add("/f/{rest:path}", takes_all, name="f")
    with pytest.raises(ValueError, match="no path"):
        router.url_for("f", rest=rest)


@pytest.mark.parametrize("number", [0.0, 1e16, 1e-7, -2.5, 1.5e10])
def test_numbers_in_urls_have_no_exponent(number):
    router = Router()
    router.add("/{x:float}", takes_all, name="x")
    assert router.find("GET", router.url_for("x", x=number)).params == {"x": number}


def test_an_unknown_name_says_which_there_are():
    router = Router()
    router.add("/a", handler, name="a")
    with pytest.raises(KeyError, match="no route is called 'b'; there are a"):
        router.url_for("b")


def test_a_host_that_no_host_can_be_is_not_built():
    router = Router()
    router.add("/", takes_all, host="{t}.example.com", name="t")
    assert router.url_for("t", t="acme") == "//acme.example.com/"
    for tenant in ("a.b", "evil.org/", "a b", "ü", "@"):
        with pytest.raises(ValueError, match="is no host"):
            router.url_for("t", t=tenant)


# ---- listing ---------------------------------------------------------------------------------------------------

def test_routes_are_listed_in_the_order_in_which_they_were_added():
    router, inner = Router(), Router()
    router.add("/b/{id:int}/{x}", takes_all, ["PUT", "GET"], name="b")
    inner.add("/c", handler, host="{t}.org")
    router.include(inner, prefix="/i")
    router.mount("/m", takes_rest)
    assert [(route.path, route.methods, route.host, route.name, route.handler, route.is_mount) for route in router.routes()] == [
        ("/b/{id:int}/{x}", ("PUT", "GET"), None, "b", takes_all, False), ("/i/c", ("GET",), "{t}.org", None, handler, False),
        ("/m", (), None, None, takes_rest, True)]
    assert [str(route) for route in router.routes()] == ["PUT, GET /b/{id:int}/{x}", "GET {t}.org/i/c", "mount /m"]


def test_what_was_found_is_remembered_until_a_route_is_added():
    router = Router()
    router.add("/x/{name}", handler)
    first = router.find("GET", "/x/a%20b")
    assert router.find("GET", "/x/a%20b") is first and first.params == {"name": "a b"}
    assert router.find("POST", "/x/a%20b").status == 405
    router.add("/x/a b", handler, name="exact")
    assert router.find("GET", "/x/a%20b").route.name == "exact"
    for number in range(3000):
        router.find("GET", f"/x/{number}")
    assert len(router._found) <= 1024
    router.find("GET", f"/x/{'y' * 1000}")
    assert all(len(path) <= 128 for _, path in router._found)


def test_a_converter_of_ones_own_is_asked_each_time():
    users = {"ada": 1}
    inner, outer = Router(), Router()
    inner.add_converter("user", users.get)
    inner.add("/u/{who:user}", handler)
    outer.include(inner)
    for router in inner, outer:
        assert router.find("GET", "/u/ada").params == {"who": 1}
    users["ada"] = 2
    for router in inner, outer:
        assert router.find("GET", "/u/ada").params == {"who": 2}
