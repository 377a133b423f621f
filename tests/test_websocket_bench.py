"""`python -m flowcoro bench websocket`: that it measures, tiny, and that its generator takes no wrong message for a right one.

How fast anything is, is asserted nowhere.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE = 120              # seconds until a benchmark counts as hanging

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark needs Linux")
pytestmark = [needs_linux, pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")]


def bench(*arguments, **environment):
    """Run `python -m flowcoro bench websocket …` in a process of its own: the CompletedProcess."""
    return subprocess.run([sys.executable, "-W", "error", "-m", "flowcoro", "bench", "websocket", *map(str, arguments)], cwd=ROOT,
                          env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=PATIENCE)


def test_every_case_is_measured():
    done = bench("--quick", "--repeat", 1, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {row.partition(":")[0] for row in report["cases"]} == {"echo", "echo64k", "broadcast", "burst", "idle", "client"}
    for name, row in report["cases"].items():
        beside = {"bare"} if name.partition(":")[0] in ("echo", "echo64k", "broadcast") else set()
        assert row["figures"].keys() == {"flowcoro"} | beside
        assert row["failed"] == {}
        assert name in ("idle:lost", "idle:memory") or row["figures"]["flowcoro"]["median"] > 0, name
    assert report["cases"]["idle:lost"]["figures"]["flowcoro"]["median"] == 0
    assert [target["case"] for target in report["targets"]] == ["idle:lost"]        # the others are against peers


def test_without_a_compiler_it_says_how_to_get_one():
    done = bench("--quick", "--case", "echo", CC="none")
    assert done.returncode == 1 and "apt-get install gcc" in done.stderr and "Traceback" not in done.stderr


def test_list_names_every_case():
    done = bench("--list")
    assert done.returncode == 0
    assert all(f"\n{case} " in "\n" + done.stdout for case in ("echo", "echo64k", "broadcast", "burst", "idle", "client"))


# ---- the generator ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(server, *words): run load.program against `server(sock)`, called with each connection: the CompletedProcess."""
    folder = tmp_path_factory.mktemp("load")
    subprocess.run(["cc", "-O1", "-o", folder / "load", ROOT / "benchmarks" / "load.c"], check=True)
    (folder / "pattern").write_bytes(bytes(range(64, 128)) * 2**14)

    def run(server, *words):
        def serve():
            while not over.is_set():
                sock, _ = listener.accept()
                with sock:
                    server(sock)

        over = threading.Event()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=serve)
            thread.start()
            try:
                port = listener.getsockname()[1]
                return subprocess.run([folder / "load", *words, f"port={port}", f"pattern={folder / 'pattern'}", "websocket=/x",
                                       "warm=0", "seconds=0.05"], capture_output=True, text=True, timeout=PATIENCE)
            finally:
                over.set()
                socket.create_connection(listener.getsockname()).close()
                thread.join()

    run.program = folder / "load"
    return run


ACCEPT = (b"HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
          b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n")


def read_head(sock):
    head = b""
    while b"\r\n\r\n" not in head and (some := sock.recv(65536)):
        head += some
    return head


def read_frame(file):
    """(first byte, payload without its mask) of the next frame, or None."""
    head = file.read(2)
    if len(head) < 2:
        return None
    digits = {126: 2, 127: 8}.get(head[1] & 127, 0)
    length = int.from_bytes(file.read(digits), "big") if digits else head[1] & 127
    assert head[1] & 128, "a client masks"
    key = file.read(4)
    return head[0], bytes(byte ^ key[place % 4] for place, byte in enumerate(file.read(length)))


def frame(first, payload):
    size = len(payload)
    return bytes([first, size] if size < 126 else [first, 126, *size.to_bytes(2, "big")] if size < 65536
                 else [first, 127, *size.to_bytes(8, "big")]) + payload


def echoing(answer, heads=None):
    """A server that writes `answer(first byte, payload)` for each frame, after the right handshake."""
    def serve(sock):
        head = read_head(sock)
        if heads is not None:
            heads.append(head)
        sock.sendall(ACCEPT)
        with sock.makefile("rb") as file:
            try:
                while found := read_frame(file):
                    sock.sendall(answer(*found))
            except ConnectionError:
                pass
    return serve


@pytest.mark.parametrize("size", [1, 125, 126, 65535, 65536])
@pytest.mark.parametrize("text", [0, 1])
def test_messages_are_framed_and_masked_as_they_have_to_be(load, size, text):
    def answer(first, payload):
        firsts.add(first)
        sizes.add(len(payload))
        return frame(first, payload)

    heads, firsts, sizes = [], set(), set()
    done = load(echoing(answer, heads), "echo", f"size={size}", f"text={text}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["operations"] > 0
    assert (firsts, sizes) == ({0x81 if text else 0x82}, {size})
    assert heads[0].startswith(b"GET /x HTTP/1.1\r\nHost: 127.0.0.1:") and b"\r\nSec-WebSocket-Version: 13\r\n" in heads[0]


def test_an_answer_in_fragments_with_pings_between_is_a_right_one(load):
    pongs = []

    def answer(first, payload):
        if first == 0x8A:
            pongs.append(payload)
            return b""
        return frame(2, payload[:3]) + frame(0x89, b"hello?") + frame(0, b"") + frame(0x80, payload[3:])

    done = load(echoing(answer), "echo", "size=10")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["operations"] > 0 and set(pongs) == {b"hello?"}


@pytest.mark.parametrize(("answer", "said"), [
    (lambda first, payload: frame(first, payload[:-1] + b"!"), "differs"),
    (lambda first, payload: frame(first, payload[:-1]), "came back with 9"),
    (lambda first, payload: frame(first, payload + b"!"), "more came"),
    (lambda first, payload: frame(first, payload) * 2, "differs"),       # from the next request, which has been sent
    (lambda first, payload: frame(0x81, payload), "another type"),
    (lambda first, payload: frame(first | 0x40, payload), "begins with c2 0a"),
    (lambda first, payload: bytes([first, 0x8A]) + bytes(4) + payload, "begins with 82 8a"),
    (lambda first, payload: frame(0x88, b"\3\xe8"), "the server closed it"),
    (lambda first, payload: frame(0x8B, b""), "opcode 11"),
], ids=["another byte", "too short", "too long", "twice", "text", "compressed", "masked", "close", "no opcode"])
def test_a_wrong_answer_ends_it(load, answer, said):
    done = load(echoing(answer), "echo", "size=10")
    assert done.returncode == 1 and said in done.stderr and done.stdout == ""


@pytest.mark.parametrize(("answer", "said"), [
    (b"HTTP/1.1 404 Not Found\r\n\r\n", "404"), (ACCEPT.replace(b"s3p", b"S4p"), "no right key"), (b"", "closed it")])
def test_a_wrong_handshake_ends_it(load, answer, said):
    def serve(sock):
        read_head(sock)
        sock.sendall(answer)

    done = load(serve, "echo", "size=10")
    assert done.returncode == 1 and said in done.stderr


@pytest.mark.parametrize(("words", "said"), [
    (["connect", "websocket=/"], "only for echo, paced and broadcast"), (["broadcast"], "needs websocket=PATH"),
    (["echo", "websocket=/", "burst=2"], "for broadcast alone"), (["broadcast", "websocket=/", "burst=0"], "at least 1"),
    (["broadcast", "websocket=/", "burst=20000"], "a MiB in all")])
def test_the_generator_says_what_it_cannot_do(load, words, said):
    done = subprocess.run([load.program, *words, "port=1", "size=100"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and said in done.stderr


def test_a_burst_is_as_many_messages_each_another_one_and_all_have_to_come_back(load):
    bursts = []

    def answer(first, payload):
        bursts.append(payload)
        return b"" if len(bursts) % 3 else b"".join(frame(0x82, one) for one in bursts[-3:])

    done = load(echoing(answer), "broadcast", "size=10", "burst=3")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["operations"] % 3 == 0 and len(set(bursts[:3])) == 3
    bursts.clear()
    first_again = echoing(lambda first, payload: frame(first, bursts.append(payload) or bursts[0]))
    done = load(first_again, "broadcast", "size=10", "burst=3")
    assert done.returncode == 1 and "differs" in done.stderr
