"""What Linux tells, and lets one set, of a single thread."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from asgi_infer.native import procfs

from ..threads import on_new_thread

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/task")


def named(name: str) -> str:
    """What the kernel calls a new thread after it has named itself ``name``."""

    def name_myself() -> str:
        procfs.set_thread_name(name)
        return procfs.thread_name(threading.get_native_id())

    return on_new_thread(name_myself)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("ocr", "ocr"),
        ("inference of digits", "inference of di"),
        ("with space", "with space"),
        ("распознавание", "распозн"),
        ("lone \udc80 surrogate", "lone ? surrogat"),
    ],
)
def test_thread_name(name: str, kept: str) -> None:
    """The kernel keeps 15 bytes, of which no character is cut in half."""
    assert named(name) == kept


def test_name_is_the_calling_threads_own() -> None:
    """Naming one thread leaves the others, and the process, as they were."""
    mine = procfs.thread_name(threading.get_native_id())
    named("other")
    assert procfs.thread_name(threading.get_native_id()) == mine


def test_name_that_is_no_text() -> None:
    """Native libraries name their threads too, with whatever bytes."""

    def name_myself() -> str:
        native_id = threading.get_native_id()
        (procfs._TASKS / str(native_id) / "comm").write_bytes(b"caf\xe9")
        return procfs.thread_name(native_id)

    assert on_new_thread(name_myself) == "caf\ufffd"


def test_thread_ids() -> None:
    """Every thread of the process is listed, and none that has ended."""
    ended = on_new_thread(threading.get_native_id)
    assert threading.get_native_id() in procfs.thread_ids()
    assert on_new_thread(lambda: threading.get_native_id() in procfs.thread_ids())
    assert ended not in procfs.thread_ids()


def test_no_such_thread() -> None:
    """Asking for a thread that isn't there is an OSError."""
    for ask in (procfs.thread_name, procfs.voluntary_switches):
        with pytest.raises(OSError, match="No such file"):
            ask(0)


def test_voluntary_switches_count_waits() -> None:
    """Every wait is counted, for the thread that waits and no other."""

    def count(waits: int) -> int:
        before = procfs.voluntary_switches(threading.get_native_id())
        for _ in range(waits):
            time.sleep(0.001)
        return procfs.voluntary_switches(threading.get_native_id()) - before

    # A few may be over before they begin, on a busy machine.
    assert on_new_thread(lambda: count(100)) >= 80


def test_voluntary_switches_leave_out_work() -> None:
    """A thread that computes gives up its CPU (almost) never."""

    def count() -> int:
        before = procfs.voluntary_switches(threading.get_native_id())
        sum(range(1_000_000))
        return procfs.voluntary_switches(threading.get_native_id()) - before

    assert on_new_thread(count) < 20
