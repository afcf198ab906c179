"""Who leaves when, and what becomes of the call: one test for each cell of the table.

The table is in the project's design page: queued, running and draining calls; callers that are
cancelled, clients that hang up, deadlines that pass.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asgi_infer import (
    CallCancelled,
    ClientDisconnected,
    DeadlineExceeded,
    Draining,
    InferenceMiddleware,
    InferenceRunner,
    QueueFull,
    check_cancelled,
)
from asgi_infer._queue import CallQueue

from .connections import Connection
from .gates import LIMIT, Gate
from .polling import until, until_true

on_every_loop = pytest.mark.anyio

SOON = 0.2
"""Seconds in which a call is sure to have started, and to be over if it is held open."""


@pytest.fixture
def runner() -> Iterator[InferenceRunner[None]]:
    """A runner with room for two, started, and stopped in the end."""
    with InferenceRunner[None](max_queue=2) as runner:
        anyio.run(runner.start)
        yield runner


class LongCall:
    """A function that is held open, and asks at its end whether anybody still waits."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.cancelled = threading.Event()

    def __call__(self) -> str:
        self.gate(None)
        try:
            check_cancelled()
        except CallCancelled:
            self.cancelled.set()
            raise
        return "done"


async def hold(runner: InferenceRunner[Any], gate: Gate) -> None:
    """Let ``gate`` hold the runner's thread."""
    runner.submit(gate, 1)
    await gate.entered_async()


async def assert_held(runner: InferenceRunner[Any], gate: Gate) -> None:
    """The slot is the thread's: the next call does not start before the abandoned one ends."""
    ran: list[int] = []
    following = runner.submit(ran.append, 1)
    await anyio.sleep(0.02)
    now = runner.statistics()
    assert (now.running, now.queued, now.late, ran) == (1, 1, 1, [])
    gate.release.set()
    await until(following.done)
    assert ran == [1]


# -- queued ------------------------------------------------------------------------------------


@on_every_loop
async def test_queued_and_cancelled(runner: InferenceRunner[None], gate: Gate) -> None:
    """A caller cancelled while its call waits: it never runs, and its place is free at once."""
    ran: list[str] = []
    await hold(runner, gate)
    kept = runner.submit(ran.append, "kept")
    async with anyio.create_task_group() as group:
        group.start_soon(runner.run, ran.append, "cancelled")
        await until(lambda: runner.statistics().queued == 2)
        group.cancel_scope.cancel()
    now = runner.statistics()
    assert (now.queued, now.running, now.cancelled, now.late) == (1, 1, 1, 0)
    other = runner.submit(ran.append, "other")  # there is room again
    gate.release.set()
    await until(lambda: kept.done() and other.done())
    assert ran == ["kept", "other"]


@on_every_loop
async def test_queued_and_client_gone(runner: InferenceRunner[None], gate: Gate) -> None:
    """A client that hangs up while its call waits: ``ClientDisconnected``, and it never runs."""
    ran: list[str] = []
    errors: list[Exception] = []
    await hold(runner, gate)
    connection = Connection()
    async with anyio.create_task_group() as group:
        group.start_soon(serve, connection, runner, partial(ran.append, "gone"), errors)
        await until(lambda: runner.statistics().queued == 1)
        connection.hang_up()
    assert [type(error) for error in errors] == [ClientDisconnected]
    now = runner.statistics()
    assert (now.queued, now.running, now.cancelled, now.late) == (0, 1, 1, 0)
    gate.release.set()
    await runner.wait_idle()
    assert ran == []


async def serve(
    connection: Connection,
    runner: InferenceRunner[Any],
    func: Callable[[], object],
    errors: list[Exception],
) -> None:
    """Serve a client with one call of ``func``, and note how that ends."""

    async def app(*_: Any) -> None:
        try:
            await runner.run(func)
        except ClientDisconnected as error:
            errors.append(error)

    await connection.serve(InferenceMiddleware(app, runner=runner))


@on_every_loop
async def test_queued_past_its_deadline(runner: InferenceRunner[None], gate: Gate) -> None:
    """A deadline that passes while the call waits: ``started=False``, and it never runs."""
    ran: list[str] = []
    await hold(runner, gate)
    with pytest.raises(DeadlineExceeded) as caught:
        await runner.run(ran.append, "late", timeout=0.05)
    assert caught.value.started is False
    assert 1 <= (caught.value.retry_after or 0) <= 60
    now = runner.statistics()
    assert (now.queued, now.running, now.expired, now.late) == (0, 1, 1, 0)
    gate.release.set()
    await runner.wait_idle()
    assert ran == []


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the runners made here."""
    clock = Clock()
    monkeypatch.setattr(InferenceRunner, "_clock", staticmethod(clock.monotonic))
    return clock


def test_deadline_in_the_tick_of_the_turn(clock: Clock, gate: Gate) -> None:
    """A call whose turn comes in the very tick of its deadline is too late, and never runs."""
    ran: list[str] = []
    with InferenceRunner[None](timeout=5.0) as runner:
        runner.submit(gate, 1)
        gate.wait_entered()
        too_late = runner.submit(ran.append, "too late")
        clock.now += 1e-9
        in_time = runner.submit(ran.append, "in time")
        clock.now = 1005.0
        gate.release.set()
        until_true(in_time.done)
        error = too_late.exception(LIMIT)
    assert isinstance(error, DeadlineExceeded)
    assert error.started is False
    assert ran == ["in time"]
    assert runner.statistics().expired == 1


# -- on arrival --------------------------------------------------------------------------------


@on_every_loop
async def test_too_little_time_on_arrival(
    clock: Clock, runner: InferenceRunner[None], make_gate: Callable[[], Gate]
) -> None:
    """Less time than the wait and the call will take: ``DeadlineExceeded``, and never queued."""
    first, second = make_gate(), make_gate()
    await hold(runner, first)
    clock.now += 10.0  # what a call takes, from now on
    first.release.set()
    await runner.wait_idle()
    await hold(runner, second)
    clock.now += 4.0
    with pytest.raises(DeadlineExceeded) as caught:
        await runner.run(abs, -1, timeout=15.9)
    assert caught.value.started is False
    assert 16.0 <= (caught.value.retry_after or 0) <= 27.0
    assert caught.value.headers is not None
    now = runner.statistics()
    assert (now.queued, now.rejected, now.expired) == (0, 1, 0)
    assert "has 15.9 s and would need about 16 s; it was not queued" in str(caught.value)
    accepted = runner.submit(abs, -2)
    second.release.set()
    await until(accepted.done)
    assert accepted.result() == 2


# -- running -----------------------------------------------------------------------------------


@on_every_loop
async def test_running_and_cancelled(runner: InferenceRunner[None], gate: Gate) -> None:
    """A caller cancelled while its call runs leaves at once; the call runs on, holds the slot,
    and can notice."""
    call = LongCall(gate)
    async with anyio.create_task_group() as group:
        group.start_soon(runner.run, call)
        await gate.entered_async()
        group.cancel_scope.cancel()
    assert not gate.release.is_set()
    await assert_held(runner, gate)
    assert call.cancelled.is_set()
    assert runner.statistics().cancelled == 1


@on_every_loop
async def test_running_and_client_gone(runner: InferenceRunner[None], gate: Gate) -> None:
    """A client that hangs up while its call runs: the caller leaves with
    ``ClientDisconnected``, the call as above."""
    call = LongCall(gate)
    errors: list[Exception] = []
    connection = Connection()
    async with anyio.create_task_group() as group:
        group.start_soon(serve, connection, runner, call, errors)
        await gate.entered_async()
        connection.hang_up()
    assert [type(error) for error in errors] == [ClientDisconnected]
    await assert_held(runner, gate)
    assert call.cancelled.is_set()
    assert runner.statistics().cancelled == 1


@on_every_loop
async def test_running_past_its_deadline(runner: InferenceRunner[None], gate: Gate) -> None:
    """A deadline that passes while the call runs: ``started=True``; the call as above."""
    call = LongCall(gate)
    with pytest.raises(DeadlineExceeded) as caught:
        await runner.run(call, timeout=SOON)
    assert caught.value.started is True
    assert caught.value.retry_after is None
    await assert_held(runner, gate)
    assert call.cancelled.is_set()
    assert runner.statistics().expired == 1


@on_every_loop
async def test_result_after_the_deadline(runner: InferenceRunner[None], gate: Gate) -> None:
    """What a call returns after its caller has left is thrown away, and counted once."""
    with pytest.raises(DeadlineExceeded):
        await runner.run(gate, 1, timeout=SOON)
    gate.release.set()
    await runner.wait_idle()
    now = runner.statistics()
    assert (now.completed, now.failed, now.expired, now.late) == (0, 0, 1, 1)


@on_every_loop
async def test_error_after_the_deadline(runner: InferenceRunner[None], gate: Gate) -> None:
    """What a call raises after its caller has left is thrown away as well."""

    def fail() -> None:
        gate(None)
        raise ValueError("too late")

    with pytest.raises(DeadlineExceeded):
        await runner.run(fail, timeout=SOON)
    gate.release.set()
    await runner.wait_idle()
    now = runner.statistics()
    assert (now.completed, now.failed, now.expired, now.late) == (0, 0, 1, 1)


@on_every_loop
async def test_the_function_notices_the_deadline_first(runner: InferenceRunner[None]) -> None:
    """A function that stops for its deadline ends the call with that deadline, not an error."""

    def call() -> None:
        while True:
            check_cancelled()

    with pytest.raises(DeadlineExceeded) as caught:
        await runner.run(call, timeout=SOON)
    assert caught.value.started is True
    await runner.wait_idle()
    assert runner.statistics().expired == 1


def test_submitted_call_that_notices_its_deadline() -> None:
    """The same for a future, which nobody need wait for."""

    def call() -> None:
        while True:
            check_cancelled()

    with InferenceRunner[None](timeout=SOON) as runner:
        anyio.run(runner.start)
        future = runner.submit(call)
        until_true(future.done)
        error = future.exception(0)
    assert isinstance(error, DeadlineExceeded)
    assert error.started
    assert runner.statistics().expired == 1


# -- draining ----------------------------------------------------------------------------------


@on_every_loop
async def test_draining(gate: Gate) -> None:
    """While a runner stops, accepted calls finish inside the grace, and new ones are refused."""
    results: list[int] = []

    async def call(func: Callable[[int], int], number: int) -> None:
        results.append(await own.run(func, number))

    runner = own = InferenceRunner[None]()
    async with anyio.create_task_group() as group:
        group.start_soon(call, gate, 1)
        await gate.entered_async()
        group.start_soon(call, abs, -2)
        await until(lambda: runner.statistics().queued == 1)
        group.start_soon(partial(runner.aclose, grace=LIMIT))
        await until(lambda: runner.statistics().state == "draining")
        with pytest.raises(Draining) as caught:
            await runner.run(abs, -3)
        assert 1 <= (caught.value.retry_after or 0) <= 60
        gate.release.set()
    assert sorted(results) == [1, 2]
    now = runner.statistics()
    assert (now.completed, now.rejected, now.cancelled) == (2, 1, 0)


@on_every_loop
async def test_the_end_of_the_grace(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    """After the grace the rest is cancelled: what waits never runs, and what runs is let go."""
    errors: list[Draining] = []
    ran: list[int] = []

    async def call(func: Callable[..., Any], argument: object = None) -> None:
        with pytest.raises(Draining) as caught:
            await own.run(func, argument)
        errors.append(caught.value)

    runner = own = InferenceRunner[None]()
    async with anyio.create_task_group() as group:
        group.start_soon(call, gate)
        await gate.entered_async()
        group.start_soon(call, ran.append)
        await until(lambda: runner.statistics().queued == 1)
        await runner.aclose(grace=0.05)
    assert sorted(map(str, errors)) == [
        "the runner stopped before it could run this call",
        "the runner stopped while Gate was still running; its result is lost",
    ]
    assert "stopped while Gate was running" in caplog.text
    gate.release.set()
    await until(lambda: runner.statistics().running == 0)
    now = runner.statistics()
    assert (now.cancelled, now.late, ran) == (2, 1, [])


@on_every_loop
async def test_cancelled_stop(gate: Gate) -> None:
    """Cancelling the stop ends the grace at once."""
    runner = InferenceRunner[None]()
    future = runner.submit(gate, 1)
    async with anyio.create_task_group() as group:
        await gate.entered_async()
        group.start_soon(partial(runner.aclose, grace=10 * LIMIT))
        await until(lambda: runner.statistics().state == "draining")
        group.cancel_scope.cancel()
    assert isinstance(future.exception(LIMIT), Draining)
    gate.release.set()


# -- at the same time --------------------------------------------------------------------------


def test_cancelled_in_the_tick_of_completion(runner: InferenceRunner[None], gate: Gate) -> None:
    """A cancellation that meets the result is not swallowed, and there is one outcome."""

    async def main() -> None:
        task = asyncio.create_task(runner.run(gate, 1))
        await gate.entered_async()
        gate.release.set()
        until_true(lambda: runner.statistics().completed == 1)  # the loop has not heard of it yet
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert await runner.run(abs, -1) == 1

    asyncio.run(main(), debug=True)
    now = runner.statistics()
    assert (now.completed, now.cancelled, now.late) == (2, 0, 0)


@pytest.mark.unmeasured
def test_many_cancellations_at_any_time(runner: InferenceRunner[None]) -> None:
    """However threads are switched, each of many cancelled calls has exactly one outcome."""

    async def cancelled_after(microseconds: int, turns: int) -> bool:
        task = asyncio.create_task(runner.run(abs, -1))
        await asyncio.sleep(0)
        end = time.perf_counter() + microseconds * 1e-6
        while time.perf_counter() < end:
            pass
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            assert await task == 1
        except asyncio.CancelledError:
            return True
        return False

    async def main() -> None:
        cancelled = 0
        for number in range(5_000):
            cancelled += await cancelled_after(number % 100, turns=number % 3)
        await runner.wait_idle()
        now = runner.statistics()
        assert now.completed + now.cancelled == now.submitted == 5_000
        assert now.completed >= 5_000 - cancelled
        assert 0 < now.cancelled <= cancelled
        assert await runner.run(abs, -1) == 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        asyncio.run(main())
    finally:
        sys.setswitchinterval(interval)


def test_cancelled_between_put_and_get(
    runner: InferenceRunner[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller cancelled right after its call was queued leaves the thread in order."""
    push = CallQueue.push

    def push_and_cancel(queue: CallQueue, call: Any) -> None:
        push(queue, call)
        tasks[-1].cancel()

    async def main() -> None:
        for _ in range(100):
            with monkeypatch.context() as patch:
                patch.setattr(CallQueue, "push", push_and_cancel)
                tasks.append(asyncio.create_task(runner.run(abs, -1)))
                with pytest.raises(asyncio.CancelledError):
                    await tasks[-1]
            assert await runner.run(abs, -2) == 2

    tasks: list[asyncio.Task[int]] = []
    asyncio.run(main())
    assert runner.statistics().submitted == 200


@on_every_loop
async def test_cancel_scopes_around_calls(runner: InferenceRunner[None], gate: Gate) -> None:
    """anyio's scopes catch their own cancellation, of a waiting and of a running call."""
    for func, argument in ((gate, 1), (abs, -1)):
        with anyio.move_on_after(0.05) as scope:
            await runner.run(func, argument)
        assert scope.cancelled_caught
    gate.release.set()
    await runner.wait_idle()
    assert await runner.run(abs, -2) == 2


def test_asyncio_s_own_timeouts(runner: InferenceRunner[None], gate: Gate) -> None:
    """``asyncio.timeout`` and ``wait_for`` work around calls as around anything."""

    async def main() -> None:
        for func in (gate, abs):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await runner.run(func, 1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(runner.run(func, 1), 0.02)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        gate.release.set()
        assert await asyncio.wait_for(runner.run(abs, -5), LIMIT) == 5

    asyncio.run(main(), debug=True)


def test_cancellation_keeps_its_message(runner: InferenceRunner[None], gate: Gate) -> None:
    """What is said with ``task.cancel(message)`` arrives."""

    async def main() -> None:
        task = asyncio.create_task(runner.run(gate, 1))
        await gate.entered_async()
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await task

    asyncio.run(main())


@on_every_loop
async def test_queue_full_of_the_cancelled(runner: InferenceRunner[None], gate: Gate) -> None:
    """Cancelled and expired calls take up no room; live ones do."""
    await hold(runner, gate)
    for _ in range(10):
        with anyio.move_on_after(0):
            await runner.run(abs, -1)
        with pytest.raises(DeadlineExceeded):
            await runner.run(abs, -1, timeout=0.001)
    waiting = [runner.submit(abs, -1) for _ in range(2)]
    with pytest.raises(QueueFull):
        await runner.run(abs, -1)
    gate.release.set()
    assert [future.result(LIMIT) for future in waiting] == [1, 1]


def test_expired_futures_make_room(clock: Clock, gate: Gate) -> None:
    """Futures past their deadline, which nobody watches, make room for new calls."""
    with InferenceRunner[None](max_queue=2, timeout=5.0) as runner:
        runner.submit(gate, 1)
        gate.wait_entered()
        expired = [runner.submit(abs, -1) for _ in range(2)]
        with pytest.raises(QueueFull):
            runner.submit(abs, -2)
        clock.now += 5.0
        accepted = runner.submit(abs, -2)
        errors = [future.exception(0) for future in expired]
        assert [type(error) for error in errors] == [DeadlineExceeded] * 2
        assert runner.statistics().expired == 2
        gate.release.set()
    assert accepted.result(0) == 2


@pytest.mark.parametrize("cancel", [True, False])
def test_a_caller_already_cancelled(
    runner: InferenceRunner[None], gate: Gate, cancel: bool
) -> None:
    """Under trio, a call made in a scope that is cancelled already is taken back."""

    async def main() -> None:
        await hold(runner, gate)
        with anyio.CancelScope() as scope:
            if cancel:
                scope.cancel()
            else:
                gate.release.set()
            await runner.run(abs, -1)
        assert scope.cancelled_caught is cancel

    anyio.run(main, backend="trio")
    assert runner.statistics().cancelled == cancel


@on_every_loop
async def test_shielded_calls(runner: InferenceRunner[None], gate: Gate) -> None:
    """A shielded call is not cancelled with its scope."""
    results: list[int] = []

    async def call() -> None:
        with anyio.CancelScope(shield=True):
            results.append(await runner.run(gate, 5))
        await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        await gate.entered_async()
        group.cancel_scope.cancel()
        gate.release.set()
    assert results == [5]
