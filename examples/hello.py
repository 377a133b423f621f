"""Three tasks side by side: the whole takes as long as the slowest, not as long as all of them together.

An `async def` function describes a coroutine; `spawn` makes a task of it, which runs beside the others.
The group is where they live: its block ends when the last of them has ended, so none can be forgotten.
"""

import flowcoro


async def greet(name, seconds):
    """Take some time, as a request or a query would, without keeping the others from running."""
    await flowcoro.sleep(seconds)
    print(f"hello, {name}")


async def main():
    start = flowcoro.now()
    async with flowcoro.TaskGroup() as group:
        group.spawn(greet("Ada", 0.3))
        group.spawn(greet("Grace", 0.1))
        group.spawn(greet("Edsger", 0.2))
    print(f"all of them in {flowcoro.now() - start:.1f} s")


if __name__ == "__main__":
    flowcoro.run(main())
