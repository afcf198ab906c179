"""Waiting for what sets no event: figures of another thread, and of another process."""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio
import anyio.lowlevel

from .gates import LIMIT

STEP = 0.0002


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until ``condition`` holds."""
    with anyio.fail_after(LIMIT):
        while not condition():  # noqa: ASYNC110  # there is no event for it
            await anyio.sleep(STEP)  # there is no event for it


def until_true(condition: Callable[[], bool], limit: float = LIMIT, step: float = STEP) -> None:
    """Block until ``condition`` holds."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it never came true")
        time.sleep(step)


async def some_turns() -> None:
    """Let other tasks do all that they can do at once."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()
