"""A copy of GNU OpenMP, and parallel regions on it, without the library that it belongs to."""

from __future__ import annotations

import ctypes
import importlib.util
import time
from functools import cache
from pathlib import Path

from asgi_infer.native import procfs
from asgi_infer.native.openmp import OpenMPRuntime, loaded_runtimes

from ..gates import LIMIT


@cache
def load() -> OpenMPRuntime:
    """Load the copy that scikit-learn's wheel brings, and not scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    (path,) = (Path(spec.origin).parents[1] / "scikit_learn.libs").glob("libgomp*")
    ctypes.CDLL(str(path))
    (runtime,) = (each for each in loaded_runtimes() if Path(each.path) == path)
    return runtime


def run_region(threads: int) -> None:
    """Run a parallel region that does nothing on ``threads`` threads, the calling one included."""
    load()._library.GOMP_parallel(ctypes.CDLL(None).getpid, None, threads, 0)


def started_by(func: object, *args: object) -> set[int]:
    """The native threads that ``func(*args)`` leaves behind."""
    before = procfs.thread_ids()
    assert callable(func)
    func(*args)
    return procfs.thread_ids() - before


def wait_gone(native_ids: set[int]) -> None:
    """Wait until the kernel has done away with these threads."""
    deadline = time.monotonic() + LIMIT
    while native_ids & procfs.thread_ids():
        assert time.monotonic() < deadline, "native threads live on"
        time.sleep(0.001)
