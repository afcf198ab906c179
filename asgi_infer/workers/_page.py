"""A page of memory that both sides of a channel look at, for what can't wait for a message."""

from __future__ import annotations

import mmap
import os
import tempfile

from ._segments import Memory

_SIZE = mmap.PAGESIZE
_CANCELLED, _STARTED, _BEGAN, _PID, _BORN = range(5)  # words of 64 bits


class ControlPage:
    """Numbers: each is written by one side and read by the other, unlocked.

    :param fd: of the page; the caller's to close

    :ivar cancelled: the latest request that nobody waits for any more; the runner's side writes
    :ivar started: the latest request that has begun to run; the model's side writes
    :ivar began: when that was, where anybody asks: ``time.monotonic()``, which all processes of a
        machine share, to the microsecond; likewise
    :ivar pid: the process at the model's side, once that is known; likewise
    :ivar born: when that was started, by ``processes.start_time``: in another container its number
        may be anybody's; likewise
    """

    def __init__(self, fd: int) -> None:
        # One aligned word each: it is written whole, or not yet.
        self._words = memoryview(Memory(fd, _SIZE).map).cast("Q")

    @property
    def cancelled(self) -> int:
        return self._words[_CANCELLED]

    @cancelled.setter
    def cancelled(self, number: int) -> None:
        self._words[_CANCELLED] = number

    @property
    def started(self) -> int:
        return self._words[_STARTED]

    @started.setter
    def started(self, number: int) -> None:
        self._words[_STARTED] = number

    @property
    def began(self) -> float:
        return self._words[_BEGAN] / 1e6

    @began.setter
    def began(self, seconds: float) -> None:
        self._words[_BEGAN] = int(seconds * 1e6)

    @property
    def pid(self) -> int:
        return self._words[_PID]

    @pid.setter
    def pid(self, pid: int) -> None:
        self._words[_PID] = pid

    @property
    def born(self) -> int:
        return self._words[_BORN]

    @born.setter
    def born(self, ticks: int) -> None:
        self._words[_BORN] = ticks


def make_page_file() -> int:
    """A descriptor of a new page, all zeros, that has no name. The caller's to close."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("asgi_infer-page")
    else:  # pragma: no cover  # other systems
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, _SIZE)
    return fd
