"""Event loops to test on, gates, and what holds after every test: nothing leaks, books balance."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import hypothesis
import numpy as np
import psutil
import pytest

import asgi_infer
from asgi_infer import _runner
from asgi_infer._statistics import Counters
from asgi_infer.native import procfs

from .gates import LIMIT, Gate
from .workers import ray_cluster  # noqa: F401  # sets what Ray reads when it is first imported

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "asyncio+uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}

# Threads that stay on purpose: trio's idle workers (they end by themselves after ten seconds),
# the package's single watcher for the end of the main thread, and pytest-timeout's.
LASTING_THREADS = ("Trio thread", "asgi_infer-exit", "pytest_timeout")

ON_LINUX = sys.platform == "linux"

# Whether an example takes long depends on what else the machine does: the suite counts instead.
hypothesis.settings.register_profile("asgi_infer", deadline=None)
hypothesis.settings.load_profile("asgi_infer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The documentation's code comes last: it loads scikit-learn and SciPy into this process, and
    then every start of a runner has twice as many mapped files to look through."""
    items.sort(key=lambda item: item.path.name == "test_docs.py")


# -- coverage ----------------------------------------------------------------------------------
#
# Coverage's tracer doubles what Python takes, the tests' and other packages' code included. So it
# is off where other tests measure the same lines: the share that is required tells if they don't.


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What the package's modules run on import is measured here, and collecting isn't."""
    if _tracer() is not None:
        pytest.register_assert_rewrite("asgi_infer.testing.fixtures")  # as pytest does by itself
        for module in pkgutil.walk_packages(asgi_infer.__path__, "asgi_infer."):
            importlib.import_module(module.name)
        with _runner.InferenceRunner[None]() as runner:  # what the first one does for the process
            runner.submit(int).result()
    with unmeasured():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """On uvloop nothing runs that doesn't run on asyncio's own loop."""
    if item.get_closest_marker("unmeasured") or "asyncio+uvloop" in item.nodeid:
        with unmeasured():
            return (yield)
    return (yield)


@contextmanager
def unmeasured() -> Iterator[None]:
    """Without coverage's tracer, on this thread and on those that are started."""
    tracer, of_threads = _tracer(), threading.gettrace()
    if tracer is None:
        yield
        return
    sys.settrace(None)
    threading.settrace(None)
    try:
        yield
    finally:
        threading.settrace(of_threads)
        sys.settrace(tracer)


def _tracer() -> Any:
    """Coverage's, and no debugger's. With Python 3.14 coverage needs none."""
    tracer = sys.gettrace()
    return tracer if type(tracer).__module__.startswith("coverage") else None


# -- loops -------------------------------------------------------------------------------------


@pytest.fixture(params=BACKENDS.values(), ids=list(BACKENDS))
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Every loop that the package knows. Use with ``pytest.mark.anyio``."""
    return request.param


# -- gates -------------------------------------------------------------------------------------


@pytest.fixture
def make_gate() -> Iterator[Callable[[], Gate]]:
    """Makes gates, all of which are released when the test ends."""
    gates: list[Gate] = []

    def make() -> Gate:
        gates.append(Gate())
        return gates[-1]

    yield make
    for gate in gates:
        gate.release.set()


@pytest.fixture
def gate(make_gate: Callable[[], Gate]) -> Gate:
    """One gate, released when the test ends."""
    return make_gate()


# -- what holds after every test ---------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def warm_up() -> None:
    """Open what libraries open once for a process and never close: libuv's pipe, BLAS's threads.

    Otherwise the first test that needs it would seem to leak it.
    """
    for name, options in BACKENDS.values():
        anyio.run(anyio.sleep, 0, backend=name, backend_options=options)
    _ = np.ones((8, 8)) @ np.ones((8, 8))


@pytest.fixture(autouse=True)
def balanced_books(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The law of conservation, for every runner that the test made and that has ended.

    The books are recorded, and not the runners: those must be free to die.
    """
    books: list[Counters] = []

    def record() -> Counters:
        books.append(Counters())
        return books[-1]

    monkeypatch.setattr(_runner, "Counters", record)
    yield
    _wait_until(lambda: all(map(_balanced, books)), lambda: f"unbalanced: {books}")


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """A test leaves no thread, native thread of a runner, file descriptor or child behind."""
    with nothing_left():
        yield


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fail if something is left behind by what is done in here."""
    before = _resources()
    native_before = _native_ids()

    def left() -> set[str]:
        return _resources() - before | _native_threads(_native_ids() - native_before)

    yield
    _wait_until(lambda: not left(), lambda: f"left: {left()}")


def _balanced(counters: Counters) -> bool:
    c = counters
    ended = c.completed + c.failed + c.cancelled + c.expired + c.rejected
    return c.running == 0 and c.submitted == ended


def _wait_until(condition: Callable[[], bool], complaint: Callable[[], str]) -> None:
    """Threads that are just ending get a moment."""
    deadline = time.monotonic() + LIMIT / 2
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(complaint())
        time.sleep(0.005)


def _resources() -> set[str]:
    return _threads() | _files() | _children()


def _threads() -> set[str]:
    return {
        f"thread {thread.name!r} ({thread.native_id})"
        for thread in threading.enumerate()
        if not _lasts(thread)
    }


def _lasts(thread: threading.Thread) -> bool:
    return thread.name.startswith(LASTING_THREADS)


def _native_ids() -> set[int]:
    return procfs.thread_ids() if ON_LINUX else set()


def _native_threads(native_ids: set[int]) -> set[str]:
    """Those that carry a runner's name. The process's name is on all that started elsewhere, such
    as the threads of OpenBLAS, which stay for good."""
    lasting = {thread.native_id for thread in threading.enumerate() if _lasts(thread)}
    named = {native_id: _name_of(native_id) for native_id in native_ids - lasting}
    usual = {"", _name_of(os.getpid())} if named else set()
    return {
        f"native thread {name!r} ({native_id})"
        for native_id, name in named.items()
        if name not in usual
    }


def _name_of(native_id: int) -> str:
    try:
        return procfs.thread_name(native_id)
    except OSError:  # it has ended in between
        return ""


def _files() -> set[str]:
    if not ON_LINUX:
        return set()
    found = set()
    # Twice for each test: paths that are no strings would take five times as long.
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"file {number}: {os.readlink(f'/proc/self/fd/{number}')}")
        except OSError:  # the descriptor of this very listing
            continue
    return found


def _children() -> set[str]:
    if not _any_children():
        return set()
    return {f"child process {child.pid}" for child in psutil.Process().children()}


def _any_children() -> bool:
    # Asking the kernel costs a microsecond, and looking through all processes milliseconds.
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
