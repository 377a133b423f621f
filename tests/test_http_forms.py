"""Forms: application/x-www-form-urlencoded and multipart/form-data, read and made."""

import email.parser
import email.policy
import importlib.util
import os
import pathlib
import random
import subprocess
import sys
import urllib.parse

import pytest

import flowcoro_http
from flowcoro_http import (
    _encode_urlencoded, _FormEnd, _FormPart, _multipart_boundary, _MultipartBody, _MultipartParser, NEED_DATA,
    _parse_urlencoded, _PartBegin, _PartData, _PartEnd, ProtocolError)

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 50)))
FUZZ = pathlib.Path(__file__).parent / "fuzz" / "http_forms.py"


def parse(body, size=None, boundary=b"B", **limits):
    """[(name, filename, content)] of a body given in pieces of `size`; the parser's own errors."""
    parser, parts = _MultipartParser(boundary, **limits), []
    size = size or len(body) or 1
    pieces = body if isinstance(body, list) else [body[at:at + size] for at in range(0, len(body), size)]
    for piece in [*pieces, b""]:
        parser.receive_data(piece)
        while True:
            event = parser.next_event()
            if event is NEED_DATA:
                break
            if isinstance(event, _FormEnd):
                return [tuple(part) for part in parts]
            if isinstance(event, _PartBegin):
                parts.append([event.name, event.filename, b""])
            elif isinstance(event, _PartData):
                parts[-1][2] += event.data
    raise AssertionError("no end")


def body_of(*parts):
    """A body with boundary B of (head lines, content)."""
    return b"".join(b"--B\r\n" + head + b"\r\n\r\n" + content + b"\r\n" for head, content in parts) + b"--B--\r\n"


FIELD = b'Content-Disposition: form-data; name="a"'
FILE = b'Content-Disposition: form-data; name="f"; filename="x"'


# ---- urlencoded --------------------------------------------------------------------------------------------

def test_urlencoded_fields_are_read_in_order():
    assert _parse_urlencoded(b"a=1&b=hello+world&a=%C3%BC%2B&&d&=e&f=g=h&") == [
        ("a", "1"), ("b", "hello world"), ("a", "ü+"), ("d", ""), ("", "e"), ("f", "g=h")]
    assert _parse_urlencoded("q=%e2%82%ac") == [("q", "€")]
    assert _parse_urlencoded(b"") == _parse_urlencoded("&&") == []


@pytest.mark.parametrize("data, status, says", [
    (b"a=%", 400, "hexadecimal"), (b"a=%4", 400, "hexadecimal"), (b"%zz=1", 400, "hexadecimal"), (b"a=%+1", 400, "hexadecimal"),
    (b"a=%ff", 400, "UTF-8"), (b"\xff=1", 400, "UTF-8"), (b"a=%ed%a0%80", 400, "UTF-8"), (b"a&b&c&d", 413, "max_fields"),
    (b"a" * 21, 413, "max_bytes")])
def test_urlencoded_input_that_is_malformed_or_too_much_is_refused(data, status, says):
    with pytest.raises(ProtocolError, match=says) as caught:
        _parse_urlencoded(data, max_fields=3, max_bytes=20)
    assert caught.value.status == status
    assert _parse_urlencoded(b"&a&&b&c&", max_fields=3, max_bytes=20) == [("a", ""), ("b", ""), ("c", "")]


@pytest.mark.parametrize("seed", SEEDS)
def test_urlencoded_fields_go_there_and_back_as_in_the_standard_library(seed):
    draw = random.Random(seed)
    fields = [("".join(draw.choices("aZ0 &=+%;/ü€\U0001f600\0\r\n", k=draw.randrange(8))),
               "".join(draw.choices("aZ0 &=+%;/ü€\U0001f600\0\r\n", k=draw.randrange(8)))) for _ in range(draw.randrange(10))]
    data = _encode_urlencoded(fields)
    assert _parse_urlencoded(data) == fields == urllib.parse.parse_qsl(data.decode(), keep_blank_values=True)


def test_a_megabyte_of_escapes_is_read():
    assert _parse_urlencoded(b"a=" + b"%41" * 300_000) == [("a", "A" * 300_000)]
    assert len(_parse_urlencoded(b"a=1&" * 250_000, max_fields=250_000)) == 250_000


# ---- the boundary ------------------------------------------------------------------------------------------

def test_the_boundary_is_taken_from_the_content_type():
    assert _multipart_boundary("multipart/form-data; boundary=----WebKitFormBoundaryAbC") == b"----WebKitFormBoundaryAbC"
    assert _multipart_boundary('Multipart/Form-Data; charset=utf-8; boundary="a b\'()+_,-./:=?c"') == b"a b'()+_,-./:=?c"
    for value, status in (("text/plain", 415), ("multipart/mixed; boundary=x", 415), ("multipart/form-data", 400),
                          ('multipart/form-data; boundary=""', 400), ('multipart/form-data; boundary="a "', 400),
                          ("multipart/form-data; boundary=" + "x" * 71, 400), ('multipart/form-data; boundary="a\\\\"', 400),
                          ("multipart/form-data; boundary=a; boundary=b", 400)):
        with pytest.raises(ProtocolError) as caught:
            _multipart_boundary(value)
        assert caught.value.status == status, value


# ---- multipart: what is read -------------------------------------------------------------------------------

def test_parts_come_as_events():
    parser = _MultipartParser(b"B")
    parser.receive_data(body_of((FIELD, b"1"), (FILE + b"\r\nContent-Type: text/plain; charset=x\r\nX-Y:\tz ", b"")))
    begin = parser.next_event()
    assert begin[:3] == ("a", None, None) and parser.next_event() == _PartData(b"1") and parser.next_event() == _PartEnd()
    begin = parser.next_event()
    assert begin[:3] == ("f", "x", "text/plain; charset=x") and begin.headers["x-y"] == "z"
    assert parser.next_event() == _PartEnd()
    assert parser.next_event() is NEED_DATA
    parser.receive_data(b"")
    assert parser.next_event() == parser.next_event() == _FormEnd()
    with pytest.raises(ValueError, match="after the end"):
        parser.receive_data(b"x")


def test_data_that_could_begin_a_delimiter_are_held_back_and_no_more():
    parser = _MultipartParser(b"B")
    parser.receive_data(b"--B\r\n" + FIELD + b"\r\n\r\nabc\r\n--")
    assert isinstance(parser.next_event(), _PartBegin)
    assert parser.next_event() == _PartData(b"abc") and parser.next_event() is NEED_DATA
    parser.receive_data(b"-")
    assert parser.next_event() == _PartData(b"\r\n---") and parser.next_event() is NEED_DATA
    parser.receive_data(b"\r\r")
    assert parser.next_event() == _PartData(b"\r") and parser.next_event() is NEED_DATA


@pytest.mark.parametrize("body, parts", [
    (b"--B--", []), (b"--B--\r\n", []), (b"\r\n--B-- \t\r\nepilogue --B\r\n", []),
    (b"preamble\r\n--B\r\n" + FIELD + b"\r\n\r\n1\r\n--B--", [("a", None, b"1")]),
    (b"--B \t\r\n" + FIELD + b"\r\n\r\n\r\n\r\n--B--", [("a", None, b"\r\n")]),
    (b"--B\r\n" + FIELD + b"\r\n\r\n--B--", [("a", None, b"")]),                # no body at all: RFC 2046 allows it
    (b"--B\r\n" + FIELD + b"\r\n\r\n\r\n--B--", [("a", None, b"")]),
    (b"--B\r\n" + FIELD + b"\r\n\r\n--B\r\n\r\n--B--", None),       # so the second part has no head
    (b"--B\r\n" + FIELD + b"\r\n\r\n\r\n--C\r\n--\r\n--B--", [("a", None, b"\r\n--C\r\n--")]),
    (b"--B\r\n" + FIELD + b"\r\n\r\n --B\n--B--\n\r\n--B--", [("a", None, b" --B\n--B--\n")])])
def test_where_parts_begin_and_end(body, parts):
    if parts is None:
        with pytest.raises(ProtocolError):
            parse(body)
        return
    for size in (None, 1, 2, 3):
        assert parse(body, size) == parts


@pytest.mark.parametrize("parameters, name, filename", [
    (b'name="a"; filename="b c"', "a", "b c"), (b"name=a;filename=b", "a", "b"), (b'NAME="a" ; FileName=""', "a", ""),
    (b'name="\xc3\xbc"; filename="\xe2\x82\xac.txt"', "ü", "€.txt"), (b'name="a%22b%0D%0Ac"', 'a"b\r\nc', None),
    (br'name="a\"b\\c"; filename="C:\dir\file.txt"', r'a"b\c', r"C:\dir\file.txt"),
    (b'name="%41"; filename="100%"', "%41", "100%"), (b"name=a; filename*=UTF-8''%e2%82%ac", "a", "€"),
    (b"name=a; filename=x; filename*=UTF-8''%e2%82%ac", "a", "x"),
    (b'name=""', "", None), (b"name=a; filename*=UTF-8''%ff", "a", None),
    (b"name=a; filename*=utf-8'en'%41", "a", "A"), (b"name=a; filename*=iso-8859-1'en'%A3", "a", "\xa3"),
    (b"name=a; filename*=utf-7''a", "a", None), (b"name=a; filename*=utf-8'a", "a", None),
    (b"name=a; filename*=utf-8''%4", "a", None)])
def test_names_are_read_as_browsers_and_other_clients_write_them(parameters, name, filename):
    assert parse(body_of((b"Content-Disposition: form-data; " + parameters, b""))) == [(name, filename, b"")]


HEADS = [b"", b"X: y", b"Content-Disposition: form-data", b"Content-Disposition: attachment; name=a", FIELD + b"\r\n" + FIELD,
         b"Content-Disposition: form-data; name=a; name=b", b'Content-Disposition: form-data; name="a', FIELD + b"\r\nX",
         b'Content-Disposition: form-data; name="\xff"', FIELD + b"\r\nX : y", FIELD + b"\r\n folded", FIELD + b"\r\nX: a\nb",
         FIELD + b"\r\nX: a\rb", FIELD + b"\r\nX: \0", FIELD + b"\r\n: x", FIELD + b"\nX: y",
         FIELD + b"\r\nContent-Type: a\r\nContent-Type: b",
         FIELD + b"\r\nContent-Transfer-Encoding: base64", b"\r\n" + FIELD, b"Content-Disposition: form-data, name=a"]


@pytest.mark.parametrize("head", HEADS)
def test_a_malformed_head_is_refused(head):
    with pytest.raises(ProtocolError, match="part 1") as caught:
        parse(body_of((head, b"")))
    assert caught.value.status == 400


@pytest.mark.parametrize("body, says", [
    (b"", "before the first boundary"), (b"abc", "before the first boundary"), (b"--B", "without `--B|after part 0"),
    (b"--B\n" + FIELD + b"\n\n1\n--B--\n", "after a boundary"), (b"--Bx\r\n", "after a boundary"),
    (b"--B-\r\n", "after a boundary"),
    (b"--B--x", "after a boundary"), (b"--B\r\nContent", "in the head of part 1"),
    (b"--B\r\n" + FIELD + b"\r\n\r\nabc", "in part 1"),
    (b"--B\r\n" + FIELD + b"\r\n\r\nabc\r\n--B", "after part 1"), (b"--B--\r", "in the last boundary"),
    (b"--B" + b" " * 300 + b"\r\n", "after a boundary"), (b"x" * 9000, "no boundary in the first"),
    (b"--B--\r\n" + b"x" * 9000, "after the last boundary")])
def test_a_malformed_body_is_refused_with_the_reason(body, says):
    texts = set()
    for size in (None, 1, 7):
        with pytest.raises(ProtocolError, match=says) as caught:
            parse(body, size)
        texts.add(str(caught.value))
    assert len(texts) == 1 and caught.value.status == 400


def test_an_error_stays():
    parser = _MultipartParser(b"B")
    parser.receive_data(b"--B!")
    for _ in range(2):
        with pytest.raises(ProtocolError, match="after a boundary"):
            parser.next_event()
    parser.receive_data(b"--B--")
    with pytest.raises(ProtocolError, match="after a boundary"):
        parser.next_event()


@pytest.mark.parametrize("limit, most", [
    ("max_parts", 3), ("max_head_bytes", len(FILE)), ("max_field_bytes", 10), ("max_file_bytes", 20), ("max_total_bytes", 202)])
def test_limits_hold_to_the_byte(limit, most):
    body = body_of((FIELD, b"x" * 10), (FILE, b"y" * 20), (FIELD, b"")).removesuffix(b"\r\n")
    assert len(body) == 202
    for size in (None, 1, 5):
        assert len(parse(body, size, **{limit: most})) == 3
        with pytest.raises(ProtocolError, match=limit) as caught:
            parse(body, size, **{limit: most - 1})
        assert caught.value.status == 413


def test_what_comes_before_a_limit_is_still_given():
    parser = _MultipartParser(b"B", max_field_bytes=4)
    parser.receive_data(body_of((FIELD, b"12345")))
    assert isinstance(parser.next_event(), _PartBegin) and parser.next_event() == _PartData(b"1234")
    with pytest.raises(ProtocolError, match="part 1 is too large"):
        parser.next_event()


def test_ten_thousand_parts_and_much_that_looks_like_a_boundary_are_read():
    body = body_of(*[(FIELD, b"x")] * 10_000)
    assert len(parse(body, max_parts=10_000)) == len(parse(body, 100, max_parts=10_000)) == 10_000
    for piece in (b"\r\n--", b"\r", b"\r\n", b"-", b"\r\n--b"):
        content = piece * 100_000
        for size in (None, 1000):
            assert parse(body_of((FILE, content)), size) == [("f", "x", content)]
    content = b"\r\n-" * 30_000
    assert parse(body_of((FILE, content)), 1) == [("f", "x", content)]
    with pytest.raises(ProtocolError):
        parse(b"\r\n-" * 30_000, 1)
    with pytest.raises(ProtocolError, match="max_head_bytes"):
        parse(b"--B\r\n" + b"x" * 2**18, 1, max_head_bytes=2**17)


# ---- multipart: what is made -------------------------------------------------------------------------------

def test_a_body_is_made_and_read_back():
    parts = [("plain", "text"), _FormPart("ü", "€"), _FormPart("f", b"\r\n--B\r\n", 'a"b\\.txt', "text/plain"),
             _FormPart("big", b"z" * 10**5, "z"), _FormPart('new"\r\nline', ""), _FormPart("end\\", b"", "\\")]
    body = _MultipartBody(parts)
    data = b"".join(body)
    assert len(data) == body.length
    assert parse(data, boundary=_multipart_boundary(body.content_type)) == [
        ("plain", None, b"text"), ("ü", None, "€".encode()), ("f", 'a"b\\.txt', b"\r\n--B\r\n"), ("big", "z", b"z" * 10**5),
        ('new"\r\nline', None, b""), ("end\\", "\\", b"")]
    assert b'filename="z"\r\nContent-Type: application/octet-stream\r\n' in data
    assert list(map(type, body)) == [bytes] * 3              # what is small is joined, what is big not copied
    assert b"".join(_MultipartBody([], boundary="B")) == b"--B--\r\n"


def test_streamed_contents_are_left_to_the_caller_and_count_if_their_length_is_known():
    source = object()
    body = _MultipartBody([("a", "1"), _FormPart("f", source, "x", length=10)], boundary="B")
    before, middle, after = body
    assert middle is source and body.length == len(before) + 10 + len(after) and after == b"\r\n--B--\r\n"
    assert _MultipartBody([_FormPart("f", source, "x")]).length is None
    assert _MultipartBody([_FormPart("f", source, "x"), _FormPart("g", source, "x", length=10)]).length is None


def test_what_cannot_be_sent_is_refused():
    for part, says in ((("a", b"has B inside"), "boundary"), (("a\0", ""), "control"), (_FormPart("a", "", "x\x7f"), "control"),
                       (_FormPart("a", "", "x", "text/plain\r\nX: y"), "content_type")):
        with pytest.raises(ValueError, match=says):
            _MultipartBody([part], boundary="B")
    for boundary in ("", "a\r\n", "x" * 71, "ü", "a "):
        with pytest.raises(ValueError, match="boundary"):
            _MultipartBody([], boundary=boundary)


# ---- models ------------------------------------------------------------------------------------------------

def random_parts(draw):
    """[(name, filename, content)], whose contents are full of what looks like a delimiter."""
    pieces = [b"\r\n", b"\r", b"\n", b"--", b"--B", b"\r\n--", b"x", b"", b"\0\xff", b"\r\n-", b"B", b"\r\n--b", b"--B--", b" "]
    parts = []
    for _ in range(draw.randrange(6)):
        content = b"".join(draw.choices(pieces, k=draw.randrange(12)))
        while b"\r\n--B" in b"\r\n" + content:
            content = content.replace(b"--B", b"--b")
        filename = "".join(draw.choices('aü"\\ .€%;=', k=draw.randrange(6))) if draw.random() < 0.5 else None
        parts.append(("".join(draw.choices('aü"\\ .€;=', k=draw.randrange(6))), filename, content))
    return parts


@pytest.mark.parametrize("seed", SEEDS)
def test_every_split_of_a_body_gives_the_parts_it_was_made_of(seed):
    draw = random.Random(seed)
    parts = random_parts(draw)
    boundary = draw.choice([boundary for boundary in ("-", "--", "B", "BB", "Zz", "x" * 70, "a b")
                            if not any(boundary.encode() in content for _, _, content in parts)])
    made = _MultipartBody([_FormPart(name, content, filename) for name, filename, content in parts], boundary=boundary)
    data, boundary = b"".join(made), _multipart_boundary(made.content_type)
    assert made.length == len(data)
    places = sorted(draw.choices(range(len(data) + 1), k=draw.randrange(12)))
    pieces = [data[begin:end] for begin, end in zip([0, *places], [*places, len(data)]) if begin < end]
    assert parse(data, boundary=boundary) == parse(data, 1, boundary) == parse(pieces, boundary=boundary) == parts


@pytest.mark.parametrize("seed", SEEDS)
def test_bodies_are_read_as_by_the_standard_library(seed):
    """Where that is right: with CRLF, its content ends before the CRLF of the delimiter, and names are those of RFC 2183."""
    draw = random.Random(seed)
    parts = [(f"n{number}", draw.choice((None, "x y.txt", "a;b")), bytes(draw.choices(b"ab \t-B", k=draw.randrange(20))).strip()
              + b"\r\n" * draw.randrange(2) + b"x") for number in range(draw.randrange(1, 6))]
    made = _MultipartBody([_FormPart(name, content, filename) for name, filename, content in parts], boundary="Zz")
    data = b"".join(made)
    head = f"Content-Type: {made.content_type}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + data)
    theirs = [(part.get_param("name", header="content-disposition"), part.get_filename(), part.get_payload(decode=True))
              for part in message.iter_parts()]
    assert parse(data, boundary=b"Zz") == parts == theirs


# ---- fuzzing -----------------------------------------------------------------------------------------------

def test_half_a_second_of_fuzzing_finds_nothing():
    done = subprocess.run([sys.executable, "-W", "error", FUZZ, "--seconds", "0.5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing found" in done.stdout


def test_the_fuzzer_finds_a_parser_that_depends_on_how_its_input_is_cut(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("fuzz_http_forms", FUZZ)
    http_forms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(http_forms)
    monkeypatch.setattr(flowcoro_http._MultipartParser, "_hold", lambda parser: len(parser._buffer))
    assert http_forms.main(["--seconds", "30"]) == 1
    assert "seed" in capsys.readouterr().out
