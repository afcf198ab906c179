"""The arms: one model, run in each of the usual ways, every one in a process of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..native import cpu
from ._process import Child, ChildFailed
from ._results import Arm
from ._target import Target
from ._watch import INTERVAL, Watch

_PATH = "/predict"

TITLES = {
    "script": "script, main thread",
    "def": "def endpoint",
    "async-def": "async def endpoint",
    "executor": "run_in_executor, 1 thread",
    "runner": "InferenceRunner",
    "runner-retain": "InferenceRunner, retain_memory",
}
"""What is measured, in this order, and what people call it."""

Tick = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all arms have in common.

    :param sample: the file with the pickled arguments
    :param seconds: to measure each for
    :param patience: seconds that a process may take over any one answer
    :param allowance: seconds that a few calls may take, on top of those
    """

    target: Target
    sample: Path
    seconds: float
    clients: int
    patience: float
    allowance: float = 0.0

    def job(self, role: str, **values: object) -> dict[str, Any]:
        """What a child is told."""
        return {
            "role": role,
            "target": dataclasses.asdict(self.target),
            "sample": str(self.sample),
            "seconds": self.seconds,
            **values,
        }

    def child(self, role: str, **values: object) -> Child:
        """A child of that role."""
        return Child(self.job(role, **values), patience=self.patience)


def measure(key: str, setting: Setting, tick: Tick) -> Arm:
    """Measure one arm.

    :param key: of ``TITLES``
    :param tick: called a few times a second meanwhile
    :raises ChildError: its process ended, hung or failed
    """
    if key == "script":
        return _script(setting, tick)
    if key.startswith("runner"):
        native = {"retain_memory": key == "runner-retain"}
        return _server(setting, tick, key=key, how="runner", native=native)
    return _server(setting, tick, key=key, how=key)


def measure_threads(threads: int, setting: Setting, tick: Tick) -> Arm:
    """Measure the runner with so many native threads.

    :raises ChildError: its process ended, hung or failed
    """
    key = f"threads-{threads}"
    return _server(setting, tick, key=key, how="runner", native={"threads": threads})


def _script(setting: Setting, tick: Tick) -> Arm:
    with setting.child("script") as child:
        child.ask(every=INTERVAL, meanwhile=tick, more=setting.allowance)
        window = _Window(child, child, setting, tick)
        result = child.ask()
        return window.arm("script", result, python=result["threads"], event_loop=None)


def _server(setting: Setting, tick: Tick, *, key: str, **values: object) -> Arm:
    with setting.child("serve", clients=setting.clients, **values) as server:

        def look() -> None:
            server.check()
            tick()

        ready = server.ask(every=INTERVAL, meanwhile=tick, more=setting.allowance)
        job = {**ready, "path": _PATH, "clients": setting.clients}
        try:
            with setting.child("load", **job) as load:
                load.ask(every=INTERVAL, meanwhile=look, more=setting.allowance)
                window = _Window(server, load, setting, look)
                # Calls that were under way at the end come to theirs first.
                result = load.ask(every=INTERVAL, meanwhile=look, more=setting.allowance)
        except ChildFailed as error:
            raise server.error(str(error)) from None
        server.tell()
        threads = server.ask()["threads"]
        return window.arm(key, result, python=threads, event_loop=server.pid)


class _Window:
    """The time for which an arm is measured: seen from its making, which returns at its end.

    :param watched: the child with the model
    :param driver: the child that makes the calls, and says when it is done
    """

    def __init__(self, watched: Child, driver: Child, setting: Setting, tick: Tick) -> None:
        throttled = cpu.throttling()
        self._watch = Watch(watched.pid)
        driver.tell()

        def interval() -> None:
            self._watch.tick()
            tick()

        driver.ask(every=INTERVAL, meanwhile=interval, more=setting.seconds + setting.allowance)
        self._watch.stop()
        now = cpu.throttling()
        self._throttled_periods = now.throttled_periods - throttled.throttled_periods
        self._throttled_seconds = now.throttled_seconds - throttled.throttled_seconds
        driver.tell()  # what it has measured is wanted

    def arm(
        self, key: str, result: dict[str, Any], *, python: dict[str, str], event_loop: int | None
    ) -> Arm:
        """What was seen, and what the driver measured."""
        everything, model = self._watch.used(), self._watch.used(without=event_loop)
        in_the_loop = key == "async-def"
        return Arm(
            key=key,
            title=TITLES.get(key) or f"InferenceRunner, threads={key.partition('-')[2]}",
            seconds=result["seconds"],
            latencies=tuple(result["latencies"]),
            cpu_seconds=everything.cpu,
            voluntary_switches=model.voluntary,
            involuntary_switches=model.involuntary,
            minor_faults=everything.faults,
            system_seconds=everything.system,
            queued_seconds=everything.queued,
            throttled_periods=self._throttled_periods,
            throttled_seconds=self._throttled_seconds,
            health=tuple(result.get("health", ())),
            threads=self._watch.traces({int(each): name for each, name in python.items()}),
            interval=INTERVAL,
            model_cpu_seconds=everything.cpu if in_the_loop else model.cpu,
        )
