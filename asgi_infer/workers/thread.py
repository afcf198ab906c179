"""The model lives on the inference thread itself."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from contextvars import Context
from dataclasses import dataclass
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, NoReturn

from .._call import Call, Work
from .._model import name_of, resolve_work
from .._restarts import NEVER
from .._slot import Latch
from ..native.procfs import thread_usage
from ._protocol import LazyResult, ModelSpec, Steps

_LAZY = {
    CoroutineType: "a coroutine",
    GeneratorType: "a generator",
    AsyncGeneratorType: "an async generator",
}

_PLAIN = frozenset(
    {type(None), bool, int, float, str, bytes, list, tuple, dict}
)  # the common ones


@dataclass(frozen=True)
class ThreadWorker:
    """Keep the model on the runner's own thread: load, warm-up and every call happen there.

    The right place for a model whose binding releases the GIL while it computes, as NumPy,
    PyTorch, scikit-learn and ONNX Runtime do.
    """

    @property
    def replicas(self) -> int:
        """One: a second one in the same process would slow both down."""
        return 1

    @property
    def local(self) -> bool:
        """The model lives in this process."""
        return True

    def replica(self, spec: ModelSpec, number: int, /) -> ThreadReplica:
        """The model of ``spec``, on the thread that opens it."""
        del number
        return ThreadReplica(spec)


class ThreadReplica:
    """A model on the current thread, and the contexts that it runs in."""

    restarts = NEVER
    lost = False
    counted = staticmethod(thread_usage)
    cpu_time = staticmethod(time.process_time)

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec  # what references to this model carry as their owner
        self._model: Any = None
        self._stack = ExitStack()

    @property
    def wake_up(self) -> Latch:
        """A lock that is held until it is released."""
        lock = threading.Lock()
        lock.acquire()
        return lock

    def open(self, lost: Callable[[], object], /) -> None:
        """Set this thread up, load the model on it, and warm it up."""
        del lost  # it goes with the process
        spec = self._spec
        with ExitStack() as stack:
            spec.native.enter(stack, name=spec.name)
            self._model = None if spec.load is None else load_model(spec.load)
            spec.native.limit_threads()  # again: loading may have brought new runtimes
            stack.callback(self._destroy)
            if spec.warmup is not None:
                spec.warmup(self._model)
            self._stack = stack.pop_all()

    def execute(self, work: Work, context: Context, /) -> Any:
        """Call the function in its caller's context.

        :raises TypeError: it returned something that has yet to run, elsewhere
        """
        func, args = resolve_work(work, self._spec, self._model)
        result = context.run(func, *args)
        kind = type(result)
        if kind not in _PLAIN and (kind in _LAZY or hasattr(kind, "__await__")):
            _reject_lazy(result, func)
        return result

    def iterate(self, work: Work, context: Context, /) -> Steps:
        """Call the function, which returns a generator, in its caller's context.

        :raises TypeError: it returned something else
        """
        func, args = resolve_work(work, self._spec, self._model)
        generator = context.run(func, *args)
        if not isinstance(generator, Iterator):
            _reject_no_generator(generator, func)
        return OpenGenerator(generator, context, func)

    def close(self) -> None:
        """Destroy the model on this thread, then leave the contexts."""
        self._stack.close()

    def interrupt(self) -> None:
        """A function on a thread can't be ended from outside."""

    def leave_behind(self) -> None:
        """Its native threads did not come along: a destructor that joins them would hang."""
        leak(self._model)
        leak(self._stack)

    def notice(self, call: Call, /) -> None:
        """``check_cancelled()`` looks at the call itself."""

    def _destroy(self) -> None:
        try:
            model = weakref.ref(self._model)
        except TypeError:  # a type without weak references: dropping it has to do
            self._model = None
            return
        self._model = None
        # In a reference cycle it would wait for the next collection, on whatever thread that is.
        if model() is not None:
            gc.collect()


class OpenGenerator:
    """A generator on the current thread, stepped in the context of its caller."""

    def __init__(self, generator: Iterator[Any], context: Context, func: Any) -> None:
        self._generator = generator
        self._context = context
        self._func = func

    def __next__(self) -> Any:
        item = self._context.run(next, self._generator)
        kind = type(item)
        if kind not in _PLAIN and (kind in _LAZY or hasattr(kind, "__await__")):
            _reject_lazy(item, self._func, did="yielded")
        return item

    def close(self) -> None:
        """Run the generator's ``finally`` blocks, if it is one: other iterators may have none."""
        close = getattr(self._generator, "close", None)
        # Tracebacks lead to this object: they must not keep the model alive, nor end it elsewhere.
        del self._generator, self._func
        if close is not None:
            self._context.run(close)


def leak(thing: object) -> None:
    """Never destroy ``thing``."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def load_model(load: Callable[[], Any]) -> Any:
    """What ``load`` makes.

    :raises TypeError: that is a coroutine
    """
    model = load()
    if isinstance(model, CoroutineType):
        _reject_lazy(model, load)
    return model


def _reject_no_generator(result: Any, func: Any) -> NoReturn:
    if hasattr(result, "close") and hasattr(type(result), "__await__"):
        result.close()  # or Python warns that it was never awaited
    raise TypeError(
        f"{name_of(func)} returned a {type(result).__qualname__}, and a stream needs a generator: "
        f"write it with yield, or return iter(...), or use run() for a function with one result"
    )


def _reject_lazy(result: Any, func: Any, *, did: str = "returned") -> NoReturn:
    kind = _LAZY.get(type(result), "an awaitable")
    if hasattr(result, "close"):
        result.close()  # or Python warns that it was never awaited
    instead = "pass a plain function that returns its result"
    if did == "yielded":
        instead = "yield what is there already"
    elif kind == _LAZY[GeneratorType]:
        instead = "use stream() for it, or return a list"
    raise LazyResult(
        f"{name_of(func)} {did} {kind}, which would run elsewhere than on the inference "
        f"thread; {instead}"
    )
