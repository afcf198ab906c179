"""``diagnose``: all arms in turn, and what they say."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..native import cpu, noise
from ._arms import TITLES, Setting, measure, measure_threads
from ._case import Subject
from ._machine import describe, runtimes
from ._process import ChildError, ChildFailed
from ._results import Arm, Diagnosis, Finding
from ._target import Target, TargetError
from ._verdict import failed, findings

_FEW = 60  # calls of each client: six, where a throttled pool makes them ten times slower
_OVERHEAD = 3.0  # seconds that an arm takes on top of those that it is measured for

Progress = Callable[[str, float], None]
"""Told, several times a second, what is going on and which share of all is done."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much to measure.

    :param seconds: for each arm
    :param clients: that call at the same time
    :param arms: keys of ``TITLES``
    :param sweep: whether to try other thread counts
    :param patience: seconds that a process may take over any one answer
    """

    seconds: float = 3.0
    clients: int = 1
    arms: tuple[str, ...] = tuple(TITLES)
    sweep: bool = True
    patience: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a first try has shown."""

    seconds: float
    """Of one call."""
    sample_is_made: bool
    runtimes: tuple[str, ...]


def diagnose(
    target: Target, options: Options, progress: Progress = lambda _what, _done: None
) -> Diagnosis:
    """Measure a model in each way, each in a process of its own, and say what comes of it.

    :raises TargetError: it can't be measured, for a reason that the text tells
    :raises OSError: the system has no room for a file or a process
    """
    with tempfile.TemporaryDirectory(prefix="asgi-infer-doctor-") as folder:
        setting = Setting(
            target=target,
            sample=Path(folder, "sample.pickle"),
            seconds=options.seconds,
            clients=options.clients,
            patience=options.patience,
        )
        progress("how quiet is the machine?", 0.0)
        quiet = noise.quiet_moment()
        progress(f"a first call of {target.model}", 0.0)
        tried = preflight(setting)
        setting = replace(setting, allowance=_FEW * tried.seconds * options.clients)
        measured, beside, failures = _measure(setting, options, progress)
    machine = describe(_loudest([quiet, *beside]), tried.runtimes)
    subject = Subject(
        target=target,
        sample_is_made=tried.sample_is_made,
        threads=cpu.budget().threads,
        clients=options.clients,
    )
    arms = tuple(arm for arm in measured if arm.key in TITLES)
    sweep = tuple(arm for arm in measured if arm.key not in TITLES)
    return Diagnosis(
        target=target.model,
        call=target.call or "__call__",
        clients=options.clients,
        machine=machine,
        arms=arms,
        sweep=sweep,
        findings=findings(subject, machine, arms, sweep, failures),
    )


def preflight(setting: Setting) -> Preflight:
    """Try it once, in a process of its own, which writes down the sample for all others.

    :raises TargetError: it can't be measured
    """
    try:
        with setting.child("preflight") as child:
            told = child.ask()
            return Preflight(**told, runtimes=runtimes(child.pid))
    except ChildFailed as error:
        raise TargetError(str(error)) from None
    except ChildError as error:
        raise TargetError(f"a first call of {setting.target.model}: {error}") from None


def sweep_counts() -> list[int]:
    """The thread counts that are worth a try on this machine."""
    budget = cpu.budget()
    cpus = len(budget.cpus)
    tried = {1, budget.cores // 2, budget.cores, cpus - 1, cpus, budget.threads}
    return sorted(count for count in tried if 1 <= count <= cpus)


Measure = Callable[[Setting, Callable[[], None]], Arm]


def _measure(
    setting: Setting, options: Options, progress: Progress
) -> tuple[list[Arm], list[noise.Noise], tuple[Finding, ...]]:
    """All arms and the thread sweep, how quiet it was beside each, and what is to be said of
    those that failed.

    :raises TargetError: all of them failed
    """
    arms: list[Arm] = []
    beside: list[noise.Noise] = []
    failures: list[Finding] = []
    steps = list(_steps(options))
    for number, (title, step) in enumerate(steps):
        whole = _Whole(progress, title, number / len(steps), 1 / len(steps), options.seconds)
        meter = noise.NoiseMeter()
        try:
            arms.append(step(setting, whole.tick))
        except ChildError as error:
            failures.append(failed(title, str(error)))
        else:
            beside.append(meter.read())
    if not arms:
        raise TargetError("; ".join(finding.headline for finding in failures))
    progress("done", 1.0)
    return arms, beside, tuple(failures)


def _loudest(moments: list[noise.Noise]) -> noise.Noise:
    return noise.Noise(
        pressure=max(moment.pressure for moment in moments),
        others=max(moment.others for moment in moments),
        stolen=max(moment.stolen for moment in moments),
    )


class _Whole:
    """How far along all of it is: the arms done, and a guess at the one under way."""

    def __init__(
        self, progress: Progress, title: str, done: float, share: float, seconds: float
    ) -> None:
        self._progress = progress
        self._title = title
        self._done = done
        self._share = share
        self._expected = seconds + _OVERHEAD
        self._start = time.monotonic()
        self.tick()

    def tick(self) -> None:
        """Say so."""
        part = min(1.0, (time.monotonic() - self._start) / self._expected)
        self._progress(self._title, self._done + part * self._share)


def _steps(options: Options) -> Iterator[tuple[str, Measure]]:
    for key in options.arms:
        yield TITLES[key], partial(measure, key)
    for count in sweep_counts() if options.sweep else ():
        yield f"InferenceRunner, threads={count}", partial(measure_threads, count)
