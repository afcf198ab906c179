"""Facts about the benchmarks of isolation: what they count, and what they would not believe."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks import _gil, _isolated, isolation
from benchmarks._children import ROOT, once
from benchmarks._figure import QUICK, Unavailable, all_at_once
from benchmarks._functions import STRIDE, touch
from benchmarks._isolated import Untouched

RAY = ROOT / ".venv-bench-ray" / "bin" / "python"  # made by `make bench-isolation`

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read /proc")


def array() -> Any:
    """Two pages and a bit."""
    return np.ones(2 * STRIDE + 1, dtype=np.float32)


def test_one_element_of_each_page_is_touched() -> None:
    """The pages at both ends are among them, and nothing else changes."""
    touched = touch(array())
    assert [int(index) for index in np.flatnonzero(touched == 2)] == [0, STRIDE, 2 * STRIDE]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda _, sent: sent, id="in place: it never left"),
        pytest.param(lambda _, sent: sent.copy(), id="a copy nobody has touched"),
        pytest.param(lambda _, sent: touch(sent.copy())[:-1], id="a part"),
    ],
)
def test_an_array_that_was_not_there_and_back_is_not_believed(
    function: Callable[..., Any],
) -> None:
    """An arm that does not do the work gets no figure."""

    async def call(*arguments: Any) -> Any:
        return function(*arguments)

    with pytest.raises(Untouched):
        asyncio.run(_isolated.there_and_back(call, array()))


def test_two_copies_bring_the_array_there_and_back() -> None:
    """The limit does what the arms do: the array is touched, and the original is not."""
    original = array()

    async def main() -> None:
        async with _isolated.two_copies() as call:
            await _isolated.there_and_back(call, original)

    asyncio.run(main())
    assert (original == 1).all()


@pytest.mark.parametrize(("calls", "made"), [(1, 3), (100, 110)])
def test_calls_that_warm_up_do_not_count(
    monkeypatch: pytest.MonkeyPatch, calls: int, made: int
) -> None:
    """A tenth more calls are made than are counted, and two at least."""
    now = [0.0]
    monkeypatch.setattr(_isolated, "perf_counter", lambda: now[0])
    ends = iter([1000.0] * (made - calls) + [7.0] * calls)

    async def call() -> None:
        now[0] += next(ends)

    assert asyncio.run(_isolated.median(call, calls)) == 7.0
    assert list(ends) == []


def test_the_lag_is_that_of_the_worst_tick() -> None:
    """A loop that was late once, for 40 ms, was late by 40 ms, however long the call lasts."""
    now = iter([0.0, 0.001, 1.0, 1.041, 2.0, 2.002])

    async def main() -> float:
        ended = asyncio.get_running_loop().create_future()

        def clock() -> float:
            tick = next(now)
            if tick == 2.0:
                ended.set_result(None)
            return tick

        return await _gil.worst_tick(ended, clock)

    assert asyncio.run(main()) == pytest.approx(0.04)
    assert list(now) == []


def test_a_call_that_fails_has_no_lag() -> None:
    """Its error is not taken for a quick return."""

    async def call() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(_gil.worst_tick(call()))


def test_passes_take_turns() -> None:
    """Each arm makes its calls of one pass before any arm makes those of the next."""
    turns: list[str] = []

    def call(name: str) -> Callable[[], Awaitable[None]]:
        async def once() -> None:
            turns.append(name)

        return once

    arms = {arm: {"noop": call(arm)} for arm in ("ours", "theirs")}
    measured = asyncio.run(_isolated.passes(arms, 2, 1))
    assert turns[::3] == ["ours", "theirs", "ours", "theirs"]
    assert list(measured) == ["ours", "theirs"]


@on_linux
def test_processes_are_known_by_what_they_have_inherited() -> None:
    """One that has the variable, with another value, is somebody else's."""
    program = [sys.executable, "-S", "-c", "input()"]
    with (
        subprocess.Popen(program, env={"BENCH_FOLDER": "a"}, stdin=subprocess.PIPE) as ours,
        subprocess.Popen(program, env={"BENCH_FOLDER": "ab"}, stdin=subprocess.PIPE) as theirs,
    ):
        found = isolation.inheritors("BENCH_FOLDER", "a")
        for process in (ours, theirs):
            process.communicate(b"\n")
    assert [process.pid for process in found] == [ours.pid]


@on_linux
def test_memory_is_counted_over_all_processes() -> None:
    """The same process, counted twice, holds about twice as much, whatever it holds."""
    process = psutil.Process(os.getpid())
    alone, twice = isolation.memory([process]), isolation.memory([process] * 2)
    assert 1 < alone["pss"] < process.memory_info().rss / 2**20 + 1
    assert 1.9 < twice["pss"] / alone["pss"] < 2.1
    assert twice["processes"] == 2


def test_what_is_not_installed_can_not_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are measured without it, and the report says how to get it."""
    monkeypatch.setattr(isolation, "find_spec", lambda name: None)
    arm = all_at_once(["loky"], lambda scale: {"loky": isolation.trip("loky", 0, 1)(scale)})
    with pytest.raises(Unavailable, match="make bench-isolation") as caught:
        arm(QUICK)
    assert caught.value.arms == ["loky"]


@on_linux
def test_an_array_reaches_the_process_and_comes_back() -> None:
    """As the program is run by a round: another process, and what it says is all there is."""
    sample = once("_isolated", isolation.OURS, "--mebibytes", "0.1", "--calls", "1")
    assert list(sample) == ["call"]
    assert sample["call"] > 0


@pytest.mark.soak
@pytest.mark.skipif(not RAY.exists(), reason="`make bench-isolation` installs Ray")
def test_both_ways_to_an_actor_are_measured_on_one_cluster() -> None:
    """Each has a figure for each kind of call."""
    measured = once("_on_ray", "--passes", "1", "--calls", "2", python=RAY)
    assert {arm: list(sample) for arm, sample in measured.items()} == {
        arm: ["noop", "array"] for arm in ("actor", "RayWorker")
    }
