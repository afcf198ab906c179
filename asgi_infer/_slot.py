"""One place where calls run, one at a time: what the scheduler keeps of one inference thread."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from ._batch import BatchCall
from ._call import Call
from ._suspended import Suspended


class Latch(Protocol):
    """What a thread sleeps on: a binary semaphore, as a ``threading.Lock`` is one."""

    def acquire(self, *, timeout: float = -1) -> bool:
        """Sleep until it is released; False if that has not happened in ``timeout`` seconds.

        One may let go for a reason of its own, too, and return False; but never one that has been
        released. The scheduler, who knows that it has, asks until it gets a True.
        """
        ...

    def release(self) -> None:
        """Let the one who sleeps, or is about to, through."""
        ...


class Slot:
    """The state of one inference thread's turns. Guarded by the scheduler's lock.

    :param number: of the replica whose thread this is
    :ivar running: has the slot; of a batch, the call that leads it
    :ivar suspended: streams that have begun here, and let others run between two items
    :ivar turn_began: when who runs was claimed
    :ivar stream_next: whose turn it is: a suspended stream's, or the queue's
    :ivar look_again: when the thread is to wake up by itself
    :ivar over: it is time for its thread to stop
    :ivar down: nothing can run here for now: the worker's model has gone
    :ivar broken: it has gone too often, and nothing is going to run here for some time
    :ivar woken: its thread was woken for a call, and has not come to look for one yet
    :ivar wake_up: what the thread sleeps on; set before it takes its first call
    :ivar notice: called with who runs here when its caller has left; set likewise
    """

    __slots__ = (
        "broken",
        "down",
        "look_again",
        "notice",
        "number",
        "over",
        "running",
        "stream_next",
        "suspended",
        "turn_began",
        "wake_up",
        "woken",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.running: Call | None = None
        self.suspended = Suspended()
        self.turn_began = 0.0
        self.stream_next = False
        self.look_again = math.inf
        self.over = False
        self.down = False
        self.broken = False
        self.woken = False
        self.wake_up: Latch = threading.Lock()
        self.wake_up.acquire()
        self.notice: Callable[[Call], None] | None = None

    def current(self) -> Call | None:
        """The call that runs; of a batch, the one that leads it. Without the lock, a hint."""
        return self.running

    def begun(self) -> list[Call]:
        """What has started here and not ended, the call that runs first."""
        running = self.running
        begun: Iterable[Call] = () if running is None else [running]
        if type(running) is BatchCall:
            begun = running.members or begun
        return [*begun, *self.suspended.calls()]
