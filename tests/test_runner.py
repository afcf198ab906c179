"""The runner's public behaviour: calls, errors, limits, lifecycle, books."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import gc
import inspect
import math
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import hypothesis
import numpy as np
import psutil
import pytest
from hypothesis import strategies as st

from asgi_infer import (
    Batcher,
    CallFailed,
    DeadlineExceeded,
    Draining,
    InferenceError,
    InferenceRunner,
    NotReady,
    QueueFull,
    ReentrantCall,
    WorkerCrashed,
)

from .gates import LIMIT, Gate
from .polling import until, until_true
from .replicas import GIVE_UP, Replicas, crash, this_replica

MakeGate = Callable[[], Gate]


class Counter:
    """A model that may be used on its own thread only."""

    def __init__(self) -> None:
        self.count = 0
        self.home = threading.get_ident()

    def add(self, number: int = 1) -> int:
        """Add, on the thread that made the model."""
        assert threading.get_ident() == self.home
        self.count += number
        return self.count


@pytest.fixture
def runner() -> Iterator[InferenceRunner[None]]:
    """A runner without a model, stopped in the end."""
    with InferenceRunner[None]() as runner:
        yield runner


def fill(runner: InferenceRunner[Any], gate: Gate, waiting: int) -> list[Any]:
    """Let ``gate`` hold the runner's thread, with ``waiting`` more calls in the queue."""
    futures = [runner.submit(gate, -1)]
    gate.wait_entered()
    return futures + [runner.submit(abs, number) for number in range(waiting)]


# -- results -----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_one_thread_does_everything() -> None:
    """Loading, warming up, every call and the model's end happen on one thread."""
    places: list[tuple[str, int]] = []

    class Model:
        def __init__(self) -> None:
            places.append(("load", threading.get_ident()))

        def call(self) -> str:
            places.append(("call", threading.get_ident()))
            return threading.current_thread().name

        def __del__(self) -> None:
            places.append(("end", threading.get_ident()))

    def warmup(model: Model) -> None:
        assert isinstance(model, Model)
        places.append(("warmup", threading.get_ident()))

    async with InferenceRunner(Model, warmup=warmup, name="one") as runner:
        names = {await runner.run(runner.model.call) for _ in range(3)}
    assert names == {"one"}
    assert [what for what, _ in places] == ["load", "warmup", "call", "call", "call", "end"]
    assert len({thread for _, thread in places} - {threading.get_ident()}) == 1


@pytest.mark.anyio
async def test_arguments_and_result(runner: InferenceRunner[None]) -> None:
    """Positional arguments go straight through, keywords through a partial."""
    assert await runner.run(divmod, 7, 2) == (3, 1)
    assert await runner.run(functools.partial(int, base=2), "101") == 5


@pytest.mark.anyio
async def test_results_of_many_callers_are_not_mixed_up(runner: InferenceRunner[None]) -> None:
    """Each of a hundred callers at once gets its own result."""
    results: dict[int, int] = {}

    async def call(number: int) -> None:
        results[number] = await runner.run(abs, -number)

    async with anyio.create_task_group() as group:
        for number in range(100):
            group.start_soon(call, number)
    assert results == {number: number for number in range(100)}
    assert runner.statistics().completed == 100


def test_no_event_loop() -> None:
    """Without an event loop, ``run`` says what to use instead."""
    runner = InferenceRunner[None]()
    coroutine = runner.run(abs, -1)
    with pytest.raises(RuntimeError, match=r"runner\.submit\(func, \*args\)\.result\(\)"):
        coroutine.send(None)
    assert runner.statistics().state == "new"


# -- what the function raises ------------------------------------------------------------------


class Unprintable(Exception):
    """An error that can't be shown."""

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


class Unpicklable(Exception):
    """An error that holds a lock."""

    def __init__(self) -> None:
        super().__init__(threading.Lock())


def _cyclic() -> Exception:
    error = Exception("cyclic")
    error.__cause__ = Exception("other")
    error.__cause__.__cause__ = error
    return error


ERRORS: list[Exception] = [
    ArithmeticError("a"),
    AssertionError("b"),
    AttributeError("c"),
    BlockingIOError(11, "d"),
    BrokenPipeError(32, "e"),
    BufferError("f"),
    ConnectionResetError(104, "g"),
    EOFError("h"),
    ExceptionGroup("i", [ValueError("j")]),
    FileNotFoundError(2, "k"),
    FloatingPointError("l"),
    ImportError("m"),
    IndexError("n"),
    InterruptedError(4, "o"),
    KeyError("p"),
    LookupError("q"),
    MemoryError("r"),
    NameError("s"),
    NotImplementedError("t"),
    OSError(5, "u"),
    OverflowError("v"),
    PermissionError(13, "w"),
    RecursionError("x"),
    ReferenceError("y"),
    RuntimeError("z"),
    SyntaxError("A"),
    TimeoutError("B"),
    TypeError("C"),
    UnicodeDecodeError("utf-8", b"D", 0, 1, "bad"),
    UserWarning("E"),
    ValueError("F" * 1_000_000),
    ZeroDivisionError("G"),
    Draining("H"),
    Unprintable(),
    Unpicklable(),
    _cyclic(),
]


def raises(error: BaseException) -> None:
    """A function that fails."""
    raise error


def frames(error: BaseException) -> list[str]:
    """The names of the functions in an error's traceback."""
    return [frame.name for frame in traceback.extract_tb(error.__traceback__)]


@pytest.mark.anyio
async def test_errors_come_through_unchanged(runner: InferenceRunner[None]) -> None:
    """Any ``Exception`` reaches the caller as it is, and the thread takes the next call."""
    ident = await runner.run(threading.get_ident)
    for error in ERRORS:
        with pytest.raises(type(error)) as caught:
            await runner.run(raises, error)
        assert caught.value is error
        assert "raises" in frames(error)
        assert await runner.run(threading.get_ident) == ident
    assert runner.statistics().failed == len(ERRORS)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_stop_iteration(
    runner: InferenceRunner[None], kind: type[Exception], anyio_backend: Any
) -> None:
    """What would end a coroutine or hang a future arrives as a ``RuntimeError`` with a cause."""
    del anyio_backend
    with anyio.fail_after(LIMIT), pytest.raises(RuntimeError, match=kind.__name__) as caught:
        await runner.run(raises, kind("text"))
    assert isinstance(caught.value.__cause__, kind)


class OwnBaseException(BaseException):
    """Somebody else's."""


@pytest.mark.anyio
async def test_what_is_no_exception(runner: InferenceRunner[None]) -> None:
    """An exit, an interrupt or a foreign cancellation becomes ``CallFailed`` at the caller."""
    kinds = [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]
    for kind in [*kinds, concurrent.futures.CancelledError, OwnBaseException]:
        with pytest.raises(CallFailed, match=kind.__name__) as caught:
            await runner.run(raises, kind())
        assert isinstance(caught.value.__cause__, kind)
        assert caught.value.status_code == 500
    assert await runner.run(abs, -1) == 1


def test_cancelled_error_is_not_the_callers(runner: InferenceRunner[None]) -> None:
    """A ``CancelledError`` out of the function leaves the caller's task uncancelled."""

    async def main() -> int:
        with pytest.raises(CallFailed):
            await runner.run(raises, asyncio.CancelledError())
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    assert asyncio.run(main()) == 0


# -- what is refused ---------------------------------------------------------------------------


async def coroutine_function() -> None:
    """An async function, which must never be called."""
    raise AssertionError


def generator_function() -> Generator[int, None, None]:
    """A generator function."""
    yield 1


async def async_generator_function() -> AsyncIterator[int]:
    """An async generator function."""
    yield 1


class Awaitable:
    """Something that can be awaited, and is no coroutine."""

    def __await__(self) -> Generator[None, None, None]:
        yield


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("func", "instead"),
    [
        (coroutine_function, "a plain function"),
        (generator_function, r"stream\(\)"),
        (async_generator_function, "a plain function"),
    ],
)
async def test_lazy_functions_are_refused(
    runner: InferenceRunner[None], func: Callable[[], Any], instead: str
) -> None:
    """Async and generator functions are refused, and their bodies never run."""
    refusal = functools.partial(pytest.raises, TypeError, match=instead)
    with refusal():
        await runner.run(func)
    with refusal():
        await anyio.to_thread.run_sync(lambda: runner.submit(func).result())
    if func is not generator_function:  # of which wrap() makes a stream
        with refusal():
            runner.wrap(func)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("func", "kind"),
    [
        (lambda: coroutine_function(), "a coroutine"),
        (functools.partial(coroutine_function), "a coroutine"),
        (lambda: generator_function(), "a generator"),
        (lambda: async_generator_function(), "an async generator"),
        (Awaitable, "an awaitable"),
    ],
)
async def test_lazy_results_are_refused(
    runner: InferenceRunner[None], func: Callable[[], Any], kind: str
) -> None:
    """What a function returns unrun is closed, not passed on to run on another thread."""
    with pytest.raises(TypeError, match=f"returned {kind}"):
        await runner.run(func)
    assert await runner.run(abs, -1) == 1
    assert runner.statistics().failed == 1


@pytest.mark.anyio
async def test_what_cannot_be_called(runner: InferenceRunner[None]) -> None:
    """A result passed for a function is told from one."""
    not_callable: Any = 5
    with pytest.raises(TypeError, match=r"run\(predict, x\)"):
        await runner.run(not_callable)
    with pytest.raises(TypeError, match="callable"):
        runner.submit(not_callable)
    assert runner.statistics().submitted == 0


@pytest.mark.parametrize("load", [Counter(), 5, "text", [], object()])
def test_load_must_not_be_a_model(load: Any) -> None:
    """A ready model was made on the wrong thread, and the error says so."""
    with pytest.raises(TypeError, match="made on the wrong thread"):
        InferenceRunner(load)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load": coroutine_function}, "async function"),
        ({"load": generator_function}, "generator function"),
        ({"load": lambda x: x}, "no arguments"),
        ({"load": Counter, "warmup": 5}, "function of the model"),
        ({"load": Counter, "warmup": coroutine_function}, "async function"),
        ({"load": Counter, "warmup": lambda: None}, "take model"),
        ({"warmup": print}, "warmup needs a model"),
    ],
)
def test_unfit_load_and_warmup(arguments: dict[str, Any], message: str) -> None:
    """What can't load or warm up a model is refused when the runner is made."""
    with pytest.raises(TypeError, match=message):
        InferenceRunner(**arguments)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "8", None, math.inf])
def test_max_queue(value: Any) -> None:
    """A queue takes at least one call, and counts calls in integers."""
    with pytest.raises(ValueError, match="max_queue must be an integer of at least 1"):
        InferenceRunner(max_queue=value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1"])
def test_max_queue_bytes(value: Any) -> None:
    """A bound for the bytes is a number of bytes."""
    with pytest.raises(ValueError, match="max_queue_bytes must be an integer of at least 1"):
        InferenceRunner(max_queue_bytes=value)


def test_bytes_that_wait(gate: Gate) -> None:
    """What the arguments of waiting calls hold is bounded, seen in the statistics, and let go."""
    with InferenceRunner[None](max_queue_bytes=1000) as runner:
        runner.submit(gate, bytes(5000))
        gate.wait_entered()
        waiting = runner.submit(len, bytes(900))
        assert runner.statistics().queued_bytes == 900
        with pytest.raises(QueueFull, match="max_queue_bytes"):
            runner.submit(len, bytes(101))
        waiting.cancel()
        assert runner.statistics().queued_bytes == 0
        gate.release.set()


@pytest.mark.parametrize("value", ["", " ", None, 5])
def test_name(value: Any) -> None:
    """A name is a text."""
    with pytest.raises(ValueError, match="name must be a text"):
        InferenceRunner(name=value)


# -- time limits -------------------------------------------------------------------------------

NO_DURATIONS: list[Any] = [
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -0.0,
    0,
    0.0,
    1e308,
    10**400,
    Fraction(10**400),
    "1",
    b"1",
    "",
    [],
    (1,),
    object(),
    1j,
    Decimal(1),
]


@pytest.mark.anyio
@pytest.mark.parametrize("value", NO_DURATIONS)
async def test_unfit_timeout(value: Any) -> None:
    """What is no finite number of seconds above 0 is refused wherever a time is taken."""
    refusal = functools.partial(pytest.raises, ValueError, match="number of seconds greater than")
    runner = InferenceRunner[None]()
    with refusal():
        InferenceRunner(timeout=value)
    with refusal():
        runner.wrap(abs, timeout=value)
    with refusal():
        await runner.run(abs, -1, timeout=value)
    with refusal():
        await runner.start(timeout=value)
    assert runner.statistics().state == "new"


@hypothesis.given(st.floats())
def test_any_float_as_timeout(value: float) -> None:
    """A float is either a duration that a lock can wait for, or refused."""
    fits = 0 < value <= threading.TIMEOUT_MAX
    try:
        InferenceRunner(timeout=value)
    except ValueError:
        assert not fits
    else:
        assert fits


@pytest.mark.anyio
@pytest.mark.parametrize(
    "value", [30, 30.0, Fraction(61, 2), np.float32(30), threading.TIMEOUT_MAX]
)
async def test_fitting_timeout(runner: InferenceRunner[None], value: Any) -> None:
    """Any real number of seconds will do, up to the longest that a lock can wait."""
    assert await runner.run(abs, -1, timeout=value) == 1


@pytest.mark.anyio
async def test_the_call_s_timeout_goes_before_the_runner_s(gate: Gate) -> None:
    """A call's own timeout replaces the runner's, whether longer or shorter."""
    async with InferenceRunner[None](timeout=0.05) as runner:
        with pytest.raises(DeadlineExceeded):
            await runner.run(gate, 1)
        gate.release.set()
        await runner.wait_idle()
        await runner.run(time.sleep, 0.1, timeout=LIMIT)
    assert runner.statistics().completed == 1


def test_submitted_calls_have_the_runner_s_timeout(gate: Gate) -> None:
    """``result()`` waits no longer than the runner's timeout, without one of its own."""
    with InferenceRunner[None](timeout=0.2) as runner:
        anyio.run(runner.start)
        future = runner.submit(gate, 1)
        with pytest.raises(DeadlineExceeded) as caught:
            future.result()
        assert caught.value.started
        gate.release.set()
    assert runner.statistics().late == 1


# -- the queue ---------------------------------------------------------------------------------


@pytest.mark.unmeasured
def test_ten_thousand_calls_and_room_for_sixty_four(gate: Gate) -> None:
    """What doesn't fit is refused at once, in exact numbers; what was accepted runs."""
    with InferenceRunner[None](max_queue=64) as runner:
        fill(runner, gate, 64)
        refusals = []
        for _ in range(10_000):
            try:
                runner.submit(abs, -1)
            except QueueFull as error:
                refusals.append(error)
        assert len(refusals) == 10_000
        assert runner.statistics().rejected == 10_000
        assert runner.statistics().queued == 64
        gate.release.set()
    assert runner.statistics().completed == 65
    assert all(error.status_code == 503 for error in refusals)
    assert all(1 <= (error.retry_after or 0) <= 60 for error in refusals)


def test_retry_after_is_computed(gate: Gate) -> None:
    """``Retry-After`` is what the calls ahead will take, or up to half of it and 3 s more."""
    with InferenceRunner[None](max_queue=10) as runner:
        runner.submit(time.sleep, 0.5).result()
        fill(runner, gate, 10)
        waits = []
        for _ in range(30):
            with pytest.raises(QueueFull) as caught:
                runner.submit(abs, -1)
            waits.append(caught.value.retry_after or 0.0)
            assert caught.value.headers == {"Retry-After": str(math.ceil(waits[-1]))}
        gate.release.set()
    assert all(5 <= wait <= 1.5 * 5.8 + 3 for wait in waits)  # ten calls of half a second
    assert len(set(waits)) > 1


@pytest.mark.anyio
async def test_priorities(runner: InferenceRunner[None], gate: Gate) -> None:
    """Lower runs sooner; first come, first served within one priority."""
    order: list[tuple[int, int]] = []

    async def call(priority: int, number: int) -> None:
        await runner.run(order.append, (priority, number), priority=priority)

    arrivals = [(priority, number) for number in range(3) for priority in (5, 0, -5, 10**9)]
    async with anyio.create_task_group() as group:
        group.start_soon(runner.run, gate, None)
        await gate.entered_async()
        for queued, (priority, number) in enumerate(arrivals, 1):
            group.start_soon(call, priority, number)
            await until_queued(runner, queued)
        gate.release.set()
    assert order == sorted(arrivals)


async def until_queued(runner: InferenceRunner[Any], count: int) -> None:
    """Let the tasks that were just started get as far as the queue."""
    with anyio.fail_after(LIMIT):
        while runner.statistics().queued < count:
            await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
@pytest.mark.parametrize("priority", [None, "", "high", 0.5, [], {}, math.nan])
async def test_unfit_priority(runner: InferenceRunner[None], priority: Any) -> None:
    """A priority is an integer: anything else is refused, and harms no other call."""
    with pytest.raises(ValueError, match="priority must be an integer"):
        await runner.run(abs, -1, priority=priority)
    assert await runner.run(abs, -1, priority=1) == 1
    assert runner.statistics().submitted == 1


# -- contexts ----------------------------------------------------------------------------------

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@pytest.mark.anyio
async def test_context_variables(runner: InferenceRunner[None]) -> None:
    """A function sees its caller's context variables; what it sets stays its own."""
    seen: list[str] = []

    def call() -> str:
        before = variable.get()
        variable.set("set by the function")
        return before

    async def caller(text: str) -> None:
        variable.set(text)
        for _ in range(3):
            seen.append(await runner.run(call))
            assert variable.get() == text

    async with anyio.create_task_group() as group:
        for text in "abc":
            group.start_soon(caller, text)
    assert sorted(seen) == sorted("abc" * 3)
    assert runner.submit(variable.get).result() == "unset"


# -- memory ------------------------------------------------------------------------------------


class Thing:
    """Something that can be weakly referred to."""


def fails_with(thing: Thing) -> None:
    """Raise an error that holds ``thing``, and is held by nothing but its traceback's reader."""
    raise ValueError(thing)


@pytest.mark.anyio
async def test_nothing_is_kept_alive(runner: InferenceRunner[None]) -> None:
    """Arguments, results and errors go when the caller lets go of them, without a collection."""
    gc.collect()
    gc.disable()
    try:
        for func in (lambda thing: thing, fails_with):
            thing = Thing()
            reference = weakref.ref(thing)
            try:
                await runner.run(func, thing)
            except ValueError:
                pass
            del thing
            await runner.run(abs, -1)  # the thread has let go of the one before by then
            assert reference() is None
    finally:
        gc.enable()


def test_nothing_submitted_is_kept_alive(runner: InferenceRunner[None]) -> None:
    """The same for ``submit``, and for a call that was cancelled while it waited."""
    gc.collect()
    gc.disable()
    try:
        thing = Thing()
        reference = weakref.ref(thing)
        assert runner.submit(lambda thing: thing, thing).result() is thing
        gate = Gate()
        holding = runner.submit(gate, 1)
        gate.wait_entered()
        waiting = runner.submit(id, thing)
        assert waiting.cancel()
        del thing
        assert reference() is None
        gate.release.set()
        holding.result()
    finally:
        gc.enable()


@pytest.mark.unmeasured
def test_large_results_do_not_pile_up(runner: InferenceRunner[None]) -> None:
    """A thousand results of ten megabytes leave the process no larger than ten of them."""

    def serve(calls: int) -> int:
        for _ in range(calls):
            runner.submit(np.zeros, 10_000_000, np.uint8).result()
        return int(psutil.Process().memory_info().rss)

    before = serve(10)
    assert serve(1_000) - before < 50_000_000


# -- loops and threads -------------------------------------------------------------------------


def test_many_loops_one_after_another(runner: InferenceRunner[None]) -> None:
    """One runner serves loop after loop: asyncio, then trio, then asyncio again ..."""
    idents = {
        anyio.run(runner.run, threading.get_ident, backend=backend)
        for backend in ("asyncio", "trio") * 10
    }
    assert len(idents) == 1
    assert runner.statistics().completed == 20


@pytest.mark.unmeasured
def test_two_loops_and_a_thread_at_once(runner: InferenceRunner[None]) -> None:
    """Every result reaches its own loop: two of asyncio, one of trio, and synchronous callers."""
    results: dict[str, list[int]] = {}

    async def many(name: str) -> None:
        results[name] = []

        async def some(start: int) -> None:
            for number in range(start, start + 100):
                results[name].append(await runner.run(abs, -number))

        async with anyio.create_task_group() as group:
            for start in range(0, 1_000, 100):
                group.start_soon(some, start)

    def synchronous() -> None:
        results["sync"] = [runner.submit(abs, -number).result() for number in range(1_000)]

    threads = [
        threading.Thread(target=lambda: anyio.run(many, "one")),
        threading.Thread(target=lambda: anyio.run(many, "two")),
        threading.Thread(target=lambda: anyio.run(many, "three", backend="trio")),
        threading.Thread(target=synchronous),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * LIMIT)
    assert sorted(results) == ["one", "sync", "three", "two"]
    assert all(sorted(numbers) == list(range(1_000)) for numbers in results.values())


@pytest.mark.parametrize("loops", ["asyncio", "uvloop"])
def test_loop_closed_while_a_call_runs(
    runner: InferenceRunner[None], gate: Gate, loops: str
) -> None:
    """A result that nobody's loop is left for is dropped in silence; other loops are served."""
    if loops == "uvloop":
        loop: asyncio.AbstractEventLoop = pytest.importorskip("uvloop").new_event_loop()
    else:
        loop = asyncio.new_event_loop()

    async def begin() -> list[asyncio.Task[int]]:
        running = asyncio.create_task(runner.run(gate, 1))
        await gate.entered_async()
        waiting = asyncio.create_task(runner.run(abs, -1))
        await until_queued(runner, 1)
        return [running, waiting]

    tasks = loop.run_until_complete(begin())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    gate.release.set()
    assert asyncio.run(runner.run(abs, -2)) == 2
    assert runner.statistics().completed == 3
    assert not any(task.done() for task in tasks)
    abandon(tasks)


def abandon(tasks: list[asyncio.Task[int]]) -> None:
    """Let tasks of a closed loop go, which would complain that they are pending."""
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own switch
        coroutine: Any = task.get_coro()
        coroutine.close()


def test_trio_run_that_ends_while_a_call_runs(runner: InferenceRunner[None], gate: Gate) -> None:
    """The same on trio, whose run cancels the caller before it ends."""

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(runner.run, gate, 1)
            await gate.entered_async()
            group.cancel_scope.cancel()

    anyio.run(main, backend="trio")
    gate.release.set()
    assert anyio.run(runner.run, abs, -2, backend="trio") == 2
    assert runner.statistics().late == 1


# -- re-entry ----------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_reentrant_call(runner: InferenceRunner[None]) -> None:
    """A call that calls its own runner fails at once, instead of waiting for itself."""
    inner: list[Callable[[], Any]] = [
        lambda: runner.submit(abs, -1),
        lambda: asyncio.run(runner.run(abs, -1)),
        lambda: list(runner.map(abs, [-1])),
    ]
    with anyio.fail_after(LIMIT):
        for func in inner:
            with pytest.raises(ReentrantCall, match="call the function directly instead"):
                await runner.run(func)
    assert issubclass(ReentrantCall, RuntimeError)
    assert runner.statistics().submitted == len(inner)


@pytest.mark.anyio
async def test_calling_another_runner(runner: InferenceRunner[None]) -> None:
    """One runner's call may wait for another runner's."""
    async with InferenceRunner[None](name="other") as other:
        assert await runner.run(lambda: other.submit(abs, -1).result()) == 1


# -- the model's reference ---------------------------------------------------------------------


@pytest.mark.anyio
async def test_model_reference() -> None:
    """``runner.model`` and what is reached from it stand for the model on its thread."""
    async with InferenceRunner(Counter) as runner:
        assert await runner.run(runner.model.add, 5) == 5
        assert await runner.run(lambda model: model.count, runner.model) == 5
        assert await runner.run(functools.partial(runner.model.add, number=2)) == 7
        with pytest.raises(RuntimeError, match=r"await runner\.run\(runner\.model\.add, \.\.\.\)"):
            runner.model.add(1)


def test_no_model() -> None:
    """A runner made without ``load`` has no model."""
    with pytest.raises(RuntimeError, match=r"InferenceRunner\(load\)"):
        _ = InferenceRunner[None]().model


# -- wrap --------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_wrap() -> None:
    """A wrapped function keeps its name and signature, and takes keywords."""

    def scale(x: int, *, factor: int = 2) -> int:
        """Multiply."""
        return x * factor

    async with InferenceRunner[None]() as runner:
        wrapped = runner.wrap(scale)
        assert await wrapped(3) == 6
        assert await wrapped(3, factor=5) == 15
    assert wrapped.__name__ == "scale"
    assert wrapped.__doc__ == "Multiply."
    assert inspect.signature(wrapped) == inspect.signature(scale)
    assert inspect.iscoroutinefunction(wrapped)


@pytest.mark.anyio
async def test_wrap_as_decorator_and_of_the_model() -> None:
    """``wrap`` decorates, and binds a method of the model."""
    runner = InferenceRunner(Counter)

    @runner.wrap
    def double(x: int) -> int:
        return 2 * x

    add = runner.wrap(runner.model.add, priority=-1)
    async with runner:
        assert await double(4) == 8
        assert await add(4) == 4


@pytest.mark.anyio
async def test_wrap_with_timeout(runner: InferenceRunner[None], gate: Gate) -> None:
    """A timeout given to ``wrap`` holds for every call."""
    with pytest.raises(DeadlineExceeded):
        await runner.wrap(lambda: gate(1), timeout=0.05)()
    gate.release.set()


# -- statistics --------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_statistics(gate: Gate) -> None:
    """Every figure counts what its name says, in one frozen snapshot."""
    runner = InferenceRunner[None](max_queue=1)
    assert runner.statistics().state == "new"
    async with runner:
        assert runner.statistics().state == "ready"
        await runner.run(time.sleep, 0.01)
        with pytest.raises(ValueError, match="no"):
            await runner.run(raises, ValueError("no"))
        fill(runner, gate, 1)
        with pytest.raises(QueueFull):
            await runner.run(abs, -1)
        now = runner.statistics()
        assert (now.submitted, now.completed, now.failed, now.rejected) == (5, 1, 1, 1)
        assert (now.queued, now.running, now.late) == (1, 1, 0)
        assert 0.005 < now.service_time < LIMIT
        with pytest.raises(AttributeError):
            now.queued = 0  # type: ignore[misc]  # frozen, as the test shows
        gate.release.set()
    assert runner.statistics().state == "closed"
    assert repr(runner) == "<InferenceRunner 'inference' closed>"
    assert repr(InferenceRunner(name="x")) == "<InferenceRunner 'x' new>"


# -- lifecycle ---------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_lazy_start() -> None:
    """Without a start, the first call starts the runner."""
    runner = InferenceRunner(Counter)
    assert await runner.run(runner.model.add, 1) == 1
    assert runner.statistics().state == "ready"
    await runner.aclose()


@pytest.mark.anyio
async def test_start_and_stop_are_idempotent() -> None:
    """Starting what has started and stopping what has stopped, or never started, do nothing."""
    loads: list[int] = []
    runner = InferenceRunner(lambda: loads.append(1))
    await runner.aclose()
    runner.shutdown()
    assert runner.statistics().state == "new"
    for _ in range(2):
        await runner.start()
    for _ in range(2):
        await runner.aclose()
        runner.shutdown()
    assert loads == [1]
    assert runner.statistics().state == "closed"


@pytest.mark.anyio
async def test_restart() -> None:
    """A stopped runner refuses calls until it is started again; then it loads a new model."""
    runner = InferenceRunner(Counter)
    for _ in range(3):
        await runner.start()
        assert await runner.run(runner.model.add, 1) == 1
        await runner.aclose()
        with pytest.raises(Draining, match=r"await runner\.start\(\)"):
            await runner.run(abs, -1)
    assert runner.statistics().completed == 3
    assert runner.statistics().rejected == 3


@pytest.mark.anyio
async def test_restart_while_stopping(gate: Gate) -> None:
    """A runner started again while old calls drain loads after they have ended: never two."""
    events: list[str] = []

    class Model:
        def __init__(self) -> None:
            events.append("load")

        def __del__(self) -> None:
            events.append("end")

    runner = InferenceRunner(Model)
    await runner.start()
    futures = fill(runner, gate, 2)
    async with anyio.create_task_group() as group:
        group.start_soon(runner.aclose)
        while runner.statistics().state != "draining":
            await anyio.lowlevel.checkpoint()
        group.start_soon(runner.start)
        while runner.statistics().state != "loading":
            await anyio.lowlevel.checkpoint()
        now = runner.statistics()
        assert (now.submitted, now.queued, now.running) == (3, 2, 1)
        assert events == ["load"]
        gate.release.set()
    assert [future.result(LIMIT) for future in futures] == [-1, 0, 1]
    assert events == ["load", "end", "load"]
    await runner.aclose()


@pytest.mark.anyio
async def test_two_users() -> None:
    """The first user starts the runner, and the last to leave stops it."""
    runner = InferenceRunner[None]()
    async with runner:
        async with runner:
            assert await runner.run(abs, -1) == 1
        async with runner.opened():
            assert await runner.run(abs, -1) == 1
        assert runner.statistics().state == "ready"
        assert await runner.run(abs, -1) == 1
    assert runner.statistics().state == "closed"


@pytest.mark.anyio
async def test_two_users_of_a_model_that_does_not_load(gate: Gate) -> None:
    """Each of several users hears why there is no model, and none of them counts as one."""

    def load() -> None:
        gate(None)
        fails_to_load()

    async def use() -> None:
        with pytest.raises(LoadError):
            async with own:
                raise AssertionError

    own = InferenceRunner(load)
    async with anyio.create_task_group() as group:
        group.start_soon(use)
        group.start_soon(use)
        await gate.entered_async()
        gate.release.set()
    assert gate.entries == 1
    assert own._users == 0


@pytest.mark.anyio
async def test_two_starts_at_once() -> None:
    """Two who start a runner at once wait for one and the same load."""
    loads: list[int] = []
    gate = Gate()
    runner = InferenceRunner(lambda: loads.append(gate(1)))
    async with anyio.create_task_group() as group:
        group.start_soon(runner.start)
        group.start_soon(runner.start)
        await gate.entered_async()
        assert runner.statistics().state == "loading"
        gate.release.set()
    assert loads == [1]
    await runner.aclose()


@pytest.mark.anyio
async def test_lifespan_state() -> None:
    """``runner.lifespan`` keeps the runner started, and yields it under its name."""
    runner = InferenceRunner[None](name="ocr")
    async with runner.lifespan(object()) as state:
        assert runner.statistics().state == "ready"
        assert state == {"asgi_infer": {"ocr": runner}, "asgi_infer.ocr": runner}
    assert runner.statistics().state == "closed"


class LoadError(Exception):
    """A model that doesn't load."""


def fails_to_load() -> None:
    """A factory that fails."""
    raise LoadError("no weights")


@pytest.mark.anyio
async def test_load_failure() -> None:
    """What ``load`` raises is what ``start`` raises; calls get ``NotReady``; a retry may work."""
    attempts: list[int] = []

    def load() -> str:
        attempts.append(1)
        if len(attempts) < 3:
            fails_to_load()
        return "model"

    runner = InferenceRunner(load)
    with pytest.raises(LoadError, match="no weights"):
        await runner.start()
    with pytest.raises(NotReady, match="LoadError: no weights") as caught:
        await runner.run(abs, -1)
    assert caught.value.status_code == 503
    assert "weights" not in caught.value.detail
    assert runner.statistics().state == "failed"
    with pytest.raises(LoadError):
        async with runner:
            raise AssertionError
    async with runner:
        assert await runner.run(str.upper, runner.model) == "MODEL"
    assert len(attempts) == 3


@pytest.mark.anyio
async def test_load_failure_with_calls_waiting(gate: Gate) -> None:
    """Calls that wait for a model that then fails to load get ``NotReady``."""

    def load() -> None:
        gate(None)
        fails_to_load()

    runner = InferenceRunner(load)
    futures = [runner.submit(abs, -1) for _ in range(3)]
    gate.wait_entered()
    gate.release.set()
    for future in futures:
        with pytest.raises(NotReady, match="no weights"):
            future.result(LIMIT)
    assert runner.statistics().cancelled == 3


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, StopIteration])
async def test_load_that_exits(kind: type[BaseException]) -> None:
    """A load that wants to end the program ends only itself."""
    runner = InferenceRunner(functools.partial(raises, kind("why")))
    with pytest.raises(RuntimeError if kind is StopIteration else CallFailed) as caught:
        await runner.start()
    assert isinstance(caught.value.__cause__, kind)


@pytest.mark.anyio
async def test_warmup_failure() -> None:
    """A warm-up that fails is a start that fails, and the model is destroyed."""
    ends: list[int] = []

    class Model:
        def __del__(self) -> None:
            ends.append(threading.get_ident())

    idents: list[int] = []

    def warmup(model: Model) -> None:
        idents.append(threading.get_ident())
        raise ValueError("cold")

    runner = InferenceRunner(Model, warmup=warmup)
    with pytest.raises(ValueError, match="cold"):
        async with runner:
            raise AssertionError
    assert ends == idents


@pytest.mark.anyio
async def test_load_that_takes_too_long(gate: Gate) -> None:
    """A start with a time limit gives up on a load that hangs; waiting calls are let go."""
    runner = InferenceRunner(functools.partial(gate, 1))
    future = runner.submit(abs, -1)
    with pytest.raises(NotReady, match=r"did not load in 0\.05 s"):
        await runner.start(timeout=0.05)
    with pytest.raises(Draining):
        future.result(LIMIT)
    gate.release.set()
    await runner.aclose()
    async with runner:
        assert await runner.run(str, runner.model) == "1"


@pytest.mark.anyio
async def test_a_load_that_hangs_does_not_get_the_grace(gate: Gate) -> None:
    """Opening a runner whose load hangs fails after the start's time limit, not the grace."""
    runner = InferenceRunner(functools.partial(gate, 1))
    with anyio.fail_after(LIMIT), pytest.raises(NotReady):
        async with runner.opened(startup_timeout=0.05, grace=10 * LIMIT):
            raise AssertionError
    gate.release.set()


@pytest.mark.anyio
async def test_load_that_times_out_by_itself() -> None:
    """A ``TimeoutError`` of the load's own is not taken for the start's."""
    error = TimeoutError("download")
    with pytest.raises(TimeoutError, match="download") as caught:
        await InferenceRunner(functools.partial(raises, error)).start(timeout=LIMIT)
    assert caught.value is error


@pytest.mark.anyio
async def test_cancelled_start(gate: Gate) -> None:
    """A start that is cancelled leaves the thread loading; a later start waits for the same."""
    runner = InferenceRunner(functools.partial(gate, 1))
    async with anyio.create_task_group() as group:
        group.start_soon(runner.start)
        await gate.entered_async()
        group.cancel_scope.cancel()
    assert runner.statistics().state == "loading"
    gate.release.set()
    await runner.start()
    assert gate.entries == 1
    await runner.aclose()


@pytest.mark.anyio
async def test_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no thread, calls get ``NotReady``, and later calls a new attempt."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    runner = InferenceRunner[None]()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(NotReady, match="can't start new thread"):
            await runner.start()
        with pytest.raises(NotReady):
            await runner.run(abs, -1)
    assert await runner.run(abs, -1) == 1
    await runner.aclose()


@pytest.mark.anyio
async def test_wait_idle(runner: InferenceRunner[None], gate: Gate) -> None:
    """``wait_idle`` returns when nothing waits or runs, and at once if that is so already."""
    await runner.wait_idle()
    futures = fill(runner, gate, 3)
    with anyio.move_on_after(0.05) as scope:
        await runner.wait_idle()
    assert scope.cancelled_caught
    async with anyio.create_task_group() as group:
        group.start_soon(runner.wait_idle)
        await anyio.lowlevel.checkpoint()
        gate.release.set()
    assert all(future.done() for future in futures)
    await runner.wait_idle()


@pytest.mark.anyio
async def test_wait_idle_before_start() -> None:
    """A runner that was never used is idle."""
    await InferenceRunner[None]().wait_idle()


@pytest.mark.parametrize("grace", [math.nan, "1", None, []])
def test_unfit_grace(grace: Any) -> None:
    """A grace that is no number is refused, and the runner stays as it was."""

    async def main() -> None:
        async with InferenceRunner[None]() as runner:
            with pytest.raises(ValueError, match="grace"):
                await runner.aclose(grace=grace)
            assert await runner.run(abs, -1) == 1

    asyncio.run(main())


@pytest.mark.anyio
@pytest.mark.parametrize("grace", [-1, 0, math.inf])
async def test_extreme_grace(grace: float) -> None:
    """No grace at all and any amount of it are fine."""
    runner = InferenceRunner[None]()
    await runner.start()
    await runner.aclose(grace=grace)
    await anyio.to_thread.run_sync(runner.shutdown)
    assert runner.statistics().state == "closed"


@pytest.mark.unmeasured
def test_two_hundred_starts_and_stops() -> None:
    """Starting and stopping leaves threads, descriptors and memory as they were."""
    process = psutil.Process()

    def resources() -> tuple[int, int]:
        threads = [thread for thread in threading.enumerate() if thread.name == "inference"]
        for thread in threads:  # they have stopped, and may be on their last instructions
            thread.join(LIMIT)
        return sum(thread.is_alive() for thread in threads), process.num_fds()

    async def cycle(runner: InferenceRunner[Any]) -> None:
        async with runner:
            assert await runner.run(runner.model.add, 1) == 1

    async def cycles(count: int) -> int:
        runner = InferenceRunner(Counter)
        for _ in range(count // 2):
            await cycle(runner)
            await cycle(InferenceRunner(Counter))
        return int(process.memory_info().rss)

    async def main() -> None:
        small, before = await cycles(20), resources()
        assert await cycles(200) - small < 10_000_000
        assert resources() == before

    asyncio.run(main())


def test_in_a_forked_child(gate: Gate) -> None:
    """In a forked child a runner is as new; what the parent has begun there ends for nobody."""
    runner = InferenceRunner[None]()
    futures = fill(runner, gate, 1)
    parent = runner._thread
    assert parent is not None
    runner._after_fork()
    for future in futures:
        with pytest.raises(Draining, match="parent process"):
            future.result(0)
    assert runner.statistics().state == "new"
    assert runner.submit(abs, -1).result(LIMIT) == 1
    InferenceRunner[None]()._after_fork()  # nor does one mind that was never started
    runner.shutdown()
    gate.release.set()
    parent.stop_soon()
    assert parent.join(LIMIT)


def test_resource_warning() -> None:
    """A runner that goes away unstopped says so, and its thread ends."""
    runner = InferenceRunner[None](name="forgotten")
    thread: threading.Thread = runner.submit(threading.current_thread).result()
    with pytest.warns(ResourceWarning, match="'forgotten' ready> was not stopped"):
        del runner
    thread.join(LIMIT)
    assert not thread.is_alive()


def test_no_resource_warning() -> None:
    """A runner that was stopped, never started, or never quite made, goes in silence."""
    InferenceRunner[None]()
    with InferenceRunner[None]() as runner:
        runner.submit(abs, -1).result()
    del runner
    with pytest.raises(ValueError, match="name"):
        InferenceRunner[None](name="")


def test_import_starts_nothing() -> None:
    """Making a runner starts no thread."""
    before = threading.active_count()
    InferenceRunner(Counter)
    assert threading.active_count() == before


# -- as an executor, like the standard library's -----------------------------------------------

MakeExecutor = Callable[[], concurrent.futures.Executor]


@pytest.fixture(params=["runner", "standard"])
def executor(request: pytest.FixtureRequest) -> Iterator[concurrent.futures.Executor]:
    """A runner, and what it must not differ from."""
    made: concurrent.futures.Executor = InferenceRunner[None]()
    if request.param == "standard":
        made = concurrent.futures.ThreadPoolExecutor(1)
    with made as executor:
        yield executor


def test_submit(executor: concurrent.futures.Executor) -> None:
    """``submit`` takes arguments and keywords, and its future has the result or the error."""
    assert executor.submit(int, "101", base=2).result(LIMIT) == 5
    error = ValueError("no")
    failed = executor.submit(raises, error)
    assert failed.exception(LIMIT) is error
    with pytest.raises(ValueError, match="no"):
        failed.result()
    assert not failed.cancelled()


def test_future_states(executor: concurrent.futures.Executor, gate: Gate) -> None:
    """A future knows whether it runs, is done, and was cancelled; a started one can't be."""
    first = executor.submit(gate, 1)
    gate.wait_entered()
    second, third = executor.submit(abs, -2), executor.submit(abs, -3)
    assert (first.running(), first.done(), first.cancel()) == (True, False, False)
    assert (second.running(), second.done(), second.cancel()) == (False, False, True)
    assert (second.cancelled(), second.done(), second.cancel()) == (True, True, True)
    with pytest.raises(concurrent.futures.CancelledError):
        second.result()
    with pytest.raises(concurrent.futures.CancelledError):
        second.exception()
    gate.release.set()
    assert (first.result(LIMIT), third.result(LIMIT)) == (1, 3)
    assert (third.running(), third.done(), third.cancel(), third.cancelled()) == (
        *(False, True, False, False),
    )


def test_result_in_time(executor: concurrent.futures.Executor, gate: Gate) -> None:
    """``result(timeout)`` gives up waiting, and the call goes on."""
    future = executor.submit(gate, 1)
    for method in (future.result, future.exception):
        with pytest.raises(TimeoutError):
            method(0.01)
    gate.release.set()
    assert future.result(LIMIT) == 1


def test_done_callbacks(executor: concurrent.futures.Executor, gate: Gate) -> None:
    """Callbacks are called once: when done, at once if done already, and when cancelled."""
    called: list[str] = []
    first = executor.submit(gate, 1)
    gate.wait_entered()
    cancelled = executor.submit(abs, -1)
    first.add_done_callback(lambda _: called.append("first"))
    cancelled.add_done_callback(lambda _: called.append("cancelled"))
    cancelled.cancel()
    gate.release.set()
    executor.submit(abs, -1).result(LIMIT)
    first.add_done_callback(lambda _: called.append("late"))
    assert called == ["cancelled", "first", "late"]


def test_wait_and_as_completed(executor: concurrent.futures.Executor, gate: Gate) -> None:
    """The functions that wait for several futures see results and cancellations."""
    futures = [executor.submit(gate, 1), executor.submit(abs, -2), executor.submit(abs, -3)]
    gate.wait_entered()
    futures[1].cancel()
    assert concurrent.futures.wait(futures, 0).not_done >= {futures[0], futures[2]}
    gate.release.set()
    assert set(concurrent.futures.as_completed(futures, LIMIT)) == set(futures)


def test_map(executor: concurrent.futures.Executor) -> None:
    """``map`` gives results in order, takes several iterables, and raises when it gets there."""
    assert list(executor.map(pow, [2, 3, 4], [5, 6])) == [32, 729]
    results = executor.map(lambda x: 1 // x, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(executor.map(abs, [])) == []


def test_map_in_time(executor: concurrent.futures.Executor, gate: Gate) -> None:
    """``map`` with a timeout gives up, and cancels what has not started."""
    results = executor.map(gate, [1, 2, 3], timeout=0.05)
    gate.wait_entered()
    with pytest.raises(TimeoutError):
        next(results)
    gate.release.set()
    executor.shutdown()
    assert gate.entries == 1


@pytest.mark.parametrize("cancel", [False, True])
def test_shutdown(executor: concurrent.futures.Executor, gate: Gate, cancel: bool) -> None:
    """``shutdown`` refuses what is new; what was accepted runs, unless it is to be cancelled."""
    first = executor.submit(gate, 1)
    gate.wait_entered()
    second = executor.submit(abs, -2)
    executor.shutdown(wait=False, cancel_futures=cancel)
    with pytest.raises(RuntimeError):
        executor.submit(abs, -3)
    gate.release.set()
    executor.shutdown()
    assert first.result(0) == 1
    assert second.cancelled() is cancel
    assert cancel or second.result(0) == 2


def test_run_in_executor(executor: concurrent.futures.Executor, gate: Gate) -> None:
    """A loop's ``run_in_executor`` returns results and cancels what waits."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(executor, abs, -1) == 1
        holding = loop.run_in_executor(executor, gate, 2)
        await gate.entered_async()
        waiting = loop.run_in_executor(executor, gate, 3)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)  # the loop tells the executor at its next turn
        gate.release.set()
        assert await holding == 2

    asyncio.run(main())
    assert gate.entries == 1


def test_map_waits_for_room(gate: Gate) -> None:
    """``map`` over more than the queue takes waits for room, and loses nothing."""
    with InferenceRunner[None](max_queue=3) as runner:
        assert list(runner.map(abs, range(-100, 0))) == list(range(100, 0, -1))
        assert runner.statistics().rejected == 0


def test_map_beside_other_callers(make_gate: MakeGate) -> None:
    """``map`` waits for room when others fill the queue; with nothing to wait for it says so."""
    first, second = make_gate(), make_gate()
    with InferenceRunner[None](max_queue=2) as runner:
        fill(runner, first, 2)
        with pytest.raises(QueueFull):
            runner.map(abs, [-1])
        first.release.set()
        asyncio.run(runner.wait_idle())

        def numbers() -> Iterator[int]:
            yield -1  # map's first holds the thread ...
            second.wait_entered()
            others.extend(runner.submit(abs, -9) for _ in range(2))  # ... others fill the queue
            second.release.set()
            yield -2

        others: list[concurrent.futures.Future[int]] = []
        assert list(runner.map(second, numbers())) == [-1, -2]
        assert [other.result(LIMIT) for other in others] == [9, 9]


def test_other_callers_are_not_cancelled_by_shutdown(gate: Gate) -> None:
    """``shutdown(cancel_futures=True)`` cancels futures; an awaited call still runs."""

    async def main() -> None:
        runner = InferenceRunner[None]()
        holding = runner.submit(gate, 1)
        await gate.entered_async()
        awaited = asyncio.create_task(runner.run(abs, -2))
        await until_queued(runner, 1)
        waiting = runner.submit(abs, -3)
        runner.shutdown(wait=False, cancel_futures=True)
        gate.release.set()
        assert await awaited == 2
        assert (holding.result(LIMIT), waiting.cancelled()) == (1, True)
        runner.shutdown()

    asyncio.run(main())


# -- errors ------------------------------------------------------------------------------------


def test_every_refusal_is_an_inference_error(gate: Gate) -> None:
    """One base class, which Starlette answers with a status, for all that a runner refuses."""
    with InferenceRunner[None](max_queue=1) as runner:
        fill(runner, gate, 1)
        with pytest.raises(InferenceError) as full:
            runner.submit(abs, -1)
        gate.release.set()
    with pytest.raises(InferenceError) as draining:
        runner.submit(abs, -1)
    assert [type(caught.value) for caught in (full, draining)] == [QueueFull, Draining]
    assert all(1 <= (caught.value.retry_after or 0) <= 60 for caught in (full, draining))


# -- several replicas --------------------------------------------------------------------------


@pytest.fixture
def worker() -> Replicas:
    """Two replicas, which come back at once when they are lost."""
    return Replicas(2)


def fill_all(runner: InferenceRunner[Any], gates: list[Gate]) -> list[Any]:
    """Let each gate hold one of the runner's threads."""
    futures = [runner.submit(gate, None) for gate in gates]
    for gate in gates:
        gate.wait_entered()
    return futures


@pytest.mark.anyio
async def test_calls_run_at_once(worker: Replicas, make_gate: MakeGate) -> None:
    """As many as there are replicas; the others wait, and all of it is in the books."""
    gates = [make_gate() for _ in range(3)]
    async with InferenceRunner[None](worker=worker) as runner:
        async with anyio.create_task_group() as tasks:
            for gate in gates:
                tasks.start_soon(runner.run, gate, None)
            await until(lambda: sum(gate.entries for gate in gates) == 2)
            now = runner.statistics()
            assert (now.running, now.queued, now.state) == (2, 1, "ready")
            for gate in gates:
                gate.release.set()
        now = runner.statistics()
        assert (now.completed, now.running, now.restarts) == (3, 0, 0)
    assert worker.most == 2
    assert runner.statistics().state == "closed"


@pytest.mark.anyio
async def test_crashes_are_counted(worker: Replicas) -> None:
    """Whoever made the call is told, others are served, and each crash is one restart."""
    async with InferenceRunner[None](worker=worker) as runner:
        for _ in range(3):
            with pytest.raises(WorkerCrashed):
                await runner.run(crash)
            assert await runner.run(abs, -3) == 3
        await until(lambda: runner.statistics().restarts == 3)
        now = runner.statistics()
        assert (now.failed, now.completed, now.state) == (3, 3, "ready")


@pytest.mark.anyio
async def test_wait_idle_with_several(worker: Replicas, make_gate: MakeGate) -> None:
    """``wait_idle`` waits for the calls of all replicas, and for no model to come back."""
    gates = [make_gate(), make_gate()]
    loading = make_gate()
    async with InferenceRunner[None](worker=worker) as runner:
        fill_all(runner, gates)
        gates[0].release.set()
        with anyio.move_on_after(0.02) as scope:
            await runner.wait_idle()
        assert scope.cancelled_caught
        gates[1].release.set()
        await runner.wait_idle()
        worker.opening = lambda number: loading(None)
        with pytest.raises(WorkerCrashed):
            await runner.run(crash)
        await runner.wait_idle()
        await loading.entered_async()
        loading.release.set()


@pytest.mark.anyio
async def test_reentry_from_any_thread(worker: Replicas) -> None:
    """A call that calls its own runner is told, whichever replica it runs on, although another
    might be free: with one call more than there are threads all would wait for each other."""

    async with InferenceRunner[None](worker=worker) as runner:
        together = threading.Barrier(2)

        def call_again() -> int:
            together.wait(LIMIT)
            with pytest.raises(ReentrantCall):
                runner.submit(abs, -3)
            return this_replica().number

        futures = [runner.submit(call_again) for _ in range(2)]
        numbers = [await anyio.to_thread.run_sync(future.result, LIMIT) for future in futures]
        assert sorted(numbers) == [0, 1]


@pytest.mark.anyio
async def test_one_replica_does_not_load(worker: Replicas, make_gate: MakeGate) -> None:
    """``start`` raises what its ``load`` raises, also if the others have loaded and serve."""
    loading = make_gate()

    def opening(number: int) -> None:
        if number == 1:
            loading(None)
            raise LoadError

    worker.opening = opening
    runner = InferenceRunner[None](worker=worker)
    assert await runner.run(abs, -3) == 3
    loading.release.set()
    with pytest.raises(LoadError):
        await runner.start()
    with pytest.raises(NotReady, match="did not load: LoadError"):
        await runner.run(abs, -3)
    assert runner.statistics().state == "failed"
    worker.opening = lambda number: None
    await runner.start()
    assert await runner.run(abs, -3) == 3
    await runner.aclose()


@pytest.mark.anyio
async def test_no_thread_for_one(worker: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """``start`` says so, and nothing of the rest is left; the next attempt may succeed."""
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def start_one(thread: threading.Thread) -> None:
        if thread.name == "inference":
            if started:
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    runner = InferenceRunner[None](worker=worker)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_one)
        with pytest.raises(NotReady, match="no thread for its replica 1: can't start new thread"):
            await runner.start()
    await anyio.to_thread.run_sync(started[0].join, LIMIT)
    assert not started[0].is_alive()
    await runner.start()
    assert await runner.run(abs, -1) == 1
    await runner.aclose()
    closed = [note for note in worker.notes if note.startswith("close")]
    assert sorted(closed) == ["close 0", "close 0", "close 1", "close 1"]


@pytest.mark.anyio
async def test_start_that_takes_too_long_is_interrupted(worker: Replicas) -> None:
    """Replicas that still load when the time is up are told that nobody waits any more; those
    that have loaded end as well."""
    ended: list[int] = []

    def opening(number: int) -> None:
        if number == 1:
            assert worker.made[1].interrupted.wait(LIMIT)
            ended.append(number)

    worker.opening = opening
    runner = InferenceRunner[None](worker=worker)
    with pytest.raises(NotReady, match=r"did not load in 0\.02 s"):
        await runner.start(timeout=0.02)
    thread = runner._thread
    assert thread is not None
    await anyio.to_thread.run_sync(thread.join, LIMIT)
    assert ended == [1]
    with pytest.raises(Draining):
        await runner.run(abs, -3)


@pytest.mark.anyio
async def test_grace_for_all_replicas(worker: Replicas, make_gate: MakeGate) -> None:
    """What has begun on any of them may end within the grace; then all are interrupted."""
    runner = InferenceRunner[None](worker=worker)
    gates = [make_gate(), make_gate()]
    await runner.start()
    futures = fill_all(runner, gates)
    waiting = runner.submit(abs, -3)
    gates[0].release.set()
    await runner.aclose(grace=0.05)
    assert futures[0].result(LIMIT) is None
    assert waiting.result(LIMIT) == 3
    assert isinstance(futures[1].exception(LIMIT), Draining)
    assert all(replica.interrupted.is_set() for replica in worker.made.values())
    assert runner.statistics().state == "draining"
    gates[1].release.set()
    runner.shutdown()
    assert runner.statistics().state == "closed"


@pytest.mark.anyio
async def test_broken_is_told_and_stopped_at_once() -> None:
    """A runner whose models crash too often refuses calls with a 503, and keeps nobody who stops
    it, whatever the grace."""
    worker = Replicas(2, GIVE_UP)
    async with InferenceRunner[None](worker=worker) as runner:
        for _ in range(2):
            with pytest.raises(WorkerCrashed) as crashed:
                await runner.run(crash)
            assert crashed.value.status_code == 500
        await until(lambda: runner.statistics().state == "broken")
        with pytest.raises(NotReady, match="crashed too often") as refused:
            await runner.run(abs, -3)
        assert (refused.value.status_code, repr(runner)) == (
            503,
            "<InferenceRunner 'inference' broken>",
        )
    assert runner.statistics().state == "closed"


def test_resource_warning_when_broken() -> None:
    """A runner that goes away while it is broken says so as well, and its threads end."""
    worker = Replicas(1, GIVE_UP)
    runner = InferenceRunner[None](name="forgotten", worker=worker)
    assert isinstance(runner.submit(crash).exception(LIMIT), WorkerCrashed)
    thread = runner._thread
    assert thread is not None
    until_true(lambda: thread.state == "broken")
    with pytest.warns(ResourceWarning, match="'forgotten' broken> was not stopped"):
        del runner
    until_true(lambda: worker.count("close 0") == 1)


def test_several_in_a_forked_child(worker: Replicas, make_gate: MakeGate) -> None:
    """What the parent has begun on any replica ends there for nobody, and the child has replicas
    of its own."""
    runner = InferenceRunner[None](worker=worker)
    gates = [make_gate(), make_gate()]
    futures = fill_all(runner, gates)
    parent = runner._thread
    assert parent is not None
    runner._after_fork()
    for future in futures:
        with pytest.raises(Draining, match="parent process"):
            future.result(0)
    assert worker.notes[-2:] == ["leave behind 0", "leave behind 1"]
    assert runner.submit(abs, -1).result(LIMIT) == 1
    runner.shutdown()
    for gate in gates:
        gate.release.set()
    parent.stop_soon()
    assert parent.join(LIMIT)


def test_map_over_replicas(worker: Replicas) -> None:
    """``Executor.map`` keeps all of them busy, and the results in order."""
    together = threading.Barrier(2)

    def pair(number: int) -> int:
        together.wait(LIMIT)  # passed by two or by none
        return number

    with InferenceRunner[None](worker=worker, max_queue=2) as runner:
        assert list(runner.map(pair, range(40))) == list(range(40))
    assert worker.most == 2


@pytest.mark.anyio
async def test_batches_on_several_replicas(worker: Replicas, make_gate: MakeGate) -> None:
    """Two batches run at once, one on each, and what comes meanwhile is the next one's."""
    gates = {0: make_gate(), 1: make_gate()}
    sizes: list[int] = []

    def double(items: list[int]) -> list[int]:
        sizes.append(len(items))
        if len(sizes) <= 2:
            gates[items[0]](None)
        return [2 * item for item in items]

    async with InferenceRunner[None](worker=worker) as runner:
        batcher = Batcher(runner, double, max_size=8)
        results: dict[int, int] = {}

        async def ask(item: int) -> None:
            results[item] = await batcher.run(item)

        async with anyio.create_task_group() as tasks:
            for number, gate in gates.items():
                tasks.start_soon(ask, number)
                await gate.entered_async()
            for number in range(2, 7):
                tasks.start_soon(ask, number)
            await until(lambda: runner.statistics().queued == 5)
            assert runner.statistics().running == 2
            gates[1].release.set()
            await until(lambda: len(results) == 6)
            gates[0].release.set()
    assert results == {number: 2 * number for number in range(7)}
    assert sizes == [1, 1, 5]
