"""What the thread sweep says: speeds decide, so nothing on a noisy machine."""

from __future__ import annotations

from collections.abc import Iterator

from ._case import DIFFERENCE, Case
from ._figures import counted
from ._results import Arm, Finding

_MUCH_LESS = 0.7
_BUSY_WITH_ONE = 1.6  # CPUs, of a runner that was to have one native thread


def thread_count(case: Case) -> Iterator[Finding]:
    """Whether another number of native threads does better."""
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
    if gain >= DIFFERENCE:
        yield Finding(
            key="threads",
            severity="advice",
            headline=f"{counted(best, 'native thread')} instead of {case.subject.threads}: "
            f"{gain:.2f}x",
            detail=f"{_sweep(case.sweep)}. More threads than the model can use wait for each "
            "other; threads that share a core slow each other down.",
            lines=_policy(case, best),
        )
    else:
        yield from _spinning(case, usual)


def _spinning(case: Case, usual: float) -> Iterator[Finding]:
    """Fewer threads that do as much: the others only spin."""
    default = case.sweep[case.subject.threads]
    as_fast = [
        count
        for count, arm in case.sweep.items()
        if count < case.subject.threads
        and arm.calls_per_second * DIFFERENCE >= usual
        and arm.cores_used <= _MUCH_LESS * default.cores_used
    ]
    if as_fast:
        fewest = min(as_fast)
        yield Finding(
            key="spinning",
            severity="advice",
            headline=f"{counted(fewest, 'native thread')} as fast as {case.subject.threads}, on "
            f"{case.sweep[fewest].cores_used:.1f} CPUs instead of {default.cores_used:.1f}",
            detail=f"{_sweep(case.sweep)}. The other threads burn CPU while they wait for work: "
            "left out, it goes to the event loop, or to another worker.",
            lines=_policy(case, fewest),
        )


def _does_not_follow(sweep: dict[int, Arm]) -> bool:
    return 1 in sweep and sweep[1].cores_used > _BUSY_WITH_ONE


def _elsewhere(case: Case) -> Finding:
    return Finding(
        key="threads-elsewhere",
        severity="advice",
        headline=f"NativePolicy(threads=1) leaves {case.sweep[1].cores_used:.1f} CPUs busy: the "
        f"library takes its thread count elsewhere",
        detail=f"{_sweep(case.sweep)}. NativePolicy sets the count of OpenMP runtimes and of "
        "OpenBLAS. Others have an option of their own, such as intra_op_num_threads of ONNX "
        "Runtime's SessionOptions: give it thread_count() where the model is loaded. MKL takes "
        "its count from the environment: asgi-infer run --threads.",
        lines=(
            "from asgi_infer.native import thread_count",
            "options.intra_op_num_threads = thread_count()",
        ),
    )


def _sweep(sweep: dict[int, Arm]) -> str:
    figures = (
        f"{count}: {arm.calls_per_second:.1f} calls/s on {arm.cores_used:.1f} CPUs"
        for count, arm in sorted(sweep.items())
    )
    return f"Threads: {'; '.join(figures)}"


def _policy(case: Case, threads: int) -> tuple[str, ...]:
    return ("from asgi_infer import NativePolicy", case.subject.runner(threads=threads))
