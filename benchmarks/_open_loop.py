"""A client that sends on schedule, whether or not anything is answered: an open loop.

Users come when they come. A client that waits for its answer before it asks again (a closed
loop) slows down with the server, and so never shows what happens when more comes in than can be
served. Latencies count from when a request was *due*, so that a request that this client itself
sends late, or that waits for a connection, looks no faster than it was to its user.

As a program: it measures first, with a closed loop, how many calls the server can do, and then
sends multiples of that. It says ``ready`` with the capacity, waits for a line, and says what it
saw, second by second.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ._children import answer
from ._http import LENGTH, percentile, request_for, run_on_the_fastest_loop, told

OUTCOMES = ("good", "late", "refused", "left", "failed")
"""How a request ends: a 200 within the deadline, a 200 after it, a 503 or 504, without an answer
when its client has lost patience, and in any other way."""

_REFUSALS = (503, 504)


@dataclass(frozen=True)
class Phase:
    """Some seconds of a steady rate, as a multiple of the capacity."""

    factor: float
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Phase:
        """``2:60`` is twice the capacity for a minute."""
        factor, seconds = text.split(":")
        return cls(float(factor), float(seconds))

    def __str__(self) -> str:
        return f"{self.factor:g}:{self.seconds:g}"


@dataclass
class Sent:
    """One request, and what became of it."""

    due: float  # seconds since the first phase began
    lag: float = 0.0  # seconds by which it was sent late
    outcome: str = ""
    latency: float = 0.0  # seconds from ``due``


@dataclass(frozen=True)
class Patience:
    """How long an answer is of use, and how long its client waits."""

    deadline: float
    leaves_after: float


class Asker(asyncio.Protocol):
    """One keep-alive connection, with one request on it at a time."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._received = b""
        self._answered: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def ask(self, request: bytes) -> asyncio.Future[int]:
        """Send it; return what will be the status of the answer."""
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answered

    def data_received(self, data: bytes) -> None:
        self._received += data
        status = status_of(self._received)
        if status is not None:
            self._received = b""
            if self._answered is not None and not self._answered.done():
                self._answered.set_result(status)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(exc or ConnectionError("the server hung up"))

    @property
    def usable(self) -> bool:
        """Whether there can be another request on it."""
        return not self._transport.is_closing()

    def close(self) -> None:
        """Hang up at once, as a client does that has lost patience."""
        self._transport.abort()


def status_of(response: bytes) -> int | None:
    """The status of ``response``, if it has come to its end."""
    head = response.find(b"\r\n\r\n")
    if head < 0:
        return None
    length = LENGTH.search(response, 0, head)
    if len(response) < head + 4 + (0 if length is None else int(length[1])):
        return None
    return int(response[9:12])


@dataclass
class Client:
    """Everybody who asks, with the connections that are free."""

    port: int
    request: bytes
    patience: Patience
    _free: list[Asker] = field(default_factory=list)

    async def send(self, sent: Sent, due: float) -> None:
        """One request of one user, who waits from ``due``, of the loop's clock, on."""
        loop = asyncio.get_running_loop()
        sent.lag = loop.time() - due
        status = 0
        try:
            async with asyncio.timeout_at(due + self.patience.leaves_after):
                status = await self.ask()
        except TimeoutError:
            sent.outcome = "left"
        except OSError:
            sent.outcome = "failed"
        sent.latency = loop.time() - due
        sent.outcome = sent.outcome or self._outcome(status, sent.latency)

    async def ask(self) -> int:
        """One request, on a connection that is free or new; return its status."""
        asker = await self._connection()
        try:
            status = await asker.ask(self.request)
        except BaseException:
            asker.close()
            raise
        self._free.append(asker)
        return status

    async def _connection(self) -> Asker:
        while self._free:
            asker = self._free.pop()
            if asker.usable:
                return asker
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(Asker, "127.0.0.1", self.port))[1]

    def _outcome(self, status: int, latency: float) -> str:
        if status == 200:
            return "good" if latency <= self.patience.deadline else "late"
        return "refused" if status in _REFUSALS else "failed"

    def close(self) -> None:
        """Hang up everywhere."""
        for asker in self._free:
            asker.close()


def schedule(phases: Iterable[Phase], capacity: float) -> Iterator[float]:
    """When each request is due, in seconds from the start."""
    start = 0.0
    for phase in phases:
        rate = phase.factor * capacity
        for number in range(round(phase.seconds * rate)):
            yield start + number / rate
        start += phase.seconds


async def send_all(client: Client, phases: Sequence[Phase], capacity: float) -> list[Sent]:
    """Send every request when it is due; return when the last one has ended."""
    every: list[Sent] = []
    loop = asyncio.get_running_loop()
    start = loop.time()
    async with asyncio.TaskGroup() as group:
        for due in schedule(phases, capacity):
            await asyncio.sleep(max(0.0, start + due - loop.time()))
            every.append(Sent(due))
            group.create_task(client.send(every[-1], start + due))
    return every


async def capacity_of(client: Client, connections: int, warmup: float, seconds: float) -> float:
    """Calls per second with so many clients, each of whom waits for an answer and asks again.

    :raises ConnectionError: no answer is a 200
    """
    counted = 0.0
    begin = time.perf_counter() + warmup
    end = begin + seconds

    async def ask_again() -> None:
        nonlocal counted
        while time.perf_counter() < end:
            asked = time.perf_counter()
            good = await client.ask() == 200
            # An answer across an edge counts for the part of it that is inside.
            now = time.perf_counter()
            counted += good * max(0.0, min(now, end) - max(asked, begin)) / (now - asked)

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(ask_again())
    if not counted:
        raise ConnectionError("a server that is not overloaded answers nobody with a 200")
    return counted / seconds


def by_second(every: Iterable[Sent], seconds: int) -> dict[str, list[float | None]]:
    """For each second what was due in it: how many, how they ended, and their latencies."""
    bins: list[list[Sent]] = [[] for _ in range(seconds)]
    for sent in every:
        bins[min(int(sent.due), seconds - 1)].append(sent)
    accepted = [_latencies(each, "good", "late") for each in bins]
    return {
        "offered": [len(each) for each in bins],
        **{name: [_count(each, name) for each in bins] for name in OUTCOMES},
        "p50": [_percentile(each, 50) for each in accepted],
        "p99": [_percentile(each, 99) for each in accepted],
    }


def summary(every: Sequence[Sent], seconds: float) -> dict[str, float]:
    """What became of requests that were due within so many seconds.

    Without a figure for what did not happen: refusals that nobody got have no latency.
    """
    values = {"offered": len(every) / seconds, "lag": percentile([x.lag for x in every], 99)}
    for name in OUTCOMES:
        values[name] = _count(every, name) / seconds
    for name, outcomes in (("accepted", ("good", "late")), ("refusal", ("refused",))):
        latencies = _latencies(every, *outcomes)
        if latencies:
            values[f"{name}_p50"] = percentile(latencies, 50)
            values[f"{name}_p99"] = percentile(latencies, 99)
    return values


def recovery(every: Iterable[Sent], after: float) -> float:
    """Seconds from ``after`` until the last request came that did not get a good answer."""
    bad = [sent.due - after for sent in every if sent.due >= after and sent.outcome != "good"]
    return max(bad, default=0.0)


def _count(every: Iterable[Sent], outcome: str) -> int:
    return sum(sent.outcome == outcome for sent in every)


def _latencies(every: Iterable[Sent], *outcomes: str) -> list[float]:
    return [sent.latency for sent in every if sent.outcome in outcomes]


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return percentile(values, percent) if values else None


async def measure(client: Client, options: argparse.Namespace) -> None:
    """Both loops, one after the other."""
    capacity = await capacity_of(client, options.connections, options.warmup, options.seconds)
    answer(event="ready", capacity=capacity)
    await told()
    phases: list[Phase] = options.phases
    every = await send_all(client, phases, capacity)
    client.close()
    begin = phases[0].seconds
    end = begin + phases[1].seconds
    during = [sent for sent in every if begin <= sent.due < end]
    answer(
        capacity=capacity,
        overload=summary(during, end - begin),
        recovery=recovery(every, end),
        series=by_second(every, max(1, round(sum(phase.seconds for phase in phases)))),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._open_loop")
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("--connections", type=int, required=True, help="of the closed loop")
    parser.add_argument("--warmup", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of the closed loop")
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--leaves-after", type=float, required=True)
    parser.add_argument(
        "--phases", type=Phase.parse, nargs=3, required=True, help="FACTOR:SECONDS"
    )
    options = parser.parse_args()
    patience = Patience(options.deadline, options.leaves_after)
    client = Client(options.port, request_for(options.path, None), patience)
    run_on_the_fastest_loop(measure(client, options))


if __name__ == "__main__":
    main()
