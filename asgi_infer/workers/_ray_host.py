"""What runs in an actor, on its main thread: a host of the model, and what crosses the wire.

A parcel is what Ray carries: bytes, and beside them the buffers of arrays, if there are any,
which go through Ray's object store and are not copied where they arrive. To pickle here, and
not to leave that to Ray, is faster for small calls (bytes have a short way through Ray), and an
object that does not pickle, or does not unpickle, is the error of its call and of nobody else.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import struct
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pickle import PickleBuffer
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple, TypeAlias, cast

from .._model import ModelReference
from ._channel import Channel, Kind, Message
from ._host import Host, _stop, answer, reply_error, used
from ._page import ControlPage
from ._protocol import Used

# Not by name, for type checkers would read all of Ray.
ray: Any = import_module("ray")
_CloudPickler: Any = import_module("ray.cloudpickle").CloudPickler

Parcel: TypeAlias = "bytes | tuple[bytes, list[PickleBuffer]]"

_HEADER = struct.Struct("<BQdQQd")  # kind, stream, seconds that are left, and the fields of Used
_PROTOCOL = 5
_NOTHING = Used()
_PLAIN = frozenset({"asgi_infer", "numpy"})
_THIS = 1  # the number of any request: an actor has one at a time, and Ray knows which


class Pickled(NamedTuple):
    """An object on its way: the stream, and the buffers that were left out of it."""

    stream: bytes
    buffers: list[PickleBuffer]

    def digest(self) -> bytes:
        """What tells this object from others, with all that is in it."""
        digest = hashlib.blake2b(self.stream)
        for buffer in self.buffers:
            digest.update(buffer.raw())
        return digest.digest()


def dumps(value: object, reduce: Callable[[ModelReference], Any] | None = None) -> Pickled:
    """Pickle ``value``, functions without a module too.

    :param reduce: what to do with references to a model
    :raises Exception: whatever pickling raises
    """
    try:
        return _dump(_PlainPickler, value, reduce)
    except _NotPlain:
        return _dump(_Pickler, value, reduce)


def _dump(kind: Any, value: object, reduce: Callable[[ModelReference], Any] | None) -> Pickled:
    file = io.BytesIO()
    buffers: list[PickleBuffer] = []
    pickler = kind(file, protocol=_PROTOCOL, buffer_callback=buffers.append)
    pickler.reduce = reduce
    pickler.dump(value)
    return Pickled(file.getvalue(), buffers)


class _NotPlain(Exception):
    """There is something in it that may take more than the standard library's pickle."""


class _PlainPickler(pickle.Pickler):
    """For what most calls take and return, in a quarter of the time: numbers, text, containers,
    arrays. None of it has to be asked whether its module will be there.
    """

    reduce: Callable[[ModelReference], Any] | None = None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is ModelReference and self.reduce is not None:
            return self.reduce(obj)
        named = obj if isinstance(obj, type | FunctionType | BuiltinFunctionType) else type(obj)
        if str(named.__module__).partition(".")[0] not in _PLAIN:
            raise _NotPlain
        return NotImplemented


class _Pickler(_CloudPickler):  # type: ignore[misc]  # Ray is Any here
    """For all the rest, functions and classes of the main module among it."""

    reduce: Callable[[ModelReference], Any] | None = None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is ModelReference and self.reduce is not None:
            return self.reduce(obj)
        return super().reducer_override(obj)


def pack(
    kind: Kind,
    body: Pickled | None = None,
    *,
    stream: int = 0,
    seconds: float = math.inf,
    used: Used = _NOTHING,
) -> Parcel:
    """A message, as Ray is to carry it.

    :param seconds: that are left until nobody waits for the reply: no two machines share a clock
    """
    header = _HEADER.pack(kind, stream, seconds, *used)
    if body is None:
        return header
    return (header + body.stream, body.buffers) if body.buffers else header + body.stream


def unpack(parcel: Parcel) -> Message:
    """The message that has arrived in ``parcel``."""
    data, buffers = (parcel, []) if isinstance(parcel, bytes) else parcel
    kind, stream, seconds, *counted = _HEADER.unpack_from(data)
    return Message(
        Kind(kind),
        _THIS,
        stream,
        None if seconds == math.inf else time.monotonic() + seconds,
        Used(*counted),
        len(data),
        partial(_loads, data, buffers),
    )


def _loads(data: bytes, buffers: list[PickleBuffer]) -> Any:
    if len(data) == _HEADER.size:
        return None
    return pickle.loads(memoryview(data)[_HEADER.size :], buffers=buffers)  # noqa: S301


class RayHost:
    """The class of the actors. Its methods take and return parcels, and raise nothing.

    :param canceled: whether the caller of the task that runs has left; by default Ray tells
    """

    def __init__(self, canceled: Callable[[], bool] | None = None) -> None:
        self._page = _Page(canceled or ray.get_runtime_context().is_canceled)
        self._host: Any = None  # of class Host, once the model has loaded

    def open(self, parcel: Parcel) -> Parcel:
        """Load the model whose spec has arrived."""
        outbox = _Outbox()
        try:
            self._host = host = Host(unpack(parcel).body())
            host.open()
        except BaseException as error:
            reply_error(outbox.channel, error, _THIS)
        else:
            outbox.send(Kind.READY, used=used())
        return outbox.parcel

    def answer(self, parcel: Parcel) -> Parcel:
        """Do what the message in ``parcel`` asks for; return the reply."""
        outbox = _Outbox()
        message = unpack(parcel)
        if message.kind is Kind.STOP:
            _stop(self._host, outbox.channel, message)
        else:
            answer(self._host, outbox.channel, cast("ControlPage", self._page), message)
        return outbox.parcel


class _Page:
    """What a control page is to other hosts: here it is Ray that knows who has left."""

    def __init__(self, canceled: Callable[[], bool]) -> None:
        self._canceled = canceled
        self.started = 0

    @property
    def cancelled(self) -> int:
        return _THIS if self._canceled() else 0


class _Outbox:
    """What a channel is to other hosts: it keeps the reply, which is to be returned."""

    parcel: Parcel

    @property
    def channel(self) -> Channel:
        return cast("Channel", self)

    def encode(self, value: object) -> Pickled:
        return dumps(value)

    def send(
        self, kind: Kind, body: Pickled | None = None, *, number: int = _THIS, used: Used
    ) -> None:
        self.parcel = pack(kind, body, used=used)
