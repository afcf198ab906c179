"""Keeping freed memory, measured in page faults."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from asgi_infer.native import memory

# Sets malloc for a whole process, hence in one of its own. What a small network allocates in each
# call: a few large blocks, of 8192 pages in all.
FAULTS = """
import resource, sys
from asgi_infer.native.memory import retain_memory

def faults_of_a_call():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [b"x" * (8 * 2**20) for _ in range(4)]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10

usual = faults_of_a_call()
effective = retain_memory()
faults_of_a_call()
print(effective, usual, faults_of_a_call())
"""


def is_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.mark.skipif(not is_glibc(), reason="mallopt is glibc's")
def test_no_page_faults_any_more() -> None:
    """Large blocks freed and taken again cost thousands of page faults, and then none."""
    command = [sys.executable, "-c", FAULTS]
    result = subprocess.run(command, check=True, timeout=30, capture_output=True, text=True)
    effective, usual, retained = result.stdout.split()
    assert effective == "True"
    assert float(usual) > 2000
    assert float(retained) < 20


def test_options(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What is set are the thresholds beyond which glibc gives memory back; nothing is logged."""
    options: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        options[option] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert memory.retain_memory()
    assert options.keys() == {-1, -2, -3}  # trim threshold, top pad, mmap threshold
    assert caplog.records == []


def refuse(option: int, value: int) -> int:
    del option, value
    return 0


def no_library(name: object) -> Any:
    raise OSError(name)


@pytest.mark.parametrize(
    "library",
    [lambda name: SimpleNamespace(mallopt=refuse), lambda name: SimpleNamespace(), no_library],
    ids=["refuses", "without mallopt", "no library"],
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
