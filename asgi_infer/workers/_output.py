"""What a child process prints: into the log, line by line, and its last words."""

from __future__ import annotations

import codecs
import logging
import os
from collections import deque
from contextlib import suppress
from io import FileIO

logger = logging.getLogger("asgi_infer.worker")

TURN = 1 << 14
"""Bytes that are read at a time: so many lines of one letter take some 50 ms to log."""

LONGEST = 1 << 16
"""Characters of a line; what is longer comes in pieces."""

_LEFT = 1 << 17  # bytes to read of an ended process: more than a pipe holds, but not without end
_WORDS = 20  # lines
_WIDTH = 500  # characters of a line

_FATAL = "Fatal Python error: "
_CULPRIT = "Current thread 0x"
_OURS = f"asgi_infer{os.sep}workers{os.sep}"
_OTHER = ("Thread 0x", "Extension modules: ")


class LastWords:
    """The lines of stderr that may tell why a process has ended: the last ones.

    After a crash, ``faulthandler`` writes the stacks of all threads, which may be long, and the
    one that crashed comes last. What is kept then is the reason and that stack.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_WORDS)
        self._reason: str | None = None  # of a crash
        self._culprit = False  # whether the stack of the thread that crashed has begun
        self._complete = False  # and has ended

    def add(self, line: str) -> None:
        """The next line."""
        if line.startswith(_FATAL):
            self._reason, self._culprit, self._complete = line, False, False
            self._lines.clear()
        elif self._complete:
            return
        elif self._culprit and line.startswith(_OTHER):
            self._complete = True
            return
        elif self._reason and line.startswith(_CULPRIT):
            self._culprit = True
            self._lines.clear()
        elif self._culprit and len(self._lines) > 1 and _OURS in line:
            return  # what has called the model's code is no news
        # Of a stack the innermost frames come first, and are what matters.
        if not self._culprit or len(self._lines) < _WORDS - 1:
            self._lines.append(line[:_WIDTH])

    def __str__(self) -> str:
        lines = list(self._lines)
        if self._reason is not None and self._reason[:_WIDTH] not in lines:
            lines.insert(0, self._reason[:_WIDTH])
        return "\n".join(lines)


class Output:
    """One stream of a child's, read without blocking.

    :param file: the reading end of a pipe
    :param name: of the worker, for the log
    :param level: to log at
    :param words: where each line is noted as well
    """

    def __init__(self, file: FileIO, name: str, level: int, words: LastWords | None) -> None:
        self._file = file
        self._name = name
        self._level = level
        self._words = words
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""  # what has no end yet

    @property
    def fd(self) -> int | None:
        """The descriptor to wait on; None when nothing can come any more."""
        return None if self._file.closed else self._file.fileno()

    def pump(self) -> int:
        """Log what is there, up to a bound.

        :returns: how many bytes that were
        """
        if self._file.closed:
            return 0
        data = self._file.read(TURN)
        if data is None:  # nothing there
            return 0
        self._take(self._decoder.decode(data, final=not data))
        if not data:
            self._end()
        return len(data)

    def finish(self) -> None:
        """Log what is left, after the process has ended.

        Others, started by that process, may still write: they are not waited for.
        """
        left = _LEFT
        while left > 0 and (count := self.pump()):
            left -= count
        if not self._file.closed:
            self._take(self._decoder.decode(b"", final=True))
            self._end()

    def _take(self, text: str) -> None:
        head, *lines = text.split("\n")
        self._line += head
        for line in lines:
            self._log_line()
            self._line = line
        while len(self._line) > LONGEST:
            self._log(self._line[:LONGEST])
            self._line = self._line[LONGEST:]

    def _log_line(self) -> None:
        # What a terminal would show of a progress bar. Empty lines say nothing in a log.
        line = self._line.rstrip("\r").rpartition("\r")[2]
        for start in range(0, len(line), LONGEST):
            self._log(line[start : start + LONGEST])

    def _log(self, line: str) -> None:
        with suppress(Exception):  # a handler or filter that fails is no reason to stop serving
            logger.log(self._level, "%s: %s", self._name, line)
        if self._words is not None:
            self._words.add(line)

    def _end(self) -> None:
        self._log_line()
        self._file.close()
