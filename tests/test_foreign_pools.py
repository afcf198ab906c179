"""Second OpenMP pools: noticed by how often the model's thread sleeps, and given back.

First on a kernel that is made up, call by call; then with a real model, in a process of its own.
"""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from asgi_infer import _foreign_pools
from asgi_infer._foreign_pools import SLEEPY, ForeignPools, native_threads
from asgi_infer._statistics import Usage
from asgi_infer.native import procfs
from asgi_infer.native.cpu import recommended_threads

from .calls import RecordingPort, make_call
from .native import gomp
from .threads import on_new_thread

MODELS, OTHERS = {101}, {102}


class Kernel:
    """Native threads that come and go as a test says, and a watch over the calls of one runner.

    :ivar foreign: the native threads that are there and not the model's
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours = MODELS
        self.foreign = set(OTHERS)
        self.on_loop: set[int] = set()  # those that the loop's thread can give back
        self.new_ids = itertools.count(201)
        self.families = ["libgomp"]
        self.port = RecordingPort()
        self.usage = Usage()
        self.pools = ForeignPools("digits", self.usage)
        self.examined = 0
        self.released = 0
        self.now = 0.0
        openmp = SimpleNamespace(loaded_runtimes=self.runtimes, release_pools=self.release)
        for name, stand_in in {
            "native_threads": self.native_threads,
            "openmp": openmp,
            "procfs": SimpleNamespace(thread_ids=lambda: self.ours | self.foreign),
            "time": SimpleNamespace(monotonic=lambda: self.now),
        }.items():
            monkeypatch.setattr(_foreign_pools, name, stand_in)

    def native_threads(self, name: str) -> tuple[set[int], set[int]]:
        assert name == "digits"
        self.examined += 1
        return self.ours, set(self.foreign)

    def runtimes(self) -> list[Any]:
        return [SimpleNamespace(family=family) for family in self.families]

    def release(self) -> None:
        self.released += 1
        self.foreign -= self.on_loop
        self.on_loop.clear()

    def stray(self, *, on_loop: bool = True) -> None:
        """A native call elsewhere makes a second pool, unless there is one."""
        if self.throttled:
            return
        pool = {next(self.new_ids), next(self.new_ids)}
        self.foreign |= pool
        if on_loop:
            self.on_loop |= pool

    @property
    def throttled(self) -> bool:
        return self.foreign > OTHERS

    def call(self, count: int = 1, *, switches: int | None = None, turn: bool = True) -> None:
        """Calls, each followed by a turn of the loop that it came from."""
        for _ in range(count):
            self.now += 1.0
            call = make_call(predict, port=self.port)
            call.started = self.now
            slept = switches if switches is not None else 650 if self.throttled else 0
            if slept >= SLEEPY or self.pools.alert:
                self.pools.note(call, slept)
            self.now += 1.0
            if turn:
                self.port.turn()


def predict() -> None:
    """A function with a name."""


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "asgi_infer")
    return lambda: [record.getMessage() for record in caplog.records]


# -- what is done ------------------------------------------------------------------------------


def test_given_back(kernel: Kernel, log: Callable[[], list[str]]) -> None:
    """After three throttled calls the loop's pool is given back; one line tells, with a remedy."""
    kernel.call(10)
    kernel.stray()
    kernel.call(3)
    assert not kernel.throttled
    kernel.call(1)
    assert kernel.usage.pools_returned == 1
    assert kernel.usage.foreign_threads == len(OTHERS)
    (line,) = log()
    assert line.startswith("predict was slowed down by a second OpenMP pool")
    assert "runner.run()" in line


def test_healthy_calls_are_not_looked_at(kernel: Kernel) -> None:
    """As long as nothing is wrong nobody looks for threads, and no loop is asked for anything."""
    kernel.call(1000)
    assert (kernel.examined, kernel.released) == (0, 0)


def test_a_few_sleeps_are_nothing(kernel: Kernel) -> None:
    """Calls that sleep now and then, or one or two in a row that slept a lot, mean nothing."""
    kernel.call(1000, switches=SLEEPY - 1)
    for _ in range(100):
        kernel.call(2, switches=500)
        kernel.call(1)
    assert kernel.examined == 0


def test_nothing_to_throttle(kernel: Kernel, log: Callable[[], list[str]]) -> None:
    """A model without native threads, one that waits for a disk, say, sleeps for other reasons."""
    kernel.ours = set()
    kernel.call(1000, switches=500)
    assert kernel.released == 0
    assert log() == []


def test_nobody_else(kernel: Kernel, log: Callable[[], list[str]]) -> None:
    """Where all native threads are the model's, it sleeps for reasons of its own."""
    kernel.foreign = set()
    kernel.call(1000, switches=500)
    assert kernel.released == 0
    assert log() == []


def test_without_libgomp(kernel: Kernel, log: Callable[[], list[str]]) -> None:
    """Other runtimes have no pools that throttle each other."""
    kernel.families = ["libiomp5"]
    kernel.call(1000, switches=500)
    assert kernel.released == 0
    assert log() == []


def test_examined_less_and_less(kernel: Kernel) -> None:
    """A model that always sleeps is looked at after 3 calls, 6 more, 12 more ... at most every
    1,536."""
    kernel.foreign = set()
    kernel.call(3 + 6 + 12 + 24, switches=500)
    assert kernel.examined == 4
    kernel.call(100_000, switches=500)
    assert kernel.examined < 4 + 6 + 100_000 / 1536


# -- strays that keep coming -------------------------------------------------------------------


def test_no_oscillation(kernel: Kernel, log: Callable[[], list[str]]) -> None:
    """With a stray call between any two calls the pool is given back every 24 calls, and hardly
    anything is logged."""
    for _ in range(1000):
        kernel.stray()
        kernel.call(1)
    assert 1000 / 26 - 2 < kernel.usage.pools_returned < 1000 / 24 + 4
    assert len(log()) == 6  # 1, 2, 4, 8, 16, 32


def test_well_soon_after_the_last_stray(kernel: Kernel) -> None:
    """However often it happened, the model has the CPU again within 25 calls."""
    for _ in range(1000):
        kernel.stray()
        kernel.call(1)
    kernel.call(25)
    assert not kernel.throttled


def test_patience_is_restored(kernel: Kernel) -> None:
    """After a quiet time three throttled calls are enough again."""
    for _ in range(100):
        kernel.stray()
        kernel.call(1)
    kernel.call(300)
    assert not kernel.pools.alert
    kernel.stray()
    kernel.call(3)
    assert not kernel.throttled


# -- where it can't be done --------------------------------------------------------------------


def test_owned_by_another_thread(kernel: Kernel, log: Callable[[], list[str]]) -> None:
    """A pool that is not the loop's can't be given back: said once, with the threads there are."""
    kernel.stray(on_loop=False)
    kernel.call(1000)
    assert kernel.throttled
    assert kernel.usage.pools_returned == 0
    assert kernel.usage.foreign_threads == len(OTHERS) + 2
    (line,) = log()
    assert line.startswith("predict goes to sleep 650 times in a call")
    assert threading.main_thread().name in line


def test_without_a_loop(kernel: Kernel, log: Callable[[], list[str]]) -> None:
    """Callers without an event loop have none that could give anything back."""
    kernel.port = RecordingPort(ended=True)
    kernel.stray()
    kernel.call(1000)
    assert kernel.released == 0
    assert len(log()) == 1


def test_it_passed_by_itself(kernel: Kernel, log: Callable[[], list[str]]) -> None:
    """If the calls are well again although nothing could be given back, nothing is said."""
    kernel.stray(on_loop=False)
    kernel.call(3)
    kernel.call(10, switches=0)
    assert log() == []


def test_loop_that_answers_late(kernel: Kernel) -> None:
    """Until the loop has answered there is nothing to conclude; then it is as ever."""
    kernel.stray()
    kernel.call(4, turn=False)
    assert kernel.usage.pools_returned == 0
    kernel.port.turn()
    kernel.call(1)
    assert kernel.usage.pools_returned == 1


def test_loop_that_never_answers(kernel: Kernel, log: Callable[[], list[str]]) -> None:
    """A loop that stands still is given up after ten seconds."""
    kernel.stray()
    kernel.call(30, turn=False)
    assert len(log()) == 1


# -- telling threads apart ---------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_native_threads() -> None:
    """Threads of Python's are neither the model's nor foreign, and the name tells the others."""

    def look() -> tuple[set[int], set[int], set[int], int]:
        procfs.set_thread_name("digits of people")
        helpers = gomp.started_by(gomp.run_region, 3)
        return (*native_threads("digits of people"), helpers, threading.get_native_id())

    ours, foreign, helpers, runner = on_new_thread(look)
    assert ours == helpers
    assert runner not in ours | foreign
    assert not foreign & {thread.native_id for thread in threading.enumerate()}


def test_native_threads_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on Linux nothing is known of native threads."""

    def no_proc() -> set[int]:
        raise FileNotFoundError

    monkeypatch.setattr(_foreign_pools, "procfs", SimpleNamespace(thread_ids=no_proc))
    assert native_threads("digits") == (set(), set())


def test_native_thread_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that ends while it is looked at is on neither side."""
    kernel_name, thread_name = procfs.kernel_name, procfs.thread_name
    stand_in = SimpleNamespace(
        thread_ids=lambda: {0}, kernel_name=kernel_name, thread_name=thread_name
    )
    monkeypatch.setattr(_foreign_pools, "procfs", stand_in)
    assert native_threads("digits") == (set(), set())


# -- a real model ------------------------------------------------------------------------------

SCRIPT = """
import json, logging, resource, sys, threading
from statistics import median
import anyio
from sklearn.datasets import load_digits
from sklearn.ensemble import HistGradientBoostingClassifier
from asgi_infer import InferenceRunner

DIGITS, LABELS = load_digits(return_X_y=True)
slept, lines = [], []

class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())

logging.getLogger("asgi_infer").addHandler(Lines())

def load():
    return HistGradientBoostingClassifier(max_iter=10).fit(DIGITS, LABELS)

def predict(model):
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    model.predict(DIGITS[:200])
    slept.append(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before)

async def main():
    stray = load()
    seen = {}
    async with InferenceRunner(load, warmup=predict) as runner:
        async def sleeps(calls):
            slept.clear()
            for _ in range(calls):
                await runner.run(predict, runner.model)
            return list(slept)

        async def step(name, calls=50):
            measured = await sleeps(calls)
            seen[name] = {
                "first": median(measured[:3]),
                "last": median(measured[-10:]),
                "returned": runner.statistics().pools_returned,
                "lines": list(lines),
            }
            lines.clear()

        await step("healthy")
        stray.predict(DIGITS[:200])
        await step("stray on the loop's thread")
        for _ in range(60):
            stray.predict(DIGITS[:200])
            await runner.run(predict, runner.model)
        await step("strays kept coming")
        worker = await anyio.to_thread.run_sync(lambda: stray.predict(DIGITS[:200]) is not None)
        await step("stray in a worker thread")
    return seen

print(json.dumps(anyio.run(main, backend=sys.argv[1])))
"""

REAL = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(recommended_threads() < 2, reason="one CPU has nothing to wait for"),
]


@cache
def measured(backend: str) -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT, backend]
    output = subprocess.run(command, check=True, timeout=55, capture_output=True, text=True).stdout
    return dict(json.loads(output))


def real(test: Callable[[str], None]) -> Callable[[str], None]:
    """On asyncio and trio, where there is something to see."""
    for mark in REAL:
        test = mark(test)
    return pytest.mark.parametrize("backend", ["asyncio", "trio"])(test)


@real
def test_scikit_learn_heals(backend: str) -> None:
    """A stray call on the loop's thread throttles the model; it is well again within 50 calls."""
    healthy = measured(backend)["healthy"]
    assert (healthy["last"] < 20, healthy["returned"], healthy["lines"]) == (True, 0, [])
    stray = measured(backend)["stray on the loop's thread"]
    assert stray["first"] > 40
    assert stray["last"] < 20
    assert stray["returned"] == 1
    assert len(stray["lines"]) == 1


@real
def test_scikit_learn_heals_after_many(backend: str) -> None:
    """Also after strays that came between any two calls for a while; hardly anything is logged."""
    seen = measured(backend)["strays kept coming"]
    assert seen["last"] < 20
    assert 2 <= seen["returned"] <= 12
    assert len(seen["lines"]) <= 3


@real
def test_scikit_learn_on_a_worker_thread(backend: str) -> None:
    """A pool that an endpoint's worker thread owns can't be given back, and that is said."""
    before = measured(backend)["strays kept coming"]["returned"]
    seen = measured(backend)["stray in a worker thread"]
    assert seen["last"] > 40
    assert seen["returned"] == before
    (line,) = seen["lines"]
    assert "Threads that there are: " in line
    assert {"asyncio": "AnyIO worker thread", "trio": "Trio thread"}[backend] in line
