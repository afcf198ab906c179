"""Arms and machines with the figures that a test wants, and the rest as when all is well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from asgi_infer.doctor._case import Case, Subject
from asgi_infer.doctor._results import Arm, Machine, ThreadTrace
from asgi_infer.doctor._target import Target

SUBJECT = Subject(
    target=Target(model="my_module:Model", call="predict", sample="my_module:sample"),
    sample_is_made=False,
    threads=2,
)

QUIET = Machine(
    system="Linux",
    python="3.12",
    cpus=2,
    cores=2,
    quota=None,
    pressure=0.0,
    others=0.0,
    stolen=0.0,
    noisy=False,
    runtimes=("libgomp (sklearn)",),
)
NOISY = replace(QUIET, noisy=True, others=1.5, pressure=0.3)

POOL = tuple(
    ThreadTrace(name="python", python=python, cpu=(0.9,) * 10) for python in ("MainThread", None)
)
"""A pool of two threads, both busy, in a script."""


def arm(key: str, **figures: Any) -> Arm:
    """One second of it.

    :param figures: ``calls``; ``sleeps`` and ``faults`` a call; ``cores``; ``health``, one
        latency for all; ``call``, the latency of all calls; and any field of an arm
    """
    calls = figures.pop("calls", 100)
    health = figures.pop("health", 0.001)
    usual = Arm(
        key=key,
        title=key,
        seconds=1.0,
        latencies=(figures.pop("call", 1 / calls),) * calls,
        cpu_seconds=figures.pop("cores", 2.0),
        voluntary_switches=figures.pop("sleeps", 0) * calls,
        involuntary_switches=0,
        minor_faults=figures.pop("faults", 0) * calls,
        system_seconds=0.0,
        queued_seconds=0.0,
        throttled_periods=0,
        throttled_seconds=0.0,
        health=() if key == "script" else (health,) * 50,
        threads=(),
        interval=0.1,
    )
    return replace(usual, **figures)


def case(*arms: Arm, machine: Machine = QUIET, subject: Subject = SUBJECT) -> Case:
    """Everything that a finding may look at; arms of a sweep are told by their keys."""
    return Case(
        subject=subject,
        machine=machine,
        arms={each.key: each for each in arms if not each.native_threads},
        sweep={each.native_threads: each for each in arms if each.native_threads},
    )
