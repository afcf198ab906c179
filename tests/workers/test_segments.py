"""Shared memory without names: taken, freed by the other side, used again, given up."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import threading
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_infer.workers import _segments
from asgi_infer.workers._segments import (
    HEADER,
    PATIENCE,
    SPARE,
    Lease,
    Mapped,
    Memory,
    Segment,
    Segments,
    aligned,
    rounded,
)

MEGABYTE = 2**20


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def taken(segments: Segments, size: int = 1000) -> Segment:
    """A segment whose message has been sent: only the other side frees it."""
    segment, lease = segments.take(size)
    lease.keep()
    segment.announced()
    return segment


def free(segment: Segment) -> None:
    """As the death of the last array on the other side does."""
    Lease(segment.memory, 1)


# -- sizes -------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 2**40))
def test_rounded(size: int) -> None:
    """A segment is no smaller than asked for, at most a third larger, or 64 KiB; and there are
    few sizes: rounding a size again changes nothing."""
    assert size <= rounded(size) <= size + max(65536, size // 3)
    assert rounded(rounded(size)) == rounded(size)
    assert rounded(size) % mmap.PAGESIZE == 0


@settings(max_examples=30)
@given(st.integers(0, 2**40))
def test_aligned(offset: int) -> None:
    """What is in a segment begins at the next multiple of 64."""
    assert aligned(offset) % 64 == 0
    assert 0 <= aligned(offset) - offset < 64


# -- used again --------------------------------------------------------------------------------


def test_free_segment_is_used_again() -> None:
    """A segment that the other side has freed serves the next message of its size."""
    segments = Segments()
    first = taken(segments)
    assert taken(segments) is not first
    free(first)
    assert taken(segments) is first
    assert segments.made == 2


def test_never_sent() -> None:
    """A message that is thrown away before it is sent frees its segment."""
    segments = Segments()
    first, lease = segments.take(1000)
    del lease
    second, lease = segments.take(1000)
    assert second is first
    del lease
    segments.close()


def test_smallest_that_fits() -> None:
    """Of the free segments the smallest serves that is large enough, and none that is more than
    twice as large: a small array that is kept would keep all of it."""
    segments = Segments()
    sizes = [8 * MEGABYTE, 2 * MEGABYTE, 3 * MEGABYTE]
    large, small, middle = (taken(segments, size) for size in sizes)
    for segment in (large, small, middle):
        free(segment)
    assert taken(segments, 2 * MEGABYTE - 100) is small
    assert taken(segments, 2 * MEGABYTE - 100) is middle
    assert taken(segments, 2 * MEGABYTE - 100).index == 3
    assert taken(segments, 5 * MEGABYTE) is large


def test_freed_anywhere() -> None:
    """The other side's arrays may die on any thread, and in a garbage collection."""
    segments, mapped = Segments(), Mapped()
    segment, lease = segments.take(1000)
    mapped.add(segment.index, os.dup(segment.descriptor or 0), segment.memory.size)
    lease.keep()
    segment.announced()
    there = mapped.lease(segment.index, 1000)
    cycle: list[Any] = [np.asarray(there)[10:20]]
    cycle.append(cycle)
    del there, cycle
    assert segment.memory.map[0] == 1
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()
    assert segment.memory.map[0] == 0


def test_not_freed_by_a_fork() -> None:
    """The same memory is in a forked process, where arrays die that are alive in the parent."""
    segment = taken(Segments())
    segment.memory.process += 1  # as it is seen from another process
    free(segment)
    assert segment.memory.map[0] == 1


# -- given up ----------------------------------------------------------------------------------


def test_spare_ones() -> None:
    """Of many free segments those are kept that were used last, and the other side is told."""
    segments = Segments()
    made = []
    for _ in range(SPARE + 3):
        made.append(taken(segments))
        segments.tidy()
    assert segments.tidy() == []
    for segment in made:
        free(segment)
    assert sorted(segments.tidy()) == [0, 1, 2]
    assert len(segments) == SPARE


def test_spare_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large free segments are given up sooner, but for two."""
    monkeypatch.setattr(_segments, "SPARE_BYTES", 65536)
    segments = Segments()
    for segment in [taken(segments) for _ in range(SPARE + 1)]:
        free(segment)
    assert len(segments.tidy()) == SPARE - 1
    assert len(segments) == 2


def test_patience() -> None:
    """A segment that serves no message for long is given up, were it the only one. Before it has
    been announced, nobody needs to be told."""
    segments = Segments()
    _, lease = segments.take(1000)
    taken(segments)
    del lease
    before = descriptors()
    for _ in range(2 * PATIENCE):
        assert segments.tidy() == []
    assert len(segments) == 1  # that which is taken
    assert descriptors() == before - 1


def test_crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a number of taken segments from which on the other side has to copy."""
    monkeypatch.setattr(_segments, "MOST", 3)
    segments = Segments()
    crowded = []
    for _ in range(5):
        taken(segments)
        crowded.append(segments.crowded)
    assert crowded == [False, False, False, True, True]


# -- descriptors and names ---------------------------------------------------------------------


def test_no_descriptor_is_kept() -> None:
    """Mapped memory needs no descriptor on either side, and has no name anywhere."""
    segments, mapped = Segments(), Mapped()
    before, names = descriptors(), sorted(os.listdir("/dev/shm"))
    for _ in range(5):
        segment, lease = segments.take(MEGABYTE)
        lease.keep()
        mapped.add(segment.index, os.dup(segment.descriptor or 0), segment.memory.size)
        segment.announced()
    assert descriptors() == before
    assert sorted(os.listdir("/dev/shm")) == names
    assert "memfd:asgi_infer (deleted)" in Path("/proc/self/maps").read_text()
    assert len(mapped) == len(segments) == 5


def test_not_inherited() -> None:
    """The descriptor does not get into programs that this one starts."""
    segment = Segment(0, 65536)
    assert segment.descriptor is not None
    assert not os.get_inheritable(segment.descriptor)
    segment.announced()


def test_unmapped() -> None:
    """Memory that nothing refers to any more is unmapped."""
    segments = Segments()
    addresses = [f"{taken(segments).memory.address:x}-" for _ in range(3)]
    segments.close()
    maps = Path("/proc/self/maps").read_text()
    assert not any(line.startswith(tuple(addresses)) for line in maps.splitlines())


def test_closed_before_it_is_sent() -> None:
    """What has not been announced is closed with the channel."""
    before = descriptors()
    segments = Segments()
    _, lease = segments.take(1000)
    segments.close()
    assert len(segments) == 0
    assert descriptors() == before
    del lease


def test_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Linux's calls it is a temporary file that has been unlinked."""
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.delattr(os, "posix_fallocate")
    segment, lease = Segments().take(1000)
    there = Memory(segment.descriptor or 0, segment.memory.size)
    segment.memory.write(b"there", HEADER)
    assert there.map[HEADER : HEADER + 5] == b"there"
    assert there.map[0] == 1
    segment.announced()
    del lease


# -- no room -----------------------------------------------------------------------------------


def refusing(number: int) -> Any:
    def refuse(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("name", ["memfd_create", "ftruncate", "posix_fallocate"])
def test_no_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no memory left, that call fails with how much it wanted, and nothing
    is left behind."""
    segments = Segments()
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, name, refusing(errno.ENOSPC))
        with pytest.raises(MemoryError, match=r"no 1,048,576 bytes .* \(No space left"):
            segments.take(MEGABYTE)
    assert descriptors() == before
    assert len(segments) == 0
    taken(segments)


def test_no_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same if it can't be mapped; on the other side the segment counts as lost."""

    def refuse(*_: object) -> int | None:
        ctypes.set_errno(errno.ENOMEM)
        return ctypes.c_void_p(-1).value

    segments, mapped = Segments(), Mapped()
    segment, lease = segments.take(1000)
    lease.keep()
    monkeypatch.setattr(_segments, "_mmap", refuse)
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        segments.take(MEGABYTE)
    mapped.add(segment.index, segment.descriptor, 65536)
    segment.descriptor = None  # closed by that
    mapped.add(7, None, 65536)
    assert mapped.lost == [0, 7]
    assert mapped.lease(0, 100) is None
    segments.forget(0)
    segments.forget(0)
    assert len(segments) == 0


def test_more_than_there_is() -> None:
    """More than all the memory of the machine is refused before anything is taken."""
    with pytest.raises(MemoryError, match="send less in one call"):
        Segments().take(2**50)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_no_descriptor(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no descriptor is left, the error says what to do."""
    monkeypatch.setattr(os, "memfd_create", refusing(number))
    with pytest.raises(OSError, match="ulimit -n") as caught:
        Segments().take(1000)
    assert caught.value.errno == number


def test_dropped_by_the_other_side() -> None:
    """What the other side gives up is unmapped as soon as no array of it is alive."""
    segments, mapped = Segments(), Mapped()
    segment, lease = segments.take(1000)
    lease.keep()
    mapped.add(0, segment.descriptor, segment.memory.size)
    segment.descriptor = None
    segment.memory.write(b"kept", HEADER)
    array = np.asarray(mapped.lease(0, 1000))
    mapped.drop(0)
    mapped.drop(0)
    mapped.close()
    segments.close()
    assert len(mapped) == 0
    assert bytes(array[HEADER : HEADER + 4]) == b"kept"
