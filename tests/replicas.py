"""Workers with several replicas in this very process, which lose their models when told to."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import Context
from typing import Any

from asgi_infer._call import Call, Work
from asgi_infer._errors import NotReady, WorkerCrashed
from asgi_infer._restarts import RestartPolicy, Restarts
from asgi_infer.native.procfs import ThreadUsage
from asgi_infer.workers._protocol import ModelSpec, Steps, Used

from .gates import LIMIT

AT_ONCE = RestartPolicy(max_restarts=10**6, backoff=0.0)
"""Nothing is ever broken, and nobody waits."""

GIVE_UP = RestartPolicy(max_restarts=0, recover_after=4 * LIMIT)
"""The first crash breaks it, for longer than any test lasts."""


class Crash(BaseException):
    """A function that raises this takes its replica with it."""


class Replicas:
    """A worker with ``count`` replicas, which all write into the same notes.

    :param count: how many
    :param policy: when a lost one is opened again
    :ivar made: the replicas, by number; those of the latest start
    :ivar notes: what has happened, in order
    :ivar opening: called with a replica's number where it loads
    :ivar at_once: how many calls run now, and the most there have been
    """

    local = False

    def __init__(self, count: int, policy: RestartPolicy = AT_ONCE) -> None:
        self.replicas = count
        self.policy = policy
        self.made: dict[int, FakeReplica] = {}
        self.opening: Callable[[int], object] = lambda number: None
        self._lock = threading.Lock()  # guards these:
        self.notes: list[str] = []
        self.at_once = 0
        self.most = 0

    def replica(self, spec: ModelSpec, number: int, /) -> FakeReplica:
        del spec
        self.made[number] = FakeReplica(self, number)
        return self.made[number]

    def note(self, what: str) -> None:
        with self._lock:
            self.notes.append(what)

    def count(self, what: str) -> int:
        """How often that has happened."""
        with self._lock:
            return Counter(self.notes)[what]

    def enter(self, step: int) -> None:
        """A call begins (1), or has ended (-1)."""
        with self._lock:
            self.at_once += step
            self.most = max(self.most, self.at_once)


class FakeReplica:
    """As a replica in another process; what would end that ends this one.

    Functions know where they run by ``this_replica()``.

    :ivar interrupted: nobody waits any more for what it does
    :ivar noticed: the calls whose callers have left while they ran
    """

    def __init__(self, worker: Replicas, number: int) -> None:
        self.number = number
        self.restarts = Restarts(worker.policy)
        self.lost = True
        self.interrupted = threading.Event()
        self.noticed: list[Call] = []
        self.wake_up = LosableLatch(self)
        self.dying = False  # guarded by the latch's condition
        self._worker = worker
        self._lives = 0
        self._busy = False
        self._closed = False
        self._lost: Callable[[], object] = lambda: None
        self._home = 0

    def open(self, lost: Callable[[], object], /) -> None:
        self._worker.note(f"open {self.number}")
        if self.interrupted.is_set():
            raise NotReady("stopped while it loaded")
        self._worker.opening(self.number)
        self._lost = lost
        self._home = self._home or threading.get_ident()
        self._lives += 1
        self.lost = self.dying = False

    def execute(self, work: Work, context: Context, /) -> Any:
        func, args = work
        return self._run(lambda: context.run(func, *args))

    def iterate(self, work: Work, context: Context, /) -> Steps:
        func, args = work
        return _FakeSteps(self, context.run(func, *args), self._lives)

    def step(self, generator: Iterator[Any], life: int) -> Any:
        """The next item, if it is still the same model."""
        if self.lost or life != self._lives:
            raise WorkerCrashed("the model of this stream has gone")
        return self._run(lambda: next(generator))

    def _run(self, func: Callable[[], Any]) -> Any:
        assert self._home == threading.get_ident(), "on another's thread"
        assert not self._busy, "two calls at once in one slot"
        assert not self.lost, "without a model"
        _here.replica = self
        self._busy = True
        self._worker.enter(1)
        try:
            return func()
        except Crash:
            self.lose_now()
            raise WorkerCrashed("it took the model with it") from None
        finally:
            self._worker.enter(-1)
            self._busy = False

    def close(self) -> None:
        assert not self._closed, "closed twice"
        self._closed = True
        self._worker.note(f"close {self.number}")

    def interrupt(self) -> None:
        self.interrupted.set()
        self.wake_up.look()

    def leave_behind(self) -> None:
        self._worker.note(f"leave behind {self.number}")

    def notice(self, call: Call, /) -> None:
        self.noticed.append(call)

    def counted(self) -> ThreadUsage:
        return Used()

    def cpu_time(self) -> float:
        return 0.0

    def die(self) -> None:
        """From any thread: the model goes while the replica is idle, as soon as it is."""
        self.dying = True
        self.wake_up.look()

    def lose_now(self) -> None:
        """On its own thread: the model has gone."""
        self.lost = True
        self._worker.note(f"lost {self.number}")
        self._lost()


class _FakeSteps:
    def __init__(self, replica: FakeReplica, generator: Any, life: int) -> None:
        self._replica = replica
        self._generator = generator
        self._life = life

    def __next__(self) -> Any:
        return self._replica.step(self._generator, self._life)

    def close(self) -> None:
        self._generator.close()


class LosableLatch:
    """A latch that lets go by itself if the model of its replica goes, or it is interrupted."""

    def __init__(self, replica: FakeReplica) -> None:
        self._replica = replica
        self._condition = threading.Condition()
        self._released = False

    def acquire(self, *, timeout: float = -1) -> bool:
        with self._condition:
            self._condition.wait_for(self._ready, None if timeout < 0 else timeout)
            if self._released:
                self._released = False
                return True
            goes = self._replica.dying and not self._replica.lost
        if goes:
            self._replica.lose_now()
        return False

    def release(self) -> None:
        with self._condition:
            self._released = True
            self._condition.notify()

    def look(self) -> None:
        """Have the one who sleeps look again."""
        with self._condition:
            self._condition.notify()

    def _ready(self) -> bool:
        replica = self._replica
        goes = replica.dying and not replica.lost
        return self._released or goes or replica.interrupted.is_set()


class _Here(threading.local):
    replica: FakeReplica | None = None


_here = _Here()


def this_replica() -> FakeReplica:
    """The one that runs the current call."""
    assert _here.replica is not None
    return _here.replica


def crash() -> None:
    """Take the replica along."""
    raise Crash
