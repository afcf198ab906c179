"""Figures as SVG inside a page."""

from __future__ import annotations

import re

import matplotlib as mpl
import pytest

from asgi_infer.doctor import _svg


def drawn(key: str, text: str = "label") -> str:
    """A small picture with all that makes ids: a clipped line, a marker, text."""
    with _svg.settings():
        plot = _svg.axes(100, left=20, right=20, bottom=20)
        plot.plot([0, 1], [0, 2], "o-", color=_svg.COLOURS["runner"])
        plot.text(0, 0, text)
        return _svg.inline(plot, key=key, label=text)


def test_colours_are_the_page_s() -> None:
    """Every colour is a variable of the page, so that it turns with it from light to dark."""
    svg = drawn("a")
    assert "stroke: var(--runner)" in svg
    assert "fill: var(--ink)" in svg
    assert not re.findall(r"#[0-9a-f]{6}", svg)


def test_ids_belong_to_one_picture() -> None:
    """Two pictures share no id, and every reference has its target in the same picture."""
    ids = [set(re.findall(r' id="([^"]+)"', drawn(key))) for key in ("a", "b")]
    assert ids[0]
    assert ids[0].isdisjoint(ids[1])
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', drawn("a"))) == ids[0]


def test_text_is_text() -> None:
    """Text is in the page's own font, large enough, and never markup or mathematics."""
    svg = drawn("a", '$x^2$ <script> "&" \u4e2d')
    assert '$x^2$ &lt;script&gt; "&amp;" \u4e2d</text>' in svg
    assert 'aria-label="$x^2$ &lt;script&gt; &#34;&amp;&#34; \u4e2d"' in svg
    assert "font-family" not in svg
    assert min(map(float, re.findall(r"font-size: ([\d.]+)px", svg))) >= 11


def test_same_figure_same_text() -> None:
    """The same figure gives the same text, and nothing in it points elsewhere."""
    assert drawn("a") == drawn("a")
    assert "http" not in drawn("a")


def test_user_s_settings_are_left_alone() -> None:
    """The user's own settings of Matplotlib have no say in it, and are as they were afterwards."""
    with mpl.rc_context({"text.usetex": True, "font.size": 3}):
        with pytest.raises(ZeroDivisionError), _svg.settings():
            assert not mpl.rcParams["text.usetex"]
            assert mpl.rcParams["font.size"] == _svg.TEXT
            raise ZeroDivisionError
        assert mpl.rcParams["text.usetex"]
        assert mpl.rcParams["font.size"] == 3
