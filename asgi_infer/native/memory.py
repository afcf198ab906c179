"""Keep freed memory in the process instead of handing it back to the kernel after each call."""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger("asgi_infer")

# The parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_OPTIONS = {
    _M_TRIM_THRESHOLD: -1,  # never shrink the heap
    # No mappings of their own for large blocks, which free() would unmap at once. A higher
    # M_MMAP_THRESHOLD would not do: glibc accepts 32 MiB at most.
    _M_MMAP_MAX: 0,
    # Also of a thread's arena: glibc unmaps its free heaps unless that leaves less than this.
    _M_TOP_PAD: 64 * 2**20,
}


def retain_memory() -> bool:
    """Tell glibc's malloc to keep what is freed. For the whole process, and for good.

    By default glibc returns large blocks to the kernel as soon as they are freed, and the next
    call pays a page fault for every 4 KiB of them again. The price of keeping them: the process
    stays as large as it ever was, and memory that is freed in one place may be too scattered
    to serve a large block elsewhere.

    Blocks of up to 64 MiB are kept, which is as large as glibc lets a heap become on any thread
    but the main one; on the main thread, and with ``MALLOC_ARENA_MAX=1`` in the environment
    before the program starts, blocks of any size.

    :returns: whether it took effect; under another allocator (musl's, jemalloc, macOS's) a log
        line says that it did not
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        refused = [option for option, value in _OPTIONS.items() if mallopt(option, value) != 1]
    except (AttributeError, OSError, TypeError):
        refused = list(_OPTIONS)
    if refused or _replaced():
        logger.warning("retain_memory has no effect here: the allocator is not glibc's malloc")
        return False
    return True


def _replaced() -> bool:
    """Whether another allocator stands in for glibc's malloc, whose mallopt then does nothing."""
    process = ctypes.CDLL(None)
    # What jemalloc, tcmalloc and mimalloc export in a process that they were preloaded into.
    return any(hasattr(process, name) for name in ("mallctl", "tc_version", "mi_version"))
