"""Stop politely: SIGTERM asks, and the program finishes what it has begun.

`stop_requested()` returns once the process was told to stop, by SIGTERM or by `request_stop()`. Here that
ends the accepting of orders; those that were accepted are delivered. Whoever takes longer than `grace`
seconds is cancelled. This program sends the signal to itself; usually a supervisor (systemd, Docker,
Kubernetes) does.
"""

import itertools
import signal

import flowcoro


async def accept_orders(orders):
    """Accept orders until cancelled. A cancelled `send` has sent nothing, so none is accepted by half."""
    for number in itertools.count():
        await orders.send(number)
        print(f"order {number} accepted")
        if number == 4:
            signal.raise_signal(signal.SIGTERM)
        await flowcoro.sleep(0.01)


async def deliver(orders):
    """Deliver what was accepted, to the last one."""
    async for number in orders:
        await flowcoro.sleep(0.03)
        print(f"order {number} delivered")


async def main():
    orders = flowcoro.Channel(10)
    async with flowcoro.TaskGroup() as group:
        group.spawn(deliver(orders))
        await flowcoro.when_any(flowcoro.stop_requested(), accept_orders(orders))
        print("asked to stop: no more orders")
        orders.close()
    print("everything that was accepted has been delivered")


if __name__ == "__main__":
    flowcoro.run(main(), grace=5)
