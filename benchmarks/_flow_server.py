"""One arm of the figures about the flow of calls: overload, batches, streams.

Each arm is written as its own documentation has it, and serves ``/predict``.
"""
# FastAPI looks at annotations: where they name what is local, they have to be no strings.

import argparse
import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel
from starlette.responses import StreamingResponse

from asgi_infer import InferenceMiddleware, InferenceRunner

from ._server import serve
from ._work import NOTHING, Work

LINE = b"z\n"
"""An item of a stream. The clients count the letter, which is in nothing else of a response."""


class Item(BaseModel):
    """What a request brings where calls are batched."""

    number: int


def ours(app: FastAPI, work: Work, timeout: float | None = None) -> InferenceRunner[Work]:
    """A runner that starts and ends with the application."""
    runner = InferenceRunner(lambda: work, warmup=Work.predict, timeout=timeout)
    app.add_middleware(InferenceMiddleware, runner=runner)
    return runner


# -- overload: the deadline is the runner's, and everybody else's clients have nothing but theirs


def with_runner(app: FastAPI, options: argparse.Namespace) -> None:
    runner = ours(app, options.work, options.deadline)

    @app.get("/predict")
    async def predict() -> int:
        return await runner.run(runner.model.predict)


def with_def(app: FastAPI, options: argparse.Namespace) -> None:
    work: Work = options.work

    @app.get("/predict")
    def predict() -> int:
        return work.predict()


def with_dependency(app: FastAPI, options: argparse.Namespace) -> None:
    work: Work = options.work

    def call() -> int:
        return work.predict()

    @app.get("/predict")
    async def predict(digit: Annotated[int, Depends(call, max_concurrency=1)]) -> int:
        return digit


def with_executor(app: FastAPI, options: argparse.Namespace) -> None:
    work: Work = options.work
    executor = ThreadPoolExecutor(1)

    @app.get("/predict")
    async def predict() -> int:
        return await asyncio.get_running_loop().run_in_executor(executor, work.predict)


def with_executor_and_timeout(app: FastAPI, options: argparse.Namespace) -> None:
    """What waits in an executor can be cancelled, and then does not run."""
    work: Work = options.work
    deadline: float = options.deadline
    executor = ThreadPoolExecutor(1)

    @app.get("/predict")
    async def predict() -> int:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(deadline):
                return await loop.run_in_executor(executor, work.predict)
        except TimeoutError:
            raise HTTPException(504) from None


# -- batches -----------------------------------------------------------------------------------


def unbatched(app: FastAPI, options: argparse.Namespace) -> None:
    runner = ours(app, options.work)

    @app.post("/predict")
    async def predict(item: Item) -> int:
        return (await runner.run(runner.model.predict_many, [item.number]))[0]


# -- streams -----------------------------------------------------------------------------------


def lines(count: int) -> Iterator[bytes]:
    """The model: many small items."""
    for _ in range(count):
        yield LINE


def threadpool_stream(app: FastAPI, options: argparse.Namespace) -> None:
    count: int = options.items

    @app.get("/predict")
    async def predict() -> StreamingResponse:
        return StreamingResponse(lines(count))


ARMS: dict[str, Callable[[FastAPI, argparse.Namespace], None]] = {
    "runner": with_runner,
    "def": with_def,
    "dependency": with_dependency,
    "executor": with_executor,
    "executor-timeout": with_executor_and_timeout,
    "unbatched": unbatched,
    "batcher": unbatched,  # TODO
    "threadpool-stream": threadpool_stream,
}


def application(arguments: Sequence[str] | None = None) -> FastAPI:
    """The application of the arm that the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks._flow_server")
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--work", type=Work.parse, default=NOTHING, help="FIXED,EACH: iterations")
    parser.add_argument("--deadline", type=float, help="seconds: the runner's timeout")
    parser.add_argument("--items", type=int, default=0, help="of a stream")
    options = parser.parse_args(arguments)
    app = FastAPI()
    ARMS[options.arm](app, options)
    return app


if __name__ == "__main__":
    serve(application())
