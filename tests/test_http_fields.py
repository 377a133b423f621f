"""Field values: lists, parameters, media types, negotiation, dates, entity tags, file names, links, authentication, proxies."""

import base64
import calendar
import email.utils
import hashlib
import os
import random
import time
import urllib.parse

import pytest

import flowcoro_http
from flowcoro_http import (
    _basic_credentials, _bearer_credentials, _best_challenge, cache_control, _challenge, content_disposition,
    _digest_credentials, entity_tag, Headers, http_date, negotiate_encoding, negotiate_language, negotiate_type,
    _parse_accept, _parse_basic, _parse_bearer, _parse_cache_control, _parse_challenges, _parse_credentials,
    _parse_entity_tags, _parse_forwarded, parse_http_date, parse_links, _parse_list, parse_media_type, _parse_retry_after,
    _parse_tokens, _parse_weighted, ProtocolError, _quote, safe_filename, _strict_transport_security, _strong_match,
    TrustedProxies, _weak_match)

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 50)))

NOW = 1_700_000_000          # in November 2023

# Long values that no pattern may go back in: each reader has to refuse or read them in a moment.
LONG = [piece * (2**16 // len(piece)) + end
        for piece in ('"', '"\\', 'a"', "a=", ";a=\"", ",", " ", "\t ;", "=", "a-", "<", "<>;", "a,", "W/", '"a"', "a b=c,", "%",
                      "\\")
        for end in ("", '"', "\n", "\0")]


class Unchecked(dict):
    """Fields with any value: Headers takes none that the codec would not let through."""

    def _combined(self, name):
        return self.get(name, "")


def refused(function, *args, says=None):
    with pytest.raises(ProtocolError, match=says) as caught:
        function(*args)
    assert caught.value.status == 400


# ---- lists, tokens, quoted strings, parameters -------------------------------------------------------------

def test_a_list_is_cut_at_commas_outside_quoted_strings_and_empty_elements_are_left_out():
    assert _parse_list("") == _parse_list(" , ,\t,") == []
    assert _parse_list("a, b ,,\tc") == ["a", "b", "c"]
    assert _parse_list(r'a="x, \"y\", z", "b,c"d') == [r'a="x, \"y\", z"', '"b,c"d']


@pytest.mark.parametrize("value", ['"', 'a, "b', r'"\"', '"a\0"', '"a\u0100"'])
def test_a_list_with_an_open_or_a_bad_quoted_string_is_refused(value):
    refused(_parse_list, value, says="quoted string")


def test_only_blanks_and_tabs_are_whitespace():
    refused(_parse_tokens, "a,\u00a0b", says="no token")
    refused(_parse_tokens, "a,\vb", says="no token")
    assert _parse_tokens("Keep-Alive,\tCLOSE ") == ["keep-alive", "close"]


def test_quoting_and_unquoting_are_inverse():
    for text in ("", "plain", 'a"b\\c', "tab\there", "\x80\xff"):
        assert parse_media_type(f"a/b; x={_quote(text)}").parameters == {"x": text}
    for text in ("a\nb", "\0", "\x7f", "€"):
        with pytest.raises(ValueError):
            _quote(text)
    for text in ("", "a b", '"', '"a"b"', '"a\\"'):
        refused(parse_media_type, f"a/b; x={text}")


# ---- media types -------------------------------------------------------------------------------------------

def test_a_media_type_is_read_and_written():
    media = parse_media_type(' Text/HTML;Charset="UTF-8" ; x=a;; ')
    assert media == ("text", "html", {"charset": "UTF-8", "x": "a"})
    assert media.essence == "text/html" and media.charset() == "utf-8"
    assert str(media) == "text/html; charset=UTF-8; x=a"
    assert str(parse_media_type('a/b;c="d e"')) == 'a/b; c="d e"'


@pytest.mark.parametrize("value", ["", "text", "text/", "/html", "text /html", "text/html charset=x", "a/b;c", "a/b;c=",
                                   "a/b; c = d", "a/b;c=d e", 'a/b;c="d', "a/b;c=d;C=e", "a/b,c/d", "a/b\n"])
def test_a_malformed_media_type_is_refused(value):
    refused(parse_media_type, value)


def test_charsets_are_those_of_a_table_and_nothing_is_imported_for_a_name():
    assert parse_media_type("a/b;charset=Shift_JIS").charset() == "shift_jis"
    assert parse_media_type("a/b").charset() == "utf-8" and parse_media_type("a/b").charset(None) is None
    for name in ("idna", "punycode", "unicode_escape", "rot13", "zlib", "x-unknown", "undefined"):
        with pytest.raises(ProtocolError) as caught:
            parse_media_type(f"a/b;charset={name}").charset()
        assert caught.value.status == 415


def test_every_charset_of_the_table_is_a_codec():
    import flowcoro_http
    for codec in flowcoro_http._CHARSETS.values():
        assert b"a".ljust(4, b"\0").decode(codec)


# ---- negotiation -------------------------------------------------------------------------------------------

def test_the_example_of_rfc_9110_gives_its_qualities():
    accept = "text/*;q=0.3, text/plain;q=0.7, text/plain;format=flowed, text/plain;format=fixed;q=0.4, */*;q=0.5"
    order = ["text/plain;format=flowed", "text/plain", "image/jpeg", "text/plain;format=fixed", "text/html"]
    for place in range(len(order)):
        assert negotiate_type(accept, order[:place - 1:-1] or order[::-1]) == order[place]


def test_of_equal_weights_the_servers_order_decides():
    assert negotiate_type("*/*", ["a/b", "c/d"]) == "a/b"
    assert negotiate_type(None, ["a/b", "c/d"]) == "a/b"
    assert negotiate_type("c/d, a/b", ["a/b", "c/d"]) == "a/b"
    assert negotiate_type("a/b;q=0, */*", ["a/b", "c/d"]) == "c/d"
    assert negotiate_type("a/b;q=0", ["a/b", "c/d"]) is None
    assert negotiate_type("text/html, application/json;q=0.9", ["application/json; charset=utf-8"]) == (
        "application/json; charset=utf-8")


def test_weights_have_at_most_three_decimals():
    assert [weight for _, weight in _parse_accept("a/b;q=0.001, a/b;q=1.000, a/b;Q=0., a/b;q=0.5")] == [1, 1000, 0, 500]
    for weight in ("1.1", "2", "0.1234", ".5", "-0", "1e0", "٠", "0.٥", "", "00"):
        refused(_parse_accept, f"a/b;q={weight}")
        refused(_parse_weighted, f"gzip;q={weight}")
    refused(_parse_accept, "*/html")
    refused(_parse_weighted, "gzip;p=1")
    refused(_parse_weighted, "g zip")


@pytest.mark.parametrize("value, chosen", [
    (None, "identity"), ("", "identity"), ("gzip", "gzip"), ("GZIP", "gzip"), ("x-gzip", "gzip"), ("br", "identity"),
    ("deflate, gzip", "gzip"), ("gzip;q=0.5, deflate", "deflate"), ("*", "gzip"), ("*;q=0", None), ("identity;q=0", None),
    ("identity;q=0, *", "gzip"), ("gzip;q=0, *", "deflate"), ("identity, gzip;q=0.5", "identity"), ("gzip, identity", "gzip"),
    ("*;q=0, identity", "identity"), ("br;q=1.0, gzip;q=0.8, *;q=0.1", "gzip"), ("gzip;q=0", "identity"), ("gzip;;q", "identity"),
    ("gzip, " * 100, "gzip")])
def test_an_encoding_is_chosen(value, chosen):
    assert negotiate_encoding(value) == chosen


@pytest.mark.parametrize("value, chosen", [
    (None, "en"), ("de", "de-CH"), ("de-CH, en;q=0.9", "de-CH"), ("de-AT", None), ("fr-CH, fr;q=0.9, en;q=0.8", "en"),
    ("*", "en"),
    ("en;q=0, *", "de-CH"), ("EN-us", "en"), ("en;q=0, en-us", None), ("de;q=0", None), ("zh-Hant-TW", "zh-Hant"), ("x y", "en"),
    ("a-" * 2**15, None)])
def test_a_language_is_chosen(value, chosen):
    assert negotiate_language(value, ["en", "de-CH", "zh-Hant"]) == chosen


def test_a_malformed_preference_is_as_none():
    java = "text/html, image/gif, *; q=.2, */*; q=.2"
    refused(_parse_accept, java)
    assert negotiate_type(java, ["application/json", "text/html"]) == "application/json"


# ---- dates -------------------------------------------------------------------------------------------------

def test_the_three_formats_of_one_moment():
    for value in ("Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"):
        assert parse_http_date(value, NOW) == 784111777
    assert http_date(784111777) == http_date(784111777.9) == "Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.mark.parametrize("seed", SEEDS)
def test_dates_are_those_of_the_standard_library_and_are_read_back(seed):
    draw = random.Random(seed)
    second = draw.randrange(0, 253_402_300_800)
    assert http_date(second) == email.utils.formatdate(second, usegmt=True)
    assert parse_http_date(http_date(second), NOW) == second
    assert parse_http_date(time.asctime(time.gmtime(second)), NOW) == second
    near = draw.randrange(NOW - 49 * 31_557_600, NOW + 49 * 31_557_600)
    assert parse_http_date(time.strftime("%A, %d-%b-%y %H:%M:%S GMT", time.gmtime(near)), NOW) == near


def test_a_year_of_two_digits_lies_at_most_fifty_years_ahead():
    assert time.gmtime(NOW)[:3] == (2023, 11, 14)
    assert time.gmtime(parse_http_date("Saturday, 01-Dec-73 00:00:00 GMT", NOW)).tm_year == 1973
    assert time.gmtime(parse_http_date("Friday, 01-Dec-73 00:00:00 GMT", NOW + 86400 * 30)).tm_year == 2073
    assert time.gmtime(parse_http_date("Tuesday, 01-Jan-30 00:00:00 GMT", NOW)).tm_year == 2030
    assert time.gmtime(parse_http_date("Sunday, 01-Jan-06 00:00:00 GMT", NOW)).tm_year == 2006


def test_a_leap_second_is_the_next_minute():
    assert parse_http_date("Sat, 31 Dec 2016 23:59:60 GMT", NOW) == calendar.timegm((2017, 1, 1, 0, 0, 0))


@pytest.mark.parametrize("value", [
    "", "Sun, 06 Nov 1994 08:49:37 UTC", "Mon, 06 Nov 1994 08:49:37 GMT", "Sun, 6 Nov 1994 08:49:37 GMT",
    "sun, 06 Nov 1994 08:49:37 GMT",
    "Sun, 06 Nov 1994 24:49:37 GMT", "Sun, 06 Nov 1994 08:49:61 GMT", "Sun, 06 Nov 1994 08:60:37 GMT",
    "Wed, 30 Feb 1994 08:49:37 GMT",
    "Sun, 06 Nov 1994 08:49:37 GMT ", " Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:3٧ GMT",
    "Sun, 00 Nov 1994 08:49:37 GMT",
    "Fri, 01 Jan 0000 00:00:00 GMT", "Sun Nov 6 08:49:37 1994", "Sunday, 06-Nov-1994 08:49:37 GMT", "784111777"])
def test_what_is_no_date_is_refused(value):
    refused(parse_http_date, value, NOW)


def test_dates_outside_of_http_are_refused():
    for second in (-1, 253_402_300_800, 1e300):
        with pytest.raises(ValueError):
            http_date(second)


def test_retry_after_is_seconds_or_a_date():
    assert _parse_retry_after("120", NOW) == 120
    assert _parse_retry_after(http_date(NOW + 30), NOW) == 30
    assert _parse_retry_after(http_date(NOW - 30), NOW) == 0
    for value in ("-1", "1.5", "+1", " 1", "1_0", "1" * 5000, "soon"):
        refused(_parse_retry_after, value, NOW)


# ---- entity tags -------------------------------------------------------------------------------------------

def test_entity_tags_compare_as_the_table_of_rfc_9110_says():
    table = [('W/"1"', 'W/"1"', False, True), ('W/"1"', 'W/"2"', False, False), ('W/"1"', '"1"', False, True),
             ('"1"', '"1"', True, True)]
    for one, other, strong, weak in table:
        assert _strong_match(one, other) == _strong_match(other, one) == strong
        assert _weak_match(one, other) == _weak_match(other, one) == weak


def test_entity_tags_are_read_with_commas_inside():
    assert _parse_entity_tags(' "a,b" , W/"c",,""\t') == ['"a,b"', 'W/"c"', '""']
    assert _parse_entity_tags(" * ") == "*"
    for value in ("", ",", "abc", '"a" "b"', 'w/"a"', '"a b"', '"a', '*, "a"', '"a", *', '"a"\n'):
        refused(_parse_entity_tags, value)


def test_an_entity_tag_is_made_of_what_it_may_hold():
    assert entity_tag("x-1") == '"x-1"' and entity_tag("x", weak=True) == 'W/"x"'
    for opaque in ('a"b', "a b", "a\n", "€"):
        with pytest.raises(ValueError):
            entity_tag(opaque)


# ---- Content-Disposition, Link -----------------------------------------------------------------------------

EVIL_NAMES = ["", ".", "..", "../../etc/passwd", "C:\\boot.ini", 'a"b', "a\\", "a\r\nSet-Cookie: x=1", "a;b=c", "naïve.txt",
              "€ 100%.pdf", "\u202egpj.exe", "\ud800", "x" * 1000, "日本語", "a\0b", "%41", "a'b", "\U0001f600", " "]


@pytest.mark.parametrize("name", EVIL_NAMES, ids=ascii)
def test_any_file_name_makes_a_value_that_names_one_file_and_nothing_else(name):
    value = content_disposition(name)
    assert value.isascii() and value.isprintable()
    disposition, _, rest = value.partition(";")
    parameters = parse_media_type(f"a/b;{rest}").parameters
    assert disposition == "attachment" and {"filename"} <= parameters.keys() <= {"filename", "filename*"}
    extended = parameters.get("filename*", "")
    got = urllib.parse.unquote(extended.removeprefix("UTF-8''"), errors="strict") if extended else parameters["filename"]
    assert got and not set(got) & set("/\\\r\n\0\u202e\ud800") and got not in (".", "..")
    if name in ("naïve.txt", "€ 100%.pdf", 'a"b', "a;b=c", "日本語", "%41", "a'b", "\U0001f600"):
        assert got == name


@pytest.mark.parametrize("name", EVIL_NAMES, ids=ascii)
def test_any_file_name_is_made_safe(name):
    safe = safe_filename(name)
    assert safe and not set(safe) & set('/\\\0\r\n<>:"|?*\u202e\ud800') and safe[0] != "." and safe.strip(" .") == safe
    assert len(safe.encode()) <= 255
    assert safe_filename("../../etc/passwd") == "passwd" and safe_filename("..", "x") == "x"
    assert safe_filename("Nul.txt") == "_Nul.txt" and safe_filename("COM1") == "_COM1" and safe_filename("console") == "console"


def test_links_are_read():
    value = ('<https://e.example/?a=1,2>; rel="next last"; rel=prev , </x>;REL = up;title*=UTF-8\'\'%e2%82%ac; title=E; '
             'crossorigin,,<>')
    assert parse_links(value) == [("https://e.example/?a=1,2", {"rel": "next last"}),
                                  ("/x", {"rel": "up", "title": "€", "crossorigin": ""}), ("", {})]
    assert parse_links("") == []
    for broken in ("x", "<a", "<a> b", "<a>; rel=", '<a>; rel="', "<a b>", "<a>; rel=a b"):
        refused(parse_links, broken, says="Link")


# ---- authentication ----------------------------------------------------------------------------------------

def test_challenges_are_told_apart():
    assert _parse_challenges(r'Newauth realm="apps", type=1 ,title="Login to \"apps\"", Basic realm = "simple"') == [
        ("newauth", None, {"realm": "apps", "type": "1", "title": 'Login to "apps"'}), ("basic", None, {"realm": "simple"})]
    assert _parse_challenges(", Negotiate , NTLM abc==, Bearer") == [
        ("negotiate", None, {}), ("ntlm", "abc==", {}), ("bearer", None, {})]
    assert _parse_challenges("") == []
    for value in ("a=b", "Basic realm==x", "Basic realm=x realm=y", "Basic a=b, a=c", 'Basic realm="x', "Basic  a b",
                  "Basic abc== x=y", "="):
        refused(_parse_challenges, value, says="challenge")


def test_a_challenge_is_made():
    value = _challenge("Basic", realm='the "shop"', charset="UTF-8")
    assert value == r'Basic realm="the \"shop\"", charset="UTF-8"'
    assert _parse_challenges(value)[0].parameters["realm"] == 'the "shop"'
    assert _challenge("Negotiate") == "Negotiate"
    for scheme, realm in (("Ba sic", "x"), ("Basic", "a\nb")):
        with pytest.raises(ValueError):
            _challenge(scheme, realm=realm)


def test_basic_credentials_go_there_and_back():
    assert _basic_credentials("Aladdin", "open sesame") == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
    for user, password in (("", ""), ("a", "b:c"), ("täst", "€")):
        assert _parse_basic(_basic_credentials(user, password)) == (user, password)
    assert _parse_basic("bAsIc  YTpi") == ("a", "b")
    assert _parse_basic("Bearer x") is None and _parse_basic("Basically x") is None
    for value in ("Basic", "Basic ", "Basic YTpi=", "Basic YTp", "Basic Y", "Basic a=b", "Basic YTpi, x=y", "Basic YTpi YTpi",
                  "Basic " + base64.b64encode(b"nocolon").decode(), "Basic " + base64.b64encode(b"a:\xff").decode(),
                  "Basic " + base64.b64encode(b"a:b\n").decode()):
        refused(_parse_basic, value, says="Authorization")
    for user, password in (("a:b", "c"), ("a\n", "c"), ("a", "\0")):
        with pytest.raises(ValueError):
            _basic_credentials(user, password)


def test_an_error_does_not_show_what_is_secret():
    for function in (_parse_basic, _parse_bearer, _parse_credentials):
        with pytest.raises(ProtocolError) as caught:
            function("Basic hunter2 hunter2")
        assert "hunter2" not in str(caught.value)


def test_bearer_tokens():
    assert _parse_bearer("Bearer abc.def-ghi_~+/==") == "abc.def-ghi_~+/=="
    assert _parse_bearer(_bearer_credentials("t")) == "t"
    assert _parse_bearer("Basic YTpi") is None
    for value in ("Bearer", "Bearer a b", "Bearer a=b", "Bearer a,b", "", "Bearer \xe9"):
        refused(_parse_bearer, value)
    for token in ("", "a b", "a\r\n", "a,b", "=a"):
        with pytest.raises(ValueError):
            _bearer_credentials(token)


RFC_7616 = ('Digest realm="http-auth@example.org", qop="auth, auth-int", algorithm={}, '
            'nonce="7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v", opaque="FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS"')


def answer(value, user="Mufasa", password="Circle of Life", **changed):
    asked = _parse_challenges(value)[0]
    arguments = {"method": "GET", "target": "/dir/index.html", "cnonce": "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ"}
    return _parse_credentials(_digest_credentials(asked, user, password, **{**arguments, **changed})).parameters


@pytest.mark.parametrize("algorithm, response", [
    ("MD5", "8ca523f5e9506fed4657c9700eebdbec"),
    ("SHA-256", "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1")])
def test_the_examples_of_rfc_7616_are_answered_as_there(algorithm, response):
    got = answer(RFC_7616.format(algorithm))
    assert got["response"] == response
    assert got["algorithm"] == algorithm and got["nc"] == "00000001" and got["qop"] == "auth" and got["username"] == "Mufasa"
    assert got["opaque"] == "FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS" and got["uri"] == "/dir/index.html"


def test_digest_in_its_other_forms():
    # RFC 2617's example, without qop as in RFC 2069
    old = answer('Digest realm="testrealm@host.com", nonce="dcd98b7102dd2f0e8b11d0f600bfb0c093"', password="Circle Of Life")
    assert old["response"] == "670fd8c2df070c60b045671b8b24ff02" and not old.keys() & {"qop", "nc", "algorithm", "cnonce"}

    hashed = answer(RFC_7616.format("SHA-256") + ", userhash=true")
    assert hashed["username"] == "a947aad205e80e429958a387394944c6b496301e79f89d35a4cc23b6ee12b5b6"
    assert answer(RFC_7616.format("SHA-256"), user="Jäsøn")["username*"] == "UTF-8''J%C3%A4s%C3%B8n"

    def md5(text):
        return hashlib.md5(text.encode()).hexdigest()
    session = answer('Digest realm="r", nonce="n", qop="auth", algorithm=MD5-sess', user="u", password="p", cnonce="c", count=2)
    secret = md5(md5("u:r:p") + ":n:c")
    assert session["response"] == md5(f"{secret}:n:00000002:c:auth:{md5('GET:/dir/index.html')}")


def test_the_best_challenge_is_the_first_digest_that_is_understood_then_basic():
    several = _parse_challenges('Basic realm="b", Digest realm="d", nonce="n", algorithm=SHA-512-256, qop="auth", '
                               'Digest realm="d", nonce="n", algorithm=SHA-256, qop="auth-int", '
                               'Digest realm="d", nonce="n", algorithm=sha-256-SESS, qop="auth", Digest realm="d", nonce="n"')
    assert _best_challenge(several) is several[3]
    assert _best_challenge(several[:3]) is several[0]
    assert _best_challenge(several[1:3]) is None
    for one in several[:3]:
        with pytest.raises(ValueError):
            _digest_credentials(one, "u", "p", method="GET", target="/", cnonce="c")


# ---- proxies -----------------------------------------------------------------------------------------------

def test_forwarded_is_read():
    assert _parse_forwarded('for=192.0.2.43, for="[2001:db8:cafe::17]:47011";Proto=https ; host=a') == [
        {"for": "192.0.2.43"}, {"for": "[2001:db8:cafe::17]:47011", "proto": "https", "host": "a"}]
    refused(_parse_forwarded, "for=[::1]")
    refused(_parse_forwarded, "for=a;for=b")


@pytest.mark.parametrize("peer, fields, seen", [
    ("9.9.9.9", {"x-forwarded-for": "1.1.1.1", "x-forwarded-proto": "https"}, ("9.9.9.9", None, None)),
    ("10.0.0.1", {}, ("10.0.0.1", None, None)),
    ("10.0.0.1", {"x-forwarded-for": "6.6.6.6, 1.1.1.1", "x-forwarded-proto": "https", "x-forwarded-host": "e.example"},
     ("1.1.1.1", "https", "e.example")),
    ("10.0.0.1", {"x-forwarded-for": "garbage, 1.1.1.1, 10.0.0.2"}, ("1.1.1.1", None, None)),
    ("10.0.0.1", {"x-forwarded-for": "10.0.0.3, 10.0.0.2"}, ("10.0.0.3", None, None)),
    ("::ffff:10.0.0.1", {"x-forwarded-for": "2001:db8::1"}, ("2001:db8::1", None, None)),
    ("10.0.0.1", {"x-forwarded-for": "1.1.1.1:5000"}, ("1.1.1.1", None, None)),
    ("10.0.0.1", {"x-forwarded-for": "unknown"}, (None, None, None)),
    ("10.0.0.1", {"x-forwarded-proto": "http, https"}, ("10.0.0.1", "https", None)),
    (None, {"x-forwarded-for": "1.1.1.1"}, ("1.1.1.1", None, None)),
    ("10.0.0.1", {"forwarded": "for=1.1.1.1"}, ("10.0.0.1", None, None))])
def test_the_client_is_the_nearest_that_is_no_proxy_of_ours(peer, fields, seen):
    assert TrustedProxies(["10.0.0.0/8", "unix"]).client(peer, Headers(list(fields.items()))) == seen


def test_forwarded_describes_the_hop_at_which_the_walk_ends():
    proxies = TrustedProxies(["10.0.0.0/8", "::1"], field="forwarded")
    value = 'for=6.6.6.6;proto=http;host=evil, for=1.1.1.1;proto=https;host=e.example, for="10.0.0.2:80";proto=http'
    headers = Headers([("forwarded", value), ("x-forwarded-for", "6.6.6.6")])
    assert proxies.client("::1", headers) == ("1.1.1.1", "https", "e.example")
    assert proxies.client("::1", Headers([("forwarded", "for=_hidden"), ("forwarded", "for=10.0.0.9")])) == (None, None, None)


@pytest.mark.parametrize("fields", [{"x-forwarded-for": "evil"}, {"x-forwarded-proto": "ftp"}, {"x-forwarded-host": "a b"},
                                    {"x-forwarded-host": "a:65536"}, {"x-forwarded-host": "[1::2::3]"},
                                    {"x-forwarded-for": "1.1.1.1\u0661"}])
def test_what_a_proxy_says_is_checked(fields):
    refused(TrustedProxies(["10.0.0.1"]).client, "10.0.0.1", Unchecked(fields), says="forwarded")


def test_trusted_proxies_are_checked():
    for networks, field in ((["10.0.0.1/8"], "forwarded"), (["proxy"], "forwarded"), (["::1"], "both")):
        with pytest.raises(ValueError):
            TrustedProxies(networks, field=field)
    with pytest.raises(TypeError):
        TrustedProxies("10.0.0.0/8")
    assert not TrustedProxies(["0.0.0.0/0"]).trusts("1.1.1.1.1")
    assert not TrustedProxies([]).trusts(None)


# ---- Cache-Control, Strict-Transport-Security --------------------------------------------------------------

def test_cache_control_is_read_and_made():
    assert _parse_cache_control('No-Cache="a, b", max-age=3600,,S-MaxAge="60", max-age=1, max-stale, x=y') == {
        "no-cache": "a, b", "max-age": 3600, "s-maxage": 60, "max-stale": None, "x": "y"}
    assert _parse_cache_control("max-age=99999999999999999999") == {"max-age": 2**31}
    for value in ("max-age", "max-age=-1", "max-age=1.5", 'max-age="', "a b", "max-age=" + "9" * 5000):
        refused(_parse_cache_control, value)
    assert cache_control(public=True, max_age=3600, no_store=False, no_cache=None, private="x, y") == (
        'public, max-age=3600, private="x, y"')
    for directives in ({}, {"max_age": True}, {"max_age": -1}, {"max_age": 1.5}, {"x": "a\n"}, {"a b": True}):
        with pytest.raises(ValueError):
            cache_control(**directives)


def test_strict_transport_security_is_made():
    assert _strict_transport_security(31_536_000, include_subdomains=True, preload=True) == (
        "max-age=31536000; includeSubDomains; preload")
    for arguments in ({"max_age": -1}, {"max_age": 1.0}, {"max_age": 60, "preload": True}):
        with pytest.raises(ValueError):
            _strict_transport_security(**arguments)


# ---- all of them -------------------------------------------------------------------------------------------

READERS = [_parse_list, _parse_tokens, parse_media_type, _parse_accept, _parse_weighted, _parse_entity_tags, parse_links,
           _parse_challenges, _parse_credentials, _parse_basic, _parse_bearer, _parse_forwarded, _parse_cache_control,
           lambda value: parse_http_date(value, NOW),
           lambda value: _parse_retry_after(value, NOW), lambda value: negotiate_type(value, ["a/b"]),
           lambda value: negotiate_encoding(value), lambda value: negotiate_language(value, ["en-GB"]),
           lambda value: TrustedProxies(["::1"]).client("::1", Unchecked({"x-forwarded-for": value})),
           lambda value: TrustedProxies(["::1"], field="forwarded").client("::1", Unchecked({"forwarded": value}))]


@pytest.mark.parametrize("read", READERS, ids=range(len(READERS)))
def test_long_values_are_read_or_refused_without_going_back(read):
    for value in LONG:                  # quadratic in 2**16 characters, this would take long
        try:
            read(value)
        except ProtocolError:
            pass


PIECES = ['"', "\\", ",", ";", "=", " ", "\t", "a", "q=0.5", "*", "/", "W/", "<", ">", "'", "utf-8''%41", "%", "\xff", "\0", "\n",
          "1", "max-age", "for", "[::1]", "Basic", "YTpi", "٣", "-", "gzip", "*=", "GMT", ":"]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_values_are_read_or_refused(seed):
    draw = random.Random(seed)
    for _ in range(20):
        value = "".join(draw.choices(PIECES, k=draw.randrange(12)))
        for read in READERS:
            try:
                read(value)
            except ProtocolError:
                pass


def test_an_offer_that_is_no_media_type_is_the_servers_fault():
    with pytest.raises(ValueError, match="offer 'json'"):
        negotiate_type("*/*", ["json", "text/html"])


def test_what_is_remembered_of_texts_is_bounded():
    remembering = flowcoro_http._known(str.upper)
    for number in range(5000):
        assert remembering(f"text {number}") == f"TEXT {number}"
    assert remembering("x" * 1000) == "X" * 1000
    table = remembering.__self__
    assert 0 < len(table) <= flowcoro_http.KNOWN_LINES and max(map(len, table)) <= flowcoro_http.KNOWN_LINE
