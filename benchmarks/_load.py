"""One arm under load: a fresh server, its clients and a prober, each a process of its own."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from asgi_infer.native.procfs import all_thread_counters

from ._children import Child, once
from ._figure import Sample, Scale, Unavailable
from ._models import PACKAGES, TRAINERS
from ._usage import Reading, Usage, read_tree, total, used_between


@dataclass(frozen=True)
class Load:
    """How an arm is used.

    :param connections: keep-alive connections that always wait for a response
    :param model: by its name in ``benchmarks._models``; with any but the no-op goes a prober of
        ``/health``
    """

    connections: int = 0
    model: str = "noop"

    @property
    def probed(self) -> bool:
        """Whether somebody asks for ``/health`` meanwhile."""
        return self.model != "noop"


def serve(load: Load, scale: Scale, *arguments: str, model_in_loop: bool = False) -> Sample:
    """Measure one server.

    :param arguments: of ``benchmarks._server``
    :param model_in_loop: the model runs on the event loop's thread: no telling them apart
    """
    with Child("_server", *arguments, *model_options(load.model, scale)) as server:
        port = server.ask()["port"]
        answers, used = ask_for_calls(load, scale, port, lambda: all_thread_counters(server.pid))
        sample = per_call(answers, used)
        if not model_in_loop:
            sample |= _apart(answers[0], used, server.pid)
        return sample


def script(model: str, scale: Scale, *arguments: str) -> Sample:
    """Measure a model without a server.

    :param arguments: of ``benchmarks._script``
    """
    seconds = ("--seconds", str(scale.seconds))
    with Child("_script", *arguments, *model_options(model, scale), *seconds) as child:
        return per_call(*_together([child], lambda: read_tree(child.pid)))


Answers = list[dict[str, Any]]
"""What the load client said, and then the prober, if there is one."""


def ask_for_calls(
    load: Load,
    scale: Scale,
    port: int,
    read: Callable[[], Reading],
    *,
    path: str = "/predict",
    health: str = "/health",
    body: str | None = None,
) -> tuple[Answers, dict[int, Usage]]:
    """Put the load on a server, and see what that takes.

    :param read: reads the counters of the server's threads
    :param body: of each request, which is a POST then
    """
    seconds = ["--seconds", str(scale.seconds)]
    how = ["--connections", str(load.connections), "--warmup", str(scale.warmup)]
    post = [] if body is None else ["--body", body]
    programs = [["load", str(port), path, *how, *seconds, *post]]
    if load.probed:
        programs.append(["probe", str(port), health, *seconds])
    with ExitStack() as stack:
        children = [stack.enter_context(Child("_http", *program)) for program in programs]
        return _together(children, read)


def _together(
    children: list[Child], read: Callable[[], Reading]
) -> tuple[Answers, dict[int, Usage]]:
    """Let all children go at once; return their answers, and what was used meanwhile."""
    for child in children:
        child.ask()  # ready
    before = read()
    for child in children:
        child.tell()
    first = children[0].ask()
    used = used_between(before, read())
    return [first, *(child.ask() for child in children[1:])], used


def per_call(answers: Answers, used: dict[int, Usage]) -> dict[str, float]:
    """The figures of one arm, all of whose native threads count as the model's."""
    load, *probes = answers
    seconds, calls = load["seconds"], _calls(load)
    everything = total(used.values())
    sample = {
        "calls": load["calls"] / seconds,
        "cpu": 100 * everything.cpu / seconds,
        "switches": everything.switches / calls,
        "model_switches": everything.switches / calls,
        "model_cpu": 100 * everything.cpu / seconds,
        "faults": everything.faults / calls,
    }
    for probe in probes:
        sample["health_p99"] = 1000 * probe["p99"]
        sample["health_median"] = 1000 * probe["median"]
        sample["probe_late"] = 1000 * probe["late"]
    return sample


def _apart(load: dict[str, Any], used: dict[int, Usage], loop: int) -> dict[str, float]:
    """What was the event loop's, and what the model's."""
    seconds, calls = load["seconds"], _calls(load)
    ours, model = used[loop], total(each for thread, each in used.items() if thread != loop)
    return {
        "model_switches": model.switches / calls,
        "loop_switches": ours.switches / calls,
        "model_cpu": 100 * model.cpu / seconds,
        "loop_cpu": 100 * ours.cpu / seconds,
    }


def _calls(load: dict[str, Any]) -> int:
    calls: int = load["calls"]
    return max(1, calls)  # none at all, on a very busy machine


def model_options(model: str, scale: Scale) -> tuple[str, ...]:
    """The command-line options for a model; without any, it is the no-op.

    :raises Unavailable: what the model needs is not installed
    """
    if not scale.iterations:
        return ()
    package = PACKAGES.get(model)
    if package is not None and find_spec(package) is None:
        raise Unavailable(f"it needs {package}, which `make bench-full-cpu` installs if it can")
    file = ("--file", str(trained(model, scale.iterations))) if model in TRAINERS else ()
    return ("--model", model, *file)


@cache
def trained(model: str, iterations: int) -> Path:
    """A file with the trained model, made once, and in a process of its own."""
    folder = tempfile.TemporaryDirectory(prefix="asgi_infer-bench-")
    atexit.register(folder.cleanup)
    path = Path(folder.name, f"{model}.pickle")
    once("_models", model, str(path), "--iterations", str(iterations))
    return path
