"""The figures as people read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asgi_infer.doctor import _figures
from asgi_infer.doctor._figures import duration, is_loop, model_threads, number

from . import diagnoses


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.042, "0.04"),
        (4.6, "4.6"),
        (99.96, "100"),
        (1313.4, "1313"),
        (2e6, "2,000,000"),
    ],
)
def test_number(value: float, text: str) -> None:
    """A number has as many digits as say something."""
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (2.5e-5, "0.03 ms"),
        (0.0004217, "0.422 ms"),
        (0.465, "465 ms"),
        (0.9996, "1 s"),
        (12.34, "12.3 s"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    """A duration has its unit."""
    assert duration(seconds) == text


def test_plain_keeps_letters_only() -> None:
    """Line breaks become spaces, and control codes and broken surrogates become visible."""
    assert _figures.plain("a\n b\x1b[31m\udcff \u4e2d") == "a b?[31m? \u4e2d"


def test_code_keeps_indentation() -> None:
    """A line of code keeps its spaces, and nothing in it controls a terminal."""
    assert _figures.code("    x = 1\x07") == "    x = 1?"


def test_noise_names_its_reasons() -> None:
    """What moved the times is said, and only that."""
    assert _figures.noise(diagnoses.noisy().machine) == (
        "This machine is busy (other processes use 0.8 CPUs, somebody waits for a CPU 31% of the "
        "time, the host takes 0.1 CPUs away): trust the switches, not the times."
    )
    quiet = replace(diagnoses.MACHINE, noisy=True, others=0.0, pressure=0.0)
    assert "(not quiet)" in _figures.noise(quiet)


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


def test_target_that_is_called_itself() -> None:
    """A model without a method has no dot after it."""
    assert _figures.target(diagnoses.throttled()) == "digits.model:Model.predict"
    assert _figures.target(replace(diagnoses.throttled(), call="")) == "digits.model:Model"


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
