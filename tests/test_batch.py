"""What batches cost, when it pays to wait for one, and which calls share one: no thread in it."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asgi_infer._batch import BatchCall, BatchFunction, LinearCost
from asgi_infer._call import Call, CallState, Departure
from asgi_infer._errors import DeadlineExceeded, QueueFull
from asgi_infer._model import ModelReference
from asgi_infer._queue_policy import QueuePolicy
from asgi_infer._scheduler import Scheduler
from asgi_infer._stacking import any_item, as_list, results
from asgi_infer._statistics import Counters

from .calls import RecordingPort, make_call
from .gates import LIMIT

FADE = 0.9


class Clock:
    """``time.monotonic()``, which stands still unless it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def make_function(func: Any = len, **options: Any) -> BatchFunction:
    """As a ``Batcher`` makes it."""
    defaults: dict[str, Any] = {"max_size": 4, "max_delay": 0.0, "key_of": any_item}
    return BatchFunction(func, join=as_list, split=results, **(defaults | options))


def learned(fixed: float, each: float, **options: Any) -> BatchFunction:
    """A function whose batches have taken ``fixed + each * n`` seconds."""
    function = make_function(**options)
    for size in (1, 2):
        function.cost.add(size, fixed + each * size)
    return function


# -- what a batch costs ------------------------------------------------------------------------


def test_cost_of_nothing_known() -> None:
    """Before the first batch every size costs nothing: no reason to refuse or to wait."""
    assert LinearCost()(64) == 0.0


def test_cost_of_one_size() -> None:
    """Batches of one size say nothing of the slope: any other size counts as long."""
    cost = LinearCost()
    for seconds in (1.0, 3.0):
        cost.add(4, seconds)
    assert cost.each == 0.0
    assert cost(1) == cost(64) == pytest.approx((FADE * 1 + 3) / (FADE + 1))


@given(
    st.lists(st.tuples(st.integers(1, 64), st.floats(0.001, 10)), min_size=2, max_size=30).filter(
        lambda batches: len({size for size, _ in batches}) > 1
    )
)
def test_cost_is_weighted_least_squares(batches: list[tuple[int, float]]) -> None:
    """The line is the one that numpy.polyfit finds, with fading weights, unless that has a
    negative slope or start: it is then the best one, through the mean, that has not."""
    cost = LinearCost()
    for size, seconds in batches:
        cost.add(size, seconds)
    sizes, times = np.array(batches).T
    weights = FADE ** np.arange(len(batches))[::-1]
    mean_size, mean_time = np.average(sizes, weights=weights), np.average(times, weights=weights)
    if np.average((sizes - mean_size) ** 2, weights=weights) < 0.01:
        return  # the sizes have been the same for so long that the slope is remembered
    each, _ = np.polyfit(sizes, times, 1, w=np.sqrt(weights))
    expected = min(max(each, 0.0), mean_time / mean_size)
    assert cost.each == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert cost.fixed == pytest.approx(mean_time - expected * mean_size, rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 1e6)), max_size=50))
def test_cost_is_never_negative(batches: list[tuple[int, float]]) -> None:
    """Whatever the batches were, also huge ones, or such as took no time at all."""
    cost = LinearCost()
    for size, seconds in batches:
        cost.add(size, seconds)
        assert cost.fixed >= 0.0
        assert cost.each >= 0.0
        assert math.isfinite(cost(10**9))


def test_cost_remembers_the_slope() -> None:
    """A hundred batches of one size do not make it forget what others have shown."""
    cost = LinearCost()
    for size in (1, 8):
        cost.add(size, 0.1 + 0.01 * size)
    for _ in range(100):
        cost.add(8, 0.18)
    assert cost(1) == pytest.approx(0.11)


def test_cost_follows_a_change() -> None:
    """A model that has become slower is known after some batches."""
    cost = LinearCost()
    for number in range(100):
        size = 1 + number % 8
        cost.add(size, (0.1 + 0.01 * size) * (1 if number < 50 else 2))
    assert cost(8) == pytest.approx(0.36, rel=0.05)


@pytest.mark.parametrize(
    ("count", "seconds"), [(0, 0), (1, 1.1), (4, 1.4), (5, 1.4 + 1.1), (12, 3 * 1.4)]
)
def test_seconds(count: int, seconds: float) -> None:
    """So many calls take as many full batches as there are, and the rest."""
    assert learned(1.0, 0.1, max_size=4).seconds(count) == pytest.approx(seconds)


# -- when it pays to wait ----------------------------------------------------------------------


def arriving(function: BatchFunction, *times: float) -> BatchFunction:
    for time in times:
        function.arrived(time)
    return function


def test_no_wait_before_anything_is_known() -> None:
    """Neither a cost nor a gap is known: run now."""
    assert make_function(max_delay=1.0).wait_until(1, 10.0) == 10.0
    assert arriving(make_function(max_delay=1.0), 9.0, 10.0).wait_until(1, 10.0) == 10.0


def test_wait_while_calls_come_fast() -> None:
    """It waits for twice the usual gap, and no longer than max_delay after the first."""
    function = arriving(learned(1.0, 0.1, max_delay=0.5), 10.0, 10.1)
    assert function.wait_until(2, 10.0) == pytest.approx(10.3)
    function.max_delay = 0.25
    assert function.wait_until(2, 10.0) == pytest.approx(10.25)


@given(
    st.floats(0.01, 1),
    st.floats(0, 0.1),
    st.floats(0.001, 1),
    st.integers(1, 7),
)
def test_wait_pays(fixed: float, each: float, gap: float, waiting: int) -> None:
    """It waits if, and only if, all would have their answers sooner in sum."""
    function = arriving(learned(fixed, each, max_size=8, max_delay=100.0), 10.0, 10.0 + gap)
    cost = function.cost
    now = waiting * cost(waiting) + cost(waiting) + cost(1)
    after = (waiting + 1) * (function._gap + cost(waiting + 1))
    if after != pytest.approx(now, rel=1e-6):
        waits = function.wait_until(waiting, 10.0) > 10.0 + gap
        assert waits is (after < now)


@given(st.lists(st.tuples(st.floats(1e-6, 10), st.floats(0, 100)), max_size=40))
@example([(0.001, 0.0)] * 20 + [(10.0, 0.0)] + [(0.001, 0.0)] * 3)
def test_one_caller_alone_never_waits(rounds: list[tuple[float, float]]) -> None:
    """One who calls again when it has its answer, at once or later, is never held up, from its
    first call on, and however long its calls take."""
    function, now = make_function(max_delay=10.0), 0.0
    for seconds, pause in rounds:
        function.arrived(now)
        assert function.wait_until(1, now) <= now
        function.cost.add(1, seconds)
        now += seconds + pause


def test_one_client_after_many() -> None:
    """Who is left alone after a burst is held up for a few calls, and by the burst's gaps."""
    function, now, held = learned(0.1, 0.001, max_delay=10.0), 100.0, 0
    for _ in range(50):
        function.arrived(now := now + 0.001)
    for _ in range(20):
        function.arrived(now := now + 0.101)
        held += function.wait_until(1, now) > now
    assert held <= 7


def test_a_night_is_forgotten() -> None:
    """A long pause counts as one gap that is not worth waiting for, and not as hours."""
    function = learned(0.1, 0.001, max_delay=10.0)
    arriving(function, *(n / 1000 for n in range(50)), 36_000.0)
    arriving(function, *(36_000 + n / 1000 for n in range(1, 6)))
    assert function.wait_until(1, 36_000.005) > 36_000.005


def test_batch_function_is_never_called() -> None:
    """It stands where a function stands, and is no function."""
    with pytest.raises(NotImplementedError):
        make_function()(1)


# -- the calls ---------------------------------------------------------------------------------


def make_batch_call(function: BatchFunction, item: Any = 0, **options: Any) -> BatchCall:
    """A call as a runner makes it."""
    defaults = {"deadline": None, "priority": 0, "port": RecordingPort(), "waiter": "waiter"}
    return BatchCall((function, (item,)), copy_context(), **(defaults | options))


def test_call_of_a_batch() -> None:
    """It knows its function, its item, and what it is called, also when it is over."""
    call = make_batch_call(make_function(partial(sorted, reverse=True)), "item")
    assert call.name == "sorted"
    assert call.item == "item"
    call.work = None
    assert call.name == "sorted"


def test_call_is_no_reference_cycle() -> None:
    """A call that is let go of is gone, without a garbage collection."""
    gc.disable()
    try:
        remains = weakref.ref((call := make_batch_call(make_function())).port)
        del call
        assert remains() is None
    finally:
        gc.enable()


def test_no_reference_is_an_item() -> None:
    """A reference in a list would be followed by nobody: it is refused at once."""
    with pytest.raises(TypeError, match=r"runner\.model\.words can't be an item of a batch"):
        make_batch_call(make_function(), ModelReference(None, ("words",)))


def test_given_up_alone() -> None:
    """A call that has not started, and one that leads nobody, is given up as any other."""
    call = make_batch_call(make_function(), deadline=10.0)
    assert [call.given_up(9.0), call.given_up(10.0)] == [False, True]


def test_given_up_together() -> None:
    """Only when nobody waits any more for any of those that run together."""
    leader, mate, other = (make_batch_call(make_function()) for _ in range(3))
    mate.deadline = 10.0
    leader.members, leader.together = (leader, mate, other), (leader, mate)
    leader.departure = Departure.CANCELLED
    assert [leader.given_up(9.0), leader.given_up(10.0)] == [False, True]


def test_limit() -> None:
    """A batch is waited for until the latest of its deadlines; for ever if one has none."""
    leader, late, patient = (
        make_batch_call(make_function(), deadline=deadline) for deadline in (3.0, 10.0, None)
    )
    assert leader.limit == 3.0
    leader.together = [leader, late]
    assert leader.limit == 10.0
    leader.together = [leader, late, patient]
    assert leader.limit is None


# -- which calls share a batch -----------------------------------------------------------------


class Desk:
    """A scheduler on a clock of the test's own, and the calls that were admitted."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.counters = Counters()
        self.scheduler = Scheduler(
            max_queue=100,
            counters=self.counters,
            lock=threading.RLock(),
            clock=self.clock.monotonic,
            **options,
        )

    def admit(self, function: BatchFunction, item: Any = 0, **options: Any) -> BatchCall:
        if "seconds" in options:
            options["deadline"] = self.clock.now + options.pop("seconds")
        call = make_batch_call(function, item, waiter=item, **options)
        self.scheduler.admit(call)
        return call

    def poll(self) -> Call | None:
        return self.scheduler.poll()[0]

    def take(self) -> list[Any]:
        """The items of the next batch, which then is running."""
        leader = self.poll()
        assert type(leader) is BatchCall
        assert all(member.state is CallState.RUNNING for member in leader.members)
        return [member.item for member in leader.members]

    def end(self, seconds: float = 0.0) -> list[Any]:
        """The batch that runs has ended; the items of the next one, if there is one."""
        self.clock.now += seconds
        leader = self.scheduler.slots[0].current()
        assert type(leader) is BatchCall
        self.scheduler.settle((member, None, None) for member in leader.members)
        following = self.scheduler.finish_batch(leader)
        assert following is None or type(following) is BatchCall
        return [] if following is None else [member.item for member in following.members]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_natural_batching(desk: Desk) -> None:
    """The first call runs at once; what comes meanwhile is the next batch, in order."""
    function = make_function(max_size=3)
    desk.admit(function, "a")
    assert desk.take() == ["a"]
    for item in "bcde":
        desk.admit(function, item)
    assert desk.counters.running == 1
    assert desk.end() == ["b", "c", "d"]
    assert desk.counters.running == 3
    assert desk.end() == ["e"]
    assert desk.end() == []
    assert desk.counters.completed == 5


def test_batches_of_equals(desk: Desk) -> None:
    """Calls of other functions, of other keys and plain ones neither join nor are moved."""
    one, two = make_function(key_of=type), make_function(key_of=type)
    for function, item in [(one, 1), (two, 2), (one, "x"), (one, 3), (two, 4)]:
        desk.admit(function, item)
    desk.scheduler.admit(make_call(waiter="plain"))
    assert desk.take() == [1, 3]
    assert desk.end() == [2, 4]
    assert desk.end() == ["x"]


def test_mates_of_other_priorities(desk: Desk) -> None:
    """They join in the order of their turns: an older call of a higher number is not passed by
    all that came within its ageing."""
    function = make_function(max_size=3)
    desk.admit(function, "blocks")
    desk.take()
    desk.admit(function, "old", priority=1)
    desk.clock.now += 2.0
    for item in "abc":
        desk.admit(function, item)
    desk.admit(function, "urgent", priority=-1)
    assert desk.end() == ["urgent", "old", "a"]
    assert desk.end() == ["b", "c"]


def test_newest_mates_first() -> None:
    """Where the newest are served first, they are the ones who join."""
    desk = Desk(policy=QueuePolicy(overload="newest", interval=0.0))
    function = make_function(max_size=2)
    desk.admit(function, "blocks")
    desk.take()
    for item in "abcd":
        desk.admit(function, item, seconds=10.0)
        desk.clock.now += 1.0
    desk.scheduler._overload.active = True
    assert desk.end() == ["d", "c"]


def test_cancelled_before_it_starts(desk: Desk) -> None:
    """A waiting item that is cancelled, or whose client hangs up, is not in the batch."""
    function = make_function()
    calls = [desk.admit(function, item) for item in "abcd"]
    desk.scheduler.leave(calls[0], Departure.CANCELLED)
    desk.scheduler.disconnect(calls[2])
    assert desk.take() == ["b", "d"]


def test_expired_before_it_starts(desk: Desk) -> None:
    """A waiting item that is too late neither joins nor keeps those behind it from joining."""
    function = make_function()
    desk.admit(function, "a")
    late = desk.admit(function, "late", seconds=1.0)
    desk.admit(function, "b", seconds=9.0)
    desk.clock.now += 1.0
    assert desk.take() == ["a", "b"]
    assert late.state is CallState.QUEUED
    assert desk.end() == []
    assert late.departure is Departure.EXPIRED


def test_a_deadline_bounds_the_batch(desk: Desk) -> None:
    """A batch that would make one of its members late is cut; the others wait for the next."""
    function = learned(1.0, 0.1, max_size=10)
    desk.admit(function, "a", seconds=1.25)
    for item in "bcd":
        desk.admit(function, item)
    assert desk.take() == ["a", "b"]
    assert desk.end() == ["c", "d"]


def test_who_would_be_too_late_waits(desk: Desk) -> None:
    """A mate that this batch would make late is left out, and those behind it join."""
    function = learned(1.0, 0.1, max_size=10)
    tight = make_batch_call(function, "tight", deadline=desk.clock.now + 1.25)
    desk.admit(function, "a")
    desk.admit(function, "b")
    tight.arrived = desk.clock.now
    desk.scheduler._queue.push(tight)  # admit() would refuse it
    desk.scheduler._counters.submitted += 1
    desk.admit(function, "c", seconds=1.5)
    assert desk.take() == ["a", "b", "c"]


def test_a_lost_cause_bounds_nothing(desk: Desk) -> None:
    """Who is not in time alone is run, and does not make a batch of one: a queue that is too
    long would never get any shorter."""
    function = learned(1.0, 0.1, max_size=10)
    desk.admit(function, "lost", seconds=0.5)
    desk.admit(function, "b")
    assert desk.take() == ["lost", "b"]


def test_predicted_wait(desk: Desk) -> None:
    """A call that joins the last batch waits for those ahead, and for its own to end."""
    function = learned(1.0, 0.1, max_size=4)
    for item in range(6):
        desk.admit(function, item)
    # One full batch, 1.4 s; then one of three, 1.3 s.
    with pytest.raises(DeadlineExceeded, match=r"2\.69 s and would need about 2\.7 s"):
        desk.admit(function, "short", seconds=2.69)
    assert desk.admit(function, "long", seconds=2.71).state is CallState.QUEUED


def test_predicted_wait_behind_a_batch(desk: Desk) -> None:
    """What runs already is one batch, of which a part is over."""
    function = learned(1.0, 0.1, max_size=4)
    for item in range(4):
        desk.admit(function, item)
    desk.take()
    desk.clock.now += 0.4
    with pytest.raises(DeadlineExceeded, match=r"2 s and would need about 2\.1 s"):
        desk.admit(function, "short", seconds=2.0)
    assert desk.admit(function, "long", seconds=2.11).state is CallState.QUEUED


def test_predicted_wait_of_other_keys(desk: Desk) -> None:
    """Those of another key run in batches of their own."""
    function = learned(1.0, 0.1, max_size=4, key_of=type)
    for item in ["a", "b", 1]:
        desk.admit(function, item)
    with pytest.raises(DeadlineExceeded, match=r"would need about 2\.4 s"):
        desk.admit(function, 2, seconds=2.3)
    with pytest.raises(DeadlineExceeded, match=r"would need about 3\.4 s"):
        desk.admit(function, None, seconds=3.3)


def test_a_full_queue_says_when_to_come_back(desk: Desk) -> None:
    """``Retry-After`` counts batches, and not calls."""
    function = learned(10.0, 0.0, max_size=50)
    for item in range(100):
        desk.admit(function, item)
    with pytest.raises(QueueFull) as caught:
        desk.admit(function)
    assert 20.0 <= (caught.value.retry_after or 0) <= 1.5 * 20.0 + 3


# -- the books ---------------------------------------------------------------------------------


def test_service_time_is_the_whole_batch(desk: Desk) -> None:
    """From its start to its end, even if the one that led it was settled long before."""
    function = make_function()
    desk.admit(function, "a")
    desk.admit(function, "b")
    leader = desk.poll()
    assert type(leader) is BatchCall
    desk.clock.now += 1.0
    desk.scheduler.settle([(leader.members[0], None, None)])
    desk.clock.now += 2.0
    desk.scheduler.settle([(leader.members[1], None, None)])
    following = desk.admit(function, "c")
    desk.clock.now += 1.0
    assert desk.scheduler.finish_batch(leader) is following
    assert desk.counters.service_time == 4.0
    assert following.started == desk.clock.now
    assert leader.ended == 1001.0


def test_nobody_holds_a_batch_together(desk: Desk) -> None:
    """When it is over the leader knows none of the others."""
    function = make_function()
    leader = desk.admit(function)
    desk.admit(function)
    desk.take()
    desk.end()
    assert leader.members == leader.together == ()


def test_under_way(desk: Desk) -> None:
    """What has begun are the members of the batch, first its leader; then comes what waits."""
    function = make_function(max_size=2)
    calls = [desk.admit(function, item) for item in "abc"]
    assert desk.scheduler.under_way() == calls
    desk.take()
    assert desk.scheduler.under_way() == calls
    assert desk.scheduler.slots[0].current() is calls[0]


def test_a_forked_child_finds_all(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch is made up, which no lock protects from a fork, no call is out of sight."""
    function = make_function()
    calls = [desk.admit(function, item) for item in "abc"]
    seen: list[set[Call]] = []
    remove = desk.scheduler._queue.remove

    def look(call: Call) -> None:
        if call is not calls[0]:  # between the queue and the slot, as any call
            seen.append(set(desk.scheduler.orphans()))
            remove(call)
            seen.append(set(desk.scheduler.orphans()))
        else:
            remove(call)

    monkeypatch.setattr(desk.scheduler._queue, "remove", look)
    desk.take()
    assert seen == [set(calls)] * 4


def test_a_stop_sends_every_member_away(desk: Desk) -> None:
    """Each gets an error of its own, and the name is that of the function."""
    function = make_function(sorted)
    calls = [desk.admit(function, item) for item in "abc"]
    desk.take()
    assert desk.scheduler.abandon_running(lambda _: QueueFull("x")) == "sorted"
    assert len({id(call.error) for call in calls}) == 3
    desk.end()
    assert (desk.counters.cancelled, desk.counters.late) == (3, 3)


# -- a thread that waits for more --------------------------------------------------------------


def fast(**options: Any) -> BatchFunction:
    """Calls come every millisecond, and a batch takes a second."""
    function = learned(1.0, 0.001, **({"max_delay": 0.5} | options))
    return arriving(function, *(999.0 + n / 1000 for n in range(1001)))


def test_hold(desk: Desk) -> None:
    """The batch is held while it grows fast, and runs when no more calls come."""
    function = fast()
    desk.admit(function, "a")
    assert desk.poll() is None
    desk.clock.now += 0.001
    desk.admit(function, "b")
    assert desk.poll() is None
    gap = function._gap
    assert gap == pytest.approx(0.001, rel=0.2)
    assert desk.scheduler.slots[0].look_again == pytest.approx(desk.clock.now + 2 * gap, rel=1e-9)
    desk.clock.now = desk.scheduler.slots[0].look_again
    assert desk.take() == ["a", "b"]


def test_hold_ends_with_a_full_batch(desk: Desk) -> None:
    """Nobody waits for more than there is room for."""
    function = fast(max_size=2)
    desk.admit(function, "a")
    assert desk.poll() is None
    desk.admit(function, "b")
    assert desk.take() == ["a", "b"]


def test_hold_after_a_batch(desk: Desk) -> None:
    """A batch that ends is followed by a pause, if that pays; the slot is free meanwhile."""
    function = fast()
    desk.admit(function, "a")
    desk.clock.now += 1.0
    desk.take()
    function.arrived(desk.clock.now + 0.99)
    function._gap = 0.001
    desk.clock.now += 1.0
    desk.admit(function, "b")
    assert desk.end() == []
    assert desk.scheduler.slots[0].current() is None
    assert desk.counters.running == 0


def test_no_hold_by_default(desk: Desk) -> None:
    """Without max_delay nothing ever waits."""
    desk.admit(fast(max_delay=0.0), "a")
    assert desk.take() == ["a"]


@pytest.mark.parametrize("other", ["plain", "function", "key"])
def test_no_hold_when_other_work_waits(desk: Desk, other: str) -> None:
    """A plain call, another function's, or one of another key: the thread does not idle."""
    function = fast(key_of=type)
    desk.admit(function, 1)
    assert desk.poll() is None
    if other == "plain":
        desk.scheduler.admit(make_call())
    else:
        desk.admit(function if other == "key" else fast(), "text")
    assert desk.take() == [1]


def test_no_hold_when_stopping(desk: Desk) -> None:
    """Who stops wants the accepted calls done."""
    desk.admit(fast(), "a")
    assert desk.poll() is None
    desk.scheduler.stop()
    assert desk.take() == ["a"]


def test_no_hold_past_a_deadline(desk: Desk) -> None:
    """It ends while there is time enough for a batch of one call more."""
    function = fast()
    desk.admit(function, "a", seconds=1.0035)
    assert desk.poll() is None
    assert desk.scheduler.slots[0].look_again == pytest.approx(desk.clock.now + 0.0015, abs=1e-6)
    desk.scheduler.leave(desk.scheduler.waiting()[0], Departure.CANCELLED)
    desk.admit(function, "b", seconds=1.002)
    assert desk.take() == ["b"]


def test_hold_counts_from_the_oldest(desk: Desk) -> None:
    """Of whatever priority, none is held for longer than max_delay."""
    function = fast(max_delay=0.001)
    desk.admit(function, "old", priority=1)
    desk.clock.now += 0.0005
    desk.admit(function, "urgent")
    assert desk.poll() is None
    assert desk.scheduler.slots[0].look_again == pytest.approx(1000.001, rel=1e-9)


def test_the_thread_wakes_up_by_itself() -> None:
    """The nap ends in time without anybody's call, and with a call it ends at once."""
    scheduler = Scheduler(max_queue=9, counters=Counters(), lock=threading.RLock())
    function = learned(1000.0, 0.001, max_size=2, max_delay=0.01)
    function._gap = 0.005
    taken: list[int] = []

    def serve() -> None:
        while (leader := scheduler.take()) is not None:
            assert type(leader) is BatchCall
            taken.append(len(leader.members))
            scheduler.settle((member, None, None) for member in leader.members)
            scheduler.finish_batch(leader)
            function._gap = 0.005

    thread = threading.Thread(target=serve)
    thread.start()
    port = RecordingPort()
    scheduler.admit(make_batch_call(function, port=port))
    scheduler.when_idle().result(LIMIT)
    function.max_delay, function._gap = LIMIT, LIMIT / 2
    for _ in range(2):
        scheduler.admit(make_batch_call(function, port=port))
    scheduler.when_idle().result(LIMIT)
    scheduler.stop()
    thread.join(LIMIT)
    assert taken == [1, 2]


class WakeUp:
    """The semaphore that the thread sleeps on, where the time is always up first.

    :ivar meanwhile: what happens in the moment in which the time is up
    """

    def __init__(self) -> None:
        self.released = 0
        self.meanwhile: Callable[[], object] = lambda: None

    def acquire(self, timeout: float | None = None) -> bool:
        if timeout is not None:
            self.meanwhile()
            return False
        assert self.released == 1, "it would sleep for ever"
        self.released -= 1
        return True

    def release(self) -> None:
        assert self.released == 0, "released twice"
        self.released += 1


@pytest.fixture
def wake_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> WakeUp:
    wake_up = WakeUp()
    monkeypatch.setattr(desk.scheduler.slots[0], "wake_up", wake_up)
    return wake_up


def test_woken_when_the_nap_is_over(desk: Desk, wake_up: WakeUp) -> None:
    """A call that comes in the very moment is in the batch, and its wake-up does not stay."""
    function = fast(max_size=2)
    first = desk.admit(function, "a")
    wake_up.meanwhile = lambda: desk.admit(function, "b")
    assert desk.scheduler.take() is first
    assert len(first.members) == 2
    assert wake_up.released == 0


def test_not_woken_when_the_nap_is_over(desk: Desk, wake_up: WakeUp) -> None:
    """A thread that has woken up by itself is not woken once more."""
    function = fast()
    first = desk.admit(function, "a")

    def time_passes() -> None:
        desk.clock.now = desk.scheduler.slots[0].look_again

    wake_up.meanwhile = time_passes
    assert desk.scheduler.take() is first
    desk.admit(function, "b")
    assert wake_up.released == 0
