"""Batches on the thread: what a run does, on a scheduler with a clock of the tests' own."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextvars import Context, ContextVar, copy_context
from typing import Any, NoReturn

import hypothesis
import pytest
from hypothesis import given, stateful
from hypothesis import strategies as st

from asgi_infer._batch import BatchCall, BatchFunction
from asgi_infer._call import CallState, Departure, Work, check_cancelled, here
from asgi_infer._errors import CallCancelled, CallFailed, DeadlineExceeded, WorkerCrashed
from asgi_infer._execute import run_batch
from asgi_infer._future import FUTURE_PORT, CallFuture
from asgi_infer._queue_policy import QueuePolicy
from asgi_infer._scheduler import Scheduler
from asgi_infer._stacking import any_item, as_list, results
from asgi_infer._statistics import Counters
from asgi_infer.workers._protocol import LazyResult, Steps

from .calls import RecordingPort

# -- batches -----------------------------------------------------------------------------------


class BatchWorker:
    """A worker without a model, and without anything that it would do to the thread."""

    def execute(self, work: Work, context: Context, /) -> Any:
        func, args = work
        return context.run(func, *args)

    def iterate(self, work: Work, context: Context, /) -> Steps:
        raise NotImplementedError

    def close(self) -> None: ...


class BatchBench:
    """A scheduler whose thread is the test, and batches on it.

    :ivar now: what its clock says
    :ivar runs: the items that the function was called with, call by call
    :ivar inside: done in each call of the function, with its items
    """

    def __init__(self, max_size: int = 100, **options: Any) -> None:
        self.now = 100.0
        self.counters = Counters()
        self.scheduler = Scheduler(
            max_queue=100,
            counters=self.counters,
            lock=threading.RLock(),
            clock=lambda: self.now,
            policy=QueuePolicy(overload="wait"),
        )
        self.port = RecordingPort()
        self.runs: list[list[Any]] = []
        self.inside: Callable[[list[Any]], Any] = lambda items: [double(item) for item in items]
        defaults: dict[str, Any] = {
            "key_of": any_item,
            "join": as_list,
            "split": results,
            "max_delay": 0.0,
        }
        self.function = BatchFunction(self.double, max_size=max_size, **(defaults | options))

    def double(self, items: list[Any]) -> Any:
        self.runs.append(list(items))
        return self.inside(items)

    def admit(self, item: Any, **options: Any) -> BatchCall:
        options = {"deadline": None, "priority": 0, "port": self.port, "waiter": item} | options
        call = BatchCall((self.function, (item,)), copy_context(), **options)
        self.scheduler.admit(call)
        return call

    def run_next(self) -> None:
        """Run what waits, as the inference thread does."""
        call, _ = self.scheduler.poll()
        while call is not None and call.state is CallState.RUNNING:
            assert type(call) is BatchCall
            run_batch(BatchWorker(), self.scheduler, call)
            call = self.scheduler.finish_batch(call)

    def run(self, *items: Any) -> list[BatchCall]:
        """Run one batch of these items."""
        calls = [self.admit(item) for item in items]
        self.run_next()
        return calls

    @property
    def calls(self) -> int:
        return len(self.runs)


def double(item: Any) -> Any:
    """Fails for negative numbers."""
    if item < 0:
        raise ValueError(item)
    return 2 * item


def outcome(call: BatchCall) -> Any:
    """What the call returned, or the error's type and arguments."""
    try:
        return call.outcome()
    except Exception as error:
        return type(error), *error.args


@pytest.fixture
def batches() -> BatchBench:
    return BatchBench()


@pytest.fixture
def on_thread(batches: BatchBench, monkeypatch: pytest.MonkeyPatch) -> BatchBench:
    """The same on what passes for an inference thread: ``check_cancelled`` knows its calls."""
    monkeypatch.setattr(here, "current_call", batches.scheduler.slots[0].current)
    monkeypatch.setattr(here, "clock", batches.scheduler.clock)
    return batches


def test_batch(batches: BatchBench) -> None:
    """Each gets its own result and is woken once, in order."""
    calls = batches.run(1, 2, 3)
    assert [call.outcome() for call in calls] == [2, 4, 6]
    assert batches.port.posted == [1, 2, 3]
    assert batches.runs == [[1, 2, 3]]
    assert batches.counters.batch_sizes == {3: 1}
    assert (batches.counters.completed, batches.counters.running) == (3, 0)
    assert batches.counters.batches_split == 0


def test_batch_teaches_what_it_costs(batches: BatchBench) -> None:
    """A batch that succeeds is learned from; one that fails is not."""

    def slow(items: list[int]) -> list[int]:
        batches.now += 3.0
        return [double(item) for item in items]

    batches.inside = slow
    batches.run(-1)
    assert batches.function.cost(1) == 0.0
    batches.run(1)
    assert batches.function.cost(1) == 3.0


def test_one_slow_batch_is_not_expected_again(batches: BatchBench) -> None:
    """It counts for no more than four usual ones."""
    seconds = 1.0

    def timed(items: list[int]) -> list[int]:
        batches.now += seconds
        return items

    batches.inside = timed
    for _ in range(10):
        batches.run(1)
    seconds = 100.0
    batches.run(1)
    assert 1.0 < batches.function.cost(1) < 2.0
    assert batches.scheduler._call_time == 0.0  # plain calls are expected apart


@pytest.mark.parametrize("size", range(1, 18))
def test_one_bad_item(size: int) -> None:
    """It fails alone, wherever it stands, with its own error, after so many calls at most."""
    bound = 2 * math.ceil(math.log2(size))
    for bad in range(size):
        batches = BatchBench()
        calls = batches.run(*(-7 if number == bad else number for number in range(size)))
        expected: list[Any] = [2 * number for number in range(size)]
        expected[bad] = (ValueError, -7)
        assert [outcome(call) for call in calls] == expected
        assert sorted(batches.port.posted) == sorted([*set(range(size)) - {bad}, -7])
        assert batches.calls - 1 <= bound
        assert sum(batches.counters.batch_sizes.values()) == batches.calls
        assert batches.counters.batches_split == math.ceil((batches.calls - 1) / 2)


def test_bad_items_only(batches: BatchBench) -> None:
    """Each has an error of its own, and the number of calls is bounded."""
    calls = batches.run(*(-number for number in range(1, 9)))
    errors = [call.error for call in calls]
    assert len({id(error) for error in errors}) == 8
    assert [outcome(call) for call in calls] == [(ValueError, -number) for number in range(1, 9)]
    assert batches.calls - 1 == 2 * 8 - 2
    assert batches.counters.batches_split == 7


@hypothesis.settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_some_bad_items(bad: list[bool]) -> None:
    """Whichever they are: they fail, the others succeed, and the number of calls is bounded."""
    batches = BatchBench()
    items = [-number if fails else number for number, fails in enumerate(bad, 1)]
    calls = batches.run(*items)
    expected = [(ValueError, item) if item < 0 else 2 * item for item in items]
    assert [outcome(call) for call in calls] == expected
    assert batches.calls - 1 <= 2 * len(items) - 2
    assert batches.calls - 1 <= 2 * sum(bad) * math.ceil(math.log2(len(items)) + 1)


# -- batches: what the function ends with ------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (SystemExit(3), (CallFailed, "BatchBench.double ended with SystemExit, which is no")),
        (KeyboardInterrupt(), (CallFailed, "BatchBench.double ended with KeyboardInterrupt,")),
        (GeneratorExit(), (CallFailed, "BatchBench.double ended with GeneratorExit, which")),
        (CancelledError(), (CallFailed, "BatchBench.double ended with CancelledError, which")),
        (CallCancelled("mine"), (CallFailed, "BatchBench.double ended with CallCancelled,")),
        (StopIteration(3), (RuntimeError, "BatchBench.double raised StopIteration")),
        (StopAsyncIteration(), (RuntimeError, "BatchBench.double raised StopAsyncIteration")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_odd_endings(
    batches: BatchBench, error: BaseException, expected: tuple[type[Exception], str]
) -> None:
    """What is no error, or can't be raised in a task, is that of one item, as of any call."""

    def odd(items: list[int]) -> list[int]:
        if 2 in items:
            raise error
        return items

    batches.inside = odd
    calls = batches.run(1, 2, 3)
    kind, message = expected
    caught = calls[1].error
    assert caught is not None
    assert type(caught) is kind
    assert str(caught).startswith(message)
    assert caught.__cause__ is error
    assert [calls[0].outcome(), calls[2].outcome()] == [1, 3]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1, 2], "BatchBench.double returned 2 results for 3 items; it must return as many"),
        ({1: 2}, "BatchBench.double returned a dict; a batch function must return as many"),
        (None, "BatchBench.double returned a NoneType; a batch function must"),
    ],
    ids=str,
)
def test_wrong_results(batches: BatchBench, returned: Any, message: str) -> None:
    """All get the same text in an error of their own; the function is not called again."""
    batches.inside = lambda items: returned
    calls = batches.run(1, 2, 3)
    errors = [call.error for call in calls]
    assert {type(error) for error in errors} == {TypeError}
    assert len({id(error) for error in errors}) == 3
    assert all(str(error).startswith(message) for error in errors)
    assert batches.runs == [[1, 2, 3]]
    assert batches.counters.batches_split == 0
    assert batches.counters.batch_sizes == {3: 1}
    assert batches.function.cost(3) == 0.0


def test_lazy_results(batches: BatchBench) -> None:
    """What has yet to run is nobody's result: no reason to look for the item that did it."""

    def lazy(items: list[int]) -> NoReturn:
        raise LazyResult("double returned a generator")

    batches.inside = lazy
    calls = batches.run(1, 2)
    assert [outcome(call) for call in calls] == [(TypeError, "double returned a generator")] * 2
    assert batches.calls == 1


def test_a_crash_in_a_batch(batches: BatchBench) -> None:
    """It is an error of each item's own, with what the process has left behind: who it was can't
    be told without crashing again, so that no half is run."""
    crash = WorkerCrashed("the process was killed by SIGSEGV")
    crash.add_note("its stack")

    def die(items: list[int]) -> NoReturn:
        raise crash

    batches.inside = die
    calls = batches.run(1, 2)
    assert calls[0].error is not calls[1].error
    assert [call.error and call.error.__notes__ for call in calls] == [["its stack"]] * 2
    assert [outcome(call) for call in calls] == [(WorkerCrashed, str(crash))] * 2
    assert batches.calls == 1


class Unwilling(list[Any]):
    """A list that runs code when it is iterated over, and fails."""

    def __iter__(self) -> Iterator[Any]:
        raise LookupError("not now")


def test_results_that_fail(batches: BatchBench) -> None:
    """Results that can't be taken apart are nobody's fault, whatever they raise."""
    batches.inside = Unwilling
    calls = batches.run(1, 2)
    assert [outcome(call) for call in calls] == [(TypeError, "BatchBench.double not now")] * 2
    assert batches.calls == 1


def test_results_are_taken_apart_without_the_lock(batches: BatchBench) -> None:
    """They may run anybody's code: it must not hold up those who ask the scheduler."""
    held: list[bool] = []

    class Curious(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            held.append(batches.scheduler._lock._is_owned())  # type: ignore[attr-defined]
            return super().__iter__()

    batches.inside = Curious
    assert [call.outcome() for call in batches.run(1, 2)] == [1, 2]
    assert held == [False]


def test_items_that_do_not_join(batches: BatchBench) -> None:
    """If there is no memory for all of them at once, there may be for a half."""

    def join(items: list[Any]) -> list[Any]:
        if len(items) > 2:
            raise MemoryError
        return items

    batches.function.join = join
    assert [call.outcome() for call in batches.run(1, 2, 3, 4)] == [2, 4, 6, 8]
    assert batches.runs == [[1, 2], [3, 4]]


# -- batches: who leaves -----------------------------------------------------------------------


def leaving(batches: BatchBench, leave: Callable[[], object]) -> None:
    """Have ``leave`` called in the first call of the function, which otherwise doubles."""

    def func(items: list[Any]) -> list[Any]:
        if batches.calls == 1:
            leave()
        return [double(item) for item in items]

    batches.inside = func


@pytest.mark.parametrize("departure", list(Departure)[:2], ids=str)
def test_who_leaves_leaves_the_others_alone(batches: BatchBench, departure: Departure) -> None:
    """The batch goes on, and the others get their results; the one is late, and not woken."""
    calls = [batches.admit(item) for item in (1, 2, 3)]
    leaving(batches, lambda: batches.scheduler.leave(calls[1], departure))
    batches.run_next()
    assert batches.port.posted == [1, 3]
    assert [calls[0].outcome(), calls[2].outcome()] == [2, 6]
    assert batches.counters.late == 1
    assert getattr(batches.counters, departure.value) == 1
    assert calls[1].state is CallState.FINISHED


def test_who_has_left_is_not_run_again(batches: BatchBench) -> None:
    """A batch that fails is run again without those that nobody waits for any more."""
    calls = [batches.admit(item) for item in (1, 2, -3, 4)]
    leaving(batches, lambda: batches.scheduler.leave(calls[0], Departure.CANCELLED))
    batches.run_next()
    assert batches.runs == [[1, 2, -3, 4], [2], [-3, 4], [-3], [4]]
    assert [outcome(call) for call in calls[1:]] == [4, (ValueError, -3), 8]
    assert batches.counters.cancelled == 1


def test_who_is_too_late_is_not_run_again(batches: BatchBench) -> None:
    """A time limit that nobody else watches, as with ``submit``, is seen between two calls."""
    calls = [batches.admit(1, deadline=101.0), batches.admit(-2), batches.admit(3)]

    def let_time_pass() -> None:
        batches.now += 1.0

    leaving(batches, let_time_pass)
    batches.run_next()
    assert batches.runs == [[1, -2, 3], [-2], [3]]
    assert calls[0].departure is Departure.EXPIRED
    with pytest.raises(DeadlineExceeded):
        calls[0].outcome()
    assert sorted(batches.port.posted) == [-2, 1, 3]
    assert batches.counters.expired == 1


def test_nobody_is_left(batches: BatchBench) -> None:
    """A batch that fails is not run again for nobody, nor counts as split."""
    calls = [batches.admit(item) for item in (-1, 2, 3)]
    leaving(batches, lambda: [batches.scheduler.leave(c, Departure.CANCELLED) for c in calls])
    batches.run_next()
    assert batches.calls == 1
    assert batches.port.posted == []
    assert batches.counters.cancelled == batches.counters.late == 3
    assert batches.counters.batches_split == 0


def test_who_leaves_while_its_half_waits(batches: BatchBench) -> None:
    """Also between one half and the other."""
    calls = [batches.admit(item) for item in (-1, 2, 3, 4)]

    def func(items: list[int]) -> list[int]:
        if batches.calls == 2:
            for call in calls[2:]:
                batches.scheduler.leave(call, Departure.CANCELLED)
        return [double(item) for item in items]

    batches.inside = func
    batches.run_next()
    assert batches.runs == [[-1, 2, 3, 4], [-1, 2], [-1], [2]]


# -- batches: check_cancelled ------------------------------------------------------------------


def test_check_cancelled_waits_for_the_last(on_thread: BatchBench) -> None:
    """It raises when nobody waits any more for any of the items, and then nothing is repeated."""
    batches, checks = on_thread, []
    calls = [batches.admit(1), batches.admit(2), batches.admit(3, deadline=101.0)]

    def func(items: list[int]) -> NoReturn:
        for call in calls[:2]:
            check_cancelled()
            checks.append(call.item)
            batches.scheduler.leave(call, Departure.CANCELLED)
        check_cancelled()
        checks.append(3)
        batches.now += 1.0
        check_cancelled()
        raise AssertionError("never reached")

    batches.inside = func
    batches.run_next()
    assert checks == [1, 2, 3]
    assert batches.calls == 1
    # The one whose time was up learns of it from the thread, since nobody else has told it.
    assert batches.port.posted == [3]
    with pytest.raises(DeadlineExceeded):
        calls[2].outcome()
    assert (batches.counters.cancelled, batches.counters.expired) == (2, 1)
    assert batches.counters.late == 3


def test_check_cancelled_in_a_batch_of_one(on_thread: BatchBench) -> None:
    """A single item whose time is up: its caller gets that, and not a failure."""
    batches = on_thread
    call = batches.admit(1, deadline=101.0)

    def func(items: list[int]) -> NoReturn:
        batches.now += 1.0
        check_cancelled()
        raise AssertionError("never reached")

    batches.inside = func
    batches.run_next()
    with pytest.raises(DeadlineExceeded):
        call.outcome()
    assert batches.counters.failed == 0


def test_check_cancelled_after_a_split(on_thread: BatchBench) -> None:
    """It asks about those that run now, and not about those that have, or are yet to."""
    batches, given_up = on_thread, []
    calls = [batches.admit(item) for item in (1, -2, 3, 4)]

    def func(items: list[int]) -> list[int]:
        if items == [-2]:
            batches.scheduler.leave(calls[1], Departure.CANCELLED)
            try:
                check_cancelled()
            except CallCancelled:
                given_up.append(-2)
                raise
        check_cancelled()
        return [double(item) for item in items]

    batches.inside = func
    batches.run_next()
    assert given_up == [-2]
    assert [calls[0].outcome(), calls[2].outcome(), calls[3].outcome()] == [2, 6, 8]


# -- batches: contexts and references ----------------------------------------------------------


def test_batch_runs_in_the_context_of_its_function() -> None:
    """Where the ``Batcher`` was made, and in a copy: no batch sees what another has set."""
    variable: ContextVar[str] = ContextVar("variable")
    seen = []

    def func(items: list[int]) -> list[int]:
        seen.append(variable.get())
        variable.set("changed")
        return items

    def make() -> BatchBench:
        variable.set("made")
        return BatchBench()

    batches = copy_context().run(make)
    batches.inside = func
    variable.set("called")
    batches.run(1, 2)
    batches.run(3)
    assert seen == ["made", "made"]


class Thing:
    """Something that can be seen to go."""


class Kept:
    """Calls whose items, contexts, results and errors are things that can be seen to go."""

    def __init__(self, ending: str) -> None:
        self.batches = BatchBench()
        self.batches.inside = self.func
        self.ending = ending
        self.calls: list[BatchCall] = []
        self.remains: list[weakref.ref[Any]] = []
        self.variable: ContextVar[Thing] = ContextVar("variable")

    def func(self, items: list[Thing]) -> Any:
        if self.ending == "left":
            for call in self.calls:
                self.batches.scheduler.disconnect(call)
        if self.ending == "wrong results":
            return items * 2
        if self.ending == "errors" or (self.ending == "one error" and items[0] is self.first):
            raise self.seen(LookupError(items))
        return [self.seen(Thing()) for _ in items]

    def seen(self, thing: Any) -> Any:
        self.remains.append(weakref.ref(thing))
        return thing

    @property
    def first(self) -> Any:
        return self.remains[0]()

    def admit(self, **options: Any) -> BatchCall:
        return copy_context().run(self._admit, {"waiter": "waiter"} | options)

    def _admit(self, options: dict[str, Any]) -> BatchCall:
        item = self.seen(Thing())
        self.variable.set(self.seen(Thing()))
        self.calls.append(self.batches.admit(item, **options))
        return self.calls[-1]

    def run(self) -> None:
        self.batches.run_next()
        self.batches.runs.clear()

    def left_over(self) -> list[Any]:
        return [each() for each in self.remains if each() is not None]


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What is in a reference cycle stays."""
    gc.disable()
    yield
    gc.enable()


ENDINGS = pytest.mark.parametrize(
    "ending", ["values", "errors", "one error", "wrong results", "left"]
)


@ENDINGS
@pytest.mark.usefixtures("no_collection")
def test_nothing_of_a_batch_stays(ending: str) -> None:
    """When outcomes have been taken, no item, result, error or context is left."""
    kept = Kept(ending)
    for _ in range(3):
        kept.admit()
    kept.run()
    while kept.calls:
        outcome(kept.calls.pop())
    assert kept.left_over() == []


@ENDINGS
@pytest.mark.usefixtures("no_collection")
def test_nothing_of_a_batch_stays_with_futures(ending: str) -> None:
    """The same for callers from synchronous code."""
    kept = Kept(ending)
    futures = [CallFuture() for _ in range(3)]
    for future in futures:
        future.attach(kept.admit(port=FUTURE_PORT, waiter=future), kept.batches.scheduler)
    kept.run()
    assert all(future.done() for future in futures)
    kept.calls.clear()
    future = futures.pop()
    futures.clear()
    del future
    assert kept.left_over() == []


@pytest.mark.usefixtures("no_collection")
def test_an_error_keeps_no_mate_alive(batches: BatchBench) -> None:
    """Who keeps the error of one item keeps nothing of the others."""
    remains: list[weakref.ref[Any]] = []

    def func(items: list[Thing]) -> list[Thing]:
        if any(item is bad for item in items):
            raise LookupError
        return items

    def admit() -> BatchCall:
        item = Thing()
        remains.append(weakref.ref(item))
        return batches.admit(item, waiter="waiter")

    batches.inside = func
    bad = Thing()
    calls = [admit(), batches.admit(bad, waiter="waiter"), admit()]
    batches.run_next()
    batches.runs.clear()
    kept = calls[1].error
    while calls:
        outcome(calls.pop())
    assert isinstance(kept, LookupError)
    assert [each() for each in remains] == [None, None]


# -- batches: whatever happens -----------------------------------------------------------------


class Histories(stateful.RuleBasedStateMachine):
    """Calls come, are cancelled, run out of time and fail in any order.

    The model says what each call may have come to; the books must say the same, and the function
    must never have seen an item that was gone, nor one again that had its outcome.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batches = BatchBench(max_size=4, key_of=lambda item: item[1])
        self.batches.inside = self.func
        self.calls: dict[int, BatchCall] = {}
        self.bad: set[int] = set()
        self.leaves: dict[int, set[int]] = {}  # item: who leaves while it runs
        self.left: set[int] = set()
        self.refused = 0

    def func(self, items: list[tuple[int, int]]) -> list[int]:
        assert len(items) <= 4
        assert len({key for _, key in items}) == 1
        numbers = [number for number, _ in items]
        assert not self.left & set(numbers)
        for number in numbers:
            for other in self.leaves.pop(number, set()):
                self.leave(other)
        self.batches.now += 1.0
        if self.bad & set(numbers):
            raise ValueError(*sorted(self.bad & set(numbers)))
        return numbers

    def leave(self, number: int) -> None:
        call = self.calls.get(number)
        if call is not None and self.batches.scheduler.leave(call, Departure.CANCELLED):
            self.left.add(number)

    @stateful.rule(
        bad=st.booleans(),
        key=st.integers(0, 1),
        priority=st.integers(0, 1),
        seconds=st.none() | st.integers(1, 12),
        leaves=st.sets(st.integers(-3, 3), max_size=2),
    )
    def admit(
        self, bad: bool, key: int, priority: int, seconds: int | None, leaves: set[int]
    ) -> None:
        number = len(self.calls) + self.refused
        deadline = None if seconds is None else self.batches.now + seconds
        try:
            self.calls[number] = self.batches.admit(
                (number, key), deadline=deadline, priority=priority, waiter=number
            )
        except DeadlineExceeded:
            self.refused += 1
            return
        if bad:
            self.bad.add(number)
        self.leaves[number] = {number + offset for offset in leaves}

    @stateful.rule(number=st.integers(0, 30))
    def cancel(self, number: int) -> None:
        self.leave(number)

    @stateful.rule(seconds=st.integers(1, 3))
    def let_time_pass(self, seconds: int) -> None:
        self.batches.now += seconds

    @stateful.rule()
    def run_until_idle(self) -> None:
        while self.batches.scheduler.queued:
            self.batches.run_next()

    @stateful.invariant()
    def the_books_say_what_happened(self) -> None:
        counters = self.batches.counters
        ended = [call for call in self.calls.values() if call.state is not CallState.QUEUED]
        expired = [call for call in ended if call.departure is Departure.EXPIRED]
        awaited = {n for n, c in self.calls.items() if c in ended and c.departure is None}
        assert counters.submitted == len(self.calls) + self.refused
        assert counters.rejected == self.refused
        assert counters.cancelled == len(self.left)
        assert counters.expired == len(expired)
        assert counters.completed == len(awaited - self.bad)
        assert counters.failed == len(awaited & self.bad)
        assert counters.running == 0
        assert sum(counters.batch_sizes.values()) == self.batches.calls

    @stateful.invariant()
    def every_call_came_to_what_it_should(self) -> None:
        for number, call in self.calls.items():
            if call.state is not CallState.FINISHED or call.departure is not None:
                continue
            if number in self.bad:
                assert isinstance(call.error, ValueError)
                assert call.error.args == (number,)
            else:
                assert (call.value, call.error) == (number, None)

    @stateful.invariant()
    def nobody_is_woken_twice(self) -> None:
        posted = self.batches.port.posted
        assert len(posted) == len(set(posted))

    def teardown(self) -> None:
        self.run_until_idle()
        self.the_books_say_what_happened()
        self.every_call_came_to_what_it_should()


def test_histories() -> None:
    """After any history every call has one outcome, the right one, and the books balance."""
    stateful.run_state_machine_as_test(
        Histories, settings=hypothesis.settings(max_examples=60, stateful_step_count=25)
    )
