"""Streams without a runner, and generators that tell what happens to them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

from asgi_infer._buffer import StreamBuffer, StreamCall

from .gates import LIMIT


def make_stream_call(
    func: Any = iter,
    *args: Any,
    buffer: int = 2,
    stall_timeout: float | None = 10.0,
    interleave: bool = True,
    deadline: float | None = None,
    priority: int = 0,
) -> StreamCall:
    """A stream's call as a runner would make it."""
    return StreamCall(
        (func, args),
        copy_context(),
        deadline,
        priority,
        buffer=StreamBuffer(buffer),
        stall_timeout=stall_timeout,
        interleave=interleave,
    )


class Source:
    """A generator function; it tells how far it has come, and what has ended it where.

    :param count: how many items there are, from 0 on
    :ivar made: how many have been made
    :ivar closed: set when its ``finally`` block has run
    :ivar thread_ids: on which threads (``threading.get_ident``) it was stepped and closed
    :ivar gates: item n is made only when ``gates[n]`` is set, if there is one
    :ivar reached: the same the other way round: set when item n is about to be made
    """

    def __init__(self, count: int = 10**6) -> None:
        self.count = count
        self.made = 0
        self.closed = threading.Event()
        self.thread_ids: list[int] = []
        self.gates: dict[int, threading.Event] = {}
        self.reached: dict[int, threading.Event] = {}

    def hold(self, number: int) -> threading.Event:
        """Hold the generator before item ``number``; return what says that it is there."""
        self.gates[number] = threading.Event()
        self.reached[number] = threading.Event()
        return self.reached[number]

    def release(self) -> None:
        """Hold it no more."""
        for gate in self.gates.values():
            gate.set()

    def __call__(self) -> Iterator[int]:
        try:
            for number in range(self.count):
                self.thread_ids.append(threading.get_ident())
                if number in self.gates:
                    self.reached[number].set()
                    if not self.gates[number].wait(LIMIT):
                        raise TimeoutError("nobody released the generator")
                self.made += 1
                yield number
        finally:
            self.thread_ids.append(threading.get_ident())
            self.closed.set()
