"""Which native libraries are loaded, from the process's memory map.

Walking the dynamic loader's list instead can dead-lock when two Python threads do it at once.
"""

from __future__ import annotations

import re
from pathlib import Path

MAPS = Path("/proc/self/maps")

_STATUS = Path("/proc/self/status")
_PATH = re.compile("/.*")  # what comes before it in a line has no slash
_CODE = re.compile(rb"^VmLib:.*", re.MULTILINE)

# The map's paths, and how much code was mapped just before they were read. Several threads may
# replace it, each as a whole.
_last: tuple[bytes, tuple[str, ...]] | None = None


def mapped_files(pattern: re.Pattern[str], maps: Path = MAPS) -> dict[str, re.Match[str]]:
    """The mapped files whose path ``pattern`` is found in, with the match; none off Linux.

    The map of this process, a thousand lines that the kernel takes milliseconds to write, is read
    again only when the amount of mapped code has changed. To load a library adds its code to that,
    and neither threads nor memory do. (One library that goes and another that comes with as many
    pages of code, all between two looks, would not be noticed.)
    """
    paths = _own_paths() if maps == MAPS else _paths(maps)
    matches = ((path, pattern.search(path)) for path in paths)
    return {path: match for path, match in matches if match}


def _own_paths() -> tuple[str, ...]:
    global _last
    code = _mapped_code()
    last = _last
    if code is not None and last is not None and last[0] == code:
        return last[1]
    # A library that is loaded after `code` was asked for is at worst read twice.
    paths = _paths(MAPS)
    _last = None if code is None else (code, paths)
    return paths


def _mapped_code() -> bytes | None:
    """The size of all code that is mapped beside the program's own; None if nobody says."""
    try:
        match = _CODE.search(_STATUS.read_bytes())
    except OSError:
        return None
    return None if match is None else match[0]


def _paths(maps: Path) -> tuple[str, ...]:
    """Each path once: a library has several lines."""
    try:
        text = maps.read_text(errors="surrogateescape")  # a file's name need not be text
    except OSError:
        return ()
    # The loader knows a file that was deleted or replaced since by its name of then.
    return tuple({path.removesuffix(" (deleted)"): None for path in _PATH.findall(text)})
