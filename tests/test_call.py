"""One use of the model: its outcome, handed over once, and what its function can ask."""

from __future__ import annotations

import time
import weakref
from contextlib import suppress
from dataclasses import fields

import pytest

from asgi_infer import CallCancelled, check_cancelled
from asgi_infer._call import Call, CallState, Departure, here
from asgi_infer._statistics import Counters

from .calls import make_call
from .threads import on_new_thread


class Result:
    """Something that can be seen to go."""


def finished(value: object = None, error: BaseException | None = None) -> Call:
    call = make_call()
    call.state = CallState.FINISHED
    call.value, call.error = value, error
    return call


def test_new_call_is_queued() -> None:
    """A call begins in the queue, with its caller waiting."""
    call = make_call()
    assert call.state is CallState.QUEUED
    assert call.departure is None


def test_departures_are_counters() -> None:
    """Each way to leave has a counter of that name."""
    assert {departure.value for departure in Departure} < {f.name for f in fields(Counters)}


def test_value_is_handed_over() -> None:
    """The result is returned, and the call lets go of it."""
    call = finished(Result())
    gone = weakref.ref(call.outcome())
    assert gone() is None


def test_error_is_handed_over() -> None:
    """The error is raised as it is, and the call lets go of it and of its traceback."""
    error = LookupError("no such class")
    call = finished(error=error)
    with pytest.raises(LookupError, match="no such class") as caught:
        call.outcome()
    assert caught.value is error
    assert call.error is None


def test_error_is_no_cycle() -> None:
    """Once the caller drops the error, all of it is gone without a garbage collection."""

    class Failure(Exception):
        pass

    error = Failure()
    gone = weakref.ref(error)
    call = finished(error=error)
    del error
    with suppress(Failure):
        call.outcome()
    assert gone() is None


# -- check_cancelled ---------------------------------------------------------------------------


def test_check_cancelled_outside_a_call() -> None:
    """Outside a call, as in a script, nothing is ever cancelled."""
    check_cancelled()


def check_in(monkeypatch: pytest.MonkeyPatch, call: Call | None) -> None:
    """``check_cancelled()`` as if this thread ran ``call``."""
    monkeypatch.setattr(here, "current_call", lambda: call)
    check_cancelled()


def test_check_cancelled_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the inference thread, but in no call (while loading): nothing is cancelled."""
    check_in(monkeypatch, None)


def test_check_cancelled_while_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller who waits and has time left cancels nothing."""
    check_in(monkeypatch, make_call())
    check_in(monkeypatch, make_call(deadline=time.monotonic() + 60))


@pytest.mark.parametrize("departure", Departure)
def test_check_cancelled_after_departure(
    monkeypatch: pytest.MonkeyPatch, departure: Departure
) -> None:
    """When the caller has left, the function is told, and why."""
    call = make_call()
    call.departure = departure
    with pytest.raises(CallCancelled, match=departure.value):
        check_in(monkeypatch, call)


def test_check_cancelled_after_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadline that has passed is enough, even if no caller has noticed it yet."""
    with pytest.raises(CallCancelled, match="its deadline has passed"):
        check_in(monkeypatch, make_call(deadline=time.monotonic()))


def test_check_cancelled_is_for_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one thread runs is nothing to another."""
    call = make_call()
    call.departure = Departure.CANCELLED
    monkeypatch.setattr(here, "current_call", lambda: call)
    on_new_thread(check_cancelled)
