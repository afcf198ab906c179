"""A clock that moves when it is told to."""

from __future__ import annotations

from .._checks import check_delay


class VirtualClock:
    """Seconds that pass when the test says so. Called, it tells the time, as ``time.monotonic``.

    ::

        clock = VirtualClock()
        clock.advance(2.5)
        assert clock() == 2.5

    :ivar now: the time
    """

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass.

        :raises ValueError: it is negative, or no number
        """
        self.now += check_delay("seconds", seconds)
