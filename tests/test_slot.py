"""A slot: what the scheduler keeps of one thread's turns."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from asgi_infer._batch import BatchCall
from asgi_infer._slot import Slot

from .calls import batch_function, make_call
from .streams import make_stream_call


@pytest.fixture
def slot() -> Slot:
    return Slot(3)


def test_new_slot(slot: Slot) -> None:
    """Nothing runs in it, and there is no reason to wake up by itself, or to stop."""
    assert (slot.number, slot.current(), slot.begun()) == (3, None, [])
    assert (slot.look_again, slot.suspended.count) == (math.inf, 0)
    assert not any((slot.over, slot.down, slot.broken, slot.woken, slot.stream_next))


def test_latch_is_taken(slot: Slot) -> None:
    """Who sleeps on it sleeps until it is released, once."""
    assert not slot.wake_up.acquire(timeout=0)
    slot.wake_up.release()
    assert slot.wake_up.acquire(timeout=0)
    assert not slot.wake_up.acquire(timeout=0)


def test_current(slot: Slot) -> None:
    """What runs; two slots that run nothing are told apart all the same."""
    current: Callable[[], object] = slot.current
    assert current == slot.current
    assert current != Slot(3).current
    slot.running = make_call()
    assert slot.current() is slot.running


def test_begun(slot: Slot) -> None:
    """What runs comes first, then the streams between two items."""
    streams = [make_stream_call() for _ in range(2)]
    for stream in streams:
        slot.suspended.add(stream, 0.0)
    assert slot.begun() == streams
    slot.running = make_call()
    assert slot.begun() == [slot.running, *streams]


def test_begun_of_a_batch(slot: Slot) -> None:
    """All the calls of a batch have begun; of one that is being made up, its leader."""
    function = batch_function()
    calls = [make_call(function, item) for item in "abc"]
    leader = slot.running = calls[0]
    assert isinstance(leader, BatchCall)
    assert slot.begun() == [leader]
    leader.members = [call for call in calls if isinstance(call, BatchCall)]
    assert slot.begun() == calls
