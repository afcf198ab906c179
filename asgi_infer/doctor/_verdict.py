"""What the measurements say, in plain words. Pure: figures in, sentences out.

Counts decide: switches and faults are the same on a busy machine. Times are compared as well
where the machine was quiet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ._case import DIFFERENCE, Case, Subject, duration
from ._overhead import server_cost
from ._results import Arm, Finding, Machine
from ._sweep import thread_count

_SLEEPS = 20.0  # voluntary switches a call: a healthy pool has hardly any
# A healthy thread spins for about 3 ms before it goes to sleep at a barrier, so that it sleeps
# 300 times in a second of CPU time at the most, as it does where others have taken a CPU away. A
# throttled one sleeps thousands of times.
_SLEEPS_PER_CPU_SECOND = 700.0
_TIMES_MORE = 10.0  # than in a script that sleeps as well
_FAULTS = 100.0  # a call
_SECONDS_PER_FAULT = 2.5e-6
_NOTICEABLE = 0.03  # seconds that /health waits

_SEVERITIES = ("problem", "advice", "fine")


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
    case = Case(
        subject=subject,
        machine=machine,
        arms={arm.key: arm for arm in arms},
        sweep={int(arm.key.partition("-")[2]): arm for arm in sweep},
    )
    looks = (
        _two_pools,
        _quota,
        _holds_gil,
        _loop_blocked,
        _page_faults,
        thread_count,
        _sleeps_anyway,
    )
    found = [finding for look in looks for finding in look(case)]
    if not any(finding.severity == "problem" for finding in found):
        found.extend(server_cost(case))
    found.extend(failures)
    found.sort(key=lambda finding: _SEVERITIES.index(finding.severity))
    return (*_noise(machine), *found)


def failed(title: str, how: str) -> Finding:
    """An arm that could not be measured."""
    return Finding(
        key="failed",
        severity="problem",
        headline=f"{title}: {how}",
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
        detail="Times measured here are not to be trusted: what rests on speeds alone is left "
        "out. Context switches and page faults are counted, and hold even so. For speeds, run it "
        "again when nothing else runs.",
    )


def _quota(case: Case) -> Iterator[Finding]:
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


def _sleeps(arm: Arm) -> bool:
    """Whether the model's threads go to sleep at once instead of spinning for a moment."""
    often = arm.voluntary_switches >= _SLEEPS_PER_CPU_SECOND * arm.cpu_seconds
    return often and arm.switches_per_call >= _SLEEPS


def _sleepers(case: Case) -> list[Arm]:
    """The usual servers in which the model's threads sleep as they do not in the script."""
    script = case.arms.get("script")
    usual = script.switches_per_call if script and _sleeps(script) else 0.0
    arms = (case.arms.get(key) for key in ("def", "executor"))
    return [
        arm
        for arm in arms
        if arm and _sleeps(arm) and arm.switches_per_call >= _TIMES_MORE * usual
    ]


def _two_pools(case: Case) -> Iterator[Finding]:
    runner = case.arms.get("runner")
    sleepers = _sleepers(case)
    if not sleepers:
        return
    worst = max(sleepers, key=lambda arm: arm.switches_per_call)
    if runner and _sleeps(runner) and runner.switches_per_call > worst.switches_per_call / 2:
        yield _sleeps_on_the_runner_too(worst, runner)
        return
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


def _sleeps_on_the_runner_too(worst: Arm, runner: Arm) -> Finding:
    return Finding(
        key="sleeps-everywhere",
        severity="problem",
        headline=f"the model's threads sleep {worst.switches_per_call:.0f} times per call behind "
        f"a server, and {runner.switches_per_call:.0f} times on the runner",
        detail="In the script they do not. Something else in the process has native threads of "
        "the same kind: a library that the module uses when it is imported, or Python threads of "
        "the model's own that call it. Move such calls into the model's factory.",
    )


def _why_two_pools(case: Case, worst: Arm, runner: Arm | None) -> str:
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


def _loop_blocked(case: Case) -> Iterator[Finding]:
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
        headline=f"async def blocks the event loop: /health waits {duration(wait)}"
        + (f", on the runner {duration(instead)}" if instead is not None else ""),
        detail="In an async def endpoint the model runs on the event loop's thread. It has the "
        "CPUs there, and while it runs no other request is answered, no health check, no "
        f"disconnect seen; a call takes {duration(case.call)}. On the runner it has them as "
        "well, and the loop stays free.",
        lines=case.subject.application(),
    )


def _holds_gil(case: Case) -> Iterator[Finding]:
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
        headline=f"the model holds the GIL: /health waits {duration(wait)} even on the "
        f"runner, and a call takes {duration(case.call)}",
        detail="The binding keeps Python's lock while it computes, so that no other thread of "
        "the process can run, the event loop's neither. No thread helps against that: run the "
        "model in a process of its own, or ask its makers to release the lock around the "
        "computation.",
    )


def _as_long_as_a_call(wait: float, case: Case) -> bool:
    return wait >= _NOTICEABLE and wait >= case.call / 2


# -- what could still be had -------------------------------------------------------------------


def _page_faults(case: Case) -> Iterator[Finding]:
    before, after = case.arms.get("runner"), case.arms.get("runner-retain")
    if before is None or after is None or before.faults_per_call < _FAULTS:
        return
    if after.faults_per_call > before.faults_per_call / 2:
        return
    gain = after.calls_per_second / before.calls_per_second
    cost = before.faults_per_call * _SECONDS_PER_FAULT / (before.latency(50) or math.inf)
    worth = cost >= DIFFERENCE - 1 if case.machine.noisy else gain >= DIFFERENCE
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


def _sleeps_anyway(case: Case) -> Iterator[Finding]:
    """Native threads that sleep at their barriers even in the script."""
    script = case.arms.get("script")
    if script is None or not _sleeps(script):
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
