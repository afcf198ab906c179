"""Messages between two processes of one machine, over a socket that nobody else has.

One side asks and the other answers, in turn, so a message always finds the socket's buffer
empty: what is small goes through it, all else through shared memory, and no send ever blocks.
"""

from __future__ import annotations

import enum
import os
import pickle
import socket
import struct
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

from ._codec import (
    ASKS_MAIN,
    HAS_LAYOUT,
    INLINE,
    LAYOUT,
    Encoded,
    Encoder,
    Layout,
    Reducer,
    decode,
    main_here,
)
from ._protocol import NOTHING_USED, Used
from ._segments import MOST, Mapped, Segments


class Kind(enum.IntEnum):
    """What a message is for."""

    OPEN = 0
    READY = 1
    EXECUTE = 2
    ITERATE = 3
    NEXT = 4
    CLOSE = 5
    STOP = 6
    RESULT = 7
    RAISED = 8
    END = 9
    SKIPPED = 10


class Message:
    """What has arrived. One that is never read frees its memory when it dies.

    :ivar kind: what it is for
    :ivar number: of the call that it belongs to
    :ivar deadline: of that call, on the clock of ``time.monotonic()``, which is the same in all
        processes of a machine; None if it has none
    :ivar stream: number of the stream that it belongs to
    :ivar used: what the sender had used when it sent this, if it said so
    :ivar size: bytes of its body
    """

    __slots__ = ("_read", "deadline", "kind", "number", "size", "stream", "used")

    def __init__(
        self,
        kind: Kind,
        number: int,
        stream: int,
        deadline: float | None,
        used: Used | None,
        size: int,
        read: Callable[[], Any],
    ) -> None:
        self.kind = kind
        self.number = number
        self.stream = stream
        self.deadline = deadline
        self.used = used
        self.size = size
        self._read = read

    def body(self) -> Any:
        """Unpickle its body, once. Arrays in it lie where the sender has put them: they can be
        kept, and as long as one is alive, all memory of this message stays in use.

        :raises OSError: there was no room to map that memory here
        :raises BaseException: whatever unpickling raises
        """
        read = self._read
        del self._read  # from here on nothing but the arrays keeps the memory in use
        return read()


class Channel:
    """One end. Used by one thread at a time.

    :param sock: a connected ``AF_UNIX`` stream socket, which is closed with the channel
    :param dispatch: for objects of exactly these types, a function that returns what their
        ``__reduce__`` should
    :param main: tells in which module to look for what the other process has in its main module;
        called whenever a message asks for something there. By default that is ``__main__``
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        dispatch: Mapping[type, Reducer] = MappingProxyType({}),
        main: Callable[[], str] = main_here,
    ) -> None:
        sock.settimeout(None)  # whatever socket.setdefaulttimeout has made of it
        self._sock = sock
        self._main = main
        self._segments = Segments()
        self._mapped = Mapped()
        self._encoder = Encoder(self._segments, dispatch)
        self._inbox = b""  # what has arrived, and is no complete message yet
        self._descriptors: deque[int] = deque()  # arrived, and not mapped yet

    def fileno(self) -> int:
        """The socket, to wait for: it is readable when a message, or the end, has come."""
        return self._sock.fileno()

    def encode(self, body: object) -> Encoded:
        """Pickle ``body``, and copy what is large into shared memory. Nothing is sent yet, and
        nothing leaks if that raises, or if the result is thrown away.

        :raises MemoryError: there is not so much memory to share
        :raises OSError: there is no file descriptor left
        :raises BaseException: whatever pickling raises
        """
        return self._encoder.encode(body)

    def send(
        self,
        kind: Kind,
        encoded: Encoded | None = None,
        *,
        number: int = 0,
        deadline: float | None = None,
        stream: int = 0,
        used: Used | None = None,
    ) -> None:
        """Send a message, which the other side is waiting for. What was encoded is sent once.

        :raises OSError: the other side has gone
        """
        if encoded is None:
            encoded = _EMPTY
        flags, tail = encoded.flags, encoded.tail
        descriptor = encoded.descriptor if flags & HAS_LAYOUT else None
        if deadline is not None:
            flags |= _HAS_DEADLINE
        if used is not None:
            flags |= _HAS_USED
        if descriptor is not None:
            flags |= _NEW_SEGMENT
        dropped, lost = self._segments.tidy(), self._mapped.lost
        if dropped or lost:
            tail = array("I", dropped + lost).tobytes() + tail
        head = _HEAD.pack(
            kind,
            flags,
            len(dropped),
            len(lost),
            len(tail),
            number,
            stream,
            deadline or 0.0,
            *(used or NOTHING_USED),
        )
        self._transmit(head + tail, descriptor)
        if dropped or lost:
            dropped.clear()
            lost.clear()
        encoded.sent()

    def receive(self) -> Message:
        """Wait for a message.

        :raises EOFError: the other side has closed its end, or has died, perhaps half-way
        :raises ValueError: what has come is no message
        """
        message = self._next() if self._inbox else None
        while message is None:
            self._read(_CLOEXEC)
            message = self._next()
        return message

    def receive_now(self) -> Message | None:
        """The message that has come, without waiting; None if there is none, or not all of it.

        :raises EOFError: the other side has closed its end, or has died, perhaps half-way
        :raises ValueError: what has come is no message
        """
        message = self._next() if self._inbox else None
        try:
            while message is None:
                self._read(_CLOEXEC_DONTWAIT)
                message = self._next()
        except BlockingIOError:
            return None
        return message

    def close(self) -> None:
        """Let go of the socket and of the memory. Arrays that were received stay valid for as
        long as anybody holds them.
        """
        self._sock.close()
        self._segments.close()
        self._mapped.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _transmit(self, data: bytes, descriptor: int | None) -> None:
        if descriptor is None:
            sent = self._sock.send(data)
        else:
            rights = array("i", [descriptor])
            sent = self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        if sent < len(data):  # interrupted by a signal
            self._sock.sendall(data[sent:])

    def _read(self, flags: int) -> None:
        try:
            data, extras, _, _ = self._sock.recvmsg(_LONGEST, _RIGHTS, flags)
        except ConnectionResetError:  # it died with something unread
            data, extras = b"", []
        if extras:
            for _, _, rights in extras:
                self._descriptors.extend(array("i", rights))
        if not data:
            where = " in the middle of a message" if self._inbox else ""
            raise EOFError(f"the other side has gone{where}")
        self._inbox = self._inbox + data if self._inbox else data

    def _next(self) -> Message | None:
        """The message at the start of the inbox, if it is complete."""
        inbox = self._inbox
        if len(inbox) < _HEAD.size:
            return None
        kind, flags, dropped, lost, length, number, stream, deadline, *used = _HEAD.unpack_from(
            inbox
        )
        end = _HEAD.size + length
        if kind >= len(_KINDS) or end > _LONGEST:
            raise ValueError(f"this is not the start of a message: {inbox[:16]!r}")
        if len(inbox) < end:
            return None
        self._inbox = inbox[end:]  # more, from a side that does not wait for its turn
        tail = inbox[_HEAD.size : end]
        if dropped or lost:
            tail = self._take_notes(tail, dropped, lost)
        size = len(tail)
        read: Callable[[], Any] = _nothing
        if flags & (HAS_LAYOUT | ASKS_MAIN):
            size, read = self._body(flags, tail)
        elif tail:  # the usual case
            read = partial(pickle.loads, tail)
        return Message(
            _KINDS[kind],
            number,
            stream,
            deadline if flags & _HAS_DEADLINE else None,
            # As Used(*used), which runs a function of Python.
            tuple.__new__(Used, used) if flags & _HAS_USED else None,
            size,
            read,
        )

    def _take_notes(self, tail: bytes, dropped: int, lost: int) -> bytes:
        """Do what the other side says of segments; return what follows that."""
        indices = array("I")
        end = indices.itemsize * (dropped + lost)
        indices.frombytes(tail[:end])
        for index in indices[:dropped]:
            self._mapped.drop(index)
        for index in indices[dropped:]:
            self._segments.forget(index)
        return tail[end:]

    def _body(self, flags: int, tail: bytes) -> tuple[int, Callable[[], Any]]:
        """How large the body is, and what reads it."""
        main = self._main if flags & ASKS_MAIN else None
        if not flags & HAS_LAYOUT:
            return len(tail), partial(decode, tail, main)
        layout, inline = Layout(*LAYOUT.unpack_from(tail)), tail[LAYOUT.size :]
        if flags & _NEW_SEGMENT:
            descriptor = self._descriptors.popleft() if self._descriptors else None
            self._mapped.add(layout.segment, descriptor, layout.size)
        lease = self._mapped.lease(layout.segment, layout.end)
        size = layout.end + len(inline)
        if lease is None:
            return size, partial(_refuse, size)
        return size, partial(decode, inline, main, layout, lease)


def _nothing() -> None:
    """What a message without a body holds."""


def _refuse(size: int) -> NoReturn:
    raise OSError(
        f"there was no file descriptor or no memory left to receive {size:,} bytes: raise the "
        f"limits of this process (ulimit -n, ulimit -v), or keep fewer results"
    )


_KINDS = tuple(Kind)
_EMPTY = Encoded(b"")

# kind, flags, numbers of dropped and of lost segments, length of the tail, and what a message
# tells. The tail: indices of those segments, the layout, the pickle stream.
_HEAD = struct.Struct("=BBHHxxIqqdqqd")
_LONGEST = _HEAD.size + 4 * 4 * MOST + LAYOUT.size + INLINE  # there are not much more than MOST

_HAS_DEADLINE, _HAS_USED, _NEW_SEGMENT = 4, 8, 16  # beside the flags of a body

_RIGHTS = socket.CMSG_SPACE(4 * 8)
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # not on macOS
_CLOEXEC_DONTWAIT = _CLOEXEC | socket.MSG_DONTWAIT
