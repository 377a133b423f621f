"""WebSocket against what others have written: the libraries websockets and aiohttp, on both ends, Node's client, a browser.

The libraries need not be in the environment of the tests: FLOWCORO_PEERS names a Python that has them.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import random
import select
import shutil
import string
import subprocess
import sys

import pytest

import flowcoro
import flowcoro_cli
import flowcoro_http
import flowcoro_net
import flowcoro_websocket
from flowcoro_http import HttpServer
from flowcoro_os import run_process
from flowcoro_websocket import ConnectionClosed, Deflate, HandshakeError, connect
from test_net import PATIENCE, nothing_is_left_behind, run  # noqa: F401  (a fixture)
from test_net_tls import OPENSSL, certificates  # noqa: F401  (a fixture)

FOREIGN = pathlib.Path(__file__).resolve().parent / "foreign"
PEERS = os.environ.get("FLOWCORO_PEERS") or sys.executable

needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="the openssl command, which makes the certificates, is not installed")


def library(name):
    """The parameter of tests that need it."""
    if PEERS == sys.executable and importlib.util.find_spec(name) is None:
        return pytest.param(name, marks=pytest.mark.skip(f"{name} is not installed: name a Python that has it in FLOWCORO_PEERS"))
    return name


WEBSOCKETS, AIOHTTP = library("websockets"), library("aiohttp")
websockets_only = pytest.mark.parametrize("peer", [WEBSOCKETS], indirect=True)
aiohttp_only = pytest.mark.parametrize("peer", [AIOHTTP], indirect=True)


class Peer:
    """A process of foreign/websocket_peers.py."""

    def __init__(self, library):
        self.library = library
        self.process = subprocess.Popen([PEERS, FOREIGN / "websocket_peers.py", library], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env={name: value for name, value in os.environ.items() if "proxy" not in name.lower()})
        self.is_there = bool(self.process.stdout.readline())

    def ask(self, *request):
        """The answer. For a thread: it comes when the steps have been taken."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        assert select.select([self.process.stdout], [], [], PATIENCE)[0], f"no answer to {request!r:.200}"
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def end(self):
        """What it has said on stderr."""
        return self.process.communicate(timeout=PATIENCE)[1]


@pytest.fixture(scope="module", params=[WEBSOCKETS, AIOHTTP])
def peer(request):
    peer = Peer(request.param)
    if not peer.is_there:
        pytest.skip(f"FLOWCORO_PEERS={PEERS}: {peer.end().strip().splitlines()[-1]}")
    yield peer
    assert peer.end() == ""


def packed(message):
    return message if isinstance(message, str) else {"hex": bytes(message).hex()}


MESSAGES = ["", "hello", "größe 𝄞", "x" * 125, "y" * 126, "z" * 65_535, "ä" * 100_000,
            b"", bytes(range(256)), b"\0" * 65_536, os.urandom(100_000)]
CODES = [(1000, ""), (1000, "enough"), (1001, "weg"), (1008, "größe 𝄞"), (1011, "x" * 123), (3000, ""), (4999, "last")]


# ---- the server ------------------------------------------------------------------------------------------------

@contextlib.asynccontextmanager
async def served(handler, tls=None, **options):
    """`handler` at /, whose options are those of accept(): the URL. Nobody is connected, and nothing has failed, in the end."""
    app = HttpServer(websocket=flowcoro_websocket.accept)
    app.websocket("/", **options)(handler)
    async with await app.listen("127.0.0.1", 0, tls=tls) as server, flowcoro.TaskGroup() as group:
        serving = group.spawn(server.serve())
        yield server.url.replace("http", "ws", 1) + "/"
        server.close()
        await serving
        counts = server.statistics()
        assert counts["connections"] == counts["failed"] == counts["handshakes_failed"] == 0


def talks(peer, handler, steps, options={}, **accepting):
    """What the peer says of its steps as a client of `handler`."""
    async def main():
        async with served(handler, **accepting) as url:
            return await flowcoro.to_thread(peer.ask, "talk", url, options, steps)

    return run(main)


async def echo(ws):
    async for message in ws:
        await ws.send(message)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_a_client_has_its_messages_back(peer, compressed):
    steps = [step for message in MESSAGES for step in (["send", packed(message)], ["receive"])]
    deflate = {"deflate": {} if peer.library == "websockets" else 15} if compressed else {}
    answer = talks(peer, echo, [*steps, ["close", 1000, ""]], deflate)
    assert answer["steps"][1::2] == [*map(packed, MESSAGES)]
    assert bool(answer["extensions"]) is compressed and answer["subprotocol"] is None


@websockets_only
def test_fragments_of_a_client_are_one_message_or_pieces_as_they_come(peer):
    async def handler(ws):
        got.append(await ws.receive())
        got.append("".join([piece async for piece in ws.receive_pieces()]))
        got.append(b"".join([piece async for piece in ws.receive_pieces()]))
        await ws.close()

    got = []
    texts, data = ["grö", "", "ße", "x" * 70_000], [{"hex": "00ff"}, {"hex": "80"}]
    for options in {}, {"deflate": {}}:
        talks(peer, handler, [["send-pieces", texts], ["send-pieces", texts], ["send-pieces", data], ["closed"]], options)
    assert got == ["größe" + "x" * 70_000, "größe" + "x" * 70_000, b"\x00\xff\x80"] * 2


def test_a_message_that_is_sent_in_pieces_is_one_to_a_client(peer):
    async def handler(ws):
        async def pieces():
            yield b"\x00\xff"
            yield b"\x80"
        await ws.send(["grö", "ße", "!"])
        await ws.send(pieces())
        await ws.send(["one", "two"])
        await ws.close()

    steps = [["receive"], ["receive"], ["receive-pieces"] if peer.library == "websockets" else ["receive"], ["closed"]]
    for options in {}, {"deflate": {} if peer.library == "websockets" else 15}:
        first, second, third, end = talks(peer, handler, steps, options)["steps"]
        assert (first, second, end) == ("größe!", {"hex": "00ff80"}, [1000, ""])
        assert "".join(third) == "onetwo" and (isinstance(third, str) or third[:2] == ["one", "two"])


# Without a pattern, and said again and again: who compresses refers to the message before, if that is allowed and in the window;
# where it is not, the other side cannot inflate it.
LONG = "".join(random.Random(1).choices(string.ascii_letters, k=3000))


def negotiated(header):
    """{parameter: value} of a Sec-WebSocket-Extensions with permessage-deflate alone; None without one."""
    if header is None:
        return None
    name, *parameters = header.split("; ")
    assert name == "permessage-deflate"
    return {name: int(value) if value else True for name, _, value in (parameter.partition("=") for parameter in parameters)}


@websockets_only
def test_all_that_a_client_can_ask_of_compression_is_granted_or_declined(peer):
    async def main():
        async with served(echo) as url:
            for server_fresh, client_fresh, server_bits, client_bits in itertools.product(
                    [False, True], [False, True], [None, 8, 9, 15], [None, True, 9, 15]):
                deflate = {"server_no_context_takeover": server_fresh, "client_no_context_takeover": client_fresh,
                           "server_max_window_bits": server_bits, "client_max_window_bits": client_bits}
                answer = await flowcoro.to_thread(peer.ask, "talk", url, {"deflate": deflate}, [
                    *[["send", LONG], ["receive"]] * 3, ["close", 1000, ""]])
                assert answer["steps"][1::2] == [LONG] * 3, deflate
                found = negotiated(answer["extensions"])
                assert found is not None or server_bits == 8, deflate
                if found is not None:
                    assert found.get("server_no_context_takeover", False) == server_fresh, deflate
                    assert found.get("client_no_context_takeover", False) == client_fresh, deflate
                    assert found.get("server_max_window_bits", 15) <= (server_bits or 15), deflate
                    assert "client_max_window_bits" not in found or client_bits, deflate

    run(main)


@websockets_only
@pytest.mark.parametrize("ours", [
    Deflate(server_no_context_takeover=True), Deflate(client_no_context_takeover=True), Deflate(server_max_window_bits=9),
    Deflate(client_max_window_bits=10), Deflate(9, 9, True, True, threshold=0)], ids=str)
def test_what_the_server_wants_of_compression_is_granted_by_a_client(peer, ours):
    steps = [*[["send", LONG], ["receive"]] * 3, ["close", 1000, ""]]
    answer = talks(peer, echo, steps, {"deflate": {"client_max_window_bits": True}}, deflate=ours)
    found = negotiated(answer["extensions"])
    assert answer["steps"][1::2] == [LONG] * 3
    for name in "server_no_context_takeover", "client_no_context_takeover":
        assert found.get(name, False) == getattr(ours, name)
    for name in "server_max_window_bits", "client_max_window_bits":
        assert found.get(name, 15) == getattr(ours, name)


@aiohttp_only
@pytest.mark.parametrize("bits", range(9, 16))
def test_a_client_of_aiohttp_compresses_with_the_window_it_asks_for(peer, bits):
    answer = talks(peer, echo, [*[["send", LONG], ["receive"]] * 3, ["close", 1000, ""]], {"deflate": bits})
    assert answer["steps"][1::2] == [LONG] * 3 and answer["extensions"]


def test_pings_are_answered_both_ways(peer):
    async def handler(ws):
        seconds.append(await ws.ping())
        await ws.send("now you")
        await ws.receive()

    seconds = []
    answer = talks(peer, handler, [["receive"], ["close", 1000, ""]])
    assert answer["steps"][0] == "now you" and 0 < seconds[0] < PATIENCE

    async def waits(ws):
        with pytest.raises(ConnectionClosed):
            await ws.receive()

    answer = talks(peer, waits, [["ping"], ["close", 1000, ""]], {"autoping": False})
    assert answer["steps"][0] is True


def test_a_close_of_the_client_is_told_and_given_back(peer):
    async def handler(ws):
        with pytest.raises(ConnectionClosed) as caught:
            await ws.receive()
        told.append((caught.value.code, caught.value.reason, ws.close_code, ws.close_reason))

    async def main():
        async with served(handler) as url:
            return [(await flowcoro.to_thread(peer.ask, "talk", url, {}, [["close", *code]]))["steps"][0] for code in CODES]

    told = []
    answers = run(main)
    assert told == [code * 2 for code in CODES]
    assert answers == [[code, reason if peer.library == "websockets" else None] for code, reason in CODES]


def test_a_close_of_the_server_is_told_and_given_back(peer):
    async def handler(ws):
        await ws.close(*codes[len(told)])
        told.append((ws.close_code, ws.close_reason))

    async def main():
        async with served(handler) as url:
            return [(await flowcoro.to_thread(peer.ask, "talk", url, {}, [["closed"]]))["steps"][0] for _ in codes]

    told, codes = [], [*CODES, (1012, "back soon"), (1013, "")]
    assert run(main) == [[*code] for code in codes]
    assert told == (codes if peer.library == "websockets" else [(1000, "")] * len(codes))        # aiohttp answers all with that


def test_the_first_subprotocol_of_the_server_that_a_client_offers_is_taken(peer):
    async def handler(ws):
        found.append(ws.subprotocol)

    found = []
    for offered, wanted in (["z", "b", "a"], "a"), (["b"], "b"), (["z"], None), ([], None):
        answer = talks(peer, handler, [["closed"]], {"subprotocols": offered}, subprotocols=["a", "b"])
        assert answer["subprotocol"] == wanted
    assert found == ["a", "b", None, None]


def test_clients_are_told_why_they_are_refused(peer):
    async def main():
        async with served(echo, origins=["https://good.example"]) as url:
            for target, origin, status in ((url, "https://evil.example", 403), (url + "x", None, 404)):
                answer = await flowcoro.to_thread(peer.ask, "talk", target, {"origin": origin}, [])
                assert answer["status"] == status
            for origin in "https://good.example", None:
                answer = await flowcoro.to_thread(peer.ask, "talk", url, {"origin": origin}, [
                    ["send", "hello"], ["receive"], ["close", 1000, ""]])
                assert answer["steps"][1] == "hello"

    run(main)


def test_a_client_that_says_too_much_is_told_so(peer):
    answer = talks(peer, echo, [["send", "x" * 1000], ["receive"], ["send", "x" * 1001], ["closed"]], max_message=1000)
    assert answer["steps"][1] == "x" * 1000 and answer["steps"][3][0] == 1009


@needs_openssl
def test_a_client_comes_by_tls(peer, certificates):  # noqa: F811
    answer = talks(peer, echo, [["send", LONG], ["receive"], ["close", 1000, ""]], {"ca": str(certificates.ca)},
                   tls=certificates.good)
    assert answer["steps"][1] == LONG


# ---- the client ------------------------------------------------------------------------------------------------

def visits(peer, steps, main, options={}, url="ws://127.0.0.1:{}/", **connecting):
    """Connect to a server of the peer's that takes these steps, and run main(ws). What the peer says of its steps."""
    async def session():
        port = (await flowcoro.to_thread(peer.ask, "serve", options, steps))["port"]
        async with connect(url.format(port), **connecting) as ws:
            await main(ws)
        return await flowcoro.to_thread(peer.ask, "outcome", port)

    return run(session)


async def until_closed(ws):
    """(code, reason) of the server's close."""
    with pytest.raises(ConnectionClosed) as caught:
        await ws.receive()
    return caught.value.code, caught.value.reason


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_messages_to_a_server_arrive_and_those_of_the_server_come(peer, compressed):
    async def main(ws):
        for message in MESSAGES:
            await ws.send(message)
        got.extend([await ws.receive() for _ in MESSAGES])
        assert await until_closed(ws) == (1000, "")

    got = []
    steps = [*[["receive"]] * len(MESSAGES), *(["send", packed(message)] for message in MESSAGES), ["close", 1000, ""]]
    answer = visits(peer, steps, main, {"deflate": {}} if compressed else {})
    assert answer["steps"][:len(MESSAGES)] == [*map(packed, MESSAGES)] and got == MESSAGES
    assert bool(answer["extensions"]) is compressed


@websockets_only
@pytest.mark.parametrize("ours", [
    Deflate(), Deflate(server_no_context_takeover=True), Deflate(client_no_context_takeover=True), Deflate(9), Deflate(15, 9),
    Deflate(10, 10, True, True, threshold=0)], ids=str)
def test_all_that_a_server_can_answer_about_compression_is_heeded(peer, ours):
    async def talk(ws):
        for _ in range(3):
            await ws.send(LONG)
            assert await ws.receive() == LONG
        await until_closed(ws)

    async def main():
        steps = [*[["receive"], ["send", LONG]] * 3, ["close", 1000, ""]]
        for server_fresh, client_fresh, server_bits, client_bits in itertools.product(
                [False, True], [False, True], [None, 9], [None, 9]):
            deflate = {"server_no_context_takeover": server_fresh, "client_no_context_takeover": client_fresh,
                       "server_max_window_bits": server_bits, "client_max_window_bits": client_bits}
            port = (await flowcoro.to_thread(peer.ask, "serve", {"deflate": deflate}, steps))["port"]
            async with connect(f"ws://127.0.0.1:{port}/", deflate=ours) as ws:
                await talk(ws)
            answer = await flowcoro.to_thread(peer.ask, "outcome", port)
            assert answer["steps"][::2][:3] == [LONG] * 3 and negotiated(answer["extensions"]) is not None, deflate

    run(main)


@websockets_only
def test_messages_in_pieces_go_both_ways_by_the_client(peer):
    async def main(ws):
        await ws.send(["grö", "ße", "!"])
        await ws.send([b"\x00\xff", b"\x80"])
        got.append([piece async for piece in ws.receive_pieces()])
        got.append(await ws.receive())
        await until_closed(ws)

    got = []
    steps = [["receive-pieces"], ["receive"], ["send-pieces", ["eins", "zwei"]], ["send-pieces", ["x" * 70_000, "y"]],
             ["close", 1000, ""]]
    for options in {}, {"deflate": {}}:
        pieces, whole, *_ = visits(peer, steps, main, options)["steps"]
        assert pieces[:3] == ["grö", "ße", "!"] and "".join(pieces) == "größe!" and whole == {"hex": "00ff80"}
    assert ["".join(got[0]), got[1], "".join(got[2]), got[3]] == ["einszwei", "x" * 70_000 + "y"] * 2


def test_pings_are_answered_both_ways_by_the_client(peer):
    async def main(ws):
        assert 0 < await ws.ping() < PATIENCE
        await ws.send("go on")
        assert await until_closed(ws) == (1000, "bye")

    async def waits(ws):
        assert await until_closed(ws) == (1000, "bye")

    assert visits(peer, [["receive"], ["close", 1000, "bye"]], main)["steps"][0] == "go on"
    answer = visits(peer, [["ping"], ["close", 1000, "bye"]], waits, {"autoping": False})
    assert answer["steps"][0] is True


@pytest.mark.parametrize("code", [*CODES, (1012, "")], ids=str)
def test_closes_are_told_both_ways(peer, code):
    async def theirs(ws):
        assert await until_closed(ws) == code == (ws.close_code, ws.close_reason)

    async def ours(ws):
        await ws.close(*code)

    [given_back] = visits(peer, [["close", *code]], theirs)["steps"]
    assert given_back[0] == code[0] and given_back[1] in (code[1], None)
    assert visits(peer, [["closed"]], ours)["steps"] == [[*code]]


def test_a_subprotocol_of_the_server_is_known_to_the_client(peer):
    async def main(ws):
        assert ws.subprotocol == "chat"
        await ws.close()

    answer = visits(peer, [["closed"]], main, {"subprotocols": ["chat"]}, subprotocols=["unknown", "chat"])
    assert answer["subprotocol"] == "chat"


def test_a_server_that_refuses_is_a_handshake_error_with_what_it_says(peer):
    async def main(ws):
        raise AssertionError("connected")

    with pytest.raises(HandshakeError) as caught:
        visits(peer, [], main, {"refuse": 401})
    assert (caught.value.status, caught.value.body) == (401, b"not you")


@aiohttp_only
def test_a_redirect_leads_to_the_server(peer):
    async def main(ws):
        assert await ws.receive() == "here"
        await until_closed(ws)

    visits(peer, [["send", "here"], ["close", 1000, ""]], main, {"redirect": "/there"})


@needs_openssl
def test_the_client_comes_by_tls(peer, certificates):  # noqa: F811
    async def main(ws):
        await ws.send(LONG)
        assert await ws.receive() == LONG
        await until_closed(ws)

    certificate, key = certificates.good
    answer = visits(peer, [["receive"], ["send", LONG], ["close", 1000, ""]], main, {"certificate": certificate, "key": key},
                    url="wss://127.0.0.1:{}/", tls=flowcoro_net.client_tls(ca=certificates.ca))
    assert answer["steps"][0] == LONG


# ---- Node ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def node():
    """The command of a Node that has a WebSocket: since 20, there by an option."""
    command = ["node", "--experimental-websocket"]
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    done = subprocess.run([*command, "-p", "typeof WebSocket"], capture_output=True, text=True, timeout=PATIENCE)
    if done.stdout.strip() != "function":
        version = subprocess.run(["node", "--version"], capture_output=True, text=True, timeout=PATIENCE).stdout.strip()
        pytest.skip(f"node {version} has no WebSocket: 20 has")
    return command


def test_node_talks_closes_is_closed_and_is_refused(node):
    async def main():
        app = HttpServer(websocket=flowcoro_websocket.accept)
        app.websocket("/echo", subprotocols=["chat", "unheard-of"])(echo)

        @app.websocket("/leave")
        async def leave(ws):
            await ws.close(4000, "größe")

        async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve())
            done = await run_process([*node, str(FOREIGN / "websocket_node.js"), server.url.replace("http", "ws", 1)],
                                     timeout=PATIENCE, group=True)
            server.close()
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    found = run(main)
    assert found["protocol"] == "chat" and found["extensions"].partition(";")[0] in ("", "permessage-deflate")
    assert found["echoes"] == [[0, ""], [5, "hello"], [8, "größe 𝄞"], [70_000, "x" * 10], [0, 255, 128, 3], [0, 0, 0, 200_000]]
    assert found["ours"] == {"code": 3001, "reason": "enough, größe", "wasClean": True}
    assert found["theirs"] == {"code": 4000, "reason": "größe", "wasClean": True}
    assert "non-101" in found["refused"]


# ---- a browser -------------------------------------------------------------------------------------------------

# A browser that is to dump a page does so when all of it has been loaded: an image, which is answered when the page says that it
# is ready. The script does what a person would: enter, await the others, say something, and see it.
VISITOR = b"""<img src="/ready"><script>
const fill = (form, id, value) => { part(id).value = value; part(form).requestSubmit() };
fill("door", "name", "Eve <b>");
let told = false;
const watch = setInterval(() => {
    if (!told && part("said").textContent.includes("Welcome")) {
        told = true;
        fill("speak", "text", "<i>gr\xc3\xbc\xc3\x9fe</i> \xf0\x9d\x84\x9e");
    } else if (told && part("said").textContent.includes("Eve") && part("state").textContent == "Connected") {
        clearInterval(watch);
        fetch("/ready", {method: "POST"});
    }
}, 10);
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_enters_the_chat_of_the_demo_hears_and_speaks(tmp_path, monkeypatch):
    name, policy = flowcoro_cli.CHAT_POLICY
    monkeypatch.setattr(flowcoro_cli, "CHAT_POLICY", (name, policy.replace("img-src", "img-src 'self'")))

    async def main():
        ready, heard = flowcoro.Event(), []
        app = flowcoro_cli._chat(flowcoro_http, flowcoro_websocket, lambda *said: heard.append(said))

        @app.middleware
        async def visit(request, call_next):
            response = await call_next(request)
            if request.path == "/":
                response.content += VISITOR
            return response

        @app.route("/ready", ["GET", "POST"])
        async def become_ready(request):
            if request.method == "POST":
                ready.set()
            await ready.wait()

        async def welcome(url):
            async with connect(url + "/room?name=Ada") as ws:
                async for message in ws:
                    if "Eve" in str(json.loads(message).get("here")):
                        await ws.send("Welcome")

        async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve())
            host = group.spawn(welcome(server.url.replace("http", "ws")))
            done = await run_process([
                "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", server.url + "/"],
                env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C"}, timeout=PATIENCE, group=True)
            host.cancel()
            server.close()
        return done.stdout.decode(), heard

    page, heard = run(main)
    assert heard == [("Ada", "Welcome"), ("Eve <b>", "<i>grüße</i> 𝄞")]
    assert "<b>Eve &lt;b&gt;:</b> &lt;i&gt;grüße&lt;/i&gt; 𝄞" in page                   # a text, not HTML
    assert '<b id="here">Ada, Eve &lt;b&gt;</b>' in page and "Connected" in page
