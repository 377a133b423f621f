"""Host a WSGI application beside handlers of one's own: an old shop, and a new page that is pushed to its clients.

The application blocks, so it runs in threads, at most eight at once; what it reads and writes goes over the connection while it
does. It may ask the kernel to run a coroutine meanwhile. `python -m flowcoro serve http_wsgi:shop` would serve it alone.
"""

import asyncio
import urllib.parse

import flowcoro
import flowcoro_net
from flowcoro_http import HttpServer, asgi_app, wsgi_app

STOCK = {"tea": 3}


async def ask_the_warehouse(article):
    await flowcoro.sleep(0.01)                      # another server, say
    return STOCK.get(article, 0)


def shop(environ, start_response):
    """Any WSGI application: Flask's and Django's are such functions, too."""
    article = environ["PATH_INFO"].strip("/")
    if environ["REQUEST_METHOD"] == "POST":
        form = urllib.parse.parse_qs(environ["wsgi.input"].read().decode())
        STOCK[article] = STOCK.get(article, 0) + int(form["count"][0])
    left = flowcoro.run_from_thread(ask_the_warehouse(article))
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{environ['SCRIPT_NAME']} has {left} of {article}\n".encode()]


async def impatient(scope, receive, send):
    """An ASGI application that needs asyncio: it is told so, and so is whoever reads the report of it on stderr."""
    try:
        await asyncio.sleep(1)
    except RuntimeError as error:
        await send({"type": "http.response.start", "status": 503})
        await send({"type": "http.response.body", "body": f"asyncio: {error}\n".encode()})


async def main():
    app = HttpServer()
    app.mount("/shop", wsgi_app(shop, threads=8))
    app.mount("/impatient", asgi_app(impatient))
    async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
        group.spawn(server.serve())
        for line, content in ("GET /shop/tea", ""), ("POST /shop/tea", "count=4"), ("GET /impatient", ""):
            async with await flowcoro_net.Socket.connect(*server.local) as sock:
                head = f"{line} HTTP/1.1\r\nHost: example\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
                await sock.write((head + content).encode())
                print((await sock.read_until(b"\r\n\r\n")).decode().splitlines()[0], "|", (await sock.read()).decode(), end="")
        server.close()


if __name__ == "__main__":
    flowcoro.run(main())
