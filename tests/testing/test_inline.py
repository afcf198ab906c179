"""Inline runners: everything that runners do, at once, on the thread that asks for it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from asgi_infer import (
    Batcher,
    DeadlineExceeded,
    Draining,
    InferenceMiddleware,
    InferenceRunner,
    NativePolicy,
    ReentrantCall,
)
from asgi_infer.fastapi import RunnerDep, get_runner
from asgi_infer.testing import InlineRunner, VirtualClock, run_inline

pytestmark = pytest.mark.anyio


class Model:
    """Tells where it was used, and what became of its generators."""

    def __init__(self) -> None:
        self.threads = {threading.get_ident()}
        self.closed = 0

    def double(self, x: int) -> int:
        self.threads.add(threading.get_ident())
        return 2 * x

    def double_all(self, xs: list[int]) -> list[int]:
        return [2 * x for x in xs]

    def count(self, stop: int) -> Iterator[int]:
        try:
            yield from range(stop)
        finally:
            self.closed += 1

    def closures(self) -> int:
        return self.closed


class Fake(Model):
    def double(self, x: int) -> int:
        return -x


# -- calls -------------------------------------------------------------------------------------


async def test_calls_run_on_the_thread_that_makes_them() -> None:
    """``run``, ``submit``, ``map`` and ``wrap`` return what the model does; no thread is used
    but this one, and none is started."""
    before = threading.active_count()
    runner = InlineRunner(Model)
    assert await runner.run(runner.model.double, 1) == 2
    assert runner.submit(runner.model.double, 2).result() == 4
    assert list(runner.map(runner.model.double, [3, 4])) == [6, 8]
    assert await runner.wrap(runner.model.double)(5) == 10
    threads: Any = runner.model.threads
    assert await runner.run(partial(set, threads)) == {threading.get_ident()}
    assert threading.active_count() == before
    statistics = runner.statistics()
    assert (statistics.submitted, statistics.completed, statistics.state) == (6, 6, "ready")


async def test_a_call_is_over_before_anything_else_happens() -> None:
    """A future is done when ``submit`` returns; an error is the caller's."""
    runner = InlineRunner(Model)
    assert runner.submit(len, "abc").done()
    assert isinstance(runner.submit(divmod, 1, 0).exception(), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        await runner.run(divmod, 1, 0)
    await runner.wait_idle()


async def test_batches() -> None:
    """A ``Batcher`` works, with batches of one; what it may wait passes on the virtual clock."""
    runner = InlineRunner(Model)
    batcher = Batcher(runner, runner.model.double_all, max_size=8, max_delay=5.0)
    assert [await batcher.run(x) for x in range(4)] == [0, 2, 4, 6]
    assert batcher.submit(4).result() == 8
    assert runner.statistics().batch_sizes == {1: 5}


async def test_a_batch_that_waits_for_more_lets_virtual_time_pass() -> None:
    """Where the scheduler holds a batch back, the clock moves on, and the call is answered."""
    runner = InlineRunner(Model)

    def double_all(xs: list[int]) -> list[int]:
        runner.clock.advance(1.0)
        return [2 * x for x in xs]

    batcher = Batcher(runner, double_all, max_size=8, max_delay=0.5)
    for x in range(3):
        assert await batcher.run(x) == 2 * x
        runner.clock.now -= 0.999  # as if calls came much faster than they are answered
    assert runner.clock() > 0.003


async def test_time_passes_on_demand() -> None:
    """A deadline passes when the function, or the test, moves the clock; not by itself."""
    clock = VirtualClock()
    runner = InlineRunner(Model, clock=clock, timeout=1.0)
    assert await runner.run(runner.model.double, 1) == 2
    with pytest.raises(DeadlineExceeded) as caught:
        await runner.run(clock.advance, 1.0)
    assert caught.value.started
    with pytest.raises(DeadlineExceeded):
        runner.submit(clock.advance, 1.0).result()
    await runner.run(clock.advance, 1.0, timeout=2.5)
    statistics = runner.statistics()
    assert (statistics.expired, statistics.late, statistics.completed) == (2, 2, 2)


async def test_no_time_at_all() -> None:
    """A call whose time is up when it comes never runs."""
    runner: InlineRunner[None] = InlineRunner(clock=VirtualClock(1.0))
    with pytest.raises(DeadlineExceeded) as caught:
        await runner.run(int, timeout=1e-20)
    assert not caught.value.started


async def test_context() -> None:
    """Functions see their caller's context, and ``NativePolicy.contexts`` are entered around."""
    variable: ContextVar[str] = ContextVar("variable")
    variable.set("caller's")
    inside: list[bool] = []

    @contextlib.contextmanager
    def mode() -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    runner: InlineRunner[None] = InlineRunner(native=NativePolicy(contexts=(mode,)))
    assert await runner.run(variable.get) == "caller's"
    assert await runner.run(list, inside) == [True]
    assert inside == []


async def test_a_call_on_its_own_runner_raises() -> None:
    """Directly, and by way of another runner; and the runner goes on to work."""
    runner: InlineRunner[None] = InlineRunner()
    other: InlineRunner[None] = InlineRunner()

    def directly() -> int:
        return runner.submit(int).result()

    def by_way_of_another() -> int:
        return other.submit(directly).result()

    for func in (directly, by_way_of_another):
        with pytest.raises(ReentrantCall):
            await runner.run(func)
    assert await runner.run(lambda: other.submit(int).result()) == 0


async def test_one_call_at_a_time() -> None:
    """Calls from several threads take turns."""
    runner: InlineRunner[None] = InlineRunner()
    inside: list[int] = []
    most = 0

    def work() -> None:
        nonlocal most
        inside.append(1)
        most = max(most, len(inside))
        time.sleep(0.001)
        inside.pop()

    threads = [threading.Thread(target=lambda: runner.submit(work).result()) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert runner.statistics().completed == 4


# -- streams -----------------------------------------------------------------------------------


async def test_items_are_made_as_they_are_taken() -> None:
    """An item is made when the one before it is taken; calls run in between."""
    runner: InlineRunner[None] = InlineRunner()
    made: list[int] = []

    def count() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number

    stream = runner.stream(count)
    seen = []
    async for number in stream:
        seen.append((number, await runner.run(len, made)))
    assert seen == [(0, 2), (1, 3), (2, 3)]
    assert runner.statistics().completed == 4


async def test_a_stream_that_nobody_wants_any_more_is_closed_at_once() -> None:
    """Left, dropped, closed, or too late: its ``finally`` blocks have run."""
    runner = InlineRunner(Model)
    count, closures = runner.model.count, runner.model.closures
    async with runner.stream(count, 9) as stream:
        assert await anext(stream) == 0
    assert await runner.run(closures) == 1
    stream = runner.stream(count, 9)
    await stream.aclose()
    assert await runner.run(closures) == 2
    stream = runner.stream(count, 9, timeout=1.0)
    assert await anext(stream) == 0
    runner.clock.advance(1.0)
    with pytest.raises(DeadlineExceeded):
        assert await anext(stream) == 1  # it may be there
        await anext(stream)
    assert await runner.run(closures) == 3


async def test_a_stream_that_fails() -> None:
    """The error of a generator comes after its items."""
    runner: InlineRunner[None] = InlineRunner()

    def fail() -> Iterator[int]:
        yield 1
        raise KeyError("no")

    stream = runner.stream(fail)
    assert await anext(stream) == 1
    with pytest.raises(KeyError):
        await anext(stream)
    with pytest.raises(TypeError, match="needs a generator"):
        await anext(runner.stream(int))  # type: ignore[arg-type]


# -- lifecycle ---------------------------------------------------------------------------------


async def test_start_and_stop() -> None:
    """It starts and stops as any runner does, and the model is destroyed when it stops."""
    models: list[weakref.ref[Model]] = []

    def load() -> Model:
        model = Model()
        models.append(weakref.ref(model))
        return model

    warm: list[int] = []
    runner = InlineRunner(load, warmup=lambda model: warm.append(model.double(1)))
    await runner.aclose()  # nothing to stop
    async with runner:
        assert (runner.statistics().state, warm) == ("ready", [2])
    assert runner.statistics().state == "closed"
    assert models[0]() is None
    with pytest.raises(Draining):
        await runner.run(int)
    await runner.start()
    assert await runner.run(runner.model.double, 2) == 4
    runner.shutdown()
    assert models[1]() is None


async def test_it_need_not_be_stopped() -> None:
    """An inline runner that is dropped takes its model along, without a warning."""
    runner = InlineRunner(Model)
    model = await runner.run(lambda model: weakref.ref(model), runner.model)
    assert model() is not None
    del runner
    assert model() is None
    InlineRunner(Model).__del__()


async def test_a_model_that_does_not_load() -> None:
    """Starting raises what ``load`` raises, and calls get ``NotReady``."""

    def load() -> Model:
        raise FileNotFoundError("model.onnx")

    runner = InlineRunner(load)
    with pytest.raises(FileNotFoundError):
        await runner.start()
    assert runner.statistics().state == "failed"
    with pytest.raises(Exception, match=r"did not load: FileNotFoundError: model\.onnx"):
        await runner.run(int)
    runner.shutdown()


async def test_streams_that_are_open_at_the_end() -> None:
    """``aclose`` gives them their grace, and the model is there until they have ended."""
    runner = InlineRunner(Model)
    stream = runner.stream(runner.model.count, 3)
    runner.shutdown()
    assert runner.statistics().state == "draining"
    assert [item async for item in stream] == [0, 1, 2]
    assert runner.statistics().state == "closed"
    await runner.start()
    stream = runner.stream(runner.model.count, 3)
    await runner.aclose(grace=0.0)
    assert runner.statistics().state == "closed"
    with pytest.raises(Draining):
        await anext(stream)


# -- applications ------------------------------------------------------------------------------


def make_app(runner: InferenceRunner[Model], **options: Any) -> FastAPI:
    app = FastAPI()
    app.add_middleware(InferenceMiddleware, runner=runner, **options)

    @app.get("/async/{x}")
    async def from_a_task(x: int, runner: RunnerDep) -> int:
        result: int = await runner.run(runner.model.double, x)
        return result

    @app.get("/sync/{x}")
    def from_a_thread(x: int, runner: RunnerDep) -> int:
        result: int = runner.submit(runner.model.double, x).result()
        return result

    return app


def test_with_a_test_client() -> None:
    """With a lifespan, without one, and by ``dependency_overrides``."""
    app = make_app(InlineRunner(Model))
    with TestClient(app) as client:
        assert client.get("/async/1").json() == 2
        assert client.get("/sync/2").json() == 4
        timing = client.get("/async/1").headers["server-timing"]
        assert timing == "queue;dur=0.000, infer;dur=0.000"
    bare = make_app(InlineRunner(Model))
    assert TestClient(bare).get("/async/1").json() == 2
    app.dependency_overrides[get_runner] = lambda: InlineRunner(Fake)
    assert TestClient(app).get("/async/1").json() == -1


def test_lifespan() -> None:
    """``runner.lifespan`` is a lifespan."""
    runner = InlineRunner(Model)
    with TestClient(FastAPI(lifespan=runner.lifespan)):
        assert runner.statistics().state == "ready"
    assert runner.statistics().state == "closed"


def test_what_a_client_allows_is_on_the_virtual_clock() -> None:
    """A deadline in a header is compared with virtual seconds, and can only shorten the time."""
    runner = InlineRunner(Model, timeout=4.0)
    client = TestClient(make_app(runner, deadline_header="x-deadline"))
    with runner.slow(3.0):
        assert client.get("/async/1").status_code == 200
        assert client.get("/async/1", headers={"x-deadline": "2.5"}).status_code == 504
        assert client.get("/async/1", headers={"x-deadline": "9"}).status_code == 200
    with runner.slow(5.0):
        assert client.get("/async/1", headers={"x-deadline": "9"}).status_code == 504
    lenient = InlineRunner(Model)
    client = TestClient(make_app(lenient, deadline_header="x-deadline"))
    with lenient.slow(3.0):
        assert client.get("/async/1", headers={"x-deadline": "2.5"}).status_code == 504


# -- a runner that is there already ------------------------------------------------------------


@pytest.fixture
async def runner() -> AsyncIterator[InferenceRunner[Model]]:
    """A runner with a thread, as an application has it."""
    async with InferenceRunner(Model) as runner:
        yield runner


async def test_an_existing_runner_becomes_inline_for_a_block(
    runner: InferenceRunner[Model],
) -> None:
    """Its calls, references and batchers work as before, with a stand-in for the model; and
    after the block its thread, model and books are what they were."""
    double = runner.model.double
    batcher = Batcher(runner, runner.model.double_all, max_size=8)
    assert await runner.run(double, 1) == 2
    before = runner.statistics()
    with run_inline(runner, Fake) as inline:
        assert inline is runner
        assert isinstance(runner, InlineRunner)
        assert await runner.run(double, 1) == -1
        assert await batcher.run(1) == 2
        assert runner.statistics().completed == 2
    assert type(runner) is InferenceRunner
    assert runner.statistics() == before
    assert await runner.run(double, 1) == 2


async def test_what_a_block_leaves_open_is_closed() -> None:
    """Streams of the block get ``Draining``; a runner that was new is new again."""
    runner = InferenceRunner(Model)
    with run_inline(runner, clock=VirtualClock(5.0)) as inline:
        assert inline.clock() == 5.0
        stream = runner.stream(runner.model.count, 3)
    with pytest.raises(Draining):
        await anext(stream)
    assert runner.statistics().state == "new"
    with run_inline(runner):
        pass


async def test_other_kinds_of_runners_become_inline() -> None:
    """A subclass stays one; an inline runner gets another clock."""

    class Special(InferenceRunner[Model]):
        def answer(self) -> int:
            return 42

    special = Special(Model)
    with run_inline(special) as inline:
        assert isinstance(special, Special)
        assert special.answer() == 42
        assert await inline.run(inline.model.double, 1) == 2
    assert type(special) is Special
    already = InlineRunner(Model)
    clock = already.clock
    with run_inline(already, Fake):
        assert already.clock is not clock
        assert await already.run(already.model.double, 1) == -1
    assert already.clock is clock


async def test_the_stand_in_is_not_warmed_up() -> None:
    """``warmup`` is for the model itself."""
    warm: list[str] = []
    runner = InferenceRunner(Model, warmup=lambda model: warm.append(type(model).__name__))
    with run_inline(runner, Fake):
        await runner.start()
    assert warm == []
    with run_inline(runner):
        await runner.start()
    assert warm == ["Model"]


def test_importing_it_is_up_to_the_test() -> None:
    """The package doesn't import it, and it doesn't import pytest."""
    script = (
        "import sys, asgi_infer; assert 'asgi_infer.testing' not in sys.modules\n"
        "import asgi_infer.testing; assert 'pytest' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
