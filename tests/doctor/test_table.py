"""The diagnosis in a terminal and in a file."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from asgi_infer.doctor._results import Diagnosis
from asgi_infer.doctor._table import print_diagnosis

from . import diagnoses


def printed(diagnosis: Diagnosis, *, width: int = 80, terminal: bool = False) -> str:
    """What comes out."""
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal)
    print_diagnosis(console, diagnosis)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(text: str, title: str) -> list[str]:
    """The cells behind a title, in whichever of the tables they stand."""
    lines = [line for line in text.splitlines() if line.startswith(f"{title}  ")]
    return [cell for line in lines for cell in line.removeprefix(title).split("  ") if cell]


def test_one_row_for_each_arm() -> None:
    """Wide enough, all figures of an arm stand in one line."""
    text = printed(diagnoses.throttled(), width=140)
    cells = [cell.strip() for cell in rows(text, "def endpoint")]
    assert cells[:2] == ["25.0", "0.25x"]
    assert cells[5:9] == ["2.2", "1313", "0.33", "520"]
    assert text.count("def endpoint") == 2  # and async def


@pytest.mark.parametrize("width", [60, 80, 100])
def test_nothing_is_lost_in_a_narrow_terminal(width: int) -> None:
    """What does not fit side by side follows below: no figure is cut, no line is too long."""
    narrow, wide = (printed(diagnoses.noisy(), width=each) for each in (width, 160))
    for title in ("script", "def endpoint", "InferenceRunner"):
        assert [c.strip() for c in rows(narrow, title)] == [c.strip() for c in rows(wide, title)]
    code = {f"    {line}" for line in diagnoses.TWO_POOLS.lines}
    assert max(len(line) for line in narrow.splitlines() if line not in code) <= width


def test_sweep_is_a_small_table() -> None:
    """The thread sweep has a table of its own, with the few figures that matter for it."""
    text = printed(diagnoses.throttled())
    assert [cell.strip() for cell in rows(text, "4")] == [
        "30.7",
        "79.7 ms",
        "102 ms",
        "0.80",
        "480",
    ]
    assert "threads  calls/s" not in printed(diagnoses.one_arm())


def test_findings_in_order_with_their_severity() -> None:
    """Each finding begins with its severity as a word, the most important one first."""
    text = printed(diagnoses.throttled(), width=120)
    first = text.index("PROBLEM: two OpenMP pools: 1313 sleeps per call")
    assert first < text.index("PROBLEM: async def") < text.index("ADVICE: page faults")
    assert "FINE: nothing is throttled" in printed(diagnoses.one_arm())


def test_code_is_ready_to_copy() -> None:
    """Lines of code come as they are, however narrow the terminal is."""
    lines = [line.rstrip() for line in printed(diagnoses.throttled(), width=40).splitlines()]
    for line in diagnoses.TWO_POOLS.lines:
        assert f"    {line}".rstrip() in lines


def test_noise_is_said_first() -> None:
    """On a busy machine that comes before all else, once."""
    text = printed(diagnoses.noisy())
    assert text.startswith("This machine is busy")
    assert text.count("busy") == 1
    assert "busy" not in printed(diagnoses.throttled())


def test_colours_only_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file gets no control codes, and the words are the same."""
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[" not in printed(diagnoses.throttled())
    assert "\x1b[1;31mPROBLEM" in printed(diagnoses.throttled(), terminal=True)


def test_names_are_names() -> None:
    """Names from outside are not taken for markup, and their control codes go nowhere."""
    text = printed(diagnoses.hostile(), width=400, terminal=True)
    assert '<script>alert("1")</script> & [bold]$x^2$ ?[31m very_long' in text
    assert "\x1b[31m\n" not in text


@pytest.mark.parametrize("diagnosis", [diagnoses.no_calls, diagnoses.many_threads])
def test_extremes(diagnosis: Callable[[], Diagnosis]) -> None:
    """Without a single call there are dashes for figures, and many threads are no matter."""
    text = printed(diagnosis(), width=140)
    cells = [cell.strip() for cell in rows(text, "ThreadPoolExecutor(1)")]
    assert len(cells) == 11
    assert (cells[2] == "-") == (diagnosis is diagnoses.no_calls)
