"""Runners that share a model process: what one's calls, crash or end does to the other's."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from asgi_infer import DeadlineExceeded, Draining, InferenceRunner, WorkerCrashed
from asgi_infer.workers import SharedWorker

from ..gates import LIMIT
from ..polling import until_true

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="locks and sockets as on Linux")


class Model:
    """In a process of its own, with which a test speaks by files."""

    def pid(self) -> int:
        return os.getpid()

    def hold(self, path: str) -> int:
        """Tell that it has begun, and wait for the file to go."""
        file = Path(path)
        file.touch()
        end = time.monotonic() + LIMIT
        while file.exists() and time.monotonic() < end:
            time.sleep(0.001)
        return os.getpid()

    def count(self) -> Iterator[int]:
        yield from range(3)

    def say(self, what: str) -> None:
        print(what)
        print(what, file=sys.stderr)


def fail() -> Model:
    raise LookupError("no such file")


def crash() -> Model:
    os._exit(3)


@pytest.fixture
def base() -> Iterator[Path]:
    """Of a short path; empty at the end."""
    with tempfile.TemporaryDirectory(prefix="shared-") as directory:
        base = Path(directory, "base")
        yield base
        assert not base.exists() or list(base.iterdir()) == []


MakeRunner = Callable[..., InferenceRunner[Any]]


@pytest.fixture
def make_runner(base: Path) -> Iterator[MakeRunner]:
    """Runners that share a model, as those of several servers do. All are stopped at the end."""
    runners: list[InferenceRunner[Any]] = []

    def make(load: Any = Model, **options: Any) -> InferenceRunner[Any]:
        worker = SharedWorker(base, **options)
        runners.append(InferenceRunner(load, name="shared", worker=worker))
        return runners[-1]

    yield make
    for runner in runners:
        runner.shutdown()


def call(runner: InferenceRunner[Any], func: Any, *args: object) -> Any:
    return runner.submit(func, *args).result(LIMIT)


def hold(runner: InferenceRunner[Any], path: Path) -> Future[int]:
    """A call that runs."""
    future = runner.submit(runner.model.hold, str(path))
    until_true(path.exists)
    return future


def test_one_model_process(make_runner: MakeRunner, base: Path) -> None:
    """Both runners' calls are run by one process, which is gone when both have stopped."""
    first, second = make_runner(), make_runner()
    pids = {call(runner, runner.model.pid) for runner in (first, second, first)}
    assert len(pids) == 1
    assert os.getpid() not in pids
    first.shutdown()
    assert call(second, second.model.pid) in pids
    second.shutdown()
    assert list(base.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pids.pop(), 0)


def test_death_takes_what_ran_and_nothing_else(make_runner: MakeRunner, tmp_path: Path) -> None:
    """The call that ran gets an error; that which another server had sent, and which had not
    begun, is run by the next process, and so are those that were waiting."""
    first, second = make_runner(), make_runner()
    pid = call(first, first.model.pid)
    assert call(second, second.model.pid) == pid
    running = hold(first, tmp_path / "held")
    sent = second.submit(second.model.pid)
    until_true(lambda: second.statistics().running == 1)
    waiting = [runner.submit(runner.model.pid) for runner in (first, second)]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerCrashed, match=r"SIGKILL|the log of the server process"):
        running.result(LIMIT)
    after = {future.result(LIMIT) for future in (sent, *waiting)}
    assert len(after) == 1
    assert pid not in after


def test_starter_leaves(make_runner: MakeRunner, caplog: pytest.LogCaptureFixture) -> None:
    """The log of the model process is its starter's; when that has left, it prints to nowhere."""
    caplog.set_level(logging.INFO)
    first, second = make_runner(), make_runner()
    pid = call(first, first.model.pid)
    call(second, second.model.say, "heard")
    until_true(lambda: caplog.messages.count("shared: heard") == 2)
    first.shutdown()
    call(second, second.model.say, "unheard")
    call(second, second.model.say, "unheard")
    assert call(second, second.model.pid) == pid


def test_hard_timeout_is_for_what_runs(make_runner: MakeRunner, tmp_path: Path) -> None:
    """Time in which another server's call ran does not count; a call that overruns is killed."""
    first, second = make_runner(), make_runner(hard_timeout=0.05)
    pid = call(first, first.model.pid)
    assert call(second, second.model.pid) == pid
    running = hold(first, tmp_path / "held")
    waiting = second.submit(second.model.pid)
    with pytest.raises(TimeoutError):
        waiting.result(0.12)
    (tmp_path / "held").unlink()
    assert running.result(LIMIT) == waiting.result(LIMIT) == pid
    with pytest.raises(DeadlineExceeded, match="ran for longer than hard_timeout"):
        hold(second, tmp_path / "held").result(LIMIT)
    assert call(first, first.model.pid) == call(second, second.model.pid) != pid


def stop_now(runner: InferenceRunner[Any]) -> None:
    """Stop it in the midst of a call."""
    asyncio.run(runner.aclose(grace=0.0))
    runner.shutdown()  # waits for its thread


def test_last_one_out_ends_what_runs(make_runner: MakeRunner, tmp_path: Path) -> None:
    """A runner that is stopped in a call leaves others the model, and the last one kills it."""
    first, second = make_runner(), make_runner()
    pid = call(second, second.model.pid)
    running = hold(first, tmp_path / "held")
    stop_now(first)
    with pytest.raises(Draining):
        running.result(LIMIT)
    (tmp_path / "held").unlink()
    assert call(second, second.model.pid) == pid
    hold(second, tmp_path / "held")
    stop_now(second)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_late_calls_are_skipped(make_runner: MakeRunner, tmp_path: Path) -> None:
    """A call whose time is up before its turn at the model does not run."""
    first, second = make_runner(), make_runner()
    call(second, second.model.pid)
    running = hold(first, tmp_path / "held")

    async def expire() -> None:
        with pytest.raises(DeadlineExceeded):
            await second.run(second.model.hold, str(tmp_path / "never"), timeout=0.02)

    asyncio.run(expire())
    (tmp_path / "held").unlink()
    running.result(LIMIT)
    call(second, second.model.pid)
    assert not (tmp_path / "never").exists()


def test_streams(make_runner: MakeRunner) -> None:
    """A stream runs to its end, whether it lets others run between two items or not."""
    runner = make_runner()

    async def read(interleave: bool) -> list[int]:
        async with runner.stream(runner.model.count, interleave=interleave) as stream:
            return [item async for item in stream]

    assert asyncio.run(read(True)) == asyncio.run(read(False)) == [0, 1, 2]


def test_load_that_fails(make_runner: MakeRunner) -> None:
    """All servers are told why."""
    for runner in (make_runner(fail), make_runner(fail)):
        with pytest.raises(LookupError, match="no such file"):
            asyncio.run(runner.start())


def test_load_that_crashes(make_runner: MakeRunner) -> None:
    """Whoever started the process tells how it ended; others start it themselves, in vain."""
    runners = [make_runner(crash), make_runner(crash)]

    async def start_both() -> list[BaseException | None]:
        starts = [runner.start() for runner in runners]
        return await asyncio.gather(*starts, return_exceptions=True)

    for error in asyncio.run(start_both()):
        assert isinstance(error, WorkerCrashed)
        assert "ended with exit code 3 while it loaded" in str(error)


def test_directory_is_too_long(tmp_path: Path) -> None:
    """That is said when the worker is made, and not when the server starts."""
    with pytest.raises(ValueError, match="pass SharedWorker"):
        SharedWorker(tmp_path / ("x" * 100))
