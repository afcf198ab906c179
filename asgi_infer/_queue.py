"""The waiting line: bounded, by priority, first come first served within one.

A plain data structure. It has no lock and no clock; whoever owns it brings both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from ._call import Call


class CallQueue:
    """Up to ``max_size`` calls, taken in order of priority (lower first), then of arrival.

    One ordered dictionary (a "lane") for each priority in use: adding a call, taking the next
    and removing any are all O(1) in the number of calls.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._lanes: dict[int, OrderedDict[Call, None]] = {}  # in order of priority
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Call]:
        for lane in self._lanes.values():
            yield from lane

    @property
    def full(self) -> bool:
        """Whether another call must be refused."""
        return self._size >= self._max_size

    def push(self, call: Call) -> None:
        """Put ``call`` behind the others of its priority. The owner has asked ``full`` first."""
        lane = self._lanes.get(call.priority)
        if lane is None:
            lane = self._open_lane(call.priority)
        lane[call] = None
        self._size += 1

    def pop(self) -> Call | None:
        """Take the next call; None if there is none."""
        for lane in self._lanes.values():
            if lane:
                self._size -= 1
                return lane.popitem(last=False)[0]
        return None

    def remove(self, call: Call) -> None:
        """Take ``call`` out, wherever it stands."""
        del self._lanes[call.priority][call]
        self._size -= 1

    def remove_expired(self, now: float) -> list[Call]:
        """Take out, and return, every call whose deadline has passed."""
        expired = [c for c in self if c.deadline is not None and c.deadline <= now]
        for call in expired:
            self.remove(call)
        return expired

    def clear(self) -> list[Call]:
        """Take out everything, in order."""
        calls = list(self)
        self._lanes.clear()
        self._size = 0
        return calls

    def ahead_of(self, priority: int) -> int:
        """How many calls would run before a new one of ``priority``."""
        return sum(len(lane) for p, lane in self._lanes.items() if p <= priority)

    def _open_lane(self, priority: int) -> OrderedDict[Call, None]:
        # The empty lanes go now, and not when they empty: the usual case is one lane that
        # empties and fills all the time. Priorities come from users, so that they must go.
        lanes = {p: lane for p, lane in self._lanes.items() if lane}
        lanes[priority] = OrderedDict()
        self._lanes = dict(sorted(lanes.items()))
        return self._lanes[priority]
