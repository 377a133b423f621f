"""FlowCoro's server and client. Run by ../http.py; harness.py says what each case does."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))    # the files beside this folder, whatever is installed

import flowcoro
import flowcoro_http

import harness


def serve(app, **options):
    app.run("127.0.0.1", harness.free_port(), **options)


def hello():
    app = flowcoro_http.HttpServer()

    @app.route("/")
    async def hello(request):
        return harness.TEXT

    serve(app)


def api():
    app = flowcoro_http.HttpServer()

    async def api(request, **found):
        return harness.answer(found, request.query.get("page"), request.query.get("q"), request.cookies["session"],
                              await request.json())

    for route in [*harness.OTHERS, *harness.ROUTES]:
        app.route(route, methods=["POST"])(api)
    serve(app)


def processes(count=2):
    app = flowcoro_http.HttpServer()

    @app.route("/")
    async def hello(request):
        return harness.work()

    serve(app, processes=count, reuse_port=True)        # one queue for all, and the first may accept all of wrk's connections


def wsgi():
    app = flowcoro_http.HttpServer()
    app.mount("/", flowcoro_http.wsgi_app(harness.hello_wsgi))
    serve(app)


def static():
    app = flowcoro_http.HttpServer()
    app.static("/files", harness.OPTIONS["files"])
    serve(app)


async def gather(*coroutines):
    async with flowcoro.TaskGroup() as group:
        for coro in coroutines:
            group.spawn(coro)


async def client():
    async with flowcoro_http.HttpClient() as client:
        async def get(url):
            response = await client.get(url)
            return response.status, response.content
        await harness.measure_client(get, gather)


CASES = dict(hello=hello, api=api, wsgi=wsgi, static=static, processes=processes,
             client=lambda: flowcoro.run(client(), workers=1))

if __name__ == "__main__":
    harness.main(CASES, flowcoro_http.__version__)
