"""From objects to bytes and back: a pickle stream, and the arrays beside it in shared memory."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ._segments import HEADER, Lease, Memory, Segment, Segments, aligned

if TYPE_CHECKING:
    from ._arrays import Source

INLINE = 32 * 1024
"""Bytes that go through the socket at most. More would not fit its buffer, and block."""

_PROTOCOL = 5

Reducer = Callable[[Any], Any]
"""What ``__reduce__`` of an object returns."""


class Layout(NamedTuple):
    """Where things are in a segment.

    :ivar index: of the segment
    :ivar size: of the segment, in bytes
    :ivar count: how many buffers there are. Their offsets and sizes follow the pickle stream
    :ivar end: where the last of what is in use ends
    :ivar length: bytes of stream and table at that end; 0 if they go through the socket
    :ivar crowded: whether the reader has to copy, so that the segment is free at once
    """

    index: int
    size: int
    count: int
    end: int
    length: int
    crowded: bool


class Encoded:
    """A body, ready to be sent. One that is never sent frees its segment when it dies.

    :ivar inline: what goes through the socket
    :ivar asks_main: whether the stream names something of the main module
    :ivar layout: of the segment, if there is one
    """

    __slots__ = ("_lease", "_segment", "asks_main", "inline", "layout")

    def __init__(
        self,
        inline: bytes,
        asks_main: bool = False,
        layout: Layout | None = None,
        segment: Segment | None = None,
        lease: Lease | None = None,
    ) -> None:
        self.inline = inline
        self.asks_main = asks_main
        self.layout = layout
        self._segment = segment
        self._lease = lease

    @property
    def descriptor(self) -> int | None:
        """To be sent along: the other side has not yet mapped the segment."""
        return None if self._segment is None else self._segment.descriptor

    def digest(self) -> bytes:
        """What tells this body from others, with all that is in it."""
        digest = hashlib.blake2b(self.inline)
        if self._lease is not None:
            digest.update(memoryview(self._lease.memory.map)[HEADER : self._lease.end])
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
        self._reducers: dict[type, Callable[[Any, list[Source]], Any]] = {
            kind: partial(_without_sources, reducer) for kind, reducer in dispatch.items()
        }
        self._awaited = ["numpy", "torch"]  # imported only if others do

    def encode(self, body: object) -> Encoded:
        """Pickle it. Nothing is taken when this raises whatever pickling raises.

        :raises MemoryError: there is not so much memory to share
        """
        if self._awaited:
            self._awaited = [name for name in self._awaited if not self._learn(name)]
        pieces = _Pieces()
        sources: list[Source] = []
        _Pickler(pieces, sources, self._reducers).dump(body)
        if sources or len(pieces) > 1 or len(pieces[0]) > INLINE:
            return self._share(pieces, sources)
        return Encoded(pieces[0], _MAIN in pieces[0])

    def _learn(self, name: str) -> bool:
        module = sys.modules.get(name)
        kind = getattr(module, "ndarray" if name == "numpy" else "Tensor", None)
        if kind is None:
            return False
        from . import _arrays

        reducer = _arrays.reduce_array if name == "numpy" else _arrays.reduce_tensor
        self._reducers[kind] = reducer
        return True

    def _share(self, pieces: _Pieces, sources: list[Source]) -> Encoded:
        asks_main = any(_MAIN in piece for piece in pieces)
        offsets, end = _lay_out(sources)
        sizes = [size for size, _ in sources]
        pieces.append(b"".join(map(_ENTRY.pack, offsets, sizes)))
        length = sum(map(len, pieces))
        inline = length <= INLINE
        stop = end if inline else end + length
        segment, lease = self._segments.take(stop)
        if sources:
            _copy(sources, offsets, lease.memory)
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
        if layout.count:
            table = stream[len(stream) - layout.count * _ENTRY.size :]
            buffers = _buffers(lease, table, copied=layout.crowded)
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
_MAIN_MODULES = ("__main__", "__mp_main__")


class _Pieces(list[bytes]):
    """A file for the pickler: large byte strings come as they are, without being copied."""

    def write(self, piece: bytes) -> None:
        self.append(piece if type(piece) is bytes else bytes(piece))


class _Pickler(pickle.Pickler):
    def __init__(
        self,
        pieces: _Pieces,
        sources: list[Source],
        reducers: Mapping[type, Callable[[Any, list[Source]], Any]],
    ) -> None:
        # A method of its own would make it part of a cycle, and keep the arrays alive for long.
        super().__init__(pieces, _PROTOCOL, buffer_callback=partial(_take_buffer, sources))
        self._sources = sources
        self._reducers = reducers

    def reducer_override(self, obj: Any) -> Any:
        reducer = self._reducers.get(type(obj))
        return NotImplemented if reducer is None else reducer(obj, self._sources)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: bytes | memoryview, buffers: Any, main: Callable[[], str]) -> None:
        super().__init__(io.BytesIO(stream), buffers=buffers)
        self._main = main

    def find_class(self, module: str, name: str) -> Any:
        if module in _MAIN_MODULES:
            module = self._main()
        return super().find_class(module, name)


def _without_sources(reducer: Reducer, obj: Any, _: list[Source]) -> Any:
    return reducer(obj)


def _take_buffer(sources: list[Source], buffer: pickle.PickleBuffer) -> bool:
    from . import _arrays

    return _arrays.take_buffer(sources, buffer)


def _lay_out(sources: list[Source]) -> tuple[list[int], int]:
    """Where each source goes, and where the last one ends."""
    offsets = []
    end = HEADER
    for size, _ in sources:
        start = aligned(end)
        offsets.append(start)
        end = start + size
    return offsets, end


def _copy(sources: list[Source], offsets: list[int], memory: Memory) -> None:
    from . import _arrays

    _arrays.write(sources, offsets, memory.map)


def _write(pieces: list[bytes], offset: int, memory: Memory) -> None:
    for piece in pieces:
        memory.write(piece, offset)
        offset += len(piece)


def _buffers(lease: Lease, table: bytes | memoryview, *, copied: bool) -> list[Any]:
    from . import _arrays

    return _arrays.slices(lease, list(_ENTRY.iter_unpack(table)), copied=copied)
