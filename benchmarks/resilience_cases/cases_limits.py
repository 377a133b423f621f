"""limits: a window that moves with each call, in the process's memory. Run by ../resilience.py."""

import functools
import importlib.metadata

import limits

import harness


def limiter(rate, item=limits.RateLimitItemPerSecond):
    moving = limits.strategies.MovingWindowRateLimiter(limits.storage.MemoryStorage())
    return functools.partial(moving.hit, item(rate))


def gcra():
    harness.checks(limiter(harness.RATE), harness.one_key())


def gcra_many():
    harness.checks(limiter(harness.RATE), harness.many_keys())


def refused():
    harness.checks(limiter(harness.SELDOM), harness.one_key())


def keys_all():
    harness.memory(lambda room: limiter(harness.SELDOM, limits.RateLimitItemPerHour))


if __name__ == "__main__":
    harness.main(dict(gcra=gcra, gcra_many=gcra_many, refused=refused, keys_all=keys_all), None, importlib.metadata.version("limits"))
