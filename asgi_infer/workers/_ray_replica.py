"""The runner's side of a model in a Ray actor.

What crosses are requests and replies as to any other process; the actor's method call takes the
place of the channel, and its death that of a descriptor that becomes readable.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from .._errors import CallCancelled, describe
from ._channel import Kind, Message
from ._latch import Latch
from ._protocol import ModelSpec
from ._ray_host import Pickled, RayHost, dumps, pack, unpack
from ._remote import (
    Died,
    Interrupted,
    Link,
    Overran,
    RemoteReplica,
    reduce_reference,
)

if TYPE_CHECKING:
    from .ray import RayWorker

# Not by name, for type checkers would read all of Ray.
ray: Any = import_module("ray")
_exceptions: Any = import_module("ray.exceptions")
_DEAD: int = import_module("ray.core.generated.gcs_pb2").ActorTableData.ActorState.DEAD

logger = logging.getLogger("asgi_infer")


class RayReplica(RemoteReplica):
    """A model in a Ray actor.

    :param spec: what references to this model carry as their owner
    :param worker: what the actors are made with
    """

    _needed = "Arguments are to pickle, and so is what a lambda or an inner function refers to"

    def __init__(self, spec: ModelSpec, worker: RayWorker) -> None:
        super().__init__(spec, worker)
        self._options = actor_options(spec, worker)

    def _connect(self) -> Link:
        if not ray.is_initialized():  # or Ray starts a cluster of its own accord, here and now
            raise RuntimeError(
                "there is no Ray cluster to run the model on: call ray.init(...) before the "
                "runner starts, with the address of the cluster, or without for this machine"
            )
        return cast("Link", RayLink(self._spec, self._options))

    def interrupt(self) -> None:
        """Nobody waits any more: kill the actor. From any thread."""
        super().interrupt()
        link = self._link
        if link is not None:
            link.kill()

    def _await(self, link: Link, limit: float | None) -> Message:
        if self._interrupted:  # before there was anything to kill
            link.kill()
        try:
            reply = _ray(link).channel.receive(limit)
        except Died:
            if self._interrupted:
                raise Interrupted from None
            raise
        assert reply.used is not None  # noqa: S101  # an actor always tells
        self._used = reply.used.after(self._used_before)
        return reply

    def idle(self, latch: Latch, timeout: float) -> bool:
        """Sleep until the latch is released, and see whether the actor is still there then.

        Ray tells of an actor's death who asks. So the model that was lost while nobody called it
        is loaded again when somebody does, and the call has not been sent anywhere by then.
        """
        if self._interrupted:
            return False
        woken = latch.acquire(timeout, (self._interrupt.fileno(),))
        link = self._link
        if link is not None and _ray(link).channel.gone:
            self._crashed(link, "while it was idle", None)
        return woken

    def _kill(self, link: Link) -> None:
        link.kill()


class RayLink:
    """An actor, as a replica sees any process with a model.

    :param spec: of the model
    :param options: of the actor
    """

    watched: Sequence[int] = ()
    last_words = ""  # Ray keeps them, and prints them if it is told to

    def __init__(self, spec: ModelSpec, options: dict[str, Any]) -> None:
        opening = _opening(spec)
        self.actor: Any = ray.remote(RayHost).options(**options).remote()
        self.channel = self.page = RayChannel(self.actor, opening, spec)

    def attend(self) -> bool:
        """There is nothing to wait for that would tell of an actor's end."""
        return False

    def dump(self) -> None:
        """The stacks of an actor are to be had from ``ray stack`` and the dashboard."""

    def kill(self) -> None:
        """End the actor. From any thread."""
        try:
            if ray.is_initialized():  # or Ray would start a cluster
                ray.kill(self.actor)
        except Exception as error:  # of a cluster that was left meanwhile
            logger.debug("could not kill an actor: %s", describe(error))

    def died(self) -> str:
        """How it has ended."""
        return self.channel.how

    def close(self) -> None:
        """Let go of the actor, which is ended if it is still there."""
        self.channel.close()
        self.kill()

    def leave_behind(self) -> None:
        """In a forked child the connection to the cluster is the parent's: leave it alone."""


class RayChannel:
    """Requests to an actor, and its replies; what a channel and its page are to other processes.

    :param actor: is sent requests
    :param opening: the first one: the spec
    :param spec: what references to its model carry as their owner
    :ivar started: the latest request that may have begun: one that was sent
    :ivar how: what became of the actor, as far as is known
    """

    def __init__(self, actor: Any, opening: Pickled, spec: ModelSpec) -> None:
        self.started = 0
        self.how = "has died"
        self._actor = actor
        self._reduce = reduce_reference(spec)
        self._reply: Any = actor.open.remote(pack(Kind.OPEN, opening))
        # Written by the inference thread; read under the scheduler's lock as well.
        self._sent: tuple[int, Any] = (0, None)
        self._cancelled = 0
        self._left: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._canceller = threading.Thread(
            target=_cancel_all, args=(self._left,), name=f"{spec.name}-cancel", daemon=True
        )
        self._canceller.start()

    def encode(self, body: object) -> Pickled:
        """Pickle it."""
        return dumps(body, self._reduce)

    def send(
        self,
        kind: Kind,
        body: Pickled | None,
        *,
        number: int,
        deadline: float | None,
        stream: int,
    ) -> None:
        """Have the actor answer a request.

        :raises OSError: there is no such actor (any more)
        """
        seconds = math.inf if deadline is None else deadline - time.monotonic()
        if self.gone:
            raise BrokenPipeError
        try:
            self._reply = self._actor.answer.remote(
                pack(kind, body, stream=stream, seconds=seconds)
            )
        except Exception as error:
            self.how = f"can't be reached ({describe(error)})"
            raise BrokenPipeError from error
        self.started = number
        if kind not in (Kind.CLOSE, Kind.STOP):  # Ray would drop one that has not begun
            self._sent = number, self._reply
            if self._cancelled == number:
                self._left.put(self._reply)

    def receive(self, limit: float | None) -> Message:
        """Wait for the reply.

        :param limit: seconds
        :raises Died: the actor has gone, or its machine, or the connection
        :raises Overran: there is no reply in time
        :raises CallCancelled: nobody waits for it, and the function has ended
        """
        reply, self._reply = self._reply, None
        try:
            return unpack(ray.get(reply, timeout=limit))
        except _exceptions.GetTimeoutError:
            raise Overran from None
        except _exceptions.TaskCancelledError:
            raise CallCancelled("nobody waits for this call any more: cancelled") from None
        except (Exception, SystemExit) as error:  # the latter where Ray is shut down meanwhile
            self.how = f"has died ({_why(error)})"
            raise Died from None
        finally:
            self._sent = (0, None)

    @property
    def cancelled(self) -> int:
        """The latest request that nobody waits for any more. Set under the scheduler's lock."""
        return self._cancelled

    @cancelled.setter
    def cancelled(self, number: int) -> None:
        self._cancelled = number
        sent, reply = self._sent
        if sent == number:
            self._left.put(reply)

    @property
    def gone(self) -> bool:
        """Whether the actor is known to be dead, or there is no cluster any more."""
        try:
            return bool(self._actor._get_local_state() == _DEAD)  # noqa: SLF001  # Ray Data's too
        except Exception:
            return True

    def close(self) -> None:
        """End the thread that tells of callers who have left."""
        self._left.put(None)
        self._canceller.join()


def actor_options(spec: ModelSpec, worker: RayWorker) -> dict[str, Any]:
    """What the actors of ``worker`` are made with."""
    ours: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 1}
    if spec.native.threads is not None:
        ours["num_cpus"] = spec.native.threads
    return ours | dict(worker.options)


def _opening(spec: ModelSpec) -> Pickled:
    try:
        return dumps(spec)
    except Exception as error:
        raise TypeError(
            f"load, warmup or NativePolicy.contexts of {spec.name!r} can't be sent to the actor: "
            f"{describe(error)}. What they refer to is to pickle: load in the actor what does not"
        ) from error


def _ray(link: Link) -> RayLink:
    return cast("RayLink", link)


def _cancel_all(refs: queue.SimpleQueue[Any]) -> None:
    """Tell the actor of tasks that nobody waits for: ``ray.cancel`` takes up to a millisecond,
    for which nobody is to hold the scheduler's lock.
    """
    while (ref := refs.get()) is not None:
        try:
            ray.cancel(ref)
        except Exception as error:  # it has ended, or there is no cluster any more
            logger.debug("could not cancel a task: %s", describe(error))
        del ref


def _why(error: BaseException) -> str:
    """The one line of Ray's page-long messages that tells what has happened."""
    if isinstance(error, SystemExit):
        return "the connection to the cluster was shut down"
    lines = [line.strip() for line in describe(error).splitlines()]
    told = [line for line in lines if line.startswith(_BECAUSE)]
    line = (told or lines)[0].removeprefix(_BECAUSE)
    return line.partition("Some common causes")[0].strip(" .")


_BECAUSE = "The actor is dead because "
