"""The lifespan protocol: runners live around the application's own lifespan."""

from __future__ import annotations

import functools
import logging
import threading
from typing import Any

import anyio
import pytest

from asgi_infer import Draining, InferenceMiddleware, InferenceRunner, NotReady
from asgi_infer._client import Receive, Send

from .connections import App, Connection, Message
from .gates import LIMIT, Gate
from .polling import until

pytestmark = pytest.mark.anyio

STARTUP: Message = {"type": "lifespan.startup"}
SHUTDOWN: Message = {"type": "lifespan.shutdown"}
COMPLETE = ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def fails() -> None:
    """A load that fails, in two lines."""
    raise ValueError("no weights\n  in sight")


class Application:
    """An application that keeps the protocol, and notes what happens.

    :param fail_at: where it says that it failed, ``startup`` or ``shutdown``
    """

    def __init__(self, runner: InferenceRunner[Any], fail_at: str | None = None) -> None:
        self.runner = runner
        self.fail_at = fail_at
        self.events: list[str] = []

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        for phase in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{phase}"
            self.events.append(f"{phase}: {self.runner.statistics().state}")
            outcome = "failed" if self.fail_at == phase else "complete"
            await send({"type": f"lifespan.{phase}.{outcome}"})
            if outcome == "failed":
                raise RuntimeError(phase)


async def serve(app: App) -> Connection:
    """Run the protocol from start to end."""
    connection = Connection("lifespan")
    connection.feed(STARTUP, SHUTDOWN)
    with anyio.fail_after(LIMIT):
        await connection.serve(app)
    return connection


# -- the order of things -----------------------------------------------------------------------


async def test_the_runner_lives_around_the_application() -> None:
    """The model is there when the application starts up, until it has shut down."""
    runner = InferenceRunner[None]()
    app = Application(runner)
    connection = await serve(InferenceMiddleware(app, runner=runner))
    assert app.events == ["startup: ready", "shutdown: ready"]
    assert connection.kinds == COMPLETE
    assert runner.statistics().state == "closed"


async def test_the_server_hears_of_the_end_when_it_is_the_end(gate: Gate) -> None:
    """Shutdown is complete once accepted calls have ended and the model is gone, not before."""
    runner = InferenceRunner[None]()
    connection = Connection("lifespan")
    connection.feed(STARTUP)
    async with anyio.create_task_group() as group:
        app = InferenceMiddleware(Application(runner), runner=runner)
        group.start_soon(connection.serve, app)
        await until(lambda: connection.kinds == COMPLETE[:1])
        future = runner.submit(gate, 5)
        await gate.entered_async()
        connection.feed(SHUTDOWN)
        await until(lambda: runner.statistics().state == "draining")
        assert connection.kinds == COMPLETE[:1]
        gate.release.set()
        await until(lambda: connection.kinds == COMPLETE)
        assert future.result(0) == 5


async def test_calls_that_outlast_the_grace(gate: Gate) -> None:
    """After the grace, shutdown is complete; who still waited gets ``Draining``."""
    runner = InferenceRunner[None]()

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        futures.append(runner.submit(gate, 1))
        futures.append(runner.submit(abs, -1))
        await gate.entered_async()
        await send({"type": COMPLETE[0]})
        await receive()
        await send({"type": COMPLETE[1]})

    futures: list[Any] = []
    connection = await serve(InferenceMiddleware(app, runner=runner, grace=0.05))
    assert connection.kinds == COMPLETE
    assert [type(future.exception(0)) for future in futures] == [Draining, Draining]
    gate.release.set()


async def test_state() -> None:
    """The runners are in the application's state, beside what the application puts there."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["state"]))
        await Application(runner)(scope, receive, send)

    seen: list[dict[str, Any]] = []
    runner = InferenceRunner[None](name="ocr")
    connection = Connection("lifespan")
    connection.scope["state"] = {"own": 1}
    connection.feed(STARTUP, SHUTDOWN)
    await connection.serve(InferenceMiddleware(app, runner=runner))
    assert seen == [{"own": 1, "asgi_infer": {"ocr": runner}}]
    assert connection.scope["state"] == seen[0]


# -- applications that don't keep the protocol -------------------------------------------------


async def test_applications_without_lifespan() -> None:
    """An application without lifespan (it raises, or returns) has one with the middleware."""

    async def raises(scope: Any, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"

    async def raises_late(scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        raise NotImplementedError

    async def returns(scope: Any, receive: Receive, send: Send) -> None:
        pass

    for app in (raises, raises_late, returns):
        runner = InferenceRunner[None]()
        connection = await serve(InferenceMiddleware(app, runner=runner))
        assert connection.kinds == COMPLETE
        assert runner.statistics().state == "closed"


@pytest.mark.parametrize("phase", ["startup", "shutdown"])
async def test_application_that_fails(phase: str) -> None:
    """What an application says of its failure is passed on, and the runner is stopped."""
    runner = InferenceRunner[None]()
    app = InferenceMiddleware(Application(runner, fail_at=phase), runner=runner)
    connection = Connection("lifespan")
    connection.feed(STARTUP, SHUTDOWN)
    with pytest.raises(RuntimeError, match=phase):
        await connection.serve(app)
    expected = {"startup": ["lifespan.startup.failed"], "shutdown": COMPLETE[:1]}
    assert connection.kinds == expected[phase]
    assert runner.statistics().state == "closed"


async def test_failure_at_shutdown_without_an_error() -> None:
    """``lifespan.shutdown.failed`` is passed on when the runners have stopped."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": COMPLETE[0]})
        await receive()
        await send({"type": "lifespan.shutdown.failed", "message": "own"})
        assert runner.statistics().state == "ready"

    runner = InferenceRunner[None]()
    connection = await serve(InferenceMiddleware(app, runner=runner))
    assert connection.sent[-1] == {"type": "lifespan.shutdown.failed", "message": "own"}


async def test_application_that_leaves_early() -> None:
    """An application that returns after its startup takes its runner with it."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": COMPLETE[0]})

    runner = InferenceRunner[None]()
    connection = await serve(InferenceMiddleware(app, runner=runner))
    assert connection.kinds == COMPLETE[:1]
    assert runner.statistics().state == "closed"


async def test_cancelled_lifespan(gate: Gate) -> None:
    """A server that cancels the lifespan waits for no grace."""
    runner = InferenceRunner[None]()
    futures: list[Any] = []
    connection = Connection("lifespan")
    connection.feed(STARTUP)
    async with anyio.create_task_group() as group:
        app = InferenceMiddleware(Application(runner), runner=runner, grace=10 * LIMIT)
        group.start_soon(connection.serve, app)
        await until(lambda: connection.kinds == COMPLETE[:1])
        futures.append(runner.submit(gate, 1))
        await gate.entered_async()
        group.cancel_scope.cancel()
    assert isinstance(futures[0].exception(0), Draining)
    gate.release.set()


# -- models that don't load --------------------------------------------------------------------


async def test_load_failure(caplog: pytest.LogCaptureFixture) -> None:
    """A model that does not load fails the startup with the cause in one line, and no thread."""
    first = InferenceRunner[None](name="first")
    broken = InferenceRunner(fails, name="broken")
    app = Application(first)
    connection = Connection("lifespan")
    connection.feed(STARTUP)
    with pytest.raises(ValueError, match="no weights"):
        await connection.serve(InferenceMiddleware(app, runner=[first, broken]))
    message = "the runner 'broken' did not start: ValueError: no weights in sight"
    assert connection.sent == [{"type": "lifespan.startup.failed", "message": message}]
    assert app.events == []
    assert first.statistics().state == "closed"
    await until(lambda: not named_threads("first", "broken"))
    (record,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert (record.message, record.exc_info is not None) == (message, True)


def named_threads(*names: str) -> list[threading.Thread]:
    """The threads of those names that live."""
    return [thread for thread in threading.enumerate() if thread.name in names]


async def test_startup_timeout(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    """A model that takes too long fails the startup when its time is up, whatever the grace."""
    runner = InferenceRunner(functools.partial(gate, 1), name="slow")
    middleware = InferenceMiddleware(
        Application(runner), runner=runner, startup_timeout=0.05, grace=10 * LIMIT
    )
    connection = Connection("lifespan")
    connection.feed(STARTUP)
    with anyio.fail_after(LIMIT), pytest.raises(NotReady):
        await connection.serve(middleware)
    assert connection.sent[0]["type"] == "lifespan.startup.failed"
    assert "'slow' did not load in 0.05 s" in connection.sent[0]["message"]
    assert "'slow' did not load in 0.05 s" in caplog.text
    gate.release.set()


async def test_a_slow_model_is_waited_for(gate: Gate) -> None:
    """Without a time limit, startup is complete when the model is loaded, and not before."""
    runner = InferenceRunner(functools.partial(gate, 1))
    connection = Connection("lifespan")
    connection.feed(STARTUP, SHUTDOWN)
    async with anyio.create_task_group() as group:
        app = InferenceMiddleware(Application(runner), runner=runner)
        group.start_soon(connection.serve, app)
        await gate.entered_async()
        assert connection.sent == []
        gate.release.set()
    assert connection.kinds == COMPLETE


async def test_several_runners() -> None:
    """Several runners start in order and stop in reverse."""
    events: list[str] = []

    class Model:
        def __init__(self) -> None:
            self.name = threading.current_thread().name
            events.append(f"{self.name} loads")

        def __del__(self) -> None:
            events.append(f"{self.name} ends")

    runners = [InferenceRunner(Model, name=name) for name in ("a", "b")]
    await serve(InferenceMiddleware(Application(runners[0]), runner=runners))
    assert events == ["a loads", "b loads", "b ends", "a ends"]


async def test_two_applications_with_one_runner() -> None:
    """Two applications in one process may share a runner: it stops with the last."""
    runner = InferenceRunner[None]()
    connections = [Connection("lifespan"), Connection("lifespan")]
    async with anyio.create_task_group() as group:
        for connection in connections:
            connection.feed(STARTUP)
            group.start_soon(
                connection.serve, InferenceMiddleware(Application(runner), runner=runner)
            )
            await until(lambda sent=connection.sent: len(sent) == 1)  # type: ignore[misc]  # bool
        connections[0].feed(SHUTDOWN)
        await until(lambda: connections[0].kinds == COMPLETE)
        assert await runner.run(abs, -1) == 1
        connections[1].feed(SHUTDOWN)
    assert runner.statistics().state == "closed"
