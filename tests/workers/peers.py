"""The other side of a channel, in this process: a thread that does as it is told."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Sequence

from asgi_infer._model import ModelReference
from asgi_infer.workers._channel import Channel, Kind, Message
from asgi_infer.workers._page import ControlPage, make_page_file
from asgi_infer.workers._protocol import ModelSpec
from asgi_infer.workers._remote import reduce_reference


class Peer:
    """What a process with a model looks like from inside: it answers, or it dies.

    :param behave: called with each message and this peer; to reply is up to it
    """

    def __init__(self, behave: Callable[[Message, Peer], object]) -> None:
        ours, theirs = socket.socketpair()
        page_fd = make_page_file()
        self.pages = ControlPage(page_fd), ControlPage(page_fd)
        os.close(page_fd)
        self.ours = ours
        self.channel = Channel(theirs)
        self.killed = threading.Event()
        self.sentinel, self._alive = os.pipe()
        self._behave = behave
        self.thread = threading.Thread(target=self._live, name="peer")
        self.thread.start()

    @property
    def page(self) -> ControlPage:
        return self.pages[1]

    def reply(self, value: object, message: Message, kind: Kind = Kind.RESULT) -> None:
        encoded = None if value is None else self.channel.encode(value)
        self.channel.send(kind, encoded, number=message.number)

    def _live(self) -> None:
        try:
            while True:
                message = self.channel.receive()
                if message.kind is Kind.OPEN:
                    self.channel.send(Kind.READY, number=message.number)
                elif message.kind is Kind.STOP:
                    self.channel.send(Kind.END, number=message.number)
                    return
                else:
                    self.page.started = message.number
                    self._behave(message, self)
        except (EOFError, OSError, Death):
            return
        finally:
            self.channel.close()
            os.close(self._alive)


class Death(Exception):
    """The end of a peer, raised in it."""


class PeerLink:
    """A link to a peer. See ``Link``."""

    def __init__(self, peer: Peer, spec: ModelSpec) -> None:
        self.peer = peer
        self.channel = Channel(peer.ours, dispatch={ModelReference: reduce_reference(spec)})
        self.page = peer.pages[0]
        self.last_words = ""
        self.dumped = 0

    @property
    def watched(self) -> Sequence[int]:
        return (self.peer.sentinel,)

    def attend(self) -> bool:
        poll = select.poll()
        poll.register(self.peer.sentinel, select.POLLIN)
        return not poll.poll(0)

    def dump(self) -> None:
        self.dumped += 1

    def kill(self) -> None:
        self.peer.killed.set()
        self.peer.ours.shutdown(socket.SHUT_RDWR)

    def died(self) -> str:
        return "was killed by SIGTEST"

    def close(self) -> None:
        if self.peer.sentinel < 0:
            return
        self.peer.killed.set()
        self.channel.close()
        self.peer.thread.join()
        os.close(self.peer.sentinel)
        self.peer.sentinel = -1

    def leave_behind(self) -> None:
        self.channel.close()
