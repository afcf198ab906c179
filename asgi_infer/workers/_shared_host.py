"""The model process of several servers: a main thread that owns the model and serves them in turn.

Guarantees
    * One request runs at a time. Of the servers that wait for one, the one served longest ago
      comes next.
    * A stream that does not let others run keeps the model until it is closed, as it would in a
      process of its own.
    * A server that dies loses its own calls: what it waited for is thrown away, and the
      generators that it left open are closed.
    * What nobody waits for any more when its turn comes is not run.
    * When the last server has gone, the model is destroyed, the files are removed, and the
      process ends.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Mapping
from typing import NoReturn

from ..native import processes
from . import _host
from ._channel import Channel, Kind, Message
from ._errors_across import PackedError, pack_error
from ._host import Host, Request
from ._page import ControlPage
from ._protocol import Used
from ._rendezvous import Claim

HELLO = b"p"
"""What a server sends first, and its control page with it."""

EXCLUSIVE = 1
"""The bit of a stream's number that says that nobody else may run between two of its items."""


def serve(listener: int, lock: int) -> NoReturn:  # pragma: no cover  # in a process of its own
    """Be the model process: load what the first server asks for, and serve all that come.

    The interpreter is not taken down at the end, which could be held up by anything: those who
    have come since wait for it, to start the next.
    """
    claim = Claim.inherited(listener, lock)
    claim.sign()
    model = SharedHost(claim)
    code = 1
    try:
        while model.turn():
            pass
        model.close()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Server:
    """The connection of one server.

    :param number: of the connection
    """

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.number = number
        self.channel: Channel | None = None
        self.page: ControlPage | None = None
        self.streams: set[int] = set()  # those that are open, by their numbers there
        self.used = Used()  # for its calls alone

    def receive(self, *, wait: bool) -> Message | None:
        """What it asks for, if that has come.

        :raises EOFError: it has gone
        :raises OSError: likewise
        """
        if self.channel is None:
            self._meet()
            return None
        return self.channel.receive() if wait else self.channel.receive_now()

    def _meet(self) -> None:
        """The control page comes first."""
        flags = socket.MSG_DONTWAIT
        hello, fds, _, _ = socket.recv_fds(self.sock, len(HELLO), 1, flags)
        try:
            if not hello or not fds:
                raise EOFError("it left before it had said anything")
            self.page = ControlPage(fds[0])
        finally:
            for fd in fds:
                os.close(fd)
        self.page.pid, self.page.born = os.getpid(), processes.start_time(os.getpid())
        self.channel = Channel(self.sock, main=_host.main_there)

    def close(self) -> None:
        """Hang up."""
        if self.channel is None:
            self.sock.close()
        else:
            self.channel.close()


class SharedHost:
    """A model, and the servers that use it. All on one thread.

    :param claim: what makes this process the model's
    """

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._host: Host | None = None
        self._failure: PackedError | None = None  # why there is no model
        self._servers: OrderedDict[int, Server] = OrderedDict()  # served longest ago first
        self._number = 0  # of the latest connection
        self._alone: Server | None = None  # whose stream keeps the model
        self._all = select.poll()
        self._all.register(claim.listener, select.POLLIN)

    # -- who comes next ------------------------------------------------------------------------

    def turn(self) -> bool:
        """Wait for a request, and answer it. False when there is nobody left to wait for."""
        if self._alone is not None:
            self._attend(self._alone)
            return True
        ready = dict(self._all.poll(None if self._servers else 0))
        if self._claim.listener.fileno() in ready:
            self._accept()
        self._forget_dead(ready)
        for fd, server in self._servers.items():
            if fd in ready:
                self._servers.move_to_end(fd)
                self._attend(server)
                return True
        return bool(ready)

    def _accept(self) -> None:
        while (sock := self._claim.accept()) is not None:
            self._number += 1
            self._servers[sock.fileno()] = Server(sock, self._number)
            self._all.register(sock, select.POLLIN)

    def _forget_dead(self, ready: Mapping[int, int]) -> None:
        """Those that have gone: what they had asked for before is not even read."""
        for fd, server in list(self._servers.items()):
            if ready.get(fd, 0) & select.POLLHUP:
                self._forget(server)

    def _attend(self, server: Server) -> None:
        # In a function of its own: what came and went must not stay alive until the next one.
        try:
            message = server.receive(wait=server is self._alone)
            if message is not None:
                self._answer(server, message)
        except (EOFError, OSError, ValueError):
            self._forget(server)

    def _forget(self, server: Server) -> None:
        """It has gone: hang up, and close what it left open."""
        fd = server.sock.fileno()
        del self._servers[fd]
        self._all.unregister(fd)
        server.close()
        if server is self._alone:
            self._alone = None
        for stream in server.streams:
            self._end(stream)

    def _end(self, stream: int) -> None:
        host = self._host
        assert host is not None  # noqa: S101  # the stream has begun there
        try:
            host.end(stream)
        except BaseException:
            traceback.print_exc()  # to the log of the worker: there is nobody else to tell

    # -- requests ------------------------------------------------------------------------------

    def _answer(self, server: Server, message: Message) -> None:
        channel, page = server.channel, server.page
        assert channel is not None  # noqa: S101  # it has sent a message
        assert page is not None  # noqa: S101  # it has sent that before
        if message.kind is Kind.OPEN:
            self._open(channel, message)
        elif message.kind is not Kind.CLOSE and _given_up(message, page):
            channel.send(Kind.SKIPPED, number=message.number)
        else:
            self._run(server, channel, page, message)

    def _open(self, channel: Channel, message: Message) -> None:
        """Load the model for the first that asks. All others ask for the same: they have met at
        a place that is named after it.
        """
        if self._host is None and self._failure is None:
            self._load(message)
        if self._failure is not None:
            channel.send(Kind.RAISED, channel.encode(self._failure), number=message.number)
        else:
            channel.send(Kind.READY, number=message.number)

    def _load(self, message: Message) -> None:
        try:
            host = Host(message.body())
            host.open()
        except BaseException as error:
            self._failure = pack_error(error, _host.formatted(error))
            traceback.clear_frames(error.__traceback__)
        else:
            self._host = host

    def _run(self, server: Server, channel: Channel, page: ControlPage, message: Message) -> None:
        """Run a call, or a step of a stream, in the server's name."""
        host = self._host
        assert host is not None  # noqa: S101  # it has been told that there is one
        message.stream |= server.number << 40  # all servers number theirs from 1
        page.began = time.monotonic()
        _host.count_from(server.used)
        try:
            _host.answer(host, channel, page, message)
        finally:
            server.used = _host.used()
            self._note_stream(server, host, message.stream)

    def _note_stream(self, server: Server, host: Host, stream: int) -> None:
        """Whether a stream is open that was just used, begun or closed."""
        if host.has(stream):
            server.streams.add(stream)
            self._alone = server if stream & EXCLUSIVE else None
        elif stream in server.streams:
            server.streams.discard(stream)
            self._alone = None

    def close(self) -> None:
        """Destroy the model, and remove the files. The process has to end with that."""
        try:
            if self._host is not None:
                self._host.close()
        except BaseException:
            traceback.print_exc()
        self._claim.withdraw()


def _given_up(message: Message, page: ControlPage) -> bool:
    return Request(message.number, message.deadline, page).given_up(time.monotonic())
