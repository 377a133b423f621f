"""Random trees of groups, scopes and tasks, under random cancels, against a model of what cancellation means.

The model is a tree of regions: a scope, a group's scope, or a task. A region is cancelled by cancel(), by its
deadline, or (a group's) by an error. Code is in danger when, on the way from its region to the root, a cancelled
region comes before a shield; the model knows nothing else. Every operation of the program is compared with it:

- begun in danger it raises Cancelled at once; Cancelled is raised in danger only;
- what waits is cancelled in the moment it gets into danger, unless its wait was over in that very moment;
- Cancelled leaves a scope only if the code around it is in danger, else it is caught there;
- a group ends after all its tasks, and exactly their errors and that of its body leave it;
- every task ends, all cleanup runs to its end exactly once, and no value that was sent is lost.

FLOWCORO_SEEDS=1000 grows a thousand trees. A failure names its seed, which repeats it.
"""

import math
import os
import random

import pytest

import flowcoro
from flowcoro_testing import VirtualClock

SEEDS = int(os.environ.get("FLOWCORO_SEEDS", 50))

# Of tasks in one program, and of blocks inside blocks: enough for everything to meet everything.
MOST_TASKS = 60
MOST_DEPTH = 4


class Oops(Exception):
    """What tasks fail with."""


class Region:
    """A piece of code that can be cancelled as a whole."""

    def __init__(self, parent, thing=None, shield=False, deadline=math.inf):
        self.parent = parent
        self.thing = thing              # its CancelScope, or its Task
        self.shield = shield
        self.deadline = deadline
        self.cancelled = False

    def in_danger(self):
        region = self
        while region is not None:
            if region.cancelled:
                return True
            if region.shield:
                return False
            region = region.parent
        return False

    def inside_of_cancelled(self):
        """As in_danger(), but for shields: they may have been raised after Cancelled was."""
        region = self
        while region is not None and not region.cancelled:
            region = region.parent
        return region is not None


class Operation:
    """One that a task is waiting for."""

    def __init__(self, region, now):
        self.region = region
        self.begun_in_danger = region.in_danger()
        self.was_in_danger = self.begun_in_danger
        self.since = now if self.begun_in_danger else None      # in danger without a break

    def look(self, now):
        if not self.region.in_danger():
            self.since = None
        elif self.since is None:
            self.since, self.was_in_danger = now, True


class Child:
    """A task of the program and how it ended, by its own account."""

    def __init__(self, region):
        self.region = region
        self.task = None
        self.error = None
        self.began = self.ended = 0


class Group:
    def __init__(self, region):
        self.region = region
        self.group = flowcoro.TaskGroup()
        self.children = []
        self.open = False


class ModelClock(VirtualClock):
    """Lets the deadlines of the model pass as time does."""

    tree = None

    def idle(self, timeout):
        wait = super().idle(timeout)
        self.tree.time_passes(self.now())
        return wait


class Tree:
    """One random program, which checks itself as it runs."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        # In every other program tasks also raise and drop the shields of others; then a little less holds.
        self.moves_shields = seed % 2 == 1
        self.clock = ModelClock()
        self.clock.tree = self
        self.root = Region(None)
        self.regions = []               # those that are entered and may be cancelled by anybody
        self.groups = []
        self.children = []
        self.waiting = {}               # Operation -> None; a dict is ordered
        self.channel = flowcoro.Channel()
        self.sent, self.received = [], []
        self.cleanups_begun = self.cleanups_ended = 0
        self.serial = 0

    # -- the model

    def changed(self):
        for operation in self.waiting:
            operation.look(self.clock.now())

    def time_passes(self, now):
        for region in self.regions:
            if region.deadline <= now:
                region.cancelled = True
        self.changed()

    def cancel(self, region):
        region.cancelled = True
        self.changed()

    def assert_in_danger(self, region, what):
        if self.moves_shields:
            assert region.inside_of_cancelled(), what
        else:
            assert region.in_danger(), what

    # -- operations

    async def operation(self, region, make, at_once=False):
        now = self.clock.now
        operation = Operation(region, now())
        began = now()
        self.waiting[operation] = None
        try:
            result = await make()
        except flowcoro.Cancelled:
            assert operation.was_in_danger, "Cancelled where nothing was cancelled"
            if operation.begun_in_danger:
                assert now() == began, "time has passed in a cancelled region"
            raise
        finally:
            del self.waiting[operation]
        if region.in_danger() and operation.since is not None:
            assert not operation.begun_in_danger or self.moves_shields, "no checkpoint in a cancelled region"
            assert operation.since == now(), "the wait went on in a cancelled region"
            assert not at_once, "a checkpoint that was not one of cancellation"
        return result

    async def sleep(self, region, depth=0):
        seconds = self.random.randrange(1, 20) / 4
        until = self.clock.now() + seconds
        await self.operation(region, lambda: flowcoro.sleep(seconds))
        assert self.clock.now() == until

    async def checkpoint(self, region, depth=0):
        await self.operation(region, flowcoro.checkpoint, at_once=True)

    async def send(self, region):
        self.serial += 1
        item = self.serial
        await self.operation(region, lambda: self.channel.send(item))
        self.sent.append(item)

    async def receive(self, region):
        self.received.append(await self.operation(region, self.channel.receive))

    async def join(self, region):
        child = self.random.choice(self.children)
        if child.task is None or child.task is flowcoro.current_task():
            return

        async def wait():
            try:
                await child.task
            except flowcoro.TaskCancelled:
                assert child.task.cancelled()
            except Oops:
                assert child.error is not None
            except ExceptionGroup as error:
                assert error is child.error

        await self.operation(region, wait)
        assert child.task.done() and child.ended == child.began == 1

    # -- blocks

    async def block(self, region, depth):
        for _ in range(self.random.randrange(1, 6)):
            actions = [self.sleep, self.checkpoint, self.disturb, self.exchange, self.exchange, self.fail]
            if depth < MOST_DEPTH:
                actions += [self.scope, self.scope, self.group, self.group, self.cleanup, self.swallow]
            await self.random.choice(actions)(region, depth + 1)

    async def scope(self, outer, depth):
        """A block in a scope."""
        now = self.clock.now()
        deadline = now + self.random.randrange(-2, 16) / 4 if self.random.random() < 0.5 else math.inf
        scope = flowcoro.CancelScope(deadline=deadline, shield=self.random.random() < 0.25)
        region = Region(outer, scope, scope.shield, deadline)
        if self.random.random() < 0.1:
            scope.cancel()
            region.cancelled = True
        left = None
        try:
            with scope:
                if deadline <= now:
                    region.cancelled = True
                self.regions.append(region)
                try:
                    await self.block(region, depth)
                except BaseException as error:
                    left = error
                    raise
                finally:
                    self.regions.remove(region)
        except flowcoro.Cancelled:
            self.assert_in_danger(outer, "Cancelled has left its scope")
            assert not scope.cancelled_caught
            assert not (scope.shield and scope.cancel_called), "what was outside is not seen through a shield"
            raise
        except Exception as error:
            assert error is left
            raise
        else:
            assert scope.cancelled_caught == (left is not None)
            if left is not None:
                assert isinstance(left, flowcoro.Cancelled) and region.cancelled
                assert scope.shield or not outer.in_danger(), "an inner scope has caught the Cancelled of an outer one"

    async def group(self, outer, depth):
        """A block in a group with tasks."""
        group = Group(Region(outer))
        region = group.region
        body_error = None
        try:
            async with group.group:
                region.thing = group.group.scope
                group.open = True
                self.regions.append(region)
                self.groups.append(group)
                if self.random.random() < 0.2:
                    region.deadline = self.clock.now() + self.random.randrange(1, 16) / 4
                    region.thing.deadline = region.deadline
                if self.random.random() < 0.2:
                    region.shield = region.thing.shield = True
                    self.changed()
                try:
                    for _ in range(self.random.randrange(4)):
                        self.spawn(group, depth)
                    await self.block(region, depth)
                except BaseException as error:
                    body_error = error
                    self.cancel(region)
                    raise
        except flowcoro.Cancelled:
            self.left_group(group, body_error, None)
            self.assert_in_danger(outer, "Cancelled has left its group")
            raise
        except ExceptionGroup as error:
            self.left_group(group, body_error, error)
            if self.random.random() < 0.5:
                raise
        else:
            self.left_group(group, body_error, None)
            if isinstance(body_error, flowcoro.Cancelled):
                assert region.shield or not outer.in_danger(), "a group has caught the Cancelled of an outer scope"

    def left_group(self, group, body_error, error):
        group.open = False
        self.regions.remove(group.region)
        self.groups.remove(group)
        for child in group.children:
            assert child.task.done() and child.began == child.ended == 1, "a task has outlived its group"
        expected = {id(child.error): child.error for child in group.children if child.error is not None}
        if body_error is not None and not isinstance(body_error, flowcoro.Cancelled):
            expected[id(body_error)] = body_error
        found = [] if error is None else error.exceptions
        assert sorted(map(id, found)) == sorted(expected), f"left {found}, expected {list(expected.values())}"

    def spawn(self, group, depth):
        if len(self.children) >= MOST_TASKS:
            return
        child = Child(Region(group.region))
        coro = self.life(group, child, depth)
        try:
            child.task = child.region.thing = group.group.spawn(coro)
        except RuntimeError:            # its last task has ended, only its owner does not know yet
            assert all(other.task.done() for other in group.children)
            coro.close()
            return
        self.children.append(child)
        group.children.append(child)
        self.regions.append(child.region)

    async def life(self, group, child, depth):
        child.began += 1
        try:
            await self.block(child.region, depth + 1)
        except flowcoro.Cancelled:
            self.assert_in_danger(child.region, "a task was cancelled where nothing was")
            raise
        except BaseException as error:
            child.error = error
            self.cancel(group.region)
            raise
        finally:
            child.ended += 1
            self.regions.remove(child.region)

    async def cleanup(self, region, depth):
        """A block whose cleanup must be done, whatever happens."""
        try:
            await self.block(region, depth)
        finally:
            self.cleanups_begun += 1
            with flowcoro.CancelScope(shield=True) as scope:
                shielded = Region(region, scope, shield=True)       # nobody else knows of it
                await self.sleep(shielded)
                await self.checkpoint(shielded)
            self.cleanups_ended += 1

    async def swallow(self, region, depth):
        """A block that takes Cancelled for itself. The next operation has to raise it again."""
        try:
            await self.block(region, depth)
        except flowcoro.Cancelled:
            self.assert_in_danger(region, "Cancelled came from nowhere")

    async def exchange(self, outer, depth):
        """Something from or for another task, for as long as we have time; or another task's end."""
        seconds = self.random.randrange(1, 12) / 4
        scope = flowcoro.move_on_after(seconds)
        region = Region(outer, scope, deadline=self.clock.now() + seconds)
        with scope:
            self.regions.append(region)
            try:
                await self.random.choice([self.send, self.receive, self.join])(region)
            finally:
                self.regions.remove(region)

    async def fail(self, region, depth):
        if self.random.random() < 0.15:
            self.serial += 1
            raise Oops(self.serial)

    async def disturb(self, region, depth):
        """Do something to some other part of the program."""
        other = self.random.choice(self.regions)
        choice = self.random.randrange(12)
        if choice < 1:
            self.cancel(other)
            other.thing.cancel()
        elif choice < 4 and not isinstance(other.thing, flowcoro.Task):
            other.deadline = self.clock.now() + self.random.randrange(-1, 16) / 4
            if other.deadline <= self.clock.now():
                self.cancel(other)
            other.thing.deadline = other.deadline
        elif choice < 8 and not isinstance(other.thing, flowcoro.Task) and self.moves_shields:
            other.shield = not other.shield
            other.thing.shield = other.shield
            self.changed()
        elif choice < 10 and self.groups:
            self.spawn(self.random.choice(self.groups), MOST_DEPTH - 1)
        else:
            await self.checkpoint(region)

    # -- the whole

    async def main(self):
        self.root.thing = flowcoro.CancelScope()
        with self.root.thing:
            self.regions.append(self.root)
            for _ in range(4):
                try:
                    await self.group(self.root, 0)
                except (flowcoro.Cancelled, ExceptionGroup):
                    pass
        alive = flowcoro.statistics()["tasks"]["alive"]
        assert alive == 1, flowcoro.dump_tasks()

    def run(self, seed):
        flowcoro.run(self.main(), clock=self.clock, seed=None if seed % 3 == 0 else seed)
        assert all(child.began == child.ended == 1 and child.task.done() for child in self.children)
        assert self.cleanups_begun == self.cleanups_ended
        assert sorted(self.sent) == sorted(self.received)
        assert not self.waiting and not self.groups and self.regions == [self.root]


@pytest.mark.parametrize("part", range(10))
def test_random_trees_keep_the_rules_of_cancellation(part, reports):
    for seed in range(part, SEEDS, 10):
        try:
            Tree(seed).run(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert reports == []


def test_the_trees_are_worth_their_time():
    """Enough of everything happens in them."""
    tasks = errors = cancelled = cleanups = values = 0
    for seed in range(0, 60, 2):
        tree = Tree(seed)
        tree.run(seed)
        tasks += len(tree.children)
        errors += sum(child.error is not None for child in tree.children)
        cancelled += sum(child.task.cancelled() for child in tree.children)
        cleanups += tree.cleanups_ended
        values += len(tree.received)
    assert tasks > 300 and errors > 20 and cancelled > 50 and cleanups > 50 and values > 5, (
        tasks, errors, cancelled, cleanups, values)
