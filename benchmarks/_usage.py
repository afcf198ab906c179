"""What the threads of another process used from one moment to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from asgi_infer.native.procfs import ThreadCounters, all_thread_counters


@dataclass(frozen=True)
class Usage:
    """What one native thread, or several, used meanwhile."""

    cpu: float = 0.0  # seconds
    switches: int = 0  # voluntary: it gave its CPU up to wait for something
    faults: int = 0  # minor: pages that the kernel had to map in

    @classmethod
    def since_start(cls, counters: ThreadCounters) -> Usage:
        """All that a thread has used."""
        return cls(counters.on_cpu, counters.voluntary_switches, counters.minor_faults)

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.cpu + other.cpu, self.switches + other.switches, self.faults + other.faults
        )

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.cpu - other.cpu, self.switches - other.switches, self.faults - other.faults
        )


Reading = Mapping[int, ThreadCounters]
"""The counters of every thread of a process, or of several, by thread id."""


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that it has started; nothing once it has gone."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    return []


def read_tree(pid: int) -> Reading:
    """Read a process and all that it has started."""
    return {
        thread: counters
        for process in tree(pid)
        for thread, counters in all_thread_counters(process.pid).items()
    }


def used_between(before: Reading, after: Reading) -> dict[int, Usage]:
    """What each thread that lived to the end used from one reading to the other."""
    then = {thread: Usage.since_start(counters) for thread, counters in before.items()}
    return {
        thread: Usage.since_start(counters) - then.get(thread, Usage())
        for thread, counters in after.items()
    }


def total(used: Iterable[Usage]) -> Usage:
    """The sum over threads."""
    return sum(used, Usage())
