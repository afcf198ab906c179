"""The future of a call that was made from synchronous code."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from ._call import Call, CallState
from ._scheduler import Scheduler

logger = logging.getLogger("asgi_infer")


class CallFuture(Future[Any]):
    """A ``concurrent.futures.Future`` that leaves the queue when it is cancelled or too late.

    Complete it by ``settle``, on the thread that ends the call; done-callbacks run there, as
    with the standard library's executors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._call: Call | None = None  # set before the call is admitted, dropped when settled
        self._scheduler: Scheduler | None = None

    def attach(self, call: Call, scheduler: Scheduler) -> None:
        """Say which call this is the future of."""
        self._call = call
        self._scheduler = scheduler

    def settle(self) -> None:
        """Take over the outcome of the call."""
        call, self._call = self._call, None
        if call is not None:  # pragma: no branch  # only the one who ends a call settles it
            # The frames in the error's traceback refer to the call, and the future keeps the
            # error: the reference from the call to the future would make that a cycle.
            call.waiter = None
            error, call.error = call.error, None
            if error is None:
                self.set_result(call.outcome())
            else:
                self.set_exception(error)

    def cancel(self) -> bool:
        """Take the call out of the queue; False if it has started."""
        call, scheduler = self._call, self._scheduler
        if call is not None and scheduler is not None and scheduler.withdraw(call):
            self._call = None
            super().cancel()
            # Executors do this when they come across a cancelled item: it wakes wait().
            self.set_running_or_notify_cancel()
        return self.cancelled()

    def running(self) -> bool:
        """Whether the function runs now."""
        call = self._call
        return call is not None and call.state is CallState.RUNNING

    def result(self, timeout: float | None = None) -> Any:
        """The call's result.

        :raises TimeoutError: ``timeout`` seconds have passed; the call goes on
        :raises DeadlineExceeded: the call's own time is up
        """
        self._wait_to_deadline(timeout)
        try:
            return super().result(timeout)
        finally:
            del self  # this frame is in the error's traceback, and the future keeps the error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The call's exception, or None; raises as ``result`` does."""
        self._wait_to_deadline(timeout)
        return super().exception(timeout)

    def _wait_to_deadline(self, timeout: float | None) -> None:
        """Wait no longer than the call's deadline, and let the call expire then.

        No timer watches a call that nobody waits for: it expires when its turn comes.
        """
        call, scheduler = self._call, self._scheduler
        if call is None or call.deadline is None or scheduler is None:
            return
        remaining = max(0.0, call.deadline - time.monotonic())
        if timeout is not None and timeout < remaining:
            return
        try:
            super().exception(remaining)
        except TimeoutError:
            if scheduler.expire(call):
                self.settle()


class FuturePort:
    """The port of callers without an event loop: their futures are settled where they are."""

    def post(self, waiter: CallFuture, /) -> None:
        """Complete the future, here and now."""
        try:
            waiter.settle()
        except BaseException:  # a future lets through what its callbacks raise beside Exception
            logger.exception("a done-callback of a future raised")

    def call_soon_threadsafe(self, func: Callable[[], object], /) -> bool:
        """There is no loop to call it on."""
        del func
        return False

    def call_later(self, delay: float, func: Callable[[], object], /) -> Callable[[], object]:
        """There is no loop to call this on, either."""
        raise NotImplementedError


FUTURE_PORT = FuturePort()


def cancel_all(calls: Iterable[Call]) -> None:
    """Cancel the futures among the waiters of ``calls``."""
    for call in calls:
        if isinstance(call.waiter, CallFuture):
            call.waiter.cancel()
