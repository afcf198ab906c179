"""Exceptions that cross: as themselves where that works, and always as something."""

from __future__ import annotations

import pickle
import sys
import traceback
from types import ModuleType
from typing import Any, NoReturn

import pytest
from starlette.exceptions import HTTPException

from asgi_infer import DeadlineExceeded, QueueFull
from asgi_infer._errors import CallCancelled
from asgi_infer.workers._errors_across import (
    LONGEST,
    PackedError,
    RemoteError,
    RemoteTraceback,
    pack_error,
    unpack_error,
)


def cross(error: BaseException, text: str = "Traceback ...") -> BaseException:
    """As it arrives."""
    packed: PackedError = pickle.loads(pickle.dumps(pack_error(error, text)))
    return unpack_error(packed)


class Picky(Exception):
    """Its ``__init__`` does not take its ``args``."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


class Doubling(Exception):
    """What comes out of its pickle is another one."""

    def __init__(self, text: str) -> None:
        super().__init__(f"bad {text}")


class Textless(Exception):
    """Has a ``__str__`` that fails."""

    def __str__(self) -> str:
        raise SystemExit("no text")


class Hostile(Exception):
    """Nothing of it can be asked."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise KeyboardInterrupt

    __str__ = Textless.__str__

    def __getattribute__(self, name: str) -> Any:
        raise MemoryError


class WithCause(Exception):
    """Brings its own causes with it, in a circle if asked to."""

    def __init__(self, circle: bool) -> None:
        super().__init__(circle)
        self.__cause__ = ValueError("its own")
        if circle:
            self.__cause__.__cause__ = self


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a value", 7),
        KeyError("key"),
        StopIteration(3),
        StopAsyncIteration(),
        SystemExit(3),
        KeyboardInterrupt(),
        CallCancelled("nobody waits"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        FileNotFoundError(2, "No such file", "name"),
        ExceptionGroup("several", [ValueError(1), TypeError(2)]),
        Picky(7, reason="picky"),
        Doubling("value"),
        HTTPException(status_code=422, detail="not this"),
        QueueFull("full", retry_after=2.5),
        DeadlineExceeded("late", started=True),
    ],
    ids=lambda error: type(error).__name__,
)
def test_arrives_as_itself(error: BaseException) -> None:
    """Type, text, arguments and attributes are those of the original."""
    error.add_note("a note")
    got = cross(error)
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert got.args == error.args or isinstance(error, ExceptionGroup)
    assert vars(got).keys() == vars(error).keys()
    assert got.__notes__ == ["a note"]
    assert isinstance(got.__cause__, RemoteTraceback)


def test_remote_traceback() -> None:
    """The traceback of the other process is printed above the exception."""
    text = "Traceback (most recent call last):\n  in the other process\n"
    got = cross(ValueError("a value"), text)
    printed = "".join(traceback.format_exception(got))
    assert printed.index("in the other process") < printed.index("ValueError: a value")
    assert str(got.__cause__) == f'\n"""\n{text}"""'
    again = pickle.loads(pickle.dumps(got.__cause__))
    assert again.text == text


def test_causes() -> None:
    """The traceback is the innermost cause; in a circle of causes there is no innermost."""
    got = cross(WithCause(circle=False))
    assert got.__cause__ is not None
    assert str(got.__cause__) == "its own"
    assert isinstance(got.__cause__.__cause__, RemoteTraceback)
    got = cross(WithCause(circle=True))
    assert got.__cause__ is not None
    assert got.__cause__.__cause__ is got


def test_stands_for_it() -> None:
    """What can't be pickled arrives as a ``RemoteError`` with its type, its text and its notes."""

    class Local(Exception):
        pass

    error = Local("here only")
    error.add_note("a note")
    error.__notes__.append(7)  # type: ignore[arg-type]  # as nobody should
    got = cross(error)
    assert isinstance(got, RemoteError)
    assert got.type_name.endswith("test_stands_for_it.<locals>.Local")
    assert got.message == "here only"
    assert str(got) == f"{got.type_name}: here only"
    assert got.__notes__ == ["a note"]
    assert isinstance(got.__cause__, RemoteTraceback)
    assert str(pickle.loads(pickle.dumps(got))) == str(got)


def test_holds_something() -> None:
    """The same if only what it holds can't be pickled; types of Python's own have short names."""
    got = cross(ValueError(lambda: None))
    assert isinstance(got, RemoteError)
    assert got.type_name == "ValueError"
    assert got.message.startswith("<function")
    bare = RemoteError("ValueError", "")
    assert str(bare) == "ValueError"


@pytest.mark.parametrize("kind", [Textless, Hostile])
def test_never_fails(kind: type[Exception]) -> None:
    """Whatever its methods do, something arrives."""
    got = cross(kind())
    assert isinstance(got, RemoteError)
    assert got.type_name == f"{__name__}.{kind.__name__}"
    assert got.message == "(its text could not be read: its __str__ raised)"


class Frozen(Exception):
    """Takes no attributes."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


class Unnamed(type):
    """A type that can't be asked either."""

    def __getattribute__(cls, name: str) -> Any:
        raise ValueError(name)


class OwnString(Exception):
    """Its text is no plain string."""

    def __str__(self) -> str:
        class Text(str):
            __slots__ = ()

        return Text("text")


def test_takes_no_cause() -> None:
    """An exception that does not let its cause be set arrives without the traceback."""
    got = cross(Frozen("cold"))
    assert type(got) is Frozen
    assert got.__cause__ is None


def test_strange_types() -> None:
    """The same for its type, and for a text that does not pickle."""
    got = cross(Unnamed("Error", (Exception,), {})("text"))
    assert isinstance(got, RemoteError)
    assert str(got) == "(an exception whose type could not be read): text"
    got = cross(OwnString(lambda: None))
    assert isinstance(got, RemoteError)
    assert got.message == "text"


class Addressed:
    """Has the text that Python gives to objects by default."""


def test_text_with_an_address() -> None:
    """A text that differs in an address does not cost an exception its type."""
    got = cross(ValueError(Addressed()))
    assert type(got) is ValueError
    assert type(got.args[0]) is Addressed


def test_huge_texts() -> None:
    """Of a huge text the beginning and the end arrive."""

    class Local(Exception):
        pass

    got = cross(Local("a" * 10**6 + "z" * 10**6), "first" + "x" * 10**6 + "last")
    assert isinstance(got, RemoteError)
    assert isinstance(got.__cause__, RemoteTraceback)
    for text, start, end in ((got.message, "aaa", "zzz"), (got.__cause__.text, "first", "last")):
        assert len(text) < LONGEST + 100
        assert text.startswith(start)
        assert text.endswith(end)
        assert "characters ..." in text


def test_unknown_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """If its module is in the other process only, a ``RemoteError`` stands for it."""
    module = ModuleType("only_there")
    exec("class Error(Exception): pass", vars(module))
    monkeypatch.setitem(sys.modules, "only_there", module)
    packed = pack_error(module.Error("text"), "")
    assert packed.pickled is not None
    monkeypatch.delitem(sys.modules, "only_there")
    got = unpack_error(packed)
    assert isinstance(got, RemoteError)
    assert (got.type_name, got.message) == ("only_there.Error", "text")
