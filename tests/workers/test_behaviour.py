"""What a runner promises, on every worker: wherever the model lives, the same happens.

What is not the same everywhere is in the table of the page on workers, and in the last part here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import random
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from starlette.exceptions import HTTPException

from asgi_infer import (
    Batcher,
    CallCancelled,
    CallFailed,
    ClientDisconnected,
    DeadlineExceeded,
    Draining,
    InferenceMiddleware,
    InferenceRunner,
    NotReady,
    QueueFull,
    ReentrantCall,
    Stream,
)
from asgi_infer.workers import ProcessWorker, RayWorker, SharedWorker, ThreadWorker
from asgi_infer.workers._protocol import Worker

from ..conftest import BACKENDS, nothing_left
from ..connections import Connection
from ..gates import LIMIT
from ..polling import some_turns, until, until_true
from . import functions
from .functions import Model, Pair, PlainError
from .ray_cluster import cluster
from .remote_gates import Makers, RemoteGate

WORKERS: dict[str, Callable[[], Worker]] = {
    "thread": ThreadWorker,
    "process": ProcessWorker,
    "shared": SharedWorker,
}
"""What is tested, by name."""

if find_spec("ray") is not None:
    WORKERS["ray"] = partial(RayWorker, options={"num_cpus": 0.1})  # several fit on two CPUs

SOON = 0.15
"""Seconds in which a call is sure to have started, and to be over if it is held open."""

pytestmark = pytest.mark.anyio

on_every_loop = pytest.mark.parametrize(
    "anyio_backend", list(BACKENDS.values()), ids=list(BACKENDS)
)
both_kinds = pytest.mark.parametrize("interleave", [False, True], ids=["exclusive", "interleaved"])


@pytest.fixture
def anyio_backend() -> Any:
    """One loop; a few tests ask for every one. What happens on the loop has tests of its own."""
    return BACKENDS["asyncio"]


# -- one started runner for each worker --------------------------------------------------------


# Each test takes Ray tens of milliseconds, and a start seconds: with it, the file takes minutes.
NAMES = [pytest.param(name, marks=[pytest.mark.soak] * (name == "ray")) for name in WORKERS]


@pytest.fixture(scope="module", params=NAMES)
def worker_name(request: pytest.FixtureRequest) -> str:
    """Each in turn. Of module scope, so that what is started for it is there before a test looks
    for what it leaves behind."""
    return str(request.param)


@pytest.fixture(scope="module")
def worker(worker_name: str) -> Iterator[Worker]:
    """Where the model lives."""
    with cluster() if worker_name == "ray" else nullcontext():
        yield WORKERS[worker_name]()


@pytest.fixture(autouse=True)
def no_leaks(worker_name: str) -> Iterator[None]:
    """As everywhere, but with Ray, which opens connections when it likes to and keeps them."""
    with nullcontext() if worker_name == "ray" else nothing_left():
        yield


@pytest.fixture(scope="module")
def apart(worker_name: str) -> bool:
    """Whether that is another process."""
    return worker_name != "thread"


@pytest.fixture(scope="module")
def started(worker: Worker) -> Iterator[InferenceRunner[Model]]:
    """One for all tests that leave it as they found it."""
    with InferenceRunner(Model, name="started", max_queue=4, worker=worker) as runner:
        anyio.run(runner.start)
        yield runner


@pytest.fixture
def runner(started: InferenceRunner[Model]) -> Iterator[InferenceRunner[Model]]:
    """The one for all: in the end nothing waits or runs, and its books balance."""
    yield started
    idle(started)
    now = started.statistics()
    ended = now.completed + now.failed + now.cancelled + now.expired + now.rejected
    assert now.submitted == ended
    assert now.state == "ready"


@pytest.fixture
def make(tmp_path: Any, started: InferenceRunner[Model]) -> Iterator[Makers]:
    """Makes gates that work across processes; they are released in the end."""
    makers = Makers(tmp_path)
    yield makers
    makers.release()
    idle(started)
    makers.close()


@pytest.fixture
def gate(make: Makers) -> RemoteGate:
    """One gate."""
    return make.gate()


def idle(runner: InferenceRunner[Any]) -> None:
    """Block until nothing waits or runs."""
    until_true(lambda: (runner.statistics().running, runner.statistics().queued) == (0, 0))


COUNTS = ("submitted", "completed", "failed", "cancelled", "expired", "rejected", "late")


class Books:
    """What has happened since it was made, as the runner has it."""

    def __init__(self, runner: InferenceRunner[Any]) -> None:
        self._runner = runner
        self._before = self._now()

    def _now(self) -> Counter[str]:
        now = self._runner.statistics()
        return Counter({name: getattr(now, name) for name in COUNTS})

    def __call__(self) -> dict[str, int]:
        """All but ``submitted``, of what is not zero; once nothing waits or runs."""
        idle(self._runner)
        found = dict(self._now() - self._before)
        assert found.pop("submitted", 0) == sum(found.values()) - found.get("late", 0)
        return found


async def hold(runner: InferenceRunner[Any], gate: RemoteGate) -> None:
    """Let ``gate`` hold the model."""
    runner.submit(gate, None)
    await gate.entered.set_async()


async def queued(runner: InferenceRunner[Any], count: int) -> None:
    """Wait until so many calls wait."""
    await until(lambda: runner.statistics().queued == count)


def text_of(error: BaseException) -> str:
    """The whole traceback, causes included, as a log would have it."""
    return "".join(traceback.format_exception(error))


# -- results -----------------------------------------------------------------------------------

VALUES: list[Any] = [
    None,
    True,
    2**80,
    1.5,
    "text \N{SNOWMAN}",
    b"\0bytes",
    (1, [2, {"three": {4}}]),
    {1: (), (2,): []},
    range(3),
    np.float32(1.5),
    ValueError("as a value"),
    int,
    functions.echo,
    b"x" * 300_000,
    list(range(50_000)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
async def test_values(runner: InferenceRunner[Model], value: Any) -> None:
    """Whatever a function takes arrives, and so does what it returns: large or small."""
    found = await runner.run(functions.echo, value)
    assert type(found) is type(value)
    assert repr(found) == repr(value)


BASE = np.arange(24_000.0).reshape(40, 20, 30)

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "small": np.arange(6, dtype=np.int16).reshape(2, 3),
    "large": BASE,
    "Fortran": np.asfortranarray(BASE[0]),
    "strided": BASE[::2, ::-1, 3:],
    "no axes": np.array(3.5),
    "empty": np.empty((0, 5), np.uint8),
    "dates": np.arange(4000).astype("datetime64[s]"),
    "records": np.zeros(2000, [("name", "U8"), ("score", "f4")]),
    "big-endian": np.arange(4000, dtype=">i4"),
    "objects": np.array([None, "text", 3], dtype=object),
    "texts": np.array(["some", "texts"] * 2000),
}


@pytest.mark.parametrize("name", ARRAYS)
async def test_arrays(runner: InferenceRunner[Model], worker_name: str, name: str) -> None:
    """An array arrives as it is, and so does the one that is returned."""
    array = ARRAYS[name]
    found = await runner.run(functions.echo, array)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.flags.writeable or worker_name == "ray"
    np.testing.assert_array_equal(found, array)


async def test_arrays_inside_of_others(runner: InferenceRunner[Model]) -> None:
    """Arrays arrive inside of tuples, lists, dicts and dataclasses."""
    pair = Pair("pair", BASE)
    found = await runner.run(functions.echo, ([BASE[0]], {"key": (pair, BASE[1])}))
    np.testing.assert_array_equal(found[0][0], BASE[0])
    np.testing.assert_array_equal(found[1]["key"][1], BASE[1])
    assert found[1]["key"][0].name == "pair"
    np.testing.assert_array_equal(found[1]["key"][0].array, BASE)


async def test_a_result_stays(runner: InferenceRunner[Model]) -> None:
    """A result is its caller's for good: no later call writes to it."""
    found = [await runner.run(np.full, 20_000, float(number)) for number in range(8)]
    assert [set(array.tolist()) for array in found] == [{float(number)} for number in range(8)]


async def test_a_read_only_array_stays_so(runner: InferenceRunner[Model]) -> None:
    """What can't be written to here can't be there."""
    array = np.ones(20_000)
    array.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        await runner.run(functions.fill, array)
    assert not (await runner.run(functions.echo, array)).flags.writeable


@on_every_loop
async def test_keyword_arguments(runner: InferenceRunner[Model]) -> None:
    """They go through ``functools.partial``, or ``submit``, or what ``wrap`` makes."""
    assert await runner.run(partial(runner.model.add, right=2), 1) == 3
    assert await runner.wrap(runner.model.add)(1, right=2) == 3
    future = runner.submit(runner.model.add, 1, right=2)
    await until(future.done)
    assert future.result(0) == 3


def test_map(runner: InferenceRunner[Model]) -> None:
    """``Executor.map`` gives results in order, and waits for room."""
    assert list(runner.map(runner.model.add, range(20), range(20))) == list(range(0, 40, 2))


async def test_one_thread_for_all(runner: InferenceRunner[Model], apart: bool) -> None:
    """Load and calls are on one thread, which is this process's only if the worker says so."""
    places = {await runner.run(functions.where) for _ in range(3)}
    assert places == {await runner.run(functions.born, runner.model)}
    ((process, thread),) = places
    assert (process != os.getpid()) is apart
    assert thread != threading.get_native_id()


@on_every_loop
async def test_order(runner: InferenceRunner[Model], make: Makers, gate: RemoteGate) -> None:
    """First come, first served, and a lower priority first; one at a time."""
    log = make.log()
    await hold(runner, gate)
    async with anyio.create_task_group() as tasks:
        for number, priority in enumerate([1, 0, 1, -1], 1):
            call: Any = partial(runner.run, log, number, priority=priority)
            tasks.start_soon(call)
            await queued(runner, number)
        gate.release.set()
    assert log.lines == ["4", "2", "1", "3"]


# -- the reference to the model ----------------------------------------------------------------


async def test_references(runner: InferenceRunner[Model]) -> None:
    """A method, one behind an attribute, the model itself as function and as argument."""
    model = runner.model
    assert await runner.run(model.add, 1, 2) == 3
    assert await runner.run(model.part.triple, 5) == 15
    assert await runner.run(model, 5) == -5
    assert await runner.run(functions.apply, model.part.triple, 4) == 12
    assert await runner.run(getattr, model.part, "factor") == 3


async def test_references_in_partials(runner: InferenceRunner[Model]) -> None:
    """They are found in partials of partials, as function, argument and keyword argument."""
    inner = partial(functions.apply, runner.model.add, right=2)
    assert await runner.run(partial(inner, 1)) == 3
    outer = partial(functions.apply, inner)
    assert await runner.run(outer, 5) == 7
    found: Any = await runner.run(partial(dict, part=runner.model.part.factor))
    assert found == {"part": 3}


async def test_the_model_keeps_its_state(runner: InferenceRunner[Model]) -> None:
    """Calls are made on one and the same model."""
    first = await runner.run(runner.model.count)
    assert await runner.run(runner.model.count) == first + 1


async def test_a_missing_attribute(runner: InferenceRunner[Model]) -> None:
    """What the model has not got is an ``AttributeError`` that says so, and no more."""
    with pytest.raises(AttributeError, match="'Part' object has no attribute 'nothing'"):
        await runner.run(runner.model.part.nothing)  # type: ignore[attr-defined]
    assert await runner.run(runner.model.add, 1) == 1


async def test_another_runners_model(runner: InferenceRunner[Model]) -> None:
    """A reference to another runner's model is refused, as function and within an argument."""
    other = InferenceRunner(Model)
    works: list[Any] = [(other.model.count,), (functions.apply, other.model.count)]
    for work in works:
        with pytest.raises(ValueError, match="belongs to another runner"):
            await runner.run(*work)
    with pytest.raises(ValueError, match="belongs to another runner"):
        await runner.run(partial(functions.apply, other.model.count))


# -- errors ------------------------------------------------------------------------------------


async def raised(runner: InferenceRunner[Any], func: Any, *args: Any) -> Exception:
    """What a call raises; the next one runs."""
    books = Books(runner)
    with pytest.raises(Exception) as caught:  # which one is looked at by the test
        await runner.run(func, *args)
    assert await runner.run(functions.echo, 1) == 1
    assert books() == {"failed": 1, "completed": 1}
    return caught.value


@on_every_loop
async def test_an_error(runner: InferenceRunner[Model]) -> None:
    """It arrives with its type, arguments and attributes; the traceback leads to the function."""
    error = await raised(runner, functions.fail_plain)
    assert isinstance(error, PlainError)
    assert error.args == ("plain", 5)
    assert error.extra == ["plain"]
    assert 'raise PlainError("plain", 5)' in text_of(error)


async def test_errors_of_python(runner: InferenceRunner[Model]) -> None:
    """So do those of Python."""
    error = await raised(runner, functions.fail_with_key)
    assert (type(error), error.args) == (KeyError, ("missing",))
    error = await raised(runner, functions.fail_with_os_error)
    assert isinstance(error, FileNotFoundError)
    assert (error.errno, error.filename) == (2, "model.bin")


async def test_notes_causes_and_groups(runner: InferenceRunner[Model]) -> None:
    """What hangs on an error arrives with it, at least as text."""
    error = await raised(runner, functions.fail_with_note)
    assert error.__notes__ == ["while reading page 7"]
    error = await raised(runner, functions.fail_with_cause)
    assert (type(error), error.args) == (ValueError, ("because of that",))
    assert "KeyError: 'missing'" in text_of(error)
    error = await raised(runner, functions.fail_with_group)
    assert isinstance(error, ExceptionGroup)
    assert [str(each) for each in error.exceptions] == ["one", "two"]
    error = await raised(runner, functions.fail_in_a_circle)
    assert str(error) == "first"


ODD = {
    functions.fail_stubborn: ("StubbornError", "stubborn"),
    functions.fail_locked: ("LockedError", "locked"),
    functions.fail_local: ("LocalError", "local"),
    functions.fail_reducing: ("ReducingError", "reducing"),
    functions.fail_mute: ("MuteError", ""),
}


@pytest.mark.parametrize("func", ODD, ids=lambda func: func.__name__)
async def test_errors_that_do_not_pickle(runner: InferenceRunner[Model], func: Any) -> None:
    """They arrive all the same: at least their name, their text and the way to the function."""
    name, message = ODD[func]
    error = await raised(runner, func)
    if type(error).__name__ != name:
        assert name in str(error)
    if message:
        assert message in str(error)
    text = text_of(error)
    assert name in text
    assert f"in {func.__name__}" in text


async def test_an_error_of_any_length(runner: InferenceRunner[Model]) -> None:
    """A message of a megabyte is no obstacle."""
    error = await raised(runner, functions.fail_at_length)
    assert isinstance(error, ValueError)
    assert str(error).startswith("xxx")


async def test_an_error_for_the_client(runner: InferenceRunner[Model]) -> None:
    """An ``HTTPException`` keeps its status, however it was made: the client is to get it."""
    error = await raised(runner, functions.fail_for_client)
    assert isinstance(error, HTTPException)
    assert (error.status_code, error.detail) == (422, "no face in it")
    assert error.headers == {"X-Faces": "0"}


NO_ERRORS = (SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError)
PASSING = (*NO_ERRORS, concurrent.futures.CancelledError, CallCancelled)


@pytest.mark.parametrize("kind", PASSING, ids=lambda kind: kind.__qualname__)
async def test_ends_that_are_no_errors(
    runner: InferenceRunner[Model], kind: type[BaseException]
) -> None:
    """They become ``CallFailed``, with the cause: they must not pass for the caller's own."""
    error = await raised(runner, functions.end, kind)
    assert type(error) is CallFailed
    cause = error.__cause__
    assert cause is not None
    assert type(cause) is kind
    assert cause.args == ("the end",)
    assert "in end" in text_of(error)


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_ends_of_iterators(
    runner: InferenceRunner[Model], kind: type[BaseException]
) -> None:
    """``StopIteration`` and its like become a ``RuntimeError``: they would mean something else."""
    error = await raised(runner, functions.end, kind)
    assert type(error) is RuntimeError
    assert type(error.__cause__) is kind


async def test_an_error_and_a_submitted_call(runner: InferenceRunner[Model]) -> None:
    """A future holds the same error."""
    future = runner.submit(functions.fail_plain)
    await until(future.done)
    assert isinstance(future.exception(0), PlainError)


async def test_async_functions_are_refused(runner: InferenceRunner[Model]) -> None:
    """So is what a plain function returns that has yet to run."""
    with pytest.raises(TypeError, match="coroutine_function"):
        runner.wrap(functions.coroutine_function)
    for func in (functions.coroutine_function, functions.return_coroutine):
        assert isinstance(await raised(runner, func), TypeError)
    error = await raised(runner, functions.return_generator)
    assert isinstance(error, TypeError)
    assert "use stream() for it" in str(error)


# -- cancellation: waiting ---------------------------------------------------------------------


@on_every_loop
async def test_waiting_and_cancelled(
    runner: InferenceRunner[Model], make: Makers, gate: RemoteGate
) -> None:
    """A caller cancelled while its call waits: it never runs, and its place is free at once."""
    log, books = make.log(), Books(runner)
    await hold(runner, gate)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runner.run, log, "cancelled")
        await queued(runner, 1)
        tasks.cancel_scope.cancel()
    assert runner.statistics().queued == 0
    gate.release.set()
    assert books() == {"completed": 1, "cancelled": 1}
    assert log.lines == []


async def serve(
    connection: Connection, runner: InferenceRunner[Any], work: tuple[Any, ...]
) -> None:
    """Serve a client with one call, which is to end since that client has hung up."""

    async def app(*_: Any) -> None:
        with pytest.raises(ClientDisconnected):
            await runner.run(*work)

    await connection.serve(InferenceMiddleware(app, runner=runner))


async def test_waiting_and_client_gone(
    runner: InferenceRunner[Model], make: Makers, gate: RemoteGate
) -> None:
    """A client that hangs up while its call waits: ``ClientDisconnected``, and it never runs."""
    log, books, connection = make.log(), Books(runner), Connection()
    await hold(runner, gate)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve, connection, runner, (log, "gone"))
        await queued(runner, 1)
        connection.hang_up()
    gate.release.set()
    assert books() == {"completed": 1, "cancelled": 1}
    assert log.lines == []


async def test_waiting_past_the_deadline(
    runner: InferenceRunner[Model], make: Makers, gate: RemoteGate
) -> None:
    """A deadline that passes while the call waits: ``started=False``, and it never runs."""
    log = make.log()
    await forget_the_past(runner)
    books = Books(runner)
    await hold(runner, gate)
    with pytest.raises(DeadlineExceeded) as caught:
        await runner.run(log, "late", timeout=0.03)
    assert caught.value.started is False
    gate.release.set()
    assert books() == {"completed": 1, "expired": 1}
    assert log.lines == []


async def forget_the_past(runner: InferenceRunner[Any]) -> None:
    """Make calls until they are known to be short: earlier tests have held theirs open."""
    while runner.statistics().service_time > 0.005:
        await runner.run(functions.echo, None)


async def test_too_little_time_on_arrival(worker: Worker, make: Makers) -> None:
    """Less time than the wait and the call will take: ``DeadlineExceeded``, and never queued."""
    gate, log = make.gate(), make.log()
    with InferenceRunner(Model, worker=worker) as runner:
        await runner.start()
        await runner.run(functions.use, 0)
        await hold(runner, gate)
        with pytest.raises(DeadlineExceeded) as caught:
            await runner.run(log, "too late", timeout=1e-4)
        assert caught.value.started is False
        assert caught.value.retry_after is not None
        assert runner.statistics().rejected == 1
        gate.release.set()
    assert log.lines == []


async def test_no_room(runner: InferenceRunner[Model], gate: RemoteGate) -> None:
    """More than ``max_queue`` calls are refused; those that wait are not touched."""
    books = Books(runner)
    await hold(runner, gate)
    futures = [runner.submit(runner.model.add, number) for number in range(4)]
    with pytest.raises(QueueFull):
        await runner.run(runner.model.add, 5)
    gate.release.set()
    assert books() == {"completed": 5, "rejected": 1}
    assert [future.result(0) for future in futures] == [0, 1, 2, 3]


# -- cancellation: running ---------------------------------------------------------------------


async def slot_is_held(runner: InferenceRunner[Any], gate: RemoteGate) -> None:
    """The next call does not start before the abandoned one ends."""
    following = runner.submit(functions.echo, 1)
    await some_turns()
    now = runner.statistics()
    assert (now.running, now.queued, following.done()) == (1, 1, False)
    gate.release.set()
    await until(following.done)


@on_every_loop
async def test_running_and_cancelled(
    runner: InferenceRunner[Model], make: Makers, gate: RemoteGate
) -> None:
    """A caller cancelled while its call runs leaves at once. The call runs on, holds the model,
    and ``check_cancelled()`` raises inside."""
    noticed, books = make.event(), Books(runner)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runner.run, functions.notice, gate, noticed, LIMIT)
        await gate.entered.set_async()
        tasks.cancel_scope.cancel()
    await slot_is_held(runner, gate)
    assert noticed.times == 1
    assert books() == {"cancelled": 1, "late": 1, "completed": 1}


async def test_running_and_client_gone(
    runner: InferenceRunner[Model], make: Makers, gate: RemoteGate
) -> None:
    """A client that hangs up while its call runs: the caller leaves, the call as above."""
    noticed, books, connection = make.event(), Books(runner), Connection()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve, connection, runner, (functions.notice, gate, noticed, LIMIT))
        await gate.entered.set_async()
        connection.hang_up()
    await slot_is_held(runner, gate)
    assert noticed.times == 1
    assert books() == {"cancelled": 1, "late": 1, "completed": 1}


@on_every_loop
async def test_running_past_the_deadline(
    runner: InferenceRunner[Model], make: Makers, gate: RemoteGate
) -> None:
    """A deadline that passes while the call runs: ``started=True``; the call as above."""
    noticed, books = make.event(), Books(runner)
    with pytest.raises(DeadlineExceeded) as caught:
        await runner.run(functions.notice, gate, noticed, LIMIT, timeout=SOON)
    assert caught.value.started is True
    await slot_is_held(runner, gate)
    assert noticed.times == 1
    assert books() == {"expired": 1, "late": 1, "completed": 1}


@pytest.mark.parametrize("fails", [False, True], ids=["result", "error"])
async def test_what_comes_too_late(
    runner: InferenceRunner[Model], gate: RemoteGate, fails: bool
) -> None:
    """What a call returns or raises after its caller has left is thrown away, counted once."""
    books = Books(runner)
    with pytest.raises(DeadlineExceeded):
        await runner.run(functions.hold_first, gate, fails, 1, timeout=SOON)
    gate.release.set()
    assert books() == {"expired": 1, "late": 1}


async def test_the_deadline_where_the_model_lives(
    runner: InferenceRunner[Model], make: Makers
) -> None:
    """A function that asks finds the deadline out by itself, and the call ends with that."""
    noticed, books = make.event(), Books(runner)
    with pytest.raises(DeadlineExceeded) as caught:
        await runner.run(functions.ask_until_late, noticed, timeout=SOON)
    assert caught.value.started is True
    found = books()
    assert found.pop("late", 1) == 1  # whoever saw it first
    assert found == {"expired": 1}
    assert noticed.times == 1


async def test_nobody_has_left(
    runner: InferenceRunner[Model], make: Makers, gate: RemoteGate
) -> None:
    """``check_cancelled()`` does nothing for a caller that waits, whoever has left before."""
    other, noticed = make.gate(), make.event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runner.run, functions.notice, other, noticed, LIMIT)
        await other.entered.set_async()
        tasks.cancel_scope.cancel()
    waiting = runner.submit(functions.notice, gate, noticed)
    other.release.set()
    await gate.entered.set_async()
    gate.release.set()
    await until(waiting.done)
    assert waiting.result(0) == "done"
    assert noticed.times == 1


# -- conservation ------------------------------------------------------------------------------


class History:
    """Calls of all kinds at random, and what their callers saw come of them."""

    def __init__(self, runner: InferenceRunner[Model], make: Makers, seed: int) -> None:
        self.runner = runner
        self.make = make
        self.random = random.Random(seed)
        self.batcher = Batcher(runner, runner.model.double, max_size=3)
        self.seen: Counter[str] = Counter()

    async def round(self) -> None:
        """Hold the model, have calls queue up, send some callers away, and let the rest run."""
        gate = self.make.gate()
        async with anyio.create_task_group() as tasks:
            scopes = [anyio.CancelScope() for _ in range(self.random.randint(1, 7))]
            held: Any = partial(self.runner.run, gate, None)
            tasks.start_soon(self.see, scopes[0], held)
            await gate.entered.set_async()
            for scope in scopes[1:]:
                tasks.start_soon(self.see, scope, self.random.choice(self.kinds()))
            await some_turns()
            for scope in self.random.sample(scopes, len(scopes) // 3):
                scope.cancel()
            await some_turns()
            gate.release.set()

    def kinds(self) -> list[Callable[[], Any]]:
        run: Any = self.runner.run
        model = self.runner.model
        return [
            partial(run, model.count),
            partial(run, functions.fail_plain),
            partial(run, functions.echo, 1, timeout=0.001),
            partial(self.batcher.run, self.random.randint(-1, 5)),
            partial(self.read, 3),
            partial(self.read, None),
        ]

    async def read(self, items: int | None) -> None:
        """Read a whole stream, or leave it in the middle."""
        stream = self.runner.stream(self.runner.model.generate, 200, buffer=2)
        async with stream:
            number = 0
            async for item in stream:
                assert item == number
                number += 1
                if number == items:
                    raise asyncio.CancelledError  # counted as what it is

    async def see(self, scope: anyio.CancelScope, call: Callable[[], Any]) -> None:
        """Make a call, and count how it ended."""
        outcome = "cancelled"
        with scope:
            try:
                await call()
                outcome = "completed"
            except QueueFull:
                outcome = "rejected"
            except DeadlineExceeded:
                outcome = "expired or rejected"
            except (PlainError, ValueError):
                outcome = "failed"
            except asyncio.CancelledError:
                if scope.cancel_called:
                    raise
        self.seen[outcome] += 1


@pytest.mark.parametrize("seed", [1, 2])
async def test_conservation(runner: InferenceRunner[Model], make: Makers, seed: int) -> None:
    """After any history the books balance, and say what happened to each caller."""
    history, books = History(runner, make, seed), Books(runner)
    for _ in range(12):
        await history.round()
    found, seen = books(), history.seen
    assert sum(seen.values()) > 30
    late = found.pop("late", 0)
    assert late <= found["cancelled"]
    too_late = seen.pop("expired or rejected", 0)
    refused = seen.pop("rejected", 0)
    assert found.pop("expired", 0) + found.pop("rejected", 0) == too_late + refused
    assert found == dict(seen)


# -- streams -----------------------------------------------------------------------------------


@on_every_loop
@both_kinds
async def test_items(runner: InferenceRunner[Model], interleave: bool) -> None:
    """All items arrive in order, and then the end."""
    books = Books(runner)
    stream = runner.stream(runner.model.generate, 40, buffer=3, interleave=interleave)
    assert [item async for item in stream] == list(range(40))
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert books() == {"completed": 1}


async def test_no_items(runner: InferenceRunner[Model]) -> None:
    """A generator may end at once, and an item may be None."""
    for items in ([], [None, 0, ""]):
        stream: Stream[Any] = runner.stream(iter, items)
        assert [item async for item in stream] == items


async def test_items_are_made_where_the_model_lives(runner: InferenceRunner[Model]) -> None:
    """On its thread."""
    places = {item async for item in runner.stream(functions.step_where, 3)}
    assert places == {await runner.run(functions.where)}


async def test_arrays_as_items(runner: InferenceRunner[Model]) -> None:
    """An item is its consumer's for good: no later item is written over it."""
    found = [item async for item in runner.stream(functions.make_arrays, 12, 5000)]
    assert [set(item.tolist()) for item in found] == [{float(number)} for number in range(12)]


@both_kinds
async def test_back_pressure(
    runner: InferenceRunner[Model], make: Makers, interleave: bool
) -> None:
    """No more is made than the buffer holds; more once half of that has been taken."""
    source, books = make.source(), Books(runner)
    stream = runner.stream(source, buffer=4, interleave=interleave)
    await until(lambda: source.made == 4)
    assert [await anext(stream), await anext(stream)] == [0, 1]
    await until(lambda: source.made == 6)
    await stream.aclose()
    await source.closed.set_async()
    assert source.made == 6
    assert books() == {"cancelled": 1, "late": 1}


@pytest.mark.parametrize("way", ["aclose", "block", "dropped", "cancelled"])
@both_kinds
async def test_a_consumer_that_leaves(
    runner: InferenceRunner[Model], make: Makers, interleave: bool, way: str
) -> None:
    """The generator's ``finally`` runs, where the model lives, and the model is free."""
    source = make.source(hold=3)
    books = Books(runner)
    await leave(runner.stream(source, buffer=1, interleave=interleave), way)
    source.gate.release.set()
    await source.closed.set_async()
    process, _ = await runner.run(functions.where)
    assert source.log.lines[-1] == f"closed in {process}"
    assert source.made <= 4
    assert books() == {"cancelled": 1, "late": 1, "completed": 1}


async def leave(stream: Any, way: str) -> None:
    """Take two items, and leave."""
    assert await anext(stream) == 0
    if way == "block":
        async with stream:
            assert await anext(stream) == 1
        return
    assert await anext(stream) == 1
    if way == "aclose":
        await stream.aclose()
    elif way == "cancelled":
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read_to_the_end, stream)
            await some_turns()
            tasks.cancel_scope.cancel()
    # "dropped": the last reference to it goes with this function's frame


async def read_to_the_end(stream: Any) -> None:
    async for _ in stream:
        pass


async def test_a_stream_that_waits_and_is_left(
    runner: InferenceRunner[Model], make: Makers, gate: RemoteGate
) -> None:
    """It never begins."""
    source, books = make.source(), Books(runner)
    await hold(runner, gate)
    stream = runner.stream(source)
    await queued(runner, 1)
    await stream.aclose()
    gate.release.set()
    assert books() == {"completed": 1, "cancelled": 1}
    assert source.log.lines == []


async def test_asking_within_a_step(
    runner: InferenceRunner[Model], make: Makers, gate: RemoteGate
) -> None:
    """``check_cancelled()`` raises in a step whose consumer has left."""
    noticed = make.event()
    stream = runner.stream(functions.ask_between, gate, noticed)
    assert await anext(stream) == 1
    await gate.entered.set_async()
    await stream.aclose()
    gate.release.set()
    idle(runner)
    assert noticed.times == 1


async def test_the_deadline_of_a_stream(runner: InferenceRunner[Model], make: Makers) -> None:
    """The consumer gets it at once, and the generator is closed at its next step."""
    source, books = make.source(hold=2), Books(runner)
    stream = runner.stream(source, timeout=SOON)
    assert [await anext(stream), await anext(stream)] == [0, 1]
    with pytest.raises(DeadlineExceeded) as caught:
        await anext(stream)
    assert caught.value.started is True
    source.gate.release.set()
    await source.closed.set_async()
    assert books() == {"expired": 1, "late": 1}


@both_kinds
async def test_a_consumer_that_stalls(
    runner: InferenceRunner[Model], make: Makers, interleave: bool
) -> None:
    """A buffer that stands full for too long: the generator is closed, the consumer told."""
    source, books = make.source(), Books(runner)
    stream = runner.stream(source, buffer=1, stall_timeout=0.03, interleave=interleave)
    await source.closed.set_async()
    with pytest.raises(DeadlineExceeded):
        await read_to_the_end(stream)
    assert books()["expired"] == 1


@both_kinds
async def test_an_error_midway(runner: InferenceRunner[Model], interleave: bool) -> None:
    """It comes after the items before it, with the way to where it was raised."""
    books, found = Books(runner), []
    with pytest.raises(PlainError) as caught:
        async for item in runner.stream(functions.fail_midway, 5, interleave=interleave):
            found.append(item)
    assert found == list(range(5))
    assert "in fail_midway" in text_of(caught.value)
    assert books() == {"failed": 1}


async def test_an_error_in_finally(runner: InferenceRunner[Model]) -> None:
    """What a generator raises at its very end is the consumer's too."""
    found = []
    with pytest.raises(PlainError):
        async for item in runner.stream(functions.fail_in_finally):
            found.append(item)
    assert found == [1, 2]
    assert await runner.run(functions.echo, 1) == 1


@pytest.mark.parametrize("kind", NO_ERRORS[:2], ids=lambda kind: kind.__name__)
async def test_the_end_of_a_generator_that_is_no_error(
    runner: InferenceRunner[Model], kind: type[BaseException]
) -> None:
    """It becomes ``CallFailed`` as in a call."""
    stream = runner.stream(functions.end_stream, kind)
    assert await anext(stream) == 1
    with pytest.raises(CallFailed) as caught:
        await anext(stream)
    assert type(caught.value.__cause__) is kind


async def test_no_generator(runner: InferenceRunner[Model]) -> None:
    """A function that returns something else is told to use ``run``."""
    func: Any = functions.echo
    with pytest.raises(TypeError, match="use run\\(\\) for a function with one result"):
        await anext(runner.stream(func, 3))
    with pytest.raises(TypeError):
        runner.stream(functions.coroutine_function)  # type: ignore[arg-type]


@on_every_loop
async def test_interleaved_streams(runner: InferenceRunner[Model], make: Makers) -> None:
    """Calls run between two items, and two streams take turns."""
    stream = runner.stream(make.source(), buffer=2, interleave=True)
    other = runner.stream(runner.model.generate, 6, buffer=2, interleave=True)
    for number in range(6):
        assert await anext(stream) == number
        assert await anext(other) == number
        assert await runner.run(runner.model.add, number) == number
    with pytest.raises(StopAsyncIteration):
        await anext(other)
    await stream.aclose()


async def test_a_wrapped_generator(runner: InferenceRunner[Model]) -> None:
    """``wrap`` makes a stream of a generator method of the model."""
    generate = runner.wrap(runner.model.generate)
    assert [item async for item in generate(3)] == [0, 1, 2]


# -- batches -----------------------------------------------------------------------------------


class Gathered:
    """Calls of a batcher that have queued while the model was held."""

    def __init__(self, runner: InferenceRunner[Model], batcher: Batcher[Any, Any]) -> None:
        self._runner = runner
        self._batcher = batcher
        self.found: dict[int, Any] = {}
        self.scopes: dict[int, anyio.CancelScope] = {}

    async def call(self, key: int, item: Any) -> None:
        """Note what comes of one call."""
        self.scopes[key] = anyio.CancelScope()
        with self.scopes[key]:
            try:
                self.found[key] = await self._batcher.run(item)
            except Exception as error:
                self.found[key] = error

    async def run(self, gate: RemoteGate, *items: Any, leaving: int = -1) -> dict[int, Any]:
        """Have ``items`` run together; the caller of one may leave before."""
        await hold(self._runner, gate)
        async with anyio.create_task_group() as tasks:
            for key, item in enumerate(items):
                tasks.start_soon(self.call, key, item)
                await queued(self._runner, key + 1)
            if leaving >= 0:
                self.scopes[leaving].cancel()
                await queued(self._runner, len(items) - 1)
            gate.release.set()
        return self.found


@on_every_loop
async def test_batches(runner: InferenceRunner[Model], gate: RemoteGate) -> None:
    """What queues while the model is busy runs together; each caller gets its own result."""
    batcher, books = Batcher(runner, runner.model.double, max_size=3), Books(runner)
    await runner.run(runner.model.taken)
    found = await Gathered(runner, batcher).run(gate, 1, 2, 3, 4)
    assert found == {0: 2, 1: 4, 2: 6, 3: 8}
    assert await runner.run(runner.model.taken) == [3, 1]
    assert books() == {"completed": 7}


async def test_stacked_batches(runner: InferenceRunner[Model], gate: RemoteGate) -> None:
    """Arrays of one shape become one with an axis more; each caller gets its row."""
    batcher = Batcher(runner, runner.model.scale, max_size=4, stack=True)
    items = [np.full((20, 300), float(number)) for number in range(3)]
    await runner.run(runner.model.taken)
    found = await Gathered(runner, batcher).run(gate, *items, np.ones(2))
    for number in range(3):
        np.testing.assert_array_equal(found[number], 2.0 * items[number])
    np.testing.assert_array_equal(found[3], [2.0, 2.0])
    assert await runner.run(runner.model.taken) == [3, 1]


async def test_one_bad_item(runner: InferenceRunner[Model], gate: RemoteGate) -> None:
    """A batch that fails is halved until the bad item is alone, and it alone gets the error."""
    batcher, books = Batcher(runner, runner.model.double, max_size=4), Books(runner)
    await runner.run(runner.model.taken)
    found = await Gathered(runner, batcher).run(gate, 1, 2, -3, 4)
    error = found.pop(2)
    assert isinstance(error, ValueError)
    assert str(error) == "-3 is negative"
    assert "in double" in text_of(error)
    assert found == {0: 2, 1: 4, 3: 8}
    assert await runner.run(runner.model.taken) == [4, 2, 2, 1, 1]
    assert books() == {"completed": 6, "failed": 1}


async def test_one_that_leaves_a_batch(runner: InferenceRunner[Model], gate: RemoteGate) -> None:
    """Who leaves while waiting is left out, and nobody else notices."""
    batcher, books = Batcher(runner, runner.model.double, max_size=4), Books(runner)
    await runner.run(runner.model.taken)
    found = await Gathered(runner, batcher).run(gate, 1, 2, 3, leaving=1)
    assert found == {0: 2, 2: 6}
    assert await runner.run(runner.model.taken) == [2]
    assert books() == {"completed": 5, "cancelled": 1}


async def test_all_that_leave_a_batch(
    runner: InferenceRunner[Model], make: Makers, gate: RemoteGate
) -> None:
    """``check_cancelled()`` raises in a batch once nobody waits for any of its items."""
    noticed, books, running = make.event(), Books(runner), make.gate()
    func = partial(functions.ask_in_batch, running, noticed)
    batcher: Batcher[int, int] = Batcher(runner, func, max_size=4)
    await hold(runner, gate)
    async with anyio.create_task_group() as tasks:
        for number in range(2):
            tasks.start_soon(batcher.run, number)
        await queued(runner, 2)
        gate.release.set()
        await running.entered.set_async()
        tasks.cancel_scope.cancel()
    running.release.set()
    assert books() == {"completed": 1, "cancelled": 2, "late": 2}
    assert noticed.times == 1


async def test_a_wrong_number_of_results(runner: InferenceRunner[Model]) -> None:
    """It is a ``TypeError`` for each, that names the function."""
    batcher: Batcher[int, Any] = Batcher(runner, functions.one_too_many, max_size=4)
    with pytest.raises(TypeError, match="one_too_many"):
        await batcher.run(1)


# -- statistics --------------------------------------------------------------------------------


async def test_what_calls_cost(worker: Worker) -> None:
    """Counts, and what was seen of the thread that runs the model: sleeps and new memory."""
    with InferenceRunner(Model, worker=worker) as runner:
        await runner.start()
        for _ in range(2):
            await runner.run(functions.use, 20)
        idle(runner)
        now = runner.statistics()
    assert (now.submitted, now.completed, now.state) == (2, 2, "ready")
    assert now.service_time >= 0.004
    assert now.switches_per_call > 0
    assert now.faults_per_call > 0
    assert now.cores_used >= 0


# -- lifecycle ---------------------------------------------------------------------------------


async def test_a_model_that_does_not_load(worker: Worker) -> None:
    """``start`` raises what ``load`` raised, with the way there; calls get ``NotReady``."""
    runner = InferenceRunner(functions.load_nothing, worker=worker)
    with pytest.raises(PlainError) as caught:
        await runner.start()
    assert caught.value.args == ("no weights", 5)
    assert "in load_nothing" in text_of(caught.value)
    assert runner.statistics().state == "failed"
    with pytest.raises(NotReady, match="no weights"):
        await runner.run(functions.echo, 1)
    with pytest.raises(PlainError):
        await runner.start()
    await runner.aclose()


async def test_a_model_that_does_not_warm_up(worker: Worker) -> None:
    """The same for ``warmup``."""
    runner = InferenceRunner(Model, warmup=functions.warm_up_badly, worker=worker)
    with pytest.raises(PlainError, match="cold after 1") as caught:
        await runner.start()
    assert "in warm_up_badly" in text_of(caught.value)
    await runner.aclose()


async def test_load_that_takes_too_long(worker: Worker, make: Makers) -> None:
    """``start`` gives up on it, calls are sent away, and the runner can be started again."""
    gate = make.gate()
    with InferenceRunner(partial(functions.load_held, gate), worker=worker) as runner:
        waiting = runner.submit(functions.echo, 1)
        await gate.entered.set_async()
        with pytest.raises(NotReady, match="did not load in"):
            await runner.start(timeout=0.01)
        assert isinstance(waiting.exception(LIMIT), Draining)
        gate.release.set()
        await runner.start()
        assert await runner.run(runner.model.count) == 1


async def test_warm_up(worker: Worker, make: Makers) -> None:
    """It runs once, before the first call, where that runs."""
    log = make.log()
    with InferenceRunner(Model, warmup=partial(functions.warm_up, log), worker=worker) as runner:
        assert await runner.run(runner.model.count) == 2
        assert log.lines == [str(await runner.run(functions.where))]


@on_every_loop
async def test_a_runner_that_starts_again(worker: Worker, make: Makers) -> None:
    """It loads its model anew; a stopped one takes no calls. The model goes where it lived."""
    log = make.log()
    runner = InferenceRunner(partial(functions.Destroyed, log), worker=worker)
    async with runner:
        places = [str(await runner.run(functions.where))]
        assert log.lines == []
    assert log.lines == places
    with pytest.raises(Draining):
        await runner.run(functions.where)
    async with runner:
        places.append(str(await runner.run(functions.where)))
    assert log.lines == places


async def test_accepted_calls_end(worker: Worker, make: Makers) -> None:
    """A runner that stops takes no new calls, and lets the accepted ones end."""
    gate = make.gate()
    runner = InferenceRunner(Model, worker=worker)
    await runner.start()
    accepted = [runner.submit(gate, 1), runner.submit(functions.echo, 2)]
    await gate.entered.set_async()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runner.aclose)
        await until(lambda: runner.statistics().state == "draining")
        with pytest.raises(Draining):
            await runner.run(functions.echo, 3)
        gate.release.set()
    assert [future.result(0) for future in accepted] == [1, 2]


async def test_a_call_that_does_not_end(worker: Worker, make: Makers, apart: bool) -> None:
    """Once the grace is over its caller is sent away, and so is who waits. Another process is
    killed; a thread runs on to the function's end, and ends with that."""
    gate = make.gate()
    runner = InferenceRunner(Model, worker=worker)
    process, _ = await runner.run(functions.where)
    stuck = runner.submit(gate, 1)
    await gate.entered.set_async()
    waiting = runner.submit(functions.echo, 2)
    await runner.aclose(grace=0.01)
    for future in (stuck, waiting):
        assert isinstance(future.exception(0), Draining)
    if apart:
        await until(lambda: not alive(process))
    gate.release.set()
    runner.shutdown()
    assert (runner.statistics().cancelled, runner.statistics().late) == (2, 1)


def alive(process: int) -> bool:
    """Whether there is such a process."""
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


# -- what depends on where the model lives: the table of the page on workers -------------------


@pytest.mark.parametrize("name", ["lambda", "closure", "lock"])
async def test_what_does_not_pickle(
    runner: InferenceRunner[Model], worker_name: str, apart: bool, name: str
) -> None:
    """A lambda, a closure or a lock as function or argument: fine on a thread, and elsewhere a
    ``TypeError`` that tells what to do; the next call runs. Ray sends functions of all kinds."""

    def closure() -> str:
        return name

    value: Any = {"lambda": lambda: name, "closure": closure, "lock": threading.Lock()}[name]
    work: Any = (functions.echo, [value]) if name == "lock" else (value,)
    if not apart or (worker_name == "ray" and name != "lock"):
        assert await runner.run(*work) == ([value] if name == "lock" else name)
        return
    error = await raised(runner, *work)
    assert isinstance(error, TypeError)
    assert "pickle" in str(error)


async def test_a_result_that_does_not_pickle(
    runner: InferenceRunner[Model], worker_name: str, apart: bool
) -> None:
    """The same for a result, and for an item of a stream."""
    if not apart or worker_name == "ray":
        assert callable(await runner.run(functions.make_lambda))
        return
    error = await raised(runner, functions.make_lambda)
    assert isinstance(error, TypeError)
    assert "make_lambda" in str(error)
    stream = runner.stream(functions.yield_lambda)
    assert await anext(stream) == 1
    with pytest.raises(TypeError, match="yield_lambda"):
        await anext(stream)
    assert await runner.run(functions.echo, 1) == 1


async def test_arguments_changed_in_place(
    runner: InferenceRunner[Model], worker_name: str, apart: bool
) -> None:
    """The caller's own argument is changed on a thread, and a copy elsewhere; but an array that
    has gone through Ray's object store can't be changed at all."""
    array, items = np.zeros(20_000), [0]
    if worker_name == "ray":
        assert "read-only" in str(await raised(runner, functions.fill, array))
    else:
        assert await runner.run(functions.fill, array) == 140_000.0
        assert array.sum() == (0.0 if apart else 140_000.0)
    assert await runner.run(functions.append, items) == 2
    assert items == ([0] if apart else [0, 1])


async def test_the_very_object(runner: InferenceRunner[Model], apart: bool) -> None:
    """A result is the object that the function returned on a thread, and a copy elsewhere."""
    items = [1, 2]
    assert ((await runner.run(functions.echo, items)) is items) is not apart


async def test_context_variables(runner: InferenceRunner[Model], apart: bool) -> None:
    """A function sees its caller's on a thread, and what they are by default elsewhere."""
    functions.VARIABLE.set("the caller's")
    expected = "the default" if apart else "the caller's"
    assert await runner.run(functions.read_variable) == expected


async def test_the_state_of_modules(
    runner: InferenceRunner[Model], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this process has changed in a module is seen on a thread, and not elsewhere."""
    monkeypatch.setattr(functions, "STATE", ["changed"])
    assert await runner.run(functions.read_state) == ("as imported" if apart else "changed")


async def test_calling_the_same_runner(runner: InferenceRunner[Model], apart: bool) -> None:
    """From within a call: refused on a thread; elsewhere there is no way to take it along."""
    if not apart:
        error = await raised(runner, lambda: runner.submit(functions.echo, 1))
        assert isinstance(error, ReentrantCall)
        return
    error = await raised(runner, functions.echo, runner)
    assert isinstance(error, TypeError)
    assert "pickle" in str(error)


async def test_a_reference_deep_inside(runner: InferenceRunner[Model]) -> None:
    """A reference within a list is not followed, anywhere: it arrives as a reference."""
    found = await runner.run(functions.describe_all, [runner.model.add])
    assert found == ["runner.model.add"]


async def test_a_binding_that_holds_the_gil(
    runner: InferenceRunner[Model], make: Makers, apart: bool
) -> None:
    """The event loop stands still on a thread; elsewhere it runs on, as this test shows: it is
    the loop that lets the function go on."""
    if not apart:
        return  # it would wait for itself
    entered, release = make.event(), make.event()
    future = runner.submit(functions.grab_the_gil, entered, release)
    await entered.set_async()
    await some_turns()
    assert not future.done()
    release.set()
    await until(future.done)
    assert future.result(0) == 1
