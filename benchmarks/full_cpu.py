"""Models that want every CPU: on the runner beside a script's loop, and behind a server.

These figures need PyTorch, LightGBM and ONNX Runtime: ``make bench-full-cpu``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from . import rivals
from ._figure import Comparison, Figure, Metric, Sample, Scale, one_by_one
from ._load import Load, script
from ._served import figure

_TITLES = {
    "digits": "scikit-learn's HistGradientBoosting, 200 digits a call",
    "torch-operations": "200 small operations of PyTorch a call",
    "torch-convolution": "a small convolution net of PyTorch",
    "temporaries": "NumPy arithmetic with four temporaries of 32 MiB",
    "detector": "the text detector of an OCR engine, on ONNX Runtime",
    "lightgbm": "LightGBM, 5000 rows a call",
}

_RETAIN = {"torch-convolution", "temporaries"}
"""The models that pay for memory which is returned and fetched again."""

_LOOP_METRICS = [
    Metric("calls", "calls/s"),
    Metric("switches", "switches/call"),
    Metric("faults", "page faults/call", digits=0),
    Metric("cpu", "CPU %", digits=0),
]

_LOOP_NOTE = (
    "All in a loop, without a server. submit: runner.submit(...).result(); run: await\n"
    "runner.run(...). Switches are voluntary context switches of all native threads: of these,\n"
    "the way to the runner and back takes one to three a call, whatever the model."
)


def _loop(model: str, *arguments: str) -> Callable[[Scale], Sample]:
    return lambda scale: script(model, scale, *arguments)


def loop(
    model: str,
    *,
    runner: float | None = None,
    retain: float | None = None,
) -> Figure:
    """A script, and the runner in its place.

    :param runner: the ratio that the runner is to reach, of the script
    :param retain: likewise with ``retain_memory``, which is not measured without
    """
    arms = {
        "script": _loop(model),
        "submit": _loop(model, "--how", "submit"),
        "run": _loop(model, "--how", "run"),
    }
    comparisons = [
        Comparison("calls", arm, "script", at_least=runner) for arm in ("submit", "run")
    ]
    if retain is not None:
        arms["retain_memory"] = _loop(model, "--how", "submit", "--retain-memory")
        comparisons.append(Comparison("calls", "retain_memory", "script", at_least=retain))
    return Figure(
        name=f"loop-{model}",
        title=f"{_TITLES[model]}; in a loop",
        arms=list(arms),
        metrics=_LOOP_METRICS,
        comparisons=comparisons,
        steps=one_by_one(arms),
        rounds=7,  # a bound of 3 per cent is less than two processes differ by luck
        notes=_LOOP_NOTE,
    )


def _served(
    model: str, clients: int, *, of_def: float | None = None, health: float | None = None
) -> Figure:
    """The model behind a server.

    :param of_def: the ratio that the runner is to reach, of a ``def`` endpoint
    :param health: the milliseconds within which ``/health`` is to answer
    """
    comparisons = [
        Comparison("calls", "runner", "def", at_least=of_def),
        Comparison("calls", "runner", "executor"),
        Comparison("calls", "runner", "async def"),
        Comparison("calls", "runner", "script"),
        Comparison("model_switches", "runner", at_most=20),
        Comparison("health_p99", "runner", at_most=health),
    ]
    retain = model in _RETAIN
    if retain:
        comparisons.append(Comparison("calls", "retain_memory", "script"))
    return figure(
        f"served-{clients}-{model}",
        Load(connections=clients, model=model),
        title=f"{_TITLES[model]}; also warmed up on main",
        comparisons=comparisons,
        retain=retain,
        rounds=3,
    )


FIGURES: Sequence[Figure] = [
    loop("digits", runner=0.97),
    loop("torch-operations", runner=0.97),
    loop("torch-convolution", retain=1.4),
    loop("temporaries", retain=1.7),
    loop("detector", runner=0.97),
    loop("lightgbm", runner=0.97),
    _served("digits", 1, of_def=3.5),
    _served("torch-operations", 1, of_def=1.9),
    _served("torch-convolution", 1),
    _served("digits", 8, health=10),
    _served("torch-operations", 8, health=10),
    _served("torch-convolution", 8, health=10),
    _served("temporaries", 8, health=10),
    _served("detector", 8, of_def=1.3, health=10),
    _served("lightgbm", 8, of_def=1.3, health=10),
    *rivals.FIGURES,
]
