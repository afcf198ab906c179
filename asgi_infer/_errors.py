"""Everything this package raises on purpose.

* InferenceError (a ``starlette.exceptions.HTTPException``)
    * QueueFull (503): as many calls as ``max_queue`` allows are waiting
    * Draining (503, also RuntimeError): the runner is stopping or has stopped
    * NotReady (503): there is no model to call: not loaded, or not found
    * DeadlineExceeded (504, also TimeoutError): the call's time was up
    * ClientDisconnected (499): the client hung up before its answer
    * WorkerCrashed (500): the process that held the model died while it ran the call
    * CallFailed (500): the function ended with something that is no ``Exception``
    * ReentrantCall (500, also RuntimeError): a runner called from its own thread
* CallCancelled (a ``BaseException``): what ``check_cancelled()`` raises

The HTTP status rides on the exception because that makes it right everywhere with no
handler registered: in the application, in a mounted one, and as the denial of a WebSocket.
The text for the developer is ``str(error)``; the text for the client is ``error.detail``
and says nothing of what is inside.
"""

from __future__ import annotations

import math

from starlette.exceptions import HTTPException


class InferenceError(HTTPException):
    """Base class: ``except InferenceError`` catches all that this package raises for a call.

    :param message: what happened and what to do next, for the developer
    :param retry_after: seconds until a repetition may succeed; sent as ``Retry-After``
    """

    status: int = 500
    public: str = "Internal Server Error"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        headers = None if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
        super().__init__(self.status, self.public, headers)
        self.args = (message,)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.args[0])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class QueueFull(InferenceError):
    """As many calls as ``max_queue`` allows are waiting already. Never queued, safe to repeat."""

    status = 503
    public = "The service is overloaded. Try again later."


class Draining(InferenceError, RuntimeError):
    """The runner is stopping or has stopped: it takes no new calls. Never started.

    Also what a caller gets whose accepted call had not ended when ``grace`` was over.
    """

    status = 503
    public = "The service is shutting down. Try again later."


class NotReady(InferenceError):
    """There is no model to call: loading failed, took too long, or no runner was found."""

    status = 503
    public = "The service is not ready. Try again later."


class DeadlineExceeded(InferenceError, TimeoutError):
    """The call's time was up. ``started`` tells whether the function had begun to run.

    If it had not, it never will, and the call is safe to repeat. If it had, it runs on to its
    end on the inference thread (see ``check_cancelled()``), and its result is thrown away.
    """

    status = 504
    public = "The answer did not come in time."

    def __init__(self, message: str, *, started: bool, retry_after: float | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.started = started
        if not started:
            self.detail = "The service is too busy to answer in time. Try again later."


class ClientDisconnected(InferenceError):
    """The client hung up while its call was waiting or running; nobody is left to answer."""

    status = 499
    public = "The client closed the connection."


class WorkerCrashed(InferenceError):
    """The process in which the model lived died while it ran this call.

    The call is not run again, since it may be what killed the process, and part of what it does
    may have been done: repeat it only if that is safe. Calls that were waiting are not touched.
    """


class CallFailed(InferenceError):
    """The function ended with something that is no ``Exception``; that is ``__cause__``.

    ``SystemExit``, ``KeyboardInterrupt`` and the frameworks' cancellations must not cross into
    the caller's task, where they would stop the server or pass for the caller's own.
    """


class ReentrantCall(InferenceError, RuntimeError):
    """A function on the inference thread called its own runner, which would wait for ever."""


def describe(error: BaseException) -> str:
    """The type and the text of ``error``; never fails, as its own ``__str__`` may."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


class CallCancelled(BaseException):
    """Raised by ``check_cancelled()`` inside a call that nobody waits for any more.

    Not an ``Exception``, as ``asyncio.CancelledError`` is none: ``except Exception`` in a
    model's code must not swallow it. Let it pass.
    """
