"""References to the model: harmless everywhere but where the model lives."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator
from functools import partial, update_wrapper
from typing import Any, NoReturn

import pytest

from asgi_infer._model import (
    ModelReference,
    is_generator_function,
    name_of,
    resolve,
    resolve_work,
)


class Head:
    def predict(self, value: int, *, scale: int = 1) -> int:
        return value * scale


class Model:
    def __init__(self) -> None:
        self.head = Head()
        self.limit = 10


OWNER = object()


def reference(owner: object = OWNER) -> Any:
    return ModelReference(owner)


# -- away from the model -----------------------------------------------------------------------


def test_path() -> None:
    """Whatever is reached from a reference is a reference, and tells its way."""
    assert repr(reference()) == "runner.model"
    assert repr(reference().head.predict) == "runner.model.head.predict"
    assert isinstance(reference().head.predict, ModelReference)


def test_call_says_what_to_write() -> None:
    """Calling the model from the wrong thread is refused with the line that works."""
    with pytest.raises(RuntimeError, match=r"await runner\.run\(runner\.model\.head\.predict"):
        reference().head.predict(3)


def test_set_says_what_to_write() -> None:
    """Setting an attribute from the wrong thread is refused with the way to do it."""
    with pytest.raises(AttributeError, match=r"runner\.model\.limit can't be set here"):
        reference().limit = 3


def test_dunder_names_are_not_the_models() -> None:
    """Python asks any object for dunder names: a reference must not pretend to have them."""
    assert not hasattr(reference(), "__array__")
    assert not hasattr(reference(), "__len__")
    assert inspect.signature(reference()).parameters.keys() == {"args", "kwargs"}
    assert not inspect.iscoroutinefunction(reference())


def test_references_stay_in_their_process() -> None:
    """A reference can't be pickled or copied: it means nothing without its runner."""
    for copy_it in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match=r"runner\.model\.predict is a reference"):
            copy_it(ModelReference(object(), ("predict",)))


def test_names_of_the_model_are_free() -> None:
    """A model may have attributes named like anything that a reference could use inside."""
    for name in ("owner", "path", "_owner", "_path", "name", "_x__"):
        assert repr(getattr(reference(), name)) == f"runner.model.{name}"


def test_update_wrapper() -> None:
    """A reference can be wrapped, as ``runner.wrap`` does."""

    def wrapper() -> None: ...

    assert update_wrapper(wrapper, reference().head.predict).__name__ == "wrapper"


# -- where the model lives ---------------------------------------------------------------------


def test_resolve_walks_the_path() -> None:
    """On the inference thread a reference becomes the thing itself."""
    model = Model()
    assert resolve(reference(), OWNER, model) is model
    assert resolve(reference().limit, OWNER, model) == 10
    assert resolve(reference().head.predict, OWNER, model)(3) == 3


def test_resolve_missing_attribute() -> None:
    """A path that leads nowhere fails as it would on the model."""
    with pytest.raises(AttributeError, match="'Model' object has no attribute 'tail'"):
        resolve(reference().tail.predict, OWNER, Model())


def test_resolve_foreign_reference() -> None:
    """A reference to one runner's model never reaches that of another."""
    with pytest.raises(ValueError, match=r"runner\.model\.head belongs to another runner"):
        resolve(reference().head, object(), Model())


def test_resolve_leaves_the_rest_alone() -> None:
    """What is no reference is itself, not a copy."""
    value = [reference()]
    assert resolve(value, OWNER, Model()) is value


def test_resolve_inside_partial() -> None:
    """A partial is resolved in its function, its arguments and its keywords, at any depth."""
    model = Model()
    inner = partial(reference().head.predict, reference().limit)
    outer = partial(inner, scale=reference().limit)
    assert resolve(outer, OWNER, model)() == 100


def test_resolve_work() -> None:
    """A call's function and arguments are resolved wherever references stand among them."""
    model = Model()
    func, args = resolve_work((reference().head.predict, (reference().limit,)), OWNER, model)
    assert func(*args) == 10
    func, args = resolve_work((max, (3, reference().limit, 4)), OWNER, model)
    assert (func, args) == (max, (3, 10, 4))


def test_resolve_work_without_references() -> None:
    """Arguments without references aren't copied: this is on the path of every call."""
    args = (1, "two", [3])
    func, resolved = resolve_work((max, args), OWNER, Model())
    assert func is max
    assert resolved is args


# -- names for people --------------------------------------------------------------------------


class Awkward:
    """An object that fails whatever it is asked, as a careless ``__getattr__`` does."""

    def __getattr__(self, name: str) -> NoReturn:
        raise KeyError(name)

    def __repr__(self) -> NoReturn:
        raise RuntimeError("no repr either")

    def __call__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (len, "len"),
        (Model, "Model"),
        (Head().predict, "Head.predict"),
        (partial(partial(len), [1]), "len"),
        (reference().head.predict, "runner.model.head.predict"),
        (partial(reference().head), "runner.model.head"),
        (Awkward(), "Awkward"),
        (None, "NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_name_of(func: object, name: str) -> None:
    """Everything callable has a name for the log, and asking for it never fails."""
    assert name_of(func) == name


# -- generator functions -----------------------------------------------------------------------


class Generating:
    """Has generator functions of all kinds."""

    def method(self) -> Iterator[int]:
        yield 1

    @staticmethod
    def static() -> Iterator[int]:
        yield 1

    @classmethod
    def of_class(cls) -> Iterator[int]:
        yield 1

    def __call__(self) -> Iterator[int]:
        yield 1

    def plain(self) -> Iterator[int]:
        return iter([1])

    @property
    def head(self) -> NoReturn:
        raise AssertionError("nobody may ask for it")


@pytest.mark.parametrize("load", [Generating, partial(Generating)], ids=["class", "partial"])
@pytest.mark.parametrize(
    ("func", "answer"),
    [
        (Generating().method, True),
        (Generating.static, True),
        (Generating.of_class, True),
        (Generating(), True),
        (partial(partial(Generating().method)), True),
        (Generating, False),
        (Generating().plain, False),
        (iter, False),
        (len, False),
        (Awkward(), False),
        (None, False),
        (reference().method, True),
        (reference().static, True),
        (reference().of_class, True),
        (reference(), True),
        (partial(reference().method), True),
        (reference().plain, False),
        (reference().head.method, False),
        (reference().nothing, False),
    ],
    ids=lambda value: name_of(value) if callable(value) else "",
)
def test_is_generator_function(func: object, answer: bool, load: object) -> None:
    """Of functions, methods, callable objects, partials and references, without running any."""
    assert is_generator_function(func, load) is answer


@pytest.mark.parametrize("load", [None, lambda: Generating()])
def test_references_without_a_class(load: object) -> None:
    """What a plain function loads is not known: it takes a call to find out."""
    assert not is_generator_function(reference().method, load)
    assert is_generator_function(Generating().method, load)
