"""The handshake of WebSocket, without I/O: what opens one, what answers it, and who may ask."""

import re

import pytest

import flowcoro_websocket
from flowcoro_http import EndOfMessage, HttpConnection, InformationalResponse, ResponseHead
from flowcoro_websocket import Deflate, HandshakeError, accept_key
from flowcoro_websocket import (_check_origins, _check_request, _check_response, _check_subprotocols, _new_key, _origin_problem,
                                _request_head, _response_head)

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
SWITCH = [("Upgrade", "websocket"), ("Connection", "Upgrade")]
REQUEST = [("Host", "example.com"), *SWITCH, ("Sec-WebSocket-Key", KEY), ("Sec-WebSocket-Version", "13")]
ANSWER = [*SWITCH, ("Sec-WebSocket-Accept", ACCEPT)]


def changed(pairs, **fields):
    """The pairs with some replaced (a list: by several), added, or taken out (None)."""
    given = {name.replace("_", "-").lower(): value for name, value in fields.items()}
    kept = [(name, value) for name, value in pairs if name.lower() not in given]
    return kept + [(name, one) for name, value in given.items() if value is not None
                   for one in (value if type(value) is list else [value])]


# ---- the server --------------------------------------------------------------------------------------------

def test_the_example_of_the_rfc():
    """RFC 6455 section 1.3."""
    assert accept_key(KEY) == ACCEPT
    pairs = changed(REQUEST, Origin="http://example.com", Sec_WebSocket_Protocol="chat, superchat")
    assert _check_request("GET", "1.1", pairs, subprotocols=["chat"]) == (
        [("Sec-WebSocket-Accept", ACCEPT), ("Sec-WebSocket-Protocol", "chat")], "chat", None)


@pytest.mark.parametrize("fields", [
    {"upgrade": "WebSocket"}, {"upgrade": "h2c, websocket"}, {"upgrade": ["h2c", "websocket"]},
    {"connection": "keep-alive, Upgrade"}, {"connection": ["keep-alive", "upgrade"]}, {"content_length": "0"},
    {"origin": "https://EXAMPLE.com"}, {"x_other": "\xe4"},
    {"sec_websocket_protocol": "a, b"}, {"sec_websocket_extensions": "foo; bar=1"}, {"connection": ", upgrade,,"}])
def test_what_may_be_written_otherwise_is_taken(fields):
    assert _check_request("GET", "1.1", changed(REQUEST, **fields)) == ([("Sec-WebSocket-Accept", ACCEPT)], None, None)


REFUSED = {
    400: [{"sec_websocket_key": None}, {"sec_websocket_key": ""}, {"sec_websocket_key": "short"},
          {"sec_websocket_key": [KEY, KEY]}, {"sec_websocket_key": KEY[:-1]}, {"sec_websocket_key": KEY + "="},
          {"sec_websocket_key": "!" + KEY[1:]},
          {"sec_websocket_key": KEY[:-3] + "R=="}, {"sec_websocket_key": "\xe4" * 24}, {"sec_websocket_key": KEY + "AAAA"},
          {"content_length": "5"}, {"transfer_encoding": "chunked"}, {"sec_websocket_protocol": "a, a"},
          {"sec_websocket_protocol": ["a", "b, a"]}, {"sec_websocket_protocol": "a b"}, {"sec_websocket_protocol": "\"a\""},
          {"sec_websocket_extensions": "permessage-deflate;"}, {"sec_websocket_extensions": ["foo", "b\xe4r"]}],
    403: [{"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "https://example.com.evil"}, {"origin": ""},
          {"origin": "https://example.com:8443"}, {"origin": ["https://example.com", "https://example.com"]},
          {"origin": "https://user@example.com"}, {"origin": "https://example.com/"}, {"origin": "example.com"},
          {"origin": "https://*.example.com"}, {"host": ["example.com", "example.com"], "origin": "https://example.com"}],
    426: [{"upgrade": None}, {"connection": None}, {"upgrade": "h2c"}, {"connection": "keep-alive"}, {"upgrade": "web socket"},
          {"upgrade": "websocket/13"}, {"connection": "xupgrade"}, {"upgrade": "\xa0websocket"}, {"sec_websocket_version": None},
          {"sec_websocket_version": "8"}, {"sec_websocket_version": "14"}, {"sec_websocket_version": "013"},
          {"sec_websocket_version": "13, 8"}, {"sec_websocket_version": ["13", "13"]}],
}


@pytest.mark.parametrize("status, fields", [(status, fields) for status, each in REFUSED.items() for fields in each])
def test_what_opens_no_websocket_is_answered_with_its_status(status, fields):
    with pytest.raises(HandshakeError) as caught:
        _check_request("GET", "1.1", changed(REQUEST, **fields))
    assert caught.value.status == status and str(caught.value)
    headers = dict(caught.value.headers)
    assert (headers.get("Upgrade") == "websocket") == (status == 426)
    assert (headers.get("Sec-WebSocket-Version") == "13") == ("sec_websocket_version" in fields)


def test_another_method_is_405_and_another_version_of_http_426():
    for method in ("POST", "HEAD", "get", "CONNECT"):
        with pytest.raises(HandshakeError) as caught:
            _check_request(method, "1.1", REQUEST)
        assert caught.value.status == 405 and caught.value.headers == (("Allow", "GET"),)
    with pytest.raises(HandshakeError) as caught:
        _check_request("GET", "1.0", REQUEST)
    assert caught.value.status == 426


def test_a_server_chooses_its_favourite_subprotocol_or_none():
    def chosen(ours, theirs):
        answer, subprotocol, _ = _check_request("GET", "1.1", changed(REQUEST, Sec_WebSocket_Protocol=theirs), subprotocols=ours)
        assert dict(answer).get("Sec-WebSocket-Protocol") == subprotocol
        return subprotocol
    assert chosen(["b", "a"], "a, b") == chosen(["c", "b"], ["a", "b"]) == "b"
    assert chosen(["b"], "B") is chosen([], "a") is chosen(["a"], None) is None


def test_a_server_answers_an_offer_of_compression_if_it_may():
    pairs = changed(REQUEST, Sec_WebSocket_Extensions=["foo", "permessage-deflate; client_max_window_bits"])
    answer, _, agreed = _check_request("GET", "1.1", pairs, deflate=Deflate(15, 10))
    assert agreed == Deflate(15, 10)
    assert answer[-1] == ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits=10")
    assert _check_request("GET", "1.1", pairs)[2] is None
    assert _check_request("GET", "1.1", REQUEST, deflate=Deflate()) == ([("Sec-WebSocket-Accept", ACCEPT)], None, None)


# ---- origins -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("origin, host, origins, may", [
    ("https://example.com", "example.com", None, True), ("http://example.com", "example.com:80", None, True),
    ("https://example.com", "example.com:443", None, True), ("https://example.com:443", "example.com", None, True),
    ("http://example.com", "example.com:443", None, False), ("http://localhost:8000", "localhost:8000", None, True),
    ("http://localhost:8000", "localhost:8001", None, False), ("http://[::1]:8000", "[::1]:8000", None, True),
    ("https://a.example", "b.example", ["https://a.example"], True), ("https://A.example", "b", ["https://a.EXAMPLE:443"], True),
    ("http://a.example", "b.example", ["https://a.example"], False),
    ("https://b.example", "b.example", ["https://a.example"], False),
    ("https://a.example:444", "b", ["https://a.example"], False), ("https://x.a.example", "b", ["https://*.a.example"], True),
    ("https://y.x.a.example", "b", ["https://*.a.example"], True), ("https://a.example", "b", ["https://*.a.example"], False),
    ("https://xa.example", "b", ["https://*.a.example"], False), ("https://*.a.example", "b", ["https://*.a.example"], False),
    ("null", "b", ["null"], True), ("null", "b", ["https://a.example"], False), ("https://c", "b", ["https://a", "*"], True),
    ("https://a.example", "b", [], False), ("file://", "b", ["https://a.example"], False),
    ("chrome-extension://abcdef", "b", ["chrome-extension://abcdef"], True)])
def test_which_pages_may_connect(origin, host, origins, may):
    _check_origins(origins)
    assert (_origin_problem([origin], [host], origins) is None) == may
    pairs = changed(REQUEST, Origin=origin, Host="other")
    if may:
        _check_request("GET", "1.1", pairs, host=host, origins=origins)
    else:
        with pytest.raises(HandshakeError, match="may not connect here; origins="):
            _check_request("GET", "1.1", pairs, host=host, origins=origins)


def test_who_sends_no_origin_is_no_browser_and_may():
    for origins in (None, [], ["https://a.example"]):
        assert _origin_problem([], ["b"], origins) is None


def test_origins_and_subprotocols_that_make_no_sense_are_refused():
    for wrong, error in (("https://a.example", TypeError), (["a.example"], ValueError), (["https://a.example/"], ValueError),
                         (["https://a.example/path"], ValueError), ([""], ValueError), (["https://a, https://b"], ValueError)):
        with pytest.raises(error, match="origins"):
            _check_origins(wrong)
    for wrong, error in (("chat", TypeError), (["a b"], ValueError), ([""], ValueError), (["a", "a"], ValueError),
                         ([5], TypeError)):
        with pytest.raises(error):
            _check_subprotocols(wrong)


# ---- the client --------------------------------------------------------------------------------------------

def test_a_request_is_what_the_http_codec_reads_and_our_server_takes():
    head = _request_head("/chat?room=1", "example.com:8080", KEY, pairs=[("Cookie", "a=b"), ("X", "\xe4")],
                         subprotocols=["a", "b"], origin="http://example.com:8080", deflate=Deflate())
    server = HttpConnection("server")
    server.receive_data(head)
    request, end = server.next_event(), server.next_event()
    assert isinstance(end, EndOfMessage) and (request.method, request.target, request.version) == ("GET", "/chat?room=1", "1.1")
    assert server.upgrade == ("websocket",) and request.headers.get("cookie") == "a=b"
    answer, subprotocol, deflate = _check_request("GET", "1.1", request.headers.items(), subprotocols=["b"], deflate=Deflate())
    raw = server.send(InformationalResponse(101, SWITCH + answer))
    status, reason, pairs, size = _response_head(raw + b"\x81\x00")
    assert (status, size) == (101, len(raw))
    assert _check_response(status, pairs, KEY, subprotocols=["a", "b"], deflate=Deflate()) == (subprotocol, deflate) == (
        "b", Deflate(12, 12))


@pytest.mark.parametrize("arguments", [
    {"target": "chat"}, {"target": ""}, {"target": "/a b"}, {"target": "/\xe4"}, {"target": "/a#b"}, {"target": "/a\r\nX: y"},
    {"host": "a\r\nX: y"}, {"pairs": [("X", "a\r\nY: b")]}, {"pairs": [("X:", "a")]}, {"pairs": [("", "a")]},
    {"pairs": [("X", "€")]}, {"pairs": [("X", "\0")]}, {"pairs": [("hOST", "a")]}, {"pairs": [("Sec-WebSocket-Key", KEY)]},
    {"pairs": [("Upgrade", "h2c")]}, {"pairs": [("Content-Length", "5")]}, {"origin": "a\n"}, {"subprotocols": ["a b"]},
    {"subprotocols": ["a", "a"]}])
def test_nothing_that_is_no_http_gets_into_a_request(arguments):
    with pytest.raises(ValueError):
        _request_head(**{"target": "/", "host": "h", "key": KEY, **arguments})


def test_keys_are_16_bytes_that_differ():
    keys = {_new_key() for _ in range(50)}
    assert len(keys) == 50 and all(re.fullmatch("[0-9A-Za-z+/]{21}[AQgw]==", key) for key in keys)
    assert all(flowcoro_websocket._is_key(key) for key in keys)


def answered(*lines):
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def test_an_answer_is_read_when_it_is_complete():
    raw = answered("HTTP/1.1 404 Not Found", "Content-Length: 5", "Empty:", "Twice: \t a b \t ", "TWICE:c")
    for end in range(len(raw)):
        assert _response_head(bytearray(raw[:end])) is None
    assert _response_head(bytearray(raw + b"hello")) == (404, "Not Found", [
        ("Content-Length", "5"), ("Empty", ""), ("Twice", "a b"), ("TWICE", "c")], len(raw))
    assert _response_head(b"HTTP/1.0 200 \r\n\r\n") == (200, "", [], 17)
    assert _response_head(b"HTTP/1.1 200\r\n\r\n") == (200, "", [], 16)


@pytest.mark.parametrize("raw", [
    b"\x16\x03\x01", b"SSH-2.0-x\r\n", b"\r\nHTTP/1.1 101", b"HTTP/2 200\r\n\r\n", b"http/1.1 200\r\n\r\n",
    b"HTTP/1.1 20 OK\r\n\r\n", b"HTTP/1.1 099 X\r\n\r\n", b"HTTP/1.1  200 OK\r\n\r\n", b"HTTP/1.1 2000 OK\r\n\r\n",
    b"HTTP/1.2 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n", b"HTTP/1.1 200 OK\r\n: b\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: \0\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: b\nB: c\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: b\rB: c\r\n\r\n", b"HTTP/1.1 200 O\0\r\n\r\n", b"HTTP/1.0 101 X\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 101 + b"\r\n", b"HTTP/1.1 200 OK\r\nA: " + b"x" * 16400 + b"\r\n\r\n"])
def test_what_is_no_answer_is_502(raw):
    with pytest.raises(HandshakeError) as caught:
        _response_head(raw)
    assert caught.value.status == 502


def test_a_head_without_an_end_is_refused_at_its_limit():
    raw = b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20
    assert _response_head(raw, limit=len(raw) + 1) is None
    with pytest.raises(HandshakeError, match="more than 100 bytes"):
        _response_head(raw, limit=100)
    with pytest.raises(HandshakeError):
        _response_head(b"HTTP/1.1 200 OK\r\n\r\n", limit=10)


@pytest.mark.parametrize("status, fields", [
    (200, {}), (301, {}), (100, {}), (401, {}), (101, {"upgrade": None}), (101, {"upgrade": "h2c"}), (101, {"connection": None}),
    (101, {"upgrade": "websocket, h2c"}), (101, {"upgrade": ["websocket", "websocket"]}), (101, {"connection": "close"}),
    (101, {"sec_websocket_accept": None}), (101, {"sec_websocket_accept": ACCEPT.lower()}),
    (101, {"sec_websocket_accept": ACCEPT[:-1]}), (101, {"sec_websocket_accept": [ACCEPT, ACCEPT]}),
    (101, {"sec_websocket_accept": KEY}), (101, {"sec_websocket_protocol": "c"}), (101, {"sec_websocket_protocol": "A"}),
    (101, {"sec_websocket_protocol": "a, b"}), (101, {"sec_websocket_protocol": ["a", "b"]}),
    (101, {"sec_websocket_protocol": ""}),
    (101, {"sec_websocket_extensions": "foo"}), (101, {"sec_websocket_extensions": "permessage-deflate; unknown"}),
    (101, {"sec_websocket_extensions": "permessage-deflate;"}),
    (101, {"sec_websocket_extensions": ["permessage-deflate", "permessage-deflate"]})])
def test_an_answer_that_opens_nothing_is_refused_with_its_status(status, fields):
    pairs = changed(ANSWER, **fields)
    with pytest.raises(HandshakeError) as caught:
        _check_response(status, pairs, KEY, subprotocols=["a", "b"], deflate=Deflate())
    assert caught.value.status == status and caught.value.headers == tuple(pairs)


def test_an_answer_may_choose_what_was_offered_and_need_not():
    assert _check_response(101, ANSWER, KEY) == (None, None)
    assert _check_response(101, ANSWER, KEY, subprotocols=["a"], deflate=Deflate()) == (None, None)
    pairs = changed(ANSWER, sec_websocket_protocol="b", sec_websocket_extensions="permessage-deflate", upgrade="WebSocket",
                    connection="keep-alive, upgrade")
    assert _check_response(101, pairs, KEY, subprotocols=["a", "b"], deflate=Deflate()) == ("b", Deflate(15, 12))
    with pytest.raises(HandshakeError, match="was offered none"):
        _check_response(101, pairs, KEY, subprotocols=["b"])
    with pytest.raises(HandshakeError, match=r"was offered \[\]"):
        _check_response(101, pairs, KEY, deflate=Deflate())


def test_a_plain_answer_of_our_own_server_is_read():
    server = HttpConnection("server")
    server.receive_data(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    server.next_event()
    raw = server.send_message(ResponseHead(426, [*SWITCH, ("Sec-WebSocket-Version", "13")]), b"no")
    status, reason, pairs, size = _response_head(raw)
    assert (status, raw[size:]) == (426, b"no")
    assert ("Sec-WebSocket-Version", "13") in pairs
