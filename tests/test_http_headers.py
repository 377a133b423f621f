"""Headers: the field lines of a head, and what may not get into them."""

import pytest

from flowcoro_http import Headers, HttpConnection, LocalProtocolError, ResponseHead

PAIRS = [("Host", "h"), ("Set-Cookie", "a=b"), ("X-Empty", ""), ("set-cookie", "c=d")]


def test_a_name_is_found_in_any_case_and_gives_the_first_value():
    headers = Headers(PAIRS)
    assert headers["host"] == headers["HOST"] == headers.get("Host") == "h"
    assert headers["SET-cookie"] == "a=b"
    assert headers["x-empty"] == ""


def test_all_values_of_a_name_come_in_order():
    headers = Headers(PAIRS)
    assert headers.get_all("set-Cookie") == ["a=b", "c=d"]
    assert headers.get_all("none") == []


def test_a_name_that_is_not_there_is_a_key_error_or_the_default():
    headers = Headers(PAIRS)
    with pytest.raises(KeyError, match="none"):
        headers["none"]
    assert headers.get("none") is None and headers.get("none", "x") == "x"
    assert "none" not in headers and "hOst" in headers and "x-empty" in headers


def test_a_letter_that_only_lower_makes_ascii_finds_nothing():
    assert "\u212aey" not in Headers([("Key", "x")])
    assert Headers([("Key", "x")]).get_all("\u212aey") == []


def test_a_dict_is_its_items_and_never_the_letters_of_its_names():
    assert Headers({"TE": "trailers", "X-A": "b"}).items() == [("TE", "trailers"), ("X-A", "b")]
    with pytest.raises(TypeError, match="TE"):
        HttpConnection("server").send_message(ResponseHead(400, {"TE": "trailers"}))


def test_lines_are_given_as_they_were_set():
    headers = Headers(PAIRS)
    assert headers.items() == list(headers) == PAIRS
    assert len(headers) == 4
    assert Headers(headers) == headers == headers.copy()


def test_set_takes_the_place_of_all_lines_of_the_name():
    headers = Headers(PAIRS)
    headers.set("SET-COOKIE", "e=f")
    assert headers.items() == [("Host", "h"), ("SET-COOKIE", "e=f"), ("X-Empty", "")]
    headers.set("New", "n")
    assert headers.items()[-1] == ("New", "n") and headers["new"] == "n"


def test_add_and_remove_are_seen_by_a_look_that_follows():
    headers = Headers(PAIRS)
    assert headers["host"] == "h"
    assert headers.remove("HOST") and "host" not in headers
    assert not headers.remove("host")
    headers.add("Host", "other")
    headers.add("host", "third")
    assert headers["host"] == "other" and headers.get_all("host") == ["other", "third"]


def test_a_copy_has_lines_of_its_own():
    headers = Headers(PAIRS)
    headers.copy().remove("host")
    assert "host" in headers


def test_equal_are_headers_with_the_same_lines_whatever_the_case_of_names():
    assert Headers([("A", "x")]) == Headers([("a", "x")])
    assert Headers([("A", "x")]) != Headers([("A", "X")])
    assert Headers([("A", "x"), ("B", "y")]) != Headers([("B", "y"), ("A", "x")])


def test_whitespace_around_a_value_is_no_part_of_it():
    assert Headers([("A", " \tx y\t ")]).items() == [("A", "x y")]


@pytest.mark.parametrize("name", ["", " ", "a b", "a:", "a\r", "a\n", "\0", "ä", "a\u212a", "(a)", "a\x7f", "a,b"])
def test_a_name_that_is_no_token_is_refused(name):
    for change in (Headers().add, Headers().set, lambda name, value: Headers([(name, value)])):
        with pytest.raises(LocalProtocolError, match="no name of a field"):
            change(name, "x")


@pytest.mark.parametrize("value", ["\r", "\n", "a\r\nSet-Cookie: x=y", "\0", "\x0b", "\x1f", "\x7f", "\u0100", "\ud800", "\n x"])
def test_a_value_that_would_split_the_head_is_refused(value):
    for change in (Headers().add, Headers().set, lambda name, value: Headers([(name, value)])):
        with pytest.raises(LocalProtocolError, match="A: .* has a control character"):
            change("A", value)


def test_every_character_of_latin_1_that_is_no_control_may_be_in_a_value():
    value = "".join(chr(n) for n in [9, *range(33, 127), *range(0x80, 0x100)]).strip("\t")
    assert Headers([("A", value)])["a"] == value


@pytest.mark.parametrize("pair", [("A", 1), ("A", None), (1, "x"), ("A", b"x"), (b"A", "x")])
def test_what_is_no_str_is_a_type_error(pair):
    with pytest.raises(TypeError, match="are str"):
        Headers([pair])


@pytest.mark.parametrize("pair", [("Content-Length", "1_0"), ("content-length", "\u0661"), ("Transfer-Encoding", "gzip, chunked"),
                                  ("Host", "a,b"), ("Connection", "a b")])
def test_a_field_that_frames_the_message_is_checked_for_what_it_means(pair):
    with pytest.raises(LocalProtocolError):
        Headers([pair])


def test_secrets_are_not_shown():
    shown = repr(Headers([("Cookie", "secret"), ("Authorization", "secret"), ("A", "b")]))
    assert "secret" not in shown and "('A', 'b')" in shown
