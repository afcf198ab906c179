"""``InferenceMiddleware``: runners that start, stop, and drop calls with their application."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

from ._call import current_caller
from ._checks import check_grace, check_seconds
from ._client import ASGIApp, Client, Receive, Scope, Send
from ._errors import ClientDisconnected, InferenceError
from ._lifespan import Lifespan
from ._runner import GRACE, STATE_KEY, InferenceRunner

logger = logging.getLogger("asgi_infer")


class InferenceMiddleware:
    """Mounts one or more runners in any ASGI application.

    ::

        app.add_middleware(InferenceMiddleware, runner=runner)

    Starts the runners before the application's own lifespan and stops them after it. A call
    whose client hangs up while it waits never runs. An ``InferenceError`` that no handler of the
    application sees is answered with its status. Add it last: the last one added is outermost,
    and only there are disconnects seen (``BaseHTTPMiddleware`` hides them from what is inside).

    :param runner: the runner, or several with different names
    :param grace: seconds that accepted calls get to end in when the application stops
    :param startup_timeout: seconds that each model may take to load
    :param server_timing: tell the client, in ``Server-Timing``, how many milliseconds its calls
        waited (``queue``) and ran (``infer``)
    :param deadline_header: the name of a request header in which a client may give the seconds
        it will wait. It can only shorten the time that a call has
    :raises ValueError: two runners have the same name, or there is none; or an option makes no
        sense
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        runner: InferenceRunner[Any] | Iterable[InferenceRunner[Any]],
        grace: float = GRACE,
        startup_timeout: float | None = None,
        server_timing: bool = True,
        deadline_header: str | None = None,
    ) -> None:
        self.app = app
        runners = [runner] if isinstance(runner, InferenceRunner) else list(runner)
        self._runners = {each.name: each for each in runners}
        if len(self._runners) != len(runners) or not runners:
            names = ", ".join(repr(each.name) for each in runners) or "none"
            raise ValueError(
                f"InferenceMiddleware needs runners with different names, not {names}"
            )
        self._grace = check_grace(grace)
        if startup_timeout is not None:
            check_seconds("startup_timeout", startup_timeout)
        self._startup_timeout = startup_timeout
        self._server_timing = server_timing
        self._deadline_header = None if deadline_header is None else _check_header(deadline_header)
        self._looked_around = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope; what is not a lifespan, HTTP or WebSocket is passed on."""
        if scope["type"] == "lifespan":
            self._look_around(scope)
            await Lifespan(self.app, scope, receive, send).run(
                self._runners.values(),
                grace=self._grace,
                startup_timeout=self._startup_timeout,
                state={STATE_KEY: self._runners},
            )
        elif scope["type"] in ("http", "websocket"):
            await self._serve(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._look_around(scope)
        self._provide(scope)
        client = Client(scope, receive, send, server_timing=self._server_timing)
        token = current_caller.set(client)
        try:
            client.deadline = self._deadline(scope)
            await self.app(scope, client.receive, client.send)
        except InferenceError as error:
            if not await client.answer(error):
                raise
        except RuntimeError as error:
            # Frameworks wrap a handled error that is raised in a response that has begun, such as
            # a stream's. Nobody is there to read it, and nothing went wrong.
            if not isinstance(error.__cause__, ClientDisconnected):
                raise
        finally:
            current_caller.reset(token)
            client.finish()

    def _provide(self, scope: Scope) -> None:
        # Also without lifespan (a mounted application, a bare TestClient): runners start lazily.
        state = scope.setdefault("state", {})
        outer = state.get(STATE_KEY)
        if outer is not self._runners:
            state[STATE_KEY] = self._runners if outer is None else {**outer, **self._runners}

    def _deadline(self, scope: Scope) -> float | None:
        if self._deadline_header is None:
            return None
        for name, value in scope["headers"]:
            if name == self._deadline_header:
                try:
                    seconds = check_seconds("the deadline", float(value))
                except ValueError:
                    raise InvalidDeadline(f"not a number of seconds: {value!r}") from None
                return time.monotonic() + seconds
        return None

    def _look_around(self, scope: Scope) -> None:
        """Warn, once, of a ``BaseHTTPMiddleware`` outside this one."""
        if self._looked_around:
            return
        self._looked_around = True
        base = getattr(sys.modules.get("starlette.middleware.base"), "BaseHTTPMiddleware", ())
        for other in getattr(scope.get("app"), "user_middleware", ()):
            if isinstance(other.cls, type) and issubclass(other.cls, InferenceMiddleware):
                return
            if isinstance(other.cls, type) and issubclass(other.cls, base):
                logger.warning(
                    "%s is a BaseHTTPMiddleware outside InferenceMiddleware and hides disconnects "
                    "from it: calls whose client has gone will run. Add InferenceMiddleware last",
                    other.cls.__name__,
                )


def _check_header(name: Any) -> bytes:
    if isinstance(name, str) and re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        return name.lower().encode()
    raise ValueError(f"deadline_header must be the name of an HTTP header, not {name!r}")


class InvalidDeadline(InferenceError):
    """The deadline header of a request is no number of seconds greater than 0."""

    status = 400
    public = "The deadline must be a number of seconds greater than 0."
