"""The Ray worker, on a real cluster of this machine: two replicas, and what kills them."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import numpy as np
import psutil
import pytest

from asgi_infer import (
    Batcher,
    CallCancelled,
    CallFailed,
    DeadlineExceeded,
    InferenceRunner,
    NativePolicy,
    NotReady,
    WorkerCrashed,
    check_cancelled,
)
from asgi_infer._model import ModelReference
from asgi_infer.workers import RayWorker, RestartPolicy
from asgi_infer.workers._channel import Kind
from asgi_infer.workers._protocol import ModelSpec

from ..conftest import BACKENDS
from ..polling import until, until_true
from . import functions
from .functions import Model, PlainError
from .ray_cluster import cluster
from .remote_gates import Makers

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(120),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]

SMALL = {"num_cpus": 0.1}
"""Several actors at once fit on two CPUs."""


@pytest.fixture
def anyio_backend() -> Any:
    """One loop: what happens on it has tests of its own."""
    return BACKENDS["asyncio"]


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Instead of the check of the other tests: Ray opens and closes things when it likes. Of what
    is ours, threads are counted, and actors, which are seen by their processes."""
    threads, actors = threading.active_count(), len(hosts())
    yield
    until_true(lambda: threading.active_count() <= threads)
    until_true(lambda: len(hosts()) <= actors)


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[Any]:
    """The cluster for all tests; what it starts has ended with it."""
    before = alive()
    with cluster():
        yield sys.modules["ray"]
    until_true(lambda: not alive() - before)


def alive() -> set[psutil.Process]:
    """All processes that this one has started, and those that they have, but for dead ones."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def replica_of(runner: InferenceRunner[Any]) -> Any:
    """The runner's end of its actor."""
    thread: Any = runner._thread
    return thread._replicas[0]


def hosts() -> set[psutil.Process]:
    """The processes of the actors."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any("RayHost" in part for part in process.cmdline()):
                found.add(process)
    return found


@pytest.fixture(scope="module")
def started(ray: Any) -> Iterator[InferenceRunner[Model]]:
    """Two replicas, for all tests that leave them alive."""
    with InferenceRunner(Model, worker=RayWorker(2, options=SMALL)) as runner:
        anyio.run(runner.start)
        yield runner


@pytest.fixture
def runner(started: InferenceRunner[Model]) -> Iterator[InferenceRunner[Model]]:
    """In the end nothing waits or runs, and its books balance."""
    yield started
    until_true(lambda: started.statistics().running == 0)
    now = started.statistics()
    assert now.submitted == now.completed + now.failed + now.cancelled + now.expired
    assert (now.state, now.restarts) == ("ready", 0)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Makers]:
    """Makes gates that work across processes; they are released in the end."""
    makers = Makers(tmp_path)
    yield makers
    makers.release()
    makers.close()


@pytest.fixture(scope="module")
def mortal(ray: Any) -> Iterator[InferenceRunner[Model]]:
    """One replica, for tests that kill it, and wait for the next: each start takes a second."""
    restart = RestartPolicy(max_restarts=99, backoff=0.0)
    worker = RayWorker(options=SMALL, hard_timeout=1.0, restart=restart)
    with InferenceRunner(Model, worker=worker) as runner:
        anyio.run(runner.start)
        yield runner


# -- where it runs -----------------------------------------------------------------------------


def test_loopback_only(runner: InferenceRunner[Model]) -> None:
    """Neither this process, nor Ray's, nor the actors listen on any other address."""
    anyio.run(runner.run, functions.where)
    listening = set()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.Error):
            listening |= {
                each.laddr.ip
                for each in process.net_connections("inet")
                if each.status == psutil.CONN_LISTEN
            }
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


async def test_two_replicas(runner: InferenceRunner[Model], make: Makers) -> None:
    """Two calls run at once, each in a process of its own, on the main thread of that."""
    gates = [make.gate(), make.gate()]
    held = [runner.submit(partial(functions.apply, gate), None) for gate in gates]
    for gate in gates:
        await gate.entered.set_async()
    assert runner.statistics().running == 2
    for gate in gates:
        gate.release.set()
    for future in held:
        await asyncio.wrap_future(future)
    places = {await runner.run(functions.born, runner.model) for _ in range(2)}
    for process, thread in places:
        assert process == thread != os.getpid()


def test_reservation_follows_the_policy() -> None:
    """Unless they are told otherwise, actors reserve a CPU for each native thread."""
    from asgi_infer.workers._ray_replica import actor_options

    spec = ModelSpec(name="m", load=Model, warmup=None, native=NativePolicy(threads=3))
    assert actor_options(spec, RayWorker())["num_cpus"] == 3
    assert actor_options(spec, RayWorker(options={"num_cpus": 1}))["num_cpus"] == 1
    plain = ModelSpec(name="m", load=Model, warmup=None, native=NativePolicy())
    assert "num_cpus" not in actor_options(plain, RayWorker())


# -- what crosses ------------------------------------------------------------------------------


async def test_arrays(runner: InferenceRunner[Model]) -> None:
    """They arrive as they were, and read-only, whether small or in the object store."""
    for size in (3, 10**6):
        array = np.arange(float(size))
        result = await runner.run(functions.echo, {"items": [array]})
        (returned,) = result["items"]
        np.testing.assert_array_equal(returned, array)
        assert not returned.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            await runner.run(functions.fill, array)


async def test_functions(runner: InferenceRunner[Model]) -> None:
    """Lambdas and closures work, references in arguments and partials, and what they return."""
    five = 5
    model = runner.model
    assert await runner.run(lambda number: number + five, 1) == 6
    assert await runner.run(lambda model, n: model.add(n, five), model, 2) == 7
    assert await runner.run(partial(model.add, right=3), 1) == 4
    assert await runner.run(model.part.triple, 4) == 12
    assert await runner.run(lambda: "none") == "none"
    returned = await runner.run(functions.make_lambda)
    assert returned() is None


async def test_foreign_reference(runner: InferenceRunner[Model]) -> None:
    """A reference to the model of another runner is refused, as with a thread."""
    other = InferenceRunner(Model)
    with pytest.raises(ValueError, match="belongs to another runner"):
        await runner.run(functions.echo, other.model)


class NeverThere:
    """Pickles, and fails where it is unpickled."""

    def __reduce__(self) -> Any:
        return functions.fail_plain, ()


async def test_what_does_not_cross(runner: InferenceRunner[Model]) -> None:
    """Arguments and results that do not pickle or unpickle are errors of their call."""
    with pytest.raises(TypeError, match="can't be sent to the process of the model") as caught:
        await runner.run(functions.echo, threading.Lock())
    assert "no lambda" not in str(caught.value)  # they are fine here
    with pytest.raises(TypeError, match="the result, a lock, can't be sent"):
        await runner.run(lambda: threading.Lock())
    with pytest.raises(PlainError):
        await runner.run(functions.echo, NeverThere())


async def test_errors(runner: InferenceRunner[Model]) -> None:
    """They arrive as themselves, with the traceback of the actor; so do those of other kinds."""
    with pytest.raises(PlainError) as caught:
        await runner.run(functions.fail_plain)
    assert caught.value.args == ("plain", 5)
    assert "in fail_plain" in str(caught.value.__cause__)
    with pytest.raises(CallFailed) as failed:
        await runner.run(functions.end, SystemExit)
    assert isinstance(failed.value.__cause__, SystemExit)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await runner.run(functions.end, StopIteration)


# -- streams and batches -----------------------------------------------------------------------


@pytest.mark.parametrize("interleave", [False, True])
async def test_streams(runner: InferenceRunner[Model], interleave: bool) -> None:
    """The generator stays in its actor, and is stepped and closed there."""
    stream = runner.stream(runner.model.generate, 3, interleave=interleave)
    assert [item async for item in stream] == [0, 1, 2]
    with pytest.raises(PlainError):
        async for _ in runner.stream(functions.fail_midway, 2, interleave=interleave):
            pass
    places = [place async for place in runner.stream(functions.step_where, 3)]
    assert len(set(places)) == 1


def remember_the_end(ended: Any) -> Iterator[int]:
    try:
        yield from range(100)
    finally:
        ended.set()


async def test_closed_stream(runner: InferenceRunner[Model], make: Makers) -> None:
    """When the consumer leaves, the generator's ``finally`` blocks run in the actor."""
    ended = make.event()
    async with runner.stream(remember_the_end, ended, buffer=2) as stream:
        assert await anext(stream) == 0
    await ended.set_async()


async def test_batches(runner: InferenceRunner[Model]) -> None:
    """Calls that wait run together, in one actor."""
    double = Batcher(runner, runner.model.double, max_size=8)
    assert await asyncio.gather(*map(double.run, range(10))) == [2 * n for n in range(10)]
    results = await asyncio.gather(*map(double.run, [1, -1, 2]), return_exceptions=True)
    assert (results[0], results[2]) == (2, 4)
    assert isinstance(results[1], ValueError)


# -- callers who leave -------------------------------------------------------------------------


async def test_cancelled(runner: InferenceRunner[Model], make: Makers) -> None:
    """``check_cancelled()`` raises in the actor when the caller has left."""
    gate, noticed = make.gate(), make.event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runner.run, functions.ask_until_late, noticed)
        tasks.start_soon(runner.run, partial(functions.notice, gate, noticed))
        await gate.entered.set_async()
        await until(lambda: runner.statistics().running == 2)
        tasks.cancel_scope.cancel()
    gate.release.set()
    await noticed.set_async()
    await runner.wait_idle()


async def test_deadline(runner: InferenceRunner[Model], make: Makers) -> None:
    """The actor knows how much time is left: it stops by itself."""
    noticed = make.event()
    with pytest.raises(DeadlineExceeded):
        await runner.run(functions.ask_until_late, noticed, timeout=0.1)
    await noticed.set_async()


# -- actors that die ---------------------------------------------------------------------------


async def test_killed_while_it_ran(make: Makers, caplog: pytest.LogCaptureFixture) -> None:
    """The call in flight fails, what waits runs in a new actor, and the other replica goes on."""
    worker = RayWorker(2, options=SMALL, restart=RestartPolicy(backoff=0.0))
    gates = [make.gate(), make.gate()]
    others = hosts()
    async with InferenceRunner(Model, worker=worker) as runner:
        held = [runner.submit(partial(functions.apply, gate), None) for gate in gates]
        for gate in gates:
            await gate.entered.set_async()
        waiting = runner.submit(functions.where)
        victim = (hosts() - others).pop()
        victim.kill()
        with anyio.fail_after(20):
            pid, _ = await asyncio.wrap_future(waiting)
            for gate in gates:
                gate.release.set()
            outcomes = await asyncio.gather(
                *map(asyncio.wrap_future, held), return_exceptions=True
            )
            await until(lambda: runner.statistics().restarts == 1)
    assert pid != victim.pid
    assert sum(isinstance(outcome, WorkerCrashed) for outcome in outcomes) == 1
    (crash,) = [outcome for outcome in outcomes if isinstance(outcome, WorkerCrashed)]
    assert "has died (its worker process has died" in str(crash)
    assert "is there again, after" in caplog.text


async def test_killed_while_idle(
    mortal: InferenceRunner[Model], caplog: pytest.LogCaptureFixture
) -> None:
    """The next call is not lost: it is not sent to an actor that is known to be dead."""
    pid, _ = await mortal.run(functions.where)
    os.kill(pid, signal.SIGSEGV)
    await until(lambda: replica_of(mortal)._link.channel.gone)  # Ray has heard of it
    assert (await mortal.run(functions.where))[0] != pid
    assert mortal.statistics().failed == 0
    assert "has died while it was idle" in caplog.text


async def test_killed_between_two_steps(mortal: InferenceRunner[Model]) -> None:
    """A stream ends with its actor."""
    stream = mortal.stream(functions.step_where, 1000, interleave=True, buffer=1)
    pid, _ = await anext(stream)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerCrashed):
        async for _ in stream:
            pass
    assert await mortal.run(mortal.model.count) == 1


async def test_hard_timeout(mortal: InferenceRunner[Model], make: Makers) -> None:
    """A call that does not end is ended, with its actor."""
    with pytest.raises(DeadlineExceeded, match="hard_timeout"):
        await mortal.run(make.gate(), None)
    assert await mortal.run(mortal.model.count) == 1


async def test_stopped_while_a_call_runs(make: Makers) -> None:
    """The actor is killed when the grace is over: nothing runs on."""
    runner = InferenceRunner(Model, worker=RayWorker(options=SMALL))
    await runner.start()
    gate = make.gate()
    future = runner.submit(gate, None)
    await gate.entered.set_async()
    await runner.aclose(grace=0.0)
    assert future.exception() is not None
    until_true(lambda: not runner._thread._threads[0].is_alive())  # type: ignore[union-attr]


# -- starting ----------------------------------------------------------------------------------


async def test_model_that_does_not_load() -> None:
    """The error of ``load`` is raised by ``start``, with the actor's traceback."""
    worker = RayWorker(options=SMALL)
    runner = InferenceRunner(functions.load_nothing, worker=worker)
    with pytest.raises(PlainError) as caught:
        await runner.start()
    assert "in load_nothing" in str(caught.value.__cause__)


async def test_load_that_does_not_pickle() -> None:
    """The error of ``start`` says what does not."""
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"^load, warmup .*lock.* is to pickle"):
        await InferenceRunner(lambda: lock, worker=RayWorker(options=SMALL)).start()


async def test_no_room() -> None:
    """An actor for which there is no machine is waited for no longer than ``startup_timeout``."""
    worker = RayWorker(options={"num_cpus": 99}, startup_timeout=0.2)
    with pytest.raises(NotReady, match="startup_timeout"):
        await InferenceRunner(Model, worker=worker).start()


async def test_stopped_while_it_starts() -> None:
    """Whoever stops the runner does not wait for a place."""
    runner = InferenceRunner(Model, worker=RayWorker(options={"num_cpus": 99}))
    with pytest.raises(NotReady):
        await runner.start(timeout=0.1)
    assert runner._thread is not None
    until_true(lambda: runner._thread.done.done())  # type: ignore[union-attr]


async def test_no_cluster(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts a cluster whenever one is missing; the runner does not let it."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match=r"call ray\.init"):
        await InferenceRunner(Model, worker=RayWorker()).start()


def test_interrupted_early(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor that was not there yet when the runner stopped is ended as soon as it is."""
    spec = ModelSpec(name="m", load=Model, warmup=None, native=NativePolicy())
    replica = RayWorker(options={"num_cpus": 99}).replica(spec, 0)
    connect = replica._connect

    def stop_first() -> Any:
        replica.interrupt()
        return connect()

    monkeypatch.setattr(replica, "_connect", stop_first)
    with pytest.raises(NotReady, match="stopped while its model 'm' was loaded"):
        replica.open(lambda: None)
    assert not replica.wake_up.acquire()
    replica.close()


# -- the cluster goes --------------------------------------------------------------------------


class FakeActor:
    """An actor's handle, of a cluster that has gone or not."""

    def __init__(self, *, state: Any = 2, sends: bool = True) -> None:
        self._state = state
        self._sends = sends
        self.open = self.answer = SimpleNamespace(remote=self._remote)

    def _get_local_state(self) -> Any:
        if isinstance(self._state, Exception):
            raise self._state
        return self._state

    def _remote(self, parcel: Any) -> str:
        if not self._sends:
            raise RuntimeError("no such actor")
        return "reference"


@pytest.fixture
def channel_of() -> Iterator[Any]:
    """Makes channels to fake actors."""
    from asgi_infer.workers._ray_host import dumps
    from asgi_infer.workers._ray_replica import RayChannel

    spec = ModelSpec(name="m", load=None, warmup=None, native=NativePolicy())
    channels: list[RayChannel] = []

    def make(actor: FakeActor) -> RayChannel:
        channels.append(RayChannel(actor, dumps(None), spec))
        return channels[-1]

    yield make
    for channel in channels:
        channel.close()


def send(channel: Any, number: int = 1, kind: Kind = Kind.NEXT) -> None:
    channel.send(kind, None, number=number, deadline=None, stream=0)


def test_lost_connections(channel_of: Any) -> None:
    """What can't be sent has not begun."""
    for actor in (FakeActor(state=4), FakeActor(state=RuntimeError("not connected"))):
        channel = channel_of(actor)
        assert channel.gone
        with pytest.raises(OSError):
            send(channel)
        assert channel.started == 0
    actor = FakeActor()
    channel = channel_of(actor)
    actor._sends = False
    with pytest.raises(OSError):
        send(channel)
    assert channel.started == 0
    assert channel.how == "can't be reached (RuntimeError: no such actor)"


def test_shut_down_while_it_waits(
    channel_of: Any, ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray ends a wait with ``SystemExit`` when it is shut down: the model has gone, no more."""
    from asgi_infer.workers._remote import Died

    def shut_down(*_: Any, **__: Any) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(ray, "get", shut_down)
    channel = channel_of(FakeActor())
    send(channel)
    assert channel.started == 1
    with pytest.raises(Died):
        channel.receive(None)
    assert channel.how == "has died (the connection to the cluster was shut down)"


def test_who_left(channel_of: Any, ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is told of each request whose caller has left, before it was sent or after; never of
    one that closes something, which Ray would drop."""
    told: list[int] = []

    def cancel(reference: Any) -> None:
        told.append(channel._cancelled)
        raise ValueError("it has ended")

    monkeypatch.setattr(ray, "cancel", cancel)
    channel = channel_of(FakeActor())
    channel.cancelled = 1
    send(channel, 1)
    until_true(lambda: told == [1])
    send(channel, 2)
    channel.cancelled = 2
    until_true(lambda: told == [1, 2])
    send(channel, 3, Kind.CLOSE)
    channel.cancelled = 3
    assert channel.cancelled == 3
    channel.close()
    assert told == [1, 2]


def test_kill_without_cluster(
    ray: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To kill an actor starts no cluster, and fails without a word."""
    from asgi_infer.workers._ray_replica import RayLink

    killed = []

    def kill(actor: Any) -> None:
        killed.append(actor)
        raise ValueError("of another session")

    monkeypatch.setattr(ray, "kill", kill)
    link = RayLink.__new__(RayLink)
    link.actor = "actor"
    link.kill()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    link.kill()
    link.leave_behind()
    assert killed == ["actor"]
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


# -- the actor's side, in this process ---------------------------------------------------------


@pytest.fixture
def host() -> Iterator[Any]:
    """What runs in an actor, with a model loaded, on this thread."""
    from asgi_infer._call import here
    from asgi_infer.workers._ray_host import RayHost

    native, before = os.sched_getaffinity(0), here.current_call
    host = RayHost(lambda: False)
    spec = ModelSpec(name="m", load=Model, warmup=None, native=NativePolicy())
    assert exchange(host.open, Kind.OPEN, spec).kind is Kind.READY
    yield host
    assert exchange(host.answer, Kind.STOP).kind is Kind.END
    os.sched_setaffinity(0, native)
    here.current_call = before


def exchange(method: Any, kind: Kind, body: Any = None, **options: Any) -> Any:
    """Send a message, and receive the reply."""
    from asgi_infer.workers._ray_host import dumps, pack, unpack

    pickled = None if body is None else dumps(body)
    return unpack(method(pack(kind, pickled, **options)))


def test_host(host: Any) -> None:
    """It answers calls, and steps generators."""
    reply = exchange(host.answer, Kind.EXECUTE, (functions.echo, (np.ones(3),)))
    assert reply.kind is Kind.RESULT
    assert reply.used.seconds > 0.0
    np.testing.assert_array_equal(reply.body(), np.ones(3))
    work = (functions.step_where, (1,))
    assert exchange(host.answer, Kind.ITERATE, work, stream=7).body() is None
    assert exchange(host.answer, Kind.NEXT, stream=7).body()[0] == os.getpid()
    assert exchange(host.answer, Kind.NEXT, stream=7).kind is Kind.END
    assert exchange(host.answer, Kind.CLOSE, stream=7).body() is None


def test_host_whose_model_does_not_load() -> None:
    """The error is the reply."""
    from asgi_infer.workers._ray_host import RayHost

    reply = exchange(RayHost(lambda: False).open, Kind.OPEN, "no spec")
    assert reply.kind is Kind.RAISED


def test_host_and_callers_who_left(host: Any) -> None:
    """A call ends for a deadline, which is the seconds that are left, or when Ray says so."""
    from asgi_infer.workers._errors_across import unpack_error

    host._page._canceled = lambda: True
    reply = exchange(host.answer, Kind.EXECUTE, (check_cancelled, ()))
    assert isinstance(unpack_error(reply.body()), CallCancelled)
    host._page._canceled = lambda: False
    for seconds, kind in ((-1.0, Kind.RAISED), (99.0, Kind.RESULT)):
        work = (check_cancelled, ())
        assert exchange(host.answer, Kind.EXECUTE, work, seconds=seconds).kind is kind


def test_digest() -> None:
    """It tells calls apart by what is in their arrays, too."""
    from asgi_infer.workers._ray_host import dumps

    one, same, other = (dumps(np.full(9, value)).digest() for value in (1.0, 1.0, 2.0))
    assert one == same != other


def test_references_need_an_owner() -> None:
    """Replies can't hold references to a model: they would mean nothing where they arrive."""
    from asgi_infer.workers._ray_host import dumps

    spec = ModelSpec(name="m", load=None, warmup=None, native=NativePolicy())
    for value in (ModelReference(spec), (ModelReference(spec), lambda: None)):
        stream = dumps(value, lambda reference: (str, ("reference",))).stream
        assert b"reference" in stream


# -- without Ray -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_concurrency", "max_restarts", "max_task_retries"])
def test_options_that_are_ours(name: str) -> None:
    """What the runner sees to itself can't be left to Ray."""
    with pytest.raises(ValueError, match=name):
        RayWorker(options={name: 1})


@pytest.mark.parametrize("options", [{"replicas": 0}, {"hard_timeout": -1.0}])
def test_senseless_numbers(options: dict[str, Any]) -> None:
    """They are refused where they are written."""
    with pytest.raises(ValueError):
        RayWorker(**options)


LATER = """
import sys
import asgi_infer.workers
from asgi_infer.workers import RayWorker
print("ray" in sys.modules)
"""


def test_imported_late() -> None:
    """Ray is imported when a worker is made."""
    command = [sys.executable, "-c", LATER]
    result = subprocess.run(command, check=True, timeout=30, capture_output=True, text=True)
    assert result.stdout == "False\n"


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray isn't installed, a worker says what to do. What else is missing, Python says."""
    for name in ("_ray_replica", "_ray_host"):
        monkeypatch.delitem(sys.modules, f"asgi_infer.workers.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'asgi-infer\[ray\]'"):
        RayWorker()
    monkeypatch.setitem(sys.modules, "asgi_infer.workers._ray_replica", None)
    with pytest.raises(ModuleNotFoundError, match="_ray_replica"):
        RayWorker()


def test_description() -> None:
    """Workers with the same settings are equal, and can be sent elsewhere."""
    worker = RayWorker(2, options=SMALL, startup_timeout=3.0)
    assert worker == RayWorker(2, options=SMALL, startup_timeout=3.0)
    assert pickle.loads(pickle.dumps(worker)) == worker
    assert not worker.local
