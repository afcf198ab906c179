"""The one thread that owns a model, from before it is loaded until after it is gone.

A worker with several replicas has a thread for each, and all take calls from one queue.

Guarantees
    * A replica is opened, used and closed on its thread and no other.
    * Nothing that a call does ends the thread: whatever it raises becomes the call's outcome.
    * While the thread sleeps it keeps no call, argument or result alive.
    * A replica that is lost is opened again before its thread takes the next call.

Assumptions
    * ``start`` is called once.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
import logging
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial

from ._batch import BatchCall
from ._buffer import StreamCall
from ._call import Call, Port, here
from ._errors import Draining, NotReady, describe
from ._execute import as_error, run_batch, run_call, step_stream
from ._refusals import retry_after, stopped
from ._restarts import Restarts
from ._scheduler import Scheduler
from ._slot import Slot
from ._statistics import Usage
from ._watch import Watch
from .workers._protocol import ModelSpec, Replica, Worker

logger = logging.getLogger("asgi_infer")


class InferenceThread:
    """A worker's threads and their scheduler: alive from ``start`` until ``done``.

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
        self._local = worker.local
        self._previous = previous
        self._replicas = [worker.replica(spec, slot.number) for slot in scheduler.slots]
        self._stopping = False  # only ever set; by whoever stops the thread
        self._usage = usage
        self._home = home
        self._lock = threading.Lock()  # guards these four:
        self._failed = False  # one of the replicas did not load
        self._loading = len(self._replicas)
        self._alive = len(self._replicas)
        self._opening: list[Replica] = []  # those that load their models now
        self._threads = [
            threading.Thread(target=self._main, args=each, name=spec.name, daemon=True)
            for each in zip(scheduler.slots, self._replicas, strict=True)
        ]

    def start(self) -> None:
        """Start the threads. They load the model and then serve the scheduler's calls.

        :raises RuntimeError: the system, or an interpreter that is ending, starts no threads. If
            it has started some of them, these end, and ``ready`` has the error
        """
        for number, thread in enumerate(self._threads):
            try:
                thread.start()
            except RuntimeError as error:
                for replica in self._replicas[number:]:
                    self._close(replica)
                if number == 0:
                    raise
                self._fail(NotReady(f"no thread for its replica {number}: {error}"))
                for _ in self._threads[number:]:
                    self._ended()
                return

    @property
    def state(self) -> str:
        """``loading``, ``ready``, ``broken``, ``draining``, ``closed`` or ``failed``."""
        if self.ready.done() and self.ready.exception() is not None:
            return "failed"
        if self.done.done():
            return "closed"
        if self._stopping:
            return "draining"
        if self.scheduler.broken:
            return "broken"
        return "ready" if self.ready.done() else "loading"

    @property
    def schedulers(self) -> list[Scheduler]:
        """Its scheduler, and before it those of earlier threads that have not ended yet."""
        previous = self._previous
        return [self.scheduler] if previous is None else [*previous.schedulers, self.scheduler]

    def runs(self, current: Callable[[], object]) -> bool:
        """Whether ``here.current_call`` is that of one of its threads, or of an earlier one's."""
        slots = [slot for scheduler in self.schedulers for slot in scheduler.slots]
        return any(current == slot.current for slot in slots)

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
        # Nobody waits for a model that loads: it would only be destroyed again.
        with self._lock:
            opening = [] if self.scheduler.queued else [*self._opening]
        for replica in opening:
            replica.interrupt()

    def stop_now(self) -> None:
        """Send every caller away, and end with the call that runs, sooner if it can be ended."""
        self.stop_soon()
        self.scheduler.drop_queued(stopped)
        name = self.scheduler.abandon_running(stopped)
        if name is not None:
            logger.warning("the runner %r stopped while %s was running", self._spec.name, name)
        for replica in self._replicas:
            replica.interrupt()

    def give_up_on(self, calls: list[Call]) -> bool:
        """Send the callers of ``calls`` away; if every thread is stuck in one of them, stop.

        :returns: whether that is so
        """
        stuck = all(slot.current() in calls for slot in self.scheduler.slots)
        if stuck:
            self.stop_now()
        else:
            self.scheduler.send_away(calls, stopped)
        return stuck

    def leave_behind(self) -> None:
        """In a forked child, where this thread does not exist: let nobody wait for it."""
        for replica in self._replicas:
            replica.leave_behind()
        message = "this call belongs to the parent process"
        for call in self.scheduler.leave_behind(lambda _: Draining(message)):
            if isinstance(call.waiter, concurrent.futures.Future):
                call.port.post(call.waiter)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end; return whether it came."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                thread.join(left)
        return not any(thread.is_alive() for thread in self._threads)

    def _main(self, slot: Slot, replica: Replica) -> None:
        here.current_call = slot.current
        here.clock = self.scheduler.clock
        # From Python 3.14 on a thread may inherit its starter's context.
        contextvars.Context().run(self._live, slot, replica)

    def _live(self, slot: Slot, replica: Replica) -> None:
        try:
            if self._open(slot, replica):
                self._serve(slot, replica)
        finally:
            self._close(replica)
            self._ended()

    def _ended(self) -> None:
        with self._lock:
            self._alive -= 1
            last = not self._alive
        if last:
            self.done.set_result(None)

    # -- the model -----------------------------------------------------------------------------

    def _open(self, slot: Slot, replica: Replica) -> bool:
        previous = self._previous
        if previous is not None:
            previous.join()
            self._previous = None
        slot.wake_up, slot.notice = replica.wake_up, replica.notice
        try:
            self._open_replica(slot, replica)
        except BaseException as exception:
            self._fail(as_error(exception, (self._spec.load, ())))
            return False
        with self._lock:
            self._loading -= 1
            loaded = not self._loading and not self._failed
        if loaded:
            self.ready.set_result(None)
        return True

    def _fail(self, error: Exception) -> None:
        # What the frames hold may be half a model: it must go, here and now.
        traceback.clear_frames(error.__traceback__)
        with self._lock:
            first, self._failed = not self._failed, True
        if not first:
            return
        message = f"the model of {self._spec.name!r} did not load: {describe(error)}"
        self.scheduler.refuse(lambda again: NotReady(message, retry_after=again))
        self.scheduler.stop()
        for send_away in (self.scheduler.drop_queued, self.scheduler.abandon_running):
            # Those of other replicas, too, which may run calls already.
            send_away(lambda _: NotReady(message, retry_after=retry_after(0.0)))
        for replica in self._replicas:
            replica.interrupt()
        self.ready.set_exception(error)

    def _restore(self, slot: Slot, replica: Replica) -> bool:
        """Open the replica again, which was lost; False if it is time to stop before that."""
        while (call := self.scheduler.take_suspended(slot)) is not None:
            step_stream(replica, self.scheduler, call)  # fails: its generator is gone
        began = time.monotonic()
        while replica.lost:
            delay = replica.restarts.note()
            if replica.restarts.broken:
                self._break(slot, delay, replica.restarts)
            if not self.scheduler.rest(slot, delay):
                return False
            self._load_again(slot, replica)
        replica.restarts.recovered()
        self.scheduler.set_down(slot, down=False)
        seconds = time.monotonic() - began
        logger.warning("the model of %r is there again, after %.3g s", self._spec.name, seconds)
        return True

    def _load_again(self, slot: Slot, replica: Replica) -> None:
        name, restarts = self._spec.name, replica.restarts
        logger.warning(
            "the model of %r is loaded again (crash %d within %g s); %d calls wait",
            name,
            restarts.crashes,
            restarts.policy.within,
            self.scheduler.queued,
        )
        try:
            self._open_replica(slot, replica)
        except BaseException as error:  # whatever it is, it is tried again
            traceback.clear_frames(error.__traceback__)
            if not self._stopping:
                logger.warning("the model of %r did not load again: %s", name, describe(error))

    def _open_replica(self, slot: Slot, replica: Replica) -> None:
        with self._lock:
            self._opening.append(replica)
        try:
            if self._stopping and not self.scheduler.queued:
                replica.interrupt()
            replica.open(partial(self.scheduler.set_down, slot, down=True))
        finally:
            with self._lock:
                self._opening.remove(replica)

    def _break(self, slot: Slot, seconds: float, restarts: Restarts) -> None:
        """``slot`` takes no calls for ``seconds``. If it was the last that did, nobody does."""
        name, until = self._spec.name, self.scheduler.clock() + seconds
        logger.error(
            "the model of %r has crashed %d times within %g s (max_restarts=%d): next try "
            "in %g s, and a 503 for all calls until then, if it has no other replica",
            name,
            restarts.crashes,
            restarts.policy.within,
            restarts.policy.max_restarts,
            seconds,
        )

        def refusal(_: object) -> NotReady:
            left = max(0.0, until - self.scheduler.clock())
            return NotReady(
                f"the model of {name!r} has crashed too often (see the log, and RestartPolicy); "
                f"it is started again {f'in {left:.3g} s' if left else 'now'}",
                retry_after=retry_after(left),
            )

        self.scheduler.set_broken(slot, refusal)

    # -- calls ---------------------------------------------------------------------------------

    def _serve(self, slot: Slot, replica: Replica) -> None:
        try:
            watch = Watch(
                name=self._spec.name,
                native=self._spec.native,
                usage=self._usage,
                home=self._home,
                counted=replica.counted,
                cpu_time=replica.cpu_time,
                local=self._local,
            )
            while self._serve_burst(slot, replica, watch):
                if slot.down and not self._restore(slot, replica):
                    return
        except BaseException:  # no call's: this very loop failed, and nobody may wait for ever
            self.stop_now()
            raise

    def _close(self, replica: Replica) -> None:
        try:
            replica.close()
        except BaseException:
            logger.exception("closing the model of %r failed", self._spec.name)

    def _serve_burst(self, slot: Slot, replica: Replica, watch: Watch) -> bool:
        """Run calls for as long as some are waiting. False when it is time to stop."""
        # In a function of its own: its locals, the call among them, die before the next sleep.
        call = self.scheduler.take(slot)
        if call is None:
            return not slot.over
        watch.reset()
        while call is not None:
            if type(call) is StreamCall:
                call = step_stream(replica, self.scheduler, call)
                watch.reset()  # it may have slept until there was room for an item
                continue
            if call.started >= watch.next_look:
                watch.look_at(call)
            if type(call) is BatchCall:
                run_batch(replica, self.scheduler, call)
                watch.end(call)
                call = self.scheduler.finish_batch(call)
            else:
                value, error = run_call(replica, self.scheduler, call)
                watch.end(call)
                call = self.scheduler.finish(call, value, error)
                del value, error  # the caller's now, and its traceback refers to this frame
            if watch.news is not None:
                watch.attend()
        return True
