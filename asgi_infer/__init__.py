"""Full-CPU native inference inside an ASGI application: one thread owns the model."""

from ._batcher import Batcher
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
    WorkerCrashed,
)
from ._lookup import runner_from
from ._queue_policy import QueuePolicy
from ._runner import InferenceRunner
from ._statistics import RunnerStatistics
from ._stream import Stream
from .middleware import InferenceMiddleware
from .native import NativePolicy

__all__ = [
    "Batcher",
    "CallCancelled",
    "CallFailed",
    "ClientDisconnected",
    "DeadlineExceeded",
    "Draining",
    "InferenceError",
    "InferenceMiddleware",
    "InferenceRunner",
    "NativePolicy",
    "NotReady",
    "QueueFull",
    "QueuePolicy",
    "ReentrantCall",
    "RunnerStatistics",
    "Stream",
    "WorkerCrashed",
    "check_cancelled",
    "runner_from",
]
