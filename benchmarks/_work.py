"""Native work of a known length, so that a figure shows what is around the model and not in it.

A rival's environment needs nothing for it but Python.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cache
from hashlib import pbkdf2_hmac

VARIABLE = "BENCH_WORK"
"""The environment variable by which a rival is told its work."""


@dataclass(frozen=True)
class Work:
    """A model that takes ``fixed + n * each`` iterations of native code for ``n`` items.

    The code is one thread's, holds no lock of Python's, and is the same number of instructions
    each time: on a busy machine it takes longer, as any model does, but it is no less work.
    """

    fixed: int
    each: int

    @classmethod
    def lasting(cls, fixed: float, each: float = 0.0) -> Work:
        """As much as takes so many seconds here, when nobody else wants the CPU."""
        speed = iterations_per_second()
        return cls(round(fixed * speed), round(each * speed))

    @classmethod
    def parse(cls, text: str) -> Work:
        """The work that ``str`` made the text of."""
        fixed, each = text.split(",")
        return cls(int(fixed), int(each))

    @classmethod
    def told(cls) -> Work:
        """The work that the environment says."""
        return cls.parse(os.environ[VARIABLE])

    def __str__(self) -> str:
        return f"{self.fixed},{self.each}"

    def predict(self) -> int:
        """A call with one item."""
        return self.predict_many([7])[0]

    def predict_many(self, items: list[int]) -> list[int]:
        """A call with any number of items; a result for each."""
        _iterate(self.fixed + self.each * len(items))
        return [item % 10 for item in items]


NOTHING = Work(0, 0)
"""Work that takes no time."""


@cache
def iterations_per_second() -> float:
    """How fast this machine is, by the least disturbed of some attempts."""
    iterations, least = 10_000, float("inf")
    for _ in range(60):
        time.sleep(0.005)
        start = time.perf_counter()
        _iterate(iterations)
        least = min(least, time.perf_counter() - start)
    return iterations / least


def _iterate(count: int) -> None:
    pbkdf2_hmac("sha256", b"password", b"salt", max(1, count))
