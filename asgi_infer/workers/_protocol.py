"""What a runner asks of the place where its model lives."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from .._call import Call, Work
from .._restarts import Restarts
from .._slot import Latch
from ..native import NativePolicy
from ..native.procfs import ThreadUsage


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """How to make the model, and under what: all that a worker needs to know to open."""

    name: str
    load: Callable[[], Any] | None
    warmup: Callable[[Any], object] | None
    native: NativePolicy


class LazyResult(TypeError):
    """A function has returned something that has yet to run, whatever its arguments were."""


class Used(NamedTuple):
    """What has been counted elsewhere: as ``getrusage`` has it."""

    ru_nvcsw: int = 0
    ru_minflt: int = 0
    seconds: float = 0.0
    """CPU time of the whole process."""

    def after(self, earlier: Used, /) -> Used:
        """The sum with what had been counted before."""
        if earlier is NOTHING_USED:  # the usual case
            return self
        return Used(
            earlier.ru_nvcsw + self.ru_nvcsw,
            earlier.ru_minflt + self.ru_minflt,
            earlier.seconds + self.seconds,
        )


NOTHING_USED = Used()


class Steps(Protocol):
    """A generator where the model lives. Used by the inference thread alone."""

    def __next__(self) -> Any:
        """Its next item; raises ``StopIteration`` when it has ended, and whatever it raises."""
        ...

    def close(self) -> None:
        """End it: its ``finally`` blocks run, where the model lives."""
        ...


class Runs(Protocol):
    """What runs calls: all that they need of a replica."""

    def execute(self, work: Work, context: Context, /) -> Any:
        """Resolve the references in ``work`` and run it in ``context``."""
        ...

    def iterate(self, work: Work, context: Context, /) -> Steps:
        """The same for a function that returns a generator; return what steps that."""
        ...


class Replica(Runs, Protocol):
    """One model, wherever it lives. Used by its inference thread alone, but where said so."""

    restarts: Restarts
    """When to open it again if it is lost."""

    @property
    def lost(self) -> bool:
        """Whether its model has gone, and it is to be opened again before the next call."""
        ...

    @property
    def wake_up(self) -> Latch:
        """What its thread sleeps on. One that is not released may let go if the model is lost."""
        ...

    def open(self, lost: Callable[[], object], /) -> None:
        """Load the model and warm it up. Called before the first call, and when it was lost.

        :param lost: to be called as soon as the model has gone by itself, on this thread
        :raises Exception: what ``load`` or ``warmup`` raises
        """
        ...

    def close(self) -> None:
        """Destroy the model where it lives, and undo what ``open`` did, also if that failed."""
        ...

    def interrupt(self) -> None:
        """Nobody waits any more for what it does: end that if it can be ended. Any thread."""
        ...

    def leave_behind(self) -> None:
        """In a forked child, where it is nobody's: let go of what can be let go of safely."""
        ...

    def notice(self, call: Call, /) -> None:
        """The caller of ``call``, which runs, has left. Any thread, under the scheduler's lock."""
        ...

    def counted(self) -> ThreadUsage:
        """What has been counted so far for the thread that runs the model."""
        ...

    def cpu_time(self) -> float:
        """Seconds of CPU that the process which runs the model has used so far."""
        ...


class Worker(Protocol):
    """Where a model lives: a description without state, so that runners may share one."""

    @property
    def replicas(self) -> int:
        """How many models there are, and calls that run at once."""
        ...

    @property
    def local(self) -> bool:
        """Whether the model lives in this process."""
        ...

    def replica(self, spec: ModelSpec, number: int, /) -> Replica:
        """The one of that number. Nothing is started, and nothing but ``spec`` is held."""
        ...
