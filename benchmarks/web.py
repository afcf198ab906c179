"""What the runner costs a server: a model that does nothing, behind FastAPI and uvicorn."""

from __future__ import annotations

from collections.abc import Callable

from ._figure import Comparison, Figure, Metric, Sample, Scale, one_by_one
from ._load import Load, serve

_LOAD = Load(connections=32)


def _server(arm: str) -> Callable[[Scale], Sample]:
    return lambda scale: serve(_LOAD, scale, arm)


_ARMS = {arm: _server(arm) for arm in ("async def", "runner", "def", "executor")}

FIGURES = [
    Figure(
        name="http",
        title="a model that does nothing behind FastAPI and uvicorn, 32 connections",
        arms=list(_ARMS),
        metrics=[
            Metric("calls", "requests/s", digits=0),
            Metric("loop_cpu", "CPU %: loop thread", digits=0),
            Metric("model_cpu", "other threads", digits=0),
            Metric("switches", "switches/request", digits=2),
        ],
        comparisons=[
            Comparison("calls", "runner", "async def", at_least=0.8),
            Comparison("calls", "def", "async def"),
            Comparison("calls", "executor", "async def"),
        ],
        steps=one_by_one(_ARMS),
    )
]
