"""Ready-made loads."""

from __future__ import annotations

import math
from typing import Any

import pytest

from asgi_infer.testing import Batching, Request, burst, poisson, steady

REQUEST = Request(at=10.0, seconds=0.2, priority=3)


def test_burst() -> None:
    """All at once."""
    assert burst(REQUEST, 3) == [REQUEST, REQUEST, REQUEST]


def test_steady() -> None:
    """Evenly spaced, from the request's own time on; else all alike."""
    requests = steady(REQUEST, rate=4.0, duration=1.0)
    assert [request.at for request in requests] == [10.0, 10.25, 10.5, 10.75]
    assert {request.priority for request in requests} == {3}


def test_poisson() -> None:
    """As many as the rate says, give or take; the same for the same seed, and in order."""
    requests = poisson(REQUEST, rate=20.0, duration=50.0)
    times = [request.at for request in requests]
    assert times == sorted(times)
    assert times[0] > 10.0
    assert times[-1] < 60.0
    assert 900 < len(requests) < 1100
    assert requests == poisson(REQUEST, rate=20.0, duration=50.0)
    assert requests != poisson(REQUEST, rate=20.0, duration=50.0, seed=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("at", "seconds", "pause") for value in (-1.0, math.nan)],
        *[(name, 0.0) for name in ("timeout", "patience", "stall_timeout")],
        *[(name, value) for name in ("size", "retries", "items") for value in (-1, 1.5)],
        ("priority", 0.5),
        ("buffer", 0),
    ],
)
def test_bad_requests(name: str, value: Any) -> None:
    """What no client could want is refused where it is written, and does not turn time back."""
    with pytest.raises(ValueError, match=f"{name} must be"):
        Request(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("max_size", 0), ("fixed", -0.1), ("each", math.nan), ("max_delay", -1)]
)
def test_bad_batching(name: str, value: Any) -> None:
    """Nor is there such a function."""
    with pytest.raises(ValueError, match=f"{name} must be"):
        Batching(**{name: value})


@pytest.mark.parametrize("make", [steady, poisson])
@pytest.mark.parametrize("rate", [0, -1.0, math.nan, math.inf])
def test_bad_rates(make: Any, rate: float) -> None:
    """A rate that would never come to an end, or to a start."""
    with pytest.raises(ValueError, match="rate must be a number of requests a second"):
        make(REQUEST, rate=rate, duration=1.0)
