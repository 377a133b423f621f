"""The benchmark of resilience: what a breaker, a limiter, a retry cost a call that needs none of them, and how they hold.

    python benchmarks/resilience.py                 FlowCoro's figures alone, in a minute
    python benchmarks/resilience.py --peers         next to those of ten other packages, in four minutes
    python benchmarks/resilience.py --peers --case closed --repeat 15
    python benchmarks/resilience.py --list          what each case does

`python -m flowcoro bench resilience` is the same program. It needs Linux; the environment for the peers is that of kernel.py.

What is compared: `resilience_cases/` has one file for each contender, as its own manual would write it. Read them side by side
before you believe a ratio: they do not do the same. FlowCoro and interlock keep a window, judge rates, and read the clock for
slow calls; circuitbreaker, pybreaker, aiobreaker and purgatory count failures in a row: where all is well two assignments. The
peers run on asyncio. pybreaker's call_async() needs Tornado, so it is its context manager that is measured.

How it is measured: everything happens in one thread of one process, and is counted in its processor time, in blocks of a thousand
calls; the median block counts. What is protected does nothing and never waits, so that what is seen is what stands around it. A
block without protection and one with it take turns, and the cost is the difference.

How to read the tables: as those of kernel.py.

SPDX-License-Identifier: MIT
"""

import sys
import types

import kernel
import net

BREAKERS = ["circuitbreaker", "pybreaker", "aiobreaker", "purgatory", "interlock"]
LIMITERS = ["limits", "aiolimiter", "throttled"]
RETRIES = ["tenacity", "stamina"]
PEERS = [*BREAKERS, *LIMITERS, *RETRIES]


# ---- the cases ---------------------------------------------------------------------------------------------------

OVER = "over", "a call, more than without", "ns"
REJECTED = "each", "a call that is rejected", "ns", {}
THROUGH = "through", "let through of 50", ""
CHECK = "each", "a check", "ns"
MEMORY = [("resident", "memory of each", "bytes", {"limit": 300}), ("allocated", "allocated for each", "bytes", {}),
          ("each", "a check", "ns", {})]

CASES = [
    net.PlainCase("closed", ["flowcoro", *BREAKERS], """
        A call through a closed breaker, and the same call without.""",
         net.plain_rows("closed", "closed breaker", (*OVER, {"limit": 1500}), ("bare", "a call without", "ns", {}))),
    net.PlainCase("rejected", ["flowcoro", *BREAKERS], """
        A call at an open breaker, whose error is caught.""",
         net.plain_rows("rejected", "open breaker", REJECTED)),
    net.PlainCase("halfopen", ["flowcoro", *BREAKERS], """
        Not a timing: 50 callers ask at once, of a breaker that has been open and wants one probe; how many it lets through before
        the first has its answer. Who has no setting for it is asked as he is.""",
         net.plain_rows("halfopen", "half-open, one probe", (*THROUGH, {"limit": 1}))),
    net.PlainCase("halfopen3", ["flowcoro", "interlock"], """
        The same with three probes.""",
         net.plain_rows("halfopen3", "half-open, three probes", (*THROUGH, {"limit": 3}))),
    net.PlainCase("adaptive", ["flowcoro"], """
        As closed, through an AdaptiveBreaker of which all is accepted.""",
         net.plain_rows("adaptive", "adaptive breaker", (*OVER, {"limit": 1500}))),
    net.PlainCase("adaptive_rejected", ["flowcoro"], """
        As rejected, at an AdaptiveBreaker of which nothing is accepted.""",
         net.plain_rows("adaptive_rejected", "adaptive breaker", REJECTED)),
    net.PlainCase("gcra", ["flowcoro", *LIMITERS], """
        One check of a limiter that lets it through, always for the same key. aiolimiter has no keys.""",
         net.plain_rows("gcra", "limiter, one key", (*CHECK, {"limit": 1000}))),
    net.PlainCase("gcra_many", ["flowcoro", "limits", "throttled"], """
        The same for 1,000 keys in turn.""",
         net.plain_rows("gcra_many", "limiter, 1,000 keys", (*CHECK, {"limit": 1000}))),
    net.PlainCase("refused", ["flowcoro", "limits", "throttled"], """
        One check of a limiter that does not let it through, always for the same key.""",
         net.plain_rows("refused", "limiter, refused", (*CHECK, {}))),
    net.PlainCase("keys", ["flowcoro", "throttled"], """
        A million different keys ask a limiter that has room for 100,000. Memory: what the process has grown by at most (its
        resident set), divided by 100,000; allocated: what Python has at the end, of a tenth of all that. The keys are in it.""",
         net.plain_rows("keys", "a million keys, room for 100,000", *MEMORY)),
    net.PlainCase("keys_all", ["flowcoro", "throttled"], """
        The same with room for all.""",
         net.plain_rows("keys_all", "a million keys, room for all", *MEMORY)),
    net.PlainCase("retry", ["flowcoro", *RETRIES], """
        A call that succeeds at once, through what would make it again, and the same call without.""",
         net.plain_rows("retry", "retry", (*OVER, {}))),
]
TABLES = [["closed", "rejected", "halfopen", "halfopen3", "adaptive", "adaptive_rejected"], ["gcra", "gcra_many", "refused"],
          ["keys", "keys_all"], ["retry"]]
BY_NAME = {case.name: case for case in CASES}


# ---- measuring ---------------------------------------------------------------------------------------------------

class Lab:
    """All that a measurement needs besides the case and the contender."""

    def __init__(self, python, seconds, keys):
        self.python, self.options = python, [f"seconds={seconds}", f"keys={keys}"]

    def missing(self, case):
        """Why a case cannot be measured: there is nothing that could be missing."""

    def measure(self, case, contender):
        """{name of a row: its figure} of one contender."""
        done = kernel.ask(kernel.command_of(self.python, "resilience_cases", contender, case.name, *self.options))
        return {row.name: done[row.name.partition(":")[2]] for row in case.rows}


# ---- the command line --------------------------------------------------------------------------------------------

def main(argv=None):
    """Run the benchmark and print its report. 0, or 1: FlowCoro failed, or missed a target under --check."""
    options, cases = net.options_and_cases(argv, CASES, "breakers, limiters and retries", "resilience.py", PEERS)
    if options is None:
        return 0
    python, versions, left_out = net.contenders_of(options, cases, "resilience_cases", ["flowcoro"], PEERS)
    lab = Lab(python, *((0.01, 2_000) if options.quick else (0.5, 1_000_000)))
    results = net.run_cases(lab, cases, versions, lambda case: options.repeat)
    tables = [types.SimpleNamespace(rows=[row for name in table for row in BY_NAME[name].rows]) for table in TABLES]
    return net.deliver("resilience", tables, results, versions, left_out, python, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
