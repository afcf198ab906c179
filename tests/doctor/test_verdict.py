"""Facts about the verdict: each cause is found from its figures, and nothing else is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from asgi_infer.doctor._results import Arm, Finding, Machine
from asgi_infer.doctor._verdict import failed, findings

from .figures import NOISY, POOL, QUIET, SUBJECT, arm

ROOT = Path(__file__).parents[2]

SOURCES = ("_verdict.py", "_sweep.py", "_overhead.py")

NO_OPENMP = replace(QUIET, runtimes=("OpenBLAS (numpy)",))
NO_POOL = replace(QUIET, runtimes=())
UNCOUNTED = replace(QUIET, counted=False)

SCRIPT, RUNNER = arm("script"), arm("runner", calls=96)


def keys(*arms: Arm, machine: Machine = QUIET, clients: int = 1) -> list[str]:
    """What is found."""
    return [finding.key for finding in verdict(*arms, machine=machine, clients=clients)]


def verdict(
    *arms: Arm,
    machine: Machine = QUIET,
    clients: int = 1,
    failures: tuple[Finding, ...] = (),
) -> tuple[Finding, ...]:
    """All that is found."""
    sweep = [each for each in arms if each.native_threads]
    others = [each for each in arms if each not in sweep]
    return findings(replace(SUBJECT, clients=clients), machine, others, sweep, failures)


THROTTLED = arm("def", calls=24, sleeps=1313, cores=1.0)
BLOCKED = arm("async-def", health=0.4, call=0.4, calls=3)
LONG = arm("script", call=0.3, calls=3)

LONG_RUNNER = arm("runner", call=0.3, calls=3)
SLEEPING = arm("script", sleeps=500, threads=POOL)
FAULTS = arm("runner", faults=9000, calls=90)

Cases = dict[str, tuple[list[Arm], list[str]]]

CASES: Cases = {
    "all is well": ([SCRIPT, arm("def"), arm("async-def"), arm("executor"), RUNNER], ["healthy"]),
    "only the runner": ([RUNNER], ["incomplete"]),
    "only the script": ([SCRIPT], []),
    "nothing at all": ([], ["incomplete"]),
    "two pools": ([SCRIPT, THROTTLED, RUNNER], ["two-pools"]),
    "two pools, by the executor": (
        [SCRIPT, arm("def"), arm("executor", sleeps=1200), RUNNER],
        ["two-pools"],
    ),
    "two pools, no script, no runner": ([THROTTLED], ["two-pools", "incomplete"]),
    "it sleeps on the runner too": (
        [SCRIPT, THROTTLED, arm("runner", calls=24, sleeps=1200)],
        ["sleeps-everywhere"],
    ),
    "it sleeps in the script, not much more in the server": (
        [arm("script", sleeps=30), arm("def", sleeps=200), RUNNER],
        ["healthy"],
    ),
    "it hands over in the script, on busy CPUs, and sleeps as often in the server": (
        [arm("script", sleeps=19), arm("def", sleeps=150), RUNNER],
        ["healthy"],
    ),
    "it sleeps in the script as well": (
        [SLEEPING, arm("def", sleeps=600), RUNNER],
        ["already-sleeping", "healthy"],
    ),
    "it sleeps in the script, on one thread": (
        [arm("script", sleeps=500, threads=POOL[:1]), arm("def", sleeps=600), RUNNER],
        ["healthy"],
    ),
    "it sleeps in the script, on threads of Python's": (
        [arm("script", sleeps=500, threads=POOL[:1] * 2), arm("def", sleeps=600), RUNNER],
        ["healthy"],
    ),
    "a long call that sleeps now and then": (
        [arm("script", sleeps=30, call=0.3, calls=3), arm("def", sleeps=40, call=0.3, calls=3)],
        ["healthy"],
    ),
    "the loop is blocked": ([LONG, BLOCKED, LONG_RUNNER], ["loop-blocked", "healthy"]),
    "the loop is blocked, no runner": ([LONG, BLOCKED], ["loop-blocked", "healthy"]),
    "a short call blocks the loop, unnoticed": (
        [SCRIPT, arm("async-def", health=0.012), RUNNER],
        ["healthy"],
    ),
    "the GIL is held": (
        [LONG, BLOCKED, arm("runner", call=0.3, calls=3, health=0.28)],
        ["holds-gil"],
    ),
    "the GIL is held in short calls": ([SCRIPT, arm("runner", health=0.009)], ["holds-gil"]),
    "the GIL is held in calls that nobody notices": (
        [arm("script", calls=500), arm("runner", calls=500, health=0.0015)],
        [],
    ),
    "the loop waits for longer than a call": ([SCRIPT, arm("runner", health=0.016)], []),
    "a few requests are late on the runner": (
        [SCRIPT, replace(RUNNER, health=(0.001,) * 48 + (0.009,) * 2)],
        [],
    ),
    "all requests are a little late on the runner": (
        [LONG, arm("runner", call=0.3, calls=3, health=0.04)],
        [],
    ),
    "the quota runs out": ([SCRIPT, arm("def", throttled_periods=9)], ["quota"]),
    "the quota runs out once": ([SCRIPT, arm("def", throttled_periods=1)], ["healthy"]),
    "the quota runs out now and then": (
        [SCRIPT, arm("def", throttled_periods=2, seconds=5.0, calls=500)],
        ["healthy"],
    ),
    "page faults": (
        [SCRIPT, FAULTS, arm("runner-retain", faults=10, calls=140)],
        ["page-faults"],
    ),
    "page faults that make no difference": (
        [SCRIPT, FAULTS, arm("runner-retain", faults=10, calls=91)],
        [],
    ),
    "page faults that cost little, beside what varies": (
        [
            SCRIPT,
            arm("runner", faults=150, calls=90),
            arm("runner-retain", faults=10, calls=140),
        ],
        [],
    ),
    "page faults that stay": (
        [SCRIPT, FAULTS, arm("runner-retain", faults=8000, calls=140)],
        [],
    ),
    "faster, but not for fewer faults": (
        [SCRIPT, arm("runner", faults=10, calls=90), arm("runner-retain", faults=1, calls=140)],
        [],
    ),
    "another number of threads": (
        [SCRIPT, RUNNER, arm("threads-1", calls=150, cores=1.0), arm("threads-2")],
        ["threads"],
    ),
    "the runner helps": ([SCRIPT, arm("def", calls=50), RUNNER], ["runner-helps"]),
    "the runner helps a short call": (
        [arm("script", calls=9000), arm("def", calls=1000), arm("runner", calls=2000)],
        ["runner-helps"],
    ),
    "the runner helps a little": (
        [SCRIPT, arm("def", calls=60), arm("runner", calls=70)],
        ["slower"],
    ),
    "the runner is slower": (
        [SCRIPT, arm("def", calls=130), RUNNER],
        ["runner-slower", "healthy"],
    ),
    "HTTP itself": ([arm("script", calls=9000), arm("def", calls=1000)], ["http"]),
    "HTTP itself, on the runner too": (
        [arm("script", calls=9000), arm("def", calls=1000), arm("runner", calls=900)],
        ["http"],
    ),
    "HTTP is not all that the runner pays": (
        [arm("script", calls=9000), arm("def", calls=1000), arm("runner", calls=500)],
        ["runner-slower"],
    ),
    "slower for no reason": ([SCRIPT, arm("def", calls=50)], ["slower"]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name: str) -> None:
    """Each cause is found from its figures alone, and a server that costs nothing is cleared."""
    arms, found = CASES[name]
    assert keys(*arms) == found


NOISY_CASES: Cases = {
    "two pools": ([SCRIPT, THROTTLED, RUNNER], ["noise", "two-pools"]),
    "slower": ([SCRIPT, arm("def", calls=50)], ["noise", "undecided"]),
    "the runner is faster": ([SCRIPT, arm("def", calls=50), RUNNER], ["noise", "undecided"]),
    "the runner is slower": ([SCRIPT, arm("def", calls=150), RUNNER], ["noise", "undecided"]),
    "the loop waits": ([LONG, BLOCKED, LONG_RUNNER], ["noise", "undecided"]),
    "all wait": ([LONG, arm("runner", call=0.3, calls=3, health=0.28)], ["noise"]),
    "sleeps for want of a CPU": (
        [arm("script", calls=3, sleeps=80), arm("def", calls=3, sleeps=90), RUNNER],
        ["noise", "undecided"],
    ),
    "two pools, and a script and a runner without a CPU": (
        [arm("script", calls=3, sleeps=80), THROTTLED, arm("runner", calls=3, sleeps=80)],
        ["noise", "two-pools"],
    ),
    "threads": (
        [SCRIPT, RUNNER, arm("threads-1", calls=150, cores=1.0), arm("threads-2")],
        ["noise"],
    ),
    "page faults that cost something": (
        [SCRIPT, arm("runner", faults=900, calls=90), arm("runner-retain", calls=20)],
        ["noise", "page-faults"],
    ),
    "page faults that cost little": (
        [SCRIPT, arm("runner", faults=150, calls=90), arm("runner-retain", calls=140)],
        ["noise"],
    ),
}


@pytest.mark.parametrize("name", NOISY_CASES)
def test_what_is_found_on_a_noisy_machine(name: str) -> None:
    """The noise comes first; then counts decide, and nothing rests on speeds alone."""
    arms, found = NOISY_CASES[name]
    assert keys(*arms, machine=NOISY) == found


WITHOUT_OPENMP: Cases = {
    "it sleeps in the server": ([SCRIPT, THROTTLED, RUNNER], ["sleeps-in-server"]),
    "it sleeps on the runner too": (
        [SCRIPT, THROTTLED, arm("runner", calls=24, sleeps=1200)],
        ["sleeps-everywhere"],
    ),
    "it sleeps in the script as well": (
        [SLEEPING, arm("def", sleeps=600), RUNNER],
        ["already-sleeping", "healthy"],
    ),
    "all is well": ([SCRIPT, arm("def"), RUNNER], ["healthy"]),
}


@pytest.mark.parametrize("name", WITHOUT_OPENMP)
def test_what_is_found_without_openmp(name: str) -> None:
    """There are no two pools of GNU OpenMP where it is not loaded; the sleeps are told all the
    same."""
    arms, found = WITHOUT_OPENMP[name]
    assert keys(*arms, machine=NO_OPENMP) == found


def test_what_sleeps_without_a_pool() -> None:
    """Without a library that has a pool, sleeping in the script is the model's own affair."""
    assert keys(SLEEPING, arm("def", sleeps=600), machine=NO_POOL) == ["healthy"]


UNCOUNTED_CASES: Cases = {
    "all is well": ([SCRIPT, arm("def"), RUNNER], ["uncounted", "healthy"]),
    "sleeps": ([SCRIPT, arm("def", sleeps=1313), RUNNER], ["uncounted", "healthy"]),
    "sleeps in the script": ([SLEEPING, arm("def")], ["uncounted", "healthy"]),
    "slower": ([SCRIPT, arm("def", calls=50)], ["slower", "uncounted"]),
    "the runner helps": ([SCRIPT, THROTTLED, RUNNER], ["runner-helps", "uncounted"]),
    "the loop is blocked": (
        [LONG, BLOCKED, LONG_RUNNER],
        ["loop-blocked", "uncounted", "healthy"],
    ),
    "page faults": (
        [SCRIPT, FAULTS, arm("runner-retain", faults=10, calls=140)],
        ["uncounted"],
    ),
    "threads": (
        [SCRIPT, RUNNER, arm("threads-1", calls=100, cores=0.0), arm("threads-2", cores=0.0)],
        ["uncounted"],
    ),
}


@pytest.mark.parametrize("name", UNCOUNTED_CASES)
def test_what_is_found_where_nothing_is_counted(name: str) -> None:
    """Speeds decide, it is said that they do, and nothing rests on counts."""
    arms, found = UNCOUNTED_CASES[name]
    told = verdict(*arms, machine=UNCOUNTED)
    assert [finding.key for finding in told] == found
    assert not any("switches" in finding.detail for finding in told)


def test_nothing_is_known_where_nothing_is_counted_and_it_is_noisy() -> None:
    """Neither counts nor speeds: that is said, and no more."""
    told = verdict(SCRIPT, arm("def", calls=50), machine=replace(NOISY, counted=False))
    assert [finding.key for finding in told] == ["noise", "undecided", "uncounted"]
    assert not any("switches" in finding.detail for finding in told)


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


@pytest.mark.parametrize("machine", [QUIET, NO_OPENMP])
@pytest.mark.parametrize(("calls", "faster"), [(25, False), (36, True)])
def test_sleeps_are_a_problem_where_the_runner_is_faster(
    machine: Machine, calls: int, faster: bool
) -> None:
    """No gain is promised that was not measured."""
    (finding,) = verdict(SCRIPT, THROTTLED, arm("runner", calls=calls), machine=machine)
    assert (finding.severity == "problem") == faster
    told = "runner: 1.5x" if faster else "the runner was not faster here"
    assert finding.headline.endswith(told)


@pytest.mark.parametrize("arms", [[SCRIPT, THROTTLED], [SCRIPT, THROTTLED, RUNNER]])
def test_sleeps_of_unknown_cause_are_no_problem_by_themselves(arms: list[Arm]) -> None:
    """Without OpenMP's story, and without a quiet runner to compare, they are worth a try."""
    told = verdict(*arms, machine=replace(NOISY, runtimes=()))[1]
    assert (told.key, told.severity) == ("sleeps-in-server", "advice")
    assert told.headline.endswith("sleep 1313 times per call in the def; try the runner")


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
    assert set(SUBJECT.policy(threads=threads)) < set(finding.lines)
    assert ("quota of 1.5 ran out 9 times in 1.0 s (def)" in finding.headline) == (quota == 1.5)


@pytest.mark.parametrize(("quota", "enough"), [(2.5, True), (1.5, False)])
def test_a_quota_that_is_too_small(quota: float, enough: bool) -> None:
    """Fewer threads are no remedy where the runner has no more than the quota pays for."""
    machine = replace(QUIET, quota=quota)
    (finding,) = verdict(SCRIPT, arm("runner", throttled_periods=9), machine=machine)
    assert (finding.lines == ()) == enough
    assert finding.detail.endswith("already: ask for a larger one.") == enough


def test_a_held_gil_is_cured_by_a_process() -> None:
    """The lines to write put the model into one."""
    (finding,) = verdict(SCRIPT, arm("runner", health=0.009))
    assert "process of its own" in finding.detail
    assert finding.lines == SUBJECT.isolated()


@pytest.mark.parametrize("wait", [0.28, 0.8])
def test_several_clients_and_the_gil(wait: float) -> None:
    """Where calls of several clients hold it, a request may have to wait for several."""
    arms = (LONG, arm("runner", call=0.6, calls=3, health=wait))
    assert keys(*arms, clients=2) == ["holds-gil"]
    assert (keys(*arms) == ["holds-gil"]) == (wait < 0.45)


@pytest.mark.parametrize(("clients", "queued"), [(8, True), (1, False)])
def test_a_runner_that_is_slower(clients: int, queued: bool) -> None:
    """That calls queue is said only of several clients."""
    told = verdict(SCRIPT, arm("def", calls=190), RUNNER, clients=clients)
    assert told[0].headline == "the def is 2.0x as fast as the runner"
    assert ("they queue for its one thread" in told[0].detail) == queued


def test_a_runner_that_helps() -> None:
    """How much, with the lines to write and what is known of the cause."""
    (finding,) = verdict(SCRIPT, arm("def", calls=48), RUNNER)
    assert finding.headline == "the runner does 2.0x of what the model does in the def"
    assert finding.lines == SUBJECT.application()
    assert "the model works more" in finding.detail


def test_a_server_that_is_cleared() -> None:
    """The figures are told, and nothing is claimed of them."""
    (finding,) = verdict(arm("script", sleeps=30), arm("def", sleeps=200))
    assert finding.detail.startswith(
        "Voluntary context switches per call: 30.0 (script), 200.0 (def). If"
    )


def test_the_runner_frees_the_loop() -> None:
    """The waits in the loop and on the runner are told side by side."""
    told = headline(LONG, BLOCKED, arm("runner", call=0.3, calls=3, health=0.002))
    assert told == "async def blocks the event loop: /health waits 400 ms, on the runner 2 ms"


def test_memory_is_kept_by_a_line() -> None:
    """The gain is told where times can be, and the line is complete."""
    (finding,) = verdict(SCRIPT, FAULTS, arm("runner-retain", calls=135))
    assert finding.headline == "9000 page faults per call: keep freed memory: 1.50x"
    assert finding.lines == SUBJECT.policy(retain_memory=True)


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
    throttled, fine = arm("executor", calls=24, sleeps=900), arm("executor")
    for executor, found in ((throttled, ["two-pools", "failed"]), (fine, ["failed", "healthy"])):
        told = verdict(SCRIPT, executor, RUNNER, failures=(failure,))
        assert [finding.key for finding in told] == found


def test_every_finding_is_documented() -> None:
    """The table of findings has a row for each that the code can come to, and no other."""
    sources = [ROOT / "asgi_infer" / "doctor" / name for name in SOURCES]
    known = {
        key for source in sources for key in re.findall(r'key="([\w-]+)"', source.read_text())
    }
    page = (ROOT / "docs" / "how-to" / "doctor.md").read_text()
    table = page.partition("## What it finds")[2].partition("##")[0]
    assert set(re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)) == known
