"""What Linux counts: the threads of another process, and who else used the machine."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

_PRESSURE = Path("/proc/pressure/cpu")
_QUIET = 0.3  # seconds of doing nothing, in which all waiting for a CPU is other people's
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class ThreadCounts:
    """What one native thread has used so far."""

    switches: int  # voluntary: it gave its CPU up to wait for something
    cpu: float  # seconds


def thread_counts(pid: int) -> dict[int, ThreadCounts]:
    """The counts of every native thread of a process, by thread id."""
    counts = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            nanoseconds = int((task / "schedstat").read_text().split()[0])
            counts[int(task.name)] = ThreadCounts(_switches(task), nanoseconds / 1e9)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return counts


def _switches(task: Path) -> int:
    for line in (task / "status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches:"):
            return int(line.split()[1])
    raise OSError("the kernel does not count context switches")


def used_between(
    before: dict[int, ThreadCounts], after: dict[int, ThreadCounts]
) -> dict[int, ThreadCounts]:
    """What each thread that lived to the end used from one reading to the other."""
    zero = ThreadCounts(0, 0.0)
    used = {}
    for thread, now in after.items():
        then = before.get(thread, zero)
        used[thread] = ThreadCounts(now.switches - then.switches, now.cpu - then.cpu)
    return used


def total(counts: dict[int, ThreadCounts]) -> ThreadCounts:
    """The sum over threads."""
    switches = sum(each.switches for each in counts.values())
    return ThreadCounts(switches, sum(each.cpu for each in counts.values()))


@dataclass(frozen=True)
class Noise:
    """Who else wanted the machine during a round."""

    pressure: float  # the share of a quiet moment in which somebody waited for a CPU
    others: float  # CPUs that other processes kept busy
    stolen: float  # CPUs that the host of a virtual machine took away

    @property
    def busy(self) -> bool:
        """Whether that is enough to move figures."""
        return self.pressure > 0.05 or self.others > 0.1 or self.stolen > 0.1


class NoiseMeter:
    """Tells, from its making to ``read``, how busy everybody but this process was.

    Children count as ours once they have been waited for.
    """

    def __init__(self) -> None:
        self._pressure = _pressure_while_quiet()
        self._start = time.monotonic()
        self._busy, self._stolen = _machine_cpu()
        self._own = _own_cpu()

    def read(self) -> Noise:
        """The noise since this meter was made."""
        seconds = time.monotonic() - self._start
        busy, stolen = _machine_cpu()
        others = (busy - self._busy) - (_own_cpu() - self._own)
        return Noise(
            pressure=self._pressure,
            others=max(0.0, others / seconds),
            stolen=(stolen - self._stolen) / seconds,
        )


def _pressure_while_quiet() -> float:
    before = _stalled()
    time.sleep(_QUIET)
    return (_stalled() - before) / _QUIET


def _stalled() -> float:
    """Seconds, since the machine started, in which some task waited for a CPU."""
    try:
        line = _PRESSURE.read_text().splitlines()[0]
    except OSError:
        return 0.0  # a kernel without pressure figures
    return int(line.rpartition("total=")[2]) / 1e6


def _machine_cpu() -> tuple[float, float]:
    """CPU seconds that anybody used, and that were stolen, since the machine started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq) / _TICKS, steal / _TICKS


def _own_cpu() -> float:
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(each) for each in whose]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
