"""What a simulation has seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ._load import Request

Ending = Literal["completed", "refused", "dropped", "expired", "disconnected"]


@dataclass(kw_only=True)
class Outcome:
    """How one request fared. Times are seconds since the start of the simulation.

    :ivar request: what was asked for
    :ivar ending: ``completed``; ``refused`` on arrival; ``dropped`` from a queue that had stood
        for too long; ``expired``, waiting or running; or ``disconnected``, when the client's
        patience was at its end
    :ivar attempts: how often it was sent; what follows is about the last time
    :ivar arrived: when it was sent
    :ivar started: when its call began to run, or None
    :ivar ended: when the client knew the ending
    """

    request: Request
    ending: Ending
    attempts: int
    arrived: float
    started: float | None
    ended: float

    @property
    def wait(self) -> float:
        """Seconds from the time it was sent until its call ran, or until it was over."""
        return (self.ended if self.started is None else self.started) - self.arrived

    @property
    def latency(self) -> float:
        """Seconds from the time it was sent to its ending."""
        return self.ended - self.arrived


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a simulation has seen: the outcome of each request, in the order of their endings.

    :ivar outcomes: one for each request
    :ivar duration: when the last thing happened, in seconds
    :ivar busy: for how many seconds a function ran
    :ivar late: how many calls ran on after their clients had gone
    :ivar batch_sizes: how often so many calls have run together: ``{size: count}``
    """

    outcomes: Sequence[Outcome]
    duration: float
    busy: float
    late: int
    batch_sizes: Mapping[int, int]

    def of(self, *endings: Ending, priority: int | None = None) -> list[Outcome]:
        """The outcomes with one of ``endings``, or all; of one priority, or of all."""
        return [
            outcome
            for outcome in self.outcomes
            if (not endings or outcome.ending in endings)
            and (priority is None or outcome.request.priority == priority)
        ]

    @property
    def goodput(self) -> float:
        """Requests completed, for each second of the simulation."""
        return len(self.of("completed")) / self.duration if self.duration else 0.0

    def latency(self, share: float, *, priority: int | None = None) -> float:
        """The latency that ``share`` of the completed requests did not exceed; NaN without any.

        :param share: 0.99 for the 99th percentile
        """
        latencies = sorted(each.latency for each in self.of("completed", priority=priority))
        return latencies[max(0, math.ceil(share * len(latencies)) - 1)] if latencies else math.nan

    def longest_wait(self, *, priority: int | None = None) -> float:
        """The longest that any request waited, whatever its ending; 0 without any."""
        return max((each.wait for each in self.of(priority=priority)), default=0.0)
