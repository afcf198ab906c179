"""The errors that a call gets without its function: in words that say what to do about it.

They are made under the scheduler's lock, so that nothing here runs foreign code.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from ._call import Call, CallState
from ._errors import (
    ClientDisconnected,
    DeadlineExceeded,
    Draining,
    InferenceError,
    NotReady,
    QueueFull,
)

ErrorOf = Callable[[Call], InferenceError]
"""Makes the error for one call."""

Refusal = Callable[[float], InferenceError]
"""Makes the error for a call that is not let in, from the seconds until it may be repeated."""


def retry_after(wait: float) -> float:
    """Seconds for ``Retry-After``: the predicted wait or up to half of it and 3 seconds more.

    Clients that were refused together must not come back together. The header has whole seconds,
    so that a share of a short wait would make no difference. From 1 to 60, which is as good as
    any longer wait.
    """
    wait = min(wait, 38.0)
    return max(1.0, random.uniform(wait, 1.5 * wait + 3.0))  # noqa: S311  # no secret


def stopped(call: Call) -> Draining:
    """The error for an accepted call that has not ended when the runner stops."""
    if call.state is CallState.QUEUED:
        message = "the runner stopped before it could run this call"
    else:
        message = f"the runner stopped while {call.name} was still running; its result is lost"
    return Draining(message, retry_after=retry_after(0.0))


def deadline_exceeded(call: Call, now: float, *, loading: bool = False) -> DeadlineExceeded:
    """The call's time was up at ``now``.

    :param loading: nothing could run, since no model was loaded
    """
    if call.state is CallState.QUEUED:
        why = ", for the model to be loaded again" if loading else ""
        error = DeadlineExceeded(
            f"the call's time was up after {now - call.arrived:.3g} s of waiting{why}; it never "
            f"ran",
            started=False,
            retry_after=retry_after(now - call.arrived),
        )
        if loading:
            error.detail = NotReady.public
        return error
    return DeadlineExceeded(
        f"the call's time was up after {now - call.started:.3g} s of running; {call.fate}",
        started=True,
    )


def stalled(call: Call) -> DeadlineExceeded:
    """The stream's consumer has taken nothing for too long."""
    return DeadlineExceeded(
        f"the stream of {call.name} was closed, since its consumer took no item for as long as "
        f"stall_timeout allows; take items faster, or allow for more with stall_timeout=...",
        started=True,
    )


def queue_full(queued: int, wait: float) -> QueueFull:
    """There is no room for another call."""
    return QueueFull(
        f"{queued} calls are waiting, as many as max_queue allows; repeat the call later, or "
        f"raise max_queue if clients can wait that long",
        retry_after=retry_after(wait),
    )


def too_many_streams(streams: int, wait: float) -> QueueFull:
    """So many streams stand between two of their items that there is no room for another."""
    return QueueFull(
        f"{streams} streams have begun and not ended, as many as max_queue allows; repeat the "
        f"call later, or raise max_queue",
        retry_after=retry_after(wait),
    )


def too_many_bytes(size: int, waiting: int, wait: float) -> QueueFull:
    """There is room for another call, and none for its arguments."""
    return QueueFull(
        f"the call's arguments hold {size} bytes, and beside the {waiting} bytes that wait that "
        f"is more than max_queue_bytes allows; repeat the call later, or raise max_queue_bytes",
        retry_after=retry_after(wait),
    )


def overloaded(left: float, wait: float) -> QueueFull:
    """The queue stands, and the call would wait for too much of its time."""
    return QueueFull(
        f"the queue has stood for too long, and the call would wait about {wait:.3g} s of its "
        f"{left:.3g} s; it was not queued. Repeat it later",
        retry_after=retry_after(wait),
    )


def shed(call: Call, now: float) -> QueueFull:
    """The queue stands, and the call has waited for too much of its time."""
    return QueueFull(
        f"the queue has stood for too long, and the call was dropped after "
        f"{now - call.arrived:.3g} s of waiting; it never ran. Repeat it later",
        retry_after=retry_after(now - call.arrived),
    )


def too_little_time(left: float, wait: float) -> DeadlineExceeded:
    """The call would not end in its time."""
    return DeadlineExceeded(
        f"the call has {left:.3g} s and would need about {wait:.3g} s; it was not queued",
        started=False,
        retry_after=retry_after(wait),
    )


def client_disconnected(call: Call) -> ClientDisconnected:
    """The call's client has gone."""
    ran = "before its call ran" if call.state is CallState.QUEUED else "while its call ran"
    return ClientDisconnected(f"the client hung up {ran}")
