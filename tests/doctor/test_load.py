"""Facts about the clients of a server: when a response is whole, and how often they ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from asgi_infer.doctor import _load
from asgi_infer.doctor._load import ClosedLoop, Connection, Probes, is_whole

from ..polling import some_turns, until

RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"


def test_a_response_is_whole_with_its_last_byte() -> None:
    """Not before, wherever it is cut."""
    assert [is_whole(RESPONSE[:end]) for end in range(len(RESPONSE) + 1)] == [
        *[False] * len(RESPONSE),
        True,
    ]


@pytest.mark.parametrize(
    "response", [b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"]
)
def test_another_response(response: bytes) -> None:
    """One with another status, or without a length, is not what was asked for."""
    with pytest.raises(ConnectionError, match=r"^the server answered 'HTTP/1\.1 "):
        is_whole(response)


class Server(asyncio.Protocol):
    """Answers in two parts."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(RESPONSE[:30])
        asyncio.get_running_loop().call_later(0.001, self._transport.write, RESPONSE[30:])


def served(use: Callable[[int], Any], protocol: type[asyncio.Protocol] = Server) -> Any:
    """What ``use`` returns, which gets a server's port."""

    async def main() -> Any:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(protocol, "127.0.0.1", 0)
        async with server:
            return await use(server.sockets[0].getsockname()[1])

    return asyncio.run(main())


async def clients_of(port: int, count: int) -> list[Connection]:
    """So many."""
    return [await _load.connect(port, "/predict") for _ in range(count)]


def test_a_closed_loop() -> None:
    """Every client asks again and again, the fewest calls are made, and those that are under way
    at the end do not count."""

    async def use(port: int) -> ClosedLoop:
        clients = await clients_of(port, 3)
        loop = ClosedLoop(clients, seconds=0.0, fewest=7)
        await loop.run()
        await loop.rest()
        for client in clients:
            client.close()
        return loop

    loop = served(use)
    assert len(loop.latencies) == 7
    assert 0 < max(loop.latencies) <= loop.seconds


def test_very_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """More calls than tell anything new are not made."""
    monkeypatch.setattr(_load, "MOST_CALLS", 5)

    async def use(port: int) -> int:
        (client,) = await clients_of(port, 1)
        loop = ClosedLoop([client], seconds=60.0, fewest=1)
        await loop.run()
        client.close()
        return len(loop.latencies)

    assert served(use) == 5


class Silent(asyncio.Protocol):
    """Never answers."""


class Rude(asyncio.Protocol):
    """Hangs up."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.close()


def test_a_server_that_hangs_up() -> None:
    """A connection that ends in the middle of a call ends the measurement."""

    async def use(port: int) -> None:
        await ClosedLoop(await clients_of(port, 1), seconds=1.0, fewest=1).run()

    with pytest.raises(ConnectionError, match="the server closed a connection"):
        served(use, Rude)


def test_probes_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never answers is asked all the same, and each request counts as having taken
    until the end."""
    monkeypatch.setattr(_load, "_PROBE_EVERY", 0.005)

    async def use(port: int) -> Probes:
        probes = Probes(port)
        probing = asyncio.ensure_future(probes.run())
        await until(lambda: len(probes.connections) >= 4)
        probing.cancel()
        await asyncio.wait([probing])
        for connection in probes.connections:
            connection.close()
        return probes

    probes = served(use, Silent)
    assert len(probes.latencies) >= 4
    assert max(probes.latencies) >= 0.005 * (len(probes.latencies) - 1)


def test_only_so_many_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not answer is not buried under questions."""
    monkeypatch.setattr(_load, "_PROBE_EVERY", 0.0)
    monkeypatch.setattr(_load, "_MOST_PROBES", 3)

    async def use(port: int) -> Probes:
        probes = Probes(port)
        probing = asyncio.ensure_future(probes.run())
        await until(lambda: len(probes.connections) == 3)
        await some_turns()
        probing.cancel()
        await asyncio.wait([probing])
        for connection in probes.connections:
            connection.close()
        return probes

    probes = served(use, Silent)
    assert (len(probes.latencies), len(probes.connections)) == (3, 3)


class Unwell(Server):
    """Answers calls, and is not well."""

    def data_received(self, data: bytes) -> None:
        if b"/health" in data:
            self._transport.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")
        else:
            super().data_received(data)


async def measure(port: int, *, seconds: float) -> ClosedLoop:
    """With three clients."""
    clients, health = await clients_of(port, 3), Probes(port)
    try:
        loop = await _load._measure(clients, health, seconds)
        await loop.rest()
        return loop
    finally:
        for connection in [*clients, *health.connections]:
            connection.close()


def test_a_server_that_is_not_well() -> None:
    """A ``/health`` that fails is a failure, and not a figure that is missing."""
    with pytest.raises(ConnectionError, match=r"^/health: the server answered 'HTTP/1\.1 503"):
        served(lambda port: measure(port, seconds=0.05), Unwell)


def test_every_client_makes_some_calls() -> None:
    """However short the time: those that are cut off at its end are few beside them."""
    loop = served(lambda port: measure(port, seconds=0.0))
    assert len(loop.latencies) == 12
