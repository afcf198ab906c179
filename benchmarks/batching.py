"""A model for which many items cost little more than one, behind HTTP: who batches how well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ._batches import SIZE, WINDOW
from ._figure import Comparison, Figure, Metric, Sample, Scale, one_by_one
from ._flow import only_told_otherwise, server
from ._load import Load, ask_for_calls, per_call
from ._work import NOTHING, VARIABLE, Work
from .rivals import BENTOML, LITSERVE, MOSEC, Rival

FIXED, EACH = 0.005, 0.001  # seconds a call, and for each item of it
_ITEM = '{"number": 7}'


def _python(package: str, module: str, rival: Rival) -> Rival:
    """The same server with another program."""
    return replace(rival, package=package, command=("python", "-m", module), body=_ITEM)


RIVALS = [
    replace(
        _python("batched", "benchmarks._rival_batched", LITSERVE),
        arm="batched",
    ),
    _python("litserve", "benchmarks._rival_litserve_batching", LITSERVE),
    _python("mosec", "benchmarks._rival_mosec_batching", MOSEC),
    replace(
        BENTOML,
        command=("bentoml", "serve", "benchmarks._rival_bentoml_batching:Batches"),
        body='{"items": [7]}',
    ),
]


def _work(scale: Scale) -> Work:
    return Work.lasting(FIXED, EACH) if scale.iterations else NOTHING


def _told(scale: Scale) -> Mapping[str, str]:
    return {VARIABLE: str(_work(scale))}


def _ours(load: Load, *arguments: str) -> Callable[[Scale], Sample]:
    def measure(scale: Scale) -> Sample:
        with server(scale, *arguments, "--work", str(_work(scale))) as running:
            seen = ask_for_calls(load, scale, running.port, running.read, body=_ITEM)
        return _with_latency(per_call(*seen), load)

    return measure


def _theirs(rival: Rival, load: Load) -> Callable[[Scale], Sample]:
    return lambda scale: _with_latency(rival.measure(load, scale, _told), load)


def _with_latency(sample: dict[str, float], load: Load) -> Sample:
    """The mean, by Little's law: each client waits for one answer all the time."""
    if sample["calls"]:
        sample["latency"] = 1000 * load.connections / sample["calls"]
    return sample


def figure(load: Load, comparisons: list[Comparison]) -> Figure:
    """All who batch, and one who doesn't."""
    arms = {
        "batcher": _ours(load, "batcher"),
        "max_delay": only_told_otherwise(_ours(load, "batcher", "--max-delay", str(WINDOW))),
        "Starlette": _ours(load, "batcher-alone", "--max-delay", str(WINDOW)),
        "unbatched": _ours(load, "unbatched"),
        **{rival.arm: _theirs(rival, load) for rival in RIVALS},
    }
    clients = "1-client" if load.connections == 1 else f"{load.connections}-clients"
    return Figure(
        name=f"batching-{clients}",
        title=(
            f"a call of {1000 * FIXED:g} ms and {1000 * EACH:g} ms for each item, behind HTTP,\n"
            f"batches of up to {SIZE}; {clients.replace('-', ' ')}"
        ),
        arms=list(arms),
        metrics=[
            Metric("calls", "requests/s", digits=0),
            Metric("latency", "mean latency ms"),
            Metric("cpu", "CPU %", digits=0),
            Metric("switches", "switches/request"),
        ],
        comparisons=comparisons,
        steps=one_by_one(arms),
        rounds=3,
        notes=_NOTE,
    )


_NOTE = (
    "One worker and one process for HTTP each. A batch waits for company for up to "
    f"{1000 * WINDOW:g} ms with\nLitServe, mosec and max_delay, which is the Batcher with that "
    "option, for 5 ms, its default, with\nbatched, with BentoML for what its dispatcher finds "
    "best, and not at all with batcher. Starlette is\nmax_delay in a route of Starlette's, "
    "without FastAPI's models of request and response. mosec's HTTP\nis native code. CPU and "
    "switches are of all native threads of all processes of a server."
)
_OTHERS = ["unbatched", *(rival.arm for rival in RIVALS)]

FIGURES = [
    figure(
        Load(connections=64),
        [
            *(Comparison("calls", "batcher", other, at_least=1.0) for other in _OTHERS),
            *(Comparison("calls", "max_delay", other, at_least=1.0) for other in _OTHERS),
        ],
    ),
    figure(
        Load(connections=1),
        [
            Comparison("latency", "batcher", "unbatched", at_most=1.05),
            Comparison("latency", "max_delay", "unbatched", at_most=1.05),
            *(Comparison("latency", "batcher", rival.arm) for rival in RIVALS),
        ],
    ),
]
