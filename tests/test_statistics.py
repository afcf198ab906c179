"""The snapshot and the counters behind it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict, fields
from typing import Any

import pytest

from asgi_infer._statistics import Counters, RunnerStatistics, Usage, expectation, moving_average

KEPT = asdict(Counters(submitted=3)) | asdict(Usage(cores_used=1.5))
del KEPT["said"]  # the one thing in there that is no figure
OTHER: dict[str, Any] = {"queued": 3, "queued_bytes": 0, "overloaded": False, "state": "ready"}
SNAPSHOT = RunnerStatistics(**OTHER, **KEPT)


def test_snapshot_is_frozen() -> None:
    """A snapshot can't be changed, so it may be handed to anybody."""
    with pytest.raises(FrozenInstanceError):
        SNAPSHOT.submitted = 4  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # the point


def test_counters_start_at_zero() -> None:
    """A new runner has done nothing."""
    assert not any(asdict(Counters()).values())
    assert {value for key, value in asdict(Usage()).items() if key != "said"} == {0}


def test_snapshot_has_every_counter() -> None:
    """No counter is kept that users can't see; the snapshot adds the queue and the state."""
    shown = {field.name for field in fields(RunnerStatistics)}
    kept = {field.name for field in (*fields(Counters), *fields(Usage))}
    assert shown - kept == set(OTHER)
    assert kept - shown == {"said"}


def test_snapshots_compare_by_value() -> None:
    """Two snapshots of the same figures are equal."""
    assert RunnerStatistics(**OTHER, **KEPT) == SNAPSHOT


def test_moving_average() -> None:
    """The first value counts whole, and each later one an eighth."""
    assert moving_average(0.0, 8.0) == 8.0
    assert moving_average(8.0, 16.0) == 9.0
    assert moving_average(8.0, 0.0) == 7.0


def test_one_slow_value_is_not_expected_again() -> None:
    """It counts for no more than four usual ones."""
    assert expectation(1.0, 100.0) == moving_average(1.0, 4.0)


def test_many_slow_values_are_expected() -> None:
    """If they go on, so does the expectation."""
    expected = 1.0
    for _ in range(40):
        expected = expectation(expected, 100.0)
    assert 80 < expected <= 100


def test_fast_values_are_expected_soon() -> None:
    """After a slow spell it takes a few calls, and not dozens."""
    expected = 0.8
    for _ in range(6):
        expected = expectation(expected, 0.01)
    assert expected < 0.025


def test_first_value_is_expected() -> None:
    """The first one counts whole, as in the average; what jitters is averaged."""
    assert expectation(0.0, 3.0) == 3.0
    assert expectation(8.0, 16.0) == 9.0
    assert expectation(8.0, 4.0) == 7.5
