"""One use of the model: claimed once by the inference thread, settled once for its caller."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from contextvars import Context, ContextVar
from typing import Any, Protocol

from ._errors import CallCancelled
from ._model import name_of

Work = tuple[Any, tuple[Any, ...]]
"""A function and its arguments."""


class CallState(enum.Enum):
    """Where a call is. Every step is taken under the scheduler's lock."""

    QUEUED = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()
    """The function has ended, and the outcome is on its way to the caller."""
    DROPPED = enum.auto()
    """Taken out of the queue: it never ran and never will."""


class Departure(enum.Enum):
    """Why a caller no longer waits. The values are the counters that the call adds to."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"
    SHED = "rejected"


class Port(Protocol):
    """The way back to the callers of one event loop (or to those that have none)."""

    def post(self, waiter: Any, /) -> None:
        """Wake the caller behind ``waiter``. From any thread; never raises, never blocks."""
        ...

    def call_soon_threadsafe(self, func: Callable[[], object], /) -> bool:
        """Call ``func`` on the loop, at its next turn; False if there is none (any more).

        From any thread; never raises.
        """
        ...

    def call_later(self, delay: float, func: Callable[[], object], /) -> Callable[[], object]:
        """Call ``func`` in ``delay`` seconds; return what cancels that. On the loop's thread."""
        ...


class Call:
    """A function with its arguments, its caller's context and time limit, and its outcome.

    ``state``, ``departure``, ``value`` and ``error`` are guarded by the scheduler's lock until
    the waiter is woken; from then on they are the caller's alone. The rest never changes, but
    for ``work``, which is let go of as soon as the call can no longer run.
    """

    __slots__ = (
        "arrived",
        "context",
        "deadline",
        "departure",
        "ended",
        "error",
        "port",
        "priority",
        "size",
        "slot",
        "started",
        "state",
        "value",
        "waiter",
        "work",
    )

    # Times are on the clock of time.monotonic(). They and the outcome are set when there are any.
    arrived: float
    started: float
    ended: float
    value: Any
    error: BaseException | None
    slot: Any  # where it runs, from its start on

    def __init__(
        self,
        work: Work | None,
        context: Context,
        deadline: float | None,
        priority: int,
        port: Port,
        waiter: Any,
    ) -> None:
        self.work = work
        self.context = context
        self.deadline = deadline
        self.priority = priority
        self.port = port
        self.waiter = waiter
        self.state = CallState.QUEUED
        self.departure: Departure | None = None
        self.size = 0  # bytes of its arguments, where anybody counts them

    @property
    def group(self) -> object:
        """What it waits in line for, where calls differ in how long they run; None for most."""
        return None

    @property
    def limit(self) -> float | None:
        """When nobody waits any more for the function that it runs."""
        return self.deadline

    def given_up(self, now: float) -> bool:
        """Whether nobody waits for its outcome any more."""
        # One attribute, written once under the lock: read without it on purpose, this is a hint.
        return self.departure is not None or (self.deadline is not None and now >= self.deadline)

    @property
    def fate(self) -> str:
        """What becomes of it when it has begun and its time is up, for a message."""
        return "it runs on, and its result will be thrown away"

    @property
    def name(self) -> str:
        """What to call its function, while that is still known."""
        work = self.work  # read once: the thread lets go of it without the lock
        return "the call" if work is None else name_of(work[0])

    def outcome(self) -> Any:
        """Hand the outcome over, once: return the value or raise the error.

        Both are let go of here. An error that stayed on the call would be a reference cycle
        through its traceback, and keep the call's arguments alive until the next collection.
        """
        error = self.error
        if error is None:
            value, self.value = self.value, None
            return value
        self.error = None
        try:
            raise error
        finally:
            del error


class Awaited(Protocol):
    """What ``check_cancelled()`` asks of the call that runs."""

    @property
    def departure(self) -> Departure | None:
        """Why nobody waits, but for the deadline."""
        ...

    def given_up(self, now: float, /) -> bool:
        """Whether nobody waits for its outcome any more."""
        ...


class Caller(Protocol):
    """Who makes calls on behalf of a client, and wants to know of each: the middleware."""

    deadline: float | None

    def joined(self, call: Call, drop: Callable[[Call], None], /) -> None:
        """``call`` has been accepted. ``drop(call)`` ends it if the client goes away."""
        ...

    def left(self, call: Call, /) -> None:
        """``call`` is over for this caller."""
        ...


current_caller: ContextVar[Caller | None] = ContextVar("asgi_infer_caller", default=None)


class _Here(threading.local):
    """Thread-local: no guard."""

    current_call: Callable[[], Awaited | None] | None = None
    """Where a model lives, what tells the call that it runs."""
    clock: Callable[[], float] = time.monotonic
    """What the deadlines of its calls are on."""


here = _Here()


def check_cancelled() -> None:
    """Raise if nobody waits any more for the call that this function serves.

    Call it now and then inside a long function, between native calls: after a cancellation, a
    disconnect or a deadline the function runs on (native code can't be interrupted), and this
    is how it can end early and free the thread for the next call. Outside a call it does
    nothing, so the same function works in a script.

    :raises CallCancelled: the caller has gone, or the call's deadline has passed
    """
    call = here.current_call and here.current_call()
    if call is not None and call.given_up(here.clock()):
        why = "its deadline has passed" if call.departure is None else call.departure.value
        raise CallCancelled(f"nobody waits for this call any more: {why}")
