"""Calls without a runner, and ports that remember what was posted to them."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any

from asgi_infer._batch import BatchCall, BatchFunction
from asgi_infer._call import Call, Port, Work
from asgi_infer._stacking import any_item, as_list, results


class RecordingPort:
    """A port of nobody: it keeps what is posted, and what is to be called, in order.

    :param ended: there is no loop any more
    """

    def __init__(self, *, ended: bool = False) -> None:
        self.posted: list[Any] = []
        self.to_call: list[Callable[[], object]] = []
        self._ended = ended

    def post(self, waiter: Any, /) -> None:
        self.posted.append(waiter)

    def call_soon_threadsafe(self, func: Callable[[], object], /) -> bool:
        if not self._ended:
            self.to_call.append(func)
        return not self._ended

    def call_later(self, delay: float, func: Callable[[], object], /) -> Callable[[], object]:
        self.to_call.append(func)
        return lambda: self.to_call.remove(func)

    def turn(self) -> None:
        """What a loop does at its next turn: call what is to be called, and what is due."""
        functions, self.to_call = self.to_call, []
        for function in functions:
            function()


def batch_function(
    func: Any = list, *, max_size: int = 8, max_delay: float = 0.0
) -> BatchFunction:
    """What a ``Batcher`` of lists has its calls made of."""
    return BatchFunction(
        func,
        max_size=max_size,
        max_delay=max_delay,
        key_of=any_item,
        join=as_list,
        split=results,
    )


def work_of(func: Any, *args: Any) -> tuple[Work, Context]:
    """What a worker gets of a call."""
    return (func, args), copy_context()


def make_call(
    func: Any = len,
    *args: Any,
    deadline: float | None = None,
    priority: int = 0,
    port: Port | None = None,
    waiter: Any = None,
    arrived: float = 0.0,
) -> Call:
    """A call as a runner would make it."""
    port = RecordingPort() if port is None else port
    kind = BatchCall if isinstance(func, BatchFunction) else Call
    call = kind((func, args), copy_context(), deadline, priority, port, waiter)
    call.arrived = arrived
    return call
