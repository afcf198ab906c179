"""The model in a loop, without a server: on the main thread of a script, or on a runner.

The script is what everything is held against.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

from asgi_infer import InferenceRunner, NativePolicy
from asgi_infer.workers import ProcessWorker, ThreadWorker
from asgi_infer.workers._protocol import Worker

from ._children import answer
from ._models import Model, add_options, loader, warm_up


class Loop:
    """Calls until the time is up, begun when the parent says so.

    :param seconds: how long
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def run(self, call: Callable[[], object]) -> None:
        """Call, and call again."""
        start, calls = self._begin(), 0
        while time.perf_counter() - start < self._seconds:
            call()
            calls += 1
        self._end(start, calls)

    async def run_async(self, call: Callable[[], Awaitable[object]]) -> None:
        """Await, and await again."""
        start, calls = self._begin(), 0
        while time.perf_counter() - start < self._seconds:
            await call()
            calls += 1
        self._end(start, calls)

    @staticmethod
    def _begin() -> float:
        answer(event="ready")
        if not sys.stdin.readline():
            raise SystemExit("the parent is gone")
        return time.perf_counter()

    @staticmethod
    def _end(start: float, calls: int) -> None:
        answer(calls=calls, seconds=time.perf_counter() - start)
        sys.stdin.readline()  # the counts of threads that have ended can't be read


def on_main(loop: Loop, load: Callable[[], Model], native: NativePolicy, worker: Worker) -> None:
    """As scripts do. Nothing is set up."""
    del native, worker
    model = load()
    warm_up(model)
    loop.run(model.predict)


def with_submit(
    loop: Loop, load: Callable[[], Model], native: NativePolicy, worker: Worker
) -> None:
    """A script that has the runner call its model."""
    with InferenceRunner(load, warmup=warm_up, native=native, worker=worker) as runner:
        runner.submit(runner.model.predict).result()
        loop.run(lambda: runner.submit(runner.model.predict).result())


def with_run(loop: Loop, load: Callable[[], Model], native: NativePolicy, worker: Worker) -> None:
    """The same in asynchronous code."""

    async def main() -> None:
        async with InferenceRunner(load, warmup=warm_up, native=native, worker=worker) as runner:
            await loop.run_async(lambda: runner.run(runner.model.predict))

    asyncio.run(main())


HOW = {"main": on_main, "submit": with_submit, "run": with_run}
WORKERS: dict[str, Callable[[], Worker]] = {"thread": ThreadWorker, "process": ProcessWorker}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._script")
    add_options(parser)
    parser.add_argument("--how", choices=HOW, default="main")
    parser.add_argument("--worker", choices=WORKERS, default="thread")
    parser.add_argument("--retain-memory", action="store_true")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    native = NativePolicy(retain_memory=options.retain_memory)
    load, worker = loader(options.model, options.file), WORKERS[options.worker]()
    HOW[options.how](Loop(options.seconds), load, native, worker)


if __name__ == "__main__":
    main()
