"""flowcoro_rpc, framings: whatever way the bytes are split, the messages are the same; limits hold before anything is kept."""

import json
import os
import random
import subprocess
import sys

import pytest

import flowcoro_rpc
from flowcoro_rpc import NEED_DATA, Concatenated, ContentLength, LengthPrefixed, Netstring, Newline, ProtocolError

ALL = [Newline, ContentLength, Netstring, LengthPrefixed, Concatenated]
SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 40)))

every_framing = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)


def messages_of(framing, pieces, end=False):
    """All messages of these pieces, and the error that came after them, or None."""
    found = []
    try:
        for piece in pieces:
            framing.receive_data(piece)
            while (message := framing.next_message()) is not NEED_DATA:
                found.append(message)
        if end:
            framing.receive_end()
            while (message := framing.next_message()) is not NEED_DATA:
                found.append(message)
    except ProtocolError as error:
        return found, str(error)
    return found, None


def random_value(draw, depth=3):
    kind = draw.randrange(7 if depth else 4)
    if kind == 0:
        return draw.choice([None, True, False, 0, -1.5, 10**20])
    if kind < 4:
        return "".join(draw.choice('ab"\\{}[]:,é\u2028 \n🙂') for _ in range(draw.randrange(12)))
    if kind == 4:
        return {str(index): random_value(draw, depth - 1) for index in range(draw.randrange(4))}
    return [random_value(draw, depth - 1) for _ in range(draw.randrange(4))]


def pieces_of(draw, data):
    """The data, cut at random, sometimes into single bytes."""
    most = draw.choice([1, 2, 7, 50, 10_000])
    start = 0
    while start < len(data):
        size = draw.randint(1, most)
        yield data[start:start + size]
        start += size


@every_framing
@pytest.mark.parametrize("seed", SEEDS)
def test_any_split_gives_the_same_messages(make, seed):
    draw = random.Random(f"{make.__name__} {seed}")
    messages = [json.dumps({"": random_value(draw)}, ensure_ascii=draw.random() < 0.5,
                           indent=draw.choice([None, 2]) if make is not Newline else None).encode()
                for _ in range(draw.randrange(12))]
    between = b"" if make is not Concatenated else draw.choice([b"", b" ", b"\r\n\t"])
    data = b"".join(make.frame(message) + between for message in messages)
    assert messages_of(make(), pieces_of(draw, data), end=True) == (messages, None)


@every_framing
@pytest.mark.parametrize("seed", SEEDS)
def test_any_split_of_what_is_broken_gives_the_same_messages_and_the_same_kind_of_end(make, seed):
    draw = random.Random(f"broken {make.__name__} {seed}")
    data = bytearray(b"".join(make.frame(json.dumps([random_value(draw)]).encode()) for _ in range(5)))
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(len(data))] = draw.choice(b'\n\r:,"[]{} 09\x00\xff')
    data, limit = bytes(data), draw.choice([20, 2**20])
    whole = messages_of(make(limit), [data])
    split = messages_of(make(limit), pieces_of(draw, data))
    assert split[0] == whole[0] and (split[1] is None) == (whole[1] is None)


@every_framing
def test_a_message_of_the_limit_passes_and_one_byte_more_does_not(make):
    message = b'["' + b"x" * 96 + b'"]'
    for size in (1, 7, 1000):
        framed = make.frame(message)
        pieces = [framed[start:start + size] for start in range(0, len(framed), size)]
        assert messages_of(make(len(message)), pieces) == ([message], None)
        found, error = messages_of(make(len(message) - 1), pieces)
        assert found == [] and "max_message=99 are allowed" in error


@pytest.mark.parametrize("make, head", [
    (ContentLength, b"Content-Length: 1073741824\r\n\r\n"), (Netstring, b"1073741824:"), (LengthPrefixed, b"\x40\x00\x00\x00"),
    (Netstring, b"9" * 30)])
def test_a_length_beyond_the_limit_is_refused_before_any_byte_of_it(make, head):
    found, error = messages_of(make(), [head])
    assert found == [] and "max_message=1048576" in error


@pytest.mark.parametrize("make", [Newline, Concatenated], ids=lambda make: make.__name__)
def test_what_has_no_end_is_refused_when_the_limit_is_reached_and_not_kept(make):
    framing = make(1000)
    framing.receive_data(b'["' + b"x" * 900)
    assert framing.next_message() is NEED_DATA
    framing.receive_data(b"x" * 100)
    with pytest.raises(ProtocolError, match="at least 1002"):
        framing.next_message()


@pytest.mark.parametrize("make, data, why", [
    (ContentLength, b"GET / HTTP/1.1\r\n", "begins with"), (ContentLength, b"{", "begins with"),
    (ContentLength, b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n1", "after another"),
    (ContentLength, b"Content-Length: -1\r\n\r\n", "length"), (ContentLength, b"Content-Length: +1\r\n\r\n1", "length"),
    (ContentLength, b"Content-Length: 0x1\r\n\r\n1", "length"), (ContentLength, b"Content-Length:\r\n\r\n1", "length"),
    (ContentLength, b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", "length"),
    (ContentLength, b"Content-Length: 1\r\nX 1\r\n\r\n", "no field"), (ContentLength, b"\r\n\r\n", "begins with"),
    (ContentLength, b"Content-Type: a\r\n\r\n", "no Content-Length"), (ContentLength, b"Content-Length 1\r\n\r\n", "begins with"),
    (ContentLength, b"Content-Length: 2\r\nContent-Type: application/x; charset=latin-1\r\n\r\n{}", "UTF-8"),
    (ContentLength, b"Content-Length: 2\n\n{}" + b" " * 5000, "CRLF"), (ContentLength, b"c" * 5000, "4096"),
    (Netstring, b"2:{};", "comma"), (Netstring, b"02:{},", "begins"), (Netstring, b":,", "begins"),
    (Netstring, b"-1:,", "begins"),
    (Netstring, b"x", "begins"), (Netstring, b"2 :{},", "begins")])
def test_what_cannot_be_cut_into_messages_is_refused(make, data, why):
    for pieces in ([data], [data[at:at + 1] for at in range(len(data))]):
        found, error = messages_of(make(), pieces)
        assert found == [] and why in error


@pytest.mark.parametrize("head", [
    b"Content-Length: 2\r\n\r\n", b"content-length:2\r\n\r\n", b"Content-Length: 2 \r\nX-Other: a\r\n\r\n",
    b"Content-Length: 2\r\nContent-Type: application/vscode-jsonrpc; charset=utf-8\r\n\r\n",
    b"Content-Type: application/vscode-jsonrpc; charset=utf8\r\nContent-Length: 2\r\n\r\n",
    b"X-Other: a\r\nContent-Length: 2\r\n\r\n"])
def test_heads_as_language_servers_and_their_clients_write_them_are_read_however_they_are_split(head):
    data = head + b"{}"
    for pieces in ([data], *([data[:at], data[at:]] for at in range(1, len(data)))):
        assert messages_of(ContentLength(), pieces) == ([b"{}"], None)


@pytest.mark.parametrize("make, data", [
    (ContentLength, b"Content-Length: 5\r\n\r\n{}"), (ContentLength, b"Content-"), (Netstring, b"5:{}"), (Netstring, b"2:{}"),
    (LengthPrefixed, b"\0\0\0\5{}"), (LengthPrefixed, b"\0"), (Concatenated, b"[1"), (Concatenated, b'"a')])
def test_an_end_in_the_middle_of_a_message_is_an_error(make, data):
    assert messages_of(make(), [data])[1] is None
    assert "in the middle of a message" in messages_of(make(), [data], end=True)[1]


def test_lines_may_end_with_a_carriage_return_be_empty_and_lack_the_last_end():
    assert messages_of(Newline(), [b"\n\r\n{}\r\n", b"\n", b"[1]\n[2]"], end=True) == ([b"{}\r", b"[1]", b"[2]"], None)


@pytest.mark.parametrize("seed", SEEDS)
def test_lines_that_nobody_has_taken_yet_are_kept_in_order_and_joined_where_they_were_cut(seed):
    chance, framing, taken = random.Random(seed), Newline(), []
    lines = [b"x" * chance.choice([1, 2, 3, 50]) + b"%d" % number for number in range(60)]
    data = b"\n".join(lines) + b"\n"
    while data:
        if chance.random() < 0.6:
            count = chance.choice([0, 1, 2, 7, 60])
            framing.receive_data(chance.choice([bytes, bytearray])(data[:count]))
            data = data[count:]
        else:
            taken.append(framing.next_message())
    taken += iter(framing.next_message, NEED_DATA)
    assert [line for line in taken if line is not NEED_DATA] == lines


def test_what_is_received_and_not_taken_costs_no_more_than_its_length():
    framing = Newline()
    for _ in range(200_000):
        framing.receive_data(b"x\n")                # each time all that was kept: 40 GB
    assert all(framing.next_message() == b"x" for _ in range(200_000)) and framing.next_message() is NEED_DATA


def test_a_line_that_is_too_long_is_refused_again_when_asked_for_again_and_not_kept():
    for pieces in [b"x" * 1001], [b"x" * 900, b"x" * 101], [b"x" * 1001 + b"\n{}\n"], [b"x" * 900, b"x" * 101 + b"\n{}\n"]:
        framing = Newline(1000)
        for piece in pieces:
            assert framing.next_message() is NEED_DATA
            framing.receive_data(piece)
        for _ in range(3):
            with pytest.raises(ProtocolError, match="1001 bytes"):
                framing.next_message()
        assert len(framing._buffer) <= 1000


def test_the_end_after_a_line_that_is_whole_is_no_line_and_twice_is_once():
    for end in b"", b"\n":
        framing = Newline(3)
        framing.receive_data(b"{ }" + end)
        framing.receive_end()
        framing.receive_end()
        assert framing.next_message() == b"{ }"
        framing.receive_end()
        assert framing.next_message() is NEED_DATA


def test_concatenated_messages_are_lines_too_for_readers_that_wait_for_one():
    assert messages_of(Newline(), [Concatenated.frame(b"{}") * 2]) == ([b"{}"] * 2, None)


def test_concatenated_values_need_no_delimiter_also_where_they_are_no_objects():
    assert messages_of(Concatenated(), [b'{"a":"}{"}[1]"x"1 true{}"\\"" ]', b" 12"], end=True) == (
        [b'{"a":"}{"}', b"[1]", b'"x"', b"1", b"true", b"{}", b'"\\""', b"]", b"12"], None)


@every_framing
def test_the_time_is_linear_in_the_bytes(make):
    """By the number of instructions of Python, for a message in small pieces; twice the bytes are about twice the steps."""
    def steps(size):
        message = b"[" + b'"\\\\[x]",' * (size // 9) + b"1]"
        framing, count, framed = make(), 0, make.frame(message)

        def trace(frame, event, argument):
            nonlocal count
            frame.f_trace_opcodes = True
            count += event == "opcode"
            return trace

        sys.settrace(trace)
        try:
            found = messages_of(framing, (framed[at:at + 10] for at in range(0, len(framed), 10)))
        finally:
            sys.settrace(None)
        assert found == ([message], None)
        return count

    assert steps(8000) < 2.5 * steps(4000)


@every_framing
def test_bytes_are_not_copied_again_and_again(make):
    """A megabyte in pieces of 100 bytes: what copied all each time would take minutes."""
    message = b'["' + b"x" * 2**20 + b'"]'
    framed = make.frame(message)
    assert messages_of(make(2**21), (framed[at:at + 100] for at in range(0, len(framed), 100))) == ([message], None)
    many = make.frame(b"[1]") * 100_000
    assert messages_of(make(), [many])[0] == [b"[1]"] * 100_000


def test_the_codec_and_the_framings_need_no_kernel():
    program = ("import flowcoro_rpc as r; f = r.Netstring(); f.receive_data(f.frame(r.encode_request('a', [1], 1)));"
               "print(r.read_message(f.next_message())[:3])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": os.path.dirname(flowcoro_rpc.__file__)})
    assert done.stdout == "('a', [1], 1)\n"
