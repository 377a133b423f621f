"""A chat room: everybody hears everything, and nobody who is slow holds up the others.

A `Channel` gives each item to one receiver; a `Broadcast` gives it to all subscribers. What happens to
one who cannot keep up is chosen on subscribing: "block" makes the senders wait, "drop" leaves out the
oldest items silently, "lag" says how many were missed.
"""

import flowcoro


async def listen(name, room, pause=0.0):
    """Print what is said. The subscription begins before the first word, so it is handed in."""
    with room:
        while True:
            try:
                print(f"  {name:6} hears: {await room.receive()}")
                await flowcoro.sleep(pause)
            except flowcoro.Lagged as lag:
                print(f"  {name:6} missed {lag.missed} lines")
            except flowcoro.EndOfChannel:
                return


async def talk(room, name, lines):
    for line in lines:
        await room.send(f"{name}: {line}")
        await flowcoro.sleep(0.01)


async def main():
    room = flowcoro.Broadcast(capacity=2)
    async with flowcoro.TaskGroup() as listeners:
        listeners.spawn(listen("Ada", room.subscribe("block")))
        listeners.spawn(listen("Snail", room.subscribe("lag"), pause=0.2))
        async with flowcoro.TaskGroup() as talkers:
            talkers.spawn(talk(room, "Bob", ["hello", "anybody here?", "lovely weather"]))
            talkers.spawn(talk(room, "Carol", ["good evening", "I am", "is it?"]))
        room.close()                    # the talkers have gone; listeners get what is left, then the end


if __name__ == "__main__":
    flowcoro.run(main())
