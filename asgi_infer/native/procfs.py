"""What Linux tells, and lets one set, of a single thread."""

from __future__ import annotations

import threading
from pathlib import Path

_TASKS = Path("/proc/self/task")


def set_thread_name(name: str) -> None:
    """Name the calling thread for the kernel, as htop and py-spy show it: 15 bytes at most.

    :raises OSError: not on Linux
    """
    # 15 bytes and no half character at their end.
    short = name.encode(errors="replace")[:15].decode(errors="ignore")
    (_TASKS / str(threading.get_native_id()) / "comm").write_bytes(short.encode())


def thread_name(native_id: int) -> str:
    """The kernel's name for a thread of this process.

    :raises OSError: there is no such thread, or this is not Linux
    """
    return (_TASKS / str(native_id) / "comm").read_text(errors="replace").rstrip("\n")


def thread_ids() -> set[int]:
    """The native ids of all threads of this process, those of native libraries included.

    :raises OSError: not on Linux
    """
    return {int(task.name) for task in _TASKS.iterdir()}


def voluntary_switches(native_id: int) -> int:
    """How often a thread gave up its CPU to wait for something.

    A thread that computes does not. One that sleeps at every barrier of a parallel region does
    so for each: this is the figure that tells a throttled thread pool from a healthy one.

    :raises OSError: there is no such thread, or this is not Linux
    """
    for line in (_TASKS / str(native_id) / "status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches:"):
            return int(line.split()[1])
    raise OSError("the kernel does not count context switches")  # pragma: no cover  # too old
