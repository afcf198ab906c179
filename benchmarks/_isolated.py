"""A function in another process, awaited: through the runner, and in the usual ways.

As a program: one arm, that makes the same call again and again.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import anyio.to_process
import numpy as np

from asgi_infer import InferenceRunner
from asgi_infer.workers import ProcessWorker

# By their whole names: anyio's processes import a program as a file, which is in no package.
from benchmarks._children import answer
from benchmarks._functions import STRIDE, noop, touch

Call = Callable[..., Awaitable[Any]]
"""Awaits ``function(*arguments)``, wherever that runs."""


Once = Callable[[], Awaitable[object]]
"""The same, of one function and its arguments."""


class Untouched(RuntimeError):
    """What has come back is not what the function returned."""


# -- the arms: each has one process, which stays -------------------------------------------------


@asynccontextmanager
async def process_worker() -> AsyncIterator[Call]:
    runner: InferenceRunner[None]
    async with InferenceRunner(worker=ProcessWorker()) as runner:
        yield runner.run


@asynccontextmanager
async def anyio_to_process() -> AsyncIterator[Call]:
    limiter = anyio.CapacityLimiter(1)
    yield lambda *call: anyio.to_process.run_sync(*call, limiter=limiter)


@asynccontextmanager
async def thread_and_pipe() -> AsyncIterator[Call]:
    """As it is written by hand: a thread of an executor sends, and waits for the answer."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer_calls, args=(theirs,))
    process.start()
    theirs.close()

    def ask(*call: Any) -> Any:
        ours.send(call)
        return ours.recv()

    with ThreadPoolExecutor(1) as executor:
        yield _in(executor, ask)
    ours.close()
    process.join()


def _answer_calls(connection: Connection) -> None:
    with suppress(EOFError):  # the other end has been closed
        while True:
            function, *arguments = connection.recv()
            connection.send(function(*arguments))


@asynccontextmanager
async def process_pool() -> AsyncIterator[Call]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield _in(executor)


@asynccontextmanager
async def loky() -> AsyncIterator[Call]:
    with import_module("loky").ProcessPoolExecutor(1) as executor:
        yield _in(executor)


def _in(executor: Executor, *first: Any) -> Call:
    loop = asyncio.get_running_loop()
    return lambda *call: loop.run_in_executor(executor, *(first + call))


@asynccontextmanager
async def two_copies() -> AsyncIterator[Call]:
    """The limit: the array is copied there, and back, within this thread."""
    memory: dict[int, tuple[Any, Any]] = {}

    async def call(function: Callable[[Any], Any], array: Any) -> Any:
        if array.size not in memory:
            memory[array.size] = np.empty_like(array), np.empty_like(array)
        there, back = memory[array.size]
        np.copyto(there, array)
        np.copyto(back, function(there))
        return back

    yield call


ARMS = {
    "ProcessWorker": process_worker,
    "anyio.to_process": anyio_to_process,
    "thread + Pipe": thread_and_pipe,
    "ProcessPoolExecutor": process_pool,
    "loky": loky,
    "two copies": two_copies,
}


# -- measuring -----------------------------------------------------------------------------------


async def there_and_back(call: Call, array: Any) -> None:
    """Have the array touched, and look at every page of what comes back.

    :raises Untouched: that is not it
    """
    returned = await call(touch, array)
    if returned.shape != array.shape or not (returned[::STRIDE] == array[::STRIDE] + 1).all():
        raise Untouched("the array that came back is not the one that was sent, touched")


async def median(once: Once, calls: int) -> float:
    """The seconds that a call takes. Before, some calls are made that do not count."""
    seconds = []
    for number in range(-max(2, calls // 10), calls):
        start = perf_counter()
        await once()
        if number >= 0:
            seconds.append(perf_counter() - start)
    return statistics.median(seconds)


async def passes(arms: Mapping[str, Mapping[str, Once]], count: int, calls: int) -> dict[str, Any]:
    """Each arm's median pass, in microseconds a call, by metric. Passes take turns."""
    seen: dict[tuple[str, str], list[float]] = {}
    for _ in range(count):
        for arm, metrics in arms.items():
            for metric, once in metrics.items():
                seen.setdefault((arm, metric), []).append(1e6 * await median(once, calls))
    return {
        arm: {metric: statistics.median(seen[arm, metric]) for metric in metrics}
        for arm, metrics in arms.items()
    }


async def measure(arm: str, mebibytes: float, calls: int) -> dict[str, float]:
    """The microseconds of a call: with an array, or, if that has no size, of one without work."""
    async with ARMS[arm]() as call:
        if not mebibytes:
            return {"call": 1e6 * await median(lambda: call(noop), calls)}
        array = np.ones(round(mebibytes * 2**18), dtype=np.float32)
        return {"call": 1e6 * await median(lambda: there_and_back(call, array), calls)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._isolated")
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--mebibytes", type=float, default=0.0, help="of the array")
    parser.add_argument("--calls", type=int, required=True)
    options = parser.parse_args()
    answer(**anyio.run(measure, options.arm, options.mebibytes, options.calls))


if __name__ == "__main__":
    main()
