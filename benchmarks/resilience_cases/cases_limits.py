"""limits: a window that moves with each call, in the process's memory. Run by ../resilience.py."""

import functools
import importlib.metadata

import limits

import harness


def limiter(per_second):
    moving = limits.strategies.MovingWindowRateLimiter(limits.storage.MemoryStorage())
    return functools.partial(moving.hit, limits.RateLimitItemPerSecond(per_second))


def gcra():
    harness.checks(limiter(harness.RATE), harness.one_key())


def gcra_many():
    harness.checks(limiter(harness.RATE), harness.many_keys())


def refused():
    harness.checks(limiter(harness.SELDOM), harness.one_key())


if __name__ == "__main__":
    harness.main(dict(gcra=gcra, gcra_many=gcra_many, refused=refused), None, importlib.metadata.version("limits"))
