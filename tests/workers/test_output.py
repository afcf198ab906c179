"""What a child prints: lines, pieces, last words."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from io import FileIO

import pytest

from asgi_infer.workers._output import LONGEST, TURN, LastWords, Output


class Stream:
    """An output and the end of the pipe that a child would have."""

    def __init__(self) -> None:
        reader, self.writer = os.pipe()
        os.set_blocking(reader, False)
        self.words = LastWords()
        self.output = Output(FileIO(reader, "rb"), "m-0", logging.WARNING, self.words)

    def write(self, data: bytes) -> None:
        os.write(self.writer, data)

    def end(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
        self.writer = -1


@pytest.fixture
def stream() -> Iterator[Stream]:
    stream = Stream()
    yield stream
    stream.end()
    stream.output.finish()


def test_line_by_line(stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    """Lines are logged when they are complete, with the worker's name; empty ones are not."""
    stream.write(b"one\n\ntwo\nthr")
    assert stream.output.pump() == 12
    assert caplog.messages == ["m-0: one", "m-0: two"]
    stream.write(b"ee\n")
    stream.output.pump()
    assert caplog.messages[2:] == ["m-0: three"]
    assert {(each.name, each.levelname) for each in caplog.records} == {
        ("asgi_infer.worker", "WARNING")
    }
    assert str(stream.words) == "one\ntwo\nthree"


def test_logging_that_fails(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is none of the caller's business; what may explain a crash is kept all the same."""

    def fail(record: logging.LogRecord) -> bool:
        raise RuntimeError

    monkeypatch.setattr(logging.getLogger("asgi_infer.worker"), "filters", [fail])
    stream.write(b"one\n")
    assert stream.output.pump() == 4
    assert str(stream.words) == "one"


def test_nothing_there(stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    """To look for more never blocks."""
    assert stream.output.pump() == 0
    assert stream.output.fd is not None
    assert not caplog.records


def test_end(stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    """At the end, what has no end of line is logged, and there is nothing to wait on any more."""
    stream.write(b"unfinished \xe2\x82")
    stream.output.pump()
    stream.end()
    assert stream.output.pump() == 0
    assert caplog.messages == ["m-0: unfinished \N{REPLACEMENT CHARACTER}"]
    assert stream.output.fd is None
    assert stream.output.pump() == 0


def test_no_utf8(stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    """What can't be decoded is replaced; a letter that comes in two parts is one."""
    stream.write(b"a\xffb\xe2\x82")
    stream.output.pump()
    stream.write(b"\xac\n")
    stream.output.pump()
    assert caplog.messages == ["m-0: a\N{REPLACEMENT CHARACTER}b\N{EURO SIGN}"]


def test_carriage_returns(stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    """Of a progress bar the last state is logged; other systems' ends of line are ends of line."""
    stream.write(b"\r 1 %\r50 %\r100 %\ndone\r\n")
    stream.output.pump()
    assert caplog.messages == ["m-0: 100 %", "m-0: done"]


def test_long_line(stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    """A line that never ends is logged in pieces, and not kept for ever."""
    for _ in range(5):
        stream.write(b"x" * TURN)
        stream.output.pump()
    assert caplog.messages == [f"m-0: {'x' * LONGEST}"]
    stream.write(b"y\n")
    stream.output.pump()
    assert caplog.messages[1:] == [f"m-0: {'x' * TURN}y"]


def test_long_line_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """A line whose end arrives together with too much of it is cut as well."""
    stream = Stream()
    stream.output._take("x" * (LONGEST + 1) + "\n")
    assert [len(each) for each in caplog.messages] == [LONGEST + 5, 6]
    stream.end()
    stream.output.finish()


def test_bounded_turns(stream: Stream) -> None:
    """However much there is, a turn takes so much."""
    stream.write(b"x" * 3 * TURN)
    assert stream.output.pump() == TURN


def test_finish_takes_what_is_left(stream: Stream, caplog: pytest.LogCaptureFixture) -> None:
    """What a process wrote before it ended is logged, though others hold the pipe open."""
    stream.write((b"x" * 99 + b"\n") * 500 + b"unfinished")
    stream.output.finish()
    assert len(caplog.messages) == 501
    assert caplog.messages[-1] == "m-0: unfinished"
    with pytest.raises(BrokenPipeError):
        stream.write(b"nobody reads")


def test_finish_ends(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who writes for ever is not listened to for ever."""
    pumps = iter(range(100))

    def pump(self: Output) -> int:
        next(pumps)
        return TURN

    monkeypatch.setattr(Output, "pump", pump)
    stream.output.finish()
    assert next(pumps) == 8


# -- last words --------------------------------------------------------------------------------


def words(*lines: str) -> list[str]:
    found = LastWords()
    for line in lines:
        found.add(line)
    return str(found).splitlines()


def test_last_lines() -> None:
    """The last twenty, of which each is cut."""
    assert words(*map(str, range(30))) == [str(number) for number in range(10, 30)]
    assert words("x" * 1000) == ["x" * 500]


CRASH = [
    "Fatal Python error: Segmentation fault",
    "Thread 0x01 (most recent call first):",
    *(f"  File other.py, line {number} in wait" for number in range(30)),
    "Current thread 0x02 (most recent call first):",
    "  File model.py, line 3 in predict",
    "  File host.py, line 4 in serve",
]


def test_crash() -> None:
    """Of a crash: its reason and the stack of the thread that crashed, and nothing else."""
    expected = [CRASH[0], *CRASH[-3:]]
    assert words("before", *CRASH) == expected
    assert words(*CRASH, "Thread 0x03 (most recent call first):", "  File x") == expected
    assert words(*CRASH, "Extension modules: numpy (total: 1)", "more") == expected


def test_crash_without_stack() -> None:
    """The reason is kept, whatever follows."""
    assert words("before", "Fatal Python error: Aborted", "a") == [
        "Fatal Python error: Aborted",
        "a",
    ]
    many = words("Fatal Python error: Aborted", *map(str, range(40)))
    assert many[0] == "Fatal Python error: Aborted"
    assert many[-1] == "39"


def test_deep_stack() -> None:
    """Of a deep stack the innermost frames are kept, which come first."""
    frames = [f"  File model.py, line {number} in f" for number in range(100)]
    found = words("Fatal Python error: Stack overflow", "Current thread 0x02 (most", *frames)
    assert len(found) == 20
    assert found[2] == frames[0]


def test_frames_that_are_no_news() -> None:
    """What has called the model's code is left out, unless there is nothing else."""
    ours = f"  File asgi_infer{os.sep}workers{os.sep}thread.py, line 1 in execute"
    start = ["Fatal Python error: Aborted", "Current thread 0x02 (most"]
    assert words(*start, "  File model.py, line 1 in f", ours) == [
        *start,
        "  File model.py, line 1 in f",
    ]
    assert words(*start, ours, ours) == [*start, ours]


def test_second_crash() -> None:
    """A process that survives one, as a test of faulthandler does, may have another."""
    assert words(*CRASH, "Thread 0x1", *CRASH) == [CRASH[0], *CRASH[-3:]]
