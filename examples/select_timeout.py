"""Wait for several channels at once, but not for ever: `select` inside a timeout.

`select` receives from the first channel that has something, exactly one item from exactly one of them. A
timeout is not one of its cases: it is a scope around it, as it is around anything else that waits. When
the time is up nothing has been received, so no item is lost.
"""

import flowcoro


async def send_slowly(channel, items, pause):
    for item in items:
        await flowcoro.sleep(pause)
        await channel.send(item)


async def main():
    weather, news = flowcoro.Channel(), flowcoro.Channel()
    async with flowcoro.TaskGroup() as group:
        group.spawn(send_slowly(weather, ["sunny", "rain"], 0.03))
        group.spawn(send_slowly(news, ["a bridge opened"], 0.05))
        while True:
            with flowcoro.move_on_after(0.5) as patience:
                index, item = await flowcoro.select(weather, news)
                print(f"{('weather', 'news')[index]}: {item}")
            if patience.cancelled_caught:
                print("nothing for half a second: that was all")
                break


if __name__ == "__main__":
    flowcoro.run(main())
