"""The diagnosis in a terminal, or in a file that its output goes to."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._figures import Column, code, columns, counted, noise, plain, where
from ._results import Arm, Diagnosis, Finding

WORDS = {"problem": "PROBLEM", "advice": "ADVICE", "fine": "FINE"}
STYLES = {"problem": "bold red", "advice": "bold yellow", "fine": "bold green"}
WIDEST_TITLE = 30
GAP = 2


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """Print the figures, and then what they say and which lines to change.

    Wherever it goes, it is to be read: in 80 columns, without colours, in a file.

    :param console: where to; its width decides how many columns stand side by side.
    :param diagnosis: what was measured.
    """
    if diagnosis.machine.noisy:
        console.print(Text(noise(diagnosis.machine), style="bold yellow"), end="\n\n")
    target = plain(f"{diagnosis.target}.{diagnosis.call}")
    console.print(Text(f"{target}, {counted(diagnosis.clients, 'client')}", style="bold"))
    console.print(Text(where(diagnosis.machine), style="dim"), end="\n\n")
    shown = columns(diagnosis)
    _print_arms(console, diagnosis, diagnosis.arms, "how it was run", shown)
    few = [column for column in shown if column.sweep]
    _print_arms(console, diagnosis, diagnosis.sweep, "threads", few)
    for finding in diagnosis.findings:
        if finding.key != "noise" or not diagnosis.machine.noisy:  # which came first
            _print_finding(console, finding)


def _print_arms(
    console: Console,
    diagnosis: Diagnosis,
    arms: Sequence[Arm],
    heading: str,
    shown: Sequence[Column],
) -> None:
    cells = {column: [column.cell(arm, diagnosis) for arm in arms] for column in shown}
    titles = [plain(arm.title) for arm in arms]
    width = min(WIDEST_TITLE, max(map(len, (heading, *titles))))
    for side_by_side in _fitting(cells, console.width - width) if arms else ():
        console.print(_table(heading, titles, {each: cells[each] for each in side_by_side}))
        console.print()


def _fitting(cells: dict[Column, list[str]], width: int) -> Iterator[list[Column]]:
    """The columns in groups, each of which fits beside the titles."""
    group: list[Column] = []
    left = width
    for column, values in cells.items():
        needed = GAP + max(map(len, (*column.header.splitlines(), *values)))
        if group and needed > left:
            yield group
            group, left = [], width
        group.append(column)
        left -= needed
    yield group


def _table(heading: str, titles: list[str], cells: dict[Column, list[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, GAP - 1, 0, 0), show_edge=False)
    table.add_column(heading, max_width=WIDEST_TITLE, overflow="ellipsis", no_wrap=True)
    for column in cells:
        table.add_column(column.header, justify="right", no_wrap=True)
    for title, *values in zip(titles, *cells.values(), strict=True):
        table.add_row(Text(title), *values)
    return table


def _print_finding(console: Console, finding: Finding) -> None:
    style = STYLES.get(finding.severity, "bold")
    word = WORDS.get(finding.severity, plain(finding.severity).upper())
    console.print(Text.assemble((word, style), ": ", (plain(finding.headline), "bold")))
    if finding.detail:
        lines = textwrap.wrap(plain(finding.detail), max(20, console.width - 2))
        console.print(Text("\n".join(f"  {line}" for line in lines)))
    if finding.lines:
        console.print()
    for line in finding.lines:
        # To be copied: never broken into two, however narrow the terminal is.
        console.print(Text(f"    {code(line)}", style="cyan"), soft_wrap=True)
    console.print()
