"""What can go wrong with the calls of an inline runner, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from .._checks import check_delay
from .._errors import Draining, NotReady, WorkerCrashed
from .._queue import CallQueue
from .._refusals import Refusal
from .._scheduler import Scheduler
from ._clock import VirtualClock


@dataclass(kw_only=True)
class Fault:
    """What goes wrong at the moment. Written by the test, read wherever calls run."""

    seconds: float = 0.0
    """What each turn takes."""
    error: BaseException | type[BaseException] | None = None
    crash: bool = False
    """Whether the process of the model dies, if it has one."""
    gone: bool = False
    """Whether clients hang up."""
    full: bool = False
    refusal: Refusal | None = None
    state: str | None = None
    """As of statistics."""

    def strike(self, scheduler: Scheduler) -> None:
        """A function is about to be called: what happens to those who wait for it."""
        cast("VirtualClock", scheduler.clock).advance(self.seconds)
        for call in scheduler.under_way() if self.gone else ():
            scheduler.disconnect(call)

    def check(self, scheduler: Scheduler) -> None:
        """Raise what comes instead of the function's result, if anything does."""
        if self.crash:
            scheduler.set_down(scheduler.slots[0], down=False)  # it counts as loaded again
            raise WorkerCrashed(
                "the process of the model died while it ran this call, since the test says so"
            )
        if self.error is not None:
            raise self.error


class Faults:
    """Blocks in which calls go wrong. They can be nested.

    Each brings about what happens in earnest, so that errors, headers and statistics are those
    that clients and dashboards would see.

    :ivar clock: the time that deadlines are on
    """

    clock: VirtualClock
    _fault: Fault

    def slow(self, seconds: float) -> AbstractContextManager[None]:
        """Each call takes ``seconds`` on the clock, and so does each step of a stream.

        A call whose time is shorter gets ``DeadlineExceeded(started=True)``, and counts as late:
        its function runs, and ``check_cancelled()`` inside it raises.
        """
        return self._while(seconds=check_delay("seconds", seconds))

    def full(self) -> AbstractContextManager[None]:
        """As many calls wait as ``max_queue`` allows: new ones get ``QueueFull``."""
        return self._while(full=True)

    def failing(self, error: BaseException | type[BaseException]) -> AbstractContextManager[None]:
        """Functions raise ``error`` instead of being called.

        One that is no ``Exception``, such as ``SystemExit``, reaches callers as ``CallFailed``.
        """
        return self._while(error=error)

    def crashing(self) -> AbstractContextManager[None]:
        """The process of the model dies in each call, and is started again: ``WorkerCrashed``.

        Functions are not called. It is the same whether the runner has a ``ProcessWorker`` or not.
        """
        return self._while(crash=True)

    def disconnected(self) -> AbstractContextManager[None]:
        """Clients hang up as soon as their calls run: ``ClientDisconnected``.

        The function runs, as it does in earnest, and ``check_cancelled()`` inside it raises.
        """
        return self._while(gone=True)

    def draining(self) -> AbstractContextManager[None]:
        """The runner is stopping: new calls get ``Draining``."""
        message = "the runner is stopping and takes no calls, since the test says so"
        return self._while(
            refusal=lambda again: Draining(message, retry_after=again), state="draining"
        )

    def not_ready(self) -> AbstractContextManager[None]:
        """The model did not load: calls get ``NotReady``."""
        message = "the model did not load, since the test says so"
        return self._while(
            refusal=lambda again: NotReady(message, retry_after=again), state="failed"
        )

    @contextmanager
    def _while(self, **changes: Any) -> Iterator[None]:
        fault = self._fault
        before = {name: getattr(fault, name) for name in changes}
        for name, value in changes.items():
            setattr(fault, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(fault, name, value)


class FullQueue(CallQueue):
    """A queue full of other people's calls. Nothing is ever taken out of it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size

    def ahead_of(self, priority: int, now: float) -> dict[object, int]:
        """All of them."""
        del priority, now
        return {None: self.size}
