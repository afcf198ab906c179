"""Streams on the thread: what a step does, on a scheduler with a clock of the tests' own."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar, copy_context
from typing import Any, NoReturn

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from asgi_infer._buffer import StreamCall
from asgi_infer._call import Call, CallState, Departure, Work, check_cancelled, here
from asgi_infer._errors import CallFailed, DeadlineExceeded, QueueFull
from asgi_infer._execute import step_stream
from asgi_infer._refusals import stopped
from asgi_infer._scheduler import Scheduler
from asgi_infer._statistics import Counters
from asgi_infer.workers._protocol import Steps
from asgi_infer.workers.thread import OpenGenerator

from .calls import RecordingPort, make_call
from .streams import make_stream_call

# -- streams -----------------------------------------------------------------------------------


class StreamWorker:
    """A worker without a model, and without anything that it would do to the thread."""

    def iterate(self, work: Work, context: Any, /) -> Steps:
        func, args = work
        return OpenGenerator(context.run(func, *args), context, func)

    def execute(self, work: Work, context: Any, /) -> NoReturn:
        raise NotImplementedError

    def close(self) -> None: ...


class StreamBench:
    """A scheduler whose thread is the test, and streams on it.

    :ivar now: what its clock says
    """

    def __init__(self) -> None:
        self.now = 100.0
        self.counters = Counters()
        self.scheduler = Scheduler(
            max_queue=100,
            counters=self.counters,
            lock=threading.RLock(),
            clock=lambda: self.now,
        )
        self.port = RecordingPort()

    def start(self, func: Callable[..., Iterator[Any]], **options: Any) -> StreamCall:
        """Have a stream admitted and claimed; its consumer waits."""
        call = make_stream_call(func, **{"interleave": False, "buffer": 100, **options})
        self.scheduler.admit(call)
        assert self.scheduler.poll() == (call, False)
        call.buffer.wait_with("consumer", self.port)
        return call

    def step(self, call: StreamCall) -> Call | None:
        return step_stream(StreamWorker(), self.scheduler, call)

    def run(self, func: Callable[..., Iterator[Any]], **options: Any) -> StreamCall:
        """Run a stream to its end."""
        call = self.start(func, **options)
        while call.state is CallState.RUNNING:
            self.step(call)
        assert call.steps is None
        return call

    def books(self) -> tuple[int, int, int, int, int]:
        c = self.counters
        assert c.running == 0
        return (c.completed, c.failed, c.cancelled, c.expired, c.late)


@pytest.fixture
def bench() -> Iterator[StreamBench]:
    bench = StreamBench()
    here.current_call = bench.scheduler.slots[0].current
    yield bench
    here.current_call = None


def test_open_streams_are_bounded(bench: StreamBench) -> None:
    """Those between two of their items wait in no queue, and are no more than may wait in one."""
    bench.scheduler._queue.max_size = 2
    for _ in range(2):
        bench.step(bench.start(lambda: iter("abc"), interleave=True, buffer=1))
    with pytest.raises(QueueFull, match="2 streams have begun and not ended"):
        bench.start(lambda: iter("abc"), interleave=True)
    assert bench.counters.rejected == 1
    for call in bench.scheduler.under_way():
        bench.scheduler.leave(call, Departure.CANCELLED)
    following, _ = bench.scheduler.poll()
    while following is not None:
        assert isinstance(following, StreamCall)
        following = bench.step(following)


def items(call: StreamCall) -> list[Any]:
    taken = []
    while call.buffer:
        taken.append(call.buffer.take())
    return taken


@pytest.mark.parametrize("interleave", [False, True])
def test_stream_to_the_end(bench: StreamBench, interleave: bool) -> None:
    """All items are put in, the call completes, and the consumer is woken."""
    call = bench.run(lambda: iter("abc"), interleave=interleave)
    assert items(call) == ["a", "b", "c"]
    assert bench.books() == (1, 0, 0, 0, 0)
    assert bench.port.posted == ["consumer"]


def test_stream_without_items(bench: StreamBench) -> None:
    """The end wakes the consumer as an item does."""
    call = bench.run(lambda: iter(()))
    assert (items(call), bench.books()) == ([], (1, 0, 0, 0, 0))
    assert bench.port.posted == ["consumer"]


class Failure(Exception):
    """What a generator raises; falsy, as an error may be."""

    def __bool__(self) -> bool:
        return False


def failing(*, at_end: bool = False) -> Iterator[int]:
    try:
        yield 1
        raise Failure
    finally:
        if at_end:
            raise LookupError


def test_stream_that_fails(bench: StreamBench) -> None:
    """An error is the outcome, with the items before it."""
    call = bench.run(failing)
    assert items(call) == [1]
    assert isinstance(call.error, Failure)
    assert bench.books() == (0, 1, 0, 0, 0)


def test_stream_that_can_not_be_made(bench: StreamBench) -> None:
    """What the function raises itself, before there is a generator, is the outcome."""

    def fail() -> NoReturn:
        raise Failure

    assert isinstance(bench.run(fail).error, Failure)
    assert bench.books() == (0, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("exception", "outcome"),
    [
        (StopAsyncIteration(), RuntimeError),
        (SystemExit(3), CallFailed),
        (KeyboardInterrupt(), CallFailed),
        (GeneratorExit(), CallFailed),
    ],
    ids=lambda value: getattr(type(value), "__name__", ""),
)
def test_what_must_not_cross(
    bench: StreamBench, exception: BaseException, outcome: type[Exception]
) -> None:
    """What would mean something else in the consumer's task arrives as an error."""

    def generate() -> Iterator[int]:
        yield 1
        raise exception

    assert type(bench.run(generate).error) is outcome


def test_stop_iteration_inside(bench: StreamBench) -> None:
    """``StopIteration`` inside a generator is an error of its, as Python has it, and no end."""

    def generate() -> Iterator[int]:
        yield next(iter(()))

    error = bench.run(generate).error
    assert isinstance(error, RuntimeError)
    assert isinstance(error.__cause__, StopIteration)


def test_stop_iteration_of_the_function(bench: StreamBench) -> None:
    """One that the function raises instead of returning an iterator is no end either."""
    error = bench.run(lambda: next(iter(()))).error
    assert isinstance(error, RuntimeError)
    assert bench.books() == (0, 1, 0, 0, 0)


def closing(log: list[str]) -> Iterator[int]:
    try:
        while True:
            log.append("step")
            yield len(log)
    finally:
        log.append("closed")


@pytest.mark.parametrize("interleave", [False, True])
def test_consumer_that_has_gone(
    bench: StreamBench, interleave: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator that nobody consumes is closed at its next step, and gets no further."""
    log: list[str] = []
    call = bench.start(lambda: closing(log), interleave=interleave, buffer=2)

    def leave(limit: float | None) -> bool:
        bench.scheduler.leave(call, Departure.CANCELLED)
        return True

    if interleave:
        assert bench.step(call) is call
        leave(None)
    else:
        monkeypatch.setattr(call.buffer, "wait_for_room", leave)
    assert bench.step(call) is None
    assert log == (["step", "closed"] if interleave else ["step", "step", "closed"])
    assert bench.books() == (0, 0, 1, 0, 1)


def test_consumer_that_has_gone_before(bench: StreamBench) -> None:
    """One whose consumer goes as it is claimed is not stepped at all."""
    log: list[str] = []
    call = bench.start(lambda: closing(log))
    bench.scheduler.leave(call, Departure.CANCELLED)
    bench.step(call)
    assert log == []
    assert bench.books() == (0, 0, 1, 0, 1)


def test_consumer_that_has_stalled(bench: StreamBench) -> None:
    """A full buffer that stands for too long ends the stream, and its consumer is told."""
    log: list[str] = []
    call = bench.run(lambda: closing(log), buffer=2, stall_timeout=0.001)
    assert log == ["step", "step", "closed"]
    assert isinstance(call.error, DeadlineExceeded)
    assert call.error.started
    assert "took no item for as long as stall_timeout allows" in str(call.error)
    assert bench.books() == (0, 0, 0, 1, 1)


def test_consumer_that_comes_back_as_it_stalls(
    bench: StreamBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for an item in the very moment is woken, and told as well."""
    call = bench.start(lambda: closing([]), buffer=2)
    items(call)

    def stall(limit: float | None) -> bool:
        items(call)
        call.buffer.wait_with("back", bench.port)
        return False

    monkeypatch.setattr(call.buffer, "wait_for_room", stall)
    bench.step(call)
    assert bench.port.posted == ["consumer", "back"]
    assert isinstance(call.error, DeadlineExceeded)


@pytest.mark.parametrize("stall_timeout", [None, 60.0])
def test_deadline_of_a_full_buffer(
    bench: StreamBench, stall_timeout: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread waits for room no longer than to the deadline, whatever the stall may take."""
    limits = []
    call = bench.start(lambda: closing([]), buffer=2, stall_timeout=stall_timeout, deadline=105.0)

    def wait(limit: float | None) -> bool:
        limits.append(limit)
        bench.now = 105.0
        return False

    monkeypatch.setattr(call.buffer, "wait_for_room", wait)
    bench.step(call)
    assert limits == [5.0]
    assert isinstance(call.error, DeadlineExceeded)
    assert "the call's time was up after 5 s of running" in str(call.error)
    assert bench.books() == (0, 0, 0, 1, 1)


@pytest.mark.parametrize("interleave", [False, True])
def test_deadline_between_items(bench: StreamBench, interleave: bool) -> None:
    """The deadline is looked at before each step; the consumer that waits is woken."""
    log: list[str] = []

    def generate() -> Iterator[int]:
        for item in closing(log):
            bench.now += 2
            yield item

    call = bench.run(generate, interleave=interleave, deadline=103.0)
    assert log == ["step", "step", "closed"]
    assert isinstance(call.error, DeadlineExceeded)
    assert bench.books() == (0, 0, 0, 1, 1)


def test_deadline_inside(bench: StreamBench) -> None:
    """``check_cancelled()`` inside a generator ends it at its deadline, as it ends a function."""

    def generate() -> Iterator[int]:
        yield 1
        bench.now += 5
        check_cancelled()
        raise AssertionError

    call = bench.run(generate, deadline=103.0)
    assert isinstance(call.error, DeadlineExceeded)
    assert bench.books() == (0, 0, 0, 1, 1)


@pytest.mark.parametrize("gone", [False, True])
def test_error_in_finally(bench: StreamBench, gone: bool) -> None:
    """What a ``finally`` block raises is the outcome if anybody waits for it; the thread lives."""

    def generate() -> Iterator[int]:
        try:
            yield 1
        finally:
            raise Failure

    call = bench.start(generate, interleave=True)
    bench.step(call)
    if gone:
        bench.scheduler.leave(call, Departure.CANCELLED)
    assert bench.step(call) is None
    assert bench.books() == ((0, 0, 1, 0, 1) if gone else (0, 1, 0, 0, 0))
    assert isinstance(call.error, Failure) is not gone


def test_error_of_close(bench: StreamBench) -> None:
    """An iterator that fails when it is closed at its end has failed."""

    class Reader:
        def __iter__(self) -> Reader:
            return self

        def __next__(self) -> NoReturn:
            raise StopIteration

        def close(self) -> NoReturn:
            raise Failure

    assert isinstance(bench.run(Reader).error, Failure)
    assert bench.books() == (0, 1, 0, 0, 0)


def test_the_first_error_counts(bench: StreamBench) -> None:
    """A generator that fails, and fails again when it is closed, has failed of the first."""

    class Reader:
        def __iter__(self) -> Reader:
            return self

        def __next__(self) -> NoReturn:
            raise Failure

        def close(self) -> NoReturn:
            raise LookupError

    assert isinstance(bench.run(Reader).error, Failure)


def test_generator_that_will_not_end(bench: StreamBench) -> None:
    """One that goes on yielding when it is closed is left where it is, and the thread goes on."""

    def generate() -> Iterator[int]:
        while True:
            try:
                yield 1
            except GeneratorExit:
                gone.append(1)
                if len(gone) > 1:
                    raise

    gone: list[int] = []
    call = bench.start(generate, interleave=True)
    bench.step(call)
    bench.scheduler.leave(call, Departure.CANCELLED)
    assert bench.step(call) is None
    assert gone  # it was asked
    assert bench.books() == (0, 0, 1, 0, 1)


def test_failed_generator_is_closed(bench: StreamBench) -> None:
    """Where an item is refused the generator has not ended: its ``finally`` block runs at once."""
    log: list[str] = []

    def generate() -> Iterator[Any]:
        try:
            yield (number for number in range(3))
        finally:
            log.append("closed")

    error = bench.run(generate).error
    assert isinstance(error, TypeError)
    assert "yielded a generator" in str(error)
    assert log == ["closed"]


variable: ContextVar[str] = ContextVar("variable")


def test_context_of_the_caller(bench: StreamBench) -> None:
    """Every step and the end run in one copy of the caller's context, and see what others set."""
    seen: list[str] = []

    def generate() -> Iterator[int]:
        try:
            for number in range(3):
                seen.append(variable.get())
                variable.set(f"step {number}")
                yield number
        finally:
            seen.append(variable.get())

    token = variable.set("caller's")
    try:
        bench.run(generate, interleave=True)
        assert seen == ["caller's", "step 0", "step 1", "step 2"]
        assert variable.get() == "caller's"
    finally:
        variable.reset(token)


class Thing:
    """Something that weak references know of."""


@pytest.mark.parametrize("end", ["return", "raise", "leave"])
def test_nothing_is_kept(bench: StreamBench, end: str) -> None:
    """At the end the generator, its arguments and its items go, without a collection."""
    kept: list[weakref.ref[Thing]] = []

    def generate(argument: Thing) -> Iterator[Thing]:
        for _ in range(3):
            item = Thing()
            kept.append(weakref.ref(item))
            yield item
        if end == "raise":
            local = Thing()
            kept.append(weakref.ref(local))
            raise LookupError

    def stream() -> StreamCall:
        argument = Thing()
        kept.append(weakref.ref(argument))
        call = make_stream_call(generate, argument, buffer=100, interleave=True)
        bench.scheduler.admit(call)
        bench.scheduler.poll()
        bench.step(call)
        if end == "leave":
            bench.scheduler.leave(call, Departure.CANCELLED)
            items(call)
        while call.state is CallState.RUNNING:
            bench.step(call)
        items(call)
        return call

    gc.disable()
    try:
        call = stream()
        if end == "raise":
            with pytest.raises(LookupError):
                call.outcome()
        assert [each() for each in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_fair_turns(bench: StreamBench) -> None:
    """One queued call after each item, and streams in turn: neither keeps the other waiting."""
    order: list[str] = []

    def generate(name: str) -> Iterator[int]:
        for number in range(3):
            order.append(f"{name}{number}")
            yield number

    for name in "ab":
        bench.scheduler.admit(make_stream_call(generate, name, buffer=100))
    for number in range(5):
        bench.scheduler.admit(Call((str, ()), copy_context(), None, 0, bench.port, number))
    call, _ = bench.scheduler.poll()
    while call is not None:
        if isinstance(call, StreamCall):
            call = bench.step(call)
        else:
            order.append(str(call.waiter))
            call = bench.scheduler.finish(call, None, None)
    assert order == ["a0", "b0", "a1", "0", "b1", "1", "a2", "2", "b2", "3", "4"]
    assert bench.books() == (7, 0, 0, 0, 0)


def test_fair_to_those_who_came_first(bench: StreamBench) -> None:
    """Ever new streams can't keep those that have begun from their turns."""
    order: list[str] = []

    def generate(name: str) -> Iterator[int]:
        while True:
            order.append(name)
            yield 1

    def admit(name: str) -> None:
        bench.scheduler.admit(make_stream_call(generate, name, buffer=100))

    admit("a")
    call, _ = bench.scheduler.poll()
    for name in "bcdefg":
        admit(name)
        assert isinstance(call, StreamCall)
        call = bench.step(call)
    assert "".join(order) == "abacbd"
    bench.scheduler.send_away(bench.scheduler.under_way(), stopped)
    while call is not None:
        assert isinstance(call, StreamCall)
        call = bench.step(call)


# -- what others wait for ------------------------------------------------------------------------


def taking(bench: StreamBench, *seconds: float) -> Callable[[], Iterator[int]]:
    """A generator function whose steps take so long."""

    def generate() -> Iterator[int]:
        for number, step in enumerate(seconds):
            bench.now += step
            yield number

    return generate


def needs(bench: StreamBench) -> float:
    """Seconds that a call would need by now, as it is told on arrival."""
    with pytest.raises(DeadlineExceeded, match="the call has") as caught:
        bench.scheduler.admit(make_call(deadline=bench.now + 1e-6))
    return float(str(caught.value).split("about ")[1].split(" s;")[0])


def test_wait_for_an_exclusive_stream(bench: StreamBench) -> None:
    """A call behind a stream waits for all of it, as long as those take as a rule.

    When one takes longer than that nobody knows, and the call is let in.
    """
    bench.run(taking(bench, 50, 50), interleave=True)  # another kind: it is not in the average
    bench.run(taking(bench, 5, 5))
    call = bench.start(taking(bench, 5, 5))
    bench.now += 4
    assert needs(bench) == 6
    bench.now += 7
    bench.scheduler.admit(make_call(deadline=bench.now + 1))
    bench.scheduler.drop_queued(stopped)
    bench.step(call)


def test_wait_for_an_interleaved_stream(bench: StreamBench) -> None:
    """A call behind one that lets others run waits for one item, however long it lasts."""
    bench.run(taking(bench, 5, 5, 5), interleave=True)
    call = bench.start(taking(bench, 5, 5, 5), interleave=True)
    for _ in range(3):
        bench.now += 2
        assert needs(bench) == 3
        bench.now -= 2
        bench.step(call)
    bench.step(call)


def test_wait_among_interleaved_streams(bench: StreamBench) -> None:
    """One item of those that have begun comes after each call; of those that stand, none."""
    bench.run(taking(bench, 2, 2), interleave=True)
    bench.scheduler._forecast._call = 10.0
    bench.start(taking(bench, 2, 2), interleave=True)
    bench.scheduler.admit(make_call())
    bench.scheduler.admit(make_call())
    assert needs(bench) == 2 + 2 * 10 + 10
    stream = bench.scheduler.slots[0].current()
    assert isinstance(stream, StreamCall)
    running = bench.step(stream)
    assert running is not None
    assert needs(bench) == 10 + (10 + 2) + 10
    bench.scheduler.send_away(bench.scheduler.under_way(), stopped)
    last = bench.scheduler.finish(running, None, None)
    assert last is stream
    bench.step(stream)


# -- the books -----------------------------------------------------------------------------------


class Books(RuleBasedStateMachine):
    """Streams and calls, admitted, stepped, consumed and given up in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = StreamBench()
        self.streams: list[StreamCall] = []
        self.taken: dict[StreamCall, list[int]] = {}
        self.running: Call | None = None

    @rule(
        length=st.integers(0, 4),
        buffer=st.integers(1, 3),
        fails=st.booleans(),
        deadline=st.none() | st.integers(1, 4),
        stall_timeout=st.none() | st.integers(1, 3),
    )
    def stream(self, length: int, buffer: int, fails: bool, **limits: int | None) -> None:
        def generate() -> Iterator[int]:
            yield from range(length)
            if fails:
                raise Failure

        deadline = limits["deadline"]
        call = make_stream_call(
            generate,
            buffer=buffer,
            stall_timeout=limits["stall_timeout"],
            deadline=None if deadline is None else self.bench.now + deadline,
        )
        with suppress(DeadlineExceeded):
            self.bench.scheduler.admit(call)
            self.streams.append(call)
            self.taken[call] = []

    @rule()
    def call(self) -> None:
        self.bench.scheduler.admit(make_call())

    @rule()
    def turn(self) -> None:
        """What the thread does."""
        if self.running is None:
            self.running, _ = self.bench.scheduler.poll()
            self.bench.scheduler._idle.clear()  # nobody sleeps here
            if self.running is not None and self.running.state is not CallState.RUNNING:
                self.running = None
        elif isinstance(self.running, StreamCall):
            self.running = self.bench.step(self.running)
        else:
            self.running = self.bench.scheduler.finish(self.running, None, None)

    @rule(data=st.data(), items=st.integers(1, 3))
    def take(self, data: st.DataObject, items: int) -> None:
        """What a consumer does."""
        waiting = [call for call in self.streams if call.buffer]
        if waiting:
            call = data.draw(st.sampled_from(waiting))
            for _ in range(min(items, len(call.buffer._items))):
                self.taken[call].append(call.buffer.take())
                if call.parked and call.buffer.half_empty:
                    self.bench.scheduler.resume(call)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        if self.streams:
            call = data.draw(st.sampled_from(self.streams))
            self.bench.scheduler.leave(call, Departure.CANCELLED)

    @rule()
    def time_passes(self) -> None:
        self.bench.now += 1

    @invariant()
    def law(self) -> None:
        c, scheduler = self.bench.counters, self.bench.scheduler
        ended = c.completed + c.failed + c.cancelled + c.expired + c.rejected
        assert c.submitted == ended + scheduler.queued + c.running
        states = [call.state for call in scheduler.under_way()]
        assert c.running == states.count(CallState.RUNNING)

    @invariant()
    def items(self) -> None:
        for call, taken in self.taken.items():
            assert taken == list(range(len(taken)))
            assert len(call.buffer._items) <= call.buffer.size

    def teardown(self) -> None:
        """Whatever stands is consumed or stalls: everything ends, and nothing stays parked."""
        self.bench.scheduler.stop()
        for call in self.streams:
            self.bench.scheduler.leave(call, Departure.CANCELLED)
        for _ in range(3 * (len(self.streams) + self.bench.counters.submitted) + 3):
            self.turn()
        assert self.bench.scheduler.poll() == (None, True)
        self.law()
        assert self.bench.counters.running == 0
        assert all(call.over and call.steps is None for call in self.streams)


def test_books() -> None:
    """After every step of any history the books balance, and in the end everything has ended."""
    settings = hypothesis.settings(max_examples=40, stateful_step_count=30, deadline=None)
    run_state_machine_as_test(Books, settings=settings)


def test_an_open_stream_hides_no_empty_queue(bench: StreamBench) -> None:
    """Two calls that waited for long, with an empty queue in between, make no queue that stands,
    also where a stream has its turns all the while."""
    current: Call | None = bench.start(taking(bench, *[1.0] * 20), interleave=True)
    for _ in range(2):
        bench.scheduler.admit(make_call(deadline=bench.now + 2))
        for _ in range(6):
            if isinstance(current, StreamCall):
                current = bench.step(current)
            elif current is not None:
                current = bench.scheduler.finish(current, None, None)
    assert not bench.scheduler.overloaded
    assert bench.counters.completed == 2
    bench.scheduler.send_away(bench.scheduler.under_way(), stopped)
    if isinstance(current, StreamCall):
        bench.step(current)
