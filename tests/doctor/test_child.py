"""Facts about the parts that children play, played in this process."""

from __future__ import annotations

import gc
import pickle
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from asgi_infer.doctor import _calls, _load, _server
from asgi_infer.doctor._child import play
from asgi_infer.doctor._target import Target

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
            "clients": 2,
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
    with of({**job, "role": "load", "port": port, "path": "/predict"}) as load:
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


@pytest.mark.parametrize(("clients", "room"), [(1, 128), (500, 500)])
def test_every_client_has_room_in_the_queue(clients: int, room: int) -> None:
    """The runner refuses no call, however many clients there are."""
    job = {"how": "runner", "native": {}, "clients": clients}
    target = Target(model=f"{models.__name__}:Model", call="predict", app_dir=ROOT)
    app = _server.application(job, target, ())
    runner: Any = app.user_middleware[0].kwargs["runner"]
    assert runner._max_queue == room


IMPORTED = """
import threading

threads = [threading.current_thread().name]

class Model:
    def __init__(self):
        threads.append(threading.current_thread().name)

    def predict(self, rows):
        pass
"""


def test_the_module_is_imported_before_the_runner_starts(
    job: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an application: on the main thread; the runner's makes the model and no more."""
    (tmp_path / "imported_first.py").write_text(IMPORTED)
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    there = {"model": "imported_first:Model", "call": "predict", "app_dir": str(tmp_path)}
    with of({**job("serve", how="runner", native={}), "target": there}) as server:
        server.ask()
        imported, made = sys.modules["imported_first"].threads
    assert (imported == "inference", made) == (False, "inference")


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


def test_answers_are_sent_at_once() -> None:
    """asyncio turns Nagle's algorithm off on sockets that say they are TCP's, and on no others:
    each answer would wait 40 ms for an acknowledgement."""
    with _server.listening() as listener:
        assert listener.proto == socket.IPPROTO_TCP
        assert listener.getsockname()[0] == "127.0.0.1"
