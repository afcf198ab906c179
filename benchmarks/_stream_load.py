"""A client that reads streams, and counts their items as they come.

As a program: it reads some short streams, one after the other, and says how long the first item
took. Then, for each number of connections, it says ``ready`` once they have warmed the server up,
waits for a line, and says how many items came in how many seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from typing import Any

from ._children import answer
from ._http import percentile, request_for, run_on_the_fastest_loop, told

LETTER = b"z"
"""In each item once, and in nothing else of a response."""
_END = b"0\r\n\r\n"
_FEW, _MANY = "/few", "/predict"  # the paths of a short stream and of a long one
_MOMENT = 0.005  # seconds


class Reader(asyncio.Protocol):
    """One keep-alive connection that asks for a stream whenever it is told to.

    :param on_first: called with the seconds that the first item of a stream has taken
    :param on_end: called when a stream has come to its end
    """

    def __init__(
        self,
        request: bytes,
        on_first: Callable[[float], None],
        on_end: Callable[[Reader], None],
    ) -> None:
        self._request = request
        self._on_first = on_first
        self._on_end = on_end
        self._transport: Any = None
        self._tail = b""
        self._begun = False
        self._asked = 0.0
        self.items = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.ask()

    def data_received(self, data: bytes) -> None:
        items = data.count(LETTER)
        if items and not self._begun:
            self._begun = True
            self._on_first(time.perf_counter() - self._asked)
        self.items += items
        self._tail = (self._tail + data)[-len(_END) :]
        if self._begun and self._tail == _END:
            self._on_end(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(exc or ConnectionError("the server ended a stream early"))

    def close(self) -> None:
        """Hang up, within a stream or not."""
        self.ended.cancel()
        self._transport.abort()

    def ask(self) -> None:
        """For a stream."""
        self._begun, self._asked = False, time.perf_counter()
        self._transport.write(self._request)


async def read_alone(port: int, first: list[float]) -> None:
    """Read one short stream to its end, with nobody beside it."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    request = request_for(_FEW, None)
    _, reader = await loop.create_connection(
        lambda: Reader(request, first.append, lambda _: over.set()), "127.0.0.1", port
    )
    while not over.is_set():
        await _unless_broken([reader], _MOMENT)
    reader.close()


async def read_together(port: int, connections: int, options: argparse.Namespace) -> None:
    """Keep so many connections reading; count what comes.

    :raises ConnectionError: a stream was broken off
    """
    loop = asyncio.get_running_loop()
    request = request_for(_MANY, None)
    first: list[float] = []
    readers: list[Reader] = []
    for _ in range(connections):
        connected = loop.create_connection(
            lambda: Reader(request, first.append, Reader.ask), "127.0.0.1", port
        )
        readers.append((await connected)[1])
    while not first:  # at least one stream has begun
        await _unless_broken(readers, _MOMENT)
    await _unless_broken(readers, options.warmup)
    answer(event="ready")
    await told()
    before, start = sum(reader.items for reader in readers), time.perf_counter()
    await _unless_broken(readers, options.seconds)
    items = sum(reader.items for reader in readers) - before
    answer(items=items, seconds=time.perf_counter() - start, first=percentile(first, 50))
    for reader in readers:
        reader.close()


async def load(port: int, options: argparse.Namespace) -> None:
    """Short streams, and then long ones for each number of connections."""
    alone: list[float] = []
    for _ in range(options.alone):
        await read_alone(port, alone)
    answer(first=percentile(alone, 50))
    for connections in options.connections:
        await read_together(port, connections, options)


async def _unless_broken(readers: list[Reader], seconds: float) -> None:
    """Wait, or raise what ended a connection."""
    ends = [reader.ended for reader in readers]
    done, _ = await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for end in done:
        end.result()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._stream_load")
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, nargs="+", required=True)
    parser.add_argument("--warmup", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--alone", type=int, default=1, help="short streams")
    options = parser.parse_args()
    run_on_the_fastest_loop(load(options.port, options))


if __name__ == "__main__":
    main()
