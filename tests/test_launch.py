"""Facts about the environment that a command is launched in: nothing that is set is replaced."""

from __future__ import annotations

import ctypes.util
import sys
from pathlib import Path

import pytest

from asgi_infer._launch import LaunchError, executable, kept, settings
from asgi_infer.native.cpu import CpuBudget

BUDGET = CpuBudget(
    cpus=frozenset(range(4)), cores=4, hybrid=False, quota=None, threads=4, reason=""
)
COUNTS: tuple[str, ...] = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def test_thread_counts() -> None:
    """Every library gets as many threads as the budget says, or as are asked for."""
    assert settings({}, BUDGET) == dict.fromkeys(COUNTS, "4")
    assert settings({}, BUDGET, threads=3) == dict.fromkeys(COUNTS, "3")


def test_what_is_set_stays() -> None:
    """Nothing that the user has set is in what is added, not even if it is empty."""
    added = settings({"OMP_NUM_THREADS": "7", "MKL_NUM_THREADS": ""}, BUDGET, threads=3)
    assert added == {"OPENBLAS_NUM_THREADS": "3"}


@pytest.mark.parametrize(("quota", "added"), [(None, {"KMP_BLOCKTIME": "200"}), (2.0, {})])
def test_spinning(quota: float | None, added: dict[str, str]) -> None:
    """On fast and slow cores libomp is told to spin, but not at the cost of a quota."""
    hybrid = CpuBudget(cpus=BUDGET.cpus, cores=4, hybrid=True, quota=quota, threads=2, reason="")
    assert settings({}, hybrid) == {**dict.fromkeys(COUNTS, "2"), **added}


OURS = {
    "glibc.malloc.arena_max=1",
    "glibc.malloc.trim_threshold=9223372036854775807",
    "glibc.malloc.mmap_max=0",
    "glibc.malloc.top_pad=67108864",
}


def test_memory_is_kept() -> None:
    """The tunables are those of ``retain_memory``, and one heap; the user's own come first."""
    environment: dict[str, str] = dict.fromkeys(COUNTS, "1")
    assert set(settings(environment, BUDGET, retain_memory=True)["GLIBC_TUNABLES"].split(":")) == (
        OURS
    )
    environment["GLIBC_TUNABLES"] = "glibc.malloc.top_pad=1:glibc.malloc.check=3"
    first, second, *rest = settings(environment, BUDGET, retain_memory=True)[
        "GLIBC_TUNABLES"
    ].split(":")
    assert (first, second) == ("glibc.malloc.top_pad=1", "glibc.malloc.check=3")
    assert set(rest) == OURS - {"glibc.malloc.top_pad=67108864"}


def test_memory_is_kept_already() -> None:
    """Where the user has set all of it, nothing is added."""
    environment = {**dict.fromkeys(COUNTS, "1"), "GLIBC_TUNABLES": ":".join(OURS)}
    assert settings(environment, BUDGET, retain_memory=True) == {}


def test_another_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is loaded before all others, where it is found, unless another one is."""
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.2")
    assert settings({}, BUDGET, allocator="jemalloc")["LD_PRELOAD"] == "libjemalloc.so.2"
    assert "LD_PRELOAD" not in settings({"LD_PRELOAD": "x.so"}, BUDGET, allocator="jemalloc")


def test_no_such_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is unknown, not installed, or told what is for another, is refused."""
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(LaunchError, match="one of jemalloc, tcmalloc, mimalloc, not 'malloc'"):
        settings({}, BUDGET, allocator="malloc")
    with pytest.raises(LaunchError, match="jemalloc is not installed: on Debian, apt install lib"):
        settings({}, BUDGET, allocator="jemalloc")
    with pytest.raises(LaunchError, match="leave it or --allocator out"):
        settings({}, BUDGET, allocator="jemalloc", retain_memory=True)


def test_what_was_asked_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set otherwise than asked for is known; by default nothing is asked for."""
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so.2")
    environment = {"OMP_NUM_THREADS": "7", "MKL_NUM_THREADS": "3", "LD_PRELOAD": "x.so"}
    assert kept(environment) == {}
    assert kept(environment, threads=3, allocator="jemalloc") == {
        "OMP_NUM_THREADS": "7",
        "LD_PRELOAD": "x.so",
    }


def test_commands(tmp_path: Path) -> None:
    """A command is found in PATH, or where it is said to be; why it is not is told, with the
    code that shells have for it."""
    assert executable([sys.executable], None) == sys.executable
    with pytest.raises(LaunchError, match="there is no command 'no-such-command'") as missing:
        executable(["no-such-command"], None)
    assert missing.value.code == 127
    (tmp_path / "notes").touch()
    with pytest.raises(LaunchError, match="notes is no program: chmod") as no_program:
        executable(["notes"], str(tmp_path))
    assert no_program.value.code == 126
