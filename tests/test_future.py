"""The future of a call from synchronous code: what the standard library's futures promise."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, as_completed, wait
from typing import Any

import pytest

from asgi_infer import DeadlineExceeded, InferenceRunner
from asgi_infer._call import Departure
from asgi_infer._future import FUTURE_PORT, CallFuture, cancel_all
from asgi_infer._scheduler import Scheduler
from asgi_infer._statistics import Counters

from .calls import RecordingPort, make_call
from .gates import LIMIT, Gate


@pytest.fixture
def runner() -> Iterator[InferenceRunner[None]]:
    """A runner without a model or a time limit."""
    with InferenceRunner[None]() as runner:
        yield runner


@pytest.fixture
def hasty() -> Iterator[InferenceRunner[None]]:
    """A runner whose calls have a moment, of which its start takes nothing."""
    with InferenceRunner[None](timeout=0.1) as runner:
        asyncio.run(runner.start())
        yield runner


class Thing:
    """Something that can be seen to go."""


# -- results -----------------------------------------------------------------------------------


def test_result(runner: InferenceRunner[None]) -> None:
    """A future is pending, then running, then done."""
    gate = Gate()
    future = runner.submit(gate, "result")
    gate.wait_entered()
    assert (future.running(), future.done()) == (True, False)
    gate.release.set()
    assert future.result(LIMIT) == "result"
    assert future.exception() is None
    assert (future.running(), future.done(), future.cancelled()) == (False, True, False)


def test_error(runner: InferenceRunner[None]) -> None:
    """What the function raises is what result() raises and exception() returns."""
    future: Future[int] = runner.submit(int, "three")
    with pytest.raises(ValueError, match="three") as caught:
        future.result(LIMIT)
    assert future.exception() is caught.value


def test_waiting(runner: InferenceRunner[None], gate: Gate) -> None:
    """A future whose call waits is neither running nor done."""
    runner.submit(gate, None)
    future = runner.submit(abs, -3)
    assert (future.running(), future.done()) == (False, False)
    gate.release.set()
    assert future.result(LIMIT) == 3


def test_timeout_of_the_wait(runner: InferenceRunner[None], gate: Gate) -> None:
    """Giving up waiting doesn't end the call."""
    future = runner.submit(gate, "result")
    with pytest.raises(TimeoutError):
        future.result(0.01)
    with pytest.raises(TimeoutError):
        future.exception(0)
    gate.release.set()
    assert future.result(LIMIT) == "result"


def test_standard_waiting(runner: InferenceRunner[None]) -> None:
    """wait() and as_completed() take these futures for their own."""
    futures = [runner.submit(abs, -number) for number in range(20)]
    done, pending = wait(futures, LIMIT)
    assert (len(done), len(pending)) == (20, 0)
    assert sorted(future.result() for future in as_completed(futures)) == list(range(20))


def test_from_asyncio(runner: InferenceRunner[None], gate: Gate) -> None:
    """wrap_future() works both ways: the result arrives, and a cancellation leaves the queue."""

    async def main() -> int:
        running = asyncio.wrap_future(runner.submit(gate, 3))
        waiting = asyncio.wrap_future(runner.submit(abs, -4))
        waiting.cancel()
        await asyncio.sleep(0)
        gate.release.set()
        return await running

    assert asyncio.run(main()) == 3
    assert runner.statistics().cancelled == 1


# -- cancelling --------------------------------------------------------------------------------


def test_cancel_while_waiting(runner: InferenceRunner[None], gate: Gate) -> None:
    """A cancelled call is out of the queue at once; those who wait for its future are woken."""
    running = runner.submit(gate, None)
    gate.wait_entered()
    called: list[Future[int]] = []
    future = runner.submit(abs, -3)
    future.add_done_callback(called.append)
    assert future.cancel()
    assert future.cancel()
    assert runner.statistics().queued == 0
    assert wait([future], LIMIT).done == {future}
    assert called == [future]
    with pytest.raises(CancelledError):
        future.result()
    gate.release.set()
    running.result(LIMIT)


def test_cancel_while_running(runner: InferenceRunner[None], gate: Gate) -> None:
    """A call that has started can't be cancelled, as with the standard library's executors."""
    future = runner.submit(gate, "result")
    gate.wait_entered()
    assert not future.cancel()
    gate.release.set()
    assert future.result(LIMIT) == "result"
    assert not future.cancel()
    assert not future.cancelled()


def test_cancel_all(runner: InferenceRunner[None], gate: Gate) -> None:
    """shutdown(cancel_futures=True) cancels the futures, and leaves other callers alone."""
    runner.submit(gate, None)
    gate.wait_entered()
    future = runner.submit(abs, -3)
    thread = runner._thread
    assert thread is not None
    awaited = make_call(port=RecordingPort(), waiter="awaited")
    thread.scheduler.admit(awaited)
    cancel_all(thread.scheduler.waiting())
    assert future.cancelled()
    assert thread.scheduler.waiting() == [awaited]


def test_unattached() -> None:
    """A future whose call was refused before it was made has nothing to cancel or to run."""
    future = CallFuture()
    assert not future.cancel()
    assert not future.running()
    with pytest.raises(TimeoutError):
        future.result(0)


# -- deadlines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [CallFuture.result, CallFuture.exception])
def test_deadline_while_waiting(
    hasty: InferenceRunner[None], gate: Gate, ask: Callable[[Any], Any]
) -> None:
    """result() waits no longer than the call may take, and the call then never runs."""
    running = hasty.submit(gate, None)
    gate.wait_entered()
    future = hasty.submit(gate, None)
    with pytest.raises(DeadlineExceeded) as caught:
        raise ask(future) or AssertionError("no deadline")
    assert not caught.value.started
    with pytest.raises(DeadlineExceeded) as caught:
        running.result()
    assert caught.value.started
    gate.release.set()
    hasty.shutdown()
    assert gate.entries == 1
    assert hasty.statistics().expired == 2


def test_shorter_wait_than_deadline(runner: InferenceRunner[None], gate: Gate) -> None:
    """A wait that ends ahead of the deadline is a wait that ended, and nothing has expired."""
    with InferenceRunner[None](timeout=LIMIT) as patient:
        future = patient.submit(gate, "result")
        with pytest.raises(TimeoutError) as caught:
            future.result(0.01)
        assert not isinstance(caught.value, DeadlineExceeded)
        gate.release.set()
        assert future.result() == "result"


class Due:
    """A call of which the deadline has passed, in a scheduler that nobody serves."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(max_queue=1, counters=Counters(), lock=threading.RLock())
        self.future = CallFuture()
        deadline = time.monotonic() + 0.01
        self.call = make_call(deadline=deadline, port=FUTURE_PORT, waiter=self.future)
        self.future.attach(self.call, self.scheduler)
        self.scheduler.admit(self.call)


def test_left_in_the_tick_of_the_deadline() -> None:
    """If the call was ended by somebody else in that moment, theirs is the outcome."""
    due = Due()
    taken = due.scheduler.take()
    assert taken is due.call
    expire = due.scheduler.expire

    def finish_first(call: Any) -> bool:
        due.scheduler.finish(call, "in time", None)
        return expire(call)

    due.scheduler.expire = finish_first  # type: ignore[method-assign]  # the race
    assert due.future.result() == "in time"


def test_disconnected_while_waited_for() -> None:
    """A client that goes away wakes whoever waits for its future."""
    due = Due()
    due.scheduler.disconnect(due.call)
    assert "hung up" in str(due.future.exception(LIMIT))
    assert due.call.departure is Departure.CANCELLED


# -- what a failing callback, and a dropped future, must not do --------------------------------


@pytest.mark.parametrize("error", [LookupError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_callback_that_raises(
    runner: InferenceRunner[None],
    gate: Gate,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    """Done-callbacks run on the inference thread, and whatever they raise doesn't end it."""

    def fail(future: Future[Any]) -> None:
        raise error

    future = runner.submit(gate, "result")
    future.add_done_callback(fail)
    with caplog.at_level(logging.ERROR):
        gate.release.set()
        assert future.result(LIMIT) == "result"
        assert runner.submit(abs, -3).result(LIMIT) == 3
    assert error.__name__ in caplog.text


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without garbage collection: what is gone has gone by itself."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def refuse(thing: Thing) -> None:
    raise LookupError("gone")


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("asked", [False, True])
def test_failure_is_no_cycle(runner: InferenceRunner[None], asked: bool) -> None:
    """When the future of a failed call is dropped, so are its error, frames and arguments."""
    thing = Thing()
    gone = weakref.ref(thing)
    future = runner.submit(refuse, thing)
    del thing
    error = future.exception(LIMIT)
    if asked:
        with pytest.raises(LookupError):
            future.result()
    runner.submit(int).result(LIMIT)  # the thread has let go of it as well
    del future, error
    assert gone() is None


@pytest.mark.usefixtures("uncollected")
def test_result_is_the_futures_alone(runner: InferenceRunner[None]) -> None:
    """A result lives as long as its future, and no longer."""
    future = runner.submit(Thing)
    gone = weakref.ref(future.result(LIMIT))
    runner.submit(int).result(LIMIT)
    assert gone() is not None
    del future
    assert gone() is None


def test_future_port_has_no_loop() -> None:
    """Nothing can be called on the loop of those who have none."""
    assert not FUTURE_PORT.call_soon_threadsafe(lambda: None)
    with pytest.raises(NotImplementedError):
        FUTURE_PORT.call_later(0.0, lambda: None)
