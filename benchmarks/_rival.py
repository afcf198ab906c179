"""Other servers for models: an environment of its own for each, and its processes for a while."""

from __future__ import annotations

import ctypes
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from ._children import ROOT
from ._usage import Reading, read_tree, tree

_PATIENCE = 60.0  # seconds for a server to come up, and to go
_PR_SET_CHILD_SUBREAPER = 36


class RivalError(RuntimeError):
    """A rival can't be installed here, or does not come up. The message says what it said."""


def environment(package: str) -> Path:
    """The folder of a virtual environment with ``package``, made if it is not there yet.

    What is installed is the dependency group ``rival-PACKAGE``, with the scikit-learn and the
    numpy of this environment: the model is the same file.

    :raises RivalError: it can't be installed
    """
    folder = ROOT / f".venv-bench-{package}"
    requirements = "\n".join(_requirements(package))
    stamp = folder / ".installed"
    if not stamp.exists() or stamp.read_text() != requirements:
        print(f"installing {package} into {folder.name} ...", file=sys.stderr)
        pip = ("-m", "pip", "--python", str(folder), "--disable-pip-version-check", "--quiet")
        _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)])
        _run([sys.executable, *pip, "install", *requirements.splitlines()])
        stamp.write_text(requirements)
    return folder


def _requirements(package: str) -> Iterable[str]:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    yield from groups[f"rival-{package}"]
    for shared in ("scikit-learn", "numpy"):
        yield f"{shared}=={metadata.version(shared)}"


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RivalError(f"can't be installed: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


class RivalServer:
    """A server with all its processes, while the ``with`` block lasts.

    :param command: starts it
    :param port: where it will listen, on the loopback interface
    :param path: answers a POST once it is up
    :param body: of that POST, JSON
    :raises RivalError: on entering: it ends, or does not answer
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        path: str,
        variables: Mapping[str, str] | None = None,
        body: str = "{}",
    ) -> None:
        self._command, self._port, self._path, self._body = command, port, path, body
        self._variables = variables or {}

    def __enter__(self) -> Self:
        _adopt_orphans(True)
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=os.environ | self._variables,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait_until_up()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self._stop()

    def read(self) -> Reading:
        """The counters of every thread of every process of it."""
        return read_tree(self._process.pid)

    def _wait_until_up(self) -> None:
        end = time.monotonic() + _PATIENCE
        while not _answers(self._port, self._path, self._body):
            if self._process.poll() is not None or time.monotonic() > end:
                self._log.seek(0)
                raise RivalError(f"does not answer {self._path}: {_last_line(self._log.read())}")
            time.sleep(0.1)

    def _stop(self) -> None:
        """As Ctrl-C does, and for good after a while."""
        processes = tree(self._process.pid)
        if processes:
            self._process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(processes, timeout=_PATIENCE / 4)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_PATIENCE)
        self._process.wait()
        self._log.close()
        _adopt_orphans(False)


def _adopt_orphans(whether: bool) -> None:
    """Become the parent of processes whose own has ended, so as to wait for them.

    Only of processes that were waited for is it known that their CPU time is ours, and no noise.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(whether), 0, 0, 0)


def _answers(port: int, path: str, body: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    try:
        connection.request("POST", path, body, {"content-type": "application/json"})
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
