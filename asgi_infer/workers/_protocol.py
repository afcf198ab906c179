"""What a runner asks of the place where its model lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .._call import Call
from ..native import NativePolicy


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """How to make the model, and under what: all that a worker needs to know to open."""

    name: str
    load: Callable[[], Any] | None
    warmup: Callable[[Any], object] | None
    native: NativePolicy


class OpenWorker(Protocol):
    """A worker with its model loaded. Used by the inference thread alone."""

    def execute(self, call: Call, /) -> Any:
        """Resolve the references in the call's work, run it, return the result or raise."""
        ...

    def close(self) -> None:
        """Destroy the model where it lives, and undo what ``open`` did."""
        ...


class Worker(Protocol):
    """Where a model lives: a description without state, so that runners may share one."""

    def open(self, spec: ModelSpec, /) -> OpenWorker:
        """Load and warm up the model. Called on the inference thread, before its first call."""
        ...
