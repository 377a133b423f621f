"""uvicorn with uvloop and h11, without a router. Run by ../http.py; harness.py says what each case does."""

import h11
import uvicorn

import cases_uvicorn
import harness

if __name__ == "__main__":
    harness.main(dict(hello=lambda: cases_uvicorn.serve(harness.hello_asgi, "h11")),
                 f"{uvicorn.__version__} with h11 {h11.__version__}")
