"""Which native libraries are loaded, from the process's memory map.

Walking the dynamic loader's list instead can dead-lock when two Python threads do it at once.
"""

from __future__ import annotations

import re
from pathlib import Path

MAPS = Path("/proc/self/maps")


def mapped_files(pattern: re.Pattern[str], maps: Path = MAPS) -> dict[str, re.Match[str]]:
    """The mapped files whose path ``pattern`` is found in, with the match; none off Linux."""
    try:
        text = maps.read_text(errors="surrogateescape")  # a file's name need not be text
    except OSError:
        return {}
    found = {}
    for line in text.splitlines():
        match = pattern.search(line)
        if match:
            # The loader knows a file that was deleted or replaced since by its name of then.
            found[line[line.index("/") :].removesuffix(" (deleted)")] = match
    return found
