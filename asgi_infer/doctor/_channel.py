"""Lines of JSON between the doctor and the processes that it measures; the end inside of those."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from typing import IO, Any, Self

_PR_SET_PDEATHSIG = 1


class Channel:
    """The child's end: it is told things, and answers."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self.reader = reader
        self._writer = writer

    @classmethod
    def of_this_process(cls) -> Self:  # pragma: no cover  # in a process of its own
        """Standard input and output, taken away from the model.

        It gets no input, and what it prints goes to standard error.
        """
        reader, writer = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb", 0)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        return cls(reader, writer)

    def receive(self) -> dict[str, Any]:
        """The next line.

        :raises SystemExit: the parent is gone, or wants no more
        """
        line = self.reader.readline()
        if not line:
            raise SystemExit
        told: dict[str, Any] = json.loads(line)
        return told

    def send(self, **values: object) -> None:
        """Answer."""
        data = memoryview(json.dumps(values).encode() + b"\n")
        while data:  # unbuffered: a pipe may take a part only
            data = data[self._writer.write(data) :]


def end_with_parent(parent: int) -> None:  # pragma: no cover  # in a process of its own
    """Have the kernel end this process when its parent ends in whatever way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        raise SystemExit


def python_threads() -> dict[int, str]:
    """Python's names of this process's threads, by native id."""
    return {
        thread.native_id: thread.name
        for thread in threading.enumerate()
        if thread.native_id is not None
    }
