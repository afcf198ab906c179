"""How programs end that forget their runners, and how they fork: in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import pytest

from asgi_infer import Draining, InferenceRunner, NotReady, _exit

from .gates import LIMIT, Gate
from .threads import on_new_thread

PRELUDE = """
import asyncio, os, signal, sys, threading, time
import asgi_infer
from asgi_infer import InferenceRunner, NativePolicy

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # whole lines, whoever else writes
"""

# For programs that nothing ends any sooner. ``test_call_that_never_returns`` takes the real one.
SHORT_GRACE = """
asgi_infer._exit.GRACE = 0.2
"""


@dataclass(frozen=True)
class Ended:
    """What is left of a process."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    """From its last line of output to its end."""


class Script:
    """A program under way, which says "end" when it has nothing more to do."""

    def __init__(self, *code: str) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the program
        self._process = subprocess.Popen(
            [sys.executable, "-c", "".join(map(textwrap.dedent, (PRELUDE, *code)))],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._said: list[str] = []
        self._said_end = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def wait_for_end(self) -> None:
        """Until it says "end"."""
        assert self._said_end.wait(LIMIT), self._said

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def ended(self) -> Ended:
        """Its end, which must come within ``LIMIT`` seconds after it has said so."""
        self.wait_for_end()
        last_words = time.monotonic()
        status = self._process.wait(LIMIT)
        seconds = time.monotonic() - last_words
        self._reader.join(LIMIT)
        self._errors.seek(0)
        return Ended(status, "".join(self._said), self._errors.read(), seconds)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line)
            if line == "end\n":
                self._said_end.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()  # nothing, if it has ended
        self._process.communicate()
        self._reader.join(LIMIT)
        self._errors.close()


def run(*code: str) -> Ended:
    """How that program ends."""
    with Script(*code) as script:
        return script.ended()


def run_many(code: str, times: int) -> list[Ended]:
    """How that program ends, several times at once."""
    with ExitStack() as stack:
        scripts = [stack.enter_context(Script(code)) for _ in range(times)]
        return [script.ended() for script in scripts]


# -- the end of a program ----------------------------------------------------------------------

FORGOTTEN = {
    "idle": """
        runner = InferenceRunner()
        say(runner.submit(abs, -3).result())
        say("end")
    """,
    "never used": """
        runner = InferenceRunner()
        say(3)
        say("end")
    """,
    "from asyncio": """
        runner = InferenceRunner()
        async def main():
            say(await runner.run(abs, -3))
        asyncio.run(main())
        say("end")
    """,
    "from trio": """
        import trio
        runner = InferenceRunner()
        async def main():
            say(await runner.run(abs, -3))
        trio.run(main)
        say("end")
    """,
    "started by another thread": """
        runner = InferenceRunner()
        thread = threading.Thread(target=lambda: say(runner.submit(abs, -3).result()))
        thread.start()
        thread.join()
        say("end")
    """,
    "two of them": """
        runners = [InferenceRunner(name=name) for name in "ab"]
        say(sum(runner.submit(abs, -1).result() for runner in runners) + 1)
        say("end")
    """,
    "function with a thread of its own": """
        runner = InferenceRunner()
        def func(number):
            threading.Thread(target=time.sleep, args=(0.2,)).start()
            return abs(number)
        say(runner.submit(func, -3).result())
        say("end")
    """,
    "exit in the middle": """
        runner = InferenceRunner()
        say(runner.submit(abs, -3).result())
        say("end")
        sys.exit()
    """,
    "one could not start": """
        start = threading.Thread.start
        def refuse(thread):
            raise RuntimeError("can't start new thread")
        threading.Thread.start = refuse
        broken = InferenceRunner()
        try:
            broken.submit(abs, -3)
        except asgi_infer.NotReady:
            threading.Thread.start = start
        runner = InferenceRunner()
        say(runner.submit(abs, -3).result())
        say("end")
    """,
}


@pytest.mark.parametrize("code", FORGOTTEN.values(), ids=list(FORGOTTEN))
def test_forgotten(code: str) -> None:
    """A program that forgets to stop its runner ends as if it had not."""
    ended = run(code)
    assert (ended.status, ended.stdout, ended.stderr) == (0, "3\nend\n", "")


def test_forgotten_again_and_again() -> None:
    """Twenty times out of twenty, with calls running and waiting, the end is a quiet one."""
    code = """
        runner = InferenceRunner(lambda: bytearray(10_000_000))
        futures = [runner.submit(time.sleep, 0.01) for _ in range(10)]
        say("end")
    """
    for ended in run_many(code, 10) + run_many(code, 10):
        assert (ended.status, ended.stdout, ended.stderr) == (0, "end\n", "")
        assert ended.seconds < LIMIT


def test_model_is_destroyed() -> None:
    """A forgotten model is destroyed on its thread, while the interpreter still works."""
    ended = run("""
        class Model:
            def __del__(self):
                say("destroyed on", threading.current_thread().name)
        runner = InferenceRunner(Model, name="models")
        runner.submit(abs, -3).result()
        say("end")
    """)
    assert (ended.status, ended.stdout, ended.stderr) == (0, "end\ndestroyed on models\n", "")


NEVER_RETURNS = """
    runner = InferenceRunner()
    def report(name, future):
        say(name, type(future.exception()).__name__)
    running = runner.submit(time.sleep, 3600)
    running.add_done_callback(lambda future: report("running", future))
    waiting = runner.submit(abs, -3)
    waiting.add_done_callback(lambda future: report("waiting", future))
    while not running.running():
        time.sleep(0.001)
    say("end")
"""


def test_call_that_never_returns() -> None:
    """A call that never returns holds up the end by a second, and whoever waits gets an error."""
    ended = run_many(NEVER_RETURNS, 5)
    for each in ended:
        assert each.status == 0
        assert sorted(each.stdout.splitlines()) == ["end", "running Draining", "waiting Draining"]
        assert each.stderr == "the runner 'inference' stopped while sleep was running\n"
    assert min(each.seconds for each in ended) < 2


def test_load_that_never_returns() -> None:
    """A model that never finishes loading doesn't keep the program from ending either."""
    ended = run(
        SHORT_GRACE,
        """
        runner = InferenceRunner(lambda: time.sleep(3600))
        future = runner.submit(abs, -3)
        future.add_done_callback(lambda future: say(type(future.exception()).__name__))
        say("end")
    """,
    )
    assert (ended.status, ended.stdout, ended.stderr) == (0, "end\nDraining\n", "")


WAITING_IN_THREADS = {
    "submit": """
        def wait(func, *args):
            try:
                runner.submit(func, *args).result()
            except Exception as error:
                say(type(error).__name__)
    """,
    "asyncio": """
        def wait(func, *args):
            try:
                asyncio.run(runner.run(func, *args))
            except Exception as error:
                say(type(error).__name__)
    """,
    "trio": """
        import trio
        def wait(func, *args):
            try:
                trio.run(runner.run, func, *args)
            except Exception as error:
                say(type(error).__name__)
    """,
}


@pytest.mark.parametrize("wait", WAITING_IN_THREADS.values(), ids=list(WAITING_IN_THREADS))
def test_callers_in_threads(wait: str) -> None:
    """Callers in threads that the interpreter waits for get an error, so that it can end."""
    ended = run(
        SHORT_GRACE,
        wait,
        """
        runner = InferenceRunner()
        entered = threading.Event()
        def block():
            entered.set()
            time.sleep(3600)
        threading.Thread(target=wait, args=(block,)).start()
        entered.wait()
        threading.Thread(target=wait, args=(time.sleep, 3600)).start()
        say("end")
        """,
    )
    assert ended.status == 0
    assert ended.stdout == "end\nDraining\nDraining\n"
    assert ended.stderr == "the runner 'inference' stopped while block was running\n"


# -- the end of a program that goes wrong ------------------------------------------------------


def test_exception() -> None:
    """A program that fails shows its own traceback, and no other."""
    ended = run(
        SHORT_GRACE,
        """
        runner = InferenceRunner()
        future = runner.submit(time.sleep, 3600)
        say("end")
        raise LookupError("the program's own")
    """,
    )
    assert ended.status == 1
    assert ended.stderr.count("Traceback") == 1
    assert "LookupError: the program's own\n" in ended.stderr
    assert "Fatal" not in ended.stderr


SLEEP = """
    runner = InferenceRunner()
    def sleep():
        say("end")
        time.sleep(3600)
"""

INTERRUPTED = {
    "submit": "runner.submit(sleep).result()",
    "asyncio": "asyncio.run(runner.run(sleep))",
    "trio": "import trio; trio.run(runner.run, sleep)",
}


@pytest.mark.parametrize("code", INTERRUPTED.values(), ids=list(INTERRUPTED))
def test_interrupted(code: str) -> None:
    """Ctrl-C ends a program that waits for a call which never returns, and as Ctrl-C should."""
    with Script(SHORT_GRACE, SLEEP, code) as script:
        script.wait_for_end()
        script.interrupt()
        ended = script.ended()
    assert (ended.status, ended.stdout) == (-signal.SIGINT, "end\n")
    assert "\nKeyboardInterrupt\n" in ended.stderr
    assert ended.stderr.endswith("\nthe runner 'inference' stopped while sleep was running\n")
    for trouble in ("Fatal", "Exception in", "Exception ignored", "never retrieved"):
        assert trouble not in ended.stderr


# -- the same, seen from inside ----------------------------------------------------------------


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The threads that would be stopped, without those of anybody else."""
    threads: Any = weakref.WeakSet()
    monkeypatch.setattr(_exit, "_live", threads)
    return threads


def test_stop_all(live: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that can end do so, and the callers of the others are sent away."""
    idle, busy = InferenceRunner[None](name="idle"), InferenceRunner[None](name="busy")
    assert idle.submit(abs, -3).result(LIMIT) == 3
    future = busy.submit(gate, None)
    gate.wait_entered()
    assert len(live) == 2
    monkeypatch.setattr(_exit, "GRACE", 0.3)
    _exit._stop_all()
    assert idle.statistics().state == "closed"
    assert isinstance(future.exception(0), Draining)
    gate.release.set()
    busy.shutdown()
    _exit._stop_all()  # again does nothing


def test_thread_that_could_not_start(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that never started isn't waited for."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(NotReady, match="can't start new thread"):
            InferenceRunner[None]().submit(abs, -3)
    _exit._stop_all()
    assert len(live) == 0


def test_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller in another thread starts one watcher, which acts when the main thread ends."""
    release = threading.Event()
    main = threading.Thread(target=release.wait, args=(LIMIT,))
    acts: list[bool] = []
    acted = threading.Event()

    def act() -> None:
        acts.append(release.is_set())
        acted.set()

    monkeypatch.setattr(threading, "main_thread", lambda: main)
    monkeypatch.setattr(_exit, "_send_away_who_waits", act)
    main.start()
    _exit._start_watcher.cache_clear()
    with InferenceRunner[None]() as runner:
        for _ in range(2):
            on_new_thread(lambda: runner.submit(abs, -3))
    release.set()
    assert acted.wait(LIMIT)
    _exit._start_watcher.cache_clear()
    main.join()
    assert acts == [True]


def test_send_away_who_waits(live: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the main thread's end a stuck runner is stopped; another one goes on."""
    stuck = InferenceRunner[None](name="stuck")
    loading = InferenceRunner(lambda: gate("model"), name="loading")
    running = stuck.submit(gate, -3)
    gate.wait_entered()
    waiting = [stuck.submit(abs, -3), loading.submit(abs, -3)]
    assert len(live) == 2
    monkeypatch.setattr(_exit, "GRACE", 0.0)
    _exit._send_away_who_waits()
    for future in (running, *waiting):
        assert isinstance(future.exception(LIMIT), Draining)
    with pytest.raises(Draining):
        stuck.submit(abs, -3)
    gate.release.set()
    assert loading.submit(abs, -3).result(LIMIT) == 3
    stuck.shutdown()
    loading.shutdown()


def test_server_in_a_thread_outlives_the_main_thread() -> None:
    """A program that goes on in another thread keeps its runner, with or without an event loop."""
    ended = run(
        SHORT_GRACE,
        """
        runner = InferenceRunner()
        runner.submit(abs, -1).result()
        def serve():
            main.join()
            time.sleep(0.6)  # longer than callers get when this program ends
            say(runner.submit(abs, -2).result())
            say(asyncio.run(runner.run(abs, -3)))
        main = threading.main_thread()
        threading.Thread(target=serve).start()
        say("end")
        """,
    )
    assert ended.status == 0
    assert ended.stdout == "end\n2\n3\n"
    assert ended.stderr == ""


def test_watcher_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the interpreter is ending and starts no threads, calls are made all the same."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with InferenceRunner[None]() as runner:
        assert runner.submit(abs, -2).result(LIMIT) == 2
        _exit._start_watcher.cache_clear()

        def call() -> int:
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refuse)
                return runner.submit(abs, -3).result(LIMIT)

        assert on_new_thread(call) == 3
    _exit._start_watcher.cache_clear()


def test_no_watcher_for_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the main thread waits, as in most programs, there is no thread to watch it."""
    monkeypatch.setattr(_exit, "_start_watcher", lambda: pytest.fail("started"))
    with InferenceRunner[None]() as runner:
        assert runner.submit(abs, -3).result(LIMIT) == 3


def test_in_child(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a child every runner is reset, and no thread of the parent's is waited for."""
    reset: list[object] = []
    with InferenceRunner[None]() as runner:
        assert runner.submit(abs, -3).result(LIMIT) == 3
        monkeypatch.setattr(_exit, "_forkable", weakref.WeakSet([runner]))
        _exit._in_child(reset.append)
    assert reset == [runner]
    assert len(live) == 0


# -- forks -------------------------------------------------------------------------------------

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")

# The child is killed if it hangs, which shows in its status.
FORK = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork like these

def in_child(func):
    pid = os.fork()
    if pid == 0:
        signal.alarm(8)
        status = 1
        try:
            func()
            status = 0
        finally:
            os._exit(status)
    say("child:", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def run_fork(code: str) -> list[str]:
    """What a program that forks says, up to its "end"."""
    ended = run(FORK, code)
    assert (ended.status, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


@forks
def test_child_has_a_thread_of_its_own() -> None:
    """A child uses the runner as if it were new; the parent's goes on; so does a grandchild's."""
    said = run_fork("""
        runner = InferenceRunner(os.getpid)
        def use():
            model = runner.submit(lambda model: model, runner.model).result()
            assert model == os.getpid()
            say(runner.statistics().submitted)
        def use_and_fork():
            use()
            in_child(use)
        use()
        in_child(use_and_fork)
        use()
        say("end")
    """)
    assert said == ["1", "1", "1", "child: 0", "child: 0", "2", "end"]


@forks
def test_child_with_an_event_loop() -> None:
    """A child may use the runner from an event loop of its own, also if it never did before."""
    said = run_fork("""
        runner = InferenceRunner()
        async def use():
            say(await runner.run(abs, -3))
        def run():
            asyncio.run(use())
        in_child(run)
        run()
        in_child(run)
        say("end")
    """)
    assert said == ["3", "child: 0", "3", "3", "child: 0", "end"]


@forks
def test_pending_futures_in_the_child() -> None:
    """A future that the parent waits for fails in the child, and completes in the parent."""
    said = run_fork("""
        runner = InferenceRunner()
        gate = threading.Event()
        futures = [runner.submit(gate.wait), runner.submit(abs, -3)]
        while not futures[0].running():
            time.sleep(0.001)
        def look():
            for future in futures:
                say(future.exception())
            say(runner.submit(abs, -4).result())
        in_child(look)
        gate.set()
        say([future.result() for future in futures])
        say("end")
    """)
    error = "this call belongs to the parent process"
    assert said == [error, error, "4", "child: 0", "[True, 3]", "end"]


@forks
def test_fork_at_an_awkward_moment() -> None:
    """Locks that were held when the process forked hold up nobody in the child."""
    said = run_fork("""
        runner = InferenceRunner()
        runner.submit(abs, -3).result()
        held, release = threading.Event(), threading.Event()
        def hold():
            with runner._lock, runner._start_lock:
                held.set()
                release.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        in_child(lambda: say(runner.submit(abs, -4).result()))
        release.set()
        thread.join()
        say(runner.submit(abs, -5).result())
        say("end")
    """)
    assert said == ["4", "child: 0", "5", "end"]


@forks
def test_fork_while_loading() -> None:
    """A child that was forked while the model loaded loads its own."""
    said = run_fork("""
        loading, go = threading.Event(), threading.Event()
        parent = os.getpid()
        def load():
            loading.set()
            if os.getpid() == parent:
                go.wait()
            return os.getpid()
        runner = InferenceRunner(load)
        future = runner.submit(lambda model: model == parent, runner.model)
        loading.wait()
        in_child(lambda: say(runner.submit(lambda m: m == os.getpid(), runner.model).result()))
        go.set()
        say(future.result())
        say("end")
    """)
    assert said == ["True", "child: 0", "True", "end"]


@forks
def test_parents_model_in_the_child() -> None:
    """The parent's model is never destroyed in the child, where its native threads are not."""
    said = run_fork("""
        class Model:
            def __init__(self):
                self.home = os.getpid()
            def __del__(self):
                say("destroyed at home:", self.home == os.getpid())
        runner = InferenceRunner(Model)
        runner.submit(abs, -3).result()
        def use_and_stop():
            runner.submit(abs, -3).result()
            runner.shutdown()
        in_child(use_and_stop)
        runner.shutdown()
        say("end")
    """)
    home = "destroyed at home: True"
    assert said == [home, "child: 0", home, "end"]


@forks
def test_fork_from_another_thread() -> None:
    """A child forked from any thread works."""
    said = run_fork("""
        runner = InferenceRunner()
        runner.submit(abs, -3).result()
        use = lambda: say(runner.submit(abs, -4).result())
        thread = threading.Thread(target=in_child, args=(use,))
        thread.start()
        thread.join()
        say("end")
    """)
    assert said == ["4", "child: 0", "end"]


@forks
def test_child_that_forgets() -> None:
    """A child that ends by way of the exit hooks stops its own runner there."""
    said = run_fork("""
        class Model:
            def __del__(self):
                say("destroyed")
        runner = InferenceRunner(Model)
        runner.submit(abs, -3).result()
        pid = os.fork()
        if pid == 0:
            signal.alarm(8)
            say(runner.submit(abs, -4).result())
            sys.exit()
        say("child:", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        runner.shutdown()
        say("end")
    """)
    assert said == ["4", "destroyed", "child: 0", "destroyed", "end"]


@forks
def test_callers_in_threads_of_the_child() -> None:
    """A child sends away its own callers in threads, though the parent had seen to that before."""
    ended = run(
        SHORT_GRACE,
        """
        runner = InferenceRunner()
        thread = threading.Thread(target=lambda: runner.submit(abs, -3).result())
        thread.start()
        thread.join()
        pid = os.fork()
        if pid == 0:
            signal.alarm(8)
            entered = threading.Event()
            def block():
                entered.set()
                time.sleep(3600)
            def wait():
                say(type(runner.submit(block).exception()).__name__)
            threading.Thread(target=wait).start()
            entered.wait()
            sys.exit()
        say("child:", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        say("end")
    """,
    )
    assert (ended.status, ended.stdout) == (0, "Draining\nchild: 0\nend\n")


@forks
def test_multiprocessing() -> None:
    """Processes of multiprocessing, forked after the runner's start, use it and end."""
    said = run_fork("""
        import multiprocessing
        runner = InferenceRunner()
        runner.submit(abs, -3).result()
        def use(number):
            return runner.submit(abs, number).result()
        with multiprocessing.get_context("fork").Pool(3) as pool:
            say(pool.map(use, range(-6, 0)))
            pool.close()
            pool.join()
        say("end")
    """)
    assert said == ["[6, 5, 4, 3, 2, 1]", "end"]
