"""Notices that a second OpenMP pool throttles the model, and has it given back.

GNU OpenMP keeps a pool for each thread that ever started a parallel region, and once all pools
together have more threads than there are CPUs, every barrier in the process sleeps instead of
spinning. One native call on the event loop's thread is enough, and the model is slow from then
on. The sign is exact: the inference thread goes to sleep hundreds of times in a call, and hardly
ever otherwise.

What follows from it costs about a millisecond (reading ``/proc``, and making a pool anew where
it was given back), so that it takes several such calls in a row, and twice as many each time.
Where stray calls keep coming, their pool is given back now and then, and not for each of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from contextlib import suppress

from ._call import Call, Port
from ._statistics import Usage
from .native import openmp, procfs

logger = logging.getLogger("asgi_infer")

SLEEPY = 20
"""Voluntary context switches of a call from which on it may be throttled."""

_PATIENCE = 3  # such calls in a row before anything is done
_PATIENCE_AFTER_SUCCESS = 24  # at the most: when the strays end, the model is soon well again
_PATIENCE_IN_VAIN = 1536  # at the most: a model may sleep for reasons of its own
_CALM = 10  # times the patience: calls without a sign after which it starts anew


def native_threads(name: str) -> tuple[set[int], set[int]]:
    """The threads that Python did not start: those that carry ``name``, and the others.

    :param name: the runner's, which all native threads of its model inherit
    """
    try:
        ids = procfs.thread_ids() - {thread.native_id for thread in threading.enumerate()}
    except OSError:  # not Linux
        return set(), set()
    kernel_name = procfs.kernel_name(name)
    ours: set[int] = set()
    foreign: set[int] = set()
    for native_id in ids:
        with suppress(OSError):  # it has ended in between
            (ours if procfs.thread_name(native_id) == kernel_name else foreign).add(native_id)
    return ours, foreign


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
        self._told = False  # that a pool can't be given back

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
        ports, self._ports = self._ports, set()
        ours, foreign = native_threads(self._name)
        self._usage.foreign_threads = len(foreign)
        libgomp = any(runtime.family == "libgomp" for runtime in openmp.loaded_runtimes())
        # Without a pool of its own there is nothing of the model's to throttle.
        if ours and foreign and libgomp:
            self._release = _Release(foreign, ports)
        else:
            self._wait_longer(_PATIENCE_IN_VAIN)

    def _relax(self) -> None:
        self._sleepy = 0
        self._calm += 1
        if self._calm >= _CALM * self._patience:
            self._patience = _PATIENCE
            self._ports.clear()
            self.alert = False

    def _wait_longer(self, limit: int) -> None:
        self._patience = min(2 * self._patience, max(self._patience, limit))

    def _conclude(self, release: _Release, call: Call, switches: int) -> None:
        """See what has come of it, once a whole call has run since."""
        if not release.over(call.started):
            return
        self._release = None
        gone = release.foreign - procfs.thread_ids()
        self._usage.foreign_threads -= len(gone)
        if gone:
            self._usage.pools_returned += 1
            self._wait_longer(_PATIENCE_AFTER_SUCCESS)
            self._report_returned(call)
        else:
            self._wait_longer(_PATIENCE_IN_VAIN)
            if switches >= SLEEPY and not self._told:
                self._told = True
                self._report_kept(call, switches)

    def _report_returned(self, call: Call) -> None:
        count = self._usage.pools_returned
        if count & (count - 1):  # neither the 1st time nor the 2nd, 4th, 8th ...
            return
        logger.warning(
            "%s was slowed down by a second OpenMP pool, which a native call on the event loop's "
            "thread had made; it has been given back (%d so far). Make that call with "
            "runner.run(), too: native calls belong on the model's thread",
            call.name,
            count,
        )

    def _report_kept(self, call: Call, switches: int) -> None:
        others = {thread.name for thread in threading.enumerate()} - {self._name}
        logger.warning(
            "%s goes to sleep %d times in a call, as OpenMP does where a second thread uses it: "
            "not the event loop's thread, so that its pool can't be given back from here. Look "
            "for native calls in 'def' endpoints and threads, and make them with runner.run(). "
            "Threads that there are: %s",
            call.name,
            switches,
            ", ".join(sorted(others)),
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
