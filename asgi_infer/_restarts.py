"""When to start a worker again whose model was lost, and when to stop trying for a while."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

_MAX_DOUBLED = 64  # more would be too large for a float, and is too long for anybody


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """What is done about a worker that crashes.

    It is started again: at once after the first crash, then after ``backoff`` seconds, twice
    that, and so on up to ``max_backoff``. A worker that crashes more than ``max_restarts`` times
    within some seconds is broken: its runner answers ``NotReady`` (503), and one start is tried
    every ``recover_after`` seconds. Crashes longer ago than ``within`` are forgotten.

    That is how supervisors in Erlang's OTP bound restarts (intensity and period); that a broken
    worker is tried again is the half-open state of a circuit breaker.

    :param max_restarts: how many crashes within ``within`` seconds are borne
    :param within: seconds
    :param backoff: seconds before the second restart in a row
    :param max_backoff: seconds before any restart of a worker that is not broken, at most
    :param recover_after: seconds until a broken worker is tried again
    :raises ValueError: a number makes no sense
    """

    max_restarts: int = 5
    within: float = 60.0
    backoff: float = 0.1
    max_backoff: float = 10.0
    recover_after: float = 30.0

    def __post_init__(self) -> None:
        if type(self.max_restarts) is not int or self.max_restarts < 0:
            raise ValueError(f"max_restarts must be 0 or more, not {self.max_restarts!r}")
        for name in ("within", "backoff", "max_backoff", "recover_after"):
            seconds = getattr(self, name)
            if (
                not isinstance(seconds, int | float)
                or isinstance(seconds, bool)
                or not 0 <= seconds <= threading.TIMEOUT_MAX
            ):
                raise ValueError(f"{name} must be a number of seconds, not {seconds!r}")


class Restarts:
    """The crashes of one replica. The inference thread's own.

    :param policy: what is done about them
    :param clock: seconds, on which they are noted
    :ivar broken: there have been too many, and none of the starts since has succeeded
    :ivar crashes: how many are remembered
    """

    def __init__(
        self, policy: RestartPolicy, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.policy = policy
        self.broken = False
        self._clock = clock
        self._times: deque[float] = deque()

    @property
    def crashes(self) -> int:
        """How many have happened within the policy's time."""
        return len(self._times)

    def note(self) -> float:
        """The worker has crashed, or did not start; return the seconds to wait."""
        policy, now = self.policy, self._clock()
        self._times.append(now)
        while now - self._times[0] > policy.within:
            self._times.popleft()
        if self.broken or len(self._times) > policy.max_restarts:
            self.broken = True
            return policy.recover_after
        if len(self._times) == 1:
            return 0.0
        doubled = min(len(self._times) - 2, _MAX_DOUBLED)
        backoff = min(policy.max_backoff, policy.backoff * 2.0**doubled)
        # Replicas that fail together, as when a machine runs out of memory, need not come back so.
        return backoff * random.uniform(0.75, 1.0)  # noqa: S311  # no secret

    def recovered(self) -> None:
        """A broken worker has started again: it gets another chance, but only one."""
        self.broken = False


NEVER = Restarts(RestartPolicy(max_restarts=0))
"""For what is never lost."""
