"""Two transfers take two locks in opposite order, and each waits for the other. Exits with an error.

Most runtimes would hang here. FlowCoro knows everything that could wake a task (timers, descriptors,
threads, other tasks), sees that nothing is left, and raises `Deadlock` with the tree of tasks: where each
waits, for whom, and the circle they form. `deadlock_fixed.py` is the cure.
"""

import flowcoro


class Account:
    def __init__(self, name, balance):
        self.name, self.balance = name, balance
        self.lock = flowcoro.Lock()


async def transfer(source, target, amount):
    async with source.lock:
        await flowcoro.sleep(0.01)              # ask whether the money is there
        async with target.lock:                 # the other transfer holds this one, and wants ours
            source.balance -= amount
            target.balance += amount


async def main():
    ada, bob = Account("Ada", 100), Account("Bob", 100)
    async with flowcoro.TaskGroup() as group:
        group.spawn(transfer(ada, bob, 10), name="Ada pays Bob")
        group.spawn(transfer(bob, ada, 20), name="Bob pays Ada")
    print(ada.balance, bob.balance)


if __name__ == "__main__":
    flowcoro.run(main())
