"""In place of an inference thread: turns are taken by whoever makes a call, or takes an item.

Guarantees
    * One turn at a time, whatever threads make calls.
    * A call has ended when it has been admitted, unless it is a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import Context
from threading import RLock
from typing import Any, cast

from .._buffer import StreamBuffer, StreamCall
from .._call import Call, CallState, Work, here
from .._errors import ReentrantCall
from .._scheduler import Scheduler
from .._thread import InferenceThread
from ..workers._protocol import ModelSpec, Replica, Steps
from ..workers.thread import ThreadReplica, load_model
from ._clock import VirtualClock
from ._faults import Fault, FullQueue
from ._turns import run_turn


class InlineThread(InferenceThread):
    """Has the interface of an inference thread, and takes its turns on the caller's."""

    def prepare(self, fault: Fault, load: Callable[[], object] | None) -> None:
        """Say what goes wrong, and what makes the model. To be called once, before ``start``."""
        self.fault = fault
        self._load = load
        self._turn = RLock()
        self._busy = False  # guarded by _turn
        self._opened: Replica | None = None
        self._replica = InlineReplica(self._spec, load, fault, self.scheduler)
        cast("InlineScheduler", self.scheduler).attach(self)

    @property
    def busy_here(self) -> bool:
        """Whether the current thread is taking turns. Waits for any other that does."""
        with self._turn:
            return self._busy

    def start(self) -> None:
        """Load the model, here and now."""
        with self._turn, self._as_model_thread():
            loaded = Context().run(self._open, self.scheduler.slots[0], self._replica)
        if loaded:
            self._opened = self._replica
        else:
            self.done.set_result(None)

    def stop_soon(self) -> None:
        """Refuse new calls; the model goes as soon as no stream is open."""
        super().stop_soon()
        self.take_turns()

    def join(self, timeout: float | None = None) -> bool:
        """Whether it has ended. There is nobody else to wait for."""
        del timeout
        return self.done.done()

    def take_turns(self) -> None:
        """Run everything that waits."""
        with self._turn:
            if not self._busy and self._opened is not None:
                with self._as_model_thread():
                    self._run(self._opened)

    def _run(self, replica: Replica) -> None:
        scheduler = cast("InlineScheduler", self.scheduler)
        while True:
            call, over = scheduler.poll()
            if over:
                self._opened = None
                replica.close()
                self.done.set_result(None)
                return
            if call is None:
                if not scheduler.nap():
                    return
            elif call.state is CallState.RUNNING:
                while call is not None:
                    call = run_turn(replica, scheduler, call)
            else:
                call.port.post(call.waiter)

    @contextmanager
    def _as_model_thread(self) -> Iterator[None]:
        before = here.current_call, here.clock
        here.current_call, here.clock = self.scheduler.slots[0].current, self.scheduler.clock
        self._busy = True
        try:
            with ExitStack() as stack:
                for context in self._spec.native.contexts:
                    stack.enter_context(context())
                yield
        finally:
            self._busy = False
            here.current_call, here.clock = before


class InlineScheduler(Scheduler):
    """A scheduler whose calls are run as soon as they have been admitted."""

    def __init__(self, *, max_queue: int, **options: Any) -> None:
        super().__init__(max_queue=max_queue, **options)
        self._max_queue = max_queue

    def attach(self, thread: InlineThread) -> None:
        """Say who runs them. To be called once, before the first call."""
        self._thread = thread

    def admit(self, call: Call) -> None:
        """Queue ``call`` and run it, or refuse it."""
        if self._thread.busy_here:
            # By way of another runner: the direct way has been looked at.
            raise ReentrantCall("a call makes a call on its own runner and would wait for itself")
        if type(call) is StreamCall:  # made as they are taken, and nothing is held up by them
            call.buffer = call.port = StreamBuffer(1)
            call.interleave = True
        self._admit(call)
        self._thread.take_turns()

    def _admit(self, call: Call) -> None:
        with self._lock:  # so that nobody else sees what is changed for this call
            before = self._queue, self._refusal
            if self._thread.fault.full:
                self._queue = FullQueue(self._max_queue)
            if self._refusal is None:
                self._refusal = self._thread.fault.refusal
            try:
                super().admit(call)
            finally:
                self._queue, self._refusal = before

    def expire(self, call: Call) -> bool:
        """The caller leaves, if it is too late. Event loops, which ask for it, count real time."""
        too_late = call.deadline is not None and self.clock() >= call.deadline
        return too_late and super().expire(call)

    def nap(self) -> bool:
        """If a batch is held back for more items, let that time pass; return whether it was."""
        if not self.queued:
            return False
        clock = cast("VirtualClock", self.clock)
        clock.now = max(clock.now, self.slots[0].look_again)
        return True

    def resume(self, call: StreamCall) -> None:
        """Room in the buffer of a stream: the next item is made."""
        super().resume(call)
        self._thread.take_turns()


# -- in place of the replica ---------------------------------------------------------------------


class InlineReplica(ThreadReplica):
    """A model on the thread that calls it, of which nothing is set; faults strike there."""

    def __init__(
        self,
        spec: ModelSpec,
        load: Callable[[], object] | None,
        fault: Fault,
        scheduler: Scheduler,
    ) -> None:
        super().__init__(spec)
        self._load = load
        self._fault = fault
        self._scheduler = scheduler

    def open(self, lost: Callable[[], object], /) -> None:
        """Load the model; warm it up if it is the one that the warm-up is for."""
        del lost
        self._stack.callback(self._destroy)
        self._model = None if self._load is None else load_model(self._load)
        if self._spec.warmup is not None and self._load is self._spec.load:
            self._spec.warmup(self._model)

    def execute(self, work: Work, context: Context, /) -> Any:
        """Call the function in its caller's context."""
        with self.turn():
            return super().execute(work, context)

    def iterate(self, work: Work, context: Context, /) -> Steps:
        """Call the generator function; return what steps its generator."""
        return _Steps(super().iterate(work, context), self)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let the faults strike, and send those away whose time is up, as their loops would."""
        self._fault.strike(self._scheduler)
        self._expire()
        try:
            self._fault.check(self._scheduler)
            yield
        finally:
            self._expire()

    def _expire(self) -> None:
        for call in self._scheduler.under_way():
            if self._scheduler.expire(call):
                call.port.post(call.waiter)


class _Steps:
    """A generator of which every step is a turn."""

    def __init__(self, steps: Steps, replica: InlineReplica) -> None:
        self._steps = steps
        self._replica = replica

    def __next__(self) -> Any:
        with self._replica.turn():
            return next(self._steps)

    def close(self) -> None:
        self._steps.close()
