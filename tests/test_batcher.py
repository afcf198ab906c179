"""Batches from the first call to the last result, on a runner and every event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from decimal import Decimal
from functools import partial
from typing import Any, Self

import anyio
import numpy as np
import pytest

from asgi_infer import (
    Batcher,
    CallFailed,
    DeadlineExceeded,
    Draining,
    InferenceRunner,
    QueueFull,
    ReentrantCall,
    check_cancelled,
)
from asgi_infer._batch import BatchCall
from asgi_infer._scheduler import Scheduler
from asgi_infer._statistics import Counters

from .calls import RecordingPort
from .gates import LIMIT, Gate
from .polling import some_turns, until
from .test_batch import make_batch_call, make_function

anywhere = pytest.mark.anyio


class Model:
    """Doubles numbers, many at once, and counts its calls.

    :ivar sizes: how many it got each time
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def double(self, numbers: list[int]) -> list[int]:
        self.sizes.append(len(numbers))
        if any(number < 0 for number in numbers):
            raise ValueError(f"{min(numbers)} is negative")
        return [2 * number for number in numbers]

    def scale(self, arrays: np.ndarray[Any, Any], by: float = 2.0) -> np.ndarray[Any, Any]:
        self.sizes.append(len(arrays))
        return arrays * by

    def lazy(self, numbers: list[int]) -> Any:
        return (2 * number for number in numbers)

    def taken(self) -> list[int]:
        sizes, self.sizes = self.sizes, []
        return sizes


@pytest.fixture
def runner() -> Iterator[InferenceRunner[Model]]:
    """A runner that is stopped in the end."""
    with InferenceRunner(Model) as runner:
        yield runner


class Held:
    """Keeps the thread busy, so that what comes meanwhile queues up."""

    def __init__(self, runner: InferenceRunner[Any], gate: Gate) -> None:
        self._runner = runner
        self._gate = gate

    async def __aenter__(self) -> Self:
        self._runner.submit(self._gate, None)
        await self._gate.entered_async()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._gate.release.set()

    async def queued(self, count: int) -> None:
        """Wait until so many calls are queued."""
        await until(lambda: self._runner.statistics().queued == count)


# -- the usual way -----------------------------------------------------------------------------


@anywhere
async def test_batches(runner: InferenceRunner[Model], gate: Gate) -> None:
    """What queues while the model is busy runs together, and each caller gets its own result."""
    batcher = Batcher(runner, runner.model.double, max_size=4)
    found: dict[int, int] = {}

    async def call(number: int) -> None:
        found[number] = await batcher.run(number)

    async with anyio.create_task_group() as tasks, Held(runner, gate) as held:
        for number in range(6):
            tasks.start_soon(call, number)
        await held.queued(6)
    assert found == {number: 2 * number for number in range(6)}
    assert await runner.run(runner.model.taken) == [4, 2]
    statistics = runner.statistics()
    assert statistics.batch_sizes == {2: 1, 4: 1}
    assert statistics.batches_split == 0


@anywhere
async def test_an_idle_model_runs_at_once(runner: InferenceRunner[Model]) -> None:
    """One caller alone never waits for others, also with a max_delay."""
    batcher = Batcher(runner, runner.model.double, max_size=4, max_delay=LIMIT)
    with anyio.fail_after(LIMIT / 2):
        for number in range(20):
            assert await batcher.run(number) == 2 * number
    assert runner.statistics().batch_sizes == {1: 20}


@anywhere
async def test_stacked(runner: InferenceRunner[Model], gate: Gate) -> None:
    """Arrays of equal shapes and dtypes are one array; others form batches of their own."""
    batcher = Batcher(runner, runner.model.scale, max_size=8, stack=True)
    items = [np.full(2, 1.0), np.full(3, 2.0), np.full(2, 3.0), np.full(2, 4, np.int32)]
    found: dict[int, Any] = {}

    async def call(number: int) -> None:
        found[number] = await batcher.run(items[number])

    async with anyio.create_task_group() as tasks, Held(runner, gate) as held:
        for number in range(4):
            tasks.start_soon(call, number)
            await held.queued(number + 1)
    assert [found[number].tolist() for number in range(4)] == [[2, 2], [4, 4, 4], [6, 6], [8, 8]]
    assert found[0].base is found[2].base is not None
    assert await runner.run(runner.model.taken) == [2, 1, 1]


@anywhere
async def test_bad_item_fails_alone(runner: InferenceRunner[Model], gate: Gate) -> None:
    """Its mates succeed, and the extra calls are counted."""
    batcher = Batcher(runner, runner.model.double, max_size=8)
    found: dict[int, Any] = {}

    async def call(number: int) -> None:
        try:
            found[number] = await batcher.run(number)
        except ValueError as error:
            found[number] = str(error)

    async with anyio.create_task_group() as tasks, Held(runner, gate) as held:
        for number in (1, -2, 3, 4):
            tasks.start_soon(call, number)
        await held.queued(4)
    assert found == {1: 2, -2: "-2 is negative", 3: 6, 4: 8}
    statistics = runner.statistics()
    assert statistics.failed == 1
    assert statistics.batches_split == 2
    assert sum(statistics.batch_sizes.values()) == 5


@anywhere
async def test_cancelled_member(runner: InferenceRunner[Model], gate: Gate) -> None:
    """Who is cancelled while waiting is no part of the batch, and the others don't notice."""
    batcher = Batcher(runner, runner.model.double, max_size=8)
    found = []

    async def call(number: int) -> None:
        found.append(await batcher.run(number))

    async with anyio.create_task_group() as tasks, Held(runner, gate) as held:
        tasks.start_soon(call, 1)
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(call, 2)
            await held.queued(2)
            leaving.cancel_scope.cancel()
        tasks.start_soon(call, 3)
        await held.queued(2)
    assert sorted(found) == [2, 6]
    assert await runner.run(runner.model.taken) == [2]
    assert runner.statistics().cancelled == 1


@anywhere
async def test_cancelled_while_it_runs(runner: InferenceRunner[Model], gate: Gate) -> None:
    """Who is cancelled while the batch runs leaves at once; its mates get their results."""
    inside = Gate()
    batcher: Batcher[int, int] = Batcher(runner, inside, max_size=8)
    found = []

    async def call(number: int) -> None:
        found.append(await batcher.run(number))

    async with anyio.create_task_group() as tasks:
        leaving = anyio.CancelScope()

        async def call_and_leave() -> None:
            with leaving:
                await call(1)

        async with Held(runner, gate) as held:
            tasks.start_soon(call_and_leave)
            tasks.start_soon(call, 2)
            await held.queued(2)
        await inside.entered_async()
        leaving.cancel()
        await some_turns()
        assert runner.statistics().late == 1
        assert runner.statistics().running == 2
        inside.release.set()
    assert found == [2]


@anywhere
async def test_member_that_is_too_late(runner: InferenceRunner[Model]) -> None:
    """Its caller has the error in time, and who waits with it a result."""
    inside = Gate()
    batcher: Batcher[int, int] = Batcher(runner, inside, max_size=8)
    mates: list[Future[int]] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(batcher.run, 1)
        await inside.entered_async()
        mates += [batcher.submit(2), batcher.submit(3)]
        with pytest.raises(DeadlineExceeded) as caught:
            await batcher.run(4, timeout=0.01)
        assert not caught.value.started
        inside.release.set()
    assert [mate.result(LIMIT) for mate in mates] == [2, 3]
    assert runner.statistics().batch_sizes == {1: 1, 2: 1}


@anywhere
async def test_check_cancelled(runner: InferenceRunner[Model], gate: Gate) -> None:
    """Inside a batch it raises when the last of its callers has left, and not before."""
    inside, again, raised = Gate(), Gate(), []

    def func(items: list[int]) -> list[int]:
        inside(None)
        check_cancelled()
        again(None)
        try:
            check_cancelled()
        except BaseException as error:
            raised.append(type(error).__name__)
            raise
        return items

    batcher = Batcher(runner, func, max_size=8)
    scopes = [anyio.CancelScope(), anyio.CancelScope()]

    async def call(number: int) -> None:
        with scopes[number]:
            await batcher.run(number)

    async with anyio.create_task_group() as tasks:
        async with Held(runner, gate) as held:
            tasks.start_soon(call, 0)
            tasks.start_soon(call, 1)
            await held.queued(2)
        await inside.entered_async()
        scopes[0].cancel()
        await until(lambda: runner.statistics().late == 1)
        inside.release.set()
        await again.entered_async()
        scopes[1].cancel()
        await until(lambda: runner.statistics().late == 2)
        again.release.set()
    await runner.wait_idle()
    assert raised == ["CallCancelled"]
    assert runner.statistics().cancelled == 2
    assert inside.entries == 1


# -- from everywhere ---------------------------------------------------------------------------


def test_submit(runner: InferenceRunner[Model], gate: Gate) -> None:
    """Calls from threads without a loop share batches, too."""
    batcher = Batcher(runner, runner.model.double, max_size=8)
    runner.submit(gate, None)
    gate.wait_entered()
    futures = [batcher.submit(number) for number in (1, -2, 3)]
    leaving = batcher.submit(4)
    assert leaving.cancel()
    gate.release.set()
    assert futures[0].result(LIMIT) == 2
    assert isinstance(futures[1].exception(LIMIT), ValueError)
    assert futures[2].result(LIMIT) == 6
    assert max(runner.statistics().batch_sizes) == 3


def test_batch_of_many_loops(runner: InferenceRunner[Model], gate: Gate) -> None:
    """Callers on other loops, and on none, get their results where they are."""
    batcher = Batcher(runner, runner.model.double, max_size=8)
    found: list[int] = []
    runner.submit(gate, None)
    gate.wait_entered()

    def on_loop(backend: str, number: int) -> None:
        found.append(anyio.run(batcher.run, number, backend=backend))

    threads = [
        threading.Thread(target=on_loop, args=(backend, number))
        for number, backend in enumerate(["asyncio", "trio", "asyncio"])
    ]
    for thread in threads:
        thread.start()
    future = batcher.submit(3)
    anyio.run(until, lambda: runner.statistics().queued == 4)
    gate.release.set()
    for thread in threads:
        thread.join(LIMIT)
    assert sorted([*found, future.result(LIMIT)]) == [0, 2, 4, 6]
    assert runner.statistics().batch_sizes == {4: 1}


def test_priorities(runner: InferenceRunner[Model], gate: Gate) -> None:
    """Each item has its own, also within one batch."""
    batcher: Batcher[str, str] = Batcher(runner, list, max_size=2)
    order: list[str] = []

    async def main() -> None:
        async def call(name: str, priority: int) -> None:
            order.append(await batcher.run(name, priority=priority))

        async with asyncio.TaskGroup() as tasks, Held(runner, gate) as held:
            for name, priority in [("c", 1), ("d", 1), ("a", 0), ("b", 0)]:
                tasks.create_task(call(name, priority))
            await held.queued(4)

    asyncio.run(main())
    assert order == ["a", "b", "c", "d"]


@anywhere
async def test_each_item_counts(gate: Gate) -> None:
    """An item takes a place in the queue, as any call does."""
    async with InferenceRunner[None](max_queue=2) as runner:
        batcher: Batcher[int, int] = Batcher(runner, list, max_size=8)
        async with Held(runner, gate):
            futures = [batcher.submit(number) for number in range(2)]
            with pytest.raises(QueueFull):
                await batcher.run(3)
        assert [future.result(LIMIT) for future in futures] == [0, 1]


# -- functions ---------------------------------------------------------------------------------


@anywhere
async def test_kinds_of_functions(runner: InferenceRunner[Model]) -> None:
    """References, partials of them, plain functions and classes; two batchers share nothing."""
    scale = Batcher(runner, partial(runner.model.scale, by=3.0), max_size=2, stack=True)
    assert (await scale.run(np.ones(2))).tolist() == [3.0, 3.0]
    plain: Batcher[int, int] = Batcher(runner, sorted, max_size=2)
    assert await plain.run(5) == 5
    whole: Batcher[str, int] = Batcher(runner, lambda items: list(map(len, items)), max_size=2)
    assert await whole.run("four") == 4


@anywhere
async def test_array_of_results(runner: InferenceRunner[Model]) -> None:
    """A function of a list may return an array: each caller gets its row."""
    batcher = Batcher(runner, np.atleast_2d, max_size=2)
    row = await batcher.run([1, 2])
    assert row.tolist() == [1, 2]


@anywhere
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lazy", r"Model\.lazy returned a generator, .* or return a list"),
        ("taken", "takes 1 positional argument"),
        ("missing", "has no attribute 'missing'"),
    ],
)
async def test_functions_that_do_not_fit(
    runner: InferenceRunner[Model], name: str, message: str
) -> None:
    """A reference is looked up when it runs: what is wrong with it, every caller is told."""
    batcher: Batcher[int, int] = Batcher(runner, getattr(runner.model, name), max_size=4)
    with pytest.raises((TypeError, AttributeError), match=message):
        await batcher.run(1)


def test_lazy_functions_are_called_once(runner: InferenceRunner[Model], gate: Gate) -> None:
    """A generator where results are due is no fault of an item: nothing is run again."""
    batcher: Batcher[int, int] = Batcher(runner, runner.model.lazy, max_size=4)
    runner.submit(gate, None)
    gate.wait_entered()
    futures = [batcher.submit(number) for number in range(3)]
    gate.release.set()
    errors = [future.exception(LIMIT) for future in futures]
    assert len({id(error) for error in errors}) == 3
    assert {type(error) for error in errors} == {TypeError}
    assert runner.statistics().batch_sizes == {3: 1}
    assert runner.statistics().batches_split == 0


@anywhere
async def test_model_of_another_runner(runner: InferenceRunner[Model]) -> None:
    """A reference to another runner's model is told from one's own."""
    other = InferenceRunner(Model)
    with pytest.raises(ValueError, match="belongs to another runner"):
        await Batcher(runner, other.model.double, max_size=4).run(1)


@anywhere
async def test_no_reference_as_item(runner: InferenceRunner[Model]) -> None:
    """It is refused before it is counted."""
    batcher: Batcher[Any, int] = Batcher(runner, runner.model.double, max_size=4)
    with pytest.raises(TypeError, match=r"runner\.model\.sizes can't be an item of a batch"):
        await batcher.run(runner.model.sizes)
    assert runner.statistics().submitted == 0


@anywhere
async def test_what_cannot_be_stacked(runner: InferenceRunner[Model]) -> None:
    """A bad item is refused at once, from both sides, and never queued."""
    batcher: Batcher[Any, Any] = Batcher(runner, runner.model.scale, max_size=4, stack=True)
    with pytest.raises(TypeError, match="must be a NumPy array"):
        await batcher.run([1, 2])
    with pytest.raises(TypeError, match="holds Python objects"):
        batcher.submit(np.array([None]))
    assert runner.statistics().submitted == 0


@anywhere
async def test_exits(runner: InferenceRunner[Model]) -> None:
    """A function that ends the interpreter ends its call only."""

    def leave(items: list[int]) -> list[int]:
        raise SystemExit

    with pytest.raises(CallFailed, match=r"leave ended with SystemExit"):
        await Batcher(runner, leave, max_size=4).run(1)
    assert await runner.run(abs, -1) == 1


@anywhere
async def test_reentrant(runner: InferenceRunner[Model]) -> None:
    """A batch that calls its own runner is told so."""
    batcher: Batcher[int, Any] = Batcher(runner, lambda items: [inner.submit(1)], max_size=4)
    inner: Batcher[int, int] = Batcher(runner, list, max_size=4)
    with pytest.raises(ReentrantCall):
        await batcher.run(1)


async def coroutine(items: list[int]) -> list[int]:
    raise NotImplementedError


def generator(items: list[int]) -> Iterator[int]:
    yield from items


async def async_generator(items: list[int]) -> AsyncIterator[int]:
    yield 1


class AsyncCallable:
    async def __call__(self, items: list[int]) -> list[int]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("func", "message"),
    [
        (coroutine, "is an async function. It needs no await"),
        (partial(coroutine), "is an async function"),
        (AsyncCallable(), "is an async function"),
        (generator, "is a generator function. Return a list"),
        (partial(generator), "is a generator function"),
        (async_generator, "is a generator function"),
        ([1, 2], "func must be callable, not list"),
        (None, "func must be callable, not NoneType"),
    ],
    ids=str,
)
def test_bad_functions(func: Any, message: str) -> None:
    """They are refused when the Batcher is made."""
    with pytest.raises(TypeError, match=message):
        Batcher(InferenceRunner(Model), func, max_size=4)


@pytest.mark.parametrize("max_size", [0, -1, 2.0, "4", None, True, math.nan], ids=repr)
def test_bad_sizes(max_size: Any) -> None:
    """A batch has a number of items, and one at least."""
    with pytest.raises(ValueError, match="max_size must be an integer of at least 1"):
        Batcher(InferenceRunner(Model), list, max_size=max_size)


@pytest.mark.parametrize(
    "max_delay", [-0.1, math.nan, math.inf, -math.inf, "1", None, Decimal(1), 10**400], ids=str
)
def test_bad_delays(max_delay: Any) -> None:
    """A delay is a number of seconds, and may be none."""
    with pytest.raises(ValueError, match="max_delay must be a number of seconds, 0 or more"):
        Batcher(InferenceRunner(Model), list, max_size=4, max_delay=max_delay)


# -- the end -----------------------------------------------------------------------------------


@anywhere
async def test_wait_idle(runner: InferenceRunner[Model]) -> None:
    """It waits for the last member of a batch."""
    inside = Gate()
    batcher: Batcher[int, int] = Batcher(runner, inside, max_size=4)
    future = batcher.submit(1)
    await inside.entered_async()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runner.wait_idle)
        await some_turns()
        inside.release.set()
    assert future.result(0) == 1


@anywhere
async def test_accepted_items_run_when_it_stops(gate: Gate) -> None:
    """Also those that a Batcher would hold back for more to come."""
    async with InferenceRunner(Model) as runner:
        batcher = Batcher(runner, runner.model.double, max_size=8, max_delay=LIMIT)
        runner.submit(gate, None)
        futures = [batcher.submit(number) for number in range(3)]
        gate.release.set()
    assert [future.result(0) for future in futures] == [0, 2, 4]
    with pytest.raises(Draining):
        batcher.submit(1)


@anywhere
async def test_grace_ends(caplog: pytest.LogCaptureFixture) -> None:
    """All members of the batch that runs are sent away, as those that wait; the log names it."""
    inside, block = Gate(), Gate()

    def slow(items: list[int]) -> list[int]:
        return inside(items)

    runner = InferenceRunner[None]()
    batcher = Batcher(runner, slow, max_size=2)
    runner.submit(block, None)
    futures = [batcher.submit(number) for number in range(3)]
    block.release.set()
    await inside.entered_async()
    with caplog.at_level(logging.WARNING, logger="asgi_infer"):
        await runner.aclose(grace=0)
    errors = [future.exception(0) for future in futures]
    assert all(isinstance(error, Draining) for error in errors)
    assert "slow was still running" in str(errors[0])
    assert "slow was still running" in str(errors[1])
    assert "before it could run" in str(errors[2])
    assert "stopped while" in caplog.text
    assert "slow was running" in caplog.text
    inside.release.set()
    runner.shutdown()


@anywhere
async def test_batcher_outlives_a_stop(runner: InferenceRunner[Model]) -> None:
    """A runner that is started again serves the same Batcher."""
    batcher = Batcher(runner, runner.model.double, max_size=4)
    assert await batcher.run(1) == 2
    await runner.aclose()
    await runner.start()
    assert await batcher.run(2) == 4


# -- many at once ------------------------------------------------------------------------------


def test_naps_lose_no_wake_up() -> None:
    """A thread that naps for a moment before each batch, while callers come from all sides at
    that very moment, misses none of them and is woken once for each."""
    scheduler = Scheduler(max_queue=10**6, counters=Counters(), lock=threading.RLock())
    function = make_function(max_size=3, max_delay=1.0)
    done = threading.Semaphore(0)
    naps = random.Random(1)
    function.wait_until = lambda waiting, oldest: (  # type: ignore[method-assign]
        scheduler.clock() + naps.choice([-1.0, 0.0, 0.00001, 0.00005, 0.0002])
    )
    served = []

    def serve() -> None:
        call = scheduler.take()
        while call is not None:
            assert type(call) is BatchCall
            served.append(len(call.members))
            scheduler.settle((member, None, None) for member in call.members)
            call = scheduler.finish_batch(call) or scheduler.take()

    class Port(RecordingPort):
        def post(self, waiter: Any, /) -> None:
            done.release()

    def call_many() -> None:
        for _ in range(1000):
            scheduler.admit(make_batch_call(function, port=Port()))
            assert done.acquire(timeout=LIMIT)

    threads = [threading.Thread(target=call_many) for _ in range(3)]
    serving = threading.Thread(target=serve)
    for thread in (serving, *threads):
        thread.start()
    for thread in threads:
        thread.join(4 * LIMIT)
    scheduler.stop()
    serving.join(LIMIT)
    assert sum(served) == 3000
    assert not scheduler.slots[0].wake_up.acquire(timeout=0)


def test_no_runner() -> None:
    """The runner comes first, and nothing else will do."""
    runner: Any = sorted
    with pytest.raises(TypeError, match=r"Batcher\(runner, func, \.\.\.\)"):
        Batcher(runner, sorted, max_size=8)
