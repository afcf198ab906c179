"""A model that web servers slow down, to try the doctor on. Nothing in here knows of servers.

    asgi-infer doctor examples.throttled:Classifier \\
        --call predict --input examples.throttled:sample
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.ensemble import HistGradientBoostingClassifier

sample: NDArray[np.float64] = load_digits(return_X_y=True)[0][:200]
"""What each call classifies: 200 pictures of digits, of 64 pixels each."""


class Classifier:
    """A thousand trees, which OpenMP spreads over all CPUs: one parallel region for each."""

    def __init__(self) -> None:
        digits, labels = load_digits(return_X_y=True)
        self._trees = HistGradientBoostingClassifier(max_iter=100).fit(digits, labels)

    def predict(self, images: NDArray[np.float64]) -> NDArray[np.int64]:
        """The digit on each image."""
        return np.asarray(self._trees.predict(images), dtype=np.int64)
