"""The simulation: clients do what clients do, at the times at which they would do it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from asgi_infer import QueuePolicy
from asgi_infer.testing import Batching, Outcome, Request, Simulation, burst, steady


def fates(outcomes: Any) -> list[tuple[str, float, float | None, float]]:
    return [(each.ending, each.arrived, each.started, each.ended) for each in outcomes]


def only(outcomes: Any) -> Outcome:
    (outcome,) = outcomes
    return outcome  # type: ignore[no-any-return]


def test_calls_run_one_after_the_other() -> None:
    """Each begins when the one before it ends, or when it comes."""
    requests = [Request(at=1.0, seconds=2.0), Request(at=2.0, seconds=1.0), Request(at=9.0)]
    report = Simulation().run(requests)
    assert fates(report.outcomes) == [
        ("completed", 1.0, 1.0, 3.0),
        ("completed", 2.0, 3.0, 4.0),
        ("completed", 9.0, 9.0, 9.1),
    ]
    assert report.duration == 9.1
    assert report.busy == pytest.approx(3.1)


def test_nothing_to_do() -> None:
    """No requests, no outcomes."""
    report = Simulation().run([])
    assert (report.outcomes, report.duration, report.busy) == ((), 0.0, 0.0)


def test_time_limits() -> None:
    """A client whose time is up leaves at that moment: it waits no longer, or its call is late."""
    requests = [Request(seconds=3.0, timeout=2.0), Request(seconds=1.0, timeout=1.0)]
    report = Simulation(queue=QueuePolicy(overload="wait")).run(requests)
    assert fates(report.outcomes) == [("expired", 0.0, None, 1.0), ("expired", 0.0, 0.0, 2.0)]
    assert report.late == 1


def test_clients_that_hang_up() -> None:
    """After their patience: waiting, running, or never, if they have their answer by then."""
    report = Simulation().run(burst(Request(seconds=2.0, patience=1.0), 2))
    assert fates(report.outcomes) == [
        ("disconnected", 0.0, 0.0, 1.0),
        ("disconnected", 0.0, None, 1.0),
    ]
    assert report.busy == 2.0
    assert only(Simulation().run([Request(patience=1.0)]).outcomes).ending == "completed"


def test_priorities() -> None:
    """The lower number is served first."""
    requests = [Request(), Request(priority=1), Request(priority=0)]
    report = Simulation().run(requests)
    assert [outcome.request.priority for outcome in report.outcomes] == [0, 0, 1]


def test_bounds() -> None:
    """What is too much is refused: of calls, and of bytes."""
    report = Simulation(max_queue=2).run(burst(Request(at=1.0), 4))  # of which one runs
    assert [outcome.ending for outcome in report.outcomes] == ["refused", *["completed"] * 3]
    requests = [Request(), *burst(Request(at=0.01, size=60), 2)]
    report = Simulation(max_queue_bytes=100).run(requests)
    assert [outcome.ending for outcome in report.outcomes] == ["refused", "completed", "completed"]


def test_clients_that_come_again() -> None:
    """After the whole seconds that ``Retry-After`` says, as often as they are said to; the seed
    decides how many seconds, and leaves the state of ``random`` alone."""
    known = [Request(seconds=4.0), Request(at=5.0, seconds=4.0), Request(at=5.5)]
    requests = [*known, *burst(Request(at=6.0, retries=1), 6), Request(at=6.0)]
    state = random.getstate()
    report = Simulation(max_queue=1).run(requests)
    assert random.getstate() == state
    assert next(outcome.attempts for outcome in report.of("refused")) == 1
    again = [outcome for outcome in report.outcomes if outcome.attempts == 2]
    assert len(again) == 6
    assert {outcome.arrived for outcome in again} <= set(map(float, range(13, 22)))
    assert fates(Simulation(max_queue=1).run(requests).outcomes) == fates(report.outcomes)
    other = Simulation(max_queue=1, seed=1).run(requests)
    assert fates(other.outcomes) != fates(report.outcomes)


def test_what_is_dropped_comes_again() -> None:
    """A client whose call was shed has been told when to come again."""
    policy = QueuePolicy(overload="shed", target=0.1, interval=0.1)
    requests = steady(Request(seconds=0.2, timeout=1.5, retries=9), rate=10.0, duration=3.0)
    report = Simulation(queue=policy).run(requests)
    assert len(report.of("completed")) == len(requests)
    once = [Request(seconds=0.2, timeout=1.5)] * 5 + steady(
        Request(seconds=0.2, timeout=1.5), rate=10.0, duration=3.0
    )
    assert Simulation(queue=policy).run(once).of("dropped")


def test_batches() -> None:
    """What waits while a batch runs is the next one; each function has batches of its own."""
    one, other = (Batching(max_size=4, fixed=1.0, each=0.5) for _ in range(2))
    requests = [*burst(Request(batching=one), 6), Request(batching=other)]
    report = Simulation().run(requests)
    assert report.batch_sizes == {1: 3, 4: 1}
    assert [outcome.ended for outcome in report.outcomes] == [1.5, *[4.5] * 4, 6.0, 7.5]


def test_batches_that_are_waited_for() -> None:
    """With ``max_delay`` the model stands idle for a moment, and batches get larger."""
    slow = Request(batching=Batching(max_size=8, fixed=0.1, each=0.001, max_delay=0.05))
    requests = steady(slow, rate=100.0, duration=2.0)
    requests += [Request(at=3.0, batching=slow.batching)]
    report = Simulation().run(requests)
    assert len(report.of("completed")) == 201


@pytest.mark.parametrize("interleave", [False, True])
def test_streams(interleave: bool) -> None:
    """Items are made ahead as the buffer allows, and the consumer takes its time."""
    stream = Request(items=4, seconds=1.0, pause=2.0, buffer=2, interleave=interleave)
    report = Simulation().run([stream, Request(at=0.5, seconds=0.5)])
    of_call, of_stream = sorted(report.outcomes, key=lambda outcome: outcome.request.items)
    assert (of_stream.ending, of_stream.started) == ("completed", 0.0)
    assert of_stream.ended == 1.0 + 4 * 2.0
    assert of_call.started == (1.0 if interleave else 5.0)


@pytest.mark.parametrize("interleave", [False, True])
def test_consumers_that_stall(interleave: bool) -> None:
    """A consumer that takes nothing for too long is left behind."""
    stream = Request(
        items=9, seconds=0.1, pause=5.0, buffer=1, stall_timeout=2.0, interleave=interleave
    )
    report = Simulation().run([stream, Request(at=4.0)])
    endings = {outcome.request.items: outcome.ending for outcome in report.outcomes}
    assert endings == {0: "completed", 9: "expired"}
    patient = Request(items=3, seconds=0.1, pause=5.0, buffer=1, stall_timeout=None)
    assert only(Simulation().run([patient]).outcomes).ending == "completed"


def test_streams_that_end_early() -> None:
    """For want of time while an item is awaited, or because the client hangs up."""
    slow = Request(items=3, seconds=1.0, timeout=1.5)
    assert fates(Simulation().run([slow]).outcomes) == [("expired", 0.0, 0.0, 1.5)]
    in_time = Request(items=2, seconds=1.0, timeout=2.5)
    assert only(Simulation().run([in_time]).outcomes).ending == "completed"
    leaving = Request(items=3, seconds=1.0, patience=1.5)
    assert fates(Simulation().run([leaving]).outcomes) == [("disconnected", 0.0, 0.0, 1.5)]
    waiting = [Request(seconds=9.0), Request(items=3, seconds=1.0, patience=1.5)]
    assert Simulation().run(waiting).outcomes[0].started is None


def test_options_are_checked() -> None:
    """As a runner checks them."""
    with pytest.raises(ValueError, match="max_queue must"):
        Simulation(max_queue=0)
    with pytest.raises(ValueError, match="max_queue_bytes must"):
        Simulation(max_queue_bytes=0)
    with pytest.raises(TypeError):
        Simulation(queue="newest")  # type: ignore[arg-type]
