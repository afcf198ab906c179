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
import weakref
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

from .calls import RecordingPort
from .native import gomp
from .threads import on_new_thread

MODELS, OTHERS = {101}, {102}


class Kernel:
    """Native threads that come and go as a test says, and a watch over the calls of one runner.

    :ivar foreign: the native threads that are there and not the model's
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours = {"digits": set(MODELS)}
        self.foreign = set(OTHERS)
        self.on_loop: set[int] = set()  # those that the loop's thread can give back
        self.new_ids = itertools.count(201)
        self.families = ["libgomp"]
        self.home = RecordingPort()
        self.port = self.home
        self.usage = Usage()
        monkeypatch.setattr(_foreign_pools, "_watched", [])
        self.pools = ForeignPools("digits", self.usage, threads=2, home=self.home)
        self.looks = 0
        self.released = 0
        self.now = 0.0
        openmp = SimpleNamespace(loaded_runtimes=self.runtimes, release_pools=self.release)
        for name, stand_in in {
            "native_threads": self.native_threads,
            "openmp": openmp,
            "procfs": SimpleNamespace(
                thread_ids=lambda: self.ours["digits"] | self.foreign,
                kernel_name=procfs.kernel_name,
            ),
            "time": SimpleNamespace(monotonic=lambda: self.now),
            "cpu": SimpleNamespace(IMPORT_AFFINITY=frozenset({0, 1})),
        }.items():
            monkeypatch.setattr(_foreign_pools, name, stand_in)

    def native_threads(self, name: str) -> tuple[set[int], set[int]]:
        self.looks += 1
        return self.ours[name], set(self.foreign)

    def runtimes(self) -> list[Any]:
        return [SimpleNamespace(family=family) for family in self.families]

    def release(self) -> None:
        self.released += 1
        self.foreign -= self.on_loop
        self.on_loop.clear()

    def stray(self, *, on_loop: bool = True) -> set[int]:
        """A native call elsewhere makes a second pool, unless there is one."""
        if self.throttled():
            return set()
        pool = {next(self.new_ids), next(self.new_ids)}
        self.foreign |= pool
        if on_loop:
            self.on_loop |= pool
        return pool

    def throttled(self) -> bool:
        return self.foreign > OTHERS

    def call(self, count: int = 1, *, switches: int | None = None, turn: bool = True) -> None:
        """Calls, each followed by a turn of the loop that it came from."""
        for _ in range(count):
            self.now += 0.1
            slept = switches if switches is not None else 650 if self.throttled() else 0
            if slept >= SLEEPY or self.pools.alert:
                self.pools.note("predict", self.port, slept)
            if turn:
                self.port.turn()

    def look(self, switches_per_call: float = 0.0) -> None:
        """What happens once a second."""
        self.now += 1.0
        self.usage.switches_per_call = switches_per_call
        self.pools.look("predict", self.port)
        self.port.turn()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, "asgi_infer")
    return lambda: [record.getMessage() for record in caplog.records]


Log = Callable[[], list[str]]


# -- what is done ------------------------------------------------------------------------------


def test_given_back(kernel: Kernel, log: Log) -> None:
    """After three throttled calls the loop's pool is given back; one line tells, with a remedy."""
    kernel.call(10)
    kernel.stray()
    kernel.call(3)
    assert not kernel.throttled()
    kernel.call(1)
    assert kernel.usage.pools_returned == 1
    (line,) = log()
    assert line.startswith("predict went to sleep 650 times in a call, as OpenMP does when")
    assert "runner.run()" in line


def test_pool_that_was_there_while_calls_were_light(kernel: Kernel) -> None:
    """A pool that was made while calls had no use for theirs is given back when they have."""
    kernel.stray()
    kernel.look(0.0)
    kernel.call(3, switches=650)
    assert not kernel.throttled()


def test_healthy_calls_are_not_looked_at(kernel: Kernel) -> None:
    """As long as nothing is wrong nobody looks for threads, and no loop is asked for anything."""
    kernel.call(1000)
    assert (kernel.looks, kernel.released) == (0, 0)


def test_a_few_sleeps_are_nothing(kernel: Kernel) -> None:
    """Calls that sleep now and then, or one in a row that slept a lot, mean nothing."""
    kernel.call(1000, switches=SLEEPY - 1)
    for _ in range(100):
        kernel.call(1, switches=500)
        kernel.call(1)
    assert kernel.looks == 0


def test_few_regions(kernel: Kernel) -> None:
    """A call that sleeps twice is slow as well, if it did not sleep before: found by the looks."""
    kernel.foreign.clear()
    kernel.look(0.1)
    kernel.stray()
    kernel.look(1.9)
    assert kernel.foreign  # they may be threads that have only just started
    kernel.look(1.9)
    assert not kernel.foreign
    kernel.call(1, switches=0)
    assert kernel.usage.pools_returned == 1


def test_few_sleeps_as_usual(kernel: Kernel) -> None:
    """A model that has always slept twice in a call is left alone."""
    for _ in range(10):
        kernel.look(1.9)
    assert kernel.released == 0


def test_a_few_more_sleeps_than_usual(kernel: Kernel) -> None:
    """What is no sign, and not well either, teaches nothing."""
    kernel.look(4.0)
    kernel.stray(on_loop=False)
    kernel.look(8.0)
    kernel.call(5)
    kernel.look(8.0)
    assert kernel.pools._harmless == OTHERS


def test_asks_every_loop(kernel: Kernel) -> None:
    """The pool may be that of the loop that started the runner, wherever the calls come from."""
    kernel.port = RecordingPort(ended=True)  # that of callers without a loop, for one
    kernel.stray()
    kernel.call(3)
    kernel.home.turn()
    assert not kernel.throttled()


# -- nothing to do -----------------------------------------------------------------------------


def test_nothing_to_throttle(kernel: Kernel, log: Log) -> None:
    """A model without native threads, one that waits for a disk, say, sleeps for other reasons."""
    kernel.ours["digits"].clear()
    kernel.call(1000, switches=500)
    assert (kernel.released, log()) == (0, [])


def test_nobody_else(kernel: Kernel, log: Log) -> None:
    """Where all native threads are the model's, it sleeps for reasons of its own."""
    kernel.foreign = set()
    kernel.call(1000, switches=500)
    assert (kernel.released, log()) == (0, [])


def test_without_libgomp(kernel: Kernel, log: Log) -> None:
    """Other runtimes have no pools that throttle each other."""
    kernel.families = ["libiomp5"]
    kernel.call(1000, switches=500)
    assert (kernel.released, log()) == (0, [])


def test_sleepy_from_the_first_call(kernel: Kernel, log: Log) -> None:
    """A model that has always slept is given its chance, once, and nothing is claimed."""
    kernel.call(1000, switches=500)
    assert (kernel.released, kernel.usage.pools_returned, log()) == (1, 0, [])


def test_sleepy_with_nobody_new(kernel: Kernel, log: Log) -> None:
    """Nor is anything claimed where calls begin to sleep and no thread is new."""
    kernel.look(0.0)
    kernel.call(1000, switches=500)
    assert (kernel.released, kernel.usage.pools_returned, log()) == (1, 0, [])


def test_threads_that_come_and_go(kernel: Kernel, log: Log) -> None:
    """Threads that were not there at the look before are no suspects, and none is given back."""
    for _ in range(300):
        kernel.foreign = OTHERS | {next(kernel.new_ids)}
        kernel.call(1, switches=500)
    assert (kernel.usage.pools_returned, log()) == (0, [])


# -- strays that keep coming -------------------------------------------------------------------


def test_no_oscillation(kernel: Kernel, log: Log) -> None:
    """With a stray call between any two calls the pool is given back every 24 calls, and hardly
    anything is logged."""
    for _ in range(1000):
        kernel.stray()
        kernel.call(1)
    assert 1000 / 26 - 2 < kernel.usage.pools_returned < 1000 / 24 + 4
    assert len(log()) == 6  # 1, 2, 4, 8, 16, 32


def test_well_soon_after_the_last_stray(kernel: Kernel) -> None:
    """However often it happened, the model has the CPU again within 26 calls."""
    for _ in range(1000):
        kernel.stray()
        kernel.call(1)
    kernel.call(26)
    assert not kernel.throttled()


def test_patience_is_restored(kernel: Kernel) -> None:
    """After a quiet time three throttled calls are enough again."""
    for _ in range(100):
        kernel.stray()
        kernel.call(1)
    kernel.call(100)
    assert not kernel.pools.alert
    kernel.stray()
    kernel.call(3)
    assert not kernel.throttled()


def test_after_a_pool_that_could_not_be_given_back(kernel: Kernel) -> None:
    """Another thread's pool, kept for thousands of calls, costs the next stray no time."""
    kernel.look(0.0)
    pool = kernel.stray(on_loop=False)
    kernel.call(5000)
    kernel.foreign -= pool
    kernel.call(100)
    kernel.stray()
    kernel.call(3)
    assert not kernel.throttled()


# -- where it can't be done --------------------------------------------------------------------


def test_owned_by_another_thread(kernel: Kernel, log: Log) -> None:
    """A pool that is not the loop's can't be given back: said once, with the threads there are."""
    kernel.look(0.0)
    kernel.stray(on_loop=False)
    kernel.call(1000)
    assert kernel.throttled()
    assert kernel.released == 1
    assert kernel.usage.pools_returned == 0
    assert kernel.usage.foreign_threads == len(OTHERS) + 2
    (line,) = log()
    assert line.startswith("predict goes to sleep 650 times in a call, and did not before")
    assert threading.main_thread().name in line


def test_second_pool_that_can_not_be_given_back(kernel: Kernel, log: Log) -> None:
    """One line is enough, however many threads there are that own pools."""
    kernel.look(0.0)
    kernel.stray(on_loop=False)
    kernel.call(100)
    kernel.foreign |= {next(kernel.new_ids)}
    kernel.call(100)
    assert kernel.released == 2
    assert len(log()) == 1


def test_it_passed_by_itself(kernel: Kernel, log: Log) -> None:
    """If the calls are well again although nothing could be given back, nothing is said."""
    kernel.look(0.0)
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


def test_loop_that_never_answers(kernel: Kernel, log: Log) -> None:
    """A loop that stands still, or was closed, is given up after a second; nothing is claimed."""
    kernel.look(0.0)
    kernel.stray()
    kernel.call(3, turn=False)
    waiting = kernel.pools._release
    kernel.call(11, turn=False)
    assert (waiting is None, kernel.pools._release, log()) == (False, None, [])


def test_failure_on_the_loop(kernel: Kernel, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails on the loop stays there. Nothing is known then, and it is tried again."""

    def fail() -> int:
        raise OSError("too many open files")

    monkeypatch.setattr(_foreign_pools.openmp, "release_pools", fail)  # type: ignore[attr-defined]
    kernel.look(0.0)
    kernel.stray()
    kernel.call(20)
    assert (kernel.usage.pools_returned, log()) == (0, [])


def test_keeps_no_port_alive(kernel: Kernel) -> None:
    """Loops that have gone are forgotten."""
    kernel.port = RecordingPort()
    kernel.look(0.0)
    gone = weakref.ref(kernel.port)
    kernel.port = kernel.home
    assert gone() is None


# -- several runners ---------------------------------------------------------------------------


def test_two_runners(kernel: Kernel, log: Log) -> None:
    """Runners that throttle each other are named, with what to set; nothing is given back."""
    other = ForeignPools("words", Usage(), threads=2)
    kernel.ours["words"] = {301}
    kernel.foreign |= kernel.ours["words"]
    kernel.call(1000, switches=500)
    assert kernel.released == 0
    (line,) = log()
    assert line.startswith(
        "the runners 'digits' and 'words' of this process have 4 native threads"
    )
    assert "NativePolicy(threads=1)" in line
    del other


def test_runners_of_one_thread_each(kernel: Kernel, log: Log) -> None:
    """Native threads of other kinds that carry the runners' names make their pools no larger."""
    other = ForeignPools("words", Usage(), threads=1)
    kernel.pools.threads = 1
    kernel.ours["words"] = {301, 302}
    kernel.call(1000, switches=500)
    assert log() == []
    del other


def test_runners_that_have_gone(kernel: Kernel) -> None:
    """A runner that is no more is forgotten."""
    other = ForeignPools("words", Usage(), threads=2)
    assert len(_foreign_pools._watched) == 2
    del other
    assert len(_foreign_pools._watched) == 1


def test_runners_that_fit(kernel: Kernel, log: Log) -> None:
    """A second runner that has no native threads is no matter."""
    other = ForeignPools("words", Usage(), threads=2)
    kernel.ours["words"] = set()
    kernel.stray()
    kernel.call(4)
    assert kernel.usage.pools_returned == 1
    assert len(log()) == 1
    del other


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
import json, logging, pickle, resource, sys, threading
from statistics import median
import anyio
from sklearn.datasets import load_digits
from sklearn.ensemble import HistGradientBoostingClassifier
from asgi_infer import InferenceRunner

DIGITS, LABELS = load_digits(return_X_y=True)
trained = pickle.dumps(HistGradientBoostingClassifier(max_iter=30).fit(DIGITS, LABELS))
slept, lines = [], []

class Lines(logging.Handler):
    def emit(self, record):
        if "OpenMP" in record.getMessage():  # a busy machine may be worth other lines
            lines.append(record.getMessage())

logging.getLogger("asgi_infer").addHandler(Lines())

def load():
    return pickle.loads(trained)

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
        for _ in range(40):
            stray.predict(DIGITS[:200])
            await runner.run(predict, runner.model)
        await step("strays kept coming")
        worker = await anyio.to_thread.run_sync(lambda: stray.predict(DIGITS[:200]) is not None)
        await step("stray in a worker thread", 30)
    return seen

print(json.dumps({backend: anyio.run(main, backend=backend) for backend in sys.argv[1:]}))
"""

REAL = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(recommended_threads() < 2, reason="one CPU has nothing to wait for"),
]


BACKENDS = ["asyncio", "trio"]


@cache
def measured() -> dict[str, Any]:
    """By backend, and by what went before. One after the other in one process, for the imports
    take longer than the calls."""
    command = [sys.executable, "-c", SCRIPT, *BACKENDS]
    output = subprocess.run(
        command, check=True, timeout=110, capture_output=True, text=True
    ).stdout
    return dict(json.loads(output))


def real(test: Callable[[str], None]) -> Callable[[str], None]:
    """On asyncio and trio, where there is something to see."""
    for mark in (*REAL, pytest.mark.timeout(120)):
        test = mark(test)
    return pytest.mark.parametrize("backend", BACKENDS)(test)


@real
def test_scikit_learn_heals(backend: str) -> None:
    """A stray call on the loop's thread throttles the model; it is well again within 50 calls."""
    healthy = measured()[backend]["healthy"]
    assert (healthy["last"] < 20, healthy["returned"], healthy["lines"]) == (True, 0, [])
    stray = measured()[backend]["stray on the loop's thread"]
    assert stray["first"] > 40
    assert stray["last"] < 20
    assert stray["returned"] == 1
    assert len(stray["lines"]) == 1


@real
def test_scikit_learn_heals_after_many(backend: str) -> None:
    """Also after strays that came between any two calls for a while; hardly anything is logged."""
    seen = measured()[backend]["strays kept coming"]
    assert seen["last"] < 20
    assert 2 <= seen["returned"] <= 12
    assert len(seen["lines"]) <= 3


@real
def test_scikit_learn_on_a_worker_thread(backend: str) -> None:
    """A pool that an endpoint's worker thread owns can't be given back, and that is said."""
    before = measured()[backend]["strays kept coming"]["returned"]
    seen = measured()[backend]["stray in a worker thread"]
    assert seen["last"] > 40
    assert seen["returned"] == before
    (line,) = seen["lines"]
    assert "Threads that there are: " in line
    assert {"asyncio": "AnyIO worker thread", "trio": "Trio thread"}[backend] in line
