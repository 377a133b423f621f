"""gevent's cases: greenlets instead of coroutines. Run by ../kernel.py; see there what each case counts."""

import gevent
import gevent.lock
import gevent.queue

import harness


def switch():
    def task():
        for _ in range(harness.CHECKPOINTS):
            gevent.sleep(0)
    gevent.joinall([gevent.spawn(task) for _ in range(harness.TASKS)], raise_error=True)


def spawn():
    def nothing():
        pass
    for _ in range(harness.GROUPS):
        gevent.joinall([gevent.spawn(nothing) for _ in range(harness.GROUP_SIZE)], raise_error=True)


def sleepers():
    def sleeper(number):
        gevent.sleep(harness.short(number))
    gevent.joinall([gevent.spawn(sleeper, number) for number in range(harness.SLEEPERS)], raise_error=True)


def pingpong():
    there, back = gevent.queue.Queue(1), gevent.queue.Queue(1)
    def echo():
        for _ in range(harness.ROUND_TRIPS):
            back.put(there.get())
    echoing = gevent.spawn(echo)
    for number in range(harness.ROUND_TRIPS):
        there.put(number)
        back.get()
    echoing.get()


def buffered():
    queue = gevent.queue.Queue(harness.CAPACITY)
    def produce():
        for number in range(harness.ITEMS):
            queue.put(number)
    producing = gevent.spawn(produce)
    for _ in range(harness.ITEMS):
        queue.get()
    producing.get()


def lock():
    lock = gevent.lock.BoundedSemaphore()
    def holder():
        for _ in range(harness.HANDOVERS):
            with lock:
                gevent.sleep(0)
            gevent.sleep(0)  # or the same greenlet gets the lock again: a release hands nothing over
    gevent.joinall([gevent.spawn(holder), gevent.spawn(holder)], raise_error=True)


def timeout():
    def task():
        for _ in range(harness.TIMEOUTS):
            with gevent.Timeout(10):
                gevent.sleep(0)
    gevent.joinall([gevent.spawn(task) for _ in range(harness.TIMEOUT_TASKS)], raise_error=True)


def thread():
    def nothing():
        pass
    pool = gevent.get_hub().threadpool
    for _ in range(harness.CALLS):
        pool.apply(nothing)


def memory():
    crowd = harness.Crowd(harness.PARKED)
    def parked():
        crowd.asleep += 1
        gevent.sleep(3600)
    before = harness.resident()
    tasks = [gevent.spawn(parked) for _ in range(crowd.size)]  # noqa: F841 (they have to be kept)
    while crowd.asleep < crowd.size:
        gevent.sleep(0.01)
    harness.report_memory(harness.resident() - before)


def alive(crowd):
    def sleeper():
        gevent.sleep(crowd.nap())
        crowd.woke()
    gevent.joinall([gevent.spawn(sleeper) for _ in range(crowd.size)], raise_error=True)


CASES = dict(switch=switch, spawn=spawn, sleepers=sleepers, pingpong=pingpong, buffered=buffered, lock=lock,
             timeout=timeout, thread=thread, memory=memory, alive=alive)


if __name__ == "__main__":
    harness.main(CASES, harness.timed_plain, "gevent", gevent.__version__)
