"""What it costs to have the model in another process, and what it is good for.

These figures need loky and PyTorch: ``make bench-isolation``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil

from ._children import once
from ._figure import (
    Comparison,
    Figure,
    Metric,
    Round,
    Sample,
    Scale,
    Unavailable,
    all_at_once,
    one_by_one,
)
from ._load import script
from ._rival import RivalError, RivalServer, environment, free_port

OURS = "ProcessWorker"
_RIVALS = ["anyio.to_process", "thread + Pipe", "ProcessPoolExecutor", "loky"]
_SERVERS = 4
_MEBIBYTES = 200
_PATIENCE = 60.0  # seconds for all servers to come up, and to go

# -- there and back ------------------------------------------------------------------------------


def trip(arm: str, mebibytes: int, share: int) -> Callable[[Scale], Sample]:
    """Measure one of ``_isolated``.

    :param share: one in so many of the calls that a hand-off is measured by
    """

    def measure(scale: Scale) -> Sample:
        if arm == "loky" and find_spec("loky") is None:
            raise Unavailable("it needs loky, which `make bench-isolation` installs")
        calls = max(1, scale.calls // share)
        size = ("--mebibytes", str(mebibytes))
        return once("_isolated", arm, *size, "--calls", str(calls))

    return measure


def _array(mebibytes: int, *, share: int, at_most: float) -> Figure:
    arms = [OURS, *_RIVALS, "two copies"]
    return Figure(
        name=f"isolation-array-{mebibytes}",
        title=f"a float32 array of {mebibytes} MiB there and back, one caller",
        arms=arms,
        metrics=[Metric("call", "us/call", digits=0)],
        comparisons=[
            *(Comparison("call", OURS, rival, at_most=at_most) for rival in _RIVALS),
            Comparison("call", OURS, "two copies"),
        ],
        steps=one_by_one({arm: trip(arm, mebibytes, share) for arm in arms}),
        notes=(
            "The function changes one element of each page of the array that it gets, and\n"
            "returns that array; the caller looks at each page of it. Two copies, with the same,\n"
            "are the limit: within one thread, to memory that is there already."
        ),
    )


# -- Ray -----------------------------------------------------------------------------------------


def _ray(scale: Scale) -> Round:
    if not scale.iterations:
        raise Unavailable("it is not started where every model is a no-op")
    try:
        python = environment("ray") / "bin" / "python"
    except RivalError as error:
        raise Unavailable(str(error)) from error
    sizes = ("--passes", str(scale.passes), "--calls", str(scale.calls // 16))
    measured: Round = once("_on_ray", *sizes, python=python)
    return measured


# -- a lock held, and calls of real models -------------------------------------------------------


def _lag(arm: str) -> Callable[[Scale], Sample]:
    def measure(scale: Scale) -> Sample:
        seconds = 0.5 if scale.iterations else 0.01
        sizes = ("--seconds", str(seconds), "--calls", str(scale.passes))
        return once("_gil", arm, *sizes)

    return measure


def _model(model: str, *arguments: str) -> Callable[[Scale], Sample]:
    return lambda scale: script(model, scale, *arguments)


def _calls(name: str, model: str, title: str) -> Figure:
    arms = {
        "script": _model(model),
        OURS: _model(model, "--how", "run", "--worker", "process"),
        "ThreadWorker": _model(model, "--how", "run"),
    }
    return Figure(
        name=f"isolation-{name}",
        title=f"{title}; in a loop",
        arms=list(arms),
        metrics=[
            Metric("calls", "calls/s"),
            Metric("switches", "switches/call"),
            Metric("cpu", "CPU %", digits=0),
        ],
        comparisons=[
            Comparison("calls", OURS, "script", at_least=0.95),
            Comparison("calls", "ThreadWorker", "script"),
        ],
        steps=one_by_one(arms),
        rounds=7,
        notes="Without a server. Switches and CPU are of all native threads of both processes.",
    )


# -- memory --------------------------------------------------------------------------------------


def _memory(worker: str) -> Callable[[Scale], Sample]:
    def measure(scale: Scale) -> Sample:
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "benchmarks._memory_app:app"]
        command += ["--workers", str(_SERVERS), "--port", str(port), "--log-level", "warning"]
        with tempfile.TemporaryDirectory(prefix="asgi_infer-bench-") as folder:
            variables = {
                "BENCH_FOLDER": folder,
                "BENCH_WORKER": worker,
                "BENCH_MEBIBYTES": str(_MEBIBYTES if scale.iterations else 1),
            }
            with RivalServer(command, port, "/predict", variables):
                _wait_for_servers(Path(folder))
                processes = inheritors("BENCH_FOLDER", folder)
                sample = memory(processes)
            psutil.wait_procs(processes, timeout=_PATIENCE)
        return sample

    return measure


def _wait_for_servers(folder: Path) -> None:
    """Until each of them has its model, and has used it."""
    end = time.monotonic() + _PATIENCE
    while len(list(folder.glob("*.up"))) < _SERVERS:
        if time.monotonic() > end:
            raise RivalError(f"not all {_SERVERS} servers came up in {_PATIENCE:.0f} s")
        time.sleep(0.05)


def inheritors(variable: str, value: str) -> list[psutil.Process]:
    """All processes with this in their environment: also those whose parent has gone."""
    entry = f"{variable}={value}".encode()
    found = []
    for process in psutil.process_iter():
        try:
            variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue  # somebody else's, or gone
        if entry in variables:
            found.append(process)
    return found


def memory(processes: Sequence[psutil.Process]) -> dict[str, float]:
    """MiB that the processes hold together: a page that n of them share is counted once (PSS)."""
    kibibytes = 0
    for process in processes:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        kibibytes += next(
            int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")
        )
    return {"pss": kibibytes / 1024, "processes": len(processes)}


_RAY = ["actor", "RayWorker"]
_LAG = {arm: _lag(name) for arm, name in {"ThreadWorker": "thread", OURS: "process"}.items()}
_MEMORY = {worker: _memory(worker) for worker in ("ThreadWorker", "SharedWorker")}
_NOOP = [OURS, *_RIVALS]

FIGURES = [
    Figure(
        name="isolation-noop",
        title="a call that does nothing, to another process and back, one caller",
        arms=_NOOP,
        metrics=[Metric("call", "us/call")],
        comparisons=[Comparison("call", OURS, rival, at_most=0.9) for rival in _RIVALS],
        steps=one_by_one({arm: trip(arm, 0, share=1) for arm in _NOOP}),
        rounds=9,
        notes="All awaited on asyncio's own loop, each with one process of its own that stays.",
    ),
    _array(1, share=10, at_most=0.1),
    _array(32, share=160, at_most=0.08),
    Figure(
        name="isolation-ray",
        title="an actor of a local Ray cluster, one caller",
        arms=_RAY,
        metrics=[Metric("noop", "us/call: no-op"), Metric("array", "1 MiB there and back")],
        comparisons=[
            Comparison("noop", "RayWorker", "actor", at_most=1.1),
            Comparison("array", "RayWorker", "actor"),
        ],
        steps=[all_at_once(_RAY, _ray)],
        notes="actor: `await actor.method.remote()`. Both in one cluster, pass by pass.",
    ),
    Figure(
        name="isolation-gil",
        title="the event loop while native code holds Python's lock for 500 ms",
        arms=["idle", *_LAG],
        metrics=[Metric("lag", "late by ms: median call"), Metric("worst", "worst call")],
        comparisons=[Comparison("lag", "ThreadWorker"), Comparison("lag", OURS, at_most=5)],
        steps=one_by_one({"idle": _lag("idle"), **_LAG}),
        notes="By how much the worst of a call's sleeps of 1 ms lasted too long. Idle: no call.",
    ),
    _calls("digits", "digits", "scikit-learn's HistGradientBoosting, 200 digits a call"),
    _calls("torch", "torch-operations", "200 small operations of PyTorch a call"),
    Figure(
        name="isolation-memory",
        title=f"`uvicorn --workers {_SERVERS}` with a model of {_MEBIBYTES} MiB",
        arms=list(_MEMORY),
        metrics=[
            Metric("pss", "PSS MiB of all processes", digits=0),
            Metric("processes", "processes", digits=0),
        ],
        comparisons=[Comparison("pss", "SharedWorker", "ThreadWorker", at_most=0.45)],
        steps=one_by_one(_MEMORY),
        rounds=3,
    ),
]
