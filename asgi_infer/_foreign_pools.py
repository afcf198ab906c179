"""Notices that a second OpenMP pool throttles the model, and has it given back.

GNU OpenMP keeps a pool for each thread that ever started a parallel region, and once all pools
together have more threads than there are CPUs, every barrier in the process sleeps instead of
spinning. One native call on the event loop's thread is enough, and the model is slow from then
on. There are two signs of it, and it takes both: the inference thread goes to sleep again and
again in each call, and there are native threads, not the model's, that were not there while calls
were well.

A look for those threads reads ``/proc``, so that it takes several such calls in a row. Where stray
calls keep coming, their pool is given back now and then, and not for each of them.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress

from ._call import Port
from ._statistics import Usage
from .native import cpu, openmp, procfs

logger = logging.getLogger("asgi_infer")

SLEEPY = 20
"""Voluntary context switches of a call from which on it may be throttled."""

_PATIENCE = 3  # such calls in a row before anything is done
_MOST_PATIENCE = 24  # however often it happens: when the strays end, the model is soon well again
_CALM = 50  # calls without a sign, after which the patience is as at first
_ANSWER_LIMIT = 1.0  # seconds for loops to answer in; one may stand still, or be closed

# All of this process. Appended to by each inference thread, removed from by the collector; whoever
# looks through it takes a copy first, which is atomic.
_watched: list[weakref.ref[ForeignPools]] = []


def native_threads(name: str) -> tuple[set[int], set[int]]:
    """The threads that Python did not start: those that carry ``name``, and the others.

    :param name: the runner's, which all native threads of its model inherit
    """
    # Before and after: a thread of Python's may start, or end, in between.
    python = _python_threads()
    try:
        ids = procfs.thread_ids() - python - _python_threads()
    except OSError:  # not Linux, or no descriptor left to read it with
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

    :param name: the runner's
    :param usage: where it is noted what was found and done
    :param threads: how many native threads a parallel region of the model's has at the most
    :param home: the event loop that the runner was started on, if there was one
    :ivar alert: whether calls without a sign of throttling are of interest as well
    """

    def __init__(self, name: str, usage: Usage, *, threads: int, home: Port | None = None) -> None:
        self.alert = False
        self.name = name
        self.threads = threads
        self._usage = usage
        self._ports: set[weakref.ref[Port]] = set()  # loops to ask
        if home is not None:
            self._ports.add(weakref.ref(home))
        self._harmless: set[int] | None = None  # foreign threads while calls were well
        self._usual_switches = 0.0  # of a call then
        self._candidates: set[int] = set()  # foreign threads at the look before
        self._patience = _PATIENCE
        self._sleepy = 0  # calls in a row that slept a lot
        self._calm = 0  # calls in a row that did not
        self._release: _Release | None = None  # under way, on those loops
        self._in_vain: set[int] = set()  # threads that are no loop's to give back
        _watched.append(weakref.ref(self, _watched.remove))

    def note(self, func: str, port: Port, switches: int) -> None:
        """A call of ``func`` has ended in which the thread went to sleep ``switches`` times."""
        self.alert = True
        if self._release is not None:
            self._conclude(self._release, func, switches)
        elif switches < SLEEPY:
            self._relax()
        else:
            self._calm = 0
            self._sleepy += 1
            self._ports.add(weakref.ref(port))
            if self._sleepy == self._patience - 1:
                _, self._candidates = self._threads()
            elif self._sleepy >= self._patience:
                self._sleepy = 0
                self._patience = min(2 * self._patience, _MOST_PATIENCE)
                self._examine(func, f"{switches} times", *self._threads())

    def look(self, func: str, port: Port) -> None:
        """Now and then: learn what is there while calls are well; find what slows them a little.

        A call of few parallel regions sleeps a few times only, and is slower all the same.
        """
        self._ports.add(weakref.ref(port))
        average = self._usage.switches_per_call
        ours, foreign = self._threads()
        more = self._harmless is not None and average >= 2 * self._usual_switches + 1
        if more and self._release is None:
            self._examine(func, "again and again", ours, foreign)
        elif not self.alert and average < SLEEPY / 4:
            self._harmless = foreign
            self._usual_switches = average
        self._candidates = foreign

    def _threads(self) -> tuple[set[int], set[int]]:
        ours, foreign = native_threads(self.name)
        self._usage.foreign_threads = len(foreign)
        return ours, foreign

    def _examine(self, func: str, slept: str, ours: set[int], foreign: set[int]) -> None:
        """Calls slept: if that may be because of a pool of a loop's thread, have it given back."""
        self._in_vain &= foreign  # the kernel gives ids anew
        if not ours:  # nothing of the model's to throttle
            return
        # Those that were there before, too: a thread that has only just started, or is about to
        # end, may be one of Python's.
        suspects = (foreign & self._candidates) - self._in_vain
        libgomp = any(runtime.family == "libgomp" for runtime in openmp.loaded_runtimes())
        if libgomp and not self._report_runners() and suspects:
            self.alert = True
            ports = [port for each in self._ports if (port := each()) is not None]
            self._ports = set(map(weakref.ref, ports))
            self._release = _Release(foreign, suspects, ports, slept)

    def _relax(self) -> None:
        self._sleepy = 0
        self._calm += 1
        if self._calm >= _CALM:
            self._patience = _PATIENCE
            self.alert = False

    def _conclude(self, release: _Release, func: str, switches: int) -> None:
        """See what has come of it, as soon as all loops have answered."""
        if not release.over:
            return
        self._release = None
        self._calm = 0
        if release.gone:
            self._usage.pools_returned += 1
            self._report_returned(func, release.slept)
        elif release.answered:
            self._in_vain |= release.suspects
            # Who has slept from the first call on, or has nobody new beside it, may have reasons
            # of its own.
            new = self._harmless is not None and release.suspects - self._harmless
            if new and switches >= SLEEPY:
                self._report_kept(func, switches)

    def _report_returned(self, func: str, slept: str) -> None:
        count = self._usage.pools_returned
        if count & (count - 1):  # neither the 1st time nor the 2nd, 4th, 8th ...
            return
        logger.warning(
            "%s went to sleep %s in a call, as OpenMP does when there is a second pool. A native "
            "call on the event loop's thread had made one; it has been given back (%d so far). "
            "Make that call with runner.run(), too: native calls belong on the model's thread",
            func,
            slept,
            count,
        )

    def _report_kept(self, func: str, switches: int) -> None:
        if self._usage.say_once("kept"):
            others = {thread.name for thread in threading.enumerate()} - {self.name}
            logger.warning(
                "%s goes to sleep %d times in a call, and did not before: another thread seems "
                "to have made a second OpenMP pool. It belongs to none of the event loops that "
                "call this runner, so that it can't be given back from here. Look for native "
                "calls in 'def' endpoints and threads, and make them with runner.run(). Threads "
                "that there are: %s",
                func,
                switches,
                ", ".join(sorted(others)),
            )

    def pool_size(self) -> int:
        """How many threads the model's OpenMP pool has, of all that carry the runner's name."""
        return min(self.threads, len(native_threads(self.name)[0]) + 1)

    def _report_runners(self) -> bool:
        """Whether runners of this process throttle each other; giving back does not help then."""
        runners = [runner for each in tuple(_watched) if (runner := each()) is not None]
        pools = {procfs.kernel_name(each.name): each.pool_size() for each in runners}
        busy = {name: count for name, count in pools.items() if count > 1}
        cpus = len(cpu.IMPORT_AFFINITY)
        if len(busy) < 2 or sum(busy.values()) <= cpus:
            return False
        if self._usage.say_once("runners"):
            logger.warning(
                "the runners %s of this process have %d native threads together, on %d CPUs: "
                "their OpenMP pools slow each other down. Set NativePolicy(threads=%d) for each, "
                "or let one runner own all models",
                " and ".join(sorted(map(repr, busy))),
                sum(busy.values()),
                cpus,
                max(1, cpus // len(busy)),
            )
        return True


class _Release:
    """A request to some event loops to give back the pools of their threads.

    :param foreign: the threads that are not the model's
    :param suspects: those of them that have been there for a while
    :param ports: of the loops
    :param slept: how often the model went to sleep in a call
    :ivar gone: the foreign threads that went with it
    """

    def __init__(
        self, foreign: set[int], suspects: set[int], ports: Iterable[Port], slept: str
    ) -> None:
        self.suspects = suspects
        self.slept = slept
        self._foreign = foreign
        self.gone: set[int] = set()  # updated by each loop, before it counts as answered
        self._since = time.monotonic()
        self._answers: list[None] = []  # appended to by each loop
        self._asked = sum(port.call_soon_threadsafe(self._run) for port in ports)

    @property
    def answered(self) -> bool:
        """Whether every loop that has not ended has answered."""
        return len(self._answers) >= self._asked

    @property
    def over(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.answered or time.monotonic() - self._since > _ANSWER_LIMIT

    def _run(self) -> None:
        """On a loop. Whatever fails here must not end the loop, as it would with trio.

        It is no answer, either: nothing is known then.
        """
        with suppress(Exception):
            before = self._foreign & procfs.thread_ids()
            openmp.release_pools()
            # The threads of a pool have ended when it has been given back.
            self.gone |= before - procfs.thread_ids()
            self._answers.append(None)


def _python_threads() -> set[int | None]:
    return {thread.native_id for thread in threading.enumerate()}
