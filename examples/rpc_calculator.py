"""Both ends of a JSON-RPC connection call each other: a calculator that asks its client for the values of names.

It computes many expressions at once over one connection, tells by a notification what it has done, and gives a table as a stream.
"""

import ast
import operator

import flowcoro
from flowcoro_rpc import Methods, RpcClient, RpcError, RpcServer

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
server = RpcServer(title="Calculator")


async def value_of(node, peer):
    match node:
        case ast.Constant(int() | float() as number):
            return number
        case ast.Name(name):
            return await peer.call("lookup", name)              # in the middle of a call of the client's
        case ast.BinOp(left, kind, right) if type(kind) in OPERATORS:
            return OPERATORS[type(kind)](await value_of(left, peer), await value_of(right, peer))
    raise RpcError(1, f"not understood: {ast.unparse(node)}")


@server.method
async def calculate(peer, expression: str):
    """The value of an expression."""
    result = await value_of(ast.parse(expression, mode="eval").body, peer)
    await peer.notify("computed", expression, result)
    return result


@server.method
async def table(factor: float, rows: int = 3):
    """A multiplication table, row by row."""
    for number in range(1, rows + 1):
        yield f"{number} * {factor:g} = {number * factor:g}"


async def main():
    names, ours = {"x": 6, "y": 7}, Methods()
    ours.method(lambda name: names[name], name="lookup")
    ours.method(lambda expression, result: print(f"  (computed: {expression})"), name="computed")
    listening = await server.start_tcp_server(0)
    async with await RpcClient.connect(*listening.local, methods=ours) as client:
        print(await flowcoro.when_all(*(client.call("calculate", text) for text in ("x * y", "1 + 2", "x - y / 2"))))
        async for row in client.stream("table", factor=2.5):
            print(row)
        try:
            await client.proxy.calculate("2 ** 100")
        except RpcError as error:
            print(error)
    await server.close()


if __name__ == "__main__":
    flowcoro.run(main())
