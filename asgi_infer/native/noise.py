"""How quiet the machine is: what everybody else does with its CPUs. For measurements; Linux."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from .cpu import IMPORT_AFFINITY

_PRESSURE = Path("/proc/pressure/cpu")
_STAT = Path("/proc/stat")
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_CPUS = tuple(f"cpu{number}" for number in IMPORT_AFFINITY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Who else wanted the machine while something was measured."""

    pressure: float
    """The share of a quiet moment in which somebody waited for a CPU."""
    others: float
    """CPUs that other processes kept busy, of those that this one may use."""
    stolen: float
    """CPUs, of the same, that the host of a virtual machine took away."""

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

    Of the CPUs that this process may use. Interrupts are left out: those of our own traffic
    belong to nobody.
    """
    try:
        lines = _STAT.read_text().splitlines()
    except OSError:
        return 0.0, 0.0  # not Linux
    counts = {name: rest.split() for name, _, rest in (line.partition(" ") for line in lines)}
    busy = stolen = 0
    # Some containers number their CPUs anew: then all of them count, in the first line.
    for fields in [counts[cpu] for cpu in _CPUS if cpu in counts] or [counts["cpu"]]:
        user, nice, system, _idle, _iowait, _irq, _softirq, steal = map(int, fields[:8])
        busy += user + nice + system
        stolen += steal
    return busy / _TICKS, stolen / _TICKS


def _own_cpu() -> float:
    """CPU seconds that this process used, and the children it has waited for."""
    if sys.platform == "win32":  # pragma: no cover  # where the machine's are not known either
        return 0.0
    import resource  # which Windows has not

    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(each) for each in whose]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
