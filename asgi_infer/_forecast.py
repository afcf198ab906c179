"""How long calls are going to take, as far as the latest ones tell, and to wait for that."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ._batch import BatchCall, BatchGroup
from ._call import Call
from ._queue import CallQueue
from ._slot import Slot
from ._statistics import expectation, moving_average


class Forecast:
    """What is expected of the next call of each kind. Guarded by the scheduler's lock."""

    def __init__(self) -> None:
        # In seconds:
        self._call = 0.0  # one that is no batch's
        self._stream = 0.0  # a stream that holds its thread
        self._item = 0.0  # one item of a stream that lets others run

    def learn(self, group: object, seconds: float) -> None:
        """A call of ``group`` has run for so long; batches keep account of themselves."""
        if group is None:
            self._call = expectation(self._call, seconds)
        elif group == "stream":
            self._stream = expectation(self._stream, seconds)

    def learn_item(self, seconds: float) -> None:
        """An item of a stream that lets others run has taken so long."""
        self._item = moving_average(self._item, seconds)

    def seconds(self, group: object, count: int) -> float:
        """What ``count`` calls of ``group`` are going to take: see ``Call.group``."""
        if group is None:
            return count * self._call
        if isinstance(group, BatchGroup):
            return group.function.seconds(count)
        return count * (self._stream if group == "stream" else self._item)

    def next_end(self, slots: Sequence[Slot], now: float) -> float:
        """Seconds until one of ``slots`` is free."""
        return min(self._left(slot, now) for slot in slots)

    def wait(self, call: Call, queue: CallQueue, slots: Sequence[Slot]) -> float:
        """Seconds until ``call``, which has just come, has its turn in one of ``slots``."""
        left = [self._left(slot, call.arrived) for slot in slots]
        suspended = any(slot.suspended.ready for slot in slots)
        return _shared_out(self._ahead(call, queue, suspended=suspended), left)

    def _ahead(self, call: Call, queue: CallQueue, *, suspended: bool) -> float:
        """The seconds that those take which wait, and are to run before ``call``."""
        seconds = 0.0
        for group, count in queue.ahead_of(call.priority, call.arrived).items():
            if isinstance(group, BatchGroup) and group == call.group:
                # The rest it joins, and that one runs the longer for it.
                rest = count % group.function.max_size
                seconds += rest * group.function.cost.each
                count -= rest
            seconds += self.seconds(group, count)
            if suspended:  # they have a turn after each
                seconds += count * self._item
        return seconds

    def _left(self, slot: Slot, now: float) -> float:
        """The seconds that who runs in ``slot`` still takes, as far as that can be told."""
        running = slot.running
        if running is None:
            return 0.0
        size = len(running.members) if type(running) is BatchCall else 1
        return max(0.0, self.seconds(running.group, size) - (now - slot.turn_began))


def _shared_out(work: float, left: list[float]) -> float:
    """When there is a slot for what comes next: seconds.

    As water fills a vessel with steps, ``work`` goes to the slots that are free first.

    :param work: seconds that those ahead take, in one slot after the other
    :param left: for how long each slot is taken already
    """
    level = math.inf
    for count, seconds in enumerate(sorted(left), start=1):
        work += seconds
        level = min(level, work / count)
    return level
