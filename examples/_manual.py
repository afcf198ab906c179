"""The language reference that comes with Python, in passages: text for examples to work on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pydoc_data.topics import topics  # what help("with") shows
from textwrap import dedent

_UNDERLINE = re.compile(r"[*=\-~^]{4,}")
_SENTENCES = re.compile(r"""["“*(]*[A-Z].*[.:!?)]["”*]*""", re.DOTALL)
_HISTORY = re.compile(r"(?:Changed|New|Added|Deprecated|Removed) (?:in|since) ")
_BULLET = re.compile(r"^(?:[*•]|\d+\.) +")
_TERM = re.compile(r"([^\s*•\d].*)\n(?= {3})")  # what is explained, indented, below it
_SHORTEST = 60  # characters: what is shorter says little without its surroundings


@dataclass(frozen=True)
class Passage:
    """A paragraph of prose, and the heading or the definition that it stands under."""

    title: str
    text: str


@cache
def passages() -> tuple[Passage, ...]:
    """Every paragraph of prose, each once: topics include one another."""
    unique = {passage.text: passage for name in topics for passage in _split(topics[name])}
    return tuple(unique.values())


def _split(topic: str) -> Iterator[Passage]:
    heading = definition = ""
    for block in re.split(r"\n(?:[ \t]*\n)+", topic.strip("\n")):
        first, *rest = block.split("\n")
        indented = block.startswith(" ")
        if len(rest) == 1 and _UNDERLINE.fullmatch(rest[0]):
            heading, definition = first, ""
        elif not indented and _is_signature(block):
            definition = first
        elif (text := _prose(dedent(block))) is not None:
            term = _TERM.match(block)
            below = definition if indented else heading
            yield Passage(term[1] if term else below or heading, text)


def _is_signature(block: str) -> bool:
    return block[0].islower() and any(sign in block for sign in "([.") and not block.endswith(".")


def _prose(block: str) -> str | None:
    """The block as one line, unless it is code, grammar, history, or hardly anything."""
    text = re.sub(r"(?<=\w)-\n\s*", "-", _BULLET.sub("", _TERM.sub("", block, count=1)))
    text = " ".join(text.split())
    if len(text) < _SHORTEST or "::=" in text or ">>>" in text or _HISTORY.match(text):
        return None
    return text if _SENTENCES.fullmatch(text) else None
