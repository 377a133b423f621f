"""Feed frames, right ones, wrong ones and mutated ones, to the WebSocket codec until something gives.

    python tests/fuzz/websocket_codec.py --seconds 600

Each input goes in whole, byte by byte and at random splits, to a server or a client, with and without compression, as whole
messages or in pieces. Each time it has to give the events, and the error, that a second reader of RFC 6455 gives, which is below:
slow, simple, and written for nothing else. Nothing but RemoteProtocolError may be raised; each call has to get on; the messages
have to be the same when the other role sends them again. A failure prints the seed of the input, which repeats it with --seed,
and the input.
"""

import argparse
import itertools
import pathlib
import random
import sys
import time
import zlib

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from flowcoro_websocket import (CLOSED, NEED_DATA, Close, Deflate, Piece, Ping, Pong, RemoteProtocolError, WebSocketConnection)

TAIL = b"\x00\x00\xff\xff"
CODES = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}


# ---- the second reader -------------------------------------------------------------------------------------

class Wrong(Exception):
    """The peer's fault: its code."""


def first_wrong_byte(data):
    """(the place of the first byte that no UTF-8 has there, or None; whether it ends between characters). RFC 3629 section 4."""
    at = 0
    while at < len(data):
        lead = data[at]
        if lead < 0x80:
            at += 1
            continue
        low, high = {0xe0: (0xa0, 0xbf), 0xed: (0x80, 0x9f), 0xf0: (0x90, 0xbf), 0xf4: (0x80, 0x8f)}.get(lead, (0x80, 0xbf))
        more = 1 if 0xc2 <= lead <= 0xdf else 2 if 0xe0 <= lead <= 0xef else 3 if 0xf0 <= lead <= 0xf4 else None
        if more is None:
            return at, True
        for n in range(1, more + 1):
            if at + n == len(data):
                return None, False
            if not low <= data[at + n] <= high:
                return at + n, True
            low, high = 0x80, 0xbf
        at += more + 1
    return None, True


class Reader:
    """What one end has to make of all these bytes: `events`, which end with "need data", "closed", or ("error", code)."""

    def __init__(self, role, data, *, deflate=None, max_message=2**20, max_frame=None, pieces=False):
        self.masks, self.data, self.at = role == "server", data, 0
        self.deflate, self.max_message, self.max_frame, self.pieces = deflate, max_message, max_frame, pieces
        self.keeps = deflate and not (deflate.client_no_context_takeover if self.masks else deflate.server_no_context_takeover)
        self.zlib, self.events, self.message = None, [], None
        try:
            while self.at < len(data) and self.events[-1:] != ["closed"]:
                if not self.frame():
                    break
            if self.events[-1:] != ["closed"]:
                self.part()
                self.events.append("need data")
        except Wrong as error:
            self.part()
            self.events.append(("error", *error.args))

    def part(self):
        """What was delivered of a message that is not complete, where pieces are."""
        if self.pieces and self.message and self.message["out"]:
            out, text = self.message["out"], self.message["text"]
            if text:
                wrong, _ = first_wrong_byte(out)
                out = out[:wrong].decode(errors="ignore") if wrong is not None else out.decode(errors="ignore")
            if out:
                self.events.append(("part", out))

    def need(self, count):
        """The next bytes, or None."""
        found = self.data[self.at:self.at + count]
        self.at += count
        return found if len(found) == count else None

    def frame(self):
        """One frame; False if it is not complete."""
        first = self.need(1)[0]
        fin, rsv, opcode = first >> 7, first >> 4 & 7, first & 15
        if opcode not in (0, 1, 2, 8, 9, 10) or rsv & 3 or rsv and not (self.deflate and opcode in (1, 2)):
            raise Wrong(1002)
        if opcode > 7 and not fin or opcode in (1, 2) and self.message or opcode == 0 and not self.message:
            raise Wrong(1002)
        second = self.need(1)
        if second is None:
            return False
        size = second[0] & 127
        if second[0] >> 7 != self.masks or opcode > 7 and size > 125:
            raise Wrong(1002)
        if size > 125:
            written = self.need(2 if size == 126 else 8)
            if written is None:
                return False
            least, size = (126 if size == 126 else 65536), int.from_bytes(written, "big")
            if not least <= size < 2**63:
                raise Wrong(1002)
        if opcode < 8:
            self.check_size(size, rsv, opcode)
        mask = self.need(4) if self.masks else bytes(4)
        if mask is None:
            return False
        payload = bytes(byte ^ mask[n % 4] for n, byte in enumerate(self.data[self.at:self.at + size]))
        self.at += size
        if opcode > 7:
            if len(payload) < size:
                return False
            self.control(opcode, payload)
        else:
            if not self.message:
                self.message = dict(text=opcode == 1, packed=bool(rsv), out=b"", size=0, empty=0)
            self.message["size"] += size
            self.message["empty"] = 0 if size else self.message["empty"] + 1
            if self.message["empty"] > 100:
                raise Wrong(1008)
            self.take(payload, len(payload) == size, len(payload) == size and fin)
            if len(payload) < size:
                return False
        return True

    def check_size(self, size, rsv, opcode):
        if self.max_frame is not None and size > self.max_frame:
            raise Wrong(1009)
        packed = self.message["packed"] if self.message else rsv
        total = size + (self.message["size"] if self.message else 0)
        if not self.pieces and total > (8 * self.max_message + 1024 if packed else self.max_message):
            raise Wrong(1009)

    def control(self, opcode, payload):
        if opcode == 9:
            self.events.append(Ping(payload))
        elif opcode == 10:
            self.events.append(Pong(payload))
        else:
            if payload:
                if len(payload) == 1 or int.from_bytes(payload[:2], "big") not in CODES:
                    raise Wrong(1002)
                try:
                    close = Close(int.from_bytes(payload[:2], "big"), payload[2:].decode())
                except UnicodeDecodeError:
                    raise Wrong(1007) from None
            else:
                close = Close(1005, "")
            self.part()
            self.events += [close, "closed"]

    def take(self, payload, whole, last):
        """Bytes of a message."""
        message, broken = self.message, False
        if message["packed"]:
            payload, broken = self.inflate(payload + (TAIL if last else b""), last)
        room = self.max_message - len(message["out"])
        over = message["packed"] and not self.pieces and len(payload) > room
        message["out"] += payload[:room] if over else payload
        if message["text"]:
            wrong, complete = first_wrong_byte(message["out"])
            if wrong is not None or last and not over and not complete:
                raise Wrong(1007)
        if over:
            raise Wrong(1009)
        if broken:
            raise Wrong(1007)
        if last:
            self.events.append(message["out"].decode() if message["text"] else message["out"])
            self.message = None

    def inflate(self, data, last):
        """(what comes of one frame's bytes, whether it is corrupt, breaks off, or ends twice)"""
        out, ends = b"", 0
        for byte in [data[n:n + 1] for n in range(len(data))]:
            self.zlib = self.zlib or zlib.decompressobj(-15)
            try:
                out += self.zlib.decompress(byte)
            except zlib.error:
                return out, True
            if self.zlib.eof:
                ends += 1
                rest, self.zlib = self.zlib.unused_data, None
                assert not rest
                if ends > 1:
                    return out, True
        if last:
            if self.zlib is None:
                return out, True
            probe = self.zlib.copy()
            try:
                if probe.decompress(b"\x03\x00") or not probe.eof or probe.unused_data:
                    return out, True
            except zlib.error:
                return out, True
            if not self.keeps:
                self.zlib = None
        return out, False


# ---- the codec, driven -------------------------------------------------------------------------------------

def splits(data, chance):
    """The same bytes in several ways: lists of pieces."""
    yield [data] if data else []
    yield [data[n:n + 1] for n in range(len(data))]
    for most in (3, 40):
        cuts = sorted({0, len(data), *(chance.randrange(len(data) + 1) for _ in range(chance.randint(1, most)))})
        yield [data[a:b] for a, b in itertools.pairwise(cuts)]


def merged(events):
    """Pieces as the message they make, or as ("part", …) of one that is not complete; what comes in between is put before it."""
    under_way, found = [], []
    for event in events:
        if type(event) is Piece:
            assert event.first == (not under_way) and (event.data or event.last), event
            under_way.append(event.data)
            if event.last:
                found.append(under_way[0][:0].join(under_way))
                under_way = []
        else:
            if type(event) not in (Ping, Pong) and under_way:
                found.append(("part", under_way[0][:0].join(under_way)))
                under_way = []
            found.append(event)
    return found


def events_of(role, pieces, *, ask_for_pieces=False, **options):
    """All that a connection makes of these bytes, merged: a list that ends as that of Reader does."""
    connection, events = WebSocketConnection(role, **options), []
    connection.pieces = ask_for_pieces
    calls = 4 * sum(map(len, pieces)) + 8 * len(pieces) + 20
    try:
        for piece in pieces:
            connection.receive_data(piece)
            while True:
                calls -= 1
                assert calls, "it does not get on"
                event = connection.next_event()
                if event is NEED_DATA or event is CLOSED:
                    break
                events.append(event)
        events.append("closed" if connection.their_state == "CLOSED" else "need data")
    except RemoteProtocolError as error:
        events.append(("error", error.code))
        assert connection.their_state == "FAILED" and connection.close_code == error.code and connection.send_failure()
    return merged(events)


# ---- inputs ------------------------------------------------------------------------------------------------

TEXTS = ["", "a", "hello", "äöü€", "😀" * 3, "x" * 125, "x" * 126, "é" * 300, "\ud7ff\ue000\uffff\U0010ffff", "ab" * 700]
BAD_TEXTS = [b"\xff", b"a\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"ok\xe2\x82", b"\xf0\x9f\x98", b"\xc3(",
             b"\xf8\x88\x80\x80\x80", "κόσμε".encode() + b"\xed\xa0\x80edited", b"\xe0\x80\x80", b"\xef\xbf", b"x" * 40 + b"\xfe"]
CLOSES = [b"", b"\x03\xe8", b"\x03\xe9bye", b"\x0b\xb8", b"\x03", b"\x03\xed", b"\x00\x00", b"\x03\xe8\xff", b"\xff\xff",
          b"\x03\xe8" + b"x" * 123]


def frame(opcode, payload, masks, *, fin=True, rsv=0, form=None, claimed=None, mask=None):
    """A frame, as wrong as one likes. `form`: 7, 16 or 64 bits of length; `claimed`: another length."""
    size = len(payload) if claimed is None else claimed
    form = form or (7 if size < 126 else 16 if size < 65536 else 64)
    head = bytes([fin << 7 | rsv << 4 | opcode, masks << 7 | (size & 127 if form == 7 else 126 if form == 16 else 127)])
    head += b"" if form == 7 else (size & 2**form - 1).to_bytes(form // 8, "big")
    if not masks:
        return head + payload
    mask = mask or b"\x37\xfa\x21\x3d"
    return head + mask + bytes(byte ^ mask[n % 4] for n, byte in enumerate(payload))


def cut(payload, chance):
    """The payload as that of one or more fragments."""
    cuts = sorted({0, *(chance.randrange(len(payload) + 1) for _ in range(chance.choice([0, 0, 1, 2, 5])))})
    return [payload[a:b] for a, b in itertools.pairwise([*cuts, len(payload)])] or [payload]


def compressed(chance, deflater, payload):
    """The payload of a compressed message, one way or another."""
    if chance.random() < 0.1:                       # blocks that call themselves the last ones
        deflater = deflater.copy()
        return deflater.compress(payload) + deflater.flush(zlib.Z_FINISH) + chance.choice([b"\0", b"\0", b"", b"\x03\0\0"])
    how = chance.choice([zlib.Z_SYNC_FLUSH] * 6 + [zlib.Z_FULL_FLUSH] * 2 + [zlib.Z_BLOCK])
    packed = deflater.compress(payload) + deflater.flush(how)
    return packed.removesuffix(TAIL) if chance.random() < 0.95 else packed


def message_frames(chance, masks, packer):
    """The frames of a message, some of it wrong; control frames in between."""
    text = chance.random() < 0.6
    payload = chance.choice(TEXTS).encode() if text else chance.randbytes(chance.choice([0, 1, 5, 130, 700]))
    if text and chance.random() < 0.2:
        payload += chance.choice(BAD_TEXTS) + chance.choice([b"", b"more"])
    packed = packer is not None and chance.random() < 0.6
    if packed:
        payload = compressed(chance, packer(), payload * chance.choice([1, 1, 30]))
    parts = cut(payload, chance)
    for n, part in enumerate(parts):
        while chance.random() < 0.15:
            yield frame(*chance.choice([(9, b"ping"), (10, b""), (9, b"x" * 125), (8, chance.choice(CLOSES))]), masks)
        yield frame((1 if text else 2) if n == 0 else 0, part, masks, fin=n == len(parts) - 1, rsv=4 if packed and n == 0 else 0,
                    mask=chance.randbytes(4))


def wrong_frame(chance, masks):
    """A frame that is wrong in one way, or in none."""
    payload = chance.choice([b"", b"x", b"y" * 125, b"z" * 126, b"{" * 300])
    return frame(chance.choice([0, 1, 2, 3, 7, 8, 9, 10, 11, 15]), payload, masks if chance.random() < 0.8 else not masks,
                 fin=chance.random() < 0.7, rsv=chance.choice([0, 0, 0, 4, 2, 1, 6]), form=chance.choice([None, None, 16, 64]),
                 claimed=chance.choice([None, None, None, 2**16, 2**63, 2**63 - 1, 200, 3]))


def stream(chance, masks, packer):
    """Bytes that a peer sends."""
    data = bytearray()
    for _ in range(chance.choice([1, 1, 2, 4])):
        if chance.random() < 0.2:
            data += wrong_frame(chance, masks)
        elif chance.random() < 0.05:                # a text that goes wrong in a frame that is not complete
            wrong = chance.choice(BAD_TEXTS)
            return bytes(data + frame(1, wrong[:chance.randrange(len(wrong) + 1)], masks, claimed=100))
        elif chance.random() < 0.05:
            data += frame(1, b"", masks, fin=False) + frame(0, b"", masks, fin=False) * chance.choice([3, 99, 100])
            data += frame(0, b"", masks)
        else:
            data += b"".join(message_frames(chance, masks, packer))
    for _ in range(chance.choice([0, 0, 0, 1, 1, 3])):
        at = chance.randrange(len(data) + 1)
        what = chance.randrange(4)
        if what == 0:
            data[at:at + 1] = bytes([chance.randrange(256)])
        elif what == 1:
            del data[at:at + chance.choice([1, 2, 10])]
        elif what == 2:
            data[at:at] = chance.randbytes(chance.choice([1, 2, 5]))
        else:
            del data[at:]
    return bytes(data)


DEFLATES = [None, None, Deflate(threshold=0), Deflate(15, 15, True, True, 0), Deflate(9, 9, threshold=30),
            Deflate(12, 12, False, True, 1)]
LIMITS = [{}, {}, {}, dict(max_message=100), dict(max_message=0), dict(max_frame=60), dict(max_message=1500, max_frame=200)]


def again(role, messages, deflate):
    """The same messages, sent by the other role and received by this one."""
    sender, receiver = WebSocketConnection("client" if role == "server" else "server", deflate=deflate), WebSocketConnection(
        role, deflate=deflate)
    for message in messages:
        receiver.receive_data(sender.send_message(message))
        got = receiver.next_event()
        assert got == message and type(got) is type(message), "another message when it is sent again"


def comparable(events, pieces, deflate):
    """What has to be the same. zlib says when it likes that data are corrupt: what it would have given before may be lost, as may
    the byte that is one too many. In pieces a message begins before what comes in between, and ends after it.
    """
    corrupt = deflate and events[-1] in (("error", 1007), ("error", 1009))
    events = [event for event in events if not (corrupt and type(event) is tuple)] + [corrupt]
    return sorted(events, key=lambda event: type(event) in (Ping, Pong)) if pieces else events


def check(role, data, chance, deflate, pieces, **limits):
    """All of it for one input; AssertionError, or whatever the codec has thrown."""
    expected = Reader(role, data, deflate=deflate, pieces=pieces, **limits).events
    for split in splits(data, chance):
        events = events_of(role, split, deflate=deflate, ask_for_pieces=pieces, **limits)
        assert comparable(events, pieces, deflate) == comparable(expected, pieces, deflate), (
            f"other events: {events} and not {expected}")
    if not pieces:
        again(role, [event for event in expected if type(event) is bytes or (
            type(event) is str and event not in ("need data", "closed"))], deflate)


def run(seed):
    """One input."""
    chance = random.Random(seed)
    role, deflate, limits = chance.choice(["server", "client"]), chance.choice(DEFLATES), chance.choice(LIMITS)
    pieces, packer = chance.random() < 0.3, None
    if deflate:
        bits, anew = (deflate.client_max_window_bits, deflate.client_no_context_takeover) if role == "server" else (
            deflate.server_max_window_bits, deflate.server_no_context_takeover)
        first = zlib.compressobj(chance.choice([0, 1, 6, 9]), zlib.DEFLATED, -bits)
        packer = first.copy if anew else lambda: first
    data = stream(chance, role == "server", packer)
    try:
        check(role, data, chance, deflate, pieces, **limits)
    except Exception as error:
        error.add_note(f"seed {seed}: a {role} ({deflate}, {limits}, pieces={pieces}) that receives {data!r}")
        raise


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="only this one")
    options = parser.parse_args()
    if options.seed is not None:
        run(options.seed)
        return
    first = random.SystemRandom().randrange(10**9) * 1000
    end, count = time.monotonic() + options.seconds, 0
    while time.monotonic() < end:
        run(first + count)
        count += 1
    print(f"{count} inputs from seed {first} on, {options.seconds:g} s: nothing found")


if __name__ == "__main__":
    main()
