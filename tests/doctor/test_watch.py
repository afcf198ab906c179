"""Facts about watching a process from outside: nothing that its threads use is lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from asgi_infer.doctor._watch import Watch
from asgi_infer.native import procfs
from asgi_infer.native.procfs import ThreadCounters

from ..conftest import ON_LINUX

IDLE = ThreadCounters(
    name="python",
    on_cpu=10.0,
    queued=1.0,
    voluntary_switches=100,
    involuntary_switches=10,
    minor_faults=1000,
    major_faults=0,
    system_time=2.0,
    niceness=0,
    cpus="0",
)
Seen = Callable[[Mapping[int, ThreadCounters]], None]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Sets what is seen from now on, half a second later."""
    now: dict[str, Any] = {"time": 0.0, "counters": {}}
    monkeypatch.setattr("time.perf_counter", lambda: now["time"])
    monkeypatch.setattr(procfs, "all_thread_counters", lambda pid: dict(now["counters"]))

    def set_it(counters: Mapping[int, ThreadCounters]) -> None:
        now["time"] += 0.5
        now["counters"] = counters

    return set_it


def used(seconds: float, *, switches: int = 0) -> ThreadCounters:
    """An idle thread that has used so much since."""
    return replace(
        IDLE,
        on_cpu=IDLE.on_cpu + seconds,
        voluntary_switches=IDLE.voluntary_switches + switches,
        involuntary_switches=IDLE.involuntary_switches + 2 * switches,
        minor_faults=IDLE.minor_faults + 3 * switches,
        queued=IDLE.queued + seconds / 10,
        system_time=IDLE.system_time + seconds / 4,
    )


def test_what_is_used_is_added_up(seen: Seen) -> None:
    """Over all threads, or all but one; only what they used since the watch began."""
    seen({1: IDLE, 2: IDLE})
    watch = Watch(1)
    seen({1: used(0.25, switches=5), 2: used(0.5, switches=7)})
    watch.stop()
    both, one = watch.used(), watch.used(without=1)
    assert (both.cpu, both.voluntary, both.involuntary, both.faults) == (0.75, 12, 24, 36)
    assert (one.cpu, one.voluntary, one.involuntary, one.faults) == (0.5, 7, 14, 21)
    assert one.system == 0.125
    assert one.queued == pytest.approx(0.05)


def test_threads_that_come_and_go(seen: Seen) -> None:
    """A new thread counts from its start, and one that has ended with what was seen last."""
    seen({1: IDLE})
    watch = Watch(1)
    seen({1: IDLE, 2: replace(IDLE, on_cpu=0.25, voluntary_switches=4)})
    watch.tick()
    seen({1: IDLE})
    watch.tick()
    watch.stop()
    assert (watch.used().cpu, watch.used().voluntary) == (0.25, 4)
    main, other = watch.traces({1: "MainThread"})
    assert (main.python, main.cpu) == ("MainThread", (0.0, 0.0))
    assert (other.python, other.cpu) == (None, (0.5, 0.0))


def test_the_picture(seen: Seen) -> None:
    """The main thread first, then those that used most; idle ones are left out, and a share of a
    CPU is never more than one."""
    seen({1: IDLE, 2: IDLE, 3: IDLE, 4: IDLE})
    watch = Watch(1)
    seen({1: used(0.05), 2: used(0.001), 3: used(0.25), 4: used(0.6)})
    watch.tick()
    watch.stop()
    assert [trace.cpu for trace in watch.traces({})] == [(0.1,), (1.0,), (0.5,)]


def test_a_number_that_is_another_threads_now(seen: Seen) -> None:
    """What has shrunk was another thread's: it counts as nothing, and not against the others."""
    seen({1: IDLE, 2: used(0.5, switches=5)})
    watch = Watch(1)
    seen({1: used(0.25, switches=1), 2: IDLE})
    watch.tick()
    watch.stop()
    assert (watch.used().cpu, watch.used().voluntary) == (0.25, 1)
    assert [trace.cpu for trace in watch.traces({})] == [(0.5,)]


def test_no_time_at_all(seen: Seen) -> None:
    """An interval without a length is none to fail over."""
    seen({1: IDLE})
    watch = Watch(1)
    watch.stop()
    assert watch.traces({})[0].cpu == (0.0,)


@pytest.mark.skipif(not ON_LINUX, reason="there is no /proc elsewhere")
def test_a_real_process() -> None:
    """A watched process has a main thread of this name, and a thread that works is seen."""
    watch = Watch(os.getpid())
    thread = threading.Thread(target=lambda: [sum(range(1000)) for _ in range(2000)])
    thread.start()
    thread.join()
    watch.stop()
    assert watch.used().cpu > 0
    assert watch.traces({os.getpid(): "MainThread"})[0].python == "MainThread"
