"""throttled-py: GCRA, in the process's memory. Run by ../resilience.py."""

import importlib.metadata

from throttled import RateLimiterType, Throttled, rate_limiter, store

import harness


def limiter(per_second, room=harness.MANY):
    return Throttled(using=RateLimiterType.GCRA.value, quota=rate_limiter.per_sec(per_second),
                     store=store.MemoryStore(options={"MAX_SIZE": room})).limit


def gcra():
    harness.checks(limiter(harness.RATE), harness.one_key())


def gcra_many():
    harness.checks(limiter(harness.RATE), harness.many_keys())


def refused():
    harness.checks(limiter(harness.SELDOM), harness.one_key())


def keys():
    harness.memory(lambda room: limiter(harness.SELDOM, room), harness.room())


def keys_all():
    harness.memory(lambda room: limiter(harness.SELDOM, room))


if __name__ == "__main__":
    harness.main(dict(gcra=gcra, gcra_many=gcra_many, refused=refused, keys=keys, keys_all=keys_all), None,
                 importlib.metadata.version("throttled-py"))
