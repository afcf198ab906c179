"""Streams from end to end: items, back-pressure, and every way in which one can end."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import anyio
import anyio.lowlevel
import pytest
from fastapi import Depends, FastAPI
from fastapi.sse import EventSourceResponse, ServerSentEvent, format_sse_event
from fastapi.testclient import TestClient
from starlette.responses import StreamingResponse

from asgi_infer import (
    ClientDisconnected,
    DeadlineExceeded,
    Draining,
    InferenceMiddleware,
    InferenceRunner,
    QueueFull,
    ReentrantCall,
)
from asgi_infer._handoff import AsyncioPort
from asgi_infer._stream import Stream
from asgi_infer.fastapi import RunnerDep

from .connections import Connection
from .gates import LIMIT, Gate, wait_event
from .polling import some_turns, until, until_true
from .streams import Source
from .test_exit import forks, run, run_fork
from .threads import on_new_thread

on_every_loop = pytest.mark.anyio
both_kinds = pytest.mark.parametrize("interleave", [False, True], ids=["exclusive", "interleaved"])


@pytest.fixture
def runner() -> Iterator[InferenceRunner[None]]:
    """A runner, stopped in the end."""
    with InferenceRunner[None](max_queue=2) as runner:
        yield runner


@pytest.fixture
def source() -> Iterator[Source]:
    """A generator function with more items than anybody wants, released in the end."""
    source = Source()
    yield source
    source.release()


def thread_id(runner: InferenceRunner[None]) -> int:
    """Of the runner's thread."""
    return runner.submit(threading.get_ident).result(LIMIT)


def books(runner: InferenceRunner[None]) -> dict[str, int]:
    """What became of the calls, once nothing waits or runs."""
    until_true(lambda: (runner.statistics().running, runner.statistics().queued) == (0, 0))
    now = runner.statistics()
    names = ("completed", "failed", "cancelled", "expired", "rejected", "late")
    return {name: getattr(now, name) for name in names if getattr(now, name)}


async def closed_on(source: Source, runner: InferenceRunner[None]) -> None:
    """The generator has been closed where it was stepped, and the thread is free again."""
    await wait_event(source.closed)
    assert set(source.thread_ids) == {await runner.run(threading.get_ident)}


async def full(runner: InferenceRunner[None], source: Source, items: int) -> None:
    """Wait until ``items`` are made, and the thread waits for room or has nothing to do."""
    await until(lambda: source.made == items)
    await anyio.sleep(0.01)
    assert source.made == items


# -- items -------------------------------------------------------------------------------------


@on_every_loop
@both_kinds
@pytest.mark.parametrize("buffer", [1, 3, 16])
async def test_items(runner: InferenceRunner[None], interleave: bool, buffer: int) -> None:
    """All items arrive in order, made on the one thread, and none before it is wanted."""
    source = Source(40)
    stream = runner.stream(source, buffer=buffer, interleave=interleave)
    assert [item async for item in stream] == list(range(40))
    await closed_on(source, runner)
    assert books(runner) == {"completed": 2}
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@on_every_loop
async def test_falsy_items(runner: InferenceRunner[None]) -> None:
    """Items may be anything, also None."""
    items: list[Any] = [None, 0, "", False, [], math.nan]
    for all_items in (items, []):
        stream = runner.stream(iter, all_items)
        assert [item async for item in stream] == all_items


@pytest.mark.unmeasured
@on_every_loop
@both_kinds
async def test_many_small_items(runner: InferenceRunner[None], interleave: bool) -> None:
    """Thread and task hand over item by item, often, and nobody is left asleep."""
    with anyio.fail_after(4 * LIMIT):
        for buffer in (1, 2, 7):
            expected = 0
            stream = runner.stream(range(400).__iter__, buffer=buffer, interleave=interleave)
            async for item in stream:
                assert item == expected
                expected += 1
            assert expected == 400


@on_every_loop
@both_kinds
async def test_back_pressure(
    runner: InferenceRunner[None], source: Source, interleave: bool
) -> None:
    """No more is made than the buffer holds; more once half of that has been taken."""
    stream = runner.stream(source, buffer=4, interleave=interleave)
    await full(runner, source, 4)
    assert [await anext(stream) for _ in range(1)] == [0]
    await full(runner, source, 4)
    assert await anext(stream) == 1
    await full(runner, source, 6)
    await stream.aclose()
    await closed_on(source, runner)


@on_every_loop
async def test_error_in_the_middle(runner: InferenceRunner[None]) -> None:
    """An error arrives after the items before it, once; then the stream is at its end."""

    def generate() -> Iterator[int]:
        yield from range(3)
        raise LookupError("gone")

    stream = runner.stream(generate)
    items = []
    with pytest.raises(LookupError, match="gone"):
        async for item in stream:
            items.append(item)
    assert items == [0, 1, 2]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert books(runner) == {"failed": 1}


@pytest.mark.parametrize("interleave", [False, True])
def test_wake_ups_are_few(
    runner: InferenceRunner[None], monkeypatch: pytest.MonkeyPatch, interleave: bool
) -> None:
    """Tiny items do not wake the loop one by one: it takes all that are there by then."""
    wake_ups = 0
    call_soon = AsyncioPort.call_soon_threadsafe

    def counted(port: AsyncioPort, func: Callable[[], object], /) -> bool:
        nonlocal wake_ups
        wake_ups += 1
        return call_soon(port, func)

    async def consume() -> None:
        stream = runner.stream(range(5000).__iter__, buffer=256, interleave=interleave)
        assert [item async for item in stream] == list(range(5000))

    monkeypatch.setattr(AsyncioPort, "call_soon_threadsafe", counted)
    asyncio.run(consume())
    assert wake_ups < 1000


@on_every_loop
async def test_other_tasks_run(runner: InferenceRunner[None]) -> None:
    """A consumer that finds an item each time lets its loop's other tasks run all the same."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    stream = runner.stream(iter, range(60), buffer=61)
    await until(lambda: runner.statistics().completed == 1)
    stream._at_once = stream._call.buffer.size = 10
    async with anyio.create_task_group() as group:
        group.start_soon(other)
        assert [item async for item in stream] == list(range(60))
        group.cancel_scope.cancel()
    assert turns >= 5


@on_every_loop
async def test_fast_stream_can_be_cancelled(runner: InferenceRunner[None]) -> None:
    """So does a cancellation reach it, though it never has to wait for an item."""
    stream = runner.stream(iter, range(60), buffer=61)
    await until(lambda: runner.statistics().completed == 1)
    stream._at_once = stream._call.buffer.size = 10
    items = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        async for item in stream:
            items.append(item)
    assert items == list(range(10))


# -- the consumer goes -------------------------------------------------------------------------


@on_every_loop
@both_kinds
async def test_left_with_a_break(
    runner: InferenceRunner[None], source: Source, interleave: bool
) -> None:
    """A consumer that breaks out of ``async with`` has the generator closed on the thread."""
    async with runner.stream(source, interleave=interleave) as stream:
        async for item in stream:
            if item == 5:
                break
    await closed_on(source, runner)
    assert books(runner) == {"completed": 1, "cancelled": 1, "late": 1}


@on_every_loop
@both_kinds
@pytest.mark.parametrize("items", [0, 5])
async def test_dropped(
    runner: InferenceRunner[None], source: Source, interleave: bool, items: int
) -> None:
    """One that just drops the stream as well, before or after its first item."""
    stream = runner.stream(source, buffer=4, interleave=interleave)
    for item in range(items):
        assert await anext(stream) == item
    await until(lambda: source.made >= 4)
    del stream
    await closed_on(source, runner)
    assert books(runner) == {"completed": 1, "cancelled": 1, "late": 1}


@on_every_loop
async def test_dropped_while_it_waits(
    runner: InferenceRunner[None], source: Source, gate: Gate
) -> None:
    """A stream that is dropped before its turn never runs."""
    runner.submit(gate, 1)
    await gate.entered_async()
    stream = runner.stream(source)
    assert runner.statistics().queued == 1
    del stream
    assert runner.statistics().queued == 0
    gate.release.set()
    await runner.wait_idle()
    assert source.thread_ids == []
    assert books(runner) == {"completed": 1, "cancelled": 1}


@both_kinds
def test_dropped_after_the_loop(
    runner: InferenceRunner[None], source: Source, interleave: bool
) -> None:
    """The loop may be closed by then, and the thread another one."""

    async def start() -> Stream[int]:
        stream = runner.stream(source, buffer=4, interleave=interleave)
        assert await anext(stream) == 0
        return stream

    streams = [asyncio.run(start())]
    on_new_thread(streams.clear)
    assert source.closed.wait(LIMIT)
    assert set(source.thread_ids) == {thread_id(runner)}


@both_kinds
def test_loop_that_ends_while_somebody_waits(
    runner: InferenceRunner[None], source: Source, interleave: bool
) -> None:
    """The end of a loop cancels the consumer, or drops it: the generator is closed either way."""
    reached = source.hold(0)

    async def start() -> None:
        task = asyncio.ensure_future(anext(runner.stream(source, interleave=interleave)))
        await wait_event(reached)
        assert not task.done()

    asyncio.run(start())
    source.release()
    assert source.closed.wait(LIMIT)


class Keeper:
    """Holds a stream, in a reference cycle."""

    def __init__(self, stream: Stream[Any]) -> None:
        self.stream = stream
        self.me = self


def test_collected_in_the_middle(runner: InferenceRunner[None], source: Source) -> None:
    """The collector may find a stream on a thread that holds the scheduler's lock.

    What it interrupted there must not see the queue change: the stream leaves from elsewhere.
    """
    runner.submit(source.reached.setdefault(0, threading.Event()).wait, LIMIT)
    until_true(lambda: runner.statistics().running == 1)
    Keeper(runner.stream(source))
    with runner._lock:
        before = threading.active_count()
        gc.collect()
        assert threading.active_count() == before + 1
        assert runner.statistics().queued == 1
    until_true(lambda: runner.statistics().queued == 0)
    source.reached[0].set()
    assert books(runner) == {"completed": 1, "cancelled": 1}


def test_collected_at_the_very_end(
    runner: InferenceRunner[None], source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interpreter that starts no threads any more is about to end all streams itself."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    stream = runner.stream(source, buffer=2)
    until_true(lambda: source.made == 2)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with runner._lock:
            runner._thread.scheduler.abandon(stream._call)  # type: ignore[union-attr]
    assert not source.closed.is_set()
    del stream
    assert source.closed.wait(LIMIT)


@on_every_loop
@both_kinds
async def test_cancelled(runner: InferenceRunner[None], source: Source, interleave: bool) -> None:
    """A consumer that is cancelled while it waits is gone at once; the generator, at its step."""
    reached = source.hold(1)
    stream = runner.stream(source, interleave=interleave)
    assert await anext(stream) == 0
    await wait_event(reached)
    with anyio.move_on_after(0.01) as scope:
        await anext(stream)
    assert scope.cancelled_caught
    assert not source.closed.is_set()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    source.release()
    await closed_on(source, runner)
    assert source.made == 2
    assert books(runner) == {"completed": 1, "cancelled": 1, "late": 1}


@on_every_loop
async def test_aclose(runner: InferenceRunner[None], source: Source) -> None:
    """``aclose`` may be called twice, and before the first item; what is there is dropped."""
    stream = runner.stream(source)
    await until(lambda: source.made == 16)
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await closed_on(source, runner)


@on_every_loop
@pytest.mark.parametrize("queued", [False, True])
async def test_aclose_beside_the_consumer(
    runner: InferenceRunner[None], source: Source, gate: Gate, queued: bool
) -> None:
    """A task that waits for an item when another closes the stream is at the end of it."""
    if queued:
        runner.submit(gate, 1)
        await gate.entered_async()
    reached = source.hold(0)
    ended: list[int | str] = []
    stream = runner.stream(source)

    async def consume() -> None:
        ended.extend([item async for item in stream])
        ended.append("end")

    async with anyio.create_task_group() as group:
        group.start_soon(consume)
        if not queued:
            await wait_event(reached)
        await until(lambda: stream._waiting)
        await stream.aclose()
        with anyio.fail_after(LIMIT):
            await until(lambda: ended == ["end"])
    source.release()


@on_every_loop
async def test_two_consumers(runner: InferenceRunner[None], source: Source) -> None:
    """One task waits for the next item: another one is told so, and spoils nothing."""
    reached = source.hold(0)
    stream = runner.stream(source)
    items = []

    async def consume() -> None:
        items.append(await anext(stream))

    async with anyio.create_task_group() as group:
        group.start_soon(consume)
        await wait_event(reached)
        await until(lambda: stream._waiting)
        with pytest.raises(RuntimeError, match="another task waits for the next item"):
            await anext(stream)
        source.release()
    assert items == [0]
    assert await anext(stream) == 1
    await stream.aclose()


# -- where it is made, and where it is consumed ------------------------------------------------


@on_every_loop
async def test_made_in_a_thread(runner: InferenceRunner[None]) -> None:
    """A stream may be made where there is no event loop, as in a ``def`` endpoint."""
    stream = await anyio.to_thread.run_sync(runner.stream, Source(20))
    assert [item async for item in stream] == list(range(20))


def test_on_two_loops(runner: InferenceRunner[None], anyio_backend: Any) -> None:
    """And be consumed on one loop after another, of different kinds."""
    name, options = anyio_backend

    async def make() -> Stream[int]:
        stream = runner.stream(Source(40), buffer=4)
        assert await anext(stream) == 0
        return stream

    async def consume() -> None:
        assert [item async for item in stream] == list(range(1, 40))

    stream = asyncio.run(make())
    anyio.run(consume, backend=name, backend_options=options)


def test_without_a_loop(runner: InferenceRunner[None]) -> None:
    """Awaiting it where no loop runs says so."""
    stream = runner.stream(Source(0))
    until_true(lambda: runner.statistics().completed == 1)
    coroutine = runner.stream(Source(3)).__anext__()
    with pytest.raises((RuntimeError, StopIteration)):
        coroutine.send(None)
    coroutine.close()
    del stream


# -- time --------------------------------------------------------------------------------------


@on_every_loop
async def test_deadline_while_queued(
    runner: InferenceRunner[None], source: Source, gate: Gate
) -> None:
    """A deadline that passes before its turn: ``started=False``, and it never runs."""
    runner.submit(gate, 1)
    await gate.entered_async()
    with pytest.raises(DeadlineExceeded) as caught:
        await anext(runner.stream(source, timeout=0.02))
    assert caught.value.started is False
    gate.release.set()
    await runner.wait_idle()
    assert source.thread_ids == []
    assert books(runner) == {"completed": 1, "expired": 1}


@on_every_loop
@both_kinds
async def test_deadline_while_it_runs(
    runner: InferenceRunner[None], source: Source, interleave: bool
) -> None:
    """One that passes inside a step ends the wait at once, and the generator at its next step."""
    source.hold(1)
    stream = runner.stream(source, timeout=0.05, interleave=interleave)
    assert await anext(stream) == 0
    with pytest.raises(DeadlineExceeded) as caught:
        await anext(stream)
    assert caught.value.started is True
    assert not source.closed.is_set()
    source.release()
    await closed_on(source, runner)
    assert books(runner) == {"completed": 1, "expired": 1, "late": 1}


@on_every_loop
@both_kinds
async def test_deadline_with_a_full_buffer(
    runner: InferenceRunner[None], source: Source, interleave: bool
) -> None:
    """One that passes while the consumer is busy frees the thread, without any stall timeout."""
    stream = runner.stream(
        source, timeout=0.05, buffer=2, stall_timeout=None, interleave=interleave
    )
    await closed_on(source, runner)
    with pytest.raises(DeadlineExceeded, match="the call's time was up"):
        await anext(stream)
    assert books(runner) == {"completed": 1, "expired": 1, "late": 1}


@on_every_loop
@both_kinds
async def test_stalled(runner: InferenceRunner[None], source: Source, interleave: bool) -> None:
    """A consumer that takes nothing loses the thread after ``stall_timeout``, and is told."""
    stream = runner.stream(source, buffer=2, stall_timeout=0.02, interleave=interleave)
    await closed_on(source, runner)
    with pytest.raises(DeadlineExceeded, match="took no item for as long as stall_timeout allows"):
        await anext(stream)
    assert source.made == 2
    assert books(runner) == {"completed": 1, "expired": 1, "late": 1}


@on_every_loop
@both_kinds
async def test_stall_timeout_is_for_full_buffers(
    runner: InferenceRunner[None], source: Source, interleave: bool
) -> None:
    """A slow generator stalls nobody: the consumer waits for it as long as it takes."""
    reached = source.hold(1)
    stream = runner.stream(source, stall_timeout=0.01, interleave=interleave)
    assert await anext(stream) == 0
    await wait_event(reached)
    await anyio.sleep(0.03)
    source.release()
    assert await anext(stream) == 1
    await stream.aclose()


# -- clients that hang up ----------------------------------------------------------------------


@on_every_loop
@both_kinds
@pytest.mark.parametrize("waits", [False, True], ids=["busy", "waits"])
async def test_client_gone(
    runner: InferenceRunner[None], source: Source, waits: bool, interleave: bool
) -> None:
    """Behind the middleware: a consumer that waits is woken; one that is busy is told later."""
    connection = Connection()
    errors = []
    reached = source.hold(1)
    busy = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        stream = runner.stream(source, interleave=interleave)
        assert await anext(stream) == 0
        if not waits:
            await busy.wait()
        try:
            await anext(stream)
        except ClientDisconnected as error:
            errors.append(str(error))

    async with anyio.create_task_group() as group:
        group.start_soon(connection.serve, InferenceMiddleware(app, runner=runner))
        await wait_event(reached)
        await until(lambda: connection.readers == 1)
        connection.hang_up()
        await until(lambda: runner.statistics().late == 1)
        source.release()
        busy.set()
    assert errors == ["the client hung up while its call ran"]
    await closed_on(source, runner)
    assert books(runner) == {"completed": 1, "cancelled": 1, "late": 1}


@on_every_loop
async def test_client_gone_while_queued(
    runner: InferenceRunner[None], source: Source, gate: Gate
) -> None:
    """A client that hangs up before its stream has begun: it never does."""
    runner.submit(gate, 1)
    await gate.entered_async()
    connection = Connection()
    app = StreamingEndpoint(runner, source)
    async with anyio.create_task_group() as group:
        group.start_soon(connection.serve, InferenceMiddleware(app, runner=runner))
        await until(lambda: runner.statistics().queued == 1)
        connection.hang_up()
        await until(lambda: runner.statistics().queued == 0)
    gate.release.set()
    assert books(runner) == {"completed": 1, "cancelled": 1}
    assert source.thread_ids == []


class StreamingEndpoint:
    """An application that gives a stream to Starlette as it is."""

    def __init__(self, runner: InferenceRunner[None], source: Callable[[], Iterator[Any]]) -> None:
        self.runner = runner
        self.source = source

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        texts = partial(map, str, self.source())
        await StreamingResponse(self.runner.stream(texts))(scope, receive, send)


@on_every_loop
async def test_client_has_no_calls_afterwards(runner: InferenceRunner[None]) -> None:
    """A stream that is over is no call of the client's any more: nobody watches for it."""
    clients = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        stream = runner.stream(Source(3))
        clients.append(dict(stream._caller._calls))  # type: ignore[union-attr]
        assert [item async for item in stream] == [0, 1, 2]
        clients.append(dict(stream._caller._calls))  # type: ignore[union-attr]

    await Connection().serve(InferenceMiddleware(app, runner=runner))
    assert [len(calls) for calls in clients] == [1, 0]


# -- responses ---------------------------------------------------------------------------------


def tokens() -> Iterator[str]:
    yield from ("one", "two", "three")


def events() -> Iterator[bytes]:
    for token in tokens():
        yield format_sse_event(data_str=token)


async def token_stream(runner: RunnerDep) -> Stream[str]:
    """A dependency: the stream is admitted before the response begins."""
    return runner.stream(tokens)


def fastapi_application(runner: InferenceRunner[Any]) -> FastAPI:
    app = FastAPI()
    app.add_middleware(InferenceMiddleware, runner=runner)

    @app.get("/plain")
    async def plain(runner: RunnerDep) -> StreamingResponse:
        return StreamingResponse(runner.stream(tokens))

    @app.get("/def")
    def in_thread(runner: RunnerDep) -> StreamingResponse:
        return StreamingResponse(runner.stream(tokens))

    @app.get("/formatted")
    async def formatted(runner: RunnerDep) -> EventSourceResponse:
        return EventSourceResponse(runner.stream(events))

    @app.get("/events", response_class=EventSourceResponse)
    async def yielded(
        stream: Annotated[Stream[str], Depends(token_stream)],
    ) -> AsyncIterator[ServerSentEvent]:
        async for token in stream:
            yield ServerSentEvent(raw_data=token)

    @app.get("/lines")
    async def lines(
        stream: Annotated[Stream[str], Depends(token_stream)],
    ) -> AsyncIterator[str]:
        async for token in stream:
            yield token

    return app


SSE = "data: one\n\ndata: two\n\ndata: three\n\n"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/plain", "onetwothree"),
        ("/def", "onetwothree"),
        ("/formatted", SSE),
        ("/events", SSE),
        ("/lines", '"one"\n"two"\n"three"\n'),
    ],
)
def test_fastapi(runner: InferenceRunner[None], gate: Gate, path: str, body: str) -> None:
    """FastAPI sends a stream in each of its ways, and a full queue is a 503 in each."""
    with TestClient(fastapi_application(runner)) as client:
        answer = client.get(path)
        assert (answer.status_code, answer.text) == (200, body)
        sse = path in ("/formatted", "/events")
        assert answer.headers.get("content-type", "").startswith("text/event-stream") == sse
        runner.submit(gate, 1)
        gate.wait_entered()
        waiting = [runner.submit(abs, 1) for _ in range(2)]
        assert client.get(path).status_code == 503
        gate.release.set()
        assert [future.result(LIMIT) for future in waiting] == [1, 1]


# -- the end of the runner ---------------------------------------------------------------------


@on_every_loop
@both_kinds
async def test_runner_that_stops(source: Source, interleave: bool) -> None:
    """Streams that have not ended after ``grace`` are closed on the thread before that ends."""
    runner = InferenceRunner[None]()
    stream = runner.stream(source, buffer=2, stall_timeout=None, interleave=interleave)
    await full(runner, source, 2)
    await runner.aclose(grace=0.01)
    with pytest.raises(Draining, match="stopped while"):
        await anext(stream)
    await wait_event(source.closed)
    assert len(set(source.thread_ids)) == 1
    assert books(runner) == {"cancelled": 1, "late": 1}
    with pytest.raises(Draining):
        runner.stream(source)


@on_every_loop
@both_kinds
async def test_streams_end_within_the_grace(interleave: bool) -> None:
    """A stream that was accepted goes on to its end while the runner stops."""
    runner = InferenceRunner[None]()
    stream = runner.stream(Source(40), buffer=2, interleave=interleave)
    assert await anext(stream) == 0
    items: list[int] = []

    async def consume() -> None:
        items.extend([item async for item in stream])

    async with anyio.create_task_group() as group:
        group.start_soon(runner.aclose)
        await until(lambda: runner.statistics().state == "draining")
        group.start_soon(consume)
    assert items == list(range(1, 40))


@both_kinds
def test_shutdown_waits_for_the_stall(source: Source, interleave: bool) -> None:
    """``shutdown`` waits for a consumer that never comes no longer than ``stall_timeout``."""
    runner = InferenceRunner[None]()
    stream = runner.stream(source, buffer=2, stall_timeout=0.02, interleave=interleave)
    on_new_thread(runner.shutdown)
    assert source.closed.is_set()
    assert books(runner) == {"expired": 1, "late": 1}
    del stream


def test_interpreter_that_ends() -> None:
    """Streams that stand for ever do not hold up the end of a program; they are closed in it."""
    ended = run("""
        runner = InferenceRunner()
        def endless():
            try:
                while True:
                    yield 1
            finally:
                say("closed")
        parked = runner.stream(endless, buffer=2, stall_timeout=None, interleave=True)
        standing = runner.stream(endless, buffer=2, stall_timeout=None)
        while runner.statistics().running != 2:
            time.sleep(0.001)
        say("end")
    """)
    assert ended.status == 0
    assert ended.stdout.splitlines() == ["end", "closed", "closed"]


@forks
def test_streams_in_a_child() -> None:
    """In a forked child the parent's streams are over, whoever held the lock at the fork."""
    said = run_fork("""
        import warnings
        runner = InferenceRunner()
        def count():
            yield from range(5)
        def take(stream):
            async def consume():
                return [item async for item in stream]
            return asyncio.run(consume())
        streams = [runner.stream(count, buffer=2, interleave=True) for _ in range(2)]
        while runner.statistics().running != 2:
            time.sleep(0.001)
        held, release = threading.Event(), threading.Event()
        def hold():
            with runner._lock:
                held.set()
                release.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        def look():
            try:
                take(streams.pop())
            except Exception as error:
                say(error)
            streams.clear()
            say(take(runner.stream(count)))
        in_child(look)
        release.set()
        thread.join()
        say([take(stream) for stream in streams])
        say("end")
    """)
    items = [0, 1, 2, 3, 4]
    error = "this call belongs to the parent process"
    assert said == [error, str(items), "child: 0", str([items, items]), "end"]


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        *[({"buffer": value}, "buffer must be") for value in (0, -1, 1.5, None, math.nan, True)],
        *[
            ({"stall_timeout": value}, "stall_timeout must be a number of seconds")
            for value in (0, -1, math.nan, math.inf, "1")
        ],
        *[({"timeout": value}, "timeout must be") for value in (0, math.nan)],
        ({"priority": 0.5}, "priority must be"),
    ],
)
def test_bad_options(
    runner: InferenceRunner[None], options: dict[str, Any], complaint: str
) -> None:
    """Options without sense are refused at once, by name, and nothing is counted."""
    with pytest.raises(ValueError, match=complaint):
        runner.stream(Source(3), **options)
    assert runner.statistics().submitted == 0


async def coroutine() -> None: ...


@pytest.mark.parametrize("func", [coroutine, iter([1]), [1], None])
def test_bad_functions(runner: InferenceRunner[None], func: Any) -> None:
    """So is what can't be stepped on the thread."""
    with pytest.raises(TypeError, match="generator function"):
        runner.stream(func)
    assert runner.statistics().submitted == 0


@on_every_loop
async def test_not_a_generator(runner: InferenceRunner[None]) -> None:
    """What a function returns is known when it has run: the error is the first item."""
    with pytest.raises(TypeError, match="len returned a int, and a stream needs a generator"):
        await anext(runner.stream(len, "abc"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="yielded a coroutine"):
        _ = await anext(runner.stream(lambda: iter([coroutine()])))


@on_every_loop
async def test_full_queue(runner: InferenceRunner[None], source: Source, gate: Gate) -> None:
    """A full queue is known at once, before a response has begun."""
    runner.submit(gate, 1)
    await gate.entered_async()
    waiting = [runner.stream(source), runner.submit(abs, 1)]
    with pytest.raises(QueueFull):
        runner.stream(source)
    del waiting


def test_reentrant(runner: InferenceRunner[None]) -> None:
    """A stream of the same runner, from within a call or a stream of it, is refused."""

    def generate() -> Iterator[int]:
        runner.stream(Source(3))
        yield 1

    async def consume() -> None:
        await anext(runner.stream(generate))

    with pytest.raises(ReentrantCall):
        asyncio.run(consume())


# -- wrap --------------------------------------------------------------------------------------


class Model:
    def count(self, start: int, *, stop: int) -> Iterator[int]:
        """Count."""
        yield from range(start, stop)


@on_every_loop
async def test_wrap() -> None:
    """``wrap`` makes of a generator function, or a reference to one, what returns a stream."""
    async with InferenceRunner(Model) as runner:

        @runner.wrap
        def count(start: int, *, stop: int) -> Iterator[int]:
            """Count."""
            yield from range(start, stop)

        for wrapped in (count, runner.wrap(runner.model.count, timeout=LIMIT, priority=1)):
            stream = wrapped(2, stop=5)
            assert isinstance(stream, Stream)
            assert [item async for item in stream] == [2, 3, 4]
        assert (count.__name__, count.__doc__) == ("count", "Count.")


@on_every_loop
async def test_wrapped_options(runner: InferenceRunner[None], gate: Gate) -> None:
    """The options are those of each stream."""
    runner.submit(gate, 1)
    await gate.entered_async()
    wrapped = runner.wrap(Source(3), timeout=LIMIT, priority=-1)
    call = wrapped()._call
    assert call.priority == -1
    assert call.deadline is not None
    with pytest.raises(ValueError, match="timeout must be"):
        runner.wrap(Source(3), timeout=0)


# -- beside other calls ------------------------------------------------------------------------


@on_every_loop
async def test_calls_between_items(runner: InferenceRunner[None], source: Source) -> None:
    """With ``interleave`` calls run while a stream stands; it holds no thread."""
    stream = runner.stream(source, buffer=2, interleave=True)
    await full(runner, source, 2)
    assert await runner.run(abs, -1) == 1
    now = runner.statistics()
    assert (now.running, now.queued, now.completed) == (1, 0, 1)
    assert [await anext(stream) for _ in range(5)] == list(range(5))
    await stream.aclose()


@on_every_loop
async def test_exclusive(runner: InferenceRunner[None], source: Source) -> None:
    """Without it nothing runs between two items, whether or not anybody takes them."""
    stream = runner.stream(source, buffer=2)
    await full(runner, source, 2)
    future = runner.submit(abs, -1)
    await some_turns()
    now = runner.statistics()
    assert (now.running, now.queued, now.completed) == (1, 1, 0)
    await stream.aclose()
    await until(future.done)


def test_waits_are_no_sign_of_throttling(runner: InferenceRunner[None]) -> None:
    """A thread that waits for a stream's consumer sleeps often: no call is blamed for that."""

    async def consume() -> None:
        stream = runner.stream(iter, range(300), buffer=1)
        assert await anext(stream) == 0
        call = runner.submit(abs, -1)
        assert [item async for item in stream] == list(range(1, 300))
        assert await asyncio.wrap_future(call) == 1

    asyncio.run(consume())
    assert runner.statistics().switches_per_call < 10


# -- nothing stays -----------------------------------------------------------------------------


class Thing:
    """Something that can be seen to go."""


@pytest.mark.parametrize("end", ["end", "error", "aclose", "drop"])
def test_nothing_is_kept(runner: InferenceRunner[None], end: str) -> None:
    """At the end nothing of a stream is left: items, arguments, error. Without a collection."""
    remains: list[weakref.ref[Any]] = []

    def generate(argument: Thing) -> Iterator[Thing]:
        for _ in range(4):
            item = Thing()
            remains.append(weakref.ref(item))
            yield item
        if end == "error":
            raise LookupError

    async def consume() -> None:
        argument = Thing()
        stream = runner.stream(generate, argument, buffer=2, stall_timeout=None)
        remains.extend([weakref.ref(argument), weakref.ref(stream)])
        del argument
        _ = await anext(stream)
        if end == "aclose":
            await stream.aclose()
        elif end != "drop":
            with suppress(LookupError):
                async for _ in stream:
                    pass
            del _

    gc.collect()
    gc.disable()
    try:
        asyncio.run(consume())
        books(runner)
        until_true(lambda: [each() for each in remains] == [None] * len(remains))
    finally:
        gc.enable()
