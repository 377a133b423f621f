"""nginx in one process; its settings are Debian's but for log and limits. Run by ../http.py; harness.py says what it does."""

import os
import pathlib
import shutil
import subprocess

import harness

SETTINGS = """
daemon off;
master_process off;
worker_rlimit_nofile {descriptors};
pid {folder}/nginx.pid;
events {{ worker_connections {descriptors}; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_timeout 75s;
    keepalive_requests 1000000000;
    default_type text/plain;
    charset utf-8;
    client_body_temp_path {folder}/client;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} backlog={backlog};
        location = / {{ return 200 "{text}"; }}
        location /files/ {{ alias {files}/; }}
    }}
}}
"""


def version():
    if not shutil.which("nginx"):
        raise SystemExit("there is no `nginx`: apt-get install nginx-light")
    return subprocess.run(["nginx", "-v"], capture_output=True, text=True).stderr.strip().rpartition("/")[2]


def serve():
    folder = pathlib.Path(harness.OPTIONS["folder"])
    port = harness.free_port()
    settings = folder / f"nginx-{port}.conf"
    settings.write_text(SETTINGS.format(folder=folder, files=harness.OPTIONS["files"], port=port, text=harness.TEXT,
                                        backlog=harness.BACKLOG, descriptors=20_000))
    os.execvp("nginx", ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(settings)])


if __name__ == "__main__":
    harness.main(dict(hello=serve, static=serve), version)
