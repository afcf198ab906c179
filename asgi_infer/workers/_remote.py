"""The runner's side of a model in another process: requests, and what is done about crashes.

Guarantees
    * A call is sent once, or twice if the worker was told to. Which of the two sides fails, and
      when, makes no difference.
    * Who waits for a process is woken by its death, and by ``interrupt``: nothing is polled.
    * Whatever becomes of a request, the next one finds the channel in order, or the model lost.
"""

from __future__ import annotations

import logging
import select
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

from .._call import Call, Work, here
from .._checks import check_seconds
from .._errors import CallCancelled, DeadlineExceeded, NotReady, WorkerCrashed, describe
from .._model import ForeignReference, ModelReference, name_of, owner_and_path
from .._refusals import retry_after
from .._restarts import RestartPolicy, Restarts
from ._channel import Channel, Kind, Message
from ._codec import Encoded
from ._errors_across import unpack_error
from ._host import refer
from ._latch import LONGEST, Latch
from ._page import ControlPage
from ._poison import CRASHES, FORGOTTEN_AFTER, poison_of
from ._protocol import NOTHING_USED, ModelSpec, Steps, Used
from .thread import leak

logger = logging.getLogger("asgi_infer")

_MOMENT = 0.2  # seconds that a process gets for writing its stacks before it is killed
_PAUSE = 0.02  # seconds without a word, after which it has written all of them
_LONGEST = 0.5  # seconds for all of that: it may write other things without end
_FAREWELL = 5.0  # seconds that it gets for ending by itself
_ATTEMPTS = 3  # to send a call to a process that dies before it begins with it
# Until Python 3.12 an attribute of an enum takes longer than anything else that is looked up here.
_EXECUTE, _RESULT = Kind.EXECUTE, Kind.RESULT


@dataclass(frozen=True)
class RemoteWorker:
    """What workers whose models live in other processes have in common."""

    _: KW_ONLY
    hard_timeout: float | None = None
    startup_timeout: float | None = None
    retry_crashed: bool = False
    restart: RestartPolicy = RestartPolicy()

    def __post_init__(self) -> None:
        for name in ("hard_timeout", "startup_timeout"):
            seconds = getattr(self, name)
            if seconds is not None:
                check_seconds(name, seconds)

    @property
    def local(self) -> bool:
        """The model lives in another process."""
        return False


class Died(Exception):
    """The process at the other end has gone."""


class NeverBegan(Exception):
    """It has, and had not begun with what it was asked for, which may be asked again."""


class Overran(Exception):
    """There is no reply in time."""


class Interrupted(Exception):
    """Nobody waits for the reply."""


class Link(Protocol):
    """A connection to a process with a model: all that is there only as long as that lives."""

    channel: Channel
    page: ControlPage

    @property
    def watched(self) -> Sequence[int]:
        """Descriptors beside the channel's that want attention when they are readable."""
        ...

    def attend(self) -> bool:
        """One of those is: see to it. False if the process has ended."""
        ...

    def dump(self) -> None:
        """Have the process write its stacks to the log, if it can."""
        ...

    def kill(self) -> None:
        """End the process."""
        ...

    def died(self) -> str:
        """How it has ended: what follows the subject of a sentence."""
        ...

    @property
    def last_words(self) -> str:
        """The last lines that it has written to stderr."""
        ...

    def close(self) -> None:
        """Let go of everything, and of the process, which is ended if it is still there."""
        ...

    def leave_behind(self) -> None:
        """In a forked child: let go of what the parent has as well."""
        ...


class RemoteReplica:
    """A model in another process. What connects to it is up to the subclass.

    :param spec: what references to this model carry as their owner
    :param worker: what is done about crashes
    """

    _needed = (
        "Functions are to be importable (defined in a module, no lambda), and arguments to pickle"
    )

    def __init__(self, spec: ModelSpec, worker: RemoteWorker) -> None:
        self.restarts = Restarts(worker.restart)
        self._spec = spec
        self._worker = worker
        self._link: Link | None = None
        self._lost: Callable[[], object] = _nothing
        self._number = 0  # of the latest request
        self._streams = 0  # how many have begun
        self._used = NOTHING_USED
        self._used_before = self._used  # in processes that are gone
        self._poison = poison_of(spec)  # all replicas of the runner share it
        # Asking for descriptors takes longer than to wait for them: they are asked for again when
        # something has been seen to, or the link is another.
        self._descriptors: tuple[int, ...] | None = None
        self._watched: tuple[int, ...] | None = None  # what _poll waits for
        self._poll = select.poll()
        # Written by the inference thread, read under the scheduler's lock.
        self._running: tuple[Call, int] | None = None
        self._interrupted = False  # only ever set, by any thread
        self._interrupt = Latch()
        self.wake_up = RemoteLatch(self)

    # -- the model's life ----------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        """Whether its process has gone."""
        return self._link is None

    @abstractmethod
    def _connect(self) -> Link:
        """Start the process or find it, and send it what it needs to load the model.

        :raises OSError: that was not possible
        """

    def open(self, lost: Callable[[], object], /) -> None:
        """Start the process, and return when it has loaded the model and warmed it up.

        :raises NotReady: that took longer than ``startup_timeout``, or was interrupted
        :raises WorkerCrashed: the process died
        """
        self._lost = lost
        self._link = link = self._connect()
        self._descriptors = None
        self._used_before = self._used
        loaded = False
        try:
            reply = self._await(link, self._worker.startup_timeout)
            if reply.kind is Kind.RAISED:
                raise unpack_error(reply.body())
            loaded = True
        except Died:
            raise self._death(link, "while it loaded") from None
        except Interrupted:
            raise NotReady(
                f"the runner was stopped while its model {self._spec.name!r} was loaded"
            ) from None
        except Overran:
            self._kill(link)
            raise NotReady(
                f"the model {self._spec.name!r} did not load in {self._worker.startup_timeout:g} "
                f"s (startup_timeout): what its process was doing is in the log"
            ) from None
        finally:
            if not loaded:
                self._drop_link()

    def close(self) -> None:
        """Destroy the model where it lives, and end the process."""
        try:
            link = self._link
            if link is not None:
                self._stop(link)
        finally:
            self._drop_link()
            self.wake_up.close()
            self._interrupt.close()

    def _stop(self, link: Link) -> None:
        try:
            reply = self._ask(link, Kind.STOP, None, None)
        except (Died, Interrupted):
            return
        if reply.kind is Kind.RAISED:
            raise unpack_error(reply.body())
        self._see_off(link)

    def _see_off(self, link: Link) -> None:
        """The process is about to end by itself: give it time for that, and log what it says."""
        until = time.monotonic() + _FAREWELL
        while link.attend() and not self._interrupted:
            left = until - time.monotonic()
            if left <= 0.0:
                return
            self._wait_on((self._interrupt.fileno(), *link.watched), left)

    def interrupt(self) -> None:
        """Nobody waits any more: end the process. From any thread."""
        self._interrupted = True
        self._interrupt.release()

    def leave_behind(self) -> None:
        """In a forked child: close what would keep the parent's process from noticing its end."""
        leak(self)  # what it holds is the parent's
        if self._link is not None:
            self._link.leave_behind()

    def notice(self, call: Call, /) -> None:
        """The caller of ``call`` has left: let ``check_cancelled()`` know of it over there."""
        running = self._running
        link = self._link
        if running is None or link is None or running[0] is not call:
            return
        if call.given_up(time.monotonic()):
            link.page.cancelled = running[1]

    # -- calls ---------------------------------------------------------------------------------

    def execute(self, work: Work, context: Context, /) -> Any:
        """Run ``work`` in the process of the model.

        :raises WorkerCrashed: that died meanwhile, or has died twice of this very call
        :raises DeadlineExceeded: it was killed after ``hard_timeout``
        :raises TypeError: the function or its arguments do not pickle
        """
        del context  # variables of the caller's context stay on this side
        try:
            reply = self._begin(_EXECUTE, work)
        except WorkerCrashed as crash:
            if not self._worker.retry_crashed or self._interrupted:
                raise
            try:
                reply = self._begin(_EXECUTE, work)
            except NotReady:
                raise crash from None
        return self._value(reply)

    def iterate(self, work: Work, context: Context, /) -> Steps:
        """Begin a generator in the process of the model; return what steps it from here."""
        del context
        stream = self._next_stream()
        self._value(self._begin(Kind.ITERATE, work, stream))
        return RemoteSteps(self, self._linked(), stream)

    def _next_stream(self) -> int:
        """A number for a stream."""
        self._streams += 1
        return self._streams

    def step(self, link: Link, stream: int) -> Any:
        """The next item of a stream that has begun over that link."""
        if link is not self._link:
            raise WorkerCrashed(
                f"the process in which this stream ran has died, or was ended for another call's "
                f"sake (model {self._spec.name!r})"
            )
        reply = self._ask_for_call(link, Kind.NEXT, None, stream)
        if reply.kind is Kind.END:
            raise StopIteration
        return self._value(reply)

    def end(self, link: Link, stream: int) -> None:
        """Close a generator; it is gone already if its process is."""
        if link is self._link:
            self._value(self._ask_for_call(link, Kind.CLOSE, None, stream))

    def counted(self) -> Used:
        """What was used up to the latest reply."""
        return self._used

    def cpu_time(self) -> float:
        """The same of the CPU."""
        return self._used.seconds

    def _begin(self, kind: Kind, work: Work, stream: int = 0) -> Message:
        """Send a call; return the reply. Where none has begun with it, it is sent again."""
        for _ in range(_ATTEMPTS):
            link = self._link or self._linked()
            encoded = self._encode(link, work)
            if self._poison.known:
                self._refuse_poison(work, encoded)
            try:
                return self._ask_for_call(link, kind, encoded, stream, work)
            except NeverBegan:
                continue
        raise NotReady(
            f"the process of the model {self._spec.name!r} died {_ATTEMPTS} times before it began "
            f"with {name_of(work[0])}"
        )

    def _encode(self, link: Link, work: Work) -> Encoded:
        try:
            return link.channel.encode(work)
        except (NotReady, ForeignReference, OSError, MemoryError):
            raise
        except Exception as error:
            raise TypeError(
                f"{name_of(work[0])} and its arguments can't be sent to the process of the model: "
                f"{describe(error)}. {self._needed}"
            ) from error

    def _ask_for_call(
        self,
        link: Link,
        kind: Kind,
        encoded: Encoded | None,
        stream: int,
        work: Work | None = None,
    ) -> Message:
        """Send a request of the call that runs; return the reply.

        :param work: what has not begun before, if so
        """
        limit, call = self._worker.hard_timeout, self._announce()
        deadline = None if call is None else call.limit
        try:
            return self._ask(link, kind, encoded, limit, deadline=deadline, stream=stream)
        except Died:
            raise self._gone(link, call, work) from None
        except Overran:
            raise self._overran(link, _name(call)) from None
        except Interrupted:
            self._lose()
            raise WorkerCrashed("the runner was stopped, and its process with it") from None
        except CallCancelled:
            raise  # the function has ended, of that
        except BaseException:
            self._lose()  # its reply would be taken for the next call's
            raise
        finally:
            self._running = None

    def _announce(self) -> Call | None:
        """The call that is about to run; from now on it is noticed if its caller leaves."""
        call = here.current_call and here.current_call()
        if not isinstance(call, Call):
            return None
        self._running = call, self._number + 1
        if call.departure is not None:  # in the very moment
            self.notice(call)
        return call

    def _gone(self, link: Link, call: Call | None, work: Work | None) -> Exception:
        """What is to be raised when the process has died."""
        if work is not None and link.page.started != self._number:
            self._crashed(link, "before it began with the next call", None)
            return NeverBegan()
        return self._crashed(link, f"while {_name(call)} ran", work)

    def _crashed(self, link: Link, when: str, work: Work | None) -> WorkerCrashed:
        if work is not None:
            self._remember(link, work)
        error = self._death(link, when)
        logger.error("%s", error)
        self._lose()
        return error

    def _overran(self, link: Link, name: str) -> DeadlineExceeded:
        error = DeadlineExceeded(
            f"{name} ran for longer than hard_timeout ({self._worker.hard_timeout:g} s), and its "
            f"process was killed",
            started=True,
        )
        # Before its stacks. Who has called may have left long ago: nobody else would know why.
        logger.error("%s", error)
        self._kill(link)
        self._lose()
        return error

    def _remember(self, link: Link, work: Work) -> None:
        """``work`` has crashed its process: it is not to do so again and again."""
        try:
            # Not what was sent: the function may have changed that in place.
            self._poison.add(link.channel.encode(work).digest())
        except Exception:  # it pickles only once, or there is no memory left
            logger.debug("a call that has crashed can't be remembered", exc_info=True)

    def _death(self, link: Link, when: str) -> WorkerCrashed:
        error = WorkerCrashed(f"the process of the model {self._spec.name!r} {link.died()} {when}")
        if link.last_words:
            error.add_note(f"The last lines of its stderr:\n{link.last_words}")
        return error

    def _value(self, reply: Message) -> Any:
        if reply.kind is _RESULT:
            return _result(reply)
        if reply.kind is Kind.SKIPPED:
            raise CallCancelled("nobody waited for this call any more when its turn came")
        error = unpack_error(reply.body())
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame

    # -- requests ------------------------------------------------------------------------------

    def _ask(
        self,
        link: Link,
        kind: Kind,
        encoded: Encoded | None,
        limit: float | None,
        *,
        deadline: float | None = None,
        stream: int = 0,
    ) -> Message:
        self._number += 1
        try:
            link.channel.send(kind, encoded, number=self._number, deadline=deadline, stream=stream)
        except OSError:
            raise Died from None
        return self._await(link, limit)

    def _await(self, link: Link, limit: float | None) -> Message:
        """Wait for a reply, and see to what else comes.

        :param limit: seconds
        """
        until = None if limit is None else time.monotonic() + limit
        alive = True
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            ready = self._wait_on(self._descriptors or self._descriptors_of(link), left)
            if self._interrupted:
                link.kill()
                raise Interrupted
            reply = self._receive(link)
            # One to any other request is nobody's. That to open the model has no number.
            if reply is not None and reply.number in (0, self._number):
                if reply.used is not None:
                    self._used = reply.used.after(self._used_before)
                return reply
            if not alive:  # what it had to say before its death has been read
                raise Died
            if not ready or left == 0.0:  # what it writes may come without end
                raise Overran
            alive = self._attend(link)

    def _receive(self, link: Link) -> Message | None:
        """What has come over the channel, without waiting.

        :raises Died: nothing can come any more
        """
        try:
            return link.channel.receive_now()
        except (EOFError, OSError):
            raise Died from None
        except ValueError as error:
            # The model has written there, by a descriptor that it took for its own.
            text = f"the process of the model {self._spec.name!r} is killed: {error}"
            logger.error(text)  # noqa: TRY400  # the text says it all
            link.kill()
            raise Died from None

    def _descriptors_of(self, link: Link) -> tuple[int, ...]:
        """What to wait for while something is done over there."""
        self._descriptors = (self._interrupt.fileno(), link.channel.fileno(), *link.watched)
        return self._descriptors

    def _attend(self, link: Link) -> bool:
        self._descriptors = None
        return link.attend()

    def _wait_on(self, watched: tuple[int, ...], seconds: float | None) -> bool:
        """Wait until there is something to attend to; whether there is."""
        if watched is not self._watched:
            self._watched, self._poll = watched, select.poll()
            for fd in watched:
                self._poll.register(fd, select.POLLIN)
        return bool(self._poll.poll(None if seconds is None else min(seconds * 1000, LONGEST)))

    def idle(self, latch: Latch, timeout: float) -> bool:
        """Sleep until the latch is released, and see to what else comes. See ``RemoteLatch``."""
        until = None if timeout < 0 else time.monotonic() + timeout
        while not self._interrupted:
            link = self._link
            left = -1.0 if until is None else max(0.0, until - time.monotonic())
            if link is None:
                others: tuple[int, ...] = (self._interrupt.fileno(),)
            else:
                others = self._descriptors or self._descriptors_of(link)
            if latch.acquire(left, others):
                return True
            if link is not None and not self._still_there(link):
                self._crashed(link, "while it was idle", None)
                return False
            if until is not None and time.monotonic() >= until:
                return False
        return latch.acquire(0)  # whoever has released it relies on that

    def _still_there(self, link: Link) -> bool:
        try:
            said = self._receive(link)
        except Died:
            return False
        return said is None and self._attend(link)

    def _linked(self) -> Link:
        if self._link is None:  # it was lost in the midst of a batch, say
            self._reopen()
        link = self._link
        assert link is not None  # noqa: S101  # it has been opened
        return link

    def _reopen(self) -> None:
        pause = self.restarts.note()
        if self.restarts.broken:  # its thread waits with that, when the call has ended
            raise NotReady(
                f"the process of the model {self._spec.name!r} has died too often: see the log, "
                f"and RestartPolicy",
                retry_after=retry_after(pause),
            )
        try:
            self.open(self._lost)
        except Exception as error:
            raise NotReady(
                f"the model {self._spec.name!r} was lost and did not load again: "
                f"{describe(error)}",
                retry_after=retry_after(0.0),
            ) from error

    def _kill(self, link: Link) -> None:
        """End the process, which gets a moment to say what it was doing."""
        link.dump()
        patience, until = _MOMENT, time.monotonic() + _LONGEST
        while self._wait_on(tuple(link.watched), patience) and link.attend():
            patience = min(_PAUSE, until - time.monotonic())  # it has begun to write
            if patience <= 0.0:
                break
        link.kill()

    def _lose(self) -> None:
        self._drop_link()
        self._lost()

    def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()

    # -- calls that crash ----------------------------------------------------------------------

    def _refuse_poison(self, work: Work, encoded: Encoded) -> None:
        digest = encoded.digest()
        if self._poison.refuses(digest):
            error = WorkerCrashed(
                f"{name_of(work[0])} with these arguments has crashed the process of the model "
                f"{self._spec.name!r} {CRASHES} times, and is not run again"
            )
            if self._poison.is_news(digest):
                logger.warning("%s for %g s", error, FORGOTTEN_AFTER)
            raise error


class RemoteLatch:
    """What an inference thread sleeps on that is to notice when its model is lost.

    :param replica: sees to what comes while it sleeps
    """

    def __init__(self, replica: RemoteReplica) -> None:
        self._replica = replica
        self._latch = Latch()

    def acquire(self, *, timeout: float = -1) -> bool:
        """Sleep until released; False if the time is up, the model is lost, or interrupted."""
        return self._replica.idle(self._latch, timeout)

    def release(self) -> None:
        """Wake the one who sleeps."""
        self._latch.release()

    def close(self) -> None:
        """Let go of the descriptors."""
        self._latch.close()


class RemoteSteps:
    """A generator in another process. Used by the inference thread alone."""

    def __init__(self, replica: RemoteReplica, link: Link, stream: int) -> None:
        self._replica = replica
        self._link = link
        self._stream = stream

    def __next__(self) -> Any:
        return self._replica.step(self._link, self._stream)

    def close(self) -> None:
        """Run its ``finally`` blocks, if the process in which it has begun is still there."""
        self._replica.end(self._link, self._stream)


def _name(call: Call | None) -> str:
    return "a call" if call is None else call.name


def _result(reply: Message) -> Any:
    try:
        return reply.body()
    except Exception as error:
        error.add_note("(raised where the call's result was unpickled)")
        raise


def _nothing() -> None:
    """Nobody is told of a loss before the replica is opened."""


def reduce_reference(spec: ModelSpec) -> Callable[[ModelReference], Any]:
    """How a channel sends references to the model of ``spec``: as what they refer to there."""

    def reduce(reference: ModelReference) -> tuple[Any, tuple[Any, ...]]:
        owner, path = owner_and_path(reference)
        if owner is not spec:
            raise ForeignReference(reference)
        return refer, (path,)

    return reduce


def encode_spec(channel: Channel, spec: ModelSpec) -> Encoded:
    """What tells a process which model to load.

    :raises TypeError: what makes the model does not pickle
    """
    try:
        return channel.encode(spec)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise TypeError(
            f"{_guilty(channel, spec)} of {spec.name!r} can't be sent to the process of the "
            f"model: {describe(error)}. It is to be importable (a class, a method or a function "
            f"of a module, no lambda); functools.partial adds arguments"
        ) from error


def _guilty(channel: Channel, spec: ModelSpec) -> str:
    """Which part of ``spec`` does not pickle."""
    for name, part in (("load", spec.load), ("warmup", spec.warmup)):
        try:
            channel.encode(part)
        except Exception:
            return f"{name}={name_of(part)}"
    return "NativePolicy.contexts"
