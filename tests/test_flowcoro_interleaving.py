"""The protocols between workers, as small models whose every interleaving is tried: no wake-up is lost, no task is twice.

A thread is a generator. What it does from one yield to the next is one step that nobody divides; it yields before each
thing it does to what others see: (place, condition). The place names where it stands, with its local variables, so that
two states with equal places and an equal world have the same future; a condition must hold for the thread to go on.
The models copy the kernel's order of steps (named in each), and each is shown to fail with one step missing or moved.
"""

import pytest


class World:
    """What the threads share: flags, numbers, lists and dicts, whose repr() tells two states apart."""

    def __init__(self, **shared):
        self.guard = None           # who holds it
        self.__dict__.update(shared)

    def key(self):
        return repr(sorted(self.__dict__.items()))


def always():
    return True


def take_guard(world, who, *place):
    """One step that waits for the guard; the one who has it sets world.guard to None."""
    yield (place, "guard"), lambda: world.guard is None
    world.guard = who


class Fault(Exception):
    """A schedule under which something is lost, or in two places."""


def explore(make):
    """Try every interleaving of make() -> (world, [threads], check, check_end). How many states; Fault with a schedule.

    check(world) looks at every state, check_end(world, places) at those from which no thread can go on.
    """
    seen, pending = set(), [()]
    while pending:
        schedule = pending.pop()
        world, threads, check, check_end = make()
        stand = [next(thread) for thread in threads]
        try:
            for number in schedule:             # a generator cannot be copied, so each state is reached anew
                try:
                    stand[number] = next(threads[number])
                except StopIteration:
                    stand[number] = "end", None
            key = world.key(), tuple(place for place, condition in stand)
            if key in seen:
                continue
            seen.add(key)
            able = [number for number, (place, condition) in enumerate(stand) if condition is not None and condition()]
            check(world)
            if not able:
                check_end(world, [place for place, condition in stand])
        except AssertionError as error:
            raise Fault(f"{error}: after {schedule}") from error
        pending.extend((*schedule, number) for number in able)
    return len(seen)


def ends(world, places):
    assert all(place == "end" for place in places), f"stuck at {places} with {world.key()}"


def adding(atomic):
    def make():
        world = World(count=0)

        def add():
            yield "read", always
            count = world.count
            if not atomic:
                yield ("write", count), always
            world.count = count + 1

        def check_end(world, places):
            assert world.count == 2

        return world, [add(), add()], lambda world: None, check_end

    return make


def test_the_explorer_finds_the_update_that_two_threads_lose():
    assert explore(adding(True)) == 4
    with pytest.raises(Fault):
        explore(adding(False))


# ---- 1: look, park, look again under the guard; a waker ---------------------------------------------------------

def parking(workers, *, second_look=True, stored_on_stack=False, cancel=False):
    """Event.wait() on worker 0, Event.set() on worker 1; the last worker steps what is ready (and worker 2 cancels)."""
    def make():
        world = World(set=False, lot=[], ready=[], on_stack=True, resumed=0)

        def store():
            """Event._park(): under the guard."""
            if second_look and world.set:
                world.ready.append("task")
            else:
                world.lot.append("task")

        def waiter():
            yield "look", always
            if world.set:
                world.on_stack, world.resumed = False, 1        # it goes on by itself
                return
            if stored_on_stack:
                yield from take_guard(world, 0, "store")
                store()
                world.guard = None
            yield "leave the stack", always
            world.on_stack = False
            if not stored_on_stack:
                yield from take_guard(world, 0, "store")        # _park_among_others()
                yield "store", always
                store()
                world.guard = None

        def waker():
            yield from take_guard(world, 1, "wake")
            world.set = True
            yield "unpark", always
            while world.lot:                    # who takes it out of its place reschedules it
                world.ready.append(world.lot.pop(0))
            world.guard = None
            if workers == 2:
                yield from stepper()

        def stepper():
            yield "step", lambda: world.ready or world.resumed
            if world.ready:
                world.ready.pop(0)              # without the guard
                assert not world.on_stack, "a task is resumed that runs"
                world.resumed += 1

        def canceller():
            yield from take_guard(world, 2, "cancel")
            if world.lot:                       # its abort function
                world.ready.append(world.lot.pop(0))
            world.guard = None
            yield from stepper()

        def check(world):
            places = len(world.lot) + len(world.ready) + world.resumed
            assert places <= 1, "the task is in two places"

        threads = [waiter(), waker()]
        if workers > 2:
            threads.append(canceller() if cancel else stepper())
        return world, threads, check, ends

    return make


@pytest.mark.parametrize("workers, cancel", [(2, False), (3, False), (3, True)])
def test_a_task_that_looks_again_under_the_guard_before_it_parks_misses_no_wake_up(workers, cancel):
    assert explore(parking(workers, cancel=cancel)) > 15


@pytest.mark.parametrize("workers", [2, 3])
def test_without_the_second_look_a_wake_up_is_lost(workers):
    with pytest.raises(Fault, match="stuck"):
        explore(parking(workers, second_look=False))


@pytest.mark.parametrize("workers", [2, 3])
def test_a_task_stored_before_it_has_left_the_stack_is_resumed_while_it_runs(workers):
    with pytest.raises(Fault, match="resumed that runs"):
        explore(parking(workers, stored_on_stack=True))


def cancelling(*, read_first=True, told_as_it_parks=True):
    """work() steps a task for which a value has come, and Task._interrupt() on another worker cancels it."""
    def make():
        world = World(ready=["task"], running=False, resume="send", woken=True, values=["value"], received=0, cancelled=0)

        def worker():
            while True:
                yield "popleft", lambda: world.ready
                world.ready.pop()
                resume = None
                if read_first:
                    yield "read", always
                    resume = world.resume
                yield ("publish", resume), always
                world.running = True
                if not read_first:
                    yield "read", always
                    resume = world.resume
                yield ("step", resume), always
                if resume == "deliver":
                    assert not world.values, "a value is lost to a cancel that came after it"
                    world.cancelled += 1
                    world.running = False
                    return
                assert world.values, "its park returns though nobody has woken it"
                world.received += len(world.values)
                world.values.clear()
                world.woken = False                             # the step has used its budget
                if resume == "step then cancel":
                    yield from take_guard(world, 0, "refresh")
                    world.resume = "deliver"
                    world.guard = None
                yield from take_guard(world, 0, "park")         # _park_among_others()
                if world.resume != "send":
                    if world.resume == "step then cancel" and told_as_it_parks:
                        world.resume = "deliver"
                    world.ready.append("task")
                    world.running = False
                    world.guard = None
                else:
                    world.running = False
                    world.guard = None
                    yield "parked", always
                    return

        def canceller():
            yield from take_guard(world, 1, "cancel")
            running = world.running
            yield ("interrupt", running), always
            if world.woken and not running:
                world.resume = "step then cancel"
            elif world.resume != "step then cancel":
                world.resume = "deliver"
            world.guard = None

        def check_end(world, places):
            assert world.received == 1, "the value is lost"
            assert world.cancelled or world.resume == "deliver", "the cancel is lost"

        return world, [worker(), canceller()], lambda world: None, check_end

    return make


def test_a_value_is_not_lost_to_a_cancel_that_comes_while_its_task_is_taken_up():
    assert explore(cancelling()) > 15
    with pytest.raises(Fault, match="a value is lost"):
        explore(cancelling(read_first=False))
    with pytest.raises(Fault, match="nobody has woken it"):
        explore(cancelling(told_as_it_parks=False))


# ---- 2: say that one sleeps, look again, sleep; append, look who sleeps ------------------------------------------

def sleeping(wakers, *, announce_first=True, append_first=True, stop=False, stop_looked_at=True):
    """_OneOfSeveral._idle() and _Worker._poll(), against _reschedule(), post() and _stop_all() of others."""
    def make():
        world = World(ready=[], sleeping=False, bytes=0, stopped=False, done=[])

        def nothing():
            return not world.ready and not (stop_looked_at and world.stopped)

        def worker():
            while True:
                while True:
                    yield "popleft", always
                    if not world.ready:
                        break
                    world.done.append(world.ready.pop(0))
                yield "loop", always
                if world.stopped or len(world.done) == wakers and not stop:
                    return
                look = None
                if not announce_first:
                    yield "look", always
                    look = nothing()
                yield ("announce", look), always
                world.sleeping = True
                if announce_first:
                    yield "look", always
                    look = nothing()
                if look:
                    yield "epoll_wait", lambda: world.bytes > 0
                    world.bytes = 0
                yield "awake", always
                world.sleeping = False

        def wake():
            if world.sleeping:
                world.bytes += 1

        def waker(number):
            if append_first:
                yield "append", always
                world.ready.append(number)
                yield "who sleeps", always
                wake()
            else:
                yield "who sleeps", always
                asleep = world.sleeping
                yield ("append", asleep), always
                world.ready.append(number)
                world.bytes += asleep

        def stopper():
            yield "stop", lambda: len(world.done) == wakers
            world.stopped = True
            yield "who sleeps", always
            wake()

        def check(world):
            assert len(set(world.done + world.ready)) == len(world.done + world.ready), "a task is in two places"

        return world, [worker(), *(waker(number) for number in range(wakers)), *([stopper()] if stop else [])], check, ends

    return make


@pytest.mark.parametrize("wakers", [1, 2])
@pytest.mark.parametrize("stop", [False, True])
def test_a_worker_that_says_that_it_sleeps_before_it_looks_again_is_always_woken(wakers, stop):
    assert explore(sleeping(wakers, stop=stop)) > 15


@pytest.mark.parametrize("wakers", [1, 2])
def test_a_worker_that_looks_before_it_says_so_sleeps_through_a_wake_up(wakers):
    with pytest.raises(Fault, match="epoll_wait"):
        explore(sleeping(wakers, announce_first=False))


@pytest.mark.parametrize("wakers", [1, 2])
def test_a_waker_that_looks_who_sleeps_before_it_appends_wakes_nobody(wakers):
    with pytest.raises(Fault, match="epoll_wait"):
        explore(sleeping(wakers, append_first=False))


def test_a_worker_that_does_not_look_again_at_the_end_of_the_run_sleeps_through_it():
    with pytest.raises(Fault, match="epoll_wait"):
        explore(sleeping(1, stop=True, stop_looked_at=False))


def standing_in(*, given_back=True):
    """A worker comes round and goes to sleep while another one still stands in for it and polls its descriptors."""
    def make():
        world = World(inbox=[], sleeping=False, bytes=0, edge=False, done=0)

        def victim():
            while True:
                yield "take calls", always
                if world.inbox:
                    world.inbox.pop()
                    world.done += 1
                    return
                yield "announce", always
                world.sleeping = True
                yield "look", always
                if not world.inbox:
                    yield "epoll_wait", lambda: world.edge      # edge-triggered: whoever polls first has it
                    world.edge = False
                    world.bytes = 0
                yield "awake", always
                world.sleeping = False

        def write():
            world.bytes += 1
            world.edge = True

        def poster():
            yield "append", always
            world.inbox.append("call")
            yield "who sleeps", always
            if world.sleeping:
                write()

        def deputy():
            yield "epoll_wait(0)", always
            if world.edge:
                world.edge = False
                yield "read", always
                world.bytes = 0
                if given_back:
                    yield "write", always
                    write()

        return world, [victim(), poster(), deputy()], lambda world: None, ends

    return make


def test_who_stands_in_for_a_worker_gives_back_the_wake_up_that_it_has_taken():
    assert explore(standing_in()) > 15
    with pytest.raises(Fault, match="epoll_wait"):
        explore(standing_in(given_back=False))


def keeping(sleepers, *, announce_first=True, handed_over=True):
    """The keeper has found work in which it will be stuck; others are on their way to sleep. One of them must keep watch."""
    def make():
        world = World(keeper="a", sleeping={number: False for number in range(sleepers)},
                      bytes={number: 0 for number in range(sleepers)})

        def keeper():
            yield "release", always
            world.keeper = None
            if handed_over:
                for number in range(sleepers):
                    yield ("who sleeps", number), always
                    if world.sleeping[number] and world.keeper is None:     # _offer_work()
                        world.bytes[number] += 1
                        return

        def sleeper(number):
            while True:
                if not announce_first:
                    yield "acquire", always
                    world.keeper = number if world.keeper is None else world.keeper
                yield "announce", always
                world.sleeping[number] = True
                if announce_first:
                    yield "acquire", always
                    world.keeper = number if world.keeper is None else world.keeper
                yield "epoll_wait", lambda: world.bytes[number] > 0 and world.keeper != number
                world.bytes[number] = 0
                yield "awake", always
                world.sleeping[number] = False

        def check_end(world, places):
            assert world.keeper not in (None, "a"), "nobody looks after the one that is stuck"

        return world, [keeper(), *map(sleeper, range(sleepers))], lambda world: None, check_end

    return make


@pytest.mark.parametrize("sleepers", [1, 2])
def test_the_watch_over_stuck_workers_goes_from_who_begins_to_work_to_one_who_sleeps(sleepers):
    assert explore(keeping(sleepers)) > 5
    with pytest.raises(Fault, match="nobody looks after"):
        explore(keeping(sleepers, announce_first=False))
    with pytest.raises(Fault, match="nobody looks after"):
        explore(keeping(sleepers, handed_over=False))


# ---- 3: steal from the right, popleft by the owner ---------------------------------------------------------------

def stealing(thieves, *, atomic=True, guarded=True):
    """_OneOfSeveral._find_work() and _steal() of one or two others, while the owner steps its tasks and one comes back."""
    def make():
        world = World(ready={0: ["a", "b", "c", "d"], **{number: [] for number in range(1, thieves + 1)}},
                      hand={number: [] for number in range(thieves + 1)}, home=dict.fromkeys("abcd", 0),
                      stepped=[])

        def pop(queue, index, number, *place):
            """deque.pop() and popleft() are one step; a look and a removal would be two."""
            yield (*place, "pop"), always
            if not atomic:
                if not queue:
                    return
                task = queue[index]
                yield (*place, "remove", task), always
                world.hand[number].append(task)
                if task in queue:
                    queue.remove(task)
            elif queue:
                world.hand[number].append(queue.pop(index))

        def step(number, *place):
            """popleft(), without the guard, and one step; "a" yields once and goes back."""
            mine = world.ready[number]
            while True:
                yield from pop(mine, 0, number, "own", *place)
                if not world.hand[number]:
                    return
                yield ("step", *place), always
                task = world.hand[number].pop()
                assert not guarded or world.home[task] == number, "a task is stepped by a worker that it does not belong to"
                world.stepped.append(task)
                if task == "a" and world.stepped.count("a") == 1:
                    mine.append(task)

        def thief(number):
            victims = [0] if number == 1 else [1, 0]
            for victim in victims:
                yield ("len", victim), always
                count = len(world.ready[victim]) // 2           # may be fewer by the time that it takes them
                if count == 0:
                    continue
                if guarded:
                    yield from take_guard(world, number, "steal", victim, count)
                for index in range(count):
                    yield from pop(world.ready[victim], -1, number, "steal", victim, count, index)
                while world.hand[number]:
                    yield ("move", victim), always
                    task = world.hand[number].pop()
                    world.home[task] = number
                    world.ready[number].append(task)
                if guarded:
                    world.guard = None
                yield from step(number, victim)

        def check(world):
            places = sum([*world.ready.values(), *world.hand.values()], [])
            assert len(places) == len(set(places)), "a task is in two places"

        def check_end(world, places):
            ends(world, places)
            assert sorted(world.stepped) == ["a", "a", "b", "c", "d"], f"stepped: {world.stepped}"
            assert not any(world.ready.values()), "a task was left behind"

        return world, [step(0), *(thief(number) for number in range(1, thieves + 1))], check, check_end

    return make


@pytest.mark.parametrize("thieves", [1, 2])
def test_a_task_that_is_stolen_while_its_owner_takes_the_next_one_is_stepped_by_one_of_them(thieves):
    assert explore(stealing(thieves)) > 100


@pytest.mark.parametrize("thieves", [1, 2])
def test_a_steal_that_looks_before_it_takes_doubles_a_task(thieves):
    with pytest.raises(Fault, match="two places|does not belong"):
        explore(stealing(thieves, atomic=False))


def giving_back(*, with_wake_up=True):
    """A thief pops the pinned task of one who is about to sleep, and gives it back: meanwhile its queue looks empty."""
    def make():
        world = World(ready=[], hand=[], sleeping=False, bytes=0, stepped=0)

        def victim():
            while True:
                yield "popleft", always
                if world.ready:
                    world.ready.pop(0)
                    world.stepped += 1
                    return
                yield "announce", always
                world.sleeping = True
                yield from take_guard(world, 0, "deadline")     # _until_deadline()
                yield "look", always
                world.guard = None
                yield "look again", always
                if not world.ready:
                    yield "epoll_wait", lambda: world.bytes > 0
                    world.bytes = 0
                yield "awake", always
                world.sleeping = False

        def wake():
            if world.sleeping:
                world.bytes += 1

        def waker():
            yield "append", always
            world.ready.append("pinned")
            yield "who sleeps", always
            wake()

        def thief():
            yield from take_guard(world, 1, "steal")
            yield "pop", always
            if world.ready:
                world.hand.append(world.ready.pop())
                yield "give back", always
                world.ready.append(world.hand.pop())
                if with_wake_up:
                    yield "who sleeps", always
                    wake()
            yield "done", always
            world.guard = None

        def check(world):
            assert len(world.ready) + len(world.hand) + world.stepped <= 1, "the task is in two places"

        return world, [victim(), waker(), thief()], check, ends

    return make


def test_a_pinned_task_that_a_thief_has_had_in_its_hand_is_given_back_with_a_wake_up():
    assert explore(giving_back()) > 15
    with pytest.raises(Fault, match="epoll_wait"):
        explore(giving_back(with_wake_up=False))
