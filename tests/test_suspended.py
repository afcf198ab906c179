"""Streams between two items: whose turn it is, and who has stalled."""

from __future__ import annotations

import math

import pytest

from asgi_infer._buffer import StreamCall
from asgi_infer._call import Departure
from asgi_infer._suspended import Suspended

from .streams import make_stream_call


@pytest.fixture
def suspended() -> Suspended:
    return Suspended()


def full(**options: float | None) -> StreamCall:
    """A stream whose buffer is full: two items of two."""
    call = make_stream_call(buffer=2, **options)  # type: ignore[arg-type]
    call.buffer.put("a")
    call.buffer.put("b")
    return call


def turns(suspended: Suspended) -> list[StreamCall]:
    """Those that are ready, in order."""
    calls = []
    while suspended.ready:
        calls.append(suspended.next())
    return calls


def test_nobody(suspended: Suspended) -> None:
    """Without streams there is no turn, and no time to look again."""
    assert (suspended.count, suspended.ready, suspended.calls()) == (0, False, [])
    assert suspended.next_stall == math.inf
    assert suspended.stalled(1e9) == []


def test_turns(suspended: Suspended) -> None:
    """Streams with room have their turns in the order in which they had the last."""
    calls = [make_stream_call() for _ in range(3)]
    for call in calls:
        suspended.add(call, 0.0)
        assert not call.parked
    assert suspended.calls() == calls
    first = suspended.next()
    assert first is calls[0]
    suspended.add(first, 0.0)
    assert turns(suspended) == [*calls[1:], first]
    assert suspended.count == 0


def test_parked(suspended: Suspended) -> None:
    """One whose buffer is full has no turn until it is resumed, and is resumed once."""
    call = full()
    suspended.add(call, 0.0)
    assert (call.parked, suspended.ready, suspended.count) == (True, False, 1)
    assert suspended.calls() == [call]
    assert suspended.resume(call)
    assert not call.parked
    assert not suspended.resume(call)
    assert turns(suspended) == [call]


def test_resume_of_a_stranger(suspended: Suspended) -> None:
    """A stream that has its turn now, or has ended, is not resumed."""
    assert not suspended.resume(make_stream_call())
    assert not suspended.ready


def test_closed_is_not_parked(suspended: Suspended) -> None:
    """A stream that nobody consumes any more has its turn: its last."""
    call = full()
    call.buffer.close()
    suspended.add(call, 0.0)
    assert turns(suspended) == [call]


def test_the_flag_is_up_before_the_question(suspended: Suspended) -> None:
    """A consumer that makes room while the thread asks finds the flag, and resumes the stream.

    Otherwise the stream would stay parked for good, its buffer empty.
    """
    call = full()
    flags = []

    class Watched(type(call.buffer)):  # type: ignore[misc]
        @property
        def full(self) -> bool:
            flags.append(call.parked)
            return True

    call.buffer.__class__ = Watched
    suspended.add(call, 0.0)
    assert flags == [True]


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"stall_timeout": 5.0}, 105.0),
        ({"stall_timeout": 5.0, "deadline": 103.0}, 103.0),
        ({"stall_timeout": None, "deadline": 103.0}, 103.0),
        ({"stall_timeout": None}, math.inf),
    ],
)
def test_limits(suspended: Suspended, options: dict[str, float | None], limit: float) -> None:
    """A parked stream is looked at after its ``stall_timeout``, or at its deadline."""
    suspended.add(full(**options), 100.0)
    assert suspended.next_stall == limit


def test_stalled(suspended: Suspended) -> None:
    """Whose buffer stood full for ``stall_timeout`` has stalled: the others have time left."""
    calls = [full(stall_timeout=seconds) for seconds in (1.0, 2.0, 3.0, None)]
    for call in calls:
        suspended.add(call, 100.0)
    assert suspended.stalled(100.9) == []
    assert suspended.stalled(102.0) == calls[:2]
    assert not suspended.ready


def test_slow_is_not_stalled(suspended: Suspended) -> None:
    """Whose consumer has taken something in time has its turn."""
    call = full(stall_timeout=1.0)
    suspended.add(call, 100.0)
    call.buffer.take()
    assert suspended.stalled(101.0) == []
    assert turns(suspended) == [call]


@pytest.mark.parametrize("departure", [None, Departure.CANCELLED])
def test_too_late_is_not_stalled(suspended: Suspended, departure: Departure | None) -> None:
    """Whose deadline has passed, or whose consumer has gone, has its turn, to be closed."""
    call = full(stall_timeout=1.0, deadline=101.0)
    call.departure = departure
    suspended.add(call, 100.0)
    assert suspended.stalled(101.0) == []
    assert turns(suspended) == [call]
