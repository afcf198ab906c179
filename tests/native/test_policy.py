"""The policy, on a thread of its own each time: what is set on a thread stays on it."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import FrozenInstanceError
from typing import Any, TypeVar

import pytest

from asgi_infer.native import NativePolicy, cpu, memory, procfs, thread_count

from ..threads import on_new_thread
from . import gomp

linux = pytest.mark.skipif(sys.platform != "linux", reason="set on Linux only")
T = TypeVar("T")


def under(policy: NativePolicy, func: Callable[[], T], *, name: str = "model") -> T:
    """``func()`` on a new thread that ``policy`` has set up."""

    def enter_and_call() -> T:
        with ExitStack() as stack:
            policy.enter(stack, name=name)
            return func()

    return on_new_thread(enter_and_call)


def niceness(native_id: int | None = None) -> int:
    return os.getpriority(os.PRIO_PROCESS, native_id or threading.get_native_id())


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads must be at least 1"),
        ({"threads": -2}, "threads must be at least 1"),
        ({"cpus": ()}, "cpus must name at least one CPU"),
        ({"cpus": set()}, "cpus must name at least one CPU"),
        ({"nice": -1}, "nice must be between 0 and 19"),
        ({"nice": 20}, "nice must be between 0 and 19"),
        ({"contexts": (3,)}, "contexts takes factories"),
    ],
    ids=str,
)
def test_nonsense_is_refused(options: dict[str, Any], message: str) -> None:
    """A value that makes no sense is refused where the policy is made, not on the thread."""
    with pytest.raises(ValueError, match=message):
        NativePolicy(**options)


def test_frozen() -> None:
    """One policy may serve many runners, so nobody can change it."""
    with pytest.raises(FrozenInstanceError):
        NativePolicy().nice = 3  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # the point


def test_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, or what the chosen CPUs and the quota come to."""
    monkeypatch.setattr(cpu, "cgroup_quota", lambda: 2.0)
    assert NativePolicy(threads=7).thread_count == 7
    assert NativePolicy(cpus={0}).thread_count == 1
    assert NativePolicy(cpus=range(8)).thread_count == 2
    assert NativePolicy().thread_count == min(2, len(cpu.IMPORT_AFFINITY))


def test_thread_count_on_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that wants a number gets the policy's on its thread, and elsewhere the advice."""
    monkeypatch.setattr(cpu, "cgroup_quota", lambda: 1.5)
    assert under(NativePolicy(threads=7), thread_count) == 7
    assert under(NativePolicy(cpus=range(8)), thread_count) == 1
    assert on_new_thread(thread_count) == 1


# -- on the thread -----------------------------------------------------------------------------


@linux
def test_name() -> None:
    """The thread carries the name that it was given."""
    policy = NativePolicy()
    name = under(policy, lambda: procfs.thread_name(threading.get_native_id()), name="digits")
    assert name == "digits"


@linux
def test_niceness() -> None:
    """Niceness is added to what the thread has, for this thread alone."""
    before = niceness()
    assert under(NativePolicy(nice=3), niceness) == before + 3
    assert under(NativePolicy(nice=0), niceness) == before
    assert niceness() == before


@linux
def test_niceness_has_a_limit() -> None:
    """Whatever is added up, 19 is as nice as a thread can be."""

    def twice() -> int:
        with ExitStack() as stack:
            NativePolicy(nice=19).enter(stack, name="model")
            NativePolicy(nice=19).enter(stack, name="model")
            return niceness()

    assert on_new_thread(twice) == 19


@linux
def test_affinity() -> None:
    """The thread runs on the CPUs that were chosen, and the others where they did."""
    chosen = {min(cpu.IMPORT_AFFINITY)}
    before = os.sched_getaffinity(0)
    assert under(NativePolicy(cpus=chosen), lambda: os.sched_getaffinity(0)) == chosen
    assert os.sched_getaffinity(0) == before


@linux
def test_affinity_is_restored() -> None:
    """By default the CPUs are those of the import, even if the starting thread was bound since.

    Merely loading libgomp does that under ``OMP_PROC_BIND=true``.
    """

    def bound_then_entered() -> set[int]:
        os.sched_setaffinity(0, {min(cpu.IMPORT_AFFINITY)})
        return under(NativePolicy(), lambda: os.sched_getaffinity(0))

    assert on_new_thread(bound_then_entered) == cpu.IMPORT_AFFINITY


@linux
def test_native_threads_inherit_it_all() -> None:
    """Name, niceness and CPUs are passed on to every native thread that this one starts."""
    chosen = {max(cpu.IMPORT_AFFINITY)}

    def look_at_helpers() -> list[tuple[str, int, set[int]]]:
        helpers = gomp.started_by(gomp.run_region, 3)
        return [(procfs.thread_name(n), niceness(n), os.sched_getaffinity(n)) for n in helpers]

    policy = NativePolicy(cpus=chosen, nice=7)
    assert under(policy, look_at_helpers) == [("model", niceness() + 7, chosen)] * 2


@linux
def test_threads() -> None:
    """Parallel regions on the thread get no more threads than the policy says."""

    def helpers() -> int:
        return len(gomp.started_by(gomp.run_region, 0))

    gomp.load()
    before = gomp.load().threads
    assert under(NativePolicy(threads=1), helpers) == 0
    assert gomp.load().threads == before


@linux
def test_threads_never_raised() -> None:
    """A lower count that is in force already, from OMP_NUM_THREADS say, stays."""

    def lowered() -> int:
        gomp.load().set_threads(1)
        NativePolicy(threads=2).limit_threads()
        return gomp.load().threads

    assert on_new_thread(lowered) == 1


@linux
def test_refusals_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What the system refuses is said once, and the thread goes on with the rest."""
    policy = NativePolicy(cpus={100_000}, nice=2)
    with caplog.at_level(logging.WARNING, "asgi_infer"):
        assert under(policy, niceness) == niceness() + 2
    (record,) = caplog.records
    assert record.message.startswith("could not set the CPU affinity of the model: ")


@pytest.mark.parametrize("wanted", [False, True])
def test_retain_memory(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    """What is set for the whole process is set only if it was asked for."""
    asked: list[bool] = []
    monkeypatch.setattr(memory, "retain_memory", lambda: asked.append(True))
    under(NativePolicy(retain_memory=wanted), lambda: None)
    assert asked == [True] * wanted


# -- contexts ----------------------------------------------------------------------------------


def test_contexts() -> None:
    """Contexts are entered in order on the thread itself, and left in reverse."""
    log: list[tuple[str, str, int]] = []

    def context(name: str) -> Callable[[], Any]:
        @contextmanager
        def note() -> Iterator[None]:
            log.append(("enter", name, threading.get_ident()))
            yield
            log.append(("leave", name, threading.get_ident()))

        return note

    here = under(NativePolicy(contexts=(context("a"), context("b"))), threading.get_ident)
    assert log == [
        ("enter", "a", here),
        ("enter", "b", here),
        ("leave", "b", here),
        ("leave", "a", here),
    ]


def test_context_that_fails() -> None:
    """A context that can't be entered is an error of the user's, and not swallowed."""

    def fail() -> Any:
        raise LookupError("no such device")

    with pytest.raises(LookupError, match="no such device"):
        under(NativePolicy(contexts=(fail,)), lambda: None)
