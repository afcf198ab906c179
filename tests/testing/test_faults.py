"""Faults on demand: what clients see, and what the books say, is what happens in earnest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from starlette.testclient import TestClient

from asgi_infer import (
    CallCancelled,
    CallFailed,
    ClientDisconnected,
    DeadlineExceeded,
    Draining,
    InferenceError,
    NotReady,
    QueueFull,
    WorkerCrashed,
    check_cancelled,
)
from asgi_infer.testing import InlineRunner

from .test_inline import Model, make_app

pytestmark = pytest.mark.anyio

Runner = InlineRunner[Model]
FaultOf = Callable[[Runner], AbstractContextManager[None]]


class Broken(Exception):
    pass


FAULTS: dict[str, tuple[FaultOf, type[Exception], str]] = {
    "slow": (lambda runner: runner.slow(3.0), DeadlineExceeded, "expired"),
    "full": (lambda runner: runner.full(), QueueFull, "rejected"),
    "failing": (lambda runner: runner.failing(Broken("so it is")), Broken, "failed"),
    "no exception": (lambda runner: runner.failing(SystemExit), CallFailed, "failed"),
    "crashing": (lambda runner: runner.crashing(), WorkerCrashed, "failed"),
    "disconnected": (lambda runner: runner.disconnected(), ClientDisconnected, "cancelled"),
    "draining": (lambda runner: runner.draining(), Draining, "rejected"),
    "not_ready": (lambda runner: runner.not_ready(), NotReady, "rejected"),
}

each_fault = pytest.mark.parametrize(("fault", "error", "counter"), FAULTS.values(), ids=FAULTS)


def numbers() -> Iterator[int]:
    yield from range(3)


@each_fault
async def test_each_fault(fault: FaultOf, error: type[Exception], counter: str) -> None:
    """Calls, futures and streams all end with its error, the books count it, and after the
    block all is well."""
    runner: Runner = InlineRunner(Model, timeout=2.0)
    with fault(runner):
        with pytest.raises(error):
            await runner.run(runner.model.double, 1)
        with pytest.raises(error):
            runner.submit(runner.model.double, 1).result()
        with pytest.raises(error):
            await anext(runner.stream(numbers))
    assert await runner.run(runner.model.double, 1) == 2
    statistics = runner.statistics()
    assert getattr(statistics, counter) == 3
    assert (statistics.submitted, statistics.completed) == (4, 1)


@each_fault
def test_each_fault_over_http(fault: FaultOf, error: type[Exception], counter: str) -> None:
    """The status, and the headers, are those of the error."""
    del counter
    runner: Runner = InlineRunner(Model, timeout=2.0)
    client = TestClient(make_app(runner), raise_server_exceptions=False)
    with fault(runner):
        response = client.get("/async/1")
    expected = error.status if issubclass(error, InferenceError) else 500
    assert response.status_code == expected
    assert ("retry-after" in response.headers) == (expected == 503)


async def test_a_crash_is_counted_as_a_restart() -> None:
    """As in earnest: the process is started again after each, and the next call runs in it."""
    runner: Runner = InlineRunner(Model)
    with runner.crashing():
        for _ in range(2):
            with pytest.raises(WorkerCrashed, match="since the test says so"):
                await runner.run(runner.model.double, 1)
    assert await runner.run(runner.model.double, 1) == 2
    assert (runner.statistics().restarts, runner.statistics().state) == (2, "ready")


async def test_what_a_full_queue_says() -> None:
    """How many wait, and for how long: from ``max_queue``, and from what calls have taken."""
    runner: Runner = InlineRunner(Model, max_queue=10)
    with runner.slow(3.0):
        await runner.run(runner.model.double, 1)
    for priority in (0, 5):
        with runner.full(), pytest.raises(QueueFull, match="10 calls are waiting") as caught:
            await runner.run(runner.model.double, 1, priority=priority)
        assert caught.value.retry_after is not None
        assert 30.0 <= caught.value.retry_after <= 1.5 * 30.0 + 3


async def test_streams_go_on_while_the_queue_is_full() -> None:
    """What has begun is not disturbed by what waits."""
    runner: Runner = InlineRunner(Model)
    stream = runner.stream(runner.model.count, 3)
    with runner.full():
        assert [item async for item in stream] == [0, 1, 2]


async def test_a_slow_call_takes_its_time_on_the_clock() -> None:
    """So many seconds for a call, and for each item; faults add up where they can."""
    runner: Runner = InlineRunner(Model)
    with runner.slow(3.0):
        await runner.run(runner.model.double, 1)
        assert runner.clock() == 3.0
        assert [item async for item in runner.stream(runner.model.count, 2)] == [0, 1]
        assert runner.clock() == 12.0  # two items, and the step that finds the end
        with runner.failing(Broken), pytest.raises(Broken):
            await runner.run(runner.model.double, 1)
        assert runner.clock() == 15.0
    assert runner.statistics().service_time == 3.0
    with pytest.raises(ValueError, match="seconds must be"):
        runner.slow(-1.0)


@pytest.mark.parametrize("name", ["slow", "disconnected"])
async def test_a_function_learns_that_nobody_waits(name: str) -> None:
    """``check_cancelled()`` raises in it."""
    runner: Runner = InlineRunner(Model, timeout=2.0)
    fault, error, _ = FAULTS[name]
    learned: list[bool] = []

    def work() -> None:
        try:
            check_cancelled()
        except CallCancelled:
            learned.append(True)
            raise

    with fault(runner), pytest.raises(error):
        await runner.run(work)
    assert learned == [True]
    assert runner.statistics().late == 1


def test_what_the_runner_says_of_itself() -> None:
    """``statistics().state``, for health checks."""
    runner: Runner = InlineRunner(Model)
    runner.submit(int)
    with runner.draining():
        assert runner.statistics().state == "draining"
    with runner.not_ready():
        assert runner.statistics().state == "failed"
    assert runner.statistics().state == "ready"


def test_a_stopped_runner_stays_stopped() -> None:
    """What is true goes before what is pretended."""
    runner: Runner = InlineRunner(Model)
    runner.submit(int)
    runner.shutdown()
    with runner.not_ready(), pytest.raises(Draining):
        runner.submit(int)
