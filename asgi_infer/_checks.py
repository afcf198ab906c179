"""Bad input is refused where it comes in, in words that say what to write instead."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import partial
from numbers import Real
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from ._queue_policy import QueuePolicy

_MAX_PRIORITY = 2**63 - 1

_FACTORIES = (type, FunctionType, MethodType, BuiltinFunctionType, partial)


def check_load(load: Any) -> None:
    """``load`` must make a model, not be one.

    :raises TypeError: it is something else than a class or plain function without arguments
    """
    if load is None:
        return
    if not isinstance(load, _FACTORIES):
        kind = type(load).__qualname__
        raise TypeError(
            f"load is a {kind}, not a function that makes the model. A model that exists "
            f"already was made on the wrong thread; pass what makes it: "
            f"InferenceRunner(lambda: {kind}(...))"
        )
    check_plain("load", load)
    _check_arguments("load", load, ())


def check_warmup(warmup: Any, load: Any) -> None:
    """``warmup`` must be a plain function of the model.

    :raises TypeError: it is not
    """
    if warmup is None:
        return
    if load is None:
        raise TypeError("warmup needs a model to warm up: pass load as well")
    if not callable(warmup):
        raise TypeError(f"warmup must be a function of the model, not {type(warmup).__qualname__}")
    check_plain("warmup", warmup)
    _check_arguments("warmup", warmup, ("model",))


def check_func(func: Any) -> None:
    """What is to run must be callable and plain. Cheap: this is on the path of every call.

    :raises TypeError: it is not
    """
    if not callable(func):
        raise TypeError(
            f"func must be callable, not {type(func).__qualname__}: pass the function and its "
            f"arguments, run(predict, x), and not its result, run(predict(x))"
        )
    code = getattr(func, "__code__", None)
    if code is not None and code.co_flags & _LAZY_FLAGS:
        check_plain("func", func)


def check_stream(func: Any) -> None:
    """What is to be streamed must be callable and not async: a generator function, as a rule.

    :raises TypeError: it is not
    """
    if not callable(func):
        raise TypeError(
            f"func must be a generator function, not {type(func).__qualname__}: pass the function "
            f"and its arguments, stream(generate, x), and not what it returns, stream(generate(x))"
        )
    if inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
        raise TypeError(
            f"func must be a plain generator function, and {func!r} is async. It needs no await: "
            f"it has a thread to itself"
        )


def check_plain(name: str, func: Callable[..., Any]) -> None:
    """``func`` must not be async, nor a generator function.

    :raises TypeError: it is
    """
    if inspect.iscoroutinefunction(func):
        kind, instead = "an async function", "It needs no await: it has a thread to itself"
    elif inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
        kind, instead = "a generator function", "Return a list"
    else:
        return
    raise TypeError(f"{name} must be a plain function, and {func!r} is {kind}. {instead}")


def check_seconds(name: str, value: Any) -> float:
    """A duration: a positive, finite number of seconds.

    :raises ValueError: it is anything else
    """
    # Compared before it is converted: an integer may be too large for a float.
    if isinstance(value, Real) and value <= threading.TIMEOUT_MAX and not value <= 0:
        return float(value)
    raise ValueError(
        f"{name} must be a number of seconds greater than 0 (or None for no limit), not {value!r}"
    )


def check_delay(name: str, value: Any) -> float:
    """A duration that may be nothing: a finite number of seconds, 0 or more.

    :raises ValueError: it is anything else
    """
    if isinstance(value, Real) and 0 <= value <= threading.TIMEOUT_MAX:  # type: ignore[operator]
        return float(value)
    raise ValueError(f"{name} must be a number of seconds, 0 or more, not {value!r}")


def check_grace(value: Any) -> float:
    """How long to wait at the end: any number of seconds, 0 and less for not at all.

    :raises ValueError: it is no number
    """
    if isinstance(value, Real):
        seconds: Any = value  # Real has no type for the operators below
        if seconds >= threading.TIMEOUT_MAX:
            return threading.TIMEOUT_MAX
        if seconds > 0:
            return float(seconds)
        if seconds <= 0:  # which NaN isn't either
            return 0.0
    raise ValueError(f"grace must be a number of seconds, not {value!r}")


def check_priority(value: Any) -> int:
    """A priority: any integer of 64 bits, since the queue makes seconds of it, which are floats.

    :raises ValueError: it is anything else
    """
    if isinstance(value, int) and abs(value) <= _MAX_PRIORITY:
        return value
    if isinstance(value, int):  # not in the message: it may have more digits than Python prints
        raise ValueError(f"priority must be from {-_MAX_PRIORITY} to {_MAX_PRIORITY}")
    raise ValueError(f"priority must be an integer (lower runs sooner), not {value!r}")


def check_count(name: str, value: Any) -> int:
    """A number of things: at least one.

    :raises ValueError: it is no integer, or less than 1
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
    return value


def check_queue_policy(value: Any) -> QueuePolicy:
    """What orders a queue.

    :raises TypeError: it is no policy
    """
    if not isinstance(value, QueuePolicy):
        raise TypeError(f"queue must be a QueuePolicy, not {value!r}: QueuePolicy(overload=...)")
    return value


def check_name(value: Any) -> str:
    """A runner's name.

    :raises ValueError: it is no text, or empty
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"name must be a text that is not empty, not {value!r}")
    return value


_LAZY_FLAGS = inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def _check_arguments(name: str, func: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):  # written in C, without a signature: it will tell itself
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        wanted = " and ".join(arguments) or "no arguments"
        raise TypeError(f"{name} must take {wanted}, and {func!r} does not: {error}") from None
