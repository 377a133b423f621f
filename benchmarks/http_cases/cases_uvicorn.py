"""uvicorn with uvloop and httptools, without a router. Run by ../http.py; harness.py says what each case does."""

import httptools            # noqa: F401  (uvicorn would do without, but this is what is measured)
import uvicorn
import uvloop               # noqa: F401

import harness


def serve(application, http="httptools", lifespan="off"):
    config = uvicorn.Config(application, loop="uvloop", http=http, ws="none", lifespan=lifespan, access_log=False,
                            log_level="warning", timeout_keep_alive=75)     # seconds, as nginx; by default 5, too few for `idle`
    uvicorn.Server(config).run(sockets=[harness.listener()])


if __name__ == "__main__":
    harness.main(dict(hello=lambda: serve(harness.hello_asgi)), uvicorn.__version__)
