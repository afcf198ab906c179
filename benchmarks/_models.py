"""The models that the servers serve. Each has ``predict()``, and does the same in every arm."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ._children import answer

DIGITS = 200  # in each call


class Model(Protocol):
    """What every arm calls."""

    def predict(self) -> int: ...


class Noop:
    """A model that costs nothing, so that everything around it shows."""

    def predict(self) -> int:
        return 7


class Digits:
    """scikit-learn's gradient boosting on its own digits: hundreds of parallel regions a call."""

    def __init__(self, path: Path) -> None:
        self._classifier: Any
        self._classifier, self._images = pickle.loads(path.read_bytes())

    def predict(self) -> int:
        return int(self._classifier.predict(self._images)[0])


def loader(path: Path | None) -> Callable[[], Model]:
    """What makes the model: from a file of ``train``, or a no-op without one."""
    return Noop if path is None else partial(Digits, path)


def warm_up(model: Model) -> None:
    """Use a model a few times."""
    for _ in range(3):
        model.predict()


def train(path: Path, iterations: int) -> None:
    """Write a trained classifier and the digits to classify."""
    from sklearn.datasets import load_digits
    from sklearn.ensemble import HistGradientBoostingClassifier

    images, digits = load_digits(return_X_y=True)
    classifier = HistGradientBoostingClassifier(max_iter=iterations).fit(images, digits)
    path.write_bytes(pickle.dumps((classifier, images[:DIGITS])))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._models")
    parser.add_argument("path", type=Path)
    parser.add_argument("--iterations", type=int, required=True)
    options = parser.parse_args()
    train(options.path, options.iterations)
    answer(event="trained")


if __name__ == "__main__":
    main()
