"""A small language server: an editor that speaks the Language Server Protocol is told of long lines, and which word is where.

`--stdio` serves the editor that has started it, a number listens on that port. Without, a client here plays the editor.
"""

import sys

import flowcoro
from flowcoro_rpc import ContentLength, Methods, RpcClient, RpcServer, StandardStreams

WIDTH = 40                              # characters of a line
server, documents = RpcServer(), {}     # the methods; URI -> lines
server.method(lambda **client: {"capabilities": {"textDocumentSync": 1, "hoverProvider": True}}, name="initialize")
server.method(lambda **more: None, name="initialized")
server.method(lambda: None, name="shutdown")
server.method(lambda peer: peer.close_nowait(), name="exit")


@server.method("textDocument/didOpen")
async def did_open(peer, textDocument):
    lines = documents[textDocument["uri"]] = textDocument["text"].splitlines()
    await peer.notify("textDocument/publishDiagnostics", uri=textDocument["uri"], diagnostics=[
        {"range": {"start": {"line": number, "character": WIDTH}, "end": {"line": number, "character": len(line)}},
         "severity": 2, "message": f"{len(line)} characters"} for number, line in enumerate(lines) if len(line) > WIDTH])


@server.method("textDocument/didChange")
async def did_change(peer, textDocument, contentChanges):
    await did_open(peer, {**textDocument, "text": contentChanges[-1]["text"]})


@server.method("textDocument/hover")
def hover(textDocument, position, **more):
    words = documents[textDocument["uri"]][position["line"]][:position["character"] + 1].split()
    return {"contents": f"word {len(words)} of its line"} if words else None


async def play_editor():
    told, editor = flowcoro.Channel(10), Methods()
    editor.method(lambda uri, diagnostics: told.send_nowait(diagnostics), name="textDocument/publishDiagnostics")
    listening = await server.start_tcp_server(0, framing=ContentLength)
    async with await RpcClient.connect(*listening.local, framing=ContentLength, methods=editor) as client:
        print(await client.call("initialize", processId=None, capabilities={}))
        document = {"uri": "file:///a.txt", "text": "short\nlong " + "line " * 10}
        await client.notify("textDocument/didOpen", textDocument=document)
        print([one["message"] for one in await told.receive()])
        print(await client.call("textDocument/hover", textDocument=document, position={"line": 1, "character": 12}))
    await server.close()


async def main(options):
    if options == ["--stdio"]:
        await server.serve_connection(StandardStreams(), framing=ContentLength)
    elif options:
        await server.start_tcp_server(int(options[0]), framing=ContentLength)
        await server.wait_closed()
    else:
        await play_editor()

flowcoro.run(main(sys.argv[1:]))
