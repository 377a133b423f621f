"""aiohttp's server and client with uvloop. Run by ../http.py; harness.py says what each case does."""

import asyncio
import re

import aiohttp
import uvloop
from aiohttp import web

import harness


async def hello(request):
    return web.Response(text=harness.TEXT)


async def api(request):
    return web.json_response(harness.answer(harness.converted(request.match_info), request.query["page"], request.query["q"],
                                            request.cookies["session"], await request.json()))


def application(*, hello_too=False):
    app = web.Application()
    if hello_too:
        app.router.add_get("/", hello)
    else:
        for route in [*harness.OTHERS, *harness.ROUTES]:
            app.router.add_post(re.sub(r"\{(\w+):int\}", r"{\1:[0-9]+}", route), api)
    return app


async def serve(app):
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, harness.listener()).start()
    await asyncio.Event().wait()


async def client():
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=harness.TASKS)) as session:
        async def get(url):
            async with session.get(url) as response:
                return response.status, await response.read()
        await harness.measure_client(get, asyncio.gather)


if __name__ == "__main__":
    harness.main(dict(hello=lambda: uvloop.run(serve(application(hello_too=True))), api=lambda: uvloop.run(serve(application())),
                      client=lambda: uvloop.run(client())), aiohttp.__version__)
