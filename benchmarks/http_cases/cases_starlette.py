"""Starlette on uvicorn with uvloop and httptools. Run by ../http.py; harness.py says what each case does."""

import starlette
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import cases_uvicorn
import harness


async def api(request):
    return JSONResponse(harness.answer(request.path_params, request.query_params["page"], request.query_params["q"],
                                       request.cookies["session"], await request.json()))


def application():
    return Starlette(routes=[Route(route, api, methods=["POST"]) for route in [*harness.OTHERS, *harness.ROUTES]])


if __name__ == "__main__":
    harness.main(dict(api=lambda: cases_uvicorn.serve(application())), starlette.__version__)
