"""A child process as its parent sees it: started, watched, listened to, killed, buried."""

from __future__ import annotations

import contextlib
import logging
import marshal
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from io import FileIO
from pathlib import Path
from typing import BinaryIO, cast

from . import _boot
from ._output import LastWords, Output

logger = logging.getLogger("asgi_infer.worker")

HOST = "asgi_infer.workers._host:serve"
"""What a child runs, called with its descriptors."""

DUMP_SIGNAL: int = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
"""Has a child write its stacks. One that nobody else is likely to use, where there are such."""

_BLOCKED = {signal.SIGINT, signal.SIGTERM, DUMP_SIGNAL}
_OWN = -signal.SIGKILL
_MOMENT = 0.5  # seconds in which a process that closed its end has ended
_PATIENCE = 10.0  # seconds in which one that was killed has; unless it hangs in the kernel
_STEP = 0.001  # seconds

# Letters of the options that sys.flags tells of. Not those that make a process interactive.
_FLAGS = {
    "debug": "d",
    "dont_write_bytecode": "B",
    "optimize": "O",
    "verbose": "v",
    "bytes_warning": "b",
    "no_site": "S",
    "quiet": "q",
    "isolated": "I",
    "ignore_environment": "E",
    "no_user_site": "s",
    "safe_path": "P",
}


class Child:
    """A process that runs one function of the package, with descriptors of its parent's.

    All is done on the thread that creates it, but for ``interrupt`` and ``dump``, which are for
    any thread.

    :param name: of the worker, for the log
    :param fds: that it inherits, under the same numbers. The parent's are the caller's to close
    :param die_with_parent: whether it is killed when the creating thread ends. If its process
        ends, that is
    :param target: ``module:function``, called with the descriptors
    :raises OSError: it could not be started; nothing is left of it
    :raises RuntimeError: this is a child that imports its parent's main module, or a program that
        could not run another Python
    :ivar pid: its process id
    :ivar sentinel: a descriptor that is readable when it has ended
    """

    def __init__(
        self,
        *,
        name: str,
        fds: Sequence[int] = (),
        die_with_parent: bool = True,
        target: str = HOST,
    ) -> None:
        _boot.refuse_while_importing_main()
        self.name = name
        # Guards what other threads use: the sentinel while it is open, and the three below.
        # Reentrant, since the garbage collector may interrupt whoever holds it to interrupt.
        self._lock = threading.RLock()
        self._reaped = False  # whether its id may be another's by now
        self._killed = False  # whether it was killed from here
        self._status_lost = False
        if not _boot.in_child:  # what children send back of the main module goes by that name
            sys.modules.setdefault(_boot.MAIN, sys.modules["__main__"])
        with ExitStack() as stack:
            self._start(stack, list(fds), die_with_parent, target)
            stack.pop_all()

    def _start(self, stack: ExitStack, fds: list[int], bound: bool, target: str) -> None:
        lifeline = None if has_pidfd() else os.pipe()
        writer = () if lifeline is None else lifeline[1:]
        if lifeline is not None:
            stack.callback(os.close, lifeline[0])
        with ExitStack() as until_started:
            for fd in writer:
                until_started.callback(os.close, fd)
            setup = _boot.Setup(
                path=[str(each) for each in sys.path],
                argv=[str(each) for each in sys.argv],
                main=main_module_name(),
                parent=os.getpid() if bound else 0,
                dump_signal=DUMP_SIGNAL,
                target=target,
                fds=fds,
                lifeline=list(writer),
            )
            self._process = _spawn(self.name, setup)
        self.pid = self._process.pid
        stack.callback(self._abandon)
        self._words = LastWords()
        stdout, stderr = map(self._unblocked, (self._process.stdout, self._process.stderr))
        self._outputs = (
            Output(stdout, self.name, logging.INFO, None),
            Output(stderr, self.name, logging.WARNING, self._words),
        )
        self.sentinel = os.pidfd_open(self.pid) if lifeline is None else lifeline[0]
        self._has_pidfd = lifeline is None

    # -- while it runs -------------------------------------------------------------------------

    @property
    def log_fds(self) -> tuple[int, ...]:
        """What to wait on for ``pump``: those of stdout and stderr on which more can come."""
        return tuple(each.fd for each in self._outputs if each.fd is not None)

    def pump(self) -> None:
        """Log what it has written, up to a bound, without waiting: logger ``asgi_infer.worker``,
        stdout as ``INFO`` and stderr as ``WARNING``.
        """
        for output in self._outputs:
            output.pump()

    def dump(self) -> None:
        """Ask it for the Python stacks of its threads, which come on stderr. From any thread."""
        self._send(DUMP_SIGNAL)

    def interrupt(self) -> None:
        """Send it ``SIGKILL``, and wait for nothing. From any thread."""
        self._send(signal.SIGKILL)

    # -- its end -------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._reap()

    def ends_within(self, seconds: float) -> bool:
        """Whether it ends by itself, in some seconds at the most. What it writes is logged
        meanwhile, since it could not end while it waits for somebody to read.
        """
        deadline = time.monotonic() + seconds
        while not self._reap():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if _readable(left, self.sentinel, *self.log_fds):
                # A pipe is closed before the process has ended, or without that.
                time.sleep(0 if self._has_pidfd else _STEP)
                self.pump()
        return True

    def kill(self) -> None:
        """End it, also if it is stopped, and wait for that. More than once does no harm."""
        self.interrupt()
        if not self.ends_within(_PATIENCE):
            logger.error(
                "%s: process %d was killed and did not end in %g s: it hangs in the kernel (a "
                "driver, a network file system). It is left behind",
                self.name,
                self.pid,
                _PATIENCE,
            )

    def died(self) -> str:
        """How it ended, as what follows the subject of a sentence; ``last_words`` are complete
        then.

        To be called when it has closed its end of a socket, or the sentinel is readable: it gets
        a moment to end in.
        """
        if not self.ends_within(_MOMENT):
            return "has closed its connection, but still runs"
        for output in self._outputs:
            output.finish()
        if self._status_lost:
            return (
                "ended, and its exit status was taken by other code of this process (SIGCHLD is "
                "ignored, or somebody waits for all children)"
            )
        return describe(cast("int", self._process.returncode), killed=self._killed)

    @property
    def last_words(self) -> str:
        """The last lines that it wrote to stderr; of a crash, the reason and the stack."""
        return str(self._words)

    def close(self) -> None:
        """End it if it still runs, log what is left, and close what belongs to it.

        More than once does no harm.
        """
        if self.sentinel < 0:
            return
        self.kill()
        for output in self._outputs:
            output.finish()
        with self._lock:
            os.close(self.sentinel)
            self.sentinel = -1

    def detach(self) -> None:
        """Let it live on, and close what belongs to it: what it writes is not read any more.

        It is reaped by ``bury_detached``, once it has ended.
        """
        for output in self._outputs:
            output.finish()
        with self._lock:
            os.close(self.sentinel)
            self.sentinel = -1
        self._process.returncode = 0  # so that nobody else waits for it, or complains
        _detached.append(self)

    def _send(self, signum: int) -> None:
        with self._lock:
            if self._reaped or self.sentinel < 0 or _readable(0, self.sentinel):
                return
            self._killed |= signum == signal.SIGKILL
            with suppress(ProcessLookupError):  # it has ended just now
                if self._has_pidfd:
                    signal.pidfd_send_signal(self.sentinel, signum)
                else:
                    os.kill(self.pid, signum)

    def _reap(self) -> bool:
        with self._lock:
            if self._reaped:
                return True
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self._status_lost, pid, status = True, self.pid, 0
            self._reaped = pid == self.pid
            if self._reaped:
                self._process.returncode = os.waitstatus_to_exitcode(status)
            return self._reaped

    def _abandon(self) -> None:
        """Something failed just after it was started."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdout, self._process.stderr):
            cast("FileIO", file).close()

    @staticmethod
    def _unblocked(file: object) -> FileIO:
        pipe = cast("FileIO", file)
        os.set_blocking(pipe.fileno(), False)
        return pipe


_detached: list[Child] = []  # under the GIL: to append and to replace is all that is done


def bury_detached() -> None:
    """Reap those children that were detached and have ended."""
    _detached[:] = [each for each in _detached if not each._reap()]  # noqa: SLF001  # its own file


def describe(code: int, *, killed: bool) -> str:
    """What became of a process.

    :param code: its exit code, or the number of a signal, negative
    :param killed: whether its parent killed it
    """
    if code >= 0:
        return f"ended with exit code {code}"
    if code == _OWN and killed:
        return "was killed by its worker"
    if code == _OWN:
        return "was killed by SIGKILL (by somebody, or by the kernel when memory ran out)"
    return f"was killed by {signal_name(-code)}"


def signal_name(number: int) -> str:
    """``SIGSEGV``, ``SIGRTMIN+3``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        first = getattr(signal, "SIGRTMIN", number)
        return f"SIGRTMIN+{number - first}" if number > first else f"signal {number}"


@cache
def has_pidfd() -> bool:
    """Whether there are descriptors of processes here: Linux 5.3, if no sandbox forbids them."""
    try:
        os.close(os.pidfd_open(os.getpid()))
        signal.pidfd_send_signal  # noqa: B018
    except (AttributeError, OSError):
        return False
    return True


def main_module_name() -> str | None:
    """What a child can import this program's main module by. See ``_boot.parent_main``."""
    if _boot.in_child:
        return _boot.parent_main
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name is not None and name != "__main__":
        return str(name)
    if path is None:
        return None
    if name is not None:  # a directory or an archive with a __main__.py
        path = Path(path).parent
    return str(Path(path).absolute()) if Path(path).exists() else None


def options() -> list[str]:
    """The command line's options that this interpreter runs with."""
    letters = "".join(letter * int(getattr(sys.flags, flag)) for flag, letter in _FLAGS.items())
    found = [f"-{letters}"] if letters else []
    for option, value in sys._xoptions.items():  # noqa: SLF001  # documented
        found += ["-X", option if value is True else f"{option}={value}"]
    for filtered in sys.warnoptions:
        found += ["-W", filtered]
    return found


def _spawn(name: str, setup: _boot.Setup) -> subprocess.Popen[bytes]:
    if not sys.executable or getattr(sys, "frozen", False):
        raise RuntimeError(
            "this program can't start another Python: sys.executable is empty, or the program is "
            "frozen. Keep the model on a thread (ThreadWorker)"
        )
    with _memory_file() as file, _signals_blocked():
        file.write(marshal.dumps(dict(setup)))
        file.flush()
        file.seek(0)
        # The name at the end is for those who look at ps.
        command = [sys.executable, *options(), _boot.__file__, str(file.fileno()), name]
        try:
            return subprocess.Popen(  # noqa: S603  # ourselves
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=(file.fileno(), *setup["fds"], *setup["lifeline"]),
            )
        except OSError as error:
            raise OSError(
                error.errno, f"cannot start a process for {name}: {error.strerror}", error.filename
            ) from error


def _memory_file() -> BinaryIO:
    """A file without a name."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("asgi_infer"), "w+b")
    return cast("BinaryIO", tempfile.TemporaryFile())


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started here begins with these signals blocked, and is not ended by them before it
    has set itself up.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _readable(seconds: float, *fds: int) -> bool:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(math.ceil(seconds * 1000)))
