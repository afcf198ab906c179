"""What is said of the server itself, where no sign says that it harms the model."""

from __future__ import annotations

from collections.abc import Iterator

from ._case import Case, duration
from ._results import Arm, Finding

_SLOWER = 1.25  # what clients on the same CPUs cost stays below
_HTTP = 0.002  # seconds that a request may cost beside the call


def server_cost(case: Case) -> Iterator[Finding]:
    """Whether the usual servers are slower than the script, where no sign says why."""
    script = case.arms.get("script")
    servers = [arm for key in ("def", "executor", "async-def") if (arm := case.arms.get(key))]
    if script is None or not servers:
        return
    worst = min(servers, key=lambda arm: arm.calls_per_second)
    slower = script.calls_per_second / worst.calls_per_second
    overhead = 1 / worst.calls_per_second - 1 / script.calls_per_second
    if case.machine.noisy:
        yield _healthy(script, worst, "nothing says that the server is the cause")
    elif slower <= _SLOWER:
        speeds = f"{worst.calls_per_second:.1f} calls/s ({worst.title}), "
        speeds += f"{script.calls_per_second:.1f} in the script"
        yield _healthy(script, worst, f"the server is not the cause: {speeds}")
    elif overhead < _HTTP:
        yield _http(case, overhead)
    else:
        yield _slower(script, worst, slower)


def _healthy(script: Arm, worst: Arm, headline: str) -> Finding:
    return Finding(
        key="healthy",
        severity="fine",
        headline=headline,
        detail="The model's threads do not sleep more than in the script "
        f"({worst.switches_per_call:.1f} and {script.switches_per_call:.1f} times per call). If "
        "the application is slow all the same, look at what it does around the call: decoding "
        "and validating requests, serialising answers, other calls at the same time (try "
        "--clients).",
    )


def _http(case: Case, overhead: float) -> Finding:
    return Finding(
        key="http",
        severity="fine",
        headline=f"a request costs {duration(overhead)} beside the call, which takes "
        f"{duration(case.call)}",
        detail="That is the price of HTTP and of the way through the application, and it is the "
        "same for every model. Where calls are as short as this, answer several in one request.",
    )


def _slower(script: Arm, worst: Arm, slower: float) -> Finding:
    cpu, usual = (arm.cpu_seconds / max(1, arm.calls) for arm in (worst, script))
    if cpu > _SLOWER * usual:
        why = (
            "the model works more for the same result. Threads that spin or fight for the "
            "caches, or the clients on the same CPUs, do that; try fewer threads."
        )
    else:
        why = (
            "the model waits. For a lock of its own, for the GIL, or for other callers; look at "
            "it with py-spy dump --native."
        )
    return Finding(
        key="slower",
        severity="advice",
        headline=f"{worst.title} is {slower:.1f}x slower than the script, and no known sign "
        "says why",
        detail=f"A call uses {duration(cpu)} of CPU time there and {duration(usual)} "
        f"in the script: {why}",
    )
