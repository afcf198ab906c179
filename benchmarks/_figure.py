"""One figure: what is measured, against what, and what it is to reach."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ._procfs import Noise, NoiseMeter

Sample = Mapping[str, float]
"""What one arm measured in one round, by metric."""

Round = Mapping[str, Sample]
"""One round: every arm once, one right after the other."""


@dataclass(frozen=True)
class Scale:
    """How much to measure. ``FULL`` for figures to quote, ``QUICK`` for a first look."""

    seconds: float  # under load, for each arm and round
    warmup: float  # seconds of load before those
    passes: int  # of the hand-off, in each process
    calls: int  # in each pass with many callers
    million: int  # calls for the figure of that name
    iterations: int  # of boosting: how large the model of the digits is; 0: a no-op in its place
    rounds: int | None = None  # None: as many as each figure asks for


FULL = Scale(seconds=4.0, warmup=1.0, passes=7, calls=3200, million=1_000_000, iterations=100)
QUICK = Scale(
    seconds=1.5, warmup=0.5, passes=3, calls=1600, million=50_000, iterations=100, rounds=2
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

    def value(self, measured: Round) -> float:
        """The figure of one round."""
        own = measured[self.arm][self.metric]
        if self.against is None:
            return own
        other = measured[self.against][self.metric]
        return own / other if other else float("inf")


def one_by_one(arms: Mapping[str, Callable[[Scale], Sample]]) -> Callable[[Scale], Round]:
    """What measures arms that have nothing in common, in their order."""
    return lambda scale: {name: measure(scale) for name, measure in arms.items()}


@dataclass(frozen=True)
class Figure:
    """Arms measured side by side, and what to compare."""

    name: str
    title: str
    arms: Sequence[str]
    metrics: Sequence[Metric]
    comparisons: Sequence[Comparison]
    measure: Callable[[Scale], Round]
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
    noise: list[Noise] = field(default_factory=list)

    def spread(self, arm: str, metric: str) -> Spread | None:
        """One cell of the table; None where the arm has no such metric."""
        values = [each[arm][metric] for each in self.rounds if metric in each[arm]]
        return Spread.of(values) if values else None

    def compare(self, comparison: Comparison) -> Spread:
        """Pair by pair: within one round the arms saw the same machine."""
        return Spread.of([comparison.value(each) for each in self.rounds])


def run(figure: Figure, scale: Scale, rounds: int | None = None) -> Result:
    """Measure a figure: A B C A B C ..., so that a busy moment hits every arm alike."""
    result = Result(figure)
    count = rounds or scale.rounds or figure.rounds
    for number in range(1, count + 1):
        print(f"{figure.name}: round {number} of {count}", file=sys.stderr)
        meter = NoiseMeter()
        result.rounds.append(figure.measure(scale))
        result.noise.append(meter.read())
    return result
