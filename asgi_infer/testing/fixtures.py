"""Fixtures for pytest, for whoever asks for them in a ``conftest.py``.

::

    pytest_plugins = ["asgi_infer.testing.fixtures"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from .._runner import InferenceRunner
from ._clock import VirtualClock
from ._inline import Inline, InlineRunner, run_inline

__all__ = ["inline"]


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
