"""One figure: what is measured, against what, and what it is to reach."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from asgi_infer.native.noise import Noise, NoiseMeter, quiet_moment

Sample = Mapping[str, float]
"""What one arm measured in one round, by metric."""

Round = Mapping[str, Sample]
"""One round: every arm once, one right after the other."""


class Traced(dict[str, float]):
    """A sample with what it was made of: for the JSON and for pictures, not for the table.

    :param series: by name, a value for each second; None where there was nothing to measure
    """

    def __init__(self, sample: Sample, series: Mapping[str, Sequence[float | None]]) -> None:
        super().__init__(sample)
        self.series = series


@dataclass(frozen=True)
class Scale:
    """How much to measure. ``FULL`` for figures to quote, ``QUICK`` for a first look."""

    seconds: float  # under load, for each arm and round
    warmup: float  # seconds of load before those
    passes: int  # of the hand-off, in each process
    calls: int  # in each pass with many callers
    million: int  # calls for the figure of that name
    iterations: int  # of boosting, for trained models; 0: a no-op in the place of every model
    rounds: int | None = None  # None: as many as each figure asks for
    overload: float = 0.06  # seconds, for the figure of that name; a third of it around that


FULL = Scale(
    seconds=4.0,
    warmup=1.0,
    passes=7,
    calls=3200,
    million=1_000_000,
    iterations=100,
    overload=60.0,
)
QUICK = Scale(
    seconds=1.5,
    warmup=0.5,
    passes=3,
    calls=1600,
    million=50_000,
    iterations=100,
    rounds=2,
    overload=6.0,
)


@dataclass(frozen=True)
class Metric:
    """One column of the table."""

    key: str
    label: str
    digits: int = 1


@dataclass(frozen=True)
class Comparison:
    """One arm's metric, or its ratio to another arm's, and what that is to reach, if anything."""

    metric: str
    arm: str
    against: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        """The bound as text."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "-" if self.at_most is None else f"<= {self.at_most:g}"

    def reached(self, value: float) -> bool | None:
        """Whether ``value`` is within the bound; None where there is none."""
        if self.at_least is not None:
            return value >= self.at_least
        return None if self.at_most is None else value <= self.at_most

    def value(self, measured: Round) -> float | None:
        """The figure of one round; None if an arm could not be measured."""
        own = measured[self.arm].get(self.metric)
        if self.against is None or own is None:
            return own
        other = measured[self.against].get(self.metric)
        if other is None:
            return None
        return own / other if other else float("inf")


Step = Callable[[Scale], Round]
"""Measures some arms, or one, for one round."""


class Unavailable(Exception):
    """An arm, or some, can't be measured here. The report says why, and the others are.

    :param reason: ends the sentence that it was not measured
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.arms: Sequence[str] = ()  # which; set by their step


def all_at_once(arms: Sequence[str], measure: Step) -> Step:
    """The step of arms that are measured together, and are all unavailable if one is."""

    def run(scale: Scale) -> Round:
        try:
            return measure(scale)
        except Unavailable as error:
            error.arms = arms
            raise

    return run


def one_by_one(arms: Mapping[str, Callable[[Scale], Sample]]) -> list[Step]:
    """The steps of arms that have nothing in common."""

    def step(name: str, measure: Callable[[Scale], Sample]) -> Step:
        return all_at_once([name], lambda scale: {name: measure(scale)})

    return [step(name, measure) for name, measure in arms.items()]


@dataclass(frozen=True)
class Figure:
    """Arms measured side by side, and what to compare."""

    name: str
    title: str
    arms: Sequence[str]
    metrics: Sequence[Metric]
    comparisons: Sequence[Comparison]
    steps: Sequence[Step]
    rounds: int = 5
    notes: str = ""

    def label(self, metric: str) -> str:
        """The label of a metric."""
        return next(each.label for each in self.metrics if each.key == metric)


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, and the range around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of the rounds' values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Result:
    """All rounds of a figure."""

    figure: Figure
    rounds: list[Round] = field(default_factory=list)
    noise: list[Noise] = field(default_factory=list)  # during each step of each round
    repeated: int = 0  # steps that were measured again because others had spoilt them
    unavailable: dict[str, str] = field(default_factory=dict)  # why, by arm

    def spread(self, arm: str, metric: str) -> Spread | None:
        """One cell of the table; None where the arm has no such metric."""
        values = [each[arm][metric] for each in self.rounds if metric in each[arm]]
        return Spread.of(values) if values else None

    def compare(self, comparison: Comparison) -> Spread | None:
        """Pair by pair: within one round the arms saw the same machine."""
        values = [comparison.value(each) for each in self.rounds]
        measured = [value for value in values if value is not None]
        return Spread.of(measured) if measured else None


class Benchmark:
    """Measures a figure: A B C A B C ..., so that a busy time hits every arm alike.

    :param patience: seconds that may be spent on waiting for others to be quiet, and on
        repeating what they have spoilt. What is repeated is decided by their CPU time alone
    """

    def __init__(self, figure: Figure, scale: Scale, *, patience: float = 0.0) -> None:
        self._scale = scale
        self._patience = patience
        self._result = Result(figure)

    def run(self, rounds: int | None = None) -> Result:
        """Measure that many rounds, or as many as the scale or the figure asks for."""
        figure = self._result.figure
        count = rounds or self._scale.rounds or figure.rounds
        for number in range(1, count + 1):
            print(f"{figure.name}: round {number} of {count}", file=sys.stderr)
            measured: dict[str, Sample] = {}
            for step in figure.steps:
                measured.update(self._measure(step))
            self._result.rounds.append(measured)
        return self._result

    def _measure(self, step: Step) -> Round:
        while True:
            start = time.monotonic()
            meter = NoiseMeter(self._wait_for_quiet())
            measured = self._run(step)
            noise = meter.read()
            if not noise.busy or self._patience <= 0:
                self._result.noise.append(noise)
                return measured
            self._patience -= time.monotonic() - start
            self._result.repeated += 1

    def _run(self, step: Step) -> Round:
        try:
            return step(self._scale)
        except Unavailable as error:
            self._result.unavailable.update(dict.fromkeys(error.arms, str(error)))
            return {arm: {} for arm in error.arms}

    def _wait_for_quiet(self) -> float:
        """Wait while patience lasts; return the pressure of the last moment."""
        while True:
            start = time.monotonic()
            moment = quiet_moment()
            if not moment.busy or self._patience <= 0:
                return moment.pressure
            self._patience -= time.monotonic() - start
