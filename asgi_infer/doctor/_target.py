"""What is to be measured: a factory of a model, the call to make on it, and a sample to call with.

Everything that users can get wrong about it is told in one line that says what to do next.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pickle
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any


class TargetError(Exception):
    """What was given can't be measured. The text is one line, for the user."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the user named. Made in the parent, resolved in each child.

    :param model: ``my_module:Model``, a class or a function without arguments
    :param call: a dotted attribute of the model; None for the model itself
    :param sample: ``my_module:sample``, what to call with, or a function without arguments that
        makes it; None to call with nothing
    :param app_dir: where modules are looked for first
    """

    model: str
    call: str | None = None
    sample: str | None = None
    app_dir: str = "."

    def make(self) -> Any:
        """The model, made here and now.

        :raises TargetError: there is nothing to make it with, or that fails
        """
        return self.factory()()

    def factory(self) -> Callable[[], Any]:
        """What makes the model, found and imported here and now: its calls may raise as well.

        :raises TargetError: there is nothing to make it with
        """
        factory, name = self._factory(), f"{self.model}()"
        return lambda: _finished(_attempt(name, factory, self.app_dir), name)

    def function(self, model: Any) -> Callable[..., Any]:
        """What is called.

        :raises TargetError: the model has no such attribute, or it can't be called with a sample
        """
        name = self.call or "the model"
        value: Any = model if self.call is None else _attribute(model, self.call, self.model)
        if not callable(value):
            raise TargetError(
                f"{name} can't be called, being of type {type(value).__qualname__}: name a "
                f"method with --call, such as {_some(_methods(model)) or 'predict'}"
            )
        _check_not_async(value, name)
        _check_takes_sample(value, name, self.sample)
        function: Callable[..., Any] = value
        return function

    def bind(self, model: Any, arguments: tuple[Any, ...]) -> Callable[[], Any]:
        """One call, without arguments left to give."""
        return partial(self.function(model), *arguments)

    def call_once(self, model: Any, arguments: tuple[Any, ...]) -> None:
        """Call it and look at what comes back.

        :raises TargetError: it raises, or returns something that has yet to run
        """
        name = self.call or self.model
        _finished(_attempt(name, self.bind(model, arguments), self.app_dir), name)

    def make_sample(self) -> bytes:
        """The arguments of a call, pickled.

        :raises TargetError: there is no such sample, making it fails, or it can't be pickled
        """
        arguments = () if self.sample is None else (self._evaluated(self.sample),)
        try:
            data = pickle.dumps(arguments)
            pickle.loads(data)  # noqa: S301  # our own
        except Exception as error:
            raise TargetError(
                f"the sample {self.sample} can't be copied into another process "
                f"({_told(error)}): use plain data, such as bytes or an array"
            ) from None
        return data

    def sample_is_made(self) -> bool:
        """Whether the sample is the result of a function."""
        return self.sample is not None and inspect.isroutine(self._find(self.sample))

    def enter(self) -> None:
        """Look for modules in ``app_dir`` first, as uvicorn does."""
        if not Path(self.app_dir).is_dir():
            raise TargetError(f"there is no directory {self.app_dir!r}: give another --app-dir")
        sys.path.insert(0, str(Path(self.app_dir).resolve()))

    def _factory(self) -> Callable[[], Any]:
        value = self._find(self.model)
        if not (inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, partial)):
            raise TargetError(
                f"{self.model}, of type {type(value).__qualname__}, exists already, and each "
                f"measurement makes a model of its own: name its class, or a function that "
                f"returns one"
            )
        _check_not_async(value, self.model)
        mismatch = _mismatch(value, ())
        if mismatch is not None:
            raise TargetError(
                f"{self.model} can't be called without arguments ({mismatch}): name a function "
                f"that needs none, such as def load(): return {self.model.partition(':')[2]}(...)"
            )
        factory: Callable[[], Any] = value
        return factory

    def _evaluated(self, sample: str) -> Any:
        value = self._find(sample)
        if not inspect.isroutine(value):
            return value
        _check_not_async(value, sample)
        return _finished(_attempt(f"{sample}()", value, self.app_dir), f"{sample}()")

    def _find(self, path: str) -> Any:
        module, _, name = path.partition(":")
        if not module or not name:
            raise TargetError(f"write MODULE:NAME, as in my_module:Model, and not {path!r}")
        return _attribute(_module(module, self.app_dir), name, module)


def told(error: BaseException, app_dir: str) -> str:
    """An error in one line, with the place in the user's code that it comes from."""
    place = _place(error, str(Path(app_dir).resolve()))
    return f"{_told(error)}{place and f' ({place})'}"


def _told(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    kind, text = type(error).__name__, " ".join(message.split())
    return f"{kind}: {text}" if text else kind


def _place(error: BaseException, directory: str) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen")
    ]
    own = [
        frame
        for frame in frames
        if frame.filename.startswith(directory) and "site-packages" not in frame.filename
    ]
    innermost = (own or frames)[-1:]
    return "".join(f"{frame.filename}:{frame.lineno}" for frame in innermost)


def _attempt(name: str, function: Callable[[], Any], app_dir: str) -> Any:
    """Call something of the user's, which may end in any way: ``SystemExit`` as well."""
    try:
        return function()
    except BaseException as error:
        raise TargetError(f"{name} raised {told(error, app_dir)}") from None


def _module(name: str, app_dir: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Not one that the module imports in turn.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise TargetError(f"importing {name} raised {told(error, app_dir)}") from None
        where = Path(app_dir).resolve()
        raise TargetError(
            f"there is no module {error.name} in {where} (--app-dir names another directory)"
            f"{_among(_modules(where), error.name)}"
        ) from None
    except BaseException as error:
        raise TargetError(f"importing {name} raised {told(error, app_dir)}") from None


def _modules(directory: Path) -> list[str]:
    """Those that a directory holds."""
    files = (path.stem for path in directory.glob("*.py"))
    packages = (path.parent.name for path in directory.glob("*/__init__.py"))
    return sorted({*files, *packages})


def _attribute(owner: Any, path: str, name: str) -> Any:
    """What a dotted path leads to."""
    for part in path.split("."):
        try:
            owner = getattr(owner, part)
        except AttributeError:
            names = _own_names(owner) if isinstance(owner, ModuleType) else dir(owner)
            names = [each for each in names if not each.startswith("_")]
            raise TargetError(f"{name} has no {part!r}{_among(names, part)}") from None
        name = f"{name}.{part}"
    return owner


def _own_names(module: ModuleType) -> list[str]:
    """Those of a module that are there, of which a lazy package has more."""
    return sorted(name for name, value in vars(module).items() if _is_of(module, value))


def _is_of(module: ModuleType, value: Any) -> bool:
    """Whether a value in a module is more than something that the module imports."""
    if inspect.isclass(value) or inspect.isroutine(value):
        return value.__module__ == module.__name__
    return not isinstance(value, ModuleType)


def _methods(model: Any) -> list[str]:
    return [
        name
        for name in dir(model)
        if not name.startswith("_") and callable(inspect.getattr_static(model, name, None))
    ]


def _among(names: Iterable[str], wanted: str) -> str:
    """What there is instead: the likely one, or some."""
    names = list(names)
    close = difflib.get_close_matches(wanted, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {_some(names)}" if names else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _check_not_async(function: Any, name: str) -> None:
    for each in (function, type(function).__call__):
        if inspect.iscoroutinefunction(each):
            raise TargetError(f"{name} is async: name the plain function that computes, below it")
        if inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each):
            raise TargetError(f"{name} is a generator function: name one that returns its result")


def _check_takes_sample(function: Any, name: str, sample: str | None) -> None:
    mismatch = _mismatch(function, () if sample is None else ("sample",))
    if mismatch is None:
        return
    if sample is None:
        raise TargetError(
            f"{name} can't be called without arguments ({mismatch}): give it one with "
            f"--input my_module:sample"
        )
    raise TargetError(
        f"{name} can't be called with the sample alone ({mismatch}): name a method or function "
        f"that takes one argument"
    )


def _mismatch(function: Any, arguments: tuple[object, ...]) -> str | None:
    """Why a function can't be called with these arguments, as far as can be known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, without a signature: it will tell itself
        return None
    try:
        signature.bind(*arguments)
    except TypeError as error:
        return str(error)
    return None


def _finished(result: Any, name: str) -> Any:
    """Refuse what has yet to run."""
    if inspect.isawaitable(result) or inspect.isasyncgen(result):
        close = getattr(result, "close", None)
        if callable(close):
            close()  # or Python warns that it was never awaited
        raise TargetError(
            f"{name} returned something to await: name the plain function that computes, below it"
        )
    if inspect.isgenerator(result):
        result.close()
        raise TargetError(
            f"{name} returned a generator, which has computed nothing yet: name a function that "
            f"returns its result"
        )
    return result
