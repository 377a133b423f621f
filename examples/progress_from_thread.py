"""A thread at work tells the tasks how far it has come.

What belongs to the tasks (channels, events, locks) is not to be touched from another thread.
`call_from_thread` has a function called in the kernel's thread instead, between two steps of tasks, and
waits for its result. In a thread of `to_thread` it knows which kernel started it; a thread of your own
passes `kernel=current_kernel()`.
"""

import hashlib

import flowcoro

BLOCKS = 8


def hash_everything(report):
    """Runs in a thread: it computes for a while, and reports."""
    digest = hashlib.sha256()
    for block in range(BLOCKS):
        digest.update(bytes(1_000_000))
        flowcoro.call_from_thread(report, block + 1)
    return digest.hexdigest()


async def show_progress(blocks):
    async for block in blocks:
        print(f"[{'#' * block:{BLOCKS}}]")


async def main():
    blocks = flowcoro.Channel(BLOCKS)
    async with flowcoro.TaskGroup() as group:
        group.spawn(show_progress(blocks))
        digest = await flowcoro.to_thread(hash_everything, blocks.send_nowait)
        blocks.close()
    print(digest[:16], "…")


if __name__ == "__main__":
    flowcoro.run(main())
