"""The fixtures for pytest."""

from __future__ import annotations

from asgi_infer import InferenceRunner
from asgi_infer.testing import Inline, InlineRunner, VirtualClock

from .test_inline import Fake, Model

pytest_plugins = ["asgi_infer.testing.fixtures"]

RUNNER = InferenceRunner(Model)


def test_inline(inline: Inline) -> None:
    """The fixture makes runners inline."""
    clock = VirtualClock()
    runner = inline(RUNNER, Fake, clock=clock)
    assert runner is RUNNER
    assert runner.clock is clock
    assert RUNNER.submit(RUNNER.model.double, 1).result() == -1
    assert inline(InferenceRunner(Model)).submit(len, "abc").result() == 3


def test_after_inline() -> None:
    """When a test ends, its runners are what they were."""
    assert not isinstance(RUNNER, InlineRunner)
    assert RUNNER.statistics().state == "new"
