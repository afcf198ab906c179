"""Who may run, and when: admission, the queue, the one slot, and the books.

One lock guards it all, so that every snapshot of the books balances. No foreign code runs under
it, and callers are woken outside.

Guarantees
    * ``submitted = completed + failed + cancelled + expired + rejected + queued + running``.
    * A call is taken at most once. Once its caller has left, it is never settled.
    * The slot belongs to the inference thread: a caller who leaves does not free it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from ._call import Call, CallState, Departure
from ._errors import ClientDisconnected, DeadlineExceeded, Draining, InferenceError, QueueFull
from ._queue import CallQueue
from ._statistics import Counters, moving_average

ErrorOf = Callable[[Call], InferenceError]
"""Makes the error for one call. Runs under the lock, so it must not run foreign code."""

Refusal = Callable[[float], InferenceError]
"""Makes the error for a call that is not let in, from the seconds until it may be repeated."""


class Scheduler:
    """The queue in front of one inference thread, from its start to its end.

    :param counters: the runner's books, which outlive this scheduler
    :param lock: guards the counters and everything in here
    """

    def __init__(self, *, max_queue: int, counters: Counters, lock: threading.RLock) -> None:
        self._lock = lock
        self._counters = counters  # guarded by _lock
        self._queue = CallQueue(max_queue)  # guarded by _lock
        self._running: Call | None = None  # guarded by _lock
        self._refusal: Refusal | None = None  # guarded by _lock
        self._stopped = False  # guarded by _lock
        self._idle = False  # guarded by _lock: the thread sleeps, or is about to
        self._idle_waiters: list[Future[None]] = []  # guarded by _lock
        # A binary semaphore: the thread sleeps in acquire(); whoever clears _idle releases.
        self._wake_up = threading.Lock()
        self._wake_up.acquire()

    # -- for callers ---------------------------------------------------------------------------

    def admit(self, call: Call) -> None:
        """Queue ``call``, or refuse it.

        :raises QueueFull: ``max_queue`` calls wait already
        :raises DeadlineExceeded: the predicted wait is longer than the call's time
        :raises InferenceError: the runner is stopping, or has no model
        """
        call.arrived = time.monotonic()
        with self._lock:
            self._counters.submitted += 1
            # The usual case is settled here; everything that might refuse is looked at apart.
            if call.deadline is not None or self._refusal is not None or self._queue.full:
                expired, refusal = self._examine(call)
            else:
                expired, refusal = [], None
            if refusal is None:
                self._queue.push(call)
                wake_up, self._idle = self._idle, False
            else:
                self._counters.rejected += 1
                wake_up = False
        if wake_up:
            self._wake_up.release()
        if expired:
            _post(expired)
        if refusal is not None:
            raise refusal

    def leave(self, call: Call, departure: Departure, error: ErrorOf | None = None) -> bool:
        """The caller stops waiting, and ``error(call)`` is the outcome if there is none yet.

        :returns: whether that was news: False if the call had ended, or its caller left, before
        """
        with self._lock:
            if call.state is CallState.QUEUED:
                self._queue.remove(call)
                self._drop([call], departure, error)
                self._notify_if_idle()
            elif call.state is CallState.RUNNING and call.departure is None:
                call.error = None if error is None else error(call)
                call.departure = departure
                self._counters.late += 1
            else:
                return False
        return True

    def withdraw(self, call: Call) -> bool:
        """Take ``call`` out of the queue if it is still there; a started call is left alone."""
        # Only a queued call can still be taken out, and nothing puts one back: reading the
        # state ahead of the lock can err on one side only, and leave() then looks again.
        return call.state is CallState.QUEUED and self.leave(call, Departure.CANCELLED)

    def expire(self, call: Call) -> bool:
        """The call's deadline has passed: its caller leaves with ``DeadlineExceeded``."""
        return self.leave(call, Departure.EXPIRED, _deadline_exceeded)

    def disconnect(self, call: Call) -> None:
        """The call's client has gone: its caller is woken with ``ClientDisconnected``."""
        self.send_away([call], _client_disconnected)

    # -- for the inference thread --------------------------------------------------------------

    def take(self) -> Call | None:
        """Claim the next call, sleeping until there is one; None when it is time to stop."""
        while True:
            with self._lock:
                call = self._claim(time.monotonic())
                if call is None:
                    self._notify_if_idle()
                    self._idle = not self._stopped
                    if self._stopped:
                        return None
            if call is None:
                self._wake_up.acquire()
            elif call.state is CallState.RUNNING:
                return call
            else:
                call.port.post(call.waiter)
                del call  # while it sleeps, the thread holds no call alive

    def finish(self, call: Call, value: object, error: BaseException | None) -> Call | None:
        """The function has ended: close the books on ``call``, and settle it if it is awaited.

        :returns: the next call, claimed as by ``take``, if one is waiting
        """
        call.work = None  # the arguments may be large
        call.ended = ended = time.monotonic()
        with self._lock:
            call.state = CallState.FINISHED
            counters = self._counters
            awaited = call.departure is None
            if awaited:
                call.value = value
                call.error = error
                if error is None:
                    counters.completed += 1
                else:
                    counters.failed += 1
            else:
                self._count(call.departure)
            counters.service_time = moving_average(counters.service_time, ended - call.started)
            self._running = None
            counters.running = 0
            following = self._claim(ended)
        if awaited:
            call.port.post(call.waiter)
        if following is None or following.state is CallState.RUNNING:
            return following
        following.port.post(following.waiter)
        return None

    def current(self) -> Call | None:
        """The call that runs."""
        return self._running

    # -- for the runner ------------------------------------------------------------------------

    def refuse(self, refusal: Refusal) -> None:
        """From now on every new call gets the error that ``refusal`` makes."""
        with self._lock:
            self._refusal = refusal

    def send_away(self, calls: Iterable[Call], error: ErrorOf) -> None:
        """Cancel those of ``calls`` that have not ended; each caller gets an error of its own."""
        for call in calls:
            if self.leave(call, Departure.CANCELLED, error):
                call.port.post(call.waiter)

    def drop_queued(self, error: ErrorOf) -> None:
        """Cancel everything that waits; each caller gets an error of its own."""
        with self._lock:
            dropped = self._queue.clear()
            self._drop(dropped, Departure.CANCELLED, error)
            self._notify_if_idle()
        _post(dropped)

    def abandon_running(self, error: ErrorOf) -> str | None:
        """Send the caller of the running call away; return the function's name, if one runs."""
        with self._lock:
            call = self._running
            name = None if call is None else call.name
        self.send_away([] if call is None else [call], error)
        return name

    def stop(self) -> None:
        """Let ``take`` return None once the queue is empty."""
        with self._lock:
            self._stopped = True
            wake_up, self._idle = self._idle, False
        if wake_up:
            self._wake_up.release()

    def when_idle(self) -> Future[None]:
        """A future that completes when no call waits or runs."""
        future: Future[None] = Future()
        with self._lock:
            self._idle_waiters.append(future)
            self._notify_if_idle()
        return future

    def waiting(self) -> list[Call]:
        """The calls that wait, in order."""
        with self._lock:
            return list(self._queue)

    def under_way(self) -> list[Call]:
        """What runs and waits."""
        with self._lock:
            return self.orphans()

    def orphans(self) -> list[Call]:
        """The same, read without the lock: a forked child may never get that."""
        calls = list(self._queue)
        return calls if self._running is None else [self._running, *calls]

    @property
    def queued(self) -> int:
        """How many calls wait. To be read under the lock, or as a hint."""
        return len(self._queue)

    # -- under the lock ------------------------------------------------------------------------

    def _claim(self, now: float) -> Call | None:
        """Take the next call out of the queue: to run it, or to drop it if it is too late."""
        call = self._queue.pop()
        if call is not None:
            if call.deadline is None or now < call.deadline:
                call.state = CallState.RUNNING
                call.started = now
                self._running = call
                self._counters.running = 1
            else:
                # Even if the thread is free in the very tick of the deadline: too late.
                self._drop([call], Departure.EXPIRED, _deadline_exceeded)
        return call

    def _examine(self, call: Call) -> tuple[list[Call], InferenceError | None]:
        """What must go to make room for ``call``, and the reason to refuse it, if there is one."""
        if self._refusal is not None:
            return [], self._refusal(retry_after(self._predicted_wait(call)))
        expired: list[Call] = []
        if self._queue.full:
            expired = self._queue.remove_expired(call.arrived)
            self._drop(expired, Departure.EXPIRED, _deadline_exceeded)
        wait = self._predicted_wait(call)
        if self._queue.full:
            return expired, _queue_full(len(self._queue), wait)
        if call.deadline is not None and call.arrived + wait > call.deadline:
            return expired, _too_little_time(call.deadline - call.arrived, wait)
        return expired, None

    def _predicted_wait(self, call: Call) -> float:
        service_time = self._counters.service_time
        wait = self._queue.ahead_of(call.priority) * service_time
        if self._running is not None:
            wait += max(0.0, service_time - (call.arrived - self._running.started))
        return wait

    def _drop(self, calls: Iterable[Call], departure: Departure, error: ErrorOf | None) -> None:
        for call in calls:
            call.error = None if error is None else error(call)
            call.state = CallState.DROPPED
            call.departure = departure
            call.work = None  # the arguments may be large
            self._count(departure)

    def _count(self, departure: Departure | None) -> None:
        if departure is Departure.EXPIRED:
            self._counters.expired += 1
        else:
            self._counters.cancelled += 1

    def _notify_if_idle(self) -> None:
        if self._idle_waiters and self._running is None and not self._queue:
            waiters, self._idle_waiters = self._idle_waiters, []
            for future in waiters:
                future.set_result(None)


def stopped(call: Call) -> Draining:
    """The error for an accepted call that has not ended when the runner stops."""
    if call.state is CallState.QUEUED:
        message = "the runner stopped before it could run this call"
    else:
        message = f"the runner stopped while {call.name} was still running; its result is lost"
    return Draining(message, retry_after=retry_after(0.0))


def _deadline_exceeded(call: Call) -> DeadlineExceeded:
    now = time.monotonic()
    if call.state is CallState.QUEUED:
        return DeadlineExceeded(
            f"the call's time was up after {now - call.arrived:.3g} s of waiting; it never ran",
            started=False,
            retry_after=retry_after(now - call.arrived),
        )
    return DeadlineExceeded(
        f"the call's time was up after {now - call.started:.3g} s of running; it runs on, and "
        f"its result will be thrown away",
        started=True,
    )


def _queue_full(queued: int, wait: float) -> QueueFull:
    return QueueFull(
        f"{queued} calls are waiting, as many as max_queue allows; repeat the call later, or "
        f"raise max_queue if clients can wait that long",
        retry_after=retry_after(wait),
    )


def _too_little_time(left: float, wait: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the call has {left:.3g} s and would wait about {wait:.3g} s; it was not queued",
        started=False,
        retry_after=retry_after(wait),
    )


def _client_disconnected(call: Call) -> ClientDisconnected:
    ran = "before its call ran" if call.state is CallState.QUEUED else "while its call ran"
    return ClientDisconnected(f"the client hung up {ran}")


def _post(calls: Iterable[Call]) -> None:
    """Wake the callers of calls that were dropped with an error."""
    for call in calls:
        call.port.post(call.waiter)


def retry_after(wait: float) -> float:
    """Seconds for ``Retry-After``: the predicted wait, within 1 and 60, give or take a fifth.

    The jitter keeps clients that were refused together from coming back together.
    """
    return min(60.0, max(1.0, wait * random.uniform(0.8, 1.2)))  # noqa: S311  # no secret
