"""Facts about the command: what it prints, what it writes, how it ends, and what it leaves."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from asgi_infer import _commands, _launch, cli
from asgi_infer.doctor import _doctor
from asgi_infer.doctor._doctor import Options, Progress
from asgi_infer.doctor._results import Diagnosis, as_json
from asgi_infer.doctor._target import Target, TargetError

from .conftest import ON_LINUX
from .doctor import diagnoses, models
from .doctor.conftest import fonts  # noqa: F401  # a fixture
from .gates import LIMIT
from .polling import until_true

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from asgi_infer.cli import main; main()"]
MODEL = [f"{models.__name__}:Model", "--app-dir", str(ROOT), "--input", f"{models.__name__}:row"]

on_linux = pytest.mark.skipif(not ON_LINUX, reason="counters are read from /proc")


# -- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "missing"), [("doctor", "typer, matplotlib"), ("run", "typer")]
)
def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, command: str, missing: str) -> None:
    """What a command lacks is named, and how to install it; the exit code is 1."""
    monkeypatch.setattr(sys, "argv", ["asgi-infer", command])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == f"asgi-infer needs {missing}: pip install 'asgi-infer[doctor]'"


def test_run_needs_little() -> None:
    """A command is launched without what only the doctor needs."""
    absent = ["rich", "fastapi", "uvicorn", "matplotlib", "jinja2", "markupsafe"]
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); {COMMAND[-1]}"
    command = [
        sys.executable,
        "-c",
        program,
        "run",
        "--",
        sys.executable,
        "-c",
        "print('it runs')",
    ]
    done = subprocess.run(command, check=True, timeout=50, capture_output=True, text=True)
    assert done.stdout == "it runs\n"


def test_with_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The command has its name, and says what it can do."""
    monkeypatch.setattr(sys, "argv", ["whatever", "--help"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "asgi-infer" in out
    assert "doctor" in out
    assert "run" in out


# -- doctor, without measuring -----------------------------------------------------------------

DIAGNOSIS = diagnoses.throttled()


class Doctor:
    """``asgi-infer doctor``, which measures nothing: the diagnosis is given, or is raised.

    :ivar asked: what it was to measure
    :ivar signals: what then becomes of those that end a process
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Target, Options]] = []
        self.signals: dict[int, Any] = {}
        self._found: Diagnosis | BaseException = DIAGNOSIS
        monkeypatch.setattr(_doctor, "diagnose", self._diagnose)

    def __call__(self, *arguments: str, found: Diagnosis | BaseException = DIAGNOSIS) -> Result:
        self._found = found
        return CliRunner().invoke(_commands.app, ["doctor", "m:Model", *arguments])

    def _diagnose(self, target: Target, options: Options, progress: Progress) -> Diagnosis:
        self.asked.append((target, options))
        self.signals = {number: signal.getsignal(number) for number in _commands.ENDING}
        progress("script", 0.5)
        progress("script", 0.6)
        if isinstance(self._found, BaseException):
            raise self._found
        return self._found


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """What becomes of signals in a command, or in one that it executes, is not the tests'."""
    numbers = (*_commands.ENDING, *_launch._IGNORED)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, action in before.items():
        signal.signal(number, action)


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Doctor:
    """The command in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return Doctor(monkeypatch)


def test_the_table_and_the_report(invoke: Doctor, tmp_path: Path) -> None:
    """The figures and the verdict are printed, and the report is written, and where is said."""
    result = invoke()
    assert result.exit_code == 0
    assert "two OpenMP pools" in result.stdout
    assert result.stdout.endswith("written: asgi-infer-doctor.html\n")
    assert "two OpenMP pools" in (tmp_path / "asgi-infer-doctor.html").read_text()


def test_what_goes_on_is_told_once(invoke: Doctor) -> None:
    """Where there is no terminal, each arm gets one line, beside the output."""
    assert invoke("--no-html").stderr == " 50% script\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a bar shows what goes on."""
    terminal = io.StringIO()
    console = Console(force_terminal=True, width=100, file=terminal)
    monkeypatch.setattr("rich.console.Console", lambda **options: console)
    with _commands._progress() as progress:
        progress("def endpoint", 0.5)
    assert "def endpoint" in terminal.getvalue()


def test_options(invoke: Doctor) -> None:
    """Every option reaches the doctor; arms are measured in one order, whatever was given."""
    arms = ("--arms", "runner, script", "--no-sweep")
    names = ("--call", "predict", "--input", "m:x", "--app-dir", "d")
    invoke("--clients", "3", "--seconds", "0.5", "--patience", "9", "--no-html", *arms, *names)
    ((target, options),) = invoke.asked
    assert vars(target) == {"model": "m:Model", "call": "predict", "sample": "m:x", "app_dir": "d"}
    assert vars(options) == {
        "seconds": 0.5,
        "clients": 3,
        "arms": ("script", "runner"),
        "sweep": False,
        "patience": 9.0,
    }


def test_json_on_standard_output(invoke: Doctor, tmp_path: Path) -> None:
    """``--json -`` prints JSON and nothing else; where the report went is said beside it."""
    result = invoke("--json", "-", "--html", "page.html")
    assert json.loads(result.stdout)["findings"][0]["key"] == "two-pools"
    assert "written: page.html" in result.stderr
    assert (tmp_path / "page.html").exists()


def test_json_in_a_file(invoke: Doctor, tmp_path: Path) -> None:
    """``--json FILE`` writes it beside the table; ``--no-html`` writes no report."""
    result = invoke("--json", "figures.json", "--no-html")
    figures = (tmp_path / "figures.json").read_text()
    assert json.loads(figures) == json.loads(json.dumps(as_json(DIAGNOSIS)))
    # Many numbers are one line.
    assert f'      "latencies": {json.dumps(DIAGNOSIS.arms[0].latencies)},\n' in figures
    assert result.stdout.endswith("written: figures.json\n")
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--arms", "scripts"], "executor, runner, runner-retain, and not scripts"),
        (["--arms", ","], "and not nothing"),
        (["--json", "/nowhere/figures.json"], "/nowhere/figures.json can't be written"),
        (["--html", "/"], "/ can't be written: name another file"),
    ],
)
def test_bad_options(invoke: Doctor, arguments: list[str], told: str) -> None:
    """What can't be done is told in one line, before anything is measured."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
    assert not invoke.asked


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (TargetError("m has no 'Model'"), 2, "asgi-infer: m has no 'Model'"),
        (TargetError("it said \x1b[2J"), 2, "asgi-infer: it said  [2J"),
        (OSError(28, "No space left"), 2, "asgi-infer: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "asgi-infer: interrupted: nothing is left running"),
    ],
)
def test_ends(invoke: Doctor, error: BaseException, code: int, told: str) -> None:
    """Whatever ends it has one line and an exit code."""
    result = invoke(found=error)
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1] == told


def test_a_package_that_is_missing(invoke: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the report needs is looked for before anything is measured."""
    monkeypatch.delattr("asgi_infer.doctor._report", raising=False)
    monkeypatch.setitem(sys.modules, "asgi_infer.doctor._report", None)
    result = invoke()
    assert result.exit_code == 1
    assert result.stderr.endswith("pip install 'asgi-infer[doctor]'\n")
    assert not invoke.asked


@pytest.mark.parametrize("hangs_up", [signal.SIG_DFL, signal.SIG_IGN])
def test_signals(invoke: Doctor, hangs_up: signal.Handlers) -> None:
    """What ends a process ends the doctor with all that it started, but not what is ignored; and
    afterwards all is as before."""
    signal.signal(signal.SIGHUP, hangs_up)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    invoke("--no-html")
    with pytest.raises(SystemExit, match="143"):
        invoke.signals[signal.SIGTERM](signal.SIGTERM, None)
    assert (invoke.signals[signal.SIGHUP] is signal.SIG_IGN) == (hangs_up is signal.SIG_IGN)
    assert signal.getsignal(signal.SIGHUP) is hangs_up
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# -- doctor, for real --------------------------------------------------------------------------


@on_linux
def test_a_real_diagnosis(tmp_path: Path) -> None:
    """From the command line to the figures and the report, through real processes."""
    arguments = [*MODEL, "--call", "predict", "--seconds", "0.1", "--arms", "script,runner"]
    options = ["--no-sweep", "--json", "-", "--html", str(tmp_path / "page.html")]
    result = subprocess.run(
        [*COMMAND, "doctor", *arguments, *options],
        check=True,
        timeout=50,
        capture_output=True,
        text=True,
    )
    assert [arm["key"] for arm in json.loads(result.stdout)["arms"]] == ["script", "runner"]
    assert (tmp_path / "page.html").read_text().startswith("<!")


@on_linux
@pytest.mark.parametrize(
    ("by", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupted_diagnosis(by: signal.Signals, code: int, tmp_path: Path) -> None:
    """Ctrl-C, ``kill`` and a terminal that closes end it at once, with all that it started, in the
    middle of a call.
    """
    command = [*COMMAND, "doctor", *MODEL, "--call", "hang", "--no-html"]
    hangs = tmp_path / "hangs"
    environment = {**os.environ, "HANGS": str(hangs), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as doctor:
        assert doctor.stderr is not None
        until_true(hangs.exists)
        (child,) = psutil.Process(doctor.pid).children(recursive=True)
        doctor.send_signal(by)
        assert doctor.wait(LIMIT) == code
        last = doctor.stderr.read().splitlines()[-1]
    assert not child.is_running()
    assert list(tmp_path.iterdir()) == [hangs]  # no temporary file either
    if by is signal.SIGINT:
        assert last == "asgi-infer: interrupted: nothing is left running"


# -- run ---------------------------------------------------------------------------------------


def launched(*arguments: str, **environment: str) -> Any:
    """``asgi-infer run``, for real."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    usual = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [*COMMAND, "run", *arguments],
        check=False,
        timeout=50,
        capture_output=True,
        text=True,
        # On fast and slow cores this would be set as well.
        env={**usual, "KMP_BLOCKTIME": "200", **environment},
    )


def test_run() -> None:
    """The command is executed with its own options, in an environment that is told."""
    show = "import os, sys; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'],"
    program = [sys.executable, "-c", f"{show} sys.argv[1:])", "--threads", "9"]
    result = launched("--threads", "3", "--", *program, MKL_NUM_THREADS="1")
    assert result.stdout == "3 1 ['--threads', '9']\n"
    assert result.stderr.splitlines() == [
        "asgi-infer: OMP_NUM_THREADS=3",
        "asgi-infer: OPENBLAS_NUM_THREADS=3",
        "asgi-infer: MKL_NUM_THREADS=1 stays",
    ]


@on_linux
def test_signals_that_python_ignores() -> None:
    """The command does not ignore them: what it writes to may end, and so does it."""
    status = launched("--", "grep", "SigIgn", "/proc/self/status").stdout
    ignored = int(status.split()[1], 16)
    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


class Run:
    """``asgi-infer run``, which executes nothing.

    :ivar done: file, command and environment of what it would have executed
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, list[str], dict[str, str]]] = []
        monkeypatch.setattr(os, "execve", self._execve)

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(_commands.app, ["run", *arguments])

    def _execve(self, path: str, command: list[str], environment: dict[str, str]) -> None:
        if "no-program" in path:
            raise OSError(8, "Exec format error")
        self.done.append((path, command, environment))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command."""
    return Run(monkeypatch)


def test_what_is_executed(run: Run) -> None:
    """The file that was found, under the name that was given, with what was there and was set."""
    run("--retain-memory", "env", "-0")
    ((path, command, environment),) = run.done
    assert Path(path).name == "env"
    assert command == ["env", "-0"]
    assert "mmap_max=0" in environment["GLIBC_TUNABLES"]
    assert environment["PATH"] == os.environ["PATH"]


def test_what_is_set_is_not_replaced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for, and is set otherwise, is said to stay."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "asgi-infer: OMP_NUM_THREADS=7 stays\n" in run("--threads", "3", "env").stderr
    assert run.done[0][2]["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], 2, "Missing argument"),
        (["no-such-command"], 127, "there is no command 'no-such-command': is it installed"),
        (["--allocator", "malloc", "env"], 2, "--allocator is one of"),
        (["--threads", "0", "env"], 2, "Invalid value for '--threads'"),
    ],
)
def test_what_can_not_be_run(run: Run, arguments: list[str], code: int, told: str) -> None:
    """Nothing is executed; what is wrong is said, with the code that shells have for it."""
    result = run(*arguments)
    assert (result.exit_code, told in result.stderr) == (code, True)
    assert not run.done


def test_a_file_that_is_no_program(run: Run, tmp_path: Path) -> None:
    """What the system refuses to execute is told."""
    program = tmp_path / "no-program"
    program.write_text("nothing")
    program.chmod(0o755)
    result = run(str(program))
    assert result.exit_code == 126
    assert "can't be executed: Exec format error" in result.stderr


# -- the page ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["doctor", "run"])
def test_every_option_is_documented(command: str) -> None:
    """The how-to has each option of each command."""
    page = (ROOT / "docs" / "how-to" / "doctor.md").read_text()
    described = CliRunner().invoke(_commands.app, [command, "--help"], env={"COLUMNS": "200"})
    options = set(re.findall(r"--[a-z][a-z-]*", described.stdout)) - {"--help", "--sweep"}
    assert len(options) >= 3
    for option in options:
        assert f"`{option}" in page, option
