"""The child's side: its parent's main module, and what is set up before anything else."""

from __future__ import annotations

import faulthandler
import importlib
import marshal
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from asgi_infer.workers import _boot
from asgi_infer.workers._child import DUMP_SIGNAL, Child

from ..gates import LIMIT

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _modules_stay(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test imports, or puts in the place of others, is taken out again."""
    usual = {name: sys.modules.get(name) for name in ("__main__", _boot.MAIN)}
    monkeypatch.delitem(sys.modules, _boot.MAIN, raising=False)  # multiprocessing's
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("lazy_", "pkg_of_main")):
            del sys.modules[name]
    for name, module in usual.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module
    _boot.main_module.cache_clear()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Writes modules that can be imported; returns their paths."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(textwrap.dedent(source))
        return str(path)

    return write


Write = Callable[[str, str], str]

# -- the main module ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["path", "name"])
def test_main_module(way: str, write: Write) -> None:
    """It is imported once, under another name, so that what is under its guard does not run."""
    source = """
        from dataclasses import dataclass
        @dataclass
        class Input:
            number: int
        assert __name__ == "__mp_main__"
        if __name__ == "__main__":
            raise AssertionError
    """
    path = write("pkg_of_main/mod.py", source)
    main = path if way == "path" else "pkg_of_main.mod"
    module = _boot.main_module(main)
    assert module.Input(3).number == 3
    assert module.Input.__module__ == _boot.MAIN
    assert sys.modules["__main__"] is sys.modules[_boot.MAIN] is module
    assert _boot.main_module(main) is module
    assert not _boot.importing_main


def test_archive(write: Write, tmp_path: Path) -> None:
    """A directory, or an archive, that is run is imported by its path."""
    write("application/__main__.py", "answer = 42")
    assert _boot.main_module(str(tmp_path / "application")).answer == 42


def test_no_main_module() -> None:
    """Where there is no file, the error says what to do."""
    with pytest.raises(RuntimeError, match=r"notebook.*put it into a module of its own"):
        _boot.main_module(None)


def test_main_module_that_ends(write: Write) -> None:
    """A script that exits does not end the child, nor is it tried but once."""
    path = write("script.py", "raise SystemExit(3)")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"SystemExit\(3\); start runners .* __name__"):
            _boot.main_module(path)
    assert not _boot.importing_main
    assert _boot.MAIN not in sys.modules


def test_main_module_that_fails(write: Write) -> None:
    """What it raises comes through."""
    with pytest.raises(ZeroDivisionError):
        _boot.main_module(write("script.py", "1 / 0"))


def test_main_module_without_a_guard(write: Write) -> None:
    """A script that starts a worker while it is imported is told what it lacks."""
    path = write(
        "script.py",
        """
        from asgi_infer.workers._child import Child
        Child(name="m-0")
        """,
    )
    with pytest.raises(RuntimeError, match="while the main module was imported in another"):
        _boot.main_module(path)
    _boot.refuse_while_importing_main()  # it is over


# -- real scripts ------------------------------------------------------------------------------

# What a codec will do: the function goes by its name, and is looked up where it is called.
BODY = """
import sys
sys.path.insert(0, {root!r})
from tests.workers import lean
from tests.workers.obedient import Obedient
print("imported as", __name__)
def predict(): return "predicted"
def main():
    with Obedient() as child:
        print(child.ask(ASK))
ASK = '''
from asgi_infer.workers import _boot
try:
    answer = _boot.main_module(_boot.parent_main).predict()
except RuntimeError as error:
    answer = str(error)
'''
"""
GUARD = "if __name__ == '__main__': main()"
READY = "m-0: ready\n"  # of the child, once: there is no other
FUNCTION = "imported as __main__\npredicted\n"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """What scripts print that have a child call a function of theirs; run side by side."""
    path = tmp_path_factory.mktemp("scripts")
    body = BODY.format(root=str(ROOT))
    (path / "guarded.py").write_text(f"{body}{GUARD}")
    (path / "bare.py").write_text(f"{body}main()")
    (path / "pkg").mkdir()
    (path / "pkg" / "mod.py").write_text(f"from . import other\n{body}{GUARD}")
    (path / "pkg" / "other.py").write_text("")
    commands = {
        "guarded": ["guarded.py"],
        "bare": ["bare.py"],
        "module": ["-m", "pkg.mod"],
        "stdin": ["-"],
    }
    processes = {
        name: subprocess.Popen(
            [sys.executable, *arguments],
            cwd=path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, arguments in commands.items()
    }
    source = f"{body}main()"
    return {name: each.communicate(source, LIMIT) for name, each in processes.items()}


@pytest.mark.parametrize("name", ["guarded", "module"])
def test_script(name: str, scripts: dict[str, tuple[str, str]]) -> None:
    """A function of the main module, run by its path or with ``-m``."""
    assert scripts[name] == (FUNCTION, READY)


def test_script_without_a_guard(scripts: dict[str, tuple[str, str]]) -> None:
    """The error comes back instead of more and more processes."""
    out, errors = scripts["bare"]
    assert "a worker process was started while the main module was imported" in out
    assert "if __name__ == '__main__':" in out
    assert errors == READY


def test_script_from_stdin(scripts: dict[str, tuple[str, str]]) -> None:
    """No file, so that there is nothing to import."""
    assert "put it into a module of its own" in scripts["stdin"][0]


# -- lazy packages -----------------------------------------------------------------------------


@pytest.fixture
def lazy(write: Write, tmp_path: Path) -> Callable[[str], Any]:
    """Makes a package that was written lazy."""

    def make(name: str) -> Any:
        _boot.make_lazy(name, tmp_path.joinpath(*name.split(".")))
        return sys.modules[name]

    return make


def test_lazy_package(write: Write, lazy: Callable[[str], Any]) -> None:
    """Its submodules are imported without it; it is run when a public name is asked for."""
    write("lazy_one/__init__.py", "from ._sub import number\nfrom . import _sub\nruns = [number]")
    write("lazy_one/_sub.py", "number = 42")
    package = lazy("lazy_one")
    assert importlib.import_module("lazy_one._sub").number == 42
    assert "runs" not in vars(package)
    with pytest.raises(AttributeError, match="module 'lazy_one' has no attribute '_other'"):
        _ = package._other
    assert package.runs == [42]
    assert type(package) is ModuleType
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = package.other


def test_lazy_package_of_a_package(write: Write, lazy: Callable[[str], Any]) -> None:
    """Packages inside are attributes of the outer one, as ever; a missing name is an error."""
    write("lazy_two/__init__.py", "outer = 1")
    write("lazy_two/inner/__init__.py", "inner = 2")
    package = lazy("lazy_two")
    inner = lazy("lazy_two.inner")
    assert "outer" not in vars(package)
    assert package.inner is inner
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        _ = inner.missing
    assert inner.inner == 2
    assert package.outer == 1


def test_lazy_package_that_asks_itself(write: Write, lazy: Callable[[str], Any]) -> None:
    """A circle of imports is the error that it is anywhere, and not an endless one."""
    write("lazy_three/__init__.py", "from ._sub import number\nlater = 1")
    write("lazy_three/_sub.py", "from lazy_three import later\nnumber = 42")
    package = lazy("lazy_three")
    for _ in range(2):
        with pytest.raises(ImportError, match="later"):
            _ = package.number
    assert isinstance(package, _boot.LazyPackage)


def test_our_own_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are this package's, wherever sys.path leads."""
    made: list[tuple[str, Path]] = []
    monkeypatch.setattr(_boot, "make_lazy", lambda *each: made.append(each))
    _boot.make_ourselves_lazy()
    package = ROOT / "asgi_infer"
    assert made == [("asgi_infer", package), ("asgi_infer.workers", package / "workers")]


# -- setting up --------------------------------------------------------------------------------


def test_end_with_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is asked to kill; a parent that had gone by then is noticed."""
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(_boot, "_prctl", lambda option, value: asked.append(("kill", value)))
    monkeypatch.setattr(os, "_exit", lambda code: asked.append(("exit", code)))
    _boot.end_with_parent(os.getppid())
    assert asked == [("kill", signal.SIGKILL)]
    _boot.end_with_parent(os.getppid() + 1)
    assert asked[2:] == [("exit", 1)]
    monkeypatch.setattr(sys, "platform", "darwin")
    _boot.end_with_parent(os.getppid())
    assert len(asked) == 3


def test_prctl_reaches_the_kernel() -> None:
    """On a thread of its own, whose name it sets: PR_SET_NAME takes a pointer."""
    import ctypes

    names = []

    def rename() -> None:
        name = ctypes.create_string_buffer(b"renamed")
        _boot._prctl(15, ctypes.addressof(name))
        names.append(Path("/proc/thread-self/comm").read_text())

    thread = threading.Thread(target=rename)
    thread.start()
    thread.join()
    assert names == ["renamed\n"]


def test_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do nothing; in what is forked they are as usual."""
    after: list[Callable[[], None]] = []
    monkeypatch.setattr(
        os, "register_at_fork", lambda after_in_child: after.append(after_in_child)
    )
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        _boot.leave_signals_to_parent()
        for each in before:
            signal.raise_signal(each)
        after[0]()
        assert {signal.getsignal(each) for each in before} == {signal.SIG_DFL}
    finally:
        for each, usual in before.items():
            signal.signal(each, usual)


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_output(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams write a line when it is complete, whatever it holds; crashes leave stacks."""
    enabled: list[int] = []
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(faulthandler, "enable", enabled.append)
    try:
        _boot.arrange_output(DUMP_SIGNAL)
        assert (sys.stdout.fileno(), sys.stderr.fileno()) == (1, 2)
    finally:
        faulthandler.unregister(DUMP_SIGNAL)
    assert enabled == [2]


def test_nobody_reads() -> None:
    """What prints does not fail when the other end is closed, now or later."""
    reader, writer = os.pipe()
    stream = _boot._lines_to(writer)
    print("\N{EURO SIGN}\udc80", file=stream)
    assert os.read(reader, 100) == "\N{EURO SIGN}\\udc80\n".encode()
    os.close(reader)
    for _ in range(2):
        print("lost", file=stream)
    assert os.readlink(f"/proc/self/fd/{writer}") == os.devnull
    stream.close()
    os.close(writer)


def setup(**changes: Any) -> _boot.Setup:
    usual = _boot.Setup(
        path=["/a"],
        argv=["b"],
        main="c",
        parent=0,
        dump_signal=DUMP_SIGNAL,
        target=f"{__name__}:called.append",
        fds=[],
        lifeline=[],
    )
    return usual | changes  # type: ignore[return-value]


called: list[int] = []


def note(*fds: int) -> None:
    called.extend(fds)


def test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is set up by the time that the target is called."""
    steps: list[object] = []
    for step in ("end_with_parent", "leave_signals_to_parent", "arrange_output"):
        monkeypatch.setattr(_boot, step, lambda *values, step=step: steps.append((step, *values)))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(_boot, "in_child", False)
    monkeypatch.setattr(_boot, "parent_main", None)
    called.clear()
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    os.set_inheritable(writer, True)
    blocked = {signal.SIGINT, signal.SIGTERM, DUMP_SIGNAL}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        target = f"{__name__}:note"
        _boot.run(setup(parent=42, fds=[reader], lifeline=[writer], target=target))
        assert not blocked & signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    usual = [("leave_signals_to_parent",), ("arrange_output", DUMP_SIGNAL)]
    assert steps == [("end_with_parent", 42), *usual]
    assert called == [reader]
    assert not os.get_inheritable(reader)
    assert not os.get_inheritable(writer)
    assert (sys.argv, _boot.parent_main, _boot.in_child) == (["b"], "c", True)
    _boot.run(setup(target=f"{__name__}:note"))
    assert steps[3:] == usual
    os.close(reader)
    os.close(writer)


def test_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the parent has written is read, and the file closed."""
    given: list[object] = []
    monkeypatch.setattr(_boot, "make_ourselves_lazy", lambda: given.append("lazy"))
    monkeypatch.setattr(_boot, "run", given.append)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    reader, writer = os.pipe()
    told = setup(path=[*sys.path, "/new"])
    os.write(writer, marshal.dumps(dict(told)))
    os.close(writer)
    monkeypatch.setattr(sys, "argv", ["_boot.py", str(reader), "m-0"])
    _boot._start()
    assert given == ["lazy", told]
    assert sys.path[-1] == "/new"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)


def test_child_of_an_importing_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been started when a child is refused."""
    monkeypatch.setattr(_boot, "importing_main", True)
    with pytest.raises(RuntimeError, match="start runners and servers only when"):
        Child(name="m-0")
