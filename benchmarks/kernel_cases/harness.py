"""What every `cases_*.py` beside this file shares: how much work a case does, the clock, and the line of
JSON that one measurement prints.

A `cases_*.py` holds one contender's cases, written as its own manual would write them, and runs one of them:

    python cases_trio.py switch        {"value": 1.9e-06}      seconds for one operation (bytes, for `memory`)
    python cases_trio.py version       {"version": "0.35.0"}

What one operation is stands in the table CASES of ../kernel.py.

SPDX-License-Identifier: MIT
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time

# The same work for every contender. The sizes are such that the fastest needs some hundredths of a second for
# one pass, and the slowest a few seconds.
TASKS, CHECKPOINTS = 500, 500               # switch: so many tasks, each of which gives way so many times
GROUPS, GROUP_SIZE = 20, 1_000              # spawn: groups one after another, tasks in each
SLEEPERS = 100_000                          # sleepers
ROUND_TRIPS = 10_000                        # pingpong: there and back is two items handed over
ITEMS, CAPACITY = 20_000, 100               # buffered
HANDOVERS = 10_000                          # lock: by each of two tasks
TIMEOUT_TASKS, TIMEOUTS = 100, 200          # timeout: several tasks, or one would measure polling for I/O
CALLS = 1_000                               # thread
PARKED = 20_000                             # memory
IMPORTS = 3                                 # import: fresh interpreters per measurement
ALIVE = {"alive_10k": 10_000, "alive_100k": 100_000, "alive_1m": 1_000_000}

OPERATIONS = {
    "switch": TASKS * CHECKPOINTS, "spawn": GROUPS * GROUP_SIZE, "sleepers": SLEEPERS,
    "pingpong": 2 * ROUND_TRIPS, "buffered": ITEMS, "lock": 2 * HANDOVERS,
    "timeout": TIMEOUT_TASKS * TIMEOUTS, "thread": CALLS,
}

# Seconds. A case is run again and again until so much time has gone by, and the median run counts: the fast
# contenders get several runs, the slow ones a single run that is long enough by itself.
ENOUGH = 0.25

# Bytes that a task of a crowd may need (asyncio's: 1,800). With less than that free, no crowd is started.
ALIVE_BYTES = {"trio": 5_000, "curio": 4_000, "gevent": 12_000}
ALIVE_BYTES_OTHERWISE = 2_500

# How many times as long the first steps of a crowd's tasks may take as spawning them took (see Crowd).
PATIENCE = {"trio": 8, "gevent": 16}
PATIENCE_OTHERWISE = 2


def short(number):
    """Seconds that sleeper `number` sleeps: 1 to 50 ms, the same for all contenders."""
    return (number * 7 % 50 + 1) / 1000


def resident():
    """Bytes of memory that this process occupies, garbage apart: what Python allocates and what C does."""
    gc.collect()
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak, which is the same as long as memory only grows
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class Crowd:
    """`size` tasks that are all alive at once, and the proof of it.

    Each task sleeps `nap()` seconds and then says `woke()`. Nobody may wake before the last one has fallen
    asleep, and how long that takes depends on the machine; so all naps end at one moment, which the first
    task to fall asleep chooses from the time that spawning them all took. Waiting for that moment costs no
    processor time, and processor time is what the case counts.
    """

    def __init__(self, size, patience=PATIENCE_OTHERWISE):
        self.size = size
        self.patience = patience
        self.asleep = 0
        self.early = 0
        self.began = time.perf_counter()
        self.wake_at = None

    def nap(self):
        """Seconds until all wake up. The caller is asleep from now on."""
        self.asleep += 1
        now = time.perf_counter()
        if self.wake_at is None:
            self.wake_at = now + self.patience * (now - self.began) + 0.05
        return max(0, self.wake_at - now)

    def woke(self):
        if self.asleep < self.size:
            self.early += 1


async def timed(case, clock, *args):
    """Seconds that the coroutine function `case` takes, inside a run that is under way already."""
    start = clock()
    await case(*args)
    return clock() - start


def timed_plain(case, clock, *args):
    """The same for a plain function."""
    start = clock()
    case(*args)
    return clock() - start


def report(value):
    """Print the measurement."""
    print(json.dumps({"value": value}), flush=True)


def report_memory(grown):
    """Print the bytes for each of the PARKED tasks and leave at once: taking them down is not in the case."""
    report(grown / PARKED)
    os._exit(0)


def import_seconds(module, path=None):
    """Median seconds of `import module` in fresh interpreters, after one that may have had to compile it."""
    program = (f"import sys, time; sys.path[:0] = {[path] if path else []}; start = time.perf_counter(); "
               f"import {module}; print(time.perf_counter() - start)")
    command = [sys.executable, "-P", "-c", program]  # -P: the current folder may hold anything
    seconds = [float(subprocess.check_output(command)) for _ in range(1 + IMPORTS)]
    return statistics.median(seconds[1:])


def require_memory(size):
    """Stop with a message where fewer than `size` bytes are free; where that is not known, go on."""
    try:
        with open("/proc/meminfo") as meminfo:
            free = next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return
    if free < size:
        sys.exit(f"needs {size / 1e9:.1f} GB of free memory, found {free / 1e9:.1f}")


def main(cases, run, module, version, path=None):
    """Run the case named on the command line and print one line of JSON.

    `run(case, clock, *args)` starts the contender's runtime, awaits timed() in it, and returns what that
    returns. `module` is what the `import` case imports, from the folder `path` if it is given.
    """
    name = sys.argv[1]
    if name == "version":
        print(json.dumps({"version": version}))
    elif name == "import":
        report(import_seconds(module, path))
    elif name == "memory":
        run(cases[name], time.perf_counter)  # ends in report_memory
    elif name in ALIVE:
        size = ALIVE[name]
        require_memory(size * ALIVE_BYTES.get(module, ALIVE_BYTES_OTHERWISE))
        crowd = Crowd(size, PATIENCE.get(module, PATIENCE_OTHERWISE))
        seconds = run(cases["alive"], time.process_time, crowd)
        if crowd.early:
            sys.exit(f"{crowd.early:,} of {size:,} tasks woke up before the last one was asleep")
        report(seconds / size)
    else:
        seconds = []
        while sum(seconds) < ENOUGH:
            gc.collect()
            seconds.append(run(cases[name], time.perf_counter))
        report(statistics.median(seconds) / OPERATIONS[name])
