"""A model that turns texts into vectors, and finds passages of the Python manual with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import wordllama
from numpy.typing import NDArray
from wordllama import WordLlama

from .._manual import Passage, passages

BEST = 20
"""Passages that a search finds."""

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Hit:
    """A passage, and the cosine of the angle between its vector and the query's."""

    passage: Passage
    similarity: float


@dataclass(frozen=True)
class Found:
    """The best passages for one query, and how many queries were answered together with it."""

    hits: list[Hit]
    batch: int


class PassageSearch:
    """Embeds texts, and finds passages. The weights and the tokenizer come with ``wordllama``.

    Both methods take a list and give back as many results, so a ``Batcher`` can put what came
    from many requests into one call: one batch for the tokenizer, which has threads of its own
    for it, and one multiplication of matrices instead of many of a matrix and a vector.
    """

    def __init__(self) -> None:
        # The package looks for files in its cache, and then on the network. Its own folder is
        # laid out like a cache, and has all that this model needs.
        folder = Path(wordllama.__file__).parent
        self._model: Any = WordLlama.load(cache_dir=folder, disable_download=True)
        self._passages = passages()
        self._table = self._embed([f"{each.title}: {each.text}" for each in self._passages])

    def embed(self, texts: Sequence[str]) -> list[Vectors]:
        """256 numbers for each text, a vector of length 1. None of the texts may be empty."""
        return list(self._embed(texts))

    def search(self, queries: Sequence[str]) -> list[Found]:
        """The passages that are nearest in meaning to each query, best first."""
        table = self._embed(queries) @ self._table.T
        return [Found(self._best(row), len(queries)) for row in table]

    def _embed(self, texts: Sequence[str]) -> Vectors:
        """A row for each text."""
        vectors: Vectors = self._model.embed(list(texts), norm=True)
        return vectors

    def _best(self, similarities: Vectors) -> list[Hit]:
        best = np.argpartition(similarities, -BEST)[-BEST:]
        ranked = best[np.argsort(-similarities[best])]
        return [Hit(self._passages[i], float(similarities[i])) for i in ranked]
