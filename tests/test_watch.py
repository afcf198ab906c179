"""What calls cost, as the runner's statistics show it."""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from asgi_infer import InferenceRunner, NativePolicy, _watch
from asgi_infer._statistics import Usage
from asgi_infer._watch import Watch

from .calls import RecordingPort, make_call
from .native import gomp
from .polling import until
from .threads import on_new_thread

linux = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted one by one there")


@pytest.fixture
def runner() -> Iterator[InferenceRunner[None]]:
    """A runner to submit to. It has no model."""
    with InferenceRunner[None]() as runner:
        yield runner


def sleep(times: int) -> None:
    """Give the CPU up, and do nothing else that counts."""
    for _ in range(times):
        time.sleep(0.0001)


def touch(pages: int) -> None:
    """Ask the kernel for memory, page by page."""
    with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1


def watched(runner: InferenceRunner[None], func: Callable[..., object], *args: object) -> None:
    """Make a call, and wait until it has been looked at: that is done before the next one runs."""
    runner.submit(func, *args).result()
    runner.submit(int).result()


# -- counts of every call ----------------------------------------------------------------------


@linux
def test_switches_per_call(runner: InferenceRunner[None]) -> None:
    """Sleeps inside calls are counted; those between calls are not."""
    for _ in range(40):
        runner.submit(sleep, 10).result()
    assert 8 <= runner.statistics().switches_per_call <= 15
    for _ in range(100):
        time.sleep(0.001)  # the runner's thread goes to sleep as well
        runner.submit(int).result()
    assert runner.statistics().switches_per_call < 1


@linux
def test_faults_per_call(runner: InferenceRunner[None]) -> None:
    """Pages that a call touches for the first time are counted."""
    for _ in range(40):
        runner.submit(touch, 100).result()
    assert 95 <= runner.statistics().faults_per_call <= 130


# -- a close look now and then -----------------------------------------------------------------


def test_one_look_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many calls there are, one a second is looked at."""
    looks: list[float] = []

    class Counted(_watch.Look):
        def __init__(self, call: Any, *args: Any) -> None:
            looks.append(call.started)
            super().__init__(call, *args)

    monkeypatch.setattr(_watch, "Look", Counted)
    start = time.monotonic()
    with InferenceRunner[None]() as runner:
        for _ in range(500):
            runner.submit(int).result()
    assert 1 <= len(looks) <= 1 + (time.monotonic() - start) / _watch.LOOK_EVERY


@pytest.mark.anyio
async def test_loop_lag(runner: InferenceRunner[None]) -> None:
    """While a call runs, its caller's loop is asked to answer; the time that takes is noted."""
    await runner.run(sleep, 50)
    await until(lambda: runner.submit(int).result() == 0 and runner.statistics().loop_lag > 0)


@pytest.mark.anyio
async def test_loop_lag_of_a_binding_that_holds_the_gil(runner: InferenceRunner[None]) -> None:
    """A function that holds the GIL keeps the loop from answering until it has ended."""
    await runner.run(ctypes.PyDLL(None).usleep, 100_000)
    await until(lambda: runner.submit(int).result() == 0 and runner.statistics().loop_lag > 0)
    assert runner.statistics().loop_lag > 0.09


def test_no_loop_no_lag(runner: InferenceRunner[None]) -> None:
    """Calls from synchronous code have no loop that could lag."""
    runner.submit(sleep, 5).result()
    assert runner.statistics().loop_lag == 0


def test_cores_used(runner: InferenceRunner[None]) -> None:
    """A call that computes uses a good part of a CPU at least, one that waits hardly any."""

    def compute() -> None:
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass

    watched(runner, compute)
    computing = runner.statistics().cores_used
    with InferenceRunner[None](name="waiting") as waiting:
        watched(waiting, time.sleep, 0.02)
        assert waiting.statistics().cores_used < computing / 2


@linux
def test_foreign_threads(runner: InferenceRunner[None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Native threads that are neither Python's nor the model's are counted."""
    monkeypatch.setattr(_watch, "LOOK_EVERY", 0.0)

    def foreign() -> int:
        watched(runner, int)
        return runner.statistics().foreign_threads

    def owner() -> tuple[int, int, int]:
        return foreign(), len(gomp.started_by(gomp.run_region, 3)), foreign()

    before, started, after = on_new_thread(owner)
    assert after - before == started == 2


# -- what a look keeps and waits for -----------------------------------------------------------


class Desk:
    """A watch, and calls that are made for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        clock = SimpleNamespace(monotonic=lambda: self.now, process_time=time.process_time)
        monkeypatch.setattr(_watch, "time", clock)
        self.usage = Usage()
        self.watch = Watch(name="digits", native=NativePolicy(), usage=self.usage)
        self.port = RecordingPort()
        self.argument: Any = None

    def call(self, seconds: float = 0.5, during: Callable[[], object] = lambda: None) -> None:
        call = make_call(id, self.argument, port=self.port)
        call.started = self.now
        if call.started >= self.watch.next_look:
            self.watch.look_at(call)
        during()
        self.now += seconds
        self.watch.end(call)
        if self.watch.news is not None:
            self.watch.attend()


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


def test_answer_after_the_call(desk: Desk) -> None:
    """An answer that comes when the call has ended counts with the next call's end."""
    desk.call(0.5)
    desk.now += 0.25
    desk.port.turn()
    desk.port.turn()
    assert desk.usage.loop_lag == 0
    desk.call(0.5)
    assert desk.usage.loop_lag == pytest.approx(0.75)


def test_the_later_answer_counts(desk: Desk) -> None:
    """A loop that answered as the call began, and then no more until its end, lags by the rest."""
    desk.call(0.5, during=desk.port.turn)
    desk.port.turn()
    desk.call(0.5)
    assert desk.usage.loop_lag == pytest.approx(0.5 - _watch._PAUSE)


def test_answer_within_the_call(desk: Desk) -> None:
    """A loop that answers while the call runs does not lag at all."""

    def two_turns() -> None:
        desk.port.turn()
        desk.now += _watch._PAUSE
        desk.port.turn()

    desk.call(0.5, during=two_turns)
    assert desk.watch._look is None
    assert desk.usage.loop_lag == pytest.approx(0.0)


def test_no_answer(desk: Desk) -> None:
    """A loop that never answers is given up after ten seconds, and the next one is asked."""
    for _ in range(30):
        desk.call(0.5)
    assert len(desk.port.to_call) == 2
    assert desk.usage.loop_lag == 0


def test_ended_loop(desk: Desk) -> None:
    """Where the loop has ended, the rest is looked at all the same."""
    desk.port = RecordingPort(ended=True)
    desk.call(0.5)
    assert desk.usage.cores_used >= 0
    assert desk.watch._look is None


def test_look_keeps_nothing_alive(desk: Desk) -> None:
    """Arguments die with their call, though the look at it waits for an answer."""

    class Argument:
        pass

    argument = Argument()
    died = weakref.ref(argument)
    desk.argument = argument
    del argument
    desk.call()
    desk.argument = None
    assert desk.watch._look is not None
    assert died() is None


# -- whatever fails ----------------------------------------------------------------------------


class Failing(logging.Handler):
    """A logging handler that fails."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("the disk is full")


@pytest.fixture
def failing_log() -> Iterator[None]:
    handler = Failing()
    logging.getLogger("asgi_infer").addHandler(handler)
    yield
    logging.getLogger("asgi_infer").removeHandler(handler)


@pytest.mark.usefixtures("failing_log")
def test_watch_that_fails(runner: InferenceRunner[None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hint whose logging fails, as the words about that do, costs the watch and no call."""
    monkeypatch.setattr(_watch, "LOOK_EVERY", 0.0)
    considered = []

    def consider(hints: object, look: Any) -> None:
        considered.append(look.func)
        logging.getLogger("asgi_infer").warning("a hint")

    monkeypatch.setattr("asgi_infer._watch.Hints.consider", consider)
    assert [runner.submit(pow, 2, 3).result() for _ in range(5)] == [8] * 5
    assert considered == ["pow"]
    assert runner.statistics().completed == 5


@linux
def test_hints_are_about_the_runners_calls(
    runner: InferenceRunner[None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A function that takes memory anew in each call is told of, by its name."""
    monkeypatch.setattr(_watch, "LOOK_EVERY", 0.0)
    with caplog.at_level(logging.WARNING, "asgi_infer"):
        for _ in range(10):
            runner.submit(touch, 2000).result()
    (line,) = [message for message in caplog.messages if "page faults" in message]
    assert line.startswith("touch spends about ")


def test_trio_run_that_ends(desk: Desk) -> None:
    """A loop that takes no timers any more has answered once, and that is all it does."""

    class Ending(RecordingPort):
        def call_later(self, delay: float, func: Callable[[], object], /) -> Callable[[], object]:
            raise RuntimeError("Nursery is closed to new arrivals")

    desk.port = Ending()
    desk.call(0.5, during=desk.port.turn)
    assert desk.watch._look is None
    assert desk.usage.loop_lag == 0.0
