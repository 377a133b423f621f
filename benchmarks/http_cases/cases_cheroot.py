"""cheroot, as it is without options. Run by ../http.py; harness.py says what each case does."""

import cheroot
from cheroot import wsgi

import harness


def serve():
    server = wsgi.Server(("127.0.0.1", 0), harness.hello_wsgi, request_queue_size=harness.BACKLOG)
    server.prepare()
    harness.ready(server.bind_addr[1])
    server.serve()


if __name__ == "__main__":
    harness.main(dict(wsgi=serve), cheroot.__version__)
