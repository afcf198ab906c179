"""A real model that wants every CPU, behind a real server: FastAPI and uvicorn."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from ._figure import Comparison, Figure, Metric, Sample, Scale, one_by_one
from ._load import Load, script
from ._served import METRICS, figure, server

TITLE = "HistGradientBoosting, 200 digits a call, model also warmed up on main"
_MANY, _ONE = Load(connections=8, model="digits"), Load(connections=1, model="digits")

_NICENESS: dict[str, Callable[[Scale], Sample]] = {
    "script": lambda scale: script("digits", scale),
    **{f"nice {nice}": server(_MANY, "runner", "--nice", str(nice)) for nice in (0, 5, 10)},
}


def _beside_another(measure: Callable[[Scale], Sample]) -> Callable[[Scale], Sample]:
    """The same while a program of somebody else's, of ordinary niceness, wants a CPU as well."""

    def step(scale: Scale) -> Sample:
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
            try:
                return measure(scale)
            finally:
                other.kill()

    return step


_BESIDE = {arm: _beside_another(measure) for arm, measure in _NICENESS.items()}
_POOLS = {"given back": server(_MANY, "runner"), "kept": server(_MANY, "runner", "--keep-pool")}

_AGAINST_SCRIPT = Comparison("calls", "runner", "script", at_least=0.95)
_AGAINST_OTHERS = [
    Comparison("calls", "runner", "async def"),
    Comparison("calls", "runner", "executor"),
]
_SWITCHES = Comparison("model_switches", "runner", at_most=20)

FIGURES = [
    figure(
        "digits-1-client",
        _ONE,
        title=TITLE,
        comparisons=[
            _AGAINST_SCRIPT,
            Comparison("calls", "runner", "def", at_least=3),
            *_AGAINST_OTHERS,
            _SWITCHES,
        ],
    ),
    figure(
        "digits-8-clients",
        _MANY,
        title=TITLE,
        comparisons=[
            _AGAINST_SCRIPT,
            Comparison("calls", "runner", "def"),
            *_AGAINST_OTHERS,
            _SWITCHES,
            Comparison("health_p99", "runner", at_most=15),
        ],
    ),
    Figure(
        name="main-pool",
        title=f"{TITLE}; 8 clients;\nthe main thread's OpenMP pool given back at start, or kept",
        arms=list(_POOLS),
        metrics=METRICS,
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
        title=f"{TITLE}; 8 clients;\nthe niceness of the model's threads (NativePolicy.nice)",
        arms=list(_NICENESS),
        metrics=[*METRICS, Metric("health_median", "median ms")],
        comparisons=[
            Comparison("calls", "nice 5", "nice 0"),
            Comparison("calls", "nice 10", "nice 0"),
            Comparison("health_p99", "nice 5", "nice 0"),
            Comparison("health_p99", "nice 10", "nice 0"),
        ],
        steps=one_by_one(_NICENESS),
    ),
    Figure(
        name="beside-another",
        title=f"{TITLE}; 8 clients;\nthe same while another program keeps one CPU busy",
        arms=list(_BESIDE),
        metrics=[*METRICS, Metric("health_median", "median ms")],
        comparisons=[
            Comparison("calls", "nice 0", "script"),
            Comparison("calls", "nice 5", "nice 0"),
            Comparison("calls", "nice 10", "nice 0"),
        ],
        steps=one_by_one(_BESIDE),
        rounds=3,
    ),
]
