"""From a thread back to an event loop, on every loop there is."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import pytest
import trio
import uvloop

from asgi_infer._handoff import AsyncioPort, AsyncioWaiter, TrioPort, current_port, wait_for

from .conftest import BACKENDS
from .gates import LIMIT, wait_event
from .threads import on_new_thread

MakeLoop = Callable[[], asyncio.AbstractEventLoop]
Test = TypeVar("Test", bound=Callable[..., object])
LOOPS = pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])


def on_asyncio(test: Test) -> Test:
    """For what is asyncio's alone: on its own loop and on uvloop."""
    names = [name for name in BACKENDS if name.startswith("asyncio")]
    backends = pytest.mark.parametrize("anyio_backend", [BACKENDS[n] for n in names], ids=names)
    marked: Test = pytest.mark.anyio(backends(test))
    return marked


def soon() -> float:
    return time.monotonic() + LIMIT


async def settle() -> None:
    """Let everything that is due on the loop happen."""
    for _ in range(5):
        await anyio.lowlevel.checkpoint()


# -- ports, on every loop ----------------------------------------------------------------------


@pytest.mark.anyio
async def test_post_wakes_the_waiter() -> None:
    """A waiter that another thread posts resumes the task that awaits it."""
    port = current_port()
    waiter = port.waiter()
    threading.Thread(target=port.post, args=(waiter,)).start()
    with anyio.fail_after(LIMIT):
        assert await waiter


@pytest.mark.anyio
async def test_post_before_await() -> None:
    """A waiter that was posted before anybody awaited it is not lost."""
    port = current_port()
    waiter = port.waiter()
    on_new_thread(lambda: port.post(waiter))
    await settle()
    with anyio.fail_after(LIMIT):
        assert await waiter


@pytest.mark.anyio
async def test_every_waiter_is_woken() -> None:
    """Of a thousand waiters that four threads post at once none is forgotten."""
    port = current_port()
    waiters = [port.waiter() for _ in range(1000)]
    woken: list[bool] = []

    async def wait(waiter: Awaitable[bool]) -> None:
        woken.append(await waiter)

    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            for waiter in waiters:
                tasks.start_soon(wait, waiter)
            with ThreadPoolExecutor(4) as pool:
                assert len(list(pool.map(port.post, waiters))) == 1000
    assert woken == [True] * 1000


@pytest.mark.anyio
async def test_wait_until_posted() -> None:
    """Posted ahead of the deadline: True."""
    port = current_port()
    waiter = port.waiter()
    port.post(waiter)
    assert await port.wait_until(waiter, soon())


@pytest.mark.anyio
@pytest.mark.parametrize("seconds", [0.01, 0.0, -5.0])
async def test_wait_until_deadline(seconds: float) -> None:
    """Nobody posts: False, at once if the deadline has passed already."""
    port = current_port()
    with anyio.fail_after(LIMIT):
        assert not await port.wait_until(port.waiter(), time.monotonic() + seconds)


@pytest.mark.anyio
async def test_wait_until_the_longest_time() -> None:
    """The longest time that a system can wait is a deadline like any other."""
    port = current_port()
    waiter = port.waiter()
    threading.Thread(target=port.post, args=(waiter,)).start()
    with anyio.fail_after(LIMIT):
        assert await port.wait_until(waiter, time.monotonic() + threading.TIMEOUT_MAX)


@pytest.mark.anyio
@pytest.mark.parametrize("limited", [False, True])
async def test_cancel(limited: bool) -> None:
    """A cancelled wait ends at once, and posting its waiter afterwards does nothing."""
    port = current_port()
    waiter = port.waiter()
    ended: list[str] = []

    async def wait() -> None:
        try:
            await (port.wait_until(waiter, soon()) if limited else waiter)
        except anyio.get_cancelled_exc_class():
            ended.append("cancelled")
            raise

    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await settle()
            tasks.cancel_scope.cancel()
    port.post(waiter)
    await settle()
    assert ended == ["cancelled"]


@pytest.mark.anyio
async def test_post_of_a_waiter_nobody_awaits() -> None:
    """A waiter whose task never came to await it does no harm to the others."""
    port = current_port()
    first, second = port.waiter(), port.waiter()
    port.post(first)
    port.post(second)
    with anyio.fail_after(LIMIT):
        assert await second


@pytest.mark.anyio
async def test_call_later() -> None:
    """A function is called on the loop's thread at a later turn, however it was handed in."""
    port = current_port()
    threads: list[int] = []
    called = threading.Event()

    def note() -> None:
        threads.append(threading.get_ident())
        if len(threads) == 2:
            called.set()

    port.call_later(0.0, note)
    port.call_later(LIMIT, note)()  # cancelled
    assert threads == []
    on_new_thread(lambda: port.call_soon_threadsafe(note))
    await wait_event(called)
    assert threads == [threading.get_ident()] * 2


@pytest.mark.anyio
async def test_spawn() -> None:
    """A spawned function runs beside the current task, and what is returned cancels it."""
    port = current_port()
    begun, ended = anyio.Event(), anyio.Event()

    async def sleep() -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.set()

    with anyio.fail_after(LIMIT):
        cancel = port.spawn(sleep)
        await begun.wait()
        cancel()
        await ended.wait()


@pytest.mark.anyio
async def test_one_port_for_each_loop() -> None:
    """A loop's tasks share one port, whose wake-ups are thereby shared as well."""
    ports = [current_port()]

    async def note() -> None:
        ports.append(current_port())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(note)
    assert ports[0] is ports[1]


def test_no_loop() -> None:
    """Without an event loop the error says what to use instead."""
    with pytest.raises(RuntimeError, match=r"use runner\.submit\(func, \*args\)\.result\(\)"):
        current_port()


def test_loops_one_after_another() -> None:
    """Each new loop on the same thread gets a port of its own."""

    async def port() -> Any:
        return current_port()

    async def trio_port() -> Any:
        return current_port()

    first, second = asyncio.run(port()), asyncio.run(port())
    third, fourth = trio.run(trio_port), trio.run(trio_port)
    assert first is not second
    assert third is not fourth
    assert isinstance(second, AsyncioPort)
    assert isinstance(fourth, TrioPort)


def test_trio_as_a_guest() -> None:
    """In trio's guest mode an asyncio loop runs beneath: a task is served by the loop it is on."""
    kinds: dict[str, type] = {}

    async def in_trio() -> None:
        kinds["guest"] = type(current_port())
        waiter = current_port().waiter()
        threading.Thread(target=current_port().post, args=(waiter,)).start()
        with trio.fail_after(LIMIT):
            assert await waiter

    async def host() -> None:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        trio.lowlevel.start_guest_run(
            in_trio,
            run_sync_soon_threadsafe=asyncio.get_running_loop().call_soon_threadsafe,
            done_callback=done.set_result,
            host_uses_signal_set_wakeup_fd=True,
        )
        (await asyncio.wait_for(done, LIMIT)).unwrap()
        kinds["host"] = type(current_port())

    asyncio.run(host())
    assert kinds == {"guest": TrioPort, "host": AsyncioPort}


# -- closed loops ------------------------------------------------------------------------------


@LOOPS
def test_post_to_a_closed_loop(make_loop: MakeLoop) -> None:
    """A loop that has been closed is no concern of the thread that posts: nothing is raised."""
    loop = make_loop()
    port = AsyncioPort(loop)
    waiter = AsyncioWaiter(loop)
    loop.close()
    for _ in range(2):
        port.post(waiter)
        port.call_soon_threadsafe(lambda: None)


@LOOPS
def test_port_keeps_no_loop_alive(make_loop: MakeLoop) -> None:
    """A loop is collected although a port of it is about, and what was posted to it goes too."""
    loop = make_loop()
    port, waiter = AsyncioPort(loop), AsyncioWaiter(loop)
    loop.close()
    port.post(waiter)
    remains = weakref.ref(loop)
    del loop, waiter  # the waiter knows its loop
    gc.collect()
    assert remains() is None
    assert port.loop() is None


@LOOPS
def test_post_to_a_collected_loop(make_loop: MakeLoop) -> None:
    """A loop that is gone altogether can't be woken either, and nothing is raised."""
    loop, other = make_loop(), make_loop()
    port = AsyncioPort(loop)
    loop.close()
    other.close()
    del loop
    gc.collect()
    port.post(AsyncioWaiter(other))
    assert not port._posted


@LOOPS
def test_loop_closed_during_delivery(make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop closes when the posting thread is past every check: nothing is raised there."""
    loop = make_loop()
    entered, release = threading.Event(), threading.Event()
    wake = loop.call_soon_threadsafe

    def held(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert release.wait(LIMIT)
        return wake(*args, **kwargs)

    monkeypatch.setattr(loop, "call_soon_threadsafe", held)
    port = AsyncioPort(loop)
    with ThreadPoolExecutor(1) as pool:
        posting = pool.submit(port.post, AsyncioWaiter(loop))
        assert entered.wait(LIMIT)
        loop.close()
        release.set()
        posting.result(LIMIT)


def test_post_to_a_finished_trio_run() -> None:
    """A trio run that is over is no concern of the thread that posts either."""

    async def port_and_waiter() -> tuple[Any, Any]:
        return current_port(), current_port().waiter()

    port, waiter = trio.run(port_and_waiter)
    port.post(waiter)
    port.call_soon_threadsafe(lambda: None)
    assert not port._posted


# -- asyncio: coalescing and fairness ----------------------------------------------------------


class Wakeups:
    """Counts how often a loop is woken from other threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        loop = asyncio.get_running_loop()
        self._wake: Any = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self._wake(*args, **kwargs)


@on_asyncio
async def test_one_wakeup_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much was posted while the loop was busy, it is woken once, and then once again."""
    wakeups = Wakeups(monkeypatch)
    port = current_port()
    for _ in range(3):
        waiters = [port.waiter() for _ in range(100)]
        on_new_thread(partial(post_all, port, waiters))
        assert await asyncio.gather(*(port.wait_until(w, soon()) for w in waiters)) == [True] * 100
    assert wakeups.count == 3


def post_all(port: Any, waiters: list[Any]) -> None:
    for waiter in waiters:
        port.post(waiter)


@on_asyncio
async def test_the_loop_gets_its_turns() -> None:
    """A task that is resumed and waits again at once doesn't keep the loop from all else."""
    port = current_port()
    loop = asyncio.get_running_loop()
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        handle[0] = loop.call_soon(turn)

    handle = [loop.call_soon(turn)]
    for _ in range(1000):
        waiter = port.waiter()
        port.post(waiter)  # as the inference thread may, while the loop still drains
        await waiter
    handle[0].cancel()
    assert turns >= 500


# -- asyncio: the waiter, which stands in for a future -----------------------------------------


def post_soon(port: Any, waiter: Any) -> None:
    """Post at the loop's next turn, when the waiter is awaited."""
    asyncio.get_running_loop().call_soon(port.post, waiter)


@on_asyncio
async def test_resumed_in_its_own_context() -> None:
    """A task that a drain resumes is itself: it is the current task, in its own context."""
    variable: ContextVar[str] = ContextVar("variable")
    port = current_port()

    async def task(name: str) -> bool:
        variable.set(name)
        me = asyncio.current_task()
        waiter = port.waiter()
        post_soon(port, waiter)
        await waiter
        return asyncio.current_task() is me and variable.get() == name

    assert await asyncio.gather(*(task(str(number)) for number in range(10))) == [True] * 10


@on_asyncio
async def test_cancellation_message() -> None:
    """The message of a cancellation reaches the task, as it does through a future."""
    task = asyncio.ensure_future(forever())
    await asyncio.sleep(0)
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await task


async def forever() -> None:
    await current_port().waiter()


@on_asyncio
async def test_cancelled_twice() -> None:
    """Two cancellations ahead of the task's next step are two requests, and one exception."""
    caught: list[int] = []

    async def wait() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            caught.append(current_task().cancelling())
            await asyncio.sleep(0)  # isn't cancelled once more

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    assert task.cancel()
    assert task.cancel()
    await asyncio.wait_for(task, LIMIT)
    assert caught == [2]


def current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


@on_asyncio
@pytest.mark.parametrize("cancel_first", [True, False])
async def test_cancelled_in_the_tick_of_posting(cancel_first: bool) -> None:
    """Whichever comes first in one tick decides, and the other does no harm."""
    port = current_port()
    waiter = port.waiter()
    assert isinstance(waiter, AsyncioWaiter)
    task = asyncio.ensure_future(port.wait_until(waiter, soon()))
    await asyncio.sleep(0)
    steps: list[Callable[[], object]] = [task.cancel, lambda: waiter.wake(True)]
    for step in steps if cancel_first else reversed(steps):
        asyncio.get_running_loop().call_soon(step)
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError) if cancel_first else outcome is True


@on_asyncio
async def test_cancelled_before_it_waits() -> None:
    """A task that was cancelled ahead of its first wait isn't resumed by a post."""
    port = current_port()
    waiter = port.waiter()
    port.post(waiter)
    task = asyncio.ensure_future(port.wait_until(port.waiter(), soon()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await waiter


@on_asyncio
async def test_standard_combinators() -> None:
    """What asyncio offers for waiting works on tasks that await a waiter."""
    port = current_port()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(forever(), 0.01)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await forever()
    task = asyncio.ensure_future(port.wait_until(waiter := port.waiter(), soon()))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(task), 0.01)
    on_new_thread(lambda: port.post(waiter))
    done, pending = await asyncio.wait([task], timeout=LIMIT)
    assert (done, pending) == ({task}, set())
    assert task.result()


@LOOPS
def test_task_that_exits_the_program(make_loop: MakeLoop) -> None:
    """SystemExit out of one resumed task ends the run, and the others are still woken."""
    woken: list[bool] = []

    async def leave(waiter: Any) -> None:
        await waiter
        raise SystemExit(3)

    async def stay(waiter: Any) -> None:
        woken.append(await waiter)

    async def main() -> None:
        port = current_port()
        waiters = [port.waiter() for _ in range(3)]
        first, *others = waiters
        tasks = [
            asyncio.ensure_future(leave(first)),
            *map(asyncio.ensure_future, map(stay, others)),
        ]
        await asyncio.sleep(0)
        post_all(port, waiters)
        await asyncio.gather(*tasks[1:])

    loop = make_loop()
    try:
        task = loop.create_task(main())
        with pytest.raises(SystemExit):
            loop.run_until_complete(task)
        loop.run_until_complete(task)
    finally:
        loop.close()
    assert woken == [True, True]


def test_pure_python_tasks() -> None:
    """The waiter keeps to the protocol of futures, whoever implements the tasks."""

    async def wait() -> bool:
        port = current_port()
        waiter = port.waiter()
        post_soon(port, waiter)
        assert await waiter
        task = asyncio.ensure_future(forever())
        await asyncio.sleep(0)
        task.cancel("enough")
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await task
        return type(task) is asyncio.tasks._PyTask  # type: ignore[attr-defined]  # private

    with asyncio.Runner(debug=True) as runner:
        make_task: Any = asyncio.tasks._PyTask  # type: ignore[attr-defined]  # private
        runner.get_loop().set_task_factory(lambda loop, c, **kw: make_task(c, loop=loop, **kw))
        assert runner.run(wait())


def test_foreign_loop() -> None:
    """Awaiting a waiter on another loop than its own fails as it does with a future."""
    other = asyncio.new_event_loop()

    async def wait() -> None:
        await AsyncioWaiter(other)

    try:
        with pytest.raises(RuntimeError, match="attached to a different loop"):
            asyncio.run(wait())
    finally:
        other.close()


# -- waiting for a future ----------------------------------------------------------------------


def later(func: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=func)
    thread.start()
    return thread


@pytest.mark.anyio
@pytest.mark.parametrize("timeout", [None, LIMIT])
async def test_wait_for(timeout: float | None) -> None:
    """The result of a future that another thread completes, or that is complete already."""
    future: Future[int] = Future()
    thread = later(lambda: future.set_result(3))
    assert await wait_for(future, timeout) == 3
    assert await wait_for(future, timeout) == 3
    thread.join(LIMIT)


@pytest.mark.anyio
async def test_wait_for_error() -> None:
    """The error of a future that another thread completes."""
    future: Future[int] = Future()
    thread = later(lambda: future.set_exception(LookupError("gone")))
    with pytest.raises(LookupError, match="gone"):
        await wait_for(future, LIMIT)
    thread.join(LIMIT)


@pytest.mark.anyio
async def test_wait_for_too_long() -> None:
    """TimeoutError when the time is up; the future may still complete."""
    future: Future[int] = Future()
    with pytest.raises(TimeoutError):
        await wait_for(future, 0.01)
    future.set_result(3)
    assert await wait_for(future) == 3


class LateFuture(Future[int]):
    """A future that completes in the tick in which the time is up, and tells nobody."""

    def add_done_callback(self, fn: object) -> None:
        self.set_result(3)


@pytest.mark.anyio
async def test_wait_for_in_the_last_moment() -> None:
    """A future that completes as the time runs out has completed."""
    assert await wait_for(LateFuture(), 0.01) == 3


@pytest.mark.anyio
async def test_wait_for_cancelled() -> None:
    """Cancelling the wait leaves the future alone."""
    future: Future[int] = Future()
    with anyio.move_on_after(0.01):
        await wait_for(future)
    assert not future.done()
    assert not future.cancelled()
    future.set_result(3)
    assert await wait_for(future) == 3
