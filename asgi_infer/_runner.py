"""The runner: what users hold. One thread owns the model; everybody else awaits it."""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import asynccontextmanager
from contextvars import copy_context
from functools import partial, update_wrapper
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar, TypeVarTuple, cast, overload

from . import _checks, _exit
from ._batch import BatchCall, BatchFunction
from ._buffer import StreamBuffer, StreamCall
from ._call import Call, Caller, Departure, Port, Work, current_caller, here
from ._errors import NotReady, QueueFull, ReentrantCall
from ._future import FUTURE_PORT, CallFuture, cancel_all
from ._handoff import current_port, wait_for
from ._model import ModelReference, is_generator_function
from ._queue_policy import QueuePolicy
from ._refusals import retry_after
from ._scheduler import Scheduler
from ._statistics import Counters, RunnerStatistics, Usage
from ._stream import Stream
from ._thread import InferenceThread
from .native import NativePolicy, openmp
from .workers import ThreadWorker
from .workers._protocol import ModelSpec, Worker

ModelT = TypeVar("ModelT")
T = TypeVar("T")
P = ParamSpec("P")
ArgsT = TypeVarTuple("ArgsT")

STATE_KEY = "asgi_infer"
"""Where a lifespan's state holds ``{name: runner}``."""

GRACE = 10.0
"""Seconds that accepted calls get to end in when a runner stops, unless told otherwise."""


STALL_TIMEOUT = 10.0
"""Seconds that the consumer of a stream may let a full buffer stand, unless told otherwise."""


class InferenceRunner(Executor, Generic[ModelT]):
    """Runs calls, one at a time, on the one OS thread that owns a native model.

    ::

        runner = InferenceRunner(Digits, warmup=lambda model: model.predict(SAMPLE))

        async with runner:
            digit = await runner.run(runner.model.predict, image)

    The thread loads the model, warms it up, runs every call and destroys the model: native
    libraries then have one thread pool and the whole CPU. The runner starts with ``async
    with``, with the application it is mounted in, or on its first call; it serves any number of
    asyncio and trio loops, and threads through ``submit``.

    :param load: makes the model: a class or function without arguments, called on the inference
        thread. Not a model that exists already: that was made on the wrong thread
    :param warmup: called with the model, on the inference thread, before the first call
    :param name: names the thread, and the runner among several; the kernel shows 15 bytes of it
    :param max_queue: how many calls may wait (the running one not counted); more are refused
    :param max_queue_bytes: how many bytes the arguments of waiting calls may hold: of arrays,
        tensors and other buffers. A call that waits alone may hold more
    :param queue: in what order calls run, and what is done about a queue that has stood too long
    :param timeout: seconds that a call may take, waiting included, where it sets no time itself
    :param native: what the thread, and the native threads that the model starts, run under
    :param worker: where the model lives
    :raises TypeError: ``load`` or ``warmup`` can't be called as said above
    :raises ValueError: a number makes no sense
    """

    _clock: Callable[[], float] = staticmethod(time.monotonic)  # what deadlines are on
    _thread_type = InferenceThread
    _scheduler_type = Scheduler

    def __init__(
        self,
        load: Callable[[], ModelT] | None = None,
        *,
        warmup: Callable[[ModelT], object] | None = None,
        name: str = "inference",
        max_queue: int = 128,
        max_queue_bytes: int | None = None,
        queue: QueuePolicy = QueuePolicy(),
        timeout: float | None = None,
        native: NativePolicy = NativePolicy(),
        worker: Worker = ThreadWorker(),
    ) -> None:
        _checks.check_load(load)
        _checks.check_warmup(warmup, load)
        self._name = _checks.check_name(name)
        self._max_queue = _checks.check_count("max_queue", max_queue)
        if max_queue_bytes is not None:
            _checks.check_count("max_queue_bytes", max_queue_bytes)
        self._max_queue_bytes = max_queue_bytes
        self._queue_policy = _checks.check_queue_policy(queue)
        self._timeout = None if timeout is None else _checks.check_seconds("timeout", timeout)
        self._spec = ModelSpec(name=name, load=load, warmup=warmup, native=native)
        self._worker = worker
        self._begin()
        _exit.leave_behind_at_fork(self, InferenceRunner._after_fork)

    def _begin(self) -> None:
        """The state of a runner that was never used: when it is made, and in a forked child."""
        self._thread: InferenceThread | None = None  # guarded by _start_lock
        self._users = 0  # guarded by _start_lock
        self._start_lock = threading.Lock()
        self._counters = Counters()  # guarded by _lock
        self._usage = Usage()  # written by the inference thread alone
        # Re-entrant, since a collection may finalize this runner on a thread that holds it.
        self._lock = threading.RLock()

    # -- calls ---------------------------------------------------------------------------------

    async def run(
        self,
        func: Callable[[*ArgsT], T],
        *args: *ArgsT,
        timeout: float | None = None,
        priority: int = 0,
    ) -> T:
        """Call ``func(*args)`` on the inference thread and return its result.

        ``func`` and each argument may be a reference, ``runner.model`` or anything reached from
        it. Keyword arguments go through ``functools.partial``. The function runs in a copy of
        the caller's context. It is to be a plain function: it must not be async.

        :param timeout: seconds for waiting and running together; by default the runner's
        :param priority: lower runs sooner; first come, first served within one
        :raises QueueFull: as many calls as ``max_queue`` allows are waiting
        :raises DeadlineExceeded: the time is up, or the predicted wait is longer than it. If
            ``started``, the function runs on, and its result is thrown away
        :raises ClientDisconnected: behind ``InferenceMiddleware``: the client has hung up
        :raises Draining: the runner is stopping or has stopped
        :raises NotReady: the model did not load
        :raises ReentrantCall: from within a call of the same runner
        :raises CallFailed: ``func`` ended with something that is no ``Exception``
        :raises Exception: whatever ``func`` raises

        Cancelling it returns at once. A call that waits is taken out of the queue and never
        runs. One that runs goes on to its end, since native code can't be interrupted, and
        holds the thread until then; ``check_cancelled()`` inside it raises.
        """
        port = current_port()
        waiter = port.waiter()
        caller = current_caller.get()
        if timeout is None and self._timeout is None and caller is None:
            deadline = None
        else:
            deadline = self._deadline(timeout, caller)
        call, scheduler = self._call((func, args), port, waiter, deadline, priority)
        if caller is not None:
            caller.joined(call, scheduler.disconnect)
        try:
            if deadline is None:
                await waiter
            elif not await port.wait_until(waiter, deadline):
                scheduler.expire(call)
        except BaseException:
            scheduler.leave(call, Departure.CANCELLED)
            raise
        finally:
            if caller is not None:
                caller.left(call)
        result: T = call.outcome()
        return result

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call ``fn(*args, **kwargs)`` on the inference thread, from synchronous code.

        What ``concurrent.futures.Executor.submit`` promises, in any thread but the inference
        thread. Cancelling the future takes a waiting call out of the queue. Its ``result()``
        waits no longer than the runner's ``timeout``.

        :raises Exception: as ``run``, for all that is known on arrival
        """
        future = CallFuture()
        func = partial(fn, **kwargs) if kwargs else fn
        caller = current_caller.get()
        deadline = self._deadline(None, caller)
        call, scheduler = self._call((func, args), FUTURE_PORT, future, deadline, 0)
        if caller is not None:
            caller.joined(call, scheduler.disconnect)
            future.add_done_callback(lambda _: caller.left(call))
        return cast("Future[T]", future)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
    ) -> Iterator[T]:
        """``Executor.map``: the results in order.

        Where more calls are made than ``max_queue`` allows to wait, this waits for room.
        """
        executor = _WithRoom(self, self._max_queue)
        return executor.map(fn, *iterables, timeout=timeout, chunksize=chunksize)

    def stream(
        self,
        func: Callable[[*ArgsT], Iterator[T]],
        *args: *ArgsT,
        buffer: int = 16,
        stall_timeout: float | None = STALL_TIMEOUT,
        interleave: bool = False,
        timeout: float | None = None,
        priority: int = 0,
    ) -> Stream[T]:
        """Step the generator ``func(*args)`` on the inference thread, and iterate over its items.

        The call is queued here and now, so that an endpoint answers with the error of a full
        queue and not with half a response. Once it runs it holds the thread until the generator
        ends: up to ``buffer`` items are made ahead, then the thread waits for the consumer.

        :param buffer: how many items may be made ahead of the consumer
        :param stall_timeout: seconds that the consumer may let a full buffer stand; then the
            generator is closed. None for no limit
        :param interleave: let calls that wait run between two items, one after each; the stream
            then holds no thread while it waits for its consumer
        :param timeout: seconds for all of it, from here to the last item; by default the runner's
        :param priority: as of ``run``
        :returns: an async iterator, which can be given to ``StreamingResponse`` as it is
        :raises TypeError: ``func`` is async, or no function
        :raises Exception: as ``run``, for all that is known on arrival. What comes later is
            raised where the items are taken: ``DeadlineExceeded``, also for a consumer that has
            stalled, ``ClientDisconnected``, ``Draining``, and what the generator raises

        See ``Stream`` for cancellation.
        """
        _checks.check_stream(func)
        size = _checks.check_count("buffer", buffer)
        if stall_timeout is not None:
            stall_timeout = _checks.check_seconds("stall_timeout", stall_timeout)
        caller = current_caller.get()
        call = StreamCall(
            (func, args),
            copy_context(),
            self._deadline(timeout, caller),
            priority,
            buffer=StreamBuffer(size),
            stall_timeout=stall_timeout,
            interleave=interleave,
        )
        scheduler = self._admit(call)
        stream: Stream[T] = Stream(call, scheduler, caller)
        if caller is not None:
            caller.joined(call, scheduler.disconnect)
        return stream

    @overload
    def wrap(  # type: ignore[overload-overlap]  # an iterator is a T as well; it comes first
        self, func: Callable[P, Iterator[T]], *, timeout: float | None = None, priority: int = 0
    ) -> Callable[P, Stream[T]]: ...

    @overload
    def wrap(
        self, func: Callable[P, T], *, timeout: float | None = None, priority: int = 0
    ) -> Callable[P, Coroutine[Any, Any, T]]: ...

    def wrap(
        self, func: Callable[P, Any], *, timeout: float | None = None, priority: int = 0
    ) -> Callable[P, Any]:
        """An async function that runs ``func`` on the inference thread.

        ::

            predict = runner.wrap(runner.model.predict)
            digit = await predict(image)

        Works as a decorator as well. Of a generator function it makes a function that returns
        a ``Stream``. Options, errors and cancellation are those of ``run``, or of ``stream``.
        """
        if timeout is not None:
            _checks.check_seconds("timeout", timeout)
        if is_generator_function(func, self._spec.load):
            return update_wrapper(self._stream_of(func, timeout, priority), func)
        _checks.check_func(func)

        async def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            bound = partial(func, *args, **kwargs)
            return await self.run(bound, timeout=timeout, priority=priority)

        return update_wrapper(call, func)

    def _stream_of(
        self, func: Callable[P, Iterator[T]], timeout: float | None, priority: int
    ) -> Callable[P, Stream[T]]:
        def call(*args: P.args, **kwargs: P.kwargs) -> Stream[T]:
            bound = partial(func, *args, **kwargs)
            return self.stream(bound, timeout=timeout, priority=priority)

        return call

    @property
    def model(self) -> ModelT:
        """A reference to the model, for ``run`` and its kin. To the type checker: the model.

        :raises RuntimeError: the runner was made without ``load``
        """
        if self._spec.load is None:
            raise RuntimeError("this runner has no model: make it with InferenceRunner(load)")
        return cast("ModelT", ModelReference(self._spec))

    # -- lifecycle -----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The runner's name."""
        return self._name

    async def start(self, *, timeout: float | None = None) -> None:
        """Start the thread, and return once the model is loaded and warmed up.

        Does nothing when it has started; starts a stopped runner again. The calling thread's
        libgomp pool, if it has one, is given back: see ``asgi_infer.native.openmp``.

        :param timeout: seconds that loading may take
        :raises NotReady: it took longer, or the system has no thread for it
        :raises Exception: whatever ``load`` or ``warmup`` raises

        Cancelling it leaves the thread loading.
        """
        if timeout is not None:
            _checks.check_seconds("timeout", timeout)
        thread = self._launch(again=True)
        try:
            await wait_for(thread.ready, timeout)
        except TimeoutError:
            if thread.ready.done():
                raise  # load's own
            thread.stop_now()
            raise NotReady(f"the model of {self._name!r} did not load in {timeout} s") from None

    async def aclose(self, *, grace: float = GRACE) -> None:
        """Stop: refuse new calls, let the accepted ones end, destroy the model on its thread.

        Calls that have not ended after ``grace`` seconds get ``Draining``. A function that
        still runs then runs on, and its thread, which nobody waits for, ends with it. Does
        nothing when the runner was never started or has stopped.

        :raises ValueError: ``grace`` is no number; nothing has been stopped

        Cancelling it ends the grace at once.
        """
        seconds = _checks.check_grace(grace)
        thread = self._thread
        if thread is None:
            return
        thread.stop_soon()
        try:
            await wait_for(thread.done, seconds)
        except TimeoutError:
            pass
        finally:
            if not thread.done.done():
                thread.stop_now()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """``Executor.shutdown``: stop, from synchronous code. Accepted calls still run.

        :param wait: return only when the last call has ended and the model is gone
        :param cancel_futures: cancel what was submitted and has not started
        """
        thread = self._thread
        if thread is None:
            return
        if cancel_futures:
            cancel_all(thread.scheduler.waiting())
        thread.stop_soon()
        if wait:
            thread.join()

    async def wait_idle(self) -> None:
        """Return when no call waits or runs. New calls are taken all the while."""
        thread = self._thread
        for scheduler in [] if thread is None else thread.schedulers:
            await wait_for(scheduler.when_idle())

    @asynccontextmanager
    async def opened(
        self, *, startup_timeout: float | None = None, grace: float = GRACE
    ) -> AsyncIterator[Self]:
        """Keep the runner started: the first user starts it, the last one to leave stops it.

        What ``async with runner`` does, with options.

        :param startup_timeout: as ``timeout`` of ``start``
        :param grace: as of ``aclose``
        :raises Exception: as ``start``
        """
        await self._enter(startup_timeout)
        try:
            yield self
        finally:
            if self._leave():
                await self.aclose(grace=grace)

    async def __aenter__(self) -> Self:
        await self._enter(None)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if self._leave():
            await self.aclose()

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[dict[str, Any]]:
        """For ``FastAPI(lifespan=runner.lifespan)``, Starlette, or an ``APIRouter``.

        The state that it yields is what ``runner_from`` and ``RunnerDep`` look in.
        """
        del app  # the protocol's; every application gets the same
        async with self.opened():
            # The second key stays when the states of several runners are merged into one.
            yield {STATE_KEY: {self._name: self}, f"{STATE_KEY}.{self._name}": self}

    def statistics(self) -> RunnerStatistics:
        """What the runner has done and is doing: its counts, and what calls cost."""
        thread = self._thread
        schedulers = [] if thread is None else thread.schedulers
        usage = self._usage
        with self._lock:
            counters = self._counters
            return RunnerStatistics(
                submitted=counters.submitted,
                completed=counters.completed,
                failed=counters.failed,
                cancelled=counters.cancelled,
                expired=counters.expired,
                rejected=counters.rejected,
                queued=sum(scheduler.queued for scheduler in schedulers),
                queued_bytes=sum(scheduler.queued_bytes for scheduler in schedulers),
                running=counters.running,
                late=counters.late,
                service_time=counters.service_time,
                batch_sizes=dict(sorted(counters.batch_sizes.items())),
                batches_split=counters.batches_split,
                restarts=counters.restarts,
                overloaded=any(scheduler.overloaded for scheduler in schedulers),
                cores_used=usage.cores_used,
                switches_per_call=usage.switches_per_call,
                faults_per_call=usage.faults_per_call,
                foreign_threads=usage.foreign_threads,
                pools_returned=usage.pools_returned,
                loop_lag=usage.loop_lag,
                state="new" if thread is None else thread.state,
            )

    def __repr__(self) -> str:
        thread = self._thread
        return f"<InferenceRunner {self._name!r} {'new' if thread is None else thread.state}>"

    def __del__(self) -> None:
        thread: InferenceThread | None = getattr(self, "_thread", None)
        if thread is not None and thread.state in ("loading", "ready", "broken"):
            warnings.warn(f"{self!r} was not stopped", ResourceWarning, stacklevel=2, source=self)
            thread.stop_soon()

    # -- inside --------------------------------------------------------------------------------

    def _call(
        self,
        work: Work,
        port: Port,
        waiter: Any,
        deadline: float | None,
        priority: int,
    ) -> tuple[Call, Scheduler]:
        """Make a call and have it admitted."""
        if not callable(work[0]):
            _checks.check_func(work[0])
        kind = BatchCall if type(work[0]) is BatchFunction else Call
        call = kind(work, copy_context(), deadline, priority, port, waiter)
        return call, self._admit(call)

    def _admit(self, call: Call) -> Scheduler:
        """Hand ``call`` to the thread, which is started if need be."""
        if call.priority != 0:
            _checks.check_priority(call.priority)
        if threading.get_ident() != _exit.main_thread_id:
            _exit.watch_main_thread()
        thread = self._thread or self._launch(again=False)
        current = here.current_call
        # Also from a thread that has been stopped and still runs: the next one waits for its end.
        if current is not None and thread.runs(current):
            raise ReentrantCall(
                f"a call on the runner {self._name!r} calls the same runner and would wait for "
                f"itself: call the function directly instead"
            )
        scheduler = thread.scheduler
        if call.port is FUTURE_PORT:
            call.waiter.attach(call, scheduler)
        scheduler.admit(call)
        return scheduler

    def _deadline(self, timeout: float | None, caller: Caller | None) -> float | None:
        """When the call's time is up: its own or the runner's, and never after the caller's."""
        seconds = self._timeout
        if timeout is not None:
            seconds = _checks.check_seconds("timeout", timeout)
        deadline = None if seconds is None else self._clock() + seconds
        if caller is None or caller.deadline is None:
            return deadline
        return caller.deadline if deadline is None else min(caller.deadline, deadline)

    def _launch(self, *, again: bool) -> InferenceThread:
        """The thread, started if need be; one that has ended is replaced only with ``again``."""
        with self._start_lock:
            previous = self._thread
            if previous is not None and not (again and previous.over):
                return previous
            if self._worker.local:
                openmp.release_pools()
            thread = self._make_thread(previous)
            try:
                thread.start()
            except RuntimeError as error:
                message = f"no thread for the runner {self._name!r}: {error}"
                raise NotReady(message, retry_after=retry_after(0.0)) from error
            _exit.stop_at_exit(thread)
            self._thread = thread
            return thread

    def _make_thread(self, previous: InferenceThread | None) -> InferenceThread:
        return self._thread_type(
            spec=self._spec,
            worker=self._worker,
            scheduler=self._scheduler_type(
                slots=self._worker.replicas,
                max_queue=self._max_queue,
                max_bytes=self._max_queue_bytes,
                policy=self._queue_policy,
                counters=self._counters,
                lock=self._lock,
                clock=self._clock,
            ),
            usage=self._usage,
            home=_port_here(),
            previous=previous,
        )

    async def _enter(self, startup_timeout: float | None) -> None:
        """One user more, who waits for the model; who gets no model is no user."""
        with self._start_lock:
            self._users += 1
        try:
            await self.start(timeout=startup_timeout)
        except BaseException:
            if self._leave():
                await self.aclose(grace=0.0)
            raise

    def _leave(self) -> bool:
        """One user less; return whether that was the last one."""
        with self._start_lock:
            self._users -= 1
            return self._users == 0

    def _after_fork(self) -> None:
        """In a forked child: the thread is not there, and the model is of no use without it."""
        thread = self._thread
        self._begin()
        if thread is not None:
            thread.leave_behind()


def _port_here() -> Port | None:
    """The port of the event loop that runs here, if one does."""
    try:
        return current_port()
    except RuntimeError:
        return None


class _WithRoom(Executor):
    """A runner whose ``submit`` waits while the queue is full, as ``Executor.map`` needs it."""

    def __init__(self, runner: InferenceRunner[Any], room: int) -> None:
        self._runner = runner
        self._room = room
        self._submitted: deque[Future[Any]] = deque()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        while True:
            if len(self._submitted) >= self._room:
                wait([self._submitted.popleft()])
            try:
                future = self._runner.submit(fn, *args, **kwargs)
            except QueueFull:  # of other people's calls
                if not self._submitted:
                    raise
                wait([self._submitted.popleft()])
            else:
                self._submitted.append(future)
                return future
