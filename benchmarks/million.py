"""Whether anything is left behind: memory and threads after a million calls.

As a program: one process that makes the calls with 32 callers and looks at itself now and then.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import psutil

from asgi_infer import InferenceRunner

from ._children import answer, once
from ._figure import Comparison, Figure, Metric, Sample, Scale, one_by_one

_CALLERS = 32
_FIRST = 1000
_FLAT = 1.0  # MiB; less than two bytes a call


def noop() -> None:
    """The function."""


def _process(arm: str) -> Callable[[Scale], Sample]:
    return lambda scale: once("million", arm, "--calls", str(scale.million))


async def _repeat(call: Callable[[], Awaitable[object]], calls: int) -> None:
    async def caller(count: int) -> None:
        for _ in range(count):
            await call()

    share, rest = divmod(calls, _CALLERS)
    await asyncio.gather(*(caller(share + (number < rest)) for number in range(_CALLERS)))


async def _watch(call: Callable[[], Awaitable[object]], calls: int) -> Sample:
    process = psutil.Process()
    await _repeat(call, _FIRST)
    gc.collect()
    rss, threads = process.memory_info().rss, process.num_threads()
    start = time.perf_counter()
    await _repeat(call, calls - _FIRST)
    seconds = time.perf_counter() - start
    gc.collect()
    now = process.memory_info().rss
    return {
        "rss_before": rss / 2**20,
        "rss_after": now / 2**20,
        "growth": (now - rss) / 2**20,
        "threads_before": threads,
        "threads_after": process.num_threads(),
        "threads_growth": process.num_threads() - threads,
        "microseconds": seconds / (calls - _FIRST) * 1e6,
    }


async def _runner(calls: int) -> Sample:
    runner: InferenceRunner[None]
    async with InferenceRunner() as runner:
        return await _watch(lambda: runner.run(noop), calls)


async def _executor(calls: int) -> Sample:
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as executor:
        return await _watch(lambda: loop.run_in_executor(executor, noop), calls)


_ARMS = {"runner": _runner, "executor": _executor}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.million")
    parser.add_argument("arm", choices=_ARMS)
    parser.add_argument("--calls", type=int, required=True)
    options = parser.parse_args()
    answer(**asyncio.run(_ARMS[options.arm](options.calls)))


FIGURES = [
    Figure(
        name="million",
        title=f"a million calls through one runner, {_CALLERS} callers, against after {_FIRST}",
        arms=list(_ARMS),
        metrics=[
            Metric("rss_before", f"RSS MiB after {_FIRST}"),
            Metric("rss_after", "at the end"),
            Metric("growth", "growth MiB", digits=2),
            Metric("threads_before", f"threads after {_FIRST}", digits=0),
            Metric("threads_after", "at the end", digits=0),
            Metric("threads_growth", "growth", digits=0),
            Metric("microseconds", "us/call"),
        ],
        comparisons=[
            Comparison("growth", "runner", at_most=_FLAT),
            Comparison("threads_growth", "runner", at_most=0),
        ],
        steps=one_by_one({arm: _process(arm) for arm in _ARMS}),
        rounds=1,
    )
]


if __name__ == "__main__":
    main()
