"""A pool of workers with back-pressure: whoever brings work waits while the workers are busy.

The channel holds two jobs and no more. The producer would like to make a hundred at once; `send` lets it
go on only as fast as the workers take them, so the backlog (and the memory it needs) stays small however
long the list is.
"""

import flowcoro

WORKERS, BACKLOG, JOBS = 3, 2, 12


async def worker(jobs, results):
    """Take jobs until the channel is closed and empty."""
    async for job in jobs:
        await flowcoro.sleep(0.02)      # the work
        results[job] = job * job


async def produce(jobs, results):
    """Make jobs; see how many have been made and not been done yet."""
    most = 0
    for job in range(JOBS):
        await jobs.send(job)            # waits while the backlog is full
        most = max(most, job + 1 - len(results))
    jobs.close()
    return most


async def main():
    jobs, results = flowcoro.Channel(BACKLOG), {}
    async with flowcoro.TaskGroup() as group:
        producer = group.spawn(produce(jobs, results))
        for number in range(WORKERS):
            group.spawn(worker(jobs, results), name=f"worker {number}")
    print(f"{len(results)} jobs done; never more than {producer.result()} under way")
    assert producer.result() <= WORKERS + BACKLOG


if __name__ == "__main__":
    flowcoro.run(main())
