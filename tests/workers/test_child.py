"""A child process: set up as its parent, heard, and gone whatever happens."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from asgi_infer.workers import _boot, _child
from asgi_infer.workers._child import Child
from asgi_infer.workers._output import TURN

from ..gates import LIMIT
from ..polling import until_true
from .obedient import Obedient

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def steady() -> Iterator[Obedient]:
    """One child for all tests that leave it alive. It is spawned on a thread that lives on, and
    that is not the main one, as an inference thread."""
    made: list[Obedient] = []
    spawned, over = threading.Event(), threading.Event()

    def spawn() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PYTHONUNBUFFERED", raising=False)  # it would buffer nothing anyway
            made.append(Obedient())
        spawned.set()
        over.wait()

    thread = threading.Thread(target=spawn)
    thread.start()
    assert spawned.wait(LIMIT)
    with made[0] as child:
        yield child
    over.set()
    thread.join()


@pytest.fixture
def no_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without descriptors of processes."""
    monkeypatch.setattr(_child, "has_pidfd", lambda: False)
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.delattr(signal, "pidfd_send_signal", raising=False)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """No patience with processes that do not end."""
    monkeypatch.setattr(_child, "_MOMENT", 0.01)
    monkeypatch.setattr(_child, "_PATIENCE", 0.01)


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asgi_infer.worker")


# -- set up as its parent ----------------------------------------------------------------------


def test_has_its_parents_path(steady: Obedient) -> None:
    """Modules are found where the parent finds them, also by entries added at run time."""
    assert steady.ask("answer = sys.path") == sys.path
    assert steady.ask("answer = sys.argv") == sys.argv


def test_imports_only_what_it_uses(steady: Obedient) -> None:
    """The package is not imported as a whole, so that a child is up soon; its names are there
    all the same."""
    loaded = "answer = sorted(n for n in sys.modules if n.startswith('asgi_infer'))"
    assert "asgi_infer._runner" not in steady.ask(loaded)
    assert steady.ask("import asgi_infer; answer = asgi_infer.NativePolicy.__module__") == (
        "asgi_infer.native.policy"
    )
    assert "asgi_infer._runner" in steady.ask(loaded)


def test_keeps_its_descriptors_to_itself(steady: Obedient) -> None:
    """What the model starts in turn does not inherit the connection."""
    assert steady.ask("answer = os.get_inheritable(fd)") is False
    opened = "answer = sorted(os.listdir('/proc/self/fd'), key=int)"
    assert steady.ask(opened)[:5] == ["0", "1", "2", *steady.ask(opened)[3:5]]
    assert len(steady.ask(opened)) <= 5  # the connection, and the listing
    assert steady.ask("answer = os.readlink('/proc/self/fd/0')") == os.devnull


def test_leaves_signals_to_its_parent(steady: Obedient) -> None:
    """Ctrl-C and SIGTERM, which go to the whole group, do not end it. What it forks or starts
    can be ended by them."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        os.kill(steady.child.pid, signum)
    assert steady.ask("answer = 'here'") == "here"
    started = "import subprocess; p = subprocess.Popen(['sleep', '60']); p.terminate()"
    assert steady.ask(f"{started}; answer = p.wait(5)") == -signal.SIGTERM
    forked = """
pid = os.fork()
if not pid:
    os.kill(os.getpid(), 15)
    os._exit(0)
answer = os.waitpid(pid, 0)[1]"""
    assert steady.ask(forked) == signal.SIGTERM


def test_signals_while_it_starts() -> None:
    """They end nothing before it can deal with them."""
    with Obedient() as child:
        for signum in (signal.SIGINT, signal.SIGTERM):
            os.kill(child.child.pid, signum)
        child.child.dump()
        assert child.ask("answer = 'here'") == "here"


def test_ends_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    """One that ends when it is told to, and has a lot to say before: it is listened to."""
    with Obedient() as child:
        assert child.ask("answer = 1") == 1
        before = child.child.ended
        assert not child.child.ends_within(0.001)
        child.tell("print('x' * 200_000); fd = None; raise SystemExit")
        assert child.child.ends_within(LIMIT)
        assert (before, child.child.ended) == (False, True)
        assert child.child.died() == "ended with exit code 0"
        assert sum(each.count("x") for each in caplog.messages) == 200_000


def test_same_interpreter(tmp_path: Path) -> None:
    """Options of the command line are the child's as well."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), body="print(child.ask(WHAT) == here())"))
    given = ["-I", "-OO", "-B", "-X", "utf8", "-X", "own=1", "-X", "dev", "-W", "once::EOFError"]
    command = [sys.executable, *given, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert (result.stdout, result.returncode) == ("True\n", 0), result.stderr


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """None without need; those that are given more than once are so."""
    flags = dict.fromkeys(_child._FLAGS, 0)
    system = SimpleNamespace(flags=SimpleNamespace(**flags), _xoptions={}, warnoptions=[])
    monkeypatch.setattr(_child, "sys", system)
    assert _child.options() == []
    system.flags = SimpleNamespace(**flags | {"optimize": 2, "isolated": 1, "safe_path": True})
    system._xoptions = {"dev": True, "importtime": "2"}
    system.warnoptions = ["error", "ignore::EOFError"]
    expected = ["-OOIP", "-X", "dev", "-X", "importtime=2"]
    assert _child.options() == [*expected, "-W", "error", "-W", "ignore::EOFError"]


# -- heard -------------------------------------------------------------------------------------


def test_prints_reach_the_log(steady: Obedient, caplog: pytest.LogCaptureFixture) -> None:
    """As they are printed: by Python, and by native code that uses C's buffers."""
    steady.ask("print('one')")
    steady.ask("print('two', file=sys.stderr)")
    steady.ask("import ctypes; ctypes.CDLL(None).puts(b'three')")
    steady.ask("os.system('echo four')")
    while "m-0: four" not in caplog.messages:
        steady.listen()
    lines = {(each.levelname, each.getMessage()) for each in caplog.records}
    assert lines >= {("INFO", f"m-0: {word}") for word in ("one", "three", "four")}
    assert ("WARNING", "m-0: two") in lines


def test_flood(steady: Obedient, caplog: pytest.LogCaptureFixture) -> None:
    """More than a pipe holds: the child goes on as it is read, in turns of bounded length."""
    steady.tell("for n in range(3000): print('x' * 99)")
    turns = []
    while not steady.readable():
        before = len(caplog.records)
        steady.listen()
        turns.append(len(caplog.records) - before)
    assert steady.answer() is None
    while len(caplog.records) < 3000:
        steady.listen()
    assert max(turns) <= TURN / 100 + 1


def test_dump(steady: Obedient, caplog: pytest.LogCaptureFixture) -> None:
    """The stack of the main thread, also while it is in native code."""
    steady.tell(
        "import ctypes\ndef predict(): libc.usleep(10**5)\nlibc = ctypes.CDLL(None)\npredict()"
    )

    def seen() -> bool:
        steady.child.dump()
        steady.child.pump()
        return any(each.endswith(" in predict") for each in caplog.messages)

    until_true(seen, step=0.01)
    assert steady.answer() is None


# -- gone --------------------------------------------------------------------------------------

CRASH = """
import faulthandler
def predict():
    faulthandler._sigsegv()
predict()
"""


def end(child: Obedient, code: str) -> str:
    """How it ended that did ``code``."""
    with pytest.raises((EOFError, ConnectionResetError)):
        child.ask(code)
    return child.child.died()


def test_crash(caplog: pytest.LogCaptureFixture) -> None:
    """A crash in native code says what it was and where; it stays that, whatever comes later."""
    with Obedient() as child:
        assert end(child, CRASH) == "was killed by SIGSEGV"
        words = child.child.last_words.splitlines()
        assert words[0] == "Fatal Python error: Segmentation fault"
        assert words[1].startswith("Current thread")
        assert words[2].endswith('File "<test>", line 4 in predict')
        assert f"m-0: {words[2]}" in caplog.messages
        assert child.child.log_fds == ()
        assert select.select([child.child.sentinel], [], [], 0)[0]
        assert not psutil.pid_exists(child.child.pid)
        child.child.kill()
        child.child.interrupt()
        child.child.dump()
        assert child.child.died() == "was killed by SIGSEGV"
    child.child.close()
    child.child.interrupt()


def test_exit_and_grandchildren(caplog: pytest.LogCaptureFixture) -> None:
    """An exit code is told. Processes that it leaves behind, with its output open, hold up
    nothing."""
    with Obedient() as child:
        pid = child.ask("import subprocess; p = subprocess.Popen(['sleep', '60']); answer = p.pid")
        code = "os.write(1, b'no end of line'); os._exit(3)"
        assert end(child, code) == "ended with exit code 3"
        assert "m-0: no end of line" in caplog.messages
        assert child.child.last_words == "ready"
    os.kill(pid, signal.SIGKILL)


def test_killed_by_others() -> None:
    """The kernel's kill, when memory runs out, is told from the worker's own."""
    with Obedient() as child:
        child.child.dump()
        os.kill(child.child.pid, signal.SIGKILL)
        until_true(lambda: bool(select.select([child.child.sentinel], [], [], 0)[0]))
        child.child.kill()
        assert child.child.died() == (
            "was killed by SIGKILL (by somebody, or by the kernel when memory ran out)"
        )


def test_killed_while_stopped() -> None:
    """A process that is stopped is killed as well."""
    with Obedient() as child:
        os.kill(child.child.pid, signal.SIGSTOP)
        child.child.kill()
        assert child.child.died() == "was killed by its worker"
        assert not psutil.pid_exists(child.child.pid)


@pytest.mark.usefixtures("no_pidfd")
def test_without_pidfd() -> None:
    """Where there are no descriptors of processes, a pipe tells of the end."""
    with Obedient() as child:
        assert child.ask("answer = 'here'") == "here"
        assert not select.select([child.child.sentinel], [], [], 0)[0]
        child.child.kill()
        assert child.child.died() == "was killed by its worker"


@pytest.mark.usefixtures("brief", "no_pidfd")
def test_closes_everything(caplog: pytest.LogCaptureFixture) -> None:
    """A process that closes all its files, as daemons do, is not taken for dead; and one that
    can't be killed is left behind."""
    child = Obedient()
    with pytest.raises(EOFError):
        child.ask("import time; os.closerange(0, 100); time.sleep(60)")
    assert child.child.died() == "has closed its connection, but still runs"
    pid = child.child.pid
    child.child.kill()
    assert f"m-0: process {pid} was killed and did not end in 0.01 s" in caplog.text
    os.kill(pid, signal.SIGKILL)
    until_true(lambda: child.child.ended)
    child.__exit__(None, None, None)


def test_reaped_by_others() -> None:
    """Other code of the process may take the exit status: that is said, and no code made up."""
    with Obedient() as child:
        child.child.interrupt()
        os.waitpid(child.child.pid, 0)
        child.child.interrupt()
        assert child.child.died().startswith("ended, and its exit status was taken by other code")


def test_ends_just_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whether it runs and the signal it may end."""
    with Obedient() as child:
        child.child.interrupt()
        os.waitpid(child.child.pid, 0)
        monkeypatch.setattr(_child, "_readable", lambda seconds, *fds: False)
        child.child.dump()


def test_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty, one after the other: neither processes nor descriptors nor memory files are left,
    which is looked at after each test."""
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        Child(name="m-0").close()
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize(
    ("code", "killed", "text"),
    [
        (0, False, "ended with exit code 0"),
        (3, True, "ended with exit code 3"),
        (-signal.SIGABRT, True, "was killed by SIGABRT"),
        (-signal.SIGKILL, True, "was killed by its worker"),
        (
            -signal.SIGKILL,
            False,
            "was killed by SIGKILL (by somebody, or by the kernel when memory ran out)",
        ),
        (-(signal.SIGRTMIN + 2), False, "was killed by SIGRTMIN+2"),
        (-33, False, "was killed by signal 33"),
    ],
)
def test_descriptions(code: int, killed: bool, text: str) -> None:
    """What is told of each end."""
    assert _child.describe(code, killed=killed) == text


# -- not started -------------------------------------------------------------------------------


def test_no_executable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what could not be started, and of which kind it is."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError, match=r"cannot start a process for m-0: .*/nowhere"):
        Child(name="m-0")


def test_main_by_its_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back of the main module is found here, as the child calls it. A child leaves
    that name to its parent's."""
    monkeypatch.setattr(sys, "executable", "")
    for in_child in (True, False):
        monkeypatch.setattr(_boot, "in_child", in_child)
        monkeypatch.delitem(sys.modules, _boot.MAIN, raising=False)
        with pytest.raises(RuntimeError):
            Child(name="m-0")
        assert (_boot.MAIN in sys.modules) is not in_child
    assert sys.modules[_boot.MAIN] is sys.modules["__main__"]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
@pytest.mark.parametrize("pidfd", [True, False])
def test_no_process(number: int, pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither descriptors nor blocked signals are left when the system has no room."""

    def popen(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_child, "has_pidfd", lambda: pidfd)
    monkeypatch.setattr(subprocess, "Popen", popen)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(OSError, match="cannot start a process for m-0") as caught:
        Child(name="m-0")
    assert caught.value.errno == number
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_no_descriptor_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that can't be watched is not kept."""
    assert _child.has_pidfd()
    pids = []

    def no_more(pid: int) -> int:
        pids.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", no_more)
    with pytest.raises(OSError, match="Too many open files"):
        Child(name="m-0")
    assert not psutil.pid_exists(pids[0])


@pytest.mark.parametrize(("name", "value"), [("executable", ""), ("frozen", True)])
def test_no_python(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that would start itself again says so instead."""
    monkeypatch.setattr(sys, name, value, raising=False)
    with pytest.raises(RuntimeError, match="can't start another Python"):
        Child(name="m-0")


def test_systems_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory files and descriptors of processes may be missing, or be forbidden by a sandbox."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with Obedient() as child:
        assert child.ask("answer = 1") == 1
    forbidden = PermissionError(errno.EPERM, "Operation not permitted")

    def pidfd_open(pid: int) -> int:
        raise forbidden

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    assert not _child.has_pidfd.__wrapped__()


# -- with its parent ---------------------------------------------------------------------------

SCRIPT = """
import os, signal, socket, sys
sys.path.insert(0, {root!r})
from tests.workers import lean
from tests.workers.obedient import Obedient
from asgi_infer.workers._child import options
WHAT = "from asgi_infer.workers._child import options; answer = options()"
here = options
if __name__ == "__main__":
    with Obedient() as child:
        {body}
"""


def test_dies_with_its_parent(tmp_path: Path) -> None:
    """A parent that is killed takes its child with it, also one that is busy; but not one that
    others use as well."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.workers import lean\n"
        "from asgi_infer.workers._child import Child\n"
        "from tests.workers.obedient import TARGET\n"
        "for fd, bound in zip(map(int, sys.argv[1:]), (True, False)):\n"
        "    child = Child(name='m', fds=[fd], target=TARGET, die_with_parent=bound)\n"
        "sys.stdin.read()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    pairs = [socket.socketpair() for _ in range(2)]
    theirs = [pair[1].fileno() for pair in pairs]
    command = [sys.executable, str(script), *map(str, theirs)]
    with subprocess.Popen(command, pass_fds=theirs, stdin=subprocess.PIPE) as parent:
        for ours, other in pairs:
            other.close()
            ours.settimeout(LIMIT)
        (bound, _), (free, _) = pairs
        bound.sendall(b'"answer = 1"\n')
        assert bound.recv(10) == b"1\n"
        bound.sendall(b'"import time; time.sleep(60)"\n')
        free.sendall(b'"answer = 1"\n')
        assert free.recv(10) == b"1\n"
        assert parent.stdin is not None
        parent.stdin.close()
        assert parent.wait(LIMIT) == -signal.SIGKILL
    with contextlib.suppress(ConnectionResetError):  # if it had not read the last line yet
        assert bound.recv(10) == b""
    free.sendall(b'"print(1); print(2)"\n')
    assert free.recv(10) == b"null\n"  # though nobody reads what it prints
    free.sendall(b'"answer = 2"\n')
    assert free.recv(10) == b"2\n"
    bound.close()
    free.close()  # which ends it


# -- its parent's main module ------------------------------------------------------------------

MAIN_NAMES: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"__file__": "<stdin>"}, None),
    ({"__file__": __file__}, __file__),
    ({"__file__": os.path.relpath(__file__)}, __file__),
    ({"__file__": __file__, "__spec__": None}, __file__),
    ({"__file__": __file__, "__spec__": SimpleNamespace(name="pkg.mod")}, "pkg.mod"),
    (
        {"__file__": f"{ROOT}/tests/__main__.py", "__spec__": SimpleNamespace(name="__main__")},
        str(ROOT / "tests"),
    ),
]


@pytest.mark.parametrize(("attributes", "expected"), MAIN_NAMES)
def test_main_module_name(
    attributes: dict[str, Any], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By path for a script, by name after ``-m``; nothing if there is no file."""
    monkeypatch.setitem(sys.modules, "__main__", cast("ModuleType", SimpleNamespace(**attributes)))
    assert _child.main_module_name() == expected


def test_main_module_name_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child's own children get that of the first parent."""
    monkeypatch.setattr(_boot, "in_child", True)
    assert _child.main_module_name() is None
    monkeypatch.setattr(_boot, "parent_main", "pkg.mod")
    assert _child.main_module_name() == "pkg.mod"
