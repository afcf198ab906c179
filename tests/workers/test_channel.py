"""Messages between two ends: both in this process, and in two where that matters."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import asgi_infer
from asgi_infer.workers import _channel, _segments
from asgi_infer.workers._channel import Channel, Kind
from asgi_infer.workers._codec import INLINE
from asgi_infer.workers._protocol import Used

LARGE = 10_000
Ends = tuple[Channel, Channel]


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two sockets that are connected."""
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@pytest.fixture
def ends(sockets: tuple[socket.socket, socket.socket]) -> Iterator[Ends]:
    """Both ends of a channel."""
    left, right = (Channel(sock) for sock in sockets)
    yield left, right
    left.close()
    right.close()


def deliver(sender: Channel, receiver: Channel, body: object) -> Any:
    """Send a body from one end to the other."""
    sender.send(Kind.RESULT, sender.encode(body))
    return receiver.receive().body()


# -- messages ----------------------------------------------------------------------------------


def test_message(ends: Ends) -> None:
    """A message arrives with what was said of it."""
    body = ["body", 1]
    details: Any = {"number": 7, "deadline": 1.5, "stream": -3, "used": Used(1, 2, 3.5)}
    ends[0].send(Kind.EXECUTE, ends[0].encode(body), **details)
    message = ends[1].receive()
    assert message.kind is Kind.EXECUTE
    assert {name: getattr(message, name) for name in details} == details
    assert 0 < message.size < 100
    assert message.body() == body


def test_bare_message(ends: Ends) -> None:
    """A message needs no body, and nothing needs to be said of it."""
    for kind in Kind:
        ends[1].send(kind)
        message = ends[0].receive()
        assert message.kind is kind
        assert (message.number, message.stream, message.size) == (0, 0, 0)
        assert message.deadline is None
        assert message.used is None
        assert message.body() is None


def test_both_ways(ends: Ends) -> None:
    """Each end asks and answers, with segments of its own, which are used again and again."""
    for number in range(20):
        there = deliver(*ends, np.full(LARGE, number))
        back = deliver(ends[1], ends[0], there + 1)
        assert back.tolist() == [number + 1] * LARGE
    # What came last lives until the next has come.
    assert [end._segments.made for end in ends] == [2, 2]


def test_size(ends: Ends) -> None:
    """The size of a message counts its arrays and its stream."""
    array = np.zeros(LARGE)
    for body in ([array, array[1:]], [bytes(160_000)]):
        ends[0].send(Kind.RESULT, ends[0].encode(body))
        assert 159_000 < ends[1].receive().size < 161_000


def test_one_system_call_each(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message costs one call of the kernel on each side, one with arrays in segments that
    are known already too."""
    calls: list[str] = []

    class Counting:
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(self.sock, name)

    deliver(*ends, np.zeros(LARGE))
    for end in ends:
        monkeypatch.setattr(end, "_sock", Counting(end._sock))
    deliver(*ends, [1, 2])
    deliver(*ends, np.zeros(LARGE))
    assert calls == ["send", "recvmsg"] * 2


def test_largest_inline(ends: Ends) -> None:
    """The largest message that goes through the socket fits both its buffer and the reader's."""
    body = bytes(INLINE - 50)
    encoded = ends[0].encode(body)
    assert len(encoded.inline) > INLINE - 50
    ends[0].send(Kind.RESULT, encoded)
    assert ends[1].receive().body() == body
    arrays = [np.zeros(LARGE) for _ in range(2)]
    got = deliver(*ends, [bytes(INLINE - 500), arrays])
    assert np.array_equal(got[1], arrays)


def test_default_timeout(sockets: tuple[socket.socket, socket.socket]) -> None:
    """A time limit that an application sets for all new sockets is none for a channel."""
    sockets[0].settimeout(0)  # as socket.setdefaulttimeout(0) would
    Channel(sockets[0])
    assert sockets[0].gettimeout() is None
    assert sockets[0].getblocking()


# -- without waiting ---------------------------------------------------------------------------


def test_receive_now(ends: Ends) -> None:
    """Without waiting one gets what has come, or nothing."""
    assert ends[1].receive_now() is None
    ends[0].send(Kind.READY, ends[0].encode("body"))
    assert select.select([ends[1]], [], [], 1)[0] == [ends[1]]
    message = ends[1].receive_now()
    assert message is not None
    assert message.body() == "body"
    assert ends[1].receive_now() is None


def test_part_of_a_message(sockets: Any) -> None:
    """Of a message that is not complete nothing is returned, and nothing is lost."""
    sender, receiver = Channel(sockets[0]), Channel(sockets[1])
    taps = socket.socketpair()
    tapped = Channel(taps[0])
    tapped.send(Kind.RESULT, tapped.encode("body"), number=5)
    data = taps[1].recv(1000)
    for position in range(len(data) - 1):
        sockets[0].send(data[position : position + 1])
        assert receiver.receive_now() is None
    sockets[0].send(data[-1:])
    message = receiver.receive_now()
    assert message is not None
    assert (message.number, message.body()) == (5, "body")
    for each in (sender, receiver, tapped, taps[1]):
        each.close()


def test_two_messages_at_once(ends: Ends) -> None:
    """A second message that is there already waits for its turn, its segment too."""
    for size in (1, LARGE, 1, 10 * LARGE, 1, 1):
        ends[0].send(Kind.RESULT, ends[0].encode(np.full(size, size)))
    for size in (1, LARGE, 1, 10 * LARGE, 1, 1):
        assert ends[1].receive().body().tolist() == [size] * size


def test_interrupted_send(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel takes only part of a message, the rest follows."""

    class Slow:
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def send(self, data: bytes) -> int:
            return self.sock.send(data[:10])

        def sendmsg(self, data: list[bytes], rights: Any) -> int:
            return self.sock.sendmsg([data[0][:10]], rights)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

    monkeypatch.setattr(ends[0], "_sock", Slow(ends[0]._sock))
    assert deliver(*ends, "body") == "body"
    assert deliver(*ends, np.zeros(LARGE)).sum() == 0


# -- ends --------------------------------------------------------------------------------------


def test_end(ends: Ends) -> None:
    """When the other end has closed, receiving says so, and sending too."""
    ends[0].close()
    for receive in (ends[1].receive, ends[1].receive_now):
        with pytest.raises(EOFError, match=r"gone$"):
            receive()
    with pytest.raises(BrokenPipeError):
        ends[1].send(Kind.STOP)


def test_end_with_something_unread(ends: Ends) -> None:
    """The same if the other end died before it had read everything."""
    ends[1].send(Kind.STOP)
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive()


def test_end_in_the_middle(sockets: Any, ends: Ends) -> None:
    """The end of the other side in the middle of a message is an end, and no message."""
    sockets[0].send(b"\x01\x00\x00")
    assert ends[1].receive_now() is None
    ends[0].close()
    with pytest.raises(EOFError, match="in the middle of a message"):
        ends[1].receive()


def test_no_message(sockets: Any, ends: Ends) -> None:
    """What does not begin like a message is refused, as is one that is too long."""
    sockets[0].send(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"not the start of a message: b'\\xff"):
        ends[1].receive()
    ends[1]._inbox = b""
    sockets[0].send(_channel._HEAD.pack(1, 0, 0, 0, 2**31, 0, 0, 0.0, 0, 0, 0.0))
    with pytest.raises(ValueError, match="not the start of a message"):
        ends[1].receive()


def test_close_leaves_nothing(sockets: Any) -> None:
    """A channel that is closed has let go of all descriptors, those in flight too."""
    before = set(os.listdir("/proc/self/fd"))
    ends = tuple(Channel(sock) for sock in sockets)
    array = np.zeros(LARGE)
    ends[0].encode(array)  # thrown away, and its segment is not announced
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, (2).to_bytes(4, sys.byteorder))]
    sockets[0].sendmsg([b"\x00"], rights)
    assert ends[1].receive_now() is None
    for end in ends:
        end.close()
    assert set(os.listdir("/proc/self/fd")) < before


def test_arrays_outlive_the_channel(ends: Ends) -> None:
    """Arrays that have arrived stay as they are when both ends are closed."""
    got = deliver(*ends, np.arange(LARGE))
    for end in ends:
        end.close()
    gc.collect()
    got += 1
    assert got.tolist() == list(range(1, LARGE + 1))


# -- segments ----------------------------------------------------------------------------------


def test_unread_message(ends: Ends) -> None:
    """A message that nobody reads frees its segment when it dies."""
    for _ in range(3):
        ends[0].send(Kind.RESULT, ends[0].encode(np.zeros(LARGE)))
        ends[1].receive()
    assert ends[0]._segments.made == 1


def test_read_message(ends: Ends) -> None:
    """A message that has been read keeps nothing: its arrays do."""
    messages = []
    for _ in range(3):
        ends[0].send(Kind.RESULT, ends[0].encode(np.zeros(LARGE)))
        messages.append(ends[1].receive())
        messages[-1].body()
    assert ends[0]._segments.made == 1


def test_failed_send(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that could not be sent frees its segment, which is announced with the next."""
    with monkeypatch.context() as patch:
        patch.setattr(ends[0], "_sock", socket.socket(socket.AF_UNIX))
        with ends[0]._sock, pytest.raises(OSError, match="not connected"):
            ends[0].send(Kind.RESULT, ends[0].encode(np.zeros(LARGE)))
    assert deliver(*ends, np.ones(LARGE)).sum() == LARGE
    assert ends[0]._segments.made == 1


def test_kept_results(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is kept stays as it was; when it dies, most of its memory is given up, and the
    other side unmaps that when the next message comes."""
    monkeypatch.setattr(_segments, "MOST", 20)
    kept = [deliver(*ends, np.full(LARGE, number)) for number in range(30)]
    assert [array[-1] for array in kept] == list(range(30))
    assert ends[0]._segments.made == 21
    assert len(ends[1]._mapped) == 21
    kept.clear()
    deliver(*ends, "something small")
    assert len(ends[0]._segments) == len(ends[1]._mapped) == _segments.SPARE
    for _ in range(30):
        assert deliver(*ends, np.ones(LARGE)).sum() == LARGE
    assert ends[0]._segments.made == 21


def test_freed_by_another_thread(ends: Ends) -> None:
    """The last array may die on any thread."""
    for _ in range(3):
        kept = [deliver(*ends, np.zeros(LARGE))]
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join()
    assert ends[0]._segments.made == 1


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """This process may open nothing."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_descriptor_to_send(ends: Ends) -> None:
    """Without a free descriptor no new segment can be made: that message fails alone."""
    with no_descriptors(), pytest.raises(OSError, match="ulimit -n") as caught:
        ends[0].encode(np.zeros(LARGE))
    assert caught.value.errno == errno.EMFILE
    assert deliver(*ends, np.ones(LARGE)).sum() == LARGE


def test_no_descriptor_to_receive(ends: Ends) -> None:
    """Nor can one be received: reading that message fails, the sender learns of it, and the
    channel goes on."""
    ends[0].send(Kind.RESULT, ends[0].encode(np.zeros(LARGE)))
    with no_descriptors():
        message = ends[1].receive()
    with pytest.raises(OSError, match=r"to receive 80,\d+ bytes: raise the limits"):
        message.body()
    assert len(ends[0]._segments) == 1
    deliver(ends[1], ends[0], "answer")
    assert len(ends[0]._segments) == 0
    assert ends[1]._mapped.lost == []
    assert deliver(*ends, np.ones(LARGE)).sum() == LARGE


# -- two processes -----------------------------------------------------------------------------

ECHO = """
import os, resource, socket, sys
from asgi_infer.workers._channel import Channel, Kind
channel = Channel(socket.socket(fileno=int(sys.argv[1])))
while True:
    try:
        body = channel.receive().body()
    except EOFError:
        break
    if body == "die":
        channel._sock.send(b"half")
        os.kill(os.getpid(), 9)
    if body == "faults":
        body = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    encoded = channel.encode(body)
    del body
    channel.send(Kind.RESULT, encoded)
"""


@pytest.fixture
def other_process() -> Iterator[Channel]:
    """A channel to another process, which sends back what it gets."""
    ours, theirs = socket.socketpair()
    root = str(Path(asgi_infer.__file__).parents[1])
    with theirs:
        command = [sys.executable, "-c", ECHO, str(theirs.fileno())]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": root}
        )
    channel = Channel(ours)
    with process:
        yield channel
        channel.close()


def call(channel: Channel, body: object) -> Any:
    channel.send(Kind.EXECUTE, channel.encode(body))
    return channel.receive().body()


def test_other_process(other_process: Channel) -> None:
    """Between two processes arrays arrive as they were, in memory that both have mapped: neither
    faults pages in again. Nothing has a name, and the death of the other side is an end."""
    names = sorted(os.listdir("/dev/shm"))
    array = np.arange(200_000.0)
    for _ in range(3):
        assert np.array_equal(call(other_process, [array])[0], array)
    faults = call(other_process, "faults")
    ours = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        call(other_process, [array])
    assert call(other_process, "faults") - faults < 100  # of 3,910 pages there and 3,910 back
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - ours < 100
    assert other_process._segments.made <= 2
    assert sorted(os.listdir("/dev/shm")) == names
    with pytest.raises(EOFError, match="in the middle of a message"):
        call(other_process, "die")
