"""Connections as a server presents them to an application, with the test in the server's place."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import anyio

Message = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]

DISCONNECTS = ("http.disconnect", "websocket.disconnect")


class Connection:
    """One HTTP request or WebSocket.

    What is fed to it waits until the application receives it. Like a server's, its disconnect
    stays: it is received again and again.

    :ivar sent: what the application has sent
    :ivar taken: how many messages were received
    :ivar readers: how many wait in ``receive`` at the moment
    :ivar most_readers: how many ever did at once; ``serve`` checks that it was not more than one
    """

    def __init__(
        self,
        kind: str = "http",
        *,
        headers: Iterable[tuple[bytes, bytes]] = (),
        extensions: Iterable[str] = (),
    ) -> None:
        self.scope: dict[str, Any] = {
            "type": kind,
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/",
            "raw_path": b"/",
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": list(headers),
            "client": ("client", 1),
            "server": ("server", 2),
            "subprotocols": [],
            "extensions": {name: {} for name in extensions},
        }
        self.sent: list[Message] = []
        self.taken = 0
        self.readers = 0
        self.most_readers = 0
        self.failure: Exception | None = None
        self._queue: deque[Message] = deque()
        self._changed = anyio.Event()

    def feed(self, *messages: Message) -> None:
        """Have the application receive ``messages``."""
        self._queue.extend(messages)
        self._change()

    def body(self, *chunks: bytes) -> None:
        """Have the application receive a whole body, in chunks."""
        last = len(chunks) - 1
        self.feed(*(request(chunk, more=n < last) for n, chunk in enumerate(chunks)))

    def texts(self, *texts: str) -> None:
        """Have the application receive WebSocket messages."""
        self.feed(*({"type": "websocket.receive", "text": text} for text in texts))

    def hang_up(self) -> None:
        """Have the application receive a disconnect, for good."""
        self.feed({"type": f"{self.scope['type']}.disconnect"})

    def fail(self, error: Exception) -> None:
        """Have ``receive`` raise, once."""
        self.failure = error
        self._change()

    async def receive(self) -> Message:
        """What the server gives the application."""
        self.readers += 1
        self.most_readers = max(self.most_readers, self.readers)
        try:
            while not self._queue and self.failure is None:
                await self._changed.wait()
        finally:
            self.readers -= 1
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        self.taken += 1
        stays = self._queue[0]["type"] in DISCONNECTS
        return self._queue[0] if stays else self._queue.popleft()

    async def send(self, message: Message) -> None:
        """What the server gives the application."""
        self.sent.append(message)

    async def serve(self, app: App) -> None:
        """Run ``app`` for this connection."""
        await app(self.scope, self.receive, self.send)
        assert self.most_readers <= 1

    @property
    def kinds(self) -> list[str]:
        """The types of the messages sent."""
        return [message["type"] for message in self.sent]

    @property
    def status(self) -> int:
        """The response's status."""
        return int(self._start["status"])

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers."""
        return {name.decode(): value.decode() for name, value in self._start["headers"]}

    @property
    def text(self) -> str:
        """The response's body."""
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def _start(self) -> Message:
        (start,) = (message for message in self.sent if "status" in message)
        return start

    def _change(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()


def request(chunk: bytes, *, more: bool = False) -> Message:
    """One message with a part of a request's body."""
    return {"type": "http.request", "body": chunk, "more_body": more}


async def respond(send: Callable[[Message], Awaitable[None]], text: str = "") -> None:
    """Send a whole response."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": text.encode()})
