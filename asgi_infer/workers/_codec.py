"""From objects to bytes and back: a pickle stream, and the arrays beside it in shared memory."""

from __future__ import annotations

import copyreg
import hashlib
import io
import pickle
import struct
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ._segments import HEADER, Lease, Memory, Segment, Segments, aligned

if TYPE_CHECKING:
    from ._arrays import Source

INLINE = 32 * 1024
"""Bytes that go through the socket at most. More would not fit its buffer, and block."""

ASKS_MAIN, HAS_LAYOUT = 1, 2
"""Flags of a message that tell what its body is like."""

LAYOUT = struct.Struct("=IQIQQ?")
"""The fields of ``Layout``."""

_PROTOCOL = 5

Reducer = Callable[[Any], Any]
"""What ``__reduce__`` of an object returns."""


class Layout(NamedTuple):
    """Where things are in a segment.

    :ivar segment: its number
    :ivar size: of the segment, in bytes
    :ivar buffers: how many there are. Their offsets and sizes follow the pickle stream
    :ivar end: where the last of what is in use ends
    :ivar length: bytes of stream and table at that end; 0 if they go through the socket
    :ivar crowded: whether the reader has to copy, so that the segment is free at once
    """

    segment: int
    size: int
    buffers: int
    end: int
    length: int
    crowded: bool


class Encoded:
    """A body, ready to be sent. One that is never sent frees its segment when it dies.

    :ivar inline: of the body, what goes through the socket
    :ivar asks_main: whether the stream names something of the main module
    :ivar layout: of the segment, if there is one
    :ivar tail: what goes through the socket: the layout, if there is one, and ``inline``
    :ivar flags: ``ASKS_MAIN`` and ``HAS_LAYOUT``, where that is so
    """

    __slots__ = ("_lease", "_segment", "asks_main", "flags", "inline", "layout", "tail")

    def __init__(
        self,
        inline: bytes,
        asks_main: bool = False,
        layout: Layout | None = None,
        segment: Segment | None = None,
        lease: Lease | None = None,
    ) -> None:
        self.inline = self.tail = inline
        self.asks_main = asks_main
        self.layout = layout
        self.flags = ASKS_MAIN if asks_main else 0
        if layout is not None:
            self.flags |= HAS_LAYOUT
            self.tail = LAYOUT.pack(*layout) + inline
        self._segment = segment
        self._lease = lease

    @property
    def descriptor(self) -> int | None:
        """To be sent along: the other side has not yet mapped the segment."""
        return None if self._segment is None else self._segment.descriptor

    def digest(self) -> bytes:
        """What tells this body from others, with all that is in it."""
        layout, stream = self.layout, memoryview(self.inline)
        if layout is None or self._lease is None:
            return hashlib.blake2b(stream).digest()
        memory = memoryview(self._lease.memory.map)
        if layout.length:
            stream = memory[layout.end - layout.length : layout.end]
        digest = hashlib.blake2b(stream)
        # Not what lies between the buffers, which some earlier message has left there.
        for start, size in _ENTRY.iter_unpack(
            stream[len(stream) - layout.buffers * _ENTRY.size :]
        ):
            digest.update(memory[start : start + size])
        return digest.digest()

    def sent(self) -> None:
        """The other side frees the segment."""
        if self._segment is not None and self._lease is not None:
            self._segment.announced()
            self._lease.keep()


class Encoder:
    """Pickles bodies, and copies their arrays into segments. Used by one thread at a time.

    :param dispatch: what to do with objects of exactly these types
    """

    def __init__(self, segments: Segments, dispatch: Mapping[type, Reducer]) -> None:
        self._segments = segments
        self._libraries = {"numpy", "torch"}  # imported only if others do
        self._modules = 0  # how many there were when these were looked for
        # One pickler for all bodies: to make one takes as long as to pickle a small body.
        self._pieces = _Pieces()
        self._sources: list[Source] = []
        take_buffer = partial(_take_buffer, self._sources)
        self._pickler = pickle.Pickler(self._pieces, _PROTOCOL, buffer_callback=take_buffer)
        self._reducers = _Reducers(dispatch)
        self._pickler.dispatch_table = self._reducers

    def encode(self, body: object) -> Encoded:
        """Pickle it. Nothing is taken when this raises whatever pickling raises.

        :raises MemoryError: there is not so much memory to share
        :raises OSError: there is no file descriptor left
        """
        if len(sys.modules) != self._modules:
            self._learn()
        pieces, sources = self._pieces, self._sources
        try:
            self._pickler.dump(body)
            stream = pieces[0]
            if sources or len(pieces) > 1 or len(stream) > INLINE:
                return self._share(pieces, sources)
            return Encoded(stream, _MAIN in stream)
        finally:  # nothing of the body stays alive here
            self._pickler.clear_memo()
            pieces.clear()
            sources.clear()

    def _learn(self) -> None:
        """Know the arrays of the libraries that have been imported by now."""
        self._modules = len(sys.modules)
        for library in self._libraries & sys.modules.keys():
            kind, reducer = _arrays().reducer_of(library)
            self._reducers[kind] = partial(_reduce, reducer, self._sources)
            self._libraries.remove(library)

    def _share(self, pieces: _Pieces, sources: list[Source]) -> Encoded:
        asks_main = any(len(piece) < _FRAME and _MAIN in piece for piece in pieces)
        offsets, end = _lay_out(sources)
        sizes = [size for size, _ in sources]
        pieces.append(b"".join(map(_ENTRY.pack, offsets, sizes)))
        length = sum(map(len, pieces))
        inline = length <= INLINE
        stop = end if inline else end + length
        segment, lease = self._segments.take(stop)
        for (_, write), offset in zip(sources, offsets, strict=True):
            write(lease.memory.map, offset)
        if not inline:
            _write(pieces, end, lease.memory)
        layout = Layout(
            segment.index,
            segment.memory.size,
            len(sources),
            stop,
            0 if inline else length,
            self._segments.crowded,
        )
        return Encoded(b"".join(pieces) if inline else b"", asks_main, layout, segment, lease)


def decode(
    inline: bytes,
    main: Callable[[], str] | None = None,
    layout: Layout | None = None,
    lease: Lease | None = None,
) -> Any:
    """What was encoded. Its arrays lie in the segment, which stays taken until all have died.

    :param main: None if the stream names nothing of the main module, else tells that one's name
    """
    stream: bytes | memoryview = inline
    buffers: Any = ()
    if layout is not None and lease is not None:
        if layout.length:
            stream = memoryview(lease.memory.map)[layout.end - layout.length : layout.end]
        if layout.buffers:
            table = stream[len(stream) - layout.buffers * _ENTRY.size :]
            buffers = _arrays().slices(lease, _ENTRY.iter_unpack(table), copied=layout.crowded)
    if main is None:
        return pickle.loads(stream, buffers=buffers)  # noqa: S301  # of a process of our own
    return _Unpickler(stream, buffers, main).load()


def loads(data: bytes) -> Any:
    """Unpickle what was pickled in another process, where the main module has another name."""
    if _MAIN in data:
        return _Unpickler(data, (), main_here).load()
    return pickle.loads(data)  # noqa: S301  # of a process of our own


def main_here() -> str:
    """The name of the main module, where nothing needs to be done for it."""
    return "__main__"


_ENTRY = struct.Struct("<QQ")  # offset and size of a buffer
_MAIN = b"_main__"  # in __main__, and in __mp_main__, as it is called in a child process
_FRAME = 3 * 64 * 1024
"""Bytes of a piece of a stream that has names in it, at most: the pickler cuts it at 64 KiB, after
something that is smaller than that. What is larger is some byte string or text of the body, which
would take longer to search than to copy."""
_MAIN_MODULES = ("__main__", "__mp_main__")


class _Pieces(list[bytes]):
    """A file for the pickler: large byte strings come as they are, without being copied."""

    write = list.append


class _Reducers(dict[type, Reducer]):
    """What a pickler looks in, which would look in the common table if it had none of its own."""

    def __missing__(self, kind: type) -> Reducer:
        return copyreg.dispatch_table[kind]


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: bytes | memoryview, buffers: Any, main: Callable[[], str]) -> None:
        super().__init__(io.BytesIO(stream), buffers=buffers)
        self._main = main

    def find_class(self, module: str, name: str) -> Any:
        if module in _MAIN_MODULES:
            module = self._main()
        return super().find_class(module, name)


def _reduce(reducer: Callable[[Any, list[Source]], Any], sources: list[Source], obj: Any) -> Any:
    reduced = reducer(obj, sources)
    return obj.__reduce_ex__(_PROTOCOL) if reduced is NotImplemented else reduced


def _take_buffer(sources: list[Source], buffer: pickle.PickleBuffer) -> bool:
    return bool(_arrays().take_buffer(sources, buffer))


@cache
def _arrays() -> Any:
    """The module that imports NumPy, when the first array comes."""
    from . import _arrays

    return _arrays


def _lay_out(sources: list[Source]) -> tuple[list[int], int]:
    """Where each source goes, and where the last one ends."""
    offsets = []
    end = HEADER
    for size, _ in sources:
        start = aligned(end)
        offsets.append(start)
        end = start + size
    return offsets, end


def _write(pieces: list[bytes], offset: int, memory: Memory) -> None:
    for piece in pieces:
        memory.write(piece if type(piece) is bytes else bytes(piece), offset)
        offset += len(piece)
