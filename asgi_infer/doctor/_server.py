"""The model behind FastAPI and uvicorn, in one of the usual ways or on a runner.

But for the runner, the model is loaded and warmed up on the main thread, before the server runs:
most applications do so when they are imported.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

import uvicorn
from fastapi import FastAPI

from .._runner import InferenceRunner
from ..middleware import InferenceMiddleware
from ..native import NativePolicy
from ._calls import warm_up
from ._channel import Channel, python_threads
from ._target import Target

P = ParamSpec("P")
T = TypeVar("T")

PATH = "/predict"
_QUEUE = 128  # the runner's default
Endpoint = Callable[[], Awaitable[str] | str]


def serve(
    channel: Channel, job: dict[str, Any], target: Target, arguments: tuple[Any, ...]
) -> None:
    """Serve on a free port until the parent has had enough.

    :raises Exception: whatever kept the model from loading
    """
    app = application(job, target, arguments)
    server = Server(app, channel)
    # SystemExit is uvicorn's, where an application does not start.
    with listening() as listener, suppress(SystemExit):
        server.run([listener])
    if not server.started:
        raise getattr(app.state, "failure", RuntimeError("the server did not start"))


def listening() -> socket.socket:
    """A socket of the server's, on a free port."""
    # With its protocol: asyncio has answers sent at once (TCP_NODELAY) only on sockets that it
    # knows for TCP's. On others each one waits for the client's acknowledgement, 40 ms.
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    return listener


def application(job: dict[str, Any], target: Target, arguments: tuple[Any, ...]) -> FastAPI:
    """The application of one arm. What the model returns is not sent: only it is measured."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> str:
        return "ok"

    if job["how"] == "runner":
        endpoint = _on_runner(app, job, target, arguments)
    else:
        call = target.bind(target.make(), arguments)
        warm_up(call)
        endpoint = ENDPOINTS[job["how"]](call)
    app.get(PATH)(endpoint)
    return app


def _in_the_thread_pool(call: Callable[[], object]) -> Endpoint:
    def predict() -> str:
        call()
        return "ok"

    return predict


def _in_the_loop(call: Callable[[], object]) -> Endpoint:
    async def predict() -> str:
        call()
        return "ok"

    return predict


def _in_an_executor(call: Callable[[], object]) -> Endpoint:
    async def predict() -> str:
        await asyncio.get_running_loop().run_in_executor(None, call)  # the server's
        return "ok"

    return predict


ENDPOINTS = {
    "def": _in_the_thread_pool,
    "async-def": _in_the_loop,
    "executor": _in_an_executor,
}


def _on_runner(
    app: FastAPI, job: dict[str, Any], target: Target, arguments: tuple[Any, ...]
) -> Endpoint:
    runner = InferenceRunner(
        # Imported here, on the main thread, as an application imports the names that it uses.
        _noting_failure(app, target.factory()),
        warmup=_noting_failure(app, lambda model: warm_up(target.bind(model, arguments))),
        max_queue=max(_QUEUE, job["clients"]),
        native=NativePolicy(**job["native"]),
    )
    app.add_middleware(InferenceMiddleware, runner=runner)
    reference = runner.model
    for name in target.call.split(".") if target.call else ():
        reference = getattr(reference, name)

    async def predict() -> str:
        await runner.run(reference, *arguments)
        return "ok"

    return predict


def _noting_failure(app: FastAPI, function: Callable[P, T]) -> Callable[P, T]:
    """For the parent to hear of it: uvicorn but logs why an application does not start."""

    def noting(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            app.state.failure = error
            raise

    return noting


class Server(uvicorn.Server):
    """Tells the parent its port, then its threads when asked, and ends with its input."""

    def __init__(self, app: FastAPI, channel: Channel) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on"))
        self._channel = channel

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, and say so."""
        executor = ThreadPoolExecutor(1, "executor")  # whose thread starts with its first call
        asyncio.get_running_loop().set_default_executor(executor)  # it ends with the loop
        await super().startup(sockets)
        if self.started and sockets:  # pragma: no branch  # the latest uvicorn raises SystemExit
            asyncio.get_running_loop().add_reader(self._channel.reader, self._told)
            self._channel.send(port=sockets[0].getsockname()[1])

    def _told(self) -> None:
        try:
            self._channel.receive()
        except SystemExit:
            asyncio.get_running_loop().remove_reader(self._channel.reader)
            self.should_exit = True
        else:
            self._channel.send(threads=python_threads())
