"""The clients of a server and a prober of its ``/health``, written to cost little beside it."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any, cast

from ._calls import FEWEST_CALLS, MOST_CALLS
from ._channel import Channel

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CALLS_OF_EACH = 4  # so that those under way at the end are few beside those that count
_PROBE_EVERY = 0.02
_MOST_PROBES = 64  # under way at once
_WARM_SECONDS = 0.3
_CALLS_FOR_WARMTH = 2


def load(channel: Channel, job: dict[str, Any]) -> None:
    """Warm the server up, say so, and once told measure it."""
    try:
        asyncio.run(_load(channel, job))
    except ConnectionError as error:
        channel.send(error=str(error))


async def _load(channel: Channel, job: dict[str, Any]) -> None:
    port, health = job["port"], Probes(job["port"])
    clients = [await connect(port, job["path"]) for _ in range(job["clients"])]
    try:
        await _warm_up(clients, health)
        channel.send(ready=True)
        await asyncio.to_thread(channel.receive)
        measured = await _measure(clients, health, job["seconds"])
        channel.send(done=True)
        await measured.rest()
        await asyncio.to_thread(channel.receive)
    finally:
        for connection in [*clients, *health.connections]:
            connection.close()
    channel.send(seconds=measured.seconds, latencies=measured.latencies, health=health.latencies)


async def _warm_up(clients: list[Connection], health: Probes) -> None:
    warm = ClosedLoop(clients, seconds=_WARM_SECONDS, fewest=_CALLS_FOR_WARMTH * len(clients))
    await warm.run()
    await warm.rest()
    await health.ask()


async def _measure(clients: list[Connection], health: Probes, seconds: float) -> ClosedLoop:
    fewest = max(FEWEST_CALLS, _CALLS_OF_EACH * len(clients))
    measured = ClosedLoop(clients, seconds=seconds, fewest=fewest)
    probing = asyncio.ensure_future(health.run())
    await measured.run()
    probing.cancel()
    await asyncio.wait([probing])
    if not probing.cancelled():
        await probing  # which has failed
    return measured


class Connection(asyncio.Protocol):
    """One keep-alive connection that sends the same request again and again."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._received = b""
        self._response: asyncio.Future[None] | None = None

    async def ask(self) -> float:
        """Send the request; the seconds until its whole response was there.

        :raises ConnectionError: the response is not the one that was asked for
        """
        self._response = asyncio.get_running_loop().create_future()
        start = time.perf_counter()
        self._transport.write(self._request)
        await self._response
        return time.perf_counter() - start

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        try:
            whole = is_whole(self._received)
        except ConnectionError as error:
            self._end(error)
        else:
            if whole:
                self._received = b""
                self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionError("the server closed a connection"))

    def _end(self, error: Exception | None) -> None:
        response = self._response
        if response is None or response.done():
            return
        if error is None:
            response.set_result(None)
        else:
            response.set_exception(error)

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()


def is_whole(response: bytes) -> bool:
    """Whether ``response`` has come to its end.

    :raises ConnectionError: it is not the one that was asked for
    """
    head = response.find(b"\r\n\r\n")
    if head < 0:
        return False
    length = _LENGTH.search(response, 0, head)
    if not response.startswith(b"HTTP/1.1 200") or length is None:
        status = response[:head].partition(b"\r\n")[0].decode(errors="replace")
        raise ConnectionError(f"the server answered {status!r}")
    return len(response) >= head + 4 + int(length[1])


async def connect(port: int, path: str) -> Connection:
    """A connection to a server on this machine."""
    request = f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(request), "127.0.0.1", port
    )
    return connection


class ClosedLoop:
    """Clients that each ask again as soon as they have their answer, for a time.

    :ivar latencies: of the calls, in the order in which they ended
    :ivar seconds: from the first request to the last response that counts
    """

    def __init__(self, clients: list[Connection], *, seconds: float, fewest: int) -> None:
        self._clients = clients
        self._limit = seconds
        self._fewest = fewest
        self.latencies: list[float] = []
        self.seconds = 0.0
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Measure, and return when the last call that counts has ended.

        :raises ConnectionError: a response is not the one that was asked for
        """
        start = time.perf_counter()
        self._rest = asyncio.gather(*(self._ask_on(client, start) for client in self._clients))
        over = asyncio.ensure_future(self._over.wait())
        either: list[asyncio.Future[Any]] = [self._rest, over]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not over.done():
            over.cancel()
            await self._rest

    async def rest(self) -> None:
        """Wait for the calls that were under way at the end."""
        await self._rest

    async def _ask_on(self, client: Connection, start: float) -> None:
        while not self._over.is_set():
            latency = await client.ask()
            if not self._over.is_set():
                self.latencies.append(latency)
                self.seconds = time.perf_counter() - start
                self._look_whether_over()

    def _look_whether_over(self) -> None:
        calls = len(self.latencies)
        if calls >= MOST_CALLS or (calls >= self._fewest and self.seconds >= self._limit):
            self._over.set()


class Probes:
    """Asks ``/health`` every 20 ms, whether or not the last answer has come.

    A prober that waited for its answers would ask a stalled server less often, and so see less
    of what everybody else sees. When very many are under way, some are left out.

    :ivar latencies: of each answer, in seconds since it was due to be asked for
    :ivar connections: as many as were under way at once
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[Connection] = []
        self.connections: list[Connection] = []
        self.latencies: list[float] = []
        self._under_way = 0

    async def run(self) -> None:
        """Ask until cancelled; what is then under way counts with the time that it took so far.

        :raises ConnectionError: a response is not the one that was asked for
        """
        due = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as probes:
                while True:
                    if self._under_way < _MOST_PROBES:
                        self._under_way += 1
                        probes.create_task(self._probe(due))
                    due += _PROBE_EVERY
                    await asyncio.sleep(due - time.perf_counter())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _probe(self, due: float) -> None:
        try:
            await self.ask()
        finally:
            self.latencies.append(time.perf_counter() - due)
            self._under_way -= 1

    async def ask(self) -> None:
        """Ask once.

        :raises ConnectionError: the response is not the one that was asked for
        """
        if self._free:
            connection = self._free.pop()
        else:
            connection = await connect(self._port, "/health")
            self.connections.append(connection)
        try:
            await connection.ask()
        except ConnectionError as error:
            raise ConnectionError(f"/health: {error}") from None
        self._free.append(connection)
