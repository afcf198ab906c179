"""What a runner asks of the place where its model lives."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Protocol

from .._call import Work
from ..native import NativePolicy


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """How to make the model, and under what: all that a worker needs to know to open."""

    name: str
    load: Callable[[], Any] | None
    warmup: Callable[[Any], object] | None
    native: NativePolicy


class LazyResult(TypeError):
    """A function has returned something that has yet to run, whatever its arguments were."""


class Steps(Protocol):
    """A generator where the model lives. Used by the inference thread alone."""

    def __next__(self) -> Any:
        """Its next item; raises ``StopIteration`` when it has ended, and whatever it raises."""
        ...

    def close(self) -> None:
        """End it: its ``finally`` blocks run, where the model lives."""
        ...


class OpenWorker(Protocol):
    """A worker with its model loaded. Used by the inference thread alone."""

    def execute(self, work: Work, context: Context, /) -> Any:
        """Resolve the references in ``work`` and run it in ``context``."""
        ...

    def iterate(self, work: Work, context: Context, /) -> Steps:
        """The same for a function that returns a generator; return what steps that."""
        ...

    def close(self) -> None:
        """Destroy the model where it lives, and undo what ``open`` did."""
        ...


class Worker(Protocol):
    """Where a model lives: a description without state, so that runners may share one."""

    def open(self, spec: ModelSpec, /) -> OpenWorker:
        """Load and warm up the model. Called on the inference thread, before its first call."""
        ...
