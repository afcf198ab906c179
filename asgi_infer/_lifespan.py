"""The lifespan protocol, with runners that live around the application's own lifespan."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any

from ._client import ASGIApp, Message, Receive, Scope, Send
from ._errors import describe
from ._runner import InferenceRunner

logger = logging.getLogger("asgi_infer")


class Lifespan:
    """One run of the lifespan protocol: runners start before ``app`` and stop after it."""

    def __init__(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._app = app
        self._scope = scope
        self._receive = receive
        self._send = send
        self._startup: Message | None = None  # read, and not yet handed to the application
        self._answered = False  # the application has said how its startup went
        self._last: Message | None = None  # its last word, held back until the runners stop

    async def run(
        self,
        runners: Iterable[InferenceRunner[Any]],
        *,
        grace: float,
        startup_timeout: float | None,
        state: Mapping[str, Any],
    ) -> None:
        """Serve the protocol to its end.

        :param state: added to the scope's state once the runners have started
        :raises Exception: what kept a runner from starting, after the server has been told
        """
        self._startup = await self._receive()
        async with AsyncExitStack() as stack:
            for runner in runners:
                opened = runner.opened(startup_timeout=startup_timeout, grace=grace)
                try:
                    await stack.enter_async_context(opened)
                except Exception as error:
                    await self._fail(runner, error)
                    raise  # as applications do; servers ignore it now, test clients raise it
            self._scope.setdefault("state", {}).update(state)
            await self._serve_app()
        if self._last is not None:
            await self._send(self._last)

    async def _fail(self, runner: InferenceRunner[Any], error: Exception) -> None:
        cause = " ".join(describe(error).split())
        message = f"the runner {runner.name!r} did not start: {cause}"
        logger.error("%s", message, exc_info=error)
        await self._send({"type": "lifespan.startup.failed", "message": message})

    async def _serve_app(self) -> None:
        try:
            await self._app(self._scope, self._app_receive, self._app_send)
        except Exception:
            if self._answered:
                raise
            # An application without lifespan, which it tells by raising. The runners have one.
        if not self._answered:
            await self._send({"type": "lifespan.startup.complete"})
            await self._receive()
            self._last = {"type": "lifespan.shutdown.complete"}

    async def _app_receive(self) -> Message:
        message, self._startup = self._startup, None
        return await self._receive() if message is None else message

    async def _app_send(self, message: Message) -> None:
        self._answered = True
        if message["type"].startswith("lifespan.shutdown."):
            self._last = message
        else:
            await self._send(message)
