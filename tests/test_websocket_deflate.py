"""permessage-deflate: what is agreed upon, what is compressed and how far, and that no bomb goes off.

Categories 12 and 13 of the Autobahn test suite, and what it does not have.
"""

import random
import tracemalloc
import zlib

import pytest

import flowcoro_websocket
from flowcoro_websocket import Close, Deflate, HandshakeError, Piece, Ping, RemoteProtocolError, WebSocketConnection
from test_websocket_codec import PART, both_roles, code_of, frames, other, outcome, receive

TAIL = b"\x00\x00\xff\xff"
ALL = Deflate(15, 15, threshold=0)
PACKED = {"rsv": 4}


def pack(data, flush=zlib.Z_SYNC_FLUSH, bits=15):
    deflater = zlib.compressobj(9, zlib.DEFLATED, -bits)
    return (deflater.compress(data) + deflater.flush(flush)).removesuffix(TAIL)


def packed(role, data, opcode=2, **how):
    return frames(role, (opcode, data, PACKED | how))


# ---- the agreement -----------------------------------------------------------------------------------------

AGREED = [
    # what we allow, what is offered -> (server bits, client bits, server anew, client anew), the answer
    (Deflate(15, 15), "permessage-deflate", (15, 15, False, False), "permessage-deflate"),
    (Deflate(15, 15), "permessage-deflate; client_max_window_bits", (15, 15, False, False), "permessage-deflate"),
    (Deflate(), "permessage-deflate; client_max_window_bits", (12, 12, False, False),
     "permessage-deflate; server_max_window_bits=12; client_max_window_bits=12"),
    (Deflate(), "permessage-deflate", (12, 15, False, False), "permessage-deflate; server_max_window_bits=12"),
    (Deflate(), "permessage-deflate; client_max_window_bits=10; server_max_window_bits=9", (9, 10, False, False),
     "permessage-deflate; server_max_window_bits=9; client_max_window_bits=10"),
    (Deflate(15, 15), "permessage-deflate; server_max_window_bits=15", (15, 15, False, False),
     "permessage-deflate; server_max_window_bits=15"),
    (Deflate(15, 15), "permessage-deflate; server_max_window_bits=8; client_max_window_bits=8", (8, 8, False, False),
     "permessage-deflate; server_max_window_bits=8; client_max_window_bits=8"),
    (Deflate(15, 15), "permessage-deflate; server_no_context_takeover", (15, 15, True, False),
     "permessage-deflate; server_no_context_takeover"),
    (Deflate(15, 15), "permessage-deflate; client_no_context_takeover", (15, 15, False, True),
     "permessage-deflate; client_no_context_takeover"),
    (Deflate(15, 15, True, True), "permessage-deflate", (15, 15, True, True),
     "permessage-deflate; server_no_context_takeover; client_no_context_takeover"),
    (Deflate(15, 15), 'permessage-deflate; client_max_window_bits="9"', (15, 9, False, False),
     "permessage-deflate; client_max_window_bits=9"),
    (Deflate(15, 15), " , x-webkit-deflate-frame , foo;bar=\"x\";baz,\tpermessage-deflate ;server_max_window_bits = 11,",
     (11, 15, False, False), "permessage-deflate; server_max_window_bits=11"),
    (Deflate(15, 15), "permessage-deflate; server_max_window_bits=7, permessage-deflate; server_max_window_bits=10, "
     "permessage-deflate", (10, 15, False, False), "permessage-deflate; server_max_window_bits=10"),
]


@pytest.mark.parametrize("ours, offers, agreed, answer", AGREED)
def test_a_server_takes_the_first_offer_it_can_and_what_both_allow(ours, offers, agreed, answer):
    deflate, said = ours.negotiate(offers)
    assert said == answer and deflate.threshold == ours.threshold
    assert (deflate.server_max_window_bits, deflate.client_max_window_bits, deflate.server_no_context_takeover,
            deflate.client_no_context_takeover) == agreed
    if "client_max_window_bits" not in said or "client_max_window_bits" in offers:
        theirs = Deflate(15, 15).check_answer(said)
        assert theirs == Deflate(*agreed)


BAD_PARAMETERS = ["unknown", "unknown=1", "server_max_window_bits", "server_max_window_bits=7", "server_max_window_bits=16",
                  "server_max_window_bits=09", "server_max_window_bits=+9", "server_max_window_bits=9.0",
                  "client_max_window_bits=7", "client_max_window_bits=16", "client_max_window_bits=x",
                  "server_no_context_takeover=1", "server_no_context_takeover=true",
                  "client_no_context_takeover=0", "server_no_context_takeover; server_no_context_takeover",
                  "server_max_window_bits=10; server_max_window_bits=10", "client_max_window_bits; client_max_window_bits=9",
                  "Server_max_window_bits=9", "client_max_window_bits=\"1\""]


@pytest.mark.parametrize("parameter", BAD_PARAMETERS)
def test_parameters_that_make_no_sense_are_declined_by_a_server_and_refused_by_a_client(parameter):
    assert ALL.negotiate(f"permessage-deflate; {parameter}") == (None, "")
    assert ALL.negotiate(f"permessage-deflate; {parameter}, permessage-deflate")[1] == "permessage-deflate"
    with pytest.raises(HandshakeError, match="Sec-WebSocket-Extensions"):
        ALL.check_answer(f"permessage-deflate; {parameter}")


@pytest.mark.parametrize("text", ["permessage-deflate;", "permessage-deflate; a=", "; a", "permessage-deflate a", "a=b",
                                  "x; y=\"a b\"", "x; y=\"", "x; y=\"\"", "x y, z", "permessage-deflate; a=\"b\\c\"", "\xe4",
                                  "x;;y", "x/y", "permessage-deflate\x0b"])
def test_what_is_no_list_of_extensions_is_refused(text):
    with pytest.raises(HandshakeError, match="no list of them") as caught:
        ALL.negotiate(text)
    assert caught.value.status == 400
    with pytest.raises(HandshakeError, match="no list of them"):
        ALL.check_answer(text)


def test_a_list_of_extensions_is_read_in_linear_time():
    for text in (" " * 10**5, "," * 10**5, "a" * 10**5 + "\0", "a; " * 10**5, "a;b" * 30000 + "\0", 'a;b="' + "c" * 10**5):
        try:
            ALL.negotiate(text)
        except HandshakeError:
            pass


@pytest.mark.parametrize("answer", ["foo", "permessage-deflate, permessage-deflate", "permessage-deflate, foo",
                                    "permessage-deflate; client_max_window_bits",
                                    "permessage-deflate; client_max_window_bits=13"])
def test_a_client_refuses_what_it_has_not_offered(answer):
    with pytest.raises(HandshakeError, match="the server's Sec-WebSocket-Extensions"):
        Deflate(15, 12).check_answer(answer)


def test_a_client_offers_its_wishes_and_the_same_without_them():
    assert ALL.offer() == "permessage-deflate; client_max_window_bits"
    assert Deflate().offer() == ("permessage-deflate; client_max_window_bits=12; server_max_window_bits=12, "
                                 "permessage-deflate; client_max_window_bits=12")
    assert Deflate(15, 9, True, True).offer() == (
        "permessage-deflate; client_max_window_bits=9; client_no_context_takeover; server_no_context_takeover, "
        "permessage-deflate; client_max_window_bits=9; client_no_context_takeover")
    assert Deflate().check_answer("") is None
    assert Deflate(threshold=5).check_answer("permessage-deflate") == Deflate(15, 12, threshold=5)
    assert Deflate(9, 12).check_answer("permessage-deflate; client_max_window_bits=9; server_no_context_takeover") == Deflate(
        15, 9, True, False)


@pytest.mark.parametrize("seed", range(40))
def test_what_a_client_offers_and_a_server_answers_is_the_same_agreement(seed):
    print(f"seed {seed}")
    chance = random.Random(seed)
    mine, yours = (Deflate(chance.randint(8, 15), chance.randint(8, 15), chance.random() < 0.5, chance.random() < 0.5, 0)
                   for _ in range(2))
    at_the_server, answer = yours.negotiate(mine.offer())
    at_the_client = mine.check_answer(answer)
    assert at_the_server == at_the_client
    assert at_the_client.server_max_window_bits == min(mine.server_max_window_bits, yours.server_max_window_bits)
    assert at_the_client.client_max_window_bits == min(mine.client_max_window_bits, yours.client_max_window_bits)
    assert at_the_client.server_no_context_takeover == (mine.server_no_context_takeover or yours.server_no_context_takeover)


def test_bits_and_thresholds_that_are_none_are_refused():
    for arguments in ({"server_max_window_bits": 7}, {"client_max_window_bits": 16}, {"server_max_window_bits": None},
                      {"client_max_window_bits": 9.0}, {"threshold": -1}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Deflate(**arguments)
    with pytest.raises(AttributeError):
        Deflate().threshold = 5


# ---- what is sent ------------------------------------------------------------------------------------------

@both_roles
@pytest.mark.parametrize("bits", range(8, 16))
@pytest.mark.parametrize("anew", [False, True])
def test_what_is_sent_keeps_to_the_window_and_to_the_context(role, bits, anew):
    """zlib itself reads it, with the window that was agreed."""
    deflate = Deflate(bits, bits, anew, anew, threshold=0)
    sender, receiver = WebSocketConnection(other(role), deflate=deflate), WebSocketConnection(role, deflate=deflate)
    chance, inflater = random.Random(bits), None
    block = chance.randbytes(300)
    for message in (block * 100, "text " * 500, block * 2, chance.randbytes(5000), block):
        data = sender.send_message(message)
        assert receive(receiver, data) == [message]
        payload = unframed(data, role)
        if bits == 8:
            assert not data[0] & 0x40
            continue
        assert data[0] & 0x40
        if anew or inflater is None:
            inflater = zlib.decompressobj(-bits)
        plain = message.encode() if type(message) is str else message
        assert inflater.decompress(payload + TAIL) == plain


def unframed(data, role):
    """The payload of one frame that this role receives."""
    start = 2 + {126: 2, 127: 8}.get(data[1] & 127, 0)
    if role == "client":
        return data[start:]
    return bytes(byte ^ data[start + n % 4] for n, byte in enumerate(data[start + 4:]))


def test_context_is_taken_over_where_it_may_be():
    for deflate, taken in ((Deflate(threshold=0), True), (Deflate(12, 12, True, True, 0), False)):
        for role in ("server", "client"):
            end = WebSocketConnection(role, deflate=deflate)
            message = random.Random(1).randbytes(500)
            first, second = len(end.send_message(message)), len(end.send_message(message))
            assert (second < first // 4) == taken


def test_small_messages_empty_ones_and_control_frames_are_not_compressed():
    end = WebSocketConnection("server", deflate=Deflate(threshold=10))
    assert [end.send_message(message)[0] for message in ("x" * 9, b"x" * 9, "x" * 10, b"x" * 10)] == [0x81, 0x82, 0xc1, 0xc2]
    assert [end.send_ping()[0], end.send_pong()[0], end.send_close()[0]] == [0x89, 0x8a, 0x88]
    assert WebSocketConnection("server", deflate=ALL).send_message("") == b"\x81\x00"


@both_roles
def test_pieces_are_compressed_and_each_can_be_read_when_it_has_come(role):
    for deflate in (ALL, Deflate(12, 12, True, True, 0)):
        sender, receiver = WebSocketConnection(other(role), deflate=deflate), WebSocketConnection(role, deflate=deflate)
        for _ in range(2):
            receiver.pieces = True
            events = []
            for n, piece in enumerate(["one", "two ä", "", "three", ""]):
                events.append(receive(receiver, sender.send_piece(piece, n == 0, n == 4)))
            assert events == [[Piece("one", True, False)], [Piece("two ä", False, False)], [], [Piece("three", False, False)],
                              [Piece("", False, True)]]
            receiver.pieces = False
            assert receive(receiver, sender.send_message("x" * 2000)) == ["x" * 2000]


def test_what_is_kept_between_messages_is_nothing_before_the_first_and_where_no_takeover_was_agreed():
    for deflate, kept in ((Deflate(threshold=0), True), (Deflate(12, 12, True, True, 0), False)):
        end, peer = WebSocketConnection("server", deflate=deflate), WebSocketConnection("client", deflate=deflate)
        assert end._inflater._zlib is end._compressor._zlib is None
        receive(end, peer.send_message("hello"))
        end.send_message("hello")
        assert [end._inflater._zlib is not None, end._compressor._zlib is not None] == [kept, kept]


# ---- what is received --------------------------------------------------------------------------------------

@both_roles
def test_the_examples_of_the_rfc_are_read(role):
    """RFC 7692 section 7.2.3: one block, sharing the window, no compression, BFINAL, two blocks, an empty message."""
    hello = bytes.fromhex("f248cdc9c90700")
    for payloads, messages in (
            ([hello], ["Hello"]), ([hello, bytes.fromhex("f200110000")], ["Hello", "Hello"]),
            ([bytes.fromhex("000500faff48656c6c6f00")], ["Hello"]), ([bytes.fromhex("f348cdc9c9070000")], ["Hello"]),
            ([bytes.fromhex("f24805000000ffffcac9c90700")], ["Hello"]), ([b"\x00"], [""]), ([b"\x02\x00"], [""]),
            ([bytes.fromhex("f348cdc9c9070000"), hello], ["Hello", "Hello"])):
        data = b"".join(packed(role, payload, 1) for payload in payloads)
        assert outcome(role, data, deflate=ALL) == [*messages, "need data"]
    parts = frames(role, (1, hello[:3], PACKED | PART), (9, b""), (0, hello[3:]))
    assert outcome(role, parts, deflate=ALL) == [Ping(), "Hello", "need data"]


@both_roles
def test_compressed_and_other_messages_may_alternate_and_fragments_be_empty(role):
    data = pack(b"text " * 100)
    parts = [(1, b"", PACKED | PART), (0, data[:2], PART), (0, b"", PART), (0, data[2:], PART), (0, b"")]
    assert outcome(role, frames(role, (1, b"plain"), *parts, (2, b"\xff")), deflate=ALL) == [
        "plain", "text " * 100, b"\xff", "need data"]


@both_roles
@pytest.mark.parametrize("parts", [[(0, b"", {"rsv": 4})], [(1, b"", PART), (0, b"", {"rsv": 4})], [(9, b"", {"rsv": 4})],
                                   [(8, b"", {"rsv": 4})], [(1, b"\0", {"rsv": 6})], [(1, b"\0", {"rsv": 5})]])
def test_the_bit_of_compression_is_refused_but_where_a_message_begins(role, parts):
    assert code_of(role, frames(role, *parts), deflate=ALL) == 1002


@both_roles
def test_it_is_refused_where_nothing_was_agreed(role):
    assert code_of(role, packed(role, pack(b"x"))) == 1002


WRONG = {
    "corrupt at once": b"\xff\xff\xff", "a block of a type that there is not": b"\x06", "nothing at all": b"",
    "a distance beyond the beginning": b"\x02\x13\x00\x00", "it breaks off in a block": pack(b"hello hello hello")[:-3],
    "its tail was not taken off": pack(b"x") + TAIL,
    "a last block, and nothing after it": pack(b"x", zlib.Z_FINISH), "two last blocks": pack(b"x", zlib.Z_FINISH) * 2 + b"\0",
    "it breaks off in a stored block": b"\x00\x05\x00\xfa\xffHel",
}


@both_roles
@pytest.mark.parametrize("name", WRONG)
def test_corrupt_data_are_1007(role, name):
    for anew in (False, True):
        data = frames(role, (9, b"")) + packed(role, WRONG[name])
        assert outcome(role, data, deflate=Deflate(15, 15, anew, anew)) == [Ping(), ("error", 1007)]


@both_roles
def test_what_refers_beyond_the_agreed_window_is_refused(role):
    block = random.Random(1).randbytes(1000)
    payload = pack(block * 2)
    assert len(payload) < 1100
    data = packed(role, payload)
    for bits, error in ((15, None), (10, None), (9, 1007)):
        end = WebSocketConnection(role, deflate=Deflate(bits, bits))
        try:
            for n in range(len(data)):                  # zlib forgets between two calls
                receive(end, data[n:n + 1])
            code = None
        except RemoteProtocolError as caught:
            code = caught.code
        assert code == error


@both_roles
def test_a_text_is_checked_as_it_is_inflated(role):
    data = packed(role, pack(b"right \xed\xa0\x80 and more" * 9), 1)
    assert code_of(role, data, deflate=ALL) == 1007
    deflater = zlib.compressobj(wbits=-15)
    begun = deflater.compress(b"right\xff") + deflater.flush(zlib.Z_SYNC_FLUSH)
    assert code_of(role, packed(role, begun, 1, claimed=1000), deflate=ALL) == 1007


@both_roles
def test_a_last_block_in_each_fragment_is_taken_and_a_thousand_in_one_are_not(role):
    last = pack(b"some ", zlib.Z_FINISH)
    parts = [(1, last, PACKED | PART), *[(0, last, PART)] * 30, (0, b"\0")]
    assert outcome(role, frames(role, *parts), deflate=ALL) == ["some " * 31, "need data"]
    assert code_of(role, packed(role, b"\x03\x00" * 1000 + b"\0"), deflate=ALL) == 1007


@both_roles
def test_a_limit_that_is_lowered_in_the_middle_of_a_message_holds_from_then_on(role):
    end, data = WebSocketConnection(role, deflate=ALL), pack(random.Random(1).randbytes(3000))
    receive(end, frames(role, (2, data[:2000], PACKED | PART)))
    end.max_message = 900
    with pytest.raises(RemoteProtocolError, match="more than 900 bytes"):
        receive(end, frames(role, (0, data[2000:])))


# ---- bombs -------------------------------------------------------------------------------------------------

def bomb(size):
    """What inflates to so many zeros."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join(deflater.compress(bytes(2**20)) for _ in range(size // 2**20)) + deflater.flush(zlib.Z_SYNC_FLUSH)[:-4]


@both_roles
@pytest.mark.parametrize("opcode", [1, 2])
@pytest.mark.parametrize("claimed", [None, 10**6])
def test_a_bomb_is_1009_before_more_than_a_message_of_it_is_inflated(role, opcode, claimed):
    """64 MiB in 64 KiB: capped while it is inflated, whether its frame is complete or not."""
    data = packed(role, bomb(64 * 2**20), opcode, claimed=claimed)
    end = WebSocketConnection(role, deflate=ALL, max_message=2**18)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match=r"more than 262144 bytes once inflated \(max_message=\)") as caught:
            receive(end, data)
        assert caught.value.code == 1009 and tracemalloc.get_traced_memory()[1] < 6 * 2**18
    finally:
        tracemalloc.stop()


@both_roles
def test_the_cap_is_exact_over_all_fragments(role):
    for size, code in ((1000, None), (1001, 1009), (5000, 1009)):
        data = pack(b"a" * size)
        assert code_of(role, packed(role, data, 1), deflate=ALL, max_message=1000) == code
        half = len(data) // 2
        parts = [(2, data[:half], PACKED | PART), (0, data[half:])]
        assert code_of(role, frames(role, *parts), deflate=ALL, max_message=1000) == code
    for size, code in ((9, 1007), (10, 1009)):          # what is first in the message counts
        assert code_of(role, packed(role, pack(b"a" * size + b"\xff" * 9), 1), deflate=ALL, max_message=10) == code


@both_roles
def test_in_pieces_a_bomb_comes_as_many_small_ones(role):
    end = WebSocketConnection(role, deflate=ALL)
    end.pieces = True
    end.receive_data(packed(role, bomb(64 * 2**20)))
    size, last = 0, False
    tracemalloc.start()
    try:
        while not last:
            piece = end.next_event()
            assert type(piece) is Piece and len(piece.data) <= 2**16 and piece.first == (size == 0)
            size, last = size + len(piece.data), piece.last
            assert len(end._inflater._held) <= flowcoro_websocket.DEFLATED_PIECE         # zlib copies it each time
        assert size == 64 * 2**20 and tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@both_roles
@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 2**17])
def test_a_piece_that_is_just_full_loses_nothing(role, size):
    end, message = WebSocketConnection(role, deflate=ALL), random.Random(size).randbytes(50) * (size // 50 + 1)
    end.pieces = True
    pieces = receive(end, packed(role, pack(message[:size])) + frames(role, (9, b"")))
    assert b"".join(piece.data for piece in pieces[:-1]) == message[:size] and pieces[-2].last and pieces[-1] == Ping()


@both_roles
def test_blocks_without_data_do_not_go_on_for_ever(role):
    empty = b"\x00\x00\x00\xff\xff"
    assert code_of(role, packed(role, empty * 200 + b"\0"), deflate=ALL, max_message=100) is None
    flood = frames(role, (2, empty * 300, PACKED | PART), *[(0, empty * 300, PART)] * 5)
    assert code_of(role, flood, deflate=ALL, max_message=100) == 1009
    assert code_of(role, packed(role, b"", claimed=2**40), deflate=ALL, max_message=100) == 1009


@both_roles
def test_a_message_whose_bytes_were_each_flushed_by_themselves_is_taken(role):
    deflater, message = zlib.compressobj(wbits=-15), random.Random(1).randbytes(500)
    data = b"".join(deflater.compress(message[n:n + 1]) + deflater.flush(zlib.Z_SYNC_FLUSH) for n in range(500))[:-4]
    assert len(data) > 6 * 500
    assert outcome(role, packed(role, data), deflate=ALL, max_message=500) == [message, "need data"]


def test_what_was_agreed_is_there_and_a_close_still_works():
    end, peer = (WebSocketConnection(role, deflate=ALL) for role in ("server", "client"))
    assert end.deflate is ALL and flowcoro_websocket.Deflate(15, 15, threshold=0) == ALL
    begun = peer.send_piece("x" * 100, True, False)
    assert receive(end, begun + peer.send_close(1000, "in the middle")) == [Close(1000, "in the middle")]
