"""Models for the doctor, good ones and bad: children import this by its name."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from asgi_infer.native import cpu

REGIONS = 50

lock = threading.Lock()
row = [1, 2, 3]
ready = object()


def rows() -> list[list[int]]:
    """A sample that is made."""
    return [row]


async def rows_later() -> list[list[int]]:
    return rows()


def no_rows() -> None:
    raise OSError("no such\nimage")


class Promise:
    """Awaitable, and no more."""

    def __await__(self) -> Iterator[Any]:
        raise NotImplementedError


class Model:
    """Can be called in every wrong way, and in a right one."""

    weights = 3

    def predict(self, rows: Any) -> Any:
        return rows

    def talk(self, rows: Any) -> Any:
        print("a line of the model's")
        return input() if rows is None else rows

    def alone(self) -> int:
        return 1

    def pair(self, rows: Any, mask: Any) -> Any:
        return rows, mask

    def fail(self, rows: Any) -> None:
        raise ValueError("shapes differ")

    def leave(self, rows: Any) -> None:
        raise SystemExit(3)

    async def later(self, rows: Any) -> Any:
        return rows

    def returns_later(self, rows: Any) -> Any:
        return asyncio.sleep(0)

    def returns_a_promise(self, rows: Any) -> Any:
        return Promise()

    def each(self, rows: Any) -> Iterator[Any]:
        yield rows

    async def each_later(self, rows: Any) -> AsyncIterator[Any]:
        yield rows

    def lazily(self, rows: Any) -> Any:
        return (each for each in rows)

    def hang(self, rows: Any) -> None:
        if "HANGS" in os.environ:
            Path(os.environ["HANGS"]).touch()
        time.sleep(1000)

    def crash(self, rows: Any) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


class Callable:
    """Called itself."""

    def __call__(self) -> int:
        return 1


class CallableLater:
    async def __call__(self) -> int:
        return 1


@functools.cache
def cached() -> Model:
    """A factory that is no plain function."""
    return Model()


async def model_later() -> Model:
    return Model()


def from_file(path: str) -> Model:
    raise NotImplementedError(path)


def broken() -> Model:
    raise ValueError("no weights")


class OnMain:
    """Bears no thread but the main one."""

    def __init__(self) -> None:
        self._check()

    def predict(self, rows: Any) -> None:
        self._check()

    @staticmethod
    def _check() -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("only on the main thread")


class Tired:
    """Can be called twice."""

    def __init__(self) -> None:
        self.calls = 0

    def predict(self, rows: Any) -> None:
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("tired")


class CrashOffMain:
    """Takes its process down on any other thread, but not what that has forked."""

    def predict(self, rows: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            if os.fork() == 0:
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGSEGV)


class Regions:
    """Parallel regions on GNU OpenMP, which do nothing but wait for each other.

    Of as many threads as there are CPUs: with a second pool there are more, which throttles both.
    """

    def __init__(self) -> None:
        from tests.native import gomp

        self._run = gomp.run_region
        self._threads = max(2, len(cpu.IMPORT_AFFINITY))
        self._run(self._threads)

    def predict(self) -> None:
        for _ in range(REGIONS):
            self._run(self._threads)
