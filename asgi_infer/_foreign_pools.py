"""Notices that a second OpenMP pool throttles the model, and has it given back.

GNU OpenMP keeps a pool for each thread that ever started a parallel region, and once all pools
together have more threads than there are CPUs, every barrier in the process sleeps instead of
spinning. One native call on the event loop's thread is enough, and the model is slow from then
on. The sign is exact: the inference thread goes to sleep hundreds of times in a call, and hardly
ever otherwise.

What follows costs something (a look at ``/proc/self/task``, and a pool that may be missed where
it was), so that it takes several such calls in a row, and twice as many each time: where stray
calls keep coming, their pool would have to be given back for each of them in vain.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress

from ._call import Call, Port
from ._model import name_of
from ._statistics import Usage
from .native import openmp, procfs

logger = logging.getLogger("asgi_infer")

SLEEPY = 20
"""Voluntary context switches of a call from which on it may be throttled."""

_PATIENCE = 3  # such calls in a row before anything is done
_MOST_PATIENCE = 1536
_CALM = 10  # times the patience: calls without a sign after which it starts anew


def foreign_threads(name: str) -> set[int]:
    """The native ids of the threads that are neither Python's nor carry ``name``.

    :param name: the runner's, which all native threads of its model inherit
    """
    try:
        ids = procfs.thread_ids() - {thread.native_id for thread in threading.enumerate()}
    except OSError:  # not Linux
        return set()
    ours = procfs.kernel_name(name)
    foreign = set()
    for native_id in ids:
        with suppress(OSError):  # it has ended in between
            if procfs.thread_name(native_id) != ours:
                foreign.add(native_id)
    return foreign


class ForeignPools:
    """Watches the calls of one inference thread, and is that thread's own.

    :ivar alert: whether calls without a sign of throttling are of interest as well
    """

    def __init__(self, name: str, usage: Usage) -> None:
        self.alert = False
        self._name = name
        self._usage = usage
        self._patience = _PATIENCE
        self._sleepy = 0  # calls in a row that slept a lot
        self._calm = 0  # calls in a row that did not
        self._ports: set[Port] = set()  # the loops that the sleepy ones came from
        self._release: _Release | None = None  # under way, on those loops
        self._said: set[str] = set()

    def note(self, call: Call, switches: int) -> None:
        """A call has ended in which the thread went to sleep ``switches`` times."""
        if self._release is not None:
            self._conclude(self._release, call, switches)
        elif switches >= SLEEPY:
            self._suspect(call)
        else:
            self._relax()

    def _suspect(self, call: Call) -> None:
        self.alert = True
        self._calm = 0
        self._sleepy += 1
        self._ports.add(call.port)
        if self._sleepy < self._patience:
            return
        self._sleepy = 0
        self._patience = min(2 * self._patience, _MOST_PATIENCE)
        ports, self._ports = self._ports, set()
        foreign = foreign_threads(self._name)
        self._usage.foreign_threads = len(foreign)
        if foreign and openmp.loaded_runtimes():
            self._release = _Release(foreign, ports)

    def _relax(self) -> None:
        self._sleepy = 0
        self._calm += 1
        if self._calm >= _CALM * self._patience:
            self._patience = _PATIENCE
            self._ports.clear()
            self.alert = False

    def _conclude(self, release: _Release, call: Call, switches: int) -> None:
        """See what has come of it, once a whole call has run since."""
        if not release.over(call.started):
            return
        self._release = None
        self._calm = 0
        gone = release.foreign - procfs.thread_ids()
        self._usage.foreign_threads -= len(gone)
        if gone:
            self._usage.pools_returned += 1
            self._report_returned(call)
        elif switches >= SLEEPY:
            self._report_kept(call, switches, release.foreign)

    def _report_returned(self, call: Call) -> None:
        count = self._usage.pools_returned
        if count & (count - 1):  # the 1st, 2nd, 4th, 8th ...
            return
        logger.warning(
            "%s was slowed down by a second OpenMP pool, of a native call on the event loop's "
            "thread; the pool has been given back (%d so far). Make that call with "
            "runner.run(), too: every native call belongs on the model's thread",
            _name(call),
            count,
        )

    def _report_kept(self, call: Call, switches: int, foreign: Iterable[int]) -> None:
        if "kept" in self._said:
            return
        self._said.add("kept")
        names = sorted(set(procfs.all_thread_names().get(each, "?") for each in foreign))
        logger.warning(
            "%s went to sleep %d times in a call, as OpenMP does where a second thread uses it "
            "as well: not the event loop's, so that its pool can't be given back from here. "
            "Look for native calls in 'def' endpoints and in threads, and make them with "
            "runner.run(), too (native threads that are not the model's: %d, named %s)",
            _name(call),
            switches,
            len(set(foreign)),
            ", ".join(names),
        )


class _Release:
    """A request to some event loops to give back the pools of their threads.

    :ivar foreign: the threads that are to go with them
    """

    _LIMIT = 10.0  # seconds for loops to answer in; one may stand still, or be closed

    def __init__(self, foreign: set[int], ports: Iterable[Port]) -> None:
        self.foreign = foreign
        self._asked = time.monotonic()
        self._done: list[float] = []  # appended to by each loop
        self._awaited = sum(port.call_soon_threadsafe(self._run) for port in ports)

    def over(self, started: float) -> bool:
        """Whether all loops had answered when something started at that time."""
        if len(self._done) < self._awaited:
            return started - self._asked > self._LIMIT
        return started >= max(self._done, default=self._asked)

    def _run(self) -> None:
        openmp.release_pools()
        self._done.append(time.monotonic())


def _name(call: Call) -> str:
    work = call.work
    return "the call" if work is None else name_of(work[0])
