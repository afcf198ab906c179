"""Many small items from a generator of the model's: to a client over HTTP, and to a coroutine.

As a program: the way without HTTP, each arm in turn on one event loop.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.concurrency import iterate_in_threadpool

from asgi_infer import InferenceRunner

from ._children import Child, answer, once
from ._figure import Comparison, Figure, Metric, Round, Sample, Scale, one_by_one
from ._flow import Running, server
from ._flow_server import FEW, lines
from ._http import run_on_the_fastest_loop
from ._usage import used_between

ITEMS = 20_000  # of each stream
_CLIENTS = (1, 8)


def _arm(arm: str, *arguments: str) -> Callable[[Scale], Sample]:
    def measure(scale: Scale) -> Sample:
        items = ("--items", str(ITEMS if scale.iterations else FEW))
        with (
            server(scale, arm, *items, *arguments) as running,
            Child(*_client(running.port, scale)) as client,
        ):
            sample = {"first": 1000 * client.ask()["first"]}
            for clients in _CLIENTS:
                sample |= _read(running, client, clients)
            return sample

    return measure


def _client(port: int, scale: Scale) -> list[str]:
    return [
        *("_stream_load", str(port), "--alone", str(scale.passes)),
        *("--connections", *map(str, _CLIENTS)),
        *("--warmup", str(scale.warmup), "--seconds", str(scale.seconds)),
    ]


def _read(running: Running, client: Child, clients: int) -> dict[str, float]:
    """The figures for so many clients; their names end in that number."""
    client.ask()
    before = running.read()
    client.tell()
    seen = client.ask()
    used = used_between(before, running.read())
    others = [each for thread, each in used.items() if thread != running.loop]
    return {
        f"items_{clients}": seen["items"] / seen["seconds"],
        f"first_{clients}": 1000 * seen["first"],
        f"threads_{clients}": sum(each.cpu > 0 for each in others),
    }


# -- without HTTP ------------------------------------------------------------------------------


async def _pass(items: AsyncIterator[bytes], count: int) -> float:
    """Microseconds an item."""
    start = time.perf_counter()
    async for _ in items:
        pass
    return (time.perf_counter() - start) / count * 1e6


async def child(passes: int, count: int) -> None:
    """Measure in this process and tell the parent."""
    runner: InferenceRunner[None]
    async with InferenceRunner() as runner:
        await _take_turns(runner, passes, count)


async def _take_turns(runner: InferenceRunner[Any], passes: int, count: int) -> None:
    arms: dict[str, Callable[[], AsyncIterator[bytes]]] = {
        "runner": lambda: runner.stream(lines, count),
        "interleave": lambda: runner.stream(lines, count, interleave=True),
        "threadpool": lambda: iterate_in_threadpool(lines(count)),
    }
    seen: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(passes + 1):
        for arm, stream in arms.items():
            microseconds = await _pass(stream(), count)
            if number:  # the first only warms up
                seen[arm].append(microseconds)
    answer(**{arm: {"item": statistics.median(each)} for arm, each in seen.items()})


def _handoff(scale: Scale) -> Round:
    options = ("--passes", str(scale.passes), "--items", str(scale.calls))
    measured: Round = once("stream", *options)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream")
    parser.add_argument("--passes", type=int, required=True)
    parser.add_argument("--items", type=int, required=True)
    options = parser.parse_args()
    run_on_the_fastest_loop(child(options.passes, options.items))


ARMS = {
    "runner": _arm("runner-stream"),
    "interleave": _arm("runner-stream", "--interleave"),
    "threadpool": _arm("threadpool-stream"),
}

_NOTE = (
    "Threads are native ones that used any CPU, without the event loop's. The first item is "
    "timed\nwith a client that is alone, and with 8 that read all the time: without interleave, a "
    "stream\nhas the model's thread to itself, and the next begins when it ends."
)

FIGURES = [
    Figure(
        name="stream",
        title=f"a generator of {ITEMS} items of two bytes, as a StreamingResponse",
        arms=list(ARMS),
        metrics=[
            Metric("items_1", "1 client: items/s", digits=0),
            Metric("threads_1", "threads", digits=0),
            Metric("first", "first item ms", digits=2),
            Metric("items_8", "8 clients: items/s", digits=0),
            Metric("threads_8", "threads", digits=0),
            Metric("first_8", "first item ms"),
        ],
        comparisons=[
            Comparison("items_1", "runner", "threadpool", at_least=3),
            Comparison("items_8", "runner", "threadpool", at_least=3),
            Comparison("items_8", "interleave", "threadpool", at_least=3),
            Comparison("threads_8", "runner", at_most=1),
            Comparison("threads_8", "threadpool"),
            Comparison("first", "runner", "threadpool"),
        ],
        steps=one_by_one(ARMS),
        rounds=3,
        notes=_NOTE,
    ),
    Figure(
        name="stream-handoff",
        title="the same without HTTP: async for, on uvloop",
        arms=list(ARMS),
        metrics=[Metric("item", "us/item", digits=2)],
        comparisons=[
            Comparison("item", "runner", "threadpool", at_most=0.33),
            Comparison("item", "interleave", "threadpool"),
        ],
        steps=[_handoff],
        rounds=9,
        notes="Each round is a process of its own: which CPUs its threads share is a lottery.",
    ),
]


if __name__ == "__main__":
    main()
