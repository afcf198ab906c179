"""What a report makes of outcomes."""

from __future__ import annotations

import math

from asgi_infer.testing import Outcome, Report, Request
from asgi_infer.testing._report import Ending


def outcome(
    ending: Ending, *, arrived: float, started: float | None, ended: float, priority: int = 0
) -> Outcome:
    return Outcome(
        request=Request(priority=priority),
        ending=ending,
        attempts=1,
        arrived=arrived,
        started=started,
        ended=ended,
    )


def report(*outcomes: Outcome, duration: float = 10.0) -> Report:
    return Report(outcomes=outcomes, duration=duration, busy=5.0, late=0, batch_sizes={})


SERVED = outcome("completed", arrived=1.0, started=2.0, ended=4.0)
URGENT = outcome("completed", arrived=1.0, started=1.5, ended=2.0, priority=-1)
TOO_LATE = outcome("expired", arrived=1.0, started=None, ended=6.0)


def test_outcome() -> None:
    """Waiting ends when the call begins, or when it is over."""
    assert (SERVED.wait, SERVED.latency) == (1.0, 3.0)
    assert (TOO_LATE.wait, TOO_LATE.latency) == (5.0, 5.0)


def test_selection() -> None:
    """By ending, by priority, by both."""
    seen = report(SERVED, URGENT, TOO_LATE)
    assert seen.of() == [SERVED, URGENT, TOO_LATE]
    assert seen.of("completed") == [SERVED, URGENT]
    assert seen.of("expired", "refused") == [TOO_LATE]
    assert seen.of(priority=-1) == [URGENT]
    assert seen.of("expired", priority=-1) == []


def test_figures() -> None:
    """Goodput, percentiles of those that were served, and the longest wait of all."""
    seen = report(SERVED, URGENT, TOO_LATE)
    assert seen.goodput == 0.2
    assert (seen.latency(0.5), seen.latency(0.51), seen.latency(1.0)) == (1.0, 3.0, 3.0)
    assert seen.latency(0.0) == seen.latency(0.99, priority=-1) == 1.0
    assert (seen.longest_wait(), seen.longest_wait(priority=-1)) == (5.0, 0.5)


def test_nothing_happened() -> None:
    """An empty report says so, and divides by nothing."""
    seen = report(duration=0.0)
    assert seen.goodput == seen.longest_wait() == 0.0
    assert math.isnan(seen.latency(0.99))
