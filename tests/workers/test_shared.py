"""Runners that share a model process: what one's calls, crash or end does to the other's."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import pytest

from asgi_infer import (
    DeadlineExceeded,
    Draining,
    InferenceRunner,
    NativePolicy,
    NotReady,
    WorkerCrashed,
)
from asgi_infer.native import processes
from asgi_infer.workers import SharedWorker, shared
from asgi_infer.workers._protocol import ModelSpec
from asgi_infer.workers._rendezvous import Claim, Presence, Rendezvous
from asgi_infer.workers.shared import SharedLink

from ..gates import LIMIT
from ..polling import until_true
from .shared_models import Model, crash, fail, sleep

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="locks and sockets as on Linux")


SPEC = ModelSpec(name="shared", load=Model, warmup=None, native=NativePolicy(nice=0))


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


def test_startup_timeout(make_runner: MakeRunner) -> None:
    """A model that takes too long to load is given up, and its process ended."""
    runner = make_runner(sleep, startup_timeout=0.05)
    with pytest.raises(NotReady, match=r"did not load in 0\.05 s"):
        asyncio.run(runner.start())


def test_what_does_not_pickle(make_runner: MakeRunner, base: Path) -> None:
    """A ``load`` that can't be sent leaves no process behind."""
    with pytest.raises(Exception, match="pickle"):
        asyncio.run(make_runner(lambda: Model()).start())
    assert list(base.iterdir()) == []


# -- one server's side -------------------------------------------------------------------------


class FakeChild:
    """A model process that does nothing, in this process."""

    made: ClassVar[list[FakeChild]] = []

    def __init__(self, *, fds: tuple[int, int], **options: object) -> None:
        self.claim: Claim | None = Claim.inherited(*map(os.dup, fds))
        self.calls: list[str] = []
        self.log_fds = ()
        self.last_words = ""
        self.sentinel, self._end = os.pipe()
        FakeChild.made.append(self)

    @property
    def ended(self) -> bool:
        return self.claim is None

    def ends_within(self, seconds: float) -> bool:
        self.calls.append("waited for")
        self.coming()
        return self.claim is None

    def coming(self) -> None:
        """What happens meanwhile."""

    def interrupt(self) -> None:
        self.calls.append("killed")
        if self.claim is not None:
            self.claim.close()
        self.claim = None

    def dump(self) -> None:
        self.calls.append("dumped")

    def pump(self) -> None:
        self.calls.append("pumped")

    def died(self) -> str:
        return "died"

    def detach(self) -> None:
        self.calls.append("detached")
        self.close()

    def close(self) -> None:
        os.close(self._end)
        os.close(self.sentinel)
        self.sentinel = -1


@pytest.fixture
def rendezvous(base: Path) -> Rendezvous:
    return Rendezvous(base, "0" * 16)


@pytest.fixture
def fake(rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeChild]]:
    """The processes that were started."""
    monkeypatch.setattr(shared, "Child", FakeChild)
    monkeypatch.setattr(shared, "_STEP", 0.0)
    monkeypatch.setattr(shared, "_PATIENCE", 0.0)
    yield FakeChild.made
    for child in FakeChild.made:
        child.interrupt()
    FakeChild.made.clear()
    rendezvous.tidy()


def test_process_that_does_not_end(
    rendezvous: Rendezvous, fake: list[FakeChild], caplog: pytest.LogCaptureFixture
) -> None:
    """The last server to leave gives it some time, and then kills it."""
    SharedLink(SPEC, rendezvous).close()
    assert "did not end within 0 s of its last server, and is killed" in caplog.text
    assert "killed" in fake[0].calls


def test_process_that_takes_its_time(
    rendezvous: Rendezvous, fake: list[FakeChild], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as its time is not up, it is waited for again, and not killed."""
    monkeypatch.setattr(shared, "_PATIENCE", LIMIT)
    link = SharedLink(SPEC, rendezvous)
    child = fake[0]

    def end_later() -> None:
        if child.calls.count("waited for") == 2 and child.claim is not None:
            child.claim.close()
            child.claim = None

    monkeypatch.setattr(child, "coming", end_later)
    link.close()
    assert "killed" not in child.calls


def test_somebody_comes_as_the_last_leaves(
    rendezvous: Rendezvous, fake: list[FakeChild], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then that one has the model, and nothing is ended."""
    leaving = SharedLink(SPEC, rendezvous)
    coming: list[SharedLink] = []

    def come() -> None:
        if not coming:
            coming.append(SharedLink(SPEC, rendezvous))

    monkeypatch.setattr(fake[0], "coming", come)
    leaving.close()
    assert "killed" not in fake[0].calls
    assert "detached" in fake[0].calls
    coming[0].close()


def test_others_remain(rendezvous: Rendezvous, fake: list[FakeChild]) -> None:
    """A server that gives up leaves the process to others, and lets it know that it has left."""
    starter = SharedLink(SPEC, rendezvous)
    other = SharedLink(SPEC, rendezvous)
    assert (starter.starter, other.starter) == (True, False)
    starter.page.started = 7
    starter.kill()
    assert starter.page.cancelled == 7
    starter.close()
    assert fake[0].calls[-1] == "detached"
    assert other.died().startswith("has died (how, the log")
    other.kill()  # the last, which does not know the process
    other.close()


def test_last_one_ends_what_never_answered(rendezvous: Rendezvous, fake: list[FakeChild]) -> None:
    """The starter of a process that hangs while it loads has gone: the last server that waits for
    it finds out which it is."""
    starter, other = SharedLink(SPEC, rendezvous), SharedLink(SPEC, rendezvous)
    with subprocess.Popen(["sleep", "60"]) as process:
        signature = f"{process.pid} {processes.start_time(process.pid)}"
        (rendezvous.directory / "servers").write_text(signature)
        starter.close()
        assert process.poll() is None
        other.kill()
        assert process.wait(LIMIT) == -signal.SIGKILL
    other.close()


def test_what_is_condemned_is_killed(rendezvous: Rendezvous, fake: list[FakeChild]) -> None:
    """Whoever else uses it."""
    starter, other = SharedLink(SPEC, rendezvous), SharedLink(SPEC, rendezvous)
    starter.condemned = True
    starter.dump()
    starter.kill()
    assert [each for each in fake[0].calls if "ed for" not in each] == ["dumped", "killed"]
    starter.close()
    other.close()


def test_process_is_known_by_its_descriptor(rendezvous: Rendezvous, fake: list[FakeChild]) -> None:
    """A server that has not started it watches it as soon as it has loaded."""
    starter, other = SharedLink(SPEC, rendezvous), SharedLink(SPEC, rendezvous)
    assert list(other.watched) == []
    assert other.attend()
    with subprocess.Popen(["sleep", "60"]) as process:
        other.page.pid = process.pid
        other.loaded()
        assert list(other.watched) == []  # of that number, but not the one that is meant
        other.page.born = processes.start_time(process.pid)
        other.loaded()
        assert len(other.watched) == 1
        assert other.attend()
        other.condemned = True
        other.kill()
        process.wait()
        assert not other.attend()
        other.dump()  # too late, which does no harm
    assert other.last_words == ""
    other.close()
    starter.close()


def test_process_that_dies_as_it_has_loaded(rendezvous: Rendezvous, fake: list[FakeChild]) -> None:
    """There is nothing to watch then; the connection ends."""
    starter, other = SharedLink(SPEC, rendezvous), SharedLink(SPEC, rendezvous)
    other.page.pid = 2**22 + 1
    other.loaded()
    assert list(other.watched) == []
    starter.close()
    other.close()


def test_forked_child_lets_go(rendezvous: Rendezvous, fake: list[FakeChild]) -> None:
    """In a forked child the connection is closed, and the share of the lock is not given up."""
    link = SharedLink(SPEC, rendezvous)
    child = os.fork()
    if child == 0:
        link.leave_behind()
        os._exit(0)
    os.waitpid(child, 0)
    assert not Presence(rendezvous.directory).leave()
    link.close()


def test_gate_that_is_held_up(
    rendezvous: Rendezvous,
    fake: list[FakeChild],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A server that can't tell whether it is the last leaves the process alone."""

    def leave(presence: Presence) -> bool:
        presence.close()
        raise TimeoutError("held")

    link = SharedLink(SPEC, rendezvous)
    monkeypatch.setattr(Presence, "leave", leave)
    link.close()
    assert "could not tell whether others use the model: held" in caplog.text
    assert "killed" not in fake[0].calls


def test_files_that_are_gone(rendezvous: Rendezvous, fake: list[FakeChild]) -> None:
    """Somebody has removed them: no one else can come, and the process is to end."""
    link = SharedLink(SPEC, rendezvous)
    shutil.rmtree(rendezvous.directory)
    assert link._still_last()
    link.close()


def test_start_that_fails(
    rendezvous: Rendezvous, fake: list[FakeChild], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes through, and the next server may try."""

    def no_process(**options: object) -> FakeChild:
        raise OSError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(shared, "Child", no_process)
        with pytest.raises(OSError, match="no memory"):
            SharedLink(SPEC, rendezvous)
    assert list(rendezvous.base.iterdir()) == []
    SharedLink(SPEC, rendezvous).close()
