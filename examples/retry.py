"""Retry with a timeout for each attempt, one for all of them, and a cleanup that is never cut short.

Timeouts nest: the inner one ends an attempt, the outer one the whole. A shielded scope keeps both away
from the cleanup, which has to await to say good-bye; its own timeout sees to it that it ends all the
same.
"""

import flowcoro


class Server:
    """Answers at the third call; the first two hang."""

    def __init__(self):
        self.calls = self.open = 0

    async def ask(self):
        self.calls += 1
        self.open += 1
        try:
            await flowcoro.sleep(60 if self.calls < 3 else 0.01)
            return "an answer"
        finally:
            with flowcoro.CancelScope(shield=True), flowcoro.move_on_after(1):
                await flowcoro.sleep(0.01)          # the good-bye; unshielded it would raise Cancelled
                self.open -= 1


async def ask_patiently(server, attempts, seconds_each):
    pause = 0.01
    for attempt in range(1, attempts + 1):
        try:
            with flowcoro.timeout(seconds_each):
                return await server.ask()
        except TimeoutError:
            if attempt == attempts:
                raise
            print(f"attempt {attempt} took too long, the next in {pause:g} s")
            await flowcoro.sleep(pause)
            pause *= 2


async def main():
    server = Server()
    with flowcoro.timeout(30):
        print(await ask_patiently(server, attempts=5, seconds_each=0.25))
    assert server.open == 0, "every attempt has said good-bye"


if __name__ == "__main__":
    flowcoro.run(main())
