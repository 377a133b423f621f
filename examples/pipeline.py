"""A pipeline: paths → texts → imported names → a count, each stage a task, joined by channels.

A channel hands items from task to task. These have no room for items of their own (capacity 0), so a
stage that is too fast waits for the next one, and only a few files are in memory at any time. Each stage
closes its channel when it is done; that ends the `async for` of the next.
"""

import collections
import pathlib
import re

import flowcoro

READERS = 4
IMPORT = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)


async def find_files(paths):
    """First stage: some modules of the standard library."""
    for path in sorted(pathlib.Path(collections.__file__).parent.parent.glob("*.py"))[:100]:
        await paths.send(path)
    paths.close()


async def read_files(paths, texts):
    """Second stage, several tasks: reading blocks, so it happens in a thread."""
    async for path in paths:
        await texts.send(await flowcoro.to_thread(path.read_text, "utf-8", "replace"))


async def read_in_parallel(paths, texts):
    async with flowcoro.TaskGroup() as group:
        for _ in range(READERS):
            group.spawn(read_files(paths, texts))
    texts.close()                       # the group has ended, so no reader is left


async def count_imports(texts):
    """Third stage: what do the modules import?"""
    counts = collections.Counter()
    async for text in texts:
        counts.update(set(IMPORT.findall(text)))
    return counts


async def main():
    paths, texts = flowcoro.Channel(), flowcoro.Channel()
    *_, counts = await flowcoro.when_all(
        find_files(paths), read_in_parallel(paths, texts), count_imports(texts))
    for name, modules in counts.most_common(5):
        print(f"{name:12} is imported by {modules} modules")


if __name__ == "__main__":
    flowcoro.run(main())
