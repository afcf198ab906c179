"""The commands of ``asgi-infer``, and how they speak: in one line, with an exit code.

What only ``doctor`` needs is imported by it: ``run`` starts at once, and works without that.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import _launch
from .native import cpu

if TYPE_CHECKING:
    from rich.console import Console

    from .doctor._doctor import Progress
    from .doctor._results import Diagnosis

BAD_INPUT = _launch.BAD_INPUT
KILLED = 128  # and the number of the signal
INTERRUPTED = KILLED + signal.SIGINT
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]

REPORT = Path("asgi-infer-doctor.html")

_NUMBERS = re.compile(r'\[\n[^][{}"]*\]')  # a list of nothing else, in indented JSON

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Full-CPU native inference in ASGI applications: find out what slows a model down, and "
    "start servers with the right environment.",
)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:MODEL",
        help="What makes the model: a class or a function without arguments.",
    ),
]
Call = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The method to call; without it, the model itself."),
]
Sample = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="MODULE:SAMPLE",
        help="What to call it with, or a function that makes that.",
    ),
]
Clients = Annotated[int, typer.Option(min=1, help="That call at the same time.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="To measure each way for.")]
Arms = Annotated[
    str | None, typer.Option(metavar="KEY,...", help="The ways to measure; by default all.")
]
Sweep = Annotated[bool, typer.Option(help="Try other numbers of native threads.")]
Patience = Annotated[
    float, typer.Option(min=1.0, help="Seconds that loading, or any one answer, may take.")
]
AppDir = Annotated[str, typer.Option(metavar="DIR", help="Where modules are found.")]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the figures there; - for output."),
]
Html = Annotated[Path, typer.Option(metavar="FILE", help="Write the report there.")]
NoHtml = Annotated[bool, typer.Option("--no-html", help="Write no report.")]


@app.command()
def doctor(
    model: Model,
    call: Call = None,
    sample: Sample = None,
    clients: Clients = 1,
    seconds: Seconds = 3.0,
    arms: Arms = None,
    sweep: Sweep = True,
    patience: Patience = 120.0,
    app_dir: AppDir = ".",
    json_file: Json = None,
    html: Html = REPORT,
    no_html: NoHtml = False,
) -> None:
    """Measure a model in a script and behind a server, and say where the cores went."""
    from .doctor import _doctor
    from .doctor._target import Target

    target = Target(model=model, call=call, sample=sample, app_dir=app_dir)
    with _in_one_line(), _cleaning_up():
        options = _doctor.Options(
            seconds=seconds,
            clients=clients,
            arms=_chosen(arms),
            sweep=sweep,
            patience=patience,
        )
        outputs = _Outputs(json_file, None if no_html else html)
        with _progress() as progress:
            diagnosis = _doctor.diagnose(target, options, progress)
        outputs.write(diagnosis)


@app.command(context_settings={"allow_interspersed_args": False}, options_metavar="[OPTIONS] --")
def run(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help="What to execute.")],
    threads: Annotated[
        int | None, typer.Option(min=1, help="Native threads; by default as many as CPUs.")
    ] = None,
    retain_memory: Annotated[
        bool, typer.Option("--retain-memory", help="Keep freed memory in the process (glibc).")
    ] = False,
    allocator: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"One of {', '.join(_launch.PACKAGES)}.")
    ] = None,
) -> None:
    """Execute a command in the environment that native libraries need before they are loaded.

    What is in the environment already stays.
    """
    try:
        settings = _launch.settings(
            os.environ,
            cpu.budget(),
            threads=threads,
            retain_memory=retain_memory,
            allocator=allocator,
        )
        path = _launch.executable(command, os.environ.get("PATH"))
        for name, value in settings.items():
            _say(f"{name}={value}")
        for name, value in _launch.kept(os.environ, threads=threads, allocator=allocator).items():
            _say(f"{name}={value} stays")
        _launch.execute(path, command, {**os.environ, **settings})
    except _launch.LaunchError as error:
        _end(str(error), error.code)


class _Outputs:
    """Where the diagnosis goes.

    Made before it is measured: a bad path, or a package that is missing, is told at once.

    :raises TargetError: a file can't be written
    """

    def __init__(self, json_file: str | None, html: Path | None) -> None:
        from .doctor._target import TargetError

        if html is not None:
            from .doctor import _report  # noqa: F401  # what it needs is there
        self._to_stdout = json_file == "-"
        self._json = Path(json_file) if json_file and not self._to_stdout else None
        self._html = html
        for path in (self._json, self._html):
            if path is not None and not _writable(path):
                raise TargetError(f"{path} can't be written: name another file")

    def write(self, diagnosis: Diagnosis) -> None:
        """The table for people, unless the output is for a machine; and the files."""
        from rich.console import Console

        from .doctor._results import as_json
        from .doctor._table import print_diagnosis

        figures = _indented(as_json(diagnosis))
        if self._to_stdout:
            typer.echo(figures)
        else:
            print_diagnosis(Console(highlight=False), diagnosis)
        if self._json is not None:
            self._json.write_text(figures + "\n")
        if self._html is not None:
            from .doctor._report import report

            self._html.write_text(report(diagnosis), encoding="utf-8")
        for path in filter(None, (self._json, self._html)):
            typer.echo(f"written: {path}", err=self._to_stdout)


def _indented(values: dict[str, Any]) -> str:
    """JSON that people can read too: thousands of latencies are one line."""
    text = json.dumps(values, indent=2)
    return _NUMBERS.sub(lambda found: "".join(found[0].split()).replace(",", ", "), text)


def _writable(path: Path) -> bool:
    return os.access(path if path.is_file() else path.parent, os.W_OK) and not path.is_dir()


def _chosen(arms: str | None) -> tuple[str, ...]:
    """The keys in the order in which they are measured.

    :raises TargetError: there is no such arm
    """
    from .doctor._arms import TITLES
    from .doctor._target import TargetError

    if arms is None:
        return tuple(TITLES)
    wanted = {key.strip() for key in arms.split(",") if key.strip()}
    unknown = wanted - set(TITLES)
    if unknown or not wanted:
        raise TargetError(
            f"--arms takes {', '.join(TITLES)}, and not {', '.join(sorted(unknown)) or 'nothing'}"
        )
    return tuple(key for key in TITLES if key in wanted)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere a line for each thing that begins."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)


class _Lines:
    """Says what begins, once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = ""

    def __call__(self, what: str, done: float) -> None:
        if what != self._said:
            self._console.print(f"{done:4.0%} {what}", soft_wrap=True)
        self._said = what


@contextmanager
def _in_one_line() -> Iterator[None]:
    """No traceback for what users can get wrong, what the system has no room for, or Ctrl-C."""
    from .doctor._target import TargetError

    try:
        yield
    except (TargetError, OSError) as error:
        _end(str(error), BAD_INPUT)
    except ImportError as error:  # of ours: what the user's modules raise has been told
        _end(f"{error}: pip install 'asgi-infer[doctor]'", 1)
    except KeyboardInterrupt:
        _end("interrupted: nothing is left running", INTERRUPTED)


@contextmanager
def _cleaning_up() -> Iterator[None]:
    """What usually ends a process at once leaves it the time to end those that it has started."""

    def end(number: int, _frame: object) -> None:
        sys.exit(KILLED + number)

    before = {number: signal.getsignal(number) for number in ENDING}
    for number, action in before.items():
        if action is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def _end(text: str, code: int) -> NoReturn:
    _say(text)
    sys.exit(code)


def _say(text: str) -> None:
    # It may hold what a model has written, and that a terminal would obey.
    printable = "".join(each if each.isprintable() else " " for each in text)
    typer.echo(f"asgi-infer: {printable}", err=True)
