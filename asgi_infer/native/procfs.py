"""What Linux tells, and lets one set, of single threads: counters, names, niceness, CPUs.

Reading one thread's counters takes three small files, about 30 µs; its name takes one, about
10 µs. Elsewhere than on Linux there are no such files: what reads one thread raises ``OSError``,
and what reads all threads finds none.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")

_TASKS = Path("/proc/self/task")
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadCounters:
    """What one native thread has used since it started, and what it runs under."""

    name: str
    """The kernel's: of 15 bytes at most."""
    on_cpu: float
    """Seconds on a CPU."""
    queued: float
    """Seconds in a run queue: ready to run while others had the CPUs."""
    voluntary_switches: int
    """How often it gave up its CPU to wait for something. See ``voluntary_switches()``."""
    involuntary_switches: int
    """How often its CPU was taken away for another thread."""
    minor_faults: int
    """Pages that the kernel had to map in, without reading them from a disk."""
    major_faults: int
    """Pages that were read from a disk."""
    system_time: float
    """Those seconds on a CPU that were spent in the kernel, to the hundredth."""
    niceness: int
    cpus: str
    """The CPUs that it may run on, as the kernel writes them: ``0-3,8``."""


def thread_counters(native_id: int, pid: int | None = None) -> ThreadCounters:
    """The counters of one thread.

    :param pid: of the process that it belongs to; by default this one
    :raises OSError: there is no such thread, or this is not Linux
    """
    task = _tasks(pid) / str(native_id)
    on_cpu, queued, _ = (task / "schedstat").read_text().split()
    status = dict(_status_lines(task))
    # The name is in parentheses, and may hold some itself, and spaces.
    head, _, tail = (task / "stat").read_text(errors="replace").rpartition(")")
    fields = ["", "", *tail.split()]  # numbered from 1, as in proc(5), less one
    return ThreadCounters(
        name=head.partition("(")[2],
        on_cpu=int(on_cpu) / 1e9,
        queued=int(queued) / 1e9,
        voluntary_switches=int(status["voluntary_ctxt_switches"]),
        involuntary_switches=int(status["nonvoluntary_ctxt_switches"]),
        minor_faults=int(fields[9]),
        major_faults=int(fields[11]),
        system_time=int(fields[14]) / _TICKS,
        niceness=int(fields[18]),
        cpus=status["Cpus_allowed_list"],
    )


def all_thread_counters(pid: int | None = None) -> dict[int, ThreadCounters]:
    """The counters of every thread of a process, by native id; those just ending are left out."""
    return _of_each_thread(lambda native_id: thread_counters(native_id, pid), pid)


def all_thread_names(pid: int | None = None) -> dict[int, str]:
    """The kernel's name of every thread of a process, by native id."""
    return _of_each_thread(lambda native_id: thread_name(native_id, pid), pid)


def set_thread_name(name: str) -> None:
    """Name the calling thread for the kernel, as htop and py-spy show it: 15 bytes at most.

    :raises OSError: not on Linux
    """
    (_TASKS / str(threading.get_native_id()) / "comm").write_bytes(kernel_name(name).encode())


def kernel_name(name: str) -> str:
    """As much of ``name`` as the kernel keeps: 15 bytes, and no half character at their end."""
    return name.encode(errors="replace")[:15].decode(errors="ignore")


def thread_name(native_id: int, pid: int | None = None) -> str:
    """The kernel's name for a thread.

    :raises OSError: there is no such thread, or this is not Linux
    """
    return (_tasks(pid) / str(native_id) / "comm").read_text(errors="replace").rstrip("\n")


def thread_ids(pid: int | None = None) -> set[int]:
    """The native ids of all threads of a process, those of native libraries included.

    :raises OSError: there is no such process, or this is not Linux
    """
    return {int(task.name) for task in _tasks(pid).iterdir()}


def voluntary_switches(native_id: int) -> int:
    """How often a thread gave up its CPU to wait for something.

    A thread that computes does not. One that sleeps at every barrier of a parallel region does
    so for each: this is the figure that tells a throttled thread pool from a healthy one.

    :raises OSError: there is no such thread, or this is not Linux
    """
    for key, value in _status_lines(_TASKS / str(native_id)):
        if key == "voluntary_ctxt_switches":
            return int(value)
    raise OSError("the kernel does not count context switches")  # pragma: no cover  # too old


class ThreadUsage(Protocol):
    """What the kernel has counted for one thread: some fields of ``getrusage(2)``."""

    @property
    def ru_nvcsw(self) -> int:
        """Voluntary context switches."""
        ...

    @property
    def ru_minflt(self) -> int:
        """Minor page faults."""
        ...


@dataclass(frozen=True, slots=True)
class _Nothing:
    """Where threads are not counted one by one."""

    ru_nvcsw: int = 0
    ru_minflt: int = 0


def _thread_usage() -> Callable[[], ThreadUsage]:
    if sys.platform != "linux":  # pragma: no cover  # other systems
        return _Nothing
    import resource  # which Windows has not

    return partial(resource.getrusage, resource.RUSAGE_THREAD)


thread_usage: Callable[[], ThreadUsage] = _thread_usage()
"""The counts of the calling thread: one system call, 0.3 µs. Zeros elsewhere than on Linux."""


def _tasks(pid: int | None) -> Path:
    return _TASKS if pid is None else Path(f"/proc/{pid}/task")


def _status_lines(task: Path) -> list[tuple[str, str]]:
    pairs = []
    for line in (task / "status").read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        pairs.append((key, value.strip()))
    return pairs


def _of_each_thread(read: Callable[[int], T], pid: int | None) -> dict[int, T]:
    found = {}
    with suppress(OSError):  # no such process, or not Linux
        for native_id in thread_ids(pid):
            with suppress(OSError):  # it has ended in between
                found[native_id] = read(native_id)
    return found
