"""Streams that have begun and let other calls run between two of their items."""

from __future__ import annotations

import math
from collections import deque

from ._buffer import StreamCall


class Suspended:
    """Those that are ready for their next turn, in order, and those whose buffers are full.

    No lock and no clock of its own; the scheduler brings both.

    :ivar count: how many there are
    """

    def __init__(self) -> None:
        self._ready: deque[StreamCall] = deque()
        self._parked: dict[StreamCall, float] = {}  # and for how long they may be
        self.count = 0  # kept, since it is asked for at every call

    @property
    def ready(self) -> bool:
        """Whether one may have its turn now."""
        return bool(self._ready)

    def calls(self) -> list[StreamCall]:
        """All of them."""
        return [*self._ready, *self._parked]

    def add(self, call: StreamCall, now: float) -> None:
        """``call`` has had its turn."""
        self.count += 1
        call.parked = True
        # In this order: a consumer that makes room after the question finds the flag.
        if call.buffer.full:
            patience = call.patience(now)
            self._parked[call] = math.inf if patience is None else now + patience
        else:
            call.parked = False
            self._ready.append(call)

    def resume(self, call: StreamCall) -> bool:
        """It is to have a turn again; return whether that is news."""
        if self._parked.pop(call, None) is None:
            return False
        call.parked = False
        self._ready.append(call)
        return True

    def next(self) -> StreamCall:
        """The one whose turn it is."""
        self.count -= 1
        return self._ready.popleft()

    def stalled(self, now: float) -> list[StreamCall]:
        """Those that nobody has taken from for too long.

        Others whose limit has passed get a turn: there is room again, or their deadline is over.
        """
        due = [call for call, limit in self._parked.items() if limit <= now]
        for call in due:
            if not call.buffer.full or call.given_up(now):
                self.resume(call)
        return [call for call in due if call.parked]

    @property
    def next_stall(self) -> float:
        """When to ask for those that are stalled; infinity if there is no need to."""
        return min(self._parked.values(), default=math.inf)
