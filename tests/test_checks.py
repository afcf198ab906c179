"""Bad input is refused where it comes in, in words that say what to write instead."""

from __future__ import annotations

import functools
import math
import re
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_infer import QueuePolicy
from asgi_infer._checks import (
    check_count,
    check_delay,
    check_func,
    check_grace,
    check_load,
    check_name,
    check_plain,
    check_priority,
    check_queue_policy,
    check_seconds,
    check_stream,
    check_warmup,
)


class Model:
    def predict(self, value: int) -> int:
        return value

    def copy(self) -> Model:
        return Model()


class NeedsPath:
    def __init__(self, path: str) -> None:
        self.path = path


class Callable_(Model):
    def __call__(self) -> int:
        return 1


async def async_function() -> None: ...


def generator_function() -> Iterator[int]:
    yield 1


async def async_generator_function() -> AsyncIterator[int]:
    yield 1


def refuses(check: Callable[..., object], *args: Any, match: str) -> None:
    """``check(*args)`` raises TypeError with that text."""
    with pytest.raises(TypeError, match=re.escape(match)):
        check(*args)


# -- load and warmup ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load",
    [None, Model, lambda: Model(), functools.partial(NeedsPath, "x"), Model().copy, dict],
    ids=["none", "class", "function", "partial", "method", "builtin"],
)
def test_load_accepts_what_makes_a_model(load: Any) -> None:
    """A class, a function, a method and a partial can make a model, and None means no model."""
    check_load(load)


@pytest.mark.parametrize("load", [Model(), Callable_(), 3, "model.onnx"])
def test_load_refuses_a_ready_model(load: Any) -> None:
    """A model that exists already was made on the wrong thread: the error says what to pass."""
    kind = type(load).__name__
    refuses(check_load, load, match=f"load is a {kind}, not a function that makes the model")
    refuses(check_load, load, match=f"InferenceRunner(lambda: {kind}(...))")


@pytest.mark.parametrize(
    ("func", "kind"),
    [
        (async_function, "an async function"),
        (generator_function, "a generator function"),
        (async_generator_function, "a generator function"),
        (functools.partial(async_function), "an async function"),
    ],
)
def test_lazy_functions_are_refused(func: Any, kind: str) -> None:
    """An async or generator function would run elsewhere, whatever it is passed as."""
    refuses(check_load, func, match=f"load must be a plain function, and {func!r} is {kind}")
    refuses(check_warmup, func, Model, match=f"warmup must be a plain function, and {func!r}")
    refuses(check_plain, "name", func, match=f"name must be a plain function, and {func!r}")


def test_load_takes_no_arguments() -> None:
    """A factory that needs arguments is refused before the thread starts, with their names."""
    refuses(check_load, NeedsPath, match="load must take no arguments")
    refuses(check_load, NeedsPath, match="'path'")


def test_warmup_accepts_a_function_of_the_model() -> None:
    """Anything callable with the model will do, and None."""
    check_warmup(None, None)
    check_warmup(lambda model: model.predict(1), Model)
    check_warmup(print, Model)


def test_warmup_is_refused() -> None:
    """A warm-up without a model, that isn't callable or takes no model, is refused."""
    refuses(check_warmup, print, None, match="pass load as well")
    refuses(check_warmup, 3, Model, match="warmup must be a function of the model, not int")
    refuses(check_warmup, lambda: None, Model, match="warmup must take model")


def test_without_signature() -> None:
    """What is written in C without a signature is let through: it will complain by itself."""
    check_load(dict)
    check_load(type)


# -- func --------------------------------------------------------------------------------------


@pytest.mark.parametrize("func", [len, Model, Model().predict, lambda: 1, functools.partial(len)])
def test_func_accepts_callables(func: Any) -> None:
    """Anything callable and plain can run."""
    check_func(func)


def test_func_refuses_a_result() -> None:
    """Passing the result instead of the function is the usual slip, and the error says so."""
    refuses(check_func, Model().predict(3), match="run(predict, x), and not its result")


@pytest.mark.parametrize(
    "func",
    [async_function, generator_function, async_generator_function],
    ids=lambda f: f.__name__,
)
def test_func_refuses_lazy_functions(func: Any) -> None:
    """An async or generator function is no call: its work would be done by the caller."""
    refuses(check_func, func, match="func must be a plain function")


# -- numbers and names -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [0.001, 1, 3600, np.float32(0.5), Fraction(1, 2), threading.TIMEOUT_MAX]
)
def test_seconds_accepts_durations(value: Any) -> None:
    """Any real number above 0 that the system can wait for is a duration."""
    seconds = check_seconds("timeout", value)
    assert type(seconds) is float
    assert seconds == float(value)


@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, -0.0, math.nan, math.inf, -math.inf, 1e308, 10**400, Fraction(10**400)),
        *(None, "1", b"1", "", "soon", 1j, Decimal(1), [1], np.array([1.0, 2.0])),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_seconds_refuses_all_else(value: Any) -> None:
    """NaN, infinity, zero, what is negative, too large, or no number: refused by name."""
    with pytest.raises(ValueError, match=r"^timeout must be a number of seconds greater than 0"):
        check_seconds("timeout", value)


@given(st.floats() | st.integers())
def test_seconds_never_lets_nonsense_through(value: float) -> None:
    """Whatever the number: either it is refused, or it is finite and above 0."""
    try:
        seconds = check_seconds("timeout", value)
    except ValueError:
        assert not 0 < value <= threading.TIMEOUT_MAX
    else:
        assert 0 < seconds <= threading.TIMEOUT_MAX


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *((2, 2.0), (np.float32(0.5), 0.5), (0, 0.0), (-1, 0.0), (-math.inf, 0.0)),
        *((-(10**400), 0.0), (math.inf, threading.TIMEOUT_MAX), (10**400, threading.TIMEOUT_MAX)),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_grace_accepts_numbers(value: Any, seconds: float) -> None:
    """Any number is a grace: less than nothing is nothing, and for ever is very long."""
    assert check_grace(value) == seconds


@pytest.mark.parametrize("value", [math.nan, None, "1", 1j, [1]])
def test_grace_refuses_all_else(value: Any) -> None:
    """What is no number is refused before anything is stopped."""
    with pytest.raises(ValueError, match="grace must be a number of seconds"):
        check_grace(value)


@pytest.mark.parametrize("value", [0, -5, sys.maxsize, True])
def test_priority_accepts_integers(value: int) -> None:
    """Any integer is a priority."""
    assert check_priority(value) == value


@pytest.mark.parametrize("value", [2**63, -(2**63), 10**400])
def test_priority_is_no_larger_than_seconds_can_be(value: int) -> None:
    """The queue makes seconds of it: one too large for a float would end the thread."""
    with pytest.raises(ValueError, match="priority must be from -9223372036854775807 to"):
        check_priority(value)


@pytest.mark.parametrize("value", [None, 0.0, 1.5, math.nan, "high", (1,)])
def test_priority_refuses_all_else(value: Any) -> None:
    """A priority that can't be compared with others would break the queue for everybody."""
    with pytest.raises(ValueError, match="priority must be an integer"):
        check_priority(value)


@pytest.mark.parametrize("value", [1, 128, 10**9])
def test_max_queue_accepts_counts(value: int) -> None:
    """Any count from 1 bounds a queue."""
    assert check_count("max_queue", value) == value


@pytest.mark.parametrize("value", [0, -1, True, None, 1.0, math.inf, "128"])
def test_max_queue_refuses_all_else(value: Any) -> None:
    """A queue without a bound, or without room, is refused."""
    with pytest.raises(ValueError, match="max_queue must be an integer of at least 1"):
        check_count("max_queue", value)


@pytest.mark.parametrize(
    ("value", "seconds"), [(0, 0.0), (0.0, 0.0), (1, 1.0), (np.float32(0.5), 0.5), (True, 1.0)]
)
def test_delay_accepts_numbers(value: Any, seconds: float) -> None:
    """A delay may be nothing."""
    assert check_delay("max_delay", value) == seconds


@pytest.mark.parametrize(
    "value", [-1, -0.001, math.nan, math.inf, -math.inf, 10**400, None, "1", 1j, [1]]
)
def test_delay_refuses_all_else(value: Any) -> None:
    """What is negative, endless or no number is refused by name."""
    with pytest.raises(ValueError, match=r"^max_delay must be a number of seconds, 0 or more"):
        check_delay("max_delay", value)


def test_queue_policy() -> None:
    """A policy is a policy."""
    policy = QueuePolicy()
    assert check_queue_policy(policy) is policy


@pytest.mark.parametrize("value", [None, "newest", QueuePolicy, {"overload": "newest"}, 128])
def test_queue_policy_refuses_all_else(value: Any) -> None:
    """Anything else is not, and the error shows how to write one."""
    with pytest.raises(TypeError, match=r"queue must be a QueuePolicy, .*QueuePolicy\(overload="):
        check_queue_policy(value)


@pytest.mark.parametrize(
    "value", [generator_function, functools.partial(generator_function), lambda: iter([]), iter]
)
def test_stream_accepts_functions(value: Any) -> None:
    """Generator functions, and plain ones: they may return an iterator."""
    check_stream(value)


@pytest.mark.parametrize(
    "value", [async_function, async_generator_function, functools.partial(async_function)]
)
def test_stream_refuses_async(value: Any) -> None:
    """Async functions would run elsewhere."""
    with pytest.raises(TypeError, match=r"must be a plain generator function, and .* is async"):
        check_stream(value)


@pytest.mark.parametrize("value", [generator_function(), [1, 2], None, "text"])
def test_stream_refuses_what_can_not_be_called(value: Any) -> None:
    """A generator that is there already was made on the wrong thread: the error shows how."""
    with pytest.raises(
        TypeError, match=r"stream\(generate, x\), and not .*stream\(generate\(x\)\)"
    ):
        check_stream(value)


def test_name_accepts_text() -> None:
    """Any text names a runner."""
    assert check_name("модель") == "модель"


@pytest.mark.parametrize("value", ["", "  \n", None, 3, b"ocr"])
def test_name_refuses_all_else(value: Any) -> None:
    """A runner without a readable name can't be found in logs, nor among several."""
    with pytest.raises(ValueError, match="name must be a text that is not empty"):
        check_name(value)
