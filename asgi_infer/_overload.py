"""Whether a queue has stood for too long: the question that CoDel asks."""

from __future__ import annotations

from ._queue_policy import QueuePolicy


class Overload:
    """Watches what share of their time calls have spent on waiting when they are taken.

    No lock and no clock of its own; whoever owns the queue brings both.

    :ivar active: whether the queue stands, and has for the policy's interval
    """

    def __init__(self, policy: QueuePolicy) -> None:
        self.active = False
        self._target = policy.target
        self._interval = policy.interval
        self._standing_since: float | None = None

    def note(self, share: float, now: float) -> None:
        """A call is taken that has spent ``share`` of its time on waiting."""
        # Half, to leave it: under a steady load just above the target it would go on and off.
        if share < (self._target / 2 if self.active else self._target):
            self.end()
        elif self._standing_since is None:
            self._standing_since = now
        elif now - self._standing_since >= self._interval:
            self.active = True

    def end(self) -> None:
        """The queue is empty, or has become short."""
        self.active = False
        self._standing_since = None
