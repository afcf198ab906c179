"""What it costs to watch calls for what slows them down, where nothing does.

As a program: one process, that measures on a thread of its own as an inference thread does it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from asgi_infer._call import Call
from asgi_infer._future import FUTURE_PORT
from asgi_infer._statistics import Usage
from asgi_infer._watch import Watch
from asgi_infer.native import NativePolicy

from ._children import answer, once
from ._figure import Comparison, Figure, Metric, Round, Scale

_MOST = 2.0  # µs


def _measure(scale: Scale) -> Round:
    options = ("--passes", str(scale.passes), "--calls", str(scale.calls))
    measured: Round = once("watch", *options)
    return measured


def _one_call(passes: int, calls: int) -> Round:
    """The median pass of each arm, in microseconds a call."""
    watch = Watch(name="watched", native=NativePolicy(), usage=Usage())
    watch.next_look = math.inf
    call = Call((int, ()), copy_context(), None, 0, FUTURE_PORT, None)

    def in_a_burst() -> None:
        watch.end(call)

    def by_itself() -> None:
        watch.reset()
        watch.end(call)

    arms = {"in a burst": in_a_burst, "by itself": by_itself}
    nothing = _pass(lambda: None, passes, calls)
    return {
        arm: {"cost": _pass(function, passes, calls) - nothing} for arm, function in arms.items()
    }


def _pass(function: Callable[[], None], passes: int, calls: int) -> float:
    seconds = []
    for _ in range(passes):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        seconds.append((time.perf_counter() - start) / calls)
    return 1e6 * statistics.median(seconds)


FIGURES = [
    Figure(
        name="watch",
        title="counting what a call costs, where nothing is wrong",
        arms=["in a burst", "by itself"],
        metrics=[Metric("cost", "us/call", digits=2)],
        comparisons=[
            Comparison("cost", "in a burst", at_most=_MOST),
            Comparison("cost", "by itself", at_most=_MOST),
        ],
        steps=[_measure],
        notes="Before a call that the thread has slept for, its counters are read once more.",
    )
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watch")
    parser.add_argument("--passes", type=int, required=True)
    parser.add_argument("--calls", type=int, required=True)
    options = parser.parse_args()
    with ThreadPoolExecutor(1) as executor:
        answer(**executor.submit(_one_call, options.passes, options.calls).result())


if __name__ == "__main__":
    main()
