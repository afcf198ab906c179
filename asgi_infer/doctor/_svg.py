"""Matplotlib's figures as SVG inside a page, in the page's own font and colours.

Nothing of it is global: no pyplot, no display, and Matplotlib's settings are as they were
afterwards, whatever the user's are.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import matplotlib as mpl
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 328.0
"""Of each picture, in CSS pixels: a phone's without its margins, so that no text shrinks there."""
TEXT = 12.0

ROLES = (
    "page",
    "ink",
    "quiet",
    "line",
    "track",
    *("script", "def", "async-def", "executor", "runner", "runner-retain", "other"),
)
"""The page's colours: it defines a CSS variable for each, once for light and once for dark."""
# Matplotlib draws with these, which nobody would choose, and the page's take their place.
COLOURS = {role: f"#{0xA1B2C0 + number:06x}" for number, role in enumerate(ROLES)}

SETTINGS: dict[Any, str | float] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "asgi_infer",  # the same figure is the same text
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": TEXT,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["line"],
    "axes.linewidth": 1.0,
    "xtick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["quiet"],
    "ytick.labelcolor": COLOURS["ink"],
}


@contextmanager
def settings() -> Iterator[None]:
    """Matplotlib's own settings with ours on top: for drawing and for rendering."""
    with mpl.rc_context(), warnings.catch_warnings():
        # The reader's browser has the glyph, even where Matplotlib's font hasn't.
        warnings.filterwarnings("ignore", "Glyph")
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        yield


def axes(height: float, *, left: float = 0, right: float = 0, bottom: float = 0) -> Axes:
    """A figure of that height with one plot in it, without frame and ticks; all in pixels."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - bottom / height)
    plot = figure.add_axes(box)
    for spine in plot.spines.values():
        spine.set_visible(False)
    plot.set_xticks([])
    plot.set_yticks([])
    return plot


def inline(plot: Axes, *, key: str, label: str) -> str:
    """The plot's figure as an ``<svg>`` element.

    :param key: unique in the page: ids in the element begin with it.
    :param label: what the picture says, in words, for those who cannot see it.
    """
    target = io.StringIO()
    figure = cast("Figure", plot.figure)
    figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    svg = target.getvalue()
    drawn = _for_page(svg[svg.index("<g ") : svg.rindex("</svg>")], key)
    size = f'viewBox="0 0 {WIDTH:g} {figure.get_figheight() * 72:g}"'
    return f'<svg role="img" aria-label="{escape(label)}" {size}>{drawn}</svg>'


def _for_page(svg: str, key: str) -> str:
    referred = set(re.findall(r'(?:url\(|href=")#(\w+)', svg))

    def keep(match: re.Match[str]) -> str:
        return f' id="{key}-{match[1]}"' if match[1] in referred else ""

    svg = re.sub(r' id="([^"]*)"', keep, svg)
    svg = re.sub(r"url\(#", f"url(#{key}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{key}-', svg)
    svg = re.sub(r" font-family: [^;\"]*;?| ?transform=\"rotate\(-0 [^)]*\)\"", "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for role, colour in COLOURS.items():
        svg = re.sub(f"(fill|stroke): {colour}", rf"\1: var(--{role})", svg)
    return svg
