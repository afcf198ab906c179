"""Gates: functions that a test holds open, so that nothing has to sleep and hope."""

from __future__ import annotations

import threading
from typing import TypeVar

import anyio.to_thread

T = TypeVar("T")

LIMIT = 10.0
"""Seconds after which something that should have happened at once counts as hung."""


class Gate:
    """A function to run as a call: it tells that it was entered, then waits to be released.

    ::

        future = runner.submit(gate, "result")
        gate.wait_entered()             # it runs, and holds the inference thread
        gate.release.set()              # now it may return "result"

    :ivar entered: set when the function begins
    :ivar release: to be set by the test; the ``gate`` fixtures set it when a test ends
    :ivar entries: how often the function has been called
    :ivar thread_ids: on which threads (``threading.get_ident``), in order
    """

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()
        self.thread_ids: list[int] = []

    def __call__(self, result: T) -> T:
        self.thread_ids.append(threading.get_ident())
        self.entered.set()
        if not self.release.wait(LIMIT):
            raise TimeoutError("nobody released the gate")
        return result

    @property
    def entries(self) -> int:
        return len(self.thread_ids)

    def wait_entered(self) -> None:
        """Block until the function runs. Not on an event loop that it needs."""
        if not self.entered.wait(LIMIT):
            raise TimeoutError("nobody entered the gate")

    async def entered_async(self) -> None:
        """Wait, on any event loop, until the function runs."""
        await wait_event(self.entered)


async def wait_event(event: threading.Event) -> None:
    """Wait, on any event loop, for a ``threading.Event``; no longer than ``LIMIT``."""
    if not await anyio.to_thread.run_sync(event.wait, LIMIT, abandon_on_cancel=True):
        raise TimeoutError("the event was not set")
