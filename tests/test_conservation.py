"""The law of conservation: whatever happens in whatever order, no call is lost or counted twice.

A machine submits, awaits, cancels, finishes, stops and restarts at random, and time passes when
it says so. Every call's function is held open until a step lets it end, and the event loop runs
in steps only, so that after each step it is known what became of every call. That must be what
the books say.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from asgi_infer import (
    ClientDisconnected,
    DeadlineExceeded,
    Draining,
    InferenceRunner,
    NotReady,
    QueueFull,
    WorkerCrashed,
    _future,
    _handoff,
)
from asgi_infer._call import Call, current_caller

from .gates import LIMIT
from .polling import until_true
from .replicas import Replicas, crash

pytestmark = pytest.mark.unmeasured

REFUSALS = (QueueFull, Draining, DeadlineExceeded, NotReady)


SECONDS = st.none() | st.integers(1, 5)


class Clock:
    """What ``time`` is for the package and its event loop."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


CLOCK = Clock()


class Failure(Exception):
    """What a function raises when it is told to fail."""


class Client:
    """A client that can hang up, as the middleware's does."""

    def __init__(self) -> None:
        self.deadline: float | None = None
        self.hang_up: Callable[[], None] = lambda: None

    def joined(self, call: Call, drop: Callable[[Call], None], /) -> None:
        self.hang_up = lambda: drop(call)

    def left(self, call: Call, /) -> None:
        self.hang_up = lambda: None


class Thread:
    """What the runner's thread is doing, as told by the functions themselves."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside: list[Use] = []
        self.most = 0

    def enter(self, use: Use) -> None:
        with self.lock:
            self.inside.append(use)
            self.most = max(self.most, len(self.inside))

    def leave(self, use: Use) -> None:
        with self.lock:
            self.inside.remove(use)


class Use:
    """One call: what was done with it, and what came of it.

    :ivar crashes: it takes its replica with it
    :ivar outcome: None while somebody waits
    :ivar late: whether its caller left while it ran
    """

    def __init__(self, thread: Thread, fails: bool) -> None:
        self.thread = thread
        self.fails = fails
        self.crashes = False
        self.release = threading.Event()
        self.runs = 0
        self.waiting: Any = None  # a concurrent future or a task
        self.client = Client()
        self.context = contextvars.copy_context()
        self.context.run(current_caller.set, self.client)
        self.outcome: str | None = None
        self.late = False

    def __call__(self) -> Use:
        self.thread.enter(self)
        try:
            self.runs += 1
            assert self.release.wait(4 * LIMIT)
        finally:
            self.thread.leave(self)
        if self.crashes:
            crash()
        if self.fails:
            raise Failure(self)
        return self

    @property
    def inside(self) -> bool:
        """Whether the function runs."""
        return self in self.thread.inside

    def look(self) -> None:
        """Note the outcome, if there is one now."""
        if self.outcome is not None or self.waiting is None or not self.waiting.done():
            return
        self.outcome = "cancelled" if self.waiting.cancelled() else self._look_inside()
        self.late = self.inside

    def _look_inside(self) -> str:
        error = self.waiting.exception()
        if error is None:
            assert self.waiting.result() is self
            return "completed"
        if isinstance(error, WorkerCrashed):
            assert self.crashes
            return "failed"
        if isinstance(error, Failure):
            assert error.args == (self,)
            return "failed"
        if type(error) is DeadlineExceeded:
            return "expired"
        if type(error) is QueueFull:  # it was accepted, and has waited for too much of its time
            return "rejected"
        assert type(error) in (Draining, ClientDisconnected, NotReady)
        return "cancelled"


class Conservation(stateful.RuleBasedStateMachine):
    """The machine."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.loop.time = CLOCK.monotonic  # type: ignore[method-assign]  # as asyncio's tests do
        self.slots = 1
        self.runner = InferenceRunner[None](max_queue=3)
        self.thread = Thread()
        self.uses: list[Use] = []
        self.starts: list[asyncio.Task[None]] = []

    # -- what is done --------------------------------------------------------------------------

    @stateful.rule(failures=st.lists(st.booleans(), min_size=1, max_size=5), seconds=SECONDS)
    def submit(self, failures: list[bool], seconds: int | None) -> None:
        for fails in failures:
            use = self.new_use(fails)
            if seconds is not None:
                use.client.deadline = CLOCK.now + seconds
            try:
                use.waiting = use.context.run(self.runner.submit, use)
            except REFUSALS:
                use.outcome = "rejected"
            until_true(self.settled)

    @stateful.rule(fails=st.booleans(), priority=st.integers(-1, 1), seconds=SECONDS)
    def call(self, fails: bool, priority: int, seconds: int | None) -> None:
        use = self.new_use(fails)
        rejected = self.runner.statistics().rejected
        call: Any = self.runner.run(use, timeout=seconds, priority=priority)
        use.waiting = self.loop.create_task(call, context=use.context)
        self.turn()
        if self.runner.statistics().rejected > rejected:
            assert isinstance(use.waiting.exception(), REFUSALS)
            use.outcome = "rejected"

    @stateful.rule(seconds=st.integers(1, 3))
    def let_time_pass(self, seconds: int) -> None:
        CLOCK.now += seconds
        self.turn()

    @stateful.precondition(lambda self: self.awaited)
    @stateful.rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.awaited)).waiting.cancel()

    @stateful.precondition(lambda self: self.awaited)
    @stateful.rule(data=st.data())
    def hang_up(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.awaited)).client.hang_up()

    @stateful.precondition(lambda self: self.thread.inside)
    @stateful.rule(number=st.integers(0, 2))
    def finish(self, number: int) -> None:
        use = self.thread.inside[number % len(self.thread.inside)]
        use.release.set()
        until_true(lambda: not use.inside)

    @stateful.rule(cancel=st.booleans())
    def stop(self, cancel: bool) -> None:
        self.runner.shutdown(wait=False, cancel_futures=cancel)

    @stateful.rule()
    def restart(self) -> None:
        self.stop(cancel=False)
        self.start()

    @stateful.rule()
    def stop_now(self) -> None:
        self.loop.run_until_complete(self.runner.aclose(grace=0))

    @stateful.rule()
    def start(self) -> None:
        self.starts.append(self.loop.create_task(self.runner.start()))
        self.turn()

    # -- how -----------------------------------------------------------------------------------

    def new_use(self, fails: bool) -> Use:
        self.uses.append(Use(self.thread, fails))
        return self.uses[-1]

    @property
    def awaited(self) -> list[Use]:
        return [use for use in self.uses if use.outcome is None]

    def turn(self, task: asyncio.Task[Any] | None = None) -> None:
        """Let the loop do what it can do at once, or until ``task`` is done."""

        async def turns() -> None:
            if task is not None:
                await asyncio.wait([task], timeout=LIMIT)
            for _ in range(5):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def settled(self) -> bool:
        """Whether the threads are where they stay: in functions, or asleep with nothing to do."""
        if self.runner._thread is None:
            return True
        schedulers = self.runner._thread.schedulers
        first = schedulers[0]
        running = [slot.running is not None for slot in first.slots if not slot.over]
        if len(schedulers) > 1 and not any(running):  # the next one's threads wait for its end
            return False
        busy = all(running)
        now = self.runner.statistics()
        return now.running == len(self.thread.inside) and (busy or first.queued == 0)

    # -- what holds ----------------------------------------------------------------------------

    @stateful.invariant()
    def books_balance(self) -> None:
        now = self.runner.statistics()
        ended = now.completed + now.failed + now.cancelled + now.expired + now.rejected
        assert now.submitted == ended + now.queued + now.running
        assert now.running <= self.slots
        assert self.thread.most <= self.slots

    @stateful.invariant()
    def books_say_what_happened(self) -> None:
        until_true(self.settled)
        self.turn()
        for use in self.uses:
            use.look()
        now = self.runner.statistics()
        assert now.submitted == len(self.uses)
        for outcome in ("completed", "failed", "cancelled", "expired", "rejected"):
            # What runs on without its caller is counted when it ends.
            uses = [use for use in self.uses if use.outcome == outcome and not use.inside]
            assert getattr(now, outcome) == len(uses), outcome
        assert now.late == sum(use.late for use in self.uses)
        assert now.queued == sum(not use.inside for use in self.awaited)

    @stateful.invariant()
    def no_call_runs_twice_or_in_vain(self) -> None:
        for use in self.uses:
            delivered = use.outcome in ("completed", "failed")
            awaited = use.outcome is None
            assert use.runs <= 1
            assert use.runs == 1 or not delivered
            assert use.runs == 0 or delivered or awaited or use.late

    def teardown(self) -> None:
        for use in self.uses:
            use.release.set()
        self.runner.shutdown()
        until_true(self.settled)
        tasks = [use.waiting for use in self.uses if isinstance(use.waiting, asyncio.Task)]
        for task in (*tasks, *self.starts):
            self.turn(task)
        for start in self.starts:  # one that was stopped while it loaded
            assert start.exception() is None or isinstance(start.exception(), NotReady)
        self.books_balance()
        self.books_say_what_happened()
        assert all(use.outcome is not None for use in self.uses)
        self.loop.close()


class ConservationOfReplicas(Conservation):
    """The same with several replicas, which are lost at random and come back at once."""

    @stateful.initialize(slots=st.integers(1, 3))
    def open(self, slots: int) -> None:
        self.slots = slots
        self.worker = Replicas(slots)
        self.runner = InferenceRunner[None](max_queue=3, worker=self.worker)

    @stateful.precondition(lambda self: self.thread.inside)
    @stateful.rule(number=st.integers(0, 2))
    def crash(self, number: int) -> None:
        self.thread.inside[number % len(self.thread.inside)].crashes = True
        self.finish(number)

    @stateful.precondition(lambda self: self.worker.made)
    @stateful.rule(number=st.integers(0, 2))
    def lose(self, number: int) -> None:
        self.worker.made[number % self.slots].die()

    @stateful.invariant()
    def never_two_on_one_replica(self) -> None:
        assert self.worker.most <= self.slots


@pytest.mark.parametrize("histories", [50, pytest.param(1000, marks=pytest.mark.soak)])
def test_conservation(monkeypatch: pytest.MonkeyPatch, histories: int) -> None:
    """After every step of any history the books balance, and say what happened to each call."""
    check(monkeypatch, Conservation, histories)


@pytest.mark.parametrize("histories", [12, pytest.param(1000, marks=pytest.mark.soak)])
def test_conservation_of_replicas(monkeypatch: pytest.MonkeyPatch, histories: int) -> None:
    """So they do with several threads, and with models that go in the midst of it."""
    check(monkeypatch, ConservationOfReplicas, histories)


def check(
    monkeypatch: pytest.MonkeyPatch, machine: type[stateful.RuleBasedStateMachine], histories: int
) -> None:
    for module in (_future, _handoff):
        monkeypatch.setattr(module, "time", CLOCK)
    monkeypatch.setattr(InferenceRunner, "_clock", CLOCK.monotonic)
    settings = hypothesis.settings(max_examples=histories, stateful_step_count=30, deadline=None)
    stateful.run_state_machine_as_test(machine, settings=settings)
