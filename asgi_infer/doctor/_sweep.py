"""What the thread sweep says: speeds decide, so nothing on a noisy machine."""

from __future__ import annotations

from collections.abc import Iterator

from ._case import DIFFERENCE, Case
from ._results import Arm, Finding
from ._text import plural

_FASTER = 1.15  # each number is measured once, for a short while, beside the clients
_MUCH_LESS = 0.7
_BUSY_WITH_ONE = 1.6  # CPUs, of a model that was to have one native thread

_MEASURE_AGAIN = "Each was measured once: before you rely on it, measure again with --seconds 10."


def thread_count(case: Case) -> Iterator[Finding]:
    """Whether another number of native threads does better."""
    default = case.sweep.get(case.subject.threads)
    if case.machine.noisy or default is None or len(case.sweep) < 2:
        return
    # The default is measured twice, at different moments: what beats both beats it.
    runner = case.arms.get("runner", default)
    usual = max(default.calls_per_second, runner.calls_per_second)
    best = max(case.sweep, key=lambda count: case.sweep[count].calls_per_second)
    gain = case.sweep[best].calls_per_second / usual
    if gain >= _FASTER:
        yield _threads(case, best, gain)
    elif case.machine.counted:
        yield from _spinning(case, default, usual)
    if case.machine.counted:
        yield from _elsewhere(case)


def _threads(case: Case, best: int, gain: float) -> Finding:
    return Finding(
        key="threads",
        severity="advice",
        headline=f"{plural(best, 'native thread')} instead of {case.subject.threads}: {gain:.2f}x",
        detail=f"{_sweep(case)}. More threads than the model can use wait for each other; "
        f"threads that share a core slow each other down. {_MEASURE_AGAIN}",
        lines=case.subject.policy(threads=best),
    )


def _spinning(case: Case, default: Arm, usual: float) -> Iterator[Finding]:
    """Fewer threads that do as much: the others only spin."""
    as_fast = [
        count
        for count, arm in case.sweep.items()
        if count < case.subject.threads
        and default.model_cores_used > 1  # or there is hardly anything to save
        and arm.calls_per_second * DIFFERENCE >= usual
        and arm.model_cores_used <= _MUCH_LESS * default.model_cores_used
    ]
    if as_fast:
        fewest = min(as_fast)
        yield Finding(
            key="spinning",
            severity="advice",
            headline=f"{plural(fewest, 'native thread')} as fast as {case.subject.threads}, on "
            f"{case.sweep[fewest].model_cores_used:.1f} CPUs instead of "
            f"{default.model_cores_used:.1f}",
            detail=f"{_sweep(case)}. The other threads burn CPU while they wait for work: left "
            f"out, it goes to the event loop, or to another worker. {_MEASURE_AGAIN}",
            lines=case.subject.policy(threads=fewest),
        )


def _elsewhere(case: Case) -> Iterator[Finding]:
    """A model that keeps several CPUs busy with what was to be one thread."""
    one = case.sweep.get(1)
    if one is None or one.model_cores_used <= _BUSY_WITH_ONE:
        return
    onnx = case.has("ONNX Runtime")
    option = "intra_op_num_threads of ONNX Runtime's SessionOptions" if onnx else "an argument"
    yield Finding(
        key="threads-elsewhere",
        severity="advice",
        headline=f"NativePolicy(threads=1) leaves {one.model_cores_used:.1f} CPUs busy: the "
        f"library takes its thread count elsewhere",
        detail=f"{_sweep(case)}. NativePolicy sets the count of OpenMP runtimes and of OpenBLAS. "
        f"Other libraries have a setting of their own ({option}, a function, or the "
        "environment): give it thread_count() where the model is loaded, or start the server "
        "with asgi-infer run --threads.",
        lines=(
            "from asgi_infer.native import thread_count",
            "options.intra_op_num_threads = thread_count()",
        )
        if onnx
        else (),
    )


def _sweep(case: Case) -> str:
    figures = (
        f"{count}: {arm.calls_per_second:.1f} calls/s"
        + (f" on {arm.model_cores_used:.1f} CPUs" if case.machine.counted else "")
        for count, arm in sorted(case.sweep.items())
    )
    return f"Threads: {'; '.join(figures)}"
