"""The OpenBLAS libraries in this process, as the wheels of NumPy and SciPy bring them.

OpenBLAS keeps one thread pool for the whole process, and starts it when it is loaded: on whatever
thread imports NumPy first. It has no part in what GNU OpenMP's pools do to each other.
"""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from pathlib import Path

from ._maps import MAPS, mapped_files

_LIBRARY = re.compile(r"/libscipy_openblas[^/]*\.so[^/]*$|/libopenblas[^/]*\.so[^/]*$")
# Wheels rename the functions, so that several copies do not get in each other's way.
_NAMES = [(prefix, suffix) for prefix in ("", "scipy_") for suffix in ("", "64_", "_64")]


class OpenBLAS:
    """One loaded copy of OpenBLAS.

    :ivar path: the file it was loaded from
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # NOLOAD: a handle on the copy that is there, never another copy.
        self._library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD)

    @property
    def threads(self) -> int | None:
        """How many threads a call may use, in the whole process; None if it doesn't tell."""
        function = self._function("get_num_threads")
        return None if function is None else int(function())

    def set_threads(self, count: int) -> None:
        """Set that number, for the whole process."""
        function = self._function("set_num_threads")
        if function is not None:
            function(ctypes.c_int(count))

    def _function(self, name: str) -> ctypes._FuncPointer | None:
        for prefix, suffix in _NAMES:
            function = getattr(self._library, f"{prefix}openblas_{name}{suffix}", None)
            if function is not None:
                return function  # type: ignore[no-any-return]  # ctypes makes them up by name
        return None


def loaded_libraries(maps: Path = MAPS) -> list[OpenBLAS]:
    """Every copy of OpenBLAS that is loaded now; empty off Linux."""
    libraries = []
    for path in mapped_files(_LIBRARY, maps):
        with suppress(OSError):  # it has been unloaded in between
            libraries.append(OpenBLAS(path))
    return libraries


def limit_threads(count: int) -> None:
    """Let no BLAS call of this process use more than ``count`` threads.

    A smaller number that is in force already, from ``OPENBLAS_NUM_THREADS`` say, stays.
    """
    for library in loaded_libraries():
        threads = library.threads
        if threads is not None and threads > count:
            library.set_threads(count)
