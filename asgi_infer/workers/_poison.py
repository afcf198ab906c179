"""Calls that crash whatever process they run in: they are not run again and again."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakValueDictionary

CRASHES = 2
"""Of one call, after which it is not run again."""

REMEMBERED = 256
"""Calls that are remembered at most: those that have crashed last."""

FORGOTTEN_AFTER = 600.0
"""Seconds after its last crash. It may not have been the call's fault: memory runs out as well."""


class Poison:
    """What is known of the calls of one runner. Any thread.

    :param clock: in seconds
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards these:
        self._crashes: OrderedDict[bytes, int] = OrderedDict()
        self._latest: dict[bytes, float] = {}
        self._until = 0.0  # when the last of those that are refused is forgotten

    @property
    def known(self) -> bool:
        """Whether there is a call that is not to be run again. Without the lock: one number."""
        return self._until > 0.0 and self._clock() < self._until

    def add(self, digest: bytes) -> None:
        """The call of that digest has crashed its process."""
        now = self._clock()
        with self._lock:
            self._forget(now)
            count = self._crashes[digest] = self._crashes.pop(digest, 0) + 1
            self._latest[digest] = now
            if len(self._crashes) > REMEMBERED:
                oldest, _ = self._crashes.popitem(last=False)
                del self._latest[oldest]
            if count >= CRASHES:
                self._until = now + FORGOTTEN_AFTER

    def refuses(self, digest: bytes) -> bool:
        """Whether the call of that digest is not to be run again."""
        with self._lock:
            self._forget(self._clock())
            return self._crashes.get(digest, 0) >= CRASHES

    def is_news(self, digest: bytes) -> bool:
        """Whether nobody has been told so of a call that is refused; somebody is from now on."""
        with self._lock:
            news = self._crashes.get(digest) == CRASHES
            if news:
                self._crashes[digest] += 1
            return news

    def _forget(self, now: float) -> None:
        # In the order of their latest crashes.
        while self._crashes:
            oldest = next(iter(self._crashes))
            if now - self._latest[oldest] < FORGOTTEN_AFTER:
                return
            del self._crashes[oldest], self._latest[oldest]


def poison_of(runner: object) -> Poison:
    """The one that all replicas of a runner share, for as long as one of them lives.

    :param runner: what they have in common, and hold
    """
    with _lock:
        poison = _poisons.get(id(runner))
        if poison is None:
            poison = _poisons[id(runner)] = Poison()
        return poison


_lock = threading.Lock()
_poisons: WeakValueDictionary[int, Poison] = WeakValueDictionary()  # guarded by _lock
