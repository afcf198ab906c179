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

from ._statistics import Usage
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
    """Says what it finds in the looks at one runner's calls. The inference thread's own.

    :param name: the runner's
    :param native: what its model runs under
    :param usage: remembers what has been said
    """

    def __init__(self, name: str, native: NativePolicy, usage: Usage) -> None:
        self._name = name
        self._native = native
        self._usage = usage
        self._in_a_row = {"faults": 0, "gil": 0}
        self._looks = 0
        self._throttling: cpu.Throttling | None = None

    def consider(self, look: Looked) -> None:
        """Look for every cause that nothing has been said of yet."""
        self._looks += 1
        # Made here: kept, these methods would be a reference cycle.
        checks: dict[str, Callable[[Looked], str | None]] = {
            "faults": self._page_faults,
            "gil": self._held_gil,
            "quota": self._quota,
            "processes": self._processes,
        }
        for cause, check in checks.items():
            hint = None if cause in self._usage.said else check(look)
            if hint is not None and self._usage.say_once(cause):
                logger.warning("%s", hint)

    def _agreed(self, cause: str, *, sign: bool) -> bool:
        self._in_a_row[cause] = self._in_a_row[cause] + 1 if sign else 0
        return self._in_a_row[cause] >= _IN_A_ROW

    def _page_faults(self, look: Looked) -> str | None:
        if self._native.retain_memory:
            return None
        many = look.faults >= _FAULTS
        share = min(1.0, look.faults * fault_seconds() / look.seconds) if many else 0.0
        if not self._agreed("faults", sign=share > _FAULT_SHARE):
            return None
        return (
            f"{look.func} spends about {share:.0%} of its time on page faults ({look.faults} in a "
            f"call). If that is memory which the call before has given back, "
            f"NativePolicy(retain_memory=True) keeps it"
        )

    def _held_gil(self, look: Looked) -> str | None:
        lag = look.lag or 0.0
        # As long as the call: a loop that is held up for longer, or less, is held up by others.
        sign = lag >= _BLOCKED and 0.9 * look.seconds <= lag <= 1.1 * look.seconds
        if not self._agreed("gil", sign=sign):
            return None
        return (
            f"while {look.func} runs, the event loop stands still (for {lag:.3g} s of "
            f"{look.seconds:.3g} s): the function holds the GIL, on whatever thread it runs. Give "
            f"it a process of its own, InferenceRunner(..., worker=ProcessWorker()) from "
            f"asgi_infer.workers, or use a binding that releases the GIL while it computes"
        )

    def _quota(self, look: Looked) -> str | None:
        quota = cpu.cgroup_quota()
        if quota is None:
            return None
        before, now = self._throttling, cpu.throttling()
        self._throttling = now
        periods = now.periods - before.periods if before else 0
        throttled = now.throttled_periods - before.throttled_periods if before else 0
        # Fewer periods than before are those of another group.
        if periods < 0 or throttled < max(2, _THROTTLED_SHARE * periods):
            return None
        threads, mine = max(1, math.floor(quota)), self._native.thread_count
        remedy = (
            f"set NativePolicy(threads={threads}), not {mine}"
            if mine > threads
            else f"the model has {mine} already: look for what else runs in this container"
        )
        return (
            f"a cgroup's quota (the least is {quota:g} CPUs) was used up in {throttled} of "
            f"{periods} periods, and everything stood still for the rest of each: {remedy}"
        )

    def _processes(self, look: Looked) -> str | None:
        if self._looks & (self._looks - 1):  # at the 1st look, the 2nd, 4th, 8th ...
            return None
        try:
            pids = [os.getpid(), *processes.siblings()]
        except (OSError, ValueError):  # not Linux, or a kernel that doesn't tell
            return None
        counts = {pid: processes.threads_named(self._name, pid) for pid in pids}
        # One thread makes no pool.
        pools = {pid: count for pid, count in counts.items() if count > 1}
        cpus = frozenset[int]().union(*map(processes.affinity, pools))
        room = min(len(cpus), cpu.cgroup_quota() or len(cpus))
        if os.getpid() not in pools or len(pools) < 2 or sum(pools.values()) <= room:
            return None
        count, threads = len(pools), sum(pools.values())
        return (
            f"{count} processes that were started together run a model named {self._name!r}, with "
            f"{threads} native threads on {room:g} CPUs, which slows all of them down: "
            f"set NativePolicy(threads={max(1, int(room) // count)}), start fewer workers, or "
            f"have one model for all of them: InferenceRunner(..., worker=SharedWorker()) from "
            f"asgi_infer.workers"
        )


@cache
def fault_seconds() -> float:
    """What one page fault costs here, measured once: 0.1 µs to 3 µs, most in virtual machines.

    0 where it can't be measured.
    """
    try:
        return min(_fault_seconds() for _ in range(5))
    except OSError:  # no memory for it, or a kernel without huge pages, which knows no such advice
        return 0.0


def _fault_seconds() -> float:
    # Private, as malloc's memory is: shared memory is dearer.
    flags, pages = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 128
    with mmap.mmap(-1, pages * mmap.PAGESIZE, flags=flags) as memory:
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # pragma: no branch  # Linux has it
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        before, start = thread_usage().ru_minflt, time.perf_counter()
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1
        seconds = time.perf_counter() - start
        return seconds / max(1, thread_usage().ru_minflt - before)
