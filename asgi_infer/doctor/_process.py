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
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import IO, Any, Self, cast

# -P: the working directory comes first only when the target is looked for.
_COMMAND = [sys.executable, "-P", "-m", "asgi_infer.doctor._child"]
_GRACE = 5.0  # seconds to end in by itself
_MOMENT = 0.2  # seconds in which a child that has crashed is gone
_STEP = 0.005  # seconds between two looks at whether it is
_TAIL = 1 << 16  # bytes of what it wrote, among which its last words are
_SIGNALS = {each.value: each.name for each in signal.Signals}


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
        self._killed = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # an interrupt may come at any moment
            self._log = stack.enter_context(tempfile.TemporaryFile())
            self._process = subprocess.Popen(  # noqa: S603  # ourselves
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                start_new_session=True,
                bufsize=0,
            )
            stack.callback(self._kill)
            self._stdin = stack.enter_context(cast("IO[bytes]", self._process.stdin))
            self._stdout = stack.enter_context(cast("IO[bytes]", self._process.stdout))
            self.tell(**self._job)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        with self._stack:
            self._stdin.close()
            if exc_type is None:
                self._ends_within(_GRACE)

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

        :param meanwhile: called every so many seconds, or less often where this process is late
        :param more: seconds that it may take on top of the usual
        :raises ChildError: there is none
        """
        start, ticks, limit = time.monotonic(), 1, self._patience + more
        while b"\n" not in self._received:
            until = start + min(ticks * every, limit)
            if self._readable(until - time.monotonic()):
                self._read()
                continue
            self.check()
            if time.monotonic() >= start + limit:
                raise ChildError(
                    f"the process hung: no answer for {limit:.3g} s (--patience gives it more)"
                )
            meanwhile()
            ticks = max(ticks, int((time.monotonic() - start) / every)) + 1
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildFailed(answer["error"])
        return answer

    def check(self) -> None:
        """Look whether it is still there.

        What it has forked may keep its end of the channel, and its sockets, open.

        :raises ChildError: it has ended, and has not said why
        """
        if not self._has_ended():
            return
        if not self._readable(0):
            raise ChildError(self._how_it_ended())
        self._read()

    def error(self, what: str) -> ChildError:
        """What somebody else noticed of it, with its own last words.

        Also for a child that has ended: then that is what happened.
        """
        if self._ends_within(_MOMENT):
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
        if not self._ends_within(_GRACE):
            return "the process closed its output"
        status = self._kill()
        ended = f"ended with status {status}"
        if status < 0:
            ended = f"was killed by {_SIGNALS.get(-status, f'signal {-status}')}"
        if status == -signal.SIGKILL:
            ended += ", perhaps out of memory"
        return f"the process {ended}{self._last_words()}"

    def _ends_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self._has_ended():
            if time.monotonic() >= end:
                return False
            time.sleep(_STEP)
        return True

    def _has_ended(self) -> bool:
        """Without reaping it: from then on its number, and its group's, may be another's."""
        if self._killed or not hasattr(os, "waitid"):  # macOS before Python 3.13 has none
            return self._process.poll() is not None
        options = os.WEXITED | os.WNOWAIT | os.WNOHANG
        return os.waitid(os.P_PID, self.pid, options) is not None

    def _kill(self) -> int:
        """End all that is left of it and of what it has started; its status."""
        if not self._killed:
            self._killed = True
            with suppress(OSError):  # there is nothing
                os.killpg(self.pid, signal.SIGKILL)
        return self._process.wait()

    def _last_words(self) -> str:
        log = self._log.fileno()
        # pread: whoever still writes there shares the position.
        tail = os.pread(log, _TAIL, max(0, os.fstat(log).st_size - _TAIL))
        lines = tail.decode(errors="replace").strip().splitlines()
        return f"; its last words: {lines[-1].strip()}" if lines else ""
