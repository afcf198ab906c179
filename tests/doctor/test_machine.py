"""Facts about the machine: what is told of it, and which native thread pools are found."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from asgi_infer.doctor import _machine
from asgi_infer.native import cpu, procfs
from asgi_infer.native.noise import Noise

from ..conftest import ON_LINUX

MAPS = """\
7f00-7f01 r-xp 00000000 08:01 1 /usr/lib/x86_64-linux-gnu/libc.so.6
7f01-7f02 r-xp 00000000 08:01 2 /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0
7f02-7f03 r-xp 00000000 08:01 3 /v/site-packages/numpy.libs/libscipy_openblas64_-f.so
7f03-7f04 r-xp 00000000 08:01 4 /v/site-packages/scikit_learn.libs/libgomp-a3.so.1
7f04-7f05 rw-p 00001000 08:01 4 /v/site-packages/scikit_learn.libs/libgomp-a3.so.1
7f05-7f06 r-xp 00000000 08:01 5 /v/dist-packages/onnxruntime/capi/onnxruntime_pyb.so
7f06-7f07 r-xp 00000000 08:01 6 /home/user/libomp_notes.txt
7f07-7f08 rw-p 00000000 00:00 0
"""


def test_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pool once, with the package that it came with."""
    monkeypatch.setattr(Path, "read_text", lambda self, **options: MAPS)
    assert _machine.runtimes(os.getpid()) == (
        "ONNX Runtime (onnxruntime)",
        "OpenBLAS (numpy)",
        "libgomp (scikit_learn)",
        "libgomp (system)",
    )


def test_no_such_process() -> None:
    """Where there is no memory map, none is found."""
    assert _machine.runtimes(2**30) == ()


@pytest.mark.parametrize("pressure", [0.0, 0.9])
def test_description(pressure: float) -> None:
    """What is known of the machine, and whether it is quiet."""
    machine = _machine.describe(Noise(pressure=pressure, others=0.0, stolen=0.0), ("libgomp",))
    assert machine.noisy == bool(pressure)
    assert machine.pressure == pressure
    assert machine.runtimes == ("libgomp",)
    assert machine.python == platform.python_version()
    assert machine.cpus == len(cpu.budget().cpus)
    assert machine.counted == ON_LINUX


def test_where_threads_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that are all zero there are known to be none."""
    monkeypatch.setattr(procfs, "all_thread_counters", dict)
    assert not _machine.describe(Noise(pressure=0.0, others=0.0, stolen=0.0), ()).counted
