"""The other side: a process's main thread, which owns a model and answers requests for it."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextvars import Context
from functools import partial
from typing import Any

from .._call import Awaited, Departure, Work, here
from .._errors import describe
from .._model import ModelReference
from ..native.procfs import thread_usage
from . import _boot
from ._channel import Channel, Kind, Message
from ._codec import Encoded
from ._errors_across import pack_error
from ._page import ControlPage
from ._protocol import ModelSpec, Steps, Used
from .thread import ThreadReplica

_FORKED = (
    "a process that the model has forked came back from the model's code, and is ended: let it "
    "end there, with os._exit(), or use subprocess or multiprocessing"
)
# Until Python 3.12 an attribute of an enum takes longer than anything else that is looked up here.
_EXECUTE, _NEXT, _RESULT, _STOP = Kind.EXECUTE, Kind.NEXT, Kind.RESULT, Kind.STOP


class Request:
    """What ``check_cancelled()`` asks in a process that the caller is not in.

    :param number: of the request
    :param deadline: when nobody waits any more, on the clock of ``time.monotonic()``, which all
        processes of a machine share
    :param page: where the caller's side says that nobody waits
    """

    __slots__ = ("_deadline", "_number", "_page")

    def __init__(self, number: int, deadline: float | None, page: ControlPage) -> None:
        self._number = number
        self._deadline = deadline
        self._page = page

    @property
    def departure(self) -> Departure | None:
        """Why nobody waits, but for the deadline."""
        return Departure.CANCELLED if self._page.cancelled == self._number else None

    def given_up(self, now: float, /) -> bool:
        """Whether nobody waits for the outcome."""
        too_late = self._deadline is not None and now >= self._deadline
        return too_late or self._page.cancelled == self._number


class Host:
    """A model on the current thread, and the generators that are open there.

    :param spec: what references that arrive are taken to belong to
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._replica = ThreadReplica(spec)
        self._streams: dict[int, Steps] = {}
        self._request: Awaited | None = None
        self._process = os.getpid()
        _host.spec = spec

    def open(self) -> None:
        """Load the model and warm it up."""
        here.current_call = lambda: self._request
        try:
            self._replica.open(_never)
        finally:
            self._only_here()

    def execute(self, request: Awaited, work: Work) -> Any:
        """Call a function; return its result."""
        self._request = request
        try:
            return self._replica.execute(work, Context())
        finally:
            self._request = None
            self._only_here()

    def iterate(self, request: Awaited, stream: int, work: Work) -> None:
        """Call a function that returns a generator, which is known as ``stream`` from then on."""
        begin = partial(self._replica.iterate, work, Context())
        self._streams[stream] = self._run(request, begin)

    def next(self, request: Awaited, stream: int) -> Any:
        """The next item of a stream.

        :raises StopIteration: it has ended
        """
        return self._run(request, self._streams[stream].__next__)

    def end(self, stream: int) -> None:
        """Close the generator of a stream, if it has begun."""
        steps = self._streams.pop(stream, None)
        if steps is not None:
            try:
                steps.close()
            finally:
                self._only_here()

    def has(self, stream: int) -> bool:
        """Whether that stream has begun and not been closed."""
        return stream in self._streams

    def close(self) -> None:
        """Close what is open, and destroy the model."""
        for stream in list(self._streams):
            try:
                self.end(stream)
            except BaseException:
                traceback.print_exc()  # to the log of the worker: there is nobody else to tell
        self._replica.close()

    def _run(self, request: Awaited, func: Callable[[], Any]) -> Any:
        self._request = request
        try:
            return func()
        finally:
            self._request = None
            self._only_here()

    def _only_here(self) -> None:
        """End a process that the model has forked, and that comes back from the model's code: it
        would take requests, and reply to them, in the place of this one.
        """
        if os.getpid() != self._process:  # pragma: no cover  # there, which is not measured
            try:
                if sys.exc_info()[0] is not None:
                    traceback.print_exc()
                sys.stderr.write(f"{_FORKED}\n")
            finally:
                os._exit(1)


class _Host:
    """The model of this process: guarded by nothing, there is one thread."""

    spec: ModelSpec | None = None
    elsewhere = Used()  # what was used for others than the one whose request it is


_host = _Host()


def refer(path: tuple[str, ...]) -> ModelReference:
    """A reference that has come from the runner: here it belongs to the model of this process."""
    return ModelReference(_host.spec, path)


def used() -> Used:
    """What this thread has used so far, and its process, in the name of those it serves now."""
    return _used_beside(_host.elsewhere)


def count_from(so_far: Used) -> None:
    """What is used from now on adds to ``so_far``."""
    _host.elsewhere = _used_beside(so_far)


def _used_beside(other: Used) -> Used:
    switches, faults, seconds = other
    counted = thread_usage()
    # As Used(...), which runs a function of Python.
    return tuple.__new__(
        Used,
        (
            counted.ru_nvcsw - switches,
            counted.ru_minflt - faults,
            time.process_time() - seconds,
        ),
    )


# -- requests ----------------------------------------------------------------------------------


def serve(channel_fd: int, page_fd: int) -> None:
    """Load the model that the first message tells of, and answer requests for it.

    Returns when the runner's side says so, or has gone.
    """
    channel = Channel(socket.socket(fileno=channel_fd), main=main_there)
    page = ControlPage(page_fd)
    os.close(page_fd)
    try:
        host = _open(channel)
        if host is not None:
            while _answer_one(host, channel, page):
                pass
    except (EOFError, ConnectionError):
        pass  # nobody is there any more
    finally:
        channel.close()


def _open(channel: Channel) -> Host | None:
    message = channel.receive()
    try:
        host = Host(message.body())
        host.open()
    except BaseException as error:
        reply_error(channel, error, message.number)
        return None
    channel.send(Kind.READY, number=message.number, used=used())
    return host


def _answer_one(host: Host, channel: Channel, page: ControlPage) -> bool:
    # In a function of its own: what came and went must not stay alive until the next one.
    message = channel.receive()
    if message.kind is _STOP:
        _stop(host, channel, message)
        return False
    answer(host, channel, page, message)
    return True


def _stop(host: Host, channel: Channel, message: Message) -> None:
    try:
        host.close()
    except BaseException as error:
        reply_error(channel, error, message.number)
    else:
        channel.send(Kind.END, number=message.number, used=used())


def answer(host: Host, channel: Channel, page: ControlPage, message: Message) -> None:
    """Do what a message asks for, and reply."""
    number = message.number
    request = Request(number, message.deadline, page)
    page.started = number
    try:
        value = perform(host, request, message)
        encoded = None if value is None else _encode(channel, value)
    except StopIteration as end:
        if message.kind is _NEXT:
            channel.send(Kind.END, number=number, used=used())
        else:
            reply_error(channel, end, number)
    except BaseException as error:
        reply_error(channel, error, number)
    else:
        channel.send(_RESULT, encoded, number=number, used=used())


def perform(host: Host, request: Request, message: Message) -> Any:
    """Do what a message asks for; return what comes of it."""
    kind = message.kind
    if kind is _EXECUTE:
        return host.execute(request, _work(message))
    if kind is _NEXT:
        return host.next(request, message.stream)
    if kind is Kind.CLOSE:
        return host.end(message.stream)
    return host.iterate(request, message.stream, _work(message))


def _encode(channel: Channel, value: Any) -> Encoded:
    try:
        return channel.encode(value)
    except Exception as error:
        kind = type(value).__qualname__
        raise TypeError(
            f"the result, a {kind}, can't be sent to the caller's process: {describe(error)}"
        ) from error


def _work(message: Message) -> Work:
    try:
        work: Work = message.body()
    except Exception as error:
        error.add_note("(raised where the call's function and arguments were unpickled)")
        raise
    return work


def reply_error(channel: Channel, error: BaseException, number: int) -> None:
    """Tell what was raised."""
    packed = pack_error(error, formatted(error))
    # The frames hold the arguments, which must not stay alive.
    traceback.clear_frames(error.__traceback__)
    channel.send(Kind.RAISED, channel.encode(packed), number=number, used=used())


def formatted(error: BaseException) -> str:
    """How ``error`` was raised, as Python prints it; never fails."""
    try:
        return "".join(traceback.format_exception(error))
    except Exception:  # of its own methods, which are anybody's
        return "".join(traceback.format_tb(error.__traceback__))


def main_there() -> str:
    """What the main module of the runner's process is called here; it is imported first."""
    return _boot.main_module(_boot.parent_main).__name__


def _never() -> None:
    """The model goes when the process does."""
