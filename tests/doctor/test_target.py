"""Facts about what users name: how it is found, and what is said where it can't be measured."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from asgi_infer.doctor._target import Target, TargetError, told

from . import models

MODELS = models.__name__
HERE = str(Path(__file__).parent)


def target(
    model: str = "Model", call: str | None = "predict", sample: str | None = "row"
) -> Target:
    """Of ``models``."""
    return Target(
        model=f"{MODELS}:{model}", call=call, sample=sample and f"{MODELS}:{sample}", app_dir=HERE
    )


def try_once(target: Target) -> Any:
    """What a first try does."""
    arguments = pickle.loads(target.make_sample())
    target.call_once(target.make(), arguments)
    return arguments


@pytest.mark.parametrize(
    ("good", "arguments"),
    [
        (target(), (models.row,)),
        (target(sample="rows"), (models.rows(),)),
        (target("cached"), (models.row,)),
        (target(call="alone", sample=None), ()),
        (target("Callable", None, None), ()),
        (target(call="predict.__call__"), (models.row,)),
    ],
    ids=str,
)
def test_what_can_be_called(good: Target, arguments: tuple[Any, ...]) -> None:
    """A class or any function makes the model; an attribute of it, or itself, is called; the
    sample is there or is made."""
    assert try_once(good) == arguments


def test_only_a_function_makes_the_sample() -> None:
    """Whether a sample is made is known, for the lines that are written."""
    assert target(sample="rows").sample_is_made()
    assert not target().sample_is_made()
    assert not target(sample=None).sample_is_made()


MODEL_ERRORS = {
    "Modell": "has no 'Modell'; did you mean 'Model'?",
    "nothing_like_it": "has no 'nothing_like_it'; there is Callable, CallableLater, CrashOffMain,",
    "ready": "of type object, exists already, and each measurement makes a model of its own: name",
    "row": "of type list, exists already",
    "from_file": "can't be called without arguments (missing a required argument: 'path'): name a "
    "function that needs none, such as def load(): return from_file(...)",
    "broken": f"{MODELS}:broken() raised ValueError: no weights ({models.__file__}:",
    "model_later": "model_later is async: name the plain function",
}


@pytest.mark.parametrize("name", MODEL_ERRORS)
def test_no_such_model(name: str) -> None:
    """What makes no model is told in one line, with what to write instead."""
    with pytest.raises(TargetError) as caught:
        target(name).make()
    assert MODEL_ERRORS[name] in str(caught.value)
    assert "\n" not in str(caught.value)


CALL_ERRORS = {
    ("predct", "row"): "has no 'predct'; did you mean 'predict'?",
    ("weights", "row"): "weights can't be called, being of type int: name a method with --call, "
    "such as alone, crash, each,",
    (None, "row"): "the model can't be called, being of type Model: name a method with --call",
    ("predict", None): "(missing a required argument: 'rows'): give it one with --input",
    ("pair", "row"): "can't be called with the sample alone (missing a required argument: 'mask')",
    ("alone", "row"): "alone can't be called with the sample alone (too many",
    ("fail", "row"): f"fail raised ValueError: shapes differ ({models.__file__}:",
    ("leave", "row"): "leave raised SystemExit: 3",
    ("later", "row"): "later is async: name the plain function",
    ("returns_later", "row"): "returns_later returned something to await",
    ("returns_a_promise", "row"): "returns_a_promise returned something to await",
    ("each", "row"): "each is a generator function: name one that returns its result",
    ("each_later", "row"): "each_later is a generator function",
    ("lazily", "row"): "lazily returned a generator, which has computed nothing yet",
}


@pytest.mark.parametrize(("call", "sample"), CALL_ERRORS)
def test_no_such_call(call: str | None, sample: str | None) -> None:
    """What can't be called, fails, or has yet to run is told in one line."""
    with pytest.raises(TargetError) as caught:
        try_once(target(call=call, sample=sample))
    assert CALL_ERRORS[call, sample] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_called_with_await_is_refused() -> None:
    """An object with an async ``__call__`` is async too."""
    with pytest.raises(TargetError, match="the model is async"):
        try_once(target("CallableLater", None, None))


SAMPLE_ERRORS = {
    "lock": "lock can't be copied into another process (TypeError: cannot pickle",
    "no_rows": "no_rows() raised OSError: no such image",
    "rows_later": "rows_later is async",
    "nothing": "has no 'nothing'",
}


@pytest.mark.parametrize("name", SAMPLE_ERRORS)
def test_no_such_sample(name: str) -> None:
    """What is no sample for other processes is told in one line."""
    with pytest.raises(TargetError) as caught:
        target(sample=name).make_sample()
    assert SAMPLE_ERRORS[name] in str(caught.value)


@pytest.fixture
def app_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose modules are forgotten after the test."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    return tmp_path


def test_modules_are_looked_for_in_the_directory(app_dir: Path) -> None:
    """``app_dir`` comes first, and may be relative to nothing else."""
    (app_dir / "modelthere.py").write_text("class Model: pass\n")
    there = Target(model="modelthere:Model", app_dir=str(app_dir))
    there.enter()
    assert type(there.make()).__module__ == "modelthere"


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("modelthere", "write MODULE:NAME, as in my_module:Model, and not 'modelthere'"),
        (":Model", "write MODULE:NAME"),
        ("modelthre:Model", "(--app-dir names another directory); did you mean 'modelthere'?"),
        ("package.modle:Model", "there is no module package.modle in"),
        ("elsewhere:Model", "importing elsewhere raised ModuleNotFoundError: No module named 'no"),
        ("wrong:Model", "importing wrong raised SyntaxError: "),
        (
            "exits:Model",
            "importing exits raised SystemExit: usage (",
        ),
    ],
)
def test_no_such_module(app_dir: Path, model: str, told: str) -> None:
    """What can't be imported is told in one line, with the place in the user's code."""
    (app_dir / "modelthere.py").touch()
    (app_dir / "package").mkdir()
    (app_dir / "package" / "__init__.py").touch()
    (app_dir / "elsewhere.py").write_text("import no_such_library\n")
    (app_dir / "wrong.py").write_text("class Model(:\n")
    (app_dir / "exits.py").write_text("raise SystemExit('usage')\n")
    there = Target(model=model, app_dir=str(app_dir))
    there.enter()
    with pytest.raises(TargetError) as caught:
        there.make()
    assert told in str(caught.value)
    if model.startswith(("elsewhere", "wrong", "exits")):
        assert str(caught.value).endswith(f"({app_dir / model.partition(':')[0]}.py:1)")


LAZY = """
def __dir__():
    return ["Heavy", "Model"]

def __getattr__(name):
    if name == "Heavy":
        raise OSError("loaded")
    raise AttributeError(name)

class Model: pass
"""


def test_nothing_is_loaded_to_offer_a_name(app_dir: Path) -> None:
    """Of a package that loads lazily, only what is there already is offered."""
    (app_dir / "lazymodel.py").write_text(LAZY)
    there = Target(model="lazymodel:Modle", app_dir=str(app_dir))
    there.enter()
    with pytest.raises(TargetError, match="has no 'Modle'; did you mean 'Model'"):
        there.make()


def test_an_empty_directory_offers_nothing(app_dir: Path) -> None:
    """Where there is no module at all, none is named."""
    there = Target(model="modelthere:Model", app_dir=str(app_dir))
    with pytest.raises(TargetError) as caught:
        there.make()
    assert str(caught.value).endswith("(--app-dir names another directory)")


def test_no_such_directory() -> None:
    """A directory that is not there is told."""
    with pytest.raises(TargetError, match="no directory '/nowhere': give another --app-dir"):
        Target(model="a:b", app_dir="/nowhere").enter()


def test_a_function_in_c_tells_itself(app_dir: Path) -> None:
    """Where a signature can't be known, the call shows whether it is right."""
    (app_dir / "cmodel.py").write_text("class Model:\n    call = dict.fromkeys\n    low = min\n")
    there = Target(model="cmodel:Model", call="low", app_dir=str(app_dir))
    there.enter()
    with pytest.raises(TargetError, match="low raised TypeError: min expected at least 1"):
        there.call_once(there.make(), ())


def test_an_error_without_a_place_or_text() -> None:
    """An error that was never raised is told by its kind."""
    assert told(ValueError(), ".") == "ValueError"
