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
    WorkerCrashed,
    check_cancelled,
)
from asgi_infer._buffer import StreamCall
from asgi_infer._call import Call, Departure, Work
from asgi_infer._errors import CallCancelled, DeadlineExceeded
from asgi_infer._future import FUTURE_PORT, CallFuture
from asgi_infer._model import name_of
from asgi_infer._refusals import stopped
from asgi_infer._restarts import RestartPolicy
from asgi_infer._scheduler import Scheduler
from asgi_infer._statistics import Counters, Usage
from asgi_infer._thread import InferenceThread
from asgi_infer.workers._protocol import ModelSpec, Worker
from asgi_infer.workers.thread import ThreadReplica, leak

from .calls import RecordingPort, make_call
from .gates import LIMIT, Gate
from .polling import until_true
from .replicas import AT_ONCE, GIVE_UP, Replicas, crash, this_replica
from .streams import make_stream_call


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
        self.make_thread(self.worker, previous)

    def make_thread(self, worker: Worker, previous: InferenceThread | None = None) -> None:
        self.counters = Counters()
        self.scheduler = Scheduler(
            slots=worker.replicas, max_queue=100, counters=self.counters, lock=threading.RLock()
        )
        spec = ModelSpec(name="bench", load=list, warmup=None, native=NativePolicy())
        self.thread = InferenceThread(
            spec=spec,
            worker=worker,
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


# -- several replicas --------------------------------------------------------------------------


class Crew(Bench):
    """The same with several replicas, and a thread for each.

    :ivar replicas: the worker
    """

    def __init__(self, count: int, policy: RestartPolicy = AT_ONCE, **options: Any) -> None:
        self.replicas = Replicas(count, policy)
        self.make_thread(self.replicas, **options)

    def wait(self, what: str, count: int = 1) -> None:
        """Until that has been noted so often."""
        until_true(lambda: self.replicas.count(what) >= count)

    def books(self, **expected: int) -> None:
        names = ("completed", "failed", "cancelled", "rejected", "late", "running", "restarts")
        counted = {name: getattr(self.counters, name) for name in names}
        assert counted == dict.fromkeys(names, 0) | expected


MakeCrew = Callable[..., Crew]


@pytest.fixture
def make_crew() -> Iterator[MakeCrew]:
    """Makes crews, which are stopped in the end."""
    crews: list[Crew] = []

    def make(*args: Any, **options: Any) -> Crew:
        crews.append(Crew(*args, **options))
        return crews[-1]

    yield make
    for crew in crews:
        if crew.thread._threads[0].ident is not None:
            crew.thread.stop_now()
            assert crew.thread.join(LIMIT)
            assert crew.thread.done.done()
            assert all(
                crew.replicas.count(f"close {number}") == 1 for number in crew.replicas.made
            )


def number_of_slot() -> int:
    return this_replica().number


def test_each_replica_has_a_thread(make_crew: MakeCrew) -> None:
    """Three replicas: three calls run at once, each on the thread that has opened its replica and
    will close it, and the fourth waits."""
    crew = make_crew(3)
    crew.start()
    gates = [Gate() for _ in range(4)]
    futures = [crew.submit(gate, None) for gate in gates]
    for gate in gates[:3]:
        gate.wait_entered()
    assert (crew.counters.running, crew.scheduler.queued) == (3, 1)
    for gate in gates:
        gate.release.set()
    for future in futures:
        future.result(LIMIT)
    crew.stop()
    threads = {gate.thread_ids[0] for gate in gates}
    assert len(threads) == 3
    assert sorted(crew.replicas.notes) == [
        f"{what} {number}" for what in ("close", "open") for number in range(3)
    ]
    assert (crew.replicas.most, crew.counters.completed) == (3, 4)


def test_never_more_at_once_than_replicas(make_crew: MakeCrew) -> None:
    """Two replicas, hundreds of calls, and now and then one that crashes: never three at once,
    never two on one replica (they see to that), and each has its own outcome."""
    crew = make_crew(2)
    crew.start()
    good = [crew.submit(abs, -number) for number in range(60)]
    bad = [crew.submit(crash) for _ in range(5)]
    good += [crew.submit(abs, -number) for number in range(60, 90)]
    assert [future.result(LIMIT) for future in good] == list(range(90))
    assert all(isinstance(future.exception(LIMIT), WorkerCrashed) for future in bad)
    assert crew.replicas.most <= 2
    until_true(lambda: crew.counters.restarts == 5)
    crew.books(completed=90, failed=5, restarts=5)


def test_served_while_others_load(make_crew: MakeCrew) -> None:
    """Who has loaded takes calls; the runner is ready when all have."""
    crew = make_crew(2)
    loading = Gate()
    crew.replicas.opening = lambda number: number and loading(None)
    crew.thread.start()
    loading.wait_entered()
    assert [crew.submit(number_of_slot).result(LIMIT) for _ in range(3)] == [0, 0, 0]
    assert crew.thread.state == "loading"
    assert not crew.thread.ready.done()
    loading.release.set()
    crew.thread.ready.result(LIMIT)
    assert crew.thread.state == "ready"


def test_one_does_not_load(make_crew: MakeCrew) -> None:
    """Who starts the runner gets the error. So do all callers, also those whose calls run on a
    replica that has loaded, which is told that nobody waits. Every thread ends."""
    crew = make_crew(3)
    gate, loading = Gate(), Gate()

    def opening(number: int) -> None:
        if number:
            loading(None)
            raise OSError("no memory")

    crew.replicas.opening = opening
    crew.thread.start()
    running, waiting = crew.submit(gate, None), crew.submit(abs, -1)
    gate.wait_entered()
    until_true(lambda: loading.entries == 2)
    loading.release.set()
    assert isinstance(crew.thread.ready.exception(LIMIT), OSError)
    for future in (running, waiting):
        with pytest.raises(NotReady, match="did not load: OSError: no memory"):
            future.result(LIMIT)
    with pytest.raises(NotReady):
        crew.submit(abs, -1)
    assert all(replica.interrupted.wait(LIMIT) for replica in crew.replicas.made.values())
    assert (crew.thread.state, crew.thread.over) == ("failed", True)
    assert not crew.thread.done.done()
    gate.release.set()
    assert crew.thread.join(LIMIT)
    assert crew.thread.done.done()
    crew.books(cancelled=2, rejected=1, late=1)


def test_all_fail_to_load(make_crew: MakeCrew) -> None:
    """The first error is the one that is reported, and there is only one."""
    crew = make_crew(3)
    errors = [LookupError(number) for number in range(3)]
    together = threading.Barrier(3)

    def opening(number: int) -> NoReturn:
        together.wait(LIMIT)
        raise errors[number]

    crew.replicas.opening = opening
    crew.thread.start()
    assert crew.thread.ready.exception(LIMIT) in errors
    assert crew.thread.join(LIMIT)
    assert crew.thread.done.done()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_thread_that_does_not_start(
    make_crew: MakeCrew, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """If it is the first one, nothing has happened, and that is the error. Otherwise those that
    run already end, and whoever waits for them is told. Every replica is closed, once."""
    crew = make_crew(3)
    start = threading.Thread.start

    def start_some(thread: threading.Thread) -> None:
        if thread in crew.thread._threads[number:]:
            raise RuntimeError("can't start new thread")
        start(thread)

    made = crew.replicas.made
    crew.replicas.opening = lambda number: made[number].interrupted.wait(LIMIT)
    future = crew.submit(abs, -1)
    monkeypatch.setattr(threading.Thread, "start", start_some)
    if number == 0:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            crew.thread.start()
        crew.scheduler.drop_queued(stopped)
    else:
        crew.thread.start()
        assert crew.thread.join(LIMIT)
        with pytest.raises(NotReady, match=f"no thread for its replica {number}: can't start"):
            crew.thread.ready.result(LIMIT)
        assert crew.thread.done.done()
        assert crew.thread.state == "failed"
    assert isinstance(future.exception(LIMIT), Draining if number == 0 else NotReady)
    closed = [note for note in crew.replicas.notes if note.startswith("close")]
    assert sorted(closed) == ["close 0", "close 1", "close 2"]


def test_next_ones_wait_for_all(make_crew: MakeCrew) -> None:
    """None of a runner's next threads loads before all of those before it have ended."""
    crew = make_crew(2)
    crew.start()
    gate = Gate()
    crew.submit(gate, None)
    gate.wait_entered()
    crew.thread.stop_now()
    following = make_crew(2, previous=crew.thread)
    following.thread.start()
    future = following.submit(abs, -1)
    until_true(lambda: sum(thread.is_alive() for thread in crew.thread._threads) == 1)
    assert following.replicas.notes == []
    gate.release.set()
    assert future.result(LIMIT) == 1
    assert following.thread.schedulers == [following.scheduler]


def test_loop_of_one_thread_fails(make_crew: MakeCrew, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should one of the threads end by a fault of its own, all do, and nobody waits for ever."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    crew = make_crew(2)
    crew.start()
    gates = [Gate(), Gate()]
    futures = [crew.submit(gate, None) for gate in gates] + [crew.submit(abs, -1)]
    for gate in gates:
        gate.wait_entered()
    finish = crew.scheduler.finish

    def broken(call: Call, *args: Any) -> Call | None:
        if call.slot.number:
            raise MemoryError
        return finish(call, *args)

    monkeypatch.setattr(crew.scheduler, "finish", broken)
    for gate in gates:
        gate.release.set()
    assert crew.thread.join(LIMIT)
    outcomes = [type(future.exception(0)) for future in futures]
    assert Draining in outcomes
    with pytest.raises(Draining):
        crew.submit(abs, -1)
    crew.counters.running = 0  # one is lost: it never finished


def test_stuck_in_one_of_two(make_crew: MakeCrew) -> None:
    """At the end of the main thread those who wait for a call that does not end are sent away,
    and the runner is stopped only if it gets through no calls at all."""
    crew = make_crew(2)
    crew.start()
    gates = [Gate(), Gate()]
    first = crew.submit(gates[0], None)
    gates[0].wait_entered()
    assert not crew.thread.give_up_on(crew.scheduler.under_way())
    assert isinstance(first.exception(LIMIT), Draining)
    second = crew.submit(gates[1], None)
    gates[1].wait_entered()
    assert crew.thread.state == "ready"
    assert crew.thread.give_up_on(crew.scheduler.under_way())
    assert isinstance(second.exception(LIMIT), Draining)
    assert crew.thread.state == "draining"
    for gate in gates:
        gate.release.set()


def test_left_behind_by_all(make_crew: MakeCrew) -> None:
    """In a forked child the calls of every slot are nobody's, and every replica is left alone."""
    crew = make_crew(2)
    crew.start()
    gates = [Gate(), Gate()]
    futures = [crew.submit(gate, None) for gate in gates] + [crew.submit(abs, -1)]
    for gate in gates:
        gate.wait_entered()
    crew.thread.leave_behind()
    for future in futures:
        assert "belongs to the parent process" in str(future.exception(0))
    assert crew.replicas.notes[-2:] == ["leave behind 0", "leave behind 1"]
    for gate in gates:
        gate.release.set()


# -- replicas that are lost --------------------------------------------------------------------


def test_lost_while_idle(make_crew: MakeCrew, caplog: pytest.LogCaptureFixture) -> None:
    """A model that goes while nothing runs is loaded again, without a call to ask for it, on the
    same thread; the other replica is not touched."""
    crew = make_crew(2)
    crew.start()
    with caplog.at_level(logging.WARNING, "asgi_infer"):
        crew.replicas.made[1].die()
        until_true(lambda: crew.counters.restarts == 1)
        until_true(lambda: bool(caplog.records))
    assert crew.replicas.notes.count("open 1") == 2
    assert crew.replicas.notes.count("open 0") == 1
    gates = [Gate(), Gate()]
    futures = [crew.submit(gate, None) for gate in gates]
    for gate in gates:
        gate.wait_entered()
        gate.release.set()
    for future in futures:
        future.result(LIMIT)
    assert "the model of 'bench' is there again, after" in caplog.text
    assert crew.thread.state == "ready"


def test_too_late_while_it_loads(make_crew: MakeCrew) -> None:
    """Who waits in vain for a model that is loaded again is told what for; and the log tells when
    that begins, and for how many."""
    crew, gate = make_crew(1), Gate()
    crew.start()
    crew.replicas.opening = lambda number: gate(None)
    crew.replicas.made[0].die()
    gate.wait_entered()
    late = crew.submit(abs, -1, deadline=time.monotonic() + 0.02)
    with pytest.raises(DeadlineExceeded, match="for the model to be loaded again") as caught:
        late.result(LIMIT)
    assert caught.value.detail == NotReady.public
    gate.release.set()
    assert crew.submit(abs, -1).result(LIMIT) == 1


def test_stop_while_it_loads(make_crew: MakeCrew) -> None:
    """When the runner stops, a model for which nobody waits is not loaded to the end."""
    crew, loading = make_crew(1), threading.Event()

    def load(number: int) -> None:
        loading.set()
        assert crew.replicas.made[number].interrupted.wait(LIMIT)

    crew.start()
    crew.replicas.opening = load
    crew.replicas.made[0].die()
    assert loading.wait(LIMIT)
    crew.thread.stop_soon()
    assert crew.thread.join(LIMIT)


def test_stopped_before_it_starts(make_crew: MakeCrew) -> None:
    """Nor is one that nobody has waited for from the start."""
    crew = make_crew(1)
    crew.thread.stop_soon()
    crew.thread.start()
    assert crew.thread.join(LIMIT)
    assert crew.replicas.made[0].interrupted.is_set()


def test_lost_again_and_again(make_crew: MakeCrew) -> None:
    """With calls all the while: none of them is lost with it, however the two meet."""
    crew = make_crew(2)
    crew.start()
    for number in range(100):
        for replica in crew.replicas.made.values():
            replica.die()
        assert crew.submit(abs, -number).result(LIMIT) == number
    made = crew.replicas.made.values()
    until_true(lambda: not any(replica.dying or replica.lost for replica in made))
    assert crew.counters.completed == 100
    assert crew.counters.failed == 0


def test_only_the_call_that_runs_is_lost(make_crew: MakeCrew) -> None:
    """Its caller learns of it at once; those who wait are served when the model is there again,
    and so is who comes meanwhile."""
    crew = make_crew(1)
    crew.start()
    gate = Gate()

    def crash_later() -> None:
        gate(None)
        crash()

    lost, waiting = crew.submit(crash_later), crew.submit(abs, -1)
    gate.wait_entered()
    loading = Gate()
    crew.replicas.opening = lambda number: loading(None)
    gate.release.set()
    assert isinstance(lost.exception(LIMIT), WorkerCrashed)
    loading.wait_entered()
    assert crew.thread.state == "ready"
    late = crew.submit(abs, -2)
    assert not waiting.done()
    loading.release.set()
    assert (waiting.result(LIMIT), late.result(LIMIT)) == (1, 2)
    crew.books(completed=2, failed=1, restarts=1)


def test_streams_go_with_their_replica(make_crew: MakeCrew) -> None:
    """Streams that have begun on a replica which is lost end with an error, whether they were
    about to go on or waited for room; one on another replica goes on."""
    crew = make_crew(2)
    crew.start()
    port = RecordingPort()
    streams: list[StreamCall] = []
    homes: list[int] = []

    def items() -> Iterator[int]:
        homes.append(number_of_slot())
        yield from range(10**6)

    gates = [Gate(), Gate()]
    for gate in gates:  # each takes the one slot that is free, so that streams go to the other
        crew.submit(gate, None)
        gate.wait_entered()
        if gate is gates[1]:
            gates[0].release.set()
        until_true(lambda: crew.counters.running == 1 + len(streams))
        for _ in range(2):
            streams.append(make_stream_call(items, buffer=2))
            streams[-1].buffer.wait_with("consumer", port)
            crew.scheduler.admit(streams[-1])
            until_true(lambda: streams[-1].parked)
    gates[1].release.set()
    lost = homes[0]
    assert homes == [lost, lost, 1 - lost, 1 - lost]
    crew.replicas.made[lost].die()
    gone = [stream for stream, home in zip(streams, homes, strict=True) if home == lost]
    kept = [stream for stream, home in zip(streams, homes, strict=True) if home != lost]
    until_true(lambda: all(stream.over for stream in gone))
    assert all(isinstance(stream.error, WorkerCrashed) for stream in gone)
    assert all(stream.parked for stream in kept)
    for stream in kept:
        assert [stream.buffer.take() for _ in range(2)] == [0, 1]
        crew.scheduler.resume(stream)
    until_true(lambda: all(stream.parked for stream in kept))
    assert [stream.buffer.take() for stream in kept] == [2, 2]
    assert crew.counters.failed == len(gone) == 2


def test_back_by_itself(make_crew: MakeCrew) -> None:
    """A replica that was lost and opened in the midst of a call is not opened once more; but its
    streams are over."""
    crew = make_crew(1)
    crew.start()
    stream = make_stream_call(lambda: iter(range(10**6)), buffer=1)
    crew.scheduler.admit(stream)
    until_true(lambda: stream.parked)

    def lose_and_reopen() -> str:
        replica = this_replica()
        replica.lose_now()
        replica.open(replica._lost)
        return "done"

    assert crew.submit(lose_and_reopen).result(LIMIT) == "done"
    until_true(lambda: crew.counters.restarts == 1)
    assert isinstance(stream.error, WorkerCrashed)
    assert crew.submit(abs, -1).result(LIMIT) == 1
    assert crew.replicas.notes.count("open 0") == 2


@pytest.mark.parametrize("error", [LookupError("no file"), SystemExit(3), KeyboardInterrupt()])
def test_does_not_load_again(
    make_crew: MakeCrew, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    """Whatever a model raises that is loaded again, that is logged and tried again."""
    crew = make_crew(2)
    crew.start()
    errors = [error, error]

    def opening(number: int) -> None:
        if errors:
            raise errors.pop()

    crew.replicas.opening = opening
    with caplog.at_level(logging.WARNING, "asgi_infer"):
        assert isinstance(crew.submit(crash).exception(LIMIT), WorkerCrashed)
        until_true(lambda: crew.counters.restarts == 1)
    text = f"the model of 'bench' did not load again: {type(error).__name__}"
    assert caplog.text.count(text) == 2
    gates = [Gate(), Gate()]
    futures = [crew.submit(gate, None) for gate in gates]
    for gate in gates:
        gate.wait_entered()
        gate.release.set()
    for future in futures:
        future.result(LIMIT)


def test_one_is_broken(make_crew: MakeCrew, caplog: pytest.LogCaptureFixture) -> None:
    """The other serves, and the runner is as ready as it can be."""
    crew = make_crew(2, GIVE_UP)
    crew.start()
    with caplog.at_level(logging.ERROR, "asgi_infer"):
        assert isinstance(crew.submit(crash).exception(LIMIT), WorkerCrashed)
        until_true(lambda: any(slot.broken for slot in crew.scheduler.slots))
    assert "next try in 40 s, and a 503 for all calls until then" in caplog.text
    (other,) = (slot.number for slot in crew.scheduler.slots if not slot.broken)
    assert [crew.submit(number_of_slot).result(LIMIT) for _ in range(3)] == [other] * 3
    assert crew.thread.state == "ready"
    crew.stop()  # at once
    assert crew.thread.state == "closed"


def test_all_are_broken(make_crew: MakeCrew) -> None:
    """Callers are told, and when it is going to be tried again; who waits is sent away. Such a
    runner is stopped at once."""
    crew = make_crew(2, GIVE_UP)
    crew.start()
    gate = Gate()

    def crash_later() -> None:
        gate(None)
        crash()

    lost = [crew.submit(crash_later) for _ in range(2)]
    until_true(lambda: gate.entries == 2)
    waiting = crew.submit(abs, -1)
    gate.release.set()
    with pytest.raises(NotReady, match=r"crashed too often .* started again in (40|39\.\d+) s"):
        waiting.result(LIMIT)
    assert all(isinstance(future.exception(LIMIT), WorkerCrashed) for future in lost)
    with pytest.raises(NotReady) as caught:
        crew.submit(abs, -1)
    assert (caught.value.retry_after or 0) >= 35
    assert crew.thread.state == "broken"
    crew.scheduler.when_idle().result(LIMIT)
    crew.stop()
    crew.books(failed=2, cancelled=1, rejected=1)


def test_recovers(make_crew: MakeCrew) -> None:
    """A broken model is tried again after a while; once it has loaded, calls are taken."""
    crew = make_crew(1, RestartPolicy(max_restarts=0, recover_after=0.01))
    crew.start()
    loading = Gate()

    def opening(number: int) -> None:
        loading(None)
        if loading.entries == 1:
            raise LookupError("not yet")

    crew.replicas.opening = opening
    for _ in range(2):  # it has one more chance each time, and one only
        assert isinstance(crew.submit(crash).exception(LIMIT), WorkerCrashed)
        loading.wait_entered()
        assert crew.thread.state == "broken"
        with pytest.raises(NotReady, match="it is started again now"):
            crew.submit(abs, -1)
        loading.release.set()
        until_true(lambda: crew.thread.state == "ready")
        assert crew.submit(abs, -1).result(LIMIT) == 1
        loading.release.clear()
        loading.entered.clear()
    loading.release.set()
    crew.books(completed=2, failed=2, rejected=2, restarts=2)


@pytest.mark.parametrize("count", [1, 2])
def test_stopped_when_lost(make_crew: MakeCrew, count: int) -> None:
    """The calls that a stopped runner has accepted are run all the same: by the other replica,
    or by this one when its model is there again. Then all threads end."""
    crew = make_crew(count)
    crew.start()
    gates = [Gate() for _ in range(count)]

    def crash_later(gate: Gate) -> None:
        gate(None)
        crash()

    lost = [crew.submit(crash_later, gate) for gate in gates]
    for gate in gates:
        gate.wait_entered()
    waiting = [crew.submit(abs, -number) for number in range(5)]
    crew.thread.stop_soon()
    for gate in gates:
        gate.release.set()
    assert [future.result(LIMIT) for future in waiting] == list(range(5))
    assert crew.thread.join(LIMIT)
    assert all(isinstance(future.exception(LIMIT), WorkerCrashed) for future in lost)
    assert crew.thread.state == "closed"


def test_stopped_for_good_when_lost(make_crew: MakeCrew) -> None:
    """Nobody waits for a model that takes its time to come back: it is interrupted."""
    crew = make_crew(1)
    crew.start()
    replica = crew.replicas.made[0]
    loading = threading.Event()

    def opening(number: int) -> NoReturn:
        loading.set()
        assert replica.interrupted.wait(LIMIT)
        raise NotReady("interrupted")

    crew.replicas.opening = opening
    lost, waiting = crew.submit(crash), crew.submit(abs, -1)
    assert loading.wait(LIMIT)
    crew.thread.stop_now()
    assert crew.thread.join(LIMIT)
    assert isinstance(lost.exception(LIMIT), WorkerCrashed)
    assert isinstance(waiting.exception(LIMIT), Draining)


def test_stop_now_interrupts_all(make_crew: MakeCrew, caplog: pytest.LogCaptureFixture) -> None:
    """Every replica is told that nobody waits any more, every caller sent away; one function is
    named."""
    crew = make_crew(2)
    crew.start()
    ends: list[bool] = []

    def until_interrupted() -> None:
        ends.append(this_replica().interrupted.wait(LIMIT))

    futures = [crew.submit(until_interrupted) for _ in range(3)]
    until_true(lambda: crew.counters.running == 2)
    with caplog.at_level(logging.WARNING, "asgi_infer"):
        crew.thread.stop_now()
    assert all(isinstance(future.exception(0), Draining) for future in futures)
    assert crew.thread.join(LIMIT)
    assert ends == [True, True]
    assert len(caplog.records) == 1
    crew.books(cancelled=3, late=2)


def test_idle_threads_that_are_interrupted(make_crew: MakeCrew) -> None:
    """Also in the very moment in which they fall asleep."""
    for _ in range(20):
        crew = make_crew(3)
        crew.start()
        crew.submit(abs, -1)
        crew.thread.stop_now()
        assert crew.thread.join(LIMIT)


def test_caller_that_leaves_is_noticed(make_crew: MakeCrew) -> None:
    """The replica that runs its call is told, and no other."""
    crew = make_crew(2)
    crew.start()
    gates = [Gate(), Gate()]
    for gate in gates:
        crew.submit(gate, None)
        gate.wait_entered()
    call = crew.scheduler.slots[1].current()
    assert call is not None
    crew.scheduler.leave(call, Departure.CANCELLED)
    assert [replica.noticed for _, replica in sorted(crew.replicas.made.items())] == [[], [call]]
    for gate in gates:
        gate.release.set()


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
