"""Whatever happens, what was opened is closed: on success, on an error, on a timeout, on being cancelled.

Cancellation arrives as an exception, `Cancelled`, at the `await` where the task waits. So `finally` and
`with` do what they always do, and there is nothing to learn but this: let it pass (`except Exception`
does), and put a cleanup that itself has to await into a shielded scope.
"""

import contextlib
import math

import flowcoro

open_files = set()


@contextlib.asynccontextmanager
async def remote_file(name):
    await flowcoro.checkpoint()         # open it
    open_files.add(name)
    try:
        yield name
    finally:
        with flowcoro.CancelScope(shield=True):
            await flowcoro.sleep(0.01)  # flush it: this has to reach the server even now
        open_files.remove(name)
        print(f"  {name} is closed")


async def read(name, seconds, error=None):
    async with remote_file(name):
        await flowcoro.sleep(seconds)
        if error is not None:
            raise error


async def main():
    print("success:")
    await read("a.txt", 0.01)
    print("a timeout:")
    with flowcoro.move_on_after(0.01):
        await read("b.txt", math.inf)
    print("an error in one task cancels the others of its group:")
    try:
        await flowcoro.when_all(read("c.txt", math.inf), read("d.txt", 0.01, OSError("disk full")))
    except* OSError as group:
        print(f"  reported: {group.exceptions[0]}")
    assert not open_files


if __name__ == "__main__":
    flowcoro.run(main())
