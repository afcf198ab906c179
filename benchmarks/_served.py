"""A model that wants every CPU behind FastAPI and uvicorn: figures that differ by model only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ._figure import Comparison, Figure, Metric, Sample, Scale, one_by_one
from ._load import Load, script, serve

METRICS = [
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


def server(load: Load, *arguments: str, model_in_loop: bool = False) -> Callable[[Scale], Sample]:
    """An arm: one server under a load. See ``serve``."""
    return lambda scale: serve(load, scale, *arguments, model_in_loop=model_in_loop)


def figure(
    name: str,
    load: Load,
    *,
    title: str,
    comparisons: Sequence[Comparison],
    retain: bool = False,
    rounds: int = 5,
) -> Figure:
    """The script, the runner, and the usual ways to serve a model.

    :param title: of the model
    :param retain: with an arm ``retain_memory``, of the runner
    """
    arms: dict[str, Callable[[Scale], Sample]] = {
        # The two that are held against each other most closely follow each other.
        "script": lambda scale: script(load.model, scale),
        "runner": server(load, "runner"),
        **({"retain_memory": server(load, "runner", "--retain-memory")} if retain else {}),
        "def": server(load, "def"),
        "executor": server(load, "executor"),
        "async def": server(load, "async def", model_in_loop=True),
    }
    return Figure(
        name=name,
        title=f"{title}; {load.connections} client{'s' * (load.connections > 1)}",
        arms=list(arms),
        metrics=METRICS,
        comparisons=comparisons,
        steps=one_by_one(arms),
        rounds=rounds,
        notes=_NOTE,
    )
