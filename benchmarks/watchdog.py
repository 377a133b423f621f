"""What run(watchdog=) costs: the same work without one, with one, with one that only measures, and beside an idle thread.

    python -m flowcoro bench watchdog                       7 rounds, about two minutes
    python benchmarks/watchdog.py --case pipe --repeat 21
    python benchmarks/watchdog.py --json

The cases, each some tenths of a second of work that nobody but the kernel does:

    switch100   100 tasks that give each other their turn
    switch3     3 of them
    channel     two tasks that hand numbers to each other through a channel each
    pipe        the same with a byte through os.pipe() and a Pollable: a system call or two for each

The variants: `plain` has no watchdog. `thread` has none either, but one idle thread, as the watchdog is most of the time:
on Linux each system call on a descriptor is dearer in a process with a second thread, whatever that does. `measures` is
watchdog=math.inf, without a thread. `watchdog` is watchdog=True. The target is for this one: at most 1 % over `thread`.

Every figure comes from a process of its own, and counts its processor time, that of all its threads, so that other programs
matter less. The variants take turns, and in every round another goes first. A cost is the time divided by that of another
variant in the same round, less 1; the median of the rounds. Where the range is wide the machine was busy; where the error of
the median spans the target nothing is said of it: take more rounds, or another hour.

SPDX-License-Identifier: MIT
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time

from workers import LIMIT, flowcoro, has_gil

VARIANTS = {"plain": None, "thread": None, "measures": math.inf, "watchdog": True}      # what run(watchdog=) gets
RUNS = 3                # in each process; the median counts
TARGET = 0.01           # what a watchdog may cost over an idle thread


# ---- the cases ---------------------------------------------------------------------------------------------
# Each returns how many operations it has made.

async def together(*coros):
    async with flowcoro.TaskGroup() as group:
        for coro in coros:
            group.spawn(coro)


async def switch(tasks, steps=900_000):
    async def task():
        for _ in range(steps // tasks):
            await flowcoro.checkpoint()

    await together(*(task() for _ in range(tasks)))
    return steps


async def switch100():
    return await switch(100)


async def switch3():
    return await switch(3)


async def channel(rounds=100_000):
    async def player(mine, other):
        for number in range(rounds):
            await other.send(number)
            await mine.receive()

    first, second = flowcoro.Channel(1), flowcoro.Channel(1)
    await together(player(first, second), player(second, first))
    return 2 * rounds


async def pipe(rounds=20_000):
    async def player(mine, other):
        pollable = flowcoro.Pollable(mine)
        for _ in range(rounds):
            await read(pollable)
            os.write(other, b"x")
        pollable.close()

    async def read(pollable):
        while True:
            await pollable.wait_readable()
            pollable.readable = False               # first this, then read: no edge is lost
            try:
                return os.read(pollable.fd, 1)      # there is no second one: the only byte goes to and fro
            except BlockingIOError:                 # the flag was set from the start
                pass

    (mine, out), (other, back) = os.pipe(), os.pipe()
    for fd in mine, other:
        os.set_blocking(fd, False)
    os.write(out, b"x")
    await together(player(mine, back), player(other, out))
    for fd in mine, out, other, back:
        os.close(fd)
    return 2 * rounds


CASES = {case.__name__: case for case in (switch100, switch3, channel, pipe)}


# ---- measure and report ------------------------------------------------------------------------------------

def here(case, variant):
    """Operations a second of processor time, in this process."""
    async def main():
        rates = []
        for _ in range(RUNS):
            began = time.process_time()
            operations = await CASES[case]()
            rates.append(operations / (time.process_time() - began))
        return statistics.median(rates)

    if variant == "thread":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return flowcoro.run(main(), workers=1, watchdog=VARIANTS[variant])


def measure(case, variant):
    done = subprocess.run([sys.executable, __file__, "--measure", case, variant], capture_output=True, text=True,
                          timeout=LIMIT, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{case}, {variant} failed:\n{done.stderr}")
    return float(done.stdout)


def compare(case, rounds):
    """The rows of a case, one for each variant; `rounds` is a list of {variant: rate}."""
    for variant in VARIANTS:
        costs, beside = ([rates[base] / rates[variant] - 1 for rates in rounds] for base in ("plain", "thread"))
        row = {"case": case, "variant": variant, "rate": statistics.median(rates[variant] for rates in rounds),
               "cost": statistics.median(costs), "lowest": min(costs), "highest": max(costs), "verdict": ""}
        if variant == "watchdog":
            low, median, high = statistics.quantiles(beside, n=4) if len(beside) > 1 else (-math.inf, *beside, math.inf)
            error = (high - low) / math.sqrt(len(beside))       # about that of the median
            row["over_thread"], row["error"] = median, error if error < math.inf else None
            told = "ok" if median + error <= TARGET else "MISSED" if median - error > TARGET else "too noisy to tell"
            row["verdict"] = f"{median:+.1%} ± {error:.1%} over thread, at most {TARGET:.0%}: {told}"
        yield row


def main(argv=None):
    """Run the benchmark and print its report."""
    parser = argparse.ArgumentParser(description="Measure what run(watchdog=) costs.",
                                     epilog="The head of benchmarks/watchdog.py says what is compared.")
    parser.add_argument("--case", action="append", choices=CASES, metavar="NAME", help=f"only this one: {', '.join(CASES)}")
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="rounds, 7 unless told otherwise")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure is not None:
        print(here(*options.measure))
        return 0
    if options.repeat < 1:
        parser.error("--repeat needs at least 1 round")

    rows = []
    for case in options.case or CASES:
        rounds = []
        for turn in range(options.repeat):
            names, first = list(VARIANTS), turn % len(VARIANTS)
            rounds.append({variant: measure(case, variant) for variant in names[first:] + names[:first]})
        rows += compare(case, rounds)
    heading = (f"{platform.python_implementation()} {platform.python_version()}, the GIL is {'on' if has_gil() else 'off'}, "
               f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, medians of {options.repeat} rounds")
    if options.json:
        print(json.dumps({"heading": heading, "gil": has_gil(), "rows": rows}, indent=2))
    else:
        print(heading, "", f"{'case':11}{'variant':10}{'rate/s':>10}{'cost':>8}  range", sep="\n")
        for row in rows:
            print(f"{row['case']:11}{row['variant']:10}{row['rate']:10,.0f}{row['cost']:+8.1%}  "
                  f"{row['lowest']:+.1%} to {row['highest']:+.1%}  {row['verdict']}".rstrip())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
