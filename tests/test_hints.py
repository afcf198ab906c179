"""Hints: each cause is named once, with its figure, and nothing is said without one."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from asgi_infer import NativePolicy, _hints
from asgi_infer._hints import Hints, fault_seconds
from asgi_infer._statistics import Usage
from asgi_infer.native import cpu
from asgi_infer.native.cpu import Throttling


@dataclass
class Seen:
    """A look at a call; by default at one with nothing to say about it."""

    seconds: float = 0.1
    faults: int = 0
    lag: float | None = 0.0001
    func: str = "predict"


Said = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """No quota, no other process of the same server, and page faults that cost 1 µs."""
    system = SimpleNamespace(
        quota=None, throttling=throttled(0, 0), threads={os.getpid(): 4}, affinity={}
    )
    processes = SimpleNamespace(
        affinity=lambda pid: system.affinity.get(pid, frozenset(range(4))),
        siblings=lambda: set(system.threads) - {os.getpid()},
        threads_named=lambda name, pid: system.threads[pid] if name == "digits" else 0,
    )
    monkeypatch.setattr(_hints, "processes", processes)
    monkeypatch.setattr(_hints, "fault_seconds", lambda: 1e-6)
    monkeypatch.setattr(cpu, "cgroup_quota", lambda: system.quota)
    monkeypatch.setattr(cpu, "throttling", lambda: system.throttling)
    monkeypatch.setattr(cpu, "IMPORT_AFFINITY", frozenset(range(4)))
    return system


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """What hints say to looks, one after the other."""

    def say(hints: Hints, *looks: Seen) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "asgi_infer"):
            for look in looks:
                hints.consider(look)
        return [record.getMessage() for record in caplog.records]

    return say


def hints(policy: NativePolicy | None = None) -> Hints:
    return Hints("digits", policy or NativePolicy(threads=4), Usage())


def test_nothing_to_say(said: Said) -> None:
    """Where nothing is wrong, nothing is said."""
    assert said(hints(), *[Seen()] * 100) == []


# -- page faults -------------------------------------------------------------------------------


def test_page_faults(said: Said) -> None:
    """Faults that take more than a twentieth of three calls in a row are worth a line, once."""
    faulty = Seen(seconds=0.1, faults=8000)
    (line,) = said(hints(), *[faulty] * 20)
    assert line.startswith("predict spends about 8% of its time on page faults (8000 in a call)")
    assert "NativePolicy(retain_memory=True)" in line


@pytest.mark.parametrize(
    "looks",
    [
        [Seen(seconds=0.1, faults=4900)] * 10,
        [Seen(seconds=1e-5, faults=99)] * 10,
        [Seen(faults=8000), Seen(faults=8000), Seen()] * 10,
    ],
    ids=["cheap", "few", "not in a row"],
)
def test_page_faults_that_do_not_matter(said: Said, looks: list[Seen]) -> None:
    """Few faults, cheap ones, and those of single calls, are nothing."""
    assert said(hints(), *looks) == []


def test_page_faults_with_retained_memory(said: Said) -> None:
    """Who keeps the memory already is not told to."""
    retaining = hints(NativePolicy(retain_memory=True))
    assert said(retaining, *[Seen(faults=8000)] * 10) == []


@pytest.mark.skipif(sys.platform != "linux", reason="faults are counted by thread on Linux")
def test_what_a_fault_costs() -> None:
    """It is measured, on this machine: more than a twentieth of a microsecond, less than 1 ms."""
    assert 5e-8 < fault_seconds.__wrapped__() < 1e-3


def test_fault_that_can_not_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel refuses memory, or knows no huge pages, faults cost nothing known."""

    def fail() -> float:
        raise OSError("no memory")

    monkeypatch.setattr(_hints, "_fault_seconds", fail)
    assert fault_seconds.__wrapped__() == 0.0


# -- the GIL -----------------------------------------------------------------------------------


def test_held_gil(said: Said) -> None:
    """A loop that answers only when each call has ended is held up by the binding."""
    (line,) = said(hints(), *[Seen(seconds=0.31, lag=0.3)] * 20)
    assert "predict" in line
    assert "for 0.3 s of 0.31 s" in line
    assert "holds the GIL" in line
    assert "worker=ProcessWorker()) from asgi_infer.workers" in line


@pytest.mark.parametrize(
    "looks",
    [
        [Seen(seconds=0.3, lag=0.25)] * 10,
        [Seen(seconds=0.05, lag=0.1)] * 10,
        [Seen(seconds=0.01, lag=0.01)] * 10,
        [Seen(seconds=0.3, lag=None)] * 10,
        [Seen(seconds=0.3, lag=0.3), Seen(seconds=0.3, lag=0.3), Seen()] * 10,
    ],
    ids=["answers in between", "busy with others", "short", "no loop", "not in a row"],
)
def test_loops_that_are_late_for_other_reasons(said: Said, looks: list[Seen]) -> None:
    """A busy loop, short calls, and callers without a loop, say nothing of the GIL."""
    assert said(hints(), *looks) == []


# -- the quota ---------------------------------------------------------------------------------


def throttled(periods: int, throttled_periods: int) -> Throttling:
    return Throttling(periods=periods, throttled_periods=throttled_periods, throttled_seconds=0.0)


@pytest.mark.parametrize(
    ("threads", "remedy"),
    [(4, "set NativePolicy(threads=2), not 4"), (2, "the model has 2 already")],
)
def test_quota(said: Said, alone: SimpleNamespace, threads: int, remedy: str) -> None:
    """A quota that was used up since the last look is named, with what to set, once."""
    alone.quota, alone.throttling = 2.5, throttled(100, 50)
    limited = hints(NativePolicy(threads=threads))
    assert said(limited, Seen()) == []  # how often it was before is nobody's concern
    alone.throttling = throttled(110, 54)
    (line,) = said(limited, Seen(), Seen())
    assert line.startswith(
        "a cgroup's quota (the least is 2.5 CPUs) was used up in 4 of 10 periods"
    )
    assert remedy in line
    alone.throttling = throttled(200, 100)
    assert said(limited, Seen()) == []


@pytest.mark.parametrize(
    "now", [throttled(110, 51), throttled(200, 53), throttled(100, 50), throttled(30, 60)]
)
def test_quota_that_holds(said: Said, alone: SimpleNamespace, now: Throttling) -> None:
    """A single period, a few of many, none at all, or those of another group, are nothing."""
    alone.quota, alone.throttling = 2.5, throttled(100, 50)
    limited = hints()
    assert said(limited, Seen()) == []
    alone.throttling = now
    assert said(limited, Seen()) == []


# -- several server processes ------------------------------------------------------------------


def test_processes(said: Said, alone: SimpleNamespace) -> None:
    """Other processes of the same server with models of the same name share the CPUs."""
    alone.threads |= {7: 4, 8: 0, 9: 1}
    (line,) = said(hints(), *[Seen()] * 10)
    assert line.startswith("2 processes that were started together run a model named 'digits', ")
    assert "with 8 native threads" in line
    assert "NativePolicy(threads=2)" in line
    assert "worker=SharedWorker()) from asgi_infer.workers" in line


def test_processes_within_a_quota(said: Said, alone: SimpleNamespace) -> None:
    """A quota leaves less room than there are CPUs."""
    alone.threads[7] = 2
    alone.affinity = dict.fromkeys(alone.threads, frozenset(range(64)))
    assert said(hints(), Seen()) == []
    alone.quota = 4.0
    (line,) = said(hints(), Seen())
    assert "with 6 native threads on 4 CPUs" in line


def test_processes_with_cpus_of_their_own(said: Said, alone: SimpleNamespace) -> None:
    """Workers that are bound to different CPUs do not get in each other's way."""
    alone.threads[7] = 4
    alone.affinity = {os.getpid(): frozenset(range(4)), 7: frozenset(range(4, 8))}
    assert said(hints(), Seen()) == []


def test_processes_that_fit(said: Said, alone: SimpleNamespace) -> None:
    """Where all threads together fit, or models have none of their own, nothing is said."""
    for threads in ({os.getpid(): 2, 7: 2}, {os.getpid(): 1, 7: 4}, {os.getpid(): 4, 7: 1, 8: 1}):
        alone.threads = threads
        assert said(hints(), *[Seen()] * 10) == []


def test_processes_that_start_later(said: Said, alone: SimpleNamespace) -> None:
    """They are looked for again, less and less often."""
    watching = hints()
    assert said(watching, Seen(), Seen(), Seen()) == []
    alone.threads[7] = 4
    assert len(said(watching, Seen())) == 1


def test_processes_unknown(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that doesn't tell keeps nobody from anything."""

    def no_proc() -> set[int]:
        raise FileNotFoundError

    monkeypatch.setattr(_hints, "processes", SimpleNamespace(siblings=no_proc))
    assert said(hints(), *[Seen()] * 10) == []


def test_said_once_for_all_starts(said: Said) -> None:
    """A runner that is started again does not repeat what it has said."""
    usage, faulty = Usage(), [Seen(seconds=0.1, faults=8000)] * 5
    assert len(said(Hints("digits", NativePolicy(), usage), *faulty)) == 1
    assert said(Hints("digits", NativePolicy(), usage), *faulty) == []
