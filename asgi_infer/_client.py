"""One HTTP or WebSocket connection, as the calls made for it see it: here, or gone.

Guarantees
    * The server's ``receive`` has one reader at a time.
    * The application gets every message, in order. Of its data at most one message is read
      ahead, and a disconnect stays: every later ``receive`` returns it again.
    * Nothing is read ahead unless a call waits or runs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ._call import Call, CallState
from ._errors import ClientDisconnected, InferenceError
from ._handoff import Waiter, current_port

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_TRY_AGAIN_LATER, _INTERNAL_ERROR = 1013, 1011  # the close codes of WebSockets
WATCH_AFTER = 0.005
"""Seconds after which a call is worth watching for: to watch costs more than many a call does."""

_DISCONNECTS = frozenset({"http.disconnect", "websocket.disconnect"})
_COMPLETE = frozenset({"http.response.pathsend", "websocket.close"})


class Client:
    """The client end of one connection: a ``Caller`` that drops its calls when it goes away.

    Everything runs on the connection's event loop, but ``joined`` and ``left``, which threads
    may call.

    :param server_timing: add the calls' seconds to the response as ``Server-Timing``
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        server_timing: bool,
    ) -> None:
        self.deadline: float | None = None  # on the clock of time.monotonic()
        self._scope = scope
        self._receive = receive
        self._send = send
        self._server_timing = server_timing
        self._port = current_port()
        self._thread = threading.get_ident()
        self._calls: dict[Call, Callable[[Call], None]] = {}  # guarded by the GIL
        self._timed: list[Call] = []  # guarded by the GIL
        self._started = False  # a response, or an accepted WebSocket
        self._denied = False  # an accepted WebSocket that was answered with a response
        self._finished = False  # nothing that happens to the client matters any more
        self._gone = False
        self._ahead: deque[Message] = deque()  # read, and not yet handed to the application
        self._failure: Exception | None = None  # what reading ahead raised
        self._reading = False
        self._turns: list[Waiter] = []  # those who wait for the reader to be done
        self._stop_reading: Callable[[], object] | None = None
        self._watch_later: Callable[[], object] | None = None  # cancels the timer

    # -- for calls -----------------------------------------------------------------------------

    def joined(self, call: Call, drop: Callable[[Call], None], /) -> None:
        """A call has been accepted for this client."""
        if self._finished:
            return
        self._calls[call] = drop
        # Now, since a result wakes its caller before it is known here that the call is over. A
        # response that has begun can carry no timing, and a WebSocket may live for days.
        if self._server_timing and not self._started:
            self._timed.append(call)
        if self._gone:
            drop(call)
        elif threading.get_ident() != self._thread:
            self._port.call_soon_threadsafe(self._watch)
        elif self._watch_later is None:
            self._watch_later = self._port.call_later(WATCH_AFTER, self._watch_now)

    def left(self, call: Call, /) -> None:
        """A call is over."""
        self._calls.pop(call, None)

    # -- for the application -------------------------------------------------------------------

    async def receive(self) -> Message:
        """The application's ``receive``."""
        while self._reading and not self._ahead:
            turn = self._port.waiter()
            self._turns.append(turn)
            await turn
        if self._ahead:
            message = self._ahead[0]
            if message["type"] not in _DISCONNECTS:
                self._ahead.popleft()
        elif self._failure is not None:
            raise self._failure
        else:
            message = await self._read()
        self._watch()
        return message

    async def send(self, message: Message) -> None:
        """The application's ``send``."""
        kind = message["type"]
        if kind == "http.response.start":
            self._started = True
            message = self._with_timing(message)
        elif kind == "websocket.accept":
            self._started = True
        elif self._started and kind.startswith("websocket.http.response"):
            await self._close_instead(message)
            return
        if kind in _COMPLETE or (kind.endswith("response.body") and not message.get("more_body")):
            # Before it is sent: servers report a disconnect as soon as the response is complete.
            self.finish()
        await self._send(message)

    async def answer(self, error: InferenceError) -> bool:
        """Answer with ``error`` if that is still possible; return whether it was.

        For errors that no exception handler of the application has seen.
        """
        if isinstance(error, ClientDisconnected) or self._gone:
            return True  # nobody is there
        if self._scope["type"] == "websocket":
            await self._deny(error)
            return True
        if self._started:
            return False
        await self.send(_response_start("http.response.start", error))
        await self.send({"type": "http.response.body", "body": error.detail.encode()})
        return True

    def finish(self) -> None:
        """Stop watching: the response is complete, or the application has returned."""
        self._finished = True
        self.deadline = None  # what the application still does, it does not for the client
        self._calls.clear()
        if self._watch_later is not None:
            self._watch_later()
        self._timed.clear()  # calls know their client, through their context
        if self._stop_reading is not None:
            self._stop_reading()
            self._stop_reading = None
            self._done_reading()

    # -- the one reader ------------------------------------------------------------------------

    async def _read(self) -> Message:
        self._reading = True
        try:
            message = await self._receive()
        finally:
            self._done_reading()
            self._watch()  # if this was cancelled, calls may still be waiting
        self._look_at(message)
        return message

    def _watch_now(self) -> None:
        self._watch_later = None
        self._watch()

    def _watch(self) -> None:
        """Read ahead, if a call waits, nobody reads, and it is not data that would pile up."""
        if self._calls and not self._reading and not self._failure and self._room_ahead:
            self._reading = True
            self._stop_reading = self._port.spawn(self._read_ahead)

    async def _read_ahead(self) -> None:
        try:
            while self._room_ahead:
                message = await self._receive()
                self._look_at(message)
                if not self._gone:
                    self._ahead.append(message)
                self._next_turn()
        except Exception as error:
            self._failure = error
        finally:
            self._stop_reading = None
            self._done_reading()

    @property
    def _room_ahead(self) -> bool:
        """Whether nothing but a disconnect can follow on what has been read ahead."""
        if len(self._ahead) != 1:  # two: a server that says more after the end of the body
            return not self._ahead
        last = self._ahead[0]
        end_of_body = last["type"] == "http.request" and not last.get("more_body")
        return end_of_body or last["type"] == "websocket.connect"

    def _look_at(self, message: Message) -> None:
        if message["type"] in _DISCONNECTS:
            self._gone = True
            self._ahead.append(message)
            self._drop_all()

    def _done_reading(self) -> None:
        self._reading = False
        self._next_turn()

    def _next_turn(self) -> None:
        turns, self._turns = self._turns, []
        for turn in turns:
            self._port.post(turn)

    def _drop_all(self) -> None:
        # Copied, and each looked for again, since calls leave from other threads as well.
        for call, drop in list(self._calls.items()):
            if self._calls.pop(call, None) is not None:
                drop(call)

    # -- messages ------------------------------------------------------------------------------

    def _with_timing(self, message: Message) -> Message:
        ran_to_end = [call for call in self._timed if call.state is CallState.FINISHED]
        calls = [call for call in ran_to_end if call.departure is None]
        if not calls:
            return message
        waited = sum(call.started - call.arrived for call in calls) * 1000
        ran = sum(call.ended - call.started for call in calls) * 1000
        value = f"queue;dur={waited:.3f}, infer;dur={ran:.3f}".encode()
        return {**message, "headers": [*message.get("headers", ()), (b"server-timing", value)]}

    async def _close_instead(self, message: Message) -> None:
        """Close an accepted WebSocket where an exception handler would send a response to it."""
        if not self._denied and not self._gone:
            self._denied = True
            code = _TRY_AGAIN_LATER if message["status"] in (503, 504) else _INTERNAL_ERROR
            await self.send({"type": "websocket.close", "code": code})

    async def _deny(self, error: InferenceError) -> None:
        if not self._started and "websocket.http.response" in self._scope.get("extensions", {}):
            await self._send(_response_start("websocket.http.response.start", error))
            body = {"type": "websocket.http.response.body", "body": error.detail.encode()}
            await self._send(body)
        else:
            code = _TRY_AGAIN_LATER if error.status_code in (503, 504) else _INTERNAL_ERROR
            await self._send({"type": "websocket.close", "code": code, "reason": error.detail})
        self.finish()


def _response_start(kind: str, error: InferenceError) -> Message:
    headers = {
        "content-type": "text/plain; charset=utf-8",
        "content-length": str(len(error.detail.encode())),
        **(error.headers or {}),
    }
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    return {"type": kind, "status": error.status_code, "headers": raw}
