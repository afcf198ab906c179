"""What slows calls down and can be helped: one line of log for each cause, with the figure."""

from __future__ import annotations

import logging
import math
import mmap
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Protocol

from .native import NativePolicy, cpu, processes
from .native.procfs import thread_usage

logger = logging.getLogger("asgi_infer")

_IN_A_ROW = 3  # looks that must agree: one call may be unlucky
_FAULT_SHARE = 0.05  # of a call, spent on page faults, from which on it is worth a word
_FAULTS = 100  # in a call; fewer are not worth measuring what one costs
_BLOCKED = 0.02  # seconds that a loop must stand still at least
_THROTTLED_SHARE = 0.05  # of the periods of the quota


class Looked(Protocol):
    """What a close look at a call has found: see ``Look``."""

    seconds: float
    faults: int
    lag: float | None
    func: str


class Hints:
    """Says what it finds in the looks at one runner's calls. The inference thread's own."""

    def __init__(self, name: str, native: NativePolicy) -> None:
        self._name = name
        self._native = native
        # Each cause has a check that returns the hint; it is asked until it has one.
        self._open: dict[str, Callable[[Looked], str | None]] = {
            "faults": self._page_faults,
            "gil": self._held_gil,
            "quota": self._quota,
            "processes": self._processes,
        }
        self._in_a_row = {"faults": 0, "gil": 0}
        self._looks = 0
        self._quota_cpus = cpu.cgroup_quota()
        self._throttling = cpu.throttling()

    def consider(self, look: Looked) -> None:
        """Look for every cause that nothing has been said of yet."""
        self._looks += 1
        for cause, check in list(self._open.items()):
            hint = check(look)
            if hint is not None:
                del self._open[cause]
                logger.warning("%s", hint)

    def _agreed(self, cause: str, *, sign: bool) -> bool:
        self._in_a_row[cause] = self._in_a_row[cause] + 1 if sign else 0
        return self._in_a_row[cause] >= _IN_A_ROW

    def _page_faults(self, look: Looked) -> str | None:
        if self._native.retain_memory:
            return None
        many = look.faults >= _FAULTS
        share = look.faults * fault_seconds() / look.seconds if many else 0.0
        if not self._agreed("faults", sign=share > _FAULT_SHARE):
            return None
        return (
            f"{look.func} spends {share:.0%} of its time on page faults ({look.faults} in a "
            f"call), to get memory that the call before has given back: "
            f"NativePolicy(retain_memory=True) keeps it"
        )

    def _held_gil(self, look: Looked) -> str | None:
        lag = look.lag or 0.0
        if not self._agreed("gil", sign=lag >= _BLOCKED and lag >= 0.9 * look.seconds):
            return None
        return (
            f"while {look.func} runs, the event loop stands still (for {lag:.3g} s of "
            f"{look.seconds:.3g} s): the function holds the GIL, on whatever thread it runs. It "
            f"needs a process of its own, or a binding that releases the GIL while it computes"
        )

    def _quota(self, look: Looked) -> str | None:
        if self._quota_cpus is None:
            return None
        before, self._throttling = self._throttling, cpu.throttling()
        periods = self._throttling.periods - before.periods
        throttled = self._throttling.throttled_periods - before.throttled_periods
        if not periods or throttled < 2 or throttled < _THROTTLED_SHARE * periods:
            return None
        threads = max(1, math.floor(self._quota_cpus))
        mine = self._native.thread_count
        remedy = (
            f"set NativePolicy(threads={threads}), not {mine}"
            if mine > threads
            else f"the model has {mine} already: look for what else runs in this container"
        )
        return (
            f"the cgroup's quota of {self._quota_cpus:g} CPUs was used up in {throttled} of "
            f"{periods} periods, and everything stood still for the rest of each: {remedy}"
        )

    def _processes(self, look: Looked) -> str | None:
        if self._looks & (self._looks - 1):  # at the 1st look, the 2nd, 4th, 8th ...
            return None
        try:
            pids = [os.getpid(), *processes.siblings()]
        except (OSError, ValueError):  # not Linux, or a kernel that doesn't tell
            return None
        mine, *others = (processes.threads_named(self._name, pid) for pid in pids)
        pools = [mine, *(count for count in others if count > 1)]  # one thread makes no pool
        cpus = len(cpu.IMPORT_AFFINITY)
        if mine < 2 or len(pools) < 2 or sum(pools) <= cpus:
            return None
        return (
            f"{len(pools)} processes of this server run a model named {self._name!r}, with "
            f"{sum(pools)} native threads on {cpus} CPUs, which slows all of them down: "
            f"set NativePolicy(threads={max(1, cpus // len(pools))}), or start fewer workers"
        )


@cache
def fault_seconds() -> float:
    """What one page fault costs here, measured once: 0.1 µs to 3 µs, most in virtual machines."""
    pages = 512
    with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        before, start = thread_usage().ru_minflt, time.perf_counter()
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1
        seconds = time.perf_counter() - start
        return seconds / max(1, thread_usage().ru_minflt - before)
