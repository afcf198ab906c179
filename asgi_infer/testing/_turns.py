"""One turn of whatever has been claimed, as the inference thread takes it."""

from __future__ import annotations

from .._batch import BatchCall
from .._buffer import StreamCall
from .._call import Call
from .._execute import run_batch, run_call, step_stream
from .._scheduler import Scheduler
from ..workers._protocol import Runs


def run_turn(replica: Runs, scheduler: Scheduler, call: Call) -> Call | None:
    """Run what was claimed; return what is claimed next, if anything is."""
    if type(call) is StreamCall:
        return step_stream(replica, scheduler, call)
    if type(call) is BatchCall:
        run_batch(replica, scheduler, call)
        return scheduler.finish_batch(call)
    value, error = run_call(replica, scheduler, call)
    return scheduler.finish(call, value, error)
