"""A reference to the model: a path that is walked only where the model lives.

``runner.model`` has the model's type for the type checker and none of the model in it, so
nothing that is done with it elsewhere can touch the model. That matters for speed and not only
for safety: one native call on another thread makes a second thread pool, and GNU OpenMP then
slows both pools down for as long as the two exist.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NoReturn


class ModelReference:
    """``runner.model`` and everything reached from it: a name for a thing on another thread."""

    __slots__ = ("_asgi_infer_owner", "_asgi_infer_path")

    # Long names, because every other name is the model's.
    _asgi_infer_owner: object
    _asgi_infer_path: tuple[str, ...]

    def __init__(self, owner: object, path: tuple[str, ...] = ()) -> None:
        object.__setattr__(self, "_asgi_infer_owner", owner)
        object.__setattr__(self, "_asgi_infer_path", path)

    def __getattr__(self, name: str) -> ModelReference:
        # Python asks any object for dunder names (copy, inspect, wraps ...): that is not the user.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"a reference to the model has no {name}")
        return ModelReference(self._asgi_infer_owner, (*self._asgi_infer_path, name))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(
            f"{self!r}.{name} can't be set here: the model lives on its inference thread. Pass "
            f"a function that sets it: await runner.run(lambda model: ..., runner.model)"
        )

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"{self!r} can't be called here: the model lives on its inference thread. "
            f"Call it with: await runner.run({self!r}, ...)"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} is a reference to a model, and means nothing elsewhere")

    def __repr__(self) -> str:
        return ".".join(("runner.model", *self._asgi_infer_path))


class ForeignReference(ValueError):
    """A reference is to the model of another runner."""

    def __init__(self, reference: ModelReference) -> None:
        super().__init__(f"{reference!r} belongs to another runner: run the call there")


def owner_and_path(reference: ModelReference) -> tuple[object, tuple[str, ...]]:
    """Whose model ``reference`` is to, and the names that lead on from there."""
    return reference._asgi_infer_owner, reference._asgi_infer_path


def name_of(func: object) -> str:
    """What to call ``func`` in a log line or a message."""
    if isinstance(func, partial):
        return name_of(func.func)
    if isinstance(func, ModelReference):
        return repr(func)
    # Never repr() of the object itself: that is the user's code, and may be slow or fail.
    try:
        return str(getattr(func, "__qualname__", type(func).__qualname__))
    except Exception:  # a __getattr__ that raises something else than AttributeError
        return type(func).__qualname__


def is_generator_function(func: object, load: object) -> bool:
    """Whether ``func`` is known to return a generator.

    Of a reference that is known if ``load`` is the model's class, and has the function. What
    stands behind an attribute that is made with the model is not known, nor what a decorator
    or a plain function returns.
    """
    while isinstance(func, partial):
        func = func.func
    if isinstance(func, ModelReference):
        return _is_generator_method(func._asgi_infer_path, load)
    if inspect.isroutine(func) or inspect.isclass(func):
        return inspect.isgeneratorfunction(func)
    return inspect.isgeneratorfunction(inspect.getattr_static(func, "__call__", None))


def _is_generator_method(path: tuple[str, ...], load: object) -> bool:
    while isinstance(load, partial):
        load = load.func
    found = load if inspect.isclass(load) else None
    for name in path or ("__call__",):
        found = inspect.getattr_static(found, name, None)
    # A static method and a class method hold the function; a method is one.
    return inspect.isgeneratorfunction(getattr(found, "__func__", found))


def resolve_work(work: Any, owner: object, model: Any) -> Any:
    """A function and its arguments, with every reference in them resolved as by ``resolve``."""
    func, args = work
    if type(func) in _REFERRING:
        func = resolve(func, owner, model)
    for argument in args:
        if type(argument) in _REFERRING:
            args = tuple(resolve(argument, owner, model) for argument in args)
            break
    return func, args


def resolve(value: Any, owner: object, model: Any) -> Any:
    """The thing that ``value`` stands for: a reference is walked from ``model``; a partial is
    resolved inside; all else is itself.

    :raises AttributeError: the model has no such attribute
    :raises ValueError: the reference is to the model of another runner
    """
    if isinstance(value, ModelReference):
        if value._asgi_infer_owner is not owner:
            raise ForeignReference(value)
        for name in value._asgi_infer_path:
            model = getattr(model, name)
        return model
    if isinstance(value, partial):
        args = [resolve(argument, owner, model) for argument in value.args]
        keywords = {k: resolve(argument, owner, model) for k, argument in value.keywords.items()}
        return partial(resolve(value.func, owner, model), *args, **keywords)
    return value


_REFERRING = frozenset({ModelReference, partial})
