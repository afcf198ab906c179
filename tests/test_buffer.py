"""A stream's items on their way: order, bounds, and nobody left asleep."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from asgi_infer._buffer import StreamBuffer
from asgi_infer._call import CallState, Departure

from .calls import RecordingPort
from .gates import LIMIT
from .polling import until_true
from .streams import make_stream_call


@pytest.fixture
def port() -> RecordingPort:
    return RecordingPort()


def filled(size: int) -> StreamBuffer:
    """A buffer that is full, of the numbers from 0 on."""
    buffer = StreamBuffer(size)
    for number in range(size):
        buffer.put(number)
    assert buffer.full
    return buffer


class WaitingThread:
    """A thread that waits for room in a buffer, and is on its way into that wait, or in it.

    :ivar found: what the wait returned, when it has ended
    """

    def __init__(self, buffer: StreamBuffer, timeout: float | None = LIMIT) -> None:
        self.found: bool | None = None

        def wait() -> None:
            self.found = buffer.wait_for_room(timeout)

        self._thread = threading.Thread(target=wait)
        self._thread.start()
        until_true(lambda: buffer._blocked or not self._thread.is_alive())

    def join(self) -> bool:
        self._thread.join(LIMIT)
        assert self.found is not None, "the thread waits for ever"
        return self.found

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()


# -- items -------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [[1, 2, 3], [None, 0, "", False, []]])
def test_first_in_first_out(items: list[Any]) -> None:
    """Items come out as they went in, also those that are falsy."""
    buffer = StreamBuffer(10)
    for item in items:
        buffer.put(item)
    taken = []
    while buffer:
        taken.append(buffer.take())
    assert taken == items


def test_size() -> None:
    """A buffer of n items is full with n, and half empty with half of them, rounded down."""
    for size, half in ((1, 0), (2, 1), (5, 2)):
        buffer = filled(size)
        left = size
        while not buffer.half_empty:
            buffer.take()
            left -= 1
            assert not buffer.full
        assert left == half


def test_closed_takes_no_items() -> None:
    """A closed buffer is never full, and what is put into it is not kept alive."""
    buffer = filled(2)
    buffer.close()
    assert not buffer.full
    buffer.clear()
    buffer.put("late")
    assert not buffer


# -- the consumer ------------------------------------------------------------------------------


@pytest.mark.parametrize("happens", ["put", "close", "post"])
def test_consumer_is_woken_once(port: RecordingPort, happens: str) -> None:
    """An item, the end, or a word of the scheduler's wakes the one who waits, and once."""
    buffer = StreamBuffer(10)
    buffer.wait_with("waiter", port)
    happening: dict[str, Callable[[], None]] = {
        "put": lambda: buffer.put(1),
        "close": buffer.close,
        "post": lambda: buffer.post("what the call has for a waiter"),
    }
    happening[happens]()
    assert port.posted == ["waiter"]
    happening[happens]()
    assert port.posted == ["waiter"]


def test_nobody_waits() -> None:
    """Without a consumer there is nobody to wake."""
    buffer = StreamBuffer(10)
    buffer.put(1)
    buffer.post()
    assert buffer.take() == 1


def test_waiter_that_waits_no_more(port: RecordingPort) -> None:
    """A consumer that found an item, and waits anew, is woken by what it waits with now."""
    buffer = StreamBuffer(10)
    buffer.wait_with("old", port)
    other = RecordingPort()
    buffer.wait_with("new", other)
    buffer.put(1)
    assert (port.posted, other.posted) == ([], ["new"])


def test_two_who_wake(port: RecordingPort) -> None:
    """One who wakes the consumer can't take away the waiter that it waits with by then.

    The consumer is woken by somebody else while the first is about to, and waits again.
    """
    buffer = StreamBuffer(10)
    again = RecordingPort()

    class Slow(RecordingPort):
        def post(self, waiter: Any, /) -> None:
            buffer.wait_with("second", again)

    buffer.wait_with("first", Slow())
    buffer.put(1)
    buffer.put(2)
    assert again.posted == ["second"]


def test_as_a_port() -> None:
    """Nobody asks a stream for its loop: it may have none, or more than one."""
    buffer = StreamBuffer(10)
    assert not buffer.call_soon_threadsafe(lambda: None)
    with pytest.raises(NotImplementedError):
        buffer.call_later(1.0, lambda: None)


# -- the thread --------------------------------------------------------------------------------


def test_room_at_once() -> None:
    """A thread that finds room does not wait."""
    assert StreamBuffer(1).wait_for_room(None)


def test_woken_when_half_empty() -> None:
    """A thread that waits sleeps until half of the buffer is empty: not once for each item."""
    buffer = filled(4)
    thread = WaitingThread(buffer)
    buffer.take()
    assert thread.waits
    buffer.take()
    assert thread.join()


@pytest.mark.parametrize("timeout", [None, LIMIT])
def test_woken_when_closed(timeout: float | None) -> None:
    """A thread that waits is woken when nobody is going to make room."""
    buffer = filled(4)
    thread = WaitingThread(buffer, timeout)
    buffer.close()
    assert thread.join()


def test_closed_before_it_waits() -> None:
    """A thread does not wait for a consumer that has gone."""
    buffer = filled(1)
    buffer.close()
    buffer.close()
    assert buffer.wait_for_room(None)


def test_stalled() -> None:
    """Nobody takes anything: the thread waits no longer than it wants to."""
    assert not filled(2).wait_for_room(0.001)
    assert not filled(2).wait_for_room(0.0)


def test_slow_is_not_stalled() -> None:
    """A consumer that takes less than half in time has taken something: there is room."""
    buffer = filled(4)
    thread = WaitingThread(buffer, 0.05)
    buffer.take()
    assert thread.join()


def test_woken_in_vain() -> None:
    """A wake-up that comes too late, for room that is used already, makes no room.

    The consumer may be stopped between its question and the wake-up for as long as it takes.
    """
    buffer = filled(1)
    buffer._blocked = True  # the thread is about to wait, and finds room
    buffer.take()
    assert buffer.wait_for_room(None)
    buffer.put(1)
    assert not buffer._room.locked()  # the wake-up is on its way
    thread = WaitingThread(buffer)
    until_true(buffer._room.locked)
    assert thread.waits
    buffer.take()
    assert thread.join()


@pytest.mark.parametrize("size", [1, 2, 16])
def test_many_items(size: int) -> None:
    """Of thousands of items between two threads none is lost, doubled or late, and nobody hangs.

    The consumer waits as a task does: for its waiter, after another look.
    """
    buffer = StreamBuffer(size)
    most = 0

    class EventPort(RecordingPort):
        def post(self, waiter: threading.Event, /) -> None:
            waiter.set()

    def produce() -> None:
        nonlocal most
        for number in range(3000):
            buffer.put(number)
            most = max(most, len(buffer._items))
            if buffer.full:
                assert buffer.wait_for_room(LIMIT)

    thread = threading.Thread(target=produce)
    thread.start()
    port = EventPort()
    for number in range(3000):
        while not buffer:
            waiter = threading.Event()
            buffer.wait_with(waiter, port)
            assert buffer or waiter.wait(LIMIT), "a wake-up was lost"
        assert buffer.take() == number
    thread.join(LIMIT)
    assert not thread.is_alive()
    assert most <= size


# -- the call ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deadline", "stall_timeout", "seconds"),
    [
        (None, None, None),
        (None, 3.0, 3.0),
        (105.0, None, 5.0),
        (105.0, 3.0, 3.0),
        (102.0, 3.0, 2.0),
        (99.0, 3.0, 0.0),
    ],
)
def test_patience(
    deadline: float | None, stall_timeout: float | None, seconds: float | None
) -> None:
    """A full buffer may stand for ``stall_timeout``, and not after the deadline."""
    call = make_stream_call(deadline=deadline, stall_timeout=stall_timeout)
    assert call.patience(100.0) == seconds


def test_over() -> None:
    """No items come when the generator has ended, or was never begun; they may when it runs."""
    call = make_stream_call()
    over = {}
    for state in CallState:
        call.state = state
        over[state] = call.over
    assert [state for state in CallState if over[state]] == [
        CallState.FINISHED,
        CallState.DROPPED,
    ]
    call.state, call.departure = CallState.RUNNING, Departure.CANCELLED
    assert not call.over


def test_groups() -> None:
    """Who waits for a stream waits for all of it, or for one item."""
    groups = [make_stream_call(interleave=interleave).group for interleave in (False, True)]
    assert groups == ["stream", "item"]
