"""Anonymous shared memory: written by its owner, read in place by the other side, used again.

A segment begins with a header. Its first byte tells whether it is *taken*: the owner sets that
when it writes a message, and the other side clears it when the last array of that message has
died. So nothing has to be sent to give a segment back, and nothing to be locked.

No segment has a name. It is made from a file that exists in memory only, whose descriptor is
sent to the other process once and is closed on both sides as soon as the memory is mapped. The
kernel frees it when nobody maps it any more, however the processes end.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Callable
from typing import Any

HEADER = 64
"""Bytes at the start of each segment, of which the first tells whether it is taken."""

ALIGNMENT = 64
"""Of what is in a segment, in bytes: a line of the cache, and the widest vector register."""

MOST = 256
"""Segments of which one is taken at most. From then on the other side has to copy."""

SPARE = 8
"""Free segments that are kept for the next messages."""

PATIENCE = 64
"""Messages after which a free segment that none of them has fitted is given up."""

_SMALLEST = 64 * 1024

_MAP_SHARED = 1  # the same numbers on Linux, macOS and the BSDs
_MAP_FIXED = 16
_FAILED = ctypes.c_void_p(-1).value


class Lease:
    """A taken segment: it is free again when this dies, unless it was kept.

    Whatever thread that happens on, also in a garbage collection in the middle of anything: it
    stores one byte, and takes no lock.
    """

    __slots__ = ("_kept", "_pid", "end", "memory")

    def __init__(self, memory: Memory, end: int) -> None:
        self.memory = memory
        self.end = end
        self._kept = False
        self._pid = os.getpid()

    def keep(self) -> None:
        """Leave the segment taken: the other side frees it."""
        self._kept = True

    @property
    def __array_interface__(self) -> dict[str, Any]:
        # For numpy.asarray: an array of all bytes whose base is this object. Everything that is
        # sliced from it, and sliced from that, keeps it alive.
        return {
            "version": 3,
            "shape": (self.end,),
            "typestr": "|u1",
            "data": (self.memory.address, False),
        }

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:
        # In a forked process the memory is the same, and the parent's arrays are still alive.
        if not self._kept and getpid() == self._pid:
            self.memory.map[0] = 0


class Memory:
    """Shared memory in this process, unmapped when nothing refers to it any more.

    :ivar map: its bytes
    :ivar address: where they are
    """

    __slots__ = ("address", "map", "size")

    def __init__(self, descriptor: int, size: int) -> None:
        # Python's mmap keeps a duplicate of the descriptor for as long as it lives, and a process
        # may have 1,024. So it maps nothing in particular, and the file replaces that. It also
        # makes the kernel say no where a request is beyond all the memory that there is.
        self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.size = size
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        flags = _MAP_SHARED | _MAP_FIXED
        if _mmap(self.address, size, protection, flags, descriptor, 0) == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def write(self, data: bytes, offset: int) -> None:
        """Copy ``data`` to ``offset``, without the GIL, which slicing would hold."""
        ctypes.memmove(self.address + offset, data, len(data))


class Segment:
    """Shared memory that this side writes.

    :ivar index: its number, as long as the channel lives
    :ivar descriptor: its file, or None once the other side has that
    :ivar last_use: number of the message that it was taken for
    """

    __slots__ = ("descriptor", "index", "last_use", "memory")

    def __init__(self, index: int, size: int) -> None:
        self.index = index
        self.last_use = 0
        self.descriptor: int | None = _anonymous_file(size)
        try:
            os.posix_fallocate(self.descriptor, 0, size)  # or it would be SIGBUS, later
            self.memory = Memory(self.descriptor, size)
        except BaseException:
            self.announced()
            raise

    def announced(self) -> None:
        """The other side has its descriptor, or never will."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class Segments:
    """The segments that this side writes: those that are free are used again.

    :ivar made: how many there have been
    :ivar dropped: indices that the other side has yet to be told to let go of
    """

    def __init__(self) -> None:
        self.made = 0
        self.dropped: list[int] = []
        self._uses = 0
        self._segments: dict[int, Segment] = {}

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def crowded(self) -> bool:
        """Whether so many are taken that the other side has to copy instead of keeping one."""
        return len(self._segments) > MOST

    def take(self, size: int) -> tuple[Segment, Lease]:
        """A segment that holds ``size`` bytes, and what frees it.

        :raises MemoryError: there is no room for it
        :raises OSError: there is no file descriptor for it
        """
        needed, size = size, rounded(size)
        free = [each for each in self._segments.values() if not each.memory.map[0]]
        # Not one that is much larger: all of it stays in memory while any array of it is alive.
        fitting = [each for each in free if size <= each.memory.size <= 2 * size]
        if fitting:
            segment = min(fitting, key=lambda each: each.memory.size)
            free.remove(segment)
        else:
            segment = self._make(size)
        self._uses += 1
        segment.last_use = self._uses
        segment.memory.map[0] = 1
        self._drop_some(free)
        return segment, Lease(segment.memory, needed)

    def forget(self, index: int) -> None:
        """The other side could not map it."""
        self._segments.pop(index).announced()

    def close(self) -> None:
        """Let go of all; arrays that are still alive on the other side stay valid."""
        for segment in self._segments.values():
            segment.announced()
        self._segments.clear()

    def _make(self, size: int) -> Segment:
        try:
            segment = Segment(self.made, size)
        except OSError as error:
            raise _explained(error, size) from error
        self._segments[segment.index] = segment
        self.made += 1
        return segment

    def _drop_some(self, free: list[Segment]) -> None:
        """Give up the free ones that have not been used for long, or are too many."""
        free.sort(key=lambda each: each.last_use)
        for position, segment in enumerate(free):
            spare = len(free) - position
            if spare > SPARE or self._uses - segment.last_use > PATIENCE:
                del self._segments[segment.index]
                if segment.descriptor is None:
                    self.dropped.append(segment.index)
                segment.announced()


class Mapped:
    """The segments that the other side writes, mapped here.

    :ivar lost: indices of those that could not be mapped, which the other side has yet to know
    """

    def __init__(self) -> None:
        self.lost: list[int] = []
        self._memories: dict[int, Memory] = {}

    def __len__(self) -> int:
        return len(self._memories)

    def add(self, index: int, descriptor: int | None, size: int) -> None:
        """Map a new one, and close its descriptor; None if there was no room for that."""
        try:
            if descriptor is not None:
                self._memories[index] = Memory(descriptor, size)
                return
        except OSError:
            pass  # its message says so when it is read
        finally:
            if descriptor is not None:
                os.close(descriptor)
        self.lost.append(index)

    def lease(self, index: int, end: int) -> Lease | None:
        """What frees this segment, of which ``end`` bytes are in use; None if it is lost."""
        memory = self._memories.get(index)
        return None if memory is None else Lease(memory, end)

    def drop(self, index: int) -> None:
        """The other side has given it up."""
        self._memories.pop(index, None)

    def close(self) -> None:
        """Let go of all: each stays mapped for as long as an array of it is alive."""
        self._memories.clear()


def aligned(offset: int) -> int:
    """The first place from ``offset`` on where something may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def rounded(size: int) -> int:
    """The size of a segment that holds ``size`` bytes: one of four sizes for each power of two."""
    step = max(_SMALLEST, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step


def _anonymous_file(size: int) -> int:
    """A descriptor, not inherited, of a file of that size without a name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("asgi_infer", os.MFD_CLOEXEC)
    else:  # elsewhere than on Linux and FreeBSD
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _explained(error: OSError, size: int) -> Exception:
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return OSError(
            error.errno,
            "there is no file descriptor left for the arrays of a call: raise the limit "
            "(ulimit -n), or close what is not needed",
        )
    return MemoryError(
        f"there are no {size:,} bytes of memory to share with the worker: {error.strerror}. "
        f"Send less in one call"
    )


_mmap = ctypes.CDLL(None, use_errno=True).mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
