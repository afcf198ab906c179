"""The waiting line, against the plainest thing that could do the same: a sorted list."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from asgi_infer._call import Call
from asgi_infer._queue import CallQueue

from .calls import make_call

PRIORITIES = st.integers(-2, 2)
SIZE = 5


def queue_of(*calls: Call) -> CallQueue:
    queue = CallQueue(100)
    for call in calls:
        queue.push(call)
    return queue


def test_empty() -> None:
    """An empty queue has nothing to take, to expire or to drop."""
    queue = CallQueue(1)
    assert queue.pop() is None
    assert queue.clear() == queue.remove_expired(0.0) == list(queue) == []
    assert len(queue) == 0
    assert not queue.full


def test_first_come_first_served() -> None:
    """Calls of one priority leave in the order of their arrival."""
    calls = [make_call() for _ in range(10)]
    queue = queue_of(*calls)
    assert [queue.pop() for _ in calls] == calls


def test_lower_priority_runs_sooner() -> None:
    """As with ``nice``: the lower number goes first, whenever it came."""
    late, usual, soon = (make_call(priority=p) for p in (7, 0, -7))
    queue = queue_of(late, usual, soon)
    assert list(queue) == [soon, usual, late]
    assert [queue.pop() for _ in range(3)] == [soon, usual, late]


def test_full() -> None:
    """The bound counts calls of all priorities together."""
    queue = CallQueue(3)
    full = [queue.full]
    for priority in (0, 3, -1):
        queue.push(make_call(priority=priority))
        full.append(queue.full)
    queue.pop()
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


def test_ahead_of() -> None:
    """A new call waits for those of lower number, and for its equals that came before."""
    queue = queue_of(*(make_call(priority=p) for p in (0, 0, 1, 5)))
    assert [sum(queue.ahead_of(p, 0.0).values()) for p in (-1, 0, 1, 4, 5)] == [0, 2, 3, 3, 4]


def test_many_priorities_leave_nothing_behind() -> None:
    """Priorities come from users: ten thousand different ones leave at most one lane."""
    queue = CallQueue(2)
    for priority in range(10_000):
        queue.push(make_call(priority=priority))
        queue.pop()
    assert len(queue._lanes) == 1


class QueueMachine(RuleBasedStateMachine):
    """Any sequence of steps; the list is the queue as one would explain it."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = CallQueue(SIZE)
        self.expected: list[Call] = []

    @precondition(lambda self: not self.queue.full)
    @rule(priority=PRIORITIES, deadline=st.none() | st.integers(0, 3))
    def push(self, priority: int, deadline: int | None) -> None:
        call = make_call(priority=priority, deadline=deadline)
        self.queue.push(call)
        self.expected.append(call)
        self.expected.sort(key=lambda call: call.priority)  # stable: arrival stays

    @rule()
    def pop(self) -> None:
        assert self.queue.pop() is (self.expected.pop(0) if self.expected else None)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.expected))
        self.queue.remove(call)
        self.expected.remove(call)

    @rule(now=st.integers(0, 3))
    def expire(self, now: int) -> None:
        expired = [c for c in self.expected if c.deadline is not None and c.deadline <= now]
        assert self.queue.remove_expired(now) == expired
        self.expected = [call for call in self.expected if call not in expired]

    @rule()
    def clear(self) -> None:
        assert self.queue.clear() == self.expected
        self.expected = []

    @rule(priority=PRIORITIES)
    def ahead(self, priority: int) -> None:
        ahead = sum(call.priority <= priority for call in self.expected)
        assert self.queue.ahead_of(priority, 0.0).get(None, 0) == ahead

    @invariant()
    def agree(self) -> None:
        assert list(self.queue) == self.expected
        assert len(self.queue) == len(self.expected)
        assert self.queue.full == (len(self.expected) >= SIZE)


TestQueueMachine = QueueMachine.TestCase
