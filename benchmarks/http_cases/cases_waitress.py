"""waitress, as it is without options. Run by ../http.py; harness.py says what each case does."""

import importlib.metadata

import waitress

import harness


def wsgi():
    waitress.serve(harness.hello_wsgi, sockets=[harness.listener()])


if __name__ == "__main__":
    harness.main(dict(wsgi=wsgi), importlib.metadata.version("waitress"))
