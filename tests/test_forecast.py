"""How long calls are expected to take, and to wait: on numbers alone."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st

from asgi_infer._forecast import Forecast, _shared_out
from asgi_infer._slot import Slot

from .calls import make_call


def test_each_kind_is_learned_apart() -> None:
    """Calls, streams that hold a thread, and items of others say nothing of one another."""
    forecast = Forecast()
    forecast.learn(None, 2.0)
    forecast.learn("stream", 30.0)
    forecast.learn("item", 99.0)  # of the whole stream: its items count one by one
    forecast.learn_item(0.5)
    groups: list[object] = [None, "stream", "item"]
    assert [forecast.seconds(group, 3) for group in groups] == [6.0, 90.0, 1.5]


def test_next_end() -> None:
    """The slot that is free first counts; one that has taken too long is free at any moment."""
    forecast, slots = Forecast(), [Slot(0), Slot(1)]
    forecast.learn(None, 4.0)
    for slot, began in zip(slots, (1.0, 2.0), strict=True):
        slot.running, slot.turn_began = make_call(), began
    assert forecast.next_end(slots, 3.0) == 2.0
    assert forecast.next_end(slots, 9.0) == 0.0


@pytest.mark.parametrize(
    ("work", "left", "level"),
    [
        (0.0, [3.0], 3.0),
        (4.0, [3.0], 7.0),
        (0.0, [3.0, 1.0], 1.0),
        (0.0, [3.0, 0.0], 0.0),
        (1.0, [3.0, 1.0], 2.0),
        (4.0, [3.0, 1.0], 4.0),
        (10.0, [100.0, 0.0], 10.0),
        (12.0, [1.0, 1.0, 1.0], 5.0),
    ],
)
def test_shared_out(work: float, left: list[float], level: float) -> None:
    """Who is free first takes what waits, and who is taken for long takes nothing of it."""
    assert _shared_out(work, left) == level


@hypothesis.given(
    st.floats(0, 100), st.lists(st.floats(0, 100), min_size=1, max_size=5), st.integers(0, 20)
)
@hypothesis.settings(max_examples=30)
def test_nobody_is_promised_too_little(service: float, left: list[float], ahead: int) -> None:
    """A call never has its turn later than predicted, if calls take what they are expected to."""
    free = sorted(left)
    for _ in range(ahead):
        free = sorted([free[0] + service, *free[1:]])
    predicted = _shared_out(ahead * service, left)
    assert free[0] <= predicted * (1 + 1e-9)
    assert predicted <= free[0] + service * (1 + 1e-9)
