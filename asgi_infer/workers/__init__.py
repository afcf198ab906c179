"""Where a model lives and how a call reaches it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .._restarts import RestartPolicy
from .thread import ThreadWorker

if TYPE_CHECKING:
    from ._errors_across import RemoteError
    from .process import ProcessWorker
    from .ray import RayWorker
    from .shared import SharedWorker

__all__ = [
    "ProcessWorker",
    "RayWorker",
    "RemoteError",
    "RestartPolicy",
    "SharedWorker",
    "ThreadWorker",
]

_LATER = {
    "ProcessWorker": ".process",
    "RayWorker": ".ray",
    "RemoteError": "._errors_across",
    "SharedWorker": ".shared",
}
"""Loaded when they are asked for: most servers need none of what starts processes."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)
