"""A child process that is told and asked in lines of JSON, and that never outlives its block."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, Self, cast

# -P: the working directory comes first only when the target is looked for.
_COMMAND = [sys.executable, "-P", "-m", "asgi_infer.doctor._child"]
_GRACE = 5.0  # seconds to end in by itself
_MOMENT = 0.2  # seconds in which a child that has crashed is gone


class ChildError(Exception):
    """A child ended, hung, or failed where it should have answered. The text is one line."""


class ChildFailed(ChildError):
    """It answered with the reason for which it failed."""


class Child:
    """``python -m asgi_infer.doctor._child`` while the ``with`` block lasts.

    In a session of its own: Ctrl-C reaches the parent alone, and what the model has started in
    turn is ended with it.

    :param job: what it is to be
    :param patience: seconds that it may take over any one answer
    """

    def __init__(self, job: dict[str, Any], *, patience: float) -> None:
        self._job = {**job, "parent": os.getpid()}
        self._patience = patience
        self._received = b""

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()  # closed in __exit__
        self._process = subprocess.Popen(  # noqa: S603  # ourselves
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            bufsize=0,
        )
        self._stdin = cast("IO[bytes]", self._process.stdin)
        self._stdout = cast("IO[bytes]", self._process.stdout)
        self.tell(**self._job)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        try:
            self._stdin.close()
            if exc_type is None:
                self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(OSError):  # nothing of it is left
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            self._stdout.close()
            self._log.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def tell(self, **values: object) -> None:
        """Tell it something; without values, to go on."""
        with suppress(BrokenPipeError):  # it has ended: the next question finds out how
            self._stdin.write(json.dumps(values).encode() + b"\n")

    def ask(
        self, *, every: float = 1.0, meanwhile: Callable[[], None] = lambda: None, more: float = 0
    ) -> dict[str, Any]:
        """Its next answer.

        :param meanwhile: called every so many seconds
        :param more: seconds that it may take on top of the usual
        :raises ChildError: there is none
        """
        start, ticks, limit = time.monotonic(), 1, self._patience + more
        while b"\n" not in self._received:
            until = start + min(ticks * every, limit)
            if self._readable(until - time.monotonic()):
                self._read()
            elif time.monotonic() >= start + limit:
                raise ChildError(
                    f"the process hung: no answer for {limit:.3g} s (--patience gives it more)"
                )
            else:
                ticks += 1
                meanwhile()
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildFailed(answer["error"])
        return answer

    def error(self, what: str) -> ChildError:
        """What somebody else noticed of it, with its own last words.

        Also for a child that has ended: then that is what happened.
        """
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_MOMENT)
        if self._process.returncode is not None:
            return ChildError(self._how_it_ended())
        return ChildError(f"{what}{self._last_words()}")

    def _readable(self, seconds: float) -> bool:
        return bool(select.select([self._stdout], [], [], max(0.0, seconds))[0])

    def _read(self) -> None:
        data = self._stdout.read(1 << 16)
        if not data:
            raise ChildError(self._how_it_ended())
        self._received += data

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return "the process closed its output"
        ended = f"ended with status {status}"
        if status < 0:
            ended = f"was killed by {signal.Signals(-status).name}"
        return f"the process {ended}{self._last_words()}"

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"; its last words: {lines[-1].strip()}" if lines else ""
