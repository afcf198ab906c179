"""A binary semaphore that can be waited for together with file descriptors."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Sequence

_ONE = (1).to_bytes(8, sys.byteorder)  # what an eventfd takes; a pipe takes anything
LONGEST = 2**31 - 1
"""Milliseconds that ``poll()`` can wait: 24 days."""


class Latch:
    """What an inference thread sleeps on while descriptors may want its attention as well.

    ``acquire`` and ``release`` are those of a ``threading.Lock`` that starts out taken, except
    that to release it twice is to release it once. One thread acquires, and closes; any thread
    releases.

    An eventfd where there is one (Linux), else a pipe. To release takes one system call, and to
    acquire two.
    """

    def __init__(self) -> None:
        # Held for each use of the descriptor by another thread: its number may be another
        # file's once it is closed. Reentrant, since the garbage collector, too, may release.
        self._lock = threading.RLock()
        self._fd, self._end = _open()  # to wait on, to write to; guarded by _lock
        self._watched: tuple[int, ...] | None = None  # what _poll waits for beside it
        self._poll = select.poll()  # the acquiring thread's

    def acquire(self, timeout: float = -1, others: Sequence[int] = ()) -> bool:
        """Wait until it is released.

        :param timeout: seconds to wait for; for ever if negative
        :param others: descriptors that end the wait as well, when they are readable or their
            other ends are closed
        :returns: True if it was released, and it is taken again then; False if the time is up, or
            one of the others is ready
        :raises ValueError: it is closed
        """
        if others is not self._watched:
            self._watch(tuple(others))
        wait = None if timeout < 0 else min(timeout * 1000, LONGEST)
        for fd, _ in self._poll.poll(wait):
            if fd == self._fd:
                # A pipe holds no more: what was released many times is taken in one read.
                os.read(fd, 8 if fd == self._end else 1 << 16)
                return True
        return False

    def release(self) -> None:
        """Let the thread that waits, or the next one that does, go on. Never blocks.

        Nothing happens if it is closed.
        """
        with self._lock:
            if self._end >= 0:
                try:
                    os.write(self._end, _ONE)
                except BlockingIOError:  # as many times as it can count: released it is
                    pass

    def fileno(self) -> int:
        """The descriptor that is readable while it is released; -1 if it is closed."""
        return self._fd

    def close(self) -> None:
        """Close its descriptors. More than once does no harm."""
        with self._lock:
            for fd in {self._fd, self._end} - {-1}:
                os.close(fd)
            self._fd = self._end = -1
        self._watched = None

    def _watch(self, others: tuple[int, ...]) -> None:
        if others == self._watched:
            return
        poll = select.poll()
        for fd in (self._fd, *others):
            poll.register(fd, select.POLLIN)
        self._poll, self._watched = poll, others


def _open() -> tuple[int, int]:
    if hasattr(os, "eventfd"):
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return fd, fd
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    return reader, writer
