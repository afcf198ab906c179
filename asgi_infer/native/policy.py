"""What a model's thread, and through it every native thread the model starts, runs under."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cache

from . import cpu, memory, openblas, openmp, procfs

logger = logging.getLogger("asgi_infer")


@dataclass(frozen=True, kw_only=True)
class NativePolicy:
    """How the inference thread is set up before the model is loaded on it.

    :param threads: native threads for each parallel region; by default as many as the affinity
        mask and the cgroup's quota (rounded down) allow. Never raises a lower limit that is in
        force already, such as ``OMP_NUM_THREADS``
    :param cpus: the CPUs to run on; by default those allowed when the package was imported
    :param nice: added to the process's niceness, 0 to 19. Above 0 the event loop gets the CPU
        sooner when it has something to do; but where other programs want the CPUs as well, a
        nicer model gets next to nothing. For machines that nobody else uses
    :param retain_memory: keep freed memory instead of returning it to the kernel after each
        call. For the whole process, and for good: see ``asgi_infer.native.memory``
    :param contexts: factories of context managers, entered on the thread before the model is
        loaded and left after it is gone: ``contexts=(torch.inference_mode,)``
    :raises ValueError: a value makes no sense
    """

    threads: int | None = None
    cpus: Collection[int] | None = None
    nice: int = 0
    retain_memory: bool = False
    contexts: tuple[Callable[[], AbstractContextManager[object]], ...] = ()

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1 (or None to choose), not {self.threads}")
        if self.cpus is not None and not self.cpus:
            raise ValueError("cpus must name at least one CPU (or be None for all)")
        if not 0 <= self.nice <= 19:
            raise ValueError(f"nice must be between 0 and 19, not {self.nice}")
        if not all(callable(context) for context in self.contexts):
            raise ValueError("contexts takes factories: contexts=(torch.inference_mode,), no call")

    @property
    def thread_count(self) -> int:
        """The number of native threads this comes to on this machine."""
        if self.threads is not None:
            return self.threads
        return cpu.recommended_threads(frozenset(self.cpus or cpu.IMPORT_AFFINITY))

    def enter(self, stack: ExitStack, *, name: str) -> None:
        """Set the calling thread up, and enter the contexts on ``stack``.

        What the system refuses is logged, not raised: a model at the wrong niceness still works.

        :param name: the thread's name for the kernel
        :raises Exception: whatever a context raises
        """
        if sys.platform == "linux":
            self._attempt("name the thread", lambda: procfs.set_thread_name(name))
            self._attempt("set the CPU affinity", self._set_affinity)
            self._attempt("set the niceness", self._set_niceness)
        else:  # pragma: no cover  # other systems
            _say_once()
        if self.retain_memory:
            memory.retain_memory()
        _here.thread_count = self.thread_count
        self.limit_threads()
        for context in self.contexts:
            stack.enter_context(context())

    def limit_threads(self) -> None:
        """Hold what is loaded by now to ``thread_count``, on this thread.

        OpenBLAS, which has one pool for all threads, is held to it in the whole process.
        """
        count = self.thread_count
        openmp.limit_threads(count)
        openblas.limit_threads(count)

    def _set_affinity(self) -> None:
        os.sched_setaffinity(0, self.cpus or cpu.IMPORT_AFFINITY)

    def _set_niceness(self) -> None:
        # Linux keeps niceness for each thread, whatever POSIX says of processes.
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + self.nice
        os.setpriority(os.PRIO_PROCESS, thread, min(19, niceness))

    @staticmethod
    def _attempt(what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            logger.warning("could not %s of the model: %s", what, error)


class _Here(threading.local):
    """Thread-local: no guard."""

    thread_count: int | None = None
    """What the policy that this thread is under comes to."""


_here = _Here()


def thread_count() -> int:
    """How many threads to give to a library that takes a number of its own.

    While a model is loaded, the number of its runner's ``NativePolicy``; elsewhere what this
    machine recommends. ONNX Runtime, for one, neither asks OpenMP nor looks at quotas, and
    binds its threads to CPUs unless it is told a number::

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = thread_count()
    """
    return _here.thread_count or cpu.recommended_threads()


@cache
def _say_once() -> None:  # pragma: no cover  # other systems
    logger.info("thread name, affinity and niceness are set on Linux only")
