"""The latch: a binary semaphore that waits for descriptors as well."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator

import pytest

from asgi_infer.workers._latch import Latch

from ..gates import LIMIT


@pytest.fixture(params=["eventfd", "pipe"])
def latch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Latch]:
    """One of each kind, as far as this system has them."""
    if request.param == "pipe":
        monkeypatch.delattr(os, "eventfd", raising=False)
    elif not hasattr(os, "eventfd"):
        pytest.skip("no eventfd here")
    latch = Latch()
    yield latch
    latch.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_starts_taken(latch: Latch) -> None:
    """Nobody has released it."""
    assert not latch.acquire(timeout=0)


def test_released_once_however_often(latch: Latch) -> None:
    """Two releases let one acquire through, as the semaphore is binary."""
    latch.release()
    latch.release()
    assert latch.acquire()
    assert not latch.acquire(timeout=0)


def test_never_blocks_who_releases(latch: Latch) -> None:
    """A pipe that is full, and a counter at its end, are as released as can be."""
    if hasattr(os, "eventfd_write"):
        os.write(latch._end, (2**64 - 2).to_bytes(8, "little"))
    for _ in range(10_000):
        latch.release()
    assert latch.acquire(timeout=0)
    assert not latch.acquire(timeout=0)


def test_wakes_who_waits(latch: Latch) -> None:
    """A release on another thread ends the wait."""
    with_timer = threading.Timer(0.001, latch.release)
    with_timer.start()
    assert latch.acquire(timeout=LIMIT)
    with_timer.join()


def test_time_is_up(latch: Latch) -> None:
    """False after the timeout; a long one is no error, nor is infinity."""
    assert not latch.acquire(timeout=0.001)
    latch.release()
    assert latch.acquire(timeout=1e12)
    latch.release()
    assert latch.acquire(timeout=float("inf"))


def test_others_end_the_wait(latch: Latch, pipe: tuple[int, int]) -> None:
    """A descriptor that is readable ends the wait, which acquires nothing."""
    reader, writer = pipe
    assert not latch.acquire(timeout=0, others=[reader])
    os.write(writer, b"x")
    assert not latch.acquire(others=[reader])
    assert not latch.acquire(timeout=0)
    assert os.read(reader, 1) == b"x"


def test_both_at_once(latch: Latch, pipe: tuple[int, int]) -> None:
    """It is acquired if it can be, whatever the others are."""
    reader, writer = pipe
    os.write(writer, b"x")
    latch.release()
    assert latch.acquire(others=[reader])
    assert not latch.acquire(others=[reader])


def test_other_end_closed(latch: Latch) -> None:
    """A closed connection ends the wait as well."""
    reader, writer = os.pipe()
    os.close(writer)
    assert not latch.acquire(others=[reader])
    os.close(reader)


def test_to_wait_on_with_others(latch: Latch) -> None:
    """Its descriptor is readable while it is released."""
    assert not select.select([latch.fileno()], [], [], 0)[0]
    latch.release()
    assert select.select([latch.fileno()], [], [], 0)[0]


def test_closed(latch: Latch) -> None:
    """Who releases it then does no harm, to whoever has that number now; nobody can wait."""
    number = latch.fileno()
    latch.close()
    reader, writer = os.pipe()
    assert number in {reader, writer}
    os.set_blocking(reader, False)
    latch.release()
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    latch.close()
    assert latch.fileno() == -1
    with pytest.raises(ValueError):
        latch.acquire(timeout=0)
