"""The libraries websockets and aiohttp, as client and as server: what ../test_websocket_foreign.py talks to.

    python websocket_peers.py websockets        (or aiohttp)

An interpreter that has the library runs it. It says {"version": …}, and then answers each line of JSON with another:

    ["talk", url, options, steps]       connects, and takes the steps: {"subprotocol", "extensions", "steps": [what each gave]};
                                        {"status": 403} where the server does not want it
    ["serve", options, steps]           {"port": …}: whoever connects there first, the steps are taken with him
    ["outcome", port]                   what they gave, as above; the server ends

A message is a text, or {"hex": …}. The steps: ["send", message], ["send-pieces", [text, …]] in a fragment each, ["receive"],
["receive-pieces"], ["ping"] until the pong is there, ["close", code, reason], and ["closed"], until the peer closes. The last two
give [code, reason] as the peer has sent them.

SPDX-License-Identifier: MIT
"""

import asyncio
import json
import ssl
import sys

LIMIT = 20              # seconds for the steps; a test that hangs is to say so


def packed(message):
    return message if isinstance(message, str) else {"hex": bytes(message).hex()}


def unpacked(message):
    return message if isinstance(message, str) else bytes.fromhex(message["hex"])


def client_tls(options):
    return {"ssl": ssl.create_default_context(cafile=options["ca"])} if "ca" in options else {}


def server_tls(options):
    if "certificate" not in options:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(options["certificate"], options["key"])
    return context


# ---- websockets ------------------------------------------------------------------------------------------------

class Websockets:
    """Options: subprotocols, origin, headers; deflate: settings of its PerMessageDeflateFactory, or nothing; refuse: a status."""

    def __init__(self):
        import websockets.asyncio.client
        import websockets.asyncio.server
        import websockets.extensions.permessage_deflate

        self.library, self.version = websockets, websockets.__version__
        self.deflate = websockets.extensions.permessage_deflate

    def settings(self, options, factory):
        deflate = options.get("deflate")
        return {"compression": None, "subprotocols": options.get("subprotocols"), "close_timeout": LIMIT,
                "extensions": None if deflate is None else [factory(**deflate)]}

    async def talk(self, url, options, steps):
        settings = self.settings(options, self.deflate.ClientPerMessageDeflateFactory) | client_tls(options)
        try:
            ws = await self.library.asyncio.client.connect(url, origin=options.get("origin"), proxy=None,
                                                           additional_headers=options.get("headers"), **settings)
        except self.library.exceptions.InvalidStatus as error:
            return {"status": error.response.status_code, "body": error.response.body.decode()}
        async with ws:
            return await self.take(ws, steps)

    async def serve(self, options, steps, outcome):
        async def handler(ws):
            try:
                outcome.set_result(await self.take(ws, steps))
            except Exception as error:
                outcome.set_exception(error)

        def refuse(ws, request):
            if "refuse" in options:
                outcome.set_result({"status": options["refuse"]})
                return ws.respond(options["refuse"], "not you")

        server = await self.library.asyncio.server.serve(
            handler, "127.0.0.1", 0, process_request=refuse, ssl=server_tls(options),
            **self.settings(options, self.deflate.ServerPerMessageDeflateFactory))

        async def end():
            server.close()
            await server.wait_closed()
        return server.sockets[0].getsockname()[1], end

    async def take(self, ws, steps):
        gave = [await self.step(ws, *step) for step in steps]
        return {"subprotocol": ws.subprotocol, "extensions": ws.response.headers.get("Sec-WebSocket-Extensions"), "steps": gave}

    async def step(self, ws, name, *arguments):
        match name:
            case "send":
                await ws.send(unpacked(*arguments))
            case "send-pieces":
                await ws.send([unpacked(piece) for piece in arguments[0]])
            case "receive":
                return packed(await ws.recv())
            case "receive-pieces":
                return [packed(piece) async for piece in ws.recv_streaming()]
            case "ping":
                return await (await ws.ping(b"are you there?")) >= 0
            case "close":
                await ws.close(*arguments)
                return [ws.close_code, ws.close_reason]
            case "closed":
                try:
                    return packed(await ws.recv())
                except self.library.exceptions.ConnectionClosed as error:
                    return error.rcvd and [error.rcvd.code, error.rcvd.reason]


# ---- aiohttp ---------------------------------------------------------------------------------------------------

class Aiohttp:
    """Options: subprotocols, origin, headers; deflate: window bits that a client asks for, or nothing; autoping: whether it
    answers pings unasked; refuse: a status; redirect: the path at which it serves, and all others lead there."""

    def __init__(self):
        import aiohttp
        import aiohttp.web

        self.library, self.version = aiohttp, aiohttp.__version__

    async def talk(self, url, options, steps):
        async with self.library.ClientSession() as session:
            try:
                ws = await session.ws_connect(url, protocols=options.get("subprotocols", ()), origin=options.get("origin"),
                                              compress=options.get("deflate", 0), autoping=options.get("autoping", True),
                                              headers=options.get("headers"), **client_tls(options))
            except self.library.WSServerHandshakeError as error:
                return {"status": error.status}
            async with ws:
                gave = [await self.step(ws, *step) for step in steps]
                return {"subprotocol": ws.protocol, "extensions": ws.compress, "steps": gave}

    async def serve(self, options, steps, outcome):
        web = self.library.web

        async def handler(request):
            if "redirect" in options and request.path != options["redirect"]:
                raise web.HTTPFound(options["redirect"])
            if "refuse" in options:
                outcome.set_result({"status": options["refuse"]})
                return web.Response(status=options["refuse"], text="not you")
            ws = web.WebSocketResponse(protocols=options.get("subprotocols", ()), compress="deflate" in options,
                                       autoping=options.get("autoping", True))
            await ws.prepare(request)
            try:
                gave = [await self.step(ws, *step) for step in steps]
                outcome.set_result({"subprotocol": ws.ws_protocol, "extensions": ws.headers.get("Sec-WebSocket-Extensions"),
                                    "steps": gave})
            except Exception as error:
                outcome.set_exception(error)
            return ws

        app = web.Application()
        app.router.add_get("/{path:.*}", handler)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_tls(options)).start()
        return runner.addresses[0][1], runner.cleanup

    async def step(self, ws, name, *arguments):
        kinds = self.library.WSMsgType
        match name:
            case "send":
                message = unpacked(*arguments)
                await (ws.send_str if isinstance(message, str) else ws.send_bytes)(message)
            case "receive":
                message = await ws.receive()
                if message.type not in (kinds.TEXT, kinds.BINARY):
                    raise ValueError(f"no message has come, but {message}")
                return packed(message.data)
            case "ping":
                await ws.ping(b"are you there?")
                message = await ws.receive()
                return message.type is kinds.PONG and bytes(message.data) == b"are you there?"
            case "close":
                code, reason = arguments
                await ws.close(code=code, message=reason.encode())
                return [ws.close_code, None]        # it does not keep the reason
            case "closed":
                message = await ws.receive()
                return [message.data, message.extra]


# ---- the line --------------------------------------------------------------------------------------------------

async def main(peer):
    loop, serving = asyncio.get_running_loop(), {}
    print(json.dumps({"version": peer.version}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        name, *arguments = json.loads(line)
        try:
            async with asyncio.timeout(LIMIT):
                match name:
                    case "talk":
                        answer = await peer.talk(*arguments)
                    case "serve":
                        outcome = loop.create_future()
                        port, end = await peer.serve(*arguments, outcome)
                        serving[port] = outcome, end
                        answer = {"port": port}
                    case "outcome":
                        outcome, end = serving.pop(*arguments)
                        answer = await outcome
                        await end()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main({"websockets": Websockets, "aiohttp": Aiohttp}[sys.argv[1]]()))
