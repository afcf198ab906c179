"""Fixtures for pytest, for whoever asks for them in a ``conftest.py``.

::

    pytest_plugins = ["asgi_infer.testing.fixtures"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import pytest

from .._runner import InferenceRunner
from ._clock import VirtualClock
from ._inline import InlineRunner, run_inline

__all__ = ["Inline", "inline"]


class Inline(Protocol):
    """What the fixture ``inline`` is: ``run_inline`` that lasts for the test."""

    def __call__(
        self,
        runner: InferenceRunner[Any],
        load: Callable[[], object] | None = None,
        *,
        clock: VirtualClock | None = None,
    ) -> InlineRunner[Any]:
        """Make ``runner`` inline until the test ends. See ``run_inline``."""
        ...


@pytest.fixture
def inline() -> Iterator[Inline]:
    """Makes runners inline, for as long as the test lasts.

    ::

        def test_a_full_queue(inline):
            with inline(app_module.runner, FakeModel).full():
                ...
    """
    with ExitStack() as stack:

        def make_inline(
            runner: InferenceRunner[Any],
            load: Callable[[], object] | None = None,
            *,
            clock: VirtualClock | None = None,
        ) -> InlineRunner[Any]:
            return stack.enter_context(run_inline(runner, load, clock=clock))

        yield make_inline
