"""The program of each child: it is told what it is to be, and is that until its input ends."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

from ._calls import repeat, warm_up
from ._channel import Channel, end_with_parent, python_threads
from ._target import Target, TargetError, told


def preflight(channel: Channel, job: dict[str, Any]) -> None:
    """Try it all once, and write down the sample that every other process gets."""
    target = _target(job)
    Path(job["sample"]).write_bytes(target.make_sample())
    model = target.make()
    target.call_once(model, arguments(job))
    call = target.bind(model, arguments(job))
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    channel.send(seconds=seconds, sample_is_made=target.sample_is_made())
    channel.receive()


def script(channel: Channel, job: dict[str, Any]) -> None:
    """The model alone, called in a loop on the main thread."""
    target = _target(job)
    call = target.bind(target.make(), arguments(job))
    warm_up(call)
    channel.send(ready=True)
    channel.receive()
    seconds, latencies = repeat(call, job["seconds"])
    channel.send(done=True)
    channel.receive()
    channel.send(seconds=seconds, latencies=latencies, threads=python_threads())
    channel.receive()


def serve(channel: Channel, job: dict[str, Any]) -> None:
    """The model behind FastAPI and uvicorn."""
    from . import _server

    _server.serve(channel, job, _target(job), arguments(job))


def load(channel: Channel, job: dict[str, Any]) -> None:
    """The clients of a server."""
    from . import _load

    _load.load(channel, job)


ROLES = {"preflight": preflight, "script": script, "serve": serve, "load": load}


def arguments(job: dict[str, Any]) -> tuple[Any, ...]:
    """What the call gets, from the bytes that all processes share."""
    unpickled: tuple[Any, ...] = pickle.loads(Path(job["sample"]).read_bytes())  # noqa: S301  # our own
    return unpickled


def play(channel: Channel, job: dict[str, Any]) -> None:
    """Be what the job says; answer with an error where that fails."""
    try:
        ROLES[job["role"]](channel, job)
    except TargetError as error:
        channel.send(error=str(error))
    except Exception as error:
        channel.send(error=told(error, job.get("target", {}).get("app_dir", ".")))


def _target(job: dict[str, Any]) -> Target:
    target = Target(**job["target"])
    target.enter()
    return target


def main() -> None:  # pragma: no cover  # in a process of its own
    """Be a child."""
    channel = Channel.of_this_process()
    job = channel.receive()
    end_with_parent(job["parent"])
    play(channel, job)


if __name__ == "__main__":  # pragma: no cover  # in a process of its own
    main()
