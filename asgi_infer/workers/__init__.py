"""Where a model lives and how a call reaches it."""

from .thread import ThreadWorker

__all__ = ["ThreadWorker"]
