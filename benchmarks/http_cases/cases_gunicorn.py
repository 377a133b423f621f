"""gunicorn with one synchronous worker. Run by ../http.py; harness.py says what each case does."""

import gunicorn
from gunicorn.app.base import BaseApplication

import harness


class Hello(BaseApplication):
    def load_config(self):
        for name, value in dict(bind=f"127.0.0.1:{harness.free_port()}", workers=1, worker_class="sync", backlog=harness.BACKLOG,
                                loglevel="warning").items():
            self.cfg.set(name, value)

    def load(self):
        return harness.hello_wsgi


if __name__ == "__main__":
    harness.main(dict(wsgi=lambda: Hello().run()), gunicorn.__version__)
