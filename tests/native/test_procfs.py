"""What Linux tells, and lets one set, of single threads."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asgi_infer.native import procfs
from asgi_infer.native.procfs import ThreadCounters

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
    for ask in (procfs.thread_name, procfs.voluntary_switches, procfs.thread_counters):
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


# -- all counters ------------------------------------------------------------------------------


def used_by(work: Callable[[], object]) -> tuple[ThreadCounters, ThreadCounters]:
    """The counters of a new thread before and after its ``work``."""

    def read() -> ThreadCounters:
        time.sleep(0.001)  # the kernel brings them up to date when a thread stops
        return procfs.thread_counters(threading.get_native_id())

    def count() -> tuple[ThreadCounters, ThreadCounters]:
        before = read()
        work()
        return before, read()

    return on_new_thread(count)


def spin(seconds: float) -> None:
    """Use a CPU for that long."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_on_cpu_grows_with_work() -> None:
    """What a thread computes is counted in full."""
    before, after = used_by(lambda: spin(0.05))
    assert after.on_cpu - before.on_cpu >= 0.05


def test_on_cpu_does_not_grow_with_sleep() -> None:
    """A thread that waits uses no CPU."""
    before, after = used_by(lambda: time.sleep(0.1))
    assert after.on_cpu - before.on_cpu < 0.05


def test_minor_faults_count_touched_pages() -> None:
    """Each page that is touched for the first time is a fault."""
    pages = 500
    with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)

        def touch() -> None:
            for page in range(pages):
                memory[page * mmap.PAGESIZE] = 1

        before, after = used_by(touch)
    assert pages <= after.minor_faults - before.minor_faults < 2 * pages


def test_what_a_thread_runs_under() -> None:
    """Niceness, CPUs and name are those that the thread has set itself."""
    cpu = min(os.sched_getaffinity(0))

    def set_up() -> None:
        procfs.set_thread_name("set up")
        os.sched_setaffinity(0, {cpu})
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)

    _, after = used_by(set_up)
    assert (after.name, after.cpus, after.niceness) == ("set up", str(cpu), 7)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (b"a) S 1 (b", "a) S 1 (b"),
        (b"()", "()"),
        (b"two  spaces ", "two  spaces "),
        (b"caf\xe9", "caf\ufffd"),
    ],
)
def test_counters_of_a_thread_with_any_name(name: bytes, read: str) -> None:
    """A name that looks like the fields after it moves none of them."""

    def name_myself() -> None:
        (procfs._TASKS / str(threading.get_native_id()) / "comm").write_bytes(name)

    before, after = used_by(name_myself)
    assert after.name == read
    assert (after.niceness, after.cpus) == (before.niceness, before.cpus)


def test_every_field_is_read_from_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded thread, every figure of which is another."""
    stat = " ".join(map(str, range(4, 53)))  # each field holds its own number in proc(5)
    task = tmp_path / "42"
    task.mkdir()
    (task / "schedstat").write_text("1500000000 250000000 77\n")
    (task / "stat").write_text(f"42 (python3) S {stat}\n")
    (task / "status").write_text(
        "Name:\tpython3\nCpus_allowed:\tff\nCpus_allowed_list:\t0-3,8\n"
        "voluntary_ctxt_switches:\t150\nnonvoluntary_ctxt_switches:\t71\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(procfs, "_TASKS", tmp_path)
        patch.setattr(procfs, "_TICKS", 10)
        read = procfs.all_thread_counters()
    assert read == {
        42: ThreadCounters(
            name="python3",
            on_cpu=1.5,
            queued=0.25,
            voluntary_switches=150,
            involuntary_switches=71,
            minor_faults=10,
            major_faults=12,
            system_time=1.5,
            niceness=19,
            cpus="0-3,8",
        )
    }


# -- all threads -------------------------------------------------------------------------------


@pytest.fixture
def child() -> Iterator[int]:
    """The process id of another Python, which has one thread and waits."""
    program = "import sys; print(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate()


def test_all_threads_of_this_process() -> None:
    """Every thread is there, under its own id and name."""

    def read() -> tuple[int, str, str]:
        procfs.set_thread_name("reader")
        native_id = threading.get_native_id()
        counters, names = procfs.all_thread_counters(), procfs.all_thread_names()
        assert threading.main_thread().native_id in counters.keys() & names.keys()
        return native_id, counters[native_id].name, names[native_id]

    native_id, *names = on_new_thread(read)
    assert names == ["reader", "reader"]
    assert native_id not in procfs.all_thread_counters()


def test_another_process(child: int) -> None:
    """The threads of a process are found by its id, and so is one of them."""
    name = procfs.thread_name(child, child)
    assert procfs.thread_ids(child) == {child}
    assert procfs.all_thread_names(child) == {child: name}
    counters = procfs.all_thread_counters(child)[child]
    assert counters.name == procfs.thread_counters(child, child).name == name
    assert counters.on_cpu > 0
    with pytest.raises(OSError, match="No such file"):
        procfs.thread_counters(child)  # it is no thread of ours


def test_a_thread_that_ends_meanwhile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed, and gone before it is read: the others are read all the same."""
    mine = threading.get_native_id()
    with monkeypatch.context() as patch:
        patch.setattr(procfs, "thread_ids", lambda pid: {0, mine})
        assert procfs.all_thread_counters().keys() == {mine}
        assert procfs.all_thread_names().keys() == {mine}


def test_no_threads_are_found_where_there_is_no_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off Linux all threads are none, while a single one is an error."""
    with monkeypatch.context() as patch:
        patch.setattr(procfs, "_TASKS", tmp_path / "missing")
        assert procfs.all_thread_counters() == {}
        assert procfs.all_thread_names() == {}
        with pytest.raises(OSError, match="No such file"):
            procfs.thread_counters(threading.get_native_id())


def test_no_threads_are_found_of_a_process_that_has_gone() -> None:
    """A process that ended has no threads."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert procfs.all_thread_counters(process.pid) == {}
