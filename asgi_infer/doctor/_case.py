"""What a verdict looks at: the figures, and the user's own names for the lines to write."""

from __future__ import annotations

from dataclasses import dataclass

from ._results import Arm, Machine
from ._target import Target

DIFFERENCE = 1.05
"""Two speeds on a quiet machine differ when they differ by as much."""
CLEARLY = 1.25
"""They differ for a reason: what clients on the same CPUs cost stays below that."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was measured: the names for the lines to write.

    :param sample_is_made: by a function
    :param threads: native threads that the runner uses by default
    :param clients: that called at the same time
    """

    target: Target
    sample_is_made: bool
    threads: int
    clients: int = 1

    @property
    def model(self) -> str:
        """The model's factory, as code."""
        return self.target.model.partition(":")[2]

    @property
    def imports(self) -> tuple[str, ...]:
        """The lines that import what the others need."""
        names: dict[str, list[str]] = {}
        for path in (self.target.model, self.target.sample or ""):
            module, _, name = path.partition(":")
            if name:
                names.setdefault(module, []).append(name.partition(".")[0])
        return tuple(
            f"from {module} import {', '.join(sorted(set(found)))}"
            for module, found in names.items()
        )

    def attribute(self, owner: str) -> str:
        """What is called, as code."""
        return f"{owner}.{self.target.call}" if self.target.call else owner

    @property
    def warmup(self) -> str:
        """A function that warms the model up, as code."""
        return f"lambda model: {self.attribute('model')}({self.sample})"

    @property
    def sample(self) -> str:
        """The sample, as code; empty without one."""
        name = (self.target.sample or "").partition(":")[2]
        return f"{name}()" if self.sample_is_made else name

    def runner(self, **native: object) -> str:
        """The line that makes a runner."""
        policy = ", ".join(f"{name}={value}" for name, value in native.items())
        option = f", native=NativePolicy({policy})" if native else ""
        return f"runner = InferenceRunner({self.model}, warmup={self.warmup}{option})"

    def policy(self, **native: object) -> tuple[str, ...]:
        """The lines that make a runner with a policy."""
        return (
            "from asgi_infer import InferenceRunner, NativePolicy",
            *self.imports,
            "",
            self.runner(**native),
        )

    def isolated(self) -> tuple[str, ...]:
        """The lines that put the model into a process of its own.

        Without the warm-up, which is a lambda: those can't be sent to other processes.
        """
        module, _, name = self.target.model.partition(":")
        return (
            "from asgi_infer import InferenceRunner",
            "from asgi_infer.workers import ProcessWorker",
            f"from {module} import {name.partition('.')[0]}",
            "",
            f"runner = InferenceRunner({self.model}, worker=ProcessWorker())",
        )

    def application(self) -> tuple[str, ...]:
        """The lines that put the model on a runner."""
        arguments = [self.attribute("runner.model"), *filter(None, [self.sample])]
        return (
            "from asgi_infer import InferenceMiddleware, InferenceRunner",
            *self.imports,
            "",
            self.runner(),
            "app.add_middleware(InferenceMiddleware, runner=runner)",
            "",
            "# in an async def endpoint:",
            f"result = await runner.run({', '.join(arguments)})",
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that a finding may look at."""

    subject: Subject
    machine: Machine
    arms: dict[str, Arm]
    sweep: dict[int, Arm]

    @property
    def call(self) -> float:
        """Seconds that one call takes where nothing is in its way."""
        times = [arm.latency(50) or 0.0 for arm in self._undisturbed()]
        return min(times, default=0.0)

    def has(self, runtime: str) -> bool:
        """Whether a native library of that name was found in the model's process."""
        return any(runtime in each for each in self.machine.runtimes)

    def _undisturbed(self) -> list[Arm]:
        script = self.arms.get("script")
        return [script] if script else list(self.arms.values())


def switches(*arms: Arm | None) -> str:
    """What each arm's voluntary context switches are, in words."""
    figures = (f"{arm.switches_per_call:.1f} ({arm.title})" for arm in arms if arm)
    return f"Voluntary context switches per call: {', '.join(figures)}."
