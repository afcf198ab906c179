"""How quiet the machine is: what everybody else does with its CPUs. For measurements; Linux."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

_PRESSURE = Path("/proc/pressure/cpu")
_STAT = Path("/proc/stat")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Who else wanted the machine while something was measured."""

    pressure: float
    """The share of a quiet moment in which somebody waited for a CPU."""
    others: float
    """CPUs that other processes kept busy."""
    stolen: float
    """CPUs that the host of a virtual machine took away."""

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


def quiet_moment(seconds: float = 0.3) -> Noise:
    """The noise while this process does nothing, for a moment: all waiting is other people's."""
    meter, before = NoiseMeter(), stalled()
    time.sleep(seconds)
    return replace(meter.read(), pressure=(stalled() - before) / seconds)


def stalled() -> float:
    """Seconds, since the machine started, in which some task waited for a CPU."""
    try:
        line = _PRESSURE.read_text().splitlines()[0]
    except (OSError, IndexError):
        return 0.0  # a kernel without pressure figures
    return int(line.rpartition("total=")[2]) / 1e6


def _machine_cpu() -> tuple[float, float]:
    """CPU seconds that processes used, and that were stolen, since the machine started.

    Interrupts are left out: those of our own traffic belong to nobody.
    """
    try:
        fields = _STAT.read_text().splitlines()[0].split()[1:]
    except OSError:
        return 0.0, 0.0  # not Linux
    user, nice, system, _idle, _iowait, _irq, _softirq, steal = map(int, fields[:8])
    return (user + nice + system) / _TICKS, steal / _TICKS


def _own_cpu() -> float:
    """CPU seconds that this process used, and the children it has waited for."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(each) for each in whose]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
