"""Which native libraries are loaded, from the process's memory map.

Walking the dynamic loader's list instead can dead-lock when two Python threads do it at once.
"""

from __future__ import annotations

import re
from pathlib import Path

MAPS = Path("/proc/self/maps")

_PATH = re.compile("/.*")  # what comes before it in a line has no slash


def mapped_files(pattern: re.Pattern[str], maps: Path = MAPS) -> dict[str, re.Match[str]]:
    """The mapped files whose path ``pattern`` is found in, with the match; none off Linux."""
    try:
        text = maps.read_text(errors="surrogateescape")  # a file's name need not be text
    except OSError:
        return {}
    found = {}
    # A library has several lines, and a program like this a thousand: each path is looked at once.
    for path in dict.fromkeys(_PATH.findall(text)):
        match = pattern.search(path)
        if match:
            # The loader knows a file that was deleted or replaced since by its name of then.
            found[path.removesuffix(" (deleted)")] = match
    return found
