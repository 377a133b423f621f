"""Conditional requests and ranges: RFC 9110 chapters 13 and 14."""

import email.parser
import os
import random

import pytest

import flowcoro_http
from flowcoro_http import (
    _ByteRange, _Decision, Headers, ProtocolError, _evaluate, _frame_byteranges, http_date)

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 50)))

NOW, MODIFIED = 1_700_000_000, 1_600_000_000
SAME, BEFORE, AFTER = http_date(MODIFIED), http_date(MODIFIED - 1), http_date(MODIFIED + 1)


def asked(method="GET", /, *, etag='"x"', last_modified=MODIFIED, size=1000, **fields):
    now = fields.pop("now", NOW)
    headers = Headers([(name.replace("_", "-"), value) for name, value in fields.items()])
    return _evaluate(method, headers, etag=etag, last_modified=last_modified, size=size, now=now)


def status(*args, **fields):
    return asked(*args, **fields).status


# ---- conditions --------------------------------------------------------------------------------------------

def test_without_conditions_the_answer_is_the_usual():
    for method in ("GET", "HEAD", "PUT", "DELETE"):
        assert asked(method) == _Decision(200, ())


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "POST"])
def test_if_match_compares_strongly(method):
    assert status(method, if_match='"x"') == 200
    assert status(method, if_match='"a", "x"') == 200
    assert status(method, if_match='"a"') == 412
    assert status(method, if_match='W/"x"') == 412
    assert status(method, if_match='"x"', etag='W/"x"') == 412
    assert status(method, if_match='"x"', etag=None) == 412
    assert status(method, if_match="*") == 200


def test_if_none_match_compares_weakly_and_is_304_for_reading_412_otherwise():
    for value, etag in (('"x"', '"x"'), ('W/"x"', '"x"'), ('"x"', 'W/"x"'), ('"a", "x"', '"x"'), ("*", None)):
        assert status("GET", if_none_match=value, etag=etag) == 304
        assert status("HEAD", if_none_match=value, etag=etag) == 304
        assert status("PUT", if_none_match=value, etag=etag) == 412
    assert status("GET", if_none_match='"a"') == 200
    assert status("PUT", if_none_match='"x"', etag=None) == 200


def test_if_unmodified_since():
    for method in ("GET", "PUT", "DELETE"):
        assert status(method, if_unmodified_since=SAME) == 200
        assert status(method, if_unmodified_since=AFTER) == 200
        assert status(method, if_unmodified_since=BEFORE) == 412
        assert status(method, if_unmodified_since="yesterday") == 200
        assert status(method, if_unmodified_since=BEFORE, last_modified=None) == 200


def test_if_modified_since_is_for_reading_only():
    for method in ("GET", "HEAD"):
        assert status(method, if_modified_since=SAME) == 304
        assert status(method, if_modified_since=AFTER) == 304
        assert status(method, if_modified_since=SAME, last_modified=MODIFIED + 0.9) == 304      # a date has no fractions
        assert status(method, if_modified_since=BEFORE) == 200
        assert status(method, if_modified_since="Sat, 99 Xyz 2020 00:00:00 GMT") == 200
        assert status(method, if_modified_since=SAME, last_modified=None) == 200
    assert status("PUT", if_modified_since=SAME) == 200


def test_entity_tags_go_before_dates():
    assert status(if_match='"x"', if_unmodified_since=BEFORE) == 200
    assert status(if_none_match='"a"', if_modified_since=SAME) == 200
    assert status(if_none_match='"x"', if_modified_since=BEFORE) == 304
    assert status(if_match='"a"', if_none_match='"x"') == 412
    assert status(if_match='"x"', if_none_match='"x"') == 304
    assert status(if_unmodified_since=SAME, if_modified_since=SAME) == 304


def test_methods_that_select_no_representation_have_no_conditions():
    for method in ("OPTIONS", "TRACE", "CONNECT"):
        assert status(method, if_match='"a"', if_none_match="*", range="bytes=0-0") == 200


def test_a_date_that_comes_twice_is_ignored_and_tags_are_joined():
    headers = Headers([("If-Modified-Since", SAME), ("If-Modified-Since", SAME)])
    assert _evaluate("GET", headers, last_modified=MODIFIED, now=NOW).status == 200
    assert _evaluate("GET", Headers([("If-None-Match", '"a"'), ("If-None-Match", '"x"')]), etag='"x"', now=NOW).status == 304


def test_malformed_entity_tags_are_refused():
    for name in ("if_match", "if_none_match"):
        for value in ("x", "", '"x', '"x" "y"', '*, "x"'):
            with pytest.raises(ProtocolError):
                status(**{name: value})


# the rules of section 13.2.2 once more, as one table of what is true

def by_the_table(method, match, unmodified, none_match, modified, if_range, ranged):
    """match…: None if the field is not there, else whether its condition holds."""
    if match is False or (match is None and unmodified is False):
        return 412
    if none_match is False:
        return 304 if method in ("GET", "HEAD") else 412
    if none_match is None and modified is False and method in ("GET", "HEAD"):
        return 304
    return 206 if ranged and method == "GET" and if_range is not False else 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_every_combination_is_decided_as_the_rfc_says(method):
    three = None, True, False
    for match in three:
        for unmodified in three:
            for none_match in three:
                for modified in three:
                    for if_range in three:
                        for ranged in (True, False):
                            fields = {"if_match": {True: '"x"', False: '"a"'}.get(match),
                                      "if_unmodified_since": {True: SAME, False: BEFORE}.get(unmodified),
                                      "if_none_match": {True: '"a"', False: '"x"'}.get(none_match),
                                      "if_modified_since": {True: BEFORE, False: SAME}.get(modified),
                                      "if_range": {True: '"x"', False: '"a"'}.get(if_range),
                                      "range": "bytes=0-9" if ranged else None}
                            fields = {name: value for name, value in fields.items() if value is not None}
                            assert status(method, **fields) == by_the_table(
                                method, match, unmodified, none_match, modified, if_range, ranged), fields


# ---- ranges ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, ranges", [
    ("bytes=0-499", [(0, 499)]), ("bytes=500-", [(500, 999)]), ("bytes=-1", [(999, 999)]), ("bytes=-5000", [(0, 999)]),
    ("bytes=0-5000", [(0, 999)]), ("BYTES= 0-0 ,\t-1,", [(0, 0), (999, 999)]), ("bytes=999-,0-0", [(999, 999), (0, 0)]),
    ("bytes=0-0,5000-", [(0, 0)]), ("bytes=0-9,5-14", [(0, 14)]), ("bytes=0-9,10-19", [(0, 19)]), ("bytes=0-9,90-99", [(0, 99)]),
    ("bytes=0-9,91-99", [(0, 9), (91, 99)]), ("bytes=0-9,200-209", [(0, 9), (200, 209)]),
    ("bytes=500-599,0-9,550-700", [(500, 700), (0, 9)]), ("bytes=0-9999999999999999999", [(0, 999)]), ("bytes=00-01", [(0, 1)])])
def test_ranges_are_those_asked_for(value, ranges):
    assert asked(range=value) == (206, tuple(ranges))


@pytest.mark.parametrize("value", ["bytes=1000-", "bytes=1000-2000", "bytes=-0", "bytes=5000-,-0"])
def test_a_range_beyond_the_end_is_416(value):
    assert asked(range=value) == (416, ())


@pytest.mark.parametrize("value", [
    "", "bytes", "bytes=", "bytes=,", "bytes=-", "bytes=a-b", "bytes=5-4", "bytes=0-1,5-4", "bytes=1-2-3", "bytes=+1-2",
    "bytes=0x1-2", "bytes=1_0-20", "bytes = 0-1", "items=0-1", "bytes=0 - 1", "bytes=0-1;",
    "bytes=" + "9" * 5000 + "-"])
def test_a_malformed_range_is_ignored(value):
    assert asked(range=value) == (200, ())


@pytest.mark.parametrize("value", ["bytes=١-٢", "bytes=0-1\n"])
def test_a_range_that_headers_would_refuse_is_ignored_too(value):
    assert flowcoro_http._ranges_asked([value], 1000) == (200, ())


def test_too_many_ranges_are_ignored():
    value = "bytes=" + ",".join(f"{first}-{first}" for first in range(16))
    assert asked(range=value) == (206, ((0, 15),))
    assert status(range=value + ",16-16") == 200
    assert status(range="bytes=" + "," * 10**6 + "0-0") == 200
    assert status(range="bytes=" + "0-0," * 10**6) == 200


def test_ranges_are_for_get_of_what_has_a_size():
    assert status("HEAD", range="bytes=0-1") == status("PUT", range="bytes=0-1") == 200
    assert status(range="bytes=0-1", size=None) == status(range="bytes=0-1", size=0) == status(range="bytes=-1", size=0) == 200
    assert _evaluate("GET", Headers([("Range", "bytes=0-1"), ("Range", "bytes=0-1")]), size=10, now=NOW).status == 200


def test_if_range_holds_for_the_strong_validator_only():
    for value, etag, holds in (('"x"', '"x"', True), ('"a"', '"x"', False), ('W/"x"', 'W/"x"', False), ('W/"x"', '"x"', False),
                               ('"x"', None, False), ("x", '"x"', False), ('"x", "y"', '"x"', False),
                               (SAME, '"x"', True), (BEFORE, '"x"', False), (AFTER, '"x"', False), ("soon", '"x"', False)):
        assert status(range="bytes=0-1", if_range=value, etag=etag) == (206 if holds else 200), value
    assert status(range="bytes=0-1", if_range=SAME, last_modified=None) == 200
    assert status(range="bytes=0-1", if_range=SAME, now=MODIFIED + 0.5) == 200      # it may change again within that second
    assert status(range="bytes=0-1", if_range=SAME, now=MODIFIED + 1) == 206
    assert status(if_range='"a"') == 200
    assert status(range="bytes=5000-", if_range='"a"') == 200
    assert status(range="bytes=5000-", if_range='"x"') == 416


@pytest.mark.parametrize("seed", SEEDS)
def test_ranges_hold_what_was_asked_for_and_little_else(seed):
    """Against a model that has a set of places."""
    draw = random.Random(seed)
    size = draw.randrange(1, 3000)
    wanted, elements = [], []
    for _ in range(draw.randrange(1, 6)):
        first = draw.randrange(size + 200)
        last = first + draw.randrange(300)
        kind = draw.randrange(8)
        if kind == 0:
            elements.append(f"-{last}")
            places = range(max(0, size - last), size)
        elif kind == 1:
            elements.append(f"{first}-")
            places = range(first, size)
        else:
            elements.append(f"{first}-{last}")
            places = range(first, min(last + 1, size))
        if places:
            wanted.append(places)
    got = asked(range="bytes=" + ",".join(elements), size=size)
    if not wanted:
        assert got == (416, ())
        return
    places = set().union(*wanted)
    sent = [place for one in got.ranges for place in range(one.first, one.last + 1)]
    assert got.status == 206 and len(sent) == len(set(sent)) and places <= set(sent) <= set(range(size))
    for place in set(sent) - places:            # only gaps that cost less than a part's head are filled
        low, high = place, place
        while low not in places:
            low -= 1
        while high not in places:
            high += 1
        assert high - low - 1 <= 80
    begins = [min(index for index, one in enumerate(wanted) if one.start >= sent_range.first and one.start <= sent_range.last)
              for sent_range in got.ranges]
    assert begins == sorted(begins)             # as asked


# ---- how they are sent -------------------------------------------------------------------------------------

def test_a_range_says_its_length_and_content_range():
    assert _ByteRange(0, 499).content_range(1234) == "bytes 0-499/1234" and _ByteRange(0, 499).length == 500


@pytest.mark.parametrize("content_type", ["text/plain; charset=utf-8", None])
def test_several_ranges_are_framed_with_their_exact_length(content_type):
    content = bytes(random.Random(1).randbytes(1000))
    ranges = asked(range="bytes=0-9,300-399,-5").ranges
    frame = _frame_byteranges(ranges, 1000, content_type, "B0UNDARY")
    body = b"".join(head + content[one.first:one.last + 1] for head, one in frame.parts) + frame.tail
    assert len(body) == frame.length
    message = email.parser.BytesParser().parsebytes(f"Content-Type: {frame.content_type}\r\n\r\n".encode() + body)
    assert [part["content-range"] for part in message.get_payload()] == [
        "bytes 0-9/1000", "bytes 300-399/1000", "bytes 995-999/1000"]
    assert {part["content-type"] for part in message.get_payload()} == {content_type}
    for _, one in frame.parts:
        assert content[one.first:one.last + 1] in body
    with pytest.raises(ValueError):
        _frame_byteranges(ranges, 1000, None, "a\r\nb")
