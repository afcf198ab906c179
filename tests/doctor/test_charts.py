"""The pictures, and what they say in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from asgi_infer.doctor import _charts
from asgi_infer.doctor._charts import Picture
from asgi_infer.doctor._results import Arm, ThreadTrace
from asgi_infer.doctor._svg import COLOURS, settings

from . import diagnoses


@pytest.fixture(autouse=True)
def drawing() -> Iterator[None]:
    """As the report draws them."""
    with settings():
        yield


def arm_of(*threads: ThreadTrace, key: str = "runner") -> Arm:
    """An arm with those threads."""
    return diagnoses.arm(key, 10, switches=1, threads=threads)


def words(picture: Picture) -> list[str]:
    """All that is written in a picture."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", picture.svg)


def said(picture: Picture) -> str:
    """What a picture says to those who cannot see it."""
    return picture.svg.partition('aria-label="')[2].partition('"')[0]


def steady(share: float, *, python: str | None = None, intervals: int = 10) -> ThreadTrace:
    """A thread with the same use all the time."""
    return ThreadTrace(name="native", python=python, cpu=(share,) * intervals)


def heights(picture: Picture) -> list[float]:
    """Of the strips: of each its track and then what is filled, in pixels."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--', picture.svg)
    points = [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)] for path in paths]
    return [round(max(ys) - min(ys), 1) for ys in points]


def test_strip_for_each_thread() -> None:
    """Threads of the model come first, then the event loop's; idle ones are left out."""
    threads = (steady(0.04, python="MainThread"), steady(0.5), steady(0.0))
    (picture,) = _charts.threads([arm_of(*threads, steady(1, python="AnyIO worker thread"))])
    labels = ["AnyIO worker", "native thread", "event loop"]
    assert [word for word in words(picture) if word in labels] == labels
    assert picture.note == "2 threads, 75\u00a0% each"
    assert "AnyIO worker 100\u00a0%; native thread 50\u00a0%; event loop 4\u00a0%" in said(picture)


def test_strips_have_one_scale() -> None:
    """Full height is one CPU, in every strip and picture."""
    arms = [arm_of(steady(1), steady(0.5)), arm_of(steady(0.25))]
    first, second = map(heights, _charts.threads(arms))
    track = first[0]
    assert first == pytest.approx([track, track, track, track / 2], abs=0.1)
    assert second == pytest.approx([track, track / 4], abs=0.1)


def test_loop_that_runs_the_model() -> None:
    """Where the model runs on the event loop the strip says so, and it counts as the model's."""
    (picture,) = _charts.threads([arm_of(steady(1, python="MainThread"), key="async-def")])
    assert "loop and model" in words(picture)
    assert picture.note == "1 thread, 100\u00a0% each"


def test_many_threads_share_a_strip() -> None:
    """Of many threads the busiest have strips of their own, and the others one together."""
    pictures = _charts.threads(diagnoses.many_threads().arms)
    assert all("57 others, mean" in words(picture) for picture in pictures)
    assert all(picture.note.startswith("64 threads, 51") for picture in pictures)


@pytest.mark.parametrize(("count", "strips"), [(8, 8), (9, 8)])
def test_most_strips(count: int, strips: int) -> None:
    """No strip stands for others while there is room for each."""
    (picture,) = _charts.threads([arm_of(*[steady(0.5)] * count)])
    assert words(picture).count("50\u00a0%") == strips
    assert ("2 others, mean" in words(picture)) == (count > strips)


def test_long_traces_are_condensed() -> None:
    """A long measurement is no larger a picture than a short one, and says the same."""
    short, long = (
        _charts.threads([arm_of(steady(0.5, intervals=count))])[0] for count in (90, 9000)
    )
    assert len(long.svg) < 1.2 * len(short.svg)
    assert "50\u00a0%" in words(short)
    assert "50\u00a0%" in words(long)


def test_no_thread_was_seen() -> None:
    """Without threads there is an empty picture, which says so."""
    (picture,) = _charts.threads([arm_of()])
    assert picture.note == "no busy thread was seen"
    assert words(picture) == []


def test_costs_are_labelled_directly() -> None:
    """Each bar and strip has its arm's name and its figures written beside it."""
    speed, sleeps, calls, health = _charts.costs(diagnoses.throttled().arms)
    assert words(speed)[:4] == ["script", "100", "def endpoint", "25.0"]
    assert words(sleeps)[2:4] == ["def endpoint", "1313"]
    assert "script" in words(calls)
    assert "script" not in words(health)  # which has no server
    assert "def endpoint 25.0; async def endpoint 90.0" in said(speed)


def test_scale_of_latencies() -> None:
    """A narrow scale has ticks within its decade, a wide one only at the decades."""
    arm = arm_of()
    narrow, wide = (
        _charts.costs([replace(arm, latencies=latencies)])[2]
        for latencies in ((0.015, 0.06), (0.0005, 0.5))
    )
    assert words(narrow)[:2] == ["20 ms", "50 ms"]
    assert words(wide)[:3] == ["1 ms", "10 ms", "100 ms"]


def test_zero_latency_has_a_place() -> None:
    """A clock that stood still does not break the logarithmic scale."""
    picture = _charts.costs([replace(arm_of(), latencies=(0.0,) * 20)])[2]
    assert "0 ms, 0 ms" in " ".join(words(picture)).replace("0.00", "0")


def test_nothing_measured_no_picture() -> None:
    """There is no picture of latencies where there are none, and none of a sweep without one."""
    titles = [picture.title for picture in _charts.costs(diagnoses.no_calls().arms)]
    assert titles == ["Calls per second", "Sleeps per call"]
    assert list(_charts.sweep([])) == []


def test_nothing_counted_no_picture() -> None:
    """Where threads can't be counted there is no picture of sleeps, and none of CPUs."""
    diagnosis = diagnoses.uncounted()
    titles = [picture.title for picture in _charts.costs(diagnosis.arms, counted=False)]
    assert "Sleeps per call" not in titles
    (speed,) = _charts.sweep(diagnosis.sweep, counted=False)
    assert speed.title == "Calls per second, by native threads"


def test_few_calls_have_no_p99() -> None:
    """Of a few calls only the median is drawn and told."""
    few, many = (
        _charts.costs([replace(arm_of(), latencies=(0.02,) * count)])[2] for count in (19, 20)
    )
    assert "20 ms, -" in words(few)
    assert "20 ms, 20 ms" in words(many)


def test_sweep() -> None:
    """The sweep shows calls and cores for each number of threads, and names the best."""
    speed, cores = _charts.sweep(diagnoses.throttled().sweep)
    assert words(speed) == ["57.0", "100", "30.7", "1", "2", "4"]
    assert words(cores)[:3] == ["0.99", "1.0", "0.80"]
    assert speed.note == "The most comes out with 2."


def test_colours_of_arms() -> None:
    """The runner has the accent in all pictures, in the sweep too, and no two arms share one."""
    assert _charts.colour(arm_of(key="runner")) == COLOURS["runner"]
    assert _charts.colour(arm_of(key="threads-4")) == COLOURS["runner"]
    assert _charts.colour(arm_of(key="something new")) == COLOURS["other"]
    arms = diagnoses.throttled().arms
    assert len({_charts.colour(arm) for arm in arms}) == len(arms)


def test_long_names_are_cut() -> None:
    """Names that would run into the figures are cut short in the picture, but not in its words."""
    arm = replace(arm_of(), title="a" * 100)
    picture = _charts.costs([arm])[0]
    assert "a" * 29 + "\u2026" in words(picture)
    assert "a" * 100 in said(picture)
