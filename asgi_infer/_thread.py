"""The one thread that owns a model, from before it is loaded until after it is gone.

Guarantees
    * The worker is opened, used and closed on this thread and no other.
    * Nothing that a call does ends the thread: whatever it raises becomes the call's outcome.
    * While the thread sleeps it keeps no call, argument or result alive.

Assumptions
    * ``start`` is called once.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import ctypes
import logging
import threading
import traceback

from ._batch import BatchCall
from ._buffer import StreamCall
from ._call import Call, Port, here
from ._errors import Draining, NotReady, describe
from ._execute import as_error, run_batch, run_call, step_stream
from ._refusals import retry_after, stopped
from ._scheduler import Scheduler
from ._statistics import Usage
from ._watch import Watch
from .workers._protocol import ModelSpec, OpenWorker, Worker

logger = logging.getLogger("asgi_infer")


class InferenceThread:
    """One OS thread, one worker, one scheduler: alive from ``start`` until ``done``.

    :param usage: what its calls cost is noted there
    :param home: the event loop that starts it, if one does
    :param previous: a thread of the same runner that may still be busy; this one waits for its
        end before it loads, so that there are never two
    """

    def __init__(
        self,
        *,
        spec: ModelSpec,
        worker: Worker,
        scheduler: Scheduler,
        usage: Usage,
        home: Port | None = None,
        previous: InferenceThread | None,
    ) -> None:
        self.scheduler = scheduler
        self.ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.done: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._spec = spec
        self._worker = worker
        self._previous = previous
        self._opened: OpenWorker | None = None  # the thread's own; in a forked child, nobody's
        self._stopping = False  # only ever set; by whoever stops the thread
        self._usage = usage
        self._home = home
        self._thread = threading.Thread(target=self._main, name=spec.name, daemon=True)

    def start(self) -> None:
        """Start the thread. It loads the model and then serves the scheduler's calls.

        :raises RuntimeError: the system, or an interpreter that is ending, starts no threads
        """
        self._thread.start()

    @property
    def state(self) -> str:
        """``loading``, ``ready``, ``draining``, ``closed`` or ``failed``."""
        if self.ready.done() and self.ready.exception() is not None:
            return "failed"
        if self.done.done():
            return "closed"
        if self._stopping:
            return "draining"
        return "ready" if self.ready.done() else "loading"

    @property
    def schedulers(self) -> list[Scheduler]:
        """Its scheduler, and before it those of earlier threads that have not ended yet."""
        previous = self._previous
        return [self.scheduler] if previous is None else [*previous.schedulers, self.scheduler]

    @property
    def over(self) -> bool:
        """Whether it takes no calls any more."""
        return self._stopping or self.state == "failed"

    def stop_soon(self) -> None:
        """Refuse new calls; end once the accepted ones are done."""
        self._stopping = True
        name = self._spec.name
        self.scheduler.refuse(
            lambda again: Draining(
                f"the runner {name!r} has been stopped and takes no calls; start it again with "
                f"'await runner.start()' or 'async with runner'",
                retry_after=again,
            )
        )
        self.scheduler.stop()

    def stop_now(self) -> None:
        """Send every caller away. A running call runs on; the thread ends with it."""
        self.stop_soon()
        self.scheduler.drop_queued(stopped)
        name = self.scheduler.abandon_running(stopped)
        if name is not None:
            logger.warning("the runner %r stopped while %s was running", self._spec.name, name)

    def give_up_on(self, calls: list[Call]) -> bool:
        """Send the callers of ``calls`` away; if the thread is stuck in one of them, stop.

        :returns: whether it is
        """
        stuck = self.scheduler.current() in calls
        if stuck:
            self.stop_now()
        else:
            self.scheduler.send_away(calls, stopped)
        return stuck

    def leave_behind(self) -> None:
        """In a forked child, where this thread does not exist: let nobody wait for it."""
        # Its native threads did not come along: a destructor that joins them would hang.
        leak(self._opened)
        message = "this call belongs to the parent process"
        for call in self.scheduler.leave_behind(lambda _: Draining(message)):
            if isinstance(call.waiter, concurrent.futures.Future):
                call.port.post(call.waiter)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end; return whether it came."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _main(self) -> None:
        here.current_call = self.scheduler.current
        here.clock = self.scheduler.clock
        contextvars.Context().run(self._live)  # from 3.14 on a thread may inherit its starter's

    def _live(self) -> None:
        try:
            worker = self._open()
            if worker is not None:
                self._opened = worker
                self.ready.set_result(None)
                self._serve(worker)
        finally:
            self.done.set_result(None)

    def _open(self) -> OpenWorker | None:
        if self._previous is not None:
            self._previous.join()
            self._previous = None
        try:
            return self._worker.open(self._spec)
        except BaseException as exception:
            self._fail(as_error(exception, (self._spec.load, ())))
            return None

    def _fail(self, error: Exception) -> None:
        # What the frames hold may be half a model: it must go, here and now.
        traceback.clear_frames(error.__traceback__)
        message = f"the model of {self._spec.name!r} did not load: {describe(error)}"
        self.scheduler.refuse(lambda again: NotReady(message, retry_after=again))
        self.scheduler.drop_queued(lambda _: NotReady(message, retry_after=retry_after(0.0)))
        self.ready.set_exception(error)

    def _serve(self, worker: OpenWorker) -> None:
        spec = self._spec
        try:
            watch = Watch(name=spec.name, native=spec.native, usage=self._usage, home=self._home)
            while self._serve_burst(worker, watch):
                pass
        finally:
            self.stop_now()  # no news, unless this very loop failed: nobody may wait for ever
        self._opened = None
        try:
            worker.close()
        except BaseException:
            logger.exception("closing the model of %r failed", self._spec.name)

    def _serve_burst(self, worker: OpenWorker, watch: Watch) -> bool:
        """Run calls for as long as some are waiting. False when it is time to stop."""
        # In a function of its own: its locals, the call among them, die before the next sleep.
        call = self.scheduler.take()
        if call is None:
            return False
        watch.reset()
        while call is not None:
            if type(call) is StreamCall:
                call = step_stream(worker, self.scheduler, call)
                watch.reset()  # it may have slept until there was room for an item
                continue
            if call.started >= watch.next_look:
                watch.look_at(call)
            if type(call) is BatchCall:
                run_batch(worker, self.scheduler, call)
                watch.end(call)
                call = self.scheduler.finish_batch(call)
            else:
                value, error = run_call(worker, self.scheduler, call)
                watch.end(call)
                call = self.scheduler.finish(call, value, error)
                del value, error  # the caller's now, and its traceback refers to this frame
            if watch.news is not None:
                watch.attend()
        return True


def leak(thing: object) -> None:
    """Never destroy ``thing``."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
