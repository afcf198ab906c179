"""The other side of a channel: a model that answers requests, here on a thread."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import pytest

from asgi_infer import CallCancelled, NativePolicy, check_cancelled
from asgi_infer.workers import _boot, _host
from asgi_infer.workers._channel import Channel, Kind, Message
from asgi_infer.workers._errors_across import RemoteError, unpack_error
from asgi_infer.workers._page import ControlPage, make_page_file
from asgi_infer.workers._protocol import ModelSpec

from ..gates import LIMIT


class Model:
    """What the tests call. It is pickled by its name, and made by the host."""

    def __init__(self) -> None:
        log.append("made")
        self.calls = 0

    def count(self) -> int:
        self.calls += 1
        return self.calls

    def numbers(self, count: int) -> Iterator[int]:
        try:
            yield from range(count)
        finally:
            log.append("closed")

    def __del__(self) -> None:
        log.append("destroyed")


log: list[str] = []


@pytest.fixture(autouse=True)
def clean_log() -> Iterator[None]:
    log.clear()
    yield
    log.clear()


class Client:
    """Talks to a host that serves on a thread of its own."""

    def __init__(self, load: Callable[[], Any] | None = Model, **options: Any) -> None:
        ours, theirs = socket.socketpair()
        page_fd = make_page_file()
        self.page = ControlPage(page_fd)
        self.channel = Channel(ours)
        self.number = 0
        self.thread = threading.Thread(target=_host.serve, args=(theirs.detach(), page_fd))
        self.thread.start()
        native = options.pop("native", NativePolicy())
        warmup = options.pop("warmup", None)
        spec = ModelSpec(name="test", load=load, warmup=warmup, native=native)
        self.opened = self.ask(Kind.OPEN, spec)

    def ask(self, kind: Kind, body: object = None, **options: Any) -> Message:
        self.number += 1
        encoded = None if body is None else self.channel.encode(body)
        self.channel.send(kind, encoded, number=self.number, **options)
        reply = self.channel.receive()
        assert reply.number == self.number
        return reply

    def call(self, func: Any, *args: Any, **options: Any) -> Any:
        return self.value(self.ask(Kind.EXECUTE, (func, args), **options))

    def value(self, reply: Message) -> Any:
        if reply.kind is Kind.RAISED:
            raise unpack_error(reply.body())
        assert reply.kind is Kind.RESULT
        return reply.body()

    def close(self) -> None:
        self.channel.close()
        self.thread.join(LIMIT)
        assert not self.thread.is_alive()


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.close()


class Reference:
    """Pickles as a reference to the model does on the runner's side."""

    def __init__(self, *path: str) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return _host.refer, (self._path,)


def raise_it(error: BaseException) -> NoReturn:
    raise error


def test_calls(client: Client) -> None:
    """Functions are run with their arguments, and the model keeps its state between two."""
    assert client.opened.kind is Kind.READY
    assert client.call(max, 3, 4) == 4
    assert client.call(print) is None
    assert [client.call(Reference("count")) for _ in range(2)] == [1, 2]
    np.testing.assert_array_equal(client.call(np.negative, np.ones(9999)), -np.ones(9999))


def test_what_it_has_used(client: Client) -> None:
    """Each reply tells what the thread and its process have used so far."""
    for reply in (client.opened, client.ask(Kind.EXECUTE, (int, ()))):
        assert reply.used is not None
        assert reply.used.seconds > 0


def test_started(client: Client) -> None:
    """The page tells which request has begun, before anything else is done about it."""
    client.call(int)
    assert client.page.started == client.number


def test_errors(client: Client) -> None:
    """What a function raises is raised on the other side, with how it came about."""
    with pytest.raises(LookupError, match="no") as caught:
        client.call(raise_it, LookupError("no"))
    assert "in raise_it" in str(caught.value.__cause__)
    for error in (SystemExit(3), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            client.call(raise_it, error)
    assert client.call(int) == 0


class Unspeakable(Exception):
    """Its methods fail, and what formats it does so, too."""

    def __str__(self) -> str:
        raise ValueError("no text")

    @property
    def __notes__(self) -> NoReturn:  # type: ignore[override]
        raise ValueError("no notes")

    def __reduce__(self) -> NoReturn:
        raise ValueError("no pickle")


def raise_unspeakable() -> NoReturn:
    raise Unspeakable


def test_errors_that_fail(client: Client) -> None:
    """An exception whose own methods fail is stood for by another."""
    with pytest.raises(RemoteError, match="Unspeakable"):
        client.call(raise_unspeakable)


def test_stop_iteration(client: Client) -> None:
    """Out of a call it is an error as others are."""
    with pytest.raises(StopIteration):
        client.call(raise_it, StopIteration())


def test_results_that_do_not_pickle(client: Client) -> None:
    """The error says what was returned."""
    with pytest.raises(TypeError, match="the result, a lock, can't be sent"):
        client.call(threading.Lock)


class Unreadable:
    """Pickles, and does not unpickle."""

    def __reduce__(self) -> Any:
        return raise_it, (LookupError("not here"),)


def test_arguments_that_do_not_unpickle(client: Client) -> None:
    """The error is that of the call, and says where it comes from."""
    with pytest.raises(LookupError, match="not here") as caught:
        client.call(print, Unreadable())
    assert "unpickled" in caught.value.__notes__[0]


def test_check_cancelled(client: Client) -> None:
    """A function learns that nobody waits, by the page or by the clock; and only of its own."""
    client.page.cancelled = 99
    assert client.call(check_cancelled) is None
    client.page.cancelled = client.number + 1
    with pytest.raises(CallCancelled, match="cancelled"):
        client.call(check_cancelled)
    with pytest.raises(CallCancelled, match="its deadline has passed"):
        client.call(check_cancelled, deadline=time.monotonic())
    assert client.call(check_cancelled, deadline=time.monotonic() + LIMIT) is None


def test_streams(client: Client) -> None:
    """Generators are stepped by their numbers, side by side, and closed."""
    for stream in (1, 2):
        work = (Reference("numbers"), (2,))
        assert client.value(client.ask(Kind.ITERATE, work, stream=stream)) is None
    steps = [client.value(client.ask(Kind.NEXT, stream=stream)) for stream in (1, 2, 2)]
    assert steps == [0, 0, 1]
    assert client.ask(Kind.NEXT, stream=2).kind is Kind.END
    assert log.count("closed") == 1
    client.value(client.ask(Kind.CLOSE, stream=1))
    assert log.count("closed") == 2
    client.value(client.ask(Kind.CLOSE, stream=1))  # nothing is left to do


def test_stop() -> None:
    """Told to stop, it closes what is open, destroys the model, says so, and ends."""
    client = Client()
    client.value(client.ask(Kind.ITERATE, (Reference("numbers"), (2,)), stream=1))
    client.value(client.ask(Kind.NEXT, stream=1))
    assert client.ask(Kind.STOP).kind is Kind.END
    assert log == ["made", "closed", "destroyed"]
    client.close()


def test_close_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """A generator that fails to close keeps nothing else from it."""

    client = Client()
    client.value(client.ask(Kind.ITERATE, (stubborn, ()), stream=1))
    client.value(client.ask(Kind.NEXT, stream=1))
    assert client.ask(Kind.STOP).kind is Kind.END
    assert "destroyed" in log
    assert "I stay" in capsys.readouterr().err
    client.close()


def stubborn() -> Iterator[int]:
    try:
        yield 1
    finally:
        raise LookupError("I stay")


class FailingContext:
    """Fails when it is left."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> NoReturn:
        raise LookupError("stuck")


def test_stop_fails() -> None:
    """What ending raises is told, and it ends."""
    client = Client(native=NativePolicy(contexts=(FailingContext,)))
    with pytest.raises(LookupError, match="stuck"):
        client.value(client.ask(Kind.STOP))
    client.close()


def test_does_not_load() -> None:
    """What loading raises is told, and it ends."""
    client = Client(load=fail_to_load)
    with pytest.raises(LookupError, match="no file"):
        client.value(client.opened)
    client.close()


def fail_to_load() -> NoReturn:
    raise LookupError("no file")


def test_main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the runner's main module is looked for in that, imported under its name."""
    monkeypatch.setattr(_boot, "parent_main", __file__)
    monkeypatch.setattr(_boot, "main_module", lambda path: os if path == __file__ else None)
    assert _host.main_there() == "os"
