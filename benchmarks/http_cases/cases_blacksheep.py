"""BlackSheep on uvicorn with uvloop and httptools. Run by ../http.py; harness.py says what each case does."""

import importlib.metadata
import re

from blacksheep import Application, Request, json

import cases_uvicorn
import harness


async def api(request: Request):
    return json(harness.answer(harness.converted(request.route_values), request.query["page"][0], request.query["q"][0],
                               request.cookies["session"], await request.json()))


def application():
    app = Application()
    for route in [*harness.OTHERS, *harness.ROUTES]:
        app.router.add_post(re.sub(r"\{(\w+):int\}", r"{int:\1}", route), api)
    return app


if __name__ == "__main__":
    harness.main(dict(api=lambda: cases_uvicorn.serve(application(), lifespan="on")), importlib.metadata.version("blacksheep"))
