"""Messages between two ends: here both in one process, and in two where that matters."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from asgi_infer.workers._channel import Channel, Kind, Used

Ends = tuple[Channel, Channel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Both ends of a channel."""
    left, right = socket.socketpair()
    ends = Channel(left), Channel(right)
    yield ends
    for end in ends:
        end.close()


def test_message_arrives(ends: Ends) -> None:
    """What is said about a message arrives with its body."""
    ends[0].send(
        Kind.EXECUTE,
        ends[0].encode(["body", 1]),
        number=7,
        deadline=1.5,
        stream=3,
        used=Used(1, 2, 3.0),
    )
    message = ends[1].receive()
    assert message.kind is Kind.EXECUTE
    assert (message.number, message.deadline, message.stream) == (7, 1.5, 3)
    assert message.used == Used(1, 2, 3.0)
    assert message.size > 0
    assert message.body() == ["body", 1]


def test_array_lies_in_the_segment(ends: Ends) -> None:
    """An array arrives without being copied, and its segment is used again when it has died."""
    for number in range(10):
        array = np.full(10_000, number)
        ends[0].send(Kind.RESULT, ends[0].encode({"a": array}))
        got = ends[1].receive().body()["a"]
        assert np.array_equal(got, array)
        del got
    assert ends[0]._segments.made == 1
