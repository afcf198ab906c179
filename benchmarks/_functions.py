"""What the benchmarks of isolation have called: functions that every process can import."""

from __future__ import annotations

import ctypes
from typing import Any

STRIDE = 1024
"""Elements of four bytes in a page of memory."""


def noop() -> None:
    """Nothing."""


def touch(array: Any) -> Any:
    """Return the array that came, with one element of each of its pages made larger by one.

    So every page has to be there, and nobody can return what it has sent; but there is no work
    that would hide what the way costs.
    """
    array[::STRIDE] += 1
    return array


def hold_gil(seconds: float) -> None:
    """What a binding does that keeps Python's lock while its native code runs."""
    ctypes.PyDLL(None).usleep(round(seconds * 1e6))
