"""What the measurements say, in plain words. Pure: figures in, sentences out.

Counts decide, where threads can be counted: switches and faults are the same on a busy machine.
Times are compared as well where the machine was quiet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ._case import DIFFERENCE, Case, Subject, switches
from ._overhead import server_cost
from ._results import Arm, Finding, Machine
from ._sweep import thread_count
from ._text import duration

_SLEEPS = 20.0  # voluntary switches a call: a healthy pool has hardly any
# A healthy thread spins for about 3 ms before it goes to sleep at a barrier, so that it sleeps
# 300 times in a second of CPU time at the most, as it does where others have taken a CPU away. A
# throttled one sleeps thousands of times.
_SLEEPS_PER_CPU_SECOND = 700.0
_TIMES_MORE = 10.0  # than in the script
_FAULTS = 100.0  # a call
_SECONDS_PER_FAULT = 2.5e-6
_NOTICEABLE = 0.03  # seconds that /health waits
_NOTICEABLE_AS_CALLS = 0.005  # where it waits for calls, as all of its waits show
_PERIOD = 0.1  # seconds, of a CPU quota
_SPENT = 0.05  # of the periods

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
        sweep={arm.native_threads: arm for arm in sweep if arm.native_threads},
    )
    looks = _LOOKS if machine.counted else [look for look in _LOOKS if look not in _ON_COUNTS]
    found = [finding for look in looks for finding in look(case)]
    if not any(each.severity == "problem" or each.key in _SLEEPING for each in found):
        found.extend(server_cost(case))
    found.extend((*failures, *_gaps(case)))
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


# -- what can be told --------------------------------------------------------------------------


def _noise(machine: Machine) -> Iterator[Finding]:
    if not machine.noisy:
        return
    counts = "Context switches and page faults are counted, and hold even so. "
    yield Finding(
        key="noise",
        severity="advice",
        headline=f"the machine is noisy: others keep {machine.others:.1f} CPUs busy, "
        f"{machine.stolen:.1f} are stolen, somebody waits {machine.pressure:.0%} of the time",
        detail="Times measured here are not to be trusted: what rests on speeds alone is left "
        f"out. {counts if machine.counted else ''}For speeds, run it again when nothing else "
        "runs.",
    )


def _gaps(case: Case) -> Iterator[Finding]:
    """What is missing for a verdict."""
    if not case.machine.counted:
        yield Finding(
            key="uncounted",
            severity="advice",
            headline="threads can't be counted here: the verdict rests on speeds alone",
            detail="What each thread does is read from /proc, which this system does not have, or "
            "not whole. Sleeps, page faults and CPUs in use are not known; two OpenMP pools, say, "
            "can only be found on Linux.",
        )
    if "script" not in case.arms:
        yield Finding(
            key="incomplete",
            severity="advice",
            headline="the script was not measured, and a verdict needs it",
            detail="Whether a server slows the model down can only be told beside what the model "
            "does without one. Add script to --arms.",
        )


# -- the machine -------------------------------------------------------------------------------


def _quota(case: Case) -> Iterator[Finding]:
    stopped = [arm for arm in case.arms.values() if _stopped(arm)]
    if not stopped:
        return
    worst = max(stopped, key=lambda arm: arm.throttled_periods / arm.seconds)
    quota = case.machine.quota
    paid = max(1, math.floor(quota or case.subject.threads))
    runner = case.arms.get("runner")
    if runner in stopped and case.subject.threads <= paid:
        cure = "The runner has no more threads than it pays for already: ask for a larger one."
        lines: tuple[str, ...] = ()
    else:
        cure = "Use no more threads than it pays for, or ask for a larger one."
        environment = f"# or: asgi-infer run --threads {paid} -- uvicorn app:app"
        lines = (*case.subject.policy(threads=paid), environment)
    yield Finding(
        key="quota",
        severity="problem",
        headline=f"the container's CPU quota{f' of {quota:g}' if quota else ''} ran out "
        f"{worst.throttled_periods} times in {worst.seconds:.1f} s ({worst.title})",
        detail="When the quota of a period is used up, all threads stand still until the next "
        "period begins. Native threads that spin while they wait for each other use it up "
        f"fastest. {cure}",
        lines=lines,
    )


def _stopped(arm: Arm) -> bool:
    """Whether the quota ran out often enough to matter."""
    return arm.throttled_periods >= max(2.0, _SPENT * arm.seconds / _PERIOD)


# -- what the server does to the model ---------------------------------------------------------


def _sleeps(arm: Arm) -> bool:
    """Whether the model's threads go to sleep at once instead of spinning for a moment."""
    often = arm.voluntary_switches >= _SLEEPS_PER_CPU_SECOND * arm.cpu_seconds
    return often and arm.switches_per_call >= _SLEEPS


def _sleepers(case: Case) -> list[Arm]:
    """The usual servers in which the model's threads sleep as they do not in the script."""
    script = case.arms.get("script")
    usual = script.switches_per_call if script else 0.0
    arms = (case.arms.get(key) for key in ("def", "executor"))
    return [
        arm
        for arm in arms
        if arm and _sleeps(arm) and arm.switches_per_call >= _TIMES_MORE * usual
    ]


def _sleeps_in_server(case: Case) -> Iterator[Finding]:
    script, runner, sleepers = case.arms.get("script"), case.arms.get("runner"), _sleepers(case)
    if not sleepers:
        return
    worst = max(sleepers, key=lambda arm: arm.switches_per_call)
    figures = switches(script, worst, runner)
    if runner and _sleeps(runner) and runner.switches_per_call > worst.switches_per_call / 2:
        yield _sleeps_everywhere(worst, runner, figures)
        return
    gain = None
    if runner and not case.machine.noisy:
        gain = runner.calls_per_second / worst.calls_per_second
    if case.has("libgomp"):  # the one that throttles a pool for the sake of another
        yield _two_pools(case, worst, gain, figures)
    else:
        yield _other_sleeps(case, worst, gain, figures)


def _two_pools(case: Case, worst: Arm, gain: float | None, figures: str) -> Finding:
    slower = gain is not None and gain < DIFFERENCE
    return Finding(
        key="two-pools",
        severity="advice" if slower else "problem",
        headline=f"two OpenMP pools: {worst.switches_per_call:.0f} sleeps per call; "
        + _runner("load the model on the runner", gain),
        detail="The model is loaded on one thread, where it starts a pool of native threads, and "
        "called on another, where it starts a second one. GNU OpenMP counts the threads of both; "
        "once there are more than CPUs, they no longer spin for a moment at each barrier but go "
        f"to sleep, and must be woken. {figures} Load, warm up and call the model "
        "on the same thread, and nowhere else: that is what a runner does.",
        lines=case.subject.application(),
    )


def _other_sleeps(case: Case, worst: Arm, gain: float | None, figures: str) -> Finding:
    return Finding(
        key="sleeps-in-server",
        severity="problem" if gain is not None and gain >= DIFFERENCE else "advice",
        headline=f"the model's threads sleep {worst.switches_per_call:.0f} times per call in the "
        f"{worst.title}; {_runner('try the runner', gain)}",
        detail=f"{figures} GNU OpenMP, which does that where it has two pools, is "
        "not loaded. Something else is waited for: a lock of the library, or a pool of its own. "
        "Try the runner, which loads and calls the model on one thread; py-spy dump --native "
        "shows what the threads wait for.",
        lines=case.subject.application(),
    )


def _runner(advice: str, gain: float | None) -> str:
    """What to do, and what it brings where that is known."""
    if gain is None:
        return advice
    return f"{advice}: {gain:.1f}x" if gain >= DIFFERENCE else "the runner was not faster here"


def _sleeps_everywhere(worst: Arm, runner: Arm, figures: str) -> Finding:
    return Finding(
        key="sleeps-everywhere",
        severity="problem",
        headline=f"the model's threads sleep {worst.switches_per_call:.0f} times per call behind "
        f"a server, and {runner.switches_per_call:.0f} times on the runner",
        detail=f"{figures} Where the model is loaded makes no difference. "
        "Something else in the process has native threads or locks that the model waits for: a "
        "library that the module uses when it is imported, or Python threads of the model's own "
        "that call it. Move such calls into the model's factory.",
    )


def _loop_blocked(case: Case) -> Iterator[Finding]:
    arm, runner = case.arms.get("async-def"), case.arms.get("runner")
    wait = arm.health_latency(99) if arm else None
    if case.machine.noisy or wait is None or wait < max(_NOTICEABLE, case.call / 2):
        return
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
    if case.machine.noisy or runner is None or not runner.health:
        return
    wait, median = runner.health_latency(99) or 0.0, runner.health_latency(50) or 0.0
    # Every other request comes in the first half of a call that holds the lock from end to end,
    # and none waits for more than the calls that are under way.
    longest = 1.5 * case.subject.clients * case.call
    waits_for_calls = median >= case.call / 4 and case.call / 2 <= wait <= longest
    if not waits_for_calls or wait < _NOTICEABLE_AS_CALLS:
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
        lines=case.subject.isolated(),
    )


# -- what could still be had -------------------------------------------------------------------


def _page_faults(case: Case) -> Iterator[Finding]:
    before, after = case.arms.get("runner"), case.arms.get("runner-retain")
    if before is None or after is None or before.faults_per_call < _FAULTS:
        return
    if after.faults_per_call > before.faults_per_call / 2:
        return
    gain = after.calls_per_second / before.calls_per_second
    share = before.minor_faults * _SECONDS_PER_FAULT / before.seconds
    if share < DIFFERENCE - 1 or (gain < DIFFERENCE and not case.machine.noisy):
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
        lines=case.subject.policy(retain_memory=True),
    )


def _sleeps_anyway(case: Case) -> Iterator[Finding]:
    """Native threads that sleep at their barriers even in the script."""
    script = case.arms.get("script")
    if script is None or not _sleeps(script) or not _has_a_pool(case, script):
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


def _has_a_pool(case: Case, script: Arm) -> bool:
    """Whether native threads work together: Python's sleep for reasons of their own."""
    busy = [thread for thread in script.threads if thread.busy]
    native = any(thread.python is None for thread in busy)
    return bool(case.machine.runtimes) and native and len(busy) > 1


_LOOKS = (
    _sleeps_in_server,
    _quota,
    _holds_gil,
    _loop_blocked,
    _page_faults,
    thread_count,
    _sleeps_anyway,
)
_ON_COUNTS = (_sleeps_in_server, _page_faults, _sleeps_anyway)
_SLEEPING = ("two-pools", "sleeps-in-server")
