"""A client that reads streams, and counts their items as they come.

As a program: it asks for some streams one after the other and hangs up when their first item has
come; then it says ``ready`` once its clients have warmed the server up, waits for a line, and says
how many items came in how many seconds. It knows how long the first items took, of those who were
alone and of its clients.
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
_BREAK = 0.005  # seconds for the server to see that somebody has gone


class Reader(asyncio.Protocol):
    """One keep-alive connection that asks for the next stream when one has ended.

    :param on_first: called with the seconds that the first item of a stream has taken
    """

    def __init__(self, request: bytes, on_first: Callable[[float], None]) -> None:
        self._request = request
        self._on_first = on_first
        self._transport: Any = None
        self._tail = b""
        self._begun = False
        self._asked = 0.0
        self.items = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        items = data.count(LETTER)
        if items and not self._begun:
            self._begun = True
            self._on_first(time.perf_counter() - self._asked)
        self.items += items
        self._tail = (self._tail + data)[-len(_END) :]
        if self._begun and self._tail == _END:
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(exc or ConnectionError("the server ended a stream early"))

    def close(self) -> None:
        """Hang up, within a stream or not."""
        self.ended.cancel()
        self._transport.abort()

    def _ask(self) -> None:
        self._begun, self._asked = False, time.perf_counter()
        self._transport.write(self._request)


async def connect(port: int, request: bytes, on_first: Callable[[float], None]) -> Reader:
    """A reader of a server on this machine."""
    loop = asyncio.get_running_loop()
    connected = loop.create_connection(lambda: Reader(request, on_first), "127.0.0.1", port)
    return (await connected)[1]


async def first_item(port: int, request: bytes) -> float:
    """The seconds until the first item comes to somebody who is alone, and has enough then."""
    came: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    reader = await connect(port, request, came.set_result)
    while not came.done():
        await _unless_broken([reader], _BREAK)
    reader.close()
    await asyncio.sleep(_BREAK)
    return came.result()


async def load(port: int, request: bytes, options: argparse.Namespace) -> None:
    """Keep every connection reading; count what comes.

    :raises ConnectionError: a stream was broken off
    """
    alone = [await first_item(port, request) for _ in range(options.alone)]
    first: list[float] = []
    readers = [await connect(port, request, first.append) for _ in range(options.connections)]
    while not first:  # at least one stream has begun
        await _unless_broken(readers, _BREAK)
    await _unless_broken(readers, options.warmup)
    answer(event="ready")
    await told()
    before, start = sum(reader.items for reader in readers), time.perf_counter()
    await _unless_broken(readers, options.seconds)
    items = sum(reader.items for reader in readers) - before
    answer(
        items=items,
        seconds=time.perf_counter() - start,
        alone=percentile(alone, 50),
        first=percentile(first, 50),
    )
    for reader in readers:
        reader.close()


async def _unless_broken(readers: list[Reader], seconds: float) -> None:
    """Wait, or raise what ended a connection."""
    ends = [reader.ended for reader in readers]
    done, _ = await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for end in done:
        end.result()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._stream_load")
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--warmup", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--alone", type=int, default=1, help="streams for their first item")
    options = parser.parse_args()
    run_on_the_fastest_loop(load(options.port, request_for(options.path, None), options))


if __name__ == "__main__":
    main()
