"""Streams that have begun and let other calls run between two of their items."""

from __future__ import annotations

from collections import deque

from ._buffer import StreamCall


class Suspended:
    """Those that are ready for their next turn, in order, and those whose buffers are full.

    No lock and no clock of its own; the scheduler brings both.
    """

    def __init__(self) -> None:
        self._ready: deque[StreamCall] = deque()
        self._parked: dict[StreamCall, float] = {}  # and when they count as stalled, or infinity

    def __len__(self) -> int:
        return len(self._ready) + len(self._parked)

    @property
    def ready(self) -> bool:
        """Whether one may have its turn now."""
        return bool(self._ready)

    def calls(self) -> list[StreamCall]:
        """All of them."""
        return [*self._ready, *self._parked]

    def add(self, call: StreamCall, now: float) -> None:
        """``call`` has had its turn."""
        call.parked = True
        # In this order: a consumer that makes room after the question finds the flag.
        if call.buffer.full:
            timeout = call.stall_timeout
            self._parked[call] = float("inf") if timeout is None else now + timeout
        else:
            call.parked = False
            self._ready.append(call)

    def resume(self, call: StreamCall) -> bool:
        """There is room in its buffer, or nobody takes from it; return whether that was news."""
        if self._parked.pop(call, None) is None:
            return False
        call.parked = False
        self._ready.append(call)
        return True

    def next(self) -> StreamCall:
        """The one whose turn it is."""
        return self._ready.popleft()

    def stalled(self, now: float) -> list[StreamCall]:
        """Those that nobody has taken from for too long."""
        return [call for call, limit in self._parked.items() if limit <= now]

    @property
    def next_stall(self) -> float:
        """When the first of them counts as stalled; infinity if none ever does."""
        return min(self._parked.values(), default=float("inf"))
