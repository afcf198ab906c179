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
from typing import Any, Self

_GRACE = 5.0  # seconds to end in by itself


class ChildError(Exception):
    """A child ended, hung, or failed where it should have answered. The text is one line."""


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
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in __exit__
        # -P: the working directory comes first only when the target is looked for.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "asgi_infer.doctor._child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            bufsize=0,
        )
        self.tell(**self._job)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            if exc_type is None:
                self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(OSError):  # nothing of it is left
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            self._process.stdout.close()
            self._log.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def tell(self, **values: object) -> None:
        """Tell it something; without values, to go on."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: the next question finds out how
            self._process.stdin.write(json.dumps(values).encode() + b"\n")

    def ask(
        self, *, every: float = 1.0, meanwhile: Callable[[], None] = lambda: None, more: float = 0
    ) -> dict[str, Any]:
        """Its next answer.

        :param meanwhile: called every so many seconds
        :param more: seconds that it may take on top of the usual
        :raises ChildError: there is none
        """
        start, ticks = time.monotonic(), 1
        deadline = start + self._patience + more
        while b"\n" not in self._received:
            until = min(start + ticks * every, deadline)
            if self._readable(until - time.monotonic()):
                self._read()
            elif time.monotonic() >= deadline:
                raise ChildError(
                    f"hung: no answer for {self._patience + more:g} s (--patience gives it more)"
                )
            else:
                ticks += 1
                meanwhile()
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildError(answer["error"])
        return answer

    def _readable(self, seconds: float) -> bool:
        return bool(select.select([self._process.stdout], [], [], max(0.0, seconds))[0])

    def _read(self) -> None:
        assert self._process.stdout is not None
        data = self._process.stdout.read(1 << 16)
        if not data:
            raise ChildError(self._how_it_ended())
        self._received += data

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return "closed its output"
        ended = f"ended with status {status}"
        if status < 0:
            ended = f"was killed by {signal.Signals(-status).name}"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f"{ended}; its last words: {lines[-1].strip()}" if lines else ended
