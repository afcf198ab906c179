"""The first code of a child process: what has to be set up before anything can go wrong.

This file is run by its path, not with ``-m``: that would import the whole package first, which
takes longer than all the rest. It makes the package *lazy*, so that a child imports what it uses
and no more, and goes on in the same module under its proper name.
"""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

MAIN = "__mp_main__"
"""What the parent's main module is called in a child, as multiprocessing calls it."""

in_child = False
"""Whether this process was started by this file."""

parent_main: str | None = None
"""The main module of the parent: an absolute path, or a name; None if it is no file."""

importing_main = False
"""Whether this is a child that runs its parent's main module at the moment."""

_executed: set[str] = set()  # lazy packages that have been run, or are; guarded by _lock
_lock = threading.RLock()

_GUARD = (
    "start runners and servers only when the script is run, and not when it is imported: move "
    "that code into a block that begins with  if __name__ == '__main__':"
)


class Setup(TypedDict):
    """What a child is told by its parent. Of plain types: it goes through ``marshal``."""

    path: list[str]
    argv: list[str]
    main: str | None
    parent: int
    """The process with which the child ends; 0 for none."""
    dump_signal: int
    target: str
    fds: list[int]
    """What the target is called with."""
    lifeline: list[int]
    """Descriptors to keep until the end, which tell the parent of it."""


# -- the main module ---------------------------------------------------------------------------


@cache
def main_module(path_or_name: str | None) -> ModuleType:
    """The parent's main module, imported here as ``__mp_main__``: once, when something of it is
    asked for. As multiprocessing does it when it spawns.

    :param path_or_name: see ``parent_main``
    :raises RuntimeError: it is no file, or it ends the process or starts another worker while
        it is imported. Whatever else it raises comes through
    """
    global importing_main
    import runpy

    if path_or_name is None:
        raise RuntimeError(
            "something that is defined in __main__ was sent to a worker process, and the main "
            "module is no file that could be imported there (an interactive session, a notebook, "
            "python -c, or a script from stdin): put it into a module of its own, and import that"
        )
    module = ModuleType(MAIN)
    importing_main = True
    try:
        if Path(path_or_name).is_absolute():
            content = runpy.run_path(path_or_name, run_name=MAIN)
        else:
            content = runpy.run_module(path_or_name, run_name=MAIN, alter_sys=True)
    except SystemExit as error:
        raise RuntimeError(
            f"the main module {path_or_name} was imported in a worker process, which needs "
            f"something that is defined there, and ended with {error!r}; {_GUARD}"
        ) from error
    finally:
        importing_main = False
    module.__dict__.update(content)
    sys.modules["__main__"] = sys.modules[MAIN] = module
    return module


def refuse_while_importing_main() -> None:
    """Keep a child from starting children of its own because a script has no guard.

    :raises RuntimeError: the parent's main module is being imported here
    """
    if importing_main:
        raise RuntimeError(
            f"a worker process was started while the main module was imported in another worker "
            f"process, which needs something that is defined there; {_GUARD}"
        )


# -- setting up --------------------------------------------------------------------------------


class LazyPackage(ModuleType):
    """A package whose ``__init__`` is run when a public name of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        # Private names are submodules, which the import system loads when they aren't there.
        if not name.startswith("_"):
            with _lock:
                _execute(self)
                if name in vars(self):
                    return vars(self)[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _execute(package: ModuleType) -> None:
    spec = package.__spec__
    if spec is None or spec.loader is None or package.__name__ in _executed:
        return
    _executed.add(package.__name__)  # before: what it imports may ask for more of its names
    try:
        spec.loader.exec_module(package)
    except BaseException:
        _executed.discard(package.__name__)
        raise
    package.__class__ = ModuleType


def make_lazy(name: str, directory: Path) -> None:
    """Put a package in its place without running it.

    It is the parent's, wherever that was found.
    """
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(
        name, directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    assert spec is not None  # noqa: S101  # for the types: a name in .py has a loader
    package = module_from_spec(spec)
    package.__class__ = LazyPackage
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)


def make_ourselves_lazy() -> None:
    """The package that this file is in, and the one in that."""
    workers = Path(__file__).parent.absolute()
    make_lazy("asgi_infer", workers.parent)
    make_lazy("asgi_infer.workers", workers)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    :param parent: its process, which may have ended before the kernel knew
    """
    if sys.platform == "linux":  # elsewhere it notices when it has nobody to talk to
        _prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != parent:
        os._exit(1)


def leave_signals_to_parent() -> None:
    """Ctrl-C and SIGTERM go to whole process groups; what comes of them is the parent's affair.

    By handlers, and not by ``SIG_IGN``: what the model starts in turn must not inherit it, or it
    could not be ended.
    """
    import signal

    def nothing(signum: int, frame: object) -> None:
        pass

    def as_usual() -> None:
        for each in ignored:
            signal.signal(each, signal.SIG_DFL)

    ignored = (signal.SIGINT, signal.SIGTERM)
    for each in ignored:
        signal.signal(each, nothing)
        signal.siginterrupt(each, False)
    os.register_at_fork(after_in_child=as_usual)


def arrange_output(dump_signal: int) -> None:
    """Lines go out when they are complete, and a crash leaves the stacks of all threads."""
    sys.stdout, sys.stderr = map(_lines_to, (1, 2))
    if sys.platform == "linux":
        _line_buffer_c()
    faulthandler.enable(2)
    faulthandler.register(dump_signal, 2)


class Unbroken(io.FileIO):
    """Where to write to as long as somebody reads. The parent of a shared model may have ended,
    and what prints must not fail for that.
    """

    def write(self, data: Any, /) -> int:
        """Write, or throw it away, like all that comes later, native code's included."""
        try:
            return super().write(data)
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def _lines_to(fd: int) -> io.TextIOWrapper:
    raw = io.BufferedWriter(Unbroken(fd, "wb", closefd=False))
    return io.TextIOWrapper(raw, "utf-8", errors="backslashreplace", line_buffering=True)


def resolve(target: str) -> Callable[..., object]:
    """The function that ``module:function`` names."""
    from importlib import import_module

    module, _, name = target.partition(":")
    function: Callable[..., object] = getattr(import_module(module), name)
    return function


def _prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0)))


def _line_buffer_c() -> None:
    """The same for what native code prints: C's stdout, too, keeps back what goes to a pipe."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, 1, 0)  # _IOLBF


# -- a process of its own ----------------------------------------------------------------------


def run(setup: Setup) -> None:
    """Set this process up, and call the target."""
    global in_child, parent_main
    import signal

    if setup["parent"]:
        end_with_parent(setup["parent"])
    leave_signals_to_parent()
    arrange_output(setup["dump_signal"])
    # Blocked by the parent, since they would have ended this process by now.
    blocked = {signal.SIGINT, signal.SIGTERM, setup["dump_signal"]}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    for fd in setup["fds"] + setup["lifeline"]:
        os.set_inheritable(fd, False)  # not for what the model starts in turn
    sys.argv = setup["argv"]
    in_child, parent_main = True, setup["main"]
    resolve(setup["target"])(*setup["fds"])


def _start() -> None:
    """What runs first, in the file's own right as a script."""
    import marshal

    with open(int(sys.argv[1]), "rb") as file:  # noqa: PTH123
        setup: Setup = marshal.load(file)  # noqa: S302  # the parent's
    sys.path[:] = setup["path"]
    make_ourselves_lazy()
    resolve("asgi_infer.workers._boot:run")(setup)


if __name__ == "__main__":  # pragma: no cover  # in another process, which isn't measured
    _start()
