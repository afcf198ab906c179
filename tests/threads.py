"""A thread for the length of one function."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from .gates import LIMIT

T = TypeVar("T")


def on_new_thread(func: Callable[[], T], *, name: str | None = None) -> T:
    """Call ``func`` on a thread of its own, which ends with it; return or raise what it does."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(func())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join(LIMIT)
    return future.result(0)
