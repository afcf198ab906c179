"""Who may run, and when: admission, the queue, the slots, and the books.

One lock guards it all, so that every snapshot of the books balances. No foreign code runs under
it, and callers are woken outside.

Guarantees
    * ``submitted = completed + failed + cancelled + expired + rejected + queued + running``.
    * A call is taken at most once. Once its caller has left, it is never settled.
    * A slot belongs to its inference thread: a caller who leaves does not free it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress

from . import _refusals
from ._batch import BatchCall, BatchFunction
from ._buffer import StreamCall
from ._call import Call, CallState, Departure
from ._errors import InferenceError
from ._forecast import Forecast
from ._overload import Overload
from ._queue import CallQueue, size_of
from ._queue_policy import QueuePolicy
from ._refusals import ErrorOf, Refusal
from ._slot import Slot
from ._statistics import Counters, moving_average
from ._suspended import Suspended


class Scheduler:
    """The queue in front of the inference threads, from their start to their end.

    :param slots: how many threads take calls from it; each has a slot of its own
    :param max_queue: how many calls may wait
    :param max_bytes: how many bytes their arguments may hold
    :param policy: in what order, and for how long
    :param counters: the runner's books, which outlive this scheduler
    :param lock: guards the counters and everything in here
    :param clock: what deadlines are on
    """

    def __init__(
        self,
        *,
        slots: int = 1,
        max_queue: int,
        max_bytes: int | None = None,
        policy: QueuePolicy = QueuePolicy(),
        counters: Counters,
        lock: threading.RLock,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._lock = lock
        self._ownership = threading.Condition(lock)  # nobody waits there: it knows the owner
        self._policy = policy
        self._counts_bytes = max_bytes is not None
        self._counters = counters  # guarded by _lock
        self.slots = tuple(map(Slot, range(slots)))
        # All of these are guarded by _lock:
        self._queue = CallQueue(max_queue, max_bytes=max_bytes, ageing=policy.ageing)
        self._overload = Overload(policy)
        self._refusal: Refusal | None = None
        self._refuses_for_now = False  # the refusal is one that may be taken back
        self._stopped = False
        # Whose threads sleep, or are about to: whoever takes one out of here releases its latch.
        self._idle: list[Slot] = []
        self._resting: list[Slot] = []  # the same for those that are down
        self._forecast = Forecast()
        self._idle_waiters: list[Future[None]] = []

    # -- for callers ---------------------------------------------------------------------------

    def admit(self, call: Call) -> None:
        """Queue ``call``, or refuse it.

        :raises QueueFull: as much waits already as ``max_queue`` and ``max_queue_bytes`` allow,
            or the queue has stood for too long
        :raises DeadlineExceeded: the call is not going to end in its time
        :raises InferenceError: the runner is stopping, or has no model
        """
        call.arrived = self.clock()
        if self._counts_bytes and call.work is not None:
            call.size = size_of(call.work)
        dropped: list[Call] = []
        refusal: InferenceError | None = None
        with self._lock:
            self._counters.submitted += 1
            # The usual case is settled here; everything that might refuse is looked at apart.
            queue = self._queue
            if (
                call.deadline is not None
                or self._refusal is not None
                or queue.size >= queue.max_size
                or type(call) is StreamCall
                or (self._counts_bytes and queue.too_small_for(call))
            ):
                dropped, refusal = self._examine(call)
            if refusal is None:
                queue.push(call)
                if type(call) is BatchCall:
                    call.function.arrived(call.arrived)
                idle = self._woken() if self._idle else None
            else:
                self._counters.rejected += 1
                idle = None
        if idle is not None:
            idle.wake_up.release()
        if dropped:
            _post(dropped)
        if refusal is not None:
            raise refusal

    def leave(self, call: Call, departure: Departure, error: ErrorOf | None = None) -> bool:
        """The caller stops waiting, and ``error(call)`` is the outcome if there is none yet.

        :returns: whether that was news: False if the call had ended, or its caller left, before
        """
        with self._lock:
            if call.state is CallState.QUEUED:
                self._queue.remove(call)
                self._drop([call], departure, error)
                self._notify_if_idle()
            elif call.state is CallState.RUNNING and call.departure is None:
                call.error = None if error is None else error(call)
                call.departure = departure
                self._counters.late += 1
                if call.slot.notice is not None and call.slot.running is not None:
                    call.slot.notice(call.slot.running)
            else:
                return False
        if type(call) is StreamCall:
            call.buffer.close()
            self.resume(call)  # so that the thread comes and ends it
        return True

    def abandon(self, call: StreamCall) -> None:
        """As ``leave``, for the garbage collector, which may come in the middle of anything.

        So also where this very thread holds the lock, and the queue is half changed.
        """
        try:
            self._ownership.notify()
        except RuntimeError:  # it does not
            self.leave(call, Departure.CANCELLED)
            return
        leave = threading.Thread(target=self.leave, args=(call, Departure.CANCELLED), daemon=True)
        with suppress(RuntimeError):  # no threads any more: the interpreter is about to end
            leave.start()

    def withdraw(self, call: Call) -> bool:
        """Take ``call`` out of the queue if it is still there; a started call is left alone."""
        # Only a queued call can still be taken out, and nothing puts one back: reading the
        # state ahead of the lock can err on one side only, and leave() then looks again.
        return call.state is CallState.QUEUED and self.leave(call, Departure.CANCELLED)

    def expire(self, call: Call) -> bool:
        """The call's deadline has passed: its caller leaves with ``DeadlineExceeded``."""
        return self.leave(call, Departure.EXPIRED, self._deadline_exceeded)

    def disconnect(self, call: Call) -> None:
        """The call's client has gone: its caller is woken with ``ClientDisconnected``."""
        self.send_away([call], _refusals.client_disconnected)

    def resume(self, call: StreamCall) -> None:
        """There is room again in the buffer of a suspended stream."""
        woken: Slot | None = None
        with self._lock:
            # One that still waits, or has ended, is not put aside anywhere.
            if call.state is CallState.RUNNING and call.slot.suspended.resume(call):
                woken = self._woken(call.slot) if call.slot in self._idle else None
        if woken is not None:
            woken.wake_up.release()

    # -- for the inference threads -------------------------------------------------------------

    def take(self, slot: Slot | None = None) -> Call | None:
        """Claim the next call, sleeping until there is one; None when it is time to stop.

        None also if the slot is down, or its latch lets go for a reason of its own;
        ``slot.over`` tells.

        :param slot: the thread's own; by default the first
        """
        slot = slot or self.slots[0]
        while True:
            call, over = self.poll(slot, sleep=True)
            if over:
                return None
            if call is None:
                if slot.down or not self._sleep(slot):
                    return None
            elif call.state is CallState.RUNNING:
                return call
            else:
                call.port.post(call.waiter)
                del call  # while it sleeps, the thread holds no call alive

    def poll(self, slot: Slot | None = None, *, sleep: bool = False) -> tuple[Call | None, bool]:
        """Claim the next call, or take it out of the queue if it is too late to run it.

        :param slot: the thread's own; by default the first
        :param sleep: the thread sleeps if there is none, and is to be woken by the next one
        :returns: the call, and whether there is none and it is time to stop
        """
        slot = slot or self.slots[0]
        another: Slot | None = None
        with self._lock:
            slot.woken = False
            call = self._claim(slot, self.clock())
            if self._idle and self._queue:
                another = self._pass_on(slot)
            if call is None and not slot.down:
                self._notify_if_idle()
                slot.over = self._stopped and not slot.suspended.count
                if sleep and not slot.over:
                    self._idle.append(slot)
        if another is not None:
            another.wake_up.release()
        return call, call is None and slot.over

    def set_down(self, slot: Slot, *, down: bool) -> None:
        """Nothing can run in ``slot`` from now on, or it can again, where a model was lost."""
        with self._lock:
            # Lost twice: it was loaded again in between, for a call that is run once more.
            self._counters.restarts += not down or slot.down
            slot.down = down
            if down:
                return
            slot.broken = False
            if self._refuses_for_now:
                self._refusal = None
                self._refuses_for_now = False
            if self._stopped:
                self._rouse(self._resting)

    def set_broken(self, slot: Slot, error: Callable[[object], InferenceError]) -> None:
        """``slot`` is down for long. If all are, nobody waits for that.

        Those that wait get the error that ``error`` makes, and new calls do until a slot is up
        again, unless they are refused for good.
        """
        dropped: list[Call] = []
        with self._lock:
            slot.broken = True
            if self.broken:
                if self._refusal is None or self._refuses_for_now:
                    self._refusal = error
                    self._refuses_for_now = True
                dropped = self._drop_all(error)
        _post(dropped)

    @property
    def broken(self) -> bool:
        """Whether that is so of all slots. To be read under the lock, or as a hint."""
        return all(slot.broken for slot in self.slots)

    def take_suspended(self, slot: Slot) -> StreamCall | None:
        """One of the streams that have begun in ``slot``, to be ended: it is down."""
        with self._lock:
            for call in slot.suspended.calls():
                slot.suspended.resume(call)
            slot.running = slot.suspended.next() if slot.suspended.count else None
            return slot.running

    def rest(self, slot: Slot, seconds: float) -> bool:
        """Sleep in a slot that is down. False, and sooner, if it is time to stop.

        That is as soon as nothing waits any more, or another slot is there for what does.
        """
        until = self.clock() + seconds
        while True:
            with self._lock:
                self._notify_if_idle()
                others = any(not (each.down or each.over) for each in self.slots)
                slot.over = self._stopped and (others or not self._queue)
                left = until - self.clock()
                if slot.over or left <= 0.0:
                    return not slot.over
                self._resting.append(slot)
            self._sleep_among(self._resting, slot, left)

    def finish(self, call: Call, value: object, error: BaseException | None) -> Call | None:
        """The function has ended: close the books on ``call``, and settle it if it is awaited.

        :returns: the next call, claimed as by ``take``, if one is waiting
        """
        call.ended = ended = self.clock()
        with self._lock:
            awaited = self._close(call, value, error)
            seconds = ended - call.started
            self._forecast.learn(call.group, seconds)
            if type(call) is not StreamCall:
                average = self._counters.service_time
                self._counters.service_time = moving_average(average, seconds)
            slot = call.slot
            slot.running = None
            following = self._claim(slot, ended)
        if awaited:
            call.port.post(call.waiter)
        return _running_or_posted(following)

    def settle(self, outcomes: Iterable[tuple[Call, object, BaseException | None]]) -> None:
        """Some calls of the batch that runs have ended, each with a value or an error."""
        ended = self.clock()
        awaited = []
        with self._lock:
            for call, value, error in outcomes:
                call.ended = ended
                if self._close(call, value, error):
                    awaited.append(call)
        _post(awaited)

    def finish_batch(self, leader: BatchCall) -> Call | None:
        """All calls of the batch have been settled; returns as ``finish`` does."""
        now = self.clock()  # the leader may have been settled long before the last one
        with self._lock:
            average = self._counters.service_time
            self._counters.service_time = moving_average(average, now - leader.started)
            leader.members = leader.together = ()  # each would keep all the others alive
            slot = leader.slot
            slot.running = None
            following = self._claim(slot, now)
        return _running_or_posted(following)

    def note_batch(self, function: BatchFunction, size: int, seconds: float | None) -> None:
        """``size`` calls have run together, and taken ``seconds``; None if they have failed."""
        with self._lock:
            if seconds is not None:
                # One slow batch among fast ones says little of the next: see expectation().
                usual = function.cost(size)
                function.cost.add(size, min(seconds, 4 * usual or seconds))
            sizes = self._counters.batch_sizes
            sizes[size] = sizes.get(size, 0) + 1

    def note_split(self) -> None:
        """A batch has failed, and is about to be run again in two halves."""
        with self._lock:
            self._counters.batches_split += 1

    def suspend(self, call: StreamCall) -> Call | None:
        """A stream that lets others run has had its turn; returns as ``finish`` does."""
        with self._lock:
            now = self.clock()
            slot = call.slot
            self._forecast.learn_item(now - slot.turn_began)
            # Its first item, too, was a turn; and not the queue's, unless others wait for theirs.
            slot.stream_next = slot.stream_next and slot.suspended.ready
            slot.suspended.add(call, now)
            slot.running = None
            following = self._claim(slot, now)
        return _running_or_posted(following)

    # -- for the runner ------------------------------------------------------------------------

    def refuse(self, refusal: Refusal) -> None:
        """From now on every new call gets the error that ``refusal`` makes."""
        with self._lock:
            self._refusal = refusal
            self._refuses_for_now = False

    def send_away(self, calls: Iterable[Call], error: ErrorOf) -> None:
        """Cancel those of ``calls`` that have not ended; each caller gets an error of its own."""
        for call in calls:
            if self.leave(call, Departure.CANCELLED, error):
                call.port.post(call.waiter)

    def drop_queued(self, error: ErrorOf) -> None:
        """Cancel everything that waits; each caller gets an error of its own."""
        with self._lock:
            dropped = self._drop_all(error)
        _post(dropped)

    def abandon_running(self, error: ErrorOf) -> str | None:
        """Send the callers of what has begun away; return a function's name, if one runs."""
        with self._lock:
            calls = self._begun()
            name = calls[0].name if calls else None
        self.send_away(calls, error)
        return name

    def stop(self) -> None:
        """Let ``take`` return None once nothing waits and nothing has begun."""
        with self._lock:
            self._stopped = True
            self._rouse(self._idle)
            self._rouse(self._resting)

    def when_idle(self) -> Future[None]:
        """A future that completes when no call waits or runs."""
        future: Future[None] = Future()
        with self._lock:
            self._idle_waiters.append(future)
            self._notify_if_idle()
        return future

    def waiting(self) -> list[Call]:
        """The calls that wait, in order."""
        with self._lock:
            return list(self._queue)

    def under_way(self) -> list[Call]:
        """What runs and waits."""
        with self._lock:
            return self.orphans()

    def orphans(self) -> list[Call]:
        """The same, read without the lock: a forked child may never get that."""
        return [*self._begun(), *self._queue]

    def leave_behind(self, error: ErrorOf) -> list[Call]:
        """In a forked child: end what was under way with an error each, and return it."""
        self._lock = threading.RLock()  # whoever held the old one is not there
        self._ownership = threading.Condition(self._lock)
        orphans = self.orphans()
        for call in orphans:
            call.error = error(call)
            call.departure = Departure.CANCELLED
            call.state = CallState.DROPPED
        return orphans

    @property
    def queued(self) -> int:
        """How many calls wait. To be read under the lock, or as a hint."""
        return len(self._queue)

    @property
    def queued_bytes(self) -> int:
        """What their arguments hold, where it is counted. To be read likewise."""
        return self._queue.bytes

    @property
    def overloaded(self) -> bool:
        """Whether the queue has stood for too long. To be read under the lock."""
        # Where nothing comes any more nothing ends it: who asks must not wait for that.
        ended = not self._queue and self._overload.short(self.clock())
        return self._overload.active and not ended

    # -- under the lock: whose turn it is ------------------------------------------------------

    def _woken(self, slot: Slot | None = None) -> Slot:
        """One that sleeps, which is to be woken; by default the last one to fall asleep."""
        if slot is None:
            slot = self._idle.pop()  # its caches are the warmest
        else:
            self._idle.remove(slot)
        slot.woken = True
        return slot

    def _pass_on(self, slot: Slot) -> Slot | None:
        """Who else is to be woken, since something still waits when ``slot`` has had its look.

        Who was woken for one call may have taken another, for which somebody held his batch
        back, or can't take any, because his model has just gone.
        """
        leaves_it = slot.running is not None or slot.down
        if leaves_it and not any(each.woken for each in self.slots):
            return self._woken()
        return None

    def _rouse(self, sleepers: list[Slot]) -> None:
        """Wake them all, since it may be time to stop."""
        for slot in sleepers:
            slot.wake_up.release()
        sleepers.clear()

    # -- under the lock: what runs next --------------------------------------------------------

    def _claim(self, slot: Slot, now: float) -> Call | None:
        """Take the next call: to run it, or to drop it if it is too late for that."""
        call = None if slot.down else self._next(slot, now)
        slot.turn_began = now
        if call is None or call.state is CallState.RUNNING:
            slot.running = call
            return call
        self._queue.remove(call)
        if call.deadline is not None and self._drop_if_late(call, call.deadline, now):
            return call
        call.state = CallState.RUNNING
        call.started = now
        call.slot = slot
        self._counters.running += 1
        slot.running = call
        if type(call) is BatchCall:
            self._gather(call, now)
        return call

    def _next(self, slot: Slot, now: float) -> Call | None:
        """Who is next: of the queue, or of the streams that let others run in between."""
        suspended = slot.suspended
        if suspended.count:
            self._end_stalled(suspended, now)
        call = self._queue.first()
        if call is None:
            self._overload.empty()
        slot.look_again = math.inf
        if suspended.count and suspended.ready and (slot.stream_next or call is None):
            slot.stream_next = False
            return suspended.next()
        slot.stream_next = True
        if call is None:
            slot.look_again = suspended.next_stall if suspended.count else math.inf
        elif call.deadline is not None:
            self._overload.note(_share_waited(call, call.deadline, now), now)
            if self._overload.active and self._policy.overload == "newest":
                call = self._newest(call)
        if type(call) is BatchCall and call.function.max_delay and self._hold(slot, call, now):
            return None
        return call

    def _end_stalled(self, suspended: Suspended, now: float) -> None:
        for stream in suspended.stalled(now):
            self.leave(stream, Departure.EXPIRED, _refusals.stalled)

    def _newest(self, call: Call) -> Call:
        newest = self._queue.newest()
        # Who has no time limit must not be overtaken without end.
        return call if newest is None or newest.deadline is None else newest

    def _hold(self, slot: Slot, call: BatchCall, now: float) -> bool:
        """Whether to wait for more calls to join the batch that ``call`` would lead."""
        function, waiting = call.function, len(self._queue)
        others = slot.suspended.ready or self._queue.count_of(call.group) < waiting
        # Where another slot is free, the next one need not wait for this batch to end.
        if others or self._idle or self._stopped or waiting >= function.max_size:
            return False
        until = function.wait_until(waiting, min(each.arrived for each in self._queue))
        deadlines = [each.deadline for each in self._queue if each.deadline is not None]
        if deadlines:
            until = min(until, min(deadlines) - function.cost(waiting + 1))
        slot.look_again = min(until, slot.suspended.next_stall)
        return now < until

    def _gather(self, leader: BatchCall, now: float) -> None:
        """Make up the batch: ``leader``, and of those that may join it as many as time allows.

        Who is not going to be in time, however small the batch, does not bound it. Among the
        others, who would be too late in this one waits for the next.
        """
        function, members = leader.function, [leader]
        earliest = math.inf
        if leader.deadline is not None and now + function.cost(1) <= leader.deadline:
            earliest = leader.deadline
        for call in self._mates(leader):
            end = now + function.cost(len(members) + 1)
            if len(members) >= function.max_size or end > earliest:
                break
            if call.deadline is not None:
                if end > call.deadline or now >= call.deadline:
                    continue
                earliest = min(earliest, call.deadline)
            members.append(call)
        # In this order: a forked child reads both without the lock, and must find all of them.
        leader.members = members
        for call in members[1:]:
            self._queue.remove(call)
            call.state = CallState.RUNNING
            call.started = now
            call.slot = leader.slot
        self._counters.running += len(members) - 1

    def _mates(self, leader: BatchCall) -> Iterator[BatchCall]:
        """Those of the queue that may join the batch, in the order of their turns."""
        if not self._queue.count_of(leader.group):
            return
        newest = self._overload.active and self._policy.overload == "newest"
        for call in self._queue.newest_first() if newest else self._queue.in_order():
            if type(call) is BatchCall and call.group == leader.group:
                yield call

    def _drop_if_late(self, call: Call, deadline: float, now: float) -> bool:
        if now >= deadline:
            # Even if the thread is free in the very tick of the deadline: too late.
            self._drop([call], Departure.EXPIRED, self._deadline_exceeded)
        elif self._sheds and _share_waited(call, deadline, now) > self._policy.target:
            self._drop([call], Departure.SHED, lambda each: _refusals.shed(each, now))
        else:
            return False
        return True

    @property
    def _sheds(self) -> bool:
        # If nobody else waits, nobody is served for it: the thread would stand idle.
        return self._overload.active and self._policy.overload == "shed" and bool(self._queue)

    # -- under the lock: who is let in ---------------------------------------------------------

    def _examine(self, call: Call) -> tuple[list[Call], InferenceError | None]:
        """What must go to make room for ``call``, and the reason to refuse it, if there is one."""
        if self._refusal is not None:
            return [], self._refusal(_refusals.retry_after(self._predicted_wait(call)))
        if type(call) is StreamCall and self._open_streams >= self._queue.max_size:
            wait = self._predicted_wait(call)
            return [], _refusals.too_many_streams(self._open_streams, wait)
        dropped = self._make_room(call) if self._queue.too_small_for(call) else []
        wait = self._predicted_wait(call)
        if self._queue.full:
            return dropped, _refusals.queue_full(len(self._queue), wait)
        if self._queue.too_small_for(call):
            return dropped, _refusals.too_many_bytes(call.size, self._queue.bytes, wait)
        if call.deadline is not None:
            return dropped, self._too_late(call, call.deadline - call.arrived, wait)
        return dropped, None

    def _too_late(self, call: Call, left: float, wait: float) -> InferenceError | None:
        """The error for a call with ``left`` seconds that would not end in time."""
        # Its own seconds count only if others run before: they then are news. An estimate that
        # nothing corrects any more must not keep a free thread from being used.
        needed = wait + self._forecast.seconds(call.group, 1) if wait else 0.0
        if needed > left:
            return _refusals.too_little_time(left, needed)
        if self._sheds and wait > self._policy.target * left:
            return _refusals.overloaded(left, wait)
        return None

    def _make_room(self, call: Call) -> list[Call]:
        expired = self._queue.remove_expired(call.arrived)
        self._drop(expired, Departure.EXPIRED, self._deadline_exceeded)
        if not self._overload.active or self._policy.overload != "newest":
            return expired
        left = math.inf if call.deadline is None else call.deadline - call.arrived
        if self._too_late(call, left, self._predicted_wait(call)) is not None:
            return expired  # nobody makes room for who is refused
        oldest = self._queue.oldest_that_make_room_for(call)
        for other in oldest:
            self._queue.remove(other)
        self._drop(oldest, Departure.SHED, lambda each: _refusals.shed(each, call.arrived))
        return expired + oldest

    @property
    def _open_streams(self) -> int:
        return sum(slot.suspended.count for slot in self.slots)

    def _predicted_wait(self, call: Call) -> float:
        """Seconds until ``call`` has its turn: the work ahead of it, shared among the slots."""
        slots = [slot for slot in self.slots if not slot.down] or self.slots
        if self._overload.active and self._policy.overload == "newest":
            return self._forecast.next_end(slots, call.arrived)
        return self._forecast.wait(call, self._queue, slots)

    # -- under the lock: the books -------------------------------------------------------------

    def _close(self, call: Call, value: object, error: BaseException | None) -> bool:
        """``call`` has ended; return whether anybody waits for the outcome."""
        call.work = None  # the arguments may be large
        call.state = CallState.FINISHED
        counters = self._counters
        counters.running -= 1
        if call.departure is not None:
            self._count(call.departure)
            return False
        call.value = value
        call.error = error
        if error is None:
            counters.completed += 1
        else:
            counters.failed += 1
        return True

    def _drop_all(self, error: ErrorOf) -> list[Call]:
        dropped = self._queue.clear()
        self._drop(dropped, Departure.CANCELLED, error)
        self._notify_if_idle()
        return dropped

    def _drop(self, calls: Iterable[Call], departure: Departure, error: ErrorOf | None) -> None:
        for call in calls:
            call.error = None if error is None else error(call)
            call.state = CallState.DROPPED
            call.departure = departure
            call.work = None  # the arguments may be large
            self._count(departure)

    def _count(self, departure: Departure) -> None:
        if departure is Departure.EXPIRED:
            self._counters.expired += 1
        elif departure is Departure.CANCELLED:
            self._counters.cancelled += 1
        else:
            self._counters.rejected += 1

    def _begun(self) -> list[Call]:
        """What has started and not ended; in each slot the call that runs first."""
        return [call for slot in self.slots for call in slot.begun()]

    def _deadline_exceeded(self, call: Call) -> InferenceError:
        loading = all(slot.down for slot in self.slots)
        return _refusals.deadline_exceeded(call, self.clock(), loading=loading)

    def _notify_if_idle(self) -> None:
        if self._stopped and not self._queue:
            self._rouse(self._resting)
        if self._idle_waiters and not (self._queue or self._begun()):
            waiters, self._idle_waiters = self._idle_waiters, []
            for future in waiters:
                future.set_result(None)

    # -- the thread's sleep --------------------------------------------------------------------

    def _sleep(self, slot: Slot) -> bool:
        """Sleep until there is something to do; False if the latch let go for another reason."""
        timeout = -1.0
        if slot.look_again != math.inf:
            timeout = max(0.0, slot.look_again - self.clock())
        woken = self._sleep_among(self._idle, slot, timeout)
        return woken or self.clock() >= slot.look_again

    def _sleep_among(self, sleepers: list[Slot], slot: Slot, timeout: float) -> bool:
        """Sleep until woken; False if the time is up, or the latch let go by itself."""
        if slot.wake_up.acquire(timeout=timeout):
            return True
        with self._lock:
            woken = slot not in sleepers
            if not woken:
                sleepers.remove(slot)
        while woken and not slot.wake_up.acquire():  # in the very moment: it is on its way
            continue
        return woken


def _share_waited(call: Call, deadline: float, now: float) -> float:
    """What share of its time ``call`` has spent on waiting."""
    return (now - call.arrived) / max(1e-9, deadline - call.arrived)


def _running_or_posted(call: Call | None) -> Call | None:
    """``call``, if it was claimed to run; one that was dropped has its caller woken."""
    if call is None or call.state is CallState.RUNNING:
        return call
    call.port.post(call.waiter)
    return None


def _post(calls: Iterable[Call]) -> None:
    """Wake the callers of calls that have ended, or were dropped with an error."""
    for call in calls:
        call.port.post(call.waiter)
