"""Facts about the thread sweep: what is faster, what only spins, and what does not follow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asgi_infer.doctor._results import Arm
from asgi_infer.doctor._sweep import thread_count

from .figures import NOISY, QUIET, SUBJECT, arm, case


def threads(count: int, calls: int, cores: float, **figures: float) -> Arm:
    """A step of the sweep."""
    return arm(f"threads-{count}", calls=calls, cores=cores, **figures)


FASTER = [threads(1, 150, 1.0), threads(2, 100, 2.0)]
CASES: dict[str, tuple[list[Arm], list[str]]] = {
    "the usual number is best": ([threads(1, 60, 1.0), threads(2, 100, 2.0)], []),
    "one is faster": (FASTER, ["threads"]),
    "one is faster than one of two measurements": (
        [*FASTER, arm("runner", calls=150)],
        ["spinning"],
    ),
    "more are faster": (
        [threads(1, 60, 1.0), threads(2, 100, 2.0), threads(3, 120, 3.0)],
        ["threads"],
    ),
    "more are faster, no more than one measurement varies": (
        [threads(1, 60, 1.0), threads(2, 100, 2.0), threads(3, 112, 3.0)],
        [],
    ),
    "one is as fast": ([threads(1, 99, 1.0), threads(2, 100, 2.0)], ["spinning"]),
    "one is as fast, on as many CPUs": ([threads(1, 99, 1.5), threads(2, 100, 2.0)], []),
    "one is as fast, the event loop is as busy": (
        [
            threads(1, 100, 1.9, model_cpu_seconds=1.0),
            threads(2, 100, 2.0, model_cpu_seconds=1.9),
        ],
        ["spinning"],
    ),
    "more are as fast": (
        [threads(1, 60, 1.0), threads(2, 100, 2.0), threads(3, 101, 2.0)],
        [],
    ),
    "one leaves two CPUs busy": (
        [threads(1, 100, 1.9), threads(2, 100, 2.0)],
        ["threads-elsewhere"],
    ),
    "one leaves two CPUs busy, and is faster": (
        [threads(1, 150, 1.9), threads(2, 100, 2.0)],
        ["threads", "threads-elsewhere"],
    ),
    "one leaves a busy loop": (
        [threads(1, 60, 1.9, model_cpu_seconds=1.0), threads(2, 100, 2.0)],
        [],
    ),
    "the usual number was not measured": ([threads(1, 100, 1.0), threads(3, 10, 2.0)], []),
    "the usual number alone": ([threads(2, 100, 2.0)], []),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name: str) -> None:
    """A better number is one that beats the usual one wherever that was measured."""
    arms, found = CASES[name]
    assert [finding.key for finding in thread_count(case(*arms))] == found


def test_nothing_on_a_noisy_machine() -> None:
    """Speeds alone decide here, so noise leaves nothing."""
    assert list(thread_count(case(*FASTER, machine=NOISY))) == []


UNCOUNTED = replace(QUIET, counted=False)


def test_speeds_alone() -> None:
    """Where CPUs are not counted, a faster number is found, and nothing is said of CPUs."""
    (finding,) = thread_count(case(threads(1, 150, 0.0), threads(2, 100, 0.0), machine=UNCOUNTED))
    assert finding.detail.startswith("Threads: 1: 150.0 calls/s; 2: 100.0 calls/s. ")
    as_fast = case(threads(1, 100, 0.0), threads(2, 100, 0.0), machine=UNCOUNTED)
    assert list(thread_count(as_fast)) == []


@pytest.mark.parametrize("name", ["one is faster", "one is as fast"])
def test_lines(name: str) -> None:
    """The number stands in the lines, which are complete, and another look is asked for."""
    (finding,) = thread_count(case(*CASES[name][0]))
    assert finding.lines == SUBJECT.policy(threads=1)
    assert "measure again with --seconds 10" in finding.detail


def test_figures() -> None:
    """The gain is told, and where it was measured."""
    (finding,) = thread_count(case(*FASTER))
    assert finding.headline == "1 native thread instead of 2: 1.50x"
    assert finding.detail.startswith("Threads: 1: 150.0 calls/s on 1.0 CPUs; 2: 100.0 calls/s")


@pytest.mark.parametrize("runtimes", [("libgomp (torch)",), ("ONNX Runtime (onnxruntime)",)])
def test_options_of_the_library_that_is_there(runtimes: tuple[str, ...]) -> None:
    """ONNX Runtime's option is named only where that is loaded."""
    arms = CASES["one leaves two CPUs busy"][0]
    (finding,) = thread_count(case(*arms, machine=replace(QUIET, runtimes=runtimes)))
    onnx = "ONNX" in runtimes[0]
    assert ("options.intra_op_num_threads = thread_count()" in finding.lines) == onnx
    assert ("ONNX" in finding.detail) == onnx
