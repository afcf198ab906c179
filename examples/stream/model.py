"""A small language model: which word follows which, counted in the Python manual."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .._manual import passages

Numbers = NDArray[np.int64]
Shares = NDArray[np.float64]

logger = logging.getLogger(__name__)

ORDER = 3
"""Words that the model looks back on."""

PARAGRAPH = "\n\n"
_MARKS = re.compile(r"[.,;:?!](?=\s|$)")
_PIECES = re.compile(rf"{_MARKS.pattern}|\S+?(?=[.,;:?!]*(?:\s|$))")


@dataclass(frozen=True)
class Ended:
    """How a text came to its end."""

    number: int
    """Of the text: the first is 1."""
    words: int
    wanted: int
    thread: str
    """The thread on which the generator was closed."""

    def __str__(self) -> str:
        if self.words == self.wanted:
            return f"text {self.number}: all of its {self.wanted} words are written"
        return f"text {self.number}: stopped after {self.words} of {self.wanted} words"


class LanguageModel:
    """Learns when it is made, which takes a second or two, and writes a word at a time.

    The share of each word comes from what followed the last three words in the manual, mixed
    with what followed the last two, the last one, and with how frequent it is at all. How much
    of each: interpolated Witten-Bell smoothing (I. H. Witten, T. C. Bell: The zero-frequency
    problem, IEEE Transactions on Information Theory 37, 1991).

    :param paragraphs: what to learn from; the manual if left out
    """

    def __init__(self, paragraphs: Iterable[str] | None = None) -> None:
        text = [PARAGRAPH]
        for paragraph in paragraphs or [passage.text for passage in passages()]:
            text += [*pieces(paragraph), PARAGRAPH]
        self._vocabulary = sorted(set(text))
        self._number = {piece: number for number, piece in enumerate(self._vocabulary)}
        numbers = [self._number[piece] for piece in text]
        counts = np.bincount(numbers)
        self._frequency: Shares = counts / counts.sum()
        self._followers = [count_followers(numbers, n) for n in range(1, ORDER + 1)]
        self._ended: deque[Ended] = deque(maxlen=20)
        self._texts = 0

    def generate(
        self, prompt: str, words: int, seed: int, temperature: float = 0.6, cost: float = 0.0
    ) -> Iterator[str]:
        """Write on from ``prompt``: words, marks, and breaks between paragraphs, one by one.

        :param words: how many of the pieces are to be words
        :param seed: the same one makes the same text
        :param temperature: below 1, likely words are even likelier
        :param cost: seconds that each word takes at least, as it does in larger models
        """
        random = np.random.default_rng(seed)
        context = self._context(prompt)
        self._texts += 1
        number, written = self._texts, 0
        try:
            while written < words:
                context = [*context[-ORDER:], self._next(context, random, temperature)]
                piece = self._vocabulary[context[-1]]
                if is_word(piece):
                    time.sleep(cost)
                    written += 1
                yield piece
        finally:
            # Also when the reader has left: the generator is then closed where it stands.
            self._note(Ended(number, written, words, threading.current_thread().name))

    def ended(self) -> list[Ended]:
        """How the latest texts ended, the last one first."""
        return list(reversed(self._ended))

    def shares(self, text: str) -> dict[str, float]:
        """How likely each word is to follow on ``text``."""
        shares = self._shares(self._context(text))
        return dict(zip(self._vocabulary, shares.tolist(), strict=True))

    def _shares(self, context: Sequence[int]) -> Shares:
        shares = self._frequency
        for order, table in enumerate(self._followers, start=1):
            found = table.get(tuple(context[-order:]))
            if found is None:  # nor will a longer context be found
                break
            followers, counts = found
            total = counts.sum() + len(followers)
            shares = shares * (len(followers) / total)
            shares[followers] += counts / total
        return shares

    def _next(
        self, context: Sequence[int], random: np.random.Generator, temperature: float
    ) -> int:
        shares = self._shares(context) ** (1 / temperature)
        limits = shares.cumsum()
        return int(limits.searchsorted(random.random() * limits[-1], side="right"))

    def _context(self, text: str) -> list[int]:
        return [self._known(piece) for piece in pieces(text)] or [self._number[PARAGRAPH]]

    def _known(self, piece: str) -> int:
        """The number of a word, however it is capitalised. Unknown: -1, which nothing follows."""
        variants = (piece, piece.lower(), piece.capitalize())
        return next((self._number[each] for each in variants if each in self._number), -1)

    def _note(self, ended: Ended) -> None:
        self._ended.append(ended)
        logger.info("%s (on thread %s)", ended, ended.thread)


Followers = dict[tuple[int, ...], tuple[Numbers, Numbers]]


def count_followers(numbers: Sequence[int], order: int) -> Followers:
    """For each ``order`` words in a row: what followed them, and how often."""
    table: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for i in range(order, len(numbers)):
        table[tuple(numbers[i - order : i])][numbers[i]] += 1
    return {
        context: (np.array(list(counter)), np.array(list(counter.values())))
        for context, counter in table.items()
    }


def pieces(text: str) -> list[str]:
    """The words of ``text``, and the marks between them, without brackets and quotes."""
    found = _PIECES.findall(re.sub(r'["*“”]', "", text))
    return [piece for piece in map(_bare, found) if piece]


def is_word(piece: str) -> bool:
    """Whether ``piece`` counts as a word."""
    return piece != PARAGRAPH and not _MARKS.fullmatch(piece)


def join(written: Iterable[str]) -> str:
    """The text that ``written`` makes."""
    return re.sub(r" (?=[.,;:?!](?:\s|$)|\n)|(?<=\n) ", "", " ".join(written)).strip()


def _bare(piece: str) -> str:
    """``piece`` without a bracket that another piece closes, or has opened."""
    for opening, closing in ("()", "[]", "{}"):
        opened = piece.count(opening) - piece.count(closing)
        if opened > 0:
            piece = piece.removeprefix(opening)
        elif opened < 0:
            piece = piece.removesuffix(closing)
    return piece
