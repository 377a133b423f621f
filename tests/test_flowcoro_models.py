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

    def __init__(self, in_team):
        self.task = None
        self.op = None              # under way
        self.cancelled = False
        self.in_team = in_team


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
        self.actors = []            # oldest first
        self.team = None            # a TaskGroup that some of them are in, and that may be cancelled
        self.team_cancelled = False
        self.failures = []
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
        except AssertionError as error:
            self.failures.append(error)
            raise
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
            self.cancel_the_lucky()
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

    def cancel_the_lucky(self):
        """Now and then cancel a task to which something was handed, before it can run: the meanest moment."""
        lucky = [actor for actor in self.actors if actor.op is not None and actor.op.outcome is not None]
        if lucky and self.random.random() < 0.2:
            actor = self.random.choice(lucky)
            self.random.choice([self.cancel, lambda actor: self.cancel_scope(actor.op)])(actor)

    def cancel_team(self):
        self.team_cancelled = True
        for actor in self.actors:
            if actor.in_team:
                actor.cancelled = True
                self.interrupt(actor.op)
        self.team.cancel()

    def time_is(self, now):
        due = [actor.op for actor in self.actors if actor.op is not None and actor.op.deadline <= now]
        for op in sorted(due, key=lambda op: op.deadline):
            self.interrupt(op)

    def interrupt(self, op):
        if op is not None and op.outcome is None and not op.doomed:
            self.withdraw(op)

    # -- the whole

    async def main(self):
        end_of_team = flowcoro.Event()

        async def lead_team():
            async with flowcoro.TaskGroup() as self.team:
                with flowcoro.CancelScope(shield=True):     # it stays: tasks can be born into a cancelled team
                    await end_of_team.wait()

        with flowcoro.timeout(100 * LONG):      # virtual seconds: passes at once when everybody waits for ever
            async with flowcoro.TaskGroup() as group:
                group.spawn(lead_team())
                try:
                    await flowcoro.sleep(1)
                    await self.play(group)
                finally:
                    end_of_team.set()
        self.check()
        self.final()
        assert not self.actors

    async def play(self, group):
        for _ in range(self.random.randrange(20, 90)):
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

    def step(self, group):
        self.cancel_the_lucky()
        choice = self.random.random()
        if choice < 0.35 and len(self.actors) < 12:
            self.spawn(group)
        elif choice < 0.47 and self.actors:
            for actor in self.random.sample(self.actors, min(len(self.actors), self.random.choice([1, 1, 3]))):
                self.cancel(actor)
        elif choice < 0.49:
            self.cancel_team()
        elif choice < 0.6:
            ops = [actor.op for actor in self.actors if actor.op is not None]
            if ops:
                self.cancel_scope(self.random.choice(ops))
        else:
            for _ in range(self.random.randrange(1, 4)):
                self.poke()

    def spawn(self, group):
        actor = Actor(self.random.random() < 0.3)
        self.actors.append(actor)
        if actor.in_team:
            group, actor.cancelled = self.team, self.team_cancelled
        actor.task = group.spawn(self.life(actor))

    async def settle(self):
        """Let everything happen that can still happen. Who is left then has to have a reason to wait."""
        await flowcoro.sleep(LONG)
        self.current = None
        for actor in self.actors:
            assert actor.op is not None and actor.task.state == "parked", f"{actor.task} should not wait here"
            assert actor.op.outcome is None, f"{actor.task} still waits, but the model says {actor.op.outcome}"


def run_program(program, seed, **options):
    """Run one random program. What the models object to is an AssertionError that says how to repeat it."""
    clock = ModelClock()
    clock.program = playing = program(seed, **options)
    try:
        # Every fourth program runs in the order of the ready queue, the others in a random one.
        flowcoro.run(playing.main(), clock=clock, seed=seed if seed % 4 else None)
    except BaseException as error:
        error = playing.failures[0] if playing.failures else error      # what came after it is of no interest
        error.add_note(f"repeat with run_program({program.__name__}, {seed}, **{options})")
        raise error from None


def run_programs(program, **options):
    for seed in SEEDS:
        run_program(program, seed, **options)


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

    def __init__(self, seed, channels=1, primitive=flowcoro.Channel, select=flowcoro.select):
        super().__init__(seed)
        capacities = [0, 0, 1, 2, 5, math.inf] if channels == 1 else [0, 0, 1, 2]
        self.channels = [ChannelModel(primitive(self.random.choice(capacities)), self.commit) for _ in range(channels)]
        self.real_select = select
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
        index, value = await self.real_select(*real)
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

    def __init__(self, seed, primitive=flowcoro.Lock):
        super().__init__(seed)
        self.real = primitive()
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
            self.cancel_the_lucky()

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

    def __init__(self, seed, primitive=flowcoro.Condition):
        self.condition = None
        super().__init__(seed, lambda: self.make_lock(primitive))
        self.unnotified = []
        self.hooked = False

    def make_lock(self, primitive):
        lock = flowcoro.Lock()
        self.condition = primitive(lock)
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

    def __init__(self, seed, primitive=flowcoro.RWLock):
        super().__init__(seed)
        self.real = primitive()
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
            self.cancel_the_lucky()

    def check(self):
        writes = self.writing and self.holders
        assert self.real.statistics() == {
            "readers": 0 if writes else len(self.holders),
            "writer": self.holders[0].task if writes else None, "tasks_waiting": len(self.waiting)}


class SemaphoreProgram(Program):
    """A number and a list of those who wait; anybody may release."""

    def __init__(self, seed, primitive=flowcoro.Semaphore):
        super().__init__(seed)
        self.value = self.random.randrange(4)
        self.max_value = self.random.choice([None, self.value + 1])
        self.real = primitive(self.value, max_value=self.max_value)
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

    def __init__(self, seed, primitive):
        super().__init__(seed)
        self.real = primitive()
        self.waiting = []

    def withdraw(self, op):
        self.waiting.remove(op)
        op.decide(CANCELLED)


class EventProgram(GatheringProgram):

    def __init__(self, seed, primitive=flowcoro.Event):
        super().__init__(seed, primitive)
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

    def __init__(self, seed, primitive=flowcoro.Barrier):
        self.parties = seed % 4 + 1
        super().__init__(seed, lambda: primitive(self.parties))

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

    def __init__(self, seed, primitive=flowcoro.ParkingLot):
        super().__init__(seed, lambda: primitive("stand here"))

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


# ---- Broadcast ---------------------------------------------------------------------------------------------

class SubscriptionModel:
    """One subscriber: the number of its next item, those who wait for it, and what became of the items before."""

    def __init__(self, real, slow, start):
        self.real, self.slow = real, slow
        self.start = self.next = start
        self.missed = 0
        self.closed = False
        self.waiting = []
        self.received = []


class BroadcastProgram(Program):
    """The list of all items ever sent, a number for each subscriber, the senders who wait [(op, item)]."""

    def __init__(self, seed, primitive=flowcoro.Broadcast):
        super().__init__(seed)
        self.capacity = self.random.randrange(1, 5)
        self.real = primitive(self.capacity)
        self.items, self.subscriptions, self.senders = [], [], []
        self.closed = False
        self.closes = self.random.random() < 0.5
        self.subscribe()

    def subscribe(self):
        slow = self.random.choice(["block", "drop", "lag"])
        self.subscriptions.append(SubscriptionModel(self.real.subscribe(slow=slow), slow, len(self.items)))

    def has_room(self):
        return all(len(self.items) - each.next < self.capacity
                   for each in self.subscriptions if each.slow == "block" and not each.closed)

    def publish(self, item):
        self.items.append(item)
        for each in self.subscriptions:
            if each.waiting:
                each.waiting.pop(0).decide(RETURNED, item)
                each.next += 1
                each.received.append(item)

    def let_senders_in(self):
        while self.senders and self.has_room():
            op, item = self.senders.pop(0)
            op.decide(RETURNED)
            self.publish(item)

    def begin_send(self, op, item):
        if self.closed:
            op.decide(flowcoro.ClosedError)
        else:
            self.senders.append((op, item))
            self.let_senders_in()

    def receive(self, each):
        """How a receive that does not wait ends."""
        if each.closed:
            return flowcoro.ClosedError, None
        missed = max(0, len(self.items) - self.capacity - each.next)
        each.next += missed
        each.missed += missed
        if missed and each.slow == "lag":
            return flowcoro.Lagged, None
        if each.next < len(self.items):
            item = self.items[each.next]
            each.next += 1
            each.received.append(item)
            self.let_senders_in()
            return RETURNED, item
        return flowcoro.EndOfChannel if self.closed else flowcoro.WouldBlock, None

    def begin_receive(self, op, each):
        how, item = self.receive(each)
        if how is flowcoro.WouldBlock:
            each.waiting.append(op)
        else:
            op.decide(how, item)

    def withdraw(self, op):
        self.senders = [entry for entry in self.senders if entry[0] is not op]
        for each in self.subscriptions:
            each.waiting = [waiting for waiting in each.waiting if waiting is not op]
        op.decide(CANCELLED)

    async def act(self, actor):
        each = self.random.choice(self.subscriptions)
        if self.random.random() < 0.4:
            self.serial += 1
            item = self.serial
            await self.attempt(actor, lambda op: self.begin_send(op, item), self.real.send(item))
        else:
            await self.attempt(actor, lambda op: self.begin_receive(op, each), each.real.receive())

    def poke(self):
        each = self.random.choice(self.subscriptions)
        choice = self.random.random()
        if choice < 0.4:
            self.serial += 1
            how = flowcoro.ClosedError if self.closed else flowcoro.WouldBlock
            if not self.closed and not self.senders and self.has_room():
                how = RETURNED
                self.publish(self.serial)
            assert nowait(self.real.send_nowait, self.serial) == (how, None)
        elif choice < 0.7:
            assert nowait(each.real.receive_nowait) == self.receive(each)
        elif choice < 0.8 and len(self.subscriptions) < 6:
            if not self.closed:
                self.subscribe()
        elif choice < 0.85:
            self.unsubscribe(each)
        elif self.closes and choice > 0.98:
            self.close()

    def unsubscribe(self, each):
        each.closed = True
        while each.waiting:
            each.waiting.pop(0).decide(flowcoro.ClosedError)
        self.let_senders_in()
        each.real.close()

    def close(self):
        self.closed = True
        while self.senders:
            self.senders.pop(0)[0].decide(flowcoro.ClosedError)
        for each in self.subscriptions:
            while each.waiting:
                each.waiting.pop(0).decide(flowcoro.EndOfChannel)
        self.real.close()

    def check(self):
        assert self.real.statistics() == {
            "capacity": self.capacity, "sent": len(self.items), "senders_waiting": len(self.senders),
            "subscribers": sum(not each.closed for each in self.subscriptions), "closed": self.closed}
        for each in self.subscriptions:
            if not each.closed:
                assert each.real.statistics() == {
                    "behind": len(self.items) - each.next, "missed": each.missed, "slow": each.slow,
                    "closed": False, "tasks_waiting": len(each.waiting)}

    def final(self):
        """Each subscriber has received, or was told that it missed, or still has before it, each item that was sent."""
        for each in self.subscriptions:
            sent = self.items[each.start:each.next]
            if each.slow == "block":
                assert each.received == sent and each.missed == 0
            else:
                assert len(each.received) + each.missed == len(sent)


def test_broadcast_is_a_list_and_a_number_for_each_subscriber_under_random_cancels_and_closes():
    run_programs(BroadcastProgram)


# ---- Promise -----------------------------------------------------------------------------------------------

class PromiseProgram(Program):
    """A few promises, each an outcome and a list of those who wait."""

    def __init__(self, seed, primitive=flowcoro.Promise):
        super().__init__(seed)
        self.promises = [(primitive(), [], []) for _ in range(3)]

    def withdraw(self, op):
        for promise, outcome, waiting in self.promises:
            if op in waiting:
                waiting.remove(op)
        op.decide(CANCELLED)

    async def act(self, actor):
        promise, outcome, waiting = self.random.choice(self.promises)

        def begin(op):
            if outcome:
                op.decide(*outcome)
            else:
                waiting.append(op)

        await self.attempt(actor, begin, self.wait(promise))

    async def wait(self, promise):
        return await promise

    def poke(self):
        promise, outcome, waiting = self.random.choice(self.promises)
        if self.random.random() > 0.15:
            return
        if self.random.random() < 0.5:
            actual, new = nowait(promise.set_result, self.random), (RETURNED, self.random)
        else:
            actual, new = nowait(promise.set_exception, KeyError("broken")), (KeyError, None)
        assert actual == ((RuntimeError, None) if outcome else (RETURNED, None))
        outcome += new if not outcome else ()
        while waiting:
            waiting.pop(0).decide(*outcome)

    def check(self):
        for promise, outcome, waiting in self.promises:
            assert promise.statistics() == {"done": bool(outcome), "tasks_waiting": len(waiting)}

    def end(self):
        for promise, outcome, waiting in self.promises:
            if not outcome:
                outcome += RETURNED, None
                promise.set_result(None)
                while waiting:
                    waiting.pop(0).decide(*outcome)

    async def main(self):
        await super().main()
        for promise, outcome, waiting in self.promises:
            try:
                assert (RETURNED, await promise) == tuple(outcome)
            except KeyError:
                assert outcome[0] is KeyError


def test_promise_is_an_outcome_and_a_list_under_random_cancels():
    run_programs(PromiseProgram)


# ---- the models find bugs ----------------------------------------------------------------------------------
# Each of these is the bug that its primitive is most likely to have. Whoever weakens a model finds out here.

class ChannelThatLosesAnItem(flowcoro.Channel):
    async def receive(self):
        item = await super().receive()
        await flowcoro.checkpoint()             # a cancel that comes now takes the item with it
        return item


class ChannelThatSendsWhatWasCancelled(flowcoro.Channel):
    async def send(self, item):
        try:
            await super().send(item)
        except flowcoro.Cancelled:
            if len(self) < self.capacity:
                self.send_nowait(item)
            raise


class ChannelThatWakesOneOnClose(flowcoro.Channel):
    def close(self):
        if self.statistics()["receivers_waiting"] < 2:
            super().close()


class LockThatLetsLatecomersIn(flowcoro.Lock):
    """Woken tasks compete with whoever comes along, instead of being handed the lock."""

    def __init__(self):
        super().__init__()
        self.lot = flowcoro.ParkingLot()

    async def acquire(self):
        while self.locked():
            await self.lot.park()
        self.acquire_nowait()

    def release(self):
        super().release()
        self.lot.unpark()

    def statistics(self):
        return {"owner": self.owner, "tasks_waiting": len(self.lot)}


class LockThatACancelEats(flowcoro.Lock):
    async def acquire(self):
        await super().acquire()
        await flowcoro.checkpoint()


class SemaphoreThatACancelEats(flowcoro.Semaphore):
    async def acquire(self):
        await super().acquire()
        await flowcoro.checkpoint()


class ConditionThatLosesANotify(flowcoro.Condition):
    def __init__(self, lock):
        super().__init__(lock)
        self.lock, self.lot = lock, flowcoro.ParkingLot()

    async def wait(self):
        self.release()
        try:
            await self.lot.park()
        finally:
            with flowcoro.CancelScope(shield=True):
                await self.acquire()

    def notify(self, count=1):
        self.lot.unpark(count)

    def statistics(self):
        return {"tasks_waiting": len(self.lot), "lock": self.lock.statistics()}


class BarrierThatCountsTheCancelled(flowcoro.Barrier):
    def __init__(self, parties):
        super().__init__(parties)
        self.lot, self.count = flowcoro.ParkingLot(), 0

    async def wait(self):
        index = self.count
        self.count += 1
        if self.count < self.parties:
            await self.lot.park()
        else:
            self.count = 0
            self.lot.unpark_all()
        return index

    def statistics(self):
        return {"parties": self.parties, "tasks_waiting": len(self.lot)}


async def select_that_does_two(*cases):
    index, value = await flowcoro.select(*cases)
    for other in cases:
        if isinstance(other, flowcoro.Channel) and len(other):
            other.receive_nowait()
            break
    return index, value


@pytest.mark.parametrize("program, options", [
    (ChannelProgram, {"primitive": ChannelThatLosesAnItem}),
    (ChannelProgram, {"primitive": ChannelThatSendsWhatWasCancelled}),
    (ChannelProgram, {"primitive": ChannelThatWakesOneOnClose}),
    (ChannelProgram, {"channels": 3, "select": select_that_does_two}),
    (LockProgram, {"primitive": LockThatLetsLatecomersIn}),
    (LockProgram, {"primitive": LockThatACancelEats}),
    (SemaphoreProgram, {"primitive": SemaphoreThatACancelEats}),
    (ConditionProgram, {"primitive": ConditionThatLosesANotify}),
    (BarrierProgram, {"primitive": BarrierThatCountsTheCancelled}),
], ids=lambda value: next(reversed(value.values())).__name__ if isinstance(value, dict) else "")
def test_models_find_a_planted_bug(program, options):
    with pytest.raises(AssertionError):
        for seed in range(100):
            run_program(program, seed, **options)
