"""The figures as people read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asgi_infer.doctor import _figures
from asgi_infer.doctor._figures import is_loop, model_threads

from . import diagnoses


def test_noise_names_its_reasons() -> None:
    """What moved the times is said, and only that."""
    assert _figures.noise(diagnoses.noisy().machine) == (
        "This machine is busy (other processes use 0.8 CPUs, somebody waits for a CPU 31% of the "
        "time, the host takes 0.1 CPUs away): trust the switches, not the times."
    )
    quiet = replace(diagnoses.MACHINE, noisy=True, others=0.0, pressure=0.0)
    assert "(not quiet): trust the switches, not the times" in _figures.noise(quiet)
    assert "trust none of the times" in _figures.noise(replace(quiet, counted=False))


def test_lines_of_code_are_shown_once() -> None:
    """A finding with the same lines as one before points to them, and noise is no verdict."""
    again = replace(diagnoses.LOOP_BLOCKED, lines=diagnoses.TWO_POOLS.lines)
    findings = (*diagnoses.noisy().findings, again, diagnoses.PAGE_FAULTS)
    first, second, third = _figures.verdicts(replace(diagnoses.noisy(), findings=findings))
    assert first == diagnoses.TWO_POOLS
    assert second.lines == ()
    assert second.detail.endswith("The lines to write are those above.")
    assert third == diagnoses.PAGE_FAULTS


def test_machine_in_one_line() -> None:
    """One is one, two are several, and a quota is said where there is one."""
    assert _figures.where(diagnoses.MACHINE) == (
        "2 CPUs on 1 core; Linux 6.8 x86_64; Python 3.12.8; "
        "native thread pools: libgomp (scikit-learn), OpenBLAS (numpy)"
    )
    assert "a quota of 1.5 CPUs" in _figures.where(diagnoses.noisy().machine)


def test_nothing_is_told_of_counts_where_there_are_none() -> None:
    """What rests on counts has a dash where threads can't be counted; speeds are told."""
    diagnosis = diagnoses.uncounted()
    told = {
        column.name
        for column in _figures.columns(diagnosis)
        if column.cell(diagnosis.arms[1], diagnosis) != "-"
    }
    assert told == {"calls/s", "of script", "p50", "p99", "/health p99"}


@pytest.mark.parametrize(("calls", "told"), [(19, False), (20, True)])
def test_p99_of_few_calls(calls: int, told: bool) -> None:
    """One call in a hundred is not told of fewer than twenty."""
    diagnosis = diagnoses.throttled()
    arm = replace(diagnosis.arms[1], latencies=(0.1,) * calls, health=(0.1,) * calls)
    cells = {column.name: column.cell(arm, diagnosis) for column in _figures.COLUMNS}
    assert cells["p50"] == "100 ms"
    assert (cells["p99"] == "100 ms") == (cells["/health p99"] == "100 ms") == told
    assert (cells["p99"] == "-") == (not told)


def test_throttling_is_a_column_where_there_was_any() -> None:
    """Quota is a column only where one ran out."""
    assert _figures.THROTTLED not in _figures.columns(diagnoses.throttled())
    assert _figures.THROTTLED in _figures.columns(diagnoses.noisy())


def test_threads_of_the_model() -> None:
    """The event loop's thread is the model's only where the model runs on it, and idle threads
    are nobody's."""
    arms = {arm.key: arm for arm in diagnoses.throttled().arms}
    assert [t.python for t in model_threads(arms["script"])] == ["MainThread", None]
    assert [t.python for t in model_threads(arms["async-def"])] == ["MainThread", None]
    assert len(arms["def"].threads) == 6
    assert len(model_threads(arms["def"])) == 4
    assert not any(is_loop(arms["def"], thread) for thread in model_threads(arms["def"]))


def test_every_arm_is_explained() -> None:
    """There is an explanation for each way to run the model."""
    assert [arm.key for arm in diagnoses.throttled().arms] == list(_figures.ARMS)
