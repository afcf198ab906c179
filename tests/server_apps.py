"""Applications for servers that run in processes of their own. Tests talk to them over sockets.

``app`` is well; ``broken`` has a model that does not load, ``slow`` one that takes for ever, and
``bare`` is an application without a framework and without lifespan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from asgi_infer import InferenceMiddleware, InferenceRunner, _exit, runner_from
from asgi_infer._client import Receive, Scope, Send

GRACE = float(os.environ.get("GRACE", "5"))
_exit.GRACE = float(os.environ.get("EXIT_GRACE", "1"))

LIMIT = 30.0
"""Seconds after which a call that a test holds open gives up, should the test have died."""


class Model:
    """A model whose calls tests hold open; it counts them."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.ran: list[str] = []

    def hold(self, token: str) -> str:
        """Return when the gate is opened."""
        self.ran.append(token)
        assert self.gate.wait(LIMIT)
        return token

    def endless(self) -> Iterator[str]:
        """Yield for as long as anybody listens; note the thread of the end."""
        stepped = threading.current_thread()
        try:
            while True:
                yield "more\n"
        finally:
            same = threading.current_thread() is stepped
            self.ran.append(f"closed on {'the same' if same else 'another'} thread")


model = Model()
runner = InferenceRunner[None](max_queue=1000)


async def stats(request: Request) -> Response:
    """The runner's statistics, and which calls ran."""
    return JSONResponse({**dataclasses.asdict(runner.statistics()), "ran": model.ran})


async def release(request: Request) -> Response:
    """Open the gate until all calls have ended, tell which ran, and forget them."""
    model.gate.set()
    await runner.wait_idle()
    await full.wait_idle()
    model.gate.clear()
    response = JSONResponse(model.ran)
    model.ran.clear()
    return response


async def hold(request: Request) -> Response:
    """A call that waits for the gate."""
    token = request.query_params["token"]
    return JSONResponse(await runner_from(request, "inference").run(model.hold, token))


async def sleep(request: Request) -> Response:
    """A call that takes its time."""
    seconds = float(request.query_params["seconds"])
    return JSONResponse(await runner.run(threading.Event().wait, seconds))


async def hold_in_background(request: Request) -> Response:
    """A call that waits for the gate, after the response."""
    return JSONResponse("accepted", background=BackgroundTask(runner.run, model.hold, "late"))


async def stuck(request: Request) -> Response:
    """A call that never returns, and which no request waits for."""
    runner.submit(threading.Event().wait)
    return JSONResponse("accepted")


async def upload(request: Request) -> Response:
    """A body read before, between and after calls."""
    digest = hashlib.sha256()
    await runner.run(abs, -1)
    async for chunk in request.stream():
        digest.update(chunk)
        await runner.run(abs, -1)
    return JSONResponse(await runner.run(digest.hexdigest))


async def stream(request: Request) -> Response:
    """A call, then a stream of calls."""
    first = await runner.run(abs, 0)

    async def numbers() -> AsyncIterator[str]:
        yield f"{first},"
        for number in range(1, 50):
            yield f"{await runner.run(abs, -number)},"

    return StreamingResponse(numbers())


async def endless(request: Request) -> Response:
    """A stream that ends when its client goes, and which stalls for ever."""
    interleave = "interleave" in request.query_params
    return StreamingResponse(
        runner.stream(model.endless, stall_timeout=None, interleave=interleave)
    )


async def websocket(websocket: WebSocket) -> None:
    """A call for each message: one that waits for the gate, or one that answers."""
    if "full" in websocket.query_params:
        await full.run(abs, -1)
    await websocket.accept()
    try:
        while text := await websocket.receive_text():
            if text == "full":
                await full.run(abs, -1)
            func = model.hold if text.startswith("hold") else str.upper
            await websocket.send_text(await runner.run(func, text))
    except WebSocketDisconnect:
        pass


full = InferenceRunner[None](max_queue=1, name="full")


async def refused(request: Request) -> Response:
    """A call for which there is no room."""
    return JSONResponse(await full.run(abs, -1))


async def fill(request: Request) -> Response:
    """Leave no room."""
    full.submit(model.gate.wait, LIMIT)
    while full.statistics().running == 0:  # noqa: ASYNC110  # there is no event for it
        await anyio.sleep(0.001)
    full.submit(model.gate.wait, LIMIT)
    return JSONResponse("full")


class Base(BaseHTTPMiddleware):
    """A middleware that does nothing, in the way that costs disconnects and context."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)


ROUTES = [
    Route("/stats", stats),
    Route("/release", release),
    Route("/hold", hold),
    Route("/sleep", sleep),
    Route("/hold-in-background", hold_in_background),
    Route("/stuck", stuck),
    Route("/upload", upload, methods=["POST"]),
    Route("/stream", stream),
    Route("/endless", endless),
    Route("/refused", refused),
    Route("/fill", fill),
    WebSocketRoute("/ws", websocket),
]

app = Starlette(
    routes=[*ROUTES, Mount("/base", Starlette(routes=ROUTES, middleware=[Middleware(Base)]))],
    middleware=[Middleware(InferenceMiddleware, runner=[runner, full], grace=GRACE)],
)


async def _bare(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    body = str(await runner.run(abs, -7)).encode()
    headers = [(b"content-length", b"1")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


bare = InferenceMiddleware(_bare, runner=runner)


def _fail() -> Any:
    raise OSError("no weights\nin sight")


def _with(load: Any, **options: Any) -> Starlette:
    middleware = Middleware(InferenceMiddleware, runner=InferenceRunner(load), **options)
    return Starlette(routes=ROUTES, middleware=[middleware])


broken = _with(_fail)
slow = _with(partial(threading.Event().wait), startup_timeout=0.1)
