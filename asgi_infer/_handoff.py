"""From the inference thread back to an event loop. The only file that knows which loop it is.

Each event loop has a *port*. The inference thread posts a *waiter* to it for every call that is
over; the port wakes the loop once, and the loop then wakes everybody who was posted by then. A
wake-up costs a system call, so that one for each drain and not one for each result is what makes
many short calls cheap.

Guarantees
    * ``post`` never raises and never blocks: a loop that has been closed is no concern of the
      thread that serves others.
    * A waiter is woken on its own loop, and only if somebody still waits there.
    * A port keeps no loop alive.

Assumptions
    * ``deque.append`` and ``deque.popleft`` are atomic.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from contextvars import Context
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Waiter(Protocol):
    """Something to wait for, once. Awaiting it returns True when it was posted."""

    def __await__(self) -> Generator[Any, Any, bool]: ...


class LoopPort(Protocol):
    """What a port offers to the code that runs on its loop. ``post`` is for any thread."""

    def waiter(self) -> Waiter:
        """A new waiter on the running loop."""
        ...

    async def wait_until(self, waiter: Any, deadline: float, /) -> bool:
        """Wait for ``waiter``: True when it was posted, False if the deadline came first.

        :param deadline: on the clock of ``time.monotonic()``
        """
        ...

    def post(self, waiter: Any, /) -> None:
        """Wake whoever waits for ``waiter``. From any thread; never raises, never blocks."""
        ...

    def call_later(self, delay: float, func: Callable[[], object], /) -> Callable[[], object]:
        """Call ``func`` in ``delay`` seconds; return what cancels that. On the loop's thread."""
        ...

    def call_soon_threadsafe(self, func: Callable[[], object], /) -> bool:
        """Call ``func`` on the loop, at its next turn; False if the loop has ended.

        From any thread; never raises.
        """
        ...

    def spawn(self, func: Callable[[], Awaitable[None]], /) -> Callable[[], object]:
        """Run ``func`` beside the current task; return what cancels it."""
        ...


class AsyncioWaiter:
    """What a task awaits. Unlike an ``asyncio.Future`` it resumes the task there and then.

    A future has the loop resume the task at its next turn. For a short call that turn, with its
    system call and the GIL changing hands, is a fifth of the whole trip. The protocol is the
    one that tasks keep with anything future-like (``asyncio.isfuture``): they set a callback,
    which is called in their context, and ask for ``result``.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_cancellation",
        "_context",
        "_loop",
        "_posted",
    )

    _context: Context  # comes with the callback

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._asyncio_future_blocking = False
        self._loop = loop
        self._posted: bool | None = None
        self._callback: Callable[[AsyncioWaiter], object] | None = None
        self._cancellation: tuple[object, ...] | None = None  # the arguments of the error

    def __await__(self) -> Generator[AsyncioWaiter, None, bool]:
        if self._posted is None:
            self._asyncio_future_blocking = True
            yield self
        return self._posted is True

    def wake(self, posted: bool) -> None:
        """Resume the task, in a callback of its loop; nothing if nobody waits any more."""
        if self._posted is None:
            self._posted = posted
            callback, self._callback = self._callback, None
            if callback is not None:
                self._context.run(callback, self)

    # -- for the task --------------------------------------------------------------------------

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that the task runs on."""
        return self._loop

    def add_done_callback(
        self, callback: Callable[[AsyncioWaiter], object], *, context: Context
    ) -> None:
        """Have ``callback`` called in ``context``. There is one task, so there is one."""
        self._callback = callback
        self._context = context

    def cancel(self, msg: object = None) -> bool:
        """The task is cancelled: resume it, as futures do, at the loop's next turn."""
        callback, self._callback = self._callback, None
        if callback is None:
            return False
        # With the message, by which anyio's scopes know a cancellation for their own.
        self._cancellation = () if msg is None else (msg,)
        self._posted = False
        self._loop.call_soon(callback, self, context=self._context)
        return True

    def result(self) -> bool | None:
        """Whether it was posted; raises if it was cancelled."""
        if self._cancellation is not None:
            raise asyncio.CancelledError(*self._cancellation)
        return self._posted


class AsyncioPort:
    """The port of an asyncio loop, uvloop's included."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = weakref.ref(loop)
        self._posted: deque[AsyncioWaiter] = deque()  # any thread appends, the loop pops
        # Set by whoever posts, cleared by the loop before it drains. Two threads that both find
        # it clear wake the loop twice, which does no harm; nobody can find it set in vain.
        self._woken = False

    def waiter(self) -> AsyncioWaiter:
        return AsyncioWaiter(asyncio.get_running_loop())

    async def wait_until(self, waiter: AsyncioWaiter, deadline: float, /) -> bool:
        delay = deadline - time.monotonic()
        timer = waiter.get_loop().call_later(delay, waiter.wake, False)
        try:
            return await waiter
        finally:
            timer.cancel()

    def post(self, waiter: AsyncioWaiter, /) -> None:
        self._posted.append(waiter)
        if self._woken:
            return
        self._woken = True
        if not self.call_soon_threadsafe(self._drain):
            self._woken = False
            self._posted.clear()

    def call_later(self, delay: float, func: Callable[[], object], /) -> Callable[[], object]:
        return asyncio.get_running_loop().call_later(delay, func).cancel

    def spawn(self, func: Callable[[], Awaitable[None]], /) -> Callable[[], object]:
        async def task() -> None:
            await func()

        # The returned method keeps the task alive: the loop itself holds tasks weakly.
        return asyncio.get_running_loop().create_task(task()).cancel

    def call_soon_threadsafe(self, func: Callable[[], object], /) -> bool:
        loop = self.loop()
        if loop is None:
            return False
        try:
            loop.call_soon_threadsafe(func)
        except RuntimeError:
            # Closed. Asking first would not do: it may close between the question and the call.
            return False
        return True

    def _drain(self) -> None:
        self._woken = False
        # Those that are posted by now. Whoever posts later has found _woken clear and wakes the
        # loop again: tasks that call anew as soon as they are resumed can't keep it from the rest.
        due = len(self._posted)
        try:
            while due:
                due -= 1
                self._posted.popleft().wake(True)
        finally:
            # A task that exits the program (SystemExit) comes through here; the others stay due.
            if due:
                self.call_soon_threadsafe(self._drain)


class TrioWaiter:
    """A ``trio.Event`` that can be awaited."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def __await__(self) -> Generator[Any, Any, bool]:
        yield from self.event.wait().__await__()
        return True


class TrioPort:
    """The port of a trio run. Made, and imported, only inside one."""

    def __init__(self) -> None:
        import trio

        self._trio = trio
        self.token = trio.lowlevel.current_trio_token()
        self._posted: deque[TrioWaiter] = deque()  # any thread appends, the loop pops

    def waiter(self) -> TrioWaiter:
        return TrioWaiter(self._trio.Event())

    async def wait_until(self, waiter: TrioWaiter, deadline: float, /) -> bool:
        with self._trio.move_on_after(max(0.0, deadline - time.monotonic())) as scope:
            await waiter
        return not scope.cancelled_caught

    def post(self, waiter: TrioWaiter, /) -> None:
        self._posted.append(waiter)
        try:
            self.token.run_sync_soon(self._drain, idempotent=True)  # trio coalesces these
        except self._trio.RunFinishedError:
            self._posted.clear()

    def call_later(self, delay: float, func: Callable[[], object], /) -> Callable[[], object]:
        async def later() -> None:
            await self._trio.sleep(delay)
            func()

        return self.spawn(later)

    def call_soon_threadsafe(self, func: Callable[[], object], /) -> bool:
        try:
            self.token.run_sync_soon(func)
        except self._trio.RunFinishedError:
            return False
        return True

    def spawn(self, func: Callable[[], Awaitable[None]], /) -> Callable[[], object]:
        scope = self._trio.CancelScope()

        async def task() -> None:
            with scope:
                await func()

        self._trio.lowlevel.spawn_system_task(task)
        return scope.cancel

    def _drain(self) -> None:
        while self._posted:
            self._posted.popleft().event.set()


class _Here(threading.local):
    """The port that this thread used last. Thread-local: no guard."""

    asyncio_port: AsyncioPort | None = None
    trio_port: TrioPort | None = None


_here = _Here()


def current_port() -> LoopPort:
    """The port of the event loop that runs the current task.

    :raises RuntimeError: there is no asyncio or trio loop here
    """
    # trio first: in its guest mode an asyncio loop runs on the same thread, beneath it.
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return _trio_port(trio.lowlevel.current_trio_token())
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "there is no asyncio or trio event loop here; from synchronous code use "
            "runner.submit(func, *args).result()"
        ) from None
    port = _here.asyncio_port
    if port is None or port.loop() is not loop:
        port = _here.asyncio_port = AsyncioPort(loop)
    return port


def _trio_port(token: object) -> TrioPort:
    port = _here.trio_port
    if port is None or port.token is not token:
        port = _here.trio_port = TrioPort()
    return port


async def wait_for(future: Future[T], timeout: float | None = None) -> T:
    """Wait, on any event loop, for a future that another thread completes.

    Cancelling the wait leaves the future as it is.

    :raises TimeoutError: ``timeout`` seconds have passed
    """
    port = current_port()
    waiter = port.waiter()
    future.add_done_callback(lambda _: port.post(waiter))
    if timeout is None:
        await waiter
    elif not await port.wait_until(waiter, time.monotonic() + timeout) and not future.done():
        raise TimeoutError
    return future.result()
