"""Admission, the queue, the slots and the books: on a clock of the tests' own."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from asgi_infer import _scheduler
from asgi_infer._batch import BatchCall, BatchFunction
from asgi_infer._call import Call, CallState, Departure
from asgi_infer._errors import (
    ClientDisconnected,
    DeadlineExceeded,
    Draining,
    InferenceError,
    NotReady,
    QueueFull,
)
from asgi_infer._queue_policy import Overload, QueuePolicy
from asgi_infer._refusals import retry_after, stopped
from asgi_infer._scheduler import Scheduler
from asgi_infer._slot import Slot
from asgi_infer._statistics import Counters

from .calls import RecordingPort, batch_function, make_call
from .gates import LIMIT
from .polling import until_true
from .streams import make_stream_call

RETRY_SOON = [{"Retry-After": str(seconds)} for seconds in (1, 2, 3)]
"""With nothing to wait for: as soon as others that were refused allow."""

CANCELLED, EXPIRED = Departure.CANCELLED, Departure.EXPIRED


class Clock:
    """``time.monotonic()``, which stands still unless it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Desk:
    """A scheduler, its books, and where its callers wait."""

    def __init__(self, max_queue: int = 100, clock: Clock | None = None, **options: Any) -> None:
        self.counters = Counters()
        self.scheduler = Scheduler(
            max_queue=max_queue,
            counters=self.counters,
            lock=threading.RLock(),
            clock=time.monotonic if clock is None else clock.monotonic,
            **options,
        )
        self.port = RecordingPort()

    def call(self, waiter: Any = "waiter", args: tuple[Any, ...] = (), **options: Any) -> Call:
        func = options.pop("func", len)
        return make_call(func, *args, port=self.port, waiter=waiter, **options)

    def admit(self, waiter: Any = "waiter", **options: Any) -> Call:
        call = self.call(waiter, **options)
        self.scheduler.admit(call)
        return call

    def take(self, slot: int = 0) -> Call:
        call = self.scheduler.take(self.scheduler.slots[slot])
        assert call is not None
        return call

    def sleep(self, *slots: int) -> None:
        """There is nothing to do in these: their threads are about to sleep, in this order."""
        for number in slots:
            slot = self.scheduler.slots[number]
            assert self.scheduler.poll(slot, sleep=True) == (None, False)
            assert slot in self.scheduler._idle

    def woken(self) -> list[int]:
        """Which of them have been woken; they are awake from now on."""
        woken = [slot for slot in self.scheduler.slots if slot.wake_up.acquire(timeout=0)]
        assert not set(woken) & {*self.scheduler._idle, *self.scheduler._resting}
        return [slot.number for slot in woken]

    def run(self, value: object = None, error: Exception | None = None) -> Call:
        call = self.take()
        self.scheduler.finish(call, value, error)
        return call

    def books(self, **expected: int) -> None:
        """The counters are those given, and the rest 0."""
        counted = {name: getattr(self.counters, name) for name in COUNTS}
        assert counted == dict.fromkeys(COUNTS, 0) | expected
        check_law(self.scheduler, self.counters)


COUNTS = (
    *("submitted", "completed", "failed", "cancelled", "expired", "rejected"),
    *("late", "running"),
)


def check_law(scheduler: Scheduler, c: Counters) -> None:
    """The law of conservation."""
    ended = c.completed + c.failed + c.cancelled + c.expired + c.rejected
    assert c.submitted == ended + scheduler.queued + c.running
    running = [slot.running for slot in scheduler.slots if slot.running is not None]
    assert c.running == len(running) == len(set(running))  # neither batches nor streams here
    assert c.late <= c.cancelled + c.expired + c.running


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(clock: Clock) -> Desk:
    return Desk(clock=clock)


# -- the usual way -----------------------------------------------------------------------------


def test_call_that_returns(desk: Desk, clock: Clock) -> None:
    """Admitted, taken, finished: the caller is woken once, and the times are right."""
    call = desk.admit()
    desk.books(submitted=1)
    clock.now += 2
    assert desk.take() is call
    states = [call.state]
    assert desk.scheduler.slots[0].current() is call
    desk.books(submitted=1, running=1)
    clock.now += 3
    desk.scheduler.finish(call, "result", None)
    assert [*states, call.state] == [CallState.RUNNING, CallState.FINISHED]
    assert desk.scheduler.slots[0].current() is None
    assert call.outcome() == "result"
    assert (call.started - call.arrived, call.ended - call.started) == (2, 3)
    assert desk.port.posted == ["waiter"]
    desk.books(submitted=1, completed=1)


def test_call_that_raises(desk: Desk) -> None:
    """An error is the outcome, and counts as failed."""
    desk.admit()
    call = desk.run(error=LookupError("gone"))
    with pytest.raises(LookupError, match="gone"):
        call.outcome()
    desk.books(submitted=1, failed=1)


def test_none_is_a_result(desk: Desk) -> None:
    """A function that returns None has returned."""
    desk.admit()
    assert desk.run(None).outcome() is None


def test_arguments_are_let_go(desk: Desk) -> None:
    """Function and arguments may be large: they go when the call can't run any more."""
    for end in (desk.run, lambda: desk.scheduler.withdraw(desk.scheduler.waiting()[0])):
        call = desk.admit()
        assert call.work is not None
        end()
        assert call.work is None


def test_end_claims_the_next(desk: Desk) -> None:
    """The end of one call is the beginning of the next, if one is waiting."""
    first, second = desk.admit("first"), desk.admit("second")
    desk.take()
    assert desk.scheduler.finish(first, None, None) is second
    assert desk.scheduler.slots[0].current() is second
    desk.books(submitted=2, completed=1, running=1)
    assert desk.scheduler.finish(second, None, None) is None
    assert desk.port.posted == ["first", "second"]
    desk.books(submitted=2, completed=2)


def test_end_claims_no_late_call(desk: Desk, clock: Clock) -> None:
    """A call that expires in the tick in which the one before ends is dropped, not begun."""
    first = desk.admit("first")
    late, patient = desk.admit("late", deadline=clock.now + 1), desk.admit("patient")
    desk.take()
    clock.now += 1
    assert desk.scheduler.finish(first, None, None) is None
    assert desk.port.posted == ["first", "late"]
    with pytest.raises(DeadlineExceeded, match="it never ran"):
        late.outcome()
    assert desk.take() is patient
    desk.books(submitted=3, completed=1, expired=1, running=1)


# -- refusals ----------------------------------------------------------------------------------


def test_queue_full(clock: Clock) -> None:
    """As many wait as may: the next is refused at once, and told when to come back."""
    desk = Desk(max_queue=2, clock=clock)
    desk.admit()
    desk.take()
    desk.admit()
    desk.admit()
    with pytest.raises(QueueFull, match="2 calls are waiting") as caught:
        desk.admit()
    assert caught.value.headers in RETRY_SOON
    desk.books(submitted=4, rejected=1, running=1)
    assert clock.now == 1000


def test_queue_full_predicts_the_wait(clock: Clock) -> None:
    """Retry-After: calls ahead times the measured service time, and the running one's rest."""
    desk = Desk(max_queue=3, clock=clock)
    desk.admit()
    call = desk.take()
    clock.now += 4
    desk.scheduler.finish(call, None, None)
    for _ in range(4):
        desk.admit()
        if desk.scheduler.slots[0].current() is None:
            desk.take()
    clock.now += 1  # of the running call's 4 seconds
    with pytest.raises(QueueFull) as caught:
        desk.admit()
    assert 15.0 <= (caught.value.retry_after or 0) <= 1.5 * 15.0 + 3


def test_expired_calls_make_room(clock: Clock) -> None:
    """A full queue is rid of those whose time is up before anybody is refused."""
    desk = Desk(max_queue=2, clock=clock)
    desk.admit("first", deadline=clock.now + 1)
    desk.admit("second", deadline=clock.now + 5)
    clock.now += 1
    desk.admit("third")
    assert desk.port.posted == ["first"]
    desk.books(submitted=3, expired=1)


def test_no_room_after_all(clock: Clock) -> None:
    """Room that expired calls made is given out once."""
    desk = Desk(max_queue=1, clock=clock)
    desk.admit(deadline=clock.now + 1)
    clock.now += 1
    desk.admit()
    with pytest.raises(QueueFull):
        desk.admit()
    desk.books(submitted=3, expired=1, rejected=1)


def test_too_little_time(desk: Desk, clock: Clock) -> None:
    """Less time than those ahead and itself will take: refused at once, and told so; enough time
    is let in."""
    desk.admit()
    call = desk.take()
    clock.now += 10
    desk.scheduler.finish(call, None, None)
    desk.admit()
    desk.admit(deadline=clock.now + 20)
    with pytest.raises(DeadlineExceeded, match="it was not queued") as caught:
        desk.admit(deadline=clock.now + 29.9)
    assert not caught.value.started
    assert 30.0 <= (caught.value.retry_after or 0) <= 1.5 * 30.0 + 3
    desk.books(submitted=4, completed=1, rejected=1)


def test_own_time_counts_behind_others_only(desk: Desk, clock: Clock) -> None:
    """A thread that is free takes any call: what the one before took may be long out of date."""
    desk.admit()
    desk.take()
    clock.now += 10
    desk.scheduler.finish(desk.scheduler.slots[0].current() or desk.call(), None, None)
    assert desk.admit(deadline=clock.now + 0.1) is desk.take()


def test_too_many_bytes(clock: Clock) -> None:
    """The arguments of what waits are bounded, too, and freed as soon as a call has left."""
    desk = Desk(max_bytes=100, clock=clock)
    first = desk.admit(args=(b"x" * 60,))
    with pytest.raises(QueueFull, match="hold 41 bytes, and beside the 60 bytes") as caught:
        desk.admit(args=(b"x" * 41,))
    assert caught.value.headers in RETRY_SOON
    assert desk.scheduler.queued_bytes == 60
    desk.scheduler.leave(first, CANCELLED)
    assert desk.scheduler.queued_bytes == 0
    desk.admit(args=(b"x" * 41,))
    desk.books(submitted=3, cancelled=1, rejected=1)


def test_urgent_call_waits_less(desk: Desk, clock: Clock) -> None:
    """The prediction counts those ahead only: an urgent call passes the others."""
    desk.admit()
    call = desk.take()
    clock.now += 10
    desk.scheduler.finish(call, None, None)
    for _ in range(5):
        desk.admit()
    assert desk.admit(priority=-1, deadline=clock.now + 0.1) is desk.take()


def test_refusal(desk: Desk) -> None:
    """From the moment on that a runner refuses, every new call gets an error of its own."""
    accepted = desk.admit()
    desk.scheduler.refuse(lambda again: NotReady("no model", retry_after=again))
    errors = []
    for _ in range(2):
        with pytest.raises(NotReady, match="no model") as caught:
            desk.admit()
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    assert errors[0].headers in RETRY_SOON
    assert desk.take() is accepted
    desk.books(submitted=3, rejected=2, running=1)


@pytest.mark.parametrize(
    ("wait", "least", "most"), [(0, 1, 3), (10, 10, 18), (55, 38, 60), (1e9, 38, 60)]
)
def test_retry_after(wait: float, least: float, most: float) -> None:
    """Not before the predicted wait, within 1 and 60 seconds, and not the same for all."""
    seconds = {retry_after(wait) for _ in range(200)}
    assert least <= min(seconds)
    assert max(seconds) <= most
    assert len({math.ceil(each) for each in seconds}) >= 3  # whole ones, as the header has them


# -- deadlines ---------------------------------------------------------------------------------


def test_expires_in_the_queue(desk: Desk, clock: Clock) -> None:
    """A call whose time is up is never taken, not even in the very tick of its deadline."""
    late = desk.admit("late", deadline=clock.now + 1)
    patient = desk.admit("patient")
    clock.now += 1
    assert desk.take() is patient
    assert desk.port.posted == ["late"]
    with pytest.raises(DeadlineExceeded, match="it never ran") as caught:
        late.outcome()
    assert not caught.value.started
    assert caught.value.retry_after is not None
    desk.books(submitted=2, expired=1, running=1)


def test_expires_while_running(desk: Desk, clock: Clock) -> None:
    """The caller leaves with ``started``; the slot stays taken; the result is thrown away."""
    call = desk.admit(deadline=clock.now + 1)
    desk.take()
    clock.now += 2
    assert desk.scheduler.expire(call)
    assert not desk.scheduler.expire(call)
    desk.books(submitted=1, running=1, late=1)
    desk.scheduler.finish(call, "too late", None)
    with pytest.raises(DeadlineExceeded, match="it runs on") as caught:
        call.outcome()
    assert caught.value.started
    assert caught.value.retry_after is None
    assert desk.port.posted == []
    desk.books(submitted=1, expired=1, late=1)


def test_expires_after_the_end(desk: Desk, clock: Clock) -> None:
    """A call that ended in the tick of its deadline has ended: one outcome, its own."""
    call = desk.admit(deadline=clock.now + 1)
    desk.run("just in time")
    clock.now += 1
    assert not desk.scheduler.expire(call)
    assert call.outcome() == "just in time"
    desk.books(submitted=1, completed=1)


def test_wall_clock_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that jumps changes nothing: no deadline is measured on it."""

    def never() -> float:
        raise AssertionError("the wall clock was asked")

    monkeypatch.setattr(time, "time", never)
    desk = Desk()
    desk.admit(deadline=time.monotonic() + 60)
    assert desk.run("on time").outcome() == "on time"


# -- callers that leave ------------------------------------------------------------------------


def test_leave_the_queue(desk: Desk) -> None:
    """Who leaves the queue is out of it at once, never runs and is never woken."""
    first, second = desk.admit("first"), desk.admit("second")
    assert desk.scheduler.leave(first, CANCELLED)
    assert first.state is CallState.DROPPED
    assert desk.take() is second
    assert desk.port.posted == []
    desk.books(submitted=2, cancelled=1, running=1)


def test_leave_while_running(desk: Desk) -> None:
    """Who leaves a running call doesn't free the slot; its end wakes nobody."""
    call = desk.admit()
    desk.take()
    assert desk.scheduler.leave(call, CANCELLED)
    desk.books(submitted=1, running=1, late=1)
    desk.scheduler.finish(call, "result", None)
    assert desk.port.posted == []
    desk.books(submitted=1, cancelled=1, late=1)


@pytest.mark.parametrize("error", [None, LookupError("gone")])
def test_leave_after_the_end(desk: Desk, error: Exception | None) -> None:
    """Who leaves when the call has ended leaves the books as they are."""
    desk.admit()
    call = desk.run(error=error)
    assert not desk.scheduler.leave(call, CANCELLED)
    desk.books(submitted=1, completed=error is None, failed=error is not None)


def test_leave_twice(desk: Desk) -> None:
    """The first reason counts: a call that expired isn't cancelled as well."""
    call = desk.admit()
    desk.take()
    assert desk.scheduler.expire(call)
    assert not desk.scheduler.leave(call, CANCELLED)
    desk.scheduler.finish(call, None, None)
    desk.books(submitted=1, expired=1, late=1)


def test_withdraw(desk: Desk) -> None:
    """A future's cancel() takes back what waits, and leaves alone what has started."""
    running, waiting = desk.admit(), desk.admit()
    desk.take()
    assert not desk.scheduler.withdraw(running)
    assert desk.scheduler.withdraw(waiting)
    assert not desk.scheduler.withdraw(waiting)
    desk.books(submitted=2, cancelled=1, running=1)


@pytest.mark.parametrize("running", [False, True])
def test_disconnect(desk: Desk, running: bool) -> None:
    """The client is gone: its caller, who doesn't know it yet, is woken with that error."""
    call = desk.admit()
    if running:
        desk.take()
    desk.scheduler.disconnect(call)
    desk.scheduler.disconnect(call)
    assert desk.port.posted == ["waiter"]
    with pytest.raises(ClientDisconnected, match="while its" if running else "before its"):
        call.outcome()
    if running:
        desk.scheduler.finish(call, None, None)
    assert desk.port.posted == ["waiter"]
    desk.books(submitted=1, cancelled=1, late=running)


def test_failure_of_a_late_call(desk: Desk) -> None:
    """What a call raises that nobody waits for any more isn't a failure in the books."""
    call = desk.admit()
    desk.take()
    desk.scheduler.leave(call, CANCELLED)
    desk.scheduler.finish(call, None, LookupError("gone"))
    desk.books(submitted=1, cancelled=1, late=1)


# -- a queue that stands -----------------------------------------------------------------------


POLICY = QueuePolicy(overload="shed", target=0.25, interval=2.0)
NEWEST = dataclasses.replace(POLICY, overload="newest")
TIME = 40.0  # that calls have; a quarter of it is 10 seconds


def standing(clock: Clock, policy: QueuePolicy = POLICY, **options: Any) -> Desk:
    """A desk where a call runs, and whose queue has just been found to have stood for too long."""
    desk = Desk(clock=clock, policy=policy, **options)
    desk.admit(deadline=clock.now + TIME)
    desk.admit(deadline=clock.now + TIME)
    clock.now += 10.0
    first = desk.take()
    clock.now += 2.0
    second = desk.scheduler.finish(first, None, None)
    assert second is not None
    desk.scheduler.finish(second, None, None)
    assert desk.scheduler.overloaded
    desk.scheduler._forecast._call = 0.0  # nothing is predicted, unless a test says so
    desk.admit("running")
    desk.take()
    return desk


def test_long_is_not_standing(clock: Clock) -> None:
    """A queue that gets short within the interval is a burst, and nothing is done about it."""
    desk = Desk(clock=clock, policy=POLICY)
    for _ in range(3):
        desk.admit(deadline=clock.now + TIME)
    clock.now += 30.0
    call: Call | None = desk.take()
    while call is not None:
        clock.now += 0.9
        call = desk.scheduler.finish(call, None, None)
    assert not desk.scheduler.overloaded
    desk.books(submitted=3, completed=3)


def test_who_has_waited_is_shed(clock: Clock) -> None:
    """Who has waited for too much of its time when its turn comes makes way: at once, with a 503,
    and safe to repeat. Who has not, runs."""
    desk = standing(clock)
    old = desk.admit("old", deadline=clock.now + TIME)
    clock.now += 5.1
    new = desk.admit("new", deadline=clock.now + TIME)
    clock.now += 5.0
    running = desk.scheduler.slots[0].current()
    assert running is not None
    assert desk.scheduler.finish(running, None, None) is None
    assert desk.take() is new
    assert desk.port.posted[-2:] == ["running", "old"]
    with pytest.raises(QueueFull, match=r"dropped after 10\.1 s of waiting") as caught:
        old.outcome()
    assert caught.value.retry_after is not None
    assert desk.counters.rejected == 1
    check_law(desk.scheduler, desk.counters)


def test_refused_rather_than_shed(clock: Clock) -> None:
    """Who would wait for too much of its time is told so on arrival."""
    desk = standing(clock)
    desk.scheduler._forecast._call = 4.0
    for _ in range(2):
        desk.admit(deadline=clock.now + TIME)
    with pytest.raises(QueueFull, match=r"would wait about 12 s of its 40 s; it was not queued"):
        desk.admit(deadline=clock.now + TIME)
    desk.admit(deadline=clock.now + 1.3 * TIME)
    desk.admit(priority=-1, deadline=clock.now + TIME)
    assert desk.counters.rejected == 1


@pytest.mark.parametrize("overload", ["shed", "newest"])
def test_no_time_limit_no_hurry(clock: Clock, overload: Overload) -> None:
    """A call without a time limit is neither dropped nor overtaken for as long as it waits."""
    desk = standing(clock, dataclasses.replace(POLICY, overload=overload))
    patient = desk.admit()
    clock.now += 10 * TIME
    desk.admit(deadline=clock.now + TIME)
    running = desk.scheduler.slots[0].current()
    assert running is not None
    assert desk.scheduler.finish(running, None, None) is patient


def test_newest_first(clock: Clock) -> None:
    """Who came last runs first, and the others at their end learn that they never ran."""
    desk = standing(clock, NEWEST)
    calls = [desk.admit(number, deadline=clock.now + TIME) for number in range(3)]
    clock.now += TIME / 2
    running = desk.scheduler.slots[0].current()
    assert running is not None
    assert desk.scheduler.finish(running, None, None) is calls[2]
    clock.now += TIME / 2
    assert desk.scheduler.finish(calls[2], None, None) is None
    assert desk.scheduler.poll() == (calls[0], False)
    assert calls[0].departure is Departure.EXPIRED


def test_newest_ends_when_the_oldest_waits_no_more(clock: Clock) -> None:
    """It is the oldest that tells whether the queue stands, and not the newest, which runs."""
    desk = standing(clock, NEWEST)
    first, second = (desk.admit(deadline=clock.now + TIME) for _ in range(2))
    clock.now += 1.9
    running = desk.scheduler.slots[0].current()
    assert running is not None
    assert desk.scheduler.finish(running, None, None) is second
    clock.now += 0.2
    assert desk.scheduler.finish(second, None, None) is first
    assert not desk.scheduler.overloaded


def test_oldest_makes_room_for_the_newest(clock: Clock) -> None:
    """In a full queue the oldest of the same class, or a later one, is dropped."""
    desk = standing(clock, NEWEST, max_queue=3)
    urgent = desk.admit("urgent", priority=-1, deadline=clock.now + TIME)
    patient = desk.admit("patient")
    old = desk.admit("old", deadline=clock.now + TIME)
    clock.now += 1
    new = desk.admit("new", deadline=clock.now + TIME)
    assert desk.port.posted[-1] == "old"
    with pytest.raises(QueueFull, match="dropped after 1 s"):
        old.outcome()
    assert desk.scheduler.waiting() == [urgent, patient, new]
    desk.scheduler.leave(new, CANCELLED)
    desk.admit("another")
    with pytest.raises(QueueFull, match="3 calls are waiting"):
        desk.admit()


def test_the_only_one_is_not_shed(clock: Clock) -> None:
    """A call behind which nobody waits makes way for nobody: the thread would just stand idle."""
    desk = standing(clock)
    only = desk.admit("only", deadline=clock.now + TIME)
    clock.now += 0.9 * TIME
    running = desk.scheduler.slots[0].current()
    assert running is not None
    assert desk.scheduler.finish(running, None, None) is only


def test_one_may_always_wait(clock: Clock) -> None:
    """Nor is a call refused because of the one that runs, if nobody else waits."""
    desk = standing(clock)
    desk.scheduler._forecast._call = 15.0
    desk.admit("only", deadline=clock.now + TIME)
    with pytest.raises(QueueFull, match="stood for too long"):
        desk.admit("second", deadline=clock.now + 2 * TIME)


def test_who_makes_room_makes_enough(clock: Clock) -> None:
    """Nobody is pushed out for a call that there would be no room for all the same."""
    desk = standing(clock, NEWEST, max_bytes=100)
    desk.admit("patient", args=(bytes(10),))
    for number in range(5):
        desk.admit(number, args=(bytes(10),), deadline=clock.now + TIME)
    with pytest.raises(QueueFull, match="max_queue_bytes"):
        desk.admit("large", args=(bytes(95),), deadline=clock.now + TIME)
    assert len(desk.scheduler.waiting()) == 6
    desk.admit("smaller", args=(bytes(60),), deadline=clock.now + TIME)
    assert [call.waiter for call in desk.scheduler.waiting()] == ["patient", 2, 3, 4, "smaller"]


def test_newest_is_not_kept_waiting(clock: Clock) -> None:
    """Nothing is ahead of a call that runs next: it is not refused for the calls that wait."""
    desk = standing(clock, NEWEST)
    desk.scheduler._forecast._call = 4.0
    for _ in range(5):
        desk.admit(deadline=clock.now + TIME)
    desk.admit(deadline=clock.now + 8.1)
    with pytest.raises(DeadlineExceeded, match="would need about 8 s"):
        desk.admit(deadline=clock.now + 7.9)


def test_waiting_is_a_policy_too(clock: Clock) -> None:
    """Where nothing is to be done, all wait in turn."""
    desk = standing(clock, dataclasses.replace(POLICY, overload="wait"), max_queue=2)
    first, second = (desk.admit(deadline=clock.now + TIME) for _ in range(2))
    with pytest.raises(QueueFull):
        desk.admit()
    clock.now += 0.9 * TIME
    running = desk.scheduler.slots[0].current()
    assert running is not None
    assert desk.scheduler.finish(running, None, None) is first
    assert desk.scheduler.finish(first, None, None) is second


def test_an_idle_runner_is_not_overloaded(clock: Clock) -> None:
    """Where nothing comes any more nothing ends it. Who keeps clients away for as long as
    ``overloaded`` says so would do so for ever."""
    desk = standing(clock)
    running = desk.scheduler.slots[0].current()
    assert running is not None
    desk.scheduler.finish(running, None, None)
    seen = [desk.scheduler.overloaded]
    for seconds in (1.9, 0.2):
        clock.now += seconds
        seen.append(desk.scheduler.overloaded)
    desk.admit()
    assert [*seen, desk.scheduler.overloaded] == [True, True, False, True]


def test_nobody_makes_room_for_who_is_refused(clock: Clock) -> None:
    """A call that has too little time anyway pushes nobody out."""
    desk = standing(clock, NEWEST, max_queue=2)
    desk.scheduler._forecast._call = 4.0
    old = [desk.admit(deadline=clock.now + TIME) for _ in range(2)]
    clock.now += 1
    with pytest.raises(QueueFull, match="2 calls are waiting"):
        desk.admit(deadline=clock.now + 0.1)
    assert desk.scheduler.waiting() == old


# -- the end -----------------------------------------------------------------------------------


def test_stop(desk: Desk) -> None:
    """A stopped scheduler hands out what it has accepted, and then the end."""
    call = desk.admit()
    desk.scheduler.stop()
    assert desk.take() is call
    desk.scheduler.finish(call, None, None)
    assert desk.scheduler.take() is None
    assert desk.scheduler.take() is None
    desk.books(submitted=1, completed=1)


def test_drop_queued(desk: Desk) -> None:
    """Everything that waits is cancelled, in order, each with an error of its own."""
    running = desk.admit("running")
    desk.take()
    calls = [desk.admit(number) for number in range(3)]
    desk.scheduler.drop_queued(stopped)
    assert desk.port.posted == [0, 1, 2]
    for call in calls:
        with pytest.raises(Draining, match="before it could run"):
            call.outcome()
    desk.scheduler.finish(running, "result", None)
    assert running.outcome() == "result"
    desk.books(submitted=4, cancelled=3, completed=1)


def test_abandon_running(desk: Desk) -> None:
    """The running call's caller is sent away, and the function is named for the log."""
    assert desk.scheduler.abandon_running(stopped) is None
    call = desk.admit(func=sorted)
    desk.take()
    assert desk.scheduler.abandon_running(stopped) == "sorted"
    assert desk.scheduler.abandon_running(stopped) == "sorted"  # it runs, though nobody waits
    assert desk.port.posted == ["waiter"]
    with pytest.raises(Draining, match="while sorted was still running"):
        call.outcome()
    desk.scheduler.finish(call, None, None)
    desk.books(submitted=1, cancelled=1, late=1)


def test_abandon_in_the_tick_of_the_end(desk: Desk) -> None:
    """A call whose function has just ended has no name any more, and is abandoned all the same."""
    call = desk.admit()
    desk.take()
    call.work = None  # as finish() does, ahead of the lock
    assert desk.scheduler.abandon_running(stopped) == "the call"


def test_orphans(desk: Desk) -> None:
    """What a forked child inherits: the running call, and those that wait."""
    assert desk.scheduler.orphans() == []
    first, second = desk.admit(), desk.admit()
    assert desk.scheduler.orphans() == [first, second]
    desk.take()
    assert desk.scheduler.orphans() == [first, second]
    assert desk.scheduler.waiting() == [second]


# -- idleness ----------------------------------------------------------------------------------


def test_idle_at_once(desk: Desk) -> None:
    """Nothing waits, nothing runs: that is idle."""
    assert desk.scheduler.when_idle().done()


@pytest.mark.parametrize("end", ["cancelled", "dropped", "expired", "finished"])
def test_idle_when_the_last_call_is_over(desk: Desk, clock: Clock, end: str) -> None:
    """However the last call ends, those who wait for idleness are told, and not before."""
    call = desk.admit(deadline=clock.now + 1)
    futures = [desk.scheduler.when_idle(), desk.scheduler.when_idle()]
    if end == "finished":
        desk.take()
    assert not any(future.done() for future in futures)
    if end == "finished":
        desk.scheduler.finish(call, None, None)
    elif end == "cancelled":
        desk.scheduler.withdraw(call)
    elif end == "dropped":
        desk.scheduler.drop_queued(stopped)
    else:
        clock.now += 1
    desk.scheduler.stop()
    assert desk.scheduler.take() is None
    assert all(future.done() for future in futures)


# -- several slots -----------------------------------------------------------------------------


@pytest.fixture
def two(clock: Clock) -> Desk:
    return Desk(clock=clock, slots=2)


@pytest.fixture
def three(clock: Clock) -> Desk:
    return Desk(clock=clock, slots=3)


def test_as_many_run_as_there_are_slots(two: Desk) -> None:
    """Each slot has a call of its own, and its end claims the next for the same slot."""
    calls = [two.admit(number) for number in range(3)]
    assert [two.take(1), two.take(0)] == calls[:2]
    two.books(submitted=3, running=2)
    slots = two.scheduler.slots
    assert [slot.current() for slot in slots] == [calls[1], calls[0]]
    assert two.scheduler.finish(calls[0], None, None) is calls[2]
    assert [slot.current() for slot in slots] == [calls[1], calls[2]]
    for call in calls[1:]:
        assert two.scheduler.finish(call, None, None) is None
    two.books(submitted=3, completed=3)


def test_one_call_wakes_one_thread(three: Desk) -> None:
    """The last one to fall asleep, whose caches are warm; and with every thread awake, none."""
    three.sleep(2, 0, 1)
    for expected in ([1], [0], [2], []):
        three.admit()
        assert three.woken() == expected


def test_nobody_is_woken_in_vain(three: Desk) -> None:
    """A burst wakes as many threads as it has calls, also if one of them is fast enough to take
    another's; and that one goes back to sleep."""
    three.sleep(0, 1, 2)
    first, second = three.admit(), three.admit()
    assert three.woken() == [1, 2]
    assert three.take(2) is first
    assert three.scheduler.finish(first, None, None) is second
    three.sleep(1)
    assert three.woken() == []
    three.admit()
    assert three.woken() == [1]


def test_woken_while_its_model_goes(three: Desk) -> None:
    """The thread that a call wakes has lost its model in that moment: another one is woken, and
    this one comes back from its sleep to load the model again."""
    three.sleep(0, 2, 1)
    slot = three.scheduler.slots[1]
    three.scheduler.set_down(slot, down=True)
    call = three.admit()
    assert three.woken() == [1]
    assert three.scheduler.take(slot) is None
    assert not slot.over
    assert three.woken() == [2]
    assert three.take(2) is call
    three.admit()
    assert three.woken() == [0]


def test_passed_on_once(three: Desk) -> None:
    """Where another thread is about to look anyway, nobody else is woken."""
    three.sleep(0, 1, 2)
    three.scheduler.set_down(three.scheduler.slots[2], down=True)
    three.admit()
    three.admit()
    assert three.woken() == [1, 2]
    assert three.scheduler.take(three.scheduler.slots[2]) is None
    assert three.woken() == []
    three.take(1)
    assert three.woken() == [0]  # for the second call


def test_nothing_to_pass_on(two: Desk) -> None:
    """A thread that takes the only call, or drops one that is too late, wakes nobody."""
    two.sleep(0, 1)
    late = two.admit("late", deadline=two.scheduler.clock() + 1)
    assert two.woken() == [1]
    two.scheduler.leave(late, CANCELLED)
    two.scheduler.set_down(two.scheduler.slots[1], down=True)
    assert two.scheduler.take(two.scheduler.slots[1]) is None
    assert two.woken() == []


def test_dropped_call_is_not_passed_on(two: Desk, clock: Clock) -> None:
    """Who drops what is too late looks again by itself."""
    two.admit("late", deadline=clock.now + 1)
    two.scheduler._idle.append(two.scheduler.slots[0])
    following = two.call("following")
    two.scheduler._queue.push(following)
    clock.now += 1
    dropped, _ = two.scheduler.poll(two.scheduler.slots[1])
    assert dropped is not None
    assert dropped.state is CallState.DROPPED
    assert two.woken() == []
    assert two.take(1) is following


def test_order_with_several_slots(three: Desk, clock: Clock) -> None:
    """There is one line in front of all slots: by priority, which ages, then first come, first
    served, whichever slot is free."""
    first = three.admit(priority=1)
    clock.now += 0.5
    second = three.admit(priority=0)
    urgent = three.admit(priority=-1)
    clock.now += 0.6
    overtaken = three.admit(priority=1)
    late = three.admit(priority=0)
    taken = [three.take(number) for number in (2, 0, 1)]
    assert taken == [urgent, second, first]
    assert three.scheduler.finish(second, None, None) is late
    assert three.scheduler.finish(urgent, None, None) is overtaken


def test_idle_when_every_slot_is(two: Desk) -> None:
    """Idle is who has nothing to do in any slot."""
    first, second = two.admit(), two.admit()
    two.take(0)
    two.take(1)
    idle = two.scheduler.when_idle()
    two.scheduler.finish(first, None, None)
    two.sleep(0)
    assert not idle.done()
    two.scheduler.finish(second, None, None)
    two.sleep(1)
    assert idle.done()


def test_abandon_all_that_run(two: Desk) -> None:
    """The callers of every slot are sent away, and one function is named."""
    two.admit("first", func=sorted)
    two.admit("second", func=len)
    two.take(1)
    two.take(0)
    assert two.scheduler.abandon_running(stopped) == "len"
    assert two.port.posted == ["second", "first"]
    assert two.scheduler.orphans() == [slot.current() for slot in two.scheduler.slots]


def test_stop_wakes_every_thread(three: Desk) -> None:
    """Those that sleep, and those that rest; each then has its end."""
    three.sleep(0, 2)
    three.scheduler.stop()
    assert three.woken() == [0, 2]
    for slot in three.scheduler.slots:
        assert three.scheduler.take(slot) is None
        assert slot.over
    three.scheduler.stop()
    assert three.woken() == []


def test_notice(two: Desk) -> None:
    """Whoever runs a call is told that its caller has left: of that slot alone, and once."""
    told: list[tuple[int, Call]] = []
    for slot in two.scheduler.slots:
        slot.notice = lambda call, number=slot.number: told.append((number, call))
    first, second, third = two.admit(), two.admit(), two.admit()
    two.take(0)
    two.take(1)
    for call in (second, second, third):
        two.scheduler.leave(call, CANCELLED)
    assert told == [(1, second)]
    two.scheduler.expire(first)
    assert told == [(1, second), (0, first)]


# -- several slots: the predicted wait ---------------------------------------------------------


def busy(desk: Desk, clock: Clock) -> None:
    """Calls take ten seconds each, and one runs in every slot: 7, 4 ... are left of them."""
    desk.admit()
    call = desk.take()
    clock.now += 10
    desk.scheduler.finish(call, None, None)
    for slot in desk.scheduler.slots:
        desk.admit()
        desk.take(slot.number)
        clock.now += 3
    desk.port.posted.clear()


def test_who_is_free_first_counts(three: Desk, clock: Clock) -> None:
    """Whoever comes next waits for the slot that is free first: it is let in if it has that time,
    and its own, and refused if not."""
    busy(three, clock)  # 1, 4 and 7 seconds are left
    with pytest.raises(DeadlineExceeded, match="would need about 11 s; it was not queued"):
        three.admit(deadline=clock.now + 10.9)
    accepted = three.admit(deadline=clock.now + 11.1)
    with pytest.raises(DeadlineExceeded) as caught:
        three.admit(deadline=clock.now + 11.1)
    wait = 22 / 3 + 10  # what runs and waits, shared out among three, and itself
    assert wait <= (caught.value.retry_after or 0) <= 1.5 * wait + 3
    assert three.scheduler.waiting() == [accepted]


def test_a_free_slot_takes_any_call(two: Desk, clock: Clock) -> None:
    """However long the others are busy, and whatever calls took so far."""
    busy(two, clock)
    running = two.scheduler.slots[1].current()
    assert running is not None
    two.scheduler.finish(running, None, None)
    assert two.admit(deadline=clock.now + 0.1) is two.take(1)


def test_slots_that_are_down_serve_nobody(two: Desk, clock: Clock) -> None:
    """As long as a model is lost its slot is left out of the prediction; if all are, it is for
    all of them, since they are loaded again."""
    busy(two, clock)  # 4 and 7 seconds are left
    call = two.scheduler.slots[0].current()
    assert call is not None
    two.scheduler.set_down(two.scheduler.slots[0], down=True)
    assert two.scheduler.finish(call, None, None) is None
    two.scheduler._forecast._call = 10.0
    with pytest.raises(DeadlineExceeded, match="about 17 s"):
        two.admit(deadline=clock.now + 16.9)
    two.scheduler.set_down(two.scheduler.slots[1], down=True)
    assert two.admit(deadline=clock.now + 10) in two.scheduler.waiting()


def test_retry_after_with_several_slots(clock: Clock) -> None:
    """Who finds the queue full is told when all of it has been taken, by all slots together."""
    desk = Desk(max_queue=4, clock=clock, slots=2)
    busy(desk, clock)  # 4 and 7 seconds are left
    for _ in range(4):
        desk.admit()
    with pytest.raises(QueueFull) as caught:
        desk.admit()
    assert 25.5 <= (caught.value.retry_after or 0) <= 1.5 * 25.5 + 3


def test_newest_waits_for_the_first_free_slot(clock: Clock) -> None:
    """Nothing is ahead of the newest but what runs."""
    desk = Desk(clock=clock, policy=NEWEST, slots=2)
    busy(desk, clock)  # 4 and 7 seconds are left
    desk.admit()
    desk.scheduler._overload.active = True
    desk.scheduler._overload._long_until = clock.now
    with pytest.raises(DeadlineExceeded, match="about 14 s"):
        desk.admit(deadline=clock.now + 13.9)
    desk.admit(deadline=clock.now + 14.1)


# -- several slots: streams and batches --------------------------------------------------------


def test_streams_stay_in_their_slots(two: Desk) -> None:
    """A stream that lets others run goes on where it has begun, and nowhere else; what waits runs
    there in between, or elsewhere."""
    streams = [make_stream_call() for _ in range(2)]
    for stream in streams:
        two.scheduler.admit(stream)
        assert two.take(stream is streams[1]) is stream
    call = two.admit()
    assert two.scheduler.suspend(streams[0]) is call
    assert two.scheduler.suspend(streams[1]) is streams[1]
    assert two.scheduler.finish(call, None, None) is streams[0]
    assert [slot.current() for slot in two.scheduler.slots] == streams
    assert (two.counters.running, two.counters.completed) == (2, 1)


def test_room_in_a_stream_wakes_its_thread(three: Desk) -> None:
    """No matter who fell asleep last, and only if that one sleeps, and only once."""
    stream = make_stream_call(buffer=1)
    three.scheduler.admit(stream)
    three.take(1)
    stream.buffer.put("item")
    assert three.scheduler.suspend(stream) is None
    three.sleep(1, 0, 2)
    stream.buffer.take()
    for expected in ([1], []):
        three.scheduler.resume(stream)
        assert three.woken() == expected
    assert three.take(1) is stream
    three.scheduler.suspend(stream)
    three.admit()
    assert three.woken() == [2]


def test_room_while_its_thread_is_busy(two: Desk) -> None:
    """The stream has its turn when the call that runs there has ended, and nobody is woken."""
    stream = make_stream_call(buffer=1)
    two.scheduler.admit(stream)
    two.take(1)
    two.sleep(0)
    stream.buffer.put("item")
    assert two.scheduler.suspend(stream) is None
    call = two.admit()
    assert two.woken() == [0]
    assert two.take(1) is call
    two.sleep(0)
    stream.buffer.take()
    two.scheduler.resume(stream)
    assert two.woken() == []
    assert two.scheduler.finish(call, None, None) is stream


def test_stalled_streams_of_each_slot(two: Desk, clock: Clock) -> None:
    """Each thread wakes up by itself for the streams of its own slot, and ends those."""
    streams = [make_stream_call(buffer=1, stall_timeout=seconds) for seconds in (5.0, 3.0)]
    for number, stream in enumerate(streams):
        two.scheduler.admit(stream)
        two.take(number)
        stream.buffer.put("item")
        two.scheduler.suspend(stream)
    two.sleep(0, 1)
    assert [slot.look_again - clock.now for slot in two.scheduler.slots] == [5.0, 3.0]
    clock.now += 3.0
    assert two.take(1) is streams[1]
    assert [stream.departure for stream in streams] == [None, EXPIRED]


def test_open_streams_of_all_slots_are_bounded(clock: Clock) -> None:
    """``max_queue`` is for the runner, and not for each of its slots."""
    desk = Desk(max_queue=2, clock=clock, slots=2)
    for number in range(2):
        stream = make_stream_call(buffer=1)
        desk.scheduler.admit(stream)
        desk.take(number)
        stream.buffer.put("item")
        desk.scheduler.suspend(stream)
    with pytest.raises(QueueFull, match="2 streams have begun"):
        desk.scheduler.admit(make_stream_call())


def growing(clock: Clock, max_size: int = 8) -> BatchFunction:
    """Calls come every millisecond, and a batch takes a second: it pays to wait for the next."""
    function = batch_function(max_size=max_size, max_delay=0.5)
    function.cost.fixed, function._gap, function._last = 1.0, 0.001, clock.now
    function._gaps = 1e9  # so many that a few more make no difference
    return function


def test_nobody_waits_for_company_beside_a_free_slot(two: Desk, clock: Clock) -> None:
    """The next call will not have to wait for the end of this batch. Where no other slot is free
    it will, and then the batch is held back."""
    function = growing(clock)
    two.sleep(0, 1)
    first = two.admit(func=function, args=("a",))
    assert two.woken() == [1]
    assert two.take(1) is first
    two.admit(func=function, args=("b",))
    assert two.woken() == [0]
    two.sleep(0)
    assert two.scheduler.slots[0].look_again < math.inf


def test_batch_is_held_back_in_the_last_free_slot(two: Desk, clock: Clock) -> None:
    """Its thread wakes up by itself; should another slot get free meanwhile, that takes it."""
    function = growing(clock)
    running = two.admit()
    two.take(1)
    first = two.admit(func=function, args=("a",))
    two.sleep(0)
    assert two.scheduler.slots[0].look_again < math.inf
    assert two.scheduler.finish(running, None, None) is first
    assert two.woken() == []


def test_what_a_batch_leaves_is_passed_on(two: Desk, clock: Clock) -> None:
    """A slot that comes up takes a batch that another one holds back, and has no room for the
    rest of it: the other's thread is woken for that."""
    function = growing(clock, max_size=3)
    two.scheduler.set_down(two.scheduler.slots[1], down=True)
    calls = [two.admit(func=function, args=(letter,)) for letter in "ab"]
    two.sleep(0)
    two.scheduler.set_down(two.scheduler.slots[1], down=False)
    function.max_size = 1
    assert two.take(1) is calls[0]
    assert two.woken() == [0]
    assert two.take(0) is calls[1]


def test_one_batch_for_several_that_were_woken(three: Desk, clock: Clock) -> None:
    """The first thread to come takes all that may run together, and the others sleep on."""
    function = batch_function()
    three.sleep(0, 1, 2)
    calls = [three.admit(func=function, args=(letter,)) for letter in "abc"]
    assert three.woken() == [0, 1, 2]
    leader = three.take(1)
    assert type(leader) is BatchCall
    assert (leader, list(leader.members)) == (calls[0], calls)
    three.sleep(0, 2)
    assert three.counters.running == 3


# -- a slot without its model ------------------------------------------------------------------


def test_down(two: Desk) -> None:
    """Nothing is claimed in a slot whose model has gone: not at the end of a call, nor by its
    thread. What waits is for the others. When it is up again that counts as a restart."""
    first, second = two.admit(), two.admit()
    slot, other = two.scheduler.slots
    two.take(0)
    two.scheduler.set_down(slot, down=True)
    assert two.scheduler.finish(first, None, None) is None
    assert two.scheduler.take(slot) is None
    assert not slot.over
    assert two.scheduler.take(other) is second
    assert two.counters.restarts == 0
    two.scheduler.set_down(slot, down=False)
    assert two.counters.restarts == 1
    assert two.admit() is two.take(0)


def test_streams_of_a_slot_that_is_down(two: Desk) -> None:
    """They are handed out one by one, to be ended, also those that wait for room; not those of
    another slot."""
    streams = [make_stream_call(buffer=1) for _ in range(3)]
    for number, stream in zip((0, 0, 1), streams, strict=True):
        two.scheduler.admit(stream)
        two.take(number)
        stream.buffer.put("item")
        assert two.scheduler.suspend(stream) is None
    streams[1].buffer.take()
    two.scheduler.resume(streams[1])
    slot = two.scheduler.slots[0]
    two.scheduler.set_down(slot, down=True)
    ended = []
    while (each := two.scheduler.take_suspended(slot)) is not None:
        ended.append(each)
        assert slot.current() is each
        assert two.scheduler.finish(each, None, LookupError()) is None
    assert ended == [streams[1], streams[0]]
    assert slot.current() is None


def no_model(_: object) -> NotReady:
    return NotReady("crashed too often")


def test_one_of_two_is_broken(two: Desk) -> None:
    """As long as another slot is not broken calls are accepted, and wait for it."""
    waiting = two.admit()
    for slot in two.scheduler.slots:
        two.scheduler.set_down(slot, down=True)
    two.scheduler.set_broken(two.scheduler.slots[0], no_model)
    assert not two.scheduler.broken
    two.admit()
    assert two.scheduler.waiting()[0] is waiting


def test_all_are_broken(two: Desk) -> None:
    """Nobody waits for what is not going to come soon, and new calls are refused until one slot,
    whichever, is up again."""
    two.admit("waiting")
    idle = two.scheduler.when_idle()
    for slot in two.scheduler.slots:
        two.scheduler.set_down(slot, down=True)
        two.scheduler.set_broken(slot, no_model)
    seen = [two.scheduler.broken]
    assert two.port.posted == ["waiting"]
    assert idle.done()
    two.scheduler.set_broken(two.scheduler.slots[0], lambda _: NotReady("still so"))
    with pytest.raises(NotReady, match="still so"):
        two.admit()
    two.scheduler.set_down(two.scheduler.slots[1], down=False)
    seen.append(two.scheduler.broken)
    assert seen == [True, False]
    assert two.admit() is two.take(1)
    two.books(submitted=3, cancelled=1, rejected=1, running=1)


@pytest.mark.parametrize("stopped_first", [True, False])
def test_refused_for_good(two: Desk, stopped_first: bool) -> None:
    """A slot that breaks or comes back changes nothing for who has been stopped."""

    def stop() -> None:
        two.scheduler.refuse(lambda again: Draining("stopped", retry_after=again))

    if stopped_first:
        stop()
    for slot in two.scheduler.slots:
        two.scheduler.set_down(slot, down=True)
        two.scheduler.set_broken(slot, no_model)
    if not stopped_first:
        stop()
    for down in (True, False):
        with pytest.raises(Draining):
            two.admit()
        two.scheduler.set_down(two.scheduler.slots[0], down=down)
    with pytest.raises(Draining):
        two.admit()


# -- rest --------------------------------------------------------------------------------------


class Resting:
    """A thread that rests in a slot that is down, until it is woken; not before.

    :ivar result: what ``rest`` returned
    """

    def __init__(self, desk: Desk, slot: int, seconds: float = 4 * LIMIT) -> None:
        self._scheduler = desk.scheduler
        self._slot = desk.scheduler.slots[slot]
        self._seconds = seconds
        self._scheduler.set_down(self._slot, down=True)
        self.result: bool | None = None
        self._thread = threading.Thread(target=self._rest)
        self._thread.start()
        until_true(lambda: self.asleep)

    def _rest(self) -> None:
        self.result = self._scheduler.rest(self._slot, self._seconds)

    @property
    def asleep(self) -> bool:
        return self._slot in self._scheduler._resting

    def end(self) -> bool | None:
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()
        return self.result


@pytest.mark.parametrize("end", ["expired", "cancelled", "dropped"])
def test_rest_ends_when_nothing_waits(desk: Desk, end: str) -> None:
    """A stopped runner loads a lost model again for those that wait, and for nobody else: its
    thread ends as soon as these have gone, however long it was to rest."""
    call = desk.admit(deadline=desk.scheduler.clock() + 1)
    resting = Resting(desk, 0)
    desk.scheduler.stop()
    until_true(lambda: resting.asleep)
    assert resting.result is None
    ends: dict[str, Callable[[], object]] = {
        "expired": lambda: desk.scheduler.expire(call),
        "cancelled": lambda: desk.scheduler.withdraw(call),
        "dropped": lambda: desk.scheduler.drop_queued(stopped),
    }
    ends[end]()
    assert resting.end() is False
    assert desk.scheduler.slots[0].over


def test_rest_ends_when_stopped(desk: Desk) -> None:
    """With nobody there to wait for it."""
    resting = Resting(desk, 0)
    desk.scheduler.stop()
    assert resting.end() is False


def test_rest_ends_when_another_slot_is_there(three: Desk) -> None:
    """What waits is that one's, from the stop on, or from when it is up itself; and of two that
    rest, neither keeps the other awake."""
    three.admit()
    for slot in three.scheduler.slots:
        three.scheduler.set_down(slot, down=True)
    first, second = Resting(three, 0), Resting(three, 1)
    three.scheduler.stop()
    until_true(lambda: first.asleep and second.asleep)
    three.scheduler.set_down(three.scheduler.slots[2], down=False)
    assert [first.end(), second.end()] == [False, False]


def test_last_one_is_not_left_alone_with_the_queue(two: Desk) -> None:
    """If the other has ended already, or is down itself, a stopped runner's calls are this one's,
    and it comes back for them."""
    slot, other = two.scheduler.slots
    two.admit()
    two.scheduler.set_down(slot, down=True)
    two.scheduler.set_down(other, down=True)
    two.scheduler.stop()
    assert two.scheduler.rest(slot, 0.0)
    two.scheduler.set_down(other, down=False)
    assert not two.scheduler.rest(slot, 0.0)
    other.over = True
    assert two.scheduler.rest(slot, 0.0)
    assert not slot.over


def test_rest_tells_who_waits_for_idleness(desk: Desk) -> None:
    """Nothing waits and nothing runs: that the model is not there does not matter."""
    call = desk.admit()
    desk.take()
    idle = desk.scheduler.when_idle()
    desk.scheduler.set_down(desk.scheduler.slots[0], down=True)
    desk.scheduler.finish(call, None, None)
    assert desk.scheduler.rest(desk.scheduler.slots[0], 0.0)
    assert idle.done()


def test_rest_is_as_long_as_it_says() -> None:
    """It ends by itself; and a latch that lets go before that changes nothing."""
    desk = Desk()
    began = desk.scheduler.clock()
    slot = desk.scheduler.slots[0]
    slot.wake_up = Fickle()
    assert desk.scheduler.rest(slot, 0.02)
    assert desk.scheduler.clock() >= began + 0.02
    assert desk.scheduler._resting == []


class Fickle:
    """A latch that lets go by itself, each time but one of so many.

    :ivar meanwhile: what happens in that moment
    :ivar let_go: how often it has been asked
    """

    def __init__(self, times: int = 2) -> None:
        self._times = times
        self._lock = threading.Lock()
        self._lock.acquire()
        self.meanwhile: Callable[[], object] = lambda: None
        self.let_go = 0

    def acquire(self, *, timeout: float = -1) -> bool:
        self.let_go += 1
        if self.let_go % self._times:
            self.meanwhile()
            self.meanwhile = lambda: None
            return False
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._lock.release()


def test_latch_that_lets_go_by_itself(desk: Desk) -> None:
    """The thread is told that there is nothing to do, and is not taken for asleep any more."""
    slot = desk.scheduler.slots[0]
    latch = slot.wake_up = Fickle()
    assert desk.scheduler.take(slot) is None
    assert not slot.over
    assert desk.scheduler._idle == []
    call = desk.admit()
    assert desk.take() is call
    assert latch.let_go == 1


def test_latch_that_lets_go_as_a_call_comes(desk: Desk) -> None:
    """The call is taken, and its wake-up does not stay behind for the next sleep."""
    slot = desk.scheduler.slots[0]
    latch = slot.wake_up = Fickle(times=3)
    latch.meanwhile = desk.admit
    assert desk.take(0).state is CallState.RUNNING
    assert latch.let_go == 3  # asked until it lets go of what was released
    assert not latch._lock.acquire(blocking=False)


STEPS = ("stop", "drop", "abandon")


@pytest.mark.parametrize("steps", list(itertools.permutations(STEPS)), ids="-".join)
@pytest.mark.parametrize("broken", [False, True])
def test_stop_in_any_order(two: Desk, steps: tuple[str, ...], broken: bool) -> None:
    """With one slot that rests, or is broken, and one that runs a call: in whatever order it is
    stopped, every caller is sent away, and both threads end."""
    running = two.admit("running")
    two.take(1)
    resting = Resting(two, 0)
    if broken:
        two.scheduler.set_broken(two.scheduler.slots[0], no_model)
    two.admit("waiting")
    actions: dict[str, Callable[[], object]] = {
        "stop": two.scheduler.stop,
        "drop": lambda: two.scheduler.drop_queued(stopped),
        "abandon": lambda: two.scheduler.abandon_running(stopped),
    }
    for step in steps:
        actions[step]()
    assert resting.end() is False
    assert sorted(two.port.posted) == ["running", "waiting"]
    assert two.scheduler.finish(running, None, None) is None
    assert two.scheduler.take(two.scheduler.slots[1]) is None
    assert two.scheduler.slots[1].over
    two.books(submitted=2, cancelled=2, late=1)


# -- service time ------------------------------------------------------------------------------


def test_service_time_is_a_moving_average(desk: Desk, clock: Clock) -> None:
    """The first call counts whole, then each by an eighth; late ones count too."""
    for seconds, average in ((8.0, 8.0), (16.0, 9.0), (9.0, 9.0)):
        call = desk.admit()
        desk.take()
        clock.now += seconds
        desk.scheduler.leave(call, CANCELLED)
        desk.scheduler.finish(call, None, None)
        assert desk.counters.service_time == average


# -- with a thread that takes ------------------------------------------------------------------


@pytest.fixture
def served() -> Iterator[Desk]:
    """A desk with a thread behind it that gives every call its waiter for a result."""
    desk = Desk()

    def serve() -> None:
        while (call := desk.scheduler.take()) is not None:
            while call is not None:
                call = desk.scheduler.finish(call, call.waiter, None)

    thread = threading.Thread(target=serve)
    thread.start()
    yield desk
    desk.scheduler.stop()
    thread.join(LIMIT)
    assert not thread.is_alive()


class Bell(RecordingPort):
    """A port that rings when something is posted."""

    def __init__(self) -> None:
        super().__init__()
        self.rung = threading.Event()

    def post(self, waiter: object, /) -> None:
        del waiter
        self.rung.set()


def admit_and_wait(desk: Desk) -> None:
    bell = Bell()
    desk.scheduler.admit(make_call(port=bell))
    assert bell.rung.wait(LIMIT)


def test_sleeping_thread_is_woken(served: Desk) -> None:
    """Each time the thread has run out of calls, the next one wakes it."""
    for _ in range(100):
        admit_and_wait(served)
    served.books(submitted=100, completed=100)


def test_cancel_between_put_and_get(served: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that leaves as its call is queued leaves a thread that runs the next one."""
    queue = served.scheduler._queue
    push = queue.push

    def push_and_leave(call: Call) -> None:
        push(call)
        assert served.scheduler.leave(call, CANCELLED)

    for _ in range(10):
        with monkeypatch.context() as patch:
            patch.setattr(queue, "push", push_and_leave)
            served.admit()
        admit_and_wait(served)
    assert served.port.posted == []
    served.books(submitted=20, cancelled=10, completed=10)


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless")
def test_cancel_in_the_tick_of_completion(served: Desk) -> None:
    """In ten thousand races between a caller that leaves and the end of its call, one of the two
    wins: either it left and is never woken, or it is woken, once."""
    left = []
    for number in range(10_000):
        call = served.admit(number)
        sum(range(number % 3000))  # now and then a little later
        if served.scheduler.leave(call, CANCELLED):
            left.append(number)
    admit_and_wait(served)
    served.scheduler.when_idle().result(LIMIT)
    woken = served.port.posted
    assert woken  # both outcomes have come about, or this has tested nothing
    assert left
    assert sorted(woken + left) == list(range(10_000))
    assert served.counters.cancelled == len(left)
    assert served.counters.completed == len(woken) + 1
    check_law(served.scheduler, served.counters)


class Crew:
    """Threads that take calls, each in a slot of its own, and see to it that they are alone there.

    :ivar most: how many calls ran at once, at most
    """

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.most = 0
        self._inside = [0] * len(desk.scheduler.slots)
        self._wrong: list[str] = []
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,)) for slot in desk.scheduler.slots
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, slot: Slot) -> None:
        while not slot.over:
            call = self.desk.scheduler.take(slot)
            while call is not None:
                following = self._run(slot, call)
                call = following

    def _run(self, slot: Slot, call: Call) -> Call | None:
        self._inside[slot.number] += 1
        self.most = max(self.most, sum(self._inside))
        if self._inside[slot.number] != 1 or slot.current() is not call or call.slot is not slot:
            self._wrong.append(f"{self._inside}, slot {slot.number}")
        sum(range(call.waiter % 50))
        self._inside[slot.number] -= 1
        return self.desk.scheduler.finish(call, call.waiter, None)

    def end(self) -> None:
        self.desk.scheduler.stop()
        for thread in self._threads:
            thread.join(LIMIT)
        assert not any(thread.is_alive() for thread in self._threads)
        assert self._wrong == []


@pytest.mark.usefixtures("restless")
def test_thousands_of_calls_in_three_slots() -> None:
    """From two callers' threads at once, some of whom leave: each call runs once, in one slot, and
    its caller is woken once, or has left. No call is forgotten while a thread sleeps."""
    desk = Desk(max_queue=10**6, slots=3)
    crew = Crew(desk)
    left: list[int] = []

    def admit(first: int) -> None:
        for number in range(first, 3000, 2):
            call = desk.admit(number)
            if number % 7 == 0 and desk.scheduler.leave(call, CANCELLED):
                left.append(number)
            if number % 100 < 2:
                desk.scheduler.when_idle().result(LIMIT)

    callers = [threading.Thread(target=admit, args=(first,)) for first in (0, 1)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(2 * LIMIT)
    desk.scheduler.when_idle().result(LIMIT)
    crew.end()
    assert sorted([*desk.port.posted, *left]) == list(range(3000))
    assert desk.counters.completed == 3000 - len(left)
    assert crew.most <= 3
    check_law(desk.scheduler, desk.counters)


def test_idle_slots_are_enough_for_all_that_waits() -> None:
    """As many calls as there are slots run at once, each time that all of them have slept."""
    desk = Desk(slots=3)
    together = threading.Barrier(3)
    ended: list[int] = []

    def serve(slot: Slot) -> None:
        while (call := desk.scheduler.take(slot)) is not None:
            while call is not None:
                ended.append(together.wait(LIMIT))  # passed by three or by none
                call = desk.scheduler.finish(call, None, None)

    threads = [threading.Thread(target=serve, args=(slot,)) for slot in desk.scheduler.slots]
    for thread in threads:
        thread.start()
    for _ in range(100):
        for number in range(3):
            desk.admit(number)
        desk.scheduler.when_idle().result(LIMIT)
    desk.scheduler.stop()
    for thread in threads:
        thread.join(LIMIT)
    assert len(ended) == 300
    desk.books(submitted=300, completed=300)


# -- every sequence of steps -------------------------------------------------------------------


class SchedulerMachine(RuleBasedStateMachine):
    """Any sequence of steps: the books balance, and each caller is woken when it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(_scheduler, "time", SimpleNamespace(monotonic=self.clock.monotonic))
        self.open(1)
        self.calls: list[Call] = []
        self.left: set[Call] = set()  # whose callers went by themselves: nobody to be woken
        self.rejected = 0

    @initialize(slots=st.integers(1, 3))
    def open(self, slots: int) -> None:
        self.desk = Desk(max_queue=3, slots=slots)
        self.scheduler = self.desk.scheduler

    def teardown(self) -> None:
        self.patch.undo()

    @rule(priority=st.integers(-1, 1), seconds=st.none() | st.integers(1, 4))
    def admit(self, priority: int, seconds: int | None) -> None:
        deadline = None if seconds is None else self.clock.now + seconds
        call = self.desk.call(priority=priority, deadline=deadline)
        call.waiter = call
        try:
            self.scheduler.admit(call)
        except InferenceError:
            self.rejected += 1
        else:
            self.calls.append(call)

    @rule(seconds=st.floats(0, 2))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.free() and self.takeable())
    @rule(number=st.integers(0, 2))
    def take(self, number: int) -> None:
        slot = self.free()[number % len(self.free())]
        first = min(self.takeable(), key=lambda call: call.priority)
        assert self.scheduler.take(slot) is first
        assert slot.current() is first

    @precondition(lambda self: self.running())
    @rule(number=st.integers(0, 2), error=st.sampled_from([None, LookupError("gone")]))
    def finish(self, number: int, error: Exception | None) -> None:
        call = self.running()[number % len(self.running())]
        following = self.scheduler.finish(call, "result", error)
        assert call.slot.current() is following

    @rule(number=st.integers(0, 2), state=st.sampled_from(["up", "down", "broken"]))
    def lose_or_restore(self, number: int, state: str) -> None:
        slot = self.scheduler.slots[number % len(self.scheduler.slots)]
        self.scheduler.set_down(slot, down=state != "up")
        if state == "broken":
            self.scheduler.set_broken(slot, no_model)

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), how=st.sampled_from(["leave", "expire", "withdraw", "disconnect"]))
    def depart(self, data: st.DataObject, how: str) -> None:
        call = data.draw(st.sampled_from(self.calls))
        states = [CallState.QUEUED] if how == "withdraw" else [CallState.QUEUED, CallState.RUNNING]
        news = call.state in states and call.departure is None
        if how == "disconnect":
            self.scheduler.disconnect(call)
            return
        leave: dict[str, Callable[[Call], bool]] = {
            "leave": lambda call: self.scheduler.leave(call, CANCELLED),
            "expire": self.scheduler.expire,
            "withdraw": self.scheduler.withdraw,
        }
        assert leave[how](call) == news
        if news:
            self.left.add(call)

    @rule()
    def drop_queued(self) -> None:
        self.scheduler.drop_queued(stopped)

    @rule()
    def abandon_running(self) -> None:
        assert self.scheduler.abandon_running(stopped) == ("len" if self.running() else None)

    def free(self) -> list[Slot]:
        slots = self.scheduler.slots
        return [slot for slot in slots if slot.current() is None and not slot.down]

    def running(self) -> list[Call]:
        return [call for call in self.calls if call.state is CallState.RUNNING]

    def takeable(self) -> list[Call]:
        return [
            call
            for call in self.calls
            if call.state is CallState.QUEUED
            and (call.deadline is None or call.deadline > self.clock.now)
        ]

    @invariant()
    def woken_once_when_over(self) -> None:
        over = (CallState.FINISHED, CallState.DROPPED)
        for call in self.calls:
            due = call not in self.left and (call.state in over or call.departure is not None)
            assert self.desk.port.posted.count(call) == due

    @invariant()
    def books_balance(self) -> None:
        ended = [c for c in self.calls if c.state in (CallState.FINISHED, CallState.DROPPED)]
        counters = self.desk.counters
        assert counters.cancelled == sum(call.departure is CANCELLED for call in ended)
        assert counters.expired == sum(call.departure is EXPIRED for call in ended)
        assert counters.rejected == self.rejected
        assert counters.submitted == len(self.calls) + self.rejected
        assert counters.running == len(self.running())
        check_law(self.scheduler, counters)


TestSchedulerMachine = pytest.mark.unmeasured(SchedulerMachine.TestCase)
TestSchedulerMachine.settings = hypothesis.settings(max_examples=30)
