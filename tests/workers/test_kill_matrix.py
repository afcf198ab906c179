"""Processes that die at every moment, in every way: nobody hangs, nothing is left.

In the manner of CPython's ``test_concurrent_futures/test_deadlock.py``. One test for each moment
dies in every way in turn, on one runner: who was being served is told, who waits is served
afterwards, and every restart is counted. That no file, thread or child is left is looked at
after each test.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import psutil
import pytest

from asgi_infer import (
    Batcher,
    CallFailed,
    DeadlineExceeded,
    InferenceRunner,
    NotReady,
    WorkerCrashed,
)
from asgi_infer.workers import ProcessWorker, RestartPolicy, SharedWorker
from asgi_infer.workers._protocol import Worker

from ..conftest import BACKENDS
from ..gates import LIMIT
from ..polling import some_turns, until, until_true
from . import crashes, functions
from .crashes import WAYS
from .functions import Model
from .remote_gates import Makers, RemoteGate

pytestmark = pytest.mark.anyio

OFTEN = RestartPolicy(max_restarts=100, backoff=0.0)

WORKERS: dict[str, Callable[..., Worker]] = {"process": ProcessWorker, "shared": SharedWorker}


@pytest.fixture
def anyio_backend() -> Any:
    """One loop: what happens on the loop has tests of its own."""
    return BACKENDS["asyncio"]


# The shared model's process is killed in other tests as well; here it takes half a minute.
@pytest.fixture(params=["process", pytest.param("shared", marks=pytest.mark.soak)])
def worker_name(request: pytest.FixtureRequest) -> str:
    """Each in turn."""
    return str(request.param)


@pytest.fixture
def make_worker(worker_name: str) -> Callable[..., Worker]:
    """Makes a worker with options."""
    return WORKERS[worker_name]


@pytest.fixture
def ways(worker_name: str) -> list[str]:
    """How to die: in all ways once, and for the others in one that leaves a stack and one that
    does not."""
    return list(WAYS) if worker_name == "process" else ["segfault", "exit"]


@pytest.fixture
def runner(make_worker: Callable[..., Worker]) -> Iterator[InferenceRunner[Model]]:
    """One that may restart as often as a test likes."""
    with InferenceRunner(Model, worker=make_worker(restart=OFTEN)) as runner:
        anyio.run(runner.start)
        yield runner


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Makers]:
    """Makes gates that work across processes."""
    makers = Makers(tmp_path)
    yield makers
    makers.close()


@pytest.fixture
def gate(make: Makers) -> RemoteGate:
    """One gate."""
    return make.gate()


async def crashed(runner: InferenceRunner[Model], func: Any, *args: Any) -> Exception:
    """How a call ends that its process does not survive; one that waits behind it is served."""
    before = runner.statistics()
    future = runner.submit(func, *args)
    waiting = runner.submit(functions.echo, 1)
    await until(lambda: waiting.done() and future.done())
    error = future.exception(0)
    assert isinstance(error, WorkerCrashed | DeadlineExceeded)
    assert waiting.result(0) == 1
    after = runner.statistics()
    assert after.restarts == before.restarts + 1
    assert after.failed > before.failed
    assert after.completed == before.completed + 1
    return error


# -- moments -----------------------------------------------------------------------------------


async def test_while_running(runner: InferenceRunner[Model], ways: list[str]) -> None:
    """The error says how the process ended, and in which function."""
    signs = {"segfault": "SIGSEGV", "abort": "SIGABRT", "exit": "3", "kill": "SIGKILL"}
    for way in ways:
        error = await crashed(runner, crashes.die, way)
        assert signs[way] in str(error)
        assert "die" in str(error)
        assert isinstance(error, WorkerCrashed)
        assert error.status_code == 500


async def test_while_reading_an_argument(runner: InferenceRunner[Model], ways: list[str]) -> None:
    """In a large request and in a small one."""
    for way in ways:
        size = 10**6 if way == "segfault" else 1
        argument = [b"x" * size, crashes.DiesWhenUnpickled(way)]
        await crashed(runner, functions.echo, argument)


async def test_while_writing_the_result(runner: InferenceRunner[Model], ways: list[str]) -> None:
    """The function has returned, and its result never arrives."""
    for way in ways:
        await crashed(runner, crashes.make, crashes.DiesWhenPickled, way)


async def test_in_the_middle_of_an_answer(runner: InferenceRunner[Model], ways: list[str]) -> None:
    """Half an answer is none."""
    for way in ways:
        await crashed(runner, crashes.write_half, way)


async def test_with_a_request_unread(runner: InferenceRunner[Model]) -> None:
    """A process that dies before it begins with a call: nothing of that was done, and the next
    process runs it."""
    for number, size in enumerate((1, 10**6), 1):
        process, _ = await runner.run(functions.where)
        os.kill(process, signal.SIGSTOP)
        future = runner.submit(len, b"x" * size)
        await until(lambda: runner.statistics().running == 1)
        os.kill(process, signal.SIGKILL)
        await until(future.done)
        assert future.result(0) == size
        await until(lambda number=number: runner.statistics().restarts == number)  # type: ignore[misc]
    assert runner.statistics().failed == 0


async def test_while_idle(runner: InferenceRunner[Model]) -> None:
    """Nobody is told, since nobody lost anything; the process is there again without a call."""
    for number in range(1, 4):
        process, _ = await runner.run(functions.where)
        os.kill(process, signal.SIGKILL)
        await until(lambda number=number: runner.statistics().restarts == number)  # type: ignore[misc]
        other, _ = await runner.run(functions.where)
        assert other != process
    assert runner.statistics().failed == 0


async def test_while_idle_and_a_call_comes_at_once(runner: InferenceRunner[Model]) -> None:
    """A call that has not reached the dead process is run by the next one, or told."""
    for number in range(1, 6):
        process, _ = await runner.run(functions.where)
        os.kill(process, signal.SIGKILL)
        future = runner.submit(functions.echo, number)
        await until(future.done)
        error = future.exception(0)
        assert isinstance(error, WorkerCrashed) or (error is None and future.result(0) == number)
        assert await runner.run(functions.echo, 1) == 1
        assert runner.statistics().restarts == number


async def test_while_a_stream_is_stepped(runner: InferenceRunner[Model], ways: list[str]) -> None:
    """The items before it arrive, then the error."""
    for number, way in enumerate(ways, 1):
        for interleave in (False, True):
            found = []
            with pytest.raises(WorkerCrashed):
                async for item in runner.stream(crashes.die_midway, way, interleave=interleave):
                    found.append(item)
            assert found == [1]
            assert await runner.run(functions.echo, 1) == 1
        assert runner.statistics().restarts == 2 * number


async def test_while_streams_are_suspended(
    runner: InferenceRunner[Model], ways: list[str]
) -> None:
    """They go with the process, each with an error of its own; the crash counts once."""
    for number, way in enumerate(ways, 1):
        streams = [
            runner.stream(runner.model.generate, 100, buffer=2, interleave=True) for _ in range(2)
        ]
        for stream in streams:
            assert await anext(stream) == 0
        await crashed(runner, crashes.die, way)
        for stream in streams:
            with pytest.raises(WorkerCrashed):
                async for _ in stream:
                    pass
        assert runner.statistics().restarts == number


async def test_idle_with_a_suspended_stream(runner: InferenceRunner[Model], make: Makers) -> None:
    """A stream between two items is told although nothing runs."""
    source = make.source()
    stream = runner.stream(source, buffer=2, interleave=True)
    await until(lambda: source.made == 2)
    process, _ = await runner.run(functions.where)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(WorkerCrashed):
        async for _ in stream:
            pass
    assert await runner.run(functions.echo, 1) == 1


async def test_in_a_batch(runner: InferenceRunner[Model], ways: list[str], make: Makers) -> None:
    """Everybody in it is told, and it is not run again in halves; who waits is served."""
    for way in ways:
        gate, found = make.gate(), list[Any]()
        batcher: Batcher[int, int] = Batcher(runner, partial(crashes.die_among, way), max_size=4)

        async def call(item: int) -> None:
            try:
                found.append(await batcher.run(item))  # noqa: B023  # it ends within the loop
            except WorkerCrashed:
                found.append("crashed")  # noqa: B023

        restarts = runner.statistics().restarts
        runner.submit(gate, None)
        await gate.entered.set_async()
        async with anyio.create_task_group() as tasks:
            for count, item in enumerate((1, -1, 2), 1):
                tasks.start_soon(call, item)
                await until(lambda count=count: runner.statistics().queued == count)  # type: ignore[misc]
            gate.release.set()
        assert found == ["crashed"] * 3
        assert await batcher.run(4) == 4
        assert runner.statistics().restarts == restarts + 1


async def test_while_nobody_waits_any_more(
    runner: InferenceRunner[Model], gate: RemoteGate
) -> None:
    """A crash in a call whose caller has left is counted, and is nobody's error."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runner.run, gate, None)
        await gate.entered.set_async()
        tasks.cancel_scope.cancel()
    process = child_of_this()
    os.kill(process, signal.SIGKILL)
    assert await runner.run(functions.echo, 1) == 1
    now = runner.statistics()
    assert (now.cancelled, now.failed, now.restarts) == (1, 0, 1)


def text_of(error: BaseException) -> str:
    """The whole traceback, causes and notes included, as a log would have it."""
    return "".join(traceback.format_exception(error))


def child_of_this() -> int:
    """The one child process there is."""
    (child,) = psutil.Process().children()
    return int(child.pid)


# -- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
async def test_while_loading(make_worker: Callable[..., Worker], make: Makers, way: str) -> None:
    """``start`` fails, and says how the process ended; the next one may succeed."""
    load = partial(crashes.die_at_load, make.log(), (1,), way)
    runner = InferenceRunner(load, worker=make_worker())
    with pytest.raises(WorkerCrashed) as caught:
        await runner.start()
    assert "die_at_load" in str(caught.value) or "load" in str(caught.value)
    with pytest.raises(NotReady):
        await runner.run(functions.echo, 1)
    await runner.start()
    assert await runner.run(functions.echo, 1) == 1
    await runner.aclose()


async def test_while_loading_again(make_worker: Callable[..., Worker], make: Makers) -> None:
    """Waiting calls go on waiting until a load succeeds."""
    log = make.log()
    load = partial(crashes.die_at_load, log, (2, 3), "kill")
    with InferenceRunner(load, worker=make_worker(restart=OFTEN)) as runner:
        await runner.start()
        future = runner.submit(crashes.die, "exit")
        assert await runner.run(functions.echo, 1) == 1
        assert isinstance(future.exception(0), WorkerCrashed)
        assert len(log.lines) == 4


async def test_stopping_while_it_is_down(make_worker: Callable[..., Worker], make: Makers) -> None:
    """A runner that waits to restart is stopped at once, and who waits for it is sent away."""
    policy = RestartPolicy(max_restarts=100, backoff=LIMIT * 100, max_backoff=LIMIT * 100)
    runner = InferenceRunner(Model, worker=make_worker(restart=policy))
    await runner.start()
    for number in range(2):
        with pytest.raises(WorkerCrashed):
            await runner.run(crashes.die, "kill", number)
    waiting = runner.submit(functions.echo, 1)
    await some_turns()
    with anyio.fail_after(LIMIT):
        await runner.aclose(grace=0.05)
    assert waiting.exception(0) is not None
    runner.shutdown()
    assert runner.statistics().state == "closed"


# -- standing still ----------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["running", "reading", "writing", "stream"])
async def test_a_process_that_stands_still(
    make_worker: Callable[..., Worker], moment: str
) -> None:
    """``hard_timeout`` ends it, and the call as late as that; the next call runs."""
    worker = make_worker(hard_timeout=0.4, restart=OFTEN)
    with InferenceRunner(Model, worker=worker) as runner:
        await runner.start()
        if moment == "stream":
            stream = runner.stream(crashes.die_midway, "freeze")
            assert await anext(stream) == 1
            with pytest.raises(DeadlineExceeded, match="hard_timeout"):
                await anext(stream)
        else:
            error = await crashed(runner, *FROZEN[moment])
            assert isinstance(error, DeadlineExceeded)
            assert error.started
            assert "hard_timeout" in str(error)
        assert await runner.run(functions.echo, 1) == 1
        assert runner.statistics().restarts == 1


FROZEN: dict[str, tuple[Any, ...]] = {
    "running": (crashes.die, "freeze"),
    "reading": (functions.echo, crashes.DiesWhenUnpickled("freeze")),
    "writing": (crashes.make, crashes.DiesWhenPickled, "freeze"),
}


async def test_a_process_that_stands_still_while_loading(
    make_worker: Callable[..., Worker], make: Makers
) -> None:
    """``startup_timeout`` ends it."""
    load = partial(crashes.die_at_load, make.log(), (1,), "freeze")
    runner = InferenceRunner(load, worker=make_worker(startup_timeout=0.5))
    with pytest.raises(NotReady, match="startup_timeout"):
        await runner.start()
    await runner.aclose()


async def test_a_process_that_stands_still_when_its_runner_stops(
    make_worker: Callable[..., Worker],
) -> None:
    """It is killed once the grace is over."""
    runner = InferenceRunner(Model, worker=make_worker())
    await runner.start()
    future = runner.submit(crashes.die, "freeze")
    child = psutil.Process(child_of_this())
    await until(lambda: child.status() == psutil.STATUS_STOPPED)
    await runner.aclose(grace=0.01)
    assert future.exception(0) is not None
    runner.shutdown()
    assert not child.is_running()


# -- no crash at all ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        ((functions.echo, crashes.FailsWhenPickled()), LookupError),
        ((functions.echo, crashes.FailsWhenUnpickled()), LookupError),
        ((crashes.make, crashes.FailsWhenPickled), LookupError),
        ((crashes.make, crashes.FailsWhenUnpickled), LookupError),
        ((functions.echo, crashes.ExitsWhenPickled()), CallFailed),
        ((functions.echo, crashes.ExitsWhenUnpickled()), CallFailed),
        ((crashes.make, crashes.ExitsWhenPickled), CallFailed),
        ((crashes.make, crashes.ExitsWhenUnpickled), CallFailed),
    ],
    ids=[
        f"{how}-{where}"
        for how in ("fails", "exits")
        for where in ("argument-here", "argument-there", "result-there", "result-here")
    ],
)
async def test_what_fails_on_its_way(
    runner: InferenceRunner[Model], work: tuple[Any, ...], kind: type[Exception]
) -> None:
    """What can't be written or read is its own call's error: nothing has crashed."""
    process, _ = await runner.run(functions.where)
    with pytest.raises(Exception) as caught:
        await runner.run(*work)
    assert isinstance(caught.value, kind | TypeError)
    assert kind.__name__ in text_of(caught.value)
    assert (await runner.run(functions.where))[0] == process
    assert runner.statistics().restarts == 0


async def test_last_words(
    runner: InferenceRunner[Model], caplog: pytest.LogCaptureFixture
) -> None:
    """What a process says before it dies is in the error and in the log."""
    error = await crashed(runner, crashes.last_words)
    assert "something to say before the end" in text_of(error)
    assert "something to say before the end" in caplog.text


async def test_nothing_has_a_name(runner: InferenceRunner[Model]) -> None:
    """Shared memory has no name on either side: a crash can leave none in ``/dev/shm``."""
    kept = await runner.run(functions.echo, np.ones(10**6))
    for maps in (crashes.maps(), await runner.run(crashes.maps)):
        assert "memfd:asgi_infer" in maps
        assert "/dev/shm/" not in maps
    del kept


async def test_no_resource_tracker(runner: InferenceRunner[Model]) -> None:
    """Neither this process nor the child's has one started: there is nothing to warn of."""
    child = psutil.Process(child_of_this())
    assert child.children() == []
    assert "multiprocessing.resource_tracker" not in await runner.run(crashes.modules)


# -- too often ---------------------------------------------------------------------------------


async def test_too_many_crashes(make_worker: Callable[..., Worker]) -> None:
    """The runner is broken: ``NotReady`` at once for everybody. Then it is tried again."""
    policy = RestartPolicy(max_restarts=2, backoff=0.0, recover_after=0.3)
    with InferenceRunner(Model, worker=make_worker(restart=policy)) as runner:
        await runner.start()
        for number in range(3):
            with pytest.raises(WorkerCrashed):
                await runner.run(crashes.die, "kill", number)
        await until(lambda: runner.statistics().state == "broken")
        with pytest.raises(NotReady) as caught:
            await runner.run(functions.echo, 1)
        assert caught.value.status_code == 503
        assert caught.value.retry_after is not None
        await until(lambda: runner.statistics().state == "ready")
        assert await runner.run(functions.echo, 1) == 1
        assert runner.statistics().restarts == 3


async def test_retry(make_worker: Callable[..., Worker], make: Makers) -> None:
    """With ``retry_crashed`` a call is run once more, and no more than that."""
    worker = make_worker(retry_crashed=True, restart=OFTEN)
    log = make.log()
    with InferenceRunner(Model, worker=worker) as runner:
        await runner.start()
        assert await runner.run(crashes.note_and_die, log, 2) == 2
        assert len(log.lines) == 2
        with pytest.raises(WorkerCrashed):
            await runner.run(crashes.note_and_die, log)
        assert len(log.lines) == 4
        await until(lambda: runner.statistics().restarts == 3)


async def test_a_call_that_crashes_everything(runner: InferenceRunner[Model]) -> None:
    """It is not run a third time, and others with other arguments are."""
    for _ in range(2):
        await crashed(runner, crashes.die, "kill", 1)
    with pytest.raises(WorkerCrashed, match="is not run again"):
        await runner.run(crashes.die, "kill", 1)
    assert runner.statistics().restarts == 2
    await crashed(runner, crashes.die, "kill", 2)


async def test_a_call_that_pickles_only_once(runner: InferenceRunner[Model]) -> None:
    """Its crash is its own, and the next call runs: it need not be remembered."""
    for _ in range(3):
        await crashed(runner, crashes.die_of, crashes.Once("kill"))


# -- again and again ---------------------------------------------------------------------------


def held() -> tuple[int, int]:
    """How many descriptors and children this process has."""
    return len(os.listdir("/proc/self/fd")), len(psutil.Process().children())


@pytest.mark.parametrize("cycles", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_start_and_stop(make_worker: Callable[..., Worker], cycles: int) -> None:
    """Starting and stopping leaves nothing, and does not grow."""
    before = held()
    for _ in range(cycles):
        with InferenceRunner(Model, worker=make_worker()) as runner:
            assert runner.submit(functions.echo, b"x" * 300_000).result(LIMIT)
    until_true(lambda: held() == before)


@pytest.mark.parametrize("cycles", [5, pytest.param(100, marks=pytest.mark.soak)])
def test_crash_and_restart(runner: InferenceRunner[Model], cycles: int) -> None:
    """Crashing and restarting leaves nothing, and does not grow."""
    assert runner.submit(functions.echo, b"x" * 300_000).result(LIMIT)
    before = held()
    for number in range(cycles):
        error = runner.submit(crashes.die, list(WAYS)[number % 4], number).exception(LIMIT)
        assert isinstance(error, WorkerCrashed)
        assert runner.submit(functions.echo, b"x" * 300_000).result(LIMIT)
    until_true(lambda: held() == before)


@pytest.mark.soak
def test_the_news_of_a_crash(runner: InferenceRunner[Model]) -> None:
    """A caller knows of its process's death in no time: it is told, and not found out."""
    seconds = []
    for _ in range(20):
        process, _ = runner.submit(functions.where).result(LIMIT)
        future = runner.submit(time.sleep, 2 * LIMIT)
        while runner.statistics().running == 0:
            time.sleep(0.001)
        began = time.monotonic()
        os.kill(process, signal.SIGKILL)
        assert isinstance(future.exception(LIMIT), WorkerCrashed)
        seconds.append(time.monotonic() - began)
    assert sorted(seconds)[10] < 0.1, seconds


# -- processes that the model forks -------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
async def test_a_forked_process_that_comes_back(
    runner: InferenceRunner[Model], fails: bool
) -> None:
    """It is ended, and neither replies nor takes requests in the place of its parent."""
    assert await runner.run(partial(crashes.fork, fails=fails)) == "exit code 1"
    assert [await runner.run(abs, -n) for n in range(3)] == [0, 1, 2]
