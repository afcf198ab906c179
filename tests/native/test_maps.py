"""The process's memory map is read again only when it can have changed."""

from __future__ import annotations

import _ctypes
import re
import shutil
import sys
import threading
from pathlib import Path

import numpy.random.mtrand
import pytest

from asgi_infer.native import _maps
from asgi_infer.native._maps import mapped_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")

COPY = re.compile(r"/copy-of-a-library\.so$")


class Reads(list[Path]):
    """Which maps were read, in order."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Records the reading of maps, of which none is known yet."""
    reads, read = Reads(), _maps._paths

    def record(maps: Path) -> tuple[str, ...]:
        reads.append(maps)
        return read(maps)

    monkeypatch.setattr(_maps, "_paths", record)
    monkeypatch.setattr(_maps, "_last", None)
    return reads


def test_read_once(reads: Reads) -> None:
    """One reading does for all patterns and all threads, while nothing is loaded."""
    thread = threading.Thread(target=mapped_files, args=[COPY])
    assert mapped_files(re.compile("/libc[.-]"))
    thread.start()
    thread.join()
    assert not mapped_files(COPY)
    assert reads == [_maps.MAPS]


def test_read_after_each_change(reads: Reads, tmp_path: Path) -> None:
    """A library that is loaded is found at once, and one that is unloaded has gone at once."""
    library = shutil.copy(numpy.random.mtrand.__file__, tmp_path / "copy-of-a-library.so")
    assert not mapped_files(COPY)
    loaded = _ctypes.dlopen(str(library), 0)
    assert list(mapped_files(COPY)) == list(mapped_files(COPY)) == [str(library)]
    _ctypes.dlclose(loaded)
    assert not mapped_files(COPY)
    assert len(reads) == 3


@pytest.mark.parametrize("text", [None, "Name:\tpython\n"])
def test_kernel_that_does_not_tell(
    reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    """Where nobody says how much code is mapped, the map is read each time."""
    status = tmp_path / "status"
    if text is not None:
        status.write_text(text)
    monkeypatch.setattr(_maps, "_STATUS", status)
    assert mapped_files(re.compile("/libc[.-]"))
    assert mapped_files(re.compile("/libc[.-]"))
    assert len(reads) == 2


def test_other_processes(reads: Reads, tmp_path: Path) -> None:
    """Another file than the process's own map is read each time."""
    maps = tmp_path / "maps"
    maps.write_text("7f00-7f01 r-xp 0 08:01 1 /lib/copy-of-a-library.so\n")
    assert list(mapped_files(COPY, maps)) == ["/lib/copy-of-a-library.so"]
    maps.write_text("")
    assert not mapped_files(COPY, maps)
    assert reads == [maps, maps]
