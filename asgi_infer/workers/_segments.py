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
"""Segments of one side that may be taken. From then on the other side copies and frees."""

SPARE = 8
"""Free segments that are kept for the next messages."""

SPARE_BYTES = 256 * 2**20
"""What they may take together, but for the last two that were used."""

PATIENCE = 256
"""Messages after which a free segment that served none of them is given up."""

_SMALLEST = 64 * 1024

_MAP_SHARED = 1  # the same numbers on Linux, macOS and the BSDs
_MAP_FIXED = 16
_FAILED = ctypes.c_void_p(-1).value


class Lease:
    """A taken segment: it is free again when this dies, unless it was kept.

    Whatever thread that happens on, also in a garbage collection in the middle of anything: it
    stores one byte, and takes no lock.
    """

    __slots__ = ("_kept", "end", "memory")

    def __init__(self, memory: Memory, end: int) -> None:
        self.memory = memory
        self.end = end
        self._kept = False

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
        if not self._kept and getpid() == self.memory.process:
            self.memory.map[0] = 0


class Memory:
    """Shared memory in this process, unmapped when nothing refers to it any more.

    :ivar map: its bytes
    :ivar address: where they are
    :ivar process: in which process
    """

    __slots__ = ("address", "map", "process", "size")

    def __init__(self, descriptor: int, size: int) -> None:
        # Python's mmap keeps a duplicate of the descriptor for as long as it lives, and a process
        # may have 1,024. So it maps nothing in particular, and the file replaces that. It also
        # makes the kernel say no where a request is beyond all the memory that there is.
        self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.size = size
        self.process = os.getpid()
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
            self.memory = Memory(self.descriptor, size)
            _allocate(self.descriptor, size)
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
    :ivar dropped: numbers of those that the other side has yet to be told to let go of
    """

    def __init__(self) -> None:
        self.made = 0
        self.dropped: list[int] = []
        self._messages = 0
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
        segment = self._fitting(rounded(size)) or self._make(rounded(size))
        segment.memory.map[0] = 1
        segment.last_use = self._messages
        return segment, Lease(segment.memory, size)

    def tidy(self) -> list[int]:
        """Give up what nothing needs any more, once for each message; return ``dropped``."""
        self._messages += 1
        if len(self._segments) > SPARE or self._messages % PATIENCE == 0:
            self._drop_some()
        return self.dropped

    def forget(self, index: int) -> None:
        """The other side could not map it."""
        self._segments.pop(index, None)

    def close(self) -> None:
        """Let go of all; arrays that are still alive on the other side stay valid."""
        for segment in self._segments.values():
            segment.announced()
        self._segments.clear()

    def _fitting(self, size: int) -> Segment | None:
        """The smallest free one that holds so much."""
        best = None
        most = 2 * size  # all of it stays in memory while any array of it is alive
        for segment in self._segments.values():
            memory = segment.memory
            if size <= memory.size <= most and not memory.map[0]:
                best = segment
                most = memory.size - 1
        return best

    def _make(self, size: int) -> Segment:
        try:
            segment = Segment(self.made, size)
        except OSError as error:
            raise _explained(error, size) from error
        self.made += 1
        self._segments[segment.index] = segment
        return segment

    def _drop_some(self) -> None:
        free = [each for each in self._segments.values() if not each.memory.map[0]]
        free.sort(key=lambda each: each.last_use, reverse=True)
        total = 0
        for position, segment in enumerate(free):
            total += segment.memory.size
            many = position >= SPARE or (position >= 2 and total > SPARE_BYTES)
            if many or self._messages - segment.last_use > PATIENCE:
                self._drop(segment)

    def _drop(self, segment: Segment) -> None:
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
    if size > os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE:
        raise OSError(errno.ENOMEM, "the machine has less")
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


def _allocate(descriptor: int, size: int) -> None:
    """Take the memory now, without the GIL: if there is none, writing to it would be SIGBUS."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(descriptor, 0, size)


def _explained(error: OSError, size: int) -> Exception:
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        return OSError(
            error.errno,
            "no file descriptor is left for the arrays of a call: raise the limit (ulimit -n), "
            "or look for what leaves files and sockets open",
        )
    return MemoryError(
        f"no {size:,} bytes of memory can be shared between two processes ({error.strerror}): "
        f"send less in one call, or keep fewer results"
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
