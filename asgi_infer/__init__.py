"""Full-CPU native inference inside an ASGI application: one thread owns the model, all await it."""


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
from ._runner import InferenceRunner
from ._statistics import RunnerStatistics
from .native import NativePolicy
from .workers import ThreadWorker

