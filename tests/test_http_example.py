"""The service in five minutes: examples/five_minutes.py by app.test_client(), and README's lines about it, as they are shown."""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request

import pytest

import flowcoro
from flowcoro_os import run_process
from test_net import PATIENCE, nothing_is_left_behind, run  # noqa: F401  (a fixture)

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLE, README = ROOT / "examples" / "five_minutes.py", ROOT / "README.md"


@pytest.fixture
def app(tmp_path, monkeypatch):
    """The application, with its database in an empty folder."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("five_minutes", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "five_minutes", module)
    spec.loader.exec_module(module)
    return module.app


# ---- as whoever writes such a service would test it ------------------------------------------------------------

def test_a_note_that_was_written_can_be_read(app):
    async def main():
        async with app.test_client() as client:
            response = await client.post("/notes", json={"text": "boil water"})
            assert (response.status, response.json()) == (201, {"id": 1, "text": "boil water"})
            assert (await client.get("/notes/1")).json() == {"id": 1, "text": "boil water"}

    run(main)


def test_notes_outlive_the_service(app):
    async def main():
        async with app.test_client() as client:
            await client.post("/notes", json={"text": "boil water"})
        async with app.test_client() as client:
            assert (await client.get("/notes/1")).json()["text"] == "boil water"

    run(main)


@pytest.mark.parametrize("note", [{"text": 7}, {"words": "x"}, {"text": "x", "more": 1}, ["x"]])
def test_what_is_no_note_is_refused(app, note):
    async def main():
        async with app.test_client() as client:
            assert (await client.post("/notes", json=note)).status == 422
            assert (await client.get("/notes/1")).status == 404

    run(main)


def test_a_file_of_notes_is_uploaded_by_a_form(app):
    async def main():
        async with app.test_client(follow_redirects=False) as client:
            response = await client.post("/notes/file", files={"file": ("tea.txt", b"boil water\npour it")})
            assert (response.status, response.headers["location"]) == (303, "/")
            assert [(await client.get(f"/notes/{number}")).json()["text"] for number in (1, 2)] == ["boil water", "pour it"]
            assert (await client.post("/notes/file", data={"file": "no file"})).status == 400

    run(main)


def test_events_tell_the_old_notes_and_then_each_new_one(app):
    async def main():
        async with app.test_client() as client:
            await client.post("/notes", json={"text": "boil water"})
            async with client.events("/events") as events:
                old = await anext(events)
                await client.post("/notes", json={"text": "pour it"})
                new = await anext(events)
        return [(event.id, event.data) for event in (old, new)]

    assert run(main) == [("1", '{"id":1,"text":"boil water"}'), ("2", '{"id":2,"text":"pour it"}')]


def test_who_was_cut_off_gets_what_it_has_missed(app):
    async def main():
        async with app.test_client() as client:
            for text in "boil water", "pour it", "wait":
                await client.post("/notes", json={"text": text})
            async with client.events("/events", last_event_id="2") as events:
                assert (await anext(events)).id == "3"

    run(main)


def test_the_page_listens_to_events(app):
    async def main():
        async with app.test_client() as client:
            response = await client.get("/")
            assert response.media_type.essence == "text/html" and 'EventSource("/events")' in response.text

    run(main)


# ---- what README says ------------------------------------------------------------------------------------------

def section():
    """README's text about it."""
    return re.search(r"^## A service in five minutes\n(.*?)^## ", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]


def test_readme_shows_the_example_as_it_is():
    [shown] = re.findall(r"^```python\n(.*?)^```$", section(), re.MULTILINE | re.DOTALL)
    assert EXAMPLE.read_text(encoding="utf-8").endswith(f'"""\n{shown}')


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_readme_shows_what_curl_is_answered(app):
    [session] = [text for text in re.findall(r"^```console\n(.*?)^```$", section(), re.MULTILINE | re.DOTALL) if "$ curl" in text]
    steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", session, re.MULTILINE)
    assert len(steps) > 3

    async def answer(command, url):
        done = await run_process(command.replace("http://127.0.0.1:8000", url), shell=True, timeout=PATIENCE)
        return done.stdout.decode().replace(url, "http://127.0.0.1:8000").rstrip("\n")

    async def main():
        async with await app.listen("127.0.0.1", 0) as server, flowcoro.TaskGroup() as group:
            group.spawn(server.serve())
            for command, shown in steps:
                found = await answer(command, server.url)
                if "--max-time" in command and found != shown.rstrip("\n"):         # a slow machine
                    found = await answer(command.replace("--max-time 1", "--max-time 20"), server.url)
                assert found == shown.rstrip("\n"), command
            server.close()

    run(main)


def test_what_readme_has_copied_serves(tmp_path):
    [session] = [text for text in re.findall(r"^```console\n(.*?)^```$", section(), re.MULTILINE | re.DOTALL) if "vendor" in text]
    vendor, copy, serve = [line.removeprefix("$ ") for line in session.splitlines()]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    function = f'python() {{ exec {shlex.quote(sys.executable)} -W error "$@"; }}\n'

    def shell(command, **more):
        return subprocess.Popen(["bash", "-c", function + command], cwd=tmp_path, env=environment | more, text=True,
                                stdout=subprocess.PIPE)

    for command in vendor, copy:
        with shell(command, PYTHONPATH=str(ROOT)) as done:
            done.communicate(timeout=PATIENCE)
        assert done.returncode == 0
    with shell(f"{serve} --port 0") as service:         # with what was copied only
        try:
            url = re.search(r"http://\S+", service.stdout.readline())[0]
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=PATIENCE) as response:
                assert b'EventSource("/events")' in response.read()
        finally:
            service.terminate()
            service.communicate(timeout=PATIENCE)
    assert service.returncode == 0 and (tmp_path / "notes" / "notes.db").exists()
