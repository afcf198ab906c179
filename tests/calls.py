"""Calls without a runner, and ports that remember what was posted to them."""

from __future__ import annotations

from contextvars import copy_context
from typing import Any

from asgi_infer._call import Call, Port


class RecordingPort:
    """A port of nobody: it keeps what is posted, in order."""

    def __init__(self) -> None:
        self.posted: list[Any] = []

    def post(self, waiter: Any, /) -> None:
        self.posted.append(waiter)


def make_call(
    func: Any = len,
    *args: Any,
    deadline: float | None = None,
    priority: int = 0,
    port: Port | None = None,
    waiter: Any = None,
) -> Call:
    """A call as a runner would make it."""
    port = RecordingPort() if port is None else port
    return Call((func, args), copy_context(), deadline, priority, port, waiter)
