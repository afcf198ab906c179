"""Full-CPU native inference inside an ASGI application: one thread owns the model."""

from ._call import check_cancelled
from ._errors import (
    CallCancelled,
    CallFailed,
    ClientDisconnected,
    DeadlineExceeded,
    Draining,
    InferenceError,
    NotReady,
    QueueFull,
    ReentrantCall,
)
from ._lookup import runner_from
from ._runner import InferenceRunner
from ._statistics import RunnerStatistics
from .middleware import InferenceMiddleware, InvalidDeadline
from .native import NativePolicy
from .workers import ThreadWorker

__all__ = [
    "CallCancelled",
    "CallFailed",
    "ClientDisconnected",
    "DeadlineExceeded",
    "Draining",
    "InferenceError",
    "InferenceMiddleware",
    "InferenceRunner",
    "InvalidDeadline",
    "NativePolicy",
    "NotReady",
    "QueueFull",
    "ReentrantCall",
    "RunnerStatistics",
    "ThreadWorker",
    "check_cancelled",
    "runner_from",
]
