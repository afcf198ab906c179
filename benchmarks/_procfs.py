"""What Linux counts: the threads of another process, and who else used the machine."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

_PRESSURE = Path("/proc/pressure/cpu")
QUIET = 0.3  # seconds of doing nothing, in which all waiting for a CPU is other people's
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
    """Who else wanted the machine while something was measured."""

    pressure: float  # the share of a quiet moment in which somebody waited for a CPU
    others: float  # CPUs that other processes kept busy
    stolen: float  # CPUs that the host of a virtual machine took away

    @property
    def busy(self) -> bool:
        """Whether that is enough to move figures."""
        return self.pressure > 0.05 or self.others > 0.1 or self.stolen > 0.1


class NoiseMeter:
    """Tells how busy everybody but this process was, from its making to ``read``.

    Children count as ours once they have been waited for.

    :param pressure: of a quiet moment just before
    """

    def __init__(self, pressure: float = 0.0) -> None:
        self._pressure = pressure
        self._start = time.monotonic()
        self._busy, self._stolen = machine_cpu()
        self._own = own_cpu()

    def read(self) -> Noise:
        """The noise since this meter was made."""
        seconds = time.monotonic() - self._start
        busy, stolen = machine_cpu()
        others = (busy - self._busy) - (own_cpu() - self._own)
        return Noise(
            pressure=self._pressure,
            others=max(0.0, others / seconds),
            stolen=(stolen - self._stolen) / seconds,
        )


def quiet_moment() -> Noise:
    """The noise while this process does nothing, for a moment."""
    meter, before = NoiseMeter(), stalled()
    time.sleep(QUIET)
    return replace(meter.read(), pressure=(stalled() - before) / QUIET)


def stalled() -> float:
    """Seconds, since the machine started, in which some task waited for a CPU."""
    try:
        line = _PRESSURE.read_text().splitlines()[0]
    except OSError:
        return 0.0  # a kernel without pressure figures
    return int(line.rpartition("total=")[2]) / 1e6


def machine_cpu() -> tuple[float, float]:
    """CPU seconds that processes used, and that were stolen, since the machine started.

    Interrupts are left out: those of our own traffic belong to nobody.
    """
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, _irq, _softirq, steal = map(int, fields[:8])
    return (user + nice + system) / _TICKS, steal / _TICKS


def own_cpu() -> float:
    """CPU seconds that this process used, and the children it has waited for."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(each) for each in whose]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
