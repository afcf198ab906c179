"""The snapshot and the counters behind it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from asgi_infer._statistics import Counters, RunnerStatistics

SNAPSHOT = RunnerStatistics(queued=3, state="ready", **asdict(Counters(submitted=3)))


def test_snapshot_is_frozen() -> None:
    """A snapshot can't be changed, so it may be handed to anybody."""
    with pytest.raises(FrozenInstanceError):
        SNAPSHOT.submitted = 4  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # the point


def test_counters_start_at_zero() -> None:
    """A new runner has done nothing."""
    assert set(asdict(Counters()).values()) == {0}


def test_snapshot_has_every_counter() -> None:
    """No counter is kept that users can't see; the snapshot adds the queue and the state."""
    shown = {field.name for field in fields(RunnerStatistics)}
    kept = {field.name for field in fields(Counters)}
    assert shown - kept == {"queued", "state"}
    assert kept < shown


def test_snapshots_compare_by_value() -> None:
    """Two snapshots of the same figures are equal."""
    same = RunnerStatistics(queued=3, state="ready", **asdict(Counters(submitted=3)))
    assert same == SNAPSHOT
