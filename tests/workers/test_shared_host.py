"""The model process of several servers: whose turn it is, and what becomes of those who leave.

It runs on a thread here. Servers are played by hand, over real sockets.
"""

from __future__ import annotations

import os
import select
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from asgi_infer import NativePolicy, check_cancelled
from asgi_infer._model import ModelReference
from asgi_infer.native import processes
from asgi_infer.workers._channel import Channel, Kind, Message
from asgi_infer.workers._errors_across import unpack_error
from asgi_infer.workers._host import Host
from asgi_infer.workers._protocol import ModelSpec
from asgi_infer.workers._remote import reduce_reference
from asgi_infer.workers._rendezvous import Claim, Rendezvous
from asgi_infer.workers._shared_host import EXCLUSIVE, SharedHost
from asgi_infer.workers.shared import introduce

from ..gates import LIMIT, Gate
from . import meeting

_log: list[Any] = []
_gate = Gate()
_servers: list[Player] = []


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    global _gate
    _gate = Gate()
    _log.clear()
    yield
    _gate.release.set()
    _servers.clear()


class Model:
    """Of functions that write into the log of the test, which lives in the same process."""

    def __init__(self) -> None:
        _log.append("loaded")

    def note(self, what: str) -> str:
        _log.append(what)
        return what

    def hold(self) -> None:
        _gate(None)

    def note_and_ask_again(self, number: int) -> None:
        _log.append("first")
        _servers[number].ask(Kind.EXECUTE, self.note_late)

    @staticmethod
    def note_late() -> None:
        _log.append("again")

    def count(self) -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            _log.append("closed")

    def count_badly(self) -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            raise LookupError("while it was closed")

    def check(self) -> None:
        _gate(None)
        check_cancelled()

    def spin(self) -> None:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    def __del__(self) -> None:
        _log.append("destroyed")


def fail() -> Model:
    _log.append("failed")
    raise LookupError("no such file")


SPEC = ModelSpec(name="shared", load=Model, warmup=None, native=NativePolicy(nice=0))
FAILING = ModelSpec(name="shared", load=fail, warmup=None, native=NativePolicy(nice=0))
model: Any = ModelReference(SPEC)


class Player:
    """A server, by hand."""

    def __init__(self, base: Path) -> None:
        sock, self.presence, self.claim = Rendezvous(base, meeting.NAME).join()
        self.page = introduce(sock)
        self.channel = Channel(sock, dispatch={ModelReference: reduce_reference(SPEC)})
        self.number = 0
        _servers.append(self)

    def ask(self, kind: Kind, *work: Any, deadline: float | None = None, stream: int = 0) -> None:
        """Send a request."""
        self.number += 1
        encoded = self.channel.encode((work[0], work[1:])) if work else None
        options: Any = {"number": self.number, "deadline": deadline, "stream": stream}
        self.channel.send(kind, encoded, **options)

    def open(self, spec: ModelSpec = SPEC) -> Message:
        self.channel.send(Kind.OPEN, self.channel.encode(spec))
        return self.reply()

    def reply(self) -> Message:
        message = self.channel.receive_now()  # it may have come with the one before
        if message is None:
            poll = select.poll()
            poll.register(self.channel, select.POLLIN)
            assert poll.poll(LIMIT * 1000), "no reply"
            message = self.channel.receive()
        return message

    def run(self, *work: Any, **options: Any) -> Any:
        self.ask(Kind.EXECUTE, *work, **options)
        return self.value()

    def value(self) -> Any:
        reply = self.reply()
        assert reply.kind in (Kind.RESULT, Kind.RAISED), reply.kind
        if reply.kind is Kind.RAISED:
            raise unpack_error(reply.body())
        return reply.body()

    def stream(self, func: Any, stream: int) -> None:
        self.ask(Kind.ITERATE, func, stream=stream)
        self.value()

    def next(self, stream: int) -> Any:
        self.ask(Kind.NEXT, stream=stream)
        return self.value()

    def end(self, stream: int) -> None:
        self.ask(Kind.CLOSE, stream=stream)
        self.value()

    def close(self) -> None:
        self.channel.close()


class Table:
    """Servers and their model process, which is a thread."""

    def __init__(self, base: Path, stack: ExitStack) -> None:
        self.base = base
        self._stack = stack
        self.thread: threading.Thread | None = None

    def player(self) -> Player:
        """A server, for which the model is not loaded yet."""
        player = Player(self.base)
        self._stack.callback(player.presence.leave)
        self._stack.callback(player.close)
        if player.claim is not None:
            self.thread = threading.Thread(target=self._serve, args=[player.claim])
            self.thread.start()
        return player

    def server(self) -> Player:
        """One that can make calls."""
        player = self.player()
        assert player.open().kind is Kind.READY
        return player

    def join(self) -> None:
        """Wait for the end of the model process."""
        assert self.thread is not None
        self.thread.join(LIMIT)
        assert not self.thread.is_alive()

    def _serve(self, claim: Claim) -> None:
        host = SharedHost(claim)
        while host.turn():
            pass
        host.close()
        _log.append("gone")
        claim.close()


@pytest.fixture
def table() -> Iterator[Table]:
    with tempfile.TemporaryDirectory(prefix="shared-") as directory, ExitStack() as stack:
        table = Table(Path(directory, "base"), stack)
        yield table
        _gate.release.set()
        stack.close()
        if table.thread is not None:
            table.join()
        assert list(table.base.iterdir()) == []


def test_one_model_for_all(table: Table) -> None:
    """It is loaded once, and destroyed when the last server has gone."""
    first, second = table.server(), table.server()
    assert first.run(model.note, "a") == "a"
    assert second.run(model.note, "b") == "b"
    first.close()
    assert second.run(model.note, "c") == "c"
    second.close()
    table.join()
    assert _log == ["loaded", "a", "b", "c", "destroyed", "gone"]


def test_model_process_is_known(table: Table) -> None:
    """Servers learn which process has the model."""
    page = table.server().page
    assert (page.pid, page.born) == (os.getpid(), processes.start_time(os.getpid()))


def test_servers_take_turns(table: Table) -> None:
    """The server that was served longest ago comes next, however soon others ask again."""
    busy, first, second, holding = (table.server() for _ in range(4))
    holding.ask(Kind.EXECUTE, model.hold)
    _gate.wait_entered()
    busy.ask(Kind.EXECUTE, model.note_and_ask_again, 0)
    first.ask(Kind.EXECUTE, model.note, "second")
    second.ask(Kind.EXECUTE, model.note, "third")
    _gate.release.set()
    for player in (holding, busy, first, second, busy):
        player.value()
    assert _log == ["loaded", "first", "second", "third", "again"]


def test_cancelled_call_is_skipped(table: Table) -> None:
    """A call whose caller has left before its turn is not run."""
    first, second = table.server(), table.server()
    first.ask(Kind.EXECUTE, model.hold)
    _gate.wait_entered()
    second.ask(Kind.EXECUTE, model.note, "never")
    second.page.cancelled = second.number
    _gate.release.set()
    assert second.reply().kind is Kind.SKIPPED
    assert second.page.started == 0
    assert second.run(model.note, "next") == "next"
    assert "never" not in _log


def test_expired_call_is_skipped(table: Table) -> None:
    """So is one whose deadline has passed."""
    server = table.server()
    server.ask(Kind.EXECUTE, model.note, "never", deadline=time.monotonic())
    assert server.reply().kind is Kind.SKIPPED
    assert server.run(model.note, "in time", deadline=time.monotonic() + LIMIT) == "in time"
    assert "never" not in _log


def test_what_has_begun_is_known(table: Table) -> None:
    """A server can see which of its calls has begun, and when."""
    first, second = table.server(), table.server()
    before = time.monotonic()
    first.ask(Kind.EXECUTE, model.hold)
    _gate.wait_entered()
    second.ask(Kind.EXECUTE, model.note, "later")
    assert (first.page.started, second.page.started) == (1, 0)
    assert before - 0.001 <= first.page.began <= time.monotonic()
    _gate.release.set()
    second.value()
    assert second.page.started == 1


def test_check_cancelled(table: Table) -> None:
    """A call that runs learns that its caller has left."""
    server = table.server()
    server.ask(Kind.EXECUTE, model.check)
    _gate.wait_entered()
    server.page.cancelled = server.number
    _gate.release.set()
    with pytest.raises(BaseException, match="nobody waits for this call"):
        server.value()


def test_dead_server_loses_its_own_calls(table: Table) -> None:
    """What it waited for is thrown away, and its streams are closed; others notice nothing."""
    dying, other = table.server(), table.server()
    dying.stream(model.count, stream=2)
    assert dying.next(stream=2) == 0
    dying.ask(Kind.EXECUTE, model.hold)
    _gate.wait_entered()
    dying.close()
    other.ask(Kind.EXECUTE, model.note, "other")
    _gate.release.set()
    assert other.value() == "other"
    other.run(model.note, "end")
    assert sorted(_log[1:-1]) == ["closed", "other"]


def test_what_a_dead_server_waited_for_is_not_run(table: Table) -> None:
    """Its call had been sent, and it died before its turn came."""
    first, dying = table.server(), table.server()
    first.ask(Kind.EXECUTE, model.hold)
    _gate.wait_entered()
    dying.ask(Kind.EXECUTE, model.note, "never")
    dying.close()
    _gate.release.set()
    first.value()
    first.run(model.note, "next")
    assert _log[1:] == ["next"]


def test_generator_that_fails_when_its_server_has_died(
    table: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is nobody's error: the log has it."""
    dying, other = table.server(), table.server()
    dying.stream(model.count_badly, stream=2)
    dying.next(stream=2)
    dying.close()
    other.run(model.note, "a")
    other.run(model.note, "b")  # by now the other's end has been noticed
    assert "while it was closed" in capsys.readouterr().err


def test_streams_of_servers_are_apart(table: Table) -> None:
    """Streams of the same number, of two servers, are two streams."""
    first, second = table.server(), table.server()
    for player in (first, second):
        player.stream(model.count, stream=2)
    assert [first.next(2), first.next(2), second.next(2)] == [0, 1, 0]
    first.end(2)
    assert second.next(2) == 1
    second.end(2)


def test_exclusive_stream_keeps_the_model(table: Table) -> None:
    """Between two items of a stream that does not interleave, nobody else's call runs."""
    first, second = table.server(), table.server()
    stream = 2 | EXCLUSIVE
    first.stream(model.count, stream)
    second.ask(Kind.EXECUTE, model.note, "other")
    assert [first.next(stream) for _ in range(3)] == [0, 1, 2]
    first.end(stream)
    assert second.value() == "other"
    assert _log == ["loaded", "closed", "other"]


def test_exclusive_stream_of_a_server_that_dies(table: Table) -> None:
    """It keeps the model no longer."""
    first, second = table.server(), table.server()
    first.stream(model.count, 2 | EXCLUSIVE)
    first.next(2 | EXCLUSIVE)
    second.ask(Kind.EXECUTE, model.note, "other")
    first.close()
    assert second.value() == "other"
    assert _log == ["loaded", "closed", "other"]


def test_exclusive_stream_that_does_not_begin(table: Table) -> None:
    """What is no stream keeps nothing."""
    first, second = table.server(), table.server()
    with pytest.raises(TypeError, match="a stream needs a generator"):
        first.stream(model.note_late, 2 | EXCLUSIVE)
    assert second.run(model.note, "other") == "other"


def test_use_is_counted_for_each(table: Table) -> None:
    """Each server is told what its own calls have used."""
    first, second = table.server(), table.server()
    first.ask(Kind.EXECUTE, model.spin)
    spun = first.reply().used
    second.ask(Kind.EXECUTE, model.note, "a")
    noted = second.reply().used
    assert spun is not None
    assert noted is not None
    assert noted.seconds < 0.02 <= spun.seconds


def test_failed_load_is_told_to_all(table: Table) -> None:
    """It is tried once for all that have come; when they have gone, so does the process."""
    players = [table.player() for _ in range(3)]
    for player in players:
        reply = player.open(FAILING)
        assert reply.kind is Kind.RAISED
        assert isinstance(unpack_error(reply.body()), LookupError)
    for player in players:
        player.close()
    table.join()
    assert _log == ["failed", "gone"]


def test_all_leave_before_it_is_loaded(table: Table) -> None:
    """Nothing is loaded for nobody."""
    table.player().close()
    table.join()
    assert _log == ["gone"]


@pytest.mark.parametrize("hello", [b"", b"x"])
def test_who_introduces_himself_badly(table: Table, hello: bytes) -> None:
    """He is hung up on, and others are served."""
    server = table.server()
    sock, presence, _ = Rendezvous(table.base, meeting.NAME).join()
    with sock:
        sock.send(hello)
        if not hello:
            sock.shutdown(1)
        assert sock.recv(1) == b""
    presence.leave()
    assert server.run(model.note, "a") == "a"


def test_model_that_fails_when_it_is_closed(
    table: Table, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files go all the same, and the log has why."""
    server = table.server()

    def close(host: object) -> None:
        raise LookupError("while it was closed")

    monkeypatch.setattr(Host, "close", close)
    server.close()
    table.join()
    assert "while it was closed" in capsys.readouterr().err
