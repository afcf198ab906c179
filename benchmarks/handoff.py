"""What it costs to get to another thread and back: a function that does nothing.

As a program: one process of it, that measures every arm in turn on one event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.to_thread

from asgi_infer import InferenceRunner

from ._children import answer, once
from ._figure import Comparison, Figure, Metric, Round, Scale

CALLERS = 32
Handoff = Callable[[], Awaitable[object]]


def noop() -> None:
    """The function."""


def figure(loop: str) -> Figure:
    """The figure for one kind of event loop."""

    def measure(scale: Scale) -> Round:
        options = ("--passes", str(scale.passes), "--calls", str(scale.calls))
        measured: Round = once("handoff", loop, *options)
        return measured

    comparisons = [Comparison("many", "runner", "anyio", at_most=0.12)]
    arms = ["runner", "anyio"]
    if loop != "trio":  # which has no executors
        arms.insert(1, "executor")
        comparisons.insert(0, Comparison("many", "runner", "executor", at_most=0.35))
        comparisons.append(Comparison("one", "runner", "executor", at_most=0.8))
    return Figure(
        name=f"handoff-{loop}",
        title=f"a call that does nothing, there and back, on {loop}",
        arms=arms,
        metrics=[
            Metric("many", f"us/call, {CALLERS} callers"),
            Metric("one", "us/call, 1 caller"),
        ],
        comparisons=[*comparisons, Comparison("one", "runner", "anyio")],
        steps=[measure],
        rounds=9,
        notes="Each round is a process of its own: which CPUs its threads share is a lottery.",
    )


async def measure_all(arms: dict[str, Handoff], passes: int, calls: int) -> Round:
    """The median pass of each arm, in microseconds a call. Passes take turns."""
    seen: dict[str, dict[str, list[float]]] = {arm: {"many": [], "one": []} for arm in arms}
    for number in range(passes + 1):
        for arm, handoff in arms.items():
            many = await _pass(handoff, CALLERS, calls // CALLERS)
            one = await _pass(handoff, 1, max(1, calls // 8))
            if number:  # the first only warms up
                seen[arm]["many"].append(many)
                seen[arm]["one"].append(one)
    return {
        arm: {metric: statistics.median(values) for metric, values in metrics.items()}
        for arm, metrics in seen.items()
    }


async def _pass(handoff: Handoff, callers: int, calls: int) -> float:
    async def call() -> None:
        for _ in range(calls):
            await handoff()

    start = time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(callers):
            group.start_soon(call)
    return (time.perf_counter() - start) / (callers * calls) * 1e6


async def child(options: argparse.Namespace) -> None:
    """Measure in this process and tell the parent."""
    runner: InferenceRunner[None]
    async with InferenceRunner() as runner:
        with ThreadPoolExecutor(1) as executor:
            arms: dict[str, Handoff] = {
                "runner": lambda: runner.run(noop),
                "executor": lambda: _in_executor(executor),
                "anyio": lambda: anyio.to_thread.run_sync(noop),
            }
            if options.loop == "trio":
                del arms["executor"]
            answer(**await measure_all(arms, options.passes, options.calls))


def _in_executor(executor: ThreadPoolExecutor) -> Awaitable[object]:
    return asyncio.get_running_loop().run_in_executor(executor, noop)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handoff")
    parser.add_argument("loop", choices=["asyncio", "uvloop", "trio"])
    parser.add_argument("--passes", type=int, required=True)
    parser.add_argument("--calls", type=int, required=True)
    options = parser.parse_args()
    backend = "trio" if options.loop == "trio" else "asyncio"
    settings: dict[str, Any] = {"use_uvloop": True} if options.loop == "uvloop" else {}
    anyio.run(child, options, backend=backend, backend_options=settings)


FIGURES = [figure("asyncio"), figure("uvloop"), figure("trio")]


if __name__ == "__main__":
    main()
