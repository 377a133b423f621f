"""A cache that many read at once while a refresh has it to itself: a lock for readers and writers.

Between two `await`s a task is alone, so most data needs no lock at all. This needs one because the writer
awaits in the middle of its change: without it, readers would see half of the old prices and half of the
new ones. Whoever comes after a waiting writer waits behind it, so readers cannot keep it out for ever.
"""

import flowcoro


class PriceList:
    def __init__(self):
        self.lock = flowcoro.RWLock()
        self.prices = {"apple": 1, "pear": 1}

    async def total(self):
        """Readers share the lock; they wait only while somebody writes."""
        async with self.lock.read:
            total = 0
            for price in self.prices.values():
                await flowcoro.checkpoint()         # others run here, the writer does not
                total += price
            return total

    async def raise_all(self):
        """The writer is alone, for as long as the whole change takes."""
        async with self.lock.write:
            for name in self.prices:
                await flowcoro.sleep(0.001)         # ask a server for the new price
                self.prices[name] += 1


async def main():
    shop, totals = PriceList(), []

    async def read():
        for _ in range(10):
            totals.append(await shop.total())

    async with flowcoro.TaskGroup() as group:
        for _ in range(3):
            group.spawn(read())
        group.spawn(shop.raise_all())
    print("totals that were seen:", sorted(set(totals)))
    assert set(totals) == {2, 4}, "3 would be a mix of old and new"


if __name__ == "__main__":
    flowcoro.run(main())
