"""One arm under load: a fresh server, its clients and a prober, each a process of its own."""

from __future__ import annotations

import atexit
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from asgi_infer.native.procfs import all_thread_counters

from ._children import Child, once
from ._figure import Sample, Scale
from ._usage import Usage, total, used_between


@dataclass(frozen=True)
class Load:
    """How an arm is used.

    :param connections: keep-alive connections that always wait for a response
    :param digits: with the model of the digits, and with a prober of ``/health``; else no-op
    """

    connections: int
    digits: bool


def serve(load: Load, scale: Scale, *arguments: str, model_in_loop: bool = False) -> Sample:
    """Measure one server.

    :param arguments: of ``benchmarks._server``
    :param model_in_loop: the model runs on the event loop's thread: no telling them apart
    """
    with Child("_server", *arguments, *_model_option(load, scale)) as server, ExitStack() as stack:
        port = str(server.ask()["port"])
        programs = _clients(load, scale, port)
        children = [stack.enter_context(Child("_http", *program)) for program in programs]
        answers, used = _together(server.pid, children)
    probe = answers[1] if load.digits else None
    return _sample(answers[0], used, server.pid, probe, model_in_loop=model_in_loop)


def script(scale: Scale) -> Sample:
    """Measure the model of the digits without a server."""
    model = _model_option(Load(0, digits=True), scale)
    with Child("_script", *model, "--seconds", str(scale.seconds)) as child:
        answers, used = _together(child.pid, [child])
        return _sample(answers[0], used, child.pid, None, model_in_loop=True)


def _clients(load: Load, scale: Scale, port: str) -> list[list[str]]:
    """The command lines of ``benchmarks._http``."""
    seconds = ["--seconds", str(scale.seconds)]
    how = ["--connections", str(load.connections), "--warmup", str(scale.warmup)]
    programs = [["load", port, "/predict", *how, *seconds]]
    if load.digits:
        programs.append(["probe", port, "/health", *seconds])
    return programs


def _together(pid: int, children: list[Child]) -> tuple[list[dict[str, Any]], dict[int, Usage]]:
    """Let all children go at once; return their answers, and what the process used meanwhile."""
    for child in children:
        child.ask()  # ready
    before = all_thread_counters(pid)
    for child in children:
        child.tell()
    first = children[0].ask()
    used = used_between(before, all_thread_counters(pid))
    return [first, *(child.ask() for child in children[1:])], used


def _sample(
    load: dict[str, Any],
    used: dict[int, Usage],
    main_thread: int,
    probe: dict[str, Any] | None,
    *,
    model_in_loop: bool,
) -> Sample:
    seconds = load["seconds"]
    calls = max(1, load["calls"])  # none at all, on a very busy machine
    everything, loop = total(used.values()), used[main_thread]
    sample = {
        "calls": load["calls"] / seconds,
        "cpu": 100 * everything.cpu / seconds,
        "switches": everything.switches / calls,
        "model_switches": everything.switches / calls,
        "model_cpu": 100 * everything.cpu / seconds,
    }
    if not model_in_loop:
        sample["model_switches"] = (everything.switches - loop.switches) / calls
        sample["loop_switches"] = loop.switches / calls
        sample["model_cpu"] = 100 * (everything.cpu - loop.cpu) / seconds
        sample["loop_cpu"] = 100 * loop.cpu / seconds
    if probe is not None:
        sample["health_p99"] = 1000 * probe["p99"]
        sample["health_median"] = 1000 * probe["median"]
        sample["probe_late"] = 1000 * probe["late"]
    return sample


def _model_option(load: Load, scale: Scale) -> tuple[str, ...]:
    if load.digits and scale.iterations:
        return ("--model", str(_trained(scale.iterations)))
    return ()


@cache
def _trained(iterations: int) -> Path:
    """A file with the trained model, made once, and without scikit-learn in this process."""
    folder = tempfile.TemporaryDirectory(prefix="asgi_infer-bench-")
    atexit.register(folder.cleanup)
    path = Path(folder.name, "digits.pickle")
    once("_models", str(path), "--iterations", str(iterations))
    return path
