"""Draw what ``python -m benchmarks overload`` has measured, second by second, for a light page and
for a dark one: ``overload.png`` and ``overload-dark.png``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .__main__ import RESULTS
from .overload import DEADLINE, OURS

# The colours of the doctor's report.
LIGHT = {
    "page": "#fdfcfa",
    "ink": "#1b2230",
    "quiet": "#5b626e",
    "line": "#dedad1",
    "track": "#efece5",
    "refused": "#c9c4b8",
    "runner": "#009e73",
    "def": "#d55e00",
    "max_concurrency": "#b7568f",
    "executor": "#c98600",
    "executor, timeout": "#0072b2",
}
DARK = {
    "page": "#12151a",
    "ink": "#e9ebee",
    "quiet": "#a0a8b4",
    "line": "#343c47",
    "track": "#222831",
    "refused": "#4a5461",
    "runner": "#1fb98d",
    "def": "#f07b2b",
    "max_concurrency": "#d68ab6",
    "executor": "#e8a823",
    "executor, timeout": "#4a9fe0",
}

COLUMNS = 4
WIDTH, ROW, HEAD, DPI = 1320.0, 290.0, 104.0, 2.0  # pixels of a page; DPI of them to a point
_LEFT, _GAP = 52.0, 30.0
_MOST = 0.65  # seconds: the top of the latencies

_TITLE = "Twice the load that can be served"
_NOTE = (
    "Above, requests a second as multiples of what each arm can do itself: the line is what came "
    "in, colour is what was\nanswered in time, grey what was refused with a 503 or 504; what is "
    "empty below the line got no answer in time.\nBelow, the latency of the answers from when "
    "each request was due: the median, and the 99th percentile (dotted)."
)


class Drawing:
    """All arms in one colour scheme.

    :param kept: the JSON of the figure
    """

    def __init__(self, kept: Mapping[str, Any], colours: Mapping[str, str]) -> None:
        self._kept, self._colours = kept, colours
        self._arms = [arm for arm in kept["arms"] if any(arm in each for each in kept["series"])]
        rows = math.ceil(len(self._arms) / COLUMNS)
        self._height = HEAD + rows * ROW
        size = (WIDTH / 72, self._height / 72)
        self.figure = Figure(figsize=size, dpi=72 * DPI, facecolor=colours["page"])

    def draw(self) -> None:
        """Everything."""
        self._write(_TITLE, 16, 32, size=17, weight="bold")
        self._write(_NOTE, 16, 44, shade="quiet", size=11.5)
        for place, arm in enumerate(self._arms):
            row, column = divmod(place, COLUMNS)
            x = 16 + column * (WIDTH - 16) / COLUMNS
            self._draw_arm(arm, x, HEAD + row * ROW)

    def _draw_arm(self, arm: str, x: float, y: float) -> None:
        number = self._median_round(arm)
        measured, series = self._kept["rounds"][number][arm], self._kept["series"][number][arm]
        self._write(arm, x, y + 22, weight="bold", size=13)
        good = f"{100 * measured['goodput']:.0f} % of its capacity in time"
        self._write(good, x, y + 41, shade="quiet", size=11)
        self._draw_rates(self._axes(x, y + 54, 106), arm, measured["capacity"], series)
        self._draw_latencies(self._axes(x, y + 176, 72), arm, series)

    def _median_round(self, arm: str) -> int:
        """The round whose goodput is the median one of the arm."""
        series = enumerate(self._kept["series"])
        numbers = [number for number, each in series if arm in each]
        numbers.sort(key=lambda number: float(self._kept["rounds"][number][arm]["goodput"]))
        return numbers[(len(numbers) - 1) // 2]

    def _draw_rates(
        self, plot: Axes, arm: str, capacity: float, series: Mapping[str, Sequence[float]]
    ) -> None:
        def share(name: str) -> list[float]:
            return [value / capacity for value in series[name]]

        good, refused, offered = share("good"), share("refused"), share("offered")
        edges = range(len(good) + 1)
        both = [one + other for one, other in zip(good, refused, strict=True)]
        colours = self._colours
        plot.stairs(both, edges, baseline=good, fill=True, color=colours["refused"], linewidth=0)
        plot.stairs(good, edges, fill=True, color=self._colour(arm), linewidth=0)
        plot.stairs(offered, edges, color=colours["ink"], linewidth=1)
        self._scale(plot, len(good), 2.2, {0: "0", 1: "1", 2: "2\u00d7"})

    def _draw_latencies(
        self, plot: Axes, arm: str, series: Mapping[str, Sequence[float | None]]
    ) -> None:
        for name, style, width in (("p99", ":", 1.2), ("p50", "-", 1.8)):
            values = [math.nan if value is None else value for value in series[name]]
            places = [place + 0.5 for place in range(len(values))]
            plot.plot(places, values, style, color=self._colour(arm), linewidth=width)
        seconds = len(series["p50"])
        self._scale(plot, seconds, _MOST, {0: "0", DEADLINE: f"{1000 * DEADLINE:.0f} ms"})
        edges = [0, round(seconds / 8), round(seconds * 7 / 8), seconds]  # of the phases
        plot.set_xticks(edges, [*map(str, edges[:-1]), f"{seconds} s"])
        first, *_, last = plot.get_xticklabels()
        first.set_horizontalalignment("left")
        last.set_horizontalalignment("right")

    def _scale(self, plot: Axes, seconds: int, most: float, ticks: Mapping[float, str]) -> None:
        plot.set_xlim(0, seconds)
        plot.set_ylim(0, most)
        plot.set_yticks(list(ticks), list(ticks.values()))
        plot.grid(axis="y", color=self._colours["line"], linewidth=1)

    def _axes(self, x: float, y: float, height: float) -> Axes:
        width = (WIDTH - 16) / COLUMNS - _LEFT - _GAP
        left, bottom = (x + _LEFT) / WIDTH, 1 - (y + height) / self._height
        box = (left, bottom, width / WIDTH, height / self._height)
        plot = self.figure.add_axes(box, facecolor=self._colours["track"], axisbelow=True)
        for spine in plot.spines.values():
            spine.set_visible(False)
        plot.set_xticks([])
        plot.tick_params(length=0, labelcolor=self._colours["quiet"], labelsize=10.5)
        return plot

    def _colour(self, arm: str) -> str:
        return self._colours["runner" if arm in OURS else arm]

    def _write(
        self,
        text: str,
        x: float,
        y: float,
        *,
        shade: str = "ink",
        size: float = 12,
        weight: str = "normal",
    ) -> None:
        self.figure.text(
            x / WIDTH,
            1 - y / self._height,
            text,
            color=self._colours[shade],
            fontsize=size,
            fontweight=weight,
            va="top" if "\n" in text else "baseline",
            linespacing=1.45,
        )


def draw(kept: Mapping[str, Any], folder: Path) -> None:
    """Both pictures."""
    for name, colours in (("overload.png", LIGHT), ("overload-dark.png", DARK)):
        with mpl.rc_context():
            mpl.rcdefaults()
            drawing = Drawing(kept, colours)
            drawing.draw()
            drawing.figure.savefig(folder / name, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot_overload", description=__doc__
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "overload.json")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args()
    draw(json.loads(options.results.read_text()), options.folder)


if __name__ == "__main__":
    main()
