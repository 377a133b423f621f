"""The kernel's benchmark: what a task switch, a channel, a timeout … costs in FlowCoro, and in its peers.

    python benchmarks/kernel.py                        FlowCoro's figures alone, in about a minute
    python benchmarks/kernel.py --peers                next to asyncio, uvloop, trio, curio and gevent
    python benchmarks/kernel.py --peers --case switch --repeat 11
    python benchmarks/kernel.py --list                 what each case does and what one operation is

`python -m flowcoro bench` is the same program. It needs the standard library only. For `--peers` it makes a virtual
environment in the user's cache directory once, installs `requirements.txt` into it, and uses it again as long as
that file and the interpreter stay the same. A peer that cannot be installed or imported is named and left out.

What is compared: `kernel_cases/` has one file for each contender with the same short functions in the same order,
each as that library's own manual would write it. Read them side by side before you believe a ratio. uvloop runs
asyncio's file, word for word. `bare` is no runtime at all but coroutines sent round a deque: about the least that a
scheduler written in Python has to do.

How it is measured: every figure comes from a process of its own. The contenders take turns, and in every round
another one goes first, so that a machine which slows down slows all of them. Inside its process a case runs until a
quarter of a second has gone by, and the median run counts; the start of the interpreter and of the runtime are not
in it. Over the rounds the median counts again, and a ratio is FlowCoro's median divided by the peer's.

How to read the tables: for rates (k/s, thousand operations a second) a ratio above 1 means that FlowCoro is faster;
it is printed as `4.20x`. For costs (µs, ms, bytes) a ratio below 1 means that FlowCoro needs less; it is printed as
`0.55 of`. The targets are the project's own: what a change to the kernel must not lose. The range beside a ratio
is the lowest and the highest of the single rounds; where it is wide, the machine was busy, and the ratio is worth
little. Ratios carry over to other machines, absolute figures do not.

SPDX-License-Identifier: MIT
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
STAMP = "flowcoro-benchmarks.json"  # in an environment of our making: what was installed, by which interpreter

PEERS = ["asyncio", "uvloop", "trio", "curio", "gevent"]
# See the head of cases_curio.py for why curio's assertions are switched off.
INTERPRETER_OPTIONS = {"curio": ["-O"]}

# Variables that would make the interpreter slow, or import something else than intended.
UNWANTED = ["PYTHONASYNCIODEBUG", "PYTHONDEVMODE", "PYTHONDONTWRITEBYTECODE", "PYTHONMALLOC", "PYTHONOPTIMIZE",
            "PYTHONPATH", "PYTHONPROFILEIMPORTTIME", "PYTHONTRACEMALLOC"]

LIMIT = 900  # seconds after which one measurement is given up; the longest, trio's million, needs some minutes


# ------------------------------------------------------------------------------------------------------------------
# The cases
# ------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table. `targets` maps a peer, or another case, to the ratio that has to be reached."""

    name: str
    title: str
    unit: str
    operation: str
    targets: dict = dataclasses.field(default_factory=dict)
    peers_wait_to_be_asked: bool = False


CASES = [
    Case("switch", "task switch", "k/s",
         "One of 1,000 tasks gives way to the others and is resumed: a checkpoint, sleep(0). Starting and joining the"
         " tasks is in it, once for 200 operations.",
         {"bare": 0.8, "asyncio": 4, "uvloop": 2, "trio": 6}),
    Case("spawn", "spawn and join", "k/s",
         "A task that returns at once is started in a group of 1,000, runs, and is joined by the group.",
         {"asyncio": 2.2, "trio": 3}),
    Case("sleepers", "100,000 sleepers", "k/s",
         "One of 100,000 tasks of a group is started, sleeps 1 to 50 ms, wakes, and is joined. The sleeps overlap; what"
         " takes time is the work, not the waiting.",
         {"uvloop": 2, "trio": 8}),
    Case("pingpong", "channel of 1, ping-pong", "k/s",
         "One item goes through a channel of capacity 1. Two tasks play ping-pong through two such channels, so that"
         " every item costs a switch to the other task; there and back is two operations.",
         {"asyncio": 3, "uvloop": 1.8, "trio": 3}),
    Case("buffered", "channel of 100, one way", "k/s",
         "One item goes through a channel of capacity 100 from a task that only sends to one that only receives."),
    Case("lock", "lock hand-over", "k/s",
         "A fair lock goes from its holder to the task that waits for it. Two tasks take turns; each gives way once"
         " while it holds the lock, so that the other is waiting when it is released."),
    Case("timeout", "timeout around a checkpoint", "k/s",
         "A timeout of 10 s is set, the task gives way once, and the timeout is taken back. 100 tasks do so.",
         {"asyncio": 2, "trio": 1.5}),
    Case("thread", "thread round trip", "µs",
         "A task has an empty function called in a worker thread and waits for its result; one call at a time."),
    Case("memory", "memory of a parked task", "bytes",
         "Growth of the process (resident set) by 25,000 tasks of a group, asleep for an hour, divided by their number:"
         " task, coroutine, timer and the group's entry, in Python's allocator and in C's.",
         {"asyncio": 0.75}),
    Case("import", "import", "ms",
         "`import` of the library in a fresh interpreter, from compiled files that the disk cache holds.",
         {"asyncio": 0.3}),
    Case("alive_10k", "10,000 tasks alive", "µs",
         "Processor time for one task that is started in a group, falls asleep, wakes at the same moment as all the"
         " others, and is joined. All of them are asleep before the first wakes, which is checked."),
    Case("alive_100k", "100,000 tasks alive", "µs",
         "The same with 100,000 tasks. Peers take part when this case is asked for by name.",
         peers_wait_to_be_asked=True),
    Case("alive_1m", "1,000,000 tasks alive", "µs",
         "The same with a million. Its target says that the cost of a task stays what it was with 10,000, within a"
         " factor of 2: linear time. Peers take part when asked by name, and need gigabytes and minutes.",
         {"alive_10k": 2}, peers_wait_to_be_asked=True),
]
BY_NAME = {case.name: case for case in CASES}
ALIVE = ["alive_10k", "alive_100k", "alive_1m"]

# A measurement is seconds for one operation (bytes for `memory`): how it becomes the unit of its case.
IN_UNIT = {
    "k/s": lambda value: 1e-3 / value,
    "µs": lambda value: value * 1e6,
    "ms": lambda value: value * 1e3,
    "bytes": lambda value: value,
}


def more_is_better(case):
    return case.unit == "k/s"


# ------------------------------------------------------------------------------------------------------------------
# The peers' environment
# ------------------------------------------------------------------------------------------------------------------

def say(*words, end="\n"):
    """Progress goes to stderr: stdout has the tables only."""
    print(*words, end=end, file=sys.stderr, flush=True)


def default_environment():
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "flowcoro" / f"benchmarks-{sys.implementation.cache_tag}{sys.abiflags}"


def last_line(text):
    return (text.strip().splitlines() or ["no message"])[-1]


def prepare_environment(directory):
    """The interpreter to measure with, and {peer: why it could not be installed}.

    A virtual environment at `directory` that somebody else made is used as it is. Where no environment can be made,
    the running interpreter serves, with whatever peers it has.
    """
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = directory / STAMP
    wanted = {"requirements": REQUIREMENTS.read_text(), "python": sys.version}
    have = json.loads(stamp.read_text()) if stamp.exists() else {}
    if {key: have.get(key) for key in wanted} == wanted and python.exists():
        if have["failed"]:
            say(f"some peers could not be installed when {directory} was made; delete it to try again")
        return str(python), have["failed"]
    if not have and (directory / "pyvenv.cfg").exists():
        say(f"using the environment in {directory} as it is")
        return str(python), {}
    if not have and directory.exists() and any(directory.iterdir()):
        raise SystemExit(f"{directory} is neither empty nor a virtual environment: name another one with --env")

    say(f"making an environment for the peers in {directory}")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], capture_output=True, text=True)
    if made.returncode:
        reason = last_line(made.stderr or made.stdout)
        say(f"that failed ({reason}): measuring with {sys.executable} and the peers it can import")
        return sys.executable, {}
    stamp.write_text(json.dumps({"unfinished": True}))
    failed = {}
    for line in wanted["requirements"].splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement:
            say(f"installing {requirement}")
            pip = subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                                  requirement], capture_output=True, text=True)
            if pip.returncode:
                failed[requirement.partition(">")[0]] = f"pip failed: {last_line(pip.stderr)}"
    stamp.write_text(json.dumps({**wanted, "failed": failed}))
    return str(python), failed


# ------------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------------

class Failed(Exception):
    """A contender's process did not print a measurement; the text says why."""


def ask(python, contender, word):
    """What the contender's file prints, in a process of its own, when it is given `word`."""
    command = [python, *INTERPRETER_OPTIONS.get(contender, []),
               str(HERE / "kernel_cases" / f"cases_{contender}.py"), word]
    environment = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment)
        return json.loads(process.stdout)
    except subprocess.TimeoutExpired:
        raise Failed(f"no result in {LIMIT} seconds") from None
    except ValueError:
        reason = last_line(process.stderr) if process.returncode >= 0 else f"killed by signal {-process.returncode}"
        raise Failed(reason) from None


def contenders_of(case, contenders, asked):
    """Who takes part: `bare` can only switch, and peers get the big crowds only when these are asked for."""
    if case.peers_wait_to_be_asked and case.name not in asked:
        return ["flowcoro"]
    return [name for name in contenders if name != "bare" or case.name == "switch"]


def measure(case, contenders, repeat, python):
    """({contender: [figure of each round, in the case's unit]}, {contender: why it has none})."""
    figures = {name: [] for name in contenders}
    failed = {}
    say(f"{case.title:30}", end="")
    began = time.perf_counter()
    for number in range(repeat):
        first = number % len(contenders)
        for name in contenders[first:] + contenders[:first]:
            if name not in failed:
                try:
                    figures[name].append(IN_UNIT[case.unit](ask(python, name, case.name)["value"]))
                except Failed as error:
                    failed[name] = str(error)
                    del figures[name]
        say(f" {number + 1}", end="")
    say(f"   {time.perf_counter() - began:.0f} s")
    return figures, failed


def compare(case, ours, theirs):
    """FlowCoro's figure divided by the peer's: of the medians, and the range of the single rounds."""
    rounds = [mine / other for mine, other in zip(ours, theirs)]
    return {"ratio": statistics.median(ours) / statistics.median(theirs), "lowest": min(rounds),
            "highest": max(rounds)}


def summarize(results, contenders):
    """The report as it leaves with --json: figures and ratios of each case, then the targets.

    `results` maps the name of a case to what `measure` returned.
    """
    cases, targets = {}, []
    for name, (figures, failed) in results.items():
        case = BY_NAME[name]
        ours = figures.get("flowcoro")
        cases[name] = {
            "title": case.title, "unit": case.unit, "better": "more" if more_is_better(case) else "less",
            "figures": {who: {"median": statistics.median(rounds), "rounds": rounds}
                        for who, rounds in figures.items()},
            "ratios": {who: compare(case, ours, rounds)
                       for who, rounds in figures.items() if ours and who != "flowcoro"},
            "failed": failed,
        }
        for against, bound in case.targets.items():
            if against in BY_NAME:
                other = results.get(against, ({}, {}))[0].get("flowcoro")
            elif against in contenders:
                other = figures.get(against)
            else:
                continue
            target = {"case": name, "against": against, "bound": bound,
                      "better": "more" if more_is_better(case) else "less", "verdict": "not measured"}
            if ours and other:
                target.update(compare(case, ours, other))
                ratio = target["ratio"]
                target["verdict"] = "ok" if (ratio >= bound if more_is_better(case) else ratio <= bound) else "MISSED"
            targets.append(target)
    return {"cases": cases, "targets": targets}


# ------------------------------------------------------------------------------------------------------------------
# The tables
# ------------------------------------------------------------------------------------------------------------------

def figure(value):
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value, better):
    return f"{value:.2f}x   " if better == "more" else f"{value:.2f} of"


def print_table(rows, aligned_left):
    """Rows of equally many cells, in columns as wide as their widest cell; the first row is the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for index, row in enumerate(rows):
        cells = [cell.ljust(width) if place < aligned_left else cell.rjust(width)
                 for place, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
        if index == 0:
            print("  ".join("-" * width for width in widths))
    print()


def print_report(report):
    print(report["heading"])
    print(" · ".join(f"{name} {version}" for name, version in report["versions"].items()) + "\n")
    cases, contenders = report["cases"], [name for name in report["versions"] if name != "python"]

    rows = [["case", "unit", *contenders]]
    for case in cases.values():
        medians = [case["figures"].get(name, {}).get("median") for name in contenders]
        rows.append([case["title"], case["unit"], *("-" if value is None else figure(value) for value in medians)])
    print_table(rows, 2)

    if len(contenders) > 2:  # more than FlowCoro and bare
        rows = [["FlowCoro divided by", *contenders[1:]]]
        for case in cases.values():
            if case["ratios"]:
                rows.append([case["title"], *(ratio(case["ratios"][name]["ratio"], case["better"])
                                              if name in case["ratios"] else "-   " for name in contenders[1:])])
        print_table(rows, 1)

    if report["targets"]:
        rows = [["target", "against", "ratio", "range", "wanted", ""]]
        for target in report["targets"]:
            case, better = cases[target["case"]], target["better"]
            title = BY_NAME[target["against"]].title if target["against"] in BY_NAME else target["against"]
            known = target["verdict"] != "not measured"
            rows.append([case["title"], title,
                         ratio(target["ratio"], better) if known else "-   ",
                         f"{target['lowest']:.2f} - {target['highest']:.2f}" if known else "-",
                         f"at {'least' if better == 'more' else 'most'} {target['bound']:.4g}", target["verdict"]])
        print_table(rows, 2)

    for name, reason in report["left_out"].items():
        print(f"left out: {name}: {reason}")
    for case in cases.values():
        for name, reason in case["failed"].items():
            print(f"no figure for {case['title']}, {name}: {reason}")


def print_list():
    for case in CASES:
        print(f"{case.name:11} {case.title} ({case.unit})")
        line = " " * 11
        for word in case.operation.split():
            if len(line) + len(word) > 105:
                print(line)
                line = " " * 11
            line += " " + word
        print(line)
    print("\nalive       the last three\n")
    print("rates (k/s): more is better; costs (µs, ms, bytes): less is better")


# ------------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------------

def parse(argv):
    parser = argparse.ArgumentParser(
        description="Measure FlowCoro's kernel, alone or next to its peers.",
        epilog="See the head of benchmarks/kernel.py for how it measures and how to read the tables.")
    parser.add_argument("--peers", action="store_true",
                        help=f"next to {', '.join(PEERS)}, installed into an environment of their own")
    parser.add_argument("--case", action="append", choices=[*BY_NAME, "alive"], metavar="NAME",
                        help="only this case (may be given several times; --list names them)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds, 5 unless told otherwise")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--env", type=pathlib.Path, metavar="DIR", help="where the peers' environment is or will be")
    parser.add_argument("--list", action="store_true", help="say what each case does, and measure nothing")
    options = parser.parse_args(argv)
    if options.repeat < 1:
        parser.error("--repeat needs at least 1 round")
    return options


def main(argv=None):
    """Run the benchmark and print its report: 0; 1 where FlowCoro failed, or missed a target under --check."""
    options = parse(argv)
    if options.list:
        print_list()
        return 0

    python, left_out = sys.executable, {}
    if options.peers:
        python, left_out = prepare_environment(options.env or default_environment())
    versions = {"python": platform.python_version()}
    for name in ["flowcoro", "bare", *(PEERS if options.peers else [])]:
        if name not in left_out:
            try:
                versions[name] = ask(python, name, "version")["version"]
            except Failed as error:
                left_out[name] = str(error)
                say(f"left out: {name}: {error}")
    contenders = [name for name in versions if name != "python"]

    asked = {name for word in options.case or [] for name in (ALIVE if word == "alive" else [word])}
    results = {}
    for case in CASES:
        if not asked or case.name in asked:
            taking_part = contenders_of(case, contenders, asked)
            results[case.name] = measure(case, taking_part, options.repeat, python)

    report = summarize(results, contenders)
    report["heading"] = (f"FlowCoro's kernel, {platform.python_implementation()} {platform.python_version()}, "
                         f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
                         f"medians of {options.repeat} rounds")
    report.update(rounds=options.repeat, versions=versions, left_out=left_out)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)

    complete = "flowcoro" in contenders and all("flowcoro" in figures for figures, _ in results.values())
    missed = any(target["verdict"] == "MISSED" for target in report["targets"])
    return 1 if not complete or (options.check and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
