"""Test code that takes days in milliseconds, on a clock that jumps.

With a `VirtualClock`, `sleep` and timeouts work as always, but whenever all tasks wait, the clock goes on
to the next deadline at once. Nothing really waits, so such tests are fast, and they do not depend on how
fast the machine is: the times they see are exact.
"""

import flowcoro
import flowcoro_testing

DAY = 24 * 3600


async def send_reminders(send):
    """The code to test: three reminders, a day apart, then a last one after a week."""
    for number in range(3):
        await flowcoro.sleep(DAY)
        send(f"reminder {number + 1}")
    await flowcoro.sleep(7 * DAY)
    send("last reminder")


async def test_reminders():
    start, sent = flowcoro.now(), []
    await send_reminders(lambda text: sent.append((round((flowcoro.now() - start) / DAY, 6), text)))
    assert [day for day, _ in sent] == [1, 2, 3, 10]
    for day, text in sent:
        print(f"day {day:4g}: {text}")


async def test_giving_up():
    with flowcoro.move_on_after(2.5 * DAY) as scope:
        await send_reminders(print)
    assert scope.cancelled_caught


if __name__ == "__main__":
    for test in test_reminders, test_giving_up:
        flowcoro.run(test(), clock=flowcoro_testing.VirtualClock())
