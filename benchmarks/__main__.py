"""Measure the runner against its alternatives, print tables, keep the figures as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import (
    batching,
    digits,
    full_cpu,
    handoff,
    isolation,
    million,
    overload,
    stream,
    watch,
    web,
)
from ._children import ROOT
from ._figure import FULL, QUICK, Benchmark, Figure
from ._report import as_json, table

SETS: dict[str, Sequence[Figure]] = {
    "default": [
        *handoff.FIGURES,
        *watch.FIGURES,
        *digits.FIGURES,
        *web.FIGURES,
        *million.FIGURES,
    ],
    "full-cpu": full_cpu.FIGURES,
    "flow": [*overload.FIGURES, *batching.FIGURES, *stream.FIGURES],
    "isolation": isolation.FIGURES,
}
_PATIENCE = (
    "seconds, for each figure, to wait for other processes to be quiet, and to repeat what they "
    "have spoilt (default: %(default)s)"
)
RESULTS = ROOT / "benchmarks" / "results"


def chosen(names: Sequence[str], of_set: str = "default") -> list[Figure]:
    """The figures of these names; ``handoff`` stands for every ``handoff-...``.

    :param of_set: without a name, all of this set
    :raises SystemExit: there is none of a name
    """
    figures = [figure for each in SETS.values() for figure in each]
    for name in names:
        if not any(_matches(figure, name) for figure in figures):
            known = ", ".join(figure.name for figure in figures)
            raise SystemExit(f"there is no figure {name!r}: choose from {known}")
    if not names:
        return list(SETS[of_set])
    return [figure for figure in figures if any(_matches(figure, name) for name in names)]


def _matches(figure: Figure, name: str) -> bool:
    return figure.name == name or figure.name.startswith(f"{name}-")


def write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("figures", nargs="*", metavar="NAME", help="by default a whole set")
    parser.add_argument("--set", choices=SETS, default="default", help="by default: %(default)s")
    parser.add_argument("--rounds", type=int, help="for every figure; each has its own default")
    parser.add_argument("--quick", action="store_true", help="a first look, not to be quoted")
    parser.add_argument("--json", type=Path, help="write all figures to this file as well")
    parser.add_argument("--patience", type=float, default=60.0, help=_PATIENCE)
    options = parser.parse_args(arguments)
    scale = QUICK if options.quick else FULL
    everything = []
    for figure in chosen(options.figures, options.set):
        benchmark = Benchmark(figure, scale, patience=options.patience)
        result = benchmark.run(options.rounds)
        print(f"\n{table(result)}\n", flush=True)
        everything.append(as_json(result))
        write(RESULTS / f"{figure.name}.json", everything[-1])
    if options.json is not None:
        write(options.json, everything)


if __name__ == "__main__":
    main()
