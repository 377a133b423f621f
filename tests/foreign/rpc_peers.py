"""python-lsp-jsonrpc, pygls, and jsonschema: what ../test_rpc_foreign.py talks to.

    python rpc_peers.py lsp-client PORT         an Endpoint of python-lsp-jsonrpc calls a server
    python rpc_peers.py lsp-server              prints {"port": …}: one is called, and calls who comes there
    python rpc_peers.py editor PROGRAM …        pygls' client starts a language server, and shows it a text
    python rpc_peers.py openrpc SCHEMA          reads an OpenRPC document from stdin, and checks it with jsonschema

An interpreter that has them runs it. It prints what it has found, as a line of JSON.

SPDX-License-Identifier: MIT
"""

import asyncio
import json
import pathlib
import socket
import sys
import threading

LIMIT = 20              # seconds for each answer; a test that hangs is to say so


def say(found):
    print(json.dumps(found), flush=True)


# ---- python-lsp-jsonrpc ----------------------------------------------------------------------------------------

class LspEnd:
    """One end of a connection, served by a thread until the other one ends it."""

    def __init__(self, sock, methods):
        from pylsp_jsonrpc.endpoint import Endpoint
        from pylsp_jsonrpc.streams import JsonRpcStreamReader, JsonRpcStreamWriter

        self.sock = sock
        self.files = [sock.makefile("rb"), sock.makefile("wb")]
        self.reader = JsonRpcStreamReader(self.files[0])
        self.endpoint = Endpoint(methods, JsonRpcStreamWriter(self.files[1]).write)
        self.thread = threading.Thread(target=self.reader.listen, args=[self.endpoint.consume])

    def start(self):
        self.thread.start()
        return self

    def ask(self, method, params=None):
        """The result, or {"code", "message", "data"} of the error."""
        from pylsp_jsonrpc.exceptions import JsonRpcException

        try:
            return self.endpoint.request(method, params).result(timeout=LIMIT)
        except JsonRpcException as error:
            return error.to_dict()

    def close(self):
        self.sock.shutdown(socket.SHUT_WR)
        self.wait()

    def wait(self):
        self.thread.join()
        self.endpoint.shutdown()
        for each in [*self.files, self.sock]:
            each.close()


def lsp_client(port):
    asked = []

    def answer(params):
        asked.append(params)
        return f"{params[0]}? Yes."

    end = LspEnd(socket.create_connection(("127.0.0.1", int(port)), LIMIT), {"answer": answer}).start()
    found = {"placed": end.ask("greet", ["größe 𝄞", "Servus"]), "named": end.ask("greet", {"name": "Ada"}),
             "nothing": end.ask("nothing"), "large": len(end.ask("greet", ["ä" * 100_000, ""])),
             "divided": end.ask("divide", [1, 0]), "unknown": end.ask("unheard-of"), "wrong": end.ask("greet", {"name": 1}),
             "back": end.ask("ask", ["Tea"]), "asked": asked}
    requests = [end.endpoint.request("turn", [number, 20]) for number in range(20)]
    found["together"] = [request.result(timeout=LIMIT) for request in requests]
    end.endpoint.notify("note", ["the last word"])
    found["noted"] = end.ask("noted")
    end.close()
    say(found)


def lsp_server():
    from pylsp_jsonrpc.exceptions import JsonRpcException

    notes = []

    def divide(params):
        raise JsonRpcException("by zero", 7, [1, 0])

    methods = {"add": sum, "greet": lambda params: f"Hello, {params['name']}", "nothing": lambda params: None,
               "divide": divide, "note": lambda params: notes.append(params[0]),
               "ask": lambda params: lambda: "You said: " + end.ask("answer", params)}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        say({"port": listener.getsockname()[1]})
        listener.settimeout(LIMIT)
        sock, _ = listener.accept()
    sock.settimeout(LIMIT)
    end = LspEnd(sock, methods)
    end.start().wait()
    say({"notes": notes})


# ---- pygls -----------------------------------------------------------------------------------------------------

def editor(*command):
    from lsprotocol import types
    from pygls.lsp.client import BaseLanguageClient

    async def main():
        client, diagnosed = BaseLanguageClient("an editor", "1"), asyncio.get_running_loop().create_future()

        @client.feature(types.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS)
        def hear(params):
            diagnosed.set_result([[one.range.start.line, one.range.start.character, one.message]
                                  for one in params.diagnostics])

        await client.start_io(*command)
        answer = await client.initialize_async(types.InitializeParams(types.ClientCapabilities(), root_uri="file:///"))
        client.initialized(types.InitializedParams())
        uri, text = "file:///notes.txt", "größe 𝄞\n" + "line " * 12
        client.text_document_did_open(types.DidOpenTextDocumentParams(types.TextDocumentItem(uri, "plaintext", 1, text)))
        found = {"capabilities": [answer.capabilities.text_document_sync, answer.capabilities.hover_provider],
                 "diagnostics": await diagnosed}
        hover = await client.text_document_hover_async(types.HoverParams(types.TextDocumentIdentifier(uri), types.Position(1, 7)))
        found["hover"] = hover.contents if isinstance(hover.contents, str) else hover.contents.value
        found["shutdown"] = await client.shutdown_async(None)
        client.exit(None)
        await client.stop()
        return found

    say(asyncio.run(asyncio.wait_for(main(), LIMIT)))


# ---- the meta-schema of OpenRPC --------------------------------------------------------------------------------

def openrpc(schema):
    """[what is wrong with it, …]. The schema of JSON Schemas, for which it refers to meta.json-schema.tools, is that of draft 7,
    as that one is, too."""
    import jsonschema
    import referencing
    from referencing.jsonschema import DRAFT7

    kind = jsonschema.Draft7Validator
    draft = {"allOf": [{"$ref": "http://json-schema.org/draft-07/schema#"}],
             "definitions": {"JSONSchemaObject": {"properties": {"$ref": {"type": "string"}}}}}
    resource = referencing.Resource(contents=draft, specification=DRAFT7)
    registry = jsonschema.validators.SPECIFICATIONS.with_resources([
        ("https://meta.json-schema.tools", resource), ("https://meta.json-schema.tools/", resource)])
    schema = json.loads(pathlib.Path(schema).read_text(encoding="utf-8"))
    validator = kind(schema, registry=registry)
    document = json.load(sys.stdin)
    say([f"{error.json_path}: {error.message:.200}" for error in validator.iter_errors(document)])


PROGRAMS = {"lsp-client": lsp_client, "lsp-server": lsp_server, "editor": editor, "openrpc": openrpc}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
