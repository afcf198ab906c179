"""Exceptions on their way from one process to another: as themselves wherever that works."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from ._codec import loads

LONGEST = 10_000
"""Characters of a message, and of a traceback, that are sent at most."""


class RemoteError(Exception):
    """Stands for an exception of a worker's process that could not be sent as itself.

    Its type can't be pickled or unpickled, as with a class that is defined inside a function, or
    it holds something that can't. Its text has been kept.

    :ivar type_name: the module and name of its type
    :ivar message: its text
    """

    def __init__(self, type_name: str, message: str) -> None:
        super().__init__(type_name, message)
        self.type_name = type_name
        self.message = message

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}" if self.message else self.type_name


class RemoteTraceback(Exception):
    """Where an exception was raised in the other process: the ``__cause__`` of that exception."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class PackedError(NamedTuple):
    """What is sent: strings, and perhaps a pickle that has been tried."""

    pickled: bytes | None
    type_name: str
    message: str
    notes: tuple[str, ...]
    traceback: str


def pack_error(error: BaseException, traceback: str) -> PackedError:
    """Make ``error`` fit to be sent. Never fails, whatever the methods of ``error`` do.

    :param traceback: how it was raised, formatted
    """
    kind = type(error)
    return PackedError(
        _pickled(error),
        _text(lambda: _dotted(kind), "(an exception whose type could not be read)"),
        _text(lambda: str(error), "(its text could not be read: its __str__ raised)"),
        _notes(error),
        _cut(traceback),
    )


def unpack_error(packed: PackedError) -> BaseException:
    """The exception itself, or a ``RemoteError`` instead; with its traceback as the innermost
    ``__cause__``. Never fails.
    """
    error = _unpickled(packed.pickled)
    if error is None:
        error = RemoteError(packed.type_name, packed.message)
        for note in packed.notes:
            error.add_note(note)
    with suppress(BaseException):  # its __setattr__ may refuse that
        _set_cause(error, RemoteTraceback(packed.traceback))
    return error


class _WithoutInit:
    """Pickles an exception whose ``__init__`` does not take its ``args``: nothing calls it."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> Any:
        error = self._error
        return _make, (type(error), error.args, vars(error))


def _make(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = kind.__new__(kind, *args)
    error.args = args
    vars(error).update(state)
    return error


def _pickled(error: BaseException) -> bytes | None:
    """A pickle of it, of which it is known that it can be read; if possible, with its text."""
    plain, alike = _tried(error, error)
    if not alike:
        bare, alike = _tried(_WithoutInit(error), error)
        # Texts differ by nothing of importance where they hold the address of some object.
        return bare if alike or plain is None else plain
    return plain


def _tried(form: object, error: BaseException) -> tuple[bytes | None, bool]:
    """A pickle, if an exception of that type comes out of it; and whether its text is the same."""
    try:
        pickled = pickle.dumps(form, 5)
        copy = loads(pickled)
        return (pickled, str(copy) == str(error)) if type(copy) is type(error) else (None, False)
    except BaseException:  # of any method of its own
        return None, False


def _unpickled(pickled: bytes | None) -> BaseException | None:
    try:
        return None if pickled is None else loads(pickled)
    except BaseException:  # its module is not there, for example
        return None


def _set_cause(error: BaseException, cause: BaseException) -> None:
    """Put ``cause`` at the end of the chain of causes, if that has an end."""
    seen = set()
    while error.__cause__ is not None:
        if id(error) in seen:
            return
        seen.add(id(error))
        error = error.__cause__
    error.__cause__ = cause


def _dotted(kind: type) -> str:
    name = kind.__qualname__
    return name if kind.__module__ == "builtins" else f"{kind.__module__}.{name}"


def _text(make: Callable[[], str], instead: str) -> str:
    try:
        return _cut("".join([make()]))  # a plain string: its own kind of string may not pickle
    except BaseException:
        return instead


def _notes(error: BaseException) -> tuple[str, ...]:
    try:
        return tuple(_cut(note) for note in error.__notes__[:10] if type(note) is str)
    except BaseException:  # it has none, or they are no list
        return ()


def _cut(text: str) -> str:
    """Its beginning and its end, which say most."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
