"""More requests than can be served: half of the capacity, twice the capacity, and half again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ._children import Child
from ._figure import Comparison, Figure, Metric, Sample, Scale, Traced, one_by_one
from ._flow import only_told_otherwise, server
from ._open_loop import Phase
from ._work import NOTHING, Work

CALL = 0.0133  # seconds
DEADLINE = 0.5  # seconds after which nobody has use for an answer
_LEAVES_AFTER = DEADLINE + 0.1
_BEFORE_AND_AFTER = 1 / 6  # of the overload
_LATENCIES = ("accepted_p50", "accepted_p99", "refusal_p50", "refusal_p99")
_NOBODY = dict.fromkeys(_LATENCIES, 0.0)  # where a moment has to fill every column
_CONNECTIONS = 4  # of the closed loop that measures the capacity


def phases(scale: Scale) -> list[Phase]:
    """Before, overload, after."""
    around = Phase(0.5, scale.overload * _BEFORE_AND_AFTER)
    return [around, Phase(2.0, scale.overload), around]


def _arm(arm: str, *arguments: str) -> Callable[[Scale], Sample]:
    def measure(scale: Scale) -> Sample:
        work = Work.lasting(CALL) if scale.iterations else NOTHING
        options = ("--work", str(work), "--deadline", str(DEADLINE), *arguments)
        with (
            server(scale, arm, *options) as running,
            Child(*_client(running.port, scale)) as client,
        ):
            client.ask()
            client.tell()
            return sample(client.ask(), **({} if scale.iterations else _NOBODY))

    return measure


def _client(port: int, scale: Scale) -> list[str]:
    return [
        *("_open_loop", str(port), "/predict", "--connections", str(_CONNECTIONS)),
        *("--warmup", str(scale.warmup), "--seconds", str(scale.seconds)),
        *("--deadline", str(DEADLINE), "--leaves-after", str(_LEAVES_AFTER)),
        *("--phases", *map(str, phases(scale))),
    ]


def sample(seen: Mapping[str, Any], **missing: float) -> Traced:
    """The figures of what a client of ``_open_loop`` saw.

    :param missing: figures of what did not happen; usually they have none
    """
    capacity, during = seen["capacity"], seen["overload"]
    parts = {name: during[name] / during["offered"] for name in ("refused", "left", "late")}
    figures = {
        "capacity": capacity,
        "offered": during["offered"] / capacity,
        "goodput": during["good"] / capacity,
        **{name: 100 * part for name, part in parts.items()},
        "failed": 100 * during["failed"] / during["offered"],
        "recovery": seen["recovery"],
        "lag": 1000 * during["lag"],
    }
    latencies = {name: 1000 * during[name] for name in _LATENCIES if name in during}
    return Traced({**missing, **figures, **latencies}, seen["series"])


ARMS: dict[str, Callable[[Scale], Sample]] = {
    "runner: shed": _arm("runner", "--overload", "shed"),
    "runner: newest": only_told_otherwise(_arm("runner", "--overload", "newest")),
    "runner: wait": only_told_otherwise(_arm("runner", "--overload", "wait")),
    "executor, timeout": _arm("executor-timeout"),
    "def": _arm("def"),
    "max_concurrency": _arm("dependency"),
    "executor": _arm("executor"),
}
OURS = ("runner: shed", "runner: newest", "runner: wait")

_NOTE = (
    "Each arm gets twice what it can do itself, as its own closed loop of 4 clients has just\n"
    "shown. A request is due at a fixed time, its latency counts from then, good is a 200 within\n"
    f"{DEADLINE:g} s, and its client hangs up after {_LEAVES_AFTER:g} s. Figures are of the "
    "overload; recovery is until\nthe last request that came after it and got no good answer. "
    "shed, newest and wait are what\nQueuePolicy(overload=...) can be told. Of the others, only "
    "the executor with asyncio.timeout\nhas a time limit, the same one."
)

FIGURES = [
    Figure(
        name="overload",
        title=f"twice what can be served, for a minute, open loop; {1000 * CALL:.0f} ms a call",
        arms=list(ARMS),
        metrics=[
            Metric("capacity", "capacity/s"),
            Metric("offered", "offered x", digits=2),
            Metric("goodput", "goodput x", digits=2),
            Metric("accepted_p50", "200: p50 ms", digits=0),
            Metric("accepted_p99", "p99 ms", digits=0),
            Metric("refused", "refused %", digits=0),
            Metric("refusal_p50", "p50 ms"),
            Metric("refusal_p99", "p99 ms"),
            Metric("late", "late %", digits=0),
            Metric("left", "client gave up %", digits=0),
            Metric("failed", "failed %", digits=0),
            Metric("recovery", "recovery s"),
            Metric("lag", "client late p99 ms"),
        ],
        comparisons=[
            comparison
            for arm in OURS[:2]  # "wait" is for those who want none of it
            for comparison in (
                Comparison("goodput", arm, at_least=0.9),
                Comparison("accepted_p99", arm, at_most=1000 * DEADLINE),
            )
        ],
        steps=one_by_one(ARMS),
        rounds=2,  # a minute and a half for each arm
        notes=_NOTE,
    )
]
