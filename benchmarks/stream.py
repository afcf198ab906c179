"""Many small items from a generator of the model's: to a client over HTTP, and to a coroutine.

As a program: the way without HTTP, each arm in turn on one event loop.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import AsyncIterator, Callable

from starlette.concurrency import iterate_in_threadpool

from ._children import Child, answer, once
from ._figure import Figure, Metric, Round, Sample, Scale, one_by_one
from ._flow import Running, server
from ._flow_server import lines
from ._http import run_on_the_fastest_loop
from ._usage import used_between

ITEMS = 20_000  # of each stream
_FEW = 50  # of each stream, where only whether everything runs is of interest
_CLIENTS = (1, 8)


def _arm(arm: str) -> Callable[[Scale], Sample]:
    def measure(scale: Scale) -> Sample:
        sample: dict[str, float] = {}
        with server(scale, arm, "--items", str(ITEMS if scale.iterations else _FEW)) as running:
            for clients in _CLIENTS:
                sample |= _read(running, scale, clients)
        return sample

    return measure


def _read(running: Running, scale: Scale, clients: int) -> dict[str, float]:
    """The figures for so many clients; their names end in that number."""
    options = [
        *("--connections", str(clients), "--alone", str(scale.passes)),
        *("--warmup", str(scale.warmup), "--seconds", str(scale.seconds)),
    ]
    with Child("_stream_load", str(running.port), "/predict", *options) as child:
        child.ask()
        before = running.read()
        child.tell()
        seen = child.ask()
        used = used_between(before, running.read())
    others = [each for thread, each in used.items() if thread != running.loop]
    return {
        "first": 1000 * seen["alone"],
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
    """Measure in this process and tell the parent. Arms take turns."""
    arms: dict[str, Callable[[], AsyncIterator[bytes]]] = {
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


ARMS = {"threadpool": _arm("threadpool-stream")}

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
        comparisons=[],
        steps=one_by_one(ARMS),
        rounds=3,
    ),
    Figure(
        name="stream-handoff",
        title="the same without HTTP: async for, on uvloop",
        arms=["threadpool"],
        metrics=[Metric("item", "us/item", digits=2)],
        comparisons=[],
        steps=[_handoff],
        rounds=9,
        notes="Each round is a process of its own: which CPUs its threads share is a lottery.",
    ),
]


if __name__ == "__main__":
    main()
