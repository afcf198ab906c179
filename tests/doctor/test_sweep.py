"""Facts about the thread sweep: what is faster, what only spins, and what does not follow."""

from __future__ import annotations

import pytest

from asgi_infer.doctor._results import Arm
from asgi_infer.doctor._sweep import thread_count

from .figures import NOISY, arm, case


def threads(count: int, calls: int, cores: float) -> Arm:
    """A step of the sweep."""
    return arm(f"threads-{count}", calls=calls, cores=cores)


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
    "one is as fast": ([threads(1, 99, 1.0), threads(2, 100, 2.0)], ["spinning"]),
    "one is as fast, on as many CPUs": ([threads(1, 99, 1.5), threads(2, 100, 2.0)], []),
    "more are as fast": (
        [threads(1, 60, 1.0), threads(2, 100, 2.0), threads(3, 101, 2.0)],
        [],
    ),
    "one leaves two CPUs busy": (
        [threads(1, 100, 1.9), threads(2, 100, 2.0)],
        ["threads-elsewhere"],
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


def test_lines() -> None:
    """The number stands in the line that makes the runner, and the figures in the detail."""
    (finding,) = thread_count(case(*FASTER))
    assert finding.headline == "1 native thread instead of 2: 1.50x"
    assert "native=NativePolicy(threads=1)" in finding.lines[1]
    assert finding.detail.startswith("Threads: 1: 150.0 calls/s on 1.0 CPUs; 2: 100.0 calls/s")
