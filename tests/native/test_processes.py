"""The other processes of the same server, told by their parent and by their threads' names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from asgi_infer.native import processes

from ..polling import until_true

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# A process with two more threads, one of them with a name; it lives until its input ends.
CHILD = """
import sys, threading
from asgi_infer.native import processes, procfs
def live(name):
    if name:
        procfs.set_thread_name(name)
    ready.wait()
    end.wait()
end, ready = threading.Event(), threading.Barrier(3)
for name in ("digits of people", None):
    threading.Thread(target=live, args=(name,), daemon=True).start()
ready.wait()
print(*processes.siblings())
sys.stdout.flush()
sys.stdin.read()
end.set()
"""


@dataclass
class Seen:
    """A child, and the siblings that it saw."""

    pid: int
    siblings: set[int]


@pytest.fixture
def two_children() -> Iterator[list[Seen]]:
    """Two processes, started one after the other."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", CHILD]
    with ExitStack() as stack:
        seen = []
        for _ in range(2):
            child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            stack.callback(child.communicate)
            assert child.stdout is not None
            seen.append(Seen(child.pid, set(map(int, child.stdout.readline().split()))))
        yield seen


def test_siblings(two_children: list[Seen]) -> None:
    """A process sees those that its parent has started beside it, and not itself."""
    first, second = two_children
    assert first.pid in second.siblings
    assert second.pid not in second.siblings


def test_no_siblings_of_mine() -> None:
    """This process is none of its own siblings."""
    assert os.getpid() not in processes.siblings()


def test_services_are_no_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What init starts has nothing in common but that, unless init is the server itself."""
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(processes, "_program", {1: "/sbin/init"}.get)
    assert processes.siblings() == set()
    monkeypatch.setattr(processes, "_INIT", os.getpid())
    monkeypatch.setattr(os, "getppid", os.getpid)
    monkeypatch.setattr(processes, "_program", lambda pid: "python")
    with subprocess.Popen(["sleep", "60"]) as child:
        found = processes.siblings()
        child.kill()
    assert child.pid in found


def test_other_programs_are_no_siblings(two_children: list[Seen]) -> None:
    """A process of another program, beside this one, is none of the same server."""
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        script = f"from asgi_infer.native import processes; print({sleeper.pid} in "
        command = [sys.executable, "-c", f"{script}processes.siblings())"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        sleeper.kill()
    assert output == "False\n"


def test_affinity(two_children: list[Seen]) -> None:
    """The CPUs of another process; of one that has ended, none."""
    assert processes.affinity(two_children[0].pid) == os.sched_getaffinity(0)
    assert processes.affinity(2**22 + 1) == frozenset()


def test_process_of_another_program_is_known_by_its_file() -> None:
    """A process that has ended, or that one may not look at, is no program."""
    assert processes._program(2**22 + 1) is None
    assert processes._program(os.getpid()) == os.path.realpath(sys.executable)


def test_threads_named(two_children: list[Seen]) -> None:
    """Threads are counted by as much of the name as the kernel keeps."""
    pid = two_children[0].pid
    assert processes.threads_named("digits of people", pid) == 1
    assert processes.threads_named("digits of peopl", pid) == 1
    assert processes.threads_named("digits", pid) == 0
    assert processes.threads_named("digits", 0) == 0


def test_server_is_the_parent() -> None:
    """Processes of one server have their parent in common."""
    script = "from asgi_infer.native import processes; print(processes.server())"
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(output) == os.getpid()


@pytest.mark.parametrize(
    ("program", "command", "parent"),
    [
        ("python", "python", True),
        ("bash", "bash", False),
        (None, "gunicorn", True),  # another user's
        (None, "systemd", False),
    ],
)
def test_server(
    monkeypatch: pytest.MonkeyPatch, program: str | None, command: str, parent: bool
) -> None:
    """A shell, or what starts all services, is no part of the server; a master is, also where it
    runs as another user and so doesn't tell its program."""
    programs = {os.getpid(): "python", os.getppid(): program}
    monkeypatch.setattr(processes, "_program", programs.get)
    monkeypatch.setattr(processes, "_command", {os.getppid(): command}.get)
    assert processes.server() == (os.getppid() if parent else os.getpid())


def test_command_of_a_process() -> None:
    """The name that everybody may see; that of a process that has ended is empty."""
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            until_true(lambda: processes._command(sleeper.pid) == "sleep")  # set within exec
        finally:
            sleeper.kill()
    assert processes._command(2**22 + 1) == ""


def test_start_time(two_children: list[Seen]) -> None:
    """Processes started one after the other, by the machine's clock; one that has ended, none."""
    mine = processes.start_time(os.getpid())
    assert 0 < mine <= processes.start_time(two_children[0].pid)
    assert processes.start_time(2**22 + 1) == 0
