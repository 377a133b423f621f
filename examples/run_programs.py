"""Run programs beside your tasks: to their end, or as a stream; none outlives the block that started it.

`run_process` gives the whole output. `open_process` gives pipes to write to and to read from line by line.
A timeout around either stops the program: it is asked with SIGTERM, and killed if it does not listen.
"""

import sys

import flowcoro
import flowcoro_os

COUNT = "import time\nfor number in range(1000):\n    print(number, flush=True)\n    time.sleep(0.01)"


async def word_count(text):
    """Feed a program, and take what it answers."""
    program = [sys.executable, "-c", "import sys; print(len(sys.stdin.read().split()))"]
    done = await flowcoro_os.run_process(program, input=text.encode(), check=True)
    return int(done.stdout)


async def follow():
    """Read the first lines of a program that would go on for long, and leave: it is stopped."""
    with flowcoro.CancelScope() as scope:
        async with flowcoro_os.open_process([sys.executable, "-c", COUNT]) as process:
            async for line in process.stdout:
                print("it says", line.decode().strip())
                if line == b"2\n":
                    scope.cancel()
    print("it ended with", process.returncode)      # minus the number of the signal


async def main():
    print(await flowcoro.when_all(word_count("one two"), word_count("one two three")))
    await follow()
    try:
        await flowcoro_os.run_process([sys.executable, "-c", COUNT], timeout=0.05)
    except TimeoutError:
        print("the last one was not done in time")


if __name__ == "__main__":
    flowcoro.run(main())
