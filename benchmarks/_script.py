"""The model alone, in a loop on the main thread of a script: what every server is held against."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ._children import answer
from ._models import loader, warm_up


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._script")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    model = loader(options.model)()
    warm_up(model)
    answer(event="ready")
    if not sys.stdin.readline():
        return  # the parent is gone
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < options.seconds:
        model.predict()
        calls += 1
    answer(calls=calls, seconds=time.perf_counter() - start)
    sys.stdin.readline()  # the counts of threads that have ended can't be read


if __name__ == "__main__":
    main()
