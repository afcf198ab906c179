"""The model lives on the inference thread itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any

from .._call import Call
from .._model import name_of, resolve_work
from ._protocol import ModelSpec

_LAZY = {CoroutineType: "coroutine", GeneratorType: "generator", AsyncGeneratorType: "generator"}

_PLAIN = frozenset(
    {type(None), bool, int, float, str, bytes, list, tuple, dict}
)  # the common ones


@dataclass(frozen=True)
class ThreadWorker:
    """Keep the model on the runner's own thread: load, warm-up and every call happen there.

    The right place for a model whose binding releases the GIL while it computes, as NumPy,
    PyTorch, scikit-learn and ONNX Runtime do.
    """

    def open(self, spec: ModelSpec, /) -> OpenThreadWorker:
        """Set this thread up, load the model on it, and warm it up."""
        return OpenThreadWorker(spec)


class OpenThreadWorker:
    """A model on the current thread, and the contexts that it runs in."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec  # what references to this model carry as their owner
        with ExitStack() as stack:
            spec.native.enter(stack, name=spec.name)
            self._model = None if spec.load is None else _load(spec.load)
            spec.native.limit_threads()  # again: loading may have brought new runtimes
            stack.callback(self._destroy)
            if spec.warmup is not None:
                spec.warmup(self._model)
            self._stack = stack.pop_all()

    def execute(self, call: Call, /) -> Any:
        """Call the function in its caller's context.

        :raises TypeError: it returned something that has yet to run, elsewhere
        """
        func, args = resolve_work(call.work, self._spec, self._model)
        result = call.context.run(func, *args)
        kind = type(result)
        if kind not in _PLAIN and (kind in _LAZY or hasattr(kind, "__await__")):
            _reject_lazy(result, func)
        return result

    def close(self) -> None:
        """Destroy the model on this thread, then leave the contexts."""
        self._stack.close()

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


def _load(load: Callable[[], Any]) -> Any:
    model = load()
    if isinstance(model, CoroutineType):
        _reject_lazy(model, load)
    return model


def _reject_lazy(result: Any, func: Any) -> None:
    kind = _LAZY.get(type(result), "awaitable")
    if hasattr(result, "close"):
        result.close()  # or Python warns that it was never awaited
    raise TypeError(
        f"{name_of(func)} returned a {kind}, which would run elsewhere than on the inference "
        f"thread; pass a plain function that returns its result"
    )
