"""How many CPUs there really are: affinity, cores, and the cgroup's quota, over all ancestors.

Off Linux there is no affinity and no cgroup: every CPU counts, as a core of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_ROOT = Path("/")


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))  # pragma: no cover  # macOS and Windows


IMPORT_AFFINITY = _affinity()
"""The CPUs that this thread could use when the package was imported.

Saved because libraries shrink it: with ``OMP_PROC_BIND=true``, merely loading libgomp binds the
loading thread to one CPU, and every thread started afterwards inherits that.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuBudget:
    """What a model has to compute on, and how many native threads to use for that."""

    cpus: frozenset[int]
    """The CPUs that it may run on."""
    cores: int
    """The physical cores that those belong to; as many as CPUs where the system doesn't tell."""
    hybrid: bool
    """Whether fast and slow cores are among them. OpenMP runtimes then sleep at every barrier
    instead of spinning (libgomp from GCC 15 on, libomp), and the slow ones set the pace."""
    quota: float | None
    """The CPU time that the cgroups pay for, in CPUs; None without a limit."""
    threads: int
    """How many native threads to run: as many as CPUs, and never more than the quota pays for."""
    reason: str
    """Why that many, in a sentence for people."""

    @property
    def smt(self) -> bool:
        """Whether some of the CPUs share a core (Hyper-Threading)."""
        return self.cores < len(self.cpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Throttling:
    """How often the cgroups' quotas have run out so far. Only differences say something."""

    periods: int
    """Periods, mostly of 100 ms, in which the process had something to run."""
    throttled_periods: int
    """Those that ended in a standstill, since the quota was used up before."""
    throttled_seconds: float
    """The time stood still, added up over the CPUs."""


def cgroup_quota(root: Path = _ROOT) -> float | None:
    """The CPU time that the cgroups of this process allow, in CPUs; None without a limit.

    The least over the cgroup and all its ancestors counts, for version 1 and 2 alike.

    :param root: where ``proc`` and ``sys`` are found
    """
    quotas = [_quota(group) for group in _groups(root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def throttling(root: Path = _ROOT) -> Throttling:
    """How often the quota of this process's cgroup, or of one above it, has run out.

    Of all these groups it is the one that was throttled most.

    :param root: where ``proc`` and ``sys`` are found
    """
    counts = [_throttling(group) for group in _groups(root)]
    nothing = Throttling(periods=0, throttled_periods=0, throttled_seconds=0.0)
    return max(counts, key=lambda each: each.throttled_periods, default=nothing)


def recommended_threads(cpus: frozenset[int] = IMPORT_AFFINITY) -> int:
    """How many native threads to run on ``cpus``: never more than the quota pays for.

    The quota is rounded down. Threads that wait for each other in lock-step burn a shared quota
    together and then stand still together until the next period begins.
    """
    return _threads(cpus, cgroup_quota())


def budget(cpus: frozenset[int] = IMPORT_AFFINITY, root: Path = _ROOT) -> CpuBudget:
    """All there is to know before choosing a number of native threads, and the number.

    :param cpus: those to run on; by default those allowed when the package was imported
    :param root: where ``proc`` and ``sys`` are found
    """
    quota = cgroup_quota(root)
    cores = _core_count(cpus, root)
    hybrid = _is_hybrid(cpus, root)
    return CpuBudget(
        cpus=cpus,
        cores=cores,
        hybrid=hybrid,
        quota=quota,
        threads=_threads(cpus, quota),
        reason=_reason(len(cpus), cores, quota, hybrid=hybrid),
    )


# -- threads -----------------------------------------------------------------------------------


def split(cpus: frozenset[int], parts: int, root: Path = _ROOT) -> list[frozenset[int]]:
    """``cpus`` for each of several models: whole cores, and neighbours together.

    No two parts share a CPU, unless there are more parts than CPUs; nor a core, unless there are
    more parts than cores.

    :param root: where ``sys`` is found
    """
    cores: dict[str, set[int]] = {}
    for each in sorted(cpus):
        cores.setdefault(_siblings(each, root), set()).add(each)
    units = list(cores.values()) if len(cores) >= parts else [{each} for each in sorted(cpus)]
    if len(units) < parts:
        return [frozenset(units[number % len(units)]) for number in range(parts)]
    bounds = [number * len(units) // parts for number in range(parts + 1)]
    return [frozenset[int]().union(*units[low:high]) for low, high in pairwise(bounds)]


def _threads(cpus: frozenset[int], quota: float | None) -> int:
    return max(1, len(cpus) if quota is None else min(len(cpus), math.floor(quota)))


def _reason(cpus: int, cores: int, quota: float | None, *, hybrid: bool) -> str:
    if quota is not None and quota < cpus:
        return (
            f"the cgroup's quota pays for {quota:g} of {_counted(cpus, 'CPU')}; more threads "
            f"would use it up together, and then all stand still"
        )
    reason = f"{_counted(cpus, 'CPU')} may be used"
    if hybrid:
        return f"{reason}, fast and slow ones; as many threads as fast ones may do more"
    if cores < cpus:
        return f"{reason}, on {_counted(cores, 'core')}; one thread for each core may do more"
    return reason


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# -- processors --------------------------------------------------------------------------------


def _core_count(cpus: frozenset[int], root: Path) -> int:
    """How many cores ``cpus`` are on. A CPU that says nothing of its siblings has none."""
    return len({_siblings(cpu, root) for cpu in cpus})


def _siblings(cpu: int, root: Path) -> str:
    """What names the core that ``cpu`` is on; itself if the system does not tell."""
    path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return _read(path) or str(cpu)


def _is_hybrid(cpus: frozenset[int], root: Path) -> bool:
    """Whether there are several kinds of ``cpus``: Intel lists each kind, ARM rates each CPU."""
    kinds = [_cpu_list(_read(root / f"sys/devices/cpu_{kind}/cpus")) for kind in ("core", "atom")]
    capacities = {_read(root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity") for cpu in cpus}
    return all(cpus & kind for kind in kinds) or len(capacities - {""}) > 1


def _cpu_list(text: str) -> frozenset[int]:
    """The kernel's ``0-3,8``. What makes no sense is left out."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        with suppress(ValueError):
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


# -- control groups ----------------------------------------------------------------------------


def _groups(root: Path) -> Iterator[Path]:
    """The directories of the CPU controllers of this process, each with all its ancestors'."""
    # A group's name need not be text.
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers or "cpu" in controllers.split(","):
            relative = Path(path.lstrip("/"))
            base = _mount(root / "sys/fs/cgroup", controllers)
            yield from (base / ancestor for ancestor in (relative, *relative.parents))


def _mount(base: Path, controllers: str) -> Path:
    """Where a tree is mounted: version 2 has one; version 1 names each for its controllers."""
    named = base / controllers
    # os.path's: unlike Path's, it says no where one may not look.
    there = os.path.exists(named)  # noqa: PTH110
    return named if there else base / "cpu"  # the names may come in another order there


def _quota(group: Path) -> float | None:
    """The limit set at one cgroup. A file that is missing or makes no sense sets none."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        cpus = int(quota) / int(period)
    except (OSError, ValueError, ArithmeticError):  # "max" is no number either
        return None
    return cpus if cpus > 0 else None


def _throttling(group: Path) -> Throttling:
    counts: dict[str, int] = {}
    for line in _read(group / "cpu.stat").splitlines():
        key, _, value = line.partition(" ")
        with suppress(ValueError):
            counts[key] = int(value)
    # Version 2 counts microseconds, version 1 nanoseconds.
    seconds = counts.get("throttled_usec", 0) / 1e6 + counts.get("throttled_time", 0) / 1e9
    return Throttling(
        periods=counts.get("nr_periods", 0),
        throttled_periods=counts.get("nr_throttled", 0),
        throttled_seconds=seconds,
    )


def _read(path: Path) -> str:
    """A file's text, whatever its bytes; empty where there is no such file."""
    try:
        return path.read_text(errors="surrogateescape").strip()
    except (OSError, ValueError):  # no path either: a group's name may hold anything
        return ""
