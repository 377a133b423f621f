"""SIGHUP reloads the settings, as daemons do: signals are received in a task, like items of a channel.

A signal handler interrupts the program between any two instructions; almost nothing is safe to do there. In
a task everything is. This program sends the signals to itself; usually `kill -HUP` does.
"""

import os
import signal
import tempfile

import flowcoro
import flowcoro_os


async def keep_settings_fresh(received, path, loaded):
    """SIGHUP: read the file again. SIGUSR1: enough."""
    async for number in received:
        if number == signal.SIGUSR1:
            return
        async with flowcoro_os.open_file(path) as file:
            print("settings:", (await file.read()).strip())
        await loaded.send(number)


async def main():
    with tempfile.TemporaryDirectory() as directory:
        path = flowcoro_os.Path(directory) / "settings"
        with flowcoro_os.signals(signal.SIGHUP, signal.SIGUSR1) as received:
            async with flowcoro.TaskGroup() as group:
                loaded = flowcoro.Channel(1)
                group.spawn(keep_settings_fresh(received, path, loaded))
                for colour in ("blue", "green"):
                    await path.write_text(f"colour = {colour}\n")
                    os.kill(os.getpid(), signal.SIGHUP)
                    await loaded.receive()
                os.kill(os.getpid(), signal.SIGUSR1)


if __name__ == "__main__":
    flowcoro.run(main())
