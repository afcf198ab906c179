"""Figures and names as people read them."""

from __future__ import annotations

NONE = "-"


def number(value: float) -> str:
    """With as many digits as say something: ``1313``, ``87.5``, ``0.04``."""
    if not value:
        return "0"
    if value < 1:
        return f"{value:.2f}"
    if value < 99.95:
        return f"{value:.1f}"
    return f"{value:.0f}" if value < 9999.5 else f"{value:,.0f}"


def duration(value: float | None) -> str:
    """Seconds, as ``0.42 ms``, ``12 ms`` or ``1.3 s``."""
    if value is None:
        return NONE
    if value >= 0.9995:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-4 else f"{value * 1e3:.2f} ms"


def share(part: float, whole: float) -> str:
    """As ``42 %``."""
    return f"{100 * part / whole:.0f} %" if whole > 0 else NONE


def plural(count: int, thing: str) -> str:
    """As ``1 thread`` or ``2 threads``."""
    return f"{count} {thing}{'s' * (count != 1)}"


def plain(text: str) -> str:
    """Text from outside in one line, without what could control a terminal or break a page."""
    return code(" ".join(text.split()))


def code(line: str) -> str:
    """The same with all of its spaces: a line of code."""
    return "".join(each if each.isprintable() else "?" for each in line.expandtabs(4))
