"""What Matplotlib keeps for good, it fetches before the first test counts what is open."""

from __future__ import annotations

import pytest

from asgi_infer.doctor import _svg


@pytest.fixture(scope="session", autouse=True)
def fonts() -> None:
    """The files of the fonts stay open once they have been used."""
    with _svg.settings():
        plot = _svg.axes(20)
        plot.text(0, 0, "plain")
        plot.text(0, 0, "bold", weight="bold")
        _svg.inline(plot, key="fonts", label="fonts")
