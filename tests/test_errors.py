"""The exception tree: what clients see, and what developers see."""

from __future__ import annotations

import inspect
from typing import NoReturn

import pytest
from starlette.exceptions import HTTPException

from asgi_infer import _errors
from asgi_infer._errors import (
    CallCancelled,
    CallFailed,
    ClientDisconnected,
    DeadlineExceeded,
    Draining,
    InferenceError,
    NotReady,
    QueueFull,
    ReentrantCall,
    describe,
)

SECRET = "float32[1, 784] at row 17"


def make(kind: type[InferenceError], retry_after: float | None = None) -> InferenceError:
    if kind is DeadlineExceeded:
        return DeadlineExceeded(SECRET, started=False, retry_after=retry_after)
    return kind(SECRET, retry_after=retry_after)


KINDS: dict[type[InferenceError], int] = {
    QueueFull: 503,
    Draining: 503,
    NotReady: 503,
    DeadlineExceeded: 504,
    ClientDisconnected: 499,
    CallFailed: 500,
    ReentrantCall: 500,
}


@pytest.mark.parametrize(("kind", "status"), KINDS.items(), ids=lambda value: str(value))
def test_status(kind: type[InferenceError], status: int) -> None:
    """Every error is an HTTPException with the status that fits, so that no handler is needed."""
    error = make(kind)
    assert isinstance(error, HTTPException)
    assert error.status_code == status


@pytest.mark.parametrize("kind", KINDS)
def test_two_audiences(kind: type[InferenceError]) -> None:
    """The developer reads the message, and the client a detail with nothing of it."""
    error = make(kind)
    assert str(error) == SECRET
    assert repr(error) == f"{kind.__name__}({SECRET!r})"
    assert error.detail
    assert SECRET not in error.detail


@pytest.mark.parametrize("kind", KINDS)
def test_no_retry_after(kind: type[InferenceError]) -> None:
    """Without a prediction there is no Retry-After header."""
    assert make(kind).headers is None


@pytest.mark.parametrize(("seconds", "header"), [(1.0, "1"), (1.01, "2"), (59.5, "60")])
def test_retry_after_is_rounded_up(seconds: float, header: str) -> None:
    """Retry-After is in whole seconds, and never early."""
    error = make(QueueFull, retry_after=seconds)
    assert error.headers == {"Retry-After": header}
    assert error.retry_after == seconds


def test_deadline_exceeded_is_a_timeout() -> None:
    """``except TimeoutError`` catches DeadlineExceeded, and ``started`` tells what happened."""
    with pytest.raises(TimeoutError) as caught:
        raise DeadlineExceeded("too late", started=True)
    assert isinstance(caught.value, DeadlineExceeded)
    assert caught.value.started


@pytest.mark.parametrize("kind", [Draining, ReentrantCall])
def test_misuse_is_a_runtime_error(kind: type[InferenceError]) -> None:
    """What the standard library's executors raise RuntimeError for is one here as well."""
    assert issubclass(kind, RuntimeError)


def test_call_cancelled_passes_except_exception() -> None:
    """A model's ``except Exception`` doesn't swallow a cancellation."""
    assert issubclass(CallCancelled, BaseException)
    assert not issubclass(CallCancelled, Exception)


class Unprintable(Exception):
    def __str__(self) -> NoReturn:
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LookupError("gone"), "LookupError: gone"),
        (NotReady("no model"), "NotReady: no model"),
        (Unprintable("gone"), "Unprintable"),
    ],
    ids=["usual", "own", "unprintable"],
)
def test_describe(error: Exception, text: str) -> None:
    """Any error can be described in a message, even one that can't be printed."""
    assert describe(error) == text


def test_tree_in_docstring() -> None:
    """The module's docstring lists every exception there is, with its status."""
    documented = inspect.getdoc(_errors) or ""
    for name, kind in inspect.getmembers(_errors, inspect.isclass):
        if kind.__module__ == _errors.__name__:
            assert f"* {name} (" in documented
    for kind, status in KINDS.items():
        assert f"* {kind.__name__} ({status}" in documented
