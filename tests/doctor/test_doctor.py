"""Facts about a whole diagnosis, in real processes: what is measured, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from asgi_infer.doctor import _doctor
from asgi_infer.doctor._doctor import Options, diagnose, sweep_counts
from asgi_infer.doctor._results import Diagnosis
from asgi_infer.doctor._target import Target, TargetError
from asgi_infer.native import cpu

from ..conftest import ON_LINUX
from . import models

ROOT = str(Path(__file__).parents[2])

pytestmark = pytest.mark.skipif(not ON_LINUX, reason="counters are read from /proc")


def target(model: str, sample: str | None = "row") -> Target:
    """Of ``models``."""
    return Target(
        model=f"{models.__name__}:{model}",
        call="predict",
        sample=sample and f"{models.__name__}:{sample}",
        app_dir=ROOT,
    )


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    """Of a model on GNU OpenMP, with a thread sweep of one step; where others are busy, the third
    attempt at the latest: a pool that loses its CPUs to them sleeps as well, everywhere, and then
    two pools look like one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_doctor, "sweep_counts", lambda: [1])
        options = Options(seconds=0.3, arms=("script", "def", "runner"))
        found = diagnose(target("Regions", None), options)
        for _ in range(2):
            if found.machine.noisy and "two-pools" not in keys(found):
                found = diagnose(target("Regions", None), options)
        return found


def keys(found: Diagnosis) -> list[str]:
    return [finding.key for finding in found.findings]


def test_two_pools_are_found(diagnosis: Diagnosis) -> None:
    """A model that is loaded on one thread and called on another sleeps at each barrier."""
    assert "two-pools" in keys(diagnosis)
    throttled = diagnosis.arm("def")
    assert throttled is not None
    assert throttled.switches_per_call > models.REGIONS


def test_every_arm_is_measured(diagnosis: Diagnosis) -> None:
    """Each arm has its calls, its picture, and as a server its health."""
    assert [arm.key for arm in diagnosis.arms] == ["script", "def", "runner"]
    assert [arm.key for arm in diagnosis.sweep] == ["threads-1"]
    for arm in (*diagnosis.arms, *diagnosis.sweep):
        assert arm.calls >= 3
        assert 0 < arm.model_cpu_seconds <= arm.cpu_seconds
        assert (arm.model_cpu_seconds == arm.cpu_seconds) == (arm.key == "script")
        assert arm.seconds >= 0.3
        assert len(arm.threads[0].cpu) >= 2
        assert arm.threads[0].python == "MainThread"
        assert bool(arm.health) == (arm.key != "script")


def test_the_machine_is_described(diagnosis: Diagnosis) -> None:
    """With the pools that the model's process had loaded."""
    assert any("libgomp" in each for each in diagnosis.machine.runtimes)
    assert (diagnosis.target, diagnosis.call) == (f"{models.__name__}:Regions", "predict")


def test_an_arm_that_fails_is_left_out() -> None:
    """The others are measured; why it failed is among what is found."""
    told: list[tuple[str, float]] = []
    arms = ("script", "def", "async-def", "runner")
    options = Options(seconds=0.05, arms=arms, sweep=False)
    found = diagnose(target("OnMain"), options, lambda what, done: told.append((what, done)))
    assert [arm.key for arm in found.arms] == ["script", "async-def"]
    # Here the event loop's thread is the model's.
    assert all(arm.model_cpu_seconds == arm.cpu_seconds > 0 for arm in found.arms)
    headlines = [finding.headline for finding in found.findings if finding.key == "failed"]
    assert headlines[0].startswith("def endpoint: the server answered 'HTTP/1.1 500 ")
    assert headlines[0].endswith("; its last words: RuntimeError: only on the main thread")
    assert headlines[1].startswith("InferenceRunner: ")
    assert "only on the main thread" in headlines[1]
    shares = [done for _, done in told]
    assert shares == sorted(shares)
    assert told[-1] == ("done", 1.0)


def test_no_arm_is_left() -> None:
    """Where all fail, that is the answer: it names the arm, and how it ended, though something
    that it has forked keeps the connections of its clients open."""
    options = Options(seconds=0.05, arms=("def",), sweep=False)
    with pytest.raises(TargetError, match=r"^def endpoint: the process was killed by SIGSEGV"):
        diagnose(target("CrashOffMain"), options)


@pytest.mark.parametrize(
    ("call", "told"),
    [("fail", "^fail raised ValueError: shapes differ"), ("crash", "^a first call of .*SIGSEGV")],
)
def test_the_first_try_fails(call: str, told: str) -> None:
    """Then nothing is measured."""
    broken = Target(**{**vars(target("Model")), "call": call})
    with pytest.raises(TargetError, match=told):
        diagnose(broken, Options())


BUDGETS = {
    (1, 1, None): [1],
    (2, 2, None): [1, 2],
    (8, 4, None): [2, 4, 7, 8],
    (16, 8, 3.5): [3, 4, 8, 15, 16],
}


@pytest.mark.parametrize(("cpus", "cores", "quota"), BUDGETS)
def test_the_counts_that_are_tried(
    monkeypatch: pytest.MonkeyPatch, cpus: int, cores: int, quota: float | None
) -> None:
    """One, half the cores, the cores, all CPUs but one, all, and what the runner uses."""
    budget = cpu.CpuBudget(
        cpus=frozenset(range(cpus)),
        cores=cores,
        hybrid=False,
        quota=quota,
        threads=cpus if quota is None else int(quota),
        reason="",
    )
    monkeypatch.setattr(cpu, "budget", lambda: budget)
    assert sweep_counts() == sorted({1, *BUDGETS[cpus, cores, quota]})
