"""Compression: gzip and deflate, made and inflated, and when a response is compressed."""

import gzip
import os
import random
import tracemalloc
import zlib

import pytest

from flowcoro_http import _Decoder, _Encoder, Headers, ProtocolError, _choose_compression, _compressed_headers

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 50)))

TEXT = b"the quick brown fox jumps over the lazy dog. " * 2000


def inflate(codings, data, size=None, **limits):
    decoder, size = _Decoder(codings, **limits), size or len(data) or 1
    found = b"".join(piece for at in range(0, len(data), size) for piece in decoder.decode(data[at:at + size]))
    decoder.finish()
    return found


def raw_deflate(data):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


# ---- there and back ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_what_is_compressed_is_inflated_by_the_standard_library_and_by_us(coding):
    encoder = _Encoder(coding)
    data = b"".join(encoder.encode(TEXT[at:at + 1000]) for at in range(0, len(TEXT), 1000)) + encoder.finish()
    assert len(data) < len(TEXT) / 50
    assert (gzip.decompress if coding == "gzip" else zlib.decompress)(data) == TEXT
    for size in (None, 1, 1000):
        assert inflate(coding, data, size) == TEXT
    with pytest.raises(ValueError, match="coding"):
        _Encoder("br")


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_after_a_flush_all_that_was_given_gets_through(coding):
    encoder, decoder = _Encoder(coding), _Decoder(coding)
    for event in (b"data: 1\n\n", b"data: 2\n\n"):
        assert b"".join(decoder.decode(encoder.encode(event) + encoder.flush())) == event
    assert b"".join(decoder.decode(encoder.finish())) == b""
    decoder.finish()


def test_both_dialects_of_deflate_are_read():
    for level in range(10):
        assert inflate("deflate", zlib.compress(TEXT, level), 7) == TEXT
    for text in (TEXT, b"", b"x", bytes(range(256))):
        assert inflate("deflate", raw_deflate(text), 1) == inflate("deflate", raw_deflate(text)) == text


def test_members_of_gzip_are_joined():
    assert inflate("gzip", gzip.compress(b"a") + gzip.compress(b"") + gzip.compress(TEXT), 1) == b"a" + TEXT
    assert inflate("x-gzip", gzip.compress(b"x") * 3000) == b"x" * 3000


def test_several_codings_are_taken_off_in_turn():
    assert inflate("deflate, Identity, gzip", gzip.compress(zlib.compress(TEXT)), 10) == TEXT
    assert inflate("", TEXT) == inflate("identity", TEXT) == TEXT
    for codings in ("br", "gzip, br", "gzip," * 6, "compress"):
        with pytest.raises(ProtocolError, match="Content-Encoding") as caught:
            _Decoder(codings)
        assert caught.value.status == 415


def test_no_content_at_all_is_complete():
    for codings in ("gzip", "deflate", "gzip, gzip", ""):
        assert inflate(codings, b"") == b""


@pytest.mark.parametrize("seed", SEEDS)
def test_every_split_gives_the_same(seed):
    draw = random.Random(seed)
    text = draw.choice((draw.randbytes(draw.randrange(200_000)), TEXT[:draw.randrange(len(TEXT))],
                        bytes(draw.randrange(500_000))))
    coding = draw.choice(("gzip", "deflate"))
    encoder, data, at = _Encoder(coding, level=draw.randrange(1, 10)), b"", 0
    while at < len(text):
        size = draw.choice((1, 100, 10_000, 100_000))
        data += encoder.encode(text[at:at + size])
        if draw.random() < 0.2:
            data += encoder.flush()
        at += size
    data += encoder.finish()
    decoder, found, at = _Decoder(coding), [], 0
    while at < len(data):
        size = draw.choice((1, 2, 100, 16 * 2**10, 100_000))
        found += decoder.decode(memoryview(data)[at:at + size])
        at += size
    decoder.finish()
    assert b"".join(found) == text
    assert all(0 < len(piece) <= 64 * 2**10 for piece in found)


# ---- malice ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("codings, data", [("gzip", gzip.compress(bytes(10**7))), ("deflate", zlib.compress(bytes(10**7))),
                                           ("deflate", raw_deflate(bytes(10**7))),
                                           ("gzip, gzip", gzip.compress(gzip.compress(bytes(10**7))))])
def test_a_bomb_is_cut_and_needs_no_memory(codings, data):
    tracemalloc.start()
    try:
        decoder, got = _Decoder(codings, max_bytes=10**6), 0
        with pytest.raises(ProtocolError, match="1000000 bytes once inflated") as caught:
            for piece in decoder.decode(data):
                got += len(piece)
        assert caught.value.status == 413 and got <= 10**6
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_the_cap_holds_to_the_byte():
    for codings, data in (("gzip", gzip.compress(TEXT)), ("gzip", gzip.compress(TEXT[:5]) + gzip.compress(TEXT[5:])),
                          ("deflate", zlib.compress(TEXT))):
        for size in (None, 1, 100):
            assert inflate(codings, data, size, max_bytes=len(TEXT)) == TEXT
            with pytest.raises(ProtocolError, match="once inflated"):
                inflate(codings, data, size, max_bytes=len(TEXT) - 1)
    assert inflate("gzip", gzip.compress(b""), max_bytes=0) == b""


@pytest.mark.parametrize("codings, data, says", [
    ("gzip", gzip.compress(b"x") + b"garbage", "follows its end"),
    ("gzip", gzip.compress(b"x") + b"\0\0", "follows its end"), ("gzip", gzip.compress(b"x") + b"\x1f", "breaks off"),
    ("gzip", b"plain text", "no beginning"), ("gzip", b"\x1f", "breaks off"),
    ("gzip", gzip.compress(TEXT)[:-1], "breaks off"), ("gzip", gzip.compress(TEXT)[:20], "breaks off"),
    ("gzip", gzip.compress(TEXT)[:-5] + b"\0" * 5, "corrupt"), ("gzip", b"\x1f\x8b\x09" + bytes(20), "corrupt"),
    ("deflate", zlib.compress(TEXT) + b"xx", "follows its end"), ("deflate", raw_deflate(TEXT) + b"xx", "follows its end"),
    ("deflate", zlib.compress(TEXT)[:-1], "breaks off"), ("deflate", raw_deflate(TEXT)[:-1], "breaks off"),
    ("deflate", zlib.compress(TEXT)[:-1] + b"\0", "corrupt"), ("deflate", b"\xff\xff\xff", "corrupt"),
    ("deflate", b"x", "breaks off")])
def test_a_malformed_stream_is_refused_with_the_reason(codings, data, says):
    for size in (None, 1):
        with pytest.raises(ProtocolError, match=says) as caught:
            inflate(codings, data, size)
        assert caught.value.status == 400


def test_thousands_of_empty_members_and_a_large_piece_are_linear():
    assert inflate("gzip", gzip.compress(b"") * 20_000) == b""
    data = random.Random(0).randbytes(4 * 2**20)
    assert inflate("gzip", gzip.compress(data, 1)) == data


# ---- when ----------------------------------------------------------------------------------------------------

def chosen(accept="gzip", status=200, length=5000, **fields):
    headers = Headers([("Content-Type", fields.pop("content_type", "text/html; charset=utf-8"))]
                      + [(name.replace("_", "-"), value) for name, value in fields.items()])
    return _choose_compression(accept, status, headers, length)


def test_what_can_be_compressed_is_if_the_client_wants_it():
    assert chosen() == ("gzip", True)
    assert chosen("deflate, gzip;q=0.5") == ("deflate", True)
    assert chosen(length=None) == ("gzip", True)
    assert chosen(status=404) == ("gzip", True)
    for accept in (None, "", "br", "identity", "gzip;q=0", "identity;q=0", "no gzip"):
        assert chosen(accept) == (None, True), accept
    for content_type in ("application/json", "APPLICATION/JSON", "application/problem+json", "image/svg+xml", "text/event-stream",
                         "application/javascript", "font/ttf", "application/wasm"):
        assert chosen(content_type=content_type) == ("gzip", True), content_type


def test_what_cannot_or_must_not_be_compressed_is_left():
    for status in (100, 101, 204, 205, 206, 304):
        assert chosen(status=status) == (None, False)
    assert chosen(length=859) == (None, False) and chosen(length=860) == ("gzip", True)
    assert chosen(content_encoding="br") == chosen(content_range="bytes 0-1/2") == (None, False)
    assert chosen(cache_control="public, No-Transform") == (None, False)
    assert chosen(cache_control="public, max-age=5") == ("gzip", True)
    assert chosen(cache_control="max-age=x") == (None, False)
    for content_type in ("image/png", "application/octet-stream", "video/mp4", "font/woff2", "application/zip", "", "nonsense"):
        assert chosen(content_type=content_type) == (None, False), content_type
    assert _choose_compression("gzip", 200, Headers(), 5000) == (None, False)


def test_the_headers_say_what_was_done():
    headers = Headers([("Content-Length", "5000"), ("ETag", '"x"'), ("Vary", "Origin"), ("Accept-Ranges", "bytes")])
    _compressed_headers(headers, "gzip")
    assert {name.lower(): value for name, value in headers.items()} == {
        "etag": 'W/"x"', "vary": "Origin, Accept-Encoding", "content-encoding": "gzip"}
    _compressed_headers(headers, "gzip")
    assert headers["etag"] == 'W/"x"' and headers["vary"] == "Origin, Accept-Encoding"


def test_vary_is_set_also_where_this_client_wants_no_coding():
    headers = Headers([("Content-Length", "5000"), ("ETag", '"x"')])
    _compressed_headers(headers, None, True)
    assert headers["vary"] == "Accept-Encoding" and headers["etag"] == '"x"' and headers["content-length"] == "5000"
    for vary in ("*", "accept-encoding", "Origin,ACCEPT-ENCODING"):
        headers = Headers([("Vary", vary)])
        _compressed_headers(headers, "gzip")
        assert headers.get_all("vary") == [vary]
    headers = Headers([])
    _compressed_headers(headers, None, False)
    assert headers.items() == []
