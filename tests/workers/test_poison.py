"""Calls that crash their processes: counted, refused, and forgotten."""

from __future__ import annotations

import gc

import pytest

from asgi_infer.workers import _poison
from asgi_infer.workers._poison import FORGOTTEN_AFTER, Poison, poison_of


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def poison(clock: Clock) -> Poison:
    return Poison(clock=clock)


def test_two_crashes(poison: Poison) -> None:
    """The second crash of a call is its last; another call's do not count."""
    poison.add(b"a")
    poison.add(b"b")
    known = [poison.known]
    assert not poison.refuses(b"a")
    poison.add(b"a")
    known.append(poison.known)
    assert known == [False, True]
    assert [poison.refuses(digest) for digest in (b"a", b"b", b"c")] == [True, False, False]


def test_news(poison: Poison) -> None:
    """That a call is refused is news once."""
    assert not poison.is_news(b"a")
    for _ in range(2):
        poison.add(b"a")
    assert [poison.is_news(b"a") for _ in range(3)] == [True, False, False]
    assert poison.refuses(b"a")


def test_forgotten_in_time(poison: Poison, clock: Clock) -> None:
    """Some time after its last crash a call gets another chance."""
    poison.add(b"a")
    clock.now += FORGOTTEN_AFTER / 2
    for digest in (b"a", b"b", b"b"):
        poison.add(digest)
    clock.now += FORGOTTEN_AFTER - 1
    known = [poison.known]
    assert poison.refuses(b"a")
    clock.now += 1
    known.append(poison.known)
    assert known == [True, False]
    assert not poison.refuses(b"a")
    poison.add(b"a")
    assert not poison.refuses(b"a")


def test_bounded(poison: Poison, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest ones are remembered, and no more of them."""
    monkeypatch.setattr(_poison, "REMEMBERED", 2)
    for digest in (b"a", b"a", b"b", b"c"):
        poison.add(digest)
    assert not poison.refuses(b"a")
    poison.add(b"c")
    assert poison.refuses(b"c")


class Runner:
    """What replicas may have in common."""


def test_shared() -> None:
    """All that belongs to one runner shares one, and nothing of it stays."""
    one, other = Runner(), Runner()
    poison = poison_of(one)
    assert poison_of(one) is poison
    assert poison_of(other) is not poison
    del poison
    gc.collect()
    assert id(one) not in _poison._poisons
