"""What a queue's policy may say."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from asgi_infer import InferenceRunner, QueuePolicy


def test_defaults() -> None:
    """The default sheds, and is written so that it can be read."""
    policy = QueuePolicy()
    assert repr(policy) == ("QueuePolicy(ageing=1.0, overload='shed', target=0.25, interval=0.5)")
    assert policy == QueuePolicy(overload="shed")


def test_frozen() -> None:
    """A policy may be shared by runners: it can't be changed."""
    policy = QueuePolicy()
    with pytest.raises(FrozenInstanceError):
        policy.ageing = 2.0  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # the point


@pytest.mark.parametrize(
    "options",
    [{"ageing": 0}, {"target": 1}, {"interval": 0}, {"overload": "newest"}, {"overload": "wait"}],
)
def test_accepted(options: dict[str, Any]) -> None:
    """The ends of the ranges belong to them."""
    (name,) = options
    assert getattr(QueuePolicy(**options), name) == options[name]


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("ageing", [-1, math.nan, math.inf, 10**400, "1"], "a number of seconds, 0 or more"),
        ("target", [0, -0.5, 1.01, math.nan, None], "a share of a call's time"),
        ("interval", [-0.1, math.inf, []], "a number of seconds, 0 or more"),
        ("overload", ["drop", None, 1], "'shed', 'newest' or 'wait'"),
    ],
)
def test_refused(name: str, values: list[Any], wanted: str) -> None:
    """What makes no sense is refused at once, with what would."""
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be {wanted}"):
            QueuePolicy(**{name: value})


def test_runner_wants_a_policy() -> None:
    """The name of a policy is none: the error shows how to write it."""
    queue: Any = "newest"
    with pytest.raises(TypeError, match=r"QueuePolicy\(overload=...\)"):
        InferenceRunner(queue=queue)
