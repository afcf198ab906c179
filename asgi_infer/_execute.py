"""What the inference thread does with what it has claimed: a call, a batch, a step of a stream.

Guarantees
    * Whatever a function raises becomes the outcome of its call, and of no other.
    * Every call of a batch is settled once, by the time that ``run_batch`` returns.
    * A generator is stepped and closed here, and nowhere else.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from typing import Any, cast

from ._batch import BatchCall, BatchFunction
from ._buffer import StreamCall
from ._call import Call, Departure, Work
from ._errors import CallCancelled, CallFailed, WorkerCrashed
from ._model import name_of
from ._refusals import stalled
from ._scheduler import Scheduler
from .workers._protocol import LazyResult, Runs, Steps


def run_call(replica: Runs, scheduler: Scheduler, call: Call) -> tuple[Any, Exception | None]:
    """Run the function of ``call``; return its value, or the error."""
    work: Any = call.work  # it is there: nobody lets go of it while it runs
    try:
        return replica.execute(work, call.context), None
    except BaseException as exception:
        if isinstance(exception, CallCancelled):
            _give_up(scheduler, [call])
        return None, as_error(exception, work)


# -- batches -----------------------------------------------------------------------------------


class WrongResults(TypeError):
    """What a batch function returned can't be told apart: no fault of any of the items."""


def run_batch(replica: Runs, scheduler: Scheduler, batch: BatchCall) -> None:
    """Run the calls of a batch together, and settle each.

    A batch that fails is run again in two halves, and so on, until what fails is alone: of n
    calls one that fails costs at most ``2 * ceil(log2(n))`` calls of the function more, and any
    number of them ``2 * n - 2``. Calls that nobody waits for any more are left out of those.
    """
    parts = [batch.members]
    while parts:
        parts += _run_part(replica, scheduler, batch, parts.pop())


def _run_part(
    replica: Runs, scheduler: Scheduler, batch: BatchCall, part: Sequence[BatchCall]
) -> list[Sequence[BatchCall]]:
    """Run some calls of ``batch``, and settle them; return what is to be run again, last first."""
    calls = _still_awaited(scheduler, part)
    if not calls:
        return []
    batch.together = calls
    error = _run_together(replica, scheduler, calls)
    if error is None:
        return []
    try:
        if len(calls) == 1 or isinstance(error, WrongResults | LazyResult | WorkerCrashed):
            _fail(scheduler, calls, error)
            return []
        return _halves(scheduler, calls)
    finally:
        del error  # its traceback refers to this frame


def _halves(scheduler: Scheduler, calls: Sequence[BatchCall]) -> list[Sequence[BatchCall]]:
    calls = _still_awaited(scheduler, calls)
    if not calls:
        return []
    scheduler.note_split()
    middle = len(calls) // 2
    return [calls[middle:], calls[:middle]]


def _still_awaited(scheduler: Scheduler, calls: Sequence[BatchCall]) -> Sequence[BatchCall]:
    """Settle those that nobody waits for any more; return the others."""
    _give_up(scheduler, calls)
    awaited: list[BatchCall] = []
    gone: list[BatchCall] = []
    for call in calls:  # asked once: its caller may leave at any time
        (awaited if call.departure is None else gone).append(call)
    if gone:
        scheduler.settle((call, None, None) for call in gone)
    return awaited


def _run_together(
    replica: Runs, scheduler: Scheduler, calls: Sequence[BatchCall]
) -> BaseException | None:
    """Run the function once, and settle ``calls`` if it succeeds; else return the error."""
    function = calls[0].function
    began = scheduler.clock()
    seconds: float | None = None
    try:
        joined = function.join([call.item for call in calls])
        # In a copy: what a batch sets in its context is not for the next one to see.
        returned = replica.execute((function.func, (joined,)), function.context.copy())
        del joined
        values = _split(function, returned, len(calls))
        seconds = scheduler.clock() - began
    except BaseException as error:
        return error
    finally:
        scheduler.note_batch(function, len(calls), seconds)
    scheduler.settle(zip(calls, values, [None] * len(calls), strict=True))
    return None


def _split(function: BatchFunction, returned: Any, count: int) -> list[Any]:
    """The results in a list of our own: nobody else's code is to run while they are settled."""
    try:
        return function.split(returned, count)
    except Exception as error:
        raise WrongResults(f"{name_of(function)} {error}") from None


def _repeated(crash: WorkerCrashed) -> WorkerCrashed:
    """The same again, with the stack of the process in its notes."""
    again = WorkerCrashed(str(crash))
    for note in getattr(crash, "__notes__", ()):
        again.add_note(note)
    return again


def _fail(scheduler: Scheduler, calls: Sequence[BatchCall], error: BaseException) -> None:
    if isinstance(error, CallCancelled):
        _give_up(scheduler, calls)
    # One for each: an error that many tasks raise at once would get the tracebacks of all.
    if isinstance(error, WrongResults | LazyResult):
        errors: list[Exception] = [TypeError(*error.args) for _ in calls]
    elif isinstance(error, WorkerCrashed):
        errors = [_repeated(error) for _ in calls]
    else:
        errors = [as_error(error, calls[0].work)]
    scheduler.settle((call, None, each) for call, each in zip(calls, errors, strict=True))


# -- streams -----------------------------------------------------------------------------------


def step_stream(replica: Runs, scheduler: Scheduler, call: StreamCall) -> Call | None:
    """Step a generator until it ends, or once if others may run in between; return who is next."""
    suspends, error = _turn(replica, scheduler, call)
    if suspends:
        return scheduler.suspend(call)
    closing_error = _close(scheduler, call)
    try:
        return scheduler.finish(call, None, closing_error if error is None else error)
    finally:
        del error, closing_error  # their tracebacks refer to this frame


def _turn(replica: Runs, scheduler: Scheduler, call: StreamCall) -> tuple[bool, Exception | None]:
    """Step the generator; return whether others may run before the next step, or the error."""
    try:
        if call.steps is None:
            call.steps = replica.iterate(cast("Work", call.work), call.context)
        return _step(scheduler, call, call.steps), None
    except BaseException as exception:
        return False, _stream_error(scheduler, call, exception)


def _step(scheduler: Scheduler, call: StreamCall, steps: Steps) -> bool:
    """Put items into the buffer; return whether others may run before the next one."""
    buffer = call.buffer
    while _wanted(scheduler, call):
        try:
            buffer.put(next(steps))
        except StopIteration:
            return False
        if call.interleave:
            return True
        # Asked before the clock is: there is room as a rule.
        if buffer.full and not buffer.wait_for_room(call.patience(scheduler.clock())):
            _stop_if_stalled(scheduler, call)
    return False


def _stop_if_stalled(scheduler: Scheduler, call: StreamCall) -> None:
    if not call.given_up(scheduler.clock()):
        scheduler.leave(call, Departure.EXPIRED, stalled)


def _wanted(scheduler: Scheduler, call: StreamCall) -> bool:
    """Whether anybody waits for the next item."""
    if not call.given_up(scheduler.clock()):
        return True
    _give_up(scheduler, [call])
    return False


def _close(scheduler: Scheduler, call: StreamCall) -> Exception | None:
    """Close the generator, and destroy it, on the thread that made it; return its error."""
    steps, call.steps = call.steps, None
    try:
        if steps is not None:
            steps.close()
    except BaseException as exception:
        return _stream_error(scheduler, call, exception)
    return None


def _stream_error(scheduler: Scheduler, call: StreamCall, exception: BaseException) -> Exception:
    if isinstance(exception, CallCancelled):
        _give_up(scheduler, [call])
    return as_error(exception, call.work)


# -- errors ------------------------------------------------------------------------------------


def _give_up(scheduler: Scheduler, calls: Sequence[Call]) -> None:
    """A function stopped for a deadline before anybody else noticed that it had passed."""
    now = scheduler.clock()
    for call in calls:
        too_late = call.deadline is not None and now >= call.deadline
        if too_late and scheduler.expire(call):
            call.port.post(call.waiter)


def as_error(exception: BaseException, work: Work | None) -> Exception:
    """The exception in a form that may cross into the caller's task."""
    name = "the function" if work is None else name_of(work[0])
    if isinstance(exception, StopIteration | StopAsyncIteration):
        # Neither can cross a future or a coroutine: there they mean "returned".
        error: Exception = RuntimeError(f"{name} raised {type(exception).__name__}")
    elif isinstance(exception, concurrent.futures.CancelledError) or not isinstance(
        exception, Exception
    ):
        error = CallFailed(f"{name} ended with {type(exception).__name__}, which is no error")
    else:
        return exception
    error.__cause__ = exception
    error.__traceback__ = exception.__traceback__
    return error
