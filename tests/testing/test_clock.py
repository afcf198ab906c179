"""The virtual clock."""

from __future__ import annotations

import math

import pytest

from asgi_infer.testing import VirtualClock


def test_it_moves_when_it_is_told_to() -> None:
    """It starts at 0, or where it is told, and only goes forward."""
    clock = VirtualClock()
    assert clock() == 0.0
    clock.advance(2.5)
    clock.advance(0)
    assert clock() == clock.now == 2.5
    assert VirtualClock(7.0)() == 7.0


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, "1"])
def test_it_refuses_what_is_no_time(seconds: float) -> None:
    """Not back, not to the end of time."""
    with pytest.raises(ValueError, match="seconds must be"):
        VirtualClock().advance(seconds)
