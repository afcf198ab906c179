"""How many CPUs there really are: the affinity mask and the cgroup's quota."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))  # pragma: no cover  # macOS and Windows


IMPORT_AFFINITY = _affinity()
"""The CPUs that this thread could use when the package was imported.

Saved because libraries shrink it: with ``OMP_PROC_BIND=true``, merely loading libgomp binds the
loading thread to one CPU, and every thread started afterwards inherits that.
"""


def cgroup_quota(root: Path = Path("/")) -> float | None:
    """The CPU time that the cgroups of this process allow, in CPUs; None without a limit.

    The least over the cgroup and all its ancestors counts, for version 1 and 2 alike.

    :param root: where ``proc`` and ``sys`` are found
    """
    try:
        # A group's name need not be text.
        text = (root / "proc/self/cgroup").read_text(errors="surrogateescape")
    except OSError:
        return None
    mount = root / "sys/fs/cgroup"
    quotas = [quota for line in text.splitlines() for quota in _quotas(mount, line)]
    return min(quotas, default=None)


def recommended_threads(cpus: frozenset[int] = IMPORT_AFFINITY) -> int:
    """How many native threads to run on ``cpus``: never more than the quota pays for.

    The quota is rounded down. Threads that wait for each other in lock-step burn a shared quota
    together and then stand still together until the next period begins.
    """
    quota = cgroup_quota()
    threads = len(cpus) if quota is None else min(len(cpus), math.floor(quota))
    return max(1, threads)


def _quotas(mount: Path, line: str) -> Iterator[float]:
    """The limits that one line of /proc/self/cgroup, ``id:controllers:path``, leads to."""
    _, _, rest = line.partition(":")
    controllers, _, path = rest.partition(":")
    if controllers and "cpu" not in controllers.split(","):
        return
    base = mount / controllers if controllers else mount
    relative = Path(path.lstrip("/"))
    for ancestor in (relative, *relative.parents):
        quota = _quota(base / ancestor)
        if quota is not None:
            yield quota


def _quota(directory: Path) -> float | None:
    """The limit set at one cgroup. A file that is missing or makes no sense sets none."""
    try:
        if (directory / "cpu.max").exists():
            quota, period = (directory / "cpu.max").read_text().split()
        else:
            quota = (directory / "cpu.cfs_quota_us").read_text()
            period = (directory / "cpu.cfs_period_us").read_text()
        cpus = int(quota) / int(period)
    except (OSError, ValueError, ArithmeticError):  # "max" is no number either
        return None
    return cpus if cpus > 0 else None
