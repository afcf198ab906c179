"""How a queue orders what waits, and what it does when it has stood for too long."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

Overload = Literal["shed", "newest", "wait"]


@dataclass(frozen=True, kw_only=True)
class QueuePolicy:
    """How a runner's queue orders what waits, and what it does when it has stood for too long.

    ::

        runner = InferenceRunner(Model, timeout=2.0, queue=QueuePolicy(overload="newest"))

    A queue *stands* while every call that is taken from it has spent more than ``target`` of its
    time (its ``timeout``, or what its client allows) on waiting. That is the question that
    CoDel asks of a router's queue (Nichols and Jacobson, ACM Queue 10(5), 2012): not how long
    the queue is, but whether it ever gets short. A burst makes a queue long; only overload
    makes it stand. After ``interval`` seconds of standing the policy acts, until for as long no
    call has waited for half of ``target``. Calls without a time limit are never touched, and
    keep their order.

    :param ageing: seconds that one step of priority is worth. A call of priority ``p`` is
        ordered as if it had come ``p * ageing`` seconds later, so that a call can be overtaken
        only by what comes in the next ``(p - q) * ageing`` seconds with the lower priority ``q``
    :param overload: what is done about a queue that stands. ``"shed"`` refuses a call that would
        wait for more than ``target`` of its time, and drops what has: those who are served are
        served fast, and the others know at once. ``"newest"`` serves the newest first, and the
        oldest make room for them in a full queue: none is refused that could be served fast, and
        those that are not served learn it at the end of their time. ``"wait"`` does nothing: all
        wait in turn
    :param target: share of a call's time, above 0 and up to 1
    :param interval: seconds
    :raises ValueError: a value makes no sense
    """

    ageing: float = 1.0
    overload: Overload = "shed"
    target: float = 0.25
    interval: float = 0.5

    def __post_init__(self) -> None:
        _check(_is_finite(self.ageing) and self.ageing >= 0, "ageing", self.ageing)
        _check(self.overload in get_args(Overload), "overload", self.overload)
        _check(_is_finite(self.target) and 0 < self.target <= 1, "target", self.target)
        _check(_is_finite(self.interval) and self.interval >= 0, "interval", self.interval)


_WANTED = {
    "ageing": "a number of seconds, 0 or more",
    "overload": "'shed', 'newest' or 'wait'",
    "target": "a share of a call's time, above 0 and up to 1",
    "interval": "a number of seconds, 0 or more",
}


def _check(good: bool, name: str, value: Any) -> None:
    if not good:
        raise ValueError(f"{name} must be {_WANTED[name]}, not {value!r}")


def _is_finite(value: Any) -> bool:
    # Compared and not converted: an integer may be too large for a float.
    return isinstance(value, Real) and abs(value) <= sys.float_info.max  # type: ignore[operator]
