"""The kernel's benchmark: what a task switch, a channel, a timeout … costs in FlowCoro, and in its peers.

    python benchmarks/kernel.py                     FlowCoro's figures alone, in about a minute
    python benchmarks/kernel.py --peers             next to asyncio, uvloop, trio, curio and gevent; 8 minutes
    python benchmarks/kernel.py --peers --case switch --repeat 15
    python benchmarks/kernel.py --list              what each case does and what one operation is

`python -m flowcoro bench` is the same program. It needs the standard library only. For `--peers` it makes a
virtual environment in the user's cache directory, installs `requirements.txt` into it, and uses it again as
long as that file and the interpreter stay the same. A peer that cannot be installed or imported is named and
left out.

What is compared: `kernel_cases/` has one file for each contender with the same short functions in the same
order, each as that library's own manual would write it. Read them side by side before you believe a ratio.
uvloop runs asyncio's functions, word for word. `bare` is no runtime at all but coroutines sent round a deque:
about the least that a scheduler written in Python has to do.

How it is measured: every figure comes from a process of its own. The contenders take turns, and in every
round another one goes first, so that a machine which slows down slows all of them. Inside its process a case
runs until a quarter of a second has gone by, and the median run counts; the start of the interpreter and of
the runtime are not in it. Over the rounds the median counts again, and a ratio is FlowCoro's median divided
by the peer's.

How to read the tables: for rates (k/s: thousand operations a second) a ratio above 1 means that FlowCoro is
faster; it is printed as `4.20x`. For costs (µs, ms, bytes) a ratio below 1 means that FlowCoro needs less; it
is printed as `0.55 of`. The targets are the project's own: what a change to the kernel must not lose. The
range beside a ratio is the lowest and the highest of the single rounds; where it is wide the machine was busy
and the ratio is worth little: take more rounds. Ratios carry over to other machines, absolute figures do not.

SPDX-License-Identifier: MIT
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
import time

HERE = pathlib.Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
STAMP = "flowcoro-benchmarks.json"  # in an environment of our making: what was installed, and for whom

PEERS = ["asyncio", "uvloop", "trio", "curio", "gevent"]
INTERPRETER_OPTIONS = {"curio": ["-O"]}  # the head of cases_curio.py says why

# Variables that would make the interpreter slow, or import something else than intended.
UNWANTED = ["PYTHONASYNCIODEBUG", "PYTHONDEVMODE", "PYTHONDONTWRITEBYTECODE", "PYTHONMALLOC",
            "PYTHONOPTIMIZE", "PYTHONPATH", "PYTHONPROFILEIMPORTTIME", "PYTHONTRACEMALLOC"]

OF_PYTHON = ("bare", "asyncio", "blocking", "sendfile", "shutil")  # whose version is the interpreter's

LIMIT = 900  # seconds until a measurement is given up; a peer's million tasks may take some minutes


# ---- the cases ---------------------------------------------------------------------------------------------

RATES = ("k/s", "GB/s")  # more is better


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the tables. `operation` says what one operation is, and what is in it.

    `targets` maps a peer, or another case, to the ratio to reach; `limit` is what the figure itself must not
    exceed. `rounds_unasked` is set for cases that are too long for every run: unless they are asked for by
    name, FlowCoro alone runs them, in at most so many rounds.
    """

    name: str
    title: str
    unit: str
    operation: str
    targets: dict = dataclasses.field(default_factory=dict)
    rounds_unasked: int | None = None
    limit: float | None = None

    @property
    def better(self):
        return "more" if self.unit in RATES else "less"


CASES = [
    Case("switch", "task switch", "k/s", """
        One of 500 tasks gives way to the others and is resumed: a checkpoint, sleep(0). Starting and
        joining the tasks is in it, once for 500 operations.""",
         {"bare": 0.8, "asyncio": 4, "uvloop": 2, "trio": 6}),
    Case("spawn", "spawn and join", "k/s", """
        A task that returns at once is started in a group of 1,000, runs, and is joined by the group.""",
         {"asyncio": 2.2, "trio": 3}),
    Case("sleepers", "100,000 sleepers", "k/s", """
        One of 100,000 tasks of a group is started, sleeps 1 to 50 ms, wakes, and is joined. The sleeps
        overlap: what takes time is the work, not the waiting.""",
         {"uvloop": 2, "trio": 8}),
    Case("pingpong", "channel of 1, ping-pong", "k/s", """
        One item goes through a channel of capacity 1. Two tasks play ping-pong through two such channels,
        so every item costs a switch to the other task. There and back is two operations.""",
         {"asyncio": 3, "uvloop": 1.8, "trio": 3}),
    Case("buffered", "channel of 100, one way", "k/s", """
        One item goes through a channel of capacity 100, from a task that only sends to one that only
        receives."""),
    Case("lock", "lock hand-over", "k/s", """
        A lock goes from its holder to the task that waits for it. Two tasks take turns; each gives way once
        while it holds the lock, so that the other one is waiting when it is released."""),
    Case("timeout", "timeout around a checkpoint", "k/s", """
        A timeout of 10 s is set, the task gives way once, and the timeout is taken back. 100 tasks do so.""",
         {"asyncio": 2, "trio": 1.5}),
    Case("thread", "thread round trip", "µs", """
        A task has an empty function called in a worker thread and waits for the result; one call at a
        time."""),
    Case("memory", "memory of a parked task", "bytes", """
        Growth of the process (its resident set) by 20,000 tasks of a group, asleep for an hour, divided by
        their number: task, coroutine, timer and the group's entry, whether Python allocated them or C.""",
         {"asyncio": 0.75}),
    Case("import", "import", "ms", """
        `import` of the library in a fresh interpreter, from compiled files that are in the disk cache.""",
         {"asyncio": 0.3}),
    Case("alive_10k", "10,000 tasks alive", "µs", """
        Processor time for one task that is started in a group, falls asleep, wakes at the same moment as
        all the others, and is joined. All are asleep before the first one wakes, which is checked."""),
    Case("alive_100k", "100,000 tasks alive", "µs", """
        The same with 100,000 tasks. Peers take part when the case is asked for by name.""",
         rounds_unasked=5),
    Case("alive_1m", "1,000,000 tasks alive", "µs", """
        The same with a million. When asked for by name it runs all rounds, and peers take part, which needs
        gigabytes and many minutes; otherwise one round has to do: it is the longest measurement of all. The
        target says that time is linear: a task costs what it costs among 10,000, within a factor of 3. Of
        these, the heap's log n may take 1.5, and 2 what a million objects of any kind cost once no cache
        holds them; n squared would be 100.""",
         {"alive_10k": 3}, rounds_unasked=1),
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


# ---- the peers' environment --------------------------------------------------------------------------------

def say(text, end="\n"):
    """Progress goes to stderr: stdout has the tables only."""
    print(text, end=end, file=sys.stderr, flush=True)


def default_environment():
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "flowcoro" / f"benchmarks-{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}"


def last_line(text):
    return (text.strip().splitlines() or ["no message"])[-1]


def prepare_environment(directory):
    """The interpreter to measure with, and {peer: why it could not be installed}.

    A virtual environment at `directory` that somebody else made is used as it is. Where none can be made, the
    running interpreter serves, with whatever peers it has.
    """
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = directory / STAMP
    wanted = {"requirements": REQUIREMENTS.read_text(encoding="utf-8"), "python": sys.version}
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = None
    if found is not None and wanted.items() <= found.items() and python.exists():
        if found["failed"]:
            say(f"not all peers could be installed when {directory} was made; delete it to try again")
        return str(python), found["failed"]
    if found is None and (directory / "pyvenv.cfg").exists():
        say(f"using the environment {directory} as it is")
        return str(python), {}
    if found is None and directory.exists() and any(directory.iterdir()):
        raise SystemExit(f"{directory} is neither empty nor a virtual environment: choose another --env")

    say(f"making an environment for the peers: {directory}")
    if found is not None:
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stamp.write_text("{}", encoding="utf-8")  # ours, but unfinished
    made = subprocess.run([sys.executable, "-m", "venv", str(directory)], capture_output=True, text=True)
    if made.returncode:
        say(f"that failed ({last_line(made.stderr or made.stdout)}): measuring with {sys.executable} instead")
        return sys.executable, {}
    failed = {}
    for line in wanted["requirements"].splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement:
            say(f"installing {requirement}")
            pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
            installed = subprocess.run(pip, capture_output=True, text=True)
            if installed.returncode:
                name = re.match(r"[\w.-]+", requirement)[0]
                failed[name] = f"pip could not install it: {last_line(installed.stderr)}"
    stamp.write_text(json.dumps({**wanted, "failed": failed}), encoding="utf-8")
    return str(python), failed


# ---- measuring ---------------------------------------------------------------------------------------------

class Failed(Exception):
    """A contender's process printed no measurement; the text says why."""


def command_of(python, folder, contender, *words):
    """The command that runs the contender's file of a folder."""
    return [python, *INTERPRETER_OPTIONS.get(contender, []), str(HERE / folder / f"cases_{contender}.py"), *words]


def clean_environment():
    return {name: value for name, value in os.environ.items() if name not in UNWANTED}


def ask(command):
    """What a command prints, as JSON, in a process of its own."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=clean_environment())
        return json.loads(process.stdout)
    except subprocess.TimeoutExpired:
        raise Failed(f"no result in {LIMIT} seconds") from None
    except ValueError:
        if process.returncode < 0:
            raise Failed(f"killed by signal {-process.returncode}") from None
        raise Failed(last_line(process.stderr)) from None


def contenders_of(case, contenders, asked):
    """Who takes part: `bare` can only switch, and the long cases are FlowCoro's alone unless asked for."""
    if case.rounds_unasked and case.name not in asked:
        return ["flowcoro"]
    return [name for name in contenders if name != "bare" or case.name == "switch"]


def versions_of(python, folder, contenders, left_out):
    """{contender: its version}. Those that say none go to `left_out`, with the reason, and all there are told.

    Who is no contender is taken out of `left_out`: the environment has the peers of all benchmarks.
    """
    for name in left_out.keys() - set(contenders):
        del left_out[name]
    versions = {}
    for name in contenders:
        if name not in left_out:
            try:
                versions[name] = ask(command_of(python, folder, name, "version"))["version"]
            except Failed as error:
                left_out[name] = str(error)
    for name, reason in left_out.items():
        say(f"left out: {name}: {reason}")
    return versions


def measure(title, contenders, rounds, once):
    """({contender: [what `once(contender)` gave in each round]}, {contender: why it has nothing})."""
    figures, failed = {name: [] for name in contenders}, {}
    say(f"{title:30}", end="")
    began = time.monotonic()
    for number in range(rounds):
        first = number % len(contenders)
        for name in contenders[first:] + contenders[:first]:
            if name not in failed:
                try:
                    figures[name].append(once(name))
                except Failed as error:
                    failed[name] = str(error)
                    del figures[name]
        say(f" {number + 1}", end="")
    say(f"   {time.monotonic() - began:.0f} s")
    return figures, failed


def compare(ours, theirs):
    """FlowCoro's figure divided by the other: of the medians, and the range of the single rounds.

    Rounds of different cases have nothing in common and may differ in number: then it is that of all pairs.
    """
    pairs = zip(ours, theirs) if len(ours) == len(theirs) else itertools.product(ours, theirs)
    ratios = [mine / other for mine, other in pairs]
    return {"ratio": statistics.median(ours) / statistics.median(theirs),
            "lowest": min(ratios), "highest": max(ratios)}


def judge(case, against, bound, ours, theirs):
    """One row of the targets. `ours` or `theirs` may be missing."""
    target = {"case": case.name, "against": against, "better": case.better, "bound": bound}
    if not ours or not theirs:
        return {**target, "verdict": "not measured"}
    comparison = compare(ours, theirs)
    reached = comparison["ratio"] >= bound if case.better == "more" else comparison["ratio"] <= bound
    return {**target, **comparison, "verdict": "ok" if reached else "MISSED"}


def judge_alone(case, ours):
    """The row of the targets for case.limit."""
    target = {"case": case.name, "against": "-", "better": case.better, "bound": case.limit, "unit": case.unit}
    if not ours:
        return {**target, "verdict": "not measured"}
    median = statistics.median(ours)
    return {**target, "figure": median, "lowest": min(ours), "highest": max(ours),
            "verdict": "ok" if median <= case.limit else "MISSED"}


def summarize(known, results, contenders):
    """The report as it leaves with --json: figures and ratios of each case, then the targets.

    `known` maps the name of a case to the Case, `results` to what measure() returned. Targets against contenders
    that were not asked to take part are left out; those against one that failed are "not measured".
    """
    cases, targets = {}, []
    for name, (figures, failed) in results.items():
        case, ours = known[name], figures.get("flowcoro")
        cases[name] = {
            "title": case.title, "unit": case.unit, "better": case.better,
            "rounds": max(map(len, figures.values()), default=0),
            "figures": {who: {"median": statistics.median(rounds), "rounds": rounds}
                        for who, rounds in figures.items()},
            "ratios": {who: compare(ours, rounds) for who, rounds in figures.items()
                       if ours and who != "flowcoro" and case.unit != "%" and all(rounds)},
            "failed": failed,
        }
        for against, bound in case.targets.items():
            if against in results:
                targets.append(judge(case, against, bound, ours, results[against][0].get("flowcoro")))
            elif against in contenders:
                targets.append(judge(case, against, bound, ours, figures.get(against)))
        if case.limit is not None:
            targets.append(judge_alone(case, ours))
    return {"cases": cases, "targets": targets}


# ---- the tables --------------------------------------------------------------------------------------------

def figure(value):
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 100 or not value else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value, better):
    return f"{value:.2f}x   " if better == "more" else f"{value:.2f} of"


def print_table(rows, left):
    """Rows of cells under their heading, in columns; the first `left` columns are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        cells = [cell.ljust(width) if place < left else cell.rjust(width)
                 for place, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
    print()


def print_report(report):
    cases = report["cases"]
    with_version = [name for name in report["versions"] if name not in OF_PYTHON
                    and any(name in case["figures"] for case in cases.values())]
    print(report["heading"])
    print(", ".join(f"{name} {report['versions'][name]}" for name in with_version), end="\n\n")

    for group in report.get("groups", [list(cases)]):
        if present := [cases[name] for name in group if name in cases]:
            print_figures(present, report["versions"])

    if report["targets"]:
        print_targets(report["targets"], cases)

    for case in cases.values():
        if 0 < case["rounds"] < report["rounds"]:
            print(f"{case['title']}: {case['rounds']} of {report['rounds']} rounds")
    for name, reason in report["left_out"].items():
        print(f"left out: {name}: {reason}")
    for case in cases.values():
        for name, reason in case["failed"].items():
            print(f"no figure: {case['title']}, {name}: {reason}")


def print_figures(cases, known):
    """The medians of some cases in columns, one for each contender that takes part, and their ratios."""
    contenders = [name for name in known if any(name in case["figures"] for case in cases)]
    rows = [["case", "unit", *contenders]]
    for case in cases:
        figures = (case["figures"].get(name) for name in contenders)
        rows.append([case["title"], case["unit"],
                     *(figure(known["median"]) if known else "-" for known in figures)])
    print_table(rows, 2)

    others = contenders[1:]
    if others not in ([], ["bare"]):
        rows = [["FlowCoro divided by", *others]]
        for case in cases:
            if case["ratios"]:
                ratios = (case["ratios"].get(name) for name in others)
                rows.append([case["title"], *(ratio(known["ratio"], case["better"]) if known else "-   "
                                              for known in ratios)])
        print_table(rows, 1)


def print_targets(targets, cases):
    rows = [["target", "against", "ratio", "range", "wanted", ""]]
    for target in targets:
        against = cases[target["against"]]["title"] if target["against"] in cases else target["against"]
        reached, span = "-   ", "-"
        if "lowest" in target:
            reached = ratio(target["ratio"], target["better"]) if "ratio" in target else figure(target["figure"]) + "   "
            span = f"{target['lowest']:.2f} - {target['highest']:.2f}"
        wanted = f"at {'least' if target['better'] == 'more' else 'most'} {target['bound']:.4g} {target.get('unit', '')}"
        rows.append([cases[target["case"]]["title"], against, reached, span, wanted.rstrip(), target["verdict"]])
    print_table(rows, 2)


def print_list():
    for case in CASES:
        print(f"{case.name:11} {case.title} ({case.unit})")
        print(textwrap.indent(textwrap.fill(" ".join(case.operation.split()), 92), " " * 12))
    print("alive       the last three")
    print("\nrates (k/s): more is better; costs (µs, ms, bytes): less is better")


# ---- the command line --------------------------------------------------------------------------------------

def deliver(report, results, options):
    """Print the report; the exit status."""
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)

    complete = all("flowcoro" in figures for figures, _ in results.values())
    missed = any(target["verdict"] == "MISSED" for target in report["targets"])
    return 1 if not complete or (options.check and missed) else 0


def parser_of(what, script, peers, cases):
    """What the command lines of this benchmark and of net.py have in common."""
    parser = argparse.ArgumentParser(
        description=f"Measure FlowCoro's {what}, alone or next to its peers.",
        epilog=f"The head of benchmarks/{script} says how it measures and how to read the tables.")
    parser.add_argument("--peers", action="store_true",
                        help=f"next to {', '.join(peers)}, installed into an environment of their own")
    parser.add_argument("--case", action="append", choices=cases, metavar="NAME", default=[],
                        help="only this case (may be given several times; --list names them)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds, 5 unless told otherwise")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a target is missed")
    parser.add_argument("--env", type=pathlib.Path, metavar="DIR", default=default_environment(),
                        help="where the peers' environment is or will be: %(default)s unless told otherwise")
    parser.add_argument("--list", action="store_true", help="say what each case does, and measure nothing")
    return parser


def parsed(parser, argv):
    options = parser.parse_args(argv)
    if options.repeat < 1:
        parser.error("--repeat needs at least 1 round")
    return options


def main(argv=None):
    """Run the benchmark and print its report. 0, or 1: FlowCoro failed, or missed a target under --check."""
    options = parsed(parser_of("kernel", "kernel.py", PEERS, [*BY_NAME, "alive"]), argv)
    if options.list:
        print_list()
        return 0

    python, left_out = sys.executable, {}
    if options.peers:
        python, left_out = prepare_environment(options.env.expanduser().absolute())
    versions = versions_of(python, "kernel_cases", ["flowcoro", "bare", *(PEERS if options.peers else [])], left_out)
    if not {"flowcoro", "bare"} <= versions.keys():
        return 1

    asked = {name for word in options.case for name in (ALIVE if word == "alive" else [word])}
    results = {}
    for case in CASES:
        if not asked or case.name in asked:
            rounds = options.repeat
            if case.rounds_unasked and not asked:
                rounds = min(rounds, case.rounds_unasked)

            def once(contender, case=case):
                return IN_UNIT[case.unit](ask(command_of(python, "kernel_cases", contender, case.name))["value"])

            results[case.name] = measure(case.title, contenders_of(case, list(versions), asked), rounds, once)

    report = {"heading": f"FlowCoro's kernel, {versions['bare']}, {platform.system()} {platform.machine()}, "
                         f"{os.cpu_count()} cores, medians of {options.repeat} rounds",
              "rounds": options.repeat, "versions": versions, "left_out": left_out,
              **summarize(BY_NAME, results, list(versions))}
    return deliver(report, results, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
