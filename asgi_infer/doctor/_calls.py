"""Calls in a loop: to warm up, and to be measured."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST_CALLS = 100_000
"""More would fill memory and files with latencies that tell nothing new."""
FEWEST_CALLS = 3
_WARM_CALLS = 2
_WARM_SECONDS = 0.2


def warm_up(call: Callable[[], object]) -> None:
    """Call as often as it takes for the first calls to be over."""
    start, calls = time.perf_counter(), 0
    while calls < _WARM_CALLS or (
        time.perf_counter() - start < _WARM_SECONDS and calls < MOST_CALLS
    ):
        call()
        calls += 1


def repeat(call: Callable[[], object], limit: float) -> tuple[float, list[float]]:
    """Call for so many seconds, and a few times at the least; the seconds, and each call's."""
    latencies: list[float] = []
    clock = time.perf_counter
    start = before = clock()
    while len(latencies) < FEWEST_CALLS or (
        before - start < limit and len(latencies) < MOST_CALLS
    ):
        call()
        now = clock()
        latencies.append(now - before)
        before = now
    return before - start, latencies
