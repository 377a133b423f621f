"""What a coroutine is: a generator that waits. `@flowcoro.coroutine` makes one out of `yield from`.

Before `async def` there was this, and underneath there still is: `await x` suspends the whole chain of
callers, and the kernel resumes it at the innermost place. Both kinds call each other, and a generator can
make small combinators whose shape is easier to see. In everyday code prefer `async def`.
"""

import flowcoro


@flowcoro.coroutine
def countdown(count):
    """The same as an `async def` with `await flowcoro.sleep(…)`."""
    while count:
        print(count)
        yield from flowcoro.sleep(0.01)
        count -= 1
    return "lift-off"


@flowcoro.coroutine
def in_sequence(*coroutines):
    """Run them one after the other; the results in order."""
    results = []
    for coroutine in coroutines:
        results.append((yield from coroutine))
    return results


async def observe(name):
    await flowcoro.checkpoint()
    return f"{name} saw it"


async def main():
    print(await countdown(3))
    print(await in_sequence(observe("Ada"), countdown(1), observe("Grace")))


if __name__ == "__main__":
    flowcoro.run(main())
