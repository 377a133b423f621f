"""`python -m flowcoro bench resilience`: that it measures, tiny, and that it neither times the wrong thing nor miscounts.

How fast anything is, is asserted nowhere.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

import flowcoro

ROOT = pathlib.Path(__file__).resolve().parent.parent
CASES = ROOT / "benchmarks" / "resilience_cases"
PATIENCE = 120              # seconds until a benchmark counts as hanging
NAMES = {"closed", "rejected", "halfopen", "halfopen3", "adaptive", "adaptive_rejected", "gcra", "gcra_many", "refused", "keys",
         "keys_all", "retry"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark needs Linux")


def bench(*arguments):
    """Run `python -m flowcoro bench resilience …` in a process of its own: the CompletedProcess."""
    return subprocess.run([sys.executable, "-W", "error", "-m", "flowcoro", "bench", "resilience", *map(str, arguments)],
                          cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)


def test_every_case_is_measured():
    done = bench("--quick", "--repeat", 1, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {row.partition(":")[0] for row in report["cases"]} == NAMES
    for name, row in report["cases"].items():
        assert row["failed"] == {} and row["figures"].keys() == {"flowcoro"}, name
        # The resident set may have room for so few keys.
        assert row["figures"]["flowcoro"]["median"] > 0 or name.endswith(":resident"), name
    assert report["cases"]["halfopen:through"]["figures"]["flowcoro"]["median"] == 1
    assert report["cases"]["halfopen3:through"]["figures"]["flowcoro"]["median"] == 3
    assert {target["case"] for target in report["targets"]} == {
        "closed:over", "halfopen:through", "halfopen3:through", "adaptive:over", "gcra:each", "gcra_many:each", "keys:resident",
        "keys_all:resident"}


def test_list_names_every_case():
    done = bench("--list")
    assert done.returncode == 0
    assert all(f"\n{case} " in "\n" + done.stdout for case in NAMES)


def test_each_contender_is_there_for_each_case_it_is_measured_in():
    """A peer's file is read, not run: it may not be installed."""
    done = subprocess.run([sys.executable, "-c", "import json, resilience; print(json.dumps([[case.name, case.contenders] "
                           "for case in resilience.CASES]))"], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    for case, contenders in json.loads(done.stdout):
        for contender in contenders:
            text = (CASES / f"cases_{contender}.py").read_text(encoding="utf-8")
            assert f"def {case}(" in text or f"{case}=" in text, (case, contender)


# ---- the harness -----------------------------------------------------------------------------------------------

@pytest.fixture
def harness():
    """Its module, with options for as little as there is."""
    spec = importlib.util.spec_from_file_location("resilience_harness", CASES / "harness.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.OPTIONS.update(seconds="0", keys="1000")
    return module


async def gather(*coros):
    async with flowcoro.TaskGroup() as group:
        for coro in coros:
            group.spawn(coro)


class Refused(Exception):
    pass


def reported(capsys):
    return json.loads(capsys.readouterr().out)


def test_a_cost_is_what_a_call_takes_more_than_the_bare_one(harness, capsys, monkeypatch):
    time = [0]
    monkeypatch.setattr(harness, "clock", lambda: time[0])

    async def operation():
        time[0] += 7
        return "done"

    async def call():
        time[0] += 100
        return await harness.operation()

    monkeypatch.setattr(harness, "operation", operation)
    flowcoro.run(harness.compared(call))
    assert reported(capsys) == {"over": 100, "bare": 7}


def test_what_brings_the_wrong_result_or_is_not_rejected_is_not_timed(harness, capsys):
    async def wrong():
        return "something else"

    with pytest.raises(ValueError, match="the call brought 'something else'"):
        flowcoro.run(harness.compared(wrong))
    with pytest.raises(ValueError, match="was not rejected"):
        flowcoro.run(harness.rejected(wrong, Refused))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("permitted", [1, 3, 50])
def test_those_let_through_are_counted_before_the_first_is_done(harness, capsys, monkeypatch, permitted):
    monkeypatch.setattr(harness, "MOMENT", 0.01)
    running = 0

    async def call(operation):
        nonlocal running
        if running >= permitted:
            raise Refused
        running += 1
        try:
            await operation()
        finally:
            running -= 1

    flowcoro.run(harness.halfopen(call, Refused, gather, flowcoro.sleep))
    assert reported(capsys) == {"through": permitted}


def test_memory_is_told_for_each_key_that_there_is_room_for(harness, capsys):
    def make(room):
        kept = {}

        def check(key):
            if len(kept) < room:
                kept[key] = bytearray(1000)

        return check

    harness.memory(make, harness.room())
    assert 1000 < reported(capsys)["allocated"] < 1500
