"""What the measurements say, in plain words. Pure: figures in, sentences out.

Counts decide: switches and faults are the same on a busy machine. Times are compared as well
where the machine was quiet, and then a difference of 5 % is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ._results import Arm, Finding, Machine
from ._target import Target

_SLEEPS = 20.0  # voluntary switches a call: a healthy pool has hardly any
_TIMES_MORE = 10.0  # than in the script
_DIFFERENCE = 1.05
_FAULTS = 100.0  # a call
_SECONDS_PER_FAULT = 2.5e-6
_NOTICEABLE = 0.03  # seconds that /health waits

_SEVERITIES = ("problem", "advice", "fine")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was measured: the names for the lines to write.

    :param sample_is_made: by a function
    :param threads: native threads that the runner uses by default
    """

    target: Target
    sample_is_made: bool
    threads: int

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
class _Case:
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

    def _undisturbed(self) -> list[Arm]:
        script = self.arms.get("script")
        return [script] if script else list(self.arms.values())

    @property
    def sleepers(self) -> list[Arm]:
        """The usual servers in which the model's threads sleep as they do not in the script."""
        script = self.arms.get("script")
        usual = script.switches_per_call if script else 0.0
        return [
            arm
            for key in ("def", "executor")
            if (arm := self.arms.get(key)) and _sleeps(arm, above=usual)
        ]


def findings(
    subject: Subject,
    machine: Machine,
    arms: Sequence[Arm],
    sweep: Sequence[Arm],
    failures: Sequence[Finding] = (),
) -> tuple[Finding, ...]:
    """What to do, the most important thing first; noise before it all.

    :param failures: what is to be said of arms that could not be measured
    """
    case = _Case(
        subject=subject,
        machine=machine,
        arms={arm.key: arm for arm in arms},
        sweep={int(arm.key.partition("-")[2]): arm for arm in sweep},
    )
    looks = (_two_pools, _quota, _holds_gil, _loop_blocked, _page_faults, _threads, _sleeps_anyway)
    found = [finding for look in looks for finding in look(case)]
    if not any(finding.severity == "problem" for finding in found):
        found.extend(_server_cost(case))
    found.extend(failures)
    found.sort(key=lambda finding: _SEVERITIES.index(finding.severity))
    return (*_noise(machine), *found)


def failed(title: str, how: str) -> Finding:
    """An arm that could not be measured."""
    return Finding(
        key="failed",
        severity="problem",
        headline=f"{title} {how}",
        detail=f"The model could not be measured this way ({title}), and the others go without "
        f"it. If the model must stay on the thread that imported it, or its libraries can't "
        f"bear a second one, an application that does the same will fail the same way.",
    )


# -- the machine -------------------------------------------------------------------------------


def _noise(machine: Machine) -> Iterator[Finding]:
    if not machine.noisy:
        return
    yield Finding(
        key="noise",
        severity="advice",
        headline=f"the machine is noisy: others keep {machine.others:.1f} CPUs busy, "
        f"{machine.stolen:.1f} are stolen, somebody waits {machine.pressure:.0%} of the time",
        detail="Times measured here are not to be trusted, and no advice below rests on them "
        "alone. Context switches and page faults are counted, and hold even so. For speeds, "
        "run it again when nothing else runs.",
    )


def _quota(case: _Case) -> Iterator[Finding]:
    throttled = [arm for arm in case.arms.values() if arm.throttled_periods > 0]
    if not throttled:
        return
    worst = max(throttled, key=lambda arm: arm.throttled_periods / arm.seconds)
    threads = max(1, math.floor(case.machine.quota or case.subject.threads))
    quota = case.machine.quota
    yield Finding(
        key="quota",
        severity="problem",
        headline=f"the container's CPU quota{f' of {quota:g}' if quota else ''} ran out "
        f"{worst.throttled_periods} times in {worst.seconds:.1f} s ({worst.title})",
        detail="When the quota of a period is used up, all threads stand still until the next "
        "period begins. Native threads that spin while they wait for each other use it up "
        "fastest. Use no more threads than it pays for, or ask for a larger quota.",
        lines=(case.subject.runner(threads=threads), f"asgi-infer run --threads {threads} -- ..."),
    )


# -- what the server does to the model ---------------------------------------------------------


def _sleeps(arm: Arm, *, above: float) -> bool:
    return arm.switches_per_call >= max(_SLEEPS, _TIMES_MORE * above)


def _two_pools(case: _Case) -> Iterator[Finding]:
    runner = case.arms.get("runner")
    if not case.sleepers:
        return
    worst = max(case.sleepers, key=lambda arm: arm.switches_per_call)
    if runner and runner.switches_per_call > worst.switches_per_call / 2:
        return  # the runner is no remedy: something else puts them to sleep
    openmp = any("libgomp" in each for each in case.machine.runtimes)
    gain = ""
    if runner and not case.machine.noisy and runner.calls_per_second > worst.calls_per_second:
        gain = f": {runner.calls_per_second / worst.calls_per_second:.1f}x"
    yield Finding(
        key="two-pools",
        severity="problem",
        headline=f"two {'OpenMP' if openmp else 'native thread'} pools: "
        f"{worst.switches_per_call:.0f} sleeps per call; load the model on the runner{gain}",
        detail=_why_two_pools(case, worst, runner),
        lines=case.subject.application(),
    )


def _why_two_pools(case: _Case, worst: Arm, runner: Arm | None) -> str:
    script = case.arms.get("script")
    seen = [arm for arm in (script, worst, runner) if arm]
    figures = ", ".join(f"{arm.switches_per_call:.1f} ({arm.title})" for arm in seen)
    return (
        "The model is loaded on one thread, where it starts a pool of native threads, and called "
        "on another, where it starts a second one. GNU OpenMP counts the threads of both; once "
        "there are more than CPUs, they no longer spin for a moment at each barrier but go to "
        f"sleep, and must be woken. Voluntary context switches per call: {figures}. Load, warm "
        "up and call the model on the same thread, and nowhere else: that is what a runner does."
    )


def _loop_blocked(case: _Case) -> Iterator[Finding]:
    arm = case.arms.get("async-def")
    wait = arm.health_latency(99) if arm else None
    if arm is None or wait is None or not _as_long_as_a_call(wait, case):
        return
    runner = case.arms.get("runner")
    instead = runner.health_latency(99) if runner else None
    if instead is not None and instead > wait / 2:
        return  # not the loop: the runner would not help
    yield Finding(
        key="loop-blocked",
        severity="advice",
        headline=f"async def blocks the event loop: /health waits {_milliseconds(wait)}"
        + (f", on the runner {_milliseconds(instead)}" if instead is not None else ""),
        detail="In an async def endpoint the model runs on the event loop's thread. It is as "
        "fast as in the script, and while it runs no other request is answered, no health "
        f"check, no disconnect seen; a call takes {_milliseconds(case.call)}. On the runner it "
        "is as fast, and the loop stays free.",
        lines=case.subject.application(),
    )


def _holds_gil(case: _Case) -> Iterator[Finding]:
    runner = case.arms.get("runner")
    if runner is None or not runner.health:
        return
    wait, median = runner.health_latency(99) or 0.0, runner.health_latency(50) or 0.0
    # Every other request comes in the first half of a call that holds the lock from end to end.
    if not _as_long_as_a_call(wait, case) or median < case.call / 4:
        return
    yield Finding(
        key="holds-gil",
        severity="problem",
        headline=f"the model holds the GIL: /health waits {_milliseconds(wait)} even on the "
        f"runner, and a call takes {_milliseconds(case.call)}",
        detail="The binding keeps Python's lock while it computes, so that no other thread of "
        "the process can run, the event loop's neither. No thread helps against that: run the "
        "model in a process of its own, or ask its makers to release the lock around the "
        "computation.",
    )


def _as_long_as_a_call(wait: float, case: _Case) -> bool:
    return wait >= _NOTICEABLE and wait >= case.call / 2


# -- what could still be had -------------------------------------------------------------------


def _page_faults(case: _Case) -> Iterator[Finding]:
    before, after = case.arms.get("runner"), case.arms.get("runner-retain")
    if before is None or after is None or before.faults_per_call < _FAULTS:
        return
    if after.faults_per_call > before.faults_per_call / 2:
        return
    gain = after.calls_per_second / before.calls_per_second
    cost = before.faults_per_call * _SECONDS_PER_FAULT / (before.latency(50) or math.inf)
    worth = cost >= _DIFFERENCE - 1 if case.machine.noisy else gain >= _DIFFERENCE
    if not worth:
        return
    faster = "" if case.machine.noisy else f": {gain:.2f}x"
    yield Finding(
        key="page-faults",
        severity="advice",
        headline=f"{before.faults_per_call:.0f} page faults per call: keep freed memory{faster}",
        detail="The allocator returns the model's large buffers to the kernel after each call, "
        f"and the next one pays for every page again: {before.faults_per_call:.0f} faults a "
        f"call, {after.faults_per_call:.0f} with retain_memory. The price: the process stays as "
        "large as it ever was.",
        lines=("from asgi_infer import NativePolicy", case.subject.runner(retain_memory=True)),
    )


def _threads(case: _Case) -> Iterator[Finding]:
    default = case.sweep.get(case.subject.threads)
    if case.machine.noisy or default is None or len(case.sweep) < 2:
        return
    if _does_not_follow(case.sweep):
        yield _elsewhere(case)
        return
    # The default is measured twice, at different moments: what beats both beats it.
    runner = case.arms.get("runner", default)
    usual = max(default.calls_per_second, runner.calls_per_second)
    best = max(case.sweep, key=lambda count: case.sweep[count].calls_per_second)
    gain = case.sweep[best].calls_per_second / usual
    if gain >= _DIFFERENCE:
        yield Finding(
            key="threads",
            severity="advice",
            headline=f"{best} native threads instead of {case.subject.threads}: {gain:.2f}x",
            detail=f"{_sweep(case.sweep)}. More threads than the model can use wait for each "
            "other; threads that share a core slow each other down.",
            lines=_policy(case, best),
        )
    else:
        yield from _spinning(case, usual)


def _spinning(case: _Case, usual: float) -> Iterator[Finding]:
    """Fewer threads that do as much: the others only spin."""
    default = case.sweep[case.subject.threads]
    for count, arm in sorted(case.sweep.items()):
        if count >= case.subject.threads:
            return
        if arm.calls_per_second * _DIFFERENCE < usual or arm.cores_used > 0.7 * default.cores_used:
            continue
        yield Finding(
            key="spinning",
            severity="advice",
            headline=f"{count} native threads are as fast as {case.subject.threads}, on "
            f"{arm.cores_used:.1f} CPUs instead of {default.cores_used:.1f}",
            detail=f"{_sweep(case.sweep)}. The other threads burn CPU while they wait for work: "
            "left out, it goes to the event loop, or to another worker.",
            lines=_policy(case, count),
        )
        return


def _does_not_follow(sweep: dict[int, Arm]) -> bool:
    return 1 in sweep and sweep[1].cores_used > 1.6


def _elsewhere(case: _Case) -> Finding:
    return Finding(
        key="threads-elsewhere",
        severity="advice",
        headline=f"NativePolicy(threads=1) leaves {case.sweep[1].cores_used:.1f} CPUs busy: the "
        f"library takes its thread count elsewhere",
        detail=f"{_sweep(case.sweep)}. NativePolicy sets the count of OpenMP runtimes. ONNX "
        "Runtime takes its own from SessionOptions.intra_op_num_threads, PyTorch from "
        "torch.set_num_threads, OpenBLAS and MKL from the environment before they are loaded.",
        lines=(f"asgi-infer run --threads {case.subject.threads} -- ...",),
    )


def _sweep(sweep: dict[int, Arm]) -> str:
    figures = (
        f"{count}: {arm.calls_per_second:.1f} calls/s on {arm.cores_used:.1f} CPUs"
        for count, arm in sorted(sweep.items())
    )
    return f"Threads: {'; '.join(figures)}"


def _policy(case: _Case, threads: int) -> tuple[str, ...]:
    return ("from asgi_infer import NativePolicy", case.subject.runner(threads=threads))


def _sleeps_anyway(case: _Case) -> Iterator[Finding]:
    """Native threads that sleep at their barriers even in the script."""
    script = case.arms.get("script")
    if script is None or script.switches_per_call < _SLEEPS:
        return
    per_millisecond = script.switches_per_call / (1000 * case.call) if case.call else 0.0
    if per_millisecond < 0.5:
        return
    yield Finding(
        key="already-sleeping",
        severity="advice",
        headline=f"even in the script the model's threads sleep "
        f"{script.switches_per_call:.0f} times per call",
        detail="They wait for each other asleep instead of spinning for a moment: no server is "
        "the cause. Usual causes are OMP_WAIT_POLICY=passive, KMP_BLOCKTIME=0, a CPU with fast "
        "and slow cores (OpenMP then sleeps by default), several libraries with a pool each, or "
        "a library that hands over many small pieces of work. Try it with spinning allowed.",
        lines=("OMP_WAIT_POLICY=active KMP_BLOCKTIME=200 asgi-infer doctor ...",),
    )


# -- the server itself -------------------------------------------------------------------------


def _server_cost(case: _Case) -> Iterator[Finding]:
    """Whether the usual servers are slower than the script, where no sign says why."""
    script = case.arms.get("script")
    servers = [arm for key in ("def", "executor", "async-def") if (arm := case.arms.get(key))]
    if script is None or not servers:
        return
    worst = min(servers, key=lambda arm: arm.calls_per_second)
    slower = script.calls_per_second / max(worst.calls_per_second, 1e-9)
    overhead = 1 / max(worst.calls_per_second, 1e-9) - 1 / script.calls_per_second
    if case.machine.noisy or slower <= 1.25 or overhead < 0.002:
        yield _healthy(script, worst)
    else:
        yield _slower(script, worst, slower)


def _healthy(script: Arm, worst: Arm) -> Finding:
    return Finding(
        key="healthy",
        severity="fine",
        headline=f"the server is not the cause: {worst.calls_per_second:.1f} calls/s "
        f"({worst.title}), {script.calls_per_second:.1f} in the script",
        detail="The model's threads do not sleep more than in the script "
        f"({worst.switches_per_call:.1f} and {script.switches_per_call:.1f} times per call). If "
        "the application is slow all the same, look at what it does around the call: decoding "
        "and validating requests, serialising answers, other calls at the same time (try "
        "--clients).",
    )


def _slower(script: Arm, worst: Arm, slower: float) -> Finding:
    cpu, usual = (arm.cpu_seconds / max(1, arm.calls) for arm in (worst, script))
    wasting = cpu > 1.25 * usual
    return Finding(
        key="slower",
        severity="advice",
        headline=f"{worst.title} is {slower:.1f}x slower than the script, and no known sign "
        "says why",
        detail=f"A call uses {cpu:.3f} CPU seconds there and {usual:.3f} in the script: the "
        + (
            "model works more for the same result. Threads that spin or fight for the caches, "
            "or the clients on the same CPUs, do that; try fewer threads."
            if wasting
            else "model waits. For a lock of its own, for the GIL, or for other callers; look "
            "at it with py-spy dump --native."
        ),
    )
