"""Two cures for `lost_update_broken.py`: read and write without an `await` in between, or hold a lock across
it.

The first is the better one where it is possible: a piece of code that does not await cannot be divided,
and needs no lock. The second is for when the decision needs what the `await` brings; then one guest books
at a time.
"""

import flowcoro


class Theatre:
    def __init__(self, seats):
        self.seats = seats
        self.lock = flowcoro.Lock()

    async def book(self):
        await self.take_payment()
        self.seats -= 1                 # read and written in one go: nobody comes in between

    async def book_the_best(self):
        async with self.lock:           # the choice has to hold until the payment is through
            seat = self.seats
            await self.take_payment()
            self.seats = seat - 1
            return seat

    async def take_payment(self):
        await flowcoro.sleep(0.01)


async def main():
    theatre = Theatre(seats=10)
    await flowcoro.when_all(theatre.book(), theatre.book(), theatre.book())
    print(f"{theatre.seats} seats are left")
    assert theatre.seats == 7
    print("booked:", await flowcoro.when_all(theatre.book_the_best(), theatre.book_the_best()))
    assert theatre.seats == 5


if __name__ == "__main__":
    flowcoro.run(main())
