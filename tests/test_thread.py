"""The inference thread, with a worker that writes down what is asked of it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack
from typing import Any, NoReturn

import pytest
import trio

from asgi_infer import (
    CallFailed,
    Draining,
    InferenceRunner,
    NativePolicy,
    NotReady,
    ReentrantCall,
    check_cancelled,
)
from asgi_infer._call import Call, Departure, Work
from asgi_infer._errors import CallCancelled, DeadlineExceeded
from asgi_infer._future import FUTURE_PORT, CallFuture
from asgi_infer._model import name_of
from asgi_infer._scheduler import Scheduler
from asgi_infer._statistics import Counters, Usage
from asgi_infer._thread import InferenceThread
from asgi_infer.workers._protocol import ModelSpec
from asgi_infer.workers.thread import ThreadReplica, leak

from .calls import RecordingPort, make_call
from .gates import LIMIT, Gate


class NotingWorker(ThreadReplica):
    """A worker, and all its replicas, that notes what happens, and on which thread."""

    replicas = 1
    local = True

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.threads: set[int] = set()
        self.open_error: BaseException | None = None
        self.close_error: BaseException | None = None
        self.loading: Callable[[], object] | None = None

    def replica(self, spec: ModelSpec, number: int, /) -> NotingWorker:
        self.name = spec.name
        return self

    def open(self, lost: Callable[[], object], /) -> None:
        self.note(f"open {self.name}")
        if self.loading is not None:
            self.loading()
        if self.open_error is not None:
            raise self.open_error

    def execute(self, work: Work, context: contextvars.Context, /) -> Any:
        del context
        func, args = work
        self.note(f"execute {name_of(func)}")
        return func(*args)

    def iterate(self, work: Work, context: contextvars.Context, /) -> Any:
        return self.execute(work, context)

    def close(self) -> None:
        self.note("close")
        if self.close_error is not None:
            raise self.close_error

    def note(self, what: str) -> None:
        self.notes.append(what)
        self.threads.add(threading.get_ident())


class Bench:
    """An inference thread with everything around it that a runner gives it."""

    def __init__(self, previous: InferenceThread | None = None) -> None:
        self.worker = NotingWorker()
        self.counters = Counters()
        self.scheduler = Scheduler(max_queue=100, counters=self.counters, lock=threading.RLock())
        spec = ModelSpec(name="bench", load=list, warmup=None, native=NativePolicy())
        self.thread = InferenceThread(
            spec=spec,
            worker=self.worker,
            scheduler=self.scheduler,
            usage=Usage(),
            previous=previous,
        )

    def start(self) -> None:
        self.thread.start()
        self.thread.ready.result(LIMIT)

    def submit(self, func: Callable[..., Any], *args: Any, **options: Any) -> CallFuture:
        future = CallFuture()
        call = make_call(func, *args, port=FUTURE_PORT, waiter=future, **options)
        future.attach(call, self.scheduler)
        self.scheduler.admit(call)
        return future

    def stop(self) -> None:
        self.thread.stop_soon()
        assert self.thread.join(LIMIT)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench that has not been started; stopped in the end if it was."""
    bench = Bench()
    yield bench
    if bench.thread._threads[0].ident is not None:
        bench.stop()


@pytest.fixture
def started(bench: Bench) -> Bench:
    """A bench whose thread is ready."""
    bench.start()
    return bench


# -- one thread, one worker --------------------------------------------------------------------


def test_whole_life_on_one_thread(started: Bench) -> None:
    """The worker is opened, used and closed on one thread, which is none of the callers'."""
    assert started.submit(abs, -3).result(LIMIT) == 3
    started.stop()
    assert started.worker.notes == ["open bench", "execute abs", "close"]
    assert len(started.worker.threads) == 1
    assert threading.get_ident() not in started.worker.threads


def test_calls_ahead_of_the_model(bench: Bench) -> None:
    """Calls that come while the model loads wait, and then run in order."""
    gate = Gate()
    bench.worker.loading = lambda: gate(None)
    bench.thread.start()
    gate.wait_entered()
    futures = [bench.submit(abs, -number) for number in range(3)]
    assert not any(future.done() for future in futures)
    gate.release.set()
    assert [future.result(LIMIT) for future in futures] == [0, 1, 2]


def test_states(bench: Bench, gate: Gate) -> None:
    """The thread's life in five words; a failed start is one of them."""
    loading = Gate()
    bench.worker.loading = lambda: loading(None)
    bench.thread.start()
    states = [bench.thread.state]
    loading.release.set()
    bench.thread.ready.result(LIMIT)
    states.append(bench.thread.state)
    bench.submit(gate, None)
    bench.thread.stop_soon()
    states.append(bench.thread.state)
    gate.release.set()
    bench.stop()
    states.append(bench.thread.state)
    assert states == ["loading", "ready", "draining", "closed"]


def test_context_is_empty(started: Bench) -> None:
    """The thread inherits no context variable of the one that started it."""
    assert started.submit(lambda: len(list(contextvars.copy_context()))).result(LIMIT) == 0


def test_join_tells(started: Bench) -> None:
    """join() says whether the thread has ended."""
    assert not started.thread.join(0)
    started.stop()
    assert started.thread.join(0)


# -- what a call may end with ------------------------------------------------------------------


def fail(error: BaseException) -> NoReturn:
    raise error


@pytest.mark.parametrize("error", [StopIteration(3), StopAsyncIteration()], ids=repr)
def test_stop_iteration(started: Bench, error: Exception) -> None:
    """Where these mean "returned" they can't be raised: RuntimeError, with the cause."""
    caught = started.submit(fail, error).exception(LIMIT)
    assert type(caught) is RuntimeError
    assert str(caught) == f"fail raised {type(error).__name__}"
    assert caught.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        *(SystemExit(3), KeyboardInterrupt(), GeneratorExit(), BaseException("odd")),
        *(asyncio.CancelledError(), CancelledError(), CallCancelled()),
        trio.Cancelled._create(source="unknown"),
    ],
    ids=lambda error: f"{type(error).__module__}.{type(error).__name__}",
)
def test_what_is_no_exception(started: Bench, error: BaseException) -> None:
    """What would stop the server, or pass for the caller's own cancellation: CallFailed."""
    caught = started.submit(fail, error).exception(LIMIT)
    assert type(caught) is CallFailed
    assert str(caught) == f"fail ended with {type(error).__name__}, which is no error"
    assert caught.__cause__ is error


def test_traceback_is_kept(started: Bench) -> None:
    """The traceback leads to the line that raised, also through what stands for the error."""
    for error in (LookupError(), StopIteration(), SystemExit()):
        caught = started.submit(fail, error).exception(LIMIT)
        assert caught is not None
        traceback = caught.__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        assert traceback is not None
        assert traceback.tb_frame.f_code.co_name == "fail"


class Awkward:
    """Callable, and fails whatever else it is asked."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self) -> NoReturn:
        raise self.error

    def __getattr__(self, name: str) -> NoReturn:
        raise KeyError(name)

    def __repr__(self) -> NoReturn:
        raise KeyError


@pytest.mark.parametrize("error", [LookupError("gone"), SystemExit(3)])
def test_awkward_function(started: Bench, error: BaseException) -> None:
    """A function object that fails when it is looked at still gets its error to the caller."""
    caught = started.submit(Awkward(error)).exception(LIMIT)
    assert caught is error or (caught is not None and caught.__cause__ is error)
    assert started.submit(abs, -3).result(LIMIT) == 3


def test_the_next_call_runs(started: Bench) -> None:
    """Whatever a call ends with, the next one runs on the same thread."""
    for error in (LookupError(), SystemExit(), StopIteration(), GeneratorExit(), MemoryError()):
        assert started.submit(fail, error).exception(LIMIT) is not None
        assert started.submit(threading.get_ident).result(LIMIT) in started.worker.threads
    started.stop()
    assert len(started.worker.threads) == 1


# -- cancellation seen from inside -------------------------------------------------------------


def run_until_cancelled(begun: threading.Event, go: threading.Event) -> None:
    begun.set()
    assert go.wait(LIMIT)
    check_cancelled()


def test_check_cancelled_ends_a_late_call(started: Bench) -> None:
    """A long function that asks ends early once its caller has gone; that is no failure."""
    begun, go = threading.Event(), threading.Event()
    future = started.submit(run_until_cancelled, begun, go)
    assert begun.wait(LIMIT)
    (call,) = started.scheduler.orphans()
    assert started.scheduler.leave(call, Departure.CANCELLED)
    go.set()
    started.scheduler.when_idle().result(LIMIT)
    assert not future.done()  # nobody waits for it
    assert (started.counters.cancelled, started.counters.failed) == (1, 0)


def check_for_ever() -> NoReturn:
    while True:
        check_cancelled()


def test_check_cancelled_at_the_deadline(started: Bench) -> None:
    """A function that stops at its deadline ahead of anybody else has expired, not failed."""
    future = started.submit(check_for_ever, deadline=time.monotonic() + 0.02)
    ended = threading.Event()
    future.add_done_callback(lambda _: ended.set())  # watches no deadline, as result() does
    assert ended.wait(LIMIT)
    assert isinstance(future.exception(), DeadlineExceeded)
    started.scheduler.when_idle().result(LIMIT)
    assert (started.counters.expired, started.counters.failed) == (1, 0)


def test_call_cancelled_raised_for_no_reason(started: Bench) -> None:
    """A function that raises CallCancelled by itself while its caller waits has failed."""
    caught = started.submit(fail, CallCancelled()).exception(LIMIT)
    assert type(caught) is CallFailed


# -- starting and stopping ---------------------------------------------------------------------


class HalfModel:
    """What exists of a model when loading fails."""


def test_load_fails(bench: Bench) -> None:
    """The cause goes to whoever starts the thread, and to callers as NotReady; the thread ends."""
    bench.worker.open_error = OSError("no such file: model.onnx")
    future = bench.submit(abs, -3)
    bench.thread.start()
    assert bench.thread.ready.exception(LIMIT) is bench.worker.open_error
    assert bench.thread.join(LIMIT)
    assert isinstance(future.exception(LIMIT), NotReady)
    with pytest.raises(
        NotReady, match=r"'bench' did not load: OSError: no such file: model\.onnx"
    ):
        bench.submit(abs, -3)
    assert bench.thread.state == "failed"
    assert bench.thread.over
    assert (bench.counters.cancelled, bench.counters.rejected) == (1, 1)


class Unprintable(Exception):
    def __str__(self) -> NoReturn:
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (Unprintable(), Unprintable, "did not load: Unprintable"),
        (StopIteration(), RuntimeError, "did not load: RuntimeError: list raised StopIteration"),
        (SystemExit(3), CallFailed, "did not load: CallFailed: list ended with SystemExit"),
        (KeyboardInterrupt(), CallFailed, "list ended with KeyboardInterrupt"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_load_fails_oddly(
    bench: Bench, error: BaseException, kind: type[Exception], text: str
) -> None:
    """Whatever loading ends with, whoever waits for it is told, and nobody waits for ever."""
    bench.worker.open_error = error
    bench.thread.start()
    assert type(bench.thread.ready.exception(LIMIT)) is kind
    assert bench.thread.join(LIMIT)
    with pytest.raises(NotReady) as caught:
        bench.submit(abs, -3)
    assert text in str(caught.value)


def test_half_a_model_goes(bench: Bench) -> None:
    """What a failed load had made so far is destroyed at once, error or not, without a
    garbage collection."""
    remains: list[weakref.ref[HalfModel]] = []

    def load() -> None:
        half = HalfModel()
        remains.append(weakref.ref(half))
        raise LookupError("the other half")

    bench.worker.loading = load
    gc.disable()
    try:
        bench.thread.start()
        error = bench.thread.ready.exception(LIMIT)
        assert bench.thread.join(LIMIT)
        assert remains[0]() is None
    finally:
        gc.enable()
    assert str(error) == "the other half"


def test_stop_soon(started: Bench, gate: Gate) -> None:
    """Accepted calls are run, new ones are refused with the way to start again."""
    running, waiting = started.submit(gate, 1), started.submit(abs, -2)
    gate.wait_entered()
    started.thread.stop_soon()
    with pytest.raises(Draining, match=r"await runner\.start\(\)"):
        started.submit(abs, -3)
    gate.release.set()
    assert (running.result(LIMIT), waiting.result(LIMIT)) == (1, 2)
    assert started.thread.join(LIMIT)
    assert started.counters.rejected == 1


def test_stop_now(started: Bench, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    """Every caller is sent away at once; the function runs on, and is named in the log."""
    running, waiting = started.submit(gate, 1), started.submit(abs, -2)
    gate.wait_entered()
    with caplog.at_level(logging.WARNING, "asgi_infer"):
        started.thread.stop_now()
    assert isinstance(running.exception(0), Draining)
    assert isinstance(waiting.exception(0), Draining)
    assert [record.message for record in caplog.records] == [
        "the runner 'bench' stopped while Gate was running"
    ]
    assert not started.thread.join(0)
    gate.release.set()
    assert started.thread.join(LIMIT)
    assert (started.counters.cancelled, started.counters.late) == (2, 1)


def test_stop_while_loading(bench: Bench) -> None:
    """A thread that is stopped while it loads ends when the model is there, and destroys it."""
    gate = Gate()
    bench.worker.loading = lambda: gate(None)
    bench.thread.start()
    gate.wait_entered()
    bench.thread.stop_soon()
    gate.release.set()
    assert bench.thread.join(LIMIT)
    assert bench.worker.notes == ["open bench", "close"]


@pytest.mark.parametrize("error", [LookupError("gone"), SystemExit(3)])
def test_close_fails(
    started: Bench, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """A model that can't be destroyed is logged, and the thread ends as it should."""
    started.worker.close_error = error
    with caplog.at_level(logging.ERROR, "asgi_infer"):
        started.stop()
    assert started.thread.state == "closed"
    assert started.thread.done.done()
    assert "closing the model of 'bench' failed" in caplog.text


def test_the_loop_itself_fails(started: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the thread end by a fault of its own, its callers get an error all the same."""
    ended: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    gate = Gate()
    running, waiting = started.submit(gate, 1), started.submit(abs, -2)
    gate.wait_entered()

    def broken(*args: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr(started.scheduler, "finish", broken)
    gate.release.set()
    assert isinstance(running.exception(LIMIT), Draining)
    assert isinstance(waiting.exception(LIMIT), Draining)
    with pytest.raises(Draining):
        started.submit(abs, -3)
    assert started.thread.join(LIMIT)
    assert [each.exc_type for each in ended] == [MemoryError]
    started.counters.running = 0  # this one is lost: it never finished


def test_never_two_at_once(started: Bench, gate: Gate) -> None:
    """A runner's next thread loads only when the one before has ended, however long that takes."""
    started.submit(gate, None)
    gate.wait_entered()
    started.thread.stop_now()
    following = Bench(previous=started.thread)
    following.thread.start()
    future = following.submit(abs, -3)
    assert following.thread.schedulers == [started.scheduler, following.scheduler]
    assert following.worker.notes == []
    gate.release.set()
    assert future.result(LIMIT) == 3
    assert started.worker.notes[-1] == "close"
    assert following.thread.schedulers == [following.scheduler]
    following.stop()


def test_reentry_from_a_thread_that_ends(gate: Gate) -> None:
    """A call that outlives its runner's restart can't wait for the thread that waits for it."""
    runner = InferenceRunner[None]()

    def call_again() -> str:
        gate(None)
        return str(runner.submit(abs, -3).exception())

    future = runner.submit(call_again)
    gate.wait_entered()
    runner.shutdown(wait=False)
    first = runner._thread
    second = runner._launch(again=True)
    assert second is not first
    gate.release.set()
    with pytest.raises(ReentrantCall):
        future.result(LIMIT)
    assert runner.submit(abs, -3).result(LIMIT) == 3
    runner.shutdown()


# -- references --------------------------------------------------------------------------------


class Thing:
    """Something that can be seen to go."""


@pytest.mark.parametrize("outcome", ["value", "error", "nobody waits"])
def test_idle_thread_keeps_nothing_alive(started: Bench, outcome: str) -> None:
    """When a call is over, nothing of it is left on the thread, which sleeps: not the function,
    its arguments, its context, its result or its error. Without a garbage collection."""
    variable: contextvars.ContextVar[Thing] = contextvars.ContextVar("variable")
    kept = [Thing() for _ in range(4)]
    remains = [weakref.ref(thing) for thing in kept]

    def submit(in_context: Thing, in_closure: Thing, argument: Thing, result: Thing) -> Call:
        def func(thing: Thing) -> Thing:
            assert thing is not in_closure
            if outcome == "error":
                raise LookupError
            return result

        variable.set(in_context)
        call = make_call(func, argument)
        started.scheduler.admit(call)
        return call

    gc.disable()
    try:
        call = contextvars.copy_context().run(submit, *kept)
        if outcome == "nobody waits":
            started.scheduler.leave(call, Departure.CANCELLED)
        started.scheduler.when_idle().result(LIMIT)
        kept.clear()
        if outcome == "error":
            with pytest.raises(LookupError):
                call.outcome()
        del call
        assert [remain() for remain in remains] == [None] * 4
    finally:
        gc.enable()


# -- forks -------------------------------------------------------------------------------------


def test_leave_behind(started: Bench, gate: Gate) -> None:
    """In a child, whoever waits for a future gets an error; what awaits is a loop's, not there.

    The parent's worker is never destroyed there.
    """
    running, waiting = started.submit(gate, 1), started.submit(abs, -2)
    gate.wait_entered()
    port = RecordingPort()
    started.scheduler.admit(make_call(port=port, waiter="awaited"))
    started.worker._model, started.worker._stack = Thing(), ExitStack()
    references = [sys.getrefcount(started.worker._model)]
    started.thread.leave_behind()
    references.append(sys.getrefcount(started.worker._model))
    assert references[1] == references[0] + 1
    for future in (running, waiting):
        assert "belongs to the parent process" in str(future.exception(0))
    assert port.posted == []


def test_leak() -> None:
    """What is leaked is never destroyed."""
    thing = Thing()
    remains = weakref.ref(thing)
    leak(thing)
    del thing
    gc.collect()
    assert remains() is not None
