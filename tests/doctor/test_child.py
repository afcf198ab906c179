"""Facts about the parts that children play, played in this process."""

from __future__ import annotations

import gc
import pickle
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from asgi_infer.doctor import _calls, _load
from asgi_infer.doctor._child import play

from . import models
from .channels import Parent, played

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time for warmth."""
    monkeypatch.setattr(_calls, "_WARM_SECONDS", 0.0)
    monkeypatch.setattr(_load, "_WARM_SECONDS", 0.0)
    monkeypatch.setattr(_load, "_PROBE_EVERY", 0.001)
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes jobs, whose sample is there."""
    sample = tmp_path / "sample.pickle"
    sample.write_bytes(pickle.dumps((models.row,)))

    def make(role: str, *, model: str = "Model", call: str = "predict", **values: object) -> Any:
        target = {
            "model": f"{models.__name__}:{model}",
            "call": call,
            "sample": f"{models.__name__}:row",
            "app_dir": ROOT,
        }
        return {
            "role": role,
            "target": target,
            "sample": str(sample),
            "seconds": 0.05,
            **values,
        }

    return make


def of(job: dict[str, Any]) -> AbstractContextManager[Parent]:
    """A child with that job."""
    return played(lambda channel: play(channel, job))


def test_preflight(job: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The first try writes the sample down for all others, and says how long a call takes."""
    (tmp_path / "sample.pickle").unlink()
    with of(job("preflight")) as child:
        answer = child.ask()
    assert answer["seconds"] >= 0
    assert answer["sample_is_made"] is False
    assert pickle.loads((tmp_path / "sample.pickle").read_bytes()) == (models.row,)


def test_script(job: Callable[..., dict[str, Any]]) -> None:
    """The script waits to be told, says when it is done, and then what it has measured."""
    with of(job("script")) as child:
        assert child.ask() == {"ready": True}
        child.tell()
        assert child.ask() == {"done": True}
        child.tell()
        result = child.ask()
    assert len(result["latencies"]) >= 3
    assert "MainThread" in result["threads"].values()


@pytest.mark.parametrize("call", ["fail", "nothing"])
def test_a_failure_is_answered(job: Callable[..., dict[str, Any]], call: str) -> None:
    """What keeps a child from its part is its answer, in one line."""
    with of(job("script", call=call)) as child:
        assert list(child.ask()) == ["error"]


def measure(port: int, job: dict[str, Any]) -> dict[str, Any]:
    """What the clients of a server see."""
    with of({**job, "role": "load", "port": port, "path": "/predict", "clients": 2}) as load:
        first = load.ask()
        if "error" in first:
            return first
        load.tell()
        assert load.ask() == {"done": True}
        load.tell()
        return load.ask()


WAYS: list[tuple[str, dict[str, Any], str]] = [
    ("def", {}, "AnyIO worker thread"),
    ("async-def", {}, "MainThread"),
    ("executor", {}, "executor_0"),
    ("runner", {"native": {"threads": 1}}, "inference"),
]


@pytest.mark.parametrize(("how", "values", "thread"), WAYS)
def test_serve(
    job: Callable[..., dict[str, Any]], how: str, values: dict[str, Any], thread: str
) -> None:
    """Each server answers its clients and its prober, and names the thread of its model."""
    served = job("serve", how=how, **values)
    with of(served) as server:
        result = measure(server.ask()["port"], served)
        server.tell()
        threads = server.ask()["threads"]
    gc.collect()  # of the executor, with its thread
    assert len(result["latencies"]) >= 3
    assert result["seconds"] > 0
    assert result["health"]
    assert thread in threads.values()


def test_a_model_that_the_runner_can_not_load(job: Callable[..., dict[str, Any]]) -> None:
    """Why the application did not start is the answer, not that it did not."""
    with of(job("serve", how="runner", native={}, model="OnMain")) as server:
        assert "only on the main thread" in server.ask()["error"]


def test_a_model_that_fails_when_served(job: Callable[..., dict[str, Any]]) -> None:
    """A response that is none is told by the clients."""
    served = job("serve", how="async-def", model="Tired")
    with of(served) as server:
        answer = measure(server.ask()["port"], served)
    assert answer == {"error": "the server answered 'HTTP/1.1 500 Internal Server Error'"}
