"""What type checkers make of the public face. Checked by mypy and pyright, never run.

A line that must be refused carries an ignore, and both checkers complain of one in vain.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from functools import partial
from typing import Any, assert_type

import numpy as np
from fastapi import FastAPI
from fastapi.sse import EventSourceResponse
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.responses import StreamingResponse

from asgi_infer import (
    Batcher,
    DeadlineExceeded,
    InferenceMiddleware,
    InferenceRunner,
    NativePolicy,
    RunnerStatistics,
    Stream,
    check_cancelled,
    runner_from,
)
from asgi_infer.fastapi import RunnerDep, get_runner, named
from asgi_infer.workers import ThreadWorker
from asgi_infer.workers._protocol import ModelSpec, Replica, Worker

Image = NDArray[np.float32]


class Digits:
    """A model."""

    classes: tuple[str, ...] = ()

    def predict(self, image: Image, top: int = 1) -> list[int]:
        """Returns what run() must return."""
        raise NotImplementedError

    def steps(self, count: int) -> Iterator[str]:
        """Yields what stream() must give."""
        raise NotImplementedError


def load() -> Digits:
    """A loader that is a function."""
    return Digits()


def area(width: int, height: int) -> float:
    """A function that is not the model's."""
    raise NotImplementedError


def making() -> None:
    """A runner has the type of its model, however that is made."""
    assert_type(InferenceRunner(Digits), InferenceRunner[Digits])
    assert_type(InferenceRunner(load), InferenceRunner[Digits])
    assert_type(InferenceRunner(partial(Digits)), InferenceRunner[Digits])
    assert_type(InferenceRunner[None](), InferenceRunner[None])
    InferenceRunner(
        Digits,
        warmup=lambda model: model.predict(np.zeros((8, 8), np.float32)),
        name="digits",
        max_queue=1,
        timeout=2.0,
        native=NativePolicy(threads=2, cpus={0, 1}, nice=0, contexts=(nullcontext,)),
        worker=ThreadWorker(),
    )
    InferenceRunner(Digits())  # type: ignore[arg-type]
    InferenceRunner(Digits, warmup=lambda model: model.train())  # type: ignore[attr-defined]


async def running(runner: InferenceRunner[Digits], image: Image) -> None:
    """run() takes the function's arguments and returns what it returns."""
    assert_type(runner.model, Digits)
    assert_type(await runner.run(runner.model.predict, image, 3), list[int])
    assert_type(await runner.run(area, 3, 4), float)
    assert_type(await runner.run(partial(runner.model.predict, image, top=3)), list[int])
    assert_type(await runner.run(lambda model: model.classes, runner.model), tuple[str, ...])
    assert_type(await runner.run(area, 3, 4, timeout=1.5, priority=-1), float)
    await runner.run(area, 3)  # type: ignore[arg-type]
    await runner.run(area, 3, "4")  # type: ignore[arg-type]
    await runner.run(area(3, 4))  # type: ignore[arg-type]
    await runner.run(area, 3, 4, timeout="soon")  # type: ignore[arg-type]


def submitting(runner: InferenceRunner[Digits], image: Image) -> None:
    """submit() gives a future of the result; the runner is an executor."""
    assert_type(runner.submit(runner.model.predict, image, top=3), Future[list[int]])
    assert_type(runner.submit(area, 3, height=4).result(), float)
    assert_type(runner.map(area, [1, 2], [3, 4]), Iterator[float])
    runner.submit(area, 3)  # type: ignore[call-arg]
    runner.submit(area, 3, depth=4)  # type: ignore[call-arg]
    executor: Executor = runner
    executor.shutdown(wait=False, cancel_futures=True)


async def in_executor(runner: InferenceRunner[Digits]) -> None:
    """The standard library takes it for one."""
    loop = asyncio.get_running_loop()
    assert_type(await loop.run_in_executor(runner, area, 3, 4), float)


async def wrapping(runner: InferenceRunner[Digits], image: Image) -> None:
    """wrap() keeps the signature and makes it async."""
    wrapped = runner.wrap(area)
    same: Callable[[int, int], Coroutine[Any, Any, float]] = wrapped
    assert_type(await same(3, 4), float)
    assert_type(await wrapped(3, height=4), float)
    assert_type(await runner.wrap(runner.model.predict, timeout=1.0)(image, top=3), list[int])
    await wrapped(3)  # type: ignore[call-arg]
    await wrapped(3, depth=4)  # type: ignore[call-arg]

    @runner.wrap
    def double(number: int) -> int:
        return 2 * number

    assert_type(await double(3), int)


async def streaming(runner: InferenceRunner[Digits]) -> None:
    """stream() takes a generator function's arguments and gives its items."""
    stream = runner.stream(runner.model.steps, 3)
    assert_type(stream, Stream[str])
    async for step in stream:
        assert_type(step, str)
    assert_type(await anext(runner.stream(iter, [1, 2])), int)
    async with runner.stream(
        partial(runner.model.steps, count=3),
        buffer=1,
        stall_timeout=None,
        interleave=True,
        timeout=1.5,
        priority=-1,
    ) as same:
        assert_type(same, Stream[str])
        await same.aclose()
    StreamingResponse(stream)
    EventSourceResponse(stream)
    wrapped = runner.wrap(runner.model.steps, timeout=1.0)
    assert_type(wrapped(count=3), Stream[str])
    runner.stream(runner.model.steps, "3")  # type: ignore[arg-type]
    runner.stream(runner.model.steps(3))  # type: ignore[arg-type]
    runner.stream(area, 3, 4)  # type: ignore[arg-type]
    wrapped("3")  # type: ignore[arg-type]


async def living(runner: InferenceRunner[Digits]) -> None:
    """Lifecycle and statistics."""
    async with runner as same:
        assert_type(same, InferenceRunner[Digits])
    async with runner.opened(startup_timeout=60.0, grace=1.0) as same:
        assert_type(same, InferenceRunner[Digits])
    with runner as same:
        assert_type(same, InferenceRunner[Digits])
    await runner.start(timeout=60.0)
    await runner.wait_idle()
    await runner.aclose(grace=1.0)
    statistics = runner.statistics()
    assert_type(statistics, RunnerStatistics)
    assert_type(statistics.queued, int)
    statistics.queued = 0  # type: ignore[misc]
    runner.model = Digits()  # type: ignore[misc]


def mounting(runner: InferenceRunner[Digits], connection: HTTPConnection) -> None:
    """In applications."""
    FastAPI(lifespan=runner.lifespan)
    Starlette(lifespan=runner.lifespan)
    FastAPI().add_middleware(InferenceMiddleware, runner=runner, grace=1.0)
    Starlette(middleware=[Middleware(InferenceMiddleware, runner=[runner])])
    assert_type(runner_from(connection), InferenceRunner[Any])
    assert_type(runner_from(connection, "digits"), InferenceRunner[Any])
    app = FastAPI()
    app.dependency_overrides[get_runner] = lambda: runner
    app.dependency_overrides[named("digits")] = lambda: runner

    @app.get("/")
    async def endpoint(runner: RunnerDep) -> float:
        return await runner.run(area, 3, 4)


def failing(error: DeadlineExceeded) -> None:
    """Errors are those of the standard library as well."""
    timeout: TimeoutError = error
    assert_type(error.started, bool)
    assert_type(error.retry_after, float | None)
    raise timeout


def inside() -> None:
    """Inside a function."""
    assert_type(check_cancelled(), None)


def working(spec: ModelSpec) -> None:
    """Workers are anything that keeps to the protocol."""
    worker: Worker = ThreadWorker()
    replica: Replica = worker.replica(spec, 0)
    replica.close()


Vector = NDArray[np.float32]


class Embedder:
    """A model that takes many at once."""

    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Returns an array with as many rows."""
        raise NotImplementedError

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Takes any sequence, returns a list."""
        raise NotImplementedError

    def forward(self, images: Image) -> Image:
        """Takes a stacked array, returns one."""
        raise NotImplementedError

    def detect(self, images: Image) -> list[dict[str, float]]:
        """Takes a stacked array, returns a list."""
        raise NotImplementedError

    def both(self, pair: tuple[Image, Image]) -> dict[str, Image]:
        """Takes two stacked arrays."""
        raise NotImplementedError


async def batching(runner: InferenceRunner[Embedder], image: Image) -> None:
    """A Batcher takes one item and returns its result; the function takes and returns many."""
    lengths = Batcher(runner, runner.model.lengths, max_size=8)
    assert_type(lengths, Batcher[str, int])
    assert_type(await lengths.run("a text", timeout=1.0, priority=1), int)
    assert_type(lengths.submit("a text"), Future[int])
    await lengths.run(3)  # type: ignore[arg-type]
    embed = Batcher(runner, runner.model.embed, max_size=8, max_delay=0.002)
    assert_type(embed, Batcher[str, Any])
    exact: Batcher[str, Vector] = Batcher(runner, runner.model.embed, max_size=8)
    assert_type(await exact.run("a text"), Vector)
    Batcher(runner, area, max_size=8)  # type: ignore[arg-type]
    Batcher(runner, runner.model.embed)  # type: ignore[call-overload]


async def stacking(runner: InferenceRunner[Embedder], image: Image) -> None:
    """With stack=True the function takes what the items are, with one axis more."""
    forward = Batcher(runner, runner.model.forward, max_size=8, stack=True)
    assert_type(forward, Batcher[Image, Any])
    await forward.run("a text")  # type: ignore[arg-type]
    detect = Batcher(runner, runner.model.detect, max_size=8, stack=True)
    assert_type(await detect.run(image), dict[str, float])
    both = Batcher(runner, runner.model.both, max_size=8, stack=True)
    assert_type(both, Batcher[tuple[Image, Image], Any])
