"""The copies of OpenBLAS in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from asgi_infer.native import openblas
from asgi_infer.native.openblas import OpenBLAS, limit_threads, loaded_libraries

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


@pytest.fixture
def numpys() -> Iterator[OpenBLAS]:
    """NumPy's copy; its number of threads, which is the process's, is put back."""
    folder = str(Path(np.__file__).parents[1])
    found = [each for each in loaded_libraries() if each.path.startswith(f"{folder}/numpy.libs")]
    if not found:
        pytest.skip("this NumPy computes with another library")
    threads = found[0].threads
    yield found[0]
    assert threads is not None
    found[0].set_threads(threads)


def test_numpy_brings_one(numpys: OpenBLAS) -> None:
    """The library in NumPy's wheel is found, whatever its functions are called there."""
    numpys.set_threads(1)
    assert numpys.threads == 1


def test_limit_threads(numpys: OpenBLAS) -> None:
    """A limit lowers the number, and never raises one that is lower already."""
    numpys.set_threads(1)
    limit_threads(2)
    assert numpys.threads == 1
    numpys.set_threads(2)
    limit_threads(1)
    assert numpys.threads == 1


def test_other_names(numpys: OpenBLAS, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy whose functions have names that nobody knows is left alone."""
    monkeypatch.setattr(openblas, "_NAMES", [("my_", "")])
    assert numpys.threads is None
    numpys.set_threads(1)
    limit_threads(1)
    monkeypatch.undo()
    assert numpys.threads is not None


def test_one_that_has_gone(tmp_path: Path) -> None:
    """A library that is mapped but no longer loaded is left out, and not loaded again."""
    maps = tmp_path / "maps"
    line = "7f0000000000-7f0000001000 r-xp 00000000 08:01 1 /gone/{}\n"
    maps.write_text(line.format("libopenblas.so.0") + line.format("openblas.txt"))
    assert loaded_libraries(maps) == []
