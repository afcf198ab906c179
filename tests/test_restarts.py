"""When a lost worker is started again: delays that grow, a bound, and a way back."""

from __future__ import annotations

import pytest

from asgi_infer._restarts import RestartPolicy, Restarts


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_delays_double_up_to_a_bound(clock: Clock) -> None:
    """At once after the first crash; then a little less than a delay that doubles."""
    policy = RestartPolicy(max_restarts=10, backoff=1.0, max_backoff=4.0)
    restarts = Restarts(policy, clock=clock)
    assert restarts.note() == 0.0
    for full in (1.0, 2.0, 4.0, 4.0):
        assert 0.75 * full <= restarts.note() <= full
    assert not restarts.broken


def test_any_number_of_crashes(clock: Clock) -> None:
    """A policy may bear thousands: the delay has a bound, and so has the arithmetic."""
    restarts = Restarts(RestartPolicy(max_restarts=5000), clock=clock)
    delays = [restarts.note() for _ in range(3000)]
    assert max(delays) <= 10.0
    assert restarts.crashes == 3000


def test_crashes_of_long_ago_are_forgotten(clock: Clock) -> None:
    """Those within the policy's time count."""
    restarts = Restarts(RestartPolicy(max_restarts=1, within=60.0), clock=clock)
    for _ in range(5):
        assert restarts.note() == 0.0
        assert restarts.crashes == 1
        clock.now += 60.1
    assert not restarts.broken


def test_too_many(clock: Clock) -> None:
    """One more than the policy bears: broken, until a start has succeeded."""
    policy = RestartPolicy(max_restarts=2, backoff=0.0, recover_after=30.0)
    restarts = Restarts(policy, clock=clock)
    assert [restarts.note(), restarts.note()] == [0.0, 0.0]
    for _ in range(2):
        assert restarts.note() == 30.0
        assert restarts.broken
    restarts.recovered()
    assert not restarts.broken
    clock.now += 61.0
    assert restarts.note() == 0.0


def test_one_chance_after_recovery(clock: Clock) -> None:
    """What crashes right after that is broken again."""
    restarts = Restarts(RestartPolicy(max_restarts=0, recover_after=30.0), clock=clock)
    assert restarts.note() == 30.0
    restarts.recovered()
    assert restarts.note() == 30.0
    assert restarts.broken


@pytest.mark.parametrize("name", ["within", "backoff", "max_backoff", "recover_after"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan"), "1"])
def test_seconds_that_make_no_sense(name: str, value: object) -> None:
    """They are refused where they are written."""
    options: dict[str, object] = {name: value}
    with pytest.raises(ValueError, match=name):
        RestartPolicy(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, 1.0, True])
def test_counts_that_make_no_sense(value: object) -> None:
    """So is a number of restarts."""
    with pytest.raises(ValueError, match="max_restarts"):
        RestartPolicy(max_restarts=value)  # type: ignore[arg-type]
