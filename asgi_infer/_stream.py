"""The consumer's end of a stream: an async iterator over what a generator yields elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Generic, Self, TypeVar

from ._buffer import StreamCall
from ._call import Caller, Departure
from ._handoff import current_port
from ._scheduler import Scheduler

T = TypeVar("T")


class Stream(Generic[T]):
    """The items of a generator that runs on the inference thread, as ``runner.stream`` makes it.

    ::

        async for token in runner.stream(runner.model.generate, prompt):
            ...

        return StreamingResponse(runner.stream(runner.model.render, page))

    It can be iterated once, by one task at a time, on any event loop. The generator is stepped
    and closed on the inference thread: it is closed at its next step, and its ``finally`` blocks
    run there, as soon as nobody waits for its items any more, since the consumer was cancelled,
    has called ``aclose``, has left the ``async with`` block or has just dropped the stream. So
    ``async with`` is never needed. It closes the generator at the end of the block, and not when
    Python finds that the stream is dropped.

    ``__anext__`` raises what the generator raises, after the items before that; and the errors of
    ``runner.stream`` that come later than the call.
    """

    def __init__(self, call: StreamCall, scheduler: Scheduler, caller: Caller | None) -> None:
        self._call = call
        self._scheduler = scheduler
        self._caller = caller
        self._at_once = call.buffer.size  # how many items to take before other tasks may run
        self._waiting = False
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if self._waiting:
            raise RuntimeError("another task waits for the next item of this stream: it has one")
        call = self._call
        while not self._closed:
            over = call.over  # asked first: no item comes after the end
            gone = call.departure is not None
            if gone or (over and not call.buffer):
                self._close()  # takes the lock: from here on the outcome is complete
                if call.error is not None:
                    call.outcome()
            elif call.buffer and self._at_once:
                return self._take()
            else:
                await self._wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Have the generator closed, at its next step; does not wait for that."""
        self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self._close()

    def __del__(self) -> None:
        if not self._closed:
            self._scheduler.abandon(self._call)
            self._forget()

    # -- inside --------------------------------------------------------------------------------

    def _take(self) -> T:
        call = self._call
        item: T = call.buffer.take()
        self._at_once -= 1
        if call.parked and call.buffer.half_empty:
            self._scheduler.resume(call)
        return item

    async def _wait(self) -> None:
        """Wait until something has happened: an item, the end, or the deadline.

        If it has already, let other tasks run: a fast generator must not keep them from it.
        """
        call, port = self._call, current_port()
        waiter = port.waiter()
        call.buffer.wait_with(waiter, port)
        if call.buffer or call.over or call.departure is not None:
            port.post(waiter)
        self._waiting = True
        try:
            if call.deadline is None:
                await waiter
            elif not await port.wait_until(waiter, call.deadline):
                self._scheduler.expire(call)
        except BaseException:
            self._close()
            raise
        finally:
            self._waiting = False
        self._at_once = call.buffer.size

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._scheduler.leave(self._call, Departure.CANCELLED)
            self._forget()

    def _forget(self) -> None:
        self._call.buffer.clear()
        if self._caller is not None:
            self._caller.left(self._call)
