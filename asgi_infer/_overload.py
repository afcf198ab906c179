"""Whether a queue has stood for too long: the question that CoDel asks."""

from __future__ import annotations

from ._queue_policy import QueuePolicy


class Overload:
    """Watches what share of their time calls have spent on waiting when their turn comes.

    No lock and no clock of its own; whoever owns the queue brings both.

    :ivar active: the queue has stood for the policy's interval, and has not been short since for
        as long
    """

    def __init__(self, policy: QueuePolicy) -> None:
        self.active = False
        self._target = policy.target
        self._interval = policy.interval
        self._long_since: float | None = None  # while it is not active
        self._long_until = 0.0  # while it is

    def note(self, share: float, now: float) -> None:
        """A call has its turn, and has spent ``share`` of its time on waiting."""
        if self.active:
            # Half of it, and for some time: what is done about a queue makes it short at once.
            if share >= self._target / 2:
                self._long_until = now
            elif self.short(now):
                self.active = False
        elif share < self._target:
            self._long_since = None
        elif self._long_since is None:
            self._long_since = now
        elif now - self._long_since >= self._interval:
            self.active = True
            self._long_since = None
            self._long_until = now

    def short(self, now: float) -> bool:
        """Whether no call has waited for long within the last interval, for an active one."""
        return now - self._long_until >= self._interval

    def empty(self) -> None:
        """There is nothing in the queue: it is short."""
        self._long_since = None
