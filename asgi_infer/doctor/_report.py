"""The diagnosis as one HTML file, to be forwarded to somebody who has never heard of all this."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from . import _charts
from ._figures import ARMS, columns, noise, of_sweep, target, verdicts, where
from ._results import Diagnosis
from ._svg import settings
from ._text import code, duration, number, plain, plural

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A figure that changes from the usual endpoint to the runner."""

    name: str
    before: float
    after: float
    text: Callable[[float], str] = number
    more_is_better: bool = False

    @property
    def better(self) -> bool:
        """Whether it changes for the better."""
        return self.after != self.before and (self.after > self.before) == self.more_is_better


def report(diagnosis: Diagnosis) -> str:
    """Render the report.

    It needs nothing but itself: no network, no script, no font.

    :param diagnosis: what was measured.
    :returns: an HTML document, which UTF-8 can encode.
    """
    counted = diagnosis.machine.counted
    with settings():
        page = _template().render(
            diagnosis=diagnosis,
            findings=verdicts(diagnosis),
            noise=noise(diagnosis.machine) if diagnosis.machine.noisy else "",
            target=target(diagnosis),
            title=lambda arm: plain(arm.title),
            of_sweep=of_sweep,
            clients=plural(diagnosis.clients, "client"),
            where=where(diagnosis.machine),
            gains=list(_gains(diagnosis)),
            columns=columns(diagnosis),
            sweep_columns=[column for column in columns(diagnosis) if column.sweep],
            meanings=[(arm.title, ARMS[arm.key]) for arm in diagnosis.arms if arm.key in ARMS],
            threads=_charts.threads(diagnosis.arms) if counted else [],
            costs=_charts.costs(diagnosis.arms, counted=counted),
            sweep=list(_charts.sweep(diagnosis.sweep, counted=counted)),
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


def _gains(diagnosis: Diagnosis) -> Iterator[Gain]:
    """Times where the machine was quiet, and counts where there are any."""
    machine, usual, runner = diagnosis.machine, diagnosis.arm("def"), diagnosis.arm("runner")
    if usual is None or runner is None or not usual.calls or not runner.calls:
        return
    if not machine.noisy:
        yield Gain(
            name="calls per second",
            before=usual.calls_per_second,
            after=runner.calls_per_second,
            more_is_better=True,
        )
    if machine.counted:
        before, after = usual.switches_per_call, runner.switches_per_call
        yield Gain(name="sleeps per call", before=before, after=after)
    waits = usual.health_p99, runner.health_p99
    if not machine.noisy and waits[0] is not None and waits[1] is not None:
        name = "/health, 99th percentile"
        yield Gain(name=name, before=waits[0], after=waits[1], text=duration)
