"""The WebSocket codec: what it takes, what it refuses and with which code; the pieces that bytes come in make no difference.

The sections follow the categories of the Autobahn test suite.
"""

import importlib.util
import itertools
import os
import pathlib
import random
import time
import tracemalloc

import pytest

import flowcoro_websocket
from flowcoro_websocket import (CLOSED, NEED_DATA, Close, Deflate, LocalProtocolError, Piece, Ping, Pong, RemoteProtocolError,
                                WebSocketConnection, encode_message)

FIRST_SEED = int(os.environ.get("FLOWCORO_FIRST_SEED", 0))
SEEDS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("FLOWCORO_SEEDS", 30)))

FUZZ = pathlib.Path(__file__).parent / "fuzz" / "websocket_codec.py"
spec = importlib.util.spec_from_file_location("fuzz_websocket_codec", FUZZ)
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)

both_roles = pytest.mark.parametrize("role", ["server", "client"])


# ---- helpers -----------------------------------------------------------------------------------------------

def receive(connection, data=b""):
    """Give it the data; all events until it wants more, or is closed."""
    if data:
        connection.receive_data(data)
    events = []
    while (event := connection.next_event()) is not NEED_DATA and event is not CLOSED:
        events.append(event)
    return events


def other(role):
    return "client" if role == "server" else "server"


def frames(role, *parts):
    """Frames for this role: each (opcode, payload), and perhaps a dict for fuzz.frame()."""
    return b"".join(fuzz.frame(opcode, payload, role == "server", **dict(*more)) for opcode, payload, *more in parts)


PART = {"fin": False}


def outcome(role, data, **options):
    """The events of these bytes, the same however they come; they end with "need data", "closed" or ("error", code)."""
    results = [fuzz.events_of(role, pieces, **options) for pieces in fuzz.splits(data, random.Random(len(data)))]
    assert all(result == results[0] for result in results), results
    return results[0]


def code_of(role, data, **options):
    """The code with which this is refused as soon as it is there; None if it is taken."""
    last = outcome(role, data, **options)[-1]
    return last[1] if type(last) is tuple else None


def state(connection):
    return {name: getattr(connection, name) for cls in type(connection).__mro__ for name in getattr(cls, "__slots__", ())}


def refused(connection, send, *arguments):
    """The message of the LocalProtocolError; nothing has changed."""
    before = state(connection)
    with pytest.raises(LocalProtocolError) as caught:
        send(*arguments)
    assert state(connection) == before
    return str(caught.value)


# ---- 1: framing --------------------------------------------------------------------------------------------

@both_roles
@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 124, 125, 126, 127, 128, 1023, 1024, 1025, 65535, 65536, 65537, 2**20])
def test_a_message_of_any_size_arrives_as_it_was_sent(role, size):
    sender, receiver = WebSocketConnection(other(role)), WebSocketConnection(role)
    for message in ("\n" + "x" * size)[:size], bytes(range(256)) * (size // 256 + 1):
        message = message[:size]
        data = sender.send_message(message)
        head = 2 + (0 if size < 126 else 2 if size < 65536 else 8) + (4 if role == "server" else 0)
        assert len(data) == head + size
        for cuts in ([], [1], [3], [head], [len(data) // 2], [len(data) - 1], [head + 1, head + 2]):
            events = []
            for a, b in itertools.pairwise(sorted({0, *(at for at in cuts if 0 < at < len(data)), len(data)})):
                events += receive(receiver, data[a:b])
            assert events == [message] and type(events[0]) is type(message)


def test_the_bytes_are_those_of_the_examples_in_the_rfc():
    """RFC 6455 section 5.7."""
    server, client = WebSocketConnection("server"), WebSocketConnection("client")
    assert server.send_message("Hello") == encode_message("Hello") == b"\x81\x05Hello"
    assert receive(server, bytes.fromhex("818537fa213d7f9f4d5158")) == ["Hello"]
    assert server.send_piece("Hel", True, False) + server.send_piece("lo", False, True) == b"\x01\x03Hel\x80\x02lo"
    assert receive(client, b"\x01\x03Hel\x80\x02lo") == ["Hello"]
    assert server.send_ping(b"Hello") == b"\x89\x05Hello"
    assert receive(server, bytes.fromhex("8a8537fa213d7f9f4d5158")) == [Pong(b"Hello")]
    assert encode_message(bytes(256)) == b"\x82\x7e\x01\x00" + bytes(256)
    assert encode_message(bytes(65536)) == b"\x82\x7f\x00\x00\x00\x00\x00\x01\x00\x00" + bytes(65536)


def test_a_client_masks_each_frame_with_another_mask():
    client = WebSocketConnection("client")
    sent = [client.send_message(b"\0" * 8) for _ in range(600)]
    assert all(data[:2] == b"\x82\x88" and data[2:6] == data[6:10] == data[10:] for data in sent)
    assert len({data[2:6] for data in sent}) > 590


def test_a_forked_process_has_no_mask_of_its_parent():
    flowcoro_websocket._new_mask()
    assert flowcoro_websocket._masks
    pid = os.fork()
    if pid == 0:
        os._exit(len(flowcoro_websocket._masks))
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("size", [*range(12), 1022, 1023, 1024, 1025, 1026, 1027, 5000])
def test_masking_is_xor(size):
    chance = random.Random(size)
    data, mask = chance.randbytes(size), chance.randbytes(4)
    expected = bytes(byte ^ mask[n % 4] for n, byte in enumerate(data))
    assert bytes(flowcoro_websocket._masked(data, mask)) == bytes(flowcoro_websocket._masked(bytearray(data), mask)) == expected


@both_roles
def test_a_message_is_a_new_object_that_later_data_do_not_change(role):
    sender, receiver = WebSocketConnection(other(role)), WebSocketConnection(role)
    second = sender.send_message(b"second")
    buffer = bytearray(sender.send_message(b"first") + second[:4])
    receiver.receive_data(buffer)
    buffer[:] = bytes(len(buffer))
    message = receiver.next_event()
    assert receive(receiver, second[4:]) == [b"second"]
    assert message == b"first" and type(message) is bytes


# ---- 2: pings and pongs ------------------------------------------------------------------------------------

@both_roles
@pytest.mark.parametrize("payload", [b"", b"hello", b"\0\xff", b"x" * 125])
def test_a_ping_is_given_with_its_payload_and_a_pong_takes_it_back(role, payload):
    end, peer = WebSocketConnection(role), WebSocketConnection(other(role))
    assert receive(end, peer.send_ping(payload)) == [Ping(payload)]
    assert receive(peer, end.send_pong(bytearray(payload))) == [Pong(payload)]


@both_roles
def test_a_pong_that_nobody_asked_for_and_ten_pings_in_one_read_are_taken(role):
    assert outcome(role, frames(role, (10, b"so"), *[(9, b"%d" % n) for n in range(10)])) == [
        Pong(b"so"), *(Ping(b"%d" % n) for n in range(10)), "need data"]


@both_roles
def test_pings_and_pongs_have_125_bytes_at_most(role):
    assert code_of(role, frames(role, (9, b"x" * 126))) == 1002
    assert code_of(role, frames(role, (10, b"", {"form": 16}))) == 1002
    end = WebSocketConnection(role)
    assert "at most 125" in refused(end, end.send_ping, b"x" * 126)
    assert "at most 125" in refused(end, end.send_pong, b"x" * 126)
    with pytest.raises(TypeError):
        end.send_ping("text")
    with pytest.raises(TypeError):
        end.send_ping(5)


# ---- 3, 4: reserved bits, opcodes --------------------------------------------------------------------------

@both_roles
@pytest.mark.parametrize("opcode", [1, 2, 8, 9, 10])
@pytest.mark.parametrize("rsv", range(1, 8))
def test_a_reserved_bit_that_means_nothing_is_refused_and_what_was_before_it_delivered(role, opcode, rsv):
    assert outcome(role, frames(role, (1, b"before"), (opcode, b"", {"rsv": rsv}), (1, b"after"))) == ["before", ("error", 1002)]


@both_roles
@pytest.mark.parametrize("opcode", [3, 4, 5, 6, 7, 11, 12, 13, 14, 15])
@pytest.mark.parametrize("payload", [b"", b"some"])
def test_an_opcode_that_means_nothing_is_refused_by_its_first_byte(role, opcode, payload):
    data = frames(role, (opcode, payload))
    assert outcome(role, frames(role, (9, b"")) + data) == [Ping(), ("error", 1002)]
    assert code_of(role, data[:1]) == 1002


WRONG = {
    "a continuation, and nothing to continue": ([(0, b"x")], 1002),
    "the same, without FIN": ([(0, b"x", PART)], 1002),
    "a text inside of a text": ([(1, b"x", PART), (1, b"y")], 1002),
    "a binary inside of a text": ([(1, b"x", PART), (2, b"y")], 1002),
    "a ping in fragments": ([(9, b"x", PART)], 1002),
    "a pong in fragments": ([(10, b"x", PART)], 1002),
    "a close in fragments": ([(8, b"", PART)], 1002),
    "a close of 126 bytes": ([(8, b"\x03\xe8" + b"x" * 124)], 1002),
    "a close of one byte": ([(8, b"\x03")], 1002),
    "a close whose reason is no UTF-8": ([(8, b"\x03\xe8\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80")], 1007),
    "a close whose reason breaks off": ([(8, b"\x03\xe8\xe2\x82")], 1007),
    "0 bytes in 16 bits": ([(2, b"", {"form": 16})], 1002),
    "125 bytes in 16 bits": ([(2, b"x" * 125, {"form": 16})], 1002),
    "125 bytes in 64 bits": ([(2, b"x" * 125, {"form": 64})], 1002),
    "65535 bytes in 64 bits": ([(2, b"", {"form": 64, "claimed": 65535})], 1002),
    "a length with its highest bit": ([(2, b"", {"claimed": 2**63})], 1002),
    "a length of all bits": ([(2, b"", {"claimed": 2**64 - 1})], 1002),
    "the largest length": ([(2, b"", {"claimed": 2**63 - 1})], 1009),
    "a text that is no UTF-8": ([(1, b"\xff")], 1007),
    "a text that breaks off": ([(1, b"\xe2\x82")], 1007),
    "the same, in fragments": ([(1, b"\xe2", PART), (0, b"\x82", PART), (0, b"")], 1007),
}


@both_roles
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_with_its_code(role, name):
    parts, code = WRONG[name]
    assert outcome(role, frames(role, (9, b"before"), *parts)) == [Ping(b"before"), ("error", code)]


@both_roles
@pytest.mark.parametrize("opcode", [0, 1, 2, 8, 9, 10])
def test_a_client_masks_and_a_server_does_not(role, opcode):
    data = frames(role, (2, b"", PART)) if opcode == 0 else b""
    assert code_of(role, data + fuzz.frame(opcode, b"", role == "client")[:2]) == 1002


# ---- 5: fragmentation --------------------------------------------------------------------------------------

@both_roles
@pytest.mark.parametrize("opcode", [1, 2])
def test_fragments_make_one_message_with_control_frames_in_between(role, opcode):
    data = frames(role, (opcode, b"f", PART), (9, b"1"), (0, b"", PART), (10, b"2"), (9, b"3"), (0, b"ragment", PART), (0, b""))
    message = "fragment" if opcode == 1 else b"fragment"
    assert outcome(role, data) == [Ping(b"1"), Pong(b"2"), Ping(b"3"), message, "need data"]
    assert outcome(role, data * 2)[-2:] == [message, "need data"]


@both_roles
def test_a_flood_of_fragments_without_data_is_refused(role):
    most = flowcoro_websocket.MAX_EMPTY_FRAGMENTS
    for opcode in (1, 2):
        flood = [(opcode, b"", PART), *[(0, b"", PART)] * (most - 1)]
        assert outcome(role, frames(role, *flood, (0, b"x"))) == ["x" if opcode == 1 else b"x", "need data"]
        assert outcome(role, frames(role, *flood, (0, b"x", PART), *flood[1:], (0, b"")))[-1] == "need data"
        assert code_of(role, frames(role, *flood)) is None
        assert code_of(role, frames(role, *flood, (9, b""), (0, b"", PART))) == 1008
        end = WebSocketConnection(role)
        end.pieces = True
        with pytest.raises(RemoteProtocolError, match="100 fragments without data"):
            receive(end, frames(role, *flood, (0, b"", PART)))


# ---- 6: UTF-8 ----------------------------------------------------------------------------------------------

# Bytes that are right, and those that no UTF-8 can have after them: RFC 3629, and the table 3-7 of Unicode.
FIRST_BAD = [("", bytes([byte])) for byte in (*range(0x80, 0xc2), *range(0xf5, 0x100))]
FIRST_BAD += [("c2", b"\x7f"), ("c2", b"\xc0"), ("df", b"A"), ("e0", b"\x9f"), ("e0", b"\xc0"), ("e0a0", b"\x7f"),
              ("e1", b"\x7f"), ("ed", b"\xa0"), ("ed", b"\xbf"), ("ed", b"\xc0"), ("ed9f", b"\xc0"), ("ef", b"\x7f"),
              ("efbf", b"A"), ("f0", b"\x8f"),
              ("f0", b"\xc0"), ("f090", b"\x7f"), ("f09080", b"\xc0"), ("f4", b"\x90"), ("f4", b"\xbf"), ("f48f", b"A"),
              ("f48fbf", b"\x7f"), ("f1", b"\x7f"), ("f18080", b"A")]


@both_roles
def test_a_text_fails_at_the_first_byte_that_no_utf8_can_have_there_also_inside_of_a_frame(role):
    for begin, bad in FIRST_BAD:
        right = "κόσμε".encode() + bytes.fromhex(begin)
        for parts in ([(1, right + bad, {"claimed": 100})], [(1, right[:5], PART), (0, right[5:] + bad, {"claimed": 100})],
                      [(1, right, PART), (0, bad, {"claimed": 2})]):
            data, end = frames(role, *parts), WebSocketConnection(role)
            for n in range(len(data) - 1):
                assert receive(end, data[n:n + 1]) == []
            with pytest.raises(RemoteProtocolError) as caught:
                receive(end, data[-1:])
            assert caught.value.code == 1007 and "no UTF-8" in str(caught.value)
            assert code_of(role, data) == 1007


@both_roles
@pytest.mark.parametrize("text", ["", "\0", "\x7f\x80", "\u07ff\u0800", "\ud7ff\ue000\ufffd\ufffe\uffff",
                                  "\U00010000\U0010ffff", "Ω" * 40, "😀a€é"])
def test_what_is_utf8_is_taken_wherever_it_is_cut(role, text):
    data = text.encode()
    for at in range(len(data) + 1):
        assert outcome(role, frames(role, (1, data[:at], PART), (0, data[at:]))) == [text, "need data"]
    assert outcome(role, frames(role, (1, data))) == [text, "need data"]


@both_roles
def test_a_binary_message_may_have_any_bytes_and_a_reason_any_text(role):
    data = frames(role, (2, b"\xff\xfe"), (8, b"\x03\xe8" + "ä😀".encode()))
    assert outcome(role, data) == [b"\xff\xfe", Close(1000, "ä😀"), "closed"]


# ---- 7: close ----------------------------------------------------------------------------------------------

@both_roles
@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999])
def test_a_code_that_may_be_sent_arrives_and_is_echoed(role, code):
    end, peer = WebSocketConnection(role), WebSocketConnection(other(role))
    assert receive(end, peer.send_close(code, "x" * 123)) == [Close(code, "x" * 123)]
    assert (end.our_state, end.their_state, end.close_code, end.close_reason) == ("CLOSING", "CLOSED", code, "x" * 123)
    assert receive(peer, end.send_close(end.close_code, end.close_reason)) == [Close(code, "x" * 123)]
    assert {end.our_state, end.their_state, peer.our_state, peer.their_state} == {"CLOSED"}
    assert end.next_event() is peer.next_event() is CLOSED


@both_roles
@pytest.mark.parametrize("code", [0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 1999, 2000, 2999, 5000, 9999, 65535])
def test_a_code_that_may_not_be_sent_is_refused_both_ways(role, code):
    assert code_of(role, frames(role, (8, code.to_bytes(2, "big")))) == 1002
    end = WebSocketConnection(role)
    if code != 1005:
        assert f"{code}" in refused(end, end.send_close, code)
    assert "1000.0" in refused(end, end.send_close, 1000.0)
    assert "of 124 bytes; at most 123" in refused(end, end.send_close, 1000, "ä" * 62)


@both_roles
def test_a_close_without_a_code_is_1005_and_echoed_without_one(role):
    end, peer = WebSocketConnection(role), WebSocketConnection(other(role))
    assert receive(end, peer.send_close(1005)) == [Close()] == [Close(1005, "")]
    data = end.send_close(end.close_code, end.close_reason)
    assert data[0] == 0x88 and data[1] & 127 == 0
    assert "without a code" in refused(peer, peer.send_close, 1005, "reason")


@both_roles
def test_what_comes_after_a_close_is_dropped(role):
    end = WebSocketConnection(role)
    assert receive(end, frames(role, (1, b"begun", PART), (8, b""), (1, b"late"), (9, b""))) == [Close()]
    end.receive_data(b"\xff" * 1000)
    assert end.next_event() is CLOSED and end.next_event() is CLOSED
    assert end._buffer == b"" and end._message is None


@both_roles
def test_a_close_in_the_middle_of_a_message_is_a_normal_close(role):
    data = frames(role, (1, b"begun", PART), (8, b"\x03\xe8bye"))
    assert outcome(role, data) == [Close(1000, "bye"), "closed"]
    end = WebSocketConnection(role)
    end.pieces = True
    assert receive(end, data) == [Piece("begun", True, False), Close(1000, "bye")]
    sender, receiver = WebSocketConnection(other(role)), WebSocketConnection(role)
    assert receive(receiver, sender.send_piece(b"x", True, False) + sender.send_close(1001)) == [Close(1001, "")]


@both_roles
def test_after_our_close_nothing_is_sent_and_what_the_peer_had_sent_still_comes(role):
    end, peer = WebSocketConnection(role), WebSocketConnection(other(role))
    on_its_way = peer.send_message("late") + peer.send_ping(b"x")
    receive(peer, end.send_close(1001, "away"))
    assert (end.our_state, end.their_state) == ("CLOSED", "CLOSING")
    for send in ((end.send_message, "x"), (end.send_piece, "x", True, True), (end.send_ping,), (end.send_pong, b"x"),
                 (end.send_close,)):
        assert "our Close has been sent" in refused(end, *send)
    assert receive(end, on_its_way) == ["late", Ping(b"x")]
    assert receive(end, peer.send_close(1001, "away")) == [Close(1001, "away")]


@both_roles
def test_after_their_close_no_message_begins_but_one_under_way_is_finished(role):
    end, peer = WebSocketConnection(role), WebSocketConnection(other(role))
    begun = end.send_piece("a", True, False)
    receive(end, peer.send_close())
    assert receive(peer, begun + end.send_piece("b", False, True) + end.send_pong(b"p")) == ["ab", Pong(b"p")]
    assert "the peer is through (1000 )" in refused(end, end.send_message, "x")
    assert "the peer is through" in refused(end, end.send_piece, "x", True, False)
    assert receive(peer, end.send_close()) == [Close(1000, "")]


@both_roles
@pytest.mark.parametrize("parts", [[], [(1, b"part", PART)], [(1, b"part", {"claimed": 9})], [(9, b"p", {"claimed": 9})]])
def test_an_end_without_a_close_is_1006_also_in_the_middle_of_a_frame(role, parts):
    end = WebSocketConnection(role)
    assert receive(end, frames(role, (1, b"whole"), *parts)) == ["whole"]
    end.receive_end()
    assert end.next_event() is CLOSED and end.next_event() is CLOSED
    assert (end.our_state, end.their_state, end.close_code, end.close_reason) == ("CLOSING", "CLOSED", 1006, "")
    with pytest.raises(LocalProtocolError):
        end.receive_data(b"x")


def test_the_end_comes_after_what_was_received_before_it():
    end = WebSocketConnection("client")
    end.receive_data(frames("client", (1, b"a"), (1, b"b")))
    end.receive_end()
    assert [end.next_event() for _ in range(3)] == ["a", "b", CLOSED]


# ---- errors ------------------------------------------------------------------------------------------------

@both_roles
def test_the_answer_to_message_n_can_leave_before_the_connection_fails_on_the_next(role):
    end, peer = WebSocketConnection(role), WebSocketConnection(other(role))
    end.receive_data(frames(role, (1, b"one"), (2, b"two"), (1, b"\xff"), (1, b"never")))
    echoed = end.send_message(end.next_event()) + end.send_message(end.next_event())
    with pytest.raises(RemoteProtocolError) as caught:
        end.next_event()
    assert (end.our_state, end.their_state, end.close_code) == ("CLOSING", "FAILED", 1007)
    failure = end.send_failure()
    assert receive(peer, echoed + failure) == ["one", b"two", Close(1007, str(caught.value))]
    for _ in range(3):                      # and again, by the same error, which does not grow
        with pytest.raises(RemoteProtocolError) as again:
            end.next_event()
        assert again.value is caught.value and len(again.traceback) < 5
    end.receive_data(b"more")
    assert end._buffer == b"" and end.send_failure() == b"" and end.our_state == "CLOSED"


def test_the_reason_of_a_failure_fits_into_its_frame():
    end, peer = WebSocketConnection("server"), WebSocketConnection("client")
    with pytest.raises(RemoteProtocolError):
        receive(end, frames("server", (1, b"\xff")))
    end._error.args = ("ä" * 100,)
    assert receive(peer, end.send_failure()) == [Close(1007, "ä" * 61)]
    assert "without a RemoteProtocolError" in refused(peer, peer.send_failure)


def test_arguments_that_make_no_sense_are_refused():
    for arguments, named in (({"role": "proxy"}, "role='proxy'"), ({"max_message": -1}, "message=-1"), ({"max_frame": -5}, "-5")):
        with pytest.raises(ValueError, match=named):
            WebSocketConnection(**{"role": "server", **arguments})
    end = WebSocketConnection("server")
    for message in (5, None, ["x"], 1.5):
        with pytest.raises(TypeError, match="is no message: str for text"):
            end.send_message(message)
    assert "a surrogate" in refused(end, end.send_message, "ab\ud800")
    assert end.send_message(memoryview(b"abcd")[::2]) == b"\x82\x02ac" and end.send_message(bytearray(b"x")) == b"\x82\x01x"
    assert "without data" in refused(end, end.receive_data, b"")
    for data in (5, "text", None):
        with pytest.raises(TypeError):
            end.receive_data(data)


def test_pieces_are_sent_in_their_order_and_of_one_type():
    end = WebSocketConnection("server")
    assert "no message has begun" in refused(end, end.send_piece, "x", False, False)
    assert end.send_piece("a", True, False) == b"\x01\x01a"
    assert "another message is under way" in refused(end, end.send_message, "x")
    assert "another message is under way" in refused(end, end.send_piece, "x", True, False)
    assert "and not both" in refused(end, end.send_piece, b"x", False, False)
    assert end.send_ping() == b"\x89\x00"
    assert end.send_piece("", False, False) + end.send_piece("b", False, True) == b"\x00\x00\x80\x01b"
    assert end.send_piece(b"whole", True, True) == b"\x82\x05whole"
    assert "no message has begun" in refused(end, end.send_piece, "x", False, True)


# ---- 9: limits ---------------------------------------------------------------------------------------------

@both_roles
def test_a_message_that_is_too_long_is_refused_by_its_head(role):
    for opcode in (1, 2):
        assert outcome(role, frames(role, (opcode, b"x" * 100)), max_message=100)[-1] == "need data"
        data = frames(role, (opcode, b"", {"claimed": 101}))
        assert code_of(role, data[:len(data) - (4 if role == "server" else 0)], max_message=100) == 1009
        parts = [(opcode, b"x" * 60, PART), (9, b""), (0, b"x" * 40, PART)]
        assert code_of(role, frames(role, *parts, (0, b"")), max_message=100) is None
        assert code_of(role, frames(role, *parts, (0, b"", {"claimed": 1})), max_message=100) == 1009
    assert code_of(role, frames(role, (2, b"")), max_message=0) is None
    assert code_of(role, frames(role, (2, b"x")), max_message=0) == 1009


@both_roles
def test_a_frame_can_be_limited_by_itself_also_where_pieces_are_asked_for(role):
    assert code_of(role, frames(role, (2, b"x" * 50, PART), (0, b"x" * 50)), max_frame=50) is None
    assert code_of(role, frames(role, (2, b"x" * 51)), max_frame=50) == 1009
    assert code_of(role, frames(role, (2, b"x" * 51)), max_frame=50, ask_for_pieces=True) == 1009
    assert code_of(role, frames(role, (9, b"x" * 51)), max_frame=50) is None


@both_roles
def test_the_limit_can_be_changed(role):
    end = WebSocketConnection(role, max_frame=30)
    for most, taken in ((5, 5), (20, 20), (100, 30)):
        end.max_message = most
        assert receive(end, frames(role, (2, b"x" * taken))) == [b"x" * taken] and end.max_message == most
    with pytest.raises(RemoteProtocolError, match=r"31 bytes; 30 are allowed \(max_frame=\)"):
        receive(end, frames(role, (2, b"x" * 31)))


def held_at_most(role, data, piece):
    """Bytes that were allocated at most while the data came in such pieces, and the last event."""
    end = WebSocketConnection(role)
    tracemalloc.start()
    try:
        for at in range(0, len(data), piece):
            end.receive_data(data[at:at + piece])
            event = end.next_event()
        return tracemalloc.get_traced_memory()[1], event
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("opcode, payload", [(1, b"ab"), (1, "é".encode()), (2, b"ab")])
@pytest.mark.parametrize("fragment", [None, 2])
def test_a_message_in_small_pieces_holds_about_twice_its_size(opcode, payload, fragment):
    size = 2**16
    if fragment is None:
        data = frames("client", (opcode, payload * (size // 2)))
    else:
        data = frames("client", (opcode, payload, PART), *[(0, payload, PART)] * (size // 2 - 2), (0, payload))
    held, event = held_at_most("client", data, 3)
    assert event is NEED_DATA or len(event) == (size if payload == b"ab" or opcode == 2 else size // 2)
    assert held < 4 * size + 20_000


def test_what_has_been_read_is_not_kept():
    end, data = WebSocketConnection("server"), frames("server", (2, b"x" * 100)) * 500
    for at in range(0, len(data), 1077):                # which always cuts a frame's head, or its payload
        receive(end, data[at:at + 1077])
        assert len(end._buffer) <= 1077 + 6
    assert end._buffer == b""


def spent(role, data, piece):
    """Processor seconds for all events of data in pieces of this size, the best of three."""
    best = float("inf")
    for _ in range(3):
        end, begin = WebSocketConnection(role, max_message=2**30), time.process_time()
        for at in range(0, len(data), piece):
            end.receive_data(data[at:at + piece])
            while end.next_event() is not NEED_DATA:
                pass
        best = min(best, time.process_time() - begin)
    return best


GROWING = {
    "a text": lambda n: [(1, b"x" * n)],
    "a text of long characters": lambda n: [(1, "😀".encode() * (n // 4))],
    "a binary": lambda n: [(2, b"x" * n)],
    "fragments of one byte": lambda n: [(1, b"x", PART), *[(0, b"x", PART)] * n, (0, b"")],
    "small messages": lambda n: [(1, b"x")] * n,
    "pings": lambda n: [(9, b"x")] * n,
}


@pytest.mark.parametrize("piece", [1, 1000, 2**30])
@pytest.mark.parametrize("name", GROWING)
def test_eight_times_as_much_takes_about_eight_times_as_long(name, piece):
    """What is quadratic takes 64 times as long; 30 is between."""
    size = 1000 if piece == 1 else 4000
    once, more = (frames("server", *GROWING[name](n)) for n in (size, 8 * size))
    assert spent("server", more, piece) < 30 * max(spent("server", once, piece), 0.0005)


# ---- pieces ------------------------------------------------------------------------------------------------

@both_roles
def test_pieces_come_as_their_data_do_and_text_is_not_cut_inside_a_character(role):
    end = WebSocketConnection(role, max_message=3)
    end.pieces = True
    data = frames(role, (1, "aé€😀".encode() * 3))
    head = len(data) - 30
    assert receive(end, data[:head]) == []
    assert receive(end, data[head:head + 2]) == [Piece("a", True, False)]
    assert receive(end, data[head + 2:head + 3]) == [Piece("é", False, False)]
    assert receive(end, data[head + 3:head + 5]) == []
    assert receive(end, data[head + 5:-3]) == [Piece("€😀aé€😀aé€", False, False)]
    assert receive(end, data[-3:]) == [Piece("😀", False, True)]
    assert receive(end, frames(role, (2, b"ab", PART), (9, b""), (0, b"", PART), (0, b"cd"))) == [
        Piece(b"ab", True, False), Ping(), Piece(b"cd", False, True)]
    assert receive(end, frames(role, (2, b"", PART), (0, b""), (1, b""))) == [Piece(b"", True, True), Piece("", True, True)]
    assert receive(end, frames(role, (2, b"x", PART), (0, b""))) == [Piece(b"x", True, False), Piece(b"", False, True)]


@both_roles
def test_whether_a_message_comes_in_pieces_is_looked_at_where_it_begins(role):
    end = WebSocketConnection(role)
    assert receive(end, frames(role, (1, b"a", PART))) == []
    end.pieces = True
    assert receive(end, frames(role, (0, b"b"))) == ["ab"]
    assert receive(end, frames(role, (1, b"a", PART))) == [Piece("a", True, False)]
    end.pieces = False
    assert receive(end, frames(role, (0, b"b"), (1, b"c"))) == [Piece("b", False, True), "c"]


@both_roles
def test_what_is_right_of_a_text_comes_as_a_piece_before_it_fails(role):
    end = WebSocketConnection(role)
    end.pieces = True
    end.receive_data(frames(role, (1, b"right\xff and more"), (9, b"")))
    assert end.next_event() == Piece("right", True, False)
    with pytest.raises(RemoteProtocolError) as caught:
        end.next_event()
    assert caught.value.code == 1007


# ---- the table of states -----------------------------------------------------------------------------------

def test_every_state_is_reached_and_each_pair_of_the_table_leads_to_one():
    for whose, table in flowcoro_websocket._TRANSITIONS.items():
        assert {after for moves in table.values() for after in moves.values()} == set(table), whose


def reached(ours, theirs, role="server"):
    """A connection in these states, or None if no way leads there."""
    end, peer = WebSocketConnection(role), WebSocketConnection(other(role))
    their_way = {"OPEN": b"", "CLOSED": frames(role, (8, b"")), "FAILED": frames(role, (3, b"")), "CLOSING": b""}[theirs]
    try:
        if their_way:
            receive(end, their_way)
    except RemoteProtocolError:
        pass
    if ours == "CLOSED":
        end.send_close()
    return (end, peer) if (end.our_state, end.their_state) == (ours, theirs) else None


PAIRS = {("OPEN", "OPEN"), ("CLOSING", "CLOSED"), ("CLOSING", "FAILED"), ("CLOSED", "CLOSING"), ("CLOSED", "CLOSED"),
         ("CLOSED", "FAILED")}

# What we do, and what becomes of our state; None: it is refused. What the peer does, and what becomes of its state.
OUR_EVENTS = {
    "message": (lambda end: end.send_message("x"), {"OPEN": "OPEN"}),
    "first piece": (lambda end: end.send_piece("x", True, False), {"OPEN": "OPEN"}),
    "ping": (lambda end: end.send_ping(), {"OPEN": "OPEN", "CLOSING": "CLOSING"}),
    "pong": (lambda end: end.send_pong(), {"OPEN": "OPEN", "CLOSING": "CLOSING"}),
    "close": (lambda end: end.send_close(), {"OPEN": "CLOSED", "CLOSING": "CLOSED"}),
}
THEIR_EVENTS = {
    "message": ((1, b"x"), {"OPEN": "OPEN", "CLOSING": "CLOSING"}),
    "piece": ((1, b"x", PART), {"OPEN": "OPEN", "CLOSING": "CLOSING"}),
    "ping": ((9, b""), {"OPEN": "OPEN", "CLOSING": "CLOSING"}), "close": ((8, b""), {"OPEN": "CLOSED", "CLOSING": "CLOSED"}),
    "error": ((3, b""), {"OPEN": "FAILED", "CLOSING": "FAILED"}), "end": (None, {"OPEN": "CLOSED", "CLOSING": "CLOSED"}),
}


@pytest.mark.parametrize("ours", ["OPEN", "CLOSING", "CLOSED"])
@pytest.mark.parametrize("theirs", ["OPEN", "CLOSING", "CLOSED", "FAILED"])
def test_each_event_in_each_pair_of_states_does_what_the_table_says(ours, theirs):
    assert (reached(ours, theirs) is not None) == ((ours, theirs) in PAIRS)
    if (ours, theirs) not in PAIRS:
        return
    for name, (do, after) in OUR_EVENTS.items():
        end, _ = reached(ours, theirs)
        if ours in after:
            assert type(do(end)) is bytes and end.our_state == after[ours], name
            assert end.their_state == ("CLOSING" if name == "close" and theirs == "OPEN" else theirs)
        else:
            refused(end, do, end)
    for name, (part, after) in THEIR_EVENTS.items():
        end, _ = reached(ours, theirs)
        try:
            if part is None:
                end.receive_end()
                receive(end)
            else:
                receive(end, frames("server", part))
        except RemoteProtocolError:
            assert name == "error" or theirs == "FAILED"
        assert end.their_state == after.get(theirs, theirs), name
        through = end.their_state in ("CLOSED", "FAILED")
        assert end.our_state == ("CLOSING" if through and ours == "OPEN" else ours)


# ---- 10, and properties ------------------------------------------------------------------------------------

def random_message(chance):
    size = chance.choice([0, 1, 5, 100, 126, 1000, 1500, 5000, 70_000])
    if chance.random() < 0.5:
        return chance.randbytes(size) if chance.random() < 0.5 else b"again " * (size // 6)
    return "".join(chance.choices("aé€😀\n ", k=size // 2))


def random_pieces(chance, message):
    cuts = sorted(chance.randrange(len(message) + 1) for _ in range(chance.choice([0, 0, 1, 2, 6])))
    return [message[a:b] for a, b in itertools.pairwise([0, *cuts, len(message)])]


def random_deflate(chance):
    return chance.choice([None, Deflate(*(chance.choice([8, 9, 10, 12, 15]) for _ in range(2)), chance.random() < 0.5,
                                        chance.random() < 0.5, chance.choice([0, 1, 100, 1024]))])


@pytest.mark.parametrize("seed", SEEDS)
def test_any_split_any_fragmentation_and_any_compression_give_the_same_messages(seed):
    print(f"seed {seed}")
    chance = random.Random(seed)
    deflate = random_deflate(chance)
    ends = WebSocketConnection("client", deflate=deflate), WebSocketConnection("server", deflate=deflate)
    for sender, receiver in (ends, ends[::-1]):
        receiver.pieces = chance.random() < 0.3
        expected, data = [], b""
        for _ in range(chance.randint(1, 8)):
            message = random_message(chance)
            if chance.random() < 0.4:
                data += sender.send_message(message)
            else:
                pieces = random_pieces(chance, message)
                for n, piece in enumerate(pieces):
                    data += sender.send_piece(piece, n == 0, n == len(pieces) - 1)
                    if chance.random() < 0.2:
                        data += sender.send_ping(b"between")
            expected.append(message)
        events, at = [], 0
        while at < len(data):
            step = chance.choice([1, 2, 10, 1000, 65536])
            events += receiver_events(receiver, data[at:at + step])
            at += step
        found = [event for event in fuzz.merged(events) if event != Ping(b"between")]
        assert found == expected and [type(message) for message in found] == [type(message) for message in expected]
    assert receive(ends[0], ends[1].send_close(1001, "end")) == [Close(1001, "end")]


def receiver_events(receiver, data):
    events = receive(receiver, data)
    assert all(len(event.data) <= max(len(data), flowcoro_websocket.INFLATED_PIECE) for event in events if type(event) is Piece)
    return events


STEPS = [lambda end, chance: end.send_message(random_message(chance)), lambda end, chance: end.send_ping(b"p"),
         lambda end, chance: end.send_pong(b"p"), lambda end, chance: end.send_close(1000, "r"),
         lambda end, chance: end.send_failure(), lambda end, chance: end.send_piece(
             chance.choice(["a", b"a"]), chance.random() < 0.4, chance.random() < 0.4)]


@pytest.mark.parametrize("seed", SEEDS)
def test_two_ends_that_do_anything_raise_local_errors_alone_and_understand_each_other(seed):
    """Whatever one end is let send, the other takes."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    deflate = random_deflate(chance)
    ends = WebSocketConnection("client", deflate=deflate), WebSocketConnection("server", deflate=deflate)
    on_its_way = {end: b"" for end in ends}
    for _ in range(80):
        end, peer = chance.choice([ends, ends[::-1]])
        end.pieces = chance.random() < 0.3
        if chance.random() < 0.4 and on_its_way[end]:
            size = chance.randint(1, len(on_its_way[end]))
            receive(end, on_its_way[end][:size])
            on_its_way[end] = on_its_way[end][size:]
            continue
        before = state(end)
        step = chance.choices(STEPS, [6, 3, 3, 0.3, 1, 9])[0]
        try:
            on_its_way[peer] += step(end, chance)
        except LocalProtocolError:
            assert state(end) == before
    for end, peer in (ends, ends[::-1]):
        if end.our_state != "CLOSED":
            on_its_way[peer] += end.send_close()
    for end in ends:
        assert receive(end, on_its_way[end])[-1:] == [Close(end.close_code, end.close_reason)] or end.their_state == "CLOSED"
        assert (end.our_state, end.their_state) == ("CLOSED", "CLOSED")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_second_reader_of_the_rfc_makes_the_same_of_frames_right_and_wrong(seed):
    print(f"seed {seed}")
    for n in range(40):
        fuzz.run(seed * 1000 + n)
