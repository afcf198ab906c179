"""Counters, moving averages, and the frozen snapshot that is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerStatistics:
    """What a runner has done and is doing.

    The counts are all read at one instant:
    ``submitted = completed + failed + cancelled + expired + rejected + queued + running``
    holds in every snapshot. The first six and ``late`` only ever grow. Moving
    averages are ``service_time``, ``cores_used``, ``switches_per_call``, ``faults_per_call`` and
    ``loop_lag``. Once a second, and only while calls are made, ``cores_used``, ``loop_lag`` and
    ``foreign_threads`` are looked at.
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
    """Refused on arrival: queue full, stopping, not ready, or too little time. Or dropped from a
    queue that had stood for too long: see ``QueuePolicy``."""
    queued: int
    """Waiting now."""
    queued_bytes: int
    """What the arguments of those hold, if ``max_queue_bytes`` is set."""
    running: int
    """Begun and not ended. More than one are the calls of a batch, and streams that let others
    run between two items: one function runs at a time, on each replica of the model."""
    late: int
    """Calls that ran on after their caller had left. They count as cancelled or expired too."""
    service_time: float
    """Seconds a call runs, or a batch of them, moving average. Streams are not in it."""
    batch_sizes: Mapping[int, int]
    """How often so many calls of a ``Batcher`` have run together: ``{size: count}``."""
    batches_split: int
    """How often a batch has failed and been run again, in two halves."""
    restarts: int
    """How often a model was lost with its process, and loaded again."""
    overloaded: bool
    """Whether the queue has stood for too long: see ``QueuePolicy``."""
    cores_used: float
    """CPUs that the whole process keeps busy while a call runs."""
    switches_per_call: float
    """How often the model's thread goes to sleep in a call: next to never when it has the whole
    CPU, hundreds of times when a second OpenMP pool throttles it."""
    faults_per_call: float
    """Pages of memory that the model's thread has to ask the kernel for in a call."""
    foreign_threads: int
    """Native threads that are neither Python's nor the model's: pools of other threads, of
    libraries that were first used elsewhere (NumPy's, when the main thread imported it), and
    what servers, allocators and drivers start for themselves."""
    pools_returned: int
    """How often a second OpenMP pool was found, and given back. Only ever grows."""
    loop_lag: float
    """Seconds that an event loop takes to get to something new while a call runs."""
    state: str
    """``new``, ``loading``, ``ready``, ``broken``, ``draining``, ``closed`` or ``failed``."""


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
    batches_split: int = 0
    restarts: int = 0
    batch_sizes: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class Usage:
    """What calls cost: moving averages and counts, described at ``RunnerStatistics``.

    Written by the inference thread alone, or by those of several replicas: what one of them adds
    may get lost then, which averages bear. Others read single values, which need no guard.
    """

    cores_used: float = 0.0
    switches_per_call: float = 0.0
    faults_per_call: float = 0.0
    foreign_threads: int = 0
    pools_returned: int = 0
    loop_lag: float = 0.0
    said: set[str] = field(default_factory=set, repr=False)
    """The causes of slowness that have been logged: not for users."""

    def say_once(self, cause: str) -> bool:
        """Whether ``cause`` has not been logged yet; it counts as logged from now on."""
        if cause in self.said:
            return False
        self.said.add(cause)
        return True


def moving_average(average: float, value: float) -> float:
    """The average with one value more, of which older ones fade (exponentially).

    The first one counts whole: an average that starts from zero would promise too little.
    """
    return average + 0.125 * (value - average) if average else value


def expectation(expected: float, value: float) -> float:
    """What the next value is going to be, as far as the latest ones tell.

    A moving average that jumps do not mislead for long. One slow call among fast ones counts for
    no more than four of them. And where calls have become fast, it is half-way there with each:
    to expect too much is worse than too little, since calls are refused for it, and calls that
    are refused teach nothing.
    """
    if not expected:
        return value
    if value < expected / 2:
        return (expected + value) / 2
    return expected + 0.125 * (min(value, 4 * expected) - expected)
