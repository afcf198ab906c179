"""The digits behind other servers for models, each in an environment of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import digits
from ._figure import Comparison, Figure, Metric, Sample, Scale, Unavailable, one_by_one
from ._load import Load, ask_for_calls, per_call, script, trained
from ._rival import RivalError, RivalServer, environment, free_port
from ._served import server

_LOAD = Load(connections=8, model="digits")


@dataclass(frozen=True)
class Rival:
    """A server for models, and how its own documentation starts it.

    :param arm: its name for people
    :param package: by which it is installed
    :param command: in its environment's ``bin``, and the arguments: its server is in
        ``benchmarks._rival_PACKAGE``, or in ``..._batching``
    :param path: of the model
    :param health: answers without the model
    :param port: the environment variable that says where to listen
    :param variables: other such
    :param body: of a request, JSON
    """

    arm: str
    package: str
    command: tuple[str, ...]
    path: str
    health: str
    port: str
    variables: tuple[tuple[str, str], ...] = ()
    body: str = "{}"

    def measure(
        self, load: Load, scale: Scale, model: Callable[[Scale], Mapping[str, str]]
    ) -> dict[str, float]:
        """One arm of one round.

        :param model: the environment variables that say which model it is to serve
        :raises Unavailable: it can't be had here
        """
        if not scale.iterations:
            raise Unavailable("it is not asked to serve a no-op")
        try:
            return self._measure(load, scale, model(scale))
        except RivalError as error:
            raise Unavailable(str(error)) from error

    def _measure(self, load: Load, scale: Scale, model: Mapping[str, str]) -> dict[str, float]:
        program, *arguments = self.command
        command = [str(environment(self.package) / "bin" / program), *arguments]
        port = free_port()
        with tempfile.TemporaryDirectory(prefix="asgi_infer-bench-") as folder:
            variables = {
                **dict(self.variables),
                **model,
                self.port: str(port),
                "BENTOML_HOME": folder,
            }
            with RivalServer(command, port, self.path, variables, self.body) as running:
                where = {"path": self.path, "health": self.health, "body": self.body}
                return per_call(*ask_for_calls(load, scale, port, running.read, **where))


LITSERVE = Rival(
    "LitServe",
    "litserve",
    ("python", "-m", "benchmarks._rival_litserve"),
    path="/predict",
    health="/health",
    port="BENCH_PORT",
)
MOSEC = Rival(
    "mosec",
    "mosec",
    ("python", "-m", "benchmarks._rival_mosec"),
    path="/inference",
    health="/",
    port="MOSEC_PORT",
    variables=(("MOSEC_ADDRESS", "127.0.0.1"), ("MOSEC_LOG_LEVEL", "warning")),
)
BENTOML = Rival(
    "BentoML",
    "bentoml",
    ("bentoml", "serve", "benchmarks._rival_bentoml:Digits"),
    path="/predict",
    health="/healthz",
    port="BENTOML_PORT",
    variables=(("BENTOML_HOST", "127.0.0.1"), ("BENTOML_DO_NOT_TRACK", "true")),
)


def _digits(rival: Rival) -> Callable[[Scale], Sample]:
    def model(scale: Scale) -> Mapping[str, str]:
        return {"BENCH_FILE": str(trained("digits", scale.iterations))}

    return lambda scale: rival.measure(_LOAD, scale, model)


_ARMS: dict[str, Callable[[Scale], Sample]] = {
    "script": lambda scale: script(_LOAD.model, scale),
    "runner": server(_LOAD, "runner"),
    **{rival.arm: _digits(rival) for rival in (LITSERVE, MOSEC, BENTOML)},
    "def": server(_LOAD, "def"),
}

_NOTE = (
    "One worker and one process for HTTP each, no batching, and no limit to the model's threads.\n"
    "Switches and CPU are of all native threads of all processes of a server. /health is, of\n"
    "each, a path that answers without the model."
)

FIGURES = [
    Figure(
        name="rivals",
        title=f"{digits.TITLE} for runner and def;\n8 clients; beside other servers for models",
        arms=list(_ARMS),
        metrics=[
            Metric("calls", "calls/s"),
            Metric("switches", "switches/call"),
            Metric("cpu", "CPU %", digits=0),
            Metric("health_p99", "/health p99 ms"),
        ],
        comparisons=[
            Comparison("calls", "runner", "script", at_least=1.0),
            Comparison("calls", "runner", "LitServe", at_least=1.15),
            Comparison("calls", "runner", "mosec", at_least=1.15),
            Comparison("calls", "runner", "BentoML", at_least=3.5),
            Comparison("calls", "runner", "def"),
        ],
        steps=one_by_one(_ARMS),
        rounds=3,
        notes=_NOTE,
    )
]
