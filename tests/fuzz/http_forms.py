"""Fuzzes the forms of flowcoro_http: mutated bodies go through the parsers, whole, byte by byte and at random splits.

    python tests/fuzz/http_forms.py --seconds 600 --seed 1

It looks for three things: an exception other than ProtocolError, events that depend on how the input is cut, and an input that
takes much longer than its length explains. What it finds it prints with the seed and the input, and exits with 1.
"""

import argparse
import pathlib
import random
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))

import flowcoro_http as http

BOUNDARY = b"AaB03x"

CORPUS = [
    b"--AaB03x\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n--AaB03x--\r\n",
    b"preamble\r\n--AaB03x \t\r\ncontent-disposition: form-data; name=\"f\"; filename=\"a\\\"b%22.txt\"\r\n"
    b"Content-Type: text/plain\r\n\r\nline\r\n--AaB03\r\n-\r\n\r\n--AaB03x\r\n"
    b"Content-Disposition: form-data; name=b\r\n\r\n--AaB03x--  \r\nepilogue",
    b"--AaB03x\r\nContent-Disposition: form-data; name=\"x\"; filename*=utf-8''%e2%82%ac\r\nX: y\r\n\r\n\r\n\r\n--AaB03x--",
    b"--AaB03x--",
    b"a=1&b=hello+world&c=%C3%BC&&d&=e&%3d=%26",
]

PIECES = [b"\r\n", b"\r", b"\n", b"--", b"-", b"--AaB03x", b"\r\n--AaB03x", b"--AaB03x--", b"\r\n\r\n", b":", b";", b'"',
          b"\\", b"%22", b"=", b"name=", b'; filename="', b"Content-Disposition: form-data", b"\0", b"\xff", b" ", b"\t", b"%",
          b"&",
          b"\r\n--AaB03x\r\n", b"filename*=utf-8''%41", b"x" * 300, b" " * 300]

# Small, so that random bodies meet them.
LIMITS = {"max_parts": 3, "max_head_bytes": 200, "max_field_bytes": 40, "max_file_bytes": 60, "max_total_bytes": 900}


def events(pieces, **limits):
    """What the parser says of a body that comes in these pieces: its events, data joined, and the error's text or None."""
    parser, found = http._MultipartParser(BOUNDARY, **limits), []
    try:
        for piece in [*pieces, b""]:
            parser.receive_data(piece)
            while True:
                event = parser.next_event()
                if event is http.NEED_DATA:
                    break
                if isinstance(event, http._PartData):
                    assert event.data, "data that are empty"
                    if found and isinstance(found[-1], bytearray):
                        found[-1] += event.data
                        continue
                    event = bytearray(event.data)
                elif isinstance(event, http._PartBegin):
                    event = *event[:3], event.headers.items()
                found.append(event)
                if isinstance(event, http._FormEnd):
                    break
    except http.ProtocolError as error:
        assert error.status in (400, 413, 415)
        return found, f"{error.status} {error}"
    assert found and isinstance(found[-1], http._FormEnd), "the end is neither an error nor _FormEnd"
    return found, None


def cut(draw, data):
    """The data in random pieces, most of them short."""
    pieces, at = [], 0
    while at < len(data):
        size = draw.choice((1, 1, 2, 3, 10, 100))
        pieces.append(data[at:at + size])
        at += size
    return pieces


def mutate(draw, data):
    data = bytearray(data)
    for _ in range(draw.choice((0, 1, 1, 2, 3, 8))):
        place, size = draw.randrange(len(data) + 1), draw.randrange(12)
        kind = draw.randrange(5)
        if kind == 0:
            data[place:place + size] = b""
        elif kind == 1:
            data[place:place] = draw.choice(PIECES)
        elif kind == 2 and place < len(data):
            data[place] = draw.randrange(256)
        elif kind == 3:
            data[place:place] = data[place:place + 10 * size]
        else:
            data[place:place + size] = draw.choice(PIECES)
    return bytes(data)


def one(seed):
    """One mutated body, all ways. AssertionError, or whatever the parser raises that it should not."""
    draw = random.Random(seed)
    data = mutate(draw, draw.choice(CORPUS))
    limits = LIMITS if draw.random() < 0.5 else {}
    whole = events([data] if data else [], **limits)
    for pieces in ([data[at:at + 1] for at in range(len(data))], cut(draw, data)):
        assert events(pieces, **limits) == whole, f"cut as {pieces!r:.300}"
    try:
        fields = http._parse_urlencoded(data)
        assert http._parse_urlencoded(http._encode_urlencoded(fields)) == fields
    except http.ProtocolError:
        pass
    return data


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first body")
    options = parser.parse_args(arguments)
    end, seed = time.monotonic() + options.seconds, options.seed
    while time.monotonic() < end:
        start = time.process_time()
        try:
            one(seed)
        except Exception as error:
            draw = random.Random(seed)
            print(f"seed {seed}: {error!r}\n{mutate(draw, draw.choice(CORPUS))!r}")
            return 1
        took = time.process_time() - start
        if took > 2:
            print(f"seed {seed}: took {took:.1f} s")
            return 1
        seed += 1
    print(f"http_forms: {seed - options.seed} bodies, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
