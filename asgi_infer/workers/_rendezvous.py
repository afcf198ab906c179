"""How the server processes of one deployment find, or start, the one process with their model.

There is a directory for all deployments of a user, the *base*, and in it one for each deployment,
with a socket. Both are private (mode 0700, owned by the user), and each is locked (``flock``):

    /tmp/asgi_infer-1000/                    the base. Its lock is the *gate*: held for moments
        0f3a9c5be2d14786/                    the lock of this one belongs to the model process
            socket
            servers                      locked by all servers together (LOCK_SH); tells which
                                         process has the model

Whoever comes holds the gate and tries the deployment's lock. Who gets it starts the model process
(a ``Claim``); the others connect to its socket. That is all there is to agree on, because

* the lock goes with the open file that the model process inherits, so that the kernel frees it
  when that dies of whatever, and not before: there are never two model processes;
* the starter listens before the gate opens again, and the model process inherits the socket:
  the others can connect at once, and are answered when the model has loaded. If it never does,
  their connections end with the last process that has the socket, and they come back here;
* the last model process removes the files at the gate, and holds that until it is dead. The base
  stays, so that all of them wait at one gate. (Should somebody else remove it, a look at the path
  tells, and the gate is taken anew.)
* every server has a share of a lock, for as long as it lives, so that one that leaves can tell
  whether it is the last, and has to end a model process that doesn't end by itself;
* what processes that were killed have left is removed by the next that starts one.

A directory that is locked is also left alone by systemd's clean-up of /tmp.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import itertools
import logging
import os
import re
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..native import processes

logger = logging.getLogger("asgi_infer.worker")

_LONGEST = 107 if sys.platform == "linux" else 103
"""Bytes of a path that a Unix socket can be bound to."""

_OPTIONS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME = re.compile(r"[0-9a-f]{16}")
_SOCKET, _SERVERS = "socket", "servers"


class Joined(NamedTuple):
    """A connection to the model process, and the right and duty to start it, if there is none."""

    sock: socket.socket
    presence: Presence
    claim: Claim | None


class Rendezvous:
    """Where the processes of one deployment meet.

    :param base: the directory of all deployments; made if it isn't there, but not its parents
    :param name: of the deployment, as made by ``deployment()``
    :raises ValueError: the path is too long for a Unix socket
    """

    def __init__(self, base: Path, name: str) -> None:
        self.base = base
        self.directory = base / name
        self._address = str(self.directory / _SOCKET)
        length = len(os.fsencode(self._address))
        if length > _LONGEST:
            raise ValueError(
                f"{self._address} has {length} bytes, and the path of a Unix socket can have no "
                f"more than {_LONGEST}: pass SharedWorker(directory=...) a shorter path"
            )

    def join(self, timeout: float = 10.0) -> Joined:
        """Connect to the model process, or become the one to start it.

        Takes microseconds, unless a process that is in the way here is just ending or stands
        still. The connection is answered by the model process once that is ready for it, and ends
        if it dies before: then join again.

        :param timeout: seconds
        :raises PermissionError: a directory is not private, or the other side is another user's
        :raises TimeoutError: neither came about in time
        :raises OSError: there is no room, nothing may be written there, and so on
        """
        try:
            return self._join(timeout)
        except OSError as error:
            if error.errno is None:  # it says what to do
                raise
            raise OSError(
                error.errno,
                f"{error.strerror}, where the processes of a server are to meet: {self.base}. "
                f"Repair that, or pass SharedWorker(directory=...) one that can be written to, in "
                f"a directory that is there",
            ) from error

    def _join(self, timeout: float) -> Joined:
        deadline = time.monotonic() + timeout
        for pause in _pauses():
            with _gate(self.base, deadline):
                joined = self._start_or_connect()
            if joined is not None:
                return joined
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"somebody has locked {self.directory}, but nobody answers there: look with "
                    f"lslocks for a process that is left over, and end it"
                )
            time.sleep(pause)
        raise AssertionError  # pragma: no cover  # pauses have no end

    def tidy(self, timeout: float = 10.0) -> None:
        """Remove what a model process that was killed has left, if there is none now.

        :raises TimeoutError: others have held the gate all the time
        """
        with _gate(self.base, time.monotonic() + timeout), suppress(FileNotFoundError):
            _remove_if_dead(self.directory)

    def owner(self) -> int | None:
        """A pidfd of the model process, as that has signed; the caller's to close.

        None if it has not, has ended, or is in a container of its own.
        """
        try:
            pid, born = map(int, (self.directory / _SERVERS).read_text().split())
        except (OSError, ValueError):
            return None
        return descriptor_of(pid, born)

    def _start_or_connect(self) -> Joined | None:
        lock = _open_private(self.directory)
        if _try_lock(lock):
            _sweep(self.base, but=self.directory)
            return self._start(lock)
        os.close(lock)
        sock = self._connect()
        return None if sock is None else Joined(sock, Presence(self.directory), None)

    def _start(self, lock: int) -> Joined:
        with ExitStack() as stack:
            stack.callback(os.close, lock)
            with suppress(FileNotFoundError):
                Path(self._address).unlink()  # of one that was killed
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(self._address)
            listener.listen(socket.SOMAXCONN)
            sock = self._connect()
            if sock is None:  # pragma: no cover  # it listens, and nobody else is there yet
                raise ConnectionRefusedError(f"can't connect to {self._address}")
            presence = Presence(self.directory)
            stack.pop_all()
        return Joined(sock, presence, Claim(listener, lock))

    def _connect(self) -> socket.socket | None:
        with ExitStack() as stack:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.setblocking(False)  # with the gate in hand nobody may wait
            try:
                sock.connect(self._address)
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                return None  # it is just ending, or as many are waiting as the kernel allows
            check_peer(sock)
            sock.setblocking(True)
            stack.pop_all()
        return sock


class Presence:
    """A server's share of the lock that all servers of a deployment have. Made at the gate."""

    def __init__(self, directory: Path) -> None:
        self._base = directory.parent
        self._fd = os.open(directory / _SERVERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_SH)  # nobody has it for himself, but at the gate

    def leave(self, timeout: float = 10.0) -> bool:
        """Give it back; return whether it was the last. Of several that leave at once, one is.

        :raises TimeoutError: others have held the gate all the time
        """
        try:
            with _gate(self._base, time.monotonic() + timeout):
                return _try_lock(self._fd)
        finally:
            self.close()

    def close(self) -> None:
        """Close it, where it is another process's as well: in a forked child."""
        os.close(self._fd)


class Claim:
    """What makes a process the model's: the deployment's lock, and the socket that listens.

    The starter passes ``fds`` on to the process that it starts, and closes its own. Used by one
    thread.
    """

    def __init__(self, listener: socket.socket, lock: int) -> None:
        self.listener = listener
        self._lock = lock
        self._gate: int | None = None
        listener.setblocking(False)
        _keep_from_forks(self)

    @classmethod
    def inherited(cls, listener: int, lock: int) -> Claim:
        """The claim that the parent has passed on, as the descriptors ``fds``."""
        for fd in (listener, lock):
            os.set_inheritable(fd, False)  # it ends with this process, and not with its children
        return cls(socket.socket(fileno=listener), lock)

    @property
    def fds(self) -> tuple[int, int]:
        """The descriptors that the model process has to inherit."""
        return self.listener.fileno(), self._lock

    def sign(self) -> None:
        """Say which process has the model, to those who have not been served yet."""
        pid = os.getpid()
        with suppress(OSError):  # the disk is full, or the files are gone: then nobody knows
            path = Path(self.listener.getsockname()).parent / _SERVERS
            path.write_text(f"{pid} {processes.start_time(pid)}")

    def accept(self) -> socket.socket | None:
        """The next connection; None if nobody waits for one."""
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return None
            try:
                check_peer(sock)
            except PermissionError as error:
                sock.close()
                logger.warning("refused a connection: %s", error)
            else:
                return sock

    def withdraw(self, timeout: float = 10.0) -> None:
        """Remove the files, and keep everybody waiting until ``close()`` or the process's end.

        So it comes last: whoever would start the next model process waits for the end of this one.

        :raises TimeoutError: others have held the gate all the time; the files stay
        """
        directory = Path(self.listener.getsockname()).parent
        self._gate = _take_gate(directory.parent, time.monotonic() + timeout)
        if _leads_to(directory, self._lock):
            _remove(directory)

    def close(self) -> None:
        """Close this process's descriptors. The claim lasts while another process has them."""
        fds = [self._lock] if self._gate is None else [self._gate, self._lock]
        for fd in fds:
            os.close(fd)
        self.listener.close()
        _claims.discard(self)


def default_base() -> Path:
    """Where deployments meet unless the user says otherwise."""
    return Path(tempfile.gettempdir(), f"asgi_infer-{os.geteuid()}")


def deployment(name: str, *functions: object, server: bool) -> str:
    """A name that all processes of a deployment arrive at, and others don't.

    :param name: of the runner
    :param functions: those that load the model and warm it up
    :param server: whether only the processes of one server belong together, or all that run the
        same code in the same place
    """
    with suppress(OSError):  # the current directory is gone
        name = f"{name}\0{Path.cwd()}"
    what = [name, sys.executable, *map(_full_name, functions)]
    if server:
        pid = processes.server()
        what += [str(pid), str(processes.start_time(pid))]
    return hashlib.sha256("\0".join(what).encode()).hexdigest()[:16]


def check_peer(sock: socket.socket) -> None:
    """Check that the other side of a Unix socket belongs to the same user.

    :raises PermissionError: it doesn't
    """
    if not hasattr(socket, "SO_PEERCRED"):  # pragma: no cover  # macOS: the directory must do
        return
    layout = struct.Struct("iII")  # pid, uid, gid
    option = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    pid, uid, _ = layout.unpack(option)
    if uid != os.geteuid():
        raise PermissionError(
            f"process {pid} at the other side of the socket runs as user {uid}, and this one as "
            f"{os.geteuid()}: run all processes of a deployment as one user"
        )


def descriptor_of(pid: int, born: int) -> int | None:
    """A pidfd; None if that process has ended, or if the number is another's here.

    :param born: when it was started, as ``processes.start_time`` says
    """
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return None
    if processes.start_time(pid) == born:
        return fd
    os.close(fd)
    return None


# -- locks -------------------------------------------------------------------------------------


@contextmanager
def _gate(base: Path, deadline: float) -> Iterator[None]:
    fd = _take_gate(base, deadline)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # also if another thread has forked meanwhile
        os.close(fd)


def _take_gate(base: Path, deadline: float) -> int:
    """Lock the base; return its descriptor.

    It tries again and again rather than wait in the kernel, where nothing but a signal could end
    it: a process that has the gate may have been stopped.
    """
    fd = _open_private(base)
    for pause in _pauses():
        if _try_lock(fd):
            if _leads_to(base, fd):
                return fd
            os.close(fd)  # somebody has removed it
            fd = _open_private(base)
        elif time.monotonic() > deadline:
            os.close(fd)
            raise TimeoutError(
                f"another process has held the lock of {base} for too long: look with lslocks for "
                f"one that was stopped (SIGSTOP), and let it go on or end it"
            )
        else:
            time.sleep(pause)
    raise AssertionError  # pragma: no cover  # pauses have no end


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leads_to(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _pauses() -> Iterator[float]:
    return itertools.chain((0.001, 0.002, 0.005, 0.01), itertools.repeat(0.02))


# -- directories ---------------------------------------------------------------------------------


def _open_private(path: Path) -> int:
    with suppress(FileExistsError):
        path.mkdir(0o700)
    try:
        fd = os.open(path, _OPTIONS)
    except OSError as error:  # another user's, a file, a symbolic link
        raise _not_private(path) from error
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        os.close(fd)
        raise _not_private(path)
    return fd


def _not_private(path: Path) -> PermissionError:
    return PermissionError(
        f"{path} has to be a directory (and no link to one) that belongs to user {os.geteuid()} "
        f"and to nobody else, as after chmod 700: repair or remove it, or pass "
        f"SharedWorker(directory=...) another one"
    )


def _sweep(base: Path, *, but: Path) -> None:
    """Remove what deployments have left whose processes were all killed. Behind the gate only."""
    for directory in base.iterdir():
        if _NAME.fullmatch(directory.name) and directory != but:
            with suppress(OSError):  # not ours, or somebody is at work here by hand
                _remove_if_dead(directory)


def _remove_if_dead(directory: Path) -> None:
    fd = os.open(directory, _OPTIONS)
    try:
        if _try_lock(fd):
            _remove(directory)
    finally:
        os.close(fd)


def _remove(directory: Path) -> None:
    for name in (_SOCKET, _SERVERS):
        (directory / name).unlink(missing_ok=True)
    directory.rmdir()


# -- forks ---------------------------------------------------------------------------------------

# Those that this process has. Changed by the thread that makes or closes one, under the GIL.
_claims: set[Claim] = set()


def _keep_from_forks(claim: Claim) -> None:
    _register_at_fork()
    _claims.add(claim)


@functools.cache
def _register_at_fork() -> None:
    """A child that the model's libraries fork would keep the lock when the model has died."""
    os.register_at_fork(after_in_child=_close_claims)


def _close_claims() -> None:
    for claim in list(_claims):
        claim.close()


def _full_name(function: object) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"
