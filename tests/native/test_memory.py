"""Keeping freed memory, measured in page faults."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from asgi_infer.native import memory

# Sets malloc for a whole process, hence in one of its own. Prints, for each size of block, the
# page faults of a round of taking, filling and freeing some blocks of it: before and after.
FAULTS = """
import ctypes, json, resource, sys, threading
from asgi_infer.native.memory import retain_memory

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
SIZES = [int(size) for size in sys.argv[2:]]

def round_of(size):
    blocks = [libc.malloc(size) for _ in range(2)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)

def faults(size):
    for _ in range(2):
        round_of(size)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    round_of(size)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

def measure():
    usual = [faults(size) for size in SIZES]
    print(json.dumps([usual, retain_memory(), [faults(size) for size in SIZES]]))

if sys.argv[1] == "main":
    measure()
else:
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
"""
KIB, MIB = 2**10, 2**20


def is_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


glibc = pytest.mark.skipif(not is_glibc(), reason="mallopt is glibc's")


def measured(thread: str, *sizes: int, env: dict[str, str] | None = None) -> Any:
    """The faults of each size as usual, whether retaining took effect, and the faults then."""
    command = [sys.executable, "-c", FAULTS, thread, *map(str, sizes)]
    result = subprocess.run(
        command, check=True, timeout=30, capture_output=True, text=True, env=env
    )
    return json.loads(result.stdout)


@glibc
@pytest.mark.parametrize(
    ("thread", "sizes"),
    [
        ("main", [256 * KIB, MIB, 8 * MIB, 32 * MIB, 100 * MIB]),
        ("other", [256 * KIB, MIB, 8 * MIB, 32 * MIB, 48 * MIB]),
    ],
)
def test_no_page_faults_any_more(thread: str, sizes: list[int]) -> None:
    """Blocks freed and taken again cost a page fault for each of their pages, and then none; on
    the main thread and on others, also beyond the 32 MiB that glibc would map at least."""
    usual, effective, retained = measured(thread, *sizes)
    assert effective
    assert max(usual) > 4 * 8 * MIB / 4096
    assert max(retained) < 20


@glibc
def test_what_is_not_kept() -> None:
    """On other threads than the main one, a block that no heap can hold is not kept."""
    _, effective, retained = measured("other", 72 * MIB)
    assert effective
    assert retained[0] > 72 * MIB / 4096


JEMALLOC = next(iter(Path("/usr/lib").glob("*/libjemalloc.so.2")), None)


@pytest.mark.skipif(JEMALLOC is None, reason="jemalloc is not installed")
def test_jemalloc() -> None:
    """In a program that was started with jemalloc, glibc's settings are not said to work."""
    _, effective, _ = measured("main", KIB, env={**os.environ, "LD_PRELOAD": str(JEMALLOC)})
    assert not effective


def test_options(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What is set are the thresholds beyond which glibc gives memory back; nothing is logged."""
    options: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        options[option] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert memory.retain_memory()
    assert options.keys() == {-1, -2, -4}  # trim threshold, top pad, number of mappings
    assert caplog.records == []


def refuse(option: int, value: int) -> int:
    del option, value
    return 0


def no_library(name: object) -> Any:
    raise OSError(name)


@pytest.mark.parametrize(
    "library",
    [
        lambda name: SimpleNamespace(mallopt=refuse),
        lambda name: SimpleNamespace(),
        no_library,
        lambda name: SimpleNamespace(mallopt=lambda option, value: 1, mallctl=None),
    ],
    ids=["refuses", "without mallopt", "no library", "jemalloc"],
)
def test_other_allocator(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    library: Callable[[object], Any],
) -> None:
    """Under another allocator nothing happens, and one line says so."""
    monkeypatch.setattr(ctypes, "CDLL", library)
    with caplog.at_level(logging.WARNING, "asgi_infer"):
        assert not memory.retain_memory()
    assert [record.message for record in caplog.records] == [
        "retain_memory has no effect here: the allocator is not glibc's malloc"
    ]
