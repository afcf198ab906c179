"""The figures of each arm as people read them: one list of columns for the table and the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ._results import Arm, Diagnosis, Finding, Machine, ThreadTrace
from ._text import NONE, duration, number, plain, plural, share

ARMS = {
    "script": "the model in a loop on the main thread, without a server: what it can do",
    "def": "a plain def endpoint: the server runs each call in any of some 40 threads",
    "async-def": "an async def endpoint: the call runs on the event loop, which answers nobody "
    "else meanwhile",
    "executor": "a ThreadPoolExecutor(1), with the model loaded on the main thread",
    "runner": "InferenceRunner: the model is loaded, warmed up and called on one thread, its own",
    "runner-retain": "the same, and freed memory is kept (retain_memory=True)",
}
"""What each arm is, by its key."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure of an arm."""

    header: str
    """In two lines where one would be wide."""
    meaning: str
    """How it was measured and what it says, in one line."""
    figure: Callable[[Arm, Diagnosis], str]
    sweep: bool = False
    """Whether the small table of the thread sweep has it."""
    counted: bool = False
    """Whether it rests on what was counted of each thread."""

    @property
    def name(self) -> str:
        """The header in one line."""
        return self.header.replace("\n/", "/").replace("\n", " ")

    def cell(self, arm: Arm, diagnosis: Diagnosis) -> str:
        """The figure; nothing where it could not be counted."""
        if self.counted and not diagnosis.machine.counted:
            return NONE
        return self.figure(arm, diagnosis)


def columns(diagnosis: Diagnosis) -> list[Column]:
    """The columns to show: throttling only where there was any."""
    throttled = any(arm.throttled_periods for arm in (*diagnosis.arms, *diagnosis.sweep))
    return [*COLUMNS, THROTTLED] if throttled else [*COLUMNS]


def of_sweep(arm: Arm) -> str:
    """What an arm is called among the others of the thread sweep: its number of threads."""
    return str(arm.native_threads)


def target(diagnosis: Diagnosis) -> str:
    """What was called, as one name."""
    return plain(f"{diagnosis.target}.{diagnosis.call}")


def verdicts(diagnosis: Diagnosis) -> list[Finding]:
    """The findings, without lines of code that another one before has shown.

    Noise is not among them: it is said before all the rest, by :func:`noise`.
    """
    found: list[Finding] = []
    for finding in diagnosis.findings:
        if finding.lines and any(finding.lines == before.lines for before in found):
            detail = f"{finding.detail} The lines to write are those above."
            found.append(replace(finding, detail=detail, lines=()))
        elif finding.key != "noise":
            found.append(finding)
    return found


def noise(machine: Machine) -> str:
    """Why times moved meanwhile, and what holds nevertheless."""
    reasons = [
        (machine.others >= 0.05, f"other processes use {machine.others:.1f} CPUs"),
        (
            machine.pressure >= 0.01,
            f"somebody waits for a CPU {machine.pressure:.0%} of the time",
        ),
        (machine.stolen >= 0.01, f"the host takes {machine.stolen:.1f} CPUs away"),
    ]
    why = ", ".join(text for true, text in reasons if true) or "not quiet"
    counts = "the switches, not" if machine.counted else "none of"
    return f"This machine is busy ({why}): trust {counts} the times."


def where(machine: Machine) -> str:
    """The machine in one line."""
    paid = "" if machine.quota is None else f", a quota of {number(machine.quota)} CPUs"
    pools = ", ".join(machine.runtimes) or "none found"
    cpus = f"{plural(machine.cpus, 'CPU')} on {plural(machine.cores, 'core')}{paid}"
    software = f"{machine.system}; Python {machine.python}"
    return plain(f"{cpus}; {software}; native thread pools: {pools}")


# -- threads -----------------------------------------------------------------------------------


def is_loop(arm: Arm, thread: ThreadTrace) -> bool:
    """Whether it is the event loop's: the main thread, wherever there is a server."""
    return arm.key != "script" and thread.python == "MainThread"


def model_threads(arm: Arm) -> list[ThreadTrace]:
    """The threads that ran the model, the busiest first."""
    busy = [thread for thread in arm.threads if thread.busy]
    if arm.key != "async-def":  # there the event loop's thread runs it
        busy = [thread for thread in busy if not is_loop(arm, thread)]
    return sorted(busy, key=lambda thread: thread.use, reverse=True)


# -- columns -----------------------------------------------------------------------------------


def of_script(arm: Arm, diagnosis: Diagnosis) -> str:
    """The throughput, in times of the script's."""
    script = diagnosis.arm("script")
    if script is None or not script.calls:
        return NONE
    return f"{arm.calls_per_second / script.calls_per_second:.2f}x"


def per_call(count: Callable[[Arm], float]) -> Callable[[Arm, Diagnosis], str]:
    """A count in each call; nothing where no call ended."""
    return lambda arm, _: number(count(arm)) if arm.calls else NONE


COLUMNS = (
    Column(
        header="calls/s",
        meaning="calls of the model that ended, in a second",
        figure=lambda arm, _: number(arm.calls_per_second),
        sweep=True,
    ),
    Column(
        header="of\nscript",
        meaning="the same, in times of the script's: 1.00x means that the server costs nothing",
        figure=of_script,
    ),
    Column(
        header="p50",
        meaning="half of the calls took less, seen from the caller, so with the time in the queue",
        figure=lambda arm, _: duration(arm.latency(50)),
        sweep=True,
    ),
    Column(
        header="p99",
        meaning="all calls but one in a hundred took less; not told of fewer than 20 calls",
        figure=lambda arm, _: duration(arm.p99),
        sweep=True,
    ),
    Column(
        header="/health\np99",
        meaning="the same for an endpoint that does nothing, asked meanwhile: how long the event "
        "loop keeps everybody else waiting",
        figure=lambda arm, _: duration(arm.health_p99),
    ),
    Column(
        header="cores\nused",
        meaning="CPU seconds of all threads in a second; below the number of threads, some slept",
        figure=lambda arm, _: number(arm.cores_used),
        sweep=True,
        counted=True,
    ),
    Column(
        header="sleeps\n/call",
        meaning="voluntary context switches: how often in each call a thread gave its CPU up and "
        "slept. A healthy pool of threads sleeps between calls, not in them; hundreds mean that "
        "it was told to yield. Counted by the kernel, so right on a busy machine, too",
        figure=per_call(lambda arm: arm.switches_per_call),
        sweep=True,
        counted=True,
    ),
    Column(
        header="preempted\n/call",
        meaning="involuntary context switches: how often in each call another thread took the CPU",
        figure=per_call(lambda arm: arm.involuntary_switches / max(1, arm.calls)),
        counted=True,
    ),
    Column(
        header="faults\n/call",
        meaning="minor page faults: how often in each call the kernel had to hand out a page of "
        "memory, which is often one that was given back a moment ago",
        figure=per_call(lambda arm: arm.faults_per_call),
        counted=True,
    ),
    Column(
        header="in\nkernel",
        meaning="the part of the CPU time that the kernel used: page faults, switches, sleeping",
        figure=lambda arm, _: share(arm.system_seconds, arm.cpu_seconds),
        counted=True,
    ),
    Column(
        header="queued",
        meaning="of the time in which threads wanted a CPU, the part in which they waited for one",
        figure=lambda arm, _: share(arm.queued_seconds, arm.queued_seconds + arm.cpu_seconds),
        counted=True,
    ),
)
THROTTLED = Column(
    header="quota\nspent",
    meaning="periods in which the container's CPU quota was used up and everything stood still",
    figure=lambda arm, _: str(arm.throttled_periods),
)
