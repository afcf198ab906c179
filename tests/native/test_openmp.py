"""The OpenMP runtimes of a process, seen and handled from any thread."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import threadpoolctl  # type: ignore[import-untyped]  # it has none

from asgi_infer.native import openmp, procfs
from asgi_infer.native.openmp import OpenMPRuntime, limit_threads, loaded_runtimes, release_pools

from ..threads import on_new_thread
from . import gomp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")

LINE = "7f3654c42000-7f3654c82000 r-xp 00001000 fd:01 4711                       {path}\n"


def maps_with(tmp_path: Path, *paths: object) -> Path:
    maps = tmp_path / "maps"
    maps.write_text("".join(LINE.format(path=path) for path in paths))
    return maps


# -- finding them ------------------------------------------------------------------------------


def test_finds_what_threadpoolctl_finds() -> None:
    """The runtimes found are those that another tool finds in its own way."""
    gomp.load()
    known = {each["filepath"] for each in threadpoolctl.threadpool_info() if "openmp" in str(each)}
    assert {str(Path(each.path).resolve()) for each in loaded_runtimes()} == known


def test_each_copy_once(tmp_path: Path) -> None:
    """A library has many lines in the memory map, and is one runtime."""
    path = gomp.load().path
    maps = maps_with(tmp_path, path, "[heap]", path, "/usr/lib/libc.so.6", path)
    (runtime,) = loaded_runtimes(maps)
    assert (runtime.path, runtime.family) == (path, "libgomp")
    assert repr(runtime) == f"OpenMPRuntime({path!r})"


@pytest.mark.parametrize(
    "name",
    ["libgomp.so.1", "libgomp-a34b3233.so.1.0.0", "libiomp5.so", "libomp-14.so.5", "libomp.so"],
)
def test_names_of_runtimes(tmp_path: Path, name: str) -> None:
    """The names that distributions and wheels give the three runtimes are all known."""
    match = openmp._RUNTIME.search(LINE.format(path=tmp_path / "a b" / name).rstrip())
    assert match is not None
    assert name.startswith(match.group(1))


@pytest.mark.parametrize(
    "path", ["/usr/lib/libgompertz.txt", "/libgomp.so.1/data", "/x/mylibomp.so", "[vdso]"]
)
def test_other_files_are_no_runtimes(tmp_path: Path, path: str) -> None:
    """A file with such a name somewhere in its path is not taken for a runtime."""
    assert loaded_runtimes(maps_with(tmp_path, path)) == []


def test_never_loads_one(tmp_path: Path) -> None:
    """A runtime that has gone in between is left out, and not loaded again."""
    absent = tmp_path / "libgomp.so.1"
    shutil.copy(gomp.load().path, absent)
    assert loaded_runtimes(maps_with(tmp_path, absent, gomp.load().path))[0].path != str(absent)
    assert str(absent) not in Path("/proc/self/maps").read_text()


def test_replaced_on_disk(tmp_path: Path) -> None:
    """A runtime whose file was deleted while it was in use, as by an upgrade, is still handled."""
    copy = tmp_path / "libgomp-replaced.so.1"
    shutil.copy(gomp.load().path, copy)
    script = (
        "import ctypes, os, sys; ctypes.CDLL(sys.argv[1]); os.unlink(sys.argv[1])\n"
        "from asgi_infer.native import openmp; (runtime,) = openmp.loaded_runtimes()\n"
        "assert runtime.path == sys.argv[1]; openmp.limit_threads(1); assert runtime.threads == 1"
    )
    subprocess.run([sys.executable, "-c", script, str(copy)], check=True, timeout=30)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A mapped file may have any bytes for a name."""
    maps = tmp_path / "maps"
    maps.write_bytes(LINE.format(path="/data/caf\xe9.npy").encode("latin-1"))
    assert loaded_runtimes(maps) == []


def test_without_proc(tmp_path: Path) -> None:
    """Where there is no memory map to read, there is nothing to control."""
    assert loaded_runtimes(tmp_path / "maps") == []


# -- thread counts -----------------------------------------------------------------------------


def test_threads_are_the_calling_threads_own() -> None:
    """Setting the count changes it on the thread that asks, and on no other."""
    runtime = gomp.load()
    before = runtime.threads

    def set_and_get() -> int:
        runtime.set_threads(before + 7)
        return runtime.threads

    assert on_new_thread(set_and_get) == before + 7
    assert runtime.threads == before


def test_limit_threads() -> None:
    """A limit lowers the count of every runtime, and never raises one that is lower already."""

    def limits() -> list[int]:
        counts = []
        for start, limit in ((8, 3), (2, 3), (3, 3)):
            gomp.load().set_threads(start)
            limit_threads(limit)
            counts.append(gomp.load().threads)
        return counts

    assert on_new_thread(limits) == [3, 2, 3]


def test_threads_of_a_region() -> None:
    """The count that is reported is the number of threads that a region really has."""

    def helpers() -> int:
        gomp.load().set_threads(3)
        return len(gomp.started_by(gomp.run_region, 0))

    assert on_new_thread(helpers) == 2


# -- block time --------------------------------------------------------------------------------


def libiomp5() -> Path | None:
    """Intel's runtime, if its wheel is installed."""
    return next(Path(sys.prefix, "lib").glob("libiomp5.so"), None)


@pytest.mark.skipif(libiomp5() is None, reason="Intel's wheel is for Linux on x86-64")
def test_block_time() -> None:
    """The time that a runtime of LLVM's or Intel's spins for is read and set, in seconds."""
    script = (
        "import ctypes, sys; ctypes.CDLL(sys.argv[1])\n"
        "from asgi_infer.native import openmp; (runtime,) = openmp.loaded_runtimes()\n"
        "print(runtime.family, runtime.block_time)\n"
        "print(runtime.set_block_time(0.05), runtime.block_time, runtime.release_pool())"
    )
    command = [sys.executable, "-c", script, str(libiomp5())]
    environment = {**os.environ, "KMP_BLOCKTIME": "200ms"}
    output = subprocess.run(
        command, check=True, timeout=30, capture_output=True, text=True, env=environment
    ).stdout
    assert output.splitlines() == ["libiomp5 0.2", "True 0.05 False"]


def test_block_time_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runtime counts in milliseconds is seconds here."""
    set_to: list[int] = []
    runtime = OpenMPRuntime(gomp.load().path, "libomp")
    library = SimpleNamespace(
        kmp_get_blocktime=lambda: 200, kmp_set_blocktime=lambda count: set_to.append(count.value)
    )
    monkeypatch.setattr(runtime, "_library", library)
    assert runtime.block_time == 0.2
    assert runtime.set_block_time(0.0256)
    assert set_to == [26]


def test_libgomp_has_no_block_time() -> None:
    """libgomp counts its turns instead of a time."""
    runtime = gomp.load()
    assert runtime.block_time is None
    assert not runtime.set_block_time(0.1)


# -- pools -------------------------------------------------------------------------------------


def test_release_pools() -> None:
    """The calling thread's pool is given back: its native threads end, and come back on demand."""

    def pools() -> None:
        first = gomp.started_by(gomp.run_region, 3)
        assert len(first) == 2
        assert release_pools() >= 1
        gomp.wait_gone(first)
        assert len(gomp.started_by(gomp.run_region, 3)) == 2

    on_new_thread(pools)


def test_release_leaves_other_pools_alone() -> None:
    """Another thread's pool stays as it is."""

    def owner() -> None:
        mine = gomp.started_by(gomp.run_region, 3)
        assert on_new_thread(release_pools) >= 1
        assert mine <= procfs.thread_ids()
        assert gomp.started_by(gomp.run_region, 3) == set()

    on_new_thread(owner)


def test_release_without_a_pool() -> None:
    """Giving back what was never taken does nothing, however often."""

    def twice() -> set[int]:
        return gomp.started_by(release_pools) | gomp.started_by(release_pools)

    assert on_new_thread(twice) == set()


def test_release_is_libgomps_alone() -> None:
    """Other runtimes share one pool among all threads: it is left to them."""
    assert OpenMPRuntime(gomp.load().path, "libgomp").release_pool()
    assert not OpenMPRuntime(gomp.load().path, "libiomp5").release_pool()


def test_release_with_an_old_libgomp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A libgomp of before GCC 9 can't give its pool back, and says so."""
    runtime = OpenMPRuntime(gomp.load().path, "libgomp")
    monkeypatch.setattr(runtime, "_library", object())
    assert not runtime.release_pool()
