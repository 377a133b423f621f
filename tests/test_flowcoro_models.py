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
