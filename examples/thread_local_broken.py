"""A thread-local is not a task-local: tasks see each other's values. Exits with an error.

All tasks of a worker run in one thread, and with several workers a task may change its thread at any `await`.
So what a task has stored in a `threading.local` is another task's after the next await, or is gone.
`thread_local_fixed.py` is the cure.
"""

import threading

import flowcoro

request = threading.local()


async def handle(user):
    request.user = user                 # stored in the thread …
    await flowcoro.sleep(0.01)          # … which now runs the other requests …
    return request.user                 # … the last of which has stored something else


async def main():
    users = ["Ada", "Bob", "Eve"]
    answers = await flowcoro.when_all(*(handle(user) for user in users))
    assert answers == users, f"the requests of {users} were handled for {answers}"


if __name__ == "__main__":
    flowcoro.run(main())
