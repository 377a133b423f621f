"""uvloop's server: asyncio's streams, word for word, on uvloop's event loop. Run by ../net.py."""

import uvloop

import harness
from cases_asyncio import HANDLERS, serve

if __name__ == "__main__":
    harness.main(HANDLERS, lambda handler: serve(handler, uvloop.run), uvloop.__version__)
