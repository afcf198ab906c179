"""How late the event loop is while a call holds Python's lock.

As a program: one arm, that makes a few such calls.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

from asgi_infer import InferenceRunner

from ._children import answer
from ._functions import hold_gil, noop
from ._script import WORKERS

_TICK = 0.001  # seconds


async def worst_tick(
    call: Awaitable[object], clock: Callable[[], float] = time.perf_counter
) -> float:
    """The seconds by which a short sleep lasted too long, at worst, while the call ran."""
    running = asyncio.ensure_future(call)
    worst = 0.0
    while not running.done():
        start = clock()
        await asyncio.sleep(_TICK)
        worst = max(worst, clock() - start - _TICK)
    await running
    return worst


async def measure(arm: str, seconds: float, calls: int) -> dict[str, float]:
    """The milliseconds of the worst tick: in the median call, and in the worst."""
    if arm == "idle":
        return _in_milliseconds([await worst_tick(asyncio.sleep(seconds)) for _ in range(calls)])
    runner: InferenceRunner[None]
    async with InferenceRunner(worker=WORKERS[arm]()) as runner:
        await runner.run(noop)
        ticks = [await worst_tick(runner.run(hold_gil, seconds)) for _ in range(calls)]
    return _in_milliseconds(ticks)


def _in_milliseconds(ticks: list[float]) -> dict[str, float]:
    return {"lag": 1000 * statistics.median(ticks), "worst": 1000 * max(ticks)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._gil")
    parser.add_argument("arm", choices=["idle", *WORKERS])
    parser.add_argument("--seconds", type=float, required=True, help="of each call")
    parser.add_argument("--calls", type=int, required=True)
    options = parser.parse_args()
    answer(**asyncio.run(measure(options.arm, options.seconds, options.calls)))


if __name__ == "__main__":
    main()
