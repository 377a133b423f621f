"""Every primitive against plain lists, under random spawn, cancel, deadline and close schedules.

A program is random: tasks begin operations, time out, are cancelled in the same step in which something was handed
to them, and so on. Beside the real primitive it keeps a model, which is lists and the rule in words. The kernel
runs one task at a time, so both see the same events in the same order: each operation has to end exactly as the
model says, and after every event the primitive's statistics() have to be those of the lists.

FLOWCORO_SEEDS=1000 runs a thousand programs per primitive. A failure names its seed, which repeats it.
"""

import math
import os
import random

import pytest

import flowcoro
import flowcoro_testing

SEEDS = range(int(os.environ.get("FLOWCORO_SEEDS", 50)))

RETURNED, CANCELLED = "returned", "cancelled"

# Virtual seconds after which whatever can still happen has happened: deadlines lie much nearer.
LONG = 1000.0


# ---- the machine that runs a program -----------------------------------------------------------------------

class Op:
    """One operation of a task, as the model sees it: undecided while it waits, then (how it ends, with what)."""

    def __init__(self, actor, deadline):
        self.actor = actor
        self.deadline = deadline
        self.scope = flowcoro.CancelScope(deadline=deadline)
        self.outcome = None
        self.in_condition = False   # waits for a notify, or has had one
        self.doomed = False         # cancelled, but something has to be done before it can end

    def decide(self, how, value=None):
        assert self.outcome is None, f"the model decides twice: {self.outcome}, then {(how, value)}"
        self.outcome = how, value


class Actor:
    """One task of a program."""

    def __init__(self):
        self.task = None
        self.op = None              # under way
        self.cancelled = False


class ModelClock(flowcoro_testing.VirtualClock):
    """Tells the program that time passes, before the kernel wakes anybody because of it."""

    def __init__(self):
        super().__init__()
        self.program = None

    def idle(self, timeout):
        wait = super().idle(timeout)
        self.program.time_is(self.now())
        return wait


class Program:
    """A random program over one primitive. A subclass keeps the lists, and says what tasks and driver do.

    act() is one operation of a task, poke() one that does not wait, withdraw() what a cancel does to an operation
    that waits, check() compares the lists with statistics().
    """

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.actors = []
        self.serial = 0
        self.current = None         # who has run last: tells whether an operation has let others run

    def withdraw(self, op):
        raise NotImplementedError

    def poke(self):
        pass

    def end(self):
        """What ends a program besides cancelling what still waits."""

    def final(self):
        """What has to hold when all tasks have ended."""

    def ended_doomed(self, op):
        """The task of `op`, which was doomed, has come back."""

    # -- the tasks

    async def life(self, actor):
        try:
            for _ in range(self.random.randrange(1, 6)):
                await self.pause(actor)
                await self.act(actor)
        finally:
            self.actors.remove(actor)

    async def pause(self, actor):
        """Let others run, or not, or let time pass."""
        choice = self.random.randrange(5)
        try:
            if choice == 3 or flowcoro.current_task().budget <= 0:
                await flowcoro.checkpoint()
            elif choice == 4:
                await flowcoro.sleep(self.random.randrange(1, 5) / 8)
        except flowcoro.Cancelled:
            assert actor.cancelled, "Cancelled in a task that nobody has cancelled"
            raise
        finally:
            self.current = actor

    async def attempt(self, actor, begin, operation):
        """Await `operation`, whose counterpart in the model is begin(op). Returns what it returned, or None.

        Without a wait since begin() nothing can come between the two: the model is told by the step that does it.
        """
        if not actor.cancelled and flowcoro.current_task().budget <= 0:
            try:
                await flowcoro.checkpoint()
            except BaseException:
                operation.close()
                raise
        op = actor.op = Op(actor, self.some_deadline())
        with op.scope:
            if actor.cancelled:
                op.decide(CANCELLED)
            else:
                begin(op)
            self.current = actor
            try:
                outcome = RETURNED, await operation
            except flowcoro.Cancelled:
                if op.doomed:
                    self.ended_doomed(op)
                assert op.outcome == (CANCELLED, None), f"cancelled, but the model says {op.outcome}"
                raise
            except (flowcoro.FlowCoroError, LookupError) as error:
                outcome = type(error), None
            finally:
                actor.op = None
            if callable(op.outcome):            # the model only knows what is possible
                op.outcome(self.current is actor, outcome)
            else:
                assert outcome == op.outcome, f"ended with {outcome}, but the model says {op.outcome}"
            self.current = actor
            self.check()
            return outcome[1]

    def some_deadline(self):
        """No two are equal: which of two tasks is woken first is then no question."""
        if self.random.random() < 0.6:
            return math.inf
        self.serial += 1
        return flowcoro.now() + self.random.randrange(1, 5) / 8 + self.serial / 2**20

    # -- cancellation

    def cancel(self, actor):
        actor.cancelled = True
        self.interrupt(actor.op)
        actor.task.cancel()

    def cancel_scope(self, op):
        self.interrupt(op)
        op.scope.cancel()

    def time_is(self, now):
        due = [actor.op for actor in self.actors if actor.op is not None and actor.op.deadline <= now]
        for op in sorted(due, key=lambda op: op.deadline):
            self.interrupt(op)

    def interrupt(self, op):
        if op is not None and op.outcome is None and not op.doomed:
            self.withdraw(op)

    # -- the whole

    async def main(self):
        with flowcoro.timeout(100 * LONG):      # virtual seconds: passes at once when everybody waits for ever
            async with flowcoro.TaskGroup() as group:
                for _ in range(self.random.randrange(20, 60)):
                    self.step(group)
                    self.check()
                    if self.random.random() < 0.4:
                        await self.pause(None)
                    self.current = None
                await self.settle()
                self.end()
                self.check()
                await self.settle()
                for actor in list(self.actors):
                    self.cancel(actor)
        self.check()
        self.final()
        assert not self.actors

    def step(self, group):
        choice = self.random.random()
        if choice < 0.35 and len(self.actors) < 12:
            actor = Actor()
            self.actors.append(actor)
            actor.task = group.spawn(self.life(actor))
        elif choice < 0.5 and self.actors:
            for actor in self.random.sample(self.actors, min(len(self.actors), self.random.choice([1, 1, 3]))):
                self.cancel(actor)
        elif choice < 0.6:
            ops = [actor.op for actor in self.actors if actor.op is not None]
            if ops:
                self.cancel_scope(self.random.choice(ops))
        else:
            for _ in range(self.random.randrange(1, 4)):
                self.poke()

    async def settle(self):
        """Let everything happen that can still happen. Who is left then has to have a reason to wait."""
        await flowcoro.sleep(LONG)
        self.current = None
        for actor in self.actors:
            assert actor.op is not None and actor.task.state == "parked", f"{actor.task} should not wait here"
            assert actor.op.outcome is None, f"{actor.task} still waits, but the model says {actor.op.outcome}"


def run_program(make, seed, **options):
    clock = ModelClock()
    clock.program = program = make(seed, **options)
    try:
        # Every fourth program runs in the order of the ready queue, the others in a random one.
        flowcoro.run(program.main(), clock=clock, seed=seed if seed % 4 else None)
    except BaseException as error:
        error.add_note(f"repeat with: run_program({make.__name__}, {seed}{''.join(f', {k}={v!r}' for k, v in options.items())})")
        raise


def run_programs(make, **options):
    for seed in SEEDS:
        run_program(make, seed, **options)


def nowait(operation, *args):
    """How a call ends that does not wait: (RETURNED, value) or (the class of the error, None)."""
    try:
        return RETURNED, operation(*args)
    except (flowcoro.FlowCoroError, ValueError, RuntimeError) as error:
        return type(error), None


# ---- channels and select -----------------------------------------------------------------------------------

class ChannelModel:
    """A channel as three lists: items, senders that wait [(op, index, item)], receivers that wait [(op, index)].

    The index is that of a select's case, None for those that do not select. commit(op, how, value, index) tells the
    program that an operation that waited has come to its end here.
    """

    def __init__(self, real, commit):
        self.real, self.commit = real, commit
        self.items, self.senders, self.receivers = [], [], []
        self.closed = False

    def can_send(self):
        return self.closed or bool(self.receivers) or len(self.items) < self.real.capacity

    def can_receive(self):
        return self.closed or bool(self.items) or bool(self.senders)

    def send(self, item):
        """When it can: how it ends."""
        if self.closed:
            return flowcoro.ClosedError, None
        if self.receivers:
            op, index = self.receivers[0]
            self.commit(op, RETURNED, item, index)
        else:
            self.items.append(item)
        return RETURNED, None

    def receive(self):
        """When it can: how it ends."""
        if self.senders:
            op, index, item = self.senders[0]
            self.items.append(item)
            self.commit(op, RETURNED, None, index)
        if self.items:
            return RETURNED, self.items.pop(0)
        return flowcoro.EndOfChannel, None

    def close(self):
        self.closed = True
        while self.receivers:
            self.commit(self.receivers[0][0], flowcoro.EndOfChannel)
        while self.senders:
            self.commit(self.senders[0][0], flowcoro.ClosedError)

    def leave(self, op):
        self.senders = [entry for entry in self.senders if entry[0] is not op]
        self.receivers = [entry for entry in self.receivers if entry[0] is not op]

    def check(self):
        assert self.real.statistics() == {
            "capacity": self.real.capacity, "items": len(self.items), "senders_waiting": len(self.senders),
            "receivers_waiting": len(self.receivers), "closed": self.closed}


class ChannelProgram(Program):
    """Senders and receivers of one channel; with several channels, also selects over any of their sends and receives."""

    def __init__(self, seed, channels=1, make=flowcoro.Channel):
        super().__init__(seed)
        capacities = [0, 0, 1, 2, 5, math.inf] if channels == 1 else [0, 0, 1, 2]
        self.channels = [ChannelModel(make(self.random.choice(capacities)), self.commit) for _ in range(channels)]
        self.closes = self.random.random() < 0.5
        self.sent, self.received = [], []       # what the operations themselves have said

    def commit(self, op, how, value=None, index=None):
        self.withdraw_everywhere(op)
        op.decide(how, value if index is None or how != RETURNED else (index, value))

    def withdraw_everywhere(self, op):
        for channel in self.channels:
            channel.leave(op)

    def withdraw(self, op):
        self.withdraw_everywhere(op)
        op.decide(CANCELLED)

    def new_item(self):
        self.serial += 1
        return self.serial

    async def act(self, actor):
        channel = self.random.choice(self.channels)
        choice = self.random.random() * (2 if len(self.channels) > 1 else 1)
        if choice < 0.45:
            item = self.new_item()

            def begin(op):
                if channel.can_send():
                    op.decide(*channel.send(item))
                else:
                    channel.senders.append((op, None, item))

            await self.attempt(actor, begin, self.send(channel.real, item))
        elif choice < 0.9:
            def begin(op):
                if channel.can_receive():
                    op.decide(*channel.receive())
                else:
                    channel.receivers.append((op, None))

            await self.attempt(actor, begin, self.receive(channel.real))
        elif choice < 1:
            self.poke()
        else:
            await self.act_select(actor)

    async def send(self, real, item):
        await real.send(item)
        self.sent.append(item)

    async def receive(self, real):
        item = await real.receive()
        self.received.append(item)
        return item

    async def act_select(self, actor):
        cases = [(channel, self.new_item() if self.random.random() < 0.5 else None)
                 for channel in self.random.choices(self.channels, k=self.random.randrange(1, 5))]

        def begin(op):
            if any(channel.can_receive() if item is None else channel.can_send() for channel, item in cases):
                op.outcome = lambda at_once, actual: self.judge(cases, at_once, actual)
                return
            for index, (channel, item) in enumerate(cases):
                if item is None:
                    channel.receivers.append((op, index))
                else:
                    channel.senders.append((op, index, item))

        await self.attempt(actor, begin, self.select(cases))

    async def select(self, cases):
        real = [channel.real if item is None else (channel.real, item) for channel, item in cases]
        index, value = await flowcoro.select(*real)
        self.note(cases, index, value)
        return index, value

    def note(self, cases, index, value):
        if cases[index][1] is None:
            self.received.append(value)
        else:
            self.sent.append(cases[index][1])

    def judge(self, cases, at_once, actual):
        """A select with cases that were ready has to have done one of those, at once, and nothing else."""
        how, value = actual
        assert at_once, "a select with a case that is ready has waited"
        if how == RETURNED:
            index, value = value
            channel, item = cases[index]
            assert channel.can_receive() if item is None else channel.can_send(), "select took a case that is not ready"
            assert (channel.receive() if item is None else channel.send(item)) == (RETURNED, value)
        else:
            expected = {flowcoro.ClosedError if item is not None else flowcoro.EndOfChannel
                        for channel, item in cases if channel.closed and (item is not None or not channel.items)}
            assert how in expected, f"no case of the select ends with {how}"

    def poke(self):
        channel = self.random.choice(self.channels)
        choice = self.random.random()
        if choice < 0.4:
            item = self.new_item()
            expected = channel.send(item) if channel.can_send() else (flowcoro.WouldBlock, None)
            assert nowait(channel.real.send_nowait, item) == expected
            if expected[0] == RETURNED:
                self.sent.append(item)
        elif choice < 0.8:
            expected = channel.receive() if channel.can_receive() else (flowcoro.WouldBlock, None)
            assert nowait(channel.real.receive_nowait) == expected
            if expected[0] == RETURNED:
                self.received.append(expected[1])
        elif choice < 0.9:
            cases = [(each, self.new_item() if self.random.random() < 0.5 else None)
                     for each in self.random.sample(self.channels, self.random.randrange(1, len(self.channels) + 1))]
            actual = nowait(flowcoro.select_nowait,
                            *[each.real if item is None else (each.real, item) for each, item in cases])
            if actual[0] is flowcoro.WouldBlock:
                assert not any(each.can_receive() if item is None else each.can_send() for each, item in cases)
            else:
                self.judge(cases, True, actual)
                if actual[0] == RETURNED:
                    self.note(cases, *actual[1])
        elif self.closes and choice > 0.98:
            channel.close()
            channel.real.close()

    def check(self):
        for channel in self.channels:
            channel.check()

    def end(self):
        for channel in self.channels:
            if self.closes:
                channel.close()
                channel.real.close()

    def final(self):
        """Whatever the model says: what was sent has been received, each item once."""
        left = [channel.real.receive_nowait() for channel in self.channels for _ in range(len(channel.real))]
        assert sorted(self.received + left) == sorted(self.sent)


def test_channel_is_a_list_under_random_cancels_and_closes():
    run_programs(ChannelProgram)


def test_select_over_channels_does_exactly_one_case_under_random_cancels_and_closes():
    run_programs(ChannelProgram, channels=3)


# ---- locks -------------------------------------------------------------------------------------------------

class LockProgram(Program):
    """The lock is its owner and a list of those who wait."""

    def __init__(self, seed, make=flowcoro.Lock):
        super().__init__(seed)
        self.real = make()
        self.owner = None
        self.waiting = []

    def acquire(self, op):
        if self.owner is None:
            self.hand_to(op)
        else:
            self.waiting.append(op)

    def hand_to(self, op):
        self.owner = op.actor
        op.decide(RETURNED)

    def release(self):
        self.owner = None
        if self.waiting:
            self.hand_to(self.waiting.pop(0))

    def withdraw(self, op):
        self.waiting.remove(op)
        op.decide(CANCELLED)

    async def act(self, actor):
        if self.random.random() < 0.2:
            free = self.owner is None
            assert nowait(self.real.acquire_nowait)[0] == (RETURNED if free else flowcoro.WouldBlock)
            if not free:
                return
            self.owner = actor
        else:
            await self.attempt(actor, self.acquire, self.real.acquire())
            if self.owner is not actor:         # the deadline has passed
                return
        try:
            await self.hold(actor)
        finally:
            self.release()
            self.real.release()

    async def hold(self, actor):
        for _ in range(self.random.randrange(3)):
            await self.pause(actor)
            assert self.owner is actor

    def check(self):
        assert self.real.statistics() == {"owner": self.owner and self.owner.task, "tasks_waiting": len(self.waiting)}


class ConditionProgram(LockProgram):
    """A lock and a second list, of those who wait for a notify.

    notify() moves them to the end of the lock's list, and then no cancel can take the notify from them. One that is
    cancelled before is doomed: it has to get in line for the lock, when it next runs, and then ends.
    """

    def __init__(self, seed, make=flowcoro.Condition):
        self.condition = None
        super().__init__(seed, lambda: self.make_lock(make))
        self.unnotified = []
        self.hooked = False

    def make_lock(self, make):
        lock = flowcoro.Lock()
        self.condition = make(lock)
        return lock

    def hand_to(self, op):
        self.owner = op.actor
        op.decide(CANCELLED if op.doomed else RETURNED)

    def withdraw(self, op):
        if op in self.unnotified:
            self.unnotified.remove(op)
            op.doomed = True
        elif not op.in_condition:
            super().withdraw(op)

    def task_parked(self, task, reason):
        for actor in self.actors:
            if actor.task is task and actor.op and actor.op.doomed:
                self.waiting.append(actor.op)

    def ended_doomed(self, op):
        if op.outcome is None:                  # it was its turn at once
            assert self.owner is None
            self.hand_to(op)

    async def hold(self, actor):
        if not self.hooked:
            self.hooked = True
            flowcoro.add_hooks(self)
        for _ in range(self.random.randrange(4)):
            choice = self.random.random()
            if choice < 0.5:
                await self.attempt(actor, self.wait, self.condition.wait())
            elif choice < 0.8:
                count = self.random.choice([1, 1, 2, math.inf])
                self.notify(count)
                self.condition.notify_all() if count == math.inf else self.condition.notify(count)
            else:
                await self.pause(actor)
            assert self.owner is actor

    def notify(self, count):
        while count > 0 and self.unnotified:
            self.waiting.append(self.unnotified.pop(0))
            count -= 1

    def wait(self, op):
        op.in_condition = True
        self.release()
        self.unnotified.append(op)

    def check(self):
        super().check()
        assert self.condition.statistics() == {
            "tasks_waiting": len(self.unnotified), "lock": self.real.statistics()}


class RWLockProgram(Program):
    """A list of holders, and one list of readers and writers who wait: first come, first served."""

    def __init__(self, seed, make=flowcoro.RWLock):
        super().__init__(seed)
        self.real = make()
        self.holders = []           # actors
        self.writing = False
        self.waiting = []           # (op, writes)

    def fits(self, writes):
        return not self.holders or not (writes or self.writing)

    def admit(self):
        while self.waiting and self.fits(self.waiting[0][1]):
            op, self.writing = self.waiting.pop(0)
            self.holders.append(op.actor)
            op.decide(RETURNED)

    def withdraw(self, op):
        op.decide(CANCELLED)
        self.waiting = [entry for entry in self.waiting if entry[0] is not op]
        self.admit()                # a writer that gives up lets in the readers behind it

    async def act(self, actor):
        writes = self.random.random() < 0.4
        side = self.real.write if writes else self.real.read

        def begin(op):
            self.waiting.append((op, writes))
            self.admit()

        if self.random.random() < 0.2:
            free = not self.waiting and self.fits(writes)
            assert nowait(side.acquire_nowait)[0] == (RETURNED if free else flowcoro.WouldBlock)
            if free:
                self.holders.append(actor)
                self.writing = writes
        else:
            await self.attempt(actor, begin, side.acquire())
        if actor not in self.holders:
            return
        try:
            for _ in range(self.random.randrange(3)):
                await self.pause(actor)
                assert self.holders == [actor] if writes else actor in self.holders and not self.writing
        finally:
            self.holders.remove(actor)
            self.admit()
            side.release()

    def check(self):
        writes = self.writing and self.holders
        assert self.real.statistics() == {
            "readers": 0 if writes else len(self.holders),
            "writer": self.holders[0].task if writes else None, "tasks_waiting": len(self.waiting)}


class SemaphoreProgram(Program):
    """A number and a list of those who wait; anybody may release."""

    def __init__(self, seed, make=flowcoro.Semaphore):
        super().__init__(seed)
        self.value = self.random.randrange(4)
        self.max_value = self.random.choice([None, self.value + 1])
        self.real = make(self.value, max_value=self.max_value)
        self.waiting = []

    def acquire(self, op):
        if self.value:
            self.value -= 1
            op.decide(RETURNED)
        else:
            self.waiting.append(op)

    def release(self):
        full = self.value == self.max_value
        assert nowait(self.real.release)[0] == (ValueError if full else RETURNED)
        if self.waiting:
            self.waiting.pop(0).decide(RETURNED)
        elif not full:
            self.value += 1

    def withdraw(self, op):
        self.waiting.remove(op)
        op.decide(CANCELLED)

    async def act(self, actor):
        op = None

        def begin(begun):
            nonlocal op
            op = begun
            self.acquire(op)

        await self.attempt(actor, begin, self.real.acquire())
        if op.outcome == (RETURNED, None):
            try:
                await self.pause(actor)
            finally:
                if self.random.random() < 0.9:
                    self.release()

    def poke(self):
        choice = self.random.random()
        if choice < 0.2:
            self.release()
        elif choice < 0.3:
            assert nowait(self.real.acquire_nowait)[0] == (RETURNED if self.value else flowcoro.WouldBlock)
            self.value -= self.value > 0

    def check(self):
        assert self.real.statistics() == {
            "value": self.value, "max_value": self.max_value, "tasks_waiting": len(self.waiting)}


class GatheringProgram(Program):
    """Event, Barrier and ParkingLot: one list of those who wait."""

    def __init__(self, seed, make):
        super().__init__(seed)
        self.real = make()
        self.waiting = []

    def withdraw(self, op):
        self.waiting.remove(op)
        op.decide(CANCELLED)


class EventProgram(GatheringProgram):

    def __init__(self, seed, make=flowcoro.Event):
        super().__init__(seed, make)
        self.is_set = False

    def begin(self, op):
        if self.is_set:
            op.decide(RETURNED)
        else:
            self.waiting.append(op)

    async def act(self, actor):
        await self.attempt(actor, self.begin, self.real.wait())

    def poke(self):
        self.is_set = self.random.random() < 0.3
        if self.is_set:
            while self.waiting:
                self.waiting.pop(0).decide(RETURNED)
            self.real.set()
        else:
            self.real.clear()
        assert self.real.is_set() == self.is_set

    def check(self):
        assert self.real.statistics() == {"set": self.is_set, "tasks_waiting": len(self.waiting)}


class BarrierProgram(GatheringProgram):

    def __init__(self, seed, make=flowcoro.Barrier):
        self.parties = seed % 4 + 1
        super().__init__(seed, lambda: make(self.parties))

    def begin(self, op):
        self.waiting.append(op)
        if len(self.waiting) == self.parties:
            for index in range(self.parties):
                self.waiting.pop(0).decide(RETURNED, index)

    async def act(self, actor):
        await self.attempt(actor, self.begin, self.real.wait())

    def check(self):
        assert self.real.statistics() == {"parties": self.parties, "tasks_waiting": len(self.waiting)}


class ParkingLotProgram(GatheringProgram):

    def __init__(self, seed, make=flowcoro.ParkingLot):
        super().__init__(seed, lambda: make("stand here"))

    async def act(self, actor):
        await self.attempt(actor, self.waiting.append, self.real.park())

    def poke(self):
        count = self.random.choice([0, 1, 1, 2, math.inf])
        woken = min(count, len(self.waiting))
        fails = self.random.random() < 0.3
        for _ in range(woken):
            self.waiting.pop(0).decide(*((KeyError, None) if fails else (RETURNED, woken)))
        assert self.real.unpark(count, woken, KeyError() if fails else None) == woken

    def check(self):
        assert self.real.statistics() == {"tasks_waiting": len(self.waiting)}
        assert len(self.real) == len(self.waiting)


def test_lock_is_a_list_under_random_cancels():
    run_programs(LockProgram)


def test_condition_is_two_lists_and_loses_no_notify_under_random_cancels():
    run_programs(ConditionProgram)


def test_rwlock_is_a_list_under_random_cancels():
    run_programs(RWLockProgram)


def test_semaphore_is_a_number_and_a_list_under_random_cancels():
    run_programs(SemaphoreProgram)


def test_event_is_a_flag_and_a_list_under_random_cancels():
    run_programs(EventProgram)


def test_barrier_is_a_list_that_empties_when_it_is_full_under_random_cancels():
    run_programs(BarrierProgram)


def test_parking_lot_is_a_list_under_random_cancels():
    run_programs(ParkingLotProgram)
