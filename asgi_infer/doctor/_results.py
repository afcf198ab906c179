"""What the doctor measured and what it makes of it: plain data, the same in memory and as JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ThreadTrace:
    """One native thread while an arm was measured: the picture that ``htop`` shows."""

    name: str
    """The kernel's."""
    python: str | None
    """Python's name for it, where Python started it; None for a native library's thread."""
    cpu: tuple[float, ...]
    """For each interval the share of one CPU that it used: 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run the model, measured in a process of its own. Times in seconds."""

    key: str
    """``script``, ``def``, ``async-def``, ``executor``, ``runner``, ``runner-retain``, or, in the
    thread sweep, ``threads-N``."""
    title: str
    """For people: ``def endpoint``."""
    seconds: float
    """How long it was measured for."""
    latencies: tuple[float, ...]
    """Of each call, as whoever made it saw it, in order."""
    cpu_seconds: float
    """That all threads of the process used, on CPUs."""
    voluntary_switches: int
    """Of all threads but the event loop's: sleeps."""
    involuntary_switches: int
    """Of all threads but the event loop's: another thread took the CPU."""
    minor_faults: int
    system_seconds: float
    """Those CPU seconds that were spent in the kernel."""
    queued_seconds: float
    """That all threads waited in a run queue for a CPU."""
    throttled_periods: int
    """In which the cgroup's quota was used up."""
    throttled_seconds: float
    health: tuple[float, ...]
    """Latencies of ``/health`` meanwhile; empty for the script."""
    threads: tuple[ThreadTrace, ...]
    interval: float
    """Seconds that each value of ``ThreadTrace.cpu`` stands for."""
    model_cpu_seconds: float = 0.0
    """Those CPU seconds that the model's threads used, without the event loop's; 0 if unknown."""

    @property
    def calls(self) -> int:
        """How many calls ended in the measured time."""
        return len(self.latencies)

    @property
    def calls_per_second(self) -> float:
        """The throughput."""
        return self.calls / self.seconds

    @property
    def cores_used(self) -> float:
        """CPUs in use, on average."""
        return self.cpu_seconds / self.seconds

    @property
    def switches_per_call(self) -> float:
        """Voluntary context switches a call: the sign of a throttled thread pool."""
        return self.voluntary_switches / max(1, self.calls)

    @property
    def faults_per_call(self) -> float:
        """Minor page faults a call: the sign of memory that is returned and fetched again."""
        return self.minor_faults / max(1, self.calls)

    def latency(self, percent: float) -> float | None:
        """A percentile of the calls' latencies; None without calls."""
        return percentile(self.latencies, percent)

    def health_latency(self, percent: float) -> float | None:
        """A percentile of the latencies of ``/health``; None where there is none."""
        return percentile(self.health, percent)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it was measured."""

    system: str
    python: str
    cpus: int
    """That this process may use."""
    cores: int
    """Physical ones among them."""
    quota: float | None
    """CPUs that the cgroup pays for; None without a limit."""
    pressure: float
    """The share of a quiet moment before it all in which somebody waited for a CPU."""
    others: float
    """CPUs that other processes kept busy, in that moment or beside the arm that had it worst."""
    stolen: float
    """CPUs that the host took away from this virtual machine, likewise."""
    noisy: bool
    """Whether that is enough to move times; switches are to be trusted even then."""
    runtimes: tuple[str, ...]
    """Native thread pools found in the model's process: ``libgomp (scikit-learn)`` ..."""
    counted: bool = True
    """Whether threads could be counted here."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that the measurements say, in plain words."""

    key: str
    """``two-pools``, ``page-faults``, ``loop-blocked``, ``holds-gil``, ``quota``, ``threads``,
    ``healthy``, ``noise`` ..."""
    severity: str
    """``problem``, ``advice`` or ``fine``."""
    headline: str
    """``two OpenMP pools: 1313 sleeps per call; load the model on the runner: 4.0x``."""
    detail: str
    """A paragraph: what happens, how it is known, what to do."""
    lines: tuple[str, ...] = ()
    """Code to write or change, line by line; may be empty."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All of it."""

    target: str
    """``my_module:Model``."""
    call: str
    """``predict``."""
    clients: int
    machine: Machine
    arms: tuple[Arm, ...]
    sweep: tuple[Arm, ...]
    """The runner with other thread counts, in rising order; may be empty."""
    findings: tuple[Finding, ...]
    """The most important one first."""

    def arm(self, key: str) -> Arm | None:
        """The arm of that key, if it was measured."""
        return next((arm for arm in self.arms if arm.key == key), None)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """A percentile, 0 to 100, interpolated between neighbours; None without values."""
    if len(values) < 2:
        return values[0] if values else None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis for a machine to read, with the figures that the table shows."""
    values = dataclasses.asdict(diagnosis)
    for arms in ("arms", "sweep"):
        values[arms] = [
            {**dataclasses.asdict(arm), **_figures(arm)} for arm in getattr(diagnosis, arms)
        ]
    return values


def _figures(arm: Arm) -> dict[str, float | None]:
    return {
        "calls_per_second": arm.calls_per_second,
        "latency_p50": arm.latency(50),
        "latency_p99": arm.latency(99),
        "latency_mean": statistics.fmean(arm.latencies) if arm.latencies else None,
        "cores_used": arm.cores_used,
        "switches_per_call": arm.switches_per_call,
        "faults_per_call": arm.faults_per_call,
        "health_p99": arm.health_latency(99),
    }
