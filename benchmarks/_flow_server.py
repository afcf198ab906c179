"""One arm of the figures about the flow of calls: overload, batches, streams.

Each arm is written as its own documentation has it, and serves ``/predict``.
"""
# FastAPI looks at annotations: where they name what is local, they have to be no strings.

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from asgi_infer import Batcher, InferenceMiddleware, InferenceRunner, QueuePolicy

from ._batches import SIZE
from ._server import serve
from ._work import NOTHING, Work

LINE = b"z\n"
"""An item of a stream. The clients count the letter, which is in nothing else of a response."""


FEW = 50
"""Items of a short stream."""


class Item(BaseModel):
    """What a request brings where calls are batched."""

    number: int


def ours(app: FastAPI, options: argparse.Namespace) -> InferenceRunner[Work]:
    """A runner that starts and ends with the application."""
    runner = InferenceRunner(
        lambda: options.work,
        warmup=Work.predict,
        timeout=options.deadline,
        queue=QueuePolicy(overload=options.overload),
    )
    app.add_middleware(InferenceMiddleware, runner=runner)
    return runner


# -- overload: the deadline is the runner's, and everybody else's clients have nothing but theirs


def with_runner(app: FastAPI, options: argparse.Namespace) -> None:
    runner = ours(app, options)

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


def executor_of(app: FastAPI) -> ThreadPoolExecutor:
    """One that ends with the application."""
    executor = ThreadPoolExecutor(1)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with executor:
            yield

    app.router.lifespan_context = lifespan
    return executor


def with_executor(app: FastAPI, options: argparse.Namespace) -> None:
    work: Work = options.work
    executor = executor_of(app)

    @app.get("/predict")
    async def predict() -> int:
        return await asyncio.get_running_loop().run_in_executor(executor, work.predict)


def with_executor_and_timeout(app: FastAPI, options: argparse.Namespace) -> None:
    """What waits in an executor can be cancelled, and then does not run."""
    work: Work = options.work
    deadline: float = options.deadline
    executor = executor_of(app)

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
    runner = ours(app, options)

    @app.post("/predict")
    async def predict(item: Item) -> int:
        return (await runner.run(runner.model.predict_many, [item.number]))[0]


def batcher_for(runner: InferenceRunner[Work], options: argparse.Namespace) -> Batcher[int, int]:
    delay: float = options.max_delay
    return Batcher(runner, runner.model.predict_many, max_size=SIZE, max_delay=delay)


def with_batcher(app: FastAPI, options: argparse.Namespace) -> None:
    runner = ours(app, options)
    batcher = batcher_for(runner, options)

    @app.post("/predict")
    async def predict(item: Item) -> int:
        return await batcher.run(item.number)


def with_batcher_alone(app: FastAPI, options: argparse.Namespace) -> None:
    """What is left of FastAPI is Starlette: no models of the request and of the response."""
    runner = ours(app, options)
    batcher = batcher_for(runner, options)

    async def predict(request: Request) -> JSONResponse:
        item = await request.json()
        return JSONResponse(await batcher.run(item["number"]))

    app.router.add_route("/predict", predict, methods=["POST"])


# -- streams -----------------------------------------------------------------------------------


def lines(count: int) -> Iterator[bytes]:
    """The model: many small items."""
    for _ in range(count):
        yield LINE


def runner_stream(app: FastAPI, options: argparse.Namespace) -> None:
    runner = ours(app, options)

    def stream(count: int) -> StreamingResponse:
        return StreamingResponse(runner.stream(lines, count, interleave=options.interleave))

    stream_routes(app, stream, options)


def threadpool_stream(app: FastAPI, options: argparse.Namespace) -> None:
    """What Starlette does with an iterator that is not async."""
    stream_routes(app, lambda count: StreamingResponse(lines(count)), options)


def stream_routes(
    app: FastAPI, stream: Callable[[int], StreamingResponse], options: argparse.Namespace
) -> None:
    """A long stream and a short one."""

    @app.get("/predict")
    async def predict() -> StreamingResponse:
        return stream(options.items)

    @app.get("/few")
    async def few() -> StreamingResponse:
        return stream(FEW)


ARMS: dict[str, Callable[[FastAPI, argparse.Namespace], None]] = {
    "runner": with_runner,
    "def": with_def,
    "dependency": with_dependency,
    "executor": with_executor,
    "executor-timeout": with_executor_and_timeout,
    "unbatched": unbatched,
    "batcher": with_batcher,
    "batcher-alone": with_batcher_alone,
    "runner-stream": runner_stream,
    "threadpool-stream": threadpool_stream,
}


def application(arguments: Sequence[str] | None = None) -> FastAPI:
    """The application of the arm that the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks._flow_server")
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--work", type=Work.parse, default=NOTHING, help="FIXED,EACH: iterations")
    parser.add_argument("--deadline", type=float, help="seconds: the runner's timeout")
    parser.add_argument("--overload", default=QueuePolicy.overload, help="the queue's policy")
    parser.add_argument("--max-delay", type=float, default=0.0, help="seconds, of batches")
    parser.add_argument("--interleave", action="store_true", help="streams")
    parser.add_argument("--items", type=int, default=0, help="of a stream")
    options = parser.parse_args(arguments)
    app = FastAPI()
    ARMS[options.arm](app, options)
    return app


if __name__ == "__main__":
    serve(application())
