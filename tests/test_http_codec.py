"""The HTTP/1.1 codec: what it takes, what it refuses and with which status; the pieces that it comes in make no difference."""

import gc
import http.client
import http.server
import importlib.util
import io
import itertools
import os
import pathlib
import random
import sys
import time

import pytest

import flowcoro
import flowcoro_http
from flowcoro_http import (NEED_DATA, PAUSED, ConnectionClosed, Data, EndOfMessage, Headers, HttpConnection, HttpError,
                           InformationalResponse, LocalProtocolError, ProtocolError, RequestHead, ResponseHead)

FIRST_SEED = int(os.environ.get("FLOWCORO_FIRST_SEED", 0))
SEEDS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("FLOWCORO_SEEDS", 30)))

FUZZ = pathlib.Path(__file__).parent / "fuzz" / "http_codec.py"
spec = importlib.util.spec_from_file_location("fuzz_http_codec", FUZZ)
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


# ---- helpers -----------------------------------------------------------------------------------------------

def receive(connection, data):
    """Give it the data; all events until it wants more, or pauses."""
    if data:
        connection.receive_data(data)
    events = []
    while (event := connection.next_event()) is not NEED_DATA and event is not PAUSED:
        events.append(event)
        if isinstance(event, ConnectionClosed):
            break
    return events


def server(data=b"", **limits):
    """(connection, events) of a server that has received this."""
    connection = HttpConnection("server", **limits)
    return connection, receive(connection, data)


def client(request=None, response=b"", **limits):
    """(connection, events) of a client that has sent the request (a GET by default), and received this."""
    connection = HttpConnection("client", **limits)
    connection.send_message(request or RequestHead("GET", "/", [("Host", "h")]))
    return connection, receive(connection, response)


def answered(connection, status=200, headers=(), body=b""):
    return connection.send_message(ResponseHead(status, headers), body)


def status_of(data, **limits):
    """The status with which a server refuses this, however it comes; None if it takes it."""
    chance = random.Random(len(data))
    results = [fuzz.events_of("server", pieces, **limits) for pieces in fuzz.splits(data, chance)]
    assert all(result == results[0] for result in results)
    [_, status, said] = next((event for event in results[0] if event[0] == "error"), ("", None, ""))
    assert "ended in the middle" not in said, "it was taken, and more expected"
    return status


def refusal(data, **limits):
    """What a server says about this."""
    connection = HttpConnection("server", **limits)
    with pytest.raises(ProtocolError) as caught:
        receive(connection, data)
        connection.receive_end()
        receive(connection, b"")
    assert connection.their_state == "ERROR" and not connection.keep_alive
    return caught.value


def request(lines=b"", first=b"GET / HTTP/1.1", body=b"", host=b"Host: h\r\n"):
    return first + b"\r\n" + host + lines + b"\r\n" + body


def chunked(body):
    return request(b"Transfer-Encoding: chunked\r\n", b"POST / HTTP/1.1", body)


def content(events):
    return b"".join(event.data for event in events if isinstance(event, Data))


# ---- request lines -----------------------------------------------------------------------------------------

def test_a_request_is_its_head_and_its_end():
    connection, [head, end] = server(b"GET /a?b=c HTTP/1.1\r\nHost: example.com\r\nX-Y: z\r\n\r\n")
    assert (head.method, head.target, head.version) == ("GET", "/a?b=c", "1.1")
    assert head.headers.items() == [("Host", "example.com"), ("X-Y", "z")]
    assert end.trailers is None
    assert (connection.our_state, connection.their_state) == ("SEND_RESPONSE", "DONE")
    assert connection.keep_alive and connection.method == "GET" and not connection.upgrade and not connection.expects_continue


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "M-SEARCH", "get", "!#$%&'*+-.^_`|~09azAZ"])
def test_any_token_is_a_method(method):
    _, [head, _] = server(request(first=f"{method} / HTTP/1.1".encode()))
    assert head.method == method


@pytest.mark.parametrize("first", [
    b"GET  / HTTP/1.1", b"GET /  HTTP/1.1", b" GET / HTTP/1.1", b"GET / HTTP/1.1 ", b"GET\t/ HTTP/1.1", b"GET /\tHTTP/1.1",
    b"GET / http/1.1", b"GET / HTTP/1", b"GET / HTTP/1.", b"GET / HTTP/1.11", b"GET / HTTP/11.1", b"GET / HTTP/1,1",
    b"GET / HTTP/+1.1", b"GET / HTTP/1.x", b"GET / HTTP /1.1", b"GET / XHTTP/1.1", b"GET /", b"GET", b"GET / ", b"GET HTTP/1.1",
    b"/ HTTP/1.1", b"G(T / HTTP/1.1", b"G\xc4T / HTTP/1.1", b"G:T / HTTP/1.1", b"GET /a b HTTP/1.1", b"GET /\x00 HTTP/1.1",
    b"GET /\x7f HTTP/1.1", b"GET /\xe4 HTTP/1.1", b"GET /a#b HTTP/1.1", b'GET /a"b HTTP/1.1', b"GET /<a> HTTP/1.1",
    b"GET / HTTP/1.\xb2", b"\x16\x03\x01\x02\x00", b"GET /\x0b HTTP/1.1",
])
def test_anything_but_method_target_version_is_refused(first):
    assert status_of(request(first=first)) == 400


@pytest.mark.parametrize("target, authority, path", [
    ("/", "h", "/"), ("/a/b?c=d&e", "h", "/a/b?c=d&e"), ("//x", "h", "//x"), ("/%20%", "h", "/%20%"), ("/?a=[1]|{2}", "h",
                                                                                                       "/?a=[1]|{2}"),
    ("http://e.com", "e.com", "/"), ("HTTP://e.com:80/a?b", "e.com:80", "/a?b"), ("https://[::1]:8443/", "[::1]:8443", "/"),
    ("http://e.com?a=b", "e.com", "/?a=b"),
])
def test_a_target_is_a_path_or_absolute(target, authority, path):
    _, [head, _] = server(request(first=f"GET {target} HTTP/1.1".encode()))
    assert (head.target, head.authority, head.path) == (target, authority, path)


@pytest.mark.parametrize("first", [
    b"GET * HTTP/1.1", b"GET h:80 HTTP/1.1", b"GET h HTTP/1.1", b"GET ?a HTTP/1.1", b"GET ftp://h/ HTTP/1.1",
    b"GET http:/// HTTP/1.1",
    b"GET http://a@h/ HTTP/1.1", b"GET http://a:b@h/ HTTP/1.1", b"GET http://h,i/ HTTP/1.1", b"GET http://h:x/ HTTP/1.1",
    b"GET http://h:65536/ HTTP/1.1", b"GET http://[::1/ HTTP/1.1", b"GET http://[1::2::3]/ HTTP/1.1", b"GET http://h/#a HTTP/1.1",
    b"GET http:h/ HTTP/1.1", b"GET http://h\\i/ HTTP/1.1", b"CONNECT / HTTP/1.1", b"CONNECT h HTTP/1.1", b"CONNECT h: HTTP/1.1",
    b"CONNECT http://h:1/ HTTP/1.1", b"CONNECT a@h:1 HTTP/1.1", b"CONNECT * HTTP/1.1", b"OPTIONS ** HTTP/1.1",
    b"OPTIONS *a HTTP/1.1",
])
def test_a_target_in_a_form_that_the_method_does_not_take_is_refused(first):
    assert status_of(request(first=first)) == 400


def test_the_asterisk_is_for_options_and_the_authority_for_connect():
    _, [head, _] = server(request(first=b"OPTIONS * HTTP/1.1"))
    assert (head.target, head.path, head.authority) == ("*", "*", "h")
    _, [head, _] = server(request(first=b"OPTIONS http://e.com HTTP/1.1"))
    assert (head.path, head.authority) == ("*", "e.com")
    _, [head, _] = server(request(first=b"CONNECT e.com:443 HTTP/1.1"))
    assert (head.path, head.authority) == ("", "e.com:443")


@pytest.mark.parametrize("version, status", [
    (b"1.0", None), (b"1.1", None), (b"1.2", None), (b"1.9", None), (b"2.0", 505), (b"0.9", 505), (b"3.0", 505)])
def test_a_higher_minor_version_is_as_1_1_and_another_major_505(version, status):
    assert status_of(request(first=b"GET / HTTP/" + version)) == status
    if version == b"1.9":
        connection, [head, _] = server(request(first=b"GET / HTTP/1.9"))
        assert head.version == "1.1" and connection.keep_alive


def test_the_preface_of_http_2_is_another_version():
    assert refusal(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").status == 505


def test_one_empty_line_before_a_request_is_ignored_and_two_are_not():
    assert status_of(b"\r\n" + request()) is None
    assert status_of(b"\r\n\r\n" + request()) == 400
    connection, _ = server(request())
    answered(connection)
    connection.start_next_cycle()
    assert len(receive(connection, b"\r\n" + request())) == 2


def test_what_is_no_http_is_refused_by_its_first_byte():
    for byte in (b"\x16", b" ", b"\x80", b":"):
        connection = HttpConnection("server")
        with pytest.raises(ProtocolError, match="no request begins with the byte"):
            receive(connection, byte)
    connection = HttpConnection("client")
    connection.send_message(RequestHead("GET", "/", [("Host", "h")]))
    with pytest.raises(ProtocolError):
        receive(connection, b"HTP")


# ---- field lines -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line", [
    b"A : b", b"A\t: b", b" A: b", b"\tA: b", b": b", b"A", b"A b: c", b"A\x00: b", b"\xc4: b", b"A(: b", b"A: b\x00", b"A: \x00",
    b"A: \x01", b"A: b\x0bc", b"A: \x0c", b"A: \x1f", b"A: \x7f", b"A: b\r", b"A: b\rc", b"A: b\nB: c", b"\n", b"\r",
    b"A: b\r\r", b"=",
    b"[A]: b", b"\"A\": b",
])
def test_a_field_line_that_is_none_is_refused(line):
    assert status_of(request(line + b"\r\n")) == 400                            # as the second one
    assert status_of(request(host=line + b"\r\n", lines=b"Host: h\r\n")) == 400     # and as the first


def test_a_folded_line_is_refused_and_called_so():
    assert "folding" in str(refusal(request(b"A: b\r\n c\r\n")))
    assert "folding" in str(refusal(request(host=b" Host: h\r\n")))


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nHost: h\n", b"GET / HTTP/1.1\nHost: h\n\n",
                                  b"GET / HTTP/1.1\rHost", b"GET / HTTP/1.1\r\nHost: h\rA", b"GET / HTTP/1.1\r\nHost: h\r\n\n",
                                  b"GET / HTTP/1.1\r\nHost: h\r\n\r\r", b"\n", b"\r\r"])
def test_a_bare_line_feed_or_carriage_return_is_refused_at_once(data):
    connection = HttpConnection("server")
    with pytest.raises(ProtocolError, match="400: .*(line feed|carriage return)"):
        receive(connection, data)


def test_only_space_and_tab_around_a_value_are_stripped():
    _, [head, _] = server(request(b"A: \t b c\t \r\nB:d\r\nC:\r\nD: \xa0x\xa0\r\nE: \x85\r\n"))
    assert head.headers.items()[1:] == [("A", "b c"), ("B", "d"), ("C", ""), ("D", "\xa0x\xa0"), ("E", "\x85")]


def test_of_lines_of_one_name_the_first_is_found():
    _, [head, _] = server(request(b"A: b\r\na: c\r\n"))
    assert head.headers["a"] == "b" and head.headers.get_all("A") == ["b", "c"]
    _, [head, *_] = client(response=b"HTTP/1.1 200 OK\r\nA: b\r\na: c\r\n\r\n")
    assert head.headers["a"] == "b" and head.headers.get_all("A") == ["b", "c"]


# ---- Host --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", ["h", "h:80", "example.com", "a_b-c~d.e", "127.0.0.1:1", "[::1]", "[::1]:65535", "h:0"])
def test_a_host_is_a_name_or_address_and_perhaps_a_port(value):
    _, [head, _] = server(request(host=f"Host: {value}\r\n".encode()))
    assert head.authority == value


@pytest.mark.parametrize("value", [
    "", " ", "a@h", "a:b@h", "h/", "h/a", "h?a", "h#a", "h,i", "h i", "h:", "h:x", "h:+1", "h:-1", "h:1_0", "h:65536",
    "h:999999", "h:80:80",
    "::1", "[::1", "[h]", "[]", "[1::2::3]", "[::1]x", "h;", "h%41", "\\h", "h\xe4", "h:\xb2", "'h'", "http://h", "h\ti"])
def test_a_malformed_host_is_refused(value):
    assert status_of(request(host=f"Host: {value}\r\n".encode("latin-1"))) == 400
    assert status_of(request(host=f"Host: {value}\r\n".encode("latin-1"), first=b"GET / HTTP/1.0")) == 400


def test_a_missing_or_repeated_host_is_refused():
    assert status_of(request(host=b"")) == 400
    assert status_of(request(host=b"", first=b"GET http://h/ HTTP/1.1")) == 400
    assert status_of(request(b"Host: h\r\n")) == 400
    assert status_of(request(b"hOST: i\r\n")) == 400
    assert status_of(request(b"Host: h\r\n", first=b"GET / HTTP/1.0")) == 400


def test_http_1_0_needs_no_host():
    assert status_of(request(host=b"", first=b"GET / HTTP/1.0")) is None


# ---- the length of the content -----------------------------------------------------------------------------

def test_a_content_with_a_length_comes_as_it_came():
    connection, events = server(request(b"Content-Length: 5\r\n", b"POST / HTTP/1.1", b"he"))
    assert content(events) == b"he" and len(events) == 2
    data = b"llo"
    connection.receive_data(data)
    assert connection.next_event().data is data                     # not a copy
    assert isinstance(connection.next_event(), EndOfMessage)


@pytest.mark.parametrize("value", [b"", b"+5", b"-5", b"5_0", b"0x5", b"5 5", b"5,5", b"5, 5", b"5.0", b"\xb2", b"five", b"5;",
                                   b"1e1", b"\x00",
                                   b"9" * 19, b"\xd9\xa1"])
def test_a_length_that_is_not_plain_digits_is_refused(value):
    assert status_of(request(b"Content-Length: " + value + b"\r\n", b"POST / HTTP/1.1", b"hello")) == 400


@pytest.mark.parametrize("lines", [
    b"Content-Length: 5\r\nContent-Length: 6\r\n", b"Content-Length: 5\r\ncontent-length: 5\r\n",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
    b"Transfer-Encoding: chunked, chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Transfer-Encoding: gzip\r\n",
    b"Transfer-Encoding: identity\r\n", b"Transfer-Encoding:\r\n", b"Transfer-Encoding: chunked,\r\n",
    b"Transfer-Encoding: ,chunked\r\n",
    b"Transfer-Encoding: xchunked\r\n", b"Transfer-Encoding: chunked;q=1\r\n", b"Transfer-Encoding: \"chunked\"\r\n",
    b"Transfer-Encoding: \x0bchunked\r\n", b"Transfer-Encoding : chunked\r\n", b"Transfer-Encoding\r\n : chunked\r\n",
    b"Transfer-Encoding: chun\r\n ked\r\n", b"X: y\nTransfer-Encoding: chunked\r\n", b"X: y\rTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked\x00\r\n", b"Transfer-Encoding: chunKed\xa0\r\n", b"Transfer-Encoding: \xefchunked\r\n",
    b"Content-Length : 5\r\n", b"Content-Length\x00: 5\r\n", b"Content-Length: 5\r\n\tContent-Length: 6\r\n",
])
def test_a_message_whose_end_two_readers_may_see_in_two_places_is_refused(lines):
    assert status_of(request(lines, b"POST / HTTP/1.1", b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n")) == 400


def test_transfer_encoding_in_http_1_0_is_refused():
    assert status_of(request(b"Transfer-Encoding: chunked\r\n", b"POST / HTTP/1.0", b"0\r\n\r\n")) == 400


def test_the_word_chunked_is_read_in_any_case():
    assert status_of(request(b"transfer-encoding:  CHUNKED\t\r\n", b"POST / HTTP/1.1", b"0\r\n\r\n")) is None


def test_a_message_with_neither_has_no_content():
    connection, [head, end] = server(request(first=b"POST / HTTP/1.1", body=b"GET"))
    assert isinstance(end, EndOfMessage) and connection.trailing_data == b"GET"


def test_the_end_in_the_middle_of_a_message_is_an_error():
    for data in (b"GET / HTTP/1.1\r\nHost", b"G", request(b"Content-Length: 5\r\n", body=b"hell"),
                 request(b"Content-Length: 5\r\n"),
                 chunked(b""), chunked(b"5"), chunked(b"5\r\nhel"), chunked(b"5\r\nhello"), chunked(b"5\r\nhello\r\n"),
                 chunked(b"0\r\n"),
                 chunked(b"0\r\nA: b\r\n")):
        assert "ended in the middle" in str(refusal(data))
        ends = [fuzz.events_of("server", pieces)[-2] for pieces in fuzz.splits(data, random.Random(1))]
        assert set(ends) == {("error", 400, str(refusal(data)))}


# ---- chunks ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("body, expected", [
    (b"0\r\n\r\n", b""), (b"5\r\nhello\r\n0\r\n\r\n", b"hello"), (b"A\r\n0123456789\r\n00\r\n\r\n", b"0123456789"),
    (b"000000000000000a\r\n0123456789\r\n0\r\n\r\n", b"0123456789"), (b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n", b"ab"),
    (b"1;a\r\nx\r\n0;b=c;d=\"e f\\\"\"\r\n\r\n", b"x"), (b"2\r\n\r\n\r\n0\r\n\r\n", b"\r\n"),
    (b"1;a=b\r\nx\r\n1\r\ny\r\n0\r\n\r\n", b"xy")])
def test_chunks_are_taken_apart(body, expected):
    connection, events = server(chunked(body))
    assert content(events) == expected and isinstance(events[-1], EndOfMessage)
    assert status_of(chunked(body)) is None


@pytest.mark.parametrize("body", [
    b"+5\r\nhello\r\n", b"-5\r\nhello\r\n", b"0x5\r\nhello\r\n", b"5_0\r\nhello\r\n", b" 5\r\nhello\r\n", b"5 \r\nhello\r\n",
    b"5\t\r\nhello\r\n",
    b"\r\nhello\r\n", b"g\r\nhello\r\n", b"00000000000000005\r\nhello\r\n", b"FFFFFFFFFFFFFFFFF\r\n", b"\xb2\r\nab\r\n",
    b"5\nhello\r\n",
    b"5\rhello\r\n", b"5\r\r\nhello\r\n", b"5\r\nhello\n", b"5\r\nhello\r", b"5\r\nhello0\r\n\r\n", b"5\r\nhelloo\r\n",
    b"5\r\nhello\r\r\n",
    b"5\r\nhello\n\n", b"5\r\nhello \r\n", b"5 ;a\r\nhello\r\n", b"5; a\r\nhello\r\n", b"5;\r\nhello\r\n", b"5;a=\r\nhello\r\n",
    b"5;a=b c\r\nhello\r\n", b"5;a=\"b\r\nhello\r\n", b"5;a=\"\x00\"\r\nhello\r\n", b"5;a\nb\r\nhello\r\n",
    b"5;a\r\n\r\nhello\r\n",
    b"5;a=\"b\"c\r\nhello\r\n", b"5,a\r\nhello\r\n", b"5;=b\r\nhello\r\n", b"5;a=\"\n\"\r\nhello\r\n",
    b"5;a=\"\r\n\"\r\nhello\r\n",
    b"0\r\n\n", b"0\r\n\r\r", b"0\n\r\n", b"0\r\nA\r\n\r\n", b"0\r\n A: b\r\n\r\n", b"0\r\nA : b\r\n\r\n",
    b"0\r\nA: b\nB: c\r\n\r\n",
    b"5;" + b"a" * 260 + b"\r\nhello\r\n", b"5" + b";a" * 130 + b"\r\nhello\r\n",
])
def test_a_chunk_that_is_none_is_refused(body):
    assert status_of(chunked(body + b"0\r\n\r\n")) == 400


def test_a_chunk_of_sixteen_digits_is_awaited_and_not_made_room_for():
    connection, events = server(chunked(b"FFFFFFFFFFFFFFFF\r\nabc"))
    assert content(events) == b"abc" and connection.next_event() is NEED_DATA


def test_trailers_come_with_the_end():
    _, events = server(chunked(b"1\r\na\r\n0\r\nX-Sum: 1\r\nX-sum: \t2\r\n\r\n"))
    assert events[-1].trailers == Headers([("X-Sum", "1"), ("X-sum", "2")])


@pytest.mark.parametrize("name", """
    Transfer-Encoding Content-Length Host Connection Keep-Alive Proxy-Connection TE Trailer Upgrade Max-Forwards Expect Range
    If-Match If-None-Match If-Modified-Since If-Unmodified-Since If-Range Pragma Cache-Control Authorization Proxy-Authorization
    WWW-Authenticate Proxy-Authenticate Authentication-Info Proxy-Authentication-Info Cookie Set-Cookie Age Expires Date Location
    Retry-After Vary Warning content-encoding Content-Type Content-Range Content-Location Content-Language Forwarded
    X-Forwarded-For X-Forwarded-Proto X-Forwarded-Host Via""".split())
def test_a_field_that_comes_too_late_in_a_trailer_section_is_refused_both_ways(name):
    value = {"Content-Length": "1", "Transfer-Encoding": "chunked"}.get(name, "x")
    assert status_of(chunked(f"0\r\n{name}: {value}\r\n\r\n".encode())) == 400
    connection, _ = server(request())
    connection.send(ResponseHead(200))
    with pytest.raises(LocalProtocolError, match="trailer section"):
        connection.send(EndOfMessage([(name, value)]))
    assert connection.send(EndOfMessage()) == b"0\r\n\r\n"


def test_many_small_chunks_come_as_few_events():
    _, events = server(chunked(b"1\r\na\r\n" * 1000 + b"0\r\n\r\n"))
    assert content(events) == b"a" * 1000 and len(events) == 3


def test_content_before_a_bad_chunk_is_delivered_first():
    connection = HttpConnection("server")
    connection.receive_data(chunked(b"5\r\nhello\r\nx\r\n"))
    connection.next_event()
    assert connection.next_event().data == b"hello"
    with pytest.raises(ProtocolError):
        connection.next_event()


# ---- limits ------------------------------------------------------------------------------------------------

def test_a_request_line_beyond_its_limit_is_414():
    line = b"GET /" + b"a" * 86 + b" HTTP/1.1"
    assert status_of(request(first=line), max_request_line=100) is None
    assert status_of(request(first=line.replace(b" HTTP", b"a HTTP")), max_request_line=100) == 414
    assert refusal(b"G" * 101, max_request_line=100).status == 414           # before it is complete


def test_a_status_line_beyond_its_limit_is_refused():
    line = b"HTTP/1.1 200 " + b"a" * 87
    assert client(response=line + b"\r\nContent-Length: 0\r\n\r\n", max_request_line=100)[1][0].status == 200
    for data in line + b"a\r\n", line + b"a":                               # (the second: before it is complete)
        with pytest.raises(ProtocolError, match="the status line"):
            client(response=data, max_request_line=100)


def test_a_field_line_beyond_its_limit_is_431():
    assert status_of(request(b"A: " + b"b" * 97 + b"\r\n"), max_field_line=100) is None
    assert status_of(request(b"A: " + b"b" * 98 + b"\r\n"), max_field_line=100) == 431
    assert refusal(b"GET / HTTP/1.1\r\n" + b"a" * 101, max_field_line=100).status == 431


def test_a_field_line_more_than_the_limit_is_431():
    assert status_of(request(b"A: b\r\n" * 9), max_fields=10) is None
    assert status_of(request(b"A: b\r\n" * 10), max_fields=10) == 431


def test_a_head_beyond_its_limit_is_431():
    size = len(request(b"A: b\r\n" * 9)) - 4
    assert status_of(request(b"A: b\r\n" * 9), max_head=size) is None
    assert status_of(request(b"A: b\r\n" * 9), max_head=size - 1) == 431
    assert refusal(request(b"A: b\r\n" * 100)[:-2], max_head=200).status == 431


def test_a_content_beyond_its_limit_is_413_before_it_comes():
    assert status_of(request(b"Content-Length: 9\r\n", body=b"x" * 9), max_body=9) is None
    assert refusal(request(b"Content-Length: 10\r\n"), max_body=9).status == 413
    assert status_of(chunked(b"5\r\nhello\r\n4\r\nabcd\r\n0\r\n\r\n"), max_body=9) is None
    assert status_of(chunked(b"5\r\nhello\r\n5\r\nabcde\r\n0\r\n\r\n"), max_body=9) == 413
    assert refusal(chunked(b"5\r\nhello\r\n5\r\n"), max_body=9).status == 413
    assert refusal(chunked(b"FFFFFFFFFFFFFFFF\r\n"), max_body=9).status == 413


def test_the_limit_of_a_content_may_be_set_when_its_head_is_known():
    connection, _ = server(chunked(b""))
    connection.max_body = 3
    with pytest.raises(ProtocolError) as caught:
        receive(connection, b"4\r\n")
    assert caught.value.status == 413


def test_a_trailer_section_has_the_limits_of_a_head():
    body = b"0\r\n" + b"A: bbbb\r\n" * 12 + b"\r\n"
    for limits, status in (({}, None), (dict(max_fields=12), None), (dict(max_fields=11), 431), (dict(max_head=106), None),
                           (dict(max_head=105), 431)):
        assert status_of(chunked(body), **limits) == status
    assert status_of(chunked(b"0\r\nA: " + b"b" * 60 + b"\r\n\r\n"), max_field_line=50) == 431


def test_the_defaults_are_what_is_common():
    assert refusal(b"GET /" + b"a" * 10_000).status == 414
    assert refusal(request(b"A: b\r\n" * 101)).status == 431
    assert refusal(request(b"A: " + b"b" * 20_000)).status == 431
    assert refusal(request((b"A: " + b"b" * 2000 + b"\r\n") * 40)).status == 431
    assert status_of(request(b"A: " + b"b" * 8000 + b"\r\n")) is None


def test_lines_that_are_known_have_the_limits_of_the_connection_they_come_on():
    line = b"X-Known: " + b"k" * 100 + b"\r\n"
    assert status_of(request(line)) is None
    assert status_of(request(line), max_field_line=100) == 431


def test_the_table_of_known_lines_is_bounded_and_keeps_no_secrets():
    table = flowcoro_http._RECEIVED
    server(request(b"Cookie: secret\r\nAuthorization: secret\r\nX-Long: " + b"x" * 1000 + b"\r\nX-Short: x\r\n"))
    assert "X-Short: x" in table
    assert not [line for line in table if "secret" in line or len(line) > flowcoro_http.KNOWN_LINE]
    for n in range(3 * flowcoro_http.KNOWN_LINES):
        server(request(b"X-Number: %d\r\n" % n))
        assert len(table) <= flowcoro_http.KNOWN_LINES
    connection, _ = server(request())
    answered(connection, headers=[("Set-Cookie", "secret")])
    assert not [pair for pair in flowcoro_http._SENT if "secret" in pair]


def test_a_connection_between_two_requests_holds_nothing_of_the_last():
    connection, _ = server(request(b"Content-Length: 100000\r\n", body=b"x" * 100_000))
    answered(connection)
    connection.start_next_cycle()
    names = set(type(connection).__mro__[-2].__slots__) - {"_known"}        # the table that all connections share
    sizes = [sys.getsizeof(getattr(connection, name)) for name in names]
    assert sum(sizes) < 4000 and connection.trailing_data == b""


# ---- keep-alive, pipelining --------------------------------------------------------------------------------

@pytest.mark.parametrize("first, lines, keep_alive", [
    (b"GET / HTTP/1.1", b"", True), (b"GET / HTTP/1.1", b"Connection: close\r\n", False), (b"GET / HTTP/1.1",
                                                                                           b"Connection: CLOSE\r\n", False),
    (b"GET / HTTP/1.1", b"Connection: a, close ,b\r\n", False), (b"GET / HTTP/1.1", b"Connection: a\r\nConnection: close\r\n",
                                                                 False),
    (b"GET / HTTP/1.1", b"Connection: keep-alive\r\n", True), (b"GET / HTTP/1.1", b"Connection: closed\r\n", True),
    (b"GET / HTTP/1.0", b"", False), (b"GET / HTTP/1.0", b"Connection: Keep-Alive\r\n", True),
    (b"GET / HTTP/1.0", b"Connection: keep-alive, close\r\n", False), (b"GET / HTTP/1.0", b"Keep-Alive: 5\r\n", False)])
def test_a_connection_is_kept_as_its_version_and_options_say(first, lines, keep_alive):
    connection, _ = server(request(lines, first))
    assert connection.keep_alive == keep_alive
    sent = answered(connection)
    assert (b"\r\nConnection: close\r\n" in sent) == (not keep_alive)
    assert (b"\r\nConnection: keep-alive\r\n" in sent) == (keep_alive and b"1.0" in first)
    assert connection.reusable == keep_alive
    if not keep_alive:
        assert connection.our_state == connection.their_state == "MUST_CLOSE"
        with pytest.raises(LocalProtocolError, match="close the connection"):
            connection.start_next_cycle()


def test_options_of_a_connection_that_are_no_tokens_are_refused():
    assert status_of(request(b"Connection: a b\r\n")) == 400
    assert status_of(request(b"Connection: ,, close,\r\n")) is None


def test_a_server_that_says_close_ends_it():
    connection, _ = server(request())
    assert b"keep-alive" not in answered(connection, headers=[("Connection", "close")])
    assert connection.our_state == connection.their_state == "MUST_CLOSE"


def test_requests_that_come_at_once_are_given_one_by_one():
    connection, events = server(b"".join(request(first=f"GET /{n} HTTP/1.1".encode()) for n in range(3)))
    for n in range(3):
        assert len(events) == 2 and events[0].target == f"/{n}"
        assert connection.next_event() is (PAUSED if n < 2 else NEED_DATA)
        answered(connection)
        connection.start_next_cycle()
        events = receive(connection, b"")
    assert events == []


def test_no_cycle_begins_before_both_sides_are_through():
    connection, _ = server(request(b"Content-Length: 1\r\n"))
    with pytest.raises(LocalProtocolError):
        connection.start_next_cycle()
    answered(connection)
    with pytest.raises(LocalProtocolError, match="they are SEND_BODY"):
        connection.start_next_cycle()
    receive(connection, b"x")
    connection.start_next_cycle()


def test_after_the_last_request_nothing_is_read():
    connection, _ = server(request(b"Connection: close\r\n") + request())
    assert connection.next_event() is NEED_DATA and connection.trailing_data == b""
    for _ in range(3):
        connection.receive_data(b"x" * 1000)
        assert connection.next_event() is NEED_DATA and connection.trailing_data == b""
    answered(connection)
    connection.receive_end()
    assert isinstance(connection.next_event(), ConnectionClosed)


def test_a_client_that_ends_between_requests_has_closed():
    connection = HttpConnection("server")
    connection.receive_end()
    assert isinstance(connection.next_event(), ConnectionClosed) and connection.their_state == "CLOSED"
    assert isinstance(connection.next_event(), ConnectionClosed)
    connection, _ = server(request())
    connection.receive_end()
    assert isinstance(connection.next_event(), ConnectionClosed)
    assert answered(connection)                             # it has only ended its half
    assert not connection.reusable


def test_an_error_is_answered_and_then_raised_again():
    connection = HttpConnection("server")
    connection.receive_data(b"nonsense\r\n\r\n")
    for _ in range(3):
        with pytest.raises(ProtocolError, match="no request line") as caught:
            connection.next_event()
        assert connection.trailing_data == b""
        connection.receive_data(b"more")
    assert isinstance(caught.value, HttpError) and isinstance(caught.value, flowcoro.FlowCoroError)
    assert b"\r\nConnection: close\r\n" in answered(connection, caught.value.status)
    assert connection.our_state == "MUST_CLOSE" and not connection.reusable


def test_a_server_may_answer_a_client_that_asks_for_nothing_once():
    connection, _ = server(b"GET / HT")
    assert b"\r\nConnection: close\r\n" in answered(connection, 408)
    assert connection.their_state == "MUST_CLOSE"
    assert receive(connection, request()) == []
    with pytest.raises(LocalProtocolError):
        answered(connection)


# ---- Expect, Upgrade, CONNECT ------------------------------------------------------------------------------

def test_a_client_waits_for_100_until_it_is_sent_or_content_comes():
    expecting = request(b"Content-Length: 5\r\nExpect: 100-Continue\r\n")
    connection, _ = server(expecting)
    assert connection.expects_continue
    assert connection.send(InformationalResponse(100)) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert not connection.expects_continue
    receive(connection, b"hello")
    answered(connection)
    assert connection.reusable
    connection, _ = server(expecting + b"h")
    assert not connection.expects_continue
    connection, _ = server(expecting)
    connection.send(InformationalResponse(103))         # says nothing about the content
    assert connection.expects_continue


@pytest.mark.parametrize("lines", [b"Expect: 100-continue\r\n", b"Expect: 100-continue\r\nContent-Length: 0\r\n",
                                   b"Content-Length: 5\r\n",
                                   b"Expect: 200-ok\r\nContent-Length: 5\r\n"])
def test_a_client_that_does_not_wait_is_not_told_to_go_on(lines):
    for data in (request(lines), request(b"Expect: 100-continue\r\nContent-Length: 5\r\n", b"GET / HTTP/1.0")):
        connection = HttpConnection("server")
        connection.receive_data(data)
        assert isinstance(connection.next_event(), RequestHead) and not connection.expects_continue


def test_a_final_response_to_a_client_that_waits_is_the_last_one():
    connection, _ = server(request(b"Content-Length: 5\r\nExpect: 100-continue\r\n"))
    assert b"\r\nConnection: close\r\n" in answered(connection, 413)
    receive(connection, b"hello")
    assert connection.their_state == "MUST_CLOSE"


UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n"
SWITCH = [("Connection", "upgrade"), ("Upgrade", "WebSocket")]


def test_a_server_may_switch_to_a_protocol_that_is_offered():
    connection, _ = server(request(UPGRADE, body=b"\x81\x00"))
    assert connection.upgrade == ("websocket", "h2c")
    assert connection.their_state == "MIGHT_SWITCH" and connection.next_event() is PAUSED
    sent = connection.send(InformationalResponse(101, SWITCH))
    assert sent == b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\n\r\n"
    assert connection.our_state == connection.their_state == "SWITCHED"
    connection.receive_data(b"\x82")
    assert connection.next_event() is PAUSED and connection.trailing_data == b"\x81\x00\x82"
    with pytest.raises(LocalProtocolError):
        connection.send(Data(b"x"))


def test_a_server_that_does_not_switch_goes_on_in_http():
    connection, _ = server(request(UPGRADE) + request())
    answered(connection)
    connection.start_next_cycle()
    assert connection.upgrade == () and len(receive(connection, b"")) == 2


def test_a_switch_waits_for_the_whole_request():
    connection, _ = server(request(UPGRADE + b"Content-Length: 1\r\n"))
    with pytest.raises(LocalProtocolError, match="complete"):
        connection.send(InformationalResponse(101, SWITCH))
    receive(connection, b"x")
    assert connection.send(InformationalResponse(101, SWITCH))


@pytest.mark.parametrize("headers", [[], SWITCH[:1], SWITCH[1:], [("Connection", "upgrade"), ("Upgrade", "other")]])
def test_101_names_one_of_the_protocols_that_are_offered(headers):
    connection, _ = server(request(UPGRADE))
    with pytest.raises(LocalProtocolError):
        connection.send(InformationalResponse(101, headers))
    with pytest.raises(LocalProtocolError):
        server(request())[0].send(InformationalResponse(101, SWITCH))


def test_an_upgrade_without_the_option_or_in_http_1_0_is_none():
    for data in (request(b"Upgrade: websocket\r\n"), request(b"Connection: keep-alive\r\nUpgrade: websocket\r\n"),
                 request(b"Connection: upgrade\r\n"), request(UPGRADE, b"GET / HTTP/1.0")):
        connection, _ = server(data)
        assert connection.upgrade == () and connection.their_state in ("DONE", "MUST_CLOSE")


def test_a_connect_is_a_tunnel_once_it_is_accepted():
    connection, _ = server(b"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\nabc")
    assert connection.next_event() is PAUSED
    with pytest.raises(LocalProtocolError):
        answered(connection, headers=[("Content-Length", "0")])
    assert answered(connection) == b"HTTP/1.1 200 OK\r\n\r\n"
    assert connection.our_state == connection.their_state == "SWITCHED" and connection.trailing_data == b"abc"


def test_a_connect_that_is_refused_has_been_a_request():
    connection, _ = server(b"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n" + request())
    assert b"Content-Length: 2" in answered(connection, 403, body=b"no")
    connection.start_next_cycle()
    assert len(receive(connection, b"")) == 2


def test_a_connect_has_no_content():
    for lines in (b"Content-Length: 0\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n"):
        assert status_of(b"CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n" + lines + b"\r\n") == 400


# ---- what a server sends -----------------------------------------------------------------------------------

def test_a_whole_response_is_one_bytes():
    connection, _ = server(request())
    sent = answered(connection, headers=[("Date", "now"), ("Set-Cookie", "a=b"), ("Set-Cookie", "c=d")], body=b"hello")
    assert sent == b"HTTP/1.1 200 OK\r\nDate: now\r\nSet-Cookie: a=b\r\nSet-Cookie: c=d\r\nContent-Length: 5\r\n\r\nhello"
    assert connection.reusable


def test_headers_and_pairs_are_sent_alike():
    for headers in ([("A", "b"), ("a", "c")], Headers([("A", "b"), ("a", "c")]), iter([("A", "b"), ("a", "c")])):
        assert b"\r\nA: b\r\na: c\r\n" in answered(server(request())[0], headers=headers)


@pytest.mark.parametrize("headers", [
    [("A\r\nB", "c")], [("A", "b\r\nSet-Cookie: c")], [("A", "b\nc")], [("A", "b\rc")], [("A", "b\0c")], [("A: b\r\nC", "d")],
    [("", "a")],
    [("A ", "b")], [("A", "\u0100")], [("A", "\ud800")], [("Content-Length", "+1")], [("Transfer-Encoding", "gzip")],
    [("Content-Length", "1"), ("Transfer-Encoding", "chunked")], [("Content-Length", "1"), ("Content-Length", "1")],
    [("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "chunked")]])
def test_a_handler_cannot_split_or_misframe_a_response(headers):
    connection, _ = server(request())
    with pytest.raises(LocalProtocolError):
        connection.send(ResponseHead(200, headers))
    with pytest.raises(LocalProtocolError):
        connection.send_message(ResponseHead(200, headers), b"x")
    assert connection.our_state == "SEND_RESPONSE"
    assert answered(connection, 500) == b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("head", [ResponseHead(200, reason="a\r\nb"), ResponseHead(200, reason="\u0100"), ResponseHead(199),
                                  ResponseHead(1000),
                                  ResponseHead("200"), ResponseHead(True), ResponseHead(200.0), InformationalResponse(200)])
def test_a_status_is_a_number_and_a_reason_cannot_split(head):
    connection, _ = server(request())
    with pytest.raises(LocalProtocolError):
        connection.send(head)
    assert connection.our_state == "SEND_RESPONSE"


def test_a_reason_is_the_usual_one_or_the_one_that_is_given():
    assert server(request())[0].send_message(ResponseHead(413)).startswith(b"HTTP/1.1 413 Content Too Large\r\n")
    assert server(request())[0].send_message(ResponseHead(200, reason="F\xefne")).startswith(b"HTTP/1.1 200 F\xefne\r\n")
    assert server(request())[0].send_message(ResponseHead(299)).startswith(b"HTTP/1.1 299 \r\n")


def test_a_content_is_held_to_the_length_that_was_announced():
    connection, _ = server(request())
    with pytest.raises(LocalProtocolError, match="2 bytes"):
        answered(connection, headers=[("Content-Length", "3")], body=b"ab")
    assert connection.send(ResponseHead(200, [("Content-Length", "3")])) == b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"
    data = b"ab"
    assert connection.send(Data(data)) is data
    with pytest.raises(LocalProtocolError, match="1 are left"):
        connection.send(Data(b"cd"))
    with pytest.raises(LocalProtocolError, match="1 bytes are left"):
        connection.send(EndOfMessage())
    assert connection.send(Data(memoryview(b"c"))) == b"c"
    assert connection.send(EndOfMessage()) == b"" and connection.reusable


def test_a_content_of_unknown_length_is_chunked():
    connection, _ = server(request())
    sent = [connection.send(event) for event in (ResponseHead(200), Data(b"hello"), Data(b""), Data(b"x" * 26),
                                                 EndOfMessage([("A", "b")]))]
    assert sent == [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n", b"",
                    b"1a\r\n" + b"x" * 26 + b"\r\n",
                    b"0\r\nA: b\r\n\r\n"]
    connection, _ = server(request())
    assert answered(connection, headers=[("Transfer-Encoding", "chunked")], body=b"ab").endswith(b"\r\n\r\n2\r\nab\r\n0\r\n\r\n")


def test_for_http_1_0_a_content_of_unknown_length_ends_with_the_connection():
    connection, _ = server(request(b"Connection: keep-alive\r\n", b"GET / HTTP/1.0"))
    assert connection.send(ResponseHead(200)) == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    assert connection.send(Data(b"hello")) == b"hello"
    assert connection.send(EndOfMessage()) == b"" and connection.our_state == "MUST_CLOSE"
    connection, _ = server(request(first=b"GET / HTTP/1.0"))
    with pytest.raises(LocalProtocolError, match="leave it out"):
        connection.send(ResponseHead(200, [("Transfer-Encoding", "chunked")]))


def test_a_response_to_head_has_the_fields_and_no_content():
    connection, _ = server(request(first=b"HEAD / HTTP/1.1"))
    assert answered(connection, body=b"hello") == b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" and connection.reusable
    connection, _ = server(request(first=b"HEAD / HTTP/1.1"))
    sent = [connection.send(event) for event in (ResponseHead(200, [("Content-Length", "9")]), Data(b"hello"), EndOfMessage())]
    assert sent == [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"", b""] and connection.reusable
    connection, _ = server(request(first=b"HEAD / HTTP/1.1"))
    assert answered(connection, headers=[("Transfer-Encoding", "chunked")], body=b"hello").endswith(b"chunked\r\n\r\n")


def test_204_and_304_have_no_content():
    assert answered(server(request())[0], 204) == b"HTTP/1.1 204 No Content\r\n\r\n"
    assert answered(server(request())[0], 204, [("Content-Length", "0")]) == b"HTTP/1.1 204 No Content\r\n\r\n"
    assert answered(server(request())[0], 304) == b"HTTP/1.1 304 Not Modified\r\n\r\n"
    assert b"Content-Length: 9" in answered(server(request())[0], 304, [("Content-Length", "9")])
    for status, headers in ((204, [("Content-Length", "1")]), (204, [("Transfer-Encoding", "chunked")])):
        with pytest.raises(LocalProtocolError):
            answered(server(request())[0], status, headers)
    for status in (204, 304):
        connection, _ = server(request())
        with pytest.raises(LocalProtocolError):
            answered(connection, status, body=b"x")
        connection.send(ResponseHead(status))
        with pytest.raises(LocalProtocolError):
            connection.send(Data(b"x"))
        assert connection.send(EndOfMessage()) == b"" and connection.reusable


def test_a_connection_that_was_refused_is_no_garbage_of_a_cycle():
    def refuse():
        connection = HttpConnection("server")
        connection.receive_data(b"nonsense\r\n\r\n")
        for _ in range(2):
            try:
                connection.next_event()
            except ProtocolError as error:
                assert error.status == 400 and "nonsense" in error.message

    refuse()
    gc.collect()
    gc.disable()
    try:
        refuse()
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_205_has_no_content_and_says_so():
    for headers in (), (("Content-Length", "0"),):
        for _ in range(2):                      # the second head would be known
            assert answered(server(request())[0], 205, headers) == b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n"
        with pytest.raises(LocalProtocolError):
            answered(server(request())[0], 205, headers, body=b"x")
    for headers in [("Content-Length", "1")], [("Transfer-Encoding", "chunked")]:
        with pytest.raises(LocalProtocolError, match="205"):
            server(request())[0].send(ResponseHead(205, headers))
    connection, _ = server(request())
    assert connection.send(ResponseHead(205)) == b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(LocalProtocolError):
        connection.send(Data(b"x"))
    assert connection.send(EndOfMessage()) == b"" and connection.reusable
    head = answered(server(request(first=b"HEAD / HTTP/1.1"))[0], 205)
    assert head == b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n"


def test_an_informational_response_is_not_for_http_1_0_and_has_no_content():
    connection, _ = server(request())
    assert connection.send(InformationalResponse(103, [("Link", "</a>")])) == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    with pytest.raises(LocalProtocolError):
        connection.send(InformationalResponse(103, [("Content-Length", "0")]))
    with pytest.raises(LocalProtocolError):
        server(request(first=b"GET / HTTP/1.0"))[0].send(InformationalResponse(100))


def test_trailers_are_for_chunks():
    connection, _ = server(request())
    connection.send(ResponseHead(200, [("Content-Length", "0")]))
    with pytest.raises(LocalProtocolError, match="chunked"):
        connection.send(EndOfMessage([("A", "b")]))


def test_events_in_a_wrong_order_are_refused_and_change_nothing():
    connection = HttpConnection("server")
    for event in (Data(b"x"), EndOfMessage(), InformationalResponse(100), RequestHead("GET", "/", [("Host", "h")])):
        with pytest.raises(LocalProtocolError, match="server that is IDLE"):
            connection.send(event)
    connection = HttpConnection("client")
    for event in (Data(b"x"), EndOfMessage(), InformationalResponse(100), ResponseHead(200)):
        with pytest.raises(LocalProtocolError, match="client that is IDLE"):
            connection.send(event)
    with pytest.raises(LocalProtocolError):
        connection.send_message(ResponseHead(200))
    assert connection.our_state == connection.their_state == "IDLE"


def test_what_is_no_event_is_a_type_error():
    connection = HttpConnection("server")
    for event in (None, b"x", NEED_DATA):
        with pytest.raises(TypeError, match="no event"):
            connection.send(event)
    with pytest.raises(TypeError, match="no head"):
        connection.send_message(Data(b"x"))
    with pytest.raises(ValueError, match="no role"):
        HttpConnection("proxy")


def test_no_data_is_not_the_end():
    connection = HttpConnection("server")
    with pytest.raises(LocalProtocolError, match="receive_end"):
        connection.receive_data(b"")
    connection.receive_end()
    with pytest.raises(LocalProtocolError, match="after receive_end"):
        connection.receive_data(b"x")


def test_a_side_may_say_that_it_closes():
    connection = HttpConnection("server")
    assert connection.send(ConnectionClosed()) == b"" and connection.our_state == "CLOSED"
    assert receive(connection, request()) == []
    connection, _ = server(request())
    with pytest.raises(LocalProtocolError):
        connection.send(ConnectionClosed())


# ---- a client ----------------------------------------------------------------------------------------------

def test_a_response_is_its_head_its_content_and_its_end():
    connection, [head, data, end] = client(response=b"HTTP/1.1 200 Fine thanks\r\nContent-Length: 5\r\nA: b\r\n\r\nhello")
    assert (head.status, head.reason, head.version, head.headers["a"]) == (200, "Fine thanks", "1.1", "b")
    assert data.data == b"hello" and end.trailers is None and connection.reusable
    connection.start_next_cycle()
    assert connection.send_message(RequestHead("GET", "/b", [("Host", "h")])) == b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.mark.parametrize("line", [b"HTTP/1.1 200", b"HTTP/1.1 200 ", b"HTTP/1.0 999 x", b"HTTP/1.7 200 OK",
                                  b"HTTP/1.1 200 \xe4 \tx"])
def test_a_status_line_may_lack_the_reason(line):
    assert isinstance(client(response=line + b"\r\nContent-Length: 0\r\n\r\n")[1][0], ResponseHead)


@pytest.mark.parametrize("line", [
    b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 099 OK", b"HTTP/1.1  200 OK", b"HTTP/1.1 +20 OK", b"HTTP/1.1 2_0 OK",
    b"HTTP/1.1 2\xb20 OK",
    b"HTTP/1.1\t200 OK", b"HTTP/2.0 200 OK", b"HTTP/1 200 OK", b"http/1.1 200 OK", b"HTTP/1.1 200 O\x00K", b"HTTP/1.1 200\tOK",
    b"ICY 200 OK",
    b" HTTP/1.1 200 OK", b"", b"HTTP/1.1", b"HTTP/1.1 200 O\rK", b"HTTP/1.10 200 OK"])
def test_a_status_line_that_is_none_is_refused(line):
    response = line + b"\r\nContent-Length: 0\r\n\r\n"
    for pieces in fuzz.splits(response, random.Random(1)):
        assert [event for event in fuzz.events_of("client", pieces) if event[0] == "error"][0][1] == 502


@pytest.mark.parametrize("lines", [b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
                                   b"Content-Length: 5\r\nContent-Length: 6\r\n",
                                   b"Transfer-Encoding: gzip, chunked\r\n", b"Content-Length: 5, 5\r\n", b"A : b\r\n",
                                   b"A: b\r\n c\r\n",
                                   b"A: b\nC: d\r\n", b"Content-Length: +5\r\n"])
def test_a_response_is_held_to_the_same_rules_as_a_request(lines):
    with pytest.raises(ProtocolError) as caught:
        client(response=b"HTTP/1.1 200 OK\r\n" + lines + b"\r\nhello")
    assert caught.value.status == 502
    with pytest.raises(ProtocolError):
        client(response=b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")


def test_a_response_of_no_known_length_lasts_until_the_end():
    connection, events = client(response=b"HTTP/1.1 200 OK\r\n\r\nhel")
    events += receive(connection, b"lo")
    assert content(events) == b"hello"
    connection.receive_end()
    assert isinstance(connection.next_event(), EndOfMessage)
    assert connection.our_state == "MUST_CLOSE" and not connection.reusable


def test_such_a_response_has_a_limit_too():
    connection, _ = client(response=b"HTTP/1.1 200 OK\r\n\r\n12345", max_body=5)
    with pytest.raises(ProtocolError, match="more than 5 bytes"):
        receive(connection, b"6")


@pytest.mark.parametrize("method, head", [
    ("HEAD", b"200 OK\r\nContent-Length: 5\r\n"), ("HEAD", b"200 OK\r\nTransfer-Encoding: chunked\r\n"), ("HEAD", b"200 OK\r\n"),
    ("GET", b"204 No Content\r\n"), ("GET", b"204 No Content\r\nContent-Length: 5\r\n"),
    ("GET", b"304 Not Modified\r\nContent-Length: 5\r\n"),
    ("GET", b"304 Not Modified\r\nTransfer-Encoding: chunked\r\n"), ("GET", b"200 OK\r\nContent-Length: 0\r\n")])
def test_some_responses_have_no_content_whatever_they_say(method, head):
    connection, [got, end] = client(RequestHead(method, "/", [("Host", "h")]), b"HTTP/1.1 " + head + b"\r\n", max_body=3)
    assert isinstance(end, EndOfMessage) and connection.reusable


def test_the_end_in_the_middle_of_a_response_is_an_error():
    for response in (b"", b"HTTP/1.1 200 OK\r\nA", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell",
                     b"HTTP/1.1 100 Continue\r\n\r\n",
                     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"):
        connection, _ = client(response=response)
        connection.receive_end()
        with pytest.raises(ProtocolError, match="the peer ended"):
            receive(connection, b"")


def test_informational_responses_come_before_the_response():
    connection, events = client(response=b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
                                b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert [(type(event), event.status) for event in events[:3]] == [
        (InformationalResponse, 100), (InformationalResponse, 103), (ResponseHead, 200)]
    assert connection.reusable


@pytest.mark.parametrize("head, reusable", [
    (b"HTTP/1.1 200 OK\r\n", True), (b"HTTP/1.1 200 OK\r\nConnection: close\r\n", False), (b"HTTP/1.0 200 OK\r\n", False),
    (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n", True)])
def test_a_client_keeps_a_connection_as_the_response_says(head, reusable):
    connection, _ = client(response=head + b"Content-Length: 0\r\n\r\n")
    assert connection.reusable == reusable
    connection, _ = client(RequestHead("GET", "/", [("Host", "h"), ("Connection", "close")]), head + b"Content-Length: 0\r\n\r\n")
    assert not connection.reusable


def test_a_response_without_a_request_is_an_error():
    connection = HttpConnection("client")
    connection.receive_data(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    with pytest.raises(ProtocolError, match="no request"):
        connection.next_event()
    with pytest.raises(LocalProtocolError):
        connection.send_message(RequestHead("GET", "/", [("Host", "h")]))
    connection, _ = client(response=b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
    assert connection.next_event() is PAUSED


def test_a_server_that_has_closed_is_sent_no_request():
    connection = HttpConnection("client")
    connection.receive_end()
    assert isinstance(connection.next_event(), ConnectionClosed)
    with pytest.raises(LocalProtocolError, match="CLOSED"):
        connection.send_message(RequestHead("GET", "/", [("Host", "h")]))


@pytest.mark.parametrize("head", [
    RequestHead("GET", "/"), RequestHead("GET", "/", [("Host", "h"), ("Host", "h")]), RequestHead("GET", "/", [("Host", "")]),
    RequestHead("GET", "/ HTTP/1.1\r\nA: b", [("Host", "h")]), RequestHead("GE T", "/", [("Host", "h")]), RequestHead("GET",
                                                                                                                      "",
                                                                                                                      [("Host",
                                                                                                                        "h")]),
    RequestHead("GET", "/\u0100", [("Host", "h")]), RequestHead("GET", "*", [("Host", "h")]), RequestHead("", "/", [("Host",
                                                                                                                     "h")]),
    RequestHead("CONNECT", "h:1", [("Host", "h"), ("Content-Length", "0")]), RequestHead("GET", "a", [("Host", "h")])])
def test_a_request_that_a_server_would_refuse_is_not_sent(head):
    connection = HttpConnection("client")
    with pytest.raises(LocalProtocolError):
        connection.send(head)
    assert connection.our_state == connection.their_state == "IDLE"


def test_a_request_with_a_content_says_how_long_it_is():
    def sent(method, body, headers=()):
        return HttpConnection("client").send_message(RequestHead(method, "/", [("Host", "h"), *headers]), body)

    assert sent("POST", b"ab") == b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nab"
    assert sent("PUT", b"") == b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
    assert sent("GET", b"") == b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
    assert sent("POST", b"ab", [("Transfer-Encoding", "chunked")]).endswith(b"\r\n\r\n2\r\nab\r\n0\r\n\r\n")
    with pytest.raises(LocalProtocolError):
        sent("POST", b"ab", [("Content-Length", "3")])
    connection = HttpConnection("client")
    connection.send(RequestHead("GET", "/", [("Host", "h")]))
    with pytest.raises(LocalProtocolError, match="0 are left"):
        connection.send(Data(b"x"))


def test_a_client_switches_when_it_has_asked_for_that():
    asking = RequestHead("GET", "/", [("Host", "h"), ("Connection", "Upgrade"), ("Upgrade", "websocket")])
    connection, [head] = client(asking,
                                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n\x81")
    assert isinstance(head, InformationalResponse) and connection.their_state == connection.our_state == "SWITCHED"
    assert connection.trailing_data == b"\x81"
    connection, _ = client(asking, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert connection.reusable
    for response in (b"Upgrade: other\r\n", b""):
        with pytest.raises(ProtocolError):
            client(asking, b"HTTP/1.1 101 Switching Protocols\r\n" + response + b"\r\n")
    with pytest.raises(ProtocolError, match="not asked"):
        client(response=b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n")


def test_a_client_has_a_tunnel_when_its_connect_is_accepted():
    asking = RequestHead("CONNECT", "e.com:443", [("Host", "e.com:443")])
    connection, [head] = client(asking, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc")
    assert head.status == 200 and connection.our_state == "SWITCHED" and connection.trailing_data == b"abc"
    connection, events = client(asking, b"HTTP/1.1 407 No\r\nContent-Length: 2\r\n\r\nno")
    assert content(events) == b"no" and connection.reusable


def test_a_response_may_come_before_the_request_is_sent():
    connection = HttpConnection("client")
    connection.send(RequestHead("POST", "/", [("Host", "h"), ("Content-Length", "2")]))
    events = receive(connection, b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n")
    assert events[0].status == 413 and not connection.reusable
    connection.send(Data(b"ab"))
    connection.send(EndOfMessage())
    assert connection.reusable


# ---- the table of states -----------------------------------------------------------------------------------

def test_every_state_is_reached_and_each_pair_of_the_table_leads_to_one():
    for role, table in flowcoro_http._TRANSITIONS.items():
        reached = {after for moves in table.values() for after in moves.values()} | {"IDLE"}
        assert reached == set(table), role
        assert {"IDLE", "DONE", "MUST_CLOSE", "CLOSED", "ERROR", "SWITCHED"} <= reached


EVENTS = [RequestHead("GET", "/", [("Host", "h")]), RequestHead("POST", "/", [("Host", "h"), ("Transfer-Encoding", "chunked")]),
          RequestHead("POST", "/", [("Host", "h"), ("Content-Length", "1"), ("Expect", "100-continue")]),
          RequestHead("CONNECT", "h:1", [("Host", "h:1")]), RequestHead("GET", "/", [("Host", "h"), ("Connection", "close")]),
          RequestHead("GET", "/", [("Host", "h"), ("Connection", "upgrade"), ("Upgrade", "websocket")]),
          InformationalResponse(100), InformationalResponse(101, SWITCH), ResponseHead(200), ResponseHead(204),
          ResponseHead(200, [("Content-Length", "1")]), ResponseHead(200, [("Connection", "close")]), Data(b"x"), EndOfMessage(),
          EndOfMessage([("A", "b")]), ConnectionClosed()]


def state(connection):
    return {name: getattr(connection, name) for cls in type(connection).__mro__ for name in getattr(cls, "__slots__", ())}


def any_step(chance, connection):
    """Try to send something; bytes, and nothing has changed if it is refused."""
    before = state(connection)
    try:
        choice = chance.randrange(8)
        if choice == 0:
            connection.start_next_cycle()
            return b""
        if choice < 3:
            return connection.send_message(chance.choice(EVENTS), chance.choice([b"", b"x"]))
        return connection.send(chance.choice(EVENTS))
    except TypeError as error:
        assert "is no head" in str(error)
    except LocalProtocolError:
        assert state(connection) == before
    return b""


@pytest.mark.parametrize("seed", SEEDS)
def test_two_ends_that_do_anything_raise_protocol_errors_alone_and_agree(seed):
    """A client and a server, wired; each tries anything at any time, in its turn. Neither ever says what the other refuses."""
    chance = random.Random(seed)
    for _ in range(10):
        ends, closed = [HttpConnection("client"), HttpConnection("server")], [False, False]
        for _ in range(60):
            n = chance.randrange(2)
            one, other = ends[n], ends[1 - n]
            if closed[n]:
                continue
            sent = any_step(chance, one)
            if one.our_state == "CLOSED" or (one.our_state == "MUST_CLOSE" and one.role == "server"):
                closed[n] = True
            if sent and other.their_state != "CLOSED":
                other.receive_data(sent)
            if closed[n]:
                other.receive_end()
            while True:
                try:
                    event = other.next_event()
                except ProtocolError as error:
                    assert any(said in str(error) for said in ("ended in the middle", "without a response", "no request")), error
                    break               # (one has closed too early, or answered what was not asked)
                if event is NEED_DATA or event is PAUSED or isinstance(event, ConnectionClosed):
                    break
            for end in ends:
                assert end.our_state in flowcoro_http._TRANSITIONS[end.role]
                assert end.their_state in flowcoro_http._TRANSITIONS["server" if end is ends[0] else "client"]


# ---- the pieces make no difference -------------------------------------------------------------------------

def generated_request(chance):
    """(bytes, expected events): requests that are right, of all sorts, one after the other."""
    data, expected = b"", []
    for _ in range(chance.randint(1, 3)):
        method = chance.choice(["GET", "HEAD", "POST", "PUT", "M-SEARCH"])
        target = "/" + "".join(chance.choices("ab/?%20=&[]|", k=chance.randrange(9)))
        fields = [("Host", chance.choice(["h", "[::1]:80"]))]
        for n in range(chance.choice([0, 1, 5, 20])):
            value = "".join(chance.choices("xyz \t\xe4\x80,;=\"", k=chance.choice([0, 3, 300]))).strip(" \t")
            fields.insert(chance.randrange(len(fields) + 1), (chance.choice(["A", "a-b", "Cookie", f"X{n}"]), value))
        content = bytes(chance.choices(b"\r\n0a;\0\xff", k=chance.choice([1, 10, 300])))
        framing, body, trailers = chance.choice(["none", "length", "chunks"]), b"", None
        if framing == "length":
            fields.append(("Content-Length", f"{'0' * chance.randrange(3)}{len(content)}"))
            body = content
        elif framing == "chunks":
            fields.append(("Transfer-Encoding", "chunked"))
            cuts = sorted({0, len(content), *(chance.randrange(len(content) + 1) for _ in range(chance.randrange(6)))})
            for a, b in itertools.pairwise(cuts):
                body += f"{b - a:{chance.choice(['x', 'X', '04x'])}}{chance.choice(['', ';a', ';a=b;c'])}\r\n".encode()
                body += content[a:b] + b"\r\n"
            trailers = chance.choice([None, [("X-Sum", "1"), ("x-sum", "2")]])
            body += b"0\r\n" + b"".join(f"{name}: {value}\r\n".encode() for name, value in trailers or ()) + b"\r\n"
        head = f"{method} {target} HTTP/1.1\r\n" + "".join(
            f"{name}:{chance.choice(['', ' ', chr(9) + ' '])}{value}{chance.choice(['', ' '])}\r\n" for name, value in fields)
        data += head.encode("latin-1") + b"\r\n" + body
        expected.append((method, target, fields, content if framing != "none" else b"", trailers))
    return data, expected


def requests_of(events):
    """The requests in described events, as generated_request() has them."""
    found = []
    for event in events:
        if event[0] == "request":
            found.append([event[1], event[2], event[3], b"", None])
        elif event[0] == "data":
            found[-1][3] = event[1]
        elif event[0] == "end":
            found[-1][4] = event[1]
    return [tuple(request) for request in found]


@pytest.mark.parametrize("seed", SEEDS)
def test_requests_are_what_was_generated_however_they_come(seed):
    chance = random.Random(seed)
    for _ in range(5):
        data, expected = generated_request(chance)
        for pieces in fuzz.splits(data, chance):
            assert requests_of(fuzz.events_of("server", pieces)) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_what_one_codec_sends_the_other_receives(seed):
    """Both roles, both ways, streamed or whole, cut anywhere."""
    chance = random.Random(seed)
    client, server = HttpConnection("client"), HttpConnection("server")
    for _ in range(10):
        fields = [("X", "y" * chance.choice([0, 9, 300])), ("A", "b")]
        method, status = chance.choice(["GET", "POST", "HEAD"]), chance.choice([200, 204, 304, 404])
        there = b"".join(chance.choices([b"a", b"\r\n", b"0"], k=chance.choice([0, 1, 100])))
        back = there if status not in (204, 304) and method != "HEAD" else b""
        trailers = chance.choice([None, [("T", "u")]])
        for one, other, head, body in ((client, server, RequestHead(method, "/?q", [("Host", "h"), *fields]), there),
                                       (server, client, ResponseHead(status, fields), back)):
            streamed, bodiless = chance.random() < 0.5, one is server and (status in (204, 304) or method == "HEAD")
            if streamed:
                if one is client:
                    head.headers.append(("Transfer-Encoding", "chunked"))
                cut = chance.randrange(len(body) + 1)
                end = EndOfMessage(trailers if body else None)
                sent = b"".join(map(one.send, [head, Data(body[:cut]), Data(body[cut:]), end]))
            else:
                sent = one.send_message(head, body)
            events = []
            for a, b in itertools.pairwise(sorted({0, len(sent), *(chance.randrange(len(sent)) for _ in range(4))})):
                events += receive(other, sent[a:b])
            got, *_, end = events
            assert content(events) == body
            assert [pair for pair in got.headers.items() if pair in fields] == fields
            assert (end.trailers and end.trailers.items()) == (trailers if streamed and body and not bodiless else None)
            if one is client:
                assert (got.method, got.target, got.authority) == (method, "/?q", "h")
            else:
                assert got.status == status
        client.start_next_cycle()
        server.start_next_cycle()


@pytest.mark.parametrize("data", fuzz.REQUESTS, ids=range(len(fuzz.REQUESTS)))
def test_each_request_of_the_corpus_gives_the_same_events_cut_at_every_place(data):
    whole = fuzz.events_of("server", [data])
    assert whole[0][0] == "request"
    for n in range(len(data)):
        assert fuzz.events_of("server", [data[:n], data[n:]]) == whole


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_messages_do_no_harm(seed):
    """What tests/fuzz/http_codec.py does for as long as one likes."""
    for n in range(60):
        fuzz.run(seed * 1000 + n)


# ---- linear ------------------------------------------------------------------------------------------------

def spent(data, pieces, role, limits):
    """Processor seconds for all events of data in pieces of this size, the best of three."""
    best = float("inf")
    for _ in range(3):
        if role == "server":
            connection = HttpConnection("server", **limits)
        else:
            connection = HttpConnection("client", **limits)
            connection.send_message(RequestHead("GET", "/", [("Host", "h")]))
        begin = time.process_time()
        try:
            for at in range(0, len(data), pieces):
                connection.receive_data(data[at:at + pieces])
                while (event := connection.next_event()) is not NEED_DATA:
                    if event is PAUSED or (isinstance(event, EndOfMessage) and connection.our_state == "SEND_RESPONSE"):
                        answered(connection)
                        connection.start_next_cycle()
        except ProtocolError:
            pass
        best = min(best, time.process_time() - begin)
    return best


BIG = dict(max_request_line=2**30, max_field_line=2**30, max_fields=2**30, max_head=2**30, max_chunk_line=2**30)
GROWING = {
    "one-byte chunks": (lambda n: chunked(b"1\r\nx\r\n" * n + b"0\r\n\r\n"), 10_000),
    "repeated fields": (lambda n: request(b"Accept: b\r\n" * n), 10_000),
    "different fields": (lambda n: request(b"".join(b"X%d: b\r\n" % i for i in range(n))), 4_000),
    "cookies in one line": (lambda n: request(b"Cookie: " + b"; ".join(b"c%d=v" % i for i in range(n)) + b"\r\n"), 20_000),
    "a long request line": (lambda n: request(first=b"GET /" + b"a" * n + b" HTTP/1.1"), 100_000),
    "a long target in absolute form": (lambda n: request(first=b"GET http://h/" + b"a" * n + b" HTTP/1.1"), 100_000),
    "a long host": (lambda n: request(host=b"Host: " + b"a" * n + b"\r\n"), 100_000),
    "spaces, and then what fails": (lambda n: request(b"A:" + b" " * n + b"\0\r\n"), 100_000),
    "spaces and tabs around a value": (lambda n: request(b"A:" + b" \t" * n + b"b" + b"\t " * n + b"\r\n"), 50_000),
    "a name without a colon": (lambda n: request(b"a" * n + b"\r\n"), 100_000),
    "a list of nothing": (lambda n: request(b"Connection: " + b"," * n + b"\r\n"), 20_000),
    "an extension with a quoted string": (lambda n: chunked(b"1;a=\"" + b"\\\"" * n + b"\"\r\nx\r\n0\r\n\r\n"), 30_000),
    "an extension that does not end": (lambda n: chunked(b"1;a=\"" + b"\\\"" * n + b"\r\nx\r\n0\r\n\r\n"), 30_000),
    "extensions": (lambda n: chunked(b"1" + b";a=b" * n + b"x\"\r\nx\r\n0\r\n\r\n"), 20_000),
    "trailers": (lambda n: chunked(b"0\r\n" + b"A: b\r\n" * n + b"\r\n"), 10_000),
    "pipelined requests": (lambda n: request() * n, 2_000),
    "zeros": (lambda n: request(b"Content-Length: " + b"0" * n + b"\r\n"), 100_000),
    "carriage returns": (lambda n: request(b"A: " + b"\r\r" * n + b"\r\n"), 50_000),
}


@pytest.mark.parametrize("pieces", [2**30, 5000, 1])
@pytest.mark.parametrize("name", GROWING)
def test_eight_times_as_much_takes_about_eight_times_as_long(name, pieces):
    """What is quadratic takes 64 times as long; 30 is between. The sizes are well above the clock's grain."""
    make, size = GROWING[name]
    if pieces == 1:
        size //= 20
    assert spent(make(8 * size), pieces, "server", BIG) < 30 * max(spent(make(size), pieces, "server", BIG), 0.0005)


def test_a_response_until_the_end_byte_by_byte_takes_time_in_proportion():
    def response(n):
        return b"HTTP/1.1 200 OK\r\nA: " + b"a" * n + b"\r\n\r\n" + b"x" * n

    assert spent(response(40_000), 1, "client", BIG) < 30 * spent(response(5_000), 1, "client", BIG)


def test_what_is_searched_for_the_end_of_a_line_is_not_searched_again():
    """Byte by byte, the bytes looked at by find() are a small multiple of those that came."""
    class Counted(bytearray):
        searched = 0

        def find(self, what, start=0, end=None):
            end = len(self) if end is None else min(end, len(self))
            found = bytearray.find(self, what, start, end)
            Counted.searched += max(0, (end if found < 0 else found + 1) - start)
            return found

    data = request(b"A: " + b"b" * 5000 + b"\r\n" + b"C: d\r\n" * 50)
    connection = HttpConnection("server")
    connection.receive_data(data[:1])
    assert connection.next_event() is NEED_DATA
    connection._buffer = Counted(connection._buffer)
    for n in range(1, len(data) - 1):
        before, empty = connection._buffer, connection.trailing_data == b""
        connection.receive_data(data[n:n + 1])
        assert connection._buffer is before or empty, "what was there has been copied"
        assert connection.next_event() is NEED_DATA
        if empty:
            connection._buffer = Counted(connection._buffer)
    connection.receive_data(data[-1:])
    assert connection.next_event().headers["c"] == "d"
    assert Counted.searched < 4 * len(data)


# ---- the standard library as a witness ---------------------------------------------------------------------

class Handler(http.server.BaseHTTPRequestHandler):
    """Parses one request out of bytes."""

    def __init__(self, data):
        self.rfile, self.wfile, self.client_address = io.BytesIO(data), io.BytesIO(), ("test", 0)
        self.raw_requestline = self.rfile.readline()
        self.requestline, self.request_version, self.command = "", "", ""
        self.right = self.parse_request()

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("seed", SEEDS)
def test_http_server_reads_the_same_request(seed):
    chance = random.Random(seed)
    for _ in range(10):
        data, [(method, target, fields, *_), *_] = generated_request(chance)
        witness = Handler(data)
        assert witness.right and witness.command == method
        # It folds leading slashes into one (so that no redirect leads elsewhere), and strips what we do not.
        assert witness.path.lstrip("/") == target.lstrip("/")
        _, [head, *_] = server(data)
        if not any("\x80" in value or "\x85" in value for _, value in fields):      # which it takes for the end of a line
            assert [(name, value.strip(" \t")) for name, value in witness.headers.items()] == head.headers.items()
        assert (witness.close_connection is False) == (server(data)[0].keep_alive and witness.protocol_version >= "HTTP/1.1")


class Wire:
    """What http.client takes for a socket."""

    def __init__(self, data):
        self.data = data

    def makefile(self, mode):
        return io.BytesIO(self.data)


@pytest.mark.parametrize("method, data", [
    ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nA: b\r\nA: c\r\n\r\nhello"),
    ("GET", b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n1\r\n \r\n0\r\nA: b\r\n\r\n"),
    ("GET", b"HTTP/1.0 200 OK\r\n\r\nuntil the end"), ("GET", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end"),
    ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"), ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
    ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
    ("GET", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nx"),
    ("GET", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n"), ("GET", b"HTTP/1.1 500 Some  reason\r\nContent-Length:0\r\n\r\n")])
def test_http_client_reads_the_same_response(method, data):
    witness = http.client.HTTPResponse(Wire(data), method=method)
    witness.begin()
    connection, events = client(RequestHead(method, "/", [("Host", "h")]), data)
    head = next(event for event in events if type(event) is ResponseHead)
    connection.receive_end()
    receive(connection, b"")
    assert (head.status, head.reason, head.headers.items()) == (witness.status, witness.reason, witness.getheaders())
    assert head.version == {10: "1.0", 11: "1.1"}[witness.version]
    will_close = witness.will_close
    assert content(events) == witness.read()
    assert connection.keep_alive == (not will_close)
    witness.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_http_client_reads_what_a_server_sends(seed):
    chance = random.Random(seed)
    for _ in range(10):
        body = bytes(chance.choices(b"ab\r\n", k=chance.choice([0, 1, 500])))
        connection, _ = server(request())
        fields = [("A", "b" * chance.randrange(50)), ("Set-Cookie", "a=b"), ("Set-Cookie", "c=d")]
        if chance.random() < 0.5:
            sent = connection.send_message(ResponseHead(201, fields), body)
        else:
            sent = b"".join(map(connection.send, [ResponseHead(201, fields), Data(body[:9]), Data(body[9:]), EndOfMessage()]))
        witness = http.client.HTTPResponse(Wire(sent))
        witness.begin()
        assert (witness.status, witness.reason, witness.getheaders()[:3]) == (201, "Created", fields)
        assert witness.read() == body
        witness.close()


# ---- what is known from before ---------------------------------------------------------------------------------

KNOWN = b"GET /known?q=%d HTTP/1.1\r\nHost: example\r\nX-Number: %d\r\n\r\n"


def come(server, data):
    """A request comes, whole, and is answered: (method, target, fields, content, keep_alive), and whether it was known."""
    known = server.receive_known(data)
    if known is not None:
        line, fields, content, _ = known
        found = (line.method, line.target, list(fields.entries), content)
        assert (line.raw_path, line.query_string) == line.target.partition("?")[::2]
        assert fields.index == dict(reversed(fields.entries))
    else:
        server.receive_data(data)
        head, content = server.next_event(), b""
        while type(event := server.next_event()) is Data:
            content += event.data
        assert type(event) is EndOfMessage
        found = (head.method, head.target, list(head.headers._entries), content)
    assert (server.our_state, server.their_state, server.method) == ("SEND_RESPONSE", "DONE", found[0])
    found = *found, server.keep_alive, server.upgrade, server.expects_continue, server.send_message(ResponseHead(200), b"x")
    if server.reusable:
        server.start_next_cycle()
    return found, known is not None


def after(times, data, **limits):
    """A connection on which the same request has come so many times."""
    server = HttpConnection("server", **limits)
    for _ in range(times):
        come(server, data)
    return server


@pytest.mark.parametrize("data", [
    KNOWN % (1, 1), b"GET /k HTTP/1.1\r\nHost: x\r\nCookie: a=b\r\n\r\n",
    b"GET /k HTTP/1.1\r\nHost: x\r\nAuthorization: Basic YTpi\r\n\r\n", b"DELETE /?token=1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /k HTTP/1.1\r\nHost: x\r\nContent-Length:  03 \r\n\r\nabc",
    b"POST /k HTTP/1.1\r\ncontent-length: 0\r\nHost: x\r\n\r\n",
    b"GET /k HTTP/1.1\r\nHost: x\r\nA: 1\r\na: 2\r\n\r\n", b"HEAD /k HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 2000 + b"\r\n\r\n"])
def test_a_request_is_known_on_a_connection_that_has_had_it_twice(data):
    assert after(1, data).receive_known(data) is None
    server = after(2, data)
    assert HttpConnection("server").receive_known(data) is None
    fresh, known = come(HttpConnection("server"), data)
    assert not known and [come(server, data) for _ in range(3)] == 3 * [(fresh, True)]


@pytest.mark.parametrize("data", [
    b"GET /k HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n",
    b"POST /k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", b"GET http://x/ HTTP/1.1\r\nHost: y\r\n\r\n",
    b"TRACE /k HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /k HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc",
    b"POST /k HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nExpect: 100-continue\r\n\r\n",
    b"GET /k HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 4096 + b"\r\n\r\n"])
def test_only_the_usual_kind_becomes_known(data):
    server = HttpConnection("server")
    for _ in range(5):
        server.receive_data(data)
        while type(server.next_event()) is not EndOfMessage:
            pass
        assert server.send_message(ResponseHead(200), b"")
        if not server.reusable:                             # it has read a content that it had not asked for
            return
        server.start_next_cycle()
        assert server._fields is None and server.receive_known(data) is None


@pytest.mark.parametrize("wish", [b"close", b"upgrade\r\nUpgrade: websocket"])
def test_what_ends_or_changes_the_connection_does_not_become_known(wish):
    data = b"GET /k HTTP/1.1\r\nHost: x\r\nConnection: " + wish + b"\r\n\r\n"
    for times in range(3):
        server = after(times, KNOWN % (1, 1))
        server.receive_data(data)
        server.next_event()
        assert server._fields is None or server._fields.lines not in data


def test_another_length_or_target_is_known_as_well_and_another_field_is_not():
    post = b"POST /%b HTTP/1.1\r\nHost: x\r\nCookie: a=%b\r\nContent-Length: %d\r\nX: y\r\n\r\n%b"
    server = after(2, post % (b"1", b"b", 3, b"abc"))
    for target, content in ((b"1", b"abcd"), (b"2?a=b", b""), (b"2", b"a" * 1000), (b"", b"abc")):
        data = post % (target, b"b", len(content), content)
        fresh, _ = come(HttpConnection("server"), data)
        assert come(server, data) == (fresh, True)
    for cookie in (b"c", b"bc", b"", b"b;"):
        assert server.receive_known(post % (b"1", cookie, 3, b"abc")) is None
    for data in (post % (b"1", b"b", 3, b"ab"), post % (b"1", b"b", 3, b"abcd"), (post % (b"1", b"b", 3, b"abc"))[:-7],
                 post.replace(b"%d", b"%b") % (b"1", b"b", b"", b""), post.replace(b"%d", b"%b") % (b"1", b"b", b"+3", b"abc"),
                 post.replace(b"%d", b"%b") % (b"1", b"b", b"3\r\nX: y\r\n\r\nabc", b""), b"", b"\r\n", b"POST"):
        assert server.receive_known(data) is None


def test_what_is_known_keeps_within_the_limits_of_its_connection():
    data = b"POST /12345678 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    head = len(data) - 3 - 4
    assert after(2, data, max_head=head, max_request_line=23).receive_known(data) is not None
    for limits in (dict(max_head=head), dict(max_request_line=23)):
        server = after(2, data, **limits)
        assert server.receive_known(data.replace(b"/", b"/9", 1)) is None
    short, long = (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (size, size * b"x") for size in (9, 10))
    assert after(2, short).receive_known(long) is not None
    assert after(2, short, max_field_line=len("Content-Length: 9")).receive_known(long) is None
    longer = data.replace(b" 3", b" 03")
    assert after(2, data, max_field_line=len(b"Content-Length: 3")).receive_known(longer) is None
    assert after(2, data).receive_known(longer) is not None
    assert after(2, data).receive_known(data, 2) is None and after(2, data).receive_known(data, 3) is not None
    server = after(3, data, max_body=9)
    assert server._again is None                        # no content is kept
    server.max_body = 2
    assert server.receive_known(data) is None
    server.receive_data(data)
    with pytest.raises(ProtocolError, match="3 bytes; 2 are allowed"):
        server.next_event()


def test_a_known_request_is_none_where_something_else_is_under_way():
    data = KNOWN % (3, 3)
    server = after(3, data)
    server.receive_data(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
    server.next_event()
    assert server.receive_known(data) is None           # it is content
    server = after(3, data)
    server.receive_data(b"GET /begun")
    assert server.receive_known(data) is None and server.next_event() is NEED_DATA
    server = after(3, data)
    server.receive_data(b"POST / HTTP/1.1\r\nHost: b\r\n")
    assert server.next_event() is NEED_DATA and server.receive_known(data) is None


def test_whoever_changes_the_headers_of_a_known_request_changes_his_own():
    data = KNOWN % (4, 4)
    _, known, _, _ = after(2, data).receive_known(data)
    for change in (lambda headers: headers.add("X-New", "1"), lambda headers: headers.set("Host", "evil"),
                   lambda headers: headers.remove("X-Number"), lambda headers: headers.copy().add("X-New", "1")):
        headers = Headers._of(known.entries, known.index)
        change(headers)
        assert Headers._of(known.entries, known.index).items() == [("Host", "example"), ("X-Number", "4")]


def test_what_is_known_is_bounded_and_has_no_secrets():
    for number in range(flowcoro_http.KNOWN_LINES + 50):
        data = KNOWN % (number, 7)
        after(3, data), after(3, data)                      # two clients: the line has come twice
        assert len(flowcoro_http._KNOWN_LINES) <= flowcoro_http.KNOWN_LINES
    assert KNOWN.partition(b"\r\n")[0] % number in flowcoro_http._KNOWN_LINES
    for target in (b"/reset?Token=1", b"/reset?%54oken=1", b"/" + b"a" * flowcoro_http.KNOWN_LINE):
        data = b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n"
        assert come(after(5, data), data)[1] and come(after(5, data), data)[1]
        assert not any(target in line for line in flowcoro_http._KNOWN_LINES)


def test_a_connection_of_many_clients_takes_down_no_field_lines_for_a_while():
    server, kept = HttpConnection("server"), []
    for number in range(flowcoro_http.RETRY_UNLIKE + 5):
        come(server, KNOWN % (1, number))
        kept.append(server._fields is not None)
    assert kept == [1 <= number <= flowcoro_http.MAX_UNLIKE or number > flowcoro_http.RETRY_UNLIKE for number in range(len(kept))]
    come(server, KNOWN % (1, number))
    assert come(server, KNOWN % (1, number))[1]
    server.forget_fields()
    assert server.receive_known(KNOWN % (1, number)) is None


def manner(chance):
    """How a client writes its field lines: its cookie, its Content-Length or none, and where that stands."""
    length = chance.choice([None, "Content-Length: %d", "Content-Length: %d", "content-length:0%d "])
    return chance.choice([["Cookie: a=b"], ["Cookie: a=bc"], []]), length, chance.randrange(2)


def alike(chance, cookie, length, place):
    """A request; most are like others, and nearly."""
    fields, content = ["Host: x", *cookie], b""
    if length:
        content = chance.choice([b"", b"abc", b"abc\r\n", b"x" * 20, b"x" * (20 + (chance.random() < 0.05))])
        fields.insert(place, length % (len(content) + (chance.random() < 0.01)))
    line = f"{chance.choice(['GET', 'POST', 'HEAD'])} /{chance.choice(['', 'a?b=c', 'b'])} HTTP/1.{int(chance.random() < 0.99)}"
    data = "\r\n".join([line, *fields, "", ""]).encode() + content
    if chance.random() < 0.01:
        place = chance.randrange(len(data))
        data = data[:place] + bytes([chance.choice(b"\r\n :\0a3")]) + data[place + 1:]
    return data


def outcome(connection, data, asked):
    """What a server's end makes of data, answers included, and whether it knew them. `asked`: whether it may know any."""
    known = connection.receive_known(data) if asked else None
    try:
        if known:
            line, fields, content, _ = known
            made = [line.method, line.target, "1.1", list(fields.entries), [content] if content else []]
        else:
            head, *events = receive(connection, data) or [None]
            made = head and [head.method, head.target, head.version, list(head.headers._entries),
                             [event.data for event in events if type(event) is Data]]
    except ProtocolError as error:
        made = str(error)
    made = [made, connection.our_state, connection.their_state, connection.method, connection.trailing_data]
    if connection.our_state == "SEND_RESPONSE":
        made += [connection.send_message(ResponseHead(200), b"x"), connection.keep_alive]
    if connection.reusable:
        connection.start_next_cycle()
    return made, known is not None


@pytest.mark.parametrize("seed", SEEDS)
def test_a_connection_that_knows_requests_reads_what_one_does_that_does_not(seed):
    chance, hits = random.Random(seed), 0
    client = manner(chance)
    for _ in range(10):
        knows, does_not = HttpConnection("server", max_body=20), HttpConnection("server", max_body=20)
        while knows.their_state == "IDLE" and not knows._entries:
            if chance.random() < 0.2:
                client = manner(chance)
            data = alike(chance, *client)
            made, known = outcome(knows, data, True)
            assert (made, False) == outcome(does_not, data, False), data
            hits += known
            if chance.random() < 0.02:
                break
    assert hits > 20


def test_heads_of_answers_are_the_same_from_memory():
    for status, fields in ((200, (("X", "1"),)), (404, (("X", "1"), ("Y", "2"))), (200, ()), (299, ())):
        for body in (b"", b"content"):
            made = []
            for _ in range(3):
                server = HttpConnection("server")
                server.receive_data(KNOWN % (5, 5))
                server.next_event(), server.next_event()
                made.append(server.send_message(ResponseHead(status, fields), body))
            server = HttpConnection("server")
            server.receive_data(KNOWN % (5, 5))
            server.next_event(), server.next_event()
            made.append(server.send_message(ResponseHead(status, list(fields)), body))
            assert len(set(made)) == 1 and made[0].endswith(b"\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


@pytest.mark.parametrize("request_data, ends", [
    (b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n", b"Content-Length: 2\r\n\r\n"),
    (b"GET / HTTP/1.0\r\nHost: x\r\n\r\n", b"Content-Length: 2\r\nConnection: close\r\n\r\nab"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"Content-Length: 2\r\nConnection: close\r\n\r\nab")])
def test_a_head_from_memory_is_only_for_those_it_fits(request_data, ends):
    for data in (KNOWN % (6, 6), request_data):
        server = HttpConnection("server")
        server.receive_data(data)
        server.next_event(), server.next_event()
        made = server.send_message(ResponseHead(200, (("X-Shared", "1"),)), b"ab")
    assert made.endswith(ends)


def test_answers_with_cookies_and_of_their_own_framing_are_not_kept():
    before = set(flowcoro_http._KNOWN_HEADS)
    for fields in ((("Set-Cookie", "a=b"),), (("Content-Length", "2"),), (("Connection", "close"),), (("X", "y" * 1024),)):
        server = HttpConnection("server")
        server.receive_data(KNOWN % (7, 7))
        server.next_event(), server.next_event()
        server.send_message(ResponseHead(200, fields), b"ab")
    assert set(flowcoro_http._KNOWN_HEADS) == before


def test_a_head_that_was_joined_while_another_request_was_answered_is_read():
    server = HttpConnection("server")
    server.receive_data(b"GET /first HTTP/1.1\r\nHost: x\r\n\r\n")
    server.next_event(), server.next_event()
    server.receive_data(b"GET /joined HTTP/1.1\r\nHo")
    server.receive_data(b"st: x\r\n\r\n")
    server.send_message(ResponseHead(200), b"")
    server.start_next_cycle()
    for _ in range(2):
        assert server.next_event().target == "/joined"
        server.next_event()
        server.send_message(ResponseHead(200), b"")
        server.start_next_cycle()
        server.receive_data(b"GET /joined HTTP/1.1\r\nHo")
        server.receive_data(b"st: x\r\n\r\n")


@pytest.mark.parametrize("name", ["Authorization", "Cookie", "X-Api-Key", "X-Auth-Token", "X-CSRF-Token", "X-Session",
                                  "Proxy-Authentication-Info", "X-Amz-Security-Token", "Sec-WebSocket-Key"])
def test_what_may_be_secret_is_not_remembered_and_not_shown(name):
    value = f"unheard-of-{name}"
    after(3, f"GET /?{name} HTTP/1.1\r\nHost: x\r\n{name}: {value}\r\n\r\n".encode())
    headers = Headers([(name, value)])
    server = HttpConnection("server")
    server.receive_data(KNOWN % (8, 8))
    server.next_event(), server.next_event()
    server.send_message(ResponseHead(200, ((name, value),)), b"")
    for table in flowcoro_http._RECEIVED, flowcoro_http._SENT, flowcoro_http._KNOWN_HEADS, flowcoro_http._KNOWN_LINES:
        assert not any("unheard-of" in repr(key) for key in table)
    assert "unheard-of" not in repr(headers)
    with pytest.raises(LocalProtocolError, match="control") as caught:
        headers.set(name, value + "\n")
    assert "unheard-of" not in str(caught.value)
