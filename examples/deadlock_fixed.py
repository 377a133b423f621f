"""The cure for `deadlock_broken.py`: whoever needs several locks takes them in one order, the same for all.

The order may be anything as long as everybody keeps to it; here it is that of the names. Then the one who
has the first lock can always get the second, and no circle can form.
"""

import flowcoro


class Account:
    def __init__(self, name, balance):
        self.name, self.balance = name, balance
        self.lock = flowcoro.Lock()


async def transfer(source, target, amount):
    first, second = sorted([source, target], key=lambda account: account.name)
    async with first.lock:
        await flowcoro.sleep(0.01)              # ask whether the money is there
        async with second.lock:
            source.balance -= amount
            target.balance += amount


async def main():
    ada, bob = Account("Ada", 100), Account("Bob", 100)
    async with flowcoro.TaskGroup() as group:
        group.spawn(transfer(ada, bob, 10), name="Ada pays Bob")
        group.spawn(transfer(bob, ada, 20), name="Bob pays Ada")
    print(f"Ada has {ada.balance}, Bob has {bob.balance}")
    assert (ada.balance, bob.balance) == (110, 90)


if __name__ == "__main__":
    flowcoro.run(main())
