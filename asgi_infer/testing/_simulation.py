"""A simulation of the queue: the real scheduler, on a clock that jumps from event to event.

One thread, no sleeping, and the same result each time. What is simulated is the clients, and
that functions take time; who is let in, who runs next and who is dropped is decided by the code
that decides it in production, and calls, batches and streams are run by the code that runs them
there.

Guarantees
    * Events happen in the order of their times, and of their making within one instant.
    * The same requests, options and seed give the same report.
"""

from __future__ import annotations

import heapq
import math
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import Context
from functools import partial
from typing import Any

from .. import _checks
from .._batch import BatchCall, BatchFunction
from .._buffer import StreamBuffer, StreamCall
from .._call import Call, Departure, Work
from .._errors import InferenceError
from .._queue_policy import QueuePolicy
from .._scheduler import Scheduler
from .._slot import Slot
from .._stacking import any_item, as_list, results
from .._statistics import Counters
from ..workers._protocol import Steps
from ._clock import VirtualClock
from ._load import Batching, Request
from ._report import Ending, Outcome, Report
from ._turns import run_turn

_ENDINGS: dict[Departure | None, Ending] = {
    None: "completed",
    Departure.EXPIRED: "expired",
    Departure.SHED: "dropped",
    Departure.CANCELLED: "disconnected",
}


class Simulation:
    """What a runner with these options would do, minutes of it in a fraction of a second.

    ::

        simulation = Simulation(max_queue=64, queue=QueuePolicy(overload="newest"))
        report = simulation.run(poisson(Request(seconds=0.1, timeout=2.0), rate=20, duration=60))
        print(report.goodput, report.latency(0.99))

    :param max_queue: as of ``InferenceRunner``, as are the next two
    :param max_queue_bytes: as of ``InferenceRunner``
    :param queue: as of ``InferenceRunner``
    :param seed: of the jitter in ``Retry-After``
    """

    def __init__(
        self,
        *,
        max_queue: int = 128,
        max_queue_bytes: int | None = None,
        queue: QueuePolicy = QueuePolicy(),
        seed: int = 0,
    ) -> None:
        self._max_queue = _checks.check_count("max_queue", max_queue)
        if max_queue_bytes is not None:
            _checks.check_count("max_queue_bytes", max_queue_bytes)
        self._max_queue_bytes = max_queue_bytes
        self._policy = _checks.check_queue_policy(queue)
        self._seed = seed

    def run(self, requests: Iterable[Request]) -> Report:
        """Serve ``requests``, in the order of their times, until all are over."""
        world = self._world()
        for request in requests:
            world.expect(request)
        state = random.getstate()
        random.seed(self._seed)  # of the module's own generator, which the scheduler asks
        try:
            return world.run()
        finally:
            random.setstate(state)

    def _world(self) -> World:
        return World(self._max_queue, self._max_queue_bytes, self._policy)


class World:
    """One run: the events to come, the clock, and the scheduler with its thread."""

    def __init__(self, max_queue: int, max_bytes: int | None, policy: QueuePolicy) -> None:
        self.clock = VirtualClock()
        self.counters = Counters()
        self.scheduler = _Scheduler(
            max_queue=max_queue,
            max_bytes=max_bytes,
            policy=policy,
            counters=self.counters,
            lock=threading.RLock(),
            clock=self.clock,
        )
        self.scheduler.sleep_in(self)
        self.outcomes: list[Outcome] = []
        self._events: list[tuple[float, int, Callable[[], object]]] = []  # a heap
        self._made = 0
        self._busy = 0.0
        self._functions: dict[Batching, BatchFunction] = {}

    def expect(self, request: Request) -> None:
        """``request`` is going to come."""
        self.at(request.at, Client(self, request).send)

    def at(self, time: float, event: Callable[[], object]) -> None:
        """``event()`` is going to happen."""
        heapq.heappush(self._events, (time, self._made, event))
        self._made += 1

    def run(self) -> Report:
        """Be the inference thread, until nothing is to come."""
        replica = _Replica()
        while (call := self.scheduler.take()) is not None:
            while call is not None:
                call = run_turn(replica, self.scheduler, call)
        return Report(
            outcomes=tuple(self.outcomes),
            duration=max((outcome.ended for outcome in self.outcomes), default=0.0),
            busy=self._busy,
            late=self.counters.late,
            batch_sizes=dict(sorted(self.counters.batch_sizes.items())),
        )

    def next_event(self, until: float) -> bool:
        """Let the next event happen, or ``until`` come if that is first; return which it was."""
        if not self._events or self._events[0][0] > until:
            if until < math.inf:
                self.clock.now = until
            return False
        self.clock.now, _, event = heapq.heappop(self._events)
        event()
        return True

    def spend(self, seconds: float) -> None:
        """A function runs for so long; everything else goes on."""
        self._busy += seconds
        end = self.clock.now + seconds
        while self.next_event(end):
            pass

    def function(self, batching: Batching) -> BatchFunction:
        """The function of all requests with this ``batching``."""
        if batching not in self._functions:

            def serve(clients: list[Client]) -> list[Client]:
                self.spend(batching.fixed + batching.each * len(clients))
                return clients

            self._functions[batching] = BatchFunction(
                serve,
                max_size=batching.max_size,
                max_delay=batching.max_delay,
                key_of=any_item,
                join=as_list,
                split=results,
            )
        return self._functions[batching]


class Client:
    """Who sends a request. For its calls it is the port, the waiter, and the argument.

    :ivar nbytes: what the argument holds
    """

    def __init__(self, world: World, request: Request) -> None:
        self.nbytes = request.size
        self._world = world
        self._request = request
        self._attempts = 0
        self._waiting = False  # for an item of a stream

    def send(self) -> None:
        """Make the call, once more perhaps."""
        world, request = self._world, self._request
        now = world.clock.now
        self._attempts += 1
        self._call = call = self._new_call()
        try:
            world.scheduler.admit(call)
        except InferenceError as error:
            self._refused(error)
            return
        if request.patience is not None:
            world.at(now + request.patience, partial(world.scheduler.disconnect, call))
        if type(call) is StreamCall:
            self._consume(call)
        elif call.deadline is not None:
            world.at(call.deadline, partial(self._expire, call))

    def _new_call(self) -> Call:
        request = self._request
        timeout, priority = request.timeout, request.priority
        deadline = None if timeout is None else self._world.clock.now + timeout
        if request.batching is not None:
            work: Work = (self._world.function(request.batching), (self,))
            return BatchCall(work, Context(), deadline, priority, self, self)
        if not request.items:
            return Call((Client.serve, (self,)), Context(), deadline, priority, self, self)
        return StreamCall(
            (Client.generate, (self,)),
            Context(),
            deadline,
            priority,
            buffer=_Buffer(request.buffer, self._world),
            stall_timeout=request.stall_timeout,
            interleave=request.interleave,
        )

    # -- as the model sees it ------------------------------------------------------------------

    def serve(self) -> None:
        """The function of a plain call."""
        self._world.spend(self._request.seconds)

    def generate(self) -> Iterator[int]:
        """The generator of a stream."""
        for number in range(self._request.items):
            self._world.spend(self._request.seconds)
            yield number

    # -- as a port -----------------------------------------------------------------------------

    def post(self, waiter: Any, /) -> None:
        """The call is over; or, for a stream, something has happened."""
        del waiter
        call = self._call
        if type(call) is not StreamCall:
            self._end()
        elif self._waiting:
            self._waiting = False
            self._world.at(self._world.clock.now, partial(self._consume, call))

    def call_soon_threadsafe(self, func: Callable[[], object], /) -> bool:
        """Nobody asks for that."""
        raise NotImplementedError  # pragma: no cover  # no event loop, and no watch

    def call_later(self, delay: float, func: Callable[[], object], /) -> Callable[[], object]:
        """Nor for that."""
        raise NotImplementedError  # pragma: no cover  # the same

    # -- inside --------------------------------------------------------------------------------

    def _consume(self, call: StreamCall) -> None:
        """Take an item, or wait for one. In the order in which ``Stream`` does it."""
        world = self._world
        if call.departure is None and call.buffer:
            call.buffer.take()
            if call.parked and call.buffer.half_empty:
                world.scheduler.resume(call)
            world.at(world.clock.now + self._request.pause, partial(self._consume, call))
        elif call.over or call.departure is not None:
            self._end()
        else:
            self._waiting = True
            call.buffer.wait_with(self, self)
            if call.deadline is not None:
                world.at(call.deadline, partial(self._stop_waiting, call))

    def _stop_waiting(self, call: StreamCall) -> None:
        if self._waiting:
            self._expire(call)

    def _expire(self, call: Call) -> None:
        if self._world.scheduler.expire(call):
            self.post(None)

    def _end(self) -> None:
        call = self._call
        if call.departure is None:
            call.outcome()  # functions do not fail: an error is one of the simulation
        ending = _ENDINGS[call.departure]
        if ending == "dropped" and isinstance(call.error, InferenceError):
            self._refused(call.error, ending)
        else:
            self._conclude(ending)

    def _refused(self, error: InferenceError, ending: Ending = "refused") -> None:
        after = error.retry_after
        if after is not None and self._attempts <= self._request.retries:
            # Whole seconds, as in the header.
            self._world.at(self._world.clock.now + math.ceil(after), self.send)
        else:
            self._conclude(ending)

    def _conclude(self, ending: Ending) -> None:
        self._world.outcomes.append(
            Outcome(
                request=self._request,
                ending=ending,
                attempts=self._attempts,
                arrived=self._call.arrived,
                started=getattr(self._call, "started", None),
                ended=self._world.clock.now,
            )
        )


# -- in place of what blocks -------------------------------------------------------------------


class _Scheduler(Scheduler):
    """A scheduler whose thread lets events happen where it would sleep."""

    def sleep_in(self, world: World) -> None:
        """Say where events come from. To be called once, before the first call."""
        self._world = world

    def _sleep(self, slot: Slot) -> bool:
        while slot in self._idle and self._world.next_event(slot.look_again):
            pass
        if slot in self._idle and slot.look_again == math.inf:
            self.stop()  # nothing is to come any more
        self._idle.clear()
        slot.wake_up.acquire(timeout=0)
        return True


class _Buffer(StreamBuffer):
    """The items of a stream, whose thread lets events happen where it would wait for room."""

    def __init__(self, size: int, world: World) -> None:
        super().__init__(size)
        self._world = world

    def wait_for_room(self, timeout: float | None) -> bool:
        """Let events happen until half of the buffer is free, or it is closed."""
        limit = math.inf if timeout is None else self._world.clock.now + timeout
        while not self.half_empty and not self._closed:
            if not self._world.next_event(limit):
                break
        return not self.full


class _Replica:
    """Where the simulated model lives."""

    def execute(self, work: Work, context: Context, /) -> Any:
        """Call the function."""
        del context
        func, args = work
        return func(*args)

    def iterate(self, work: Work, context: Context, /) -> Steps:
        """Call the generator function."""
        steps: Steps = self.execute(work, context)
        return steps

    def close(self) -> None:
        """There is no model."""
        raise NotImplementedError  # pragma: no cover  # what has ended need not be closed
