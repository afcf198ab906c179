"""An application for servers with several processes, which share a model.

The model's process keeps ``$MEETING.alive`` locked. See ``meeting`` for what else is there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from asgi_infer import InferenceMiddleware, InferenceRunner
from asgi_infer.workers import RestartPolicy, SharedWorker

from . import meeting

LIMIT = 20.0
"""Seconds after which a call that a test holds open gives up, should the test have died."""


class Model:
    """Counts itself, and tells where it lives."""

    def __init__(self) -> None:
        meeting.hold_alive(Path(os.environ["MEETING"]))

    def pid(self) -> int:
        return os.getpid()

    def pids(self) -> Iterator[int]:
        while True:
            yield os.getpid()

    def hold(self, path: str) -> int:
        """Run until a file is there; make another when it begins."""
        Path(path + ".held").touch()
        end = time.monotonic() + LIMIT
        while not Path(path).exists() and time.monotonic() < end:
            time.sleep(0.002)
        return os.getpid()


worker = SharedWorker(restart=RestartPolicy(max_restarts=1000, backoff=0.0))
runner = InferenceRunner(Model, name=os.environ.get("NAME", "shared"), worker=worker)


async def pids(request: Request) -> Response:
    return JSONResponse([os.getpid(), await runner.run(runner.model.pid)])


async def hold(request: Request) -> Response:
    return JSONResponse(await runner.run(runner.model.hold, request.query_params["path"]))


app = Starlette(
    routes=[Route("/pids", pids), Route("/hold", hold)],
    middleware=[Middleware(InferenceMiddleware, runner=runner)],
)
