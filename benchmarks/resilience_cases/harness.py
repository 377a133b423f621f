"""What every `cases_*.py` beside this file shares: what is called, how it is timed, and the line of JSON that a case prints.

A `cases_*.py` is one contender, used as its own manual says, and runs one case in one thread of one process:

    python cases_aiobreaker.py closed key=value …       {"over": 2140.0, "bare": 45.1}
    python cases_aiobreaker.py version                  {"version": "1.2.0"}

Options: `seconds` of processor time that a timing goes on for, at least; `keys`: how many different ones `keys` and `keys_all`
use. What each case does stands in the table CASES of ../resilience.py.

SPDX-License-Identifier: MIT
"""

import json
import resource
import statistics
import sys
import time
import tracemalloc

BLOCK = 1000            # calls that are timed at once: a millisecond or some, so that few are interrupted, and the median by none
CALLERS = 50            # halfopen
MOMENT = 0.05           # seconds in which 50 callers have asked, all of them
OPENED = 0.01           # seconds that a breaker is open before it lets somebody try
AGES = 3600             # seconds: longer than a case takes
RATE = 10**9            # of a limiter that lets all through, a second
SELDOM = 1              # of one that lets nearly nothing through
MANY = 1000             # keys
KEPT = 0.1              # part of all keys that `keys` has room for

OPTIONS = {}            # of the command line

clock = time.process_time_ns


async def operation():
    """What is protected: it does nothing, and never waits."""
    return "done"


class Broken(Exception):
    """Of the operation, where one is to fail."""


async def failing():
    raise Broken


def failing_plain():
    raise Broken


def report(**figures):
    print(json.dumps(figures), flush=True)


def rounds():
    """Iterate as long as there is time; once at least."""
    end = time.process_time() + float(OPTIONS["seconds"])
    yield
    while time.process_time() < end:
        yield


async def block(call):
    """Nanoseconds for each call."""
    began = clock()
    for _ in range(BLOCK):
        await call()
    return (clock() - began) / BLOCK


async def compared(call):
    """`await call()` awaits the operation, with something around it: how much longer that takes than the operation alone."""
    if (result := await call()) != "done":
        raise ValueError(f"the call brought {result!r:.100}")
    bare, over = [], []
    for _ in rounds():          # by turns, so that what slows the machine down slows both
        bare.append(await block(operation))
        over.append(await block(call) - bare[-1])
    report(over=statistics.median(over), bare=statistics.median(bare))


async def rejected(call, error):
    """`await call()` raises `error`, and runs nothing."""
    async def caught():
        try:
            await call()
        except error:
            return
        raise ValueError("the call was not rejected")

    await caught()
    report(each=statistics.median([await block(caught) for _ in rounds()]))


async def halfopen(call, error, gather, sleep):
    """50 callers ask at the same time, of a breaker that has been open: how many get through before the first is done.

    `await call(operation)` calls it, or raises `error`; `await gather(*coroutines)` runs all at once.
    """
    inside, most = 0, 0

    async def slow():
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await sleep(MOMENT)
        inside -= 1

    async def caller():
        try:
            await call(slow)
        except error:
            pass

    await sleep(2 * OPENED)
    await gather(*(caller() for _ in range(CALLERS)))
    report(through=most)


def block_of_checks(check, keys):
    """Nanoseconds for each."""
    began = clock()
    for key in keys:
        check(key)
    return (clock() - began) / len(keys)


def checks(check, keys):
    """`check(key)` asks a limiter, with these keys, one after the other, again and again."""
    block_of_checks(check, keys)
    report(each=statistics.median([block_of_checks(check, keys) for _ in rounds()]))


def one_key():
    return ["the only one"] * BLOCK


def many_keys():
    return [f"client {number}" for number in range(MANY)]


def resident():
    """Bytes that this process has occupied at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(make, kept=None):
    """`make(room)` is a function of a key that asks a limiter, which has room for so many keys, of all that come in turn.

    kept: that room, or all. The keys themselves, texts of some 13 characters, are counted as well. What is allocated is looked at
    with a tenth of the keys: tracemalloc makes each ten times as slow.
    """
    count = int(OPTIONS["keys"])
    kept = kept or count
    before, began = resident(), clock()
    ask_once(make, kept, count)
    took, grown = clock() - began, resident() - before
    tracemalloc.start()
    try:
        limiter = ask_once(make, kept // 10, count // 10)      # noqa: F841  (it is what is measured)
        allocated = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    report(each=took / count, resident=grown / kept, allocated=allocated / (kept // 10))


def ask_once(make, kept, count):
    """A limiter, after so many keys have asked it."""
    check = make(kept)
    for number in range(count):
        check(f"client {number}")
    return check


def room():
    """Of the keys, how many `keys` has room for."""
    return int(KEPT * int(OPTIONS["keys"]))


def main(cases, run, version):
    """Do what the command line asks for: one of `cases`, {name: function}; what async ones return goes to `run`."""
    if sys.argv[1] == "version":
        print(json.dumps({"version": version}))
        return
    OPTIONS.update(word.split("=", 1) for word in sys.argv[2:])
    result = cases[sys.argv[1]]()
    if result is not None:
        run(result)
