"""The OpenMP runtimes in this process: their thread counts and their pools."""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from pathlib import Path

from ._maps import MAPS, mapped_files

# With what wheels append to the name. Not libgomp-plugin-..., nor Open MPI's libompitrace.so.
_RUNTIME = re.compile(r"/(libgomp|libomp|libiomp5)(?!-plugin)(-[^/.]*)?\.so[^/]*$")
_PAUSE_SOFT = 1  # omp_pause_soft of the OpenMP 5.0 specification


class OpenMPRuntime:
    """One loaded copy of an OpenMP runtime. A process often holds several, one in each wheel.

    :ivar path: the file it was loaded from
    :ivar family: ``libgomp``, ``libomp`` or ``libiomp5``
    """

    def __init__(self, path: str, family: str) -> None:
        self.path = path
        self.family = family
        # NOLOAD: a handle on the copy that is there, never another copy.
        self._library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD)

    def __repr__(self) -> str:
        return f"OpenMPRuntime({self.path!r})"

    @property
    def threads(self) -> int:
        """How many threads a parallel region that starts on *this thread* gets."""
        return int(self._library.omp_get_max_threads())

    def set_threads(self, count: int) -> None:
        """Set that number, for the calling thread alone."""
        self._library.omp_set_num_threads(ctypes.c_int(count))

    @property
    def block_time(self) -> float | None:
        """Seconds for which an idle thread spins before it sleeps, as set on *this thread*.

        None for libgomp, which counts its turns instead (``GOMP_SPINCOUNT``, read once when it
        is loaded), and lowers them by itself while more threads are about than CPUs.
        """
        get = getattr(self._library, "kmp_get_blocktime", None)
        return None if get is None else int(get()) / 1000

    def set_block_time(self, seconds: float) -> bool:
        """Set that time, for regions that start on the calling thread; to the millisecond.

        :returns: whether the runtime has one: libomp and libiomp5 do
        """
        set_milliseconds = getattr(self._library, "kmp_set_blocktime", None)
        if set_milliseconds is None:
            return False
        set_milliseconds(ctypes.c_int(round(seconds * 1000)))
        return True

    def release_pool(self) -> bool:
        """Give back the pool that the calling thread owns; it is made anew when next needed.

        Only libgomp has a pool for each calling thread, and only there does this do anything.
        No parallel region may be under way on the calling thread.

        :returns: whether the runtime is one that gives its pool back
        """
        pause = getattr(self._library, "omp_pause_resource_all", None)  # since GCC 9
        if self.family != "libgomp" or pause is None:
            return False
        return int(pause(ctypes.c_int(_PAUSE_SOFT))) == 0


def loaded_runtimes(maps: Path = MAPS) -> list[OpenMPRuntime]:
    """Every OpenMP runtime that is loaded now; empty off Linux."""
    runtimes = []
    for path, match in mapped_files(_RUNTIME, maps).items():
        with suppress(OSError):  # it has been unloaded in between
            runtimes.append(OpenMPRuntime(path, match[1]))
    return runtimes


def limit_threads(count: int) -> None:
    """Let no parallel region that starts on this thread use more than ``count`` threads.

    A smaller number that is in force already, from ``OMP_NUM_THREADS`` say, stays.
    """
    for runtime in loaded_runtimes():
        if runtime.threads > count:
            runtime.set_threads(count)


def release_pools() -> int:
    """Give back the libgomp pools of the calling thread; return how many runtimes took part.

    GNU OpenMP keeps a pool for each thread that ever started a parallel region and counts all
    their threads together. Once there are more than CPUs, every barrier in the process spins
    100 times instead of 300,000 before it sleeps (libgomp, ``config/linux/wait.h``). The main
    thread owns a pool as soon as a model was loaded or warmed up on it.
    """
    return sum(runtime.release_pool() for runtime in loaded_runtimes())
