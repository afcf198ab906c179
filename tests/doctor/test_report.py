"""The report as a browser reads it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from asgi_infer.doctor._report import report
from asgi_infer.doctor._results import Diagnosis

from . import diagnoses

VOID = {"meta", "link", "br", "hr", "img", "input"}
BUILDERS: list[Any] = [
    pytest.param(diagnoses.throttled, marks=pytest.mark.unmeasured),
    diagnoses.noisy,
    diagnoses.one_arm,
    diagnoses.no_calls,
    pytest.param(diagnoses.many_threads, marks=pytest.mark.unmeasured),
    pytest.param(diagnoses.hostile, marks=pytest.mark.unmeasured),
    diagnoses.uncounted,
]


@dataclass
class Page(HTMLParser):
    """A page taken apart; an element that is not closed, or not the last opened, is an error."""

    text: str
    open: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    words: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), tag
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]

    def inside(self, *tags: str) -> list[str]:
        """The texts directly inside of elements of some kinds."""
        return [text for tag, text in self.words if tag in tags]


@functools.cache
def page(builder: Callable[[], Diagnosis]) -> Page:
    """The report of a diagnosis; made once."""
    return Page(report(builder()))


@pytest.mark.parametrize("builder", BUILDERS)
def test_well_formed(builder: Callable[[], Diagnosis]) -> None:
    """Every element is closed, every id is there once, and every picture says what it shows."""
    read = page(builder)
    ids = [
        value for _, attributes in read.tags for name, value in attributes.items() if name == "id"
    ]
    assert len(ids) == len(set(ids))
    pictures = read.all("svg")
    assert pictures
    assert all(each["role"] == "img" and each["aria-label"] for each in pictures)
    headings = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))


@pytest.mark.parametrize("builder", BUILDERS)
def test_needs_nothing_else(builder: Callable[[], Diagnosis]) -> None:
    """No script, no link, no image, no font, no address: the file is all there is."""
    read = page(builder)
    kinds = {tag for tag, _ in read.tags}
    assert kinds.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form"})
    targets = [
        a[name] for _, a in read.tags for name in ("href", "src", "xlink:href") if name in a
    ]
    assert all(str(target).startswith("#") for target in targets)
    assert not re.search(r"https?:|@import|url\((?!#)", read.text)


def test_both_themes_define_the_colours() -> None:
    """Every variable that is used has a value, and each of the pictures' has one for the dark."""
    text = page(diagnoses.throttled).text
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in _themes(text))
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= light
    assert dark == light


def _themes(text: str) -> list[str]:
    return re.findall(r":root \{(.*?)\}", text, re.DOTALL)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme: int) -> None:
    """Text has a contrast of 4.5 with the page at least, and what is drawn one of 2.7."""
    found = dict(re.findall(r"--([\w-]+): (#\w+)", _themes(page(diagnoses.throttled).text)[theme]))
    for role in ("ink", "quiet", "accent", "problem", "advice"):
        for ground in ("page", "raised"):
            assert _contrast(found[role], found[ground]) >= 4.5, role
    for role in ("script", "def", "async-def", "executor", "runner", "runner-retain", "other"):
        assert _contrast(found[role], found["page"]) >= 2.7, role


def _contrast(one: str, other: str) -> float:
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_verdict_comes_first() -> None:
    """The most important finding is the heading, with the lines to write; then the others."""
    read = page(diagnoses.throttled)
    assert read.inside("h1") == [diagnoses.TWO_POOLS.headline]
    assert read.inside("pre")[0].splitlines() == list(diagnoses.TWO_POOLS.lines)
    assert read.inside("h3")[6:8] == [
        diagnoses.LOOP_BLOCKED.headline,
        diagnoses.PAGE_FAULTS.headline,
    ]
    gains = read.inside("dd", "span")
    assert gains[:4] == ["25.0 \u2192", "100", "1313 \u2192", "4.6"]
    assert page(diagnoses.noisy).text.count("\u2192") == 1  # the times say nothing there


def test_figures_are_in_the_table() -> None:
    """All figures stand in the table, those of the sweep too."""
    cells = page(diagnoses.throttled).inside("th", "td")
    start = cells.index("def endpoint")
    assert cells[start : start + 3] == ["def endpoint", "25.0", "0.25x"]
    assert "1313" in cells
    assert "0.80" in cells  # cores with four threads
    assert "quota\nspent" not in cells
    assert "quota\nspent" in page(diagnoses.noisy).inside("th")


@pytest.mark.parametrize(
    ("builder", "count"),
    [
        (diagnoses.throttled, 12),
        (diagnoses.one_arm, 4),
        (diagnoses.no_calls, 10),
        (diagnoses.uncounted, 4),
    ],
)
def test_pictures(builder: Callable[[], Diagnosis], count: int) -> None:
    """One of the threads for each arm, four of the costs, two of the sweep: what was measured."""
    assert len(page(builder).all("svg")) == count


def test_noise_is_said_first() -> None:
    """A busy machine is said to be busy, before the verdict and once."""
    read = page(diagnoses.noisy)
    texts = [text for _, text in read.words]
    assert texts.index(diagnoses.TWO_POOLS.headline) > next(
        place for place, text in enumerate(texts) if "This machine is busy" in text
    )
    assert read.text.lower().count("busy (") == 1
    assert "machine is busy" not in page(diagnoses.throttled).text


def test_names_are_names() -> None:
    """Names from outside are text wherever they come up, and control codes and halves of
    characters do not reach the file."""
    read = page(diagnoses.hostile)
    assert '<script>alert("1")</script> & [bold]$x^2$ ?[31m very_long' in read.inside("h1")[0]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]", read.text)


def test_nothing_found() -> None:
    """Without findings and calls there is still a page, and no gain is claimed."""
    read = page(diagnoses.no_calls)
    assert read.inside("h1") == ["Nothing was found"]
    assert "\u2192" not in read.text


def test_gain_without_health() -> None:
    """A figure that was not measured is not compared, and one that was not counted neither."""
    arms = tuple(replace(arm, health=()) for arm in diagnoses.throttled().arms)
    read = Page(report(replace(diagnoses.throttled(), arms=arms, sweep=())))
    assert read.text.count("\u2192") == 2
    assert page(diagnoses.uncounted).text.count("\u2192") == 2


def test_a_loss_is_no_gain() -> None:
    """Only a figure that changes for the better has the accent's colour."""
    arms = {arm.key: arm for arm in diagnoses.throttled().arms}
    arms["def"] = replace(arms["def"], latencies=arms["runner"].latencies * 2, health=(0.1,) * 30)
    read = Page(report(replace(diagnoses.throttled(), arms=tuple(arms.values()), sweep=())))
    better = [attributes.get("class") for attributes in read.all("dd")[:3]]
    assert better == [None, "better", "better"]


def test_nothing_was_counted() -> None:
    """Where threads can't be counted there are no pictures of them, and no heading for those."""
    assert "Where the cores went" not in page(diagnoses.uncounted).inside("h2")
    assert "Where the cores went" in page(diagnoses.throttled).inside("h2")


@pytest.mark.parametrize(
    ("text", "code"), [("set `a` and `b`", ["a", "b"]), ("it`s", []), ("`<i>`", ["<i>"])]
)
def test_code_in_prose(text: str, code: list[str]) -> None:
    """What stands between backticks in a finding is shown as code, and is still only text."""
    finding = replace(diagnoses.TWO_POOLS, headline="all", detail=text)
    read = Page(report(replace(diagnoses.one_arm(), arms=(), findings=(finding,))))
    around = (
        ["digits.model:Model.predict"],
        ["asgi-infer doctor digits.model:Model --call predict"],
    )
    assert read.inside("code") == [*around[0], *code, *around[1]]
