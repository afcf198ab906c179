"""Models for ``test_shared``, in a module that is imported in no time by their processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LIMIT = 10.0  # that of tests.gates


class Model:
    """In a process of its own, with which a test speaks by files."""

    def pid(self) -> int:
        return os.getpid()

    def hold(self, path: str) -> int:
        """Tell that it has begun, and wait for the file to go."""
        file = Path(path)
        file.touch()
        end = time.monotonic() + LIMIT
        while file.exists() and time.monotonic() < end:
            time.sleep(0.001)
        return os.getpid()

    def count(self) -> Iterator[int]:
        yield from range(3)

    def say(self, what: str) -> None:
        print(what)
        print(what, file=sys.stderr)


def fail() -> Model:
    raise LookupError("no such file")


def sleep() -> Model:
    time.sleep(LIMIT)
    return Model()


def crash() -> Model:
    os._exit(3)
