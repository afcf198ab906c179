"""Figures and names as people read them."""

from __future__ import annotations

import pytest

from asgi_infer.doctor._text import code, duration, number, plain, plural


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
    assert plain("a\n b\x1b[31m\udcff \u4e2d") == "a b?[31m? \u4e2d"


def test_code_keeps_indentation() -> None:
    """A line of code keeps its spaces, and nothing in it controls a terminal."""
    assert code("    x = 1\x07") == "    x = 1?"


def test_plural() -> None:
    """One is one, several are several."""
    assert [plural(count, "thread") for count in (1, 2)] == ["1 thread", "2 threads"]
