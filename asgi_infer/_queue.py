"""The waiting line: bounded, by priority with ageing, first come first served within one.

A plain data structure. It has no lock and no clock; whoever owns it brings both.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from ._call import Call, Work


class _Lane(OrderedDict[Call, None]):
    """The calls of one priority, in order of arrival.

    :ivar groups: how many there are of each group, for those that have one
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: dict[object, int] = {}

    def note(self, call: Call, step: int) -> None:
        """A call of a group has come (1) or gone (-1)."""
        count = self.groups.get(call.group, 0) + step
        if count:
            self.groups[call.group] = count
        else:
            del self.groups[call.group]


class CallQueue:
    """Up to ``max_size`` calls, taken in order of priority (lower first), then of arrival.

    Priorities age: a call of priority ``p`` stands in line as if it had come ``p * ageing``
    seconds later. So the order between two waiting calls never changes, and a call can be
    overtaken only by what comes in the next ``(p - q) * ageing`` seconds, with the lower
    priority ``q``. It waits no longer than that, and than a full queue takes after it.

    One ordered dictionary (a "lane") for each priority in use: adding a call, taking the next
    and removing any are all O(1) in the number of calls.

    :param max_size: calls
    :param max_bytes: of the calls' arguments; one call may be larger if it waits alone
    :param ageing: seconds that one step of priority is worth
    :ivar size: how many calls there are
    :ivar bytes: what their arguments hold
    """

    def __init__(
        self, max_size: int, *, max_bytes: int | None = None, ageing: float = 1.0
    ) -> None:
        self.max_size = max_size
        self._max_bytes = max_bytes
        self._ageing = float(ageing)  # of an integer the products would be any size
        self._lanes: dict[int, _Lane] = {}  # in order of priority
        self.size = 0
        self.bytes = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Call]:
        """All of them: by priority, then by arrival."""
        for lane in self._lanes.values():
            yield from lane

    @property
    def full(self) -> bool:
        """Whether any other call must be refused."""
        return self.size >= self.max_size

    def too_small_for(self, call: Call) -> bool:
        """Whether ``call`` must be refused."""
        return not self._has_room_beside(self.size, self.bytes, call)

    def _has_room_beside(self, size: int, waiting: int, call: Call) -> bool:
        if size >= self.max_size:
            return False
        return not size or self._max_bytes is None or waiting + call.size <= self._max_bytes

    def oldest_that_make_room_for(self, call: Call) -> list[Call]:
        """Those with time limits that came first, of its priority or a later one, and as many as
        it takes; none if all of them would not do.
        """
        oldest: list[Call] = []
        size, waiting = self.size, self.bytes
        for other in sorted(self, key=lambda other: other.arrived):
            if self._has_room_beside(size, waiting, call):
                break
            if other.deadline is not None and other.priority >= call.priority:
                oldest.append(other)
                size, waiting = size - 1, waiting - other.size
        return oldest if self._has_room_beside(size, waiting, call) else []

    def push(self, call: Call) -> None:
        """Put ``call`` behind the others of its priority. The owner has asked for room first."""
        lane = self._lanes.get(call.priority)
        if lane is None:
            lane = self._open_lane(call.priority)
        lane[call] = None
        self.size += 1
        self.bytes += call.size
        if type(call) is not Call:
            lane.note(call, 1)

    def first(self) -> Call | None:
        """The call that is next; None if there is none."""
        first: Call | None = None
        due = 0.0
        for priority, lane in self._lanes.items():
            if lane:
                call = next(iter(lane))
                if self.size == len(lane):
                    return call  # the usual case: one lane in use
                turn = call.arrived + priority * self._ageing
                if first is None or turn < due:
                    first, due = call, turn
        return first

    def in_order(self) -> Iterator[Call]:
        """All of them, in the order in which they would be taken."""
        lanes = [lane for lane in self._lanes.values() if lane]
        if len(lanes) < 2:
            return iter(self)
        return heapq.merge(*lanes, key=lambda call: call.arrived + call.priority * self._ageing)

    def newest_first(self) -> Iterator[Call]:
        """All of them: by priority, then those first that came last."""
        for lane in self._lanes.values():
            yield from reversed(lane)

    def newest(self) -> Call | None:
        """The one that came last, of the lowest priority number in use; None if there is none."""
        return next(self.newest_first(), None)

    def remove(self, call: Call) -> None:
        """Take ``call`` out, wherever it stands."""
        lane = self._lanes[call.priority]
        del lane[call]
        self.size -= 1
        self.bytes -= call.size
        if type(call) is not Call:
            lane.note(call, -1)

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
        self.size = self.bytes = 0
        return calls

    def ahead_of(self, priority: int, now: float) -> dict[object, int]:
        """How many calls would run before one of ``priority`` that came now, for each group."""
        ahead: dict[object, int] = {}
        for other, lane in self._lanes.items():
            if other <= priority:
                groups = {None: len(lane) - sum(lane.groups.values()), **lane.groups}
            else:
                groups = _count(self._older(lane, now - (other - priority) * self._ageing))
            for group, count in groups.items():
                ahead[group] = ahead.get(group, 0) + count
        return ahead

    def count_of(self, group: object) -> int:
        """How many calls of a group wait."""
        return sum(lane.groups.get(group, 0) for lane in self._lanes.values())

    def _older(self, lane: _Lane, time: float) -> Iterator[Call]:
        for call in lane:
            if call.arrived > time:
                return
            yield call

    def _open_lane(self, priority: int) -> _Lane:
        # The empty lanes go now, and not when they empty: the usual case is one lane that
        # empties and fills all the time. Priorities come from users, so that they must go.
        lanes = {p: lane for p, lane in self._lanes.items() if lane}
        lanes[priority] = _Lane()
        self._lanes = dict(sorted(lanes.items()))
        return self._lanes[priority]


def _count(calls: Iterable[Call]) -> dict[object, int]:
    groups: dict[object, int] = {}
    for call in calls:
        groups[call.group] = groups.get(call.group, 0) + 1
    return groups


def size_of(work: Work) -> int:
    """Bytes in the arguments of a call: of arrays, tensors and other buffers, one level deep.

    What else is in them is small beside these, and counts as nothing.
    """
    func, args = work
    values = list(args)
    while isinstance(func, partial):
        values += [*func.args, *func.keywords.values()]
        func = func.func
    return sum(map(_size_of_argument, values))


def _size_of_argument(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(map(_size_of_buffer, value))
    if isinstance(value, dict):
        return sum(map(_size_of_buffer, value.values()))
    return _size_of_buffer(value)


def _size_of_buffer(value: Any) -> int:
    if isinstance(value, bytes | bytearray | str):
        return len(value)
    size = getattr(value, "nbytes", 0)
    return size if isinstance(size, int) else 0
