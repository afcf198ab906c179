"""The diagnosis as one HTML file, to be forwarded to somebody who has never heard of all this."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from . import _charts
from ._figures import (
    ARMS,
    NONE,
    code,
    columns,
    counted,
    duration,
    noise,
    number,
    of_sweep,
    plain,
    target,
    verdicts,
    where,
)
from ._results import Arm, Diagnosis
from ._svg import settings

GAINS: dict[str, Callable[[Arm], str]] = {
    "calls per second": lambda arm: number(arm.calls_per_second),
    "sleeps per call": lambda arm: number(arm.switches_per_call),
    "/health, 99th percentile": lambda arm: duration(arm.health_latency(99)),
}
COUNTED = {"sleeps per call"}
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def report(diagnosis: Diagnosis) -> str:
    """Render the report.

    It needs nothing but itself: no network, no script, no font.

    :param diagnosis: what was measured.
    :returns: an HTML document, which UTF-8 can encode.
    """
    with settings():
        page = _template().render(
            diagnosis=diagnosis,
            findings=verdicts(diagnosis),
            noise=noise(diagnosis.machine) if diagnosis.machine.noisy else "",
            target=target(diagnosis),
            title=lambda arm: plain(arm.title),
            of_sweep=of_sweep,
            clients=counted(diagnosis.clients, "client"),
            where=where(diagnosis.machine),
            gains=_gains(diagnosis),
            columns=columns(diagnosis),
            sweep_columns=[column for column in columns(diagnosis) if column.sweep],
            meanings=[(arm.title, ARMS[arm.key]) for arm in diagnosis.arms if arm.key in ARMS],
            threads=_charts.threads(diagnosis.arms),
            costs=_charts.costs(diagnosis.arms),
            sweep=_charts.sweep(diagnosis.sweep),
        )
    return page.encode(errors="replace").decode()


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(plain=plain, code=code, words=_words)
    return environment.from_string(TEMPLATE.read_text("utf-8"))


def _words(text: str) -> Markup:
    """Prose, in which `code` is code."""
    parts = plain(text).split("`")
    if len(parts) % 2 == 0:  # one of them is not a quotation mark
        return escape(plain(text))
    tag = Markup("<code>{}</code>")
    return Markup("").join(tag.format(p) if n % 2 else p for n, p in enumerate(parts))


def _gains(diagnosis: Diagnosis) -> list[tuple[str, str, str]]:
    """What changes from the usual endpoint to the runner: the figure, before, and after.

    On a busy machine that is only what was counted.
    """
    before, after = diagnosis.arm("def"), diagnosis.arm("runner")
    if before is None or after is None or not before.calls or not after.calls:
        return []
    told = COUNTED if diagnosis.machine.noisy else GAINS.keys()
    gains = [(name, figure(before), figure(after)) for name, figure in GAINS.items()]
    return [gain for gain in gains if gain[0] in told and NONE not in gain]
