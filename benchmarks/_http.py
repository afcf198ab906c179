"""A load client and a prober for one path, written to cost little beside the server.

Run as a program it is a process of its own: it says ``ready`` once it has warmed the server up,
waits for a line, measures, and says what it saw.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from ._children import answer

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_PROBE_EVERY = 0.02


OnResponse = Callable[["Connection"], None]


class Connection(asyncio.Protocol):
    """One keep-alive connection that sends the same request whenever it is told to.

    :param on_response: called when a response is whole
    """

    def __init__(self, request: bytes, on_response: OnResponse) -> None:
        self._request = request
        self._on_response = on_response
        self._received = b""
        self._transport: Any = None
        self.sent = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def send(self) -> None:
        """Ask once more."""
        self.sent = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if is_whole(self._received):
            self._received = b""
            self._on_response(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(exc or ConnectionError("the server closed a connection"))

    def close(self) -> None:
        """Hang up."""
        self.ended.cancel()
        self._transport.abort()


def is_whole(response: bytes) -> bool:
    """Whether ``response`` has come to its end.

    :raises ConnectionError: it is not the one that was asked for
    """
    head = response.find(b"\r\n\r\n")
    if head < 0:
        return False
    length = LENGTH.search(response, 0, head)
    if not response.startswith(b"HTTP/1.1 200") or length is None:
        raise ConnectionError(f"unexpected response: {response[:200]!r}")
    return len(response) >= head + 4 + int(length[1])


def request_for(path: str, body: str | None) -> bytes:
    """A GET without a body, a POST of JSON with one."""
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    if body is not None:
        head += f"content-type: application/json\r\ncontent-length: {len(body.encode())}\r\n"
    return f"{head}\r\n{body or ''}".encode()


async def connect(port: int, request: bytes, on_response: OnResponse) -> Connection:
    """A connection to a server on this machine."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(
        lambda: Connection(request, on_response), "127.0.0.1", port
    )
    return connection


async def load(
    port: int, request: bytes, *, connections: int, warmup: float, seconds: float
) -> None:
    """Keep every connection waiting for a response; count the responses."""
    count = 0

    def again(connection: Connection) -> None:
        nonlocal count
        count += 1
        connection.send()

    clients = [await connect(port, request, again) for _ in range(connections)]
    for client in clients:
        client.send()
    await _unless_broken(clients, asyncio.sleep(warmup))
    answer(event="ready")
    await _unless_broken(clients, told())
    before, start = count, time.perf_counter()
    await _unless_broken(clients, asyncio.sleep(seconds))
    answer(calls=count - before, seconds=time.perf_counter() - start)
    for client in clients:
        client.close()


async def probe(port: int, request: bytes, *, seconds: float) -> None:
    """Ask every 20 ms, whether or not the last answer has come, and time each answer.

    A prober that waited for its answers would ask a stalled server less often, and so see less
    of what everybody else sees.
    """
    latencies: list[float] = []
    free: list[Connection] = []
    every: list[Connection] = []

    def arrived(connection: Connection) -> None:
        latencies.append(time.perf_counter() - connection.sent)
        free.append(connection)

    async def ask() -> None:
        if not free:
            free.append(await connect(port, request, arrived))
            every.append(free[-1])
        free.pop().send()

    await ask()
    answer(event="ready")
    await told()
    latencies.clear()
    lags = await _on_schedule(ask, seconds)
    await _unless_broken(every, _until(lambda: len(free) == len(every)))
    answer(
        p99=percentile(latencies, 99), median=percentile(latencies, 50), late=percentile(lags, 99)
    )
    for connection in every:
        connection.close()


async def _on_schedule(
    ask: Callable[[], Coroutine[Any, Any, None]], seconds: float
) -> list[float]:
    """Ask at every tick; return how late this process itself was at each."""
    start = time.perf_counter()
    lags: list[float] = []
    for tick in range(max(1, round(seconds / _PROBE_EVERY))):
        due = start + tick * _PROBE_EVERY
        await asyncio.sleep(due - time.perf_counter())
        lags.append(time.perf_counter() - due)
        await ask()
    return lags


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def _unless_broken(
    connections: Sequence[Connection], waited_for: Coroutine[Any, Any, None]
) -> None:
    """Wait for something, or for the first connection to fail."""
    task = asyncio.ensure_future(waited_for)
    ends = [connection.ended for connection in connections]
    await asyncio.wait([task, *ends], return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        if end.done():
            end.result()
    await task


async def told() -> None:
    """Wait for the parent's line."""
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, heard.set)
    await heard.wait()
    loop.remove_reader(sys.stdin)
    if not sys.stdin.readline():
        raise SystemExit("the parent is gone")


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that ``percent`` per cent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def run_on_the_fastest_loop(main: Coroutine[Any, Any, None]) -> None:
    """uvloop's if it is there: the client is not to be what is measured."""
    factory = None
    with suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._http")
    parser.add_argument("role", choices=["load", "probe"])
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("--body", help="JSON to POST; without it, requests are GETs")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--warmup", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    request = request_for(options.path, options.body)
    if options.role == "probe":
        client = probe(options.port, request, seconds=options.seconds)
    else:
        client = load(
            options.port,
            request,
            connections=options.connections,
            warmup=options.warmup,
            seconds=options.seconds,
        )
    run_on_the_fastest_loop(client)


if __name__ == "__main__":
    main()
