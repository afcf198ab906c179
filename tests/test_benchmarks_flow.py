"""Facts about the benchmarks of many calls at once: their clients, their arithmetic, pictures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

from asgi_infer.native.noise import Noise
from benchmarks import _open_loop, _stream_load, overload, plot_overload
from benchmarks._figure import Comparison, Figure, Metric, Result, Traced
from benchmarks._open_loop import Asker, Client, Patience, Phase, Sent
from benchmarks._report import as_json
from benchmarks._work import Work

from .doctor.conftest import fonts  # noqa: F401  # a fixture

T = TypeVar("T")

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n7"
REFUSED = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno"


def sent(due: float, outcome: str, latency: float = 0.0) -> Sent:
    """A request that has ended."""
    return Sent(due, outcome=outcome, latency=latency)


# -- the schedule and the figures --------------------------------------------------------------


def test_requests_are_due_at_even_distances_within_each_phase() -> None:
    """A phase is so many seconds of so many times the capacity, and begins where one has ended."""
    phases = [Phase.parse("0.5:2"), Phase.parse("2:1")]
    due = list(_open_loop.schedule(phases, capacity=2.0))
    assert due == [0.0, 1.0, 2.0, 2.25, 2.5, 2.75]
    assert [str(phase) for phase in phases] == ["0.5:2", "2:1"]


def test_every_request_is_counted_in_the_second_in_which_it_was_due() -> None:
    """The outcomes of a second add up to what was offered in it; without a 200, no latency."""
    every = [
        sent(0.1, "good", 0.2),
        sent(0.9, "late", 0.6),
        sent(1.0, "refused", 0.01),
        sent(1.5, "left", 0.7),
        sent(2.0, "failed"),  # due when the last second has just ended: rounding
    ]
    series = _open_loop.by_second(every, 2)
    assert series["offered"] == [2, 3]
    assert [series[outcome] for outcome in _open_loop.OUTCOMES] == [
        [1, 0],
        [1, 0],
        [0, 1],
        [0, 1],
        [0, 1],
    ]
    assert series["p50"] == [0.2, None]
    assert series["p99"] == [0.6, None]


def test_latencies_of_answers_and_of_refusals_are_kept_apart() -> None:
    """A server that refuses at once is not a fast one, and one that refuses nothing has none."""
    values = _open_loop.summary([sent(0, "good", 0.4), sent(0, "refused", 0.1)], seconds=2.0)
    assert values["good"] == values["refused"] == 0.5
    assert values["accepted_p50"] == 0.4
    assert values["refusal_p99"] == 0.1
    assert "refusal_p99" not in _open_loop.summary([sent(0, "good", 0.4)], seconds=2.0)


def test_recovery_lasts_until_the_last_request_without_a_good_answer() -> None:
    """What was due before the overload ended does not count."""
    every = [sent(9, "left"), sent(10, "good"), sent(12, "late"), sent(13, "good")]
    assert _open_loop.recovery(every, after=10) == 2
    assert _open_loop.recovery(every, after=12.5) == 0


def test_a_sample_is_of_the_capacity() -> None:
    """Goodput and what was offered are multiples of it, shares are of what was offered."""
    during = {"offered": 20.0, "good": 9.0, "late": 1.0, "refused": 10.0, "left": 0.0}
    during |= {"failed": 0.0, "lag": 0.001, "accepted_p50": 0.25}
    seen = {"capacity": 10.0, "overload": during, "recovery": 0.0, "series": {"good": [9]}}
    sample = overload.sample(seen)
    assert sample["goodput"] == 0.9
    assert sample["offered"] == 2.0
    assert sample["refused"] == 50.0
    assert sample["accepted_p50"] == 250.0
    assert sample.series == {"good": [9]}


# -- the clients -------------------------------------------------------------------------------


def test_a_status_is_known_when_the_response_has_come_to_its_end() -> None:
    """In pieces of any size, and without a body as well."""
    whole = [end for end in range(len(REFUSED) + 1) if _open_loop.status_of(REFUSED[:end])]
    assert whole == [len(REFUSED)]
    assert _open_loop.status_of(b"HTTP/1.1 204 No Content\r\n\r\n") == 204


Respond = Callable[[asyncio.StreamWriter], Awaitable[None]]


def with_server(respond: Respond, use: Callable[[int], Awaitable[T]]) -> T:
    """What ``use`` returns while a server on this port answers each request with ``respond``."""

    served: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                await respond(writer)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.add(asyncio.create_task(connected(reader, writer)))

    async def main() -> T:
        server = await asyncio.start_server(begin, "127.0.0.1", 0)
        async with server:
            result = await use(server.sockets[0].getsockname()[1])
        await asyncio.gather(*served)
        return result

    return asyncio.run(main())


REQUEST = b"GET / HTTP/1.1\r\n\r\n"


def one_request(respond: Respond, patience: Patience, late: float = 0.0) -> Sent:
    """A request that was due some seconds ago."""

    async def use(port: int) -> Sent:
        client = Client(port, REQUEST, patience)
        request = Sent(0.0)
        await client.send(request, asyncio.get_running_loop().time() - late)
        client.close()
        return request

    return with_server(respond, use)


async def answer_ok(writer: asyncio.StreamWriter) -> None:
    writer.write(OK)


async def refuse(writer: asyncio.StreamWriter) -> None:
    writer.write(REFUSED)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def say_nothing(writer: asyncio.StreamWriter) -> None:
    del writer


@pytest.mark.parametrize(
    ("respond", "outcome"), [(answer_ok, "good"), (refuse, "refused"), (hang_up, "failed")]
)
def test_an_answer_decides_what_became_of_a_request(respond: Respond, outcome: str) -> None:
    """A 200 in time is good, a 503 is a refusal, no answer at all a failure."""
    assert one_request(respond, Patience(60.0, 120.0)).outcome == outcome


def test_latency_counts_from_when_a_request_was_due() -> None:
    """An answer at once is late for a user who has waited for the client to ask."""
    request = one_request(answer_ok, Patience(60.0, 120.0), late=90.0)
    assert request.outcome == "late"
    assert request.latency >= request.lag >= 90.0


def test_a_client_that_has_lost_patience_hangs_up() -> None:
    """It gets no answer, and leaves."""
    assert one_request(say_nothing, Patience(0.005, 0.01)).outcome == "left"


def test_a_connection_is_used_again_unless_it_is_closed() -> None:
    """A second request makes no second connection, and one that was lost is replaced."""

    async def use(port: int) -> list[Asker]:
        client = Client(port, REQUEST, Patience(60.0, 120.0))
        used = []
        for _ in range(2):
            await client.ask()
            used.append(client._free[-1])
        client.close()
        await client.ask()
        used.append(client._free[-1])
        client.close()
        return used

    first, again, other = with_server(answer_ok, use)
    assert first is again
    assert other is not first


def test_a_stream_is_read_to_its_end_and_asked_for_again() -> None:
    """Items are counted, not chunks; the end may come in pieces, and is not an item."""
    asked: list[bytes] = []
    first: list[float] = []

    class Wire(asyncio.Transport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            asked.append(bytes(data))

    async def main() -> int:
        reader = _stream_load.Reader(REQUEST, first.append, _stream_load.Reader.ask)
        reader.connection_made(Wire())
        for part in (b"HTTP/1.1 200 OK\r\n\r\n2\r\nz\n\r\n", b"2\r\nz\n\r\n0\r", b"\n\r\n"):
            assert len(asked) == 1
            reader.data_received(part)
        reader.ended.cancel()
        return reader.items

    assert asyncio.run(main()) == 2
    assert asked == [REQUEST] * 2
    assert len(first) == 1


# -- the model, the report, the pictures -------------------------------------------------------


def test_work_is_passed_on_as_text() -> None:
    """A server does the work that its parent has measured out, and answers for each item."""
    work = Work(3, 2)
    assert Work.parse(str(work)) == work
    assert work.predict_many([3, 14]) == [3, 4]


def kept() -> dict[str, object]:
    """The JSON of an overload with two rounds of one arm."""
    figure = Figure(
        name="overload",
        title="two seconds",
        arms=["def", "executor"],
        metrics=[Metric("goodput", "goodput x")],
        comparisons=[Comparison("goodput", "def")],
        steps=[],
    )
    series: dict[str, list[float | None]] = {
        "offered": [1, 2],
        "good": [1, 0],
        "refused": [0, 1],
        "p50": [0.1, None],
        "p99": [0.2, None],
    }
    rounds = [
        {"def": Traced({"goodput": goodput, "capacity": 1.0}, series), "executor": {}}
        for goodput in (0.5, 0.25)
    ]
    measured = Result(figure, list(rounds), [Noise(pressure=0.0, others=0.0, stolen=0.0)])
    result: dict[str, object] = json.loads(json.dumps(as_json(measured)))
    return result


def test_the_json_holds_every_second() -> None:
    """Of the arms that have been traced; the table and the medians do not see it."""
    series = kept()["series"]
    assert isinstance(series, list)
    assert [list(each) for each in series] == [["def"]] * 2
    assert series[0]["def"]["p50"] == [0.1, None]


def test_pictures_are_drawn_from_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for a light page, one for a dark one; arms that were not measured are left out."""
    monkeypatch.setattr(plot_overload, "DPI", 0.2)  # a tenth of the width, and quick
    plot_overload.draw(kept(), tmp_path)
    light, dark = tmp_path / "overload.png", tmp_path / "overload-dark.png"
    assert light.read_bytes().startswith(b"\x89PNG")
    assert light.read_bytes() != dark.read_bytes()


def test_every_arm_has_a_colour() -> None:
    """In both schemes, which name the same things."""
    arms = {"runner" if arm in overload.OURS else arm for arm in overload.ARMS}
    assert arms <= plot_overload.LIGHT.keys() == plot_overload.DARK.keys()
