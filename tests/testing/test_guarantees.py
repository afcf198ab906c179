"""What the queue promises holds in every run of the simulation, which drives the real one."""

from __future__ import annotations

import math

import hypothesis
import pytest
from hypothesis import strategies as st

from asgi_infer import QueuePolicy
from asgi_infer._batch import BatchCall
from asgi_infer._buffer import StreamCall
from asgi_infer._call import Call
from asgi_infer._queue_policy import Overload
from asgi_infer.testing import (
    Batching,
    Outcome,
    Report,
    Request,
    Simulation,
    poisson,
    steady,
)
from asgi_infer.testing._simulation import World

pytestmark = pytest.mark.unmeasured

OVERLOADS: list[Overload] = ["shed", "newest", "wait"]


# -- whatever comes ----------------------------------------------------------------------------


class WatchedWorld(World):
    """Looks at the books after every event, and at every function that begins."""

    def __init__(self, max_queue: int, max_bytes: int | None, policy: QueuePolicy) -> None:
        super().__init__(max_queue, max_bytes, policy)
        self.max_queue = max_queue
        self.max_bytes = max_bytes
        self.started: set[Call] = set()
        self.latest: dict[object, float] = {}  # arrival of the last one to start, of each class
        self.first_come_first_served = policy.overload != "newest"
        self.spending = False
        self.broken: list[str] = []

    def expect_that(self, true: bool, what: str) -> None:
        # Not raised where it is seen: that is inside functions, whose errors are their calls'.
        if not true:
            self.broken.append(f"{what}, at {self.clock.now}")

    def next_event(self, until: float) -> bool:
        happened = super().next_event(until)
        c, scheduler = self.counters, self.scheduler
        ended = c.completed + c.failed + c.cancelled + c.expired + c.rejected
        balanced = c.submitted == ended + scheduler.queued + c.running
        self.expect_that(balanced, "the books don't balance")
        self.expect_that(scheduler.queued <= self.max_queue, "too many calls wait")
        if self.max_bytes is not None:
            small = scheduler.queued_bytes <= self.max_bytes or scheduler.queued == 1
            self.expect_that(small, "too many bytes wait")
        return happened

    def spend(self, seconds: float) -> None:
        self.expect_that(not self.spending, "two functions run at once")
        for call in self.running():
            in_time = call.deadline is None or self.clock.now < call.deadline
            self.expect_that(call.departure is None and in_time, "nobody waits for what runs")
            if call not in self.started:
                self.begins(call)
            else:
                self.expect_that(type(call) is StreamCall, "a call runs twice")
        self.spending = True
        super().spend(seconds)
        self.spending = False

    def running(self) -> list[Call]:
        call = self.scheduler.slots[0].current()
        assert call is not None
        return [*call.members] if type(call) is BatchCall else [call]

    def begins(self, call: Call) -> None:
        self.started.add(call)
        # Batches leave out who would be too late in them: that one waits for the next.
        alone = type(call) is not BatchCall or call.deadline is None
        if self.first_come_first_served and alone:
            same = (call.priority, call.group if type(call) is BatchCall else None)
            in_order = self.latest.get(same, 0.0) <= call.arrived
            self.expect_that(in_order, "a call overtakes one of its class")
            self.latest[same] = call.arrived


class WatchedSimulation(Simulation):
    def _world(self) -> World:
        self.watched = WatchedWorld(self._max_queue, self._max_queue_bytes, self._policy)
        return self.watched


# Tenths, of which many are equal: things that happen in the same instant are the hard ones.
def tenths(least: int, most: int) -> st.SearchStrategy[float]:
    return st.integers(least, most).map(lambda number: number / 10)


BATCHINGS = [Batching(max_size=3, fixed=0.2, each=0.1, max_delay=delay) for delay in (0.0, 0.3)]

REQUESTS = st.builds(
    Request,
    at=tenths(0, 15),
    seconds=tenths(0, 4),
    timeout=st.sampled_from([None, None, 0.2, 0.5, 1.0, 2.0]),
    priority=st.integers(-1, 2),
    size=st.integers(0, 80),
    patience=st.sampled_from([None, None, None, 0.2, 0.7, 1.1]),
    retries=st.integers(0, 2),
    batching=st.sampled_from([None, None, None, *BATCHINGS]),
    items=st.sampled_from([0, 0, 0, 4]),
    pause=tenths(0, 5),
    buffer=st.integers(1, 2),
    stall_timeout=st.sampled_from([None, 0.3, 1.0]),
    interleave=st.booleans(),
)
POLICIES = st.builds(
    QueuePolicy,
    ageing=st.sampled_from([0.0, 0.5, 100.0]),
    overload=st.sampled_from(OVERLOADS),
    target=st.sampled_from([0.05, 0.5]),
    interval=st.sampled_from([0.0, 0.3]),
)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    requests=st.lists(REQUESTS, min_size=8, max_size=25),
    policy=POLICIES,
    max_queue=st.sampled_from([1, 3, 20]),
    max_bytes=st.sampled_from([None, 100]),
)
def test_whatever_comes(
    requests: list[Request], policy: QueuePolicy, max_queue: int, max_bytes: int | None
) -> None:
    """Conservation at every event; never two functions at once; no call runs twice, or when
    nobody waits for it; first come first served within a class; the queue within its bounds;
    each request ends once, in time; and at the end nothing is left."""
    simulation = WatchedSimulation(max_queue=max_queue, max_queue_bytes=max_bytes, queue=policy)
    report = simulation.run(requests)
    assert simulation.watched.broken == []
    assert sorted(map(id, requests)) == sorted(id(each.request) for each in report.outcomes)
    for outcome in report.of("completed"):
        if outcome.request.timeout is not None and not outcome.request.items:
            assert outcome.latency < outcome.request.timeout + 1e-9
    world = simulation.watched
    assert (world.scheduler.under_way(), world.scheduler.queued_bytes) == ([], 0)
    assert (world.counters.running, world.counters.failed) == (0, 0)
    assert world.scheduler.when_idle().done()


# -- the order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("overload", ["shed", "wait"])
def test_first_come_first_served_within_a_class(overload: Overload) -> None:
    """Three classes mixed, twice as many as can be served: within each they run in the order of
    their arrival."""
    requests = [
        request
        for priority in (0, 1, 2)
        for request in poisson(
            Request(priority=priority, timeout=5.0), rate=7.0, duration=20.0, seed=priority
        )
    ]
    simulation = WatchedSimulation(queue=QueuePolicy(overload=overload))
    report = simulation.run(requests)
    assert simulation.watched.broken == []
    assert len(simulation.watched.started) > 150
    for priority in (0, 1, 2):
        order = [each.arrived for each in report.of("completed", priority=priority)]
        assert order == sorted(order)


def flood(*, ageing: float, priority: int, max_queue: int, seconds: float) -> Report:
    """Some requests of a low class, in a flood of urgent ones that never lets up."""
    low = Request(at=1.0, seconds=seconds, priority=priority, retries=30)
    urgent = steady(Request(seconds=seconds), rate=2.0 / seconds, duration=30.0)
    policy = QueuePolicy(ageing=ageing)
    requests = steady(low, rate=2.0, duration=8.0) + urgent
    return Simulation(max_queue=max_queue, queue=policy).run(requests)


def longest_wait(report: Report, priority: int) -> float:
    return max(outcome.wait for outcome in report.of("completed", priority=priority))


@pytest.mark.parametrize(
    ("ageing", "priority", "max_queue", "seconds"),
    [(1.0, 1, 16, 0.1), (1.0, 5, 16, 0.1), (0.5, 10, 8, 0.2), (2.0, 3, 32, 0.05)],
)
def test_the_longest_wait_of_the_lowest_class(
    ageing: float, priority: int, max_queue: int, seconds: float
) -> None:
    """Under a flood of urgent calls a low one that was let in waits no longer than ``ageing`` for
    each step of priority, and than a full queue takes. It does wait as long as the first."""
    report = flood(ageing=ageing, priority=priority, max_queue=max_queue, seconds=seconds)
    longest = longest_wait(report, priority)
    bound = priority * ageing + max_queue * seconds
    assert priority * ageing < longest <= bound + 1e-9
    assert len(report.of("completed", priority=priority)) == 16


def test_without_ageing_there_is_no_longest_wait() -> None:
    """If priorities did not age, a low call would wait until the flood is over."""
    report = flood(ageing=1e6, priority=1, max_queue=16, seconds=0.1)
    assert longest_wait(report, 1) > 20.0


# -- overload ----------------------------------------------------------------------------------


def overloaded(overload: Overload, *, timeout: float = 2.0) -> Report:
    """A minute of twice as many calls as can be served: 20 a second, of 0.1 s."""
    requests = poisson(Request(seconds=0.1, timeout=timeout), rate=20.0, duration=60.0)
    return Simulation(queue=QueuePolicy(overload=overload)).run(requests)


@pytest.mark.parametrize("overload", OVERLOADS)
def test_goodput_under_overload(overload: Overload) -> None:
    """What can be served is served, to nine tenths at least, and in time."""
    report = overloaded(overload)
    assert report.goodput >= 0.9 / 0.1
    assert report.latency(1.0) <= 2.0


def test_goodput_of_a_queue_that_refuses_nothing_in_time() -> None:
    """The check can fail: clients that hang up without having said when are served too late."""
    requests = poisson(Request(seconds=0.1, timeout=None, patience=2.0), rate=20.0, duration=60.0)
    report = Simulation().run(requests)
    assert report.goodput < 0.9 / 0.1 or report.latency(0.5) > 1.8


@pytest.mark.parametrize("overload", ["shed", "newest"])
def test_those_who_are_served_under_overload_are_served_fast(overload: Overload) -> None:
    """Half of the time that they take where nothing is done about a queue that stands."""
    assert overloaded(overload).latency(0.5) < overloaded("wait").latency(0.5) / 2


def after_a_stall(overload: Overload) -> list[Outcome]:
    """The outcomes of what comes in the second second after a stall of 3 s: at 8 calls a second,
    of which 10 can be served."""
    requests = [Request(seconds=3.0), *steady(Request(at=0.05, timeout=4.0), rate=8, duration=9)]
    report = Simulation(queue=QueuePolicy(overload=overload)).run(requests)
    return [outcome for outcome in report.outcomes if 4.0 <= outcome.request.at < 5.0]


def mean_latency(outcomes: list[Outcome]) -> float:
    served = [outcome.latency for outcome in outcomes if outcome.ending == "completed"]
    return sum(served) / len(served) if served else math.inf


@pytest.mark.parametrize("overload", ["shed", "newest"])
def test_the_newest_are_served_fast_after_a_stall(overload: Overload) -> None:
    """The old ones do not make the new ones late: most are served, at once."""
    outcomes = after_a_stall(overload)
    assert sum(outcome.ending == "completed" for outcome in outcomes) >= 6
    assert mean_latency(outcomes) < 0.5
