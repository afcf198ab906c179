"""The digits, and a gradient-boosted classifier that learns them when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform  # type: ignore[import-untyped]  # it has no types
from sklearn.datasets import load_digits
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import train_test_split

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Samples:
    """Handwritten digits, each of 8 x 8 pixels from 0 (paper) to 16 (ink), and what they say."""

    pixels: Array
    labels: NDArray[np.int64]


@cache
def split_samples() -> tuple[Samples, Samples]:
    """The digits to learn from, and those held out to test with."""
    digits: Any = load_digits()
    parts: Any = train_test_split(
        digits.data, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    train, test, train_labels, test_labels = parts
    return Samples(train, train_labels), Samples(test, test_labels)


class DigitReader:
    """Learns when it is made, which is on the inference thread, and reads from then on.

    scikit-learn's trees run on OpenMP. Whichever thread first uses it gets a pool of native
    threads, and a second pool would slow both down: so not even training may happen elsewhere.
    """

    def __init__(self) -> None:
        train, _ = split_samples()
        varied = vary(train, copies=6)
        self._classifier = HistGradientBoostingClassifier(
            learning_rate=0.3,
            max_iter=30,
            l2_regularization=1.0,
            random_state=0,
        ).fit(varied.pixels, varied.labels)

    def probabilities(self, pixels: Array) -> Array:
        """How likely each of the ten digits is, for one image."""
        table: Any = self._classifier.predict_proba(pixels.reshape(1, 64))
        return np.asarray(table[0])

    def accuracy(self, samples: Samples) -> float:
        """The share of ``samples`` that is read right."""
        return float(self._classifier.score(samples.pixels, samples.labels))


def vary(samples: Samples, *, copies: int) -> Samples:
    """``samples``, followed by slightly turned, slanted, stretched and shifted copies of them.

    The data set has few writers. With these, the model also reads hands that it has never seen.
    """
    random = np.random.default_rng(0)
    bent = [_bend(image, random) for _ in range(copies) for image in samples.pixels]
    pixels = np.concatenate([samples.pixels, np.stack(bent)])
    return Samples(pixels, np.tile(samples.labels, copies + 1))


def _bend(pixels: Array, random: np.random.Generator) -> Array:
    linear = np.eye(2) + random.normal(0, 0.15, (2, 2))
    centre = np.array([3.5, 3.5])
    shift = centre - linear @ centre + random.normal(0, 0.5, 2)
    bent = affine_transform(pixels.reshape(8, 8), np.column_stack([linear, shift]))
    return np.asarray(bent).round().clip(0, 16).ravel()
