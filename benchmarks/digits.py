"""A real model that wants every CPU, behind a real server: FastAPI, uvicorn, eight clients."""

from __future__ import annotations

from collections.abc import Callable

from ._figure import Comparison, Figure, Metric, Sample, Scale, one_by_one
from ._load import Load, script, serve

_LOAD = Load(connections=8, digits=True)
_TITLE = "HistGradientBoosting, 200 digits a call, model also warmed up on main; 8 clients"

_CALLS = Metric("calls", "calls/s")
_SWITCHES = Metric("model_switches", "switches/call: model's threads")
_LOOP_SWITCHES = Metric("loop_switches", "loop thread")
_CPU = Metric("cpu", "CPU %", digits=0)
_HEALTH = Metric("health_p99", "/health p99 ms")
_METRICS = [_CALLS, _SWITCHES, _LOOP_SWITCHES, _CPU, _HEALTH]

_NOTE = (
    "Switches are voluntary context switches of all native threads. Where the model runs on the "
    "main thread\n(script, async def), there is one column for all. /health is asked every 20 ms "
    "by a process of its own."
)


def _server(*arguments: str, model_in_loop: bool = False) -> Callable[[Scale], Sample]:
    return lambda scale: serve(_LOAD, scale, *arguments, model_in_loop=model_in_loop)


# The two that are held against each other most closely follow each other.
_ARMS = {
    "script": script,
    "runner": _server("runner"),
    "def": _server("def"),
    "executor": _server("executor"),
    "async def": _server("async def", model_in_loop=True),
}
_NICENESS = {f"nice {nice}": _server("runner", "--nice", str(nice)) for nice in (0, 5, 10)}
_POOLS = {"given back": _server("runner"), "kept": _server("runner", "--keep-pool")}

FIGURES = [
    Figure(
        name="digits",
        title=_TITLE,
        arms=list(_ARMS),
        metrics=_METRICS,
        comparisons=[
            Comparison("calls", "runner", "script", at_least=0.95),
            Comparison("calls", "runner", "def", at_least=3),
            Comparison("calls", "runner", "async def"),
            Comparison("calls", "runner", "executor"),
            Comparison("model_switches", "runner", at_most=20),
            Comparison("health_p99", "runner", at_most=15),
        ],
        steps=one_by_one(_ARMS),
        notes=_NOTE,
    ),
    Figure(
        name="main-pool",
        title=f"{_TITLE};\nthe OpenMP pool of the main thread given back at start, or kept",
        arms=list(_POOLS),
        metrics=_METRICS,
        comparisons=[
            Comparison("calls", "given back", "kept"),
            Comparison("model_switches", "kept", "given back"),
        ],
        steps=one_by_one(_POOLS),
        rounds=3,
    ),
    Figure(
        name="nice",
        title=f"{_TITLE};\nthe niceness of the model's threads (NativePolicy.nice)",
        arms=list(_NICENESS),
        metrics=[*_METRICS, Metric("health_median", "median ms")],
        comparisons=[
            Comparison("calls", "nice 5", "nice 0"),
            Comparison("calls", "nice 10", "nice 0"),
            Comparison("health_p99", "nice 5", "nice 0"),
            Comparison("health_p99", "nice 10", "nice 0"),
        ],
        steps=one_by_one(_NICENESS),
    ),
]
