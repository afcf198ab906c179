"""Where a model lives and how a call reaches it."""

from .._restarts import RestartPolicy
from ._errors_across import RemoteError
from .process import ProcessWorker
from .thread import ThreadWorker

__all__ = ["ProcessWorker", "RemoteError", "RestartPolicy", "ThreadWorker"]
