"""Looks at every call on an inference thread: what it cost, and whether something slows it down.

Each call costs one system call or two (``getrusage`` for this thread alone), under a microsecond
in all. Once a second, and only while calls are made, one of them is looked at more closely: how
many CPUs it used, and when its caller's event loop got to answer.

Guarantees
    * Nothing in here ends the thread: a watch that fails is given up, and the calls go on.
    * What takes longer than those counters is done when the call has been handed over.
    * No call is kept alive.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress

from ._call import Call, Port
from ._foreign_pools import SLEEPY, ForeignPools
from ._hints import Hints
from ._statistics import Usage, moving_average
from .native import NativePolicy
from .native.procfs import ThreadUsage, thread_usage

logger = logging.getLogger("asgi_infer")

LOOK_EVERY = 1.0
"""Seconds from one close look to the next."""

_PAUSE = 0.001  # seconds after which a loop that has answered is to answer once more
_ANSWER_LIMIT = 10.0  # seconds after which an event loop is taken for gone


class Watch:
    """The watch over one inference thread, and that thread's own.

    :param name: the runner's
    :param native: what its model runs under
    :param usage: where the figures go
    :param home: the event loop that the runner was started on, if there was one
    :param counted: what the system has counted for the thread that runs the model
    :param cpu_time: seconds of CPU that its process has used
    :param local: whether that is this one
    :ivar next_look: when to look at a call more closely; never while one is looked at
    :ivar news: what is left to do about the call that has just ended, if anything
    """

    def __init__(
        self,
        *,
        name: str,
        native: NativePolicy,
        usage: Usage,
        home: Port | None = None,
        counted: Callable[[], ThreadUsage] = thread_usage,
        cpu_time: Callable[[], float] = time.process_time,
        local: bool = True,
    ) -> None:
        self.next_look = 0.0
        self.news: Callable[[], None] | None = None
        self._usage = usage
        self._counted = counted
        self._cpu_time = cpu_time
        self._local = local
        self._pools = ForeignPools(name, usage, threads=native.thread_count, home=home)
        self._hints = Hints(name, native, usage)
        self._switches = 0
        self._faults = 0
        self._given_up = False
        self._look: Look | None = None  # at the call that runs, or waiting for a loop's answer

    def reset(self) -> None:
        """Start counting: what the thread did before, such as sleeping, is no call's."""
        counted = self._counted()
        self._switches = counted.ru_nvcsw
        self._faults = counted.ru_minflt

    def look_at(self, call: Call) -> None:
        """``call`` is about to run: look at it more closely."""
        self.next_look = math.inf
        self._look = Look(call, self._cpu_time)

    def end(self, call: Call) -> None:
        """``call`` has run; its outcome is not yet known to anybody."""
        counted = self._counted()
        switches, self._switches = counted.ru_nvcsw - self._switches, counted.ru_nvcsw
        faults, self._faults = counted.ru_minflt - self._faults, counted.ru_minflt
        usage = self._usage
        # As a rule there is nothing to count: that costs no more than these questions.
        if switches or usage.switches_per_call:
            usage.switches_per_call = _faded(usage.switches_per_call, switches)
        if faults or usage.faults_per_call:
            usage.faults_per_call = _faded(usage.faults_per_call, faults)
        # What else runs in the process of a model elsewhere can't be told from here.
        sign = self._local and (switches >= SLEEPY or self._pools.alert)
        if (sign or self._look is not None) and not self._given_up:
            self.news = self._news(call, switches, faults, sign=sign)

    def attend(self) -> None:
        """The call has been handed over: do what is left to do about it."""
        news, self.news = self.news, None
        try:
            if news is not None:  # pragma: no branch  # who calls this has looked
                news()
        except BaseException as error:
            # A full table of files, a logging handler that fails ...: no reason to stop serving.
            self._give_up(error)
        self.reset()  # nor is what this took any call's

    def _give_up(self, error: BaseException) -> None:
        self.next_look = math.inf
        self._look = None
        self._given_up = True
        with suppress(BaseException):  # it may be the logging that has failed
            logger.warning("calls are no longer watched for what slows them down", exc_info=error)

    def _news(self, call: Call, switches: int, faults: int, *, sign: bool) -> Callable[[], None]:
        """What is left to do, without the call, which would be kept alive by it."""
        func, port, look = call.name, call.port, self._look
        if look is not None and not look.func:  # the first to end is the one looked at
            look.end(func, faults)

        def news() -> None:
            if sign:
                self._pools.note(func, port, switches)
            if look is not None and look.over:
                self._evaluate(look)

        return news

    def _evaluate(self, look: Look) -> None:
        self._look = None
        self.next_look = time.monotonic() + LOOK_EVERY
        usage = self._usage
        usage.cores_used = moving_average(usage.cores_used, look.cores_used)
        if look.lag is not None:
            usage.loop_lag = moving_average(usage.loop_lag, look.lag)
        if self._local:
            self._pools.look(look.func, look.port)
        self._hints.consider(look)


def _faded(average: float, count: int) -> float:
    """The moving average with one count more; what is left of old ones is nothing in the end."""
    faded = average + 0.125 * (count - average)
    return faded if faded > 0.001 else 0.0


class Look:
    """A close look at one call, of which it keeps nothing alive.

    :ivar started: when the call began, on the clock of ``time.monotonic()``
    :ivar port: the way to its caller's event loop
    :ivar answered: whether that has answered, or there is none
    :ivar lag: seconds that the answer took. The loop is asked as the call begins, when it may
        still get the GIL, and again a millisecond later, when a function that holds the GIL has
        it: the later of the two answers counts
    :ivar seconds: that the call ran
    :ivar cores_used: CPUs that the process kept busy meanwhile
    :ivar faults: pages that its thread asked the kernel for
    :ivar func: the name of its function
    """

    def __init__(self, call: Call, cpu_time: Callable[[], float] = time.process_time) -> None:
        # Not call.started: what the thread did for the call before may have come in between.
        self.started = time.monotonic()
        self.port = call.port
        self.lag: float | None = None  # written by the loop, before it sets answered
        self.answered = False
        self.seconds = 0.0
        self.cores_used = 0.0
        self.faults = 0
        self.func = ""
        self._cpu_time = cpu_time
        self._cpu = cpu_time()
        self._due = self.started
        if not self.port.call_soon_threadsafe(self._answer):
            self.answered = True

    def end(self, func: str, faults: int) -> None:
        """The call has run."""
        # More than nothing, whatever the clock's resolution.
        self.seconds = max(1e-9, time.monotonic() - self.started)
        self.cores_used = (self._cpu_time() - self._cpu) / self.seconds
        self.faults = faults
        self.func = func

    @property
    def over(self) -> bool:
        """Whether there is nothing more to wait for.

        The loop's answer may come only when the call has ended: at the end of another, then.
        """
        return self.answered or time.monotonic() - self.started > _ANSWER_LIMIT

    def _answer(self) -> None:
        """On the loop, as soon as it gets to it."""
        now = time.monotonic()
        self.lag = now - self._due
        self._due = now + _PAUSE
        try:
            self.port.call_later(_PAUSE, self._answer_again)
        except RuntimeError:  # a trio run that is about to end
            self.answered = True

    def _answer_again(self) -> None:
        self.lag = max(self.lag or 0.0, time.monotonic() - self._due)
        self.answered = True
