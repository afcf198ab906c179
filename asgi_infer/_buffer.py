"""The items of a stream on their way from the inference thread to whoever consumes them.

One thread puts, one task takes. Between two items neither has to take a lock: a waiting consumer
is woken through its event loop, as the callers of calls are, and a waiting thread by an event.

Guarantees
    * Items come out in the order in which they were put in, and never more than ``size`` wait.
    * A thread that waits for room is woken when there is some, and when nobody will take any more.

Assumptions
    * ``deque.append`` and ``deque.popleft`` are atomic.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any

from ._call import Call, CallState, Port, Work


class StreamBuffer:
    """A bounded buffer with one producer and one consumer. For its call, it is the port as well.

    :param size: how many items may wait
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[Any] = deque()  # the thread appends, the consumer pops
        self._port: Port | None = None  # set once, when the consumer waits for the first time
        self._waiter: Any = None  # the consumer's; whoever finds it there wakes it
        self._closed = False  # only ever set
        self._blocked = False  # the thread waits for room, or is about to
        self._room = threading.Event()

    # -- for the inference thread --------------------------------------------------------------

    def put(self, item: Any) -> None:
        """Add an item, whether or not there is room for it."""
        self._items.append(item)
        self.post()

    @property
    def full(self) -> bool:
        """Whether the thread is to wait before it makes another item."""
        return len(self._items) >= self._size and not self._closed

    def wait_for_room(self, timeout: float | None) -> bool:
        """Wait until half of the buffer is free, or it is closed; False if that takes too long."""
        self._room.clear()
        # In this order: a consumer that makes room after the question finds the flag.
        self._blocked = True
        there_is = not self.full or self._room.wait(timeout)
        self._blocked = False
        return there_is

    def close(self) -> None:
        """Nobody takes items any more: the thread does not wait for room. From any thread."""
        self._closed = True
        self._room.set()

    # -- for the consumer ----------------------------------------------------------------------

    def __bool__(self) -> bool:
        return bool(self._items)

    def take(self) -> Any:
        """Take the next item out. There is one."""
        item = self._items.popleft()
        if self._blocked and len(self._items) <= self._size // 2:
            self._room.set()
        return item

    def clear(self) -> None:
        """Drop what was not taken."""
        self._items.clear()

    def wait_with(self, waiter: Any, port: Port) -> None:
        """From now on whatever happens wakes ``waiter``, once. Look again before you wait."""
        self._port = port
        self._waiter = waiter

    # -- as a port -----------------------------------------------------------------------------

    def post(self, waiter: Any = None, /) -> None:
        """Wake the consumer, if it waits. From any thread; never raises, never blocks."""
        del waiter  # the one of the call, which is none: a consumer waits more than once
        waiting, self._waiter = self._waiter, None
        if waiting is not None and self._port is not None:
            self._port.post(waiting)

    def call_soon_threadsafe(self, func: Callable[[], object], /) -> bool:
        """Call ``func`` on the consumer's loop; False if that is not known, or has ended."""
        return self._port is not None and self._port.call_soon_threadsafe(func)

    def call_later(self, delay: float, func: Callable[[], object], /) -> Callable[[], object]:
        """Nobody asks a stream for that."""
        raise NotImplementedError


class StreamCall(Call):
    """A generator that is stepped on the inference thread.

    :ivar steps: the generator, once it has begun; the inference thread's own
    :ivar parked: it is put aside because its buffer is full; written under the
        scheduler's lock, read without it by the consumer
    """

    __slots__ = ("buffer", "interleave", "parked", "stall_timeout", "steps")

    group = "stream"

    def __init__(
        self,
        work: Work,
        context: Context,
        deadline: float | None,
        priority: int,
        *,
        buffer: StreamBuffer,
        stall_timeout: float | None,
        interleave: bool,
    ) -> None:
        super().__init__(work, context, deadline, priority, buffer, None)
        self.buffer = buffer
        self.stall_timeout = stall_timeout
        self.interleave = interleave
        self.steps: Any = None
        self.parked = False

    @property
    def over(self) -> bool:
        """Whether no more items are going to come."""
        return self.state in (CallState.FINISHED, CallState.DROPPED)
