"""An update gets lost, because others run at every `await`. Exits with an error.

Tasks do not interrupt each other at arbitrary places as threads do: the others run only where a task
awaits. But there they do run. Here each guest reads the number of seats, awaits, and writes back what it
has read: all have read the same number. `lost_update_fixed.py` is the cure.
"""

import flowcoro


class Theatre:
    def __init__(self, seats):
        self.seats = seats

    async def book(self):
        seats = self.seats              # read …
        await self.take_payment()       # … the other guests run here, and read the same …
        self.seats = seats - 1          # … and write: all but one of the updates are lost

    async def take_payment(self):
        await flowcoro.sleep(0.01)


async def main():
    theatre = Theatre(seats=10)
    async with flowcoro.TaskGroup() as group:
        for number in range(3):
            group.spawn(theatre.book(), name=f"guest {number}")
    assert theatre.seats == 7, f"3 of 10 seats are sold, but {theatre.seats} are left"


if __name__ == "__main__":
    flowcoro.run(main())
