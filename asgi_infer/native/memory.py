"""Keep freed memory in the process instead of handing it back to the kernel after each call."""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger("asgi_infer")

# The parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_OPTIONS = {
    _M_TRIM_THRESHOLD: 2**31 - 1,
    _M_MMAP_THRESHOLD: 32 * 2**20,  # the largest that glibc accepts
    _M_TOP_PAD: 64 * 2**20,
}


def retain_memory() -> bool:
    """Tell glibc's malloc to keep what is freed. For the whole process, and for good.

    By default glibc returns large blocks to the kernel as soon as they are freed, and the next
    call pays a page fault for every 4 KiB of them again. The price of keeping them: the process
    stays as large as it ever was.

    :returns: whether it took effect; under another allocator a log line says that it did not
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        refused = [option for option, value in _OPTIONS.items() if mallopt(option, value) != 1]
    except (AttributeError, OSError, TypeError):
        refused = list(_OPTIONS)
    if refused:
        logger.warning("retain_memory has no effect here: the allocator is not glibc's malloc")
    return not refused
