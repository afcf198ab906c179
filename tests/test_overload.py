"""When a queue counts as one that has stood for too long."""

from __future__ import annotations

from asgi_infer import QueuePolicy
from asgi_infer._overload import Overload


def overload() -> Overload:
    return Overload(QueuePolicy(target=0.4, interval=2.0))


def active() -> Overload:
    """One that has stood from 0 to 2 seconds."""
    found = overload()
    found.note(0.5, 0.0)
    found.note(0.5, 2.0)
    assert found.active
    return found


def test_stands_for_an_interval() -> None:
    """Only when every call of a whole interval has waited for too long does the queue stand."""
    found = overload()
    for now, expected in ((0.0, False), (1.0, False), (1.99, False), (2.0, True)):
        found.note(0.4, now)
        assert found.active is expected


def test_one_short_wait_is_enough() -> None:
    """A single call that has not waited for long shows that the queue does get short."""
    found = overload()
    found.note(0.9, 0.0)
    found.note(0.39, 1.9)
    found.note(0.9, 2.0)
    found.note(0.9, 3.9)
    assert not found.active
    found.note(0.9, 4.0)
    assert found.active


def test_empty_in_between() -> None:
    """So does an empty queue."""
    found = overload()
    found.note(0.9, 0.0)
    found.empty()
    found.note(0.9, 2.0)
    assert not found.active


def test_stays_for_an_interval() -> None:
    """It ends when for a whole interval no call has waited for half of the target."""
    found = active()
    for now, share in ((3.0, 0.1), (3.9, 0.2), (5.0, 0.19), (5.8, 0.0)):
        found.note(share, now)
        assert found.active
    found.note(0.0, 5.9)
    assert not found.active


def test_emptiness_does_not_end_it() -> None:
    """What is done about a queue that stands makes it empty now and then."""
    found = active()
    found.empty()
    assert found.active


def test_begins_anew() -> None:
    """After its end it takes a whole interval again."""
    found = active()
    found.note(0.0, 4.0)
    assert not found.active
    found.note(0.9, 4.1)
    found.note(0.9, 6.0)
    assert not found.active
    found.note(0.9, 6.1)
    assert found.active
