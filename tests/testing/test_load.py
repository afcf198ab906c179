"""Ready-made loads."""

from __future__ import annotations

from asgi_infer.testing import Request, burst, poisson, steady

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
