"""ObjectPool and BufferPool: bounded reuse, a fresh object when empty, and mistakes found with debug=True."""

import gc
import random
import threading
import weakref

import pytest

import flowcoro


class Thing:
    """Something that can be borrowed."""

    def __init__(self):
        self.value = 0


# ---- reuse -------------------------------------------------------------------------------------------------

def test_what_was_returned_is_lent_again():
    pool = flowcoro.ObjectPool(Thing, 2)
    first = pool.acquire()
    pool.release(first)
    assert pool.acquire() is first
    assert pool.statistics() == {"capacity": 2, "free": 0, "in_use": 1, "made": 1, "reused": 1, "dropped": 0}


def test_nothing_is_made_before_it_is_asked_for():
    made = []
    flowcoro.ObjectPool(lambda: made.append(1), 10)
    assert made == []


def test_an_empty_pool_makes_a_fresh_object_instead_of_failing_or_waiting():
    pool = flowcoro.ObjectPool(Thing, 1)
    lent = [pool.acquire() for _ in range(100)]
    assert len({id(thing) for thing in lent}) == 100
    assert pool.statistics()["in_use"] == 100


def test_no_more_than_capacity_objects_are_kept_and_the_rest_is_freed():
    pool = flowcoro.ObjectPool(Thing, 3)
    lent = [pool.acquire() for _ in range(10)]
    alive = [weakref.ref(thing) for thing in lent]
    while lent:
        pool.release(lent.pop())
    gc.collect()
    assert sum(reference() is not None for reference in alive) == 3
    assert pool.statistics() == {"capacity": 3, "free": 3, "in_use": 0, "made": 10, "reused": 0, "dropped": 7}


def test_a_capacity_of_zero_keeps_nothing():
    pool = flowcoro.ObjectPool(Thing, 0)
    pool.release(pool.acquire())
    assert pool.statistics() == {"capacity": 0, "free": 0, "in_use": 0, "made": 1, "reused": 0, "dropped": 1}


def test_an_object_is_reset_as_it_is_returned():
    pool = flowcoro.ObjectPool(Thing, 1, reset=lambda thing: setattr(thing, "value", 0))
    thing = pool.acquire()
    thing.value = 5
    pool.release(thing)
    assert thing.value == 0                 # then, and not at the next acquire: no secrets stay in the pool
    assert pool.acquire() is thing


def test_an_object_whose_reset_fails_is_dropped_and_the_error_raised():
    def reset(thing):
        raise ValueError("broken")

    pool = flowcoro.ObjectPool(Thing, 1, reset=reset)
    thing = pool.acquire()
    with pytest.raises(ValueError, match="broken"):
        pool.release(thing)
    assert pool.acquire() is not thing
    assert pool.statistics() == {"capacity": 1, "free": 0, "in_use": 1, "made": 2, "reused": 0, "dropped": 1}


@pytest.mark.parametrize("debug", [False, True])
def test_a_factory_that_fails_lends_nothing(debug):
    def factory():
        raise OSError("no more")

    pool = flowcoro.ObjectPool(factory, 1, debug=debug)
    with pytest.raises(OSError, match="no more"):
        pool.acquire()
    assert pool.statistics()["in_use"] == 0


def test_random_use_agrees_with_a_list():
    seed = random.randrange(1 << 30)
    luck = random.Random(seed)
    pool = flowcoro.ObjectPool(Thing, 5)
    lent, kept, made = [], [], 0
    for _ in range(2000):
        if lent and luck.random() < 0.5:
            thing = lent.pop(luck.randrange(len(lent)))
            pool.release(thing)
            if len(kept) < 5:
                kept.append(thing)
        else:
            thing = pool.acquire()
            if kept:
                assert thing is kept.pop(), f"seed {seed}"
            else:
                made += 1
            lent.append(thing)
        numbers = pool.statistics()
        assert (numbers["free"], numbers["in_use"], numbers["made"]) == (len(kept), len(lent), made), f"seed {seed}"


def test_threads_may_share_a_pool():
    pool = flowcoro.ObjectPool(Thing, 4)
    failures = []

    def use():
        try:
            for _ in range(300):
                with pool.borrow() as thing:
                    thing.value += 1
                    assert thing.value == 1
                    thing.value -= 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert pool.statistics()["free"] <= 4


# ---- borrow ------------------------------------------------------------------------------------------------

def test_borrow_returns_the_object_at_the_end_of_the_block():
    pool = flowcoro.ObjectPool(Thing, 1)
    with pool.borrow() as first:
        assert pool.statistics()["in_use"] == 1
    with pool.borrow() as second:
        assert second is first


def test_borrow_returns_the_object_when_the_block_fails():
    pool = flowcoro.ObjectPool(Thing, 1)
    with pytest.raises(KeyError):
        with pool.borrow():
            raise KeyError
    assert pool.statistics() == {"capacity": 1, "free": 1, "in_use": 0, "made": 1, "reused": 0, "dropped": 0}


def test_borrow_works_with_async_with_and_returns_the_object_when_the_task_is_cancelled():
    pool = flowcoro.ObjectPool(Thing, 1)

    async def main():
        with flowcoro.move_on_after(0):
            async with pool.borrow() as thing:
                assert isinstance(thing, Thing)
                await flowcoro.checkpoint()
        return pool.statistics()["in_use"]

    assert flowcoro.run(main()) == 0


@pytest.mark.parametrize("debug", [False, True])
def test_borrows_nest(debug):
    pool = flowcoro.ObjectPool(Thing, 2, debug=debug)
    with pool.borrow() as first, pool.borrow() as second:
        first.value = 1
        assert second.value == 0
    assert pool.statistics()["in_use"] == 0


# ---- mistakes ----------------------------------------------------------------------------------------------

def test_debug_finds_an_object_that_is_returned_twice():
    pool = flowcoro.ObjectPool(Thing, 2, debug=True)
    thing = pool.acquire()
    pool.release(thing)
    with pytest.raises(flowcoro.PoolError, match="twice"):
        pool.release(thing)
    assert pool.statistics()["in_use"] == 0


def test_debug_finds_a_return_after_a_borrow():
    pool = flowcoro.ObjectPool(Thing, 2, debug=True)
    with pool.borrow() as thing:
        pass
    with pytest.raises(flowcoro.PoolError, match="twice"):
        pool.release(thing)


@pytest.mark.parametrize("factory", [Thing, list, dict, lambda: bytearray(3)], ids=["Thing", "list", "dict", "bytearray"])
def test_debug_finds_a_double_return_of_objects_of_every_type(factory):
    pool = flowcoro.ObjectPool(factory, 2, debug=True)
    thing = pool.acquire()
    pool.release(thing)
    with pytest.raises(flowcoro.PoolError):
        pool.release(thing)


@pytest.mark.parametrize("stranger", [Thing(), None, 0, "text"], ids=repr)
def test_debug_finds_an_object_that_was_never_lent(stranger):
    pool = flowcoro.ObjectPool(Thing, 2, debug=True)
    with pytest.raises(flowcoro.PoolError):
        pool.release(stranger)
    assert pool.statistics()["in_use"] == 0


def test_debug_finds_an_object_of_another_pool():
    pool, other = flowcoro.ObjectPool(Thing, 2, debug=True), flowcoro.ObjectPool(Thing, 2, debug=True)
    thing = other.acquire()
    with pytest.raises(flowcoro.PoolError, match="not borrowed from this pool"):
        pool.release(thing)
    other.release(thing)


def test_debug_finds_use_after_return():
    pool = flowcoro.ObjectPool(Thing, 2, debug=True)
    thing = pool.acquire()
    thing.value = 3
    assert thing.value == 3
    pool.release(thing)
    with pytest.raises(ReferenceError):
        thing.value
    with pytest.raises(ReferenceError):
        thing.value = 4


def test_debug_finds_use_after_return_even_when_others_have_borrowed_since():
    pool = flowcoro.ObjectPool(Thing, 2, debug=True)
    stale = pool.acquire()
    pool.release(stale)
    fresh = [pool.acquire() for _ in range(10)]
    with pytest.raises(ReferenceError):
        stale.value
    assert {thing.value for thing in fresh} == {0}


def test_debug_resets_too():
    seen = []
    pool = flowcoro.ObjectPool(Thing, 2, reset=lambda thing: seen.append(thing.value), debug=True)
    thing = pool.acquire()
    thing.value = 8
    pool.release(thing)
    assert seen == [8]


def test_an_error_of_a_pool_is_a_flowcoro_error():
    assert issubclass(flowcoro.PoolError, flowcoro.FlowCoroError)


@pytest.mark.parametrize("make", [
    lambda: flowcoro.ObjectPool(3, 1),
    lambda: flowcoro.ObjectPool(None, 1),
])
def test_a_factory_that_cannot_be_called_is_refused(make):
    with pytest.raises(TypeError, match="function"):
        make()


def test_a_reset_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="reset=5"):
        flowcoro.ObjectPool(list, 1, reset=5)


@pytest.mark.parametrize("capacity", [-1, 1.5, None, float("inf"), True])
def test_a_capacity_that_is_no_number_of_objects_is_refused(capacity):
    with pytest.raises(ValueError, match="capacity"):
        flowcoro.ObjectPool(Thing, capacity)
    with pytest.raises(ValueError, match="capacity"):
        flowcoro.BufferPool(10, capacity)


# ---- buffers -----------------------------------------------------------------------------------------------

def test_a_buffer_is_a_bytearray_of_the_size_asked_for():
    pool = flowcoro.BufferPool(4096, 2)
    with pool.borrow() as buffer:
        assert type(buffer) is bytearray
        assert len(buffer) == 4096
    with pool.borrow() as again:
        assert again is buffer


def test_an_empty_buffer_pool_makes_fresh_buffers_and_keeps_capacity_of_them():
    pool = flowcoro.BufferPool(10, 2)
    lent = [pool.acquire() for _ in range(5)]
    for buffer in lent:
        pool.release(buffer)
    assert pool.statistics() == {"capacity": 2, "free": 2, "in_use": 0, "made": 5, "reused": 0, "dropped": 3}


def test_a_resized_buffer_is_not_taken_back():
    pool = flowcoro.BufferPool(10, 2)
    buffer = pool.acquire()
    buffer += b"more"
    with pytest.raises(ValueError, match="14 bytes"):
        pool.release(buffer)
    assert len(pool.acquire()) == 10


@pytest.mark.parametrize("stranger", [b"0123456789", "0123456789", None, [0] * 10], ids=["bytes", "str", "None", "list"])
def test_what_is_no_buffer_is_not_taken_back(stranger):
    pool = flowcoro.BufferPool(10, 2)
    with pytest.raises((TypeError, ValueError, flowcoro.PoolError)):
        pool.release(stranger)
    assert type(pool.acquire()) is bytearray


def test_debug_finds_a_buffer_that_is_returned_twice():
    pool = flowcoro.BufferPool(10, 2, debug=True)
    buffer = pool.acquire()
    pool.release(buffer)
    with pytest.raises(flowcoro.PoolError):
        pool.release(buffer)


def test_debug_finds_use_of_a_buffer_after_its_return():
    pool = flowcoro.BufferPool(10, 2, debug=True)
    with pool.borrow() as buffer:
        buffer[:3] = b"abc"
        assert bytes(buffer[:4]) == b"abc\0"
        assert len(buffer) == 10
    with pytest.raises(ValueError):
        buffer[0]
    with pytest.raises(ValueError):
        buffer[:3] = b"xyz"


def test_debug_buffers_of_another_pool_are_found():
    pool, other = flowcoro.BufferPool(10, 2, debug=True), flowcoro.BufferPool(10, 2, debug=True)
    buffer = other.acquire()
    with pytest.raises(flowcoro.PoolError):
        pool.release(buffer)
    buffer[0] = 1                           # the refusal has not harmed it
    other.release(buffer)


@pytest.mark.parametrize("size", [0, -1, 1.5, None, "10", True])
def test_a_size_that_is_no_number_of_bytes_is_refused(size):
    with pytest.raises(ValueError, match="size"):
        flowcoro.BufferPool(size, 2)


def test_a_borrow_serves_one_with():
    pool = flowcoro.ObjectPool(list, 2)
    with (borrowed := pool.borrow()):
        with pytest.raises(RuntimeError, match="serves one `with`"):
            borrowed.__enter__()
    assert pool.acquire() == [] and pool.acquire() == []
    assert pool.statistics()["in_use"] == 2


def test_a_buffer_pool_refuses_what_is_no_buffer_by_name():
    with pytest.raises(ValueError, match="a NoneType is returned"):
        flowcoro.BufferPool(8, 1).release(None)
