"""Ways to die where the model lives, and moments for it: to be imported there."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asgi_infer.workers._channel import Channel

from .remote_gates import RemoteLog


def segfault() -> None:
    ctypes.string_at(0)


def leave() -> None:
    os._exit(3)


def killed() -> None:
    """What the kernel does to a process when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fork(*, fails: bool = False) -> str:
    """Forget that the other process comes back as well; this one has the later word."""
    other = os.fork()
    if other:
        os.waitid(os.P_PID, other, os.WEXITED | os.WNOWAIT)
    elif fails:
        raise ValueError("in the other process")
    return f"exit code {os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])}" if other else "other"


WAYS = {"segfault": segfault, "abort": os.abort, "exit": leave, "kill": killed}


def die(way: str, number: int = 0) -> None:
    """End, or stop, this process here and now.

    :param number: what makes one call differ from another, that has crashed before
    """
    del number
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    {**WAYS, "freeze": freeze}[way]()


class DiesWhenUnpickled:
    """An argument, or a result, that ends whoever reads it."""

    def __init__(self, way: str) -> None:
        self.way = way

    def __reduce__(self) -> tuple[Any, ...]:
        return die, (self.way,)


class DiesWhenPickled:
    """A result that ends whoever writes it."""

    def __init__(self, way: str) -> None:
        self.way = way

    def __reduce__(self) -> tuple[Any, ...]:
        die(self.way)
        return str, ()


class FailsWhenUnpickled:
    """Something that can be written and not read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return raise_error, ("can't be read",)


class FailsWhenPickled:
    """Something that can't be written."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise_error("can't be written")
        return str, ()


class ExitsWhenUnpickled:
    """Something that ends who reads it with ``SystemExit``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (3,)


class ExitsWhenPickled:
    """The same for who writes it."""

    def __reduce__(self) -> tuple[Any, ...]:
        sys.exit(3)


class Once:
    """An argument that can be sent once."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.sent = False

    def __reduce__(self) -> tuple[Any, ...]:
        if self.sent:
            raise LookupError("it has been sent")
        self.sent = True
        return Once, (self.way,)


def die_of(once: Once) -> None:
    die(once.way)


def raise_error(text: str) -> None:
    raise LookupError(text)


def make(kind: Any, *args: Any) -> Any:
    return kind(*args)


def write_half(way: str) -> None:
    """Write the beginning of an answer, and die."""
    (channel,) = (each for each in gc.get_objects() if isinstance(each, Channel))
    os.write(channel.fileno(), b"\1\0\0")
    die(way)


def die_among(way: str, items: list[int]) -> list[int]:
    """A batch, with an item that it does not survive."""
    if -1 in items:
        die(way)
    return items


def die_midway(way: str) -> Iterator[int]:
    yield 1
    die(way)
    yield 2


def die_at_load(log: RemoteLog, fatal: tuple[int, ...], way: str) -> RemoteLog:
    """Load, but for those of the attempts that are fatal; counted from 1."""
    log("load")
    if len(log.lines) in fatal:
        die(way)
    return log


def last_words() -> None:
    print("something to say before the end", file=sys.stderr, flush=True)
    die("exit")


def modules() -> set[str]:
    """What is imported here."""
    return set(sys.modules)


def note_and_die(log: RemoteLog, survives: int = 10**6) -> int:
    """Die, unless it has been tried so often before."""
    log("try")
    if len(log.lines) < survives:
        die("kill")
    return len(log.lines)


def maps() -> str:
    """What is mapped here."""
    return Path("/proc/self/maps").read_text()
