"""A connection and its calls: who hangs up is served no longer, and nothing is stolen."""

from __future__ import annotations

import functools
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import hypothesis
import pytest
from hypothesis import strategies as st

from asgi_infer import (
    CallCancelled,
    ClientDisconnected,
    DeadlineExceeded,
    InferenceMiddleware,
    InferenceRunner,
    NotReady,
    QueueFull,
    check_cancelled,
)
from asgi_infer._client import WATCH_AFTER

from .connections import App, Connection, Message, request, respond
from .gates import LIMIT, Gate, wait_event
from .polling import some_turns, until

pytestmark = pytest.mark.anyio

Receive = Callable[[], Coroutine[Any, Any, Message]]
Send = Callable[[Message], Coroutine[Any, Any, None]]


@pytest.fixture
def runner() -> Iterator[InferenceRunner[None]]:
    """A runner without a model, stopped in the end."""
    with InferenceRunner[None](max_queue=8) as runner:
        yield runner


def behind(app: App, runner: InferenceRunner[Any], **options: Any) -> InferenceMiddleware:
    """``app`` with the middleware around it."""
    return InferenceMiddleware(app, runner=runner, **options)


def calling(runner: InferenceRunner[Any], func: Callable[[], object]) -> App:
    """An application that makes one call, and tells how it ended in its response."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await respond(send, str(await runner.run(func)))

    return app


async def hold(runner: InferenceRunner[Any], gate: Gate) -> None:
    """Let ``gate`` hold the runner's thread."""
    runner.submit(gate, 1)
    await gate.entered_async()


# -- the client goes away ----------------------------------------------------------------------


UNREAD = {
    "nothing": ("http", []),
    "no body": ("http", [request(b"")]),
    "a body": ("http", [request(b"a")]),
    "no WebSocket message": ("websocket", []),
    "the WebSocket's first": ("websocket", [{"type": "websocket.connect"}]),
}


@pytest.mark.parametrize(("kind", "unread"), UNREAD.values(), ids=UNREAD)
async def test_gone_while_waiting(
    runner: InferenceRunner[None], gate: Gate, kind: str, unread: list[Message]
) -> None:
    """A call whose client hangs up while it waits never runs, whatever has not been read yet."""
    ran: list[int] = []
    await hold(runner, gate)
    connection = Connection(kind)
    connection.feed(*unread)
    async with anyio.create_task_group() as group:
        group.start_soon(connection.serve, behind(calling(runner, lambda: ran.append(1)), runner))
        await until(lambda: runner.statistics().queued == 1)
        connection.hang_up()
    now = runner.statistics()
    assert (now.queued, now.cancelled, now.running) == (0, 1, 1)
    assert connection.sent == []
    gate.release.set()
    await runner.wait_idle()
    assert ran == []


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_gone_while_running(runner: InferenceRunner[None], gate: Gate, kind: str) -> None:
    """A call whose client hangs up while it runs can notice, and nobody waits for it."""
    seen: list[BaseException] = []

    def call() -> None:
        gate(1)
        try:
            check_cancelled()
        except CallCancelled as error:
            seen.append(error)
            raise

    connection = Connection(kind)
    async with anyio.create_task_group() as group:
        group.start_soon(connection.serve, behind(calling(runner, call), runner))
        await gate.entered_async()
        connection.hang_up()
    assert not gate.release.is_set()
    assert runner.statistics().late == 1
    gate.release.set()
    await runner.wait_idle()
    assert len(seen) == 1
    assert connection.sent == []


async def test_what_the_application_sees(runner: InferenceRunner[None], gate: Gate) -> None:
    """``ClientDisconnected`` comes out of ``run``, says when, and can be caught."""
    seen: list[ClientDisconnected] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async def call(func: Callable[..., Any]) -> None:
            with pytest.raises(ClientDisconnected) as caught:
                await runner.run(func, 1)
            seen.append(caught.value)

        async with anyio.create_task_group() as group:
            group.start_soon(call, gate)
            await gate.entered_async()
            group.start_soon(call, abs)

    connection = Connection()
    async with anyio.create_task_group() as group:
        group.start_soon(connection.serve, behind(app, runner))
        await gate.entered_async()
        await until(lambda: runner.statistics().queued == 1)
        connection.hang_up()
    assert sorted(map(str, seen)) == [
        "the client hung up before its call ran",
        "the client hung up while its call ran",
    ]
    assert {error.status_code for error in seen} == {499}


async def test_gone_before_the_call(runner: InferenceRunner[None], gate: Gate) -> None:
    """A call made for a client that is known to be gone is dropped at once."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"
        await runner.run(abs, -1)

    await hold(runner, gate)
    connection = Connection()
    connection.hang_up()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))
    assert runner.statistics().cancelled == 1


async def test_many_calls_of_one_client(runner: InferenceRunner[None], gate: Gate) -> None:
    """All calls of a client go with it, the submitted ones too; other clients' stay."""
    other, connection = Connection(), Connection()

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(runner.run, abs, -1)
            await until(lambda: runner.statistics().queued == 4)
            futures.append(runner.submit(abs, -1))

    futures: list[Any] = []
    async with anyio.create_task_group() as group:
        await hold(runner, gate)
        group.start_soon(other.serve, behind(calling(runner, lambda: 5), runner))
        await until(lambda: runner.statistics().queued == 1)
        group.start_soon(expecting_group, connection.serve, behind(app, runner))
        await until(lambda: runner.statistics().queued == 5)
        connection.hang_up()
        await until(lambda: runner.statistics().queued == 1)
        gate.release.set()
    assert other.text == "5"
    assert isinstance(futures[0].exception(LIMIT), ClientDisconnected)
    assert runner.statistics().cancelled == 4


async def test_calls_that_go_with_one_another(runner: InferenceRunner[None], gate: Gate) -> None:
    """A call may end another of the same client: each is dropped once."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        futures.extend(runner.submit(abs, -1) for _ in range(2))
        futures[0].add_done_callback(lambda _: futures[1].cancel())
        futures[1].add_done_callback(lambda _: futures[0].cancel())
        await until(lambda: all(future.done() for future in futures))

    futures: list[Any] = []
    await hold(runner, gate)
    connection = Connection()
    connection.hang_up()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))
    assert sorted(future.cancelled() for future in futures) == [False, True]
    assert runner.statistics().cancelled == 2


async def expecting_group(serve: Callable[[App], Awaitable[None]], app: App) -> None:
    """Serve an application of whose task group all tasks lose their client."""
    with pytest.raises(ExceptionGroup) as caught:
        await serve(app)
    assert caught.group_contains(ClientDisconnected)


async def test_one_call_after_another(
    runner: InferenceRunner[None], make_gate: Callable[[], Gate]
) -> None:
    """Each call of a connection is watched, also when the watch over an earlier one has ended."""
    first, second = make_gate(), make_gate()

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await runner.run(first, 1)
        assert (await receive())["text"] == "a"
        await quietly(runner.run, second, 1)

    connection = Connection("websocket")
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as group:
            group.start_soon(connection.serve, behind(app, runner))
            await until(lambda: connection.readers == 1)
            connection.texts("a")
            await until(lambda: connection.taken == 1)
            first.release.set()
            await second.entered_async()
            connection.hang_up()
    assert runner.statistics().late == 1


async def test_call_submitted_in_a_thread(runner: InferenceRunner[None], gate: Gate) -> None:
    """A call that waits in a thread, as those of ``def`` endpoints, goes with its client too."""
    await hold(runner, gate)

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        with pytest.raises(ClientDisconnected):
            await anyio.to_thread.run_sync(lambda: runner.submit(abs, -1).result(LIMIT))

    connection = Connection()
    connection.hang_up()
    await connection.serve(behind(app, runner))
    assert runner.statistics().cancelled == 1


async def test_gone_behind_a_part_of_the_body_that_is_read(
    runner: InferenceRunner[None], gate: Gate
) -> None:
    """Once the application has taken what was read ahead, its client is watched again."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(quietly, runner.run, gate, 1)
            await gate.entered_async()
            await until(lambda: connection.taken == 1)
            assert (await receive())["body"] == b"a"

    connection = Connection()
    connection.feed(request(b"a", more=True))
    connection.hang_up()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))
    assert runner.statistics().late == 1


async def test_disconnect_stays(runner: InferenceRunner[None], gate: Gate) -> None:
    """The application sees the disconnect that ended its call, as often as it asks."""
    kinds: list[str] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        try:
            await runner.run(gate, 1)
        except ClientDisconnected:
            for _ in range(3):
                kinds.append((await receive())["type"])

    connection = Connection()
    connection.hang_up()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))
    assert kinds == ["http.disconnect"] * 3


async def test_gone_with_part_of_the_body_unread(
    runner: InferenceRunner[None], gate: Gate
) -> None:
    """A body of which one part is read ahead hides what comes behind it until it is read."""
    got: list[Message] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(quietly, runner.run, gate, 1)
            await gate.entered_async()
            await until(lambda: connection.taken == 1)
            got.extend([await receive(), await receive(), await receive()])

    connection = Connection()
    connection.body(b"a", b"b")
    connection.hang_up()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))
    assert [message.get("body") for message in got] == [b"a", b"b", None]
    assert runner.statistics().late == 1


async def quietly(func: Callable[..., Awaitable[object]], *args: Any) -> None:
    """Await, and expect to lose the client."""
    with pytest.raises(ClientDisconnected):
        await func(*args)


# -- nothing is stolen -------------------------------------------------------------------------


async def test_body_in_many_chunks(runner: InferenceRunner[None], gate: Gate) -> None:
    """Before, during and after a call the application gets every chunk, once and in order."""
    got: list[Message] = []

    async def read(receive: Receive, count: int) -> None:
        for _ in range(count):
            got.append(await receive())

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await read(receive, 10)
        async with anyio.create_task_group() as group:
            group.start_soon(runner.run, gate, 1)
            await gate.entered_async()
            await until(lambda: connection.taken == 11)  # one is read ahead ...
            await some_turns()
            assert connection.taken == 11  # ... and no more
            await read(receive, 10)
            gate.release.set()
        await runner.run(abs, -1)
        await read(receive, 10)
        await respond(send)

    connection = Connection()
    chunks = [b"%d" % number for number in range(30)]
    connection.body(*chunks)
    await connection.serve(behind(app, runner))
    assert [message["body"] for message in got] == chunks
    assert [message["more_body"] for message in got] == [True] * 29 + [False]
    assert connection.status == 200


async def test_what_is_read_ahead_arrives_in_order(
    runner: InferenceRunner[None], gate: Gate
) -> None:
    """The end of the body and the disconnect behind it are both read ahead, and both arrive."""
    got: list[str] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        with pytest.raises(ClientDisconnected):
            await runner.run(gate, 1)
        got.extend([(await receive())["type"] for _ in range(3)])

    connection = Connection()
    connection.body(b"a")
    connection.hang_up()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))
    assert got == ["http.request", "http.disconnect", "http.disconnect"]


async def test_the_end_of_the_body_is_there_while_the_reader_reads_on(
    runner: InferenceRunner[None], gate: Gate
) -> None:
    """Waiting for a disconnect behind the body does not hold back the body."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(quietly, runner.run, gate, 1)
            await until(lambda: connection.taken == 1 and connection.readers == 1)
            assert (await receive())["body"] == b"a"
            group.start_soon(listen, receive)
            await some_turns()
            connection.hang_up()

    async def listen(receive: Receive) -> None:
        assert (await receive())["type"] == "http.disconnect"

    connection = Connection()
    connection.body(b"a")
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))


async def test_failure_behind_the_body(runner: InferenceRunner[None], gate: Gate) -> None:
    """What was read before ``receive`` failed arrives before the failure does."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(runner.run, gate, 1)
            await until(lambda: connection.taken == 1 and connection.readers == 1)
            connection.fail(OSError("reset"))
            await until(lambda: connection.readers == 0)
            assert (await receive())["body"] == b"a"
            with pytest.raises(OSError, match="reset"):
                await receive()
            gate.release.set()

    connection = Connection()
    connection.body(b"a")
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))


async def test_websocket_messages_while_calls_run(runner: InferenceRunner[None]) -> None:
    """A client that sends faster than its calls run gets every answer, in order."""
    texts = [str(number) for number in range(50)]

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            answer = await runner.run(str.upper, f"answer {message['text']}")
            await send({"type": "websocket.send", "text": answer})

    connection = Connection("websocket")

    async def client() -> None:
        for text in texts:
            connection.texts(text)
            await anyio.lowlevel.checkpoint()
        await until(lambda: len(connection.sent) == 51)
        connection.hang_up()

    async with anyio.create_task_group() as group:
        group.start_soon(client)
        await connection.serve(behind(app, runner))
    assert [message["text"] for message in connection.sent[1:]] == [
        f"ANSWER {text}" for text in texts
    ]


async def test_nothing_is_read_without_a_call(runner: InferenceRunner[None]) -> None:
    """An application that makes no call finds its connection as the server made it."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await some_turns()
        await respond(send)

    connection = Connection()
    connection.body(b"a")
    await connection.serve(behind(app, runner))
    assert connection.taken == 0


async def test_receive_that_waits_for_the_reader(
    runner: InferenceRunner[None], gate: Gate
) -> None:
    """Applications that receive while their calls run get their messages, one each."""
    got: list[bytes] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async def read() -> None:
            got.append((await receive())["body"])

        async with anyio.create_task_group() as group:
            group.start_soon(runner.run, gate, 1)
            await until(lambda: connection.readers == 1)
            for _ in range(3):
                group.start_soon(read)
            await some_turns()
            connection.body(b"a", b"b", b"c")
            await until(lambda: len(got) == 3)
            gate.release.set()

    connection = Connection()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))
    assert sorted(got) == [b"a", b"b", b"c"]


async def test_call_beside_the_application_s_own_reader(
    runner: InferenceRunner[None], gate: Gate
) -> None:
    """Where the application itself listens for the disconnect, that is how calls learn of it."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(receive)
            await until(lambda: connection.readers == 1)
            with pytest.raises(ClientDisconnected):
                await runner.run(gate, 1)

    connection = Connection()
    async with anyio.create_task_group() as group:
        group.start_soon(connection.serve, behind(app, runner))
        await gate.entered_async()
        await anyio.sleep(4 * WATCH_AFTER)  # the watch finds that somebody reads already
        connection.hang_up()
    assert runner.statistics().late == 1


async def test_cancelled_receive(runner: InferenceRunner[None], gate: Gate) -> None:
    """When the application cancels its own ``receive``, calls are watched over again."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(quietly, runner.run, gate, 1)
            await gate.entered_async()
            await until(lambda: connection.readers == 1)
            with anyio.move_on_after(0):  # the reader reads, and this waits for it
                await receive()
            connection.feed(request(b"a"))
            assert (await receive())["body"] == b"a"
            await until(lambda: connection.readers == 1)
            connection.hang_up()
            await until(lambda: runner.statistics().late == 1)

    connection = Connection()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))


async def test_cancelled_receive_of_its_own(runner: InferenceRunner[None], gate: Gate) -> None:
    """The same where the application was the one who read when the call came."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as listeners, anyio.create_task_group() as group:
            listeners.start_soon(receive)
            await until(lambda: connection.readers == 1)
            group.start_soon(quietly, runner.run, gate, 1)
            await gate.entered_async()
            listeners.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await until(lambda: connection.readers == 1)
                connection.hang_up()
                await until(lambda: runner.statistics().late == 1)

    connection = Connection()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))


async def test_receive_that_fails(runner: InferenceRunner[None], gate: Gate) -> None:
    """What the server's ``receive`` raises comes out of the application's, and ends no call."""
    seen: list[Exception] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(runner.run, gate, 1)
            await until(lambda: connection.readers == 1)
            group.start_soon(fail, receive)
            await some_turns()
            connection.fail(OSError("reset"))
            await until(lambda: len(seen) == 1)
            await fail(receive)
            gate.release.set()

    async def fail(receive: Receive) -> None:
        with pytest.raises(OSError, match="reset") as caught:
            await receive()
        seen.append(caught.value)

    connection = Connection()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))
    assert len(seen) == 2
    assert runner.statistics().completed == 1


class AnyOrder:
    """An application that does what it is told, step by step, and its connection."""

    def __init__(self, runner: InferenceRunner[Any], steps: list[str]) -> None:
        self.runner = runner
        self.steps = steps
        self.connection = Connection()
        self.fed: list[int] = []
        self.got: list[int] = []

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        for step in self.steps:
            async with anyio.create_task_group() as group:
                if step in ("call", "both"):
                    group.start_soon(self.runner.run, int, 1)
                if step in ("receive", "both"):
                    self.feed()
                    group.start_soon(self.read, receive)
                if step == "cancel":
                    group.start_soon(self.read_in_no_time, receive)
                if step == "feed":
                    self.feed()
        while len(self.got) < len(self.fed):
            await self.read(receive)

    def feed(self) -> None:
        self.fed.append(len(self.fed))
        self.connection.feed(request(b"%d" % self.fed[-1], more=True))

    async def read(self, receive: Receive) -> None:
        self.got.append(int((await receive())["body"]))

    async def read_in_no_time(self, receive: Receive) -> None:
        with anyio.move_on_after(0):
            await self.read(receive)


STEPS = st.lists(st.sampled_from(["receive", "call", "both", "cancel", "feed"]), max_size=25)


@pytest.mark.unmeasured
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(steps=STEPS, backend=st.sampled_from(["asyncio", "trio"]))
def test_any_order_of_reading_and_calling(steps: list[str], backend: str) -> None:
    """Whatever an application does, it gets all messages in order, and its calls' results."""

    async def main() -> AnyOrder:
        app = AnyOrder(own, steps)
        with anyio.fail_after(LIMIT):
            await app.connection.serve(behind(app, own))
        return app

    with InferenceRunner[None]() as own:
        app = anyio.run(main, backend=backend)
        assert own.statistics().completed == sum(s in ("call", "both") for s in steps)
    assert app.got == app.fed


# -- after the response ------------------------------------------------------------------------


@pytest.mark.parametrize("ended", ["http.response.body", "http.response.pathsend"])
async def test_background_calls(runner: InferenceRunner[None], gate: Gate, ended: str) -> None:
    """Calls made or still running after the response are not dropped: nobody waits for them."""
    results: list[int] = []

    async def call(func: Callable[[int], int], number: int) -> None:
        results.append(await runner.run(func, number))

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(call, gate, 1)
            await gate.entered_async()
            await until(lambda: connection.readers == 1)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": ended, "path": "/dev/null"})
            await until(lambda: connection.readers == 0)  # the watch has ended
            connection.hang_up()  # as servers say after the response
            group.start_soon(call, abs, -2)
            await until(lambda: runner.statistics().queued == 1)
            assert (await receive())["type"] == "http.disconnect"
            gate.release.set()

    connection = Connection()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))
    assert sorted(results) == [1, 2]
    assert runner.statistics().cancelled == 0


class Hasty(Connection):
    """A server that reports a disconnect before it is done with sending the response."""

    async def send(self, message: Message) -> None:
        await super().send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.hang_up()
            await some_turns()


async def test_disconnect_with_the_end_of_the_response(
    runner: InferenceRunner[None], gate: Gate
) -> None:
    """A disconnect that means that the response is complete drops no call."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        futures.append(runner.submit(gate, 1))
        futures.append(runner.submit(abs, -2))
        await gate.entered_async()
        await until(lambda: connection.readers == 1)
        await respond(send)
        gate.release.set()

    futures: list[Any] = []
    connection = Hasty()
    await connection.serve(behind(app, runner))
    assert [future.result(LIMIT) for future in futures] == [1, 2]


async def test_streamed_response(runner: InferenceRunner[None], gate: Gate) -> None:
    """Between the first and the last part of a response, clients are still watched."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await runner.run(gate, 1)

    connection = Connection()
    async with anyio.create_task_group() as group:
        group.start_soon(connection.serve, behind(app, runner))
        await gate.entered_async()
        connection.hang_up()
    assert runner.statistics().late == 1


async def test_response_before_the_watch_has_begun(
    runner: InferenceRunner[None], gate: Gate
) -> None:
    """A response in the very tick in which the reader is started leaves nobody waiting for it."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        runner.submit(gate, 1)
        await until(lambda: connection.taken == 1)
        await receive()  # what was read ahead: to watch on, the reader is started again
        await respond(send)
        connection.hang_up()
        assert (await receive())["type"] == "http.disconnect"

    connection = Connection()
    connection.feed(request(b"a", more=True))
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))
    assert runner.statistics().cancelled == 0


async def test_listener_beside_the_response(runner: InferenceRunner[None], gate: Gate) -> None:
    """An application that listens while it responds takes the reader's place in the end."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        async def listen() -> None:
            assert (await receive())["type"] == "http.disconnect"

        async with anyio.create_task_group() as group:
            runner.submit(gate, 1)
            await until(lambda: connection.readers == 1)
            group.start_soon(listen)
            await some_turns()
            await respond(send)
            await some_turns()
            connection.hang_up()

    connection = Connection()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))
    assert runner.statistics().cancelled == 0


async def test_task_that_outlives_its_request(runner: InferenceRunner[None]) -> None:
    """A task of the request's that runs on after it may still make calls."""
    results: list[int] = []
    over = threading.Event()

    async with anyio.create_task_group() as group:

        async def later() -> None:
            await wait_event(over)
            results.append(await runner.run(abs, -1))

        async def app(scope: Any, receive: Receive, send: Send) -> None:
            group.start_soon(later)

        connection = Connection()
        connection.hang_up()
        await connection.serve(behind(app, runner, deadline_header="x-time"))
        over.set()
    assert results == [1]


async def test_the_deadline_ends_with_the_response(
    runner: InferenceRunner[None], gate: Gate
) -> None:
    """The time that a client gives bounds what it waits for, not the work after its response."""
    results: list[int] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        with pytest.raises(DeadlineExceeded):
            await runner.run(gate, 1)
        gate.release.set()
        await respond(send)
        results.append(await runner.run(abs, -1))

    connection = Connection(headers=[(b"x-time", b"0.05")])
    await connection.serve(behind(app, runner, deadline_header="X-Time"))
    assert results == [1]


# -- Server-Timing -----------------------------------------------------------------------------


def timing(connection: Connection) -> dict[str, float]:
    """The response's ``Server-Timing``, in seconds."""
    entries = (entry.split(";dur=") for entry in connection.headers["server-timing"].split(", "))
    return {name: float(milliseconds) / 1000 for name, milliseconds in entries}


async def test_server_timing(runner: InferenceRunner[None], gate: Gate) -> None:
    """``Server-Timing`` has the seconds that all of a response's calls waited and ran."""
    pause = threading.Event()

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await runner.run(pause.wait, 0.1)
        await runner.run(pause.wait, 0.1)
        await anyio.to_thread.run_sync(lambda: runner.submit(pause.wait, 0.1).result())
        await respond(send)

    connection = Connection()
    async with anyio.create_task_group() as group:
        await hold(runner, gate)
        group.start_soon(connection.serve, behind(app, runner))
        await until(lambda: runner.statistics().queued == 1)
        await anyio.sleep(0.05)
        gate.release.set()
    seconds = timing(connection)
    assert list(seconds) == ["queue", "infer"]
    assert 0.05 <= seconds["queue"] < LIMIT
    assert 0.3 <= seconds["infer"] < LIMIT


async def test_no_server_timing(runner: InferenceRunner[None]) -> None:
    """There is none without calls, nor if it is not wanted, nor of calls without a result."""

    async def silent(scope: Any, receive: Receive, send: Send) -> None:
        await respond(send)

    async def failing(scope: Any, receive: Receive, send: Send) -> None:
        with pytest.raises(DeadlineExceeded):
            await runner.run(threading.Event().wait, 0.1, timeout=0.01)
        await runner.wait_idle()
        await respond(send)

    unwanted = behind(calling(runner, lambda: 1), runner, server_timing=False)
    for app in (behind(silent, runner), behind(failing, runner), unwanted):
        connection = Connection()
        await connection.serve(app)
        assert connection.headers == {}


async def test_own_headers_stay(runner: InferenceRunner[None]) -> None:
    """``Server-Timing`` is added to the headers of a response, and to a response without any."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await runner.run(abs, -1)
        await send({"type": "http.response.start", "status": 200, **extra})
        await send({"type": "http.response.body"})

    for extra in ({}, {"headers": [(b"server-timing", b"db;dur=1")]}):
        connection = Connection()
        await connection.serve(behind(app, runner))
        values = [value for name, value in connection.sent[0]["headers"]]
        assert values[:-1] == [value for _, value in extra.get("headers", [])]
        assert values[-1].startswith(b"queue;dur=")


async def test_a_long_websocket_keeps_no_calls(runner: InferenceRunner[None]) -> None:
    """A connection that makes calls for days does not remember them."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        for _ in range(100):
            await runner.run(abs, -1)
        client: Any = getattr(receive, "__self__")  # noqa: B009  # a method, which the type hides
        assert not client._calls
        assert not client._timed

    await Connection("websocket").serve(behind(app, runner))


# -- errors that nobody handles ----------------------------------------------------------------


def full(runner: InferenceRunner[Any], gate: Gate) -> None:
    """Fill the runner, so that the next call is refused."""
    runner.submit(gate, 1)
    gate.wait_entered()
    for _ in range(8):
        runner.submit(abs, -1)


async def test_error_before_the_response(runner: InferenceRunner[None], gate: Gate) -> None:
    """An unhandled refusal is answered with its status, ``Retry-After`` and a bare text."""
    full(runner, gate)
    connection = Connection()
    await connection.serve(behind(calling(runner, lambda: 1), runner))
    assert connection.status == 503
    assert 1 <= int(connection.headers["retry-after"]) <= 60
    assert connection.headers["content-type"] == "text/plain; charset=utf-8"
    assert int(connection.headers["content-length"]) == len(connection.text)
    assert connection.text == "The service is overloaded. Try again later."


async def test_error_after_the_response_started(runner: InferenceRunner[None], gate: Gate) -> None:
    """Once a response has begun, all that is left is to tell the server."""
    full(runner, gate)

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await runner.run(abs, -1)

    connection = Connection()
    with pytest.raises(QueueFull):
        await connection.serve(behind(app, runner))
    assert connection.kinds == ["http.response.start"]


async def test_websocket_denied_with_a_response(runner: InferenceRunner[None], gate: Gate) -> None:
    """Before it is accepted, a WebSocket is denied with the whole response if servers can."""
    full(runner, gate)
    connection = Connection("websocket", extensions=["websocket.http.response"])
    await connection.serve(behind(calling(runner, lambda: 1), runner))
    assert connection.kinds == ["websocket.http.response.start", "websocket.http.response.body"]
    assert connection.status == 503
    assert 1 <= int(connection.headers["retry-after"]) <= 60


@pytest.mark.parametrize("accepted", [False, True])
async def test_websocket_closed(runner: InferenceRunner[None], gate: Gate, accepted: bool) -> None:
    """Where no response can be sent, the close code says: try again later."""
    full(runner, gate)

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        if accepted:
            await send({"type": "websocket.accept"})
        await runner.run(abs, -1)

    connection = Connection("websocket")
    await connection.serve(behind(app, runner))
    close = connection.sent[-1]
    assert (close["type"], close["code"]) == ("websocket.close", 1013)
    assert close["reason"] == "The service is overloaded. Try again later."


async def test_websocket_closed_for_a_failure(runner: InferenceRunner[None]) -> None:
    """An error that repeating won't cure closes with: internal error."""

    def fail() -> None:
        raise SystemExit

    connection = Connection("websocket")
    await connection.serve(behind(calling(runner, fail), runner))
    assert connection.sent[-1]["code"] == 1011


@pytest.mark.parametrize(("status", "code"), [(503, 1013), (504, 1013), (500, 1011)])
async def test_response_to_an_accepted_websocket(
    runner: InferenceRunner[None], status: int, code: int
) -> None:
    """A response that a framework's error handler sends to an open WebSocket becomes a close."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        kind = "websocket.http.response"
        await send({"type": "websocket.accept"})
        await send({"type": f"{kind}.start", "status": status, "headers": []})
        await send({"type": f"{kind}.body", "body": b"a", "more_body": True})
        await send({"type": f"{kind}.body", "body": b"b"})

    connection = Connection("websocket", extensions=["websocket.http.response"])
    await connection.serve(behind(app, runner))
    assert connection.kinds == ["websocket.accept", "websocket.close"]
    assert connection.sent[1]["code"] == code


async def test_nothing_is_sent_to_who_has_gone(runner: InferenceRunner[None], gate: Gate) -> None:
    """A framework that answers ``ClientDisconnected`` on an open WebSocket sends it nothing."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        with pytest.raises(ClientDisconnected):
            await runner.run(gate, 1)
        kind = "websocket.http.response"
        await send({"type": f"{kind}.start", "status": 499, "headers": []})
        await send({"type": f"{kind}.body", "body": b""})

    connection = Connection("websocket")
    connection.hang_up()
    with anyio.fail_after(LIMIT):
        await connection.serve(behind(app, runner))
    assert connection.kinds == ["websocket.accept"]


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_no_answer_to_who_has_gone(runner: InferenceRunner[None], kind: str) -> None:
    """An unhandled error of any kind is not sent to a client that is known to have gone."""

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await receive()
        raise NotReady("no runner")

    connection = Connection(kind)
    connection.hang_up()
    await connection.serve(behind(app, runner))
    assert connection.sent == []


async def test_partial_is_a_function(runner: InferenceRunner[None]) -> None:
    """What the application passes to ``run`` may be anything callable, here too."""
    connection = Connection()
    await connection.serve(behind(calling(runner, functools.partial(abs, -3)), runner))
    assert connection.text == "3"


async def test_server_that_repeats_the_end_of_the_body(
    runner: InferenceRunner[None], gate: Gate
) -> None:
    """A server that says more after the end of the body is not listened to without end."""
    said: list[int] = []

    async def endless() -> Any:
        said.append(1)
        if len(said) == 2:
            gate.release.set()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def drop(message: Any) -> None:
        pass

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        assert await runner.run(gate, 1) == 1

    with anyio.fail_after(LIMIT):
        await behind(app, runner)({"type": "http", "headers": []}, endless, drop)
    assert len(said) == 2
