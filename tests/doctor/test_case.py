"""Facts about the lines that users are to write: they are in their own names, and are Python."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest

from asgi_infer.doctor._case import Subject
from asgi_infer.doctor._target import Target

from .figures import SUBJECT, arm, case


def subject(model: str, call: str | None, sample: str | None, *, made: bool = False) -> Subject:
    """With these names."""
    return replace(
        SUBJECT, target=Target(model=model, call=call, sample=sample), sample_is_made=made
    )


LINES = {
    subject("m:Model", "predict", "m:sample"): (
        ("from m import Model, sample",),
        "runner = InferenceRunner(Model, warmup=lambda model: model.predict(sample))",
        "result = await runner.run(runner.model.predict, sample)",
    ),
    subject("m:nets.Model", "net.predict", "data:sample", made=True): (
        ("from m import nets", "from data import sample"),
        "runner = InferenceRunner(nets.Model, warmup=lambda model: model.net.predict(sample()))",
        "result = await runner.run(runner.model.net.predict, sample())",
    ),
    subject("m:load", None, None): (
        ("from m import load",),
        "runner = InferenceRunner(load, warmup=lambda model: model())",
        "result = await runner.run(runner.model)",
    ),
}


@pytest.mark.parametrize("names", LINES, ids=str)
def test_lines(names: Subject) -> None:
    """Imports, runner and call name the user's module, model, method and sample."""
    imports, runner, call = LINES[names]
    assert names.imports == imports
    assert names.runner() == runner
    lines = names.application()
    assert lines[-1] == call
    assert {*imports, runner} < set(lines)
    ast.parse("\n".join(["async def f():", *(f"    {line}" for line in lines)]))


def test_a_policy() -> None:
    """What a policy is to say stands in the line that makes the runner, after all imports."""
    *imports, _, runner = SUBJECT.policy(threads=3)
    assert runner.endswith(", native=NativePolicy(threads=3))")
    assert imports == [
        "from asgi_infer import InferenceRunner, NativePolicy",
        "from my_module import Model, sample",
    ]


@pytest.mark.parametrize("names", LINES, ids=str)
def test_a_process_of_its_own(names: Subject) -> None:
    """The lines name the user's model, and nothing that could not be sent to another process."""
    lines = names.isolated()
    assert lines[-1] == f"runner = InferenceRunner({names.model}, worker=ProcessWorker())"
    assert names.imports[0].startswith(lines[2])
    ast.parse("\n".join(lines))


def test_how_long_a_call_takes() -> None:
    """The script knows best; without it, the fastest arm; without any, nothing is known."""
    slow, fast = arm("def", call=0.5), arm("runner", call=0.2)
    assert case(slow, fast, arm("script", call=0.3)).call == 0.3
    assert case(slow, fast).call == 0.2
    assert case().call == 0.0
