"""A page of memory that both sides of a channel look at, for what can't wait for a message."""

from __future__ import annotations

import mmap
import os
import tempfile

from ._segments import Memory

_SIZE = mmap.PAGESIZE
_CANCELLED, _STARTED = 0, 1  # words of 64 bits


class ControlPage:
    """Two numbers of requests: each is written by one side and read by the other, unlocked.

    :param fd: of the page; the caller's to close

    :ivar cancelled: the latest request that nobody waits for any more; the runner's side writes
    :ivar started: the latest request that has begun to run; the model's side writes
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


def make_page_file() -> int:
    """A descriptor of a new page, all zeros, that has no name. The caller's to close."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("asgi_infer-page")
    else:  # pragma: no cover  # other systems
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, _SIZE)
    return fd
