"""Facts about loops of calls: how often, for how long, and what is noted."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from asgi_infer.doctor import _calls


@pytest.fixture
def calls_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Callable[[], None]]:
    """Calls that take so many seconds each, on a clock that else stands still."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def make(seconds: float) -> Callable[[], None]:
        def call() -> None:
            now[0] += seconds

        return call

    return make


def test_calls_for_a_time(calls_of: Callable[[float], Callable[[], None]]) -> None:
    """Calls are made until the time is up, and the last one counts in full."""
    assert _calls.repeat(calls_of(0.25), 0.9) == (1.0, [0.25] * 4)


def test_a_few_long_calls(calls_of: Callable[[float], Callable[[], None]]) -> None:
    """A call that takes longer than the time is still made a few times."""
    assert _calls.repeat(calls_of(4.0), 1.0) == (12.0, [4.0] * 3)


def test_very_many_calls(
    calls_of: Callable[[float], Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More calls than tell anything new are not made."""
    monkeypatch.setattr(_calls, "MOST_CALLS", 10)
    assert _calls.repeat(calls_of(0.5), 100.0) == (5.0, [0.5] * 10)


@pytest.mark.parametrize(("seconds", "times"), [(1.0, 2), (0.0625, 4), (0.0, 10)])
def test_warm_up(
    calls_of: Callable[[float], Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    times: int,
) -> None:
    """Two calls at the least, then as many as a moment holds, and never too many."""
    monkeypatch.setattr(_calls, "MOST_CALLS", 10)
    call, made = calls_of(seconds), itertools.count()
    _calls.warm_up(lambda: (call(), next(made)))
    assert next(made) == times
