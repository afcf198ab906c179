"""When a lost model is loaded again: on a clock of the tests' own."""

from __future__ import annotations

import math
import random
import threading
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from asgi_infer._restarts import NEVER, RestartPolicy, Restarts


class Crashing:
    """A worker that crashes when it is told to.

    :ivar now: what its clock says
    """

    def __init__(self, **options: Any) -> None:
        self.now = 1000.0
        self.restarts = Restarts(RestartPolicy(**options), clock=lambda: self.now)

    def crash(self, *, after: float = 0.0) -> float:
        self.now += after
        return self.restarts.note()


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No jitter."""
    monkeypatch.setattr(random, "uniform", lambda least, most: most)


@pytest.mark.usefixtures("exact")
def test_delays_double() -> None:
    """At once, then after the back-off, twice that, and so on up to the most."""
    crashing = Crashing(max_restarts=10, backoff=0.5, max_backoff=3.0)
    assert [crashing.crash() for _ in range(6)] == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0]
    assert not crashing.restarts.broken


def test_delays_differ() -> None:
    """Replicas that crash together do not come back together, nor later than promised."""
    delays = set()
    for _ in range(20):
        crashing = Crashing(backoff=1.0)
        crashing.crash()
        delays.add(crashing.crash())
    assert len(delays) == 20
    assert 0.75 <= min(delays) <= max(delays) <= 1.0


@pytest.mark.usefixtures("exact")
def test_old_crashes_are_forgotten() -> None:
    """Those longer ago than ``within`` count for nothing; exactly as long ago they still do."""
    crashing = Crashing(max_restarts=2, within=10.0, backoff=0.5)
    assert crashing.crash() == 0.0
    assert crashing.crash(after=10.0) == 0.5
    assert crashing.restarts.crashes == 2
    assert crashing.crash(after=10.1) == 0.0
    assert crashing.restarts.crashes == 1
    assert not crashing.restarts.broken


@pytest.mark.parametrize("most", [0, 1, 3])
def test_broken(most: int) -> None:
    """One crash more than is borne, and it waits for long; so it does after every failed start,
    however late, until one succeeds."""
    crashing = Crashing(max_restarts=most, within=10.0, recover_after=30.0)
    for _ in range(most):
        assert crashing.crash() < 30.0
        assert not crashing.restarts.broken
    for _ in range(3):
        assert crashing.crash(after=1.0) == 30.0
        assert crashing.restarts.broken
    assert crashing.crash(after=100.0) == 30.0
    crashing.restarts.recovered()
    assert not crashing.restarts.broken


def test_one_more_chance() -> None:
    """A worker that crashes again as soon as it has recovered is broken at once; one that does so
    much later starts afresh."""
    crashing = Crashing(max_restarts=2, within=10.0, recover_after=5.0)
    assert [crashing.crash() for _ in range(3)][-1] == 5.0
    crashing.restarts.recovered()
    assert crashing.crash(after=5.0) == 5.0
    crashing.restarts.recovered()
    assert crashing.crash(after=10.1) == 0.0


def test_what_is_never_lost() -> None:
    """Has no crashes, and is not broken."""
    assert (NEVER.crashes, NEVER.broken) == (0, False)


@hypothesis.given(
    st.integers(0, 6),
    st.lists(st.tuples(st.floats(0.0, 20.0), st.booleans()), max_size=40),
)
@hypothesis.settings(max_examples=30)
def test_whatever_happens(most: int, crashes: list[tuple[float, bool]]) -> None:
    """No wait is longer than the policy says, and broken is who has crashed too often lately."""
    crashing = Crashing(max_restarts=most, within=10.0, max_backoff=1.0, recover_after=7.0)
    times: list[float] = []
    broken = False
    for after, starts in crashes:
        delay = crashing.crash(after=after)
        times = [time for time in times if crashing.now - time <= 10.0] + [crashing.now]
        broken = broken or len(times) > most
        assert crashing.restarts.broken == broken
        assert crashing.restarts.crashes == len(times)
        assert delay == 7.0 if broken else 0.0 <= delay <= 1.0
        if starts:
            crashing.restarts.recovered()
            broken = False


# -- policies ----------------------------------------------------------------------------------


def test_thousands_of_crashes() -> None:
    """That a number doubles each time is no reason to end."""
    crashing = Crashing(max_restarts=5000, max_backoff=2.0)
    assert max(crashing.crash() for _ in range(3000)) <= 2.0
    assert Crashing(max_restarts=5000, backoff=0).crash() == 0.0


@pytest.mark.parametrize("value", [-1, 1.0, True, None, "5"])
def test_unfit_count(value: Any) -> None:
    """Not a number of restarts: refused where it is written."""
    with pytest.raises(ValueError, match="max_restarts must be 0 or more"):
        RestartPolicy(max_restarts=value)


SECONDS = ("within", "backoff", "max_backoff", "recover_after")


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, 10**400, 1e300, True, None, "1"])
def test_unfit_seconds(name: str, value: Any) -> None:
    """Not a time, or none that a thread can wait for."""
    with pytest.raises(ValueError, match=f"{name} must be a number of seconds"):
        RestartPolicy(**{name: value})


@pytest.mark.parametrize("value", [0, 0.0, 1, threading.TIMEOUT_MAX])
def test_fitting_seconds(value: float) -> None:
    """Nothing at all and all that a thread can wait for are times, too."""
    options: dict[str, Any] = dict.fromkeys(SECONDS, value)
    policy = RestartPolicy(**options)
    assert [getattr(policy, name) for name in SECONDS] == [value] * 4
    assert Restarts(policy).note() == 0.0
