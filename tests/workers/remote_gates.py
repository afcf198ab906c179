"""Gates that hold a function open wherever it runs, in this process or in another one.

A function that runs elsewhere shares no event with the test, and must not close over one. So
these are named pipes in a directory of the test's: they pickle as their path. The test holds both
ends open for as long as it lasts, so that nobody blocks in ``open``, and what is written stays.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import termios
from pathlib import Path
from typing import Any, TypeVar

LIMIT = 10.0  # that of tests.gates, which is not to be imported where models run

T = TypeVar("T")


class RemoteEvent:
    """A ``threading.Event`` across processes, which also counts how often it was set.

    :param path: where the pipe is to be; nothing else is to be there
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attached, (type(self), self._path)

    def set(self) -> None:
        """Set it, anywhere."""
        fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(fd, b".")
        finally:
            os.close(fd)

    def wait(self, seconds: float = LIMIT) -> bool:
        """Block, anywhere, until it is set; return whether it was."""
        fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return bool(select.select([fd], [], [], seconds)[0])
        finally:
            os.close(fd)

    def wait_set(self) -> None:
        """Block until it is set, in the test."""
        if not self.wait():
            raise TimeoutError("it was not set")

    async def set_async(self) -> None:
        """Wait, on any event loop, until it is set; in the test."""
        import anyio  # not where models run

        with anyio.fail_after(LIMIT):
            await anyio.wait_readable(self._fd)

    @property
    def times(self) -> int:
        """How often it was set; in the test."""
        count = array.array("i", [0])
        fcntl.ioctl(self._fd, termios.FIONREAD, count)
        return count[0]

    def close(self) -> None:
        """Let go of it; in the test, when nobody uses it any more."""
        os.close(self._fd)


def _attached(kind: type[RemoteEvent], path: Path) -> RemoteEvent:
    """What an event is on the other side: a path, and nothing that has to be closed."""
    event = kind.__new__(kind)
    event._path = path
    return event


class RemoteGate:
    """As ``tests.gates.Gate``: a function that tells that it was entered, then waits."""

    def __init__(self, path: Path) -> None:
        self.entered = RemoteEvent(path.with_suffix(".entered"))
        self.release = RemoteEvent(path.with_suffix(".release"))

    def __call__(self, result: T) -> T:
        self.entered.set()
        if not self.release.wait():
            raise TimeoutError("nobody released the gate")
        return result

    @property
    def entries(self) -> int:
        """How often the function has been called; in the test."""
        return self.entered.times

    def close(self) -> None:
        """Let go of it; in the test, when the function has ended."""
        self.entered.close()
        self.release.close()


class RemoteLog:
    """A list of lines that grows wherever it is: each is written at once and whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def __call__(self, line: object) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, f"{line}\n".encode())
        finally:
            os.close(fd)

    @property
    def lines(self) -> list[str]:
        """What has been written, in order."""
        return self._path.read_text().splitlines()


class RemoteSource:
    """A generator function: it counts the items that it makes, and says where it was closed.

    :param items: how many there are, from 0 on
    :param hold: before this item it waits to be released
    """

    def __init__(self, path: Path, items: int = 10**6, hold: int = -1) -> None:
        self.items = items
        self.hold = hold
        self.gate = RemoteGate(path)
        self.closed = RemoteEvent(path.with_suffix(".closed"))
        self.log = RemoteLog(path.with_suffix(".log"))

    def __call__(self) -> Any:
        try:
            for number in range(self.items):
                if number == self.hold:
                    self.gate(None)
                self.log(number)
                yield number
        finally:
            self.log(f"closed in {os.getpid()}")
            self.closed.set()

    @property
    def made(self) -> int:
        """How many items it has made; in the test."""
        return sum(line.isdecimal() for line in self.log.lines)

    def close(self) -> None:
        """Let go of it; in the test."""
        self.gate.close()
        self.closed.close()


class Makers:
    """Makes what is above in one directory, and closes it in the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made = 0
        self._gates: list[RemoteGate] = []
        self._open: list[RemoteEvent | RemoteGate | RemoteSource] = []

    def event(self) -> RemoteEvent:
        """A new event."""
        event = RemoteEvent(self._path())
        self._open.append(event)
        return event

    def gate(self) -> RemoteGate:
        """A new gate."""
        gate = RemoteGate(self._path())
        self._gates.append(gate)
        self._open.append(gate)
        return gate

    def log(self) -> RemoteLog:
        """A new log."""
        return RemoteLog(self._path())

    def source(self, items: int = 10**6, hold: int = -1) -> RemoteSource:
        """A new generator function."""
        source = RemoteSource(self._path(), items, hold)
        self._gates.append(source.gate)
        self._open.append(source)
        return source

    def release(self) -> None:
        """Hold nothing any more."""
        for gate in self._gates:
            gate.release.set()

    def close(self) -> None:
        """Close all; nobody is to be inside any more."""
        for each in self._open:
            each.close()

    def _path(self) -> Path:
        self._made += 1
        return self._directory / str(self._made)
