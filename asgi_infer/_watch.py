"""Looks at every call on an inference thread: what it cost, and whether something slows it down.

Each call costs one system call (``getrusage`` for this thread alone, 0.3 µs). Once a second, and
only while calls are made, one of them is looked at more closely: how many CPUs it used, and when
its caller's event loop got to answer.
"""

from __future__ import annotations

import math
import time

from ._call import Call
from ._foreign_pools import SLEEPY, ForeignPools, native_threads
from ._hints import Hints
from ._statistics import Usage, moving_average
from .native import NativePolicy
from .native.procfs import thread_usage

LOOK_EVERY = 1.0
"""Seconds from one close look to the next."""

_PAUSE = 0.001  # seconds after which a loop that has answered is to answer once more
_ANSWER_LIMIT = 10.0  # seconds after which an event loop is taken for gone


class Watch:
    """The watch over one inference thread, and that thread's own.

    :param name: the runner's
    :param native: what its model runs under
    :param usage: where the figures go
    :ivar next_look: when to look at a call more closely; never while one is looked at
    """

    def __init__(self, *, name: str, native: NativePolicy, usage: Usage) -> None:
        self._name = name
        self._usage = usage
        self._pools = ForeignPools(name, usage)
        self._hints = Hints(name, native)
        self._switches = 0
        self._faults = 0
        self._look: Look | None = None  # at the call that runs, or waiting for a loop's answer
        self.next_look = 0.0

    def reset(self) -> None:
        """Start counting: what the thread did before, such as sleeping, is no call's."""
        counted = thread_usage()
        self._switches = counted.ru_nvcsw
        self._faults = counted.ru_minflt

    def look_at(self, call: Call) -> None:
        """``call`` is about to run: look at it more closely."""
        self.next_look = math.inf
        self._look = Look(call)

    def end(self, call: Call) -> None:
        """``call`` has run; its outcome is not yet known to anybody."""
        counted = thread_usage()
        switches, self._switches = counted.ru_nvcsw - self._switches, counted.ru_nvcsw
        faults, self._faults = counted.ru_minflt - self._faults, counted.ru_minflt
        usage = self._usage
        # As a rule there is nothing to count: that costs no more than these questions.
        if switches or usage.switches_per_call:
            usage.switches_per_call = _faded(usage.switches_per_call, switches)
        if faults or usage.faults_per_call:
            usage.faults_per_call = _faded(usage.faults_per_call, faults)
        if switches >= SLEEPY or self._pools.alert:
            self._pools.note(call, switches)
        if self._look is not None:
            self._continue(self._look, call, faults)

    def _continue(self, look: Look, call: Call, faults: int) -> None:
        if look.started == call.started:
            look.end(call, faults)
        # The loop's answer may come only now that the call has ended: then this waits for the
        # end of another.
        if look.answered or time.monotonic() - look.started > _ANSWER_LIMIT:
            self._look = None
            self.next_look = time.monotonic() + LOOK_EVERY
            self._evaluate(look)

    def _evaluate(self, look: Look) -> None:
        usage = self._usage
        usage.cores_used = moving_average(usage.cores_used, look.cores_used)
        _, foreign = native_threads(self._name)
        usage.foreign_threads = len(foreign)
        if look.lag is not None:
            usage.loop_lag = moving_average(usage.loop_lag, look.lag)
        self._hints.consider(look)


def _faded(average: float, count: int) -> float:
    """The moving average with one count more; what is left of old ones is nothing in the end."""
    faded = average + 0.125 * (count - average)
    return faded if faded > 0.001 else 0.0


class Look:
    """A close look at one call, of which it keeps nothing alive.

    :ivar started: when the call began, on the clock of ``time.monotonic()``
    :ivar answered: whether its caller's event loop has answered, or there is none
    :ivar lag: seconds that the answer took. The loop is asked as the call begins, when it may
        still get the GIL, and again a millisecond later, when a function that holds the GIL has
        it: the later of the two answers counts
    :ivar seconds: that the call ran
    :ivar cores_used: CPUs that the process kept busy meanwhile
    :ivar faults: pages that its thread asked the kernel for
    :ivar func: the name of its function
    """

    def __init__(self, call: Call) -> None:
        self.started = call.started
        self.lag: float | None = None  # written by the loop, before it sets answered
        self.answered = False
        self.seconds = 0.0
        self.cores_used = 0.0
        self.faults = 0
        self.func = ""
        self._cpu = time.process_time()
        self._port = call.port
        self._due = self.started
        if not self._port.call_soon_threadsafe(self._answer):
            self.answered = True

    def end(self, call: Call, faults: int) -> None:
        """The call has run."""
        # More than nothing, whatever the clock's resolution.
        self.seconds = max(1e-9, time.monotonic() - self.started)
        self.cores_used = (time.process_time() - self._cpu) / self.seconds
        self.faults = faults
        self.func = call.name

    def _answer(self) -> None:
        """On the loop, as soon as it gets to it."""
        now = time.monotonic()
        self.lag = now - self._due
        self._due = now + _PAUSE
        self._port.call_later(_PAUSE, self._answer_again)

    def _answer_again(self) -> None:
        self.lag = max(self.lag or 0.0, time.monotonic() - self._due)
        self.answered = True
