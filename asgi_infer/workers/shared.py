"""One model for all processes of a server."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from .._buffer import StreamCall
from .._call import here
from .._errors import WorkerCrashed
from .._model import ModelReference
from ._channel import Channel, Kind, Message
from ._child import DUMP_SIGNAL, Child, bury_detached, has_pidfd
from ._page import ControlPage, make_page_file
from ._protocol import ModelSpec
from ._remote import Link, Overran, RemoteReplica, RemoteWorker, encode_spec, reduce_reference
from ._rendezvous import Claim, Presence, Rendezvous, default_base, deployment, descriptor_of
from ._shared_host import EXCLUSIVE, HELLO

logger = logging.getLogger("asgi_infer")

TARGET = "asgi_infer.workers._shared_host:serve"

_PATIENCE = 10.0  # seconds that the model process gets for its end when the last server leaves
_STEP = 0.5  # seconds after which that server looks whether it is still the last


@dataclass(frozen=True)
class SharedWorker(RemoteWorker):
    """Keep one model for all processes of a server (``uvicorn --workers 4``, gunicorn, granian).

    The first server process that starts its runner starts the process with the model; the others
    connect to that over a Unix socket, which only their own user can reach. Each has its own
    queue, and they take turns. A server process that dies loses only its own calls. When the
    model process dies, one of them starts it again, and only the call that ran is lost. It ends
    when the last server process has gone.

    Server processes belong together if they have the same parent, working directory and Python,
    and their runners the same name, ``load`` and ``warmup``.

    Linux and macOS only.

    :param directory: where server processes meet, which must belong to their user alone, on a
        local file system. With one, processes of several parents can share a model. By default
        it is below the directory for temporary files, and each parent has its own
    :param hard_timeout: seconds after which a call, or a step of a stream, that still runs is
        killed, and the model process with it
    :param startup_timeout: seconds that loading and warming up may take
    :param retry_crashed: run a call again, once, in which the process has died. Only for calls
        that may run twice
    :param restart: what is done about a process that dies
    :raises ValueError: a number makes no sense, or the path is too long for a Unix socket
    """

    directory: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rendezvous("0" * 16)

    @property
    def replicas(self) -> int:
        """One, for all."""
        return 1

    def replica(self, spec: ModelSpec, number: int, /) -> SharedReplica:
        """The model, which this process starts, or finds, when it is opened."""
        del number
        mine = self.directory is None
        name = deployment(spec.name, spec.load, spec.warmup, server=mine)
        return SharedReplica(spec, self, rendezvous=self._rendezvous(name))

    def _rendezvous(self, name: str) -> Rendezvous:
        base = default_base() if self.directory is None else Path(self.directory)
        return Rendezvous(base.absolute(), name)


class SharedReplica(RemoteReplica):
    """A model in a process that other servers use as well."""

    def __init__(self, spec: ModelSpec, worker: SharedWorker, *, rendezvous: Rendezvous) -> None:
        super().__init__(spec, worker)
        self._rendezvous = rendezvous
        self._shared: SharedLink  # the latest one, from the first connection on

    def _connect(self) -> Link:
        link = SharedLink(self._spec, self._rendezvous)
        try:
            opening = encode_spec(link.channel, self._spec)
        except BaseException:
            link.close()
            raise
        with suppress(OSError):  # it is just ending, as whoever waits for its answer is told
            link.channel.send(Kind.OPEN, opening)
        self._shared = link
        return link

    def open(self, lost: Callable[[], object], /) -> None:
        """Find the model process, or start it, and return when it has loaded the model.

        :raises NotReady: that took longer than ``startup_timeout``
        :raises WorkerCrashed: this process has started it, and it died
        """
        while True:
            try:
                super().open(lost)
            except WorkerCrashed:
                if self._shared.starter:
                    raise
            else:
                break  # and not again: it was just ending, or its starter has been told why
        self._shared.loaded()

    def _stop(self, link: Link) -> None:
        """Others may use it: it ends by itself when nobody does."""

    def _kill(self, link: Link) -> None:
        # One that this server waits for, and has not started, may be busy with others' calls.
        self._shared.condemned = self._shared.ready or self._shared.starter
        super()._kill(link)

    def _next_stream(self) -> int:
        call = here.current_call and here.current_call()
        others_may_run = isinstance(call, StreamCall) and call.interleave
        return 2 * super()._next_stream() + (0 if others_may_run else EXCLUSIVE)

    def _await(self, link: Link, limit: float | None) -> Message:
        """As in the parent class; the limit is for what runs, and not for what waits there."""
        wait = limit
        while True:
            try:
                return super()._await(link, wait)
            except Overran:
                wait = self._left(link, limit or 0.0)
                if wait <= 0.0:
                    raise

    def _left(self, link: Link, limit: float) -> float:
        if not self._shared.ready:
            return 0.0  # it loads
        if link.page.started != self._number:
            return limit  # others have their turn
        return link.page.began + limit - time.monotonic()


class SharedLink:
    """A connection to the model process; where this process has started that, its parent's side.

    :param spec: what references to the model carry as their owner, and the name for the log
    :param rendezvous: where the process is found
    :raises OSError: it could be neither found nor started
    :ivar starter: whether this process has started it
    :ivar ready: whether the model is loaded
    :ivar condemned: whether it is to be killed also if others use it
    """

    def __init__(self, spec: ModelSpec, rendezvous: Rendezvous) -> None:
        self.ready = self.condemned = False
        self._rendezvous = rendezvous
        self._child: Child | None = None
        self._pidfd: int | None = None  # where it is no child of this process
        self._last: bool | None = None  # to leave; None as long as this server has not left
        bury_detached()
        sock, self._presence, claim = rendezvous.join()
        self.starter = claim is not None
        with ExitStack() as stack:
            stack.callback(self._presence.leave)
            self.channel = Channel(sock, dispatch={ModelReference: reduce_reference(spec)})
            stack.callback(self.channel.close)
            if claim is not None:
                self._child = start(spec.name, claim)
            self.page = introduce(sock)
            stack.pop_all()

    def loaded(self) -> None:
        """The model is there. If this is not its process's parent, find out which that is."""
        self.ready = True
        if self._child is None and has_pidfd():
            # If it has died just now, the channel will tell.
            self._pidfd = descriptor_of(self.page.pid, self.page.born)

    @property
    def watched(self) -> Sequence[int]:
        """The death of the process, and what it writes."""
        if self._child is not None:
            return (self._child.sentinel, *self._child.log_fds)
        return () if self._pidfd is None else (self._pidfd,)

    def attend(self) -> bool:
        """Log what it has written; False if it has ended."""
        if self._child is not None:
            self._child.pump()
        return not self._known or not self._ended(0.0)

    def dump(self) -> None:
        """Have it write its stacks to the log of its parent."""
        self._send(DUMP_SIGNAL)

    def kill(self) -> None:
        """End it if it is to be killed, or nobody else uses it; else let it know that nobody here
        waits any more.
        """
        if self.condemned or self._leave():
            self._end()
        else:
            self.page.cancelled = self.page.started

    def died(self) -> str:
        """How it has ended, as far as that is known here."""
        if self._child is not None:
            return self._child.died()
        return "has died (how, the log of the server process that had started it tells)"

    @property
    def last_words(self) -> str:
        """The last lines that it has written to stderr, if they came here."""
        return "" if self._child is None else self._child.last_words

    def close(self) -> None:
        """Hang up. If nobody else uses it, wait for its end, and see to it that it ends."""
        self.channel.close()
        if self._leave():
            self._see_to_its_end()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if self._child is not None and self._child.sentinel >= 0:
            if self._child.ended:
                self._child.close()
            else:
                self._child.detach()
        bury_detached()

    def leave_behind(self) -> None:  # pragma: no cover  # what a forked child does is not seen
        """In a forked child: close the channel, whose end the model process is to notice."""
        self.channel.close()
        self._presence.close()

    def _leave(self) -> bool:
        """Whether this was the last server."""
        if self._last is None:
            self._find()
            try:
                self._last = self._presence.leave()
            except OSError as error:  # the gate is held up
                logger.warning("could not tell whether others use the model: %s", error)
                self._last = False
        return self._last

    def _find(self) -> None:
        """If it has not answered yet, and is no child of this process: find out which it is."""
        if not self._known and has_pidfd():
            self._pidfd = self._rendezvous.owner()

    def _see_to_its_end(self) -> None:
        """Wait until it has ended, or somebody else has come. It removes its files, if it can."""
        until = time.monotonic() + _PATIENCE
        while self._known and not self._ended(_STEP) and self._still_last():
            if time.monotonic() > until:
                logger.warning(
                    "the model process did not end within %g s of its last server, and is killed",
                    _PATIENCE,
                )
                self._end()
        with suppress(OSError):  # then the next that comes there does it
            self._rendezvous.tidy()

    def _still_last(self) -> bool:
        try:
            return Presence(self._rendezvous.directory).leave()
        except OSError:
            return True  # the files are gone: it is just ending

    @property
    def _known(self) -> bool:
        """Whether there is more to tell its end by than the channel's."""
        return self._child is not None or self._pidfd is not None

    def _ended(self, within: float) -> bool:
        """Whether it has ended, after a while at the most, if it is known."""
        if self._child is not None:
            return self._child.ends_within(within)
        return self._pidfd is not None and _readable(self._pidfd, within)

    def _end(self) -> None:
        self._send(signal.SIGKILL)
        if self._known:
            self._ended(_PATIENCE)

    def _send(self, signum: int) -> None:
        if self._child is not None:
            self._child.dump() if signum == DUMP_SIGNAL else self._child.interrupt()
        elif self._pidfd is not None:
            with suppress(ProcessLookupError):  # it has ended just now
                signal.pidfd_send_signal(self._pidfd, signum)


def start(name: str, claim: Claim) -> Child:
    """Start the model process, to which the claim passes.

    :raises OSError: it could not be started; others may try
    """
    try:
        return Child(name=name, fds=claim.fds, die_with_parent=False, target=TARGET)
    except BaseException:
        claim.withdraw()
        raise
    finally:
        claim.close()


def introduce(sock: socket.socket) -> ControlPage:
    """Send the other side a control page, before anything else."""
    fd = make_page_file()
    try:
        with suppress(OSError):  # it is ending, as the answer will tell
            socket.send_fds(sock, [HELLO], [fd])
        return ControlPage(fd)
    finally:
        os.close(fd)


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
