"""A real model that wants every CPU, behind a real server: FastAPI and uvicorn."""

from __future__ import annotations

from collections.abc import Callable

from ._figure import Comparison, Figure, Metric, Sample, Scale, one_by_one
from ._load import Load, script, serve

_TITLE = "HistGradientBoosting, 200 digits a call, model also warmed up on main"
_MANY, _ONE = Load(connections=8, digits=True), Load(connections=1, digits=True)

_METRICS = [
    Metric("calls", "calls/s"),
    Metric("model_switches", "switches/call: model's threads"),
    Metric("loop_switches", "loop thread"),
    Metric("cpu", "CPU %", digits=0),
    Metric("model_cpu", "model's", digits=0),
    Metric("health_p99", "/health p99 ms"),
]

_NOTE = (
    "Switches are voluntary context switches of native threads; where the model runs on the main\n"
    "thread (script, async def), all count as the model's. /health is asked every 20 ms, by a\n"
    "process of its own. The clients run on the same CPUs, which the script has for itself."
)


def _server(load: Load, *arguments: str, model_in_loop: bool = False) -> Callable[[Scale], Sample]:
    return lambda scale: serve(load, scale, *arguments, model_in_loop=model_in_loop)


def _arms(load: Load) -> dict[str, Callable[[Scale], Sample]]:
    # The two that are held against each other most closely follow each other.
    return {
        "script": script,
        "runner": _server(load, "runner"),
        "def": _server(load, "def"),
        "executor": _server(load, "executor"),
        "async def": _server(load, "async def", model_in_loop=True),
    }


def _figure(name: str, load: Load, clients: str, comparisons: list[Comparison]) -> Figure:
    arms = _arms(load)
    return Figure(
        name=name,
        title=f"{_TITLE}; {clients}",
        arms=list(arms),
        metrics=_METRICS,
        comparisons=comparisons,
        steps=one_by_one(arms),
        notes=_NOTE,
    )


_NICENESS = {f"nice {nice}": _server(_MANY, "runner", "--nice", str(nice)) for nice in (0, 5, 10)}
_POOLS = {"given back": _server(_MANY, "runner"), "kept": _server(_MANY, "runner", "--keep-pool")}

_AGAINST_SCRIPT = Comparison("calls", "runner", "script", at_least=0.95)
_AGAINST_OTHERS = [
    Comparison("calls", "runner", "async def"),
    Comparison("calls", "runner", "executor"),
]
_SWITCHES = Comparison("model_switches", "runner", at_most=20)

FIGURES = [
    _figure(
        "digits-1-client",
        _ONE,
        "1 client",
        [
            _AGAINST_SCRIPT,
            Comparison("calls", "runner", "def", at_least=3),
            *_AGAINST_OTHERS,
            _SWITCHES,
        ],
    ),
    _figure(
        "digits-8-clients",
        _MANY,
        "8 clients",
        [
            _AGAINST_SCRIPT,
            Comparison("calls", "runner", "def"),
            *_AGAINST_OTHERS,
            _SWITCHES,
            Comparison("health_p99", "runner", at_most=15),
        ],
    ),
    Figure(
        name="main-pool",
        title=f"{_TITLE}; 8 clients;\nthe main thread's OpenMP pool given back at start, or kept",
        arms=list(_POOLS),
        metrics=_METRICS,
        comparisons=[
            Comparison("calls", "given back", "kept"),
            Comparison("model_switches", "kept"),
            Comparison("model_switches", "given back"),
        ],
        steps=one_by_one(_POOLS),
        rounds=3,
    ),
    Figure(
        name="nice",
        title=f"{_TITLE}; 8 clients;\nthe niceness of the model's threads (NativePolicy.nice)",
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
