"""Counters, moving averages, and the frozen snapshot that is made of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerStatistics:
    """What a runner has done and is doing, all read at one instant.

    ``submitted = completed + failed + cancelled + expired + rejected + queued + running``
    holds in every snapshot. The first six and ``late`` only ever grow.
    """

    submitted: int
    """Calls made, refused ones included."""
    completed: int
    """The function returned while its caller waited."""
    failed: int
    """The function raised while its caller waited."""
    cancelled: int
    """The caller was cancelled, its client hung up, or the runner stopped."""
    expired: int
    """Accepted, and the deadline passed before the result was there."""
    rejected: int
    """Refused on arrival: queue full, stopping, not ready, or too little time."""
    queued: int
    """Waiting now."""
    running: int
    """Running now: 0 or 1."""
    late: int
    """Calls that ran on after their caller had left. They count as cancelled or expired too."""
    service_time: float
    """Seconds a call runs, moving average."""
    state: str
    """``new``, ``loading``, ``ready``, ``draining``, ``closed`` or ``failed``."""


@dataclass(slots=True)
class Counters:
    """The running figures. Every field is guarded by the scheduler's lock."""

    submitted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    rejected: int = 0
    late: int = 0
    running: int = 0
    service_time: float = 0.0
