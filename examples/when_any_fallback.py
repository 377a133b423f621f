"""Race two sources, prefer the fast one, and fall back to a third when neither answers in time.

`when_any` runs its coroutines side by side, returns the result of the first to end, and cancels the
others. When it returns they have ended, cleanup included: nothing goes on in the background. The same
holds when the timeout ends it.
"""

import math

import flowcoro


async def mirror(name, seconds):
    """Ask a mirror, which answers after so many seconds."""
    try:
        await flowcoro.sleep(seconds)
        return f"the page, from {name}"
    finally:
        print(f"  {name}: connection closed")


async def fetch(*mirrors):
    """From the fastest mirror, or from the cache if all are too slow."""
    with flowcoro.move_on_after(0.2):
        _, page = await flowcoro.when_any(*mirrors)
        return page
    return "the page, from the cache"


async def main():
    print("two mirrors, one of them quick:")
    print(await fetch(mirror("Oslo", 0.05), mirror("Lima", math.inf)))
    print("two mirrors, both out of order:")
    print(await fetch(mirror("Oslo", math.inf), mirror("Lima", math.inf)))


if __name__ == "__main__":
    flowcoro.run(main())
