"""What belongs to a task goes into a context variable: it follows the task, into whatever thread.

The cure for `thread_local_broken.py`. Each task has a context of its own, a copy of its parent's at the time of
`spawn`; `to_thread` takes it along as well. Here two workers run the tasks, and nothing is mixed up.
"""

import contextvars

import flowcoro

user_of_request = contextvars.ContextVar("user_of_request")


async def handle(user):
    user_of_request.set(user)           # stored in the context of this task
    await flowcoro.sleep(0.01)          # the others run, perhaps in another thread
    return await flowcoro.to_thread(greeting)


def greeting():
    return f"hello, {user_of_request.get()}"


async def main():
    users = ["Ada", "Bob", "Eve"]
    answers = await flowcoro.when_all(*(handle(user) for user in users))
    assert answers == ["hello, Ada", "hello, Bob", "hello, Eve"]
    print("\n".join(answers))


if __name__ == "__main__":
    flowcoro.run(main(), workers=2)
