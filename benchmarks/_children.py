"""Programs of this package in processes of their own, told and asked in lines of JSON."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
_PATIENCE = 120.0  # seconds for any one answer; a hang, not a slow machine


class ChildError(RuntimeError):
    """A child ended, or hung, where it should have answered."""


class Child:
    """``python -m benchmarks.MODULE ARGUMENTS`` while the ``with`` block lasts.

    :param python: of another environment
    """

    def __init__(self, module: str, *arguments: str, python: str | Path = sys.executable) -> None:
        self._command = [str(python), "-m", f"benchmarks.{module}", *arguments]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if exc_type is not None:
            process.kill()
        process.stdin.close()  # which ends every child that still waits for a word
        process.stdout.close()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def ask(self) -> dict[str, Any]:
        """The child's next line."""
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], _PATIENCE)[0]:
            raise ChildError(f"no answer in {_PATIENCE:.0f} s from {' '.join(self._command)}")
        line = stdout.readline()
        if not line:
            raise ChildError(f"exit status {self._process.wait()} of {' '.join(self._command)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self) -> None:
        """Let the child, which waits for it, go on."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """End it now: what it still has to do is of no interest."""
        self._process.kill()


def answer(**values: object) -> None:
    """In a child: answer the parent."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def once(module: str, *arguments: str, python: str | Path = sys.executable) -> dict[str, Any]:
    """Run a child that says one thing, and return that."""
    with Child(module, *arguments, python=python) as child:
        return child.ask()
