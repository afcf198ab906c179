"""The pictures of the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from ._figures import is_loop, model_threads, of_sweep
from ._results import Arm, ThreadTrace, p99, percentile
from ._svg import COLOURS, ROLES, axes, inline
from ._text import NONE, duration, number, plain, plural, share

ROW = 44.0
"""Pixels for each arm: a line of text and what is drawn below it."""
THREAD_ROW = 30.0
MOST_ROWS = 8
AXIS = 24.0
CURVE = 130.0
LONGEST_ARM = 30
LONGEST_THREAD = 15
MOST_INTERVALS = 90
MOST_CALLS = 100


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture and the words around it."""

    title: str
    note: str
    """What to look for, or what is to be seen."""
    svg: str


def colour(arm: Arm) -> str:
    """The same for each arm in all pictures, and the page's accent for the runner."""
    if arm.native_threads:
        return COLOURS["runner"]
    return COLOURS[arm.key if arm.key in ROLES else "other"]


def shortened(text: str, longest: int) -> str:
    """A name in one line of limited length."""
    text = plain(text)
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}\u2026"


# -- threads -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thread's strip, or that of all the threads for which there is no room."""

    label: str
    cpu: Sequence[float]
    loop: bool


def threads(arms: Sequence[Arm]) -> list[Picture]:
    """For each arm what ``htop`` would have shown: the use of a CPU by each thread, over time."""
    seconds = max((arm.interval * len(t.cpu) for arm in arms for t in arm.threads), default=0)
    return [
        _thread_picture(arm, _thread_rows(arm), seconds=seconds or 1, key=f"threads-{index}")
        for index, arm in enumerate(arms)
    ]


def _thread_picture(arm: Arm, rows: Sequence[Row], *, seconds: float, key: str) -> Picture:
    busy = model_threads(arm)
    each = _percent(_mean([thread.use for thread in busy]))
    note = f"{plural(len(busy), 'thread')}, {each} each" if busy else "no busy thread was seen"
    height = max(1, len(rows)) * THREAD_ROW
    plot = axes(height + AXIS, left=112, right=44, bottom=AXIS)
    _draw_threads(plot, arm, rows, seconds)
    plot.set_ylim(max(1, len(rows)), 0)
    title = plain(arm.title)
    strips = "; ".join(f"{row.label} {_percent(_mean(row.cpu))}" for row in rows)
    label = f"CPU use of each thread over time, {title}: {note}. {strips}"
    return Picture(title=title, note=note, svg=inline(plot, key=key, label=label))


def _draw_threads(plot: Axes, arm: Arm, rows: Sequence[Row], seconds: float) -> None:
    for index, row in enumerate(rows):
        base, full = index + 0.88, 0.76
        plot.barh(base - full / 2, seconds, height=full, color=COLOURS["track"])
        values = _condensed(row.cpu)
        width = arm.interval * len(row.cpu) / max(1, len(values))
        plot.stairs(
            [base - full * min(1, value) for value in values],
            [width * each for each in range(len(values) + 1)],
            baseline=base,
            fill=True,
            color=colour(arm),
            alpha=0.45 if row.loop else 1,
            linewidth=0,
        )
        y = base - full / 2
        _write(plot, row.label, x=-0.05, y=y, align="right", shade="quiet")
        _write(plot, _percent(_mean(row.cpu)), x=1.25, y=y, align="right")
    plot.set_xlim(0, seconds)
    if rows:
        _tick(plot, [0, seconds], ["0 s", f"{seconds:.3g} s"])


def _thread_rows(arm: Arm) -> list[Row]:
    model = model_threads(arm)
    room = MOST_ROWS - 1 if len(model) > MOST_ROWS else MOST_ROWS
    rows = [Row(label=_thread_label(arm, t), cpu=t.cpu, loop=False) for t in model[:room]]
    others = [thread.cpu for thread in model[room:]]
    if others:
        means = [_mean(values) for values in zip(*others, strict=False)]
        rows.append(Row(label=f"{len(others)} others, mean", cpu=means, loop=False))
    loops = (t for t in arm.threads if is_loop(arm, t) and t not in model)
    return rows + [Row(label="event loop", cpu=thread.cpu, loop=True) for thread in loops]


def _thread_label(arm: Arm, thread: ThreadTrace) -> str:
    if is_loop(arm, thread):
        return "loop and model"
    if thread.python == "MainThread":
        return "main thread"
    if thread.python is None:
        return "native thread"
    return shortened(thread.python.removesuffix(" thread"), LONGEST_THREAD)


def _condensed(values: Sequence[float]) -> Sequence[float]:
    """At most so many as there is room for, each the mean of its neighbours."""
    step = math.ceil(len(values) / MOST_INTERVALS)
    return [_mean(values[each : each + step]) for each in range(0, len(values), step or 1)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _percent(part: float) -> str:
    return share(part, 1).replace(" ", "\u00a0")


# -- one row for each arm ----------------------------------------------------------------------


def costs(arms: Sequence[Arm], *, counted: bool = True) -> list[Picture]:
    """What each way to run the model costs: throughput, sleeps if counted, latencies."""
    sleeps = [(arm, arm.switches_per_call if arm.calls else None) for arm in arms]
    return [
        *_bars(
            "Calls per second",
            "What comes out. Longer is better.",
            [(arm, arm.calls_per_second) for arm in arms],
        ),
        *_bars(
            "Sleeps per call",
            "How often a thread gives its CPU up inside of a call. Shorter is better.",
            sleeps if counted else [],
        ),
        *_spread(
            "Latency of the calls",
            "Each call is a stroke. The full dot and the first figure are the median, the empty "
            "dot and the second figure the 99th percentile.",
            [(arm, arm.latencies) for arm in arms if arm.latencies],
        ),
        *_spread(
            "Latency of /health meanwhile",
            "How long the event loop keeps everybody else waiting: median, 99th percentile.",
            [(arm, arm.health) for arm in arms if arm.health],
        ),
    ]


def _bars(title: str, note: str, bars: Sequence[tuple[Arm, float | None]]) -> Iterator[Picture]:
    if not bars:  # nothing was counted
        return
    plot = axes(len(bars) * ROW)
    longest = max((value or 0 for _, value in bars), default=0) or 1
    said = [(arm, NONE if value is None else number(value)) for arm, value in bars]
    for index, (arm, value) in enumerate(bars):
        plot.barh(index * ROW + 29, longest, height=8, color=COLOURS["track"])
        plot.barh(index * ROW + 29, value or 0, height=8, color=colour(arm))
    plot.set_xlim(0, longest)
    yield _named(plot, title, note, said)


def _spread(
    title: str, note: str, rows: Sequence[tuple[Arm, Sequence[float]]]
) -> Iterator[Picture]:
    if not rows:  # nobody was asked, or nobody answered
        return
    plot = axes(len(rows) * ROW + AXIS, bottom=AXIS)
    _logarithmic(plot, [value for _, values in rows for value in values])
    for index, (arm, values) in enumerate(rows):
        _draw_spread(plot, index * ROW + 32, sorted(values), colour(arm))
    said = [
        (arm, f"{duration(percentile(values, 50))}, {duration(p99(values))}")
        for arm, values in rows
    ]
    yield _named(plot, title, note, said)


def _draw_spread(plot: Axes, y: float, values: Sequence[float], shade: str) -> None:
    plot.axhline(y, color=COLOURS["line"], linewidth=1)
    strokes = [x for each in _thinned(values) for x in (each, each, math.nan)]
    ends = [y - 5, y + 5, math.nan] * (len(strokes) // 3)
    plot.plot(strokes, ends, color=shade, alpha=0.5, linewidth=1)
    for at, fill in ((percentile(values, 50), shade), (p99(values), COLOURS["page"])):
        dot = [] if at is None else [at]
        place = [y] * len(dot)
        plot.plot(dot, place, "o", color=shade, markerfacecolor=fill, markersize=9, mew=2)


def _thinned(values: Sequence[float]) -> Iterator[float]:
    """Evenly among the sorted ones, with the first and the last."""
    count = min(len(values), MOST_CALLS)
    return (values[round(each * (len(values) - 1) / max(1, count - 1))] for each in range(count))


def _named(plot: Axes, title: str, note: str, said: Sequence[tuple[Arm, str]]) -> Picture:
    """Above what is drawn for it each arm's name, and at the end of the line the figure."""
    for index, (arm, value) in enumerate(said):
        _write(plot, shortened(arm.title, LONGEST_ARM), y=index * ROW + 13)
        _write(plot, value, y=index * ROW + 13, x=1, align="right", weight="bold")
    plot.set_ylim(len(said) * ROW, 0)
    words = "; ".join(f"{plain(arm.title)} {value}" for arm, value in said)
    svg = inline(plot, key=_key(title), label=f"{title}: {words}")
    return Picture(title=title, note=note, svg=svg)


def _logarithmic(plot: Axes, values: Sequence[float]) -> None:
    least = max(1e-6, min(values))
    low, high = least / 1.25, max(2 * least, *values) * 1.25
    plot.set_xscale("log")
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    steps = (1, 2, 5) if math.log10(high / low) < 1.7 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    plot.xaxis.set_major_locator(NullLocator())
    plot.xaxis.set_minor_locator(NullLocator())
    plot.set_xlim(low, high)
    _tick(plot, ticks, [duration(tick) for tick in ticks])


# -- the sweep ---------------------------------------------------------------------------------


def sweep(arms: Sequence[Arm], *, counted: bool = True) -> Iterator[Picture]:
    """The runner with one native thread, with two ...: what comes out, and the cores it takes."""
    if not arms:
        return
    best = max(arms, key=lambda arm: arm.calls_per_second)
    yield _curve(
        "Calls per second, by native threads",
        f"The most comes out with {of_sweep(best)}.",
        [(arm, arm.calls_per_second) for arm in arms],
    )
    if counted:
        yield _curve(
            "Cores used, by native threads",
            "More cores are worth it only where more calls come out.",
            [(arm, arm.cores_used) for arm in arms],
        )


def _curve(title: str, note: str, points: Sequence[tuple[Arm, float]]) -> Picture:
    plot = axes(CURVE + AXIS, left=28, right=28, bottom=AXIS)
    values = [value for _, value in points]
    plot.plot(values, "o-", color=COLOURS["runner"], markersize=8, linewidth=2, clip_on=False)
    plot.set_xlim(0, max(1, len(values) - 1))
    highest = max(values) or 1
    plot.set_ylim(0, 1.3 * highest)
    plot.axhline(0, color=COLOURS["line"], linewidth=1)
    for place, value in enumerate(values):
        plot.text(place, value + 0.1 * highest, number(value), ha="center", weight="bold")
    _tick(plot, range(len(values)), [of_sweep(arm) for arm, _ in points], align="center")
    words = "; ".join(f"{of_sweep(arm)} {number(value)}" for arm, value in points)
    return Picture(title=title, note=note, svg=inline(plot, key=_key(title), label=words))


# -- common ------------------------------------------------------------------------------------


def _write(
    plot: Axes,
    text: str,
    *,
    x: float = 0,
    y: float,
    align: Literal["left", "right"] = "left",
    shade: str = "ink",
    weight: str = "normal",
) -> None:
    """Text at a height of the data's and a part of the plot's width."""
    place = plot.get_yaxis_transform()
    style = {"color": COLOURS[shade], "weight": weight}
    plot.text(x, y, text, style, transform=place, ha=align, va="center")


def _tick(plot: Axes, places: Sequence[float], labels: Sequence[str], align: str = "") -> None:
    """Name places below the plot; what is at an end of it stays within it."""
    for place, label in zip(places, labels, strict=True):
        pixel = plot.transData.transform((place, 0))
        x = plot.transAxes.inverted().transform(pixel)[0]
        side = align or ("left" if x < 0.06 else "right" if x > 0.94 else "center")
        plot.annotate(
            label,
            (x, 0),
            xycoords="axes fraction",
            xytext=(0, -6),
            textcoords="offset pixels",
            ha=side,
            va="top",
            color=COLOURS["quiet"],
        )


def _key(title: str) -> str:
    return "-".join(title.replace("/", "").replace(",", "").lower().split())
