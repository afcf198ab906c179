"""What the threads of another process use, seen from outside while it is measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from ..native import procfs
from ..native.procfs import ThreadCounters
from ._results import ThreadTrace

INTERVAL = 0.1
_SHORTEST = 1e-6  # seconds: an interval has some length
_WORTH_SHOWING = 0.01  # of one CPU, in at least one interval


@dataclass(frozen=True, kw_only=True)
class Used:
    """What some threads used together."""

    cpu: float
    queued: float
    system: float
    voluntary: int
    involuntary: int
    faults: int


class Watch:
    """Counts what each thread of a process uses, from its making on.

    A thread that ends counts with what was seen of it last: what it used from then on is missed,
    and one that starts and ends between two looks is missed altogether.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._last = self._first = procfs.all_thread_counters(pid)
        self._time = time.perf_counter()
        self._shares: list[dict[int, float]] = []

    def tick(self) -> None:
        """An interval is over."""
        now, counters = time.perf_counter(), procfs.all_thread_counters(self._pid)
        seconds = max(now - self._time, _SHORTEST)
        # Below nothing where the number of a thread that has ended is another's now.
        self._shares.append(
            {
                native_id: max(0.0, min(1.0, (each.on_cpu - self._on_cpu(native_id)) / seconds))
                for native_id, each in counters.items()
            }
        )
        self._time = now
        self._last = {**self._last, **counters}

    def stop(self) -> None:
        """The end: what is left of an interval counts, but is no value of a picture."""
        if self._shares:
            self._last = {**self._last, **procfs.all_thread_counters(self._pid)}
        else:
            self.tick()

    def used(self, *, without: int | None = None) -> Used:
        """What all threads used, or all but one."""

        def growth(field: str) -> float:
            total = 0.0
            for native_id, last in self._last.items():
                if native_id != without:
                    first = getattr(self._first.get(native_id), field, 0)
                    total += max(0, getattr(last, field) - first)
            return total

        return Used(
            cpu=growth("on_cpu"),
            queued=growth("queued"),
            system=growth("system_time"),
            voluntary=round(growth("voluntary_switches")),
            involuntary=round(growth("involuntary_switches")),
            faults=round(growth("minor_faults")),
        )

    def traces(self, python: Mapping[int, str]) -> tuple[ThreadTrace, ...]:
        """The picture: the main thread, then those that used most. Idle ones are left out.

        :param python: Python's names of its threads, by native id
        """
        found = {
            native_id: ThreadTrace(
                name=counters.name,
                python=python.get(native_id),
                cpu=tuple(round(shares.get(native_id, 0.0), 4) for shares in self._shares),
            )
            for native_id, counters in self._last.items()
        }
        order = sorted(found, key=lambda each: (each != self._pid, -sum(found[each].cpu)))
        return tuple(
            found[native_id]
            for native_id in order
            if native_id == self._pid or max(found[native_id].cpu) >= _WORTH_SHOWING
        )

    def _on_cpu(self, native_id: int) -> float:
        counters: ThreadCounters | None = self._last.get(native_id)
        return counters.on_cpu if counters else 0.0
