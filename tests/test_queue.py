"""The waiting line, against the plainest thing that could do the same: a sorted list."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asgi_infer._batch import BatchGroup
from asgi_infer._call import Call
from asgi_infer._model import ModelReference
from asgi_infer._queue import CallQueue, size_of

from .calls import batch_function, make_call

PRIORITIES = st.integers(-2, 2)
SIZE = 5
AGEING = 1.5


def queue_of(*calls: Call) -> CallQueue:
    queue = CallQueue(100)
    for call in calls:
        queue.push(call)
    return queue


def take(queue: CallQueue) -> Call | None:
    """Take the next call, as the scheduler does."""
    call = queue.first()
    if call is not None:
        queue.remove(call)
    return call


def test_empty() -> None:
    """An empty queue has nothing to take, to expire or to drop."""
    queue = CallQueue(1)
    assert take(queue) is None
    assert queue.clear() == queue.remove_expired(0.0) == list(queue) == []
    assert len(queue) == 0
    assert not queue.full


def test_first_come_first_served() -> None:
    """Calls of one priority leave in the order of their arrival."""
    calls = [make_call() for _ in range(10)]
    queue = queue_of(*calls)
    assert [take(queue) for _ in calls] == calls


def test_lower_priority_runs_sooner() -> None:
    """As with ``nice``: the lower number goes first, whenever it came."""
    late, usual, soon = (make_call(priority=p) for p in (7, 0, -7))
    queue = queue_of(late, usual, soon)
    assert list(queue) == [soon, usual, late]
    assert [take(queue) for _ in range(3)] == [soon, usual, late]


def test_full() -> None:
    """The bound counts calls of all priorities together."""
    queue = CallQueue(3)
    full = [queue.full]
    for priority in (0, 3, -1):
        queue.push(make_call(priority=priority))
        full.append(queue.full)
    take(queue)
    assert [*full, queue.full] == [False, False, False, True, False]


def test_remove_keeps_the_order_of_the_others() -> None:
    """Who leaves from the middle makes nobody lose a place."""
    calls = [make_call() for _ in range(5)]
    queue = queue_of(*calls)
    queue.remove(calls[2])
    del calls[2]
    assert list(queue) == calls


def test_remove_expired() -> None:
    """Expired means: the deadline is now or before. Calls without one stay."""
    past, now, future = (make_call(deadline=d, priority=-1) for d in (1.0, 2.0, 3.0))
    patient = make_call()
    queue = queue_of(patient, past, now, future)
    assert queue.remove_expired(2.0) == [past, now]
    assert list(queue) == [future, patient]


def ahead(queue: CallQueue, priority: int, now: float = 0.0) -> int:
    return sum(queue.ahead_of(priority, now).values())


def test_ahead_of() -> None:
    """A new call waits for those of lower number, and for its equals that came before."""
    queue = queue_of(*(make_call(priority=p) for p in (0, 0, 1, 5)))
    assert [ahead(queue, p) for p in (-1, 0, 1, 4, 5)] == [0, 2, 3, 3, 4]


def test_ahead_of_counts_groups_apart() -> None:
    """Calls that differ in how long they run are counted apart, those that have aged as well."""
    first, second = batch_function(), batch_function()
    queue = queue_of(
        make_call(),
        make_call(first, "item"),
        make_call(second, "item"),
        make_call(first, "item", priority=3),
    )
    together, apart = BatchGroup(first, None), BatchGroup(second, None)
    assert queue.ahead_of(0, 1.0) == {None: 1, together: 1, apart: 1}
    assert queue.ahead_of(0, 3.0) == {None: 1, together: 2, apart: 1}
    assert (queue.count_of(together), queue.count_of(None)) == (2, 0)
    assert take(queue) is not None
    assert take(queue) is not None
    assert queue.count_of(together) == 1


# -- ageing ------------------------------------------------------------------------------------


def test_priorities_age() -> None:
    """A step of priority is worth ``ageing`` seconds: who waits for longer goes first."""
    patient = make_call(priority=2, arrived=10.0)
    sooner, later = make_call(arrived=13.9), make_call(arrived=14.1)
    queue = CallQueue(9, ageing=2.0)
    for call in (patient, sooner, later):
        queue.push(call)
    assert [take(queue) for _ in range(3)] == [sooner, patient, later]


def test_equal_turns() -> None:
    """Of two whose turn comes in the same tick, the lower number goes first."""
    late, soon = make_call(priority=1, arrived=0.0), make_call(priority=0, arrived=1.0)
    queue = queue_of(late, soon)
    assert take(queue) is soon


def test_aged_calls_are_ahead() -> None:
    """A new call waits for those of a higher number, too, that have waited for long enough."""
    queue = queue_of(*(make_call(priority=3, arrived=t) for t in (1.0, 2.0, 3.0)))
    assert [ahead(queue, 0, now) for now in (3.9, 4.0, 5.5, 9.0)] == [0, 1, 2, 3]


def test_newest() -> None:
    """The newest is the last of the first class that anybody waits in."""
    queue = queue_of()
    assert queue.newest() is None
    first, second, late = (make_call(priority=p) for p in (0, 0, 1))
    for call in (first, second, late):
        queue.push(call)
    assert queue.newest() is second


@given(st.lists(st.tuples(PRIORITIES, st.integers(0, 9)), max_size=12))
def test_in_order(calls: list[tuple[int, int]]) -> None:
    """To look at all in order is to see what taking them would give, also in the same tick."""
    arrivals = sorted(arrived for _, arrived in calls)
    queue = CallQueue(99, ageing=1.0)
    for (priority, _), arrived in zip(calls, arrivals, strict=True):
        queue.push(make_call(priority=priority, arrived=float(arrived)))
    seen = list(queue.in_order())
    assert seen == [take(queue) for _ in calls]


def test_newest_first() -> None:
    """Each class from its end, the lower numbers first."""
    first, second, late, later = (make_call(priority=p) for p in (0, 0, 1, 1))
    assert list(queue_of(first, late, second, later).newest_first()) == [
        second,
        first,
        later,
        late,
    ]


# -- bytes -------------------------------------------------------------------------------------


def sized(size: int) -> Call:
    call = make_call()
    call.size = size
    return call


def test_bytes_are_bounded() -> None:
    """What the arguments hold is counted as they come and go, and bounded beside the calls."""
    queue = CallQueue(3, max_bytes=100)
    large, small = sized(70), sized(30)
    queue.push(large)
    assert queue.too_small_for(sized(31))
    assert not queue.too_small_for(small)
    queue.push(small)
    assert (queue.bytes, queue.full) == (100, False)
    assert queue.too_small_for(sized(1))
    queue.remove(large)
    assert queue.bytes == 30
    queue.clear()
    assert queue.bytes == 0


def test_larger_than_the_bound() -> None:
    """One call that is larger than all may hold is taken when nothing else waits: it would never
    be, else."""
    queue = CallQueue(3, max_bytes=100)
    assert not queue.too_small_for(sized(1000))
    queue.push(sized(1))
    assert queue.too_small_for(sized(1000))


def test_unbounded_bytes() -> None:
    """Without a bound for the bytes only the calls count."""
    queue = queue_of(sized(10**12))
    assert not queue.too_small_for(sized(10**12))


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ((), 0),
        ((1, None, "text"), 4),
        ((b"12345", bytearray(3)), 8),
        ((np.zeros(4, np.float32), memoryview(b"123")), 19),
        (([np.zeros(2), b"1"], {"a": np.zeros(1), "b": 7}, (b"12",)), 16 + 1 + 8 + 2),
        ((ModelReference(object()).nbytes, SimpleNamespace(nbytes="many")), 0),
    ],
)
def test_size_of(arguments: tuple[Any, ...], size: int) -> None:
    """Buffers count with their bytes, also one level deep; all else is small beside them."""
    assert size_of((print, arguments)) == size


def test_size_of_partials() -> None:
    """Keyword arguments come in partials, which may be nested."""
    show: Any = print
    func = partial(partial(show, b"123"), end=b"45")
    assert size_of((partial(func, b"6"), (b"7",))) == 7


def test_many_priorities_leave_nothing_behind() -> None:
    """Priorities come from users: ten thousand different ones leave at most one lane."""
    queue = CallQueue(2)
    for priority in range(10_000):
        queue.push(make_call(priority=priority))
        take(queue)
    assert len(queue._lanes) == 1


def turn(call: Call) -> tuple[float, int]:
    """What decides whose turn it is."""
    return call.arrived + AGEING * call.priority, call.priority


class QueueMachine(RuleBasedStateMachine):
    """Any sequence of steps; the list is the queue as one would explain it."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = CallQueue(SIZE, ageing=AGEING)
        self.expected: list[Call] = []  # in order of arrival
        self.now = 0.0

    @rule(seconds=st.integers(0, 3))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @precondition(lambda self: not self.queue.full)
    @rule(priority=PRIORITIES, deadline=st.none() | st.integers(0, 3))
    def push(self, priority: int, deadline: int | None) -> None:
        call = make_call(priority=priority, deadline=deadline, arrived=self.now)
        self.queue.push(call)
        self.expected.append(call)

    @rule()
    def pop(self) -> None:
        expected = min(self.expected, key=turn, default=None)
        assert self.queue.first() is expected
        assert take(self.queue) is expected
        if expected is not None:
            self.expected.remove(expected)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.expected))
        self.queue.remove(call)
        self.expected.remove(call)

    @rule(now=st.integers(0, 3))
    def expire(self, now: int) -> None:
        expired = [c for c in self.expected if c.deadline is not None and c.deadline <= now]
        assert sorted(self.queue.remove_expired(now), key=id) == sorted(expired, key=id)
        self.expected = [call for call in self.expected if call not in expired]

    @rule()
    def clear(self) -> None:
        assert self.queue.clear() == self.by_priority()
        self.expected = []

    @rule(priority=PRIORITIES)
    def ahead(self, priority: int) -> None:
        mine = self.now + AGEING * priority
        count = sum(
            call.priority <= priority or call.arrived + AGEING * call.priority <= mine
            for call in self.expected
        )
        assert ahead(self.queue, priority, self.now) == count

    def by_priority(self) -> list[Call]:
        return sorted(self.expected, key=lambda call: call.priority)  # stable: arrival stays

    @invariant()
    def agree(self) -> None:
        assert list(self.queue) == self.by_priority()
        assert len(self.queue) == len(self.expected)
        assert self.queue.full == (len(self.expected) >= SIZE)


TestQueueMachine = pytest.mark.unmeasured(QueueMachine.TestCase)


def test_ageing_of_any_size() -> None:
    """An ageing that is a huge integer makes the order of two priorities strict, and no error."""
    queue = CallQueue(2, ageing=10**308)
    low, high = make_call(priority=100), make_call(priority=0, arrived=5.0)
    queue.push(low)
    queue.push(high)
    assert queue.first() is high


TestQueueMachine.settings = hypothesis.settings(max_examples=40)
