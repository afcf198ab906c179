"""What is said of the server and the runner, where no sign says that a server harms the model."""

from __future__ import annotations

from collections.abc import Iterator

from ._case import CLEARLY, Case, switches
from ._results import Arm, Finding
from ._text import duration

_HTTP = 0.002  # seconds that a request may cost beside the call


def server_cost(case: Case) -> Iterator[Finding]:
    """Whether the usual servers are slower than the script or the runner, without a known sign."""
    script, runner = case.arms.get("script"), case.arms.get("runner")
    servers = [arm for key in ("def", "executor", "async-def") if (arm := case.arms.get(key))]
    if script is None or not servers:
        return
    worst = min(servers, key=lambda arm: arm.calls_per_second)
    if case.machine.noisy:
        yield _undecided(case, script, worst)
    elif runner and runner.calls_per_second >= CLEARLY * worst.calls_per_second:
        yield _runner_helps(case, script, worst, runner)
    else:
        yield from _runner_slower(case, runner)
        yield from _against_script(case, script, worst, runner)


def _against_script(case: Case, script: Arm, worst: Arm, runner: Arm | None) -> Iterator[Finding]:
    overhead = 1 / worst.calls_per_second - 1 / script.calls_per_second
    if script.calls_per_second <= CLEARLY * worst.calls_per_second:
        yield _healthy(case, script, worst)
    elif overhead >= _HTTP:
        yield _slower(case, script, worst)
    elif runner is None or worst.calls_per_second < CLEARLY * runner.calls_per_second:
        yield _http(case, overhead)


# -- the runner --------------------------------------------------------------------------------


def _runner_helps(case: Case, script: Arm, worst: Arm, runner: Arm) -> Finding:
    return Finding(
        key="runner-helps",
        severity="advice",
        headline=f"the runner does {runner.calls_per_second / worst.calls_per_second:.1f}x of "
        f"what the model does in the {worst.title}",
        detail=f"{_speeds(script, worst, runner)}. No sign that the doctor knows says why. "
        f"{_work(case, script, worst)}",
        lines=case.subject.application(),
    )


def _runner_slower(case: Case, runner: Arm | None) -> Iterator[Finding]:
    usual = case.arms.get("def")
    if not usual or not runner or usual.calls_per_second < CLEARLY * runner.calls_per_second:
        return
    if case.subject.clients > 1:
        why = (
            "The server's threads made several calls side by side; on the runner they queue for "
            "its one thread. That costs where one call leaves CPUs idle. Let a call use them "
            "(more native threads, several inputs in one call), mount several runners, or stay "
            "with def: here it is right."
        )
    else:
        why = (
            "One client called at a time, so that nothing had to queue: measure again with "
            "--seconds 10. If it stays so, stay with def: here it is right."
        )
    yield Finding(
        key="runner-slower",
        severity="advice",
        headline=f"the {usual.title} is "
        f"{usual.calls_per_second / runner.calls_per_second:.1f}x as fast as the runner",
        detail=f"{_speeds(usual, runner)}. {why}",
    )


# -- the usual servers -------------------------------------------------------------------------


def _undecided(case: Case, script: Arm, worst: Arm) -> Finding:
    return Finding(
        key="undecided",
        severity="advice",
        headline="whether the server is the cause can't be told: others use the machine",
        detail=f"{_switches(case, script, worst)}Which of them is faster can only be measured "
        "when nothing else runs.",
    )


def _healthy(case: Case, script: Arm, worst: Arm) -> Finding:
    return Finding(
        key="healthy",
        severity="fine",
        headline=f"the server is not the cause: {worst.calls_per_second:.1f} calls/s "
        f"({worst.title}), {script.calls_per_second:.1f} in the script",
        detail=f"{_switches(case, script, worst)}If the application is slow all the same, look "
        "at what it does around the call: decoding and validating requests, serialising "
        "answers, other calls at the same time (try --clients).",
    )


def _http(case: Case, overhead: float) -> Finding:
    return Finding(
        key="http",
        severity="fine",
        headline=f"a request costs {duration(overhead)} beside the call, which takes "
        f"{duration(case.call)}",
        detail="That is the price of HTTP and of the way through the application, and about the "
        "same for every model. Where calls are so short that it matters, answer several in one "
        "request.",
    )


def _slower(case: Case, script: Arm, worst: Arm) -> Finding:
    return Finding(
        key="slower",
        severity="advice",
        headline=f"{worst.title} is {script.calls_per_second / worst.calls_per_second:.1f}x "
        "slower than the script, and no known sign says why",
        detail=f"{_speeds(script, worst)}. {_work(case, script, worst)}",
    )


# -- in words ----------------------------------------------------------------------------------


def _speeds(*arms: Arm) -> str:
    return ", ".join(f"{arm.calls_per_second:.1f} calls/s ({arm.title})" for arm in arms)


def _switches(case: Case, *arms: Arm) -> str:
    return f"{switches(*arms)} " if case.machine.counted else ""


def _work(case: Case, script: Arm, worst: Arm) -> str:
    """Whether the model works more than in the script, or waits."""
    if not case.machine.counted:
        return "Look at it with py-spy dump --native."
    cpu, usual = (arm.cpu_seconds / max(1, arm.calls) for arm in (worst, script))
    if cpu > CLEARLY * usual:
        why = (
            "the model works more for the same result. Threads that spin or fight for the "
            "caches, or the clients on the same CPUs, do that; try fewer threads."
        )
    else:
        why = (
            "the model waits. For a lock of its own, for the GIL, or for other callers; look at "
            "it with py-spy dump --native."
        )
    return f"A call uses {duration(cpu)} of CPU time there, {duration(usual)} in the script: {why}"
