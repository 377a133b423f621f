"""Cookies: read, made, signed."""

import base64
import os
import random
import string
from http.cookies import SimpleCookie

import pytest

from flowcoro_http import ProtocolError, SignatureError, Signer, _delete_cookie, http_date, _parse_cookies, _set_cookie

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 50)))

OCTETS = "".join(sorted(set(string.printable[:94]) - set('",;\\')))        # cookie-octet of RFC 6265
TOKEN = string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~"


# ---- reading -----------------------------------------------------------------------------------------------

def test_cookies_are_read_in_their_order():
    assert list(_parse_cookies("b=2; a=1;c=x=y; d=").items()) == [("b", "2"), ("a", "1"), ("c", "x=y"), ("d", "")]
    assert _parse_cookies("") == {}


def test_the_first_of_several_with_one_name_counts():
    assert _parse_cookies("sid=mine; x=1; sid=evil; Sid=other") == {"sid": "mine", "x": "1", "Sid": "other"}


def test_quotes_and_blanks_around_a_value_are_taken_off():
    assert _parse_cookies('a="b c"; d = e f \t;g="; h="";i="j"k') == {
        "a": "b c", "d": "e f", "g": '"', "h": "", "i": '"j"k'}


def test_what_is_malformed_is_passed_over_and_does_not_hide_the_rest():
    value = 'a=1; nonsense; =x; b d=2; c=\x01; e\x00=3; ; ü=4; f=5\n; g=6\n'
    assert _parse_cookies(value) == {"a": "1"}
    assert _parse_cookies(value + "; h=\xfc,{\"x\":1}") == {"a": "1", "h": '\xfc,{"x":1}'}
    assert _parse_cookies("\u00a0a=1; \u2003b=2;c=\u00a03") == {"c": "\u00a03"}        # only blank and tab are whitespace


@pytest.mark.parametrize("seed", SEEDS)
def test_made_cookies_are_read_back_as_by_the_standard_library(seed):
    draw = random.Random(seed)
    wanted = {}
    for _ in range(draw.randrange(1, 20)):
        name = "".join(draw.choices(TOKEN, k=draw.randrange(1, 8)))
        if not name.startswith("__"):                       # which might be a prefix that asks for attributes
            wanted.setdefault(name, "".join(draw.choices(OCTETS, k=draw.randrange(12))))
    value = "; ".join(_set_cookie(name, text, path=None, same_site=None) for name, text in wanted.items())
    assert _parse_cookies(value) == wanted
    # SimpleCookie takes $ for an attribute of RFC 2109, and names that are attributes for those of the cookie before
    known = {name: text for name, text in wanted.items() if name[0] != "$"}
    jar = SimpleCookie("; ".join(f"{name}={text}" for name, text in known.items() if name.isalpha() and text.isalnum()))
    for name, morsel in jar.items():
        assert known[name] == morsel.value


def test_a_hundred_thousand_cookies_are_read_and_as_many_bad_ones_passed_over():
    many = "; ".join(f"n{number}={number}" for number in range(100_000))
    assert len(_parse_cookies(many, max_cookies=100_000)) == 100_000
    assert _parse_cookies("same=1; " * 100_000, max_cookies=100_000) == {"same": "1"}
    for piece in ("x", "=", ";", " ", "a=\0;", "a ", '"', "a=", "\t;", '="', "a=b c "):
        _parse_cookies(piece * 300_000, max_cookies=10**6)


def test_more_cookies_than_allowed_are_refused():
    assert len(_parse_cookies("a=1;b=2;c=3", max_cookies=3)) == 3
    with pytest.raises(ProtocolError, match="max_cookies") as caught:
        _parse_cookies("a=1;b=2;a=3", max_cookies=2)
    assert caught.value.status == 431


# ---- making ------------------------------------------------------------------------------------------------

def test_a_cookie_has_all_attributes():
    assert _set_cookie("a", "b") == "a=b; Path=/; SameSite=Lax"
    assert _set_cookie("__Secure-a", "b", max_age=60, expires=784111777, domain="e.example", path="/x", secure=True,
                      http_only=True, same_site="none", partitioned=True) == (
        "__Secure-a=b; Expires=Sun, 06 Nov 1994 08:49:37 GMT; Max-Age=60; Domain=e.example; Path=/x; Secure; HttpOnly; "
        "SameSite=None; Partitioned")
    assert _set_cookie("a", "", path=None, same_site=None) == "a="
    assert _set_cookie("a", "b", domain="a." * 126 + "b").count("a.") == 126         # 253 characters, the longest name of a host


def test_a_cookie_is_deleted_with_the_attributes_it_has():
    assert _delete_cookie("a", path="/x", domain="e.example") == (
        f"a=; Expires={http_date(0)}; Max-Age=0; Domain=e.example; Path=/x; SameSite=Lax")
    assert _delete_cookie("__Host-a", secure=True).startswith("__Host-a=; ")


@pytest.mark.parametrize("name, value, attributes, says", [
    ("", "x", {}, "token"), ("a b", "x", {}, "token"), ("a=b", "x", {}, "token"), ("ä", "x", {}, "token"),
    ("a\n", "x", {}, "token"), ("a", "b c", {}, "encode"), ("a", "b;c", {}, "encode"), ("a", 'b"', {}, "encode"),
    ("a", "b,c", {}, "encode"), ("a", "b\\", {}, "encode"),
    ("a", "b\r\nSet-Cookie: x", {}, "encode"), ("a", "ü", {}, "encode"), ("a", "x" * 4096, {}, "4096"),
    ("a", "b", {"path": "x"}, "path"), ("a", "b", {"path": "/;x"}, "path"), ("a", "b", {"path": "/\n"}, "path"),
    ("a", "b", {"path": "/" * 1025}, "path"), ("a", "b", {"domain": ".e.example"}, "domain"),
    ("a", "b", {"domain": "e;x"}, "domain"), ("a", "b", {"domain": "münchen.example"}, "domain"),
    ("a", "b", {"domain": "a." * 127 + "b"}, "domain"),
    ("a", "b", {"same_site": "maybe"}, "same_site"), ("a", "b", {"same_site": "None"}, "secure=True"),
    ("a", "b", {"partitioned": True}, "secure=True"), ("__Secure-a", "b", {}, "secure=True"), ("__host-a", "b", {}, "__Host-"),
    ("__Host-a", "b", {"secure": True, "domain": "e.example"}, "no domain"),
    ("__Host-a", "b", {"secure": True, "path": "/x"}, "path"), ("__Host-a", "b", {"secure": True, "path": None}, "path"),
    ("a", "b", {"expires": -1}, "1970")])
def test_what_browsers_would_drop_or_misread_is_refused(name, value, attributes, says):
    with pytest.raises(ValueError, match=says):
        _set_cookie(name, value, **attributes)


def test_max_age_is_an_int():
    for seconds in ("60", 1.5, True):
        with pytest.raises(TypeError, match="max_age"):
            _set_cookie("a", "b", max_age=seconds)


# ---- signing -----------------------------------------------------------------------------------------------

OLD, NEW = b"o" * 32, b"n" * 32


def test_a_signed_value_comes_back_and_fits_into_a_cookie():
    signer = Signer(NEW)
    for payload in (b"", b"x", bytes(range(256))):
        value = signer.sign(payload, 1000.9)
        assert signer.verify(value, 1000) == payload
        assert _parse_cookies(_set_cookie("s", value))["s"] == value


def test_keys_are_rotated():
    old = Signer(OLD).sign(b"x", 0)
    both = Signer([NEW, OLD])
    assert both.verify(old, 0) == b"x"
    assert Signer(NEW).verify(both.sign(b"x", 0), 0) == b"x"
    with pytest.raises(SignatureError, match="another key"):
        Signer(NEW).verify(old, 0)


def test_a_value_signed_for_one_purpose_is_not_taken_for_another():
    value = Signer(NEW, purpose="session").sign(b"x", 0)
    with pytest.raises(SignatureError, match="purpose"):
        Signer(NEW, purpose="password reset").verify(value, 0)


def test_age_is_that_of_the_signature():
    signer = Signer(NEW)
    value = signer.sign(b"x", 1000)
    assert signer.verify(value, 1060, max_age=60) == b"x"
    assert signer.verify(value, 940) == b"x"
    with pytest.raises(SignatureError, match="61 s ago"):
        signer.verify(value, 1061, max_age=60)
    with pytest.raises(SignatureError, match="future"):
        signer.verify(value, 939)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_changed_value_is_taken(seed):
    draw = random.Random(seed)
    signer = Signer([NEW, OLD])
    value = signer.sign(draw.randbytes(draw.randrange(20)), 1000)
    place = draw.randrange(len(value))
    alphabet = string.ascii_letters + string.digits + "-_.=+/ \n\0é"
    for changed in (value[:place] + value[place + 1:], value[:place] + draw.choice(alphabet) + value[place:],
                    value[:place] + draw.choice(alphabet) + value[place + 1:], value + "=", value + "\n", value[::-1], ""):
        if changed != value:
            with pytest.raises(SignatureError):
                signer.verify(changed, 1000)


def test_a_signature_has_one_spelling():
    signer = Signer(NEW)
    value = signer.sign(b"x", 0)
    last = value[-1]
    for other in string.ascii_letters + string.digits + "-_":       # 43 characters have two bits more than 32 bytes
        if other != last:
            with pytest.raises(SignatureError):
                signer.verify(value[:-1] + other, 0)
    assert base64.urlsafe_b64decode(value.split(".")[-1] + "=")


def test_keys_are_bytes_of_some_length():
    for keys, error in ((b"short", ValueError), ([NEW, b""], ValueError), ("text" * 8, TypeError), ([], TypeError)):
        with pytest.raises(error, match="keys"):
            Signer(keys)
