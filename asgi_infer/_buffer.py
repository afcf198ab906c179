"""The items of a stream on their way from the inference thread to whoever consumes them.

One thread puts, one task takes. Between two items neither has to take a lock: a waiting consumer
is woken through its event loop, as the callers of calls are, and a waiting thread by a latch.

Guarantees
    * Items come out in the order in which they were put in. Never more than ``size`` wait, if the
      thread asks for room first.
    * A consumer that waits is woken by the next item, and when the buffer is closed.
    * A thread that waits for room is woken when there is some, and when the buffer is closed.
    * Closing takes no lock: the garbage collector may do it in the middle of anything.

Assumptions
    * ``deque.append``, ``deque.pop`` and ``deque.popleft`` are atomic.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from typing import Any

from ._call import Call, CallState, Port, Work


class StreamBuffer:
    """A bounded buffer with one producer and one consumer. For its call, it is the port as well.

    :param size: how many items may wait
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._items: deque[Any] = deque()  # the thread appends, the consumer pops
        # The consumer, if it waits. Whoever gets it out of there wakes it, so that nobody can
        # take one for another; a new one pushes out the old, for which nobody waits any more.
        self._waiting: deque[tuple[Port, Any]] = deque(maxlen=1)
        self._closed = False  # only ever set
        self._blocked = False  # the thread waits for room, or is about to
        # The latch: the thread waits in acquire(), and release() lets it through, once. One that
        # was let through in vain asks again.
        self._room = threading.Lock()
        self._room.acquire()

    # -- for the inference thread --------------------------------------------------------------

    def put(self, item: Any) -> None:
        """Add an item, whether or not there is room for it; nothing once it is closed."""
        if not self._closed:
            self._items.append(item)
            self.post()

    @property
    def full(self) -> bool:
        """Whether the thread is to wait before it makes another item."""
        return len(self._items) >= self.size and not self._closed

    @property
    def half_empty(self) -> bool:
        """Whether there is room for so many items that it is worth while to wake the thread."""
        return len(self._items) <= self.size // 2

    def wait_for_room(self, timeout: float | None) -> bool:
        """Wait until the buffer is half empty, or closed; False if it is still full in the end.

        :param timeout: seconds
        """
        # In this order: a consumer that makes room after the question finds the flag.
        self._blocked = True
        while self.full:
            if not self._room.acquire(timeout=-1 if timeout is None else timeout):
                break
        self._blocked = False
        return not self.full

    # -- for the consumer ----------------------------------------------------------------------

    def __bool__(self) -> bool:
        return bool(self._items)

    def take(self) -> Any:
        """Take the next item out. There is one."""
        item = self._items.popleft()
        if self._blocked and self.half_empty:
            self._let_through()
        return item

    def clear(self) -> None:
        """Drop what was not taken."""
        self._items.clear()

    def wait_with(self, waiter: Any, port: Port) -> None:
        """From now on whatever happens wakes ``waiter``, once. Look again before you wait."""
        self._waiting.append((port, waiter))

    # -- for everybody -------------------------------------------------------------------------

    def close(self) -> None:
        """Nobody takes items any more: wake who waits, the thread and the consumer."""
        self._closed = True
        self._let_through()
        self.post()

    def _let_through(self) -> None:
        with suppress(RuntimeError):  # it has been, and the thread has not come by yet
            self._room.release()

    # -- as a port -----------------------------------------------------------------------------

    def post(self, waiter: Any = None, /) -> None:
        """Wake the consumer, if it waits. From any thread; never raises, never blocks."""
        del waiter  # the one of the call, which is none: a consumer waits more than once
        try:
            port, waiting = self._waiting.pop()
        except IndexError:  # it does not, or somebody else wakes it
            return
        port.post(waiting)

    def call_soon_threadsafe(self, func: Callable[[], object], /) -> bool:
        """A stream may have no loop yet, or have another one by then."""
        del func
        return False

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

    @property
    def group(self) -> object:
        """Who waits for one that lets others run waits for one item, else for all of them."""
        return "item" if self.interleave else "stream"

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
    def fate(self) -> str:
        """What becomes of it when its time is up: see ``Call.fate``."""
        return "its generator will be closed at the next step"

    def patience(self, now: float) -> float | None:
        """Seconds that its buffer may stay full from ``now`` on; None if there is no limit."""
        if self.deadline is None:
            return self.stall_timeout
        left = max(0.0, self.deadline - now)
        return left if self.stall_timeout is None else min(left, self.stall_timeout)

    @property
    def over(self) -> bool:
        """Whether no more items are going to come."""
        return self.state in (CallState.FINISHED, CallState.DROPPED)
