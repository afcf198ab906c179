"""One model behind FastAPI and uvicorn in one of the usual ways, or in ours.

The model is loaded and used on the main thread as well, before the server runs, whatever the arm:
most applications do so at import, and that is what slows the others down.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI

from asgi_infer import InferenceMiddleware, InferenceRunner, NativePolicy
from asgi_infer.fastapi import RunnerDep
from asgi_infer.native import openmp

from ._children import answer
from ._models import Model, add_options, loader, warm_up


def in_the_loop(app: FastAPI, model: Model) -> None:
    @app.get("/predict")
    async def predict() -> int:
        return model.predict()


def in_the_thread_pool(app: FastAPI, model: Model) -> None:
    @app.get("/predict")
    def predict() -> int:
        return model.predict()


def in_an_executor(app: FastAPI, model: Model) -> None:
    executor = ThreadPoolExecutor(1)

    @app.get("/predict")
    async def predict() -> int:
        return await asyncio.get_running_loop().run_in_executor(executor, model.predict)


ALTERNATIVES = {
    "async def": in_the_loop,
    "def": in_the_thread_pool,
    "executor": in_an_executor,
}


def in_the_runner(app: FastAPI, load: Callable[[], Model], native: NativePolicy) -> None:
    runner = InferenceRunner(load, warmup=warm_up, native=native)
    app.add_middleware(InferenceMiddleware, runner=runner)

    @app.get("/predict")
    async def predict(runner: RunnerDep) -> int:
        digit: int = await runner.run(runner.model.predict)
        return digit


def application(arm: str, load: Callable[[], Model], native: NativePolicy) -> FastAPI:
    """The application of one arm."""
    model = load()
    warm_up(model)
    app = FastAPI()

    @app.get("/health")
    async def health() -> str:
        return "ok"

    if arm == "runner":
        in_the_runner(app, load, native)
    else:
        ALTERNATIVES[arm](app, model)
    return app


class Server(uvicorn.Server):
    """As ``uvicorn module:app`` serves, on a free port, until the parent has had enough."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_reader(sys.stdin, self._end)
        if sockets:
            answer(port=sockets[0].getsockname()[1])

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin)
        self.should_exit = True


def listener() -> socket.socket:
    """On a free port of the loopback interface."""
    # With its protocol: asyncio has answers sent at once (TCP_NODELAY) only where it knows that.
    listening = socket.socket(proto=socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    return listening


def configured(app: FastAPI) -> uvicorn.Config:
    """As everywhere here."""
    return uvicorn.Config(app, log_level="warning", access_log=False)


def serve(app: FastAPI) -> None:
    with listener() as listening:
        Server(configured(app)).run([listening])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._server")
    parser.add_argument("arm", choices=[*ALTERNATIVES, "runner"])
    add_options(parser)
    parser.add_argument("--nice", type=int, default=NativePolicy.nice)
    parser.add_argument("--retain-memory", action="store_true")
    parser.add_argument("--keep-pool", action="store_true", help="of the main thread")
    options = parser.parse_args()
    if options.keep_pool:
        openmp.release_pools = lambda: 0
    native = NativePolicy(nice=options.nice, retain_memory=options.retain_memory)
    serve(application(options.arm, loader(options.model, options.file), native))


if __name__ == "__main__":
    main()
