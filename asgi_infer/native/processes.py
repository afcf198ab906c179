"""The other processes of the same server, and the native threads of their models. Linux only."""

from __future__ import annotations

import os
from pathlib import Path

from . import procfs

_INIT = 1  # in a container the server itself; elsewhere the parent of all services
_SUPERVISORS = frozenset({"systemd", "init"})


def siblings() -> set[int]:
    """The processes that this one's parent has started beside it to run the same program.

    :raises OSError: not Linux, or a kernel that doesn't tell
    """
    parent, program = os.getppid(), _program(os.getpid())
    if parent == _INIT and _program(_INIT) != program:
        return set()
    found: set[int] = set()
    for task in Path(f"/proc/{parent}/task").iterdir():
        found.update(map(int, (task / "children").read_text().split()))
    return {pid for pid in found - {os.getpid()} if _program(pid) == program}


def server() -> int:
    """The process that all processes of the same server have in common.

    That is the parent, if that runs the same program or, as another user's, doesn't tell what it
    runs; else it is a shell or a supervisor of services, and this process is a server by itself.
    """
    parent, mine = os.getppid(), os.getpid()
    program = _program(parent)
    if program is None:
        return mine if _command(parent) in _SUPERVISORS else parent
    return parent if program == _program(mine) else mine


def start_time(pid: int) -> int:
    """When a process was started, in ticks since the machine was; 0 if nobody tells."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:  # it has ended, or this is not Linux
        return 0
    return int(stat.rpartition(")")[2].split()[19])  # field 22 of proc(5)


def threads_named(name: str, pid: int) -> int:
    """How many threads of a process carry ``name``, as all native threads of a model do."""
    ours = procfs.kernel_name(name)
    return sum(each == ours for each in procfs.all_thread_names(pid).values())


def affinity(pid: int) -> frozenset[int]:
    """The CPUs that a process may run on; none if it has ended."""
    try:
        return frozenset(os.sched_getaffinity(pid))
    except OSError:
        return frozenset()


def _program(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115  # as text: it may be gone
    except OSError:  # it has ended, or is another user's
        return None


def _command(pid: int) -> str:
    try:
        return procfs.thread_name(pid, pid)
    except OSError:  # it has ended
        return ""
