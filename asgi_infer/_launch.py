"""The environment that native libraries read when they are loaded, for a command that loads them.

Too late for a running program: OpenMP, OpenBLAS and the allocator look once, at their start.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from typing import NoReturn

from .native import cpu

# Never OMP_PROC_BIND or GOMP_CPU_AFFINITY: these bind the thread that loads a library to one CPU.
_COUNTS: tuple[str, ...] = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# What asgi_infer.native.memory sets with mallopt, as glibc's tunables; and one heap for all,
# which has no limit of 64 MiB. That can only be had before there are threads.
_TUNABLES = {
    "glibc.malloc.arena_max": 1,
    "glibc.malloc.trim_threshold": 2**63 - 1,
    "glibc.malloc.mmap_max": 0,
    "glibc.malloc.top_pad": 64 * 2**20,
}

PACKAGES = {
    "jemalloc": "libjemalloc2",
    "tcmalloc": "libtcmalloc-minimal4",
    "mimalloc": "libmimalloc2.0",
}
"""The allocators to choose from, and what Debian calls their packages."""


BAD_INPUT = 2
NOT_EXECUTABLE = 126  # as shells have it
NOT_FOUND = 127

# What Python ignores for itself; a command would go on to ignore it.
_IGNORED = [getattr(signal, name) for name in ("SIGPIPE", "SIGXFSZ") if hasattr(signal, name)]


class LaunchError(Exception):
    """The command can't be executed as wanted. The text is one line, for the user.

    :ivar code: what to exit with
    """

    def __init__(self, text: str, code: int = BAD_INPUT) -> None:
        super().__init__(text)
        self.code = code


def settings(
    environment: Mapping[str, str],
    budget: cpu.CpuBudget,
    *,
    threads: int | None = None,
    retain_memory: bool = False,
    allocator: str | None = None,
) -> dict[str, str]:
    """What to add to an environment; nothing that is in it already.

    :param threads: for each native library; by default what the budget says
    :param retain_memory: have glibc's malloc keep freed memory
    :param allocator: one of ``PACKAGES`` to put in its place
    :raises LaunchError: there is no such allocator, or the two exclude each other
    """
    wanted: dict[str, str] = dict.fromkeys(_COUNTS, str(threads or budget.threads))
    if budget.hybrid and budget.quota is None:
        wanted["KMP_BLOCKTIME"] = "200"  # ms of spinning, which libomp leaves out on such CPUs
    if allocator is not None:
        if retain_memory:
            raise LaunchError("--retain-memory is for glibc's malloc: leave it or --allocator out")
        wanted["LD_PRELOAD"] = _library(allocator)
    absent = {name: value for name, value in wanted.items() if name not in environment}
    if retain_memory:
        absent |= _tunables(environment.get("GLIBC_TUNABLES", ""))
    return absent


def kept(
    environment: Mapping[str, str], *, threads: int | None = None, allocator: str | None = None
) -> dict[str, str]:
    """What is in an environment, and was asked for otherwise: that stays as it is.

    :raises LaunchError: there is no such allocator
    """
    asked = {} if threads is None else dict.fromkeys(_COUNTS, str(threads))
    if allocator is not None:
        asked["LD_PRELOAD"] = _library(allocator)
    return {
        name: environment[name]
        for name, value in asked.items()
        if environment.get(name, value) != value
    }


def executable(command: Sequence[str], path: str | None) -> str:
    """The file that a command names.

    :param path: where to look, as in ``PATH``
    :raises LaunchError: there is none, or it may not be executed
    """
    found = shutil.which(command[0], path=path)
    if found is not None:
        return found
    there = shutil.which(command[0], os.F_OK, path=path)
    if there is not None:
        raise LaunchError(f"{there} is no program: chmod +x makes it one", NOT_EXECUTABLE)
    raise LaunchError(
        f"there is no command {command[0]!r}: is it installed, and in PATH?", NOT_FOUND
    )


def execute(path: str, command: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Become the command.

    :raises LaunchError: the system refuses to execute it
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(path, command, environment)  # noqa: S606  # what it is for
    except OSError as error:
        text = f"{path} can't be executed: {error.strerror}"
        raise LaunchError(text, NOT_EXECUTABLE) from None


def _library(allocator: str) -> str:
    if allocator not in PACKAGES:
        raise LaunchError(f"--allocator is one of {', '.join(PACKAGES)}, not {allocator!r}")
    for name in (allocator, f"{allocator}_minimal"):
        found = ctypes.util.find_library(name)
        if found is not None:
            return found
    raise LaunchError(
        f"{allocator} is not installed: on Debian, apt install {PACKAGES[allocator]}"
    )


def _tunables(present: str) -> dict[str, str]:
    """Ours beside those that are set; none of these is replaced."""
    names = {setting.partition("=")[0] for setting in present.split(":")}
    ours = [f"{name}={value}" for name, value in _TUNABLES.items() if name not in names]
    if not ours:
        return {}
    return {"GLIBC_TUNABLES": ":".join([*filter(None, [present]), *ours])}
