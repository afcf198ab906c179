"""Facts about the verdict: each cause is found from its figures, and nothing else is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from asgi_infer.doctor._results import Arm, Finding, Machine
from asgi_infer.doctor._verdict import failed, findings

from .figures import NOISY, QUIET, SUBJECT, arm

ROOT = Path(__file__).parents[2]

SOURCES = ("_verdict.py", "_sweep.py", "_overhead.py")

SCRIPT, RUNNER = arm("script"), arm("runner", calls=96)


def keys(*arms: Arm, machine: Machine = QUIET, failures: tuple[Finding, ...] = ()) -> list[str]:
    """What is found."""
    return [finding.key for finding in verdict(*arms, machine=machine, failures=failures)]


def verdict(
    *arms: Arm, machine: Machine = QUIET, failures: tuple[Finding, ...] = ()
) -> tuple[Finding, ...]:
    """All that is found."""
    sweep = [each for each in arms if each.key.startswith("threads-")]
    others = [each for each in arms if each not in sweep]
    return findings(SUBJECT, machine, others, sweep, failures)


THROTTLED = arm("def", calls=24, sleeps=1313, cores=1.0)
BLOCKED = arm("async-def", health=0.4, call=0.4, calls=3)
LONG = arm("script", call=0.3, calls=3)

CASES: dict[str, tuple[list[Arm], list[str]]] = {
    "all is well": ([SCRIPT, arm("def"), arm("async-def"), arm("executor"), RUNNER], ["healthy"]),
    "only the runner": ([RUNNER], []),
    "nothing at all": ([], []),
    "two pools": ([SCRIPT, THROTTLED, RUNNER], ["two-pools"]),
    "two pools, by the executor": (
        [SCRIPT, arm("def"), arm("executor", sleeps=1200), RUNNER],
        ["two-pools"],
    ),
    "two pools, no script, no runner": ([THROTTLED], ["two-pools"]),
    "it sleeps on the runner too": (
        [SCRIPT, THROTTLED, arm("runner", calls=24, sleeps=1200)],
        ["sleeps-everywhere"],
    ),
    "it sleeps in the script, not much more in the server": (
        [arm("script", sleeps=30), arm("def", sleeps=200), RUNNER],
        ["already-sleeping", "healthy"],
    ),
    "it sleeps in the script as well": (
        [arm("script", sleeps=500), arm("def", sleeps=600), RUNNER],
        ["already-sleeping", "healthy"],
    ),
    "a long call that sleeps now and then": (
        [arm("script", sleeps=30, call=0.3, calls=3), arm("def", sleeps=40, call=0.3, calls=3)],
        ["healthy"],
    ),
    "the loop is blocked": (
        [LONG, BLOCKED, arm("runner", call=0.3, calls=3)],
        ["loop-blocked", "healthy"],
    ),
    "the loop is blocked, no runner": ([LONG, BLOCKED], ["loop-blocked", "healthy"]),
    "a short call blocks the loop, unnoticed": (
        [SCRIPT, arm("async-def", health=0.012), RUNNER],
        ["healthy"],
    ),
    "the GIL is held": (
        [LONG, BLOCKED, arm("runner", call=0.3, calls=3, health=0.28)],
        ["holds-gil"],
    ),
    "some requests are late on the runner": (
        [LONG, arm("runner", call=0.3, calls=3, health=0.04)],
        [],
    ),
    "the quota runs out": ([SCRIPT, arm("def", throttled_periods=9)], ["quota"]),
    "page faults": (
        [arm("runner", faults=9000, calls=90), arm("runner-retain", faults=10, calls=140)],
        ["page-faults"],
    ),
    "page faults that cost nothing": (
        [arm("runner", faults=9000, calls=90), arm("runner-retain", faults=10, calls=91)],
        [],
    ),
    "page faults that stay": (
        [arm("runner", faults=9000, calls=90), arm("runner-retain", faults=8000, calls=140)],
        [],
    ),
    "faster, but not for fewer faults": (
        [arm("runner", faults=10, calls=90), arm("runner-retain", faults=1, calls=140)],
        [],
    ),
    "another number of threads": (
        [RUNNER, arm("threads-1", calls=150, cores=1.0), arm("threads-2")],
        ["threads"],
    ),
    "HTTP itself": ([arm("script", calls=9000), arm("def", calls=1000)], ["http"]),
    "slower for no reason": ([SCRIPT, arm("def", calls=50)], ["slower"]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name: str) -> None:
    """Each cause is found from its figures alone, and a server that costs nothing is cleared."""
    arms, found = CASES[name]
    assert keys(*arms) == found


NOISY_CASES: dict[str, tuple[list[Arm], list[str]]] = {
    "two pools": ([SCRIPT, THROTTLED, RUNNER], ["noise", "two-pools"]),
    "slower": ([SCRIPT, arm("def", calls=50)], ["noise", "healthy"]),
    "sleeps for want of a CPU": (
        [arm("script", calls=3, sleeps=80), arm("def", calls=3, sleeps=90), RUNNER],
        ["noise", "healthy"],
    ),
    "two pools, and a script and a runner without a CPU": (
        [arm("script", calls=3, sleeps=80), THROTTLED, arm("runner", calls=3, sleeps=80)],
        ["noise", "two-pools"],
    ),
    "threads": ([RUNNER, arm("threads-1", calls=150, cores=1.0), arm("threads-2")], ["noise"]),
    "page faults that cost something": (
        [arm("runner", faults=900, calls=90), arm("runner-retain", calls=20)],
        ["noise", "page-faults"],
    ),
    "page faults that cost little": (
        [arm("runner", faults=150, calls=90), arm("runner-retain", calls=140)],
        ["noise"],
    ),
}


@pytest.mark.parametrize("name", NOISY_CASES)
def test_what_is_found_on_a_noisy_machine(name: str) -> None:
    """The noise comes first; then counts decide, and nothing rests on speeds alone."""
    arms, found = NOISY_CASES[name]
    assert keys(*arms, machine=NOISY) == found


def headline(*arms: Arm, machine: Machine = QUIET) -> str:
    """Of the finding that matters most."""
    return verdict(*arms, machine=machine)[0].headline


def test_two_pools_are_told_with_their_figures() -> None:
    """The sleeps of the worst arm, and how much faster the runner is where times can be told."""
    assert headline(SCRIPT, THROTTLED, RUNNER) == (
        "two OpenMP pools: 1313 sleeps per call; load the model on the runner: 4.0x"
    )
    told = verdict(SCRIPT, THROTTLED, RUNNER, machine=NOISY)[1].headline
    assert told == "two OpenMP pools: 1313 sleeps per call; load the model on the runner"
    without = replace(QUIET, runtimes=())
    assert headline(THROTTLED, machine=without).startswith("two native thread pools: 1313 sleeps")


def test_two_pools_are_cured_by_lines() -> None:
    """The lines to write name the user's model."""
    (finding,) = verdict(SCRIPT, THROTTLED, RUNNER)
    assert "runner = InferenceRunner(Model, warmup=lambda model: model.predict(sample))" in (
        finding.lines
    )
    assert "1313.0 (def), 0.0 (runner)" in finding.detail


@pytest.mark.parametrize(("quota", "threads"), [(1.5, 1), (0.5, 1), (None, 2)])
def test_the_quota_says_how_many_threads(quota: float | None, threads: int) -> None:
    """As many as it pays for, one at the least; the usual number where it is not known."""
    machine = replace(QUIET, quota=quota)
    (finding,) = verdict(SCRIPT, arm("def", throttled_periods=9), machine=machine)
    assert f"NativePolicy(threads={threads})" in finding.lines[0]
    assert ("quota of 1.5 ran out 9 times in 1.0 s (def)" in finding.headline) == (quota == 1.5)


def test_the_runner_frees_the_loop() -> None:
    """The waits in the loop and on the runner are told side by side."""
    told = headline(LONG, BLOCKED, arm("runner", call=0.3, calls=3, health=0.002))
    assert told == "async def blocks the event loop: /health waits 400 ms, on the runner 2 ms"


def test_memory_is_kept_by_a_line() -> None:
    """The gain is told where times can be, and the line is complete."""
    before, after = arm("runner", faults=9000, calls=90), arm("runner-retain", calls=135)
    (finding,) = verdict(before, after)
    assert finding.headline == "9000 page faults per call: keep freed memory: 1.50x"
    assert finding.lines[1].endswith("native=NativePolicy(retain_memory=True))")


def test_slower_says_whether_the_model_works_or_waits() -> None:
    """More CPU seconds for a call are work; as many, and more time, are waiting."""
    (waits,) = verdict(SCRIPT, arm("def", calls=50, cores=1.0))
    (works,) = verdict(SCRIPT, arm("def", calls=50, cores=2.0))
    assert "the model waits" in waits.detail
    assert "the model works more" in works.detail


def test_what_failed_comes_after_what_was_found() -> None:
    """An arm that could not be measured is a problem, but no cause; it hides no verdict."""
    failure = failed("def endpoint", "the process was killed by SIGSEGV")
    assert failure.headline == "def endpoint: the process was killed by SIGSEGV"
    assert keys(SCRIPT, arm("executor", sleeps=900), RUNNER, failures=(failure,)) == [
        "two-pools",
        "failed",
    ]
    assert keys(SCRIPT, arm("executor"), RUNNER, failures=(failure,)) == ["failed", "healthy"]


def test_every_finding_is_documented() -> None:
    """The table of findings has a row for each that the code can come to, and no other."""
    sources = [ROOT / "asgi_infer" / "doctor" / name for name in SOURCES]
    known = {
        key for source in sources for key in re.findall(r'key="([\w-]+)"', source.read_text())
    }
    page = (ROOT / "docs" / "how-to" / "doctor.md").read_text()
    table = page.partition("## What it finds")[2].partition("##")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)) == known
