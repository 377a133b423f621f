"""Make a primitive of your own: a latch that opens when it has been counted down.

All that waits in FlowCoro waits in a `ParkingLot`, a FIFO of parked tasks: locks, channels and this.
`park()` puts the current task there, `unpark_all()` wakes those who wait. Cancellation and timeouts need
no line here, because a cancelled task leaves the lot by itself, and the reason given to the lot appears
in task dumps and deadlock reports.

With several workers others may count down between two lines of wait(). So what changes the latch is
`atomic`, and `park_unless()` asks, in one atomic step with parking, whether there is something to wait for.
"""

import flowcoro


class Latch:
    """`await latch.wait()` returns once count_down() was called `count` times."""

    def __init__(self, count):
        self.count = count
        self._lot = flowcoro.ParkingLot("wait for a Latch")

    @flowcoro.atomic
    def count_down(self):
        """Cannot block, so it is a plain function."""
        self.count -= 1
        if self.count == 0:
            self._lot.unpark_all()

    def is_open(self):
        return self.count <= 0

    async def wait(self):
        await self._lot.park_unless(self.is_open)       # a checkpoint, also when it need not wait


async def prepare(dish, seconds, latch):
    await flowcoro.sleep(seconds)
    print(f"{dish} is ready")
    latch.count_down()


async def main():
    latch = Latch(3)
    async with flowcoro.TaskGroup() as group:
        for seconds, dish in enumerate(["soup", "bread", "wine"]):
            group.spawn(prepare(dish, seconds / 100, latch))
        with flowcoro.move_on_after(0.005):
            await latch.wait()
            raise AssertionError("it opened too early")
        await latch.wait()
        print("dinner is served")


if __name__ == "__main__":
    flowcoro.run(main())
