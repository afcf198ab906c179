"""Where a model lives and how a call reaches it."""

from .._restarts import RestartPolicy
from .thread import ThreadWorker

__all__ = ["RestartPolicy", "ThreadWorker"]
