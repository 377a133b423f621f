"""`python -m flowcoro`: every command, every scene of the demo, every way to ask for the wrong thing."""

import io
import json
import os
import pathlib
import pty
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import urllib.request

import pytest

import flowcoro
import flowcoro_cli
import flowcoro_net
import flowcoro_rpc
import flowcoro_websocket

ROOT = pathlib.Path(flowcoro_cli.__file__).resolve().parent
PATIENCE = 120              # seconds until a program counts as hanging; the slowest needs about ten

SMALL = {"COROUTINES": 2_000, "THREADS": 20, "ROUNDS": 1, "CLIENTS": 30, "MESSAGES": 3, "REQUESTS": 200, "HEAD_SECONDS": 0.2,
         "LISTENERS": 20}


def environment(**more):
    """No setting of Python's, and no terminal's, leaks in from outside."""
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith("PYTHON") and name not in ("NO_COLOR", "TERM")}
    return {**clean, "PYTHONIOENCODING": "utf-8", **more}


def python(*arguments, cwd=ROOT):
    """Run this interpreter in the folder `cwd`, warnings as errors: the CompletedProcess, output as text."""
    return subprocess.run([sys.executable, "-W", "error", *map(str, arguments)], cwd=cwd, env=environment(),
                          stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=PATIENCE)


def start(*arguments, **settings):
    """Start `python -m flowcoro …` in a session of its own and return the Popen."""
    return subprocess.Popen([sys.executable, "-W", "error", "-m", "flowcoro", *arguments], cwd=ROOT,
                            env=environment(), stdin=subprocess.DEVNULL, encoding="utf-8",
                            start_new_session=True, **settings)


@pytest.fixture
def cli(capsys):
    """Call main() in this process: cli("demo", "--list") -> (exit status, stdout, stderr)."""
    def call(*arguments):
        capsys.readouterr()
        status = flowcoro_cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def small(monkeypatch):
    """The demo with small numbers."""
    for name, value in SMALL.items():
        monkeypatch.setattr(flowcoro_cli, name, value)


def small_demo(*names, package="", cwd=ROOT):
    """Run these scenes with small numbers in a process of its own.

    The deadlock scene needs that: pytest's watchdog is a thread, and nothing is a deadlock while there is a
    thread that might yet wake a task.
    """
    program = f"import {package}flowcoro_cli as cli; vars(cli).update({SMALL}); exit(cli.main())"
    return python("-c", program, "demo", *names, cwd=cwd)


@pytest.fixture
def sibling(monkeypatch):
    """Put a module beside the others, without a file: sibling("flowcoro_extra", name=value, …)."""
    def add(name, **contents):
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return add


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder that the command line takes for its own: tree({"flowcoro_x.py": text, …})."""
    here = tmp_path / "here"
    monkeypatch.setattr(flowcoro_cli, "HERE", here)

    def write(files):
        for name, text in files.items():
            path = here / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return here
    return write


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                  if path.is_file() and path.suffix != ".pyc")


# ---- the command line --------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_or_with_help_it_lists_the_commands(cli, arguments):
    status, out, err = cli(*arguments)
    assert (status, err) == (0, "")
    for name, (_, _, line) in flowcoro_cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", out, re.MULTILINE)


def test_it_tells_its_version(cli):
    assert cli("--version") == (0, f"flowcoro {flowcoro.__version__}\n", "")


def test_an_unknown_command_names_the_nearest_and_exits_2(cli):
    status, out, err = cli("vendro")
    assert (status, out) == (2, "")
    assert "'vendro'" in err and "did you mean vendor?" in err and "demo" in err


def test_an_unknown_command_far_from_all_lists_the_known(cli):
    status, _, err = cli("xyzzy")
    assert status == 2 and "did you mean" not in err and "demo, vendor, bench" in err


@pytest.mark.parametrize("command", ["demo", "vendor"])
def test_a_command_explains_itself(cli, command):
    status, out, _ = cli(command, "--help")
    assert status == 0 and f"usage: python -m flowcoro {command}" in out


@pytest.mark.parametrize("arguments", [["demo", "--no-such"], ["vendor"], ["vendor", "x", "--no-such"]])
def test_a_wrong_option_exits_2(cli, arguments):
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "") and "usage:" in err


def test_a_command_whose_file_is_missing_says_which_to_copy_and_exits_2(cli, monkeypatch):
    monkeypatch.setitem(flowcoro_cli.COMMANDS, "serve", ("flowcoro_nowhere", "serve", "serve a folder"))
    status, out, err = cli("serve", ".")
    assert (status, out) == (2, "")
    assert "flowcoro_nowhere.py" in err and "copy" in err and str(ROOT) in err
    assert "serve a folder" in cli("--help")[1]


def test_a_command_whose_file_lacks_something_else_shows_that_error(cli, monkeypatch, tmp_path):
    (tmp_path / "flowcoro_lacking.py").write_text("import flowcoro_not_there_either\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(flowcoro_cli.COMMANDS, "serve", ("flowcoro_lacking", "serve_command", ""))
    with pytest.raises(ModuleNotFoundError, match="flowcoro_not_there_either"):
        cli("serve")


def test_a_command_of_another_module_gets_its_arguments_and_gives_the_exit_status(cli, monkeypatch, sibling):
    sibling("flowcoro_extra", extra_command=lambda arguments: print(arguments) or 7)
    monkeypatch.setitem(flowcoro_cli.COMMANDS, "extra", ("flowcoro_extra", "extra_command", ""))
    assert cli("extra", "a", "--b") == (7, "['a', '--b']\n", "")


@pytest.mark.parametrize("error, status", [
    (KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (SystemExit(143), 143), (SystemExit(None), 0),
    (SystemExit("why"), 1),
])
def test_what_ends_a_command_becomes_the_exit_status(monkeypatch, sibling, error, status):
    def end(arguments):
        raise error
    sibling("flowcoro_extra", extra_command=end)
    monkeypatch.setitem(flowcoro_cli.COMMANDS, "extra", ("flowcoro_extra", "extra_command", ""))
    with open(os.devnull, "w") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        assert flowcoro_cli.main(["extra"]) == status


@pytest.mark.parametrize("module", ["flowcoro", "flowcoro_cli"])
def test_both_files_run_as_a_module_and_as_a_script(module):
    for arguments in ["-m", module], [ROOT / f"{module}.py"]:
        done = python(*arguments, "--version")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"flowcoro {flowcoro.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--list"], ["demo", "deadlock"], ["demo", "-h"]])
def test_a_reader_that_has_gone_gets_no_traceback(arguments):
    # As `python -m flowcoro … | head -1`, but nothing depends on how fast the reader leaves.
    read_end, write_end = os.pipe()
    os.close(read_end)
    with start(*arguments, stdout=write_end, stderr=subprocess.PIPE) as process:
        os.close(write_end)
        assert process.communicate(timeout=PATIENCE)[1] == ""
    assert process.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no file that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--list"], ["demo", "deadlock"]])
def test_a_full_disk_is_said_in_one_line(arguments):
    with open("/dev/full", "w") as full, start(*arguments, stdout=full, stderr=subprocess.PIPE) as process:
        said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1 and said.startswith("flowcoro: cannot write: ") and said.count("\n") == 1, said


# ---- demo --------------------------------------------------------------------------------------------------

def test_the_whole_demo_runs_in_a_pipe():
    done = small_demo()                 # with its own numbers it takes 6 s: `python -m flowcoro demo`, which .ci/run does
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    count = len(flowcoro_cli.SCENES)
    places = [done.stdout.index(f"/{count} {name}: {line}") for name, (_, _, line) in flowcoro_cli.SCENES.items()]
    assert places == sorted(places)
    assert done.stdout.count("Look at ") == len(flowcoro_cli.SCENES)
    assert "FAILED" not in done.stdout


def test_the_demo_ends_with_what_to_read_next_and_names_only_what_is_there():
    done = small_demo("deadlock")
    named = re.findall(r"^    (\S+) ", done.stdout.partition("Where to read next:")[2], re.MULTILINE)
    assert done.returncode == 0 and "flowcoro.py" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_scenes_can_be_listed(cli):
    status, out, _ = cli("demo", "--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(flowcoro_cli.SCENES)


def alone(name):
    """What a scene shows when it runs alone."""
    done = small_demo(name)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"1/1 {name}: " in done.stdout and done.stdout.count("Look at ") == 1
    return done.stdout


@pytest.mark.parametrize("name", [name for name in flowcoro_cli.SCENES if name not in ("breaker", "http", "timeouts", "workers")])
def test_one_scene_runs_alone_and_says_what_to_look_at(name):
    alone(name)


def test_several_scenes_run_in_the_order_asked_for():
    done = small_demo("deadlock", "echo")
    assert 0 < done.stdout.index("1/2 deadlock") < done.stdout.index("2/2 echo")


def test_an_unknown_scene_names_the_nearest_and_nothing_runs(cli):
    status, out, err = cli("demo", "deadlock", "timeuots")
    assert (status, out) == (2, "")
    assert "did you mean timeouts?" in err


def test_a_scene_of_another_module_is_part_of_the_demo(cli, monkeypatch, sibling):
    sibling("flowcoro_extra", scene_extra=lambda screen: screen.say("hello from elsewhere"))
    monkeypatch.setitem(flowcoro_cli.SCENES, "extra", ("flowcoro_extra", "scene_extra", "a scene"))
    status, out, _ = cli("demo", "extra")
    assert status == 0 and "hello from elsewhere" in out
    assert "extra" in cli("demo", "--list")[1]


def test_a_scene_that_fails_says_so_and_the_next_one_runs_and_the_exit_status_is_1(cli, monkeypatch, sibling):
    sibling("flowcoro_extra", bad=lambda screen: screen.check(1 == 2, "one is not two"),
            good=lambda screen: screen.check(1 == 1, "one is one"))
    monkeypatch.setitem(flowcoro_cli.SCENES, "bad", ("flowcoro_extra", "bad", "a scene"))
    monkeypatch.setitem(flowcoro_cli.SCENES, "good", ("flowcoro_extra", "good", "a scene"))
    status, out, _ = cli("demo", "bad", "good")
    assert status == 1
    assert "FAILED: one is not two" in out and "2/2 good" in out and "Failed: bad." in out


def test_a_scene_whose_file_is_missing_is_left_out_of_the_demo(cli, monkeypatch, sibling):
    sibling("flowcoro_extra", scene_extra=lambda screen: screen.say("hello from elsewhere"))
    monkeypatch.setattr(flowcoro_cli, "SCENES", {
        "http": ("flowcoro_nowhere", "scene_http", "a server"),
        "extra": ("flowcoro_extra", "scene_extra", "a scene"),
    })
    status, out, _ = cli("demo")
    assert status == 0
    assert "Left out: this needs flowcoro_nowhere.py" in out and "2/2 extra" in out


def test_a_scene_whose_file_is_missing_exits_2_when_asked_for(cli, monkeypatch):
    monkeypatch.setitem(flowcoro_cli.SCENES, "http", ("flowcoro_nowhere", "scene_http", "a server"))
    status, out, err = cli("demo", "deadlock", "http")
    assert (status, out) == (2, "") and "flowcoro_nowhere.py" in err


def wait_for_child(process):
    """Until it measures in a process of its own: a Ctrl-C inside of Popen() leaves a pipe open, and a warning of that."""
    tasks = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + PATIENCE
    while not any(b"_measure_" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes() for child in tasks.read_text().split()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(0.05)            # from the child's exec to the end of Popen()


@pytest.mark.parametrize("scene", ["threads", "echo", "http", "chat", "timeouts"])
def test_ctrl_c_ends_the_demo_with_130_and_one_line(scene):
    with start("demo", scene, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while "Look at" not in process.stdout.readline():
            assert process.poll() is None
        if scene == "threads":
            wait_for_child(process)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, "\nflowcoro: interrupted\n")


# ---- the scenes --------------------------------------------------------------------------------------------

def fake_costs(monkeypatch, coroutine, thread):
    """Let the measurements return these (seconds, bytes) per unit."""
    def in_child(function, count):
        seconds, size = coroutine if "coroutines" in function else thread
        return {"count": count, "seconds": count * seconds, "bytes": count * size}
    monkeypatch.setattr(flowcoro_cli, "_in_child", in_child)


def test_coroutines_five_times_cheaper_are_called_so(cli, monkeypatch):
    fake_costs(monkeypatch, (5e-6, 1000), (50e-6, 20000))
    status, out, _ = cli("demo", "threads")
    assert status == 0 and "cheaper: 10.0 times less time, 20.0 times less memory" in out


@pytest.mark.parametrize("thread", [(20e-6, 20000), (50e-6, 4000)])
def test_coroutines_that_are_not_five_times_cheaper_are_called_so(cli, monkeypatch, thread):
    fake_costs(monkeypatch, (5e-6, 1000), thread)
    status, out, _ = cli("demo", "threads")
    assert status == 0 and "NOT 5 times cheaper" in out


def test_where_memory_cannot_be_measured_the_time_decides(cli, monkeypatch):
    fake_costs(monkeypatch, (5e-6, 0), (50e-6, 0))
    status, out, _ = cli("demo", "threads")
    assert status == 0 and "cheaper: 10.0 times less time, memory unknown" in out


def test_coroutines_that_do_not_come_back_fail_the_scene(cli, monkeypatch):
    monkeypatch.setattr(flowcoro_cli, "_in_child", lambda *_: {"count": 9, "seconds": 1, "bytes": 1})
    status, out, _ = cli("demo", "threads")
    assert status == 1 and "FAILED" in out and "9 of 100,000 coroutines" in out


def test_a_measurement_that_crashes_fails_the_scene_with_its_last_words(cli, monkeypatch):
    monkeypatch.setattr(flowcoro_cli, "COROUTINES", "'many'")
    monkeypatch.setattr(flowcoro_cli, "THREADS", 1)
    status, out, _ = cli("demo", "threads")
    assert status == 1 and "FAILED" in out and "Error: " in out


def test_a_system_that_allows_few_threads_is_measured_with_those(cli, monkeypatch):
    monkeypatch.setattr(flowcoro_cli, "_in_child", lambda function, count: {
        "count": count if "coroutines" in function else 9, "seconds": 1, "bytes": 10**9})
    status, out, _ = cli("demo", "threads")
    assert status == 0 and re.search(r"^ +9 threads", out, re.MULTILINE)


def limit_of_open_files(monkeypatch, soft, hard):
    """A stand-in for the module `resource`; returns the list of limits that were set."""
    limits = [(soft, hard)]
    monkeypatch.setattr(flowcoro_cli, "resource", types.SimpleNamespace(
        RLIM_INFINITY=-1, RLIMIT_NOFILE=7, getrlimit=lambda which: limits[-1],
        setrlimit=lambda which, pair: limits.append(pair)))
    return limits


def test_the_echo_scene_makes_do_with_the_open_files_it_may_have(cli, monkeypatch):
    limits = limit_of_open_files(monkeypatch, 64, 100)
    status, out, _ = cli("demo", "echo")
    assert status == 0 and limits[1:] == [(100, 100)]
    assert "allows 18 clients, not 1,000" in out and "18 clients, 180 messages" in out


@pytest.mark.parametrize("soft, hard, wanted", [
    (64, -1, [(124, -1)]), (64, 4096, [(124, 4096)]), (124, 4096, []), (-1, -1, []),
])
def test_the_echo_scene_raises_the_limit_of_open_files_no_further_than_needed(
        cli, small, monkeypatch, soft, hard, wanted):
    limits = limit_of_open_files(monkeypatch, soft, hard)
    status, out, _ = cli("demo", "echo")
    assert status == 0 and limits[1:] == wanted and "30 clients, 90 messages" in out


def test_the_pipeline_scene_fails_if_its_counts_differ_from_the_plain_loop(cli, monkeypatch):
    async def lose_everything(texts, counts, progress):
        async for _ in texts:
            pass
    monkeypatch.setattr(flowcoro_cli, "_count_words", lose_everything)
    status, out, _ = cli("demo", "pipeline")
    assert status == 1 and "FAILED: the pipeline and the plain loop counted different words" in out


def test_the_echo_scene_fails_if_a_reply_is_wrong(cli, small, monkeypatch):
    async def shout(sock):
        while data := await sock.read():
            await sock.write(data.upper())
    monkeypatch.setattr(flowcoro_cli, "_echo", shout)
    status, out, _ = cli("demo", "echo")
    assert status == 1 and "FAILED: 0 of 90 messages came back as they were sent" in out


def test_the_echo_scene_fails_in_one_line_if_its_clients_are_refused(cli, small, monkeypatch):
    call = flowcoro_cli._call
    with socket.socket() as silent:                              # bound, but it does not listen
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setattr(flowcoro_cli, "_call", lambda net, _, *rest: call(net, silent.getsockname(), *rest))
        status, out, err = cli("demo", "echo")
    assert (status, err) == (1, "")
    assert re.search(r"FAILED: no TCP on 127.0.0.1 here: .*refused$", out, re.MULTILINE)


def test_the_http_scene_shows_what_it_was_answered(cli, small):
    status, out, _ = cli("demo", "http")
    assert status == 0
    rows = [r"GET /teas/3 +200", r"GET /teas/three +404", r"DELETE /teas/3 +405", r'POST /orders .*"two"} +422',
            r"Content-Length.* 400 ", r"GET /events +200  events while the others ask: \d+, \d+, \d+", r"200 requests over 64 ",
            r"50 that .* 408 after"]
    assert [row for row in rows if not re.search(rf"^  {row}", out, re.MULTILINE)] == []


@pytest.mark.parametrize("answer", [(404, "no tea today"), (200, "coffee")])
def test_the_http_scene_fails_if_an_answer_is_wrong(cli, small, monkeypatch, answer):
    def teahouse(http, head_timeout):
        app = honest(http, head_timeout)

        @app.middleware
        async def spoil(request, call_next):
            return answer if request.path == "/orders" else await call_next(request)
        return app

    honest = flowcoro_cli._teahouse
    monkeypatch.setattr(flowcoro_cli, "_teahouse", teahouse)
    status, out, _ = cli("demo", "http")
    assert status == 1 and f"was answered with {answer[0]}, not 201" in out and "FAILED" in out


def test_the_http_scene_fails_in_one_line_if_its_connections_break(cli, small, monkeypatch):
    async def refuse(*address, **options):
        raise flowcoro_net.BrokenError("the peer has gone")

    monkeypatch.setattr(flowcoro_net.Socket, "connect", refuse)
    status, out, err = cli("demo", "http")
    assert (status, err) == (1, "") and "the peer has gone" in re.search("FAILED: .*", out)[0]


def test_the_http_scene_fails_if_slow_heads_are_not_cut_off(cli, small, monkeypatch):
    patient = flowcoro_cli._teahouse
    monkeypatch.setattr(flowcoro_cli, "_teahouse", lambda http, head_timeout: patient(http, 60.0))
    monkeypatch.setattr(flowcoro_cli, "HEAD_SECONDS", 0.1)
    status, out, _ = cli("demo", "http")
    assert status == 1 and "FAILED: timeout(1)" in out


def test_the_http_scene_makes_do_with_the_open_files_it_may_have(cli, small, monkeypatch):
    limit_of_open_files(monkeypatch, 64, 100)
    status, out, _ = cli("demo", "http")
    assert status == 0 and "200 requests over 10 connections" in out and "  8 that sent" in out


def test_the_http_scene_is_kept_until_ctrl_c():
    with start("demo", "http", "--keep", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for line in process.stdout:
            if found := re.search(r"curl -i (http://127\.0\.0\.1:\d+)/teas/3", line):
                break
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{found[1]}/teas/2", timeout=PATIENCE) as response:
            assert json.load(response) == {"number": 2, "tea": "Darjeeling"}
        with opener.open(f"{found[1]}/", timeout=PATIENCE) as response:
            assert b"<h1>Teahouse</h1>" in response.read()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "") and "Closed." in out


def test_the_chat_scene_shows_what_is_said_and_who_is_closed(cli, small):
    status, out, _ = cli("demo", "chat")
    assert status == 0
    rows = [r" +Ada: Is anybody here\?", r" +Ben: .*☕", r"Each of the 3 has heard all 5 lines", r"Origin: https://else\S+ +403 ",
            r"a text with .* 1007 ", r"One line reached 20 listeners", r"one who reads nothing +1013  closed after \d+ long"]
    assert [row for row in rows if not re.search(rf"^  {row}", out, re.MULTILINE)] == []


def deaf(websocket):
    """The module, whose broadcast() tells the last who came nothing."""
    def broadcast(members, message, **options):
        return websocket.broadcast(list(members)[:-1], message, **options)

    return types.SimpleNamespace(accept=websocket.accept, broadcast=broadcast)


def open_to_all(websocket):
    async def accept(request, **options):
        return await websocket.accept(request, origins=["*"], **options)

    return types.SimpleNamespace(accept=accept, broadcast=websocket.broadcast)


@pytest.mark.parametrize(("spoilt", "said"), [
    (deaf, "timeout(0.5)"), (open_to_all, "a page from elsewhere was answered with None, not 403")])
def test_the_chat_scene_fails_if_the_room_is_not_what_it_should_be(cli, small, monkeypatch, spoilt, said):
    honest = flowcoro_cli._chat
    monkeypatch.setattr(flowcoro_cli, "_chat", lambda http, websocket, heard: honest(http, spoilt(websocket), heard))
    monkeypatch.setattr(flowcoro_cli, "CHILD_TIMEOUT", 0.5 if spoilt is deaf else 60)
    status, out, err = cli("demo", "chat")
    assert (status, err) == (1, "") and f"FAILED: {said}" in out


def test_the_chat_scene_fails_if_who_reads_nothing_is_kept(cli, small, monkeypatch):
    monkeypatch.setattr(flowcoro_cli, "DREAMS", 3)
    status, out, _ = cli("demo", "chat")
    assert status == 1 and "FAILED: who reads nothing was still kept after 3 long lines" in out


def test_the_chat_scene_makes_do_with_the_open_files_it_may_have(cli, small, monkeypatch):
    limit_of_open_files(monkeypatch, 64, 80)
    status, out, _ = cli("demo", "chat")
    assert status == 0 and "One line reached 8 listeners" in out


def test_the_chat_scene_is_kept_until_ctrl_c_and_somebody_is_there():
    async def visit(host):
        async with flowcoro_websocket.connect(f"ws://{host}/room?name=Eve") as ws:
            await ws.send("anything")
            return [json.loads(await ws.receive()) for _ in range(3)]

    with start("demo", "chat", "--keep", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for line in process.stdout:
            if found := re.search(r"Open http://(127\.0\.0\.1:\d+)/ in a browser", line):
                break
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{found[1]}/", timeout=PATIENCE) as response:
            page = response.read().decode()
        here, said, answer = flowcoro.run(visit(found[1]))
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert '<label for="text">' in page and not re.search(r"(src|href)=\"(?!data:)", page)        # nothing comes from elsewhere
    assert "Eve" in here["here"] and said == {"who": "Eve", "text": "anything"} and answer["who"] == "Ben"
    assert (process.returncode, err) == (0, "") and "Eve: anything" in out and "Closed." in out


def test_the_breaker_scene_runs_alone_and_draws_a_row_for_each_three_seconds_of_either_shop():
    rows = re.findall(r"^ +(\d+) s  (#*) +(\d+) +(\d+) %   (#*) +(\d+) +(\d+) %  ([A-Z_ ]+)$", alone("breaker"), re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(0, 60, 3))
    assert rows[0][1:] == ("###", "10", "0", "###", "10", "0", "CLOSED")
    assert all(int(row[2]) > 30 and row[3] == "100" and row[5:] == ("10", "0", "CLOSED") for row in rows[-3:])
    assert {state for row in rows for state in row[7].split()} == {"CLOSED", "OPEN", "HALF_OPEN"}


@pytest.mark.parametrize(("both", "said"), [
    (flowcoro_cli._Outage.ALONE, "with policies questions were still lost 5 s after the outage"),
    (flowcoro_cli._Outage.WITH, "with retries alone the store has recovered")])
def test_the_breaker_scene_fails_if_both_shops_do_alike(cli, monkeypatch, both, said):
    policy = flowcoro_cli._Outage.policy
    monkeypatch.setattr(flowcoro_cli._Outage, "policy", lambda self, name: policy(self, both))
    status, out, err = cli("demo", "breaker")
    assert (status, err) == (1, "") and f"FAILED: {said}" in out


def test_the_rpc_scene_shows_what_either_side_sees(cli):
    status, out, _ = cli("demo", "rpc")
    assert status == 0
    rows = [r"calls brew\('Oolong', 6\)", r" {38}brews Earl Grey", r"has a pot of Earl Grey\n  has a pot of Oolong",
            r" {38}calls the guest: sugar\?\n  is called: sugar\('Assam'\), answers 2\n  has Assam with 2 lumps",
            r" {38}stops after \d+ cups", r"TimeoutError\n {40}cancelled: empties the pot of Pu-erh",
            r" {38}is shut", r"ConnectionLost, sent=(True|None)\n", r"ConnectionLost, sent=False\n"]
    assert [row for row in rows if not re.search(rf"^  {row}", out, re.MULTILINE)] == []


class NothingRan(flowcoro_rpc.ConnectionLost):
    sent = property(lambda self: False, lambda self, sent: None)


@pytest.mark.parametrize(("method", "instead", "said"), [
    ("brew", lambda tea, minutes: tea, "the answers were ['Oolong', 'Earl Grey']"),
    ("order", lambda tea: tea, "the answer to a call with a call in it was 'Assam'"),
    ("pour", lambda cups: ["cup 0"] * 3, "the stream began with ['cup 0', 'cup 0', 'cup 0']")])
def test_the_rpc_scene_fails_if_an_answer_is_not_what_it_should_be(cli, monkeypatch, method, instead, said):
    class Spoilt(flowcoro_rpc.RpcServer):
        def method(self, function):
            return super().method(instead if function.__name__ == method else function, name=function.__name__)

    monkeypatch.setattr(flowcoro_rpc, "RpcServer", Spoilt)
    status, out, err = cli("demo", "rpc")
    assert (status, err) == (1, "") and f"FAILED: {said}" in out


def test_the_rpc_scene_fails_if_it_is_not_told_that_a_call_has_run(cli, monkeypatch):
    monkeypatch.setattr(flowcoro_rpc, "ConnectionLost", NothingRan)
    status, out, err = cli("demo", "rpc")
    assert (status, err) == (1, "") and "FAILED: what was lost is told wrong: sent=False of a call that ran" in out


def test_the_rpc_scene_fails_if_a_stream_runs_ahead(cli, monkeypatch):
    monkeypatch.setattr(flowcoro_cli, "AHEAD", 2)
    status, out, _ = cli("demo", "rpc")
    assert status == 1 and re.search(r"FAILED: \d+ cups were poured for one who took 3", out)


def test_the_timeouts_scene_draws_a_row_per_task(cli):
    _, out, _ = cli("demo", "timeouts")
    for row in [r"quick +=+\| .* finished by itself", r"impatient +=+x .* TimeoutError",
                r"nested +=+x .* the outer of two timeouts", r"cancelled +=+x .* cancelled with its group",
                r"careful +=+~+\| .* shielded cleanup"]:
        assert re.search(row, out)


def test_the_workers_scene_draws_a_lane_per_worker_and_the_tasks_that_leave_the_blocked_one(cli):
    status, out, _ = cli("demo", "workers")
    lanes = re.findall(r"^  worker \d  (\S+)$", out, re.MULTILINE)
    assert status == 0 and len(lanes) >= 2
    assert "The watchdog: task 'thoughtless' has held worker" in out
    assert sum("xx" in lane for lane in lanes) == 1
    assert any(re.search("[A-E]", lane) for lane in lanes if "xx" not in lane)


def lanes(steps):
    """A _Lanes that is six characters wide, with these (from, until, character) on one worker."""
    drawn = flowcoro_cli._Lanes(None)
    drawn.WIDTH, drawn.lanes = 6, {1: steps}
    return drawn


@pytest.mark.parametrize("row", ["aabbcc", "AabBcc"])
def test_each_task_has_its_colour_in_a_lane_on_a_terminal(monkeypatch, row):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    drawn = lanes([(place, place + 1, letter) for place, letter in enumerate(row)])
    assert list(drawn.draw(flowcoro_cli.Screen(io.StringIO()).colour)) == [f"worker 1  {row}"]
    [text] = drawn.draw(flowcoro_cli.Screen(Terminal()).colour)
    runs = re.findall(r"\x1b\[(\d+)m(\w+)\x1b\[0m", text)
    assert [letters for _, letters in runs] == [row[:2], row[2:4], row[4:]]
    assert len({code for code, _ in runs}) == 3


def test_a_step_as_wide_as_a_character_is_seen_in_its_lane_and_so_is_a_capital_letter():
    assert list(lanes([(0.5, 1.9, "a"), (1.9, 3.3, "b"), (3.3, 4.7, "c"), (4.7, 6, "d")]).draw(False)) == ["worker 1  abbcdd"]
    assert list(lanes([(0, 2, "a"), (2.1, 2.5, "B"), (2.5, 2.9, "c"), (6, 6, "d")]).draw(False)) == ["worker 1  aaB..d"]


def test_steps_that_several_workers_note_at_the_same_time_are_all_counted():
    class Slow(int):
        """A number to which nothing can be added at once."""

        def __add__(self, other):
            time.sleep(0.005)
            return Slow(int(self) + other)

    async def note(lanes, letter):
        lanes.ran(flowcoro.now(), letter)

    async def main():
        lanes = flowcoro_cli._Lanes(None)
        lanes.taken_over, lanes.blocked = Slow(), "the thread of nobody here"
        async with flowcoro.TaskGroup() as group:
            for letter in "abcde" * 4:
                group.spawn(note(lanes, letter))
        return lanes

    noted = flowcoro.run(main(), workers=3)
    assert (noted.taken_over, sum(map(len, noted.lanes.values()))) == (20, 20)


def test_the_deadlock_scene_shows_the_report():
    done = small_demo("deadlock")
    report = "\n".join(re.findall(r"^  \| (.*)", done.stdout, re.MULTILINE))
    assert "there: parked: acquire a Lock" in report and "back: parked: acquire a Lock" in report
    assert "How to read it" in done.stdout


def test_the_deadlock_scene_fails_if_the_report_does_not_say_what_the_tasks_wait_for(cli, monkeypatch):
    def run(coroutine):
        coroutine.close()
        raise flowcoro.Deadlock("there is no Traceback")
    monkeypatch.setattr(flowcoro, "run", run)
    status, out, _ = cli("demo", "deadlock")
    assert status == 1 and "FAILED: the report does not say what `there` waits for" in out


# ---- the screen --------------------------------------------------------------------------------------------

class Terminal(io.StringIO):
    def isatty(self):
        return True


def draw(stream):
    screen = flowcoro_cli.Screen(stream)
    screen.say("before", "bold")
    for step in range(1001):
        screen.progress(step, 1000)
    screen.say("after")
    return stream.getvalue()


def test_a_terminal_gets_a_bar_that_goes_away_and_colour(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    drawn = draw(Terminal())
    assert drawn.startswith("\x1b[1m  before\x1b[0m\n\r  [....")
    assert "####]   100%" in drawn.replace("] 100", "]   100")
    last_bar, blank, after = drawn.split("\r")[-3:]
    assert blank.isspace() and len(blank) >= len(last_bar) and after == "  after\n"


def test_an_empty_line_has_no_colour(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    flowcoro_cli.Screen(stream).say("\ntitle", "bold")
    assert stream.getvalue() == "\n\x1b[1m  title\x1b[0m\n"


def test_the_bar_is_drawn_only_when_it_changes(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert draw(Terminal()).count("\r") == flowcoro_cli.Screen.BAR + 1 + 2


def test_no_color_keeps_the_bar_and_loses_the_colour(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    drawn = draw(Terminal())
    assert "\r" in drawn and "\x1b" not in drawn


def test_a_dumb_terminal_and_a_pipe_get_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert draw(io.StringIO()) == "  before\n  after\n"
    monkeypatch.setenv("TERM", "dumb")
    assert draw(Terminal()) == "  before\n  after\n"


def test_the_demo_draws_its_bar_on_a_real_terminal():
    primary, secondary = pty.openpty()
    with subprocess.Popen([sys.executable, "-W", "error", "-m", "flowcoro", "demo", "timeouts"], cwd=ROOT,
                          env=environment(TERM="xterm"), stdin=subprocess.DEVNULL, stdout=secondary,
                          stderr=secondary) as process:
        os.close(secondary)
        drawn = b""
        try:
            while data := os.read(primary, 4096):
                drawn += data
        except OSError:                         # Linux: the other side of the terminal is closed
            pass
        os.close(primary)
    assert process.returncode == 0, drawn
    assert b"\r  [...." in drawn and b"\x1b[32m" in drawn


def test_a_terminal_without_the_right_letters_gets_question_marks():
    process = subprocess.run([sys.executable, "-m", "flowcoro", "--help"], cwd=ROOT, capture_output=True,
                             env=environment(PYTHONIOENCODING="ascii"), timeout=PATIENCE)
    assert (process.returncode, process.stderr) == (0, b"")
    assert b"COMMAND ?" in process.stdout


# ---- vendor ------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
{import_line}

async def main():
    async with flowcoro.TaskGroup() as group:
        task = group.spawn(answer())
    return task.result()

async def answer():
    await flowcoro.sleep(0)
    return 42

print(flowcoro.run(main()), sorted(name for name in sys.modules if name.startswith("flowcoro")))
"""


def test_vendor_copies_the_kernel_alone_as_it_is(cli, tmp_path):
    destination = tmp_path / "new" / "vendored"
    status, out, err = cli("vendor", destination)
    assert (status, err) == (0, "")
    assert files_in(destination) == ["flowcoro.py"]
    assert (destination / "flowcoro.py").read_bytes() == (ROOT / "flowcoro.py").read_bytes()
    assert f"copied: {destination / 'flowcoro.py'} (version {flowcoro.__version__})" in out
    done = python("-c", PROGRAM.format(import_line="import flowcoro"), cwd=destination)
    assert (done.returncode, done.stdout) == (0, "42 ['flowcoro']\n"), done.stderr


@pytest.mark.parametrize("name", ["cli", "flowcoro_cli", "flowcoro_cli.py"])
def test_vendor_copies_what_a_module_needs(cli, tmp_path, name):
    assert cli("vendor", tmp_path, name)[0] == 0
    assert files_in(tmp_path) == ["flowcoro.py", "flowcoro_cli.py"]
    done = python("-m", "flowcoro", "demo", "deadlock", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "README.md" not in done.stdout and "flowcoro.py" in done.stdout


def test_vendor_into_a_package_makes_it_one_and_its_imports_relative(cli, tmp_path):
    destination = tmp_path / "vendored"
    status, out, _ = cli("vendor", destination, "cli", "--package")
    assert status == 0 and "from vendored import flowcoro_cli" in out
    assert files_in(destination) == ["__init__.py", "flowcoro.py", "flowcoro_cli.py"]
    text = (destination / "flowcoro_cli.py").read_text(encoding="utf-8")
    assert "\nfrom . import flowcoro\n" in text and "\nimport flowcoro" not in text
    assert f'\n__version__ = "{flowcoro.__version__}"\n' in text
    done = python("-c", PROGRAM.format(import_line="from vendored import flowcoro"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "42 []\n"), done.stderr


def test_a_package_needs_a_name_that_can_be_imported(cli, tmp_path):
    status, out, err = cli("vendor", tmp_path / "my-lib", "--package")
    assert (status, out) == (2, "") and "package named 'my-lib'" in err
    assert not (tmp_path / "my-lib").exists()


@pytest.mark.parametrize("name", ["circle", "nul\0"])
def test_a_folder_that_cannot_be_is_an_error_of_one_line(cli, tmp_path, name):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    status, out, err = cli("vendor", tmp_path / name)
    assert (status, out) == (2, "") and "cannot use" in err and "Traceback" not in err


def test_the_command_line_works_from_inside_a_package(cli, tmp_path):
    cli("vendor", tmp_path / "vendored", "cli", "--package")
    done = small_demo(package="vendored.", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    for module in "vendored.flowcoro", "vendored.flowcoro_cli":
        done = python("-m", module, "--version", cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"flowcoro {flowcoro.__version__}\n", "")


def test_the_kernel_in_a_package_does_no_harm_when_it_is_run(cli, tmp_path):
    cli("vendor", tmp_path / "vendored", "--package")
    done = python("-m", "vendored.flowcoro", "demo", cwd=tmp_path)
    assert done.returncode == 2 and "flowcoro_cli.py" in done.stderr and "Traceback" not in done.stderr


def test_the_kernel_without_the_command_line_says_which_file_to_copy(cli, tmp_path):
    cli("vendor", tmp_path)
    done = python("-m", "flowcoro", "demo", cwd=tmp_path)
    assert done.returncode == 2 and "flowcoro_cli.py" in done.stderr and "Traceback" not in done.stderr


def test_a_copy_in_a_package_can_be_vendored_on(cli, tmp_path):
    cli("vendor", tmp_path / "vendored", "cli", "--package")
    assert python("-m", "vendored.flowcoro_cli", "vendor", "flat", "cli", cwd=tmp_path).returncode == 0
    for name in "flowcoro.py", "flowcoro_cli.py":
        assert (tmp_path / "flat" / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_folder_with_an_init_file_is_a_package_and_the_file_is_left_alone(cli, tmp_path):
    destination = tmp_path / "app" / "vendored"
    destination.mkdir(parents=True)
    for folder in destination, destination.parent:
        (folder / "__init__.py").write_text("mine = 1\n")
    status, out, _ = cli("vendor", destination, "cli")
    assert status == 0 and "is a package" in out and "from app.vendored import flowcoro_cli" in out
    assert (destination / "__init__.py").read_text() == "mine = 1\n"
    assert "\nfrom . import flowcoro\n" in (destination / "flowcoro_cli.py").read_text(encoding="utf-8")


def test_imports_with_another_name_become_relative_too_and_those_of_others_stay(cli, tmp_path, tree):
    tail = "import flowcoroutine\n\ndef f():\n    import flowcoro\n"
    tree({"flowcoro.py": "", "flowcoro_a.py": "import flowcoro as kernel\nimport os\n",
          "flowcoro_b.py": "import flowcoro\nimport flowcoro_a as a  # why\n" + tail})
    out = tmp_path / "out"
    assert cli("vendor", out, "b", "--package")[0] == 0
    assert (out / "flowcoro_a.py").read_text() == "from . import flowcoro as kernel\nimport os\n"
    assert (out / "flowcoro_b.py").read_text() == (
        "from . import flowcoro\nfrom . import flowcoro_a as a  # why\n" + tail)


def test_vendoring_again_finds_the_same_files(cli, tmp_path):
    cli("vendor", tmp_path, "cli")
    before = (tmp_path / "flowcoro.py").stat().st_ino            # a file that is written again is a new one
    status, out, _ = cli("vendor", tmp_path, "cli")
    assert status == 0 and f"same: {tmp_path / 'flowcoro.py'}" in out and "copied" not in out
    assert (tmp_path / "flowcoro.py").stat().st_ino == before


def test_unchanged_flat_copies_become_a_package_without_force(cli, tmp_path):
    cli("vendor", tmp_path, "cli")
    assert cli("vendor", tmp_path, "cli", "--package")[0] == 0
    assert cli("vendor", "--check", tmp_path)[0] == 0


def test_a_locally_changed_file_is_named_and_nothing_is_copied(cli, tmp_path):
    mine = (ROOT / "flowcoro.py").read_text(encoding="utf-8") + "# mine\n# mine too\n"
    (tmp_path / "flowcoro.py").write_text(mine, encoding="utf-8")
    status, out, err = cli("vendor", tmp_path, "cli")
    assert (status, out) == (2, "")
    assert "nothing was copied" in err and "--force" in err
    assert f"{tmp_path / 'flowcoro.py'}: +2 -0 lines" in err
    assert "flowcoro_cli" not in err
    assert files_in(tmp_path) == ["flowcoro.py"]
    assert (tmp_path / "flowcoro.py").read_text(encoding="utf-8") == mine


def test_force_overwrites_a_changed_file(cli, tmp_path):
    (tmp_path / "flowcoro.py").write_text('__version__ = "0.0.1"\n')
    status, _, err = cli("vendor", tmp_path)
    assert status == 2 and f"version 0.0.1 there, {flowcoro.__version__} here" in err
    status, out, _ = cli("vendor", tmp_path, "--force")
    assert status == 0 and "copied: " in out
    assert cli("vendor", "--check", tmp_path)[0] == 0


def test_an_unknown_module_names_the_nearest_and_the_known(cli, tmp_path):
    status, out, err = cli("vendor", tmp_path / "new", "clii")
    assert (status, out) == (2, "")
    assert "no module 'clii'" in err and "did you mean cli?" in err and "flowcoro, " in err
    assert not (tmp_path / "new").exists()


def test_a_module_whose_sibling_is_missing_here_cannot_be_vendored(cli, tmp_path, tree):
    here = tree({"flowcoro_a.py": "import flowcoro_b\n"})
    status, _, err = cli("vendor", tmp_path / "out", "a")
    assert status == 2 and f"flowcoro_a.py needs flowcoro_b.py, which is missing: copy it to {here}" in err
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_destination(cli, tmp_path):
    (tmp_path / "file").write_text("mine")
    for arguments in [tmp_path / "file"], ["--check", tmp_path / "file"]:
        status, out, err = cli("vendor", *arguments)
        assert (status, out) == (2, "") and "is a file" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_folder_of_the_originals_is_no_destination(cli):
    status, _, err = cli("vendor", ROOT, "--package")
    assert status == 2 and "where these files come from" in err


def test_a_folder_in_place_of_a_file_is_refused(cli, tmp_path):
    (tmp_path / "flowcoro.py").mkdir()
    for arguments in [tmp_path], [tmp_path, "--force"]:
        status, _, err = cli("vendor", *arguments)
        assert status == 2 and "flowcoro.py" in err
    assert files_in(tmp_path) == []


def test_a_destination_that_cannot_be_made_says_why(cli, tmp_path):
    (tmp_path / "file").write_text("")
    status, out, err = cli("vendor", tmp_path / "file" / "below")
    assert (status, out) == (2, "") and "cannot use" in err and "Not a directory" in err


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_destination_that_is_out_of_bounds_says_so(cli, mode):
    with tempfile.TemporaryDirectory() as folder:       # not tmp_path, which is its owner's alone
        closed, user = pathlib.Path(folder, "closed"), os.geteuid()
        os.chmod(folder, 0o755)
        closed.mkdir(mode)
        if user == 0:                                   # to root every folder is writable
            os.seteuid(65534)
        try:
            for destination in closed, closed / "below":
                status, _, err = cli("vendor", destination)
                assert status == 2 and "Permission denied" in err
        finally:
            os.seteuid(user)


def test_a_full_disk_leaves_the_old_files_and_nothing_else(cli, tmp_path, monkeypatch):
    (tmp_path / "flowcoro.py").write_text("old\n")
    write_bytes = pathlib.Path.write_bytes

    def write_until_full(path, data):
        if path.name == "flowcoro_cli.py":
            raise OSError(28, "No space left on device")
        return write_bytes(path, data)
    monkeypatch.setattr(pathlib.Path, "write_bytes", write_until_full)
    status, out, err = cli("vendor", tmp_path, "cli", "--force")
    assert (status, out) == (2, "") and "No space left on device" in err
    assert [path.name for path in tmp_path.iterdir()] == ["flowcoro.py"]
    assert (tmp_path / "flowcoro.py").read_text() == "old\n"


# ---- vendor --check ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [[], ["--package"]])
def test_check_finds_fresh_copies_the_same(cli, tmp_path, options):
    cli("vendor", tmp_path, "cli", *options)
    status, out, err = cli("vendor", "--check", tmp_path)
    assert (status, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == ["same", "same"]
    assert out.count(f"(version {flowcoro.__version__})") == 2


def test_check_says_how_a_copy_differs_and_changes_nothing(cli, tmp_path):
    cli("vendor", tmp_path, "cli")
    text = (tmp_path / "flowcoro.py").read_text(encoding="utf-8")
    changed = text.replace(f'__version__ = "{flowcoro.__version__}"', '__version__ = "0.0.9"') + "# mine\n"
    (tmp_path / "flowcoro.py").write_text(changed, encoding="utf-8")
    status, out, _ = cli("vendor", "--check", tmp_path)
    assert status == 1
    assert f"flowcoro.py: +2 -1 lines (version 0.0.9 there, {flowcoro.__version__} here)" in out
    assert "same:      " in out
    assert (tmp_path / "flowcoro.py").read_text(encoding="utf-8") == changed


def test_check_misses_what_a_copy_needs(cli, tmp_path):
    cli("vendor", tmp_path, "cli")
    (tmp_path / "flowcoro.py").unlink()
    status, out, _ = cli("vendor", "--check", tmp_path)
    assert status == 1 and f"not there: {tmp_path / 'flowcoro.py'}" in out


def test_check_of_named_modules_looks_at_those(cli, tmp_path):
    cli("vendor", tmp_path)
    assert cli("vendor", "--check", tmp_path)[0] == 0
    status, out, _ = cli("vendor", "--check", tmp_path, "cli")
    assert status == 1 and f"not there: {tmp_path / 'flowcoro_cli.py'}" in out


def test_check_of_an_empty_or_missing_folder_finds_the_kernel_not_there(cli, tmp_path):
    for folder in tmp_path, tmp_path / "missing":
        status, out, _ = cli("vendor", "--check", folder)
        assert (status, out) == (1, f"not there: {folder / 'flowcoro.py'}\n")
    assert not (tmp_path / "missing").exists()


def test_check_does_not_mind_the_line_ends_of_windows(cli, tmp_path):
    (tmp_path / "flowcoro.py").write_bytes((ROOT / "flowcoro.py").read_bytes().replace(b"\n", b"\r\n"))
    assert cli("vendor", "--check", tmp_path)[0] == 0


# ---- bench -------------------------------------------------------------------------------------------------

def test_bench_runs_the_benchmark_with_its_arguments_and_gives_its_exit_status(cli, tree, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    tree({"benchmarks/kernel.py": "import helper, sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n"
                                  "    sys.exit(helper.status)\n",
          "benchmarks/helper.py": "status = 3\n"})
    assert cli("bench", "--quick", "switch") == (3, "['--quick', 'switch']\n", "")


def test_bench_runs_another_benchmark_that_is_named(cli, tree, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    tree({"benchmarks/kernel.py": "", "benchmarks/workers.py": "import sys\nprint(sys.argv[1:])\nsys.exit(4)\n"})
    assert cli("bench", "workers", "--repeat", "1") == (4, "['--repeat', '1']\n", "")
    status, out, err = cli("bench", "worker")
    assert (status, out) == (2, "") and "did you mean workers?" in err and "known: kernel, workers" in err


def test_bench_without_the_folder_says_where_the_benchmarks_are(cli, tree):
    tree({"flowcoro.py": ""})
    status, out, err = cli("bench")
    assert (status, out) == (2, "") and "clone of the repository" in err
