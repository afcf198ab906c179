"""What happens to inference threads when the interpreter ends or the process forks."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

from ._thread import InferenceThread

GRACE = 1.0
"""Seconds that a forgotten runner may hold up the end of the program."""

_MOMENT = 0.1  # seconds

_live: weakref.WeakSet[InferenceThread] = weakref.WeakSet()  # guarded by the GIL
_forkable: weakref.WeakSet[Any] = weakref.WeakSet()  # guarded by the GIL
_stopping = threading.Lock()  # held by whoever stops all, so that it is done once

main_thread_id = threading.main_thread().ident
"""What ``threading.get_ident()`` returns on the main thread."""


def stop_at_exit(thread: InferenceThread) -> None:
    """Stop ``thread`` when the interpreter ends, if it still runs then.

    The thread is a daemon, since the interpreter would join any other before the hook below
    could stop it. Daemon threads are killed in mid-flight at the very end, and that can bring
    native code down: so all are stopped, and given a moment, before.
    """
    _hook_exit()
    _live.add(thread)


def watch_main_thread() -> None:
    """See to it that no call keeps the process alive once the main thread has ended.

    To be called on every other thread that waits for a call. The interpreter joins those before
    it gets to its exit hooks, so one that waits for a call that never returns would hold it up.
    """
    _start_watcher()


def leave_behind_at_fork(runner: Any, reset: Callable[[Any], object]) -> None:
    """In every child process, call ``reset(runner)``, for as long as ``runner`` lives."""
    _hook_fork(reset)
    _forkable.add(runner)


@cache
def _hook_exit() -> None:
    atexit.register(_stop_all)


@cache
def _hook_fork(reset: Callable[[Any], object]) -> None:
    if hasattr(os, "register_at_fork"):  # pragma: no branch  # not on Windows, which forks not
        os.register_at_fork(after_in_child=lambda: _in_child(reset))


@cache
def _start_watcher() -> None:
    def watch() -> None:
        threading.main_thread().join()
        _send_away_who_waits()

    # An interpreter that is ending may start no threads. The call is none the worse for it.
    with suppress(RuntimeError):
        threading.Thread(target=watch, name="asgi_infer-exit", daemon=True).start()


def _send_away_who_waits() -> None:
    """Give what is under way a moment to end, and its callers an error then.

    Not the end of all runners: a program may live on without its main thread, as a server that
    runs in another one does. Only a runner whose thread is stuck in a call is stopped.
    """
    under_way = [(thread, thread.scheduler.under_way()) for thread in list(_live)]
    time.sleep(GRACE)
    with _stopping:  # those sent away may let the interpreter get to its exit hooks, here and now
        for thread, calls in under_way:
            if thread.give_up_on(calls):
                _live.discard(thread)  # it has had its moment


def _stop_all() -> None:
    with _stopping:
        threads = list(_live)
        _live.clear()
        for thread in threads:
            thread.stop_soon()
        deadline = time.monotonic() + GRACE
        for thread in threads:
            if not thread.join(max(0.0, deadline - time.monotonic())):
                thread.stop_now()
                thread.join(_MOMENT)  # one that waits for a stream's consumer ends now


def _in_child(reset: Callable[[Any], object]) -> None:
    global _stopping, main_thread_id
    _stopping = threading.Lock()
    main_thread_id = threading.get_ident()
    _live.clear()
    _start_watcher.cache_clear()
    for runner in list(_forkable):
        reset(runner)
