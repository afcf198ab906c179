"""A result as a table to read and as JSON to keep."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from typing import Any

from ._figure import Comparison, Metric, Result, Round, Spread, Traced

_PACKAGES = (
    "asgi-infer",
    "anyio",
    "trio",
    "uvloop",
    "httptools",
    "fastapi",
    "uvicorn",
    "numpy",
    "scikit-learn",
    "torch",
    "onnxruntime",
    "lightgbm",
    "loky",
)


def table(result: Result) -> str:
    """The figure as text."""
    figure = result.figure
    lines = [f"{figure.name}: {figure.title}", _noise_line(result), ""]
    lines += _columns(_arm_rows(result))
    if figure.comparisons:
        lines += ["", *_columns(_comparison_rows(result))]
    lines += [""] * bool(result.unavailable)
    lines += [f"{arm} was not measured: {why}" for arm, why in result.unavailable.items()]
    if figure.notes:
        lines += ["", figure.notes]
    return "\n".join(lines)


def as_json(result: Result) -> dict[str, Any]:
    """The figure, with every round of it, for a machine."""
    figure = result.figure
    return {
        "name": figure.name,
        "title": figure.title,
        "arms": {arm: _arm_json(result, arm) for arm in figure.arms},
        "comparisons": [_comparison_json(result, each) for each in figure.comparisons],
        "rounds": result.rounds,
        "series": [_series(each) for each in result.rounds],
        "noise": [asdict(each) for each in result.noise],
        "repeated": result.repeated,
        "unavailable": result.unavailable,
        "machine_busy": any(each.busy for each in result.noise),
        "environment": environment(),
    }


def _series(measured: Round) -> dict[str, Any]:
    """By arm what was measured second by second, where it was."""
    return {arm: each.series for arm, each in measured.items() if isinstance(each, Traced)}


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
        "packages": dict(_versions()),
    }


def _versions() -> Iterable[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"


def _noise_line(result: Result) -> str:
    noise = result.noise
    others = Spread.of([each.others for each in noise])
    busy = sum(each.busy for each in noise)
    verdict = f"BUSY in {busy} of {len(noise)} measurements" if busy else "quiet"
    return (
        f"median (min-max) of {len(result.rounds)} rounds; machine {verdict}: others used "
        f"{_cell(others, 2)} CPUs,\npressure up to {max(each.pressure for each in noise):.0%}, "
        f"stolen up to {max(each.stolen for each in noise):.2f} CPUs; "
        f"{result.repeated} measurements repeated because others were busy"
    )


def _arm_rows(result: Result) -> list[list[str]]:
    metrics = result.figure.metrics
    rows = [["arm", *(metric.label for metric in metrics)]]
    for arm in result.figure.arms:
        rows.append([arm, *(_arm_cell(result, arm, metric) for metric in metrics)])
    return rows


def _arm_cell(result: Result, arm: str, metric: Metric) -> str:
    spread = result.spread(arm, metric.key)
    return "-" if spread is None else _cell(spread, metric.digits)


def _comparison_rows(result: Result) -> list[list[str]]:
    rows = [["compared, round by round", "measured", "to reach", "reached"]]
    for comparison in result.figure.comparisons:
        spread, reached = _compare(result, comparison)
        verdict = "-" if reached is None else ("yes" if reached else "NO")
        cell = "-" if spread is None else _cell(spread, 2)
        rows.append([_comparison_name(result, comparison), cell, comparison.target, verdict])
    return rows


def _compare(result: Result, comparison: Comparison) -> tuple[Spread | None, bool | None]:
    """What was measured, and whether that is what was to be reached."""
    spread = result.compare(comparison)
    return spread, None if spread is None else comparison.reached(spread.median)


def _comparison_name(result: Result, comparison: Comparison) -> str:
    subject = comparison.arm
    if comparison.against is not None:
        subject += f" / {comparison.against}"
    return f"{result.figure.label(comparison.metric)}: {subject}"


def _cell(spread: Spread, digits: int) -> str:
    low, high = f"{spread.low:.{digits}f}", f"{spread.high:.{digits}f}"
    around = "" if low == high else f" ({low}-{high})"
    return f"{spread.median:.{digits}f}{around}"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    lines = ["  ".join(cells).rstrip() for cells in padded]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _arm_json(result: Result, arm: str) -> dict[str, Any]:
    spreads = {each.key: result.spread(arm, each.key) for each in result.figure.metrics}
    return {key: asdict(spread) for key, spread in spreads.items() if spread is not None}


def _comparison_json(result: Result, comparison: Comparison) -> dict[str, Any]:
    spread, reached = _compare(result, comparison)
    measured = None if spread is None else asdict(spread)
    return {**asdict(comparison), "measured": measured, "reached": reached}
