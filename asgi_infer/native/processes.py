"""The other processes of the same server, and the native threads of their models. Linux only."""

from __future__ import annotations

import os
from pathlib import Path

from . import procfs


def siblings() -> set[int]:
    """The ids of the processes that this one's parent has started beside it.

    :raises OSError: not Linux, or a kernel that doesn't tell
    """
    found: set[int] = set()
    for task in Path(f"/proc/{os.getppid()}/task").iterdir():
        found.update(map(int, (task / "children").read_text().split()))
    return found - {os.getpid()}


def threads_named(name: str, pid: int) -> int:
    """How many threads of a process carry ``name``, as all native threads of a model do."""
    ours = procfs.kernel_name(name)
    return sum(each == ours for each in procfs.all_thread_names(pid).values())
